"""The program that trains a grid of settings and compares them. Its help needs no library."""

from collections.abc import Sequence

from sdxl_trainer.configs.language.arguments import TranslatedParser
from sdxl_trainer.configs.paths import parse_path
from sdxl_trainer.launch.program import OVERRIDES_HELP, SETTINGS_HELP, parse_positive, run_program

DESCRIPTION = (
    "Train a grid of settings from one start, with the same data, noise and order in every arm, and compare them. The "
    "same command resumes. Ctrl-C saves the runs at work and stops."
)
EXAMPLES = (
    "%(prog)s --cfg my.yaml --vary optim.lr=1e-5,2e-5 --dry-run",
    "%(prog)s --cfg my.yaml --vary optim.lr=1e-5,2e-5 --vary objective.weighting=none,min_snr --budget-steps 2000",
)
DEFAULT_SEEDS = 3


def build_ablation_parser() -> TranslatedParser:
    """Build the parser of the command line."""
    parser = TranslatedParser(
        prog="bash launch/ablate.sh",
        description=DESCRIPTION,
        examples=EXAMPLES,
        epilog=f"docs/EVIDENCE.md explains how to read the result. {SETTINGS_HELP}",
    )
    parser.add_argument("--cfg", type=parse_path, required=True, metavar="FILE", help="YAML file with your settings")
    parser.add_argument(
        "--vary",
        action="append",
        required=True,
        metavar="KEY=A,B",
        help="a setting and its values; several of them are combined with each other",
    )
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="KEY=A",
        help="value of a varied setting that the others are compared with (default: its first)",
    )
    parser.add_argument(
        "--seeds", type=parse_positive, default=DEFAULT_SEEDS, metavar="N", help="runs of each arm (default: 3)"
    )
    parser.add_argument(
        "--budget-steps", type=parse_positive, metavar="N", help="optimizer steps of every run, as train.max_steps"
    )
    parser.add_argument("--name", default="", help="folder of the runs, in run.dir (default: <run.name>-ablation)")
    parser.add_argument(
        "--per-gpu", action="store_true", help="train a run on each GPU, instead of one run after the other on all"
    )
    parser.add_argument(
        "--keep-hopeless",
        action="store_true",
        help="train every run to its end. Without this, an arm is stopped when two validations in a row, after a "
        "quarter of its steps, show its v error to be more than 10 %% above the baseline's",
    )
    parser.add_argument("--dry-run", action="store_true", help="check the settings and list the runs, then stop")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help=OVERRIDES_HELP)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and compare, and return the exit status (0 done, 1 failed, 2 wrong input, 128 + signal stopped)."""
    options = build_ablation_parser().parse_intermixed_args(arguments)

    def work() -> None:
        from sdxl_trainer.train.ablation.plan import Request
        from sdxl_trainer.train.ablation.study import run_study

        request = Request(
            cfg=options.cfg,
            vary=options.vary,
            baseline=options.baseline,
            num_seeds=options.seeds,
            name=options.name,
            budget_steps=options.budget_steps,
            per_gpu=options.per_gpu,
            keep_hopeless=options.keep_hopeless,
            overrides=options.overrides,
        )
        run_study(request, dry_run=options.dry_run)

    return run_program(work)
