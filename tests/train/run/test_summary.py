"""The table at a run's end: the measured time of a step beside its estimate, on a device whose speed is known."""

import sys
from collections import Counter
from pathlib import Path

import pytest
from programs import ROOT

from sdxl_trainer.configs.language.translate import choose_language, translate
from sdxl_trainer.configs.load import load_config
from sdxl_trainer.train.estimates.gpus import CPU_NAME, GPUS, Gpu
from sdxl_trainer.train.estimates.step_time import estimate_step
from sdxl_trainer.train.run import summary
from sdxl_trainer.train.run.build import build_run
from sdxl_trainer.train.run.job import set_up

sys.path.append(str(ROOT / "benchmarks"))
from gpu_parts.steps import describe_estimate  # noqa: E402

SLOW = Gpu(bf16_tflops=0.1, memory_gbs=10.0, link_gbs=1.0)


def test_the_time_of_a_step_stands_beside_its_estimate(cached_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["run.name=timed", "engine.precision=bf16", "sample.prompts=[]"]
    run, batches = build_run(*set_up(*load_config(cached_folder / "tiny.yaml", words)))
    rows: dict[str, str] = {}
    monkeypatch.setattr(summary, "log_summary", lambda _, found: rows.update(found))
    for seconds in (0.5, 1.5):
        run.progress.update({"loss": 1.0, "step_seconds": seconds, "data_wait_share": 0.0}, 256)
    summary.show_end(run)
    assert "speed" in rows and "time of a step" not in rows  # a CPU is in no table
    monkeypatch.setitem(GPUS, CPU_NAME, SLOW)
    summary.show_end(run)
    areas: Counter[int] = Counter()
    for bucket, count in run.plan.count_samples_by_bucket(0).items():
        areas[(bucket >> 16) * (bucket & 0xFFFF) // 64] += count
    assert sum(areas.values()) == 24 and len(areas) > 1
    estimate = estimate_step(run.config, run.source, 1, SLOW, areas)
    assert estimate is not None
    of_it = f"{estimate.seconds:.3g} s, {estimate.largest_share:.0%} of it {estimate.largest}"
    assert rows["time of a step"] == f"1 s on average of the last 2 steps; the estimate was {of_it}"
    # What a day on a GPU records beside a measured step, here of 2 s.
    recorded = describe_estimate(run, SLOW, 2.0)
    assert sum(recorded["estimated_ms"].values()) == pytest.approx(recorded["estimated_step_ms"])
    assert recorded["step_of_estimate"] == pytest.approx(2000 / recorded["estimated_step_ms"])
    choose_language("zh")
    try:
        of_it = f"{estimate.seconds:.3g} 秒，其中卷积层占 {estimate.largest_share:.0%}"
        assert translate(rows["time of a step"]) == f"1 秒（最近 2 步的平均值）；估计为 {of_it}"
    finally:
        choose_language("en")
    del batches
