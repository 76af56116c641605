"""uniwhisper.py against transformers on the same weights; masks, loss, generation, folders,
command line."""
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import uniwhisper
from conftest import (RATE, VOCABULARY, assert_close, assert_one_line, joint_model, make_qwen,
                      make_tokenizer, noise, tone, write_clip, write_manifest)
from uniwhisper import (SILENCE, ChatTokenizer, QwenDecoder, WhisperEncoder, encoder_lengths,
                        load_decoder, load_encoder, load_run, log_mel_spectrogram,
                        newest_checkpoint)

WINDOW = 30 * RATE
transformers = pytest.importorskip("transformers")


def batch_of(model, samples=(24_000, 9_000, 40_001)):
    """Clips of noise with questions and answers, as data.py would make it."""
    questions = ["Which language is spoken?", "Which instrument is playing in this clip?", "Who?"]
    answers = ["Greek", "a dog barks, then the rain", "x"]
    audio = torch.zeros(len(samples), max(samples))
    for i, n in enumerate(samples):
        audio[i, :n] = noise(n, seed=i)
    return SimpleNamespace(audio=audio, samples=torch.tensor(samples), questions=questions,
                           prompts=[model.decoder.tokenizer.prompt(q) for q in questions],
                           answers=[model.decoder.tokenizer.answer(a) for a in answers])


# ---------------------------------------------------------------- log-mel

CLIPS = {
    "noise": lambda: noise(WINDOW, level=0.2),
    "quiet": lambda: noise(WINDOW, level=1e-4),
    "loud": lambda: noise(WINDOW, level=5.0),
    "click at the end": lambda: F.one_hot(torch.tensor(WINDOW - 1), WINDOW).float(),
    "short": lambda: noise(12_345),
    "almost 30 s": lambda: noise(WINDOW - 77),
    "one sample": lambda: torch.ones(1),
}


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("clip", CLIPS)
def test_mel_equals_transformers(clip, n_mels):
    audio = CLIPS[clip]()
    ours = log_mel_spectrogram(audio[None], n_mels)[0]
    extractor = transformers.WhisperFeatureExtractor(feature_size=n_mels)
    theirs = extractor(audio.numpy(), sampling_rate=RATE)["input_features"][0]
    frames = max(1, len(audio) // 160)
    assert ours.shape == (n_mels, frames)
    assert np.abs(ours.numpy() - theirs[:, :frames]).max() < 1e-4


@pytest.mark.parametrize("samples", [5, 399, 16_000, 16_159, 300_000, WINDOW - 201, WINDOW - 100])
def test_mel_of_real_frames_ignores_appended_zeros(samples):
    audio = noise(samples, level=1e-3)[None]
    # a click on the last sample: the loudest frames are the ones that straddle the end
    audio[0, -1] = 1.0
    alone = log_mel_spectrogram(audio)
    for zeros in (1, 170, 4_000, WINDOW - samples):
        padded = log_mel_spectrogram(F.pad(audio, (0, min(zeros, WINDOW - samples))))
        assert (padded[:, :, : alone.shape[2]] - alone).abs().max() < 1e-5


def test_mel_of_a_quiet_clip_ignores_its_loud_neighbour():
    quiet, loud = noise(16_000, level=1e-4), noise(16_000, seed=1)
    both = log_mel_spectrogram(torch.stack((quiet, loud)))
    assert (both[0] - log_mel_spectrogram(quiet[None])[0]).abs().max() < 1e-6


# ---------------------------------------------------------------- encoder

@pytest.mark.parametrize("samples, tokens", [(0, 1), (1, 1), (160, 1), (320, 1), (479, 1), (480, 2),
                                             (640, 2), (WINDOW, 1500), (WINDOW + 480, 1502)])
def test_encoder_lengths(samples, tokens):
    assert encoder_lengths(samples) == tokens
    assert encoder_lengths(torch.tensor([samples])).tolist() == [tokens]


@pytest.mark.parametrize("folder", ["whisper", "whisper128"])
def test_encoder_equals_transformers_on_30_s(folder, request):
    folder, theirs = request.getfixturevalue(folder)
    encoder = WhisperEncoder.from_pretrained(folder).eval()
    audio = torch.stack((noise(WINDOW), torch.from_numpy(tone(30))))
    mel = log_mel_spectrogram(audio, encoder.n_mels)
    with torch.no_grad():
        hidden = theirs.encoder(mel).last_hidden_state
        assert_close(encoder(mel), hidden)
        assert_close(encoder.encode(audio)[0], hidden)


def test_short_clip_equals_a_transformers_encoder_of_that_length(whisper):
    folder, full = whisper
    config = transformers.WhisperConfig(**full.config.to_dict() | {"max_source_positions": 41})
    theirs = transformers.models.whisper.modeling_whisper.WhisperEncoder(config).eval()
    weights = full.encoder.state_dict()
    weights["embed_positions.weight"] = weights["embed_positions.weight"][:41]
    theirs.load_state_dict(weights)
    audio = noise(41 * 320)[None]
    with torch.no_grad():
        ours = WhisperEncoder.from_pretrained(folder).encode(audio, silence=0)[0]
        assert_close(ours, theirs(log_mel_spectrogram(audio)).last_hidden_state)


@pytest.mark.parametrize("silence", [0, SILENCE, 30])
def test_features_of_a_clip_do_not_depend_on_its_batch(whisper, silence):
    """Nor do those of a clip over 30 s, whose windows are encoded each by itself."""
    encoder = WhisperEncoder.from_pretrained(whisper[0]).eval()
    lengths = [2 * WINDOW + 5_000, 16_000, 1, WINDOW, 8_161, 79_999]
    clips = [noise(n, seed=n, level=10.0 ** -(i % 3)) for i, n in enumerate(lengths)]
    for clip in clips:
        clip[-1] = 1.0
    audio = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    with torch.no_grad():
        features, tokens = encoder.encode(audio, torch.tensor(lengths), silence)
        assert tokens.tolist() == [encoder_lengths(n) for n in lengths]
        assert features.shape == (len(clips), tokens[0], 48)
        for i, clip in enumerate(clips):
            parts = [encoder.encode(part, None, silence)[0][0] for part in clip.split(WINDOW)]
            assert_close(features[i, : tokens[i]], torch.cat(parts), 1e-5)
            assert not features[i, tokens[i]:].any()  # padding is zero


@pytest.mark.parametrize("silence", [0.5, 30])
def test_silence_is_heard_behind_a_clip_and_gives_no_tokens(whisper, silence):
    folder, theirs = whisper
    encoder, audio = WhisperEncoder.from_pretrained(folder).eval(), noise(33_000)[None]
    batch = torch.cat((audio, F.pad(noise(9_000, seed=1), (0, 24_000))[None]))
    with torch.no_grad():
        features, lengths = encoder.encode(batch, torch.tensor([33_000, 9_000]), silence)
        expected = encoder.encode(F.pad(audio, (0, 8_000)), silence=0)[0]
        if silence == 30:  # as Whisper was trained
            mel = log_mel_spectrogram(F.pad(audio, (0, WINDOW - 33_000)))
            expected = theirs.encoder(mel).last_hidden_state
        assert lengths.tolist() == [103, 28] and features.shape[1] == 103
        assert_close(features[0], expected[0, :103])
        assert not features[1, 28:].any() and features[1, :28].all()
        assert (features[0] - encoder.encode(audio, silence=0)[0][0]).abs().max() > 0.1


def test_padded_tokens_are_masked(whisper):
    encoder = WhisperEncoder.from_pretrained(whisper[0]).eval()
    mel = log_mel_spectrogram(noise(16_000)[None]).repeat(2, 1, 1)
    mel[1, :, 60:] = 7.0  # beyond 30 tokens: must not be seen
    with torch.no_grad():
        seen = encoder(mel)
        masked = encoder(mel, torch.tensor([30, 30]))
    assert not torch.allclose(seen[0, :30], seen[1, :30])
    assert torch.equal(masked[0, :30], masked[1, :30])


def test_clips_or_a_clip_of_any_float_type_are_encoded(whisper):
    encoder, audio = load_encoder(whisper[0]).eval(), noise(RATE)[None]
    with torch.no_grad():
        expected, lengths = encoder.encode(audio, torch.tensor([RATE]))
        for same in (audio, audio[0], audio.double(), audio.numpy(), audio[0].double().numpy()):
            features, tokens = encoder.encode(same)
            assert torch.equal(features, expected) and tokens.equal(lengths)
        half = encoder.encode(audio.half(), torch.tensor([RATE]))[0]
        assert (half.dtype == torch.float32
                and torch.equal(half, encoder.encode(audio.half().float())[0]))
    for bad, says in (((audio * 32767).short(), r"torch.int16 of shape \(1, 16000\)"),
                      (audio[None], r"audio is torch.float32 of shape \(1, 1, 16000\)")):
        with pytest.raises(ValueError, match=says + r"; need floats from -1 to 1, \(B, S\) or"):
            encoder.encode(bad)


def test_pooled_features_are_the_mean_over_a_clips_own_tokens(whisper):
    encoder, samples = load_encoder(whisper[0]).eval(), torch.tensor([9_000, 33_000])
    audio = torch.stack((F.pad(noise(9_000), (0, 24_000)), noise(33_000)))
    with torch.no_grad():
        for silence in (0, 30):
            features, _ = encoder.encode(audio, samples, silence)
            pooled = encoder.pooled(audio, samples, silence)
            for clip, tokens in enumerate((28, 103)):
                assert_close(pooled[clip], features[clip, :tokens].mean(0), 1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            assert encoder.pooled(audio[0, :9_000]).dtype == torch.float32


def test_the_module_works_beside_others_of_the_same_names(whisper, tmp_path):
    for name in ("adapter", "data"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')")
    code = f"""
import sys
sys.path[:0] = [{str(tmp_path)!r}]
sys.path.append({str(Path(uniwhisper.__file__).parent)!r})
sys.modules["adapter"] = sys
import torch
from uniwhisper import load_encoder
features, _ = load_encoder({str(whisper[0])!r}).encode(torch.zeros(16000))
print(features.shape, "data" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.stdout == "torch.Size([1, 50, 48]) False\n", done.stderr


# ---------------------------------------------------------------- decoder

QWENS = {
    "qwen2 tied": dict(kind="qwen2", tied=True),
    "qwen2 untied": dict(kind="qwen2", tied=False),
    "qwen3 tied": dict(kind="qwen3", tied=True),
    "qwen3 untied, sharded": dict(kind="qwen3", tied=False, shard_size="60KB"),
}


def assert_decoder_equals(folder, theirs):
    decoder = QwenDecoder.from_pretrained(folder)
    ids = torch.randint(VOCABULARY, (2, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        reference = theirs(input_ids=ids, output_hidden_states=True)
        hidden = decoder(decoder.embed_tokens(ids))
        assert_close(hidden, reference.hidden_states[-1])
        assert_close(decoder.unembed(hidden), reference.logits)


@pytest.mark.parametrize("how", QWENS)
def test_decoder_equals_transformers(how, tmp_path):
    theirs = make_qwen(tmp_path, **QWENS[how])
    assert ("sharded" in how) == (len(list(tmp_path.glob("model-*.safetensors"))) > 1)
    assert_decoder_equals(tmp_path, theirs)


def test_decoder_reads_the_older_rope_theta(qwen, tmp_path):
    folder, theirs = qwen
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("rope_parameters")["rope_theta"] == 5000  # the newer place
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"rope_theta": 5000.0, "rope_scaling": None}))
    assert_decoder_equals(tmp_path, theirs)


def test_answer_states_of_a_clip_do_not_depend_on_its_batch(qwen):
    decoder = QwenDecoder.from_pretrained(qwen[0])
    audio, lengths = torch.randn(3, 9, 56), torch.tensor([9, 2, 5])
    prompts, answers = [[5, 6], [7, 8, 9, 10], [11]], [[20, 21, 22], [23], [24, 25]]
    together = decoder.answer_states(audio, lengths, prompts, answers).split([3, 1, 2])
    for i, states in enumerate(together):
        n = lengths[i : i + 1]
        alone = decoder.answer_states(audio[i : i + 1, :n], n, prompts[i : i + 1],
                                      answers[i : i + 1])
        assert_close(states, alone, 1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_greedy_generation_equals_transformers(kind, tmp_path):
    theirs = make_qwen(tmp_path, kind)
    decoder = QwenDecoder.from_pretrained(tmp_path)
    torch.manual_seed(0)
    prompts = [p.tolist() for p in torch.randint(VOCABULARY, (30,)).split([3, 17, 9, 1])]
    audio, lengths = torch.randn(4, 6, 56), torch.tensor([6, 1, 3, 4])
    audio[1, 1:] = 100.0  # padding must not be seen
    rows = decoder.layout(lengths, prompts, [[]] * 4)
    embeds = [decoder.embed([row], audio[i : i + 1], lengths[i : i + 1])
              for i, row in enumerate(rows)]
    how = dict(max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)
    free = [theirs.generate(inputs_embeds=e, **how)[0].tolist() for e in embeds]
    decoder.tokenizer.stop = {VOCABULARY}
    assert decoder.generate(audio, lengths, prompts, 12) == free
    stop = {free[0][5], free[1][2]}  # tokens that do come: generation ends before them
    until = [row[: next((i for i, t in enumerate(row) if t in stop), None)] for row in free]
    decoder.tokenizer.stop = stop
    assert decoder.generate(audio, lengths, prompts, 12) == until
    assert decoder.generate(audio, lengths, prompts, 0) == [[]] * 4


def test_decoder_computes_in_its_own_dtype_under_autocast(whisper, qwen):
    torch.manual_seed(0)
    exact = joint_model(whisper[0], qwen[0])
    half = joint_model(whisper[0], qwen[0], dtype=torch.bfloat16)
    half.adapter.load_state_dict(exact.adapter.state_dict())
    assert {p.dtype for p in half.decoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.encoder.parameters()} == {torch.float32}
    computed = lambda decoder: decoder.unembed(decoder(torch.randn(1, 4, 56))).dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert computed(half.decoder) == torch.bfloat16
        assert computed(exact.decoder) == torch.bfloat16  # as one that trains
        losses = half(batch_of(half))
    assert losses.dtype == torch.float32
    assert abs(losses.sum() / exact(batch_of(exact)).sum() - 1) < 0.03


# ---------------------------------------------------------------- prompt and loss

def test_chat_is_laid_out_as_designed(model):
    t = model.decoder.tokenizer
    spell = lambda ids: t.tokenizer.decode(ids, skip_special_tokens=False)
    assert spell(t.prompt("Who speaks?")) == "<|im_start|>user\nWho speaks?\n"
    assert spell(t.tail) == "<|im_end|>\n<|im_start|>assistant\n"
    assert spell(t.answer("a dog")) == "a dog<|im_end|>" and t.answer("a dog")[-1] == t.end
    assert t.decode(t.answer("Grüße, 你好")) == "Grüße, 你好"


def test_qwen3s_tokenizer_gets_an_empty_thought(tmp_path):
    make_tokenizer(tmp_path, ("<|im_start|>", "<|im_end|>", "<think>", "</think>"))
    t = ChatTokenizer.from_pretrained(tmp_path)
    assert t.tokenizer.decode(t.tail, skip_special_tokens=False).endswith(
        "<|im_start|>assistant\n<think>\n\n</think>\n\n")


def chats(model, theirs, batch):
    """Each row by itself, its embeddings joined by hand: prompt, audio, tail,
    answer -> (1, L, D)."""
    embed = lambda ids: theirs.get_input_embeddings()(torch.tensor([ids], dtype=torch.long))
    for audio, samples, prompt, answer in zip(batch.audio, batch.samples, batch.prompts,
                                              batch.answers):
        spoken = model.adapter(model.encoder.encode(audio[:samples])[0])
        yield torch.cat((embed(prompt), spoken, embed(model.decoder.tokenizer.tail),
                         embed(answer)), 1)


def test_loss_is_transformers_loss_on_the_answer_tokens(model, qwen):
    """Of each row by itself, with labels that are -100 but for the answer."""
    batch, expected = batch_of(model), []
    losses = model(batch)
    counts = [len(answer) for answer in batch.answers]
    assert losses.shape == (sum(counts),) and losses.dtype == torch.float32
    for embeds, answer in zip(chats(model, qwen[1], batch), batch.answers):
        labels = torch.full(embeds.shape[:2], -100)
        labels[0, -len(answer):] = torch.tensor(answer)
        expected.append(qwen[1](inputs_embeds=embeds, labels=labels).loss * len(answer))
    ours = torch.stack([part.sum() for part in losses.split(counts)])
    assert_close(ours, torch.stack(expected), 1e-5)


def test_loss_of_many_answer_tokens_is_the_same_in_pieces(model, monkeypatch):
    batch = batch_of(model)
    losses = model(batch)
    gradient = torch.autograd.grad(losses.sum(), model.adapter.fc2.weight)[0]
    monkeypatch.setattr(uniwhisper, "LOGITS_AT_ONCE", 5)
    pieces = model(batch)
    assert_close(pieces, losses, 1e-6)
    assert_close(torch.autograd.grad(pieces.sum(), model.adapter.fc2.weight)[0], gradient, 1e-5)


def test_decoder_is_frozen_and_gradients_pass_through_it(model):
    model(batch_of(model)).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in model.decoder.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.adapter.parameters() if p.requires_grad)
    for name, p in model.encoder.named_parameters():
        if name == "embed_positions.weight":
            assert p.grad is None  # the sinusoids do not train
        elif name != "conv1.bias":
            assert p.grad.abs().sum() > 0, name


def test_recomputed_activations_change_no_gradient(model):
    batch = batch_of(model)
    model(batch).sum().backward()
    kept = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.encoder.checkpoint_layers = model.decoder.checkpoint_layers = True
    model(batch).sum().backward()
    assert all(torch.equal(p.grad, kept[n])
               for n, p in model.named_parameters() if p.grad is not None)


class Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that any operation gives, forward and backward."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.seen.add(tuple(t.shape))
        return out

    def with_vocabulary(self):
        weight = {(VOCABULARY, 56), (56, VOCABULARY)}
        return {s for s in self.seen if any(d and d % VOCABULARY == 0 for d in s)} - weight


def test_a_step_never_makes_a_tensor_of_sequence_by_vocabulary(model):
    batch = batch_of(model)
    answers = sum(map(len, batch.answers))
    with Shapes() as shapes:
        model(batch).sum().backward()
    assert shapes.with_vocabulary() == {(answers, VOCABULARY)}
    with Shapes() as shapes:  # the watch does see such a tensor
        model.decoder.unembed(model.decoder(torch.randn(3, 50, 56)))
    assert (3, 50, VOCABULARY) in shapes.with_vocabulary()


def test_joint_generation_equals_transformers_and_does_not_depend_on_the_batch(model, qwen):
    batch = batch_of(model)
    texts = model.generate(batch.audio, batch.samples, batch.questions, 10)
    alone = zip(batch.audio, batch.samples, batch.questions)
    assert [model.generate(audio[None, :n], n[None], [question], 10)[0]
            for audio, n, question in alone] == texts
    batch.answers = [[], [], []]
    how = dict(max_new_tokens=10, do_sample=False,
               eos_token_id=sorted(model.decoder.tokenizer.stop), pad_token_id=0)
    theirs = [qwen[1].generate(inputs_embeds=embeds, **how)[0]
              for embeds in chats(model, qwen[1], batch)]
    assert [model.decoder.tokenizer.decode(ids.tolist()) for ids in theirs] == texts


# ---------------------------------------------------------------- folders

def test_strict_loading_names_missing_unexpected_and_misshaped_together(whisper, tmp_path):
    shutil.copytree(whisper[0], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    prefix = next(k for k in tensors if k.endswith("encoder.conv1.bias")).removesuffix("conv1.bias")
    del tensors[f"{prefix}conv1.bias"]
    tensors[f"{prefix}novel.weight"] = torch.zeros(1)
    tensors[f"{prefix}conv2.bias"] = torch.zeros(7)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as e:
        WhisperEncoder.from_pretrained(tmp_path)
    for says in ('Missing key(s) in state_dict: "conv1.bias"',
                 'Unexpected key(s) in state_dict: "novel.weight"',
                 "size mismatch for conv2.bias: copying a param with shape torch.Size([7]) "
                 "from checkpoint"):
        assert_one_line(e, str(tmp_path), says)


def edit_config(**changes):
    def spoil(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return spoil


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(pattern):
    return lambda folder: sorted(folder.glob(pattern))[0].unlink()


def cut_weights(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-100])


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
BAD_FOLDERS = {  # what is done to a good folder, and what the one line must name
    "no config": (remove("config.json"), "config.json is missing"),
    "config is not JSON": (write("config.json", "{"), "config.json is unusable ("),
    "another architecture": (edit_config(model_type="llama"), "model_type is 'llama'"),
    "yarn positions": (edit_config(rope_parameters={"rope_type": "yarn"}), "rope_type is 'yarn'"),
    "yarn, older place": (edit_config(rope_parameters=None, rope_scaling={"type": "yarn"}),
                          "type is 'yarn'"),
    "sliding window": (edit_config(use_sliding_window=True), "use_sliding_window"),
    "other width": (edit_config(hidden_size=60), "size mismatch for embed_tokens.weight"),
    "a size is null": (edit_config(num_key_value_heads=None),
                       "num_key_value_heads is None; need a whole number above 0"),
    "missing shard": (remove("model-00002*"), "model-00002"),
    "no weights": (remove("*.index.json"), "model.safetensors"),
    "damaged weights": (cut_weights, "is unusable"),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer.json is missing"),
    "damaged tokenizer": (write("tokenizer.json", "{"), "tokenizer.json"),
    "no chat tokens": (lambda folder: make_tokenizer(folder, ()),
                       "is unusable (lacks the token <|im_start|>"),
    "a Git LFS pointer": (write("tokenizer.json", LFS), "run `git lfs pull`"),
}

@pytest.fixture(scope="module")
def sharded_qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    make_qwen(folder, shard_size="60KB")
    return folder


@pytest.mark.parametrize("fault", BAD_FOLDERS)
def test_bad_decoder_folder_gives_one_clear_line(fault, whisper, sharded_qwen, tmp_path):
    shutil.copytree(sharded_qwen, tmp_path, dirs_exist_ok=True)
    joint_model(whisper[0], tmp_path)  # good as it is
    spoil, says = BAD_FOLDERS[fault]
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        joint_model(whisper[0], tmp_path)
    assert_one_line(e, str(tmp_path), says)


@pytest.mark.parametrize("carried", [
    dict(truncation=dict(direction="Right", max_length=4, strategy="LongestFirst", stride=0)),
    dict(padding=dict(strategy={"Fixed": 40}, direction="Left", pad_to_multiple_of=None, pad_id=0,
                      pad_type_id=0, pad_token="<|endoftext|>")),
    dict(post_processor=dict(type="TemplateProcessing",
                             pair=[{"Sequence": {"id": "A", "type_id": 0}}],
                             single=[{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                                     {"Sequence": {"id": "A", "type_id": 0}}],
                             special_tokens={"<|endoftext|>": dict(id="<|endoftext|>", ids=[0],
                                                                   tokens=["<|endoftext|>"])})),
])
def test_what_a_saved_tokenizer_carries_along_changes_no_ids(qwen, tmp_path, carried):
    path = tmp_path / "tokenizer.json"
    saved = json.loads((Path(qwen[0]) / "tokenizer.json").read_text())
    for key, value in carried.items():
        saved[key] = value
    path.write_text(json.dumps(saved))
    clean, ours = ChatTokenizer.from_pretrained(qwen[0]), ChatTokenizer.from_pretrained(tmp_path)
    text = "which language is spoken? the instrument playing a dog barks"
    assert ours.answer(text) == clean.answer(text) and len(clean.answer(text)) > 8
    assert ours.prompt("x") == clean.prompt("x") and ours.tail == clean.tail


def test_of_two_sets_of_weights_transformers_is_read(sharded_qwen, tmp_path):
    shutil.copytree(sharded_qwen, tmp_path, dirs_exist_ok=True)
    newer = {k: 2 * v for k, v in uniwhisper.read_weights(tmp_path).items()}
    save_file(newer, tmp_path / "model.safetensors", {"format": "pt"})
    assert_decoder_equals(tmp_path, transformers.Qwen2ForCausalLM.from_pretrained(tmp_path))


def test_a_runs_folder_or_a_hubs_name_in_place_of_a_checkpoint(whisper, tmp_path):
    shutil.copytree(whisper[0], tmp_path / "encoder")
    (tmp_path / "config.json").write_text('{"steps": 3}')
    with pytest.raises(ValueError) as e:
        load_encoder(tmp_path)
    assert_one_line(e, str(tmp_path), "of a training run: OUT/encoder")
    with pytest.raises(FileNotFoundError) as e:
        load_decoder("Qwen/Qwen2.5-0.5B-Instruct")
    assert_one_line(e, "Qwen/Qwen2.5-0.5B-Instruct/config.json is missing", "is it a hub's name")


@pytest.mark.parametrize("kind, has_source",
                         [("whisper", False), ("whisper", True), ("whisper128", True)])
def test_saved_encoder_loads_in_transformers_with_equal_features(kind, has_source, request,
                                                                 tmp_path):
    folder, original = request.getfixturevalue(kind)
    encoder = WhisperEncoder.from_pretrained(folder).eval()
    encoder.config["dtype"] = "float16"  # so transformers 5 saves half precision
    with torch.no_grad():
        for p in encoder.layers.parameters():
            p.mul_(1.1)  # as if trained
    for path in folder.glob("*.json"):
        path.chmod(0o444)  # as a download cache may have it
    encoder.save(tmp_path, folder if has_source else None)
    # To be written again, and to be read by others.
    assert all(path.stat().st_mode & 0o244 == 0o244 for path in tmp_path.iterdir())
    theirs, report = transformers.WhisperModel.from_pretrained(tmp_path, output_loading_info=True)
    lost = [k for k in report["missing_keys"] if has_source or k.startswith("encoder.")]
    assert not lost and not report["unexpected_keys"] and not report["mismatched_keys"]
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(tmp_path)
    audio = noise(WINDOW)
    mel = extractor(audio.numpy(), sampling_rate=RATE, return_tensors="pt").input_features
    with torch.no_grad():
        features = encoder.encode(audio[None], torch.tensor([WINDOW]))[0]
        assert_close(theirs.eval().encoder(mel).last_hidden_state, features)
    again = WhisperEncoder.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[k], v) for k, v in encoder.state_dict().items())
    if has_source:
        mine, its = theirs.decoder.state_dict(), original.decoder.state_dict()
        assert all(torch.equal(mine[k], its[k]) for k in its)


# ---------------------------------------------------------------- runs and command line

@pytest.fixture
def run(model, whisper, qwen, tmp_path):
    """A training run's folder made by hand; the newest checkpoint is step 2."""
    out = tmp_path / "run"
    settings = dict(encoder=str(whisper[0]), decoder=str(qwen[0]), stack=4, silence=0.5,
                    tasks={"drum": 326, "voice": 567}, hours=0.44, lr_encoder=4e-5)
    model.silence = settings["silence"]
    for step in (1, 2):
        folder = out / f"checkpoints/step-{step:08d}"
        (folder / "adapter").mkdir(parents=True)
        with torch.no_grad():
            model.encoder.layers[0].fc1.weight.mul_(1.2)
        model.encoder.save(folder / "encoder")
        save_file(model.adapter.state_dict(), folder / "adapter/model.safetensors")
    (out / "checkpoints/.writing-00000003").mkdir()  # cut short while it was written
    (out / "config.json").write_text(json.dumps(settings))
    return out


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["uniwhisper.py", *map(str, words)])
    uniwhisper.main()


def test_load_run_takes_the_newest_whole_checkpoint(run, model):
    assert newest_checkpoint(run).name == "step-00000002"
    loaded = load_run(run)
    assert not loaded.training
    batch = batch_of(model)
    assert torch.equal(loaded(batch), model(batch))
    shutil.rmtree(run / "checkpoints")
    assert newest_checkpoint(run) is None
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        load_run(run)


def test_load_run_refuses_an_adapter_of_another_stack(run):
    edit_config(stack=2)(run)
    with pytest.raises(ValueError,
                       match=r"adapter: weights do not fit: .*size mismatch for fc1.weight"):
        load_run(run)


@pytest.mark.parametrize("text", ["{", "{}"])
def test_a_damaged_run_is_one_line(run, text, monkeypatch, tmp_path):
    (run / "config.json").write_text(text)
    with pytest.raises(SystemExit) as e:
        command(monkeypatch, "export", "--run", run, tmp_path / "x")
    assert_one_line(e, f"error: {run / 'config.json'} ")


def test_encode_writes_the_features_of_each_clip(whisper, tmp_path, monkeypatch, capsys):
    a = write_clip(tmp_path / "a.wav", tone(1.0))
    b = write_clip(tmp_path / "b.flac", np.stack((tone(0.3, rate=44_100),) * 2, 1), 44_100)
    command(monkeypatch, "encode", a, b, "--encoder", whisper[0],
            "--out", tmp_path / "f.safetensors")
    features = load_file(tmp_path / "f.safetensors")
    assert {k: tuple(v.shape) for k, v in features.items()} == {str(a): (50, 48), str(b): (15, 48)}
    assert capsys.readouterr().out.splitlines() == [f"{a}: (50, 48)", f"{b}: (15, 48)"]
    with torch.no_grad():
        expected = load_encoder(whisper[0]).encode(tone(1.0))[0][0]
    assert_close(features[str(a)], expected, 1e-3)  # 16 bits in the file


def test_features_that_cannot_be_written_are_one_line(whisper, tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "a.wav")
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as e:
        command(monkeypatch, "encode", clip, "--encoder", whisper[0],
                "--out", tmp_path / "file/f.safetensors")
    assert_one_line(e, "error: ")


def test_encode_takes_manifests_pools_and_names_what_it_skips(whisper, tmp_path, monkeypatch):
    a = write_clip(tmp_path / "a.wav", tone(1.0))
    write_clip(tmp_path / "b.wav", tone(0.5, 700))
    rows = [dict(audio="b.wav"), dict(audio="gone.wav", seconds=1.0)]
    manifest = write_manifest(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "new/f.safetensors"
    with pytest.raises(SystemExit) as e:
        command(monkeypatch, "encode", a, manifest, "--encoder", whisper[0], "--out", out, "--pool")
    assert_one_line(e, "error: skipped: ", "gone.wav")
    features, encoder = load_file(out), load_encoder(whisper[0])
    assert features.keys() == {str(a), "b.wav"}
    assert_close(features["b.wav"], encoder.pooled(tone(0.5, 700))[0].detach(), 1e-3)


def test_encode_refuses_two_clips_of_one_name(whisper, tmp_path, monkeypatch):
    manifests = []
    for folder in ("one", "two"):
        write_clip(tmp_path / folder / "a.wav", tone(0.2))
        manifests.append(write_manifest(tmp_path / folder / "rows.jsonl", [dict(audio="a.wav")]))
    same = write_manifest(tmp_path / "one/again.jsonl", [dict(audio="a.wav")])
    out = tmp_path / "f.safetensors"
    command(monkeypatch, "encode", manifests[0], same, "--encoder", whisper[0], "--out", out)
    assert load_file(out).keys() == {"a.wav"}
    monkeypatch.chdir(tmp_path / "one")  # the file and its row
    command(monkeypatch, "encode", "a.wav", "rows.jsonl", "--encoder", whisper[0], "--out", out)
    assert load_file(out).keys() == {"a.wav"}
    with pytest.raises(SystemExit) as e:
        command(monkeypatch, "encode", *manifests, "--encoder", whisper[0], "--out", out)
    assert_one_line(e, f"error: {manifests[1]}: a.wav is also another clip's name")


def test_encode_refuses_a_folder_without_audio(whisper, tmp_path, monkeypatch):
    write_clip(tmp_path / "a.wav", tone(0.2))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as e:
        command(monkeypatch, "encode", tmp_path / "a.wav", tmp_path / "empty", "--encoder",
                whisper[0], "--out", tmp_path / "f.safetensors")
    assert_one_line(e, f"error: {tmp_path}/empty: holds no audio")


@pytest.mark.parametrize("words", [
    "encode {run} --encoder {whisper} --out {run}/../{whisper.name}/model.safetensors",
    "export --run {run} {run}", "export --run {run} {whisper}",
    "export --run {run} {run}/checkpoints/step-00000002/encoder",
])
def test_a_command_does_not_overwrite_what_it_reads(run, tmp_path, monkeypatch, words):
    whisper = tmp_path / "whisper"
    shutil.copytree(json.loads((run / "config.json").read_text())["encoder"], whisper)
    edit_config(encoder=str(whisper))(run)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    with pytest.raises(SystemExit) as e:
        command(monkeypatch, *words.format(whisper=whisper, run=run).split())
    assert_one_line(e, "error: ", "write to another place")
    after = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    assert before == after


def test_ask_prints_the_answer(run, tmp_path, monkeypatch, capsys):
    clip = write_clip(tmp_path / "a.wav", noise(RATE).numpy(), subtype="FLOAT")
    command(monkeypatch, "ask", clip, "Who speaks?", "--run", run, "--max-new-tokens", 7)
    assert capsys.readouterr().out == load_run(run).generate(
        noise(RATE)[None], torch.tensor([RATE]), ["Who speaks?"], 7)[0] + "\n"


@pytest.mark.parametrize("blend", [None, 0.5, 0])
def test_export_writes_the_newest_encoder_or_a_blend(run, whisper, tmp_path, monkeypatch, blend):
    words = [] if blend is None else ["--blend", blend]
    command(monkeypatch, "export", "--run", run, tmp_path / "out", *words)
    theirs = transformers.WhisperModel.from_pretrained(tmp_path / "out")
    start = whisper[1].encoder.layers[0].fc1.weight
    share = 1 if blend is None else blend
    assert torch.allclose(theirs.encoder.layers[0].fc1.weight,
                          start * (1 + share * (1.2**2 - 1)), atol=1e-6)
    assert torch.equal(theirs.decoder.layers[0].fc1.weight, whisper[1].decoder.layers[0].fc1.weight)


def test_export_writes_a_model_card(run, tmp_path, monkeypatch):
    command(monkeypatch, "export", "--run", run, tmp_path / "a", "--blend", 0.5)
    card = (tmp_path / "a/README.md").read_text()
    front, _, text = card.removeprefix("---\n").partition("---\n")
    assert "pipeline_tag: feature-extraction" in front
    for part in ("0.4 hours of audio; 2 updates", "'drum': 326", "every 20 ms",
                 "stack 4, silence 0.5, lr_encoder 4e-05, steps 2, blend 0.5"):
        assert part in text
