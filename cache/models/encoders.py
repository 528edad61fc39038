"""Loading of the frozen text encoders and their tokenizers, from a folder or a single file."""

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from sdxl_trainer.cache.models.components import build_component
from sdxl_trainer.cache.models.source import ModelSource, is_local, resolve_model
from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.configs.schema import ModelConfig
from sdxl_trainer.data.text.tokens import (
    VOCABULARY_FILES,
    Tokenizers,
    find_installed_vocabulary,
    has_vocabulary,
    load_tokenizer,
)

PAD_TOKENS = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}


class TextEncoders(NamedTuple):
    """SDXL's two text encoders."""

    encoder: torch.nn.Module
    encoder_2: torch.nn.Module


def load_text_encoders(
    source: ModelSource,
    config: ModelConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TextEncoders:
    """Load both text encoders, frozen."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    encoders = []
    for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        build = partial(kind, CLIPTextConfig(**source.read_config(name)))
        encoder = build_component(
            build, source, name, device=device, dtype=dtype, text_projection=config.text_projection
        )
        encoders.append(encoder.eval().requires_grad_(False))
    return TextEncoders(*encoders)


def load_tokenizers(source: ModelSource, config: ModelConfig) -> Tokenizers:
    """Load the tokenizers of both text encoders.

    Raises:
        UserInputError: a single file carries no vocabulary, and none is configured or installed.
    """
    folders = [find_vocabulary(source, config, name) for name in PAD_TOKENS]
    return Tokenizers(*(load_tokenizer(folder, pad) for folder, pad in zip(folders, PAD_TOKENS.values(), strict=True)))


def find_vocabulary(source: ModelSource, config: ModelConfig, name: str) -> Path:
    """Find the vocabulary of a tokenizer: in `model.tokenizer`, in the model, or in an installed open_clip_torch.

    Args:
        name: `tokenizer` or `tokenizer_2`.

    Raises:
        UserInputError: there is none.
    """
    for folder in (config.tokenizer, source.folder / name):
        if folder is not None and has_vocabulary(folder):
            return folder
    if config.tokenizer is None and (installed := find_installed_vocabulary()):
        return installed
    raise UserInputError(
        [
            Problem(
                "model.tokenizer",
                config.tokenizer,
                f"no CLIP vocabulary found ({VOCABULARY_FILES})",
                "set model.tokenizer to a folder that holds them, such as tokenizer/ of an SDXL diffusers folder, or "
                "pip install --no-deps open_clip_torch, which carries them",
            )
        ]
    )


def check_vocabulary(config: ModelConfig) -> Iterator[Problem]:
    """Check that a local model has a vocabulary, before any network is loaded. Hub ids are not checked."""
    if not is_local(config):
        return
    source = resolve_model(config)
    try:
        for name in PAD_TOKENS:
            find_vocabulary(source, config, name)
    except UserInputError as error:
        yield from error.problems


def hash_weights(model: torch.nn.Module) -> str:
    """Return the SHA-256 of a model's names and weights in fp32, which is the same for every file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()
