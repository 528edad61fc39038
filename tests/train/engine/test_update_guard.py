"""Saves may run until the first weight is changed, at every ZeRO stage, and do not wait for a blocked device."""

import threading

import pytest
import torch

from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.launch.distributed import init_ranks
from sdxl_trainer.train.engine.deepspeed_config import BatchSizes
from sdxl_trainer.train.engine.engine import Engine
from sdxl_trainer.train.engine.update_guard import UpdateGuard


def build_engine(stage: int, precision: str) -> Engine:
    init_ranks()
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 3))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    return Engine(net, optimizer, EngineConfig(zero_stage=stage, precision=precision), BatchSizes(4, 4, 1), 1.0)


def train(engine: Engine, num_steps: int) -> None:
    for step in range(num_steps):
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(engine.dtype)
        engine.backward((engine(inputs).float() - 1.0).square().mean())
        engine.step()


def gather(engine: Engine) -> torch.Tensor:
    return torch.cat([engine.weights.gather(name).flatten() for name in engine.weights.trained_names])


def read_completed(engine: Engine) -> int | None:
    """Return what a save from another thread would get."""
    with engine.hold_updates(0.0) as completed:
        return completed


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")])
def test_a_save_is_refused_only_from_the_first_change_to_the_end_of_the_step(stage: int, precision: str) -> None:
    engine = build_engine(stage, precision)
    train(engine, 2)
    before, optimizer = gather(engine), engine._engine.optimizer
    seen, step, inner = [], optimizer.step, engine._engine.basic_optimizer

    def step_and_look(*arguments, **named):
        seen.append(("norm", read_completed(engine)))
        assert torch.equal(gather(engine), before)
        step(*arguments, **named)
        seen.append(("end", read_completed(engine)))

    optimizer.step = step_and_look
    hook = inner.register_step_post_hook(lambda *_: seen.append(("update", read_completed(engine))))
    train(engine, 1)
    hook.remove()
    assert seen[0] == ("norm", 2) and seen[-1] == ("end", None)
    assert {look for look in seen[1:-1]} == {("update", None)}
    assert read_completed(engine) == engine.completed_steps == 3


def test_an_update_waits_for_a_save(monkeypatch) -> None:
    guard, order = UpdateGuard(torch.device("cpu")), []

    def update() -> None:
        with guard.update():
            guard.begin_writing()
            order.append("updated")

    with guard.hold(0.0) as completed:
        thread = threading.Thread(target=update)
        thread.start()
        thread.join(0.2)
        order.append("saved")
    thread.join(20)
    assert completed == 0 and order == ["saved", "updated"] and guard.completed_steps == 1


def test_a_thread_that_saves_chooses_the_device_of_its_rank(monkeypatch) -> None:
    """PyTorch's choice of a device holds for one thread; another one would use the memory of the first GPU."""
    chosen, guard = [], UpdateGuard(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append((threading.get_ident(), device)))
    with guard.hold(0.0):
        assert chosen == []
    guard.mark._device = torch.device("cuda", 1)

    def save() -> None:
        with guard.hold(0.0) as completed:
            assert completed == 0

    thread = threading.Thread(target=save)
    thread.start()
    thread.join(20)
    assert chosen == [(thread.ident, torch.device("cuda", 1))]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose default stream it blocks")
def test_a_copy_beside_a_blocked_default_stream() -> None:
    """As while a collective hangs: work that was started after the update blocks the default stream."""
    device = torch.device("cuda", 0)
    guard, weights, copies = UpdateGuard(device), torch.zeros(1 << 20, device=device), []
    with guard.update():
        guard.begin_writing()
        weights += 3
    torch.cuda.synchronize()
    blocked = torch.cuda.Event()
    torch.cuda._sleep(20_000_000_000)  # about 10 s
    blocked.record()

    def save() -> None:
        with guard.hold(5.0) as completed:
            copies.append((completed, weights.to("cpu", copy=True)))

    thread = threading.Thread(target=save)
    thread.start()
    thread.join(5)
    assert not thread.is_alive() and not blocked.query(), "the copy waited for the default stream"
    [(completed, copy)] = copies
    assert completed == 1 and torch.equal(copy, torch.full((1 << 20,), 3.0))
    # An update that the device has not executed is not saved.
    with guard.update():
        guard.begin_writing()
        weights += 1
    with guard.hold(0.2) as completed:
        assert completed is None
    torch.cuda.synchronize()
    with guard.hold(0.2) as completed:
        assert completed == 2
