"""Probes by others' code: transformers' Whisper encoder, scikit-learn's kNN and regression.

    python tests/recipe/cross_check.py --encoder spectrum whisper-base OUT/encoder \\
        --data suite/drum.jsonl suite/voice.jsonl

Accuracy on the test split, trained on train's clips: of 10 neighbours (cosine, weighted by
distance), and of a logistic regression. A clip's vector is the mean over its own tokens; 1 to 2 s
of silence follow the clip, up to a whole second. The encoder "spectrum" is none: mean and
deviation of the clip's log-mel bands. Its scores tell what a task asks of an encoder. Clips of up
to 28 s. Needs pip install -e '.[test]'.
"""
import argparse
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import WhisperFeatureExtractor, WhisperModel

sys.path.insert(0, str(Path(__file__).parents[2]))
from data import Rows  # noqa: E402

RATE, TOKEN = 16_000, 320  # samples a second, samples a token
BATCH = 16  # clips
JUDGES = {
    "knn": lambda: KNeighborsClassifier(10, metric="cosine", weights="distance"),
    "linear": lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))}


def encode(encoder, extractor, table, clips, size):
    """Means (B, D) of clips padded to `size` samples: transformers takes shorter ones than 30 s
    only if its table of positions (1500, D) is cut to their length."""
    encoder.embed_positions = torch.nn.Embedding.from_pretrained(table[: size // TOKEN])
    encoder.config.max_source_positions = size // TOKEN
    mel = extractor(clips, sampling_rate=RATE, return_tensors="pt", padding="max_length",
                    max_length=size, truncation=False).input_features
    states = encoder(mel).last_hidden_state  # (B, size // TOKEN, D)
    lengths = [max(1, (len(clip) + TOKEN // 2) // TOKEN) for clip in clips]  # tokens
    return [x[:length].mean(0).numpy() for x, length in zip(states, lengths)]


def spectrum(rows):
    """(N, 160): mean and deviation over time of 80 log-mel bands."""
    extractor, vectors = WhisperFeatureExtractor(), []
    for i in range(len(rows)):
        mel = extractor(rows.audio(i, RATE).numpy(), sampling_rate=RATE, return_tensors="np",
                        padding="longest", truncation=False).input_features[0]  # (80, frames)
        vectors.append(np.concatenate([mel.mean(1), mel.std(1)]))
    return np.stack(vectors)


def features(folder, rows):
    """(N, D) of a folder's encoder, one vector a row."""
    encoder = WhisperModel.from_pretrained(folder).get_encoder().eval()
    extractor = WhisperFeatureExtractor(feature_size=encoder.config.num_mel_bins)
    table, lengths, means = encoder.embed_positions.weight.data, {}, [None] * len(rows)
    for i in range(len(rows)):
        clip = rows.audio(i, RATE).numpy()
        seconds = math.ceil(len(clip) / RATE) + 1
        lengths.setdefault(seconds * RATE, []).append((i, clip))
    for size, found in sorted(lengths.items()):
        for at in range(0, len(found), BATCH):
            numbers, clips = zip(*found[at : at + BATCH])
            for i, mean in zip(numbers, encode(encoder, extractor, table, clips, size)):
                means[i] = mean
    return np.stack(means)


@torch.inference_mode()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", nargs="+", required=True,
                        help="whole Whisper folders; the word spectrum")
    parser.add_argument("--data", nargs="+", required=True,
                        help="manifests of one task, a label a clip")
    parser.add_argument("--json", help="write {encoder: {task: {judge: accuracy}}} there")
    args = parser.parse_args(argv)
    scores = {folder: {} for folder in args.encoder}
    for path in args.data:
        rows = Rows([path])
        splits = np.array(rows.splits)[rows.split]
        labels = np.array([rows[i]["label"] for i in range(len(rows))])
        train, test = splits == "train", splits == "test"
        for folder, tasks in scores.items():
            x = spectrum(rows) if folder == "spectrum" else features(folder, rows)
            tasks[rows.tasks[0]] = found = {
                name: judge().fit(x[train], labels[train]).score(x[test], labels[test])
                for name, judge in JUDGES.items()}
            print(f"{rows.tasks[0]}, {folder}: {found['knn']:.3f} / {found['linear']:.3f}",
                  flush=True)
    if args.json:
        Path(f"{args.json}.part").write_text(json.dumps(scores, indent=1) + "\n")
        os.replace(f"{args.json}.part", args.json)


if __name__ == "__main__":
    main()
