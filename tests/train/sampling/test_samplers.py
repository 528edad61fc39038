"""Sampling: a perfect model of one latent must generate that latent, with every prediction type."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from programs import TINY

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.objective import ObjectiveConfig
from sdxl_trainer.configs.samples import FLOW_SCHEDULERS
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.train.objective import diffusion
from sdxl_trainer.train.objective.objective import resolve_latent_statistics
from sdxl_trainer.train.sampling.pipeline import build_pipeline, decode_latents
from sdxl_trainer.train.sampling.samplers import FLOW_CLASSES, build_scheduler

STEPS = 10


class PerfectPrediction:
    """A stand-in for a U-Net's forward pass: a perfect model of one latent, which records its inputs."""

    def __init__(self, objective: ObjectiveConfig, latent: torch.Tensor):
        self.prediction, self.latent = objective.prediction, latent
        self.process = (
            diffusion.FlowProcess()
            if objective.prediction == "flow"
            else diffusion.build_diffusion_process(objective.zero_terminal_snr)
        )
        self.timesteps: list[float] = []
        self.inputs: list[torch.Tensor] = []

    def __call__(self, sample: torch.Tensor, timestep: torch.Tensor, **kwargs) -> tuple[torch.Tensor]:
        self.timesteps.append(float(timestep))
        self.inputs.append(sample)
        time = timestep.expand(len(sample)) if self.prediction == "flow" else timestep.long().expand(len(sample))
        signal, level = self.process.compute_levels(time)
        noise = (sample - signal * self.latent) / level
        return (diffusion.compute_target(self.prediction, self.latent, noise, signal, level),)


def build(objective: ObjectiveConfig, scheduler: str = "euler", size: Size = Size(64, 64)):  # noqa: B008
    unet = UNet2DConditionModel.from_config(json.loads((TINY / "unet" / "config.json").read_text()))
    vae = AutoencoderKL.from_config(json.loads((TINY / "vae" / "config.json").read_text()))
    return build_pipeline(unet, vae, build_scheduler(ModelSource(TINY.parent / "sdxl"), objective, scheduler, size))


def generate(pipeline) -> torch.Tensor:
    width = pipeline.unet.config.cross_attention_dim
    pooled = pipeline.unet.add_embedding.linear_1.in_features - 6 * pipeline.unet.config.addition_time_embed_dim
    return pipeline(
        prompt_embeds=torch.zeros(1, 77, width),
        pooled_prompt_embeds=torch.zeros(1, pooled),
        width=64,
        height=64,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images


@pytest.mark.parametrize(
    ("settings", "first", "last"),
    [
        ({}, 901, 1),
        ({"prediction": "v"}, 901, 1),
        ({"prediction": "v", "zero_terminal_snr": True}, 999, 99),
        ({"prediction": "flow"}, 1000, 100),
        ({"prediction": "flow", "timestep_shift": 3.0}, 1000, 250),  # 3·0.1/(1 + 2·0.1)
        ({"prediction": "flow", "timestep_shift": 6.0, "timestep_shift_base_px": 128}, 1000, 250),  # of 64 x 64 px
    ],
    ids=str,
)
def test_the_known_latent_is_generated(settings, first, last):
    objective = ObjectiveConfig(**settings)
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    pipeline = build(objective)
    pipeline.unet.forward = model = PerfectPrediction(objective, latent)
    torch.testing.assert_close(generate(pipeline), latent, rtol=0, atol=2e-3)
    assert (len(model.timesteps), model.timesteps[0], model.timesteps[-1]) == (STEPS, first, pytest.approx(last))
    assert model.timesteps == sorted(model.timesteps, reverse=True)
    # The U-Net's inputs have the same scale as in training: noise at the start, the latent at the end.
    assert model.inputs[0].std().item() == pytest.approx(1, abs=0.15)
    signal, level = model.process.compute_levels(torch.tensor([last]))
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.inputs[-1], signal * latent + level * start, rtol=0, atol=0.05)


def integrate(scheduler, steps: int, std: float) -> tuple[float, list[float]]:
    """Generate from a perfect model of latents ~ N(0, std²), and return the largest error and the timesteps.

    The model predicts E[n - x0 | x] = x·(s - (1 - s)·std²)/((1 - s)²·std² + s²), along which x shrinks to std·x.
    """
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(steps, device="cpu")
    x = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        s = timestep.double() / 1000
        velocity = scheduler.scale_model_input(x, timestep) * (s - (1 - s) * std**2) / ((1 - s) ** 2 * std**2 + s**2)
        x = scheduler.step(velocity.float(), timestep, x, return_dict=False)[0]
    return (x - std * noise).abs().max().item(), scheduler.timesteps.tolist()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", sorted(FLOW_SCHEDULERS))
def test_every_scheduler_follows_a_curved_flow_with_its_shift(name, shift):
    """With twice the steps the error is about half for methods of order 1, and less for those of order 2."""
    objective = ObjectiveConfig(prediction="flow", timestep_shift=shift)
    errors = {}
    for steps in (20, 40):
        scheduler = build_scheduler(ModelSource(TINY.parent / "sdxl"), objective, name, Size(64, 64))
        errors[steps], timesteps = integrate(scheduler, steps, std=0.5)
        assert len(timesteps) == {"heun": 2 * steps - 1}.get(name, steps)
        assert timesteps[0] == pytest.approx(1000, abs=1) and timesteps == sorted(timesteps, reverse=True)
        assert timesteps == pytest.approx((1000 * scheduler.sigmas[:-1]).tolist(), abs=1e-3)  # not rounded
        middle = sorted(set(timesteps))[-(steps // 2) - 1]  # half of the way before the shift
        assert middle == pytest.approx(1000 * shift * 0.5 / (1 + (shift - 1) * 0.5), abs=1.5)
    # diffusers' DPM-Solver++ starts at 0.999 and ends with a step of order 1.
    assert errors[20] < 0.3 and errors[40] < errors[20] / (2.2 if name in ("heun", "unipc") else 1.7), errors
    assert set(FLOW_CLASSES) == set(FLOW_SCHEDULERS)


def test_decoding_inverts_the_latent_statistics():
    own = {"scaling_factor": 1.0, "latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
    vae_latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    x0 = diffusion.normalize_latents(vae_latent, *resolve_latent_statistics(own))
    objective = ObjectiveConfig()
    pipeline = build(objective)
    pipeline.unet.forward = PerfectPrediction(objective, x0)
    with torch.no_grad():
        pixels = decode_latents(pipeline.vae, generate(pipeline), resolve_latent_statistics(own))
        torch.testing.assert_close(pixels, pipeline.vae.decode(vae_latent).sample, rtol=0, atol=5e-3)
        # A U-Net in bf16 passes bf16 latents to the VAE, which is always in fp32.
        bf16_pixels = decode_latents(pipeline.vae, x0.bfloat16(), resolve_latent_statistics(own))
    torch.testing.assert_close(bf16_pixels, pixels, rtol=0, atol=5e-2)
