"""Location of each parameter in a rank's part of the saved state.

DeepSpeed's optimizers keep master weights in flat tensors, in which parameters lie end to end. Each ZeRO stage and
precision does so in its own way; a `Layout` describes all of them alike.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sdxl_trainer.train.engine.patches import (
    MasterWeights,
    get_whole_shape,
    read_fragment_offsets,
    read_master_weights,
    read_parameter_share,
)


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
    kind: str  # form of DeepSpeed's optimizer file, one of patches.MASTER_KINDS
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


def describe_layout(optimizer: Any, names: Mapping[int, str], rank: int, world_size: int, zero_stage: int) -> Layout:
    """Read the layout of a live engine from DeepSpeed's optimizer.

    Args:
        names: id of a parameter → its name.
    """
    masters = read_master_weights(optimizer)
    trained = [parameter for group in masters.groups for parameter in group]
    return Layout(
        rank=rank,
        world_size=world_size,
        zero_stage=zero_stage,
        kind=masters.kind,
        flats=tuple(_DESCRIBE[masters.kind](masters, names, rank)),
        shapes={names[id(parameter)]: get_whole_shape(parameter) for parameter in trained},
    )


def _describe_partitions(masters: MasterWeights, names: Mapping[int, str], rank: int) -> list[FlatTensor]:
    """Stages 1 and 2: a group's parameters lie end to end, and each rank has an equal share of that."""
    flats = []
    for group, flat in zip(masters.groups, masters.tensors, strict=True):
        found = [(names[id(parameter)], read_fragment_offsets(parameter)) for parameter in group]
        flats.append(FlatTensor(flat.numel(), tuple(Fragment(name, *offsets) for name, offsets in found if offsets)))
    return flats


def _describe_parameter_shares(masters: MasterWeights, names: Mapping[int, str], rank: int) -> list[FlatTensor]:
    """Stage 3: each rank has an equal share of every parameter; the last rank's may end in padding."""
    flats = []
    for group in masters.groups:
        fragments, offset = [], 0
        for parameter in group:
            share, whole = read_parameter_share(parameter)
            numel = min(share, whole - rank * share)
            if numel > 0:
                fragments.append(Fragment(names[id(parameter)], rank * share, offset, numel))
            offset += share
        flats.append(FlatTensor(offset, tuple(fragments)))
    return flats


def _describe_groups(masters: MasterWeights, names: Mapping[int, str], rank: int) -> list[FlatTensor]:
    """Stage 0 with a fused optimizer in 16 bit: a group's parameters lie end to end on every rank."""
    flats = []
    for group, flat in zip(masters.groups, masters.tensors, strict=True):
        fragments, offset = [], 0
        for parameter in group:
            fragments.append(Fragment(names[id(parameter)], 0, offset, parameter.numel()))
            offset += parameter.numel()
        flats.append(FlatTensor(flat.numel(), tuple(fragments)))
    return flats


def _describe_parameters(masters: MasterWeights, names: Mapping[int, str], rank: int) -> list[FlatTensor]:
    """Stage 0: every rank has every parameter, each a tensor of its own."""
    return [
        FlatTensor(parameter.numel(), (Fragment(names[id(parameter)], 0, 0, parameter.numel()),))
        for group in masters.groups
        for parameter in group
    ]


# By the form of DeepSpeed's optimizer, `MasterWeights.kind`.
_DESCRIBE = {
    "fp32_partitioned_groups_flat": _describe_parameter_shares,
    "single_partition_of_fp32_groups": _describe_partitions,
    "fp32_groups_flat": _describe_groups,
    "fp32_groups": _describe_parameters,
    "param_groups": _describe_parameters,
}
