"""Gradient release computes what the ordinary engine computes, without the gradients of all weights at once."""

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.configs.problems import FailedError
from sdxl_trainer.configs.schema import EmaConfig
from sdxl_trainer.launch.distributed import init_ranks
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.checkpoint.writer import CheckpointWriter
from sdxl_trainer.train.engine.deepspeed_config import BatchSizes
from sdxl_trainer.train.engine.engine import Engine
from sdxl_trainer.train.engine.gradient_release import SingleUpdates
from sdxl_trainer.train.optim.optimizers import build_optimizer

LR, STEPS = 0.05, 4


def build_net() -> torch.nn.Sequential:
    torch.manual_seed(3)
    # The last matrix is large enough for moments in 8 bit.
    net = torch.nn.Sequential(torch.nn.Linear(5, 64), torch.nn.GELU(), torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    net[2].requires_grad_(False)
    return net


def build_groups(net: torch.nn.Sequential) -> list[dict]:
    return [
        {"params": list(net[place].parameters()), "lr": LR * scale, "weight_decay": 0.1 * scale, "lr_scale": scale}
        for place, scale in ((0, 1.0), (3, 0.5))
    ]


def draw_inputs(step: int) -> torch.Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(step))


def compute_loss(net, inputs: torch.Tensor) -> torch.Tensor:
    return (net(inputs).float() - 1.0).square().mean()


def gather(engine: Engine, average: str | None = None) -> torch.Tensor:
    return torch.cat(
        [
            engine.weights.gather(name, average).flatten()
            for name, _ in build_net().named_parameters()
            if average is None or name in engine.weights.trained_names
        ]
    )


def flatten(net: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def save(engine: Engine, folder: Path) -> Path:
    writer = CheckpointWriter(folder=folder, rank=0, world_size=1, token="t", keep_last=1)
    writer.save(engine, TrainState(step=3, world_size=1))
    writer.wait()
    return folder / "step-00000003"


def build_engine(release: bool, name: str = "adamw", precision: str = "fp32", max_norm: float = 0.0, **named) -> Engine:
    init_ranks()
    stage = 0 if release or precision == "fp32" else 1
    config = EngineConfig.model_validate({"zero_stage": stage, "gradient_release": release, "precision": precision})
    net = build_net()
    optimizer = build_optimizer(build_groups(net), OptimConfig.model_validate({"name": name, "lr": LR}), config)
    return Engine(net, optimizer, config, BatchSizes(4, 4, 1), max_norm, **named)


def train(engine: Engine, steps: range = range(STEPS)) -> torch.Tensor:
    for step in steps:
        engine.set_lr(LR if step < 2 else LR / 2)
        engine.backward(compute_loss(engine, draw_inputs(step).to(engine.dtype)))
        assert engine.step()
    return gather(engine)


class WrittenValues(TorchDispatchMode):
    """Counts the values of what operators return, except views."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numel += 0 if func.is_view else sum(item.numel() for item in tree_leaves(result))
        return result


needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="pip install --no-deps bitsandbytes (0.50 runs on CPUs)"
)
EIGHT_BIT = pytest.param("adamw8bit", marks=needs_bitsandbytes)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("adamw", 0.0), ("lion", 0.0), ("adafactor", 1e-6), pytest.param("adamw8bit", 0.0, marks=needs_bitsandbytes)],
)
def test_a_released_step_equals_that_of_the_ordinary_engine(name: str, tolerance: float) -> None:
    plain, released = build_engine(False, name), build_engine(True, name)
    torch.testing.assert_close(train(released), train(plain), rtol=0, atol=tolerance)
    assert (gather(released) - flatten(build_net())).abs().max() > LR
    assert released.grad_norm() == pytest.approx(plain.grad_norm(), rel=1e-6)
    assert all(weight.grad is None for weight in released.model.parameters())


def test_no_two_gradients_exist_at_once() -> None:
    """A gradient is freed before the next one is complete."""
    engine, live, own = build_engine(True), [], []
    weights = [weight for weight in engine.model.parameters() if weight.requires_grad]
    update = engine._engine._updates.update

    def count(weight: torch.nn.Parameter) -> None:
        live.append(sum(other.grad.nbytes for other in weights if other.grad is not None))
        own.append(weight.nbytes)
        update(weight)

    engine._engine._updates.update = count
    train(engine, range(2))
    assert live == own and len(own) == 2 * len(weights)


def test_gathering_a_weight_reads_that_weight_alone() -> None:
    """Copies of all weights in fp32 would take twice the memory of the weights, at each of 1,680 names."""
    engine = build_engine(True, precision="bf16_stochastic")
    with WrittenValues() as written:
        weight = engine.weights.gather("0.bias")
    assert weight.dtype == torch.float32 and weight.shape == (64,)
    assert 0 < written.numel <= 4 * 64


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", EIGHT_BIT, "torch.optim.AdamW"])
@pytest.mark.parametrize("precision", ["bf16_stochastic", "bf16_kahan"])
def test_a_resume_is_exact_without_masters(precision: str, name: str, tmp_path: Path) -> None:
    """Also one under ZeRO 1, and back: both engines read each other's checkpoints."""
    build = partial(build_engine, name=name, precision=precision, ema=EmaConfig(decays=[0.9]))
    whole, first, resumed = build(True), build(True), build(True)
    expected = train(whole)
    train(first, range(2))
    checkpoint = save(first, tmp_path)
    resumed.load_state(checkpoint)
    assert train(resumed, range(2, STEPS)).equal(expected)
    assert gather(resumed, "0.9").equal(gather(whole, "0.9"))
    if name not in ("adamw", "lion"):
        return  # ZeRO, which bf16 without masters needs otherwise, does not take these
    sharded, back = build(False), build(True)
    sharded.load_state(checkpoint)
    assert gather(sharded).equal(gather(first)) and gather(sharded, "0.9").equal(gather(first, "0.9"))
    back.load_state(save(sharded, tmp_path / "sharded"))
    assert train(back, range(2, STEPS)).equal(expected)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", EIGHT_BIT, "torch.optim.AdamW"])
@pytest.mark.parametrize("precision", ["bf16_stochastic", "bf16_kahan"])
def test_small_changes_add_up_without_masters(precision: str, name: str) -> None:
    """256 changes of 1/256 of the distance between two numbers of bf16 around 1 come to that distance."""
    init_ranks()
    config = EngineConfig.model_validate({"zero_stage": 0, "gradient_release": True, "precision": precision})
    net = torch.nn.Linear(64, 64, bias=False)
    torch.nn.init.ones_(net.weight)
    lr = 2.0**-16
    optimizer = build_optimizer(
        [{"params": [net.weight], "lr": lr, "weight_decay": 0.0, "lr_scale": 1.0}],
        OptimConfig.model_validate({"name": name, "lr": lr}),
        config,
    )
    engine = Engine(net, optimizer, config, BatchSizes(1, 1, 1), 0.0)
    for _ in range(256):
        engine.backward(engine(torch.ones(1, 64, dtype=engine.dtype)).float().sum())
        engine.step()
    moved = (1 - engine.weights.gather("weight").float()) / 2.0**-8
    assert moved.mean().item() == pytest.approx(1.0, rel=0.06)
    assert moved.std().item() == pytest.approx(1.0 if precision == "bf16_stochastic" else 0.0, abs=0.1)


def test_what_an_optimizer_keeps_in_its_groups_is_saved() -> None:
    """Such as the number of steps, by which some optimizers of other libraries correct their moments."""

    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
            return super().step(closure)

    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = Counting([{"params": weights[:2]}, {"params": weights[2:]}], lr=0.1)
    updates = SingleUpdates(optimizer)
    for _ in range(3):
        updates.begin_step()
        for weight in weights:
            weight.grad = torch.ones(2)
            updates.update(weight)
        updates.end_step()
    assert [group["step"] for group in optimizer.state_dict()["param_groups"]] == [3, 3]
    assert all("first_tensor" not in group for group in optimizer.param_groups)


def test_clipping_limits_each_tensor() -> None:
    limit, engine, net = 1e-2, build_engine(True, max_norm=1e-2), build_net()
    settings = OptimConfig.model_validate({"lr": LR})
    optimizer = build_optimizer(build_groups(net), settings, EngineConfig.model_validate({}))
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = (LR if step < 2 else LR / 2) * group["lr_scale"]
        compute_loss(net, draw_inputs(step)).backward()
        for weight in net.parameters():
            if weight.grad is not None:
                torch.nn.utils.clip_grad_norm_([weight], limit)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(train(engine), flatten(net), rtol=0, atol=1e-6)


def test_a_loss_that_is_not_finite_updates_nothing() -> None:
    engine = build_engine(True)
    train(engine, range(1))
    before = gather(engine)
    engine.backward(compute_loss(engine, draw_inputs(1)) * torch.nan)
    assert not engine.step() and gather(engine).equal(before) and engine.completed_steps == 2
    train(engine, range(1, 2))


def test_an_error_in_the_backward_pass_leaves_nothing_to_save() -> None:
    engine = build_engine(True)
    train(engine, range(1))
    weight = engine.model[0].weight
    handle = weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(FailedError, match="nothing is saved"):
        engine.backward(compute_loss(engine, draw_inputs(1)))
    handle.remove()
    with engine.hold_updates(0.1) as completed:
        assert completed is None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"precision": "bf16"}, "which has no master weights; set it to bf16_kahan or bf16_stochastic or fp32"),
        ({"zero_stage": 1}, "leave engine.zero_stage out"),
        ({"offload_optimizer": True}, "leave one of them out"),
        ({"compile": "full"}, "set it to regional"),
    ],
)
def test_settings_that_contradict_gradient_release(settings: dict, reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        EngineConfig.model_validate({"gradient_release": True, "precision": "fp32", **settings})
    assert reason in str(caught.value)
