"""The objective of a run, built from its settings, its VAE and this rank's device."""

from collections.abc import Mapping
from typing import Any

from sdxl_trainer.configs.schema import Config
from sdxl_trainer.launch.distributed import Ranks
from sdxl_trainer.train.objective.drawn_noise import DrawnNoise
from sdxl_trainer.train.objective.loss_feedback import FeedbackState
from sdxl_trainer.train.objective.objective import Objective, resolve_latent_statistics


def build_objective(config: Config, vae_config: Mapping[str, Any], ranks: Ranks, feedback: FeedbackState) -> Objective:
    """Build the objective for the VAE of the settings, this rank's device and the loss feedback of the run.

    Args:
        vae_config: complete config of the VAE (see `read_vae_config`).
    """
    statistics = resolve_latent_statistics(vae_config)
    drawn_noise = DrawnNoise(pin_memory=ranks.device.type == "cuda") if config.run.noise_device == "cpu" else None
    batch_size = config.train.global_batch_size
    return Objective(config.objective, statistics, batch_size, ranks.device, drawn_noise, feedback)
