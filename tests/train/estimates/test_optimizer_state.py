"""Bytes of each optimizer without fp32 masters, on the shapes of SDXL: what exists, and what is counted."""

import importlib.util
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.data.packages import OPTIMIZER_PACKAGES
from sdxl_trainer.train.engine.gradient_release import SingleUpdates
from sdxl_trainer.train.estimates.networks import LiveBytes
from sdxl_trainer.train.estimates.optimizer_state import count_master_bytes, count_moments, count_release_copies
from sdxl_trainer.train.estimates.preset_choice import CONFIGS
from sdxl_trainer.train.networks.empty_networks import build_empty_networks
from sdxl_trainer.train.optim.optimizers import build_optimizer

LIMITS = {
    **{"adafactor": 2.4, "adafactor as matrices": 2.1, "adamw8bit": 4.1, "lion": 4.1, "adamw": 6.1},
    **{"adamw_schedule_free": 10.1, "adopt": 10.1, "ademamix": 14.1, "lamb": 10.1},
    **{"came": 6.8, "soap": 26.0},
}
MORE = {"bf16_stochastic": 0.0, "bf16_kahan": 2.0, "fp32": math.inf}
FROM_OPTIMI = [("adamw", "bf16_kahan"), ("lion", "bf16_kahan"), ("lion", "fp32")]
TABLE = (256,)  # of the codes of 8-bit moments, which all weights share


@pytest.fixture(scope="module")
def shapes() -> Counter[tuple[int, ...]]:
    """Shapes of the weights of SDXL's U-Net, and how often each occurs."""
    networks = build_empty_networks(ModelSource(CONFIGS / "sdxl"), [])
    return Counter(tuple(weight.shape) for weight in networks.parameters())


def list_tensors(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, (dict, list)):
        for value in state.values() if isinstance(state, dict) else state:
            yield from list_tensors(value)


@pytest.mark.parametrize("precision", MORE)
@pytest.mark.parametrize("optimizer", LIMITS)
def test_bytes_of_a_weight(optimizer: str, precision: str, shapes: Counter[tuple[int, ...]]) -> None:
    """Updates one weight of each shape on the meta device, and adds up what exists then and afterwards."""
    name, _, as_matrices = optimizer.partition(" ")
    package = "optimi" if (name, precision) in FROM_OPTIMI else OPTIMIZER_PACKAGES.get(name)
    if package and not (name == "lion" and precision == "bf16_stochastic") and not importlib.util.find_spec(package):
        pytest.skip(f"needs {package}")
    if as_matrices and precision == "fp32":
        pytest.skip("transformers' Adafactor has no such setting")
    engine = EngineConfig.model_validate({"gradient_release": True, "precision": precision})
    kwargs: dict[str, Any] = {"factor_convolutions": True} if as_matrices else {}
    if (name, precision) == ("adamw", "fp32"):
        kwargs = {"fused": False}  # the fused kernel does not run on the meta device
    optim = OptimConfig.model_validate({"name": name, "kwargs": kwargs})
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    weights = [torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in shapes]
    built = build_optimizer([{"params": weights, "lr": 1e-5}], optim, engine)
    copied = update_twice(SingleUpdates(built), weights, built.state)
    held = 0
    for weight, number in zip(weights, shapes.values(), strict=True):
        kept = [values for values in list_tensors(built.state[weight]) if values.dim() and values.shape != TABLE]
        held += number * sum(values.numel() * values.element_size() for values in (weight, *kept))
    num_values = sum(number * math.prod(shape) for shape, number in shapes.items())
    counted = num_values * (dtype.itemsize + count_master_bytes(engine))
    assert held == counted + count_moments(engine, optim, list(shapes.elements()))
    assert held / num_values <= LIMITS[optimizer] + MORE[precision]
    if precision != "bf16_stochastic" or name not in ("adamw", "lion"):  # one kernel on GPUs
        for shape, number in copied.items():
            assert number <= 1.02 * count_release_copies(engine, math.prod(shape), name), shape


def update_twice(updates: SingleUpdates, weights: list[torch.nn.Parameter], state: Any) -> dict[torch.Size, int]:
    """Update each weight on its own, and return the most bytes that the second update of each shape adds for a time.

    Without shapes of a few values, where the scalars count.
    """
    most: dict[torch.Size, int] = {}
    for _ in range(2):
        updates.begin_step()
        for weight in weights:
            weight.grad = torch.empty_like(weight)
            known = [weight, weight.grad, *list_tensors(state[weight])]
            with LiveBytes([values.untyped_storage() for values in known]) as live:
                updates.update(weight)
            if weight.numel() >= 1000:
                most[weight.shape] = live.peak
            weight.grad = None
        updates.end_step()
    return most
