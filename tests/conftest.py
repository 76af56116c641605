"""What the tests share: tiny random Whisper and Qwen folders made by transformers, clips,
manifests, scripts in processes of their own."""
import faulthandler
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import runpy
import socket
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

import ablations.clap  # noqa: F401: so that its folders can be read
import ablations.whisper_decoder  # noqa: F401
from uniwhisper import UniWhisper, load_decoder, load_encoder, new_adapter

HERE = Path(__file__).resolve().parent
RATE = 16_000
VOCABULARY = 521  # a prime: no other dimension of the tiny models is a multiple of it


# ---------------------------------------------------------------- clips and manifests

def tone(seconds: float = 0.5, hertz: float = 440.0, rate: int = RATE,
         level: float = 0.3) -> np.ndarray:
    return (
        level * np.sin(2 * math.pi * hertz * np.arange(round(seconds * rate)) / rate)
    ).astype(np.float32)


def noise(samples: int, seed: int = 0, level: float = 0.1) -> torch.Tensor:
    return level * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def write_clip(path, audio=None, rate: int = RATE, **how) -> Path:
    """A clip in the format of the path's suffix; the folders above it are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, tone() if audio is None else audio, rate, **how)
    return path


def audio_bytes(audio, rate: int = RATE, **how) -> bytes:
    """A file's bytes: WAV, or how={"format": ..., "subtype": ...}."""
    file = io.BytesIO()
    sf.write(file, audio, rate, **{"format": "WAV"} | how)
    return file.getvalue()


def write_tar(path, members, **how) -> str:
    """members: {name: bytes or dictionary}, or such pairs."""
    with tarfile.open(path, "w", **how) as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            content = json.dumps(content).encode() if isinstance(content, dict) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def write_manifest(path, rows) -> str:
    """Rows (dictionaries, or lines as they are) as JSON Lines."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def assert_one_line(error, start: str, says: str = "") -> None:
    """The error that pytest.raises caught is a single line with this start, and holds `says`."""
    text = str(error.value)
    assert text.startswith(start) and says in text and "\n" not in text


def assert_close(ours, theirs, share=1e-4):
    """Within `share` of the reference's largest value."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= share * theirs.abs().max()


# ---------------------------------------------------------------- checkpoint folders

def _shake(model):
    """Random numbers everywhere: no bias stays 0, no gain stays 1, attention is far from even."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "embed_positions" not in name:
                p.add_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim == 1 else 0.08))
    return model.eval()


def make_whisper(folder, n_mels: int = 80, shard_size: str = "1GB"):
    """Save a tiny Whisper with random weights; returns transformers' model of it."""
    from transformers import WhisperFeatureExtractor, WhisperModel

    torch.manual_seed(0)
    model = _shake(WhisperModel(_whisper_config(num_mel_bins=n_mels)))
    model.save_pretrained(folder, max_shard_size=shard_size)
    WhisperFeatureExtractor(feature_size=n_mels).save_pretrained(folder)
    return model


def _whisper_config(**sizes):
    from transformers import WhisperConfig

    return WhisperConfig(**dict(
        vocab_size=90, num_mel_bins=80, d_model=48, encoder_layers=2, encoder_attention_heads=4,
        encoder_ffn_dim=80, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=40,
        pad_token_id=1, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3) | sizes)


def make_clap(folder):
    """Save a tiny unfused CLAP with random weights, its text side too; returns transformers'
    model of it."""
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    torch.manual_seed(0)
    audio = dict(patch_embeds_hidden_size=8, depths=[1, 1, 2, 1], num_attention_heads=[1, 1, 2, 2],
                 hidden_size=64, mlp_ratio=2.0, projection_dim=16)
    text = dict(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=40, max_position_embeddings=40, projection_dim=16)
    model = _shake(ClapModel(ClapConfig(audio_config=audio, text_config=text, projection_dim=16)))
    norm = model.audio_model.audio_encoder.batch_norm
    norm.running_mean.fill_(-30.0)
    norm.running_var.fill_(400.0)
    model.save_pretrained(folder)
    ClapFeatureExtractor(frequency_min=50, truncation="rand_trunc").save_pretrained(folder)
    return model


def make_talking_whisper(folder, vocabulary: int = 51865):
    """Save a tiny Whisper with a tokenizer; returns transformers' model of it. Multilingual
    from 51,865 on."""
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = _whisper_config(vocab_size=vocabulary, decoder_layers=2)
    model = _shake(WhisperForConditionalGeneration(config))
    model.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    languages = ["<|en|>", "<|nl|>", "<|el|>"]
    make_tokenizer(folder, ["<|startoftranscript|>", *languages, "<|translate|>", "<|transcribe|>",
                            "<|startofprev|>", "<|notimestamps|>"], first=False)
    return model


def make_tokenizer(folder, chat_tokens=("<|im_start|>", "<|im_end|>"), first: bool = True) -> None:
    """A byte-level BPE with a few merges; special tokens come first as here in Qwen's, or last
    as in Whisper's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", *chat_tokens]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special if first else [],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    words = "user assistant which language is spoken instrument playing the a dog barks"
    tokenizer.train_from_iterator([words] * 3, trainer)
    if not first:
        tokenizer.add_special_tokens(special)
    Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(Path(folder) / "tokenizer.json"))


def make_qwen(folder, kind: str = "qwen2", shard_size: str = "1GB", tied: bool = True):
    """Save a tiny Qwen2 or Qwen3 with random weights and its tokenizer; returns transformers'
    model of it."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, hidden_size=56, intermediate_size=72, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
                 rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
                 bos_token_id=0, eos_token_id=2, attn_implementation="eager")
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=24))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    _shake(model).save_pretrained(folder, max_shard_size=shard_size)
    make_tokenizer(folder)
    return model


@pytest.fixture(scope="session")
def whisper(tmp_path_factory):
    """(folder, transformers' model) of a Whisper with 80 mels."""
    folder = tmp_path_factory.mktemp("whisper")
    return folder, make_whisper(folder)


@pytest.fixture(scope="session")
def whisper128(tmp_path_factory):
    """(folder, transformers' model) of a Whisper with 128 mels, in several shards."""
    folder = tmp_path_factory.mktemp("whisper128")
    return folder, make_whisper(folder, 128, shard_size="100KB")


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """(folder, transformers' model) of a Qwen2 with tied embeddings."""
    folder = tmp_path_factory.mktemp("qwen")
    return folder, make_qwen(folder)


@pytest.fixture(scope="session")
def talking_whisper(tmp_path_factory):
    """(folder, transformers' model) of a whole multilingual Whisper with a tokenizer."""
    folder = tmp_path_factory.mktemp("talking")
    return folder, make_talking_whisper(folder)


@pytest.fixture(scope="session")
def english_whisper(tmp_path_factory):
    """(folder, transformers' model) of a whole `.en` Whisper with a tokenizer."""
    folder = tmp_path_factory.mktemp("english")
    return folder, make_talking_whisper(folder, 51864)


@pytest.fixture(scope="session")
def clap(tmp_path_factory):
    """(folder, transformers' model) of a whole CLAP."""
    folder = tmp_path_factory.mktemp("clap")
    return folder, make_clap(folder)


def joint_model(encoder, decoder, stack: int = 4, dtype: torch.dtype = torch.float32) -> UniWhisper:
    """A joint model of two folders, with a new adapter."""
    encoder, decoder = load_encoder(encoder), load_decoder(decoder, dtype)
    return UniWhisper(encoder, new_adapter(encoder, decoder, stack), decoder)


@pytest.fixture
def model(whisper, qwen):
    """A fresh joint model of the two folders."""
    torch.manual_seed(0)
    return joint_model(whisper[0], qwen[0])


# ---------------------------------------------------------------- scripts in their own processes

FORKS = multiprocessing.get_context("forkserver")
TIMEOUT = 120  # seconds


def run_here(words, log, patch, environment):
    """In the new process: a script's command line, its output in files."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    faulthandler.dump_traceback_later(TIMEOUT - 10)  # where it hangs, should it hang
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = words
    patch()
    if "ablations" in words[0]:
        runpy.run_path(words[0], run_name="__main__")
    else:
        importlib.import_module(Path(words[0]).stem).main()


class Run:
    """One `python train.py ...`, or what `script` says in its place, with fixture `forks`.

    Forked from a server that has imported torch. `patch` is called before it in its process.
    """

    numbers = itertools.count()

    def __init__(self, argv, patch=dict, script=("train.py",), **environment):
        self.log = f"{Run.logs}/{next(Run.numbers)}"
        words = [str(word) for word in (*script, *argv)]
        self.process = FORKS.Process(target=run_here, args=(words, self.log, patch, environment))
        self.process.start()

    def wait(self) -> "Run":
        self.process.join(TIMEOUT)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.code = self.process.exitcode
        self.out, self.err = (Path(f"{self.log}.{name}").read_text() for name in ("out", "err"))
        return self

    def fail(self) -> str:
        """Its error: one line, and nothing else."""
        self.wait()
        text = self.err.splitlines()[-1]
        assert self.code == 1 and "Traceback" not in self.err and text.startswith("error: ")
        return text


def succeed(*runs: Run) -> Run:
    """Wait for runs that are to end well; returns the first."""
    for run in runs:
        run.wait()
    assert not any(run.code for run in runs), "\n".join(
        f"exit code {run.code}\n{run.err}" for run in runs)
    return runs[0]


def start_ranks(*argvs, patch=dict, **how) -> list[Run]:
    """A rank for each command line, as torchrun starts them; the patch is rank 0's."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    how |= dict(WORLD_SIZE=str(len(argvs)), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return [Run(argv, dict if rank else patch, RANK=str(rank), LOCAL_RANK=str(rank), **how)
            for rank, argv in enumerate(argvs)]


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """Where Run works: a server that imports once, and one thread, for equal bits."""
    before, threads = dict(os.environ), torch.get_num_threads()
    os.environ.update(PYTHONPATH=os.pathsep.join([str(HERE), str(HERE.parent)]),
                      OMP_NUM_THREADS="1")
    # A run's optimizer would import _dynamo: 1.5 s.
    FORKS.set_forkserver_preload(["conftest", "train", "torch._dynamo",
                                  "transformers.models.clap.modeling_clap"])
    torch.set_num_threads(1)
    Run.logs = tmp_path_factory.mktemp("logs")
    yield
    for child in multiprocessing.active_children():  # of a test that failed
        child.kill()
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(before)
