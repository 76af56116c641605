"""The adapter between an audio encoder and a decoder: (B, T, D_audio) -> (B, A, D_text)."""
import argparse
import math

import torch
import torch.nn.functional as F
from torch import nn


class StackAdapter(nn.Module):
    """Stack neighbouring tokens, LayerNorm, two-layer MLP.

    `stack` tokens of 20 ms become one: 4 give 12.5 audio tokens a second. The last
    group is filled up with zeros. At the start the output's root mean square is
    `output_rms`: that of what the decoder is used to read.

    # assumption: the paper says "a lightweight adapter" and gives no shape.
    """

    def __init__(self, d_audio: int, d_text: int, stack: int = 4, output_rms: float = 0.02):
        super().__init__()
        if stack < 1:
            raise ValueError(f"stack is {stack}; it must be at least 1")
        self.stack = stack
        self.norm = nn.LayerNorm(stack * d_audio)
        self.fc1 = nn.Linear(stack * d_audio, d_text)
        self.fc2 = nn.Linear(d_text, d_text)
        for layer in (self.fc1, self.fc2):  # unit variance passes unchanged
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
        # The scale is a fixed factor, not small weights: Adam's steps, which do not know
        # how small a weight is, would blow these up at once.
        gelu_rms = math.sqrt(0.42522)  # of gelu(z), z ~ N(0, 1)
        self.gain = nn.Parameter(torch.tensor(output_rms / gelu_rms), requires_grad=False)

    def lengths(self, tokens):
        """Encoder tokens -> audio tokens (int or tensor)."""
        return (tokens + self.stack - 1) // self.stack

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, d_audio), zero beyond each clip's length -> (B, A, d_text)."""
        b, t, d = x.shape
        x = F.pad(x, (0, 0, 0, -t % self.stack))
        x = self.norm(x.reshape(b, -1, self.stack * d))
        return self.gain * self.fc2(F.gelu(self.fc1(x)))


class NoAdapter(nn.Module):
    """Passes features on, to a decoder as wide as the encoder."""

    def lengths(self, tokens):
        return tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d-audio", type=int, default=512, help="encoder's width")
    parser.add_argument("--d-text", type=int, default=896, help="decoder's width")
    parser.add_argument("--stack", type=int, default=4, help="encoder tokens of an audio token")
    print(StackAdapter(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
