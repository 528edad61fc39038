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

SCRIPT_VARIABLE = "SDXL_TRAINER_SCRIPT"  # process and space of the launch script that the user started (child.sh)
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
    """List the processes that must live as long as this one: its launcher, up to the launch script if there is one.

    The script counts even if it is no parent: it was killed before this process could look for it, or it is Slurm's
    task that starts the processes. Some of the processes may have ended; 0 is one whose number is not known.
    """
    script = read_script()
    chain, process = [], os.getppid()
    while process:  # 0 is outside the container
        chain.append(process)
        if process == script:
            return chain
        process = _read_parent(process)
    if script is not None:
        return [script]
    if not chain or all(name not in os.environ for name in LAUNCHER_VARIABLES):
        return []
    return [0] if _adopts_orphans(chain[0]) else chain[:1]


def read_script() -> int | None:
    """Return the process number of the launch script, or None without one on this machine and in this container."""
    process, _, place = os.environ.get(SCRIPT_VARIABLE, "").partition(" ")
    return int(process) if process and place == read_process_space() else None


def read_process_space() -> str:
    """Return a name of the space in which process numbers are unique: namespace and start of the machine, if known."""
    names = ["", ""]
    with suppress(OSError):  # a sandbox without them
        names[0] = os.readlink("/proc/self/ns/pid")
        names[1] = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return " ".join(names)


def _adopts_orphans(process: int) -> bool:
    """Return whether a parent is not the launcher, which is a Python program of the same user, but took its place."""
    name = Path(f"/proc/{process}/comm").read_text(encoding="utf-8", errors="replace").strip()
    try:
        program = os.readlink(f"/proc/{process}/exe")
    except OSError:  # of another user
        program = ""
    return (process == 1 or name == "systemd") and not os.path.basename(program).startswith("python")


def _read_parent(process: int) -> int:
    """Return the parent of a process, or 0 if it has ended or has none here."""
    return int(status[1]) if (status := _read_status(process)) else 0


def _is_alive(process: int) -> bool:
    status = _read_status(process)
    return bool(status) and status[0] != "Z"  # ended, but its parent has not asked how


def _read_status(process: int) -> list[str]:
    """Return state, parent and more of a process, or nothing if it has ended."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return status.rpartition(")")[2].split()  # the name in parentheses may hold anything


def _watch(launchers: Sequence[int]) -> None:
    """Wait until one of the processes has ended, then ask this process to stop."""
    try:
        wait_for_any_end(launchers)
    except OSError:  # a kernel before 5.3, or a container that forbids the call
        while all(map(_is_alive, launchers)):
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
    if 0 in processes:
        return
    ended = select.poll()
    for process in processes:
        try:
            ended.register(os.pidfd_open(process), select.POLLIN)
        except ProcessLookupError:
            return
    ended.poll()
