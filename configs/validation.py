"""Settings of the loss on samples that are not trained on, `validation`."""

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from sdxl_trainer.configs.paths import remove_file_scheme, tell_url_from_path
from sdxl_trainer.configs.section import Section

MAX_SHARE = 0.5
WITHOUT_SAMPLES = {"every_steps": 0, "at_start": False}


class ValidationConfig(Section):
    """The loss on samples that are never trained on: a share of the training set, or a separate set with its own
    metadata. Noise and timesteps depend only on `validation.seed` and each sample's key, so the loss can be compared
    between steps, between runs and across numbers of ranks. Captions are neither dropped nor shuffled."""

    share: float = Field(0.0, ge=0)
    """Share of the samples to hold out, up to 0.5, chosen by a hash of each sample's key. A sample stays on its side of
    the split when other samples are added or removed. Of a small set at least 4 samples are held out, but at most a
    tenth of the set; below 10 samples there is no validation. 0 turns validation off, `every_steps` included."""
    metadata: list[Path | str] = []
    """Metadata of a separate validation set, in any form that `data.metadata` accepts. Training samples whose key is
    in this set are left out of training."""
    image_dirs: list[Path] = []
    """Image folders of a separate validation set, like `data.image_dirs`."""
    cache_dir: Path | str | None = None
    """Cache folder, or URL of one on a store, with the latents of a separate validation set, written by the cache job
    with the same settings (docs/TRAINING.md). The default is `cache.dir`."""
    every_steps: int = Field(0, ge=0)
    """Optimizer steps between validations; 0 validates only at the end."""
    at_start: bool = False
    """Also validate before the first step, to measure the model that training starts from."""
    max_samples: int = Field(1000, ge=1)
    """Maximum number of samples to validate on, always the same ones. The rest of the share is still held out."""
    timesteps_per_sample: int = Field(4, ge=1)
    """Timesteps at which the loss of each sample is computed: one in each of this many equal parts of the trained
    range."""
    num_bins: int = Field(10, ge=1, le=100)
    """Number of equal parts of the timesteps 0 to 1000 whose loss is logged separately."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the split, the noise and the timesteps. It is independent of `run.seed`, so that runs with different
    seeds can be compared."""

    @model_validator(mode="before")
    @classmethod
    def _turn_off(cls, values: Any) -> Any:
        """Let a share of 0 turn off the validation that a preset asks for."""
        own_set = isinstance(values, dict) and (values.get("metadata") or values.get("image_dirs"))
        if isinstance(values, dict) and values.get("share") == 0 and not own_set:
            return {**values, **{name: value for name, value in WITHOUT_SAMPLES.items() if name in values}}
        return values

    @field_validator("share")
    @classmethod
    def _require_small_share(cls, share: float) -> float:
        if share > MAX_SHARE:
            hint = f"; did you mean {1 - share:.6g}?" if share < 1 else f"; write {share:g} % as {share / 100:g}"
            raise ValueError(f"must be at most {MAX_SHARE}: this share is not trained on{hint}")
        return share

    @field_validator("metadata")
    @classmethod
    def _resolve_file_urls(cls, metadata: list[Path | str]) -> list[Path | str]:
        return [remove_file_scheme(name) for name in metadata]

    @field_validator("cache_dir")
    @classmethod
    def _tell_urls_from_paths(cls, name: Path | str | None) -> Path | str | None:
        return tell_url_from_path(name)

    @field_validator("every_steps", "at_start")
    @classmethod
    def _require_samples(cls, value: Any, info: ValidationInfo) -> Any:
        if value and not any(info.data.get(name, True) for name in ("share", "metadata", "image_dirs")):
            raise ValueError(
                "has no effect: there are no samples to validate on; set validation.share, metadata or image_dirs, or "
                "leave this out"
            )
        return value

    @property
    def has_own_set(self) -> bool:
        """True if there is a separate validation set."""
        return bool(self.metadata or self.image_dirs)
