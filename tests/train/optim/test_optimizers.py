"""Optimizers by name and by path against their formulas, and settings that are refused."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch._dynamo
from loguru import logger

from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.data.packages import OPTIMIZER_PACKAGES
from sdxl_trainer.train.optim.optimizers import ON_HOST, OPTIMIZERS, build_optimizer, check_optimizer

LR, DECAY = 0.1, 0.01


def list_problems(engine: dict | None = None, **optim) -> list[tuple[str, str]]:
    problems = check_optimizer(OptimConfig(**optim), EngineConfig(**engine or {}))
    return [(problem.key, problem.cure) for problem in problems]


WHOLE = "set engine.zero_stage: 0, or another optim.name"
NARROW_CURE = "set it to one of adamw, lion, adafactor, or set engine.gradient_release: true"


def draw(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def update(config: OptimConfig, steps: int = 1, shape: tuple[int, ...] = (4, 6), **engine) -> torch.Tensor:
    """Return a weight after `steps` updates with gradients drawn from seeds 1, 2, ..."""
    weight = torch.nn.Parameter(draw(shape, 0).to(torch.bfloat16 if "precision" in engine else torch.float32))
    weight.use_muon = weight.dim() == 2  # pyright: ignore
    group = {"params": [weight], "lr": config.lr, "weight_decay": config.weight_decay, "lr_scale": 1.0}
    optimizer = build_optimizer([group], config, EngineConfig(**engine))
    for step in range(steps):
        weight.grad = draw(shape, step + 1).to(weight.dtype)
        optimizer.step()
    return weight.detach()


def update_adamw(steps: int, betas: tuple[float, float], eps: float, shape: tuple[int, ...] = (4, 6)) -> torch.Tensor:
    """Compute AdamW's updates by the formulas, in fp64."""
    weight, first, second = draw(shape, 0).double(), torch.zeros(shape), torch.zeros(shape)
    for step in range(1, steps + 1):
        gradient = draw(shape, step).double()
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        size = (second / (1 - betas[1] ** step)).sqrt() + eps
        weight = weight * (1 - LR * DECAY) - LR * first / (1 - betas[0] ** step) / size
    return weight.float()


@pytest.mark.parametrize("name", ["adamw", "torch.optim.AdamW", "torch.optim:AdamW"])
def test_adamw(name):
    config = OptimConfig(name=name, lr=LR, betas=(0.8, 0.9), eps=1e-3)
    torch.testing.assert_close(update(config, steps=3), update_adamw(3, (0.8, 0.9), 1e-3))


def test_adafactor_is_the_recipe_for_sdxl():
    """No relative step, no parameter scaling: second moments by rows and columns, update clipped to an RMS of 1."""
    weight, gradient = draw((4, 6), 0), draw((4, 6), 1)
    square = gradient**2 + 1e-30
    rows, columns = square.mean(1), square.mean(0)  # the first step's decay is 1 - 1^-0.8 = 0
    size = (rows / rows.mean())[:, None].sqrt() * columns[None].sqrt()
    change = gradient / size
    change = change / (change.square().mean().sqrt() / 1.0).clamp(min=1.0)
    config = OptimConfig(name="adafactor", lr=LR, weight_decay=DECAY)
    torch.testing.assert_close(update(config), weight * (1 - LR * DECAY) - LR * change)


def test_lion_moves_by_the_sign():
    weight, first = draw((4, 6), 0), 0.1 * draw((4, 6), 1)
    weight = weight * (1 - LR * DECAY) - LR * first.sign()
    momentum = 0.01 * draw((4, 6), 1)  # betas 0.9 and 0.99
    weight = weight * (1 - LR * DECAY) - LR * (0.9 * momentum + 0.1 * draw((4, 6), 2)).sign()
    torch.testing.assert_close(update(OptimConfig(name="lion", lr=LR, weight_decay=DECAY), steps=2), weight)


def test_prodigy_begins_with_its_d0():
    """The first step is Adam's of size d0 without bias correction; later steps grow."""
    weight, gradient, d0 = draw((4, 6), 0), draw((4, 6), 1), 1e-3
    config = OptimConfig(name="prodigy", lr=1.0, weight_decay=0.0, kwargs={"d0": d0})
    change = d0 * (0.1 * d0 * gradient) / ((0.001 * (d0 * gradient) ** 2).sqrt() + d0 * 1e-8)
    torch.testing.assert_close(update(config), weight - change)


@torch._dynamo.config.patch(disable=True)  # compiling takes seconds and does not change the numbers
def test_muon_takes_matrices_and_adamw_the_rest():
    config = OptimConfig(name="muon", lr=LR, weight_decay=DECAY, kwargs={"adam_lr": LR, "ns_method": "standard"})
    torch.testing.assert_close(update(config, steps=2, shape=(6,)), update_adamw(2, (0.9, 0.999), 1e-8, (6,)))
    change = (draw((4, 6), 0) * (1 - LR * DECAY) - update(config)) / LR
    sizes = torch.linalg.svdvals(change)  # orthogonalised: Newton-Schulz ends between 0.5 and 1.5
    assert 0.5 < sizes.min() and sizes.max() < 1.5
    # In the first step, Nesterov momentum is 0.05 (1 + 0.95) of the gradient, so the directions are the gradient's.
    left, _, right = torch.linalg.svd(draw((4, 6), 1), full_matrices=False)
    aligned = left.T @ change @ right.T
    assert aligned.diagonal().min() > 0.5 and (aligned - aligned.diagonal().diag()).abs().max() < 0.1


def test_kahan_summation_keeps_what_bf16_would_round_away():
    """3000 steps far below bf16's resolution move a weight as in fp32; plain bf16 does not move at all."""
    config = OptimConfig(lr=1e-5, weight_decay=0.0)
    weights = {}
    for name, engine in {"kahan": {"precision": "bf16_kahan"}, "plain": {}}.items():
        weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
        optimizer = build_optimizer([{"params": [weight]}], config, EngineConfig(**engine))
        for _ in range(3000):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        weights[name] = weight.detach().float()
    assert weights["plain"].equal(torch.ones(8))
    torch.testing.assert_close(weights["kahan"], torch.full((8,), 0.97), rtol=0, atol=0.005)


def test_arguments_reach_the_class():
    config = OptimConfig(name="torch.optim.SGD", lr=LR, weight_decay=0.0, kwargs={"momentum": 0.5, "nesterov": True})
    gradient = draw((4, 6), 1)
    torch.testing.assert_close(update(config), draw((4, 6), 0) - LR * 1.5 * gradient)


@pytest.mark.parametrize(
    ("engine", "optim", "key", "cure"),
    [
        ({}, {"name": "adamx"}, "optim.name", "did you mean adamw?"),
        ({}, {"name": "torch.optim.AdamX"}, "optim.name", "did you mean torch.optim.Ada"),
        ({"zero_stage": 2}, {"name": "adafactor"}, "optim.name", WHOLE),
        (
            {"zero_stage": 2},
            {"name": "torch.optim.Adafactor"},
            "optim.name",
            "set engine.zero_stage: 0, or another optim.name",
        ),
        (
            {"zero_stage": 2},
            {"name": "prodigy", "lr": 1},
            "optim.name",
            "set engine.zero_stage: 0, or another optim.name",
        ),
        ({}, {"name": "muon"}, "optim.max_grad_norm", "set it to 0"),
        ({"zero_stage": 0}, {"name": "prodigy"}, "optim.lr", "set it to 1"),
        (
            {"zero_stage": 0},
            {"name": "prodigy", "lr": 1, "text_encoder_lr": 0.5},
            "optim",
            "set each to 0 or to optim.lr",
        ),
        ({"zero_stage": 0}, {"name": "adafactor", "betas": (0.9, 0.9)}, "optim.betas", "leave it out"),
        (
            {"zero_stage": 0},
            {"name": "adafactor", "kwargs": {"relativ": 1}},
            "optim.kwargs.relativ",
            "did you mean relative_step?",
        ),
        ({"precision": "bf16_kahan"}, {"name": "torch.optim.SGD"}, "optim.name", NARROW_CURE),
        (
            {"precision": "bf16_stochastic"},
            {"name": "muon", "max_grad_norm": 0},
            "optim.name",
            NARROW_CURE,
        ),
    ],
)
def test_unsound_settings_are_refused(engine, optim, key, cure):
    found = list_problems(engine, **optim)
    assert [problem[0] for problem in found] == [key]
    assert found[0][1].startswith(cure)


def test_sound_settings_are_not_refused():
    is_missing = {name for name, package in OPTIMIZER_PACKAGES.items() if find_spec(package) is None}
    for name in set(OPTIMIZERS) - is_missing:
        assert list_problems({"zero_stage": 0}, name=name, lr=1, max_grad_norm=0) == [], name


def test_a_class_by_path_on_flat_shards_is_warned_about():
    messages: list[str] = []
    sink = logger.add(messages.append, format="{level}: {message}")
    config = OptimConfig(name="torch.optim.SGD")
    for stage in (0, 2):
        build_optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))]}], config, EngineConfig(zero_stage=stage))
    logger.remove(sink)
    assert [str(line) for line in messages] == [
        "WARNING: optim.name: ZeRO 2 passes flat shards to torch.optim.SGD; its update must be elementwise\n"
    ]


def test_a_missing_package_is_named():
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        assert list_problems(name="adamw8bit") == [("optim.name", "pip install bitsandbytes")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_lrs": [1e-5] * 22}, "needs 23 learning rates"),
        ({"groups": [{"match": "a("}]}, "is not a regular expression"),
        ({"power": 2.0}, "has no effect: optim.schedule is constant; set that to polynomial"),
        ({"schedule": "cosine", "num_cycles": 2}, "has no effect"),
        ({"schedule": "wsd"}, "must be above 0 with optim.schedule: wsd"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_stage": 0, "offload_optimizer": True}, "needs engine.zero_stage 1, 2 or 3"),
        ({"zero_stage": 0, "precision": "bf16_kahan"}, "needs engine.zero_stage 1, 2 or 3"),
        ({"zero_stage": 0, "precision": "bf16_stochastic"}, "needs engine.zero_stage 1, 2 or 3"),
        ({"zero_stage": 0, "precision": "fp16"}, "needs engine.zero_stage 1, 2 or 3"),
        ({"zero_stage": 3, "compile": True}, "needs engine.zero_stage 0, 1 or 2"),
        ({"precision": "bf16_stochastic", "offload_optimizer": True}, "needs fp32 master weights"),
        ({"zero_stage": 2, "offload_optimizer": True, "offload_param": True}, "needs engine.zero_stage 3"),
        ({"zero_stage": 3, "offload_param": True}, "set engine.offload_optimizer: true"),
        ({"precision": "bf16", "accumulation_dtype": "fp16"}, "set it to auto or fp32 or bf16"),
        ({"precision": "fp16", "communication_dtype": "bf16"}, "set it to auto or fp32 or fp16"),
        ({"precision": "fp32", "accumulation_dtype": "bf16"}, "set it to auto or fp32"),
    ],
)
def test_contradictions_of_the_engine_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**settings)


def test_optimizers_in_host_memory_need_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for tool in ("c++", "ninja", "my-c++"):
        (tmp_path / tool).write_text("")
        (tmp_path / tool).chmod(0o755)
    offload = {"offload_optimizer": True}
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list_problems(offload) == []
    (tmp_path / "c++").unlink()
    (tmp_path / "ninja").unlink()
    for name in ("adamw", "lion"):
        [compiler, ninja] = list_problems(offload, name=name)
        assert compiler[0] == ninja[0] == "engine.offload_optimizer"
        assert "g++" in compiler[1] and ninja[1] == "pip install ninja"
    monkeypatch.setenv("CXX", "my-c++ -O2")
    assert list_problems(offload) == [("engine.offload_optimizer", "pip install ninja")]
    assert list_problems() == []  # nothing is compiled without offload
    monkeypatch.setitem(ON_HOST, "adamw", ON_HOST["adamw"]._replace(compiled_module="deepspeed"))
    assert list_problems(offload) == []  # installed with DeepSpeed
