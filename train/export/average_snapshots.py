"""Snapshots of power-function averages: `snapshots/step-N-length-L.safetensors` in the run folder, written and listed.

A file holds the trained weights by the engine's names, and in its metadata the facts that `train/convert.py
--ema-length` needs to sum snapshots up (rebuilt_average.py).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import torch
from loguru import logger

from sdxl_trainer.cache.models.single_file_check import NotSafetensorsError, read_safetensors_header
from sdxl_trainer.cache.models.single_file_names import Shape
from sdxl_trainer.cache.models.tensor_stream import TensorItem, write_safetensors
from sdxl_trainer.configs.schema import EmaConfig
from sdxl_trainer.launch.activity import ACTIVITY
from sdxl_trainer.launch.append_file import LossCount
from sdxl_trainer.launch.distributed import Ranks, broadcast_object, wait_for_ranks
from sdxl_trainer.train.engine.averages import name_length
from sdxl_trainer.train.engine.engine import Engine
from sdxl_trainer.train.engine.power_profiles import Profile

FOLDER = "snapshots"  # in the run folder
FACTS_KEY = "sdxl_trainer.snapshot"  # of the file's metadata
SNAPSHOT_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class SnapshotFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The facts of a snapshot. Readers ignore fields that they do not know."""

    step: int
    length: float
    updates: int  # of the average's clock (PowerClock)
    joined: int
    first_step: int
    dtype: str  # a key of SNAPSHOT_DTYPES


@dataclass(frozen=True)
class Snapshot:
    """A snapshot on disk."""

    file: Path
    facts: SnapshotFacts
    shapes: Mapping[str, Shape]  # of its weights

    @property
    def profile(self) -> Profile:
        """The profile of the average."""
        return Profile(self.facts.updates, self.facts.length)


def get_snapshot_file(run_folder: Path, step: int, length: float) -> Path:
    """Return the file of a snapshot."""
    return run_folder / FOLDER / f"step-{step:08d}-{name_length(length)}.safetensors"


def list_snapshots(run_folder: Path) -> list[Snapshot]:
    """List the whole snapshots of a run by step and length. A torn or foreign file is skipped with a warning."""
    found = []
    for file in sorted((run_folder / FOLDER).glob("step-*.safetensors")):
        try:
            header = read_safetensors_header(file)
            facts = msgspec.json.decode(header.metadata.get(FACTS_KEY, ""), type=SnapshotFacts)
            found.append(Snapshot(file, facts, header.shapes))
        except (OSError, NotSafetensorsError, msgspec.DecodeError, UnicodeEncodeError) as error:
            logger.warning("snapshot skipped: {}", error if str(file) in str(error) else f"{file}: {error}")
    return sorted(found, key=lambda snapshot: (snapshot.facts.step, snapshot.facts.length))


class SnapshotWriter:
    """Write the power-function averages of a live engine when they are due. All ranks hold one and call it together.

    Args:
        resumed_step: step at which this job starts. Later snapshots are those of a job that stopped after its last
            checkpoint; they are deleted when the first one is written.
    """

    def __init__(self, run_folder: Path, config: EmaConfig, ranks: Ranks, resumed_step: int):
        self._run_folder, self._config, self._ranks = run_folder, config, ranks
        self._resumed_step = resumed_step
        self._lost = LossCount(run_folder / FOLDER, "file")
        self._has_removed_later = False

    def is_due(self, step: int, is_last: bool) -> bool:
        """Return whether the averages are stored after a step."""
        return step > 0 and bool(self._config.lengths) and (is_last or step % self._config.snapshot_every_steps == 0)

    def write_due(
        self, engine: Engine, step: int, is_last: bool, break_off_if_stopped: Callable[[], None] = lambda: None
    ) -> None:
        """Write every average that is due after a step and not there yet.

        A file that cannot be written, as on a full disk, is a warning; the next start at this step tries again.

        Args:
            break_off_if_stopped: called after each gathered weight, equally often on all ranks; raises to end the work.
        """
        if not self.is_due(step, is_last):
            return
        if self._ranks.is_main and not self._has_removed_later:
            self._remove_later()
        files = {length: get_snapshot_file(self._run_folder, step, length) for length in self._config.lengths}
        missing: list[float] = broadcast_object([length for length, file in files.items() if not file.is_file()])
        for length in missing:
            self._write(files[length], engine, step, length, break_off_if_stopped)
        wait_for_ranks("the snapshots of averages")

    def close(self) -> None:
        """Report files that could not be written."""
        self._lost.end("is closed")

    def _remove_later(self) -> None:
        self._has_removed_later = True
        for file in (self._run_folder / FOLDER).glob("step-*.safetensors"):
            number = file.name.split("-")[1]
            if number.isdecimal() and int(number) > self._resumed_step:
                file.unlink(missing_ok=True)

    def _write(
        self, file: Path, engine: Engine, step: int, length: float, break_off_if_stopped: Callable[[], None]
    ) -> None:
        """Gather an average one weight at a time; rank 0 writes each before the next, so no rank holds them all."""
        names, average, num_gathered = engine.weights.trained_names, name_length(length), 0

        def gather(name: str) -> torch.Tensor:
            nonlocal num_gathered
            num_gathered += 1
            weight = engine.weights.gather(name, average)
            ACTIVITY.note()  # progress of every rank
            break_off_if_stopped()
            return weight

        if self._ranks.is_main:
            facts = build_facts(engine, step, length, self._config.snapshot_dtype)
            items = list_items(engine, SNAPSHOT_DTYPES[facts.dtype], gather)
            try:
                write_safetensors(file, list(items), {FACTS_KEY: msgspec.json.encode(facts).decode()})
                self._lost.end()
            except (OSError, ValueError) as error:  # a full disk, or a value beyond fp16
                self._lost.add(str(error))
        # After an error of rank 0, and on the other ranks: each gather is a collective.
        for name in names[num_gathered:]:
            gather(name)


def build_facts(engine: Engine, step: int, length: float, dtype: str) -> SnapshotFacts:
    """Build the facts of a live average."""
    ema = engine.weights.ema
    assert ema is not None, "averages of ema.lengths are kept"
    return SnapshotFacts(
        step=step,
        length=length,
        updates=ema.clock.updates,
        joined=ema.clock.joined[name_length(length)],
        first_step=ema.clock.first_step,
        dtype=dtype,
    )


def list_items(engine: Engine, dtype: torch.dtype, gather: Callable[[str], torch.Tensor]) -> Iterator[TensorItem]:
    """Yield an item for each trained weight, which `gather` reads when it is written."""
    for name, shape in engine.weights.layout.shapes.items():
        sides = tuple(shape)
        yield TensorItem(name=name, shape=sides, dtype=dtype, pieces=(partial(gather, name),), piece_shape=sides)
