"""Parameter groups in pieces: the same training as with whole groups, and checkpoints that fit both."""

from itertools import islice
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
from sdxl_trainer.train.optim import optimizers

STAGES = (0, 1, 2, 3)
WHOLE, SPLIT = 2**28, 40  # values in a piece of a parameter group
LR, SCALES = 0.05, (1.0, 0.5)


def build_net() -> torch.nn.Sequential:
    torch.manual_seed(3)
    return torch.nn.Sequential(*(torch.nn.Linear(5, 5) for _ in range(6)), torch.nn.Linear(5, 9))


def build_engine(stage: int, max_values: int, precision: str = "fp32", name: str = "adamw") -> Engine:
    """Build an engine over layers in two groups of 60 and 174 values."""
    init_ranks()
    net, config = build_net(), EngineConfig(zero_stage=stage, precision=precision)  # pyright: ignore
    for weight in net.parameters():
        weight.use_muon = weight.dim() == 2  # pyright: ignore
    groups = [
        {"params": list(part.parameters()), "lr": LR * scale, "weight_decay": 0.1, "lr_scale": scale}
        for part, scale in zip((net[:2], net[2:]), SCALES, strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizers, "MAX_GROUP_VALUES", max_values)
        optimizer = optimizers.build_optimizer(groups, OptimConfig(name=name, lr=LR), config)
    return Engine(net, optimizer, config, BatchSizes(4, 4, 1), 0.0 if name == "muon" else 1.0, EmaConfig(decays=[0.9]))


def train(engine: Engine, steps: range) -> list[float]:
    losses = []
    for step in steps:
        engine.set_lr(LR / (1 + step))
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(engine.dtype)
        loss = (engine(inputs).float() - 1.0).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def gather(engine: Engine) -> torch.Tensor:
    """Return all weights and all averages."""
    names = sorted(engine.weights.trained_names)
    return torch.cat([engine.weights.gather(name, key).flatten() for key in (None, "0.9") for name in names])


def save(engine: Engine, folder: Path) -> Path:
    writer = CheckpointWriter(folder=folder, rank=0, world_size=1, token="t", keep_last=1)
    writer.save(engine, TrainState(step=3, world_size=1))
    writer.wait()
    return folder / "step-00000003"


@pytest.mark.parametrize("stage", STAGES[1:])
def test_zero_flattens_no_more_than_a_piece(stage: int) -> None:
    flats = build_engine(stage, SPLIT).weights.layout.flats
    assert [sum(fragment.numel for fragment in flat.fragments) for flat in flats] == [*[30] * 6, 45, 9]
    assert [len(flat.fragments) for flat in flats] == [*[2] * 6, 1, 1]
    assert len(build_engine(stage, WHOLE).weights.layout.flats) == 2


@torch._dynamo.config.patch(disable=True)  # compiling takes a minute and does not change the numbers
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("stage", STAGES)
def test_pieces_train_as_whole_groups_do(stage: int, name: str) -> None:
    engine, whole = build_engine(stage, SPLIT, name=name), build_engine(stage, WHOLE, name=name)
    assert train(engine, range(4)) == pytest.approx(train(whole, range(4)), abs=1e-6)
    torch.testing.assert_close(gather(engine), gather(whole), rtol=0, atol=1e-6)
    # The schedule scales the pieces of a group alike.
    rates = [group["lr"] for group in engine._engine.optimizer.param_groups]
    if name == "adamw":
        assert rates == [LR / 4 * scale for scale in (1.0, 1.0, *[0.5] * 6)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("old", STAGES)
@pytest.mark.parametrize("max_values", [WHOLE, SPLIT])
def test_a_checkpoint_of_whole_groups_continues_in_pieces_and_the_reverse(
    max_values: int, old: int, precision: str, tmp_path: Path
) -> None:
    engine = build_engine(old, max_values, precision)
    train(engine, range(3))
    path, losses = save(engine, tmp_path), train(engine, range(3, 6))
    for new in STAGES:
        other = build_engine(new, SPLIT + WHOLE - max_values, precision)
        other.load_state(path)
        found, allowed = train(other, range(3, 6)), 1e-6 if precision == "fp32" else 2e-2
        assert found == pytest.approx(losses, abs=allowed), f"stage {new}"
        torch.testing.assert_close(gather(other), gather(engine), rtol=0, atol=allowed)
        if new == old:
            assert found == pytest.approx(losses, abs=1e-6)


@pytest.mark.parametrize("stage", [0, 3])
def test_the_same_tensors_in_other_groups_are_resharded(stage: int, tmp_path: Path) -> None:
    """Each parameter is a tensor of its own, so the groups alone tell the checkpoints apart."""

    def build(*sizes: int) -> Engine:
        net = build_net()
        weights = iter(net.parameters())
        groups = [{"params": list(islice(weights, size))} for size in sizes]
        one_by_one = {"zero_optimization": {"sub_group_size": 1}}  # of ZeRO 3
        config = EngineConfig(zero_stage=stage, precision="fp32", deepspeed=one_by_one)
        return Engine(net, torch.optim.AdamW(groups, lr=LR), config, BatchSizes(4, 4, 1), 1.0)

    init_ranks()
    engine = build(14)
    train(engine, range(3))
    path, losses = save(engine, tmp_path), train(engine, range(3, 6))
    for sizes in ((6, 8), (2, 12), (14,)):
        other = build(*sizes)
        assert other.weights.layout.flats == engine.weights.layout.flats
        other.load_state(path)
        assert train(other, range(3, 6)) == pytest.approx(losses, abs=1e-6)
