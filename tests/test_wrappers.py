"""The wrappers for others' benchmarks, called as those call them; none of them is installed.

tests/results/wrappers.json says what the benchmarks' own code made of them.
"""
import importlib
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from conftest import noise
from data import resample
from uniwhisper import load_encoder

FOLDER = Path(__file__).parent / "wrappers"
LENGTHS = [8000, 3000, 16000]  # samples
TOKENS = [25, 9, 50]


@pytest.fixture
def load(monkeypatch):
    """A function that imports a wrapper anew, for an encoder's folder."""
    monkeypatch.syspath_prepend(FOLDER)
    torchaudio = ModuleType("torchaudio")
    torchaudio.functional = SimpleNamespace(resample=resample)
    monkeypatch.setitem(sys.modules, "torchaudio", torchaudio)

    def load(name, folder):
        monkeypatch.setenv("ENCODER", str(folder))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


@pytest.fixture
def mteb(monkeypatch):
    """What the wrapper takes of MTEB."""
    def create_empty(fields):
        return SimpleNamespace(**fields)

    def collator(target_sampling_rate):
        return target_sampling_rate

    contents = {
        "mteb": {},
        "mteb.models": {"ModelMeta": SimpleNamespace(create_empty=create_empty)},
        "mteb.models.abs_encoder": {"AbsEncoder": object},
        "mteb.models.modality_collators": {"AudioCollator": collator},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def clips():
    return [noise(n, seed) for seed, n in enumerate(LENGTHS)]


def padded(clips, samples=20_000):
    audio = torch.zeros(len(clips), samples)
    for row, clip in zip(audio, clips):
        row[: len(clip)] = clip
    return audio


def features_alone(folder, clips):
    """What each clip gives by itself: a list of (T, D)."""
    encoder, alone = load_encoder(folder).eval(), []
    with torch.no_grad():
        for clip in clips:
            alone.append(encoder.encode(clip)[0][0])
    return alone


def means(features):
    return torch.stack([x.mean(0) for x in features])


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def names_ending_in_encoder(module):
    return [name for name in dir(module) if name.endswith("Encoder")]


# ---------------------------------------------------------------- X-ARES

def xares_encoder(module):
    """As xares.run makes it: of the file's only name that ends in Encoder."""
    [name] = names_ending_in_encoder(module)
    return getattr(module, name)()


def as_stored(encoder, audio):
    """What xares.task keeps of a batch: a list of (T, D)."""
    with torch.inference_mode():
        embedding = encoder(audio).to("cpu").detach()
        return [torch.from_numpy(clip.numpy()) for clip in embedding]


def test_xares_keeps_each_clips_own_tokens(load, whisper, clips):
    encoder = xares_encoder(load("uniwhisper_xares", whisper[0]))
    stored = as_stored(encoder, padded(clips))
    assert [len(x) for x in stored] == TOKENS
    for ours, theirs in zip(stored, features_alone(whisper[0], clips)):
        assert_close(ours, theirs)


def test_xares_checks_pass(load, whisper):
    encoder = xares_encoder(load("uniwhisper_xares", whisper[0]))
    assert isinstance(encoder, torch.nn.Module)
    assert (encoder.sampling_rate, encoder.hop_size_in_ms) == (16_000, 20)
    found = encoder(torch.randn(2, 50_000))
    assert isinstance(found, torch.Tensor) and found.ndim == 3
    assert (found.size(0), found.size(2)) == (2, encoder.output_dim)


def test_xares_takes_a_silent_clip(load, whisper):
    encoder = xares_encoder(load("uniwhisper_xares", whisper[0]))
    [x] = encoder(torch.zeros(1, 5000))
    assert x.shape == (1, 48) and x.isfinite().all()


def test_xares_takes_clap(load, clap):
    encoder = xares_encoder(load("uniwhisper_xares", clap[0]))
    assert (encoder.sampling_rate, encoder.hop_size_in_ms) == (48_000, 312.5)
    clips = [noise(48_000), noise(20_000, seed=1)]
    stored = as_stored(encoder, padded(clips, 60_000))
    for ours, theirs in zip(stored, features_alone(clap[0], clips), strict=True):
        assert_close(ours, theirs)


def test_xares_files_each_folder_under_a_name_of_its_own(load, whisper, whisper128):
    names = set()
    for folder, _ in (whisper, whisper128):
        encoder = xares_encoder(load("uniwhisper_xares", folder))
        name = type(encoder).__name__
        assert name.endswith("Encoder") and name.isidentifier()
        assert Path(folder).name in name
        names.add(name)
    assert len(names) == 2


# ---------------------------------------------------------------- xares-llm

def test_xares_llm_gets_features_and_their_mask(load, whisper, clips):
    module = load("uniwhisper_xares_llm", whisper[0])
    encoder = getattr(module, module.NAME)()
    mask = torch.arange(20_000) < torch.tensor(LENGTHS)[:, None]
    with torch.no_grad():
        features, kept = encoder(padded(clips), mask.long())
    assert features.shape == (3, 50, encoder.output_dim) and kept.shape == (3, 50)
    assert kept.dtype == torch.long and kept.sum(1).tolist() == TOKENS
    for x, n, theirs in zip(features, TOKENS, features_alone(whisper[0], clips)):
        assert_close(x[:n], theirs)


def test_xares_llm_gives_clap_its_own_rate(load, clap):
    module = load("uniwhisper_xares_llm", clap[0])
    audio, mask = noise(16_000)[None], torch.ones(1, 16_000, dtype=torch.long)
    with torch.no_grad():
        features, kept = getattr(module, module.NAME)()(audio, mask)
    [theirs] = features_alone(clap[0], [resample(audio[0], 16_000, 48_000)])
    assert kept.shape == (1, 3)  # a second in tokens of 0.3125 s
    assert_close(features[0], theirs)


def test_xares_llm_needs_no_mask(load, whisper):
    module = load("uniwhisper_xares_llm", whisper[0])
    with torch.no_grad():
        features, kept = getattr(module, module.NAME)()(torch.randn(3, 50_000), None)
    assert kept.all() and kept.shape == features.shape[:2]


def test_xares_llm_cannot_file_two_encoders_under_one_name(load, whisper, whisper128):
    names = set()
    for folder, _ in (whisper, whisper128):
        module = load("uniwhisper_xares_llm", folder)
        # Named as a file, xares-llm would take such a class, and file it by the file's name.
        assert not names_ending_in_encoder(module)
        names.add(module.NAME)
    assert len(names) == 2


def test_xares_llm_command_names_module_and_class(load, whisper, capsys):
    module = load("uniwhisper_xares_llm", whisper[0])
    sys.modules.pop(module.__name__)
    runpy.run_module(module.__name__, run_name="__main__")
    assert capsys.readouterr().out == f"uniwhisper_xares_llm.{module.NAME}\n"


# ---------------------------------------------------------------- MTEB

def test_mteb_gets_means_over_real_samples(load, mteb, whisper, clips):
    model = load("uniwhisper_mteb", whisper[0]).UniWhisper(whisper[0], "cpu")
    batches = Batches()
    for some in (clips[:2], clips[2:]):
        batches.append({"audio": [{"array": clip.double().numpy()} for clip in some]})
    found = model.encode(batches, task_metadata=None, hf_split="test", hf_subset="default")
    assert batches.collate_fn == 16_000  # the rate that MTEB resamples to
    assert found.shape == (3, 48) and found.dtype == "float32"
    assert_close(torch.from_numpy(found), means(features_alone(whisper[0], clips)))


class Batches(list):
    """In a DataLoader's place: batches, and a collate_fn that the wrapper sets."""


def test_mteb_files_each_folder_under_a_name_of_its_own(load, mteb, whisper, whisper128):
    names = set()
    for folder, _ in (whisper, whisper128):
        meta = load("uniwhisper_mteb", folder).UniWhisper(folder, "cpu").mteb_model_meta
        assert meta.modalities == ["audio"] and meta.name.startswith("uniwhisper/")
        names.add(meta.name)
    assert len(names) == 2


# ---------------------------------------------------------------- HEAR

def test_hear_embeddings(load, whisper, clips):
    module = load("uniwhisper_hear", whisper[0])
    model = module.load_model(str(whisper[0]))
    assert model.sample_rate == 16_000
    assert model.scene_embedding_size == model.timestamp_embedding_size == 48
    features, middles = module.get_timestamp_embeddings(clips[2][None], model)
    assert features.shape == (1, 50, 48) and middles.shape == (1, 50)
    assert middles[0, :3].tolist() == [10, 30, 50]  # ms
    scenes = module.get_scene_embeddings(padded(clips), model)
    assert_close(scenes, means(features_alone(whisper[0], clips)))


def test_hear_takes_clap(load, clap):
    module = load("uniwhisper_hear", clap[0])
    model = module.load_model(str(clap[0]))
    assert model.sample_rate == 48_000  # one of HEAR's four
    _, middles = module.get_timestamp_embeddings(noise(48_000)[None], model)
    assert middles[0, :2].tolist() == [156.25, 468.75]  # ms


def test_hear_folder_may_be_an_option(load, whisper):
    model = load("uniwhisper_hear", whisper[0]).load_model(folder=str(whisper[0]))
    assert model.width == 48
