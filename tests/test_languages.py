"""languages.py on random weights: what is asked, and what counts as right."""
import json
import sys

import pytest
import torch

import languages
from conftest import joint_model, noise, write_clip, write_manifest
from uniwhisper import write_tensors


@pytest.fixture
def run(whisper, qwen, tmp_path):
    """A training run's folder with random weights."""
    torch.manual_seed(0)
    out = tmp_path / "run"
    model = joint_model(whisper[0], qwen[0])
    checkpoint = out / "checkpoints/step-00000001"
    model.encoder.save(checkpoint / "encoder")
    (checkpoint / "adapter").mkdir()
    write_tensors(model.adapter.state_dict(), checkpoint / "adapter/model.safetensors")
    settings = dict(encoder=str(whisper[0]), decoder=str(qwen[0]), stack=4)
    (out / "config.json").write_text(json.dumps(settings))
    return out


def manifest(folder, *tasks):
    rows = []
    for i in range(12):
        write_clip(folder / f"{i}.wav", noise(4_000 + 500 * i, seed=i).numpy())
        rows.append(dict(audio=f"{i}.wav", task=tasks[i % len(tasks)], answer=f"Clip {i}.",
                         instruction="Which?", split="train" if i > 9 else "test"))
    return write_manifest(folder / "m.jsonl", rows)


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["languages.py", *map(str, words)])
    languages.main()


def test_a_run_is_asked_in_each_language(run, tmp_path, monkeypatch):
    """By the model itself, whose random weights give no right answer."""
    data = manifest(tmp_path, "drum", "pitch")
    command(monkeypatch, "--run", run, "--data", data, "--clips", 4,
            "--device", "cpu", "--json", tmp_path / "out.json")
    out = json.loads((tmp_path / "out.json").read_text())[str(run)]
    assert list(out) == ["en", "de", "fr", "es", "ru", "zh", "examples"]
    for language in ("en", "zh"):
        for task in ("drum", "pitch"):
            assert out[language][task]["clips"] == 4 and out[language][task]["right"] == 0
    assert out["en"]["drum"]["as_in_english"] == 1
    shown = out["examples"]
    assert [clip["task"] for clip in shown] == ["drum"] * 3 + ["pitch"] * 3
    assert shown[0].keys() == {"task", "truth", "en", "de", "fr", "es", "ru", "zh"}
    answers = {shown[0][language] for language in ("en", "de", "fr", "es", "ru", "zh")}
    assert len(answers) > 1  # each question reaches the model


def test_shares_of_right_answers(run, tmp_path, monkeypatch, capsys):
    """A model that knows a clip's number only where it is asked in German, of a drum."""
    def generate(audio, samples, texts, longest):
        numbers = [(n - 4_000) // 500 for n in samples.tolist()]
        known = {"Welches Schlaginstrument ist zu hören?": "clip {}", "Which?": "CLIP 4"}
        return [known.get(text, "no").format(n) for n, text in zip(numbers, texts)]

    def load(folder):
        model = load_run(folder)
        monkeypatch.setattr(model, "generate", generate)
        return model

    load_run = languages.load_run
    monkeypatch.setattr(languages, "load_run", load)
    data = manifest(tmp_path, "drum", "pitch")
    command(monkeypatch, "--run", run, "--data", data, "--clips", 0, "--languages", "de")
    out = json.loads(capsys.readouterr().out)[str(run)]
    assert out["en"] == {"drum": dict(clips=5, right=0.2, as_in_english=1.0),
                         "pitch": dict(clips=5, right=0.0, as_in_english=1.0)}
    assert out["de"] == {"drum": dict(clips=5, right=1.0, as_in_english=0.2),
                         "pitch": dict(clips=5, right=0.0, as_in_english=0.0)}


def test_a_task_without_translation_is_named(run, tmp_path, monkeypatch):
    data = manifest(tmp_path, "drum", "birds")
    with pytest.raises(SystemExit, match=r"^error: tasks \['birds'\] are not in TRANSLATIONS"):
        command(monkeypatch, "--run", run, "--data", data)
