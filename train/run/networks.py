"""The networks of a run: load them, add adapters, group parameters, and build the engine over them."""

from collections.abc import Iterator
from typing import Any

import torch

from sdxl_trainer.cache.models.encoders import TextEncoders, load_text_encoders
from sdxl_trainer.cache.models.source import ModelSource, is_local, resolve_model
from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.configs.schema import Config, TrainConfig
from sdxl_trainer.data.order.keyed_random import RandomStream, derive_seed
from sdxl_trainer.launch.distributed import Ranks
from sdxl_trainer.train.engine.deepspeed_config import DTYPES, BatchSizes
from sdxl_trainer.train.engine.engine import Engine
from sdxl_trainer.train.networks.adapters import add_adapters
from sdxl_trainer.train.networks.conditioning import LazyTextConditioner, TextConditioner
from sdxl_trainer.train.networks.parameter_groups import build_parameter_groups
from sdxl_trainer.train.networks.trained_networks import (
    ENCODERS,
    TrainedNetworks,
    list_trained_encoders,
    load_unet,
    unfreeze_text_encoder,
)
from sdxl_trainer.train.optim.optimizers import build_optimizer


def compute_batch_sizes(train: TrainConfig, world_size: int) -> BatchSizes:
    """Return the batch sizes of the settings for a number of ranks."""
    accumulation_steps = train.global_batch_size // (train.micro_batch_size * world_size)
    return BatchSizes(train.global_batch_size, train.micro_batch_size, accumulation_steps)


def build_networks(config: Config, source: ModelSource, ranks: Ranks) -> tuple[Engine, TextConditioner]:
    """Load the networks to this rank's device.

    Returns:
        The engine over all trained networks, and the text conditioner, whose encoders may be among the trained ones.
    """
    dtype = DTYPES[config.engine.precision]

    def load_frozen() -> TextEncoders:
        encoder, encoder_2 = load_text_encoders(source, config.model)
        return TextEncoders(encoder.to(ranks.device, dtype), encoder_2.to(ranks.device, dtype))

    loaded = None if config.cache.text else load_text_encoders(source, config.model)
    encoders: dict[str, Any] = dict(zip(ENCODERS, loaded, strict=True)) if loaded else {}
    trained = list_trained_encoders(config.optim)
    for name, encoder in encoders.items():
        if name in trained:
            unfreeze_text_encoder(encoder, config.engine.gradient_checkpointing)
        else:
            encoder.to(ranks.device, dtype)
    unet = load_unet(source, config.engine, ranks.device)
    networks = TrainedNetworks(unet, **{name: encoders[name] for name in trained})
    if config.lora.rank:
        add_adapters(dict(networks.named_children()), config.lora, derive_seed(config.run.seed, RandomStream.ADAPTER))
    networks.to(ranks.device)
    groups = build_parameter_groups(networks, config.optim, source.read_config("unet"))
    seed = derive_seed(config.run.seed, RandomStream.ROUNDING, ranks.rank)
    optimizer = build_optimizer(groups, config.optim, config.engine, seed)
    batch_sizes = compute_batch_sizes(config.train, ranks.world_size)
    engine = Engine(networks, optimizer, config.engine, batch_sizes, config.optim.max_grad_norm, config.ema)
    return engine, TextConditioner(loaded, trained) if loaded else LazyTextConditioner(load_frozen)


def check_trained_parameters(config: Config) -> Iterator[Problem]:
    """Yield patterns that match no parameter, adapters of layers that do not exist, and rates that train nothing.

    A model on the hub is not checked, because its configs are not available before the download.
    """
    optim = config.optim
    if not (optim.groups or optim.block_lrs or config.lora.rank) or not is_local(config.model):
        return
    source = resolve_model(config.model)
    networks = build_empty_networks(source, list_trained_encoders(optim))
    try:
        if config.lora.rank:
            add_adapters(dict(networks.named_children()), config.lora)
        build_parameter_groups(networks, optim, source.read_config("unet"))
    except UserInputError as error:
        yield from error.problems


def build_empty_networks(source: ModelSource, trained: list[str]) -> TrainedNetworks:
    """Build the trained networks on the meta device: parameters with names and shapes, without values."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kinds: dict[str, Any] = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(source.read_config("unet"))
        encoders = {name: kinds[name](CLIPTextConfig(**source.read_config(name))) for name in trained}
    for encoder in encoders.values():
        unfreeze_text_encoder(encoder, gradient_checkpointing=False)
    return TrainedNetworks(unet, **encoders)
