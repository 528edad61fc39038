"""Survey of a data set before its images are encoded: what in it deserves a second look, and how often tags are used.

Everything that metadata hold is read of all records. What needs open files is read of a sample, which is the same at
each start.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.progress import track

from sdxl_trainer.cache.preview.limits import SurveyLimits
from sdxl_trainer.configs.language.translate import translate
from sdxl_trainer.configs.problems import describe_seconds
from sdxl_trainer.configs.schema import Config, DataConfig
from sdxl_trainer.data.images.bucket import BucketRule, Size, list_buckets, place_image
from sdxl_trainer.data.images.duplicates import Likeness, group_alike, group_equal_files, measure_likeness
from sdxl_trainer.data.images.kohya_folders import find_kohya_folder
from sdxl_trainer.data.images.transforms import BadImageError, open_thumbnail, verify_aspect_ratio
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.index.missing_latents import GIVEN_SUFFIXES
from sdxl_trainer.data.index.selection import build_bucket_rules
from sdxl_trainer.data.loading.counts import MeasuredCaptions, measure_captions
from sdxl_trainer.data.loading.dataset import LatentDataset
from sdxl_trainer.data.metadata.values import TAG_FIELDS
from sdxl_trainer.data.order.even_selection import select_keyed
from sdxl_trainer.data.order.keyed_random import RandomStream, derive_seed
from sdxl_trainer.data.text.captions import (
    CaptionSettings,
    build_caption_settings,
    list_tags,
    read_caption_fields,
)

LIKENESS_PX = 64  # longer side of the thumbnails that are compared
NUM_COMPARED = 200_000  # files whose sizes are compared, to find equal ones
NUM_TAGGED = 1_000_000  # records whose tags are counted
NUM_MEASURED = 20_000  # captions whose tokens are counted
MAX_TAG_LETTERS = 80
RECORDS_AT_ONCE = 8192
MAX_LISTED = 10_000  # findings of a kind that are listed


class Finding(NamedTuple):
    """A record of a section: its row in the records, and what is to be said about it."""

    row: int
    detail: str = ""
    group: int = 0  # number of the group of duplicates, from 1; 0: no group


@dataclass(frozen=True, kw_only=True)
class Section:
    """All findings of one kind."""

    name: str
    title: str
    num_found: int  # images
    looked_at: str  # what was looked at, in words
    findings: list[Finding]  # at most MAX_LISTED


@dataclass(frozen=True, kw_only=True)
class TagCounts:
    """Uses of each tag in the captions that were read."""

    num_captions: int
    counts: Counter[str]


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Findings and figures of a survey.

    Args:
        sizes: [N, 2] int64 (width, height) of each record's image, 0 if unknown.
        buckets: [N, 2] int64 bucket of each at the largest resolution, 0 if unknown.
    """

    sections: list[Section]
    tags: TagCounts
    sizes: np.ndarray
    buckets: np.ndarray
    num_images: int
    num_opened: int
    seconds: float  # that opening took

    @property
    def extent(self) -> str:
        """The number of opened images, the time that this took, and the time that all would take."""
        text = f"{self.num_opened:,} of {self.num_images:,} images were opened, in {self.seconds:.1f} s"
        if self.num_opened in (0, self.num_images):
            return text
        return f"{text}; all would take about {describe_seconds(self.seconds * self.num_images / self.num_opened)}"


class Placements(NamedTuple):
    """The placement of images at a resolution, each [N], 0 if the size is unknown."""

    buckets: np.ndarray  # [N, 2] int64
    resized: np.ndarray  # [N, 2] int64
    enlargement: np.ndarray  # factor of each side
    cropped: np.ndarray  # share of the resized image


def survey_records(config: Config, records: Index, samples: Index, limits: SurveyLimits, console: Console) -> Survey:
    """Survey the records of a data set.

    Args:
        samples: index of the samples, which holds the sizes of images with latents; may be empty.
        console: shows how much will be opened, and on a terminal how much is.
    """
    paths = records.arrow_column("image_path")
    rows = find_image_rows(records)
    key = derive_seed(config.run.seed, RandomStream.PREVIEW)
    chosen = rows[select_keyed(len(rows), limits.limit(limits.num_opened), key)]
    ending = "" if len(chosen) == len(rows) else " (a sample; --examine 0 opens all)"
    console.print(translate(f"opening {len(chosen):,} of {len(rows):,} images{ending}"), highlight=False)
    started = time.monotonic()
    rule = build_bucket_rules(config.data)[""]
    opened = open_images([str(paths[row]) for row in chosen.tolist()], rule, config.cache.num_workers, console)
    seconds = time.monotonic() - started
    sizes = collect_sizes(records, samples, chosen, opened)
    placements = place_images(sizes, rule)
    compared = rows[select_keyed(len(rows), limits.limit(NUM_COMPARED), key)]
    equal = group_equal_files([str(paths[row]) for row in compared.tolist()], config.cache.num_workers)
    equal = [compared[group].tolist() for group in equal]
    return Survey(
        sections=[
            find_uncaptioned(records),
            *find_folder_captions(records, config.data),
            find_unusable(chosen, opened),
            build_group_section("equal", "equal files", equal, f"{len(compared):,} files"),
            find_alike(chosen, opened, equal),
            *find_misfits(sizes, placements, limits),
        ],
        tags=count_tags(records, build_caption_settings(config.data.caption), limits.limit(NUM_TAGGED)),
        sizes=sizes,
        buckets=placements.buckets,
        num_images=len(rows),
        num_opened=len(chosen),
        seconds=seconds,
    )


def find_image_rows(records: Index) -> np.ndarray:
    """Return the rows whose record names an image, and not latents in place of one, [K] int64."""
    paths = records.arrow_column("image_path")
    is_image = records.arrow_column("offset").is_null().to_numpy()
    for suffix in GIVEN_SUFFIXES:
        is_image &= ~pc.call_function("ends_with", [paths], pc.MatchSubstringOptions(suffix)).to_numpy()
    return np.flatnonzero(is_image)


class OpenedImage(NamedTuple):
    """The look and the upright size of an image."""

    likeness: Likeness
    size: Size


def open_images(
    paths: Sequence[str], rule: BucketRule, num_workers: int, console: Console
) -> list[OpenedImage | BadImageError]:
    """Open images on threads; in place of one that cannot be used, return the reason."""

    def open_one(path: str) -> OpenedImage | BadImageError:
        try:
            image, size = open_thumbnail(Path(path), LIKENESS_PX)
            verify_aspect_ratio(size, rule)
        except BadImageError as error:
            return BadImageError(str(error).removeprefix(f"{path}: "))  # the table names the file
        return OpenedImage(measure_likeness(image), size)

    with ThreadPoolExecutor(num_workers) as pool:
        opened = pool.map(open_one, paths)
        hidden = not console.is_terminal
        return list(track(opened, "opening images", len(paths), console=console, transient=True, disable=hidden))


def collect_sizes(
    records: Index, samples: Index, rows: np.ndarray, opened: Sequence[OpenedImage | BadImageError]
) -> np.ndarray:
    """Return each image's (width, height), [N, 2] int64: of the open image, or else its latents, or else the record."""
    sizes = np.stack([records.column("width"), records.column("height")], axis=1).astype(np.int64)
    keys = pc.SetLookupOptions(samples.arrow_column("key").combine_chunks())
    places = pc.call_function("index_in", [records.arrow_column("key")], keys).fill_null(-1).to_numpy()
    cached = np.stack([samples.column(f"original_{side}") for side in ("width", "height")], axis=1)
    sizes[places >= 0] = cached[places[places >= 0]]
    for row, image in zip(rows.tolist(), opened, strict=True):
        if isinstance(image, OpenedImage):
            sizes[row] = image.size
    return sizes


def place_images(sizes: np.ndarray, rule: BucketRule) -> Placements:
    """Compute the placement of images by their sizes, [N, 2]. Each size is placed once."""
    packed, inverse = np.unique(sizes[:, 0] << 32 | sizes[:, 1], return_inverse=True)
    buckets, placed = list_buckets(rule), np.zeros((len(packed), 4), np.int64)
    for number, value in enumerate(packed.tolist()):
        size = Size(value >> 32, value & 0xFFFFFFFF)
        if min(size) > 0:
            placement = place_image(size, rule, buckets)
            placed[number] = (*placement.bucket, *placement.resized)
    placed = placed[inverse.ravel()]
    bucket_px, resized_px, image_px = (each.prod(1) for each in (placed[:, :2], placed[:, 2:], sizes))
    return Placements(
        buckets=placed[:, :2],
        resized=placed[:, 2:],
        enlargement=np.sqrt(resized_px / np.maximum(image_px, 1)),
        cropped=np.where(resized_px > 0, 1 - bucket_px / np.maximum(resized_px, 1), 0.0),
    )


def find_uncaptioned(records: Index) -> Section:
    """List the records without a caption."""
    rows = np.flatnonzero(~records.column("captioned"))
    findings = [Finding(row) for row in rows[:MAX_LISTED].tolist()]
    looked_at = f"all {len(records):,} records"
    return Section(name="uncaptioned", title="no caption", num_found=len(rows), looked_at=looked_at, findings=findings)


def find_folder_captions(records: Index, data: DataConfig) -> Iterator[Section]:
    """Yield the list of records whose caption is the name of their folder, if `data.kohya_folders` gives such."""
    if not data.kohya_folders:
        return
    roots = [os.path.abspath(root) for root in (*data.image_dirs, *data.regularisation_dirs)]
    folders = [os.path.dirname(path) for path in records.arrow_column("image_path").to_pylist()]
    parsed = {folder: find_kohya_folder(folder, roots) for folder in dict.fromkeys(folders)}
    captions = [found.caption if (found := parsed[folder]) else None for folder in folders]
    named = [(row, text) for row, text in enumerate(captions) if text and records.record(row)["caption"] == text]
    yield Section(
        name="folder-caption",
        title="caption from the name of its folder",
        num_found=len(named),
        looked_at=f"all {len(records):,} records",
        findings=[Finding(row, caption) for row, caption in named[:MAX_LISTED]],
    )


def find_unusable(rows: np.ndarray, opened: Sequence[OpenedImage | BadImageError]) -> Section:
    """List the images that cannot be opened, or are narrower than the settings allow."""
    bad = zip(rows.tolist(), opened, strict=True)
    findings = [Finding(row, str(image)) for row, image in bad if isinstance(image, BadImageError)]
    return Section(
        name="unusable",
        title="cannot be used",
        num_found=len(findings),
        looked_at=f"{len(rows):,} opened images",
        findings=findings[:MAX_LISTED],
    )


def find_alike(
    rows: np.ndarray, opened: Sequence[OpenedImage | BadImageError], equal: Sequence[Sequence[int]]
) -> Section:
    """List groups of images that look alike. Of files with equal bytes, which are listed already, only one counts."""
    copies = {row for group in equal for row in group[1:]}
    numbers = [at for at, row in enumerate(rows.tolist()) if isinstance(opened[at], OpenedImage) and row not in copies]
    groups = group_alike([image.likeness for at in numbers if isinstance(image := opened[at], OpenedImage)])
    found = [[int(rows[numbers[place]]) for place in group] for group in groups]
    return build_group_section("alike", "look alike", found, f"{len(rows):,} opened images")


def build_group_section(name: str, title: str, groups: Sequence[Sequence[int]], looked_at: str) -> Section:
    """Build the section of groups of duplicates, the largest group first."""
    ordered = sorted(groups, key=len, reverse=True)
    findings = [Finding(row, group=number) for number, group in enumerate(ordered, start=1) for row in group]
    return Section(name=name, title=title, num_found=len(findings), looked_at=looked_at, findings=findings[:MAX_LISTED])


def find_misfits(sizes: np.ndarray, placements: Placements, limits: SurveyLimits) -> list[Section]:
    """List the images that are enlarged much, and those that lose much by the crop, the worst first."""
    looked_at = f"{int((sizes[:, 0] > 0).sum()):,} images of known size"

    def name_size(pair: np.ndarray) -> str:
        return f"{pair[0]}x{pair[1]}"

    def build(name: str, title: str, values: np.ndarray, limit: float, describe: Callable[[int], str]) -> Section:
        rows = np.flatnonzero(values > limit)
        rows = rows[np.argsort(-values[rows], kind="stable")]
        findings = [Finding(row, describe(row)) for row in rows[:MAX_LISTED].tolist()]
        return Section(name=name, title=title, num_found=len(rows), looked_at=looked_at, findings=findings)

    def describe_enlarged(row: int) -> str:
        change = f"{name_size(sizes[row])} to {name_size(placements.resized[row])}"
        return f"{placements.enlargement[row]:.1f} times, {change}"

    def describe_cropped(row: int) -> str:
        return f"{placements.cropped[row]:.0%} of {name_size(sizes[row])}, bucket {name_size(placements.buckets[row])}"

    enlarged = f"enlarged more than {limits.max_enlargement:g} times"
    cropped = f"more than {limits.max_cropped:.0%} cropped away"
    return [
        build("enlarged", enlarged, placements.enlargement, limits.max_enlargement, describe_enlarged),
        build("cropped", cropped, placements.cropped, limits.max_cropped, describe_cropped),
    ]


def find_cut_captions(dataset: LatentDataset, records: Index, limits: SurveyLimits) -> tuple[Section, MeasuredCaptions]:
    """List the captions longer than `data.max_tokens`, the longest first; also return the measured captions."""
    settings, index = dataset.settings, dataset.index
    key = derive_seed(settings.seed, RandomStream.PREVIEW)
    measured = measure_captions(dataset, select_keyed(len(index), limits.limit(NUM_MEASURED), key))
    rows, longest = measured.rows, measured.lengths.max(1, initial=0)
    cut = np.flatnonzero(longest > settings.max_tokens)
    cut = cut[np.argsort(-longest[cut], kind="stable")]
    # The rows are those of the samples; a section lists records.
    keys = pa.array([str(index.record(row)["key"]) for row in rows[cut[:MAX_LISTED]].tolist()], pa.string())
    options = pc.SetLookupOptions(records.arrow_column("key").combine_chunks())
    of_record = pc.call_function("index_in", [keys], options).to_pylist()
    findings = [Finding(row, f"{longest[at]} tokens") for row, at in zip(of_record, cut.tolist(), strict=False)]
    section = Section(
        name="cut",
        title=f"caption longer than data.max_tokens = {settings.max_tokens}",
        num_found=len(cut),
        looked_at=f"{len(rows):,} captions",
        findings=findings,
    )
    return section, measured


def count_tags(records: Index, settings: CaptionSettings, limit: int) -> TagCounts:
    """Count the tags in the captions of at most `limit` records, with aliases and implications applied."""
    separator = settings.separator
    counts: Counter[str] = Counter()
    rows = select_keyed(len(records), limit, 0)
    num_captions = 0
    for start in range(0, len(rows), RECORDS_AT_ONCE):
        for content in records.read_contents(rows[start : start + RECORDS_AT_ONCE]):
            caption = read_caption_fields(orjson.loads(content), TAG_FIELDS, separator)
            tags = {tag[:MAX_TAG_LETTERS] for tag in list_tags(caption, settings)}
            num_captions += bool(tags)
            counts.update(tags)
    return TagCounts(num_captions=num_captions, counts=counts)
