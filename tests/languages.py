"""Asks trained runs in several languages: how many answers are right?

    python tests/languages.py --run OUT --data suite/{drum,voice}.jsonl --json OUT.json

Each task's clips are the same in every language. English asks as the rows do (or TEMPLATES),
the others as TRANSLATIONS. right: the answer has the truth's words; as_in_english: those of
the answer to the English question. Neither looks at case, nor at punctuation at the ends.
"""
import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import TRANSLATIONS, Batches, Rows, held_out  # noqa: E402
from train import normalize, print_skipped  # noqa: E402
from uniwhisper import load_run  # noqa: E402

LONGEST = 64  # tokens of an answer
SECONDS = 64.0  # of padded audio in a batch
SHOWN = 3  # clips of each task whose answers are written, too


def questions(batch, language: str) -> list[str]:
    """What each clip of a batch is asked."""
    if language == "en":
        return batch.instructions
    return [TRANSLATIONS[language][task] for task in batch.tasks]


def ask(a, run: str, rows: Rows) -> list[dict]:
    """Of each clip: task, truth, and by language the answer."""
    model = load_run(run).to(a.device)
    batches = Batches(rows, model.decoder.tokenizer, sample_rate=model.encoder.sample_rate)
    answers = []
    for spec in held_out(rows, a.on, a.clips, SECONDS):
        batch = batches[spec].to(a.device)
        print_skipped(batch)
        asked = [dict(task=t, truth=text) for t, text in zip(batch.tasks, batch.texts)]
        for language in a.languages:
            texts = model.generate(batch.audio, batch.samples, questions(batch, language),
                                   LONGEST)
            for clip, text in zip(asked, texts):
                clip[language] = text
        answers += asked
        print(f"{run}: {len(answers)} clips", file=sys.stderr, flush=True)
    return answers


def score(answers: list[dict], language: str) -> dict:
    """Shares of the answers in one language: {task: {clips, right, as_in_english}}."""
    scores = {}
    for clip in answers:
        task = scores.setdefault(clip["task"], dict(clips=0, right=0, as_in_english=0))
        answer = normalize(clip[language])
        task["clips"] += 1
        task["right"] += answer == normalize(clip["truth"])
        task["as_in_english"] += answer == normalize(clip["en"])
    for task in scores.values():
        task["right"] /= task["clips"]
        task["as_in_english"] /= task["clips"]
    return scores


def examples(answers: list[dict]) -> list[dict]:
    """The first clips of each task."""
    shown = []
    for clip in answers:
        if sum(other["task"] == clip["task"] for other in shown) < SHOWN:
            shown.append(clip)
    return sorted(shown, key=lambda clip: clip["task"])


def compare(a) -> dict:
    rows = Rows(a.data, answers=True, splits={a.on})
    for language in a.languages[1:]:
        unknown = sorted(set(rows.tasks) - set(TRANSLATIONS[language]))
        if unknown:
            raise ValueError(f"tasks {unknown} are not in TRANSLATIONS of data.py: "
                             "add them, or leave their --data out")
    out = {}
    for run in a.run:
        answers = ask(a, run, rows)
        out[run] = {language: score(answers, language) for language in a.languages}
        out[run]["examples"] = examples(answers)
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", nargs="+", required=True, help="--out of training runs")
    p.add_argument("--data", nargs="+", required=True, help="manifests of the tasks to ask")
    p.add_argument("--on", choices=("valid", "test"), default="test", help="split (test)")
    p.add_argument("--clips", type=int, default=50, help="of each task (50; 0: all)")
    p.add_argument("--languages", nargs="+", choices=tuple(TRANSLATIONS),
                   default=list(TRANSLATIONS), help="beside English (all)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", help="write the result there")
    a = p.parse_args()
    a.languages = ["en", *a.languages]
    try:
        result = compare(a)
    except (OSError, ValueError) as e:
        sys.exit(f"error: {e}")
    text = json.dumps(result, indent=1, ensure_ascii=False)
    print(text)
    if a.json:
        Path(a.json).write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
