"""Micro batches: the specification and the input tensors of one forward pass on one rank."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sdxl_trainer.data.formats.latents import VAE_FACTOR, compute_shape
from sdxl_trainer.data.formats.text_outputs import TextOutputs
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.data.index.schema import BadSample

if TYPE_CHECKING:
    from sdxl_trainer.data.images.transforms import PreparedImage

CROP_LEFT = 3  # column of `time_ids`


@dataclass(frozen=True)
class MicroSpec:
    """Specification of a micro batch: rows of one bucket, and their places in the global batch."""

    bucket: Size  # (width, height) px
    rows: np.ndarray  # [B] int64
    epochs: np.ndarray  # [B] int64, the epoch that each sample belongs to
    positions: np.ndarray  # [B] int64, place in the global batch
    step: int = 0  # optimizer steps done before the step of this micro batch
    shards: tuple[str, ...] = ()  # shards of coming samples, to copy from their store in the background


@dataclass(frozen=True)
class DrawnLatents:
    """One sample's latents as the networks get them, after the random choices of flip and posterior."""

    latents: np.ndarray  # [C, h, w] floats
    crop_left: int  # px, in the resized image; in the mirrored one if the latents are flipped
    mask: np.ndarray | None  # [H, W] float32


@dataclass(frozen=True)
class PendingImage:
    """An image whose latents are not cached: the input of the VAE, and the key of the latents' random choices."""

    place: int  # position in the micro batch
    row: dict[str, Any]  # row of the index, with the image's true sizes
    epoch: int
    row_number: int
    pixels: torch.Tensor  # [H, W, 3] uint8; a tensor, because a worker sends tensors without copying them
    image: "PreparedImage"  # without its pixels


@dataclass
class MicroBatch:
    """The input of one forward pass on one rank. A bad sample keeps its place, with weight 0."""

    latents: torch.Tensor  # [B, C, h, w] float32, unscaled output of the VAE; zeros for bad and pending samples
    input_ids: torch.Tensor  # [B, windows, 77] int64, encoder 1; [B, 0, 77] with cached text
    input_ids_2: torch.Tensor  # [B, windows, 77] int64, encoder 2
    time_ids: torch.Tensor  # [B, 6] float32: original h, w; crop top, left; target h, w
    weights: torch.Tensor  # [B] float32, 0 for a bad sample
    positions: torch.Tensor  # [B] int64
    rows: torch.Tensor  # [B] int64
    text: dict[str, torch.Tensor] | None = None  # cached: hidden [B, L, C1], hidden_2 [B, L, C2], pooled [B, C2]
    token_weights: torch.Tensor | None = None  # [B, L] float32, L = 75·windows + 2, of encoder 1's states; None: 1
    token_weights_2: torch.Tensor | None = None  # of encoder 2's
    masks: torch.Tensor | None = None  # [B, H, W] float32 in 0..1, weight of the loss; None: 1 everywhere
    bad: list[BadSample] = field(default_factory=list)
    pending: list[PendingImage] = field(default_factory=list)  # images that still need their latents

    def __getstate__(self) -> dict[str, Any]:
        """Pickle tensors as arrays, for the pipe from a worker.

        As a tensor, each would need its own shared-memory file and connection, which takes twice the time.
        """
        text = self.text and {name: value.numpy() for name, value in self.text.items()}
        parts = vars(self) | {"text": text}
        return {name: part.numpy() if isinstance(part, torch.Tensor) else part for name, part in parts.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, part in state.items():
            setattr(self, name, torch.from_numpy(part) if isinstance(part, np.ndarray) else part)
        self.text = self.text and {name: torch.from_numpy(part) for name, part in state["text"].items()}

    def insert_latents(self, place: int, drawn: DrawnLatents) -> None:
        """Set the latents of a pending sample."""
        self.latents[place] = torch.from_numpy(drawn.latents)
        self.time_ids[place, CROP_LEFT] = drawn.crop_left
        if drawn.mask is not None:
            if self.masks is None:
                height, width = (VAE_FACTOR * side for side in self.latents.shape[2:])
                self.masks = torch.ones(len(self.latents), height, width)
            self.masks[place] = torch.from_numpy(drawn.mask)

    def mark_bad(self, place: int, sample: BadSample) -> None:
        """Give a sample weight 0 and list it as bad."""
        self.weights[place] = 0.0
        self.bad.append(sample)

    def pin_memory(self) -> "MicroBatch":
        """Move the tensors to page-locked memory, so that copies to a GPU overlap with work. Called by DataLoader."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.pin_memory())
        if self.text is not None:
            self.text = {name: value.pin_memory() for name, value in self.text.items()}
        return self


def stack_latents(samples: Sequence[DrawnLatents | None], bucket: Size, channels: int) -> torch.Tensor:
    """Stack latents to [B, C, h, w] float32, with zeros for samples without latents."""
    latents = np.zeros((len(samples), *compute_shape(bucket, channels)), np.float32)
    for place, sample in zip(latents, samples, strict=True):
        if sample is not None:
            place[:] = sample.latents
    return torch.from_numpy(latents)


def stack_masks(samples: Sequence[DrawnLatents | None], bucket: Size) -> torch.Tensor | None:
    """Stack the masks to [B, H, W] float32, with ones for samples without a mask; None if no sample has one."""
    masks = [None if sample is None else sample.mask for sample in samples]
    if all(mask is None for mask in masks):
        return None
    ones = np.ones((bucket[1], bucket[0]), np.float32)
    return torch.from_numpy(np.stack([ones if mask is None else mask for mask in masks]))


def stack_text_outputs(outputs: Sequence[TextOutputs]) -> dict[str, torch.Tensor]:
    """Stack text encoder outputs by the names that the networks use: hidden, hidden_2 and pooled."""
    fields = {"hidden": "hidden_1", "hidden_2": "hidden_2", "pooled": "pooled"}
    return {
        name: torch.from_numpy(np.stack([getattr(output, field) for output in outputs]))
        for name, field in fields.items()
    }


def build_time_ids(
    rows: Sequence[dict[str, Any]], samples: Sequence[DrawnLatents | None], bucket: Size
) -> torch.Tensor:
    """Build SDXL's size conditioning, [B, 6] float32: original height, width; crop top, left; bucket height, width.

    Args:
        rows: rows of the index.
        samples: drawn latents of each row, which replace the row's left crop because it depends on the flip; None for
            a row without latents.
    """
    width, height = bucket
    ids = [
        (
            row["original_height"],
            row["original_width"],
            row["crop_top"],
            row["crop_left"] if sample is None else sample.crop_left,
            height,
            width,
        )
        for row, sample in zip(rows, samples, strict=True)
    ]
    return torch.from_numpy(np.array(ids, np.float32))
