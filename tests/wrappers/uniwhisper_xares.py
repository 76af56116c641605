"""X-ARES 0.1.3 on the encoder in the folder that ENCODER names.

    pip install xares requests 'torchaudio<2.9' -e .
    export PYTHONPATH=$PWD:$PWD/tests/wrappers ENCODER=$PWD/weights/whisper-base
    python -m xares.run uniwhisper_xares.py tasks/esc50_task.py --max-jobs 0

--max-jobs 0: without a GPU. `tasks` came with X-ARES: a module's name, found from anywhere; a
task of one's own is a file in PYTHONPATH. X-ARES keeps audio, features and scores in ./env under
the class's name, here the folder's: after other weights in a folder, delete them there.
With torchaudio 2.9 and later X-ARES encodes no clip and does not say so.
"""
import os
from pathlib import Path

import torch

import uniwhisper  # not its names: X-ARES takes the one that ends in "Encoder"


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = uniwhisper.load_encoder(os.environ["ENCODER"]).eval()
        self.sampling_rate, self.output_dim = self.encoder.sample_rate, self.encoder.width
        self.hop_size_in_ms = 1000 * self.encoder.token_seconds

    @torch.no_grad()
    def forward(self, audio):
        """audio (B, S) -> (B, T, D), nested: X-ARES keeps each clip's own T tokens."""
        # X-ARES pads a clip with zeros to the longest of its batch, and passes no lengths.
        places = torch.arange(1, audio.shape[1] + 1, device=audio.device)
        samples = ((audio != 0) * places).amax(1)  # (B,)
        features, lengths = self.encoder.encode(audio, samples)
        clips = [x[:n] for x, n in zip(features, lengths)]
        return torch.nested.nested_tensor(clips, layout=torch.jagged)


FOLDER = Path(os.environ["ENCODER"]).resolve()
Encoder.__name__ = "_".join((*FOLDER.parts[1:], "Encoder"))
