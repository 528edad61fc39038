"""Log lines: the console on rank 0 (warnings of the others too), one file per rank in the run's log folder."""

import logging
import os
import sys
from pathlib import Path

from loguru import logger

CONSOLE_FORMAT = "<dim>{time:HH:mm:ss}</dim> <level>{level: <7}</level> {message}"
RANK_FORMAT = "<dim>{time:HH:mm:ss}</dim> <level>{level: <7}</level> [rank {extra[rank]}] {message}"
FILE_FORMAT = "{time:YYYY-MM-DD HH:mm:ss.SSS} {level: <7} [rank {extra[rank]}] {name}: {message}"


def init_logger(rank: int, level: str = "INFO", log_folder: Path | None = None, name: str = "train") -> None:
    """Send log lines of this process to the console and, if a folder is given, to `<name>.log` there.

    Rank 0 writes `<name>.log`, rank r `<name>-rank<r>.log`. Files get every level.
    """
    _quiet_libraries()
    logger.remove()
    logger.configure(extra={"rank": rank})
    logger.add(sys.stderr, format=CONSOLE_FORMAT if rank == 0 else RANK_FORMAT, level=level if rank == 0 else "WARNING")
    if log_folder is not None:
        log_folder.mkdir(parents=True, exist_ok=True)
        file = log_folder / (f"{name}.log" if rank == 0 else f"{name}-rank{rank}.log")
        logger.add(file, format=FILE_FORMAT, level="DEBUG")


def _quiet_libraries() -> None:
    """Keep progress bars and notes of libraries off the console; their warnings and errors stay.

    Must come before they are imported: they read their environment then.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    for name in ("DeepSpeed", "torch.distributed", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
