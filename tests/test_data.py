"""data.py: decoding, resampling, rows of manifests and tars, sampling, batches, bad input."""
import itertools
import json
import math
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tarfile
from collections import Counter
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from conftest import (RATE, assert_one_line, audio_bytes, noise, tone, write_clip, write_manifest,
                      write_tar)
from data import (POOL, AudioError, Batches, Rows, held_out, loader, next_rows,
                  read_audio, read_templates, resample, sample_batches, task_shares)

TEMPLATES = read_templates()["en"]
FILE = Path(data.__file__).parent / "weights/instructions.json"
RATES = [8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 96000]


# ---------------------------------------------------------------- resampling

def sine(hertz, rate):
    return torch.sin(2 * math.pi * hertz * torch.arange(rate, dtype=torch.float64) / rate).float()


@pytest.mark.parametrize("rate", [*RATES, 22_040])
def test_resampled_sines_keep_level_and_phase_and_leave_no_images(rate):
    lower = min(rate, RATE) / 2  # the lower Nyquist frequency
    for share in (0.01, 0.3, 0.7, 0.92):
        hertz = share * lower
        out = resample(sine(hertz, rate), rate, RATE).double()[800:-800]
        t = 2 * math.pi * hertz * torch.arange(800, 800 + len(out), dtype=torch.float64) / RATE
        waves = torch.stack((t.sin(), t.cos()), 1)
        fit = torch.linalg.lstsq(waves, out[:, None]).solution[:, 0]
        assert abs(20 * math.log10(fit.norm())) < 0.1
        assert abs(math.atan2(fit[1], fit[0])) < 1e-3  # no delay
        rest = (out - waves @ fit).square().mean() / 0.5
        assert 10 * math.log10(rest + 1e-20) < -60


@pytest.mark.parametrize("rate", [r for r in RATES if r > RATE])
def test_frequencies_above_the_new_range_are_gone(rate):
    for hertz in np.linspace(RATE / 2 + 20, rate / 2 - 20, 5):
        out = resample(sine(hertz, rate), rate, RATE)[800:-800]
        assert 10 * math.log10(out.square().mean() / 0.5 + 1e-20) < -60


@pytest.mark.parametrize("rate", [*RATES, 22_040])
def test_resampled_length_is_rounded_up_for_any_shape(rate):
    for samples in (1, 7, 1000, 12_345):
        audio = torch.randn(2, 3, samples)
        out = resample(audio, rate, RATE)
        assert out.shape == (2, 3, math.ceil(samples * RATE / rate))
        assert torch.allclose(out[1, 2], resample(audio[1, 2], rate, RATE), atol=1e-5)


@pytest.mark.parametrize("rate", [11_127, 22_255, 44_101, 95_999])
def test_an_odd_rate_is_met_within_a_thousandth(rate):
    out = resample(sine(1000, rate), rate, RATE)
    assert abs(len(out) / RATE - 1) < 1e-3
    spectrum = torch.fft.rfft(out[:15_000] * torch.hann_window(15_000)).abs()
    assert abs(spectrum.argmax() * RATE / 15_000 - 1000) <= 1.1


# ---------------------------------------------------------------- reading audio

@pytest.mark.parametrize("name, error", [("a.wav", 1e-3), ("a.flac", 1e-3), ("a.ogg", 0.05),
                                         ("a.mp3", 0.05)])
@pytest.mark.parametrize("rate, channels", [(16_000, 1), (44_100, 2)])
def test_audio_of_every_format_comes_out_as_16_khz_mono(name, error, rate, channels, tmp_path):
    whole = tone(1.0, 500, rate)
    path = write_clip(tmp_path / name, np.stack([whole, 2 * whole][:channels], 1), rate)
    audio = read_audio(path, RATE)
    assert audio.dtype == torch.float32 and audio.shape == (RATE,)
    expected = torch.from_numpy(tone(1.0, 500)) * (channels + 1) / 2  # the channels' mean
    assert (audio - expected)[800:-800].abs().max() < error
    assert torch.equal(read_audio(path.read_bytes(), RATE), audio)
    # the file's own rate, and another
    assert read_audio(path).shape == (rate,) and read_audio(path, 24_000).shape == (24_000,)


WAV = audio_bytes(tone(), format="WAV")  # half a second


@pytest.mark.parametrize("kind", ["WAV PCM_16", "WAV PCM_24", "WAV FLOAT", "FLAC PCM_16",
                                  "OGG VORBIS", "OGG OPUS"])
def test_audio_cut_short_anywhere_is_refused(kind):
    how = dict(zip(("format", "subtype"), kind.split()))
    raw = audio_bytes(noise(24_000).numpy(), 24_000, **how)
    n = len(raw)
    assert read_audio(raw, RATE).shape == (16_000,)
    for left in (n - 1, n - 2, n - 50, n - 700, n * 3 // 4, n // 2, 100, 30, 4, 1):
        with pytest.raises(AudioError, match="^clip: (cut short|not readable)"):
            read_audio(raw[:left], name="clip")


def with_sizes(data=None, riff=None) -> bytes:
    """WAV, whose header tells other sizes, in bytes."""
    wav = bytearray(WAV)
    for place, size in ((WAV.find(b"data") + 4, data), (4, riff)):
        if size is not None:
            wav[place : place + 4] = struct.pack("<I", size)
    return bytes(wav)


@pytest.mark.parametrize("sizes", [
    dict(data=0, riff=0), dict(data=2**31 - 1), dict(data=2**31 - 2**12),
    dict(data=2**32 - 1, riff=2**32 - 1),  # what ffmpeg writes into a pipe
    dict(data=16_044), dict(riff=0), dict(riff=8), dict(riff=16_500)], ids=str)
def test_a_wav_with_a_wrong_size_is_read_whole(sizes):
    assert torch.equal(read_audio(with_sizes(**sizes)), read_audio(WAV))


@pytest.mark.parametrize("size", [2, 1000, 16_002, 16_044])
def test_a_wav_with_another_number_of_samples_than_told_is_refused(size):
    with pytest.raises(AudioError, match="^audio: cut short"):
        read_audio(with_sizes(data=size, riff=size + 36))


def without_length(mp3: bytes) -> bytes:
    """An MP3 at 16 kHz without its first frame, which tells its length and holds no sound."""
    kbps = [0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160][mp3[2] >> 4]
    return mp3[72 * kbps * 1000 // RATE + (mp3[2] >> 1 & 1) :]


LOUD_AND_QUIET = np.concatenate([noise(4 * RATE, level=0.3).numpy(),
                                 np.zeros(4 * RATE, np.float32)])
ID3 = b"ID3\4\0\0\0\0\0\12" + bytes(10)


@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
@pytest.mark.parametrize("before, after", [(b"", b""), (ID3, b""), (b"", b"TAG" + bytes(125))])
def test_an_mp3_that_does_not_tell_its_length_is_read_to_its_end(mode, before, after):
    mp3 = audio_bytes(LOUD_AND_QUIET, format="MP3", bitrate_mode=mode, compression_level=0.3)
    audio = read_audio(before + without_length(mp3) + after)
    assert 8 <= len(audio) / RATE < 8.2  # with the encoder's own silence at both ends
    assert audio[RATE : 3 * RATE].std() > 0.2 and audio[-3 * RATE :].abs().max() < 0.01
    whole = read_audio(before + mp3 + after)
    assert len(whole) == 8 * RATE
    with pytest.raises(AudioError, match="cut short"):
        read_audio(mp3[: len(mp3) // 2])


@pytest.mark.parametrize("kind", [
    "WAV", "WAV PCM_24", "WAV ULAW", "WAV IMA_ADPCM", "FLAC", "OGG", "OGG OPUS", "MP3", "AIFF",
    "RF64", "W64"])
def test_every_coding_is_read_and_refused_if_cut_or_joined(kind):
    how = dict(zip(("format", "subtype"), kind.split()))
    one = audio_bytes(tone(1.0), **how)
    assert 1.0 <= len(read_audio(one)) / RATE < 1.05  # blocks are filled up
    for raw in (one + audio_bytes(tone(2.0, 880), **how), one[: len(one) // 2]):
        with pytest.raises(AudioError, match="several recordings|cut short|not readable"):
            read_audio(raw)


@pytest.mark.parametrize("gains, heard", [
    ((1, 0), 0.5), ((1, 1), 1), ((1, 0, 0, 0, 0, 0), 1 / 6), ((0.5, -1), -0.25),
    ((1, -1), 1), ((1, -0.9), 1), ((-1, 1, -1, 1), -1)])
def test_channels_are_averaged_but_where_they_cancel_the_loudest_is_taken(gains, heard):
    channels = np.stack([gain * tone() for gain in gains], 1)
    audio = read_audio(audio_bytes(channels, format="WAV", subtype="FLOAT"))
    assert torch.allclose(audio, torch.from_numpy(tone()) * heard, atol=1e-6)


def piped_flac() -> bytes:
    raw = bytearray(audio_bytes(tone(), format="FLAC"))
    # STREAMINFO's number of samples, 36 bits, is unknown where the writer could not seek back
    raw[21] &= 0xF0
    raw[22:26] = bytes(4)
    return bytes(raw)


BAD_AUDIO = {
    "empty file": (b"", "the file is empty"),
    "text": (b"This is no audio. " * 100, "not readable as audio"),
    "m4a": (b"\0\0\0\x20ftypM4A " + bytes(1000), "ffmpeg -i IN OUT.flac"),
    "git-LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
                        "git lfs pull"),
    "no samples": (audio_bytes(np.zeros(0), format="WAV"), "all samples are zero (0)"),
    "all samples zero": (audio_bytes(np.zeros(800), format="FLAC"), "all samples are zero"),
    "NaN": (audio_bytes(np.array([0.1, np.nan]), format="WAV", subtype="FLOAT"), "NaN or infinite"),
    "infinite": (audio_bytes(np.array([0.1, np.inf]), format="WAV", subtype="FLOAT"),
                 "NaN or infinite"),
    "too long": (audio_bytes(tone(2.0), format="FLAC"), " s, longer than --max-seconds 1.5"),
    "length unknown": (piped_flac(), "not readable as audio (array is too big"),
}


@pytest.mark.parametrize("fault", BAD_AUDIO)
def test_bad_audio_is_one_line_that_names_it(fault, tmp_path):
    raw, says = BAD_AUDIO[fault]
    path = tmp_path / "bad.wav"
    path.write_bytes(raw)
    with pytest.raises(AudioError) as e:
        read_audio(path, max_seconds=1.5)
    assert_one_line(e, f"{path}: ", says)
    path.unlink()
    with pytest.raises(AudioError, match="bad.wav: No such file"):
        read_audio(path)


# ---------------------------------------------------------------- manifests

def row(number=0, **more):
    return {"audio": f"clips/{number}.wav", "instruction": "Which note?",
            "answer": f"note {number}", "task": "pitch", "seconds": 0.5} | more


@pytest.fixture
def manifest(tmp_path):
    """Six clips of different pitch with their manifest."""
    for i in range(6):
        write_clip(tmp_path / f"clips/{i}.wav", tone(0.2 + 0.05 * i, 200 + 100 * i))
    return write_manifest(tmp_path / "m.jsonl", [row(i, seconds=0.2 + 0.05 * i) for i in range(6)])


def test_rows_are_the_manifests_lines(manifest, tmp_path):
    rows = Rows(manifest)
    assert list(rows) == [json.loads(line) for line in open(manifest)] and len(rows) == 6
    assert torch.equal(rows.audio(3), read_audio(tmp_path / "clips/3.wav"))
    assert rows.name(3) == f"{manifest}:4 (clips/3.wav)"
    assert np.allclose(rows.seconds, 0.2 + 0.05 * np.arange(6)) and rows.seconds.dtype == np.float32


def test_rows_of_any_text_are_found_again(tmp_path):
    lines = ([row(answer=a) for a in ("Grüße 你好", "x" * 4090, "y" * 200_000)]
             + [row(extra={"kept": [1]})] * 2)
    text = "\r\n\n  \n".join(json.dumps(r, ensure_ascii=False) for r in lines)  # none at the end
    path = tmp_path / "m.jsonl"
    path.write_text("\ufeff" + text, "utf-8", newline="")  # the mark that some editors put first
    rows = Rows(path)
    assert list(rows) == lines and rows.name(4).startswith(f"{path}:13 ")


def test_several_manifests_and_globs_come_in_order(tmp_path):
    for name in "cab":
        write_manifest(tmp_path / f"{name}.jsonl", [row(answer=name, task=name)])
    rows = Rows([tmp_path / "c.jsonl", str(tmp_path / "[ab].jsonl")])
    assert [r["answer"] for r in rows] == ["c", "a", "b"]
    assert [rows.tasks[t] for t in rows.task] == ["c", "a", "b"]


def test_splits_are_told_apart(tmp_path):
    splits = "train", "valid", 3, None, "Train"
    path = write_manifest(tmp_path / "m.jsonl", [row(i, split=s) for i, s in enumerate(splits)])
    rows = Rows(path)
    assert rows.splits == ["train", "valid", "3", "Train"]
    assert [rows.where(s).tolist() for s in ("train", "3", "test")] == [[0, 3], [2], []]
    kept = Rows(path, splits={"valid", "3"})
    assert [r["answer"] for r in kept] == ["note 1", "note 2"]
    # those left out are counted, too
    assert kept.split_counts == {"train": 2, "valid": 1, "3": 1, "Train": 1}


def test_missing_seconds_are_taken_from_the_clips_header(tmp_path):
    write_clip(tmp_path / "clips/0.wav", tone(0.5, rate=22_050), 22_050)
    (tmp_path / "clips/1.raw").write_bytes(bytes(500))  # has no header
    (tmp_path / "clips/2.flac").write_bytes(piped_flac())
    lines = [{"audio": f"clips/{name}"} for name in ("0.wav", "gone.wav", "1.raw", "2.flac")]
    rows = Rows(write_manifest(tmp_path / "m.jsonl", lines), max_seconds=30)
    assert rows.seconds.tolist() == [0.5, 0, 0, 0]
    with pytest.raises(AudioError, match=r"m.jsonl:2 \(clips/gone.wav\): .*No such file"):
        rows.audio(1)


UNFIT = "training needs an answer, and an instruction or a task with templates"
BAD_ROWS = {
    "not JSON": ('{"audio": "a.wav"', "not JSON"),
    "not UTF-8": ('{"audio": "a.wav", "instruction": "?", "answer": "\udcff"}',
                  "not UTF-8; convert it: iconv -f LATIN1 -t UTF-8"),
    "not an object": ("[1]", "not a JSON object"),
    "no audio": ('{"answer": "x"}', 'lacks "audio"'),
    "audio is no path": ({"audio": 3}, 'lacks "audio"'),
    "no answer": (row(answer=None), UNFIT),
    "empty answer": (row(answer="  "), UNFIT),
    "answer is a number": (row(answer=3), UNFIT),
    "instruction is a number": (row(instruction=3), UNFIT),
    "no instruction, unknown task": (row(instruction=None, task="yodel"), UNFIT),
    "seconds is text": (row(seconds="1.0"), "seconds is '1.0'"),
    "seconds below 0": (row(seconds=-1), "seconds is -1"),
    "seconds beyond a float": (row(seconds=1e39), "seconds is 1e+39"),
    "seconds is NaN": (row(seconds=math.nan), "not JSON"),
    "set for split": (row(set="test"), 'has "set" but no "split"; rename or drop it'),
    "Split for split": (row(Split="test"), 'has "Split" but no "split"'),
    "question for instruction": (row(instruction=None, question="Which?"),
                                 'has "question" but no "instruction"'),
    "too long": (row(seconds=30.5), " s, longer than --max-seconds 30"),
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_bad_row_is_one_line_with_file_and_number(fault, tmp_path):
    bad, says = BAD_ROWS[fault]
    good = json.dumps(row())
    text = "\n".join([good, good, bad if isinstance(bad, str) else json.dumps(bad), good])
    (tmp_path / "m.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError) as e:
        Rows(tmp_path / "m.jsonl", answers=True, max_seconds=30)
    assert_one_line(e, f"{tmp_path / 'm.jsonl'}:3", says)


def test_faults_of_several_files_are_named_at_once_up_to_ten(tmp_path):
    a = write_manifest(tmp_path / "a.jsonl", [row(answer=""), row(set="test")])
    b = write_manifest(tmp_path / "b.jsonl", [row(Split="test")] * 12)
    with pytest.raises(ValueError) as e:
        Rows([a, b], answers=True)
    lines = str(e.value).splitlines()
    assert lines[:2] == [f'{a}:2: has "set" but no "split"; rename or drop it',
                         f'{b}:1: has "Split" but no "split"; rename or drop it']
    assert lines[10:] == ["... and 4 more"]


@pytest.mark.parametrize("indexed", [False, True])
def test_a_misnamed_key_in_a_tar_is_refused_in_training_alone(indexed, tmp_path):
    paths = write_tar(tmp_path / "t.tar", [("a.json", row(set="test")), ("a.wav", WAV)])
    assert len(Rows(paths)) == 1  # to be probed
    if indexed:
        data.write_index(Rows(paths), str(tmp_path / "t.index"))
        paths = str(tmp_path / "t.index")
    with pytest.raises(ValueError, match=r't.tar \(a.wav\): has "set" but no "split"'):
        Rows(paths, answers=True)


def test_a_key_that_is_null_is_as_good_as_absent(tmp_path):
    clip = write_clip(tmp_path / "clips/0.wav").read_bytes()
    lacking = {key: row()[key] for key in ("audio", "task", "answer")}
    null = lacking | dict.fromkeys(["instruction", "split", "label", "seconds", "set"])
    members = [("0.json", null | {"audio": None}), ("0.wav", clip)]
    rows = Rows([write_manifest(tmp_path / "a.jsonl", [lacking]),
                 write_manifest(tmp_path / "b.jsonl", [null]),
                 write_tar(tmp_path / "c.tar", members)], answers=True)
    assert rows[0] == rows[1] == rows[2] | {"audio": "clips/0.wav"} == lacking
    for column in (rows.seconds, rows.task, rows.split, rows.text_bytes):
        assert len(set(column.tolist())) == 1
    assert rows.seconds[0] == 0.5 and rows.splits == ["train"]


def test_keys_of_ones_own_are_no_fault(tmp_path):
    more = dict(language="x", source="x", domain="x", metric="x", caption="x", captions=["x"],
                events=[], program=0, question="beside an instruction", fold=1, split="train")
    assert len(Rows(write_manifest(tmp_path / "m.jsonl", [row(**more)]), answers=True)) == 1


def test_a_path_that_exists_is_no_pattern(tmp_path):
    for folder, n in (("y[1]", 2), ("y1", 1)):
        (tmp_path / folder).mkdir()
        write_manifest(tmp_path / folder / "m.jsonl", [row()] * n)
    assert len(Rows(tmp_path / "y[1]" / "m.jsonl")) == 2


def test_a_file_name_that_is_not_utf8_is_read_and_named(tmp_path):
    path = tmp_path / "m\udce9.jsonl"
    write_clip(tmp_path / "clips/0.wav").rename(tmp_path / "clips/caf\udce9.wav")
    for ascii in (True, False):
        lines = [json.dumps(row() | {"audio": f"clips/{name}\udce9.wav"}, ensure_ascii=ascii)
                 for name in ("caf", "gone")]
        path.write_text("\n".join(lines), "utf-8", "surrogateescape")
        rows = Rows(path, answers=True)
        assert len(rows.audio(0)) == 8000
        assert rows.name(0).endswith("m\udce9.jsonl:1 (clips/caf\udce9.wav)")
        for read in (lambda: rows.audio(1), lambda: Rows(path, max_seconds=0.1)):
            with pytest.raises(ValueError, match="m\udce9.jsonl.*\udce9.wav"):
                read()


def test_missing_empty_and_twice_named_manifests_are_refused(manifest, tmp_path):
    for path in ("gone.jsonl", "gone*.tar", "{0..9}.tar"):
        with pytest.raises((OSError, ValueError), match=f"No such file|{path}: No such file"):
            Rows(tmp_path / path)
    with pytest.raises((OSError, ValueError), match="Is a directory.*clips|clips: Is a directory"):
        Rows(tmp_path / "clips")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    bad = write_manifest(tmp_path / "bad.jsonl", [row(seconds=-1)])
    with pytest.raises(ValueError) as e:  # each is named
        Rows([manifest, bad, tmp_path / "empty.jsonl"])
    assert [line.rpartition(": ")[2] for line in str(e.value).splitlines()] == [
        "seconds is -1; need a number", "holds no rows"]
    same = tmp_path / "same.jsonl"
    same.symlink_to(manifest)
    for twice in ([manifest, manifest], [manifest, tmp_path / "m*.jsonl"], [same, manifest]):
        with pytest.raises(ValueError, match="named twice"):
            Rows(twice)


def test_rows_take_48_bytes_each_and_no_objects(tmp_path):
    lines = [row(i, label=["x"] * 9) for i in range(2000)]
    rows = Rows(write_manifest(tmp_path / "m.jsonl", lines))
    columns = [v for v in vars(rows).values() if isinstance(v, np.ndarray)]
    assert rows.table.nbytes <= 48 * len(rows)
    assert all(column is rows.table or np.shares_memory(column, rows.table) for column in columns)
    assert not any(isinstance(v, (list, dict)) and len(v) > 9 for v in vars(rows).values())


# ---------------------------------------------------------------- tars

def members_of(manifest, key="{:03d}"):
    for i, line in enumerate(open(manifest)):
        content = json.loads(line)
        yield key.format(i) + ".json", {k: v for k, v in content.items() if k != "audio"}
        yield key.format(i) + ".wav", (Path(manifest).parent / content["audio"]).read_bytes()


@pytest.mark.parametrize("how", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("key", ["{:03d}", "./train/a.b_{:d}", "long" * 40 + "{}"])
def test_rows_of_a_tar_equal_the_manifests(manifest, tmp_path, how, key):
    members = list(members_of(manifest, key))
    random.Random(0).shuffle(members)  # partners need not be neighbours
    path = write_tar(tmp_path / "t.tar", [("__readme.txt", b"hello"), *members], format=how)
    rows, expected = Rows(path), Rows(manifest)
    order = [int(r["answer"].removeprefix("note ")) for r in rows]
    assert sorted(order) == list(range(6))
    for i, n in enumerate(order):
        assert rows[i] == {k: v for k, v in expected[n].items() if k != "audio"}
        assert torch.equal(rows.audio(i), expected.audio(n))
        assert rows.seconds[i] == expected.seconds[n] and path in rows.name(i)


def test_a_key_that_comes_twice_gives_two_rows(tmp_path):
    crops = [("k.json", row(0)), ("k.wav", audio_bytes(tone(0.2))), ("k.json", row(1)),
             ("k.wav", audio_bytes(tone(0.3), format="WAV"))]
    rows = Rows(write_tar(tmp_path / "t.tar", crops))
    assert [r["answer"] for r in rows] == ["note 0", "note 1"]
    assert [len(rows.audio(i)) for i in range(2)] == [3200, 4800]


def test_a_tar_that_changes_after_the_start_is_named(tmp_path):
    path = write_tar(tmp_path / "t.tar", [("a.json", row()), ("a.wav", WAV)])
    rows = Rows(path)
    Path(path).write_bytes(b"?" * 2**15)
    with pytest.raises(AudioError, match=r"t\.tar \(\?\): not JSON"):
        rows.audio(0)


@pytest.mark.parametrize("name", ["a.opus", "a.FLAC", "./b/ä.ogg", "caf\udce9.wav"])
@pytest.mark.parametrize("how", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_as_other_systems_write_them_are_read(name, how, tmp_path):
    key, kind = name.rsplit(".", 1)
    format = {"format": "OGG", "subtype": "OPUS"} if kind == "opus" else {"format": kind}
    folder, _, base = key.rpartition("/")
    side = f"{folder}/._{base}".lstrip("/")  # macOS's beside each
    members = [(f"{side}.{kind}", b"\0\5\x16\7"), (name, audio_bytes(tone(1.0), **format)),
               (f"{side}.json", b"\0\5\x16\7"), (f"{key}.json", row(seconds=None))]
    rows = Rows(write_tar(tmp_path / "t.tar", members, format=how))
    assert len(rows) == 1 and len(rows.audio(0)) == RATE and name.split("/")[-1] in rows.name(0)
    assert rows.seconds.tolist() == [1.0]  # by the header


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_in_a_tar_are_refused_with_the_remedy(kind, tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        link = tarfile.TarInfo("b.wav")
        link.type, link.linkname = kind, "a.wav"
        tar.addfile(link)
    with pytest.raises(ValueError) as e:
        Rows(tmp_path / "t.tar")
    assert_one_line(e, f"{tmp_path / 't.tar'}: b.wav: a link or sparse",
                    "tar -h --hard-dereference")


BAD_TARS = {
    "audio without json": ([("a.wav", WAV)], ": a: audio without its partner"),
    "json without audio": ([("a.json", row())], ": a: .json without its partner"),
    "same part twice": ([("a.wav", WAV), ("a.flac", WAV), ("a.json", row())],
                        ": a.flac: comes twice"),
    "not JSON": ([("a.wav", WAV), ("a.json", b"{")], ": a.json: not JSON"),
    "empty answer": ([("a.wav", WAV), ("a.json", row(answer=""))], f" (a.wav): {UNFIT}"),
    "no members": ([], ": holds no rows"),
    "too long": ([("a.wav", WAV), ("a.json", row(seconds=31))], " (a.wav): 31.0"),
}


@pytest.mark.parametrize("fault", BAD_TARS)
def test_bad_tar_is_one_line_that_names_the_member(fault, tmp_path):
    members, says = BAD_TARS[fault]
    path = write_tar(tmp_path / "t.tar", members)
    with pytest.raises(ValueError) as e:
        Rows(path, answers=True, max_seconds=30)
    assert_one_line(e, f"{path}{says}")


def test_a_tar_cut_short_anywhere_is_refused(manifest, tmp_path):
    path = Path(write_tar(tmp_path / "t.tar", members_of(manifest)))
    whole = path.read_bytes()
    end = -(-len(whole.rstrip(b"\0")) // 512) * 512  # then empty blocks follow
    for left in (300, 512, 1100, end // 2, end // 1024 * 512, end - 512, end - 1, end, end + 100):
        path.write_bytes(whole[:left])
        with pytest.raises(ValueError, match="t.tar: .*cut short"):
            Rows(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(ValueError, match="t.tar: .*git lfs pull"):
        Rows(path)


def test_a_tar_with_a_hole_or_another_behind_it_is_refused(manifest, tmp_path):
    path = Path(write_tar(tmp_path / "t.tar", members_of(manifest)))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [m.offset for m in tar]
    broken = {at: whole[:at] + junk + whole[at + 512 :]
              for at in headers[1:] for junk in (bytes(512), b"\xff" * 512)}
    for at, raw in [*broken.items(), (len(whole), whole + whole)]:
        path.write_bytes(raw)
        with pytest.raises(ValueError, match="t.tar: .*damaged or several tars in one"):
            Rows(path)


# ---------------------------------------------------------------- sampling

@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Rows of three tasks of different size and length, without audio; and the training rows'
    numbers."""
    draw, lines = random.Random(0), []
    for task, n, longest in (("language", 700, 30), ("pitch", 90, 4), ("drum", 11, 1)):
        for _ in range(n):
            lines.append(row(task=task, seconds=round(draw.uniform(0.2, longest), 2),
                             split=draw.choice(["train", "train", "test"])))
    rows = Rows(write_manifest(tmp_path_factory.mktemp("many") / "m.jsonl", lines))
    return rows, rows.where("train")


def sampled(many, batch_seconds=60.0, temperature=2.0, weights=None, **how):
    rows, index = many
    return sample_batches(rows, index, task_shares(rows, index, temperature, weights),
                          batch_seconds, **how)


def first(many, n, *args, **how):
    return list(itertools.islice(sampled(many, *args, **how), n))


def pools(many, n, **how):
    """Row numbers of n whole pools."""
    return [i for _, batch in first(many, n * POOL, **how) for i in batch]


@pytest.mark.parametrize("position", [0, 1, 63, 64, 65, 200])
def test_resumed_at_any_position_the_stream_is_the_same(many, position):
    whole = first(many, position + 70, seed=3)
    assert first(many, 70, seed=3, start=position) == whole[position:]
    assert first(many, 70, seed=4, start=position) != whole[position:]


@pytest.mark.parametrize("how", [dict(temperature=1.0), dict(temperature=2.0),
                                 dict(temperature=1e9), dict(weights={"pitch": 3, "drum": 1})])
def test_tasks_have_exactly_their_share(many, how):
    rows, index = many
    weights = how.get("weights") or {
        task: sum(rows.task[index] == n) ** (1 / how["temperature"])
        for n, task in enumerate(rows.tasks)}
    taken = pools(many, 5, **how)
    counts = Counter(rows.tasks[t] for t in rows.task[taken])
    assert counts.keys() == weights.keys()
    for task, n in counts.items():  # rounding, here and of the whole
        assert abs(n - len(taken) * weights[task] / sum(weights.values())) <= 2


def test_weights_of_unknown_tasks_and_an_empty_split_are_refused(many):
    rows, index = many
    with pytest.raises(ValueError, match=r"lacks: \['yodel'\]; "
                                         r"it has \['drum', 'language', 'pitch'\]"):
        task_shares(rows, index, weights={"yodel": 1})
    with pytest.raises(ValueError, match="no rows to train on"):
        task_shares(rows, rows.where("valid"))
    for weights in ({"drum": 0}, {"drum": 1, "pitch": -0.5}, {"drum": math.nan}):
        with pytest.raises(ValueError, match="task weights {.*each must be a number of 0 or more"):
            task_shares(rows, index, weights=weights)


def test_every_row_of_a_task_comes_once_a_pass(many):
    rows, index = many
    for n in (1, 3, 8):
        counts = Counter(pools(many, n))
        assert set(counts) <= set(index.tolist())
        for task in np.unique(rows.task[index]):
            times = [counts[i] for i in index[rows.task[index] == task].tolist()]
            assert max(times) - min(times) <= 1


def test_each_pass_has_an_order_of_its_own(many):
    rows, index = many
    members = index[rows.task[index] == rows.tasks.index("pitch")]
    n, kept = len(members), {}
    take = lambda first, end, kept: next_rows(members, first, end, (0, 1, 1), kept).tolist()
    one, two = take(0, n, kept), take(n, 2 * n, kept)
    assert one != two and sorted(one) == sorted(two) == members.tolist()
    assert take(n - 3, n + 4, kept) == take(n - 3, n + 4, {}) == one[-3:] + two[:4]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_parts_make_up_the_stream_of_one_process(many, world):
    alone = first(many, 40 * world)
    parts = [first(many, 40, start=r, step=world) for r in range(world)]
    assert sorted(itertools.chain(*parts)) == alone
    assert [number for number, _ in parts[1]] == list(range(1, 40 * world, world))


@pytest.mark.parametrize("target", [40.0, 120.0])
def test_batches_hold_about_the_seconds_asked_for(many, target):
    rows, index = many
    batches = [batch for _, batch in first(many, 320, target)]
    padded = [len(b) * rows.seconds[b].max() for b in batches]
    assert 0.85 * target < np.mean(padded) < 1.1 * target and max(padded) < 1.5 * target
    # rows of like length: little padding
    assert sum(rows.seconds[b].sum() for b in batches) > 0.85 * sum(padded)


@pytest.mark.parametrize("seconds", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("tasks", [1, 7])
def test_no_batch_is_ever_empty(tmp_path, seconds, tasks):
    lines = [row(i, seconds=seconds, task=f"t{i % tasks}") for i in range(2 * tasks)]
    rows = Rows(write_manifest(tmp_path / "m.jsonl", lines))
    batches = first((rows, rows.where("train")), 4 * POOL, 1.0, temperature=1.7)
    assert all(0 < len(batch) <= 11 for _, batch in batches)
    assert [n for n, _ in batches] == list(range(len(batches)))


def test_tasks_of_nearly_one_length_are_mixed_within_batches(tmp_path):
    lines = [row(task=t, seconds=s) for t, s in (("drum", 1.0), ("pitch", 1.01))
             for _ in range(500)]
    rows = Rows(write_manifest(tmp_path / "m.jsonl", lines))
    batches = first((rows, rows.where("train")), 64, 10.0)
    assert sum(len(set(rows.task[batch].tolist())) == 2 for _, batch in batches) > 58


@pytest.mark.parametrize("ranks, least", [(8, 0.9), (32, 0.85)])
def test_ranks_have_like_work_text_included(ranks, least, tmp_path):
    """Mean / max over the ranks of padded audio and text, counted in the decoder's tokens of
    80 ms."""
    draw, lines = random.Random(0), []
    for task, n, longest, letters in (("language", 2000, 12, 0), ("transcribe", 2000, 12, 17),
                                      ("drum", 500, 1, 0)):
        for _ in range(n):
            seconds = draw.uniform(0.2, longest)
            answer = "x" * (8 + round(letters * seconds))
            lines.append(row(task=task, seconds=seconds, answer=answer))
    rows = Rows(write_manifest(tmp_path / "m.jsonl", lines), answers=True)
    work = [len(batch) * (rows.seconds[batch].max() / 0.08 + 15 + rows.text_bytes[batch].max() / 4)
            for _, batch in first((rows, rows.where("train")), 10 * POOL, 120.0)]
    work = np.array(work).reshape(-1, ranks)
    assert (work.mean(1) / work.max(1)).mean() > least


def test_held_out_rows_are_fixed_and_at_most_so_many_a_task(many):
    rows, _ = many
    test = rows.where("test")
    specs = held_out(rows, "test", 5, 60.0, seed=1)
    assert specs == held_out(rows, "test", 5, 60.0, seed=1)
    assert specs != held_out(rows, "test", 5, 60.0, seed=2)
    taken = [i for _, batch in specs for i in batch]
    assert len(taken) == len(set(taken)) and set(taken) <= set(test.tolist())
    sizes = Counter(rows.task[test].tolist())
    assert Counter(rows.task[taken].tolist()) == {t: min(n, 5) for t, n in sizes.items()}
    assert sum(len(batch) for _, batch in held_out(rows, "test", 0, 60.0)) == len(test)
    assert held_out(rows, "valid", 5, 60.0) == []


def test_held_out_rows_of_unknown_length_do_not_make_one_huge_batch(tmp_path):
    rows = Rows(write_manifest(tmp_path / "m.jsonl", [row(i, seconds=0) for i in range(500)]))
    batches = [batch for _, batch in held_out(rows, "train", 0, 2.0)]
    assert max(map(len, batches)) <= 20 and sorted(itertools.chain(*batches)) == list(range(500))


# ---------------------------------------------------------------- batches

class Letters:
    """A stand-in for the tokenizer: one id a letter."""
    prompt = answer = lambda self, text: [ord(c) for c in text]


@pytest.fixture
def untold(tmp_path):
    """Twelve clips; only every third row has an instruction."""
    lines = []
    for i in range(12):
        write_clip(tmp_path / f"clips/{i}.wav", tone(0.1 + 0.02 * i, 200 + 50 * i))
        told = {} if i % 3 == 0 else {"instruction": None}
        lines.append(row(i, seconds=0.1 + 0.02 * i, answer=f" note {i} ", **told))
    return write_manifest(tmp_path / "m.jsonl", lines)


def test_a_batch_holds_its_rows(untold):
    rows = Rows(untold, answers=True)
    batch = Batches(rows, Letters(), RATE)[0, [3, 0, 9]]
    assert batch.rows == [3, 0, 9] and batch.tasks == ["pitch"] * 3 and batch.skipped == []
    assert batch.texts == ["note 3", "note 0", "note 9"]
    assert batch.answers == [Letters().answer(t) for t in batch.texts]
    assert batch.prompts == [Letters().prompt("Which note?")] * 3
    assert batch.samples.tolist() == [len(rows.audio(i)) for i in batch.rows]
    assert batch.audio.shape == (3, max(batch.samples))
    for i, n, audio in zip(batch.rows, batch.samples, batch.audio):
        assert torch.equal(audio[:n], rows.audio(i)) and not audio[n:].any()
    # A worker sends it whole, by pipe: /dev/shm, where tensors would go, may be small.
    assert len(ForkingPickler.dumps(batch)) > batch.audio.nbytes


def test_batches_do_not_depend_on_the_number_of_workers(untold):
    rows = Rows(untold, answers=True)

    def stream(workers):
        specs = sampled((rows, rows.where("train")), 1.0, seed=5, start=60)
        batches = loader(Batches(rows, Letters(), RATE, seed=5), specs, workers)
        return [vars(batch) for batch in itertools.islice(batches, 8)]

    here = stream(0)
    assert len({tuple(batch["rows"]) for batch in here}) > 1
    for workers in (1, 2):
        for a, b in zip(here, stream(workers), strict=True):
            assert a.keys() == b.keys()
            for name, value in a.items():
                assert torch.equal(b[name], value) if torch.is_tensor(value) else b[name] == value


@pytest.mark.parametrize("others", [[], ["de", "zh"]])
def test_instructions_are_drawn_from_templates_and_languages_by_the_seed(others, untold):
    rows = Rows(untold, answers=True)
    templates = {code: read_templates(FILE)[code] for code in ["en", *others]}
    drawn = lambda seed: Batches(rows, Letters(), RATE, seed, templates=templates)[
        0, list(range(12)) * 60].instructions
    asked = drawn(1)
    assert asked == drawn(1) != drawn(2)
    foreign = [text for code in others for text in templates[code]["pitch"]]
    for i, english in ((0, {"Which note?"}), (1, set(TEMPLATES["pitch"]))):
        told = Counter(asked[i::3])  # 240 clips
        assert set(told) == english.union(foreign)
        assert all(55 < told[text] < 105 for text in foreign)  # a third


def test_a_task_without_translation_keeps_its_own_instruction(tmp_path):
    write_clip(tmp_path / "clips/0.wav")
    lines = [row(task="question"), row(task="birds")]
    rows = Rows(write_manifest(tmp_path / "m.jsonl", lines), answers=True)
    batches = Batches(rows, Letters(), RATE, templates=read_templates(FILE))
    assert set(batches[0, [0, 1] * 20].instructions) == {"Which note?"}


def test_unreadable_and_overlong_clips_are_skipped_and_named(untold, tmp_path):
    (tmp_path / "clips/4.wav").unlink()
    (tmp_path / "clips/7.wav").write_text("no audio")
    write_clip(tmp_path / "clips/1.wav", tone(0.5))  # its row says less
    batches = Batches(Rows(untold, answers=True), Letters(), RATE, max_seconds=0.3)
    batch = batches[0, [3, 4, 7, 8, 1]]
    assert batch.rows == [3, 8] and batch.texts == ["note 3", "note 8"]
    assert [task for task, _ in batch.skipped] == ["pitch"] * 3
    for i, says, (_, message) in zip((4, 7, 1), ("No such", "not readable", "--max-seconds 0.3"),
                                     batch.skipped):
        assert message.startswith(f"{untold}:{i + 1} (clips/{i}.wav): ") and says in message


def test_an_unreadable_batch_is_replaced_within_its_split_and_tasks(tmp_path):
    """No held-out row in training; tasks of other batches may have weight 0."""
    tasks = ["drum", "pitch", "language", "pitch", "drum", "pitch"]
    lines = [row(i, task=task, split="valid" if i == 5 else "train")
             for i, task in enumerate(tasks)]
    for i in (0, 2, 4, 5):
        write_clip(tmp_path / f"clips/{i}.wav")
    rows = Rows(write_manifest(tmp_path / "m.jsonl", lines), answers=True)
    batches = Batches(rows, Letters(), RATE)
    with pytest.raises(AudioError, match="2 clips in a row cannot be read"):
        batches[0, [1]]  # only 3 is of the same task and split
    assert batches[0, [3, 0]].rows == [0] and batches[0, [3, 1, 4]].rows == [4]
    write_clip(tmp_path / "clips/1.wav")
    assert batches[0, [3]].rows == [1]  # the one after 3, wrapping round


@pytest.mark.parametrize("rows, tried", [(5, 6), (100, 22)])
def test_when_nothing_can_be_read_that_soon_is_an_error(rows, tried, tmp_path):
    rows = Rows(write_manifest(tmp_path / "m.jsonl", [row(i) for i in range(rows)]), answers=True)
    with pytest.raises(AudioError) as e:
        Batches(rows, Letters(), RATE)[0, [3, 4]]
    assert_one_line(e, f"{tried} clips in a row cannot be read; the last: {tmp_path / 'm.jsonl'}:")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_workers_leave_signals_to_the_main_process(sent, manifest):
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", """
import signal, sys, time
from data import Batches, Rows, loader
class Ids:
    prompt = answer = lambda self, text: [1]
specs = [(n, [0, 1, 2]) for n in range(99)]
batches = iter(loader(Batches(Rows(sys.argv[1], answers=True), Ids(), 16_000), specs, 2))
next(batches), next(batches)  # one of each worker: both have begun
stop = []  # so these handlers are the main process's alone
for s in (signal.SIGINT, signal.SIGTERM):
    signal.signal(s, lambda number, _: stop.append(number))
print("ready", flush=True)
while not stop:
    time.sleep(0.01)
time.sleep(0.2)
assert len(list(batches)) == 97  # no worker has ended
print("a last checkpoint", flush=True)
""", manifest], cwd=Path(data.__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, sent)
    out, _ = process.communicate(timeout=60)
    assert out == "a last checkpoint\n" and process.returncode == 0


def test_every_task_has_instructions_in_every_language():
    for code, tasks in read_templates(FILE).items():
        assert set(TEMPLATES) - set(tasks) <= {"question"}
        texts = [text for several in tasks.values() for text in several]
        assert all(tasks.values()) and all(text.strip() == text != "" for text in texts)


@pytest.mark.parametrize("bad", ["[1]", "{", '{"en": {"pitch": "Which note?"}}',
                                 '{"de": {"pitch": []}}', '{"de": {"pitch": [" "]}}'])
def test_bad_instructions_are_one_line(bad, tmp_path):
    (tmp_path / "i.json").write_text(bad)
    with pytest.raises(ValueError) as e:
        read_templates(tmp_path / "i.json")
    assert_one_line(e, f"{tmp_path / 'i.json'}: ", "needs {language: {task: [texts]}}")


# ---------------------------------------------------------------- command line

def command(monkeypatch, *argv):
    """data.py's command line -> its exit code, or the message of one."""
    monkeypatch.setattr(sys, "argv", ["data.py", *argv])
    with pytest.raises(SystemExit) as e:
        data.main()
    return e.value.code


def test_command_line_lists_the_tasks_and_the_unreadable_clips(manifest, tmp_path, monkeypatch,
                                                               capsys):
    (tmp_path / "clips/2.wav").write_text("no audio")
    assert command(monkeypatch, manifest, "--decode") == 1
    out = capsys.readouterr().out
    assert re.search("pitch +train +6 rows", out)
    assert f"{manifest}:3 (clips/2.wav)" in out and "1 of 6 clips cannot be read" in out
    message = command(monkeypatch, str(tmp_path / "gone.jsonl"))
    assert message.startswith("error: ") and "gone.jsonl" in message and "No such" in message


# ---------------------------------------------------------------- index

@pytest.fixture
def index(manifest, tmp_path, monkeypatch):
    """An index of a manifest and a tar of it."""
    tar, path = write_tar(tmp_path / "t.tar", members_of(manifest)), str(tmp_path / "all.index")
    assert command(monkeypatch, manifest, tar, "--index", path) == 0
    return path, [manifest, tar]


def test_an_index_holds_the_same_rows(index):
    path, files = index
    mapped, scanned = Rows(path, answers=True, splits={"train"}, max_seconds=30), Rows(files)
    assert isinstance(mapped.table, np.memmap) and mapped.table.tobytes() == scanned.table.tobytes()
    for name in ("paths", "tasks", "splits", "split_counts"):
        assert getattr(mapped, name) == getattr(scanned, name)
    assert list(mapped) == list(scanned) and mapped.name(9) == scanned.name(9)
    assert torch.equal(mapped.audio(9), scanned.audio(9))
    (batch,) = loader(Batches(mapped, Letters(), RATE), [(0, [3, 9])], 1)
    assert batch.texts == ["note 3", "note 3"]


def test_what_an_index_holds_is_checked_by_those_who_use_it(tmp_path):
    lines = [row(0), row(1, answer="", split="test"), row(2, seconds=40)]
    path, index = write_manifest(tmp_path / "bad.jsonl", lines), str(tmp_path / "bad.index")
    data.write_index(Rows(path), index)
    assert len(Rows(index)) == len(Rows(index, answers=True, splits={"train"})) == 3
    with pytest.raises(ValueError, match=r"bad.jsonl:2 \(clips/1.wav\): training needs an answer"):
        Rows(index, answers=True)
    with pytest.raises(ValueError, match=r"bad.jsonl:3 \(clips/2.wav\): .* --max-seconds 30"):
        Rows(index, max_seconds=30)


def test_an_index_of_files_that_changed_and_other_misuse_are_refused(index, tmp_path):
    path, files = index
    with pytest.raises(ValueError, match=r"all.index: .* an index \(give it alone\)"):
        Rows([path, files[0]])
    for name, raw in (("no.index", b"{"), ("cut.index", Path(path).read_bytes()[:-100])):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(ValueError, match=f"{name}: is no index"):
            Rows(tmp_path / name)
    with open(files[0], "a") as f:
        f.write("\n")
    with pytest.raises(ValueError, match="all.index: .*m.jsonl has changed; write the index again"):
        Rows(path)
    Path(files[0]).unlink()
    with pytest.raises(OSError, match="m.jsonl"):
        Rows(path)


def test_an_index_overwrites_neither_data_nor_the_index_in_use(index, monkeypatch):
    path, (manifest, _) = index
    before = Path(manifest).read_bytes()
    message = command(monkeypatch, manifest, "--index", manifest)
    assert message == f"error: {manifest}: an index must be named FILE.index"
    assert Path(manifest).read_bytes() == before
    mapped = Rows(path)
    data.write_index(mapped, path)
    assert list(mapped) == list(Rows(path))
