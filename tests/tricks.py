"""Which speed tricks would pay? One training step by the plain code and with each trick alone.

    python tests/tricks.py --encoder DIR --decoder DIR [--seconds 2 10] [--precision bf16 fp32]

A step: log-mel, forward, backward, clip, AdamW, on a CPU. Its batch: 32 s of noise in clips of
one length, and chats as long as the suite's. Plain steps and steps with the trick alternate in
one process (the C library's settings: in processes that alternate); times are medians. Memory
is the most that the process held during a step. A trick replaces a function or two of the
repository by one below, which computes the same numbers (test_benchmark.py compares them).
"""
import argparse
import contextlib
import math
import sys
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import benchmark as bench  # noqa: E402
import train  # noqa: E402
import uniwhisper as uw  # noqa: E402
from data import Batch  # noqa: E402

CHATS = [  # as the suite has them: 4 to 6 tokens and a line break, 2 to 5; speech: 15
    ("Which language is spoken?", "Belarusian"),
    ("Transcribe the speech.", "The cat sat on the warm stone and waited for the evening rain."),
    ("Which word is spoken?", "yes"),
    ("Which family of instruments is playing?", "chromatic percussion"),
    ("What makes this sound?", "weapon strike"),
    ("Which note is played?", "G sharp"),
    ("How many people are speaking?", "two"),
    ("Which drum is hit?", "hi-hat"),
    ("Which voice is speaking?", "British")]


# ---------------------------------------------------------------- the decoder's positions

class Selection:
    """Some positions of (B, L) as one sequence (N): layers that work on single tokens then
    skip all others."""

    def __init__(self, keep: torch.Tensor):
        self.shape, self.index = keep.shape, None  # None: all positions, nothing is copied
        if not keep.all():
            self.index = keep.flatten().nonzero()[:, 0]

    def take(self, x):
        """(B, L, ...) -> (N, ...)."""
        x = x.flatten(0, 1)
        return x if self.index is None else x.index_select(0, self.index)

    def put_back(self, x, others=None):
        """(N, ...) -> (B, L, ...); elsewhere `others` (B, L, ...), or else zeros."""
        if self.index is not None:
            if others is None:
                others = x.new_zeros(*self.shape, *x.shape[1:])
            x = others.flatten(0, 1).index_copy(0, self.index, x)
        return x.unflatten(0, self.shape)


def selected_layer(layer, x, rotary, kept: Selection, out: Selection, known):
    """QwenLayer.forward: x (N, D) of the positions `kept` -> (n, D) of the positions `out`.

    known: keys and values of the prompts (B, L, KV heads, D / H), which x lacks; or None.
    """
    a, y = layer.self_attn, layer.input_layernorm(x)
    q = uw.rotate(a.q_norm(a.split(a.q_proj(y))), rotary)  # (N, H, D / H)
    k = uw.rotate(a.k_norm(a.split(a.k_proj(y))), rotary)
    v = a.split(a.v_proj(y))
    known_k, known_v = known or (None, None)
    q = kept.put_back(q).transpose(1, 2)  # (B, H, L, D / H)
    k = kept.put_back(k, known_k).transpose(1, 2)
    v = kept.put_back(v, known_v).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    y = a.o_proj(out.take(y.transpose(1, 2).flatten(2)))
    if out is not kept:
        x = out.take(kept.put_back(x))
    x = x + y
    return x + layer.mlp(layer.post_attention_layernorm(x))


@torch.no_grad()
def prompt_keys(decoder, prompts, length: int):
    """Every layer's keys and values of the prompts, (B, length, KV heads, D / H) each.

    Nothing that trains reaches them, so they need no gradient; equal prompts are computed once.
    """
    distinct, c = list(dict.fromkeys(map(tuple, prompts))), decoder.config
    ids = pad_sequence([torch.tensor(prompt) for prompt in distinct], batch_first=True)
    shape = len(distinct), c["num_key_value_heads"], length, c["head_dim"]
    caches = [uw.KVCache(shape, decoder.embed_tokens.weight) for _ in decoder.layers]
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    decoder(decoder.embed_tokens(ids), caches, positions)
    number = torch.tensor([distinct.index(tuple(prompt)) for prompt in prompts])
    return [(x.k[number].transpose(1, 2), x.v[number].transpose(1, 2)) for x in caches]


def counts(lists) -> torch.Tensor:
    """The length of each list: (B, 1)."""
    return torch.tensor([len(x) for x in lists])[:, None]


def answer_states_with(packed=False, known_prompts=False, short_last_layer=False):
    """QwenDecoder.answer_states with one of the tricks, or several."""

    def answer_states(self, audio, lengths, prompts, answers):
        rows = self.layout(lengths, prompts, answers)
        x = self.embed(rows, audio, lengths).to(self.embed_tokens.weight.dtype)  # (B, L, D)
        place, end = torch.arange(x.shape[1]), counts(rows)
        keep = (place < end) | (not packed)
        keep &= (place >= counts(prompts)) | (not known_prompts)
        kept = Selection(keep)
        predicts = Selection((place >= end - counts(answers)) & (place < end))
        known = [None] * len(self.layers)
        if known_prompts:
            known = prompt_keys(self, prompts, x.shape[1])
        with torch.autocast("cpu", enabled=False):
            plain_rotary = self.rotary(place[None], x.dtype)
            rotary = self.rotary(place.expand(keep.shape)[keep][None], x.dtype)
            rotary = [table[0, 0, :, None] for table in rotary]  # (N, 1, D / H)
            x = kept.take(x)  # (N, D)
            for layer, keys in zip(self.layers, known):
                short = short_last_layer and layer is self.layers[-1]
                if packed or known_prompts or short:
                    out = predicts if short else kept
                    x = selected_layer(layer, x, rotary, kept, out, keys)
                else:  # the plain layer
                    x = layer(kept.put_back(x), plain_rotary).flatten(0, 1)
            x = self.norm(x)
        return x if short_last_layer else predicts.take(kept.put_back(x))

    return answer_states


# ---------------------------------------------------------------- attention, loss, log-mel

fused_attention, whole_mel = F.scaled_dot_product_attention, uw.log_mel_spectrogram


def attention_by_products(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
    """Attention (B, H, L, D / H) by plain products while training, its scores in float32, as
    long as they fit into the cache."""
    if not q.requires_grad or q.shape[:3].numel() * k.shape[2] > 2**22:  # 16 MiB
        return fused_attention(q, k, v, attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    with torch.autocast("cpu", enabled=False):  # it would round the scores
        scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().mT  # (B, H, L, L)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            scores = scores.masked_fill_(~attn_mask, -math.inf)
        return scores.softmax(-1).to(v.dtype) @ v


class AnswerLoss(torch.autograd.Function):
    """Cross entropy through a frozen lm_head: states (N, D), weight (V, D), labels (N,) -> (N,).

    The states' gradient is made at once, while a piece's logits are there: they are neither
    kept for backward nor computed again.
    """

    @staticmethod
    def forward(ctx, states, weight, labels):
        losses, gradients, size = [], [], uw.LOGITS_AT_ONCE
        for piece, target in zip(states.split(size), labels[:, None].split(size)):
            logits = F.linear(piece, weight).float()  # (n, V)
            total = logits.logsumexp(1, keepdim=True)
            losses.append((total - logits.gather(1, target))[:, 0])
            if ctx.needs_input_grad[0]:  # softmax - truth
                share = logits.sub_(total).exp_()
                share.scatter_add_(1, target, share.new_full(target.shape, -1.0))
                gradients.append(share.to(piece.dtype) @ weight)
        ctx.save_for_backward(torch.cat(gradients) if gradients else None)
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gradients, = ctx.saved_tensors
        return (grad[:, None] * gradients).to(gradients.dtype), None, None


def answer_losses(self, states, labels):
    """UniWhisper.answer_losses."""
    with torch.autocast("cpu", enabled=False):
        return AnswerLoss.apply(states, self.decoder.lm_head.weight, labels)


def mel_in_pieces(audio, n_mels=80):
    """log_mel_spectrogram a few clips at a time, up to 30 s, which stay in the cache."""
    clips = max(1, uw.CHUNK // audio.shape[1])
    return torch.cat([whole_mel(some, n_mels) for some in audio.split(clips)])


# ---------------------------------------------------------------- the tricks

def decoder_trick(**which):
    return uw.QwenDecoder, "answer_states", answer_states_with(**which)


PRODUCTS = (F, "scaled_dot_product_attention", attention_by_products)
LOSS = (uw.UniWhisper, "answer_losses", answer_losses)
MEL = (uw, "log_mel_spectrogram", mel_in_pieces)
TRICKS = {  # what each replaces: (where, name, by what)
    "packed positions, padding skipped": [decoder_trick(packed=True)],
    "prompts' keys without gradient": [decoder_trick(known_prompts=True)],
    "answer positions alone in the last layer": [decoder_trick(short_last_layer=True)],
    "plain products as attention": [PRODUCTS],
    "loss with its own gradient": [LOSS],
    "log-mel in pieces": [MEL],
}
ALL = [decoder_trick(packed=True, known_prompts=True, short_last_layer=True), LOSS, MEL]


@contextlib.contextmanager
def replaced(replacements):
    with contextlib.ExitStack() as stack:
        for where, name, by in replacements:
            stack.enter_context(patch.object(where, name, by))
        yield


def new_batch(tokenizer, lengths: list[float]) -> Batch:
    """Clips of so many seconds, noise, with the chats above in turn."""
    samples = [round(length * uw.SAMPLE_RATE) for length in lengths]
    generator = torch.Generator().manual_seed(0)
    audio = [0.1 * torch.randn(n, generator=generator) for n in samples]
    chats = [CHATS[i % len(CHATS)] for i in range(len(samples))]
    return Batch(
        audio=pad_sequence(audio, batch_first=True), samples=torch.tensor(samples),
        prompts=[tokenizer.prompt(instruction) for instruction, _ in chats],
        answers=[tokenizer.answer(answer) for _, answer in chats],
        tasks=[], rows=[], instructions=[], texts=[], languages=[], skipped=[])


# ---------------------------------------------------------------- measuring

def build(a, precision: str, lengths: list[float]):
    """What a step takes: settings, model, optimizer and batch. The rates are 0: all steps are
    from the same weights."""
    s = train.Settings(encoder=a.encoder, decoder=a.decoder, device="cpu", stack=8,
                       precision=precision)
    model = train.build_model(s, None)
    optimizer, _ = train.build_optimizer(s, model, dict(step=0))
    return s, model, optimizer, new_batch(model.decoder.tokenizer, lengths)


def measured_step(*step) -> tuple[float, int]:
    """Seconds of a step, and the most bytes that the process held in it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
    return bench.seconds("cpu", bench.update, *step), bench.peak_bytes("cpu")


def show(name: str, plain, tricked) -> None:
    """A line of the table, of (seconds, bytes) without and with a trick."""
    before, after = (median(t for t, _ in steps) for steps in (plain, tricked))
    memory = [max(m for _, m in steps) / 2**30 for steps in (plain, tricked)]
    print(f"| {name} | {before:.2f} | {after:.2f} | {before / after:.2f} | "
          f"{memory[0]:.2f} | {memory[1]:.2f} |", flush=True)


def in_turn(a, precision: str, lengths: list[float]) -> None:
    """Plain steps and steps with each trick, in turn in this process."""
    step = build(a, precision, lengths)
    bench.update(*step)  # warm-up
    for name, replacements in TRICKS.items():
        if precision == "fp32" and PRODUCTS in replacements:
            continue  # the fused backward is slow in half precision alone
        plain, tricked = [], []
        with replaced(replacements):
            bench.update(*step)
        for _ in range(a.repeats):
            plain.append(measured_step(*step))
            with replaced(replacements):
                tricked.append(measured_step(*step))
        show(name, plain, tricked)


def alone(a, precision: str, lengths: list[float], tricked: bool) -> list[tuple[float, int]]:
    """Two steps, plain or with all tricks, of a process of its own, after two that warm up."""
    replacements = ALL if precision == "fp32" else [*ALL, PRODUCTS]
    step = build(a, precision, lengths)
    with replaced(replacements if tricked else []):
        return [measured_step(*step) for _ in range(4)][2:]


def in_processes(a, precision: str, lengths: list[float]) -> None:
    """What needs the C library's settings, which a process has from its start: in processes
    in turn."""
    plain, keeping, together = [], [], []
    for _ in range(a.repeats):
        for steps, tricked, environment in ((plain, False, {}),
                                            (keeping, False, bench.KEEP_FREED_MEMORY),
                                            (together, True, bench.KEEP_FREED_MEMORY)):
            steps += bench.in_own_process(alone, a, precision, lengths, tricked,
                                          environment=environment)
    show("C library keeps freed memory", plain, keeping)
    show("all together", plain, together)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--encoder", required=True, help="Whisper folder")
    p.add_argument("--decoder", required=True, help="Qwen folder")
    p.add_argument("--seconds", type=float, nargs="+", default=[2.0, 10.0], help="clip lengths")
    p.add_argument("--precision", nargs="+", default=["bf16"], choices=("bf16", "fp32"))
    p.add_argument("--repeats", type=int, default=3, help="steps, or processes, of each kind (3)")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    print(f"{torch.backends.cpu.get_cpu_capability()}, {a.threads} threads, "
          f"torch {torch.__version__}; {a.encoder} + {a.decoder}; median of {a.repeats}")
    for precision in a.precision:
        for length in a.seconds:
            lengths = [length] * max(1, round(32 / length))
            print(f"\n{precision}, {len(lengths)} clips of {length:g} s\n")
            print("| trick | plain, s | with it, s | plain / with it | plain, GiB | with it, GiB |")
            print("| --- | --- | --- | --- | --- | --- |", flush=True)
            bench.in_own_process(in_turn, a, precision, lengths)
            in_processes(a, precision, lengths)


if __name__ == "__main__":
    main()
