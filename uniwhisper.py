"""UniWhisper (arXiv 2602.21772): an audio encoder trained through a frozen decoder.

    python uniwhisper.py encode A.wav B.flac --encoder DIR --out F.safetensors
    python uniwhisper.py ask A.wav "Which instrument?" --run OUT
    python uniwhisper.py export --run OUT DIR [--blend 0.5]

Shapes: B clips, S samples at 16 kHz, F mel frames (10 ms), T encoder tokens (20 ms),
A audio tokens after the adapter, L decoder positions, N answer tokens of a batch,
H heads, D width, V vocabulary.
"""
import argparse
import json
import math
import shutil
import sys
from dataclasses import field, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import get_args, get_origin

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adapter import StackAdapter

SAMPLE_RATE = 16_000
N_FFT = 400  # samples: windows of 25 ms
HOP = 160  # samples: a frame every 10 ms
TOKEN = 2 * HOP  # samples: an encoder token every 20 ms
CHUNK = 30 * SAMPLE_RATE  # samples: the 30 s that Whisper pads every clip to
LOGITS_AT_ONCE = 1024  # answer tokens with logits (N, V) at one time


# ---------------------------------------------------------------- log-mel

@lru_cache(maxsize=8)
def mel_filters(n_mels: int, device: torch.device):
    """Slaney's triangles of equal area, 0 to 8 kHz: (N_FFT / 2 + 1, n_mels)."""
    # Slaney's scale is linear up to 1 kHz, which is mel 15, and logarithmic above.
    step = math.log(6.4) / 27
    mel = torch.linspace(0, 15 + math.log(8) / step, n_mels + 2, dtype=torch.float64)
    hz = torch.where(mel < 15, mel * 200 / 3, 1000 * ((mel - 15) * step).exp())
    low, middle, high = hz[:-2], hz[1:-1], hz[2:]
    bins = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1, dtype=torch.float64)
    rising = (bins[:, None] - low) / (middle - low)
    falling = (high - bins[:, None]) / (high - middle)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * 2 / (high - low)).float().to(device)


@torch.no_grad()
def log_mel_spectrogram(audio, n_mels: int = 80):
    """Whisper's input: audio (B, S) -> (B, n_mels, F), F = S // 160, at least 1.

    As if zeros filled each clip up to 30 s. The floor lies 8 (log10) below the clip's own
    maximum: neither more zeros nor a loud clip in the same batch changes a frame.
    """
    frames = max(1, audio.shape[-1] // HOP)
    # Windows across the clip's end see zeros and count for the maximum. Whisper's
    # reflection at the end takes part only where 30 s are reached.
    audio = F.pad(audio, (0, max(0, min(N_FFT, CHUNK - audio.shape[-1]))))
    audio = F.pad(audio[:, None], (N_FFT // 2, N_FFT // 2), mode="reflect")[:, 0]
    windows = audio.unfold(-1, N_FFT, HOP)  # (B, F', N_FFT)
    if audio.shape[-1] >= CHUNK:
        windows = windows[:, :-1]  # Whisper drops the last frame
    spectrum = torch.fft.rfft(windows * torch.hann_window(N_FFT, device=audio.device))
    power = spectrum.real.square() + spectrum.imag.square()  # (B, F', N_FFT / 2 + 1)
    with torch.autocast(audio.device.type, enabled=False):
        mel = power @ mel_filters(n_mels, audio.device)  # (B, F', n_mels)
    mel = mel.clamp(min=1e-10).log10()
    floor = mel.amax((1, 2), keepdim=True) - 8
    mel = (mel[:, :frames].maximum(floor) + 4) / 4
    return mel.transpose(1, 2)


def encoder_lengths(samples):
    """Samples (int or tensor) -> encoder tokens of 20 ms, at least one."""
    tokens = (samples // HOP + 1) // 2
    return tokens.clamp(min=1) if isinstance(tokens, Tensor) else max(1, tokens)


# ---------------------------------------------------------------- checkpoint folders

def bad_file(path, why) -> Exception:
    """The error for a file that cannot be read, with what to do."""
    if not Path(path).is_file():
        return FileNotFoundError(f"{path} is missing; need a checkpoint folder, "
                                 "not a hub's name (see weights/README.md)")
    with open(path, "rb") as f:
        pointer = f.read(40).startswith(b"version https://git-lfs")
    remedy = "a Git LFS pointer: run `git lfs pull`" if pointer else "fetch it again"
    return ValueError(f"{path} is damaged ({why}); {remedy}")


def bad_config(folder, key: str, value, need: str) -> ValueError:
    return ValueError(f"{folder}/config.json: {key} is {value!r}; need {need}")


def read_json(path, *keys) -> dict:
    """The JSON object in a file, which must have all of `keys`."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as e:
        raise bad_file(path, f"not JSON: {e}") from None
    if not isinstance(content, dict):
        raise bad_file(path, "not a JSON object")
    for key in keys:
        if key not in content:
            raise bad_file(path, f"lacks {key}")
    return content


def check_sizes(config: dict, folder, *keys) -> None:
    for key in keys:
        value = config.get(key, "missing")
        if type(value) is not int or value < 1:
            raise bad_config(folder, key, value, "a whole number above 0")


def check_values(config: dict, folder, **needed) -> None:
    """Refuse what is not computed here; a missing value is a good one."""
    for key, need in needed.items():
        value = config.get(key) or need
        if value != need:
            raise bad_config(folder, key, value, repr(need))


def read_config(folder, model_types) -> dict:
    """A folder's config.json; a model of another type is refused."""
    config = read_json(Path(folder, "config.json"))
    kind = config.get("model_type")
    if kind not in model_types:
        need = "one of " + ", ".join(model_types)
        if Path(folder, "encoder/config.json").is_file():  # a training run's folder
            need += f"; did you mean {folder}/encoder?"
        raise bad_config(folder, "model_type", kind, need)
    return config


def read_weights(folder) -> dict[str, Tensor]:
    """A folder's tensors: from model.safetensors, or the shards in its index."""
    names = ["model.safetensors"]
    index = Path(folder, "model.safetensors.index.json")
    if index.exists() and Path(folder, names[0]).exists():
        print(f"note: {folder} has shards, too: reading model.safetensors, "
              "as transformers does", file=sys.stderr)
    elif index.exists():
        shards = read_json(index, "weight_map")["weight_map"]
        if not isinstance(shards, dict):
            raise bad_file(index, "weight_map is no object")
        names = sorted(set(shards.values()))
    tensors = {}
    for name in names:
        path = Path(folder, name)
        try:
            tensors |= load_file(path)
        except Exception as e:  # safetensors raises an error class of its own
            raise bad_file(path, e) from None
    return tensors


def load_strictly(module: nn.Module, tensors: dict[str, Tensor], source) -> None:
    """Set all of a module's parameters, by name."""
    try:
        module.load_state_dict(tensors, assign=True)
    except RuntimeError as e:
        # A line each: the names missing, those unexpected, and each other shape.
        faults = [line.strip(" \t.")[:300] for line in str(e).splitlines()[1:7]]
        raise ValueError(f"{source}: weights do not fit: {'; '.join(faults)}") from None


def write_tensors(tensors: dict[str, Tensor], path) -> None:
    """A safetensors file that others may read, too."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as e:  # no OSError, also when the disk is full
        raise OSError(f"cannot write {path}: {e}") from None
    Path(path).chmod(0o644)  # safetensors makes it private


def run_layer(layer, recompute: bool, *inputs):
    """layer(*inputs); recompute: backward makes its activations again."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)


# ---------------------------------------------------------------- Whisper's encoder

class WhisperAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, mask=None):
        q = self.split(self.q_proj(x))  # (B, H, T, D / H)
        k = self.split(self.k_proj(x))
        v = self.split(self.v_proj(x))
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (B, T, D)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class WhisperLayer(nn.Module):
    def __init__(self, width: int, heads: int, ffn: int):
        super().__init__()
        self.self_attn = WhisperAttention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, ffn)
        self.fc2 = nn.Linear(ffn, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x, mask=None):
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class WhisperEncoder(nn.Module):
    """Whisper's encoder, tiny to large-v3-turbo, with Hugging Face's parameter names.

    config: a Whisper config.json. The sinusoidal positions never train.
    """

    sample_rate = SAMPLE_RATE
    token_seconds = TOKEN / SAMPLE_RATE

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.width = config["d_model"]
        self.n_mels = config["num_mel_bins"]
        self.window = config["max_source_positions"]  # tokens: 1,500, which are 30 s
        heads, ffn = config["encoder_attention_heads"], config["encoder_ffn_dim"]
        self.conv1 = nn.Conv1d(self.n_mels, self.width, 3, padding=1)
        self.conv2 = nn.Conv1d(self.width, self.width, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(self.window, self.width).requires_grad_(False)
        layers = range(config["encoder_layers"])
        self.layers = nn.ModuleList(WhisperLayer(self.width, heads, ffn) for _ in layers)
        self.layer_norm = nn.LayerNorm(self.width)
        self.checkpoint_layers = False

    @classmethod
    def from_pretrained(cls, folder) -> "WhisperEncoder":
        """Read a Hugging Face Whisper folder (encoder alone or whole), as float32."""
        config = read_config(folder, ("whisper",))
        check_sizes(config, folder, "d_model", "encoder_layers", "encoder_ffn_dim",
                    "encoder_attention_heads", "num_mel_bins", "max_source_positions")
        check_values(config, folder, activation_function="gelu")
        if config["d_model"] % config["encoder_attention_heads"]:
            raise bad_config(folder, "d_model", config["d_model"], "a multiple of the heads")
        with torch.device("meta"):
            encoder = cls(config)
        tensors = {}
        for name, tensor in read_weights(folder).items():
            name = name.removeprefix("model.")
            if not name.startswith(("decoder.", "proj_out.")):
                tensors[name.removeprefix("encoder.")] = tensor.float()
        load_strictly(encoder, tensors, folder)
        return encoder

    def keep_layers(self, count: int) -> None:
        """Keep the first `count` layers; the last norm stays only with all."""
        layers = len(self.layers)
        if not 0 <= count <= layers:
            raise ValueError(f"layer is {count}; this encoder has layers 0 to {layers}")
        if count < layers:
            self.layers = self.layers[:count]
            self.layer_norm = nn.Identity()

    def forward(self, mel, lengths=None):
        """mel (B, n_mels, F), lengths (B,) in tokens (None: all real) -> (B, T, D).

        Tokens beyond a clip's length are masked out of attention and come out as 0.
        With `lengths` on the CPU nothing waits for the device.
        """
        tokens = (mel.shape[-1] + 1) // 2
        if tokens > self.window:
            raise ValueError(f"mel has {mel.shape[-1]} frames; at most {2 * self.window} fit")
        real = mask = None
        if lengths is not None and bool((lengths < tokens).any()):
            real = torch.arange(tokens) < lengths.cpu()[:, None]  # (B, T)
            real = real.to(mel.device, non_blocking=True)
            mask = real[:, None, None, :]  # (B, 1, 1, T): hides padding
            # conv1 sees one frame beyond a clip's end: it must be zero there, too.
            mel = mel * real.repeat_interleave(2, 1)[:, None, : mel.shape[-1]]
        x = F.gelu(self.conv1(mel))  # (B, D, F)
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # (B, T, D)
        x = x + self.embed_positions.weight[:tokens]
        for layer in self.layers:
            x = run_layer(layer, self.checkpoint_layers, x, mask)
        x = self.layer_norm(x)
        return x if real is None else x * real[:, :, None]

    def encode(self, audio, samples, pad_to_window: bool = False):
        """audio (B, S), zero beyond samples (B,) -> (features (B, T, D), lengths (B,)).

        Features are 0 beyond `lengths` (tokens, on the CPU). A clip over 30 s is encoded
        in windows of 30 s, each by itself; their tokens are joined. Where S is less than
        `samples`, silence follows. pad_to_window: attention also sees silence up to the
        window's end, as in Whisper's training; the features are the clip's own tokens.
        # assumption: the paper does not say whether it pads to 30 s.
        """
        lengths = seen = encoder_lengths(samples.cpu())  # (B,)
        if pad_to_window:
            seen = -(-lengths // self.window) * self.window  # rounded up to whole windows
        parts = []
        for first in range(0, int(seen.max()), self.window):
            clips = (seen > first).nonzero()[:, 0]  # those that reach into this window
            here = (seen[clips] - first).clamp(max=self.window)  # their tokens in it
            start, end = first * TOKEN, (first + self.window) * TOKEN
            piece = audio[clips.to(audio.device), start:end]
            missing = int(here.max()) * TOKEN - piece.shape[1]
            mel = log_mel_spectrogram(F.pad(piece, (0, max(0, missing))), self.n_mels)
            x = self(mel[:, :, : 2 * int(here.max())], here)
            part = x.new_zeros(len(audio), *x.shape[1:])
            parts.append(part.index_copy(0, clips.to(x.device), x))
        features = torch.cat(parts, 1)[:, : int(lengths.max())]
        if pad_to_window:
            real = torch.arange(features.shape[1]) < lengths[:, None]
            features = features * real[:, :, None].to(features.device)
        return features, lengths

    def save(self, folder, source=None) -> None:
        """Write a Whisper folder for Hugging Face transformers.

        source: where training started; its decoder, tokenizer and so on are copied.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, tensor in self.state_dict().items():
            tensors[f"model.encoder.{name}"] = tensor.cpu()
        if source is not None:
            for name, tensor in read_weights(source).items():
                if not name.startswith(("model.", "proj_out.")):
                    name = f"model.{name}"
                tensors.setdefault(name, tensor)
            for path in [*Path(source).glob("*.json"), *Path(source).glob("*.txt")]:
                if ".index." not in path.name:
                    shutil.copyfile(path, folder / path.name)  # without its mode
        write_tensors(tensors, folder / "model.safetensors")
        # transformers 5 calls it dtype, 4 torch_dtype
        config = {"architectures": ["WhisperForConditionalGeneration"], **self.config,
                  "model_type": "whisper", "dtype": "float32", "torch_dtype": "float32"}
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        mel = {"feature_extractor_type": "WhisperFeatureExtractor",
               "feature_size": self.n_mels}
        if not (folder / "preprocessor_config.json").exists():
            (folder / "preprocessor_config.json").write_text(json.dumps(mel))


def load_encoder(folder) -> WhisperEncoder:
    """The encoder of a folder; another class would be chosen here."""
    return WhisperEncoder.from_pretrained(folder)


# ---------------------------------------------------------------- Qwen decoder

class KVCache:
    """A layer's keys and values in generation: (B, KV heads, length, D / H)."""

    def __init__(self, shape: tuple[int, ...], like: Tensor):
        self.k = like.new_zeros(shape)
        self.v = like.new_zeros(shape)

    def write(self, k, v, positions):
        """Put k, v (B, KV heads, L, D / H) at positions (B, L) -> all k, v."""
        clips = torch.arange(len(k), device=k.device)[:, None]
        self.k[clips, :, positions] = k.transpose(1, 2)
        self.v[clips, :, positions] = v.transpose(1, 2)
        return self.k, self.v


def rotate(x, rotary):
    """x (B, H, L, D / H) at its positions, whose cos and sin are `rotary`."""
    cos, sin = rotary
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


class QwenAttention(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        width, self.head_dim = c["hidden_size"], c["head_dim"]
        q_width = c["num_attention_heads"] * self.head_dim
        kv_width = c["num_key_value_heads"] * self.head_dim
        qwen2 = c["model_type"] == "qwen2"
        self.q_proj = nn.Linear(width, q_width, bias=qwen2)
        self.k_proj = nn.Linear(width, kv_width, bias=qwen2)
        self.v_proj = nn.Linear(width, kv_width, bias=qwen2)
        self.o_proj = nn.Linear(q_width, width, bias=False)
        self.q_norm = self.k_norm = nn.Identity()
        if not qwen2:
            self.q_norm = nn.RMSNorm(self.head_dim, c["rms_norm_eps"])
            self.k_norm = nn.RMSNorm(self.head_dim, c["rms_norm_eps"])

    def forward(self, x, rotary, cache=None, positions=None):
        """x (B, L, D) -> (B, L, D), causal; with a cache, x is at positions (B, L)."""
        q = self.q_norm(self.split(self.q_proj(x))).transpose(1, 2)  # (B, H, L, D / H)
        k = self.k_norm(self.split(self.k_proj(x))).transpose(1, 2)  # (B, KV heads, L, D / H)
        v = self.split(self.v_proj(x)).transpose(1, 2)
        q, k = rotate(q, rotary), rotate(k, rotary)
        seen = None
        if cache is not None:
            k, v = cache.write(k, v, positions)
            seen = torch.arange(k.shape[2], device=x.device) <= positions[:, None, :, None]
        y = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None,
                                           enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def split(self, x):
        return x.unflatten(-1, (-1, self.head_dim))


class QwenMLP(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        width, ffn = c["hidden_size"], c["intermediate_size"]
        self.gate_proj = nn.Linear(width, ffn, bias=False)
        self.up_proj = nn.Linear(width, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class QwenLayer(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        self.self_attn = QwenAttention(c)
        self.mlp = QwenMLP(c)
        self.input_layernorm = nn.RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.post_attention_layernorm = nn.RMSNorm(c["hidden_size"], c["rms_norm_eps"])

    def forward(self, x, rotary, cache=None, positions=None):
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache, positions)
        return x + self.mlp(self.post_attention_layernorm(x))


class ChatTokenizer:
    """Qwen's tokenizer and chat; instruction and answer are tokenised apart.

    # assumption: the paper gives no prompt. Here: one user turn, instruction before audio.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        # What a saved tokenizer may carry along would change the ids of an answer.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if hasattr(tokenizer.model, "dropout"):
            tokenizer.model.dropout = None
        self.end = tokenizer.token_to_id("<|im_end|>")  # ends an answer
        self.stop = {self.end, tokenizer.token_to_id("<|endoftext|>")} - {None}
        self.head = self.ids("<|im_start|>user\n")
        self.tail = self.ids("<|im_end|>\n<|im_start|>assistant\n")  # after the audio
        if tokenizer.token_to_id("<think>") is not None:
            self.tail += self.ids("<think>\n\n</think>\n\n")  # Qwen3 then answers at once
        tokenizer.encode_special_tokens = True  # in texts they are spelt as plain text

    @classmethod
    def from_pretrained(cls, folder) -> "ChatTokenizer":
        path = Path(folder, "tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as e:  # tokenizers raises bare Exception
            raise bad_file(path, e) from None
        for token in ("<|im_start|>", "<|im_end|>"):
            if tokenizer.token_to_id(token) is None:
                raise ValueError(f"{path} lacks the chat token {token}; "
                                 "take an instruct model's")
        return cls(tokenizer)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def prompt(self, instruction: str) -> list[int]:
        """Ids before the audio."""
        return self.head + self.ids(instruction + "\n")

    def answer(self, text: str) -> list[int]:
        """Ids of the answer and the end token."""
        return self.ids(text) + [self.end]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def read_qwen_config(folder) -> dict:
    """Qwen's config.json with its defaults; refuses what is not computed here."""
    c = read_config(folder, ("qwen2", "qwen3"))
    check_sizes(c, folder, "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads", "vocab_size")
    qwen3 = c["model_type"] == "qwen3"
    c.setdefault("rms_norm_eps", 1e-6)
    c.setdefault("num_key_value_heads", c["num_attention_heads"])
    if not c.get("head_dim"):
        c["head_dim"] = 128 if qwen3 else c["hidden_size"] // c["num_attention_heads"]
    check_sizes(c, folder, "num_key_value_heads", "head_dim")
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise bad_config(folder, "rope_parameters", rope, "an object")
    c["rope_theta"] = float(rope.get("rope_theta") or c.get("rope_theta") or 10_000.0)
    rope_type = rope.get("rope_type") or rope.get("type")
    check_values(c | {"rope_type": rope_type}, folder, rope_type="default",
                 hidden_act="silu", use_sliding_window=False)
    return c


class QwenDecoder(nn.Module):
    """Qwen2, Qwen2.5 or Qwen3 dense, frozen, with Hugging Face's parameter names.

    In its chat, audio tokens stand between instruction and answer. It computes in
    the dtype it is loaded in, also under autocast: no step casts its weights.
    """

    AUDIO = -1  # the placeholder of an audio token in a list of ids

    def __init__(self, config: dict, tokenizer: ChatTokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.width = config["hidden_size"]
        self.embed_tokens = nn.Embedding(config["vocab_size"], self.width)
        layers = range(config["num_hidden_layers"])
        self.layers = nn.ModuleList(QwenLayer(config) for _ in layers)
        self.norm = nn.RMSNorm(self.width, config["rms_norm_eps"])
        self.lm_head = nn.Linear(self.width, config["vocab_size"], bias=False)
        self.checkpoint_layers = False

    @classmethod
    def from_pretrained(cls, folder, dtype: torch.dtype = torch.float32) -> "QwenDecoder":
        """Read a Hugging Face Qwen folder; every weight in `dtype`, none trainable."""
        config = read_qwen_config(folder)
        tokenizer = ChatTokenizer.from_pretrained(folder)
        largest = max(tokenizer.tokenizer.get_vocab().values())
        if largest >= config["vocab_size"]:
            raise bad_config(folder, "vocab_size", config["vocab_size"],
                             f"more than tokenizer.json's largest id, {largest}")
        with torch.device("meta"):
            decoder = cls(config, tokenizer)
        tensors = {}
        for name, tensor in read_weights(folder).items():
            tensors[name.removeprefix("model.")] = tensor.to(dtype)
        if config.get("tie_word_embeddings") and "embed_tokens.weight" in tensors:
            tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
        load_strictly(decoder, tensors, folder)
        return decoder.requires_grad_(False).eval()

    def train(self, mode: bool = True):
        return super().train(False)  # the decoder never trains

    def forward(self, embeds, caches=None, positions=None):
        """embeds (B, L, D), padded on the right -> states (B, L, D).

        In generation: a cache for each layer, and the tokens' positions (B, L) in it.
        """
        x = embeds.to(self.embed_tokens.weight.dtype)
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]  # (1, L)
        with torch.autocast(x.device.type, enabled=False):
            rotary = self.rotary(positions, x.dtype)
            for i, layer in enumerate(self.layers):
                cache = caches[i] if caches else None
                x = run_layer(layer, self.checkpoint_layers, x, rotary, cache, positions)
            return self.norm(x)

    def rotary(self, positions, dtype):
        """Cosines and sines for positions (B, L): (B, 1, L, D / H) each."""
        dim = self.config["head_dim"]
        exponents = torch.arange(0, dim, 2, device=positions.device).float() / dim
        angles = positions[..., None].float() * self.config["rope_theta"] ** -exponents
        angles = torch.cat((angles, angles), -1)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def layout(self, lengths, prompts, answers) -> list[list[int]]:
        """Each clip's ids: prompt, placeholders for the audio, tail, answer."""
        chats = []
        for length, prompt, answer in zip(lengths.tolist(), prompts, answers):
            chat = prompt + [self.AUDIO] * length + self.tokenizer.tail
            chats.append(chat + answer[:-1])  # its end token predicts nothing
        return chats

    def embed(self, chats: list[list[int]], audio, lengths):
        """Ids -> (B, L, D), padded on the right; audio at the placeholders."""
        ids = [torch.tensor(chat) for chat in chats]
        ids = nn.utils.rnn.pad_sequence(ids, batch_first=True)  # (B, L)
        real = torch.arange(audio.shape[1]) < lengths[:, None]  # (B, A)
        embeds = self.embed_tokens(ids.clamp(min=0).to(audio.device, non_blocking=True))
        # Both masks are made on the CPU, so nothing waits for the device.
        embeds[ids == self.AUDIO] = audio[real].to(embeds.dtype)
        return embeds

    def answer_states(self, audio, lengths, prompts, answers):
        """The states (N, D) that predict the answer tokens, one clip after the other.

        audio (B, A, D), lengths (B,) on the CPU; prompts, answers: B lists of ids each.
        """
        chats = self.layout(lengths, prompts, answers)
        states = self(self.embed(chats, audio, lengths))  # (B, L, D)
        predicts = torch.zeros(states.shape[:2], dtype=torch.bool)
        for i, (chat, answer) in enumerate(zip(chats, answers)):
            # The token before the answer predicts its first token, and so on.
            predicts[i, len(chat) - len(answer) : len(chat)] = True
        return states[predicts]

    def unembed(self, states):
        """states (N, D) -> logits (N, V)."""
        with torch.autocast(states.device.type, enabled=False):
            return self.lm_head(states)

    @torch.no_grad()
    def generate(self, audio, lengths, prompts, max_new_tokens: int):
        """Greedy answers as lists of ids, without the end token; inputs as above."""
        chats = self.layout(lengths, prompts, [[]] * len(prompts))
        embeds = self.embed(chats, audio, lengths)  # (B, L, D)
        clips, length, _ = embeds.shape
        shape = (clips, self.config["num_key_value_heads"], length + max_new_tokens,
                 self.config["head_dim"])
        caches = [KVCache(shape, self.embed_tokens.weight) for _ in self.layers]
        positions = torch.arange(length, device=embeds.device).expand(clips, length)
        states = self(embeds, caches, positions)
        ends = torch.tensor([len(chat) for chat in chats], device=embeds.device)  # (B,)
        states = states[torch.arange(clips, device=embeds.device), ends - 1]  # (B, D)
        answers = [[] for _ in chats]
        running = set(range(clips))
        for step in range(max_new_tokens):
            new = self.unembed(states).argmax(-1)  # (B,)
            for clip, token in enumerate(new.tolist()):
                if token in self.tokenizer.stop:
                    running.discard(clip)
                if clip in running:
                    answers[clip].append(token)
            if not running:
                break
            # Behind the chat's last token, over the padding.
            positions = (ends + step)[:, None]  # (B, 1)
            states = self(self.embed_tokens(new[:, None]), caches, positions)[:, 0]
        return answers


def load_decoder(folder, dtype: torch.dtype = torch.float32) -> QwenDecoder:
    """The decoder of a folder; another class would be chosen here."""
    return QwenDecoder.from_pretrained(folder, dtype)


# ---------------------------------------------------------------- the joint model

def new_adapter(encoder, decoder, stack: int) -> StackAdapter:
    """A new adapter, whose output has the scale of the decoder's embeddings."""
    rms = decoder.embed_tokens.weight.float().square().mean().sqrt().item()
    return StackAdapter(encoder.width, decoder.width, stack, rms)


class UniWhisper(nn.Module):
    """Encoder and adapter, trained through a frozen decoder (paper, section 2).

    Only the answers' tokens carry loss. A decoder needs width, embed_tokens, layers,
    answer_states, unembed, generate and a tokenizer with prompt, answer and decode,
    all as in QwenDecoder.
    """

    def __init__(self, encoder, adapter: nn.Module, decoder):
        super().__init__()
        self.encoder, self.adapter, self.decoder = encoder, adapter, decoder
        decoder.requires_grad_(False).eval()  # gradients pass, but change nothing in it

    def forward(self, batch):
        """Losses (N,) of the answer tokens, float32, one clip after the other.

        batch: audio (B, S), samples (B,), prompts and answers as B lists of ids.
        """
        features, lengths = self.encoder.encode(batch.audio, batch.samples)  # (B, T, D)
        audio, lengths = self.adapter(features), self.adapter.lengths(lengths)  # (B, A, D)
        states = self.decoder.answer_states(
            audio, lengths, batch.prompts, batch.answers)  # (N, D)
        labels = torch.tensor([token for answer in batch.answers for token in answer])
        return self.answer_losses(states, labels.to(states.device, non_blocking=True))

    def answer_losses(self, states, labels):
        """states (N, D), labels (N,) -> losses (N,); keeps no logits."""
        losses = []
        for piece in zip(states.split(LOGITS_AT_ONCE), labels.split(LOGITS_AT_ONCE)):
            losses.append(run_layer(self.cross_entropy, True, *piece))
        return torch.cat(losses)

    def cross_entropy(self, states, labels):
        logits = self.decoder.unembed(states).float()  # (N, V)
        return F.cross_entropy(logits, labels, reduction="none")

    @torch.no_grad()
    def generate(self, audio, samples, instructions: list[str],
                 max_new_tokens: int = 64) -> list[str]:
        """Greedy answers about clips: audio (B, S), samples (B,) -> B texts."""
        tokenizer = self.decoder.tokenizer
        prompts = [tokenizer.prompt(text) for text in instructions]
        features, lengths = self.encoder.encode(audio, samples)
        audio, lengths = self.adapter(features), self.adapter.lengths(lengths)
        answers = self.decoder.generate(audio, lengths, prompts, max_new_tokens)
        return [tokenizer.decode(ids) for ids in answers]


# ---------------------------------------------------------------- runs

def newest_checkpoint(out) -> Path | None:
    """The last checkpoint folder of a run (only whole ones carry such a name)."""
    return max(Path(out, "checkpoints").glob("step-" + 8 * "[0-9]"), default=None)


def open_run(out) -> tuple[dict, Path]:
    """A run's settings and its newest checkpoint."""
    settings, newest = Path(out, "config.json"), newest_checkpoint(out)
    if not settings.is_file() or newest is None:
        raise FileNotFoundError(f"{out}: no config.json with a finished checkpoint; "
                                "give --out of a training run")
    return read_json(settings, "encoder", "decoder", "stack"), newest


def load_model(encoder, decoder, stack: int, adapter=None, dtype=torch.float32):
    """The joint model of three folders; without `adapter`, with a new one."""
    encoder, decoder = load_encoder(encoder), load_decoder(decoder, dtype)
    model = UniWhisper(encoder, new_adapter(encoder, decoder, stack), decoder)
    if adapter:
        load_strictly(model.adapter, read_weights(adapter), adapter)
    return model


def load_run(out) -> UniWhisper:
    """The model of a run's newest checkpoint, in eval mode."""
    s, newest = open_run(out)
    adapter = newest / "adapter"
    return load_model(newest / "encoder", s["decoder"], s["stack"], adapter).eval()


# ---------------------------------------------------------------- command line

def flag(default, help: str, **more):
    """A field of a settings dataclass that is also a command-line flag."""
    return field(default=default, metadata={"help": help, **more})


def parse_flags(settings_class, description: str, argv=None) -> dict:
    """Flags for a settings dataclass's fields -> those that the command line gives.

    A flag has its field's type; bool takes no value, tuple[str, ...] several.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in fields(settings_class):
        options = dict(f.metadata)
        if f.type is bool:
            options["action"] = "store_true"
        else:
            options["type"] = (get_args(f.type) or (f.type,))[0]
            if f.default not in (None, "", ()):
                options["help"] += f" ({f.default})"
        if get_origin(f.type) is tuple:
            options["nargs"] = "+"
        parser.add_argument("--" + f.name.replace("_", "-"), **options)
    given = vars(parser.parse_args(argv))
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def refuse_to_overwrite(target, *inputs) -> None:
    for path in inputs:
        if Path(target).resolve() == Path(path).resolve():
            raise ValueError(f"{target} is what is read here; write to another place")


@torch.inference_mode()
def encode(args) -> None:
    from data import AudioError, Rows, read_audio  # used here alone

    refuse_to_overwrite(args.out, *args.audio)
    encoder = load_encoder(args.encoder).eval()
    clips = {}  # name -> a function that reads the clip
    for path in args.audio:
        if path.endswith((".jsonl", ".tar")):
            rows = Rows([path])
            for i in range(len(rows)):
                clips[rows[i]["audio"]] = partial(rows.audio, i, encoder.sample_rate)
        else:
            clips[path] = partial(read_audio, path, encoder.sample_rate)
    features, skipped = {}, []
    for name, read in clips.items():
        try:
            audio = read()
        except AudioError as e:
            skipped.append(f"skipped: {e}")
            continue
        x = encoder.encode(audio[None], torch.tensor([len(audio)]))[0][0]  # (T, D)
        features[name] = (x.mean(0) if args.pool else x).contiguous()
        print(f"{name}: {tuple(features[name].shape)}")
    if features:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_tensors(features, args.out)
    if skipped:
        raise ValueError("\n".join(skipped))


def ask(args) -> None:
    from data import read_audio

    if args.max_new_tokens < 1:
        raise ValueError("--max-new-tokens must be above 0")
    model = load_run(args.run)
    audio = read_audio(args.audio, model.encoder.sample_rate)
    samples = torch.tensor([len(audio)])
    texts = model.generate(audio[None], samples, [args.question], args.max_new_tokens)
    print(texts[0])


@torch.no_grad()
def export(args) -> None:
    settings, newest = open_run(args.run)
    source, trained = settings["encoder"], newest / "encoder"
    refuse_to_overwrite(args.folder, args.run, source, settings["decoder"], trained)
    if not 0 <= args.blend <= 1:
        raise ValueError(f"--blend is {args.blend:g}; it must be from 0 to 1")
    encoder = load_encoder(trained)
    if args.blend != 1:
        # Weights in between forget less (Wortsman et al., arXiv 2109.01903).
        start = load_encoder(source)
        for p, before in zip(encoder.parameters(), start.parameters(), strict=True):
            p.lerp_(before, 1 - args.blend)
    encoder.save(args.folder, source)
    print(f"{args.folder}: {trained}, {args.blend:g} of the way from {source}")


def main():
    """What a user can cause ends in one line and exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("encode", help="audio -> features (T, D), 20 ms a token")
    p.add_argument("audio", nargs="+", help="audio files, manifests (.jsonl), tars")
    p.add_argument("--encoder", required=True, help="Whisper, or OUT/encoder of a run")
    p.add_argument("--out", required=True, help="safetensors file; its keys: clips")
    p.add_argument("--pool", action="store_true", help="mean over tokens: (D,)")
    p.set_defaults(do=encode)
    p = commands.add_parser("ask", help="answer a question about a clip")
    p.add_argument("audio")
    p.add_argument("question")
    p.add_argument("--run", required=True, help="--out of a training run")
    p.add_argument("--max-new-tokens", type=int, default=64)
    p.set_defaults(do=ask)
    p = commands.add_parser("export", help="a run's encoder as a Hugging Face folder")
    p.add_argument("folder")
    p.add_argument("--run", required=True, help="--out of a training run")
    p.add_argument("--blend", type=float, default=1.0, help="1: as trained; 0: untrained")
    p.set_defaults(do=export)
    args = parser.parse_args()
    try:
        args.do(args)
    except (OSError, ValueError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
