"""Converts models: `python train/convert.py SOURCE TARGET`."""

import argparse
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
    "with --merge, a whole model. A pickled file (.ckpt) becomes a .safetensors file with the same tensors."
)
EXAMPLES = (
    "%(prog)s runs/my my-model.safetensors",
    "%(prog)s runs/my/checkpoints/step-00005000 my-5000.safetensors --dtype fp16",
    "%(prog)s runs/my-lora my-model-with-lora.safetensors --merge",
    "%(prog)s old.ckpt new.safetensors",
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
        "target", type=parse_path, help="a name that ends in .safetensors, or a folder for diffusers layout"
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "fp16", "bf16"),
        help="of the weights (checkpoint.export_dtype of the settings, else fp16)",
    )
    parser.add_argument("--ema", metavar="DECAY", help="convert the moving average of this decay, such as 0.999")
    parser.add_argument(
        "--merge", action="store_true", help="write the base model with the adapters of a LoRA run merged into it"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a target that exists")
    parser.add_argument("--cfg", type=parse_path, metavar="FILE", help="settings; those of the checkpoint by default")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help=OVERRIDES_HELP)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, convert, return the exit status (0 done, 1 failed, 2 wrong input)."""
    options = build_convert_parser().parse_intermixed_args(arguments)

    def work() -> None:
        from sdxl_trainer.train.export.convert import run_conversion

        words = [*options.overrides, *([f"checkpoint.export_dtype={options.dtype}"] if options.dtype else [])]
        source, target, flags = options.source, options.target, {"merge": options.merge, "overwrite": options.overwrite}
        run_conversion(source, target, options.cfg, words, options.ema, **flags)

    return run_program(work)


if __name__ == "__main__":
    require_checkout(__file__)
    sys.exit(main())
