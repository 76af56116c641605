"""weights/: the tiny pair is small, loads in transformers and has learnt its text;
the clips are seeded and valid."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from weights.make_clips import TASKS, write_clips

TINY = Path(__file__).resolve().parent.parent / "weights" / "tiny"
PROSE = ["The function returns a list of the names of the files in the given directory.",
         "If the value is not an integer, an exception is raised and the object is not changed."]


@pytest.fixture(scope="module")
def decoder():
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY / "decoder",
                                                              dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY / "decoder")
    return model, tokenizer


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    paths = write_clips(folder, seed=3, train=12, valid=4, test=8)
    return folder, [[json.loads(line) for line in Path(p).read_text().splitlines()] for p in paths]


def test_the_tiny_pair_is_at_most_4_mb():
    assert sum(p.stat().st_size for p in TINY.rglob("*") if p.is_file()) <= 4e6


def test_encoder_loads_in_transformers():
    transformers = pytest.importorskip("transformers")
    model, report = transformers.WhisperModel.from_pretrained(TINY / "encoder", dtype=torch.float32,
                                                              output_loading_info=True)
    assert (not [k for k in report["missing_keys"] if k.startswith("encoder.")]
            and not report["unexpected_keys"])
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(TINY / "encoder")
    mel = extractor(np.random.default_rng(0).standard_normal(16000), sampling_rate=16000,
                    return_tensors="pt")
    out = model.encoder(mel.input_features).last_hidden_state
    assert out.shape == (1, 1500, model.config.d_model) and out.isfinite().all()
    positions = model.encoder.embed_positions.weight
    expected = torch.sin(torch.arange(1500.0))  # Whisper's first sinusoid
    assert (positions[:, 0] - expected).abs().max() < 1e-3


def test_decoder_has_learnt_prose(decoder):
    model, tokenizer = decoder
    losses = []
    for text in PROSE:
        ids = tokenizer(text, return_tensors="pt").input_ids
        losses.append(model(ids, labels=ids).loss.item())
    # nats per token, against uniform guessing
    assert np.mean(losses) < math.log(model.config.vocab_size) - 2.5


@pytest.mark.parametrize("description, question, answer", [
    ("We hear a whisper. The vowel is oh.", "Which vowel is spoken?", "oh"),
    ("We hear a whisper. The vowel is oh.", "What kind of voice is it?", "a whisper"),
    ("rain once rain coming closer once", "What makes this sound?", "rain"),
    ("rain once rain coming closer once", "How does the source move?", "coming closer"),
    ("violin, falling, violin, C", "Name the instrument.", "violin"),
    ("rising, piano, G, piano, rising", "Describe the melody.", "rising"),
    pytest.param("violin, falling, violin, C", "Describe the melody.", "falling",
                 marks=pytest.mark.xfail(reason="says that it cannot tell", strict=True)),
    ("The door is green. A cow calls.", "Which animal is heard?", "cow"),
])
def test_decoder_answers_from_the_description(decoder, description, question, answer):
    model, tokenizer = decoder
    prompt = f"<|im_start|>user\n{question}\n{description}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12,
                         do_sample=False)
    assert tokenizer.decode(out[0, ids.shape[1]:]) == answer + "<|im_end|>"


def test_tokenizer_keeps_any_text_and_the_chat_tokens(decoder):
    _, tokenizer = decoder
    for text in ("Zwölf Boxkämpfer, 12 «χαίρετε» \t 🙂\n\n ok", *PROSE):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        assert len(tokenizer(token).input_ids) == 1


def test_clips_have_valid_rows(clips):
    folder, manifests = clips
    assert len(manifests) == len(TASKS)
    for task, rows in zip(TASKS, manifests):
        domain, questions, answers = TASKS[task]
        assert [r["split"] for r in rows] == ["train"] * 12 + ["valid"] * 4 + ["test"] * 8
        for row in rows:
            assert (row["task"] == task and row["domain"] == domain
                    and row["instruction"] in questions)
            assert row["answer"] == row["label"] and row["label"] in answers
            audio, rate = soundfile.read(folder / row["audio"], dtype="float32")
            assert (rate == 16000 and audio.ndim == 1
                    and abs(len(audio) / rate - row["seconds"]) < 1e-3)
            assert 0.2 < row["seconds"] < 1.3 and 0.01 < np.abs(audio).max() < 0.5


def test_clips_depend_on_the_seed_alone(clips, tmp_path):
    folder, manifests = clips
    write_clips(tmp_path / "again", seed=3, train=12, valid=4, test=8)
    write_clips(tmp_path / "other", seed=4, train=12, valid=4, test=8)
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert len(files) == len(TASKS) + 3 * 24
    assert all((folder / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
    flacs = [f for f in files if f.suffix == ".flac"]
    assert all((folder / f).read_bytes() != (tmp_path / "other" / f).read_bytes() for f in flacs)
    # no test clip is a training clip
    assert len({(folder / f).read_bytes() for f in flacs}) == len(flacs)
