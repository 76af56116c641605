"""The adapters between an audio encoder and a language model: (B, T, D_audio) -> (B, T', D_text)."""
import argparse
import math

import torch
import torch.nn.functional as F
from torch import nn

GELU_RMS = math.sqrt(0.42522)  # E[gelu(z)^2] for z ~ N(0, 1): what a unit-variance hidden layer keeps of its power


class StackAdapter(nn.Module):
    """Stack neighbouring tokens, LayerNorm, two-layer MLP.

    `stack` tokens of 20 ms become one: 4 give 12.5 audio tokens a second. A last group that `stack` does not
    fill is kept, filled up with zeros. At the start the output has root mean square `output_rms`, which should
    be that of the decoder's token embeddings: a frozen decoder then sees inputs of the size that it knows. A fixed
    `gain` brings it there, not small weights: Adam's steps, which do not know how small a weight is, would blow
    these up at once.

    # assumption: the paper says "a lightweight adapter" and gives no shape.

    Shapes: (B, T, d_audio), zero beyond each clip's own length -> (B, ceil(T / stack), d_text).
    """

    def __init__(self, d_audio: int, d_text: int, stack: int = 4, output_rms: float = 0.02):
        super().__init__()
        if stack < 1:
            raise ValueError(f"stack is {stack}; it must be at least 1")
        self.stack = stack
        self.norm = nn.LayerNorm(stack * d_audio)
        self.fc1 = nn.Linear(stack * d_audio, d_text)
        self.fc2 = nn.Linear(d_text, d_text)
        # LayerNorm's unit variance passes fc1 and fc2 unchanged; between them GELU takes it down to GELU_RMS.
        self.register_buffer("gain", torch.tensor(output_rms / GELU_RMS))
        nn.init.normal_(self.fc1.weight, std=(stack * d_audio) ** -0.5)
        nn.init.normal_(self.fc2.weight, std=d_text**-0.5)
        nn.init.zeros_(self.fc1.bias)
        nn.init.zeros_(self.fc2.bias)

    def lengths(self, tokens):
        """Encoder tokens -> audio tokens (int or tensor)."""
        return (tokens + self.stack - 1) // self.stack

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        x = F.pad(x, (0, 0, 0, -t % self.stack))
        x = x.reshape(b, -1, self.stack * d)  # (B, A, stack * d_audio)
        return self.gain * self.fc2(F.gelu(self.fc1(self.norm(x))))  # (B, A, d_text)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--d-audio", type=int, default=512, help="encoder width (512: whisper-base)")
    p.add_argument("--d-text", type=int, default=896, help="decoder width (896: Qwen2.5-0.5B)")
    p.add_argument("--stack", type=int, default=4, help="encoder tokens of 20 ms joined into one audio token")
    args = p.parse_args()
    if args.stack < 1:
        p.error(f"--stack is {args.stack}; it must be at least 1")
    adapter = StackAdapter(args.d_audio, args.d_text, args.stack)
    out = adapter(torch.randn(1, 1500, args.d_audio))
    print(f"{sum(w.numel() for w in adapter.parameters()) / 1e6:.2f} M parameters; 30 s -> {tuple(out.shape)}")


if __name__ == "__main__":
    main()
