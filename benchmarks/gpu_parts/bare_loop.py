"""A bare training loop at full size: plain PyTorch, without DeepSpeed, data loader, logging or checks."""

from collections.abc import Callable
from typing import Any

import torch

from gpu_parts.devices import Place
from gpu_parts.fit import StepSizes
from gpu_parts.full_size import build_settings, get_batch_file, load_batch, random_weights
from gpu_parts.report import SkippedCase


def build_bare_step(place: Place, sizes: StepSizes) -> Callable[[], None]:
    """Build a step in bf16 with fp32 masters: text encoders, U-Net, loss, backward pass, clipping, fused AdamW.

    It trains on the micro batch that the real step has written.

    Raises:
        SkippedCase: the real step has written none.
    """
    file, device = get_batch_file(place, sizes.micro_batch_size), torch.device(place.device)
    if not file.exists():
        raise SkippedCase("needs the micro batch of the real step, which was not measured")
    networks, conditioner = build_bare_networks(place, sizes, device)
    weights = list(networks.parameters())
    masters = [torch.nn.Parameter(weight.detach().float()) for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=1e-6, fused=True)
    batch = load_batch(file, device)

    def step() -> None:
        noise = torch.randn_like(batch.latents)
        timesteps = torch.randint(0, 1000, (len(noise),), device=device)
        text = conditioner.build_inputs(batch, device)
        prediction = networks((batch.latents + noise).bfloat16(), timesteps, text, batch.time_ids)
        torch.nn.functional.mse_loss(prediction.float(), noise).backward()
        for master, weight in zip(masters, weights, strict=True):
            assert weight.grad is not None, "every weight of the U-Net has a gradient"
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        optimizer.zero_grad(set_to_none=True)

    return step


def build_bare_networks(place: Place, sizes: StepSizes, device: torch.device) -> tuple[Any, Any]:
    """Build the U-Net to train and the text conditioner, in bf16 with random weights."""
    from sdxl_trainer.cache.models.encoders import load_text_encoders
    from sdxl_trainer.cache.models.source import resolve_model
    from sdxl_trainer.train.networks.conditioning import TextConditioner
    from sdxl_trainer.train.networks.trained_networks import TrainedNetworks, load_unet

    config = build_settings(place, "bare", sizes.list_words())
    source = resolve_model(config.model)
    with random_weights():
        unet = load_unet(source, config.engine, device, torch.bfloat16)
        encoders = load_text_encoders(source, config.model, device, torch.bfloat16)
    return TrainedNetworks(unet), TextConditioner(encoders)
