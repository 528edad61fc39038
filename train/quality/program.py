"""The program that measures the quality of generated images. Its help needs no library."""

import argparse
from collections.abc import Sequence

from sdxl_trainer.configs.language.arguments import TranslatedParser
from sdxl_trainer.configs.paths import parse_path
from sdxl_trainer.launch.program import OVERRIDES_HELP, SETTINGS_HELP, RankParser, announce, parse_positive, run_program

DESCRIPTION = (
    "Generate an image for each caption of the validation set, and measure how far these images are from those of the "
    "set: FID, KID and CMMD. The first model is the baseline. The same command resumes. Ranks share the work: one per "
    "GPU, or NPROC=4."
)
EXAMPLES = (
    "%(prog)s --model runs/a --model runs/b --features models/dinov2-large",
    "%(prog)s --model my.safetensors --cfg my.yaml --out drawn --features models/clip-vit-large-patch14-336",
)


def build_quality_parser() -> TranslatedParser:
    """Build the parser of the command line."""
    parser = RankParser(
        prog="bash launch/quality.sh",
        description=DESCRIPTION,
        examples=EXAMPLES,
        epilog=f"docs/QUALITY.md explains how to read the result. {SETTINGS_HELP}",
    )
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        type=lambda text: str(parse_path(text)),
        metavar="PATH",
        help="a run folder, a checkpoint, a single .safetensors file, a diffusers folder, or a hub id; may be given "
        "several times",
    )
    parser.add_argument(
        "--features",
        action="append",
        required=True,
        type=parse_path,
        metavar="PATH",
        help="folder of a CLIP or DINOv2 model, or FID's Inception as .safetensors file; may be given several times",
    )
    parser.add_argument("--ema", metavar="DECAY", help="use the moving average of this decay, such as 0.999")
    parser.add_argument(
        "--max-images", type=parse_positive, metavar="N", help="use the first N samples of the validation set"
    )
    parser.add_argument("--cfg", type=parse_path, metavar="FILE", help="settings; those of the first run by default")
    parser.add_argument(
        "--out", type=parse_path, metavar="DIR", help="folder for images and features (default: quality/ in the run)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of text")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # DeepSpeed's
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help=OVERRIDES_HELP)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw and measure, and return the exit status (0 done, 1 failed, 2 wrong input)."""
    options = build_quality_parser().parse_intermixed_args(arguments)

    def work() -> None:
        announce("loading PyTorch and the libraries")
        from sdxl_trainer.train.quality.job import Request, run_quality

        request = Request(
            models=options.model,
            features=options.features,
            average=options.ema,
            max_images=options.max_images,
            cfg=options.cfg,
            out=options.out,
            overrides=options.overrides,
        )
        run_quality(request, as_json=options.json)

    return run_program(work, resumes=True)
