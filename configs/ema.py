"""Settings of the moving averages of the weights, `ema`."""

from typing import Annotated

from pydantic import Field, field_validator

from sdxl_trainer.configs.section import Section


class EmaConfig(Section):
    """Exponential moving averages (EMA) of the weights, kept in fp32 beside the master weights and sharded like
    them."""

    decays: list[Annotated[float, Field(gt=0, lt=1)]] = []
    """Decay of each average, such as `[0.999, 0.9999]`; an empty list keeps no average. Each takes 4 bytes per weight,
    divided among the ranks under ZeRO 1 to 3, and is exported beside the model."""
    warmup: bool = True
    """Limit the decay to (1 + n)/(10 + n) after n updates, so that the average soon forgets the first weights."""
    sample: bool = True
    """Generate images with the first average instead of the current weights."""

    @field_validator("decays")
    @classmethod
    def _require_distinct(cls, decays: list[float]) -> list[float]:
        if len({f"{decay:g}" for decay in decays}) < len(decays):
            raise ValueError("contains a decay twice (compared to six digits); remove one")
        return decays
