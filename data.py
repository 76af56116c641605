"""Rows -> batches: manifests and tar shards, decoding, resampling, instructions, length buckets, task mixing.

    python data.py A.jsonl B.jsonl 'shards/*.tar' [--decode]      # what is in there, and is all of it readable

Knows no model: audio comes out as samples at 16 kHz, text as the ids that the tokenizer handed in makes of it.
"""
import argparse
import glob
import io
import json
import math
import os
import random
import sys
import tarfile
from array import array
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from torch.utils.data import DataLoader, Dataset

SAMPLE_RATE = 16_000
AUDIO_SUFFIXES = (".flac", ".wav", ".mp3", ".ogg")
UNKNOWN = 2**40  # frames; libsndfile gives more where a header does not tell

# What to ask when a row has no instruction of its own: any task name, one line each; extend at will.
# assumption: the paper gives no wording.
TEMPLATES = {
    "transcribe": ["Transcribe the speech.", "What is said?", "Write down the spoken words."],
    "translate": ["Translate the speech into English.", "What is said, in English?"],
    "language": ["Which language is spoken?", "Name the language of the speech.", "What language is this?"],
    "accent": ["Which accent does the speaker have?", "Name the speaker's accent."],
    "emotion": ["What emotion does the speaker show?", "How does the speaker feel?", "Name the emotion in the voice."],
    "speaker": ["Who is speaking?", "Name the speaker.", "Which speaker is this?"],
    "voice": ["Which voice is speaking?", "Name the voice."],
    "gender": ["Is the speaker male or female?", "What is the speaker's gender?"],
    "age": ["How old is the speaker?", "What age group is the speaker in?"],
    "keyword": ["Which keyword is spoken?", "Name the spoken keyword.", "What is the keyword?"],
    "command": ["Which word is spoken?", "Name the spoken command.", "What is the spoken word?"],
    "intent": ["What does the speaker want?", "Name the intent of the speech."],
    "count": ["How many are there?", "Count them."],
    "speaker_count": ["How many people are speaking?", "Count the speakers.", "How many voices are there?"],
    "spoof": ["Is the speech real or synthetic?", "Is this voice genuine?"],
    "vocal_sound": ["What sound does the person make?", "Name the vocal sound."],
    "sound_event": ["What makes this sound?", "Name the sound.", "What is heard?"],
    "game_sound": ["What makes this sound?", "Name the sound.", "What is heard?"],
    "scene": ["Where was this recorded?", "Name the acoustic scene."],
    "tagging": ["Which sounds are heard? List them.", "List the tags of this audio.", "Name all sounds."],
    "caption": ["Describe the audio.", "What happens in this audio?", "Write a caption for the audio."],
    "question": ["Answer the question about the audio."],
    "instrument": ["Which instrument is playing?", "Name the instrument.", "What instrument is this?"],
    "genre": ["Which genre is this music?", "Name the genre.", "What kind of music is this?"],
    "pitch": ["Which note is played?", "Name the note.", "What pitch is this?"],
    "drum": ["Which drum is hit?", "Name the drum."],
    "music_tagging": ["Which tags describe this music? List them.", "List the tags of this music."],
    "music_caption": ["Describe the music.", "Write a caption for the music."],
}


# ---------------------------------------------------------------- audio

class AudioError(ValueError):
    """An audio file that cannot be used; the message is one line with its name and the reason."""


def read_audio(source, max_seconds: float | None = None, name: str | None = None) -> torch.Tensor:
    """A file's path or its bytes, of any rate, channel count and format
    -> (S,) float32 at 16 kHz, channels averaged."""
    name = source if name is None and not isinstance(source, bytes) else name or "audio"
    if not isinstance(source, bytes):
        if not os.path.isfile(source):
            raise AudioError(f"{name}: no such file")
        source = Path(source).read_bytes()
    if not source:
        raise AudioError(f"{name}: the file is empty")
    try:
        with sf.SoundFile(io.BytesIO(source)) as f:
            rate, frames, seconds = f.samplerate, f.frames, f.frames / f.samplerate
            if frames > UNKNOWN:
                raise AudioError(f"{name}: its header does not tell its length (FLAC written to a pipe?); "
                                 "write it again")
            if max_seconds is not None and seconds > max_seconds + 1e-3:
                raise AudioError(f"{name}: {seconds:.1f} s, longer than --max-seconds {max_seconds:g}; cut it or raise "
                                 "the limit")
            samples = f.read(dtype="float32", always_2d=True)
            cut = len(samples) < frames or _is_cut(source, f.extra_info)
    except (sf.LibsndfileError, RuntimeError, OSError, MemoryError) as e:
        raise AudioError(f"{name}: not readable as audio ({getattr(e, 'error_string', e)})") from None
    if cut:
        raise AudioError(f"{name}: cut short, {len(samples)} samples are left; fetch it again")
    if not len(samples):
        raise AudioError(f"{name}: holds no samples")
    audio = torch.from_numpy(samples.mean(1) if samples.shape[1] > 1 else samples[:, 0])
    low, high = torch.aminmax(audio)
    if not math.isfinite(low) or not math.isfinite(high):
        raise AudioError(f"{name}: holds samples that are NaN or infinite")
    if low == high == 0:
        raise AudioError(f"{name}: all samples are zero")
    return resample(audio, rate)


def _is_cut(raw: bytes, log: str) -> bool:
    """libsndfile reads what is left of a WAV or Ogg file that is cut short, and says so in its log at most."""
    if raw[:4] == b"OggS":  # the last page must be whole, and carry the end-of-stream flag
        page = raw[raw.rfind(b"OggS") :]
        end = 27 + page[26] + sum(page[27 : 27 + page[26]]) if len(page) > 26 else 27
        return len(page) < end or not page[5] & 4
    size, _, should = log.partition("\ndata :")[2].partition("\n")[0].partition("(should be")
    return raw[:4] == b"RIFF" and bool(should) and int(size) < 2**31 - 2**16  # larger: piped, its length was not known


@lru_cache(maxsize=32)
def _sinc_kernel(old: int, new: int, zeros: int = 64, attenuation: float = 80.0):
    """Kaiser-windowed sinc for each of `new` output phases: ((old + 2 * reach, new) float32, reach in input samples).

    `zeros` zero crossings a side; images and aliases lie `attenuation` dB down (Kaiser's formulas), the pass band
    ends 8 % below the lower Nyquist frequency.
    """
    beta = 0.1102 * (attenuation - 8.7)
    transition = (attenuation - 8) / (2.285 * 2 * zeros * math.pi)  # as a share of the lower Nyquist frequency
    cutoff = min(old, new) * (1 - transition / 2)  # such that the stop band begins at that frequency
    reach = math.ceil(zeros * old / cutoff)
    taps = torch.arange(-reach, old + reach, dtype=torch.float64)[:, None]  # input samples around one block of `old`
    t = (taps / old - torch.arange(new, dtype=torch.float64) / new) * cutoff  # in zero crossings
    window = (torch.special.i0(beta * (1 - (t / zeros).square()).clamp(min=0).sqrt())
              / torch.special.i0(torch.tensor(beta)))
    kernel = torch.where(t.abs() < zeros, torch.sinc(t) * window, 0.0) * cutoff / old
    return kernel.float(), reach


def resample(audio: torch.Tensor, rate: int, new_rate: int = SAMPLE_RATE) -> torch.Tensor:
    """Band-limited windowed-sinc resampling: (..., S) at `rate` -> (..., ceil(S * new_rate / rate))."""
    if rate == new_rate:
        return audio
    if rate * new_rate // math.gcd(rate, new_rate) ** 2 > 2**21:
        rate = round(rate, -1)  # an odd rate, such as 11,127 Hz, would need a huge filter; under 10 Hz nobody hears
    step = math.gcd(rate, new_rate)
    widen = max(1, 64 * step // new_rate)  # blocks of few outputs make a slow matrix product: take several at once
    old, new = widen * rate // step, widen * new_rate // step
    kernel, reach = _sinc_kernel(old, new)
    blocks = -(-audio.shape[-1] // old)
    padded = torch.nn.functional.pad(audio, (reach, reach + blocks * old - audio.shape[-1]))
    out = padded.unfold(-1, len(kernel), old) @ kernel  # (..., blocks, new)
    return out.flatten(-2)[..., : -(-audio.shape[-1] * new // old)]


# ---------------------------------------------------------------- rows

class Rows:
    """The rows of JSON Lines manifests and WebDataset tars, read when asked for: only offsets stay in memory.

    rows[i] is row i's dictionary, rows.audio(i) its samples, rows.name(i) its place for a message. Per row there are
    `seconds` (float32), `task` and `split` (numbers into `tasks` and `splits`). 32 bytes a row, in plain buffers
    that forked workers share.

    answers: every row must be fit for training (an answer, an instruction or a task with templates).
    splits: only rows of these splits are kept (a row without split is "train"). max_seconds: no row may be longer.
    Raises ValueError with one line for each of the first bad rows.
    """

    def __init__(self, paths, answers: bool = False, splits=None, max_seconds: float | None = None):
        self.paths = _expand(paths)
        self._problems, self._seen = [], 0
        self._answers, self._keep, self._max_seconds = answers, splits, max_seconds
        self._numbers = ({}, {})  # task and split names -> numbers
        columns = array("i"), array("q"), array("q"), array("f"), array("i"), array("i")
        for number, path in enumerate(self.paths):
            before = self._seen
            if path.endswith((".gz", ".tgz")):
                self._problem(path, "is compressed; unpack it first")
                continue
            for row in self._scan_tar(path) if path.endswith(".tar") else self._scan_manifest(path):
                for column, value in zip(columns, (number, *row)):
                    column.append(value)
            if self._seen == before and not self._problems:
                self._problem(path, "holds no rows")
        if self._problems:
            more = [f"... and {len(self._problems) - 10} more"] if len(self._problems) > 10 else []
            raise ValueError("\n".join(self._problems[:10] + more))
        types = np.int32, np.int64, np.int64, np.float32, np.int32, np.int32
        self.file, self.at, self.audio_at, self.seconds, self.task, self.split = map(np.frombuffer, columns, types)
        self.tasks, self.splits = (list(n) for n in self._numbers)

    def __len__(self):
        return len(self.at)

    def _problem(self, where, what):
        self._problems.append(f"{where}: {what}")

    def _check(self, row, where, seconds_of):
        """(seconds, task number, split number) of a parsed row, or None where it is left out or bad."""
        self._seen += 1
        task, split = (usual if row.get(key) is None else str(row[key])
                       for key, usual in (("task", ""), ("split", "train")))
        if self._keep is not None and split not in self._keep:
            return None
        if self._answers:
            if not isinstance(row.get("answer"), str) or not row["answer"].strip():
                return self._problem(where, f"answer is {row.get('answer')!r}; training needs a text")
            if not isinstance(row.get("instruction") or "", str):
                return self._problem(where, f"instruction is {row['instruction']!r}; need a text")
            if not row.get("instruction") and task not in TEMPLATES:
                return self._problem(where, f"no instruction, and task {task!r} has no templates; add either "
                                            "(TEMPLATES in data.py)")
        seconds = row["seconds"] if "seconds" in row else seconds_of()
        if not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
            return self._problem(where, f"seconds is {seconds!r}; need a number")
        if self._max_seconds is not None and seconds > self._max_seconds + 1e-3:
            return self._problem(where, f"{seconds:g} s, longer than --max-seconds {self._max_seconds:g}; "
                                        "cut it or raise the limit")
        numbers = (names.setdefault(name, len(names)) for names, name in zip(self._numbers, (task, split)))
        return seconds, *numbers

    def _scan_manifest(self, path):
        folder, at = Path(path).parent, 0
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                start, at = at, at + len(line)
                if line.isspace():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as e:
                    self._problem(f"{path}:{number}", f"not JSON ({e})")
                    continue
                if not isinstance(row, dict) or not isinstance(row.get("audio"), str) or not row["audio"]:
                    self._problem(f"{path}:{number}", "lacks \"audio\", the clip's path relative to this file")
                    continue
                checked = self._check(row, f"{path}:{number}", lambda: _header_seconds(folder / row["audio"]))
                if checked:
                    yield start, -1, *checked

    def _scan_tar(self, path):
        """Pairs KEY.json with KEY.flac in the order they come, so that a key may occur again later."""
        waiting = {}  # key -> {"json" or "audio": position of the member's header}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    tar.members.clear()  # it would keep them all
                    key, suffix = os.path.splitext(member.name)
                    kind = "json" if suffix == ".json" else "audio" if suffix.lower() in AUDIO_SUFFIXES else None
                    if not member.isfile() or kind is None:
                        continue
                    part = waiting.setdefault(key, {})
                    if kind in part:
                        self._problem(f"{path}: {member.name}",
                                      "comes twice before its partner; give each clip its own key")
                    part[kind] = member.offset_data - 512, member.offset_data, member.size
                    if len(part) == 2:
                        del waiting[key]
                        yield from self._check_member(path, key, part)
                rest = os.path.getsize(path) - tar.offset  # tarfile stops at what is no header: should be empty blocks
                if not 512 <= rest <= 2**20 or self._pread(path, rest, tar.offset).strip(b"\0"):
                    self._problem(path, f"cut short, damaged or several tars in one, after {tar.offset} bytes; "
                                        "fetch it again")
        except (tarfile.ReadError, EOFError) as e:
            self._problem(path, f"not a plain tar, or cut short ({e}); unpack a .gz first, else fetch it again")
        for key, part in waiting.items():
            self._problem(f"{path}: {key}", "audio without its .json" if "audio" in part else ".json without its audio")

    def _check_member(self, path, key, part):
        _, at, size = part["json"]
        try:
            row = _member_row(self._pread(path, size, at))
        except ValueError as e:
            return self._problem(f"{path}: {key}.json", f"not JSON ({e})")
        if not isinstance(row, dict):
            return self._problem(f"{path}: {key}.json", "not a JSON object")
        _, at, size = part["audio"]
        checked = self._check(row, f"{path}: {key}.json", lambda: _header_seconds(_Member(path, at, size)))
        if checked:
            yield part["json"][0], part["audio"][0], *checked

    def _pread(self, path, size, at) -> bytes:
        # Opened anew each time: there may be more shards than open files allowed.
        with open(path, "rb", buffering=0) as f:
            return os.pread(f.fileno(), size, at)

    def _header(self, path, at) -> tarfile.TarInfo:
        """The header of the tar member that stands at `at`."""
        try:
            return tarfile.TarInfo.frombuf(self._pread(path, 512, at), "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            raise AudioError(f"{path}: no member at byte {at} any more; the file has changed since the start") from None

    def _content(self, path, at) -> bytes:
        return self._pread(path, self._header(path, at).size, at + 512)

    def __getitem__(self, i: int) -> dict:
        path, at = self.paths[self.file[i]], int(self.at[i])
        if self.audio_at[i] < 0:
            with open(path, "rb") as f:
                f.seek(at)
                return json.loads(f.readline())
        row = _member_row(self._content(path, at))
        row.setdefault("audio", self._header(path, int(self.audio_at[i])).name)
        return row

    def raw(self, i: int) -> bytes:
        """The bytes of row i's audio file."""
        path = self.paths[self.file[i]]
        if self.audio_at[i] >= 0:
            return self._content(path, int(self.audio_at[i]))
        file = Path(path).parent / self[i]["audio"]
        try:
            return file.read_bytes()
        except OSError as e:
            raise AudioError(f"{e.strerror}") from None

    def audio(self, i: int, max_seconds: float | None = None) -> torch.Tensor:
        """Row i's samples: (S,) float32 at 16 kHz. Raises AudioError."""
        try:
            return read_audio(self.raw(i), max_seconds, name="audio")
        except AudioError as e:  # its place is worked out only now: that reads the manifest
            raise AudioError(f"{self.name(i)}: {e}") from None

    def name(self, i: int) -> str:
        """Row i's place, for a message: manifest:line (audio), or tar (member)."""
        path = self.paths[self.file[i]]
        if self.audio_at[i] >= 0:
            return f"{path} ({self._header(path, int(self.audio_at[i])).name})"
        at = int(self.at[i])
        with open(path, "rb") as f:
            line = 1 + sum(f.read(min(2**20, at - n)).count(b"\n") for n in range(0, at, 2**20))
        return f"{path}:{line} ({self[i]['audio']})"

    def where(self, split: str) -> np.ndarray:
        """Numbers of the rows of a split, int32."""
        if split not in self.splits:
            return np.empty(0, np.int32)
        return np.flatnonzero(self.split == self.splits.index(split)).astype(np.int32)


def _member_row(text: bytes):
    """A tar member's json; a list there is the clip's events (so X-ARES publishes DESED and MAESTRO)."""
    row = json.loads(text)
    return {"events": row} if isinstance(row, list) else row


def _expand(paths) -> list[str]:
    found = []
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        hits = sorted(glob.glob(str(path))) or ([str(path)] if os.path.isfile(path) else [])
        if not hits:
            raise FileNotFoundError(f"{path}: no such manifest or tar")
        found += hits
    if twice := [p for p, n in Counter(map(os.path.realpath, found)).items() if n > 1]:
        raise ValueError(f"{twice[0]}: named twice among the data")
    return found


class _Member:
    """A tar's member as a file for soundfile; reads no more than it is asked for."""

    def __init__(self, path, at: int, size: int):
        self.path, self.start, self.size, self.at = path, at, size, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.size - self.at)
        with open(self.path, "rb", buffering=0) as f:
            got = os.pread(f.fileno(), left if size < 0 else min(size, left), self.start + self.at)
        self.at += len(got)
        return got


def _header_seconds(file) -> float:
    """Length by the file's header, 0 where it does not tell: the clip is reported when its turn comes."""
    try:
        info = sf.info(file)
        return info.duration if info.frames <= UNKNOWN else 0.0
    except (sf.LibsndfileError, RuntimeError, OSError, TypeError):  # TypeError: a .raw file
        return 0.0


# ---------------------------------------------------------------- sampling

SHORTEST = 0.1  # seconds that any clip counts for at least: its text costs something, too


class Sampler:
    """Endless seeded batches of row numbers: tasks mixed, lengths bucketed, each rank its own part.

    Rows come in pools of a fixed number of batches. A pool takes from every task its exact share, next in line of
    that task's shuffled passes; its rows are sorted by length, cut into batches of about `batch_seconds` (padding
    counted), and the batches shuffled. Any pool can thus be made without the ones before it: the state is one number,
    the batches taken by all ranks together.

    weights: {task: weight}; else tasks weigh rows ** (1 / temperature): 1 as they are, higher evens them out.
    Iterating yields (batch number, row numbers), from `position` on.
    """

    POOL = 64  # batches
    # lengths are compared up to this share: costs some padding, keeps tasks of one length from filling a batch
    JITTER = 0.1

    def __init__(self, rows: Rows, index, batch_seconds: float, seed: int = 0, temperature: float = 2.0,
                 weights: dict | None = None, rank: int = 0, world: int = 1):
        self.rows, self.batch_seconds, self.seed, self.position = rows, batch_seconds, seed, 0
        self.rank, self.world = rank, world
        tasks = rows.task[index]
        self.members = {t: index[tasks == t] for t in np.unique(tasks).tolist()}
        if not self.members:
            raise ValueError("no rows to train on: no row has the split that --train-split names")
        names = {rows.tasks[t]: t for t in self.members}
        if unknown := set(weights or {}) - names.keys():
            raise ValueError(f"weights name tasks that the data lacks: {sorted(unknown)}; it has {sorted(names)}")
        size = {t: len(m) for t, m in self.members.items()}
        weight = {t: (weights.get(rows.tasks[t], 0.0) if weights else n ** (1 / temperature)) for t, n in size.items()}
        if not all(0 <= w < math.inf for w in weight.values()) or not any(weight.values()):
            raise ValueError(f"task weights {weights}: each must be a number of 0 or more, and one must be above")
        self.share = {t: w / sum(weight.values()) for t, w in weight.items() if w > 0}
        mean = sum(s * float(np.maximum(rows.seconds[self.members[t]], SHORTEST).mean()) for t, s in self.share.items())
        # Rounding can take one row from each task's share of a pool; no batch may end up without a row.
        self.pool_rows = max(self.POOL + len(self.share), 0.95 * self.POOL * batch_seconds / mean)
        self._passes, self._pool = {}, (None, None)

    def _row(self, task: int, number: int) -> int:
        """The `number`-th row of a task's endless line: pass after pass, each shuffled anew."""
        members = self.members[task]
        turn, at = divmod(number, len(members))
        if self._passes.get(task, (None,))[0] != turn:
            order = np.random.default_rng([self.seed, 1, task, turn]).permutation(len(members)).astype(np.int32)
            self._passes[task] = turn, order
        return int(members[self._passes[task][1][at]])

    def _batches(self, pool: int) -> list[list[int]]:
        if self._pool[0] == pool:
            return self._pool[1]
        picked = []
        for task, share in self.share.items():
            first, last = (round(self.pool_rows * share * p) for p in (pool, pool + 1))
            picked += [self._row(task, n) for n in range(first, last)]
        rng, picked = np.random.default_rng([self.seed, 2, pool]), np.array(picked)
        about = self.rows.seconds[picked] * rng.uniform(1 - self.JITTER, 1 + self.JITTER, len(picked))
        picked = picked[np.argsort(about, kind="stable")]
        batches = cut_evenly(picked.tolist(), self.rows.seconds[picked], self.POOL)
        rng.shuffle(batches)
        self._pool = pool, batches
        return batches

    def __iter__(self):
        number = self.position + self.rank
        while True:
            pool, at = divmod(number, self.POOL)
            yield number, self._batches(pool)[at]
            number += self.world

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]


def cut(rows, seconds, limit: float) -> list[list[int]]:
    """Rows, about sorted by length -> runs of at most `limit` seconds each, padding counted;
    a longer row stands alone."""
    runs, longest = [], 0.0
    for row, s in zip(rows, np.maximum(seconds, SHORTEST)):
        longest = max(longest, s)
        if not runs or (len(runs[-1]) + 1) * longest > limit:
            runs.append([])
            longest = s
        runs[-1].append(row)
    return runs


def cut_evenly(rows, seconds, n: int) -> list[list[int]]:
    """Rows, about sorted by length -> exactly n runs with the smallest possible limit."""
    low, high = 0.0, float(len(rows) * max(seconds.max(), SHORTEST))
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (low, middle) if len(cut(rows, seconds, middle)) <= n else (middle, high)
    runs = cut(rows, seconds, high)
    while len(runs) < n:  # ties can leave a run too few: halve the fullest
        i = max(range(len(runs)), key=lambda i: len(runs[i]))
        half = len(runs[i]) // 2
        runs[i : i + 1] = [runs[i][:half], runs[i][half:]]
    return runs


# ---------------------------------------------------------------- batches

@dataclass(frozen=True)
class Batch:
    """audio (B, S) float32, zero beyond samples (B,) on the CPU; per row: ids of prompt and answer, task, row number.

    skipped: (task, message) for each clip that could not be read.
    """
    audio: torch.Tensor
    samples: torch.Tensor
    prompts: list[list[int]]
    answers: list[list[int]]
    tasks: list[str]
    rows: list[int]
    instructions: list[str]
    texts: list[str]
    skipped: list[tuple[str, str]]

    def pin_memory(self):
        return replace(self, audio=self.audio.pin_memory())

    def to(self, device):
        return replace(self, audio=self.audio.to(device, non_blocking=True))


class Batches(Dataset):
    """(batch number, row numbers) -> Batch: reads, resamples, draws instructions, tokenises. Runs in the workers.

    tokenizer: has prompt(instruction) -> ids and answer(text) -> ids.
    """

    def __init__(self, rows: Rows, tokenizer, seed: int = 0, max_seconds: float | None = None):
        self.rows, self.tokenizer, self.seed, self.max_seconds = rows, tokenizer, seed, max_seconds

    def _read(self, numbers):
        """Clips of the rows that can be read, and what went wrong with the others."""
        clips, skipped = {}, []
        for i in numbers:
            try:
                clips[i] = self.rows.audio(i, self.max_seconds)
            except AudioError as e:
                skipped.append((self.rows.tasks[self.rows.task[i]], str(e)))
        return clips, skipped

    def _neighbours(self, i):
        """The rows after row i in its split, those before it last."""
        others = chain(range(i + 1, len(self.rows)), range(i))
        return (n for n in others if self.rows.split[n] == self.rows.split[i])

    def __getitem__(self, spec) -> Batch:
        number, wanted = spec
        clips, skipped = self._read(wanted)
        neighbours = islice(self._neighbours(wanted[0]), 20)
        while not clips:  # every rank must have a batch
            extra = next(neighbours, None)
            if extra is None:
                raise AudioError(f"{len(skipped)} clips in a row cannot be read; the last: {skipped[-1][1]}")
            clips, more = self._read([extra])
            skipped += more
        kept = [i for i in wanted if i in clips] or list(clips)
        draw = random.Random(f"{self.seed}/{number}")
        rows = [self.rows[i] for i in kept]
        tasks = [self.rows.tasks[self.rows.task[i]] for i in kept]
        instructions = [r.get("instruction") or draw.choice(TEMPLATES[t]) for r, t in zip(rows, tasks)]
        samples = torch.tensor([len(clips[i]) for i in kept])
        audio = torch.nn.utils.rnn.pad_sequence([clips[i] for i in kept], batch_first=True)
        return Batch(audio, samples, [self.tokenizer.prompt(t) for t in instructions],
                     [self.tokenizer.answer(r["answer"].strip()) for r in rows], tasks,
                     kept, instructions, [r["answer"].strip() for r in rows], skipped)


def loader(batches: Batches, specs, workers: int, pin_memory: bool = False) -> DataLoader:
    """Batches of `specs` in their order, made by `workers` processes (0: here)."""
    # Forked workers share the rows' memory, and see when their parent is killed; Python 3.14 has another default.
    how = dict(multiprocessing_context="fork", prefetch_factor=4) if workers else {}
    return DataLoader(batches, batch_size=None, sampler=specs, num_workers=workers, pin_memory=pin_memory, **how)


def held_out(rows: Rows, split: str, per_task: int, batch_seconds: float, seed: int = 0) -> list[tuple[int, list[int]]]:
    """Specs of a fixed held-out set: up to `per_task` rows of each task (0: all), in batches by length."""
    index, picked = rows.where(split), []
    for task in np.unique(rows.task[index]):
        members = index[rows.task[index] == task]
        order = np.random.default_rng([seed, 3, int(task)]).permutation(len(members))
        picked += members[order[: per_task or None]].tolist()
    picked.sort(key=lambda i: (rows.seconds[i], i))
    return list(enumerate(cut(picked, rows.seconds[picked], batch_seconds)))


# ---------------------------------------------------------------- command line

def main():
    """Say what manifests and tars hold; bad rows, and with --decode bad clips, are named and make the exit code 1."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data", nargs="+", help="manifests (.jsonl) and tars; globs work")
    p.add_argument("--decode", action="store_true", help="decode every clip, name those that cannot be read")
    args = p.parse_args()
    try:
        rows = Rows(args.data)
    except (OSError, ValueError) as e:
        sys.exit(f"error: {e}")
    print(f"{'task':20s} {'rows':>9s} {'hours':>8s} {'longest':>8s}  splits")
    for t, task in enumerate(rows.tasks):
        mine = rows.task == t
        splits = Counter(rows.splits[s] for s in rows.split[mine].tolist())
        seconds = rows.seconds[mine]
        hours = seconds.sum(dtype=float) / 3600
        print(f"{task or '(none)':20s} {mine.sum():9d} {hours:8.2f} {seconds.max():7.1f}s  {dict(splits)}")
    if args.decode:
        bad = 0
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
