"""The images of the validation set, decoded from their cached latents, and the captions that images are drawn for.

Originals may be gone, so the VAE decodes every validation image. Generated images come out of the VAE too: measures
compare what training can change, and not what the VAE loses.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from sdxl_trainer.cache.models.encoders import load_tokenizers
from sdxl_trainer.cache.models.model_pair import resolve_pair
from sdxl_trainer.cache.models.vae import read_vae_config
from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.checks.training_set import open_training_set
from sdxl_trainer.data.checks.validation_set import derive_validation_config, find_held_out_rows, open_validation_set
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.index.schema import BadSample
from sdxl_trainer.data.index.selection import get_cache_folder
from sdxl_trainer.data.loading.dataset import LatentDataset
from sdxl_trainer.data.loading.loader import build_dataset
from sdxl_trainer.data.loading.micro_batch import MicroSpec
from sdxl_trainer.data.order.keyed_random import RandomStream, derive_seed
from sdxl_trainer.data.order.split import hash_keys
from sdxl_trainer.data.text.strategy import load_strategy
from sdxl_trainer.train.sampling.prompts import Prompt, build_prompt

MIN_IMAGES = 8
NAME_CHARACTERS = 60
UNSAFE = re.compile(r"[^\w.-]")


class OpenedSet(NamedTuple):
    """The index of the validation samples, and their rows in the order in which they are used."""

    index: Index
    rows: np.ndarray  # [N]


@dataclass(frozen=True, kw_only=True)
class ValidationSample:
    """A sample of the validation set, and the seed of the image that is drawn for its caption."""

    row: int
    key: str
    bucket: Size
    caption: str
    seed: int

    @property
    def file_name(self) -> str:
        """The name of its images: the key, as far as file systems allow it, and a hash of the key."""
        digest = hashlib.sha256(self.key.encode(errors="surrogatepass")).hexdigest()[:12]
        return f"{UNSAFE.sub('_', self.key)[:NAME_CHARACTERS]}-{digest}.png"

    def build_prompt(self, config: Config) -> Prompt:
        """Build the prompt of its image: the sampler of the settings, the size of its bucket."""
        given = {"text": self.caption, "seed": self.seed}
        given |= {"width_px": self.bucket.width, "height_px": self.bucket.height}
        return build_prompt(given, config.sample, number=0)


@dataclass(frozen=True)
class ValidationImages:
    """The samples of a validation set, and the dataset that reads their latents."""

    dataset: LatentDataset
    samples: list[ValidationSample]

    def read_latents(self, sample: ValidationSample) -> torch.Tensor | BadSample:
        """Return a sample's latents as the VAE gave them, [1, C, h, w] float32."""
        spec = MicroSpec(
            bucket=sample.bucket, rows=np.array([sample.row]), epochs=np.zeros(1, np.int64), positions=np.arange(1)
        )
        batch = self.dataset[spec]
        if batch.pending:
            return BadSample(sample.key, "its latents are not cached")
        return batch.bad[0] if batch.bad else batch.latents


def without_cached_text(config: Config) -> Config:
    """Return the settings with captions shaped from the metadata, because prompts are encoded anyway."""
    return config.model_copy(update={"cache": config.cache.model_copy(update={"text": False})})


def open_samples(config: Config, max_images: int | None) -> tuple[OpenedSet | None, list[Problem]]:
    """Open the validation set of the settings.

    Args:
        max_images: at most so many samples, and at most `validation.max_samples`.
    """
    settings = config.validation
    if not settings.has_own_set and not settings.share:
        cure = "train with validation.share, or give a set: validation.metadata=[…] or validation.image_dirs=[…]"
        return None, [Problem("validation.share", settings.share, "holds no samples out to measure on", cure)]
    index, problems = open_validation_set(config) if settings.has_own_set else open_training_set(config)
    if index is None or problems:
        return None, problems
    if settings.has_own_set:
        rows = np.argsort(hash_keys(index.arrow_column("key"), settings.seed), kind="stable")
    else:
        rows = find_held_out_rows(settings, index, None)
    rows = rows[: min(settings.max_samples, max_images or settings.max_samples)]
    return OpenedSet(index, rows), list(check_rows(config, index, rows, max_images))


def check_rows(config: Config, index: Index, rows: np.ndarray, max_images: int | None) -> Iterator[Problem]:
    """Yield a problem if there are too few samples, or some without latents."""
    if len(rows) < MIN_IMAGES:
        limits = {"--max-images": max_images, "validation.max_samples": config.validation.max_samples}
        key = next((name for name, limit in limits.items() if limit is not None and limit < MIN_IMAGES), "validation")
        own_set = "hold out more samples, or give a set of its own with validation.metadata"
        cure = own_set if key == "validation" else f"give {MIN_IMAGES} or more, or leave it out"
        value = limits.get(key, len(rows))
        yield Problem(key, value, f"is too few samples to measure on: at least {MIN_IMAGES}", cure)
    found = [index.row(number) for number in rows.tolist()]
    folder = get_cache_folder(derive_validation_config(config))
    missing = [row["key"] for row in found if row["bytes"] is None and not (folder / row["file"]).is_file()]
    if missing:
        rule = f"holds no latents of {len(missing)} validation samples, such as {missing[0]}"
        yield Problem("cache.dir", folder, rule, "run bash launch/cache.sh with the same settings", is_next_step=True)


def build_validation_images(config: Config, index: Index, rows: Sequence[int]) -> ValidationImages:
    """Build the samples of the rows, with their captions, neither dropped nor shuffled."""
    source = resolve_pair(config)
    strategy = load_strategy(config.data.strategy) if config.data.strategy else None
    derived = derive_validation_config(config)
    channels = read_vae_config(source, config.model)["latent_channels"]
    dataset = build_dataset(derived, index, load_tokenizers(source, config.model), strategy, channels)
    ids = (hash_keys(index.arrow_column("key"), config.validation.seed) >> np.uint64(1)).astype(np.int64)
    samples = []
    for number in rows:
        row = index.row(number)
        caption = dataset.draw_caption(row, 0, 0, number)
        samples.append(
            ValidationSample(
                row=number,
                key=row["key"],
                bucket=Size(row["bucket_width"], row["bucket_height"]),
                caption="" if isinstance(caption, BadSample) else caption.text,
                seed=derive_seed(config.sample.seed, RandomStream.QUALITY, int(ids[number])),
            )
        )
    return ValidationImages(dataset, samples)


@torch.no_grad()
def decode_image(vae: Any, latents: torch.Tensor) -> Image.Image:
    """Decode latents as the VAE gave them, [1, C, h, w], to an image."""
    from diffusers.image_processor import VaeImageProcessor

    parameter = next(vae.parameters())
    pixels = vae.decode(latents.to(parameter.device, parameter.dtype), return_dict=False)[0]
    images: Any = VaeImageProcessor().postprocess(pixels, output_type="pil")
    return images[0]


def describe_prompt(prompt: Prompt) -> str:
    """Return what is stored with a generated image: its prompt, and in a line of JSON all that it is drawn with."""
    return "\n".join((prompt.text, json.dumps(asdict(prompt), sort_keys=True)))


def describe_latents(sample: ValidationSample, latents: torch.Tensor) -> str:
    """Return what is stored with a decoded image: its caption and the SHA-256 of its latents."""
    return "\n".join((sample.caption, hashlib.sha256(latents.numpy().tobytes()).hexdigest()))


def get_file(folder: Path, sample: ValidationSample) -> Path:
    """Return the file of a sample's image in a folder."""
    return folder / sample.file_name
