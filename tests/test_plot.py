"""plot.py: README's pictures from tests/results/*.json, a run's curves from metrics.jsonl."""
import json
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parent))
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
    {"step": 50, "knn": {"voice": 0.8}},
]


def write_metrics(folder, lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


def test_pictures_of_results(tmp_path):
    plot.draw_results(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"keep.svg", "results.svg", "hours.svg", "ablations.svg"}
    for path in [*tmp_path.iterdir(), *plot.RESULTS.glob("*.svg")]:
        assert xml.parse(path).getroot().tag.endswith("svg")
        assert path.stat().st_size < 150_000
    committed = {path.name for path in plot.RESULTS.glob("*.svg")}
    assert committed == names | {"method.svg"}


def test_results_show_both_baselines_and_three_seeds_of_each_task():
    for axes in plot.results_figure().axes:
        marks = [len(points.get_offsets()) for points in axes.collections]
        assert marks == [9, 9, 9, 9, 9, 0]  # the last one is the legend's
        assert len(axes.patches) == 9


def test_results_measure_the_gain_from_the_padded_baseline():
    knn, mlp = plot.results_figure().axes
    texts = [text.get_text() for text in knn.texts + mlp.texts]
    assert texts.count("gain") == 2
    assert {"+0.135", "+0.068", "-0.039"} <= set(texts)  # means, game_sound by MLP


def test_hours_show_the_recipe_and_seven_other_ends():
    for axes in plot.hours_figure().axes:
        on_the_way, ends = axes.collections
        assert len(on_the_way.get_offsets()) == len(ends.get_offsets()) == 3
        own_length, padded, *others, curve = axes.lines
        assert padded.get_ydata()[0] > own_length.get_ydata()[0] == curve.get_ydata()[0]
        assert [len(line.get_xdata()) for line in others] == [1, 1, 1, 2, 2]
        assert list(curve.get_xdata()) == [0, 8.5, 16.9, 25.3, 33.8]


def test_ablations_show_every_single_change():
    axes, = plot.ablations_figure().axes
    assert [len(points.get_offsets()) for points in axes.collections] == [9, 9]
    runs = plot.load("ablations.json")
    all_tasks = [key for key, run in runs.items()
                 if "held_out_after" in run and "language" in run["probe"]]
    assert set(all_tasks) == {*plot.CHANGES, "the recipe, 150 updates"}


def test_curves_of_a_run(tmp_path):
    write_metrics(tmp_path, LINES)
    plot.main([str(tmp_path)])
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")
    loss, held_out, norm, rates, knn = plot.training_figure(LINES).axes
    assert [len(axes.lines) for axes in (loss, held_out, norm, rates, knn)] == [1, 2, 2, 2, 1]
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


def test_the_picture_of_kept_speech_shows_every_task_and_its_gain():
    scores, others = plot.encoders("keep.json"), plot.encoders("keep.json", "transfer")
    for axes, probe in zip(plot.keep_figure().axes, plot.PROBES):
        gains = []
        for task in plot.SUITE + plot.OTHERS:
            table = others if task in plot.OTHERS else scores
            before, after = table["untouched"][task][probe], table["seed 0"][task][probe]
            if before is not None:
                gains.append(f"{after - before:+.3f}")
        assert [text.get_text() for text in axes.texts] == gains
        assert len(gains) == (12 if probe == "knn" else 13)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setattr(plot, "matplotlib", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        plot.main([])


def test_scores_of_the_probe(tmp_path):
    scores = {"encoders": {"a": {"tasks": {"drum": {"knn": 0.5, "mlp": 0.6}, "caption": {"knn": None, "mlp": 0.1}}},
                           "b": {"tasks": {"drum": {"knn": 0.6, "mlp": 0.7}, "caption": {"knn": None, "mlp": 0.2}}}}}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    plot.main([str(tmp_path / "scores.json")])
    assert (tmp_path / "scores.png").stat().st_size > 5000
