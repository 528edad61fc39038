"""Places in which the doctor's checks write: a run folder of their own, and an index that is deleted at the end."""

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from sdxl_trainer.configs.schema import Config, RunConfig
from sdxl_trainer.data.index.selection import get_cache_folder
from sdxl_trainer.data.stores.remote import is_remote

SCRATCH_NAME = "doctor"  # of the folder in the run folder in which checks write


@contextmanager
def open_scratch_run(run: RunConfig) -> Iterator[RunConfig]:
    """Yield a run in the folder `doctor` of a run's own folder. At the end only its list of bad samples is kept.

    If the folder cannot be created, it lies among the system's temporary files.
    """
    scratch = run.model_copy(update={"dir": run.folder, "name": SCRATCH_NAME})
    new_folders = [folder for folder in (run.folder, *run.folder.parents) if not folder.exists()]
    try:
        shutil.rmtree(scratch.folder, ignore_errors=True)
        scratch.folder.mkdir(parents=True)
    except OSError:
        new_folders = [Path(tempfile.mkdtemp(prefix="doctor-"))]
        scratch = run.model_copy(update={"dir": new_folders[0], "name": SCRATCH_NAME})
    try:
        yield scratch
    finally:
        if not (scratch.folder / "logs" / "bad_samples.jsonl").is_file():
            shutil.rmtree(scratch.folder, ignore_errors=True)
            remove_empty(new_folders)


@contextmanager
def leave_no_index(config: Config) -> Iterator[None]:
    """Delete the indexes that checks write in the context, in cache folders that have none yet.

    That of shards on a store stays: reading their headers again would take the start of training minutes.
    """
    folders = {get_cache_folder(config), *filter(None, [config.validation.cache_dir])}
    with ExitStack() as stack:
        for folder in () if any(map(is_remote, config.data.metadata)) else sorted(folders):
            stack.enter_context(_restore_folder(folder / "index"))
        yield


@contextmanager
def _restore_folder(folder: Path) -> Iterator[None]:
    """Delete a folder at the end, with those above it, if it did not exist before."""
    new_folders = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    finally:
        if folder in new_folders:
            shutil.rmtree(folder, ignore_errors=True)
            remove_empty(new_folders[1:])


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, the innermost first, up to the first that is not empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
