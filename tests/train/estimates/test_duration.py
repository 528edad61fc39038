"""The doctor's estimate of the duration, which it gives only where it can know it."""

import json
from pathlib import Path

import pytest
from programs import ROOT

from sdxl_trainer.configs.load import build_config
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.train.engine.deepspeed_config import resolve_zero_stage
from sdxl_trainer.train.estimates.duration import describe_duration, estimate_first_step, read_throughput

SDXL = ROOT / "configs" / "sdxl"
H100, UNKNOWN = ["NVIDIA H100 80GB HBM3"], "the duration is not known before the first steps"


def build(folder: Path, *words: str) -> Config:
    raw = {"run": {"dir": str(folder), "name": "x"}, "model": {"path": str(SDXL)}}
    config, problems = build_config(raw, ["train.global_batch_size=64", *words])
    assert problems == []
    return config


def test_before_a_run_the_model_of_a_step_decides(tmp_path: Path) -> None:
    config, _ = resolve_zero_stage(build(tmp_path, "engine.precision=bf16"), 8)
    text, estimate = describe_duration(config, 10_000, 8, 8 * H100), estimate_first_step(config, 8, H100[0])
    assert estimate is not None and {"communication of ranks", "text encoders"} < set(estimate.parts)
    seconds = 10_000 * estimate.seconds
    assert text == (
        f"10,000 steps remain, 640,000 images: about {seconds // 3600:.0f} h {seconds % 3600 / 60:.0f} min on "
        f"8 x {H100[0]}, by an estimate of {estimate.seconds:.3g} s a step, "
        f"{estimate.largest_share:.0%} of it {estimate.largest}"
    )
    # 64 images on 8 GPUs cost 20.28 TFLOP each; the model reaches between a quarter and a half of the peak.
    assert 0.25 < 8 * 20.2837 / 989.5 / estimate.seconds < 0.5
    assert "1 x NVIDIA H100 80GB HBM3, by an estimate of" in describe_duration(
        build(tmp_path, "engine.zero_stage=1", "lora.rank=4"), 10_000, 1, H100
    )


@pytest.mark.parametrize(
    ("words", "gpu_names"),
    [
        ([], []),
        ([], ["NVIDIA some other"]),
        (["engine.precision=fp32"], H100),
        (["optim.groups=[{match: x, lr: 0}]"], H100),
        (["model.path=stabilityai/absent"], H100),
    ],
)
def test_an_unknown_duration_is_reported_as_unknown(tmp_path: Path, words: list[str], gpu_names: list[str]) -> None:
    assert UNKNOWN in describe_duration(build(tmp_path, *words), 10_000, 1, gpu_names)


def test_a_run_with_steps_uses_its_own_speed(tmp_path: Path) -> None:
    logs = tmp_path / "x" / "logs"
    logs.mkdir(parents=True)
    assert read_throughput(logs / "metrics.jsonl") == (0, 0.0)
    lines = [{"step": step, "loss": 1.0, "samples_per_second": 1e-3 if step <= 20 else 16.0} for step in range(1, 121)]
    lines += [{"step": 120, "validation/loss": 1.0}]
    (logs / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_throughput(logs / "metrics.jsonl") == (120, 16.0)  # from the last steps only
    text = describe_duration(build(tmp_path), 1020, 1, H100)
    assert text.startswith("900 steps remain, 57,600 images: 1 h 0 min at 16.0 images/s"), text
    assert describe_duration(build(tmp_path), 120, 1, []) == "all 120 steps are done"
    unknown = describe_duration(build(tmp_path, "train.max_epochs=3"), None, 1, [])
    assert unknown == "the steps of train.max_epochs = 3 are not known before the cache is filled"
