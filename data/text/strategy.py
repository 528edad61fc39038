"""The user's class of `data.strategy`: how often a sample is used, what its caption is, what its loss weighs.

docs/STRATEGY.md is the page for users. Whatever a user's code raises becomes a StrategyError that names the sample, the
class and the method, and carries the traceback.
"""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.data.files import open_atomic
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.metadata.records import Record, parse_record
from sdxl_trainer.data.text.captions import TAG_FIELDS, read_caption_fields

KEY = "data.strategy"
METHODS = {"repeats": "(record, counts)", "caption": "(record, rng)", "loss_weight": "(record)"}
# What is counted, and the fields it is read from: the first one that a record holds.
ATTRIBUTES = {
    "artist": ("artist", "artists"),
    "characters": ("characters", "character"),
    "styles": ("styles", "style"),
    "quality": ("quality",),
}
TAGS = "tags"
ROWS_AT_ONCE = 16_384
NUM_TRIED = 16  # samples on which a strategy is tried before a run


class StrategyError(ValueError):
    """A strategy raised, or gave something that is no repeat count, caption or weight."""


class UserCodeError(RuntimeError):
    """The user's code raised; the message is what, with its traceback."""


class AttributeCounts(dict[str, Counter]):
    """How many records hold each artist, character, style and quality tag; `counts["tags"]` is counted when asked for.

    A strategy that does not ask pays nothing for the tags, which are many, and unbounded where captions are prose.
    """

    def __init__(self, index: Index):
        super().__init__({name: Counter() for name in ATTRIBUTES})
        self._index = index

    def __missing__(self, name: str) -> Counter:
        if name != TAGS:
            raise KeyError(f"{name}; there are {', '.join([*ATTRIBUTES, TAGS])}")
        self[TAGS] = counter = Counter()
        for record in iterate_records(self._index):
            counter.update(set(_split(read_caption_fields(record, TAG_FIELDS))))
        return counter


def count_attributes(index: Index) -> AttributeCounts:
    """Count the artists, characters, styles and quality tags of all records, streaming.

    A value is a list, or a string with commas between; each record counts a value once.
    """
    # Values are counted as they stand and taken apart in the end: a million records hold far fewer different ones.
    raw: dict[str, dict[Any, int]] = {name: {} for name in ATTRIBUTES}
    for record in iterate_records(index):
        for name, fields in ATTRIBUTES.items():
            value = record.get(fields[0]) or (record.get(fields[1]) if len(fields) > 1 else None)
            if value:
                value = value if isinstance(value, str) else tuple(_split(value))
                raw[name][value] = raw[name].get(value, 0) + 1
    counts = AttributeCounts(index)
    for name, values in raw.items():
        for value, count in values.items():
            counts[name].update(dict.fromkeys(_split(value), count))
    return counts


def iterate_records(index: Index) -> Iterator[Record]:
    """All records of an index in its order, each decoded once, a few thousand in memory at a time."""
    for batch in index.table.select(["key", "image_path", "record"]).to_batches(max_chunksize=ROWS_AT_ONCE):
        yield from map(parse_record, batch.to_pylist())


class Strategy:
    """A user's object, its answers checked. Pickles as its spec: a loader worker loads the class anew."""

    def __init__(self, spec: str, user: object):
        self.spec = spec
        self._user = user
        self._class = type(user).__name__

    def __reduce__(self) -> tuple:
        return (load_strategy, (self.spec,))

    def has(self, method: str) -> bool:
        """Whether the user's class defines `repeats`, `caption` or `loss_weight`."""
        return callable(getattr(self._user, method, None))

    def repeats(self, records: Iterable[Record], counts: AttributeCounts, num_records: int) -> np.ndarray:
        """[num_records] float64: how often each sample comes in an epoch. Raises StrategyError."""
        repeats = np.empty(num_records)
        for row, record in enumerate(records):
            value = self._ask(record, "repeats", counts)
            if not _is_amount(value):
                raise self._refuse_value(record, "repeats", value)
            repeats[row] = value
        return repeats

    def caption(self, record: Record, rng: np.random.Generator) -> str:
        """The text that the caption pipeline begins with. Raises StrategyError."""
        caption = self._ask(record, "caption", rng)
        if not isinstance(caption, str):
            raise self._complain(record, "caption", f"returned {caption!r:.100}, which is not a string")
        return caption

    def loss_weight(self, record: Record) -> float:
        """What a sample's loss is multiplied with, 0 or more; 1 without the method. Raises StrategyError."""
        if not self.has("loss_weight"):
            return 1.0
        weight = self._ask(record, "loss_weight")
        if not _is_amount(weight):
            raise self._refuse_value(record, "loss_weight", weight)
        return float(weight)

    def _ask(self, record: Record, method: str, *arguments: Any) -> Any:
        try:
            return call_user(getattr(self._user, method), record, *arguments)
        except UserCodeError as error:
            raise self._complain(record, method, f"raised {error}") from None

    def _refuse_value(self, record: Record, method: str, value: Any) -> StrategyError:
        return self._complain(record, method, f"returned {value!r:.100}, which is not a finite number of 0 or more")

    def _complain(self, record: Record, method: str, what: str) -> StrategyError:
        return StrategyError(f"{record.get('key')}: {self._class}.{method} of {KEY} = {self.spec} {what}")


def load_strategy(spec: str) -> Strategy:
    """Load `path/to/file.py:ClassName` or `module:ClassName` and make an object of the class.

    Raises:
        UserInputError: there is no such file, module or class, it does not load, or it has none of the methods.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        raise _refuse(spec, "is not path/to/file.py:ClassName or module:ClassName", "name the class after a colon")
    if place.endswith(".py"):
        place = str(Path(place).resolve())
        if not Path(place).is_file():
            raise _refuse(spec, f"{place} is not a file", "check the path (relative to the working directory)")
        load, spec = _load_file, f"{place}:{name}"
    else:
        load = importlib.import_module
    try:
        module = call_user(load, place)
    except UserCodeError as error:
        raise _refuse(spec, f"cannot be loaded: {error}", "mend it; python must be able to import it") from None
    user_class = getattr(module, name, None)
    if not inspect.isclass(user_class):
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        raise _refuse(spec, f"has no class {name}", f"its classes: {', '.join(classes) or 'none'}")
    if not any(callable(getattr(user_class, method, None)) for method in METHODS):
        known = ", ".join(method + arguments for method, arguments in METHODS.items())
        raise _refuse(spec, f"{name} has none of the methods {known}", _suggest_methods(user_class))
    try:
        return Strategy(spec, call_user(user_class))
    except UserCodeError as error:
        cure = "it is made without arguments, once in each process"
        raise _refuse(spec, f"{name}() raised {error}", cure) from None


def call_user(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call code that we did not write, and give whatever it raises one name. Signals and exits pass through.

    Raises:
        UserCodeError: it raised.
    """
    try:
        return function(*arguments)
    except Exception as error:
        trace = error.__traceback__.tb_next if error.__traceback__ else None  # from the user's code on
        lines = "".join(traceback.format_exception(type(error), error, trace)).rstrip()
        raise UserCodeError(f"{type(error).__name__}: {error}\n{lines}") from error


def try_strategy(strategy: Strategy, index: Index) -> list[Problem]:
    """Ask a strategy for some captions and weights, so that one that never works is known before a network is loaded.

    One that fails on some samples only is no problem here: they are skipped and named as training meets them.
    """
    problems = []
    records = [index.record(row) for row in _spread(len(index), NUM_TRIED)]
    rng = np.random.default_rng(0)
    asks = {"caption": lambda record: strategy.caption(record, rng), "loss_weight": strategy.loss_weight}
    for method, ask in asks.items():
        errors = []
        for record in records if strategy.has(method) else ():
            try:
                ask(record)
            except StrategyError as error:
                errors.append(str(error))
        if errors and len(errors) == len(records):
            problems.append(_problem(strategy.spec, f"{method} failed on all samples tried: {errors[0]}"))
    return problems


def compute_repeats(strategy: Strategy, index: Index) -> np.ndarray:
    """[N] float64: how often each row of the index comes in an epoch.

    Raises:
        UserInputError: the strategy failed on a sample, which is named, or leaves nothing to train on.
    """
    try:
        repeats = strategy.repeats(iterate_records(index), count_attributes(index), len(index))
    except StrategyError as error:
        raise UserInputError([_problem(strategy.spec, str(error))]) from None
    if not repeats.any():
        raise UserInputError([_problem(strategy.spec, f"repeats() is 0 for all {len(index)} samples")])
    return repeats


def save_repeats(path: Path, repeats: np.ndarray) -> None:
    """Write repeats as an npy file, for the other ranks, and for the user to look at."""
    with open_atomic(path) as file:
        np.save(file, repeats)


def load_repeats(path: Path) -> np.ndarray:
    """What `save_repeats` wrote, [N] float64."""
    return np.load(path, allow_pickle=False)


def hash_repeats(repeats: np.ndarray) -> str:
    """Names what `compute_repeats` gave, so that a resume can tell whether it still is the same."""
    return hashlib.sha256(np.ascontiguousarray(repeats, np.float64).tobytes()).hexdigest()[:16]


def _load_file(path: str) -> ModuleType:
    # A name of its own, so that a user's file cannot shadow a module; listed, because dataclasses look themselves up.
    name = f"sdxl_trainer_strategy_{hashlib.sha256(path.encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _is_amount(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and bool(0 <= value < math.inf)


def _split(value: Any) -> list[str]:
    """Tags of a list, or of a string with commas between them."""
    tags = map(str, value) if isinstance(value, (list, tuple)) else str(value).split(",")
    return [text for tag in tags if (text := tag.strip())]


def _suggest_methods(user_class: type) -> str:
    own = [name for name in vars(user_class) if not name.startswith("_")]
    near = {name: match[0] for name in own if (match := difflib.get_close_matches(name, METHODS, n=1))}
    if near:
        return ", ".join(f"is {name} meant as {match}?" for name, match in near.items())
    return f"it defines {', '.join(own) or 'nothing'}"


def _spread(length: int, number: int) -> list[int]:
    """At most `number` different rows, spread over the whole length."""
    return sorted({position * length // number for position in range(number)}) if length else []


def _refuse(spec: str, rule: str, cure: str) -> UserInputError:
    return UserInputError([Problem(KEY, spec, rule, cure)])


def _problem(spec: str, rule: str) -> Problem:
    return Problem(KEY, spec, rule, "mend the class, or leave it out")
