"""xares-llm 0.0.12 on the encoder in the folder that ENCODER names.

    pip install git+https://github.com/xiaomi-research/xares-llm 'transformers<5' -e .
    export PYTHONPATH=$PWD:$PWD/tests/wrappers ENCODER=$PWD/weights/whisper-base
    python -m xares_llm.run $(python -m uniwhisper_xares_llm) task1 task1

It decodes through torchcodec, which needs FFmpeg's libraries (apt install ffmpeg).
The inner command prints this module and a name made of the folder: xares-llm keeps runs and
scores under that name. Run by its file, all encoders would share the file's name: so no name
here ends in "Encoder", and xares-llm refuses the file.
"""
import os
from pathlib import Path

import torch
from torchaudio.functional import resample

import uniwhisper

NAME = "_".join(Path(os.environ["ENCODER"]).resolve().parts[1:]).replace(".", "_")
RATE = 16_000  # of xares-llm's audio


class Features(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = uniwhisper.load_encoder(os.environ["ENCODER"]).eval()
        self.output_dim = self.encoder.width

    def forward(self, audio, audio_mask=None):
        """audio (B, S) at 16 kHz, mask (B, S) -> features (B, T, D), mask (B, T)."""
        rate = self.encoder.sample_rate
        samples = None if audio_mask is None else audio_mask.sum(1) * rate // RATE
        features, lengths = self.encoder.encode(resample(audio, RATE, rate), samples)
        mask = uniwhisper.token_mask(lengths, features.shape[1])
        return features, mask.long().to(features.device)


globals()[NAME] = Features
if __name__ == "__main__":
    print(f"{Path(__file__).stem}.{NAME}")
