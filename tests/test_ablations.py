"""tests/ablations: each class against transformers, and as a script that runs the project's."""
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ablations.clap import clap_mel
from conftest import (HERE, Run, assert_close, assert_one_line, make_tokenizer, noise,
                      start_ranks, succeed, write_clip, write_manifest)
from uniwhisper import load_decoder, load_encoder, newest_checkpoint

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("forks")
CLAP, WHISPER = HERE / "ablations/clap.py", HERE / "ablations/whisper_decoder.py"
TEN_SECONDS = 480_000  # samples at CLAP's 48 kHz


@pytest.fixture
def data(tmp_path):
    rows = []
    for i, split in enumerate(["train"] * 4 + ["valid", "test"] * 2):
        write_clip(tmp_path / f"{i}.wav", noise(8_000, seed=i).numpy())
        rows.append(dict(audio=f"{i}.wav", task="level", instruction="How loud?", split=split,
                         answer="soft" if i % 3 else "loud", label="soft" if i % 3 else "loud"))
    return write_manifest(tmp_path / "rows.jsonl", rows)


def train_and_resume(script, ranks, data, out, *flags) -> None:
    """Train, then forget the last update and make it anew: the bits must be the same."""
    start = lambda argv: start_ranks(*[argv] * ranks, script=(script, "train.py"))
    argv = ["--data", data, "--out", out, "--steps", 3, "--save-every", 2, "--batch-seconds", 4,
            "--lr-encoder", 1e-3, "--warmup", 0, "--workers", 1, "--threads", 1, "--device", "cpu",
            "--precision", "fp32", "--questions", 1, *flags]
    succeed(*start(argv))
    before = {path: path.read_bytes() for path in out.rglob("model.safetensors")}
    for folder in (newest_checkpoint(out), out / "encoder", out / "decoder"):
        shutil.rmtree(folder, ignore_errors=True)
    assert "from step 2 to 3" in succeed(*start(["--resume", "--out", out])).out
    assert before == {path: path.read_bytes() for path in out.rglob("model.safetensors")}


# ---------------------------------------------------------------- CLAP's encoder

def clap_input(folder, *clips):
    """The mels (B, 1, 1001, 64) that transformers makes of clips."""
    extractor = transformers.ClapFeatureExtractor.from_pretrained(folder)
    made = extractor([clip.numpy() for clip in clips], sampling_rate=48_000, return_tensors="pt")
    return made.input_features


def test_claps_mel_equals_transformers(clap):
    click = F.one_hot(torch.tensor(TEN_SECONDS - 1), TEN_SECONDS).float()
    for audio in (noise(TEN_SECONDS, level=1e-4), click):
        ours, theirs = clap_mel(audio[None]), clap_input(clap[0], audio)
        far = (ours - theirs).abs()  # dB, of 100; theirs is computed in float64
        assert ours.shape == (1, 1, 1001, 64) and far.max() < 0.05 and far.mean() < 1e-3


@pytest.mark.parametrize("whole", [True, False])
def test_claps_features_equal_transformers(clap, tmp_path, whole):
    """Of 10 s, and of a clip that is repeated; of a whole CLAP, and of its encoder alone."""
    folder, model = clap
    if not whole:
        model.audio_model.save_pretrained(folder := tmp_path)
    clips = noise(TEN_SECONDS), noise(100_000, seed=1)
    audio = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    encoder = load_encoder(folder)
    with torch.no_grad():
        theirs = model.audio_model(clap_input(clap[0], *clips))
        features, lengths = encoder.encode(audio, torch.tensor([TEN_SECONDS, 100_000]))
        assert lengths.tolist() == [32, 7] and encoder.token_seconds == 0.3125
        for clip, grid in enumerate(theirs.last_hidden_state):  # (D, 2 bins, 32 steps)
            assert_close(features[clip, : lengths[clip]], grid.mean(1).T[: lengths[clip]])
        assert_close(encoder.pooled(clips[0])[0], theirs.pooler_output[0])


def test_claps_features_of_a_clip_do_not_depend_on_its_batch_or_mode(clap):
    encoder = load_encoder(clap[0]).train()
    assert not any(m.training for m in encoder.modules())
    lengths = [12 * 48_000, 1, 30_011, TEN_SECONDS + 7_000]
    clips = [noise(n, seed=n, level=10.0 ** -i) for i, n in enumerate(lengths)]
    audio = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    with torch.no_grad():
        features, tokens = encoder.encode(audio, torch.tensor(lengths))
        assert tokens.tolist() == [38, 1, 2, 32]
        for i, clip in enumerate(clips):
            windows = clip.split(TEN_SECONDS)[: 2 if tokens[i] > 32 else 1]
            alone = torch.cat([encoder.encode(window)[0][0] for window in windows])
            assert_close(features[i, : tokens[i]], alone, 1e-5)
            assert not features[i, tokens[i]:].any()


@pytest.mark.parametrize("file, content, says", [
    ("config.json", '{"model_type": "clap", "enable_fusion": true}', "enable_fusion is True; need"),
    ("preprocessor_config.json", '{"truncation": "fusion"}', "truncation is 'fusion'; need 'rand"),
])
def test_a_clap_folder_that_is_not_computed_gives_one_line(clap, tmp_path, file, content, says):
    shutil.copytree(clap[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError) as e:
        load_encoder(tmp_path)
    assert_one_line(e, f"{tmp_path}/{file}: {says}")


def test_clap_trains_resumes_is_exported_and_probed(clap, qwen, data, tmp_path):
    out, half = tmp_path / "out", tmp_path / "half"
    train_and_resume(CLAP, 1, data, out, "--encoder", clap[0], "--decoder", qwen[0],
                     "--stack", 1, "--checkpoint-layers")
    succeed(Run(["--run", out, half, "--blend", 0.5], script=(CLAP, "uniwhisper.py", "export")))
    theirs, report = transformers.ClapModel.from_pretrained(half, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    start, trained = (load_encoder(folder).state_dict() for folder in (clap[0], out / "encoder"))
    for name, p in theirs.audio_model.state_dict().items():
        if "norm.running" in name or not p.is_floating_point():  # BatchNorm takes no statistics
            assert torch.equal(trained[name], start[name]), name
        elif "relative_position_index" not in name:
            assert_close(p, (start[name] + trained[name]) / 2, 1e-6)
            assert not torch.equal(trained[name], start[name]), name
    text = theirs.text_model.state_dict()
    assert all(torch.equal(p, text[name]) for name, p in clap[1].text_model.state_dict().items())
    probe = ["--encoder", half, "--data", data, "--cache", tmp_path, "--epochs", 1]
    assert "level" in succeed(Run(probe, script=(CLAP, "probe.py"))).out


# ---------------------------------------------------------------- Whisper's decoder

def test_whispers_decoder_equals_transformers_on_each_clip_alone(talking_whisper):
    folder, theirs = talking_whisper
    decoder, audio, lengths = load_decoder(folder), torch.randn(3, 9, 48), torch.tensor([9, 2, 5])
    audio[1, 2:] = audio[2, 5:] = 100.0  # padding must not be heard
    prompts, answers = [[5, 6], [7, 8, 9, 10], [11]], [[20, 21, 22], [23], [24] * 50]

    def logits(clip, ids):
        heard = audio[clip, None, : lengths[clip]]
        heard = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=heard)
        return theirs(encoder_outputs=heard, decoder_input_ids=torch.tensor([ids])).logits[0]

    with torch.no_grad():
        states = decoder.answer_states(audio, lengths, prompts, answers)
        for clip, part in enumerate(decoder.unembed(states).split([3, 1, 50])):
            chat = prompts[clip] + answers[clip][:-1]
            assert_close(part, logits(clip, chat)[-len(part):])
        decoder.tokenizer.stop = {-1}
        free = decoder.generate(audio, lengths, prompts, 8)
        for clip, prompt in enumerate(prompts):
            ids = list(prompt)
            for _ in range(8):
                ids.append(int(logits(clip, ids)[-1].argmax()))
            assert ids == prompt + free[clip]
    decoder.tokenizer.stop = {free[0][5]}
    assert decoder.generate(audio, lengths, prompts, 8)[0] == free[0][: free[0].index(free[0][5])]


def test_gradients_pass_through_whispers_frozen_decoder(talking_whisper):
    decoder, audio = load_decoder(talking_whisper[0]), torch.randn(2, 6, 48, requires_grad=True)
    states = decoder.answer_states(audio, torch.tensor([6, 3]), [[5, 6], [7]], [[20, 21], [22]])
    decoder.unembed(states).square().sum().backward()
    assert audio.grad[0].all() and audio.grad[1, :3].all() and not audio.grad[1, 3:].any()
    assert all(p.grad is None and not p.requires_grad for p in decoder.parameters())


def test_whispers_prompts_and_answers(talking_whisper, english_whisper):
    t, english = (load_decoder(f).tokenizer for f, _ in (talking_whisper, english_whisper))
    assert english.start == [t.start[0], t.start[-1]]  # without language and task
    spell = lambda ids: t.tokenizer.decode(ids, skip_special_tokens=False)
    assert spell(t.prompt("Who speaks?")) == (
        "<|startofprev|> Who speaks?<|startoftranscript|><|en|><|transcribe|><|notimestamps|>")
    assert spell(t.answer("a dog")) == " a dog<|endoftext|>"
    assert t.decode([*t.start, *t.answer("Grüße, 你好"), 51000]) == "Grüße, 你好"
    assert spell(t.ids("<|nl|>")) == "<|nl|>" and len(t.ids("<|nl|>")) > 1  # spelt as plain text


def test_what_whispers_decoder_cannot_take_is_one_line(talking_whisper, tmp_path):
    decoder, audio = load_decoder(talking_whisper[0]), torch.randn(1, 2, 48)
    with pytest.raises(ValueError) as e:
        decoder.answer_states(audio, torch.tensor([2]), [[5] * 400], [[6] * 50])
    assert_one_line(e, "prompt and answer have 449 tokens; Whisper's decoder takes 448")
    shutil.copytree(talking_whisper[0], tmp_path, dirs_exist_ok=True)
    make_tokenizer(tmp_path, ["<|translate|>"])
    with pytest.raises(ValueError) as e:
        load_decoder(tmp_path)
    assert_one_line(e, str(tmp_path), "lacks the token <|startofprev|>")


def test_whispers_decoder_trains_resumes_and_answers(talking_whisper, data, tmp_path):
    folder, out = talking_whisper[0], tmp_path / "out"
    train_and_resume(WHISPER, 2, data, out, "--encoder", folder, "--decoder", folder,
                     "--stack", 0, "--lr-decoder", 1e-3)
    start, trained = load_decoder(folder).state_dict(), load_decoder(out / "decoder").state_dict()
    assert not any(torch.equal(p, start[name]) for name, p in trained.items())
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(out / "encoder").model
    assert all(torch.equal(p, start[name]) for name, p in theirs.decoder.state_dict().items())
    ask = ["ask", tmp_path / "0.wav", "How loud?", "--run", out]
    assert succeed(Run(ask, script=(WHISPER, "uniwhisper.py"))).out
    done = subprocess.run([sys.executable, HERE.parent / "uniwhisper.py", *ask],
                          capture_output=True, text=True)
    assert done.returncode == 1 and "model_type is 'whisper'; need one of qwen2" in done.stderr
