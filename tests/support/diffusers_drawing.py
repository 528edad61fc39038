"""Images drawn by diffusers' own pipeline, on the noise levels and from the noise of a run's generated images."""

from typing import Any

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler


def draw_with_diffusers(pipeline: Any, prompt: str, seed: int) -> np.ndarray:
    """Draw as the runs of `cached_folder` do: `euler`, `normal`, 4 steps, guidance 3, 128 x 96 px."""
    # With 4 steps, `linspace` visits whole timesteps, as `normal` does.
    scheduler: Any = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="linspace")
    pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)
    # diffusers multiplies noise by sigma for this spacing, ComfyUI and the run by sqrt(1 + sigma²).
    scheduler.set_timesteps(4)
    sigma = scheduler.init_noise_sigma
    noise = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(seed)) * (1 + sigma**2) ** 0.5 / sigma
    image = pipeline(
        prompt,
        negative_prompt="",
        width=128,
        height=96,
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=noise,
    ).images[0]
    return np.asarray(image, np.int16)
