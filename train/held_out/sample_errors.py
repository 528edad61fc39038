"""Errors of each validation sample: `logs/validation/step-N.parquet`, written by a run and read by comparisons.

A line is one sample at one timestep with the weights, or with one moving average. Errors of x0 and of v are one scale
for all objectives (train/objective/diffusion.py). Imports no torch.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdxl_trainer.data.files import open_atomic, read_regular
from sdxl_trainer.data.images.bucket import Size

FOLDER = "validation"  # in the log folder
STEP_FILE = re.compile(r"step-(\d{8,18})\.parquet")
WEIGHTS = "weights"  # in the column `average`: the weights themselves
FACTS_KEY = b"sdxl_trainer"  # of the table's metadata
MAX_FILE_BYTES, MAX_LINES = 1 << 28, 1 << 24
# Bins of the logarithm of the SNR, the same for all runs: below -6, from -6 to -4, …, from 6 on. SDXL's schedule goes
# from -5.4 to 7.1, and down to minus infinity with zero terminal SNR.
LOG_SNR_EDGES = (-6, -4, -2, 0, 2, 4, 6)
NUM_BINS = len(LOG_SNR_EDGES) + 1
# Relative difference of a latent's mean square from which it counts as another latent: rounding is a thousandth of it.
LATENT_TOLERANCE = 1e-3
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("bucket_width", pa.int32()),  # px
        ("bucket_height", pa.int32()),
        ("source", pa.int32()),  # number of the entry of the metadata that the sample is from
        ("average", pa.string()),  # decay of the moving average, or "weights"
        ("turn", pa.int32()),  # number of the timestep among the sample's
        ("timestep", pa.float32()),
        ("log_snr", pa.float32()),
        ("log_snr_bin", pa.int8()),
        ("x0_power", pa.float32()),  # mean square of the latent that noise was added to
        ("loss", pa.float32()),  # of the objective, weighted and masked
        ("x0_error", pa.float32()),  # mean square over the latent; NaN: undefined, without signal
        ("v_error", pa.float32()),
    ]
)


class SampleError(NamedTuple):
    """The errors of one sample at one timestep. Fields are named as the columns of SCHEMA."""

    key: str
    bucket: Size
    source: int
    turn: int
    timestep: float
    log_snr: float
    x0_power: float
    loss: float
    x0_error: float
    v_error: float


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """The circumstances of a validation, stored with its errors. Readers ignore fields that they do not know."""

    step: int
    samples_seen: int
    seed: int  # `validation.seed`, of timesteps and noise
    timesteps_per_sample: int
    prediction: str


class ErrorTable(NamedTuple):
    """The errors of a validation."""

    facts: Facts
    columns: dict[str, np.ndarray]  # by the names of SCHEMA, each [lines]


def get_file(run_folder: Path, step: int) -> Path:
    """Return the file of a validation."""
    return run_folder / "logs" / FOLDER / f"step-{step:08d}.parquet"


def list_files(run_folder: Path) -> dict[int, Path]:
    """Return the files of a run's validations by their steps, in ascending order."""
    files = (run_folder / "logs" / FOLDER).glob("step-*.parquet")
    found = {int(match[1]): file for file in files if (match := STEP_FILE.fullmatch(file.name))}
    return dict(sorted(found.items()))


def find_bins(log_snr: np.ndarray) -> np.ndarray:
    """Return the bin of each logarithm of an SNR, [N] int8: the number of edges up to it."""
    return np.searchsorted(np.array(LOG_SNR_EDGES), log_snr, side="right").astype(np.int8)


def name_bin(number: int) -> str:
    """Return the name of a bin, such as `-6 … -4`, which needs no translation."""
    if number == 0:
        return f"< {LOG_SNR_EDGES[0]}"
    if number == len(LOG_SNR_EDGES):
        return f"≥ {LOG_SNR_EDGES[-1]}"
    return f"{LOG_SNR_EDGES[number - 1]} … {LOG_SNR_EDGES[number]}"


def write_sample_errors(run_folder: Path, errors: Mapping[str, Iterable[SampleError]], facts: Facts) -> None:
    """Write the errors of a validation, and delete those of later steps.

    A run that stopped after its last checkpoint leaves such files, and continues from before them.

    Args:
        errors: by the moving average; `WEIGHTS` stands for the weights.

    Raises:
        OSError: the file cannot be written.
    """
    for step, later in list_files(run_folder).items():
        if step > facts.step:
            later.unlink(missing_ok=True)
    lines = [(average, error) for average, parts in errors.items() for error in parts]
    columns = {name: [getattr(error, name) for _, error in lines] for name in SampleError._fields if name != "bucket"}
    columns["bucket_width"] = [error.bucket.width for _, error in lines]
    columns["bucket_height"] = [error.bucket.height for _, error in lines]
    columns["average"] = [average for average, _ in lines]
    columns["log_snr_bin"] = find_bins(np.array(columns["log_snr"])).tolist()
    schema = SCHEMA.with_metadata({FACTS_KEY: msgspec.json.encode(facts)})
    file = get_file(run_folder, facts.step)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open_atomic(file) as stream:
        pq.write_table(pa.table(columns, schema), stream, compression="zstd")


def read_sample_errors(file: Path) -> ErrorTable:
    """Read the errors of a validation.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file holds no such table; the message names it.
    """
    content = read_regular(file, MAX_FILE_BYTES).content
    try:
        parquet = pq.ParquetFile(pa.BufferReader(content))
        if parquet.metadata.num_rows > MAX_LINES:
            raise ValueError(f"has {parquet.metadata.num_rows:,} lines, more than {MAX_LINES:,}")
        facts = msgspec.json.decode((parquet.schema_arrow.metadata or {}).get(FACTS_KEY, b""), type=Facts)
        table = parquet.read(SCHEMA.names).cast(SCHEMA)
        if any(table.column(name).null_count for name in SCHEMA.names):
            raise ValueError("has empty cells")
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise ValueError(f"{file} holds no validation errors: {error}") from error
    return ErrorTable(facts, {name: table.column(name).to_numpy() for name in SCHEMA.names})
