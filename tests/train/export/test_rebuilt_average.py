"""Post-hoc EMA: averages stored by a run, and the model of another length that is summed up from them."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from disk_calls import limit_file_size
from programs import run_program
from safetensors import safe_open
from safetensors.torch import load_file

from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.configs.problems import UserInputError
from sdxl_trainer.configs.schema import EmaConfig
from sdxl_trainer.launch.distributed import Ranks, init_ranks
from sdxl_trainer.launch.signals import BrokenOff
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.checkpoint.writer import CheckpointWriter
from sdxl_trainer.train.compare import main as compare
from sdxl_trainer.train.convert import main
from sdxl_trainer.train.engine.deepspeed_config import BatchSizes
from sdxl_trainer.train.engine.engine import Engine
from sdxl_trainer.train.engine.power_profiles import Profile, compute_gamma, compute_power_decay, multiply_profiles
from sdxl_trainer.train.export.average_snapshots import SnapshotWriter, get_snapshot_file, list_snapshots
from sdxl_trainer.train.export.rebuilt_average import rebuild_average
from sdxl_trainer.train.held_out.history import read_histories
from sdxl_trainer.train.held_out.sample_errors import WEIGHTS, get_file, read_sample_errors
from sdxl_trainer.train.optim.optimizers import build_optimizer
from sdxl_trainer.train.scoring.model_validation import check_folders
from sdxl_trainer.train.validate import main as validate

ONE_RANK = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
STEPS, DIRECT = 10, 0.13


def build_engine(ema: EmaConfig, width: int = 9) -> Engine:
    init_ranks()
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(6, width), torch.nn.Linear(width, 3))
    config = EngineConfig.model_validate({"zero_stage": 1, "precision": "bf16"})
    groups = [{"params": list(net.parameters()), "lr_scale": 1.0}]
    return Engine(net, build_optimizer(groups, OptimConfig(), config), config, BatchSizes(4, 4, 1), 0.0, ema)


def train(engine: Engine, steps: Sequence[int], writer: SnapshotWriter | None = None) -> None:
    for step in steps:
        engine.set_lr(0.1)
        inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).to(engine.dtype)
        engine.backward((engine(inputs).float() - 1).square().mean())
        assert engine.step()
        if writer is not None:
            writer.write_due(engine, step, is_last=False)


def save_and_load(engine: Engine, step: int, folder: Path, ema: EmaConfig) -> Engine:
    """Return a new engine that has loaded a checkpoint of another one."""
    writer = CheckpointWriter(folder=folder, rank=0, world_size=1, token="t", keep_last=9)
    writer.save(engine, TrainState(step=step, world_size=1))
    writer.wait()
    resumed = build_engine(ema)
    resumed.load_state(folder / f"step-{step:08d}")
    return resumed


@pytest.fixture(scope="module")
def run(cached_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps three lengths, and stores them after each step. Its last validation has all of them."""
    folder = tmp_path_factory.mktemp("post-hoc")
    words = (f"run.dir={folder}", "run.name=run", f"train.max_steps={STEPS}", "checkpoint.every_steps=0")
    ema = (f"ema.lengths=[0.05,0.1,{DIRECT}]", "ema.snapshot_every_steps=1", "ema.snapshot_dtype=fp32")
    validation = ("validation.share=0.2", "validation.every_steps=0", "validation.timesteps_per_sample=1")
    run_program("train/main.py", "--cfg", cached_folder / "tiny.yaml", *words, *ema, *validation, "sample.prompts=[]")
    return folder / "run"


@pytest.fixture(scope="module")
def two_lengths(run: Path) -> Path:
    """The run without what it stored of the third length, and of every second step."""
    folder = run.parent / "two-lengths"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("*-length-0.13.safetensors", "step-*[13579]-length*"))
    return folder


def read_all(file: Path, names: Sequence[str] = ()) -> torch.Tensor:
    """All values of a file in fp64, in the order of the names, or those of some names."""
    tensors = load_file(file)
    return torch.cat([tensors[name].flatten().double() for name in names or sorted(tensors)])


def test_a_kept_length_is_rebuilt_exactly(run: Path, tmp_path: Path) -> None:
    for length in (0.05, DIRECT):
        rebuilt, kept = tmp_path / f"rebuilt-{length}.safetensors", tmp_path / f"kept-{length}.safetensors"
        assert main([str(run), str(rebuilt), "--ema-length", str(length)]) == 0
        assert main([str(run), str(kept), "--ema", f"length-{length}"]) == 0
        np.testing.assert_allclose(read_all(rebuilt), read_all(kept), rtol=1e-6, atol=1e-7)
    with safe_open(tmp_path / f"rebuilt-{DIRECT}.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["sdxl_trainer.ema_length"], metadata["sdxl_trainer.step"]) == ("0.13", str(STEPS))
    assert metadata["modelspec.title"] == "run" and float(metadata["sdxl_trainer.ema_residual"]) < 1e-6


def test_another_length_is_near_the_average_that_was_kept(run: Path, two_lengths: Path) -> None:
    """As near as the profiles say, with the weights after each step recovered from the stored averages."""
    rebuilt = rebuild_average(two_lengths, DIRECT)
    assert [s.facts.step for s in rebuilt.snapshots] == [step for step in range(2, STEPS + 1, 2) for _ in range(2)]
    names = sorted(rebuilt.snapshots[0].shapes)[:60]
    opened = rebuilt.open_weights()
    weights = torch.cat([opened[name]().flatten().double() for name in names])
    averages = [read_all(get_snapshot_file(run, step, DIRECT), names) for step in range(1, STEPS + 1)]
    decays = [compute_power_decay(step, compute_gamma(DIRECT)) for step in range(2, STEPS + 1)]
    steps = zip(averages[1:], averages, decays, strict=False)
    after_steps = [averages[0], *((now - decay * before) / (1 - decay) for now, before, decay in steps)]
    change = math.sqrt(sum(float((after - after_steps[-1]).square().sum()) for after in after_steps))
    wanted = Profile(STEPS, DIRECT)
    norm = rebuilt.fit.residual * math.sqrt(float(multiply_profiles([wanted], [wanted])[0, 0]))
    error = float((weights - averages[-1]).norm())
    assert 0.005 < rebuilt.fit.residual < 0.1 and 0 < error <= norm * change
    between = float((read_all(get_snapshot_file(run, STEPS, 0.1), names) - averages[-1]).norm())
    assert error < between / 5


def test_a_model_at_an_earlier_step(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "early.safetensors"
    assert main([str(run), str(target), "--ema-length", "0.1", "--step", "7", "--dtype", "bf16"]) == 0
    weight = load_file(target)["model.diffusion_model.input_blocks.0.0.weight"]
    assert weight.equal(load_file(get_snapshot_file(run, 7, 0.1))["unet.conv_in.weight"].bfloat16())


def test_validation_has_every_length(run: Path) -> None:
    assert set(read_sample_errors(get_file(run, STEPS)).columns["average"]) == {
        *("weights", "length-0.05", "length-0.1", "length-0.13")
    }
    assert not list((run / "models").glob("*ema*"))
    (line,) = (
        x for x in (run / "logs" / "train.log").read_text().splitlines() if f"step {STEPS}: validation loss" in x
    )
    assert all(f"with EMA length-{length:g}" in line for length in (0.05, 0.1, DIRECT))


def test_a_rebuilt_model_is_validated_as_the_run_validates_and_compared(
    run: Path, cached_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, out = tmp_path / "m.safetensors", tmp_path / "run-ema"
    assert main([str(run), str(model), "--ema-length", str(DIRECT)]) == 0
    assert validate([str(model), "--run", str(run), "--out", str(out)]) == 0
    printed = capsys.readouterr().err
    assert f"x0 error {float(read_histories({0: get_file(out, STEPS)}).by_average[WEIGHTS].means[-1]):.5f}" in printed
    assert "starting: " not in printed and "training runs" not in printed
    own, found = (read_sample_errors(get_file(folder, STEPS)) for folder in (run, out))
    assert found.facts == own.facts
    chosen = own.columns["average"] == f"length-{DIRECT}"
    for name, values in found.columns.items():
        if name != "average":
            kept = own.columns[name][chosen]
            if values.dtype.kind == "f":
                np.testing.assert_allclose(values, kept, rtol=1e-5, err_msg=name)
            else:
                assert values.tolist() == kept.tolist()
    capsys.readouterr()
    assert compare([str(run), str(out), "--json"]) == 0
    assert "validated.model=EMA 0.13" in capsys.readouterr().out
    # A result is written again only if asked to, and no run is written over.
    assert validate([str(model), "--run", str(run), "--out", str(out)]) == 2
    assert "holds a result already" in " ".join(capsys.readouterr().err.split())
    assert list(check_folders(run, out, overwrite=True)) == []
    assert validate([str(model), "--run", str(run), "--out", str(run)]) == 2
    assert "is no result of a validation" in " ".join(capsys.readouterr().err.split())


def test_snapshots_are_the_same_on_any_number_of_ranks(validated: dict[int, Path]) -> None:
    one, two = (list_snapshots(validated[ranks]) for ranks in (1, 2))
    assert [snapshot.facts for snapshot in one] == [snapshot.facts for snapshot in two]
    assert [(s.facts.step, s.facts.updates, s.facts.joined) for s in one] == [(1, 1, 0), (2, 2, 0)]
    before, after = (read_all(snapshot.file) for snapshot in one)
    for first, second in zip((before, after), two, strict=True):  # trained weights agree only to rounding
        assert float((first - read_all(second.file)).norm()) < 1e-3 * float((after - before).norm())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--ema-length", "0.4"], "must be above 0 and at most 0.28"),
        (["--ema-length", "0"], "must be above 0"),
        (["--ema-length", "nan"], "must be above 0"),
        (["--ema-length", "0.1", "--step", "99"], "has no snapshot cure: give one of 2, 4, 6, 8, 10"),
        (["--ema-length", "0.01"], "is out of reach of these snapshots"),
        (["--step", "2"], "needs --ema-length"),
        (["--ema-length", "0.1", "--ema", "0.9"], "cannot be combined"),
    ],
)
def test_what_is_out_of_reach_is_refused(
    two_lengths: Path, tmp_path: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture
) -> None:
    assert main([str(two_lengths), str(tmp_path / "m.safetensors"), *words]) == 2
    assert expected in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "m.safetensors").exists()


def test_the_nearest_lengths_within_reach_are_named_and_are_within(two_lengths: Path) -> None:
    for length in (0.01, 0.28):
        with pytest.raises(UserInputError) as raised:
            rebuild_average(two_lengths, length)
        named = float(raised.value.problems[0].cure.removeprefix("give "))
        assert rebuild_average(two_lengths, named).fit.residual < 0.11


def test_a_run_without_snapshots_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for source in (tmp_path, tmp_path / "absent"):
        assert main([str(source), str(tmp_path / "m.safetensors"), "--ema-length", "0.1"]) == 2
        assert "has none" in " ".join(capsys.readouterr().err.split())


def test_a_model_that_cannot_be_validated_is_refused(
    run: Path, cached_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, model = ["--out", str(tmp_path / "out")], str(cached_folder / "model")
    for words, expected in (
        ([str(tmp_path / "m.safetensors"), "--run", str(run)], "is neither a file nor a folder"),
        ([model, "--run", str(tmp_path)], "is not a run folder"),
        ([str(run), "--run", str(run)], f"convert it first: python train/convert.py {run}"),
        ([model, "--run", str(run), "objective.prediction=v"], "predicts epsilon, and the run v"),
        ([model, "--run", str(run), "validation.share=0"], "holds no samples out of training"),
    ):
        assert validate([*words, *out]) == 2
        assert expected in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_a_torn_snapshot_is_skipped_and_a_full_disk_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ema = EmaConfig(lengths=[0.1, 0.2], snapshot_every_steps=2)
    engine, writer = build_engine(ema, width=3000), SnapshotWriter(tmp_path, ema, ONE_RANK, 0)
    gathered, gather = [], engine.weights.gather
    monkeypatch.setattr(engine.weights, "gather", lambda name, average: gathered.append(name) or gather(name, average))
    with limit_file_size(300):
        train(engine, range(1, 3), writer)
    assert not list((tmp_path / "snapshots").iterdir())
    assert gathered == 2 * engine.weights.trained_names  # other ranks take part in every gather
    writer.write_due(engine, 2, is_last=False)  # as the next start at this step does
    train(engine, range(3, 6), writer)
    writer.write_due(engine, 5, is_last=True)
    found = [(snapshot.facts.step, snapshot.facts.length) for snapshot in list_snapshots(tmp_path)]
    assert found == [(step, length) for step in (2, 4, 5) for length in (0.1, 0.2)]
    file = get_snapshot_file(tmp_path, 4, 0.1)
    file.write_bytes(file.read_bytes()[:-1])
    get_snapshot_file(tmp_path, 5, 0.1).write_bytes(b"")
    (tmp_path / "snapshots" / "step-00000009-foreign.safetensors").write_bytes(
        get_snapshot_file(tmp_path, 2, 0.1).read_bytes().replace(b"sdxl_trainer.snapshot", b"sdxl_trainer.snapshoT")
    )
    left = [(snapshot.facts.step, snapshot.facts.length) for snapshot in list_snapshots(tmp_path)]
    assert left == [(2, 0.1), (2, 0.2), (4, 0.2), (5, 0.2)]


def test_a_stop_leaves_no_half_snapshot(tmp_path: Path) -> None:
    ema = EmaConfig(lengths=[0.1], snapshot_every_steps=1)
    engine, writer, calls = build_engine(ema), SnapshotWriter(tmp_path, ema, ONE_RANK, 0), []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise BrokenOff

    train(engine, [1])
    with pytest.raises(BrokenOff):
        writer.write_due(engine, 1, False, stop)
    assert not list((tmp_path / "snapshots").iterdir())


def test_snapshots_of_a_lost_future_are_deleted(tmp_path: Path) -> None:
    ema = EmaConfig(lengths=[0.1], snapshot_every_steps=2)
    engine = build_engine(ema)
    train(engine, range(1, 4), SnapshotWriter(tmp_path, ema, ONE_RANK, 0))
    resumed = save_and_load(engine, 3, tmp_path / "checkpoints", ema)
    train(engine, range(4, 9), SnapshotWriter(tmp_path, ema, ONE_RANK, 3))
    assert [snapshot.facts.step for snapshot in list_snapshots(tmp_path)] == [2, 4, 6, 8]
    # The job ended without a checkpoint. The next one begins at step 3 with other settings.
    seldom = ema.model_copy(update={"snapshot_every_steps": 5})
    train(resumed, range(4, 6), SnapshotWriter(tmp_path, seldom, ONE_RANK, 3))
    assert [snapshot.facts.step for snapshot in list_snapshots(tmp_path)] == [2, 5]
    assert rebuild_average(tmp_path, 0.1).fit.residual < 1e-6


def test_a_length_that_is_added_later_counts_once_its_first_weights_do_not(tmp_path: Path) -> None:
    first = EmaConfig(lengths=[0.1], snapshot_every_steps=1)
    both = EmaConfig(lengths=[0.1, 0.05], snapshot_every_steps=1)
    engine = build_engine(first)
    train(engine, range(1, 5), SnapshotWriter(tmp_path, first, ONE_RANK, 0))
    resumed = save_and_load(engine, 4, tmp_path / "checkpoints", both)
    train(resumed, range(5, 9), SnapshotWriter(tmp_path, both, ONE_RANK, 4))
    facts = {(s.facts.step, s.facts.length): s.facts for s in list_snapshots(tmp_path)}
    assert facts[8, 0.05].joined == 4 and facts[8, 0.1].joined == facts[8, 0.1].first_step == 0
    # (4/t)^17.97 is 1e-3 at t = 5.9.
    used = {(s.facts.step, s.facts.length) for s in rebuild_average(tmp_path, 0.07).snapshots}
    assert used == {(step, 0.1) for step in range(1, 9)} | {(step, 0.05) for step in (6, 7, 8)}
    assert {s.facts.step for s in rebuild_average(tmp_path, 0.1, 6).snapshots} == set(range(1, 7))
    with pytest.raises(UserInputError, match="--ema-length"):
        rebuild_average(tmp_path, 0.03, 5)


def test_the_clock_starts_with_the_first_length(tmp_path: Path) -> None:
    """Snapshots of averages that were given up in between are not mixed with those of a new start."""
    lengths, none = EmaConfig(lengths=[0.1], snapshot_every_steps=1), EmaConfig(decays=[0.5])
    engine = build_engine(lengths)
    train(engine, range(1, 3), SnapshotWriter(tmp_path, lengths, ONE_RANK, 0))
    without = save_and_load(engine, 2, tmp_path / "checkpoints", none)
    train(without, range(3, 5))
    again = save_and_load(without, 4, tmp_path / "checkpoints", lengths)
    train(again, range(5, 7), SnapshotWriter(tmp_path, lengths, ONE_RANK, 4))
    used = rebuild_average(tmp_path, 0.1).snapshots
    assert [(s.facts.step, s.facts.updates, s.facts.first_step) for s in used] == [(5, 1, 4), (6, 2, 4)]
    first = load_file(get_snapshot_file(tmp_path, 5, 0.1))
    train(without, range(5, 6))
    for name, value in first.items():
        assert value.equal(without.weights.gather(name).half())
