"""Averages in host memory are those on the device, and are updated while the next step runs."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.configs.schema import EmaConfig
from sdxl_trainer.launch.distributed import init_ranks
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.checkpoint.writer import CheckpointWriter
from sdxl_trainer.train.engine import averages
from sdxl_trainer.train.engine.averages import HostUpdates, divide_values
from sdxl_trainer.train.engine.deepspeed_config import BatchSizes
from sdxl_trainer.train.engine.engine import Engine
from sdxl_trainer.train.engine.host_memory import HostMemory
from sdxl_trainer.train.optim.optimizers import build_optimizer

DECAYS, LENGTH = [0.5, 0.9], 0.2
ENGINES = {
    "released": {"zero_stage": 0, "gradient_release": True, "precision": "bf16_stochastic"},
    "ZeRO 0": {"zero_stage": 0, "precision": "fp32"},
    "ZeRO 1": {"zero_stage": 1, "precision": "bf16"},
    "ZeRO 3": {"zero_stage": 3, "precision": "bf16"},
    "offload": {"zero_stage": 2, "precision": "bf16", "offload_optimizer": True, "name": "torch.optim.AdamW"},
}
COMPILED = {"name": "adamw"}  # DeepSpeed's for offloading, which takes minutes to compile
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose averages are on the device")


def build_engine(on_host: bool, device: str = "cpu", name: str = "adamw", **engine: object) -> Engine:
    init_ranks()
    config = EngineConfig.model_validate(engine)
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Linear(9, 3)).to(device)
    optimizer = build_optimizer(
        [{"params": list(net.parameters()), "lr_scale": 1.0}], OptimConfig.model_validate({"name": name}), config
    )
    ema = EmaConfig(decays=DECAYS, lengths=[LENGTH], warmup=False, on_host=on_host)
    return Engine(net, optimizer, config, BatchSizes(4, 4, 1), 0.0, ema)


def train(engine: Engine, steps: range) -> None:
    for step in steps:
        engine.set_lr(0.1)
        inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        engine.backward((engine(inputs.to(engine.device, engine.dtype)).float() - 1).square().mean())
        assert engine.step()


def read_averages(engine: Engine) -> dict[str, torch.Tensor]:
    names = [(name, average) for name in engine.weights.trained_names for average in engine.weights.average_names]
    return {f"{name} {average}": engine.weights.gather(name, average) for name, average in names}


@pytest.mark.parametrize(
    "settings",
    [
        *ENGINES.values(),
        pytest.param(ENGINES["offload"] | COMPILED, marks=pytest.mark.long),
    ],
    ids=[*ENGINES, "offload, compiled"],
)
def test_averages_on_the_host_are_those_on_the_device(settings: dict, tmp_path: Path) -> None:
    plain, host = build_engine(False, **settings), build_engine(True, **settings)
    for engine in (plain, host):
        train(engine, range(3))
    expected = read_averages(plain)
    assert all(value.equal(expected[name]) for name, value in read_averages(host).items())
    writer = CheckpointWriter(folder=tmp_path, rank=0, world_size=1, token="t", keep_last=1)
    writer.save(host, TrainState(step=3, world_size=1))
    train(plain, range(3, 5))
    writer.wait()
    resumed = build_engine(True, **settings)
    resumed.load_state(tmp_path / "step-00000003")
    train(resumed, range(3, 5))
    expected = read_averages(plain)
    assert all(value.equal(expected[name]) for name, value in read_averages(resumed).items())
    assert len({expected[f"0.weight {name}"].sum().item() for name in ("0.5", "0.9", "length-0.2")}) == 3


@NEEDS_GPU
def test_averages_of_a_gpu_are_in_host_memory() -> None:
    settings = ENGINES["released"]
    plain, host = build_engine(False, "cuda", **settings), build_engine(True, "cuda", **settings)
    for engine in (plain, host):
        train(engine, range(3))
    expected = read_averages(plain)
    for name, value in read_averages(host).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
    assert host.weights.ema is not None
    assert all(part.device.type == "cpu" for parts in host.weights.ema.averages.values() for part in parts)


@pytest.mark.parametrize("name", ["released", "ZeRO 1"])
def test_an_update_runs_beside_the_next_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step does not wait for the averages of the step before, and whoever reads them does."""
    plain, engine = build_engine(False, **ENGINES[name]), build_engine(True, **ENGINES[name])
    train(plain, range(2))
    go_on, original, begun = threading.Semaphore(0), averages.get_ema_multi_avg_fn, threading.Event()

    def wait(decay: float):
        begun.set()
        assert go_on.acquire(timeout=30)
        return original(decay)

    monkeypatch.setattr(averages, "get_ema_multi_avg_fn", wait)
    train(engine, range(1))
    assert begun.wait(30)
    # The weights of step 2 replace those that the first update has copied.
    engine.set_lr(0.1)
    inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    engine.backward((engine(inputs.to(engine.dtype)).float() - 1).square().mean())
    ema: Any = engine.weights.ema
    assert not ema._beside._running.done()
    go_on.release(2 * (len(DECAYS) + 1))
    assert engine.step()
    expected = read_averages(plain)
    assert all(value.equal(expected[name]) for name, value in read_averages(engine).items())


@pytest.mark.parametrize("name", ["released", "ZeRO 1"])
def test_weights_change_after_the_averages_have_read_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, engine = build_engine(False, **ENGINES[name]), build_engine(True, **ENGINES[name])
    asked, copy, finish = threading.Event(), HostMemory.copy, HostUpdates.finish_reading

    def copy_late(memory: HostMemory, tensor: torch.Tensor) -> torch.Tensor:
        asked.wait(30)
        time.sleep(0.02)  # in which the weights would change
        return copy(memory, tensor)

    def finish_reading(updates: HostUpdates) -> None:
        asked.set()
        finish(updates)

    train(plain, range(3))
    monkeypatch.setattr(HostMemory, "copy", copy_late)
    monkeypatch.setattr(HostUpdates, "finish_reading", finish_reading)
    for step in range(3):
        asked.clear()
        train(engine, range(step, step + 1))
    asked.set()
    expected = read_averages(plain)
    assert all(value.equal(expected[name]) for name, value in read_averages(engine).items())


def test_an_error_beside_a_step_is_raised_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build_engine(True, **ENGINES["ZeRO 0"])

    def fail(decay: float):
        raise RuntimeError("no averages")

    monkeypatch.setattr(averages, "get_ema_multi_avg_fn", fail)
    with pytest.raises(RuntimeError, match="no averages"):
        train(engine, range(3))


def test_few_weights_are_converted_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averages, "GROUP_VALUES", 10)
    sizes = [3, 7, 1, 25, 4, 6]
    parts = list(divide_values([torch.empty(size) for size in sizes]))
    assert [sizes[part] for part in parts] == [[3, 7], [1], [25], [4, 6]]
