"""What recipe.sh chooses: a share by its rule, and the clips that are encoded at 30 s, too.

    python tests/recipe/choose.py share valid/untouched.json valid/share-*.json  # prints 0.5
    python tests/recipe/choose.py clips TRAIN TEST OUT suite/*.jsonl
"""
import argparse
import json
import os
import random
import re
import sys
from pathlib import Path

OTHERS = ("command_flite", "letters_language")  # of the valid splits that training does not hear
MOST_LOST = 0.02  # of a score of OTHERS


def mean(values):
    return sum(values) / len(values)


def read_tasks(path):
    """task -> scores of the one encoder in a file of probe.py --json."""
    encoder, = json.loads(Path(path).read_text())["encoders"].values()
    return encoder["tasks"]


def valid_score(tasks):
    """{task: {"knn": score or None, "mlp": score}} -> the mean of two means: over the suite's
    tasks and over OTHERS, averaged over kNN (where a task has it) and MLP."""
    means = []
    for probe in ("knn", "mlp"):
        found = {name: task[probe] for name, task in tasks.items() if task[probe] is not None}
        others = [found.pop(name) for name in OTHERS if name in found]
        means += [mean(scores) for scores in (found.values(), others) if scores]
    return mean(means)


def lost(tasks, untouched):
    """The most that a score of OTHERS lies below the untouched encoder's."""
    return max((untouched[name][probe] - tasks[name][probe] for name in OTHERS if name in tasks
                for probe in ("knn", "mlp")), default=0.0)


def choose_share(untouched, paths):
    """The share of the file of the highest score, of those that lose no more than MOST_LOST:
    valid/share-0.5.json -> "0.5". Of equals the nearest to the untouched encoder; if all lose
    more, the one that loses least."""
    untouched, kept, losses = read_tasks(untouched), {}, {}
    for path in paths:
        share, tasks = re.fullmatch(r"share-(.*)\.json", Path(path).name)[1], read_tasks(path)
        score, losses[share] = valid_score(tasks), lost(tasks, untouched)
        if losses[share] <= MOST_LOST:
            kept[share] = score
        print(f"valid, share {share}: {score:.4f}, loses {losses[share]:.4f}", file=sys.stderr)
    if not kept:
        return min(sorted(losses, key=float), key=losses.get)
    return max(sorted(kept, key=float), key=kept.get)


def choose_clips(path, out, limits):
    """Copy a manifest into `out` with at most limits[split] rows of a split, the same each time;
    the clips stay where they are."""
    rows = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
    kept = []
    for split, limit in limits.items():
        places = [i for i, row in enumerate(rows) if row["split"] == split]
        kept += random.Random(0).sample(places, min(limit, len(places)))
    with open(out / Path(path).name, "w", encoding="utf-8") as file:
        for i in sorted(kept):
            audio = os.path.relpath(Path(path).parent / rows[i]["audio"], out)
            file.write(json.dumps(rows[i] | {"audio": audio}, ensure_ascii=False) + "\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    share = commands.add_parser("share", help="print the share that recipe.sh's rule chooses")
    share.add_argument("untouched", help="JSON of probe.py --on valid")
    share.add_argument("json", nargs="+", help="the same of DIR/share-SHARE.json")
    clips = commands.add_parser("clips", help="write manifests with fewer rows")
    clips.add_argument("train", type=int, help="most clips of train")
    clips.add_argument("test", type=int, help="most clips of test, and of valid")
    clips.add_argument("out", type=Path)
    clips.add_argument("data", nargs="+", help="manifests")
    args = parser.parse_args(argv)
    if args.command == "share":
        print(choose_share(args.untouched, args.json))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for path in args.data:
        choose_clips(path, args.out, {"train": args.train, "valid": args.test, "test": args.test})


if __name__ == "__main__":
    main()
