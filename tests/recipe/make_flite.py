"""The words of the suite's `command`, spoken by a synthesizer that neither its training clips nor
the out-of-source tests have heard: to choose by.

    python tests/make_flite.py SUITE OUT        # needs the command flite (apt-get install flite)

OUT/command_flite.jsonl: train is the suite's, where it is; valid are 30 words by three voices at
three speeds. The voice slt is left out: one of `command_festival`'s test voices is the same person.
"""
import argparse
import json
import os
import subprocess
from pathlib import Path

VOICES, STRETCHES = ("awb", "kal", "rms"), ("0.85", "1.0", "1.25")


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("suite", type=Path)
    p.add_argument("out", type=Path)
    a = p.parse_args()
    (a.out / "command_flite").mkdir(parents=True, exist_ok=True)
    rows = []
    for line in (a.suite / "command.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["split"] == "train":
            row["audio"] = os.path.relpath(a.suite / row["audio"], a.out)
            rows.append(row | {"task": "command_flite"})
    words = sorted({row["label"] for row in rows})
    for voice in VOICES:
        for stretch in STRETCHES:
            for word in words:
                audio = f"command_flite/{voice}-{stretch}-{word}.wav"
                subprocess.run(["flite", "-voice", voice, "--setf", f"duration_stretch={stretch}",
                                "-t", word, "-o", a.out / audio], check=True)
                rows.append({"audio": audio, "task": "command_flite", "domain": "speech",
                             "split": "valid", "label": word, "answer": word})
    with open(a.out / "command_flite.jsonl", "w") as out:
        for row in rows:
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
