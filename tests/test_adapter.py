"""The adapter: scale at the start, partial groups, lengths."""
import pytest
import torch

from adapter import StackAdapter
from conftest import joint_model


def test_output_starts_at_the_scale_asked_for():
    torch.manual_seed(0)
    # Neighbouring tokens alike and channels of different size, as an encoder's features are.
    x = torch.randn(4, 200, 96).cumsum(1)[:, ::2] * 0.3 + torch.randn(96) * 2
    x = torch.nn.functional.layer_norm(x, (96,)) * (torch.rand(96) * 2) + torch.randn(96)
    for rms in (0.015, 0.02, 1.0):
        out = StackAdapter(96, 160, 4, output_rms=rms)(x)
        assert abs(out.square().mean().sqrt().item() / rms - 1) < 0.1


def test_joint_model_starts_at_the_scale_of_the_decoders_tokens(whisper, qwen):
    audio, samples, power = 0.1 * torch.randn(2, 32_000), torch.tensor([32_000, 32_000]), []
    for seed in range(10):  # 56 hidden units alone scatter by 10 %
        torch.manual_seed(seed)
        model = joint_model(whisper[0], qwen[0])
        power.append(model.adapter(model.encoder.encode(audio, samples)[0]).square().mean().item())
    tokens = qwen[1].get_input_embeddings().weight
    assert abs((sum(power) / len(power) / tokens.square().mean().item()) ** 0.5 - 1) < 0.1


def test_last_partial_group_is_kept_and_equals_one_filled_with_zeros():
    adapter, x = StackAdapter(6, 10, 4), torch.randn(2, 9, 6)
    filled = torch.cat((x, torch.zeros(2, 3, 6)), 1)
    assert adapter(x).shape == (2, 3, 10)
    assert torch.equal(adapter(x), adapter(filled))
    assert not torch.allclose(
        adapter(x)[:, 2], adapter(torch.cat((x[:, :8], torch.zeros(2, 4, 6)), 1))[:, 2])


def test_a_group_sees_its_own_tokens_alone():
    adapter, x = StackAdapter(6, 10, 3), torch.randn(1, 9, 6)
    changed = x.clone()
    changed[:, 4] += 1
    same = (adapter(x) == adapter(changed)).all(-1)[0]
    assert same.tolist() == [True, False, True]


@pytest.mark.parametrize("stack", [1, 2, 3, 4, 7])
def test_lengths_equal_the_tokens_that_come_out(stack):
    adapter = StackAdapter(2, 3, stack)
    tokens = list(range(1, 20))
    out = [adapter(torch.randn(1, t, 2)).shape[1] for t in tokens]
    assert [adapter.lengths(t) for t in tokens] == out
    assert adapter.lengths(torch.tensor(tokens)).tolist() == out


def test_silence_gives_finite_tokens_and_gradients():
    adapter = StackAdapter(6, 10, 4)
    x = torch.zeros(1, 8, 6, requires_grad=True)
    adapter(x).sum().backward()
    assert adapter(x).isfinite().all() and x.grad.isfinite().all()
