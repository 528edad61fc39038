"""What lies where in a rank's part of the saved state: parameters in pieces, end to end in the flat tensors of masters
that DeepSpeed's optimizers keep, each stage and precision in its own way."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Piece:
    """`numel` values of a parameter from its element `start` on lie at `offset` of a flat tensor."""

    name: str
    start: int
    offset: int
    numel: int


@dataclass(frozen=True)
class Flat:
    """A tensor of master weights that the optimizer updates as one, padded to `numel`, and what lies in it."""

    numel: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Layout:
    """What a rank's files hold. `flats` are in the order in which the optimizer numbers its tensors."""

    rank: int
    world_size: int
    zero_stage: int
    kind: str  # which form DeepSpeed's optimizer file has
    flats: tuple[Flat, ...]
    shapes: dict[str, tuple[int, ...]]  # of every trained parameter, whole

    def to_plain(self) -> dict[str, Any]:
        """As dicts and lists, which can be loaded without trusting the file."""
        return asdict(self)

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> "Layout":
        """What `to_plain` gave."""
        flats = tuple(Flat(flat["numel"], tuple(Piece(**piece) for piece in flat["pieces"])) for flat in plain["flats"])
        shapes = {name: tuple(shape) for name, shape in plain["shapes"].items()}
        return Layout(plain["rank"], plain["world_size"], plain["zero_stage"], plain["kind"], flats, shapes)

    def fits(self, other: "Layout") -> bool:
        """Whether files of the one can be loaded for the other as they are. Without ZeRO all ranks have the same."""
        place, other_place = (self.rank, self.world_size), (other.rank, other.world_size)
        same_place = self.zero_stage == 0 or place == other_place
        return same_place and (self.zero_stage, self.kind, self.flats) == (other.zero_stage, other.kind, other.flats)


def describe_layout(optimizer: Any, names: Mapping[int, str], rank: int, world_size: int, zero_stage: int) -> Layout:
    """The layout of a live engine, read from DeepSpeed's optimizer. `names`: id of a parameter → its name."""
    kind = next(attribute for attribute in _DESCRIBE if hasattr(optimizer, attribute))
    groups, flats = _DESCRIBE[kind](optimizer, names, rank)
    trained = [parameter for group in groups for parameter in group]
    shapes = {names[id(parameter)]: tuple(getattr(parameter, "ds_shape", parameter.shape)) for parameter in trained}
    return Layout(rank, world_size, zero_stage, kind, tuple(flats), shapes)


def _describe_partitions(optimizer: Any, names: Mapping[int, str], rank: int) -> tuple[list[list[Any]], list[Flat]]:
    """Stages 1 and 2: a group's parameters lie end to end, and each rank has an equal share of that."""
    flats = []
    groups = getattr(optimizer, "bit16_groups", None) or optimizer.bf16_groups
    masters = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
    for group, flat in zip(groups, masters, strict=True):
        linked = [(names[id(parameter)], parameter._hp_mapping) for parameter in group if parameter._hp_mapping]
        pieces = [
            Piece(name, link.lp_fragment_address.start, link.hp_fragment_address.start, link.hp_fragment_address.numel)
            for name, link in linked
        ]
        flats.append(Flat(flat.numel(), tuple(pieces)))
    return groups, flats


def _describe_parameter_shares(
    optimizer: Any, names: Mapping[int, str], rank: int
) -> tuple[list[list[Any]], list[Flat]]:
    """Stage 3: each rank has an equal share of every parameter; the last one's may end in padding."""
    flats = []
    for group in optimizer.fp16_groups:
        pieces, offset = [], 0
        for parameter in group:
            share = parameter.ds_tensor.ds_numel
            numel = min(share, parameter.ds_numel - rank * share)
            if numel > 0:
                pieces.append(Piece(names[id(parameter)], rank * share, offset, numel))
            offset += share
        flats.append(Flat(offset, tuple(pieces)))
    return optimizer.fp16_groups, flats


def _describe_groups(optimizer: Any, names: Mapping[int, str], rank: int) -> tuple[list[list[Any]], list[Flat]]:
    """Stage 0 with a fused optimizer in 16 bit: a group's parameters lie end to end on every rank."""
    flats = []
    for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
        pieces, offset = [], 0
        for parameter in group:
            pieces.append(Piece(names[id(parameter)], 0, offset, parameter.numel()))
            offset += parameter.numel()
        flats.append(Flat(flat.numel(), tuple(pieces)))
    return optimizer.fp16_groups, flats


def _describe_parameters(optimizer: Any, names: Mapping[int, str], rank: int) -> tuple[list[list[Any]], list[Flat]]:
    """Stage 0: every rank has every parameter, each a tensor of its own."""
    groups = getattr(optimizer, "fp16_groups", None) or [group["params"] for group in optimizer.param_groups]
    flats = [
        Flat(parameter.numel(), (Piece(names[id(parameter)], 0, 0, parameter.numel()),))
        for group in groups
        for parameter in group
    ]
    return groups, flats


def list_masters(optimizer: Any) -> list[torch.Tensor]:
    """The live tensors that the flats of a layout stand for, in the same order."""
    kind = next(attribute for attribute in _DESCRIBE if hasattr(optimizer, attribute))
    if kind == "param_groups":
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]
    masters = getattr(optimizer, kind)
    return [master for group in masters for master in group] if kind == "fp32_groups" else list(masters)


# By the attribute in which an optimizer of DeepSpeed's keeps its master weights; a plain one has `param_groups` alone.
_DESCRIBE = {
    "fp32_partitioned_groups_flat": _describe_parameter_shares,
    "single_partition_of_fp32_groups": _describe_partitions,
    "fp32_groups_flat_partition": _describe_partitions,
    "fp32_groups_flat": _describe_groups,
    "fp32_groups": _describe_parameters,
    "param_groups": _describe_parameters,
}
