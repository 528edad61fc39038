"""The parameters that a generated image stores: all that other programs need to draw the image again.

The form is that of A1111, which Forge, ComfyUI and Civitai read too: the prompt, the negative prompt, and a line of
`key: value`. Keys that A1111 knows have its names and values.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.objective import ObjectiveConfig
from sdxl_trainer.configs.samples import OWN_SAMPLERS
from sdxl_trainer.configs.schema import Config, ModelConfig
from sdxl_trainer.data.files import hash_file
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.train.objective.timesteps import resolve_shift
from sdxl_trainer.train.sampling.prompts import Prompt

# A1111's names; those of samplers that it lacks are made like them.
SAMPLER_LABELS = {
    "euler": "Euler",
    "dpmpp_2m": "DPM++ 2M",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm_2": "DPM2",
    "dpm_2_a": "DPM2 a",
    "dpmsingle": "DPM++ 2S",
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "pndm": "PLMS",
    "deis": "DEIS",
    "unipc": "UniPC",
}
SCHEDULE_LABELS = {
    "normal": "Normal",
    "karras": "Karras",
    "exponential": "Exponential",
    "simple": "Simple",
    "sgm_uniform": "SGM Uniform",
}
PREDICTION_LABELS = {"epsilon": "epsilon", "v": "v_prediction", "flow": "flow"}
NUM_HASH_DIGITS = 10  # of a file's SHA-256, as A1111 and Civitai name models
NEEDS_QUOTES = re.compile(r'[,:\n"]')


@dataclass(frozen=True, kw_only=True)
class DrawnModel:
    """The model that draws an image, as other programs know it."""

    name: str  # of its file, without the suffix
    hash: str = ""  # see `hash_model`
    run: str = ""  # the run that trained it
    step: int | None = None  # of the run
    average: str = ""  # decay of the moving average whose weights it has
    is_adapter: bool = False  # the file holds a LoRA for `model.path`


def name_step_file(step: int, is_adapter: bool, average: str | None) -> str:
    """Return the name, without a suffix, of the exported file of a step or of its moving average."""
    return f"step-{step:08d}{'-lora' if is_adapter else ''}{f'-ema-{average}' if average else ''}"


def name_step(config: Config, step: int, average: str | None) -> DrawnModel:
    """Name the model of a run at a step."""
    return DrawnModel(
        name=name_step_file(step, config.lora.rank > 0, average),
        run=config.run.name,
        step=step,
        average=average or "",
        is_adapter=config.lora.rank > 0,
    )


def name_model(path: str) -> DrawnModel:
    """Name a model file, a diffusers folder or a hub id. The file is read once, for its hash."""
    file = Path(path)
    return DrawnModel(name=_get_stem(path), hash=hash_file(file)[:NUM_HASH_DIGITS] if file.is_file() else "")


def describe_image(prompt: Prompt, config: Config, model: DrawnModel, source: ModelSource) -> str:
    """Return the parameters of a generated image.

    Args:
        source: contains the config of the scheduler.
    """
    fields = {
        "Steps": prompt.num_inference_steps,
        **_describe_sampler(prompt, config.objective, source),
        "CFG scale": f"{prompt.guidance_scale:g}",
        "Seed": prompt.seed,
        "Size": f"{prompt.width_px}x{prompt.height_px}",
        **dict(_list_model_fields(config, model)),
        "Clip skip": 2,  # the penultimate layer
        "RNG": "CPU",
        "Noise precision": "fp32",
        **dict(_list_objective_fields(config.objective, prompt)),
        # SDXL's size conditions
        "Original size": f"{prompt.width_px}x{prompt.height_px}",
        "Crop": "0x0",
        "Target size": f"{prompt.width_px}x{prompt.height_px}",
        "Max tokens": config.data.max_tokens,
        "Emphasis": "No norm" if config.data.caption.weighted else "None",  # brackets in the prompt
        "Precision": config.engine.precision,
        "VAE precision": "fp32",
    }
    line = ", ".join(f"{key}: {_quote(str(value))}" for key, value in fields.items())
    return f"{prompt.text}\nNegative prompt: {prompt.negative}\n{line}"


def _describe_sampler(prompt: Prompt, objective: ObjectiveConfig, source: ModelSource) -> dict[str, str]:
    label = SAMPLER_LABELS[prompt.sampler]
    if prompt.sampler in OWN_SAMPLERS:
        # ComfyUI looks for Karras in the sampler's name; A1111 and Forge accept the name with it and without.
        suffix = " Karras" if prompt.schedule_type == "karras" else ""
        return {"Sampler": label + suffix, "Schedule type": SCHEDULE_LABELS[prompt.schedule_type]}
    from sdxl_trainer.train.sampling.schedulers import build_scheduler

    scheduler = build_scheduler(source, objective, prompt.sampler, Size(prompt.width_px, prompt.height_px))
    spacing = scheduler.config.get("timestep_spacing", "even")
    return {"Sampler": label, "Schedule type": f"diffusers {spacing}"}


def _list_model_fields(config: Config, model: DrawnModel) -> Iterator[tuple[str, str | int]]:
    if model.hash:
        yield "Model hash", model.hash
    yield "Model", _get_stem(config.model.path) if model.is_adapter else model.name
    if model.is_adapter:
        yield "LoRA", model.name
    if model.run:
        yield "Run", model.run
    if model.step is not None:
        yield "Training step", model.step
    if model.average:
        yield "Moving average", model.average
    yield from _list_vae_fields(config.model)


def _list_vae_fields(model: ModelConfig) -> Iterator[tuple[str, str]]:
    """Yield what differs from the VAE that the model contains."""
    if model.vae is not None:
        yield "VAE", _get_stem(model.vae)
    for key, value in (
        ("VAE padding", model.vae_padding),
        ("VAE scaling factor", model.vae_scaling_factor),
        ("VAE shift factor", model.vae_shift_factor),
        ("Latents mean", model.latents_mean and list(model.latents_mean)),
        ("Latents std", model.latents_std and list(model.latents_std)),
    ):
        if value is not None:
            yield key, str(value)


def _list_objective_fields(objective: ObjectiveConfig, prompt: Prompt) -> Iterator[tuple[str, str]]:
    yield "Prediction type", PREDICTION_LABELS[objective.prediction]
    if objective.zero_terminal_snr:
        yield "Noise Schedule", "Zero Terminal SNR"
    if objective.prediction == "flow":
        num_pixels = prompt.width_px * prompt.height_px
        yield "Shift", f"{resolve_shift(objective.timestep_shift, objective.timestep_shift_base_px, num_pixels):g}"
    if prompt.guidance_rescale and prompt.guidance_scale > 1:
        yield "Guidance rescale", f"{prompt.guidance_rescale:g}"


def _get_stem(path: str) -> str:
    return Path(path).name.removesuffix(".safetensors")


def _quote(value: str) -> str:
    """Quote a value that would end early, as A1111 does."""
    return json.dumps(value, ensure_ascii=False) if NEEDS_QUOTES.search(value) else value
