"""Run a launcher for the launch scripts: `python -m sdxl_trainer.launch.launcher torchrun ... PROGRAM --cfg x.yaml`.

The settings are checked first: the launcher and the libraries of a rank take seconds to load, and a mistake in a
setting needs neither. The program checks them again, together with the data and the model.

When a rank fails, it has already printed the reason. torchrun would add a traceback and a page about exit statuses,
which bury that reason. This module prints one line instead, which names the rank that ended first. Any other launcher
is executed unchanged.
"""

import argparse
import logging
import os
import signal
import sys
from itertools import pairwise

from loguru import logger

from sdxl_trainer.configs.language.translate import translate
from sdxl_trainer.configs.load import load_config
from sdxl_trainer.configs.paths import parse_path
from sdxl_trainer.configs.problems import UserInputError
from sdxl_trainer.launch.launcher_watch import stop_with_launcher
from sdxl_trainer.launch.status import STATUS_DONE, STATUS_WRONG_INPUT, record_status

# Scripts start launchers in the background, and bash makes such children ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


def print_setting_problems(words: list[str]) -> int:
    """Print the problems of the settings that a program's words name, if they name any.

    Returns:
        the exit status: 2 if there are problems, otherwise 0.

    Raises:
        argparse.ArgumentTypeError: `--cfg` is followed by no path, or by one that cannot be expanded.
    """
    file = find_settings(words)
    if file is None:
        return STATUS_DONE
    path = parse_path(file)
    logger.remove()  # the program logs which names have changed
    try:
        _, problems = load_config(path, [word for word in words if "=" in word and word[0] != "-"])
    except UserInputError as error:
        problems = error.problems
    if not problems:
        return STATUS_DONE
    sys.stderr.write(f"\n{UserInputError(problems).format()}\n\n")
    return STATUS_WRONG_INPUT


def find_settings(words: list[str]) -> str | None:
    """Return the file that follows `--cfg`, or None; an empty text if an option or nothing follows."""
    for word, following in pairwise([*words, ""]):
        if word == "--cfg":
            return "" if following.startswith("-") else following
        if word.startswith("--cfg="):
            return word.partition("=")[2]
    return None


def run_torchrun() -> int:
    """Run torchrun with this program's arguments.

    Returns:
        torchrun's exit status, which is 1 for every failure of a rank, or 128 + signal if a signal ended torchrun.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    from sdxl_trainer.launch.patches import ignore_repeated_signals

    quiet_torchrun()
    ignore_repeated_signals()
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        end = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with {failure.exitcode}"
        cure = "; the same command resumes" if failure.exitcode < 0 else ""
        message = f"torchrun: rank {rank} {end} before any other; its messages are above{cure}"
        sys.stderr.write(f"{translate(message)}\n")
        return 1
    except SignalException as request:
        return 128 + request.sigval
    return 0


def quiet_torchrun() -> None:
    """Turn off torchrun's lines about signals that it forwards and ranks that fail: ranks and `run_torchrun` name them.

    LOGLEVEL, which torchrun reads, keeps the user's choice.
    """
    for name in () if "LOGLEVEL" in os.environ else tuple(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def main(launcher: str, arguments: list[str]) -> int:
    """Check the settings, run the launcher, and return its exit status, or 2 for wrong settings."""
    program = next((place for place, word in enumerate(arguments) if word.endswith(".py")), len(arguments))
    try:
        status = print_setting_problems(arguments[program + 1 :])
    except argparse.ArgumentTypeError:  # the program's own parser explains the mistake, together with its usage
        os.execv(sys.executable, [sys.executable, *arguments[program:]])
    if status != STATUS_DONE:
        return record_status(status)
    sys.stderr.write(f"+ {launcher} {' '.join(arguments)}\n")
    sys.stderr.flush()
    if launcher != "torchrun":
        os.execvp(launcher, [launcher, *arguments])
    sys.argv = [launcher, *arguments]
    stop_with_launcher()
    return run_torchrun()


if __name__ == "__main__":
    # Ctrl-C then reaches the script alone, which forwards it once; a launcher that also got it from the terminal would
    # end its ranks by a second signal.
    os.setpgid(0, 0)
    try:
        sys.exit(main(sys.argv[1], sys.argv[2:]))
    except KeyboardInterrupt:  # before torchrun handles signals
        sys.exit(128 + signal.SIGINT)
