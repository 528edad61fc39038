"""Export of the trained model as a single file, a diffusers folder, or adapters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
from loguru import logger

from sdxl_trainer.cache.models.components import open_component
from sdxl_trainer.cache.models.diffusers_folder import write_diffusers_folder
from sdxl_trainer.cache.models.encoders import PAD_TOKENS, find_vocabulary
from sdxl_trainer.cache.models.single_file import (
    build_modelspec,
    list_prediction_marks,
    read_carried_tensors,
    write_single_file,
)
from sdxl_trainer.cache.models.single_file_names import COMPONENT_PREFIXES, get_canonical_name, list_source_names
from sdxl_trainer.cache.models.source import COMPONENTS, ModelSource
from sdxl_trainer.cache.models.tensor_stream import TensorSource
from sdxl_trainer.cache.models.vae import load_vae, read_vae_config
from sdxl_trainer.cache.models.vae_config import FLUX2_AUTOENCODER, build_exported_vae_config, build_vae_metadata
from sdxl_trainer.configs.lora import LoraConfig
from sdxl_trainer.configs.objective import ObjectiveConfig
from sdxl_trainer.configs.schema import Config, ModelConfig
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.launch.activity import ACTIVITY
from sdxl_trainer.launch.distributed import Ranks, wait_for_ranks
from sdxl_trainer.train.engine.engine import Engine
from sdxl_trainer.train.export.about import describe_about
from sdxl_trainer.train.networks.adapter_files import write_adapters
from sdxl_trainer.train.objective.timesteps import resolve_shift
from sdxl_trainer.train.sampling.parameters import name_step_file

EXPORT_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Component → name → tensor, or a function that returns the tensor.
Weights = Mapping[str, Mapping[str, TensorSource]]


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Everything that determines a model file besides the trained weights."""

    source: ModelSource  # the base model, for the components' configs and the scheduler
    model: ModelConfig
    objective: ObjectiveConfig  # declared by the file, so that other programs sample with the right prediction type
    lora: LoraConfig
    dtype: torch.dtype
    title: str
    size: Size  # resolution that the file declares
    about: Mapping[str, str] = field(default_factory=dict)  # what else a person says about it, by modelspec's keys
    metadata: Mapping[str, str] = field(default_factory=dict)  # of a single file, besides what it always declares


def build_export_settings(config: Config, source: ModelSource) -> ExportSettings:
    """Build the export settings of a run."""
    return ExportSettings(
        source=source,
        model=config.model,
        objective=config.objective,
        lora=config.lora,
        dtype=EXPORT_DTYPES[config.checkpoint.export_dtype],
        title=config.about.title or config.run.name,
        size=Size(*config.data.largest_size),
        about=describe_about(config.about),
    )


def export_model(
    path: Path,
    engine: Engine,
    settings: ExportSettings,
    ranks: Ranks,
    average: str | None = None,
    break_off_if_stopped: Callable[[], None] = lambda: None,
) -> None:
    """Write U-Net, text encoders and VAE as a single file or diffusers folder, or the adapters if the run trains them.

    Trained weights are gathered one tensor at a time, so no rank ever holds all of them in fp32. Frozen weights are
    read from the base model, because the engine may keep them in 16 bit. All ranks must call this together.

    Args:
        path: a name that ends in .safetensors for a single file, else a folder.
        average: name of the moving average to write instead of the current weights.
        break_off_if_stopped: called after each gathered weight, equally often on all ranks; raises to end the work
            without a file.
    """

    def gather(parameter: str) -> torch.Tensor:
        weight = engine.weights.gather(parameter, average)
        ACTIVITY.note()  # progress of every rank
        break_off_if_stopped()
        return weight

    if settings.lora.rank:
        weights = {name: gather(name) for name in engine.weights.trained_names}
        if ranks.is_main:
            write_adapter_file(path, weights, settings)
        wait_for_ranks("the model file")
        return
    parameters = list_gathered_parameters(engine, settings.source)
    if ranks.is_main:
        weights = {
            component: {name: partial(gather, parameter) for name, parameter in names.items()}
            for component, names in parameters.items()
        }
        write_model(path, weights, settings)
    else:
        for parameter in (parameter for names in parameters.values() for parameter in names.values()):
            gather(parameter)
    wait_for_ranks("the model file")


def list_gathered_parameters(engine: Engine, source: ModelSource) -> dict[str, dict[str, str]]:
    """Map component → name → the engine's name of the parameter, for all trained parameters.

    The order is the one in which both format writers read the tensors. Each read is a collective, so all ranks must
    read the same tensors in the same order.
    """
    trained = {component: {} for component in COMPONENTS}
    for parameter in engine.weights.trained_names:
        component, _, name = parameter.partition(".")
        trained[component][get_canonical_name(component, name)] = parameter
    return {
        component: {
            name: names[name] for name in list_source_names(component, source.read_config(component)) if name in names
        }
        for component in COMPONENT_PREFIXES
        if (names := trained[component])
    }


def export_local_model(path: Path, engine: Engine, settings: ExportSettings) -> None:
    """Write the model with this rank's own copy of the trained weights, without collectives.

    The weights have the precision of training. Frozen weights are read from the base model.
    """
    state = engine.read_local_module()
    if settings.lora.rank:
        weights = {name: state[name] for name in engine.weights.trained_names}
        write_adapter_file(path, weights, settings)
        return
    parameters = list_gathered_parameters(engine, settings.source)
    weights = {
        component: {name: state[parameter] for name, parameter in names.items()}
        for component, names in parameters.items()
    }
    write_model(path, weights, settings)


def get_model_path(config: Config, step: int, average: str | None = None) -> Path:
    """Return the path of the exported model of a step, or of its moving average: a file or a diffusers folder."""
    name = name_step_file(step, config.lora.rank > 0, average)
    is_file = config.lora.rank or config.checkpoint.export_format == "single"
    return config.run.folder / "models" / (f"{name}.safetensors" if is_file else name)


def write_adapter_file(path: Path, weights: Mapping[str, torch.Tensor], settings: ExportSettings) -> None:
    """Write adapters as one file, with the run's name and prediction type in its metadata."""
    metadata = build_adapter_file_metadata(settings)
    write_adapters(path, weights, settings.source, settings.lora, settings.dtype, metadata)


def build_adapter_file_metadata(settings: ExportSettings) -> dict[str, str]:
    """Build the metadata of a file of adapters, besides their kind and rank."""
    name = {"ss_output_name": settings.title, "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
    return {**build_metadata(settings), **name}


def build_metadata(settings: ExportSettings) -> dict[str, str]:
    """Build the modelspec metadata of a file."""
    objective = settings.objective
    shift = resolve_shift(objective.timestep_shift, objective.timestep_shift_base_px, settings.size.pixels)
    modelspec = build_modelspec(
        settings.title,
        settings.size,
        objective.prediction,
        datetime.now(timezone.utc),
        timestep_range=(objective.min_timestep, objective.max_timestep - 1),
        flow_shift=shift if objective.prediction == "flow" else None,
        about={**settings.about, "title": settings.title},
    )
    return {**modelspec, **settings.metadata}


def write_model(path: Path, weights: Weights, settings: ExportSettings) -> None:
    """Write a model from this process. Tensors that `weights` does not contain are read from the base model."""
    components = open_components(settings.source, settings.model)
    for component, tensors in weights.items():
        components[component] |= tensors
    write_components(path, components, settings)


def write_components(path: Path, components: Weights, settings: ExportSettings) -> None:
    """Write a model as a single file if `path` ends in .safetensors, else as a diffusers folder.

    Both declare the prediction type: a file in its modelspec metadata and marker tensors, a folder in its scheduler's
    config.

    Raises:
        UserInputError: a folder is to be written, and the model has no vocabulary.
    """
    source, objective = settings.source, settings.objective
    vae_config = read_vae_config(source, settings.model)
    configs = {name: source.read_config(name) for name in COMPONENTS} | {"vae": build_exported_vae_config(vae_config)}
    if path.suffix != ".safetensors":
        from sdxl_trainer.train.sampling.schedulers import build_exported_scheduler

        write_diffusers_folder(
            path,
            components,
            configs,
            dtype=settings.dtype,
            scheduler=build_exported_scheduler(source, objective, settings.size),
            origin=source.folder,
            vocabularies={name: find_vocabulary(source, settings.model, name) for name in PAD_TOKENS},
        )
        logger.info("model written to {}, a diffusers folder in {}", describe_files(path), name_dtype(settings.dtype))
        return
    write_single_file(
        path,
        components,
        configs,
        dtype=settings.dtype,
        metadata={**build_metadata(settings), **build_vae_metadata(vae_config)},
        text_projection=settings.model.text_projection,
        marks=list_prediction_marks(objective.prediction, objective.zero_terminal_snr),
        extra=read_carried_tensors(source.file) if source.file else None,
    )
    logger.info("model written to {}, one file in {}", describe_files(path), name_dtype(settings.dtype))


def name_dtype(dtype: torch.dtype) -> str:
    """Return the name of a data type without its module, such as `float16`."""
    return str(dtype).removeprefix("torch.")


def describe_files(path: Path) -> str:
    """Return the path of a file or folder with its size: `x.safetensors (6.94 GB)`."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{path} ({sum(file.stat().st_size for file in files) / 1e9:.3g} GB)"


def open_components(source: ModelSource, config: ModelConfig) -> dict[str, dict[str, TensorSource]]:
    """Open all four components of a model on disk: component → name → function that reads the tensor.

    The VAE is `model.vae` if that is set. That one, and one of Flux2's class, which has more tensors, is loaded.
    """
    has_other_vae = config.vae or source.read_config("vae").get("_class_name") == FLUX2_AUTOENCODER
    components: dict[str, dict[str, TensorSource]] = {}
    for name in COMPONENTS:
        if name == "vae" and has_other_vae:
            components[name] = dict(load_vae(source, config).state_dict())
        else:
            components[name] = open_component(source, name, config.text_projection)
    return components
