"""Exit statuses, and a file that passes them to the launch scripts: torchrun exits with 1 for every failure."""

import os
from pathlib import Path

STATUS_DONE, STATUS_FAILED, STATUS_WRONG_INPUT = 0, 1, 2
STATUS_FILE_VARIABLE = "SDXL_TRAINER_STATUS_FILE"


class RankZeroError(RuntimeError):
    """Rank 0, which checks settings and data for all ranks, has failed. `status` is its exit status."""

    def __init__(self, status: int):
        self.status = status
        super().__init__(f"rank 0 ended with status {status}")


def record_status(status: int) -> int:
    """Write the exit status of this node's first rank to the launch script's file, and return the status."""
    _write(str(status))
    return status


def clear_status() -> None:
    """Clear the recorded status, so that the launch script derives it.

    The script knows whether a signal was sent to the job, or by torchrun because another rank had died.
    """
    _write("")


def _write(text: str) -> None:
    file = os.environ.get(STATUS_FILE_VARIABLE)
    if file and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        Path(file).write_text(text, encoding="utf-8")
