"""Build the out-of-source tasks: is what an encoder learned on the suite true of other sources?

    python tests/recipe/make_transfer.py SUITE OUT    # SUITE: from make_suite.py; a few minutes

command_flite      train: the suite's command; valid: its words by three voices of flite
command_festival   train and valid: the suite's command; test: its words by two voices of Festival
letters_language   letters and syllables in 17 languages or variants, clips of its own
game_sound_other   train and valid: the suite's game_sound; test: sounds of other games

Only probes train on these rows; valid is to choose by, test to judge by. flite's voice slt is left
out, for it is the same person as one of Festival's. Clips and rows are as in the suite.

Needs what make_suite.py needs, and
apt-get install flite festival festvox-kdlpc16k festvox-us-slt-hts
"""
import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from make_suite import COMMANDS, Task, fetch, first_match, load, need, sounds, speak, split_of

# Package -> licence of its sounds, as in its usr/share/doc/PACKAGE/copyright.
LETTERS = {"klettres-data": "GPL-2+"}
OTHER_GAMES = {
    "warmux-data": "GPL-2+", "minetest-data": "CC-BY-SA-3.0, some CC-BY-3.0 or CC0",
    "powermanga-data": "GPL-3+", "plee-the-bear-data": "CC-BY-SA-3.0",
    "freedroid-data": "GPL-2+", "bzflag-data": "LGPL-2.1 or MPL", "trackballs-data": "GPL-2+",
    "caveexpress-data": "CC-BY-SA-4.0", "tuxpaint-data": "GPL-2+"}
# As TASKS of make_suite.py.
TASKS = {
    "command_flite": ("speech", "Which word is spoken?", (2520, 270, 0, 0.56)),
    "command_festival": ("speech", "Which word is spoken?", (2520, 420, 120, 0.61)),
    "letters_language": ("speech", "Which language is spoken?", (893, 128, 235, 0.47)),
    "game_sound_other": ("environment", "What makes this sound?", (1212, 113, 118, 0.52))}
# Class of game_sound -> pattern of "/" and a path in lower case; the first that fits. They are
# narrow on purpose: those of SOUNDS would label "screenshot" a gunshot and "beep" an animal.
OTHER_SOUNDS = {
    "explosion or gunshot": r"explosion|explode|_exp\.|blast_sound|boom|shotgun|/gun\.|/m16\."
                            r"|_shot\.|(enemy|guardian|spaceship)_fire|fire_bullet_(?!laser)"
                            r"|bzflag/fire",
    "person in pain": r"voices/injured|plee/injured|player-pain",
    "animal": "croak|monk",
    "fire": r"/fire_(fire|large|small)|flame\.ogg|lava|blowtorch|burning|furnace",
    "water": "splash|/rain|env_sounds_water|waterfall|/water-|swimming|drown|bubble|sinks?[2.]",
    "workshop": "airhammer|anvil|default_dig_(choppy|cracky|crumbly|metal)",
    "machine": "jetpack|cart_moving|elevator|machine_loop|steamroller|aircraft_flying"}


def reuse(task, suite, name, splits):
    """The suite's rows of these splits, their clips where they are."""
    for line in (suite / f"{name}.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        if row["split"] in splits:
            audio = os.path.relpath(suite / row["audio"], task.out)
            task.rows.append(row | {"task": task.name, "audio": audio})
            task.seen.add(Path(audio).stem)


def commands(task, split, voices, command):
    """The suite's words by each voice at three speeds, which voice_cmu_us_slt_arctic_hts ignores;
    command(voice, stretch, word) says one."""
    jobs = [(voice, stretch, word) for voice in voices for stretch in ("0.85", "1.0", "1.25")
            for word in COMMANDS]
    with ThreadPoolExecutor(2) as pool:
        for audio, job in zip(pool.map(lambda job: command(*job), jobs), jobs):
            task.add(audio, split, job[2])


def flite(voice, stretch, word):
    return speak(["flite", "-voice", voice, "--setf", f"duration_stretch={stretch}", "-t", word,
                  "-o"])


def festival(voice, stretch, word):
    setting = f"(begin ({voice}) (Parameter.set 'Duration_Stretch {stretch}))"
    return speak(["text2wave", "-eval", setting, "-o"], word)


def letters_language(root, task):
    for folder in sorted((root / "usr/share/klettres").iterdir()):
        clips = sorted(folder.glob("alpha/*.ogg")) + sorted(folder.glob("syllab/*.ogg"))
        if len(clips) >= 40 and folder.name != "ml":  # ml: a third of all clips
            for path in clips:
                split = split_of((folder.name, path.parent.name, path.stem))
                task.add(load(path), split, folder.name)


def game_sound_other(roots, task):
    for root in roots:
        for path in sounds(root):
            label = first_match(OTHER_SOUNDS, f"/{path.relative_to(root)}".lower())
            if label:
                task.add(load(path, 6), "test", label)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    suite, out = args.suite.resolve(), args.out.resolve()
    need(["apt-get", "dpkg", "flite", "text2wave"],
         "flite festival festvox-kdlpc16k festvox-us-slt-hts")
    letters, = fetch(LETTERS, suite / ".debs")
    games = fetch(OTHER_GAMES, suite / ".debs", optional=True)
    task = {name: Task(out, name, *TASKS[name]) for name in TASKS}

    reuse(task["command_flite"], suite, "command", ["train"])
    commands(task["command_flite"], "valid", ["awb", "kal", "rms"], flite)
    reuse(task["command_festival"], suite, "command", ["train", "valid"])
    voices = ["voice_ked_diphone", "voice_cmu_us_slt_arctic_hts"]
    commands(task["command_festival"], "test", voices, festival)
    letters_language(letters, task["letters_language"])
    reuse(task["game_sound_other"], suite, "game_sound", ["train", "valid"])
    game_sound_other(games, task["game_sound_other"])
    for each in task.values():
        each.close()


if __name__ == "__main__":
    main()
