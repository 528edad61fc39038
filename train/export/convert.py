"""The conversion program: convert checkpoints, single files and diffusers folders to a single file or a folder."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from loguru import logger

from sdxl_trainer.cache.models.model_pair import check_pair, resolve_pair
from sdxl_trainer.cache.models.pickled_file import convert_pickled_file, is_pickled_file
from sdxl_trainer.cache.models.single_file_names import get_canonical_name
from sdxl_trainer.cache.models.source import check_model
from sdxl_trainer.cache.models.tensor_stream import TensorSource
from sdxl_trainer.configs.problems import Problem, format_count, raise_if_any
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.launch.logger import init_logger
from sdxl_trainer.train.checkpoint.model_argument import (
    explain_removal,
    find_model_checkpoint,
    load_model_config,
    read_declared_prediction,
)
from sdxl_trainer.train.engine.saved_state import check_average, open_weights
from sdxl_trainer.train.export.export import (
    build_export_settings,
    describe_files,
    open_components,
    write_adapter_file,
    write_components,
)
from sdxl_trainer.train.networks.adapters import merge_adapters


def run_conversion(
    source: Path,
    target: Path,
    cfg: Path | None,
    overrides: Sequence[str],
    average: str | None = None,
    *,
    merge: bool = False,
    overwrite: bool = False,
) -> None:
    """Convert `source` to the format of `target`, tensor by tensor.

    A checkpoint contains only the trained weights; the others come from the model that training started from.

    Args:
        cfg: file with settings. Default: the settings of the checkpoint, or for a model the prediction that it
            declares.
        overrides: `key.sub=value` words that override the other settings.
        average: decay of the moving average to write instead of the checkpoint's weights.
        merge: write the whole model with the checkpoint's adapters in it, instead of the adapters.
        overwrite: replace a target that exists.

    Raises:
        UserInputError: the source is not a model, the target exists, or the checkpoint does not contain that average,
            or no adapters to merge.
    """
    init_logger(rank=0)
    raise_if_any(check_target(source, target, overwrite))
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
    of_model = list(check_model(config.model)) or list(check_pair(config))
    raise_if_any([*of_model, *check_average(checkpoint, average)])
    with explain_removal(checkpoint):
        convert_model(config, checkpoint, target, average, merge)


def convert_model(config: Config, checkpoint: Path | None, target: Path, average: str | None, merge: bool) -> None:
    """Write the model that the settings name to `target`, with the weights of a checkpoint if there is one.

    Args:
        average, merge: see `run_conversion`.
    """
    settings = build_export_settings(config, resolve_pair(config))
    trained = {} if checkpoint is None else open_weights(checkpoint, average)
    has_adapters = bool(trained and config.lora.rank)
    raise_if_any(check_adapter_target(target, has_adapters, merge))
    if has_adapters and not merge:
        write_adapter_file(target, {name: read() for name, read in trained.items()}, settings)
        logger.info("adapters written to {}", describe_files(target))
        return
    components = open_components(settings.source, settings.model)
    if has_adapters:
        merge_adapters(components, {name: read() for name, read in trained.items()}, settings.lora)
    else:
        replace_trained_weights(components, trained)
    write_components(target, components, settings)


def check_target(source: Path, target: Path, overwrite: bool) -> Iterator[Problem]:
    """Yield a problem if the target is the source, or exists and is not to be replaced. An empty folder may exist."""
    if target.exists() and source.exists() and target.samefile(source):
        yield Problem("target", target, "is the source itself", "give another name")
    elif target.is_file() or (target.is_dir() and any(target.iterdir())):
        if not overwrite:
            yield Problem("target", target, "exists already", "give another name, or add --overwrite to replace it")


def check_adapter_target(target: Path, has_adapters: bool, merge: bool) -> Iterator[Problem]:
    """Yield a problem if there are no adapters to merge, or if adapters would be written as a folder."""
    if merge and not has_adapters:
        cure = "give a run or a checkpoint with lora.rank above 0 as source, or leave --merge out"
        yield Problem("--merge", None, "needs adapters, and the source has none", cure)
    if has_adapters and not merge and target.suffix != ".safetensors":
        rule = "is no name of a file that adapters can be written to; they are one file in every layout"
        cure = "give a name that ends in .safetensors, or add --merge to write the whole model with the adapters in it"
        yield Problem("target", target, rule, cure)


def replace_trained_weights(
    components: Mapping[str, dict[str, TensorSource]], trained: Mapping[str, TensorSource]
) -> None:
    """Replace weights of a base model with the trained weights, in place."""
    for name, weight in trained.items():
        component, _, inner = name.partition(".")
        components[component][get_canonical_name(component, inner)] = weight
