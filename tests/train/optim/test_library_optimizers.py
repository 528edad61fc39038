"""Optimizers of other libraries by name, through the engine: steps, resumes, other ranks, and what is refused.

    test_library_optimizers.py FOLDER

is run on two ranks: for each elementwise optimizer, it continues the checkpoint of one rank in FOLDER for three steps,
and writes another one.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.configs.schema import EmaConfig
from sdxl_trainer.data.packages import OPTIMIZER_PACKAGES
from sdxl_trainer.launch.distributed import Ranks, close_ranks, init_ranks, reduce_sum
from sdxl_trainer.launch.program import end_program
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.checkpoint.writer import CheckpointWriter
from sdxl_trainer.train.engine.deepspeed_config import BatchSizes
from sdxl_trainer.train.engine.engine import Engine
from sdxl_trainer.train.engine.saved_state import open_weights
from sdxl_trainer.train.estimates.optimizer_state import count_moments
from sdxl_trainer.train.optim.optimizers import OPTIMIZERS, build_optimizer, check_optimizer, import_class

ELEMENTWISE = ("adamw_schedule_free", "adopt", "ademamix")
WHOLE = ("came", "lamb", "soap", "stable_adamw", "prodigy_plus_schedule_free")
RELEASED = tuple(name for name in (*ELEMENTWISE, *WHOLE) if not name.startswith("prodigy"))
BATCH, RATES = 4, {"soap": 0.01, "lamb": 0.02, "prodigy_plus_schedule_free": 1.0}


def is_missing(name: str) -> bool:
    return importlib.util.find_spec(OPTIMIZER_PACKAGES[name]) is None


def skip_missing(*names: str) -> list[Any]:
    """Return parameters of a test, of which those without their package are skipped."""
    return [
        pytest.param(name, marks=pytest.mark.skipif(is_missing(name), reason=f"needs {OPTIMIZER_PACKAGES[name]}"))
        for name in names
    ]


def build_net() -> torch.nn.Sequential:
    torch.manual_seed(3)
    return torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 8, 3), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(32, 40)),
        *(torch.nn.GELU(), torch.nn.Linear(40, 5)),
    )


def build_groups(net: torch.nn.Module, lr: float, scale: float) -> list[dict[str, Any]]:
    """Build two groups: weights that decay, and biases with another learning rate."""
    matrices = [weight for weight in net.parameters() if weight.dim() > 1]
    rest = [weight for weight in net.parameters() if weight.dim() == 1]
    return [
        {"params": matrices, "lr": lr, "weight_decay": 0.1, "lr_scale": 1.0},
        {"params": rest, "lr": lr * scale, "weight_decay": 0.0, "lr_scale": scale},
    ]


def choose_scale(name: str) -> float:
    """Return the share of the learning rate that biases have: Prodigy finds one rate for all."""
    return 1.0 if name.startswith("prodigy") else 0.5


def build_engine(name: str, stage: int = 0, precision: str = "fp32", release: bool = False) -> Engine:
    ranks = init_ranks()
    config = EngineConfig.model_validate({"zero_stage": stage, "precision": precision, "gradient_release": release})
    lr, net = RATES.get(name, 0.01), build_net()
    optim = OptimConfig.model_validate({"name": name, "lr": lr})
    optimizer = build_optimizer(build_groups(net, lr, choose_scale(name)), optim, config)
    return Engine(net, optimizer, config, BatchSizes(BATCH, BATCH // ranks.world_size, 1), 0.0)


def compute_loss(net: Any, step: int, rank: int = 0, world_size: int = 1, dtype: Any = torch.float32) -> torch.Tensor:
    inputs = torch.randn(BATCH, 3, 4, 4, generator=torch.Generator().manual_seed(step))
    share = BATCH // world_size
    return (net(inputs[rank * share :][:share].to(dtype)).float() - 1.0).square().mean()


def choose_rate(name: str, step: int) -> float:
    """Return the learning rate of a step, with a warm-up of two."""
    return RATES.get(name, 0.01) * min(1.0, (step + 1) / 2)


def train(engine: Engine, name: str, steps: range, ranks: Ranks | None = None) -> list[float]:
    """Return the losses of steps, averaged over the ranks."""
    rank, world_size, losses = (ranks.rank, ranks.world_size, []) if ranks else (0, 1, [])
    for step in steps:
        engine.set_lr(choose_rate(name, step))
        loss = compute_loss(engine, step, rank, world_size, engine.dtype)
        engine.backward(loss)
        assert engine.step()
        losses.append(reduce_sum(loss.detach().clone()).item() / world_size)
    return losses


def gather(engine: Engine) -> torch.Tensor:
    return torch.cat([engine.weights.gather(name).flatten() for name, _ in build_net().named_parameters()])


def assert_continued(
    name: str, losses: list[float], expected: list[float], weights: torch.Tensor, wanted: torch.Tensor
) -> None:
    """Assert that a resumed run continued as the uninterrupted one: to the bit, and SOAP to rounding.

    SOAP's eigenvectors are transposed matrices. A checkpoint stores them row by row, and MKL multiplies both forms with
    other roundings on some processors.
    """
    tolerance = 1e-6 if name == "soap" else 0.0
    assert losses == pytest.approx(expected, rel=tolerance, abs=0)
    torch.testing.assert_close(weights, wanted, rtol=0, atol=tolerance)


def flatten(weights: Any) -> torch.Tensor:
    return torch.cat([weight.detach().float().flatten() for weight in weights])


def save(engine: Engine, folder: Path, ranks: Ranks | None = None) -> Path:
    rank, world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
    writer = CheckpointWriter(folder=folder, rank=rank, world_size=world_size, token="t", keep_last=1)
    writer.save(engine, TrainState(step=3, world_size=world_size))
    writer.wait()
    return folder / "step-00000003"


def train_by_library(name: str, steps: int) -> torch.Tensor:
    """Return the weights after steps of the library's class on a plain network, as it hands them out."""
    net, lr, entry = build_net(), RATES.get(name, 0.01), OPTIMIZERS[name]
    optimizer = import_class(entry.path)(build_groups(net, lr, choose_scale(name)), lr=lr, **entry.kwargs)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = choose_rate(name, step) * group["lr_scale"]
        optimizer.zero_grad()
        compute_loss(net, step).backward()
        optimizer.step()
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    return flatten(net.parameters())


@pytest.mark.parametrize("name", skip_missing(*ELEMENTWISE, *WHOLE))
def test_five_steps_are_those_of_the_library(name: str) -> None:
    expected = train_by_library(name, 5)
    assert (expected - flatten(build_net().parameters())).abs().max() > (1e-5 if name.startswith("prodigy") else 0.01)
    stages = (0, 1, 3) if name in ELEMENTWISE else (0,)
    for stage in stages:
        engine = build_engine(name, stage)
        train(engine, name, range(5))
        torch.testing.assert_close(gather(engine), expected, rtol=0, atol=0.0 if stage == 0 else 1e-6)


@pytest.mark.parametrize("name", skip_missing(*ELEMENTWISE, *WHOLE))
def test_a_resume_is_exact(name: str, tmp_path: Path) -> None:
    """In 16 bit with masters, and without ZeRO too, where DeepSpeed makes an update of its own at the start."""
    stages = (0, 2) if name in ELEMENTWISE else (0,)
    ended = []
    for stage in stages:
        engine = build_engine(name, stage, "bf16")
        begun = gather(engine)
        assert begun.equal(flatten(build_net().parameters()))
        train(engine, name, range(3))
        path = save(engine, tmp_path / str(stage))
        model = gather(engine)
        opened = open_weights(path)
        torch.testing.assert_close(flatten(opened[key]() for key, _ in build_net().named_parameters()), model)
        losses = train(engine, name, range(3, 6))
        again = build_engine(name, stage, "bf16")
        again.load_state(path)
        assert gather(again).equal(model)
        assert_continued(name, train(again, name, range(3, 6)), losses, gather(again), gather(engine))
        ended.append(gather(engine))
    for weights in ended[1:]:
        torch.testing.assert_close(weights, ended[0], rtol=0, atol=2e-3)  # gradients in bf16


@pytest.mark.parametrize("name", skip_missing("adamw_schedule_free", "prodigy_plus_schedule_free"))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_validation_sees_the_average_and_leaves_training_as_it_is(name: str, precision: str) -> None:
    engine, undisturbed = build_engine(name, 0, precision), build_engine(name, 0, precision)
    losses = []
    for step in range(4):
        losses += train(engine, name, range(step, step + 1))
        trained = flatten(engine.model.parameters())
        with engine.weights.use_average(None):
            used = flatten(engine.model.parameters())
            expected = gather(engine) if precision == "bf16" else used
        assert used.equal(expected.to(engine.dtype).float())
        # The first update makes the average the point z, and so the weights.
        assert step == 0 or not used.equal(trained)
        assert flatten(engine.model.parameters()).equal(trained)
    assert losses == train(undisturbed, name, range(4))


@pytest.mark.parametrize("precision", ["fp32", "bf16_stochastic"])
@pytest.mark.parametrize("name", skip_missing(*RELEASED))
def test_gradient_release_gives_the_same_steps(name: str, precision: str, tmp_path: Path) -> None:
    engine = build_engine(name, 0, precision, release=True)
    train(engine, name, range(3))
    path = save(engine, tmp_path)
    losses = train(engine, name, range(3, 5))
    if precision == "fp32":
        torch.testing.assert_close(gather(engine), train_by_library(name, 5), rtol=0, atol=2e-6)
    again = build_engine(name, 0, precision, release=True)
    again.load_state(path)
    assert_continued(name, train(again, name, range(3, 5)), losses, gather(again), gather(engine))


def test_other_ranks_and_stages_continue(tmp_path: Path) -> None:
    """One rank, then two ranks under another stage, then one rank: as one rank alone."""
    names = [name for name in ELEMENTWISE if not is_missing(name)]
    if not names:
        pytest.skip("needs schedulefree or pytorch_optimizer")
    from programs import run_program

    straight = {}
    for name in names:
        engine = build_engine(name, 2)
        train(engine, name, range(3))
        save(engine, tmp_path / name / "one")
        train(engine, name, range(3, 6))
        straight[name] = gather(engine), train(engine, name, range(6, 8))
    run_program("tests/train/optim/test_library_optimizers.py", tmp_path, ranks=2)
    for name, (weights, losses) in straight.items():
        path = tmp_path / name / "two" / "step-00000003"
        opened = open_weights(path)
        kept = flatten(opened[key]() for key, _ in build_net().named_parameters())
        torch.testing.assert_close(kept, weights, rtol=0, atol=1e-6)
        engine = build_engine(name, 1)
        engine.load_state(path)
        torch.testing.assert_close(gather(engine), kept, rtol=0, atol=1e-7)
        assert train(engine, name, range(6, 8)) == pytest.approx(losses, abs=1e-6), name


@pytest.mark.skipif(is_missing("adamw_schedule_free"), reason="needs schedulefree")
def test_weights_that_were_not_trained_before_begin_as_they_are(tmp_path: Path) -> None:
    """Their point z is the weight itself; 0 would pull their average to 0."""

    def build(is_whole: bool) -> Engine:
        net = build_net()
        net[3].bias.requires_grad_(is_whole)  # pyright: ignore
        trained = [weight for weight in net.parameters() if weight.requires_grad]
        optim = OptimConfig(name="adamw_schedule_free", lr=0.01)
        config = EngineConfig(zero_stage=2, precision="fp32")
        groups = [{"params": trained, "lr": 0.01, "weight_decay": 0.0, "lr_scale": 1.0}]
        return Engine(net, build_optimizer(groups, optim, config), config, BatchSizes(BATCH, BATCH, 1), 0.0)

    part, whole = build(False), build(True)
    train(part, "", range(3))
    whole.load_state(save(part, tmp_path))
    for name in ("0.weight", "3.bias", "5.bias"):
        assert whole.weights.gather(name).equal(part.weights.gather(name)), name


def list_problems(optim: dict[str, Any], engine: dict[str, Any] | None = None, **named: Any) -> list[tuple[str, str]]:
    problems = check_optimizer(OptimConfig(**optim), EngineConfig(**engine or {}), **named)
    return [(problem.key, problem.rule) for problem in problems]


@pytest.mark.parametrize("name", skip_missing(*WHOLE))
def test_optimizers_that_look_at_whole_weights_are_refused_on_shards(name: str) -> None:
    [(key, rule)] = list_problems({"name": name, "lr": 1.0}, {"zero_stage": 2})
    assert key == "optim.name" and "which is impossible on the flat shards of ZeRO 2" in rule
    assert list_problems({"name": name, "lr": 1.0}, {"zero_stage": 0}) == []


@pytest.mark.skipif(is_missing("adamw_schedule_free"), reason="needs schedulefree")
@pytest.mark.parametrize(
    ("optim", "ema", "key"),
    [
        ({"schedule": "cosine"}, [], "optim.schedule"),
        ({}, [0.999], "ema.decays"),
        ({}, [0.1], "ema.lengths"),
        ({"kwargs": {"rr": 1}}, [], "optim.kwargs.rr"),
        ({"betas": (0, 0.99)}, [], "optim.betas"),
        ({"kwargs": {"betas": [0, 0.99]}}, [], "optim.kwargs.betas"),
        ({"warmup_steps": 10}, [], None),
    ],
)
def test_schedule_free_contradictions_are_refused(optim: dict, ema: list[float], key: str | None) -> None:
    kept = EmaConfig(lengths=ema) if key == "ema.lengths" else EmaConfig(decays=ema)
    found = list_problems({"name": "adamw_schedule_free", **optim}, {"zero_stage": 2}, ema=kept)
    assert [problem[0] for problem in found] == ([key] if key else [])


@pytest.mark.skipif(is_missing("came"), reason="needs pytorch_optimizer")
def test_arguments_that_the_class_would_ignore_are_refused() -> None:
    for optim, key in (
        ({"betas": (0.9, 0.99)}, "optim.betas"),
        ({"kwargs": {"betas": [0.9, 0.99]}}, "optim.kwargs.betas"),
        ({"kwargs": {"clip_treshold": 1}}, "optim.kwargs.clip_treshold"),
        ({"eps": 1e-8}, "optim.eps"),
    ):
        assert [problem[0] for problem in list_problems({"name": "came", **optim}, {"zero_stage": 0})] == [key]


@pytest.mark.skipif(is_missing("prodigy_plus_schedule_free"), reason="needs prodigyplus")
def test_prodigy_plus_needs_all_gradients() -> None:
    release = {"gradient_release": True, "precision": "fp32"}
    [(key, rule)] = list_problems({"name": "prodigy_plus_schedule_free", "lr": 1.0}, release)
    assert key == "optim.name" and "gradients of all weights at once" in rule


@pytest.mark.parametrize("name", skip_missing("prodigy_plus_schedule_free", "stable_adamw"))
def test_the_state_that_is_kept_is_counted(name: str) -> None:
    """Of the optimizers that read numbers, which the meta device of test_optimizer_state.py does not have."""
    engine = build_engine(name)
    train(engine, name, range(1))
    states = [list(state.values()) for state in engine._engine.basic_optimizer.state.values()]
    kept = [value for values in states for value in values if isinstance(value, torch.Tensor) and value.dim()]
    shapes = [weight.shape for weight in build_net().parameters()]
    counted = count_moments(EngineConfig(), OptimConfig(name=name), shapes)
    assert sum(value.nbytes for value in kept) == counted


@pytest.mark.skipif(is_missing("adamw_schedule_free"), reason="needs schedulefree")
@pytest.mark.parametrize("kind", ["SGDScheduleFree", "RAdamScheduleFree"])
def test_other_classes_of_the_library_by_path_give_their_average_too(kind: str) -> None:
    engine = build_engine(f"schedulefree.{kind}")
    train(engine, kind, range(8))  # RAdam's first updates are 0
    found, optimizer = gather(engine), engine._engine.basic_optimizer
    assert not found.equal(flatten(engine.model.parameters()))
    optimizer.eval()
    torch.testing.assert_close(found, flatten(engine.model.parameters()), rtol=0, atol=1e-7)


def main() -> int:
    """Continue the checkpoint of each elementwise optimizer on these ranks, under ZeRO 3."""
    ranks, folder = init_ranks(), Path(sys.argv[1])
    for path in sorted(folder.iterdir()):
        engine = build_engine(path.name, 3)
        engine.load_state(path / "one" / "step-00000003")
        train(engine, path.name, range(3, 6), ranks)
        save(engine, path / "two", ranks)
    close_ranks()
    return 0


if __name__ == "__main__":
    end_program(main())
