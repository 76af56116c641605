"""Draws README's pictures of results, and the curves of a training run.

    python tests/plot.py        keep.svg, results.svg, hours.svg, ablations.svg in
                                tests/results/ from the JSON files there
    python tests/plot.py OUT    OUT/metrics.png from the OUT/metrics.jsonl of a run of
                                train.py --out OUT
    python tests/plot.py SCORES.json    SCORES.png from probe.py --json SCORES.json

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

RESULTS = Path(__file__).parent / "results"
PROBES = {"knn": "kNN", "mlp": "MLP probe"}  # key in the JSON files, name
TASKS = ["language", "speaker_count", "voice", "command",
         "instrument", "pitch", "drum", "game_sound"]
SEEDS = ["seed 0", "seed 1", "seed 2"]
ON_THE_WAY = [1000, 2000, 3000]  # updates after which seed 0 was probed

# Updates -> hours of audio heard: README, "How far more updates go".
HOURS = {150: 1.3, 400: 1.8, 600: 5.1, 1000: 8.5, 1100: 9.3,
         1200: 10.1, 2000: 16.9, 3000: 25.3, 4000: 33.8}

# Key in ablations.json, name in the picture.
CHANGES = {
    "loss: mean over answer tokens":
        "loss: mean over answer tokens, not clips",
    "so padded in training and probing":
        "clips padded to the next 2 s, train and probe",
    "tasks by the square root of their size":
        "tasks by the square root of their size",
    "4 tokens stacked":
        "adapter stacks 4 tokens, not 8",
    "without transcription":
        "without transcription",
    "2 tokens stacked":
        "adapter stacks 2 tokens, not 8",
    "encoder rate 3e-4 instead of 1.5e-4":
        "encoder's learning rate 3e-4, not 1.5e-4",
    "no updates of the adapter alone at the start":
        "adapter not trained alone at the start",
}

# Colours that colour-blind readers can tell apart (Okabe and Ito).
BLUE, RED, GREY = "#0072B2", "#D55E00", "#707070"
COLOURS = [BLUE, "#E69F00", "#009E73", RED, "#CC79A7", "#56B4E9", "black"]
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "grid.color": "#e4e4e4", "axes.axisbelow": True,
         "legend.frameon": False,
         "svg.hashsalt": "uniwhisper"}  # equal numbers make equal files
WIDTH = 8.33  # inches: 800 pixels, about the width of a README


# ---------------------------------------------------------------- scores

def load(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def encoders(name: str, key: str = "probe") -> dict:
    """Encoder -> task -> scores, from one table of one JSON file."""
    table = load(name)[key]["encoders"]
    return {encoder: table[encoder]["tasks"] for encoder in table}


def untouched() -> tuple[dict, dict]:
    """whisper-base's scores on clips at own length, on clips padded to 30 s; bf16."""
    own_length = encoders("recipe.json")["whisper-base"]
    return own_length, load("contexts.json")["30 s, bf16, hidden 256"]


def plain_mean(tasks: dict, probe: str) -> float:
    return sum(tasks[task][probe] for task in TASKS) / len(TASKS)


def headings(figure, title: str, note: str = "") -> None:
    figure.suptitle(title, weight="bold", fontsize=11)
    figure.supxlabel(note, fontsize=8.5, color=GREY)


# ---------------------------------------------------------------- keep.svg

SUITE = ["language", "speaker_count", "voice", "command", "instrument", "pitch", "drum",
         "game_sound", "tagging", "caption"]
OTHERS = ["command_festival", "letters_language", "game_sound_other"]


def keep_figure() -> "Figure":
    figure = Figure((WIDTH, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, probe in ((left, "knn"), (right, "mlp")):
        keep_panel(axes, probe)
    left.set_yticks([*range(10), 11, 12, 13], SUITE + OTHERS)
    left.invert_yaxis()
    left.legend(loc="center right", bbox_to_anchor=(1, 0.335), fontsize=8)
    run = load("keep.json")
    headings(figure, "The suite, and below it what training did not hear: other voices, "
                     "tasks, games", f"whisper-base, {run['updates']:,} updates, weights at "
             f"{run['blend']} of the way, one seed; test splits; tagging: mAP, caption: "
             "recall@1, else accuracy")
    return figure


def keep_panel(axes, probe: str) -> None:
    suite, others = encoders("keep.json"), encoders("keep.json", "transfer")
    for task, row in zip(SUITE + OTHERS, [*range(10), 11, 12, 13]):
        table = others if task in OTHERS else suite
        padded = table["untouched, 30 s"].get(task)  # not of every task
        before, after = (table[name][task][probe] for name in ("untouched", "seed 0"))
        if before is None:
            continue
        axes.barh(row, after - before, 0.14, left=before, color=BLUE, alpha=0.35)
        axes.scatter(before, row, 30, facecolors="white", edgecolors=GREY)
        axes.scatter(after, row, 20, color=BLUE, zorder=3)
        if padded and padded[probe] is not None:
            axes.scatter(padded[probe], row, 160, marker="|", color="black")
        gain = after - before
        axes.text(1.06, row, f"{gain:+.3f}", va="center",
                  color=RED if gain < -0.0005 else "black")
    axes.scatter([], [], 30, facecolors="white", edgecolors=GREY, label="untouched")
    axes.scatter([], [], 160, marker="|", color="black", label="untouched, at 30 s")
    axes.scatter([], [], 20, color=BLUE, label="half-way")
    axes.axhline(10, color=GREY, linewidth=0.6)
    axes.grid(axis="y", visible=False)
    axes.set(xlim=(0, 1.03), ylim=(-0.6, 13.6))
    axes.set_title(PROBES[probe], loc="left", weight="bold")


# ---------------------------------------------------------------- results.svg

def results_figure() -> "Figure":
    figure = Figure((WIDTH, 4.7), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    knn_gain = results_panel(left, "knn")
    mlp_gain = results_panel(right, "mlp")
    own_length, _ = untouched()
    clips = [own_length[task]["test"] for task in TASKS]
    names = [f"{task} ({n:,})" for task, n in zip(TASKS, clips)]
    left.set_yticks([*range(8), 8.5], names + ["plain mean"])
    left.invert_yaxis()
    left.set_xlabel("accuracy on the test split (clips in brackets)")
    right.set_xlabel("accuracy; gain: the seeds' mean minus 30 s")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, markerscale=0.8)
    headings(figure, "Over untouched Whisper at 30 s, the plain mean gains "
                     f"{knn_gain:.3f} (kNN) and {mlp_gain:.3f} (MLP)")
    return figure


def results_panel(axes, probe: str) -> float:
    """Draws the eight tasks and their plain mean; returns the mean's gain."""
    def scores(tasks):
        return [tasks[task][probe] for task in TASKS] + [plain_mean(tasks, probe)]

    own_length, padded = untouched()
    trained = encoders("recipe.json")
    rows = [*range(8), 8.5]
    axes.scatter(scores(own_length), rows, 30, facecolors="white", edgecolors=GREY,
                 label="untouched, own length")
    axes.scatter(scores(padded), rows, 420, marker="|", color="black", linewidths=2.5,
                 label="untouched, padded to 30 s")
    for seed, shift in zip(SEEDS, (-0.2, 0, 0.2)):
        axes.scatter(scores(trained[seed]), [row + shift for row in rows], 18,
                     color=BLUE, zorder=3)
    axes.scatter([], [], 18, color=BLUE, label="trained, own length: seeds 0, 1, 2")

    all_seeds = [scores(trained[seed]) for seed in SEEDS]
    for row, start, *ends in zip(rows, scores(padded), *all_seeds):
        gain = sum(ends) / len(ends) - start
        axes.barh(row, gain, 0.12, left=start, color=BLUE, alpha=0.35)
        colour = RED if gain < -0.0005 else "black"
        axes.text(1.06, row, f"{gain:+.3f}", va="center", color=colour)
    axes.text(1.06, -0.8, "gain", va="center", color=GREY)
    axes.axhline(7.75, color=GREY, linewidth=0.6)
    axes.grid(axis="y", visible=False)
    axes.set(xlim=(0.15, 1.03), ylim=(-0.6, 9))
    axes.set_title(PROBES[probe], loc="left", weight="bold")
    return gain


# ---------------------------------------------------------------- hours.svg

def other_runs() -> list[tuple]:
    """Runs with other settings: updates, what, the letter's offset, scores of each seed."""
    first = load("ablations.json")["the recipe, 150 updates"]["probe"]
    second = load("first_run.json")["probes"]["trained"]["tasks"]
    third = load("recipe_600.json")["probe"]["trained"]["tasks"]
    twice = encoders("recipe_1100.json")
    mixture = encoders("mixture.json")
    return [
        (150, "150 updates, pitch twice as often", (-7, -6), [first]),
        (400, "400, first settings, at most 1.8 h, fp32", (9, -2), [second]),
        (600, "600, fp32", (-9, 0), [third]),
        (1100, "1,100, pitch twice as often, two seeds", (-9, 0),
         [twice["seed 0"], twice["seed 1"]]),
        (1200, "1,200, another mixture, two seeds", (9, 3),
         [mixture["seed 0"], mixture["seed 1"]]),
    ]


def hours_figure() -> "Figure":
    figure = Figure((WIDTH, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, probe in ((left, "knn"), (right, "mlp")):
        draw_baselines(axes, probe)
        draw_other_runs(axes, probe)
        draw_recipe(axes, probe)
        axes.set(xlim=(-1, 36), ylim=(0.49, 0.71))
        axes.set_xlabel("hours of audio heard in training")
        axes.set_title(PROBES[probe], loc="left", weight="bold")
    left.set_ylabel("plain mean of eight tasks")
    right.legend(loc="lower right")
    a, b, c, d, e = [what for _, what, _, _ in other_runs()]
    headings(figure, "More audio, higher scores: seed 0 rises with each thousand updates",
             "On the way the learning rates have not yet decayed. "
             "Grey: runs that ended there, settings differ:\n"
             f"a  {a};  b  {b};  c  {c};\nd  {d};  e  {e}")
    return figure


def draw_baselines(axes, probe: str) -> None:
    own_length, padded = untouched()
    for tasks, name, colour, line in ((own_length, "own length", GREY, "--"),
                                      (padded, "30 s", "black", "-")):
        score = plain_mean(tasks, probe)
        axes.axhline(score, color=colour, linestyle=line)
        axes.text(35.8, score + 0.002, f"untouched, {name}", ha="right", color=colour)


def draw_other_runs(axes, probe: str) -> None:
    for letter, (updates, _, offset, seeds) in zip("abcde", other_runs()):
        ends = [plain_mean(tasks, probe) for tasks in seeds]
        hours = HOURS[updates]
        axes.plot([hours] * len(ends), ends, "-D", color="#b0b0b0", markersize=4.5)
        axes.annotate(letter, (hours, max(ends)), offset, color=GREY, ha="center",
                      va="center", textcoords="offset points")


def draw_recipe(axes, probe: str) -> None:
    """The runs of 4,000 updates: seed 0 on its way, the ends of all seeds."""
    on_the_way = encoders("recipe.json", "probe during training")
    trained = encoders("recipe.json")
    ends = [plain_mean(trained[seed], probe) for seed in SEEDS]
    hours = [0]
    curve = [plain_mean(trained["whisper-base"], probe)]
    for updates in ON_THE_WAY:
        hours.append(HOURS[updates])
        curve.append(plain_mean(on_the_way[f"seed 0, after update {updates}"], probe))
    axes.plot(hours + [HOURS[4000]], curve + ends[:1], color=BLUE)
    axes.scatter(hours[1:], curve[1:], 32, facecolors="white",
                 edgecolors=BLUE, zorder=3,
                 label="seed 0 after 1,000, 2,000, 3,000 updates")
    axes.scatter([HOURS[4000]] * len(ends), ends, 32, color=BLUE, zorder=3,
                 label="4,000 updates, seeds 0, 1, 2")


# ---------------------------------------------------------------- ablations.svg

def seed_difference(name: str) -> list[float]:
    """By how much the plain means of a file's seeds differ at most: kNN, MLP."""
    found = encoders(name)
    differences = []
    for probe in PROBES:
        means = [plain_mean(found[seed], probe) for seed in SEEDS if seed in found]
        differences.append(max(means) - min(means))
    return differences


def ablations_figure() -> "Figure":
    figure = Figure((WIDTH, 4.3), layout="constrained")
    axes = figure.subplots()
    noise = max(seed_difference("mixture.json"))
    smaller = seed_difference("recipe_1100.json") + seed_difference("recipe.json")
    axes.axvspan(-noise, noise, color="#e4e4e4")
    axes.axvline(0, color="black", linewidth=1)

    runs = load("ablations.json")
    unchanged = runs["the recipe, 150 updates"]["probe"]
    changed = [runs[key]["probe"] for key in CHANGES]
    changed.append(runs["untouched"])
    rows = [*range(len(CHANGES)), len(CHANGES) + 0.4]
    for probe, marker, colour, shift in (("knn", "o", BLUE, -0.13),
                                         ("mlp", "s", RED, 0.13)):
        zero = plain_mean(unchanged, probe)
        differences = [plain_mean(tasks, probe) - zero for tasks in changed]
        axes.scatter(differences, [row + shift for row in rows], 34, marker=marker,
                     color=colour, label=PROBES[probe], zorder=3)
    axes.set_yticks(rows, [*CHANGES.values(), "not trained at all"])
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xlim(-0.046, 0.034)
    axes.set_xlabel("plain mean of eight tasks, minus that of the unchanged run")
    axes.legend(loc="upper left", borderaxespad=0.1, handletextpad=0.2)
    headings(figure, "150 updates, one thing changed, one seed each: no gain beyond seed noise",
             f"Grey: ±{noise:.3f}, the largest difference between two seeds "
             "(1,200 updates, mixture.json);\nin the runs of 1,100 and 4,000 updates "
             f"{min(smaller):.3f} to {max(smaller):.3f}. Each change was run once.")
    return figure


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
    if any("knn" in line for line in lines):
        panels.append(("knn", draw_each, "kNN on held-out clips"))
    rows = math.ceil(len(panels) / 2)
    figure = Figure((12, 3.3 * rows), layout="constrained")
    for n, (key, draw, title) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, 2, n)
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

def draw_results(folder: Path) -> None:
    for name, figure in (("keep", keep_figure),
                         ("results", results_figure),
                         ("hours", hours_figure),
                         ("ablations", ablations_figure)):
        figure().savefig(folder / f"{name}.svg", metadata={"Date": None})


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
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT",
                        help="folder of a training run, or scores of probe.py "
                             "--json; without it README's pictures are drawn")
    out = parser.parse_args(argv).out
    if matplotlib is None:
        sys.exit("plot.py needs matplotlib: pip install matplotlib")
    try:
        with matplotlib.rc_context(STYLE):
            if out and out.suffix == ".json":
                draw_scores(out)
            elif out:
                draw_run(out)
            else:
                draw_results(RESULTS)
    except (OSError, ValueError) as error:
        sys.exit(f"plot.py: {error}")


if __name__ == "__main__":
    main()
