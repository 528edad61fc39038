"""The conversion program: convert checkpoints, single files and diffusers folders to a single file or a folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from loguru import logger

from sdxl_trainer.cache.models.pickled_file import convert_pickled_file, is_pickled_file
from sdxl_trainer.cache.models.single_file_names import get_canonical_name
from sdxl_trainer.cache.models.source import check_model, resolve_model
from sdxl_trainer.cache.models.tensor_stream import TensorSource
from sdxl_trainer.configs.problems import Problem, UserInputError, format_count, raise_if_any
from sdxl_trainer.launch.logger import init_logger
from sdxl_trainer.train.checkpoint.model_argument import (
    find_model_checkpoint,
    load_model_config,
    read_declared_prediction,
)
from sdxl_trainer.train.engine.saved_state import check_average, open_weights
from sdxl_trainer.train.export.export import build_export_settings, describe_files, open_components, write_components
from sdxl_trainer.train.networks.adapters import write_adapters


def run_conversion(
    source: Path, target: Path, cfg: Path | None, overrides: Sequence[str], average: str | None = None
) -> None:
    """Convert `source` to the format of `target`, tensor by tensor.

    A checkpoint contains only the trained weights; the others come from the model that training started from.

    Args:
        cfg: file with settings. Default: the settings of the checkpoint, or for a model the prediction that it
            declares.
        overrides: `key.sub=value` words that override the other settings.
        average: decay of the moving average to write instead of the checkpoint's weights.

    Raises:
        UserInputError: the source is not a model, or the checkpoint does not contain that average.
    """
    init_logger(rank=0)
    if is_pickled_file(source):
        number = convert_pickled_file(source, target)
        logger.info("{} written, with the {} of {}", describe_files(target), format_count(number, "tensor"), source)
        return
    checkpoint = find_model_checkpoint(source, "source")
    if checkpoint is None:
        declared = read_declared_prediction(source) if cfg is None else None
        prediction = declared.list_overrides() if declared else ()
        overrides = [*prediction, *overrides, f"model.path={json.dumps(str(source))}"]
    config, problems = load_model_config(checkpoint, cfg, overrides)
    raise_if_any(problems)
    raise_if_any([*check_model(config.model), *check_average(checkpoint, average)])
    settings = build_export_settings(config, resolve_model(config.model))
    trained = {} if checkpoint is None else open_weights(checkpoint, average)
    if trained and config.lora.rank:
        if target.suffix != ".safetensors":
            rule = "is no name of a file that adapters can be written to; they are one file in every layout"
            raise UserInputError([Problem("target", target, rule, "give a name that ends in .safetensors")])
        weights = {name: read() for name, read in trained.items()}
        write_adapters(target, weights, settings.source, settings.lora, settings.dtype)
        logger.info("adapters written to {}", describe_files(target))
        return
    components = open_components(settings.source, settings.model)
    replace_trained_weights(components, trained)
    write_components(target, components, settings)


def replace_trained_weights(
    components: Mapping[str, dict[str, TensorSource]], trained: Mapping[str, TensorSource]
) -> None:
    """Replace weights of a base model with the trained weights, in place."""
    for name, weight in trained.items():
        component, _, inner = name.partition(".")
        components[component][get_canonical_name(component, inner)] = weight
