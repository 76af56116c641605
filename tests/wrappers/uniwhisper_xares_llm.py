"""xares-llm 0.0.12 (with transformers below 5) on the encoder in the folder that ENCODER names.

    export PYTHONPATH=REPOSITORY:REPOSITORY/tests/wrappers ENCODER=out/first/encoder
    python -m xares_llm.run $(python -m uniwhisper_xares_llm) task1 task1

The inner command prints this module and a class named by the folder: xares-llm keeps runs
and scores under that name. A class named ...Encoder could also be run by its file, and then
every encoder's scores would be kept under the file's name: so the name does not end so.
"""
import os
import re
from pathlib import Path

import torch
import torchaudio

import uniwhisper

FOLDER = Path(os.environ["ENCODER"]).resolve()
NAME = re.sub(r"\W+", "_", str(FOLDER)).strip("_")
RATE = 16_000  # of xares-llm's audio


class Features(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = uniwhisper.load_encoder(FOLDER).eval()
        self.output_dim = self.encoder.width

    def forward(self, audio, audio_mask=None):
        """audio (B, S) at 16 kHz, mask (B, S) -> features (B, T, D), mask (B, T)."""
        rate = self.encoder.sample_rate
        samples = None if audio_mask is None else audio_mask.sum(1) * rate // RATE
        audio = torchaudio.functional.resample(audio, RATE, rate)
        features, lengths = self.encoder.encode(audio, samples)
        return features, uniwhisper.token_mask(lengths).long().to(features.device)


globals()[NAME] = type(NAME, (Features,), {})
if __name__ == "__main__":
    print(f"{Path(__file__).stem}.{NAME}")
