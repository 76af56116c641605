"""Train a Whisper encoder through an adapter and a frozen Qwen language model, on audio + instruction -> answer.

    python train.py                                     # the embedded example: two cores, under three minutes
    python train.py --data suite/*.jsonl --encoder whisper-base --decoder qwen2.5-0.5b --out out/first
    torchrun --nproc-per-node=8 train.py ...            # several GPUs; with --nnodes, several machines
    python train.py ... --resume                        # go on from the newest checkpoint, to the same bits on CPUs

OUT gets config.json, metrics.jsonl, checkpoints/ and, at the end, encoder/ in Hugging Face's Whisper layout.
"""
import argparse
import ctypes
import dataclasses
import itertools
import json
import math
import os
import random
import resource
import shutil
import sys
import time
import zlib
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from data import SAMPLE_RATE, Batches, Rows, Sampler, held_out, loader
from uniwhisper import UniWhisper, newest_checkpoint, save_encoder

HERE = Path(__file__).parent
BAD_STEPS_IN_A_ROW = 5  # non-finite updates after which a run ends (25 with fp16, which first has to find its scale)
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def flag(default, help, **more):
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Settings:
    # data
    data: tuple[str, ...] = flag((), "manifests (.jsonl) and tars; globs work. Without: the embedded example",
                                 nargs="+")
    train_split: tuple[str, ...] = flag(("train",), "splits to train on (a row without split is train)", nargs="+")
    valid_split: str = flag("valid", "split whose loss is reported, never trained on")
    max_seconds: float = flag(30.0, "longest clip")
    batch_seconds: float = flag(200.0, "audio seconds in a batch, padding counted")
    accumulate: int = flag(1, "batches per update and rank")
    # assumption: the paper does not say how it mixes tasks
    temperature: float = flag(2.0, "a task of n rows weighs n ** (1 / temperature)")
    task_weights: tuple[str, ...] = flag((), "explicit mixture instead, as TASK=WEIGHT; other tasks are left out",
                                         nargs="+")
    workers: int = flag(4, "processes per rank that read audio; the stream is the same for any number")
    # model
    # assumption: the paper names no sizes
    encoder: str = flag("", "Whisper folder to start from")
    decoder: str = flag("", "Qwen folder, frozen")
    stack: int = flag(4, "encoder tokens of 20 ms that the adapter joins into one audio token")
    # optimisation
    # assumption: the paper gives none of these values, and not what the loss is a mean over
    steps: int = flag(10_000, "updates")
    lr_encoder: float = flag(1e-4, "encoder's peak learning rate")
    lr_adapter: float = flag(5e-4, "adapter's peak learning rate")
    warmup: int = flag(100, "updates of linear warm-up; then a cosine to a tenth")
    freeze_encoder: int = flag(0, "first updates that train the adapter alone")
    weight_decay: float = flag(0.01, "AdamW's, on matrices")
    grad_clip: float = flag(1.0, "largest gradient norm")
    loss: str = flag("token", "mean over all answer tokens of an update, or over its clips",
                     choices=("token", "example"))
    precision: str = flag("", "default: bf16 where the device has it, else fp32", choices=tuple(PRECISIONS))
    seed: int = flag(0, "of the adapter, the sampler and the instructions")
    # speed and memory
    device: str = flag("", "default: cuda if there is one, else cpu", choices=("cuda", "cpu"))
    threads: int = flag(0, "CPU threads of this process (0: torch's own choice)")
    compile: bool = flag(False, "torch.compile each layer")
    checkpoint_layers: bool = flag(False, "recompute layers in backward: less memory, about a third more time")
    # reports and checkpoints
    out: str = flag("out", "folder of the run; several machines must share it")
    log_every: int = flag(10, "updates between log lines")
    eval_every: int = flag(500, "updates between held-out evaluations")
    eval_clips: int = flag(64, "held-out clips per task for the loss (0: all)")
    questions: int = flag(20, "held-out questions that the model answers at each evaluation")
    save_every: int = flag(500, "updates between checkpoints")
    keep: int = flag(2, "checkpoints kept")
    probe_data: tuple[str, ...] = flag((), "manifests and tars for kNN probes of the encoder during training",
                                       nargs="+")
    probe_every: int = flag(500, "updates between these probes")
    resume: bool = flag(False, "go on from OUT's newest checkpoint")


# What may differ when a run is resumed; everything else would change its numbers.
FREE_ON_RESUME = {"resume", "out", "workers", "log_every", "save_every", "keep", "checkpoint_layers",
                  "eval_every", "eval_clips", "questions", "probe_every", "probe_data", "data"}
# The embedded example: what `python train.py` alone means.
EXAMPLE = dict(encoder=str(HERE / "weights/tiny/encoder"), decoder=str(HERE / "weights/tiny/decoder"),
               out="out/example", steps=600, batch_seconds=32.0, warmup=20, lr_encoder=1e-3, lr_adapter=2e-3,
               workers=1, threads=1, log_every=25, eval_every=300, save_every=300, questions=36)


def parse(argv=None) -> Settings:
    """Command line -> resolved settings. Raises ValueError for what does not fit together."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for f in dataclasses.fields(Settings):
        extra = {k: f.metadata[k] for k in ("nargs", "choices") if k in f.metadata}
        kind = {"action": "store_true"} if f.type is bool else {"type": str if "nargs" in extra else f.type, **extra}
        text = f.metadata["help"] + ("" if f.type is bool or f.default in ((), "") else f" ({f.default})")
        p.add_argument("--" + f.name.replace("_", "-"), help=text, **kind)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(p.parse_args(argv)).items()}
    s = Settings(**(given if "data" in given else EXAMPLE | given))
    for name in ("encoder", "decoder"):
        if not getattr(s, name):
            raise ValueError(f"--data needs --{name}, a Hugging Face folder; see weights/README.md")
    for name in ("steps", "batch_seconds", "accumulate", "stack", "max_seconds", "temperature", "grad_clip",
                 "log_every", "eval_every", "save_every", "keep", "probe_every"):
        if not 0 < getattr(s, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(s, name)}; it must be above 0")
    for name in ("threads", "workers", "questions", "eval_clips", "warmup", "freeze_encoder", "seed", "lr_encoder",
                 "lr_adapter", "weight_decay"):
        if not 0 <= getattr(s, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(s, name)}; it must be 0 or more")
    if s.valid_split in s.train_split:
        raise ValueError(f"--valid-split {s.valid_split} is also in --train-split: "
                         "the held-out loss would be trained on")
    device = s.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but there is no GPU that torch can use")
    fast_bf16 = (torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda"
                 else torch.cpu._is_avx512_bf16_supported())
    return dataclasses.replace(
        s, device=device, precision=s.precision or ("bf16" if fast_bf16 else "fp32"), out=os.path.abspath(s.out),
        encoder=os.path.abspath(s.encoder), decoder=os.path.abspath(s.decoder))


# ---------------------------------------------------------------- ranks

@dataclass(frozen=True)
class Ranks:
    """This process among all; one process needs no torchrun."""
    rank: int
    world: int
    device: torch.device

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, thing) -> list:
        """Each rank's `thing`, on rank 0 (elsewhere a list of None)."""
        if self.world == 1:
            return [thing]
        things = [None] * self.world
        dist.gather_object(thing, things if self.rank == 0 else None)
        return things

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def leave(self) -> None:
        if self.world > 1:
            # Gloo's threads must have let go of the last gradients before their group is freed: freeing it holds
            # Python's lock and waits for them, and to free a tensor they need that lock. A barrier alone does not wait
            # for both of its threads.
            dist.barrier()
            time.sleep(1)
            dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Have the C library use again what a step frees. By default it gives it back to the kernel, and fetching it anew,
    page by page, takes a tenth of a step on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # glibc's
    if mallopt:
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: keep all
        mallopt(-4, 0)  # M_MMAP_MAX: no block outside the heap


def start_ranks(s: Settings) -> Ranks:
    """Join the processes that torchrun started, each with its own GPU where there are GPUs; else this one is alone."""
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if s.device == "cuda" else torch.device(s.device)
    if s.threads:
        torch.set_num_threads(s.threads)
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this machine finds {torch.cuda.device_count()} GPUs; "
                             "lower --nproc-per-node")
        torch.cuda.set_device(device)
    if world > 1:
        # The others wait while rank 0 asks, probes and saves.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    return Ranks(int(os.environ.get("RANK", 0)), world, device)


# ---------------------------------------------------------------- model, optimizer, schedule

def build_model(s: Settings, ranks: Ranks, checkpoint: Path | None) -> UniWhisper:
    """Encoder and adapter in float32, from a checkpoint if there is one; the decoder in the compute dtype, so that no
    step casts its weights."""
    torch.manual_seed(s.seed)  # the adapter's start, the same on every rank
    encoder, adapter = (checkpoint / "encoder", checkpoint / "adapter") if checkpoint else (s.encoder, None)
    model = UniWhisper.from_folders(encoder, s.decoder, s.stack, PRECISIONS[s.precision], adapter).to(ranks.device)
    model.encoder.checkpoint_layers = model.decoder.checkpoint_layers = s.checkpoint_layers
    if s.compile:
        for layer in [*model.encoder.layers, *model.decoder.layers]:
            layer.compile(dynamic=True)  # one graph for all lengths
    return model.train()


def build_optimizer(s: Settings, model: UniWhisper) -> torch.optim.AdamW:
    groups = []
    for part, lr in ((model.encoder, s.lr_encoder), (model.adapter, s.lr_adapter)):
        weights = [p for p in part.parameters() if p.requires_grad]
        groups.append(dict(params=[p for p in weights if p.ndim > 1], peak=lr, weight_decay=s.weight_decay))
        groups.append(dict(params=[p for p in weights if p.ndim < 2], peak=lr, weight_decay=0.0))
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)


def set_rates(s: Settings, optimizer, step: int) -> None:
    """Linear warm-up, then a cosine to a tenth; the encoder's own warm-up begins when it is let go."""
    cosine = 0.55 + 0.45 * math.cos(math.pi * min(1.0, step / s.steps))
    for i, group in enumerate(optimizer.param_groups):
        start = s.freeze_encoder if i < 2 else 0  # the first two groups are the encoder's
        group["lr"] = group["peak"] * cosine * max(0.0, min(1.0, (step + 1 - start) / max(1, s.warmup)))


def wrap(s: Settings, model: UniWhisper, ranks: Ranks, step: int):
    """Freeze or free the encoder for this step; over several ranks, DDP around what trains from here on."""
    for name, p in model.encoder.named_parameters():
        p.requires_grad_(step >= s.freeze_encoder and name != "embed_positions.weight")
    if ranks.world == 1:
        return model
    # DDP deals the gradients into new buckets after its first step, which in a resumed run is another one. Over three
    # ranks or more Gloo adds in an order that depends on a number's place in its bucket; with this flag they stay.
    fixed = ranks.world > 2 and ranks.device.type == "cpu"
    return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False,
                                   find_unused_parameters=fixed)


def autocast(s: Settings):
    return torch.autocast(s.device, PRECISIONS[s.precision], enabled=s.precision != "fp32")


# ---------------------------------------------------------------- checkpoints

def save_checkpoint(s: Settings, model, state: dict, step: int) -> None:
    """Write checkpoints/step-N beside and rename it: a folder of that name is whole, or not there.

    The folder holds encoder/ (a Whisper folder: probe.py and uniwhisper.py read it), adapter/ and trainer.pt.
    """
    folder = Path(s.out) / "checkpoints"
    final, writing = folder / f"step-{step:08d}", folder / f".writing-{step:08d}"
    try:
        for stale in folder.glob(".*-*"):
            shutil.rmtree(stale, ignore_errors=True)
        (writing / "adapter").mkdir(parents=True)
        save_encoder(model.encoder, writing / "encoder")
        save_file(model.adapter.state_dict(), writing / "adapter" / "model.safetensors")
        torch.save(state, writing / "trainer.pt")
        for path in [*writing.rglob("*"), writing]:
            flush(path)
        writing.rename(final)
        flush(folder)
    except Exception as e:  # safetensors and torch.save raise classes of their own when the disk is full
        shutil.rmtree(writing, ignore_errors=True)
        raise OSError(f"cannot save {final}: {e}; make room and "
                      f"--resume from {newest_checkpoint(s.out) or 'the start'}") from e
    for old in sorted(folder.glob("step-" + 8 * "[0-9]"))[: -s.keep]:
        shutil.rmtree(old.rename(folder / f".old-{old.name}"), ignore_errors=True)  # in use: the next save tries again


def flush(path: Path) -> None:
    """fsync a file or folder, so that the rename cannot reach the disk before what it names."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def rng_state(ranks: Ranks) -> dict:
    cuda = torch.cuda.get_rng_state(ranks.device) if ranks.device.type == "cuda" else None
    return {"torch": torch.get_rng_state(), "python": random.getstate(), "cuda": cuda}


def set_rng_state(mine: dict, ranks: Ranks) -> None:
    torch.set_rng_state(mine["torch"])
    random.setstate(mine["python"])
    if mine["cuda"] is not None:
        torch.cuda.set_rng_state(mine["cuda"], ranks.device)


def load_state(s: Settings, checkpoint: Path, ranks: Ranks, rows: Rows) -> dict:
    """The trainer's part of a checkpoint. Raises ValueError if it was made with other settings."""
    try:
        state = torch.load(checkpoint / "trainer.pt", map_location="cpu")
    except Exception as e:  # torch.load has many classes of errors for a damaged file
        raise ValueError(f"{checkpoint}/trainer.pt is damaged ({str(e).splitlines()[0]}); "
                         f"remove {checkpoint} to resume from the one before") from None
    # A setting that is newer than the checkpoint had its default then.
    then, now = fixed_settings(Settings(), ranks, rows) | state["settings"], fixed_settings(s, ranks, rows)
    differ = [f"{k} was {then.get(k)!r}, is {v!r}" for k, v in now.items() if then.get(k) != v]
    if differ:
        raise ValueError(f"--resume of {checkpoint} with other settings: {'; '.join(differ)}; "
                         "use the same, or another --out")
    return state


def fixed_settings(s: Settings, ranks: Ranks, rows: Rows) -> dict:
    """All that decides a run's numbers, as plain values.
    Checksums: of the rows' lengths and tasks, and splits, in order."""
    kept = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(s).items()
            if k not in FREE_ON_RESUME}
    return kept | {"ranks": ranks.world, "rows": len(rows), "seconds": round(float(rows.seconds.sum(dtype=float)), 2),
                   "tasks": rows.tasks, "checksum": zlib.crc32(rows.seconds, zlib.crc32(rows.task)),
                   "splits": [*rows.splits, zlib.crc32(rows.split)]}


# ---------------------------------------------------------------- reports

class Log:
    """Sums since the last line, per task, kept on the device until a line is due; writes metrics.jsonl."""

    def __init__(self, s: Settings, ranks: Ranks, tasks: list[str], step: int):
        self.s, self.ranks, self.tasks = s, ranks, tasks
        self.sums = torch.zeros(len(tasks), 2, dtype=torch.float64, device=ranks.device)  # loss, answer tokens
        self.seen = torch.zeros(len(tasks), 2, dtype=torch.float64)  # clips read, clips that could not be read
        self.audio, self.first = 0.0, step
        self.start = self.mark = time.perf_counter()
        self.path = Path(s.out) / "metrics.jsonl"
        if ranks.rank == 0:  # what a killed run wrote after its last checkpoint is going to be written again
            lines = self.path.read_bytes().splitlines(keepends=True) if step and self.path.exists() else []
            kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step]
            new = self.path.with_suffix(".new")
            new.write_bytes(b"".join(kept))
            new.replace(self.path)

    def count(self, batches) -> None:
        """Name what could not be read; end the run when it is too much."""
        for batch in batches:
            for task, message in batch.skipped:
                print(f"skipped: {message}", file=sys.stderr, flush=True)
                self.seen[self.tasks.index(task), 1] += 1
            for task in batch.tasks:
                self.seen[self.tasks.index(task), 0] += 1
            self.audio += batch.samples.sum().item() / SAMPLE_RATE
        read, bad = self.seen.sum(0).tolist()
        if bad > max(10, 0.01 * (read + bad)):
            raise ValueError(f"{bad:.0f} of {read + bad:.0f} clips could not be read, over 1 %; they are named above: "
                             "repair them or take them out")

    def write(self, step: int, **values) -> None:
        if self.ranks.rank == 0:
            line = json.loads(json.dumps({"step": step, **values}),
                              parse_constant=lambda nan: None)  # JSON knows no NaN
            with open(self.path, "a") as f:
                f.write(json.dumps(line) + "\n")

    def line(self, step: int, optimizer, norm: float) -> None:
        """The dense line of an interval, on the console and as JSON."""
        sums = self.ranks.sum(self.sums.clone()).tolist()
        counts = torch.cat((torch.tensor([self.audio], dtype=torch.float64), self.seen[:, 1]))
        audio, *skipped = self.ranks.sum(counts.to(self.ranks.device)).tolist()
        now = time.perf_counter()
        per_task = {t: loss / n for t, (loss, n) in zip(self.tasks, sums) if n}
        rates = {"encoder": optimizer.param_groups[0]["lr"], "adapter": optimizer.param_groups[2]["lr"]}
        left = (now - self.start) / max(1, step - self.first) * (self.s.steps - step)
        tokens = sum(n for _, n in sums)
        values = dict(loss=sum(a for a, _ in sums) / tokens if tokens else math.nan,
                      tasks=per_task, norm=norm, lr=rates,
                      audio_seconds_per_second=audio / (now - self.mark), memory_gib=peak_memory(self.ranks.device),
                      skipped={t: int(n) for t, n in zip(self.tasks, skipped) if n})
        self.write(step, **values)
        self.ranks.say(f"step {step:>{len(str(self.s.steps))}}/{self.s.steps}  loss {values['loss']:.3f}  ("
                       + "  ".join(f"{t} {v:.2f}" for t, v in per_task.items())
                       + f")  lr {'/'.join(f'{r:.1e}' for r in rates.values())}  norm {norm:.2f}  "
                       f"{values['audio_seconds_per_second']:.1f} s/s  {values['memory_gib']:.1f} GiB  "
                       f"left {timedelta(seconds=int(left))}")
        self.sums.zero_()
        self.audio, self.mark = 0.0, now


def peak_memory(device) -> float:
    """GiB at most so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


@torch.no_grad()
def evaluate(s: Settings, model, ranks: Ranks, batches: Batches, specs) -> dict[str, float]:
    """Held-out loss per task (mean over answer tokens), each rank doing its part of the batches.

    No workers here: they would be forked while threads of the last collective still let go of Python, and up to Python
    3.11 such a child can wait forever for a lock that nobody holds any more (python/cpython#112275).
    """
    rows = batches.rows
    sums = torch.zeros(len(rows.tasks), 2, dtype=torch.float64, device=ranks.device)
    for batch in map(batches.__getitem__, specs[ranks.rank :: ranks.world]):
        for _, message in batch.skipped:
            print(f"skipped: {message}", file=sys.stderr, flush=True)
        with autocast(s):
            losses, tokens = model(batch.to(ranks.device), per_row=True)
        tally(sums, rows, batch, losses, tokens)
    return {t: loss / n for t, (loss, n) in zip(rows.tasks, ranks.sum(sums).tolist()) if n}


def tally(sums, rows: Rows, batch, losses, tokens) -> None:
    """Add a batch's losses and answer tokens (B,) to its tasks' sums (tasks, 2)."""
    task = torch.from_numpy(rows.task[batch.rows]).to(sums.device, non_blocking=True)
    values = torch.stack((losses.detach().double(), tokens.to(sums.device, non_blocking=True).double()), 1)
    sums.index_add_(0, task, values)


def ask(s: Settings, model, ranks: Ranks, batches: Batches, specs) -> list[dict]:
    """Answers to held-out questions, the same ones each time and of all tasks in turn, beside the truth."""
    rows, by_task = batches.rows, {}
    held_out_rows = sorted(i for _, spec in specs for i in spec)
    for i in np.random.default_rng(s.seed).permutation(held_out_rows).tolist():
        by_task.setdefault(int(rows.task[i]), []).append(i)
    turns = [i for turn in itertools.zip_longest(*by_task.values()) for i in turn if i is not None]
    picked = sorted(turns[: s.questions], key=lambda i: rows.seconds[i])
    answers = []
    for n in range(0, len(picked), 8):
        batch = batches[n, picked[n : n + 8]]
        with autocast(s):
            texts = model.generate(batch.audio.to(ranks.device), batch.instructions, 48, batch.samples)
        answers += [dict(task=t, instruction=q, truth=a, answer=b)
                    for t, q, a, b in zip(batch.tasks, batch.instructions, batch.texts, texts)]
    return sorted(answers, key=lambda a: a["task"])


def report(t: "Trainer") -> dict[str, float]:
    """Held-out losses (beside those before training) and a few answers, on the console and in metrics.jsonl."""
    s, ranks, place = t.s, t.ranks, f"step {t.step}/{t.s.steps}"
    if not t.held_out:
        return {}
    losses = evaluate(s, t.model, ranks, t.batches, t.held_out)
    t.log.write(t.step, held_out=losses)
    was = lambda task: f"{t.before[task]:.3f} -> " if task in (t.before or {}) else ""
    ranks.say(f"{place}  held-out loss: " + "  ".join(f"{task} {was(task)}{v:.3f}" for task, v in losses.items()))
    if s.questions and ranks.rank == 0:
        answers = ask(s, t.model, ranks, t.batches, t.held_out)
        plain = lambda text: " ".join(text.casefold().strip(" .!?\"'").split())
        right = sum(plain(a["truth"]) == plain(a["answer"]) for a in answers)
        for a in answers:
            ranks.say(f"    {a['task']:14s} {a['instruction'][:40]:40s}  truth: {a['truth'][:50]:30s}  "
                      f"answer: {a['answer'][:60]!r}")
        ranks.say(f"{place}  held-out answers right: {right} of {len(answers)}")
        t.log.write(t.step, answers=answers, right=right)
    return losses


def probe(t: "Trainer") -> None:
    """kNN scores of the encoder as it is now, on a few held-out clips of each task; the other ranks wait."""
    if t.ranks.rank == 0:
        from probe import knn_scores

        try:
            scores = knn_scores(t.model.encoder, t.probe_tasks, device=t.s.device, precision=t.s.precision)
        except (OSError, ValueError) as e:  # no reason to lose the run
            return t.ranks.say(f"step {t.step}/{t.s.steps}  kNN probe left out: {e}")
        t.log.write(t.step, knn=scores)
        t.ranks.say(f"step {t.step}/{t.s.steps}  kNN: " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()))


# ---------------------------------------------------------------- training

def open_data(s: Settings, ranks: Ranks) -> Rows:
    """The rows of the training and held-out splits; for the example, clips synthesised by rank 0."""
    data = s.data
    if not data:
        from weights.make_clips import write_clips

        folder = Path(s.out) / "clips"
        if ranks.rank == 0:
            write_clips(folder)
        if ranks.world > 1:
            dist.barrier()  # the others wait
        data = sorted(map(str, folder.glob("*.jsonl")))
    return Rows(data, answers=True, splits={*s.train_split, s.valid_split}, max_seconds=s.max_seconds)


def read_probe_tasks(s: Settings) -> list:
    from probe import check, manifest_tasks  # probe.py is needed by a run that probes alone

    tasks = manifest_tasks(Rows(s.probe_data))
    for task in tasks:
        check(task, say=lambda text: None)
    return tasks


def make_sampler(s: Settings, rows: Rows, ranks: Ranks) -> Sampler:
    try:
        weights = {k: float(v) for k, v in (w.rsplit("=", 1) for w in s.task_weights)}
    except ValueError:
        raise ValueError(f"--task-weights takes TASK=NUMBER, not {' '.join(s.task_weights)}") from None
    if missing := [split for split in s.train_split if split not in rows.splits]:
        raise ValueError(f"no row has split {missing[0]!r} (--train-split)")
    index = np.concatenate([rows.where(split) for split in s.train_split])
    return Sampler(rows, index, s.batch_seconds, s.seed, s.temperature, weights, ranks.rank, ranks.world)


def update(s: Settings, run, optimizer, scaler, batches, ranks: Ranks):
    """One update from this rank's batches: (gradient norm, [(losses, tokens) of each batch]).

    The loss is divided by the answer tokens (or clips) of all ranks and batches together, so neither changes its
    meaning. A norm that is not finite on one rank is so on all, for the gradients are summed: all leave the weights.
    """
    count = sum(len(b.tasks) if s.loss == "example" else sum(map(len, b.answers)) for b in batches)
    total = ranks.sum(torch.tensor(float(count)).to(ranks.device, non_blocking=True))
    parts = []
    for i, batch in enumerate(batches):
        waiting = ranks.world > 1 and i < len(batches) - 1
        with run.no_sync() if waiting else nullcontext():
            with autocast(s):
                losses, tokens = run(batch.to(ranks.device), per_row=True)
            weight = 1 / tokens.to(ranks.device, non_blocking=True) if s.loss == "example" else 1.0
            loss = (losses * weight).sum() * ranks.world / total  # DDP takes the mean over ranks
            scaler.scale(loss).backward()
        parts.append((losses.detach(), tokens))
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], s.grad_clip).item()
    if math.isfinite(norm):
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm, parts


class Trainer:
    """What a run is made of; `state` and `restore` carry it through a checkpoint."""

    def __init__(self, s: Settings):
        self.s, self.ranks, checkpoint = s, start_ranks(s), newest_checkpoint(s.out)
        found = self.ranks.gather(checkpoint and checkpoint.name)
        if self.ranks.rank == 0 and len(set(found)) > 1:
            raise ValueError(f"{s.out}: the ranks find different checkpoints, {found}; --out must be a folder that all "
                             "machines share")
        if checkpoint and not s.resume:
            raise ValueError(f"{s.out} holds a run already: add --resume to go on with it, or choose another --out")
        if not checkpoint and Path(s.out, "encoder", "config.json").exists():
            raise ValueError(f"{s.out} holds a finished run's encoder, but no checkpoint: "
                             "choose another --out, or remove it")
        if s.resume and not checkpoint:
            self.ranks.say(f"{s.out} has no finished checkpoint yet: starting at step 0")
        self.rows = open_data(s, self.ranks)
        self.probe_tasks = read_probe_tasks(s) if s.probe_data else []
        self.sampler = make_sampler(s, self.rows, self.ranks)
        state = load_state(s, checkpoint, self.ranks, self.rows) if checkpoint else None
        self.model = build_model(s, self.ranks, checkpoint)
        self.optimizer = build_optimizer(s, self.model)
        self.scaler = torch.amp.GradScaler(s.device, enabled=s.precision == "fp16")
        self.step, self.bad = 0, 0  # updates done; updates in a row that were not finite
        self.before = None  # held-out losses before training
        Path(s.out).mkdir(parents=True, exist_ok=True)
        self.log = Log(s, self.ranks, self.rows.tasks, state["step"] if state else 0)
        if state:
            self.restore(state)
        self.batches = Batches(self.rows, self.model.tokenizer, s.seed, s.max_seconds)
        self.held_out = held_out(self.rows, s.valid_split, s.eval_clips, s.batch_seconds, s.seed)

    def state(self) -> dict:
        """All but the weights, gathered on rank 0."""
        ranks, log = self.ranks, self.log
        return dict(step=self.step, bad=self.bad, before=self.before, optimizer=self.optimizer.state_dict(),
                    scaler=self.scaler.state_dict(), sampler=self.sampler.state_dict(),
                    settings=fixed_settings(self.s, ranks, self.rows), sums=ranks.sum(log.sums.clone()).cpu(),
                    seen=ranks.gather(log.seen), random=ranks.gather(rng_state(ranks)))

    def restore(self, state: dict) -> None:
        self.step, self.bad, self.before = state["step"], state["bad"], state["before"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        set_rng_state(state["random"][self.ranks.rank], self.ranks)
        self.sampler.load_state_dict(state["sampler"])
        if self.ranks.rank == 0:  # the sums are those of all ranks
            self.log.sums += state["sums"].to(self.ranks.device)
        self.log.seen = state["seen"][self.ranks.rank]


def train(s: Settings) -> None:
    """A run from its settings, or from its newest checkpoint, to OUT/encoder. Raises OSError, ValueError for bad input,
    ArithmeticError when too many updates in a row are not finite."""
    t = Trainer(s)
    ranks, log = t.ranks, t.log
    # The workers are forked here, before the ranks' first sum: see `evaluate`.
    stream = iter(loader(t.batches, t.sampler, s.workers, ranks.device.type == "cuda"))
    describe_run(t)
    if t.before is None:
        t.before = report(t)
        if s.probe_data:
            probe(t)
    if s.device == "cpu":
        keep_freed_memory()
    run = None
    log.start = log.mark = time.perf_counter()
    while t.step < s.steps:
        if run is None or t.step == s.freeze_encoder:
            run = wrap(s, t.model, ranks, t.step)
        set_rates(s, t.optimizer, t.step)
        batches = [next(stream) for _ in range(s.accumulate)]
        log.count(batches)
        norm, parts = update(s, run, t.optimizer, t.scaler, batches, ranks)
        t.step += 1
        t.sampler.position = t.step * ranks.world * s.accumulate
        if math.isfinite(norm):
            t.bad = 0
            for batch, (losses, tokens) in zip(batches, parts):
                tally(log.sums, t.rows, batch, losses, tokens)
        else:
            t.bad += 1
            report_left_out(t, batches, parts, norm)
        if t.step % s.log_every == 0 or t.step == s.steps:
            log.line(t.step, t.optimizer, norm)
        report_and_save(t)
    if ranks.rank == 0:
        save_encoder(t.model.encoder, Path(s.out) / "encoder", s.encoder)
        ranks.say(f"{s.out}/encoder: the trained encoder, a Hugging Face Whisper folder")
    ranks.leave()


def report_and_save(t: Trainer) -> None:
    """What is due after this step."""
    s, began = t.s, time.perf_counter()
    if t.step % s.eval_every == 0 or t.step == s.steps:
        report(t)
    if s.probe_data and t.step % s.probe_every == 0:
        probe(t)
    # The checkpoint comes last: a run killed before it does this step's reports again,
    # one killed after it has them all.
    if t.step % s.save_every == 0 or t.step == s.steps:
        state = t.state()
        if t.ranks.rank == 0:
            save_checkpoint(s, t.model, state, t.step)
    t.log.mark += time.perf_counter() - began  # reports do not count as training


def describe_run(t: Trainer) -> None:
    """Say what is going to be trained on what, and save it as config.json."""
    millions = lambda part: f"{sum(p.numel() for p in part.parameters()) / 1e6:.1f} M"
    t.ranks.say(f"encoder {millions(t.model.encoder)}, adapter {millions(t.model.adapter)}, "
                f"decoder {millions(t.model.decoder)} (frozen); {len(t.rows)} clips, "
                f"{t.rows.seconds.sum(dtype=float) / 3600:.2f} h, {len(t.rows.tasks)} tasks; "
                f"{t.ranks.world} x {t.s.device}, {t.s.precision}; from step {t.step}")
    if not t.held_out:
        t.ranks.say(f"no row has split {t.s.valid_split!r} (--valid-split): no held-out loss, no questions")
    if t.ranks.rank == 0:
        (Path(t.s.out) / "config.json").write_text(json.dumps(dataclasses.asdict(t.s), indent=2) + "\n")


def report_left_out(t: Trainer, batches, parts, norm: float) -> None:
    """An update was left out: log the rows, of all ranks, whose loss is not finite; if there is none, all rows (in fp16
    none: the loss scale was too large)."""
    finite = [(i, math.isfinite(x)) for b, (losses, _) in zip(batches, parts) for i, x in zip(b.rows, losses.tolist())]
    gathered = t.ranks.gather(finite)
    if t.ranks.rank == 0:
        draws = [draw for part in gathered for draw in part]  # a row may be drawn twice
        bad = [i for i, fine in draws if not fine] or [i for i, _ in draws if t.s.precision != "fp16"]
        names = [t.rows.name(i) for i in dict.fromkeys(bad)]
        print(f"step {t.step}: gradient norm is {norm}, update left out; rows: {', '.join(names) or 'none'}",
              file=sys.stderr, flush=True)
        t.log.write(t.step, non_finite=str(norm), rows=names)
    if t.bad >= BAD_STEPS_IN_A_ROW * (5 if t.s.precision == "fp16" else 1):
        raise ArithmeticError(f"{t.bad} updates in a row were not finite; lower the learning rates or look at the rows "
                              "named above")


def main():
    try:
        train(parse())
    except (OSError, ValueError, ArithmeticError) as e:
        text = str(e)
        if text.startswith("Caught "):
            # in a worker, with its whole traceback: the last line has the error's class and text
            text = text.strip().splitlines()[-1].partition(": ")[2]
        sys.exit(f"error: {text}")
    except torch.OutOfMemoryError as e:  # of a GPU
        sys.exit(f"error: {str(e).splitlines()[0]} Lower --batch-seconds (and raise --accumulate), "
                 "or add --checkpoint-layers")


if __name__ == "__main__":
    main()
