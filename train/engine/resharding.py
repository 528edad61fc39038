"""The saved state taken apart parameter by parameter, and put together for another number of ranks or ZeRO stage.

Each rank saves, beside DeepSpeed's own files, its layout: which part of which parameter lies where in its flat tensors.
A rank that resumes with another layout maps the old files into memory and reads just the parts that are its own, so
there is no conversion beforehand, nobody waits for it, and it needs no space on disk.

DeepSpeed's universal checkpoints are made for the same purpose. They are not used because their converter writes the
whole state a second time first, knows only the two moments of Adam, has no stage 0, and under stage 3 gives every
parameter group the settings of the first one.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from sdxl_trainer.train.engine.layout import Flat, Layout, Piece
from sdxl_trainer.train.engine.quantised import MIN_QUANTISED, Quantised, list_moments, list_parts, quantise

AVERAGE = "average "  # begins the keys of moving averages, which have a file of their own
MASTER = "master"  # stands for the fp32 weight itself among the keys of the optimizer's state
# What else of the optimizer's own file goes with the run and not with the settings.
LOSS_SCALING = ("loss_scaler", "dynamic_loss_scale", "overflow", "cur_scale", "cur_iter", "last_overflow_iter")


class ReshardingError(ValueError):
    """The saved state cannot be put together for these ranks; the message says what stands in the way."""


@dataclass
class Shard:
    """One rank's files of DeepSpeed's, whatever the stage, seen as numbered flat tensors.

    `model` is the file with the module's weights, None on ranks that do not write one; `owner` is the dict with the
    optimizer's part: the model file itself under stage 0, else what the optimizer file holds.
    """

    layout: Layout
    model: dict[str, Any] | None
    owner: dict[str, Any]

    @property
    def masters(self) -> list[torch.Tensor]:
        """The master weights, one tensor per flat."""
        for key in ("single_partition_of_fp32_groups", "fp32_flat_groups", "fp32_groups_flat"):
            if key in self.owner:
                return list(self.owner[key])
        if "fp32_groups" in self.owner:
            return [tensor for group in self.owner["fp32_groups"] for tensor in group]
        assert self.model is not None, "without ZeRO every file holds the module"
        return [self.model["module"][flat.pieces[0].name] for flat in self.layout.flats]

    @property
    def base(self) -> dict[str, Any]:
        """State dict of the optimizer within DeepSpeed's: `state` by number of the flat tensor, and `param_groups`."""
        for key in ("base_optimizer_state", "optimizer_state_dict"):
            if key in self.owner:
                return self.owner[key]
        return self.owner

    def read_state(self, number: int) -> dict[str, Any]:
        """The optimizer's state of a flat tensor; moments in 8 bit as `Quantised`."""
        return list_moments(self.base["state"].get(number, {}))

    def find_group(self, number: int) -> dict[str, Any]:
        """The parameter group that a flat tensor belongs to."""
        return next(group for group in self.base["param_groups"] if number in group["params"])


def build_shard(layout: Layout, files: Mapping[str, Any]) -> Shard:
    """A rank's files (name → content) as a Shard."""
    model = next((content for name, content in files.items() if name.endswith("model_states.pt")), None)
    zero = next((content for name, content in files.items() if name.endswith("optim_states.pt")), None)
    owner = zero["optimizer_state_dict"] if zero is not None else (model or {}).get("optimizer")
    if owner is None:
        raise ReshardingError(f"rank {layout.rank} saved no optimizer state")
    return Shard(layout, model, owner)


class SavedState:
    """All ranks' shards of a checkpoint, read by parameter.

    Args:
        folder: DeepSpeed's folder within the checkpoint.
        read_file: reads one of its files, its tensors mapped from disk.
    """

    def __init__(self, folder: Path, read_file: Callable[[Path], Any]):
        self._folder = folder
        self._read_file = lru_cache(maxsize=None)(read_file)
        self._names = sorted(path.name for path in folder.glob("*_states.pt"))
        self._shards: dict[int, Shard] = {}
        self.layouts = [Layout.from_plain(read_file(path)) for path in sorted(folder.glob("layout_rank_*.pt"))]
        if not self.layouts or len(self.layouts) < self._count_needed():
            raise ReshardingError(f"{folder} holds {len(self.layouts)} of the ranks' layouts")
        self.shapes = self.layouts[0].shapes
        self._places: dict[str, list[tuple[int, int, Piece]]] = {}
        for index, layout in enumerate(self._distinct_layouts()):
            for number, flat in enumerate(layout.flats):
                for piece in flat.pieces:
                    self._places.setdefault(piece.name, []).append((index, number, piece))

    @property
    def world_size(self) -> int:
        """Number of ranks that saved."""
        return self.layouts[0].world_size

    def has(self, name: str) -> bool:
        """Whether the parameter was trained, and so has a master weight."""
        return name in self._places

    def load_shard(self, rank: int) -> Shard:
        """A rank's files. Only its own tensors are read from disk, and those only when they are used."""
        if rank not in self._shards:
            names = [name for name in self._names if _belongs_to(name, rank)]
            mine = {name: self._read_file(self._folder / name) for name in names}
            self._shards[rank] = build_shard(self.layouts[rank], mine)
        return self._shards[rank]

    def read(self, name: str, key: str = MASTER, start: int = 0, numel: int | None = None) -> torch.Tensor:
        """`numel` values of a parameter, or of the optimizer's state `key` for it, from element `start` on.

        Raises:
            ReshardingError: the files do not hold all of them.
        """
        numel = self.count_values(name) - start if numel is None else numel
        result, filled = None, 0
        for index, number, piece in self._places[name]:
            first, last = max(start, piece.start), min(start + numel, piece.start + piece.numel)
            if first >= last:
                continue
            flat, shift = self._get_flat(index, number, key), piece.offset - piece.start
            if isinstance(flat, Quantised):
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
        """A parameter's master weight, or what else `key` names, in its own shape."""
        return self.read(name, key).reshape(self.shapes[name])

    def count_values(self, name: str) -> int:
        """Elements of a whole parameter."""
        return torch.Size(self.shapes[name]).numel()

    def find_home(self, names: Iterable[str]) -> tuple[Shard, int] | None:
        """The shard and the number of a flat tensor that holds the first of the parameters that was trained at all."""
        for name in names:
            if name in self._places:
                index, number, _ = self._places[name][0]
                return self.load_shard(index), number
        return None

    def find_table(self, names: Iterable[str], key: str) -> torch.Tensor | None:
        """What the codes of the optimizer's state `key` stand for, if it was in 8 bit for one of the parameters."""
        places = {place[:2] for name in names for place in self._places.get(name, ())}
        states = (self.load_shard(index).read_state(number).get(key) for index, number in sorted(places))
        return next((state.table for state in states if isinstance(state, Quantised)), None)

    def _get_flat(self, index: int, number: int, key: str) -> "torch.Tensor | Quantised":
        if key.startswith(AVERAGE):
            return self.read_averages(index)["averages"][key.removeprefix(AVERAGE)][number]
        shard = self.load_shard(index)
        return shard.masters[number] if key == MASTER else shard.read_state(number)[key]

    def read_averages(self, index: int = 0) -> dict[str, Any]:
        """`num_updates` and `averages`, by decay, of the flat tensors of a rank; empty if none were kept."""
        path = self._folder / f"ema_rank_{index:05d}.pt"
        return self._read_file(path) if path.is_file() else {"num_updates": 0, "averages": {}}

    def _distinct_layouts(self) -> list[Layout]:
        """Without ZeRO every rank holds everything; the first one's will do."""
        return self.layouts if self.layouts[0].zero_stage else self.layouts[:1]

    def _count_needed(self) -> int:
        return self.layouts[0].world_size if self.layouts[0].zero_stage else 1


def _belongs_to(file: str, rank: int) -> bool:
    """Whether one of DeepSpeed's files is a rank's own. The module's weights are rank 0's but under stage 3."""
    if "pp_rank_" not in file:
        return rank == 0
    return file.split("pp_rank_")[1].split("_")[0] == str(rank)


def reshard(template: Shard, saved: SavedState) -> None:
    """Fill a fresh rank's own files with what was saved by other ranks.

    What is trained now and was not then keeps its fresh weights, and begins without the optimizer's memory of it.

    Args:
        template: what this rank would save now; changed in place.

    Raises:
        ReshardingError: the optimizer's state is not one value per weight, or the network is another.
    """
    for name, shape in template.layout.shapes.items():
        if saved.shapes.get(name, shape) != shape:
            raise ReshardingError(f"{name} has shape {shape}, and had {saved.shapes[name]}")
    fresh = [name for name in template.layout.shapes if not saved.has(name)]
    if fresh:
        logger.warning("{} parameters were not trained before, {} among them", len(fresh), fresh[0])
    for number, (flat, master) in enumerate(zip(template.layout.flats, template.masters, strict=True)):
        values = master.detach().reshape(-1).clone()
        for piece in flat.pieces:
            if saved.has(piece.name):
                part = saved.read(piece.name, MASTER, piece.start, piece.numel)
                values[piece.offset : piece.offset + piece.numel] = part
        master.detach().copy_(values.view(master.shape))
        _fill_state(template, number, saved)
    _fill_module(template, saved)
    origin = saved.load_shard(0)
    for key in LOSS_SCALING:
        if key in template.owner and key in origin.owner:
            template.owner[key] = origin.owner[key]


def _fill_state(template: Shard, number: int, saved: SavedState) -> None:
    """The optimizer's state of one flat tensor, and the settings of the group that it is in."""
    flat = template.layout.flats[number]
    home = saved.find_home(piece.name for piece in flat.pieces)
    if home is None:
        return
    shard, origin = home
    template.find_group(number).update(
        {key: value for key, value in shard.find_group(origin).items() if key != "params"}
    )
    master = template.masters[number]
    shape = master.shape if master.dim() > 1 else torch.Size([flat.numel])  # saved without padding at its end
    numel = shard.layout.flats[origin].numel
    state: dict[str, Any] = {}
    for key, value in shard.read_state(origin).items():
        if isinstance(value, Quantised) or (isinstance(value, torch.Tensor) and value.dim() and value.numel() == numel):
            state |= _gather_state(flat, key, saved, shape)
        elif not isinstance(value, torch.Tensor):
            state[key] = value
        elif value.numel() == 1:
            state[key] = value.clone()  # such as the number of steps, the same for all
        else:
            raise ReshardingError(
                f"the optimizer's state {key!r} has {value.numel()} values for {numel} weights, and can only be taken "
                f"up again by {saved.world_size} ranks at ZeRO stage {shard.layout.zero_stage}"
            )
    template.base["state"][number] = state


def _gather_state(flat: Flat, key: str, saved: SavedState, shape: torch.Size) -> dict[str, torch.Tensor]:
    """What the optimizer keeps of one value per weight, again in 8 bit if it was and is large enough."""
    values = None
    for piece in flat.pieces:
        if saved.has(piece.name):
            part = saved.read(piece.name, key, piece.start, piece.numel)
            values = torch.zeros(flat.numel, dtype=part.dtype) if values is None else values
            values[piece.offset : piece.offset + piece.numel] = part
    assert values is not None, "the state was found by one of the pieces"
    table = saved.find_table((piece.name for piece in flat.pieces), key) if flat.numel >= MIN_QUANTISED else None
    if table is None:
        return {key: values.reshape(shape)}
    moment = quantise(values, table)
    return list_parts(key, replace(moment, codes=moment.codes.reshape(shape)))


def _fill_module(template: Shard, saved: SavedState) -> None:
    """The weights as the network holds them, and the counters of the steps. Under stage 3 no rank has them whole."""
    model, origin = template.model, saved.load_shard(0).model
    assert model is not None and origin is not None, "rank 0 saves the module, and a template holds it on every rank"
    for key in ("global_steps", "global_samples", "skipped_steps"):
        model[key] = origin[key]
    for name, value in model["module"].items():
        if saved.has(name) and tuple(value.shape) == saved.shapes[name]:
            value.copy_(saved.read_whole(name))
    for name, value in (model.get("frozen_param_fragments") or {}).items():
        if saved.has(name):  # was trained, and is frozen now
            share = value.numel() if template.layout.zero_stage == 3 else 0
            whole, start = saved.read(name), template.layout.rank * share
            part = whole[start : start + share] if share else whole
            value.view(-1)[: part.numel()] = part.to(value.dtype)
