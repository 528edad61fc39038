"""Leave bad latents out of a run: verify latents at the start, report bad ones, and keep the list for resumes."""

import io
import zlib
from pathlib import Path

import numpy as np
import orjson
from loguru import logger

from sdxl_trainer.configs.problems import FailedError, format_count
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.checks.bad_cures import describe_bad_cure
from sdxl_trainer.data.checks.bad_limit import are_too_many
from sdxl_trainer.data.checks.latent_files import find_bad_latents
from sdxl_trainer.data.files import write_atomic
from sdxl_trainer.data.formats.npz import NpzError, parse_npy_header
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.index.selection import get_cache_folder


class TooManyBadError(FailedError):
    """More latents are bad than `data.max_bad_fraction` allows.

    Attributes:
        rule: how many, with the first reason.
        cure: what repairs them.
        log: file that lists all, unless it could not be written.
    """

    def __init__(self, rule: str, cure: str, log: Path):
        self.rule, self.cure, self.log = rule, cure, log
        text = f"{rule}\ncure: {cure}"
        super().__init__(f"{text}\n{log} lists all" if log.is_file() else text)


def leave_out_bad_latents(config: Config, index: Index, resuming: bool) -> None:
    """Verify latents by `data.verify_latents`, report bad ones, and store the rows that a new run leaves out.

    Bad latents are appended to `logs/bad_samples.jsonl` in the run folder. A resumed run keeps the rows that it left
    out at its start, and with them its order of batches. Latents that became bad later are skipped when they are read.

    Raises:
        TooManyBadError: more latents are bad than `data.max_bad_fraction` allows.
    """
    bad = find_bad_latents(index, get_cache_folder(config), config.data.verify_latents)
    keys, summary = index.arrow_column("key"), index.summary
    reasons = [*summary.bad, *((keys[row].as_py(), reason) for row, reason in bad)]
    num_bad, num_samples = summary.num_bad + len(bad), len(index) + summary.num_bad
    log = config.run.folder / "logs" / "bad_samples.jsonl"
    if reasons:
        _append_bad_samples(log, reasons)
        number = format_count(num_bad, "bad latent")
        logger.warning("left out: {}, first {}; see {}", number, reasons[0][1], log)
    if are_too_many(num_bad, config.data.max_bad_fraction, num_samples):
        limit, first = config.data.max_bad_fraction, reasons[0][1]
        rule = (
            f"{num_bad} of {num_samples} latents are bad, more than data.max_bad_fraction = {limit:g} allows; "
            f"the first: {first}"
        )
        is_listed = index.has_values("sha256")
        listed = [reason for row, reason in bad if is_listed[row]]
        found = [reason for _, reason in summary.bad] + [reason for row, reason in bad if not is_listed[row]]
        raise TooManyBadError(rule, f"{describe_bad_cure(found, listed)}; or raise data.max_bad_fraction", log)
    file = get_left_out_file(config.run.folder, index)
    is_damaged = file.is_file() and _read_rows(file, len(index)) is None
    if is_damaged:
        cure = "if other latents were bad at the start of the run, the order of its batches changes"
        logger.warning("{} is damaged and written anew from the latents that are bad now; {}", file, cure)
    if is_damaged or not resuming or not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        _write_rows(file, np.array([latents.row for latents in bad], np.int64))


def load_left_out_rows(run_folder: Path, index: Index) -> np.ndarray:
    """Load the rows that `leave_out_bad_latents` wrote for this run and index, [K] int64; none if there is no file."""
    rows = _read_rows(get_left_out_file(run_folder, index), len(index))
    return np.empty(0, np.int64) if rows is None else rows


def _write_rows(file: Path, rows: np.ndarray) -> None:
    """Write rows as a .npy file, followed by the CRC-32 of its bytes."""
    buffer = io.BytesIO()
    np.save(buffer, rows)
    write_atomic(file, buffer.getvalue() + _compute_crc(buffer.getvalue()))


def _read_rows(file: Path, num_rows: int) -> np.ndarray | None:
    """Read the rows that `_write_rows` wrote, [K] int64; None if the file is missing or damaged.

    Releases before 0.3.0 wrote no CRC-32.

    Args:
        num_rows: of the index.
    """
    try:
        content = file.read_bytes()
        header = parse_npy_header(file.name, content)
        end = header.bytes + header.shape[0] * 8
        rows = np.frombuffer(content, np.int64, header.shape[0], header.bytes)
    except (OSError, NpzError, ValueError, IndexError):
        return None
    is_whole = content[end:] in (b"", _compute_crc(content[:end])) and header.dtype == np.int64
    return rows if is_whole and ((rows >= 0) & (rows < num_rows)).all() else None


def _compute_crc(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little")


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
