"""UniWhisper (arXiv 2602.21772): a Whisper encoder trained through an adapter and a frozen Qwen language model.

    python uniwhisper.py encode A.wav B.flac --encoder DIR --out F.safetensors
    python uniwhisper.py ask A.wav "Which instrument?" --run OUT
    python uniwhisper.py export --run OUT DIR [--blend 0.5]

Shapes: B clips, S samples at 16 kHz, F mel frames (10 ms), T encoder tokens (20 ms), A audio tokens after the
adapter, L decoder positions, D width, V vocabulary.
"""
import argparse
import json
import math
import shutil
import sys
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint

from adapter import StackAdapter

SAMPLE_RATE = 16_000
N_FFT, HOP = 400, 160  # 25 ms windows, one every 10 ms
WINDOW = 30 * SAMPLE_RATE  # Whisper's context: 3,000 frames, 1,500 tokens


# ---------------------------------------------------------------- log-mel

def _slaney_hz_to_mel(hz):
    return torch.where(hz < 1000, hz * 3 / 200, 15 + (hz / 1000).clamp(min=1).log() * 27 / math.log(6.4))


def _slaney_mel_to_hz(mel):
    return torch.where(mel < 15, mel * 200 / 3, 1000 * ((mel - 15) * math.log(6.4) / 27).exp())


@lru_cache(maxsize=8)
def mel_filters(n_mels: int, device: torch.device = torch.device("cpu")) -> torch.Tensor:
    """Slaney's triangular filters of equal area from 0 to 8 kHz: (n_fft / 2 + 1, n_mels), float32."""
    bins = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1, dtype=torch.float64)
    top = _slaney_hz_to_mel(torch.tensor(SAMPLE_RATE / 2, dtype=torch.float64))
    edges = _slaney_mel_to_hz(torch.linspace(0, 1, n_mels + 2, dtype=torch.float64) * top)
    low, mid, high = edges[:-2], edges[1:-1], edges[2:]
    up, down = (bins[:, None] - low) / (mid - low), (high - bins[:, None]) / (high - mid)
    return (torch.minimum(up, down).clamp(min=0) * 2 / (high - low)).float().to(device)


@lru_cache(maxsize=8)
def _hann(device: torch.device) -> torch.Tensor:
    return torch.hann_window(N_FFT, device=device)


@torch.no_grad()
def log_mel_spectrogram(audio: torch.Tensor, n_mels: int = 80) -> torch.Tensor:
    """Whisper's input features: audio (B, S) float32 at 16 kHz -> (B, n_mels, F), F = S // 160 frames (at least 1).

    A clip gets the frames that it would have if padded to 30 s with zeros, as Whisper pads, and its floor is
    8 below its own maximum (log10): neither more zeros nor a loud neighbour in the batch changes a real frame.
    """
    if audio.device.type == "cpu" and len(audio) > 1 and audio.numel() > WINDOW:  # in pieces that stay in its cache
        return torch.cat([log_mel_spectrogram(some, n_mels) for some in audio.split(max(1, WINDOW // audio.shape[1]))])
    frames = max(1, audio.shape[-1] // HOP)
    # Windows that straddle the clip's end see zeros, and count for the maximum. Only where 30 s are reached does
    # Whisper's reflection come in.
    audio = F.pad(audio, (0, max(0, min(N_FFT, WINDOW - audio.shape[-1]))))
    audio = F.pad(audio[:, None], (N_FFT // 2, N_FFT // 2), mode="reflect")[:, 0]
    windows = audio.unfold(-1, N_FFT, HOP) * _hann(audio.device)  # (B, F', n_fft)
    if audio.shape[-1] >= WINDOW:
        windows = windows[:, :-1]  # Whisper drops the last frame
    spectrum = torch.fft.rfft(windows)
    power = spectrum.real.square() + spectrum.imag.square()  # (B, F', n_fft / 2 + 1)
    with torch.autocast(audio.device.type, enabled=False):
        mel = power @ mel_filters(n_mels, audio.device)
    mel = mel.clamp_(min=1e-10).log10_()
    floor = mel.amax((1, 2), keepdim=True) - 8
    return mel[:, :frames].maximum(floor).add_(4).div_(4).transpose(1, 2)


def encoder_lengths(samples):
    """Samples at 16 kHz -> encoder tokens of 20 ms (int or tensor): S // 160 frames, two a token, at least one.

    It also holds for audio over 30 s, whose windows are joined: a window is a whole number of tokens.
    """
    tokens = (samples // HOP + 1) // 2
    return tokens.clamp(min=1) if isinstance(tokens, torch.Tensor) else max(1, tokens)


# ---------------------------------------------------------------- checkpoint folders

def read_json(path, *keys) -> dict:
    """The JSON object in a file, which must have all of `keys`."""
    try:
        found = json.loads(Path(path).read_text())
    except ValueError as e:
        raise ValueError(f"{path} is not JSON ({e}); fetch it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object; fetch it again")
    if missing := [k for k in keys if k not in found]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; fetch it again")
    return found


def check_sizes(config: dict, path, *keys) -> dict:
    """The config, all of whose `keys` must be whole numbers above 0."""
    if wrong := [f"{k} is {config[k]!r}" for k in keys if type(config[k]) is not int or config[k] < 1]:
        raise ValueError(f"{path}: {', '.join(wrong)}; need whole numbers above 0")
    return config


def read_config(folder, model_types: tuple[str, ...], *keys) -> dict:
    """config.json of a Hugging Face folder, with the sizes `keys`;
    refuses by name a model that is none of `model_types`."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} is no Hugging Face checkpoint folder; "
                                "see weights/README.md")
    config = read_json(path)
    if config.get("model_type") not in model_types:
        raise ValueError(f"{path}: model_type is {config.get('model_type')!r}; need one of {', '.join(model_types)}")
    return check_sizes(read_json(path, *keys), path, *keys)


def read_weights(folder) -> dict[str, torch.Tensor]:
    """All tensors of a folder: model.safetensors, or the shards that model.safetensors.index.json names."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.exists():
        places = read_json(index, "weight_map")["weight_map"]
        if not isinstance(places, dict):
            raise ValueError(f"{index}: weight_map is no object; fetch it again")
        shards = sorted(set(places.values()))
    missing = [s for s in shards if not (folder / s).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: weight files missing: {', '.join(missing)}; fetch them as safetensors")
    tensors = {}
    for shard in shards:
        try:
            with safe_open(folder / shard, "pt") as f:
                tensors.update((k, f.get_tensor(k)) for k in f.keys())
        except Exception as e:  # safetensors raises its own error class for a damaged file
            raise ValueError(f"{folder / shard} is damaged ({e}); fetch it again") from None
    return tensors


def load_strictly(module: nn.Module, tensors: dict[str, torch.Tensor], source) -> None:
    """Put `tensors` in place of the module's parameters; all missing, unexpected and misshaped names in one error."""
    want = module.state_dict()
    wrong = [f"missing {k}" for k in sorted(want.keys() - tensors.keys())]
    wrong += [f"unexpected {k}" for k in sorted(tensors.keys() - want.keys())]
    wrong += [f"shape of {k} is {tuple(tensors[k].shape)}, config.json says {tuple(want[k].shape)}"
              for k in sorted(want.keys() & tensors.keys()) if tensors[k].shape != want[k].shape]
    if wrong:
        more = f"; and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError(f"{source}: weights do not fit: {'; '.join(wrong[:20])}{more}")
    module.load_state_dict(tensors, assign=True)


def _run_layer(module, layer, *args, **more):
    """One layer; with `module.checkpoint_layers` its activations are computed again in backward instead of kept."""
    if module.checkpoint_layers and torch.is_grad_enabled():
        return checkpoint(layer, *args, use_reentrant=False, **more)
    return layer(*args, **more)


def attend(q, k, v, attn_mask=None, is_causal: bool = False):
    """Attention (B, H, L, D / H). While training in half precision on a CPU by plain products, scores in float32 as in
    the fused kernel, as long as they fit into its cache: the fused backward takes up to five times as long there."""
    half = q.device.type == "cpu" and q.dtype != torch.float32 and q.requires_grad
    if not (half and q.shape[:3].numel() * k.shape[2] <= 2**22):  # scores; 16 MiB
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
    with torch.autocast("cpu", enabled=False):  # it would round the scores
        scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().mT  # (B, H, L, L)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            scores = scores.masked_fill_(~attn_mask, -math.inf)
        return scores.softmax(-1).to(v.dtype) @ v


# ---------------------------------------------------------------- Whisper's encoder

class WhisperAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x, mask):
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for p in (self.q_proj, self.k_proj, self.v_proj))
        y = attend(q, k, v, mask)  # (B, H, T, D / H)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class WhisperLayer(nn.Module):
    def __init__(self, width, heads, ffn):
        super().__init__()
        self.self_attn = WhisperAttention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x, mask=None):
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class WhisperEncoder(nn.Module):
    """Whisper's encoder, tiny to large-v3-turbo, with the Hugging Face parameter names.

    config: the dictionary of a Whisper config.json. The sinusoidal positions are loaded and never train.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config, self.width, self.n_mels = config, config["d_model"], config["num_mel_bins"]
        heads, ffn = config["encoder_attention_heads"], config["encoder_ffn_dim"]
        self.conv1 = nn.Conv1d(self.n_mels, self.width, 3, padding=1)
        self.conv2 = nn.Conv1d(self.width, self.width, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config["max_source_positions"], self.width).requires_grad_(False)
        self.layers = nn.ModuleList(WhisperLayer(self.width, heads, ffn) for _ in range(config["encoder_layers"]))
        self.layer_norm = nn.LayerNorm(self.width)
        self.checkpoint_layers = False

    @classmethod
    def from_pretrained(cls, folder) -> "WhisperEncoder":
        """Read a Hugging Face Whisper folder (encoder alone or whole model), as float32."""
        config = read_config(folder, ("whisper",), "d_model", "encoder_layers", "encoder_attention_heads",
                             "encoder_ffn_dim", "num_mel_bins", "max_source_positions")
        if config.get("activation_function", "gelu") != "gelu":
            raise ValueError(f"{folder}/config.json: activation_function is {config['activation_function']!r}; "
                             "need 'gelu'")
        width, heads = config["d_model"], config["encoder_attention_heads"]
        if width % heads:
            raise ValueError(f"{folder}/config.json: {heads} heads do not divide d_model {width}")
        with torch.device("meta"):
            encoder = cls(config)
        tensors = {}
        for name, tensor in read_weights(folder).items():
            name = name.removeprefix("model.")
            if name.startswith("encoder."):
                tensors[name.removeprefix("encoder.")] = tensor.float()
        load_strictly(encoder, tensors, folder)
        return encoder

    def forward(self, mel: torch.Tensor, lengths: torch.Tensor | None = None, layer: int | None = None) -> torch.Tensor:
        """mel (B, M, F <= 3000), lengths (B,) real tokens of each clip (None: all) -> (B, T, D), T = ceil(F / 2).

        Tokens beyond a clip's length are not seen by the others, and come out as zeros. Keep `lengths` on the CPU:
        the choice whether to mask is then made without waiting for the device. `layer=n` gives the hidden state
        after n layers (without the last layer norm, unless n is the number of layers).
        """
        if layer is not None and not 0 <= layer <= len(self.layers):
            raise ValueError(f"layer is {layer}; this encoder has layers 0 to {len(self.layers)}")
        tokens = (mel.shape[-1] + 1) // 2
        if tokens > self.embed_positions.num_embeddings:
            raise ValueError(f"mel has {mel.shape[-1]} frames; at most {2 * self.embed_positions.num_embeddings} fit")
        keep = None
        if lengths is not None and bool((lengths < tokens).any()):
            keep = torch.arange(tokens) < lengths.cpu()[:, None]
            keep = keep.to(mel.device, non_blocking=True)  # (B, T)
            # conv1 looks one frame past a clip's end: to it, too, what follows is zero.
            mel = mel * keep.repeat_interleave(2, 1)[:, None, : mel.shape[-1]]
        x = F.gelu(self.conv1(mel))
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # (B, T, D)
        x = x + self.embed_positions.weight[:tokens]
        mask = None if keep is None else keep[:, None, None, :]
        for block in self.layers[:layer]:
            x = _run_layer(self, block, x, mask)
        if layer is None or layer == len(self.layers):
            x = self.layer_norm(x)
        return x if keep is None else x * keep[:, :, None]

    def encode(self, audio: torch.Tensor, samples: torch.Tensor, layer: int | None = None):
        """audio (B, S), zero beyond samples (B,) -> features (B, T, D), zero beyond lengths (B,) tokens on the CPU.

        Each clip is encoded at its own length; over 30 s in windows of 30 s, their tokens joined. S may be less than
        `samples`: silence follows.
        # assumption: the paper does not say whether it pads to 30 s, as Whisper does.
        """
        samples = samples.cpu()
        lengths = encoder_lengths(samples)  # (B,)
        b, windows = len(audio), max(1, -(-int(samples.max()) // WINDOW))
        audio = audio[:, : windows * WINDOW]
        if windows > 1:
            audio = F.pad(audio, (0, windows * WINDOW - audio.shape[1])).reshape(b * windows, WINDOW)
            first = torch.arange(windows) * (WINDOW // HOP // 2)  # each window's first token
            tokens = (lengths[:, None] - first).clamp(0, WINDOW // HOP // 2).flatten()  # (B * windows,)
            real = tokens.nonzero()[:, 0]
            audio, tokens = audio[real.to(audio.device)], tokens[real]
        else:
            tokens = lengths
        longest = int(tokens.max())
        audio = F.pad(audio, (0, max(0, 2 * HOP * longest - audio.shape[1])))
        mel = log_mel_spectrogram(audio, self.n_mels)[:, :, : 2 * longest]
        x = self(mel, tokens, layer)  # (windows in all, T, D)
        if windows > 1:
            joined = x.new_zeros(b * windows, *x.shape[1:])
            joined = joined.index_copy(0, real.to(x.device), x)
            x = joined.reshape(b, -1, x.shape[-1])[:, : int(lengths.max())]
        return x, lengths


def save_encoder(encoder: WhisperEncoder, folder, source=None) -> None:
    """Write a Hugging Face Whisper folder that transformers' WhisperModel loads as it is.

    source: the Whisper folder that training started from; all but the encoder (Whisper's own decoder, tokenizer,
    generation settings) is copied from it, so that the folder is a whole Whisper again.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.encoder.{k}": v.detach().cpu().contiguous() for k, v in encoder.state_dict().items()}
    if source is not None:
        for name, tensor in read_weights(source).items():
            name = name if name.startswith(("model.", "proj_out.")) else f"model.{name}"
            if not name.startswith("model.encoder."):
                tensors[name] = tensor.contiguous()
        for path in Path(source).glob("*"):
            if path.suffix in (".json", ".txt") and ".index." not in path.name and path.name != "config.json":
                shutil.copyfile(path, folder / path.name)  # not its mode: it may be read-only
    # transformers 5 calls it dtype, 4 torch_dtype
    config = encoder.config | {"model_type": "whisper", "dtype": "float32", "torch_dtype": "float32"}
    config.setdefault("architectures", ["WhisperForConditionalGeneration"])
    preprocessor = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": encoder.n_mels,
                    "sampling_rate": SAMPLE_RATE, "hop_length": HOP, "n_fft": N_FFT, "chunk_length": 30,
                    "n_samples": WINDOW, "nb_max_frames": WINDOW // HOP, "padding_side": "right", "padding_value": 0.0,
                    "return_attention_mask": False}
    try:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as e:  # no OSError, also when the disk is full
        raise OSError(f"cannot write {folder}/model.safetensors: {e}") from None
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if not (folder / "preprocessor_config.json").exists():
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


# ---------------------------------------------------------------- Qwen decoder

class QwenAttention(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        self.dim, bias = c["head_dim"], c["model_type"] == "qwen2"
        self.q_proj = nn.Linear(c["hidden_size"], c["num_attention_heads"] * self.dim, bias=bias)
        self.k_proj = nn.Linear(c["hidden_size"], c["num_key_value_heads"] * self.dim, bias=bias)
        self.v_proj = nn.Linear(c["hidden_size"], c["num_key_value_heads"] * self.dim, bias=bias)
        self.o_proj = nn.Linear(c["num_attention_heads"] * self.dim, c["hidden_size"], bias=False)
        self.groups = c["num_attention_heads"] // c["num_key_value_heads"]
        qwen3 = c["model_type"] == "qwen3"
        self.q_norm = nn.RMSNorm(self.dim, c["rms_norm_eps"]) if qwen3 else nn.Identity()
        self.k_norm = nn.RMSNorm(self.dim, c["rms_norm_eps"]) if qwen3 else nn.Identity()

    def forward(self, x, cos, sin, pack=None, out=None, past=None, mask=None, cache=None, positions=None):
        """x (N, D) as `pack` has it -> (n, D) as `out` has it; or with a cache (B, L, D) -> (B, L, D).

        past: keys and values (B, L, KV heads, D / H) with those of the prompts, which x lacks. cache: the same, x's are
        written there at `positions` (B, L), and seen as `mask` says.
        """
        q, k, v = (p(x).unflatten(-1, (-1, self.dim))
                   for p in (self.q_proj, self.k_proj, self.v_proj))  # (N or B, L, H, D / H)
        q, k = _rotate(self.q_norm(q), cos, sin), _rotate(self.k_norm(k), cos, sin)
        if pack is not None:
            past_k, past_v = past or (None, None)
            q, k, v = pack.unpack(q), pack.unpack(k, past_k), pack.unpack(v, past_v)  # (B, L, H, D / H)
        if cache is not None:  # write at `positions`, then look at all that is written
            rows = torch.arange(len(x), device=x.device)[:, None]
            for stored, new in zip(cache, (k, v)):
                stored[rows, positions] = new
            k, v = cache
        if self.groups > 1:
            k, v = k.repeat_interleave(self.groups, 2), v.repeat_interleave(self.groups, 2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = attend(q, k, v, mask, is_causal=mask is None)
        y = y.transpose(1, 2).flatten(2)  # (B, L, D)
        return self.o_proj(y if pack is None else out.pack(y))


class Pack:
    """Some tokens of rows (B, L), at `index` of the flat B * L, as one run (N):
    what works on single tokens skips the rest."""

    def __init__(self, index: torch.Tensor, shape: tuple[int, int]):
        self.index, self.shape = index, shape

    def pack(self, x):  # (B, L, ...) -> (N, ...)
        return x.flatten(0, 1).index_select(0, self.index)

    def unpack(self, x, rest=None):  # (N, ...) -> (B, L, ...), what is not packed from `rest` (B, L, ...), else zero
        rest = x.new_zeros(math.prod(self.shape), *x.shape[1:]) if rest is None else rest.flatten(0, 1)
        return rest.index_copy(0, self.index, x).unflatten(0, self.shape)


def _rotate(x, cos, sin):
    """Rotary positions: x (..., H, D / H), cos and sin (..., 1, D / H)."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


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
        self.self_attn, self.mlp = QwenAttention(c), QwenMLP(c)
        self.input_layernorm = nn.RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.post_attention_layernorm = nn.RMSNorm(c["hidden_size"], c["rms_norm_eps"])

    def forward(self, x, cos, sin, pack=None, out=None, past=None, mask=None, cache=None, positions=None):
        """x (N, D) as `pack` has it -> (n, D) as `out` has it; or with a cache (B, L, D) -> (B, L, D)."""
        y = self.self_attn(self.input_layernorm(x), cos, sin, pack, out, past, mask, cache, positions)
        x = (x if out is pack else out.pack(pack.unpack(x))) + y
        return x + self.mlp(self.post_attention_layernorm(x))


def _read_qwen_config(folder) -> dict:
    """Qwen's config.json with the defaults filled in; refuses what this decoder would compute differently."""
    c = read_config(folder, ("qwen2", "qwen3"), "hidden_size", "intermediate_size", "num_hidden_layers",
                    "num_attention_heads", "vocab_size")
    c.setdefault("num_key_value_heads", c["num_attention_heads"])
    c["head_dim"] = c.get("head_dim") or (128 if c["model_type"] == "qwen3"
                                          else c["hidden_size"] // c["num_attention_heads"])
    c.setdefault("rms_norm_eps", 1e-6)
    check_sizes(c, f"{folder}/config.json", "num_key_value_heads", "head_dim")
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{folder}/config.json: rope settings are {rope!r}; need an object")
    c["rope_theta"] = float(rope.get("rope_theta") or c.get("rope_theta") or 10_000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    for name, value, needed in (("rope type", kind, "default"), ("hidden_act", c.get("hidden_act", "silu"), "silu"),
                                ("use_sliding_window", bool(c.get("use_sliding_window")), False),
                                ("attention_bias", bool(c.get("attention_bias")) and c["model_type"] == "qwen3",
                                 False)):
        if value != needed:
            raise ValueError(f"{folder}/config.json: {name} is {value!r}; this decoder computes {needed!r} only")
    return c


class QwenDecoder(nn.Module):
    """Qwen2, Qwen2.5 and Qwen3 dense language models, frozen, with the Hugging Face parameter names.

    It computes in the dtype that it is loaded in, also under autocast: its weights never train, so casting them
    once is enough.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(QwenLayer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        self.checkpoint_layers = False

    @classmethod
    def from_pretrained(cls, folder, dtype: torch.dtype = torch.float32) -> "QwenDecoder":
        """Read a Hugging Face Qwen folder; every weight in `dtype`, none of them trainable."""
        config = _read_qwen_config(folder)
        with torch.device("meta"):
            decoder = cls(config)
        tensors = {k.removeprefix("model."): v.to(dtype) for k, v in read_weights(folder).items()}
        if config.get("tie_word_embeddings") and "embed_tokens.weight" in tensors:
            tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
        load_strictly(decoder, tensors, folder)
        if config.get("tie_word_embeddings"):
            decoder.lm_head.weight = decoder.embed_tokens.weight
        return decoder.requires_grad_(False).eval()

    def train(self, mode: bool = True):
        return super().train(False)  # the decoder never trains

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(ids)  # (B, L, D)

    def forward(self, embeds, lengths: torch.Tensor | None = None, prompts=None, only=None, cache=None, positions=None):
        """embeds (B, L, D) -> hidden (B, L, D), after the last norm. Causal; pad on the right.

        lengths (B,) on the CPU: padding beyond them is skipped, its hidden states are zero. prompts: ids that the rows
        begin with, all of them text; their keys and values come from `past`, their hidden states are zero. only (n,):
        positions in the flat B * L -> hidden (n, D) there alone, which saves most of the last layer. With `cache` (see
        new_cache) the L tokens stand at positions (B, L) of each row, and see what it holds up to there.
        """
        x = embeds.to(self.embed_tokens.weight.dtype)
        b, l = x.shape[:2]
        if cache is not None:
            mask = torch.arange(cache[0][0].shape[1], device=x.device) <= positions[:, None, :, None]  # (B, 1, L, K)
            how = [dict(mask=mask, cache=kept, positions=positions) for kept in cache]
        else:
            places, starts = torch.arange(l).expand(b, l), torch.tensor([[len(p)] for p in prompts or [[]] * b])
            keep = places >= starts if lengths is None else (places >= starts) & (places < lengths.cpu()[:, None])
            index, positions = keep.flatten().nonzero()[:, 0], places[keep]
            pack = Pack(index.to(x.device, non_blocking=True), (b, l))
            past = self.past(prompts, l) if prompts else [None] * len(self.layers)
            how = [dict(pack=pack, out=pack, past=p) for p in past]
            if only is not None:
                how[-1]["out"] = Pack(only, (b, l))
            x, positions = pack.pack(x), positions.to(x.device, non_blocking=True)  # (N, D), (N,)
        with torch.autocast(x.device.type, enabled=False):
            half = torch.arange(0, self.config["head_dim"], 2, device=x.device).float() / self.config["head_dim"]
            angles = positions[..., None].float() * self.config["rope_theta"] ** -half
            angles = torch.cat((angles, angles), -1)[..., None, :]  # (N or B, L, 1, D / H)
            cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
            for layer, more in zip(self.layers, how):
                x = _run_layer(self, layer, x, cos, sin, **more)
            x = self.norm(x)
        return x if cache is not None or only is not None else pack.unpack(x)

    @torch.no_grad()
    def past(self, prompts: list[list[int]], length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Every layer's keys and values of rows that begin with these ids: (B, length, kv heads, D / H) each.

        Nothing that trains reaches them: no gradient, and what several rows ask is computed once. Beyond a row's
        prompt they are of no meaning, and to be written over. (Kept for later batches they would save little more, and
        a resumed run, which computes them in other company, would not repeat the bits.)
        """
        number = {p: i for i, p in enumerate(dict.fromkeys(map(tuple, prompts)))}
        ids = nn.utils.rnn.pad_sequence(list(map(torch.tensor, number)), batch_first=True)
        ids = ids.to(self.embed_tokens.weight.device, non_blocking=True)
        cache, places = self.new_cache(len(number), length), torch.arange(ids.shape[1], device=ids.device)
        self(self.embed(ids), cache=cache, positions=places.expand(ids.shape))
        row = torch.tensor([number[tuple(p)] for p in prompts]).to(ids.device, non_blocking=True)
        return [(k[row], v[row]) for k, v in cache]

    def new_cache(self, batch: int, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Empty keys and values for every layer: (B, length, kv heads, D / H)."""
        w, c = self.embed_tokens.weight, self.config
        shape = (batch, length, c["num_key_value_heads"], c["head_dim"])
        return [(w.new_zeros(shape), w.new_zeros(shape)) for _ in self.layers]

    @torch.no_grad()
    def generate(self, embeds: torch.Tensor, lengths: torch.Tensor, max_new_tokens: int,
                 stop: set[int]) -> list[list[int]]:
        """Greedy continuation of right-padded prompts: embeds (B, L, D), lengths (B,)
        -> new ids, without the end token.

        A new token overwrites the cache's padding at its own position, so rows of any length stay right-padded.
        """
        b, l, _ = embeds.shape
        lengths = lengths.to(embeds.device)
        cache = self.new_cache(b, l + max_new_tokens)
        rows = torch.arange(b, device=embeds.device)
        start = torch.arange(l, device=embeds.device).expand(b, l)
        hidden = self(embeds, cache=cache, positions=start)[rows, lengths - 1]
        ends = torch.tensor(sorted(stop), device=embeds.device)
        ids, done = [], torch.zeros(b, dtype=torch.bool, device=embeds.device)
        for step in range(max_new_tokens):
            ids.append(self.lm_head(hidden).argmax(-1))  # (B,)
            done |= torch.isin(ids[-1], ends)
            if done.all() or step == max_new_tokens - 1:
                break
            hidden = self(self.embed(ids[-1][:, None]), cache=cache, positions=(lengths + step)[:, None])[:, 0]
        rows = torch.stack(ids, 1).tolist() if ids else [[] for _ in range(b)]
        return [row[: next((i for i, t in enumerate(row) if t in stop), len(row))] for row in rows]


# ---------------------------------------------------------------- prompt, joint model

class ChatTokenizer:
    """Qwen's tokenizer and chat template: instruction and answer to ids, tokenised apart and joined as ids.

    # assumption: the paper gives no prompt. Here: one user turn, the instruction before the audio; no system turn. So
    # the decoder's state up to the audio depends on nothing that trains, and need not be computed again in each step.
    """

    def __init__(self, tokenizer: Tokenizer, folder="tokenizer"):
        self.tokenizer = tokenizer
        missing = [t for t in ("<|im_start|>", "<|im_end|>") if tokenizer.token_to_id(t) is None]
        if missing:
            raise ValueError(f"{folder}: the tokenizer lacks the chat tokens {', '.join(missing)}; "
                             "take an instruct model's")
        self.end = tokenizer.token_to_id("<|im_end|>")
        self.stop = {self.end} | {i for i in [tokenizer.token_to_id("<|endoftext|>")] if i is not None}
        self.head = self._ids("<|im_start|>user\n")
        # Qwen3 answers at once, without thinking aloud, after an empty thought.
        thought = "<think>\n\n</think>\n\n" if tokenizer.token_to_id("<think>") is not None else ""
        # between the audio and the answer
        self.tail = self._ids("<|im_end|>\n<|im_start|>assistant\n" + thought)
        tokenizer.encode_special_tokens = True  # from here on: a text that spells a chat token is but text

    @classmethod
    def from_pretrained(cls, folder) -> "ChatTokenizer":
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; copy it from the model's page")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as e:  # tokenizers raises bare Exception
            raise ValueError(f"{path} is damaged ({e}); fetch it again") from None
        return cls(tokenizer, path)

    def _ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def prompt(self, instruction: str) -> list[int]:
        """Ids before the audio."""
        return self.head + self._ids(instruction + "\n")

    def answer(self, text: str) -> list[int]:
        return self._ids(text) + [self.end]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class AnswerLoss(torch.autograd.Function):
    """Cross entropy through a frozen lm_head: hidden (N, D), weight (V, D), next tokens (N,)
    -> loss of each (N,), float32.

    The gradient of the hidden states is made at once, while a piece's (n, V) logits are at hand: these are neither kept
    for backward nor computed again.
    """

    LOGITS_AT_ONCE = 1024  # positions whose logits are held at the same time
    SCALE = 1024  # fp16 would round small slopes to zero before the loss scale reaches them

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        losses, slopes = [], []
        for h, y in zip(hidden.split(AnswerLoss.LOGITS_AT_ONCE), labels.split(AnswerLoss.LOGITS_AT_ONCE)):
            logits = F.linear(h, weight).float()  # (n, V)
            total, y = logits.logsumexp(1, keepdim=True), y[:, None]
            losses.append((total - logits.gather(1, y))[:, 0])
            if ctx.needs_input_grad[0]:  # softmax - truth
                share = logits.sub_(total).exp_().scatter_add_(1, y, logits.new_full(y.shape, -1.0))
                slopes.append(share.mul_(AnswerLoss.SCALE).to(h.dtype) @ weight)
        ctx.save_for_backward(torch.cat(slopes) if slopes else None)
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        slopes, = ctx.saved_tensors
        return (grad[:, None] / AnswerLoss.SCALE * slopes).to(slopes.dtype), None, None


class UniWhisper(nn.Module):
    """Encoder and adapter, trained through a frozen decoder
    by next-token loss on the answers alone (paper, section 2)."""

    def __init__(self, encoder: WhisperEncoder, adapter: StackAdapter, decoder: QwenDecoder, tokenizer: ChatTokenizer):
        super().__init__()
        self.encoder, self.adapter, self.decoder, self.tokenizer = encoder, adapter, decoder, tokenizer
        decoder.requires_grad_(False).eval()

    @classmethod
    def from_folders(cls, encoder, decoder, stack: int = 4, dtype: torch.dtype = torch.float32,
                     adapter=None) -> "UniWhisper":
        """Pretrained encoder and decoder (in `dtype`), and an adapter: that of a checkpoint's folder, or else a new one
        that speaks at the scale of the decoder's tokens."""
        encoder, tokenizer = WhisperEncoder.from_pretrained(encoder), ChatTokenizer.from_pretrained(decoder)
        folder, decoder = decoder, QwenDecoder.from_pretrained(decoder, dtype)
        top, size = max(tokenizer.tokenizer.get_vocab().values()), decoder.config["vocab_size"]
        if top >= size:
            raise ValueError(f"{folder}: tokenizer.json has id {top}, config.json a vocabulary of {size}")
        rms = decoder.embed_tokens.weight.float().square().mean().sqrt().item()
        model = cls(encoder, StackAdapter(encoder.width, decoder.config["hidden_size"], stack, rms), decoder, tokenizer)
        if adapter is not None:
            load_strictly(model.adapter, read_weights(adapter), adapter)
        return model

    def encode(self, audio: torch.Tensor, samples: torch.Tensor):
        """audio (B, S), samples (B,) -> (features (B, T, D), lengths (B,)): see WhisperEncoder.encode."""
        return self.encoder.encode(audio, samples)

    def _embed_chat(self, audio, samples, prompts, answers):
        """Audio tokens spliced into the chat:
        (embeds (B, L, D), row lengths, flat positions that predict an answer token)."""
        features, lengths = self.encode(audio, samples)
        tokens = self.adapter(features)  # (B, A, D)
        lengths = self.adapter.lengths(lengths).tolist()
        tail, a = self.tokenizer.tail, tokens.shape[1]
        rows = [p + [0] * n + tail + y[:-1]  # the end token predicts nothing
                for n, p, y in zip(lengths, prompts, answers)]
        l = max(map(len, rows))
        ids = torch.tensor([row + [0] * (l - len(row)) for row in rows])
        # Flat indices, made on the CPU, where all lengths are known: nothing waits for the device.
        source = torch.cat([torch.arange(n) + b * a for b, n in enumerate(lengths)])
        target = torch.cat([torch.arange(n) + b * l + len(p) for b, (n, p) in enumerate(zip(lengths, prompts))])
        predict = torch.cat([torch.arange(len(row) - len(y), len(row)) + b * l
                             for b, (row, y) in enumerate(zip(rows, answers))])
        ids, source, target, predict = (t.to(audio.device, non_blocking=True) for t in (ids, source, target, predict))
        embeds = self.decoder.embed(ids)
        spoken = tokens.flatten(0, 1).index_select(0, source).to(embeds.dtype)
        embeds = embeds.flatten(0, 1).index_copy(0, target, spoken).view(embeds.shape)
        return embeds, torch.tensor([len(row) for row in rows]), predict

    def forward(self, batch, per_row: bool = False):
        """batch (audio (B, S), samples (B,), prompts and answers as ids) -> (loss_sum, answer_tokens).

        Both are sums over the batch, or with `per_row` (B,) sums of each clip. lm_head sees the answer positions
        alone: the (B, L, V) logits never exist.
        """
        embeds, lengths, predict = self._embed_chat(batch.audio, batch.samples, batch.prompts, batch.answers)
        hidden = self.decoder(embeds, lengths, batch.prompts, predict)  # (answer tokens, D)
        labels = torch.tensor([i for y in batch.answers for i in y]).to(hidden.device, non_blocking=True)
        with torch.autocast(hidden.device.type, enabled=False):
            losses = AnswerLoss.apply(hidden, self.decoder.lm_head.weight, labels)
        tokens = torch.tensor([len(y) for y in batch.answers])
        if not per_row:
            return losses.sum(), int(tokens.sum())
        row = torch.arange(len(tokens)).repeat_interleave(tokens).to(losses.device, non_blocking=True)
        return losses.new_zeros(len(tokens)).index_add(0, row, losses), tokens

    @torch.no_grad()
    def generate(self, audio: torch.Tensor, instructions: list[str], max_new_tokens: int = 64,
                 samples=None) -> list[str]:
        """Greedy answers about clips: audio (B, S), samples (B,) (None: all S are real) -> B texts."""
        samples = torch.full((len(audio),), audio.shape[1]) if samples is None else samples
        prompts = [self.tokenizer.prompt(i) for i in instructions]
        embeds, lengths, _ = self._embed_chat(audio, samples, prompts, [[]] * len(prompts))
        return [self.tokenizer.decode(ids) for ids in
                self.decoder.generate(embeds, lengths, max_new_tokens, self.tokenizer.stop)]


# ---------------------------------------------------------------- runs and command line

def newest_checkpoint(run) -> Path | None:
    """The last finished checkpoint folder of a run (only whole ones carry such a name), or None."""
    return max(Path(run, "checkpoints").glob("step-" + 8 * "[0-9]"), default=None)


def _open_run(run) -> tuple[dict, Path]:
    """A run's settings and its newest checkpoint."""
    settings, newest = Path(run) / "config.json", newest_checkpoint(run)
    if not settings.is_file() or newest is None:
        raise FileNotFoundError(f"{run}: no config.json with a finished checkpoint; give --out of a training run")
    return read_json(settings, "encoder", "decoder", "stack"), newest


def load_run(run, dtype: torch.dtype = torch.float32) -> UniWhisper:
    """The model of a run's newest checkpoint: its encoder and adapter, and the decoder that its config.json names."""
    settings, newest = _open_run(run)
    return UniWhisper.from_folders(newest / "encoder", settings["decoder"], settings["stack"], dtype,
                                   newest / "adapter").eval()


def blend_encoders(start: WhisperEncoder, trained: WhisperEncoder, share: float) -> None:
    """Move `trained` to (1 - share) * start + share * trained, in place: a cheap guard against forgetting."""
    with torch.no_grad():
        for a, b in zip(start.parameters(), trained.parameters(), strict=True):
            b.lerp_(a, 1 - share)


def _encode(args):
    from data import read_audio  # the only thing borrowed from data.py, for the command line alone

    encoder, features = WhisperEncoder.from_pretrained(args.encoder).eval(), {}
    with torch.inference_mode():
        for path in dict.fromkeys(args.audio):
            audio = read_audio(path)
            features[path] = encoder.encode(audio[None], torch.tensor([len(audio)]))[0][0].contiguous()
            print(f"{path}: {tuple(features[path].shape)}")
    save_file(features, args.out)


def _ask(args):
    from data import read_audio

    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {args.max_new_tokens}; it must be above 0")
    audio = read_audio(args.audio)
    print(load_run(args.run).generate(audio[None], [args.question], args.max_new_tokens)[0])


def _export(args):
    settings, newest = _open_run(args.run)
    source = settings["encoder"]
    encoder = WhisperEncoder.from_pretrained(newest / "encoder")
    if not 0 <= args.blend <= 1:
        raise ValueError(f"--blend is {args.blend:g}; it must be from 0 to 1")
    if args.blend != 1:
        blend_encoders(WhisperEncoder.from_pretrained(source), encoder, args.blend)
    save_encoder(encoder, args.folder, source)
    print(f"{args.folder}: encoder of {newest}"
          + (f", blended {args.blend:g} with {source}" if args.blend != 1 else ""))


def main():
    """What a user can cause ends in one line and exit code 1."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(required=True)
    e = sub.add_parser("encode", help="audio files -> features of shape (T, D), 20 ms a token, in one safetensors file")
    e.add_argument("audio", nargs="+")
    e.add_argument("--encoder", required=True, help="Whisper folder, or OUT/encoder of a run")
    e.add_argument("--out", required=True, help="safetensors file; the keys are the audio paths as given")
    e.set_defaults(do=_encode)
    a = sub.add_parser("ask", help="answer a question about a clip")
    a.add_argument("audio")
    a.add_argument("question")
    a.add_argument("--run", required=True, help="--out of a training run")
    a.add_argument("--max-new-tokens", type=int, default=64)
    a.set_defaults(do=_ask)
    x = sub.add_parser("export", help="a run's newest encoder as a Hugging Face Whisper folder")
    x.add_argument("folder")
    x.add_argument("--run", required=True, help="--out of a training run")
    x.add_argument("--blend", type=float, default=1.0, help="1: the trained encoder; 0: the one it started from")
    x.set_defaults(do=_export)
    args = p.parse_args()
    try:
        args.do(args)
    except (OSError, ValueError, SafetensorError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
