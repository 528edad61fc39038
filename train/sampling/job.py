"""Sampling as a program of its own: from a model in any form and a prompt file to images and a contact sheet."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from loguru import logger
from safetensors import safe_open

from sdxl_trainer.cache.models.encoders import TextEncoders, load_text_encoders, load_tokenizers, load_vae
from sdxl_trainer.cache.models.source import check_model, resolve_model
from sdxl_trainer.configs.load import build_config, load_config
from sdxl_trainer.configs.problems import Problem, UserInputError, raise_if_any
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.launch.distributed import close_ranks, init_ranks, read_environment
from sdxl_trainer.launch.logger import init_logger
from sdxl_trainer.train.checkpoint.folder import MANIFEST, find_newest_checkpoint
from sdxl_trainer.train.engine.deepspeed_config import DTYPES
from sdxl_trainer.train.engine.saved_state import check_average, open_weights
from sdxl_trainer.train.networks.adapters import add_adapters
from sdxl_trainer.train.networks.conditioning import TextConditioner
from sdxl_trainer.train.networks.trained_networks import list_trained_encoders, load_unet, unfreeze_text_encoder
from sdxl_trainer.train.sampling.image_grid import build_image_grid, write_image
from sdxl_trainer.train.sampling.pipeline import ImageGenerator, generate_images
from sdxl_trainer.train.sampling.prompts import load_prompts

# diffusers' names of predictions in scheduler_config.json, and ours.
PREDICTIONS = {"v_prediction": "v", "flow_prediction": "flow", "epsilon": "epsilon"}


def run_sampling(
    model: str, prompt_file: Path, out: Path, cfg: Path | None, words: Sequence[str], average: str | None = None
) -> None:
    """Draw every prompt of a file, the ranks sharing them, and write each image and a contact sheet to `out`.

    Args:
        model: single file, diffusers folder, hub id, run folder, or a checkpoint in one.
        cfg: settings; by default the run's own, or what the model says of itself.
        words: settings that override the others.
        average: decay of the moving average that is taken of a checkpoint, instead of the weights.

    Raises:
        UserInputError: anything wrong with the settings, the model or the prompts, all of it at once.
    """
    rank, _, _ = read_environment()
    init_logger(rank)
    checkpoint = find_model_checkpoint(Path(model))
    config, problems = load_sampling_config(
        model, checkpoint, cfg, [f"sample.prompt_file={json.dumps(str(prompt_file))}", "sample.prompts=[]", *words]
    )
    prompts, found = load_prompts(config.sample, config.objective)
    if rank == 0:  # the others wait for it in init_ranks
        raise_if_any([*problems, *found, *check_model(config.model), *check_average(checkpoint, average)])
    ranks = init_ranks(config.engine.timeout_minutes)
    images = generate_images(load_image_generator(config, checkpoint, ranks.device, average), prompts, ranks)
    if ranks.is_main:
        for number, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
            write_image(out / f"{number:03d}.png", image, prompt.describe())
        write_image(out / "contact_sheet.png", build_image_grid(images, labels=[prompt.text for prompt in prompts]))
        logger.info("{} images in {}", len(images), out)
    close_ranks()


def find_model_checkpoint(path: Path) -> Path | None:
    """The checkpoint that a path names: itself, or the newest whole one of a run folder; None for any other model.

    Raises:
        UserInputError: a run folder without a checkpoint.
    """
    if (path / MANIFEST).is_file():
        return path
    if not (path / "checkpoints").is_dir():
        return None
    newest = find_newest_checkpoint(path / "checkpoints")
    if newest is None:
        raise UserInputError([Problem("--model", path, "is a run without a whole checkpoint", "give a model file")])
    return newest


def load_sampling_config(
    model: str, checkpoint: Path | None, cfg: Path | None, words: Sequence[str]
) -> tuple[Config, list[Problem]]:
    """The settings that images are drawn with, and what is wrong with them.

    Those of the run for a checkpoint. Else the model is what `--model` says, and its prediction what it says itself;
    its precision is bf16 on a GPU, fp32 without one.
    """
    if checkpoint is not None:
        return load_config(cfg or checkpoint.parent.parent / "config.yaml", words)
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    own = [f"model.path={json.dumps(model)}", *read_prediction(Path(model))]
    if cfg is not None:
        return load_config(cfg, [*own, *words])
    return build_config({}, [*own, f"engine.precision={precision}", *words])


def read_prediction(model: Path) -> list[str]:
    """What a model says of its prediction, as words of settings: by its scheduler's config, or its file's marks."""
    file = model / "scheduler" / "scheduler_config.json"
    if file.is_file():
        settings = json.loads(file.read_text())
        kind = "flow" if settings.get("_class_name", "").startswith("FlowMatch") else settings.get("prediction_type")
        prediction, has_zero_snr = PREDICTIONS.get(kind, kind), bool(settings.get("rescale_betas_zero_snr"))
    elif model.suffix == ".safetensors" and model.is_file():
        with safe_open(model, "pt") as tensors:
            names, notes = set(tensors.keys()), tensors.metadata() or {}
        told = notes.get("modelspec.prediction_type", "epsilon")
        prediction, has_zero_snr = "v" if "v_pred" in names else PREDICTIONS.get(told, told), "ztsnr" in names
    else:
        return []
    words = [f"objective.prediction={prediction}"] if prediction in PREDICTIONS.values() else []
    return [*words, "objective.zero_terminal_snr=true"] if has_zero_snr and prediction == "v" else words


def load_image_generator(
    config: Config, checkpoint: Path | None, device: torch.device, average: str | None = None
) -> ImageGenerator:
    """The networks on a device, with a checkpoint's weights in the place of the model's where it has them."""
    source, dtype = resolve_model(config.model), DTYPES[config.engine.precision]
    unet, (encoder, encoder_2) = load_unet(source, config.engine, device), load_text_encoders(source, config.model)
    networks = {"unet": unet, "text_encoder": encoder, "text_encoder_2": encoder_2}
    if checkpoint is not None:
        load_trained_weights(checkpoint, networks, config, average)
    for network in networks.values():
        network.to(device, dtype).eval().requires_grad_(False)
    vae = load_vae(source, config.model).to(device)
    tokenizers = load_tokenizers(source, config.model)
    conditioner = TextConditioner(TextEncoders(encoder, encoder_2))
    return ImageGenerator(unet, vae, conditioner, tokenizers, source, config, dtype)


def load_trained_weights(
    checkpoint: Path, networks: dict[str, torch.nn.Module], config: Config, average: str | None = None
) -> None:
    """Replace the networks' weights by the fp32 masters that a checkpoint holds of them, or by a moving average; give
    them adapters if those are what it holds."""
    weights = open_weights(checkpoint, average)
    if config.lora.rank:
        trained = list_trained_encoders(config.optim)
        for name in trained:
            unfreeze_text_encoder(networks[name], gradient_checkpointing=False)
        add_adapters({name: networks[name] for name in ("unet", *trained)}, config.lora)
    for prefix, network in networks.items():
        for name, parameter in network.named_parameters():
            if (read := weights.get(f"{prefix}.{name}")) is not None:
                parameter.data.copy_(read())
