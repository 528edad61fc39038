"""The exit status, written down for the launch scripts: torchrun answers 1 whatever its ranks answer."""

import os
from pathlib import Path

STATUS_DONE, STATUS_FAILED, STATUS_WRONG_INPUT = 0, 1, 2
STATUS_FILE_VARIABLE = "SDXL_TRAINER_STATUS_FILE"


class RankZeroError(RuntimeError):
    """Rank 0, which checks for all and tells people what is wrong, has failed. `status` is its exit status."""

    def __init__(self, status: int):
        self.status = status
        super().__init__(f"rank 0 ended with status {status}")


def record_status(status: int) -> int:
    """Write down the exit status of this node's first rank where the launch script looks for it, and return it."""
    _write(str(status))
    return status


def forget_status() -> None:
    """Leave the launch script to say how it ended: it knows whether a signal was meant for the job, or came from
    torchrun because another rank had died."""
    _write("")


def _write(text: str) -> None:
    file = os.environ.get(STATUS_FILE_VARIABLE)
    if file and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        Path(file).write_text(text)
