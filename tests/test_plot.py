"""plot.py: README's pictures from recipe.sh's JSON files, a run's curves from metrics.jsonl."""
import json
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
import plot  # noqa: E402

TASKS = {"note": 1.5, "voice": 0.5}
RATES = {"encoder": 1e-4, "adapter": 5e-4}
LINES = [
    {"step": 0, "held_out": TASKS},
    {"step": 0, "answers": [], "right": 0},
    {"step": 25, "loss": 2.5, "tasks": TASKS, "norm": 3.0, "lr": RATES},
    {"step": 40, "non_finite": "inf", "rows": ["a.jsonl, row 3"]},
    {"step": 50, "loss": None, "tasks": TASKS, "norm": 2.0, "lr": RATES},
    {"step": 50, "held_out": {"note": 0.7, "voice": None}},
]


def write_metrics(folder, lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


def test_pictures_of_the_recipe(tmp_path):
    plot.draw_recipe(plot.RECIPE, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"scores.svg", "heard.svg"}
    committed = list(plot.RECIPE.glob("*.svg"))
    for path in [*tmp_path.iterdir(), *committed]:
        assert xml.parse(path).getroot().tag.endswith("svg")
        assert path.stat().st_size < 150_000
    assert {path.name for path in committed} == names


def test_curves_of_a_run(tmp_path):
    write_metrics(tmp_path, LINES)
    plot.main([str(tmp_path)])
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")
    loss, held_out, norm, rates = plot.training_figure(LINES).axes
    assert [len(axes.lines) for axes in (loss, held_out, norm, rates)] == [1, 2, 2, 2]
    assert list(loss.lines[0].get_xdata()) == [25, 50]
    assert list(held_out.lines[0].get_ydata()) == [1.5, 0.7]
    assert list(norm.lines[1].get_xdata()) == [40, 40]  # the update left out


def test_curves_of_a_run_that_has_only_begun(tmp_path):
    write_metrics(tmp_path, LINES[:1])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 25, "lo')  # still being written
    plot.main([str(tmp_path)])
    assert (tmp_path / "metrics.png").exists()


@pytest.mark.parametrize("text, says", [
    (None, "no such file; give the folder that train.py wrote to"),
    ("", "empty"),
    ('{"step": 0}\nnonsense\n', "line 2: not JSON: 'nonsense'"),
])
def test_errors_are_one_line(tmp_path, text, says):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(SystemExit) as error:
        plot.main([str(tmp_path)])
    message = str(error.value)
    assert str(tmp_path / "metrics.jsonl") in message
    assert says in message and "\n" not in message


def test_the_scores_show_every_task_and_its_gain_over_the_better_baseline():
    files = [json.loads((plot.RECIPE / name).read_text())["encoders"]
             for name in ("scores.json", "padded.json")]
    own_length, *trained = [encoder["tasks"] for encoder in files[0].values()]
    padded, = [encoder["tasks"] for encoder in files[1].values()]
    for axes, probe in zip(plot.scores_figure(plot.RECIPE).axes, plot.PROBES):
        gains = []
        for task in plot.SUITE + plot.OTHERS:
            if own_length[task][probe] is not None:
                after = [tasks[task][probe] for tasks in trained]
                better = max(own_length[task][probe], padded[task][probe])
                gains.append(f"{sum(after) / len(after) - better:+.3f}")
        assert [text.get_text() for text in axes.texts] == gains
        assert len(gains) == (12 if probe == "knn" else 13)


def test_what_more_audio_and_averaging_do():
    scores, words = plot.heard_figure(plot.RECIPE).axes
    names = [line.get_label() for line in scores.lines]
    assert names == ["suite, kNN", "letters_language, kNN",
                     "suite, MLP probe", "letters_language, MLP probe"]
    assert [line.get_label() for line in words.lines] == ["transcribe", "transcribe_dutch"]
    untouched = json.loads((plot.RECIPE / "valid/untouched-words.json").read_text())
    first = words.lines[1].get_ydata()[0]
    assert first in [encoder["30s"]["wer"] for encoder in untouched["transcribe_dutch"].values()
                     if isinstance(encoder, dict)]
    for line in scores.lines + words.lines:
        assert len(line.get_xdata()) == 4


def test_without_matplotlib(monkeypatch):
    monkeypatch.setattr(plot, "matplotlib", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        plot.main([])


def test_scores_of_the_probe(tmp_path):
    scores = {"encoders": {"a": {"tasks": {"drum": {"knn": 0.5, "mlp": 0.6},
                                           "caption": {"knn": None, "mlp": 0.1}}},
                           "b": {"tasks": {"drum": {"knn": 0.6, "mlp": 0.7},
                                           "caption": {"knn": None, "mlp": 0.2}}}}}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    plot.main([str(tmp_path / "scores.json")])
    assert (tmp_path / "scores.png").stat().st_size > 5000
