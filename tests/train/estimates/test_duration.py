"""The doctor's estimate of the duration, which it gives only where it can know it."""

import json
from pathlib import Path

import pytest
from programs import ROOT

from sdxl_trainer.configs.load import build_config
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.train.estimates.duration import count_flops_per_image, describe_duration, read_throughput

SDXL = ROOT / "configs" / "sdxl"
H100, UNKNOWN = ["NVIDIA H100 80GB HBM3"], "the duration is not known before the first steps"


def build(folder: Path, *words: str) -> Config:
    raw = {"run": {"dir": str(folder), "name": "x"}, "model": {"path": str(SDXL)}}
    config, problems = build_config(raw, ["train.global_batch_size=64", *words])
    assert problems == []
    return config


def test_before_a_run_the_flops_of_its_images_decide(tmp_path: Path) -> None:
    """10,000 steps of 64 images of 20.28 TFLOP at 30 % of eight times 989.5 TFLOP/s."""
    text = describe_duration(build(tmp_path, "engine.precision=bf16"), 10_000, 8, H100)
    seconds = 640_000 * 20.2837 / (0.3 * 989.5 * 8)
    assert text.startswith("10,000 steps remain, 640,000 images: about ") and "at 30% of their peak" in text
    assert f"about {seconds // 3600:.0f} h {seconds % 3600 / 60:.0f} min on 8 x NVIDIA H100" in text


@pytest.mark.parametrize(
    ("words", "gpu_names"),
    [
        ([], []),
        ([], ["NVIDIA some other"]),
        (["engine.precision=fp32"], H100),
        (["lora.rank=4"], H100),
        (["optim.groups=[{match: x, lr: 0}]"], H100),
        (["model.path=stabilityai/absent"], H100),
    ],
)
def test_an_unknown_duration_is_reported_as_unknown(tmp_path: Path, words: list[str], gpu_names: list[str]) -> None:
    assert UNKNOWN in describe_duration(build(tmp_path, *words), 10_000, 1, gpu_names)


def test_several_resolutions_count_equally(tmp_path: Path) -> None:
    configs = [build(tmp_path, f"data.resolution_px={px}") for px in ("512", "1024", "[512,1024]")]
    one, other, both = (count_flops_per_image(config.model, config.data) for config in configs)
    assert one and other and both == (one + other) / 2


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
