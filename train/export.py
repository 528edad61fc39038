"""Writes the trained model in the forms that other programs read."""

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

import torch
from loguru import logger

from sdxl_trainer.cache.encoders import load_vae
from sdxl_trainer.cache.model_source import COMPONENTS, ModelSource
from sdxl_trainer.cache.single_file import (
    TensorSource,
    build_modelspec,
    list_sources,
    prediction_marks,
    read_carried,
    write_single_file,
)
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.launch.distributed import Ranks, barrier
from sdxl_trainer.train.conditioning import TextConditioner
from sdxl_trainer.train.engine import Engine

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export_single_file(
    path: Path, engine: Engine, conditioner: TextConditioner, source: ModelSource, config: Config, ranks: Ranks
) -> None:
    """Write U-Net, text encoders and VAE as one safetensors file in SDXL's layout.

    The U-Net's weights are gathered one by one, so no rank ever holds them all in fp32. All ranks call it together.
    """
    names = list_sources("unet", source.read_config("unet"))
    if ranks.is_main:
        unet = {name: lambda name=name: engine.gather_weight(f"unet.{name}") for name in names}
        write_model(path, unet, conditioner, source, config)
    else:
        for name in names:
            engine.gather_weight(f"unet.{name}")
    barrier()


def write_model(
    path: Path, unet: Mapping[str, TensorSource], conditioner: TextConditioner, source: ModelSource, config: Config
) -> None:
    """Write the single file from this process alone. `unet`: name → tensor, or function that returns it."""
    configs = {name: source.read_config(name) for name in COMPONENTS}
    components = {
        "unet": unet,
        "text_encoder": conditioner.encoder.state_dict(),
        "text_encoder_2": conditioner.encoder_2.state_dict(),
        "vae": load_vae(source, config.model).state_dict(),
    }
    side = config.data.resolution_px
    objective = config.objective
    metadata = build_modelspec(
        config.run.name,
        (side, side),
        objective.prediction,
        datetime.now(timezone.utc),
        timestep_range=(objective.min_timestep, objective.max_timestep - 1),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_single_file(
        path,
        components,
        configs,
        dtype=DTYPES[config.checkpoint.export_dtype],
        metadata=metadata,
        text_projection=config.model.text_projection,
        marks=prediction_marks(objective.prediction, objective.zero_terminal_snr),
        extra=read_carried(source.file) if source.file else None,
    )
    logger.info("model {}", path)
