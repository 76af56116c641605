"""benchmark.py: its FLOPs against torch's own counter, its peer against our model, its view of
the vocabulary, its settings of the C library."""
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import benchmark as bench
from conftest import noise
from data import Batch
from uniwhisper import load_decoder, load_encoder

TEXTS = ["a dog barks", "the", "speaker"]
PAGE_FAULTS = """
import resource, torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def allocate():
    for _ in range(20):
        torch.ones(12_500_000)  # 50 MB
allocate()
before = faults()
allocate()
print(faults() - before)
"""


def counted(f) -> int:
    # the counter cannot see into the fused kernels
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        f()
    return counter.get_total_flops()


@pytest.fixture
def batch(model):
    """Two clips of 30 s and a question each."""
    tokenizer, texts = model.decoder.tokenizer, TEXTS[:2]
    return Batch(audio=torch.stack([noise(480_000, n) for n in (0, 1)]),
                 samples=torch.tensor([480_000, 480_000]),
                 prompts=[tokenizer.prompt(text) for text in texts],
                 answers=[tokenizer.answer(text) for text in texts],
                 tasks=["t"] * 2, rows=[0, 1], instructions=texts, texts=texts,
                 languages=["", ""], skipped=[])


@pytest.fixture
def flags(whisper, qwen):
    return SimpleNamespace(encoder=str(whisper[0]), decoder=str(qwen[0]), device="cpu",
                           precision="fp32", data=[], compile=False, batch_seconds=40.0,
                           checkpoint_layers=False)


def test_encoder_flops_are_those_of_torchs_counter(whisper):
    encoder = load_encoder(whisper[0])
    mel = torch.zeros(2, 80, 100)
    forward = counted(lambda: encoder(mel))
    assert bench.encoder_flops(encoder.config, [50, 50]) == forward
    training = counted(lambda: encoder(mel).sum().backward())
    assert bench.encoder_flops(encoder.config, [50, 50], trained=True) == training


def attention_flops(c: dict, pairs: int) -> int:
    """FLOPs of attention where so many pairs of positions see each other."""
    return 2 * 2 * c["num_hidden_layers"] * c["num_attention_heads"] * c["head_dim"] * pairs


def test_decoder_flops_are_those_of_torchs_counter_with_half_the_attention(qwen):
    decoder, length = load_decoder(qwen[0]), 7
    c = decoder.config
    embeds = torch.zeros(2, length, c["hidden_size"])
    full = counted(lambda: decoder.unembed(decoder(embeds)[:, -3:]))
    above = attention_flops(c, length * (length - 1))  # of two clips, half of the square each
    assert bench.decoder_flops(c, [length] * 2, 6) == full - above


def test_step_flops_are_those_of_torchs_counter(model, batch, qwen):
    """The decoder's part, as the model itself lays out the chats; the padding is left out."""
    decoder, tail = model.decoder, len(model.decoder.tokenizer.tail)
    audio = torch.zeros(2, 375, decoder.width)  # 30 s
    lengths = torch.tensor([375, 375])
    chats = decoder.layout(lengths, batch.prompts, batch.answers)
    encoder, audio_tokens = bench.encoder_flops(model.encoder.config, [1500] * 2, True), 2 * 375
    adapter = 3 * 2 * audio_tokens * (4 * 48 * decoder.width + decoder.width**2)
    found = bench.step_flops(model.encoder.config, decoder.config, batch, tail, peer=False)
    needed = 0
    for chat, prompt, answer in zip(chats, batch.prompts, batch.answers):
        def forward():
            states = decoder.answer_states(audio[:1], lengths[:1], [prompt], [answer])
            decoder.unembed(states)

        above = attention_flops(decoder.config, len(chat) * (len(chat) - 1) // 2)
        needed += counted(forward) - above
    assert found == encoder + adapter + 2 * needed


@pytest.mark.parametrize("precision, within", [("fp32", 1e-4), ("bf16", 0.02)])
def test_the_peer_computes_the_same_loss_on_30_s_clips(model, batch, flags, precision, within):
    flags.precision = precision
    peer = bench.Peer(flags)
    peer.projector.load_state_dict(model.adapter.state_dict())
    loss = model(batch).mean()
    for _ in range(2):
        found = peer(list(batch.audio), batch.prompts, batch.answers).float()
        torch.testing.assert_close(found, loss, rtol=within, atol=1e-5)


def test_the_vocabulary_meets_answer_tokens_alone(batch, flags):
    assert bench.logits_at_once(flags, batch) == sum(map(len, batch.answers))


def test_joined_clips_have_the_length_and_the_chats(batch):
    joined = bench.joined([batch], 1.5, 5)
    assert joined.audio.shape == (5, 24_000) and joined.samples.tolist() == [24_000] * 5
    assert joined.audio[1].equal(batch.audio[0, 24_000:48_000])
    assert joined.texts == [*TEXTS[:2]] * 2 + TEXTS[:1]


def test_peak_bytes_are_plausible():
    assert 2**26 < bench.peak_bytes("cpu") < 2**40


def environment() -> dict:
    return {name: os.environ.get(name) for name in bench.KEEP_FREED_MEMORY}


def test_the_settings_of_the_c_library_are_those_of_one_process():
    before = environment()
    found = bench.in_own_process(environment, environment=bench.KEEP_FREED_MEMORY)
    assert found == bench.KEEP_FREED_MEMORY and environment() == before
    assert bench.in_own_process(environment) == before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_the_c_library_keeps_freed_memory_with_the_settings():
    faults = []
    for settings in ({}, bench.KEEP_FREED_MEMORY):
        command = [sys.executable, "-c", PAGE_FAULTS]
        output = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
        faults.append(int(output.stdout))
    assert faults[1] < 100 < 2000 < faults[0]
