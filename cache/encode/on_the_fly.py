"""Encode missing latents during training (`cache.on_missing: encode`), and store them for the next epoch.

Training uses exactly the stored values, which are made with the cache job's VAE, noise and rounding. A run over images
therefore has the same losses as a run over their cache.
"""

from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing

import torch
from loguru import logger

from sdxl_trainer.cache.encode.background_writer import BackgroundWriter
from sdxl_trainer.cache.encode.cache_setup import (
    build_identities,
    check_identities,
    lock_cache_for_ranks,
    write_identities,
)
from sdxl_trainer.cache.encode.cache_vae import check_cache_vae, identify_vae
from sdxl_trainer.cache.encode.decoder import PreparedItem, WorkItem
from sdxl_trainer.cache.encode.latent_encoder import Encoder, build_vae_encoder
from sdxl_trainer.cache.encode.pipeline import build_item
from sdxl_trainer.cache.encode.storage import EncodedItem, NpzStorage
from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.cache.models.vae import load_vae
from sdxl_trainer.configs.problems import Problem, raise_if_any
from sdxl_trainer.configs.schema import CacheConfig, Config
from sdxl_trainer.data.formats.latents import BadLatentError, pack_latents, parse_latents
from sdxl_trainer.data.formats.manifest import Identity, ManifestWriter
from sdxl_trainer.data.images.bucket import split_key
from sdxl_trainer.data.index.schema import BadSample
from sdxl_trainer.data.index.selection import get_cache_folder
from sdxl_trainer.data.loading.dataset import LatentDataset
from sdxl_trainer.data.loading.micro_batch import MicroBatch, PendingImage
from sdxl_trainer.launch.distributed import Ranks


class MissingLatentEncoder:
    """Encodes the images of micro batches on this rank's device and stores their latents in the background.

    Args:
        identities: identity of each resolution's latents, by the prefix of their keys.
        dataset: dataset that draws the training latents from an encoded item.
        lock: holds the lock of the cache on the main rank; released by `close`.
    """

    def __init__(
        self,
        encoder: Encoder,
        writer: BackgroundWriter,
        identities: Mapping[str, Identity],
        settings: CacheConfig,
        dataset: LatentDataset,
        lock: ExitStack,
    ):
        self._encoder = encoder
        self._writer: BackgroundWriter | None = writer
        self._identities = {prefix: identity.name for prefix, identity in identities.items()}
        self._settings = settings
        self._dataset = dataset
        self._lock = lock

    def fill(self, batch: MicroBatch) -> None:
        """Encode the missing latents of a micro batch. An image whose latents are not finite becomes a bad sample."""
        size = self._settings.batch_size
        for start in range(0, len(batch.pending), size):
            group = batch.pending[start : start + size]
            pixels = torch.stack([image.pixels for image in group]).numpy()  # [B, H, W, 3]
            encoded = self._encoder.launch(pixels, [image.row["key"] for image in group]).wait()
            for place, image in enumerate(group):
                identity = self._identities[split_key(image.row["key"])[0]]
                self._fill_image(batch, image, build_item(_prepare(image), encoded, place, identity))
        batch.pending.clear()

    def close(self) -> None:
        """Wait until all latents are on disk and in the manifest, and release the lock."""
        self._close_writer()
        self._lock.close()

    def _fill_image(self, batch: MicroBatch, image: PendingImage, item: EncodedItem) -> None:
        assert item.sample is not None, "missing latents have been encoded"
        try:
            stored = parse_latents(pack_latents(item.sample, self._settings.dtype), item.entry.bucket, check_crc=False)
        except BadLatentError as error:
            batch.mark_bad(image.place, BadSample(image.row["key"], f"{item.entry.source_path}: {error}"))
            return
        batch.insert_latents(image.place, self._dataset.draw_latents(stored, image.row, image.epoch, image.row_number))
        if self._writer is not None:
            try:
                self._writer.submit(item)
            except OSError:
                self._close_writer()

    def _close_writer(self) -> None:
        """Close the writer, for good, and warn if it could not store an item.

        An unwritable cache costs time in the next epoch but does not end the training.
        """
        writer, self._writer = self._writer, None
        try:
            if writer is not None:
                writer.close()
        except OSError as error:
            logger.warning("latents are no longer stored, because the cache cannot be written: {}", error)


def fill_missing_latents(
    batches: Iterator[MicroBatch], encoder: MissingLatentEncoder
) -> Generator[MicroBatch, None, None]:
    """Yield micro batches with all their latents. Closing or dropping the generator waits for the files."""
    with closing(encoder):
        for batch in batches:
            if batch.pending:
                encoder.fill(batch)
            yield batch


def build_missing_latent_encoder(
    config: Config, source: ModelSource, dataset: LatentDataset, ranks: Ranks
) -> MissingLatentEncoder:
    """Load the VAE, lock the cache, and build the encoder for missing latents.

    Raises:
        UserInputError: another job is writing the cache, or it was made with other settings.
    """
    folder, cache = get_cache_folder(config), config.cache
    rule, cure = "needs latents made by the cache job", "run bash launch/cache.sh and set cache.on_missing: skip"
    masks = {"cache.alpha_mask": cache.alpha_mask, "data.masks": config.data.masks}
    raise_if_any(Problem(key, value, rule, cure) for key, value in masks.items() if value)
    vae = load_vae(source, config.model)
    own_vae = identify_vae(source, config.model, vae)
    identities = build_identities(cache, config.data, own_vae)
    raise_if_any([*check_cache_vae(folder, config.model, own_vae)] or check_identities(folder, identities))
    lock = ExitStack()
    lock.enter_context(lock_cache_for_ranks(folder, ranks))
    if ranks.is_main:
        write_identities(folder, identities, own_vae)
    writer = BackgroundWriter(NpzStorage(folder, cache.dtype), ManifestWriter(folder, ranks.rank))
    return MissingLatentEncoder(
        encoder=build_vae_encoder(cache, vae, ranks.device),
        writer=writer,
        identities=identities,
        settings=cache,
        dataset=dataset,
        lock=lock,
    )


def _prepare(image: PendingImage) -> PreparedItem:
    row = image.row
    return PreparedItem(WorkItem(key=row["key"], image_path=row["image_path"], file=row["file"]), image.image)
