"""How fast is it? Ours beside the obvious implementation with transformers,
and beside the device's own limit, in one run.

    python tests/benchmarks/benchmark.py --encoder DIR --decoder DIR --data suite/*.jsonl \\
        [--device cuda] [--precision bf16]
    python tests/benchmarks/benchmark.py --encoder random:whisper-large-v3 --decoder random:qwen2.5-7b \\
        --data suite/*.jsonl ...
    python tests/benchmarks/benchmark.py --encoder random:whisper-smoke --decoder random:qwen-smoke \\
        --data suite/*.jsonl --batch-seconds 8 --batches 2 --repeats 1 --rows 10000 \\
        --new-tokens 4 --decode-hours 0.01      # does it work? two minutes

Needs transformers; openai-whisper for one more line of `mel` (pip install --no-deps
openai-whisper is enough).

The peer: WhisperFeatureExtractor and WhisperModel's encoder on features of 30 s, the same
projector, Qwen's ...ForCausalLM with inputs_embeds, attention_mask and labels (-100 outside
the answers), frozen, in the compute dtype. Both sides make the same updates from the same
clips at the same precision; the peer cuts a batch into pieces of --batch clips and
accumulates. Clips are read before the clock starts (`decode` measures that; `features` reads
within it); log-mel is within. Batches are even quantiles, by clip length, of the first pool
that train.py would draw. Ours and peer alternate; figures are medians over --repeats. A ratio
above 1 says how many times better ours is. Every part, and each side of `step`, is a process
of its own, so its peak memory (all of the process on a CPU; what torch allocated on a GPU) is
its own.
"""
import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import ModuleType
from unittest.mock import patch

import numpy as np
import soundfile as sf
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
import data  # noqa: E402
import train  # noqa: E402
import uniwhisper as uw  # noqa: E402
from adapter import StackAdapter  # noqa: E402
from data import Batch, Batches, Rows  # noqa: E402

RATE, IGNORE_INDEX, STACK = uw.SAMPLE_RATE, -100, train.Settings.stack
# The C library then keeps what a step frees. By default it gives memory back to the kernel, and
# fetching it anew, page by page, takes a tenth of a step on a CPU. Read when a process starts.
# For our side alone: the peer, 8 clips at once, ran out of 24 GiB with these settings.
KEEP_FREED_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_MMAP_MAX_": "0"}
SHAPES = {  # random weights of these shapes, for machines without downloads
    "whisper-smoke": dict(d_model=48, encoder_layers=2, encoder_attention_heads=4,
                          encoder_ffn_dim=80, num_mel_bins=80),
    "whisper-base": dict(d_model=512, encoder_layers=6, encoder_attention_heads=8,
                         encoder_ffn_dim=2048, num_mel_bins=80),
    "whisper-large-v3": dict(d_model=1280, encoder_layers=32, encoder_attention_heads=20,
                             encoder_ffn_dim=5120, num_mel_bins=128),
    "qwen-smoke": dict(hidden_size=56, intermediate_size=72, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, vocab_size=521,
                       tie_word_embeddings=True),
    "qwen2.5-0.5b": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                         num_attention_heads=14, num_key_value_heads=2, vocab_size=151936,
                         tie_word_embeddings=True),
    "qwen2.5-7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                       num_attention_heads=28, num_key_value_heads=4, vocab_size=152064,
                       tie_word_embeddings=False)}


# ---------------------------------------------------------------- model FLOPs

def encoder_flops(c: dict, tokens: list[int], trained: bool = False) -> float:
    """FLOPs of Whisper's encoder on clips of so many tokens.

    2 a weight and token, and attention among a clip's own tokens. Training takes three times
    that (the first convolution, whose input needs no gradient: twice).
    """
    width, total = c["d_model"], sum(tokens)
    conv1 = 2 * 3 * c["num_mel_bins"] * width * 2 * total  # on frames, two a token
    conv2 = 2 * 3 * width * width * total
    linear = 2 * total * (4 * width * width + 2 * width * c["encoder_ffn_dim"])
    attention = 4 * width * sum(t * t for t in tokens)
    forward = conv1 + conv2 + c["encoder_layers"] * (linear + attention)
    return 3 * forward - conv1 if trained else forward


def decoder_flops(c: dict, lengths: list[int], logits: int) -> float:
    """FLOPs of Qwen's forward on clips of so many positions: causal attention among a clip's
    own positions, and lm_head on `logits` positions."""
    width, heads = c["hidden_size"], c["num_attention_heads"]
    dim = c.get("head_dim") or (128 if c["model_type"] == "qwen3" else width // heads)
    projections = 2 * width * dim * (heads + c.get("num_key_value_heads", heads))
    weights = projections + 3 * width * c["intermediate_size"]
    attention = 2 * heads * dim * sum(n * (n + 1) for n in lengths)
    layer = 2 * sum(lengths) * weights + attention
    return c["num_hidden_layers"] * layer + 2 * width * c["vocab_size"] * logits


def step_flops(encoder: dict, decoder: dict, batch: Batch, tail: int, peer: bool) -> float:
    """FLOPs that a training step needs: encoder and adapter x 3, decoder x 2 (its weights need
    no gradient).

    tail: chat tokens between audio and answer. peer: every clip 30 s, logits at every position.
    """
    tokens = [1500 if peer else uw.encoder_lengths(n) for n in batch.samples.tolist()]
    lengths, audio = [], 0
    for t, prompt, answer in zip(tokens, batch.prompts, batch.answers):
        length = len(prompt) + -(-t // STACK) + tail + len(answer)
        lengths.append(length if peer else length - 1)  # the end token predicts nothing
        audio += -(-t // STACK)
    width = decoder["hidden_size"]
    adapter = 2 * audio * (STACK * encoder["d_model"] * width + width * width)
    logits = sum(lengths) if peer else sum(batch.answer_tokens)
    return (encoder_flops(encoder, tokens, trained=True) + 3 * adapter
            + 2 * decoder_flops(decoder, lengths, logits))


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the best large matrix product; sizes that would take over 5 s are left out."""
    sizes = [(n, n, n) for n in (512, 1024, 2048, 4096, 8192)]
    sizes += [(4096, 896, 4864), (8192, 4864, 896)]
    best = 0.0
    for m, k, n in sizes:
        flops = 2 * m * k * n
        if best and flops / best > 5 or device == "cpu" and m * k * n > 4096**3:
            continue
        a = torch.randn(m, k, device=device, dtype=dtype)
        b = torch.randn(k, n, device=device, dtype=dtype)
        for _ in range(3):
            best = max(best, flops / seconds(device, torch.mm, a, b))
    return best


# ---------------------------------------------------------------- measuring

def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(device: str, f, *args) -> float:
    synchronize(device)
    start = time.perf_counter()
    f(*args)
    synchronize(device)
    return time.perf_counter() - start


def call_with_each(f, inputs) -> None:
    for x in inputs:
        f(x)


def alternate(a, *sides) -> list[list[float]]:
    """sides: (function, its inputs) -> each side's seconds over all inputs, of each repeat."""
    for f, inputs in sides:  # warm-up
        call_with_each(f, inputs if a.device != "cpu" else inputs[:1])
    times = [[] for _ in sides]
    for _ in range(a.repeats):
        for found, (f, inputs) in zip(times, sides):
            found.append(seconds(a.device, call_with_each, f, inputs))
    return times


def peak_bytes(device: str) -> int:
    """Most memory so far: torch's on a GPU, else this process's."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    try:  # ru_maxrss also counts what the parent held when it started this process
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def start_process(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)


def in_own_process(f, *args, environment=None):
    """f(*args) in a fresh process, whose environment also has these variables."""
    context, threads = multiprocessing.get_context("spawn"), (torch.get_num_threads(),)
    with patch.dict(os.environ, environment or {}):
        with ProcessPoolExecutor(1, context, start_process, threads) as pool:
            return pool.submit(f, *args).result()


def line(what: str, unit: str, ours, peer=None, lower: bool = False, note: str = "") -> dict:
    """A line of the table; lower: less is better."""
    ratio = None
    if peer is not None:
        ratio = peer / ours if lower else ours / peer
    return dict(what=what, unit=unit, ours=ours, peer=peer, ratio=ratio, note=note)


def show(part: str, found: dict) -> None:
    cells = []
    for name, width, how in (("ours", 9, ".4g"), ("peer", 9, ".4g"), ("ratio", 7, ".2f")):
        number = found[name]
        cells.append(f"{'-' if number is None else format(number, how):>{width}s}")
    print(f"{part:9s} {found['what']:42s} {found['unit']:12s} {' '.join(cells)}  "
          f"{found['note']}", flush=True)


def spread(times: list[float]) -> str:
    return f"{min(times):.3g}-{max(times):.3g} s"


# ---------------------------------------------------------------- inputs

def settings(a) -> train.Settings:
    return train.Settings(data=tuple(a.data), encoder=a.encoder, decoder=a.decoder,
                          device=a.device, precision=a.precision, batch_seconds=a.batch_seconds,
                          compile=a.compile, checkpoint_layers=a.checkpoint_layers)


def read_batches(a) -> tuple[Rows, list[Batch]]:
    """--batches batches of the first pool, even quantiles by clip length, in random order."""
    s = settings(a)
    rows = train.open_rows(s)

    def longest(spec):
        return rows.seconds[spec[1]].max()

    pool = sorted(itertools.islice(train.batch_specs(s, rows, 0), data.POOL), key=longest)
    picked = []
    for i in range(a.batches):
        picked.append(pool[(2 * i + 1) * len(pool) // (2 * a.batches)])
    tokenizer = uw.ChatTokenizer.from_pretrained(a.decoder)
    batches = Batches(rows, tokenizer, RATE, s.seed, s.max_seconds)
    return rows, [batches[spec] for spec in sorted(picked)]


def clips(batches: list[Batch]) -> list[torch.Tensor]:
    found = []
    for batch in batches:
        for audio, samples in zip(batch.audio, batch.samples.tolist()):
            found.append(audio[:samples])
    return found


def joined(batches: list[Batch], length: float, count: int) -> Batch:
    """`count` clips of exactly `length` seconds, cut from all clips joined; chats are the
    first ones."""
    size, stream = round(length * RATE), torch.cat(clips(batches))
    audio = stream.repeat(-(-count * size // len(stream)))[: count * size].view(count, size)
    lists = {}
    for name in ("prompts", "answers", "tasks", "rows", "instructions", "texts",
                 "languages"):
        values = itertools.chain.from_iterable(getattr(b, name) for b in batches)
        lists[name] = list(itertools.islice(itertools.cycle(values), count))
    return Batch(audio=audio, samples=torch.full((count,), size), skipped=[], **lists)


def audio_seconds(batches: list[Batch]) -> float:
    return sum(b.samples.sum().item() for b in batches) / RATE


def write_random(name: str, folder: Path) -> str:
    """A checkpoint folder with random weights of one of SHAPES."""
    folder, shape = folder / name, SHAPES[name]
    if "whisper" in name:
        config = shape | {"model_type": "whisper", "max_source_positions": 1500}
        uw.WhisperEncoder(config).save(folder)
        return str(folder)
    from conftest import make_tokenizer

    make_tokenizer(folder)
    config = shape | {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "dtype": "bfloat16",
        "head_dim": shape["hidden_size"] // shape["num_attention_heads"], "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "max_position_embeddings": 32768}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        parameters = uw.QwenDecoder(config, tokenizer=None).named_parameters()
    tensors = {}
    for key, parameter in parameters:
        if key.startswith("lm_head") and shape["tie_word_embeddings"]:
            continue
        key = key if key.startswith("lm_head") else f"model.{key}"
        tensors[key] = torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(std=0.02)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


# ---------------------------------------------------------------- the peer

class Peer(nn.Module):
    """What a user of transformers would write."""

    def __init__(self, a, decoder: bool = True):
        from transformers import (AutoModelForCausalLM, WhisperFeatureExtractor, WhisperModel,
                                  logging)

        logging.set_verbosity_error()  # of a folder with an encoder alone, it misses the decoder
        logging.disable_progress_bar()
        super().__init__()
        self.settings, self.device = settings(a), a.device
        whisper = WhisperModel.from_pretrained(a.encoder, dtype=torch.float32)
        self.encoder = whisper.encoder.to(a.device)
        mels = self.encoder.config.num_mel_bins
        self.extractor = WhisperFeatureExtractor(feature_size=mels)
        if decoder:
            dtype = train.PRECISIONS[a.precision]
            self.decoder = AutoModelForCausalLM.from_pretrained(a.decoder, dtype=dtype)
            self.decoder.requires_grad_(False).eval().to(a.device)
            # generate as many tokens as asked for
            self.decoder.generation_config.eos_token_id = None
            self.decoder.generation_config.pad_token_id = 0
            widths = self.encoder.config.d_model, self.decoder.config.hidden_size
            self.projector = StackAdapter(*widths, STACK).to(a.device)
            self.tokenizer = uw.ChatTokenizer.from_pretrained(a.decoder)

    def features(self, audio):
        """B clips (S,) -> log-mel of 30 s (B, n_mels, 3000)."""
        audio = [x.numpy() for x in audio]
        return self.extractor(audio, sampling_rate=RATE, return_tensors="pt").input_features

    def encode(self, features):
        with train.autocast(self.settings):
            return self.encoder(features.to(self.device)).last_hidden_state

    def embed(self, audio, prompts, answers, side):
        """Chats spliced with the audio, padded on `side`: (embeds, mask)."""
        features = self.features(audio)  # outside of autocast, which would break them
        with train.autocast(self.settings):
            spoken = self.projector(self.encode(features))  # (B, 375, D)
        table = self.decoder.get_input_embeddings()
        chats, masks = [], []
        for prompt, x, answer in zip(prompts, spoken, answers):
            before = table(torch.tensor(prompt, device=self.device))
            after = table(torch.tensor(self.tokenizer.tail + answer, device=self.device))
            chats.append(torch.cat((before, x.to(before.dtype), after)))
            masks.append(torch.ones(len(chats[-1]), dtype=torch.long, device=self.device))
        return (pad_sequence(chats, True, padding_side=side),
                pad_sequence(masks, True, padding_side=side))

    def forward(self, audio, prompts, answers):
        """-> the mean loss of the answer tokens."""
        embeds, mask = self.embed(audio, prompts, answers, "right")
        labels = torch.full(mask.shape, IGNORE_INDEX)
        for labels_of_clip, n, answer in zip(labels, mask.sum(1).tolist(), answers):
            labels_of_clip[n - len(answer) : n] = torch.tensor(answer)
        labels = labels.to(self.device)
        with train.autocast(self.settings):
            return self.decoder(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss

    def update(self, optimizer, at_once: int, batch: Batch) -> None:
        audio, starts = clips([batch]), range(0, len(batch.samples), at_once)
        for i in starts:
            part = slice(i, i + at_once)
            loss = self(audio[part], batch.prompts[part], batch.answers[part])
            (loss / len(starts)).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def generate(self, audio, prompts, count: int):
        embeds, mask = self.embed(audio, prompts, [[]] * len(prompts), "left")
        with train.autocast(self.settings):
            return self.decoder.generate(inputs_embeds=embeds, attention_mask=mask,
                                         max_new_tokens=count, do_sample=False)


# ---------------------------------------------------------------- parts: log-mel, reading

def mel(a):
    """Log-mel on one core: ours in batches, the peers a clip at a time, which suits their
    caches best."""
    from transformers import WhisperFeatureExtractor

    torch.set_num_threads(1)
    a.device, mels = "cpu", uw.read_config(a.encoder, ("whisper",))["num_mel_bins"]
    extractor, openai = WhisperFeatureExtractor(feature_size=mels), openai_mel()

    def ours(batch):
        return uw.log_mel_spectrogram(batch.audio, mels)

    def transformers(x):
        return extractor(x.numpy(), sampling_rate=RATE, return_tensors="pt").input_features[0]

    def openai_whisper(x):
        return openai(x, mels)

    _, batches = read_batches(a)
    for name, some in (("suite clips", batches), ("30 s clips", [joined(batches, 30, 4)])):
        audio, mine = clips(some), []
        for found in map(ours, some):
            mine += found
        for peer in (transformers, openai_whisper):
            what = f"{name}, {peer.__name__.replace('_', '-')}"
            if peer is openai_whisper and openai is None:
                yield line(what, "ms a clip", None, note="not installed")
                continue
            worst = 0.0
            for m, x in zip(mine, audio):
                frames = max(1, len(x) // uw.HOP)
                difference = m[:, :frames] - peer(x)[:, :frames]
                worst = max(worst, difference.abs().max().item())
            times = alternate(a, (ours, some), (peer, audio))
            each = [1000 * median(t) / len(audio) for t in times]
            note = f"1 thread, {len(audio)} clips; largest difference {worst:.1e}"
            yield line(what, "ms a clip", *each, lower=True, note=note)


def openai_mel():
    """openai-whisper's log_mel_spectrogram after its pad_or_trim; None if not installed."""
    spec = find_spec("whisper")
    if spec is None or not Path(spec.submodule_search_locations[0], "audio.py").exists():
        return None
    # audio.py alone: the package would load its tokenizer
    package = sys.modules["whisper"] = ModuleType("whisper")
    package.__path__ = list(spec.submodule_search_locations)
    from whisper.audio import log_mel_spectrogram, pad_or_trim

    def padded_mel(audio, mels):
        return log_mel_spectrogram(pad_or_trim(audio), mels)

    return padded_mel


def write_flacs(folder: str, audio: list[torch.Tensor], rate: int) -> Rows:
    """Clips at 16 kHz as FLAC files at `rate`, and their manifest."""
    with open(f"{folder}/rows.jsonl", "w") as f:
        for i, x in enumerate(audio):
            samples = data.resample(x, RATE, rate).clamp(-1, 1).numpy()
            sf.write(f"{folder}/{i}.flac", samples, rate)
            row = dict(audio=f"{i}.flac", instruction="What?", answer="This.",
                       seconds=len(x) / RATE)
            f.write(json.dumps(row) + "\n")
    return Rows([f"{folder}/rows.jsonl"])


def read_all(batches: Batches, specs: list, workers: int) -> None:
    for _ in data.loader(batches, specs, workers):
        pass


def decode(a):
    """Reading, decoding and resampling FLAC files in the loader's worker processes."""
    _, some = read_batches(a)
    counts = [0]
    while max(1, 2 * counts[-1]) <= (os.cpu_count() or 1):
        counts.append(max(1, 2 * counts[-1]))
    for rate in (RATE, 44_100):
        with tempfile.TemporaryDirectory() as folder:
            rows = write_flacs(folder, clips(some), rate)
            batches = Batches(rows, uw.ChatTokenizer.from_pretrained(a.decoder), RATE)
            specs = data.held_out(rows, "train", 0, 20.0)
            specs *= max(1, round(a.decode_hours * 3600 / rows.seconds.sum()))
            hours = sum(rows.seconds[numbers].sum() for _, numbers in specs) / 3600
            for n in counts:
                times = []
                for _ in range(a.repeats):
                    times.append(seconds("cpu", read_all, batches, specs, n))
                workers = f"{n} worker{'s' * (n != 1)}" if n else "no worker"
                yield line(f"{rate / 1000:g} kHz, {workers}", "h a minute",
                           float(60 * hours / median(times)), note=spread(times))


class WorkerMemory(Batches):
    """Reads a batch and answers with the bytes that this worker does not share."""

    def __getitem__(self, spec):
        super().__getitem__(spec)
        private = 0
        for entry in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if entry.startswith("Private"):
                private += 1024 * int(entry.split()[1])
        return private


def write_many_rows(folder: str, count: int) -> str:
    sf.write(f"{folder}/a.flac", np.random.default_rng(0).normal(0, 0.1, RATE), RATE)
    with open(f"{folder}/rows.jsonl", "w") as f:
        for i in range(count):
            row = dict(audio="a.flac", instruction="Which?", answer=str(i), task=f"task-{i % 20}",
                       seconds=0.5 + i % 977 / 100)
            f.write(json.dumps(row) + "\n")
    return f"{folder}/rows.jsonl"


def rows(a):
    """Start-up on a manifest of --rows rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_many_rows(folder, a.rows)
        before, start = peak_bytes("cpu"), time.perf_counter()
        table = Rows([path], answers=True, splits={"train"})
        read = time.perf_counter() - start
        index = table.where("train")
        shares = data.task_shares(table, index)
        specs = data.sample_batches(table, index, shares, a.batch_seconds)
        next(specs)
        ready, grown = time.perf_counter() - start, peak_bytes("cpu") - before
        size = f"{a.rows:,} rows"
        yield line(f"{size}: manifest read", "s", read,
                   note=f"{Path(path).stat().st_size / 2**20:.0f} MiB")
        yield line(f"{size}: first batch drawn", "s", ready)
        yield line(f"{size}: main process grows by", "MiB", grown / 2**20,
                   note=f"{grown / a.rows:.0f} bytes a row at the peak")
        if Path("/proc/self/smaps_rollup").exists():
            batches = WorkerMemory(table, uw.ChatTokenizer.from_pretrained(a.decoder))
            private = max(itertools.islice(data.loader(batches, specs, 2), 8))
            yield line(f"{size}: of a worker's own", "MiB", private / 2**20,
                       note="not shared with the main process")


# ---------------------------------------------------------------- parts: the encoder, answers

def encoder(a):
    """The encoder's forward, mel given."""
    model, s = uw.load_encoder(a.encoder).to(a.device).eval(), settings(a)
    peer = Peer(a, decoder=False).eval() if a.peer else None

    def ours(inputs):
        with train.autocast(s):
            return model(*inputs)

    _, batches = read_batches(a)
    for name, some in (("suite clips", batches), ("30 s clips", [joined(batches, 30, 4)])):
        audio, inputs, tokens = clips(some), [], []
        for batch in some:
            lengths = uw.encoder_lengths(batch.samples)
            features = uw.log_mel_spectrogram(batch.audio, model.n_mels)
            features = features[:, :, : 2 * int(lengths.max())]
            inputs.append((features.to(a.device), lengths))
            tokens += lengths.tolist()
        sides = [(ours, inputs)]
        if peer:
            groups = [audio[i : i + a.batch] for i in range(0, len(audio), a.batch)]
            padded = [peer.features(group).to(a.device) for group in groups]
            sides.append((peer.encode, padded))
        with torch.inference_mode():
            times = alternate(a, *sides)
        top = peak_flops(a.device, train.PRECISIONS[a.precision])
        share = encoder_flops(model.config, tokens) / median(times[0]) / top
        yield line(f"forward, {name}", "audio s/s",
                   *(audio_seconds(some) / median(t) for t in times),
                   note=f"{share:.0%} of {top / 1e9:.0f} GFLOP/s; {len(audio)} clips")


def features(a):
    """Clips' mean features for probing, from files: probe.py's `extract`, and the peer's mean
    over the padded 30 s."""
    from probe import Clip, Settings, Spec, Task, extract

    rows, batches = read_batches(a)
    numbers = list(itertools.chain.from_iterable(batch.rows for batch in batches))
    task = Task("suite", Spec("suite", "label"), [Clip(rows, i, "test", "") for i in numbers])
    s = Settings(batch_seconds=a.batch_seconds, precision=a.precision, device=a.device)
    model = uw.load_encoder(a.encoder).to(a.device).eval()
    peer = Peer(a, decoder=False).eval() if a.peer else None

    def ours(task):
        return extract(model, task, s, say=lambda text: None)

    def theirs(group):
        audio = [rows.audio(i, RATE) for i in group]
        return peer.encode(peer.features(audio)).float().mean(1).cpu()

    sides = [(ours, [task])]
    if peer:
        sides.append((theirs, [numbers[i : i + a.batch] for i in range(0, len(numbers), a.batch)]))
    with torch.inference_mode():
        times = alternate(a, *sides)
    yield line("mean features, from files", "clips/s", *(len(numbers) / median(t) for t in times),
               note=f"{len(numbers)} clips")


def generate(a):
    """Greedy generation of a fixed number of tokens for --batch clips at once."""
    _, batches = read_batches(a)
    batch, s = batches[len(batches) // 2], settings(a)
    audio, samples = batch.audio[: a.batch].to(a.device), batch.samples[: a.batch]
    asked, prompts = batch.instructions[: a.batch], batch.prompts[: a.batch]
    model = train.build_model(s, None).eval()
    model.decoder.tokenizer.stop = {-1}  # no id: generate as many tokens as asked for
    peer = Peer(a).eval() if a.peer else None

    def ours(count):
        with train.autocast(s):
            model.generate(audio, samples, asked, count)

    def theirs(count):
        peer.generate(clips([batch])[: a.batch], prompts, count)

    for name, count in (("first token", 1), (f"{a.new_tokens} tokens, all in all", a.new_tokens)):
        times = alternate(a, *[(f, [count]) for f in ([ours, theirs] if peer else [ours])])
        yield line(f"{name}, {len(asked)} clips", "tokens/s",
                   *(len(asked) * count / median(t) for t in times))


# ---------------------------------------------------------------- parts: the training step

def build_ours(s: train.Settings):
    """Model and optimizer as train.py has them, at the highest learning rates."""
    train.start_ranks(s)
    model = train.build_model(s, None)
    optimizer, _ = train.build_optimizer(s, model, dict(step=0))
    for group in optimizer.param_groups:
        group["lr"] = train.learning_rate(s, group["name"], s.warmup)
    return model, optimizer


def update(s: train.Settings, model, optimizer, batch: Batch) -> None:
    """One update of a single rank, as train.py makes it."""
    with train.autocast(s):
        losses = model(batch.to(s.device))  # (N,)
    losses.mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip).item()
    optimizer.step()
    optimizer.zero_grad()


def run_steps(a, side: str, batches: list[Batch]) -> tuple[list[float], int, float]:
    """One side's seconds of each update, its peak bytes and, of ours, the device's peak FLOP/s.

    For a process of its own.
    """
    s = settings(a)
    if side == "ours":
        step_once = partial(update, s, *build_ours(s))
    else:
        peer = Peer(a)
        trained = [p for p in peer.parameters() if p.requires_grad]
        step_once = partial(peer.update, torch.optim.AdamW(trained, 1e-4), a.batch)
    short = a.device == "cpu" and not a.compile
    call_with_each(step_once, [joined(batches, 2, 1)] if short else batches)  # warm-up
    times = [seconds(a.device, step_once, batch) for batch in batches]
    used, top = peak_bytes(a.device), 0.0
    if side == "ours":
        top = peak_flops(a.device, train.PRECISIONS[a.precision])
    return times, used, top


def steps_of(a, side: str, batches: list[Batch], what: str):
    """run_steps in a process of its own."""
    environment = KEEP_FREED_MEMORY if side == "ours" else None
    try:
        return in_own_process(run_steps, a, side, batches, environment=environment)
    except (BrokenProcessPool, MemoryError, torch.OutOfMemoryError) as e:
        smaller = "--batch-seconds" if side == "ours" else f"--batch than {a.batch}"
        raise ValueError(f"{what}: {side} does not fit into memory ({type(e).__name__}); "
                         f"use a smaller {smaller}") from None


def step(a):
    """The whole training step, log-mel to AdamW: train.py's update, and the peer's."""
    _, batches = read_batches(a)
    configs = (uw.read_config(a.encoder, ("whisper",)),
               uw.read_config(a.decoder, ("qwen2", "qwen3")))
    tail = len(uw.ChatTokenizer.from_pretrained(a.decoder).tail)
    thirty = [joined(batches, 30, max(1, round(a.batch_seconds / 30)))] * a.batches
    for name, some in (("suite's mix", batches), ("30 s clips", thirty)):
        if not name.startswith(tuple(a.clips)):
            continue
        found = {"ours": [], "peer": []} if a.peer else {"ours": []}
        for i in range(a.repeats):
            for side in found:
                what = f"step, {name}"
                print(f"{what}: {side}, {i + 1} of {a.repeats}", file=sys.stderr, flush=True)
                found[side].append(steps_of(a, side, some, what))
        top = max(peak for _, _, peak in found["ours"])
        speeds, shares, memory, times = [], [], [], []
        for side, measured in found.items():
            totals = [sum(each) for each, _, _ in measured]
            needed = sum(step_flops(*configs, b, tail, side == "peer") for b in some)
            speeds.append(audio_seconds(some) / median(totals))
            shares.append(100 * needed / median(totals) / top)
            memory.append(max(used for _, used, _ in measured) / 2**30)
            times.append(spread(totals))
        note = (f"{len(some)} updates, {len(clips(some))} clips, peer {a.batch} at once; "
                + " | ".join(times))
        yield line(f"{name}: speed", "audio s/s", *speeds, note=note)
        yield line(f"{name}: share of {top / 1e9:.0f} GFLOP/s", "%", *shares,
                   note="of the FLOPs that each side needs")
        yield line(f"{name}: peak memory", "GiB", *memory, lower=True)


def growth(a):
    """How our step grows with the batch and with clip length."""
    _, batches = read_batches(a)
    times, totals = [], [a.batch_seconds * x for x in (0.25, 0.5, 1, 2)]
    for total in totals:
        batch = joined(batches, 2, max(1, round(total / 2)))
        each, used, _ = steps_of(a, "ours", [batch] * a.repeats, "growth")
        times.append(median(each))
        yield line(f"{len(batch.rows)} clips of 2 s", "s a step", times[-1],
                   note=f"{used / 2**30:.2f} GiB")
    slope, start = np.polyfit(totals, times, 1)
    residual = max(abs(t - start - slope * x) / t for x, t in zip(totals, times))
    yield line("per audio second, by linear fit", "s", slope,
               note=f"+ {start:.2g} s a step; largest residual {residual:.1%}")
    for length in (1, 5, 15, 30):
        batch = joined(batches, length, max(1, round(max(30, a.batch_seconds) / length)))
        each, used, _ = steps_of(a, "ours", [batch] * a.repeats, "growth")
        logits = in_own_process(logits_at_once, a, batch)
        audio_tokens = round(audio_seconds([batch]) / uw.TOKEN * RATE / STACK)
        yield line(f"{len(batch.rows)} clips of {length} s", "s/audio s",
                   median(each) / audio_seconds([batch]),
                   note=f"{used / 2**30:.2f} GiB; logits at the same time: {logits} "
                        f"({sum(batch.answer_tokens)} answer tokens, {audio_tokens} audio tokens)")


class LargestOver(TorchDispatchMode):
    """Counts the vectors of the largest tensor whose last dimension is `size`, apart from
    views of `weight`."""

    def __init__(self, size: int, weight: torch.Tensor):
        super().__init__()
        self.size, self.weight, self.count = size, weight.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            over = isinstance(t, torch.Tensor) and t.ndim and t.shape[-1] == self.size
            if over and t.untyped_storage().data_ptr() != self.weight:
                self.count = max(self.count, t.numel() // self.size)
        return out


def logits_at_once(a, batch: Batch) -> int:
    """For how many positions, at most, logits exist at once in a step's forward and backward."""
    s = dataclasses.replace(settings(a), compile=False)
    model = train.build_model(s, None)
    head = model.decoder.lm_head.weight
    with LargestOver(len(head), head) as largest, train.autocast(s):
        model(batch.to(a.device)).mean().backward()
    return largest.count


# ---------------------------------------------------------------- command line

PARTS = {f.__name__: f for f in (mel, decode, encoder, step, growth, features, generate, rows)}


def run_part(name: str, a) -> list[dict]:
    return list(PARTS[name](a))


def parse():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--encoder", required=True,
                   help=f"Whisper folder, or random:SHAPE of {', '.join(SHAPES)}")
    p.add_argument("--decoder", required=True, help="Qwen folder, or random:SHAPE")
    p.add_argument("--data", nargs="+", required=True,
                   help="manifests and tars with a train split; globs work")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    p.add_argument("--peer", default="transformers", choices=("transformers", "none"))
    p.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS),
                   help="parts to run (all)")
    p.add_argument("--json", help="write settings, machine and the table there")
    p.add_argument("--batch", type=int, default=8,
                   help="clips in a batch of the peer; fewer where memory is short (8)")
    p.add_argument("--batch-seconds", type=float, default=40.0,
                   help="audio in a batch of ours, that is an update of both (40)")
    p.add_argument("--batches", type=int, default=3,
                   help="batches, that is updates, in a measurement (3)")
    p.add_argument("--repeats", type=int, default=3, help="measurements, for the median (3)")
    p.add_argument("--clips", nargs="+", choices=("suite", "30 s"), default=["suite", "30 s"],
                   help="clips of `step` (both)")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(),
                   help="of torch (its own default)")
    p.add_argument("--rows", type=int, default=10_000_000,
                   help="rows of the synthetic manifest (10 million)")
    p.add_argument("--new-tokens", type=int, default=32, help="tokens to generate (32)")
    p.add_argument("--decode-hours", type=float, default=0.1,
                   help="audio in a measurement of `decode` (0.1)")
    p.add_argument("--compile", action="store_true", help="as train.py's")
    p.add_argument("--checkpoint-layers", action="store_true", help="as train.py's")
    return p.parse_args()


def machine(a) -> str:
    device = f"CPU with {torch.backends.cpu.get_cpu_capability()}"
    if a.device.startswith("cuda"):
        device = torch.cuda.get_device_name()
    return (f"{device}, {a.threads} threads of {os.cpu_count()} cores, "
            f"torch {torch.__version__}, {a.precision}")


def main():
    a = parse()
    a.peer = a.peer != "none"
    torch.set_num_threads(a.threads)
    print(f"{machine(a)}; {a.encoder} + {a.decoder}")
    print(f"{'part':9s} {'what':42s} {'unit':12s} {'ours':>9s} {'peer':>9s} {'ratio':>7s}  note")
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("encoder", "decoder"):
            given = getattr(a, name)
            if given.startswith("random:"):
                shape = given.removeprefix("random:")
                setattr(a, name, write_random(shape, Path(folder)))
        try:
            for part in a.only:
                # `step` and `growth` start a process for each side and size themselves
                alone = part in ("step", "growth")
                lines = PARTS[part](a) if alone else in_own_process(run_part, part, a)
                for found in lines:
                    table.append({"part": part, **found})
                    show(part, found)
        except (OSError, ValueError) as e:
            sys.exit(f"error: {e}")
    if a.json:
        found = {"machine": machine(a), "settings": vars(a), "rows": table}
        Path(a.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
