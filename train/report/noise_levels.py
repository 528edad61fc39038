"""The file with the learned weights and the adaptive timesteps of a run, for its report. Imports no torch."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import orjson

from sdxl_trainer.configs.language.translate import translate
from sdxl_trainer.data.files import read_regular, write_atomic

FILE = "noise_levels.json"  # in the report folder
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class NoiseLevelCurves:
    """Curves over the timesteps; empty lists for what a run does not learn."""

    timesteps: list[float]
    weights: list[float]  # learned weight of the loss at each of `timesteps`
    edges: list[float]  # timesteps between the bins of adaptive timesteps, first and last included
    frequencies: list[float]  # of each bin, relative to that without adaptive timesteps


def write_noise_levels(folder: Path, curves: NoiseLevelCurves | None) -> None:
    """Write the file into a report folder, or delete that of earlier settings.

    Raises:
        OSError: the file cannot be written.
    """
    if curves is None:
        (folder / FILE).unlink(missing_ok=True)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / FILE, orjson.dumps(asdict(curves)))


def read_noise_levels(folder: Path) -> NoiseLevelCurves | None:
    """Read the file; None if it is missing or damaged."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        content = orjson.loads(read_regular(file, MAX_BYTES).content)
        curves = NoiseLevelCurves(**{name: [float(value) for value in values] for name, values in content.items()})
        is_whole = len(curves.timesteps) == len(curves.weights) and len(curves.edges) in (
            0,
            len(curves.frequencies) + 1,
        )
        if not is_whole or not np.isfinite(np.concatenate(list(asdict(curves).values()))).all():
            raise ValueError("its curves are not complete")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        message = f"{file} is damaged and left out; the next start of the run writes it anew: {error}"
        sys.stderr.write(f"{translate(message)}\n")
        return None
    return curves
