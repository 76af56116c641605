"""MTEB's audio tasks on the encoder in a folder.

    pip install 'mteb[audio]' -e .
    export PYTHONPATH=$PWD
    python tests/wrappers/uniwhisper_mteb.py weights/whisper-base BeijingOpera CREMA_D GTZANGenre

MTEB 2 decodes through torchcodec, which needs FFmpeg's libraries (apt install ffmpeg). All of
MAEB that needs no text: mteb.get_benchmark("MAEB(audio-only)") in get_tasks' place. MTEB keeps
scores (~/.cache/mteb) under the model's name, here the folder's: after other weights in a
folder, delete them there.
"""
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
    def __init__(self, folder, device="cpu"):
        self.encoder = load_encoder(folder).eval().to(device)
        name = "uniwhisper/" + "_".join(Path(folder).resolve().parts[1:])
        self.mteb_model_meta = ModelMeta.create_empty({"name": name, "modalities": ["audio"]})

    @torch.inference_mode()
    def encode(self, inputs, **kwargs):
        """A DataLoader of N clips -> means over their own tokens, (N, D)."""
        inputs.collate_fn = AudioCollator(target_sampling_rate=self.encoder.sample_rate)
        pooled = []
        for batch in inputs:
            clips = [torch.as_tensor(audio["array"]).flatten() for audio in batch["audio"]]
            samples = torch.tensor([len(clip) for clip in clips])
            audio = pad_sequence(clips, batch_first=True)  # (B, S)
            pooled.append(self.encoder.pooled(audio, samples).cpu())
        return torch.cat(pooled).numpy()


if __name__ == "__main__":
    model = UniWhisper(sys.argv[1], "cuda" if torch.cuda.is_available() else "cpu")
    print(mteb.evaluate(model, mteb.get_tasks(tasks=sys.argv[2:])).to_dataframe())
