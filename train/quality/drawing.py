"""Images on disk: those of the validation set, and those that each model draws for its captions.

An image is drawn once. Its file must have its size, its description and no damaged byte, or it is drawn again.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from loguru import logger
from PIL import Image

from sdxl_trainer.cache.models.model_pair import resolve_pair
from sdxl_trainer.cache.models.vae import load_vae
from sdxl_trainer.configs.problems import format_count
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.files import remove_leftovers
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.data.index.schema import BadSample
from sdxl_trainer.launch.activity import ACTIVITY
from sdxl_trainer.launch.distributed import Ranks, gather_objects
from sdxl_trainer.launch.kernels import use_attention
from sdxl_trainer.train.checkpoint.model_argument import explain_removal
from sdxl_trainer.train.quality.models import MeasuredModel
from sdxl_trainer.train.quality.validation_images import (
    ValidationImages,
    ValidationSample,
    decode_image,
    describe_latents,
    describe_prompt,
)
from sdxl_trainer.train.sampling.image_grid import write_image
from sdxl_trainer.train.sampling.job import load_image_generator

DESCRIPTION_KEY = "parameters"  # as `write_image` stores it


def is_whole_image(file: Path, size: Size, description: str) -> bool:
    """Return whether a file is an undamaged PNG of a size with a description."""
    with suppress(OSError, SyntaxError, ValueError):  # Pillow's errors for damaged files
        with Image.open(file) as image:
            image.verify()  # the checksum of each chunk
        with Image.open(file) as image:
            image.load()
            return image.size == tuple(size) and image.info.get(DESCRIPTION_KEY) == description
    return False


def write_validation_images(folder: Path, images: ValidationImages, config: Config, ranks: Ranks) -> set[str]:
    """Decode the images of the validation set that a folder lacks, and return the keys of bad samples.

    All ranks call it together. A sample whose latents cannot be read is left out with a warning.
    """
    vae, bad = None, {}
    mine = images.samples[ranks.rank :: ranks.world_size]
    _clean(folder, ranks)
    for place, sample in enumerate(mine, 1):
        latents = images.read_latents(sample)
        if isinstance(latents, BadSample):
            bad[sample.key] = latents.reason
            continue
        description = describe_latents(sample, latents)
        if not is_whole_image(folder / sample.file_name, sample.bucket, description):
            if vae is None:
                vae = load_vae(resolve_pair(config), config.model).to(ranks.device)
            write_image(folder / sample.file_name, decode_image(vae, latents), description)
        ACTIVITY.note_piece(min(place * ranks.world_size, len(images.samples)), len(images.samples))
    found = {key: reason for part in gather_objects(bad) for key, reason in part.items()}
    if ranks.is_main:
        for key, reason in found.items():
            logger.warning("validation sample {} is left out: {}", key, reason)
    return set(found)


def write_generated_images(
    folder: Path, model: MeasuredModel, samples: Sequence[ValidationSample], ranks: Ranks
) -> None:
    """Draw the images of samples that a folder lacks. All ranks call it together and share them.

    The networks are loaded only if an image is missing.
    """
    prompts = [sample.build_prompt(model.config) for sample in samples]
    files = [folder / sample.file_name for sample in samples]
    _clean(folder, ranks)

    def is_missing(number: int) -> bool:
        return not is_whole_image(files[number], samples[number].bucket, describe_prompt(prompts[number]))

    missing = share_work(range(len(samples)), is_missing, ranks)
    mine = missing[ranks.rank :: ranks.world_size]
    if ranks.is_main:
        there = len(samples) - len(missing)
        logger.info("{}: {} to draw, {} are there", model.label, format_count(len(missing), "image"), there)
    if not mine:
        return
    with explain_removal(model.checkpoint):
        generator = load_image_generator(model.config, model.checkpoint, ranks.device, model.average)
    generator.encode_in_advance([prompts[number] for number in mine])
    with use_attention(model.config.engine.attention):
        for place, number in enumerate(mine, 1):
            image = generator.generate(prompts[number])
            write_image(files[number], image, describe_prompt(prompts[number]))
            ACTIVITY.note_piece(min(place * ranks.world_size, len(missing)), len(missing))
    del generator
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()


def share_work(numbers: Sequence[int], is_missing: Callable[[int], bool], ranks: Ranks) -> list[int]:
    """Return the numbers whose work is missing, ascending, the same on all ranks, which share the looking."""
    found = []
    for number in numbers[ranks.rank :: ranks.world_size]:
        if is_missing(number):
            found.append(number)
        ACTIVITY.note()
    return sorted(number for part in gather_objects(found) for number in part)


def _clean(folder: Path, ranks: Ranks) -> None:
    if ranks.is_main:
        remove_leftovers(folder)
