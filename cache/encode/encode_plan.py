"""Encode plans: each rank's share of the records, and the missing or stale latents and text of the share."""

import os
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
from loguru import logger

from sdxl_trainer.cache.encode.decoder import WorkItem
from sdxl_trainer.cache.encode.pipeline import TextItem, choose_text_file
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.files import hash_file
from sdxl_trainer.data.formats.latents import VAE_FACTOR
from sdxl_trainer.data.formats.manifest import Identity, ManifestEntry, TextIdentity, TextPart
from sdxl_trainer.data.formats.shards import get_partial_path
from sdxl_trainer.data.images.bucket import BucketRule, Size, is_too_narrow, list_buckets, place_image
from sdxl_trainer.data.images.masks import MaskFinder
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.index.missing_latents import GIVEN_SUFFIXES, choose_output_file, find_shared_files
from sdxl_trainer.data.index.moved_keys import find_moved_entries
from sdxl_trainer.data.index.selection import build_bucket_rules, get_cache_folder
from sdxl_trainer.data.text.strategy import StrategyError
from sdxl_trainer.data.text.variants import CaptionVariants, hash_captions
from sdxl_trainer.launch.activity import ACTIVITY

State = Literal["valid", "new", "stale", "changed", "missing", "bad"]

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
STATES: tuple[State, ...] = ("valid", "new", "stale", "changed", "missing", "bad")
MASK_BYTES_PER_PX = 4
ITEM_OVERHEAD_BYTES = 1200  # npz headers, sizes, crop, and the line in the manifest


@dataclass(frozen=True)
class Resolution:
    """A training resolution: its bucket rule, the identity of its latents, and the prefix of their keys."""

    rule: BucketRule
    identity: Identity
    prefix: str = ""


@dataclass(frozen=True)
class Share:
    """A rank's images at one resolution: their rows in the index, and the keys of their latents."""

    resolution: Resolution
    rows: list[int]
    keys: list[str]


@dataclass(frozen=True)
class TextRequirement:
    """Text encoder outputs that the settings require.

    Args:
        caption_bytes: size on disk of the outputs of one caption.
        in_shards: new outputs are stored beside the latents in a shard, so latents and text are encoded together.
    """

    variants: CaptionVariants
    identity: TextIdentity
    caption_bytes: int
    in_shards: bool = False

    @property
    def item_bytes(self) -> int:
        """Size on disk of the outputs of all captions of an image."""
        return self.caption_bytes * self.variants.count

    def is_valid(self, record: bytes, known: TextPart | None) -> bool:
        """Return whether cached outputs have this identity and belong to the record's captions.

        Captions on which the user's strategy fails count as invalid; the encoding reports the failure.
        """
        if known is None or known.identity != self.identity.name:
            return False
        try:
            return known.captions_sha256 == hash_captions(self.variants.build(orjson.loads(record)))
        except StrategyError:
            return False


@dataclass(frozen=True)
class PlanTotals:
    """Counts of an `EncodePlan`, which ranks exchange instead of its items."""

    counts: Counter
    bytes_needed: int
    num_items: int


@dataclass(kw_only=True)
class EncodePlan:
    """A rank's work at one resolution.

    Args:
        identity: name of the latents' identity.
        items: images to encode.
        texts: valid latents whose captions are to be encoded.
        counts: number of latents in each of `STATES`, and of images with captions to encode (`text`), with a mask
            (`masked`), and with latents named by the record (`given`).
        refreshed: entries of files with new times and the same content, which only need a new line in the manifest.
        latent_bytes: estimated size on disk of the new latents.
        text_bytes: that of the new text encoder outputs.
        num_pixels: pixels of all items' buckets.
    """

    rule: BucketRule
    identity: str
    items: list[WorkItem] = field(default_factory=list)
    texts: list[TextItem] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    refreshed: list[ManifestEntry] = field(default_factory=list)
    latent_bytes: int = 0
    text_bytes: int = 0
    num_pixels: int = 0

    @property
    def bytes_needed(self) -> int:
        """Estimated size on disk of the new files."""
        return self.latent_bytes + self.text_bytes

    @property
    def num_items(self) -> int:
        """Number of images whose latents or captions are to be encoded."""
        return len(self.items) + len(self.texts)

    @property
    def has_captions(self) -> bool:
        """Return whether there are captions to encode."""
        return bool(self.texts) or any(item.with_text for item in self.items)

    @property
    def totals(self) -> PlanTotals:
        """Counts of the plan without its items, of which there may be millions."""
        return PlanTotals(self.counts, self.bytes_needed, self.num_items)

    def add_item(self, item: WorkItem, num_pixels: int, block_bytes: int) -> None:
        """Add an image of `num_pixels` whose latents take `block_bytes` for each 8x8 block of pixels."""
        self.items.append(item)
        self.num_pixels += num_pixels
        self.latent_bytes += num_pixels * block_bytes // VAE_FACTOR**2 + ITEM_OVERHEAD_BYTES
        self.latent_bytes += num_pixels * MASK_BYTES_PER_PX if item.mask_path is not None else 0

    def keep_items(self, kept: Sequence[WorkItem]) -> None:
        """Keep some of the images. Their pixels and bytes are estimated by their number."""
        num_items = max(1, len(self.items))
        self.num_pixels = self.num_pixels * len(kept) // num_items
        self.latent_bytes = self.latent_bytes * len(kept) // num_items
        self.items[:] = kept

    def count_text(self, num_bytes: int) -> None:
        """Count an image whose captions are to be encoded, with the size of their outputs."""
        self.counts["text"] += 1
        self.text_bytes += num_bytes


class EntryState(NamedTuple):
    """State of an image's latents, and their entry with new file times if only the file times have changed."""

    state: State
    refreshed: ManifestEntry | None


@dataclass(frozen=True)
class _Image:
    """An image of a share, and its entry in the manifest."""

    row: int
    key: str
    path: str
    mask_path: str | None
    known: ManifestEntry | None


class EncodePlanner:
    """Compares a rank's share with the cache.

    Args:
        files: cache folder, or the files of a cache on a store.
        entries: newest manifest entry of each key of the share; other keys are ignored.
        beside: store latents beside the images instead of under the cache folder.
        text: required text encoder outputs; None encodes no captions.
        known_only: count images without an entry, but do not encode them.
        masks: finder of mask files; None if there are no mask files.
        refused: reasons why images cannot be encoded, by their rows.
    """

    def __init__(
        self,
        index: Index,
        files: Path | Container[str],
        entries: Mapping[str, ManifestEntry],
        *,
        beside: bool,
        text: TextRequirement | None = None,
        known_only: bool = False,
        masks: MaskFinder | None = None,
        refused: Mapping[int, str] | None = None,
    ):
        self._index = index
        self._entries = entries
        self._beside = beside
        self._text = text
        self._known_only = known_only
        self._masks = masks
        self._refused = refused or {}
        self._has_file = _FileLister(files).exists if isinstance(files, Path) else files.__contains__
        self._paths = index.arrow_column("image_path")
        self._widths, self._heights = index.column("width"), index.column("height")

    def plan(self, share: Share) -> EncodePlan:
        """List the images and captions of a share that are to be encoded."""
        resolution = share.resolution
        plan = EncodePlan(rule=resolution.rule, identity=resolution.identity.name)
        buckets, block_bytes = list_buckets(resolution.rule), estimate_block_bytes(resolution.identity)
        is_first = not resolution.prefix  # images are counted once, not at each resolution
        for image in self._list_images(share):
            if image.path.endswith(GIVEN_SUFFIXES):
                plan.counts["given"] += is_first
                continue
            known = image.known
            state, refreshed = self._classify(image, plan.identity)
            plan.counts[state] += 1
            has_mask = image.mask_path is not None or (known is not None and known.mask is not None)
            plan.counts["masked"] += is_first and has_mask
            if self._known_only and known is None:
                continue
            if state == "valid" and known is not None and image.row not in self._refused:
                self._plan_text(plan, image, refreshed)
                continue
            item = self._build_item(plan, image)
            area = int(np.prod(place_image(item.size, plan.rule, buckets).bucket)) if item.size else plan.rule.area_px
            plan.add_item(item, area, block_bytes)
        return plan

    def _list_images(self, share: Share) -> Iterator[_Image]:
        paths = (self._paths[row].as_py() for row in share.rows)
        masks = repeat(None) if self._masks is None else self._masks.find(paths)
        for row, key, mask in zip(share.rows, share.keys, masks, strict=False):
            path, known = self._paths[row].as_py(), self._entries.get(key)
            ACTIVITY.note()
            yield _Image(row=row, key=key, path=path, mask_path=mask, known=known)

    def _classify(self, image: _Image, identity_name: str) -> EntryState:
        found = classify_entry(image.known, image.path, identity_name, image.mask_path)
        if found.state == "valid" and image.known is not None and not self._has_file(image.known.file):
            return EntryState("missing", found.refreshed)
        return found

    def _find_text(self, known: ManifestEntry | None) -> TextPart | None:
        """Return an entry's text encoder outputs if their file exists."""
        text = None if known is None else known.text
        return text if text is not None and self._has_file(text.file) else None

    def _plan_text(self, plan: EncodePlan, image: _Image, refreshed: ManifestEntry | None) -> None:
        """Plan the captions of valid latents if they must be encoded, else their entry if it has new file times."""
        assert image.known is not None, "valid latents have an entry"
        text = self._text
        if text is not None:
            record = self._index.record_json(image.row)
            if not text.is_valid(record, self._find_text(image.known)):
                file = choose_text_file(choose_output_file(image.key, image.path, self._beside))
                plan.texts.append(TextItem(refreshed or image.known, file, record))
                plan.count_text(text.item_bytes)
                return
        if refreshed is not None:
            plan.refreshed.append(refreshed)

    def _build_item(self, plan: EncodePlan, image: _Image) -> WorkItem:
        record, known, text = self._index.record_json(image.row), image.known, self._text
        kept = self._find_text(known)
        text_due = text is not None and not text.is_valid(record, kept)
        if text is not None and text_due:
            plan.count_text(text.item_bytes)
        # Outputs beside the latents in a shard are replaced together with the latents.
        if kept is not None and (kept.offset is not None or (text is not None and text.in_shards)):
            kept, text_due = None, text is not None
        width, height = int(self._widths[image.row]), int(self._heights[image.row])
        has_new_mask = image.mask_path is not None and known is not None and known.mask is None
        refusal, size = self._refused.get(image.row, ""), Size(width, height)
        is_wrong = refusal != "" and known is not None and known.identity == plan.identity
        return WorkItem(
            key=image.key,
            image_path=image.path,
            file=choose_output_file(image.key, image.path, self._beside),
            size=size if width > 0 and not is_too_narrow(size, plan.rule) else None,
            record=record,
            with_text=text_due,
            text=kept,
            mask_path=image.mask_path,
            refusal=refusal,
            outdated=known if has_new_mask or is_wrong else None,
        )


def build_planner(
    config: Config,
    index: Index,
    entries: Mapping[str, ManifestEntry],
    text: TextRequirement | None,
    known_only: bool,
    stored: Container[str] | None = None,
) -> EncodePlanner:
    """Build the planner of the settings. `entries`, `text` and `known_only` are as in `EncodePlanner`.

    Args:
        stored: files of a cache on a store; None looks for files in the cache folder.
    """
    beside, masks = config.cache.dir is None, config.data.masks
    shares_files = beside and config.cache.format == "npz"
    return EncodePlanner(
        index,
        get_cache_folder(config) if stored is None else stored,
        entries,
        beside=beside,
        text=text,
        known_only=known_only,
        masks=None if masks is None else MaskFinder(masks),
        refused=find_shared_files(index.table, text is not None) if shares_files else {},
    )


def assign_positions(costs: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """Return this rank's positions in the full list, in order, so that all ranks have about the same total cost.

    Positions are dealt from the highest cost to the lowest, back and forth between the ranks. The result depends on
    the list alone and not on the cache: ranks never overlap, and any number of ranks covers every position once.

    Args:
        costs: [N] pixels of each image's bucket.
    """
    order = np.argsort(-costs, kind="stable")
    turn = np.arange(len(order)) % (2 * world_size)
    owner = np.minimum(turn, 2 * world_size - 1 - turn)  # 0 1 2 2 1 0 0 1 2 ...
    return np.sort(order[owner == rank])


def build_share(index: Index, resolution: Resolution, rank: int, world_size: int) -> Share:
    """Build a rank's share of all records."""
    costs = compute_costs(index.column("width"), index.column("height"), resolution.rule)
    rows = assign_positions(costs, rank, world_size)
    keys = index.arrow_column("key").take(pa.array(rows)).to_pylist()
    return Share(resolution, rows.tolist(), [resolution.prefix + key for key in keys])


def build_shares(
    config: Config, index: Index, identities: Mapping[str, Identity], rank: int, world_size: int
) -> list[Share]:
    """Build a rank's shares at all resolutions."""
    rules = build_bucket_rules(config.data)
    return [
        build_share(index, Resolution(rule, identities[prefix], prefix), rank, world_size)
        for prefix, rule in rules.items()
    ]


def find_moved(
    config: Config, index: Index, parts: Sequence[Share], entries: Mapping[str, ManifestEntry], bad: Container[str]
) -> dict[str, ManifestEntry]:
    """Find entries of a rank's images that the manifest lists under an earlier key of the image, by the new key.

    Args:
        config, index: as in the job; with metadata, whose keys do not change, nothing is found.
        parts: shares of the rank.
        entries: entries that were found by their key.
        bad: earlier keys of bad items, which count as stale.
    """
    if config.data.metadata:
        return {}
    images = index.arrow_column("image_path")
    pairs = ((key, row) for part in parts for row, key in zip(part.rows, part.keys, strict=True))
    paths = {key: images[row].as_py() for key, row in pairs if key not in entries}
    moved = find_moved_entries(get_cache_folder(config), index.table, paths)
    if moved:
        logger.info("{} images have another key than before, and keep their latents", len(moved))
    return {key: replace(entry.as_stale() if entry.key in bad else entry, key=key) for key, entry in moved.items()}


def compute_costs(widths: np.ndarray, heights: np.ndarray, rule: BucketRule) -> np.ndarray:
    """Compute the number of pixels to encode of each image, [N]: the rule's area, or less for images kept smaller."""
    area = np.full(len(widths), rule.area_px, np.int64)
    if rule.no_upscale:
        known = widths > 0
        area[known] = np.minimum(area[known], widths[known].astype(np.int64) * heights[known])
    return area


def classify_entry(
    entry: ManifestEntry | None, image_path: str, identity_name: str, mask_path: str | None = None
) -> EntryState:
    """Classify latents as `new` (no entry), `stale` (another identity), `changed` (image or mask), or `valid`.

    An image or mask with a new time or size is hashed. If its bytes are unchanged, the entry stays valid and gets the
    new time. An image that no longer exists counts as unchanged, as does one that did not exist when its latents were
    adopted.

    Args:
        mask_path: the image's current mask file.
    """
    if entry is None:
        return EntryState("new", None)
    if entry.identity != identity_name:
        return EntryState("stale", None)
    try:
        status = os.stat(image_path)
        mask_status = None if mask_path is None else os.stat(mask_path)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return EntryState("valid", None)
    mask, source_ns, mask_ns = entry.mask, entry.source_mtime_ns, 0
    if (mask is None) != (mask_path is None):
        return EntryState("changed", None)
    if entry.source_sha256:
        known = (entry.source_bytes, entry.source_mtime_ns, entry.source_sha256)
        source_ns = find_mtime_if_unchanged(image_path, status, *known)
    if mask is not None and mask_path is not None and mask_status is not None:
        mask_ns = find_mtime_if_unchanged(mask_path, mask_status, mask.bytes, mask.mtime_ns, mask.sha256)
    if source_ns is None or mask_ns is None:
        return EntryState("changed", None)
    if source_ns == entry.source_mtime_ns and (mask is None or mask_ns == mask.mtime_ns):
        return EntryState("valid", None)
    mask = None if mask is None or mask_path is None else replace(mask, path=mask_path, mtime_ns=mask_ns)
    return EntryState("valid", replace(entry, source_path=image_path, source_mtime_ns=source_ns, mask=mask))


def find_mtime_if_unchanged(path: str, status: os.stat_result, size: int, mtime_ns: int, sha256: str) -> int | None:
    """Return a file's mtime if its bytes are unchanged, else None. A file of equal size and mtime is not hashed.

    An unreadable file counts as changed; decoding it reports the reason.
    """
    if status.st_size != size:
        return None
    try:
        unchanged = status.st_mtime_ns == mtime_ns or hash_file(Path(path)) == sha256
    except OSError:
        return None
    return status.st_mtime_ns if unchanged else None


def estimate_block_bytes(identity: Identity) -> int:
    """Return the bytes of latents for each 8x8 block of pixels."""
    num_arrays = (2 if identity.posterior == "moments" else 1) * (2 if identity.flip else 1)
    return identity.latent_channels * DTYPE_BYTES[identity.dtype] * num_arrays


class _FileLister:
    """Looks up files in folder listings. Listing each folder once is far faster than one call for each file."""

    def __init__(self, root: Path):
        self._root = str(root)
        self._names: dict[str, set[str]] = {}

    def exists(self, file: str) -> bool:
        """Return whether `file` (relative to the root, or absolute) or its unfinished shard exists."""
        folder, name = os.path.split(os.path.join(self._root, file))
        if folder not in self._names:
            try:
                self._names[folder] = set(os.listdir(folder))
            except OSError:
                self._names[folder] = set()
        return name in self._names[folder] or get_partial_path(Path(name)).name in self._names[folder]
