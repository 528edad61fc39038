"""Copies of a few values to the device that do not make the host wait for its work."""

import torch


def copy_to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return values of the host on a device. The copy joins the queue of the device's work; the host continues."""
    return pin(values, device).to(device, non_blocking=True)


def pin(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return values in page-locked memory, from which a GPU copies by itself; for a CPU they stay where they are."""
    return values.pin_memory() if device.type == "cuda" and not values.is_pinned() else values
