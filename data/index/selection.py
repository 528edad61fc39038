"""The latents that a run reads, by its settings: cache folder, bucket rules, and selection."""

from functools import partial
from pathlib import Path

from sdxl_trainer.configs.schema import Config, DataConfig
from sdxl_trainer.data.images.bucket import BucketRule, Size, build_key_prefix
from sdxl_trainer.data.index.join import LatentSelection
from sdxl_trainer.data.index.missing_latents import EncodingSettings
from sdxl_trainer.data.stores.cache_mirror import name_mirror
from sdxl_trainer.data.stores.remote import is_remote


def get_cache_folder(config: Config) -> Path:
    """Return `cache.dir`, or else the folder of the first metadata file, or else the first image folder.

    For a cache on a store this is its local mirror (data/stores/cache_mirror.py).
    """
    if config.cache.dir is not None:
        url = get_store_url(config)
        return Path(config.cache.dir) if url is None else name_mirror(config.run.dir, url)
    if config.data.metadata and not is_remote(config.data.metadata[0]):
        return Path(config.data.metadata[0]).parent
    return config.data.image_dirs[0] if config.data.image_dirs else Path(".")


def get_store_url(config: Config) -> str | None:
    """Return the URL of a cache on a store; None for a cache on disk."""
    return str(config.cache.dir) if config.cache.dir is not None and is_remote(config.cache.dir) else None


def build_bucket_rules(data: DataConfig) -> dict[str, BucketRule]:
    """Build the bucket rule of each resolution, by the prefix of its latents' keys.

    The largest resolution has no prefix, so that more resolutions do not change the names of its latents.
    """
    if data.buckets:
        return {
            "": BucketRule(
                resolution_px=0,
                min_px=0,
                max_px=0,
                step_px=0,
                fixed=tuple(Size(*bucket) for bucket in data.buckets),
                max_aspect_ratio=data.max_aspect_ratio,
            )
        }
    largest, *others = sorted(data.resolution_px, reverse=True)
    build = partial(
        BucketRule,
        min_px=data.min_bucket_px,
        max_px=data.max_bucket_px,
        step_px=data.bucket_step_px,
        no_upscale=data.no_upscale,
        max_aspect_ratio=data.max_aspect_ratio,
    )
    return {"": build(largest)} | {build_key_prefix(side): build(side) for side in others}


def build_latent_selection(config: Config) -> LatentSelection:
    """Build the selection of latents that a run trains on."""
    rules = build_bucket_rules(config.data)
    encoding = EncodingSettings(tuple(rules.items()), beside=config.cache.dir is None, flip=config.cache.flip)
    return LatentSelection(
        captioned_only=config.data.on_missing_caption == "skip",
        prefixes=tuple(rules),
        rules=tuple(rules.items()),
        encoding=encoding if config.cache.on_missing == "encode" else None,
    )
