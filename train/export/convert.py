"""Turns a checkpoint, a single file or a diffusers folder into a single file or a diffusers folder, without training.

python train/convert.py runs/x/checkpoints/step-00001000 model.safetensors [--dtype fp16] [model.path=…]
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdxl_trainer.configs.schema import Config


def build_convert_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", type=Path, help="a checkpoint (step-… folder), a run folder (its newest one), a file or a folder"
    )
    parser.add_argument("target", type=Path, help="a name that ends in .safetensors, or a folder for diffusers layout")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp16", help="of the weights (fp16)")
    parser.add_argument("--ema", metavar="DECAY", help="take the moving average of this decay, such as 0.999")
    parser.add_argument("--cfg", type=Path, help="settings of a file or folder that say how it predicts")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings, such as model.path=…")
    return parser


def convert_model(
    source: Path, checkpoint: Path | None, target: Path, config: "Config", average: str | None = None
) -> None:
    """Write a model as `target`, with the objective, type and names that `config` says, tensor by tensor.

    Args:
        checkpoint: if given its trained weights are taken, and what was not trained from the model it started from.
        average: decay of the moving average that is taken of the checkpoint instead of its weights.

    Raises:
        UserInputError: the source is nothing that can be read, or does not hold that average.
    """
    from sdxl_trainer.cache.models.source import check_model, resolve_model
    from sdxl_trainer.configs.problems import raise_if_any
    from sdxl_trainer.train.engine.saved_state import check_average, open_weights
    from sdxl_trainer.train.export.export import DTYPES, open_components, write_components
    from sdxl_trainer.train.networks.adapters import write_adapters

    if checkpoint is None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(source)})})
    raise_if_any([*check_model(config.model), *check_average(checkpoint, average)])
    model = resolve_model(config.model)
    trained = {} if checkpoint is None else open_weights(checkpoint, average)
    if trained and config.lora.rank:
        weights = {name: read() for name, read in trained.items()}
        write_adapters(target, weights, model, config.lora, DTYPES[config.checkpoint.export_dtype])
        return
    components = open_components(model, config.model)
    replace_trained_weights(components, trained)
    write_components(target, components, model, config)


def find_source_checkpoint(source: Path) -> Path | None:
    """The checkpoint that is meant, or None if the source is a model.

    Raises:
        UserInputError: it is damaged, or the run has none.
    """
    from sdxl_trainer.configs.problems import Problem, UserInputError
    from sdxl_trainer.train.checkpoint.folder import MANIFEST, find_newest_checkpoint, verify_manifest

    if (source / MANIFEST).is_file():
        damage = verify_manifest(source)
        if damage:
            raise UserInputError([Problem("source", source, f"is damaged: {damage}", "take another checkpoint")])
        return source
    if (source / "checkpoints").is_dir():
        found = find_newest_checkpoint(source / "checkpoints")
        if found is None:
            raise UserInputError([Problem("source", source, "holds no whole checkpoint", "give another run folder")])
        return found
    return None


def replace_trained_weights(components: Mapping[str, dict[str, Any]], trained: Mapping[str, Any]) -> None:
    """Put what was trained in the place of what training started from."""
    from sdxl_trainer.cache.models.single_file_names import get_canonical_name

    for name, read in trained.items():
        component, _, inner = name.partition(".")
        components[component][get_canonical_name(component, inner)] = read


def load_export_config(options: argparse.Namespace, checkpoint: Path | None) -> "Config":
    """The settings that a checkpoint was trained with, or those of a file; words of the command line over them."""
    from loguru import logger

    from sdxl_trainer.configs.load import build_config, load_config
    from sdxl_trainer.configs.problems import raise_if_any
    from sdxl_trainer.train.checkpoint.state import TrainState

    words = [*options.overrides, f"checkpoint.export_dtype={options.dtype}"]
    if options.cfg is not None:
        config, problems = load_config(options.cfg, words)
    else:
        settings, outdated = build_config(TrainState.load(checkpoint).config if checkpoint else {})
        for problem in outdated:  # of another version of this program; nothing that the user could put right
            logger.warning("the checkpoint's {} is passed over: {}", problem.key, problem.rule)
        config, problems = build_config(settings.model_dump(mode="json"), words)
    raise_if_any(problems)
    return config


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, convert, return the exit status (0 done, 1 failed, 2 wrong input)."""
    from sdxl_trainer.launch.program import run_program

    options = build_convert_parser().parse_intermixed_args(arguments)

    def work() -> None:
        from sdxl_trainer.launch.logger import init_logger

        init_logger(rank=0)
        checkpoint = find_source_checkpoint(options.source)
        convert_model(options.source, checkpoint, options.target, load_export_config(options, checkpoint), options.ema)

    return run_program(work)
