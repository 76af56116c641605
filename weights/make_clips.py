"""Synthesised clips for the embedded example: small, seeded, three domains, held-out test clips.

Every clip is made from random pitches, levels, lengths and noise, so a test clip is never a copy
of a training clip. One clip serves the three tasks of its domain; each task has its own manifest
(DESIGN.md section 3's rows).

    python weights/make_clips.py OUT [--seed 0] [--train 320 --valid 40 --test 60]
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
import soundfile

RATE = 16000

# task -> (domain, wordings of the question, answers). weights/make_tiny.py teaches the tiny decoder
# these words too.
TASKS = {
    "vowel": ("speech", ["Which vowel is spoken?", "What is the vowel?"],
              ["ah", "ee", "oo", "oh", "eh"]),
    "syllables": ("speech", ["How many syllables are there?", "Count the syllables."],
                  ["one syllable", "two syllables", "three syllables", "four syllables"]),
    "voice": ("speech", ["What kind of voice is it?", "Describe the voice."],
              ["a low voice", "a middle voice", "a high voice", "a whisper"]),
    "sound": ("environment", ["What makes this sound?", "Which sound is it?"],
              ["rain", "wind", "siren", "bell", "engine", "clock", "bird", "horn"]),
    "motion": ("environment", ["How does the source move?", "Is it coming closer?"],
               ["coming closer", "moving away", "staying in place"]),
    "repeats": ("environment", ["How often is it heard?", "How many times does it sound?"],
                ["once", "twice", "three times"]),
    "instrument": ("music", ["Which instrument is playing?", "Name the instrument."],
                   ["flute", "organ", "trumpet", "violin", "guitar", "marimba"]),
    "melody": ("music", ["How does the melody move?", "Describe the melody."],
               ["rising", "falling", "level"]),
    "note": ("music", ["Which note comes first?", "Name the first note."],
             ["C", "D", "E", "F", "G", "A", "B"]),
}

# First three formants of an adult voice in Hz (rounded from Peterson and Barney, 1952).
FORMANTS = {"ah": (730, 1090, 2440), "ee": (270, 2290, 3010), "oo": (300, 870, 2240),
            "oh": (500, 840, 2500), "eh": (530, 1840, 2480)}
SEMITONE = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
# Hz. assumption: the first note lies in this octave, where 80 mel bands still tell neighbours apart
C5 = 523.25


def seconds_axis(samples):
    return np.arange(samples) / RATE


def filtered(x, response):
    """x (S,) through a filter given by its gain at each frequency: response(hertz (N,)) -> (N,)."""
    # zero-padded: the filter's tail must not wrap to the clip's start
    size = 2 ** (2 * len(x) - 1).bit_length()
    hertz = np.fft.rfftfreq(size, 1 / RATE)
    return np.fft.irfft(np.fft.rfft(x, size) * response(hertz), size)[: len(x)]


def band(low, high):
    """Smooth band-pass gain between two frequencies in Hz, 12 dB per octave outside."""
    return lambda f: 1 / (1 + (f / high) ** 2) * (f / low) ** 2 / (1 + (f / low) ** 2)


def fade(samples, attack, release):
    """Envelope (S,) that rises over `attack` seconds and falls over the last `release` seconds."""
    t = seconds_axis(samples)
    return np.clip(t / attack, 0, 1) * np.clip((samples / RATE - t) / release, 0, 1)


def tone(hertz, partials):
    """Sum of sinusoids.

    hertz (S,): the fundamental over time; partials: [(ratio, level or envelope (S,)), ...].
    """
    phase = 2 * np.pi * np.cumsum(hertz) / RATE
    top = hertz.max()
    return sum(level * np.sin(ratio * phase)
               for ratio, level in partials if ratio * top < 0.45 * RATE)


def pulses(hertz):
    """Pulse train (S,) at the frequency hertz (S,), each pulse shared by two samples so that its
    time is exact.
    """
    cycles = np.cumsum(hertz) / RATE
    at = np.interp(np.arange(1, int(cycles[-1]) + 1), cycles, np.arange(len(hertz)))
    out = np.zeros(len(hertz) + 1)
    np.add.at(out, at.astype(int), 1 - at % 1)
    np.add.at(out, at.astype(int) + 1, at % 1)
    return out[:-1]


# ---- speech: a formant synthesiser

def vocal_tract(vowel, scale, tilt):
    """Gain of one vowel's resonances.

    `scale` > 1: a shorter vocal tract; the source falls off above `tilt` Hz.
    """
    def response(f):
        gain = 1 / (1 + (f / tilt) ** 2) ** 0.5 + 0j
        for formant, width in zip(FORMANTS[vowel] + (3500,), (70, 90, 140, 250)):
            hertz = formant * scale
            gain = gain * hertz**2 / (hertz**2 - f**2 + 1j * f * width)
        return gain
    return response


def make_speech(rng, labels):
    vowel, voice = labels["vowel"], labels["voice"]
    count = 1 + TASKS["syllables"][2].index(labels["syllables"])
    low, high, scale = {"a low voice": (85, 120, 0.95), "a middle voice": (165, 215, 1.05),
                        "a high voice": (280, 370, 1.15), "a whisper": (100, 200, 1.0)}[voice]
    pitch, scale = rng.uniform(low, high), scale * rng.uniform(0.94, 1.06)
    parts = []
    for _ in range(count):
        samples = int(RATE * rng.uniform(0.15, 0.2) * (1.6 if count == 1 else 1))
        bend = 1 + rng.uniform(-0.1, 0.1) * np.linspace(-1, 1, samples)
        source = rng.standard_normal(samples) if voice == "a whisper" else pulses(pitch * bend)
        tilt = 4000 if voice == "a whisper" else 600  # breath noise is brighter than the voice
        sound = filtered(source, vocal_tract(vowel, scale, tilt)) * fade(samples, 0.03, 0.05)
        parts += [sound / np.abs(sound).max() * rng.uniform(0.7, 1),
                  np.zeros(int(RATE * rng.uniform(0.05, 0.09)))]
    return np.concatenate(parts)


# ---- environment

def rain(rng, n):
    drops = np.where(rng.random(n) < 0.004, rng.standard_normal(n) * 12, 0)
    return filtered(rng.standard_normal(n) + drops, band(rng.uniform(900, 1800), 7000))


def wind(rng, n):
    centre = rng.uniform(180, 400)
    gusts = 1 + 0.4 * np.sin(2 * np.pi * rng.uniform(1, 4) * seconds_axis(n) + rng.uniform(0, 6))
    return filtered(rng.standard_normal(n),
                    lambda f: band(centre * 0.8, centre * 1.2)(f) ** 2) * gusts


def siren(rng, n):
    swing = np.sin(2 * np.pi * rng.uniform(3, 6) * seconds_axis(n) + rng.uniform(0, 6))
    return tone(rng.uniform(800, 1100) * 2 ** (0.5 * swing), [(1, 1), (2, 0.4), (3, 0.25)])


def bell(rng, n):
    t, hertz = seconds_axis(n), rng.uniform(500, 900)
    return tone(np.full(n, hertz), [(r, a * np.exp(-d * t)) for r, a, d in (
        (0.5, 0.5, 3), (1, 1, 4), (1.2, 0.7, 5), (1.5, 0.5, 6), (2, 0.8, 6), (2.67, 0.5, 9),
        (3.01, 0.4, 10))])


def engine(rng, n):
    turns = rng.uniform(28, 55) * (
        1 + 0.05 * np.sin(2 * np.pi * rng.uniform(2, 5) * seconds_axis(n)))
    return filtered(pulses(turns) * 6 + 0.15 * rng.standard_normal(n),
                    band(50, rng.uniform(300, 600)))


def clock(rng, n):
    ticks = np.convolve(pulses(np.full(n, rng.uniform(11, 16))), np.exp(-np.arange(120) / 25))[:n]
    return filtered(ticks * rng.standard_normal(n), band(rng.uniform(1500, 3000), 6500))


def bird(rng, n):
    sweep = (seconds_axis(n) * rng.uniform(9, 16)) % 1
    return tone(rng.uniform(2600, 3800) * (1 + rng.uniform(0.2, 0.5) * sweep),
                [(1, np.sin(np.pi * sweep) ** 2)])


def horn(rng, n):
    hertz = rng.uniform(300, 420)
    partials = [(k, 1 / k**0.5) for k in range(1, 9)]
    # two horns, a third apart
    return tone(np.full(n, hertz), partials) + tone(np.full(n, hertz * 1.26), partials)


def make_environment(rng, labels):
    make = {f.__name__: f
            for f in (rain, wind, siren, bell, engine, clock, bird, horn)}[labels["sound"]]
    count = 1 + TASKS["repeats"][2].index(labels["repeats"])
    gap = rng.uniform(0.09, 0.14)
    each = int(RATE * (rng.uniform(0.8, 1.1) - gap * (count - 1)) / count)
    parts = []
    for _ in range(count):
        parts += [make(rng, each) * fade(each, 0.01, 0.02), np.zeros(int(RATE * gap))]
    sound = np.concatenate(parts[:-1])
    change = {"coming closer": 1, "moving away": -1, "staying in place": 0}[labels["motion"]]
    decibels = change * rng.uniform(20, 28) * np.linspace(-0.5, 0.5, len(sound))
    return sound * 10 ** (decibels / 20)


# ---- music

def play(rng, instrument, hertz, n):
    """One note (n samples) of a simple additive model of an instrument."""
    t = seconds_axis(n)
    vibrato = 1 + 0.012 * np.sin(2 * np.pi * 6 * t + rng.uniform(0, 6))
    fixed, rising = np.full(n, hertz), np.clip(t / 0.08, 0.05, 1)
    if instrument == "flute":
        breath = filtered(rng.standard_normal(n), band(hertz, 2.5 * hertz)) * 0.12
        return (tone(fixed, [(1, 1), (2, 0.15), (3, 0.04)]) + breath) * fade(n, 0.07, 0.05)
    if instrument == "organ":
        return tone(fixed, [(0.5, 0.6), (1, 1), (2, 0.8), (4, 0.6), (8, 0.4)]
                    ) * fade(n, 0.008, 0.02)
    if instrument == "trumpet":
        return tone(fixed, [(k, 0.9 ** abs(k - 3) * rising ** (0.4 * k)) for k in range(1, 14)]
                    ) * fade(n, 0.02, 0.04)
    if instrument == "violin":
        return tone(hertz * vibrato, [(k, 1 / k) for k in range(1, 14)]) * fade(n, 0.06, 0.05)
    if instrument == "guitar":
        return tone(fixed, [(k, np.exp(-(3 + 2 * k) * t) / k) for k in range(1, 10)]
                    ) * fade(n, 0.002, 0.02)
    return tone(fixed, [(1, np.exp(-9 * t)), (3.9, 0.5 * np.exp(-25 * t)),
                        (9.2, 0.2 * np.exp(-50 * t))]
                ) * fade(n, 0.002, 0.02)  # marimba


def make_music(rng, labels):
    count = int(rng.integers(2, 4))
    step = {"rising": 1, "falling": -1, "level": 0}[labels["melody"]]
    tune = rng.uniform(-0.2, 0.2)  # semitones: not every instrument is in tune
    pitch, parts = SEMITONE[labels["note"]] + tune, []
    for _ in range(count):
        n = int(RATE * rng.uniform(0.65, 0.9) / count)
        parts.append(play(rng, labels["instrument"], C5 * 2 ** (pitch / 12), n)
                     * rng.uniform(0.7, 1))
        pitch += step * int(rng.integers(2, 6))
    return np.concatenate(parts)


# ---- clips and manifests

MAKERS = {"speech": make_speech, "environment": make_environment, "music": make_music}


def recorded(rng, sound):
    """What a microphone would give: a little silence before, background noise, any level; peak
    below 0.35.
    """
    sound = np.concatenate([np.zeros(int(RATE * rng.uniform(0.01, 0.06))),
                            sound / np.abs(sound).max()])
    noise = filtered(rng.standard_normal(len(sound)),
                     band(rng.uniform(50, 500), rng.uniform(1000, 6000)))
    ratio = 10 ** (-rng.uniform(25, 45) / 20)  # 25 to 45 dB below the clip's rms
    sound = sound + noise / np.sqrt(np.mean(noise**2)) * np.sqrt(np.mean(sound**2)) * ratio
    return (sound / np.abs(sound).max() * 10 ** rng.uniform(-1.5, -0.5)).astype(np.float32)


def balanced_labels(rng, answers, count):
    """`count` answers, each as often as the others (give or take one), in random order."""
    return [answers[i % len(answers)] for i in rng.permutation(count)]


def write_clips(folder, seed=0, train=320, valid=40, test=60):
    """Write the example's clips and manifests under `folder`.

    folder: made if it is missing; gets FOLDER/clips/*.flac and one FOLDER/{task}.jsonl for each of
        the nine tasks.
    train, valid, test: clips per domain and split. The same seed and counts give the same clips
        and rows.
    Returns the manifests' paths (list of str).
    """
    folder = Path(folder)
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    rows = {task: [] for task in TASKS}
    for d, (domain, make) in enumerate(MAKERS.items()):
        tasks = [task for task in TASKS if TASKS[task][0] == domain]
        for s, (split, count) in enumerate((("train", train), ("valid", valid), ("test", test))):
            rng = np.random.default_rng([seed, d, s])
            labels = {task: balanced_labels(rng, TASKS[task][2], count) for task in tasks}
            for i in range(count):
                label = {task: labels[task][i] for task in tasks}
                audio = recorded(rng, make(rng, label))
                name = f"clips/{domain}-{split}-{i:04d}.flac"
                flac = io.BytesIO()  # to a path, soundfile would wait for the disk at every clip
                soundfile.write(flac, audio, RATE, format="FLAC", subtype="PCM_16")
                (folder / name).write_bytes(flac.getvalue())
                for task in tasks:
                    rows[task].append({
                        "audio": name, "instruction": str(rng.choice(TASKS[task][1])),
                        "answer": label[task],
                        "task": task, "domain": domain, "split": split, "label": label[task],
                        "seconds": round(len(audio) / RATE, 4)})
    for task, lines in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in lines)
        (folder / f"{task}.jsonl").write_text(text, encoding="utf-8")
    return [str(folder / f"{task}.jsonl") for task in TASKS]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder for the clips and the manifests")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other clips")
    for split, count in (("train", 320), ("valid", 40), ("test", 60)):
        parser.add_argument(f"--{split}", type=int, default=count,
                            help=f"{split} clips per domain (default {count})")
    args = parser.parse_args()
    for path in write_clips(args.out, args.seed, args.train, args.valid, args.test):
        print(path)


if __name__ == "__main__":
    main()
