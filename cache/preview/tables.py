"""Tables of the preview: the same ones for the console and for the page."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.markup import escape
from rich.table import Table

from sdxl_trainer.cache.preview.survey import Section, Survey, TagCounts
from sdxl_trainer.configs.language.translate import translate, translate_label
from sdxl_trainer.configs.problems import escape_controls, format_count
from sdxl_trainer.configs.schema import Config, DataConfig
from sdxl_trainer.data.checks.latent_files import ROWS_A_TASK, find_bad_latents
from sdxl_trainer.data.checks.records import count_uncaptioned
from sdxl_trainer.data.checks.training_set import count_missing
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.index.selection import get_cache_folder
from sdxl_trainer.data.loading.counts import TokenCounts, draw_captions, without_dropout
from sdxl_trainer.data.loading.dataset import LatentDataset
from sdxl_trainer.data.order.even_selection import select_evenly
from sdxl_trainer.data.order.source_weights import list_repeats

NUM_BLOCKS = 8  # blocks of ROWS_A_TASK samples whose latents are verified
NUM_SHOWN, NUM_DRAWS = 5, 3  # samples in the table of captions, and captions drawn of each
NUM_NAMED = 10  # images or groups of a section that the console names
NUM_TAGS = 30
MAX_BUCKETS = 60
MAX_SOURCES = 30


@dataclass(frozen=True)
class DataTable:
    """A table of texts. Without headings it has rows of names and values.

    Args:
        translated: columns that the console shows in the user's language. The others may hold the user's texts.
        ending: line below the rows on the console, in English.
    """

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    translated: tuple[int, ...] = ()
    ending: str = ""

    def draw(self) -> Table:
        """Build the table for the console. Texts of the user's data are shown as they are, whatever they hold."""
        headings = self.headings or ("",) * max(map(len, self.rows), default=0)
        shown = [translate_label(heading) for heading in headings]
        table = Table(*shown, title=escape(translate_label(self.title)), show_header=bool(self.headings))
        for row in self.rows:
            cells = [translate_label(cell) if at in self.translated else cell for at, cell in enumerate(row)]
            table.add_row(*(escape(escape_controls(cell)) for cell in cells))
        if self.ending:
            table.add_row(escape(translate(self.ending)))
        return table


def tabulate_state(config: Config, records: Index, index: Index) -> DataTable:
    """Build the table of sample counts: total, missing and bad."""
    num_wanted = index.summary.num_wanted
    blocks = select_evenly(-(-len(index) // ROWS_A_TASK), NUM_BLOCKS) * ROWS_A_TASK
    num_verified = int(np.minimum(len(index) - blocks, ROWS_A_TASK).sum())
    bad = find_bad_latents(index, get_cache_folder(config), "header", blocks.tolist())
    counts = {
        "records": len(records),
        "without a caption": count_uncaptioned(records),
        "samples (records x resolutions)": num_wanted,
        "with latents": len(index) - index.summary.num_uncached,
        "encoded during training": index.summary.num_uncached,
        "skipped: no latents": count_missing(index),
        "skipped: bad": index.summary.num_bad,
    }
    rows = [(name, f"{count:,}", f"{count / max(1, num_wanted):.1%}") for name, count in counts.items()]
    rows.append((f"bad among {num_verified:,} verified", f"{len(bad):,}", f"{len(bad) / max(1, num_verified):.1%}"))
    shown = [("", row.reason, "") for row in bad[:NUM_SHOWN]]
    return DataTable(f"{config.run.name}: samples", (), [*rows, *shown], translated=(0,))


def tabulate_repeats(index: Index, data: DataConfig) -> list[DataTable]:
    """Build the table of repeats by folder or entry of the settings; none if each sample is used once an epoch.

    Args:
        index: of the samples or, before anything is cached, of the records.
    """
    found = list_repeats(index, data)
    rows = [
        (each.name, f"{each.num_samples:,}", f"{each.num_used / each.num_samples:g}", f"{each.num_used:,.6g}")
        for each in found[:MAX_SOURCES]
    ]
    if found[MAX_SOURCES:]:
        rest = sum(each.num_samples for each in found[MAX_SOURCES:]), sum(each.num_used for each in found[MAX_SOURCES:])
        rows.append((f"{len(found) - MAX_SOURCES} others", f"{rest[0]:,}", "", f"{rest[1]:,.6g}"))
    num_samples, num_used = sum(each.num_samples for each in found), sum(each.num_used for each in found)
    title = f"repeats: {num_samples:,} samples, {num_used:,.6g} an epoch"
    return [DataTable(title, ("folder or entry", "samples", "repeats", "samples an epoch"), rows)] if found else []


def tabulate_survey(survey: Survey) -> DataTable:
    """Build the table of what the survey found, one row for each kind."""
    rows = []
    for section in survey.sections:
        num_groups = count_groups(section)
        groups = format_count(num_groups, "group") if num_groups else ""
        rows.append((section.title, f"{section.num_found:,}", groups, section.looked_at))
    return DataTable("worth a look", ("images", "found", "", "among"), rows, translated=(0, 2, 3))


def count_groups(section: Section) -> int:
    """Return the number of groups of duplicates in a section."""
    return max((finding.group for finding in section.findings), default=0)


def tabulate_section(section: Section, names: Sequence[str]) -> DataTable:
    """Build the table that names the first images of a section; a group of duplicates takes one row.

    Args:
        names: of the images of the section's findings.
    """
    if count_groups(section):
        groups: dict[int, list[str]] = {}
        for finding, name in zip(section.findings, names, strict=True):
            groups.setdefault(finding.group, []).append(name)
        rows = [(" = ".join(group[:NUM_NAMED]), format_count(len(group), "image")) for group in groups.values()]
        num_rows = len(rows)
    else:
        details = [(finding.detail,) if finding.detail else () for finding in section.findings]
        rows, num_rows = [(name, *detail) for name, detail in zip(names, details, strict=True)], section.num_found
    left = num_rows - NUM_NAMED
    ending = f"... and {left:,} more" if left > 0 else ""
    return DataTable(section.title, (), rows[:NUM_NAMED], translated=(1,), ending=ending)


def tabulate_buckets(sizes: dict[str, int], title: str, per_batch: int) -> DataTable:
    """Build the table of samples and global batches per bucket, the fullest bucket first.

    Args:
        sizes: samples of each bucket, fullest first; buckets are named 1024x1024.
    """
    total, names = sum(sizes.values()), list(sizes)
    rows = []
    for bucket in names[:MAX_BUCKETS]:
        (width, height), count = map(int, bucket.split("x")), sizes[bucket]
        rows.append((bucket, f"{width / height:.2f}", f"{count:,}", f"{count / total:.1%}", f"{count / per_batch:.1f}"))
    if len(names) > MAX_BUCKETS:
        rest = sum(sizes[bucket] for bucket in names[MAX_BUCKETS:])
        rows.append((f"{len(names) - MAX_BUCKETS} others", "", f"{rest:,}", f"{rest / total:.1%}", ""))
    return DataTable(title, ("bucket", "ratio", "samples", "share", "batches"), rows, translated=(0,))


def tabulate_lengths(counts: TokenCounts) -> DataTable:
    """Build the table of caption lengths for both tokenizers."""
    number, (num_cut, num_cut_2) = counts.num_captions, counts.num_cut
    longer = (
        f"longer than data.max_tokens = {counts.max_tokens}: {num_cut:,} for encoder 1, {num_cut_2:,} for encoder 2"
    )
    rows = []
    # The empty captions of the data, apart from those that training drops by design.
    empty = [count - counts.num_dropped for count in counts.classes["0"]]
    for name, counted in {"dropped": [counts.num_dropped] * 2, **counts.classes, "0": empty}.items():
        bars = ((str(count), "█" * round(20 * count / max(1, number))) for count in counted)
        rows.append((name, *(cell for pair in bars for cell in pair)))
    title = f"tokens of {number:,} captions; {longer}"
    return DataTable(title, ("tokens", "encoder 1", "", "encoder 2", ""), rows, translated=(0,))


def tabulate_tags(tags: TagCounts) -> DataTable:
    """Build the table of the most frequent tags."""
    num_once = sum(count == 1 for count in tags.counts.values())
    title = f"{len(tags.counts):,} different tags in {tags.num_captions:,} captions; {num_once:,} occur once"
    most = tags.counts.most_common(NUM_TAGS)
    rows = [(tag, f"{count:,}", f"{count / max(1, tags.num_captions):.1%}") for tag, count in most]
    return DataTable(title, ("tag", "captions", "share"), rows)


def show_captions(dataset: LatentDataset, rows: np.ndarray, epoch: int) -> list[str]:
    """Return the captions of samples in an epoch; in place of those without text, the reason in brackets."""
    kept = draw_captions(without_dropout(dataset), rows, epoch)
    failed, dropped = translate("(the strategy failed)"), translate("(dropped by design)")
    empty = translate_label("(empty)")
    return [
        failed if caption is None else caption or (dropped if whole else empty)
        for caption, whole in zip(draw_captions(dataset, rows, epoch), kept, strict=True)
    ]


def tabulate_captions(dataset: LatentDataset) -> DataTable:
    """Build the table of a few samples' captions, as drawn in the first epochs."""
    rows = select_evenly(len(dataset.index), NUM_SHOWN)
    drawn = [show_captions(dataset, rows, epoch) for epoch in range(NUM_DRAWS)]
    keys = (str(dataset.index.row(row)["key"]) for row in rows.tolist())
    lines = list(zip(keys, *drawn, strict=True))
    return DataTable("captions", ("sample", *(f"epoch {epoch}" for epoch in range(NUM_DRAWS))), lines)
