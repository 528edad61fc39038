"""benchmarks/launches.py: its rules of counting, and the counts of a step of the tiny SDXL, which must not grow."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import ROOT

from sdxl_trainer.launch.signals import exit_on_signals


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("launches")


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("launch_counter")


def test_kernels_are_counted_and_views_are_not(counting: Any) -> None:
    weight, parts = torch.ones(4, 6), [torch.ones(3) for _ in range(129)]
    with counting.LaunchCounter() as counter, counter.phase("forward"):
        weight.view(-1)[3:].unsqueeze(0).expand(2, -1).detach()
        torch.empty(3)
        assert counter.read("forward") == (0, 0)
        (weight.t() + 1).mul_(2)
        assert counter.read("forward") == (2, 0)
        torch.cat(parts)  # 128 tensors a launch
        assert counter.read("forward") == (4, 0)
        torch.nn.functional.conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1), torch.ones(1))
        assert counter.read("forward", part=0).launches == 4 + 3 + 2  # ones, then convolution and bias
        counter.part = 1
        bool(weight.sum() > 1)
        assert counter.read("forward", part=1) == (3, 1)
        weight.tolist()
        assert counter.read("forward", part=1) == (4, 2)


@pytest.mark.parametrize(
    ("sizes", "launches"),
    [
        ([1] * 110, 1),
        ([1] * 111, 2),
        ([65_536 * 320], 1),
        ([65_536 * 320 + 1], 2),
        ([65_536 * 319, 65_537], 2),  # the second tensor fills the first launch, and begins another
        ([65_536 * 320, 1], 2),
        ([0, 1, 0], 1),
    ],
)
def test_lists_of_tensors_take_a_launch_for_each_full_set_of_places(counting: Any, sizes: list, launches: int) -> None:
    assert counting.count_chunked_launches(sizes, 110) == launches


def test_operators_on_lists_have_the_sizes_of_the_real_model(counting: Any) -> None:
    lists = [[torch.ones(2) for _ in range(3)] for _ in range(2)]
    with counting.LaunchCounter(lambda tensor: 65_536 * 160 * tensor.numel()) as counter, counter.phase("update"):
        torch._foreach_add_(lists[0], lists[1])
        assert counter.read("update") == (3, 0)
        torch._foreach_norm(lists[0], 2)
        assert counter.read("update") == (3 + 3 + 2, 0)
        torch._foreach_add_(lists[0], [tensor.bfloat16() for tensor in lists[1]])  # other types: one by one
        assert counter.read("update") == (8 + 3 + 3, 0)
        torch._foreach_copy_(lists[0], [tensor.bfloat16() for tensor in lists[1]])
        assert counter.read("update") == (14 + 3 + 3, 0)
        across = [torch.ones(6)[::2] for _ in range(4)]  # values that lie apart: one by one
        torch._foreach_mul_(across, 2.0)
        assert counter.read("update").launches == 20 + 4 + 4


def test_copies_to_the_device_wait_unless_they_are_pinned_and_do_not_block(counting: Any) -> None:
    given, pinned = torch.ones(3), torch.ones(3)
    with counting.LaunchCounter() as counter, counter.phase("objective"):
        counter.add_host(given)
        counter.add_host(pinned, pinned=True)
        torch.tensor([1.0]) + 2 * given + torch.ones(1)  # the host's own work
        assert counter.read("objective") == (0, 0)
        moved = pinned.to(counting.DEVICE, non_blocking=True)
        assert counter.read("objective") == (1, 0)
        moved.to(counting.DEVICE)
        assert counter.read("objective") == (1, 0)
        pinned.to(counting.DEVICE)
        given.to(counting.DEVICE, non_blocking=True)
        assert counter.read("objective") == (3, 2)
        moved[1:] = torch.tensor([4.0, 5.0])
        moved.add_(torch.zeros(3, device=counting.DEVICE))
        assert counter.read("objective") == (3 + 1 + 2, 3)
    with counting.LaunchCounter() as counter, counter.phase("update"):
        torch.tensor(1.0, device="cpu") + torch.zeros(1)
        assert counter.read("update") == (1 + 2, 1)  # what DeepSpeed makes is on the device


# Case → launches of a micro step beside forward and backward, launches of the update, syncs of both. A lower count is
# progress: lower it here too.
COUNTS = {
    (0, "fp32", 1): (69, 62, 0, 2),
    (0, "bf16", 1): (100, 70, 0, 2),
    (1, "bf16", 1): (114, 40, 0, 2),
    (2, "fp32", 1): (55, 40, 0, 2),
    (2, "bf16", 1): (55, 40, 0, 2),
    (2, "bf16", 1, True): (55, 40, 0, 2),  # loss feedback
}


@pytest.mark.parametrize("case", COUNTS)
def test_a_step_takes_no_more_launches_than_before(launches: Any, tmp_path: Path, case: tuple) -> None:
    (tmp_path / "model").symlink_to(ROOT / "configs" / "tiny")
    with exit_on_signals():  # which takes the run's handlers away again
        run, batches = launches.build_counted_run(tmp_path, launches.Case(*case), 1)
        found = launches.summarise(launches.count_step(run, batches, launches.get_real_sizes(run, 1)))
    names = ("micro_step", "update", "syncs_of_micro_step", "syncs_of_update")
    assert tuple(found[name] for name in names) == COUNTS[case]
    assert found["own_syncs_of_micro_step"] == 0 and found["own_syncs_of_update"] <= 1
