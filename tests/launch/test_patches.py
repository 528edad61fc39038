"""What launch/patches.py relies on is still there."""

import inspect
from datetime import timedelta

import pytest
from torch.distributed import distributed_c10d

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
