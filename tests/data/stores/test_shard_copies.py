"""Local copies of remote shards on a disk that fails."""

from pathlib import Path

from loguru import logger

from sdxl_trainer.data.stores.shard_copies import ShardCopies


def test_a_full_disk_ends_the_copying_but_not_the_reading(small_disk: Path) -> None:
    copies, content, warnings = ShardCopies(small_disk, 1 << 30, str), b"x" * 600_000, []
    logger.add(warnings.append, level="WARNING")
    for name in "abcd":
        copies.keep(name, 0, content)
    assert len(warnings) == 1 and f"samples are no longer copied to {small_disk}" in warnings[0]
    assert copies.read("a", 0, len(content)) == content
    assert copies.read("d", 0, len(content)) is None
    (small_disk / "d.holes").mkdir()  # opens, but cannot be read
    assert copies.read("d", 0, len(content)) is None
