"""Resharding: the state of any ZeRO stage, precision and grouping loads into any other, and training continues."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from programs import run_program

from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.launch.distributed import init_ranks
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.checkpoint.writer import CheckpointWriter
from sdxl_trainer.train.engine.deepspeed_config import BatchSizes
from sdxl_trainer.train.engine.engine import Engine
from sdxl_trainer.train.engine.layout import FlatTensor, Fragment, Layout
from sdxl_trainer.train.engine.saved_state import MASTER, ReshardingError, SavedState, map_state_file

STAGES = (0, 1, 2, 3)


def build_net() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3))


def build_engine(stage: int, precision: str = "fp32", weight_decay: float = 0.1, **choices) -> Engine:
    net = build_net()
    trained = [p for p in net.parameters()]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if choices.get("one_group"):
        groups = [{"params": trained, "weight_decay": weight_decay}]
    optimizer = choices.get("build", torch.optim.AdamW)(groups, lr=0.05)
    settings = EngineConfig(zero_stage=stage, precision=precision, deepspeed={"zero_allow_untested_optimizer": True})
    return Engine(net, optimizer, settings, BatchSizes(4, 4, 1), 1.0)


def train(engine: Engine, steps: range) -> list[float]:
    losses = []
    for step in steps:
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(engine.dtype)
        loss = (engine(inputs).float() - 1.0).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def save(engine: Engine, folder: Path) -> Path:
    writer = CheckpointWriter(folder=folder, rank=0, world_size=1, token="t", keep_last=1)
    writer.save(engine, TrainState(step=3, world_size=1))
    writer.wait()
    return folder / "step-00000003"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, list[float]]]:
    """Return the checkpoint after three steps under a stage and precision, and the losses of the next three steps."""
    init_ranks()
    made = {}

    def make(stage: int, precision: str = "fp32") -> tuple[Path, list[float]]:
        if (stage, precision) not in made:
            engine = build_engine(stage, precision)
            train(engine, range(3))
            path = save(engine, tmp_path_factory.mktemp("saved"))
            made[stage, precision] = path, train(engine, range(3, 6))
        return made[stage, precision]

    return make


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("old", STAGES)
def test_any_stage_continues_from_any_other(saved, old: int, precision: str) -> None:
    path, expected = saved(old, precision)
    for new in STAGES:
        engine = build_engine(new, precision)
        engine.load_state(path)
        losses = train(engine, range(3, 6))
        assert losses == pytest.approx(expected, abs=1e-6 if precision == "fp32" else 2e-2), f"stage {new}"
        if new == old:
            assert losses == expected


def test_the_state_that_two_ranks_saved_loads_into_one_two_and_four_ranks() -> None:
    """Every combination of ZeRO 1, 2 and 3: losses, weights and averages equal those of an uninterrupted run."""
    assert "36 resumes compared" in run_program("tests/support/reshard_ranks.py")


def test_other_groups_and_another_precision(saved) -> None:
    """The state belongs to parameters, not to the groups in which DeepSpeed flattened them."""
    path, expected = saved(2)
    engine = build_engine(1, one_group=True, weight_decay=0.0)
    engine.load_state(path)
    assert train(engine, range(3, 4)) == pytest.approx(expected[:1], abs=1e-6)
    in_bf16 = build_engine(2, "bf16")
    in_bf16.load_state(path)
    assert in_bf16.weights.gather("0.weight").dtype == torch.float32
    assert torch.equal(
        in_bf16.weights.gather("0.weight"), SavedState(path / "state", map_state_file).read_whole("0.weight")
    )


def test_the_present_settings_override_those_of_the_checkpoint(saved) -> None:
    """A checkpoint holds the weight decay that it was saved with."""
    path, _ = saved(2)
    for stage in (2, 3):
        engine = build_engine(stage, weight_decay=0.7)
        engine.load_state(path)
        assert [group["weight_decay"] for group in engine._engine.optimizer.param_groups] == [0.7, 0.0]


def test_a_state_that_is_not_one_value_per_weight_is_refused_clearly(saved, tmp_path: Path) -> None:
    class Blocks(torch.optim.SGD):
        """Keep one number for each 4 weights, as quantised moments keep their scales."""

        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["scale"] = torch.ones(-(-parameter.numel() // 4))

    engine = build_engine(2, build=Blocks)
    train(engine, range(1))
    path = save(engine, tmp_path)
    same = build_engine(2, build=Blocks)
    same.load_state(path)
    with pytest.raises(ReshardingError, match="'scale' has .* by 1 ranks at ZeRO stage 2"):
        build_engine(1, one_group=True, build=Blocks).load_state(path)


def write_shards(folder: Path, shares: list[list[Fragment]], weights: torch.Tensor) -> None:
    """Write the files of ranks at stage 2 that hold the given fragments of one parameter."""
    for rank, fragments in enumerate(shares):
        flat = torch.zeros(8)
        for part in fragments:
            flat[part.offset : part.offset + part.numel] = weights[part.start : part.start + part.numel]
        layout = Layout(
            rank=rank,
            world_size=len(shares),
            zero_stage=2,
            kind="x",
            flats=(FlatTensor(8, tuple(fragments)),),
            shapes={"w": (3, 4)},
        )
        torch.save(layout.to_plain(), folder / f"layout_rank_{rank:05d}.pt")
        state = {"single_partition_of_fp32_groups": [flat], "base_optimizer_state": {"state": {}, "param_groups": []}}
        torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def test_fragments_are_read_across_ranks_and_a_gap_is_an_error(tmp_path: Path) -> None:
    weights = torch.arange(12.0)
    write_shards(tmp_path, [[Fragment("w", 0, 1, 7)], [Fragment("w", 7, 0, 5)]], weights)
    state = SavedState(tmp_path, map_state_file)
    assert torch.equal(state.read_whole("w"), weights.view(3, 4))
    assert torch.equal(state.read("w", MASTER, 5, 4), weights[5:9])
    write_shards(tmp_path, [[Fragment("w", 0, 1, 7)], [Fragment("w", 8, 0, 4)]], weights)
    with pytest.raises(ReshardingError, match="11 of 12 values of w"):
        SavedState(tmp_path, map_state_file).read_whole("w")
    (tmp_path / "layout_rank_00001.pt").unlink()
    with pytest.raises(ReshardingError, match="lacks the layouts of some ranks; it holds 1"):
        SavedState(tmp_path, map_state_file)
