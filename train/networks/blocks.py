"""The blocks of a U-Net that may wait in host memory: residual and transformer blocks that checkpointing repeats."""

from typing import Any, NamedTuple

import torch

from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.train.networks.compilation import list_blocks


class BlockSize(NamedTuple):
    """Numbers of a block's values."""

    trained: int
    frozen: int


def choose_offloaded_blocks(unet: Any, number: int) -> list[torch.nn.Module]:
    """Choose the blocks that wait in host memory: the largest, and of equal ones every few, so that copies have time.

    Args:
        number: `engine.offload_blocks`, at least 1.

    Raises:
        UserInputError: the U-Net has fewer blocks.
    """
    blocks = list_repeated_blocks(unet)
    if number > len(blocks):
        rule, cure = (
            f"is more than the {len(blocks)} blocks that can wait on the host",
            f"set it to at most {len(blocks)}",
        )
        raise UserInputError([Problem("engine.offload_blocks", number, rule, cure)])
    sizes = [sum(measure_block(block)) for block in blocks]
    smallest = sorted(sizes, reverse=True)[number - 1]
    chosen = [block for block, size in zip(blocks, sizes, strict=True) if size > smallest]
    equal = [block for block, size in zip(blocks, sizes, strict=True) if size == smallest]
    wanted = number - len(chosen)
    return chosen + [equal[len(equal) * place // wanted] for place in range(wanted)]


def list_repeated_blocks(unet: Any) -> list[torch.nn.Module]:
    """List the blocks that `gradient_checkpointing: full` repeats in the backward pass.

    diffusers runs the first residual block of the middle without checkpointing.
    """
    kept = unet.mid_block.resnets[0]
    return [block for block in list_blocks(unet) if block is not kept]


def measure_block(block: torch.nn.Module) -> BlockSize:
    """Count the values of a block."""
    trained = sum(weight.numel() for weight in block.parameters() if weight.requires_grad)
    return BlockSize(trained, sum(weight.numel() for weight in block.parameters()) - trained)


def measure_blocks(unet: Any) -> tuple[BlockSize, ...]:
    """Measure the blocks that may wait, the largest first, which is the order of `choose_offloaded_blocks`."""
    return tuple(sorted(map(measure_block, list_repeated_blocks(unet)), key=sum, reverse=True))
