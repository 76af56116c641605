"""MTEB's audio tasks (pip install 'mteb[audio]') on the encoder in a folder.

    export PYTHONPATH=REPOSITORY
    python tests/wrappers/uniwhisper_mteb.py out/first/encoder BeijingOpera CREMA_D GTZANGenre

All of MAEB that needs no text: mteb.get_benchmark("MAEB(audio-only)") in get_tasks' place.
MTEB keeps scores (~/.cache/mteb) under the model's name, so that is the folder's: after
other weights in a folder, delete them there.
"""
import re
import sys
from pathlib import Path

import mteb
import torch
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.modality_collators import AudioCollator
from torch.nn.utils.rnn import pad_sequence

from uniwhisper import load_encoder


class UniWhisper(AbsEncoder):
    def __init__(self, folder, device="cuda" if torch.cuda.is_available() else "cpu"):
        self.encoder, self.device = load_encoder(folder).eval().to(device), device
        name = re.sub(r"\W+", "_", str(Path(folder).resolve())).strip("_")
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": f"uniwhisper/{name}", "modalities": ["audio"]})

    @torch.inference_mode()
    def encode(self, inputs, **kwargs):
        """A DataLoader of N clips -> means over their real tokens, (N, D)."""
        inputs.collate_fn = AudioCollator(target_sampling_rate=self.encoder.sample_rate)
        pooled = []
        for batch in inputs:
            clips = [torch.as_tensor(audio["array"]).flatten() for audio in batch["audio"]]
            samples = torch.tensor([len(clip) for clip in clips])
            audio = pad_sequence(clips, batch_first=True).to(self.device)  # (B, S)
            pooled.append(self.encoder.pooled(audio, samples).cpu())
        return torch.cat(pooled).numpy()


if __name__ == "__main__":
    tasks = mteb.get_tasks(tasks=sys.argv[2:])
    print(mteb.evaluate(UniWhisper(sys.argv[1]), tasks).to_dataframe())
