"""The sampling program: generate images for the prompts of a file with any model, and a contact sheet."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from loguru import logger

from sdxl_trainer.cache.models.encoders import load_text_encoders, load_tokenizers
from sdxl_trainer.cache.models.model_pair import check_pair, resolve_pair
from sdxl_trainer.cache.models.source import check_model
from sdxl_trainer.cache.models.vae import load_vae
from sdxl_trainer.configs.lora import LoraConfig
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.configs.problems import format_count, raise_if_any
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.launch.activity import ACTIVITY
from sdxl_trainer.launch.distributed import close_ranks, init_ranks, read_environment
from sdxl_trainer.launch.kernels import set_tf32, use_attention
from sdxl_trainer.launch.logger import init_logger
from sdxl_trainer.train.checkpoint.model_argument import (
    explain_removal,
    find_model_checkpoint,
    load_model_config,
    name_option,
    read_declared_prediction,
    read_declared_size,
)
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.engine.deepspeed_config import DTYPES
from sdxl_trainer.train.engine.saved_state import check_average, open_weights
from sdxl_trainer.train.networks.adapters import add_adapters
from sdxl_trainer.train.networks.conditioning import TextConditioner
from sdxl_trainer.train.networks.trained_networks import list_trained_encoders, load_unet, unfreeze_text_encoder
from sdxl_trainer.train.sampling.image_grid import build_image_grid, write_image
from sdxl_trainer.train.sampling.parameters import describe_image, name_model, name_step
from sdxl_trainer.train.sampling.pipeline import ImageGenerator, build_image_generator, generate_images
from sdxl_trainer.train.sampling.prompts import PROMPT_FILE_KEY, load_prompts


def run_sampling(
    model: str, prompt_file: Path, out: Path, cfg: Path | None, overrides: Sequence[str], average: str | None = None
) -> None:
    """Generate an image for each prompt of a file, and write the images and a contact sheet to `out`.

    The prompts are divided among the ranks.

    Args:
        model: single file, diffusers folder, hub id, checkpoint, or run folder.
        cfg: file with settings. Default: the settings of the checkpoint, or for a model the prediction that it
            declares.
        overrides: `key.sub=value` words that override the other settings.
        average: decay of the moving average to use instead of the checkpoint's weights.

    Raises:
        UserInputError: the settings, the model or the prompts are wrong; the message lists every problem.
    """
    rank = read_environment().rank
    init_logger(rank)
    checkpoint = find_model_checkpoint(Path(model), "--model")
    overrides = [f"sample.prompt_file={json.dumps(str(prompt_file))}", "sample.prompts=[]", *overrides]
    if checkpoint is None:
        overrides = [*list_model_overrides(model, has_cfg=cfg is not None), *overrides]
    config, problems = load_model_config(checkpoint, cfg, overrides)
    prompts, prompt_problems = load_prompts(config.sample, config.objective, config.data.caption.fix_text)
    if config.sample.prompt_file == prompt_file:  # and not that of an override
        prompt_problems = [
            replace(problem, key="--prompts") if problem.key == PROMPT_FILE_KEY else problem
            for problem in prompt_problems
        ]
    if rank == 0:  # the other ranks wait for rank 0 in init_ranks
        raise_if_any(problems)
        of_model = list(check_model(config.model)) or list(check_pair(config))
        if checkpoint is None:
            of_model = name_option(of_model, "--model", model)
        raise_if_any([*prompt_problems, *of_model, *check_average(checkpoint, average)])
    ranks = init_ranks(config.engine.timeout_minutes)
    set_tf32(config.engine.tf32)
    if ranks.is_main:
        sizes = sorted({f"{prompt.width_px}x{prompt.height_px}" for prompt in prompts})
        logger.info("generating {} at {} px", format_count(len(prompts), "image"), ", ".join(sizes))
    with explain_removal(checkpoint):
        generator = load_image_generator(config, checkpoint, ranks.device, average)
    with ACTIVITY.during("generating images"), use_attention(config.engine.attention):
        images = generate_images(generator, prompts, ranks)
    if ranks.is_main:
        drawn = (
            name_model(model) if checkpoint is None else name_step(config, TrainState.load(checkpoint).step, average)
        )
        for number, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
            write_image(out / f"{number:03d}.png", image, describe_image(prompt, config, drawn, generator.source))
        write_image(out / "contact_sheet.png", build_image_grid(images, labels=[prompt.text for prompt in prompts]))
        logger.info("{} written to {}", format_count(len(images), "image"), out)
    close_ranks()


def list_model_overrides(model: str, has_cfg: bool) -> list[str]:
    """List the overrides for a model that is not a checkpoint: its path, what it declares, and a precision.

    Args:
        has_cfg: true if a file with settings is given, which then determines the size of images and the precision.
    """
    declared, size = read_declared_prediction(Path(model)), read_declared_size(Path(model))
    overrides = [f"model.path={json.dumps(model)}", *(declared.list_overrides() if declared else ())]
    if has_cfg:
        return overrides
    if size is not None:
        overrides += [f"sample.width_px={size.width}", f"sample.height_px={size.height}"]
    return [*overrides, f"engine.precision={'bf16' if torch.cuda.is_available() else 'fp32'}"]


def load_image_generator(
    config: Config, checkpoint: Path | None, device: torch.device, average: str | None = None
) -> ImageGenerator:
    """Load all networks on a device: the base model's weights, replaced with the checkpoint's where it has them."""
    source, dtype = resolve_pair(config), DTYPES[config.engine.precision]
    unet = load_unet(source, config.engine.model_copy(update={"fp8": "none"}), device, dtype)
    encoders = load_text_encoders(source, config.model, device, dtype)
    networks = {"unet": unet, "text_encoder": encoders.encoder, "text_encoder_2": encoders.encoder_2}
    if checkpoint is not None:
        if config.lora.rank:
            add_untrained_adapters(networks, config.optim, config.lora)
        load_trained_weights(checkpoint, networks, average)
    for network in networks.values():
        network.to(device, dtype).eval().requires_grad_(False)
    return build_image_generator(
        unet=unet,
        vae=load_vae(source, config.model).to(device),
        conditioner=TextConditioner(encoders),
        tokenizers=load_tokenizers(source, config.model),
        source=source,
        config=config,
        dtype=dtype,
    )


def add_untrained_adapters(networks: Mapping[str, torch.nn.Module], optim: OptimConfig, lora: LoraConfig) -> None:
    """Add adapters to the networks that a run with these settings trains."""
    trained = list_trained_encoders(optim)
    for name in trained:
        unfreeze_text_encoder(networks[name], gradient_checkpointing=False)
    add_adapters({name: networks[name] for name in ("unet", *trained)}, lora)


def load_trained_weights(checkpoint: Path, networks: Mapping[str, torch.nn.Module], average: str | None = None) -> None:
    """Replace the networks' weights with the checkpoint's fp32 masters, or with one of its moving averages.

    Weights that were not trained do not change.
    """
    weights = open_weights(checkpoint, average)
    for prefix, network in networks.items():
        for name, parameter in network.named_parameters():
            if (read := weights.get(f"{prefix}.{name}")) is not None:
                parameter.data.copy_(read())
