"""Settings of shards on remote stores, `data.remote_shards`."""

from pathlib import Path

from pydantic import Field

from sdxl_trainer.configs.section import Section


class RemoteShardsConfig(Section):
    """Reading of shards on a remote store (`s3://`, `gs://`, `https://`)."""

    shuffle_shards: int = Field(0, ge=0)
    """With 0, samples are shuffled over the whole training set, and each is one ranged read. With n, whole shards are
    downloaded one after the other, in an order that changes each epoch, and samples are shuffled over n shards at a
    time. Use it for stores where seeking is slow or expensive. 16 or more mix well if every shard contains samples of
    all kinds."""
    copies_dir: Path | None = None
    """Local folder that keeps a copy of everything that was read; the ranks of a node share it. Without it, every
    sample is read from the store each time. With `data.remote_shards.shuffle_shards`, the default is `copies` in the
    cache folder."""
    copies_gb: float = Field(100.0, gt=0)
    """Maximum size of `data.remote_shards.copies_dir`, in gigabytes. The least recently used copies are deleted
    first."""
