"""Inputs that people met: each kind with several members. Right is the value, or one line."""
import bz2
import gzip
import io
import json
import lzma

import numpy as np
import pytest
import soundfile as sf
import torch
from safetensors.torch import load_file, save_file

import data
import probe
import uniwhisper
from conftest import (RATE, assert_one_line, audio_bytes, make_qwen, noise, tone, write_clip,
                      write_manifest, write_tar)
from data import AudioError, Rows, read_audio
from uniwhisper import load_decoder, load_encoder


def run(monkeypatch, main, *argv):
    """A script's main() with this command line -> its exit message or code."""
    monkeypatch.setattr("sys.argv", ["script", *map(str, argv)])
    try:
        return main()
    except SystemExit as e:
        return e.code


ROW = {"audio": "a.wav", "task": "language", "answer": "Greek"}


# ---------------------------------------------------------------- lengths

@pytest.mark.parametrize("name", ["a.mp3", "a.wav", "a.flac", "a.aiff"])
def test_a_macos_twin_does_not_take_its_clips_length(name, tmp_path):
    write_clip(tmp_path / name, noise(5 * RATE).numpy())
    (tmp_path / f"._{name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(4000))
    rows = Rows([write_manifest(tmp_path / "m.jsonl", [ROW | {"audio": name}])], True)
    assert rows.seconds[0] == pytest.approx(5, abs=0.1) and len(rows.audio(0, RATE)) >= 5 * RATE


@pytest.mark.parametrize("told, real, fits", [
    (0.02, 20, False), (20, 0.5, False), (1, 2, False), (2000, 2, False),
    (2, 2.0004, True), (1.7, 2, True), (30, 29, True), (0, 3, True)])
def test_a_row_whose_seconds_are_far_off_is_named(told, real, fits, tmp_path):
    write_clip(tmp_path / "a.wav", tone(real))
    rows = Rows([write_manifest(tmp_path / "m.jsonl", [ROW | {"seconds": told}])])
    if fits:
        assert len(rows.audio(0, RATE)) == round(real * RATE)
        return
    with pytest.raises(AudioError) as error:
        rows.audio(0, RATE)
    assert_one_line(error, f"{tmp_path}/m.jsonl:1 (a.wav): has {real:.2f} s", "seconds")


@pytest.mark.parametrize("in_tar", [False, True])
def test_an_mp3_that_tells_no_length_is_measured_by_decoding(in_tar, tmp_path):
    quiet = noise(4 * RATE).numpy() * 0.001  # variable rate: few bits, then many
    raw = audio_bytes(np.concatenate((quiet, noise(4 * RATE).numpy())), format="MP3",
                      bitrate_mode="VARIABLE", compression_level=0.5)
    at = raw.index(b"Xing") if b"Xing" in raw[:4096] else raw.index(b"Info")
    raw = raw[:at] + bytes(4) + raw[at + 4 :]
    if in_tar:
        rows = Rows([write_tar(tmp_path / "t.tar", {"a.mp3": raw, "a.json": b"{}"})])
    else:
        (tmp_path / "a.mp3").write_bytes(raw)
        rows = Rows([write_manifest(tmp_path / "m.jsonl", [ROW | {"audio": "a.mp3"}])])
    assert rows.seconds[0] == pytest.approx(8, abs=0.2)
    assert len(rows.audio(0, RATE)) / RATE == pytest.approx(8, abs=0.2)


@pytest.mark.parametrize("seconds", [30.013, 30.004, 31.0])
def test_a_length_is_told_exactly_enough(seconds, tmp_path):
    rows = write_manifest(tmp_path / "m.jsonl", [ROW | {"seconds": seconds}])
    with pytest.raises(ValueError, match=f"m.jsonl:1 .*: {seconds:.3f} s, longer than .* 30;"):
        Rows([rows], max_seconds=30)


# ---------------------------------------------------------------- what is in an audio file

LIST = b"LIST\x0c\0\0\0INFOISFTabcd"


@pytest.mark.parametrize("how", [{}, {"subtype": "FLOAT"}, {"subtype": "PCM_24"},
                                 {"subtype": "PCM_U8"}, {"format": "AIFF"}, {"format": "FLAC"}])
@pytest.mark.parametrize("behind", [
    b"\r\n--boundary--\r\n", b"a line of text\n" * 9, b"\n", bytes(500), LIST,
    b"LIST\x0b\0\0\0INFOISFTabc", b"LIST\x0b\0\0\0INFOISFTabc" + LIST,
    b"ID3\3\0\0\0\0\0\x0a" + b"T" * 10, b"TAG" + b"x" * 125,
    np.random.default_rng(0).bytes(3001)])
def test_what_follows_the_samples_is_no_sound(how, behind):
    audio = tone(0.5)[:-1]  # an odd number of samples
    raw = audio_bytes(audio, **how) + behind
    try:
        found = read_audio(raw, RATE)
    except AudioError as error:
        assert "\n" not in str(error) and len(audio) - 1 <= 7999
    else:
        assert len(found) == len(audio) == len(sf.read(io.BytesIO(raw))[0])


@pytest.mark.parametrize("how", [{"subtype": "FLOAT"}, {"subtype": "DOUBLE"},
                                 {"format": "AIFF", "subtype": "FLOAT"}])
@pytest.mark.parametrize("scale, fits", [(32_768, False), (2**31, False), (50, False),
                                         (2.5, True)])
def test_floats_in_the_range_of_integers_are_refused(how, scale, fits):
    raw = audio_bytes(tone() * scale, **how)
    if fits:
        assert read_audio(raw).abs().max() > 0.7
        return
    with pytest.raises(AudioError) as error:
        read_audio(raw, name="clip")
    assert_one_line(error, "clip: samples up to", "-1 to 1")


@pytest.mark.parametrize("suffix, kind", [("aiff", "AIFF"), ("aif", "AIFF"), ("au", "AU"),
                                          ("caf", "CAF"), ("oga", "OGG"), ("W64", "W64")])
def test_all_that_libsndfile_reads_is_read_from_a_tar(suffix, kind, tmp_path):
    members = {f"k.{suffix}": audio_bytes(tone(), format=kind), "k.json": b'{"answer": "x"}'}
    rows = Rows([write_tar(tmp_path / "t.tar", members)])
    assert len(rows) == 1 and len(rows.audio(0, RATE)) == 8000


# ---------------------------------------------------------------- manifests, indices

@pytest.mark.parametrize("row, fits", [
    ({"answer": "français"}, False), ({"instruction": "Où?"}, False), ({"label": ["été"]}, False),
    ({"audio": "é.wav"}, True), ({"answer": "plain"}, True)])
def test_a_manifest_that_is_not_utf8_says_so(row, fits, tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(json.dumps(ROW | {"seconds": 1} | row, ensure_ascii=False).encode("latin-1"))
    if fits:
        assert len(Rows([path])) == 1
        return
    with pytest.raises(ValueError) as error:
        Rows([path])
    assert_one_line(error, f"{path}:1: not UTF-8", "iconv")


@pytest.mark.parametrize("name, pack", [("m.jsonl.gz", gzip.compress), ("m.jsonl", gzip.compress),
                                        ("m.jsonl.bz2", bz2.compress), ("m.jsonl", lzma.compress),
                                        ("t.tar", gzip.compress), ("t.tar.gz", gzip.compress)])
def test_compressed_data_says_so(name, pack, tmp_path):
    (tmp_path / name).write_bytes(pack(json.dumps(ROW).encode()))
    with pytest.raises(ValueError) as error:
        Rows([tmp_path / name])
    assert_one_line(error, f"{tmp_path / name}: is compressed", "unpack")


def test_two_stars_descend(tmp_path):
    for place in ("a.jsonl", "x/b.jsonl", "x/y/z/c.jsonl"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        write_manifest(tmp_path / place, [ROW | {"seconds": 1}])
    assert len(Rows([tmp_path / "**/*.jsonl"])) == 3


@pytest.mark.parametrize("key", ["set", "fold", "Split"])
def test_an_index_is_refused_in_training_as_its_tar_is(key, tmp_path):
    members = {"k.wav": audio_bytes(tone()), "k.json": json.dumps(
        {"task": "language", "answer": "Greek", key: "test"}).encode()}
    tar = write_tar(tmp_path / "t.tar", members)
    data.write_index(Rows([tar]), str(tmp_path / "t.index"))
    for path in (tar, tmp_path / "t.index"):
        with pytest.raises(ValueError) as error:
            Rows([path], answers=True)
        assert_one_line(error, f"{tar} (k.wav): has \"{key}\" but no \"split\"")


def test_data_py_lists_splits_and_what_would_be_refused(tmp_path, monkeypatch, capsys):
    rows = [ROW | {"seconds": 1}, ROW | {"seconds": 1, "split": "test"}, ROW | {"seconds": 31},
            {"audio": "a.wav", "task": "language", "label": "x", "seconds": 1},
            {"audio": "a.wav", "answer": "x", "instruction": "What?", "seconds": 1}]
    path = write_manifest(tmp_path / "m.jsonl", rows)
    assert run(monkeypatch, data.main, path) == 0
    said = capsys.readouterr().out
    assert "language             test               1 rows" in said
    assert f"1 rows would be refused by train.py: {data.UNFIT}; the first: {path}:4" in said
    assert f"train.py: over 30 s; cut or allow it; the first: {path}:3" in said
    assert f'probe.py: no "task"; the first: {path}:5' in said
    assert '"split": "valid"' in said


# ---------------------------------------------------------------- labels, events

def clips(tmp_path, labels, **more) -> str:
    rows = []
    for i, label in enumerate(labels):
        write_clip(tmp_path / f"{i}.wav", tone(0.4, 200 + 90 * i))
        row = {"audio": f"{i}.wav", "task": "a", "split": ("train", "valid", "test")[i % 3]}
        rows.append(row | ({"label": label} if "events" not in more else {}) | more)
    return write_manifest(tmp_path / "m.jsonl", rows)


def tasks_of(path, said):
    found = probe.manifest_tasks(Rows([path]))
    return probe.check_tasks(found, probe.Settings(encoder=("x",), data=(path,)), said.append)


@pytest.mark.parametrize("member", [None, "", " ", ["b"], {"name": "b"}])
def test_a_member_of_a_label_list_must_be_a_text(member, tmp_path):
    path = clips(tmp_path, [["a"], ["a", member]] * 3)
    with pytest.raises(ValueError) as error:
        tasks_of(path, [])
    assert_one_line(error, f"{path}:2 (1.wav): a label is {member!r}", "need a text")


@pytest.mark.parametrize("label", [{"name": "b"}, " ", "\t"])
def test_a_label_must_be_a_text(label, tmp_path):
    path = clips(tmp_path, ["a", label] * 3)
    with pytest.raises(ValueError, match="m.jsonl:2 .*a label is"):
        tasks_of(path, [])


@pytest.mark.parametrize("labels", [["a", "a ", " a", "b"], ["a\n", "a", "b\t", "b"]])
def test_blanks_at_a_labels_ends_make_no_class(labels, tmp_path):
    assert tasks_of(clips(tmp_path, labels * 3), [])[0].classes() == ["a", "b"]
    assert tasks_of(clips(tmp_path, [[label] for label in labels * 3]), [])[0].classes() == [
        "a", "b"]


@pytest.mark.parametrize("onset, offset", [(100, 300), (0.6, 0.7), (5, 5)])
def test_an_event_behind_its_clips_end_is_an_error(onset, offset, tmp_path):
    event = {"onset": onset, "offset": offset, "label": "x"}
    path = clips(tmp_path, [0] * 6, events=[event])
    with pytest.raises(ValueError) as error:
        tasks_of(path, [])
    assert_one_line(error, f"{path}:1 (0.wav): an event begins at", "seconds")


def score(tmp_path, path, said):
    s = probe.Settings(encoder=(str(tmp_path / "encoder"),), data=(path,), epochs=1, seeds=1,
                       hidden=0, cache=str(tmp_path / "cache"))
    return probe.run(s, probe.find_tasks(s), said.append)[s.encoder[0]]["a"]


@pytest.mark.parametrize("events", [[], [{"onset": 0.1, "offset": 0.1, "label": "x"}]])
def test_nothing_to_find_in_test_gets_a_note(events, tmp_path, whisper):
    (tmp_path / "encoder").symlink_to(whisper[0])
    path, said = clips(tmp_path, [0] * 9, events=[{"onset": 0, "offset": 0.2, "label": "x"}]), []
    rows = [json.loads(line) for line in open(path)]
    rows = [row | ({"events": events} if row["split"] == "test" else {}) for row in rows]
    score(tmp_path, write_manifest(path, rows), said)
    assert any("nothing is to be found in test" in line for line in said)


def test_a_task_on_events_may_have_one_class(tmp_path, whisper):
    (tmp_path / "encoder").symlink_to(whisper[0])
    said = []
    events = [{"onset": 0, "offset": 0.2, "label": "speech"}]
    assert score(tmp_path, clips(tmp_path, [0] * 9, events=events), said)["classes"] == 1
    assert not any("note" in line for line in said)


@pytest.mark.parametrize("splits, shared", [("train test", 6), ("valid test", 6), ("train", 0)])
def test_clips_in_two_splits_get_a_note_with_their_number(splits, shared, tmp_path):
    path, said = clips(tmp_path, ["a", "b"] * 9), []
    rows = [json.loads(line) for line in open(path)]
    rows += [row | {"split": splits.split()[-1]} for row in rows
             if row["split"] == splits.split()[0]]
    tasks_of(write_manifest(path, rows), said)
    notes = [line for line in said if "several splits" in line]
    assert notes == [] if not shared else notes[0].startswith(f"note: a: {shared} clips are in")


# ---------------------------------------------------------------- the encode command, pooled

def encoded(monkeypatch, tmp_path, whisper, *names):
    out = tmp_path / "f.safetensors"
    code = run(monkeypatch, uniwhisper.main, "encode", *names, "--encoder", whisper[0],
               "--out", out, "--pool")
    return code, sorted(load_file(out)) if out.exists() else []


def test_encode_names_a_tars_clips_by_their_members(tmp_path, whisper, monkeypatch):
    wav = audio_bytes(tone())
    members = {"a/k.wav": wav, "a/k.json": b'{"label": "x"}', "b/k.wav": wav, "b/k.json": b"{}",
               "k.flac": audio_bytes(tone(), format="FLAC"), "k.json": b"{}"}
    tar = write_tar(tmp_path / "t.tar", members)
    code, names = encoded(monkeypatch, tmp_path, whisper, tar)
    assert code is None and names == ["a/k.wav", "b/k.wav", "k.flac"]


def test_encode_refuses_two_members_of_one_name(tmp_path, whisper, monkeypatch):
    tars = [write_tar(tmp_path / name, {"k.wav": audio_bytes(tone()), "k.json": b"{}"})
            for name in ("s.tar", "t.tar")]
    code, names = encoded(monkeypatch, tmp_path, whisper, *tars)
    assert "k.wav is also another clip's name" in code and names == []


def test_encode_takes_folders_and_quoted_globs(tmp_path, whisper, monkeypatch):
    for name in ("c/a.wav", "c/d/b.flac", "c/._a.wav", "c/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        kind = name[-4:].strip(".")
        raw = audio_bytes(tone(), format=kind) if kind in ("wav", "flac") else b"text"
        (tmp_path / name).write_bytes(b"\0\5\x16\7" if "._" in name else raw)
    for given in (tmp_path / "c", tmp_path / "c/**/[ab].*"):
        code, names = encoded(monkeypatch, tmp_path, whisper, given)
        assert code is None
        assert names == [f"{tmp_path}/c/a.wav", f"{tmp_path}/c/d/b.flac"]


@pytest.mark.parametrize("out", ["f.npy", "f.pt", "features"])
def test_encode_refuses_another_kind_of_file(out, tmp_path, whisper, monkeypatch):
    clip = write_clip(tmp_path / "a.wav")
    said = run(monkeypatch, uniwhisper.main, "encode", clip, "--encoder", whisper[0],
               "--out", tmp_path / out)
    assert "need a name that ends in .safetensors" in said and not (tmp_path / out).exists()


@pytest.mark.parametrize("silence", [-1.0, float("inf"), float("nan")])
def test_silence_is_seconds(silence, whisper):
    with pytest.raises(ValueError, match="silence is .*; need seconds, 0 or more"):
        load_encoder(whisper[0]).pooled(tone(), silence=silence)


# ---------------------------------------------------------------- checkpoint folders

@pytest.mark.parametrize("how", ["none", "equal", "own"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_configs_head_is_the_files(how, tied, tmp_path):
    from transformers import AutoModelForCausalLM

    make_qwen(tmp_path, tied=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
    tensors = load_file(tmp_path / "model.safetensors")
    if how != "own":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if how == "none" and tied:
        del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    ids = torch.tensor([[5, 9, 40, 7]])
    with torch.inference_mode():
        decoder = load_decoder(tmp_path)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        ours = decoder.unembed(decoder(decoder.embed_tokens(ids)))
        torch.testing.assert_close(ours, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert (decoder.lm_head.weight is decoder.embed_tokens.weight) == (tied and how != "own")


def test_what_a_checkpoint_folder_lacks_is_named(tmp_path, whisper, qwen):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((qwen[0] / name).read_bytes())
    with pytest.raises(FileNotFoundError) as error:
        load_decoder(tmp_path)
    assert_one_line(error, f"{tmp_path}/tokenizer.json is missing; fetch it, too")
    (tmp_path / "config.json").write_bytes((whisper[0] / "config.json").read_bytes())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"\.bin files are not read: .* has safetensors"):
        load_encoder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder; is it a hub's name"):
        load_encoder("openai/whisper-base")


def test_an_id_beyond_the_vocabulary_is_named_at_the_start(tmp_path, qwen):
    for path in qwen[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    with pytest.raises(ValueError) as error:
        load_decoder(tmp_path)
    assert_one_line(error, f"{tmp_path}/config.json: vocab_size is 200; need more than ")


@pytest.mark.parametrize("name", ["my: run", "1.0", "yes", "a #b", "[x]", "it's", 'a "b"'])
def test_a_model_cards_head_is_yaml(name, tmp_path, whisper):
    yaml = pytest.importorskip("yaml")
    (tmp_path / name).symlink_to(whisper[0])
    settings = {"encoder": str(tmp_path / name), "decoder": "qwen", "steps": 3, "silence": 1.0,
                "tasks": {}, "hours": 1.0}
    uniwhisper.export_run(tmp_path / "out", settings, load_encoder(whisper[0]))
    head = (tmp_path / "out/README.md").read_text().split("---")[1]
    assert yaml.safe_load(head)["base_model"] == name

@pytest.mark.parametrize("bare", [False, True])
def test_an_encoder_saved_beside_its_source_is_the_trained_one(bare, tmp_path, whisper):
    """Folders may name an encoder's weights with or without a prefix."""
    source = tmp_path / "source"
    source.mkdir()
    for path in whisper[0].iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    if bare:  # as transformers' WhisperEncoder.save_pretrained
        tensors = {name.removeprefix("model.").removeprefix("encoder."): tensor
                   for name, tensor in load_file(source / "model.safetensors").items()
                   if name.removeprefix("model.").startswith("encoder.")}
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
    encoder = load_encoder(source)
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(1.0)
    encoder.save(tmp_path / "out", source)
    again = load_encoder(tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], w) for name, w in encoder.state_dict().items())


def test_a_mended_clip_is_read_again(tmp_path, whisper):
    (tmp_path / "encoder").symlink_to(whisper[0])
    path, said = clips(tmp_path, ["a", "b"] * 75), []
    rows = [json.loads(line) for line in open(path)]
    wrong = [rows[0] | {"seconds": 9.0}, *rows[1:]]
    assert score(tmp_path, write_manifest(path, wrong), said)["test"] == 50
    assert any("says seconds 9.00" in line for line in said)
    said.clear()
    score(tmp_path, write_manifest(path, rows), said)
    assert not any("left out" in line for line in said)


def test_rows_of_one_clip_are_held_out_together(tmp_path):
    rows = []
    for i in range(30):
        write_clip(tmp_path / f"{i}.wav", tone(0.4, 200 + 9 * i))
        for label in ("a", "b"):
            rows.append({"audio": f"{i}.wav", "task": "a", "label": label,
                         "split": "test" if i % 3 == 2 else "train"})
    task, = tasks_of(write_manifest(tmp_path / "m.jsonl", rows), [])
    held = {probe.origin(clip) for clip in task.clips if clip.split == "held out"}
    assert len(held) == 2
    assert not held & {probe.origin(clip) for clip in task.clips if clip.split == "train"}


def test_a_clips_captions_stand_in_one_row(tmp_path):
    rows = [{"audio": f"{i // 2}.wav", "task": "c", "captions": [f"text {i}"], "seconds": 1,
             "split": ("train", "valid", "test")[i // 2 % 3]} for i in range(12)]
    with pytest.raises(ValueError, match="c: a clip comes twice; give all its captions in one"):
        tasks_of(write_manifest(tmp_path / "m.jsonl", rows), [])
