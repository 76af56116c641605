"""speed.py: its peer against our model, whose updates it times. scale.py: its FLOPs against
torch's own counter, the evenness of ranks, the batches that it counts."""
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import scale
import speed
from conftest import noise
from data import Batch
from uniwhisper import log_mel_spectrogram

TEXTS = ["a dog barks", "the"]


def make_batch(model, *lengths: int) -> Batch:
    """Two clips of noise, of so many samples, and a question each."""
    tokenizer, audio = model.decoder.tokenizer, torch.zeros(2, max(lengths))
    for n, length in enumerate(lengths):
        audio[n, :length] = noise(length, n)
    return Batch(audio=audio, samples=torch.tensor(lengths), tasks=["t"] * 2, rows=[0, 1],
                 prompts=[tokenizer.prompt(text) for text in TEXTS],
                 answers=[tokenizer.answer(text) for text in TEXTS],
                 instructions=TEXTS, texts=TEXTS, skipped=[])


@pytest.fixture
def flags(whisper, qwen, tmp_path):
    return SimpleNamespace(encoder=str(whisper[0]), decoder=str(qwen[0]), device="cpu", batch=1,
                           precision="fp32", data=[], batch_seconds=8.0, batches=2, out=tmp_path,
                           silence=1.0)


# ---------------------------------------------------------------- speed.py

@pytest.mark.parametrize("precision, within", [("fp32", 1e-4), ("bf16", 0.02)])
def test_the_peer_computes_the_same_loss_on_30_s_clips(model, flags, precision, within):
    flags.precision = precision
    batch, peer = make_batch(model, 480_000, 480_000), speed.Peer(speed.settings(flags))
    peer.adapter.load_state_dict(model.adapter.state_dict())
    found = peer(list(batch.audio), batch.prompts, batch.answers).float()
    torch.testing.assert_close(found, model(batch).mean(), rtol=within, atol=1e-5)


@pytest.mark.parametrize("side", ["our_updates", "peer_updates"])
def test_both_sides_make_an_update_of_each_batch(model, flags, side, monkeypatch):
    taken, calls = [], []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args: taken.append(step(*args)))
    batches = [make_batch(model, 4000, 3000), make_batch(model, 3000, 2000)]
    getattr(speed, side)(speed.settings(flags), batches, 1, lambda *_: calls.append(len(taken)))
    assert calls == [1, 2]


def test_joined_clips_have_the_length_and_the_chats(model):
    batch = make_batch(model, 40_000, 30_000)
    joined = speed.joined([batch], 1.5, 5)
    assert joined.audio.shape == (5, 24_000) and joined.samples.tolist() == [24_000] * 5
    assert joined.audio[1].equal(torch.cat((batch.audio[0, 24_000:], batch.audio[1, :8_000])))
    assert joined.texts == [*TEXTS, *TEXTS, TEXTS[0]] and joined.skipped == []


def test_the_settings_of_the_c_library_are_those_of_one_process():
    name = "MALLOC_TRIM_THRESHOLD_"
    before = os.environ.get(name)
    assert speed.in_own_process(speed.KEEP_FREED_MEMORY, os.getenv, name) == "-1"
    assert os.environ.get(name) == before != "-1"


# ---------------------------------------------------------------- scale.py

def counted(f) -> int:
    # The counter cannot see into the fused kernels.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        f()
    return counter.get_total_flops()


@pytest.mark.parametrize("silence", [0.0, 0.5])
def test_the_flops_of_an_update_are_those_of_torchs_counter(model, silence):
    batch, model.silence = make_batch(model, 16_000, 9_600), silence
    asked = np.array([len(prompt) + len(model.decoder.tokenizer.tail) for prompt in batch.prompts])
    parts = scale.update_flops(model.encoder.config, model.decoder.config, 4, silence,
                               np.array([1.0, 0.6]), asked, np.array(batch.answer_tokens))
    audio = torch.zeros(2, round((1 + silence) * 16_000))
    log_mel = counted(lambda: log_mel_spectrogram(audio, model.encoder.n_mels))
    assert sum(parts.values()) == counted(lambda: model(batch).sum().backward()) - log_mel


def test_the_evenness_is_the_mean_over_the_most_of_all_updates():
    work = np.array([1.0, 3.0, 5.0, 5.0, 9.0])  # of two ranks; the last update is not whole
    assert scale.evenness(work, 2) == pytest.approx((2 + 5) / (3 + 5))
    assert scale.evenness(work, 1) == 1


def test_ranks_draw_the_batches_of_one_in_turn(tmp_path):
    """So that the work of one rank's batches tells how even those of many are."""
    s = scale.train.Settings(data=(scale.write_rows(tmp_path, 20_000),))
    rows = scale.train.open_rows(s)
    one, four = (scale.rank_batches(s, rows, ranks) for ranks in (1, 4))
    drawn = [next(one) for _ in range(9)]
    assert [next(four) for _ in range(3)] == drawn[::4]
    assert 8 < rows.seconds.mean() < 10.5 and scale.batch_flops(s, rows, drawn[0][1]) > 1e12
