"""Location of each parameter in a rank's part of the saved state.

DeepSpeed's optimizers keep master weights in flat tensors, in which parameters lie end to end. Each ZeRO stage and
precision does so in its own way; a `Layout` describes all of them alike.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from sdxl_trainer.train.engine.patches import read_fragment_offsets


@dataclass(frozen=True)
class Fragment:
    """`numel` values of a parameter, from its element `start` on, at `offset` of a flat tensor."""

    name: str
    start: int
    offset: int
    numel: int


@dataclass(frozen=True)
class FlatTensor:
    """A tensor of master weights that the optimizer updates as one, padded to `numel`, and the fragments in it."""

    numel: int
    fragments: tuple[Fragment, ...]


@dataclass(frozen=True)
class Layout:
    """The place of each trained parameter in a rank's files. `flats` are in the order of the optimizer's tensors."""

    rank: int
    world_size: int
    zero_stage: int
    kind: str  # form of DeepSpeed's optimizer file, a key of _DESCRIBE
    flats: tuple[FlatTensor, ...]
    shapes: dict[str, tuple[int, ...]]  # whole shape of every trained parameter

    def to_plain(self) -> dict[str, Any]:
        """Return the layout as dicts and tuples, which can be loaded from a file that is not trusted."""
        flats = tuple(
            {"numel": flat.numel, "pieces": tuple(asdict(fragment) for fragment in flat.fragments)}
            for flat in self.flats
        )
        return {**asdict(self), "flats": flats}

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> "Layout":
        """Return the layout that `to_plain` wrote."""
        return Layout(
            rank=plain["rank"],
            world_size=plain["world_size"],
            zero_stage=plain["zero_stage"],
            kind=plain["kind"],
            flats=tuple(
                FlatTensor(flat["numel"], tuple(Fragment(**fragment) for fragment in flat["pieces"]))
                for flat in plain["flats"]
            ),
            shapes={name: tuple(shape) for name, shape in plain["shapes"].items()},
        )

    def matches(self, other: "Layout") -> bool:
        """Return whether files of one layout can be loaded for the other as they are.

        Without ZeRO all ranks hold the same, so their numbers do not matter.
        """
        place, other_place = (self.rank, self.world_size), (other.rank, other.world_size)
        same_place = self.zero_stage == 0 or place == other_place
        return same_place and (self.zero_stage, self.kind, self.flats) == (other.zero_stage, other.kind, other.flats)


class ParameterGroups(NamedTuple):
    """The trained parameters by group, and the flat tensors that hold their master weights."""

    groups: list[list[Any]]
    flats: list[FlatTensor]


def describe_layout(optimizer: Any, names: Mapping[int, str], rank: int, world_size: int, zero_stage: int) -> Layout:
    """Read the layout of a live engine from DeepSpeed's optimizer.

    Args:
        names: id of a parameter → its name.
    """
    kind = get_kind(optimizer)
    groups, flats = _DESCRIBE[kind](optimizer, names, rank)
    trained = [parameter for group in groups for parameter in group]
    return Layout(
        rank=rank,
        world_size=world_size,
        zero_stage=zero_stage,
        kind=kind,
        flats=tuple(flats),
        shapes={names[id(parameter)]: tuple(getattr(parameter, "ds_shape", parameter.shape)) for parameter in trained},
    )


def get_kind(optimizer: Any) -> str:
    """Return the attribute in which an optimizer of DeepSpeed keeps its master weights, a key of _DESCRIBE."""
    return next(attribute for attribute in _DESCRIBE if hasattr(optimizer, attribute))


def list_masters(optimizer: Any) -> list[torch.Tensor]:
    """List the live tensors that a layout's flats stand for, in the same order."""
    kind = get_kind(optimizer)
    if kind == "param_groups":
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]
    masters = getattr(optimizer, kind)
    return [master for group in masters for master in group] if kind == "fp32_groups" else list(masters)


def _describe_partitions(optimizer: Any, names: Mapping[int, str], rank: int) -> ParameterGroups:
    """Stages 1 and 2: a group's parameters lie end to end, and each rank has an equal share of that."""
    flats = []
    groups = getattr(optimizer, "bit16_groups", None) or optimizer.bf16_groups
    masters = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
    for group, flat in zip(groups, masters, strict=True):
        found = [(names[id(parameter)], read_fragment_offsets(parameter)) for parameter in group]
        flats.append(FlatTensor(flat.numel(), tuple(Fragment(name, *offsets) for name, offsets in found if offsets)))
    return ParameterGroups(groups, flats)


def _describe_parameter_shares(optimizer: Any, names: Mapping[int, str], rank: int) -> ParameterGroups:
    """Stage 3: each rank has an equal share of every parameter; the last rank's may end in padding."""
    flats = []
    for group in optimizer.fp16_groups:
        fragments, offset = [], 0
        for parameter in group:
            share = parameter.ds_tensor.ds_numel
            numel = min(share, parameter.ds_numel - rank * share)
            if numel > 0:
                fragments.append(Fragment(names[id(parameter)], rank * share, offset, numel))
            offset += share
        flats.append(FlatTensor(offset, tuple(fragments)))
    return ParameterGroups(optimizer.fp16_groups, flats)


def _describe_groups(optimizer: Any, names: Mapping[int, str], rank: int) -> ParameterGroups:
    """Stage 0 with a fused optimizer in 16 bit: a group's parameters lie end to end on every rank."""
    flats = []
    for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
        fragments, offset = [], 0
        for parameter in group:
            fragments.append(Fragment(names[id(parameter)], 0, offset, parameter.numel()))
            offset += parameter.numel()
        flats.append(FlatTensor(flat.numel(), tuple(fragments)))
    return ParameterGroups(optimizer.fp16_groups, flats)


def _describe_parameters(optimizer: Any, names: Mapping[int, str], rank: int) -> ParameterGroups:
    """Stage 0: every rank has every parameter, each a tensor of its own."""
    groups = getattr(optimizer, "fp16_groups", None) or [group["params"] for group in optimizer.param_groups]
    flats = [
        FlatTensor(parameter.numel(), (Fragment(names[id(parameter)], 0, 0, parameter.numel()),))
        for group in groups
        for parameter in group
    ]
    return ParameterGroups(groups, flats)


# By the attribute in which an optimizer of DeepSpeed keeps its master weights; a plain one has `param_groups` alone.
_DESCRIBE = {
    "fp32_partitioned_groups_flat": _describe_parameter_shares,
    "single_partition_of_fp32_groups": _describe_partitions,
    "fp32_groups_flat_partition": _describe_partitions,
    "fp32_groups_flat": _describe_groups,
    "fp32_groups": _describe_parameters,
    "param_groups": _describe_parameters,
}
