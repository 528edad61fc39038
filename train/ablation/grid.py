"""The grid of an ablation: its arms, which are combinations of values, and the run of each arm and seed."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from sdxl_trainer.configs.problems import Problem, UserInputError, suggest_name
from sdxl_trainer.configs.renames import rename_key

NO_EFFECT = "changes nothing that a run learns, so all runs would be equal"
FORBIDDEN = {
    "run.": "belongs to the ablation itself",
    "log.": NO_EFFECT,
    "checkpoint.": NO_EFFECT,
    "sample.": NO_EFFECT,
    "ema.": "changes only the moving averages, and an ablation compares the weights: sdxl-trainer compare --average",
    "validation.": "must be the same in all runs, or they cannot be compared",
    "train.max_steps": "must be the same in all runs",
    "train.max_epochs": "must be the same in all runs",
}
MAX_NAME = 60  # characters of an arm's name in file names


class Variation(NamedTuple):
    """A setting and its values, as they are written on the command line."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class GridArm:
    """A combination of values.

    Args:
        words: settings of the arm, `key.sub=value`.
        name: of the arm in file names.
    """

    words: tuple[str, ...]
    name: str

    @property
    def label(self) -> str:
        """The arm as people read it."""
        return " ".join(self.words)


def parse_variations(words: Sequence[str]) -> list[Variation]:
    """Parse words such as `optim.lr=1e-5,2e-5`.

    Commas within brackets, braces and quotes belong to a value.

    Raises:
        UserInputError: a word names no two different values, or a setting that cannot vary.
    """
    variations, problems = [], []
    for word in words:
        key, equals, text = word.partition("=")
        values = tuple(split_values(text))
        reason = next((why for prefix, why in FORBIDDEN.items() if rename_key(key).startswith(prefix)), "")
        if not equals or not key:
            problems.append(Problem("--vary", word, "is not a setting with its values", "write key.sub=A,B"))
        elif reason:
            problems.append(Problem("--vary", word, reason, "vary another setting"))
        elif len(values) < 2 or len(set(values)) < len(values) or not all(values):
            rule = "needs two different values or more, with commas between them and no space"
            problems.append(Problem("--vary", word, rule, f"write {key}=A,B"))
        elif key in (known.key for known in variations):
            problems.append(Problem("--vary", word, "names a setting twice", "write all of its values in one --vary"))
        else:
            variations.append(Variation(key, values))
    if problems:
        raise UserInputError(problems)
    return variations


def split_values(text: str) -> Iterator[str]:
    """Yield the values between the commas of a text, but for commas within brackets, braces and quotes."""
    depth, quote, value = 0, "", ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth == 0:
            yield value.strip()
            value = ""
            continue
        value += character
    yield value.strip()


def build_arms(variations: Sequence[Variation], baseline: Sequence[str] = ()) -> list[GridArm]:
    """Build all combinations of values, the baseline first.

    Args:
        baseline: words `key.sub=value`; a setting that they do not name has its first value.

    Raises:
        UserInputError: the baseline is not in the grid.
    """
    chosen = {variation.key: variation.values[0] for variation in variations}
    by_key, problems = dict(variations), []
    for word in baseline:
        key, _, value = word.partition("=")
        if key not in by_key:
            near = suggest_name(key, list(by_key)) or ", ".join(by_key)
            problems.append(Problem("--baseline", word, "names no setting that varies", f"choose one of {near}"))
        elif value not in by_key[key]:
            cure = f"write {key}= and one of {', '.join(by_key[key])}"
            problems.append(Problem("--baseline", word, "is not in the grid", cure))
        else:
            chosen[key] = value
    if problems:
        raise UserInputError(problems)
    ordered = [[chosen[key], *(value for value in values if value != chosen[key])] for key, values in variations]
    combinations = [
        tuple(f"{variation.key}={value}" for variation, value in zip(variations, values, strict=True))
        for values in product(*ordered)
    ]
    names = [_name(words)[:MAX_NAME] for words in combinations]
    # Values that differ only in characters that no file name may have.
    return [
        GridArm(words, name if names.count(name) == 1 else f"{name[: MAX_NAME - 5]}-{number}")
        for number, (words, name) in enumerate(zip(combinations, names, strict=True), 1)
    ]


def _name(words: Sequence[str]) -> str:
    """Return a file name such as `lr-1e-5_weighting-min_snr`."""
    parts = [word.partition("=") for word in words]
    named = [(key.rpartition(".")[2], re.sub(r"[^\w.-]+", "-", value).strip("-")) for key, _, value in parts]
    return "_".join(f"{key}-{value}" for key, value in named)
