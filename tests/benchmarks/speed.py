"""How fast is it? This code beside the obvious use of transformers, in one run.

    python tests/benchmarks/speed.py --encoder DIR --decoder DIR --data 'suite/*.jsonl' \\
        --precision bf16 [--device cuda] [--only mel features step] [--json FILE]
    python tests/benchmarks/speed.py --batch-seconds 8 --batches 1 --repeats 1   # tiny weights

mel: log-mel on one thread. features: clips' mean features, from files. step: whole updates,
log-mel to AdamW, and their peak memory. The clips: the data's mix of lengths; all of 30 s.

The peer: WhisperFeatureExtractor and WhisperModel's encoder on 30 s, the same adapter, Qwen's
...ForCausalLM with inputs_embeds, attention_mask and labels (-100 outside the answers), frozen,
in the compute dtype. Both sides make the same updates from the same clips at the same precision:
ours as train.py makes them, by its own loop; the peer accumulates over --batch clips at a time.
Clips of `mel` and `step` are read before the clock starts. Batches are even quantiles, by clip
length, of the first pool that train.py would draw. The sides alternate; figures are medians over
--repeats. A ratio above 1 says how many times better ours is. Each side of `step` is a process of
its own, and so has a peak memory of its own: the process's on a CPU, torch's on a GPU.
"""
import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from itertools import chain, islice
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, WhisperFeatureExtractor, WhisperModel, logging

sys.path.insert(0, str(Path(__file__).parents[2]))
import data  # noqa: E402
import probe  # noqa: E402
import train  # noqa: E402
import uniwhisper as uw  # noqa: E402
from adapter import StackAdapter  # noqa: E402
from data import Batch, Batches, Rows  # noqa: E402

RATE, IGNORE_INDEX = uw.SAMPLE_RATE, -100
# The C library then keeps what an update frees. By default it gives memory back to the kernel,
# and fetching it anew, page by page, takes a tenth of an update on a CPU. Read when a process
# starts. For our side alone: the peer, 8 clips at once, ran out of 24 GiB with these settings.
KEEP_FREED_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_MMAP_MAX_": "0"}


# ---------------------------------------------------------------- measuring

def now(device: str) -> float:
    """Seconds, once the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def alternate(a, *sides) -> list[float]:
    """sides: (function, its inputs) -> each side's seconds over all its inputs."""
    times = [[] for _ in sides]
    for _ in range(a.repeats + 1):
        for found, (f, inputs) in zip(times, sides):
            start = now(a.device)
            for x in inputs:
                f(x)
            found.append(now(a.device) - start)
    return [median(found[1:]) for found in times]  # the first is a warm-up


def peak_bytes(device: str) -> int:
    """Most memory so far: torch's on a GPU, else this process's (on Linux)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()  # ru_maxrss counts the parent's, too
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def in_own_process(environment: dict, f, *args):
    """f(*args) in a fresh process, whose environment also has these variables."""
    context, threads = multiprocessing.get_context("spawn"), (torch.get_num_threads(),)
    with patch.dict(os.environ, environment):
        with ProcessPoolExecutor(1, context, torch.set_num_threads, threads) as pool:
            return pool.submit(f, *args).result()


def line(what: str, unit: str, ours: float, peer: float, note: str = "") -> dict:
    """A line of the table. Of speeds more is better, of time and memory less."""
    ratio = ours / peer if unit.endswith("/s") else peer / ours
    return dict(what=what, unit=unit, ours=ours, peer=peer, ratio=ratio, note=note)


# ---------------------------------------------------------------- inputs

def settings(a) -> train.Settings:
    """train.py's, with the highest learning rates from the first update on, and no reports."""
    return train.Settings(data=tuple(a.data), encoder=a.encoder, decoder=a.decoder, out=a.out,
                          device=a.device, precision=a.precision, batch_seconds=a.batch_seconds,
                          silence=a.silence, warmup=1, log_every=10_000, eval_every=10_000,
                          save_every=10_000)


def read_batches(a) -> tuple[Rows, list[Batch]]:
    """--batches batches of the first pool, even quantiles by clip length, in random order."""
    s = settings(a)
    rows = train.open_rows(s)
    pool = list(islice(train.batch_specs(s, rows, 0), data.POOL))
    pool.sort(key=lambda spec: rows.seconds[spec[1]].max())
    middles = [(2 * i + 1) * len(pool) // (2 * a.batches) for i in range(a.batches)]
    tokenizer = uw.ChatTokenizer.from_pretrained(a.decoder)
    batches = Batches(rows, tokenizer, RATE, s.seed, s.max_seconds)
    return rows, [batches[spec] for spec in sorted(pool[i] for i in middles)]


def clips(batches: list[Batch]) -> list[torch.Tensor]:
    found = []
    for batch in batches:
        found += [x[:n] for x, n in zip(batch.audio, batch.samples.tolist())]
    return found


def joined(batches: list[Batch], length: float, count: int) -> Batch:
    """`count` clips of `length` seconds, cut from all clips joined; the chats are the first's."""
    size, stream = round(length * RATE), torch.cat(clips(batches))
    audio = stream.repeat(-(-count * size // len(stream)))[: count * size].view(count, size)
    lists = {}
    for f in fields(Batch):
        values = list(chain.from_iterable(getattr(batch, f.name) for batch in batches))
        lists[f.name] = (count * values)[:count]
    samples = torch.full((count,), size)
    return Batch(**lists | dict(audio=audio, samples=samples, skipped=[]))


def both_kinds(a, batches: list[Batch]) -> list[tuple[str, list[Batch]]]:
    """The batches as they are, and as many whose clips are of 30 s."""
    thirty = joined(batches, 30, max(1, round(a.batch_seconds / 30)))
    return [("mix", batches), ("30 s clips", a.batches * [thirty])]


# ---------------------------------------------------------------- the peer

class Peer(nn.Module):
    """What a user of transformers would write."""

    def __init__(self, s: train.Settings, decoder: bool = True):
        logging.set_verbosity_error()  # a folder with an encoder alone lacks the decoder
        logging.disable_progress_bar()
        super().__init__()
        self.settings = s
        whisper = WhisperModel.from_pretrained(s.encoder, dtype=torch.float32)
        self.encoder = whisper.encoder
        self.extractor = WhisperFeatureExtractor.from_pretrained(s.encoder)
        if decoder:
            dtype = train.PRECISIONS[s.precision]
            self.decoder = AutoModelForCausalLM.from_pretrained(s.decoder, dtype=dtype)
            self.decoder.requires_grad_(False).eval()
            widths = whisper.config.d_model, self.decoder.config.hidden_size
            self.adapter = StackAdapter(*widths, s.stack)
            self.tokenizer = uw.ChatTokenizer.from_pretrained(s.decoder)
        self.to(s.device)

    def encode(self, audio: list[torch.Tensor]):
        """B clips (S,) -> features of 30 s (B, 1500, D)."""
        audio = [x.numpy() for x in audio]
        # Outside of autocast, where log-mel would be rounded.
        mel = self.extractor(audio, sampling_rate=RATE, return_tensors="pt").input_features
        with train.autocast(self.settings):
            return self.encoder(mel.to(self.settings.device)).last_hidden_state

    def forward(self, audio, prompts, answers):
        """-> the mean loss of the answer tokens."""
        device, table = self.settings.device, self.decoder.get_input_embeddings()
        chats, masks, labels, features = [], [], [], self.encode(audio)
        with train.autocast(self.settings):
            spoken = self.adapter(features)  # (B, 375, D)
        for prompt, x, answer in zip(prompts, spoken, answers):
            before = table(torch.tensor(prompt, device=device))
            after = table(torch.tensor(self.tokenizer.tail + answer, device=device))
            chats.append(torch.cat((before, x.to(before.dtype), after)))
            masks.append(torch.ones(len(chats[-1]), dtype=torch.long))
            unasked = [IGNORE_INDEX] * (len(chats[-1]) - len(answer))
            labels.append(torch.tensor(unasked + answer))
        embeds, mask = pad_sequence(chats, True), pad_sequence(masks, True)
        labels = pad_sequence(labels, True, IGNORE_INDEX)
        with train.autocast(self.settings):
            return self.decoder(inputs_embeds=embeds, attention_mask=mask.to(device),
                                labels=labels.to(device)).loss


# ---------------------------------------------------------------- parts: log-mel, features

def mel(a):
    """Log-mel on one thread: ours in batches; the peer clip by clip, which suits it best."""
    _, batches = read_batches(a)
    extractor = WhisperFeatureExtractor.from_pretrained(a.encoder)
    torch.set_num_threads(1)

    def ours(batch):
        return uw.log_mel_spectrogram(batch.audio, extractor.feature_size)

    def peer(x):
        return extractor(x.numpy(), sampling_rate=RATE, return_tensors="pt").input_features[0]

    for name, some in both_kinds(a, batches):
        audio, worst = clips(some), 0.0
        for mine, x in zip(chain.from_iterable(map(ours, some)), audio):
            frames = max(1, len(x) // uw.HOP)
            difference = mine[:, :frames] - peer(x)[:, :frames]
            worst = max(worst, difference.abs().max().item())
        times = alternate(a, (ours, some), (peer, audio))
        each = [1000 * t / len(audio) for t in times]
        note = f"1 thread, {len(audio)} clips; largest difference {worst:.1e}"
        yield line(f"log-mel, {name}", "ms a clip", *each, note)
    torch.set_num_threads(a.threads)


def features(a):
    """Clips' mean features, from files: probe.py's, and the peer's mean over the padded 30 s."""
    rows, batches = read_batches(a)
    numbers = list(chain.from_iterable(batch.rows for batch in batches))
    some = [probe.Clip(rows, i, "test", "") for i in numbers]
    task = probe.Task("suite", probe.Spec("suite"), some)
    s = probe.Settings(batch_seconds=a.batch_seconds, precision=a.precision, device=a.device,
                       silence=a.silence)
    model = uw.load_encoder(a.encoder).to(a.device).eval()
    peer = Peer(settings(a), decoder=False).eval()

    def ours(task):
        return probe.extract(model, task, s, say=lambda text: None)

    def theirs(group):
        audio = [rows.audio(i, RATE) for i in group]
        return peer.encode(audio).float().mean(1).cpu()

    groups = [numbers[i : i + a.batch] for i in range(0, len(numbers), a.batch)]
    with torch.inference_mode():
        times = alternate(a, (ours, [task]), (theirs, groups))
    speeds = [len(numbers) / t for t in times]
    yield line("mean features, from files", "clips/s", *speeds, f"{len(numbers)} clips")


# ---------------------------------------------------------------- part: the training step

def our_updates(s: train.Settings, batches: list[Batch], _, clock) -> None:
    """Updates of a single rank by train.py's own loop, until no batch is left."""
    train.start_ranks(s)
    log = SimpleNamespace(update=clock)  # called after each
    try:
        train.train(s, train.build_model(s, None), log, iter(batches), dict(step=0))
    except StopIteration:
        pass


def peer_updates(s: train.Settings, batches: list[Batch], at_once: int, clock) -> None:
    """Updates of `at_once` clips at a time, whose gradients are added up."""
    peer = Peer(s)
    trained = [p for p in peer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, s.lr_encoder)
    for batch in batches:
        audio, starts = clips([batch]), range(0, len(batch.samples), at_once)
        for i in starts:
            part = slice(i, i + at_once)
            loss = peer(audio[part], batch.prompts[part], batch.answers[part])
            (loss / len(starts)).backward()
        torch.nn.utils.clip_grad_norm_(trained, s.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        clock()


def time_updates(a, side: str, batches: list[Batch]) -> tuple[float, int]:
    """One side's seconds for all updates and its peak bytes; for a process of its own."""
    # A short update warms a CPU up; a GPU wants every shape.
    warm, ends = [joined(batches, 2, 1)] if a.device == "cpu" else batches, []
    updates = our_updates if side == "ours" else peer_updates
    updates(settings(a), [*warm, *batches], a.batch, lambda *_: ends.append(now(a.device)))
    return ends[-1] - ends[-1 - len(batches)], peak_bytes(a.device)


def step(a):
    """The whole training step, log-mel to AdamW: train.py's update, and the peer's."""
    _, batches = read_batches(a)
    for name, some in both_kinds(a, batches):
        found = {"ours": [], "peer": []}
        for i in range(a.repeats):
            for side, measured in found.items():
                print(f"step, {name}: {side}, {i + 1} of {a.repeats}", file=sys.stderr, flush=True)
                environment = KEEP_FREED_MEMORY if side == "ours" else {}
                measured.append(in_own_process(environment, time_updates, a, side, some))
        speeds, memory, ranges = [], [], []
        seconds = sum(map(len, clips(some))) / RATE
        for times, peaks in (zip(*measured) for measured in found.values()):
            speeds.append(seconds / median(times))
            memory.append(max(peaks) / 2**30)
            ranges.append(f"{min(times):.3g}-{max(times):.3g} s")
        note = f"{len(some)} updates, {len(clips(some))} clips: {' | '.join(ranges)}"
        yield line(f"training step, {name}", "audio s/s", *speeds, note)
        yield line(f"its peak memory, {name}", "GiB", *memory, f"peer {a.batch} clips at once")


# ---------------------------------------------------------------- command line

PARTS = {"mel": mel, "features": features, "step": step}


def parse():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--encoder", default=train.EXAMPLE["encoder"], help="Whisper folder")
    p.add_argument("--decoder", default=train.EXAMPLE["decoder"], help="Qwen folder")
    p.add_argument("--data", nargs="+", default=(), help="manifests and tars; else the example")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    p.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    p.add_argument("--json", help="write settings, machine and the table there")
    p.add_argument("--batch-seconds", type=float, default=40.0, help="audio in an update (40)")
    p.add_argument("--silence", type=float, default=uw.SILENCE, help="behind a clip, of ours")
    for name, default, help in (("batch", 8, "clips at once, of the peer"),
                                ("batches", 3, "updates in a measurement"),
                                ("repeats", 3, "measurements, for the median"),
                                ("threads", torch.get_num_threads(), "of torch")):
        p.add_argument(f"--{name}", type=int, default=default, help=f"{help} ({default})")
    return p.parse_args()


def main():
    a, table = parse(), []
    torch.set_num_threads(a.threads)
    gpu = a.device == "cuda"
    device = torch.cuda.get_device_name() if gpu else torch.backends.cpu.get_cpu_capability()
    machine = f"{device}, {a.threads} threads, torch {torch.__version__}, {a.precision}"
    print(f"{machine}; {a.encoder} + {a.decoder}")
    print(f"{'what':27s} {'unit':10s} {'ours':>9s} {'peer':>9s} {'ratio':>7s}  note")
    with tempfile.TemporaryDirectory() as a.out:  # for the example's clips
        for found in chain.from_iterable(PARTS[name](a) for name in a.only):
            table.append(found)
            print("{what:27s} {unit:10s} {ours:9.4g} {peer:9.4g} {ratio:7.2f}  {note}"
                  .format(**found), flush=True)
    if a.json:
        found = dict(machine=machine, settings=vars(a), rows=table)
        Path(a.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
