"""What a finished cache job says of itself: a table on the console and `cache_report.json`."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import orjson
from rich.console import Console
from rich.table import Table

from sdxl_trainer.cache.encode.progress import RankProgress
from sdxl_trainer.data.files import write_atomic
from sdxl_trainer.data.formats.manifest import ManifestEntry


def write_report(folder: Path, ranks: list[RankProgress], entries: Mapping[str, ManifestEntry]) -> None:
    """Write `cache_report.json` and print the same as tables."""
    buckets = Counter(f"{entry.bucket[0]}x{entry.bucket[1]}" for entry in entries.values())
    encoded, seconds = sum(rank.done for rank in ranks), max(rank.seconds for rank in ranks)
    report = {
        "cached": len(entries),
        "encoded": encoded,
        "bad": sum(rank.bad for rank in ranks),
        "seconds": round(seconds, 3),
        "bytes_written": sum(rank.bytes_written for rank in ranks),
        "images_per_second": round(encoded / seconds, 3),
        "device_idle_share": round(sum(rank.wait_seconds for rank in ranks) / sum(rank.seconds for rank in ranks), 4),
        "buckets": dict(sorted(buckets.items())),
        "ranks": [asdict(rank) for rank in ranks],
    }
    write_atomic(folder / "cache_report.json", orjson.dumps(report, option=orjson.OPT_INDENT_2))
    print_report(folder, report)


def print_report(folder: Path, report: dict) -> None:
    """The totals and the buckets, as tables."""
    totals = Table(title=f"latent cache {folder}", show_header=False)
    rows = {
        "latents in the cache": report["cached"],
        "encoded now": report["encoded"],
        "bad images": report["bad"],
        "seconds": f"{report['seconds']:.1f}",
        "images per second": f"{report['images_per_second']:.1f}",
        "device idle": f"{report['device_idle_share']:.1%}",
        "written": f"{report['bytes_written'] / 1e6:.1f} MB",
    }
    for name, value in rows.items():
        totals.add_row(name, str(value))
    buckets = Table("bucket", "latents", title="buckets")
    for name, count in report["buckets"].items():
        buckets.add_row(name, str(count))
    console = Console(stderr=True)
    console.print(totals, buckets)
