"""Resume is the same command: losses stay equal on other ranks, and changed settings are reported."""

import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from programs import run_program

from sdxl_trainer.configs.problems import UserInputError
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.order.plan import Plan
from sdxl_trainer.launch.distributed import Ranks
from sdxl_trainer.launch.signals import BrokenOff, Interrupted, exit_on_signals
from sdxl_trainer.train.checkpoint.folder import verify_manifest
from sdxl_trainer.train.checkpoint.resume import (
    SettingChange,
    check_progress,
    describe_changes,
    list_changes,
    restore_progress,
)
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.report.metrics import read_metrics
from sdxl_trainer.train.run import interruption
from sdxl_trainer.train.run.interruption import Requests, obey_stop_file
from sdxl_trainer.train.run.loop import is_save_due


def read_losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "logs" / "metrics.jsonl")]


def copy_run(whole: Path, name: str, step: int) -> Path:
    """Copy a run folder as it was when the checkpoint of `step` was the newest."""
    run = whole.parent / name
    folder = Path("checkpoints") / f"step-{step:08d}"
    shutil.copytree(whole / folder, run / folder)
    shutil.copytree(whole / "logs", run / "logs", ignore=shutil.ignore_patterns("tensorboard"))
    return run


def flip_byte(path: Path) -> None:
    """Alter one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x01
    path.write_bytes(content)


def test_a_wrong_byte_in_any_file_of_a_real_checkpoint_is_found(two_ranks: Path, tmp_path: Path) -> None:
    whole = two_ranks / "checkpoints" / "step-00000008"
    names = sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file())
    assert names == [
        "manifest.json",
        *(f"state/layout_rank_{rank:05d}.pt" for rank in range(2)),
        "state/mp_rank_00_model_states.pt",
        *(f"state/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)),
        "trainer_state.json",
    ]
    copy = shutil.copytree(whole, tmp_path / "copy")
    assert verify_manifest(copy) is None
    for name in names:
        flip_byte(copy / name)
        problem = verify_manifest(copy)
        # A flipped digit of a SHA-256 in the manifest is reported for the file of that sum.
        assert problem and (name == "manifest.json" or problem.startswith(name)), name
        shutil.copy(whole / name, copy / name)


@pytest.mark.long
def test_other_numbers_of_ranks_and_other_stages(cached_folder: Path, two_ranks: Path) -> None:
    """2 ranks at ZeRO 2 → 1 rank at ZeRO 3 → 4 ranks at ZeRO 1, against the uninterrupted run on 2 ranks.

    The newest checkpoint has a wrong byte and is renamed.
    """
    run = copy_run(two_ranks, "resharded", step=4)
    newest = run / "checkpoints" / "step-00000008"
    shutil.copytree(two_ranks / "checkpoints" / newest.name, newest)
    flip_byte(newest / "state" / "layout_rank_00001.pt")
    words = ("--cfg", cached_folder / "tiny.yaml", "run.name=resharded", "sample.prompts=[]")
    printed = run_program("train/main.py", *words, "train.max_steps=6", "engine.zero_stage=3")
    assert "step-00000008 is damaged and skipped: state/layout_rank_00001.pt has another SHA-256" in printed
    assert (run / "checkpoints" / "damaged-step-00000008").is_dir()
    assert "of 2 ranks at ZeRO stage 2 is resharded for 1 at stage 3" in printed
    more = ("train.max_steps=8", "train.micro_batch_size=1", "engine.zero_stage=1", "train.max_non_finite_steps=7")
    printed = run_program("train/main.py", *words, *more, ranks=4)
    assert "of 1 rank at ZeRO stage 3 is resharded for 4 at stage 1" in printed
    assert printed.count("settings that alter training have changed") == 1, "not one warning of all ranks together"
    state = TrainState.load(run / "checkpoints" / "step-00000008")
    assert (state.world_size, state.zero_stage) == (4, 1)
    np.testing.assert_allclose(read_losses(run), read_losses(two_ranks)[:8], rtol=0, atol=1e-5)


def build_state(fingerprint: str = "data", **settings: dict) -> TrainState:
    config = Config(**settings).model_dump(mode="json")  # pyright: ignore
    train = config["train"]
    return TrainState(
        seed=config["run"]["seed"],
        global_batch_size=train["global_batch_size"],
        world_size=1,
        index_fingerprint=fingerprint,
        config=config,
    )


def build_plan(num_samples: int = 40, global_batch_size: int = 4) -> Plan:
    return Plan(np.zeros(num_samples, np.int64), global_batch_size, seed=0)


def test_only_changes_that_alter_training_are_listed() -> None:
    old = build_state().config
    new = build_state(
        run={"name": "other", "seed": 3},
        data={
            "num_workers": 7,
            "max_tokens": 150,
            "caption": {"dropout_rate": 0.5},
            "remote_shards": {"copies_dir": "/scratch", "copies_gb": 3.0},
        },
        cache={"batch_size": 9, "posterior": "moments"},
        optim={"lr": 3e-5},
        engine={"zero_stage": 3, "precision": "fp32", "timeout_minutes": 5.0, "deepspeed": {"a": {"b": 1}}},
        train={"max_steps": 7, "micro_batch_size": 2},
        checkpoint={"every_steps": 5},
    ).config
    assert {key: (then, now) for key, then, now in list_changes(old, new)} == {
        "run.seed": (0, 3),
        "data.max_tokens": (75, 150),
        "data.caption.dropout_rate": (0.0, 0.5),
        "cache.posterior": ("sample", "moments"),
        "optim.lr": (1e-5, 3e-5),
        "engine.precision": ("bf16", "fp32"),
    }
    assert list_changes(old, old) == []
    saved, fresh = TrainState(config=old, index_fingerprint="a"), TrainState(config=new, index_fingerprint="b")
    assert describe_changes(saved, saved) == []
    assert describe_changes(saved, fresh)[:2] == ["the data", "run.seed: 0 -> 3"]
    assert str(SettingChange("train.max_steps", 30, None)) == "train.max_steps: 30 -> null"
    assert str(SettingChange("optim.schedule", "cosine", "wsd")) == "optim.schedule: cosine -> wsd"
    # A setting that did not exist when the checkpoint was saved.
    del old["optim"]["weight_decay"]
    assert list_changes(old, build_state().config) == []
    cosine = build_state(optim={"schedule": "cosine"})
    longer = build_state(optim={"schedule": "cosine"}, train={"max_steps": 9})
    assert list_changes(cosine.config, longer.config) == [("train.max_steps", 1000, 9)]


def test_progress_is_restored_under_the_present_settings(messages: list[str]) -> None:
    saved, fresh = build_state(), build_state(optim={"lr": 1.0})
    saved.step, saved.epoch, saved.index, saved.epoch_batches, saved.num_bad = 13, 1, 3, 10, 2
    fresh.world_size, fresh.zero_stage = 4, 3
    state = restore_progress(saved, fresh, build_plan(), "stop")
    assert (state.step, state.epoch, state.index, state.num_bad) == (13, 1, 3, 2)
    assert (state.world_size, state.zero_stage, state.config) == (4, 3, fresh.config)
    assert len(messages) == 1 and "optim.lr: 1e-05 -> 1.0" in messages[0]


def test_changed_data_stop_the_run_or_keep_the_share_of_the_epoch(messages: list[str]) -> None:
    saved, fresh = build_state("old"), build_state("new")
    saved.step, saved.epoch, saved.index, saved.epoch_batches = 16, 1, 6, 10
    with pytest.raises(UserInputError, match="the data have changed since step 16"):
        restore_progress(saved, fresh, build_plan(), "stop")
    state = restore_progress(saved, fresh, build_plan(num_samples=80), "continue")
    assert (state.step, state.epoch, state.index, state.epoch_batches) == (16, 1, 12, 20)
    assert state.index_fingerprint == "new" and "at batch 12 of 20 in epoch 1 instead of 6 of 10" in messages[-1]
    # A position after the end of the epoch, which no saved state has.
    saved.index = 10
    assert (lambda s: (s.epoch, s.index))(restore_progress(saved, fresh, build_plan(), "continue")) == (2, 0)


def test_adapters_of_another_rank_are_refused_before_the_networks_are_loaded() -> None:
    saved, fresh = build_state(lora={"rank": 16}), build_state(lora={"rank": 8})
    saved.step = 76
    with pytest.raises(UserInputError, match="does not fit the adapters of step 76, which have rank 16") as caught:
        restore_progress(saved, fresh, build_plan(), "stop")
    assert caught.value.problems[0].cure == "set it to 16, or set another run.name"
    both = list(check_progress(build_state("old", lora={"rank": 16}), fresh, "stop"))
    assert [problem.key for problem in both] == ["run.on_data_change", "lora.rank"]


@pytest.mark.parametrize(("before", "now", "trained"), [(16, 0, "adapters of rank 16"), (0, 8, "the networks")])
def test_adapters_and_whole_networks_do_not_continue_each_other(before: int, now: int, trained: str) -> None:
    """Neither holds the weights of the other, which would begin anew without a word."""
    [problem] = check_progress(build_state(lora={"rank": before}), build_state(lora={"rank": now}), "stop")
    assert problem.key == "lora.rank" and trained in problem.rule and f"set it to {before}" in problem.cure


def test_another_global_batch_size_keeps_the_share_of_the_epoch(messages: list[str]) -> None:
    saved, fresh = build_state(), build_state(train={"global_batch_size": 8})
    saved.step, saved.epoch, saved.index, saved.epoch_batches = 36, 3, 4, 10
    state = restore_progress(saved, fresh, build_plan(80, 8), "stop")
    assert (state.step, state.epoch, state.index, state.global_batch_size) == (36, 3, 4, 8)
    assert "train.global_batch_size: 4 -> 8" in messages[0] and "train.global_batch_size has changed" in messages[1]


def test_saves_are_due_by_steps_epochs_and_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def list_due(**settings: int) -> list[int]:
        config = Config(checkpoint={"every_steps": 0, **settings})  # pyright: ignore
        run = SimpleNamespace(config=config, state=TrainState())
        due = []
        for step in range(1, 13):
            run.state.step, run.state.epoch = step, step // 3
            if is_save_due(run, (step - 1) // 3):  # pyright: ignore
                due.append(step)
        return due

    assert list_due() == []
    assert list_due(every_steps=5) == [5, 10]
    assert list_due(every_epochs=2) == [6, 12]
    assert list_due(every_steps=4, every_epochs=3) == [4, 8, 9, 12]
    clock = [100.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: clock[0])
    # Restores the signal handlers at its end.
    with exit_on_signals():
        requests = Requests(tmp_path, Ranks(0, 0, 1, None), save_every_minutes=1.5)  # pyright: ignore
        other = Requests(tmp_path, Ranks(1, 1, 2, None), save_every_minutes=1.5)  # pyright: ignore
    collected = []
    for clock[0] in (150.0, 189.0, 190.0, 191.0):
        collected.append(requests.collect().save)
    requests.restart_save_timer()
    clock[0] = 280.0
    assert (*collected, requests.collect().save, other.collect().save) == (False, False, True, True, False, False)


def test_request_files_are_read_once_and_by_rank_0_alone(tmp_path: Path) -> None:
    (tmp_path / "save").touch()
    with exit_on_signals():
        first, other = Requests(tmp_path, Ranks(0, 0, 2, None)), Requests(tmp_path, Ranks(1, 1, 2, None))  # pyright: ignore
    assert other.collect() == (False, False, False) and (tmp_path / "save").exists()
    assert first.collect() == (False, True, False) and not (tmp_path / "save").exists()
    assert first.collect() == (False, False, False)
    (tmp_path / "sample").touch()
    (tmp_path / "save").mkdir()  # no request, and no reason to end a run
    assert other.collect() == (False, False, False) and first.collect() == (False, False, True)
    (tmp_path / "stop").touch()
    assert other.collect() == (False, False, False) and first.collect() == (True, False, False)


def test_a_stop_file_survives_restarts_and_is_deleted_at_the_next_start(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "stop").touch()
    with exit_on_signals():
        requests = Requests(tmp_path, Ranks(0, 0, 1, None))  # pyright: ignore
        (tmp_path / "stop").rename(tmp_path / "later")
        requests.break_off_if_stopped(in_lockstep=False)
        (tmp_path / "later").rename(tmp_path / "stop")
        with pytest.raises(BrokenOff):
            requests.break_off_if_stopped(in_lockstep=False)
        assert requests.collect() == (True, False, False)
    with pytest.raises(Interrupted, match="stopped by the file stop") as request:
        requests.interrupt()
    assert request.value.signal_number == signal.SIGTERM
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(Interrupted, match="stopped by the file stop"):
        obey_stop_file(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    obey_stop_file(tmp_path)
    assert not (tmp_path / "stop").exists()
