"""Writes the trained model in the forms that other programs read."""

from collections.abc import Mapping
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
from loguru import logger

from sdxl_trainer.cache.models.diffusers_folder import open_folder_component, write_diffusers_folder
from sdxl_trainer.cache.models.encoders import load_vae
from sdxl_trainer.cache.models.single_file import (
    build_modelspec,
    list_prediction_marks,
    open_single_file,
    read_carried_tensors,
    write_single_file,
)
from sdxl_trainer.cache.models.single_file_names import COMPONENT_PREFIXES, get_canonical_name, list_source_names
from sdxl_trainer.cache.models.source import COMPONENTS, ModelSource
from sdxl_trainer.cache.models.tensor_stream import TensorSource
from sdxl_trainer.configs.schema import Config, ModelConfig
from sdxl_trainer.launch.distributed import Ranks, barrier
from sdxl_trainer.train.engine.engine import Engine
from sdxl_trainer.train.networks.adapters import write_adapters
from sdxl_trainer.train.networks.conditioning import TextConditioner

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


Weights = Mapping[str, Mapping[str, TensorSource]]  # component → name → tensor, or function that returns it


def export_model(
    path: Path,
    engine: Engine,
    conditioner: TextConditioner,
    source: ModelSource,
    config: Config,
    ranks: Ranks,
    average: str | None = None,
) -> None:
    """Write U-Net, text encoders and VAE in the form that `path` tells, or adapters if those are what is trained.

    What is trained is gathered tensor by tensor, so no rank ever holds it all in fp32. All ranks call it together.

    Args:
        average: write the moving average of this decay instead of the weights of the moment.
    """
    if config.lora.rank:
        weights = {name: engine.weights.gather(name, average) for name in engine.weights.trained_names}
        if ranks.is_main:
            write_adapters(path, weights, source, config.lora, DTYPES[config.checkpoint.export_dtype])
        barrier()
        return
    names = list_gathered_parameters(engine, conditioner, source)
    if ranks.is_main:
        weights = {
            component: {name: partial(engine.weights.gather, parameter, average) for name, parameter in found.items()}
            for component, found in names.items()
        }
        write_model(path, weights, conditioner, source, config)
    else:
        for parameter in (parameter for found in names.values() for parameter in found.values()):
            engine.weights.gather(parameter, average)
    barrier()


def list_gathered_parameters(
    engine: Engine, conditioner: TextConditioner, source: ModelSource
) -> dict[str, dict[str, str]]:
    """Component → name → the engine's parameter, of the U-Net and of text encoders that are trained.

    In the order in which the writers of both forms ask for them: each is a collective, which the other ranks join.
    """
    found = {}
    for component in COMPONENT_PREFIXES:
        if component == "unet" or component in conditioner.trained:
            parameters = getattr(engine.model, component).named_parameters()
            held = {get_canonical_name(component, name): f"{component}.{name}" for name, _ in parameters}
            names = list_source_names(component, source.read_config(component))
            found[component] = {name: held[name] for name in names if name in held}
    return found


def export_local_model(
    path: Path, engine: Engine, conditioner: TextConditioner, source: ModelSource, config: Config
) -> None:
    """Write what this rank's networks hold, in the precision of training and without the other ranks."""
    if config.lora.rank:
        weights = {
            name: weight for name, weight in engine.model.state_dict().items() if name in engine.weights.trained_names
        }
        write_adapters(path, weights, source, config.lora, DTYPES[config.checkpoint.export_dtype])
    else:
        write_model(path, {"unet": engine.model.unet.state_dict()}, conditioner, source, config)


def get_model_path(config: Config, step: int, average: str | None = None) -> Path:
    """Where the model of a step, or a moving average, goes: a file, or a folder in diffusers layout."""
    name = f"step-{step:08d}{'-lora' if config.lora.rank else ''}{f'-ema-{average}' if average else ''}"
    is_file = config.lora.rank or config.checkpoint.export_format == "single"
    return config.run.folder / "models" / (f"{name}.safetensors" if is_file else name)


def write_model(
    path: Path, weights: Weights, conditioner: TextConditioner, source: ModelSource, config: Config
) -> None:
    """Write the model from this process alone. Components that are not in `weights` are as they were loaded."""
    components = {
        "text_encoder": conditioner.encoders.encoder.state_dict(),
        "text_encoder_2": conditioner.encoders.encoder_2.state_dict(),
        "vae": load_vae(source, config.model).state_dict(),
        **weights,
    }
    write_components(path, components, source, config)


def write_components(
    path: Path, components: Mapping[str, Mapping[str, TensorSource]], source: ModelSource, config: Config
) -> None:
    """Write a model as one file if `path` ends in .safetensors, else as a diffusers folder, with what tells how it
    predicts: modelspec metadata and marks in a file, the scheduler in a folder."""
    configs = {name: source.read_config(name) for name in COMPONENTS}
    objective, dtype = config.objective, DTYPES[config.checkpoint.export_dtype]
    if path.suffix != ".safetensors":
        from sdxl_trainer.train.sampling.samplers import build_scheduler

        scheduler = dict(build_scheduler(source, objective).config)
        if objective.prediction == "flow":
            scheduler["_class_name"] = "FlowMatchEulerDiscreteScheduler"
        write_diffusers_folder(path, components, configs, dtype=dtype, scheduler=scheduler, origin=source.folder)
        logger.info("model {}", path)
        return
    metadata = build_modelspec(
        config.run.name,
        config.data.largest_size,
        objective.prediction,
        datetime.now(timezone.utc),
        timestep_range=(objective.min_timestep, objective.max_timestep - 1),
    )
    write_single_file(
        path,
        components,
        configs,
        dtype=dtype,
        metadata=metadata,
        text_projection=config.model.text_projection,
        marks=list_prediction_marks(objective.prediction, objective.zero_terminal_snr),
        extra=read_carried_tensors(source.file) if source.file else None,
    )
    logger.info("model {}", path)


def open_components(source: ModelSource, config: ModelConfig) -> dict[str, dict[str, TensorSource]]:
    """All four components of a model on disk: name → function that reads the tensor. Nothing is read yet."""
    if source.file is None:
        return {name: open_folder_component(source.folder, name) for name in COMPONENTS}
    return {
        name: open_single_file(source.file, name, source.read_config(name), text_projection=config.text_projection)
        for name in COMPONENTS
    }
