"""Values of a record's fields: texts, paths, sizes and switches, in every shape that metadata have them.

Readers of all formats share these functions. A value that means nothing (null, empty, white space, NaN) is missing. A
value of any other shape than those that are read is refused by its file and key, and never turned into Python's text.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson

from sdxl_trainer.configs.problems import format_count
from sdxl_trainer.data.images.bucket import Size

PATH_FIELDS = ("image_path", "file_name")  # this project's, and that of Hugging Face's image folders
TAG_FIELDS = ("caption", "tags")
DESCRIPTION_FIELDS = ("description", "nl_caption")
TEXT_FIELDS = (*TAG_FIELDS, *DESCRIPTION_FIELDS)
SIZE_FIELDS = ("original_size", "image_size", "train_resolution")
SIDE_FIELDS = (("original_width", "original_height"), ("width", "height"), ("image_width", "image_height"))
REGULARISATION_FIELD = "is_reg"
SWITCHES = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
SIZE = re.compile(r"""[\s\[("']*(-?\d+)(?:\.0*)?[\s"',;:xX×*]+(-?\d+)(?:\.0*)?[\s\])"']*""")
SIDE = re.compile(r"\s*(-?\d+)(?:\.0*)?\s*")
MAX_SIDE_PX = 2**31
MAX_WHOLE = 2.0**53  # below this, every whole number is a float
MAX_SHOWN = 100  # refused values that an error lists


class RefusedValues:
    """Collects the values of a file that are refused, so that one error names them all."""

    def __init__(self, file: Path):
        self._file = file
        self._lines: list[str] = []
        self._count = 0

    def accepts(self, key: str, fields: Mapping[str, Any]) -> bool:
        """Return whether every value of a record can be read. If not, remember the reasons."""
        reasons = list(_list_reasons(fields))
        self._count += len(reasons)
        shown = reasons[: MAX_SHOWN - len(self._lines)]
        self._lines += [f"the record '{key}' has {reason}" for reason in shown]
        return not reasons

    def raise_if_any(self) -> None:
        """Raise ValueError with the file, the keys and the values if any value was refused."""
        if self._count == 1:
            raise ValueError(f"{self._file}: {self._lines[0]}")
        if self._count:
            more = ["..."] if self._count > len(self._lines) else []
            count = format_count(self._count, "value")
            lines = "".join(f"\n        {line}" for line in [*self._lines, *more])
            raise ValueError(f"{self._file}: {count} cannot be read:{lines}")


def has_text(value: Any) -> bool:
    """Return whether a text, number, list or mapping holds any text besides white space."""
    if value is None or isinstance(value, str):
        return bool(value) and not value.isspace()
    if isinstance(value, (list, tuple)):
        return any(map(has_text, value))
    if isinstance(value, dict):
        return any(has_text(tag) and _is_number(weight) for tag, weight in value.items())
    return _is_number(value)


def join_texts(value: Any, joiner: str = ", ") -> str | None:
    """Return the text of a value: a text, a number, a list of these, or tags with a number each; None if it is missing.

    Raises:
        ValueError: the value has another shape.
    """
    if isinstance(value, str):
        return value if has_text(value) else None
    return joiner.join(list_texts(value)) or None


def list_texts(value: Any) -> list[str]:
    """Return the texts in a value as `join_texts` accepts them, without those that are missing.

    Raises:
        ValueError: the value has another shape.
    """
    if isinstance(value, dict):
        if all(weight is None or _is_number(weight, finite=False) for weight in value.values()):
            return [tag for tag, weight in value.items() if has_text(tag) and _is_number(weight)]
    elif isinstance(value, (list, tuple)):
        if not any(isinstance(item, (list, tuple, dict)) for item in value):
            return [text for item in value for text in list_texts(item)]
    elif value is None or isinstance(value, str) or _is_number(value, finite=False):
        if isinstance(value, float) and value.is_integer() and abs(value) < MAX_WHOLE:
            value = int(value)  # a table has 2024.0 for 2024 if the column holds nulls
        return [str(value)] if has_text(value) else []
    raise ValueError("must be a text, a number, a list of these, or a mapping of tags to numbers")


def read_path(value: Any) -> str | None:
    """Return a path that is a text or a whole number; None if it is missing.

    Raises:
        ValueError: the value has another shape.
    """
    if is_missing(value):
        return None
    if isinstance(value, str) or (_is_number(value) and value == int(value)):
        return str(value)
    raise ValueError("must be a path as a text")


def read_size(value: Any) -> Size | None:
    """Return the size in a list of two numbers, or in a text such as `1500x1000`; None if it is missing or impossible.

    Raises:
        ValueError: the value has another shape.
    """
    if is_missing(value):
        return None
    if isinstance(value, str) and (match := SIZE.fullmatch(value)):
        value = list(match.groups())
    if isinstance(value, (list, tuple)) and len(value) == 2:
        sides = [read_side(side) for side in value]
        return None if None in sides else Size(*sides)  # pyright: ignore[reportArgumentType]
    raise ValueError("must be [width, height] in pixels, or a text such as 1500x1000")


def read_side(value: Any) -> int | None:
    """Return a width or height in pixels; None if it is missing, or impossible as 0 and -1 are.

    Raises:
        ValueError: the value is no whole number.
    """
    if is_missing(value):
        return None
    match = SIDE.fullmatch(value) if isinstance(value, str) else None
    number: Any = int(match[1][:20]) if match else value
    if not _is_number(number) or number != int(number):
        raise ValueError("must be whole numbers of pixels")
    return int(number) if 0 < number < MAX_SIDE_PX else None


def read_switch(value: Any) -> bool | None:
    """Return true or false, also as a number or a text; None if it is missing.

    Raises:
        ValueError: the value is neither.
    """
    if is_missing(value):
        return None
    if str(value).strip().lower() not in SWITCHES:
        raise ValueError("must be true or false")
    return SWITCHES[str(value).strip().lower()]


def is_refused(name: str, value: Any) -> bool:
    """Return whether a value of a field, one of VALUE_READERS, cannot be read."""
    try:
        VALUE_READERS[name](value)
    except ValueError:
        return True
    return False


def is_missing(value: Any) -> bool:
    """Return whether a value means nothing: null, empty, white space, or NaN, which tables have for null."""
    if isinstance(value, str):
        return not has_text(value)
    return value is None or value in ([], {}) or (isinstance(value, float) and math.isnan(value))


def _is_number(value: Any, finite: bool = True) -> bool:
    """Return whether a value is a number. JSON has no other than finite numbers, so that others are null there."""
    is_number = isinstance(value, (int, float, Decimal)) and not isinstance(value, bool)
    return is_number and (not finite or isinstance(value, int) or math.isfinite(value))


def _list_reasons(fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield the reason why a value of a record is refused, for each such value."""
    for name, read in VALUE_READERS.items():
        if (value := fields.get(name)) is not None:
            try:
                read(value)
            except ValueError as error:
                yield f"`{name}` = {show_value(value)}, which {error}"


def show_value(value: Any) -> str:
    """Return the beginning of a value as JSON, for messages."""
    try:
        text = orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:  # nested too deeply, or a number of more than 64 bits
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


VALUE_READERS: dict[str, Callable[[Any], Any]] = {
    PATH_FIELDS[0]: read_path,
    **dict.fromkeys(TEXT_FIELDS, list_texts),
    **dict.fromkeys(SIZE_FIELDS, read_size),
    **dict.fromkeys((side for names in SIDE_FIELDS for side in names), read_side),
    REGULARISATION_FIELD: read_switch,
}
