"""Every preset that ships goes through a dry run: settings, data, cache, networks and engine, up to the first step."""

from pathlib import Path

import pytest
from conftest import run_program

from sdxl_trainer.configs.load import load_config
from sdxl_trainer.data.demo import draw_demo_set

PRESETS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_says_what_to_change(preset: Path) -> None:
    config, problems = load_config(preset)
    assert problems == [] and config.model.path and config.cache.dir
    assert all(preset.read_text().count(f"# ({number})") == 1 for number in (1, 2, 3))


def test_presets_dry_run(tiny_folder: Path, tmp_path: Path) -> None:
    """With the tiny SDXL in the place of the real one, and a cache of eight pictures that has all that a preset wants:
    text, and mirrored latents."""
    common = [
        f"run.dir={tmp_path / 'runs'}",
        f"model.path={tiny_folder / 'model'}",
        f"data.metadata=[{draw_demo_set(tmp_path / 'data', num_images=8)}]",
        "data.image_dirs=[]",
        *("data.resolution_px=128", "data.min_bucket_px=64", "data.max_bucket_px=256", "data.bucket_step_px=32"),
        "data.num_workers=0",
        f"cache.dir={tmp_path / 'latents'}",
    ]
    words = ["cache", tiny_folder / "tiny.yaml", *common, "cache.text=true", "cache.flip=true"]
    for preset in PRESETS:
        config, _ = load_config(preset)
        words += ["+", "train", preset, "--dry-run", *common]
        if config.validation.share:
            words.append("validation.share=0.2")  # of eight pictures a hundredth is none
        if config.engine.offload_optimizer:
            words.append("optim.name=torch.optim.AdamW")  # DeepSpeed's for the CPU takes a minute to compile
    printed = run_program("tests/several_runs.py", *words)
    assert printed.count(" ranks = ") == len(PRESETS)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {load_config(path)[0].run.name for path in PRESETS}
