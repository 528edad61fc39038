"""Optimizers, parameter groups and learning-rate schedules."""

import math
from collections.abc import Callable

import torch

from sdxl_trainer.configs.schema import OptimConfig

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW}


def build_optimizer(model: torch.nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The configured optimizer over a model's trainable parameters, biases and norm weights without decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[config.name](
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps
    )


def compute_lr(step: int, config: OptimConfig, max_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0): a pure function, so a resume needs no scheduler state."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    return config.lr * SCHEDULES[config.schedule](min(1.0, progress))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
