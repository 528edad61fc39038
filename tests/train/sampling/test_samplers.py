"""Samplers: the steps of k-diffusion on ComfyUI's sigmas, and a perfect model of one latent must generate it."""

import json
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from programs import TINY

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.objective import ObjectiveConfig
from sdxl_trainer.configs.samples import FLOW_SAMPLERS, OWN_SAMPLERS
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.train.objective import diffusion
from sdxl_trainer.train.objective.objective import resolve_latent_statistics
from sdxl_trainer.train.sampling.pipeline import decode_latents, sample_latent
from sdxl_trainer.train.sampling.prompts import Prompt
from sdxl_trainer.train.sampling.samplers import SAMPLERS
from sdxl_trainer.train.sampling.schedulers import build_scheduler, sample_with_scheduler
from sdxl_trainer.train.sampling.sigmas import SCHEDULE_TYPES, build_sigmas, compute_sigmas

SIZE = Size(64, 64)
STEPS = 10
ZERO_SNR = {"prediction": "v", "zero_terminal_snr": True}
OBJECTIVES = [{}, {"prediction": "v"}, ZERO_SNR, {"prediction": "flow"}, {"prediction": "flow", "timestep_shift": 3.0}]

Array = np.ndarray
Sampler = Callable[[Callable[[Array, float], Array], Array, list[float]], Array]


def draw_noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def predict_anything(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """A smooth function of all inputs, in place of a U-Net: errors of a sampler, a sigma or a timestep show."""
    return torch.tanh(1.3 * x + timestep.to(x.dtype) / 300) + 0.3 * x.roll(1, -1)


class Textbook:
    """ComfyUI's sampling in float64, from its equations and those of k-diffusion, for `predict_anything`."""

    def __init__(self, prediction: str = "epsilon", zero_terminal_snr: bool = False, timestep_shift: float = 1.0):
        self.prediction, self.shift = prediction, timestep_shift
        alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
        if zero_terminal_snr:
            roots = np.sqrt(alphas)
            alphas = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
            alphas[-1] = 4.8973451890853435e-08
        self.table = np.sqrt((1 - alphas) / alphas)
        if prediction == "flow":
            self.table = self.shift_time(np.arange(1, 1001) / 1000)

    def shift_time(self, time: Array) -> Array:
        return self.shift * time / (1 + (self.shift - 1) * time)

    def space(self, schedule_type: str, steps: int) -> list[float]:
        largest, smallest = self.table[-1], self.table[0]
        ends = (1000 * largest, 1000 * smallest) if self.prediction == "flow" else (999, 0)
        spaced = {
            "normal": lambda: self.find_sigmas(np.linspace(*ends, steps)),
            "sgm_uniform": lambda: self.find_sigmas(np.linspace(*ends, steps + 1)[:-1]),
            "simple": lambda: self.table[[-(1 + int(step * (1000 / steps))) for step in range(steps)]],
            "karras": lambda: np.linspace(largest ** (1 / 7), smallest ** (1 / 7), steps) ** 7,
            "exponential": lambda: np.exp(np.linspace(np.log(largest), np.log(smallest), steps)),
        }[schedule_type]()
        return [*spaced.tolist(), 0.0]

    def find_sigmas(self, timesteps: Array) -> Array:
        if self.prediction == "flow":
            return self.shift_time(timesteps / 1000)
        return np.exp(np.interp(timesteps, np.arange(1000), np.log(self.table)))

    def denoise(self, x: Array, sigma: float) -> Array:
        is_flow = self.prediction == "flow"
        timestep = 1000 * sigma if is_flow else np.abs(np.log(sigma) - np.log(self.table)).argmin()
        c_in = 1 if is_flow else 1 / (sigma**2 + 1) ** 0.5
        output = predict_anything(torch.from_numpy(x * c_in), torch.tensor([float(timestep)])).numpy()
        if self.prediction == "v":
            return x / (sigma**2 + 1) - output * sigma / (sigma**2 + 1) ** 0.5
        return x - sigma * output

    def sample(self, sampler: Sampler, noise: Array, schedule_type: str, steps: int) -> Array:
        sigmas = self.space(schedule_type, steps)
        start = noise * (sigmas[0] if self.prediction == "flow" else (1 + sigmas[0] ** 2) ** 0.5)
        return sampler(self.denoise, start, sigmas)


def sample_euler_textbook(denoise: Callable[[Array, float], Array], x: Array, sigmas: list[float]) -> Array:
    for number in range(len(sigmas) - 1):
        d = (x - denoise(x, sigmas[number])) / sigmas[number]
        dt = sigmas[number + 1] - sigmas[number]
        x = x + d * dt
    return x


def sample_dpmpp_2m_textbook(denoise: Callable[[Array, float], Array], x: Array, sigmas: list[float]) -> Array:
    times = [math.inf if sigma == 0 else -math.log(sigma) for sigma in sigmas]
    old_denoised = None
    for number in range(len(sigmas) - 1):
        denoised = denoise(x, sigmas[number])
        h = times[number + 1] - times[number]
        if old_denoised is None or sigmas[number + 1] == 0:
            denoised_d = denoised
        else:
            r = (times[number] - times[number - 1]) / h
            denoised_d = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * old_denoised
        x = sigmas[number + 1] / sigmas[number] * x - math.expm1(-h) * denoised_d
        old_denoised = denoised
    return x


TEXTBOOK_SAMPLERS: dict[str, Sampler] = {"euler": sample_euler_textbook, "dpmpp_2m": sample_dpmpp_2m_textbook}


def build_prompt(sampler: str = "euler", schedule_type: str = "normal", steps: int = STEPS, **given) -> Prompt:
    settings = {"width_px": SIZE.width, "height_px": SIZE.height, "guidance_scale": 1.0, "seed": 0, **given}
    return Prompt(
        text="", negative="", sampler=sampler, schedule_type=schedule_type, num_inference_steps=steps, **settings
    )


def sample(objective: ObjectiveConfig, prompt: Prompt, predict, noise: torch.Tensor) -> torch.Tensor:
    """Sample with any sampler, as `ImageGenerator.sample` does."""
    if prompt.sampler in OWN_SAMPLERS:
        return sample_latent(build_sigmas(objective, SIZE), predict, noise, prompt)
    scheduler = build_scheduler(ModelSource(TINY.parent / "sdxl"), objective, prompt.sampler, SIZE)
    return sample_with_scheduler(scheduler, predict, noise, prompt.num_inference_steps, torch.Generator())


@pytest.mark.parametrize("schedule_type", SCHEDULE_TYPES)
@pytest.mark.parametrize("settings", OBJECTIVES, ids=str)
@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_are_those_of_the_textbook(name: str, settings: dict, schedule_type: str) -> None:
    for steps in (1, 7, 27) if schedule_type == "sgm_uniform" else (1, 2, 8, 28):  # no timestep halfway between two
        textbook, objective = Textbook(**settings), ObjectiveConfig(**settings)
        sigmas = compute_sigmas(build_sigmas(objective, SIZE), schedule_type, steps)
        assert sigmas == pytest.approx(textbook.space(schedule_type, steps), rel=2e-5) and len(sigmas) == steps + 1
        expected = textbook.sample(TEXTBOOK_SAMPLERS[name], draw_noise().double().numpy(), schedule_type, steps)
        x0 = sample(objective, build_prompt(name, schedule_type, steps), predict_anything, draw_noise())
        assert x0.dtype == torch.float32 and 0.05 < expected.std() < 30
        np.testing.assert_allclose(x0.numpy(), expected, rtol=0, atol=1e-4, err_msg=f"{steps} steps")


@pytest.mark.parametrize(
    ("settings", "schedule_type", "expected"),
    [
        # get_sigmas and get_sigmas_karras of k-diffusion 0.1.1
        ({}, "normal", [14.61464, 2.918307, 0.932358, 0.029167]),
        ({}, "karras", [14.614643, 3.168605, 0.446919, 0.029167]),
        (ZERO_SNR, "normal", [4518.763672, 3.500933, 0.986897, 0.029167]),
        (ZERO_SNR, "karras", [4518.762695, 485.589355, 18.031828, 0.029167]),
    ],
    ids=str,
)
def test_sigmas_are_those_of_k_diffusion(settings: dict, schedule_type: str, expected: list[float]) -> None:
    sigmas = compute_sigmas(build_sigmas(ObjectiveConfig(**settings), SIZE), schedule_type, 4)
    assert sigmas == pytest.approx([*expected, 0], rel=1e-5)


class PerfectPrediction:
    """A perfect model of one latent, which records its inputs."""

    def __init__(self, objective: ObjectiveConfig, latent: torch.Tensor):
        self.prediction, self.latent = objective.prediction, latent
        self.process = (
            diffusion.FlowProcess()
            if objective.prediction == "flow"
            else diffusion.build_diffusion_process(objective.zero_terminal_snr)
        )
        self.timesteps: list[float] = []
        self.inputs: list[torch.Tensor] = []

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.timesteps.append(float(timestep))
        self.inputs.append(x)
        time = timestep.expand(len(x)) if self.prediction == "flow" else timestep.long().expand(len(x))
        signal, level = self.process.compute_levels(time)
        noise = (x - signal * self.latent) / level
        return diffusion.compute_target(self.prediction, self.latent, noise, signal, level)


@pytest.mark.parametrize(
    ("settings", "sampler", "first", "last"),
    [
        ({}, "euler", 999, 0),
        ({"prediction": "v"}, "dpmpp_2m", 999, 0),
        (ZERO_SNR, "euler", 999, 0),
        (ZERO_SNR, "dpmpp_2m", 999, 0),
        ({"prediction": "flow"}, "euler", 1000, 1),
        ({"prediction": "flow", "timestep_shift": 3.0}, "dpmpp_2m", 1000, 8.9286),  # 0.001 is shifted twice
        ({"prediction": "flow", "timestep_shift": 6.0, "timestep_shift_base_px": 128}, "euler", 1000, 8.9286),
        ({}, "ddim", 901, 1),
        ({"prediction": "v"}, "heun", 901, 1),
        (ZERO_SNR, "unipc", 999, 99),
        ({"prediction": "flow"}, "heun", 1000, 100),
    ],
    ids=str,
)
def test_the_known_latent_is_generated(settings: dict, sampler: str, first: float, last: float) -> None:
    objective = ObjectiveConfig(**settings)
    model = PerfectPrediction(objective, draw_noise(1))
    x0 = sample(objective, build_prompt(sampler), model, draw_noise())
    torch.testing.assert_close(x0, model.latent, rtol=0, atol=2e-3)
    assert len(model.timesteps) == (2 * STEPS - 1 if sampler == "heun" else STEPS)
    assert (model.timesteps[0], model.timesteps[-1]) == (first, pytest.approx(last, abs=1e-3))
    assert model.timesteps == sorted(model.timesteps, reverse=True)
    # The U-Net's inputs have the same scale as in training: noise at the start, the latent at the end.
    assert model.inputs[0].std().item() == pytest.approx(1, abs=0.15)
    signal, level = model.process.compute_levels(torch.tensor([last]).long() if last == 0 else torch.tensor([last]))
    torch.testing.assert_close(model.inputs[-1], signal * model.latent + level * draw_noise(), rtol=0, atol=0.05)


def predict_velocity(std: float, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Return E[n - x0 | x] for latents ~ N(0, std²), along which x shrinks to std·x."""
    s = timestep.double() / 1000
    return (x * (s - (1 - s) * std**2) / ((1 - s) ** 2 * std**2 + s**2)).float()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", FLOW_SAMPLERS)
def test_every_sampler_follows_a_curved_flow_with_its_shift(name: str, shift: float) -> None:
    """With four times the steps the error is about a quarter for Euler, and less for methods of order 2."""
    objective = ObjectiveConfig(prediction="flow", timestep_shift=shift)
    errors = {}
    for steps in (40, 160):
        timesteps: list[float] = []

        def predict(x: torch.Tensor, timestep: torch.Tensor, timesteps: list[float] = timesteps) -> torch.Tensor:
            timesteps.append(float(timestep))
            return predict_velocity(0.5, x, timestep)

        x0 = sample(objective, build_prompt(name, "simple", steps), predict, draw_noise())
        errors[steps] = (x0 - 0.5 * draw_noise()).abs().max().item()
        assert len(timesteps) == {"heun": 2 * steps - 1}.get(name, steps)
        assert timesteps[0] == pytest.approx(1000, abs=1) and timesteps == sorted(timesteps, reverse=True)
        middle = sorted(set(timesteps))[-(steps // 2) - 1]  # half of the way before the shift
        assert middle == pytest.approx(1000 * shift * 0.5 / (1 + (shift - 1) * 0.5), abs=1.5)
    assert errors[40] < 0.13 and errors[160] < errors[40] / (3.5 if name == "euler" else 5), errors


def test_decoding_inverts_the_latent_statistics() -> None:
    own = {"scaling_factor": 1.0, "latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
    vae = AutoencoderKL.from_config(json.loads((TINY / "vae" / "config.json").read_text()))
    vae_latent = draw_noise(1)
    x0 = diffusion.normalize_latents(vae_latent, *resolve_latent_statistics(own))
    decode = partial(decode_latents, vae, statistics=resolve_latent_statistics(own))
    with torch.no_grad():
        pixels = decode(x0)
        torch.testing.assert_close(pixels, vae.decode(vae_latent).sample, rtol=0, atol=5e-3)
        torch.testing.assert_close(decode(x0.bfloat16()), pixels, rtol=0, atol=5e-2)  # decoded in fp32
