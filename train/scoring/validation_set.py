"""The validation set of a run, opened for a model of another file."""

from sdxl_trainer.cache.encode.on_the_fly import build_missing_latent_encoder
from sdxl_trainer.cache.models.encoders import load_tokenizers
from sdxl_trainer.cache.models.model_pair import resolve_pair
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.loading.loader import build_dataset
from sdxl_trainer.data.text.strategy import load_strategy
from sdxl_trainer.launch.distributed import Ranks
from sdxl_trainer.train.objective.builder import build_objective
from sdxl_trainer.train.objective.loss_feedback import build_feedback_state
from sdxl_trainer.train.objective.objective import Objective
from sdxl_trainer.train.run.checks import read_checked_vae_config
from sdxl_trainer.train.run.training_data import ValidationSet, build_validation_set, split_data


def open_validation(config: Config, index: Index, ranks: Ranks) -> tuple[ValidationSet | None, Objective]:
    """Open the validation set of a run as the run does, and build its objective."""
    strategy = load_strategy(config.data.strategy) if config.data.strategy else None
    source = resolve_pair(config)
    vae_config = read_checked_vae_config(config, source, index, ranks)
    tokenizers = load_tokenizers(source, config.model)
    dataset = build_dataset(config, index, tokenizers, strategy, vae_config["latent_channels"])
    missing = build_missing_latent_encoder(config, source, dataset, ranks) if index.summary.num_uncached else None
    split = split_data(config, index, strategy, ranks)
    held_out = build_validation_set(config, split, dataset, missing.fill if missing else None)
    return held_out, build_objective(config, vae_config, ranks, build_feedback_state(config.objective))
