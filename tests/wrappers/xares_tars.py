"""The public X-ARES tasks by this project's own probes, from tars as X-ARES publishes them.

    python tests/wrappers/xares_tars.py --encoder DIR --xares FOLDER [--tasks esc50 desed ...]

FOLDER/esc50/*.tar and so on. The other flags are probe.py's. tests/results/README.md says where
these probes differ from X-ARES's own.
"""
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data  # noqa: E402
import probe  # noqa: E402
from probe import SPLITS, Clip, Spec, Task  # noqa: E402
from uniwhisper import flag  # noqa: E402


class Source(NamedTuple):
    spec: Spec
    label: object  # key or function of a clip's json
    tars: str = "{}"  # start of a tar's name; {} is its split or fold
    splits: object = SPLITS  # the tars' words for these, or folds


# As in X-ARES 0.1.3 (knn=False and spelling, too), but for LibriSpeech's transcripts. The paper
# does not name its 20 tasks; they are likely these without clotho.
XARES = {
    "asvspoof2015": Source(Spec("speech", 2000, epochs=5, batch=64), "binary_spoof",
                           "asvspoof_{}", ("train", "valid", "eval")),
    # "validation" is the test split; all keys but audio are captions; no clip has two crops.
    "clotho": Source(Spec("environment", 1045, "recall@1", 30, 20, 128, knn=False),
                     lambda row: [row[key] for key in row if key != "audio"],
                     "clotho_{}", ("development", "evaluation", "validation")),
    "cremad": Source(Spec("speech", 1116), "label", "wds-audio-{}"),
    "desed": Source(Spec("environment", 1153, "segment F1 macro", knn=False),
                    lambda row: [(e["onset"], e["offset"], name) for e in row["events"]
                                 for name in e["label"].split(",")],
                    "wds-audio-{}", ("train", None, "eval")),
    "esc50": Source(Spec("environment", 400), "label", "wds-audio-fold-{}-", range(1, 6)),
    "fluentspeechcommands": Source(Spec("speech", 2000), "transcription",
                                   "fluentspeechcommands_{}"),
    "freemusicarchive": Source(Spec("music", 800, crop=10, epochs=3), "genre", "fma_small_{}"),
    "fsd50k": Source(Spec("environment", 2000, "mAP", crop=10, batch=64, knn=False),
                     lambda row: row["soundevent"].split(";"), "fsd50k_{}",
                     ("train", "validation", "eval")),
    "fsdkaggle2018": Source(Spec("environment", 1600, epochs=3, batch=64, knn=False), "sound",
                            "fsd18_{}", ("train", None, "test")),
    "gtzan_genre": Source(Spec("music", 100), "genre", "gtzan_fold_{}_", range(10)),
    "libricount": Source(Spec("speech", 1144, batch=64), "num_speakers", "libricount_fold{:02}",
                         range(5)),
    "librispeechmalefemale": Source(Spec("speech", 2620, crop=5), "gender", "{}",
                                    ("train-clean-100", "dev-clean", "test-clean")),
    "maestro": Source(Spec("music", 65, "segment F1 micro", epochs=50, knn=False,
                           positive_weight=10),
                      lambda row: [(e["start"], e["end"], str(e["note"])) for e in row["events"]],
                      "maestro_{}"),
    "nsynthinstument": Source(Spec("music", 2000), "instrument_family_str", "nsynth_{}"),
    "ravdess": Source(Spec("speech", 360), "emotion", "ravdess_fold_{}_", range(4)),
    "speechcommandsv1": Source(Spec("speech", 2000, batch=64), "labels", "wds-audio-{}"),
    "urbansound8k": Source(Spec("environment", 873), "soundevent", "urbansound_fold{}_",
                           range(1, 11)),
    "vocalimitations": Source(Spec("environment", 1867, epochs=20), "imitation",
                              "vocal_imitations_fold{:02}_", range(3)),
    "vocalsound": Source(Spec("speech", 2000), "label"),
    "voxceleb1": Source(Spec("speech", 2000, crop=6), "speakerid", "voxceleb1_{}"),
    "voxlingua33": Source(Spec("speech", 1609, crop=10, batch=64), "labels", "{}",
                          ("train_subset", None, "dev")),
}


def read_task(folder, name: str) -> Task:
    """One of X-ARES's tasks from the tars in folder/name, unconverted."""
    source, clips = XARES[name], []
    splits = source.splits if isinstance(source.splits, range) else SPLITS
    for split, word in zip(splits, source.splits):
        tars = Path(folder, name, source.tars.format(word) + "*.tar")
        rows = [] if word is None else data.Rows([tars])
        for i in range(len(rows)):
            label = source.label(rows[i]) if callable(source.label) else str(rows[i][source.label])
            clips.append(Clip(rows, i, split, label))
    return Task(name, source.spec, clips)


@dataclass(frozen=True)
class Settings(probe.Settings):
    xares: str = flag("", "folder of X-ARES downloads", required=True)
    tasks: tuple[str, ...] = flag((), "these alone", choices=tuple(XARES), metavar="TASK")


def find_tasks(s: Settings) -> list[Task]:
    names = s.tasks or [name for name in XARES if name in os.listdir(s.xares)]
    return [read_task(s.xares, name) for name in names]


if __name__ == "__main__":
    probe.main(Settings, find_tasks)
