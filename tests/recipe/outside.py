"""What other people's code says of a trained encoder: transformers' Whisper and scikit-learn,
beside our own generate and transcribe.

    python tests/outside.py words --encoder whisper-base OUT/encoder --run OUT \\
        --data suite/transcribe.jsonl [--clips 300]
    python tests/outside.py wer --encoder whisper-base OUT/encoder \\
        --data suite/transcribe.jsonl transfer/transcribe_dutch.jsonl [--on valid] [--clips 60]
    python tests/outside.py knn --encoder whisper-base OUT/encoder \\
        --data suite/drum.jsonl suite/voice.jsonl

words: word error rate (lower case, no punctuation) on clips of the test split: of each encoder
under Whisper's own decoder, at 30 s, greedy, told the clip's language; of --run, a training
run, through its adapter and frozen Qwen.
wer: the same by our own transcribe, for each encoder and manifest, at both contexts; runaways
counts the clips where a repetition without end was cut off.
knn: accuracy of scikit-learn's 10 neighbours (cosine, weighed by distance) on the mean over
real tokens of transformers' encoder, every clip padded with silence to the next 2 s.
"""
import argparse
import json
import sys
import unicodedata
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn.utils.rnn import pad_sequence
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

sys.path.insert(0, str(Path(__file__).parents[2]))
from data import Rows  # noqa: E402
from uniwhisper import (SAMPLE_RATE, TOKEN, load_decoder, load_encoder, load_run,  # noqa: E402
                        transcribe_clips)

LONGEST = 64  # tokens of an answer, for either decoder
BATCH = 16  # clips


def plain(text: str) -> str:
    """Lower case, without punctuation."""
    kept = []
    for c in unicodedata.normalize("NFC", text.lower()):
        if not unicodedata.category(c).startswith("P"):
            kept.append(c)
    return "".join(kept)


def word_error_rate(guesses, truths):
    """Substituted, missing and inserted words per true word, in lower case."""
    errors = words = 0
    for guess, truth in zip(guesses, truths, strict=True):
        guess, truth = guess.lower().split(), truth.lower().split()
        costs = list(range(len(guess) + 1))  # edit distance
        for i, word in enumerate(truth):
            above, costs = costs, [i + 1]
            for j, other in enumerate(guess):
                swap = above[j] + (word != other)
                costs.append(min(swap, above[j + 1] + 1, costs[j] + 1))
        errors += costs[-1]
        words += len(truth)
    return errors / max(1, words)


def language_code(rows: Rows, i: int) -> str:
    """Row i's language, Dutch, as Whisper's code: nl."""
    name = rows[i].get("language", "missing")
    if name.lower() not in TO_LANGUAGE_CODE:
        raise ValueError(f"{rows.name(i)}: language is {name!r}; need a name such as Dutch")
    return TO_LANGUAGE_CODE[name.lower()]


def draw(rows: Rows, clips: int) -> list[int]:
    """Numbers of so many rows, the same each time."""
    return np.random.default_rng(0).permutation(len(rows))[:clips].tolist()


def in_batches(numbers):
    """Row numbers -> arrays of up to BATCH of them."""
    return np.array_split(numbers, -(-len(numbers) // BATCH))


def progress(name, done, of) -> None:
    print(f"{name}: {done} of {len(of)}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- words

def greedy(model, mel, ids, end: int) -> list[list[int]]:
    """Whisper's answers to mel (B, n_mels, 3000) and the first ids (B, 4)."""
    encoded, cache, said = model.get_encoder()(mel), None, []
    for _ in range(LONGEST):
        out = model(encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=cache,
                    use_cache=True)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        said.append(ids[:, 0])
        if (torch.stack(said) == end).any(0).all():
            break
    answers = torch.stack(said, 1).tolist()
    return [answer[: answer.index(end)] if end in answer else answer for answer in answers]


def whisper_words(folder, rows: Rows, numbers) -> list[str]:
    """Transcripts by transformers' Whisper."""
    model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    extractor = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
    end, texts = tokenizer.token_to_id("<|endoftext|>"), []
    for some in in_batches(numbers):
        audio, ids = [], []
        for i in some.tolist():
            audio.append(rows.audio(i, SAMPLE_RATE).numpy())
            language = language_code(rows, i)
            start = ["startoftranscript", language, "transcribe", "notimestamps"]
            ids.append([tokenizer.token_to_id(f"<|{name}|>") for name in start])
        mel = extractor(audio, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
        for answer in greedy(model, mel, torch.tensor(ids), end):
            texts.append(tokenizer.decode(answer))
        progress(folder, len(texts), numbers)
    return texts


def our_words(run, rows: Rows, numbers) -> list[str]:
    """Answers of a run's newest checkpoint; short clips first, so that little is padded."""
    model, texts = load_run(run), {}
    for some in in_batches(sorted(numbers, key=lambda i: rows.seconds[i])):
        audio = [rows.audio(i, SAMPLE_RATE) for i in some]
        samples = torch.tensor([len(a) for a in audio])
        questions = [rows[i]["instruction"] for i in some]
        answers = model.generate(pad_sequence(audio, True), samples, questions, LONGEST)
        texts.update(zip(some.tolist(), answers))
        progress(run, len(texts), numbers)
    return [texts[i] for i in numbers]


def words(a) -> dict:
    rows = Rows(a.data, splits={a.on})
    numbers = draw(rows, a.clips)
    truths = [plain(rows[i]["answer"]) for i in numbers]
    sides = {}
    for encoder in a.encoder:
        sides[f"{encoder}, Whisper's decoder"] = whisper_words(encoder, rows, numbers)
    for run in a.run:
        sides[f"{run}, adapter and Qwen"] = our_words(run, rows, numbers)
    out = {"clips": len(numbers), "words": sum(len(t.split()) for t in truths)}
    examples = [{"truth": truth} for truth in truths[:8]]
    for name, texts in sides.items():
        out[name] = word_error_rate([plain(t) for t in texts], truths)
        for example, text in zip(examples, texts):
            example[name] = text
    return out | {"examples": examples}


def wer(a) -> dict:
    """Word error rates by uniwhisper.py alone: {manifest: {encoder: {context: ...}}}."""
    out = {}
    for path in a.data:
        rows = Rows([path], splits={a.on})
        numbers = draw(rows, a.clips)
        clips = [rows.audio(i, SAMPLE_RATE) for i in numbers]
        languages = [language_code(rows, i) for i in numbers]
        truths = [plain(rows[i]["answer"]) for i in numbers]
        task = {"clips": len(clips), "words": sum(len(t.split()) for t in truths)}
        out[Path(path).stem] = task
        for folder in a.encoder:
            encoder, decoder = load_encoder(folder).eval(), load_decoder(folder)
            task[folder] = {}
            for context in "30s", "clip":
                texts, _, repeats = transcribe_clips(encoder, decoder, clips, languages, context)
                rate = word_error_rate([plain(t) for t in texts], truths)
                runaways = sum(map(bool, repeats))
                task[folder][context] = {"wer": rate, "runaways": runaways}
                print(f"{path}, {folder}, {context}: {rate:.4f}, {runaways} runaways",
                      file=sys.stderr, flush=True)
    return out


# ---------------------------------------------------------------- neighbours

def features(folder, rows: Rows) -> np.ndarray:
    """(N, D): transformers' encoder on clips padded to the next 2 s, its table of positions
    cut to that length."""
    encoder = WhisperForConditionalGeneration.from_pretrained(folder).get_encoder().eval()
    extractor = WhisperFeatureExtractor(feature_size=encoder.config.num_mel_bins)
    table, means, groups = encoder.embed_positions.weight.data, [None] * len(rows), {}
    block = 2 * SAMPLE_RATE
    for i in range(len(rows)):
        audio = rows.audio(i, SAMPLE_RATE)
        groups.setdefault(-(-len(audio) // block) * block, []).append((i, audio.numpy()))
    for size, clips in sorted(groups.items()):
        positions = table[: size // TOKEN]
        encoder.embed_positions = torch.nn.Embedding.from_pretrained(positions)
        encoder.config.max_source_positions = len(positions)
        for n in range(0, len(clips), BATCH):
            some = clips[n : n + BATCH]
            mel = extractor([audio for _, audio in some], sampling_rate=SAMPLE_RATE,
                            return_tensors="pt", padding="max_length", max_length=size,
                            truncation=False).input_features
            for (i, audio), x in zip(some, encoder(mel).last_hidden_state):
                means[i] = x[: max(1, -(-len(audio) // TOKEN))].mean(0).numpy()
    return np.stack(means)


def knn(a) -> dict:
    from sklearn.neighbors import KNeighborsClassifier

    out = {}
    for path in a.data:
        rows = Rows([path])
        splits = np.array(rows.splits)[rows.split]
        labels = np.array([rows[i]["label"] for i in range(len(rows))])
        train, test = splits == "train", splits == "test"
        for folder in a.encoder:
            x = features(folder, rows)
            near = KNeighborsClassifier(10, metric="cosine", weights="distance")
            near.fit(x[train], labels[train])
            name = f"{Path(path).stem}, {folder}"
            out[name] = near.score(x[test], labels[test])
            print(f"{name}: {out[name]:.3f}", file=sys.stderr, flush=True)
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("words", "wer", "knn"))
    p.add_argument("--encoder", nargs="+", default=[],
                   help="whole Whisper folders, such as OUT/encoder; each is judged under "
                        "the decoder that lies in it")
    p.add_argument("--run", nargs="+", default=[], help="--out of training runs")
    p.add_argument("--data", nargs="+", required=True)
    p.add_argument("--on", choices=("valid", "test"), default="test",
                   help="split of words and wer (test)")
    p.add_argument("--clips", type=int, default=300,
                   help="clips to transcribe, of each manifest in wer (300)")
    p.add_argument("--json", help="write the result there")
    a = p.parse_args()
    with torch.inference_mode():
        result = {"words": words, "wer": wer, "knn": knn}[a.what](a)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    print(text)
    if a.json:
        Path(a.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
