"""What launch/patches.py relies on is still there."""

import inspect
import signal
from datetime import timedelta

import pytest
from torch.distributed import distributed_c10d
from torch.distributed.elastic.multiprocessing import api

from sdxl_trainer.launch import patches


def test_groups_without_a_timeout_get_the_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(distributed_c10d, name, getattr(distributed_c10d, name))  # restored after the test
    patches.set_default_timeout(timedelta(seconds=77))
    assert distributed_c10d._get_default_timeout("gloo") == timedelta(seconds=77)
    assert distributed_c10d._get_default_timeout("nccl") == timedelta(seconds=77)


def test_deepspeed_still_makes_groups_without_a_timeout_and_forgets_them() -> None:
    comm = pytest.importorskip("deepspeed.comm")
    assert list(inspect.signature(comm.destroy_process_group).parameters) == ["group"]
    assert callable(comm.is_initialized)
    assert "timeout" not in inspect.signature(comm.new_group).parameters


def test_torchrun_acts_on_a_signal_that_comes_twice_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the terminal and from the script: the ranks would be ended by SIGTERM instead of SIGINT."""
    now = [50.0]
    monkeypatch.setattr(patches.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(api, "_terminate_process_handler", api._terminate_process_handler)  # restored after the test
    patches.ignore_repeated_signals()
    assert "_terminate_process_handler)" in inspect.getsource(api.PContext.start)  # looked up when it is set
    with pytest.raises(api.SignalException, match="got signal: 2"):
        api._terminate_process_handler(signal.SIGINT, None)
    now[0] += 0.9
    api._terminate_process_handler(signal.SIGINT, None)
    now[0] += 0.2
    with pytest.raises(api.SignalException):
        api._terminate_process_handler(signal.SIGINT, None)
