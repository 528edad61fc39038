"""Validates a model file on the validation set of a run: `python -m sdxl_trainer.train.validate MODEL --run FOLDER`."""

import argparse
import sys

from sdxl_trainer.configs.language.arguments import TranslatedParser
from sdxl_trainer.configs.paths import parse_path
from sdxl_trainer.launch.program import OVERRIDES_HELP, SETTINGS_HELP, run_program

DESCRIPTION = (
    "Validate a model on the validation set of a run: the same samples, with the same noise at the same timesteps. The "
    "result is a folder that sdxl-trainer compare takes as a run, such as the model of another EMA length that "
    "train/convert.py has computed. Adapters must be merged into a whole model first (train/convert.py --merge)."
)
EXAMPLES = ("%(prog)s my-ema-0.13.safetensors --run runs/my --out runs/my-ema-0.13",)


def build_validate_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = TranslatedParser(
        prog="python -m sdxl_trainer.train.validate", description=DESCRIPTION, examples=EXAMPLES, epilog=SETTINGS_HELP
    )
    parser.add_argument(
        "model",
        type=lambda text: str(parse_path(text)),
        metavar="MODEL",
        help="a single .safetensors file, a diffusers folder, or a hub id",
    )
    parser.add_argument("--run", type=parse_path, required=True, metavar="FOLDER", help="folder of the run")
    parser.add_argument("--out", type=parse_path, required=True, metavar="FOLDER", help="folder for the result")
    parser.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="step to which the result belongs (that of the file's metadata, else of the run's last validation)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a result that exists")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help=OVERRIDES_HELP)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Validate, and return the exit status (0 done, 1 failed, 2 wrong input)."""
    options = build_validate_parser().parse_intermixed_args(arguments)

    def work() -> None:
        from sdxl_trainer.train.scoring.model_validation import Place, validate_model

        place = Place(folder=options.out, step=options.step, overwrite=options.overwrite)
        validate_model(options.model, options.run, place, options.overrides)

    return run_program(work)


if __name__ == "__main__":
    sys.exit(main())
