"""kNN and linear probe of all class tasks on cached features: ours beside X-ARES's trainer and
kNN classes, in one run.

    pip install --no-deps xares pytorch-ignite loguru tqdm
    python tests/benchmark_probe.py --encoder DIR --data suite/*.jsonl [--threads 1]

The same features, splits, epochs, batch and seeds for both. X-ARES gets the features pooled and
in memory (by itself it reads and pools tokens again in every epoch), which spares it most of
its work.
"""
import argparse
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import probe  # noqa: E402

RATE, EPOCHS, BATCH = 1e-3, 30, 32


class Loader:
    """Batches as X-ARES's trainer takes them: ((features (B, D, 1), lengths), labels, names)."""

    def __init__(self, x, y, items, shuffle):
        self.x, self.y, self.items, self.shuffle = x[..., None], y, items, shuffle

    def __len__(self):
        return -(-len(self.items) // BATCH)

    def __iter__(self):
        items = self.items
        if self.shuffle:
            items = items[torch.randperm(len(items))]
        for some in items.split(BATCH):
            yield (self.x[some], torch.ones(len(some), dtype=torch.long)), self.y[some], None


def peer_knn(x, y, parts, classes) -> float:
    from xares.trainer import KNNTrainer

    near, test = Loader(x, y, parts.neighbours, True), Loader(x, y, parts.test, False)
    return KNNTrainer(num_classes=classes).train_and_eval(near, test)


def peer_linear(x, y, parts, classes, seed) -> float:
    from xares.models.simple import Mlp
    from xares.trainer import Trainer

    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(Mlp(x.shape[1], classes), device="cpu", lr=RATE, max_epochs=EPOCHS,
                          ckpt_dir=folder)
        trainer.run(Loader(x, y, parts.train, True), Loader(x, y, parts.valid, False))
        trainer.load_state_dict(torch.load(Path(folder, trainer.ckpt_name)))
        return trainer.run_inference(Loader(x, y, parts.test, False))


def ours(task, features, encoder, seeds):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as probe.run does
    s = probe.Settings(hidden=0, epochs=EPOCHS, seeds=seeds, device="cpu")
    found = probe.score(task, features, s, encoder)
    torch.set_num_threads(threads)
    return found


def timed(clock, f, *args):
    began = clock()
    return f(*args), clock() - began


def compare(task, features, encoder, seeds, clock) -> torch.Tensor:
    """Print a task's line -> its seconds: ours and X-ARES's with 1 seed, then with `seeds`."""
    parts, x = probe.rotations(task, features.owner)[0], features.x
    y, classes = probe.targets(task, features.owner, encoder.token_seconds), len(task.classes())
    one, first = timed(clock, ours, task, features, encoder, 1)
    several, second = timed(clock, ours, task, features, encoder, seeds)
    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
        near, near_time = timed(clock, peer_knn, x, y, parts, classes)
        scores, times = [], []
        for seed in range(seeds):
            score, passed = timed(clock, peer_linear, x, y, parts, classes, seed)
            scores.append(score)
            times.append(passed)
    found = torch.tensor([first, near_time + times[0], second, near_time + sum(times)])
    print(f"{task.name:14s} {one['knn']:8.3f} {near:7.3f} {several['mlp']:12.3f} "
          f"{sum(scores) / seeds:7.3f} |{cells(found)}", flush=True)
    return found


def cells(times) -> str:
    a, b, c, d = times.tolist()
    return f"{a:15.2f} {b:7.2f} {b / a:6.1f} | {c:7.2f} {d:7.2f} {d / c:6.1f}"


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--encoder", required=True)
    p.add_argument("--data", nargs="+", required=True)
    p.add_argument("--cache", default=probe.Settings.cache)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--threads", type=int, default=2,
                   help="X-ARES's threads (its own default is 2; ours takes 1)")
    p.add_argument("--cpu-time", action="store_true",
                   help="count the process's seconds on all cores, where others use them")
    args = p.parse_args()
    import xares.models.simple  # here: imports are not what is measured
    import xares.trainer
    from loguru import logger

    logger.remove()
    clock = time.process_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(args.threads)
    s = probe.Settings(encoder=(args.encoder,), data=tuple(args.data), cache=args.cache,
                       device="cpu")
    encoder = probe.open_encoder(args.encoder, None)
    mark, total = probe.fingerprint(encoder), torch.zeros(4)
    print(f"{'task':14s} {'kNN ours':>8s} {'X-ARES':>7s} {'linear ours':>12s} {'X-ARES':>7s}"
          f" | seconds: 1 seed  X-ARES  ratio | {args.seeds} seeds  X-ARES  ratio")
    for task in probe.find_tasks(s, print):
        if task.spec.metric != "accuracy" or task.folds:
            print(f"{task.name}: left out (folds, or another metric than accuracy)")
            continue
        features = probe.cached_features(encoder, mark, task, s, print)
        total += compare(task, features, encoder, args.seeds, clock)
    print(f"{'all':51s}  |{cells(total)}")


if __name__ == "__main__":
    main()
