"""Whether a training step at full size fits the device, by arithmetic from counted activations."""

from typing import NamedTuple

import torch

from gpu_parts.devices import Place
from gpu_parts.report import SkippedCase

NUM_WEIGHTS, ENCODER_BYTES, CONTEXT_BYTES = 2_567_463_684, 1_640_000_000, 2_000_000_000
ACTIVATION_BYTES = {False: 6_890_000_000, True: 590_000_000}  # of an image at 1024², without and with checkpointing
HEADROOM = 0.06


class StepSizes(NamedTuple):
    """Sizes of a training step."""

    micro_batch_size: int
    checkpointing: bool = False
    accumulation_steps: int = 1

    @property
    def name(self) -> str:
        """Name of the case."""
        checkpointing = "_checkpointing" if self.checkpointing else ""
        accumulation = f"_accumulation_{self.accumulation_steps}" if self.accumulation_steps > 1 else ""
        return f"micro_batch_{self.micro_batch_size}{checkpointing}{accumulation}"

    @property
    def num_images(self) -> int:
        """Images of one step."""
        return self.micro_batch_size * self.accumulation_steps

    def list_words(self) -> list[str]:
        """List the settings of a run with these sizes."""
        return [
            f"train.micro_batch_size={self.micro_batch_size}",
            f"train.global_batch_size={self.num_images}",
            f"engine.gradient_checkpointing={str(self.checkpointing).lower()}",
        ]


def find_lack(place: Place, sizes: StepSizes) -> str:
    """Return why a step does not fit the device; "" if it does, and where nothing is estimated."""
    if not place.is_cuda or place.tiny:
        return ""
    bytes_of_weight = 18 if sizes.accumulation_steps > 1 else 16
    held = NUM_WEIGHTS * bytes_of_weight + ENCODER_BYTES + CONTEXT_BYTES
    needed = held + sizes.micro_batch_size * ACTIVATION_BYTES[sizes.checkpointing]
    total = torch.cuda.get_device_properties(0).total_memory
    fits = needed <= total * (1 - HEADROOM)
    return "" if fits else f"needs about {needed / 1e9:.1f} GB; the device has {total / 1e9:.1f} GB"


def require_room(place: Place, sizes: StepSizes) -> None:
    """Skip a case that does not fit the device.

    Raises:
        SkippedCase: the estimate is above the device's memory.
    """
    if lack := find_lack(place, sizes):
        raise SkippedCase(lack)


def choose_first_sizes(place: Place) -> StepSizes:
    """Return micro batch 4, with gradient checkpointing if it does not fit without."""
    sizes = StepSizes(4)
    return sizes._replace(checkpointing=bool(find_lack(place, sizes)))
