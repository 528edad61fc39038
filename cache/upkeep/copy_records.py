"""The items of a cache that is copied, and their records: from the metadata if they are there, or from the shards."""

import os
from pathlib import Path
from typing import Any

import orjson
from loguru import logger

from sdxl_trainer.cache.encode.storage import recover_shards
from sdxl_trainer.cache.upkeep.copy_source import CopySource
from sdxl_trainer.cache.upkeep.copy_units import read_shard_record
from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.checks.records import open_checked_records
from sdxl_trainer.data.formats.manifest import ManifestEntry, read_latest
from sdxl_trainer.data.formats.shards import BadShardError
from sdxl_trainer.data.images.bucket import split_key
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.index.moved_keys import rename_entries
from sdxl_trainer.data.index.selection import get_store_url


class CopyRecords:
    """The items that a manifest lists, and their records.

    Args:
        folder: of the cache.

    Raises:
        UserInputError: metadata or image folders of the settings are there and cannot be read.
    """

    def __init__(self, config: Config, folder: Path):
        self.source = CopySource(folder, get_store_url(config))
        self._index = open_index(config, folder)
        listed = read_latest(folder)
        if os.access(folder, os.W_OK):
            recover_shards(folder, listed.values())
        self.entries = listed if self._index is None else rename_entries(listed, self._index.table)
        keys = [] if self._index is None else self._index.arrow_column("key").to_pylist()
        self._rows = {key: row for row, key in enumerate(keys)}
        if self._index is None and any(entry.offset is None for entry in listed.values()):
            logger.warning("no metadata are there: npz files get no record in shards, and queries know none of theirs")

    def get_json(self, entry: ManifestEntry) -> bytes:
        """Return the record of an item of the metadata as JSON; `{}` if they have none."""
        row = self._rows.get(entry.key, self._rows.get(split_key(entry.key).name))
        return b"{}" if row is None or self._index is None else self._index.record_json(row)

    def read(self, entry: ManifestEntry) -> dict[str, Any]:
        """Return the record of an item: of the metadata, or beside its latents in a shard; {} if there is none."""
        content = self.get_json(entry)
        if content == b"{}":
            try:
                content = read_shard_record(self.source, entry)
            except (OSError, BadShardError):  # the copy will name the item
                return {}
        fields = orjson.loads(content)
        return fields if isinstance(fields, dict) else {}


def open_index(config: Config, folder: Path) -> Index | None:
    """Open the index of the settings' records; None if the metadata and the images are gone, or the cache is read-only.

    Raises:
        UserInputError: a metadata file is there and cannot be read.
    """
    names = [*config.data.metadata, *config.data.image_dirs]
    if not os.access(folder, os.W_OK) or not any(Path(name).exists() for name in names if "://" not in str(name)):
        return None
    index, problems = open_checked_records(config, need_captions=False)
    if index is None or problems:
        raise UserInputError(problems or [Problem("data.metadata", None, "cannot be read", "check the files")])
    return index
