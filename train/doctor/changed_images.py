"""Finding about images that have changed since their latents were made, which training does not look at."""

from collections.abc import Iterator

from sdxl_trainer.cache.encode.encode_plan import classify_entry
from sdxl_trainer.configs.problems import format_count
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.formats.manifest import read_latest
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.index.selection import get_cache_folder
from sdxl_trainer.data.order.even_selection import select_evenly
from sdxl_trainer.launch.machine import Finding, announce_stage

NUM_LOOKED_AT = 1000  # images
MAX_SAMPLES = 2_000_000  # of a larger set, reading the manifest takes minutes


def examine_changed_images(config: Config, samples: Index) -> Iterator[Finding]:
    """Compare evenly spaced images with the files that the manifest names, and yield a finding if some differ.

    Images that no longer exist are not needed. Masks are not compared.
    """
    if not 0 < len(samples) <= MAX_SAMPLES:
        return
    rows = [samples.row(number) for number in select_evenly(len(samples), NUM_LOOKED_AT).tolist()]
    announce_stage(f"looking for changes of {format_count(len(rows), 'image')}")
    entries = read_latest(get_cache_folder(config), keys=frozenset(row["key"] for row in rows))
    changed = []
    for row in rows:
        entry, path = entries.get(row["key"]), row["image_path"]
        if entry is not None and path and entry.mask is None:
            if classify_entry(entry, path, entry.identity).state == "changed":
                changed.append(path)
    if changed:
        looked_at = format_count(len(rows), "image")
        detail = f"{len(changed)} of {looked_at} looked at have changed since their latents were made: {changed[0]}"
        yield Finding("images", detail, "run bash launch/cache.sh, which encodes them again", is_note=True)
