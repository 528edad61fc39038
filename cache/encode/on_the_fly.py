"""Latents of images that have none, made while training (`cache.on_missing: encode`) and kept for the next epoch.

What is trained on is what is stored: the same VAE, noise and rounding as in the cache job, so a run over images has
the losses of a run over their cache.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO

import orjson
import torch
from loguru import logger

from sdxl_trainer.cache.encode.decoder import Prepared, WorkItem
from sdxl_trainer.cache.encode.inputs import build_identities, write_identities
from sdxl_trainer.cache.encode.latent_encoder import Encoder, build_vae_encoder
from sdxl_trainer.cache.encode.lock import lock_cache
from sdxl_trainer.cache.encode.pipeline import build_item
from sdxl_trainer.cache.encode.sinks import EncodedItem, NpzSink
from sdxl_trainer.cache.encode.writer import LatentWriter
from sdxl_trainer.cache.models.encoders import hash_weights, load_vae
from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.problems import Problem, raise_if_any
from sdxl_trainer.configs.schema import CacheConfig, Config
from sdxl_trainer.data.formats.latents import BadLatentError, pack_latents, parse_latents
from sdxl_trainer.data.formats.manifest import Identity, ManifestWriter, read_identity
from sdxl_trainer.data.images.bucket import split_key
from sdxl_trainer.data.index.selection import get_cache_folder
from sdxl_trainer.data.loading.dataset import LatentDataset, MicroBatch, PendingImage
from sdxl_trainer.launch.distributed import Ranks


class MissingEncoder:
    """Encodes the images in micro batches on this rank's device and stores them on threads of their own.

    Args:
        identities: what the items of each resolution are made under, by the prefix of their keys.
        dataset: draws what is trained of each item.
        lock: of the cache; let go in the end.
    """

    def __init__(
        self,
        encoder: Encoder,
        writer: LatentWriter,
        identities: dict[str, Identity],
        settings: CacheConfig,
        dataset: LatentDataset,
        lock: IO[bytes] | None = None,
    ):
        self._encoder = encoder
        self._writer: LatentWriter | None = writer
        self._identities = {prefix: identity.name for prefix, identity in identities.items()}
        self._settings = settings
        self._dataset = dataset
        self._lock = lock

    def fill(self, batch: MicroBatch) -> None:
        """Make the latents that a micro batch lacks. One that is not finite is left out as a bad sample."""
        size = self._settings.batch_size
        for start in range(0, len(batch.pending), size):
            some = batch.pending[start : start + size]
            pixels = torch.stack([image.pixels for image in some]).numpy()  # [B, H, W, 3]
            encoded = self._encoder.launch(pixels, [image.record["key"] for image in some]).wait()
            for number, image in enumerate(some):
                identity = self._identities[split_key(image.record["key"])[0]]
                self._settle(batch, image, build_item(_prepare(image), encoded, number, identity))
        batch.pending.clear()

    def close(self) -> None:
        """Wait until everything is on disk and listed."""
        if self._writer is not None:
            self._keep(self._writer.close)
        if self._lock is not None:
            self._lock.close()

    def _settle(self, batch: MicroBatch, image: PendingImage, item: EncodedItem) -> None:
        key = image.record["key"]
        assert item.sample is not None, "images are encoded whole"
        try:
            stored = parse_latents(pack_latents(item.sample, self._settings.dtype), item.entry.bucket, check_crc=False)
        except BadLatentError as error:
            batch.give_up(image.place, key, f"{item.entry.source_path}: {error}")
            return
        batch.fill(image.place, self._dataset.draw(stored, image.record, image.epoch, image.row))
        if self._writer is not None:
            self._keep(self._writer.submit, item)

    def _keep(self, store: Callable[..., None], *arguments: EncodedItem) -> None:
        """A cache that cannot be written costs time in the next epoch, but does not end the training."""
        try:
            store(*arguments)
        except OSError as error:
            logger.warning("latents are no longer kept, because the cache cannot be written: {}", error)
            self._writer = None


def fill_missing(batches: Iterator[MicroBatch], encoder: MissingEncoder) -> Generator[MicroBatch, None, None]:
    """Micro batches with all their latents. Closing the generator, or dropping it, waits for the files."""
    with closing(encoder):
        for batch in batches:
            if batch.pending:
                encoder.fill(batch)
            yield batch


def build_missing_encoder(config: Config, source: ModelSource, dataset: LatentDataset, ranks: Ranks) -> MissingEncoder:
    """Load the VAE and take hold of the cache.

    Raises:
        UserInputError: a job is writing the cache, or other settings made it.
    """
    folder, cache = get_cache_folder(config), config.cache
    for key, value in (("cache.alpha_mask", cache.alpha_mask), ("data.masks", config.data.masks)):
        rule = "goes with latents that the cache job makes"
        raise_if_any([Problem(key, value, rule, "run bash launch/cache.sh, on_missing: skip")] if value else [])
    vae = load_vae(source, config.model)
    identities = build_identities(config, hash_weights(vae))
    raise_if_any(check_made_alike(folder, identities))
    lock = lock_cache(folder) if ranks.is_main else None
    if ranks.is_main:
        write_identities(folder, identities)
    writer = LatentWriter(NpzSink(folder, cache.dtype), ManifestWriter(folder, ranks.rank))
    return MissingEncoder(build_vae_encoder(config, vae, ranks.device), writer, identities, cache, dataset, lock)


def check_made_alike(folder: Path, identities: dict[str, Identity]) -> list[Problem]:
    """Whether the latents that are in the cache were made as further ones would be."""
    known, wanted = read_identity(folder), identities[""]
    if known is None or known.get("name") == wanted.name:
        return []
    fields = orjson.loads(orjson.dumps(wanted.list_fields()))
    others = ", ".join(f"{name}: {known.get(name)}" for name, value in fields.items() if known.get(name) != value)
    rule = f"holds latents made under other settings ({others}), and further ones would not go with them"
    return [Problem("cache.dir", folder, rule, "run bash launch/cache.sh first, or give another cache.dir")]


def _prepare(image: PendingImage) -> Prepared:
    record = image.record
    return Prepared(WorkItem(record["key"], record["image_path"], record["file"]), image.image)
