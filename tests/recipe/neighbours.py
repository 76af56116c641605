"""Nearest neighbours by others' code: transformers' Whisper encoder and scikit-learn's kNN.

    python tests/recipe/neighbours.py --encoder whisper-base OUT/encoder --data suite/*.jsonl

Accuracy on the test split of 10 neighbours (cosine, weighed by distance) among train's clips.
A clip's vector is the mean over its own tokens; silence pads it to the next multiple of 2 s.
Needs pip install -e '.[test]'.
"""
import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier
from transformers import WhisperFeatureExtractor, WhisperModel

sys.path.insert(0, str(Path(__file__).parents[2]))
from data import Rows  # noqa: E402

RATE, TOKEN = 16_000, 320  # samples a second, samples a token
BATCH = 16  # clips


def encode(encoder, extractor, table, clips, size):
    """Means (B, D) of clips padded to `size` samples: transformers takes shorter ones than 30 s
    only if its table of positions (1500, D) is cut to their length."""
    encoder.embed_positions = torch.nn.Embedding.from_pretrained(table[: size // TOKEN])
    encoder.config.max_source_positions = size // TOKEN
    mel = extractor(clips, sampling_rate=RATE, return_tensors="pt", padding="max_length",
                    max_length=size, truncation=False).input_features
    states = encoder(mel).last_hidden_state  # (B, size // TOKEN, D)
    return [x[: -(-len(clip) // TOKEN)].mean(0).numpy() for clip, x in zip(clips, states)]


def features(folder, rows):
    """(N, D) of a folder's encoder, one vector a row."""
    encoder = WhisperModel.from_pretrained(folder).get_encoder().eval()
    extractor = WhisperFeatureExtractor(feature_size=encoder.config.num_mel_bins)
    table, lengths, means = encoder.embed_positions.weight.data, {}, [None] * len(rows)
    for i in range(len(rows)):
        clip, block = rows.audio(i, RATE).numpy(), 2 * RATE
        lengths.setdefault(-(-len(clip) // block) * block, []).append((i, clip))
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
    parser.add_argument("--encoder", nargs="+", required=True, help="whole Whisper folders")
    parser.add_argument("--data", nargs="+", required=True, help="manifests with a label a clip")
    parser.add_argument("--json", help="write {encoder: {task: accuracy}} there")
    args = parser.parse_args(argv)
    scores = {folder: {} for folder in args.encoder}
    for path in args.data:
        rows = Rows([path])
        splits = np.array(rows.splits)[rows.split]
        labels = np.array([rows[i]["label"] for i in range(len(rows))])
        train, test = splits == "train", splits == "test"
        for folder, tasks in scores.items():
            x = features(folder, rows)
            knn = KNeighborsClassifier(10, metric="cosine", weights="distance")
            tasks[Path(path).stem] = knn.fit(x[train], labels[train]).score(x[test], labels[test])
            print(f"{Path(path).stem}, {folder}: {tasks[Path(path).stem]:.3f}", flush=True)
    if args.json:
        Path(f"{args.json}.part").write_text(json.dumps(scores, indent=1) + "\n")
        os.replace(f"{args.json}.part", args.json)


if __name__ == "__main__":
    main()
