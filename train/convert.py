"""Converts models: `python train/convert.py SOURCE TARGET`."""

import argparse
import re
import sys
from pathlib import Path

try:
    from sdxl_trainer.configs.language.arguments import TranslatedParser
    from sdxl_trainer.configs.paths import parse_path
    from sdxl_trainer.launch.program import OVERRIDES_HELP, SETTINGS_HELP, require_checkout, run_program
except ImportError:
    activate = Path(__file__).resolve().parent.parent / ".venv" / "bin" / "activate"
    cure = f"source {activate}" if activate.is_file() else "pip install -e . (in the checkout)"
    sys.exit(f"sdxl_trainer is not installed here; run: {cure}")

DESCRIPTION = (
    "Convert a model: a run, a checkpoint, a .safetensors file or a diffusers folder into one .safetensors file, as "
    "ComfyUI and others read it, or into a diffusers folder. A run of adapters (LoRA) becomes a file of adapters or, "
    "with --merge, a whole model. --adapter merges files of adapters (LoRA, DoRA, LoHa, LoKr) into a model, and --base "
    "writes the difference of two models as a LoRA. A pickled file (.ckpt) becomes a .safetensors file with the same "
    "tensors."
)
OVERRIDE = re.compile(r"\w+(?:\.\w+)+=")  # of a setting, where the target may be left out
EXAMPLES = (
    "%(prog)s runs/my my-model.safetensors",
    "%(prog)s runs/my/checkpoints/step-00005000 my-5000.safetensors --dtype fp16",
    "%(prog)s runs/my my-ema-0.13.safetensors --ema-length 0.13",
    "%(prog)s runs/my-lora my-model-with-lora.safetensors --merge",
    "%(prog)s model.safetensors with-style.safetensors --adapter style.safetensors --strength 0.8",
    "%(prog)s tuned.safetensors difference.safetensors --base sd_xl_base_1.0.safetensors --rank 64 --conv-rank 16",
    "%(prog)s old.ckpt new.safetensors",
    "%(prog)s runs/my my-model.safetensors --push me/my-model",
)


def build_convert_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = TranslatedParser(
        prog="python train/convert.py", description=DESCRIPTION, examples=EXAMPLES, epilog=SETTINGS_HELP
    )
    parser.add_argument(
        "source",
        type=parse_path,
        help="a checkpoint (step-… folder), a run folder (its newest one), a file or a folder",
    )
    parser.add_argument(
        "target",
        type=parse_path,
        nargs="?",
        help="a name that ends in .safetensors, or a folder for diffusers layout; without it, --push and --card take "
        "the source as it is",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "fp16", "bf16"),
        help="of the weights (checkpoint.export_dtype of the settings, else fp16)",
    )
    add_average_options(parser)
    add_adapter_options(parser)
    add_sharing_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a target that exists")
    parser.add_argument("--cfg", type=parse_path, metavar="FILE", help="settings; those of the checkpoint by default")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help=OVERRIDES_HELP)
    return parser


def add_adapter_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that merge adapters into a model, and take adapters from two models."""
    parser.add_argument(
        "--merge", action="store_true", help="write the base model with the adapters of a LoRA run merged into it"
    )
    parser.add_argument(
        "--adapter",
        type=parse_path,
        action="append",
        default=[],
        metavar="FILE",
        help="merge a file of adapters into the model; may be given several times",
    )
    parser.add_argument(
        "--strength",
        type=float,
        action="append",
        default=[],
        metavar="X",
        help="of the adapters that are merged, one for each --adapter in their order (1)",
    )
    add_difference_options(parser)


def add_difference_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a difference of two models."""
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="write the difference of the source and this model as a LoRA, by SVD; a file, a folder or a hub id",
    )
    parser.add_argument("--rank", "--dim", type=int, default=32, metavar="N", help="of that LoRA (32)")
    parser.add_argument(
        "--conv-rank",
        "--conv-dim",
        type=int,
        default=0,
        metavar="N",
        help="of that LoRA's convolutions, with all layers of the residual blocks (0: attention blocks only)",
    )


def add_sharing_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the model card and of the upload."""
    parser.add_argument(
        "--push", metavar="NAME/MODEL", help="upload the model to this id of the Hugging Face hub, with a model card"
    )
    parser.add_argument("--private", action="store_true", help="make the repository of --push private if it is new")
    parser.add_argument(
        "--card", action="store_true", help="write the model card beside the model, to read or change before --push"
    )


def add_average_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a moving average."""
    parser.add_argument("--ema", metavar="NAME", help="convert a moving average, such as 0.999 or length-0.05")
    parser.add_argument(
        "--ema-length",
        type=float,
        metavar="X",
        help="compute the average of this length, such as 0.13, from the snapshots of a run with ema.lengths",
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="step at which that average ends (that of the last snapshot)"
    )


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line. The target may be missing where the source is shared as it is."""
    parser = build_convert_parser()
    options = parser.parse_intermixed_args(arguments)
    if options.target is not None and OVERRIDE.match(str(options.target)):
        options.overrides.insert(0, str(options.target))
        options.target = None
    if options.target is None and not options.push and not options.card:
        parser.error("the following arguments are required: target")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, convert, share, return the exit status (0 done, 1 failed, 2 wrong input)."""
    options = parse_options(arguments)

    def work() -> None:
        from sdxl_trainer.train.export.convert import Conversion, run_conversion
        from sdxl_trainer.train.export.model_run import find_model_run
        from sdxl_trainer.train.export.share import SharedRun, Sharing, run_sharing

        sharing = Sharing(push=options.push, private=options.private, card=options.card)
        words = [*options.overrides, *([f"checkpoint.export_dtype={options.dtype}"] if options.dtype else [])]
        conversion = Conversion(
            average=options.ema,
            length=options.ema_length,
            step=options.step,
            merge=options.merge,
            adapters=options.adapter,
            strengths=options.strength,
            base=options.base,
            rank=options.rank,
            conv_rank=options.conv_rank,
            overwrite=options.overwrite,
        )

        def convert() -> None:
            if options.target is not None:
                run_conversion(options.source, options.target, options.cfg, words, conversion)

        run = find_model_run(options.source, options.ema, options.step)
        run_sharing(options.source, options.target, SharedRun(run=run, cfg=options.cfg, words=words), sharing, convert)

    return run_program(work)


if __name__ == "__main__":
    require_checkout(__file__)
    sys.exit(main())
