"""UniWhisper (arXiv 2602.21772): an audio encoder trained through a frozen decoder.

    python uniwhisper.py encode A.wav B.flac --encoder DIR --out F.safetensors
    python uniwhisper.py ask A.wav "Which instrument?" --run OUT
    python uniwhisper.py transcribe A.wav B.wav --encoder DIR [--language nl]
    python uniwhisper.py export --run OUT DIR [--blend 0.5]

Shapes: B clips, S samples, F mel frames (10 ms), T encoder tokens (Whisper's: 20 ms),
A audio tokens after the adapter, L decoder positions, N answer tokens of a batch,
H heads, D width, V vocabulary.
"""
import argparse
import importlib.util
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

# By its path: a benchmark may have an `adapter` of its own where Python looks first.
spec = importlib.util.spec_from_file_location("uniwhisper_adapter",
                                              Path(__file__).with_name("adapter.py"))
adapters = importlib.util.module_from_spec(spec)
spec.loader.exec_module(adapters)

SAMPLE_RATE = 16_000
N_FFT = 400  # samples: windows of 25 ms
HOP = 160  # samples: a frame every 10 ms
TOKEN = 2 * HOP  # samples: an encoder token every 20 ms
CHUNK = 30 * SAMPLE_RATE  # samples: the 30 s that Whisper pads every clip to
# In a config.json: transformers 5 calls it dtype, 4 torch_dtype.
FLOAT32 = {"dtype": "float32", "torch_dtype": "float32"}
SECONDS_AT_ONCE = 240  # of audio that an encoder takes at one time, without a gradient
RUNAWAY = 32  # tokens: a cycle of up to 8 that fills so many is no speech
WINDOWS = 16  # of up to 30 s each, transcribed at one time
LOGITS_AT_ONCE = 1024  # answer tokens with logits (N, V) at one time


# ---------------------------------------------------------------- log-mel

@lru_cache(maxsize=8)
def mel_filters(n_mels: int, device, n_fft: int, rate: int, lowest: int, highest: int):
    """Slaney's triangles of equal area: (n_fft / 2 + 1, n_mels).

    They reach from `lowest`, below 1,000 Hz, to `highest`, above it.
    """
    # Slaney's scale is linear up to 1 kHz, which is mel 15, and logarithmic above.
    step = math.log(6.4) / 27
    first, last = lowest * 3 / 200, 15 + math.log(highest / 1000) / step
    mel = torch.linspace(first, last, n_mels + 2, dtype=torch.float64)
    hz = torch.where(mel < 15, mel * 200 / 3, 1000 * ((mel - 15) * step).exp())
    low, middle, high = hz[:-2], hz[1:-1], hz[2:]
    bins = torch.linspace(0, rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    rising = (bins[:, None] - low) / (middle - low)
    falling = (high - bins[:, None]) / (high - middle)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * 2 / (high - low)).float().to(device)


def log_mel(windows, n_mels: int, rate: int, lowest: int, highest: int):
    """Windows of audio (B, F, n_fft) -> log10 of power (B, F, n_mels)."""
    n_fft, device = windows.shape[-1], windows.device
    spectrum = torch.fft.rfft(windows * torch.hann_window(n_fft, device=device))
    power = spectrum.real.square() + spectrum.imag.square()  # (B, F, n_fft / 2 + 1)
    with torch.autocast(device.type, enabled=False):
        mel = power @ mel_filters(n_mels, device, n_fft, rate, lowest, highest)
    return mel.clamp(min=1e-10).log10()


@torch.no_grad()
def log_mel_spectrogram(audio, n_mels: int = 80):
    """Whisper's input: audio (B, S) -> (B, n_mels, F), F = S // 160, at least 1.

    The frames are Whisper's of the clip padded with zeros to 30 s,
    without computing the rest. The floor lies 8 (log10) below the
    clip's own maximum: neither more zeros nor a loud clip in the
    same batch changes a frame.
    """
    frames = max(1, audio.shape[-1] // HOP)
    # One window of zeros is enough: further ones give equal frames. A clip of 30 s gets none
    # and is mirrored at its end, as in Whisper.
    audio = F.pad(audio, (0, max(0, min(N_FFT, CHUNK - audio.shape[-1]))))
    audio = F.pad(audio[:, None], (N_FFT // 2, N_FFT // 2), mode="reflect")[:, 0]
    windows = audio.unfold(-1, N_FFT, HOP)  # (B, F', N_FFT)
    if audio.shape[-1] >= CHUNK:
        windows = windows[:, :-1]  # Whisper drops the last frame
    mel = log_mel(windows, n_mels, SAMPLE_RATE, 0, SAMPLE_RATE // 2)  # (B, F', n_mels)
    floor = mel.amax((1, 2), keepdim=True) - 8
    mel = (mel[:, :frames].maximum(floor) + 4) / 4
    return mel.transpose(1, 2)


def encoder_lengths(samples, token: int = TOKEN):
    """Samples (int or tensor) -> encoder tokens, at least one.

    A token has `token` samples; at least half of the last is audio.
    """
    tokens = (samples + token // 2) // token
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


def read_ids(path, key: str, vocabulary: int) -> list[int]:
    """A JSON file's list of ids; as in transformers, others than the vocabulary's are ignored."""
    ids = read_json(path).get(key) or []
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise ValueError(f"{path}: {key} is {ids!r}; need a list of ids")
    return [i for i in ids if 0 <= i < vocabulary]


def check_values(config: dict, folder, **needed) -> None:
    """Refuse a value that this code does not compute; a missing one passes."""
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
    """A safetensors file that others may read, too; makes its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as e:  # no OSError, also when the disk is full
        raise OSError(f"cannot write {path}: {e}") from None
    Path(path).chmod(0o644)  # safetensors makes it private


def copy_texts(source, folder) -> None:
    """A folder's tokenizer, configs and so on: all but the weights."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path in [*Path(source).glob("*.json"), *Path(source).glob("*.txt")]:
        if ".index." not in path.name:
            shutil.copyfile(path, Path(folder, path.name))  # without its mode


def run_layer(layer, recompute: bool, *inputs):
    """layer(*inputs); recompute: backward makes its activations again."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)


# ---------------------------------------------------------------- what encoders share

def token_mask(lengths, tokens=None):
    """lengths (B,) -> which tokens are real: (B, T) bool.

    tokens: T; None: the longest length.
    """
    tokens = int(lengths.max()) if tokens is None else tokens
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]


def mean_over_tokens(features, lengths):
    """features (B, T, D), zero beyond lengths (B,) -> (B, D), float32."""
    return features.float().sum(1) / lengths[:, None].to(features.device)


def check_audio(audio, samples):
    """Audio and samples as a user may give them -> as `encode` needs them.

    Raises ValueError.
    """
    if not audio.is_floating_point():
        raise ValueError(f"audio is {audio.dtype}; need floats from -1 to 1")
    if audio.dim() == 1:
        audio = audio[None]
    if audio.dim() != 2:
        raise ValueError(f"audio has shape {tuple(audio.shape)}; need (B, S), or (S,)")
    if samples is None:
        samples = torch.full((len(audio),), audio.shape[1])
    return audio.float(), samples.cpu()


class Encoder(nn.Module):
    """Audio of any length -> features, window by window.

    A subclass has sample_rate, width, token_samples (of a token), window (tokens), config,
    layers, checkpoint_layers, encode_window, keep_layers, from_pretrained and save.
    """

    @property
    def token_seconds(self) -> float:
        return self.token_samples / self.sample_rate

    def lengths(self, samples):
        """Samples (int or tensor) -> tokens."""
        return encoder_lengths(samples, self.token_samples)

    def encode(self, audio, samples=None, pad_to_window: bool = False):
        """audio (B, S), zero beyond samples (B,) -> (features (B, T, D), lengths (B,)).

        Features are 0 beyond `lengths` (tokens, on the CPU). Audio is of any float type;
        one clip may be (S,). samples None: all of S. If audio ends before `samples`,
        zeros are appended. A clip over a window (Whisper's: 30 s) is encoded in
        windows, each by itself; their tokens are joined.
        pad_to_window: the encoder also sees silence up to the window's end, as Whisper
        did in training; the features are the clip's own tokens.
        # assumption: the paper does not say whether it pads to 30 s.
        """
        audio, samples = check_audio(audio, samples)
        lengths = self.lengths(samples)  # (B,)
        size = self.window * self.token_samples
        if pad_to_window:
            samples = (lengths + self.window - 1) // self.window * size
        seen = self.lengths(samples)  # tokens
        most, features = int(seen.max()), None
        for first in range(0, most, self.window):
            inside = (seen > first).nonzero()[:, 0]  # clips that reach into this window
            start = first * self.token_samples
            for clips in self.pieces(inside, min(most - first, self.window)):
                index = clips.to(audio.device)
                piece = audio[index, start : start + size]
                x = self.encode_window(piece, (samples[clips] - start).clamp(max=size))
                if features is None:
                    features = x.new_zeros(len(audio), most, self.width)
                features[:, first : first + x.shape[1]].index_copy_(0, index, x)
        features = features[:, : int(lengths.max())]
        if pad_to_window:
            features = features * token_mask(lengths)[:, :, None].to(features.device)
        return features, lengths

    def pieces(self, clips, tokens: int):
        """Clips of a window, up to `tokens` long, in pieces of bounded memory."""
        if torch.is_grad_enabled():  # backward needs all of them
            return [clips]
        longest = tokens * self.token_seconds
        return clips.split(max(1, int(SECONDS_AT_ONCE / longest)))

    def pooled(self, audio, samples=None, pad_to_window: bool = False):
        """The mean over a clip's real tokens: (B, D), float32; see `encode`."""
        return mean_over_tokens(*self.encode(audio, samples, pad_to_window))


# ---------------------------------------------------------------- Whisper's encoder

WHISPER_SIZES = {
    "encoder": ("d_model", "encoder_attention_heads", "encoder_layers", "encoder_ffn_dim",
                "num_mel_bins", "max_source_positions"),
    "decoder": ("d_model", "decoder_attention_heads", "decoder_layers", "decoder_ffn_dim",
                "vocab_size", "max_target_positions")}


def read_whisper_config(folder, side: str) -> dict:
    """Whisper's config.json, checked for its encoder or its decoder."""
    c = read_config(folder, ("whisper",))
    check_sizes(c, folder, *WHISPER_SIZES[side])
    check_values(c, folder, activation_function="gelu")
    if c["d_model"] % c[f"{side}_attention_heads"]:
        raise bad_config(folder, "d_model", c["d_model"], "a multiple of the heads")
    return c


class WhisperAttention(nn.Module):
    """Multi-head attention: the encoder's, the decoder's causal one, and that to the audio."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def keys_values(self, x):
        """x (B, T, D) -> keys and values, (B, H, T, D / H) each."""
        return self.split(self.k_proj(x)), self.split(self.v_proj(x))

    def forward(self, x, keys_values, mask=None, causal: bool = False):
        """x (B, L, D) attends to `keys_values` where mask is True -> (B, L, D)."""
        q = self.split(self.q_proj(x))  # (B, H, L, D / H)
        y = F.scaled_dot_product_attention(q, *keys_values, mask, is_causal=causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))

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
        y = self.self_attn_layer_norm(x)
        x = x + self.self_attn(y, self.self_attn.keys_values(y), mask)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class WhisperEncoder(Encoder):
    """Whisper's encoder, tiny to large-v3-turbo, with Hugging Face's parameter names.

    config: a Whisper config.json. The sinusoidal positions never train.
    """

    sample_rate, token_samples = SAMPLE_RATE, TOKEN

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
        config = read_whisper_config(folder, "encoder")
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
            real = token_mask(lengths.cpu(), tokens)  # (B, T)
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

    def encode_window(self, audio, samples):
        """audio (B, S) and samples (B,) of one window -> (B, T, D)."""
        lengths = self.lengths(samples)
        tokens = int(lengths.max())
        audio = F.pad(audio, (0, max(0, tokens * TOKEN - audio.shape[1])))
        mel = log_mel_spectrogram(audio, self.n_mels)
        return self(mel[:, :, : 2 * tokens], lengths)

    def save(self, folder, source=None) -> None:
        """Write a Whisper folder for Hugging Face transformers.

        source: where training started; its decoder, tokenizer and so on are copied.
        """
        folder, config, tensors = Path(folder), self.config, {}
        for name, tensor in self.state_dict().items():
            tensors[f"model.encoder.{name}"] = tensor.cpu()
        if source is not None:
            for name, tensor in read_weights(source).items():
                if not name.startswith(("model.", "proj_out.")):
                    name = f"model.{name}"
                tensors.setdefault(name, tensor)
            copy_texts(source, folder)
            config = read_json(Path(source, "config.json"))
            for key in WHISPER_SIZES["encoder"]:  # others may be those of another decoder
                config[key] = self.config[key]
        write_tensors(tensors, folder / "model.safetensors")
        config = {"architectures": ["WhisperForConditionalGeneration"], **config,
                  "model_type": "whisper", **FLOAT32}
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        mel = {"feature_extractor_type": "WhisperFeatureExtractor",
               "feature_size": self.n_mels}
        path = folder / "preprocessor_config.json"
        if not path.exists() or read_json(path).get("feature_size") != self.n_mels:
            path.write_text(json.dumps(mel))


# ---------------------------------------------------------------- CLAP's encoder

# What LAION's unfused CLAPs hear, as transformers names it.
CLAP_SOUND = {"sampling_rate": 48_000, "max_length_s": 10, "padding": "repeatpad",
              "truncation": "rand_trunc", "fft_window_size": 1024, "hop_length": 480,
              "feature_size": 64, "frequency_min": 50, "frequency_max": 14_000}


@torch.no_grad()
def clap_mel(audio):
    """CLAP's input, in dB: audio (B, S) at 48 kHz -> (B, 1, F, 64), F = S // 480 + 1."""
    audio = F.pad(audio[:, None], (512, 512), mode="reflect")[:, 0]
    mel = log_mel(audio.unfold(-1, 1024, 480), 64, 48_000, 50, 14_000)
    return 10 * mel[:, None]


def read_clap_config(folder) -> dict:
    """CLAP's audio_config; refuses what is not computed here."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = Path(folder, name)
        sound = read_json(path) if path.exists() else {}
        sound = sound.get("feature_extractor", sound)
        for key, need in CLAP_SOUND.items():
            if sound.get(key, need) != need:
                raise ValueError(f"{path}: {key} is {sound[key]!r}; need {need!r}")
    config = read_config(folder, ("clap", "clap_audio_model"))
    config = config.get("audio_config", config)
    check_values(config, folder, enable_fusion=False, num_mel_bins=64, spec_size=256)
    return config


class ClapEncoder(Encoder):
    """CLAP's encoder of audio, HTS-AT, as transformers computes it.

    Its last grid has two bins of frequency at each of 32 steps of time.
    A token is the mean over both: each has a time of its own, 0.3125 s,
    and the mean over tokens is what CLAP compares with texts.
    It is never in training mode: BatchNorm takes no statistics of a batch,
    and without dropout a resumed run repeats its bits.
    """

    sample_rate = 48_000

    def __init__(self, config: dict):
        super().__init__()
        from transformers import ClapAudioConfig, ClapAudioModel

        self.config = config
        self.audio_encoder = ClapAudioModel(ClapAudioConfig(**config)).audio_encoder
        self.checkpoint_layers = False
        self.keep_layers(len(self.layers))
        self.eval()

    @classmethod
    def from_pretrained(cls, folder) -> "ClapEncoder":
        """Read a folder of ClapModel or ClapAudioModel, as float32."""
        config = read_clap_config(folder)
        try:
            encoder = cls(config)
        except ImportError:
            raise ValueError("CLAP needs transformers: pip install transformers") from None
        except Exception as e:  # transformers raises an error class of its own
            raise bad_file(Path(folder, "config.json"), " ".join(str(e).split())) from None
        tensors = {}
        for name, tensor in read_weights(folder).items():
            name = name.removeprefix("audio_model.")
            if name.startswith("audio_encoder."):
                tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
        load_strictly(encoder, tensors, folder)
        return encoder

    @property
    def layers(self) -> nn.ModuleList:
        return self.audio_encoder.layers

    def keep_layers(self, count: int) -> None:
        """Keep the first `count` stages; the last norm stays only with all."""
        model, stages = self.audio_encoder, len(self.layers)
        if not 0 <= count <= stages:
            raise ValueError(f"layer is {count}; this encoder has layers 0 to {stages}")
        if count < stages:
            model.layers, model.norm = model.layers[:count], nn.Identity()
        # Behind each stage but the last the grid is half as fine and twice as wide.
        halvings = min(count, stages - 1)
        self.width = model.patch_embed.proj.out_channels * 2**halvings
        self.window = model.input_resolutions[halvings][1] * model.freq_ratio  # tokens
        self.token_samples = 10 * self.sample_rate // self.window

    def train(self, mode: bool = True):
        return super().train(False)

    def pieces(self, clips, tokens: int):
        return super().pieces(clips, self.window)  # a short clip takes as much memory

    def forward(self, mel):
        """mel (B, 1, F, 64) of 10 s -> (B, T, D)."""
        model = self.audio_encoder
        mel = model.batch_norm(mel.transpose(1, 3)).transpose(1, 3)
        x = model.patch_embed(model.reshape_mel2img(mel))  # (B, height * width, D)
        for stage, grid in zip(self.layers, model.input_resolutions):
            x = run_layer(stage, self.checkpoint_layers, x, grid)[0]
        # Rows of the grid: stretches of time, one below the other, each with its bins of
        # frequency. Columns: the time steps of a stretch.
        pieces, width = model.freq_ratio, self.window // model.freq_ratio
        x = model.norm(x).unflatten(1, (pieces, -1, width))
        return x.mean(2).flatten(1, 2)

    def encode_window(self, audio, samples):
        """audio (B, S) and samples (B,) of one window -> (B, T, D)."""
        size, clips = 10 * self.sample_rate, []
        for clip, n in zip(audio, samples.clamp(min=1).tolist()):
            # CLAP hears a short clip as often as it fits into 10 s, then silence.
            clip = F.pad(clip[:n], (0, max(0, n - len(clip)))).repeat(size // n)
            clips.append(F.pad(clip, (0, size - len(clip))))
        real = token_mask(self.lengths(samples))  # (B, T)
        x = self(clap_mel(torch.stack(clips)))[:, : real.shape[1]]
        return x * real[:, :, None].to(x.device, non_blocking=True)

    def save(self, folder, source=None) -> None:
        """Write a folder for transformers, of the kind that `source` is.

        source: where training started; its text side and so on are copied.
        Without, the folder is a ClapAudioModel's.
        """
        folder = Path(folder)
        tensors = {name: tensor.cpu() for name, tensor in self.state_dict().items()}
        config = {"architectures": ["ClapAudioModel"], **self.config,
                  "model_type": "clap_audio_model"}
        if source is not None:
            copy_texts(source, folder)
            config = read_json(Path(source, "config.json"))
            trained, tensors = tensors, read_weights(source)
            for name, old in tensors.items():
                tensors[name] = trained.get(name.removeprefix("audio_model."), old)
        write_tensors(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config | FLOAT32, indent=2))


def load_encoder(folder) -> Encoder:
    """The encoder of a folder, by its config.json's model_type."""
    kind = read_config(folder, ("whisper", "clap", "clap_audio_model"))["model_type"]
    encoder = WhisperEncoder if kind == "whisper" else ClapEncoder
    return encoder.from_pretrained(folder)


# ---------------------------------------------------------------- what decoders share

class KVCache:
    """A layer's keys and values in generation: (B, KV heads, length, D / H)."""

    def __init__(self, shape: tuple[int, ...], like: Tensor):
        self.k = like.new_zeros(shape)
        self.v = like.new_zeros(shape)

    def write(self, k, v, positions):
        """Put k, v (B, KV heads, L, D / H) at positions (B, L).

        Returns all k, all v, and which of them each token sees (B, 1, L, length).
        """
        clips = torch.arange(len(k), device=k.device)[:, None]
        self.k[clips, :, positions] = k.transpose(1, 2).to(self.k.dtype)
        self.v[clips, :, positions] = v.transpose(1, 2).to(self.v.dtype)
        places = torch.arange(self.k.shape[2], device=k.device)
        return self.k, self.v, places <= positions[:, None, :, None]


class TextTokenizer:
    """A folder's tokenizer.json.

    A subclass names special tokens that it `NEEDS`, and the `REMEDY` if one is missing.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        # What a saved tokenizer may carry along would change the ids of an answer.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if hasattr(tokenizer.model, "dropout"):
            tokenizer.model.dropout = None

    @classmethod
    def from_pretrained(cls, folder):
        path = Path(folder, "tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as e:  # tokenizers raises bare Exception
            raise bad_file(path, e) from None
        for token in cls.NEEDS:
            if tokenizer.token_to_id(token) is None:
                raise ValueError(f"{path} lacks the token {token}; {cls.REMEDY}")
        return cls(tokenizer)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class Decoder(nn.Module):
    """What Qwen's and Whisper's decoder share: folders, dtype, head, greedy loop.

    A frozen one computes in the dtype it is loaded in, also under autocast: no step
    casts its weights. One that trains is float32, under autocast as an encoder is.
    A subclass has TOKENIZER (a class), PREFIX (of its parameters' names in a file), layers,
    kv_heads (number, width of each), read_config, audio_rms (the scale of the audio that it
    takes) and, for audio (B, A, D), lengths (B,) on the CPU, prompts and answers as B lists of
    ids:
    answer_states(audio, lengths, prompts, answers) -> (N, D), which predict the answer tokens,
    one clip after the other;
    generate(audio, lengths, prompts, max_new_tokens) -> greedy answers, B lists of ids without
    the end token.
    """

    def __init__(self, config: dict, tokenizer, width: int):
        super().__init__()
        self.config, self.tokenizer, self.width = config, tokenizer, width
        self.embed_tokens = nn.Embedding(config["vocab_size"], width)
        self.lm_head = nn.Linear(width, config["vocab_size"], bias=False)
        self.checkpoint_layers = False

    @classmethod
    def from_pretrained(cls, folder, dtype: torch.dtype = torch.float32):
        """Read a Hugging Face folder; every weight in `dtype`, none trainable."""
        config = cls.read_config(folder)
        tokenizer = cls.TOKENIZER.from_pretrained(folder)
        largest = max(tokenizer.tokenizer.get_vocab().values())
        if largest >= config["vocab_size"]:
            raise bad_config(folder, "vocab_size", config["vocab_size"],
                             f"more than tokenizer.json's largest id, {largest}")
        with torch.device("meta"):
            decoder = cls(config, tokenizer)
        tensors = {}
        for name, tensor in read_weights(folder).items():
            name = name.removeprefix("model.").removeprefix("decoder.")
            if not name.startswith(("encoder.", "proj_out.")):  # Whisper's
                tensors[name] = tensor.to(dtype)
        tied = config.get("tie_word_embeddings")
        if tied and "embed_tokens.weight" in tensors:
            tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
        load_strictly(decoder, tensors, folder)
        if tied:  # one parameter, not only equal numbers
            decoder.lm_head.weight = decoder.embed_tokens.weight
        return decoder.requires_grad_(False).eval()

    def save(self, folder, source) -> None:
        """Write a Hugging Face folder; source: what it was loaded from, for the rest."""
        copy_texts(source, folder)
        tensors = {}
        for name, p in self.named_parameters():  # where it is tied, without a head
            prefix = "" if name.startswith("lm_head.") else self.PREFIX
            tensors[prefix + name] = p.detach().cpu()
        write_tensors(tensors, Path(folder, "model.safetensors"))
        config = read_json(Path(source, "config.json")) | FLOAT32
        Path(folder, "config.json").write_text(json.dumps(config, indent=2))

    def train(self, mode: bool = True):
        return super().train(False)  # no dropout here, whether it trains or not

    def autocast(self, device: torch.device):
        trains = self.lm_head.weight.requires_grad
        on = trains and torch.is_autocast_enabled(device.type)
        return torch.autocast(device.type, enabled=on)

    def unembed(self, states):
        """states (N, D) -> logits (N, V)."""
        with self.autocast(states.device):
            return self.lm_head(states)

    @torch.no_grad()
    def greedy(self, read, embeds, chats: list[list[int]], max_new_tokens: int,
               transcript: bool = False):
        """Greedy answers to chats as lists of ids, without the end token.

        embeds (B, L, D): of the chats; read(embeds, caches, positions) -> states.
        transcript: what Whisper suppresses is never chosen, and an answer also ends where
        `repeated` finds a cycle.
        """
        clips, length, _ = embeds.shape
        heads, width = self.kv_heads
        shape = clips, heads, length + max_new_tokens, width
        caches = [KVCache(shape, self.embed_tokens.weight) for _ in self.layers]
        positions = torch.arange(length, device=embeds.device).expand(clips, length)
        states = read(embeds, caches, positions)
        ends = torch.tensor([len(chat) for chat in chats], device=embeds.device)  # (B,)
        states = states[torch.arange(clips, device=embeds.device), ends - 1]  # (B, D)
        answers = [[] for _ in chats]
        running = set(range(clips))
        for step in range(max_new_tokens):
            logits = self.unembed(states)  # (B, V)
            if transcript:
                logits[:, self.suppressed] = -math.inf
                if step == 0:
                    logits[:, self.suppressed_first] = -math.inf
            new = logits.argmax(-1)  # (B,)
            for clip, token in enumerate(new.tolist()):
                if token in self.tokenizer.stop:
                    running.discard(clip)
                if clip in running:
                    answers[clip].append(token)
                    if transcript and repeated(answers[clip]):
                        running.discard(clip)
            if not running:
                break
            # Behind the chat's last token, over the padding.
            positions = (ends + step)[:, None]  # (B, 1)
            states = read(self.embed_tokens(new[:, None]), caches, positions)[:, 0]
        return answers


def repeated(ids: list[int]) -> int:
    """The length, 1 to 8, of a cycle that fills the last 32 ids; 0 if there is none."""
    tail = ids[-RUNAWAY:]
    for length in range(1, 9):
        if len(tail) == RUNAWAY and tail[length:] == tail[:-length]:
            return length
    return 0


def pad_ids(chats: list[list[int]]):
    """Lists of ids -> (B, L) on the CPU, zeros on the right."""
    ids = [torch.tensor(chat) for chat in chats]
    return nn.utils.rnn.pad_sequence(ids, batch_first=True)


def predicting(chats: list[list[int]], answers: list[list[int]]):
    """Which positions (B, L) predict an answer's tokens; a chat ends with all but its last."""
    predicts = torch.zeros(len(chats), max(map(len, chats)), dtype=torch.bool)
    for i, (chat, answer) in enumerate(zip(chats, answers)):
        # The token before the answer predicts its first token, and so on.
        predicts[i, len(chat) - len(answer) : len(chat)] = True
    return predicts


# ---------------------------------------------------------------- Qwen's decoder

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
            k, v, seen = cache.write(k, v, positions)
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


class ChatTokenizer(TextTokenizer):
    """Qwen's tokenizer and chat; instruction and answer are tokenised apart.

    # assumption: the paper gives no prompt. Here: one user turn, instruction before audio.
    """

    NEEDS = "<|im_start|>", "<|im_end|>"
    REMEDY = "take an instruct model's"

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer)
        self.end = tokenizer.token_to_id("<|im_end|>")  # ends an answer
        self.stop = {self.end, tokenizer.token_to_id("<|endoftext|>")} - {None}
        self.head = self.ids("<|im_start|>user\n")
        self.tail = self.ids("<|im_end|>\n<|im_start|>assistant\n")  # after the audio
        if tokenizer.token_to_id("<think>") is not None:
            self.tail += self.ids("<think>\n\n</think>\n\n")  # Qwen3 then answers at once
        # From here on "<|im_end|>" inside a text is ordinary text; not before head and tail.
        tokenizer.encode_special_tokens = True

    def prompt(self, instruction: str) -> list[int]:
        """Ids before the audio."""
        return self.head + self.ids(instruction + "\n")

    def answer(self, text: str) -> list[int]:
        """Ids of the answer and the end token."""
        return self.ids(text) + [self.end]


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


class QwenDecoder(Decoder):
    """Qwen2, Qwen2.5 or Qwen3 dense, with Hugging Face's parameter names.

    In its chat, audio tokens stand between instruction and answer.
    """

    PREFIX = "model."
    AUDIO = -1  # the placeholder of an audio token in a list of ids
    TOKENIZER = ChatTokenizer
    read_config = staticmethod(read_qwen_config)

    def __init__(self, config: dict, tokenizer: ChatTokenizer):
        super().__init__(config, tokenizer, config["hidden_size"])
        self.kv_heads = config["num_key_value_heads"], config["head_dim"]
        layers = range(config["num_hidden_layers"])
        self.layers = nn.ModuleList(QwenLayer(config) for _ in layers)
        self.norm = nn.RMSNorm(self.width, config["rms_norm_eps"])

    def forward(self, embeds, caches=None, positions=None):
        """embeds (B, L, D), padded on the right -> states (B, L, D).

        In generation: a cache for each layer, and the tokens' positions (B, L) in it.
        """
        x = embeds.to(self.embed_tokens.weight.dtype)
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]  # (1, L)
        with self.autocast(x.device):
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

    def audio_rms(self) -> float:
        """Audio tokens stand between embeddings: their root mean square."""
        return self.embed_tokens.weight.float().square().mean().sqrt().item()

    def layout(self, lengths, prompts, answers) -> list[list[int]]:
        """Each clip's ids: prompt, placeholders for the audio, tail, answer."""
        chats = []
        for length, prompt, answer in zip(lengths.tolist(), prompts, answers):
            chat = prompt + [self.AUDIO] * length + self.tokenizer.tail
            chats.append(chat + answer[:-1])  # its end token predicts nothing
        return chats

    def embed(self, chats: list[list[int]], audio, lengths):
        """Ids -> (B, L, D), padded on the right; audio at the placeholders."""
        ids = pad_ids(chats)  # (B, L)
        real = token_mask(lengths, audio.shape[1])  # (B, A)
        embeds = self.embed_tokens(ids.clamp(min=0).to(audio.device, non_blocking=True))
        # Both masks are made on the CPU, so nothing waits for the device.
        embeds[ids == self.AUDIO] = audio[real].to(embeds.dtype)
        return embeds

    def answer_states(self, audio, lengths, prompts, answers):
        """See Decoder."""
        chats = self.layout(lengths, prompts, answers)
        states = self(self.embed(chats, audio, lengths))  # (B, L, D)
        return states[predicting(chats, answers)]

    @torch.no_grad()
    def generate(self, audio, lengths, prompts, max_new_tokens: int):
        """See Decoder."""
        chats = self.layout(lengths, prompts, [[]] * len(prompts))
        embeds = self.embed(chats, audio, lengths)  # (B, L, D)
        return self.greedy(self, embeds, chats, max_new_tokens)


# ---------------------------------------------------------------- Whisper's decoder

# Whisper's codes of languages, by name (openai/whisper, tokenizer.py).
LANGUAGE_CODES = {name: code for code, name in map(str.split, """
en english, zh chinese, de german, es spanish, ru russian, ko korean, fr french,
ja japanese, pt portuguese, tr turkish, pl polish, ca catalan, nl dutch, ar arabic,
sv swedish, it italian, id indonesian, hi hindi, fi finnish, vi vietnamese, he hebrew,
uk ukrainian, el greek, ms malay, cs czech, ro romanian, da danish, hu hungarian,
ta tamil, no norwegian, th thai, ur urdu, hr croatian, bg bulgarian, lt lithuanian,
la latin, mi maori, ml malayalam, cy welsh, sk slovak, te telugu, fa persian, lv latvian,
bn bengali, sr serbian, az azerbaijani, sl slovenian, kn kannada, et estonian,
mk macedonian, br breton, eu basque, is icelandic, hy armenian, ne nepali, mn mongolian,
bs bosnian, kk kazakh, sq albanian, sw swahili, gl galician, mr marathi, pa punjabi,
si sinhala, km khmer, sn shona, yo yoruba, so somali, af afrikaans, oc occitan,
ka georgian, be belarusian, tg tajik, sd sindhi, gu gujarati, am amharic, yi yiddish,
lo lao, uz uzbek, fo faroese, ht haitian-creole, ps pashto, tk turkmen, nn nynorsk,
mt maltese, sa sanskrit, lb luxembourgish, my myanmar, bo tibetan, tl tagalog,
mg malagasy, as assamese, tt tatar, haw hawaiian, ln lingala, ha hausa, ba bashkir,
jw javanese, su sundanese, yue cantonese""".split(","))}


class WhisperTokenizer(TextTokenizer):
    """Whisper's tokenizer and prompts; `multilingual` is False for its .en models."""

    NEEDS = ("<|endoftext|>", "<|startoftranscript|>", "<|translate|>", "<|transcribe|>",
             "<|startofprev|>", "<|notimestamps|>")
    REMEDY = "take Whisper's own"
    multilingual = True

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer)
        self.end = tokenizer.token_to_id("<|endoftext|>")
        self.stop = {self.end}
        self.start = tokenizer.token_to_id("<|startoftranscript|>")
        self.languages = {}  # code -> id; they stand between these two
        for i in range(self.start + 1, tokenizer.token_to_id("<|translate|>")):
            self.languages[tokenizer.id_to_token(i).strip("<|>")] = i
        tokenizer.encode_special_tokens = True  # in texts they are spelt as plain text

    def transcription(self, language: str = "en") -> list[int]:
        """Whisper's own prompt for a transcript without timestamps.

        language: a code or a name, nl or Dutch.
        """
        language = LANGUAGE_CODES.get(language.lower().replace(" ", "-"), language)
        known = self.languages if self.multilingual else ["en"]
        if language not in known:
            raise ValueError(f"language is {language!r}; this Whisper knows "
                             f"{', '.join(known)}")
        task = [f"<|{language}|>", "<|transcribe|>"] if self.multilingual else []
        names = ["<|startoftranscript|>", *task, "<|notimestamps|>"]
        return [self.tokenizer.token_to_id(name) for name in names]

    def prompt(self, instruction: str) -> list[int]:
        """Ids of an instruction: it stands where Whisper reads what was said before.

        # assumption: the paper gives no prompt. Any language's token must stand here;
        # English, as instructions and most answers are.
        """
        before = self.tokenizer.token_to_id("<|startofprev|>")
        return [before, *self.ids(" " + instruction), *self.transcription()]

    def answer(self, text: str) -> list[int]:
        """Ids of the answer, after a space as Whisper's text, and the end token."""
        return self.ids(" " + text) + [self.end]

    def decode(self, ids: list[int]) -> str:
        """Text alone: from the end token's id on, all are special or timestamps."""
        text = [i for i in ids if i < self.end]
        return self.tokenizer.decode(text).strip()


class WhisperDecoderLayer(WhisperLayer):
    def __init__(self, width: int, heads: int, ffn: int):
        super().__init__(width, heads, ffn)
        self.encoder_attn = WhisperAttention(width, heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(width)

    def forward(self, x, audio_keys_values, audio_mask, cache=None, positions=None):
        """x (B, L, D) -> (B, L, D), causal; with a cache, x is at positions (B, L)."""
        y = self.self_attn_layer_norm(x)
        k, v = self.self_attn.keys_values(y)
        mask = None
        if cache is not None:
            k, v, mask = cache.write(k, v, positions)
        x = x + self.self_attn(y, (k, v), mask, causal=mask is None)
        y = self.encoder_attn_layer_norm(x)
        x = x + self.encoder_attn(y, audio_keys_values, audio_mask)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class WhisperDecoder(Decoder):
    """Whisper's decoder of any size, with Hugging Face's parameter names.

    It sees audio by cross-attention alone. Its head is its table of embeddings.
    """

    PREFIX = "model.decoder."
    TOKENIZER = WhisperTokenizer

    def __init__(self, config: dict, tokenizer: WhisperTokenizer):
        super().__init__(config, tokenizer, config["d_model"])
        tokenizer.multilingual = config["vocab_size"] >= 51865  # as openai/whisper tells
        self.suppressed = config["suppress_tokens"]  # ids: never in a transcript
        self.suppressed_first = config["begin_suppress_tokens"]  # never its first
        heads, ffn = config["decoder_attention_heads"], config["decoder_ffn_dim"]
        self.kv_heads = heads, self.width // heads
        self.window = config["max_target_positions"]  # tokens of prompt and answer: 448
        self.embed_positions = nn.Embedding(self.window, self.width)
        layers = range(config["decoder_layers"])
        self.layers = nn.ModuleList(WhisperDecoderLayer(self.width, heads, ffn) for _ in layers)
        self.layer_norm = nn.LayerNorm(self.width)

    @staticmethod
    def read_config(folder) -> dict:
        c = read_whisper_config(folder, "decoder")
        check_values(c, folder, scale_embedding=False)
        path = Path(folder, "generation_config.json")
        if not path.exists():  # as in transformers; where it is, it alone counts
            path = Path(folder, "config.json")
        for key in "suppress_tokens", "begin_suppress_tokens":
            c[key] = read_ids(path, key, c["vocab_size"])
        return c | {"tie_word_embeddings": True}

    def audio_rms(self) -> float:
        return 1.0  # assumption: about what Whisper's encoders give (1.4 base, 1.0 tiny.en)

    def hear(self, audio, lengths):
        """audio (B, A, D) -> each layer's keys and values; which tokens are real."""
        real = token_mask(lengths, audio.shape[1])  # (B, A)
        mask = None
        if not real.all():
            mask = real[:, None, None, :].to(audio.device, non_blocking=True)
        with self.autocast(audio.device):
            audio = audio.to(self.embed_tokens.weight.dtype)
            return [layer.encoder_attn.keys_values(audio) for layer in self.layers], mask

    def forward(self, heard, embeds, caches=None, positions=None):
        """embeds (B, L, D), padded on the right -> states (B, L, D); heard: see `hear`.

        In generation: a cache for each layer, and the tokens' positions (B, L) in it.
        """
        audio_keys_values, mask = heard
        if positions is None:
            positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
        x = embeds + self.embed_positions(positions)
        with self.autocast(x.device):
            for i, layer in enumerate(self.layers):
                cache = caches[i] if caches else None
                x = run_layer(layer, self.checkpoint_layers, x, audio_keys_values[i], mask,
                              cache, positions)
            return self.layer_norm(x)

    def check_length(self, tokens: int) -> None:
        if tokens > self.window:
            raise ValueError(f"prompt and answer have {tokens} tokens; Whisper's "
                             f"decoder takes {self.window}: shorten either")

    def embed(self, chats: list[list[int]], room: int = 0):
        """Ids -> (B, L, D), padded on the right; behind them `room` more must fit."""
        self.check_length(max(map(len, chats)) + room)
        device = self.embed_tokens.weight.device
        return self.embed_tokens(pad_ids(chats).to(device, non_blocking=True))

    def answer_states(self, audio, lengths, prompts, answers):
        """See Decoder."""
        # The end token predicts nothing.
        chats = [prompt + answer[:-1] for prompt, answer in zip(prompts, answers)]
        states = self(self.hear(audio, lengths), self.embed(chats))  # (B, L, D)
        return states[predicting(chats, answers)]

    @torch.no_grad()
    def generate(self, audio, lengths, prompts, max_new_tokens: int, transcript=False):
        """See Decoder; transcript: see `greedy`."""
        read = partial(self, self.hear(audio, lengths))
        embeds = self.embed(prompts, max_new_tokens)  # (B, L, D)
        return self.greedy(read, embeds, prompts, max_new_tokens, transcript)

    @torch.no_grad()
    def detect_languages(self, audio, lengths) -> list[str]:
        """Each clip's most probable language, as a code: nl."""
        t = self.tokenizer
        if not t.multilingual:
            return ["en"] * len(audio)
        start = self.embed([[t.start]] * len(audio))  # (B, 1, D)
        states = self(self.hear(audio, lengths), start)[:, 0]  # (B, D)
        codes, ids = list(t.languages), list(t.languages.values())
        best = self.unembed(states)[:, ids].argmax(-1)  # (B,)
        return [codes[i] for i in best.tolist()]


def load_decoder(folder, dtype: torch.dtype = torch.float32) -> Decoder:
    """The decoder of a folder, by its config.json's model_type."""
    kind = read_config(folder, ("qwen2", "qwen3", "whisper"))["model_type"]
    decoder = WhisperDecoder if kind == "whisper" else QwenDecoder
    return decoder.from_pretrained(folder, dtype)


# ---------------------------------------------------------------- the joint model

def new_adapter(encoder, decoder, stack: int) -> nn.Module:
    """A new adapter; its output has the scale that the decoder is used to.

    stack 0: no adapter.
    """
    if stack:
        return adapters.StackAdapter(encoder.width, decoder.width, stack, decoder.audio_rms())
    if encoder.width != decoder.width:
        raise ValueError(f"stack is 0, no adapter, but the encoder is {encoder.width} wide "
                         f"and the decoder {decoder.width}; use 1 or more")
    return adapters.NoAdapter()


class UniWhisper(nn.Module):
    """Encoder and adapter, trained through a frozen decoder (paper, section 2).

    Only the answers' tokens carry loss.
    An encoder has sample_rate, width, token_seconds, encode and save.
    A decoder is a Decoder with answer_states and generate.
    Its tokenizer has prompt, answer and decode.
    """

    def __init__(self, encoder, adapter: nn.Module, decoder):
        super().__init__()
        self.encoder, self.adapter, self.decoder = encoder, adapter, decoder
        # Frozen: gradients pass, but change nothing (train.py's --lr-decoder thaws it).
        decoder.requires_grad_(False).eval()

    def forward(self, batch):
        """Losses (N,) of the answer tokens, float32, one clip after the other.

        batch: audio (B, S), samples (B,), prompts and answers as B lists of ids.
        """
        features, lengths = self.encoder.encode(batch.audio, batch.samples)  # (B, T, D)
        audio_tokens = self.adapter(features)  # (B, A, D)
        counts = self.adapter.lengths(lengths)  # (B,)
        states = self.decoder.answer_states(audio_tokens, counts, batch.prompts,
                                            batch.answers)  # (N, D)
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
        """Greedy answers about clips: audio and samples as in `encode` -> B texts."""
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
    decoder, adapter = decoder_folder(s, newest), newest / "adapter"
    return load_model(newest / "encoder", decoder, s["stack"], adapter).eval()


def decoder_folder(settings: dict, checkpoint: Path) -> Path:
    """A run's decoder: in its checkpoint where it trains."""
    trained = checkpoint / "decoder"
    return trained if trained.exists() else Path(settings["decoder"])


def export_run(folder, beside, settings: dict, encoder, decoder=None) -> None:
    """Write a run's encoder as a Hugging Face folder, with a model card.

    A trained decoder goes to `beside`. Whisper's own, where no adapter
    stood between, also takes the old one's place in the folder.
    """
    source = settings["encoder"]
    if decoder is not None:
        decoder.save(beside, settings["decoder"])
        if settings["stack"] == 0 and isinstance(decoder, WhisperDecoder):
            source = beside
    encoder.save(folder, source)
    Path(folder, "README.md").write_text(model_card(settings, encoder), "utf-8")


CARD = """---
library_name: transformers
pipeline_tag: feature-extraction
base_model: {base}
{licence}tags: [audio, speech, music, uniwhisper]
---

# {base}, trained on by UniWhisper

An audio encoder for speech, sounds and music: one vector of {width} numbers every
{token:g} ms. {base} was trained on through an adapter and {decoder} (arXiv
2602.21772): audio + instruction -> answer text, with loss on the answers alone.

## Training

{steps:,} updates on {hours} hours of audio.

| task | clips |
| --- | --- |
{tasks}

Settings: {settings}

## Use

{use}
Training heard clips at their own length. What pads them to a fixed length, as
`transformers` does, reads them, too; take the mean over a clip's real tokens alone.
UniWhisper's `load_encoder(FOLDER).pooled(audio)` does both.

## Scores

{scores}

## Limits

A decoder in this folder may no longer read this encoder well: but where it was trained,
too, it is the base model's.
The licence is the base model's; that of the training clips may bind you, too.
"""


WHISPER_USE = """\
    from transformers import AutoFeatureExtractor, AutoModel
    mel = AutoFeatureExtractor.from_pretrained(FOLDER)(audio, sampling_rate=16_000,
                                                       return_tensors="pt")
    features = AutoModel.from_pretrained(FOLDER).encoder(**mel).last_hidden_state
"""
CLAP_USE = "`ClapModel.from_pretrained(FOLDER)` of `transformers` loads it.\n"


def model_card(settings: dict, encoder) -> str:
    """A README.md as on the Hub; with scores where OUT holds probe.py's scores.json."""
    source = settings["encoder"]
    base = read_json(Path(source, "config.json")).get("_name_or_path") or Path(source).name
    card = Path(source, "README.md")
    lines = card.read_text("utf-8").splitlines() if card.exists() else []
    licence = next((line + "\n" for line in lines if line.startswith("license:")), "")
    # What a reader needs to judge the weights.
    shown = []
    for key in ("seed", "stack", "batch_seconds", "accumulate", "loss", "lr_encoder", "lr_adapter",
                "lr_decoder", "freeze_encoder", "words", "words_weight", "languages",
                "task_weights", "precision", "blend"):
        value = settings.get(key)
        if value not in (None, [], ()):
            value = " ".join(value) if isinstance(value, (list, tuple)) else value
            shown.append(f"{key} {value}")
    tasks, hours = settings.get("tasks", {}), settings.get("hours")
    return CARD.format(
        base=base, licence=licence, width=encoder.width,
        use=WHISPER_USE if isinstance(encoder, WhisperEncoder) else CLAP_USE,
        token=1000 * encoder.token_seconds, decoder=Path(settings["decoder"]).name,
        steps=settings["steps"], hours=f"{hours:.1f}" if hours else "?", settings=", ".join(shown),
        tasks="\n".join(f"| {task} | {count} |" for task, count in tasks.items()),
        scores=card_scores(Path(settings["out"], "scores.json")))


def card_scores(path: Path) -> str:
    """A table of what `probe.py --encoder OUT/encoder --json OUT/scores.json` wrote."""
    if not path.exists():
        return f"None yet: `python probe.py --encoder OUT/encoder --json {path.name}` in OUT."
    lines = ["| task | metric | encoder | kNN | MLP |", "| --- | --- | --- | --- | --- |"]
    for folder, scores in read_json(path, "encoders")["encoders"].items():
        for task, score in scores["tasks"].items():
            values = [score["metric"], Path(folder).name]
            for column in ("knn", "mlp"):
                value = score.get(column)
                values.append("-" if value is None else f"{value:.3f}")
            lines.append(f"| {task} | {' | '.join(values)} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- command line

# For the settings of train.py and probe.py.
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
            # tuple[str, ...] takes str.
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


def named_clips(paths, sample_rate: int) -> dict:
    """Audio files, manifests and tars -> name -> a function that reads the clip."""
    from data import Rows, read_audio  # used by commands alone

    clips, folders = {}, {}  # folders: where a name is looked up
    for path in paths:
        if path.endswith((".jsonl", ".tar")):
            rows, folder = Rows([path]), Path(path).resolve()
            folder = folder if path.endswith(".tar") else folder.parent
            found = {rows[i]["audio"]: partial(rows.audio, i, sample_rate)
                     for i in range(len(rows))}
        else:
            found, folder = {path: partial(read_audio, path, sample_rate)}, Path.cwd()
        for name in found:
            if folders.setdefault(name, folder) != folder:
                raise ValueError(f"{path}: {name} is also a clip of {folders[name]}, and features "
                                 "need a name each: encode the two apart")
        clips |= found
    return clips


@torch.inference_mode()
def encode(args) -> None:
    """Features of clips -> one file."""
    from data import AudioError

    weights = Path(args.encoder, "model.safetensors")
    refuse_to_overwrite(args.out, *args.audio, weights)
    encoder = load_encoder(args.encoder).eval()
    clips = named_clips(args.audio, encoder.sample_rate)
    features, skipped = {}, []
    for name, read in clips.items():
        try:
            audio = read()
        except AudioError as e:
            skipped.append(f"skipped: {e}")
            continue
        x = encoder.pooled(audio) if args.pool else encoder.encode(audio)[0]
        features[name] = x[0].contiguous()  # (D,) or (T, D)
        print(f"{name}: {tuple(features[name].shape)}")
    if features:
        write_tensors(features, args.out)
    if skipped:
        raise ValueError("\n".join(skipped))


def ask(args) -> None:
    from data import read_audio

    if args.max_new_tokens < 1:
        raise ValueError("--max-new-tokens must be above 0")
    model = load_run(args.run)
    audio = read_audio(args.audio, model.encoder.sample_rate)
    print(*model.generate(audio, None, [args.question], args.max_new_tokens))


@torch.inference_mode()
def transcribe(args) -> None:
    """Print Whisper's transcripts."""
    from data import AudioError, read_audio

    encoder, decoder = load_encoder(args.encoder).eval(), load_decoder(args.encoder)
    if args.language:
        decoder.tokenizer.transcription(args.language)  # refuses what it does not know
    skipped = []
    for first in range(0, len(args.audio), WINDOWS):
        paths, clips = [], []
        for path in args.audio[first : first + WINDOWS]:
            try:
                clips.append(read_audio(path, encoder.sample_rate))
                paths.append(path)
            except AudioError as e:
                skipped.append(f"skipped: {e}")
        said = transcribe_clips(encoder, decoder, clips, [args.language] * len(clips),
                                args.context)
        for path, text, _, repeats in zip(paths, *said):
            for repeat in repeats:
                note = f"note: {path}: stopped where it only repeated {repeat!r}"
                print(note, file=sys.stderr)
            print(f"{path}: {text}", flush=True)
    if skipped:
        raise ValueError("\n".join(skipped))


def transcribe_clips(encoder, decoder, clips, languages, context: str = "30s"):
    """Clips, audio (S,) of any length -> texts, languages, repeats: a list each.

    languages: a code such as nl for each; "": what is detected in its first 30 s.
    context 30s: silence follows up to 30 s, as Whisper learned; clip: none.
    repeats: for each clip, a list of what was said over and over and therefore cut off.
    """
    windows = {}  # (clip, number in the clip) -> audio (S,)
    for clip, audio in enumerate(clips):
        for number, window in enumerate(audio.split(encoder.window * encoder.token_samples)):
            windows[clip, number] = window
    # A clip's first window tells the language of the others.
    first = [place for place in windows if place[1] == 0]
    later = [place for place in windows if place[1] > 0]
    languages, said = list(languages), {}
    for places in first, later:
        places.sort(key=lambda place: len(windows[place]))  # so that little is padded
        for n in range(0, len(places), WINDOWS):
            batch = places[n : n + WINDOWS]
            audio = [windows[place] for place in batch]
            known = [languages[clip] for clip, _ in batch]
            answers = transcribe_windows(encoder, decoder, audio, known, context)
            for place, answer in zip(batch, answers):
                said[place], languages[place[0]] = answer, answer[1]
    texts, repeats = [[] for _ in clips], [[] for _ in clips]
    for clip, number in windows:
        text, _, repeat = said[clip, number]
        texts[clip].append(text)
        if repeat:
            repeats[clip].append(repeat)
    return [" ".join(parts) for parts in texts], languages, repeats


def transcribe_windows(encoder, decoder, windows, languages, context: str = "30s"):
    """Audio (S,) of up to 30 s each -> text, language, repeat for each; see above."""
    # Not pad_to_window: the decoder also has to hear the silence.
    size = encoder.window * encoder.token_samples
    samples = torch.tensor([size if context == "30s" else len(audio) for audio in windows])
    audio = nn.utils.rnn.pad_sequence(windows, batch_first=True)  # (B, S)
    audio, lengths = encoder.encode(audio, samples)  # (B, T, D)
    if not all(languages):
        found = decoder.detect_languages(audio, lengths)
        languages = [given or other for given, other in zip(languages, found)]
    tokenizer = decoder.tokenizer
    prompts = [tokenizer.transcription(language) for language in languages]
    longest = decoder.window - len(prompts[0])
    answers, out = decoder.generate(audio, lengths, prompts, longest, transcript=True), []
    for ids, language in zip(answers, languages):
        repeat, length = "", repeated(ids)
        if length:
            repeat = tokenizer.decode(ids[-length:])
            ids = ids[: length - RUNAWAY]  # once it may have been said
        out.append((tokenizer.decode(ids), language, repeat))
    return out


@torch.no_grad()
def export(args) -> None:
    """A run's encoder as a folder."""
    settings, newest = open_run(args.run)
    settings["out"] = args.run  # it may have been moved
    settings["steps"] = int(newest.name.removeprefix("step-"))
    settings["blend"] = args.blend
    beside = Path(args.folder, "decoder")
    source, trained = settings["encoder"], newest / "encoder"
    for target in (args.folder, beside):
        refuse_to_overwrite(target, args.run, source, settings["decoder"], trained)
    if not 0 <= args.blend <= 1:
        raise ValueError(f"--blend is {args.blend:g}; it must be from 0 to 1")
    encoder, decoder = load_encoder(trained), None
    if (newest / "decoder").exists():
        decoder = load_decoder(newest / "decoder")
    if args.blend != 1:
        blend(encoder, load_encoder(source), args.blend)
        if decoder is not None:
            blend(decoder, load_decoder(settings["decoder"]), args.blend)
    export_run(args.folder, beside, settings, encoder, decoder)
    print(f"{args.folder}: {trained}, {args.blend:g} of the way from {source}")


def blend(trained: nn.Module, start: nn.Module, share: float) -> None:
    """Move trained weights to `share` of the way from the start's.

    Weights in between forget less (Wortsman et al., arXiv 2109.01903).
    """
    for p, before in zip(trained.parameters(), start.parameters(), strict=True):
        p.lerp_(before, 1 - share)


def main():
    """What a user can cause ends in one line and exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("encode", help="audio -> features (T, D)")
    p.add_argument("audio", nargs="+", help="audio files, manifests (.jsonl), tars")
    p.add_argument("--encoder", required=True, help="Whisper, CLAP, or OUT/encoder of a run")
    p.add_argument("--out", required=True, help="safetensors file; its keys: clips")
    p.add_argument("--pool", action="store_true", help="mean over tokens: (D,)")
    p.set_defaults(do=encode)
    p = commands.add_parser("ask", help="answer a question about a clip")
    p.add_argument("audio")
    p.add_argument("question")
    p.add_argument("--run", required=True, help="--out of a training run")
    p.add_argument("--max-new-tokens", type=int, default=64)
    p.set_defaults(do=ask)
    p = commands.add_parser("transcribe", help="speech -> text by Whisper's own decoder")
    p.add_argument("audio", nargs="+")
    p.add_argument("--encoder", required=True, help="whole Whisper, or OUT/encoder of a run")
    p.add_argument("--language", default="", help="as nl; without: what Whisper detects")
    p.add_argument("--context", choices=("30s", "clip"), default="30s",
                   help="30s: silence follows up to 30 s, as Whisper learned; clip: none")
    p.set_defaults(do=transcribe)
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
