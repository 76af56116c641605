"""benchmark.py: its FLOPs against torch's own counter, its peer against our model, its view of the vocabulary."""
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import benchmark as bench
from conftest import noise
from data import Batch
from uniwhisper import QwenDecoder, WhisperEncoder

TEXTS = ["a dog barks", "the", "speaker"]


def counted(f) -> int:
    # the counter cannot see into the fused kernels
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        f()
    return counter.get_total_flops()


@pytest.fixture
def batch(model):
    """Two clips of 30 s and a question each."""
    samples = torch.tensor([480_000, 480_000])
    prompts, answers = ([of(t) for t in TEXTS[:2]] for of in (model.tokenizer.prompt, model.tokenizer.answer))
    return Batch(torch.stack([noise(480_000, n) for n in (0, 1)]), samples, prompts, answers, ["t"] * 2, [0, 1],
                 TEXTS[:2], TEXTS[:2], [])


@pytest.fixture
def flags(whisper, qwen):
    return SimpleNamespace(encoder=str(whisper[0]), decoder=str(qwen[0]), device="cpu", precision="fp32", data=[],
                           compile=False, batch_seconds=40.0, checkpoint_layers=False)


def test_encoder_flops_are_those_of_torchs_counter(whisper):
    encoder = WhisperEncoder.from_pretrained(whisper[0])
    mel = torch.zeros(2, 80, 100)
    assert bench.encoder_flops(encoder.config, [50, 50]) == counted(lambda: encoder(mel))
    assert bench.encoder_flops(encoder.config, [50, 50], trained=True) == counted(lambda: encoder(mel).sum().backward())


def test_decoder_flops_are_those_of_torchs_counter_with_half_the_attention(qwen):
    decoder, length = QwenDecoder.from_pretrained(qwen[0]), 7
    c = decoder.config
    full = counted(lambda: decoder.lm_head(decoder(torch.zeros(2, length, c["hidden_size"]))[:, -3:]))
    above = 2 * 2 * c["num_hidden_layers"] * c["num_attention_heads"] * c["head_dim"] * length * (length - 1)
    assert bench.decoder_flops(c, [length] * 2, 6) == full - above
    only, prompts = torch.tensor([4, 5, 6, 11, 12, 13]), [[1, 2], [3, 4]]
    ours = counted(lambda: decoder.lm_head(decoder(torch.zeros(2, length, c["hidden_size"]), None, prompts, only)))
    ours -= counted(lambda: decoder.past(prompts, length))
    # what is looked at
    square = 2 * 2 * 2 * c["num_hidden_layers"] * c["num_attention_heads"] * c["head_dim"] * length**2
    needed = 2 * 2 * c["num_hidden_layers"] * c["num_attention_heads"] * c["head_dim"] * (length * (length + 1) - 2 * 3)
    assert bench.decoder_flops(c, [length] * 2, 6, [2, 2]) == ours - square + needed


@pytest.mark.parametrize("precision, within", [("fp32", 1e-4), ("bf16", 0.02)])
def test_the_peer_computes_the_same_loss_on_30_s_clips(model, batch, flags, precision, within):
    flags.precision = precision
    peer = bench.Peer(flags)
    peer.projector.load_state_dict(model.adapter.state_dict())
    loss, tokens = model(batch)
    for _ in range(2):
        found = peer(list(batch.audio), batch.prompts, batch.answers).float()
        torch.testing.assert_close(found, loss / tokens, rtol=within, atol=1e-5)


def test_the_vocabulary_meets_answer_tokens_alone(batch, flags):
    assert bench.vocabulary_rows(flags, batch) == sum(map(len, batch.answers))


def test_joined_clips_have_the_length_and_the_chats(batch):
    joined = bench.joined([batch], 1.5, 5)
    assert joined.audio.shape == (5, 24_000) and joined.samples.tolist() == [24_000] * 5
    assert joined.audio[1].equal(batch.audio[0, 24_000:48_000]) and joined.texts == [*TEXTS[:2]] * 2 + TEXTS[:1]


def test_peak_bytes_are_plausible():
    assert 2**26 < bench.peak_bytes("cpu") < 2**40
