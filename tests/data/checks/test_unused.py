"""Settings that change nothing beside the others are named."""

from pathlib import Path

import pytest
from programs import ROOT

from sdxl_trainer.cache.encode.cache_setup import UNUSED_IN_A_JOB
from sdxl_trainer.configs.load import build_config, load_config
from sdxl_trainer.data.checks.unused import NEEDS, check_unused, log_doubts

# Setting → a value that is not its default, and settings with which it has an effect.
CASES = {
    "data.caption.description_rate": ("0.3 data.caption.source=join", "data.caption.source=pick"),
    "data.caption.keep_tokens": ("1", "data.caption.shuffle=true"),
    "data.caption.protected_tags": ("[a]", "data.caption.tag_dropout_rate=0.1"),
    "data.caption.protected_tags_file": ("a.txt", "data.caption.token_warmup_steps=5"),
    "data.caption.token_warmup_min": ("3", "data.caption.token_warmup_steps=5"),
    "data.remote_shards.copies_gb": ("3", "data.remote_shards.shuffle_shards=2"),
    "data.masks": ("-mask.png", "objective.masked_loss=true"),
    "cache.alpha_mask": ("true", "objective.masked_loss=true"),
    "cache.flip": ("true", "data.flip_rate=0.5"),
    "cache.spool": ("spool cache.dir=latents", "cache.dir=s3://bucket/latents"),
    "cache.spool_gb": ("5", "cache.dir=s3://bucket/latents"),
    "cache.text_variants": ("2", "cache.text=true"),
    "ema.on_host": ("true", "ema.decays=[0.9]"),
    "ema.snapshot_every_steps": ("5", "ema.lengths=[0.1]"),
    "ema.snapshot_dtype": ("bf16 ema.decays=[0.9]", "ema.lengths=[0.1]"),
    "train.max_non_finite_steps": ("3 train.on_non_finite=stop", "train.on_non_finite=skip"),
    "validation.cache_dir": ("latents validation.share=0.1", "validation.image_dirs=[images]"),
    "validation.max_samples": ("5", "validation.share=0.1"),
    "validation.timesteps_per_sample": ("5", "validation.metadata=[a.json]"),
    "validation.num_bins": ("5", "validation.share=0.1"),
    "validation.seed": ("5", "validation.share=0.1"),
}


def test_every_need_has_a_case() -> None:
    assert CASES.keys() == NEEDS.keys()


@pytest.mark.parametrize("key", CASES)
def test_a_setting_without_what_it_needs_is_named(key: str) -> None:
    value, needed = CASES[key]
    words = [f"{key}={value.split()[0]}", *value.split()[1:]]
    config, problems = build_config({}, words)
    (found,) = check_unused(config)
    assert problems == [] and found.key == key and found.rule.endswith(f"without {NEEDS[key].text}")
    # Without it, masks would be images, or latents would be encoded again.
    assert ("leave it out" in found.cure) == (key not in ("data.masks", "cache.alpha_mask", "cache.flip"))
    config, _ = build_config({}, [*words, needed])
    assert list(check_unused(config)) == []
    config, _ = build_config({}, [])
    assert list(check_unused(config)) == []


@pytest.mark.parametrize("preset", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_have_no_such_setting(preset: Path) -> None:
    assert list(check_unused(load_config(preset)[0])) == []


def test_a_job_names_those_of_its_sections_with_their_cure(messages: list[str]) -> None:
    config, _ = build_config({}, ["cache.text_variants=5", "cache.flip=true", "ema.on_host=true"])
    log_doubts(check_unused(config, UNUSED_IN_A_JOB))
    rule = "cache.text_variants=5: has no effect without cache.text: true"
    assert messages == [f"{rule}; set cache.text: true, or leave it out"]
