"""What training did to the features: neighbours of test clips and a picture, before and after.

    python tests/look.py --encoder whisper-base OUT/encoder \\
        --data suite/voice.jsonl suite/pitch.jsonl --json look.json --picture look.png

A feature is the mean over a clip's tokens, as in probe.py. Neighbours: the five nearest train
clips (cosine) of ten test clips, drawn once. Picture: the test clips, laid out in two
dimensions by scikit-learn's t-SNE (cosine), a colour for each class.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import Rows  # noqa: E402
from uniwhisper import load_encoder  # noqa: E402

CLIPS, NEIGHBOURS, BATCH = 10, 5, 16


@torch.inference_mode()
def features(encoder, rows: Rows, numbers) -> torch.Tensor:
    """(N, D) of the rows with these numbers, of length 1; short clips first."""
    found = {}
    numbers = sorted(numbers, key=lambda i: rows.seconds[i])
    for n in range(0, len(numbers), BATCH):
        some = numbers[n : n + BATCH]
        audio = [rows.audio(i, encoder.sample_rate) for i in some]
        samples = torch.tensor([len(a) for a in audio])
        found.update(zip(some, encoder.pooled(pad_sequence(audio, True), samples)))
    x = torch.stack([found[i] for i in sorted(found)])
    return torch.nn.functional.normalize(x, dim=1)


def look(encoder, path) -> dict:
    """Labels, neighbours and places of a manifest's test clips."""
    from sklearn.manifold import TSNE

    rows = Rows([path], splits={"train", "test"})
    train, test = rows.where("train").tolist(), rows.where("test").tolist()
    x, y = features(encoder, rows, train), features(encoder, rows, test)
    labels = [rows[i]["label"] for i in test]
    near = (y @ x.T).topk(NEIGHBOURS).indices.tolist()
    neighbours = []
    for i in np.random.default_rng(0).permutation(len(test))[:CLIPS].tolist():
        names = [rows[train[j]]["label"] for j in near[i]]
        neighbours.append({"clip": rows[test[i]]["audio"], "label": labels[i], "nearest": names})
    layout = TSNE(metric="cosine", init="random", random_state=0,
                  perplexity=min(30, len(test) / 4))
    places = layout.fit_transform(y.double().numpy()).round(2).tolist()
    return {"labels": labels, "places": places, "neighbours": neighbours}


def draw(found: dict):
    """A row of panels for each manifest, a column for each encoder."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure((8.33, 4 * len(found)), layout="constrained")
    grid = figure.subplots(len(found), len(next(iter(found.values()))), squeeze=False)
    for panels, (name, encoders) in zip(grid, found.items()):
        for axes, (encoder, seen) in zip(panels, encoders.items()):
            classes, places = sorted(set(seen["labels"])), np.array(seen["places"])
            for n, label in enumerate(classes):
                of_label = np.array(seen["labels"]) == label
                colour = colormaps["turbo"](n / max(1, len(classes) - 1))
                axes.scatter(*places[of_label].T, 8, color=colour, label=label)
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"{name}, {encoder}", loc="left", fontsize=9)
        panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7, frameon=False)
    return figure


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--encoder", nargs="+", required=True, help="folders")
    p.add_argument("--names", nargs="+", help="what to call them (the folders' paths)")
    p.add_argument("--data", nargs="+", required=True, help="manifests of one class a clip")
    p.add_argument("--json", required=True)
    p.add_argument("--picture", help="needs matplotlib")
    s = p.parse_args()
    names = s.names or s.encoder
    if len(names) != len(s.encoder):
        p.error(f"{len(s.encoder)} encoders, but {len(names)} --names")
    found = {Path(path).stem: {} for path in s.data}
    for folder, name in zip(s.encoder, names):
        encoder = load_encoder(folder).eval()
        for path in s.data:
            found[Path(path).stem][name] = look(encoder, path)
            print(f"{name}: {path}", file=sys.stderr, flush=True)
    Path(s.json).write_text(json.dumps(found, ensure_ascii=False) + "\n")
    if s.picture:
        draw(found).savefig(s.picture, dpi=100)
    for name, encoders in found.items():
        print(f"\n| {name} | {' | '.join(encoders)} |\n{'| --- ' * (1 + len(encoders))}|")
        for clips in zip(*(seen["neighbours"] for seen in encoders.values())):
            nearest = [", ".join(clip["nearest"]) for clip in clips]
            print(f"| {clips[0]['label']} | {' | '.join(nearest)} |")


if __name__ == "__main__":
    main()
