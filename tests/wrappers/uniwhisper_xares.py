"""X-ARES 0.1.3 (pip install xares) on the encoder in the folder that ENCODER names.

    export PYTHONPATH=REPOSITORY:REPOSITORY/tests/wrappers ENCODER=out/first/encoder
    python -m xares.run uniwhisper_xares.py tasks/esc50_task.py tasks/desed_task.py

Add --max-jobs 0 without a GPU. X-ARES keeps features and scores in ./env under the
class's name, so that is the folder's: after other weights in a folder, delete them there.
"""
import os
import re
from pathlib import Path

import torch

import uniwhisper  # not its names: X-ARES takes the one that ends in "Encoder"

FOLDER = Path(os.environ["ENCODER"]).resolve()
NAME = re.sub(r"\W+", "_", str(FOLDER)).strip("_") + "_Encoder"


class Features(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = uniwhisper.load_encoder(FOLDER).eval()
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


globals()[NAME] = type(NAME, (Features,), {})
