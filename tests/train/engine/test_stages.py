"""Every ZeRO stage computes the same as plain PyTorch: groups, frozen parts, clipping, optimizers, precisions."""

from pathlib import Path

import pytest
import torch
import torch._dynamo

from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.configs.schema import EmaConfig
from sdxl_trainer.launch.distributed import init_ranks
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.checkpoint.writer import CheckpointWriter
from sdxl_trainer.train.engine.deepspeed_config import BatchSizes
from sdxl_trainer.train.engine.engine import Engine
from sdxl_trainer.train.engine.patches import get_local_part
from sdxl_trainer.train.engine.saved_state import ReshardingError
from sdxl_trainer.train.optim.optimizers import build_optimizer

STAGES = (0, 1, 2, 3)
LR, MAX_NORM, STEPS = 0.05, 0.5, 4


def build_net(frozen: bool = True) -> torch.nn.Sequential:
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 7), torch.nn.Linear(7, 3))
    net[2].requires_grad_(not frozen)
    for parameter in net.parameters():
        parameter.use_muon = parameter.dim() == 2  # pyright: ignore
    return net


def build_groups(net: torch.nn.Sequential) -> list[dict]:
    scales = {0: 1.0, 2: 1.0, 3: 0.5} if net[2].weight.requires_grad else {0: 1.0, 3: 0.5}
    return [
        {"params": list(net[place].parameters()), "lr": LR * scale, "weight_decay": 0.1 * scale, "lr_scale": scale}
        for place, scale in scales.items()
    ]


def build_engine(stage: int, precision: str = "fp32", name: str = "adamw", lr: float = LR, **settings) -> Engine:
    init_ranks()
    ema = settings.pop("ema", None)
    net, config = (
        build_net(settings.pop("frozen", True)),
        EngineConfig(zero_stage=stage, precision=precision, **settings),
    )
    kwargs = {"adam_lr": lr} if name == "muon" else {}
    optimizer = build_optimizer(build_groups(net), OptimConfig(name=name, lr=lr, kwargs=kwargs), config)
    return Engine(net, optimizer, config, BatchSizes(8, 4, 2), 0.0 if name == "muon" else MAX_NORM, ema)


def save(engine: Engine, folder: Path) -> Path:
    writer = CheckpointWriter(folder=folder, rank=0, world_size=1, token="t", keep_last=1)
    writer.save(engine, TrainState(step=3, world_size=1))
    writer.wait()
    return folder / "step-00000003"


def draw_inputs(step: int) -> torch.Tensor:
    return torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(step))


def compute_loss(net, inputs: torch.Tensor) -> torch.Tensor:
    return (net(inputs).float() - 1.0).square().mean()


def train(engine: Engine, steps: int | range = STEPS, lr: float = LR) -> torch.Tensor:
    """Return all weights after `steps`; the learning rate is halved from step 2 on."""
    for step in range(steps) if isinstance(steps, int) else steps:
        engine.set_lr(lr if step < 2 else lr / 2)
        for inputs in draw_inputs(step):
            engine.backward(compute_loss(engine, inputs.to(engine.dtype)))
            engine.step()
    return gather(engine)


def gather(engine: Engine, average: str | None = None) -> torch.Tensor:
    return torch.cat([engine.weights.gather(name, average).flatten() for name, _ in build_net().named_parameters()])


def flatten(net: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


@pytest.mark.parametrize(
    ("stage", "name"), [(0, "adafactor"), *((stage, name) for stage in STAGES for name in ("adamw", "lion"))]
)
def test_every_stage_updates_as_plain_pytorch_does(stage: int, name: str) -> None:
    net = build_net()
    config = OptimConfig(name=name, lr=LR)
    optimizer = build_optimizer(build_groups(net), config, EngineConfig())
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = (LR if step < 2 else LR / 2) * group["lr_scale"]
        for inputs in draw_inputs(step):
            (compute_loss(net, inputs) / 2).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(train(build_engine(stage, name=name)), flatten(net), rtol=0, atol=1e-6)
    assert (flatten(net) - flatten(build_net())).abs().max() > LR


@torch._dynamo.config.patch(disable=True)  # compiling takes a minute and does not change the numbers
def test_muon_is_the_same_in_every_stage() -> None:
    whole = train(build_engine(0, name="muon"))
    assert (whole - flatten(build_net())).abs().max() > LR
    for stage in (1, 2, 3):
        engine = build_engine(stage, name="muon")
        torch.testing.assert_close(train(engine), whole, rtol=0, atol=2e-3)
        assert engine.grad_norm() is None, "DeepSpeed has the norm of Muon's updates"


@torch._dynamo.config.patch(disable=True)
def test_muon_reports_the_norm_of_gradients() -> None:
    engine, net = build_engine(0, name="muon"), build_net()
    train(engine, 1)
    for inputs in draw_inputs(0):
        (compute_loss(net, inputs) / 2).backward()
    gradients = [weight.grad for weight in net.parameters() if weight.grad is not None]
    assert engine.grad_norm() == pytest.approx(float(torch.nn.utils.get_total_norm(gradients)), rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_parameters_have_no_gradient_and_no_state(stage: int) -> None:
    engine = build_engine(stage)
    train(engine, 1)
    assert engine.model[2].weight.grad is None and not engine.model[2].weight.requires_grad
    files = engine.capture_state()
    layout = next(content for name, content in files.items() if "layout" in name)
    assert list(layout["shapes"]) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    assert sum(piece["numel"] for flat in layout["flats"] for piece in flat["pieces"]) == 5 * 7 + 7 + 7 * 3 + 3


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_hold_no_frozen_weights_and_older_ones_are_loaded(stage: int, tmp_path: Path, monkeypatch) -> None:
    """A resume keeps the base model's frozen weights, and takes those that the saving run wrote."""
    engine = build_engine(stage)
    trained = train(engine, 2)
    model = next(content for name, content in engine.capture_state().items() if name.endswith("model_states.pt"))
    assert list(model["module"]) == ["0.weight", "0.bias", "3.weight", "3.bias"] and not model["frozen_param_fragments"]
    shift_frozen(engine, 1.0)
    shifted = gather(engine)
    engine.load_state(save(engine, tmp_path / "new"))
    assert gather(engine).equal(shifted) and not shifted.equal(trained)

    with monkeypatch.context() as older:
        save_all = engine._engine._save_checkpoint

        def save_as_before(*words, exclude_frozen_parameters, **named) -> None:
            save_all(*words, **named)

        older.setattr(engine._engine, "_save_checkpoint", save_as_before)
        checkpoint = save(engine, tmp_path / "old")
    shift_frozen(engine, 1.0)
    engine.load_state(checkpoint)
    assert gather(engine).equal(shifted)


@pytest.mark.parametrize("stage", STAGES)
def test_trained_weights_cannot_be_frozen_by_a_resume(stage: int, tmp_path: Path) -> None:
    """The next checkpoint would not hold them, and the start after that would take them from the base model."""
    whole = build_engine(stage, frozen=False)
    train(whole, 2)
    checkpoint = save(whole, tmp_path / "whole")
    with pytest.raises(ReshardingError, match=r"trained 2 weights that no later checkpoint would hold, 2.weight among"):
        build_engine(stage).load_state(checkpoint)


@torch.no_grad()
def shift_frozen(engine: Engine, change: float) -> None:
    """Add `change` to the frozen weights."""
    engine.weights.release_gathered()
    for parameter in engine.model.parameters():
        if not parameter.requires_grad:
            get_local_part(parameter).add_(change)
    engine.weights.gather_persistent()


@pytest.fixture
def fp16_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let DeepSpeed run fp16 on processors without instructions for it, on which PyTorch computes it nevertheless."""
    monkeypatch.setattr("deepspeed.accelerator.cpu_accelerator.CPU_Accelerator.is_fp16_supported", lambda self: True)


@pytest.mark.usefixtures("fp16_anywhere")
@pytest.mark.parametrize("stage", STAGES)
def test_16_bit_with_masters_stays_near_fp32(stage: int) -> None:
    exact = train(build_engine(0))
    for precision, settings in (("bf16", {}), ("fp16", {"initial_loss_scale_power": 8}))[: 2 if stage else 1]:
        engine = build_engine(stage, precision, **settings)
        weights = train(engine)
        assert engine.model[0].weight.dtype == engine.dtype
        assert (weights - exact).abs().mean() < 0.1 * LR, precision
        # More than 16 bits are in use, so the masters are fp32.
        assert not weights.equal(weights.to(engine.dtype).float()), precision


@pytest.mark.usefixtures("fp16_anywhere")
@pytest.mark.parametrize("stage", STAGES)
def test_masters_begin_as_the_unrounded_weights(stage: int) -> None:
    for precision in ("bf16", "fp16")[: 2 if stage else 1]:
        engine = build_engine(stage, precision)
        for name, parameter in build_net().named_parameters():
            assert not parameter.requires_grad or engine.weights.gather(name).equal(parameter), name


@pytest.mark.usefixtures("fp16_anywhere")
@pytest.mark.parametrize("stage", STAGES[1:])
def test_fp16_skips_steps_that_overflow(stage: int) -> None:
    engine = build_engine(stage, "fp16", initial_loss_scale_power=32)
    first = gather(engine)
    weights = [train(engine, 1) for _ in range(25)]
    assert engine.completed_steps == 25
    assert weights[0].equal(first), "a step that overflowed changed the weights"
    assert not weights[-1].equal(first), "the scale never came down to where gradients fit"
    assert weights[-1].isfinite().all()


@pytest.mark.parametrize("precision", ["bf16_kahan", "bf16_stochastic"])
def test_weights_without_masters_follow_fp32(precision: str) -> None:
    """A step is a tenth of the rounding error of a weight of 0.1, so plain bf16 would hardly move."""
    lr, steps = 1e-4, 60
    start = flatten(build_net())
    way = train(build_engine(0, lr=lr), steps, lr) - start
    for stage in STAGES[2:]:
        engine = build_engine(stage, precision, lr=lr)
        moved = train(engine, steps, lr) - start
        # 0.01 if every weight were rounded to the nearest number.
        share = (moved @ way / (way @ way)).item()
        assert engine.dtype == torch.bfloat16 and share == pytest.approx(1, abs=0.3), stage


@pytest.mark.parametrize("stage", STAGES[1:])
def test_stochastic_rounding_is_equal_after_a_resume(stage: int, tmp_path: Path) -> None:
    whole = train(build_engine(stage, "bf16_stochastic"), 5)
    engine = build_engine(stage, "bf16_stochastic")
    train(engine, 3)
    resumed = build_engine(stage, "bf16_stochastic")
    resumed.load_state(save(engine, tmp_path))
    assert train(resumed, range(3, 5)).equal(whole)
    other = build_engine(3 - stage or 3, "bf16_stochastic")
    other.load_state(tmp_path / "step-00000003")
    torch.testing.assert_close(train(other, range(3, 5)), whole, rtol=0, atol=0.05 * LR)


@pytest.mark.parametrize("settings", [{}, {"offload_param": True}])
def test_offloaded_state_gets_the_same_updates(settings: dict) -> None:
    """The optimizer is PyTorch's, because DeepSpeed's own CPU optimizer has to be compiled."""
    engine = build_engine(3, name="torch.optim.AdamW", offload_optimizer=True, **settings)
    assert (engine._engine.zero_offload_param() is not None) == bool(settings)
    weights = train(engine)
    torch.testing.assert_close(weights, train(build_engine(3)), rtol=0, atol=1e-6)
    if settings:
        assert engine.capture_state() and gather(engine).equal(weights)


@pytest.mark.parametrize("stage", STAGES)
def test_averages_are_those_of_plain_pytorch(stage: int, tmp_path: Path) -> None:
    """Two averages at once, through a checkpoint in the middle, against the recursion on whole weights."""
    ema = EmaConfig(decays=[0.2, 0.999])
    engine, expected = build_engine(stage, ema=ema), {"0.2": flatten(build_net()), "0.999": flatten(build_net())}
    for number in range(1, 7):
        if number == 4:
            path = save(engine, tmp_path)
            engine = build_engine(3 - stage, ema=ema)
            engine.load_state(path)
        weights = train(engine, range(number, number + 1))
        for key, average in expected.items():
            decay = min(float(key), (1 + number) / (10 + number))
            expected[key] = decay * average + (1 - decay) * weights
    for key, average in expected.items():
        torch.testing.assert_close(gather(engine, key), average, rtol=0, atol=1e-6)
    assert not expected["0.2"].allclose(expected["0.999"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_use_average_replaces_the_weights_and_restores_them(stage: int, precision: str) -> None:
    engine = build_engine(stage, precision, ema=EmaConfig(decays=[0.9]))
    train(engine)
    inputs = draw_inputs(0)[0].to(engine.dtype)
    with torch.no_grad():
        before, weights = engine.model(inputs), gather(engine)
        with engine.weights.use_average("0.9"):
            averaged = engine.model(inputs)
        after = engine.model(inputs)
        net, place = build_net(), 0
        for parameter in net.parameters():
            parameter.copy_(gather(engine, "0.9")[place : place + parameter.numel()].view(parameter.shape))
            place += parameter.numel()
        expected = net.to(engine.dtype)(inputs)
    assert after.equal(before) and gather(engine).equal(weights)
    assert not averaged.equal(before)
    torch.testing.assert_close(averaged, expected)
    train(engine, 1)
    assert not gather(engine).equal(weights)


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_that_saves_alone_while_an_average_is_used_saves_the_weights(stage: int) -> None:
    engine = build_engine(stage, "bf16", ema=EmaConfig(decays=[0.9]))
    train(engine)
    expected = list_tensors(engine.capture_state())
    with engine.weights.use_average("0.9"):
        saved = list_tensors(engine.capture_state(alone=True))
    assert len(saved) == len(expected) > 5
    assert all(one.equal(other) for one, other in zip(saved, expected, strict=True))


@pytest.mark.parametrize("stage", [1, 2])
def test_a_gradient_that_is_not_finite_is_found_without_a_norm(stage: int) -> None:
    init_ranks()
    settings = {"zero_optimization": {"compute_grad_norm": False}}
    net, config = build_net(), EngineConfig(zero_stage=stage, precision="bf16", deepspeed=settings)
    engine = Engine(
        net, build_optimizer(build_groups(net), OptimConfig(lr=LR), config), config, BatchSizes(2, 2, 1), 0.0
    )
    weights = gather(engine)
    engine.backward(engine(draw_inputs(0)[0].to(engine.dtype)).sum() * float("nan"))
    assert not engine.step() and gather(engine).equal(weights)


def list_tensors(content: object) -> list[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        return [content]
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, (list, tuple)) else ()
    return [tensor for part in parts for tensor in list_tensors(part)]


def test_a_new_average_begins_with_the_weights_of_the_checkpoint(tmp_path: Path) -> None:
    engine = build_engine(2)
    weights = train(engine)
    later = build_engine(1, ema=EmaConfig(decays=[0.9]))
    later.load_state(save(engine, tmp_path))
    assert gather(later, "0.9").equal(weights)
