"""Run a launcher for the launch scripts: `python -m sdxl_trainer.launch.launcher torchrun ...`.

When a rank fails, it has already printed the reason. torchrun would add a traceback and a page about exit statuses,
which bury that reason. This module prints one line instead, which names the rank that ended first. Any other launcher
is executed unchanged.
"""

import os
import signal
import sys

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

    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        end = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with {failure.exitcode}"
        sys.stderr.write(f"torchrun: rank {rank} {end} before any other; its messages are above\n")
        return 1
    except SignalException as request:
        return 128 + request.sigval
    return 0


if __name__ == "__main__":
    launcher, *arguments = sys.argv[1:]
    if launcher != "torchrun":
        os.execvp(launcher, [launcher, *arguments])
    sys.argv = [launcher, *arguments]
    stop_with_launcher()
    try:
        sys.exit(run_torchrun())
    except KeyboardInterrupt:  # before torchrun handles signals
        sys.exit(128 + signal.SIGINT)
