"""What both programs do around their work: arguments, exit statuses, and one clean message when something is wrong."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from sdxl_trainer.configs.problems import UserInputError

STATUS_DONE, STATUS_FAILED, STATUS_WRONG_INPUT = 0, 1, 2
# torchrun answers 1 whatever its ranks answer; the launch scripts read the true status from this file instead.
STATUS_FILE_VARIABLE = "SDXL_TRAINER_STATUS_FILE"
# A launcher kills all ranks when the first one leaves: the others give rank 0 this long to say why.
COURTESY_SECONDS = 10


def build_parser(description: str) -> argparse.ArgumentParser:
    """The arguments that both programs take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--cfg", type=Path, required=True, help="YAML file with the settings (docs/CONFIG.md)")
    parser.add_argument("--dry-run", action="store_true", help="check everything up to the first step, then stop")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # DeepSpeed's
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that override the file's")
    return parser


def run_program(work: Callable[[], None]) -> int:
    """Run `work` and turn how it ended into the exit status: 0 done, 2 the user's input is wrong, 1 failed.

    Any other exception is left to Python, whose traceback and status 1 say more than a summary would.
    """
    rank = int(os.environ.get("RANK", 0))
    try:
        work()
    except UserInputError as error:
        if rank == 0:
            sys.stderr.write(f"\n{error}\n\n")
            sys.stderr.flush()
        else:
            time.sleep(COURTESY_SECONDS)
        return _record(rank, STATUS_WRONG_INPUT)
    except BaseException:
        _record(rank, STATUS_FAILED)
        raise
    return _record(rank, STATUS_DONE)


def _record(rank: int, status: int) -> int:
    file = os.environ.get(STATUS_FILE_VARIABLE)
    if file and rank == 0:
        Path(file).write_text(str(status))
    return status
