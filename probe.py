"""Frozen features -> scores: what an encoder knows, judged by its neighbours and by a small probe on top of it.

    python probe.py --encoder DIR [DIR ...] --data suite/*.jsonl [--hidden 0] [--json OUT.json] [--plot OUT.png]
    python probe.py --encoder DIR --xares ENV [--tasks esc50 desed ...]    # ENV/esc50/*.tar as X-ARES publishes them

The features never change. The probe's epoch is chosen on valid; nothing is chosen on test.

Shapes: N feature vectors (one a clip or crop; in frame tasks one a token of 20 ms), D width, C classes, R probes.
"""
import argparse
import hashlib
import inspect
import json
import math
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

import data
import uniwhisper
from data import AudioError, Rows
from uniwhisper import SAMPLE_RATE, WINDOW, WhisperEncoder, encoder_lengths

TOKEN = 0.02  # seconds


# ---------------------------------------------------------------- the 22 public tasks of X-ARES

@dataclass(frozen=True)
class Spec:
    """How to read and score a task. The 22 below are as X-ARES 0.1.3 has them, but that frame probes draw single tokens
    of all clips, batch * 500 at a time, not whole clips."""
    domain: str
    label: object  # key of a clip's json, or a function of the json
    weight: int = 0  # in the average: X-ARES's eval_weight; 0: size of the test set (of one fold, where folds rotate)
    tars: str = ""  # their names up to the split's; with {}: up to the fold's number
    splits: str = "train valid test"  # as the tars call them; '-': no valid tars
    folds: range = range(0)
    metric: str = "accuracy"
    crop: float = 0.0  # seconds; a longer clip is cut into such pieces, each a sample of its own; the rest is dropped
    epochs: int = 10
    batch: int = 32
    knn: bool = True
    positive_weight: float = 1.0


def _events(start, end, name):
    """Reader of a list of events: the keys of their times in seconds, and of their classes."""
    return lambda row: [(e[start], e[end], c) for e in row["events"] for c in str(e[name]).split(",")]


LIBRI = "train-clean-100 dev-clean test-clean"
XARES = {  # where a valid split is missing, X-ARES chooses on test; here a tenth of train is held out for that
    "asvspoof2015": Spec("speech", "binary_spoof", 2000, "asvspoof_", "train valid eval", epochs=5, batch=64),
    "clotho": Spec("environment", lambda row: [v for k, v in row.items() if k != "audio"], 1045, "clotho_",
                   "development evaluation validation", metric="recall@1", crop=30, epochs=20, batch=128, knn=False),
    "cremad": Spec("speech", "label", 1116, "wds-audio-"),
    "desed": Spec("environment", _events("onset", "offset", "label"), 1153, "wds-audio-", "train - eval",
                  metric="segment F1 macro", knn=False),
    "esc50": Spec("environment", "label", 400, "wds-audio-fold-{}-", folds=range(1, 6)),
    "fluentspeechcommands": Spec("speech", "transcription", 2000, "fluentspeechcommands_"),
    "freemusicarchive": Spec("music", "genre", 800, "fma_small_", crop=10, epochs=3),
    "fsd50k": Spec("environment", lambda row: row["soundevent"].split(";"), 2000, "fsd50k_", "train validation eval",
                   metric="mAP", crop=10, batch=64, knn=False),
    "fsdkaggle2018": Spec("environment", "sound", 1600, "fsd18_", "train - test", epochs=3, batch=64, knn=False),
    "gtzan_genre": Spec("music", "genre", 100, "gtzan_fold_{}_", folds=range(10)),
    "libricount": Spec("speech", "num_speakers", 1144, "libricount_fold{:02}", folds=range(5), batch=64),
    "librispeech": Spec("speech", "trans", 10000, "", LIBRI, metric="1 - WER", batch=4, knn=False),
    "librispeechmalefemale": Spec("speech", "gender", 2620, "", LIBRI, crop=5),
    "maestro": Spec("music", _events("start", "end", "note"), 65, "maestro_", metric="segment F1 micro", epochs=50,
                    knn=False, positive_weight=10),
    "nsynthinstument": Spec("music", "instrument_family_str", 2000, "nsynth_"),
    "ravdess": Spec("speech", "emotion", 360, "ravdess_fold_{}_", folds=range(4)),
    "speechcommandsv1": Spec("speech", "labels", 2000, "wds-audio-", batch=64),
    "urbansound8k": Spec("environment", "soundevent", 873, "urbansound_fold{}_", folds=range(1, 11)),
    "vocalimitations": Spec("environment", "imitation", 1867, "vocal_imitations_fold{:02}_", folds=range(3), epochs=20),
    "vocalsound": Spec("speech", "label", 2000),
    "voxceleb1": Spec("speech", "speakerid", 2000, "voxceleb1_", crop=6),
    "voxlingua33": Spec("speech", "labels", 1609, "", "train_subset - dev", crop=10, batch=64),
}
# assumption: the paper does not name its 20 tasks. Here: all but the two that need more than neighbours or an MLP.
PAPER_TASKS = set(XARES) - {"clotho", "librispeech"}
REFERENCES = [  # source, tasks, weighted averages of kNN and MLP; printed only beside scores of the very same tasks
    ("Whisper (paper)", PAPER_TASKS, 0.46, 0.64), ("UniWhisper (paper)", PAPER_TASKS, 0.61, 0.81),
    # X-ARES's kNN scales each feature across clips instead of each clip's vector: no number to compare with.
    ("Whisper (X-ARES, linear)", set(XARES), "-", 0.632), ("dasheng (X-ARES, linear)", set(XARES), "-", 0.699)]


# ---------------------------------------------------------------- metrics

def accuracy(scores: torch.Tensor, y: torch.Tensor) -> float:
    """Share of rows whose highest score (N, C) is that of the true class (N,)."""
    return (scores.argmax(1) == y).double().mean().item()


def _at_thresholds(scores: torch.Tensor, y: torch.Tensor):
    """True and false positives at each threshold, the highest first; equal scores share one."""
    scores, order = scores.sort(descending=True)
    last = F.pad(scores.diff() != 0, (0, 1), value=True)
    true = y[order].double().cumsum(0)
    return true[last], (torch.arange(1, len(y) + 1, device=y.device) - true)[last]


def average_precision(scores: torch.Tensor, y: torch.Tensor) -> float:
    """Precision summed over the steps of recall: scores (N,), y (N,) 0 or 1."""
    true, false = _at_thresholds(scores, y)
    return (true / (true + false) * true.diff(prepend=true.new_zeros(1))).sum().item() / true[-1].item()


def mean_average_precision(scores: torch.Tensor, y: torch.Tensor) -> float:
    """Mean over the classes that occur: scores (N, C), y (N, C) 0 or 1."""
    occurs = y.any(0).nonzero()[:, 0]
    return sum(average_precision(scores[:, c], y[:, c]) for c in occurs) / max(1, len(occurs))


def equal_error_rate(scores: torch.Tensor, y: torch.Tensor) -> float:
    """Mean of false accepts and false rejects where they are closest: scores (N,), y (N,) 0 or 1."""
    true, false = _at_thresholds(scores, y)
    accept, reject = F.pad(false / false[-1], (1, 0)), 1 - F.pad(true / true[-1], (1, 0))
    best = (accept - reject).abs().argmin()
    return (accept[best] + reject[best]).item() / 2


def segment_f1(scores, y, clip, seconds: float, average: str) -> float:
    """F1 over segments: scores (N, C) logits, y (N, C) 0 or 1, clip (N,) the clip of each 20 ms token, ascending.

    A class is in a segment if it is in any of its tokens. macro: mean over all C classes; micro: all counts pooled.
    A clip's last, shorter segment counts too (X-ARES drops it; its DESED clips, of 10 s, have none).
    """
    token = torch.arange(len(clip), device=clip.device) - torch.searchsorted(clip, clip)  # of its clip
    segment = (token % round(seconds / TOKEN) == 0).cumsum(0) - 1
    empty = torch.zeros(int(segment[-1]) + 1, y.shape[1], device=y.device)
    found, true = empty.index_add(0, segment, (scores > 0).float()) > 0, empty.index_add(0, segment, y.float()) > 0
    hits, sizes = (found & true).sum(0), found.sum(0) + true.sum(0)  # (C,)
    if average == "micro":
        hits, sizes = hits.sum(), sizes.sum()
    return (2 * hits.double() / sizes.clamp(min=1)).mean().item()


def recall_at_1(audio: torch.Tensor, text: torch.Tensor, owner: torch.Tensor) -> float:
    """audio (N, E), text (M, E), owner (M,) the clip of each text: mean of both directions, by cosine."""
    similarity = F.normalize(audio, dim=1) @ F.normalize(text, dim=1).T  # (N, M)
    to_text = owner[similarity.argmax(1)] == torch.arange(len(audio), device=owner.device)
    to_audio = similarity.argmax(0) == owner
    return (to_text.double().mean() + to_audio.double().mean()).item() / 2


def word_error_rate(answers: list[str], truths: list[str]) -> float:
    """Substituted, missing and inserted words over all true words, in lower case."""
    errors = words = 0
    for answer, truth in zip(answers, truths, strict=True):
        answer, truth = answer.lower().split(), truth.lower().split()
        row = list(range(len(answer) + 1))  # edit distance, a row at a time
        for i, word in enumerate(truth):
            above, row = row, [i + 1]
            for j, other in enumerate(answer):
                row.append(min(above[j] + (word != other), above[j + 1] + 1, row[j] + 1))
        errors, words = errors + row[-1], words + len(truth)
    return errors / max(1, words)


METRICS = {  # of scores (N, C), truth (N,) or (N, C), clip (N,); in [0, 1], higher is better
    "accuracy": lambda scores, y, clip: accuracy(scores, y),
    "mAP": lambda scores, y, clip: mean_average_precision(scores, y),
    "1 - EER": lambda scores, y, clip: 1 - equal_error_rate(scores[:, 1] - scores[:, 0], y),
    "segment F1 macro": lambda scores, y, clip: segment_f1(scores, y, clip, 1.0, "macro"),  # DESED's
    "segment F1 micro": lambda scores, y, clip: segment_f1(scores, y, clip, 0.1, "micro"),  # MAESTRO's
    "recall@1": None, "1 - WER": None,  # see score_retrieval, score_transcription
}


# ---------------------------------------------------------------- k nearest neighbours

@torch.no_grad()
def knn(x, y, train, test, classes: int, k: int = 10, temperature: float = 0.07, chunk: int = 16384) -> torch.Tensor:
    """Votes (len(test), C) of each test row's k most similar train rows, as X-ARES counts them.

    x (N, D), y (N,) classes or (N, C) 0 or 1, train and test: rows. A vote weighs the softmax of cosine / temperature
    over the k. Train is gone through in chunks, so that little memory is needed beside the features.
    """
    votes = []
    for queries in test.split(1024):
        q = F.normalize(x[queries].float(), dim=1)
        near, where = q.new_empty(len(q), 0), queries.new_empty(len(q), 0)
        for rows in train.split(chunk):
            near = torch.cat([near, q @ F.normalize(x[rows].float(), dim=1).T], 1)
            where = torch.cat([where, rows.expand(len(q), -1)], 1)
            near, order = near.topk(min(k, near.shape[1]))
            where = where.gather(1, order)
        weight = (near / temperature).softmax(1)  # (Q, k)
        if y.dim() == 2:
            votes.append(torch.einsum("qk,qkc->qc", weight, y[where].float()))
        else:
            votes.append(q.new_zeros(len(q), classes).scatter_add_(1, y[where], weight))
    return torch.cat(votes)


# ---------------------------------------------------------------- probes

def _rate(lr: float, epoch: int, epochs: int) -> float:
    return lr * (0.55 + 0.45 * math.cos(math.pi * epoch / epochs))  # a cosine from lr to a tenth of it


def _inputs(x: torch.Tensor) -> torch.Tensor:
    """Features (..., D) -> (..., D + 1): LayerNorm (gain and shift are left to the layer above), a 1 for its bias."""
    return F.pad(F.layer_norm(x.float(), x.shape[-1:]), (0, 1), value=1.0)


def _forward(params: list[torch.Tensor], x: torch.Tensor):
    """R probes at once: inputs (R, B, D + 1) -> hidden (R, B, H + 1) or None, scores (R, B, C)."""
    if len(params) == 1:
        return None, x.bmm(params[0])
    hidden = F.pad(x.bmm(params[0]).relu_(), (0, 1), value=1.0)
    return hidden, hidden.bmm(params[1])


def _gradients(params, x, y, positive_weight: float) -> list[torch.Tensor]:
    """Of each probe's mean loss, by hand: a third of autograd's time. x (R, B, D + 1), y (R, B) or (R, B, C).

    With respect to the scores, cross entropy's is softmax - truth, binary cross entropy's sigmoid - truth.
    """
    hidden, scores = _forward(params, x)
    if y.dim() == 2:
        error = scores.softmax(-1).scatter_add_(-1, y[..., None], y.new_full((), -1, dtype=x.dtype).expand(*y.shape, 1))
        error = error.div_(y.shape[1])
    else:
        y = y.float()
        error = (scores.sigmoid() * (1 + (positive_weight - 1) * y) - positive_weight * y) / y[0].numel()
    if hidden is None:
        return [x.mT.bmm(error)]
    below = error.bmm(params[1].mT)[..., :-1] * (hidden[..., :-1] > 0)
    return [x.mT.bmm(below), hidden.mT.bmm(error)]


@torch.no_grad()
def predict(params: list[torch.Tensor], x: torch.Tensor, rows: torch.Tensor, prepare=_inputs) -> torch.Tensor:
    """Scores (len(rows), C) of one probe for rows of the features x (N, D)."""
    return torch.cat([_forward([p[None] for p in params], prepare(x[r])[None])[1][0] for r in rows.split(65536)])


@torch.no_grad()
def fit_probes(x, y, runs, measure, classes: int, hidden=0, epochs=30, batch=32, lr=1e-3, positive_weight=1.0):
    """Train R probes at once, each on its own rows, and keep of each the epoch that is best on its valid rows.

    LayerNorm, linear (, ReLU, linear); Adam, cosine to a tenth. x (N, D); y (N,) classes or (N, C) 0 or 1; runs: (train
    rows, valid rows, seed) of each probe; measure(scores, rows) -> float. Which rows are test's is not known here.
    -> (parameters of each probe, its epoch)
    """
    sizes = [x.shape[1]] + [hidden] * (hidden > 0) + [classes]
    draws = [torch.Generator().manual_seed(seed) for _, _, seed in runs]
    params = [torch.stack([(torch.rand(a + 1, b, generator=g) * 2 - 1) / math.sqrt(a) for g in draws]).to(x.device)
              for a, b in zip(sizes, sizes[1:])]  # (R, in + 1, out), the last row the bias, as nn.Linear begins
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    longest, step = max(len(train) for train, _, _ in runs), 0
    # Once for all epochs; but frame features, in half precision, are too many to be held twice.
    x, prepare = (_inputs(x), lambda x: x) if x.dtype == torch.float32 else (x, _inputs)
    best, chosen, epoch_of = [-1.0] * len(runs), [None] * len(runs), [0] * len(runs)
    for epoch in range(epochs):
        # A smaller fold begins its shuffled rows again, so that all probes take the same number of steps.
        order = torch.stack([train[torch.randperm(len(train), generator=g)[torch.arange(longest) % len(train)]]
                             for (train, _, _), g in zip(runs, draws)])  # (R, longest)
        for rows in order.split(batch * max(1, 2048 // batch), dim=1):  # fetched many batches at a time
            take = lambda t: t.index_select(0, rows.flatten()).unflatten(0, rows.shape)
            seen, truth = prepare(take(x)).split(batch, dim=1), take(y).split(batch, dim=1)
            for xs, ys in zip(seen, truth):  # (R, B, D + 1), (R, B) or (R, B, C)
                step += 1
                unbias, rate = math.sqrt(1 - 0.999**step), _rate(lr, epoch, epochs) / (1 - 0.9**step)
                for p, g, (m, v) in zip(params, _gradients(params, xs, ys, positive_weight), moments):  # Adam
                    m.lerp_(g, 0.1)
                    v.lerp_(g.square_(), 0.001)
                    p.addcdiv_(m, v.sqrt().add_(1e-8 * unbias), value=-rate * unbias)
        for r, (_, valid, _) in enumerate(runs):
            value = measure(predict([p[r] for p in params], x, valid, prepare), valid)
            if value >= best[r]:  # assumption: of equal epochs the last, which has trained longest
                best[r], epoch_of[r], chosen[r] = value, epoch + 1, [p[r].clone() for p in params]
    return chosen, epoch_of


def _fit_module(module: nn.Module, loss_of, count: int, value_of, epochs: int, batch: int, lr: float = 1e-3) -> None:
    """Adam on loss_of(batch of numbers below `count`), cosine to a tenth; ends at the epoch of the best value_of()."""
    adam, best, state = torch.optim.Adam(module.parameters(), lr=lr), -math.inf, None
    for epoch in range(epochs):
        adam.param_groups[0]["lr"] = _rate(lr, epoch, epochs)
        for items in torch.randperm(count).split(batch):
            adam.zero_grad()
            loss_of(items).backward()
            adam.step()
        with torch.no_grad():
            value = value_of()  # on valid
        if value >= best:
            best, state = value, {k: v.clone() for k, v in module.state_dict().items()}
    module.load_state_dict(state)


class Retriever(nn.Module):
    """Clips and captions in one space: an MLP on a clip's features; the mean of an MLP on learned word vectors."""

    def __init__(self, width: int, words: int, size: int = 512):
        super().__init__()
        mlp = lambda d: nn.Sequential(nn.Linear(d, size), nn.GELU(), nn.Linear(size, size))
        self.audio, self.text = nn.Sequential(nn.LayerNorm(width), mlp(width)), mlp(size)
        self.words, self.scale = nn.Embedding(words, size), nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, x: torch.Tensor, captions: list[list[int]]):
        """x (N, D), word ids of M captions -> (N, E), (M, E)."""
        starts = torch.tensor([0] + [len(c) for c in captions[:-1]], device=x.device).cumsum(0)
        ids = torch.tensor([w for c in captions for w in c], device=x.device)
        return self.audio(x), F.embedding_bag(ids, self.text(self.words.weight), starts, mode="mean")


def score_retrieval(x, texts, parts, epochs: int, batch: int, seed: int) -> float:
    """Recall@1 on test: x (N, D), texts: captions of each row, parts: rows of train, valid, test (X-ARES's Clotho)."""
    split = lambda text: re.findall(r"\w+", text.lower())
    words = sorted({w for n in parts[0] for text in texts[n] for w in split(text)})
    number = {w: i for i, w in enumerate(words, 1)}  # 0: a word that train does not have
    ids = lambda text: [number.get(w, 0) for w in split(text)] or [0]
    pairs = [[(place, ids(text)) for place, n in enumerate(part) for text in texts[n]] for part in parts]
    xs = [x[part] for part in parts]
    torch.manual_seed(seed)
    model = Retriever(x.shape[1], len(words) + 1).to(x.device)

    def loss_of(items):
        owner, captions = zip(*(pairs[0][i] for i in items))
        owner = torch.tensor(owner, device=x.device)
        audio, text = (F.normalize(e, dim=1) for e in model(xs[0][owner], captions))
        twin = (owner[:, None] == owner).fill_diagonal_(False)  # another caption of the same clip is no wrong answer
        logits = (audio @ text.T * model.scale.exp()).masked_fill(twin, -math.inf)
        target = torch.arange(len(items), device=x.device)
        return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)

    @torch.no_grad()
    def recall(part):
        owner, captions = zip(*pairs[part])
        return recall_at_1(*model(xs[part], captions), torch.tensor(owner, device=x.device))

    _fit_module(model, loss_of, len(pairs[0]), lambda: recall(1), epochs, batch)
    return recall(2)


class _Cached(nn.Module):
    """Stands in for an encoder whose features are at hand: they come as audio, their lengths as samples."""

    def encode(self, features, lengths):
        return features, lengths


def score_transcription(x, clip, texts, parts, encoder, decoder, epochs: int, batch: int) -> float:
    """1 - WER on test, generated by a frozen decoder through an adapter trained on train, chosen by valid's loss.

    x (N, D) the tokens of all clips, clip (N,) ascending, texts: one a clip, parts: clips of train, valid, test.
    """
    torch.manual_seed(0)
    model = uniwhisper.UniWhisper.from_folders(encoder, decoder, dtype=torch.bfloat16 if x.is_cuda else torch.float32)
    model.encoder, ask = _Cached(), data.TEMPLATES["transcribe"][0]
    model.to(x.device)
    prompt = model.tokenizer.prompt(ask)
    counts = torch.bincount(clip, minlength=len(texts))
    tokens = x.split(counts.tolist())

    def batch_of(clips):
        features = nn.utils.rnn.pad_sequence([tokens[c].float() for c in clips], batch_first=True)
        prompts, answers = [prompt] * len(clips), [model.tokenizer.answer(texts[c]) for c in clips]
        return SimpleNamespace(audio=features, samples=counts[clips], prompts=prompts, answers=answers)

    def loss_of(items):
        loss, answer_tokens = model(batch_of(parts[0][items]))
        return loss / answer_tokens

    valid = lambda: -sum(model(batch_of(clips))[0].item() for clips in parts[1].split(batch))
    _fit_module(model.adapter, loss_of, len(parts[0]), valid, epochs, batch)
    answers = []
    for b in map(batch_of, parts[2].split(batch)):
        answers += model.generate(b.audio, [ask] * len(b.audio), 200, b.samples)
    return max(0.0, 1 - word_error_rate(answers, [texts[c] for c in parts[2]]))


# ---------------------------------------------------------------- tasks

class Clip(NamedTuple):
    rows: Rows
    number: int  # among the rows
    split: str | int  # train, valid, test, held out, or a fold's number
    label: object  # a class, classes, (onset, offset, class) in seconds, captions, or a text


@dataclass
class Task:
    name: str
    spec: Spec
    clips: list[Clip]

    @property
    def frames(self) -> bool:
        return self.spec.metric.startswith("segment") or self.spec.metric == "1 - WER"

    def members(self, clip: Clip) -> set[str]:
        """A clip's classes."""
        return ({v[2] for v in clip.label} if self.frames
                else {*clip.label} if self.spec.metric == "mAP" else {clip.label})

    @property
    def classes(self) -> list[str]:
        """The classes that occur, sorted; none where labels are texts."""
        return sorted({m for c in self.clips for m in self.members(c)}) if METRICS[self.spec.metric] else []


# What a manifest's row has -> the metrics that fit it, the usual one first ("tags": a label that is a list).
FITS = {"events": ("segment F1 macro", "segment F1 micro"), "captions": ("recall@1",), "tags": ("mAP",),
        "label": ("accuracy", "1 - EER"), "answer": ("1 - WER",)}


def _truth(row: dict) -> tuple[str, object]:
    """(key of FITS, label) of a manifest's row. Raises ValueError."""
    kind = next((k for k in ("events", "captions", "label", "answer") if row.get(k) not in (None, "")), None)
    if kind is None or not row.get("task"):
        raise ValueError(f"lacks {'a label' if row.get('task') else 'task'}; probing needs a task and a label, events, "
                         "captions or an answer")
    for key in ("task", "domain"):
        if not isinstance(row.get(key, ""), str):
            raise ValueError(f"{key} is {row[key]!r}; need a text")
    value = row[kind]
    if kind == "events":
        try:
            events = [(float(e["onset"]), float(e["offset"]), str(e["label"])) for e in value]
        except (TypeError, KeyError, ValueError):
            events = [(-1.0, 0.0, "")]
        if not all(0 <= onset <= offset < math.inf for onset, offset, _ in events):
            raise ValueError("events must be a list of {onset, offset, label}, in seconds, 0 <= onset <= offset")
        return kind, events
    if kind == "captions" and not (isinstance(value, list) and value and all(isinstance(v, str) for v in value)):
        raise ValueError(f"captions is {value!r}; need a list of texts")
    if kind == "label" and isinstance(value, list):
        return "tags", [str(v) for v in value]
    return kind, value if kind == "captions" else str(value)


def manifest_tasks(rows: Rows) -> list[Task]:
    """A task for each `task` among the rows. Its kind follows from what a row has: events, captions, a label (a list:
    tagging), or else an answer; `metric` may name another metric that fits."""
    tasks = {}
    for i in range(len(rows)):
        row = rows[i]
        try:
            kind, label = _truth(row)
            spec = Spec(row.get("domain", "other"), kind, metric=row.get("metric", FITS[kind][0]), epochs=30,
                        knn=kind in ("label", "tags"))
            if spec.metric not in FITS[kind]:
                raise ValueError(f"metric is {spec.metric!r}; with {kind} it can be {' or '.join(FITS[kind])}")
            task = tasks.setdefault(row["task"], Task(row["task"], spec, []))
            if spec != task.spec:
                raise ValueError(f"domain {spec.domain}, {kind}, metric {spec.metric}; its task {task.name} begins "
                                 f"with {task.spec.domain}, {task.spec.label}, {task.spec.metric}")
            split = "train" if row.get("split") is None else str(row["split"])
            if split not in ("train", "valid", "test") and not split.isdecimal():
                raise ValueError(f"split is {split!r}; need train, valid, test or a fold's number")
        except ValueError as e:
            raise ValueError(f"{rows.name(i)}: {e}") from None
        task.clips.append(Clip(rows, i, int(split) if split.isdecimal() else split, label))
    return list(tasks.values())


def xares_task(env, name: str) -> Task:
    """One of X-ARES's public tasks from ENV/NAME/*.tar, as X-ARES unpacks its downloads."""
    spec, clips = XARES[name], []
    names = dict(zip(("train", "valid", "test"), spec.splits.split()))
    for split in spec.folds or [k for k, v in names.items() if v != "-"]:
        rows = Rows([Path(env, name, (spec.tars.format(split) if spec.folds else spec.tars + names[split]) + "*.tar")])
        for i in range(len(rows)):
            try:
                label = spec.label(rows[i]) if callable(spec.label) else str(rows[i][spec.label])
            except (KeyError, TypeError, AttributeError) as e:
                raise ValueError(f"{rows.name(i)}: its json is not as in X-ARES's {name} ({e!r})") from None
            clips.append(Clip(rows, i, split, label))
    return Task(name, spec, clips)


def check(task: Task, say) -> None:
    """Refuse what cannot be probed, before anything is encoded. Without a valid split hold out a tenth of train."""
    splits, classes, metric = {c.split for c in task.clips}, task.classes, task.spec.metric
    folds = {s for s in splits if isinstance(s, int)}
    if folds and METRICS[metric] is None:
        raise ValueError(f"{task.name}: its splits are folds; {metric} needs train and test")
    if METRICS[metric] and len(classes) < 2 or metric == "1 - EER" and len(classes) != 2:
        raise ValueError(f"{task.name}: has {len(classes)} class(es), {', '.join(classes[:3])}; {metric} needs "
                         f"{'two' if metric == '1 - EER' else 'two or more'}")
    if folds:
        empty = set(range(min(folds), max(folds) + 1)) - folds
        if empty or len(folds) < 3 or splits != folds:
            found = f"fold {min(empty)} has no clips" if empty else f"splits are {', '.join(sorted(map(str, splits)))}"
            raise ValueError(f"{task.name}: {found}; need three folds or more, each with clips, and no other split")
    elif not {"train", "test"} <= splits:
        raise ValueError(f"{task.name}: no clip in split {'test' if 'train' in splits else 'train'}; "
                         f"found {', '.join(sorted(splits))}")
    elif "valid" not in splits:
        train = [n for n, c in enumerate(task.clips) if c.split == "train"]
        draw = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: -(-len(train) // 10)]
        for n in draw.tolist():
            task.clips[train[n]] = task.clips[train[n]]._replace(split="held out")
        say(f"note: {task.name} has no valid split: its epoch is chosen on {len(draw)} clips held out of train")
    for fold in sorted(folds) or ["test"] * bool(classes):
        taught = (c for c in task.clips if (c.split != fold if folds else c.split == "train"))
        if lost := set(classes) - {m for c in taught for m in task.members(c)}:
            say(f"note: {task.name}: no clip of class {', '.join(sorted(lost)[:5])} is in train"
                + (f" when fold {fold} is test" if folds else "") + "; its clips elsewhere count as wrong")


def targets(task: Task, clip: torch.Tensor) -> torch.Tensor:
    """Truth of each feature vector, given its clip (N,) ascending: (N,) classes, or (N, C) bool."""
    number = {c: i for i, c in enumerate(task.classes)}
    if not task.frames and task.spec.metric != "mAP":
        return torch.tensor([number[c.label] for c in task.clips])[clip]
    hot = torch.zeros(len(clip), len(number), dtype=torch.bool)
    for c, rows in zip(task.clips, hot.split(torch.bincount(clip, minlength=len(task.clips)).tolist())):
        for v in c.label:
            if task.frames:
                rows[math.ceil(v[0] / TOKEN) : math.ceil(v[1] / TOKEN), number[v[2]]] = True  # as X-ARES rounds
            else:
                rows[:, number[v]] = True
    return hot


def rotations(task: Task, clip: torch.Tensor) -> list[list[torch.Tensor]]:
    """Feature rows of neighbours, train, valid and test; k folds take turns: test on one, choose on the next."""
    folds = sorted({c.split for c in task.clips if isinstance(c.split, int)})
    plans = [[{*folds} - {f}, {*folds} - {f, g}, {g}, {f}] for f, g in zip(folds, folds[1:] + folds[:1])]
    plans = plans or [[{"train", "held out"}, {"train"}, {"valid", "held out"}, {"test"}]]
    rows = lambda part: torch.tensor([c.split in part for c in task.clips])[clip].nonzero()[:, 0]
    return [[rows(part) for part in plan] for plan in plans]


# ---------------------------------------------------------------- features

def _stamp(clip: Clip) -> list:
    """What changes when a clip does: its file's path, size and time, and its place in a tar."""
    rows, i = clip.rows, clip.number
    path, at = rows.paths[rows.file[i]], int(rows.audio_at[i])
    file = path if at >= 0 else os.path.join(os.path.dirname(path), rows[i]["audio"])
    stat = os.stat(file) if os.path.exists(file) else None
    return [os.path.abspath(file), at, stat and stat.st_size, stat and stat.st_mtime_ns]


def fingerprint(encoder: WhisperEncoder) -> str:
    """Hash of an encoder's configuration and weights, and of the code that makes features."""
    h = hashlib.blake2b(json.dumps(encoder.config, sort_keys=True).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        h.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        h.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    for code in (uniwhisper, data, _decoded, _encode, extract):
        h.update(inspect.getsource(code).encode())
    return h.hexdigest()


def _decoded(clips: list[Clip], seconds: list[float], crop: float):
    """Lists of (clip, piece, samples or AudioError), half an hour each, short clips first, decoded one list ahead."""
    def read(n):
        try:
            audio = clips[n].rows.audio(clips[n].number)
        except AudioError as e:
            return [(n, 0, e)]
        size = round(crop * SAMPLE_RATE) or len(audio)
        return [(n, k, audio[k * size : (k + 1) * size]) for k in range(max(1, len(audio) // size))]

    order, ahead = sorted(range(len(clips)), key=lambda n: seconds[n]), []
    with ThreadPoolExecutor(4) as pool:
        for numbers in data.cut(order, sorted(seconds), 1800) + [[]]:
            now, ahead = ahead, [pool.submit(read, n) for n in numbers]
            yield [piece for job in now for piece in job.result()]


def _encode(encoder, pieces: list[torch.Tensor], frames: bool, s) -> list[torch.Tensor]:
    """Features of each piece of a batch: (1, D) pooled over its real tokens, or with `frames` these (T, D) in half."""
    device, samples = next(encoder.parameters()).device, torch.tensor([len(p) for p in pieces])
    lengths = encoder_lengths(samples)  # (B,)
    if s.context == "30s":  # as Whisper was trained: silence to the window's end is seen, but not averaged
        samples = -(-samples // WINDOW) * WINDOW
    audio = nn.utils.rnn.pad_sequence(pieces, batch_first=True)
    amp = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(s.precision)
    with torch.inference_mode(), torch.autocast(device.type, amp, enabled=amp is not None):
        x = encoder.encode(audio.to(device), samples, s.layer)[0][:, : int(lengths.max())].float()  # (B, T, D)
    if frames:
        return [tokens[:n].half().cpu() for tokens, n in zip(x, lengths)]
    real, n = (torch.arange(x.shape[1]) < lengths[:, None])[..., None].to(device), lengths[:, None].to(device)
    mean = (x * real).sum(1) / n
    if s.pool == "mean+std":
        mean = torch.cat([mean, (((x - mean[:, None]) * real).square().sum(1) / n).sqrt()], 1)
    return list(mean[:, None].cpu())


def extract(encoder, task: Task, s, say):
    """x (N, D), clip (N,) ascending, and a message for each unreadable clip; over 1 % of these, or NaN, is an error."""
    parts, failed, began, said = [{} for _ in task.clips], [], time.time(), time.time()
    seconds = [0.1 + float(c.rows.seconds[c.number]) for c in task.clips]  # 0.1: even the shortest clip takes its time
    cost = lambda t: -(-t // 30) * 30 if s.context == "30s" else t  # seconds that are encoded: silence, too
    work = [cost(t) for t in seconds]
    for pieces in _decoded(task.clips, seconds, task.spec.crop):
        failed += [str(audio) for _, _, audio in pieces if isinstance(audio, AudioError)]
        pieces = sorted((p for p in pieces if not isinstance(p[2], AudioError)), key=lambda p: len(p[2]))
        for batch in data.cut(pieces, [cost(len(p[2]) / SAMPLE_RATE) for p in pieces], s.batch_seconds):
            for (n, k, _), features in zip(batch, _encode(encoder, [audio for _, _, audio in batch], task.frames, s)):
                if not features.isfinite().all():
                    name = task.clips[n].rows.name(task.clips[n].number)
                    raise ValueError(f"{name}: its features are not finite; try --precision fp32, or check the weights")
                parts[n][k] = features
            if time.time() - said > 10:
                said, done = time.time(), sum(t for t, p in zip(work, parts) if p)
                share, speed = done / sum(work), done / (said - began)
                say(f"{task.name}: {share:.0%} encoded, {speed:.0f} x real time, "
                    f"{(sum(work) - done) / speed:.0f} s left")
    if len(failed) > 0.01 * len(task.clips):
        raise ValueError(f"{task.name}: {len(failed)} of {len(task.clips)} clips cannot be read, over 1 %: {failed[0]}")
    clip = torch.cat([torch.full((len(p[k]),), n) for n, p in enumerate(parts) for k in sorted(p)])
    x, at = features.new_empty(len(clip), features.shape[1]), 0
    # Each is freed once it is copied: frame tasks are large.
    for features in (p.pop(k) for p in parts for k in sorted(p)):
        x[at : at + len(features)] = features
        at += len(features)
    return x, clip, failed


def cached_features(encoder, mark: str, task: Task, s, say):
    """`extract`, kept on disk under a hash of all that its result depends on; mark: the encoder's fingerprint."""
    key = [mark, s.context, s.layer, None if task.frames else s.pool, s.precision, s.device, task.spec.crop,
           task.frames, [_stamp(c) for c in task.clips]]
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()
    path = Path(s.cache, re.sub(r"[^\w.-]", "_", task.name) + f"-{digest}.safetensors")
    if path.exists():
        try:
            with safe_open(path, "pt") as f:
                return f.get_tensor("x"), f.get_tensor("clip"), json.loads(f.metadata()["failed"])
        except SafetensorError as e:
            say(f"note: {path} is damaged ({e}): encoding again")
    x, clip, failed = extract(encoder, task, s, say)
    new = Path(f"{path}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"x": x, "clip": clip}, new, {"failed": json.dumps(failed)})
        new.replace(path)
    except (OSError, SafetensorError) as e:  # no reason to lose hours of work
        if new.is_file():
            new.unlink()
        say(f"note: {path}: features are not kept: {e}")
    return x, clip, failed


# ---------------------------------------------------------------- scores

def score(task: Task, x, clip, s, encoder=None) -> dict:
    """kNN and probe scores of a task on features x (N, D) of its clips (N,); encoder: its folder, for transcription."""
    spec, x, plans = task.spec, x.to(s.device), rotations(task, clip)
    epochs, classes = s.epochs or spec.epochs, len(task.classes)
    out = {"domain": spec.domain, "metric": spec.metric, "classes": classes, "knn": None}
    for plan in plans:
        for part, rows in zip(("neighbours", "train", "valid", "test"), plan):
            if not len(rows):
                raise ValueError(f"{task.name}: no readable clip is left in {part}; it needs more clips")
            if spec.metric == "1 - EER" and len({task.clips[n].label for n in clip[rows].unique()}) < 2:
                raise ValueError(f"{task.name}: only one class is left in {part}; 1 - EER needs both")
    _, *parts = plans[0]
    out["test"] = sum(len(clip[test].unique()) for *_, test in plans) // len(plans)  # clips, of one fold
    if spec.metric == "recall@1":
        texts = [task.clips[n].label for n in clip]
        values = torch.tensor([score_retrieval(x, texts, parts, epochs, spec.batch, seed) for seed in range(s.seeds)])
    elif spec.metric == "1 - WER":
        texts, parts = [c.label for c in task.clips], [clip[rows].unique() for rows in parts]
        values = torch.tensor([score_transcription(x, clip, texts, parts, encoder, s.decoder, epochs, spec.batch)])
    else:
        y, clip = targets(task, clip).to(s.device), clip.to(s.device)
        plans = [[rows.to(s.device) for rows in plan] for plan in plans]
        measure = lambda scores, rows: METRICS[spec.metric](scores, y[rows], clip[rows])
        if spec.knn:
            votes = [measure(knn(x, y, near, test, classes), test) for near, _, _, test in plans]
            out["knn"] = sum(votes) / len(votes)
        runs = [(train, valid, seed) for _, train, valid, _ in plans for seed in range(s.seeds)]
        batch = spec.batch * (500 if task.frames else 1)  # as many tokens as so many 10 s clips have
        probes, out["epochs"] = fit_probes(x, y, runs, measure, classes, s.hidden, epochs, batch,
                                           positive_weight=spec.positive_weight)
        tests = [test for *_, test in plans for _ in range(s.seeds)]
        values = torch.tensor([measure(predict(p, x, test), test) for p, test in zip(probes, tests)])
        values = values.view(len(plans), s.seeds).mean(0)
    out |= {"mlp": values.mean().item(), "weight": spec.weight or out["test"]}
    return out | ({"mlp_std": values.std().item()} if len(values) > 1 else {})


@torch.no_grad()
def knn_scores(encoder, tasks: list[Task], train_clips=300, test_clips=200, **settings) -> dict[str, float]:
    """{task: kNN score} of an encoder in training: cheap, for it looks at few clips a task, always the same.

    Class and tagging tasks are scored on valid (what a run is watched by should not be test), where a task has none on
    what `check` held out of train, or on the last fold; a task of 1 - EER is left out where these few clips are of one
    class. settings: Settings' names, e.g. context="30s". Raises ValueError.
    """
    s, training, scores = Settings(**settings), encoder.training, {}
    encoder.eval()
    try:
        for task in tasks:
            draw = torch.randperm(len(task.clips), generator=torch.Generator().manual_seed(0)).tolist()
            clips = [task.clips[n] for n in draw]
            part = {"valid", "held out", max((c.split for c in clips if isinstance(c.split, int)), default=None)}
            near = [c for c in clips if c.split not in part | {"test"}][:train_clips]
            far = [c for c in clips if c.split in part][:test_clips]
            one = task.spec.metric == "1 - EER" and len({c.label for c in far}) < 2  # of so few clips
            if not task.spec.knn or not near or not far or one:
                continue
            few = Task(task.name, task.spec, near + far)
            x, clip, _ = extract(encoder, few, s, say=lambda text: None)
            y, test = targets(few, clip), (clip >= len(near)).nonzero()[:, 0]
            votes = knn(x, y, (clip < len(near)).nonzero()[:, 0], test, len(few.classes))
            scores[task.name] = METRICS[task.spec.metric](votes, y[test], clip[test])
    finally:
        encoder.train(training)
    return scores


def averages(scores: dict) -> dict:
    """{task: scores} -> {domain or "all": {"knn", "mlp": by the tasks' weights, "knn_plain", "mlp_plain": not}}."""
    out = {}
    for domain in [*dict.fromkeys(r["domain"] for r in scores.values()), "all"]:
        out[domain] = {}
        for key in ("knn", "mlp"):
            mine = [(r[key], r["weight"]) for r in scores.values()
                    if domain in (r["domain"], "all") and r[key] is not None]
            out[domain][key] = sum(v * w for v, w in mine) / sum(w for _, w in mine) if mine else None
            out[domain][key + "_plain"] = sum(v for v, _ in mine) / len(mine) if mine else None
    return out


def _names(encoders) -> list[str]:
    """Folders without the leading parts that all share."""
    parts = [Path(e).parts for e in encoders]
    same = min(len(os.path.commonprefix(parts)), min(map(len, parts)) - 1)
    return ["/".join(p[same:]) for p in parts]


def table(results: dict) -> str:
    """{encoder: {task: scores}} -> a line per task and average; later encoders with their difference to the first."""
    def cells(scores, key):
        for r in scores:
            if r[key] is None:
                yield "-"
                continue
            spread = f" ±{r['mlp_std']:.3f}" if key == "mlp" and "mlp_std" in r else ""
            yield f"{r[key]:.3f}{spread}" + (f" {r[key] - scores[0][key]:+.3f}" if r is not scores[0] else "")

    first, means = next(iter(results.values())), [averages(r) for r in results.values()]
    lines = [["task", "domain", "metric", "test", *(f"{k} {n}" for k in ("kNN", "MLP") for n in _names(results))]]
    for name, r in first.items():
        scores = [of[name] for of in results.values()]
        lines.append([name, r["domain"], r["metric"], str(r["test"]), *cells(scores, "knn"), *cells(scores, "mlp")])
    for name, plain in [*((d, "") for d in means[0]), ("all", "_plain")]:
        scores, size = [m[name] for m in means], sum(r["test"] for r in first.values() if name in (r["domain"], "all"))
        kind = "plain mean" if plain else "weighted"
        lines.append([f"= {name}", "", kind, str(size), *cells(scores, "knn" + plain), *cells(scores, "mlp" + plain)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    align = lambda i, cell: cell.rjust(widths[i]) if i > 2 else cell.ljust(widths[i])
    lines = ["  ".join(align(i, cell) for i, cell in enumerate(line)) for line in lines]
    return "\n".join(lines + [f"{source}: kNN {near}, MLP {mlp} (weighted, the same tasks)"
                              for source, tasks, near, mlp in REFERENCES if tasks == set(first)])


def plot(results: dict, path) -> None:
    """Bars per task and encoder, kNN above MLP."""
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot

    names, tasks = _names(results), list(next(iter(results.values())))
    figure, axes = pyplot.subplots(2, figsize=(2 + 0.4 * len(tasks) * (1 + len(names)), 7), sharex=True)
    for axis, key, title in zip(axes, ("knn", "mlp"), ("kNN", "MLP")):
        for e, (name, scores) in enumerate(zip(names, results.values())):
            places = [t + 0.8 * (e + 0.5) / len(names) - 0.4 for t in range(len(tasks))]
            axis.bar(places, [scores[t][key] or 0 for t in tasks], 0.8 / len(names), label=name)
        axis.set(ylabel=title, ylim=(0, 1))
    axes[0].legend(frameon=False)
    axes[1].set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
    figure.savefig(path, bbox_inches="tight", dpi=120)


# ---------------------------------------------------------------- command line

def _flag(default, help, **more):
    return field(default=default, metadata={"help": help} | ({"nargs": "+"} if default == () else {}) | more)


@dataclass(frozen=True)
class Settings:
    encoder: tuple = _flag((), "Whisper folders, or OUT/encoder of runs; compared with the first", required=True)
    data: tuple = _flag((), "manifests and tars as data.py reads them; globs work")
    xares: str = _flag(None, "folder of X-ARES downloads: XARES/esc50/*.tar, ...")
    tasks: tuple = _flag((), "score these tasks only")
    decoder: str = _flag(None, "Qwen folder for transcription tasks; without it they are left out")
    context: str = _flag("clip", "encode clips as long as they are, or padded to 30 s, as Whisper was trained",
                         choices=["clip", "30s"])
    layer: int = _flag(None, "take the hidden state after this many layers (default: the last, normalised)", type=int)
    pool: str = _flag("mean", "over the clip's real tokens (frame tasks are not pooled)", choices=["mean", "mean+std"])
    precision: str = _flag("fp32", "of the encoder", choices=["fp32", "bf16", "fp16"])
    batch_seconds: float = _flag(40.0, "audio in an encoder batch; more suits a GPU", type=float)
    device: str = _flag("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1, ...")
    # assumption: the paper says "MLP" and gives neither width nor activation
    hidden: int = _flag(256, "width of the probe's hidden layer; 0: linear, as X-ARES probes", type=int)
    epochs: int = _flag(None, "of the probe (default: X-ARES's own for its tasks, 30 for others)", type=int)
    seeds: int = _flag(3, "probes per task, for mean and spread (transcription: one)", type=int)
    cache: str = _flag(str(Path.home() / ".cache" / "uniwhisper"), "folder where features are kept")
    json: str = _flag(None, "write settings and scores there")
    plot: str = _flag(None, "draw the scores there (needs matplotlib)")


def parse_settings(argv=None) -> Settings:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Settings):
        shown = {} if f.default in (None, ()) else {"help": f"{f.metadata['help']} ({f.default})"}
        p.add_argument("--" + f.name.replace("_", "-"), default=f.default, **f.metadata | shown)
    return Settings(**vars(p.parse_args(argv)))


def find_tasks(s: Settings, say) -> list[Task]:
    """The tasks to score, checked."""
    if s.xares and not Path(s.xares).is_dir():
        raise ValueError(f"--xares {s.xares}: no such folder")
    own = {t.name: t for t in manifest_tasks(Rows(s.data))} if s.data else {}
    public = [n for n in XARES if s.xares and Path(s.xares, n).is_dir()]
    if both := sorted(own.keys() & set(public)):
        raise ValueError(f"{', '.join(both)}: in --data and in --xares; rename the manifest's task")
    here = list(own) + public
    if unknown := set(s.tasks) - set(here):
        raise ValueError(f"--tasks {' '.join(sorted(unknown))}: not there; found: {', '.join(here) or 'none'}")
    tasks = []
    for name in s.tasks or here:
        if (own[name].spec if name in own else XARES[name]).metric == "1 - WER" and not s.decoder:
            say(f"note: {name} is left out: transcription needs --decoder")
            continue
        task = own[name] if name in own else xares_task(s.xares, name)
        check(task, say)
        tasks.append(task)
    if not tasks:
        raise ValueError("no task to score; give --data or --xares")
    return tasks


def run(s: Settings, say) -> dict:
    """{encoder: {task: scores}}."""
    for folder in s.encoder:  # a bad one is found before hours of work on the others
        encoder = WhisperEncoder.from_pretrained(folder)
        if s.layer is not None and not 0 <= s.layer <= len(encoder.layers):
            raise ValueError(f"--layer is {s.layer}; {folder} has layers 0 to {len(encoder.layers)}")
    if s.decoder:
        uniwhisper.read_config(s.decoder, ("qwen2", "qwen3"))
        uniwhisper.ChatTokenizer.from_pretrained(s.decoder)
    tasks, results, threads = find_tasks(s, say), {}, torch.get_num_threads()
    for folder in s.encoder:
        encoder = WhisperEncoder.from_pretrained(folder).to(s.device).eval()
        mark, results[folder] = fingerprint(encoder), {}
        for task in tasks:
            x, clip, failed = cached_features(encoder, mark, task, s, say)
            for message in failed:
                say(f"note: {task.name}: a clip is left out: {message}")
            torch.set_num_threads(threads if task.frames else 1)  # a clip probe is too small to share among cores
            r = results[folder][task.name] = score(task, x, clip, s, folder) | {"unreadable": len(failed)}
            torch.set_num_threads(threads)
            say(f"{folder}: {task.name}: " + ", ".join(f"{k} {r[k]:.3f}" for k in ("knn", "mlp") if r[k] is not None))
    return results


def check_flags(s: Settings) -> None:
    """Raises ValueError for what would fail only after the work is done."""
    if s.seeds < 1 or s.hidden < 0 or not 0 < s.batch_seconds < math.inf or s.epochs is not None and s.epochs < 1:
        raise ValueError("--seeds, --epochs and --batch-seconds must be positive, --hidden 0 or more")
    if s.plot and find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    for path in filter(None, (s.json, s.plot)):
        if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path}: " + ("is a folder" if Path(path).is_dir() else "its folder does not exist"))
    try:
        torch.empty(0, device=s.device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {s.device}: {str(e).splitlines()[0]}") from None


def main():
    """Scores to stdout, all else to stderr; what a user can cause ends in one line and exit code 1."""
    s = parse_settings()
    try:
        check_flags(s)
        results = run(s, say=lambda text: print(text, file=sys.stderr, flush=True))
        print(table(results))
        if s.json:
            encoders = {e: {"tasks": r, "averages": averages(r)} for e, r in results.items()}
            Path(s.json).write_text(json.dumps({"settings": asdict(s), "encoders": encoders}, indent=1) + "\n")
        if s.plot:
            plot(results, s.plot)
    except (OSError, ValueError) as e:
        sys.exit(f"error: {e}")
    except torch.OutOfMemoryError as e:  # of a GPU
        sys.exit(f"error: {str(e).splitlines()[0]} Lower --batch-seconds, or probe on --device cpu")


if __name__ == "__main__":
    main()
