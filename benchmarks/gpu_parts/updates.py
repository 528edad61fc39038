"""One update of each optimizer at the size of SDXL's U-Net, in groups with and without a limit of values.

The loss is the mean square of each weight, so there are gradients without a forward pass of the U-Net.
"""

from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch

from gpu_parts.devices import Place
from gpu_parts.full_size import build_settings, random_weights
from gpu_parts.report import Case, Cases, SkippedCase

NO_LIMIT = 2**40  # values in a group


class Update(NamedTuple):
    """An optimizer and the settings that it needs."""

    optimizer: str
    precision: str = "bf16"
    words: tuple[str, ...] = ()
    most_extra_bytes: float | None = None  # a weight, above what is held before the update; None if it is only noted

    @property
    def name(self) -> str:
        """Name of the case."""
        return f"update_{self.optimizer}_{self.precision}"


UPDATES = (
    Update("adamw", most_extra_bytes=0.8),
    Update("lion", most_extra_bytes=0.8),
    Update("adamw", "bf16_kahan"),
    Update("adamw", "bf16_stochastic"),
    Update("lion", "bf16_kahan"),
    Update("lion", "bf16_stochastic"),
    Update("adafactor"),
    Update("prodigy", words=("optim.lr=1",)),
    Update("adamw8bit"),
    Update("muon", words=("optim.max_grad_norm=0",)),  # last, because it compiles a part of its update
)


def list_cases(place: Place) -> Cases:
    """List the cases of this module: all with the limit of values first, because the others may crash."""
    capped = {update.name: partial(measure_update, place, update, True) for update in UPDATES}
    uncapped = {f"{update.name}_uncapped": partial(measure_update, place, update, False) for update in UPDATES}
    return {**capped, **(dict(list(uncapped.items())[:1]) if place.tiny else uncapped)}


def measure_update(place: Place, update: Update, is_capped: bool, case: Case) -> None:
    """Make two updates, and measure the second: seconds, memory, and whether all weights stay finite."""
    engine, num_weights = build_engine(place, update, is_capped)
    before = next(iter(engine.model.parameters())).detach().clone()
    for number in range(2):
        engine.set_lr(1.0 if update.optimizer == "prodigy" else 1e-4)
        engine.backward(engine())
        held = place.read_held()
        place.reset_peak()
        seconds, updated = time_update(place, engine)
        extra = (place.read_peak() - held) / num_weights
        case.note(**{f"update_{number + 1}": {"ms": 1e3 * seconds, "updated": updated, "extra_bytes_a_weight": extra}})
        assert updated, "the update was skipped"
    case.note(groups=len(engine._engine.basic_optimizer.param_groups), num_weights=num_weights)
    case.note(held_bytes_a_weight=place.read_held() / num_weights, zero_stage=engine.zero_stage)
    weights = list(engine.model.parameters())
    case.check("weights_not_finite", sum(not bool(torch.isfinite(weight).all()) for weight in weights), "<=", 0)
    case.note(first_weight_changed=not torch.equal(before, weights[0]))
    if update.most_extra_bytes is not None and is_capped and place.is_cuda:
        case.check("extra_bytes_a_weight", extra, "<=", update.most_extra_bytes)


def time_update(place: Place, engine: Any) -> tuple[float, bool]:
    """Return the seconds of an update, and whether the weights were updated."""
    updated: list[bool] = []
    return place.time_call(lambda: updated.append(engine.step())), updated[0]


def build_engine(place: Place, update: Update, is_capped: bool) -> tuple[Any, int]:
    """Build the real engine around the U-Net with random weights, and count these.

    Raises:
        SkippedCase: the optimizer is not installed, or does not support the settings.
    """
    if place.tiny and update.optimizer == "muon":
        raise SkippedCase("compiles a part of its update, which takes long on a CPU")
    from sdxl_trainer.cache.models.source import resolve_model
    from sdxl_trainer.launch.distributed import init_ranks
    from sdxl_trainer.train.engine.deepspeed_config import DTYPES, BatchSizes
    from sdxl_trainer.train.engine.engine import Engine
    from sdxl_trainer.train.networks.parameter_groups import build_parameter_groups
    from sdxl_trainer.train.networks.trained_networks import TrainedNetworks, load_unet
    from sdxl_trainer.train.optim import optimizers

    class WeightLoss(TrainedNetworks):
        def forward(self) -> torch.Tensor:
            return torch.stack([weight.square().mean(dtype=torch.float32) for weight in self.parameters()]).sum()

    words = [f"optim.name={update.optimizer}", f"engine.precision={update.precision}", *update.words]
    words += ["train.micro_batch_size=1", "train.global_batch_size=1", "engine.gradient_checkpointing=false"]
    config = build_settings(place, update.name, words)
    if problems := list(optimizers.check_optimizer(config.optim, config.engine)):
        raise SkippedCase("; ".join(str(problem) for problem in problems))
    ranks, source = init_ranks(), resolve_model(config.model)
    with random_weights():
        unet = load_unet(source, config.engine, ranks.device, DTYPES[config.engine.precision])
    networks = WeightLoss(unet)
    num_weights = sum(weight.numel() for weight in networks.parameters())
    groups = build_parameter_groups(networks, config.optim, source.read_config("unet"))
    limit = optimizers.MAX_GROUP_VALUES if is_capped else NO_LIMIT
    if place.tiny and is_capped:
        limit = num_weights // 10
    with mock.patch.object(optimizers, "MAX_GROUP_VALUES", limit):
        optimizer = optimizers.build_optimizer(groups, config.optim, config.engine)
    return Engine(networks, optimizer, config.engine, BatchSizes(1, 1, 1), config.optim.max_grad_norm), num_weights
