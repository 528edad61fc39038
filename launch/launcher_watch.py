"""Stop with the launcher: without it nobody would end the ranks, and a second start would train beside them."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sdxl_trainer.configs.language.translate import translate
from sdxl_trainer.launch.signals import exit_at_once

SCRIPT_VARIABLE = "SDXL_TRAINER_SCRIPT"  # process of the launch script that the user started (child.sh)
LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")  # set by torchrun, and by DeepSpeed's launcher
POLL_SECONDS = 1.0
LAST_RESORT_SECONDS = 120.0  # from the request to stop to the end of a process that does not obey


def stop_with_launcher() -> None:
    """Send this process SIGTERM once its launcher or launch script ends, even if that was killed outright.

    A rank then finishes its step and saves. A process that was started by hand has no launcher: its shell may end.
    """
    launchers = list_launchers()
    if launchers:
        threading.Thread(target=_watch, args=(launchers,), name="launcher-watch", daemon=True).start()


def list_launchers() -> list[int]:
    """List the processes that must live as long as this one: its launcher, up to the launch script if there is one."""
    chain, process, script = [], os.getppid(), os.environ.get(SCRIPT_VARIABLE, "")
    while process:  # 0 is outside the container
        chain.append(process)
        if str(process) == script:
            return chain
        process = _read_parent(process)
    return chain[:1] if any(name in os.environ for name in LAUNCHER_VARIABLES) else []


def _read_parent(process: int) -> int:
    """Return the parent of a process, or 0 if it has ended or has none here."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return int(status.rpartition(")")[2].split()[1])  # the name in parentheses may hold anything


def _watch(launchers: Sequence[int]) -> None:
    """Wait until one of the processes has ended, then ask this process to stop."""
    try:
        wait_for_any_end(launchers)
    except OSError:  # a kernel before 5.3, or a container that forbids the call
        while os.getppid() == launchers[0]:
            time.sleep(POLL_SECONDS)
    if os.environ.get("RANK") == "0":
        with suppress(OSError):
            sys.stderr.write(f"{translate('the launcher has ended, so the ranks stop as on SIGTERM')}\n")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LAST_RESORT_SECONDS)
    exit_at_once(signal.SIGTERM)


def wait_for_any_end(processes: Sequence[int]) -> None:
    """Wait until one of the processes has ended.

    Raises:
        OSError: the system cannot wait for processes that are no children.
    """
    ended = select.poll()
    for process in processes:
        try:
            ended.register(os.pidfd_open(process), select.POLLIN)
        except ProcessLookupError:
            return
    ended.poll()
