"""Source of a copy: a cache in a folder, or a cache on a store, which is read by ranges of its shards."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sdxl_trainer.cache.encode.storage import (
    ITEM_ERRORS,
    Content,
    read_item,
    read_remote_item,
    read_remote_text_item,
    read_text_item,
)
from sdxl_trainer.data.formats.latents import parse_latents
from sdxl_trainer.data.formats.manifest import ManifestEntry
from sdxl_trainer.data.formats.text_outputs import parse_text_outputs

NUM_READERS = 16  # items of a store that are read at once


class SourceItem(NamedTuple):
    """The bytes of an item."""

    record: Content  # JSON; `{}` for an npz file of its own
    npz: Content
    text: Content | None


@dataclass(frozen=True)
class CopySource:
    """The cache that is copied.

    Args:
        folder: of the cache, or of the mirror of a cache on a store.
        url: of a cache on a store; None for a folder.
    """

    folder: Path
    url: str | None = None

    def read_items(self, entries: Sequence[ManifestEntry]) -> Iterator[SourceItem | Exception]:
        """Yield the bytes of each item, or the error of an item that differs from the manifest or cannot be read.

        Raises:
            StoreError: the store denies access, or does not answer.
        """
        if self.url is None:
            yield from map(self._read, entries)
            return
        with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="copy-reader") as pool:
            # In groups, because a shard of items may be larger than the memory.
            for start in range(0, len(entries), NUM_READERS):
                yield from pool.map(self._read, entries[start : start + NUM_READERS])

    def _read(self, entry: ManifestEntry) -> SourceItem | Exception:
        try:
            if self.url is None:
                (record, npz), text = read_item(self.folder, entry), read_text_item(self.folder, entry)
            else:
                (record, npz), text = read_remote_item(self.url, entry), read_remote_text_item(self.url, entry)
            parse_latents(npz, entry.bucket, check_crc=False)
            if text is not None and entry.text is not None:
                parse_text_outputs(text, entry.text.variants, check_crc=False)
        except ITEM_ERRORS as error:
            return error
        return SourceItem(record, npz, text)
