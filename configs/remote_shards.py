"""The `data.remote_shards` section: how shards that lie on a store are read."""

from pathlib import Path

from pydantic import Field

from sdxl_trainer.configs.section import Section


class RemoteShardsConfig(Section):
    """How shards that lie on a store (`s3://`, `https://`, ...) are read."""

    shuffle_shards: int = Field(0, ge=0)
    """0: samples are shuffled over the whole set, and each is a ranged read. More: whole shards are copied one after
    the other, in an order that changes each epoch, and samples are shuffled over this many at a time. For stores where
    seeking is dear; 16 or more mix well if shards hold samples of all kinds."""
    copies_dir: Path | None = None
    """Local folder that keeps a copy of all that was read, so that the ranks of the node read it from the store only
    once. Without it every sample is read from the store each time; with `data.remote_shards.shuffle_shards` it is
    `copies` in the cache folder."""
    copies_gb: float = Field(100.0, gt=0)
    """Most that `data.remote_shards.copies_dir` takes, in gigabytes; what was unused for longest is deleted first."""
