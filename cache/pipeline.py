"""The cache job's data path on one rank: decode on threads, encode on the device, write on threads, all at once."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sdxl_trainer.cache.writer import EncodedItem, LatentWriter
from sdxl_trainer.data.bucket import BucketRule, list_buckets
from sdxl_trainer.data.plan import mix_keys
from sdxl_trainer.data.transforms import BadImageError, PreparedImage, prepare_image


@dataclass(frozen=True)
class WorkItem:
    """One picture to encode. `file` is where its latents go, relative to the cache folder."""

    key: str
    image_path: str
    file: str


@dataclass(frozen=True)
class Prepared:
    """A work item with its pixels."""

    item: WorkItem
    image: PreparedImage


def encode_items(
    items: list[WorkItem],
    vae: torch.nn.Module,
    rule: BucketRule,
    writer: LatentWriter,
    *,
    batch_size: int,
    num_workers: int,
    dtype: str,
    posterior: str,
    report_bad: Callable[[WorkItem, str], None],
    report_done: Callable[[int], None],
) -> None:
    """Encode pictures and hand their latents to the writer.

    While one batch is on the device, the next ones are decoded and the last ones written. A picture that cannot be used
    goes to `report_bad` with the reason, and the rest go on.
    """
    prepared = prepare_ahead(items, rule, num_workers, num_workers * 2 + batch_size, report_bad)
    for batch in group_by_bucket(prepared, batch_size):
        pixels = np.stack([entry.image.pixels for entry in batch])  # [B, H, W, 3]
        latents = encode_pixels(vae, pixels, posterior, [entry.item.key for entry in batch])
        for entry, latent in zip(batch, latents.cpu().numpy().astype(dtype), strict=True):
            writer.submit(EncodedItem(entry.item.key, entry.item.image_path, entry.image, latent, entry.item.file))
        report_done(len(batch))


def prepare_ahead(
    items: list[WorkItem],
    rule: BucketRule,
    num_workers: int,
    lookahead: int,
    report_bad: Callable[[WorkItem, str], None],
) -> Iterator[Prepared]:
    """Decode pictures in order, at most `lookahead` ahead, on threads: Pillow works without the interpreter's lock."""
    buckets = list_buckets(rule)
    with ThreadPoolExecutor(num_workers, thread_name_prefix="decoder") as pool:
        rest = iter(items)
        pending: deque = deque()
        for item in rest:
            pending.append((item, pool.submit(prepare_image, Path(item.image_path), rule, buckets)))
            if len(pending) > lookahead:
                yield from _take(pending, report_bad)
        while pending:
            yield from _take(pending, report_bad)


def group_by_bucket(prepared: Iterable[Prepared], batch_size: int) -> Iterator[list[Prepared]]:
    """Batches of one bucket, each as soon as it is full; the partly filled ones last."""
    groups: dict[tuple[int, int], list[Prepared]] = defaultdict(list)
    for entry in prepared:
        group = groups[entry.image.placement.bucket]
        group.append(entry)
        if len(group) == batch_size:
            yield groups.pop(entry.image.placement.bucket)
    yield from groups.values()


@torch.no_grad()
def encode_pixels(vae: torch.nn.Module, pixels: np.ndarray, posterior: str, keys: list[str]) -> torch.Tensor:
    """VAE latents [B, 4, H/8, W/8] float32 of pixels [B, H, W, 3] uint8, not multiplied by the scaling factor.

    A posterior sample's noise is keyed to the picture's key, so encoding again gives the same latents whatever the
    batch, the rank or the number of ranks.
    """
    weight = next(vae.parameters())
    images = torch.from_numpy(pixels).to(weight.device, non_blocking=True).permute(0, 3, 1, 2)
    distribution = vae.encode(images.to(weight.dtype) / 127.5 - 1).latent_dist  # pyright: ignore[reportCallIssue]
    mean = distribution.mean.float()
    if posterior == "mean":
        return mean
    noise = [
        torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(mix_keys(*key.encode()))) for key in keys
    ]
    return mean + distribution.std.float() * torch.stack(noise).to(mean.device)


def _take(pending: deque, report_bad: Callable[[WorkItem, str], None]) -> Iterator[Prepared]:
    item, future = pending.popleft()
    try:
        yield Prepared(item, future.result())
    except BadImageError as error:
        report_bad(item, str(error))
