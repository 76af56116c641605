"""38,000 hours on many GPUs, on paper: the work, the sampler, the evenness of the ranks.

    python tests/benchmarks/scale.py [--ranks 8 32 64] [--updates 100] [--rows 14000000]

Work: FLOPs of an update with whisper-large-v3 and Qwen2.5-7B. Sampler: seconds a batch on one
rank, drawn by train.py's own code from an index of 14 million made rows of 20 tasks, without
audio; the worst draws a new pool of 64 batches. Evenness: an update takes as long as the rank
with most FLOPs needs; mean over the ranks / most, of all updates together.
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import data  # noqa: E402
import train  # noqa: E402

WHISPER = dict(d_model=1280, encoder_layers=32, encoder_ffn_dim=5120, num_mel_bins=128,
               max_source_positions=1500)  # large-v3
QWEN = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, head_dim=128,
            num_attention_heads=28, num_key_value_heads=4, vocab_size=152064)  # 2.5-7B
HOURS, TASKS = 38_000, 20
PEAK, SHARE = 989e12, 0.4  # an H100's dense bf16 FLOP/s, and how much of it is used
ASKED = 15 + 6  # tokens of the chat, as data.py reckons, and of an instruction


# ---------------------------------------------------------------- FLOPs of an update

def encoder_flops(c: dict, clips: int, tokens: int) -> int:
    """Forward and backward of Whisper's encoder: 2 a weight and token, three times."""
    width = c["d_model"]
    conv1 = 2 * 2 * 3 * c["num_mel_bins"] * width  # a token: of frames, two a token
    conv2 = 2 * 3 * width * width
    linear = 2 * (4 * width * width + 2 * width * c["encoder_ffn_dim"])
    attention = 2 * 2 * width * tokens
    forward = conv1 + conv2 + c["encoder_layers"] * (linear + attention)
    return clips * tokens * (3 * forward - conv1)  # log-mel needs no gradient


def decoder_flops(c: dict, clips: int, positions: int) -> int:
    """Forward and backward of a frozen Qwen, without the head: its weights need no gradient.

    Attention counts in full, though half of it is masked: a hundredth of the whole.
    """
    width, inner = c["hidden_size"], c["num_attention_heads"] * c["head_dim"]
    projections = 2 * width * (inner + c["num_key_value_heads"] * c["head_dim"])
    linear = 2 * (projections + 3 * width * c["intermediate_size"])
    attention = 2 * 2 * inner * positions
    return clips * positions * c["num_hidden_layers"] * (2 * linear + 3 * attention)


def update_flops(encoder: dict, decoder: dict, stack: int, silence: float, seconds, asked,
                 answers) -> dict[str, float]:
    """FLOPs of a batch by part, with padding, as the device computes it.

    seconds, asked, answers (B,): clips' lengths; tokens around the audio, of the answer.
    """
    clips, tokens = len(seconds), np.maximum(1, np.round(50 * seconds)).astype(int)
    heard = min(encoder["max_source_positions"], tokens.max() + round(50 * silence))
    audio = -(-tokens // stack)  # audio tokens
    positions = (asked + audio + answers - 1).max()  # the end token predicts nothing
    wide, narrow = decoder["hidden_size"], stack * encoder["d_model"]
    adapter = 3 * 2 * clips * audio.max() * (narrow * wide + wide * wide)
    # Logits are made again in backward, and need no gradient of the head's weights.
    head = 3 * 2 * wide * decoder["vocab_size"] * np.sum(answers)
    return {"encoder": encoder_flops(encoder, clips, heard),
            "decoder": decoder_flops(decoder, clips, positions), "adapter": adapter, "head": head}


def print_work() -> None:
    """GFLOP an audio second, and hours for a pass of all audio on eight GPUs."""
    print(f"GFLOP an audio second: clips of 10 s, {ASKED} tokens around them, answers of 12; "
          f"a pass of {HOURS} h on 8 GPUs at {SHARE:.0%} of {PEAK / 1e12:g} TFLOP/s")
    print("stack silence   encoder  decoder  adapter  head    all  audio s/s  a pass")
    for stack, silence in ((4, 0), (4, 1), (4, 2), (4, 30), (8, 1)):
        clip = np.array([10.0]), np.array([ASKED]), np.array([12])
        parts = [x / 1e10 for x in update_flops(WHISPER, QWEN, stack, silence, *clip).values()]
        speed = SHARE * PEAK / 1e9 / sum(parts)
        print("{:5d} {:5d} s {:10.1f} {:8.1f} {:8.1f} {:5.1f} {:6.1f} {:10.0f} {:5.1f} h".format(
            stack, silence, *parts, sum(parts), speed, HOURS / speed / 8))


# ---------------------------------------------------------------- sampling

def write_rows(folder: str, count: int) -> str:
    """An index of made clips: tasks of 1/1, 1/2, 1/3 ... rows, their own lengths and texts."""
    draw, sizes = np.random.default_rng(0), 1 / np.arange(1, TASKS + 1)
    task = draw.choice(TASKS, count, p=sizes / sizes.sum())
    seconds = draw.uniform(3, 15, TASKS)[task] * draw.lognormal(0, 0.5, count)
    seconds *= HOURS * 3600 / 14e6 / seconds.mean()
    table = np.zeros(count, data.ROW)  # no row's audio or JSON is read
    table["task"], table["seconds"] = task, np.clip(seconds, 0.5, 30)
    # A third of the tasks answers with what is said, 13 bytes a second; others with a few words.
    table["text_bytes"] = 24 + np.where(task % 3 == 0, 13 * table["seconds"], 4 + 2 * task)
    Path(folder, "one.jsonl").write_text('{"audio": "a.flac", "split": "train", "seconds": 1}')
    rows = data.Rows([f"{folder}/one.jsonl"])
    rows.table, rows.tasks = table, [f"task {n}" for n in range(TASKS)]
    path = f"{folder}/made.index"
    data.write_index(rows, path)
    return path


def rank_batches(s: train.Settings, rows: data.Rows, ranks: int):
    """The batches of the first of so many ranks, as train.py draws them."""
    with patch.multiple(train, rank=lambda: 0, world=lambda: ranks):
        return train.batch_specs(s, rows, 0)


def batch_flops(s: train.Settings, rows: data.Rows, numbers: list[int]) -> float:
    answers = np.ceil(rows.text_bytes[numbers] / 4).astype(int) - 5  # 6 asked; the end token
    clips = rows.seconds[numbers], ASKED, answers
    return sum(update_flops(WHISPER, QWEN, s.stack, s.silence, *clips).values())


def evenness(work: np.ndarray, ranks: int) -> float:
    """work (batches,), in the order they are drawn -> mean / most of an update, over all."""
    work = work[: len(work) // ranks * ranks].reshape(-1, ranks)
    return work.mean(1).sum() / work.max(1).sum()


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 64])
    p.add_argument("--updates", type=int, default=100, help="updates with most ranks (100)")
    p.add_argument("--rows", type=int, default=14_000_000)
    a = p.parse_args()
    print_work()
    with tempfile.TemporaryDirectory() as folder:
        s = train.Settings(data=(write_rows(folder, a.rows),))
        rows = train.open_rows(s)
        print(f"\n{len(rows)} rows, {rows.seconds.sum(dtype=float) / 3600:.0f} h")
        batches, count = rank_batches(s, rows, 1), max(a.ranks) * a.updates
        work = np.array([batch_flops(s, rows, next(batches)[1]) for _ in range(count)])
        print("ranks  first batch  mean of the next  worst     evenness")
        for ranks in a.ranks:
            batches, times = rank_batches(s, rows, ranks), []
            for _ in range(a.updates):
                start = time.perf_counter()
                next(batches)
                times.append(time.perf_counter() - start)
            print(f"{ranks:5d} {times[0]:10.3f} s {np.mean(times[1:]):15.4f} s "
                  f"{max(times[1:]):6.3f} s {evenness(work, ranks):9.3f}", flush=True)


if __name__ == "__main__":
    main()
