"""train.py: accumulation, ranks, exact resume, frozen parts, guards, reports, errors;
all tiny, on the CPU. A Run is the real command line in a process of its own."""
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (HERE, RATE, Run, joint_model, make_tokenizer, start_ranks, succeed, tone,
                      write_clip, write_manifest)
from safetensors.torch import load_file

import train
import uniwhisper
from data import Batches, Rows, read_templates
from uniwhisper import load_decoder, load_run

STEPS, FROZEN = 12, 3
pytestmark = pytest.mark.usefixtures("forks")


# ---------------------------------------------------------------- data and runs

@pytest.fixture(scope="module")
def world(tmp_path_factory, whisper, qwen):
    """Weights and a manifest of three tasks with two answers each;
    one task takes its instructions from the templates."""
    folder, rows = tmp_path_factory.mktemp("world"), []
    sine = lambda hertz: lambda draw, seconds: tone(seconds, hertz * draw.uniform(0.9, 1.1))
    hiss = lambda level: lambda draw, seconds: (
        draw.normal(0, level, int(RATE * seconds)).astype(np.float32))
    tasks = {"height": (dict(low=sine(300), high=sine(2500)), dict(instruction="How high?")),
             "sound_event": ({"a tone": sine(700), "noise": hiss(0.1)}, {}),
             "level": (dict(soft=hiss(0.02), loud=hiss(0.3)), dict(instruction="How loud?"))}
    for task, (sounds, more) in tasks.items():
        for n, split in enumerate(["train"] * 16 + ["valid"] * 4 + ["test"] * 4):
            draw = np.random.default_rng([len(task), n])
            answer, sound = list(sounds.items())[n % 2]
            clip = write_clip(folder / f"clips/{task}-{split}-{n}.wav",
                              sound(draw, draw.uniform(0.3, 1.0)), RATE if n % 3 else RATE // 2)
            rows.append(dict(audio=f"clips/{clip.name}", answer=answer, label=answer, task=task,
                             split=split, **more))
    return SimpleNamespace(folder=folder, rows=rows,
                           data=write_manifest(folder / "all.jsonl", rows),
                           encoder=str(whisper[0]), decoder=str(qwen[0]))


def options(world, out, **changes) -> list[str]:
    """The command line of the tests' usual run, with changes (None leaves a flag out)."""
    settings = dict(data=world.data, encoder=world.encoder, decoder=world.decoder, out=out,
                    precision="fp32", device="cpu", steps=STEPS, freeze_encoder=FROZEN, warmup=2,
                    batch_seconds=8, workers=0, log_every=2, save_every=3, eval_every=6, keep=10,
                    questions=2) | changes
    flags = []
    for name, value in settings.items():
        if value is not None and value is not False:
            values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
            flags += ["--" + name.replace("_", "-"), *map(str, values)]
    return flags


def error(capsys, *argv) -> str:
    """The one line with which the command line ends, here in this process."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["train.py", *argv])
        train.main()
    assert end.value.code.startswith("error: ") and "\n" not in end.value.code
    return end.value.code


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
def undisturbed(world, tmp_path_factory, forks):
    """The usual run, from beginning to end."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    return SimpleNamespace(out=out, said=succeed(Run(options(world, out))).out)


# ---------------------------------------------------------------- one update

def gradient(world, out, loss, sizes):
    """Minus the gradient of one update on the same 12 clips, of all tasks, in batches of
    these sizes: what plain SGD subtracts."""
    s = train.parse(options(world, out, loss=loss, grad_clip=1e9, freeze_encoder=0, steps=1,
                            accumulate=len(sizes), eval_clips=1, questions=0))
    out.mkdir()
    model = train.build_model(s, None)
    batches = Batches(Rows(world.data, answers=True), model.decoder.tokenizer, RATE)
    first = itertools.accumulate(sizes, initial=0)
    specs = [(0, list(range(5 * start, 5 * (start + size), 5)))
             for start, size in zip(first, sizes)]
    before = {k: p.detach().clone() for k, p in model.named_parameters()}

    def plain_sgd(s, model, state):
        trained = [p for p in model.parameters() if p.requires_grad]
        return (torch.optim.SGD([dict(params=trained, name="all", scale=1.0)], lr=1.0),
                torch.amp.GradScaler("cpu", enabled=False))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_optimizer", plain_sgd)
        patch.setattr(train, "learning_rate", lambda *a: 1.0)
        patch.setattr(train, "save_checkpoint", lambda *a: None)
        patch.setattr(signal, "signal", lambda *a: None)
        log = train.Log(s, batches, 0)
        train.train(s, model, log, map(batches.__getitem__, specs), dict(step=0))
    line = [line for line in metrics(out) if "loss" in line][-1]
    moved = {k: p.detach() - before[k] for k, p in model.named_parameters() if p.requires_grad}
    return moved, line["tasks"], line["norm"]


@pytest.mark.parametrize("loss", ["token", "example"])
def test_accumulation_equals_one_large_batch(world, tmp_path, loss):
    whole, losses, norm = gradient(world, tmp_path / "one", loss, [12])
    parts, losses_of_parts, norm_of_parts = gradient(world, tmp_path / "three", loss, [2, 7, 3])
    assert losses == pytest.approx(losses_of_parts, rel=1e-5)
    assert norm == pytest.approx(norm_of_parts, rel=1e-5)
    for k in whole:
        assert (whole[k] - parts[k]).abs().max() <= 1e-5 * whole[k].abs().max() + 1e-7, k


def test_a_token_counts_as_its_loss_says():
    batch = SimpleNamespace(answers=[[1, 2, 3, 4], [5], [6, 7]], answer_tokens=[4, 1, 2])
    assert train.token_weights(batch, "token").tolist() == [1] * 7
    assert train.token_weights(batch, "example").tolist() == [0.25] * 4 + [1] + [0.5] * 2


@pytest.mark.parametrize("rate", [0, 1e-3])
def test_the_decoder_trains_only_with_a_rate_of_its_own(world, rate):
    s = train.parse(options(world, "unused", lr_decoder=rate, precision="bf16"))
    model = train.build_model(s, None)
    optimizer, _ = train.build_optimizer(s, model, dict(step=0))
    names = ["encoder", "adapter", "decoder"][: 3 if rate else 2]
    assert [group["name"] for group in optimizer.param_groups] == sorted(
        names * 2, key=names.index)
    for group in optimizer.param_groups:  # matrices decay, vectors do not
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] == s.weight_decay}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    fixed = {id(model.encoder.embed_positions.weight), id(model.adapter.gain)}
    fixed |= set() if rate else {id(p) for p in model.decoder.parameters()}
    assert held == {id(p) for p in model.parameters()} - fixed
    assert {p.dtype for p in model.encoder.parameters()} == {torch.float32}
    assert {p.dtype for p in model.decoder.parameters()} == {
        torch.float32 if rate else torch.bfloat16}
    batch = Batches(Rows(world.data), model.decoder.tokenizer, RATE)[0, [0, 1]]
    train.wrap(s, model)(batch).sum().backward()
    assert {id(p) for p in model.parameters() if p.grad is not None} == held


def test_lower_layers_of_the_encoder_have_lower_rates(world):
    s = train.parse(options(world, "unused", layer_decay=0.5))
    model = train.build_model(s, None)
    optimizer, _ = train.build_optimizer(s, model, dict(step=0))
    scale = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"]}
    scale = {name: scale[id(p)] for name, p in model.named_parameters() if id(p) in scale}
    last = len(model.encoder.layers) - 1
    assert last > 0
    for name, found in scale.items():
        wanted = 1.0  # the adapter, and the norm behind the layers
        if name.startswith("encoder.layers."):
            wanted = 0.5 ** (last - int(name.split(".")[2]))
        elif name.startswith("encoder.conv"):
            wanted = 0.5 ** (last + 1)
        assert found == wanted, name
    assert optimizer.param_groups[-1]["scale"] == 1


def test_schedule():
    s = train.Settings(steps=100, warmup=10, freeze_encoder=20, lr_encoder=1.0, lr_adapter=2.0)

    def rates(step):
        return train.learning_rate(s, "encoder", step), train.learning_rate(s, "adapter", step)

    assert rates(1) == pytest.approx((0, 0.2))  # a tenth of the warm-up
    assert rates(10)[1] == pytest.approx(2 * (0.55 + 0.45 * np.cos(np.pi * 0.09)))  # warm
    assert train.learning_rate(train.replace(s, lr_decoder=3.0), "decoder", 20) == 0
    assert rates(20)[0] == 0 and 0 < rates(21)[0] < rates(30)[0]  # the encoder's own warm-up
    assert rates(51) == pytest.approx((0.55, 1.1)) and rates(101) == pytest.approx((0.1, 0.2))


# ---------------------------------------------------------------- a whole run

def test_config_and_metrics(undisturbed, world):
    config = json.loads((undisturbed.out / "config.json").read_text())
    assert config["steps"] == STEPS and config["encoder"] == world.encoder
    assert config["data"] == [world.data]
    lines = [json.loads(line) for line in open(undisturbed.out / "metrics.jsonl")]
    logged = [line for line in lines if "loss" in line]  # every second, and each checkpoint
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
    assert same_bits(whisper[1].decoder.state_dict(), model.decoder.state_dict())


def test_the_encoder_is_frozen_and_let_go(undisturbed, world):
    start = {f"model.encoder.{k}": v
             for k, v in joint_model(world.encoder, world.decoder).encoder.state_dict().items()}
    frozen, free, last = (weights(undisturbed.out, step) for step in (FROZEN, 6, STEPS))
    assert all(torch.equal(frozen[k], v) for k, v in start.items())
    assert not torch.equal(frozen["fc2.weight"], last["fc2.weight"])
    for k in start:
        for then in (free, last):
            assert torch.equal(start[k], then[k]) == ("embed_positions" in k), k
    moments = torch.load(step_folder(undisturbed.out, FROZEN) / "trainer.pt")["optimizer"]["state"]
    assert len(moments) == 6  # of the adapter's weights alone


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


def test_ranks_with_other_settings_resume_exactly(world, tmp_path):
    """Three, for a + b is b + a, but (a + b) + c is not a + (b + c)."""
    same = dict(steps=4, freeze_encoder=0, save_every=1, log_every=1, loss="example",
                lr_decoder=1e-3)
    one = Run(options(world, tmp_path / "one", **same, accumulate=6))
    three = options(world, tmp_path / "three", **same, accumulate=2)
    succeed(one, *start_ranks(three, three, three))
    assert_close_runs(tmp_path / "one", tmp_path / "three", 4)

    argv = options(world, tmp_path / "killed", **same, accumulate=2)
    main, *others = start_ranks(argv, argv, argv, patch=partial(kill_in_save, 3))
    assert main.wait().code == -signal.SIGKILL
    for other in others:
        other.process.kill()  # as torchrun does
    succeed(*start_ranks(*[[*argv, "--resume"]] * 3))
    assert_same_run(tmp_path / "three", tmp_path / "killed", 4)


def test_a_fault_of_one_rank_at_the_start_ends_all(world, tmp_path):
    data = write_manifest(tmp_path / "bad.jsonl", ["{"])
    one, other = start_ranks(options(world, tmp_path / "run"),
                             options(world, tmp_path / "run", data=data))
    assert "bad.jsonl:1: not JSON" in other.fail()
    assert "another rank has ended; its output says why" in one.fail()
    assert not (tmp_path / "run").exists()


def test_when_one_rank_dies_all_end(world, tmp_path):
    out = tmp_path / "run"
    argv = options(world, out, steps=100_000, save_every=100_000, eval_every=100_000)
    one, other = start_ranks(argv, argv)
    while not (out / "metrics.jsonl").exists() or not any("loss" in x for x in metrics(out)):
        assert one.process.is_alive() and other.process.is_alive()
        time.sleep(0.1)
    assert "another run writes to" in Run([*argv, "--resume"]).fail()
    other.process.kill()
    assert one.wait().code == 1  # not killed by `wait`, as what hangs is


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


def moved(module, start) -> set[str]:
    before = start.state_dict()
    return {k.partition(".")[0] for k, v in module.state_dict().items()
            if not torch.equal(v, before[k])}


def test_a_trained_qwen_is_saved_and_exported_by_itself(world, tmp_path):
    from transformers import Qwen2ForCausalLM, WhisperModel

    start, out = load_decoder(world.decoder), tmp_path / "run"
    succeed(Run(options(world, out, lr_decoder=1e-3, steps=6)))
    # until then the adapter trained alone
    assert not moved(load_decoder(step_folder(out, FROZEN) / "decoder"), start)
    trained = load_run(out).decoder
    assert moved(trained, start) == {"embed_tokens", "lm_head", "layers", "norm"}
    assert trained.lm_head.weight is trained.embed_tokens.weight
    theirs, ours = Qwen2ForCausalLM.from_pretrained(out / "decoder"), load_decoder(out / "decoder")
    assert torch.equal(theirs.lm_head.weight, trained.lm_head.weight) and not moved(ours, trained)
    its, before = (WhisperModel.from_pretrained(f).decoder.state_dict()
                   for f in (out / "encoder", world.encoder))
    assert same_bits(its, before)


# ---------------------------------------------------------------- stopped, lengthened, refused

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
    assert text == f"error: stopped by a signal after step 5; go on with --resume --out {out}"
    assert step_folder(out, 5).is_dir() and not (out / "encoder").exists()
    succeed(Run(["--resume", "--out", str(out)]))  # with OUT's own settings
    assert same_bits(weights(undisturbed.out, STEPS), weights(out, STEPS))


def test_a_signal_in_the_last_update_does_not_hold_up_the_end(world, tmp_path, undisturbed):
    succeed(Run(options(world, tmp_path / "run"), partial(signal_in_update, signal.SIGTERM, STEPS)))
    assert same_bits(weights(undisturbed.out, STEPS), weights(tmp_path / "run", STEPS))
    assert (tmp_path / "run/encoder/config.json").is_file()


def test_ranks_stop_together(world, tmp_path):
    argv = options(world, tmp_path / "run")
    one, other = start_ranks(argv, argv, patch=partial(signal_in_update, signal.SIGTERM, 2))
    for rank in (one, other):
        assert "stopped by a signal after step 3" in rank.fail()


def test_a_run_can_be_lengthened(undisturbed, world, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(undisturbed.out, out)
    said = succeed(Run(["--resume", "--out", str(out), "--steps", "14"])).out
    assert "from step 12 to 14" in said and "step 14/14" in said and step_folder(out, 14).is_dir()
    assert json.loads((out / "config.json").read_text())["steps"] == 14
    assert "steps is 5, below its step" in Run(
        ["--resume", "--out", str(out), "--steps", "5"]).fail()


def limit_file_size(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_no_room_for_a_checkpoint(world, tmp_path, undisturbed):
    sizes = [(step_folder(undisturbed.out, 6) / name).stat().st_size
             for name in ("encoder/model.safetensors", "trainer.pt")]
    argv = options(world, tmp_path / "run")
    # once the encoder's moments come in, it is too much
    text = Run(argv, partial(limit_file_size, sum(sizes) // 2)).fail()
    assert "cannot save" in text and "step-00000006; is the disk full?" in text
    assert step_folder(tmp_path / "run", 3).exists()
    assert not step_folder(tmp_path / "run", 6).exists()
    succeed(Run([*argv, "--resume"]))
    assert_same_run(undisturbed.out, tmp_path / "run")


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
    assert "gone/config.json is missing" in error(capsys, "--resume", "--out", "gone")


def test_resume_wants_the_same_settings(undisturbed, world, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(undisturbed.out, out)
    assert "holds checkpoints already" in error(capsys, *options(world, out))
    text = error(capsys, *options(world, out, resume=True, lr_encoder=0.5, seed=3))
    assert "lr_encoder was 0.0001, is 0.5" in text and "seed was 0, is 3" in text
    fewer = write_manifest(world.folder / "fewer.jsonl", world.rows[1:])
    assert "rows was 60, is 59" in error(capsys, *options(world, out, resume=True, data=fewer))
    # other numbers for the same rows; a text; audio
    for rows in (world.rows[::-1], [world.rows[0] | {"answer": "lox"}, *world.rows[1:]],
                 [world.rows[0] | {"audio": world.rows[1]["audio"]}, *world.rows[1:]]):
        data = write_manifest(world.folder / "changed.jsonl", rows)
        assert "checksum was " in error(capsys, *options(world, out, resume=True, data=data))
    shutil.copytree(world.folder, tmp_path / "moved")
    s = train.parse(options(world, out, resume=True, data=tmp_path / "moved/all.jsonl"))
    assert train.load_state(s, train.open_rows(s), step_folder(out, STEPS))["step"] == STEPS
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
    out, file = tmp_path / "run", tmp_path / "asked.json"
    texts = {"de": {"sound_event": ["Was ist zu hören?"]}, "en": {"level": ["unused"]},
             "ru": {"sound_event": ["Что слышно?"]}}
    file.write_text(json.dumps(texts))
    run = succeed(Run(options(world, out, instructions=file, steps=6), tell_instructions))
    asked = {line[7:] for line in run.out.splitlines() if line.startswith("asked: ")}
    english = set(read_templates()["en"]["sound_event"])
    assert asked & english
    assert asked - english == {"How high?", "How loud?", "Was ist zu hören?",
                               "Что слышно?"}
    usual = metrics(undisturbed.out)
    assert metrics(out)[:2] == usual[:2]  # held-out losses and answers before training
    questions = [[a["instruction"] for a in line["answers"]] for line in metrics(out)
                 if "answers" in line]
    assert questions == [[a["instruction"] for a in usual[1]["answers"]]] * 2
    file.write_text(json.dumps(texts | {"ru": {"level": ["Громко?"]}}))
    text = error(capsys, *options(world, out, resume=True, instructions=file, steps=6))
    assert "does not fit: " in text
    file.write_text('{"de": {"level": "Laut?"}}')
    text = error(capsys, *options(world, tmp_path / "new", instructions=file))
    assert f"{file}: level is 'Laut?'; needs {{language: {{task: [texts]}}}}" in text


def test_splits_are_said_with_what_is_done_with_them(world, tmp_path):
    rows = [row | {"split": row["split"].replace("valid", "validation")} for row in world.rows]
    data = write_manifest(world.folder / "validation.jsonl", rows)
    said = succeed(Run(options(world, tmp_path / "run", data=data, steps=1))).out
    assert ("rows by split: {'train': 48, 'validation': 12, 'test': 12}; "
            "train on train, hold out valid\nnote: no held-out losses") in said
    assert "held-out loss:" not in said
    assert not any("held_out" in line for line in metrics(tmp_path / "run"))


def test_a_folder_that_holds_something_else_is_left_alone(undisturbed, world, tmp_path, capsys):
    model, finished = tmp_path / "model", tmp_path / "finished"
    shutil.copytree(world.encoder, model)
    shutil.copytree(undisturbed.out / "encoder", finished / "encoder")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    for resume in (False, True):
        assert "config.json" in error(capsys, *options(world, model, resume=resume))
        text = error(capsys, *options(world, finished, resume=resume))
        assert "holds encoder already: choose another --out" in text
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}


def test_an_evaluation_forks_nothing(world, monkeypatch):
    """A fork beside a collective's threads can hang the child."""
    s = train.parse(options(world, "unused", workers=1, eval_clips=4))
    rows = Rows(world.data, answers=True)
    model = train.build_model(s, None)
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    losses = train.evaluate(s, model, Batches(rows, model.decoder.tokenizer, RATE))
    assert losses.keys() == set(rows.tasks)


# ---------------------------------------------------------------- guards

def overflow():
    """A run's patch: the mel of a clip that is louder than 2 is not finite."""
    mel = uniwhisper.log_mel_spectrogram
    uniwhisper.log_mel_spectrogram = lambda audio, n_mels: mel(audio, n_mels).where(
        audio.abs().amax(1)[:, None, None] < 2, math.nan)


def loud(folder):
    return write_clip(folder / "clips/loud.wav", 9 * tone(0.5), subtype="FLOAT").name


def test_a_run_of_non_finite_updates_changes_nothing_and_ends(world, tmp_path):
    bad = {"audio": f"clips/{loud(world.folder)}"}
    rows = [row | bad if row["split"] == "train" else row for row in world.rows]
    out = tmp_path / "run"
    text = Run(options(world, out, data=write_manifest(world.folder / "loud.jsonl", rows),
                       save_every=1, freeze_encoder=0), overflow).fail()
    last = train.BAD_UPDATES["fp32"] - 1
    assert f"{last + 1} updates in a row were not finite" in text
    assert same_bits(weights(out, 1), weights(out, last))
    encoder = joint_model(world.encoder, world.decoder).encoder.state_dict()
    assert all(torch.equal(weights(out, last)[f"model.encoder.{k}"], v) for k, v in encoder.items())
    assert not torch.load(step_folder(out, last) / "trainer.pt")["optimizer"]["state"]


def test_dirty_data_is_named_and_left_out(world, tmp_path):
    """Two ranks; of the clips to train on one gives NaN (on rank 0) and one is not audio,
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
        f"clips/{loud(world.folder)}", "clips/text.wav", "gone.wav")
    (world.folder / "clips/text.wav").write_text("not audio")
    data = write_manifest(world.folder / "dirty.jsonl", rows)
    argv = options(world, tmp_path / "run", **more, data=data)
    both = start_ranks(argv, argv, patch=overflow)
    succeed(*both)
    said, lines = both[0].err + both[1].err, metrics(tmp_path / "run")
    assert f"skipped: {data}:{text + 1} (clips/text.wav): " in said
    assert f"skipped: {data}:{gone + 1} (gone.wav): " in said and "gone.wav: No such file" in said
    skipped = [line["skipped"] for line in lines if line.get("skipped")]
    assert {task for tasks in skipped for task in tasks} == {rows[text]["task"]}
    assert sum(sum(tasks.values()) for tasks in skipped) == said.count("text.wav")
    left_out = [line for line in lines if "non_finite" in line]
    assert 0 < len(left_out) < 8
    assert all(line["rows"] == [f"{data}:{nan + 1} (clips/loud.wav)"] for line in left_out)
    assert said.count(f"rows: {data}:{nan + 1} (clips/loud.wav)") == len(left_out)
    assert all(v.isfinite().all() for v in weights(tmp_path / "run", 8).values())


def test_too_many_unreadable_clips_end_the_run(world, tmp_path):
    rows = [row | ({"audio": "clips/missing.wav", "seconds": 0.5}
                   if row["split"] == "train" and i % 2 else {})
            for i, row in enumerate(world.rows)]
    data = write_manifest(world.folder / "missing.jsonl", rows)
    run = Run(options(world, tmp_path / "run", data=data))
    assert "clips could not be read" in run.fail()
    assert len(set(run.err.splitlines()[:-1])) >= 10  # each by its name


def test_an_error_in_a_worker_names_the_clip(world, tmp_path):
    rows = [row | {"audio": "clips/missing.wav", "seconds": 0.5} for row in world.rows]
    data = write_manifest(world.folder / "gone.jsonl", rows)
    text = Run(options(world, tmp_path / "run", data=data, workers=1)).fail()
    assert "clips in a row cannot be read" in text and "clips/missing.wav: No such file" in text


# ---------------------------------------------------------------- flags and start-up errors

@pytest.mark.parametrize("changes, says", [
    (dict(decoder=None), "--data needs --encoder and --decoder"),
    (dict(encoder="nowhere"), "nowhere/config.json is missing"),
    (dict(data="nowhere.jsonl"), "nowhere.jsonl: No such file"),
    (dict(train_split=["train", "valid"]), "--valid-split valid is also in --train-split"),
    (dict(train_split="fold9"), "--train-split"),
    (dict(steps=0), "--steps is 0"),
    (dict(stack=0), "stack is 0; it must be 1 or more"),
    (dict(lr_decoder=-1), "--lr-decoder is -1"),
    (dict(grad_clip="nan"), "--grad-clip is nan"),
    (dict(save_every=0), "--save-every is 0; it must be above 0"),
    (dict(task_weights=["height=much"]), "could not convert string to float: 'much'"),
    (dict(task_weights=["height=0"]),
     "task weights {'height': 0.0}: each must be a number of 0 or more, and one must be above"),
    (dict(task_weights=["depth=1"]), "['depth']"),
])
def test_settings_that_cannot_work(world, tmp_path, capsys, changes, says):
    assert says in error(capsys, *options(world, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("line, says", [
    ("{not json", "not JSON"),
    ('{"audio": "a.wav", "instruction": "x", "answer": " "}',
     "bad.jsonl:1 (a.wav): training needs an answer"),
    ('{"audio": "a.wav", "answer": "yes", "task": "unheard"}',
     "an instruction or a task with templates (--instructions), not {'audio': 'a.wav', "),
    ('{"audio": "a.wav", "instruction": "x", "answer": "y", "seconds": 31}',
     "longer than --max-seconds 30"),
    ("", "holds no rows"),
])
def test_bad_manifests(world, tmp_path, capsys, line, says):
    data = write_manifest(tmp_path / "bad.jsonl", [line])
    text = error(capsys, *options(world, tmp_path / "run", data=data))
    assert says in text and str(tmp_path / "bad.jsonl") in text


def test_bad_weights(world, tmp_path, capsys):
    assert "model_type is 'qwen2'" in error(
        capsys, *options(world, tmp_path / "run", encoder=world.decoder))
    shutil.copytree(world.decoder, tmp_path / "bare")
    make_tokenizer(tmp_path / "bare", chat_tokens=())
    assert "lacks the token <|im_start|>" in error(
        capsys, *options(world, tmp_path / "run", decoder=tmp_path / "bare"))


@pytest.mark.parametrize("flags, says", [
    (["--stepps", "3"], "unrecognized arguments"),
    (["--loss", "word"], "invalid choice"),
    (["--steps", "many"], "invalid int value"),
])
def test_unknown_flags_are_errors(capsys, flags, says):
    with pytest.raises(SystemExit) as end:
        train.parse(flags)
    assert end.value.code == 2 and says in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_one_line(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for local, words in (("2", "2 GPUs and needs 3"), ("7", "2 GPUs and needs 8")):
        monkeypatch.setenv("LOCAL_RANK", local)
        with pytest.raises(ValueError, match=f"--device cuda: this machine has {words}"):
            train.parse(options(world, tmp_path, device="cuda"))


@pytest.mark.parametrize("given", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "x"},
                                   {"PYTORCH_ALLOC_CONF": "x"}])
def test_a_full_gpu_gets_a_hint_and_its_allocator_a_setting(given, monkeypatch):
    def run(s):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried this and that")

    monkeypatch.setattr(train, "run", run)
    monkeypatch.setattr(train, "parse", lambda: None)
    names = ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"]  # of torch now, and of 2.6
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code.startswith("error: CUDA out of memory. Lower --batch-seconds")
    expected = given or dict.fromkeys(names, "expandable_segments:True")
    assert {name: os.environ[name] for name in names if name in os.environ} == expected


def test_no_flags_mean_the_embedded_example():
    s = train.parse([])
    assert (s.encoder.endswith("weights/tiny/encoder") and not s.data
            and s.steps == train.EXAMPLE["steps"])
    assert train.parse(["--steps", "7"]).steps == 7
