"""Copies of values of the host to the device that do not make the host wait for its work."""

import torch


def copy_to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return values on a device. A copy from the host joins the queue of the device's work; the host continues."""
    return pin(values, device).to(device, non_blocking=True)


def pin(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return values of the host in page-locked memory, from which a GPU copies by itself; others stay where they are.

    A GPU copies from other memory by way of a buffer of its driver, and the host may wait until its turn has come.
    """
    is_copied = device.type == "cuda" and values.device.type == "cpu" and not values.is_pinned()
    return values.pin_memory() if is_copied else values
