"""Train an audio encoder through an adapter and a frozen decoder (or with it).

    python train.py                            # the embedded example, three minutes
    python train.py --data *.jsonl --encoder whisper-base --decoder qwen --out OUT
    torchrun --nproc-per-node=8 train.py ...   # several GPUs; --nnodes: machines
    python train.py --resume --out OUT         # go on; on CPUs, to the same bits

OUT gets config.json, metrics.jsonl, checkpoints/ and, at the end, encoder/ (and decoder/
where --lr-decoder trains it).
"""
import fcntl
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import zlib
from collections import Counter
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data import TRANSLATIONS, Batches, Rows, held_out, loader, sample_batches, task_shares
from uniwhisper import (UniWhisper, decoder_folder, export_run, flag, load_decoder,
                        load_encoder, load_model, new_adapter, newest_checkpoint, open_run,
                        parse_flags, read_json, write_tensors)

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Updates left out in a row that end a run; fp16 first has to find its loss scale.
BAD_UPDATES = {"bf16": 5, "fp32": 5, "fp16": 25}


@dataclass(frozen=True)
class Settings:
    # data
    data: tuple[str, ...] = flag((), "manifests and tars; without: the example")
    train_split: tuple[str, ...] = flag(("train",), "splits to train on")
    valid_split: str = flag("valid", "split of the held-out losses and questions")
    max_seconds: float = flag(30.0, "a longer clip is an error")
    batch_seconds: float = flag(200.0, "audio seconds in a batch, padding counted")
    accumulate: int = flag(1, "batches in an update, on each rank")
    # assumption: the paper does not say how it mixes tasks
    temperature: float = flag(2.0, "a task of n rows weighs n ** (1 / temperature)")
    task_weights: tuple[str, ...] = flag((), "or each task's weight, as TASK=WEIGHT")
    languages: tuple[str, ...] = flag((), "to ask in, beside English, drawn for each clip",
                                      choices=tuple(TRANSLATIONS))
    workers: int = flag(4, "processes that read audio, on each rank")
    # model
    # assumption: the paper names no sizes
    encoder: str = flag("", "folder of the encoder to start from")
    decoder: str = flag("", "folder of the decoder: Qwen, or a whole Whisper")
    adapter: str = flag("", "run whose adapter to start from; without: a new one")
    words: tuple[str, ...] = flag((), "tasks that Whisper's own decoder, frozen, must also "
                                  "transcribe; their rows need a language")
    stack: int = flag(4, "encoder tokens that the adapter makes one audio token; "
                      "0: no adapter, between equal widths")
    # optimisation
    # assumption: the paper gives none of these values, nor what the loss is a mean over
    steps: int = flag(10_000, "updates")
    lr_encoder: float = flag(1e-4, "encoder's highest learning rate")
    lr_adapter: float = flag(5e-4, "adapter's highest learning rate")
    lr_decoder: float = flag(0.0, "decoder's highest learning rate; 0: frozen")
    warmup: int = flag(100, "updates of linear warm-up; then a cosine to a tenth")
    freeze_encoder: int = flag(0, "first updates, which train the adapter alone")
    words_weight: float = flag(5.0, "of the loss of --words; --decoder's has 1")
    weight_decay: float = flag(0.01, "AdamW's, of matrices")
    grad_clip: float = flag(1.0, "largest gradient norm")
    loss: str = flag("token", "mean over an update's answer tokens, or its clips",
                     choices=("token", "example"))
    precision: str = flag("", "default: bf16 where the device has it, else fp32",
                          choices=tuple(PRECISIONS))
    seed: int = flag(0, "of the adapter, the batches and the instructions")
    # speed and memory
    device: str = flag("", "default: cuda if there is one", choices=("cuda", "cpu"))
    threads: int = flag(0, "CPU threads of this process (0: torch chooses)")
    compile: bool = flag(False, "torch.compile each layer")
    checkpoint_layers: bool = flag(False, "recompute layers in backward: saves memory")
    # reports and checkpoints
    out: str = flag("out", "folder of the run; several machines must share it")
    log_every: int = flag(10, "updates between log lines")
    eval_every: int = flag(500, "updates between held-out losses and questions")
    eval_clips: int = flag(64, "held-out clips of each task (0: all)")
    questions: int = flag(3, "held-out questions of each task")
    save_every: int = flag(500, "updates between checkpoints")
    keep: int = flag(2, "checkpoints kept")
    resume: bool = flag(False, "go on from OUT's newest checkpoint and settings")


# These may differ in a resumed run: `steps` changes the learning rates from there on; `data`
# may have moved, for its rows are compared by a checksum.
FREE_ON_RESUME = ("resume", "out", "data", "workers", "checkpoint_layers", "steps", "keep",
                  "log_every", "save_every", "eval_every", "eval_clips", "questions")
MAY_BE_0 = ("threads", "workers", "questions", "eval_clips", "warmup", "freeze_encoder",
            "seed", "lr_encoder", "lr_adapter", "lr_decoder", "stack", "weight_decay")
# What `python train.py` alone means.
TINY = Path(__file__).parent / "weights/tiny"
EXAMPLE = dict(encoder=str(TINY / "encoder"), decoder=str(TINY / "decoder"),
               out="out/example", steps=600, batch_seconds=32.0, warmup=20,
               lr_encoder=1e-3, lr_adapter=2e-3, workers=1, threads=1, log_every=25,
               eval_every=300, save_every=300, questions=4)


def parse(argv=None) -> Settings:
    """Command line -> settings. Raises ValueError for what cannot work."""
    given = parse_flags(Settings, __doc__, argv)
    defaults = {} if "data" in given else EXAMPLE
    saved = Path(Settings(**(defaults | given)).out, "config.json")
    if "resume" in given and saved.is_file():
        known = [f.name for f in fields(Settings)]
        defaults = {k: v for k, v in read_json(saved, "steps").items() if k in known}
    elif "resume" in given and "data" not in given:
        raise ValueError(f"{saved} is missing: there is no run to resume")
    s = Settings(**(defaults | given))
    for name, value in vars(s).items():
        flag_name = "--" + name.replace("_", "-")
        if name in ("encoder", "decoder") and not value:
            raise ValueError(f"--data needs {flag_name}, a folder; see weights/README.md")
        if type(value) in (int, float):
            if not 0 <= value < math.inf:
                raise ValueError(f"{flag_name} is {value}; it must be 0 or more")
            if value == 0 and name not in MAY_BE_0:
                raise ValueError(f"{flag_name} is 0; it must be above 0")
    if s.valid_split in s.train_split:
        raise ValueError(f"--valid-split {s.valid_split} is also in --train-split")
    if s.freeze_encoder and not s.stack:
        raise ValueError("--stack 0 is no adapter, which --freeze-encoder would train alone")
    gpu = torch.cuda.is_available()
    device = s.device or ("cuda" if gpu else "cpu")
    if device == "cuda" and not gpu:
        raise ValueError("--device is cuda, but there is no GPU that torch can use")
    fast_bf16 = torch.cpu._is_avx512_bf16_supported()
    if device == "cuda":
        fast_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    precision = s.precision or ("bf16" if fast_bf16 else "fp32")
    folders = {k: os.path.abspath(getattr(s, k)) for k in ("out", "encoder", "decoder")}
    return replace(s, device=device, precision=precision, **folders)


# ---------------------------------------------------------------- ranks

def start_ranks(s: Settings) -> None:
    """Join torchrun's processes, each with a GPU of its own."""
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
    """Every rank's `thing`, on every rank; all wait for each other."""
    things = [thing] * world()
    if dist.is_initialized():
        dist.all_gather_object(things, thing)
    return things


def on_all_ranks(make, *inputs):
    """make(*inputs) on every rank.

    One rank's OSError or ValueError is raised on all: none waits for it.
    """
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
    """What trains in float32; a frozen decoder in the compute dtype."""
    torch.manual_seed(s.seed)  # a new adapter is the same on every rank
    encoder, decoder, start = s.encoder, s.decoder, checkpoint
    if checkpoint:
        encoder, decoder = checkpoint / "encoder", decoder_folder(vars(s), checkpoint)
    elif s.adapter:
        start = open_run(s.adapter)[1]
    adapter = start and start / "adapter"
    dtype = torch.float32 if s.lr_decoder else PRECISIONS[s.precision]
    model = load_model(encoder, decoder, s.stack, adapter, dtype)
    model.decoder.requires_grad_(s.lr_decoder > 0)
    for part in (model.encoder, model.decoder):
        set_up_layers(s, part)
    return model.to(s.device).train()


def set_up_layers(s: Settings, part) -> None:
    """Of an encoder or a decoder: recomputed in backward, compiled."""
    part.checkpoint_layers = s.checkpoint_layers
    if s.compile:
        for layer in part.layers:
            layer.compile(dynamic=True)  # one graph for all lengths


def build_optimizer(s: Settings, model: UniWhisper, state: dict):
    """AdamW and fp16's loss scaler, as they were at state["step"]."""
    groups = []  # of each part that trains: matrices, and vectors, which do not decay
    for name, part in model.named_children():
        trained = [p for p in part.parameters() if p.requires_grad]
        if not trained:
            continue
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
    """Of a parameter group in update `step` (from 1): warm-up, cosine to a tenth.

    The encoder's and the decoder's begin when the adapter no longer trains alone.
    """
    highest = getattr(s, f"lr_{name}")
    first = 0 if name == "adapter" else s.freeze_encoder
    warm = min(1.0, max(0.0, (step - first) / max(1, s.warmup)))
    return highest * warm * (0.55 + 0.45 * math.cos(math.pi * (step - 1) / s.steps))


def wrap(s: Settings, model: UniWhisper):
    """DDP around the model where there are several ranks."""
    if world() == 1:
        return model
    # DDP regroups the gradients into buckets after the first step of a process. Gloo's sums
    # over more than two ranks depend on the grouping, so a resumed run would differ in the
    # last bits. find_unused_parameters keeps the first grouping.
    fixed = world() > 2 and s.device == "cpu"
    return DistributedDataParallel(model, gradient_as_bucket_view=True,
                                   find_unused_parameters=fixed)


def autocast(s: Settings):
    half = s.precision != "fp32"
    return torch.autocast(s.device, PRECISIONS[s.precision], enabled=half)


def token_weights(batch, loss: str) -> torch.Tensor:
    """What each answer token (N,) counts: 1, or 1 / its answer's tokens."""
    counts = torch.tensor(batch.answer_tokens)
    weights = 1 / counts if loss == "example" else torch.ones(len(counts))
    return weights.repeat_interleave(counts)


def weighted_sum(s: Settings, batch, losses):
    """Of losses (N,) of a batch's answer tokens."""
    return (losses * token_weights(batch, s.loss).to(s.device)).sum()


# ---------------------------------------------------------------- what keeps speech

class WordsLoss:
    """The loss of --words: Whisper's own decoder, frozen, also transcribes clips of these tasks.

    It keeps the encoder readable for that decoder, and is added to a batch's own loss once
    the encoder trains. In every fourth update the clips are padded with silence to the
    window, as in Whisper's training, so that code which pads to 30 s can still use the
    encoder. As windows are costly, only a few clips are taken then, and their loss is
    scaled up to all.
    """

    def __init__(self, s: Settings, rows: Rows, encoder):
        self.s = s
        self.window = encoder.window * encoder.token_samples
        self.most_windows = max(1, int(s.batch_seconds * encoder.sample_rate / self.window))
        self.parts = []  # what was read: (batch, losses (N,)) of each micro-batch
        if s.words:
            decoder = load_decoder(s.encoder, PRECISIONS[s.precision]).to(s.device)
            set_up_layers(s, decoder)
            self.reader = UniWhisper(encoder, new_adapter(encoder, decoder, 0), decoder)
            self.check(rows)

    def check(self, rows: Rows) -> None:
        """ValueError for a row that Whisper cannot read: its language, or too long a text."""
        decoder, index = self.reader.decoder, training_rows(self.s, rows)
        for task in self.s.words:
            of_task = index[rows.task[index] == rows.tasks.index(task)]
            for i in of_task[rank() :: world()].tolist():
                row = rows[i]
                try:
                    prompt = decoder.tokenizer.transcription(row.get("language", ""))
                    decoder.check_length(len(prompt + decoder.tokenizer.answer(row["answer"])) - 1)
                except ValueError as e:
                    raise ValueError(f"{rows.name(i)}: {e} (--words)") from None

    def loss(self, batch, step: int):
        """The sum over a batch's clips of these tasks, weighted like the batch's own loss."""
        clips = [i for i, task in enumerate(batch.tasks) if task in self.s.words]
        if not clips or step <= self.s.freeze_encoder:
            return 0.0
        padded, chosen = step % 4 == 0, clips
        if padded:
            count = min(self.most_windows, len(clips))
            chosen = sorted(random.Random(step).sample(clips, count))
        read = self.as_its_decoder_reads(batch, chosen, padded)
        losses = self.reader(read)  # (N,)
        self.parts.append((read, losses.detach()))
        share = len(clips) / len(chosen)
        return share * self.s.words_weight * weighted_sum(self.s, read, losses)

    def as_its_decoder_reads(self, batch, clips: list[int], padded: bool):
        """Some clips of a batch, with the prompts and answers of Whisper's tokenizer."""
        tokenizer, samples = self.reader.decoder.tokenizer, batch.samples[clips]
        return replace(
            batch, rows=[batch.rows[i] for i in clips],
            audio=batch.audio[clips, : int(samples.max())],
            samples=torch.full_like(samples, self.window) if padded else samples,
            prompts=[tokenizer.transcription(batch.languages[i]) for i in clips],
            answers=[tokenizer.answer(batch.texts[i]) for i in clips])


# ---------------------------------------------------------------- checkpoints

def find_checkpoint(s: Settings) -> Path | None:
    """The checkpoint to go on from; ValueError if OUT holds anything else."""
    newest = newest_checkpoint(s.out)
    if len(set(all_gather(newest and newest.name))) > 1:
        raise ValueError(f"{s.out}: not the same on all ranks; machines must share --out")
    must_be_new = ("checkpoints", "encoder", "decoder", "config.json")
    if s.resume:  # but a model that no checkpoint explains is not overwritten
        must_be_new = () if newest else ("encoder", "decoder")
    for name in must_be_new:
        if Path(s.out, name).exists():
            raise ValueError(f"{s.out} holds {name} already: choose another --out, "
                             "or go on with --resume")
    if s.resume and not newest:
        say(f"{s.out} has no finished checkpoint yet: starting at step 0")
    return newest


def save_checkpoint(s: Settings, model: UniWhisper, state: dict) -> None:
    """Rank 0 writes encoder/, adapter/, a trained decoder/ and trainer.pt: `state`.

    state: the step, the settings, the held-out losses before training,
    the states of the optimizer and the loss scaler.
    Seed and step decide the batches.
    Only a whole folder gets the final name.
    """
    if rank() > 0:
        return
    folder = Path(s.out) / "checkpoints"
    final = folder / f"step-{state['step']:08d}"
    writing = folder / f".writing-{state['step']:08d}"
    try:
        for stale in folder.glob(".*-*"):  # .writing-N and .old-step-N
            shutil.rmtree(stale, ignore_errors=True)
        (writing / "adapter").mkdir(parents=True)
        model.encoder.save(writing / "encoder")
        write_tensors(model.adapter.state_dict(), writing / "adapter/model.safetensors")
        if s.lr_decoder:
            model.decoder.save(writing / "decoder", s.decoder)
        torch.save(state, writing / "trainer.pt")
        for path in [*writing.rglob("*"), writing]:
            fsync(path)  # else the rename may reach the disk before what it names
        writing.rename(final)
        fsync(folder)
    except Exception as e:  # torch.save has a class of its own for a full disk
        shutil.rmtree(writing, ignore_errors=True)
        last = newest_checkpoint(s.out) or "the start"
        raise OSError(f"cannot save {final}: {e}; make room and --resume from {last}") from e
    for old in sorted(folder.glob("step-" + 8 * "[0-9]"))[: -s.keep]:
        # Files in use stay until the next save.
        shutil.rmtree(old.rename(folder / f".old-{old.name}"), ignore_errors=True)


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def fixed_settings(s: Settings, rows: Rows) -> dict:
    """What decides a run's numbers, as JSON; the rows by their checksum."""
    checksum = 0
    for column in (rows.seconds, rows.text_bytes, rows.task, rows.split):
        checksum = zlib.crc32(np.ascontiguousarray(column), checksum)
    fixed = vars(s) | dict(ranks=world(), rows=len(rows), checksum=checksum,
                           tasks=rows.tasks, splits=rows.splits)
    for name in FREE_ON_RESUME:
        del fixed[name]
    return json.loads(json.dumps(fixed))


def load_state(checkpoint: Path | None, fixed: dict, steps: int) -> dict:
    """A checkpoint's trainer.pt; ValueError if settings or rows differ from its own."""
    if checkpoint is None:
        return dict(step=0, settings=fixed)
    try:
        state = torch.load(checkpoint / "trainer.pt", map_location="cpu")
    except Exception as e:  # many classes, for a damaged file
        raise ValueError(f"{checkpoint}/trainer.pt is damaged ({str(e).splitlines()[0]}); "
                         "remove the folder to resume from the one before") from None
    # A checkpoint from before a setting existed ran with its default.
    then = json.loads(json.dumps(vars(Settings()))) | state["settings"]
    differ = []
    for name, value in fixed.items():
        if then.get(name, value) != value:
            differ.append(f"{name} was {then[name]!r}, is {value!r}")
    if steps < state["step"]:
        differ.append(f"steps is {steps}, below its step")
    if differ:
        raise ValueError(f"{checkpoint} does not fit: {'; '.join(differ)}; "
                         "use its settings, or another --out")
    return state


# ---------------------------------------------------------------- reports

class Log:
    """Counts what this rank did since the last line and writes metrics.jsonl.

    Raises when too many updates are not finite, or too many clips cannot be read.
    """

    def __init__(self, s: Settings, batches: Batches, step: int):
        self.s, self.batches = s, batches
        self.all_clips = self.unreadable = 0  # of all ranks, since this process began
        self.bad_updates = 0  # in a row
        self.begin(step)
        self.path = Path(s.out) / "metrics.jsonl"
        if rank() == 0:
            lines = []
            if step and self.path.exists():
                lines = self.path.read_bytes().splitlines(True)
            # Updates after the checkpoint are made, and logged, again.
            kept = [x for x in lines if x.endswith(b"\n") and json.loads(x)["step"] <= step]
            self.path.write_bytes(b"".join(kept))

    def begin(self, step: int) -> None:
        self.losses = new_sums(self.s, self.batches.rows)
        self.words = new_sums(self.s, self.batches.rows)
        self.clips, self.seconds, self.skipped = 0, 0.0, Counter()
        self.step, self.time = step, time.perf_counter()

    def write(self, step: int, **values) -> None:
        if rank() == 0:
            line = json.dumps({"step": step, **values})
            line = json.loads(line, parse_constant=lambda name: None)  # JSON knows no NaN
            with open(self.path, "a") as f:
                f.write(json.dumps(line) + "\n")

    def update(self, step: int, parts, word_parts, norm: float) -> None:
        """Count an update: its (batch, losses (N,)), those of --words, the gradient's norm."""
        self.bad_updates = 0 if math.isfinite(norm) else self.bad_updates + 1
        for batch, losses in parts:
            print_skipped(batch)
            self.skipped.update(task for task, _ in batch.skipped)
            self.clips += len(batch.rows) + len(batch.skipped)
            self.seconds += batch.samples.sum().item() / self.batches.sample_rate
            if not self.bad_updates:
                add_losses(self.losses, self.batches.rows, batch, losses)
        if self.bad_updates:
            return self.bad_update(step, parts + word_parts, norm)
        for batch, losses in word_parts:
            add_losses(self.words, self.batches.rows, batch, losses)

    def bad_update(self, step: int, parts, norm: float) -> None:
        """Name the rows, of all ranks, whose loss is not finite.

        Raises ArithmeticError when too many updates in a row were left out.
        """
        bad, clips = [], 0
        for batch, losses in parts:
            clips += len(batch.rows)
            for row, loss in zip(batch.rows, losses.split(batch.answer_tokens)):
                if not loss.isfinite().all():
                    bad.append(row)
        gathered = all_gather((bad, clips))
        bad = [row for rows, _ in gathered for row in rows]
        if self.s.precision == "fp16" and len(bad) == sum(n for _, n in gathered):
            raise ArithmeticError("no loss is finite: the model overflows in fp16; "
                                  "use --precision bf16")
        names = [self.batches.rows.name(row) for row in dict.fromkeys(bad)]
        self.write(step, non_finite=str(norm), rows=names)
        say(f"step {step}: gradient norm is {norm}, update left out; rows: "
            f"{', '.join(names) or 'none'}", sys.stderr)
        if self.bad_updates == BAD_UPDATES[self.s.precision]:
            raise ArithmeticError(f"{self.bad_updates} updates in a row were not finite; "
                                  "lower the learning rates or mend the rows above")

    def line(self, step: int, optimizer, norm: float) -> None:
        """Say and write what all ranks did since the last line.

        loss (and words, of --words) is a mean over answer tokens, with --loss example, too;
        memory is rank 0's.
        """
        tasks = means(self.batches.rows, all_sum(self.losses))
        loss, tokens = self.losses.sum(0)
        loss = (loss / tokens).item()  # NaN if no update took place
        skipped = sum(all_gather(self.skipped), Counter())
        passed = time.perf_counter() - self.time
        speed = sum(all_gather(self.seconds)) / passed
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if self.s.device == "cuda":
            memory = torch.cuda.max_memory_allocated() / 2**30
        lr = {group["name"]: group["lr"] for group in optimizer.param_groups}
        words, word_tokens = all_sum(self.words).sum(0)
        of_words = {"words": (words / word_tokens).item()} if self.s.words else {}
        self.write(step, loss=loss, **of_words, tasks=tasks, lr=lr, norm=norm, skipped=skipped,
                   audio_seconds_per_second=speed, memory_gib=memory)
        left = passed / max(1, step - self.step) * (self.s.steps - step)
        say(f"step {step}/{self.s.steps}  loss {loss:.3f}  norm {norm:.2f}  {speed:.1f} s/s  "
            f"{memory:.1f} GiB  left {timedelta(seconds=int(left))}")
        self.all_clips += sum(all_gather(self.clips))
        self.unreadable += skipped.total()
        self.begin(step)
        if self.unreadable > max(10, 0.01 * self.all_clips):
            raise ValueError(f"{self.unreadable} of {self.all_clips} clips could not be "
                             "read, over 1 %: repair or remove those named above")


def new_sums(s: Settings, rows: Rows) -> torch.Tensor:
    """Sum and number of the answer tokens' losses of each task: (tasks, 2)."""
    return torch.zeros(len(rows.tasks), 2, dtype=torch.float64, device=s.device)


def add_losses(sums, rows: Rows, batch, losses) -> None:
    """Add losses (N,) of a batch's answer tokens to the sums of their tasks."""
    task = torch.tensor(rows.task[batch.rows].tolist())
    task = task.repeat_interleave(torch.tensor(batch.answer_tokens))
    losses = losses.double()
    pairs = torch.stack((losses, torch.ones_like(losses)), 1)
    sums.index_add_(0, task.to(sums.device, non_blocking=True), pairs)


def means(rows: Rows, sums) -> dict[str, float]:
    return {task: loss / n for task, (loss, n) in zip(rows.tasks, sums.tolist()) if n}


def print_skipped(batch) -> None:
    for _, message in batch.skipped:
        print(f"skipped: {message}", file=sys.stderr, flush=True)


@torch.no_grad()
def evaluate(s: Settings, model: UniWhisper, batches: Batches) -> dict[str, float]:
    """Each task's held-out loss, a mean over its answer tokens."""
    rows = batches.rows
    sums = new_sums(s, rows)
    specs = held_out(rows, s.valid_split, s.eval_clips, s.batch_seconds, s.seed)
    # Read here, not in workers: a process that is forked beside a collective's threads
    # can hang (python/cpython#112275).
    for spec in specs[rank() :: world()]:
        batch = batches[spec]
        print_skipped(batch)
        with autocast(s):
            losses = model(batch.to(s.device))
        add_losses(sums, rows, batch, losses)
    return means(rows, all_sum(sums))


def ask(s: Settings, model: UniWhisper, batches: Batches) -> list[dict]:
    """Answers to held-out questions, the same each time, beside the truth."""
    answers = []
    rows = batches.rows
    for spec in held_out(rows, s.valid_split, s.questions, s.batch_seconds, s.seed):
        batch = batches[spec].to(s.device)
        with autocast(s):
            texts = model.generate(batch.audio, batch.samples, batch.instructions, 48)
        for columns in zip(batch.tasks, batch.instructions, batch.texts, texts):
            answers.append(dict(zip(("task", "instruction", "truth", "answer"), columns)))
    return sorted(answers, key=lambda a: a["task"])


def normalize(text: str) -> list[str]:
    """Words, without case and the punctuation at the ends."""
    return text.casefold().strip(" .!?\"'").split()


def report(log: Log, model: UniWhisper, step: int, before: dict) -> dict[str, float]:
    """Say and log held-out losses, and answers to a few questions."""
    s, at, began = log.s, f"step {step}/{log.s.steps}", time.perf_counter()
    losses = evaluate(s, model, log.batches)
    if losses:
        log.write(step, held_out=losses)
        said = ""
        for task, loss in losses.items():
            was = f"{before[task]:.3f} -> " if task in before else ""
            said += f"  {task} {was}{loss:.3f}"
        say(f"{at}  held-out loss:{said[1:]}")
    if losses and s.questions and rank() == 0:
        answers, right = ask(s, model, log.batches), 0
        for a in answers:
            say(f"    {a['task']:14s} {a['instruction'][:40]:40s}  "
                f"truth: {a['truth'][:50]:30s}  answer: {a['answer'][:60]!r}")
            right += normalize(a["truth"]) == normalize(a["answer"])
        say(f"{at}  held-out answers right: {right} of {len(answers)}")
        log.write(step, answers=answers, right=right)
    all_gather()  # the others wait for rank 0
    log.time += time.perf_counter() - began  # this is no training time
    return losses


# ---------------------------------------------------------------- training

def open_rows(s: Settings) -> Rows:
    """Rows of the splits in use; the example's clips are made by rank 0."""
    data = s.data
    if not data:
        from weights.make_clips import write_clips

        folder = Path(s.out) / "clips"
        if rank() == 0:
            write_clips(folder)
        all_gather()  # the others wait for rank 0
        data = sorted(map(str, folder.glob("*.jsonl")))
    return on_all_ranks(Rows, data, True, {*s.train_split, s.valid_split}, s.max_seconds)


def training_rows(s: Settings, rows: Rows) -> np.ndarray:
    """Numbers of the rows to train on."""
    for split in s.train_split:
        if split not in rows.splits:
            raise ValueError(f"no row has split {split!r} (--train-split)")
    return np.concatenate([rows.where(split) for split in s.train_split])


def batch_specs(s: Settings, rows: Rows, step: int):
    """This rank's endless (batch number, row numbers) after `step`."""
    weights = {}
    for text in s.task_weights:
        task, _, number = text.rpartition("=")
        try:
            weights[task] = float(number)
        except ValueError:
            raise ValueError(f"--task-weights takes TASK=NUMBER, not {text}") from None
    index = training_rows(s, rows)
    shares = task_shares(rows, index, s.temperature, weights)
    for task in s.words:
        if task not in [rows.tasks[number] for number in shares]:
            raise ValueError(f"--words: no row to train on has task {task!r}, "
                             "or its weight is 0")
    first = step * s.accumulate * world() + rank()
    return sample_batches(rows, index, shares, s.batch_seconds, s.seed, first, world())


def describe(s: Settings, model: UniWhisper, rows: Rows, step: int) -> dict:
    """Say what is trained on what; write config.json and return what it holds."""
    sizes = []
    for name, part in model.named_children():
        sizes.append(f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:.1f} M")
    if not s.lr_decoder:
        sizes[-1] += " (frozen)"
    splits = (*s.train_split, s.valid_split)
    used = np.concatenate([rows.where(split) for split in splits])
    hours = rows.seconds[used].sum(dtype=float) / 3600
    say(f"{', '.join(sizes)}; {len(used)} clips, {hours:.2f} h, {len(rows.tasks)} "
        f"tasks; {world()} x {s.device}, {s.precision}; from step {step} to {s.steps}")
    for split, count in rows.split_counts.items():
        use = "held out" if split == s.valid_split else "left out"
        if split in s.train_split:
            use = "to train on"
        say(f"split {split!r}: {count} rows {use}")
    if s.valid_split not in rows.splits:
        say(f"no row has split {s.valid_split!r} (--valid-split): no held-out loss")
    if s.steps <= s.warmup:
        say(f"note: all {s.steps} updates are warm-up (--warmup {s.warmup})")
    index = training_rows(s, rows)
    tasks = Counter(rows.tasks[task] for task in rows.task[index].tolist())
    others = sorted(set(tasks) - set(TRANSLATIONS["de"]))  # all languages have the same tasks
    if s.languages and others:
        say(f"asked in English alone (TRANSLATIONS in data.py): {', '.join(others)}")
    config = vars(s) | dict(tasks=tasks, hours=rows.seconds[index].sum(dtype=float) / 3600)
    if rank() == 0:
        Path(s.out, "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return config


def lock(out):
    """Rank 0 keeps OUT to itself; ValueError if another run has it."""
    if rank() == 0:
        Path(out).mkdir(parents=True, exist_ok=True)
        file = open(Path(out, ".lock"), "w")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by workers
        except OSError:
            raise ValueError(f"another run writes to {out}; choose another --out") from None
        return file


def catch_signals() -> list[int]:
    """A list that Ctrl-C and SIGTERM are put into from here on.

    The processes that read audio ignore Ctrl-C.
    """
    caught = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: caught.append(number))
    return caught


def backward(s: Settings, wrapped, words: WordsLoss, micro_batches, scaler, count, step):
    """Add up an update's gradients -> (batch, losses (N,)) of each micro-batch.

    count: the update's answer tokens (or clips), of all ranks.
    """
    parts = []
    words.parts.clear()
    for batch in micro_batches:
        # DDP averages the gradients over ranks, in the last backward alone.
        wrapped.require_backward_grad_sync = batch is micro_batches[-1]
        batch = batch.to(s.device)
        with autocast(s):
            losses = wrapped(batch)  # (N,)
            loss = weighted_sum(s, batch, losses) + words.loss(batch, step)
        scaler.scale(loss / count * world()).backward()  # world: DDP averages
        parts.append((batch, losses.detach()))
    return parts


def train(s: Settings, model: UniWhisper, words: WordsLoss, log: Log, stream, state) -> bool:
    """Updates after state["step"]; False if a signal ended them. stream: batches."""
    optimizer, scaler = build_optimizer(s, model, state)
    wrapped, signals = wrap(s, model), catch_signals()
    if state["step"] == 0:
        state["before"] = report(log, model, 0, {})
    for step in range(state["step"] + 1, s.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(s, group["name"], step)
        micro_batches = [next(stream) for _ in range(s.accumulate)]
        weights = torch.cat([token_weights(batch, s.loss) for batch in micro_batches])
        # Of all ranks: the number of answer tokens (or clips), and whether to stop.
        totals = torch.tensor([weights.sum(), len(signals)], device=s.device)
        count, stop = all_sum(totals).tolist()
        parts = backward(s, wrapped, words, micro_batches, scaler, count, step)
        if step <= s.freeze_encoder:
            model.encoder.zero_grad()
            model.decoder.zero_grad()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip).item()
        if math.isfinite(norm):  # all ranks have the same gradient, so all skip or none
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        log.update(step, parts, words.parts, norm)
        save = step % s.save_every == 0 or step == s.steps or stop
        if step % s.log_every == 0 or save:
            log.line(step, optimizer, norm)
        if step % s.eval_every == 0 or step == s.steps:
            report(log, model, step, state["before"])
        if save:  # after the reports: if killed before, a resumed run makes them again
            state |= dict(step=step, optimizer=optimizer.state_dict(),
                          scaler=scaler.state_dict())
            on_all_ranks(save_checkpoint, s, model, state)
        if stop and step < s.steps:
            return False
    return True


def run(s: Settings) -> None:
    """A run, from its start or its newest checkpoint, to OUT/encoder.

    Raises OSError and ValueError for bad input, ArithmeticError if too many updates are
    not finite, InterruptedError after a signal.
    """
    start_ranks(s)
    checkpoint = find_checkpoint(s)
    rows = open_rows(s)
    state = on_all_ranks(load_state, checkpoint, fixed_settings(s, rows), s.steps)
    specs = on_all_ranks(batch_specs, s, rows, state["step"])
    model = on_all_ranks(build_model, s, checkpoint)
    words = on_all_ranks(WordsLoss, s, rows, model.encoder)
    locked = on_all_ranks(lock, s.out)  # until this process ends
    how = rows, model.decoder.tokenizer, model.encoder.sample_rate, s.seed, s.max_seconds
    batches = Batches(*how, s.languages)
    in_english = Batches(*how)  # for held-out losses and questions, which Log makes
    config = describe(s, model, rows, state["step"])
    # Readers are forked here, before gradients are summed: see `evaluate`.
    stream = iter(loader(batches, specs, s.workers, s.device == "cuda"))
    finished = train(s, model, words, Log(s, in_english, state["step"]), stream, state)
    if finished and rank() == 0:
        decoder = model.decoder if s.lr_decoder else None
        export_run(Path(s.out, "encoder"), Path(s.out, "decoder"), config, model.encoder, decoder)
        say(f"{s.out}/encoder: the trained encoder, a Hugging Face folder")
    if dist.is_initialized():
        # Destroying the group holds Python's lock and waits for gloo's threads, which
        # need it to free the last gradients: give them time.
        dist.barrier()
        time.sleep(1)
        dist.destroy_process_group()
    if not finished:
        raise InterruptedError(f"stopped by a signal after step {state['step']}; go on "
                               f"with: python train.py --resume --out {s.out}")


def main():
    """What a user can cause ends in one line and exit code 1."""
    # Batches of many lengths leave gaps in a GPU's memory; to be set before its first use.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names that are not UTF-8
    try:
        run(parse())
    except torch.OutOfMemoryError as e:  # of a GPU
        sys.exit(f"error: {str(e).splitlines()[0]} Lower --batch-seconds (and raise "
                 "--accumulate), or add --checkpoint-layers")
    except (OSError, ValueError, ArithmeticError, RuntimeError, EOFError) as e:
        text = str(e).strip() or type(e).__name__
        first, last = text.partition("\n")[0], text.rpartition("\n")[2]
        if text.startswith("Caught "):  # a worker's traceback: "...Class: text"
            text = last.partition(": ")[2]
        elif "DataLoader worker" in text or isinstance(e, (ConnectionError, EOFError)):
            text = (f"a process that reads audio was killed ({first}), by the system if "
                    "memory was short: lower --workers, and go on with --resume")
        elif re.search("connection (closed|reset)", text.lower()):
            text = f"another rank has ended ({first})"
        elif isinstance(e, RuntimeError):
            raise
        sys.exit(f"error: {text}")


if __name__ == "__main__":
    main()
