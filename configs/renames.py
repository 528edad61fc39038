"""Old names of settings: this version accepts them with a warning, the next version will not.

To rename a setting, add it to RENAMED. YAML files, overrides and checkpoints are then read with either name.
"""

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

from loguru import logger

from sdxl_trainer.configs.language.translate import translate
from sdxl_trainer.configs.problems import Problem

# Old dotted key → new dotted key in the same section. A renamed section renames the keys inside it.
RENAMED = {
    "data.check": "data.verify_latents",
    "data.missing_caption": "data.on_missing_caption",
    "data.stream": "data.remote_shards",
    "data.weights": "data.source_weights",
    "sample.scheduler": "sample.sampler",
    "train.non_finite": "train.on_non_finite",
}


class OldNames(NamedTuple):
    """The old names in some settings, and the problems with them."""

    used: list[str]
    problems: list[Problem]


def find_old_name(key: str) -> str | None:
    """Return the old name in RENAMED that a dotted key equals or lies in, or None."""
    return next((old for old in RENAMED if is_within(key, old)), None)


def is_within(key: str, section: str) -> bool:
    """Return whether a dotted key is `section` or a key inside it."""
    return f"{key}.".startswith(f"{section}.")


def rename_key(key: str) -> str:
    """Return the current name of a dotted key; current and unknown keys are returned unchanged."""
    old = find_old_name(key)
    return key if old is None else RENAMED[old] + key.removeprefix(old)


def rename_settings(settings: dict[str, Any]) -> OldNames:
    """Rename settings with an old name, in place, in nested dicts by section.

    If the old and the current name are both given, the old one is dropped and a problem is returned.
    """
    old_names = OldNames([], [])
    for old, new in RENAMED.items():
        *sections, name = old.split(".")
        node: Any = settings
        for section in sections:
            node = node.get(section) if isinstance(node, dict) else None
        if not isinstance(node, dict) or name not in node:
            continue
        value = node.pop(name)
        old_names.used.append(old)
        new_name = new.rpartition(".")[2]
        if new_name in node:
            old_names.problems.append(_build_clash_problem(old, value))
        else:
            node[new_name] = value
    return old_names


def find_old_keys(keys: Iterable[str]) -> OldNames:
    """Return the old names among the dotted keys of overrides, and a problem for each whose new name is there too."""
    keys = list(keys)
    used = list(dict.fromkeys(old for old in map(find_old_name, keys) if old is not None))
    clashing = [old for old in used if any(is_within(key, RENAMED[old]) for key in keys)]
    return OldNames(used, [_build_clash_problem(old, None) for old in clashing])


def warn_of_old_names(used: Iterable[str]) -> None:
    """Log a warning for each old name, on rank 0 only, because every rank reads the settings."""
    if os.environ.get("RANK", "0") == "0":
        for old in dict.fromkeys(used):
            message = f"{old} is now called {RENAMED[old]}; the next version will reject the old name"
            logger.warning("{}", translate(message))  # the console's own translation is set up later


def _build_clash_problem(old: str, value: Any) -> Problem:
    return Problem(old, value, f"is the old name of {RENAMED[old]}, which is given too", f"remove {old}")
