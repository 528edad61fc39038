"""The `data.stream` section: how shards that lie on a store are read."""

from pathlib import Path

from pydantic import Field

from sdxl_trainer.configs.section import Section


class StreamConfig(Section):
    """How shards that lie on a store (`s3://`, `https://`, ...) are read."""

    copies_dir: Path | None = None
    """Local folder in which what was read is kept, so that it is read from there the next time, by all ranks of the
    node. Without it every sample is read from the store each time."""
    copies_gb: float = Field(100.0, gt=0)
    """Most that `data.stream.copies_dir` takes, in gigabytes; what was unused for longest is deleted first."""
