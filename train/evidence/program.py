"""The program that compares runs: `python -m sdxl_trainer.train.compare`. Its help needs no library."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from sdxl_trainer.configs.language.arguments import TranslatedParser
from sdxl_trainer.configs.paths import parse_path
from sdxl_trainer.launch.program import run_program

DESCRIPTION = (
    "Compare runs by their validations: do their weights differ, and does the setting help? The first run is the "
    "baseline. Runs whose settings differ only in run.seed form an arm; a setting needs three seeds to be judged."
)
EXAMPLES = ("%(prog)s runs/a runs/b", "%(prog)s runs/low-* runs/high-* --at samples --json")
EPILOG = "docs/EVIDENCE.md explains how to read the result."
PAGE = Path("report", "comparison.html")  # in the folder of the first run


def build_compare_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = TranslatedParser(
        prog="python -m sdxl_trainer.train.compare", description=DESCRIPTION, examples=EXAMPLES, epilog=EPILOG
    )
    parser.add_argument("folders", nargs="+", type=parse_path, metavar="RUN_FOLDER", help="folders of two runs or more")
    parser.add_argument(
        "--at",
        choices=("steps", "samples", "time"),
        default="steps",
        help="compare at equal steps (default), samples seen, or seconds of training",
    )
    parser.add_argument(
        "--error",
        choices=("v", "x0", "loss"),
        default="v",
        help="error of v (default), which weighs noise levels most evenly, or of x0, or the loss of the objective",
    )
    parser.add_argument(
        "--average", default="weights", metavar="DECAY", help="compare a moving average in place of the weights"
    )
    parser.add_argument(
        "--groups", type=parse_path, metavar="FILE", help="JSON file with the caption group of each key"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of text")
    parser.add_argument(
        "--out", type=parse_path, metavar="FILE", help="the page (default: report/comparison.html of the first run)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare runs, and return the exit status (0 done, 1 failed, 2 wrong input)."""
    parser = build_compare_parser()
    options = parser.parse_args(arguments)
    if len(options.folders) < 2:
        parser.error("name two runs or more")

    def work() -> None:
        from sdxl_trainer.train.evidence.printing import print_comparison

        print_comparison(options, options.out or options.folders[0] / PAGE)

    return run_program(work)
