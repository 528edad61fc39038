"""The parameters of a generated image: what A1111, Forge, ComfyUI and Civitai read of them."""

import hashlib
import json
import re
from pathlib import Path
from typing import get_args

import pytest
from programs import TINY

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.load import build_config
from sdxl_trainer.configs.samples import SamplerName, ScheduleType
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.train.sampling.parameters import (
    SAMPLER_LABELS,
    SCHEDULE_LABELS,
    DrawnModel,
    describe_image,
    name_model,
    name_step,
)
from sdxl_trainer.train.sampling.prompts import load_prompts

SOURCE = ModelSource(TINY.parent / "sdxl")
A1111_FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def build(*words: str) -> Config:
    config, problems = build_config({"sample": {"prompts": ["a cat: 1, (b:1.2) --n Steps: 3 --d 9"]}}, words)
    assert problems == []
    return config


def describe(config: Config, model: DrawnModel) -> str:
    [prompt], problems = load_prompts(config.sample, config.objective)
    assert problems == []
    return describe_image(prompt, config, model, SOURCE)


def parse(text: str) -> dict[str, str]:
    """Parse the last line as A1111 does."""
    fields = dict(A1111_FIELD.findall(text.splitlines()[-1]))
    return {key: json.loads(value) if value.startswith('"') else value for key, value in fields.items()}


def test_parameters_name_all_that_is_needed_to_draw_the_image() -> None:
    words = ["sample.sampler=dpmpp_2m", "sample.schedule_type=karras", "sample.guidance_rescale=0.7"]
    words += ["objective.prediction=v", "objective.zero_terminal_snr=true", "data.max_tokens=225"]
    words += ["data.caption.weighted=true", "engine.precision=bf16", "model.vae=/models/my, vae.safetensors"]
    assert describe(build(*words), DrawnModel(name="mine", hash="0123456789")) == (
        "a cat: 1, (b:1.2)\nNegative prompt: Steps: 3\n"
        "Steps: 28, Sampler: DPM++ 2M Karras, Schedule type: Karras, CFG scale: 6, Seed: 9, Size: 1024x1024, "
        'Model hash: 0123456789, Model: mine, VAE: "my, vae", Clip skip: 2, RNG: CPU, Noise precision: fp32, '
        "Prediction type: v_prediction, Noise Schedule: Zero Terminal SNR, Guidance rescale: 0.7, "
        "Original size: 1024x1024, Crop: 0x0, Target size: 1024x1024, Max tokens: 225, Emphasis: No norm, "
        "Precision: bf16, VAE precision: fp32"
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {"Sampler": "Euler", "Schedule type": "Normal", "Prediction type": "epsilon", "Emphasis": "None"}),
        (["sample.schedule_type=sgm_uniform"], {"Sampler": "Euler", "Schedule type": "SGM Uniform"}),
        (["sample.sampler=euler_a"], {"Sampler": "Euler a", "Schedule type": "diffusers leading"}),
        (
            ["sample.sampler=ddim", "objective.prediction=v", "objective.zero_terminal_snr=true"],
            {"Sampler": "DDIM", "Schedule type": "diffusers trailing"},
        ),
        (
            ["objective.prediction=flow", "objective.timestep_shift=2.5", "objective.timestep_shift_base_px=2048"],
            {"Prediction type": "flow", "Shift": "1.25"},
        ),
        (["sample.sampler=heun", "objective.prediction=flow"], {"Schedule type": "diffusers even", "Shift": "1"}),
        (["sample.guidance_rescale=0.5", "sample.guidance_scale=1"], {"CFG scale": "1", "Guidance rescale": None}),
        (
            ["model.vae_padding=reflect", "model.vae_scaling_factor=0.5"],
            {"VAE padding": "reflect", "VAE scaling factor": "0.5", "VAE": None},
        ),
        (
            ["model.latents_mean=[1,2,3,4]", "model.latents_std=[1,2,3,4]"],
            {"Latents mean": "[1.0, 2.0, 3.0, 4.0]", "Latents std": "[1.0, 2.0, 3.0, 4.0]"},
        ),
    ],
    ids=str,
)
def test_parameters_follow_the_settings(words: list[str], expected: dict[str, str | None]) -> None:
    fields = parse(describe(build(*words), DrawnModel(name="mine")))
    assert {key: fields.get(key) for key in expected} == expected
    assert "Noise Schedule" not in fields or fields["Prediction type"] == "v_prediction"


def test_a_step_of_a_run_is_named_as_its_exported_file() -> None:
    config = build("run.name=my", "model.path=/models/base.safetensors")
    fields = parse(describe(config, name_step(config, 500, "0.999")))
    named = {key: fields.get(key) for key in ("Model", "LoRA", "Run", "Training step", "Moving average", "Model hash")}
    assert list(named.values()) == ["step-00000500-ema-0.999", None, "my", "500", "0.999", None]
    config = build("run.name=my", "model.path=/models/base.safetensors", "lora.rank=4")
    fields = parse(describe(config, name_step(config, 500, None)))
    assert (fields["Model"], fields["LoRA"]) == ("base", "step-00000500-lora") and "Moving average" not in fields


def test_a_model_file_has_the_hash_that_a1111_and_civitai_show(tmp_path: Path) -> None:
    file = tmp_path / "mine.v2.safetensors"
    file.write_bytes(b"weights")
    assert name_model(str(file)) == DrawnModel(name="mine.v2", hash=hashlib.sha256(b"weights").hexdigest()[:10])
    assert name_model(str(tmp_path)).hash == "" and name_model("owner/model").name == "model"


def test_every_sampler_has_a_label() -> None:
    assert set(SAMPLER_LABELS) == set(get_args(SamplerName)) and set(SCHEDULE_LABELS) == set(get_args(ScheduleType))
    # ComfyUI finds its sampler by these steps from the label.
    assert [SAMPLER_LABELS[name].lower().replace("++", "pp").replace(" ", "_") for name in ("euler", "dpmpp_2m")] == [
        "euler",
        "dpmpp_2m",
    ]
