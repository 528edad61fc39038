"""The state that a checkpoint holds, read parameter by parameter, for resharding and for programs that do not train.

Each rank saves, beside DeepSpeed's own files, its layout: which part of which parameter lies where in its flat tensors.
Files are mapped into memory, so only the parts that are asked for are read from disk.
"""

import pickle
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.train.engine.layout import Fragment, Layout
from sdxl_trainer.train.engine.patches import SAFE_TYPES
from sdxl_trainer.train.engine.quantised import QuantisedMoment, join_moments
from sdxl_trainer.train.optim.schedule_free import Z, compute_average, find_average_share

STATE_TAG = "state"  # name of DeepSpeed's folder within a checkpoint
AVERAGE = "average "  # prefix of the keys of moving averages, which have a file of their own
MASTER = "master"  # stands for the fp32 weight itself among the keys of the optimizer's state


# torch.load raises all of these on damaged files.
LOAD_ERRORS = (
    *(OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError),
    *(ArithmeticError, MemoryError, pickle.UnpicklingError, struct.error),
)


class ReshardingError(ValueError):
    """The saved state cannot be loaded by these ranks; the message states the reason."""


@dataclass
class Shard:
    """DeepSpeed's files of one rank as numbered flat tensors, in one form for every ZeRO stage.

    `model` is the content of the file with the module's weights, None on ranks that do not write one.
    `optimizer_state` is the state dict of DeepSpeed's optimizer, which lies in the model file under stage 0, otherwise
    in the optimizer file.
    """

    layout: Layout
    model: dict[str, Any] | None
    optimizer_state: dict[str, Any]

    @property
    def masters(self) -> list[torch.Tensor]:
        """The master weights, one tensor for each of the layout's flats."""
        for key in ("single_partition_of_fp32_groups", "fp32_flat_groups", "fp32_groups_flat"):
            if key in self.optimizer_state:
                return list(self.optimizer_state[key])
        if "fp32_groups" in self.optimizer_state:
            return [tensor for group in self.optimizer_state["fp32_groups"] for tensor in group]
        assert self.model is not None, "without ZeRO every file holds the module"
        return [self.model["module"][flat.fragments[0].name] for flat in self.layout.flats]

    @property
    def base(self) -> dict[str, Any]:
        """State dict of the wrapped torch optimizer: `state` by number of the flat tensor, and `param_groups`."""
        for key in ("base_optimizer_state", "optimizer_state_dict"):
            if key in self.optimizer_state:
                return self.optimizer_state[key]
        return self.optimizer_state

    def read_state(self, number: int) -> dict[str, Any]:
        """Return the optimizer's state of a flat tensor, 8-bit moments as `QuantisedMoment`."""
        return join_moments(self.base["state"].get(number, {}))

    def count_group_masters(self) -> list[int]:
        """Count the flat tensors of each parameter group."""
        return [len(group["params"]) for group in self.base["param_groups"]]

    def find_group(self, number: int) -> dict[str, Any]:
        """Return the parameter group of a flat tensor."""
        return next(group for group in self.base["param_groups"] if number in group["params"])


def build_shard(layout: Layout, files: Mapping[str, Any]) -> Shard:
    """Build a Shard from a rank's files (name → content).

    Raises:
        ReshardingError: no file holds an optimizer state.
    """
    model = next((content for name, content in files.items() if name.endswith("model_states.pt")), None)
    zero = next((content for name, content in files.items() if name.endswith("optim_states.pt")), None)
    optimizer_state = zero["optimizer_state_dict"] if zero is not None else (model or {}).get("optimizer")
    if optimizer_state is None:
        raise ReshardingError(f"rank {layout.rank} saved no optimizer state")
    return Shard(layout, model, optimizer_state)


class Place(NamedTuple):
    """A fragment of a parameter, in flat tensor `number` of a rank."""

    rank: int
    number: int
    fragment: Fragment


class SavedState:
    """All ranks' shards of a checkpoint, read by parameter.

    Args:
        folder: DeepSpeed's folder within the checkpoint.
        read_file: `map_state_file` or `load_state_file`.

    Raises:
        ReshardingError: the layout of a rank is missing.
    """

    def __init__(self, folder: Path, read_file: Callable[[Path], Any]):
        self._folder = folder
        self._read_file = lru_cache(maxsize=None)(read_file)
        self._names = sorted(path.name for path in folder.glob("*_states.pt"))
        self._shards: dict[int, Shard] = {}
        self.layouts = [Layout.from_plain(read_file(path)) for path in sorted(folder.glob("layout_rank_*.pt"))]
        if not self.layouts or len(self.layouts) < self._count_needed():
            raise ReshardingError(f"{folder} lacks the layouts of some ranks; it holds {len(self.layouts)}")
        self.shapes = self.layouts[0].shapes
        self._places: dict[str, list[Place]] = {}
        for rank, layout in enumerate(self._distinct_layouts()):
            for number, flat in enumerate(layout.flats):
                for fragment in flat.fragments:
                    self._places.setdefault(fragment.name, []).append(Place(rank, number, fragment))

    @property
    def world_size(self) -> int:
        """Number of ranks that saved."""
        return self.layouts[0].world_size

    def has(self, name: str) -> bool:
        """Return whether the parameter was trained, and so has a master weight."""
        return name in self._places

    def load_shard(self, rank: int) -> Shard:
        """Return a rank's files. With `map_state_file`, a tensor is read from disk only when it is used."""
        if rank not in self._shards:
            names = [name for name in self._names if _belongs_to(name, rank)]
            mine = {name: self._read_file(self._folder / name) for name in names}
            self._shards[rank] = build_shard(self.layouts[rank], mine)
        return self._shards[rank]

    def read(self, name: str, key: str = MASTER, start: int = 0, numel: int | None = None) -> torch.Tensor:
        """Return `numel` values of a parameter, or of the optimizer's state `key` for it, from element `start` on.

        Raises:
            ReshardingError: the files do not hold all of them.
        """
        numel = self.count_values(name) - start if numel is None else numel
        result, filled = None, 0
        for rank, number, fragment in self._places[name]:
            first, last = max(start, fragment.start), min(start + numel, fragment.start + fragment.numel)
            if first >= last:
                continue
            flat, shift = self._get_flat(rank, number, key), fragment.offset - fragment.start
            if isinstance(flat, QuantisedMoment):
                part = flat.read(first + shift, last + shift)
            else:
                part = flat.reshape(-1)[first + shift : last + shift]
            if result is None:
                result = torch.empty(numel, dtype=part.dtype)
            result[first - start : last - start] = part
            filled += last - first
        if result is None or filled != numel:
            raise ReshardingError(f"{self._folder} holds {filled} of {numel} values of {name} ({key})")
        return result

    def read_whole(self, name: str, key: str = MASTER) -> torch.Tensor:
        """Return a parameter's master weight, or what else `key` names, in its own shape."""
        return self.read(name, key).reshape(self.shapes[name])

    def read_model(self, name: str) -> torch.Tensor:
        """Return a parameter of the trained model: its master weight, or the average of a schedule-free optimizer."""
        rank, number, _ = self._places[name][0]
        shard, whole = self.load_shard(rank), self.read_whole(name)
        share = find_average_share(shard.base["param_groups"])
        if share is None or Z not in shard.read_state(number):
            return whole
        return compute_average(whole, {Z: self.read_whole(name, Z)}, share)

    def count_values(self, name: str) -> int:
        """Return the number of elements of a whole parameter."""
        return torch.Size(self.shapes[name]).numel()

    def find_flat(self, names: Iterable[str]) -> tuple[Shard, int] | None:
        """Find the flat tensor that holds the first of the parameters that was trained; return its shard and number."""
        for name in names:
            if name in self._places:
                rank, number, _ = self._places[name][0]
                return self.load_shard(rank), number
        return None

    def find_table(self, names: Iterable[str], key: str) -> torch.Tensor | None:
        """Return the code table of the optimizer's state `key`; None if it was in 8 bit for none of the parameters."""
        places = {(place.rank, place.number) for name in names for place in self._places.get(name, ())}
        states = (self.load_shard(rank).read_state(number).get(key) for rank, number in sorted(places))
        return next((state.table for state in states if isinstance(state, QuantisedMoment)), None)

    def read_averages(self, rank: int = 0) -> dict[str, Any]:
        """Return a rank's `averages` by name, as flat tensors, and their counters; empty if none were kept."""
        path = self._folder / f"ema_rank_{rank:05d}.pt"
        return self._read_file(path) if path.is_file() else {"num_updates": 0, "averages": {}}

    def _get_flat(self, rank: int, number: int, key: str) -> "torch.Tensor | QuantisedMoment":
        if key.startswith(AVERAGE):
            return self.read_averages(rank)["averages"][key.removeprefix(AVERAGE)][number]
        shard = self.load_shard(rank)
        return shard.masters[number] if key == MASTER else shard.read_state(number)[key]

    def _distinct_layouts(self) -> list[Layout]:
        """Return the layouts whose values differ. Without ZeRO all ranks hold the same, so the first suffices."""
        return self.layouts if self.layouts[0].zero_stage else self.layouts[:1]

    def _count_needed(self) -> int:
        return self.layouts[0].world_size if self.layouts[0].zero_stage else 1


def open_weights(checkpoint: Path, average: str | None = None) -> dict[str, Callable[[], torch.Tensor]]:
    """Map the name of each trained parameter, such as `unet.conv_in.weight`, to a function that reads it in fp32.

    Args:
        average: read the moving average of this name; `check_average` finds one that is missing.
    """
    saved = SavedState(checkpoint / STATE_TAG, map_state_file)
    if average:
        return {name: partial(saved.read_whole, name, AVERAGE + average) for name in saved.shapes}
    return {name: partial(saved.read_model, name) for name in saved.shapes}


def check_average(checkpoint: Path | None, average: str | None) -> Iterator[Problem]:
    """Yield a problem if the checkpoint does not hold the moving average of the command line's `--ema`."""
    if average is None:
        return
    if checkpoint is None:
        yield Problem("--ema", average, "needs a checkpoint, but the model is not one", "leave it out")
        return
    kept = list(SavedState(checkpoint / STATE_TAG, map_state_file).read_averages()["averages"])
    if average not in kept:
        cure = f"give one of {', '.join(kept)}" if kept else "leave it out: the checkpoint holds no averages"
        yield Problem("--ema", average, "is not an average in the checkpoint", cure)


def load_state_file(path: Path) -> Any:
    """Load one of the checkpoint's `.pt` files into memory.

    Raises:
        ReshardingError: the file is missing or damaged.
    """
    return _load_tensors(path, mapped=False)


def map_state_file(path: Path) -> Any:
    """Like `load_state_file`, but with tensors mapped from disk, which are read only where they are used."""
    return _load_tensors(path, mapped=True)


def _load_tensors(path: Path, mapped: bool) -> Any:
    try:
        with torch.serialization.safe_globals(SAFE_TYPES):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except LOAD_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ReshardingError(f"{path} cannot be read: {reason}") from None


def _belongs_to(file: str, rank: int) -> bool:
    """Return whether one of DeepSpeed's files belongs to a rank. Files without a rank in their name are rank 0's."""
    if "pp_rank_" not in file:
        return rank == 0
    return file.split("pp_rank_")[1].split("_")[0] == str(rank)
