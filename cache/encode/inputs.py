"""What the cache job starts from: the record index and the identities of its items."""

from collections.abc import Mapping
from pathlib import Path

from sdxl_trainer.cache.encode.text_work import (
    check_captioning,
)
from sdxl_trainer.cache.models.source import check_model
from sdxl_trainer.configs.problems import Problem, raise_if_any
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.checks.records import open_checked_records
from sdxl_trainer.data.formats.manifest import (
    Identity,
    write_identity,
)
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.index.selection import build_bucket_rules


def open_index(config: Config, problems: list[Problem]) -> Index:
    """The index of all records, if nothing is wrong with the settings and the data.

    Raises:
        UserInputError: something is; all of it is named.
    """
    index, found = open_checked_records(config, need_captions=config.cache.text)
    raise_if_any([*problems, *found, *check_model(config.model), *check_captioning(config)])
    assert index is not None, "records without problems have an index"
    return index


def build_identities(config: Config, vae_sha256: str) -> dict[str, Identity]:
    """What decides the latents of each resolution under these settings, by the prefix of its keys."""
    cache = config.cache
    return {
        prefix: Identity(
            vae_sha256=vae_sha256,
            vae_precision=cache.vae_precision,
            dtype=cache.dtype,
            posterior=cache.posterior,
            flip=cache.flip,
            resolution_px=rule.resolution_px,
            min_bucket_px=rule.min_px,
            max_bucket_px=rule.max_px,
            bucket_step_px=rule.step_px,
            no_upscale=rule.no_upscale,
            buckets=rule.fixed,
            alpha_mask=cache.alpha_mask,
        )
        for prefix, rule in build_bucket_rules(config.data).items()
    }


def write_identities(folder: Path, identities: Mapping[str, Identity]) -> None:
    """Write what the items of each resolution are made under."""
    write_identity(folder, identities[""], {prefix: other for prefix, other in identities.items() if prefix})
