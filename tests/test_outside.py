"""outside.py on random weights: what it counts, against plain sums."""
import json
import sys

import pytest

pytest.importorskip("transformers")

import outside  # noqa: E402
from conftest import noise, write_clip, write_manifest  # noqa: E402
from data import Rows  # noqa: E402


def manifest(folder, name, languages, splits=("test",) * 9):
    rows = []
    for i, (language, split) in enumerate(zip(languages, splits)):
        audio = noise(4_000 + 1_000 * i, seed=i).numpy()
        write_clip(folder / name / f"{i}.wav", audio)
        rows.append({"audio": f"{name}/{i}.wav", "language": language, "split": split,
                     "answer": f"Clip, {i}!"})
    return write_manifest(folder / f"{name}.jsonl", rows)


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["outside.py", *map(str, words)])
    outside.main()


def test_wer_of_encoders_and_manifests_at_both_contexts(talking_whisper, tmp_path, monkeypatch):
    """Each clip of a context gets a text of its own; whoever is asked twice is asked the same."""
    asked = []

    def say(encoder, decoder, clips, languages, context):
        asked.append((decoder.width, [len(clip) for clip in clips], languages, context))
        wrong = " more" if context == "clip" else ""
        texts = [f"clip {(len(clip) - 4_000) // 1_000}{wrong}" for clip in clips]
        repeats = [["x"] if len(clip) == 5_000 and wrong else [] for clip in clips]
        return texts, languages, repeats

    monkeypatch.setattr(outside, "transcribe_clips", say)
    (other := tmp_path / "other").symlink_to(talking_whisper[0])
    languages = ["Dutch", "English", "Greek", "Dutch"]
    a = manifest(tmp_path, "a", languages, ["valid", "valid", "test", "valid"])
    b = manifest(tmp_path, "b", ["Greek", "Dutch"], ["valid", "valid"])
    command(monkeypatch, "wer", "--encoder", talking_whisper[0], other, "--data", a, b,
            "--on", "valid", "--clips", 3, "--json", tmp_path / "wer.json")
    out = json.loads((tmp_path / "wer.json").read_text())
    assert out.keys() == {"a", "b"}
    for task, clips in (("a", 3), ("b", 2)):
        assert out[task]["clips"] == clips and out[task]["words"] == 2 * clips
        for folder in (talking_whisper[0], other):
            by_context = out[task][str(folder)]
            assert by_context["30s"] == {"wer": 0.0, "runaways": 0}
            assert by_context["clip"] == {"wer": 0.5, "runaways": 1}
    assert len(asked) == 8 and [call[1] for call in asked[:4]] == [asked[0][1]] * 4
    assert dict(zip(*asked[0][1:3])) == {4_000: "nl", 5_000: "en", 7_000: "nl"}
    assert {call[3] for call in asked} == {"30s", "clip"}


def test_wer_by_our_own_transcribe(talking_whisper, tmp_path, monkeypatch, capsys):
    """With random weights: no word is right."""
    data = manifest(tmp_path, "a", ["Dutch", "Greek"])
    command(monkeypatch, "wer", "--encoder", talking_whisper[0], "--data", data)
    said = json.loads(capsys.readouterr().out)["a"][str(talking_whisper[0])]
    assert said["30s"]["wer"] > 0 and said["clip"]["wer"] > 0


@pytest.mark.parametrize("language", ["Klingon", None])
def test_a_language_that_whisper_lacks_is_named_with_its_row(language, tmp_path):
    rows = Rows([manifest(tmp_path, "a", ["Dutch", language])])
    assert outside.language_code(rows, 0) == "nl"
    says = r"a.jsonl:2 \(a/1.wav\): language is .*; need a name such as Dutch"
    with pytest.raises(ValueError, match=says):
        outside.language_code(rows, 1)


def test_drawn_clips_are_the_same_each_time(tmp_path):
    rows = Rows([manifest(tmp_path, "a", ["Dutch"] * 9)])
    assert outside.draw(rows, 4) == outside.draw(rows, 9)[:4]
    assert sorted(outside.draw(rows, 99)) == list(range(9))
