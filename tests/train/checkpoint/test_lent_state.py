"""Optimizer state in host memory is written without a copy, while the next passes run and before the next update."""

import threading
import time
from pathlib import Path

import pytest
import torch

from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.configs.schema import EmaConfig
from sdxl_trainer.launch.distributed import init_ranks
from sdxl_trainer.train.checkpoint.emergency import EmergencySaver
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.checkpoint.writer import CheckpointWriter, count_tensor_bytes
from sdxl_trainer.train.engine.deepspeed_config import BatchSizes
from sdxl_trainer.train.engine.engine import Engine
from sdxl_trainer.train.engine.saved_state import STATE_TAG, SavedState, load_state_file
from sdxl_trainer.train.optim.optimizers import build_optimizer

WIDTH = 64
AVERAGE = EmaConfig(decays=[0.5])


class SlowWriter(CheckpointWriter):
    """A writer that begins to read the files only some time after they were captured."""

    def write_shard(self, files, state) -> Path:
        time.sleep(0.3)
        return super().write_shard(files, state)


def build_engine(stage: int = 2, ema: EmaConfig = AVERAGE) -> Engine:
    """The optimizer is PyTorch's, because DeepSpeed's own CPU optimizer has to be compiled."""
    init_ranks()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH))
    config = EngineConfig(zero_stage=stage, precision="bf16", offload_optimizer=True)
    groups = [{"params": list(net.parameters()), "lr": 0.01, "lr_scale": 1.0}]
    optimizer = build_optimizer(groups, OptimConfig(name="torch.optim.AdamW"), config)
    return Engine(net, optimizer, config, BatchSizes(2, 2, 1), 0.0, ema)


def update(engine: Engine, times: int = 1) -> None:
    for _ in range(times):
        engine.backward(engine(torch.ones(2, WIDTH, dtype=engine.dtype)).float().square().mean())
        assert engine.step()


def build_writer(folder: Path, kind: type[CheckpointWriter] = SlowWriter) -> CheckpointWriter:
    return kind(folder=folder / "checkpoints", rank=0, world_size=1, token="t", keep_last=9)


def list_state(engine: Engine) -> list[torch.Tensor]:
    """Masters, moments and averages of the live engine."""
    optimizer = engine._engine.optimizer.optimizer
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert engine.weights.ema is not None
    averages = [tensor for kept in engine.weights.ema.averages.values() for tensor in kept]
    return [*engine.weights.list_masters(), *moments, *averages]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_state_in_host_memory_is_not_copied(stage: int) -> None:
    """Copied are the 16-bit weights alone: 2 of 18 bytes a weight (masters, two moments, one average)."""
    engine = build_engine(stage)
    update(engine)
    live = {tensor.untyped_storage().data_ptr() for tensor in list_state(engine)}

    def count_copied(lend: bool) -> float:
        files = engine.capture_state(lend=lend)
        engine.release_state()
        copied = [tensor for tensor in list_tensors(files) if tensor.untyped_storage().data_ptr() not in live]
        return count_tensor_bytes(copied) / (2 * WIDTH * (WIDTH + 1))

    assert count_copied(lend=False) == pytest.approx(18 if stage < 3 else 16, abs=0.1)
    # ZeRO-3 has no file of whole 16-bit weights.
    assert count_copied(lend=True) == pytest.approx(2 if stage < 3 else 0, abs=0.1)


def test_the_next_update_waits_until_the_state_is_written(tmp_path: Path) -> None:
    """The checkpoint holds the step at which it was made, and a resume continues as if nothing had been saved."""
    engine, writer = build_engine(), build_writer(tmp_path)
    update(engine, 2)
    expected = [tensor.clone() for tensor in list_state(engine)]
    writer.save(engine, TrainState(step=2, world_size=1))
    update(engine)  # its passes run while the writer waits; its update would change what is still to be written
    assert writer.last_step == 2
    writer.wait()
    resumed = build_engine()
    resumed.load_state(tmp_path / "checkpoints" / "step-00000002")
    for tensor, other in zip(list_state(resumed), expected, strict=True):
        assert tensor.equal(other)
    update(resumed)
    assert all(one.equal(other) for one, other in zip(list_state(resumed), list_state(engine), strict=True))


def test_a_write_that_fails_lets_the_update_start(tmp_path: Path) -> None:
    engine, writer = build_engine(), build_writer(tmp_path)
    update(engine)
    (tmp_path / "checkpoints").touch()  # a file where the folder should be
    writer.save(engine, TrainState(step=1, world_size=1))
    update(engine)
    with pytest.raises(OSError, match="checkpoints"):
        writer.wait()


def test_an_emergency_save_waits_for_the_checkpoint_of_its_step(tmp_path: Path) -> None:
    """A second writer of the same step would write the same files. A later step is written without a copy."""
    engine, writer = build_engine(), build_writer(tmp_path)
    update(engine)
    saver = EmergencySaver(engine, writer, lambda step: TrainState(step=step, world_size=1), None, tmp_path)
    writer.save(engine, TrainState(step=1, world_size=1))
    assert saver.save("planted") is None and writer.last_step == 1
    writer.wait()
    update(engine)
    expected = [tensor.clone() for tensor in list_state(engine)]
    later = EmergencySaver(engine, writer, lambda step: TrainState(step=step, world_size=1), None, tmp_path)
    partial = later.save("planted")
    # The job is ending: no update may start any more, also not after the save.
    blocked = threading.Thread(target=update, args=(engine,), daemon=True)
    blocked.start()
    blocked.join(0.2)
    assert blocked.is_alive() and partial is not None
    saved = SavedState(partial / STATE_TAG, load_state_file)
    held = [*saved.load_shard(0).masters, *list_tensors(saved.load_shard(0).read_state(0))]
    assert all(any(tensor.equal(other) for other in expected) for tensor in held if tensor.dim())
    engine.release_state()
    blocked.join()


def list_tensors(content: object) -> list[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        return [content]
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, (list, tuple)) else ()
    return [tensor for part in parts for tensor in list_tensors(part)]
