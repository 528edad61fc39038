"""The exit status, written down for the launch scripts: torchrun answers 1 whatever its ranks answer."""

import os
from pathlib import Path

STATUS_FILE_VARIABLE = "SDXL_TRAINER_STATUS_FILE"


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
