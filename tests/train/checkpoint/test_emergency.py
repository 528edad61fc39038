"""Emergency save of one rank: at most once, only between updates, without hiding the error that ended the job."""

import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from reshard_ranks import WHOLE, build_engine, train

from sdxl_trainer.configs.problems import FailedError
from sdxl_trainer.launch.distributed import Ranks, init_ranks
from sdxl_trainer.launch.signals import Interrupted
from sdxl_trainer.train.checkpoint import emergency
from sdxl_trainer.train.checkpoint import writer as checkpoint_writer
from sdxl_trainer.train.checkpoint.emergency import EmergencySaver
from sdxl_trainer.train.checkpoint.folder import find_newest_checkpoint, list_checkpoints, recover_partial_checkpoints
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.checkpoint.writer import CheckpointWriter
from sdxl_trainer.train.engine.engine import Engine

FIRST_STEP = 10  # step of the run at which the engine was built


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return init_ranks()


@pytest.fixture
def engine(ranks: Ranks) -> Engine:
    """Build an engine that has completed three steps."""
    engine = build_engine(2, WHOLE, ranks)
    train(engine, ranks, range(3))
    return engine


def build_saver(engine: Engine, folder: Path, export: Callable[[Path], None] | None = None) -> EmergencySaver:
    writer = CheckpointWriter(folder=folder / "checkpoints", rank=0, world_size=1, token="t", keep_last=1)

    def read_state(completed: int) -> TrainState:
        return TrainState(step=FIRST_STEP + completed, world_size=1)

    return EmergencySaver(engine, writer, read_state, export, folder / "models")


def find_step(folder: Path) -> int | None:
    """Return the step from which the next start resumes."""
    recover_partial_checkpoints(folder / "checkpoints")
    found = find_newest_checkpoint(folder / "checkpoints")
    return TrainState.load(found).step if found else None


def write_model(path: Path) -> None:
    assert path.with_suffix(".claim").exists(), "another rank could write the model too"
    path.write_bytes(b"weights")


def test_an_error_is_raised_after_the_state_and_the_weights_are_saved(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="planted"), build_saver(engine, tmp_path, write_model):
        raise KeyError("planted")
    assert find_step(tmp_path) == FIRST_STEP + 3
    assert [path.name for path in (tmp_path / "models").iterdir()] == [
        f"emergency-step-{FIRST_STEP + 3:08d}.safetensors"
    ]


@pytest.mark.parametrize("end", [None, Interrupted(signal.SIGTERM), FailedError("planted")])
def test_a_normal_end_saves_nothing(engine: Engine, tmp_path: Path, end: Exception | None) -> None:
    try:
        with build_saver(engine, tmp_path, write_model):
            if end:
                raise end
    except (Interrupted, FailedError) as error:
        assert error is end
    assert list(tmp_path.iterdir()) == []
    assert signal.set_wakeup_fd(-1) == -1, "signals are still written to the pipe"


def test_weights_halfway_through_an_update_are_not_saved(
    engine: Engine, tmp_path: Path, messages: list[str], monkeypatch
) -> None:
    """Nothing is saved during an update, nor after an error in the middle of one."""
    monkeypatch.setattr(emergency, "DEADLINE_SECONDS", 0.1)
    with engine._guard.update():
        engine._guard.begin_writing()
        assert build_saver(engine, tmp_path).save("planted") is None
    step = engine._engine.optimizer.optimizer.step
    monkeypatch.setattr(engine._engine.optimizer.optimizer, "step", lambda *_: (step(), 1 / 0))
    with pytest.raises(ZeroDivisionError), build_saver(engine, tmp_path):
        train(engine, init_ranks(), range(3, 4))
    assert find_step(tmp_path) is None
    assert len([line for line in messages if "an update is under way" in line]) == 2


def test_a_step_that_is_saved_already_and_a_run_without_steps_are_not_written(
    engine: Engine, ranks, tmp_path: Path, messages
) -> None:
    saver = build_saver(engine, tmp_path, write_model)
    saver._writer.last_step = FIRST_STEP + 3
    assert saver.save("planted") is None and f"step {FIRST_STEP + 3} is saved already" in messages[-1]
    assert build_saver(build_engine(2, WHOLE, ranks), tmp_path, write_model).save("no step yet") is None
    assert not (tmp_path / "models").exists() and find_step(tmp_path) is None


def test_the_current_checkpoint_is_written_first(engine: Engine, tmp_path: Path) -> None:
    saver, order = build_saver(engine, tmp_path), []
    write = saver._writer.write_shard

    def write_slowly(files, state):
        time.sleep(0.3 if state.step == FIRST_STEP + 2 else 0)
        order.append(state.step)
        return write(files, state)

    saver._writer.write_shard = write_slowly
    saver._writer.start_writing(engine.capture_state(), TrainState(step=FIRST_STEP + 2, world_size=1))
    saver.save("planted")
    assert order == [FIRST_STEP + 2, FIRST_STEP + 3] and find_step(tmp_path) == FIRST_STEP + 3


def test_a_checkpoint_that_waits_for_space_is_not_lost_to_a_signal(
    engine: Engine, tmp_path: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the signal comes. The oldest checkpoint makes room, and the process waits on."""
    monkeypatch.setattr(emergency, "DEADLINE_SECONDS", 2.0)  # the rest of the save takes less than its share
    monkeypatch.setattr(checkpoint_writer, "SPACE_POLL_SECONDS", 0.01)
    saver = build_saver(engine, tmp_path)
    writer, usage = saver._writer, shutil.disk_usage(tmp_path)
    writer.keep_last, writer.wait_for_space_seconds = 2, 60.0
    for step in (1, 2):
        writer.start_writing({"a": step}, TrainState(step=step, world_size=1))
        writer.wait()
    # As on a disk that two checkpoints fill.
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: usage._replace(free=0 if len(list_checkpoints(writer.folder)) == 2 else 1 << 40)
    )
    writer.start_writing(engine.capture_state(), TrainState(step=FIRST_STEP + 3, world_size=1))
    while not writer.waits_for_space:
        time.sleep(0.01)
    ends = threading.Thread(target=lambda: messages.append(f"ends by itself: {saver._ends_by_itself()}"))
    ends.start()
    writer.wait()
    saver._done.set()
    ends.join()
    assert "ends by itself: True" in messages and any("waits for disk space; free some" in m for m in messages)
    assert [path.name for path in list_checkpoints(writer.folder)] == ["step-00000002", f"step-{FIRST_STEP + 3:08d}"]


def test_a_disk_that_fills_up_before_the_manifest_is_waited_for(
    engine: Engine, tmp_path: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state fits on the disk, and the manifest does not until space is freed."""
    monkeypatch.setattr(checkpoint_writer, "SPACE_POLL_SECONDS", 0.01)
    seal, failures = checkpoint_writer.seal_checkpoint, [errno.ENOSPC, errno.EDQUOT]

    def seal_once_there_is_space(partial: Path) -> Path | None:
        if failures:
            raise OSError(failures.pop(), "the disk is full")
        return seal(partial)

    monkeypatch.setattr(checkpoint_writer, "seal_checkpoint", seal_once_there_is_space)
    writer = build_saver(engine, tmp_path)._writer
    writer.wait_for_space_seconds = 60.0
    writer.start_writing(engine.capture_state(), TrainState(step=FIRST_STEP + 3, world_size=1))
    writer.wait()
    assert find_step(tmp_path) == FIRST_STEP + 3 and not writer.waits_for_space
    assert sum("waits for space" in message for message in messages) == 1


def test_two_threads_save_once(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second thread waits for the first, so that it does not end the process during the save."""
    monkeypatch.setattr(emergency, "DEADLINE_SECONDS", 3.0)
    saver, entered, proceed = build_saver(engine, tmp_path), threading.Event(), threading.Event()
    capture = engine.capture_state

    def capture_late(**choices):
        entered.set()
        assert proceed.wait(20)
        return capture(**choices)

    monkeypatch.setattr(engine, "capture_state", capture_late)
    results: list[Path | None] = []
    threads = [threading.Thread(target=lambda: results.append(saver.save("planted"))) for _ in range(2)]
    threads[0].start()
    assert entered.wait(20)
    threads[1].start()
    threads[1].join(1.2)  # longer than the wait for an update
    assert threads[1].is_alive() and results == []
    proceed.set()
    for thread in threads:
        thread.join(20)
    assert sorted(map(str, results)) == sorted(["None", str(tmp_path / "checkpoints" / ".step-00000013.t.partial")])
    assert find_step(tmp_path) == FIRST_STEP + 3


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("device error")])
@pytest.mark.parametrize("place", ["shard", "weights"])
def test_a_failing_save_does_not_hide_the_error(
    engine, tmp_path, messages, monkeypatch, fault: Exception, place: str
) -> None:
    def fail(*_, **__):
        raise fault

    saver = build_saver(engine, tmp_path, fail)
    if place == "shard":
        monkeypatch.setattr(engine, "capture_state", fail)
    with pytest.raises(KeyError, match="planted"), saver:
        raise KeyError("planted")
    assert f"the {place} cannot be written: {fault}" in messages[-1]
    assert find_step(tmp_path) == (FIRST_STEP + 3 if place == "weights" else None)
    assert not (tmp_path / "models").exists() or list((tmp_path / "models").iterdir()) == []


def test_a_bug_in_the_save_does_not_keep_the_process_alive(engine, tmp_path, monkeypatch) -> None:
    ends = []
    monkeypatch.setattr(emergency, "DEADLINE_SECONDS", 0.1)
    monkeypatch.setattr(emergency, "exit_at_once", ends.append)
    monkeypatch.setattr(engine, "capture_state", lambda **_: {}["planted"])
    saver = build_saver(engine, tmp_path)
    with pytest.raises(KeyError, match="planted"):
        saver._save_late(signal.SIGTERM)
    assert ends == [signal.SIGTERM]


def test_one_rank_writes_the_model_and_a_start_deletes_leftovers(engine: Engine, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    claim, other = (
        models / "emergency-step-00000013.claim",
        models / ".emergency-step-00000009.safetensors.0123abcd.tmp",
    )
    claim.touch()
    build_saver(engine, tmp_path, write_model).save("another rank writes the model")
    assert list(models.iterdir()) == [claim]
    other.touch()
    with build_saver(engine, tmp_path, write_model):
        assert list(models.iterdir()) == []


@pytest.mark.parametrize("loop_ends", [False, True])
def test_a_signal_gives_the_loop_time_then_saves_without_it(engine: Engine, tmp_path, monkeypatch, loop_ends) -> None:
    """A second thread reads the signal, because the main thread may be blocked in a collective."""
    ends, ended = [], threading.Event()
    monkeypatch.setattr(emergency, "DEADLINE_SECONDS", 1.0)
    monkeypatch.setattr(emergency, "exit_at_once", lambda number: (ends.append(number), ended.set()))
    before = signal.signal(signal.SIGTERM, lambda *_: None), signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with build_saver(engine, tmp_path):
            os.kill(os.getpid(), signal.SIGUSR1)  # not a stop signal
            if not loop_ends:
                assert not ended.wait(0.6)
            os.kill(os.getpid(), signal.SIGTERM)
            assert loop_ends or ended.wait(20)
        assert not loop_ends or not ended.wait(1.0)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGUSR1, before[1])
    assert ends == ([] if loop_ends else [signal.SIGTERM])
    assert find_step(tmp_path) == (None if loop_ends else FIRST_STEP + 3)


def test_there_is_time_before_torchrun_kills() -> None:
    """torchrun kills 30 s after SIGTERM, and the shares of waiting must leave time for writing."""
    waiting = emergency.PATIENCE_SHARE + emergency.CHECKPOINT_SHARE + emergency.UPDATE_SHARE
    assert emergency.DEADLINE_SECONDS <= 25 and waiting <= 0.8
