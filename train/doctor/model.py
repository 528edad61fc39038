"""Findings about the model: whether a hub id names one, and the prediction type that it declares."""

from collections.abc import Iterator
from dataclasses import replace

from sdxl_trainer.cache.models.source import check_hub_id, is_local, may_be_hub_id
from sdxl_trainer.configs.problems import UserInputError
from sdxl_trainer.configs.schema import Config, ModelConfig
from sdxl_trainer.launch.machine import Finding, announce_stage, convert_problem
from sdxl_trainer.train.run.checks import check_prediction


def examine_hub_model(model: ModelConfig) -> Iterator[Finding]:
    """Yield a fault if `model.path` is no path here, and neither is it a model that the hub would give.

    A mistyped path such as `models/sdxl` looks like a hub id, so that only the hub shows the mistake.
    """
    if not is_local(model) and may_be_hub_id(model.path):
        announce_stage("looking for the model on the hub")
        yield from map(convert_problem, check_hub_id(model))


def examine_prediction(config: Config) -> Iterator[Finding]:
    """Yield a warning if the model declares another prediction type than the settings."""
    try:
        yield from (replace(convert_problem(problem), is_note=True) for problem in check_prediction(config))
    except UserInputError as error:
        yield from map(convert_problem, error.problems)
