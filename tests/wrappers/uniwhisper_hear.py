"""HEAR's API (hearvalidator 2021.0.2, heareval 2021.1.3) for the encoder in a folder.

    pip install hearvalidator -e .
    export PYTHONPATH=$PWD:$PWD/tests/wrappers
    hear-validator uniwhisper_hear --model weights/whisper-base

heareval's pins no longer install; without them it runs (TASKS: folders as hearpreprocess writes):

    pip install --no-deps heareval
    pip install 'pytorch-lightning<2' 'setuptools<81' sed-eval scikit-learn pandas torchinfo \\
        intervaltree python-slugify pynvml more-itertools
    python -m heareval.embeddings.runner uniwhisper_hear --tasks-dir TASKS \\
        --model-options '{"folder": "weights/whisper-base"}'
    export TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1
    python -m heareval.predictions.runner embeddings/uniwhisper_hear-*/*

It keeps embeddings in ./embeddings under the module's name and these options.
"""
import torch

import uniwhisper


def load_model(model_file_path="", folder=""):
    model = uniwhisper.load_encoder(folder or model_file_path).eval()
    model.scene_embedding_size = model.timestamp_embedding_size = model.width
    return model


@torch.inference_mode()
def get_timestamp_embeddings(audio, model):
    """audio (B, S) -> features (B, T, D), the middles (B, T) of their tokens in ms."""
    features, _ = model.encode(audio)
    tokens = torch.arange(features.shape[1], device=audio.device)
    middles = (tokens + 0.5) * 1000 * model.token_seconds  # (T,)
    return features, middles.expand(len(audio), -1)


@torch.inference_mode()
def get_scene_embeddings(audio, model):
    """audio (B, S) -> means over own tokens (B, D), without the zeros at a clip's end."""
    places = torch.arange(1, audio.shape[1] + 1, device=audio.device)
    return model.pooled(audio, ((audio != 0) * places).amax(1))
