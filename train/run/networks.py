"""The networks of a run: load them, add adapters, group parameters, and build the engine over them."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from sdxl_trainer.cache.models.components import hash_component
from sdxl_trainer.cache.models.encoders import load_text_encoders
from sdxl_trainer.cache.models.model_pair import describe_adaptation, resolve_pair
from sdxl_trainer.cache.models.source import ModelSource, is_local
from sdxl_trainer.configs.problems import Problem, UserInputError, format_count, raise_if_any
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.order.keyed_random import RandomStream, derive_seed
from sdxl_trainer.launch.activity import ACTIVITY
from sdxl_trainer.launch.distributed import Ranks, broadcast_object
from sdxl_trainer.train.checkpoint.resume import check_base_model, restore_engine
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.engine.deepspeed_config import DTYPES, compute_batch_sizes
from sdxl_trainer.train.engine.engine import Engine
from sdxl_trainer.train.networks.adapters import add_adapters
from sdxl_trainer.train.networks.blocks import choose_offloaded_blocks
from sdxl_trainer.train.networks.compilation import compile_unet
from sdxl_trainer.train.networks.conditioning import LazyTextConditioner, TextConditioner
from sdxl_trainer.train.networks.empty_networks import build_empty_run_networks
from sdxl_trainer.train.networks.parameter_groups import build_parameter_groups
from sdxl_trainer.train.networks.quantised_base import quantise_base
from sdxl_trainer.train.networks.trained_networks import (
    ENCODERS,
    TrainedNetworks,
    list_trained_encoders,
    load_unet,
    read_trained_weights,
    unfreeze_text_encoder,
)
from sdxl_trainer.train.optim.optimizers import build_optimizer


def build_networks(config: Config, source: ModelSource, ranks: Ranks) -> tuple[Engine, TextConditioner]:
    """Load the networks to this rank's device, in the precision of training.

    Returns:
        The engine over all trained networks, and the text conditioner, whose encoders may be among the trained ones.
    """
    dtype = DTYPES[config.engine.precision]
    load_encoders = partial(load_text_encoders, source, config.model, ranks.device, dtype)
    loaded = None if config.cache.text else load_encoders()
    encoders: dict[str, Any] = dict(zip(ENCODERS, loaded, strict=True)) if loaded else {}
    trained = list_trained_encoders(config.optim)
    for name in trained:
        unfreeze_text_encoder(encoders[name], config.engine.gradient_checkpointing == "full")
    unet = load_unet(source, config.engine, ranks.device, dtype)
    networks = TrainedNetworks(unet, **{name: encoders[name] for name in trained})
    if config.lora.rank:
        add_adapters(dict(networks.named_children()), config.lora, derive_seed(config.run.seed, RandomStream.ADAPTER))
        quantise_base(unet, config.lora.quantised_base)
    networks.compilation = compile_unet(unet, config.engine.compile)
    ACTIVITY.enter("starting the engine")
    groups = build_parameter_groups(networks, config.optim, source.read_config("unet"), config.lora.b_lr_ratio)
    if not config.engine.gradient_release:
        logger.info("starting DeepSpeed on {}", format_count(ranks.world_size, "rank"))
    # With gradient release every rank updates all weights, and must round them alike.
    shard = 0 if config.engine.gradient_release else ranks.rank
    seed = derive_seed(config.run.seed, RandomStream.ROUNDING, shard)
    engine = Engine(
        networks,
        build_optimizer(groups, config.optim, config.engine, seed),
        config.engine,
        compute_batch_sizes(config.train, ranks.world_size),
        config.optim.max_grad_norm,
        config.ema,
        () if config.lora.rank else read_trained_weights(networks, source, config.model.text_projection),
    )
    return engine, TextConditioner(loaded, trained) if loaded else LazyTextConditioner(load_encoders)


def load_frozen_networks(config: Config, source: ModelSource, ranks: Ranks) -> tuple[TrainedNetworks, TextConditioner]:
    """Load networks for passes without gradients: the U-Net, and the text encoders unless text is cached."""
    dtype = DTYPES[config.engine.precision]
    load_encoders = partial(load_text_encoders, source, config.model, ranks.device, dtype)
    conditioner = LazyTextConditioner(load_encoders) if config.cache.text else TextConditioner(load_encoders())
    networks = TrainedNetworks(load_unet(source, config.engine, ranks.device, dtype))
    networks.to(ranks.device, dtype).eval().requires_grad_(False)
    return networks, conditioner


def load_engine(
    config: Config, source: ModelSource, state: TrainState, ranks: Ranks, checkpoint: Path | None
) -> tuple[Engine, TextConditioner]:
    """Load the networks, restore the checkpoint if there is one, and note the base model in the state.

    Raises:
        UserInputError: the checkpoint belongs to another base model, or these ranks cannot load it.
    """
    ACTIVITY.enter("loading the networks")
    logger.info("loading the networks")
    if config.model.adapt_channels and checkpoint is None:
        logger.info("model.adapt_channels: {}", describe_adaptation(config, source))
    engine, conditioner = build_networks(config, source, ranks)
    state.base_model = hash_frozen_networks(engine, config, source, ranks)
    if checkpoint:
        raise_if_any(check_base_model(config.model, state.base_model, TrainState.load(checkpoint)))
        ACTIVITY.enter("restoring the checkpoint")
        restore_engine(engine, checkpoint)
    return engine, conditioner


def hash_frozen_networks(engine: Engine, config: Config, source: ModelSource, ranks: Ranks) -> dict[str, str]:
    """Return the hash of each network of the base model whose weights train frozen, all or some: network → hash.

    Checkpoints do not hold those weights, so a resume needs the same base model. All ranks call this together.
    """
    parameters = engine.model.named_parameters()
    frozen = {name.partition(".")[0] for name, parameter in parameters if not parameter.requires_grad}
    if not config.cache.text:
        frozen.update(set(ENCODERS).difference(list_trained_encoders(config.optim)))
    hashes: dict[str, str] = {}
    if ranks.is_main:
        hashes = {name: hash_component(source, name, config.model.text_projection) for name in sorted(frozen)}
    return broadcast_object(hashes)


def check_trained_parameters(config: Config) -> Iterator[Problem]:
    """Yield patterns that match no parameter, layers and blocks that do not exist, and rates that train nothing.

    A model on the hub is not checked, because its configs are not available before the download.
    """
    optim = config.optim
    is_checked = optim.groups or optim.block_lrs or config.lora.rank or config.engine.offload_blocks
    if not is_checked or not is_local(config.model):
        return
    try:
        networks = build_empty_run(config)
        if config.engine.offload_blocks:
            choose_offloaded_blocks(networks.unet, config.engine.offload_blocks)
    except UserInputError as error:
        yield from error.problems


def list_trained_shapes(config: Config) -> list[torch.Size]:
    """List the shapes of the weights that a run with these settings trains; none for a model that is not on disk.

    Raises:
        UserInputError: the settings train nothing.
        OSError, ValueError, KeyError: the model has no usable configs.
    """
    if not is_local(config.model):
        return []
    return [weight.shape for weight in build_empty_run(config).parameters() if weight.requires_grad]


def build_empty_run(config: Config) -> TrainedNetworks:
    """Build the trained networks of a run on the meta device, in fp32.

    Raises:
        UserInputError: a pattern or a target of adapters matches nothing, or every learning rate is 0.
    """
    return build_empty_run_networks(resolve_pair(config), config, torch.float32)
