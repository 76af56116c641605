"""The wrappers for others' benchmarks, called as those call them; none of them is installed."""
import importlib
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from conftest import noise
from data import resample
from uniwhisper import load_encoder

CLIPS = [noise(samples, seed) for seed, samples in enumerate((8000, 3000, 16000))]
TOKENS = [25, 9, 50]
# What the wrappers take of packages that are not installed here.
PEERS = {
    "torchaudio": {},
    "torchaudio.functional": {"resample": resample},
    "mteb": {},
    "mteb.models": {"ModelMeta": SimpleNamespace(create_empty=lambda x: SimpleNamespace(**x))},
    "mteb.models.abs_encoder": {"AbsEncoder": object},
    "mteb.models.modality_collators": {"AudioCollator": SimpleNamespace},
}


@pytest.fixture
def load(monkeypatch):
    """A function that imports a wrapper anew, for an encoder's folder."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "wrappers")
    for name, content in PEERS.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))

    def load(name, folder):
        monkeypatch.setenv("ENCODER", str(folder))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


def padded(clips):
    """Clips in one batch, with 4,000 zeros behind the longest, too."""
    return F.pad(pad_sequence(clips, batch_first=True), (0, 4000))


@torch.no_grad()
def features_alone(folder, clips=CLIPS):
    """What each clip gives by itself: a list of (T, D)."""
    encoder = load_encoder(folder).eval()
    return [encoder.encode(clip)[0][0] for clip in clips]


def assert_close(found, expected):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def xares_encoder(load, folder):
    """As xares.run makes it: of the file's only name that ends in Encoder."""
    module = load("uniwhisper_xares", folder)
    [name] = [name for name in dir(module) if name.endswith("Encoder")]
    return getattr(module, name)()


def xares_stored(encoder, clips):
    """What xares.task keeps of a batch: a list of (T, D)."""
    with torch.inference_mode():
        try:
            embedding = encoder(padded(clips)).to("cpu").detach()
        except NotImplementedError:
            pytest.skip("torch 2.6 cannot move jagged tensors, as X-ARES does")
        return [torch.from_numpy(clip.numpy()) for clip in embedding]


def test_xares_keeps_each_clips_own_tokens(load, whisper):
    encoder = xares_encoder(load, whisper[0])
    stored = xares_stored(encoder, CLIPS)
    assert [len(x) for x in stored] == TOKENS
    assert_close(stored, features_alone(whisper[0]))
    # As X-ARES checks it; and a silent clip.
    assert type(encoder).__name__.endswith("Encoder")
    assert (encoder.sampling_rate, encoder.hop_size_in_ms) == (16_000, 20)
    for audio in (torch.randn(2, 50_000), torch.zeros(2, 5000)):
        found = encoder(audio)
        assert (found.ndim, found.size(0), found.size(2)) == (3, 2, encoder.output_dim)
        assert all(x.isfinite().all() for x in found)


def test_encoders_of_another_rate(load, clap):
    encoder = xares_encoder(load, clap[0])
    assert (encoder.sampling_rate, encoder.hop_size_in_ms) == (48_000, 312.5)
    clips = [noise(48_000), noise(20_000, seed=1)]
    assert_close(xares_stored(encoder, clips), features_alone(clap[0], clips))
    module = load("uniwhisper_xares_llm", clap[0])  # xares-llm's audio always has 16 kHz
    with torch.no_grad():
        features, _ = getattr(module, module.NAME)()(CLIPS[2][None], torch.ones(1, 16_000).int())
    assert_close(features, features_alone(clap[0], [resample(CLIPS[2], 16_000, 48_000)]))


def test_xares_llm_gets_features_and_their_mask(load, whisper):
    module = load("uniwhisper_xares_llm", whisper[0])
    encoder, audio = getattr(module, module.NAME)(), padded(CLIPS)
    mask = torch.arange(20_000) < torch.tensor([len(clip) for clip in CLIPS])[:, None]
    with torch.no_grad():
        features, kept = encoder(audio, mask.int())
        assert encoder(audio, None)[1].all()
    assert features.shape == (3, 50, encoder.output_dim) and kept.shape == (3, 50)
    assert kept.dtype == torch.long and kept.sum(1).tolist() == TOKENS
    assert_close([x[:n] for x, n in zip(features, TOKENS)], features_alone(whisper[0]))


def test_xares_llm_command_names_module_and_class(load, whisper, capsys):
    module = load("uniwhisper_xares_llm", whisper[0] / "v1.0")  # xares-llm splits at dots
    # Named as a file, xares-llm would take such a class, and file it by the file's name.
    assert not any(name.endswith("Encoder") for name in dir(module))
    sys.modules.pop(module.__name__)
    runpy.run_module(module.__name__, run_name="__main__")
    module_name, name = capsys.readouterr().out.strip().split(".")
    assert module_name == module.__name__ and hasattr(module, name)


def test_mteb_gets_means_over_own_tokens(load, whisper):
    model = load("uniwhisper_mteb", whisper[0]).UniWhisper(whisper[0])
    clips = [{"array": clip.double().numpy()} for clip in CLIPS]
    loader = type("Loader", (list,), {})([{"audio": clips[:2]}, {"audio": clips[2:]}])
    found = model.encode(loader, hf_split="test")
    assert loader.collate_fn.target_sampling_rate == 16_000
    assert_close(torch.from_numpy(found), [x.mean(0) for x in features_alone(whisper[0])])


def test_hear_embeddings(load, whisper):
    module = load("uniwhisper_hear", whisper[0])
    assert module.load_model(str(whisper[0])).sample_rate == 16_000
    model = module.load_model(folder=whisper[0])
    assert model.scene_embedding_size == model.timestamp_embedding_size == 48
    features, middles = module.get_timestamp_embeddings(CLIPS[2][None], model)
    assert features.shape == (1, 50, 48) and middles.shape == (1, 50)
    assert middles[0, :3].tolist() == [10, 30, 50]  # ms
    scenes = module.get_scene_embeddings(padded(CLIPS), model)
    assert_close(scenes, [x.mean(0) for x in features_alone(whisper[0])])


def test_two_folders_never_share_a_name(load, whisper, whisper128):
    names = set()
    for folder, _ in (whisper, whisper128):
        names.add(type(xares_encoder(load, folder)).__name__)
        names.add(load("uniwhisper_mteb", folder).UniWhisper(folder).mteb_model_meta.name)
        names.add(load("uniwhisper_xares_llm", folder).NAME)
    assert len(names) == 6
