"""Copies of the state in host memory, from which it can be written while training goes on."""

from typing import Any

import torch


class HostMemory:
    """Tensors on the host that take copies of the same things in the same order, again and again."""

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []
        self._next = 0

    def begin(self) -> "HostMemory":
        """The next copy is the first one again."""
        self._next = 0
        return self

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the host."""
        place, self._next = self._next, self._next + 1
        held = self._tensors[place] if place < len(self._tensors) else None
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            self._tensors[place : place + 1] = [held]
        return held.copy_(tensor)


def copy_to_host(content: Any, memory: HostMemory | None = None) -> Any:
    """A copy of nested dicts, lists and tuples with all tensors on the CPU, sharing no memory with the original.

    A tensor that is a view is copied alone: torch.save would write the whole buffer behind it.
    """
    if isinstance(content, torch.Tensor):
        return memory.copy(content.detach()) if memory else content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        return type(content)((key, copy_to_host(value, memory)) for key, value in content.items())
    if isinstance(content, (list, tuple)) and type(content) in (list, tuple):
        return type(content)(copy_to_host(value, memory) for value in content)
    return content


def copy_weights(model: torch.nn.Module, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """This rank's share, every so manyth, of the weights that are trained, in fp32 in host memory."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    share = trained[rank::world_size]
    return {name: parameter.detach().to("cpu", torch.float32, copy=True).contiguous() for name, parameter in share}
