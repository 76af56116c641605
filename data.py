"""Rows -> batches: manifests and tars, decoding, instructions, length buckets, task mixing.

    python data.py A.jsonl 'shards/*.tar' [--decode]    # what is there; can it be read?
    python data.py 'shards/*.tar' --index all.index     # scanned once; opens at once

Knows no model: audio comes out as samples, text as the ids of a given tokenizer.
"""
import argparse
import difflib
import glob
import io
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import sys
import tarfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import soundfile as sf
import torch
from torch.utils.data import DataLoader, Dataset

# What to ask when a row has no instruction of its own, by task; extend at will.
# assumption: the paper gives no wording.
TEMPLATES = {
    "transcribe": ["Transcribe the speech.", "What is said?", "Write down the spoken words."],
    "translate": ["Translate the speech into English.", "What is said, in English?"],
    "language": ["Which language is spoken?", "Name the language of the speech.",
                 "What language is this?"],
    "accent": ["Which accent does the speaker have?", "Name the speaker's accent."],
    "emotion": ["What emotion does the speaker show?", "How does the speaker feel?",
                "Name the emotion in the voice."],
    "speaker": ["Who is speaking?", "Name the speaker.", "Which speaker is this?"],
    "voice": ["Which voice is speaking?", "Name the voice."],
    "gender": ["Is the speaker male or female?", "What is the speaker's gender?"],
    "age": ["How old is the speaker?", "What age group is the speaker in?"],
    "keyword": ["Which keyword is spoken?", "Name the spoken keyword.", "What is the keyword?"],
    "command": ["Which word is spoken?", "Name the spoken command.", "What is the spoken word?"],
    "intent": ["What does the speaker want?", "Name the intent of the speech."],
    "count": ["How many are there?", "Count them."],
    "speaker_count": ["How many people are speaking?", "Count the speakers.",
                      "How many voices are there?"],
    "spoof": ["Is the speech real or synthetic?", "Is this voice genuine?"],
    "vocal_sound": ["What sound does the person make?", "Name the vocal sound."],
    "sound_event": ["What makes this sound?", "Name the sound.", "What is heard?"],
    "game_sound": ["What makes this sound?", "Name the sound.", "What is heard?"],
    "scene": ["Where was this recorded?", "Name the acoustic scene."],
    "tagging": ["Which sounds are heard? List them.", "List the tags of this audio.",
                "Name all sounds."],
    "caption": ["Describe the audio.", "What happens in this audio?",
                "Write a caption for the audio."],
    "question": ["Answer the question about the audio."],
    "instrument": ["Which instrument is playing?", "Name the instrument.",
                   "What instrument is this?"],
    "genre": ["Which genre is this music?", "Name the genre.", "What kind of music is this?"],
    "pitch": ["Which note is played?", "Name the note.", "What pitch is this?"],
    "drum": ["Which drum is hit?", "Name the drum."],
    "music_tagging": ["Which tags describe this music? List them.", "List the tags of this music."],
    "music_caption": ["Describe the music.", "Write a caption for the music."],
}


# ---------------------------------------------------------------- audio

# libsndfile gives more frames where a header tells no length.
UNKNOWN = 2**40
# A writer that cannot seek back leaves this size, in bytes, or more.
PIPED = 2**31 - 2**16
POINTER = b"version https://git-lfs"
# What a stream begins with, and the frame of an MP3 that tells flags, frames and bytes.
STREAM = re.compile(rb"(RIFF|RF64)....WAVE|riff\x2e\x91|FORM....AIF|fLaC\0\0\0\x22|"
                    rb"OggS\0[\2\3]|\.snd\0|caff\0", re.S)
MP3_LENGTH = re.compile(rb"\xff[\xe2-\xff].{2,4}\0{9,32}(?:Xing|Info|VBRI)"
                        rb"(.{4}).{4}(.{4})", re.S)


class AudioError(ValueError):
    """A clip that cannot be used: one line with its name and the reason."""


def printable(text) -> str:
    """With escapes for what is not UTF-8 in a file's name."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def read_bytes(path, at: int = 0, size: int = -1) -> bytes:
    """Part of a file, in three attempts: a network disk may fail for a moment."""
    for wait in (0.1, 0.4, None):  # seconds
        try:
            with open(path, "rb") as f:
                f.seek(at)
                return f.read(size)
        except (OSError, ValueError) as e:
            if wait is None:
                raise AudioError(printable(f"{path}: {e.args[-1]}")) from None
            time.sleep(wait)


def read_audio(source, sample_rate=16_000, max_seconds=None, name=None, silence=False):
    """A file's path or its bytes -> (S,) float32 at `sample_rate`, channels averaged.

    Raises AudioError: unreadable, cut, too long, not finite, all zero (unless `silence`).
    """
    if not isinstance(source, bytes):
        name, source = name or source, read_bytes(source)
    try:
        samples, rate = decode(source)
        check_length(len(samples) / rate, max_seconds)
        if not len(samples):
            raise AudioError("holds no samples")
        if not np.isfinite(samples).all():
            raise AudioError("holds samples that are NaN or infinite")
        if not silence and not samples.any():
            raise AudioError("all samples are zero")
        channels = samples.shape[1]
        mono = samples @ np.full(channels, 1 / channels, np.float32)
        power = [np.dot(channel, channel) for channel in samples.T]
        if np.dot(mono, mono) < 0.01 * max(power):  # the channels cancel: take the loudest
            mono = samples[:, np.argmax(power)].copy()
        return resample(torch.from_numpy(mono), rate, sample_rate)
    except AudioError as e:
        fault = e
    except Exception as e:  # libsndfile and soundfile raise many kinds
        why = getattr(e, "error_string", e)
        fault = f"not readable as audio ({why}); ffmpeg -i IN OUT.flac"
    raise AudioError(printable(f"{name or 'audio'}: {fault}"))


def check_length(seconds: float, limit: float | None) -> None:
    if limit is not None and seconds > limit + 1e-3:
        raise AudioError(f"{seconds:.1f} s, longer than --max-seconds {limit:g}; "
                         "cut it or raise the limit")


def decode(raw: bytes) -> tuple[np.ndarray, int]:
    """A file's bytes -> (samples (S, channels) float32, rate in Hz)."""
    if not raw or raw.startswith(POINTER):
        raise AudioError("a pointer; git lfs pull" if raw else "the file is empty")
    if holds_another(raw):
        raise AudioError("several recordings in one file; split it, or join them: "
                         "ffmpeg -i IN OUT.flac (not WAV, AIFF)")
    with sf.SoundFile(io.BytesIO(raw)) as f:
        rate, frames, log = f.samplerate, f.frames, f.extra_info
        if f.format == "MP3" and not MP3_LENGTH.search(raw):
            with sf.SoundFile(Lengthless(raw)) as f:
                return f.read(f.frames, "float32", always_2d=True), rate
        if frames > UNKNOWN:
            raise AudioError("its header does not tell its length; ffmpeg -i IN OUT.flac")
        size = int(re.search(r"\ndata : (\d+)|$", log)[1] or PIPED)
        # After data of too small a size comes no chunk, but more data.
        too_small = not frames or "Unknown chunk marker" in log
        if raw[:4] == b"RIFF" and size < PIPED and too_small:
            header = b"data" + struct.pack("<I", size)
            return decode(raw.replace(header, b"data\xff\xff\xff\xff", 1))
        samples = f.read(frames, "float32", always_2d=True)
    if len(samples) < frames or is_cut(raw, log):
        raise AudioError(f"cut short, {len(samples)} samples are left; fetch it again")
    return samples, rate


class Lengthless(io.BytesIO):
    """Seems longer, so that libsndfile reads an MP3 without a length to its end."""

    def seek(self, offset, whence=0):
        if (offset, whence) == (0, os.SEEK_END):
            offset, whence = 40 * len(self.getvalue()), os.SEEK_SET
        return super().seek(offset, whence)


def holds_another(raw: bytes) -> bool:
    """Does a second stream follow the first, as `cat` joins them?"""
    told = MP3_LENGTH.search(raw) if raw[:1] == b"\xff" or raw[:3] == b"ID3" else None
    if told:
        has_bytes = told[1][3] & 3 == 3
        end = told.start() + int.from_bytes(told[2], "big") if has_bytes else len(raw)
        untold_before = raw[:1] == b"\xff" and told.start() > 0
        told_after = MP3_LENGTH.search(raw, told.end()) is not None
        return untold_before or told_after or raw[end : end + 1] == b"\xff"
    # All tracks of one Ogg stream begin before byte 300.
    at = raw.find(raw[:4], 300) if STREAM.match(raw) else -1
    while at > 0 and not STREAM.match(raw, at):
        at = raw.find(raw[:4], at + 1)
    return at > 0


def is_cut(raw: bytes, log: str) -> bool:
    """libsndfile reads what is left of a WAV or Ogg file that is cut short."""
    if raw[:4] == b"OggS":  # the last page must be whole
        page = raw[raw.rfind(b"OggS") :]
        end = 27 + page[26] + sum(page[27 : 27 + page[26]]) if len(page) > 26 else 27
        return len(page) < end
    told = re.search(r"(data|SSND|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)", log)
    size, there = (int(told[2]), int(told[3])) if told else (0, 0)
    # Nothing is missing if the file's size is right, or the data's counts the header.
    file_size = 8 + int.from_bytes(raw[4:8], "big" if raw[:4] == b"FORM" else "little")
    return there < size < PIPED and len(raw) not in (file_size, size, size + 8)


@lru_cache(maxsize=32)
def sinc_kernel(old: int, new: int, zeros: int = 64, attenuation: float = 80.0):
    """Kaiser-windowed sinc of `new` phases: ((old + 2 * reach, new), reach).

    `zeros` zero crossings a side; images and aliases lie `attenuation` dB down (Kaiser's
    formulas); the pass band ends 8 % below the lower Nyquist frequency.
    """
    beta = 0.1102 * (attenuation - 8.7)
    # The stop band begins at the lower Nyquist frequency.
    transition = (attenuation - 8) / (2.285 * 2 * zeros * math.pi)
    cutoff = min(old, new) * (1 - transition / 2)
    reach = math.ceil(zeros * old / cutoff)  # input samples
    taps = torch.arange(-reach, old + reach, dtype=torch.float64)[:, None]
    phases = torch.arange(new, dtype=torch.float64)
    t = (taps / old - phases / new) * cutoff  # in zero crossings
    bell = beta * (1 - (t / zeros).square()).clamp(min=0).sqrt()
    window = torch.special.i0(bell) / torch.special.i0(torch.tensor(beta))
    kernel = torch.where(t.abs() < zeros, torch.sinc(t) * window, 0.0) * cutoff / old
    return kernel.float(), reach


def resample(audio: torch.Tensor, rate: int, new_rate: int = 16_000) -> torch.Tensor:
    """Band-limited windowed sinc: (..., S) at `rate` -> (..., ceil(S * new_rate / rate))."""
    if rate == new_rate:
        return audio
    if rate * new_rate // math.gcd(rate, new_rate) ** 2 > 2**21:
        rate = round(rate, -1)  # 11,127 Hz, for example, would need a huge filter
    step, samples = math.gcd(rate, new_rate), audio.shape[-1]
    widen = max(1, 64 * step // new_rate)  # a product of few columns is slow
    old, new = widen * rate // step, widen * new_rate // step
    kernel, reach = sinc_kernel(old, new)
    padded = torch.nn.functional.pad(audio, (reach, reach + -samples % old))
    out = padded.unfold(-1, len(kernel), old) @ kernel  # (..., blocks, new)
    return out.flatten(-2)[..., : -(-samples * new // old)]


# ---------------------------------------------------------------- rows

AUDIO_SUFFIXES = (".flac", ".wav", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".webm")
KEYS = ("audio", "instruction", "answer", "task", "split", "label", "seconds")
MEANT = dict(zip(KEYS, KEYS), set="split", fold="split", question="instruction",
             prompt="instruction")
SILENT = re.compile("silen|quiet|nothing|empty|no (sound|speech|audio)", re.I)
# What is kept of a row: where its JSON lies, and its audio in a tar (-1: a file of its own);
# seconds; bytes of text (-1: unfit for training); numbers of its file, task and split.
ROW = np.dtype([("at", "i8"), ("audio_at", "i8"), ("audio_size", "i8"), ("size", "i4"),
                ("seconds", "f4"), ("text", "i4"), ("file", "i4"), ("task", "i4"), ("split", "i4")])
pack_row = struct.Struct("<qqqifiiii").pack


def scan_manifest(path: str):
    """A JSON Lines file -> (name for messages, row's JSON, folder of its audio, place)."""
    at = 0
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if at == 0 and re.match(POINTER + rb"|\W*(\[|\{\s*$)", line):
                raise ValueError("needs one JSON object a line; for an array jq -c '.[]' "
                                 "IN > OUT, indented jq -c ., a pointer git lfs pull")
            if not line.isspace():
                yield f"{path}:{number}", line, os.path.dirname(path), (at, -1, 0, len(line))
            at += len(line)


def scan_tar(path: str):
    """A tar -> (name for messages, row's JSON, its audio as an open file, place).

    KEY.json meets KEY.flac in the order they come, so that a key may occur again later.
    """
    waiting = {}  # key -> {kind: member}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            tar.members.clear()  # it would keep them all
            key, suffix = os.path.splitext(os.path.normpath(member.name))
            if suffix.lower() not in (".json", *AUDIO_SUFFIXES) or "/._" in "/" + key:
                continue  # macOS packs ._a.wav beside a.wav
            kind = "json" if suffix.lower() == ".json" else "audio"
            pair = waiting.setdefault(key, {})
            if not member.isreg() or member.issparse():
                raise ValueError(f"{member.name}: a link or sparse; pack with "
                                 "tar -h --hard-dereference")
            if kind in pair:
                raise ValueError(f"{member.name}: comes twice before its partner; "
                                 "give each clip its own key")
            pair[kind] = member
            if len(pair) == 2:
                text, audio = waiting.pop(key)["json"], pair["audio"]
                place = text.offset_data, audio.offset_data, audio.size, text.size
                text, audio = tar.extractfile(text).read(), tar.extractfile(audio)
                yield f"{path}: {key}.json", text, audio, place
        # tarfile stops at what is no header.
        rest = os.path.getsize(path) - tar.offset
        if not 512 <= rest <= 2**20 or read_bytes(path, tar.offset).strip(b"\0"):
            raise ValueError(f"cut short, damaged or several tars in one, after {tar.offset} "
                             "bytes; fetch it again")
    for key, pair in waiting.items():
        lacks = "audio without its .json" if "audio" in pair else ".json without its audio"
        raise ValueError(f"{key}: {lacks}")


def parse_row(text: bytes, in_tar: bool) -> dict:
    """A row from its JSON. Raises ValueError."""
    try:
        text = text.decode("utf-8-sig", "surrogateescape")  # for the file's name
        row = json.loads(text, parse_constant=refuse)
    except ValueError as e:
        raise ValueError(f"not JSON ({e})") from None
    if in_tar and isinstance(row, list):
        return {"events": row}  # so X-ARES publishes DESED and MAESTRO
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if not in_tar and not (isinstance(row.get("audio"), str) and row["audio"]):
        raise ValueError('lacks "audio", the clip\'s path relative to this file')
    return row


def refuse(constant: str):
    raise ValueError(f"{constant} is no JSON; use null")


def text_of(row: dict, key: str, usual: str) -> str:
    return usual if row.get(key) is None else str(row[key])


def check_row(row: dict, seconds, answers, max_seconds) -> int:
    """A row's text_bytes, -1 if it is unfit for training. Raises ValueError."""
    # Tars of others, which are probed, have keys of their own.
    own = answers or "audio" in row
    for key in row:
        meant = meant_key(key)
        if own and meant and meant not in row:
            raise ValueError(f'has "{key}" but no "{meant}"; rename or drop it')
    if not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
        raise ValueError(f"seconds is {seconds!r}; need a number")
    check_length(seconds, max_seconds)
    try:
        return text_bytes(row)
    except ValueError:
        if answers:
            raise
        return -1


@lru_cache(maxsize=1000)
def meant_key(key: str) -> str | None:
    """The key, or the one that its writer is likely to have meant."""
    close = difflib.get_close_matches(key.lower(), MEANT, 1, 0.8)
    return MEANT[close[0]] if close else None


def header_seconds(clip) -> float:
    """0 where the header does not tell: the clip is named when it is read."""
    try:
        info = sf.info(clip)
        return info.duration if info.frames <= UNKNOWN else 0.0
    except Exception:  # libsndfile and soundfile raise many kinds
        return 0.0


def text_bytes(row: dict) -> int:
    """Bytes of a row's instruction and answer. Raises ValueError if unfit for training."""
    answer, instruction = row.get("answer"), row.get("instruction") or ""
    task = text_of(row, "task", "")
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"answer is {answer!r}; training needs a text")
    if not isinstance(instruction, str):
        raise ValueError(f"instruction is {instruction!r}; need a text")
    if not instruction and task not in TEMPLATES:
        raise ValueError(f"no instruction, and task {task!r} has no templates; "
                         "add either (TEMPLATES in data.py)")
    return len(((instruction or TEMPLATES[task][0]) + answer).encode())


def scan(paths: list[str], answers, keep, max_seconds):
    """Manifests and tars -> (names and counts; table of ROW), see Rows."""
    table, problems = bytearray(), []
    tasks, splits, counts = {}, {}, Counter()
    for number, path in enumerate(paths):
        before, in_tar = counts.total(), path.endswith(".tar")
        try:
            entries = scan_tar(path) if in_tar else scan_manifest(path)
            for name, text, clip, place in entries:
                try:
                    row = parse_row(text, in_tar)
                    task = text_of(row, "task", "")
                    split = text_of(row, "split", "train")
                    counts[split] += 1
                    if keep is not None and split not in keep:
                        continue
                    clip = clip if in_tar else os.fsencode(os.path.join(clip, row["audio"]))
                    seconds = row["seconds"] if "seconds" in row else header_seconds(clip)
                    text = check_row(row, seconds, answers, max_seconds)
                    table += pack_row(*place, seconds, text, number,
                                      tasks.setdefault(task, len(tasks)),
                                      splits.setdefault(split, len(splits)))
                except ValueError as e:
                    problems.append(f"{name}: {e}")
            if counts.total() == before and not problems:
                raise ValueError("holds no rows")
        except tarfile.ReadError as e:
            problems.append(f"{path}: not a plain tar, or cut short ({e}); unpack a .gz "
                            "first, else fetch it again (git lfs pull)")
        except ValueError as e:
            problems.append(f"{path}: {e}")
    if problems:
        more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise ValueError(printable("\n".join(problems[:10] + more)))
    facts = dict(paths=paths, tasks=list(tasks), splits=list(splits), split_counts=counts)
    return facts, np.frombuffer(table, ROW)


def write_index(rows: "Rows", path: str) -> None:
    """A line of JSON, then the rows' table, which all processes map into memory."""
    paths = [os.path.abspath(data) for data in rows.paths]
    facts = dict(paths=paths, tasks=rows.tasks, splits=rows.splits, rows=len(rows),
                 split_counts=rows.split_counts, stamps=[stamp(data) for data in paths])
    head = json.dumps(facts).encode()
    with open(path, "wb") as f:
        f.write(head + b" " * (63 - len(head) % 64) + b"\n")
        f.write(rows.table)


def open_index(path: str):
    try:
        with open(path, "rb") as f:
            head = f.readline()
        facts = json.loads(head)
        table = np.memmap(path, ROW, "r", len(head), (facts["rows"],))
    except (ValueError, KeyError):
        raise ValueError(f"{path}: is no index; write it again") from None
    for data, before in zip(facts["paths"], facts["stamps"]):
        if stamp(data) != before:
            raise ValueError(f"{path}: {data} has changed; write the index again")
    return facts, table


def stamp(path: str) -> list[int]:
    return [os.stat(path).st_size, os.stat(path).st_mtime_ns]


class Rows:
    """The rows of manifests and tars, or of one index of them, read when asked for.

    rows[i] is row i's dictionary, rows.audio(i) its samples, rows.name(i) its place.
    Arrays: seconds, task and split (numbers into tasks, splits), text (bytes).
    split_counts: {split: rows}, those left out included.

    answers: all must be fit for training. splits: keep only these (a row without one is
    "train"; an index keeps all). max_seconds: none may be longer.
    Raises ValueError with one line for each of the first ten bad rows.
    """

    def __init__(self, paths, answers=False, splits=None, max_seconds=None):
        paths = expand([paths] if isinstance(paths, (str, os.PathLike)) else paths)
        if paths[0].endswith(".index"):
            facts, self.table = open_index(*paths)
        else:
            facts, self.table = scan(paths, answers, splits, max_seconds)
        self.paths, self.tasks, self.splits = facts["paths"], facts["tasks"], facts["splits"]
        self.split_counts = facts["split_counts"]
        self.seconds, self.text = self.table["seconds"], self.table["text"]
        self.task, self.split = self.table["task"], self.table["split"]
        limit = math.inf if max_seconds is None else max_seconds + 1e-3
        # What a scan would have refused may be in an index.
        bad = (self.seconds > limit) | (self.text < 0) & answers
        for i in np.flatnonzero(bad).tolist():
            if splits is None or self.splits[self.split[i]] in splits:
                try:
                    check_row(self[i], self.seconds[i].item(), answers, max_seconds)
                except ValueError as e:
                    raise ValueError(f"{self.name(i)}: {e}") from None

    def __len__(self):
        return len(self.table)

    def __getitem__(self, i: int) -> dict:
        at, audio_at, _, size, *_, file, _, _ = self.table[i].item()
        text = read_bytes(self.paths[file], at, size)
        try:
            return parse_row(text, audio_at >= 0)
        except ValueError:
            raise AudioError(printable(f"{self.paths[file]}: no row at byte {at} any more; it "
                                       "has changed since the start")) from None

    def clip(self, i: int, row: dict | None = None) -> tuple[str, int, int]:
        """Where row i's audio lies: file, start, size (-1: to its end)."""
        _, at, size, *_, file, _, _ = self.table[i].item()
        path = self.paths[file]
        if at >= 0:
            return path, at, size
        return os.path.join(os.path.dirname(path), (row or self[i])["audio"]), 0, -1

    def read(self, i: int, sample_rate=16_000, max_seconds=None):
        """Row i and its samples (S,), float32. Raises AudioError."""
        try:
            row = self[i]
            silence = bool(SILENT.search(f"{row.get('label')} {row.get('answer')}"))
            raw = read_bytes(*self.clip(i, row))
            return row, read_audio(raw, sample_rate, max_seconds, "audio", silence)
        except AudioError as e:
            raise AudioError(f"{self.name(i)}: {e}") from None

    def audio(self, i: int, sample_rate=16_000, max_seconds=None) -> torch.Tensor:
        return self.read(i, sample_rate, max_seconds)[1]

    def name(self, i: int) -> str:
        """Row i's place, for a message: manifest:line (audio), or tar (member)."""
        at, audio_at, *_, file, _, _ = self.table[i].item()
        path, name = self.paths[file], "?"
        try:
            if audio_at < 0:
                line = 1
                for block in range(0, at, 2**20):
                    line += read_bytes(path, block, min(2**20, at - block)).count(b"\n")
                path, name = f"{path}:{line}", self[i]["audio"]
            else:
                with tarfile.open(path) as tar:
                    name = next(m.name for m in tar if m.offset_data == audio_at)
        except (OSError, ValueError, tarfile.TarError, StopIteration):
            pass  # it has vanished
        return printable(f"{path} ({name})")

    def where(self, split: str) -> np.ndarray:
        """Numbers of the rows of a split, int32."""
        number = self.splits.index(split) if split in self.splits else -1
        return np.flatnonzero(self.split == number).astype(np.int32)


def expand(paths) -> list[str]:
    """Paths and globs -> the files' paths."""
    found = []
    for path in map(str, paths):
        if os.path.isdir(path):
            raise ValueError(f"{path}: a folder; name its files, such as '{path}/*.jsonl'")
        hits = [path] if os.path.exists(path) else sorted(glob.glob(path))
        if not hits:
            raise FileNotFoundError(f"{path}: no such manifest or tar (write {{00..99}} "
                                    "without quotes)")
        found += hits
    for path, times in Counter(map(os.path.realpath, found)).items():
        if times > 1:
            raise ValueError(f"{path}: named twice among the data")
        if path.endswith((".gz", ".tgz")):
            raise ValueError(f"{path}: is compressed; unpack it first")
        if path.endswith(".index") and len(found) > 1:
            raise ValueError(f"{path}: name an index alone")
    return found


# ---------------------------------------------------------------- sampling

POOL = 64  # batches
# Lengths vary by this share before they are sorted: one task alone must not fill a batch.
JITTER = 0.1
SHORTEST = 0.1  # seconds
# A batch costs its rows times (longest audio + longest text), for both are padded. A token of
# text, of 4 bytes, costs what one of audio does, 0.08 s; a prompt has 15 tokens of its own.
TOKEN_SECONDS = 0.08


def task_shares(rows: Rows, index, temperature=2.0, weights=None) -> dict[int, float]:
    """{task number: its share of the rows in training}, for the rows numbered `index`.

    weights: {task: weight}; else tasks weigh rows ** (1 / temperature): 1 as they are, higher
    evens them out. Raises ValueError.
    """
    counts = np.bincount(rows.task[index], minlength=len(rows.tasks)).tolist()
    sizes = {task: n for task, n in zip(rows.tasks, counts) if n}
    unknown = sorted(set(weights or {}) - set(sizes))
    if not sizes:
        raise ValueError("no rows to train on: no row has the split that --train-split names")
    if unknown:
        raise ValueError(f"weights name tasks that the data lacks: {unknown}; "
                         f"it has {sorted(sizes)}")
    shares = {}
    for task, n in sizes.items():
        weight = weights.get(task, 0.0) if weights else n ** (1 / temperature)
        shares[rows.tasks.index(task)] = weight
    total = sum(shares.values())
    if not 0 < total < math.inf or min(shares.values()) < 0:
        raise ValueError(f"task weights {weights}: each must be a number of 0 or more, "
                         "and one must be above")
    return {task: weight / total for task, weight in shares.items() if weight}


def sample_batches(rows: Rows, index, shares, batch_seconds: float, seed=0, start=0, step=1):
    """Endless seeded batches: yields (batch number, row numbers), batch `start` first.

    Batches come in pools of 64. A pool takes from every task its exact share, next in line of
    that task's shuffled passes; sorts these rows by length; cuts them into batches of equal
    cost, on average `batch_seconds` of padded audio; shuffles the batches. Any pool can be made
    without those before it, so the state of a run is one number: the batches that all ranks
    have taken. Rank r of R starts at this number + r, with step R.
    """
    members, mean, task_of = {}, 0.0, rows.task[index]
    for task, share in shares.items():
        members[task] = index[task_of == task]
        seconds = np.maximum(rows.seconds[members[task]], SHORTEST)
        mean += share * float(seconds.mean())
    # Rounding can take a row from each task's share of a pool; every batch needs a row.
    size = max(POOL + len(shares), 0.95 * POOL * batch_seconds / mean)
    pool, number = None, start
    while True:
        if pool != number // POOL:
            pool, picked = number // POOL, []
            for task, share in shares.items():
                first, last = round(size * share * pool), round(size * share * (pool + 1))
                picked.append(next_rows(members[task], first, last, (seed, 1, task)))
            draw = np.random.default_rng([seed, 2, pool])
            batches = cut_evenly(rows, np.concatenate(picked), draw)
        yield number, batches[number % POOL]
        number += step


def next_rows(members, first: int, last: int, seed: tuple) -> np.ndarray:
    """Rows `first` to `last` of a task's endless line: its passes, each shuffled anew."""
    n, picked = len(members), [members[:0]]
    for turn in range(first // n, -(-last // n)):
        order = shuffled(n, (*seed, turn))
        picked.append(members[order[max(first - turn * n, 0) : last - turn * n]])
    return np.concatenate(picked)


@lru_cache(maxsize=256)
def shuffled(n: int, seed: tuple) -> np.ndarray:
    return np.random.default_rng(seed).permutation(n).astype(np.int32)


def cut_evenly(rows: Rows, picked, draw) -> list[list[int]]:
    """A pool's rows -> its batches, of like length and cost, in random order."""
    seconds = np.maximum(rows.seconds[picked], SHORTEST)
    text = TOKEN_SECONDS * (15 + np.maximum(rows.text[picked], 0) / 4)
    about = seconds * draw.uniform(1 - JITTER, 1 + JITTER, len(picked)) + text
    order = np.argsort(about, kind="stable")
    picked, seconds = picked[order].tolist(), seconds[order].tolist()
    text = text[order].tolist()
    low, high = 0.0, len(picked) * (max(seconds) + max(text))
    for _ in range(24):  # the smallest limit that gives no more batches
        middle = (low + high) / 2
        if len(cut(picked, seconds, middle, text)) <= POOL:
            high = middle
        else:
            low = middle
    batches = cut(picked, seconds, high, text)
    # Ties can leave a batch too few: halve the fullest.
    while len(batches) < POOL:
        sizes = [len(batch) for batch in batches]
        fullest, half = sizes.index(max(sizes)), max(sizes) // 2
        batches[fullest : fullest + 1] = batches[fullest][:half], batches[fullest][half:]
    draw.shuffle(batches)
    return batches


def cut(rows, seconds, limit: float, text=None) -> list[list[int]]:
    """Rows, about sorted -> batches that cost at most `limit` seconds, or of a single row."""
    batches, longest, wordiest = [], 0.0, 0.0
    for row, s, t in zip(rows, seconds, text or [0.0] * len(rows)):
        longest, wordiest = max(longest, s), max(wordiest, t)
        if not batches or (len(batches[-1]) + 1) * (longest + wordiest) > limit:
            batches.append([])
            longest, wordiest = s, t
        batches[-1].append(row)
    return batches


def held_out(rows: Rows, split: str, per_task: int, batch_seconds: float, seed=0):
    """A fixed held-out set as (number, row numbers) of its batches: up to `per_task` rows of
    each task (0: all), by length."""
    index, picked = rows.where(split), []
    for task in np.unique(rows.task[index]):
        members = index[rows.task[index] == task]
        order = np.random.default_rng([seed, 3, int(task)]).permutation(len(members))
        picked += members[order[: per_task or None]].tolist()
    picked.sort(key=lambda i: (rows.seconds[i], i))
    return list(enumerate(cut(picked, rows.seconds[picked], batch_seconds)))


# ---------------------------------------------------------------- batches

@dataclass(frozen=True)
class Batch:
    """B clips and their texts. skipped: (task, message) of clips that cannot be read."""
    audio: torch.Tensor  # (B, S) float32, zero beyond `samples`
    samples: torch.Tensor  # (B,) on the CPU
    prompts: list[list[int]]
    answers: list[list[int]]
    tasks: list[str]
    rows: list[int]
    instructions: list[str]  # the prompts' texts
    texts: list[str]  # the answers'
    skipped: list[tuple[str, str]]

    @property
    def answer_tokens(self) -> list[int]:
        return [len(answer) for answer in self.answers]

    # Workers hand tensors over in /dev/shm, and die where it is full: a container has 64 MiB.
    # Arrays go through a pipe, a little slower.
    def __getstate__(self):
        shm = "/dev/shm"
        if os.path.exists(shm) and shutil.disk_usage(shm).free > 2**32:
            return vars(self)
        return vars(self) | dict(audio=self.audio.numpy(), samples=self.samples.numpy())

    def __setstate__(self, state):
        audio, samples = torch.as_tensor(state["audio"]), torch.as_tensor(state["samples"])
        vars(self).update(state, audio=audio, samples=samples)

    def pin_memory(self):
        return replace(self, audio=self.audio.pin_memory())

    def to(self, device):
        return replace(self, audio=self.audio.to(device, non_blocking=True))


class Batches(Dataset):
    """(batch number, row numbers) -> Batch: reads, draws instructions, tokenises.

    tokenizer: has prompt(instruction) -> ids and answer(text) -> ids.
    """

    def __init__(self, rows: Rows, tokenizer, seed=0, max_seconds=None, sample_rate=16_000):
        self.rows, self.tokenizer, self.seed = rows, tokenizer, seed
        self.max_seconds, self.sample_rate = max_seconds, sample_rate

    def __getitem__(self, spec) -> Batch:
        number, wanted = spec
        clips, skipped = {}, []  # row number -> (row, audio)
        self._read(wanted, clips, skipped)
        if not clips:  # every rank needs a batch: take the next row of this split
            same = np.flatnonzero(self.rows.split == self.rows.split[wanted[0]])
            after = np.roll(same, -1 - np.searchsorted(same, wanted[0]))[:-1]
            for i in after[:20].tolist():
                if not clips:
                    self._read([i], clips, skipped)
        if not clips:
            raise AudioError(f"{len(skipped)} clips in a row cannot be read; "
                             f"the last: {skipped[-1][1]}")
        draw = random.Random(f"{self.seed}/{number}")
        kept = [i for i in wanted if i in clips] or list(clips)
        tasks = [self.rows.tasks[self.rows.task[i]] for i in kept]
        audio = [clips[i][1] for i in kept]
        texts = [clips[i][0]["answer"].strip() for i in kept]
        instructions = []
        for i, task in zip(kept, tasks):
            own = clips[i][0].get("instruction")
            instructions.append(own or draw.choice(TEMPLATES[task]))
        return Batch(
            audio=torch.nn.utils.rnn.pad_sequence(audio, batch_first=True),
            samples=torch.tensor([len(clip) for clip in audio]),
            prompts=[self.tokenizer.prompt(text) for text in instructions],
            answers=[self.tokenizer.answer(text) for text in texts],
            tasks=tasks, rows=kept, instructions=instructions, texts=texts, skipped=skipped)

    def _read(self, numbers, clips: dict, skipped: list) -> None:
        for i in numbers:
            try:
                clips[i] = self.rows.read(i, self.sample_rate, self.max_seconds)
            except AudioError as e:
                skipped.append((self.rows.tasks[self.rows.task[i]], str(e)))


def leave_signals(worker: int) -> None:
    """Signals reach the workers, too; what follows is for the main process to decide."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def loader(batches: Batches, specs, workers: int, pin_memory=False):
    """Batches of `specs` in their order, made by `workers` processes (0: here)."""
    # Forked workers share the rows' memory; Python 3.14 has another default.
    how = dict(multiprocessing_context="fork", prefetch_factor=4) if workers else {}
    return DataLoader(batches, batch_size=None, sampler=specs, num_workers=workers,
                      pin_memory=pin_memory, worker_init_fn=leave_signals, **how)


# ---------------------------------------------------------------- command line

def main():
    """Say what the data holds. Exit code 1: a bad row or, with --decode, a bad clip."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data", nargs="+", help="manifests (.jsonl) and tars; globs work")
    p.add_argument("--decode", action="store_true", help="name clips that cannot be read")
    p.add_argument("--index", metavar="FILE.index", help="write what was found here")
    args = p.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        rows = Rows(args.data)
        if args.index:
            write_index(rows, args.index)
    except (OSError, ValueError) as e:
        sys.exit(f"error: {printable(e)}")
    print(f"{'task':20s} {'rows':>9s} {'hours':>8s} {'longest':>8s}")
    for t, task in enumerate(rows.tasks):
        seconds = rows.seconds[rows.task == t]
        hours = seconds.sum(dtype=float) / 3600
        print(f"{task or '(none)':20s} {len(seconds):9d} {hours:8.2f} {seconds.max():7.1f}s")
    print("splits:", dict(rows.split_counts))
    bad = 0
    for i in range(len(rows) if args.decode else 0):
        try:
            rows.audio(i)
        except AudioError as e:
            bad += 1
            print(e)
    if args.decode:
        print(f"{bad} of {len(rows)} clips cannot be read")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
