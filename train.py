"""Train an audio encoder through an adapter and a frozen decoder.

    python train.py                                # the embedded example, three minutes
    python train.py --data *.jsonl --encoder whisper-base --decoder qwen --out OUT
    torchrun --nproc-per-node=8 train.py ...       # several GPUs; --nnodes: machines
    python train.py --resume --out OUT             # go on, on CPUs to the same bits

OUT gets config.json, metrics.jsonl, checkpoints/ and, at the end, encoder/.
"""
import fcntl
import itertools
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import zlib
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data import Batches, Rows, held_out, loader, sample_batches, task_shares
from uniwhisper import (UniWhisper, flag, load_decoder, load_encoder, load_strictly,
                        new_adapter, newest_checkpoint, open_run, parse_flags, read_json,
                        read_weights, write_tensors)

HERE = Path(__file__).parent
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Updates left out in a row that end a run; fp16 first has to find its loss scale.
BAD_UPDATES = {"bf16": 5, "fp32": 5, "fp16": 25}


@dataclass(frozen=True)
class Settings:
    # data
    data: tuple[str, ...] = flag((), "manifests (.jsonl) and tars; without: the example")
    train_split: tuple[str, ...] = flag(("train",), "splits to train on; a row without is train")
    valid_split: str = flag("valid", "split whose loss is reported, never trained on")
    max_seconds: float = flag(30.0, "longest clip")
    batch_seconds: float = flag(200.0, "audio seconds in a batch, padding counted")
    accumulate: int = flag(1, "batches in an update, on each rank")
    # assumption: the paper does not say how it mixes tasks
    temperature: float = flag(2.0, "a task of n rows weighs n ** (1 / temperature)")
    task_weights: tuple[str, ...] = flag((), "the mixture instead, as TASK=WEIGHT; no other tasks")
    workers: int = flag(4, "processes that read audio, on each rank; they change no batch")
    # model
    # assumption: the paper names no sizes
    encoder: str = flag("", "folder of the encoder to start from")
    decoder: str = flag("", "folder of the frozen decoder")
    adapter: str = flag("", "run whose adapter to start from; without: a new one")
    stack: int = flag(4, "encoder tokens that the adapter joins into one audio token")
    # optimisation
    # assumption: the paper gives none of these values, nor what the loss is a mean over
    steps: int = flag(10_000, "updates")
    lr_encoder: float = flag(1e-4, "encoder's highest learning rate")
    lr_adapter: float = flag(5e-4, "adapter's highest learning rate")
    warmup: int = flag(100, "updates of linear warm-up; then a cosine to a tenth")
    freeze_encoder: int = flag(0, "first updates, which train the adapter alone")
    weight_decay: float = flag(0.01, "AdamW's, of matrices")
    grad_clip: float = flag(1.0, "largest gradient norm")
    loss: str = flag("token", "mean over an update's answer tokens, or over its clips",
                     choices=("token", "example"))
    precision: str = flag("", "default: bf16 where the device has it, else fp32",
                          choices=tuple(PRECISIONS))
    seed: int = flag(0, "of the adapter, the batches and the instructions")
    # speed and memory
    device: str = flag("", "default: cuda if there is one", choices=("cuda", "cpu"))
    threads: int = flag(0, "CPU threads of this process (0: torch chooses)")
    compile: bool = flag(False, "torch.compile each layer")
    checkpoint_layers: bool = flag(False, "recompute layers in backward: less memory, slower")
    # reports and checkpoints
    out: str = flag("out", "folder of the run; several machines must share it")
    log_every: int = flag(10, "updates between log lines")
    eval_every: int = flag(500, "updates between held-out losses")
    eval_clips: int = flag(64, "held-out clips of each task (0: all)")
    questions: int = flag(3, "held-out questions of each task, answered at the same time")
    save_every: int = flag(500, "updates between checkpoints")
    keep: int = flag(2, "checkpoints kept")
    resume: bool = flag(False, "go on from OUT's newest checkpoint, with OUT's settings")


# What may differ in a resumed run; everything else would change its numbers.
FREE_ON_RESUME = ("resume", "out", "data", "workers", "checkpoint_layers", "steps", "keep",
                  "log_every", "save_every", "eval_every", "eval_clips", "questions")
MAY_BE_0 = ("threads", "workers", "questions", "eval_clips", "warmup", "freeze_encoder",
            "seed", "lr_encoder", "lr_adapter", "weight_decay")
# What `python train.py` alone means.
EXAMPLE = dict(encoder=str(HERE / "weights/tiny/encoder"), out="out/example", steps=600,
               decoder=str(HERE / "weights/tiny/decoder"), batch_seconds=32.0, warmup=20,
               lr_encoder=1e-3, lr_adapter=2e-3, workers=1, threads=1, log_every=25,
               eval_every=300, save_every=300, questions=4)


def parse(argv=None) -> Settings:
    """Command line -> settings. Raises ValueError for what does not fit together."""
    given = parse_flags(Settings, __doc__, argv)
    defaults = {} if "data" in given else EXAMPLE
    saved = Path(given.get("out", EXAMPLE["out"]), "config.json")
    if "resume" in given and saved.is_file():
        known = [f.name for f in fields(Settings)]
        defaults = {k: v for k, v in read_json(saved, "steps").items() if k in known}
    s = Settings(**(defaults | given))
    for name, value in vars(s).items():
        flag_name = "--" + name.replace("_", "-")
        if name in ("encoder", "decoder") and not value:
            raise ValueError(f"--data needs {flag_name}, a folder; see weights/README.md")
        if type(value) in (int, float) and not 0 <= value < math.inf:
            raise ValueError(f"{flag_name} is {value}; it must be 0 or more")
        if type(value) in (int, float) and value == 0 and name not in MAY_BE_0:
            raise ValueError(f"{flag_name} is {value}; it must be above 0")
    if s.valid_split in s.train_split:
        raise ValueError(f"--valid-split {s.valid_split} is also in --train-split")
    device = s.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but there is no GPU that torch can use")
    fast_bf16 = torch.cpu._is_avx512_bf16_supported()
    if device == "cuda":
        fast_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    precision = s.precision or ("bf16" if fast_bf16 else "fp32")
    folders = {k: os.path.abspath(getattr(s, k)) for k in ("out", "encoder", "decoder")}
    return replace(s, device=device, precision=precision, **folders)


# ---------------------------------------------------------------- ranks

def start_ranks(s: Settings) -> None:
    """Join the processes that torchrun started, each with its own GPU if there are any."""
    if s.threads:
        torch.set_num_threads(s.threads)
    if s.device == "cuda":
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"this machine has {gpus} GPUs; lower --nproc-per-node")
        torch.cuda.set_device(local)
        # cuDNN's attention plans anew for every shape; here nearly every batch is new.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if "WORLD_SIZE" in os.environ:
        backend = "cpu:gloo,cuda:nccl" if s.device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=20))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_gather(thing=None) -> list:
    """Every rank's `thing`; it also makes the ranks wait for each other."""
    things = [thing] * world()
    if dist.is_initialized():
        dist.all_gather_object(things, thing)
    return things


def together(make, *inputs):
    """make(*inputs) on every rank; an error of one is raised on all, so none waits for it."""
    result = error = None
    try:
        result = make(*inputs)
    except (OSError, ValueError) as e:
        error = str(e)
    for message in all_gather(error):
        if message is not None:
            raise ValueError(message)
    return result


def say(text: str, file=None) -> None:
    if rank() == 0:
        print(text, file=file, flush=True)


# ---------------------------------------------------------------- model, optimizer, schedule

def build_model(s: Settings, checkpoint: Path | None) -> UniWhisper:
    """Encoder and adapter in float32, from a checkpoint if there is one.

    The decoder is in the compute dtype, so that no step casts its weights.
    """
    torch.manual_seed(s.seed)  # the adapter's start, the same on every rank
    encoder = load_encoder(checkpoint / "encoder" if checkpoint else s.encoder)
    decoder = load_decoder(s.decoder, PRECISIONS[s.precision])
    adapter = new_adapter(encoder, decoder, s.stack)
    start = checkpoint or (s.adapter and open_run(s.adapter)[1])
    if start:
        load_strictly(adapter, read_weights(start / "adapter"), start / "adapter")
    encoder.checkpoint_layers = decoder.checkpoint_layers = s.checkpoint_layers
    if s.compile:
        for layer in [*encoder.layers, *decoder.layers]:
            layer.compile(dynamic=True)  # one graph for all lengths
    return UniWhisper(encoder, adapter, decoder).to(s.device).train()


def build_optimizer(s: Settings, model: UniWhisper, state: dict):
    """AdamW, and the loss scaler that fp16 needs, as they stood in a checkpoint's state.

    Groups "encoder" and "adapter", each twice: matrices, and vectors without decay.
    """
    groups = []
    for name in ("encoder", "adapter"):
        trained = [p for p in getattr(model, name).parameters() if p.requires_grad]
        matrices = [p for p in trained if p.ndim > 1]
        vectors = [p for p in trained if p.ndim < 2]
        groups.append(dict(name=name, params=matrices, weight_decay=s.weight_decay))
        groups.append(dict(name=name, params=vectors, weight_decay=0.0))
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)
    scaler = torch.amp.GradScaler(s.device, enabled=s.precision == "fp16")
    if state["step"]:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    return optimizer, scaler


def learning_rate(s: Settings, name: str, step: int) -> float:
    """Of a parameter group in update `step`, 1 being the first: warm-up, cosine to a tenth.

    The encoder's own warm-up begins when it is no longer frozen.
    """
    highest = s.lr_encoder if name == "encoder" else s.lr_adapter
    first = s.freeze_encoder if name == "encoder" else 0
    warm = min(1.0, max(0.0, (step - first) / max(1, s.warmup)))
    return highest * warm * (0.55 + 0.45 * math.cos(math.pi * (step - 1) / s.steps))


def wrap(s: Settings, model: UniWhisper):
    """DDP around the model where there are several ranks."""
    if world() == 1:
        return model
    # DDP deals the gradients into new buckets after its first step, which in a resumed run
    # is another one. With three ranks or more, gloo's order of adding depends on the
    # buckets; find_unused_parameters keeps them as they are.
    fixed = world() > 2 and s.device == "cpu"
    return DistributedDataParallel(model, gradient_as_bucket_view=True,
                                   find_unused_parameters=fixed)


def autocast(s: Settings):
    return torch.autocast(s.device, PRECISIONS[s.precision], enabled=s.precision != "fp32")


def token_weights(batch, loss: str) -> torch.Tensor:
    """What each answer token (N,) counts: 1; in a mean over clips 1 / its answer's tokens."""
    counts = torch.tensor(batch.answer_tokens)
    weights = 1 / counts if loss == "example" else torch.ones(len(counts))
    return weights.repeat_interleave(counts)


# ---------------------------------------------------------------- checkpoints

def find_checkpoint(s: Settings) -> Path | None:
    """The checkpoint to go on from. Raises ValueError where OUT holds something else."""
    newest = newest_checkpoint(s.out)
    found = set(all_gather(newest and newest.name))
    if len(found) > 1:
        raise ValueError(f"{s.out}: the ranks find different checkpoints, {found}; "
                         "all machines must share --out")
    for name in ("checkpoints", "encoder", "config.json"):
        go_on = s.resume and (newest or name != "encoder")
        if Path(s.out, name).exists() and not go_on:
            raise ValueError(f"{s.out} holds {name} already: choose another --out, or go on "
                             "from its last checkpoint with --resume")
    if s.resume and not newest:
        say(f"{s.out} has no finished checkpoint yet: starting at step 0")
    return newest


def save_checkpoint(s: Settings, model: UniWhisper, state: dict) -> None:
    """Rank 0 writes encoder/ (a Hugging Face folder), adapter/ and trainer.pt.

    Into a folder beside, which is then renamed: one of the final name is whole.
    """
    if rank() > 0:
        return
    folder = Path(s.out) / "checkpoints"
    final = folder / f"step-{state['step']:08d}"
    writing = folder / f".writing-{state['step']:08d}"
    try:
        for stale in folder.glob(".*-*"):
            shutil.rmtree(stale, ignore_errors=True)
        (writing / "adapter").mkdir(parents=True)
        model.encoder.save(writing / "encoder")
        write_tensors(model.adapter.state_dict(), writing / "adapter/model.safetensors")
        torch.save(state, writing / "trainer.pt")
        for path in [*writing.rglob("*"), writing]:
            flush(path)  # else the rename may reach the disk before what it names
        writing.rename(final)
        flush(folder)
    except Exception as e:  # torch.save raises a class of its own when the disk is full
        shutil.rmtree(writing, ignore_errors=True)
        raise OSError(f"cannot save {final}: {e}; make room and --resume from "
                      f"{newest_checkpoint(s.out) or 'the start'}") from e
    for old in sorted(folder.glob("step-" + 8 * "[0-9]"))[: -s.keep]:
        # A file that is in use stays until the next save.
        shutil.rmtree(old.rename(folder / f".old-{old.name}"), ignore_errors=True)


def flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def fixed_settings(s: Settings, rows: Rows) -> dict:
    """All that decides a run's numbers, as plain values; the rows by their checksum."""
    fixed = {k: v for k, v in vars(s).items() if k not in FREE_ON_RESUME}
    checksum = 0
    for column in (rows.seconds, rows.task, rows.split):
        checksum = zlib.crc32(np.ascontiguousarray(column), checksum)
    fixed |= dict(ranks=world(), rows=len(rows), tasks=rows.tasks, splits=rows.splits,
                  checksum=checksum)
    return json.loads(json.dumps(fixed))


def load_state(checkpoint: Path | None, fixed: dict, steps: int) -> dict:
    """A checkpoint's trainer.pt. Raises ValueError if it was made with other settings."""
    if checkpoint is None:
        return dict(step=0, settings=fixed)
    try:
        state = torch.load(checkpoint / "trainer.pt", map_location="cpu")
    except Exception as e:  # torch.load has many classes of errors for a damaged file
        raise ValueError(f"{checkpoint}/trainer.pt is damaged ({str(e).splitlines()[0]}); "
                         f"remove {checkpoint} to resume from the one before") from None
    # A setting that is newer than the checkpoint had its default then.
    then = json.loads(json.dumps(vars(Settings()))) | state["settings"]
    differ = []
    for name, value in fixed.items():
        if then.get(name, value) != value:
            differ.append(f"{name} was {then[name]!r}, is {value!r}")
    if steps < state["step"]:
        differ.append(f"steps is {steps}, below its step")
    if differ:
        raise ValueError(f"--resume of {checkpoint} with other settings: {'; '.join(differ)}; "
                         "use the same, or another --out")
    return state


# ---------------------------------------------------------------- reports

class Log:
    """Losses and unreadable clips since the last line, of this rank; writes metrics.jsonl."""

    def __init__(self, s: Settings, batches: Batches, step: int):
        self.s, self.batches, self.tasks = s, batches, batches.rows.tasks
        self.clips = self.unreadable = 0  # since this process began
        self.bad_updates = 0  # in a row
        self.begin(step)
        self.path = Path(s.out) / "metrics.jsonl"
        if rank() == 0:  # what a killed run wrote after its last checkpoint comes again
            lines = self.path.read_bytes().splitlines(True) if step and self.path.exists() else []
            kept = [x for x in lines if x.endswith(b"\n") and json.loads(x)["step"] <= step]
            self.path.write_bytes(b"".join(kept))

    def begin(self, step: int) -> None:
        self.losses = new_sums(self.s, self.tasks)
        self.seconds, self.skipped = 0.0, Counter()  # of audio; by task
        self.step, self.time = step, time.perf_counter()

    def write(self, step: int, **values) -> None:
        if rank() == 0:
            line = json.dumps({"step": step, **values})
            line = json.loads(line, parse_constant=lambda name: None)  # JSON knows no NaN
            with open(self.path, "a") as f:
                f.write(json.dumps(line) + "\n")

    def read(self, batch) -> None:
        """Count what was read for a batch, and name what could not be."""
        name_skipped(batch)
        self.skipped.update(task for task, _ in batch.skipped)
        self.seconds += batch.samples.sum().item() / self.batches.sample_rate
        self.clips += len(batch.rows) + len(batch.skipped)
        self.unreadable += len(batch.skipped)

    def update(self, parts) -> None:
        """Add the losses of an update's (batch, losses (N,))."""
        self.bad_updates = 0
        for batch, losses in parts:
            add_losses(self.losses, self.batches.rows, batch, losses)

    def bad_update(self, step: int, parts, norm: float) -> None:
        """An update was left out: name the rows, of all ranks, whose loss is not finite.

        Raises ArithmeticError when too many in a row were.
        """
        self.bad_updates += 1
        bad, clips = [], 0
        for batch, losses in parts:
            clips += len(batch.rows)
            for row, loss in zip(batch.rows, losses.split(batch.answer_tokens)):
                if not loss.isfinite().all():
                    bad.append(row)
        if self.s.precision == "fp16" and len(bad) == clips:
            raise ArithmeticError(f"step {step}: no loss is finite: the model overflows in "
                                  "fp16; use --precision bf16")
        bad = itertools.chain(*all_gather(bad))
        names = [self.batches.rows.name(row) for row in dict.fromkeys(bad)]
        self.write(step, non_finite=str(norm), rows=names)
        say(f"step {step}: gradient norm is {norm}, update left out; rows: "
            f"{', '.join(names) or 'none'}", sys.stderr)
        if self.bad_updates == BAD_UPDATES[self.s.precision]:
            raise ArithmeticError(f"{self.bad_updates} updates in a row were not finite; lower "
                                  "the learning rates or look at the rows named above")

    def line(self, step: int, optimizer, norm: float) -> None:
        """Say and write what all ranks did since the last line."""
        loss, tokens = all_sum(self.losses).sum(0).tolist()
        counts = torch.tensor(all_gather((self.seconds, self.clips, self.unreadable)))
        seconds, clips, unreadable = counts.sum(0).tolist()
        passed = time.perf_counter() - self.time
        left = passed / max(1, step - self.step) * (self.s.steps - step)
        values = dict(
            loss=loss / tokens if tokens else math.nan, tasks=means(self.tasks, self.losses),
            lr={group["name"]: group["lr"] for group in optimizer.param_groups}, norm=norm,
            audio_seconds_per_second=seconds / passed, memory_gib=peak_memory(self.s.device),
            skipped=sum(all_gather(self.skipped), Counter()))
        self.write(step, **values)
        say(f"step {step}/{self.s.steps}  loss {values['loss']:.3f}  "
            f"({listed(values['tasks'], '.2f')})  lr {listed(values['lr'], '.1e')}  "
            f"norm {norm:.2f}  {seconds / passed:.1f} s/s  {values['memory_gib']:.1f} GiB  "
            f"left {timedelta(seconds=int(left))}")
        self.begin(step)
        if unreadable > max(10, 0.01 * clips):
            raise ValueError(f"{unreadable:.0f} of {clips:.0f} clips could not be read, over "
                             "1 %; they are named above: repair them or take them out")


def new_sums(s: Settings, tasks: list[str]) -> torch.Tensor:
    """Loss and number of answer tokens of each task: (tasks, 2), on the device."""
    return torch.zeros(len(tasks), 2, dtype=torch.float64, device=s.device)


def add_losses(sums, rows: Rows, batch, losses) -> None:
    """Add losses (N,) of a batch's answer tokens to the sums of their tasks."""
    task = torch.tensor(rows.task[batch.rows].tolist())
    task = task.repeat_interleave(torch.tensor(batch.answer_tokens))
    pairs = torch.stack((losses.double(), torch.ones_like(losses).double()), 1)
    sums.index_add_(0, task.to(sums.device, non_blocking=True), pairs)


def means(tasks: list[str], sums) -> dict[str, float]:
    return {task: loss / n for task, (loss, n) in zip(tasks, sums.tolist()) if n}


def listed(values: dict, how: str) -> str:
    return "  ".join(f"{name} {value:{how}}" for name, value in values.items())


def name_skipped(batch) -> None:
    for _, message in batch.skipped:
        print(f"skipped: {message}", file=sys.stderr, flush=True)


def peak_memory(device: str) -> float:
    """GiB at most so far: of the GPU, or of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@torch.no_grad()
def evaluate(s: Settings, model: UniWhisper, batches: Batches) -> dict[str, float]:
    """Held-out loss of each task, a mean over answer tokens; each rank does its part.

    Without workers: a process forked here, beside a collective's threads, can wait for
    ever for a lock that nobody holds any more (python/cpython#112275).
    """
    rows = batches.rows
    sums = new_sums(s, rows.tasks)
    specs = held_out(rows, s.valid_split, s.eval_clips, s.batch_seconds, s.seed)
    for spec in specs[rank() :: world()]:
        batch = batches[spec]
        name_skipped(batch)
        with autocast(s):
            losses = model(batch.to(s.device))
        add_losses(sums, rows, batch, losses)
    return means(rows.tasks, all_sum(sums))


def ask(s: Settings, model: UniWhisper, batches: Batches) -> list[dict]:
    """Answers to held-out questions, the same each time, beside the truth."""
    answers = []
    for spec in held_out(batches.rows, s.valid_split, s.questions, s.batch_seconds, s.seed):
        batch = batches[spec].to(s.device)
        with autocast(s):
            texts = model.generate(batch.audio, batch.samples, batch.instructions, 48)
        for columns in zip(batch.tasks, batch.instructions, batch.texts, texts):
            answers.append(dict(zip(("task", "instruction", "truth", "answer"), columns)))
    return sorted(answers, key=lambda a: a["task"])


def plain(text: str) -> list[str]:
    """Words, without case and the punctuation at the ends."""
    return text.casefold().strip(" .!?\"'").split()


def report(log: Log, model: UniWhisper, step: int, before: dict) -> dict[str, float]:
    """Held-out losses, beside those before training, and answers to a few questions."""
    s, at, began = log.s, f"step {step}/{log.s.steps}", time.perf_counter()
    losses = evaluate(s, model, log.batches)
    if losses:
        log.write(step, held_out=losses)
        was = {task: f"{loss:.3f} -> " for task, loss in before.items()}
        changes = [f"{task} {was.get(task, '')}{loss:.3f}" for task, loss in losses.items()]
        say(f"{at}  held-out loss: {'  '.join(changes)}")
    if losses and s.questions and rank() == 0:
        answers = ask(s, model, log.batches)
        for a in answers:
            say(f"    {a['task']:14s} {a['instruction'][:40]:40s}  "
                f"truth: {a['truth'][:50]:30s}  answer: {a['answer'][:60]!r}")
        right = sum(plain(a["truth"]) == plain(a["answer"]) for a in answers)
        say(f"{at}  held-out answers right: {right} of {len(answers)}")
        log.write(step, answers=answers, right=right)
    all_gather()  # the others wait for rank 0
    log.time += time.perf_counter() - began  # this is no training time
    return losses


# ---------------------------------------------------------------- training

def open_rows(s: Settings) -> Rows:
    """Rows of the training and held-out splits; for the example, clips made by rank 0."""
    data = s.data
    if not data:
        from weights.make_clips import write_clips

        folder = Path(s.out) / "clips"
        if rank() == 0:
            write_clips(folder)
        all_gather()  # the others wait for rank 0
        data = sorted(map(str, folder.glob("*.jsonl")))
    splits = {*s.train_split, s.valid_split}
    return together(lambda: Rows(data, True, splits, s.max_seconds))


def batch_specs(s: Settings, rows: Rows, step: int):
    """This rank's endless (batch number, row numbers), from those behind update `step` on."""
    weights = {}
    for text in s.task_weights:
        task, _, number = text.rpartition("=")
        try:
            weights[task] = float(number)
        except ValueError:
            raise ValueError(f"--task-weights takes TASK=NUMBER, not {text}") from None
    for split in s.train_split:
        if split not in rows.splits:
            raise ValueError(f"no row has split {split!r} (--train-split)")
    index = np.concatenate([rows.where(split) for split in s.train_split])
    shares = task_shares(rows, index, s.temperature, weights)
    first = step * s.accumulate * world() + rank()
    return sample_batches(rows, index, shares, s.batch_seconds, s.seed, first, world())


def describe(s: Settings, model: UniWhisper, rows: Rows, step: int) -> None:
    """Say what is trained on what, and save the settings as config.json."""
    sizes = []
    for name, part in model.named_children():
        sizes.append(f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:.1f} M")
    hours = rows.seconds.sum(dtype=float) / 3600
    say(f"{', '.join(sizes)} (frozen); {len(rows)} clips, {hours:.2f} h, {len(rows.tasks)} "
        f"tasks; {world()} x {s.device}, {s.precision}; from step {step} to {s.steps}")
    for split, count in rows.split_counts.items():
        use = "held out" if split == s.valid_split else "left out"
        say(f"split {split!r}: {count} rows {'to train on' if split in s.train_split else use}")
    if s.valid_split not in rows.splits:
        say(f"no row has split {s.valid_split!r} (--valid-split): no held-out loss, no questions")
    if s.steps <= s.warmup:
        say(f"note: all {s.steps} updates are warm-up (--warmup {s.warmup})")
    if rank() == 0:
        Path(s.out, "config.json").write_text(json.dumps(vars(s), indent=2) + "\n")


def lock(out):
    """Rank 0 keeps OUT to itself while it lives. Raises ValueError if another run has it."""
    if rank() == 0:
        Path(out).mkdir(parents=True, exist_ok=True)
        file = open(Path(out, ".lock"), "w")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not shared with forked workers
        except OSError:
            raise ValueError(f"another run writes to {out}; choose another --out") from None
        return file


def catch_signals() -> list[int]:
    """A list that Ctrl-C and SIGTERM are put into from here on."""
    caught = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: caught.append(number))
    return caught


def train(s: Settings, model: UniWhisper, log: Log, stream, state: dict) -> bool:
    """All updates after state["step"] -> whether the last was reached, or a signal came.

    stream: this rank's batches.
    """
    optimizer, scaler = build_optimizer(s, model, state)
    wrapped, signals = wrap(s, model), catch_signals()
    if state["step"] == 0:
        state["before"] = report(log, model, 0, {})
    for step in range(state["step"] + 1, s.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(s, group["name"], step)
        micro_batches = [next(stream) for _ in range(s.accumulate)]
        weights = [token_weights(batch, s.loss) for batch in micro_batches]
        # Of all ranks: the number of answer tokens (or clips), and whether to stop.
        totals = torch.tensor([torch.cat(weights).sum(), len(signals)], device=s.device)
        count, stop = all_sum(totals).tolist()
        parts = []
        for batch, weight in zip(micro_batches, weights):
            more = world() > 1 and batch is not micro_batches[-1]
            with wrapped.no_sync() if more else nullcontext():
                with autocast(s):
                    losses = wrapped(batch.to(s.device))  # (N,)
                loss = (losses * weight.to(s.device)).sum() / count
                scaler.scale(loss * world()).backward()  # DDP takes the mean over ranks
            parts.append((batch, losses.detach()))
            log.read(batch)
        if step <= s.freeze_encoder:
            model.encoder.zero_grad()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip).item()
        if math.isfinite(norm):  # on all ranks or on none: they share the summed gradient
            scaler.step(optimizer)
            log.update(parts)
        else:
            log.bad_update(step, parts, norm)
        scaler.update()
        optimizer.zero_grad()
        save = step % s.save_every == 0 or step == s.steps or stop
        if step % s.log_every == 0 or save:
            log.line(step, optimizer, norm)
        if step % s.eval_every == 0 or step == s.steps:
            report(log, model, step, state["before"])
        if save:  # last: a run that is killed before it repeats the reports
            state |= dict(step=step, optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
            together(save_checkpoint, s, model, state)
        if stop:
            return False
    return True


def run(s: Settings) -> None:
    """A run from its settings, or from its newest checkpoint, to OUT/encoder.

    Raises OSError and ValueError for bad input, ArithmeticError when too many updates in a
    row are not finite, InterruptedError after a signal.
    """
    start_ranks(s)
    checkpoint = find_checkpoint(s)
    rows = open_rows(s)
    state = together(load_state, checkpoint, fixed_settings(s, rows), s.steps)
    specs = together(batch_specs, s, rows, state["step"])
    model = together(build_model, s, checkpoint)
    locked = together(lock, s.out)  # until this process ends
    batches = Batches(rows, model.decoder.tokenizer, s.seed, s.max_seconds,
                      model.encoder.sample_rate)
    describe(s, model, rows, state["step"])
    # The workers are forked here, before the ranks' first sum: see `evaluate`.
    stream = iter(loader(batches, specs, s.workers, s.device == "cuda"))
    finished = train(s, model, Log(s, batches, state["step"]), stream, state)
    if finished and rank() == 0:
        model.encoder.save(Path(s.out) / "encoder", s.encoder)
        say(f"{s.out}/encoder: the trained encoder, a Hugging Face folder")
    if dist.is_initialized():
        # Gloo's threads must have freed the last gradients before their group is freed,
        # which holds Python's lock while it waits for them: give them time.
        dist.barrier()
        time.sleep(1)
        dist.destroy_process_group()
    if not finished:
        raise InterruptedError(f"stopped by a signal after step {state['step']}; go on with: "
                               f"python train.py --resume --out {s.out}")


def main():
    """What a user can cause ends in one line and exit code 1."""
    # Batches of many lengths leave gaps in a GPU's memory; must be set before it is used.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        run(parse())
    except torch.OutOfMemoryError as e:  # of a GPU
        sys.exit(f"error: {str(e).splitlines()[0]} Lower --batch-seconds (and raise "
                 "--accumulate), or add --checkpoint-layers")
    except (OSError, ValueError, ArithmeticError, RuntimeError) as e:
        text = str(e).strip()
        if text.startswith("Caught "):
            # in a worker, with its traceback: the last line has the error's class and text
            text = text.splitlines()[-1].partition(": ")[2]
        elif "DataLoader worker" in text or isinstance(e, ConnectionError):
            text = (f"a process that reads audio was killed ({text.splitlines()[0]}), by the "
                    "system if memory was short: lower --workers, and go on with --resume")
        elif "onnection closed" in text or "onnection reset" in text:
            text = f"another rank has ended ({text.splitlines()[0]})"
        elif isinstance(e, RuntimeError):
            raise
        sys.exit(f"error: {text}")


if __name__ == "__main__":
    main()
