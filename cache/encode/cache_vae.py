"""The VAE of a latent cache: its identity, and the comparison with the VAE of the settings.

`cache.json` holds the SHA-256 of the VAE's weights, its padding and number of channels, and path, size and time of the
files that it came from. As long as those files are the settings' own and unchanged, no weight is read to compare.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sdxl_trainer.cache.models.encoders import hash_weights
from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.cache.models.vae import list_vae_files, load_vae, locate_vae, resolve_vae_model
from sdxl_trainer.cache.models.vae_config import PADDING, PADDINGS, resolve_vae_config
from sdxl_trainer.configs.problems import Problem, raise_if_any
from sdxl_trainer.configs.schema import ModelConfig
from sdxl_trainer.data.formats.latents import SDXL_CHANNELS
from sdxl_trainer.data.formats.manifest import list_manifest_parts, read_identity
from sdxl_trainer.launch.distributed import Ranks, share_problems


@dataclass(frozen=True)
class CacheVae:
    """The VAE that makes the latents of a cache."""

    sha256: str  # of the weights; "" if they have not been read
    channels: int
    padding: str
    name: str  # as the settings name it
    files: list[list[Any]]  # path, size and modification time in ns of each

    @property
    def record(self) -> dict[str, Any]:
        """The part of `cache.json` that does not belong to the identity: which files the VAE came from."""
        return {"name": self.name, "files": self.files}


class LoadedVae(NamedTuple):
    """The VAE of a cache job, and what the cache notes of it."""

    network: torch.nn.Module
    own: CacheVae


def describe_vae(source: ModelSource | None, model: ModelConfig) -> CacheVae:
    """Describe the VAE of the settings without reading its weights.

    Raises:
        UserInputError: it cannot be used.
    """
    location = locate_vae(source, model)
    config = resolve_vae_config(location.config, model)
    return CacheVae(
        sha256="",
        channels=config["latent_channels"],
        padding=config[PADDING],
        name=model.vae or model.path,
        files=list_vae_files(location),
    )


def identify_vae(source: ModelSource | None, model: ModelConfig, vae: torch.nn.Module) -> CacheVae:
    """Describe the VAE of the settings, which `load_vae` has loaded, with the hash of its weights."""
    described = describe_vae(source, model)
    return CacheVae(**{**vars(described), "sha256": hash_weights(vae)})


def load_cache_vae(model: ModelConfig, folder: Path, ranks: Ranks, may_replace: bool) -> LoadedVae:
    """Load the VAE of the settings. Its latents replace those of another VAE only if that is asked for.

    Raises:
        UserInputError: the cache holds latents of another VAE, and `may_replace` is false.
    """
    source = resolve_vae_model(model)
    network = load_vae(source, model)
    own = identify_vae(source, model, network)
    with share_problems():
        if ranks.is_main and not may_replace:
            raise_if_any(check_cache_vae(folder, model, own))
    return LoadedVae(network, own)


def check_cache_vae(folder: Path, model: ModelConfig, vae: CacheVae) -> Iterator[Problem]:
    """Yield a problem if a cache holds latents of another VAE than the settings'.

    Caches without `cache.json` are of other programs, which do not name their VAE.

    Args:
        vae: the VAE of the settings. Without its hash, the weights are read unless its files are those of the cache.
    """
    try:
        known = read_identity(folder)
    except ValueError:
        return  # reported by check_identity
    if known is None or not known.get("vae_sha256") or not list_manifest_parts(folder):
        return
    made = (known.get("latent_channels", SDXL_CHANNELS), known.get("vae_padding", PADDINGS[0]))
    if made == (vae.channels, vae.padding) and _has_same_weights(known, vae, model):
        return
    channels, padding = made
    rule = (
        f"holds latents of the VAE {_find_name(known)} ({channels} channels, padding {padding}), "
        f"and the settings have {vae.name} ({vae.channels} channels, padding {vae.padding})"
    )
    cure = (
        "set model.vae (and model.vae_padding) to the VAE of the cache, or another cache.dir; "
        "bash launch/cache.sh --repair encodes what is in the cache again, with the VAE of the settings"
    )
    yield Problem("cache.dir", folder, rule, cure)


def _has_same_weights(known: dict[str, Any], vae: CacheVae, model: ModelConfig) -> bool:
    record = known.get("vae")
    if isinstance(record, dict) and record.get("files") == vae.files:
        return True
    sha256 = vae.sha256 or hash_weights(load_vae(resolve_vae_model(model), model))
    return known["vae_sha256"] == sha256


def _find_name(known: dict[str, Any]) -> str:
    """Return the name of the VAE that made a cache, or the hash of its weights if no name is known."""
    record = known.get("vae")
    name = record.get("name") if isinstance(record, dict) else None
    return str(name or f"SHA-256 {str(known['vae_sha256'])[:16]}")
