"""The user's class of `data.strategy`: repeats, captions and loss weights of samples. docs/STRATEGY.md is its guide.

An exception in the user's code becomes a StrategyError with the sample, the class, the method and the traceback.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from loguru import logger

from sdxl_trainer.configs.problems import Problem, UserInputError, suggest_name
from sdxl_trainer.data.files import open_atomic
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.metadata.records import Record
from sdxl_trainer.data.metadata.values import TAG_FIELDS, list_texts
from sdxl_trainer.data.order.even_selection import select_evenly
from sdxl_trainer.data.own_code import UserCodeError, call_user_code, load_own_code
from sdxl_trainer.data.text.captions import read_caption_fields

KEY = "data.strategy"
METHODS = {"repeats": "(record, counts)", "caption": "(record, rng)", "loss_weight": "(record)"}
# Counted attributes and the record fields that hold them; only the first non-empty field is counted.
ATTRIBUTES = {
    "artist": ("artist", "artists"),
    "characters": ("characters", "character"),
    "styles": ("styles", "style"),
    "quality": ("quality",),
}
TAGS = "tags"
NUM_TRIED = 16  # samples that a strategy is tested on before a run


class StrategyError(ValueError):
    """A strategy's method raised, or returned an invalid repeat count, caption or loss weight."""


class AttributeCounts(dict[str, Counter]):
    """Number of records by value, for each of ATTRIBUTES and for `tags`: `counts["artist"]["some artist"]`.

    `counts["tags"]` is computed on first use: tags take long to count, and captions in prose hold any number of them.
    """

    def __init__(self, index: Index):
        super().__init__({name: Counter() for name in ATTRIBUTES})
        self._index = index

    def __missing__(self, name: str) -> Counter:
        if name != TAGS:
            raise KeyError(f"{name}; known: {', '.join([*ATTRIBUTES, TAGS])}")
        self[TAGS] = counter = Counter()
        for record in self._index.iterate_records():
            counter.update(set(_split_tags(read_caption_fields(record, TAG_FIELDS))))
        return counter


def count_attributes(index: Index) -> AttributeCounts:
    """Count the values of ATTRIBUTES over all records.

    A field is a list or a string of comma-separated values. Each distinct value of a record is counted once.
    """
    # Unsplit values are counted first and split at the end, because a million records have far fewer distinct values.
    unsplit: dict[str, dict[Any, int]] = {name: {} for name in ATTRIBUTES}
    for record in index.iterate_records():
        for name, fields in ATTRIBUTES.items():
            value = record.get(fields[0]) or (record.get(fields[1]) if len(fields) > 1 else None)
            if value:
                value = value if isinstance(value, str) else tuple(_split_tags(value))
                unsplit[name][value] = unsplit[name].get(value, 0) + 1
    counts = AttributeCounts(index)
    for name, values in unsplit.items():
        for value, count in values.items():
            counts[name].update(dict.fromkeys(_split_tags(value), count))
    return counts


class Strategy:
    """An object of the user's class, with its results validated.

    A strategy pickles as its spec: each loader worker loads the class again and makes its own object.

    Args:
        spec: value of `data.strategy`, with an absolute path.
        user_object: object of the user's class.
    """

    def __init__(self, spec: str, user_object: object):
        self.spec = spec
        self._user_object = user_object
        self._class_name = type(user_object).__name__

    def __reduce__(self) -> tuple:
        return (load_strategy, (self.spec,))

    def has(self, method: str) -> bool:
        """Return whether the user's class defines `repeats`, `caption` or `loss_weight`."""
        return callable(getattr(self._user_object, method, None))

    def repeats(self, records: Iterable[Record], counts: AttributeCounts, num_records: int) -> np.ndarray:
        """Compute how often each sample is used in an epoch, by the user's `repeats(record, counts)`.

        Returns:
            [num_records] float64; 0 leaves a sample out, 0.5 uses it every second epoch.

        Raises:
            StrategyError: the method raised, or returned something other than a finite number of 0 or more.
        """
        repeats = np.empty(num_records)
        for row, record in enumerate(records):
            value = self._call(record, "repeats", counts)
            if not _is_non_negative(value):
                raise self._build_number_error(record, "repeats", value)
            repeats[row] = value
        return repeats

    def caption(self, record: Record, rng: np.random.Generator) -> str:
        """Return the text that the caption pipeline starts from, by the user's `caption(record, rng)`.

        Args:
            rng: keyed to the sample and epoch; the only source of randomness that the user's method may use.

        Raises:
            StrategyError: the method raised, or returned something other than a string.
        """
        caption = self._call(record, "caption", rng)
        if not isinstance(caption, str):
            raise self._build_error(record, "caption", f"returned {caption!r:.100}, which is not a string")
        return caption

    def loss_weight(self, record: Record) -> float:
        """Return the factor of a sample's loss, by the user's `loss_weight(record)`; 1 if the class has no such method.

        Raises:
            StrategyError: the method raised, or returned something other than a finite number of 0 or more.
        """
        if not self.has("loss_weight"):
            return 1.0
        weight = self._call(record, "loss_weight")
        if not _is_non_negative(weight):
            raise self._build_number_error(record, "loss_weight", weight)
        return float(weight)

    def _call(self, record: Record, method: str, *arguments: Any) -> Any:
        try:
            return call_user_code(getattr(self._user_object, method), record, *arguments)
        except UserCodeError as error:
            raise self._build_error(record, method, f"raised {error}") from None

    def _build_number_error(self, record: Record, method: str, value: Any) -> StrategyError:
        return self._build_error(record, method, f"returned {value!r:.100}, which is not a finite number of 0 or more")

    def _build_error(self, record: Record, method: str, reason: str) -> StrategyError:
        return StrategyError(f"{record.get('key')}: {self._class_name}.{method} of {KEY} = {self.spec} {reason}")


def load_strategy(spec: str) -> Strategy:
    """Load the user's class and make an object of it.

    Args:
        spec: `path/to/file.py:ClassName`, or `module:ClassName` for a module that Python can import.

    Raises:
        UserInputError: the file, module or class does not exist or cannot be loaded, or the class has none of the
            methods.
    """
    spec, user_class = load_own_code(KEY, spec)
    if not any(callable(getattr(user_class, method, None)) for method in METHODS):
        known = ", ".join(method + arguments for method, arguments in METHODS.items())
        rule = f"{user_class.__name__} has none of the methods {known}"
        raise UserInputError([Problem(KEY, spec, rule, _suggest_methods(user_class))])
    try:
        return Strategy(spec, call_user_code(user_class))
    except UserCodeError as error:
        cure = "the class is instantiated without arguments, once in each process"
        raise UserInputError([Problem(KEY, spec, f"{user_class.__name__}() raised {error}", cure)]) from None


def is_strategy_failure(reason: str) -> bool:
    """Return whether the reason of a bad sample is the message of a StrategyError."""
    return f" of {KEY} = " in reason


def supplies_captions(strategy: str | None) -> bool:
    """Return whether the user's class replaces the choice of texts; other checks report a class that cannot be used."""
    try:
        return strategy is not None and load_strategy(strategy).has("caption")
    except UserInputError:
        return True


def check_strategy(strategy: Strategy, index: Index) -> Iterator[Problem]:
    """Yield a problem for each of `caption` and `loss_weight` that fails on all of NUM_TRIED samples.

    A method that fails only on some samples is no problem but a warning: training skips and reports these samples.
    """
    records = [index.record(row) for row in select_evenly(len(index), NUM_TRIED).tolist()]
    rng = np.random.default_rng(0)
    calls = {"caption": lambda record: strategy.caption(record, rng), "loss_weight": strategy.loss_weight}
    for method, call in calls.items():
        errors = []
        for record in records if strategy.has(method) else ():
            try:
                call(record)
            except StrategyError as error:
                errors.append(str(error))
        if errors and len(errors) == len(records):
            yield _build_problem(strategy.spec, f"{method} failed on all samples tried: {errors[0]}")
        elif errors:
            logger.warning(
                "{} of data.strategy failed on {} of {} samples tried; training skips such samples; first error: {}",
                method,
                len(errors),
                len(records),
                errors[0],
            )


def compute_repeats(strategy: Strategy, index: Index) -> np.ndarray:
    """Compute how often each row of the index is used in an epoch, [N] float64.

    Raises:
        UserInputError: the strategy failed on a sample, or gives 0 for all samples.
    """
    try:
        repeats = strategy.repeats(index.iterate_records(), count_attributes(index), len(index))
    except StrategyError as error:
        raise UserInputError([_build_problem(strategy.spec, str(error))]) from None
    if not repeats.any():
        raise UserInputError([_build_problem(strategy.spec, f"repeats() is 0 for all {len(index)} samples")])
    return repeats


def save_repeats(path: Path, repeats: np.ndarray) -> None:
    """Save repeats as a .npy file, for the other ranks and for the user to inspect."""
    with open_atomic(path) as file:
        np.save(file, repeats)


def load_repeats(path: Path) -> np.ndarray:
    """Load the repeats that `save_repeats` saved, [N] float64."""
    return np.load(path, allow_pickle=False)


def hash_repeats(repeats: np.ndarray) -> str:
    """Return a hash of repeats, by which a resumed run detects that they changed."""
    return hashlib.sha256(np.ascontiguousarray(repeats, np.float64).tobytes()).hexdigest()[:16]


def _is_non_negative(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and bool(0 <= value < math.inf)


def _split_tags(value: Any) -> list[str]:
    """Return the non-empty tags of a list, of a mapping of tags to numbers, or of a string of comma-separated tags.

    Values of other shapes, which belong to the user's class alone, hold no tags.
    """
    try:
        tags = value.split(",") if isinstance(value, str) else list_texts(value)
    except ValueError:
        return []
    return [text for tag in tags if (text := tag.strip())]


def _suggest_methods(user_class: type) -> str:
    own = [name for name in vars(user_class) if not name.startswith("_")]
    near = {name: match for name in own if (match := suggest_name(name, METHODS))}
    if near:
        return ", ".join(f"rename {name} to {match}" for name, match in near.items())
    return f"it defines {', '.join(own) or 'nothing'}"


def _build_problem(spec: str, rule: str) -> Problem:
    return Problem(KEY, spec, rule, "correct the class, or leave data.strategy out")
