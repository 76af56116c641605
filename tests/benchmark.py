"""How fast is it? Ours beside the obvious implementation with transformers,
and beside the device's own limit, in one run.

    python tests/benchmark.py --encoder DIR --decoder DIR --data suite/*.jsonl [--device cuda] [--precision bf16]
    python tests/benchmark.py --encoder random:whisper-large-v3 --decoder random:qwen2.5-7b --data suite/*.jsonl ...
    python tests/benchmark.py --encoder random:whisper-smoke --decoder random:qwen-smoke --data suite/*.jsonl \\
        --batch-seconds 8 --batches 2 --repeats 1 --rows 10000 --new-tokens 4 --decode-hours 0.01
        # does it work? two minutes

Needs transformers; openai-whisper for one more row of `mel` (pip install --no-deps openai-whisper is enough).

The peer: WhisperFeatureExtractor and WhisperModel's encoder on 30 s padded features, the same projector, Qwen's
...ForCausalLM with inputs_embeds, attention_mask and labels (-100 outside the answers), frozen, in the compute dtype.
Both sides make the same updates from the same clips at the same precision; the peer cuts a batch into pieces of --batch
clips and accumulates. Clips are read before the clock starts (`decode` measures that; `features` reads within it);
log-mel is within. Batches are even quantiles, by clip length, of a pool that train.py's sampler draws from the data's
own mix. Ours and peer alternate; figures are medians over --repeats. A ratio above 1 says how many times better ours
is. Every part, and each side of `step`, runs in a process of its own, so that its peak memory (all of the process on a
CPU; what torch allocated on a GPU) is its own.
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
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import ModuleType

import numpy as np
import soundfile as sf
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import train  # noqa: E402
import uniwhisper as uw  # noqa: E402
from adapter import StackAdapter  # noqa: E402
from data import Batch, Batches, Rows, Sampler, held_out, loader, resample  # noqa: E402

RATE, IGNORE_INDEX = uw.SAMPLE_RATE, -100
SHAPES = {  # random weights of these shapes, for machines without downloads
    "whisper-smoke": dict(d_model=48, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=80, num_mel_bins=80),
    "whisper-base": dict(d_model=512, encoder_layers=6, encoder_attention_heads=8, encoder_ffn_dim=2048,
                         num_mel_bins=80),
    "whisper-large-v3": dict(d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120,
                             num_mel_bins=128),
    "qwen-smoke": dict(hidden_size=56, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, vocab_size=521, tie_word_embeddings=True),
    "qwen2.5-0.5b": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                         num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "qwen2.5-7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                       num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False)}


# ---------------------------------------------------------------- model FLOPs

def encoder_flops(c: dict, tokens: list[int], trained: bool = False) -> float:
    """FLOPs of Whisper's encoder on clips of so many tokens: 2 a weight and token, attention among a clip's own tokens;
    three times that where it trains (the first convolution, whose input needs no gradient: twice)."""
    d, total = c["d_model"], sum(tokens)
    conv1 = 2 * 3 * c["num_mel_bins"] * d * 2 * total  # on frames, two a token
    layer = 2 * total * (4 * d * d + 2 * d * c["encoder_ffn_dim"]) + 4 * d * sum(t * t for t in tokens)
    forward = conv1 + 2 * 3 * d * d * total + c["encoder_layers"] * layer
    return 3 * forward - conv1 if trained else forward


def decoder_flops(c: dict, lengths: list[int], logits: int, known: list[int] | None = None) -> float:
    """FLOPs of a Qwen decoder's forward on rows of so many positions, causal attention, lm_head on `logits` positions.

    known, as our step does it: first positions of each row whose keys and values are there already; the last layer goes
    on from its attention at the `logits` positions alone.
    """
    d, heads, total = c["hidden_size"], c["num_attention_heads"], sum(lengths) - sum(known or [])
    dim = c.get("head_dim") or (128 if c["model_type"] == "qwen3" else d // heads)
    weights = 2 * d * dim * (heads + c.get("num_key_value_heads", heads)) + 3 * d * c["intermediate_size"]
    layer = (2 * total * weights
             + 2 * heads * dim * sum(n * (n + 1) - k * (k + 1) for n, k in zip(lengths, known or [0] * len(lengths))))
    left_out = 2 * (total - logits) * d * (heads * dim + 3 * c["intermediate_size"]) if known else 0
    return c["num_hidden_layers"] * layer - left_out + 2 * d * c["vocab_size"] * logits


def step_flops(encoder: dict, decoder: dict, batch: Batch, tail: int, padded: bool = False) -> float:
    """FLOPs of a training step: encoder and adapter x 3, decoder x 2 (it needs no gradient of its weights).

    tail: chat tokens between audio and answer. padded: as the peer does it, every clip 30 s, logits at every position,
    the prompt computed in every step.
    """
    tokens = [1500 if padded else uw.encoder_lengths(n) for n in batch.samples.tolist()]
    audio, d, e = [-(-t // 4) for t in tokens], decoder["hidden_size"], encoder["d_model"]
    prompts = [len(p) for p in batch.prompts]
    lengths = [p + a + tail + len(y) - (not padded) for p, a, y in zip(prompts, audio, batch.answers)]
    adapter = 2 * sum(audio) * (4 * e * d + d * d)
    logits = sum(lengths) if padded else sum(map(len, batch.answers))
    return (encoder_flops(encoder, tokens, True) + 3 * adapter
            + 2 * decoder_flops(decoder, lengths, logits, None if padded else prompts))


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the best large matrix product; sizes that would take over 5 s are left out."""
    best, sizes = 0.0, [(n, n, n) for n in (512, 1024, 2048, 4096, 8192)] + [(4096, 896, 4864), (8192, 4864, 896)]
    for m, k, n in sizes:
        work = 2 * m * k * n
        if best and work / best > 5 or device == "cpu" and m * k * n > 4096**3:
            continue
        a, b = (torch.randn(x, y, device=device, dtype=dtype) for x, y in ((m, k), (k, n)))
        best = max(best, *(work / seconds(device, torch.mm, a, b) for _ in range(3)))
    return best


# ---------------------------------------------------------------- measuring

def seconds(device: str, f, *args) -> float:
    sync = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    sync()
    start = time.perf_counter()
    f(*args)
    sync()
    return time.perf_counter() - start


def alternate(a, ours, peer=None) -> list[list[float]]:
    """ours and peer: (function, list of inputs) -> the seconds of each repeat over all inputs, ours first."""
    sides = [side for side in (ours, peer) if side]
    over = lambda f, inputs: [f(x) for x in inputs]
    for f, inputs in sides:
        over(f, inputs if a.device != "cpu" else inputs[:1])  # warm-up
    times = [[seconds(a.device, over, *side) for side in sides] for _ in range(a.repeats)]
    return [list(t) for t in zip(*times)]


def peak_bytes(device: str) -> int:
    """Most memory so far: torch's on a GPU, else this process's."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    try:  # ru_maxrss also counts what the parent held when it started this process
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def in_own_process(f, *args):
    """f(*args) in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _limit_threads,
                             (torch.get_num_threads(),)) as pool:
        return pool.submit(f, *args).result()


def _limit_threads(n: int) -> None:
    torch.set_num_threads(n)
    torch.manual_seed(0)


def row(what: str, unit: str, ours: float, peer: float | None = None, lower: bool = False, note: str = "") -> dict:
    """A line of the table; lower: less is better."""
    ratio = None if peer is None else peer / ours if lower else ours / peer
    return dict(what=what, unit=unit, ours=ours, peer=peer, ratio=ratio, note=note)


def show(part: str, r: dict) -> None:
    number = lambda x, spec: "-" if x is None else format(x, spec)
    print(f"{part:9s} {r['what']:42s} {r['unit']:12s} {number(r['ours'], '9.4g'):>9s} {number(r['peer'], '9.4g'):>9s} "
          f"{number(r['ratio'], '7.2f'):>7s}  {r['note']}", flush=True)


def spread(times: list[float]) -> str:
    return f"{min(times):.3g}-{max(times):.3g} s"


# ---------------------------------------------------------------- inputs

def settings(a) -> train.Settings:
    return train.Settings(data=tuple(a.data), encoder=a.encoder, decoder=a.decoder, device=a.device,
                          precision=a.precision, batch_seconds=a.batch_seconds, compile=a.compile,
                          checkpoint_layers=a.checkpoint_layers)


def read_batches(a) -> tuple[Rows, list[Batch]]:
    """--batches batches of the sampler's first pool, even quantiles by clip length, in random order."""
    s, ranks = settings(a), train.Ranks(0, 1, torch.device(a.device))
    rows = train.open_data(s, ranks)
    sampler = train.make_sampler(s, rows, ranks)
    pool = sorted(itertools.islice(sampler, sampler.POOL), key=lambda spec: rows.seconds[spec[1]].max())
    picked = [pool[(2 * i + 1) * len(pool) // (2 * a.batches)] for i in range(a.batches)]
    reader = Batches(rows, uw.ChatTokenizer.from_pretrained(a.decoder), s.seed, s.max_seconds)
    return rows, [reader[spec] for spec in sorted(picked)]


def clips(batch: Batch) -> list[torch.Tensor]:
    return [x[:n] for x, n in zip(batch.audio, batch.samples.tolist())]


def joined(batches: list[Batch], length: float, count: int) -> Batch:
    """`count` clips of exactly `length` seconds, cut from all clips joined; chats are the first ones."""
    size, stream = round(length * RATE), torch.cat([c for b in batches for c in clips(b)])
    audio = stream.repeat(-(-count * size // len(stream)))[: count * size].view(count, size)
    take = lambda name: list(itertools.islice(itertools.cycle([x for b in batches for x in getattr(b, name)]), count))
    lists = {name: take(name) for name in ("prompts", "answers", "tasks", "rows", "instructions", "texts")}
    return Batch(audio=audio, samples=torch.full((count,), size), skipped=[], **lists)


def audio_seconds(batches: list[Batch]) -> float:
    return sum(b.samples.sum().item() for b in batches) / RATE


def write_random(name: str, folder: Path) -> str:
    """A checkpoint folder with random weights of one of SHAPES."""
    folder, shape, config = folder / name, SHAPES[name], {"model_type": "whisper" if "whisper" in name else "qwen2"}
    if "whisper" in name:
        uw.save_encoder(uw.WhisperEncoder(config | shape | {"max_source_positions": 1500}), folder)
        return str(folder)
    from conftest import make_tokenizer

    make_tokenizer(folder)
    config |= shape | {"head_dim": shape["hidden_size"] // shape["num_attention_heads"], "rms_norm_eps": 1e-6,
                       "rope_theta": 1e6, "max_position_embeddings": 32768, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen2ForCausalLM"]}))
    with torch.device("meta"):
        names = dict(uw.QwenDecoder(config).named_parameters())
    tied = shape["tie_word_embeddings"]
    tensors = {k if k.startswith("lm_head") else f"model.{k}":
               torch.empty(p.shape, dtype=torch.bfloat16).normal_(std=0.02)
               for k, p in names.items() if not (tied and k.startswith("lm_head"))}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


# ---------------------------------------------------------------- the peer

class Peer(nn.Module):
    """What a user of transformers would write."""

    def __init__(self, a, decoder: bool = True):
        from transformers import AutoModelForCausalLM, WhisperFeatureExtractor, WhisperModel, logging

        logging.set_verbosity_error()  # of a folder with an encoder alone, it misses the decoder
        logging.disable_progress_bar()
        super().__init__()
        self.device, self.amp = a.device, lambda: train.autocast(settings(a))  # anew each time: they nest
        self.encoder = WhisperModel.from_pretrained(a.encoder, dtype=torch.float32).encoder.to(a.device)
        self.extractor = WhisperFeatureExtractor(feature_size=self.encoder.config.num_mel_bins)
        if decoder:
            dtype = train.PRECISIONS[a.precision]
            self.decoder = (AutoModelForCausalLM.from_pretrained(a.decoder, dtype=dtype)
                            .requires_grad_(False).eval().to(a.device))
            self.decoder.generation_config.eos_token_id = None  # generate as many tokens as asked for
            self.decoder.generation_config.pad_token_id = 0
            self.projector = StackAdapter(self.encoder.config.d_model, self.decoder.config.hidden_size).to(a.device)
            self.tokenizer = uw.ChatTokenizer.from_pretrained(a.decoder)

    def features(self, audio):
        return self.extractor([x.numpy() for x in audio], sampling_rate=RATE, return_tensors="pt").input_features

    def encode(self, features):
        with self.amp():
            return self.encoder(features.to(self.device)).last_hidden_state

    def embed(self, audio, prompts, answers, side):
        """Chats spliced with the audio, padded on `side`: (embeds, mask)."""
        texts, features = [self.tokenizer.tail + y for y in answers], self.features(audio)  # which autocast would break
        with self.amp():
            spoken = self.projector(self.encode(features))  # (B, 375, D)
        table = self.decoder.get_input_embeddings()
        ids = lambda t: table(torch.tensor(t, device=self.device))
        rows = [torch.cat((ids(p), x.to(table.weight.dtype), ids(t))) for p, x, t in zip(prompts, spoken, texts)]
        mask = pad_sequence([torch.ones(len(r), dtype=torch.long, device=self.device) for r in rows], True,
                            padding_side=side)
        return pad_sequence(rows, True, padding_side=side), mask

    def forward(self, audio, prompts, answers):
        embeds, mask = self.embed(audio, prompts, answers, "right")
        labels = torch.full(mask.shape, IGNORE_INDEX)
        for line, n, y in zip(labels, mask.sum(1).tolist(), answers):
            line[n - len(y) : n] = torch.tensor(y)
        with self.amp():
            return self.decoder(inputs_embeds=embeds, attention_mask=mask, labels=labels.to(self.device)).loss

    def update(self, optimizer, batch: Batch, piece: int):
        audio, starts = clips(batch), range(0, len(batch.samples), piece)
        for i in starts:
            part = slice(i, i + piece)
            (self(audio[part], batch.prompts[part], batch.answers[part]) / len(starts)).backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def generate(self, audio, prompts, count: int):
        embeds, mask = self.embed(audio, prompts, [[]] * len(prompts), "left")
        with self.amp():
            return self.decoder.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=count,
                                         do_sample=False)


# ---------------------------------------------------------------- the parts

def mel(a):
    """Log-mel on one core: ours in batches, the peers a clip at a time, which suits their caches best."""
    from transformers import WhisperFeatureExtractor

    torch.set_num_threads(1)
    a.device, mels = "cpu", uw.read_config(a.encoder, ("whisper",))["num_mel_bins"]
    extractor, openai = WhisperFeatureExtractor(feature_size=mels), openai_mel()
    _, batches = read_batches(a)
    for name, some in (("suite clips", batches), ("30 s clips", [joined(batches, 30, 4)])):
        audio = [c for b in some for c in clips(b)]
        ours = lambda b: uw.log_mel_spectrogram(b.audio, mels)
        hf = lambda x: extractor(x.numpy(), sampling_rate=RATE, return_tensors="pt").input_features[0]
        mine = [m[:, : max(1, len(c) // 160)] for b in some for m, c in zip(ours(b), clips(b))]
        for peer, f in (("transformers", hf), ("openai-whisper", openai and (lambda x: openai(x, mels)))):
            if f is None:
                yield row(f"{name}, {peer}", "ms a clip", None, note="not installed")
                continue
            x, y = (1000 * median(t) / len(audio) for t in alternate(a, (ours, some), (f, audio)))
            worst = max((m - f(c)[:, : m.shape[1]]).abs().max().item() for m, c in zip(mine, audio))
            yield row(f"{name}, {peer}", "ms a clip", x, y, True,
                      f"1 thread, {len(audio)} clips; largest difference {worst:.1e}")


def openai_mel():
    """openai-whisper's log_mel_spectrogram after its pad_or_trim; None where it is not installed."""
    spec = find_spec("whisper")
    if spec is None or not Path(spec.submodule_search_locations[0], "audio.py").exists():
        return None
    package = sys.modules["whisper"] = ModuleType("whisper")  # audio.py alone: the package would load its tokenizer
    package.__path__ = list(spec.submodule_search_locations)
    from whisper.audio import log_mel_spectrogram, pad_or_trim

    return lambda audio, mels: log_mel_spectrogram(pad_or_trim(audio), mels)


def decode(a):
    """Reading, decoding and resampling FLAC files in the loader's worker processes."""
    _, batches = read_batches(a)
    counts = sorted({0, *(2**i for i in range(9) if 2**i <= (os.cpu_count() or 1))})
    for rate in (RATE, 44_100):
        with tempfile.TemporaryDirectory() as folder:
            lines = []
            for i, c in enumerate(c for b in batches for c in clips(b)):
                sf.write(f"{folder}/{i}.flac", resample(c, RATE, rate).clamp(-1, 1).numpy(), rate)
                lines.append(json.dumps(dict(audio=f"{i}.flac", instruction="What?", answer="This.",
                                             seconds=len(c) / RATE)))
            Path(folder, "rows.jsonl").write_text("\n".join(lines) + "\n")
            rows = Rows([f"{folder}/rows.jsonl"])
            reader = Batches(rows, uw.ChatTokenizer.from_pretrained(a.decoder))
            specs = held_out(rows, "train", 0, 20.0)
            specs *= max(1, round(a.decode_hours * 3600 / rows.seconds.sum()))
            hours = sum(rows.seconds[spec].sum() for _, spec in specs) / 3600
            for n in counts:
                times = [seconds("cpu", lambda: [None for _ in loader(reader, specs, n)]) for _ in range(a.repeats)]
                where = f"{n} worker{'s' * (n != 1)}" if n else "no worker"
                yield row(f"{rate / 1000:g} kHz, {where}", "h a minute", float(60 * hours / median(times)),
                          note=spread(times))


def encoder(a):
    """The encoder's forward, mel given."""
    model = uw.WhisperEncoder.from_pretrained(a.encoder).to(a.device).eval()
    peer, s = Peer(a, decoder=False).eval() if a.peer else None, settings(a)
    _, batches = read_batches(a)
    for name, some in (("suite clips", batches), ("30 s clips", [joined(batches, 30, 4)])):
        audio, mine = [c for b in some for c in clips(b)], []
        for b in some:
            tokens = uw.encoder_lengths(b.samples)
            features = uw.log_mel_spectrogram(b.audio, model.n_mels)[:, :, : 2 * int(tokens.max())]
            mine.append((features.to(a.device), tokens))
        theirs = ([peer.features(audio[i : i + a.batch]).to(a.device) for i in range(0, len(audio), a.batch)]
                  if peer else None)

        def ours(inputs):
            with train.autocast(s):
                return model(*inputs)

        with torch.inference_mode():
            times = alternate(a, (ours, mine), (peer.encode, theirs) if peer else None)
        rates = [audio_seconds(some) / median(t) for t in times]
        top = peak_flops(a.device, train.PRECISIONS[a.precision])
        work = encoder_flops(model.config, [n for _, t in mine for n in t.tolist()])
        share = work / median(times[0]) / top
        yield row(f"forward, {name}", "audio s/s", *rates,
                  note=f"{share:.0%} of {top / 1e9:.0f} GFLOP/s; {len(audio)} clips")


def run_steps(a, side: str, batches: list[Batch]) -> tuple[list[float], int, float]:
    """Seconds of each update, peak bytes, and the device's peak FLOP/s, of one side. For a process of its own."""
    s = settings(a)
    if side == "ours":
        if a.device == "cpu":
            train.keep_freed_memory()  # as train.py does; with it the peer, 8 clips at once, ran out of 24 GiB
        ranks = train.Ranks(0, 1, torch.device(a.device))
        model = train.build_model(s, ranks, None)
        optimizer, scaler = train.build_optimizer(s, model), torch.amp.GradScaler(a.device, enabled=False)
        run = train.wrap(s, model, ranks, 0)
        train.set_rates(s, optimizer, s.warmup)
        step = lambda b: train.update(s, run, optimizer, scaler, [b], ranks)
    else:
        peer = Peer(a)
        optimizer = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], 1e-4)
        step = lambda b: peer.update(optimizer, b, a.batch)
    for b in batches if a.device != "cpu" or a.compile else [joined(batches, 2, 1)]:
        step(b)  # warm-up
    times = [seconds(a.device, step, b) for b in batches]
    used = peak_bytes(a.device)
    return times, used, peak_flops(a.device, train.PRECISIONS[a.precision]) if side == "ours" else 0.0


def step(a):
    """The whole training step, log-mel to AdamW: train.py's update, and the peer's."""
    _, batches = read_batches(a)
    configs = uw.read_config(a.encoder, ("whisper",)), uw.read_config(a.decoder, ("qwen2", "qwen3"))
    tail = len(uw.ChatTokenizer.from_pretrained(a.decoder).tail)
    thirty = [joined(batches, 30, max(1, round(a.batch_seconds / 30)))] * a.batches
    for name, some in (("suite's mix", batches), ("30 s clips", thirty)):
        if not any(name.startswith(c) for c in a.clips):
            continue
        sides = {"ours": [], "peer": []} if a.peer else {"ours": []}
        for i in range(a.repeats):
            for side, runs in sides.items():
                print(f"step, {name}: {side}, {i + 1} of {a.repeats}", file=sys.stderr, flush=True)
                try:
                    runs.append(in_own_process(run_steps, a, side, some))
                except (BrokenProcessPool, MemoryError, torch.OutOfMemoryError) as e:
                    raise ValueError(f"step, {name}: {side} does not fit into memory ({type(e).__name__}); "
                                     "use a smaller "
                                     + ("--batch-seconds" if side == "ours" else f"--batch than {a.batch}")) from None
        totals = [[sum(times) for times, *_ in runs] for runs in sides.values()]
        top, middle = max(r[2] for r in sides["ours"]), [median(t) for t in totals]
        shares = [sum(step_flops(*configs, b, tail, padded) for b in some) / t / top
                  for t, padded in zip(middle, (False, True))]
        note = f"{len(some)} updates, {sum(len(b.rows) for b in some)} clips, peer {a.batch} at once; "
        yield row(f"{name}: speed", "audio s/s", *(audio_seconds(some) / t for t in middle),
                  note=note + " | ".join(map(spread, totals)))
        note = "of the FLOPs that each side needs"
        yield row(f"{name}: share of {top / 1e9:.0f} GFLOP/s", "%", *(100 * x for x in shares), note=note)
        yield row(f"{name}: peak memory", "GiB", *(max(r[1] for r in runs) / 2**30 for runs in sides.values()),
                  lower=True)


def growth(a):
    """How our step grows with the batch and with clip length."""
    _, batches = read_batches(a)
    t, totals = [], [a.batch_seconds * x for x in (0.25, 0.5, 1, 2)]
    for total in totals:
        batch = joined(batches, 2, max(1, round(total / 2)))
        times, used, _ = in_own_process(run_steps, a, "ours", [batch] * a.repeats)
        t.append(median(times))
        yield row(f"{len(batch.rows)} clips of 2 s", "s a step", t[-1], note=f"{used / 2**30:.2f} GiB")
    slope, start = np.polyfit(totals, t, 1)
    residual = max(abs(y - start - slope * x) / y for x, y in zip(totals, t))
    yield row("per audio second, by linear fit", "s", slope,
              note=f"+ {start:.2g} s a step; largest residual {residual:.1%}")
    for length in (1, 5, 15, 30):
        batch = joined(batches, length, max(1, round(max(30, a.batch_seconds) / length)))
        times, used, _ = in_own_process(run_steps, a, "ours", [batch] * a.repeats)
        rows = in_own_process(vocabulary_rows, a, batch)
        answers, all_ = sum(map(len, batch.answers)), round(batch.samples.sum().item() / RATE * 12.5)
        yield row(f"{len(batch.rows)} clips of {length} s", "s/audio s", median(times) / audio_seconds([batch]),
                  note=f"{used / 2**30:.2f} GiB; largest tensor over the vocabulary: {rows:.0f} rows "
                       f"({answers} answer tokens, {all_} audio tokens)")


class LargestOver(TorchDispatchMode):
    """Rows of the largest tensor whose last dimension is `size`, apart from views of `weight`."""

    def __init__(self, size: int, weight: torch.Tensor):
        super().__init__()
        self.size, self.weight, self.rows = size, weight.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            over = isinstance(t, torch.Tensor) and t.ndim and t.shape[-1] == self.size
            if over and t.untyped_storage().data_ptr() != self.weight:
                self.rows = max(self.rows, t.numel() // self.size)
        return out


def vocabulary_rows(a, batch: Batch) -> int:
    """Rows of the largest tensor with the vocabulary as its last dimension, in a step's forward and backward."""
    s = dataclasses.replace(settings(a), compile=False)
    model = train.build_model(s, train.Ranks(0, 1, torch.device(a.device)), None)
    head = model.decoder.lm_head.weight
    with LargestOver(len(head), head) as largest, train.autocast(s):
        model(batch.to(a.device))[0].backward()
    return largest.rows


def features(a):
    """Clips' mean features for probing, from files: probe.py's `extract`, and the peer's mean over the padded 30 s."""
    from probe import Clip, Settings, Spec, Task, extract

    rows, batches = read_batches(a)
    numbers = [i for b in batches for i in b.rows]
    task = Task("suite", Spec("suite", "label"), [Clip(rows, i, "test", "") for i in numbers])
    s = Settings(batch_seconds=a.batch_seconds, precision=a.precision, device=a.device)
    model = uw.WhisperEncoder.from_pretrained(a.encoder).to(a.device).eval()
    peer = Peer(a, decoder=False).eval() if a.peer else None
    ours = lambda task: extract(model, task, s, lambda text: None)
    theirs = lambda numbers: peer.encode(peer.features([rows.audio(i) for i in numbers])).float().mean(1).cpu()
    groups = [numbers[i : i + a.batch] for i in range(0, len(numbers), a.batch)]
    with torch.inference_mode():
        times = alternate(a, (ours, [task]), (theirs, groups) if peer else None)
    yield row("mean features, from files", "clips/s", *(len(numbers) / median(t) for t in times),
              note=f"{len(numbers)} clips")


def generate(a):
    """Greedy generation of a fixed number of tokens for --batch clips at once."""
    _, batches = read_batches(a)
    batch, s = batches[len(batches) // 2], settings(a)
    audio, samples, asked = batch.audio[: a.batch].to(a.device), batch.samples[: a.batch], batch.instructions[: a.batch]
    model = uw.UniWhisper.from_folders(a.encoder, a.decoder, dtype=train.PRECISIONS[a.precision]).to(a.device).eval()
    model.tokenizer.stop = {-1}  # no id: generate as many tokens as asked for
    peer = Peer(a).eval() if a.peer else None

    def ours(count):
        with train.autocast(s):
            model.generate(audio, asked, count, samples)

    theirs = lambda count: peer.generate(clips(batch)[: a.batch], batch.prompts[: a.batch], count)
    for name, count in (("first token", 1), (f"{a.new_tokens} tokens, all in all", a.new_tokens)):
        times = alternate(a, (ours, [count]), (theirs, [count]) if peer else None)
        yield row(f"{name}, {len(asked)} clips", "tokens/s", *(len(asked) * count / median(t) for t in times))


class Weighed(Batches):
    """Reads a batch and answers with the bytes that this worker does not share."""

    def __getitem__(self, spec):
        super().__getitem__(spec)
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private"))


def rows(a):
    """Start-up on a manifest of --rows rows."""
    with tempfile.TemporaryDirectory() as folder:
        sf.write(f"{folder}/a.flac", np.random.default_rng(0).normal(0, 0.1, RATE), RATE)
        line = '{"audio": "a.flac", "instruction": "Which?", "answer": "%d", "task": "task-%d", "seconds": %.2f}\n'
        with open(f"{folder}/rows.jsonl", "w") as f:
            f.writelines(line % (i, i % 20, 0.5 + i % 977 / 100) for i in range(a.rows))
        before, start = peak_bytes("cpu"), time.perf_counter()
        table = Rows([f"{folder}/rows.jsonl"], answers=True, splits={"train"})
        read = time.perf_counter() - start
        sampler = Sampler(table, table.where("train"), a.batch_seconds)
        next(iter(sampler))
        ready = time.perf_counter() - start
        size = f"{a.rows:,} rows"
        yield row(f"{size}: manifest read", "s", read,
                  note=f"{Path(folder, 'rows.jsonl').stat().st_size / 2**20:.0f} MiB")
        yield row(f"{size}: first batch drawn", "s", ready)
        grown = peak_bytes("cpu") - before
        yield row(f"{size}: main process grows by", "MiB", grown / 2**20,
                  note=f"{grown / a.rows:.0f} bytes a row at the peak")
        if Path("/proc/self/smaps_rollup").exists():
            reader = Weighed(table, uw.ChatTokenizer.from_pretrained(a.decoder))
            private = max(itertools.islice(loader(reader, sampler, 2), 8))
            yield row(f"{size}: of a worker's own", "MiB", private / 2**20, note="not shared with the main process")


# ---------------------------------------------------------------- command line

PARTS = {f.__name__: f for f in (mel, decode, encoder, step, growth, features, generate, rows)}


def run_part(name: str, a) -> list[dict]:
    return list(PARTS[name](a))


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--encoder", required=True, help=f"Whisper folder, or random:SHAPE of {', '.join(SHAPES)}")
    p.add_argument("--decoder", required=True, help="Qwen folder, or random:SHAPE")
    p.add_argument("--data", nargs="+", required=True, help="manifests and tars with a train split; globs work")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    p.add_argument("--peer", default="transformers", choices=("transformers", "none"))
    p.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to run (all)")
    p.add_argument("--json", help="write settings, machine and rows there")
    p.add_argument("--batch", type=int, default=8, help="clips in a batch of the peer; fewer where memory is short (8)")
    p.add_argument("--batch-seconds", type=float, default=40.0,
                   help="audio in a batch of ours, that is an update of both (40)")
    p.add_argument("--batches", type=int, default=3, help="batches, that is updates, in a measurement (3)")
    p.add_argument("--repeats", type=int, default=3, help="measurements, for the median (3)")
    p.add_argument("--clips", nargs="+", choices=("suite", "30 s"), default=["suite", "30 s"],
                   help="clips of `step` (both)")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (its own default)")
    p.add_argument("--rows", type=int, default=10_000_000, help="rows of the synthetic manifest (10 million)")
    p.add_argument("--new-tokens", type=int, default=32, help="tokens to generate (32)")
    p.add_argument("--decode-hours", type=float, default=0.1, help="audio in a measurement of `decode` (0.1)")
    p.add_argument("--compile", action="store_true", help="as train.py's")
    p.add_argument("--checkpoint-layers", action="store_true", help="as train.py's")
    return p.parse_args()


def main():
    a = parse()
    a.peer = a.peer != "none"
    torch.set_num_threads(a.threads)
    gpu, cpu = a.device.startswith("cuda"), f"CPU with {torch.backends.cpu.get_cpu_capability()}"
    device = torch.cuda.get_device_name() if gpu else cpu
    machine = f"{device}, {a.threads} threads of {os.cpu_count()} cores, torch {torch.__version__}, {a.precision}"
    print(f"{machine}; {a.encoder} + {a.decoder}")
    print(f"{'part':9s} {'what':42s} {'unit':12s} {'ours':>9s} {'peer':>9s} {'ratio':>7s}  note")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("encoder", "decoder"):
            if (given := getattr(a, name)).startswith("random:"):
                setattr(a, name, write_random(given.removeprefix("random:"), Path(folder)))
        for part in a.only:
            try:
                # `step` and `growth` start a process for each side and size, and hold little themselves
                lines = PARTS[part](a) if part in ("step", "growth") else in_own_process(run_part, part, a)
                for line in lines:
                    found.append({"part": part, **line})
                    show(part, line)
            except (OSError, ValueError) as e:
                sys.exit(f"error: {e}")
    if a.json:
        Path(a.json).write_text(json.dumps({"machine": machine, "settings": vars(a), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
