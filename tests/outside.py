"""What other people's code says of a trained encoder: transformers' Whisper and scikit-learn, beside our own generate.

    python tests/outside.py words --encoder whisper-base OUT/encoder --run OUT --data suite/transcribe.jsonl
        [--clips 300]
    python tests/outside.py knn --encoder whisper-base OUT/encoder --data suite/drum.jsonl suite/voice.jsonl

words: word error rate (lower case, no punctuation) on clips of the test split: of each encoder under Whisper's own
decoder, greedy, told the row's language; of --run, a training run, through its adapter and frozen Qwen.
knn: accuracy of scikit-learn's 10 neighbours (cosine, weighed by distance) on the mean over real tokens of
transformers' encoder, every clip padded with silence to the next 2 s.
"""
import argparse
import json
import sys
import unicodedata
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import Rows  # noqa: E402
from probe import word_error_rate  # noqa: E402
from uniwhisper import load_run  # noqa: E402

RATE, TOKEN, LONGEST = 16_000, 320, 64  # Hz; samples of an encoder token; tokens of an answer, for either decoder


def plain(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFC", text.lower()) if not unicodedata.category(c).startswith("P"))


def whisper_words(folder, rows: Rows, numbers, batch: int = 16) -> list[str]:
    """Greedy transcripts by transformers' Whisper."""
    model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    extractor = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
    of = tokenizer.token_to_id
    end, texts = of("<|endoftext|>"), []
    for part in np.array_split(numbers, -(-len(numbers) // batch)):
        mel = extractor([rows.audio(i).numpy() for i in part], sampling_rate=RATE, return_tensors="pt").input_features
        languages = [TO_LANGUAGE_CODE[rows[i]["language"].lower()] for i in part]
        ids = torch.tensor([[of("<|startoftranscript|>"), of(f"<|{code}|>"), of("<|transcribe|>"),
                             of("<|notimestamps|>")] for code in languages])
        encoded, past, said = model.get_encoder()(mel), None, []
        for _ in range(LONGEST):
            out = model(encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=past, use_cache=True)
            past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            said.append(ids[:, 0])
            if (torch.stack(said) == end).any(0).all():
                break
        for line in torch.stack(said, 1).tolist():
            texts.append(tokenizer.decode(line[: line.index(end) if end in line else None]))
        print(f"{folder}: {len(texts)} of {len(numbers)}", file=sys.stderr, flush=True)
    return texts


def our_words(run, rows: Rows, numbers, batch: int = 16) -> list[str]:
    """Answers of a run's newest checkpoint to "transcribe"; short clips first, so that little is padded."""
    model, texts = load_run(run), {}
    ordered = sorted(numbers, key=lambda i: rows.seconds[i])
    for part in np.array_split(ordered, -(-len(ordered) // batch)):
        audio = [rows.audio(i) for i in part]
        samples = torch.tensor([len(a) for a in audio])
        audio, questions = torch.nn.utils.rnn.pad_sequence(audio, True), [rows[i]["instruction"] for i in part]
        answers = model.generate(audio, questions, LONGEST, samples)
        texts.update(zip(part.tolist(), answers))
        print(f"{run}: {len(texts)} of {len(numbers)}", file=sys.stderr, flush=True)
    return [texts[i] for i in numbers]


def words(a) -> dict:
    rows = Rows(a.data, splits={"test"})
    numbers = np.random.default_rng(0).permutation(len(rows))[: a.clips].tolist()
    truths = [plain(rows[i]["answer"]) for i in numbers]
    sides = {f"{e}, Whisper's decoder": whisper_words(e, rows, numbers) for e in a.encoder}
    sides |= {f"{r}, adapter and Qwen": our_words(r, rows, numbers) for r in a.run}
    out = {"clips": len(numbers), "words": sum(len(t.split()) for t in truths)}
    out |= {name: word_error_rate([plain(t) for t in texts], truths) for name, texts in sides.items()}
    examples = [{"truth": truth, **{name: texts[n] for name, texts in sides.items()}}
                for n, truth in enumerate(truths[:8])]
    return out | {"examples": examples}


def features(folder, rows: Rows) -> np.ndarray:
    """(N, D): transformers' encoder on clips padded to the next 2 s, its table of positions cut to that length."""
    encoder = WhisperForConditionalGeneration.from_pretrained(folder).get_encoder().eval()
    extractor = WhisperFeatureExtractor(feature_size=encoder.config.num_mel_bins)
    table, out, groups = encoder.embed_positions.weight.data, [None] * len(rows), {}
    for i in range(len(rows)):
        audio = rows.audio(i)
        groups.setdefault(-(-len(audio) // (2 * RATE)), []).append((i, audio.numpy()))
    for blocks, clips in sorted(groups.items()):
        tokens = blocks * 2 * RATE // TOKEN
        encoder.embed_positions, encoder.config.max_source_positions = (
            torch.nn.Embedding.from_pretrained(table[:tokens]), tokens)
        for n in range(0, len(clips), 16):
            part = clips[n : n + 16]
            mel = extractor([a for _, a in part], sampling_rate=RATE, return_tensors="pt", padding="max_length",
                            max_length=blocks * 2 * RATE, truncation=False).input_features
            for (i, audio), x in zip(part, encoder(mel).last_hidden_state):
                out[i] = x[: max(1, -(-len(audio) // TOKEN))].mean(0).numpy()
    return np.stack(out)


def knn(a) -> dict:
    from sklearn.neighbors import KNeighborsClassifier

    out = {}
    for path in a.data:
        rows = Rows([path])
        splits, labels = np.array(rows.splits)[rows.split], np.array([rows[i]["label"] for i in range(len(rows))])
        for folder in a.encoder:
            x = features(folder, rows)
            near = KNeighborsClassifier(10, metric="cosine", weights="distance").fit(
                x[splits == "train"], labels[splits == "train"])
            out[f"{Path(path).stem}, {folder}"] = near.score(x[splits == "test"], labels[splits == "test"])
            print(f"{Path(path).stem}, {folder}: {out[f'{Path(path).stem}, {folder}']:.3f}",
                  file=sys.stderr, flush=True)
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("words", "knn"))
    p.add_argument("--encoder", nargs="+", default=[], help="whole Whisper folders, such as OUT/encoder")
    p.add_argument("--run", nargs="+", default=[], help="--out of training runs")
    p.add_argument("--data", nargs="+", required=True)
    p.add_argument("--clips", type=int, default=300, help="test clips to transcribe (300)")
    p.add_argument("--json", help="write the result there")
    a = p.parse_args()
    with torch.inference_mode():
        result = {"words": words, "knn": knn}[a.what](a)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    print(text)
    if a.json:
        Path(a.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
