"""Learning-rate schedules against those of diffusers, and their warm-up and floor."""

import pytest
import torch
from diffusers.optimization import get_scheduler

from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.train.optim.schedules import compute_lr

STEPS = 40


def list_lrs(**settings) -> list[float]:
    config = OptimConfig(lr=0.5, **settings)
    return [compute_lr(step, config, STEPS) for step in range(STEPS + 1)]


def list_peer_lrs(name: str, **settings) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=STEPS, **settings)
    lrs = []
    for _ in range(STEPS + 1):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return lrs


@pytest.mark.parametrize(
    ("schedule", "settings", "peer", "peer_settings"),
    [
        ("constant", {}, "constant", {}),
        ("linear", {}, "linear", {}),
        ("cosine", {}, "cosine", {}),
        ("cosine_with_restarts", {"num_cycles": 3}, "cosine_with_restarts", {"num_cycles": 3}),
        ("polynomial", {"power": 2.0}, "polynomial", {"power": 2.0}),
    ],
)
def test_schedules_are_those_of_diffusers(schedule, settings, peer, peer_settings):
    # diffusers' polynomial ends at 1e-7 instead of 0.
    assert list_lrs(schedule=schedule, **settings) == pytest.approx(list_peer_lrs(peer, **peer_settings), abs=2e-7)


def test_wsd_is_constant_and_then_falls_along_a_line():
    lrs = list_lrs(schedule="wsd", decay_steps=10)
    assert lrs == pytest.approx([0.5] * 30 + [0.05 * left for left in range(10, -1, -1)])
    with_warmup = list_lrs(schedule="wsd", decay_steps=10, warmup_steps=5)
    assert with_warmup[5:] == pytest.approx(lrs[5:])


def test_warm_up_and_floor():
    lrs = list_lrs(schedule="cosine", warmup_steps=4, min_lr_ratio=0.2)
    assert lrs[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
    assert lrs[-1] == pytest.approx(0.1) and min(lrs[4:]) == lrs[-1]
    assert list_lrs(schedule="polynomial", min_lr_ratio=0.2)[STEPS // 2] == pytest.approx(0.5 * 0.6)
