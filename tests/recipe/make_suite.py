"""Build the suite: eleven small tasks on speech, music and other sounds, from Debian's packages.

    python tests/recipe/make_suite.py OUT    # 31,000 clips, 17 hours, 1 GB; some minutes

OUT/TASK/*.flac are clips, 16 kHz mono; OUT/TASK.jsonl their rows. OUT/.debs keeps the packages,
unpacked. Splits keep sources apart: other pictures (language), other voices (command), other
phrases (voice), another sound font (instrument, pitch), other drum kits (drum), other files
(game_sound). Clips of speaker_count, tagging and caption are mixed from clips of their own split.

Needs pip install -e '.[test]' and apt-get install fluidsynth espeak-ng.
"""
import argparse
import gzip
import hashlib
import json
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import scipy.signal
import soundfile as sf

RATE = 16_000
SPLITS = ("train", "valid", "test")
# Package -> licence of its sounds, as in its usr/share/doc/PACKAGE/copyright.
STAMPS = {"tuxpaint-stamps-default": "GPL-2+"}
PROMPTS = {f"asterisk-core-sounds-{code}{scripts_or_audio}": licence
           for code, licence in [("en", "CC-BY-SA-3.0"), ("es", "CC-BY-SA-3.0"),
                                 ("fr", "CC-BY-SA-3.0"), ("it", "CC-BY-3.0"), ("ru", "CC-BY-3.0")]
           for scripts_or_audio in ("", "-wav")}
DRUM_KITS = {"hydrogen-drumkits": "by kit: GPL-2, GPL-2+, CC-BY-3.0, CC-BY-SA-3.0, CC0"}
GAMES = {"wesnoth-1.16-data": "GPL-2+", "megaglest-data": "CC-BY-SA-3.0",
         "hedgewars-data": "GFDL-1.3, Droplet*: CC-BY-SA-3.0", "supertux-data": "GPL-3+",
         "lincity-ng-data": "GPL-2+"}
FONTS = {"fluid-soundfont-gm": "MIT", "timgm6mb-soundfont": "GPL-2"}  # train and valid; test
# Task -> domain, instruction, and what Debian 12 gives: clips of train, valid and test, hours.
TASKS = {
    "language": ("speech", "Which language is spoken?", (3962, 533, 1349, 2.45)),
    "transcribe": ("speech", "Transcribe the speech.", (5881, 767, 1839, 4.19)),
    "speaker_count": ("speech", "How many people are speaking?", (1260, 180, 360, 1.50)),
    "voice": ("speech", "Which voice is speaking?", (567, 42, 193, 0.24)),
    "command": ("speech", "Which word is spoken?", (2520, 420, 840, 0.75)),
    "instrument": ("music", "Which family of instruments is playing?", (1522, 255, 638, 1.34)),
    "pitch": ("music", "Which note is played?", (1138, 191, 478, 1.00)),
    "drum": ("music", "Which drum is hit?", (326, 129, 127, 0.20)),
    "game_sound": ("environment", "What makes this sound?", (1212, 113, 264, 0.57)),
    "tagging": ("environment", "Which sounds are heard? List them.", (1680, 240, 480, 2.67)),
    "caption": ("environment", "Describe the audio.", (1120, 160, 320, 1.78))}
LANGUAGES = dict(be="Belarusian", bg="Bulgarian", ca="Catalan", el="Greek", en="English",
                 es="Spanish", fr="French", it="Italian", ro="Romanian", ru="Russian")
COMMANDS = ("yes no up down left right on off stop go zero one two three four five six seven "
            "eight nine bed bird cat dog happy house marvin sheila tree wow").split()
FAMILIES = ("piano, chromatic percussion, organ, guitar, bass, strings, ensemble, brass, reed, "
            "pipe, synth lead, synth pad, synth effects, ethnic, percussive, sound effects"
            ).split(", ")
NOTES = "C, C sharp, D, D sharp, E, F, F sharp, G, G sharp, A, A sharp, B".split(", ")
# Class -> pattern of an instrument's name in a drum kit; the first that fits.
DRUMS = {
    "kick": r"kick|bass ?drum|\bbd\b", "snare": r"snare|\bsd\b|\bsn\b",
    "hi-hat": r"hat|hh\b|hi-?hat", "tom": "tom", "cymbal": "crash|ride|cymbal|splash|china|cym",
    "clap": "clap", "hand percussion": "conga|bongo|shaker|tamb|cowbell|cabasa|agogo|block"
                                       "|maraca|djembe|timbale|rim|stick|perc"}
PEOPLE = ("swordman|stickfighter|horseman|archer|technician|worker|warrior|spearman|axe_thrower"
          "|guard|princess|valkyrie|initiate|battlemage|archmage|shaman|summoner")
# Class -> its caption, pattern of "/" and a file's name in lower case; the first that fits.
SOUNDS = {
    "animal": ("An animal calls.", r"wolf|chicken|sheep|pig_|cow_|mudchute_cow|bull_|hawk|rooster"
               r"|owl|horse-|bee\.|birds|eagle|elewalk|ele\d"),
    "explosion or gunshot": (
        "An explosion or a gunshot.", r"explosion|gun|firecracker|fireworks|mortar|thunderstick"
        r"|cannon|grenadeimpact|mineimpact|rocket\d|rocketexpl|catapult_hit|bombard"),
    "water": ("Water flows or splashes.", r"/water|splash|droplet|rain\b|rain\.|rain\d|waterfall"
              r"|harbor|parklandlake|beewater|planewater"),
    "fire": ("A fire burns.", r"campfire|/fire\d|firewaste|flame|torch|wicker_fire|blowtorch"
             r"|sizzle|lava|melee-fire|/fire\."),
    "bow and arrow": ("An arrow is shot.",
                      r"bow|arrow|archer_attack|sling|/dart|spear-miss|throw-?\d"),
    "magic spell": ("A magic spell is cast.",
                    r"magic|summon|(battlemage|archmage|initiate)_(att|hit)|genie_att|heal|warp"
                    r"|portal|ice_beam|shaman_heal"),
    "creature roar": ("A creature roars.", r"daemon|dragon|behemoth|golem|orc-|ogre|troll|goblin"
                      r"|drake|gryphon|naga|yeti|ghoul|lich|snake|saurian|wose|bat-hit|hiss"),
    "person in pain": (
        "A person cries out in pain.",
        rf"(human|elf|dwarf|mermen|mermaid)[^/]*(die|hit)|({PEOPLE})_die|ow\d|ooff"),
    "weapon strike": (
        "A weapon strikes.", r"(swordman|stickfighter|horseman|guard|warrior|spearman|axe_thrower"
        r"|valkyrie|princess|cudgel|mummy|ghost_armor)_att|sword|axe\b|/axe|mace|spear|staff"
        r"|hatchet|club|flail|knife|dagger|whipcrack|baseballbat|fist"),
    "spoken reply": ("A person speaks.", rf"({PEOPLE}|genie|cudgel|mummy)_(ack|sel)"),
    "workshop": ("People work with tools.", r"worker_(mine|build|harv|work)|technician_(mine|build)"
                 r"|anvil|blacksmith|hammer|building_fall|raze|/build|/mill\d|pottery|coalmine"
                 r"|oremine|saw\.|shaman_build|initiate_(build|harv|work)|monumentconstr"),
    "machine": ("A machine runs.", r"machine_|airship|catapult_(walk|att)|industry|railtrain|trafic"
                r"|plane|power|substation|windmill|tank|jetpack|ufo|steam|drillgun|orni_|carpet_"),
    "outdoor ambience": (
        "The sounds of the outdoors.", r"/(day|night|sunny_day|nightime|desertday|wind|hell"
        r"|morning)\d*\.|parkland(?!lake|plane)|green\d|farm\d|organicfarm|residential"
        r"|sportscroud|school|university|market|shanty|commune")}
# Class -> the sentence for it in a caption.
SENTENCES = {name: said for name, (said, _) in SOUNDS.items() if name != "spoken reply"} | {
    "piano": "A piano plays.", "organ": "An organ plays.", "guitar": "A guitar plays.",
    "bass": "A bass plays.", "strings": "Strings play.", "ensemble": "An ensemble plays.",
    "brass": "Brass plays.", "reed": "A reed instrument plays.", "pipe": "A pipe plays.",
    "synth lead": "A synthesizer plays a lead.", "ethnic": "An ethnic instrument plays.",
    "chromatic percussion": "Mallets or bells ring.", "kick": "A kick drum is hit.",
    "snare": "A snare drum is hit.", "hi-hat": "A hi-hat is struck.", "tom": "A tom is hit.",
    "cymbal": "A cymbal crashes.", "clap": "Hands clap.", "speech": "Someone talks."}


# ---------------------------------------------------------------- packages, clips, rows

def need(commands, packages):
    """End in one line if a command is missing."""
    missing = [command for command in commands if shutil.which(command) is None]
    if missing:
        sys.exit(f"error: needs {', '.join(missing)}: apt-get install {packages}")


def fetch(packages, into, optional=False):
    """Download and unpack packages that are not there: their folders under `into`."""
    def one(package):
        folder = into / package
        if folder.exists():
            return folder
        with tempfile.TemporaryDirectory(dir=into) as tmp:
            got = subprocess.run(["apt-get", "download", "-qq", package], cwd=tmp, text=True,
                                 stderr=subprocess.PIPE)
            if got.returncode and not optional:
                sys.exit(f"error: apt-get download {package}, after apt-get update: {got.stderr}")
            if got.returncode:
                print(f"note: apt-get download {package}: {got.stderr}", end="")
                return folder
            deb, = Path(tmp).glob("*.deb")
            subprocess.run(["dpkg", "-x", deb, Path(tmp, "files")], check=True)
            Path(tmp, "files").rename(folder)
        return folder

    into.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(one, packages))


def load(path, seconds=10.0):
    """A file's beginning as (S,) float32 at 16 kHz, its peak at most 1; None: short or silent."""
    audio, rate = sf.read(path, dtype="float32", always_2d=True)
    audio = audio.mean(1)[: int(seconds * rate)]
    if rate != RATE:
        audio = scipy.signal.resample_poly(audio, RATE, rate).astype(np.float32)
    peak = np.abs(audio).max(initial=0)
    if len(audio) < 0.05 * RATE or peak < 1e-4:
        return None
    return audio / max(1.0, peak)


def speak(command, text=""):
    """What a synthesizer says. The last word of its command is the flag for the file to write."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as f:
        subprocess.run([*command, f.name], input=text, text=True, check=True,
                       stderr=subprocess.DEVNULL)
        if not Path(f.name).stat().st_size:
            sys.exit(f"error: {' '.join(command)}: wrote nothing; is the voice installed?")
        return load(f.name)


def first_match(patterns, text):
    """The first class in {class: pattern} whose pattern is in the text, or None."""
    return next((name for name, pattern in patterns.items() if re.search(pattern, text)), None)


def split_of(source):
    """A source's split, drawn by its hash: 70, 10 and 20 % of the sources."""
    share = int(hashlib.sha1(str(source).encode()).hexdigest()[:8], 16) / 0xFFFFFFFF
    return "train" if share < 0.7 else "valid" if share < 0.8 else "test"


class Task:
    """The clips and rows of a task. `expected`: clips of train, valid and test, hours."""

    def __init__(self, out, name, domain, instruction, expected):
        self.out, self.name, self.domain, self.instruction = out, name, domain, instruction
        self.expected, self.rows, self.seen = expected, [], set()
        (out / name).mkdir(parents=True, exist_ok=True)

    def add(self, audio, split, label=None, answer=None, **more):
        """A clip, unless it is None or was there before: that would tell a test's answer."""
        digest = audio is not None and hashlib.sha1(audio.tobytes()).hexdigest()[:16]
        if not digest or digest in self.seen:
            return
        self.seen.add(digest)
        path = f"{self.name}/{digest}.flac"
        sf.write(self.out / path, audio, RATE, subtype="PCM_16")
        row = {"audio": path, "task": self.name, "domain": self.domain, "split": split}
        if label is not None:
            row["label"] = label
        row |= {"instruction": self.instruction, "answer": answer or label,
                "seconds": round(len(audio) / RATE, 3)}
        self.rows.append(row | more)

    def close(self):
        """Write the manifest, print the counts and check them."""
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows]
        (self.out / f"{self.name}.jsonl").write_text("".join(lines), encoding="utf-8")
        splits = Counter(row["split"] for row in self.rows)
        hours = sum(row["seconds"] for row in self.rows) / 3600
        found = *[splits[split] for split in SPLITS], hours
        print(check(self.name, found, self.expected), flush=True)


def check(name, found, expected):
    """The line on a task's clips of train, valid and test and its hours, with a note if others
    were expected. A split without clips ends the run."""
    line = "{:16}  train {:5}  valid {:4}  test {:5}  {:5.2f} h".format(name, *found)
    for split, clips, wanted in zip(SPLITS, found, expected):
        if wanted and not clips:
            sys.exit(f"error: {name}: no clip in {split}; is a package or a voice missing?")
    if found[:3] != expected[:3] or abs(found[3] - expected[3]) > 0.01:
        line += "  note: Debian 12 has {} / {} / {} clips, {:.2f} h".format(*expected)
    return line


# ---------------------------------------------------------------- speech

def stamps(root, language, transcribe):
    """Spoken names of pictures in eight languages: which language, and what is said.
    Returns (audio, split, language code) of those that have a script."""
    speech = []
    for path in sorted(root.rglob("*_desc_*.ogg")):
        stem, code = path.stem.rsplit("_desc_", 1)
        if code not in "be bg ca el es fr ro ru".split():
            continue
        audio, split = load(path), split_of(stem)
        language.add(audio, split, LANGUAGES[code])
        script = path.with_name(f"{stem}.txt")
        text = script.read_text("utf-8", errors="replace") if script.exists() else ""
        said = [line for line in text.splitlines() if line.startswith(f"{code}.utf8=")]
        said = said[-1].split("=", 1)[1].strip() if said else ""
        if said and audio is not None:
            transcribe.add(audio, split, answer=said, language=LANGUAGES[code])
            speech.append((audio, split, code))
    language.close()
    return speech


def prompts(roots, transcribe):
    """Asterisk's telephone prompts with their scripts, in five languages."""
    scripts = {}  # (language code, prompt) -> text
    for root in roots:
        for path in root.rglob("core-sounds-*.txt.gz"):
            code = path.name.split("-")[2][:2]
            for line in gzip.open(path, "rt", encoding="utf-8", errors="replace"):
                prompt, _, text = line.partition(":")
                text = re.sub(r"\[.*?\]|\(.*?\)", "", text).strip()  # remarks
                if text and not line.startswith(";"):
                    scripts[code, prompt.strip()] = text
    for root in roots:
        code = root.name.split("-")[3]
        for path in sorted(root.rglob("*.wav")):
            base = next(folder for folder in path.parents if folder.parent.name == "sounds")
            said = scripts.get((code, str(path.relative_to(base).with_suffix(""))))
            if said:
                transcribe.add(load(path, 12), split_of(("prompt", path.stem)), answer=said,
                               language=LANGUAGES[code])
    transcribe.close()


def speaker_count(speech, task):
    """One to five voices at once, each in another language."""
    rng = random.Random(0)
    for split, clips in zip(SPLITS, (1260, 180, 360)):
        voices = {}  # language code -> clips
        for audio, its_split, code in speech:
            if its_split == split and len(audio) > 0.7 * RATE:
                voices.setdefault(code, []).append(audio)
        for i in range(clips):
            mix = np.zeros(3 * RATE, np.float32)
            for code in rng.sample(sorted(voices), i % 5 + 1):
                audio = rng.choice(voices[code])[: len(mix)]
                at = rng.randint(0, len(mix) - len(audio))
                mix[at : at + len(audio)] += at_random_level(audio, rng, 0.15)
            task.add(limited(mix), split, ["one", "two", "three", "four", "five"][i % 5])
    task.close()


def at_random_level(audio, rng, decades):
    """Audio scaled to a root mean square about 0.05."""
    return audio / (np.sqrt(np.mean(audio**2)) + 1e-6) * 0.05 * 10 ** rng.uniform(-decades, decades)


def limited(audio):
    """Audio scaled so that its peak is at most 1."""
    return (audio / max(1.0, np.abs(audio).max())).astype(np.float32)


def voice(root, task):
    for path in sorted(root.rglob("voices/*/*.ogg")):
        task.add(load(path), split_of(("voice", path.stem)), path.parent.name.replace("_", " "))
    task.close()


def command(task):
    """Thirty words by espeak-ng. The voices of valid and test are not in train."""
    accents = "en-us en-gb en-gb-scotland en-gb-x-rp en-gb-x-gbclan en-gb-x-gbcwmd en-029".split()
    voices = "m1 m2 m3 m4 m5 m6 m7 m8 f1 f2 f3 f4 f5 croak klatt klatt2 klatt3 klatt4".split()
    splits = dict.fromkeys(("m5", "f5"), "valid") | dict.fromkeys("m4 f3 m7 klatt3".split(), "test")
    rng, jobs = random.Random(1), []
    for accent in accents:
        for name in voices:
            for word in COMMANDS:
                speed, pitch = rng.randint(120, 220), rng.randint(20, 80)
                say = ["espeak-ng", "-v", f"{accent}+{name}", "-s", str(speed), "-p", str(pitch),
                       word, "-w"]
                jobs.append((say, splits.get(name, "train"), word))
    with ThreadPoolExecutor(4) as pool:
        spoken = pool.map(speak, [say for say, _, _ in jobs])
        for audio, (_, split, word) in zip(spoken, jobs):
            task.add(audio, split, word)
    task.close()


# ---------------------------------------------------------------- music

def midi(program, notes):
    """A MIDI file: every 2 s one of the notes (pitch, velocity), held for 1.2 s."""
    def after(seconds):  # 960 ticks a second, in two bytes of seven bits
        ticks = round(960 * seconds)
        return bytes([ticks >> 7 | 0x80, ticks & 0x7F])

    events = bytes([0, 0xC0, program])
    for pitch, velocity in notes:
        events += bytes([0, 0x90, pitch, velocity])  # on
        events += after(1.2) + bytes([0x80, pitch, 0])  # off
        events += after(0.8) + bytes([0xB0, 123, 0])  # all off
    events += b"\0\xff\x2f\0"  # end
    header = struct.pack(">4sIHHH", b"MThd", 6, 0, 1, 480)  # two quarter notes a second
    return header + struct.pack(">4sI", b"MTrk", len(events)) + events


def render(program, font, notes):
    """The notes as fluidsynth plays them: (2 s,) audio of each, shorter at the end."""
    with tempfile.TemporaryDirectory() as tmp:
        Path(tmp, "notes.mid").write_bytes(midi(program, notes))
        subprocess.run(["fluidsynth", "-ni", "-q", "-r", "32000", "-g", "0.8", "-F",
                        f"{tmp}/notes.wav", font, f"{tmp}/notes.mid"], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        audio = load(f"{tmp}/notes.wav", 60)
    if audio is None:
        return []
    return [audio[2 * RATE * i : 2 * RATE * (i + 1)] for i in range(len(notes))]


def instruments(train_font, test_font, instrument, pitch):
    """Single notes of the 128 General MIDI programs: which family, and which note."""
    jobs, splits = [], []
    for program in range(128):
        rng = random.Random(program)
        for split, font, count in (("train", train_font, 12), ("valid", train_font, 2),
                                   ("test", test_font, 5)):
            notes = [(rng.randint(40, 84), rng.randint(60, 120)) for _ in range(count)]
            jobs.append((program, font, notes))
            splits.append(split)
    with ThreadPoolExecutor(2) as pool:
        rendered = pool.map(lambda job: render(*job), jobs)
        for clips, split, (program, _, notes) in zip(rendered, splits, jobs):
            for audio, (key, _) in zip(clips, notes):
                if len(audio) < RATE or np.abs(audio).max() < 1e-3:
                    continue
                instrument.add(audio, split, FAMILIES[program // 8], program=program)
                if program < 96:  # later ones are effects, drums and noises
                    pitch.add(audio, split, NOTES[key % 12], program=program)
    instrument.close()
    pitch.close()


def drum(root, task):
    for i, kit in enumerate(sorted(root.rglob("drumkit.xml"))):
        split = "test" if i % 3 == 2 else "valid" if i % 7 == 3 else "train"
        text = re.sub(r'\sxmlns="[^"]+"', "", kit.read_text("utf-8", errors="replace"), count=1)
        for instrument in ElementTree.fromstring(text).iter("instrument"):
            label = first_match(DRUMS, (instrument.findtext("name") or "").lower())
            for file in instrument.iter("filename"):
                if label and file.text and (kit.parent / file.text).exists():
                    task.add(load(kit.parent / file.text, 3), split, label)
    task.close()


# ---------------------------------------------------------------- other sounds

def sounds(root):
    """The sound files under a folder, without music."""
    for path in sorted(root.rglob("*")):
        inside = str(path.relative_to(root)).lower()
        if inside.endswith((".wav", ".ogg")) and "music" not in inside:
            yield path


def game_sound(roots, task):
    patterns = {name: pattern for name, (_, pattern) in SOUNDS.items()}
    for root in roots:
        for path in sounds(root):
            label = first_match(patterns, "/" + path.name.lower())
            if label and "voices" not in str(path.relative_to(root)).lower():
                folder, stem = path.parent.name, re.sub(r"\d+[a-z]?$", "", path.stem)
                task.add(load(path, 6), split_of((root.name, folder, stem)), label,
                         caption=SOUNDS[label][0],
                         source=f"{root.name}/{folder}/{path.name}".lower())
    task.close()


def captions(sentences):
    """Three ways to tell sounds in their order: ["A dog barks.", "Hands clap."] -> texts."""
    parts = [sentence[0].lower() + sentence[1:].rstrip(".") for sentence in sentences]
    first, rest = sentences[0].rstrip("."), parts[1:]
    return [f"{first}, then {', then '.join(rest)}.",
            f"First {parts[0]}; after that, {' and finally '.join(rest)}.",
            f"You hear how {parts[0]} before {' and then '.join(rest)}."]


def mixtures(out, sources, tagging, caption):
    """Clips of the class tasks, 4 s in all: laid over one another, and one after another."""
    rng, size, pools = random.Random(2), 4 * RATE, {}  # (split, class) -> files
    for task in sources:
        for row in task.rows:
            name = "speech" if task.name == "language" else row["label"]
            if name in SENTENCES:
                pools.setdefault((row["split"], name), []).append(out / row["audio"])

    def draw(split, name, longest):
        path = rng.choice(pools[split, name])
        return at_random_level(sf.read(path, dtype="float32")[0][:longest], rng, 0.3)

    for split, tag_clips, caption_clips in zip(SPLITS, (1680, 240, 480), (1120, 160, 320)):
        names = sorted(name for its_split, name in pools if its_split == split)
        for i in range(tag_clips):
            mix, picked = np.zeros(size, np.float32), sorted(rng.sample(names, i % 4 + 1))
            for name in picked:
                audio = draw(split, name, size)
                at = rng.randint(0, size - len(audio))
                mix[at : at + len(audio)] += audio
            tagging.add(limited(mix), split, picked, ", ".join(picked))
        for i in range(caption_clips):
            count = i % 2 + 2
            mix, picked, part = np.zeros(size, np.float32), rng.sample(names, count), size // count
            for j, name in enumerate(picked):
                audio = draw(split, name, part)
                mix[j * part : j * part + len(audio)] += audio
            texts = captions([SENTENCES[name] for name in picked])
            caption.add(limited(mix), split, answer=texts[0], captions=texts)
    tagging.close()
    caption.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    need(["apt-get", "dpkg", "fluidsynth", "espeak-ng"], "fluidsynth espeak-ng")
    pictures, kits, *fonts = fetch([*STAMPS, *DRUM_KITS, *FONTS], out / ".debs")
    phone, games = fetch(PROMPTS, out / ".debs"), fetch(GAMES, out / ".debs", optional=True)
    fonts = [next(font.rglob("*.sf2")) for font in fonts]
    task = {name: Task(out, name, *TASKS[name]) for name in TASKS}

    speech = stamps(pictures, task["language"], task["transcribe"])
    prompts(phone, task["transcribe"])
    speaker_count(speech, task["speaker_count"])
    voice(out / ".debs/hedgewars-data", task["voice"])
    command(task["command"])
    instruments(*fonts, task["instrument"], task["pitch"])
    drum(kits, task["drum"])
    game_sound(games, task["game_sound"])
    mixed = [task[name] for name in ("language", "instrument", "drum", "game_sound")]
    mixtures(out, mixed, task["tagging"], task["caption"])


if __name__ == "__main__":
    main()
