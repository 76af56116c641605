"""UniWhisper (arXiv 2602.21772): Whisper's encoder, trained through an adapter and a frozen decoder.

    python uniwhisper.py encode A.wav B.flac --encoder DIR --out F.safetensors
    python uniwhisper.py ask A.wav "Which instrument?" --run OUT
    python uniwhisper.py export --run OUT DIR [--blend 0.5]

Shapes: B clips, S samples at 16 kHz, F mel frames (10 ms), T encoder tokens (20 ms),
A audio tokens after the adapter, L decoder positions, H heads, D width, V vocabulary,
N answer tokens of a batch.
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint

from adapter import StackAdapter

SAMPLE_RATE = 16_000
N_FFT = 400  # samples: windows of 25 ms
HOP = 160  # samples: a frame every 10 ms
TOKEN = 2 * HOP  # samples: an encoder token every 20 ms
CHUNK = 30 * SAMPLE_RATE  # samples: the 30 s that Whisper pads every clip to
LOGITS_AT_ONCE = 1024  # answer tokens whose (N, V) logits exist at the same time


# ---------------------------------------------------------------- log-mel

@lru_cache(maxsize=8)
def mel_filters(n_mels: int, device: torch.device) -> torch.Tensor:
    """Slaney's triangles of equal area, 0 to 8 kHz: (N_FFT / 2 + 1, n_mels), float32."""
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
def log_mel_spectrogram(audio: torch.Tensor, n_mels: int = 80) -> torch.Tensor:
    """Whisper's input: audio (B, S) at 16 kHz -> (B, n_mels, F), F = S // 160, at least 1.

    The frames are those of the clip padded to 30 s with zeros, as Whisper pads. The
    floor lies 8 below the clip's own maximum (log10). So neither more zeros nor a loud
    clip in the same batch changes a frame.
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
    """Samples at 16 kHz (int or tensor) -> encoder tokens of 20 ms, at least one."""
    tokens = (samples // HOP + 1) // 2
    return tokens.clamp(min=1) if isinstance(tokens, torch.Tensor) else max(1, tokens)


# ---------------------------------------------------------------- checkpoint folders

def read_json(path, *keys) -> dict:
    """The JSON object in a file, which must have all of `keys`."""
    try:
        content = json.loads(Path(path).read_text())
    except ValueError as e:
        raise ValueError(f"{path} is not JSON ({e}); {remedy(path)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object; fetch it again")
    missing = [k for k in keys if k not in content]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; fetch it again")
    return content


def remedy(path) -> str:
    """What to do about a damaged file."""
    with open(path, "rb") as f:
        pointer = f.read(40).startswith(b"version https://git-lfs")
    return "it is a Git LFS pointer: run `git lfs pull`" if pointer else "fetch it again"


def check_sizes(config: dict, folder, *keys) -> None:
    """All of `keys` must be whole numbers above 0."""
    for key in keys:
        value = config.get(key, "missing")
        if type(value) is not int or value < 1:
            raise ValueError(f"{folder}/config.json: {key} is {value!r}; "
                             "need a whole number above 0")


def read_config(folder, model_types) -> dict:
    """config.json of a Hugging Face folder; a model of another type is refused."""
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: need a Hugging Face checkpoint folder (not "
                                "a hub's name: fetch it first; see weights/README.md)")
    config = read_json(path)
    if config.get("model_type") not in model_types:
        inner = folder / "encoder/config.json"
        meant = f"; did you mean {inner.parent}?" if inner.is_file() else ""
        raise ValueError(f"{path}: model_type is {config.get('model_type')!r}; "
                         f"need one of {', '.join(model_types)}{meant}")
    return config


def read_weights(folder) -> dict[str, torch.Tensor]:
    """All tensors of a folder: of model.safetensors, or of the shards in its index."""
    index = Path(folder, "model.safetensors.index.json")
    names = ["model.safetensors"]
    if index.exists() and Path(folder, names[0]).exists():
        print(f"note: {folder} has model.safetensors and an index of shards: reading "
              "model.safetensors, as transformers does", file=sys.stderr)
    elif index.exists():
        places = read_json(index, "weight_map")["weight_map"]
        if not isinstance(places, dict):
            raise ValueError(f"{index}: weight_map is no object; fetch it again")
        names = sorted(set(places.values()))
    tensors = {}
    for path in [Path(folder, name) for name in names]:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; fetch the weights as safetensors")
        try:
            with safe_open(path, "pt") as f:
                for name in f.keys():
                    tensors[name] = f.get_tensor(name)
        except Exception as e:  # safetensors raises an error class of its own
            raise ValueError(f"{path} is damaged ({e}); {remedy(path)}") from None
    return tensors


def load_strictly(module: nn.Module, tensors: dict[str, torch.Tensor], source) -> None:
    """Put `tensors` in the place of the module's parameters.

    Raises ValueError with missing, unexpected and misshaped names together.
    """
    want = module.state_dict()
    missing = [f"missing {name}" for name in sorted(want.keys() - tensors.keys())]
    unexpected = [f"unexpected {name}" for name in sorted(tensors.keys() - want.keys())]
    misshaped = []
    for name in sorted(want.keys() & tensors.keys()):
        here, there = tuple(tensors[name].shape), tuple(want[name].shape)
        if here != there:
            misshaped.append(f"shape of {name} is {here}, config.json says {there}")
    faults = []
    for kind in (missing, unexpected, misshaped):
        faults += kind[:6]
        if len(kind) > 6:
            faults.append(f"and {len(kind) - 6} more")
    if faults:
        raise ValueError(f"{source}: weights do not fit: {'; '.join(faults)}")
    module.load_state_dict(tensors, assign=True)


def write_tensors(tensors: dict[str, torch.Tensor], path) -> None:
    """A safetensors file that others may read, too."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as e:  # no OSError, also when the disk is full
        raise OSError(f"cannot write {path}: {e}") from None
    Path(path).chmod(0o644)  # safetensors makes it private


def run_layer(layer, recompute: bool, *inputs):
    """layer(*inputs); recompute: its activations are made again in backward, not kept."""
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
    """Whisper's encoder, tiny to large-v3-turbo, with the Hugging Face parameter names.

    config: what a Whisper config.json holds. The sinusoidal positions never train.
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
        self.layers = nn.ModuleList()
        for _ in range(config["encoder_layers"]):
            self.layers.append(WhisperLayer(self.width, heads, ffn))
        self.layer_norm = nn.LayerNorm(self.width)
        self.checkpoint_layers = False

    @classmethod
    def from_pretrained(cls, folder) -> "WhisperEncoder":
        """Read a Hugging Face Whisper folder (encoder alone or whole), as float32."""
        config = read_config(folder, ("whisper",))
        check_sizes(config, folder, "d_model", "encoder_layers", "encoder_ffn_dim",
                    "encoder_attention_heads", "num_mel_bins", "max_source_positions")
        width, heads = config["d_model"], config["encoder_attention_heads"]
        activation = config.get("activation_function", "gelu")
        if width % heads or activation != "gelu":
            raise ValueError(f"{folder}/config.json: need a d_model that the heads divide and "
                             f"gelu, not {width} by {heads} heads and {activation}")
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
        """Drop all but the first `count` layers; the last layer norm stays only with all."""
        if not 0 <= count <= len(self.layers):
            raise ValueError(f"layer is {count}; this encoder has layers 0 to {len(self.layers)}")
        if count < len(self.layers):
            self.layers = self.layers[:count]
            self.layer_norm = nn.Identity()

    def forward(self, mel: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """mel (B, n_mels, F), lengths (B,) in tokens (None: all are real) -> (B, T, D).

        Tokens beyond a clip's length are hidden from the others and come out as zeros.
        Keep `lengths` on the CPU: whether to mask is then known without waiting.
        """
        tokens = (mel.shape[-1] + 1) // 2
        if tokens > self.window:
            raise ValueError(f"mel has {mel.shape[-1]} frames; at most {2 * self.window} fit")
        real = None
        if lengths is not None and bool((lengths < tokens).any()):
            real = torch.arange(tokens) < lengths.cpu()[:, None]  # (B, T)
            real = real.to(mel.device, non_blocking=True)
            # conv1 sees one frame beyond a clip's end: it must be zero there, too.
            mel = mel * real.repeat_interleave(2, 1)[:, None, : mel.shape[-1]]
        x = F.gelu(self.conv1(mel))  # (B, D, F)
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # (B, T, D)
        x = x + self.embed_positions.weight[:tokens]
        mask = None if real is None else real[:, None, None, :]  # (B, 1, 1, T)
        for layer in self.layers:
            x = run_layer(layer, self.checkpoint_layers, x, mask)
        x = self.layer_norm(x)
        return x if real is None else x * real[:, :, None]

    def encode(self, audio: torch.Tensor, samples: torch.Tensor, pad_to_window: bool = False):
        """audio (B, S), zero beyond samples (B,) -> (features (B, T, D), lengths (B,)).

        Each clip is encoded at its own length; a clip over 30 s in windows of 30 s, whose
        tokens are joined. Features beyond `lengths` (on the CPU) are zero. S may be less
        than `samples`: silence follows. pad_to_window: attention also sees silence up to
        the window's end, as Whisper was trained; features are still the clip's own.
        # assumption: the paper does not say whether it pads to 30 s.
        """
        lengths = encoder_lengths(samples.cpu())  # (B,)
        seen = -(-lengths // self.window) * self.window if pad_to_window else lengths
        parts = []
        for first in range(0, int(seen.max()), self.window):
            clips = (seen > first).nonzero()[:, 0]  # those that reach into this window
            start = first * TOKEN
            piece = audio[clips.to(audio.device), start : start + self.window * TOKEN]
            x = self.encode_window(piece, (seen[clips] - first).clamp(max=self.window))
            part = x.new_zeros(len(audio), *x.shape[1:])
            parts.append(part.index_copy(0, clips.to(x.device), x))
        features = torch.cat(parts, 1)[:, : int(lengths.max())]
        if pad_to_window:
            real = torch.arange(features.shape[1]) < lengths[:, None]
            features = features * real[:, :, None].to(features.device)
        return features, lengths

    def encode_window(self, audio, lengths):
        """audio (B, S) of at most one window, lengths (B,) in tokens -> features (B, T, D)."""
        tokens = int(lengths.max())
        audio = F.pad(audio, (0, max(0, tokens * TOKEN - audio.shape[1])))
        mel = log_mel_spectrogram(audio, self.n_mels)[:, :, : 2 * tokens]
        return self(mel, lengths)

    def save(self, folder, source=None) -> None:
        """Write a Hugging Face Whisper folder, which transformers' WhisperModel loads.

        source: the Whisper folder that training started from. All but the encoder (its
        decoder, tokenizer, ...) is copied from there, so the folder is a whole Whisper.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, tensor in self.state_dict().items():
            tensors[f"model.encoder.{name}"] = tensor.detach().cpu().contiguous()
        if source is not None:
            for name, tensor in read_weights(source).items():
                if not name.startswith(("model.", "proj_out.")):
                    name = f"model.{name}"
                tensors.setdefault(name, tensor.contiguous())
            for path in [*Path(source).glob("*.json"), *Path(source).glob("*.txt")]:
                if ".index." not in path.name:
                    shutil.copyfile(path, folder / path.name)  # without its mode
        write_tensors(tensors, folder / "model.safetensors")
        # transformers 5 calls it dtype, 4 torch_dtype
        config = {"architectures": ["WhisperForConditionalGeneration"], **self.config,
                  "model_type": "whisper", "dtype": "float32", "torch_dtype": "float32"}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        mel = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": self.n_mels}
        if not (folder / "preprocessor_config.json").exists():
            (folder / "preprocessor_config.json").write_text(json.dumps(mel, indent=2) + "\n")


ENCODERS = {"whisper": WhisperEncoder}


def load_encoder(folder):
    """The encoder of a Hugging Face folder, its class chosen by model_type."""
    return ENCODERS[read_config(folder, tuple(ENCODERS))["model_type"]].from_pretrained(folder)


# ---------------------------------------------------------------- Qwen decoder

class KVCache:
    """One layer's keys and values during generation: (B, KV heads, length, D / H) each."""

    def __init__(self, shape: tuple[int, ...], like: torch.Tensor):
        self.k = like.new_zeros(shape)
        self.v = like.new_zeros(shape)

    def write(self, k, v, positions):
        """Put k, v (B, KV heads, L, D / H) at positions (B, L) -> all keys and values."""
        rows = torch.arange(len(k), device=k.device)[:, None]
        self.k[rows, :, positions] = k.transpose(1, 2)
        self.v[rows, :, positions] = v.transpose(1, 2)
        return self.k, self.v


def rotate(x, rotary):
    """Rotary positions: x (B, H, L, D / H), rotary: cos and sin (1 or B, 1, L, D / H)."""
    cos, sin = rotary
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


class QwenAttention(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        width, self.head_dim = c["hidden_size"], c["head_dim"]
        heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        qwen2 = c["model_type"] == "qwen2"
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=qwen2)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=qwen2)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=qwen2)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=False)
        self.q_norm = nn.Identity() if qwen2 else nn.RMSNorm(self.head_dim, c["rms_norm_eps"])
        self.k_norm = nn.Identity() if qwen2 else nn.RMSNorm(self.head_dim, c["rms_norm_eps"])

    def forward(self, x, rotary, cache=None, positions=None):
        """x (B, L, D) -> (B, L, D), causal; with a cache, x stands at positions (B, L) of it."""
        q = self.q_norm(self.split(self.q_proj(x))).transpose(1, 2)  # (B, H, L, D / H)
        k = self.k_norm(self.split(self.k_proj(x))).transpose(1, 2)  # (B, KV heads, L, D / H)
        v = self.split(self.v_proj(x)).transpose(1, 2)
        q, k = rotate(q, rotary), rotate(k, rotary)
        seen = None
        if cache is not None:
            k, v = cache.write(k, v, positions)
            seen = torch.arange(k.shape[2], device=x.device) <= positions[:, None, :, None]
        y = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def split(self, x):
        return x.unflatten(-1, (-1, self.head_dim))


class QwenMLP(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        self.gate_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.up_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.down_proj = nn.Linear(c["intermediate_size"], c["hidden_size"], bias=False)

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
    """Qwen's tokenizer and chat template; instruction and answer are tokenised apart.

    # assumption: the paper gives no prompt. Here: one user turn, the instruction before
    # the audio; no system turn.
    """

    def __init__(self, tokenizer: Tokenizer, folder="tokenizer"):
        self.tokenizer = tokenizer
        # What a saved tokenizer may carry along would change the ids of an answer.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):
            tokenizer.model.dropout = None
        for token in ("<|im_start|>", "<|im_end|>"):
            if tokenizer.token_to_id(token) is None:
                raise ValueError(f"{folder}: the tokenizer lacks the chat token {token}; "
                                 "take an instruct model's")
        self.end = tokenizer.token_to_id("<|im_end|>")
        self.stop = {self.end, tokenizer.token_to_id("<|endoftext|>")} - {None}
        self.head = self.ids("<|im_start|>user\n")
        self.tail = self.ids("<|im_end|>\n<|im_start|>assistant\n")  # between audio and answer
        if tokenizer.token_to_id("<think>") is not None:  # Qwen3 answers at once after this
            self.tail += self.ids("<think>\n\n</think>\n\n")
        tokenizer.encode_special_tokens = True  # from here on they are spelt as plain text

    @classmethod
    def from_pretrained(cls, folder) -> "ChatTokenizer":
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; copy it from the model's page")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as e:  # tokenizers raises bare Exception
            raise ValueError(f"{path} is damaged ({e}); {remedy(path)}") from None
        return cls(tokenizer, path)

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
    """Qwen's config.json with its defaults; refuses what this decoder does not compute."""
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
        raise ValueError(f"{folder}/config.json: rope settings are {rope!r}; need an object")
    c["rope_theta"] = float(rope.get("rope_theta") or c.get("rope_theta") or 10_000.0)
    checks = [("rope type", rope.get("rope_type", rope.get("type", "default")), "default"),
              ("hidden_act", c.get("hidden_act", "silu"), "silu"),
              ("use_sliding_window", bool(c.get("use_sliding_window")), False),
              ("attention_bias", qwen3 and bool(c.get("attention_bias")), False)]
    for name, value, needed in checks:
        if value != needed:
            raise ValueError(f"{folder}/config.json: {name} is {value!r}; "
                             f"this decoder computes {needed!r} only")
    return c


class QwenDecoder(nn.Module):
    """Qwen2, Qwen2.5 and Qwen3 dense, frozen, with the Hugging Face parameter names.

    It sees audio as tokens of its chat, between the instruction and the answer. It
    computes in the dtype that it is loaded in, also under autocast: frozen weights are
    cast once, not in every step.
    """

    AUDIO = -1  # stands in a row of ids for one audio token

    def __init__(self, config: dict, tokenizer: ChatTokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.width = config["hidden_size"]
        self.embed_tokens = nn.Embedding(config["vocab_size"], self.width)
        self.layers = nn.ModuleList(QwenLayer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.RMSNorm(self.width, config["rms_norm_eps"])
        self.lm_head = nn.Linear(self.width, config["vocab_size"], bias=False)
        self.checkpoint_layers = False

    @classmethod
    def from_pretrained(cls, folder, dtype: torch.dtype = torch.float32) -> "QwenDecoder":
        """Read a Hugging Face Qwen folder; every weight in `dtype`, none of them trainable."""
        config = read_qwen_config(folder)
        tokenizer = ChatTokenizer.from_pretrained(folder)
        largest = max(tokenizer.tokenizer.get_vocab().values())
        if largest >= config["vocab_size"]:
            raise ValueError(f"{folder}: tokenizer.json has id {largest}, config.json a "
                             f"vocabulary of {config['vocab_size']}")
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

    @property
    def input_rms(self) -> float:
        """Root mean square of what the decoder is used to read: its token embeddings."""
        return self.embed_tokens.weight.float().square().mean().sqrt().item()

    def forward(self, embeds: torch.Tensor, caches=None, positions=None) -> torch.Tensor:
        """embeds (B, L, D), padded on the right -> states (B, L, D) after the last norm.

        For generation: caches, one a layer, and the positions (B, L) of the L tokens, which
        see what the caches hold up to there.
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
        """Cosines and sines of the angles at positions (B, L): (B, 1, L, D / H) each."""
        dim = self.config["head_dim"]
        exponents = torch.arange(0, dim, 2, device=positions.device).float() / dim
        angles = positions[..., None].float() * self.config["rope_theta"] ** -exponents
        angles = torch.cat((angles, angles), -1)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def layout(self, lengths: torch.Tensor, prompts, answers) -> list[list[int]]:
        """Each clip's ids: prompt, a placeholder for each audio token, tail, answer.

        The answer's end token is left out: it predicts nothing.
        """
        rows = []
        for length, prompt, answer in zip(lengths.tolist(), prompts, answers):
            rows.append(prompt + [self.AUDIO] * length + self.tokenizer.tail + answer[:-1])
        return rows

    def embed(self, rows: list[list[int]], audio: torch.Tensor, lengths: torch.Tensor):
        """Rows of ids -> (B, L, D), padded on the right; audio at the placeholders."""
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        real = torch.arange(audio.shape[1]) < lengths[:, None]  # (B, A)
        embeds = self.embed_tokens(ids.clamp(min=0).to(audio.device, non_blocking=True))
        # Both masks are made on the CPU, so nothing waits for the device.
        embeds[ids == self.AUDIO] = audio[real].to(embeds.dtype)
        return embeds

    def answer_states(self, audio: torch.Tensor, lengths: torch.Tensor, prompts, answers):
        """audio (B, A, D), lengths (B,) on the CPU, prompts and answers: B lists of ids

        -> the states (N, D) that predict the answer tokens, clips one after the other.
        """
        rows = self.layout(lengths, prompts, answers)
        states = self(self.embed(rows, audio, lengths))  # (B, L, D)
        predicts = torch.zeros(states.shape[:2], dtype=torch.bool)
        for i, (row, answer) in enumerate(zip(rows, answers)):
            # The token before the answer predicts its first token, and so on.
            predicts[i, len(row) - len(answer) : len(row)] = True
        return states[predicts]

    def unembed(self, states: torch.Tensor) -> torch.Tensor:
        """states (N, D) -> logits (N, V)."""
        with torch.autocast(states.device.type, enabled=False):
            return self.lm_head(states)

    @torch.no_grad()
    def generate(self, audio: torch.Tensor, lengths: torch.Tensor, prompts,
                 max_new_tokens: int) -> list[list[int]]:
        """Greedy answers: audio (B, A, D), lengths (B,), prompts -> ids without the end token.

        A new token is written behind its row's last one, over the padding.
        """
        rows = self.layout(lengths, prompts, [[]] * len(prompts))
        embeds = self.embed(rows, audio, lengths)  # (B, L, D)
        clips, length, _ = embeds.shape
        shape = (clips, self.config["num_key_value_heads"], length + max_new_tokens,
                 self.config["head_dim"])
        caches = [KVCache(shape, self.embed_tokens.weight) for _ in self.layers]
        positions = torch.arange(length, device=embeds.device).expand(clips, length)
        states = self(embeds, caches, positions)
        ends = torch.tensor([len(row) for row in rows], device=embeds.device)  # (B,)
        states = states[torch.arange(clips, device=embeds.device), ends - 1]  # (B, D)
        answers = [[] for _ in rows]
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
            positions = (ends + step)[:, None]  # (B, 1)
            states = self(self.embed_tokens(new[:, None]), caches, positions)[:, 0]
        return answers


DECODERS = {"qwen2": QwenDecoder, "qwen3": QwenDecoder}


def load_decoder(folder, dtype: torch.dtype = torch.float32):
    """The frozen decoder of a Hugging Face folder, its class chosen by model_type."""
    kind = read_config(folder, tuple(DECODERS))["model_type"]
    return DECODERS[kind].from_pretrained(folder, dtype)


# ---------------------------------------------------------------- the joint model

def new_adapter(encoder, decoder, stack: int) -> StackAdapter:
    """An adapter whose output begins at the scale of what the decoder is used to read."""
    return StackAdapter(encoder.width, decoder.width, stack, decoder.input_rms)


class UniWhisper(nn.Module):
    """Encoder and adapter, trained through a frozen decoder by next-token loss on answers.

    Paper, section 2. A decoder offers width, input_rms, tokenizer, answer_states,
    unembed and generate, as QwenDecoder has them.
    """

    def __init__(self, encoder, adapter: nn.Module, decoder):
        super().__init__()
        self.encoder, self.adapter, self.decoder = encoder, adapter, decoder
        decoder.requires_grad_(False).eval()

    def forward(self, batch) -> torch.Tensor:
        """batch: audio (B, S), samples (B,), prompts and answers as lists of ids.

        -> losses (N,) of the answer tokens, float32, clips one after the other.
        """
        features, lengths = self.encoder.encode(batch.audio, batch.samples)  # (B, T, D)
        audio, lengths = self.adapter(features), self.adapter.lengths(lengths)  # (B, A, D)
        states = self.decoder.answer_states(audio, lengths, batch.prompts, batch.answers)  # (N, D)
        labels = torch.tensor([token for answer in batch.answers for token in answer])
        return self.answer_losses(states, labels.to(states.device, non_blocking=True))

    def answer_losses(self, states, labels) -> torch.Tensor:
        """states (N, D), labels (N,) -> (N,). Only LOGITS_AT_ONCE tokens' logits exist at
        once; they are computed again in backward."""
        losses = []
        for piece, target in zip(states.split(LOGITS_AT_ONCE), labels.split(LOGITS_AT_ONCE)):
            losses.append(run_layer(self.cross_entropy, True, piece, target))
        return torch.cat(losses)

    def cross_entropy(self, states, labels):
        logits = self.decoder.unembed(states).float()  # (N, V)
        return F.cross_entropy(logits, labels, reduction="none")

    @torch.no_grad()
    def generate(self, audio: torch.Tensor, samples: torch.Tensor, instructions: list[str],
                 max_new_tokens: int = 64) -> list[str]:
        """Greedy answers about clips: audio (B, S), samples (B,) -> B texts."""
        features, lengths = self.encoder.encode(audio, samples)
        prompts = [self.decoder.tokenizer.prompt(text) for text in instructions]
        ids = self.decoder.generate(self.adapter(features), self.adapter.lengths(lengths), prompts,
                                    max_new_tokens)
        return [self.decoder.tokenizer.decode(answer) for answer in ids]


# ---------------------------------------------------------------- runs

def newest_checkpoint(out) -> Path | None:
    """The last checkpoint folder of a run (only whole ones carry such a name)."""
    return max(Path(out, "checkpoints").glob("step-" + 8 * "[0-9]"), default=None)


def open_run(out) -> tuple[dict, Path]:
    """A training run's settings and its newest checkpoint."""
    settings, newest = Path(out) / "config.json", newest_checkpoint(out)
    if not settings.is_file() or newest is None:
        raise FileNotFoundError(f"{out}: no config.json with a finished checkpoint; "
                                "give --out of a training run")
    return read_json(settings, "encoder", "decoder", "stack"), newest


def load_run(out, dtype: torch.dtype = torch.float32) -> UniWhisper:
    """The model of a run's newest checkpoint, with the decoder that its config.json names."""
    settings, newest = open_run(out)
    encoder = load_encoder(newest / "encoder")
    decoder = load_decoder(settings["decoder"], dtype)
    adapter = new_adapter(encoder, decoder, settings["stack"])
    load_strictly(adapter, read_weights(newest / "adapter"), newest / "adapter")
    return UniWhisper(encoder, adapter, decoder).eval()


@torch.no_grad()
def blend(start: nn.Module, trained: nn.Module, share: float) -> None:
    """Move `trained` to (1 - share) * start + share * trained, in place.

    Weights in between forget less (Wortsman et al., arXiv 2109.01903).
    """
    for a, b in zip(start.parameters(), trained.parameters(), strict=True):
        b.lerp_(a, 1 - share)


def refuse_to_overwrite(target, *inputs) -> None:
    for path in inputs:
        if Path(target).resolve() == Path(path).resolve():
            raise ValueError(f"{target} is what is read here; write to another place")


# ---------------------------------------------------------------- command line

def flag(default, help: str, **more):
    """A field of a settings dataclass that is also a command-line flag (see parse_flags)."""
    return field(default=default, metadata={"help": help, **more})


def parse_flags(settings_class, description: str, argv=None) -> dict:
    """Flags for the fields of a settings dataclass -> the values that the command line gives.

    A field's type is that of its flag: bool takes no value, tuple[str, ...] takes several.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
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


@torch.inference_mode()
def encode_files(args) -> None:
    from data import AudioError, Rows, read_audio  # data.py serves the command line alone

    refuse_to_overwrite(args.out, *args.audio)
    encoder = load_encoder(args.encoder).eval()
    jobs = {}  # name -> how to read the clip
    for path in args.audio:
        if path.endswith((".jsonl", ".tar")):
            rows = Rows([path])
            for i in range(len(rows)):
                jobs[rows[i]["audio"]] = partial(rows.audio, i, encoder.sample_rate)
        else:
            jobs[path] = partial(read_audio, path, encoder.sample_rate)
    features, errors = {}, []
    for name, read in jobs.items():
        try:
            audio = read()
        except AudioError as e:
            errors.append(str(e))
            continue
        x = encoder.encode(audio[None], torch.tensor([len(audio)]))[0][0]  # (T, D)
        features[name] = (x.mean(0) if args.pool else x).contiguous()
        print(f"{name}: {tuple(features[name].shape)}")
    if features:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_tensors(features, args.out)
    if errors:
        raise ValueError("\n".join(f"skipped: {e}" for e in errors))


def ask(args) -> None:
    from data import read_audio

    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {args.max_new_tokens}; it must be above 0")
    model = load_run(args.run)
    audio = read_audio(args.audio, model.encoder.sample_rate)
    samples = torch.tensor([len(audio)])
    print(model.generate(audio[None], samples, [args.question], args.max_new_tokens)[0])


def export(args) -> None:
    settings, newest = open_run(args.run)
    source = settings["encoder"]
    refuse_to_overwrite(args.folder, args.run, source, settings["decoder"], newest / "encoder")
    encoder = load_encoder(newest / "encoder")
    if not 0 <= args.blend <= 1:
        raise ValueError(f"--blend is {args.blend:g}; it must be from 0 to 1")
    if args.blend != 1:
        blend(load_encoder(source), encoder, args.blend)
    encoder.save(args.folder, source)
    blended = f", blended {args.blend:g} with {source}" if args.blend != 1 else ""
    print(f"{args.folder}: encoder of {newest}{blended}")


def main():
    """What a user can cause ends in one line and exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("encode", help="audio -> features (T, D), 20 ms a token")
    p.add_argument("audio", nargs="+", help="audio files, manifests (.jsonl), tars")
    p.add_argument("--encoder", required=True, help="Whisper folder, or OUT/encoder of a run")
    p.add_argument("--out", required=True, help="safetensors file; its keys are the clips' paths")
    p.add_argument("--pool", action="store_true", help="the mean over a clip's tokens: (D,)")
    p.set_defaults(do=encode_files)
    p = commands.add_parser("ask", help="answer a question about a clip")
    p.add_argument("audio")
    p.add_argument("question")
    p.add_argument("--run", required=True, help="--out of a training run")
    p.add_argument("--max-new-tokens", type=int, default=64)
    p.set_defaults(do=ask)
    p = commands.add_parser("export", help="a run's newest encoder as a Hugging Face folder")
    p.add_argument("folder")
    p.add_argument("--run", required=True, help="--out of a training run")
    p.add_argument("--blend", type=float, default=1.0, help="1: as trained; 0: as it started")
    p.set_defaults(do=export)
    args = parser.parse_args()
    try:
        args.do(args)
    except (OSError, ValueError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
