"""Loads the frozen networks: the VAE and the two text encoders, with their tokenizers, from folder or single file."""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sdxl_trainer.cache.models.single_file import build_component
from sdxl_trainer.cache.models.source import ModelSource, fetch_from_hub, is_local, resolve_model
from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.configs.schema import ModelConfig
from sdxl_trainer.data.text.tokens import Tokenizers, find_installed_vocabulary, load_tokenizer

PAD_TOKENS = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}


def load_vae(source: ModelSource, config: ModelConfig) -> torch.nn.Module:
    """The VAE in fp32, frozen: `model.vae` if set, else the model's own."""
    from diffusers import AutoencoderKL

    vae: Any  # diffusers' from_pretrained is typed as a union that is never returned
    if config.vae:
        folder = Path(config.vae) if Path(config.vae).is_dir() else fetch_from_hub("model.vae", config.vae)
        vae = AutoencoderKL.from_pretrained(folder, use_safetensors=True)
    elif source.file is None:
        vae = AutoencoderKL.from_pretrained(source.folder, subfolder="vae", use_safetensors=True)
    else:
        settings = source.read_config("vae")
        vae = build_component(lambda: AutoencoderKL.from_config(settings), source.file, "vae", settings)
    return vae.float().eval().requires_grad_(False)


def load_text_encoders(source: ModelSource, config: ModelConfig) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Text encoders 1 and 2 in fp32, frozen."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    encoders = []
    for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        if source.file is None:
            encoder = kind.from_pretrained(source.folder / name, use_safetensors=True)
        else:
            settings = source.read_config(name)
            build = partial(kind, CLIPTextConfig(**settings))
            encoder = build_component(build, source.file, name, settings, text_projection=config.text_projection)
        encoders.append(encoder.float().eval().requires_grad_(False))
    return encoders[0], encoders[1]


def load_tokenizers(source: ModelSource, config: ModelConfig) -> Tokenizers:
    """Load the tokenizers of both text encoders.

    Raises:
        UserInputError: a single file carries no vocabulary, and none was given or is installed.
    """
    folders = [find_vocabulary(source, config, name) for name in PAD_TOKENS]
    return Tokenizers(*(load_tokenizer(folder, pad) for folder, pad in zip(folders, PAD_TOKENS.values(), strict=True)))


def find_vocabulary(source: ModelSource, config: ModelConfig, name: str) -> Path:
    """What to build a tokenizer (`tokenizer` or `tokenizer_2`) from: `model.tokenizer`, the model's own, or what an
    installed open_clip_torch carries."""
    for folder in (config.tokenizer, source.folder / name):
        if folder is not None and (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return folder
    if config.tokenizer is None and (installed := find_installed_vocabulary()):
        return installed
    raise UserInputError(
        [
            Problem(
                "model.tokenizer",
                config.tokenizer,
                "no CLIP vocabulary found (vocab.json and merges.txt)",
                "set model.tokenizer to a folder that holds them, such as tokenizer/ of an SDXL diffusers folder, or "
                "pip install --no-deps open_clip_torch, which carries them",
            )
        ]
    )


def check_vocabulary(config: ModelConfig) -> list[Problem]:
    """Whether there is a vocabulary, told before a network is loaded; of a hub id only the hub can tell."""
    if not is_local(config):
        return []
    source = resolve_model(config)
    try:
        for name in PAD_TOKENS:
            find_vocabulary(source, config, name)
    except UserInputError as error:
        return error.problems
    return []


def hash_weights(model: torch.nn.Module) -> str:
    """SHA-256 over a model's weights by name, in fp32: the same whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()
