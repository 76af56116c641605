"""uniwhisper.py against transformers on the same weights; masks, loss, generation, folders, command line."""
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
from conftest import RATE, VOCABULARY, assert_one_line, make_qwen, make_tokenizer, noise, tone, write_clip
from uniwhisper import (AnswerLoss, ChatTokenizer, QwenDecoder, UniWhisper, WhisperEncoder, attend, encoder_lengths,
                        load_run, log_mel_spectrogram, newest_checkpoint, save_encoder)

WINDOW = 30 * RATE
transformers = pytest.importorskip("transformers")


def assert_close(ours, theirs, share=1e-4):
    """Within `share` of the reference's largest value."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= share * theirs.abs().max()


def batch_of(model, samples=(24_000, 9_000, 40_001)):
    """Clips of noise with questions and answers, as data.py would make it."""
    questions = ["Which language is spoken?", "Which instrument is playing in this clip?", "Who?"]
    answers = ["Greek", "a dog barks, then the rain", "x"]
    audio = torch.zeros(len(samples), max(samples))
    for i, n in enumerate(samples):
        audio[i, :n] = noise(n, seed=i)
    return SimpleNamespace(audio=audio, samples=torch.tensor(samples), questions=questions,
                           prompts=[model.tokenizer.prompt(q) for q in questions],
                           answers=[model.tokenizer.answer(a) for a in answers])


# ---------------------------------------------------------------- log-mel

CLIPS = {
    "noise": lambda: noise(WINDOW, level=0.2),
    "quiet": lambda: noise(WINDOW, level=1e-4),
    "loud": lambda: noise(WINDOW, level=5.0),
    "tone": lambda: torch.from_numpy(tone(30, 997.0)),
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
    audio[0, -1] = 1.0  # a click on the last sample: the loudest frames are the ones that straddle the end
    alone = log_mel_spectrogram(audio)
    for zeros in (1, 170, 4_000, WINDOW - samples):
        padded = log_mel_spectrogram(F.pad(audio, (0, min(zeros, WINDOW - samples))))
        assert (padded[:, :, : alone.shape[2]] - alone).abs().max() < 1e-5


def test_mel_of_a_quiet_clip_ignores_its_loud_neighbour():
    quiet, loud = noise(16_000, level=1e-4), noise(16_000, seed=1)
    both = log_mel_spectrogram(torch.stack((quiet, loud)))
    assert (both[0] - log_mel_spectrogram(quiet[None])[0]).abs().max() < 1e-6


# ---------------------------------------------------------------- encoder

@pytest.mark.parametrize("samples, tokens", [(0, 1), (1, 1), (160, 1), (320, 1), (479, 1), (480, 2), (640, 2),
                                             (WINDOW, 1500), (WINDOW + 480, 1502)])
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
        hidden = theirs.encoder(mel, output_hidden_states=True)
        assert_close(encoder(mel), hidden.last_hidden_state)
        assert_close(encoder.encode(audio, torch.tensor([WINDOW, WINDOW]))[0], hidden.last_hidden_state)
        for layer in range(2):
            assert_close(encoder(mel, layer=layer), hidden.hidden_states[layer])


def test_short_clip_equals_a_transformers_encoder_of_that_length(whisper):
    folder, full = whisper
    config = transformers.WhisperConfig(**full.config.to_dict() | {"max_source_positions": 41})
    theirs = transformers.models.whisper.modeling_whisper.WhisperEncoder(config).eval()
    weights = full.encoder.state_dict()
    weights["embed_positions.weight"] = weights["embed_positions.weight"][:41]
    theirs.load_state_dict(weights)
    audio = noise(41 * 320)[None]
    with torch.no_grad():
        ours = WhisperEncoder.from_pretrained(folder).encode(audio, torch.tensor([41 * 320]))[0]
        assert_close(ours, theirs(log_mel_spectrogram(audio)).last_hidden_state)


def test_features_of_a_clip_do_not_depend_on_its_batch(whisper):
    encoder = WhisperEncoder.from_pretrained(whisper[0]).eval()
    lengths = [16_000, 1, 8_161, 53_000, 79_999]
    clips = [noise(n, seed=n, level=10.0 ** -(i % 3)) for i, n in enumerate(lengths)]
    for clip in clips:
        clip[-1] = 1.0
    audio = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    with torch.no_grad():
        features, tokens = encoder.encode(audio, torch.tensor(lengths))
        assert tokens.tolist() == [encoder_lengths(n) for n in lengths]
        for i, clip in enumerate(clips):
            alone, t = encoder.encode(clip[None], torch.tensor([len(clip)]))
            assert_close(features[i, : t[0]], alone[0], 1e-5)
            assert not features[i, t[0]:].any()  # padding is zero


def test_padded_tokens_are_masked_and_zero(whisper):
    encoder = WhisperEncoder.from_pretrained(whisper[0]).eval()
    mel = log_mel_spectrogram(noise(16_000)[None]).repeat(2, 1, 1)
    mel[1, :, 60:] = 7.0  # beyond 30 tokens: must not be seen
    with torch.no_grad():
        seen = encoder(mel)
        masked = encoder(mel, torch.tensor([30, 30]))
    assert not torch.allclose(seen[0, :30], seen[1, :30])
    assert torch.equal(masked[0], masked[1]) and not masked[:, 30:].any() and masked[:, :30].all()


def test_clips_over_30_s_go_through_in_windows(whisper):
    encoder = WhisperEncoder.from_pretrained(whisper[0]).eval()
    lengths = [2 * WINDOW + 5_000, 12_000, WINDOW]
    audio = torch.zeros(3, lengths[0])
    for i, n in enumerate(lengths):
        audio[i, :n] = noise(n, seed=i)
    with torch.no_grad():
        features, tokens = encoder.encode(audio, torch.tensor(lengths))
        assert tokens.tolist() == [encoder_lengths(n) for n in lengths] and features.shape[1] == tokens[0]
        for i, n in enumerate(lengths):
            parts = audio[i, :n].split(WINDOW)
            alone = torch.cat([encoder.encode(p[None], torch.tensor([len(p)]))[0][0] for p in parts])
            assert_close(features[i, : tokens[i]], alone, 1e-5)
            assert not features[i, tokens[i]:].any()


def test_too_many_frames_or_layers_are_refused(whisper):
    encoder = WhisperEncoder.from_pretrained(whisper[0])
    with pytest.raises(ValueError, match="3002 frames; at most 3000"):
        encoder(torch.zeros(1, 80, 3002))
    with pytest.raises(ValueError, match="layer is 3; this encoder has layers 0 to 2"):
        encoder(torch.zeros(1, 80, 10), layer=3)


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
        hidden = decoder(decoder.embed(ids))
        assert_close(hidden, reference.hidden_states[-1])
        assert_close(decoder.lm_head(hidden), reference.logits)


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
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0, "rope_scaling": None}))
    assert_decoder_equals(tmp_path, theirs)


def test_right_padding_changes_no_row_and_comes_out_as_zeros(qwen):
    decoder = QwenDecoder.from_pretrained(qwen[0])
    embeds, lengths = torch.randn(3, 20, 56), torch.tensor([20, 1, 13])
    hidden = decoder(embeds, lengths)
    for row, n in enumerate(lengths):
        assert_close(hidden[row, :n], decoder(embeds[row : row + 1, :n])[0], 1e-5)
        assert not hidden[row, n:].any()


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_prompts_given_as_ids_change_neither_what_follows_nor_its_gradient(kind, tmp_path):
    make_qwen(tmp_path, kind)
    decoder = QwenDecoder.from_pretrained(tmp_path)
    ids = torch.randint(VOCABULARY, (4, 20), generator=torch.Generator().manual_seed(0))
    starts, lengths, weight = [5, 1, 9, 5], torch.tensor([20, 3, 13, 9]), torch.randn(4, 20, 56)
    prompts = [row[:n] for row, n in zip(ids.tolist(), starts)]
    embeds = decoder.embed(ids).requires_grad_()
    ours, only = decoder(embeds, lengths, prompts), torch.tensor([19, 22, 6])
    assert_close(decoder(embeds, lengths, prompts, only), ours.flatten(0, 1)[only], 1e-5)
    own = (torch.arange(20) >= torch.tensor(starts)[:, None])[..., None]
    theirs = decoder(embeds, lengths) * own
    assert_close(ours, theirs, 1e-5)
    gradients = [torch.autograd.grad((h * weight).sum(), embeds)[0] * own for h in (ours, theirs)]
    assert_close(*gradients, 1e-5)


def test_a_prompt_of_several_rows_is_computed_once(qwen, monkeypatch):
    decoder, computed = QwenDecoder.from_pretrained(qwen[0]), []
    embed = decoder.embed
    monkeypatch.setattr(decoder, "embed", lambda ids: computed.append(ids.tolist()) or embed(ids))
    past = decoder.past([[5, 6, 7], [5, 6], [5, 6, 7]], 8)
    assert computed == [[[5, 6, 7], [5, 6, 0]]] and len(past) == len(decoder.layers)
    assert all(t.shape[:2] == (3, 8) and t[0].equal(t[2]) and not t.requires_grad for pair in past for t in pair)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_greedy_generation_equals_transformers_and_that_without_cache(kind, tmp_path):
    theirs = make_qwen(tmp_path, kind)
    decoder = QwenDecoder.from_pretrained(tmp_path)
    torch.manual_seed(0)
    prompts = torch.randint(VOCABULARY, (30,)).split([3, 17, 9, 1])
    embeds = decoder.embed(torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True))
    embeds[0, 3:] = 100.0  # padding must not be seen
    lengths = torch.tensor([len(p) for p in prompts])
    how = dict(max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)
    free = [theirs.generate(p[None], **how)[0, len(p):].tolist() for p in prompts]
    assert decoder.generate(embeds, lengths, 12, {VOCABULARY}) == free
    stop = {free[0][5], free[1][2]}  # tokens that do come: generation ends before them
    until = [row[: next((i for i, t in enumerate(row) if t in stop), None)] for row in free]
    assert decoder.generate(embeds, lengths, 12, stop) == until
    for prompt, row in zip(prompts, free):
        ids = prompt.tolist()
        for _ in range(12):
            ids.append(int(decoder.lm_head(decoder(decoder.embed(torch.tensor([ids])))[0, -1]).argmax()))
        assert ids[len(prompt):] == row


def test_generation_of_no_tokens_is_empty(qwen):
    decoder = QwenDecoder.from_pretrained(qwen[0])
    assert decoder.generate(torch.randn(2, 5, 56), torch.tensor([5, 2]), 0, {2}) == [[], []]


def test_decoder_computes_in_its_own_dtype_under_autocast(whisper, qwen):
    torch.manual_seed(0)
    exact = UniWhisper.from_folders(whisper[0], qwen[0])
    half = UniWhisper.from_folders(whisper[0], qwen[0], dtype=torch.bfloat16)
    half.adapter.load_state_dict(exact.adapter.state_dict())
    assert {p.dtype for p in half.decoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.encoder.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert half.decoder(torch.randn(1, 4, 56)).dtype == torch.bfloat16
        loss, _ = half(batch_of(half))
    assert loss.dtype == torch.float32 and abs(loss / exact(batch_of(exact))[0] - 1) < 0.03


# ---------------------------------------------------------------- prompt and loss

def test_chat_is_laid_out_as_designed(model):
    t = model.tokenizer
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
    """Each row by itself, its embeddings joined by hand: prompt, audio, tail, answer -> (1, L, D)."""
    embed = lambda ids: theirs.get_input_embeddings()(torch.tensor([ids], dtype=torch.long))
    for audio, samples, prompt, answer in zip(batch.audio, batch.samples, batch.prompts, batch.answers):
        spoken = model.adapter(model.encoder.encode(audio[None, :samples], samples[None])[0])
        yield torch.cat((embed(prompt), spoken, embed(model.tokenizer.tail), embed(answer)), 1)


def straightforward_losses(model, theirs, batch):
    """transformers' loss of each row by itself: labels are -100 but for the answer."""
    for embeds, answer in zip(chats(model, theirs, batch), batch.answers):
        labels = torch.full(embeds.shape[:2], -100)
        labels[0, -len(answer):] = torch.tensor(answer)
        yield theirs(inputs_embeds=embeds, labels=labels).loss * len(answer)


def test_loss_is_transformers_loss_on_the_answer_tokens(model, qwen):
    batch = batch_of(model)
    loss, tokens = model(batch)
    expected = torch.stack(list(straightforward_losses(model, qwen[1], batch)))
    assert tokens == sum(map(len, batch.answers))
    assert_close(loss, expected.sum(), 1e-5)
    losses, tokens = model(batch, per_row=True)
    assert_close(losses, expected, 1e-5)
    assert tokens.tolist() == [len(a) for a in batch.answers]


def test_loss_of_many_answer_tokens_is_the_same_in_pieces(model, monkeypatch):
    batch = batch_of(model)
    loss = model(batch)[0]
    gradient = torch.autograd.grad(loss, model.adapter.fc2.weight)[0]
    monkeypatch.setattr(AnswerLoss, "LOGITS_AT_ONCE", 5)
    pieces = model(batch)[0]
    assert_close(pieces, loss, 1e-6)
    assert_close(torch.autograd.grad(pieces, model.adapter.fc2.weight)[0], gradient, 1e-5)


def test_loss_and_its_gradient_are_cross_entropys():
    hidden, weight = torch.randn(7, 6, requires_grad=True), torch.randn(11, 6)
    labels, scale = torch.randint(11, (7,)), torch.rand(7)  # every row's gradient is scaled by its own number
    ours, theirs = (AnswerLoss.apply(hidden, weight, labels),
                    F.cross_entropy(hidden @ weight.T, labels, reduction="none"))
    assert_close(ours, theirs, 1e-6)
    slopes = [torch.autograd.grad((x * scale).sum(), hidden)[0] for x in (ours, theirs)]
    assert_close(*slopes, 1e-5)
    with torch.no_grad():
        assert_close(AnswerLoss.apply(hidden, weight, labels), theirs, 1e-6)


def test_fp16_keeps_the_gradient_of_a_token_that_is_all_but_learned():
    weight, labels = torch.tensor([[0.05, 0.0], [-0.05, 0.02]]).half(), torch.tensor([0])
    slopes = []
    for dtype, loss_of in ((torch.float16, AnswerLoss.apply),
                           (torch.float64, lambda h, w, y: F.cross_entropy(h @ w.T, y))):
        hidden = torch.tensor([[125.0, 3.0]], dtype=dtype, requires_grad=True)  # 1 - p = 4e-6
        slopes.append(torch.autograd.grad(loss_of(hidden, weight.to(dtype), labels).sum() * 2.0**16,  # a loss scale
                                          hidden)[0])
    assert_close(slopes[0].double(), slopes[1], 0.02)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_in_half_precision_is_the_fused_kernels(causal):
    q, k, v, slope = (torch.randn(3, 2, 40, 16) for _ in range(4))
    q = (8 * q).bfloat16().float()  # large scores: in half precision they would be off by far more than the rest
    k = k.bfloat16().float()
    mask = None if causal else (torch.arange(40) < torch.tensor([40, 7, 23])[:, None])[:, None, None]
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        attention = attend if dtype == torch.bfloat16 else F.scaled_dot_product_attention
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = attention(*inputs, attn_mask=mask, is_causal=causal)
        results.append([y, *torch.autograd.grad(y, inputs, slope.to(dtype))])
    for ours, exact in zip(*results):
        assert_close(ours.double(), exact, 0.01)


def test_head_sees_exactly_the_positions_that_predict_the_answers(model, qwen, monkeypatch):
    seen, batch = [], batch_of(model)
    monkeypatch.setattr(AnswerLoss, "apply", lambda *three: seen.extend(three) or three[0].sum(1))
    model(batch)
    hidden, weight, labels = seen
    assert weight is model.decoder.lm_head.weight
    assert labels.tolist() == sum(batch.answers, [])
    expected = []
    for embeds, answer in zip(chats(model, qwen[1], batch), batch.answers):
        last = qwen[1](inputs_embeds=embeds, output_hidden_states=True).hidden_states[-1][0]
        expected.append(last[-len(answer) - 1 : -1])  # from the prompt's last token to the answer's last word
    assert_close(hidden, torch.cat(expected))


def test_decoder_is_frozen_and_gradients_pass_through_it(model):
    model.train()
    assert not any(m.training for m in model.decoder.modules())
    assert model.encoder.training and model.adapter.training
    model(batch_of(model))[0].backward()
    assert all(p.grad is None and not p.requires_grad for p in model.decoder.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.adapter.parameters())
    for name, p in model.encoder.named_parameters():
        if name == "embed_positions.weight":
            assert p.grad is None  # the sinusoids do not train
        elif name != "conv1.bias":
            assert p.grad.abs().sum() > 0, name


def test_recomputed_activations_change_no_gradient(model):
    batch = batch_of(model)
    model(batch)[0].backward()
    kept = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.encoder.checkpoint_layers = model.decoder.checkpoint_layers = True
    model(batch)[0].backward()
    assert all(torch.equal(p.grad, kept[n]) for n, p in model.named_parameters() if p.grad is not None)


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
        model(batch)[0].backward()
    assert shapes.with_vocabulary() == {(answers, VOCABULARY)}
    with Shapes() as shapes:  # the watch does see such a tensor
        model.decoder.lm_head(model.decoder(torch.randn(3, 50, 56)))
    assert (3, 50, VOCABULARY) in shapes.with_vocabulary()


def test_joint_generation_equals_transformers_and_does_not_depend_on_the_batch(model, qwen):
    batch = batch_of(model)
    texts = model.generate(batch.audio, batch.questions, 10, batch.samples)
    alone = zip(batch.audio, batch.samples, batch.questions)
    assert [model.generate(audio[None, :n], [question], 10)[0] for audio, n, question in alone] == texts
    batch.answers = [[], [], []]
    how = dict(max_new_tokens=10, do_sample=False, eos_token_id=sorted(model.tokenizer.stop), pad_token_id=0)
    theirs = [qwen[1].generate(inputs_embeds=embeds, **how)[0] for embeds in chats(model, qwen[1], batch)]
    assert [model.tokenizer.decode(ids.tolist()) for ids in theirs] == texts


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
    says = "missing conv1.bias; unexpected novel.weight; shape of conv2.bias is (7,), config.json says (48,)"
    assert_one_line(e, str(tmp_path), says)


def edit_config(**changes):
    def spoil(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return spoil


def remove_key(key):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        del config[key]
        (folder / "config.json").write_text(json.dumps(config))
    return spoil


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(pattern):
    return lambda folder: sorted(folder.glob(pattern))[0].unlink()


def tokenizer_of(*chat_tokens):
    return lambda folder: make_tokenizer(folder, chat_tokens)


def cut_weights(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-100])


BAD_FOLDERS = {  # what is done to a good folder, and what the one line must name
    "no config": (remove("config.json"), "config.json is missing"),
    "config is not JSON": (write("config.json", "{"), "config.json is not JSON"),
    "config is a list": (write("config.json", "[]"), "config.json"),
    "another architecture": (edit_config(model_type="llama"), "model_type is 'llama'"),
    "config lacks a size": (remove_key("hidden_size"), "config.json lacks hidden_size"),
    "yarn positions": (edit_config(rope_parameters={"rope_type": "yarn"}), "rope type is 'yarn'"),
    "yarn, older place": (edit_config(rope_parameters=None, rope_scaling={"type": "yarn"}), "type is 'yarn'"),
    "sliding window": (edit_config(use_sliding_window=True), "use_sliding_window"),
    "other width": (edit_config(hidden_size=60), "shape of embed_tokens.weight is (521, 56)"),
    "a size is text": (edit_config(hidden_size="56"), "hidden_size is '56'; need whole numbers above 0"),
    "a size is null": (edit_config(num_key_value_heads=None),
                       "num_key_value_heads is None; need whole numbers above 0"),
    "rope is text": (edit_config(rope_parameters="x"), "rope settings are 'x'; need an object"),
    "index is a list": (write("model.safetensors.index.json", '{"weight_map": []}'), "weight_map is no object"),
    "missing shard": (remove("model-00002*"), "model-00002"),
    "index is not JSON": (write("model.safetensors.index.json", "{"), "model.safetensors.index.json"),
    "no weights": (remove("*.index.json"), "model.safetensors"),
    "damaged weights": (cut_weights, "is damaged"),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer.json is missing"),
    "damaged tokenizer": (write("tokenizer.json", "{"), "tokenizer.json"),
    "no chat tokens": (tokenizer_of(), "lacks the chat tokens <|im_start|>, <|im_end|>"),
    "too many tokens": (tokenizer_of("<|im_start|>", "<|im_end|>", *map(str, range(300))), "vocabulary of 521"),
}


@pytest.fixture(scope="module")
def sharded_qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    make_qwen(folder, shard_size="60KB")
    return folder


@pytest.mark.parametrize("fault", BAD_FOLDERS)
def test_bad_decoder_folder_gives_one_clear_line(fault, whisper, sharded_qwen, tmp_path):
    shutil.copytree(sharded_qwen, tmp_path, dirs_exist_ok=True)
    UniWhisper.from_folders(whisper[0], tmp_path)  # good as it is
    spoil, says = BAD_FOLDERS[fault]
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        UniWhisper.from_folders(whisper[0], tmp_path)
    assert_one_line(e, str(tmp_path), says)


def test_a_qwen_folder_is_refused_as_an_encoder(qwen):
    with pytest.raises(ValueError, match="model_type is 'qwen2'; need one of whisper"):
        WhisperEncoder.from_pretrained(qwen[0])


@pytest.mark.parametrize("kind, has_source", [("whisper", False), ("whisper", True), ("whisper128", True)])
def test_saved_encoder_loads_in_transformers_with_equal_features(kind, has_source, request, tmp_path):
    folder, original = request.getfixturevalue(kind)
    encoder = WhisperEncoder.from_pretrained(folder).eval()
    encoder.config["dtype"] = "float16"  # so transformers 5 saves half precision
    with torch.no_grad():
        for p in encoder.layers.parameters():
            p.mul_(1.1)  # as if trained
    for path in folder.glob("*.json"):
        path.chmod(0o444)  # as a download cache may have it
    save_encoder(encoder, tmp_path, folder if has_source else None)
    assert all(path.stat().st_mode & 0o200 for path in tmp_path.iterdir())  # to be written again
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
    settings = {"encoder": str(whisper[0]), "decoder": str(qwen[0]), "stack": 4}
    for step in (1, 2):
        folder = out / f"checkpoints/step-{step:08d}"
        (folder / "adapter").mkdir(parents=True)
        with torch.no_grad():
            model.encoder.layers[0].fc1.weight.mul_(1.2)
        save_encoder(model.encoder, folder / "encoder")
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
    assert torch.equal(loaded(batch)[0], model(batch)[0])
    shutil.rmtree(run / "checkpoints")
    assert newest_checkpoint(run) is None
    with pytest.raises(FileNotFoundError, match="no config.json with a finished checkpoint"):
        load_run(run)


def test_load_run_refuses_an_adapter_of_another_stack(run):
    edit_config(stack=2)(run)
    with pytest.raises(ValueError, match=r"adapter: weights do not fit: shape of fc1.weight"):
        load_run(run)


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_damaged_run_is_one_line(run, text, monkeypatch, tmp_path):
    (run / "config.json").write_text(text)
    clip = write_clip(tmp_path / "a.wav")
    for words in (["ask", clip, "Who?", "--run", run], ["export", "--run", run, tmp_path / "x"]):
        with pytest.raises(SystemExit) as e:
            command(monkeypatch, *words)
        assert_one_line(e, f"error: {run / 'config.json'} ")


def test_encode_writes_the_features_of_each_clip(whisper, tmp_path, monkeypatch, capsys):
    a = write_clip(tmp_path / "a.wav", tone(1.0))
    b = write_clip(tmp_path / "b.flac", np.stack((tone(0.3, rate=44_100),) * 2, 1), 44_100)
    command(monkeypatch, "encode", a, b, a, "--encoder", whisper[0], "--out", tmp_path / "f.safetensors")
    features = load_file(tmp_path / "f.safetensors")
    assert {k: tuple(v.shape) for k, v in features.items()} == {str(a): (50, 48), str(b): (15, 48)}
    assert capsys.readouterr().out.splitlines() == [f"{a}: (50, 48)", f"{b}: (15, 48)"]
    audio = torch.from_numpy(tone(1.0))
    expected = WhisperEncoder.from_pretrained(whisper[0]).encode(audio[None], torch.tensor([RATE]))[0][0]
    assert_close(features[str(a)], expected.detach(), 1e-3)  # 16 bits in the file


def test_features_that_cannot_be_written_are_one_line(whisper, tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "a.wav")
    with pytest.raises(SystemExit) as e:
        command(monkeypatch, "encode", clip, "--encoder", whisper[0], "--out", tmp_path / "gone/f.safetensors")
    assert_one_line(e, "error: ")


def test_ask_prints_the_answer(run, tmp_path, monkeypatch, capsys):
    clip = write_clip(tmp_path / "a.wav", noise(RATE).numpy(), subtype="FLOAT")
    command(monkeypatch, "ask", clip, "Who speaks?", "--run", run, "--max-new-tokens", 7)
    assert capsys.readouterr().out == load_run(run).generate(noise(RATE)[None], ["Who speaks?"], 7)[0] + "\n"


@pytest.mark.parametrize("blend", [None, 0.5, 0])
def test_export_writes_the_newest_encoder_or_a_blend(run, whisper, tmp_path, monkeypatch, blend):
    words = [] if blend is None else ["--blend", blend]
    command(monkeypatch, "export", "--run", run, tmp_path / "out", *words)
    theirs = transformers.WhisperModel.from_pretrained(tmp_path / "out")
    start = whisper[1].encoder.layers[0].fc1.weight
    share = 1 if blend is None else blend
    assert torch.allclose(theirs.encoder.layers[0].fc1.weight, start * (1 + share * (1.2**2 - 1)), atol=1e-6)
    assert torch.equal(theirs.decoder.layers[0].fc1.weight, whisper[1].decoder.layers[0].fc1.weight)


def test_command_line_tells_what_is_wrong_in_one_line(whisper, tmp_path):
    script = Path(uniwhisper.__file__)
    (tmp_path / "a.wav").write_text("no sound")
    words = ["encode", tmp_path / "a.wav", "--encoder", whisper[0], "--out", tmp_path / "f.safetensors"]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / "f.safetensors").exists()
    assert done.stderr.startswith("error: ") and "a.wav: not readable as audio" in done.stderr
    assert done.stderr.count("\n") == 1
