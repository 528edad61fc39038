"""The VAE of the settings: find it, read its config, load it, and list its files.

`model.vae` names it, as a diffusers folder, a single file or a hub id; without it, it is the model's own.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from sdxl_trainer.cache.models.components import UninitializedWeights, copy_weights
from sdxl_trainer.cache.models.diffusers_folder import WEIGHTS, choose_weights
from sdxl_trainer.cache.models.single_file import iterate_tensors
from sdxl_trainer.cache.models.single_file_check import find_component_problems, read_safetensors_header
from sdxl_trainer.cache.models.single_file_names import build_name_table
from sdxl_trainer.cache.models.source import ModelSource, fetch_from_hub, is_vae_local, resolve_model
from sdxl_trainer.cache.models.vae_config import (
    FLUX2_AUTOENCODER,
    PADDING,
    STATISTICS,
    VAE_PREFIX,
    BadVaeError,
    map_file_names,
    read_file_config,
    read_folder_config,
    resolve_vae_config,
)
from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.configs.schema import ModelConfig
from sdxl_trainer.data.files import describe_file, read_with_retries


class VaeLocation(NamedTuple):
    """The VAE of the settings on disk: a single file, or a folder with its config and weights."""

    config: dict[str, Any]  # its own; `resolve_vae_config` completes it
    path: Path
    is_file: bool


def resolve_vae_model(model: ModelConfig) -> ModelSource | None:
    """Return the model whose VAE is used, downloaded if it is on the hub; None if `model.vae` names another VAE."""
    return None if model.vae else resolve_model(model)


def locate_vae(source: ModelSource | None, model: ModelConfig) -> VaeLocation:
    """Find the VAE: `model.vae` if it is set, else the model's own. A hub id is downloaded.

    Args:
        source: the model; None is enough if `model.vae` is set.

    Raises:
        UserInputError: it is no VAE that can be used, or the hub does not have it.
    """
    try:
        if model.vae is None:
            assert source is not None, "the model's own VAE needs the model"
            path = source.file or source.folder / "vae"
            return VaeLocation(source.read_config("vae"), path, source.file is not None)
        path = Path(model.vae)
        if path.is_file():
            return VaeLocation(read_file_config(path), path, is_file=True)
        folder = path if path.is_dir() else fetch_from_hub("model.vae", model.vae)
        return VaeLocation(read_folder_config(folder), folder, is_file=False)
    except BadVaeError as error:
        key, value = ("model.vae", model.vae) if model.vae else ("model.path", model.path)
        raise UserInputError([Problem(key, value, str(error), error.cure)]) from None


def read_vae_config(source: ModelSource | None, model: ModelConfig) -> dict[str, Any]:
    """Return the config of the VAE as the run uses it (see `resolve_vae_config`); `latent_channels` is its count.

    Raises:
        UserInputError: the VAE cannot be used, or contradicts the settings.
    """
    return resolve_vae_config(locate_vae(source, model).config, model)


def read_local_vae_config(model: ModelConfig) -> dict[str, Any] | None:
    """Return what `read_vae_config` does for a VAE on disk; None for one on the hub, which is not asked."""
    return read_vae_config(resolve_vae_model(model), model) if is_vae_local(model) else None


def load_vae(source: ModelSource | None, model: ModelConfig) -> torch.nn.Module:
    """Load the VAE in fp32, frozen, with the padding and the statistics of the settings.

    Raises:
        UserInputError: as `read_vae_config`.
        ValueError: weights are missing or misshapen.
    """
    from diffusers import AutoencoderKL

    location = locate_vae(source, model)
    config = resolve_vae_config(location.config, model)
    settings = {key: value for key, value in config.items() if key != PADDING}
    vae: Any  # diffusers' from_pretrained is typed as a union that is never returned
    if location.is_file or location.config.get("_class_name") == FLUX2_AUTOENCODER:
        with UninitializedWeights(torch.float32):
            vae = AutoencoderKL.from_config(settings)

        def load() -> None:
            copy_weights(vae, "vae", read_vae_weights(location, config))

        read_with_retries(load, location.path)
    else:
        vae = AutoencoderKL.from_pretrained(location.path, use_safetensors=True)
        vae.register_to_config(**{key: settings.get(key) for key in STATISTICS})
    pad_convolutions(vae, config[PADDING])
    return vae.float().eval().requires_grad_(False)


def pad_convolutions(vae: torch.nn.Module, padding: str) -> None:
    """Let all padded convolutions of a VAE pad by `zeros` or by `reflect`.

    The strided convolutions of the encoder have no padding of their own; diffusers, as LDM, adds a row and a column of
    zeros before them in both cases.
    """
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d) and any(module.padding):
            module.padding_mode = padding  # pyright: ignore[reportAttributeAccessIssue]


def read_vae_weights(location: VaeLocation, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (source name, tensor) of a VAE, memory-mapped, in the file's dtype.

    Args:
        config: the VAE's complete config, of which the name table of a single file is built.

    Raises:
        ValueError: tensors of a single file are missing, unknown or misshapen; the message lists them.
    """
    if location.is_file:
        yield from _read_file_weights(location.path, config)
        return
    for path in choose_weights(location.path, WEIGHTS["vae"]):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def _read_file_weights(path: Path, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Check the VAE in a single file and yield (source name, tensor).

    Raises:
        ValueError: tensors are missing, unknown or misshapen; the message lists them.
    """
    header, rows = read_safetensors_header(path), build_name_table("vae", config)
    names = map_file_names(header.shapes)
    in_model = {VAE_PREFIX + name: own for name, own in names.items()}
    shapes, types = ({name: of[own] for name, own in in_model.items()} for of in (header.shapes, header.types))
    problems = find_component_problems(replace(header, shapes=shapes, types=types), "vae", rows)
    if problems:
        raise ValueError(f"{path} cannot be read as a VAE: {'; '.join(problems)}")
    return iterate_tensors(path, [replace(row, file_name=in_model[row.file_name]) for row in rows])


def list_vae_files(location: VaeLocation) -> list[list[Any]]:
    """List path, size and modification time of the files that hold the VAE's weights."""
    files = [location.path] if location.is_file else choose_weights(location.path, WEIGHTS["vae"])
    return [describe_file(file) for file in files]
