"""Frozen features -> scores: nearest neighbours and small probes.

    python probe.py --encoder DIR [DIR ...] --data suite/*.jsonl [--json OUT.json]
    python probe.py --encoder DIR --xares XARES [--tasks esc50 desed ...]

XARES/esc50/*.tar and so on are as X-ARES publishes them. The encoder never changes.
A probe's epoch is chosen on valid; nothing is chosen on test.
N vectors (one a clip or crop; in tasks on events and transcripts one a token), T tokens of
a clip, B batch, D width, C classes, E retrieval space. owner (N,): the number of each
vector's clip, ascending.
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
from itertools import chain
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
from uniwhisper import (UniWhisper, flag, load_decoder, load_encoder,
                        mean_over_tokens, new_adapter, parse_flags,
                        refuse_to_overwrite)

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
CLIP_SECONDS = 10  # a probe on frames takes batches of as many as Spec.batch such clips have
FRAME_SECONDS = 0.02  # of a frame in tasks on events; longer tokens are repeated
MOST_TOKENS = 200  # of a transcript


def require(condition, message):
    if not condition:
        raise ValueError(message)


# ---------------------------------------------------------------- the 22 public tasks of X-ARES

@dataclass(frozen=True)
class Spec:
    domain: str
    label: object  # key or function of the json; or key of FITTING
    weight: int = 0  # in averages; 0: the number of test clips
    tars: str = "{}"  # start of a tar's name; {} is its split or fold
    splits: object = "train valid test"  # the tars' words ("-": none), or folds
    metric: str = "accuracy"
    crop: float = 0.0  # seconds; longer clips are cut, crops scored alone
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


# Tasks, settings (knn=False, too) and spelling of X-ARES 0.1.3. There the probe has no
# hidden layer (--hidden 0), kNN normalises across clips (no scores to compare), probes on
# tokens draw whole clips, F1 drops a clip's shorter last segment, without valid the epoch is
# chosen on test (here on a tenth of train); probes of captions and transcripts differ.
LIBRI = "train-clean-100 dev-clean test-clean"
XARES = {
    "asvspoof2015": Spec("speech", "binary_spoof", 2000, "asvspoof_{}",
                         "train valid eval", epochs=5, batch=64),
    # "validation" is the test split; all keys but audio are captions; no clip has two crops.
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
    "libricount": Spec("speech", "num_speakers", 1144, "libricount_fold{:02}", range(5), batch=64),
    "librispeech": Spec("speech", "trans", 10000, "{}", LIBRI, "1 - WER", batch=4, knn=False),
    "librispeechmalefemale": Spec("speech", "gender", 2620, "{}", LIBRI, crop=5),
    "maestro": Spec("music", lambda row: _events(row, "start", "end", "note"), 65,
                    "maestro_{}", metric="segment F1 micro", epochs=50, knn=False,
                    positive_weight=10),
    "nsynthinstument": Spec("music", "instrument_family_str", 2000, "nsynth_{}"),
    "ravdess": Spec("speech", "emotion", 360, "ravdess_fold_{}_", range(4)),
    "speechcommandsv1": Spec("speech", "labels", 2000, "wds-audio-{}", batch=64),
    "urbansound8k": Spec("environment", "soundevent", 873, "urbansound_fold{}_", range(1, 11)),
    "vocalimitations": Spec("environment", "imitation", 1867,
                            "vocal_imitations_fold{:02}_", range(3), epochs=20),
    "vocalsound": Spec("speech", "label", 2000),
    "voxceleb1": Spec("speech", "speakerid", 2000, "voxceleb1_{}", crop=6),
    "voxlingua33": Spec("speech", "labels", 1609, "{}", "train_subset - dev", crop=10, batch=64),
}
# assumption: the paper does not name its 20 tasks. Here: all but the two of texts.
PAPER_TASKS = set(XARES) - {"clotho", "librispeech"}
# Source, tasks, weighted averages of kNN and MLP; shown only beside scores of the same tasks.
REFERENCES = [
    ("Whisper (paper)", PAPER_TASKS, "0.46", "0.64"),
    ("UniWhisper (paper)", PAPER_TASKS, "0.61", "0.81"),
    ("Whisper (X-ARES, linear)", set(XARES), "-", "0.632"),
    ("dasheng (X-ARES, linear)", set(XARES), "-", "0.699"),
]


# ---------------------------------------------------------------- metrics: from 0 to 1

def accuracy(scores, truth):
    """Share of vectors whose highest score (N, C) is truth's (N,)."""
    return (scores.argmax(1) == truth).double().mean().item()


def _at_thresholds(scores, truth):
    """True and false positives at each threshold; equal scores share one."""
    scores, order = scores.sort(descending=True)
    last = F.pad(scores.diff() != 0, (0, 1), value=True)  # of equal scores
    tp = truth[order].double().cumsum(0)
    fp = torch.arange(1, len(truth) + 1, device=truth.device) - tp
    return tp[last], fp[last]


def average_precision(scores, truth):
    """Precision summed over the steps of recall: scores, truth (N,)."""
    tp, fp = _at_thresholds(scores, truth)
    steps = tp.diff(prepend=tp.new_zeros(1))
    return (tp / (tp + fp) * steps).sum().item() / tp[-1].item()


def mean_average_precision(scores, truth):
    """Mean over the classes that occur: scores, truth (N, C)."""
    occurring = truth.any(0).nonzero()[:, 0]
    total = sum(average_precision(scores[:, c], truth[:, c]) for c in occurring)
    return total / max(1, len(occurring))


def equal_error_rate(scores, truth):
    """Mean of false accepts and rejects where they are closest: scores, truth (N,)."""
    tp, fp = _at_thresholds(scores, truth)
    accepts = F.pad(fp / fp[-1], (1, 0))
    rejects = 1 - F.pad(tp / tp[-1], (1, 0))
    best = (accepts - rejects).abs().argmin()
    return (accepts[best] + rejects[best]).item() / 2


def one_minus_eer(scores, truth):
    """scores (N, 2), truth (N,) 0 or 1."""
    return 1 - equal_error_rate(scores[:, 1] - scores[:, 0], truth)


def segment_f1(scores, truth, owner, seconds, average, token_seconds):
    """F1 of segments: scores, truth (N, C) of tokens; owner (N,) ascending."""
    # A segment has a class if any of its tokens has it (score > 0). micro: counts are
    # pooled; macro: mean over all classes, 0 for one that never occurs.
    first_token = torch.searchsorted(owner, owner)  # of the token's clip
    place = torch.arange(len(owner), device=owner.device) - first_token
    # 1e-6: 5 * 0.02 / 0.1 comes out just below 1.
    in_clip = (place * token_seconds / seconds + 1e-6).floor()
    begins = (in_clip.diff() != 0) | (owner.diff() != 0)
    segment = F.pad(begins, (1, 0)).cumsum(0)  # (N,)
    empty = torch.zeros(int(segment[-1]) + 1, truth.shape[1], device=truth.device)
    predicted = empty.index_add(0, segment, (scores > 0).float()) > 0
    actual = empty.index_add(0, segment, truth.float()) > 0
    tp = (predicted & actual).sum(0)  # (C,)
    both = predicted.sum(0) + actual.sum(0)
    if average == "micro":
        tp, both = tp.sum(), both.sum()
    return (2 * tp.double() / both.clamp(min=1)).mean().item()


def recall_at_1(audio, text, owner):
    """Mean of both directions: audio (N, E), text (M, E), owner (M,) in audio."""
    similarity = F.normalize(audio, dim=1) @ F.normalize(text, dim=1).T  # (N, M)
    to_text = owner[similarity.argmax(1)] == torch.arange(len(audio), device=owner.device)
    to_audio = similarity.argmax(0) == owner
    return (to_text.double().mean() + to_audio.double().mean()).item() / 2


def word_error_rate(guesses, truths):
    """Substituted, missing and inserted words per true word, in lower case."""
    errors = words = 0
    for guess, truth in zip(guesses, truths, strict=True):
        guess, truth = guess.lower().split(), truth.lower().split()
        costs = list(range(len(guess) + 1))  # edit distance
        for i, word in enumerate(truth):
            above, costs = costs, [i + 1]
            for j, other in enumerate(guess):
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


# ---------------------------------------------------------------- neighbours and probes

@torch.no_grad()
def knn(x, truth, train, test, k=10, temperature=0.07, chunk=1024):
    """Votes (len(test), C) of each test vector's k nearest train vectors: x (N, D);
    truth (N,) classes or (N, C) 0 or 1; train, test: indices."""
    votes, neighbours = [], F.normalize(x[train].float(), dim=1)
    for batch in test.split(chunk):
        cosine = F.normalize(x[batch].float(), dim=1) @ neighbours.T
        cosine, order = cosine.topk(min(k, len(train)))
        weight, nearest = (cosine / temperature).softmax(1), train[order]  # (B, k)
        if truth.dim() == 2:
            votes.append(torch.einsum("bk,bkc->bc", weight, truth[nearest].float()))
        else:
            empty = weight.new_zeros(len(batch), int(truth.max()) + 1)
            votes.append(empty.scatter_add_(1, truth[nearest], weight))
    return torch.cat(votes)


class Parts(NamedTuple):
    """Indices of vectors."""
    train: torch.Tensor  # train the probe
    valid: torch.Tensor  # choose its epoch
    test: torch.Tensor  # score it
    neighbours: torch.Tensor  # kNN searches


def fit(model, loss_of, indices, valid_score, task):
    """Train with Adam, learning rate 1e-3 falling to 1e-4 by a cosine. Leaves model at
    the epoch with the best valid_score() and returns that epoch."""
    spec, best, chosen = task.spec, -math.inf, None
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, spec.epochs, eta_min=1e-4)
    for epoch in range(1, spec.epochs + 1):
        order = torch.randperm(len(indices)).to(indices.device)
        for batch in indices[order].split(spec.batch):
            adam.zero_grad()
            loss_of(batch).backward()
            adam.step()
        schedule.step()
        with torch.no_grad():
            value = valid_score()
        if value >= best:  # assumption: of equals the last
            best, chosen = value, epoch
            weights = copy.deepcopy(model.state_dict())
    require(chosen, f"{task.name}: its scores on valid are NaN; try another --layer")
    model.load_state_dict(weights)
    return chosen


def new_probe(width, hidden, classes):
    """(B, D) -> (B, C): LayerNorm, linear (, ReLU, linear where hidden > 0)."""
    layers = [nn.LayerNorm(width, elementwise_affine=False)]
    sizes = [width, hidden, classes] if hidden else [width, classes]
    for inputs, outputs in zip(sizes, sizes[1:]):
        linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
        # As nn.Linear; one draw for both, transposed, repeats the scores in tests/results/.
        start = (2 * torch.rand(inputs + 1, outputs) - 1) / math.sqrt(inputs)
        linear.weight.data.copy_(start[:-1].T)
        linear.bias.data.copy_(start[-1])
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def score_probe(x, truth, measure, task, size, parts, seed):
    """A probe's score on test, and its epoch: x (N, D); truth (N,) or (N, C);
    measure(scores, indices) -> float; size: width, hidden, classes."""
    torch.manual_seed(seed)
    probe = new_probe(*size).to(x.device)
    weight = torch.tensor(task.spec.positive_weight, device=x.device)

    def loss_of(batch):
        scores, labels = probe(x[batch].float()), truth[batch]  # (B, C), (B,) or (B, C)
        if labels.dim() == 1:
            return F.cross_entropy(scores, labels)
        return F.binary_cross_entropy_with_logits(scores, labels.float(), pos_weight=weight)

    @torch.no_grad()
    def score_of(indices):
        scores = [probe(x[batch].float()) for batch in indices.split(65536)]
        return measure(torch.cat(scores), indices)

    epoch = fit(probe, loss_of, parts.train, partial(score_of, parts.valid), task)
    return score_of(parts.test), epoch


class Retriever(nn.Module):
    """Clips and captions in one space. A clip is an MLP of its feature; a caption is the
    mean over its words of an MLP of each word's embedding."""
    def __init__(self, width, words, size=512):
        super().__init__()
        self.audio = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, size), nn.GELU(),
                                   nn.Linear(size, size))
        self.text = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, size))
        self.words = nn.Embedding(len(words) + 1, size)
        self.scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.word_ids = {word: i for i, word in enumerate(words, 1)}  # 0: any other word

    def forward(self, x, captions):
        """x (N, D), words of M captions -> (N, E), (M, E), of length 1."""
        ids, starts = [], []
        for words in captions:
            starts.append(len(ids))
            ids += [self.word_ids.get(word, 0) for word in words] or [0]
        ids = torch.tensor(ids).to(x.device)
        starts = torch.tensor(starts).to(x.device)
        text = F.embedding_bag(ids, self.text(self.words.weight), starts, mode="mean")
        return F.normalize(self.audio(x), dim=1), F.normalize(text, dim=1)


def score_retrieval(x, owner, task, parts, seed):
    """Recall@1 on test, and the epoch: x (N, D), a vector a clip."""
    def pairs(indices):
        """x of clips (n, D); the words of each of their captions; each caption's clip (M,)."""
        text_owner, texts = [], []
        for place, n in enumerate(owner[indices].tolist()):
            for caption in task.clips[n].label:
                text_owner.append(place)
                texts.append(re.findall(r"\w+", caption.lower()))
        return x[indices], texts, torch.tensor(text_owner).to(x.device)

    torch.manual_seed(seed)
    train, texts, text_owner = pairs(parts.train)
    model = Retriever(x.shape[1], sorted(set().union(*texts))).to(x.device)

    def loss_of(batch):  # of texts
        owners = text_owner[batch]  # (B,)
        audio, text = model(train[owners], [texts[i] for i in batch.tolist()])
        # Another caption of the same clip is no wrong answer.
        twin = (owners[:, None] == owners).fill_diagonal_(False)
        logits = (audio @ text.T * model.scale.exp()).masked_fill(twin, -math.inf)
        target = torch.arange(len(batch), device=x.device)
        return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)

    @torch.no_grad()
    def recall(x, texts, text_owner):
        return recall_at_1(*model(x, texts), text_owner)

    indices = torch.arange(len(texts), device=x.device)
    epoch = fit(model, loss_of, indices, partial(recall, *pairs(parts.valid)), task)
    return recall(*pairs(parts.test)), epoch


def score_transcription(x, owner, task, encoder, decoder, parts, seed):
    """1 - WER on test, and the epoch, chosen by loss: x (N, D) of tokens. Trains only
    the adapter that feeds stored features to a frozen decoder."""
    torch.manual_seed(seed)
    adapter = new_adapter(encoder, decoder, stack=4)
    # In the encoder's place: features that are there already.
    stored = SimpleNamespace(encode=lambda features, lengths: (features, lengths))
    model = UniWhisper(stored, adapter, decoder).to(x.device)
    instruction, tokenizer = data.TEMPLATES["transcribe"][0], decoder.tokenizer
    tokens = x.split(torch.bincount(owner, minlength=len(task.clips)).tolist())
    train, valid, test = [owner[part].unique() for part in parts[:3]]  # clips

    def batch_of(clips):
        features, answers = [], []
        for n in clips.tolist():
            features.append(tokens[n].float())  # (T, D)
            answers.append(tokenizer.answer(task.clips[n].label))
        return SimpleNamespace(audio=pad_sequence(features, batch_first=True),
                               samples=torch.tensor(list(map(len, features))),
                               prompts=[tokenizer.prompt(instruction)] * len(clips),
                               answers=answers)

    def loss_of(clips):
        return model(batch_of(clips)).mean()

    def valid_score():
        return -sum(model(batch_of(clips)).sum().item()
                    for clips in valid.split(task.spec.batch))

    epoch = fit(adapter, loss_of, train, valid_score, task)
    guesses = []
    for clips in test.split(task.spec.batch):
        batch, asked = batch_of(clips), [instruction] * len(clips)
        guesses += model.generate(batch.audio, batch.samples, asked, MOST_TOKENS)
    truths = [task.clips[n].label for n in test.tolist()]
    return max(0.0, 1 - word_error_rate(guesses, truths)), epoch


# ---------------------------------------------------------------- tasks

class Clip(NamedTuple):
    rows: Rows
    row: int  # its index in rows
    split: object  # train, valid, test, held out, or a fold
    label: object  # class, classes, events, captions or text


@dataclass
class Task:
    """Clips to score an encoder on, and how."""
    name: str
    spec: Spec
    clips: list[Clip]

    def __post_init__(self):
        self.on_tokens = self.spec.metric in [*FRAME_METRICS, "1 - WER"]

    @property
    def classes(self):
        return classes_of(self, range(len(self.clips)))

    @property
    def folds(self):
        return sorted({c.split for c in self.clips if isinstance(c.split, int)})


def classes_of(task, indices):
    """Of some clips, each with a class, a list of them, or events."""
    classes = set()
    if task.spec.metric in TEXT_METRICS:
        return []
    for n in indices:
        labels = task.clips[n].label
        for label in [labels] if isinstance(labels, str) else labels:
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
    kinds = ("events", "captions", "label", "answer")
    given = [kind for kind in kinds if row.get(kind) not in (None, "")]
    require(given, "lacks a label; probing needs one, events, captions or an answer")
    kind, value = given[0], row[given[0]]
    if kind == "events":
        return kind, _read_events(value)
    if kind == "captions":
        texts = isinstance(value, list) and set(map(type, value)) == {str}
        require(texts, f"captions is {value!r}; need a list of texts")
        return kind, value
    if kind == "label" and isinstance(value, list):
        return "tags", list(map(str, value))
    return kind, str(value)


def _read_row(rows, i):
    """Task's name, Spec and Clip of a manifest's row."""
    row = {"domain": "other"} | rows[i]
    require(row.get("task"), "lacks task; probing needs one")
    for key in ("task", "domain"):
        require(isinstance(row[key], str), f"{key} is {row[key]!r}; need a text")
    require(row["domain"] != "all", "domain is 'all'; that is the average's name")
    kind, label = _read_label(row)
    fitting = FITTING[kind]
    metric = row.get("metric", fitting[0])
    require(metric in fitting,
            f"metric is {metric!r}; with {kind} it can be {' or '.join(fitting)}")
    split = rows.splits[rows.split[i]]
    if split.isdecimal():
        split = int(split)
    elif split not in ("train", "valid", "test"):
        raise ValueError(f"split is {split!r}; need train, valid, test or a fold's number; "
                         f"the data has {', '.join(sorted(rows.splits))}")
    spec = Spec(row["domain"], kind, metric=metric, epochs=30, knn=kind in ("label", "tags"))
    return row["task"], spec, Clip(rows, i, split, label)


def manifest_tasks(rows):
    """A task for each `task` of the rows. Its kind follows from their field:
    events, captions, label (a list: tagging) or answer."""
    tasks = {}
    for i in range(len(rows)):
        try:
            name, spec, clip = _read_row(rows, i)
            first = tasks.setdefault(name, Task(name, spec, [])).spec
            require(spec == first, f"{spec.domain}, {spec.label}, {spec.metric}; its task "
                    f"{name} begins with {first.domain}, {first.label}, {first.metric}")
        except ValueError as e:
            raise ValueError(f"{rows.name(i)}: {e}") from None
        tasks[name].clips.append(clip)
    return list(tasks.values())


def xares_task(folder, name):
    """One of X-ARES's tasks from the tars in folder/name, unconverted."""
    spec, key, clips = XARES[name], XARES[name].label, []
    splits = words = spec.splits  # folds
    if isinstance(spec.splits, str):
        splits, words = ("train", "valid", "test"), spec.splits.split()
    for split, word in zip(splits, words):
        tars = Path(folder, name, spec.tars.format(word) + "*.tar")
        rows = [] if word == "-" else Rows([tars])
        for i in range(len(rows)):
            try:
                label = key(rows[i]) if callable(key) else str(rows[i][key])
            except (KeyError, TypeError, AttributeError) as e:
                raise ValueError(f"{rows.name(i)}: not as in X-ARES's {name} ({e!r})") from None
            clips.append(Clip(rows, i, split, label))
    return Task(name, spec, clips)


def rotations(task, owner):
    """A list of Parts, one per test fold (one in all for named splits); valid is the
    next fold. ValueError: a part lacks clips or classes."""
    turns, folds = [], task.folds
    for test, valid in zip(folds, folds[1:] + folds[:1]):
        others = set(folds) - {test}
        turns.append((others - {valid}, {valid}, {test}, others))
    if not folds:
        turns = [({"train"}, {"valid", "held out"}, {"test"}, {"train", "held out"})]
    rotated = []
    for turn in turns:
        parts = []
        for part, splits in zip(Parts._fields, turn):
            inside = torch.tensor([clip.split in splits for clip in task.clips])
            indices = inside.to(owner.device)[owner].nonzero()[:, 0]
            clips = owner[indices].unique().tolist()
            require(clips, f"{task.name}: no readable clip is left in {part}; it needs more")
            if task.spec.metric == "1 - EER":
                require(len(classes_of(task, clips)) == 2, f"{task.name}: only one class "
                        f"is left in {part}; 1 - EER needs both")
            parts.append(indices)
        rotated.append(Parts(*parts))
    return rotated


def prepare(task, say):
    """Refuse what cannot be scored (ValueError), say what is odd. If there is no valid
    split, a tenth of train is marked "held out"."""
    name, metric = task.name, task.spec.metric
    classes, folds = task.classes, task.folds
    if metric not in TEXT_METRICS:
        two = metric == "1 - EER"
        enough, need = (len(classes) == 2, "two") if two else (len(classes) > 1, "two or more")
        require(enough, f"{name}: has {len(classes)} class(es), {', '.join(classes[:3])}; "
                f"{metric} needs {need}")
    splits = {clip.split for clip in task.clips}
    enough, need = {"train", "test"} <= splits and not folds, "train and test"
    if classes:
        need += ", or three folds or more, without a gap"
        if len(folds) > 2:
            enough = splits == set(range(folds[0], folds[-1] + 1))
    found = ", ".join(sorted(map(str, splits)))
    require(enough, f"{name}: its splits are {found}; need {need}")
    if not folds and "valid" not in splits:
        hold_out(task, say)
    for turn, parts in enumerate(rotations(task, torch.arange(len(task.clips)))):
        when = f" when fold {folds[turn]} is test" if folds else ""
        lost = sorted(set(classes).difference(classes_of(task, parts.train.tolist())))
        if lost:
            say(f"note: {name}: no clip of class {', '.join(lost[:5])} is in train{when}; "
                "its clips elsewhere count as wrong")
        if len(classes_of(task, parts.test.tolist())) == 1:
            say(f"note: {name}: all clips of test are of one class{when}")


def hold_out(task, say):
    train = [n for n, clip in enumerate(task.clips) if clip.split == "train"]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    held = order[: math.ceil(len(train) / 10)].tolist()
    for n in held:
        task.clips[train[n]] = task.clips[train[n]]._replace(split="held out")
    say(f"note: {task.name}: the epoch is chosen on {len(held)} clips held out of train")


def targets(task, owner, token_seconds):
    """Truth of vectors, owner (N,) ascending: (N,) classes, or (N, C) bool."""
    ids = {name: i for i, name in enumerate(task.classes)}
    if task.spec.metric in ("accuracy", "1 - EER"):
        return torch.tensor([ids[clip.label] for clip in task.clips])[owner]
    truth = torch.zeros(len(owner), len(ids), dtype=torch.bool)
    sizes = torch.bincount(owner, minlength=len(task.clips)).tolist()
    for clip, part in zip(task.clips, truth.split(sizes)):  # views of truth
        for label in clip.label:
            if task.on_tokens:  # both ends rounded up, as in X-ARES
                onset, offset, name = label
                begin, end = math.ceil(onset / token_seconds), math.ceil(offset / token_seconds)
                part[begin:end, ids[name]] = True
            else:
                part[:, ids[label]] = True
    return truth


# ---------------------------------------------------------------- features

class Features(NamedTuple):
    x: torch.Tensor  # (N, D), half precision in tasks on tokens
    owner: torch.Tensor  # (N,) ascending
    failed: list[str]  # messages of unreadable clips


@torch.inference_mode()
def _encode(encoder, audios, on_tokens, s):
    """Features of each clip or crop: (T, D), or (1, D), pooled."""
    device, amp = next(encoder.parameters()).device, PRECISIONS[s.precision]
    samples = torch.tensor(list(map(len, audios)))
    audio = pad_sequence(audios, batch_first=True).to(device)
    with torch.autocast(device.type, amp, enabled=amp is not None):
        x, lengths = encoder.encode(audio, samples, s.context == "window")
    x = x.float()  # (B, T, D), zero beyond lengths
    if on_tokens:
        return [tokens[:n].half().cpu() for tokens, n in zip(x, lengths.tolist())]
    return list(mean_over_tokens(x, lengths).cpu().split(1))  # B of (1, D)


def _join(found):
    """{(clip, crop): (T, D)} -> x (N, D), owner (N,)."""
    keys = sorted(found)
    sizes = [len(found[key]) for key in keys]
    owner = torch.tensor([n for n, _ in keys]).repeat_interleave(torch.tensor(sizes))
    x = found[keys[0]].new_empty(len(owner), found[keys[0]].shape[1])
    for key, part in zip(keys, x.split(sizes)):
        part.copy_(found.pop(key))  # freed at once: tokens are large
    return x, owner


def _read_ahead(task, seconds, rate, failed):
    """Yields lists of (clip, crop, samples), half an hour of audio each, short clips first.

    Four threads decode the next list while the caller uses one; so the first is empty.
    """
    def read(n):
        try:
            audio = task.clips[n].rows.audio(task.clips[n].row, rate)
        except AudioError as e:
            failed.append(str(e))
            return []
        size = round(task.spec.crop * rate) or len(audio)
        crops = audio.split(size)[: max(1, len(audio) // size)]
        return [(n, k, crop) for k, crop in enumerate(crops)]

    order = sorted(range(len(seconds)), key=seconds.__getitem__)
    with ThreadPoolExecutor(4) as pool:
        reading = []
        for half_hour in [*data.cut(order, sorted(seconds), 1800), []]:
            ready, reading = reading, pool.map(read, half_hour)
            yield list(chain.from_iterable(ready))  # waits


def extract(encoder, task, s, say):
    """Features of a task's clips. ValueError: NaN, or over 1 % cannot be read."""
    window = encoder.window * encoder.token_seconds

    def cost(seconds):
        windows = math.ceil(seconds / window)
        return windows * window if s.context == "window" else seconds

    # 0.1: even the shortest clip takes its time.
    seconds = [0.1 + float(clip.rows.seconds[clip.row]) for clip in task.clips]
    rate, found, failed = encoder.sample_rate, {}, []
    done, total, began, said = 0, sum(map(cost, seconds)), time.time(), time.time()
    for crops in _read_ahead(task, seconds, rate, failed):
        crops.sort(key=lambda crop: len(crop[2]))
        costs = [cost(len(audio) / rate) for _, _, audio in crops]
        for batch in data.cut(crops, costs, s.batch_seconds):
            audios = [audio for _, _, audio in batch]
            encoded = _encode(encoder, audios, task.on_tokens, s)
            for (n, k, _), x in zip(batch, encoded):
                if not x.isfinite().all():
                    name = task.clips[n].rows.name(task.clips[n].row)
                    raise ValueError(f"{name}: its features are not finite, or tokens are over "
                                     "65504; try --precision fp32 or another --layer")
                found[n, k] = x
                done += cost(seconds[n]) if k == 0 else 0  # once a clip
            if time.time() - said > 10:
                said = time.time()
                left = (total - done) / max(1, done) * (said - began)
                say(f"{task.name}: {done / total:.0%} encoded, {left:.0f} s left")
    require(len(failed) <= 0.01 * len(task.clips), f"{task.name}: {len(failed)} of "
            f"{len(task.clips)} clips cannot be read, over 1 %: {min(failed, default='')}")
    return Features(*_join(found), sorted(failed))


def fingerprint(encoder):
    """Hash of an encoder and of the code that makes features."""
    h = hashlib.blake2b(json.dumps(encoder.config, sort_keys=True).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        h.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        h.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    for code in (uniwhisper, data, _encode, _read_ahead, extract):
        h.update(inspect.getsource(code).encode())
    return h.hexdigest()


def _stamp(clip):
    """A clip's file, its place in a tar, the file's size and time."""
    file, start, _ = clip.rows.clip(clip.row)
    stat = os.stat(file) if os.path.exists(file) else None
    return [os.path.abspath(file), start, stat and stat.st_size, stat and stat.st_mtime_ns]


def cached_features(encoder, mark, task, s, say):
    """`extract`, kept on disk under a hash of settings, clips and `mark`, a fingerprint.

    Editing uniwhisper.py, data.py or the functions above encodes everything again.
    """
    key = [mark, s.context, s.precision, s.device, task.spec.crop, task.on_tokens]
    key += map(_stamp, task.clips)
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()
    path = Path(s.cache, re.sub(r"[^\w.-]", "_", task.name) + f"-{digest}.safetensors")
    try:
        with safe_open(path, "pt") as f:
            failed = json.loads(f.metadata()["failed"])
            return Features(f.get_tensor("x"), f.get_tensor("clip"), failed)
    except (OSError, SafetensorError):
        pass  # not there, or damaged
    x, owner, failed = extract(encoder, task, s, say)
    new = Path(f"{path}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"x": x, "clip": owner}, new, {"failed": json.dumps(failed)})
        new.replace(path)
    except (OSError, SafetensorError) as e:  # no reason to lose hours of work
        say(f"note: {path}: features are not kept: {e}")
    return Features(x, owner, failed)


# ---------------------------------------------------------------- scores

def measure_of(task, truth, owner, token_seconds, scores, indices):
    """The task's metric for the scores of some of its vectors."""
    metric, truth = task.spec.metric, truth[indices]
    if metric in CLIP_METRICS:
        return CLIP_METRICS[metric](scores, truth)
    return FRAME_METRICS[metric](scores, truth, owner[indices], token_seconds=token_seconds)


def frames_of(owner, token_seconds):
    """Which token each frame lies in: owner (N,) ascending -> (N',)."""
    frames, first = [], 0
    for tokens in torch.bincount(owner).tolist():  # of each clip
        count = int(tokens * token_seconds / FRAME_SECONDS + 1e-6)
        middles = (torch.arange(count) + 0.5) * FRAME_SECONDS
        frames.append(first + (middles / token_seconds).long())
        first += tokens
    return torch.cat(frames)


def score(task, features, s, encoder, decoder=None):
    """A task's entry in --json: scores, domain, metric, sizes, epochs."""
    spec = replace(task.spec, epochs=s.epochs or task.spec.epochs)
    x, owner, token_seconds = features.x, features.owner, encoder.token_seconds
    if spec.metric in FRAME_METRICS:
        if token_seconds > FRAME_SECONDS:  # a short segment would have no token
            frames = frames_of(owner, token_seconds)
            x, owner, token_seconds = x[frames], owner[frames], FRAME_SECONDS
        spec = replace(spec, batch=round(CLIP_SECONDS / token_seconds) * spec.batch)
    task, knn_score, seeds = replace(task, spec=spec), None, range(s.seeds)
    x, owner = x.to(s.device), owner.to(s.device)
    turns = rotations(task, owner)
    if spec.metric == "recall@1":
        score_once = partial(score_retrieval, x, owner, task)
    elif spec.metric == "1 - WER":
        seeds = [0]  # the decoder takes long
        score_once = partial(score_transcription, x, owner, task, encoder, decoder)
    else:
        truth = targets(task, owner.cpu(), token_seconds).to(s.device)
        measure = partial(measure_of, task, truth, owner, token_seconds)
        size = x.shape[1], s.hidden, len(task.classes)
        score_once = partial(score_probe, x, truth, measure, task, size)
        if spec.knn:
            by_turn = [measure(knn(x, truth, p.neighbours, p.test), p.test) for p in turns]
            knn_score = sum(by_turn) / len(turns)
    values, epochs = [], []
    for parts in turns:
        for seed in seeds:
            value, epoch = score_once(parts, seed)
            values.append(value)
            epochs.append(epoch)
    scores = torch.tensor(values).view(len(turns), -1).mean(0)  # (seeds,)
    test = sum(len(owner[parts.test].unique()) for parts in turns) // len(turns)
    # mlp: the trained probe, of any kind. test: mean over folds, rounded down.
    entry = dict(domain=spec.domain, metric=spec.metric, classes=len(task.classes),
                 test=test, weight=spec.weight or test, knn=knn_score,
                 mlp=scores.mean().item(), epochs=epochs)
    if len(scores) > 1:
        entry["mlp_std"] = scores.std().item()
    return entry


def averages(entries):
    """{task: entry} -> {domain or "all": means, by weight and plain}."""
    out = {}
    domains = dict.fromkeys(entry["domain"] for entry in entries.values())
    for domain in [*domains, "all"]:
        out[domain] = {}
        for key in ("knn", "mlp"):
            scored = [entry for entry in entries.values()
                      if domain in (entry["domain"], "all") and entry[key] is not None]
            weighted = plain = None
            if scored:
                weighted = sum(e[key] * e["weight"] for e in scored)
                weighted /= sum(e["weight"] for e in scored)
                plain = sum(e[key] for e in scored) / len(scored)
            out[domain] |= {key: weighted, key + "_plain": plain}
    return out


def _line(head, entries, width, plain=""):
    """A line of the table; later encoders with the difference to the first."""
    line = "{:22} {:12} {:17}{:>6}".format(*head)
    for key in ("knn", "mlp"):
        for entry in entries:
            value = entry[key + plain]
            cell = "-" if value is None else f"{value:.3f}"
            if key == "mlp" and "mlp_std" in entry:
                cell += f" ±{entry['mlp_std']:.3f}"
            if entry is not entries[0] and value is not None:
                cell += f" {value - entries[0][key + plain]:+.3f}"
            line += f"{cell:>{width}}"
    return line


def table(results):
    """{encoder: {task: entry}} -> a line for each task and average."""
    folders = list(map(os.path.abspath, results))
    shared = os.path.commonpath(list(map(os.path.dirname, folders)))
    names = [os.path.relpath(folder, shared) for folder in folders]
    first = next(iter(results.values()))
    width = max(22, *(len(name) + 6 for name in names))
    heads = [f"{kind} {name}".rjust(width) for kind in ("kNN", "MLP") for name in names]
    lines = ["{:22} {:12} {:17}{:>6}".format("task", "domain", "metric", "test") + "".join(heads)]
    for task, entry in first.items():
        head = task, entry["domain"], entry["metric"], entry["test"]
        lines.append(_line(head, [entries[task] for entries in results.values()], width))
    means = list(map(averages, results.values()))
    kinds = [(domain, "weighted", "") for domain in means[0]]
    for domain, kind, plain in [*kinds, ("all", "plain mean", "_plain")]:
        test = sum(r["test"] for r in first.values() if domain in (r["domain"], "all"))
        head = "= " + domain, "", kind, test
        lines.append(_line(head, [mean[domain] for mean in means], width, plain))
    for source, tasks, near, mlp in REFERENCES:
        if tasks == set(first):
            lines.append(f"{source}: kNN {near}, MLP {mlp} (weighted, the same tasks)")
    return "\n".join(lines)


# ---------------------------------------------------------------- command line

@dataclass(frozen=True)
class Settings:
    encoder: tuple[str, ...] = flag((), "folders, compared with the first", required=True)
    data: tuple[str, ...] = flag((), "manifests and tars")
    xares: str = flag("", "folder of X-ARES downloads")
    tasks: tuple[str, ...] = flag((), "score these tasks only")
    decoder: str = flag("", "Qwen or Whisper folder, for transcription")
    on: str = flag("test", "split to score; valid: test is not touched, epochs "
                   "are chosen on a tenth of train", choices=("test", "valid"))
    context: str = flag("clip", "clip: its own length; window: silence follows",
                        choices=("clip", "window"))
    layer: int | None = flag(None, "features after this layer (default: all)")
    precision: str = flag("fp32", "of the encoder", choices=tuple(PRECISIONS))
    batch_seconds: float = flag(40.0, "audio in a batch; more suits a GPU")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1")
    # assumption: the paper says "MLP" and gives neither width nor activation
    hidden: int = flag(256, "width of the hidden layer; 0: linear, as in X-ARES")
    epochs: int = flag(0, "of the probe (0: X-ARES's own, or else 30)")
    seeds: int = flag(3, "probes of a task")
    cache: str = flag(str(Path.home() / ".cache/uniwhisper"), "kept features")
    json: str = flag("", "write settings and scores there, after each task")


def check_flags(s):
    """Refuse what would fail after hours."""
    require(s.seeds > 0 and 0 < s.batch_seconds < math.inf,
            "--seeds and --batch-seconds must be positive")
    require(s.hidden >= 0 and s.epochs >= 0, "--hidden and --epochs must be 0 or more")
    if s.json:
        require(not Path(s.json).is_dir(), f"{s.json}: is a folder; name a file in it")
        require(Path(s.json).absolute().parent.is_dir(), f"{s.json}: its folder does not exist")
        refuse_to_overwrite(s.json, *s.data)
    try:
        torch.empty(0, device=s.device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {s.device}: {str(e).splitlines()[0]}") from None


def open_encoder(folder, layer):
    """A folder's encoder, up to a layer (None: whole)."""
    encoder = load_encoder(folder).eval()
    if layer is not None:
        try:
            encoder.keep_layers(layer)
        except ValueError as e:
            raise ValueError(f"{folder}: --layer: {e}") from None
    return encoder


def find_tasks(s, say):
    """The tasks to score, checked; --on valid: valid in test's place."""
    own = {task.name: task for task in manifest_tasks(Rows(s.data))} if s.data else {}
    names = list(own) + (find_public(s.xares, own) if s.xares else [])
    require(names, "no task to score; give --data or --xares")
    unknown = " ".join(sorted(set(s.tasks).difference(names)))
    require(not unknown, f"--tasks {unknown}: not there; found: {', '.join(names)}")
    tasks = []
    for name in s.tasks or names:
        spec = own[name].spec if name in own else XARES[name]
        if spec.metric == "1 - WER" and not s.decoder:
            say(f"note: {name} is left out: transcription needs --decoder")
            continue
        task = own[name] if name in own else xares_task(s.xares, name)
        if s.on == "valid":
            splits = {clip.split for clip in task.clips}
            if task.folds or not {"train", "valid"} <= splits:
                say(f"note: {name} is left out: --on valid needs splits train and valid")
                continue
            task.clips = [clip._replace(split="test") if clip.split == "valid" else clip
                          for clip in task.clips if clip.split != "test"]
        prepare(task, say)
        tasks.append(task)
    require(tasks, "no task is left to score; the notes say why")
    return tasks


def find_public(folder, taken):
    """Names of X-ARES's tasks in a folder."""
    require(Path(folder).is_dir(), f"--xares {folder}: no such folder")
    inside = sorted(os.listdir(folder))
    public = [name for name in XARES if name in inside]
    require(public, f"--xares {folder}: has no folder {', '.join(XARES)}; it has "
            + (", ".join(inside[:5]) or "nothing"))
    both = ", ".join(sorted(set(taken).intersection(public)))
    require(not both, f"{both}: in --data and in --xares; rename the manifest's task")
    return public


def run(s, say):
    """Score every encoder on every task: {encoder: {task: entry}}."""
    # cuDNN's attention plans anew for every shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    for folder in s.encoder:  # a bad one is found before hours of work
        open_encoder(folder, s.layer)
    dtype = torch.bfloat16 if s.device.startswith("cuda") else torch.float32
    decoder = load_decoder(s.decoder, dtype).to(s.device) if s.decoder else None
    tasks, results, saved = find_tasks(s, say), {}, {}
    threads = torch.get_num_threads()
    for folder in s.encoder:
        encoder = open_encoder(folder, s.layer).to(s.device)
        mark, results[folder] = fingerprint(encoder), {}
        for task in tasks:
            features = cached_features(encoder, mark, task, s, say)
            for message in features.failed:
                say(f"note: {task.name}: a clip is left out: {message}")
            # A probe on clips is too small for several threads.
            torch.set_num_threads(threads if task.on_tokens else 1)
            entry = score(task, features, s, encoder, decoder)
            torch.set_num_threads(threads)
            results[folder][task.name] = entry | {"unreadable": len(features.failed)}
            means = averages(results[folder])
            saved[folder] = {"tasks": results[folder], "averages": means}
            if s.json:  # after each task: a later one may fail
                text = json.dumps({"settings": asdict(s), "encoders": saved}, indent=1)
                Path(s.json).write_text(text + "\n")
            head = "" if entry["knn"] is None else f"knn {entry['knn']:.3f}, "
            say(f"{folder}: {task.name}: {head}mlp {entry['mlp']:.3f}")
    return results


def main():
    """Scores to stdout, all else to stderr; a mistake ends in one line."""
    s = Settings(**parse_flags(Settings, __doc__))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # for names that are not UTF-8
    try:
        check_flags(s)
        print(table(run(s, say=partial(print, file=sys.stderr, flush=True))))
    except (OSError, ValueError) as e:
        sys.exit(f"error: {e}")
    except torch.OutOfMemoryError as e:  # of a GPU
        line = str(e).splitlines()[0]
        sys.exit(f"error: {line} Lower --batch-seconds, or probe on --device cpu")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; the features of finished tasks are kept")


if __name__ == "__main__":
    main()
