"""Part `more`: what is measured in the time that is left, the most wanted first."""

from gpu_parts import capture, kernels, offloaded, steps, updates
from gpu_parts.devices import Place
from gpu_parts.report import Cases


def list_cases(place: Place) -> Cases:
    """List the cases of this part."""
    return {
        **kernels.list_cases(place),
        **offloaded.list_cases(place),
        **updates.list_cases(place),
        **steps.list_other_cases(place),
        **capture.list_cases(place),
    }
