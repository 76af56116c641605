"""What a forward pass asks of a GPU, imitated with fake tensors: every tensor is on the right
device, and nothing makes the CPU wait for the GPU."""
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import train
import uniwhisper
from data import Batch

GPU = "cuda:0"
aten = torch.ops.aten
WAITS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
         aten._assert_async.default)


class ImitatedGPU(TorchDispatchMode):
    """Ops on GPU are done by fake tensors, those on the CPU for real; a wait is an error."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu, device = any(isinstance(x, FakeTensor) for x in tensors), kwargs.get("device")
        to_gpu = device is not None and torch.device(device).type == "cuda"
        if not on_gpu and not to_gpu:
            return op(*args, **kwargs)
        masks = op is aten.index.Tensor and any(x.dtype == torch.bool for x in tensors[1:])
        leaves = on_gpu and device is not None and not to_gpu
        arrives = bool(tensors) and not on_gpu and not kwargs.get("non_blocking")
        assert not (op in WAITS or masks or leaves or arrives), f"{op} waits for the GPU"
        with self.fake:
            args, kwargs = tree_map(self.imitate, (args, kwargs))
            return op(*args, **kwargs)

    def imitate(self, x):
        real = isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)
        return self.fake.from_tensor(x) if real else x


class PlainIndexing(TorchFunctionMode):
    """x[...] in single ops: Python's own asks a torch without CUDA for its device."""

    def __torch_function__(self, f, types, args=(), kwargs=None):
        if f is not torch.Tensor.__getitem__ or not isinstance(args[0], FakeTensor):
            return f(*args, **(kwargs or {}))
        x, keys = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
        dim, left = 0, x.dim() - sum(key is not None and key is not ... for key in keys)
        for key in keys:
            if key is ...:
                dim += left
            elif key is None:
                x, dim = x.unsqueeze(dim), dim + 1
            elif isinstance(key, slice):
                x, dim = aten.slice(x, dim, *key.indices(x.shape[dim])), dim + 1
            else:
                x = x.select(dim, key) if isinstance(key, int) else aten.index(x, [key])
        return x


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with sdpa_kernel(SDPBackend.MATH), PlainIndexing(), ImitatedGPU() as gpu:
        try:
            aten._fft_r2c(torch.zeros(4, device=GPU), [0], 0, True)
        except RuntimeError:
            pytest.skip("this torch imitates FFTs on a real GPU alone (2.6 does)")
        yield gpu
    torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
    uniwhisper.mel_filters.cache_clear()


def move(model):
    return model._apply(lambda p: torch.empty(p.shape, dtype=p.dtype, device=GPU))


def new_batch(tokenizer) -> Batch:
    """Clips of three lengths, so that there is padding, one of them over two windows."""
    texts, samples = ["a dog", "the", "speaker is the dog"], torch.tensor([8000, 500_000, 16_000])
    return Batch(audio=torch.zeros(3, 500_000), samples=samples,
                 prompts=[tokenizer.prompt(text) for text in texts],
                 answers=[tokenizer.answer(text) for text in texts], tasks=["t"] * 3,
                 rows=[0, 1, 2], instructions=texts, texts=texts, skipped=[])


@torch.no_grad()  # a torch without CUDA cannot record a backward on its devices
def test_forward_waits_for_nothing(model, gpu):
    move(model)
    batch = new_batch(model.decoder.tokenizer)
    losses = model(batch.to(GPU))
    weights = train.token_weights(batch, "example").to(GPU, non_blocking=True)
    loss = (losses * weights).sum()
    assert str(loss.device) == GPU and losses.shape == (sum(batch.answer_tokens),)


@pytest.mark.parametrize("wait", [
    lambda x: x.sum().item(), lambda x: x[torch.tensor([True, False])], lambda x: x.cpu(),
    lambda x: x.nonzero(), lambda x: torch.ones(2).to(GPU), lambda x: x + torch.ones(2)])
def test_the_imitation_finds_waits_and_wrong_devices(gpu, wait):
    x = torch.zeros(2, device=GPU)
    with pytest.raises((AssertionError, RuntimeError)):
        wait(x)
