"""Compaction of a manifest: parts of lines become parts of columns."""

from pathlib import Path

from loguru import logger

from sdxl_trainer.data.files import sync_folder
from sdxl_trainer.data.formats import manifest_columns
from sdxl_trainer.data.formats.manifest import find_highest_number, list_manifest_parts, read_part


def compact_parts(folder: Path) -> list[Path]:
    """Write the entries of all parts that hold lines as columns, delete those parts, and merge small parts of columns.

    No job may be writing the cache. A part with a damaged line, or with a checksum that is none, stays as it is.

    Returns:
        The parts that stay as lines.
    """
    kept, columns = [], []
    for part in list_manifest_parts(folder):
        if part.suffix == manifest_columns.SUFFIX:
            columns.append(part)
            continue
        # The number keeps the names apart: a job may append lines to a new part of this rank.
        new, damaged = part.with_name(f"{part.stem}-{find_highest_number(part):x}{manifest_columns.SUFFIX}"), []
        try:
            manifest_columns.write_entries(new, read_part(part, damaged))
        except ValueError as error:
            damaged.append(f"{part}: {error}")
        if damaged:
            new.unlink(missing_ok=True)
            logger.warning("{} stays as lines: {}", part, damaged[0])
            kept.append(part)
            continue
        sync_folder(part.parent)
        part.unlink()
        columns.append(new)
    manifest_columns.merge_small_files(columns)
    return kept
