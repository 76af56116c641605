"""kNN and a linear probe, ours beside X-ARES's trainers, on the same vectors in one run.

    pip install --no-deps xares pytorch-ignite loguru tqdm
    python tests/benchmarks/probes.py [--clips 2000] [--width 512] [--classes 20]

The vectors are made: noise around a point for each class; a tenth each is valid and test. Both
sides have the same epochs, batch, rate and seed, and choose the epoch on valid. X-ARES gets the
vectors pooled and in memory (by itself it reads and pools tokens again in every epoch), which
spares it most of its work. Times are medians over --repeats, in turn, on one thread.
"""
import argparse
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import xares.models.simple
import xares.trainer
from loguru import logger

sys.path.insert(0, str(Path(__file__).parents[2]))
import probe  # noqa: E402

EPOCHS, BATCH = 30, 32


def make_vectors(a):
    """x (N, D), y (N,), and the indices of train, valid and test."""
    torch.manual_seed(0)
    y = torch.randint(a.classes, (a.clips,))
    x = torch.randn(a.classes, a.width)[y] + 5 * torch.randn(a.clips, a.width)
    tenth = a.clips // 10
    return x, y, torch.arange(a.clips).split([a.clips - 2 * tenth, tenth, tenth])


class Loader:
    """Batches as X-ARES's trainers take them: ((vectors (B, D, 1), lengths), classes, names)."""

    def __init__(self, x, y, indices, shuffle):
        self.x, self.y, self.indices, self.shuffle = x[..., None], y, indices, shuffle

    def __len__(self):
        return -(-len(self.indices) // BATCH)

    def __iter__(self):
        indices = self.indices
        if self.shuffle:
            indices = indices[torch.randperm(len(indices))]
        for some in indices.split(BATCH):
            yield (self.x[some], torch.ones(len(some), dtype=torch.long)), self.y[some], None


def our_knn(x, y, train, valid, test) -> float:
    return probe.accuracy(probe.knn(x, y, train, test), y[test])


def peer_knn(x, y, train, valid, test) -> float:
    trainer = xares.trainer.KNNTrainer(num_classes=int(y.max()) + 1)
    return trainer.train_and_eval(Loader(x, y, train, True), Loader(x, y, test, False))


def our_linear(x, y, train, valid, test) -> float:
    fitted = probe.fit_probe(x, y, train, valid, hidden=0, epochs=EPOCHS, batch=BATCH)
    return probe.accuracy(probe.predict(fitted, x, test), y[test])


def peer_linear(x, y, train, valid, test) -> float:
    torch.manual_seed(0)
    model = xares.models.simple.Mlp(x.shape[1], int(y.max()) + 1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = xares.trainer.Trainer(model, device="cpu", lr=1e-3, max_epochs=EPOCHS,
                                        ckpt_dir=folder)
        trainer.run(Loader(x, y, train, True), Loader(x, y, valid, False))
        trainer.load_state_dict(torch.load(Path(folder, trainer.ckpt_name)))
        return trainer.run_inference(Loader(x, y, test, False))


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(clips=2000, width=512, classes=20, repeats=3).items():
        p.add_argument(f"--{name}", type=int, default=default, help=f"({default})")
    a = p.parse_args()
    logger.remove()
    torch.set_num_threads(1)
    x, y, parts = make_vectors(a)
    print(f"{'':8s} {'accuracy':>8s} {'X-ARES':>8s} {'seconds':>8s} {'X-ARES':>8s} {'ratio':>6s}")
    for name, *sides in (("kNN", our_knn, peer_knn), ("linear", our_linear, peer_linear)):
        scores, times = {}, {side: [] for side in sides}
        for side in a.repeats * sides:
            with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
                start = time.perf_counter()
                scores[side] = side(x, y, *parts)
                times[side].append(time.perf_counter() - start)
        ours, peer = (median(times[side]) for side in sides)
        cells = " ".join(f"{scores[side]:8.3f}" for side in sides)
        print(f"{name:8s} {cells} {ours:8.3f} {peer:8.3f} {peer / ours:6.1f}", flush=True)


if __name__ == "__main__":
    main()
