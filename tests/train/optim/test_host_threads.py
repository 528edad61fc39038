"""Threads of updates in host memory."""

import os

import torch

from sdxl_trainer.train.optim.host_threads import choose_num_threads, use_threads


def test_an_update_gets_the_rank_s_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for chosen, num_threads in (("", 4), ("1", 4), ("6", 6), ("4,2", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
        assert choose_num_threads() == num_threads
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "99")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert choose_num_threads() == 1


def test_openmp_starts_the_threads():
    before = torch.get_num_threads()
    try:
        use_threads(3)
        torch.ones(2**18).add_(1)
        assert torch.get_num_threads() == 3 and len(os.listdir("/proc/self/task")) >= 3
    finally:
        use_threads(before)
