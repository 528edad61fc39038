"""What `model.path` names: a diffusers folder, a single file, or a hub id; and whether it is SDXL, told unloaded."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from sdxl_trainer.cache.models.single_file_check import (
    SDXL_CONFIG_FOLDER,
    find_single_file_problems,
    load_component_configs,
)
from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.configs.schema import ModelConfig

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
HUB_ID = re.compile(r"[\w][\w.\-]*/[\w][\w.\-]*")
HUB_FILES = [
    "*.json",
    "*.txt",
    "*/*.json",
    "*/*.txt",
    "unet/*.safetensors",
    "vae/*.safetensors",
    "text_encoder*/*.safetensors",
]


@dataclass(frozen=True)
class ModelSource:
    """A model on disk: a single file if `file` is set, else a diffusers folder; `folder` has the configs either way."""

    folder: Path
    file: Path | None = None

    def read_config(self, component: str) -> dict:
        """A component's `config.json`."""
        return json.loads((self.folder / component / "config.json").read_text())


def check_model(config: ModelConfig) -> list[Problem]:
    """What is wrong with the model settings, from names and headers alone."""
    problems = _check_path(config)
    is_hub_vae = HUB_ID.fullmatch(config.vae or "") and not is_missing_path(config.vae or "")
    if config.vae and not Path(config.vae).is_dir() and not is_hub_vae:
        problems.append(
            Problem("model.vae", config.vae, "is neither a folder nor a hub id", "give a diffusers VAE folder")
        )
    if config.tokenizer and not (config.tokenizer / "vocab.json").is_file():
        problems.append(
            Problem("model.tokenizer", config.tokenizer, "has no vocab.json", "give a CLIP tokenizer folder")
        )
    return problems


def _check_path(config: ModelConfig) -> list[Problem]:
    cure = "give a diffusers folder, a single .safetensors file, or a hub id of an SDXL model"
    path = Path(config.path)
    if not config.path:
        return [Problem("model.path", None, "is needed", cure)]
    if path.is_dir():
        return [Problem("model.path", config.path, rule, cure) for rule in _describe_folder(path)]
    if path.is_file():
        return _check_single_file(config, path, cure)
    if is_missing_path(config.path):
        rule = f"does not exist, and {path.parts[0]} is a folder here, so that it is not looked for on the hub"
        return [Problem("model.path", config.path, rule, "check the path")]
    if HUB_ID.fullmatch(config.path) and not config.path.endswith(".safetensors"):
        return []  # only the hub can tell, and only when it is asked for the model
    return [Problem("model.path", config.path, "is neither a file nor a folder", cure)]


def is_missing_path(path: str) -> bool:
    """Whether something that has the form of a hub id, and does not exist, lies in a folder that does."""
    return HUB_ID.fullmatch(path) is not None and not Path(path).exists() and Path(path).parent.is_dir()


def is_local(config: ModelConfig) -> bool:
    """Whether the model lies on disk, and not on the hub."""
    return Path(config.path).exists()


def resolve_model(config: ModelConfig) -> ModelSource:
    """Where a checked model lies; a hub id is fetched, or found in the hub's local cache.

    Raises:
        UserInputError: the hub does not have it, or cannot be reached.
    """
    local = Path(config.path)
    if local.is_dir():
        return ModelSource(local)
    if local.is_file():
        return ModelSource(config.config or SDXL_CONFIG_FOLDER, local)
    return ModelSource(fetch_from_hub("model.path", config.path))


def fetch_from_hub(key: str, name: str) -> Path:
    """Folder of a hub repository's files, downloaded unless they are in the local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        cure = "check the name and the network, or give a local path"
        raise UserInputError([Problem(key, name, f"cannot be had from the hub: {reason}", cure)]) from None


def _check_single_file(config: ModelConfig, path: Path, cure: str) -> list[Problem]:
    folder = config.config or SDXL_CONFIG_FOLDER
    lacking = [name for name in COMPONENTS if not (folder / name / "config.json").is_file()]
    if lacking:
        rule = f"lacks {', '.join(f'{name}/config.json' for name in lacking)}"
        return [Problem("model.config", folder, rule, "give a folder in diffusers layout")]
    if config.config is None:
        cure += "; for one of another shape than SDXL base, set model.config to the folder of its components' configs"
    return [
        Problem("model.path", config.path, rule, cure)
        for rule in find_single_file_problems(path, load_component_configs(folder))
    ]


def _describe_folder(folder: Path) -> list[str]:
    """Why a folder is not an SDXL model in diffusers layout; empty if it is one."""
    missing = [name for name in COMPONENTS if not (folder / name / "config.json").is_file()]
    if missing:
        return [
            f"is not an SDXL model in diffusers layout: it lacks {', '.join(f'{name}/config.json' for name in missing)}"
        ]
    weightless = [name for name in COMPONENTS if not list((folder / name).glob("*.safetensors"))]
    reasons = [f"has no safetensors weights in {name}/" for name in weightless]
    source = ModelSource(folder)
    unet, vae = source.read_config("unet"), source.read_config("vae")
    if unet.get("addition_embed_type") != "text_time":
        reasons.append("has a U-Net without SDXL's text_time conditioning (SD 1.5 or SD 2?)")
    if unet.get("in_channels") != 4:
        reasons.append(f"has a U-Net with {unet.get('in_channels')} input channels instead of 4 (an inpainting model?)")
    if vae.get("latent_channels") != 4:
        reasons.append(f"has a VAE with {vae.get('latent_channels')} latent channels instead of 4")
    widths = [source.read_config(name).get("hidden_size", 0) for name in ("text_encoder", "text_encoder_2")]
    if unet.get("cross_attention_dim") != sum(widths):
        reasons.append(
            f"has text encoders of width {widths[0]} + {widths[1]}, not the U-Net's {unet.get('cross_attention_dim')}"
        )
    return reasons
