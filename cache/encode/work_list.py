"""What there is to do: this rank's share of the list, and which of it is in the cache and still true."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa

from sdxl_trainer.cache.encode.decoder import WorkItem
from sdxl_trainer.cache.encode.pipeline import TextItem, choose_text_file
from sdxl_trainer.data.files import hash_file
from sdxl_trainer.data.formats.latents import LATENT_CHANNELS, VAE_FACTOR
from sdxl_trainer.data.formats.manifest import Identity, ManifestEntry, TextIdentity, TextPart
from sdxl_trainer.data.formats.shards import get_partial_path
from sdxl_trainer.data.images.bucket import BucketRule, list_buckets, place_image
from sdxl_trainer.data.images.masks import MaskFinder
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.index.missing_latents import choose_latent_file
from sdxl_trainer.data.text.strategy import StrategyError
from sdxl_trainer.data.text.variants import CaptionVariants, hash_captions

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
STATES = ("valid", "new", "stale", "changed", "missing")
LATENT_SUFFIXES = (".npz", ".tar")  # a record that names latents instead of an image has nothing to encode
MASK_BYTES_PER_PX = 4
ITEM_OVERHEAD_BYTES = 1200  # npz headers, sizes and crop, and the line in the manifest


@dataclass
class WorkList:
    """A rank's work at one resolution."""

    rule: BucketRule
    identity: str  # name of the Identity
    items: list[WorkItem] = field(default_factory=list)
    texts: list[TextItem] = field(default_factory=list)  # whose latents are valid
    counts: Counter = field(default_factory=Counter)  # of each of STATES
    refreshed: list[ManifestEntry] = field(default_factory=list)  # content unchanged, mtime new: only the line is old
    bytes_needed: int = 0
    num_pixels: int = 0  # of the items' buckets
    num_items: int = 0  # of items and texts, where they are left out

    @property
    def has_captions(self) -> bool:
        """Whether there are captions to encode."""
        return bool(self.texts) or any(item.with_text for item in self.items)

    def add_item(self, item: WorkItem, num_pixels: int, block_bytes: int) -> None:
        """Add an image of `num_pixels` whose latents take `block_bytes` for each 8x8 block of pixels."""
        self.items.append(item)
        self.num_pixels += num_pixels
        self.bytes_needed += num_pixels * block_bytes // VAE_FACTOR**2 + ITEM_OVERHEAD_BYTES
        self.bytes_needed += num_pixels * MASK_BYTES_PER_PX if item.mask_path is not None else 0

    def without_items(self) -> "WorkList":
        """Its totals alone: what other ranks are told of it. The items may be millions."""
        return replace(self, items=[], texts=[], refreshed=[], num_items=len(self.items) + len(self.texts))


def share_positions(costs: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """This rank's positions in the full list, in order, such that all ranks get about the same sum of costs.

    The list is dealt from the dearest to the cheapest, back and forth, so it depends on the list alone and not on what
    exists: ranks never overlap, and a restart with any number of ranks covers everything once.

    Args:
        costs: [N] pixels of each image's bucket.
    """
    order = np.argsort(-costs, kind="stable")
    turn = np.arange(len(order)) % (2 * world_size)
    owner = np.minimum(turn, 2 * world_size - 1 - turn)  # 0 1 2 2 1 0 0 1 2 ...
    return np.sort(order[owner == rank])


@dataclass(frozen=True)
class TextPlan:
    """Which text encoder outputs are wanted. `caption_bytes`: what those of one caption take on the disk."""

    variants: CaptionVariants
    identity: TextIdentity
    caption_bytes: int
    in_shards: bool = False  # new ones lie beside the latents in a shard, so both are written together

    def is_valid(self, record: bytes, known: TextPart | None) -> bool:
        """Whether what is cached is of these captions, encoded so. Captions that cannot be shaped are told later."""
        if known is None or known.identity != self.identity.name:
            return False
        try:
            return known.captions_sha256 == hash_captions(self.variants.shape(orjson.loads(record)))
        except StrategyError:
            return False


@dataclass(frozen=True)
class Resolution:
    """What latents of one resolution are made under."""

    rule: BucketRule
    identity: Identity
    prefix: str = ""  # before the keys of its latents


@dataclass(frozen=True)
class Share:
    """A rank's images at one resolution: their rows in the index, and the keys of their latents."""

    resolution: Resolution
    rows: list[int]
    keys: list[str]


def choose_share(index: Index, resolution: Resolution, rank: int, world_size: int) -> Share:
    """A rank's share of the full list."""
    costs = compute_costs(index.column("width"), index.column("height"), resolution.rule)
    rows = share_positions(costs, rank, world_size)
    keys = index.arrow_column("key").take(pa.array(rows)).to_pylist()
    return Share(resolution, rows.tolist(), [resolution.prefix + key for key in keys])


def list_work(
    index: Index,
    folder: Path,
    entries: Mapping[str, ManifestEntry],
    share: Share,
    *,
    beside: bool,
    text: TextPlan | None = None,
    known_only: bool = False,
    masks: MaskFinder | None = None,
) -> WorkList:
    """What a rank has to encode of its share.

    Args:
        folder: of the cache.
        entries: the newest manifest entry of each key of the share, or of more.
        beside: latents go beside the images instead of under the cache folder.
        text: None: captions are not encoded.
        known_only: images without an entry are counted, but not to do.
        masks: None: there are no mask files.
    """
    resolution = share.resolution
    rule, prefix = resolution.rule, resolution.prefix
    work = WorkList(rule, resolution.identity.name)
    buckets = list_buckets(rule)
    present = _Folders(folder)
    item_bytes = estimate_item_bytes(resolution.identity)
    images, widths, heights = index.arrow_column("image_path"), index.column("width"), index.column("height")
    mask_paths = repeat(None) if masks is None else masks.find(images[row].as_py() for row in share.rows)
    for row, key, mask in zip(share.rows, share.keys, mask_paths, strict=False):
        image = images[row].as_py()
        if image.endswith(LATENT_SUFFIXES):
            work.counts["given"] += not prefix
            continue
        known = entries.get(key)
        state, entry = judge_entry(known, image, work.identity, mask)
        is_missing = state == "valid" and known is not None and not present.have(known.file)
        state = "missing" if is_missing else state
        work.counts[state] += 1
        work.counts["masked"] += not prefix and (mask is not None or (known is not None and known.mask is not None))
        if known_only and known is None:
            continue
        record = index.record_json(row) if text is not None or state != "valid" else b""
        file, kept = choose_latent_file(key, image, beside), known.text if known else None
        kept = kept if kept is not None and present.have(kept.file) else None
        text_due = text is not None and not text.is_valid(record, kept)
        if text is not None and text_due:
            work.counts["text"] += 1
            work.bytes_needed += text.caption_bytes * text.variants.count
        if state == "valid" and known is not None:
            if text_due:
                work.texts.append(TextItem(entry or known, choose_text_file(file), record))
            elif entry is not None:
                work.refreshed.append(entry)
            continue
        size = (int(widths[row]), int(heights[row])) if widths[row] > 0 else None
        if kept is not None and (kept.offset is not None or (text is not None and text.in_shards)):
            kept, text_due = None, text is not None  # beside its latents in a shard: it is made again with them
        unmasked = known if mask is not None and known is not None and known.mask is None else None
        area = int(np.prod(place_image(size, rule, buckets).bucket)) if size else rule.area_px
        work.add_item(WorkItem(key, image, file, size, record, text_due, kept, mask, unmasked), area, item_bytes)
    return work


def compute_costs(widths: np.ndarray, heights: np.ndarray, rule: BucketRule) -> np.ndarray:
    """[N] pixels that encoding each image costs: about one area for all, unless images may stay smaller."""
    area = np.full(len(widths), rule.area_px, np.int64)
    if rule.no_upscale:
        known = widths > 0
        area[known] = np.minimum(area[known], widths[known].astype(np.int64) * heights[known])
    return area


def judge_entry(
    entry: ManifestEntry | None, image_path: str, identity_name: str, mask_path: str | None = None
) -> tuple[str, ManifestEntry | None]:
    """(state, refreshed entry): `new`, `stale` (made otherwise), `changed` (another source or mask), or `valid`.

    A source or mask of another size or time is hashed; if the bytes are the same, the entry stays valid and gets a line
    with the new time. A source that is gone cannot have changed, and of one that was not there when its latents were
    adopted nothing is known.

    Args:
        mask_path: of the mask file that the image has now.
    """
    if entry is None:
        return "new", None
    if entry.identity != identity_name:
        return "stale", None
    try:
        status = os.stat(image_path)
        mask_status = None if mask_path is None else os.stat(mask_path)
    except OSError:
        return "valid", None
    mask, source_ns, mask_ns = entry.mask, entry.source_mtime_ns, 0
    if (mask is None) != (mask_path is None):
        return "changed", None
    if entry.source_sha256:
        known = (entry.source_bytes, entry.source_mtime_ns, entry.source_sha256)
        source_ns = find_time_if_same(image_path, status, *known)
    if mask is not None and mask_path is not None and mask_status is not None:
        mask_ns = find_time_if_same(mask_path, mask_status, mask.bytes, mask.mtime_ns, mask.sha256)
    if source_ns is None or mask_ns is None:
        return "changed", None
    if source_ns == entry.source_mtime_ns and (mask is None or mask_ns == mask.mtime_ns):
        return "valid", None
    mask = None if mask is None or mask_path is None else replace(mask, path=mask_path, mtime_ns=mask_ns)
    return "valid", replace(entry, source_path=image_path, source_mtime_ns=source_ns, mask=mask)


def find_time_if_same(path: str, status: os.stat_result, size: int, mtime_ns: int, sha256: str) -> int | None:
    """A file's time of change, if its bytes are those of `sha256`; None if not. At the same time they are the same."""
    if status.st_size != size:
        return None
    same = status.st_mtime_ns == mtime_ns or hash_file(Path(path)) == sha256
    return status.st_mtime_ns if same else None


def estimate_item_bytes(identity: Identity) -> int:
    """Bytes stored for each 8x8 block of pixels."""
    arrays = (2 if identity.posterior == "moments" else 1) * (2 if identity.flip else 1)
    return LATENT_CHANNELS * DTYPE_BYTES[identity.dtype] * arrays


class _Folders:
    """Which files are there, by listing each folder once: a look at each of a million files takes far longer."""

    def __init__(self, root: Path):
        self._root = str(root)
        self._names: dict[str, set[str]] = {}

    def have(self, file: str) -> bool:
        """Whether `file`, relative to the root or absolute, exists; an unfinished shard does."""
        folder, name = os.path.split(os.path.join(self._root, file))
        if folder not in self._names:
            try:
                self._names[folder] = set(os.listdir(folder))
            except OSError:
                self._names[folder] = set()
        return name in self._names[folder] or get_partial_path(Path(name)).name in self._names[folder]
