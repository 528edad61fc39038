"""The program of the doctor: `bash launch/doctor.sh [--cfg x.yaml]`. Its help needs no library."""

import os
from collections.abc import Sequence

from sdxl_trainer.configs.language.arguments import TranslatedParser
from sdxl_trainer.configs.paths import parse_path
from sdxl_trainer.configs.problems import parse_count
from sdxl_trainer.launch.program import OVERRIDES_HELP, SETTINGS_HELP, run_program

DESCRIPTION = (
    "Examine the machine, your settings and your data before you train. Each line is ok or a note, or names a fault "
    "(WRONG) or a doubt (WARN) with its cure, or the next step (TO DO). Without --cfg only the machine is examined."
)
EXAMPLES = ("%(prog)s", "%(prog)s --cfg my.yaml", "%(prog)s --gpu-gb 24", "%(prog)s --cfg my.yaml --ranks 4")


def read_num_ranks() -> int | None:
    """Return the number of ranks in the environment variable NPROC, or None if it has none from 1."""
    number = os.environ.get("NPROC", "")
    return int(number) if number.isdecimal() and int(number) else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, print all findings, and return the exit status (0 no faults, 1 faults)."""
    parser = TranslatedParser(
        prog="bash launch/doctor.sh", description=DESCRIPTION, examples=EXAMPLES, epilog=SETTINGS_HELP
    )
    parser.add_argument("--cfg", type=parse_path, metavar="FILE", help="settings; without them, only the machine")
    parser.add_argument(
        "--ranks",
        type=parse_count,
        metavar="N",
        default=read_num_ranks(),
        help="number of ranks that will train (default: NPROC, else one per GPU, or 1 without GPUs)",
    )
    parser.add_argument(
        "--gpu-gb",
        type=parse_count,
        metavar="GB",
        help="memory of the GPU that each rank is to have (default: of this machine's)",
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help=OVERRIDES_HELP)
    options = parser.parse_intermixed_args(arguments)

    def work() -> None:
        from sdxl_trainer.launch.logger import quiet_libraries
        from sdxl_trainer.train.doctor.doctor import examine_all, print_findings

        quiet_libraries()
        print_findings(examine_all(options.cfg, options.overrides, options.ranks, options.gpu_gb))

    return run_program(work)
