"""Frame of every program: arguments, exit statuses, and one clear message when something is wrong."""

import argparse
import gc
import io
import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from sdxl_trainer.configs.language.arguments import TranslatedParser
from sdxl_trainer.configs.language.translate import translate
from sdxl_trainer.configs.paths import parse_path
from sdxl_trainer.configs.problems import FailedError, UserInputError, escape_controls
from sdxl_trainer.launch.failures import explain_failure
from sdxl_trainer.launch.launcher_watch import stop_with_launcher
from sdxl_trainer.launch.signals import Interrupted, InterruptedAlone, exit_on_signals
from sdxl_trainer.launch.status import (
    STATUS_DONE,
    STATUS_FAILED,
    STATUS_WRONG_INPUT,
    RankZeroError,
    clear_status,
    record_status,
)

# A launcher kills all ranks when the first one ends, so the others give rank 0 this long to print the reason.
RANK_ZERO_SECONDS = 10
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # before torch 2.9, and from then on
MAX_OPEN_FILES = 1 << 18
TRACKER_FILTER = "ignore:resource_tracker"
OVERRIDES_HELP = "settings that override the file's, such as optim.lr=1e-5"
DRY_RUN_HELP = "check everything up to the first step, then stop"
SETTINGS_HELP = "Every setting: docs/CONFIG.md, which `sdxl-trainer settings` prints."


def parse_positive(text: str) -> int:
    """Return a whole number of 1 or more, for `type` of an argument.

    Raises:
        argparse.ArgumentTypeError: the text is anything else.
    """
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError("must be a whole number of 1 or more")
    return int(text)


def require_checkout(program: str) -> None:
    """Exit and print the cure if Python imports a stale install instead of the checkout that holds `program`."""
    checkout, imported = Path(program).resolve().parent.parent, Path(__file__).resolve().parent.parent
    if checkout != imported:
        message = (
            f"Python imports sdxl_trainer from {imported}, not from {checkout};\n"
            f"run: pip uninstall -y sdxl-trainer && pip install -e {checkout}"
        )
        sys.exit(translate(message))


class RankParser(TranslatedParser):
    """An argument parser for ranks: only rank 0 prints, and the exit status is recorded."""

    def error(self, message: str) -> NoReturn:
        """Print usage and the mistake on rank 0, and exit with status 2."""
        record_status(STATUS_WRONG_INPUT)
        if not _is_rank_zero():
            time.sleep(RANK_ZERO_SECONDS)
            self.exit(STATUS_WRONG_INPUT)
        if message.startswith("unrecognized arguments: --"):
            message += "; settings are written without dashes, such as optim.lr=1e-5"
        super().error(message)

    def print_help(self, file: Any = None) -> None:
        """Print the help on rank 0."""
        if _is_rank_zero():
            super().print_help(file)


def announce(text: str) -> None:
    """Print a line on rank 0 like a log line, before the modules that log are loaded."""
    if _is_rank_zero():
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} INFO    {translate(text)}\n")
        sys.stderr.flush()


def build_parser(
    description: str, prog: str | None = None, examples: Sequence[str] = (), dry_run: str = DRY_RUN_HELP
) -> RankParser:
    """Build the parser of the arguments that the programs share; `dry_run` is the help of --dry-run, "" for none."""
    parser = RankParser(prog=prog, description=description, examples=examples, epilog=SETTINGS_HELP)
    parser.add_argument("--cfg", type=parse_path, required=True, metavar="FILE", help="YAML file with your settings")
    parser.set_defaults(dry_run=False)
    if dry_run:
        parser.add_argument("--dry-run", action="store_true", help=dry_run)
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # DeepSpeed's
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help=OVERRIDES_HELP)
    return parser


def run_program(work: Callable[[], None], resumes: bool = False) -> int:
    """Run `work` and return the exit status.

    0: done. 1: failed. 2: the user's input is wrong. 128 + signal: stopped on request, and
    everything done so far is saved.

    An error of storage or memory is explained in one line (launch/failures.py), and its traceback goes to the log file.
    Any other exception propagates: Python prints its traceback and exits with 1.

    Args:
        resumes: the same command continues a work that a signal ended at any place.
    """
    status = STATUS_FAILED
    record_status(status)  # holds if the process is killed
    prepare_process()
    try:
        status = _run(work, resumes)
    finally:
        if status != STATUS_DONE:
            _announce_failure(status)
    return status


def prepare_process() -> None:
    """Stop with the launcher, open many files, print any character, and leave no warning of a killed process.

    The launch scripts set PYTHONUTF8. Without it, files whose names are not ASCII cannot be found in another locale.
    """
    stop_with_launcher()
    allow_open_files()
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    if sys.getfilesystemencoding() != "utf-8" and _is_rank_zero():
        encoding = sys.getfilesystemencoding()
        message = f"the locale's file names are {encoding}, those of data are UTF-8: export PYTHONUTF8=1"
        sys.stderr.write(f"{translate(message)}\n")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a caption may hold characters that the locale does not know
    # A process of multiprocessing frees the semaphores of workers, and would warn that a killed rank has leaked them.
    filters = [*filter(None, os.environ.get("PYTHONWARNINGS", "").split(",")), TRACKER_FILTER]
    os.environ["PYTHONWARNINGS"] = ",".join(dict.fromkeys(filters))
    # Buckets of many sizes fragment the GPU memory that PyTorch reserves, unless its segments can grow.
    if not os.environ.keys() & set(ALLOCATOR_VARIABLES):
        release = tuple(int(number) for number in version("torch").split(".")[:2])
        os.environ[ALLOCATOR_VARIABLES[release >= (2, 9)]] = "expandable_segments:True"


def allow_open_files() -> None:
    """Raise the limit of open files: an index on a store has a file for each shard, and each one mapped is open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(MAX_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _is_news(record: logging.LogRecord) -> bool:
    """Return False for DeepSpeed's warning that there is no GPU, which the programs say in the user's language."""
    return "Setting accelerator to CPU" not in record.getMessage()


def _run(work: Callable[[], None], resumes: bool) -> int:
    try:
        with exit_on_signals(resumes):
            work()
    except UserInputError as error:
        if _is_rank_zero():
            sys.stderr.write(f"\n{error.format()}\n\n")
            sys.stderr.flush()
        else:
            time.sleep(RANK_ZERO_SECONDS)
        return record_status(STATUS_WRONG_INPUT)
    except InterruptedAlone as request:
        clear_status()  # the launch script knows whether the signal came from the user or because a rank had died
        message = f"{request}, and other ranks do not answer; the same command resumes from what is saved"
        sys.stderr.write(f"{translate(message)}\n")
        return 128 + request.signal_number
    except Interrupted as request:
        if _is_rank_zero():
            message = f"{request}; everything done so far is saved; the same command resumes"
            sys.stderr.write(f"{translate(message)}\n")
        return record_status(128 + request.signal_number)
    except RankZeroError as error:
        return record_status(error.status)
    except FailedError as error:
        sys.stderr.write(f"\n{escape_controls(translate(str(error)), keep_lines=True)}\n\n")
        return record_status(STATUS_FAILED)
    except (OSError, MemoryError, RuntimeError, UnicodeEncodeError) as error:
        explanation = explain_failure(error)
        if explanation is None:
            raise
        from sdxl_trainer.launch.logger import log_traceback  # takes time that `--help` does not need

        log_traceback()
        sys.stderr.write(f"\n{escape_controls(translate(explanation))}\n\n")
        return record_status(STATUS_FAILED)
    return record_status(STATUS_DONE)


def _is_rank_zero() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _announce_failure(status: int) -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Imports torch, which a single process may not need.
        from sdxl_trainer.launch.distributed import announce_rank_zero_failure

        announce_rank_zero_failure(status)


def end_program(status: int) -> NoReturn:
    """End the process with `status`, skipping the interpreter's shutdown.

    Threads of torch and its backends may abort an interpreter that is shutting down, and the status would be lost.
    The program has already closed all files and joined all threads whose results it keeps.
    """
    if status != STATUS_FAILED:
        gc.collect()  # frees semaphores of data workers, which multiprocessing would report as leaked
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
