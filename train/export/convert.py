"""The conversion program: convert checkpoints, single files and diffusers folders to a single file or a folder."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from loguru import logger

from sdxl_trainer.cache.models.components import hash_component
from sdxl_trainer.cache.models.model_pair import check_pair, resolve_pair
from sdxl_trainer.cache.models.pickled_file import convert_pickled_file, is_pickled_file
from sdxl_trainer.cache.models.single_file_names import get_canonical_name
from sdxl_trainer.cache.models.source import COMPONENTS, check_model, resolve_model
from sdxl_trainer.cache.models.tensor_stream import TensorSource
from sdxl_trainer.configs.problems import Problem, format_count, raise_if_any
from sdxl_trainer.configs.schema import Config, ModelConfig
from sdxl_trainer.launch.logger import init_logger
from sdxl_trainer.train.checkpoint.folder import find_newest_checkpoint
from sdxl_trainer.train.checkpoint.model_argument import (
    explain_removal,
    find_model_checkpoint,
    load_model_config,
    name_option,
    read_declared_prediction,
)
from sdxl_trainer.train.checkpoint.resume import check_base_model
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.engine.saved_state import check_average, open_weights
from sdxl_trainer.train.export.about import check_about, read_about
from sdxl_trainer.train.export.difference import ExtractedRanks, check_same_layers, write_difference
from sdxl_trainer.train.export.export import (
    ExportSettings,
    build_export_settings,
    describe_files,
    open_components,
    write_adapter_file,
    write_components,
)
from sdxl_trainer.train.export.rebuilt_average import rebuild_average
from sdxl_trainer.train.networks.adapter_files import (
    LayerWeight,
    build_file_layers,
    check_layers,
    map_adapted_weights,
    merge_layers,
    read_adapter_file,
)


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Changes that a conversion makes besides that of the format, named as the command line's options."""

    average: str | None = None  # name of the moving average to write instead of the checkpoint's weights
    length: float | None = None  # of the average to compute from the run's snapshots instead
    step: int | None = None  # of the training at which that average ends; the last snapshots by default
    merge: bool = False  # write the whole model with the checkpoint's adapters in it, instead of the adapters
    adapters: Sequence[Path] = ()  # files of adapters to merge into the model
    strengths: Sequence[float] = ()  # of what is merged: one for each file, or none for 1
    base: str | None = None  # write the difference to this model as a LoRA
    rank: int = 32  # of that LoRA
    conv_rank: int = 0
    overwrite: bool = False  # replace a target that exists


def run_conversion(
    source: Path, target: Path, cfg: Path | None, overrides: Sequence[str], conversion: Conversion
) -> None:
    """Convert `source` to the format of `target`, tensor by tensor.

    A checkpoint contains only the trained weights; the others come from the model that training started from.

    Args:
        cfg: file with settings. Default: the settings of the checkpoint, or for a model the prediction that it
            declares.
        overrides: `key.sub=value` words that override the other settings.

    Raises:
        UserInputError: the source is not a model, the target exists, the checkpoint does not contain that average, or
            the adapters or the other model do not fit.
    """
    init_logger(rank=0)
    raise_if_any([*check_target(source, target, conversion.overwrite), *check_options(target, conversion)])
    if is_pickled_file(source):
        raise_if_any(check_plain(source, conversion))
        number = convert_pickled_file(source, target)
        logger.info("{} written, with the {} of {}", describe_files(target), format_count(number, "tensor"), source)
        return
    if conversion.length is not None:
        convert_rebuilt_average(source, target, cfg, overrides, conversion)
        return
    checkpoint = find_model_checkpoint(source, "source")
    if checkpoint is None:
        declared = read_declared_prediction(source) if cfg is None else None
        prediction = declared.list_overrides() if declared else ()
        overrides = [*prediction, *overrides, f"model.path={json.dumps(str(source))}"]
    config, problems = load_model_config(checkpoint, cfg, overrides)
    raise_if_any(problems)
    of_model = list(check_model(config.model)) or list(check_pair(config))
    if checkpoint is None:
        of_model = name_option(of_model, "source", str(source))
    raise_if_any([*of_model, *check_average(checkpoint, conversion.average), *check_about(config.about)])
    about = {} if checkpoint else read_about(source)
    if checkpoint is not None and (conversion.merge or not config.lora.rank):
        warn_of_another_base(config.model, checkpoint)
    with explain_removal(checkpoint):
        trained = {} if checkpoint is None else open_weights(checkpoint, conversion.average)
        convert_model(config, trained, target, conversion, about=about)


def warn_of_another_base(model: ModelConfig, checkpoint: Path) -> None:
    """Warn if the weights that the checkpoint does not hold are taken from another model than it was trained on."""
    with explain_removal(checkpoint):
        saved = TrainState.load(checkpoint)
    source = resolve_model(model)
    hashes = {name: hash_component(source, name, model.text_projection) for name in sorted(saved.base_model)}
    for problem in check_base_model(model, hashes, saved):
        logger.warning("{}={}: {}", problem.key, problem.value, problem.rule)


def convert_rebuilt_average(
    run_folder: Path, target: Path, cfg: Path | None, overrides: Sequence[str], conversion: Conversion
) -> None:
    """Write the model whose trained weights are an average of any length, computed from a run's snapshots.

    The settings are those of the newest checkpoint, or of the run's `config.yaml` if no checkpoint is left.

    Raises:
        UserInputError: the snapshots at hand do not reach the length or the step; the message says what they reach.
    """
    assert conversion.length is not None
    rebuilt = rebuild_average(run_folder, conversion.length, conversion.step)
    checkpoint = find_newest_checkpoint(run_folder / "checkpoints")
    if checkpoint is None and cfg is None:
        cfg = run_folder / "config.yaml"
    config, problems = load_model_config(checkpoint, cfg, overrides)
    raise_if_any(problems)
    raise_if_any([*(list(check_model(config.model)) or check_pair(config)), *check_about(config.about)])
    logger.info(rebuilt.describe())
    convert_model(config, rebuilt.open_weights(), target, conversion, metadata=rebuilt.metadata)


def convert_model(
    config: Config,
    trained: Mapping[str, Callable[[], torch.Tensor]],
    target: Path,
    conversion: Conversion,
    *,
    about: Mapping[str, str] = MappingProxyType({}),
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write the model that the settings name to `target`.

    Args:
        trained: weights of a run that replace the model's, by the engine's names; adapters if the run trained such.
        about: what the source says about itself, which the settings can replace.
        metadata: of a single file, besides what it always declares.
    """
    settings = build_export_settings(config, resolve_pair(config))
    merged = {"merged_from": ", ".join(list_merged_names(config, conversion))} if conversion.adapters else {}
    title = about.get("title") if "name" not in config.run.model_fields_set and not config.about.title else None
    about = {**about, **merged, **settings.about}
    settings = replace(settings, title=title or settings.title, about=about, metadata=metadata)
    has_adapters = bool(trained and config.lora.rank)
    raise_if_any(check_adapter_target(target, has_adapters, conversion))
    if has_adapters and not conversion.merge:
        write_adapter_file(target, {name: read() for name, read in trained.items()}, settings)
        logger.info("adapters written to {}", describe_files(target))
        return
    components = open_components(settings.source, settings.model)
    weights = map_adapted_weights({name: settings.source.read_config(name) for name in COMPONENTS})
    strengths = [*conversion.strengths] or [1.0] * max(1, len(conversion.adapters))
    if has_adapters:
        layers = build_file_layers({name: read() for name, read in trained.items()}, settings.source, config.lora)
        merge_layers(components, layers, weights, strengths[0])
    else:
        replace_trained_weights(components, trained)
    merge_files(components, conversion.adapters, strengths, weights)
    if conversion.base is not None:
        ranks = ExtractedRanks(linear=conversion.rank, convolution=conversion.conv_rank)
        write_difference(target, components, open_base(conversion.base, config, settings), ranks, settings)
        return
    write_components(target, components, settings)


def list_merged_names(config: Config, conversion: Conversion) -> list[str]:
    """Return the names of the model and of the files of adapters that are merged into it, without their folders."""
    return [Path(path).name.removesuffix(".safetensors") for path in (config.model.path, *conversion.adapters)]


def merge_files(
    components: Mapping[str, dict[str, TensorSource]],
    paths: Sequence[Path],
    strengths: Sequence[float],
    weights: Mapping[str, LayerWeight],
) -> None:
    """Merge files of adapters into a model, in place, each with its strength.

    Args:
        weights: of the model, from `map_adapted_weights`.

    Raises:
        UserInputError: a file is none of adapters, or does not fit the model; the message lists every such file.
    """
    problems: list[Problem] = []
    for path, strength in zip(paths, strengths, strict=False):
        layers = read_adapter_file(path)
        problems += check_layers(layers, weights, path, "--adapter")
        if not problems:
            merge_layers(components, layers, weights, strength)
            count = format_count(len(layers), "layer")
            logger.info("{}: adapters of {} merged with strength {:g}", path, count, strength)
    raise_if_any(problems)


def open_base(base: str, config: Config, settings: ExportSettings) -> dict[str, dict[str, TensorSource]]:
    """Open the model that a difference is taken to.

    Raises:
        UserInputError: it is no SDXL model, or of another architecture than the source.
    """
    model = config.model.model_copy(update={"path": base, "vae": None, "tokenizer": None})
    raise_if_any(replace(problem, key="--base") for problem in check_model(model))
    source = resolve_model(model)
    here, there = ({name: each.read_config(name) for name in COMPONENTS} for each in (settings.source, source))
    raise_if_any(check_same_layers(here, there, base))
    return open_components(source, model)


def check_options(target: Path, conversion: Conversion) -> Iterator[Problem]:
    """Yield problems of options that do not go together."""
    number, files = len(conversion.strengths), len(conversion.adapters) + conversion.merge
    if number and number != files:
        rule = f"is given {number} times for {format_count(files, 'merged adapter')}"
        yield Problem("--strength", None, rule, "give one for each --adapter, or one for --merge")
    if conversion.merge and conversion.adapters:
        cure = "merge the run first, then the files into the result"
        yield Problem("--merge", None, "cannot be combined with --adapter", cure)
    if conversion.step is not None and conversion.length is None:
        yield Problem("--step", conversion.step, "needs --ema-length", "add it, or name a checkpoint as source")
    if conversion.average is not None and conversion.length is not None:
        yield Problem("--ema", conversion.average, "cannot be combined with --ema-length", "leave one of them out")
    if conversion.base is None:
        return
    for key, rank, lowest in (("--rank", conversion.rank, 1), ("--conv-rank", conversion.conv_rank, 0)):
        if rank < lowest:
            yield Problem(key, rank, f"must be at least {lowest}", "give a rank such as 32")
    if target.suffix != ".safetensors":
        yield Problem("target", target, "is no name of a file for a LoRA", "give a name that ends in .safetensors")


def check_target(source: Path, target: Path, overwrite: bool) -> Iterator[Problem]:
    """Yield a problem if the target is the source, or exists and is not to be replaced. An empty folder may exist."""
    if target.exists() and source.exists() and target.samefile(source):
        yield Problem("target", target, "is the source itself", "give another name")
    elif target.is_file() or (target.is_dir() and any(target.iterdir())):
        if not overwrite:
            yield Problem("target", target, "exists already", "give another name, or add --overwrite to replace it")


def check_plain(source: Path, conversion: Conversion) -> Iterator[Problem]:
    """Yield a problem if a pickled file is to be changed, whose names are not looked at."""
    if conversion.adapters or conversion.base is not None:
        rule = "is a pickled file, which only becomes a .safetensors file"
        yield Problem("source", source, rule, "convert it without other options first, then convert the result")


def check_adapter_target(target: Path, has_adapters: bool, conversion: Conversion) -> Iterator[Problem]:
    """Yield a problem if there are no adapters to merge, or if adapters would be written as a folder or changed."""
    if conversion.merge and not has_adapters:
        cure = "give a run or a checkpoint with lora.rank above 0 as source, or leave --merge out"
        yield Problem("--merge", None, "needs adapters, and the source has none", cure)
    if not has_adapters or conversion.merge:
        return
    if conversion.adapters or conversion.base is not None:
        key = "--adapter" if conversion.adapters else "--base"
        yield Problem(key, None, "needs a whole model, and the source is a run of adapters", "add --merge")
    if target.suffix != ".safetensors":
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
