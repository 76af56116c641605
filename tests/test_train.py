"""train.py: accumulation, ranks, exact resume, frozen parts, guards, reports, errors;
all tiny, on the CPU.

A run here is the real command line in a process of its own, forked from a server that has
imported torch already.
"""
import faulthandler
import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo  # a run's optimizer would import it: 1.5 s
from conftest import RATE, joint_model, make_tokenizer, tone, write_clip, write_manifest
from safetensors.torch import load_file, save_file

import train
from data import TEMPLATES, Batches, Rows
from uniwhisper import export, load_decoder, load_encoder, load_run

HERE = Path(__file__).resolve().parent
STEPS, FROZEN = 12, 3
TIMEOUT = 120  # seconds
FORKS = multiprocessing.get_context("forkserver")


# ---------------------------------------------------------------- data and runs

def make_rows(folder, task, answers, sounds, clips, **more):
    rows = []
    for split, count in clips.items():
        for i in range(count):
            draw = np.random.default_rng([len(task), len(split), i])
            path = f"clips/{task}-{split}-{i}.wav"
            write_clip(folder / path, sounds[i % 2](draw, draw.uniform(0.3, 1.0)),
                       16_000 if i % 3 else 8_000)
            rows.append(dict(audio=path, answer=answers[i % 2], label=answers[i % 2], task=task,
                             split=split, **more))
    return rows


@pytest.fixture(scope="module")
def world(tmp_path_factory, whisper, qwen):
    """Weights and a manifest of three tasks with two answers each;
    one task takes its instructions from the templates."""
    folder = tmp_path_factory.mktemp("world")
    sine = lambda hertz: lambda draw, seconds: tone(seconds, hertz * draw.uniform(0.9, 1.1))
    hiss = lambda level: lambda draw, seconds: (
        draw.normal(0, level, int(16_000 * seconds)).astype(np.float32))
    clips = {"train": 16, "valid": 4, "test": 4}
    rows = (make_rows(folder, "height", ["low", "high"], [sine(300), sine(2500)], clips,
                      instruction="How high?")
            + make_rows(folder, "sound_event", ["a tone", "noise"], [sine(700), hiss(0.1)], clips)
            + make_rows(folder, "level", ["soft", "loud"], [hiss(0.02), hiss(0.3)], clips,
                        instruction="How loud?"))
    return SimpleNamespace(folder=folder, rows=rows,
                           data=write_manifest(folder / "all.jsonl", rows),
                           encoder=str(whisper[0]), decoder=str(qwen[0]))


def options(world, out, **changes) -> list[str]:
    """The command line of the tests' usual run, with changes (None leaves a flag out)."""
    settings = dict(data=world.data, encoder=world.encoder, decoder=world.decoder, out=out,
                    precision="fp32", device="cpu", steps=STEPS, freeze_encoder=FROZEN, warmup=2,
                    batch_seconds=5, workers=0, log_every=2, save_every=3, eval_every=6, keep=10,
                    questions=2) | changes
    flags = []
    for name, value in settings.items():
        if value is not None and value is not False:
            values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
            flags += ["--" + name.replace("_", "-"), *map(str, values)]
    return flags


def run_here(argv, log, patch, environment):
    """In the new process: the command line, its output in files."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    faulthandler.dump_traceback_later(TIMEOUT - 10)  # where it hangs, should it hang
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = ["train.py", *argv]
    patch()
    train.main()


class Run:
    """One `python train.py ...`; `patch` is called before it in its process."""

    def __init__(self, argv, patch=dict, **environment):
        self.log = f"{argv[argv.index('--out') + 1]}-{environment.get('RANK', 0)}"
        self.process = FORKS.Process(target=run_here, args=(argv, self.log, patch, environment))
        self.process.start()

    def wait(self) -> "Run":
        self.process.join(TIMEOUT)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.code = self.process.exitcode
        self.out, self.err = (Path(f"{self.log}.{name}").read_text() for name in ("out", "err"))
        return self

    def fail(self) -> str:
        """Its error: one line, and nothing else."""
        self.wait()
        assert self.code == 1 and "Traceback" not in self.err
        return one_line(self.err.splitlines()[-1])


def succeed(*runs: Run) -> Run:
    """Wait for runs that are to end well; returns the first."""
    for run in runs:
        run.wait()
    assert not any(run.code for run in runs), "\n".join(
        f"exit code {run.code}\n{run.err}" for run in runs)
    return runs[0]


def start_ranks(argv, patch=dict, n=2) -> list[Run]:
    """Ranks, as torchrun starts them; the patch is rank 0's."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    return [Run(argv, patch if rank == 0 else dict, RANK=str(rank), LOCAL_RANK=str(rank),
                WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            for rank in range(n)]


@pytest.fixture(scope="module", autouse=True)
def fork_server():
    """Imports this file once; PYTHONPATH lets it, and one thread makes its processes equal."""
    before = dict(os.environ)
    os.environ.update(PYTHONPATH=os.pathsep.join([str(HERE), str(HERE.parent)]),
                      OMP_NUM_THREADS="1")
    FORKS.set_forkserver_preload([__name__])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(before)


def one_line(text: str) -> str:
    assert text.startswith("error: ") and "\n" not in text
    return text


def error(capsys, *argv) -> str:
    """The one line with which the command line ends, here in this process."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["train.py", *argv])
        train.main()
    return one_line(end.value.code)


def metrics(out) -> list[dict]:
    """metrics.jsonl without what the clock and the machine decide."""
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("audio_seconds_per_second", "memory_gib")}
            for line in lines]


def step_folder(out, step) -> Path:
    return Path(out, "checkpoints", f"step-{step:08d}")


def weights(out, step) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in step_folder(out, step).glob("*/model.safetensors"):
        tensors |= load_file(path)
    return tensors


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def assert_same_run(a, b, step=STEPS):
    assert same_bits(weights(a, step), weights(b, step))
    one, two = (torch.load(step_folder(out, step) / "trainer.pt")["optimizer"]["state"]
                for out in (a, b))
    assert one.keys() == two.keys() and all(same_bits(one[k], two[k]) for k in one)
    assert metrics(a) == metrics(b)


def assert_close_runs(a, b, step):
    """Up to float32's rounding, which Adam lets show where a gradient is nearly 0."""
    start, one, two = weights(a, 1), weights(a, step), weights(b, step)
    for k in one:
        moved = (one[k] - start[k]).abs().mean()
        assert (one[k] - two[k]).abs().mean() <= 1e-3 * moved, k
    for x, y in zip(metrics(a), metrics(b), strict=True):
        assert x.keys() == y.keys() and x["step"] == y["step"]
        if "loss" in x:
            assert (x["loss"] == pytest.approx(y["loss"], rel=1e-5)
                    and x["norm"] == pytest.approx(y["norm"], rel=1e-4))
            assert x["tasks"] == pytest.approx(y["tasks"], rel=1e-5)


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    """The usual run, from beginning to end."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    return SimpleNamespace(out=out, said=succeed(Run(options(world, out))).out)


# ---------------------------------------------------------------- one update

def gradient(world, out, loss, sizes, checkpoint_layers=False):
    """Minus the gradient of one update on the same 12 clips, of all tasks, in batches of
    these sizes: what plain SGD subtracts."""
    s = train.parse(options(world, out, loss=loss, grad_clip=1e9, freeze_encoder=0,
                            checkpoint_layers=checkpoint_layers, steps=1, accumulate=len(sizes),
                            eval_clips=1, questions=0))
    out.mkdir()
    rows = Rows(world.data, answers=True)
    model = train.build_model(s, None)
    batches = Batches(rows, model.decoder.tokenizer, RATE)
    first = itertools.accumulate(sizes, initial=0)
    specs = [(0, list(range(5 * start, 5 * (start + size), 5)))
             for start, size in zip(first, sizes)]
    before = {k: p.detach().clone() for k, p in model.named_parameters()}

    def plain_sgd(s, model, state):
        trained = [p for p in model.parameters() if p.requires_grad]
        return (torch.optim.SGD([dict(params=trained, name="all")], lr=1.0),
                torch.amp.GradScaler("cpu", enabled=False))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_optimizer", plain_sgd)
        patch.setattr(train, "learning_rate", lambda *a: 1.0)
        patch.setattr(train, "save_checkpoint", lambda *a: None)
        patch.setattr(signal, "signal", lambda *a: None)
        log = train.Log(s, batches, 0)
        train.train(s, model, log, map(batches.__getitem__, specs), dict(step=0))
    line = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()][-2]
    moved = {k: p.detach() - before[k] for k, p in model.named_parameters() if p.requires_grad}
    return moved, line["tasks"], line["norm"]


@pytest.mark.parametrize("loss", ["token", "example"])
def test_accumulation_equals_one_large_batch(world, tmp_path, loss):
    whole, losses, norm = gradient(world, tmp_path / "one", loss, [12])
    parts, losses_of_parts, norm_of_parts = gradient(world, tmp_path / "three", loss, [2, 7, 3])
    assert (losses == pytest.approx(losses_of_parts, rel=1e-5)
            and norm == pytest.approx(norm_of_parts, rel=1e-5))
    for k in whole:
        assert (whole[k] - parts[k]).abs().max() <= 1e-5 * whole[k].abs().max() + 1e-7, k


def test_the_two_losses_differ_where_answers_have_different_lengths(world, tmp_path):
    token, example = (gradient(world, tmp_path / loss, loss, [12])[0]["adapter.fc2.weight"]
                      for loss in ("token", "example"))
    assert (token - example).abs().max() > 1e-3 * token.abs().max()


def test_a_token_counts_as_its_loss_says():
    batch = SimpleNamespace(answers=[[1, 2, 3, 4], [5], [6, 7]], answer_tokens=[4, 1, 2])
    assert train.token_weights(batch, "token").tolist() == [1] * 7
    assert train.token_weights(batch, "example").tolist() == [0.25] * 4 + [1] + [0.5] * 2


def test_checkpointed_layers_give_the_same_gradient(world, tmp_path):
    plain, losses, _ = gradient(world, tmp_path / "a", "token", [12])
    again, losses_again, _ = gradient(world, tmp_path / "b", "token", [12], checkpoint_layers=True)
    assert losses == losses_again and same_bits(plain, again)


def test_the_decoder_never_trains(world):
    s = train.parse(options(world, "unused", freeze_encoder=0))
    model = train.build_model(s, None)
    optimizer, _ = train.build_optimizer(s, model, dict(step=0))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = {id(p) for part in (model.encoder, model.adapter) for p in part.parameters()
               if p.requires_grad}
    assert held == trained and id(model.encoder.embed_positions.weight) not in held
    assert not held & {id(p) for p in model.decoder.parameters()}
    assert model.training and not any(m.training for m in model.decoder.modules())
    train.wrap(s, model)(
        Batches(Rows(world.data), model.decoder.tokenizer, RATE)[0, [0, 1]]).sum().backward()
    assert all(p.grad is None for p in model.decoder.parameters())
    assert {id(p) for p in model.parameters() if p.grad is not None} == trained


def test_matrices_decay_and_vectors_do_not(world):
    s = train.parse(options(world, "unused"))
    optimizer, _ = train.build_optimizer(s, train.build_model(s, None), dict(step=0))
    for group in optimizer.param_groups:
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] == s.weight_decay}
    assert [g["name"] for g in optimizer.param_groups] == ["encoder"] * 2 + ["adapter"] * 2


def test_schedule():
    s = train.Settings(steps=100, warmup=10, freeze_encoder=20, lr_encoder=1.0, lr_adapter=2.0)

    def rates(step):
        return train.learning_rate(s, "encoder", step), train.learning_rate(s, "adapter", step)

    assert rates(1) == pytest.approx((0, 0.2))  # a tenth of the warm-up
    assert rates(10)[1] == pytest.approx(2 * (0.55 + 0.45 * np.cos(np.pi * 0.09)))  # warm
    assert rates(20)[0] == 0 and 0 < rates(21)[0] < rates(30)[0]  # the encoder's own warm-up
    assert rates(51) == pytest.approx((0.55, 1.1)) and rates(101) == pytest.approx((0.1, 0.2))


# ---------------------------------------------------------------- a whole run

def test_config_and_metrics(undisturbed, world):
    config = json.loads((undisturbed.out / "config.json").read_text())
    assert (config["steps"] == STEPS and config["encoder"] == world.encoder
            and config["data"] == [world.data])
    lines = [json.loads(line)
             for line in (undisturbed.out / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    # every second, and each checkpoint
    assert [line["step"] for line in logged] == [2, 3, 4, 6, 8, 9, 10, 12]
    for line in logged:
        assert line.keys() == {"step", "loss", "tasks", "norm", "lr", "audio_seconds_per_second",
                               "memory_gib", "skipped"}
        assert line["tasks"].keys() <= {"height", "sound_event", "level"} and not line["skipped"]
        assert all(0 < x < 100 for x in (line["loss"], line["norm"], line["memory_gib"],
                                         *line["tasks"].values()))
        assert line["audio_seconds_per_second"] > 0 and line["lr"].keys() == {"encoder", "adapter"}
        assert min(line["tasks"].values()) <= line["loss"] <= max(line["tasks"].values())
    for key in ("held_out", "answers"):
        assert [line["step"] for line in lines if key in line] == [0, 6, 12]
    tasks = ["height"] * 2 + ["level"] * 2 + ["sound_event"] * 2
    assert all([a["task"] for a in line["answers"]] == tasks for line in lines if "answers" in line)
    assert f"step {STEPS}/{STEPS}" in undisturbed.said and "left 0:00:00" in undisturbed.said


def test_the_encoder_loads_in_transformers(undisturbed, world, whisper):
    from transformers import WhisperModel

    model, report = WhisperModel.from_pretrained(undisturbed.out / "encoder",
                                                 output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    final = weights(undisturbed.out, STEPS)
    assert all(torch.equal(final[f"model.encoder.{k}"], v)
               for k, v in model.encoder.state_dict().items())
    assert all(torch.equal(whisper[1].decoder.state_dict()[k], v)
               for k, v in model.decoder.state_dict().items())


def test_load_run_reads_the_newest_checkpoint(undisturbed):
    model = load_run(undisturbed.out)
    assert torch.equal(model.adapter.fc2.weight, weights(undisturbed.out, STEPS)["fc2.weight"])


def test_the_encoder_is_frozen_and_let_go(undisturbed, world):
    start = {f"model.encoder.{k}": v
             for k, v in joint_model(world.encoder, world.decoder).encoder.state_dict().items()}
    frozen, free, last = (weights(undisturbed.out, step) for step in (FROZEN, 6, STEPS))
    assert all(torch.equal(frozen[k], v) for k, v in start.items())
    assert not torch.equal(frozen["fc2.weight"], last["fc2.weight"])
    for k in start:
        assert torch.equal(start[k], last[k]) == ("embed_positions" in k), k
        assert torch.equal(start[k], free[k]) == ("embed_positions" in k), k
    adapter = len([k for k in frozen if k.startswith(("norm.", "fc1.", "fc2."))])
    states = [
        len(torch.load(step_folder(undisturbed.out, step) / "trainer.pt")["optimizer"]["state"])
        for step in (FROZEN, 6)]
    assert states == [adapter, adapter + len(start) - 1]


def test_bf16_and_the_other_options_run(world, tmp_path):
    succeed(Run(options(world, tmp_path / "run", precision="bf16", loss="example",
                        checkpoint_layers=True, steps=2, workers=1,
                        task_weights=["height=1", "level=3"])))
    lines = metrics(tmp_path / "run")
    assert all(line["tasks"].keys() <= {"height", "level"} for line in lines if "loss" in line)


# ---------------------------------------------------------------- ranks

def test_torchrun_equals_one_process(world, tmp_path):
    same = dict(steps=5, freeze_encoder=2, save_every=1, log_every=1)
    argv = options(world, tmp_path / "two", **same, workers=1)
    one = Run(options(world, tmp_path / "one", **same, accumulate=2))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               HERE.parent / "train.py"]
    two = subprocess.run([*command, *argv], capture_output=True, text=True, timeout=300)
    assert two.returncode == 0, two.stderr
    assert "Warning" not in two.stderr.replace("OMP_NUM_THREADS", "")
    succeed(one)
    assert_close_runs(tmp_path / "one", tmp_path / "two", 5)


def test_ranks_with_the_example_loss_resume_exactly(world, tmp_path):
    """Three, for a + b is b + a, but (a + b) + c is not a + (b + c)."""
    same = dict(steps=4, freeze_encoder=0, save_every=1, log_every=1, loss="example")
    one = Run(options(world, tmp_path / "one", **same, accumulate=6))
    succeed(one, *start_ranks(options(world, tmp_path / "three", **same, accumulate=2), n=3))
    assert_close_runs(tmp_path / "one", tmp_path / "three", 4)

    argv = options(world, tmp_path / "killed", **same, accumulate=2)
    main, *others = start_ranks(argv, partial(kill_in_save, 3), n=3)
    assert main.wait().code == -signal.SIGKILL
    for other in others:
        other.process.kill()  # as torchrun does
    succeed(*start_ranks([*argv, "--resume"], n=3))
    assert_same_run(tmp_path / "three", tmp_path / "killed", 4)


def two_agents(argv, other_argv, **environment):
    """Two torchrun agents of one rank each, as on two machines -> what they print to stderr."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
               "--master-addr=127.0.0.1", f"--master-port={port}"]
    agents = [subprocess.Popen([*command, f"--node-rank={i}", HERE.parent / "train.py", *more],
                               text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                               env=os.environ | environment)
              for i, more in enumerate((argv, other_argv))]
    return agents


def test_a_fault_of_one_rank_at_the_start_ends_all(world, tmp_path):
    argv = options(world, tmp_path / "run")
    other = options(world, tmp_path / "run", data=write_manifest(tmp_path / "bad.jsonl", ["{"]))
    one, other = two_agents(argv, other)
    assert "bad.jsonl: needs one JSON object a line" in other.communicate(timeout=60)[1]
    assert "Connection" in one.communicate(timeout=60)[1]
    assert one.returncode and other.returncode and not (tmp_path / "run").exists()


def test_when_one_rank_dies_all_end_within_a_minute(world, tmp_path):
    argv = options(world, tmp_path / "run", steps=100_000, save_every=100_000, eval_every=100_000)
    one, other = two_agents(argv, argv)
    while (not (tmp_path / "run/metrics.jsonl").exists()
           or "loss" not in (tmp_path / "run/metrics.jsonl").read_text()):
        assert one.poll() is None and other.poll() is None
        time.sleep(0.2)
    children = Path(f"/proc/{other.pid}/task/{other.pid}/children").read_text().split()
    began = time.monotonic()
    os.kill(int(children[0]), signal.SIGKILL)
    said = one.communicate(timeout=60)[1]
    other.communicate(timeout=60)
    assert one.returncode and other.returncode and time.monotonic() - began < 60
    assert "onnection closed" in said or "onnection reset" in said


def test_cudnns_attention_is_kept_out(monkeypatch):
    """It plans anew for every shape."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        train.start_ranks(train.Settings(device="cuda"))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


# ---------------------------------------------------------------- killed and resumed

def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_update(call):
    """Between backward and the optimizer's step of the `call`-th update."""
    real, calls = torch.nn.utils.clip_grad_norm_, itertools.count(1)
    torch.nn.utils.clip_grad_norm_ = lambda *args: kill() if next(calls) == call else real(*args)


def kill_in_save(call):
    """While the `call`-th checkpoint is being written: half of trainer.pt is there."""
    real, calls = torch.save, itertools.count(1)

    def save(state, path, **how):
        real(state, path, **how)
        if isinstance(path, Path) and next(calls) == call:  # else it is a message between ranks
            os.truncate(path, os.path.getsize(path) // 2)
            kill()

    torch.save = save


def kill_in_cleanup():
    """Just after a checkpoint got its name, while the oldest is being removed."""
    real = shutil.rmtree
    shutil.rmtree = lambda path, **how: (
        kill() if Path(path).name.startswith("step-") else real(path, **how))


def test_killed_anywhere_and_resumed_a_run_ends_with_the_same_bits(world, tmp_path, undisturbed):
    out = tmp_path / "run"
    argv = options(world, out, keep=1)
    names = lambda: sorted(p.name for p in (out / "checkpoints").glob("*"))

    def killed(patch, *more) -> str:
        run = Run([*argv, *more], patch).wait()
        assert run.code == -signal.SIGKILL, run.err
        return run.out

    killed(partial(kill_in_update, 2))
    assert names() == []
    assert "from step 0" in killed(partial(kill_in_save, 2), "--resume")
    # the encoder's first free step is next
    assert names() == [".writing", "step-00000003"]
    assert "from step 3" in killed(kill_in_cleanup, "--resume", "--workers", "2")
    assert names() == ["step-00000003", "step-00000006"]
    assert "from step 6" in killed(partial(kill_in_update, 2), "--resume")
    with open(out / "metrics.jsonl", "a") as f:
        f.write('{"step": 8, "tasks": {"a": 1}')  # a line that the kill cut short
    assert "from step 6" in succeed(Run([*argv, "--resume"])).out
    assert names() == ["step-00000012"]
    assert_same_run(undisturbed.out, out)
    final = "encoder/model.safetensors"
    assert (out / final).read_bytes() == (undisturbed.out / final).read_bytes()

    succeed(Run([*argv, "--resume"]))  # a finished run ends again as it did
    assert_same_run(undisturbed.out, out)


# ---------------------------------------------------------------- another encoder

def test_clap_trains_resumes_exactly_and_is_exported(world, clap, tmp_path):
    from transformers import ClapModel

    whole, killed, half = tmp_path / "whole", tmp_path / "killed", tmp_path / "half"
    same = dict(encoder=clap[0], stack=2, freeze_encoder=0, steps=4, save_every=2, eval_clips=1,
                questions=1)
    run = Run(options(world, whole, **same))
    argv = options(world, killed, **same)
    assert Run(argv, partial(kill_in_update, 3)).wait().code == -signal.SIGKILL
    assert "from step 2" in succeed(Run([*argv, "--resume"]), run).out
    assert_same_run(whole, killed, 4)
    start, trained = load_encoder(clap[0]), load_run(whole).encoder
    for name, p in trained.named_parameters():
        assert not torch.equal(p, start.get_parameter(name)), name
    for name, b in trained.named_buffers():  # BatchNorm's statistics, for one
        assert torch.equal(b, start.get_buffer(name)), name
    export(SimpleNamespace(run=whole, folder=half, blend=0.5))
    for folder, share in ((whole / "encoder", 1.0), (half, 0.5)):
        theirs, report = ClapModel.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        for name, p in theirs.audio_model.named_parameters():
            between = torch.lerp(start.get_parameter(name), trained.get_parameter(name), share)
            assert torch.allclose(p, between, rtol=0, atol=1e-7), name
        assert same_bits(theirs.text_model.state_dict(), clap[1].text_model.state_dict())


# ------------------------------------------------------------- other decoders, and those that train

def moved(module, start) -> set[str]:
    before = start.state_dict()
    return {k.partition(".")[0] for k, v in module.state_dict().items()
            if not torch.equal(v, before[k])}


@pytest.mark.parametrize("rate", [0, 1e-3])
def test_whispers_decoder_without_adapter_trains_or_not_and_resumes_exactly(
        world, talking_whisper, tmp_path, rate):
    from transformers import WhisperForConditionalGeneration

    folder = str(talking_whisper[0])
    same = dict(encoder=folder, decoder=folder, stack=0, lr_decoder=rate, freeze_encoder=0, steps=6)
    whole = Run(options(world, tmp_path / "whole", **same))
    argv = options(world, tmp_path / "killed", **same)
    assert Run(argv, partial(kill_in_update, 5)).wait().code == -signal.SIGKILL
    assert "from step 3" in succeed(Run([*argv, "--resume"]), whole).out
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 6)
    assert ("(frozen)" in whole.out) == (rate == 0)
    assert step_folder(tmp_path / "whole", 6).joinpath("decoder").exists() == (rate > 0)
    start, model = load_decoder(folder), load_run(tmp_path / "whole")
    parts = {"embed_tokens", "lm_head", "embed_positions", "layers", "layer_norm"}
    assert moved(model.decoder, start) == (parts if rate else set())
    assert not list(model.adapter.parameters()) and model.encoder.width == model.decoder.width
    folder = tmp_path / "whole/encoder"
    theirs, report = WhisperForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for k, v in theirs.model.decoder.state_dict().items():
        assert torch.equal(v, model.decoder.state_dict()[k]), k
    for k, v in theirs.model.encoder.state_dict().items():
        assert torch.equal(v, model.encoder.state_dict()[k]), k


def test_a_trained_qwen_is_saved_and_exported_by_itself(world, tmp_path):
    from transformers import Qwen2ForCausalLM, WhisperModel

    same = dict(lr_decoder=1e-3, freeze_encoder=3, save_every=1, steps=6)
    whole = Run(options(world, tmp_path / "whole", **same))
    argv = options(world, tmp_path / "killed", **same)
    assert Run(argv, partial(kill_in_save, 5)).wait().code == -signal.SIGKILL
    succeed(Run([*argv, "--resume"]), whole)
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 6)
    start, out = load_decoder(world.decoder), tmp_path / "whole"
    # the adapter trained alone
    assert not moved(load_decoder(step_folder(out, 3) / "decoder"), start)
    trained = load_run(out).decoder
    assert moved(trained, start) == {"embed_tokens", "lm_head", "layers", "norm"}
    assert trained.lm_head.weight is trained.embed_tokens.weight
    theirs, ours = Qwen2ForCausalLM.from_pretrained(out / "decoder"), load_decoder(out / "decoder")
    assert torch.equal(theirs.lm_head.weight, trained.lm_head.weight) and not moved(ours, trained)
    its, before = (WhisperModel.from_pretrained(f).decoder.state_dict()
                   for f in (out / "encoder", world.encoder))
    assert same_bits(its, before)


def test_a_decoder_that_trains_has_a_group_and_float32_weights(world, talking_whisper):
    s = train.parse(options(world, "unused", decoder=talking_whisper[0], precision="bf16",
                            lr_decoder=1.0, steps=100, warmup=10, freeze_encoder=20))
    model = train.build_model(s, None)
    optimizer, _ = train.build_optimizer(s, model, dict(step=0))
    assert [g["name"] for g in optimizer.param_groups] == (
        ["encoder"] * 2 + ["adapter"] * 2 + ["decoder"] * 2)
    held = {id(p) for g in optimizer.param_groups[4:] for p in g["params"]}
    assert held == {id(p) for p in model.decoder.parameters()}
    assert {p.dtype for p in model.decoder.parameters()} == {torch.float32}
    assert train.learning_rate(s, "decoder", 20) == 0 < train.learning_rate(s, "decoder", 21)
    frozen = train.build_model(train.replace(s, lr_decoder=0.0), None)
    assert {p.dtype for p in frozen.decoder.parameters()} == {torch.bfloat16}


def test_ranks_train_a_decoder_as_one_process_does(world, talking_whisper, tmp_path):
    folder = str(talking_whisper[0])
    same = dict(encoder=folder, decoder=folder, stack=0, lr_decoder=1e-3, freeze_encoder=0,
                steps=3, save_every=1, log_every=1)
    one = Run(options(world, tmp_path / "one", **same, accumulate=2))
    succeed(one, *start_ranks(options(world, tmp_path / "two", **same)))
    assert_close_runs(tmp_path / "one", tmp_path / "two", 3)


# ------------------------------------------------------- stopped, lengthened, started from another

def signal_in_update(number, call):
    """As from outside, between backward and the optimizer's step of the `call`-th update."""
    real, calls = torch.nn.utils.clip_grad_norm_, itertools.count(1)

    def clip(*args):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return real(*args)

    torch.nn.utils.clip_grad_norm_ = clip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_a_run_saves_the_update_and_says_how_to_go_on(
        world, tmp_path, undisturbed, number):
    out = tmp_path / "run"
    text = Run(options(world, out, workers=1), partial(signal_in_update, number, 4)).fail()
    assert text == ("error: stopped by a signal after step 5; "
                    f"go on with: python train.py --resume --out {out}")
    assert step_folder(out, 5).is_dir() and not (out / "encoder").exists()
    succeed(Run(["--resume", "--out", str(out)]))  # with OUT's own settings
    assert same_bits(weights(undisturbed.out, STEPS), weights(out, STEPS))


def test_a_signal_in_the_last_update_does_not_hold_up_the_end(world, tmp_path, undisturbed):
    succeed(Run(options(world, tmp_path / "run"), partial(signal_in_update, signal.SIGTERM, STEPS)))
    assert same_bits(weights(undisturbed.out, STEPS), weights(tmp_path / "run", STEPS))
    assert (tmp_path / "run/encoder/config.json").is_file()


def test_ranks_stop_together(world, tmp_path):
    one, other = start_ranks(options(world, tmp_path / "run"),
                             partial(signal_in_update, signal.SIGTERM, 2))
    assert ("stopped by a signal after step 3" in one.fail()
            and "stopped by a signal after step 3" in other.fail())


def test_a_run_can_be_lengthened(undisturbed, world, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(undisturbed.out, out)
    said = succeed(Run(["--resume", "--out", str(out), "--steps", "14"])).out
    assert "from step 12 to 14" in said and "step 14/14" in said and step_folder(out, 14).is_dir()
    assert json.loads((out / "config.json").read_text())["steps"] == 14
    assert "steps is 5, below its step" in Run(
        ["--resume", "--out", str(out), "--steps", "5"]).fail()


def test_a_new_run_can_start_from_another_runs_adapter(undisturbed, world, tmp_path):
    s = train.parse(options(world, tmp_path / "run", adapter=step_folder(undisturbed.out, STEPS) / "adapter"))
    model, trained = train.build_model(s, None), weights(undisturbed.out, STEPS)
    assert all(torch.equal(trained[k], v) for k, v in model.adapter.state_dict().items())
    start = joint_model(world.encoder, world.decoder).encoder.state_dict()
    assert all(torch.equal(start[k], v) for k, v in model.encoder.state_dict().items())


def limit_file_size(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_no_room_for_a_checkpoint(world, tmp_path, undisturbed):
    sizes = [(step_folder(undisturbed.out, 6) / name).stat().st_size
             for name in ("encoder/model.safetensors", "trainer.pt")]
    argv = options(world, tmp_path / "run")
    # once the encoder's moments come in, it is too much
    text = Run(argv, partial(limit_file_size, sum(sizes) // 2)).fail()
    assert "cannot save" in text and "step-00000006; is the disk full?" in text
    assert {p.name for p in (tmp_path / "run/checkpoints").iterdir()} == {".writing", "step-00000003"}
    succeed(Run([*argv, "--resume"]))
    assert_same_run(undisturbed.out, tmp_path / "run")
    text = Run(options(world, tmp_path / "none"), partial(limit_file_size, 20_000)).fail()
    assert "cannot save" in text


def test_no_room_for_the_encoder(undisturbed, world, tmp_path):
    shutil.copytree(undisturbed.out, tmp_path / "run")
    size = (undisturbed.out / "encoder/model.safetensors").stat().st_size
    assert "run/encoder" in Run(options(world, tmp_path / "run", resume=True),
                                partial(limit_file_size, size // 2)).fail()


def test_resume_looks_in_the_folder_that_the_run_writes_to(world, tmp_path, monkeypatch, capsys):
    """With --data the default is out, without it the example's."""
    monkeypatch.chdir(tmp_path)
    models = {"encoder": str(world.encoder), "decoder": str(world.decoder)}
    for folder, seed in (("out", 5), ("out/example", 7)):
        Path(folder).mkdir()
        Path(folder, "config.json").write_text(json.dumps({"steps": 9, "seed": seed, **models}))
    s = train.parse(options(world, None, resume=True))
    assert s.out == str(tmp_path / "out") and s.seed == 5
    assert train.parse(["--resume"]).seed == 7
    assert "gone/config.json is missing" in error(
        capsys, "--resume", "--out", "gone")


def test_resume_wants_the_same_settings(undisturbed, world, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(undisturbed.out, out)
    assert "holds checkpoints already" in error(capsys, *options(world, out))
    text = error(capsys, *options(world, out, resume=True, lr_encoder=0.5, seed=3))
    assert "lr_encoder was 0.0001, is 0.5" in text and "seed was 0, is 3" in text
    fewer = write_manifest(world.folder / "fewer.jsonl", world.rows[1:])
    assert "rows was 60, is 59" in error(capsys, *options(world, out, resume=True, data=fewer))
    # other numbers for the same rows
    turned = write_manifest(world.folder / "turned.jsonl", world.rows[::-1])
    assert "checksum was " in error(capsys, *options(world, out, resume=True, data=turned))
    swap = {"train": "valid", "valid": "train"}
    swapped = write_manifest(world.folder / "swap.jsonl",
                             [r | {"split": swap.get(r["split"], "test")} for r in world.rows])
    assert "splits was " in error(capsys, *options(world, out, resume=True, data=swapped))
    trainer = step_folder(out, STEPS) / "trainer.pt"
    os.truncate(trainer, 1000)
    assert f"{trainer} is damaged" in error(capsys, *options(world, out, resume=True))


def tell_instructions():
    """A run's patch: each update prints what it asks."""
    weights = train.token_weights

    def tell(batch, loss):
        for text in batch.instructions:
            print("asked:", text)
        return weights(batch, loss)

    train.token_weights = tell


def test_other_languages_ask_in_training_alone(undisturbed, world, tmp_path, capsys):
    out = tmp_path / "run"
    said = succeed(Run(options(world, out, languages=["de", "ru"], steps=6), tell_instructions)).out
    asked = {line.removeprefix("asked: ") for line in said.splitlines()
             if line.startswith("asked: ")}
    assert asked == {"How high?", "How loud?", "Was ist zu hören?", "Что слышно?",
                     *TEMPLATES["sound_event"]}
    usual = metrics(undisturbed.out)
    assert metrics(out)[:2] == usual[:2]  # held-out losses and answers before training
    questions = [[a["instruction"] for a in line["answers"]] for line in metrics(out)
                 if "answers" in line]
    assert questions == [[a["instruction"] for a in usual[1]["answers"]]] * 2
    text = error(capsys, *options(world, out, resume=True, languages=["ru"], steps=6))
    assert "languages was ['de', 'ru'], is ['ru']" in text


def test_a_valid_split_that_no_row_has_is_said(world, tmp_path):
    run = succeed(Run(options(world, tmp_path / "run", valid_split="dev", steps=1)))
    assert "split 'dev': 0 rows held out" in run.out
    assert ("held-out loss:" not in run.out
            and not any("held_out" in line for line in metrics(tmp_path / "run")))


def test_splits_are_said_with_what_is_done_with_them(world, tmp_path):
    rows = [row | {"split": {"valid": "validation"}.get(row["split"], row["split"])}
            for row in world.rows]
    data = write_manifest(world.folder / "validation.jsonl", rows)
    said = succeed(Run(options(world, tmp_path / "run", data=data, steps=1))).out
    assert ("split 'train': 48 rows to train on" in said
            and "split 'validation': 12 rows left out" in said)
    assert ("split 'test': 12 rows left out" in said
            and "split 'valid': 0 rows held out" in said)


def test_a_models_folder_is_not_taken_for_a_run(world, tmp_path, capsys):
    out = tmp_path / "model"
    shutil.copytree(world.encoder, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    for resume in (False, True):
        text = error(capsys, *options(world, out, encoder=out, resume=resume))
        assert "config.json" in text
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}


def test_a_finished_run_without_checkpoints_is_not_overwritten(
        undisturbed, world, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(undisturbed.out / "encoder", out / "encoder")
    for resume in (True, False):
        assert ("holds " in (text := error(capsys, *options(world, out, resume=resume)))
                and "another --out" in text)
    assert sorted(p.name for p in out.iterdir()) == ["encoder"]


def test_an_evaluation_forks_nothing(world, monkeypatch):
    """A fork beside a collective's threads can hang the child."""
    s = train.parse(options(world, "unused", workers=1, eval_clips=4))
    rows = Rows(world.data, answers=True)
    model = train.build_model(s, None)
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    assert (train.evaluate(s, model, Batches(rows, model.decoder.tokenizer, RATE)).keys()
            == set(rows.tasks))


# ---------------------------------------------------------------- guards

def loud(folder, name):
    """A clip of finite samples whose spectrum is not: an honest NaN."""
    write_clip(folder / name, tone(0.5) * np.float32(1e25), subtype="FLOAT")
    return name


def test_a_run_of_non_finite_updates_changes_nothing_and_ends(world, tmp_path):
    bad = loud(world.folder, "clips/loud.wav")
    rows = [row | {"audio": bad} if row["split"] == "train" else row for row in world.rows]
    out = tmp_path / "run"
    text = Run(options(world, out, data=write_manifest(world.folder / "loud.jsonl", rows),
                       save_every=1, freeze_encoder=0)).fail()
    last = train.BAD_UPDATES["fp32"] - 1
    assert f"{last + 1} updates in a row were not finite" in text
    assert same_bits(weights(out, 1), weights(out, last))
    encoder = joint_model(world.encoder, world.decoder).encoder.state_dict()
    assert all(torch.equal(weights(out, last)[f"model.encoder.{k}"], v) for k, v in encoder.items())
    assert not torch.load(step_folder(out, last) / "trainer.pt")["optimizer"]["state"]


def test_a_row_is_named_when_one_of_its_two_draws_is_not_finite(world, tmp_path, capsys):
    class Ten(list):
        name = "row {}".format

    log = train.Log(train.Settings(out=str(tmp_path), device="cpu", precision="fp32"),
                    SimpleNamespace(rows=Ten(range(10)), sample_rate=1), 0)
    more = dict(skipped=[], samples=torch.tensor([1, 1]))
    parts = [(SimpleNamespace(rows=[7, 8], answer_tokens=[1, 2], **more),
              torch.tensor([1.0, 2.0, math.nan])),
             (SimpleNamespace(rows=[9, 8], answer_tokens=[1, 1], **more), torch.tensor([2.0, 3.0]))]
    log.update(5, parts, math.nan)
    assert capsys.readouterr().err == "step 5: gradient norm is nan, update left out; rows: row 8\n"


def test_dirty_data_is_named_and_left_out(world, tmp_path):
    """Two ranks; of the clips to train on one gives NaN and one is not audio,
    a held-out one is missing."""
    more = dict(steps=8, batch_seconds=8)
    s = train.parse(options(world, tmp_path / "run", **more))
    read = train.open_rows(s)
    # what both ranks will see
    stream = [rows for _, rows in itertools.islice(train.batch_specs(s, read, 0), 16)]
    places = {row["audio"]: n for n, row in enumerate(world.rows)}
    rows = [dict(row) for row in world.rows]
    for i in range(len(read)):  # the same lengths as before, so the same stream
        rows[places[read[i]["audio"]]]["seconds"] = float(read.seconds[i])
    nan, text, gone = (places[read[i]["audio"]]
                       for i in (stream[6][0], stream[9][-1], read.where("valid")[0]))
    rows[nan]["audio"], rows[text]["audio"], rows[gone]["audio"] = (
        loud(world.folder, "clips/loud.wav"), "clips/text.wav", "gone.wav")
    (world.folder / "clips/text.wav").write_text("not audio")
    data = write_manifest(world.folder / "dirty.jsonl", rows)
    both = start_ranks(options(world, tmp_path / "run", **more, data=data))
    succeed(*both)
    said, lines = both[0].err + both[1].err, metrics(tmp_path / "run")
    assert f"skipped: {data}:{text + 1} (clips/text.wav): " in said
    assert f"skipped: {data}:{gone + 1} (gone.wav): " in said and "gone.wav: No such file" in said
    assert sum(line.get("skipped", 0) for line in lines) == said.count("text.wav")
    left_out = [line for line in lines if "non_finite" in line]
    assert 0 < len(left_out) < 8
    assert all(line["rows"] == [f"{data}:{nan + 1} (clips/loud.wav)"] for line in left_out)
    assert said.count(f"rows: {data}:{nan + 1} (clips/loud.wav)") == len(left_out)
    assert all(v.isfinite().all() for v in weights(tmp_path / "run", 8).values())


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_clips_end_the_run(world, tmp_path, workers):
    rows = [row | ({"audio": "clips/missing.wav", "seconds": 0.5}
                   if row["split"] == "train" and i % 2 else {})
            for i, row in enumerate(world.rows)]
    data = write_manifest(world.folder / f"missing{workers}.jsonl", rows)
    run = Run(options(world, tmp_path / "run", data=data, workers=workers))
    assert "clips could not be read" in run.fail()
    assert len(set(run.err.splitlines()[:-1])) >= 10  # each by its name


def test_an_error_in_a_worker_names_the_clip(world, tmp_path):
    rows = [row | {"audio": "clips/missing.wav", "seconds": 0.5} for row in world.rows]
    data = write_manifest(world.folder / "gone.jsonl", rows)
    run = Run(options(world, tmp_path / "run", data=data, workers=1)).wait()
    text = run.err.splitlines()[-1]
    assert run.code == 1 and "clips in a row cannot be read" in text
    assert "clips/missing.wav: No such file" in text


# ---------------------------------------------------------------- flags and start-up errors

@pytest.mark.parametrize("changes, says", [
    (dict(encoder=None), "--data needs --encoder"),
    (dict(decoder=None), "--data needs --encoder and --decoder"),
    (dict(encoder="nowhere"), "nowhere/config.json is missing"),
    (dict(decoder="nowhere"), "nowhere/config.json is missing"),
    (dict(data="nowhere.jsonl"), "nowhere.jsonl: no such manifest or tar"),
    (dict(train_split=["train", "valid"]), "--valid-split valid is also in --train-split"),
    (dict(train_split="fold9"), "--train-split"),
    (dict(steps=0), "--steps is 0"),
    (dict(stack=0, freeze_encoder=0),
     "stack is 0, no adapter, but the encoder is 48 wide and the decoder 56"),
    (dict(lr_decoder=-1), "--lr-decoder is -1"),
    (dict(batch_seconds=-1), "--batch-seconds is -1"),
    (dict(grad_clip=0), "--grad-clip is 0"),
    (dict(grad_clip="nan"), "--grad-clip is nan"),
    (dict(save_every=0), "--save-every is 0; it must be above 0"),
    (dict(threads=-1), "--threads is -1; it must be 0 or more"),
    (dict(lr_encoder=-1), "--lr-encoder is -1"),
    (dict(task_weights=["height"]), "could not convert string to float: 'height'"),
    (dict(task_weights=["height=much"]), "could not convert string to float: 'much'"),
    (dict(task_weights=["height=-1"]),
     "task weights {'height': -1.0}: each must be a number of 0 or more"),
    (dict(task_weights=["height=0"]),
     "task weights {'height': 0.0}: each must be a number of 0 or more, and one must be above"),
    (dict(task_weights=["depth=1"]), "['depth']"),
])
def test_settings_that_cannot_work(world, tmp_path, capsys, changes, says):
    assert says in error(capsys, *options(world, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("line, says", [
    ("{not json", "not JSON"),
    ('{"answer": "x"}', 'lacks "audio"'),
    ('{"audio": "a.wav", "instruction": "x", "answer": " "}', "answer is ' '"),
    ('{"audio": "a.wav", "answer": "yes", "task": "unheard"}', "'unheard' has no templates"),
    ('{"audio": "a.wav", "instruction": 5, "answer": "yes"}', "instruction is 5; need a text"),
    ('{"audio": "a.wav", "instruction": "x", "answer": "y", "seconds": 31}',
     "longer than --max-seconds 30"),
    ('{"audio": "a.wav", "instruction": "x", "answer": "y", "seconds": "1"}', "seconds is '1'"),
    ("", "holds no rows"),
])
def test_bad_manifests(world, tmp_path, capsys, line, says):
    data = write_manifest(tmp_path / "bad.jsonl", [line])
    text = error(capsys, *options(world, tmp_path / "run", data=data))
    assert says in text and str(tmp_path / "bad.jsonl") in text


def test_bad_weights(world, tmp_path, capsys):
    assert "model_type is 'qwen2'" in error(
        capsys, *options(world, tmp_path / "run", encoder=world.decoder))
    bare = tmp_path / "bare"
    shutil.copytree(world.decoder, bare)
    make_tokenizer(bare, chat_tokens=())
    assert "lacks the token <|im_start|>" in error(
        capsys, *options(world, tmp_path / "run", decoder=bare))
    (bare / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in error(capsys, *options(world, tmp_path / "run", decoder=bare))
    (bare / "model.safetensors").write_bytes(b"0123456789")
    assert "damaged" in error(capsys, *options(world, tmp_path / "run", decoder=bare))


@pytest.mark.parametrize("flags, says", [
    (["--stepps", "3"], "unrecognized arguments"),
    (["--step", "3"], "unrecognized arguments"),
    (["--loss", "word"], "invalid choice"),
    (["--device", "tpu"], "invalid choice"),
    (["--languages", "de", "xx"], "argument --languages: invalid choice: 'xx'"),
    (["--steps", "many"], "invalid int value"),
])
def test_unknown_flags_are_errors(capsys, flags, says):
    with pytest.raises(SystemExit) as end:
        train.parse(flags)
    assert end.value.code == 2 and says in capsys.readouterr().err


def test_no_flags_mean_the_embedded_example():
    s = train.parse([])
    assert (s.encoder.endswith("weights/tiny/encoder") and not s.data
            and s.steps == train.EXAMPLE["steps"])
    assert train.parse(["--steps", "7"]).steps == 7
