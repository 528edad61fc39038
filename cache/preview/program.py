"""The program of the preview: `bash launch/preview.sh --cfg x.yaml`. Its help needs no library."""

import argparse
from collections.abc import Sequence
from functools import partial

from sdxl_trainer.cache.preview.limits import SurveyLimits
from sdxl_trainer.configs.paths import parse_path
from sdxl_trainer.configs.problems import parse_count
from sdxl_trainer.launch.program import build_parser, run_program

DESCRIPTION = (
    "Look at your data before you train: images without captions, broken images, duplicates, images that are enlarged "
    "or cropped much, captions that are cut, counts of tags and buckets. Writes tables, a page with thumbnails and a "
    "contact sheet. Works before and after caching."
)
EXAMPLES = ("%(prog)s --cfg my.yaml", "%(prog)s --cfg my.yaml --out preview.png --examine 0")


def parse_factor(text: str) -> float:
    """Return the positive number that an argument of the command line gives.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Show the data as the model will see it; return the exit status (0 done, 2 wrong input)."""
    limits = SurveyLimits()
    parser = build_parser(DESCRIPTION, "bash launch/preview.sh", EXAMPLES, dry_run="")
    count = partial(parse_count, least=0)
    parser.add_argument(
        "--out",
        type=parse_path,
        metavar="NAME",
        help="name of the page (.html), the list of findings (.jsonl) and the contact sheet (.png); "
        "preview in the run folder",
    )
    parser.add_argument(
        "--images", type=count, default=16, metavar="N", help="samples in the contact sheet (16); 0 draws none"
    )
    parser.add_argument("--pictures", dest="images", type=count, help=argparse.SUPPRESS)  # its earlier name
    parser.add_argument(
        "--examine", type=count, default=limits.num_opened, metavar="N", help="images to open (2000); 0 opens all"
    )
    parser.add_argument(
        "--enlarged",
        type=parse_factor,
        default=limits.max_enlargement,
        metavar="TIMES",
        help="name images that are enlarged more often than this (1.5)",
    )
    parser.add_argument(
        "--cropped",
        type=parse_factor,
        default=100 * limits.max_cropped,
        metavar="PERCENT",
        help="name images that lose more than this by the crop (25)",
    )
    options = parser.parse_intermixed_args(arguments)

    def work() -> None:
        from rich.console import Console

        from sdxl_trainer.cache.preview.preview import show_preview
        from sdxl_trainer.configs.load import load_config
        from sdxl_trainer.launch.logger import init_logger

        config, problems = load_config(options.cfg, options.overrides)
        init_logger(0, config.log.level)
        show_preview(config, problems, options, Console())

    return run_program(work)
