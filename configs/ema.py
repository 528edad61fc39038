"""Settings of the moving averages of the weights, `ema`."""

from typing import Annotated

from pydantic import Field, field_validator

from sdxl_trainer.configs.section import Section


class EmaConfig(Section):
    """Exponential moving averages of the weights, kept beside the fp32 masters and sharded like them."""

    decays: list[Annotated[float, Field(gt=0, lt=1)]] = []
    """Decay of each average, such as `[0.999, 0.9999]`; none keeps none. Each takes 4 bytes a weight, over all ranks
    together under ZeRO 1 to 3, and is exported beside the model."""
    warmup: bool = True
    """After n updates no decay is above (1 + n)/(10 + n), so that a young average forgets its random beginning."""
    sample: bool = True
    """Draw samples with the first average instead of the weights of the moment."""

    @field_validator("decays")
    @classmethod
    def _each_has_a_name_of_its_own(cls, decays: list[float]) -> list[float]:
        if len({f"{decay:g}" for decay in decays}) < len(decays):
            raise ValueError("names a decay twice (six digits count)")
        return decays
