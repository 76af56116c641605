"""Makes weights/tiny/: a Whisper-shaped encoder of random weights and a Qwen2-shaped model trained
on text.

The encoder (Hugging Face folder `encoder/`) starts from random weights: the embedded example trains
it from nothing. The decoder (`decoder/`) stands for a small instruct model. It is trained here, on
two kinds of text: prose (the documentation and docstrings of Python's standard library, which every
machine with Python has) and chats made by a grammar, in which a question about a description is
answered from that description. Among many others it meets the questions and answers of
weights/make_clips.py; it never meets audio.

    python weights/make_tiny.py            # writes weights/tiny/: six minutes of one core
    python weights/make_tiny.py --out DIR --steps N

Needs transformers (the test extra). Seeded: the same Python, torch and number of threads give the
same files; another Python has another documentation, hence slightly other weights.
`decoder/training.json` says what was used.
"""

import argparse
import ast
import hashlib
import json
import math
import os
import platform
import pydoc_data.topics
import random
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from make_clips import TASKS

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Qwen2's own splitting of text into words, digits, punctuation and spaces.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CONTEXT = 128  # tokens in a training row
ENCODER = {"d_model": 96, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 384}
DECODER = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
           "num_key_value_heads": 2, "intermediate_size": 352, "vocab_size": 2048}
UNKNOWN = "I cannot tell."

# What a clip can be asked about: topic -> (questions, answers, sentences that describe it).
TOPICS = {task: (questions, answers, []) for task, (_, questions, answers) in TASKS.items()}
for topic, sentences in {
    "vowel": ["Someone says {}.", "The vowel is {}.", "A voice sings {}."],
    "syllables": ["The word has {}.", "There are {}.", "Somebody utters {}."],
    "voice": ["It is {}.", "The speaker has {}.", "We hear {}."],
    "sound": ["It is the sound of {}.", "The sound comes from {}.", "We hear {}."],
    "motion": ["The source is {}.", "It is {}.", "What we hear is {}."],
    "repeats": ["It is heard {}.", "It sounds {}.", "The event happens {}."],
    "instrument": ["Somebody plays {}.", "The instrument is {}.", "A short tune on {}."],
    "melody": ["The melody is {}.", "The tune is {}.", "The line is {}."],
    "note": ["The first note is {}.", "It begins on {}.", "The tune starts with {}."],
}.items():
    TOPICS[topic][2].extend(sentences)
TOPICS |= {
    "language": (["Which language is spoken?", "What is the language?"],
                 "English German French Spanish Greek Polish Russian Chinese Hindi Arabic "
                 "Turkish".split(),
                 ["The speaker uses {}.", "It is spoken in {}."]),
    "emotion": (["Which emotion is heard?", "How does the speaker feel?"],
                "happy sad angry calm afraid surprised bored proud".split(),
                ["The speaker is {}.", "She sounds {}.", "He feels {}."]),
    "speaker": (["Who is speaking?", "Is it a man or a woman?"],
                "a man,a woman,a child,a crowd".split(","),
                ["{} is speaking.", "The words come from {}."]),
    "count": (["How many people speak?", "Count the speakers."],
              "one person,two people,three people,many people".split(","),
              ["In the room {} can be heard.", "The talk is between {}."]),
    "place": (["Where is it?", "Which place is it?"],
              "a kitchen,a street,a forest,a station,a hall,a beach,a car,an office".split(","),
              ["It was recorded in {}.", "The place is {}."]),
    "animal": (["Which animal is heard?", "Name the animal."],
               "dog cat horse cow sheep frog wolf owl lion".split(),
               ["There is a {} nearby.", "A {} calls."]),
    "genre": (["Which genre is it?", "What style of music is it?"],
              "jazz rock folk blues classical pop dance".split(),
              ["The music is {}.", "They play {}."]),
    "tempo": (["How fast is the music?", "What is the tempo?"],
              "slow,moderate,fast,very fast".split(","),
              ["The tempo is {}.", "The beat is {}."]),
    "weather": (["What is the weather like?", "Describe the weather."],
                "sunny cloudy stormy foggy snowy".split(),
                ["The weather is {}.", "The day is {}."]),
    "time": (["What time of day is it?", "When was it recorded?"],
             "morning noon evening night".split(),
             ["It was recorded at {}.", "The time is {}."]),
    "loudness": (["How loud is it?", "Describe the loudness."], "quiet loud deafening".split(),
                 ["The recording is {}.", "All is {}."]),
    "color": (["Which color is named?", "What is the color?"],
              "red blue green yellow black white brown".split(),
              ["The box is {}.", "The door is {}."]),
    "vehicle": (["Which vehicle passes?", "Name the vehicle."],
                "a train,a truck,a plane,a boat,a bus,a bicycle".split(","),
                ["{} passes by.", "On the way is {}."]),
    "drum": (["Which drum is hit?", "Name the drum."], "kick snare tom cymbal hat clap".split(),
             ["The drum is a {}.", "A {} is struck."]),
    "room": (["How large is the room?", "Describe the room."], "small,large,open air".split(","),
             ["The room is {}.", "The space is {}."]),
    "command": (["Which command is given?", "Which word is it?"],
                "yes no stop go left right up down on off".split(),
                ["The command is {}.", "The word is {}."]),
}
COPY = {  # the answer is any words, copied from the description
    "transcribe": (["What is said?", "Transcribe the speech.", "Write down the words."],
                   ["A voice says: {}.", "The words are: {}.", "We hear: {}."]),
    "name": (["What is the name?", "Who is named?"], ["The name is {}.", "Somebody calls {}."]),
    "number": (["Which number is said?", "Write the number."],
               ["The number is {}.", "It counts to {}."]),
    "repeat": (["Repeat the text.", "Copy the text."], ["{}"]),
}


# ---- text

def library_text():
    """Paragraphs of the standard library's documentation and docstrings, in a fixed order."""
    documents = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_bytes())
        nodes = [n for n in ast.walk(tree)
                 if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        documents += [text for text in map(ast.get_docstring, nodes) if text and len(text) > 60]
    return [re.sub(r"[ \t]*\n", "\n", text).strip() for text in documents]


def describe(rng, facts, sentences):
    """A description of some facts [(topic, value)]: sentences, or loose key words in any order,
    some repeated.
    """
    if rng.random() < 0.5:
        return " ".join(rng.choice(sentences[topic]).format(value) for topic, value in facts)
    words = [value for _, value in facts for _ in range(rng.randint(1, 4))]
    rng.shuffle(words)
    return rng.choice([" ", ", ", " "]).join(words)


def make_chat(rng, words):
    """One user turn (question, description) and its answer, which follows from the description."""
    if rng.random() < 0.2:
        topic = rng.choice(sorted(COPY))
        questions, templates = COPY[topic]
        value = {
            "name": lambda: rng.choice(words).capitalize(),
            "number": lambda: str(rng.randrange(1000)),
        }.get(topic, lambda: " ".join(rng.choices(words, k=rng.randint(1, 5))))()
        description, answer = rng.choice(templates).format(value), value
    else:
        topics = rng.sample(sorted(TOPICS), rng.randint(1, 4))
        facts = [(topic, rng.choice(TOPICS[topic][1])) for topic in topics]
        topic, answer = rng.choice(facts)
        questions = TOPICS[topic][0]
        if rng.random() < 0.08:
            facts, answer = [fact for fact in facts if fact[0] != topic], UNKNOWN
        if not facts or rng.random() < 0.1:  # words that have nothing to do with it
            facts += [("noise", " ".join(rng.choices(words, k=rng.randint(1, 8))))]
        description = describe(
            rng, facts, {t: TOPICS[t][2] for t in TOPICS} | {"noise": ["{}.", "There is {}."]})
    return (f"<|im_start|>user\n{rng.choice(questions)}\n{description}<|im_end|>\n"
            "<|im_start|>assistant\n"), answer


def train_tokenizer(texts):
    """Byte-level BPE with Qwen2's word splitting and chat tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=DECODER["vocab_size"], special_tokens=SPECIAL,
                                  show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


# ---- rows of tokens

def prose_rows(tokenizer, documents):
    """(N, CONTEXT + 1) ids: all documents one after the other, <|endoftext|> between them."""
    end = tokenizer.token_to_id("<|endoftext|>")
    ids = [i for encoding in tokenizer.encode_batch(documents) for i in encoding.ids + [end]]
    rows = torch.tensor(ids[: len(ids) // (CONTEXT + 1) * (CONTEXT + 1)])
    return rows.reshape(-1, CONTEXT + 1)


def chat_rows(tokenizer, chats):
    """Rows of whole chats, the last cut off: ids (N, CONTEXT + 1), and which of them are answers
    (N, CONTEXT + 1).
    """
    end, newline = tokenizer.encode("<|im_end|>").ids, tokenizer.encode("\n").ids
    prompts = tokenizer.encode_batch([prompt for prompt, _ in chats])
    answers = tokenizer.encode_batch([answer for _, answer in chats])
    rows, ids, spoken = [], [], []
    for prompt, answer in zip(prompts, answers):
        ids += prompt.ids + answer.ids + end + newline
        spoken += [0] * len(prompt.ids) + [1] * (len(answer.ids) + 1) + [0]
        if len(ids) > CONTEXT:
            rows.append((ids[: CONTEXT + 1], spoken[: CONTEXT + 1]))
            ids, spoken = [], []
    ids, spoken = zip(*rows)
    return torch.tensor(ids), torch.tensor(spoken).bool()


def make_data(seed):
    """Tokenizer, prose and chat rows to train on, and the same held out."""
    rng, documents = random.Random(seed), library_text()
    held_out = documents[::20]
    documents = [d for i, d in enumerate(documents) if i % 20]
    counts = {}
    for word in re.findall(r"\b[a-z]{3,9}\b", " ".join(documents)):
        counts[word] = counts.get(word, 0) + 1
    words = sorted(sorted(counts), key=counts.get, reverse=True)[:800]
    chats = [make_chat(rng, words) for _ in range(60_000)]
    tokenizer = train_tokenizer(documents + [prompt + answer for prompt, answer in chats[:4000]])
    chats_out = [make_chat(rng, words) for _ in range(600)]
    return tokenizer, documents, (prose_rows(tokenizer, documents), *chat_rows(tokenizer, chats)), \
        (prose_rows(tokenizer, held_out), *chat_rows(tokenizer, chats_out))


# ---- the decoder

def token_losses(model, rows):
    """Loss of each next token of rows (N, CONTEXT + 1) -> (N, CONTEXT), in nats."""
    logits = model(input_ids=rows[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(),
                           reduction="none").view(len(rows), -1)


@torch.no_grad()
def evaluate(model, held_out):
    """Perplexity per token of held-out prose, and of held-out chats' answers."""
    prose, chats, spoken = held_out
    answers = token_losses(model, chats)[spoken[:, 1:]]
    return {"prose": math.exp(token_losses(model, prose[:256]).mean()),
            "answers": math.exp(answers.mean())}


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal by five Newton-Schulz iterations (Jordan et al., 2024).

    It needs half of Adam's steps here. torch.optim.Muon computes in bfloat16, which is slow on most
    processors.
    """

    def __init__(self, params, momentum=0.95, weight_decay=0.05):
        super().__init__(params, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for p in group["params"]:
            m = self.state[p].setdefault("momentum", torch.zeros_like(p))
            m.lerp_(p.grad, 1 - group["momentum"])
            x = p.grad.lerp(m, group["momentum"])  # Nesterov
            x = x.T if p.shape[0] > p.shape[1] else x
            x = x / (x.norm() + 1e-7)
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = x.T if p.shape[0] > p.shape[1] else x
            p.mul_(1 - group["lr"] * group["weight_decay"])
            # the step's size is then as Adam's
            p.add_(x, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def train_decoder(data, held_out, steps, seed, batch=16):
    """A Qwen2 trained on prose and chats, half and half; answers count more than what cannot be
    known.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**DECODER, max_position_embeddings=2048, rope_theta=10000.0,
                         rms_norm_eps=1e-6, tie_word_embeddings=True, use_cache=False,
                         bos_token_id=0, eos_token_id=2)
    model = Qwen2ForCausalLM(config)
    prose, chats, spoken = data
    weights = torch.where(spoken[:, 1:], 3.0, 0.5)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    optimizers = [(Muon(matrices), 6e-3), (torch.optim.Adam(others, betas=(0.9, 0.98)), 4e-3)]
    generator, start = torch.Generator().manual_seed(seed), time.time()
    for step in range(steps):
        schedule = min((step + 1) / 50, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for optimizer, lr in optimizers:
            optimizer.param_groups[0]["lr"] = lr * schedule
        a = torch.randint(len(prose), (batch // 2,), generator=generator)
        b = torch.randint(len(chats), (batch // 2,), generator=generator)
        losses = token_losses(model, torch.cat([prose[a], chats[b]]))
        weight = torch.cat([torch.ones(len(a), CONTEXT), weights[b]])
        loss = (losses * weight).sum() / weight.sum()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
        if (step + 1) % 200 == 0 or step + 1 == steps:
            scores = evaluate(model, held_out)
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  "
                  f"held-out perplexity: prose {scores['prose']:.1f}, "
                  f"answers {scores['answers']:.3f}  {time.time() - start:.0f} s", flush=True)
    return model


@torch.no_grad()
def complete(model, tokenizer, text, most=24):
    """Greedy continuation, to the end of the turn."""
    ids, new = tokenizer.encode(text).ids, []
    while len(new) < most and not (new and tokenizer.id_to_token(new[-1]) in SPECIAL):
        new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
    return tokenizer.decode(new)


def show(model, tokenizer, seed):
    for text in ("The function returns", "If the argument is"):
        print(f"{text!r} -> {complete(model, tokenizer, text)!r}")
    rng = random.Random(seed + 1)
    for _ in range(10):
        prompt, answer = make_chat(rng, "table number window garden".split())
        question, description = prompt.split("\n")[1:3]
        print(f"{question!r} {description.removesuffix('<|im_end|>')!r}"
              f" -> {complete(model, tokenizer, prompt)!r}  (true: {answer!r})")


# ---- folders

def write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_decoder(folder, model, tokenizer, training):
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.half().contiguous() for k, v in model.state_dict().items()
               if k != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    end = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    write_json(folder / "config.json", {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **DECODER,
        "max_position_embeddings": 2048, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "tie_word_embeddings": True,
        "use_sliding_window": False, "attention_dropout": 0.0, "torch_dtype": "float16", **end})
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "model_max_length": 2048})
    write_json(folder / "training.json", training)


def random_encoder(generator):
    """Weights of a Whisper encoder: sinusoidal positions, the rest normal with the scale that keeps
    variance.
    """
    d, ffn = ENCODER["d_model"], ENCODER["encoder_ffn_dim"]
    normal = lambda *shape, gain=1.0: (
        torch.randn(shape, generator=generator) * gain / math.prod(shape[1:]) ** 0.5)
    zeros, ones = torch.zeros, torch.ones
    angles = torch.arange(1500)[:, None] * torch.exp(
        -math.log(10000) / (d // 2 - 1) * torch.arange(d // 2))
    tensors = {"conv1.weight": normal(d, 80, 3, gain=2), "conv1.bias": zeros(d),
               "conv2.weight": normal(d, d, 3, gain=2), "conv2.bias": zeros(d),
               "embed_positions.weight": torch.cat([angles.sin(), angles.cos()], 1),
               "layer_norm.weight": ones(d), "layer_norm.bias": zeros(d)}
    # so that the sum over layers keeps its scale
    residual = (2 * ENCODER["encoder_layers"]) ** -0.5
    for i in range(ENCODER["encoder_layers"]):
        layer = {"fc1.weight": normal(ffn, d), "fc1.bias": zeros(ffn),
                 "fc2.weight": normal(d, ffn, gain=residual), "fc2.bias": zeros(d)}
        for name in "qkv":
            layer[f"self_attn.{name}_proj.weight"] = normal(d, d)
        layer["self_attn.out_proj.weight"] = normal(d, d, gain=residual)
        layer |= {f"self_attn.{name}.bias": zeros(d) for name in ("q_proj", "v_proj", "out_proj")}
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            layer |= {f"{name}.weight": ones(d), f"{name}.bias": zeros(d)}
        tensors |= {f"layers.{i}.{name}": tensor for name, tensor in layer.items()}
    return {f"model.encoder.{name}": tensor.half() for name, tensor in tensors.items()}


def write_encoder(folder, seed):
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_encoder(torch.Generator().manual_seed(seed))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # Whisper's own decoder is not part of this: the smallest that transformers accepts, so that the
    # folder loads.
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 1, "decoder_ffn_dim": 8,
               "max_target_positions": 8, "vocab_size": 8, "pad_token_id": 0, "bos_token_id": 1,
               "eos_token_id": 2, "decoder_start_token_id": 1}
    write_json(folder / "config.json", {
        "architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper", **ENCODER,
        "num_mel_bins": 80, "max_source_positions": 1500, "activation_function": "gelu",
        "is_encoder_decoder": True,
        "scale_embedding": False, **decoder, "torch_dtype": "float16"})
    write_json(folder / "preprocessor_config.json", {
        "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 80,
        "sampling_rate": 16000, "hop_length": 160, "n_fft": 400, "chunk_length": 30,
        "n_samples": 480000, "nb_max_frames": 3000,
        "padding_side": "right", "padding_value": 0.0, "return_attention_mask": False})


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny",
                        help="folder to write to")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of the decoder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1,
                        help="another number rounds sums differently")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    write_encoder(args.out / "encoder", args.seed)
    tokenizer, documents, data, held_out = make_data(args.seed)
    prose, chats, _ = data
    print(f"prose {prose.numel():,} tokens, chats {chats.numel():,} tokens, "
          f"vocabulary {tokenizer.get_vocab_size()}")
    model = train_decoder(data, held_out, args.steps, args.seed).eval()
    training = {"python": platform.python_version(), "torch": torch.__version__,
                "steps": args.steps, "seed": args.seed, "threads": args.threads,
                "prose_sha256": hashlib.sha256("\n".join(documents).encode()).hexdigest(),
                "held_out_perplexity": {
                    k: round(v, 4) for k, v in evaluate(model, held_out).items()}}
    write_decoder(args.out / "decoder", model, tokenizer, training)
    show(model, tokenizer, args.seed)


if __name__ == "__main__":
    main()
