"""Draws README's pictures of results, and the curves of a training run.

    python tests/recipe/plot.py OUT    OUT/metrics.png from the OUT/metrics.jsonl of a run of
                                train.py --out OUT
    python tests/recipe/plot.py SCORES.json    SCORES.png from probe.py --json SCORES.json
    python tests/recipe/plot.py RECIPE         RECIPE/scores.svg, RECIPE/heard.svg from the JSON files
                                        of recipe.sh; without RECIPE in tests/results/recipe/

Needs matplotlib. (tests/results/method.svg is written by hand.)
"""
import argparse
import json
import math
import sys
from pathlib import Path

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter
except ImportError:
    matplotlib = None

RECIPE = Path(__file__).parents[1] / "results/recipe"
PROBES = {"knn": "kNN", "mlp": "MLP probe"}  # key in the JSON files, name

# Colours that colour-blind readers can tell apart (Okabe and Ito).
BLUE, RED, GREY = "#0072B2", "#D55E00", "#707070"
COLOURS = [BLUE, "#E69F00", "#009E73", RED, "#CC79A7", "#56B4E9", "black"]
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "grid.color": "#e4e4e4", "axes.axisbelow": True,
         "legend.frameon": False,
         "svg.hashsalt": "uniwhisper"}  # equal numbers make equal files
WIDTH = 8.33  # inches: 800 pixels, about the width of a README


def headings(figure, title: str, note: str = "") -> None:
    figure.suptitle(title, weight="bold", fontsize=11)
    figure.supxlabel(note, fontsize=8.5, color=GREY)


# ---------------------------------------------------------------- recipe.sh: scores.svg, heard.svg

SUITE = ["language", "speaker_count", "voice", "command", "instrument", "pitch", "drum",
         "game_sound", "tagging", "caption"]
OTHERS = ["command_festival", "letters_language", "game_sound_other"]
HOURS_EACH = 12.7 / 3000  # of audio, in one of recipe.sh's updates


def in_turn(path: Path) -> list[dict]:
    """Task -> scores, for each encoder of a file of probe.py --json."""
    found = json.loads(path.read_text(encoding="utf-8"))["encoders"]
    return [encoder["tasks"] for encoder in found.values()]


def scores_figure(folder: Path) -> "Figure":
    """Every task: untouched at own length, at 30 s, and each seed."""
    own_length, *trained = in_turn(folder / "scores.json")
    padded, = in_turn(folder / "padded.json")
    figure = Figure((WIDTH, 5.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, probe in zip(panels, PROBES):
        scores_panel(axes, probe, own_length, padded, trained)
    panels[0].set_yticks([*range(10), 11, 12, 13], SUITE + OTHERS)
    panels[0].invert_yaxis()
    panels[0].legend(loc="center right", bbox_to_anchor=(1, 0.335), fontsize=8)
    headings(figure, "The suite, and below it what training did not hear: other voices, "
             "tasks, games", "test splits; tagging: mAP, caption: recall@1, else accuracy; the "
             "number: averaged, minus the better of the two untouched")
    return figure


def scores_panel(axes, probe: str, own_length, padded, trained) -> None:
    for task, row in zip(SUITE + OTHERS, [*range(10), 11, 12, 13]):
        before, at_30s = own_length[task][probe], padded[task][probe]
        if before is None:  # captions have no neighbours
            continue
        after = [tasks[task][probe] for tasks in trained]
        mean, better = sum(after) / len(after), max(before, at_30s)
        axes.barh(row, mean - better, 0.14, left=better, color=BLUE, alpha=0.35)
        axes.scatter(before, row, 30, facecolors="white", edgecolors=GREY)
        axes.scatter(at_30s, row, 160, marker="|", color="black")
        axes.scatter(after, [row] * len(after), 20, color=BLUE, zorder=3)
        colour = RED if mean - better < -0.0005 else "black"
        axes.text(1.06, row, f"{mean - better:+.3f}", va="center", color=colour)
    axes.scatter([], [], 30, facecolors="white", edgecolors=GREY, label="untouched")
    axes.scatter([], [], 160, marker="|", color="black", label="untouched, at 30 s")
    axes.scatter([], [], 20, color=BLUE, label="averaged" + ", each seed" * (len(trained) > 1))
    axes.axhline(10, color=GREY, linewidth=0.6)
    axes.grid(axis="y", visible=False)
    axes.set(xlim=(0, 1.03), ylim=(-0.6, 13.6))
    axes.set_title(PROBES[probe], loc="left", weight="bold")


def heard_figure(folder: Path) -> "Figure":
    """The first seed on valid: scores against audio heard, words against the share."""
    figure = Figure((WIDTH, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    updates = {"untouched": 0, "after-1000": 1000, "after-2000": 2000, "share-1": 3000}
    hours = [HOURS_EACH * n for n in updates.values()]
    tables = [in_turn(folder / f"valid/{name}.json")[0] for name in updates]
    for (probe, name), colour in zip(PROBES.items(), (BLUE, RED)):
        for tasks, line in ((SUITE, "-"), (["letters_language"], ":")):
            curve = [mean_score(table, tasks, probe) for table in tables]
            of = "suite" if tasks is SUITE else tasks[0]
            left.plot(hours, curve, line, marker=".", color=colour, label=f"{of}, {name}")
    shares = {"untouched": 0, "share-0.5": 0.5, "share-0.75": 0.75, "share-1": 1}
    for manifest, colour in (("transcribe", BLUE), ("transcribe_dutch", RED)):
        rates = []
        for name in shares:
            words = json.loads((folder / f"valid/{name}-words.json").read_text())[manifest]
            encoder, = (v for v in words.values() if isinstance(v, dict))
            rates.append(encoder["30s"]["wer"])
        right.plot(list(shares.values()), rates, marker=".", color=colour, label=manifest)
    left.set(xlabel="hours of audio heard", title="scores at own length, not averaged")
    right.set(xlabel="share of the way from untouched to trained (--blend)", ylim=(0, None),
              title="word error rate under Whisper's decoder, 30 s")
    left.legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.2))
    left.set_ylim(0.35)  # room for the legend
    right.legend(fontsize=8, loc="lower right")
    headings(figure, "What more audio does, and averaging with the untouched weights "
             "(valid splits)", "left: but for the last point, the rates have not yet decayed")
    return figure


def mean_score(table: dict, tasks: list[str], probe: str) -> float:
    """Plain mean, without captions where they have no neighbours."""
    scores = [table[task][probe] for task in tasks if table[task][probe] is not None]
    return sum(scores) / len(scores)


# ---------------------------------------------------------------- a run's metrics.png

def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, but for one still being written. OSError, ValueError."""
    if not path.is_file():
        raise OSError(f"{path}: no such file; give the folder that "
                      "train.py wrote to (--out)")
    lines = []
    complete = path.read_text(encoding="utf-8").split("\n")[:-1]
    for number, line in enumerate(complete, 1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}, line {number}: not JSON: {line[:40]!r}") from None
    if not lines:
        raise ValueError(f"{path}: empty; wait for the run's "
                         "first report")
    return lines


def draw_value(axes, lines: list[dict], key: str) -> None:
    lines = [line for line in lines if key in line]
    steps = [line["step"] for line in lines]
    values = [line[key] for line in lines]  # None: it was not finite
    axes.plot(steps, values, ".-", color=BLUE)


def draw_each(axes, lines: list[dict], key: str) -> None:
    """A curve for each name (task or part of the model) under this key."""
    lines = [line for line in lines if key in line]
    steps = [line["step"] for line in lines]
    names = sorted({name for line in lines for name in line[key]})
    for n, name in enumerate(names):
        values = [line[key].get(name, math.nan) for line in lines]
        axes.plot(steps, values, marker=".", color=COLOURS[n % 7],
                  linestyle=["-", "--", ":"][n // 7 % 3], label=name)
    if names:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def training_figure(lines: list[dict]) -> "Figure":
    panels = [
        ("loss", draw_value, "training loss, per answer token"),
        ("held_out", draw_each, "held-out loss, per answer token"),
        ("norm", draw_value, "gradient norm before clipping (red: an update left out)"),
        ("lr", draw_each, "learning rates"),
    ]
    figure = Figure((12, 6.6), layout="constrained")
    for axes, (key, draw, title) in zip(figure.subplots(2, 2).flat, panels):
        draw(axes, lines, key)
        axes.set(title=title, xlabel="update")
        if key in ("norm", "lr"):
            axes.set_yscale("log")
        if key == "norm":
            axes.yaxis.set_major_formatter(LogFormatter())
            axes.yaxis.set_minor_formatter(LogFormatter())
            mark_left_out(axes, lines)
    return figure


def mark_left_out(axes, lines: list[dict]) -> None:
    """A red line at each update that a non-finite loss or gradient stopped."""
    for line in lines:
        if "non_finite" in line:
            axes.axvline(line["step"], color=RED, linestyle=":")


# ---------------------------------------------------------------- command line

def draw_recipe(folder: Path, out: Path) -> None:
    for name, figure in (("scores", scores_figure), ("heard", heard_figure)):
        figure(folder).savefig(out / f"{name}.svg", metadata={"Date": None})


def draw_run(folder: Path) -> None:
    figure = training_figure(read_metrics(folder / "metrics.jsonl"))
    figure.savefig(folder / "metrics.png", dpi=120)


def draw_scores(path: Path) -> None:
    """Bars for each task and encoder of a file of probe.py --json, kNN above MLP."""
    encoders = json.loads(path.read_text())["encoders"]
    tasks = list(next(iter(encoders.values()))["tasks"])
    width = 0.8 / len(encoders)
    figure = Figure(figsize=(2 + 0.4 * len(tasks) * (1 + len(encoders)), 7))
    axes = figure.subplots(2, sharex=True)
    for axis, (key, title) in zip(axes, PROBES.items()):
        for e, (name, scores) in enumerate(encoders.items()):
            places = [t + width * (e + 0.5) - 0.4 for t in range(len(tasks))]
            heights = [scores["tasks"][task][key] or 0 for task in tasks]
            axis.bar(places, heights, width, label=name)
        axis.set(ylabel=title, ylim=(0, 1))
    axes[0].legend(frameon=False)
    axes[1].set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
    figure.savefig(path.with_suffix(".png"), bbox_inches="tight", dpi=120)
    print(path.with_suffix(".png"))


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT", default=RECIPE,
                        help="folder of a training run or of recipe.sh, or scores of "
                             "probe.py --json; without it README's pictures are drawn")
    out = parser.parse_args(argv).out
    if matplotlib is None:
        sys.exit("plot.py needs matplotlib: pip install matplotlib")
    try:
        with matplotlib.rc_context(STYLE):
            if out.suffix == ".json":
                draw_scores(out)
            elif (out / "scores.json").exists():
                draw_recipe(out, out)
            else:
                draw_run(out)
    except (OSError, ValueError) as error:
        sys.exit(f"plot.py: {error}")


if __name__ == "__main__":
    main()
