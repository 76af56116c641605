"""uniwhisper.py against transformers on the same weights; masks, loss, generation, folders,
command line."""
import ast
import json
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import uniwhisper
from ablations.clap import clap_mel
from conftest import (RATE, VOCABULARY, assert_one_line, joint_model, make_qwen, make_tokenizer,
                      noise, tone, write_clip, write_manifest)
from data import read_audio
from uniwhisper import (ChatTokenizer, QwenDecoder, WhisperEncoder, encoder_lengths, load_decoder,
                        load_encoder, load_run, log_mel_spectrogram, newest_checkpoint, token_mask)

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
                           prompts=[model.decoder.tokenizer.prompt(q) for q in questions],
                           answers=[model.decoder.tokenizer.answer(a) for a in answers])


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
        hidden = theirs.encoder(mel, output_hidden_states=True)
        assert_close(encoder(mel), hidden.last_hidden_state)
        assert_close(encoder.encode(audio, torch.tensor([WINDOW, WINDOW]))[0],
                     hidden.last_hidden_state)
        for layer in (2, 1, 0):
            encoder.keep_layers(layer)
            expected = hidden.last_hidden_state if layer == 2 else hidden.hidden_states[layer]
            assert_close(encoder(mel), expected)


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


def test_padded_tokens_are_masked(whisper):
    encoder = WhisperEncoder.from_pretrained(whisper[0]).eval()
    mel = log_mel_spectrogram(noise(16_000)[None]).repeat(2, 1, 1)
    mel[1, :, 60:] = 7.0  # beyond 30 tokens: must not be seen
    with torch.no_grad():
        seen = encoder(mel)
        masked = encoder(mel, torch.tensor([30, 30]))
    assert not torch.allclose(seen[0, :30], seen[1, :30])
    assert torch.equal(masked[0, :30], masked[1, :30])


def test_clips_over_30_s_go_through_in_windows(whisper):
    encoder = WhisperEncoder.from_pretrained(whisper[0]).eval()
    lengths = [2 * WINDOW + 5_000, 12_000, WINDOW]
    audio = torch.zeros(3, lengths[0])
    for i, n in enumerate(lengths):
        audio[i, :n] = noise(n, seed=i)
    with torch.no_grad():
        features, tokens = encoder.encode(audio, torch.tensor(lengths))
        assert (tokens.tolist() == [encoder_lengths(n) for n in lengths]
                and features.shape[1] == tokens[0])
        for i, n in enumerate(lengths):
            parts = audio[i, :n].split(WINDOW)
            alone = torch.cat([encoder.encode(p[None], torch.tensor([len(p)]))[0][0]
                               for p in parts])
            assert_close(features[i, : tokens[i]], alone, 1e-5)
            assert not features[i, tokens[i]:].any()


def test_padded_to_the_window_a_clip_sees_silence_and_gives_its_own_tokens(whisper):
    folder, theirs = whisper
    encoder, audio = WhisperEncoder.from_pretrained(folder).eval(), noise(33_000)[None]
    batch = torch.cat((audio, F.pad(noise(9_000, seed=1), (0, 24_000))[None]))
    with torch.no_grad():
        whole = theirs.encoder(
            log_mel_spectrogram(F.pad(audio, (0, WINDOW - 33_000)))).last_hidden_state
        features, lengths = encoder.encode(batch, torch.tensor([33_000, 9_000]), pad_to_window=True)
        assert lengths.tolist() == [103, 28] and features.shape[1] == 103
        assert_close(features[0], whole[0, :103])
        assert not features[1, 28:].any() and features[1, :28].all()
        assert (features[0] - encoder.encode(audio, torch.tensor([33_000]))[0]).abs().max() > 0.1


def test_an_encoder_with_fewer_positions_has_shorter_windows(whisper, tmp_path):
    shutil.copytree(whisper[0], tmp_path, dirs_exist_ok=True)
    edit_config(max_source_positions=500)(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(k for k in tensors if k.endswith("encoder.embed_positions.weight"))
    tensors[name] = tensors[name][:500].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    encoder, audio = load_encoder(tmp_path).eval(), noise(12 * RATE)[None]
    with torch.no_grad():
        features, lengths = encoder.encode(audio, torch.tensor([12 * RATE]))
        parts = [encoder.encode(p, torch.tensor([p.shape[1]]))[0]
                 for p in audio.split(10 * RATE, 1)]
    assert lengths.tolist() == [600]
    assert_close(features, torch.cat(parts, 1), 1e-5)


def test_clips_or_a_clip_of_any_float_type_are_encoded(whisper):
    encoder, audio = load_encoder(whisper[0]).eval(), noise(RATE)[None]
    with torch.no_grad():
        expected, lengths = encoder.encode(audio, torch.tensor([RATE]))
        for same in (audio, audio[0], audio.double()):
            features, tokens = encoder.encode(same)
            assert torch.equal(features, expected) and tokens.equal(lengths)
        half = encoder.encode(audio.half(), torch.tensor([RATE]))[0]
        assert (half.dtype == torch.float32
                and torch.equal(half, encoder.encode(audio.half().float())[0]))
    for bad, says in (((audio * 32767).short(), r"torch.int16 of shape \(1, 16000\)"),
                      (audio[None], r"audio is torch.float32 of shape \(1, 1, 16000\)")):
        with pytest.raises(ValueError, match=says + r"; need floats from -1 to 1, \(B, S\) or"):
            encoder.encode(bad)


def test_pooled_features_are_the_mean_over_real_tokens(whisper):
    encoder, samples = load_encoder(whisper[0]).eval(), torch.tensor([9_000, 33_000])
    audio = torch.stack((F.pad(noise(9_000), (0, 24_000)), noise(33_000)))
    real = token_mask(encoder_lengths(samples))
    assert real.shape == (2, 103) and real.sum(1).tolist() == [28, 103] and real[0, :28].all()
    assert token_mask(torch.tensor([1, 0]), 2).tolist() == [[True, False], [False, False]]
    with torch.no_grad():
        for padded in (False, True):
            features, _ = encoder.encode(audio, samples, padded)
            pooled = encoder.pooled(audio, samples, padded)
            for clip in range(2):
                assert_close(pooled[clip], features[clip, real[clip]].mean(0), 1e-6)
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


def test_too_many_layers_are_refused(whisper):
    encoder = WhisperEncoder.from_pretrained(whisper[0])
    with pytest.raises(ValueError, match="layer is 3; this encoder has layers 0 to 2"):
        encoder.keep_layers(3)


@pytest.mark.parametrize("file", ["data.py", "train.py", "probe.py"])
def test_only_the_encoder_knows_whispers_name_and_numbers(file):
    """Rates, hops, windows and seconds a token are an encoder's attributes."""
    allowed = "TEXT_TOKEN_COST = 0.08", "FRAME_SECONDS = 0.02"
    numbers = {16_000, 480_000, 160, 320, 1500, 3000, 0.02, 0.08}
    with open(Path(uniwhisper.__file__).with_name(file)) as f:
        for token in tokenize.generate_tokens(f.readline):
            if token.type == tokenize.NUMBER and not token.line.startswith(allowed):
                assert ast.literal_eval(token.string) not in numbers, token.line
            if token.type == tokenize.NAME:
                named = re.search("(?i)(?<!uni)whisper|clap", token.string)
                assert not named and token.string not in (
                    "SAMPLE_RATE", "TOKEN", "HOP", "CHUNK"), token.line


# ---------------------------------------------------------------- CLAP's encoder

CLAP_RATE = 48_000
CLAP_CLIPS = {
    "noise": lambda: noise(10 * CLAP_RATE, level=0.2),
    "quiet": lambda: noise(10 * CLAP_RATE, level=1e-4),
    "tone": lambda: torch.from_numpy(tone(10, 997.0, CLAP_RATE)),
    "click at the end": lambda: F.one_hot(torch.tensor(10 * CLAP_RATE - 1), 10 * CLAP_RATE).float(),
}


def clap_input(folder, *clips):
    """The mels (B, 1, 1001, 64) that transformers makes of clips."""
    extractor = transformers.ClapFeatureExtractor.from_pretrained(folder)
    made = extractor([clip.numpy() for clip in clips], sampling_rate=CLAP_RATE, return_tensors="pt")
    return made.input_features


@pytest.mark.parametrize("clip", CLAP_CLIPS)
def test_claps_mel_equals_transformers(clap, clip):
    audio = CLAP_CLIPS[clip]()
    ours, theirs = clap_mel(audio[None]), clap_input(clap[0], audio)
    far = (ours - theirs).abs()  # dB, of 100; theirs is computed in float64
    assert ours.shape == (1, 1, 1001, 64) and far.max() < 0.05 and far.mean() < 1e-3


def test_claps_features_equal_transformers(clap, tmp_path):
    """Of 10 s, and of a clip that is repeated; from a whole CLAP and from one of audio alone."""
    folder, theirs = clap
    theirs.audio_model.save_pretrained(tmp_path)
    clips = noise(10 * CLAP_RATE), noise(100_000, seed=1)
    with torch.no_grad():
        made = theirs.audio_model(clap_input(folder, *clips))
        grid = made.last_hidden_state  # (B, D, 2 bins, 32 steps)
        for source in (folder, tmp_path):
            encoder = load_encoder(source)
            audio = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
            features, lengths = encoder.encode(audio, torch.tensor([480_000, 100_000]))
            assert lengths.tolist() == [32, 7] and encoder.width == 64
            assert encoder.token_seconds == 0.3125 and encoder.sample_rate == CLAP_RATE
            assert_close(features[0], grid[0].mean(1).T)
            assert_close(features[1, :7], grid[1].mean(1).T[:7])
            assert not features[1, 7:].any()
            assert_close(encoder.pooled(clips[0])[0], made.pooler_output[0])


@pytest.mark.parametrize("stages", range(5))
def test_claps_features_after_a_stage_equal_transformers(clap, stages):
    encoder, theirs = load_encoder(clap[0]), clap[1].audio_model
    encoder.keep_layers(stages)
    audio = noise(10 * CLAP_RATE)
    with torch.no_grad():
        features, lengths = encoder.encode(audio)
        grid = theirs(clap_input(clap[0], audio), output_hidden_states=True).hidden_states[stages]
    bins, steps = grid.shape[2] // 4, 4 * grid.shape[3]
    expected = grid.unflatten(2, (4, bins)).mean(3).flatten(2).transpose(1, 2)  # (1, T, D)
    if stages == 4:
        expected = theirs.audio_encoder.norm(grid.flatten(2).transpose(1, 2)).detach()
        expected = expected.unflatten(1, (4, 2, 8)).mean(2).flatten(1, 2)
    assert lengths.tolist() == [steps] == [10 / encoder.token_seconds]
    assert features.shape[2] == encoder.width
    assert_close(features, expected)


def test_claps_features_of_a_clip_do_not_depend_on_its_batch_or_mode(clap):
    encoder = load_encoder(clap[0])
    lengths = [12 * CLAP_RATE, 1, 30_011, 10 * CLAP_RATE + 7_000]
    clips = [noise(n, seed=n, level=10.0 ** -i) for i, n in enumerate(lengths)]
    audio = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    encoder.train()
    assert not any(m.training for m in encoder.modules())
    with torch.no_grad():
        features, tokens = encoder.encode(audio, torch.tensor(lengths))
        assert tokens.tolist() == [38, 1, 2, 32]
        for i, clip in enumerate(clips):
            windows = clip.split(480_000)[: 2 if tokens[i] > 32 else 1]
            alone = torch.cat([encoder.encode(window)[0][0] for window in windows])
            assert_close(features[i, : tokens[i]], alone, 1e-5)
            assert not features[i, tokens[i]:].any()
        silent, _ = encoder.encode(clips[2], pad_to_window=True)
        padded, _ = encoder.encode(F.pad(clips[2], (0, 480_000 - len(clips[2]))))
        assert_close(silent[0], padded[0, :2], 1e-5)
        assert (silent[0] - features[2, :2]).abs().max() > 0.01


def test_claps_activations_can_be_recomputed(clap):
    encoder, gradients = load_encoder(clap[0]), []
    for recompute in (False, True):
        encoder.zero_grad()
        encoder.checkpoint_layers = recompute
        encoder.encode(noise(60_000))[0].square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in encoder.parameters()]))
    assert gradients[0].any() and torch.equal(*gradients)


def test_saved_clap_loads_in_transformers_with_its_text_side(clap, tmp_path):
    folder, theirs = clap
    encoder = load_encoder(folder)
    with torch.no_grad():
        for p in encoder.layers.parameters():
            p.mul_(1.1)
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    encoder.save(checkpoint)
    alone = transformers.ClapAudioModel.from_pretrained(checkpoint)
    load_encoder(checkpoint).save(out, folder)
    whole = transformers.ClapModel.from_pretrained(out)
    ids, mel = torch.arange(7)[None], clap_input(out, noise(480_000))
    with torch.no_grad():
        features = encoder.encode(noise(480_000))[0][0]
        for model in (alone, whole.audio_model):
            assert_close(model(mel).last_hidden_state[0].mean(1).T, features)
        text = whole.get_text_features(ids).pooler_output
        assert torch.equal(text, theirs.get_text_features(ids).pooler_output)
    assert torch.equal(whole.audio_projection.linear1.weight,
                       theirs.audio_projection.linear1.weight)


def edit_audio_config(**changes):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        config["audio_config"] |= changes
        (folder / "config.json").write_text(json.dumps(config))
    return spoil


CLAP_FAULTS = {
    "fused": (edit_audio_config(enable_fusion=True),
              "config.json: enable_fusion is True; need False"),
    "mels": (edit_audio_config(num_mel_bins=80), "config.json: num_mel_bins is 80; need 64"),
    "weights": (edit_audio_config(depths=[1, 1, 1, 1]), "weights do not fit: "),
    "sound": (lambda folder: (folder / "preprocessor_config.json").write_text(
                  '{"truncation": "fusion"}'),
              "preprocessor_config.json: truncation is 'fusion'; need 'rand_trunc'"),
    "processor": (lambda folder: (folder / "processor_config.json").write_text(
                      '{"feature_extractor": {"hop_length": 320}}'),
                  "processor_config.json: hop_length is 320; need 480"),
}


@pytest.mark.parametrize("fault", CLAP_FAULTS)
def test_a_clap_folder_that_is_not_computed_gives_one_clear_line(clap, tmp_path, fault):
    spoil, says = CLAP_FAULTS[fault]
    shutil.copytree(clap[0], tmp_path, dirs_exist_ok=True)
    spoil(tmp_path)
    with pytest.raises(ValueError) as e:
        load_encoder(tmp_path)
    assert_one_line(e, str(tmp_path), says)


def test_too_many_layers_of_clap_are_refused(clap):
    with pytest.raises(ValueError, match="layer is 5; this encoder has layers 0 to 4"):
        load_encoder(clap[0]).keep_layers(5)


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


def test_right_padding_changes_no_row(qwen):
    decoder = QwenDecoder.from_pretrained(qwen[0])
    embeds, lengths = torch.randn(3, 20, 56), torch.tensor([20, 1, 13])
    hidden = decoder(embeds)
    for row, n in enumerate(lengths):
        assert_close(hidden[row, :n], decoder(embeds[row : row + 1, :n])[0], 1e-5)


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
def test_greedy_generation_equals_transformers_and_that_without_cache(kind, tmp_path):
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
    for start, row in zip(embeds, free):
        ids = []
        for _ in range(12):
            new = decoder.embed_tokens(torch.tensor([ids], dtype=torch.long))
            ids.append(int(decoder.unembed(decoder(torch.cat((start, new), 1))[0, -1]).argmax()))
        assert ids == row


def test_generation_of_no_tokens_is_empty(qwen):
    decoder = QwenDecoder.from_pretrained(qwen[0])
    assert decoder.generate(
        torch.randn(2, 5, 56), torch.tensor([5, 2]), [[1], [2, 3]], 0) == [[], []]


def test_decoder_computes_in_its_own_dtype_under_autocast(whisper, qwen):
    torch.manual_seed(0)
    exact = joint_model(whisper[0], qwen[0])
    half = joint_model(whisper[0], qwen[0], dtype=torch.bfloat16)
    half.adapter.load_state_dict(exact.adapter.state_dict())
    assert {p.dtype for p in half.decoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.encoder.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert half.decoder(torch.randn(1, 4, 56)).dtype == torch.bfloat16
        losses = half(batch_of(half))
    assert (losses.dtype == torch.float32
            and abs(losses.sum() / exact(batch_of(exact)).sum() - 1) < 0.03)


# ---------------------------------------------------------------- Whisper's decoder

KINDS = ["talking_whisper", "english_whisper"]


def whole_whisper(kind, request):
    """Ours and theirs, and three clips' features: (B, A, D), lengths."""
    folder, theirs = request.getfixturevalue(kind)
    audio = torch.randn(3, 9, 48, generator=torch.Generator().manual_seed(0))
    return load_decoder(folder), theirs, audio, torch.tensor([9, 2, 5])


def their_logits(theirs, audio, length, ids):
    heard = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=audio[None, :length])
    return theirs(encoder_outputs=heard, decoder_input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("kind", KINDS)
def test_whispers_decoder_equals_transformers(kind, request):
    decoder, theirs, audio, lengths = whole_whisper(kind, request)
    ids = torch.randint(51864, (3, 50), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        states = decoder.answer_states(audio, lengths, [row[:1] for row in ids],
                                       [row[1:] + [0] for row in ids])
        logits = decoder.unembed(states).split(50)
        for ours, row, clip, length in zip(logits, ids, audio, lengths):
            assert_close(ours, their_logits(theirs, clip, length, row))


@pytest.mark.parametrize("kind", KINDS)
def test_whispers_greedy_answers_equal_transformers(kind, request):
    decoder, theirs, audio, lengths = whole_whisper(kind, request)
    prompts = [[5, 6], [7, 8, 9, 10], [11]]
    audio[1, 2:] = 100.0  # padding must not be heard
    decoder.tokenizer.stop = {-1}
    free = decoder.generate(audio, lengths, prompts, 12)
    for prompt, ours, clip, length in zip(prompts, free, audio, lengths):
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(their_logits(theirs, clip, length, ids)[-1].argmax()))
        assert ids == prompt + ours
    decoder.tokenizer.stop = {free[0][5], free[1][2]}
    until = [row[: next((i for i, t in enumerate(row) if t in decoder.tokenizer.stop), None)]
             for row in free]
    assert decoder.generate(audio, lengths, prompts, 12) == until
    assert decoder.generate(audio, lengths, prompts, 0) == [[], [], []]


def test_whispers_states_of_a_clip_depend_on_nothing_beside_it(talking_whisper):
    decoder = load_decoder(talking_whisper[0])
    audio, lengths = torch.randn(3, 9, 48), torch.tensor([9, 2, 5])
    prompts, answers = [[5, 6], [7, 8, 9, 10], [11]], [[20, 21, 22], [23], [24, 25]]
    together = decoder.answer_states(audio, lengths, prompts, answers)
    audio[1, 2:] = audio[2, 5:] = 100.0
    assert_close(decoder.answer_states(audio, lengths, prompts, answers), together, 1e-6)
    for i, states in enumerate(together.split([3, 1, 2])):
        n = lengths[i : i + 1]
        alone = decoder.answer_states(audio[i : i + 1, :n], n, prompts[i : i + 1],
                                      answers[i : i + 1])
        assert_close(states, alone, 1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_pass_through_whispers_frozen_decoder(talking_whisper, recompute):
    decoder = load_decoder(talking_whisper[0])
    decoder.checkpoint_layers = recompute
    audio, lengths = torch.randn(2, 6, 48, requires_grad=True), torch.tensor([6, 3])
    states = decoder.answer_states(audio, lengths, [[5, 6], [7]], [[20, 21], [22]])
    decoder.unembed(states).square().sum().backward()
    assert audio.grad[0].all() and audio.grad[1, :3].all() and not audio.grad[1, 3:].any()
    assert all(p.grad is None and not p.requires_grad for p in decoder.parameters())


@pytest.mark.parametrize("kind", ["talking_whisper", "qwen"])
def test_a_decoder_computes_in_its_own_dtype_until_it_trains(kind, request):
    exact = load_decoder(folder := request.getfixturevalue(kind)[0])
    audio, lengths = 0.1 * torch.randn(1, 6, exact.width), torch.tensor([6])
    for dtype, trains, expected in ((torch.float32, False, torch.float32),
                                    (torch.bfloat16, False, torch.bfloat16),
                                    (torch.float32, True, torch.bfloat16)):
        decoder = load_decoder(folder, dtype).requires_grad_(trains)
        assert {p.dtype for p in decoder.parameters()} == {dtype}
        with torch.autocast("cpu", torch.bfloat16):
            states = decoder.answer_states(audio, lengths, [[5, 6]], [[20, 21, 22]])
            assert decoder.unembed(states).dtype == expected
            decoder.generate(audio, lengths, [[5, 6]], 3)
        assert_close(states.float(),
                     exact.answer_states(audio, lengths, [[5, 6]], [[20, 21, 22]]), 0.05)


def test_whispers_prompts_and_answers(talking_whisper, english_whisper):
    t, english = (load_decoder(folder).tokenizer
                  for folder, _ in (talking_whisper, english_whisper))
    spell = lambda ids: t.tokenizer.decode(ids, skip_special_tokens=False)
    assert spell(english.start) == "<|startoftranscript|><|notimestamps|>"
    assert spell(t.prompt("Who speaks?")) == (
        "<|startofprev|> Who speaks?<|startoftranscript|><|en|><|transcribe|><|notimestamps|>")
    assert spell(t.answer("a dog")) == " a dog<|endoftext|>"
    assert t.decode([*t.start, *t.answer("Grüße, 你好"), 51000]) == "Grüße, 你好"
    assert spell(t.ids("<|nl|>")) == "<|nl|>" and len(t.ids("<|nl|>")) > 1  # spelt as plain text


def test_too_many_tokens_for_whispers_positions_are_one_line(talking_whisper):
    decoder, audio, lengths = (load_decoder(talking_whisper[0]), torch.randn(1, 2, 48),
                               torch.tensor([2]))
    decoder.answer_states(audio, lengths, [[5] * 400], [[6] * 49])
    decoder.generate(audio, lengths, [[5] * 446], 2)
    with pytest.raises(ValueError) as e:
        decoder.answer_states(audio, lengths, [[5] * 400], [[6] * 50])
    assert_one_line(e, "prompt and answer have 449 tokens; Whisper's decoder takes 448")


def test_joint_model_with_whispers_decoder(talking_whisper):
    torch.manual_seed(0)
    model = joint_model(talking_whisper[0], talking_whisper[0], stack=2)
    batch = batch_of(model)
    assert model(batch).isfinite().all() and len(model(batch)) == sum(map(len, batch.answers))
    features = model.adapter(model.encoder.encode(batch.audio, batch.samples)[0])
    assert 0.5 < features.square().mean().sqrt() < 2  # as what Whisper's encoder gives
    assert len(model.generate(batch.audio, batch.samples, ["Who?"] * 3, 4)) == 3


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
        spoken = model.adapter(model.encoder.encode(audio[None, :samples], samples[None])[0])
        yield torch.cat((embed(prompt), spoken, embed(model.decoder.tokenizer.tail),
                         embed(answer)), 1)


def straightforward_losses(model, theirs, batch):
    """transformers' loss of each row by itself: labels are -100 but for the answer."""
    for embeds, answer in zip(chats(model, theirs, batch), batch.answers):
        labels = torch.full(embeds.shape[:2], -100)
        labels[0, -len(answer):] = torch.tensor(answer)
        yield theirs(inputs_embeds=embeds, labels=labels).loss * len(answer)


def test_loss_is_transformers_loss_on_the_answer_tokens(model, qwen):
    batch = batch_of(model)
    losses = model(batch)
    counts = [len(answer) for answer in batch.answers]
    assert losses.shape == (sum(counts),) and losses.dtype == torch.float32
    ours = torch.stack([part.sum() for part in losses.split(counts)])
    assert_close(ours, torch.stack(list(straightforward_losses(model, qwen[1], batch))), 1e-5)


def test_loss_of_many_answer_tokens_is_the_same_in_pieces(model, monkeypatch):
    batch = batch_of(model)
    losses = model(batch)
    gradient = torch.autograd.grad(losses.sum(), model.adapter.fc2.weight)[0]
    monkeypatch.setattr(uniwhisper, "LOGITS_AT_ONCE", 5)
    pieces = model(batch)
    assert_close(pieces, losses, 1e-6)
    assert_close(torch.autograd.grad(pieces.sum(), model.adapter.fc2.weight)[0], gradient, 1e-5)


def test_fp16_keeps_the_gradient_of_a_token_that_is_all_but_learned(model):
    weight, labels = torch.tensor([[0.05, 0.0], [-0.05, 0.02]]).half(), torch.tensor([0])
    slopes = []
    for dtype in (torch.float16, torch.float64):
        model.decoder.unembed = lambda states: states @ weight.to(dtype).T
        hidden = torch.tensor([[125.0, 3.0]], dtype=dtype, requires_grad=True)  # 1 - p = 4e-6
        loss = model.answer_losses(hidden, labels) * 2.0**16  # a loss scale
        slopes.append(torch.autograd.grad(loss.sum(), hidden)[0])
    assert_close(slopes[0].double(), slopes[1].double(), 0.02)


def test_head_sees_exactly_the_positions_that_predict_the_answers(model, qwen, monkeypatch):
    seen, batch = [], batch_of(model)
    monkeypatch.setattr(model, "answer_losses", lambda *two: seen.extend(two))
    model(batch)
    states, labels = seen
    assert labels.tolist() == sum(batch.answers, [])
    expected = []
    for embeds, answer in zip(chats(model, qwen[1], batch), batch.answers):
        last = qwen[1](inputs_embeds=embeds, output_hidden_states=True).hidden_states[-1][0]
        # from the prompt's last token to the answer's last word
        expected.append(last[-len(answer) - 1 : -1])
    assert_close(states, torch.cat(expected))


def test_decoder_is_frozen_and_gradients_pass_through_it(model):
    model.train()
    assert not any(m.training for m in model.decoder.modules())
    assert model.encoder.training and model.adapter.training
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
    "config is not JSON": (write("config.json", "{"), "config.json is damaged ("),
    "config is a list": (write("config.json", "[]"), "config.json"),
    "another architecture": (edit_config(model_type="llama"), "model_type is 'llama'"),
    "config lacks a size": (remove_key("hidden_size"), "config.json: hidden_size is 'missing'"),
    "yarn positions": (edit_config(rope_parameters={"rope_type": "yarn"}), "rope_type is 'yarn'"),
    "yarn, older place": (edit_config(rope_parameters=None, rope_scaling={"type": "yarn"}),
                          "type is 'yarn'"),
    "sliding window": (edit_config(use_sliding_window=True), "use_sliding_window"),
    "other width": (edit_config(hidden_size=60), "size mismatch for embed_tokens.weight"),
    "a size is text": (edit_config(hidden_size="56"),
                       "hidden_size is '56'; need a whole number above 0"),
    "a size is null": (edit_config(num_key_value_heads=None),
                       "num_key_value_heads is None; need a whole number above 0"),
    "missing shard": (remove("model-00002*"), "model-00002"),
    "index is not JSON": (write("model.safetensors.index.json", "{"),
                          "model.safetensors.index.json"),
    "no weights": (remove("*.index.json"), "model.safetensors"),
    "damaged weights": (cut_weights, "is damaged"),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer.json is missing"),
    "damaged tokenizer": (write("tokenizer.json", "{"), "tokenizer.json"),
    "no chat tokens": (tokenizer_of(), "lacks the token <|im_start|>"),
}


BAD_WHISPERS = {
    "lacks a token": (tokenizer_of("<|translate|>"), "lacks the token <|startofprev|>"),
    "scaled embeddings": (edit_config(scale_embedding=True), "scale_embedding is True"),
    "another activation": (edit_config(activation_function="relu"),
                           "activation_function is 'relu'"),
    "no decoder's size": (remove_key("decoder_layers"), "decoder_layers is 'missing'"),
    "fewer layers": (edit_config(decoder_layers=1), 'Unexpected key(s) in state_dict: "layers.1.'),
}


@pytest.mark.parametrize("fault", BAD_WHISPERS)
def test_a_bad_whisper_folder_as_decoder_gives_one_clear_line(fault, talking_whisper, tmp_path):
    shutil.copytree(talking_whisper[0], tmp_path, dirs_exist_ok=True)
    spoil, says = BAD_WHISPERS[fault]
    spoil(tmp_path)
    with pytest.raises(ValueError) as e:
        load_decoder(tmp_path)
    assert_one_line(e, str(tmp_path), says)


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


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model-00001*"])
def test_a_git_lfs_pointer_is_named(sharded_qwen, tmp_path, name):
    shutil.copytree(sharded_qwen, tmp_path, dirs_exist_ok=True)
    next(tmp_path.glob(name)).write_text(LFS)
    with pytest.raises(ValueError) as e:
        load_decoder(tmp_path)
    assert_one_line(e, str(tmp_path), "run `git lfs pull`")


def test_weights_with_a_foreign_prefix_show_the_names_that_are_there(whisper, qwen, tmp_path):
    for folder, load in ((whisper[0], load_encoder), (qwen[0], load_decoder)):
        shutil.copytree(folder, tmp_path / load.__name__)
        tensors = load_file(Path(folder) / "model.safetensors")
        save_file({"_orig_mod." + k: v for k, v in tensors.items()},
                  tmp_path / load.__name__ / "model.safetensors")
        with pytest.raises(ValueError) as e:
            load(tmp_path / load.__name__)
        assert_one_line(e, str(tmp_path), "_orig_mod.")


def test_a_runs_folder_or_a_hubs_name_in_place_of_a_checkpoint(whisper, tmp_path):
    shutil.copytree(whisper[0], tmp_path / "encoder")
    (tmp_path / "config.json").write_text('{"steps": 3}')
    with pytest.raises(ValueError) as e:
        load_encoder(tmp_path)
    assert_one_line(e, str(tmp_path), "of a training run: OUT/encoder")
    with pytest.raises(FileNotFoundError) as e:
        load_decoder("Qwen/Qwen2.5-0.5B-Instruct")
    assert_one_line(e, "Qwen/Qwen2.5-0.5B-Instruct/config.json is missing", "not a hub's name")


def test_a_saved_folder_can_be_read_by_others(whisper, tmp_path):
    load_encoder(whisper[0]).save(tmp_path, whisper[0])
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in tmp_path.iterdir())


def test_a_qwen_folder_is_refused_as_an_encoder(qwen):
    with pytest.raises(ValueError, match="model_type is 'qwen2'; need one of whisper"):
        WhisperEncoder.from_pretrained(qwen[0])


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
    command(monkeypatch, "encode", a, b, a, "--encoder", whisper[0],
            "--out", tmp_path / "f.safetensors")
    features = load_file(tmp_path / "f.safetensors")
    assert {k: tuple(v.shape) for k, v in features.items()} == {str(a): (50, 48), str(b): (15, 48)}
    assert capsys.readouterr().out.splitlines() == [f"{a}: (50, 48)", f"{b}: (15, 48)"]
    audio = torch.from_numpy(tone(1.0))
    expected = WhisperEncoder.from_pretrained(whisper[0]).encode(
        audio[None], torch.tensor([RATE]))[0][0]
    assert_close(features[str(a)], expected.detach(), 1e-3)  # 16 bits in the file


def test_encode_takes_clap(clap, tmp_path, monkeypatch):
    a = write_clip(tmp_path / "a.wav", tone(1.0))  # at 16 kHz
    for more, shape in (([], (3, 64)), (["--pool"], (64,))):
        command(monkeypatch, "encode", a, "--encoder", clap[0],
                "--out", tmp_path / "f.safetensors", *more)
        features = load_file(tmp_path / "f.safetensors")[str(a)]
        assert features.shape == shape
        expected = load_encoder(clap[0]).encode(read_audio(a, CLAP_RATE))[0][0].detach()
        assert_close(features, expected.mean(0) if more else expected, 1e-5)


def test_features_that_cannot_be_written_are_one_line(whisper, tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "a.wav")
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as e:
        command(monkeypatch, "encode", clip, "--encoder", whisper[0],
                "--out", tmp_path / "file/f.safetensors")
    assert_one_line(e, "error: ")


def test_encode_takes_manifests_pools_and_names_what_it_skips(whisper, tmp_path, monkeypatch):
    a, b = write_clip(tmp_path / "a.wav", tone(1.0)), write_clip(tmp_path / "b.wav", tone(0.5, 700))
    rows = [dict(audio="b.wav"), dict(audio="gone.wav", seconds=1.0)]
    manifest = write_manifest(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "new/f.safetensors"
    with pytest.raises(SystemExit) as e:
        command(monkeypatch, "encode", a, manifest, "--encoder", whisper[0], "--out", out, "--pool")
    assert_one_line(e, "error: skipped: ", "gone.wav")
    features, encoder = load_file(out), load_encoder(whisper[0])
    assert features.keys() == {str(a), "b.wav"}
    audio = torch.from_numpy(tone(0.5, 700))
    expected = encoder.encode(audio[None], torch.tensor([len(audio)]))[0][0].mean(0)
    assert_close(features["b.wav"], expected.detach(), 1e-3)


def test_encode_refuses_two_clips_of_one_name(whisper, tmp_path, monkeypatch):
    manifests = []
    for folder in ("one", "two"):
        write_clip(tmp_path / folder / "a.wav", tone(0.2))
        manifests.append(write_manifest(tmp_path / folder / "rows.jsonl", [dict(audio="a.wav")]))
    same = write_manifest(tmp_path / "one/again.jsonl", [dict(audio="a.wav")])
    out = tmp_path / "f.safetensors"
    command(monkeypatch, "encode", manifests[0], same, "--encoder", whisper[0], "--out", out)
    assert load_file(out).keys() == {"a.wav"}
    with pytest.raises(SystemExit) as e:
        command(monkeypatch, "encode", *manifests, "--encoder", whisper[0], "--out", out)
    assert_one_line(e, f"error: {manifests[1]}: a.wav is also a clip of {tmp_path}/one")


@pytest.mark.parametrize("words", [
    "encode {clip} --encoder {whisper} --out {clip}",
    "encode {clip} --encoder {whisper} --out {whisper}/model.safetensors",
    "encode {clip} --encoder {whisper} --out {folder}/../{folder.name}/a.wav",
    "export --run {run} {run}", "export --run {run} {whisper}",
    "export --run {run} {run}/checkpoints/step-00000002/encoder",
])
def test_a_command_does_not_overwrite_what_it_reads(run, whisper, tmp_path, monkeypatch, words):
    clip = write_clip(tmp_path / "a.wav")
    before = {p: p.read_bytes() for p in [*tmp_path.rglob("*"), *whisper[0].rglob("*")]
              if p.is_file()}
    with pytest.raises(SystemExit) as e:
        command(monkeypatch, *words.format(clip=clip, whisper=whisper[0], run=run,
                                           folder=tmp_path).split())
    assert_one_line(e, "error: ", "write to another place")
    assert before == {p: p.read_bytes() for p in [*tmp_path.rglob("*"), *whisper[0].rglob("*")]
                      if p.is_file()}


def test_ask_prints_the_answer(run, tmp_path, monkeypatch, capsys):
    clip = write_clip(tmp_path / "a.wav", noise(RATE).numpy(), subtype="FLOAT")
    command(monkeypatch, "ask", clip, "Who speaks?", "--run", run, "--max-new-tokens", 7)
    assert capsys.readouterr().out == load_run(run).generate(
        noise(RATE)[None], torch.tensor([RATE]), ["Who speaks?"], 7)[0] + "\n"


@pytest.mark.parametrize("blend", [1, 0.5])
@pytest.mark.parametrize("kind, stack",
                         [("talking_whisper", 0), ("talking_whisper", 4), ("qwen", 4)])
def test_export_of_a_trained_decoder(kind, stack, blend, run, talking_whisper, request, tmp_path,
                                     monkeypatch):
    decoder, out = load_decoder(source := request.getfixturevalue(kind)[0]), tmp_path / "out"
    with torch.no_grad():
        decoder.layers[0].self_attn.q_proj.weight.mul_(3.0)
    decoder.save(newest_checkpoint(run) / "decoder", source)
    edit_config(encoder=str(talking_whisper[0]), decoder=str(source), stack=stack)(run)
    command(monkeypatch, "export", "--run", run, out, "--blend", blend)
    start, weight = load_decoder(source), lambda d: d.layers[0].self_attn.q_proj.weight
    assert torch.allclose(weight(load_decoder(out / "decoder")), weight(start) * (1 + 2 * blend))
    whole = stack == 0 and kind == "talking_whisper"
    expected = decoder if whole else load_decoder(talking_whisper[0])
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(out).model
    share = 1 + 2 * blend if whole else 1
    assert torch.allclose(weight(theirs.decoder), share * weight(load_decoder(talking_whisper[0])))
    assert torch.equal(theirs.decoder.embed_tokens.weight, expected.embed_tokens.weight)
    assert load_encoder(out).width == 48


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
    edit_config(tasks={"drum": 326, "voice": 567}, hours=0.44, lr_encoder=4e-5)(run)
    command(monkeypatch, "export", "--run", run, tmp_path / "a", "--blend", 0.5)
    card = (tmp_path / "a/README.md").read_text()
    front, _, text = card.removeprefix("---\n").partition("---\n")
    assert "pipeline_tag: feature-extraction" in front
    for part in ("0.4 hours of audio; 2 updates", "'drum': 326", "every 20 ms",
                 "stack 4, lr_encoder 4e-05, steps 2, blend 0.5"):
        assert part in text


def test_command_line_tells_what_is_wrong_in_one_line(whisper, tmp_path):
    script = Path(uniwhisper.__file__)
    (tmp_path / "a.wav").write_text("no sound")
    words = ["encode", tmp_path / "a.wav", "--encoder", whisper[0],
             "--out", tmp_path / "f.safetensors"]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / "f.safetensors").exists()
    assert (done.stderr.startswith("error: skipped: ")
            and "a.wav: not readable as audio" in done.stderr)
    assert done.stderr.count("\n") == 1
