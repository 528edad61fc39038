"""Runs a launcher for the launch scripts: `python -m sdxl_trainer.launch.launcher torchrun ...`.

The ranks have said by then what went wrong. torchrun would follow them with its own traceback and a page about exit
statuses, under which their words are lost; from here one line tells which rank ended first. Any other launcher is
started as it is.
"""

import os
import signal
import sys

# Scripts start launchers in the background, and bash has their children ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


def run_torchrun() -> int:
    """Do what torchrun does with this program's arguments, and return the exit status: its own, which is 1 whatever the
    ranks answered, or 128 + signal where one has ended it."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        end = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with {failure.exitcode}"
        sys.stderr.write(f"torchrun: rank {rank} {end} before any other; what it said is above\n")
        return 1
    except SignalException as request:
        return 128 + request.sigval
    return 0


if __name__ == "__main__":
    launcher, *arguments = sys.argv[1:]
    if launcher != "torchrun":
        os.execvp(launcher, [launcher, *arguments])
    sys.argv = [launcher, *arguments]
    try:
        sys.exit(run_torchrun())
    except KeyboardInterrupt:  # before torchrun hears signals
        sys.exit(128 + signal.SIGINT)
