"""Whether the settings of what is trained fit the networks, told from the model's configs before a weight is loaded."""

from typing import Any

import torch

from sdxl_trainer.cache.models.source import ModelSource, is_local, resolve_model
from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.train.networks.adapters import add_adapters
from sdxl_trainer.train.networks.parameter_groups import build_parameter_groups
from sdxl_trainer.train.networks.trained_networks import TrainedNetworks, list_trained_encoders, unfreeze_text_encoder


def check_trained(config: Config) -> list[Problem]:
    """Patterns that find no parameter, adapters for layers that do not exist, learning rates that leave nothing to
    train. What is on the hub is looked at when it has been fetched."""
    optim = config.optim
    if not (optim.groups or optim.block_lrs or config.lora.rank) or not is_local(config.model):
        return []
    source = resolve_model(config.model)
    networks = build_shapes(source, list_trained_encoders(optim))
    try:
        if config.lora.rank:
            add_adapters(dict(networks.named_children()), config.lora)
        build_parameter_groups(networks, optim, source.read_config("unet"))
    except UserInputError as error:
        return error.problems
    return []


def build_shapes(source: ModelSource, trained: list[str]) -> TrainedNetworks:
    """The networks that are trained, without values: names and shapes alone."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kinds: dict[str, Any] = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(source.read_config("unet"))
        encoders = {name: kinds[name](CLIPTextConfig(**source.read_config(name))) for name in trained}
    for encoder in encoders.values():
        unfreeze_text_encoder(encoder, gradient_checkpointing=False)
    return TrainedNetworks(unet, **encoders)
