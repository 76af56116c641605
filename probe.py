"""Frozen features -> scores: nearest neighbours and small probes on top of an encoder.

    python probe.py --encoder DIR [DIR ...] --data suite/*.jsonl [--json OUT.json]
    python probe.py --encoder DIR --xares ENV [--tasks esc50 desed ...]

ENV/esc50/*.tar and so on are tasks as X-ARES publishes them. The encoder never changes.
A probe's epoch is chosen on valid; nothing is chosen on test.

N feature vectors (one a clip or crop; in frame tasks one a token), T tokens of a clip,
B items of a batch, D width, C classes, E retrieval space.
"""
import copy
import hashlib
import inspect
import json
import math
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import data
import uniwhisper
from data import AudioError, Rows
from uniwhisper import (UniWhisper, flag, load_decoder, load_encoder, new_adapter, parse_flags,
                        refuse_to_overwrite)

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def require(condition, message):
    if not condition:
        raise ValueError(message)


# ---------------------------------------------------------------- the 22 public tasks of X-ARES

@dataclass(frozen=True)
class Spec:
    domain: str
    label: object  # key of a clip's json, or function of the json
    weight: int = 0  # in averages; 0: the number of test clips
    tars: str = "{}"  # how their names begin; {}: the split
    splits: object = "train valid test"  # in these names ("-": none), or fold numbers
    metric: str = "accuracy"
    crop: float = 0.0  # seconds; longer clips are cut up, the rest is dropped
    epochs: int = 10
    batch: int = 32
    knn: bool = True
    positive_weight: float = 1.0


def _events(row, start="onset", end="offset", name="label"):
    events = []
    for event in row["events"]:
        for label in str(event[name]).split(","):
            events.append((event[start], event[end], label))
    return events


# As X-ARES 0.1.3 has them, with two differences: probes on frames draw single tokens of all
# clips, 500 * batch at a time, not whole clips; and where there is no valid split, X-ARES
# chooses on test, while here a tenth of train is held out for that.
LIBRI = "train-clean-100 dev-clean test-clean"
XARES = {
    "asvspoof2015": Spec("speech", "binary_spoof", 2000, "asvspoof_{}",
                         "train valid eval", epochs=5, batch=64),
    "clotho": Spec("environment", lambda row: [row[k] for k in row if k != "audio"], 1045,
                   "clotho_{}", "development evaluation validation", "recall@1",
                   crop=30, epochs=20, batch=128, knn=False),
    "cremad": Spec("speech", "label", 1116, "wds-audio-{}"),
    "desed": Spec("environment", _events, 1153, "wds-audio-{}", "train - eval",
                  "segment F1 macro", knn=False),
    "esc50": Spec("environment", "label", 400, "wds-audio-fold-{}-", range(1, 6)),
    "fluentspeechcommands": Spec("speech", "transcription", 2000, "fluentspeechcommands_{}"),
    "freemusicarchive": Spec("music", "genre", 800, "fma_small_{}", crop=10, epochs=3),
    "fsd50k": Spec("environment", lambda row: row["soundevent"].split(";"), 2000,
                   "fsd50k_{}", "train validation eval", "mAP", crop=10, batch=64, knn=False),
    "fsdkaggle2018": Spec("environment", "sound", 1600, "fsd18_{}", "train - test",
                          epochs=3, batch=64, knn=False),
    "gtzan_genre": Spec("music", "genre", 100, "gtzan_fold_{}_", range(10)),
    "libricount": Spec("speech", "num_speakers", 1144, "libricount_fold{:02}",
                       range(5), batch=64),
    "librispeech": Spec("speech", "trans", 10000, "{}", LIBRI, "1 - WER", batch=4, knn=False),
    "librispeechmalefemale": Spec("speech", "gender", 2620, "{}", LIBRI, crop=5),
    "maestro": Spec("music", lambda row: _events(row, "start", "end", "note"), 65,
                    "maestro_{}", metric="segment F1 micro", epochs=50, knn=False,
                    positive_weight=10),
    "nsynthinstument": Spec("music", "instrument_family_str", 2000, "nsynth_{}"),
    "ravdess": Spec("speech", "emotion", 360, "ravdess_fold_{}_", range(4)),
    "speechcommandsv1": Spec("speech", "labels", 2000, "wds-audio-{}", batch=64),
    "urbansound8k": Spec("environment", "soundevent", 873,
                         "urbansound_fold{}_", range(1, 11)),
    "vocalimitations": Spec("environment", "imitation", 1867,
                            "vocal_imitations_fold{:02}_", range(3), epochs=20),
    "vocalsound": Spec("speech", "label", 2000),
    "voxceleb1": Spec("speech", "speakerid", 2000, "voxceleb1_{}", crop=6),
    "voxlingua33": Spec("speech", "labels", 1609, "{}", "train_subset - dev",
                        crop=10, batch=64),
}
# assumption: the paper does not name its 20 tasks. Here: all but the two of texts.
PAPER_TASKS = set(XARES) - {"clotho", "librispeech"}
# Source, tasks, weighted averages of kNN and MLP; shown only beside scores of the same tasks.
# X-ARES's kNN normalises across clips, not each clip's vector: no number to compare with.
REFERENCES = [
    ("Whisper (paper)", PAPER_TASKS, "0.46", "0.64"),
    ("UniWhisper (paper)", PAPER_TASKS, "0.61", "0.81"),
    ("Whisper (X-ARES, linear)", set(XARES), "-", "0.632"),
    ("dasheng (X-ARES, linear)", set(XARES), "-", "0.699"),
]


# ---------------------------------------------------------------- metrics: from 0 to 1

def accuracy(scores, truth):
    """Share of clips whose highest score (N, C) is the true class's (N,)."""
    return (scores.argmax(1) == truth).double().mean().item()


def _at_thresholds(scores, truth):
    """True and false positives at each threshold, highest first; one for equal scores."""
    scores, order = scores.sort(descending=True)
    last = F.pad(scores.diff() != 0, (0, 1), value=True)
    true = truth[order].double().cumsum(0)
    false = torch.arange(1, len(truth) + 1, device=truth.device) - true
    return true[last], false[last]


def average_precision(scores, truth):
    """Precision summed over the steps of recall: scores (N,), truth (N,) 0 or 1."""
    true, false = _at_thresholds(scores, truth)
    steps = true.diff(prepend=true.new_zeros(1))
    return (true / (true + false) * steps).sum().item() / true[-1].item()


def mean_average_precision(scores, truth):
    """Mean over the classes that occur: scores (N, C), truth (N, C) 0 or 1."""
    total, occurring = 0.0, truth.any(0).nonzero()[:, 0]
    for c in occurring:
        total += average_precision(scores[:, c], truth[:, c])
    return total / max(1, len(occurring))


def equal_error_rate(scores, truth):
    """False accepts and rejects where they are closest: scores, truth (N,)."""
    true, false = _at_thresholds(scores, truth)
    accepts = F.pad(false / false[-1], (1, 0))
    rejects = 1 - F.pad(true / true[-1], (1, 0))
    best = (accepts - rejects).abs().argmin()
    return (accepts[best] + rejects[best]).item() / 2


def one_minus_eer(scores, truth):
    """scores (N, 2), truth (N,) 0 or 1."""
    return 1 - equal_error_rate(scores[:, 1] - scores[:, 0], truth)


def segment_f1(scores, truth, clip, seconds, average, token_seconds=0.02):
    """F1 of segments: scores and truth (N, C) of tokens, clip (N,) theirs, ascending.

    A segment has a class if any of its tokens has it (score > 0). macro: mean over classes,
    micro: counts pooled. A clip's shorter last segment counts (X-ARES drops it).
    """
    token = torch.arange(len(clip), device=clip.device) - torch.searchsorted(clip, clip)
    number = (token * token_seconds / seconds + 1e-6).floor()  # of its segment in the clip
    begins = (number.diff() != 0) | (clip.diff() != 0)
    segment = F.pad(begins, (1, 0)).cumsum(0)  # (N,)
    empty = torch.zeros(int(segment[-1]) + 1, truth.shape[1], device=truth.device)
    found = empty.index_add(0, segment, (scores > 0).float()) > 0
    true = empty.index_add(0, segment, truth.float()) > 0
    hits, sizes = (found & true).sum(0), found.sum(0) + true.sum(0)  # (C,)
    if average == "micro":
        hits, sizes = hits.sum(), sizes.sum()
    return (2 * hits.double() / sizes.clamp(min=1)).mean().item()


def recall_at_1(audio, text, owner):
    """Mean of both directions: audio (N, E), text (M, E), owner (M,) the clips of text."""
    similarity = F.normalize(audio, dim=1) @ F.normalize(text, dim=1).T  # (N, M)
    to_text = owner[similarity.argmax(1)] == torch.arange(len(audio), device=owner.device)
    to_audio = similarity.argmax(0) == owner
    return (to_text.double().mean() + to_audio.double().mean()).item() / 2


def word_error_rate(answers, truths):
    """Substituted, missing and inserted words over all true words, in lower case."""
    errors = words = 0
    for answer, truth in zip(answers, truths, strict=True):
        answer, truth = answer.lower().split(), truth.lower().split()
        costs = list(range(len(answer) + 1))  # edit distance
        for i, word in enumerate(truth):
            above, costs = costs, [i + 1]
            for j, other in enumerate(answer):
                swap = above[j] + (word != other)
                costs.append(min(swap, above[j + 1] + 1, costs[j] + 1))
        errors += costs[-1]
        words += len(truth)
    return errors / max(1, words)


CLIP_METRICS = {"accuracy": accuracy, "mAP": mean_average_precision, "1 - EER": one_minus_eer}
FRAME_METRICS = {
    "segment F1 macro": partial(segment_f1, seconds=1.0, average="macro"),  # DESED's
    "segment F1 micro": partial(segment_f1, seconds=0.1, average="micro"),  # MAESTRO's
}
TEXT_METRICS = ["recall@1", "1 - WER"]


# ---------------------------------------------------------------- k nearest neighbours

@torch.no_grad()
def knn(x, truth, train, test, k=10, temperature=0.07, chunk=16384):
    """Votes (len(test), C) of each test vector's k nearest train vectors.

    x (N, D); truth (N,) classes or (N, C) 0 or 1; train, test: numbers of vectors. A vote
    weighs softmax(cosine / temperature) over the k.
    """
    votes = []
    for items in test.split(1024):
        query = F.normalize(x[items].float(), dim=1)
        cosine, nearest = query.new_empty(len(query), 0), items.new_empty(len(query), 0)
        for others in train.split(chunk):
            new = query @ F.normalize(x[others].float(), dim=1).T
            cosine = torch.cat([cosine, new], 1)
            nearest = torch.cat([nearest, others.expand(len(query), -1)], 1)
            cosine, order = cosine.topk(min(k, cosine.shape[1]))
            nearest = nearest.gather(1, order)
        weight = (cosine / temperature).softmax(1)  # (Q, k)
        if truth.dim() == 2:
            votes.append(torch.einsum("qk,qkc->qc", weight, truth[nearest].float()))
        else:
            empty = weight.new_zeros(len(query), int(truth.max()) + 1)
            votes.append(empty.scatter_add_(1, truth[nearest], weight))
    return torch.cat(votes)


# ---------------------------------------------------------------- training on frozen features

class Parts(NamedTuple):
    """Numbers of the vectors that train, that choose, that are scored, that kNN searches."""
    train: torch.Tensor
    valid: torch.Tensor
    test: torch.Tensor
    neighbours: torch.Tensor


def fit(model, loss_of, items, valid_score, spec):
    """Adam at 1e-3, a cosine down to a tenth -> the epoch, the one with the best valid_score().

    loss_of(some): mean loss of some of train's items (their numbers).
    """
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, spec.epochs, eta_min=1e-4)
    best = -math.inf
    for epoch in range(1, spec.epochs + 1):
        order = torch.randperm(len(items)).to(items.device)
        for some in items[order].split(spec.batch):
            adam.zero_grad()
            loss_of(some).backward()
            adam.step()
        schedule.step()
        with torch.no_grad():
            value = valid_score()
        if value >= best:  # assumption: of equal epochs the last, which has trained longest
            best, chosen = value, epoch
            weights = copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    return chosen


def new_probe(width, hidden, classes):
    """(B, D) -> (B, C): LayerNorm, linear (, ReLU, linear where hidden > 0)."""
    layers = [nn.LayerNorm(width, elementwise_affine=False)]
    sizes = [width, hidden, classes] if hidden else [width, classes]
    for inputs, outputs in zip(sizes, sizes[1:]):
        linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
        # nn.Linear's distribution, drawn in the order that repeats the published scores.
        start = (2 * torch.rand(inputs + 1, outputs) - 1) / math.sqrt(inputs)
        linear.weight.data.copy_(start[:-1].T)
        linear.bias.data.copy_(start[-1])
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def score_probe(x, truth, measure, spec, size, parts, seed):
    """A probe's score on test, and its epoch, chosen on valid.

    x (N, D); truth (N,) classes or (N, C) 0 or 1; size: width, hidden, classes;
    measure(scores, items) -> float.
    """
    torch.manual_seed(seed)
    probe = new_probe(*size).to(x.device)
    weight = torch.tensor(spec.positive_weight, device=x.device)

    def loss_of(items):
        scores, answers = probe(x[items].float()), truth[items]  # (B, C), (B,) or (B, C)
        if answers.dim() == 1:
            return F.cross_entropy(scores, answers)
        return F.binary_cross_entropy_with_logits(scores, answers.float(), pos_weight=weight)

    @torch.no_grad()
    def score(items):
        scores = [probe(x[some].float()) for some in items.split(65536)]
        return measure(torch.cat(scores), items)

    epoch = fit(probe, loss_of, parts.train, partial(score, parts.valid), spec)
    return score(parts.test), epoch


class Retriever(nn.Module):
    """Clips and captions in one space: an MLP on features, the mean of an MLP on words."""

    def __init__(self, width, words, size=512):
        super().__init__()
        self.audio = nn.Sequential(nn.LayerNorm(width), *self.mlp(width, size))
        self.text = nn.Sequential(*self.mlp(size, size))
        self.words = nn.Embedding(len(words) + 1, size)
        self.scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.number = {word: i for i, word in enumerate(words, 1)}  # 0: any other word

    @staticmethod
    def mlp(width, size):
        return nn.Linear(width, size), nn.GELU(), nn.Linear(size, size)

    def forward(self, x, captions):
        """x (N, D), words of M captions -> (N, E), (M, E), of length 1."""
        ids, starts = [], []
        for words in captions:
            starts.append(len(ids))
            ids += [self.number.get(word, 0) for word in words] or [0]
        ids, starts = torch.tensor(ids).to(x.device), torch.tensor(starts).to(x.device)
        text = F.embedding_bag(ids, self.text(self.words.weight), starts, mode="mean")
        return F.normalize(self.audio(x), dim=1), F.normalize(text, dim=1)


def score_retrieval(x, captions, spec, parts, seed):
    """Recall@1 on test, and the epoch: x (N, D), captions of each vector, as in X-ARES."""
    def pairs(items):
        owner, texts = [], []
        for place, n in enumerate(items.tolist()):
            owner += [place] * len(captions[n])
            texts += [re.findall(r"\w+", caption.lower()) for caption in captions[n]]
        return x[items], torch.tensor(owner).to(x.device), texts

    torch.manual_seed(seed)
    train, owner, texts = pairs(parts.train)
    model = Retriever(x.shape[1], sorted(set().union(*texts))).to(x.device)

    def loss_of(items):
        clips = owner[items]  # (B,)
        audio, text = model(train[clips], [texts[i] for i in items.tolist()])
        # Another caption of the same clip is no wrong answer.
        twin = (clips[:, None] == clips).fill_diagonal_(False)
        logits = (audio @ text.T * model.scale.exp()).masked_fill(twin, -math.inf)
        target = torch.arange(len(items), device=x.device)
        return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)

    @torch.no_grad()
    def recall(x, owner, texts):
        return recall_at_1(*model(x, texts), owner)

    captions_of_train = torch.arange(len(owner), device=x.device)
    valid_score = partial(recall, *pairs(parts.valid))
    epoch = fit(model, loss_of, captions_of_train, valid_score, spec)
    return recall(*pairs(parts.test)), epoch


def score_transcription(tokens, texts, spec, encoder, decoder, parts, seed):
    """1 - WER on test, and the epoch: a frozen decoder hears through an adapter trained here.

    tokens: (T, D) of each clip; texts: of each clip; parts: of clips.
    """
    torch.manual_seed(seed)
    adapter = new_adapter(encoder, decoder, stack=4)
    stored = SimpleNamespace(encode=lambda features, lengths: (features, lengths))
    model = UniWhisper(stored, adapter, decoder).to(tokens[0].device)
    instruction, tokenizer = data.TEMPLATES["transcribe"][0], decoder.tokenizer

    def batch_of(clips):
        features, answers = [], []
        for n in clips.tolist():
            features.append(tokens[n].float())
            answers.append(tokenizer.answer(texts[n]))
        return SimpleNamespace(
            audio=pad_sequence(features, batch_first=True),
            samples=torch.tensor(list(map(len, features))),
            prompts=[tokenizer.prompt(instruction)] * len(clips), answers=answers)

    def loss_of(items):
        return model(batch_of(items)).mean()

    def valid_score():
        loss = 0.0
        for clips in parts.valid.split(spec.batch):
            loss += model(batch_of(clips)).sum().item()
        return -loss

    epoch = fit(adapter, loss_of, parts.train, valid_score, spec)
    answers = []
    for clips in parts.test.split(spec.batch):
        batch = batch_of(clips)
        answers += model.generate(batch.audio, batch.samples, [instruction] * len(clips), 200)
    errors = word_error_rate(answers, [texts[n] for n in parts.test.tolist()])
    return max(0.0, 1 - errors), epoch


# ---------------------------------------------------------------- tasks

class Clip(NamedTuple):
    rows: Rows
    number: int  # of its row
    split: object  # train, valid, test, held out, or a fold
    label: object  # class, classes, (onset, offset, class) events, captions or text


@dataclass
class Task:
    name: str
    spec: Spec
    clips: list[Clip]

    def __post_init__(self):
        self.frames = self.spec.metric in FRAME_METRICS or self.spec.metric == "1 - WER"

    @property
    def classes(self):
        return [] if self.spec.metric in TEXT_METRICS else classes_of(self.clips)

    @property
    def folds(self):
        return sorted({c.split for c in self.clips if isinstance(c.split, int)})


def classes_of(clips):
    classes = set()
    for clip in clips:
        for label in [clip.label] if isinstance(clip.label, str) else clip.label:
            classes.add(label if isinstance(label, str) else label[2])
    return sorted(classes)


# What a manifest's row has (tags: a label that is a list) -> the metrics that fit it.
FITTING = {"events": list(FRAME_METRICS), "captions": ["recall@1"], "tags": ["mAP"],
           "label": ["accuracy", "1 - EER"], "answer": ["1 - WER"]}


def _read_events(value):
    events = []
    try:
        for event in value:
            onset, offset = float(event["onset"]), float(event["offset"])
            require(0 <= onset <= offset < math.inf, "not in order")
            events.append((onset, offset, str(event["label"])))
    except (TypeError, KeyError, ValueError):
        raise ValueError("events must be a list of {onset, offset, label}, in seconds, "
                         "0 <= onset <= offset") from None
    return events


def _read_label(row):
    """(key of FITTING, label) of a manifest's row."""
    for kind in ("events", "captions", "label", "answer"):
        value = row.get(kind)
        if value in (None, ""):
            continue
        if kind == "events":
            value = _read_events(value)
        elif kind == "captions":
            texts = isinstance(value, list) and set(map(type, value)) == {str}
            require(texts, f"captions is {value!r}; need a list of texts")
        elif kind == "label" and isinstance(value, list):
            kind, value = "tags", list(map(str, value))
        else:
            value = str(value)
        return kind, value
    raise ValueError("lacks a label; probing needs a label, events, captions or an answer")


def _read_row(rows, i):
    """The task's name and Spec, and the Clip, of a manifest's row."""
    row = {"domain": "other", "split": None} | rows[i]
    require(row.get("task"), "lacks task; probing needs one")
    for key in ("task", "domain"):
        require(isinstance(row[key], str), f"{key} is {row[key]!r}; need a text")
    kind, label = _read_label(row)
    fitting = FITTING[kind]
    metric = row.get("metric", fitting[0])
    require(metric in fitting,
            f"metric is {metric!r}; with {kind} it can be {' or '.join(fitting)}")
    split = "train" if row["split"] is None else str(row["split"])
    if split.isdecimal():
        split = int(split)
    elif split not in ("train", "valid", "test"):
        raise ValueError(f"split is {split!r}; need train, valid, test or a fold's number; "
                         f"the data has {', '.join(sorted(rows.splits))}")
    class_task = kind in ("label", "tags")
    spec = Spec(row["domain"], kind, metric=metric, epochs=30, knn=class_task)
    return row["task"], spec, Clip(rows, i, split, label)


def manifest_tasks(rows):
    """A task for each `task` of the rows. It is of events, captions, labels (lists: tagging)
    or answers, whichever they have; `metric` may name another metric that fits."""
    tasks = {}
    for i in range(len(rows)):
        try:
            name, spec, clip = _read_row(rows, i)
            task = tasks.setdefault(name, Task(name, spec, []))
            this, first = (f"{s.domain}, {s.label}, {s.metric}" for s in (spec, task.spec))
            require(this == first, f"{this}; its task {name} begins with {first}")
        except ValueError as e:
            raise ValueError(f"{rows.name(i)}: {e}") from None
        task.clips.append(clip)
    return list(tasks.values())


def xares_task(env, name):
    """One of X-ARES's tasks from the tars in ENV/NAME, unconverted."""
    spec, clips = XARES[name], []
    splits, tars = spec.splits, spec.splits
    if isinstance(tars, str):
        splits, tars = ("train", "valid", "test"), tars.split()
    for split, tar in zip(splits, tars):
        rows = [] if tar == "-" else Rows([Path(env, name, spec.tars.format(tar) + "*.tar")])
        for i in range(len(rows)):
            try:
                key = spec.label
                label = key(rows[i]) if callable(key) else str(rows[i][key])
            except (KeyError, TypeError, AttributeError) as e:
                raise ValueError(f"{rows.name(i)}: not as in X-ARES's {name} ({e!r})") from None
            clips.append(Clip(rows, i, split, label))
    return Task(name, spec, clips)


def rotations(task, clip):
    """Parts of the vectors of clips (N,). Folds take turns: test on one, choose on the next.

    A part without clips, or with one class only for 1 - EER, is a ValueError.
    """
    turns, folds = [], task.folds
    for test, valid in zip(folds, folds[1:] + folds[:1]):
        others = set(folds) - {test}
        turns.append((others - {valid}, {valid}, {test}, others))
    if not folds:
        turns = [({"train"}, {"valid", "held out"}, {"test"}, {"train", "held out"})]
    rotated = []
    for turn in turns:
        parts = []
        for name, splits in zip(Parts._fields, turn):
            inside = torch.tensor([c.split in splits for c in task.clips])
            items = inside.to(clip.device)[clip].nonzero()[:, 0]
            found = clips_of(task, clip[items])
            require(found, f"{task.name}: no readable clip is left in {name}; it needs more")
            if task.spec.metric == "1 - EER":
                both = len(classes_of(found)) == 2
                require(both, f"{task.name}: only one class is left in {name}; "
                        "1 - EER needs both")
            parts.append(items)
        rotated.append(Parts(*parts))
    return rotated


def clips_of(task, numbers):
    return [task.clips[n] for n in numbers.unique().tolist()]


def check(task, say):
    """Refuse what cannot be scored (ValueError), say what is odd, before anything is encoded.
    Without valid hold out a tenth of train."""
    name, metric, classes, folds = task.name, task.spec.metric, task.classes, task.folds
    if metric not in TEXT_METRICS:
        need = "two" if metric == "1 - EER" else "two or more"
        enough = len(classes) == 2 or (len(classes) > 2 and metric != "1 - EER")
        require(enough, f"{name}: has {len(classes)} class(es), {', '.join(classes[:3])}; "
                f"{metric} needs {need}")
    splits = {clip.split for clip in task.clips}
    named = {"train", "test"} <= splits and not folds
    rotating = classes and len(folds) > 2 and splits == set(range(folds[0], folds[-1] + 1))
    found, or_folds = ", ".join(sorted(map(str, splits))), ""
    if classes:
        or_folds = ", or three folds or more, without a gap"
    require(named or rotating, f"{name}: its splits are {found}; need train and test{or_folds}")
    if named and "valid" not in splits:
        hold_out(task, say)
    for turn, parts in enumerate(rotations(task, torch.arange(len(task.clips)))):
        when = f" when fold {folds[turn]} is test" if folds else ""
        known = classes_of(clips_of(task, parts.neighbours))
        lost = sorted(set(classes) - set(known))
        if lost:
            say(f"note: {name}: no clip of class {', '.join(lost[:5])} is in train{when}; "
                "its clips elsewhere count as wrong")
        if classes and len(classes_of(clips_of(task, parts.test))) == 1:
            say(f"note: {name}: all clips of test are of one class{when}")


def hold_out(task, say):
    train = [n for n, clip in enumerate(task.clips) if clip.split == "train"]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    held = order[: math.ceil(len(train) / 10)].tolist()
    for n in held:
        task.clips[train[n]] = task.clips[train[n]]._replace(split="held out")
    say(f"note: {task.name} has no valid split: its epoch is chosen on {len(held)} clips "
        "held out of train")


def targets(task, clip, token_seconds=0.02):
    """Truth of each vector, given its clip (N,) ascending: (N,) classes, or (N, C) bool."""
    number = {name: i for i, name in enumerate(task.classes)}
    if not task.frames and task.spec.metric != "mAP":
        return torch.tensor([number[c.label] for c in task.clips])[clip]
    truth = torch.zeros(len(clip), len(number), dtype=torch.bool)
    sizes = torch.bincount(clip, minlength=len(task.clips)).tolist()
    for c, mine in zip(task.clips, truth.split(sizes)):  # (T, C)
        for label in c.label:
            if task.frames:  # both ends rounded up, as in X-ARES
                onset, offset, name = label
                begin, end = math.ceil(onset / token_seconds), math.ceil(offset / token_seconds)
                mine[begin:end, number[name]] = True
            else:
                mine[:, number[label]] = True
    return truth


# ---------------------------------------------------------------- features

class Features(NamedTuple):
    x: torch.Tensor  # (N, D), half precision in frame tasks
    clip: torch.Tensor  # (N,) ascending
    failed: list[str]  # a message for each clip that cannot be read


@torch.inference_mode()
def _encode(encoder, clips, frames, s):
    """Features of each clip: (1, D), pooled over its real tokens; in frame tasks (T, D)."""
    device, amp = next(encoder.parameters()).device, PRECISIONS[s.precision]
    samples = torch.tensor(list(map(len, clips)))
    audio = pad_sequence(clips, batch_first=True).to(device)
    with torch.autocast(device.type, amp, enabled=amp is not None):
        x, lengths = encoder.encode(audio, samples, pad_to_window=s.context == "30s")
    x = x.float()  # (B, T, D), zero beyond lengths
    if frames:
        return [tokens[:n].half().cpu() for tokens, n in zip(x, lengths.tolist())]
    count = lengths[:, None].to(device)  # (B, 1)
    mean = x.sum(1) / count
    if s.pool == "mean+std":
        real = torch.arange(x.shape[1], device=device) < count  # (B, T)
        spread = (x - mean[:, None]) * real[:, :, None]
        mean = torch.cat([mean, (spread.square().sum(1) / count).sqrt()], 1)
    return list(mean[:, None].cpu())


def _join(found):
    """{(clip, crop): (T, D)} -> x (N, D), clip (N,)."""
    keys = sorted(found)
    sizes = [len(found[key]) for key in keys]
    clip = torch.tensor([n for n, _ in keys]).repeat_interleave(torch.tensor(sizes))
    x = found[keys[0]].new_empty(len(clip), found[keys[0]].shape[1])
    for key, part in zip(keys, x.split(sizes)):
        part.copy_(found.pop(key))  # freed at once: frame tasks are large
    return x, clip


def _read_ahead(task, seconds, rate, failed):
    """Lists of (clip, crop, samples), half an hour each, short clips first; the next list is
    decoded meanwhile. Clips that cannot be read leave a message in `failed`."""
    def read(n):
        try:
            audio = task.clips[n].rows.audio(task.clips[n].number, rate)
        except AudioError as e:
            failed.append(str(e))
            return []
        size = round(task.spec.crop * rate) or len(audio)
        crops = audio.split(size)[: max(1, len(audio) // size)]
        return [(n, k, crop) for k, crop in enumerate(crops)]

    order = sorted(range(len(seconds)), key=seconds.__getitem__)
    with ThreadPoolExecutor(4) as pool:
        ready = []
        for numbers in data.cut(order, sorted(seconds), 1800):
            ahead = pool.map(read, numbers)
            yield sum(ready, [])
            ready = ahead
        yield sum(ready, [])


def extract(encoder, task, s, say):
    """Features of a task's clips. Over 1 % that cannot be read, or NaN, is a ValueError."""
    def cost(seconds):
        return math.ceil(seconds / 30) * 30 if s.context == "30s" else seconds

    # 0.1: even the shortest clip takes its time.
    seconds = [0.1 + float(c.rows.seconds[c.number]) for c in task.clips]
    rate, found, failed = encoder.sample_rate, {}, []
    done, total, began, said = 0, sum(map(cost, seconds)), time.time(), time.time()
    for pieces in _read_ahead(task, seconds, rate, failed):
        pieces.sort(key=lambda piece: len(piece[2]))
        costs = [cost(len(audio) / rate) for _, _, audio in pieces]
        for batch in data.cut(pieces, costs, s.batch_seconds):
            encoded = _encode(encoder, [audio for _, _, audio in batch], task.frames, s)
            for (n, k, _), x in zip(batch, encoded):
                if not x.isfinite().all():
                    name = task.clips[n].rows.name(task.clips[n].number)
                    raise ValueError(f"{name}: its features are not finite; "
                                     "try --precision fp32, or check the weights")
                found[n, k] = x
                done += 0 if k else cost(seconds[n])
            if time.time() - said > 10:
                said = time.time()
                left = (total - done) / max(1, done) * (said - began)
                say(f"{task.name}: {done / total:.0%} encoded, {left:.0f} s left")
    require(len(failed) <= 0.01 * len(task.clips), f"{task.name}: {len(failed)} of "
            f"{len(task.clips)} clips cannot be read, over 1 %: {min(failed, default='')}")
    return Features(*_join(found), sorted(failed))


def fingerprint(encoder):
    """Hash of an encoder's configuration and weights, and of the code that makes features."""
    h = hashlib.blake2b(json.dumps(encoder.config, sort_keys=True).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        h.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        h.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    for code in (uniwhisper, data, _encode, _read_ahead, extract):
        h.update(inspect.getsource(code).encode())
    return h.hexdigest()


def _stamp(clip):
    """What changes when a clip does: its file, its place in a tar, the file's size and time."""
    where = clip.rows.table[clip.number]
    file, at = clip.rows.paths[where["file"]], int(where["audio_at"])
    if at < 0:
        file = os.path.join(os.path.dirname(file), clip.rows[clip.number]["audio"])
    stat = os.stat(file) if os.path.exists(file) else None
    return [os.path.abspath(file), at, stat and stat.st_size, stat and stat.st_mtime_ns]


def cached_features(encoder, mark, task, s, say):
    """`extract`, kept on disk under a hash of all that it depends on; mark: a fingerprint."""
    key = [mark, s.context, s.pool, s.precision, s.device, task.spec.crop, task.frames]
    key += map(_stamp, task.clips)
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()
    path = Path(s.cache, re.sub(r"[^\w.-]", "_", task.name) + f"-{digest}.safetensors")
    try:
        with safe_open(path, "pt") as f:
            failed = json.loads(f.metadata()["failed"])
            return Features(f.get_tensor("x"), f.get_tensor("clip"), failed)
    except (OSError, SafetensorError):
        pass  # not there, or damaged
    x, clip, failed = extract(encoder, task, s, say)
    new = Path(f"{path}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"x": x, "clip": clip}, new, {"failed": json.dumps(failed)})
        new.replace(path)
    except (OSError, SafetensorError) as e:  # no reason to lose hours of work
        say(f"note: {path}: features are not kept: {e}")
    return Features(x, clip, failed)


# ---------------------------------------------------------------- scores

def measure_of(task, truth, clip, token_seconds):
    """measure(scores, items) -> float, the task's metric for some of its vectors."""
    def measure(scores, items):
        if not task.frames:
            return CLIP_METRICS[task.spec.metric](scores, truth[items])
        segments = FRAME_METRICS[task.spec.metric]
        return segments(scores, truth[items], clip[items], token_seconds=token_seconds)

    return measure


def score(task, features, s, encoder, decoder=None):
    """What --json holds of a task: its scores and what they are of."""
    spec = replace(task.spec, epochs=s.epochs or task.spec.epochs)
    x, clip = features.x.to(s.device), features.clip.to(s.device)
    turns, seeds, near = rotations(task, clip), range(s.seeds), None
    test = sum(len(clip[parts.test].unique()) for parts in turns) // len(turns)  # clips
    if spec.metric == "recall@1":
        captions = [task.clips[n].label for n in clip.tolist()]
        score_once = partial(score_retrieval, x, captions, spec)
    elif spec.metric == "1 - WER":
        readable, sizes = clip.unique_consecutive(return_counts=True)
        turns, seeds = rotations(task, readable), [0]
        texts = [task.clips[n].label for n in readable.tolist()]
        tokens = x.split(sizes.tolist())
        score_once = partial(score_transcription, tokens, texts, spec, encoder, decoder)
    else:
        truth = targets(task, features.clip, encoder.token_seconds).to(s.device)
        measure = measure_of(task, truth, clip, encoder.token_seconds)
        if spec.knn:
            votes = [measure(knn(x, truth, p.neighbours, p.test), p.test) for p in turns]
            near = sum(votes) / len(votes)
        if task.frames:
            spec = replace(spec, batch=500 * spec.batch)
        size = x.shape[1], s.hidden, len(task.classes)
        score_once = partial(score_probe, x, truth, measure, spec, size)
    values, epochs = [], []
    for parts in turns:
        for seed in seeds:
            value, epoch = score_once(parts, seed)
            values.append(value)
            epochs.append(epoch)
    values = torch.tensor(values).view(len(turns), -1).mean(0)  # (seeds,)
    out = dict(domain=spec.domain, metric=spec.metric, classes=len(task.classes), test=test,
               weight=spec.weight or test, knn=near, mlp=values.mean().item(), epochs=epochs)
    if len(values) > 1:
        out["mlp_std"] = values.std().item()
    return out


@torch.no_grad()
def averages(scores):
    """{task: scores} -> {domain or "all": means of kNN and MLP, by weight and plain}."""
    out = {}
    for domain in [*dict.fromkeys(r["domain"] for r in scores.values()), "all"]:
        out[domain] = {}
        for key in ("knn", "mlp"):
            values, weights = [], []
            for r in scores.values():
                if domain in (r["domain"], "all") and r[key] is not None:
                    values.append(r[key])
                    weights.append(r["weight"])
            total = sum(v * w for v, w in zip(values, weights))
            out[domain][key] = total / sum(weights) if values else None
            out[domain][key + "_plain"] = sum(values) / len(values) if values else None
    return out


def short_names(folders):
    """Folders without the leading parts that all share."""
    folders = list(map(os.path.abspath, folders))
    shared = os.path.commonpath(list(map(os.path.dirname, folders)))
    return [os.path.relpath(folder, shared) for folder in folders]


def _line(head, scores, width, plain=""):
    """A line of the table; later encoders with their difference to the first."""
    line = "{:22} {:12} {:17}{:>6}".format(*head)
    for key in ("knn", "mlp"):
        for r in scores:
            value = r[key + plain]
            cell = "-" if value is None else f"{value:.3f}"
            if key == "mlp" and "mlp_std" in r:
                cell += f" ±{r['mlp_std']:.3f}"
            if r is not scores[0] and value is not None:
                cell += f" {value - scores[0][key + plain]:+.3f}"
            line += f"{cell:>{width}}"
    return line


def table(results):
    """{encoder: {task: scores}} -> text with a line for each task and average."""
    first, names = next(iter(results.values())), short_names(results)
    width = max(22, *(len(name) + 6 for name in names))
    heads = [f"{kind} {name}".rjust(width) for kind in ("kNN", "MLP") for name in names]
    lines = ["{:22} {:12} {:17}{:>6}".format("task", "domain", "metric", "test") + "".join(heads)]
    for name, r in first.items():
        head = name, r["domain"], r["metric"], r["test"]
        lines.append(_line(head, [scores[name] for scores in results.values()], width))
    means = list(map(averages, results.values()))
    for domain in means[0]:
        tested = sum(r["test"] for r in first.values() if domain in (r["domain"], "all"))
        scores = [mean[domain] for mean in means]
        lines.append(_line(("= " + domain, "", "weighted", tested), scores, width))
    lines.append(_line(("= all", "", "plain mean", tested), scores, width, "_plain"))
    for source, tasks, near, mlp in REFERENCES:
        if tasks == set(first):
            lines.append(f"{source}: kNN {near}, MLP {mlp} (weighted, the same tasks)")
    return "\n".join(lines)


# ---------------------------------------------------------------- command line

@dataclass(frozen=True)
class Settings:
    encoder: tuple[str, ...] = flag((), "encoder folders, compared with the first", required=True)
    data: tuple[str, ...] = flag((), "manifests and tars")
    xares: str = flag("", "folder of X-ARES downloads: XARES/esc50/*.tar, ...")
    tasks: tuple[str, ...] = flag((), "score these tasks only")
    decoder: str = flag("", "Qwen folder, for transcription (else left out)")
    on: str = flag("test", "split that is scored; choices are made on valid",
                   choices=("test", "valid"))
    context: str = flag("clip", "encode clips at their length, or padded to 30 s as in Whisper",
                        choices=("clip", "30s"))
    layer: int | None = flag(None, "features after this layer (default: all)")
    pool: str = flag("mean", "over a clip's tokens", choices=("mean", "mean+std"))
    precision: str = flag("fp32", "of the encoder", choices=tuple(PRECISIONS))
    batch_seconds: float = flag(40.0, "audio in an encoder batch; more suits a GPU")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1, ...")
    # assumption: the paper says "MLP" and gives neither width nor activation
    hidden: int = flag(256, "width of the probe's hidden layer; 0: linear, as in X-ARES")
    epochs: int = flag(0, "of the probe (0: X-ARES's own, or else 30)")
    seeds: int = flag(3, "probes of a task, for mean and spread")
    cache: str = flag(str(Path.home() / ".cache" / "uniwhisper"), "folder of kept features")
    json: str = flag("", "write settings and scores there")


def check_flags(s):
    """Refuse what would fail only after the work is done."""
    require(s.seeds > 0 and 0 < s.batch_seconds < math.inf,
            "--seeds and --batch-seconds must be positive")
    require(s.hidden >= 0 and s.epochs >= 0, "--hidden and --epochs must be 0 or more")
    if s.json:
        folder = Path(s.json).absolute().parent
        require(not Path(s.json).is_dir(), f"{s.json}: is a folder; name a file in it")
        require(folder.is_dir(), f"{s.json}: its folder does not exist")
        refuse_to_overwrite(s.json, *s.data)
    try:
        torch.empty(0, device=s.device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {s.device}: {str(e).splitlines()[0]}") from None


def open_encoder(folder, layer):
    encoder = load_encoder(folder).eval()
    if layer is not None:
        try:
            encoder.keep_layers(layer)
        except ValueError as e:
            raise ValueError(f"{folder}: --{e}") from None
    return encoder


def find_tasks(s, say):
    """The tasks to score, checked; --on valid: with valid in the place of test."""
    own = {task.name: task for task in manifest_tasks(Rows(s.data))} if s.data else {}
    names = list(own)
    if s.xares:
        require(Path(s.xares).is_dir(), f"--xares {s.xares}: no such folder")
        inside = sorted(os.listdir(s.xares))
        public = [name for name in XARES if name in inside]
        require(public, f"--xares {s.xares}: has no folder {', '.join(XARES)}; it has "
                + (", ".join(inside[:5]) or "nothing"))
        both = ", ".join(sorted(own.keys() & set(public)))
        require(not both, f"{both}: in --data and in --xares; rename the manifest's task")
        names += public
    unknown = " ".join(sorted(set(s.tasks).difference(names)))
    require(not unknown, f"--tasks {unknown}: not there; found: {', '.join(names) or 'none'}")
    tasks = []
    for name in s.tasks or names:
        metric = own[name].spec.metric if name in own else XARES[name].metric
        if metric == "1 - WER" and not s.decoder:
            say(f"note: {name} is left out: transcription needs --decoder")
            continue
        tasks.append(own[name] if name in own else xares_task(s.xares, name))
        if s.on == "valid":
            kept = [clip for clip in tasks[-1].clips if clip.split != "test"]
            tasks[-1].clips = [c._replace(split="test") if c.split == "valid" else c
                               for c in kept]
        check(tasks[-1], say)
    require(tasks, "no task to score; give --data or --xares")
    return tasks


def run(s, say):
    """{encoder: {task: scores}}."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape
    for folder in s.encoder:  # a bad one is found before hours of work
        open_encoder(folder, s.layer)
    dtype = torch.bfloat16 if s.device.startswith("cuda") else torch.float32
    decoder = load_decoder(s.decoder, dtype).to(s.device) if s.decoder else None
    tasks, results, threads = find_tasks(s, say), {}, torch.get_num_threads()
    for folder in s.encoder:
        encoder = open_encoder(folder, s.layer).to(s.device)
        mark, results[folder] = fingerprint(encoder), {}
        for task in tasks:
            features = cached_features(encoder, mark, task, s, say)
            for message in features.failed:
                say(f"note: {task.name}: a clip is left out: {message}")
            # A probe on clips is too small for several threads.
            torch.set_num_threads(threads if task.frames else 1)
            r = score(task, features, s, encoder, decoder)
            torch.set_num_threads(threads)
            results[folder][task.name] = r | {"unreadable": len(features.failed)}
            near = "" if r["knn"] is None else f"knn {r['knn']:.3f}, "
            say(f"{folder}: {task.name}: {near}mlp {r['mlp']:.3f}")
    return results


def main():
    """Scores to stdout, all else to stderr; a user's mistake ends in one line."""
    s = Settings(**parse_flags(Settings, __doc__))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # for names that are not UTF-8
    try:
        check_flags(s)
        results = run(s, say=partial(print, file=sys.stderr, flush=True))
        if s.json:
            encoders = {e: {"tasks": r, "averages": averages(r)} for e, r in results.items()}
            text = json.dumps({"settings": asdict(s), "encoders": encoders}, indent=1)
            Path(s.json).write_text(text + "\n")
        print(table(results))
    except (OSError, ValueError) as e:
        sys.exit(f"error: {e}")
    except torch.OutOfMemoryError as e:  # of a GPU
        line = str(e).splitlines()[0]
        sys.exit(f"error: {line} Lower --batch-seconds, or probe on --device cpu")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; the features of finished tasks are kept")


if __name__ == "__main__":
    main()
