"""Sums of gradients over the micro steps of a global batch, computed by few kernels.

PyTorch adds the gradient of each weight by a kernel of its own, and casts it by another one before.
"""

from collections.abc import Iterable

import torch

# Gradients are added once this share of all waits. With their copy, they take twice this share of all their memory.
WAITING_SHARE = 1 / 32


class GradientSums:
    """Sums of the gradients of parameters.

    A parameter's gradient waits in its `grad` until those of many parameters are added together. Gradients in another
    type than the sums are concatenated first. Their sums lie in one flat tensor, so that those of later micro steps are
    added by a single kernel, provided that the parameters come in the same order again. The results are those of adding
    each by itself.

    Args:
        parameters: all whose gradients are added.
        dtype: of the sums.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], dtype: torch.dtype):
        self._dtype = dtype
        self._most_waiting_values = WAITING_SHARE * sum(parameter.numel() for parameter in parameters)
        self._waiting: dict[torch.Tensor, None] = {}
        self._num_waiting_values = 0
        self._sums: dict[torch.Tensor, torch.Tensor] = {}
        self._flats: dict[tuple[torch.Tensor, ...], torch.Tensor] = {}  # parameters added together → their sums

    def take(self, parameter: torch.Tensor) -> bool:
        """Let a parameter, which has a gradient, wait. Return whether so many wait that they should be added."""
        if parameter not in self._waiting:
            self._waiting[parameter] = None
            self._num_waiting_values += parameter.numel()
        return self._num_waiting_values >= self._most_waiting_values

    def add_waiting(self) -> list[torch.Tensor]:
        """Add the gradients that wait to their sums, set them to None, and return their parameters."""
        parameters = [parameter for parameter in self._waiting if parameter.grad is not None]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self._waiting.clear()
        self._num_waiting_values = 0
        if not gradients:
            return []
        if gradients[0].dtype == self._dtype:
            self._add(parameters, gradients)
        else:
            self._add_cast(tuple(parameters), gradients)
        for parameter in parameters:
            parameter.grad = None
        return parameters

    def get(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the sum of a parameter's gradients, with the layout of its first gradient."""
        return self._sums[parameter]

    def pop_all(self) -> dict[torch.Tensor, torch.Tensor]:
        """Return all sums by parameter, and begin new ones."""
        sums, self._sums = self._sums, {}
        self._flats.clear()
        return sums

    def drop(self, parameters: Iterable[torch.Tensor]) -> None:
        """Begin new sums for some parameters, all of which were added together."""
        self._flats.pop(tuple(parameters), None)
        for parameter in parameters:
            self._sums.pop(parameter, None)

    def _add_cast(self, parameters: tuple[torch.Tensor, ...], gradients: list[torch.Tensor]) -> None:
        flat = torch.cat([flatten(gradient) for gradient in gradients])
        if parameters in self._flats:
            self._flats[parameters].add_(flat)
            return
        flat = flat.to(self._dtype)
        if self._sums.keys().isdisjoint(parameters):
            self._flats[parameters] = flat
        parts = flat.split([gradient.numel() for gradient in gradients])
        self._add(parameters, [shape_like(*row) for row in zip(parts, gradients, strict=True)])

    def _add(self, parameters: Iterable[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        known, added = [], []
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if parameter in self._sums:
                known.append(self._sums[parameter])
                added.append(gradient)
            else:
                self._sums[parameter] = gradient
        if known:
            torch._foreach_add_(known, added)


def shape_like(values: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return values in the order of memory, [numel], in the shape and layout of a gradient, without a copy."""
    # `data`, because a view would keep all of `values` once DeepSpeed has given it other memory.
    return values.as_strided(gradient.shape, gradient.stride(), values.storage_offset()).data


def flatten(gradient: torch.Tensor) -> torch.Tensor:
    """Return a dense gradient's values in the order of memory, [numel], without a copy."""
    return gradient.as_strided((gradient.numel(),), (1,), gradient.storage_offset())
