"""kNN and linear probe of all class tasks on cached features: ours beside X-ARES's trainer and kNN classes, in one run.

    pip install --no-deps xares pytorch-ignite loguru tqdm
    python tests/benchmark_probe.py --encoder DIR --data suite/*.jsonl [--threads 1]

The same features, splits, epochs, batch and seeds for both. X-ARES gets the features pooled and in memory (by itself it
reads and pools tokens again in every epoch), which spares it most of its work.
"""
import argparse
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import probe  # noqa: E402

RATE, EPOCHS, BATCH = 1e-3, 30, 32
clock = time.perf_counter


class Loader:
    """Batches as X-ARES's trainer takes them: ((features (B, D, 1), lengths), labels, names)."""

    def __init__(self, x, y, rows, shuffle):
        self.x, self.y, self.rows, self.shuffle = x[..., None], y, rows, shuffle

    def __len__(self):
        return -(-len(self.rows) // BATCH)

    def __iter__(self):
        rows = self.rows[torch.randperm(len(self.rows))] if self.shuffle else self.rows
        for r in rows.split(BATCH):
            yield (self.x[r], torch.ones(len(r), dtype=torch.long)), self.y[r], None


def peer(x, y, parts, classes, seeds):
    """(kNN score, seconds, linear scores, seconds of each) by X-ARES."""
    from loguru import logger
    from xares.models.simple import Mlp
    from xares.trainer import KNNTrainer, Trainer

    logger.remove()
    train, valid, test, near = parts
    began = clock()
    score = KNNTrainer(num_classes=classes).train_and_eval(Loader(x, y, near, True), Loader(x, y, test, False))
    times, scores = [clock() - began], []
    for seed in range(seeds):
        torch.manual_seed(seed)
        began = clock()
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(Mlp(x.shape[1], classes), device="cpu", lr=RATE, max_epochs=EPOCHS, ckpt_dir=folder)
            trainer.run(Loader(x, y, train, True), Loader(x, y, valid, False))
            trainer.load_state_dict(torch.load(Path(folder, trainer.ckpt_name)))
            scores.append(trainer.run_inference(Loader(x, y, test, False)))
        times.append(clock() - began)
    return score, times[0], scores, times[1:]


def ours(task, features, encoder, seeds):
    """(scores, seconds) by probe.py."""
    threads = torch.get_num_threads()
    began = clock()
    torch.set_num_threads(1)  # as probe.run does
    s = probe.Settings(hidden=0, epochs=EPOCHS, seeds=seeds, device="cpu")
    result = probe.score(task, features, s, encoder)
    torch.set_num_threads(threads)
    return result, clock() - began


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--encoder", required=True)
    p.add_argument("--data", nargs="+", required=True)
    p.add_argument("--cache", default=probe.Settings.cache)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--threads", type=int, default=2, help="X-ARES's threads (its own default is 2; ours takes 1)")
    p.add_argument("--cpu-time", action="store_true",
                   help="count the process's seconds on all cores, where others use them")
    args = p.parse_args()
    global clock
    clock = time.process_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(args.threads)
    s = probe.Settings(encoder=[args.encoder], data=args.data, cache=args.cache, device="cpu")
    encoder = probe.open_encoder(args.encoder, None)
    mark, total = probe.fingerprint(encoder), torch.zeros(4, dtype=torch.float64)
    print(f"{'task':14s} {'kNN ours':>8s} {'X-ARES':>7s} {'linear ours':>12s} {'X-ARES':>7s}"
          f" | seconds: 1 seed  X-ARES  ratio | {args.seeds} seeds  X-ARES  ratio")
    for task in probe.find_tasks(s, print):
        features = probe.cached_features(encoder, mark, task, s, print)
        x, clip, _ = features
        parts, *others = probe.rotations(task, clip)
        if others or task.spec.metric != "accuracy":
            print(f"{task.name}: left out (folds, or another metric than accuracy)")
            continue
        one, first = ours(task, features, encoder, 1)
        several, second = ours(task, features, encoder, args.seeds)
        y = probe.targets(task, clip)
        with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
            near, near_time, linear, linear_times = peer(x, y, parts, len(task.classes), args.seeds)
        times = torch.tensor([first, near_time + linear_times[0], second, near_time + sum(linear_times)])
        total += times
        print(f"{task.name:14s} {one['knn']:8.3f} {near:7.3f} {several['mlp']:12.3f} {sum(linear) / len(linear):7.3f} |"
              + line(times), flush=True)
    print(f"{'all':51s}  |" + line(total))


def line(times):
    a, b, c, d = times.tolist()
    return f"{a:15.2f} {b:7.2f} {b / a:6.1f} | {c:7.2f} {d:7.2f} {d / c:6.1f}"


if __name__ == "__main__":
    main()
