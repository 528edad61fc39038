"""Image generation from prompts. No global random state is used."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from loguru import logger
from PIL import Image

from sdxl_trainer.cache.encode.text_encoder import move_tokens
from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.objective import ObjectiveConfig
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.formats.latents import VAE_FACTOR
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.data.text.tokens import Tokenizers, encode_captions
from sdxl_trainer.launch.activity import ACTIVITY
from sdxl_trainer.launch.distributed import Ranks, gather_objects
from sdxl_trainer.launch.signals import BrokenOff
from sdxl_trainer.train.networks.conditioning import TextConditioner, TextEmbeddings
from sdxl_trainer.train.objective.diffusion import LatentStatistics, denormalize_latents
from sdxl_trainer.train.objective.objective import resolve_latent_statistics
from sdxl_trainer.train.sampling.guidance import GuidedPrediction
from sdxl_trainer.train.sampling.prompts import Prompt
from sdxl_trainer.train.sampling.samplers import SAMPLERS
from sdxl_trainer.train.sampling.sigmas import Sigmas, build_sigmas, compute_sigmas

# (x_t [B, C, h, w], timestep) -> the U-Net's prediction in fp32, [B, C, h, w]
Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class ImageGenerator:
    """Image generation with loaded networks."""

    unet: Any
    vae: Any
    conditioner: TextConditioner
    tokenizers: Tokenizers
    source: ModelSource  # contains the config of the scheduler
    objective: ObjectiveConfig
    latent_statistics: LatentStatistics
    max_tokens: int  # longest prompt, as in training
    weighted: bool  # brackets in prompts are weights, as in training
    dtype: torch.dtype  # of the U-Net

    @torch.no_grad()
    def generate(self, prompt: Prompt, break_off_if_stopped: Callable[[], None] = lambda: None) -> Image.Image:
        """Generate one image.

        The initial noise is drawn on the CPU in fp32, as in ComfyUI, so it is equal on every device. The latent stays
        in fp32 between the steps, whatever the precision of the U-Net.

        Args:
            break_off_if_stopped: called after each forward pass of the U-Net; raises to end the work.
        """
        from diffusers.image_processor import VaeImageProcessor

        # Encoding may be a collective, so all ranks encode both texts.
        positive, negative = self._encode(prompt.text), self._encode(prompt.negative)
        predict = GuidedPrediction(
            unet=self.unet,
            dtype=self.dtype,
            positive=positive,
            negative=negative if prompt.guidance_scale > 1 else None,
            size=Size(prompt.width_px, prompt.height_px),
            scale=prompt.guidance_scale,
            rescale=prompt.guidance_rescale,
            break_off_if_stopped=break_off_if_stopped,
        )
        shape = (1, self.unet.config.in_channels, prompt.height_px // VAE_FACTOR, prompt.width_px // VAE_FACTOR)
        x0 = self.sample(predict, shape, prompt)
        pixels = decode_latents(self.vae, x0, self.latent_statistics)
        if not pixels.isfinite().all():
            logger.warning(
                "the image of '{}' is not finite and so black in places: the weights are broken", prompt.text
            )
            pixels = pixels.nan_to_num(-1.0)
        images: Any = VaeImageProcessor().postprocess(pixels)
        return images[0]

    def sample(self, predict: Predict, shape: Sequence[int], prompt: Prompt) -> torch.Tensor:
        """Sample x0 of a shape [1, C, h, w] in fp32, with a prediction for (x_t, timestep)."""
        size = Size(prompt.width_px, prompt.height_px)
        generator = torch.Generator().manual_seed(prompt.seed)
        noise = torch.randn(shape, generator=generator).to(self.unet.device)
        if prompt.sampler in SAMPLERS:
            return sample_latent(build_sigmas(self.objective, size), predict, noise, prompt)
        from sdxl_trainer.train.sampling.schedulers import build_scheduler, sample_with_scheduler

        scheduler = build_scheduler(self.source, self.objective, prompt.sampler, size)
        return sample_with_scheduler(scheduler, predict, noise, prompt.num_inference_steps, generator)

    def encode_in_advance(self, prompts: Sequence[Prompt]) -> None:
        """Encode prompts while nothing else of an image is in memory, if the encoders can be freed afterwards."""
        kept = self.conditioner.kept_prompts
        if kept is None:
            return
        for text in sorted({text for prompt in prompts for text in (prompt.text, prompt.negative)} - kept.keys()):
            kept[text] = TextEmbeddings(*(states.cpu() for states in self._encode(text)))
        self.conditioner.release()

    def _encode(self, text: str) -> TextEmbeddings:
        """Encode a prompt, [1, …], in as many windows of tokens as captions have in training."""
        kept = (self.conditioner.kept_prompts or {}).get(text)
        if kept is not None:
            return TextEmbeddings(*(states.to(self.unet.device) for states in kept))
        num_tokens = max(tokenizer.count_tokens(text, self.weighted) for tokenizer in self.tokenizers)
        if num_tokens > self.max_tokens:
            warn_of_long_prompt(text, num_tokens, self.max_tokens)
        device = next(self.conditioner.encoders.encoder.parameters()).device
        tokens = encode_captions(self.tokenizers, [text], self.max_tokens, self.weighted)
        hidden, pooled = self.conditioner.encode(*move_tokens(tokens, device))
        return TextEmbeddings(hidden.to(self.dtype), pooled.to(self.dtype))


@lru_cache
def warn_of_long_prompt(text: str, num_tokens: int, max_tokens: int) -> None:
    """Log once that the end of a prompt is not read."""
    logger.warning("data.max_tokens = {} cuts off the end of a prompt of {} tokens: {}", max_tokens, num_tokens, text)


def build_image_generator(
    *,
    unet: Any,
    vae: Any,
    conditioner: TextConditioner,
    tokenizers: Tokenizers,
    source: ModelSource,
    config: Config,
    dtype: torch.dtype,
) -> ImageGenerator:
    """Build an image generator from loaded networks and the settings of a run."""
    return ImageGenerator(
        unet=unet,
        vae=vae,
        conditioner=conditioner,
        tokenizers=tokenizers,
        source=source,
        objective=config.objective,
        latent_statistics=resolve_latent_statistics(vae.config),
        max_tokens=config.data.max_tokens,
        weighted=config.data.caption.weighted,
        dtype=dtype,
    )


def sample_latent(sigmas: Sigmas, predict: Predict, noise: torch.Tensor, prompt: Prompt) -> torch.Tensor:
    """Sample x0 from noise, [B, C, h, w] both, with one of `SAMPLERS`."""

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        timestep = sigmas.compute_timestep(torch.tensor([sigma])).to(x.device)
        return sigmas.compute_x0(x, sigma, predict(sigmas.scale_input(x, sigma), timestep))

    visited = compute_sigmas(sigmas, prompt.schedule_type, prompt.num_inference_steps)
    return SAMPLERS[prompt.sampler](denoise, sigmas.scale_noise(noise, visited[0]), visited)


def decode_latents(vae: Any, x0: torch.Tensor, statistics: LatentStatistics) -> torch.Tensor:
    """Decode latents x0 [B, C, h, w] of a U-Net to pixels [B, 3, H, W] from -1 to 1, in the VAE's precision.

    diffusers' pipeline would pass latents in the U-Net's precision, such as bf16, to a VAE in fp32.
    """
    mean, scale = (values.to(x0.device) for values in statistics)
    return vae.decode(denormalize_latents(x0.to(vae.dtype), mean, scale), return_dict=False)[0]


def generate_images(
    generator: ImageGenerator,
    prompts: Sequence[Prompt],
    ranks: Ranks,
    in_lockstep: bool = False,
    break_off_if_stopped: Callable[[], None] = lambda: None,
) -> list[Image.Image]:
    """Generate an image for each prompt, divided among the ranks, and return all images in order on every rank.

    Args:
        in_lockstep: true if forward passes are collectives (see `assign_prompts`).
        break_off_if_stopped: called after each forward pass of the U-Net; raises BrokenOff to end the work.

    Raises:
        BrokenOff: on all ranks, if it was raised on one.
    """
    numbers = assign_prompts(prompts, ranks.rank, ranks.world_size, in_lockstep)
    images: dict[int, Image.Image] | None = {}
    generator.encode_in_advance([prompts[number] for number in numbers])
    try:
        for place, number in enumerate(numbers, 1):
            images[number] = generator.generate(prompts[number], break_off_if_stopped)
            ACTIVITY.note_piece(min(place * ranks.world_size, len(prompts)), len(prompts))
    except BrokenOff:
        images = None
    parts = gather_objects(images)
    if None in parts:
        raise BrokenOff
    of_all_ranks = {number: image for part in parts for number, image in part.items()}
    return [of_all_ranks[number] for number in range(len(prompts))]


def assign_prompts(prompts: Sequence[Prompt], rank: int, world_size: int, in_lockstep: bool) -> list[int]:
    """List the numbers of the prompts that a rank generates.

    Args:
        in_lockstep: true if forward passes are collectives, as under ZeRO-3. All ranks then generate prompts with the
            same number of passes at a time. If such prompts do not divide evenly among the ranks, some are generated
            twice.
    """
    if not in_lockstep:
        return list(range(rank, len(prompts), world_size))
    groups: dict[tuple[int, str], list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault((prompt.num_inference_steps, prompt.sampler), []).append(number)
    return [
        numbers[(rank + start) % len(numbers)]
        for numbers in groups.values()
        for start in range(0, len(numbers), world_size)
    ]
