"""Draw README's picture of the result, or the curves of a training run.

    python tests/recipe/plot.py OUT    # of recipe.sh: OUT/scores.svg, and README's table
    python tests/recipe/plot.py RUN    # of train.py --out RUN: RUN/metrics.png

Needs matplotlib: pip install -e '.[plot]'. (tests/results/method.svg is written by hand.)
"""
import argparse
import json
import math
import sys
from pathlib import Path

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError:
    matplotlib = None

PROBES = {"knn": "kNN", "mlp": "MLP probe"}  # key in the JSON files, name
SUITE = ("language speaker_count voice command instrument pitch drum game_sound tagging "
         "caption").split()
OTHERS = "command_festival letters_language game_sound_other".split()
BLUE, RED, GREY = "#0072B2", "#D55E00", "#707070"  # colour-blind readers can tell them apart
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "grid.color": "#e4e4e4", "axes.axisbelow": True,
         "legend.frameon": False, "svg.hashsalt": "uniwhisper"}  # equal numbers make equal files


def read_scores(path):
    """(task -> scores, seconds of silence) of the one encoder in a file of probe.py --json."""
    found = json.loads(path.read_text("utf-8"))
    encoder, = found["encoders"].values()
    return encoder["tasks"], found["settings"]["silence"]


def mean_score(encoders, tasks, probe):
    """Plain mean over encoders and those of the tasks that were probed. NaN: none was."""
    scores = [encoder[task][probe] for encoder in encoders for task in tasks if task in encoder]
    scores = [score for score in scores if score is not None]  # captions have no neighbours
    return sum(scores) / len(scores) if scores else math.nan


def table(folder):
    """Markdown: means over the suite and over other sources, untouched and trained."""
    lines = ["| test clips | encoder | silence | suite, kNN / MLP | other sources, kNN / MLP |",
             "| --- | --- | --- | --- | --- |"]
    for clips in ("test", "part", "part-30s"):
        for name in ("untouched", "seed-*"):
            paths = sorted((folder / clips).glob(f"{name}.json"))
            encoders, silences = zip(*map(read_scores, paths))
            cells = ["all" if clips == "test" else "a part",
                     "untouched" if name == "untouched" else f"trained, seeds: {len(paths)}",
                     f"{silences[0]:g} s"]
            for tasks in (SUITE, OTHERS):
                means = [mean_score(encoders, tasks, probe) for probe in PROBES]
                cells.append("{:.3f} / {:.3f}".format(*means))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def scores_figure(folder):
    """Every task of `part`: untouched, untouched at 30 s, and each trained seed."""
    untouched, silence = read_scores(folder / "part/untouched.json")
    padded, _ = read_scores(folder / "part-30s/untouched.json")
    trained = [read_scores(path)[0] for path in sorted((folder / "part").glob("seed-*.json"))]
    rows = [task for task in [*SUITE, None, *OTHERS] if task is None or task in untouched]
    figure = Figure((8.33, 1.3 + 0.3 * len(rows)), layout="constrained")  # 800 pixels wide
    panels = figure.subplots(1, 2, sharey=True)
    for axes, probe in zip(panels, PROBES):
        scores_panel(axes, probe, rows, untouched, padded, trained)
    panels[0].set(yticks=range(len(rows)), yticklabels=[task or "" for task in rows],
                  ylim=(len(rows) - 0.4, -0.6))
    figure.legend(panels[0].collections[:3], [
        f"untouched, {silence:g} s of silence", "untouched, 30 s", "trained, each seed"],
        loc="outside lower center", ncols=3)
    figure.suptitle("The suite; below the line, sources that training did not hear", weight="bold")
    panels[0].set_xlabel("tagging: mAP, caption: recall@1, else accuracy", color=GREY)
    panels[1].set_xlabel("the number: trained, minus the better of untouched", color=GREY)
    return figure


def scores_panel(axes, probe, rows, untouched, padded, trained):
    """A line for each task of rows; None: a grey line between groups."""
    axes.axhline(rows.index(None), color=GREY, linewidth=0.6)
    places = {task: row for row, task in enumerate(rows)  # captions have no neighbours
              if task and untouched[task][probe] is not None}

    def draw(tasks, size, **style):
        axes.scatter([tasks[task][probe] for task in places], places.values(), size, **style)

    draw(untouched, 30, facecolors="white", edgecolors=GREY)
    draw(padded, 160, marker="|", color="black")
    for tasks in trained:
        draw(tasks, 20, color=BLUE, zorder=3)
    for task, row in places.items():
        better = max(untouched[task][probe], padded[task][probe])
        gain = mean_score(trained, [task], probe) - better
        axes.barh(row, gain, 0.14, left=better, color=BLUE, alpha=0.35)
        colour = RED if gain < -0.0005 else "black"
        axes.text(1.06, row, f"{gain:+.3f}", va="center", color=colour)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.03)
    axes.set_title(PROBES[probe], loc="left", weight="bold")


def draw_curves(axes, lines, key):
    """A run's values under this key: a curve, or one for each name (task, part of the model)."""
    lines = [line for line in lines if key in line]
    steps, values = [line["step"] for line in lines], [line[key] for line in lines]
    if key in ("loss", "norm"):  # None: it was not finite
        axes.plot(steps, values, ".-", color=BLUE)
        return
    for n, name in enumerate(sorted(set().union(*values))):
        axes.plot(steps, [value.get(name) for value in values], label=name, marker=".",
                  color=f"C{n % 10}", linestyle="-" if n < 10 else "--")
    if lines:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def training_figure(lines):
    panels = {"loss": "training loss, per answer token",
              "held_out": "held-out loss, per answer token",
              "norm": "gradient norm before clipping (red: an update left out)",
              "lr": "learning rates"}
    figure = Figure((12, 6.6), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, panels.items()):
        draw_curves(axes, lines, key)
        axes.set(title=title, xlabel="update")
        if key in ("norm", "lr"):
            axes.set_yscale("log")
        for line in lines:
            if key == "norm" and "non_finite" in line:
                axes.axvline(line["step"], color=RED, linestyle=":")
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of recipe.sh or of train.py")
    out = parser.parse_args(argv).out
    if matplotlib is None:
        sys.exit("plot.py needs matplotlib: pip install -e '.[plot]'")
    try:
        with matplotlib.rc_context(STYLE):
            if (out / "part").exists():
                print(table(out))
                path = out / "scores.svg"
                scores_figure(out).savefig(path, metadata={"Date": None})
            else:
                lines = (out / "metrics.jsonl").read_text("utf-8").split("\n")[:-1]  # whole ones
                path = out / "metrics.png"
                training_figure(list(map(json.loads, lines))).savefig(path, dpi=120)
        print(path)
    except (OSError, ValueError) as error:
        sys.exit(f"plot.py: {error}")


if __name__ == "__main__":
    main()
