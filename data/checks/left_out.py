"""Leave bad latents out of a run: verify latents at the start, report bad ones, and keep the list for resumes."""

from pathlib import Path

import numpy as np
import orjson
from loguru import logger

from sdxl_trainer.configs.problems import FailedError
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.checks.latent_files import find_bad_latents
from sdxl_trainer.data.files import open_atomic
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.index.selection import get_cache_folder


def leave_out_bad_latents(config: Config, index: Index, resuming: bool) -> None:
    """Verify latents by `data.verify_latents`, report bad ones, and store the rows that a new run leaves out.

    Bad latents are appended to `logs/bad_samples.jsonl` in the run folder. A resumed run keeps the rows that it left
    out at its start, and with them its order of batches. Latents that became bad later are skipped when they are read.

    Raises:
        FailedError: more latents are bad than `data.max_bad_fraction` allows.
    """
    bad = find_bad_latents(index, get_cache_folder(config), config.data.verify_latents)
    keys, summary = index.arrow_column("key"), index.summary
    reasons = [*summary.bad, *((keys[row].as_py(), reason) for row, reason in bad)]
    num_bad, num_samples = summary.num_bad + len(bad), len(index) + summary.num_bad
    log = config.run.folder / "logs" / "bad_samples.jsonl"
    if reasons:
        _append_bad_samples(log, reasons)
        logger.warning("{} bad latents are left out, first {}; see {}", num_bad, reasons[0][1], log)
    if num_bad > config.data.max_bad_fraction * num_samples:
        raise FailedError(
            f"{num_bad} of {num_samples} latents are bad, more than data.max_bad_fraction = "
            f"{config.data.max_bad_fraction:g}; {log} lists them"
        )
    file = get_left_out_file(config.run.folder, index)
    if not resuming or not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with open_atomic(file) as stream:
            np.save(stream, np.array([latents.row for latents in bad], np.int64))


def load_left_out_rows(run_folder: Path, index: Index) -> np.ndarray:
    """Load the rows that `leave_out_bad_latents` wrote for this run and index, [K] int64."""
    file = get_left_out_file(run_folder, index)
    return np.load(file, allow_pickle=False) if file.is_file() else np.empty(0, np.int64)


def get_left_out_file(run_folder: Path, index: Index) -> Path:
    """Return the file that lists the rows left out of a run. Its name changes with the rows of the index."""
    return run_folder / f"left_out-{index.hash_rows()}.npy"


def _append_bad_samples(log: Path, reasons: list[tuple[str, str]]) -> None:
    """Append (key, reason) pairs to a log of bad samples, as of step 0, or warn that they cannot be written."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            for key, reason in reasons:
                file.write(orjson.dumps({"step": 0, "key": key, "reason": reason}) + b"\n")
    except OSError as error:
        logger.warning("{} cannot be written: {}", log, error.strerror)
