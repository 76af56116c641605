"""Rows -> batches: manifests, tars, decoding, instructions, mixing.

    python data.py A.jsonl 'shards/*.tar' [--decode]    # what is there; can it be read?
    python data.py 'shards/*.tar' --index all.index     # scanned once; opens at once
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
from itertools import islice

import numpy as np
import soundfile as sf
import torch
from torch.utils.data import DataLoader, Dataset

# What to ask when a row has no instruction of its own, by task; extend at will. TRANSLATIONS,
# at this file's end, asks in other languages.
# assumption: the paper gives no wording.
TEMPLATES = {
    "transcribe": ["Transcribe the speech.", "What is said?",
                   "Write down the spoken words."],
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
    "keyword": ["Which keyword is spoken?", "Name the spoken keyword.",
                "What is the keyword?"],
    "command": ["Which word is spoken?", "Name the spoken command.",
                "What is the spoken word?"],
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
    "genre": ["Which genre is this music?", "Name the genre.",
              "What kind of music is this?"],
    "pitch": ["Which note is played?", "Name the note.", "What pitch is this?"],
    "drum": ["Which drum is hit?", "Name the drum."],
    "music_tagging": ["Which tags describe this music? List them.", "List the tags of this music."],
    "music_caption": ["Describe the music.", "Write a caption for the music."],
}


# ---------------------------------------------------------------- audio

UNKNOWN = 2**40  # frames; more mean that the header tells no length
PIPED = 2**31 - 2**16  # bytes; a WAV written to a pipe has at least this data size
POINTER = b"version https://git-lfs"
# How a file begins: WAV, RF64; W64; AIFF; FLAC; Ogg (a stream's first page); AU; CAF.
STREAM = re.compile(rb"(RIFF|RF64)....WAVE|riff\x2e\x91|FORM....AIF|fLaC\0\0\0\x22|"
                    rb"OggS\0[\2\3]|\.snd\0|caff\0", re.S)
# An MP3's first frame may tell its length, behind "Xing" or "Info": flags (group 1: bit 0 if the
# number of frames follows, bit 1 if that of bytes does), then both numbers (group 2: of bytes).
# libsndfile ignores Fraunhofer's VBRI.
MP3_LENGTH = re.compile(rb"\xff[\xe2-\xff].{2,4}\0{9,32}(?:Xing|Info)...(.)....(....)", re.S)


class AudioError(ValueError):
    """A clip that cannot be used: one line with its name and the reason."""


def printable(text) -> str:
    """With escapes for what is not UTF-8 in a file's name."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def read_bytes(path, at: int = 0, size: int = -1) -> bytes:
    # In three attempts: a network disk may fail for a moment.
    for wait in (0.1, 0.4, None):  # seconds
        try:
            with open(path, "rb") as f:
                f.seek(at)
                return f.read(size)
        except (OSError, ValueError) as e:
            if wait is None:
                raise AudioError(printable(f"{path}: {e.args[-1]}")) from None
            time.sleep(wait)


def read_audio(source, sample_rate=None, max_seconds=None, name=None, silence=False):
    """A file's path or its bytes -> (S,) float32, channels averaged.
    sample_rate: of the result (None: the file's own). Raises AudioError: unreadable, cut,
    too long, not finite, all zero (unless `silence`)."""
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
        return resample(torch.from_numpy(mono), rate, sample_rate or rate)
    except AudioError as e:
        fault = e
    except Exception as e:  # libsndfile and soundfile raise many kinds
        why = getattr(e, "error_string", e)
        fault = f"not readable as audio ({why}); ffmpeg -i IN OUT.flac"
    raise AudioError(printable(f"{name or 'audio'}: {fault}"))


def check_length(seconds: float, limit: float | None) -> None:
    if limit is not None and seconds > limit + 1e-3:
        raise AudioError(f"{seconds:.1f} s, longer than --max-seconds {limit:g}; cut or allow it")


def decode(raw: bytes) -> tuple[np.ndarray, int]:
    """A file's bytes -> (samples (S, channels) float32, rate in Hz)."""
    if not raw or raw.startswith(POINTER):
        raise AudioError("a pointer; git lfs pull" if raw else "the file is empty")
    if holds_another(raw):
        raise AudioError("several recordings in one file; split it, or join them: "
                         "ffmpeg -i IN OUT.flac (not WAV, AIFF)")
    with sf.SoundFile(io.BytesIO(raw)) as f:
        if f.format == "MP3" and not MP3_LENGTH.search(raw):
            with sf.SoundFile(Lengthened(raw)) as whole:
                return whole.read(whole.frames, "float32", always_2d=True), f.samplerate
        if f.frames > UNKNOWN:
            raise AudioError("its header does not tell its length; ffmpeg -i IN OUT.flac")
        # If the header's data size is too small, libsndfile meets samples where it expects a
        # chunk: set the size to "unknown" and decode again.
        too_small = not f.frames or "Unknown chunk marker" in f.extra_info
        size = re.search(r"\ndata : (\d+)", f.extra_info)
        if raw[:4] == b"RIFF" and too_small and size and int(size[1]) < PIPED:
            header = b"data" + struct.pack("<I", int(size[1]))
            return decode(raw.replace(header, b"data\xff\xff\xff\xff", 1))
        samples = f.read(f.frames, "float32", always_2d=True)
        if len(samples) < f.frames or is_truncated(raw, f.extra_info):
            raise AudioError(f"cut short, {len(samples)} samples are left; fetch it again")
        return samples, f.samplerate


class Lengthened(io.BytesIO):
    # Reports 40 times its size: libsndfile takes the bit rate of an MP3's first frame, 8 to 320
    # kbit/s, for that of all, and would stop too early.
    def seek(self, offset, whence=0):
        if (offset, whence) == (0, os.SEEK_END):
            offset, whence = 40 * len(self.getvalue()), os.SEEK_SET
        return super().seek(offset, whence)


def holds_another(raw: bytes) -> bool:
    """Does a second recording follow the first, as `cat` joins them?"""
    if raw[:1] == b"\xff" or raw[:3] == b"ID3":
        return mp3_holds_another(raw)
    # The tracks of a single Ogg recording all begin before byte 300.
    at = raw.find(raw[:4], 300) if STREAM.match(raw) else -1
    while at > 0 and not STREAM.match(raw, at):
        at = raw.find(raw[:4], at + 1)
    return at > 0


def mp3_holds_another(mp3: bytes) -> bool:
    lengths = list(MP3_LENGTH.finditer(mp3))
    if not lengths:
        return False
    first, end = lengths[0], len(mp3)
    if first[1][0] & 3 == 3:  # both numbers are there
        end = first.start() + int.from_bytes(first[2], "big")
    sound_before = mp3[:1] == b"\xff" and first.start() > 0
    sound_behind = mp3[end : end + 1] == b"\xff"
    return len(lengths) > 1 or sound_before or sound_behind


def is_truncated(raw: bytes, log: str) -> bool:
    """Is a WAV, AIFF or Ogg cut short? libsndfile does not complain."""
    if raw[:4] == b"OggS":  # the last page must be whole
        page = raw[raw.rfind(b"OggS") :]
        end = 27 + page[26] + sum(page[27 : 27 + page[26]]) if len(page) > 26 else 27
        return len(page) < end
    sizes = re.search(r"(?:data|SSND|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)", log)
    size, found = map(int, sizes.groups()) if sizes else (0, 0)
    file_size = 8 + int.from_bytes(raw[4:8], "big" if raw[:4] == b"FORM" else "little")
    # Some writers put the file's length, or that less 8, for the data's: nothing is missing.
    return found < size < PIPED and len(raw) not in (file_size, size, size + 8)


@lru_cache(maxsize=32)
def sinc_kernel(old: int, new: int, zeros: int = 64, attenuation: float = 80.0):
    """Kaiser-windowed sinc of `new` phases: (kernel (old + 2 * reach, new), reach)."""
    # `zeros` crossings a side; images and aliases lie `attenuation` dB down, by Kaiser's formulas.
    beta = 0.1102 * (attenuation - 8.7)
    # The pass band ends 8 % below the lower Nyquist frequency, where the stop band begins.
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


def resample(audio: torch.Tensor, rate: int, new_rate: int) -> torch.Tensor:
    """Band-limited windowed sinc: (..., S) at `rate` -> (..., ceil(S * new_rate / rate))."""
    if rate == new_rate:
        return audio
    # 11,127 Hz needs a huge filter: taken as 11,130 Hz, which changes the length, too.
    if rate * new_rate // math.gcd(rate, new_rate) ** 2 > 2**21:
        rate = round(rate, -1)
    step, samples = math.gcd(rate, new_rate), audio.shape[-1]
    # Compute several periods per block: a matrix with few columns multiplies slowly.
    periods = max(1, 64 * step // new_rate)
    old, new = periods * rate // step, periods * new_rate // step
    kernel, reach = sinc_kernel(old, new)
    blocks = math.ceil(samples / old)
    padded = torch.nn.functional.pad(audio, (reach, reach + blocks * old - samples))
    out = padded.unfold(-1, len(kernel), old) @ kernel  # (..., blocks, new)
    return out.flatten(-2)[..., : math.ceil(samples * new / old)]


# ---------------------------------------------------------------- rows

AUDIO_SUFFIXES = (".flac", ".wav", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".webm")
KEYS = ("audio", "instruction", "answer", "task", "split", "label", "seconds")
OTHER_KEYS = {"set": "split", "fold": "split",
              "question": "instruction", "prompt": "instruction"}
SILENT = re.compile("silen|quiet|nothing|empty|no (sound|speech|audio)", re.I)
# The table's columns. json_at, json_size: where the row's JSON lies in its file, in bytes.
# audio_at, audio_size: where its audio lies in the tar (audio_at -1: in a file of its own).
# seconds: 0 if unknown. text_bytes: of instruction and answer, -1 if the row cannot train.
# file, task, split: places in Rows.paths, tasks and splits.
ROW = np.dtype([("json_at", "i8"), ("audio_at", "i8"), ("audio_size", "i8"),
                ("json_size", "i4"), ("seconds", "f4"), ("text_bytes", "i4"),
                ("file", "i4"), ("task", "i4"), ("split", "i4")])
pack_row = struct.Struct("<qqqifiiii").pack  # the same; 100 times faster than numpy here


def scan_manifest(path: str):
    """A JSON Lines file -> (row's name, its JSON, None, ROW's first 4 fields)."""
    at = 0
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            start = line.removeprefix(b"\xef\xbb\xbf").strip()  # a byte order mark
            if at == 0 and (start == b"{" or start.startswith((b"[", POINTER))):
                raise ValueError("needs one JSON object a line; for an array jq -c '.[]' "
                                 "IN > OUT, indented jq -c ., a pointer git lfs pull")
            if start:
                yield f"{path}:{number}", line, None, (at, -1, 0, len(line))
            at += len(line)


def scan_tar(path: str):
    """A tar -> (row's name, its JSON, its audio's file, ROW's first 4 fields)."""
    # Each KEY.json is paired with the next audio of KEY, or the reverse; KEY is then free again.
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
                raise ValueError(f"{member.name}: comes twice before its partner; rename one")
            pair[kind] = member
            if len(pair) == 2:
                del waiting[key]
                row, audio = pair["json"], pair["audio"]
                place = row.offset_data, audio.offset_data, audio.size, row.size
                row, audio = tar.extractfile(row).read(), tar.extractfile(audio)
                yield f"{path}: {key}.json", row, audio, place
        # tarfile stops silently at what is no header: only zeros, the end mark, may remain.
        rest = os.path.getsize(path) - tar.offset
        if not 512 <= rest <= 2**20 or read_bytes(path, tar.offset).strip(b"\0"):
            raise ValueError(f"cut short, damaged or several tars in one, after {tar.offset} "
                             "bytes; fetch it again")
    if waiting:
        key, pair = waiting.popitem()
        lacks = "audio without its .json" if "audio" in pair else ".json without its audio"
        raise ValueError(f"{key}: {lacks}")


def parse_row(line: bytes, in_tar: bool) -> dict:
    """A row from its JSON, without nulls. Raises ValueError."""
    try:
        text = line.decode("utf-8-sig", "surrogateescape")  # for the audio file's name
        row = json.loads(text, parse_constant=refuse)
    except ValueError as e:
        raise ValueError(f"not JSON ({e})") from None
    if in_tar and isinstance(row, list):
        return {"events": row}  # as in some published tars
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    row = {key: value for key, value in row.items() if value is not None}
    if not in_tar and not (isinstance(row.get("audio"), str) and row["audio"]):
        raise ValueError('lacks "audio", the clip\'s path relative to this file')
    return row


def refuse(constant: str):
    raise ValueError(f"{constant} is no JSON; use null")


def misnamed_keys(row: dict, answers: bool) -> list[str]:
    """A message for each key that likely means another, absent one."""
    # Foreign tars (no answers asked) may use any keys.
    if not answers and "audio" not in row:
        return []
    return [f'has "{key}" but no "{meant}"; rename or drop it' for key in row
            if (meant := meant_key(key)) and meant not in row]


@lru_cache(maxsize=1000)
def meant_key(key: str) -> str | None:
    close = difflib.get_close_matches(key.lower(), [*KEYS, *OTHER_KEYS], 1, 0.8)
    return OTHER_KEYS.get(close[0], close[0]) if close else None


def check_row(row: dict, seconds, answers: bool, max_seconds) -> int:
    """Bytes of instruction and answer.

    Of a row that is unfit for training -1, or with `answers` a ValueError.
    """
    if not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e9:
        raise ValueError(f"seconds is {seconds!r}; need a number")
    check_length(seconds, max_seconds)
    answer, instruction = row.get("answer"), row.get("instruction", "")
    task = str(row.get("task", ""))
    try:
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"answer is {answer!r}; training needs a text")
        if not isinstance(instruction, str):
            raise ValueError(f"instruction is {instruction!r}; need a text")
        if not instruction and task not in TEMPLATES:
            raise ValueError(f"no instruction, and task {task!r} has no templates; "
                             "add either (TEMPLATES in data.py)")
        return len(((instruction or TEMPLATES[task][0]) + answer).encode())
    except ValueError:
        if answers:
            raise
        return -1


def header_seconds(audio) -> float:
    try:
        info = sf.info(audio)
        return info.duration if info.frames <= UNKNOWN else 0.0
    except Exception:  # libsndfile and soundfile raise many kinds
        return 0.0  # reading will name the clip


def scan(paths, answers, splits, max_seconds, problems: Counter):
    """Manifests and tars -> (paths, tasks, splits, split_counts, table), see Rows."""
    table, split_counts = bytearray(), Counter()
    tasks, numbers = {}, {}  # task, split -> its number
    for file_number, path in enumerate(paths):
        in_tar = path.endswith((".tar", ".gz", ".tgz"))  # tarfile refuses .gz
        is_empty, misnamed = True, {}
        try:
            for name, line, audio, place in scan_tar(path) if in_tar else scan_manifest(path):
                is_empty = False
                try:
                    row = parse_row(line, in_tar)
                    task, split = str(row.get("task", "")), str(row.get("split", "train"))
                    split_counts[split] += 1
                    if splits is not None and split not in splits:
                        continue
                    faults = misnamed_keys(row, answers)
                    for fault in faults:  # named once a file
                        problems[misnamed.setdefault(fault, f"{name}: {fault}")] += 1
                    if faults:
                        continue
                    if not in_tar:
                        audio = os.fsencode(os.path.join(os.path.dirname(path), row["audio"]))
                    seconds = row["seconds"] if "seconds" in row else header_seconds(audio)
                    size = check_row(row, seconds, answers, max_seconds)
                    table += pack_row(*place, seconds, size, file_number,
                                      tasks.setdefault(task, len(tasks)),
                                      numbers.setdefault(split, len(numbers)))
                except ValueError as e:
                    problems[f"{name}: {e}"] += 1
            if is_empty:
                raise ValueError("holds no rows")
        except tarfile.ReadError as e:
            problems[f"{path}: not a plain tar, or cut short ({e}); unpack a .gz first, "
                     "else fetch it again (git lfs pull)"] += 1
        except ValueError as e:
            problems[f"{path}: {e}"] += 1
    return paths, list(tasks), list(numbers), split_counts, np.frombuffer(table, ROW)


def write_index(rows: "Rows", path: str) -> None:
    """A line of JSON, then the rows' table, which all processes map into memory."""
    if not path.endswith(".index"):
        raise ValueError(f"{path}: an index must be named FILE.index")
    paths = [os.path.abspath(data) for data in rows.paths]
    stamps = [[os.path.getsize(data), os.path.getmtime(data)] for data in paths]
    names = paths, rows.tasks, rows.splits, rows.split_counts
    facts = dict(names=names, rows=len(rows), stamps=stamps)
    head = json.dumps(facts).encode()
    head += b" " * (63 - len(head) % 64) + b"\n"  # whole 64 bytes
    with open(path + ".new", "wb") as f:
        f.write(head)
        f.write(rows.table)
    os.replace(path + ".new", path)  # at once: others may have it mapped


def open_index(path: str):
    try:
        with open(path, "rb") as f:
            head = f.readline()
        facts = json.loads(head)
        names, table = facts["names"], np.memmap(path, ROW, "r", len(head), (facts["rows"],))
    except (ValueError, KeyError):
        raise ValueError(f"{path}: is no index; write it again") from None
    for data, before in zip(names[0], facts["stamps"]):
        if [os.path.getsize(data), os.path.getmtime(data)] != before:
            raise ValueError(f"{path}: {data} has changed; write the index again")
    return *names, table


class Rows:
    """The rows of manifests and tars, or of one index of them, read when asked for.

    rows[i] is row i's dictionary without nulls.
    rows.audio(i): its samples. rows.name(i): its place, for messages.
    Arrays: seconds, text_bytes, task, split (numbers into tasks, splits).
    split_counts: {split: rows}, those left out included.
    answers: all must be fit for training.
    splits: keep only these; a row without is "train"; an index keeps all.
    max_seconds: none may be longer. Raises ValueError with one
    line for each of the first ten problems.
    """

    def __init__(self, paths, answers=False, splits=None, max_seconds=None):
        paths = expand([paths] if isinstance(paths, (str, os.PathLike)) else paths)
        problems = Counter()  # message -> rows
        found = (open_index(*paths) if paths[0].endswith(".index") else
                 scan(paths, answers, splits, max_seconds, problems))
        self.paths, self.tasks, self.splits, self.split_counts, self.table = found
        self.seconds, self.text_bytes = self.table["seconds"], self.table["text_bytes"]
        self.task, self.split = self.table["task"], self.table["split"]
        # What a scan would have refused may be in an index.
        limit = math.inf if max_seconds is None else max_seconds + 1e-3
        bad = (self.seconds > limit) | (answers & (self.text_bytes < 0))
        kept = [splits is None or split in splits for split in self.splits]
        bad &= np.array(kept, bool)[self.split]
        for i in np.flatnonzero(bad)[:10].tolist():
            try:
                check_row(self[i], self.seconds[i].item(), answers, max_seconds)
            except ValueError as e:
                problems[f"{self.name(i)}: {e}"] += 1
        lines = [line if n == 1 else f"{line} ({n} rows)" for line, n in problems.items()]
        if len(lines) > 10:
            lines[10:] = [f"... and {len(lines) - 10} more"]
        if lines:
            raise ValueError(printable("\n".join(lines)))

    def __len__(self):
        return len(self.table)

    def __getitem__(self, i: int) -> dict:
        place = self.table[i]
        path, at = self.paths[place["file"]], place["json_at"]
        line = read_bytes(path, at, place["json_size"])
        try:
            return parse_row(line, place["audio_at"] >= 0)
        except ValueError:
            raise AudioError(printable(f"{path}: no row at byte {at} any more; it has changed "
                                       "since the start")) from None

    def clip(self, i: int, row=None) -> tuple[str, int, int]:
        """Where row i's audio lies: file, start, size in bytes (-1: all)."""
        place = self.table[i]
        path, at = self.paths[place["file"]], int(place["audio_at"])
        if at >= 0:
            return path, at, int(place["audio_size"])
        return os.path.join(os.path.dirname(path), (row or self[i])["audio"]), 0, -1

    def read(self, i: int, sample_rate=None, max_seconds=None):
        """Row i and its samples (S,), float32; see `read_audio`. Raises AudioError."""
        try:
            row = self[i]
            raw = read_bytes(*self.clip(i, row))
            silence = bool(SILENT.search(f"{row.get('label')} {row.get('answer')}"))
            return row, read_audio(raw, sample_rate, max_seconds, "audio", silence)
        except AudioError as e:
            raise AudioError(f"{self.name(i)}: {e}") from None

    def audio(self, i: int, sample_rate=None) -> torch.Tensor:
        return self.read(i, sample_rate)[1]

    def name(self, i: int) -> str:
        """Row i's place, for a message: manifest:line (audio), or tar (member)."""
        place, audio = self.table[i], "?"
        path, at, audio_at = self.paths[place["file"]], place["json_at"], place["audio_at"]
        try:
            if audio_at < 0:
                line = 1
                for block in range(0, at, 2**20):
                    line += read_bytes(path, block, min(2**20, at - block)).count(b"\n")
                path, audio = f"{path}:{line}", self[i]["audio"]
            else:
                with tarfile.open(path) as tar:
                    audio = next(m.name for m in tar if m.offset_data == audio_at)
        except (OSError, ValueError, tarfile.TarError, StopIteration):
            pass  # it has vanished
        return printable(f"{path} ({audio})")

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
        if path.endswith(".index") and len(found) > 1:
            raise ValueError(f"{path}: name an index alone")
    return found


# ---------------------------------------------------------------- sampling, batches

POOL = 64  # batches
# Noise on lengths for sorting, so that equally long tasks mix.
JITTER = 0.1
SHORTEST = 0.1  # seconds that a shorter clip, or one of unknown length, counts
# A batch costs its rows times (longest audio + longest text), for both are padded. Text is
# counted as 4 bytes a token, with 15 tokens for the prompt. A token's cost is a guess, the
# same for all encoders: that of 0.08 s of audio.
TEXT_TOKEN_COST = 0.08
PASS_ORDER, POOL_ORDER, HELD_OUT_ORDER = 1, 2, 3  # parts of seeds


def task_shares(rows: Rows, index, temperature=2.0, weights=None) -> dict[int, float]:
    """{task number: its share in training}, for the rows numbered `index`.
    weights: {task: weight}; tasks without one are left out. Else a task weighs
    rows ** (1 / temperature): 1 keeps the data's proportions, higher evens them out."""
    counts = np.bincount(rows.task[index]).tolist()
    shares = {task: n ** (1 / temperature) for task, n in enumerate(counts) if n}
    if not shares:
        raise ValueError("no rows to train on: none has the split of --train-split")
    names = sorted(rows.tasks[task] for task in shares)
    unknown = sorted(set(weights or {}) - set(names))
    if unknown:
        raise ValueError(f"weights name tasks that the data lacks: {unknown}; it has {names}")
    if weights:
        shares = {task: weights.get(rows.tasks[task], 0.0) for task in shares}
    total = sum(shares.values())
    if not 0 < total < math.inf or min(shares.values()) < 0:
        raise ValueError(f"task weights {weights}: each must be a number of 0 or more, "
                         "and one must be above")
    return {task: weight / total for task, weight in shares.items() if weight}


def sample_batches(rows: Rows, index, shares, batch_seconds: float, seed=0, start=0, step=1):
    """Endless seeded batches: yields (batch number, row numbers), batch `start` first.

    To resume, save one number, n: how many batches all ranks together have used. Rank r of
    R then passes start n + r, step R, and the other arguments as they were.
    """
    # Each pool of 64 batches takes from every task its exact share, the next of that task's
    # shuffled passes. It is sorted by length, cut into batches of equal cost, and shuffled.
    members, mean = {}, 0.0  # row numbers by task; seconds
    for task, share in shares.items():
        members[task] = index[rows.task[index] == task]
        mean += share * float(np.maximum(rows.seconds[members[task]], SHORTEST).mean())
    # 5 % are left for padding. Every batch needs a row; a task may get one less than its share.
    size = max(POOL + len(shares), 0.95 * POOL * batch_seconds / mean)
    pool, batch_number = None, start
    while True:
        if pool != batch_number // POOL:
            pool, picked = batch_number // POOL, []
            for task, share in shares.items():
                first, end = round(size * share * pool), round(size * share * (pool + 1))
                picked.append(next_rows(members[task], first, end, (seed, PASS_ORDER, task)))
            draw = np.random.default_rng([seed, POOL_ORDER, pool])
            batches = even_batches(rows, np.concatenate(picked), draw)
        yield batch_number, batches[batch_number % POOL]
        batch_number += step


def next_rows(members, first: int, end: int, seed: tuple) -> np.ndarray:
    """Positions `first` to `end` - 1 of a task's epochs, one after the other, each shuffled."""
    n, picked = len(members), [members[:0]]
    for epoch in range(first // n, math.ceil(end / n)):
        order = np.random.default_rng((*seed, epoch)).permutation(n)
        picked.append(members[order[max(first - epoch * n, 0) : end - epoch * n]])
    return np.concatenate(picked)


def even_batches(rows: Rows, picked, draw) -> list[list[int]]:
    """A pool's rows -> POOL batches, of like length and cost, in random order."""
    seconds = np.maximum(rows.seconds[picked], SHORTEST)
    text = TEXT_TOKEN_COST * (15 + np.maximum(rows.text_bytes[picked], 0) / 4)
    noise = draw.uniform(1 - JITTER, 1 + JITTER, len(picked))
    order = np.argsort(seconds * noise + text, kind="stable")
    picked, seconds, text = (x[order].tolist() for x in (picked, seconds, text))
    low, high = 0.0, len(picked) * (max(seconds) + max(text))
    for _ in range(24):  # the smallest limit that gives no more than POOL batches
        middle = (low + high) / 2
        if len(cut(picked, seconds, middle, text)) <= POOL:
            high = middle
        else:
            low = middle
    batches = cut(picked, seconds, high, text)
    # Ties can give fewer than POOL batches: halve the fullest.
    while len(batches) < POOL:
        sizes = [len(batch) for batch in batches]
        i, half = sizes.index(max(sizes)), max(sizes) // 2
        batches[i : i + 1] = batches[i][:half], batches[i][half:]
    draw.shuffle(batches)
    return batches


def cut(items, seconds, limit: float, text=None) -> list[list]:
    """Items, about sorted -> batches of at most `limit` seconds, or of a single item."""
    batches, longest, wordiest = [], 0.0, 0.0
    for item, s, t in zip(items, seconds, text or [0.0] * len(items)):
        longest, wordiest = max(longest, s), max(wordiest, t)
        if not batches or (len(batches[-1]) + 1) * (longest + wordiest) > limit:
            batches.append([])
            longest, wordiest = s, t
        batches[-1].append(item)
    return batches


def held_out(rows: Rows, split: str, per_task: int, batch_seconds: float, seed=0):
    """A fixed held-out set: [(batch number, row numbers)].

    Up to `per_task` rows of each task (0: all), by length,
    at most `batch_seconds` of padded audio a batch.
    """
    index, picked = rows.where(split), []
    for task in np.unique(rows.task[index]):
        members = index[rows.task[index] == task]
        draw = np.random.default_rng([seed, HELD_OUT_ORDER, int(task)])
        picked += members[draw.permutation(len(members))[: per_task or None]].tolist()
    picked.sort(key=lambda i: (rows.seconds[i], i))
    seconds = np.maximum(rows.seconds[picked], SHORTEST)
    return list(enumerate(cut(picked, seconds, batch_seconds)))


@dataclass(frozen=True)
class Batch:
    """B clips and their texts.

    skipped: (task, message) of each clip that cannot be read.
    """
    audio: torch.Tensor  # (B, S) float32, zero beyond `samples`
    samples: torch.Tensor  # (B,) on the CPU
    prompts: list[list[int]]
    answers: list[list[int]]
    tasks: list[str]
    rows: list[int]
    instructions: list[str]  # the prompts' texts
    texts: list[str]  # the answers'
    languages: list[str]  # of what is said, where the rows tell; else ""
    skipped: list[tuple[str, str]]

    @property
    def answer_tokens(self) -> list[int]:
        return [len(answer) for answer in self.answers]

    # Workers hand tensors over in /dev/shm and die where it is full: then arrays go by pipe.
    def __getstate__(self):
        shm = "/dev/shm"
        if os.path.exists(shm) and shutil.disk_usage(shm).free > 2**32:  # 4 GiB
            return vars(self)
        return vars(self) | dict(audio=self.audio.numpy(), samples=self.samples.numpy())

    def __setstate__(self, state):
        vars(self).update(state, audio=torch.as_tensor(state["audio"]),
                          samples=torch.as_tensor(state["samples"]))

    def pin_memory(self):
        return replace(self, audio=self.audio.pin_memory())

    def to(self, device):
        return replace(self, audio=self.audio.to(device, non_blocking=True))


class Batches(Dataset):
    """(batch number, row numbers) -> Batch: reads, draws instructions, tokenises.
    tokenizer: has prompt(instruction) -> ids and answer(text) -> ids.
    languages: codes in TRANSLATIONS, to ask in beside English."""

    def __init__(self, rows: Rows, tokenizer, sample_rate, seed=0, max_seconds=None,
                 languages=()):
        self.rows, self.tokenizer, self.seed = rows, tokenizer, seed
        self.sample_rate, self.max_seconds = sample_rate, max_seconds
        self.languages = languages

    def __getitem__(self, spec) -> Batch:
        batch_number, wanted = spec
        skipped = []  # (task, message)
        clips = list(self._read(wanted, skipped))
        if not clips:  # every rank needs a batch: replace it
            split, task, first = self.rows.split, self.rows.task, wanted[0]
            alike = np.flatnonzero((split == split[first]) & np.isin(task, task[wanted]))
            following = np.concatenate([alike[alike > first], alike[alike < first]])
            clips = list(islice(self._read(following[:20].tolist(), skipped), 1))
        if not clips:
            raise AudioError(f"{len(skipped)} clips in a row cannot be read; "
                             f"the last: {skipped[-1][1]}")
        draw = random.Random(f"{self.seed}/{batch_number}")
        numbers, rows, audio = zip(*clips)
        tasks = [self.rows.tasks[self.rows.task[i]] for i in numbers]
        texts = [row["answer"].strip() for row in rows]
        instructions = [self._instruction(row, task, draw) for row, task in zip(rows, tasks)]
        return Batch(
            audio=torch.nn.utils.rnn.pad_sequence(audio, batch_first=True),
            samples=torch.tensor([len(clip) for clip in audio]),
            prompts=[self.tokenizer.prompt(text) for text in instructions],
            answers=[self.tokenizer.answer(text) for text in texts], tasks=tasks,
            rows=list(numbers), instructions=instructions, texts=texts,
            languages=[row.get("language", "") for row in rows], skipped=skipped)

    def _instruction(self, row: dict, task: str, draw: random.Random) -> str:
        # Without other languages no number is drawn here: batches stay as in older runs.
        if self.languages:
            language = draw.choice(("en", *self.languages))
            if task in TRANSLATIONS.get(language, ()):
                return TRANSLATIONS[language][task]
        return row.get("instruction") or draw.choice(TEMPLATES[task])

    def _read(self, numbers, skipped: list):
        """Yields (row number, row, audio) of what can be read; the rest goes into `skipped`."""
        for i in numbers:
            try:
                yield i, *self.rows.read(i, self.sample_rate, self.max_seconds)
            except AudioError as e:
                skipped.append((self.rows.tasks[self.rows.task[i]], str(e)))


def set_worker_signals(worker: int) -> None:
    # Ctrl-C reaches the workers, too; the main process stops them when it is ready.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The main process's handler, which they inherit, may only take note: end at once.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def loader(batches: Batches, specs, workers: int, pin_memory=False):
    """Batches of `specs` in their order, made by `workers` processes (0: here)."""
    # Forked workers share the rows' memory; Python 3.14 has another default.
    how = dict(multiprocessing_context="fork", prefetch_factor=4) if workers else {}
    return DataLoader(batches, batch_size=None, sampler=specs, num_workers=workers,
                      pin_memory=pin_memory, worker_init_fn=set_worker_signals, **how)


# ---------------------------------------------------------------- other languages

# How to ask in other languages than English, by code and task. A task that is not here, as
# "question", whose rows bring each their own, is asked in English alone; answers stay as they are.
TRANSLATIONS = {
    "de": {
        "transcribe": "Schreib auf, was gesagt wird.",
        "translate": "Übersetze das Gesprochene ins Englische.",
        "language": "Welche Sprache wird gesprochen?",
        "accent": "Mit welchem Akzent wird gesprochen?",
        "emotion": "Welches Gefühl drückt die Stimme aus?",
        "speaker": "Wer spricht?",
        "voice": "Welche Stimme spricht hier?",
        "gender": "Spricht ein Mann oder eine Frau?",
        "age": "Wie alt ist die Person, die spricht?",
        "keyword": "Welches Schlüsselwort wird gesprochen?",
        "command": "Welches Wort wird gesprochen?",
        "intent": "Was möchte die Person, die spricht?",
        "count": "Wie viele sind es?",
        "speaker_count": "Wie viele Personen sprechen?",
        "spoof": "Ist die Stimme echt oder künstlich?",
        "vocal_sound": "Welchen Laut gibt die Person von sich?",
        "sound_event": "Was ist zu hören?",
        "game_sound": "Was macht dieses Geräusch?",
        "scene": "Wo wurde das aufgenommen?",
        "tagging": "Welche Klänge sind zu hören? Zähle sie auf.",
        "caption": "Beschreibe, was zu hören ist.",
        "instrument": "Welches Instrument spielt?",
        "genre": "Welche Musikrichtung ist das?",
        "pitch": "Welcher Ton wird gespielt?",
        "drum": "Welches Schlaginstrument ist zu hören?",
        "music_tagging": "Welche Schlagwörter passen zu dieser Musik?",
        "music_caption": "Beschreibe die Musik.",
    },
    "fr": {
        "transcribe": "Écris ce qui est dit.",
        "translate": "Traduis en anglais ce qui est dit.",
        "language": "Quelle langue est parlée ?",
        "accent": "Quel accent a la personne qui parle ?",
        "emotion": "Quelle émotion la voix exprime-t-elle ?",
        "speaker": "Qui parle ?",
        "voice": "Quelle voix entend-on ?",
        "gender": "Est-ce un homme ou une femme qui parle ?",
        "age": "Quel âge a la personne qui parle ?",
        "keyword": "Quel mot-clé est prononcé ?",
        "command": "Quel mot est prononcé ?",
        "intent": "Que veut la personne qui parle ?",
        "count": "Combien y en a-t-il ?",
        "speaker_count": "Combien de personnes parlent ?",
        "spoof": "La voix est-elle réelle ou synthétique ?",
        "vocal_sound": "Quel bruit cette personne fait-elle ?",
        "sound_event": "Quel son entend-on ?",
        "game_sound": "Qu'est-ce qui produit ce son ?",
        "scene": "Où cela a-t-il été enregistré ?",
        "tagging": "Quels sons entend-on ? Énumère-les.",
        "caption": "Décris ce que l'on entend.",
        "instrument": "Quel instrument entend-on ?",
        "genre": "Quel est le genre de cette musique ?",
        "pitch": "Quelle note est jouée ?",
        "drum": "Quelle percussion entend-on ?",
        "music_tagging": "Quels mots-clés décrivent cette musique ?",
        "music_caption": "Décris la musique.",
    },
    "es": {
        "transcribe": "Escribe lo que se dice.",
        "translate": "Traduce al inglés lo que se dice.",
        "language": "¿Qué idioma se habla?",
        "accent": "¿Qué acento tiene quien habla?",
        "emotion": "¿Qué emoción expresa la voz?",
        "speaker": "¿Quién habla?",
        "voice": "¿Qué voz se oye?",
        "gender": "¿Habla un hombre o una mujer?",
        "age": "¿Qué edad tiene quien habla?",
        "keyword": "¿Qué palabra clave se dice?",
        "command": "¿Qué palabra se dice?",
        "intent": "¿Qué quiere quien habla?",
        "count": "¿Cuántos hay?",
        "speaker_count": "¿Cuántas personas hablan?",
        "spoof": "¿La voz es real o sintética?",
        "vocal_sound": "¿Qué sonido hace la persona?",
        "sound_event": "¿Qué se oye?",
        "game_sound": "¿Qué produce este sonido?",
        "scene": "¿Dónde se grabó esto?",
        "tagging": "¿Qué sonidos se oyen? Enuméralos.",
        "caption": "Describe lo que se oye.",
        "instrument": "¿Qué instrumento suena?",
        "genre": "¿De qué género es esta música?",
        "pitch": "¿Qué nota suena?",
        "drum": "¿Qué instrumento de percusión suena?",
        "music_tagging": "¿Qué etiquetas describen esta música?",
        "music_caption": "Describe la música.",
    },
    "ru": {
        "transcribe": "Запиши произнесённые слова.",
        "translate": "Переведи сказанное на английский.",
        "language": "На каком языке говорят?",
        "accent": "С каким акцентом говорит человек?",
        "emotion": "Какую эмоцию выражает голос?",
        "speaker": "Кто говорит?",
        "voice": "Чей это голос?",
        "gender": "Говорит мужчина или женщина?",
        "age": "Сколько лет говорящему?",
        "keyword": "Какое ключевое слово произнесено?",
        "command": "Какое слово произнесено?",
        "intent": "Чего хочет говорящий?",
        "count": "Сколько их?",
        "speaker_count": "Сколько человек говорит?",
        "spoof": "Этот голос настоящий или синтезированный?",
        "vocal_sound": "Какой звук издаёт человек?",
        "sound_event": "Что слышно?",
        "game_sound": "Что издаёт этот звук?",
        "scene": "Где сделана эта запись?",
        "tagging": "Какие звуки слышны? Перечисли их.",
        "caption": "Опиши, что слышно.",
        "instrument": "Какой инструмент играет?",
        "genre": "К какому жанру относится эта музыка?",
        "pitch": "Какая нота звучит?",
        "drum": "Какой ударный инструмент звучит?",
        "music_tagging": "Какие теги подходят к этой музыке?",
        "music_caption": "Опиши эту музыку.",
    },
    "zh": {
        "transcribe": "请写下说话的内容。",
        "translate": "请把说话的内容翻译成英语。",
        "language": "说的是哪种语言？",
        "accent": "说话人带有什么口音？",
        "emotion": "说话人流露出什么情绪？",
        "speaker": "是谁在说话？",
        "voice": "这是谁的声音？",
        "gender": "说话的是男性还是女性？",
        "age": "说话人多大年纪？",
        "keyword": "说的是哪个关键词？",
        "command": "说的是哪个词？",
        "intent": "说话人想做什么？",
        "count": "一共有多少个？",
        "speaker_count": "有几个人在说话？",
        "spoof": "这个声音是真人的还是合成的？",
        "vocal_sound": "这个人发出了什么声音？",
        "sound_event": "听到的是什么声音？",
        "game_sound": "这个声音是什么发出的？",
        "scene": "这是在哪里录制的？",
        "tagging": "能听到哪些声音？请一一列出。",
        "caption": "请描述这段音频。",
        "instrument": "演奏的是什么乐器？",
        "genre": "这是什么类型的音乐？",
        "pitch": "演奏的是哪个音？",
        "drum": "敲的是哪种打击乐器？",
        "music_tagging": "哪些标签适合这段音乐？",
        "music_caption": "请描述这段音乐。",
    },
}


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
    if args.decode:
        for i in range(len(rows)):
            try:
                rows.audio(i)
            except AudioError as e:
                bad += 1
                print(e)
        print(f"{bad} of {len(rows)} clips cannot be read")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
