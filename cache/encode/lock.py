"""One job at a time in a cache: two would finish and delete each other's shards."""

import fcntl
from pathlib import Path
from typing import IO

from sdxl_trainer.configs.problems import Problem, UserInputError


def lock_cache(folder: Path) -> IO[bytes]:
    """Hold the cache until the file that is returned is closed, at the latest when the process ends, however it ends.

    Raises:
        UserInputError: another job holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        problem = Problem("cache.dir", folder, "is being written by another job", "wait for it, or stop it")
        raise UserInputError([problem]) from None
    except OSError:
        pass  # a file system without locks: the job is not held up for that
    return file
