"""Which latents a run reads, from its settings: cache folder, bucket rules, and selection."""

from pathlib import Path

from sdxl_trainer.configs.schema import Config, DataConfig
from sdxl_trainer.data.images.bucket import BucketRule, name_prefix
from sdxl_trainer.data.index.join import LatentSelection
from sdxl_trainer.data.index.missing_latents import EncodingSettings
from sdxl_trainer.data.stores.remote import is_remote


def get_cache_folder(config: Config) -> Path:
    """Folder of the cache: `cache.dir`, else that of the first metadata file or image folder."""
    if config.cache.dir is not None:
        return config.cache.dir
    if config.data.metadata and not is_remote(config.data.metadata[0]):
        return Path(config.data.metadata[0]).parent
    return config.data.image_dirs[0] if config.data.image_dirs else Path(".")


def build_bucket_rules(data: DataConfig) -> dict[str, BucketRule]:
    """The bucket rules of the `data` section, by what stands before the keys of their latents: nothing for the largest
    resolution, so that its latents are found by the same names whether there are others or not."""
    if data.buckets:
        return {"": BucketRule(0, 0, 0, 0, fixed=tuple(data.buckets))}
    largest, *others = sorted(data.resolution_px, reverse=True)
    sides = (data.min_bucket_px, data.max_bucket_px, data.bucket_step_px, data.no_upscale)
    return {"": BucketRule(largest, *sides)} | {name_prefix(side): BucketRule(side, *sides) for side in others}


def build_latent_selection(config: Config) -> LatentSelection:
    """Which latents a run trains on."""
    rules = build_bucket_rules(config.data)
    encoding = EncodingSettings(tuple(rules.items()), beside=config.cache.dir is None, flip=config.cache.flip)
    return LatentSelection(
        config.data.on_missing_caption == "skip",
        tuple(rules),
        encoding if config.cache.on_missing == "encode" else None,
    )
