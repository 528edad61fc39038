"""Locate and check the model of `model.path`: a diffusers folder, a single file or a hub id."""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_trainer.cache.models.adaptation import ChannelAdaptation
from sdxl_trainer.cache.models.single_file_check import (
    SDXL_CONFIG_FOLDER,
    NotSafetensorsError,
    find_single_file_problems,
    fit_unet_config,
    guess_foreign_format,
    has_all_components,
    load_component_configs,
    read_component_config,
    read_json_object,
    read_safetensors_header,
)
from sdxl_trainer.cache.models.vae_config import (
    VAE_CURE,
    BadVaeError,
    check_vae_config,
    read_file_config,
    read_folder_config,
)
from sdxl_trainer.configs.paths import CHECK_PATH
from sdxl_trainer.configs.problems import Problem, UserInputError, join_reasons
from sdxl_trainer.configs.schema import ModelConfig
from sdxl_trainer.data.text.tokens import VOCABULARY_FILES, has_vocabulary

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
# Sampling and exported diffusers folders need these files besides the components' configs.
PIPELINE_FILES = ("model_index.json", "scheduler/scheduler_config.json")
PATH_CURE = "give a diffusers folder, a single .safetensors file, or a hub id of an SDXL model"
MAX_REASONS = 6  # of one model that a message lists
HUB_ID = re.compile(r"[\w][\w.\-]*/[\w][\w.\-]*")
HUB_ADDRESS = re.compile(r"https?://huggingface\.co/([\w.\-]+/[\w.\-]+)")
HUB_SCHEME = re.compile(r"https?:/")  # of an address, perhaps after it went through a path
HUB_SECONDS = 10.0  # to wait for the hub's answer
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
    """A model on disk: a single file if `file` is set, else a diffusers folder. `folder` always holds the configs.

    With `adaptation`, its U-Net has new first and last layers, for another number of channels than is stored.
    """

    folder: Path
    file: Path | None = None
    adaptation: ChannelAdaptation | None = None

    def read_config(self, component: str) -> dict[str, Any]:
        """Return the config of a component, that of the U-Net with its adaptation.

        Raises:
            ValueError: a file is not a JSON object, or the single file holds no VAE.
        """
        config = self.read_stored_config(component)
        return self.adaptation.adapt_config(config) if self.adaptation and component == "unet" else config

    def read_stored_config(self, component: str) -> dict[str, Any]:
        """Return the config of a component as it is stored: `config.json`, corrected by what a single file holds.

        Raises:
            OSError: the single file cannot be opened.
            ValueError: the config is not a JSON object, or the single file is not a model.
        """
        if component == "vae" and self.file is not None:
            return read_file_config(self.file, self.folder)
        config = read_component_config(self.folder, component)
        if component == "unet" and self.file is not None:
            return fit_unet_config(config, read_safetensors_header(self.file).shapes)
        return config


def check_model(config: ModelConfig) -> Iterator[Problem]:
    """Yield the problems of the model settings that show in names, configs and headers, without loading the model."""
    of_path = list(_check_path(config))
    yield from of_path
    own = resolve_model(config).read_config("vae") if not of_path and is_local(config) else None
    yield from _check_vae(config, own)
    if config.tokenizer and not has_vocabulary(config.tokenizer):
        yield Problem("model.tokenizer", config.tokenizer, f"has no {VOCABULARY_FILES}", "give a CLIP tokenizer folder")


def _check_path(config: ModelConfig) -> Iterator[Problem]:
    path = Path(config.path)
    if path.is_file():
        yield from _check_single_file(config, path)
    elif is_missing_path(config.path):
        rule = f"does not exist; it is not looked up on the hub, because the folder {path.parts[0]} exists here"
        yield Problem("model.path", config.path, rule, CHECK_PATH)
    elif problems := _find_path_problems(config.path):
        files = sorted(path.glob("*.safetensors")) if config.path and path.is_dir() else []
        cure = f"give the file itself, such as {files[0]}" if files else PATH_CURE
        yield Problem("model.path", config.path or None, join_reasons(problems, MAX_REASONS), cure)


def _check_vae(config: ModelConfig, own: dict[str, Any] | None) -> Iterator[Problem]:
    """Check the VAE of the settings, unless it is on the hub.

    Args:
        own: the config of the model's own VAE; None if it is unknown.
    """
    if config.vae is None:
        yield from () if own is None else check_vae_config(own, config)
        return
    path = Path(config.vae)
    if not path.exists():
        if not HUB_ID.fullmatch(config.vae) or is_missing_path(config.vae):
            whole = path.is_absolute()
            rule = f"is neither a file, a folder nor a hub id{'' if whole else ', relative to the working directory'}"
            yield Problem("model.vae", config.vae, rule, VAE_CURE)
        return
    try:
        chosen = read_file_config(path) if path.is_file() else read_folder_config(path)
    except BadVaeError as error:
        yield Problem("model.vae", config.vae, str(error), error.cure)
        return
    yield from check_vae_config(chosen, config)


def _find_path_problems(path: str) -> list[str]:
    """List the reasons why a path is neither a diffusers folder of an SDXL model nor a hub id."""
    if not path:
        return ["must be set"]
    if Path(path).is_dir():
        return _find_folder_problems(Path(path))
    # The hub is asked only when the model is fetched.
    if HUB_ID.fullmatch(path) and not path.endswith(".safetensors"):
        return []
    if "://" in path:
        hub = HUB_ADDRESS.match(path)
        return [f"is an address, not a path{f'; the hub id in it is {hub[1]}' if hub else ''}"]
    whole = Path(path).is_absolute()
    return [f"is neither a file nor a folder{'' if whole else ', relative to the working directory'}"]


def is_missing_path(path: str) -> bool:
    """Return whether a path looks like a hub id but is a missing local path: its folder exists, the path does not."""
    return HUB_ID.fullmatch(path) is not None and not Path(path).exists() and Path(path).parent.is_dir()


def may_be_hub_id(name: str) -> bool:
    """Return whether a name that is no path here may be a model on the hub, by its form."""
    is_file = name.endswith(".safetensors") or is_missing_path(name)
    return (HUB_ID.fullmatch(name) is not None and not is_file) or HUB_SCHEME.match(name) is not None


def is_local(config: ModelConfig) -> bool:
    """Return whether the model is on disk rather than on the hub."""
    return Path(config.path).exists()


def is_vae_local(config: ModelConfig) -> bool:
    """Return whether the VAE of the settings is on disk rather than on the hub."""
    return Path(config.vae or config.path).exists()


def resolve_model(config: ModelConfig) -> ModelSource:
    """Return the location of a checked model. A hub id is downloaded, or found in the hub's local cache.

    Raises:
        UserInputError: the hub does not have the model, or cannot be reached.
    """
    local = Path(config.path)
    if local.is_dir():
        return ModelSource(local)
    if local.is_file():
        return ModelSource(config.config or SDXL_CONFIG_FOLDER, local)
    return ModelSource(fetch_from_hub("model.path", config.path))


def fetch_from_hub(key: str, name: str) -> Path:
    """Return the folder of a hub repository's files, downloaded unless they are in the local cache.

    Args:
        key: dotted key of the setting, for the error.

    Raises:
        UserInputError: the hub does not have the repository, or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserInputError([_describe_absence(key, name, error)]) from None


def check_hub_id(config: ModelConfig) -> Iterator[Problem]:
    """Yield a problem if `model.path` is no path here, but a hub id that the hub has no model for.

    The hub is not asked for a model that is in its local cache.
    """
    if Path(config.path).exists() or list(_check_path(config)):
        return
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HTTPError  # of its library for HTTP, which depends on the version

    if isinstance(try_to_load_from_cache(config.path, PIPELINE_FILES[0]), str):
        return
    try:
        HfApi().model_info(config.path, timeout=HUB_SECONDS)
    except (HTTPError, OSError, ValueError) as error:
        yield _describe_absence("model.path", config.path, error)


def _describe_absence(key: str, name: str, error: Exception) -> Problem:
    """Return the problem of a name that is no path here, and that the hub does not give."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    cure = "check the path; or, if the hub has this model, the network"
    if isinstance(error, (GatedRepoError, RepositoryNotFoundError)):
        cure = (
            "check the path or the name; a private or gated model needs a login: hf auth login, or HF_TOKEN in the "
            "environment"
        )
    return Problem(key, name, f"does not exist here, and cannot be downloaded from the hub: {reason}", cure)


def _check_single_file(config: ModelConfig, path: Path) -> Iterator[Problem]:
    folder = config.config or SDXL_CONFIG_FOLDER
    missing = _list_missing_configs(folder)
    if missing:
        yield Problem("model.config", folder, f"lacks {', '.join(missing)}", "give a folder in diffusers layout")
        return
    try:
        configs = _load_configs(folder)
    except ValueError as error:
        yield Problem("model.config", folder, f"cannot be used: {error}", "repair the file")
        return
    try:
        shapes = read_safetensors_header(path).shapes
    except NotSafetensorsError as error:
        yield Problem("model.path", config.path, str(error), error.cure)
        return
    with suppress(BadVaeError):  # reported with the other networks
        configs["vae"] = read_file_config(path, folder)
    problems = find_single_file_problems(path, configs)
    cure = PATH_CURE
    if guess_foreign_format(shapes):
        problems = problems[:1]  # the tensors that it lacks say nothing more
    elif problems and config.config is None and has_all_components(shapes):
        problems = [f"has SDXL's networks in other sizes than SDXL base: {problems[0]}"]
        cure = "set model.config to the folder with this model's configs: the folder that its training started from"
    if problems:
        yield Problem("model.path", config.path, join_reasons(problems, MAX_REASONS), cure)


def _list_missing_configs(folder: Path) -> list[str]:
    files = (*(f"{name}/config.json" for name in COMPONENTS), *PIPELINE_FILES)
    return [file for file in files if not (folder / file).is_file()]


def _load_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Load the configs of the components, and check the pipeline's files.

    Raises:
        ValueError: a file is not a JSON object.
    """
    for file in PIPELINE_FILES:
        read_json_object(folder / file)
    return load_component_configs(folder)


def _read_pipeline_class(folder: Path) -> str:
    """Return the pipeline that a diffusers folder names, or an empty string."""
    try:
        return str(read_json_object(folder / "model_index.json").get("_class_name", ""))
    except (OSError, ValueError):
        return ""  # reported with the other files


def _find_folder_problems(folder: Path) -> list[str]:
    """List the reasons why a folder is not an SDXL model in diffusers layout."""
    missing = _list_missing_configs(folder)
    kind = _read_pipeline_class(folder)
    if kind and not kind.startswith("StableDiffusionXL"):
        return [f"is a model of {kind}, not of StableDiffusionXLPipeline"]
    if missing:
        return [f"is not an SDXL model in diffusers layout: it lacks {', '.join(missing)}"]
    weightless = [name for name in COMPONENTS if not list((folder / name).glob("*.safetensors"))]
    problems = [f"has no safetensors weights in {', '.join(f'{name}/' for name in weightless)}"] if weightless else []
    try:
        configs = _load_configs(folder)
    except ValueError as error:
        return [*problems, f"cannot be used: {error}"]
    unet = configs["unet"]
    if unet.get("addition_embed_type") != "text_time":
        problems.append("has a U-Net without SDXL's text_time conditioning (SD 1.5 or SD 2?)")
    channels = [unet.get("in_channels"), unet.get("out_channels")]
    if channels[0] != channels[1]:
        problems.append(
            f"has a U-Net with {channels[0]} input channels and {channels[1]} output channels (an inpainting model?)"
        )
    widths = [configs[name].get("hidden_size", 0) for name in ("text_encoder", "text_encoder_2")]
    if unet.get("cross_attention_dim") != sum(widths):
        problems.append(
            f"has text encoders of width {widths[0]} + {widths[1]}, not the U-Net's {unet.get('cross_attention_dim')}"
        )
    return problems
