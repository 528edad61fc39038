"""Old names of settings: this version accepts them with a warning, the next one will not.

To rename a setting, add it to RENAMED; reading of YAML files, overrides and checkpoints follows.
"""

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

from loguru import logger

from sdxl_trainer.configs.problems import Problem

# Old dotted key → new dotted key, in the same section. The keys of a renamed section follow it.
RENAMED = {
    "data.check": "data.verify_latents",
    "data.missing_caption": "data.on_missing_caption",
    "data.stream": "data.remote_shards",
    "data.weights": "data.source_weights",
    "train.non_finite": "train.on_non_finite",
}


class OldNames(NamedTuple):
    """Old names that were found, and problems with them."""

    used: list[str]
    problems: list[Problem]


def find_old_name(key: str) -> str | None:
    """Return the renamed setting that a dotted key names or lies in, by its old name."""
    return next((old for old in RENAMED if is_within(key, old)), None)


def is_within(key: str, section: str) -> bool:
    """Return whether a dotted key is `section` or a key inside it."""
    return f"{key}.".startswith(f"{section}.")


def rename_key(key: str) -> str:
    """Return the current name of a dotted key; current and unknown keys stay as they are."""
    old = find_old_name(key)
    return key if old is None else RENAMED[old] + key.removeprefix(old)


def rename_settings(settings: dict[str, Any]) -> OldNames:
    """Move settings with an old name to the current one, in place, in nested dicts by section.

    A value whose current name is given too is dropped, and the clash returned as a problem.
    """
    found = OldNames([], [])
    for old, new in RENAMED.items():
        *sections, name = old.split(".")
        place: Any = settings
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if not isinstance(place, dict) or name not in place:
            continue
        value = place.pop(name)
        found.used.append(old)
        new_name = new.rpartition(".")[2]
        if new_name in place:
            found.problems.append(_describe_clash(old, value))
        else:
            place[new_name] = value
    return found


def find_old_keys(keys: Iterable[str]) -> OldNames:
    """Return the old names among the dotted keys of overrides, and those whose current name is overridden too."""
    keys = list(keys)
    used = list(dict.fromkeys(old for old in map(find_old_name, keys) if old is not None))
    clashing = [old for old in used if any(is_within(key, RENAMED[old]) for key in keys)]
    return OldNames(used, [_describe_clash(old, None) for old in clashing])


def warn_of_old_names(used: Iterable[str]) -> None:
    """Log one warning for each old name, on rank 0 only: every rank reads the same settings."""
    if os.environ.get("RANK", "0") == "0":
        for old in dict.fromkeys(used):
            logger.warning("{} is now called {}; the next version will not know the old name", old, RENAMED[old])


def _describe_clash(old: str, value: Any) -> Problem:
    return Problem(old, value, f"is the old name of {RENAMED[old]}, which is given too", f"remove {old}")
