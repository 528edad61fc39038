"""Reasons why a run could not continue from its newest checkpoint, found before a network is loaded."""

from collections.abc import Iterator

from sdxl_trainer.cache.models.components import hash_component
from sdxl_trainer.cache.models.model_pair import resolve_pair
from sdxl_trainer.cache.models.source import is_local
from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.configs.schema import Config, RunConfig
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.launch.distributed import Ranks
from sdxl_trainer.train.checkpoint.folder import list_checkpoints
from sdxl_trainer.train.checkpoint.resume import build_initial_state, check_base_model, check_progress
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.run.training_data import DataSplit


def check_newest_checkpoint(
    config: Config, index: Index, split: DataSplit, run: RunConfig, ranks: Ranks
) -> Iterator[Problem]:
    """Yield a problem for each reason why the run cannot continue from its newest checkpoint.

    Args:
        config: settings without problems, with a ZeRO stage.
        index: of the training set.
        run: the settings `run` of the run itself.
    """
    newest = next(reversed(list_checkpoints(run.folder / "checkpoints")), None)
    if newest is None:
        return
    try:
        saved = TrainState.load(newest)
    except (OSError, ValueError, TypeError, LookupError):  # the start finds the damage, and takes an older one
        return
    fresh = build_initial_state(config, index, split.plan, ranks, split.repeats)
    yield from check_progress(saved, fresh, run.on_data_change)
    # Reading the weights takes long, so only those of another path are compared here. The start compares all.
    if saved.config.get("model", {}).get("path") != config.model.path and is_local(config.model):
        source, projection = resolve_pair(config), config.model.text_projection
        hashes = {name: hash_component(source, name, projection) for name in saved.base_model}
        yield from check_base_model(config.model, hashes, saved)
