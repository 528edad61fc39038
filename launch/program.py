"""What both programs do around their work: arguments, exit statuses, and one clean message when something is wrong."""

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from sdxl_trainer.configs.problems import FailedError, UserInputError
from sdxl_trainer.launch.signals import Interrupted, exiting_on_signals
from sdxl_trainer.launch.status import (
    STATUS_DONE,
    STATUS_FAILED,
    STATUS_WRONG_INPUT,
    RankZeroError,
    record_status,
)

# A launcher kills all ranks when the first one leaves: the others give rank 0 this long to say why.
COURTESY_SECONDS = 10


def check_checkout(program: str) -> None:
    """Stop with the cure if a stale install, not the checkout that `program` lies in, is what Python imports."""
    checkout, imported = Path(program).resolve().parent.parent, Path(__file__).resolve().parent.parent
    if checkout != imported:
        sys.exit(
            f"Python imports sdxl_trainer from {imported}, not from {checkout};\n"
            f"run: pip uninstall -y sdxl-trainer && pip install -e {checkout}"
        )


class RankParser(argparse.ArgumentParser):
    """A command line that every rank reads: rank 0 alone says what is wrong with it, and the status is written down."""

    def error(self, message: str) -> NoReturn:
        """Tell usage and mistake, and exit as for any other wrong input."""
        record_status(STATUS_WRONG_INPUT)
        if not _is_rank_zero():
            time.sleep(COURTESY_SECONDS)
            self.exit(STATUS_WRONG_INPUT)
        super().error(message)

    def print_help(self, file: Any = None) -> None:
        """Once for all ranks."""
        if _is_rank_zero():
            super().print_help(file)


def build_parser(description: str) -> RankParser:
    """The arguments that both programs take."""
    parser = RankParser(description=description)
    parser.add_argument("--cfg", type=Path, required=True, help="YAML file with the settings (docs/CONFIG.md)")
    parser.add_argument("--dry-run", action="store_true", help="check everything up to the first step, then stop")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # DeepSpeed's
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that override the file's")
    return parser


def run_program(work: Callable[[], None]) -> int:
    """Run `work` and turn how it ended into the exit status.

    0 done, 2 the user's input is wrong, 1 failed, 128 + signal stopped on request with everything done so far kept.

    Any other exception is left to Python, whose traceback and status 1 say more than a summary would.
    """
    status = STATUS_FAILED
    record_status(status)  # until something better is known
    try:
        status = _run(work)
    finally:
        if status != STATUS_DONE:
            _excuse_rank_zero(status)
    return status


def _run(work: Callable[[], None]) -> int:
    try:
        with exiting_on_signals():
            work()
    except UserInputError as error:
        if _is_rank_zero():
            sys.stderr.write(f"\n{error}\n\n")
            sys.stderr.flush()
        else:
            time.sleep(COURTESY_SECONDS)
        return record_status(STATUS_WRONG_INPUT)
    except Interrupted as request:
        if _is_rank_zero():
            sys.stderr.write(f"{request}; everything done so far is kept, the same command goes on\n")
        return record_status(128 + request.signal_number)
    except RankZeroError as error:
        return record_status(error.status)
    except FailedError as error:
        sys.stderr.write(f"\n{error}\n\n")
        return record_status(STATUS_FAILED)
    return record_status(STATUS_DONE)


def _is_rank_zero() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _excuse_rank_zero(status: int) -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from sdxl_trainer.launch.distributed import excuse_rank_zero  # torch, which one process may not need

        excuse_rank_zero(status)


def end_program(status: int) -> NoReturn:
    """End the process with `status`, without the interpreter's own ending.

    Threads that torch and its backends leave behind may abort an interpreter that is taking itself apart, and the
    status would be lost. All that must be kept has been closed or joined by `work` itself.
    """
    if status != STATUS_FAILED:
        gc.collect()  # semaphores of data workers, in cycles, which multiprocessing would call leaked
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
