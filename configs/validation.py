"""Settings of the loss on samples that are not trained on, `validation`."""

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from sdxl_trainer.configs.section import Section


class ValidationConfig(Section):
    """The loss on samples that are never trained on: either a share of the data, or a set with its own metadata. Noise
    and timesteps are keyed to each sample's key, so they are the same every time, in every run, and on any number of
    ranks; nothing of training is touched. Captions are neither dropped nor shuffled."""

    share: float = Field(0.0, ge=0, lt=1)
    """Share of the samples that is held out, chosen by a hash of each sample's key: a sample stays on its side of the
    split whatever else is added to the data or taken away."""
    metadata: list[Path | str] = []
    """Metadata of a set of its own, in any form that `data.metadata` may have. A sample of the training data that has
    the key of one of these is not trained on."""
    image_dirs: list[Path] = []
    """Image folders of a set of its own, as `data.image_dirs`."""
    cache_dir: Path | None = None
    """Latents of a set of its own, made by the cache job from the same settings (docs/TRAINING.md); `cache.dir` by
    default."""
    every_steps: int = Field(0, ge=0)
    """Steps between validations; 0 validates at the end only."""
    at_start: bool = False
    """Also validate before the first step, to see where the model came from."""
    max_samples: int = Field(1000, ge=1)
    """Samples that are used at most; always the same ones. Held out is the whole share."""
    timesteps_per_sample: int = Field(4, ge=1)
    """Timesteps at which each sample is looked at, one in each of so many equal parts of the trained range."""
    num_bins: int = Field(10, ge=1, le=100)
    """Parts of the timesteps 0 to 1000 whose loss is told by itself."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Names the split, the noise and the timesteps. It is not `run.seed`, so that runs can be compared."""

    @field_validator("every_steps", "at_start")
    @classmethod
    def _there_are_samples(cls, value: Any, info: ValidationInfo) -> Any:
        if value and not any(info.data.get(name, True) for name in ("share", "metadata", "image_dirs")):
            raise ValueError(
                "has no effect: there is nothing to validate on; set validation.share, metadata or image_dirs, or "
                "leave this out"
            )
        return value

    @property
    def has_own_set(self) -> bool:
        """Whether the samples have metadata or folders of their own."""
        return bool(self.metadata or self.image_dirs)
