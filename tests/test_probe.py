"""probe.py: metrics, neighbours and probes against scikit-learn and code written out, choice on
valid, cache, X-ARES tars, bad input."""
import importlib
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf
import torch
from torch import nn

import conftest
import probe
import uniwhisper
import xares_tars
from data import Rows
from probe import Features, Settings, Spec, Task

torch.set_num_threads(1)
TINY = {"model_type": "whisper", "d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32, "num_mel_bins": 80, "max_source_positions": 1500}


def quiet(text):
    pass


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny random encoder as a Hugging Face folder."""
    return make_encoder(tmp_path_factory.mktemp("tiny"), 0)


@pytest.fixture
def encoder(folder):
    return uniwhisper.load_encoder(folder).eval()


def make_encoder(path, seed):
    torch.manual_seed(seed)
    uniwhisper.WhisperEncoder(TINY).save(path)
    return path


def tone(hertz, seconds=0.3, seed=0, rate=16000):
    """A sine in noise, so that no two are equal."""
    noise = np.random.default_rng(seed).normal(size=round(rate * seconds))
    return conftest.tone(seconds, hertz, rate) + (0.02 * noise).astype(np.float32)


def write_manifest(path, name, rows):
    """rows: (dictionary, audio samples or raw bytes or None for no file)
    -> a manifest beside its clips."""
    lines = []
    for i, (row, audio) in enumerate(rows):
        clip = f"{name}-{i}.wav"
        if isinstance(audio, bytes):
            Path(path, clip).write_bytes(audio)
        elif audio is not None:
            sf.write(Path(path, clip), audio, 16000)
        lines.append({"audio": clip, "task": name, "domain": "music"} | row)
    return Path(conftest.write_manifest(Path(path, f"{name}.jsonl"), lines))


NOTES = {"low": 300, "middle": 1000, "high": 3000}


def note_rows(count=24):
    splits, out = ("train", "train", "valid", "test"), []
    for i in range(count):
        label, hertz = list(NOTES.items())[i % 3]
        out.append(({"label": label, "split": splits[i // 3 % 4]},
                    tone(hertz * (1 + 0.01 * (i // 3)), seed=i)))
    return out


def settings(tmp, **more):
    return Settings(**{"cache": str(tmp / "cache"), "hidden": 0, "epochs": 30, "seeds": 2,
                       "device": "cpu"} | more)


def run(tmp, folder, paths=(), say=None, found=None, **more):
    """Entries of one encoder's tasks: of manifests, or those found."""
    s = settings(tmp, encoder=(str(folder),), data=tuple(map(str, paths)), **more)
    return probe.run(s, found or probe.find_tasks(s), say or quiet)[str(folder)]


def main(*argv):
    """The command line in this process -> (exit code, or the message of one)."""
    old, sys.argv = sys.argv, ["probe.py", *map(str, argv)]
    try:
        probe.main()
        return 0
    except SystemExit as e:
        return e.code
    finally:
        sys.argv = old


# ---------------------------------------------------------------- metrics

def test_average_precision_by_hand():
    # hits at ranks 1, 3: (1/1 + 2/3) / 2
    assert (probe.average_precision(torch.tensor([0.9, 0.8, 0.7, 0.1]), torch.tensor([1, 0, 1, 0]))
            == pytest.approx(5 / 6))
    # all equal: one threshold, precision is the share of hits
    assert (probe.average_precision(torch.zeros(4), torch.tensor([1, 0, 0, 0]))
            == pytest.approx(0.25))
    # a class that never occurs is left out
    y = torch.tensor([[1, 0], [0, 0]])
    assert (probe.mean_average_precision(torch.tensor([[0.1, 0.5], [0.9, 0.4]]), y)
            == pytest.approx(0.5))


def test_segment_f1_by_hand():
    # two clips, of 150 and 50 tokens; 1 s segments of 50: four in all; two classes
    clip = torch.tensor([0] * 150 + [3] * 50)
    y, scores = torch.zeros(200, 2, dtype=torch.bool), torch.full((200, 2), -1.0)
    y[10, 0] = y[60, 0] = y[160, 1] = True  # class 0 in segments 0 and 1, class 1 in 3
    scores[45, 0] = scores[120, 0] = scores[199, 1] = 1.0  # class 0 found in 0 and 2, class 1 in 3
    assert probe.segment_f1(scores, y, clip, 1.0, "macro", 0.02) == pytest.approx((0.5 + 1) / 2)
    assert probe.segment_f1(scores, y, clip, 1.0, "micro", 0.02) == pytest.approx(2 * 2 / 6)
    # 0.1 s: none in the same five tokens
    assert probe.segment_f1(scores, y, clip, 0.1, "micro", 0.02) == 0
    # a shorter last segment counts
    assert probe.segment_f1(scores[:160], y[:160] | (torch.arange(160) == 155)[:, None],
                            clip[:160], 1.0, "micro", 0.02) < 0.5
    # tokens of 30 ms: 33.3 a second; the second segment of the first clip begins at token 34
    y[:], scores[:] = False, -1.0
    y[33, 0] = scores[0, 0] = True
    assert probe.segment_f1(scores, y, clip, 1.0, "micro", 0.03) == 1
    y[33, 0], y[34, 0] = False, True
    assert probe.segment_f1(scores, y, clip, 1.0, "micro", 0.03) == 0
    # 0.1 s are five tokens, minutes into a clip, too: in every second segment the first token
    # has the class, and it is found in the last
    token = torch.arange(30_000)[:, None]
    scores = torch.where(token % 10 == 4, 1.0, -1.0)
    owner = torch.zeros(30_000, dtype=torch.long)
    assert probe.segment_f1(scores, token % 10 == 0, owner, 0.1, "micro", 0.02) == 1


def test_recall_at_1_by_hand():
    audio = torch.eye(3)
    text = torch.tensor([[1, 0, 0], [0, 9, 0], [0, 9, 1], [0.9, 0, 1.0]])
    # clip -> text: 0 finds 0 (right), 1 finds 1 (right), 2 finds 3 (right);
    # text -> clip: 0, 1, 1, 2
    assert probe.recall_at_1(audio, text, torch.tensor([0, 1, 1, 2])) == 1
    assert (probe.recall_at_1(audio, text, torch.tensor([0, 1, 2, 2]))
            == pytest.approx((1 + 3 / 4) / 2))
    assert probe.recall_at_1(audio, text, torch.tensor([1, 2, 2, 0])) == 0


def test_metrics_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(0)
    for decimals in (1, 6):  # with and without ties
        scores = torch.rand(400, 7, generator=g).double().round(decimals=decimals)
        y = torch.rand(400, 7, generator=g) < 0.2
        assert probe.mean_average_precision(scores, y) == pytest.approx(
            metrics.average_precision_score(y.numpy(), scores.numpy(), average="macro"), abs=1e-9)
    classes = torch.randint(7, (400,), generator=g)
    assert probe.accuracy(scores, classes) == pytest.approx(
        metrics.accuracy_score(classes, scores.argmax(1)))
    clip = torch.arange(8).repeat_interleave(50)
    pooled = lambda t: t.unflatten(0, (8, 50)).any(1).numpy()
    rare, found = (torch.rand(400, 7, generator=g) < 0.01 for _ in range(2))
    for average in ("micro", "macro"):
        assert (probe.segment_f1(found.float() - 0.5, rare, clip, 1.0, average, 0.02)
                == pytest.approx(metrics.f1_score(pooled(rare), pooled(found), average=average,
                                                  zero_division=0)))


# ---------------------------------------------------------------- neighbours

def test_knn_equals_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    g = torch.Generator().manual_seed(0)
    train, test = torch.randn(2000, 64, generator=g), torch.randn(2000, 64, generator=g) * 3
    y = torch.randint(20, (2000,), generator=g)

    def softmax(distances):
        w = np.exp((1 - distances) / 0.07)
        return w / w.sum(1, keepdims=True)

    other = neighbors.KNeighborsClassifier(10, metric="cosine", algorithm="brute",
                                           weights=softmax).fit(train, y)
    votes = probe.knn(torch.cat([train, test]), y, torch.arange(2000), torch.arange(2000, 4000))
    assert np.array_equal(votes.argmax(1).numpy(), other.predict(test))
    np.testing.assert_allclose(votes.numpy(), other.predict_proba(test), atol=2e-6)


def test_knn_by_hand():
    x, train, test = (torch.tensor([[1.0, 0], [5, 0.1], [0, 1], [-1, 0], [2, 0]]),
                      torch.arange(4), torch.tensor([4]))
    y = torch.tensor([0, 0, 1, 2])
    votes = probe.knn(x, y, train, test, k=3, temperature=1.0)
    weight = torch.tensor([1.0, 5 / math.hypot(5, 0.1), 0.0]).softmax(0)
    torch.testing.assert_close(
        votes, torch.stack([weight[0] + weight[1], weight[2], weight[2] * 0])[None])
    # several labels: the same votes, given to each
    hot = torch.tensor([[1, 0], [1, 1], [0, 1], [0, 0]], dtype=torch.bool)
    votes = probe.knn(x, hot, train, test, k=3, temperature=1.0)
    torch.testing.assert_close(
        votes, torch.stack([weight[0] + weight[1], weight[1] + weight[2]])[None])
    assert probe.knn(x, y, train, train).shape == (4, 3)  # fewer clips than k


# ---------------------------------------------------------------- probes

def reference_probe(x, y, train, seed, hidden, epochs, batch, positive_weight):
    """The same training written out, its rate by formula."""
    torch.manual_seed(seed)
    linear = ([nn.Linear(12, hidden), nn.ReLU(), nn.Linear(hidden, 4)] if hidden
              else [nn.Linear(12, 4)])
    model = nn.Sequential(nn.LayerNorm(12, elementwise_affine=False), *linear)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    loss = (nn.CrossEntropyLoss() if y.dim() == 1
            else nn.BCEWithLogitsLoss(pos_weight=torch.tensor(positive_weight)))
    for epoch in range(epochs):
        adam.param_groups[0]["lr"] = (
            1e-4 + 0.5 * (1e-3 - 1e-4) * (1 + math.cos(math.pi * epoch / epochs)))
        for rows in train[torch.randperm(len(train))].split(batch):
            adam.zero_grad()
            loss(model(x[rows]), y[rows] if y.dim() == 1 else y[rows].float()).backward()
            adam.step()
    return model


@pytest.mark.parametrize("hidden", [0, 9])
@pytest.mark.parametrize("several", [False, True])
def test_probes_equal_a_reference(hidden, several):
    torch.manual_seed(1)
    x, weight = torch.randn(200, 12) * 5 + 3, 10.0 if several else 1.0
    y = torch.rand(200, 4) < 0.3 if several else torch.arange(200) % 4
    train, valid = torch.arange(101), torch.arange(101, 150)
    for seed in range(2):
        ours = probe.fit_probe(x, y, train, valid, hidden, seed, 5, 16, weight,
                               measure=lambda *_: 0.5)  # of equal epochs the last is chosen
        theirs = reference_probe(x, y, train, seed, hidden, 5, 16, weight)
        assert ours.epoch == 5
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("hidden", [0, 32])
def test_probes_find_what_scikit_learns_find(hidden):
    """Of classes that overlap: the share of right answers, within 0.03."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    torch.manual_seed(0)
    y = torch.arange(3000) % 5
    x = torch.randn(5, 16)[y] + 1.5 * torch.randn(3000, 16)
    train, valid, test = torch.arange(3000).split([1500, 500, 1000])
    inputs = nn.functional.layer_norm(x, (16,)).numpy()
    other = linear_model.LogisticRegression(max_iter=1000).fit(inputs[train], y[train])
    ours = probe.fit_probe(x, y, train, valid, hidden)
    found = probe.accuracy(probe.predict(ours, x, test), y[test])
    assert abs(found - other.score(inputs[test], y[test])) < 0.03 and found > 0.5


def noisy():
    """Features and classes so noisy that the best epoch on valid is not the best on test."""
    torch.manual_seed(3)
    y = torch.randint(3, (300,))
    return torch.randn(300, 20) + 0.4 * torch.randn(3, 20)[y], y


THIRDS = ["train"] * 100 + ["valid"] * 100 + ["test"] * 100  # its splits


def make_task(splits, labels, **spec):
    """A task without files."""
    rows = SimpleNamespace(clip=lambda n: (f"{n}.wav", 0, -1))
    return Task("made", Spec("music", "label", **spec),
                [probe.Clip(rows, i, s, v) for i, (s, v) in enumerate(zip(splits, labels))])


def score(task, x, owner, s, token_seconds=0.02):
    encoder = SimpleNamespace(token_seconds=token_seconds)  # all that is asked of it
    return probe.score(task, Features(x, owner, []), s, encoder, quiet)


@pytest.mark.parametrize("metric, epochs, seeds", [("accuracy", 40, 4), ("recall@1", 6, 3)])
def test_choice_is_blind_to_test(metric, epochs, seeds, tmp_path):
    """Other test labels change the score but not which epochs are chosen;
    other valid labels do change these."""
    x, y = noisy()

    def turned(split):
        classes = [(n + (s == split)) % 3 for n, s in zip(y.tolist(), THIRDS)]
        labels = [f"class {n}" if metric == "accuracy" else [f"class {n}"] for n in classes]
        task = make_task(THIRDS, labels, metric=metric, knn=metric == "accuracy")
        return score(task, x, torch.arange(300), settings(tmp_path, seeds=seeds, epochs=epochs))

    was, test, valid = turned(None), turned("test"), turned("valid")
    assert test["epochs"] == was["epochs"] != valid["epochs"]
    assert test["mlp"] != was["mlp"]
    if metric == "accuracy":
        assert test["mlp"] < was["mlp"] and test["knn"] < was["knn"]


def test_the_best_epoch_on_valid_is_scored_on_test(tmp_path):
    x, y = noisy()
    train, valid, test = torch.arange(300).split(100)
    seen = []

    def measure(scores, indices):
        assert torch.equal(indices, valid)
        seen.append((probe.accuracy(scores, y[valid]), scores))
        return seen[-1][0]

    model = probe.fit_probe(x, y, train, valid, 64, epochs=40, measure=measure)
    values = [value for value, _ in seen]
    assert len(values) == 40 and model.epoch < 40
    assert values[model.epoch - 1] == max(values) and max(values) not in values[model.epoch:]
    assert torch.equal(probe.predict(model, x, valid), seen[model.epoch - 1][1])  # its weights
    task = make_task(THIRDS, [f"class {n}" for n in y.tolist()])
    s = settings(tmp_path, hidden=64, seeds=1, epochs=40)
    entry = score(task, x, torch.arange(300), s)
    assert entry["mlp"] == pytest.approx(probe.accuracy(probe.predict(model, x, test), y[test]))
    assert entry["epochs"] == (model.epoch,)


def test_folds_rotate():
    task = make_task([1, 2, 3, 4] * 2, "abcdabcd")
    plans = probe.rotations(task, torch.arange(8))
    assert plans[0].test.tolist() == [0, 4] and plans[0].valid.tolist() == [1, 5]
    assert (plans[0].train.tolist() == [2, 3, 6, 7]
            and plans[0].neighbours.tolist() == [1, 2, 3, 5, 6, 7])
    assert torch.cat([parts.test for parts in plans]).sort().values.tolist() == list(range(8))
    assert [parts.valid.tolist() for parts in plans] == [[1, 5], [2, 6], [3, 7], [0, 4]]
    for train, valid, test, near in plans:
        assert not set(test.tolist()) & {*near.tolist(), *train.tolist(), *valid.tolist()}
        assert not set(valid.tolist()) & set(train.tolist())


def test_retrieval_learns(tmp_path):
    torch.manual_seed(0)
    kinds = [("dog", "barks"), ("rain", "falls"), ("bell", "rings"), ("engine", "runs")]
    places = ["park", "street", "forest", "house"]
    meaning = [(k, p) for k in range(4) for p in range(4)] * 12
    codes = torch.randn(8, 16)
    x = torch.stack([codes[k] + codes[4 + p] for k, p in meaning]) + 0.1 * torch.randn(192, 16)
    texts = [[f"A {kinds[k][0]} {kinds[k][1]} in the {places[p]}.",
              f"In the {places[p]}, a {kinds[k][0]}"] for k, p in meaning]
    splits = ["train"] * 160 + ["valid"] * 16 + ["test"] * 16

    def found(texts):
        task = make_task(splits, texts, metric="recall@1", knn=False, batch=16)
        return score(task, x, torch.arange(192), settings(tmp_path, seeds=1, epochs=6))["mlp"]

    assert found(texts) > 0.7 and found(texts[:176] + texts[177:] + texts[176:177]) < 0.3


# ---------------------------------------------------------------- features

@pytest.mark.parametrize("silence", [0.0, 1.0, 30.0])
def test_features_are_means_over_own_tokens_whatever_the_batch(tmp_path, encoder, silence):
    lines = [({"label": "ab"[i % 2], "split": "train"},
              tone(500 + 100 * i, 0.2 + 0.37 * i, seed=i)) for i in range(8)]
    rows = Rows(write_manifest(tmp_path, "mixed", lines))
    (task,) = probe.manifest_tasks(rows)
    x, owner, _ = probe.extract(encoder, task, settings(tmp_path, silence=silence), quiet)
    assert owner.tolist() == list(range(8)) and x.shape == (8, 24)
    for i in range(8):
        tokens, _ = encoder.encode(rows.audio(i), silence=silence)
        torch.testing.assert_close(x[i], tokens[0].mean(0), atol=1e-5, rtol=1e-5)


def test_crops_and_windows(tmp_path, encoder):
    path = write_manifest(tmp_path, "long", [({"label": "a", "split": "train"}, tone(440, 31.0)),
                                             ({"label": "b", "split": "train"}, tone(880, 1.0))])
    (task,) = probe.manifest_tasks(Rows(path))

    def extract(**spec):
        some = task._replace(spec=task.spec._replace(**spec))
        return probe.extract(encoder, some, settings(tmp_path), quiet)

    assert extract().owner.tolist() == [0, 1]
    # three pieces of 10 s, the last second dropped; a short clip is one piece
    assert extract(crop=10).owner.tolist() == [0, 0, 0, 1]
    x, owner, _ = extract(metric="segment F1 macro")
    assert torch.bincount(owner).tolist() == [1550, 50] and x.dtype == torch.float16


def test_cache_knows_weights_clips_and_settings(tmp_path, encoder):
    path = write_manifest(tmp_path, "notes", note_rows(12))

    def features(**more):
        (task,) = probe.manifest_tasks(Rows(path))
        return probe.cached_features(encoder, probe.fingerprint(encoder), task,
                                     settings(tmp_path, **more), quiet).x

    files = lambda: len(list((tmp_path / "cache").iterdir()))
    first = features()
    calls, encode = [], encoder.encode
    encoder.encode = lambda *a, **k: calls.append(a) or encode(*a, **k)
    assert torch.equal(features(), first) and not calls and files() == 1  # taken from disk
    weights = encoder.layers[1].fc2.bias.data
    was = weights[3].clone()
    weights[3] += 0.5  # one number among all
    changed = features()
    assert calls and files() == 2 and not torch.allclose(changed, first)
    weights[3] = was
    assert torch.equal(features(), first) and files() == 2
    for n, more in enumerate(({"silence": 2.0}, {"precision": "bf16"}), 3):
        features(**more)
        assert files() == n
    clip = tmp_path / "notes-0.wav"
    sf.write(clip, tone(5000, seed=9), 16000)  # same name, same size: only its time tells
    os.utime(clip, ns=(1, 1))
    again = features()
    assert not torch.allclose(again[0], first[0])
    assert torch.allclose(again[1:], first[1:], atol=1e-5)
    path.write_text("".join(path.read_text().splitlines(True)[1:]))  # a clip less
    assert len(features()) == 11


def test_cache_knows_the_code_of_an_encoder_of_ones_own(tmp_path, encoder, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    marks = set()
    for name, gain in (("one_encoder", 1), ("another_encoder", 2)):
        (tmp_path / f"{name}.py").write_text(
            f"import uniwhisper\nGAIN = {gain}  # used by Own\n"
            "class Own(uniwhisper.WhisperEncoder):\n    pass\n")
        own = importlib.import_module(name).Own(encoder.config)
        own.load_state_dict(encoder.state_dict())
        marks |= {probe.fingerprint(own), probe.fingerprint(own)}
    assert len(marks) == 2


# ---------------------------------------------------------------- the command line

def test_command_line(tmp_path, folder, capsys):
    path = write_manifest(tmp_path, "notes", note_rows())
    other, out = make_encoder(tmp_path / "other", 1), tmp_path / "scores.json"
    assert main("--encoder", folder, other, "--data", path, "--json", out,
                "--cache", tmp_path / "cache", "--seeds", 2, "--epochs", 60, "--device", "cpu") == 0
    text = capsys.readouterr().out
    assert "notes" in text and "= all" in text and "paper" not in text
    saved = json.loads(out.read_text())
    one, two = (saved["encoders"][str(e)] for e in (folder, other))
    r = one["tasks"]["notes"]
    assert r["domain"] == "music" and r["test"] == 6 and r["metric"] == "accuracy"
    assert r["knn"] == 1 and r["mlp"] > 0.6 and r["mlp_std"] >= 0
    assert one["averages"]["all"]["knn"] == one["averages"]["music"]["knn_plain"] == 1
    assert saved["settings"]["seeds"] == 2 and saved["settings"]["hidden"] == 256
    assert f"{two['tasks']['notes']['mlp'] - r['mlp']:+.3f}" in text  # the difference to the first


def test_averages():
    r = lambda knn, mlp, weight, domain: {"domain": domain, "metric": "accuracy", "test": weight,
                                          "weight": weight, "knn": knn, "mlp": mlp}
    scores = {"a": r(1.0, 0.5, 100, "speech"), "b": r(0.0, 1.0, 300, "music"),
              "c": r(None, 0.0, 100, "music")}
    means = probe.averages(scores)
    assert means["all"] == pytest.approx(
        {"knn": 0.25, "knn_plain": 0.5, "mlp": 0.7, "mlp_plain": 0.5})
    assert means["music"] == pytest.approx(
        {"knn": 0, "knn_plain": 0, "mlp": 0.75, "mlp_plain": 0.5})


def test_on_valid_nothing_of_test_is_seen(tmp_path, folder):
    """What a run is watched by, and choices are made on."""
    scores, said = [], []
    for wrong in (False, True):
        rows = [(row | {"label": "high"} if wrong and row["split"] == "test" else row, clip)
                for row, clip in note_rows(48)]
        path = write_manifest(tmp_path, "notes", rows)
        scores.append(run(tmp_path, folder, [path], said.append, on="valid", seeds=1)["notes"])
    assert scores[0] == scores[1] and scores[0]["knn"] > 0.9 and scores[0]["test"] == 12
    assert "note: notes: the epoch is chosen on 3 clips held out of train" in said


def test_on_valid_needs_valid(tmp_path, folder):
    rows = note_rows(12)
    few = [(row, clip) for row, clip in rows if row["split"] != "valid"]
    untrained = [(row, clip) for row, clip in rows if row["split"] != "train"]
    folds = [(change(row, split=i % 4), clip) for i, (row, clip) in enumerate(rows)]
    for some in (few, untrained, folds):
        message = bad(tmp_path, folder, some, "--on", "valid")
        assert message == "error: notes: --on valid needs splits train and valid"


def test_tasks_without_labels_are_left_out(tmp_path, folder):
    """As of a manifest among others that is for training alone."""
    words = [(change(row, label=None, answer="a word"), clip) for row, clip in note_rows(12)]
    paths = [write_manifest(tmp_path, "words", words),
             write_manifest(tmp_path, "notes", note_rows(12))]
    said = []
    assert list(run(tmp_path, folder, paths, said.append, epochs=2)) == ["notes"]
    assert "note: words is left out: no label, events or captions" in said
    error = "error: no task to score; give --data of rows with labels"
    assert main("--encoder", folder, "--data", paths[0]) == error


def test_scores_outlive_a_task_that_fails(tmp_path, folder):
    """--json is written after each task."""
    first, out = write_manifest(tmp_path, "first", note_rows(24)), tmp_path / "o.json"
    late = write_manifest(tmp_path, "late", [(row, b"no audio") for row, _ in note_rows(12)])
    message = main("--encoder", folder, "--data", first, late, "--cache", tmp_path / "cache",
                   "--json", out)
    assert "late: 12 of 12 clips cannot be read" in message
    saved = json.loads(out.read_text())["encoders"][str(folder)]
    assert (list(saved["tasks"]) == ["first"]
            and saved["averages"]["all"]["mlp"] == saved["tasks"]["first"]["mlp"])


def test_tagging(tmp_path, folder):
    tags = [["low"], ["high"], ["low", "high"], []]
    rows = []
    for i in range(32):
        audio = sum([tone(NOTES[t], seed=i) for t in tags[i % 4]], tone(40, seed=i) * 0.1)
        rows.append(({"label": tags[i % 4], "split": ("train", "train", "valid", "test")[i // 8]},
                     audio))
    r = run(tmp_path, folder, [write_manifest(tmp_path, "tags", rows)], epochs=80)["tags"]
    assert r["metric"] == "mAP" and r["knn"] > 0.8 and r["mlp"] > 0.7


# ---------------------------------------------------------------- X-ARES's tars, unconverted

def write_shard(path, clips):
    """As X-ARES writes its WebDataset shards: KEY.json and KEY.wav side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    members = []
    for key, audio, label in clips:
        members.append((f"{key}.json", json.dumps(label).encode()))
        members.append((f"{key}.wav", conftest.audio_bytes(audio)))
    conftest.write_tar(path, members)


def test_xares_folds(tmp_path, folder):
    """ESC-50's form: five folds, each a tar of its own."""
    for fold in range(1, 6):
        clips = [(f"{fold}-{i}", tone(list(NOTES.values())[i % 3], seed=10 * fold + i),
                  {"label": i % 3, "target": "x"})
                 for i in range(6)]
        write_shard(tmp_path / "env" / "esc50" / f"wds-audio-fold-{fold}-000000.tar", clips)
    task = xares_tars.read_task(tmp_path / "env", "esc50")
    r = run(tmp_path, folder, found=[task], epochs=200, seeds=1)["esc50"]
    assert r["knn"] == 1 and r["mlp"] > 0.8
    assert (r["test"], r["weight"], len(r["epochs"])) == (6, 400, 5)


def test_xares_frames(tmp_path, folder):
    """DESED's form: a list of events in each json, several classes at once, no valid tar."""
    for split, count in (("train", 20), ("eval", 6)):
        clips = []
        for i in range(count):
            audio, events = tone(40, 2.0, seed=i) * 0.1, []
            for name, hertz in (("Dog", 500), ("Alarm_bell_ringing", 3000)):
                start = 0.5 * ((i + len(name)) % 3)
                at = round(start * 16000)
                audio[at : at + 8000] += tone(hertz, 0.5, seed=i)
                events.append({"onset": start, "offset": start + 0.5, "label": name})
            clips.append((f"{split}{i}", audio, events if i else [
                {"onset": 0.0, "offset": 2.0, "label": "Dog,Alarm_bell_ringing"}]))
        write_shard(tmp_path / "env" / "desed" / f"wds-audio-{split}-000000.tar", clips)
    said = []
    task = xares_tars.read_task(tmp_path / "env", "desed")
    r = run(tmp_path, folder, (), said.append, [task], hidden=32, epochs=200)["desed"]
    assert r["metric"] == "segment F1 macro" and r["knn"] is None
    assert r["test"] == 6 and r["mlp"] > 0.6
    assert "note: desed: the epoch is chosen on 2 clips held out of train" in said


def test_frame_targets():
    task = make_task(["train"] * 2, [[(0.0, 0.05, "a"), (0.03, 9.0, "b")], [(0.02, 0.04, "a")]],
                     metric="segment F1 macro")
    hot = probe.targets(task, torch.tensor([0] * 5 + [1] * 3), 0.02)
    assert hot.T.tolist() == [[1, 1, 1, 0, 0, 0, 1, 0], [0, 0, 1, 1, 1, 0, 0, 0]]
    hot = probe.targets(task, torch.tensor([0] * 3 + [1] * 2), 0.05)  # both ends rounded up
    assert hot.T.tolist() == [[1, 0, 0, 0, 0], [0, 1, 1, 0, 0]]


def test_xares_table():
    """Every task names its tars and settings;
    what a json holds is read as X-ARES's label processors read it."""
    sources = xares_tars.XARES
    assert len(sources) == 21 and sum(source.spec.knn for source in sources.values()) == 16
    for name, (spec, _, tars, splits) in sources.items():
        assert spec.metric in {*probe.METRICS, "recall@1"} and spec.weight > 0
        assert spec.domain in ("speech", "music", "environment") and tars.count("{") == 1
        assert len(splits) > 2 and None not in (splits[0], splits[2]), name
    read = lambda name, row: sources[name].label(row)
    assert read("fsd50k", {"soundevent": "Bark;Dog"}) == ["Bark", "Dog"]
    assert read("clotho", {"caption_1": "a", "caption_2": "b", "audio": "x.wav"}) == ["a", "b"]
    assert (read("desed", {"events": [{"onset": 0, "offset": 1, "label": "Cat,Dog"}]})
            == [(0, 1, "Cat"), (0, 1, "Dog")])
    assert read("maestro", {"events": [{"start": 0, "end": 1, "note": 60}]}) == [(0, 1, "60")]


# ---------------------------------------------------------------- bad input: one clear line

def bad(tmp_path, folder, rows, *argv, name="notes"):
    path = write_manifest(tmp_path, name, rows)
    message = main("--encoder", folder, "--data", path, "--cache", tmp_path / "cache",
                   "--epochs", 2, "--seeds", 1, *argv)
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message


def change(row, **more):
    return {k: v for k, v in (row | more).items() if v is not None}


@pytest.mark.parametrize("more, want", [
    ({"split": "dev"}, "error: notes: its splits are dev; need train, test, maybe valid, or three"),
    ({"captions": "a low note"}, "captions is 'a low note'; need a list of texts"),
    ({"captions": []}, "captions is []; need a list of texts"),
    ({"events": [{"start": 0, "end": 1, "note": "c"}]}, "notes.jsonl:1 (notes-0.wav): "),
    ({"events": [{"onset": "now", "offset": 1, "label": "c"}]}, "notes.jsonl:1 (notes-0.wav): "),
    ({"events": [{"onset": -0.1, "offset": 1, "label": "c"}]},
     "notes.jsonl:1 (notes-0.wav): events need 0 <= onset <= offset, in seconds"),
    ({"events": [{"onset": 1, "offset": 0.5, "label": "c"}]}, "need 0 <= onset <= offset"),
    ({"events": [{"onset": 0, "offset": "inf", "label": "c"}]}, "need 0 <= onset <= offset"),
    ({"task": None}, "notes.jsonl:1 (notes-0.wav): "),
])
def test_bad_rows(tmp_path, folder, more, want):
    assert want in bad(tmp_path, folder, [(row | more, None) for row, _ in note_rows(12)])


@pytest.mark.parametrize("splits, found", [
    (["train"] * 3, "train"), (["test"] * 3, "test"), (["train", "test", "²"], "test, train, ²"),
    ([1, 2] * 3, "1, 2"), ([1, 2, 3, "test"], "1, 2, 3, test")])
def test_bad_splits(splits, found):
    with pytest.raises(ValueError, match=f"^made: its splits are {found}; need train, test, maybe"):
        probe.prepare(make_task(splits, "ababab"), quiet)


def test_captions_in_folds(tmp_path, folder):
    texts = [(change(row, label=None, captions=[f"a {row['label']} note"], split=i % 3), audio)
             for i, (row, audio) in enumerate(note_rows(12))]
    r = run(tmp_path, folder, [write_manifest(tmp_path, "texts", texts)], epochs=2)["texts"]
    assert r["test"] == 4 and len(r["epochs"]) == 6 and 0 <= r["mlp"] <= 1


def test_mixed_rows(tmp_path, folder):
    rows = note_rows(12)
    rows[5] = ({"label": ["low"], "split": "train"}, None)
    assert "notes.jsonl:6 (notes-5.wav): music, mAP; unlike earlier rows of its task notes" in bad(
        tmp_path, folder, rows)


def test_unreadable_clips(tmp_path, folder, capsys):
    rows, out = note_rows(120), tmp_path / "o.json"
    rows[7] = (rows[7][0], b"no audio")
    argv = ("--encoder", folder, "--data", write_manifest(tmp_path, "notes", rows),
            "--cache", tmp_path / "cache", "--epochs", 2, "--hidden", 0, "--json", out)
    for _ in range(2):  # from the cache, too
        assert main(*argv) == 0
        assert "notes.jsonl:8 (notes-7.wav)" in capsys.readouterr().err
        saved = json.loads(out.read_text())["encoders"][str(folder)]["tasks"]
        assert saved["notes"]["unreadable"] == 1
    message = bad(tmp_path, folder, rows[:60])
    assert "notes: 1 of 60 clips cannot be read, over 1 %: " in message and "notes-7.wav" in message


def test_parts_without_clips(tmp_path, folder):
    rows = [(change(row, split="valid" if i == 7 else "test" if i > 80 else "train"), audio)
            for i, (row, audio) in enumerate(note_rows(120))]
    rows[7] = (rows[7][0], b"no audio")
    assert "notes: a part has no readable clip: {'train': 80, 'valid': 0, 'test': 39," in bad(
        tmp_path, folder, rows)


def test_tokens_that_half_precision_cannot_hold(tmp_path, encoder):
    """Fine as means, in fp32; too large as the tokens of a task on events."""
    with torch.no_grad():
        encoder.layer_norm.bias[0] = 7e4
    encoder.save(tmp_path / "loud")
    event = {"onset": 0, "offset": 0.1, "label": "a"}
    rows = [(change(row, label=None, events=[event]), audio) for row, audio in note_rows(12)]
    assert "(notes-0.wav): its features are not finite, or tokens are over 65504; try" in bad(
        tmp_path, tmp_path / "loud", rows)
    path = write_manifest(tmp_path, "means", note_rows(12))
    assert list(run(tmp_path, tmp_path / "loud", [path], epochs=2)) == ["means"]


LOST = "no clip of class c is in train{}; its clips elsewhere count as wrong"


@pytest.mark.parametrize("splits, labels, notes", [
    (["train"] * 11 + ["test"] * 2, "abababababaab",
     ["the epoch is chosen on 2 clips held out of train"]),
    (["train", "train", "valid", "test", "test"], "abaac", [LOST.format("")]),
    # kNN finds it; the probe, which does not train on valid, the next fold, cannot
    ([n // 4 for n in range(12)], "ababababaccb",
     [LOST.format(f" when fold {n} is test") for n in (1, 2)]),
    (["train", "train", "valid", "test"] * 2, "abab" * 2, [])])
def test_notes(splits, labels, notes):
    """Not errors, but said."""
    said = []
    probe.prepare(make_task(splits, labels), said.append)
    assert said == ["note: made: " + note for note in notes]


def test_bad_flags(tmp_path, folder):
    path = write_manifest(tmp_path, "notes", note_rows(12))
    probed = lambda *argv: main("--encoder", folder, *argv)
    assert probed() == "error: no task to score; give --data of rows with labels"
    assert "none.jsonl: No such file" in probed("--data", tmp_path / "none.jsonl")
    assert "none/config.json" in probed(tmp_path / "none", "--data", path)
    quick = ("--data", path, "--cache", tmp_path / "cache", "--epochs", 1)
    assert "there is no such folder" in probed(*quick, "--json", tmp_path / "no" / "o.json")
    assert "write to another place" in probed("--data", path.parent / "*.jsonl", "--json", path)
    assert "Is a directory" in probed(*quick, "--json", tmp_path)
    before = path.read_text()
    assert "write to another place" in probed("--data", path, "--json", path)
    assert path.read_text() == before
    assert "Not a directory" in probed("--data", path, "--cache", path / "cache")
    for flag, value in (("--seeds", 0), ("--batch-seconds", "nan")):
        assert "must be positive" in probed("--data", path, flag, value)
    for flag in ("--hidden", "--epochs"):
        assert "must be 0 or more" in probed("--data", path, flag, -1)
    assert probed("--data", path, "--no-such-flag", "1") == 2
    (tmp_path / "env" / "esc50").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"wds-audio-fold-1-\*.tar: No such file"):
        xares_tars.read_task(tmp_path / "env", "esc50")


