"""AdamW with 8-bit moments: their stored form, and bitsandbytes under the engine where it is installed."""

import importlib.util
import json
from itertools import product
from pathlib import Path

import pytest
import torch
from eight_bit_updates import RELEASED, STAGES, build_engine, save, train
from programs import run_program

from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.launch.distributed import Ranks, init_ranks
from sdxl_trainer.train.engine.quantised import BLOCK, WRAPPED, QuantisedMoment, join_moments, quantise, split_moment
from sdxl_trainer.train.engine.saved_state import SavedState, map_state_file
from sdxl_trainer.train.optim.optimizers import check_optimizer

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="pip install --no-deps bitsandbytes (0.50 runs on CPUs)"
)
TABLE = torch.linspace(-1, 1, 256)
Saved = dict[tuple[int, int], tuple[Path, list[float]]]  # (ranks, ZeRO stage) → checkpoint, losses of six steps


def draw(count: int) -> torch.Tensor:
    """Draw values whose size differs between blocks."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(0))
    return values * 10.0 ** (torch.arange(count) // BLOCK % 7 - 3)


def test_values_are_rounded_to_the_nearest_code_of_their_block():
    values = draw(5 * BLOCK + 17)
    values[BLOCK : 2 * BLOCK] = 0
    moment = quantise(values, TABLE)
    assert moment.codes.dtype == torch.uint8 and moment.numel() == len(values) and moment.scales.shape == (6,)
    again = moment.read(0, len(values))
    for start in range(0, len(values), BLOCK):
        block = slice(start, start + BLOCK)
        half_a_code = values[block].abs().max() / 255
        assert (again[block] - values[block]).abs().max() <= half_a_code * 1.001
    assert again[BLOCK : 2 * BLOCK].eq(0).all()
    for start, stop in ((0, 1), (255, 257), (300, 1290), (len(values) - 1, len(values)), (512, 512)):
        assert moment.read(start, stop).equal(again[start:stop])


def test_moments_of_bitsandbytes_are_joined_wrapped_or_not():
    moment = quantise(draw(4096), TABLE)
    parts = split_moment("state2", moment)
    assert set(parts) == {"state2", "qmap2", "absmax2"}
    for state in ({"step": 4, **parts}, {"step": 4, WRAPPED: parts}):
        found = join_moments(state)
        assert set(found) == {"step", "state2"} and found["step"] == 4
        assert isinstance(found["state2"], QuantisedMoment) and found["state2"].read(7, 300).equal(moment.read(7, 300))
    small = {"step": 1, WRAPPED: {"state1": torch.ones(8)}}
    assert join_moments(small)["state1"].equal(torch.ones(8))


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return init_ranks()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Saved:
    """Save on one rank and on two ranks after three steps; their resume on the same ranks is exact."""
    folder, made = tmp_path_factory.mktemp("saved"), {}
    for line in run_program("tests/support/eight_bit_updates.py", folder, ranks=2).splitlines():
        if line.startswith("{"):
            found = json.loads(line)
            assert found["resumed"] == found["losses"][3:], found
            made[2, found["stage"]] = folder / str(found["stage"]) / "step-00000003", found["losses"]
    for stage in (*STAGES, RELEASED):
        engine = build_engine(stage, ranks)
        losses = train(engine, range(3), ranks)
        path = save(engine, folder / f"one-{stage}", ranks)
        made[1, stage] = path, losses + train(engine, range(3, 6), ranks)
    return made


@needs_bitsandbytes
def test_losses_are_those_of_adamw_to_eight_bit_on_any_ranks_and_stage(saved: Saved, ranks: Ranks) -> None:
    assert list(check_optimizer(OptimConfig(name="adamw8bit"), EngineConfig())) == []
    exact = train(build_engine(2, ranks, "adamw"), range(6), ranks)
    assert max(exact) - min(exact) > 0.3
    assert saved.keys() == set(product((1, 2), (*STAGES, RELEASED)))
    for key in product((1, 2), STAGES):
        losses = saved[key][1]
        assert losses == pytest.approx(exact, abs=4e-3), key
        assert losses[3:] != exact[3:], f"{key}: the moments are not in 8 bit"
        assert losses == pytest.approx(saved[1, 0][1], abs=1e-3), key


@needs_bitsandbytes
@pytest.mark.parametrize("old", STAGES)
@pytest.mark.parametrize("old_ranks", [1, 2])
def test_other_ranks_and_stages_load_it(saved: Saved, ranks: Ranks, old_ranks: int, old: int) -> None:
    path, losses = saved[old_ranks, old]
    for new in STAGES:
        engine = build_engine(new, ranks)
        engine.load_state(path)
        resumed = train(engine, range(3, 6), ranks)
        assert resumed == pytest.approx(losses[3:], abs=4e-3), new
        if (old_ranks, old) == (1, new):
            assert resumed == losses[3:]
        types = {state["state1"].dtype for state in engine._engine.basic_optimizer.state.values()}
        assert torch.uint8 in types and types <= {torch.uint8, torch.float32}, new


@needs_bitsandbytes
def test_gradient_release_in_bf16_continues_on_other_ranks(saved: Saved, ranks: Ranks) -> None:
    alone, shared = (saved[number, RELEASED][1] for number in (1, 2))
    assert shared == pytest.approx(alone, abs=4e-3) and alone != saved[1, 0][1]
    for number in (1, 2):
        path, losses = saved[number, RELEASED]
        engine = build_engine(RELEASED, ranks)
        engine.load_state(path)
        resumed = train(engine, range(3, 6), ranks)
        assert resumed == (losses[3:] if number == 1 else pytest.approx(losses[3:], abs=4e-3))
        states = engine._engine.basic_optimizer.state
        assert {states[weight]["state1"].dtype for weight in states} == {torch.uint8, torch.float32}


@needs_bitsandbytes
def test_moments_are_kept_value_by_value(saved: Saved, ranks: Ranks, tmp_path: Path) -> None:
    path, _ = saved[2, 2]
    engine = build_engine(0, ranks)
    engine.load_state(path)
    before, after = (SavedState(folder / "state", map_state_file) for folder in (path, save(engine, tmp_path, ranks)))
    for name in ("0.weight", "2.weight", "0.bias"):
        for key in ("state1", "state2"):
            old, new = before.read(name, key), after.read(name, key)
            assert old.abs().max() > 0
            torch.testing.assert_close(new, old, rtol=0.06, atol=old.abs().max().item() * 0.01)
