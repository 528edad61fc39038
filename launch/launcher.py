"""Run a launcher for the launch scripts: `python -m sdxl_trainer.launch.launcher torchrun ...`.

When a rank fails, it has already printed the reason. torchrun would add a traceback and a page about exit statuses,
which bury that reason. This module prints one line instead, which names the rank that ended first. Any other launcher
is executed unchanged.
"""

import logging
import os
import signal
import sys

from sdxl_trainer.configs.language.translate import translate
from sdxl_trainer.launch.launcher_watch import stop_with_launcher

# Scripts start launchers in the background, and bash makes such children ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


def run_torchrun() -> int:
    """Run torchrun with this program's arguments.

    Returns:
        torchrun's exit status, which is 1 for every failure of a rank, or 128 + signal if a signal ended torchrun.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    quiet_torchrun()
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


if __name__ == "__main__":
    launcher, *arguments = sys.argv[1:]
    # Ctrl-C then reaches the script alone, which forwards it once; a launcher that also got it from the terminal would
    # end its ranks by a second signal.
    os.setpgid(0, 0)
    if launcher != "torchrun":
        os.execvp(launcher, [launcher, *arguments])
    sys.argv = [launcher, *arguments]
    stop_with_launcher()
    try:
        sys.exit(run_torchrun())
    except KeyboardInterrupt:  # before torchrun handles signals
        sys.exit(128 + signal.SIGINT)
