"""Readers of JSON metadata files of any size, one chunk at a time: JSON objects of records, and JSON Lines.

A large object is cut between two of its members, at a comma outside strings and nested values, and each chunk is parsed
as an object of its own. Memory does not grow with the file, and parsing is as fast as orjson.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from sdxl_trainer.configs.problems import describe_encoding, format_count
from sdxl_trainer.data.files import open_text_stream

BLOCK_BYTES = 4 << 20
MAX_SHOWN = 20  # duplicate keys that an error lists
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
QUOTE, BACKSLASH = 0x22, 0x5C
OPENING, CLOSING, BRACKET_BIT = 0x7B, 0x7D, 0x20  # `{` and `}`; brackets differ from braces in this one bit


class FilePosition:
    """Position of a text in a file, for error messages: line and column, counted from 0."""

    def __init__(self, file: Path, line: int = 0, column: int = 0):
        self.file = file
        self.line = line
        self.column = column

    def advance(self, text: bytes) -> None:
        """Move the position to the end of `text`."""
        start = text.rfind(b"\n") + 1
        self.line += text.count(b"\n")
        self.column = (0 if start else self.column) + len(text[start:].decode("utf-8", "replace"))

    def build_error(self, text: bytes, error: orjson.JSONDecodeError, prefix: int = 0) -> ValueError:
        """Build the error that names the file, line and column of a mistake in `text`, which starts at this position.

        Args:
            prefix: bytes at the beginning of `text` that are not in the file.
        """
        line, column, message = error.lineno, error.colno, f"malformed JSON: {error.msg}"
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as decode_error:
            before = text[: decode_error.start]
            line, message = before.count(b"\n") + 1, describe_encoding(decode_error)
            column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8", "replace")) + 1
        column += self.column - prefix if line == 1 else 0
        return ValueError(f"{self.file}:{self.line + line}:{column}: {message}")


@dataclass(frozen=True)
class JsonChunk:
    """Some members of a JSON object, as an object of their own. A chunk is valid until the next one is read."""

    text: bytes
    starts: np.ndarray  # [num_members] the first byte of each member's value, if the value is an object or a list
    ends: np.ndarray  # [num_members] the last byte of that value
    position: FilePosition  # of the text
    prefix: int  # bytes at the beginning of the text that are not in the file

    def parse(self) -> dict[str, Any]:
        """Return the members.

        Raises:
            ValueError: malformed (with file, line and column), not an object, or a key occurs twice.
        """
        return _parse_members(self.text, self.position, self.prefix, len(self.ends))


class NumberedLine(NamedTuple):
    """A line of a JSON Lines file."""

    number: int  # counted from 1
    fields: dict[str, Any]


class _Members(NamedTuple):
    """The members of a JSON object whose values end within a piece of its text."""

    starts: np.ndarray  # the first byte of each member's value
    ends: np.ndarray  # the last byte of that value
    comma: int  # the comma after the last member; -1 if there is none, or if the object ends within the text


class _Brackets(NamedTuple):
    """Braces and brackets outside strings, in the order of the text."""

    places: np.ndarray  # [N] index of the byte
    opens: np.ndarray  # [N] bool, false for a closing one


NO_MEMBERS = _Members(np.empty(0, np.int64), np.empty(0, np.int64), -1)


def iterate_chunks(file: Path) -> Iterator[JsonChunk]:
    """Yield a JSON object in chunks of some thousand members, in order.

    A file that cannot be cut is one chunk, whose `parse` raises the error. A key may occur again in another chunk.
    """
    position = FilePosition(file)
    with open_text_stream(file) as stream:
        text, prefix = stream.read(BLOCK_BYTES).removeprefix(BYTE_ORDER_MARK), b""
        while True:
            is_object = bool(prefix) or text.lstrip()[:1] == b"{"
            starts, ends, comma = _find_members(text, len(prefix)) if is_object else NO_MEMBERS
            more = stream.read(max(BLOCK_BYTES, len(text)) if comma < 0 else max(0, BLOCK_BYTES - len(text) + comma))
            # No comma: a record of many megabytes, the last record, or a malformed file. More text shows which.
            if comma < 0 and more:
                text += more
                continue
            members = text if comma < 0 else text[:comma] + b"}"
            yield JsonChunk(
                text=prefix + members,
                starts=starts + len(prefix),
                ends=ends + len(prefix),
                position=position,
                prefix=len(prefix),
            )
            if comma < 0:
                return
            position.advance(text[: comma + 1])
            text, prefix = text[comma + 1 :] + more, b"{"


def iterate_lines(file: Path) -> Iterator[list[NumberedLine]]:
    """Yield the lines that are not blank, some thousands at a time.

    Raises:
        ValueError: a line is malformed (with its number and the column), or not an object.
    """
    with open_text_stream(file) as stream:
        number = 0
        while lines := stream.readlines(BLOCK_BYTES):
            if number == 0:
                lines[0] = lines[0].removeprefix(BYTE_ORDER_MARK)
            yield [_parse_line(file, at, line) for at, line in enumerate(lines, number + 1) if not line.isspace()]
            number += len(lines)


def is_json_lines(file: Path) -> bool:
    """Return whether a file's first line is a JSON object and another object follows. The file name is ignored."""
    with open_text_stream(file) as stream:
        first, second = stream.readline(BLOCK_BYTES).removeprefix(BYTE_ORDER_MARK), stream.read(64).lstrip()
    try:
        return second[:1] == b"{" and isinstance(orjson.loads(first), dict)
    except orjson.JSONDecodeError:
        return False


def _parse_line(file: Path, number: int, line: bytes) -> NumberedLine:
    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise FilePosition(file, line=number - 1).build_error(line, error) from None
    if not isinstance(fields, dict):
        raise ValueError(f"{file}:{number}: the record must be a JSON object, not a {type(fields).__name__}")
    return NumberedLine(number, fields)


def _parse_members(text: bytes, position: FilePosition, prefix: int, num_members: int) -> dict[str, Any]:
    try:
        members = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise position.build_error(text, error, prefix) from None
    if not isinstance(members, dict):
        raise ValueError(f"{position.file}: must be a JSON object keyed by file stem, not a {type(members).__name__}")
    if prefix and not members:
        place = f"{position.file}:{position.line + 1}:{position.column + 1}"
        raise ValueError(f"{place}: malformed JSON: trailing comma")
    if len(members) < num_members:
        # A dict would lose the duplicates. With the hook, json.loads returns the pairs of the outer object.
        counts = Counter(key for key, _ in json.loads(text, object_pairs_hook=lambda pairs: pairs))
        duplicates = [key for key, count in counts.items() if count > 1]
        if duplicates:
            shown = ", ".join(map(repr, duplicates[:MAX_SHOWN])) + (", ..." if len(duplicates) > MAX_SHOWN else "")
            raise ValueError(f"{position.file}: {format_count(len(duplicates), 'duplicate key')}: {shown}")
    return members


def _find_members(text: bytes, depth: int) -> _Members:
    """Find the outer object's members up to the last one with a comma after it, or all that end in the text.

    The members before the last comma are complete. Without a comma, the object ends or more text is needed.

    Args:
        depth: 1 if the text starts inside the object, 0 if it starts before the object.
    """
    places, opens = _find_brackets(text)
    depths = depth + np.cumsum(np.where(opens, 1, -1))
    starts, ends = places[(depths == 2) & opens], places[(depths == 1) & ~opens]
    if len(depths) and depths.min() > 0:
        # The comma after the last member may not have been read yet.
        for back in (1, 2):
            end = int(ends[-back]) if len(ends) >= back else len(text)
            rest = text[end + 1 : end + 1024]
            comma = end + 1 + len(rest) - len(rest.lstrip())
            if text[comma : comma + 1] == b",":
                number = len(ends) - back + 1
                return _Members(starts[:number], ends[:number], comma)
    return _Members(starts, ends, -1)


def _find_brackets(text: bytes) -> _Brackets:
    """Find the braces and brackets outside strings."""
    letters = np.frombuffer(text, np.uint8)
    quotes = np.flatnonzero(letters == QUOTE)
    # For a quote at index 0, numpy looks at the last byte; `_count_backslashes` then finds none before the quote.
    after_backslash = np.flatnonzero(letters[quotes - 1] == BACKSLASH)
    escaped = [at for at in after_backslash.tolist() if _count_backslashes(text, int(quotes[at])) % 2]
    quotes = np.delete(quotes, escaped)
    letters = letters | BRACKET_BIT
    places = np.flatnonzero((letters == OPENING) | (letters == CLOSING))
    places = places[np.searchsorted(quotes, places) % 2 == 0]
    return _Brackets(places, letters[places] == OPENING)


def _count_backslashes(text: bytes, end: int) -> int:
    """Count the backslashes directly before `end`."""
    start = end
    while start and text[start - 1] == BACKSLASH:
        start -= 1
    return end - start
