"""Is a trained encoder a better start? Fine-tunes transformers' Whisper classifier from each
folder, encoder and head, for the same steps on the same clips, each padded to 30 s.

    python tests/finetune.py --encoder whisper-base out/first/encoder \\
        --data suite/drum.jsonl suite/voice.jsonl --json finetune.json

Accuracy on up to --clips clips of the test split; nothing is chosen on it. A seed draws the
new head, the order of the clips and no more. Rates: 1e-3 for the head, --rate for the encoder,
both rising over a tenth of the steps and then falling to 0.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, logging

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import Rows  # noqa: E402

HEAD_RATE = 1e-3
WEIGHT_DECAY = 0.01


class Clips:
    """A manifest's clips of one split, and their classes as numbers."""

    def __init__(self, path, split: str, classes: list[str]):
        self.rows, self.classes = Rows([path], splits={split}), classes

    def __len__(self):
        return len(self.rows)

    def batch(self, extractor, numbers):
        """Row numbers -> mel (B, n_mels, 3000), labels (B,)."""
        audio, labels = [], []
        for i in numbers:
            audio.append(self.rows.audio(i, extractor.sampling_rate).numpy())
            labels.append(self.classes.index(self.rows[i]["label"]))
        mel = extractor(audio, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        return mel.input_features, torch.tensor(labels)


def all_classes(path) -> list[str]:
    rows, labels = Rows([path]), set()
    for i in range(len(rows)):
        labels.add(rows[i]["label"])
    return sorted(labels)


def new_optimizer(model, s):
    """AdamW with a rate of their own for what is new; warm-up, then linear to 0."""
    old, new = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (old if name.startswith("encoder.") else new).append(p)
    groups = [{"params": old, "lr": s.rate}, {"params": new, "lr": HEAD_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    warmup = max(1, s.steps // 10)

    def share(step):
        return min((step + 1) / warmup, (s.steps - step) / s.steps)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def autocast(s):
    return torch.autocast(torch.device(s.device).type, torch.bfloat16, enabled=s.bf16)


def train(model, extractor, clips, seed: int, s) -> list[float]:
    """--steps updates, epoch after epoch -> the losses."""
    optimizer, schedule = new_optimizer(model, s)
    draw, order, losses = np.random.default_rng(seed), [], []
    model.train()
    for step in range(s.steps):
        if len(order) < s.batch:
            order = draw.permutation(len(clips)).tolist()
        numbers, order = order[: s.batch], order[s.batch :]
        mel, labels = clips.batch(extractor, numbers)
        with autocast(s):
            logits = model(mel.to(s.device)).logits
        loss = cross_entropy(logits.float(), labels.to(s.device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 10 == 9:
            print(f"step {step + 1}/{s.steps}  loss {loss.item():.3f}", file=sys.stderr, flush=True)
    return losses


@torch.no_grad()
def accuracy(model, extractor, clips, s) -> float:
    """On the same clips, drawn once, for every folder and seed."""
    model.eval()
    numbers = np.random.default_rng(0).permutation(len(clips))[: s.clips]
    right = 0
    for some in np.array_split(numbers, -(-len(numbers) // s.batch)):
        mel, labels = clips.batch(extractor, some.tolist())
        with autocast(s):
            guesses = model(mel.to(s.device)).logits.argmax(1).cpu()
        right += (guesses == labels).sum().item()
    return right / len(numbers)


def run(folder, path, seed: int, s) -> dict:
    """One fine-tuning, scored."""
    began, classes = time.time(), all_classes(path)
    torch.manual_seed(seed)
    model = AutoModelForAudioClassification.from_pretrained(folder, num_labels=len(classes))
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    model.to(s.device)
    losses = train(model, extractor, Clips(path, "train", classes), seed, s)
    test = Clips(path, "test", classes)
    return {"encoder": folder, "task": Path(path).stem, "seed": seed,
            "accuracy": accuracy(model, extractor, test, s), "test": min(s.clips, len(test)),
            "last losses": round(float(np.mean(losses[-10:])), 3),
            "seconds": round(time.time() - began)}


def table(results) -> str:
    """A line for each folder and task: the seeds' accuracies and their mean."""
    found = {}
    for r in results:
        found.setdefault((r["task"], r["encoder"]), []).append(r["accuracy"])
    lines = [f"{'task':14} {'mean':>6}  seeds"]
    for (task, encoder), scores in sorted(found.items()):
        each = " ".join(f"{score:.3f}" for score in scores)
        lines.append(f"{task:14} {np.mean(scores):6.3f}  {each}  {encoder}")
    return "\n".join(lines)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--encoder", nargs="+", required=True, help="folders")
    p.add_argument("--data", nargs="+", required=True, help="manifests of one task each")
    p.add_argument("--steps", type=int, default=40, help="updates (40 of 8: 320 clips)")
    p.add_argument("--batch", type=int, default=8, help="clips in an update")
    p.add_argument("--clips", type=int, default=128, help="of the test split, at most")
    p.add_argument("--seeds", type=int, default=2)
    p.add_argument("--rate", type=float, default=1e-5, help="of the encoder")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--bf16", action="store_true", help="under autocast")
    p.add_argument("--json", required=True, help="settings and scores, after each run")
    s = p.parse_args()
    logging.set_verbosity_error()  # no list of the decoder's weights, which are not used
    results = []
    for path in s.data:
        for seed in range(s.seeds):
            for folder in s.encoder:
                results.append(run(folder, path, seed, s))
                print(results[-1], file=sys.stderr, flush=True)
                content = {"settings": vars(s), "runs": results}
                Path(s.json).write_text(json.dumps(content, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
