"""Counts and findings of the join of records with their latents."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from sdxl_trainer.data.index.schema import BadSample


@dataclass(frozen=True)
class JoinSummary:
    """Counts and findings of a join. The index stores them."""

    num_wanted: int  # samples that should have latents: the selected records at each resolution
    num_unlisted: int  # samples whose latents no manifest lists
    num_uncached: int  # samples whose latents are encoded during training
    num_assumed_sizes: int  # samples whose original size is unknown and taken to be their bucket's
    other_sizes: str  # a message about records whose size is not their image's; "" if there are none
    identities: dict[str, dict[str, int]]  # prefix → name of a cache identity → number of samples made under it
    num_bad: int  # samples whose latents or image cannot be used
    num_unread: int  # of them, those that the storage did not give, so that another join may find them whole
    bad: list[BadSample]  # the first MAX_BAD of the bad ones
    watched: list[str]  # folders that were searched for unlisted latents

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as values of JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"bad": list(map(list, self.bad))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "JoinSummary":
        """Return the summary of `to_dict`."""
        return cls(**{**values, "bad": [BadSample(*each) for each in values["bad"]]})
