"""Benchmarks on a machine with one GPU: cases that need two are skipped and named."""

import importlib
import json
from typing import Any

import pytest
import torch
from programs import ROOT


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("harness")


@pytest.mark.parametrize(("num_gpus", "num_ranks"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_ranks_are_limited_by_gpus(
    harness: Any, monkeypatch: pytest.MonkeyPatch, num_gpus: int, num_ranks: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert harness.limit_ranks(2) == num_ranks


def test_skipped_measurements_are_named_and_miss_no_target(harness: Any, capsys: pytest.CaptureFixture[str]) -> None:
    results = {"ratio": harness.Figure(1.0, "<=", 1.02), "two_ranks": harness.Skipped("needs 2 GPUs")}
    assert harness.print_result("step", results) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["figures"] == {"ratio": {"value": 1.0, "target": "<= 1.02", "met": True}}
    assert printed["skipped"] == {"two_ranks": "needs 2 GPUs"}


def test_step_skips_cases_that_need_another_gpu(harness: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    step = importlib.import_module("step")
    found = {"ratio": 1.0, "least": 1.0, "most": 1.0, "cpu_ratio": 1.0, "bare": 1.0, "wait": 0.0}
    started: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(step, "make_tiny_set", lambda work: [])
    monkeypatch.setattr(step, "run_script", lambda *words, ranks: started.append(ranks))
    monkeypatch.setattr(step, "measure_on_ranks", lambda script, settings, ranks: started.append(ranks) or found)
    results = step.compare(tmp_path, quick=False)
    assert started == [1, 1, 1, 1]
    assert sorted(name for name, result in results.items() if isinstance(result, harness.Skipped)) == [
        "time_of_bare_deepspeed_bf16_2_ranks",
        "time_of_bare_deepspeed_fp32_2_ranks",
    ]
