"""tests/ablations as scripts: each runs the project's scripts with its class known."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import noise, write_clip, write_manifest

ROOT = Path(__file__).resolve().parent.parent


def run(*words, code: int = 0) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout or done.stderr


@pytest.fixture
def flags(tmp_path):
    rows = []
    for i, split in enumerate(["train"] * 4 + ["valid", "test"] * 2):
        write_clip(tmp_path / f"{i}.wav", noise(8_000, seed=i).numpy())
        rows.append(dict(audio=f"{i}.wav", task="level", instruction="How loud?", split=split,
                         answer="soft" if i % 3 else "loud", label="soft" if i % 3 else "loud"))
    return ["--data", write_manifest(tmp_path / "rows.jsonl", rows)]


def test_whispers_decoder_trains_resumes_answers_and_is_refused_without(
        talking_whisper, flags, tmp_path):
    script, out = ROOT / "tests/ablations/whisper_decoder.py", tmp_path / "out"
    train = [script, "train.py", "--out", out, "--steps"]
    run(*train, 1, *flags, "--encoder", talking_whisper[0], "--decoder", talking_whisper[0],
        "--stack", 0, "--workers", 1, "--questions", 1, "--lr-decoder", 1e-4)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", 1, "--master-port", 29_512]
    assert "from step 1 to 2" in run(*launch, *train, 2, "--resume")
    ask = ["uniwhisper.py", "ask", tmp_path / "0.wav", "How loud?", "--run", out]
    assert run(script, *ask)
    assert "model_type is 'whisper'; need one of qwen2, qwen3" in run(ROOT / ask[0], *ask[1:],
                                                                      code=1)
    run(script, "uniwhisper.py", "export", "--run", out, tmp_path / "half", "--blend", 0.5)
    assert json.loads((tmp_path / "half/decoder/config.json").read_text())["d_model"] == 48


def test_clap_is_encoded_and_refused_without(clap, flags, tmp_path):
    words = ["uniwhisper.py", "encode", flags[1], "--encoder", clap[0], "--out", tmp_path / "f"]
    assert "0.wav: (2, 64)" in run(ROOT / "tests/ablations/clap.py", *words)
    assert "model_type is 'clap'; need one of whisper" in run(ROOT / words[0], *words[1:], code=1)


def test_clap_is_probed(clap, flags, tmp_path):
    words = ["probe.py", "--encoder", clap[0], *flags, "--cache", tmp_path / "cache", "--epochs", 1]
    assert "level" in run(ROOT / "tests/ablations/clap.py", *words)
