"""Generates images with any SDXL model: `bash launch/sample.sh --model PATH --prompts FILE --out DIR`."""

import argparse
import sys
from pathlib import Path

try:
    from sdxl_trainer.configs.paths import parse_path
    from sdxl_trainer.launch import program
except ImportError:
    activate = Path(__file__).resolve().parent.parent / ".venv" / "bin" / "activate"
    cure = f"source {activate}" if activate.is_file() else "pip install -e . (in the checkout)"
    sys.exit(f"sdxl_trainer is not installed here; run: {cure}")


def build_sample_parser() -> program.RankParser:
    """Build the parser of the command line."""
    description = (
        "Generate an image for each line of a prompt file, and a contact sheet of them, with a run, a checkpoint or "
        "any SDXL model. Ranks share the prompts: one per GPU, or NPROC=4."
    )
    example = "%(prog)s --model runs/my --prompts prompts.txt --out drawn"
    parser = program.RankParser(
        prog="bash launch/sample.sh", description=description, examples=[example], epilog=program.SETTINGS_HELP
    )
    parser.add_argument(
        "--model",
        type=lambda text: str(parse_path(text)),
        required=True,
        metavar="PATH",
        help="a single .safetensors file, a diffusers folder, a hub id, a run folder, or one of its checkpoints",
    )
    parser.add_argument(
        "--prompts", type=parse_path, required=True, metavar="FILE", help=".txt, .json or .toml (docs/SAMPLING.md)"
    )
    parser.add_argument("--out", type=parse_path, required=True, metavar="DIR", help="folder for the images")
    parser.add_argument("--ema", metavar="NAME", help="use a moving average, such as 0.999 or length-0.05")
    parser.add_argument("--cfg", type=parse_path, metavar="FILE", help="settings; those of the checkpoint by default")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # DeepSpeed's
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help=program.OVERRIDES_HELP)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, generate, return the exit status (0 done, 1 failed, 2 wrong input)."""
    program.require_checkout(__file__)
    options = build_sample_parser().parse_intermixed_args(arguments)

    def work() -> None:
        program.announce("loading PyTorch and the libraries")
        from sdxl_trainer.train.sampling.job import run_sampling

        run_sampling(options.model, options.prompts, options.out, options.cfg, options.overrides, options.ema)

    return program.run_program(work)


if __name__ == "__main__":
    program.end_program(main())
