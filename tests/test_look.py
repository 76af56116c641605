"""look.py on random weights: neighbours and places of test clips."""
import json
import sys

import pytest

pytest.importorskip("sklearn")

import look  # noqa: E402
import torch  # noqa: E402
from conftest import tone, write_clip, write_manifest  # noqa: E402
from uniwhisper import load_encoder  # noqa: E402


def test_neighbours_and_places_of_test_clips(whisper, tmp_path, monkeypatch, capsys):
    rows = []
    for i in range(24):
        write_clip(tmp_path / f"{i}.wav", tone(0.2 + 0.01 * i, 300 + 400 * (i % 3)))
        rows.append({"audio": f"{i}.wav", "label": "abc"[i % 3],
                     "split": "test" if i >= 12 else "train"})
    rows.append({"audio": "gone.wav", "label": "a", "split": "valid", "seconds": 1})
    data = write_manifest(tmp_path / "notes.jsonl", rows)
    monkeypatch.setattr(sys, "argv", ["look.py", "--encoder", str(whisper[0]), "--names", "before",
                                      "--data", str(data), "--json", str(tmp_path / "look.json")])
    look.main()
    seen = json.loads((tmp_path / "look.json").read_text())["notes"]["before"]
    assert seen["labels"] == ["abc"[i % 3] for i in range(12, 24)] and len(seen["places"]) == 12
    assert len(seen["neighbours"]) == 10
    encoder = load_encoder(whisper[0]).eval()

    def feature(i):
        with torch.inference_mode():
            return encoder.pooled(torch.from_numpy(tone(0.2 + 0.01 * i, 300 + 400 * (i % 3))))[0]

    for one in seen["neighbours"]:
        i = int(one["clip"].removesuffix(".wav"))
        near = sorted(range(12),
                      key=lambda j: -torch.cosine_similarity(feature(i), feature(j), 0).item())
        assert one["label"] == "abc"[i % 3] and one["nearest"] == ["abc"[j % 3] for j in near[:5]]
    assert f"| {one['label']} | {', '.join(one['nearest'])} |" in capsys.readouterr().out
