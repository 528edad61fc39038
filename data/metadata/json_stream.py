"""Metadata files of any size, a block at a time: JSON objects of records, and JSON Lines.

A large object is cut between two of its members, at a comma outside strings and nested values, and each piece is
parsed as an object of its own. So memory does not grow with the file, and parsing is as fast as orjson is.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

BLOCK_BYTES = 4 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
QUOTE, BACKSLASH = 0x22, 0x5C
NO_MEMBERS = (np.empty(0, np.int64), np.empty(0, np.int64), -1)
OPENING, CLOSING, BRACKET_BIT = 0x7B, 0x7D, 0x20  # `{` and `}`; brackets differ from braces in this one bit


class _Place:
    """Where a block begins: line and column, counted from 0."""

    def __init__(self, file: Path):
        self.file = file
        self.line = 0
        self.column = 0

    def move(self, text: bytes) -> None:
        """Past `text`."""
        start = text.rfind(b"\n") + 1
        self.line += text.count(b"\n")
        self.column = (0 if start else self.column) + len(text[start:].decode("utf-8", "replace"))

    def complain(self, text: bytes, error: orjson.JSONDecodeError, prefix: int = 0) -> ValueError:
        """What is wrong with `text`, which begins here, after so many bytes that are not in the file."""
        line, column, message = error.lineno, error.colno, error.msg
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as wrong:
            before = text[: wrong.start]
            line, message = before.count(b"\n") + 1, f"not UTF-8: {wrong.reason}"
            column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8", "replace")) + 1
        column += self.column - prefix if line == 1 else 0
        return ValueError(f"{self.file}:{self.line + line}:{column}: malformed JSON: {message}")


@dataclass(frozen=True)
class JsonChunk:
    """Some members of a JSON object: `text` is an object of its own. Good until the next one is asked for."""

    text: bytes
    starts: np.ndarray  # [num_members] where the value of each member begins that is an object or a list
    ends: np.ndarray  # [num_members] its last byte
    place: _Place  # where the text begins in the file
    prefix: int  # bytes at the beginning of the text that are not in the file

    def parse(self) -> dict[str, Any]:
        """The members.

        Raises:
            ValueError: malformed, with file, line and column; no object; or a key that occurs twice.
        """
        return _parse_members(self.text, self.place, self.prefix, len(self.ends))


def iterate_chunks(file: Path) -> Iterator[JsonChunk]:
    """A JSON object in pieces of some thousand members, in order. What a key says that occurs in two pieces, the caller
    sees twice.

    Raises:
        ValueError: what a piece's `parse` finds wrong, if the file cannot be cut there.
    """
    place = _Place(file)
    with open(file, "rb") as stream:
        text, prefix = stream.read(BLOCK_BYTES).removeprefix(BYTE_ORDER_MARK), b""
        while True:
            starts, ends, cut = _find_members(text, len(prefix)) if text.lstrip()[:1] == b"{" or prefix else NO_MEMBERS
            more = stream.read(max(BLOCK_BYTES, len(text)) if cut < 0 else max(0, BLOCK_BYTES - len(text) + cut))
            if cut < 0 and more:  # a record of many megabytes, the last one, or a file that is not well-formed
                text += more
                continue
            piece = text if cut < 0 else text[:cut] + b"}"
            yield JsonChunk(prefix + piece, starts + len(prefix), ends + len(prefix), place, len(prefix))
            if cut < 0:
                return
            place.move(text[: cut + 1])
            text, prefix = text[cut + 1 :] + more, b"{"


def iterate_lines(file: Path) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """(line number, object) of each line that is not blank, some thousands at a time.

    Raises:
        ValueError: a line is malformed (with its number and the column), or no object.
    """
    with open(file, "rb") as stream:
        number = 0
        while lines := stream.readlines(BLOCK_BYTES):
            if number == 0:
                lines[0] = lines[0].removeprefix(BYTE_ORDER_MARK)
            yield [(at, _parse_line(file, at, line)) for at, line in enumerate(lines, number + 1) if not line.isspace()]
            number += len(lines)


def is_json_lines(file: Path) -> bool:
    """Whether a file holds an object a line, whatever it is called: more follows its first line, which is one."""
    with open(file, "rb") as stream:
        first, second = stream.readline(BLOCK_BYTES).removeprefix(BYTE_ORDER_MARK), stream.read(64).lstrip()
    try:
        return second[:1] == b"{" and isinstance(orjson.loads(first), dict)
    except orjson.JSONDecodeError:
        return False


def _parse_line(file: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        place = _Place(file)
        place.line = number - 1
        raise place.complain(line, error) from None
    if not isinstance(fields, dict):
        raise ValueError(f"{file}:{number}: the record must be a JSON object, not a {type(fields).__name__}")
    return fields


def _parse_members(text: bytes, place: _Place, prefix: int, num_members: int) -> dict[str, Any]:
    try:
        members = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise place.complain(text, error, prefix) from None
    if not isinstance(members, dict):
        raise ValueError(f"{place.file}: must be a JSON object keyed by file stem, not a {type(members).__name__}")
    if prefix and not members:
        raise ValueError(f"{place.file}:{place.line + 1}:{place.column + 1}: malformed JSON: trailing comma")
    if len(members) < num_members:
        counts = Counter(key for key, _ in json.loads(text, object_pairs_hook=_keep_outer_pairs))
        twins = [key for key, count in counts.items() if count > 1]
        if twins:
            raise ValueError(f"{place.file}: {len(twins)} keys occur twice: {', '.join(map(repr, twins[:20]))}")
    return members


def _keep_outer_pairs(pairs: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    return pairs


def _find_members(text: bytes, depth: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(where the values of the outer object's members begin, where they end, the comma behind the last of them).

    Without such a comma, or where the object ends, it is -1, and the members are all that end in the text.

    Args:
        depth: 1 if the text begins within the object, 0 if before it.
    """
    places, opens = _find_brackets(text)
    depths = depth + np.cumsum(np.where(opens, 1, -1))
    starts, ends = places[(depths == 2) & opens], places[(depths == 1) & ~opens]
    if len(depths) and depths.min() > 0:
        for back in (1, 2):  # behind the last one the comma may not have been read yet
            end = int(ends[-back]) if len(ends) >= back else len(text)
            rest = text[end + 1 : end + 1024]
            comma = end + 1 + len(rest) - len(rest.lstrip())
            if text[comma : comma + 1] == b",":
                number = len(ends) - back + 1
                return starts[:number], ends[:number], comma
    return starts, ends, -1


def _find_brackets(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Places of the braces and brackets outside strings, and whether each is an opening one."""
    letters = np.frombuffer(text, np.uint8)
    quotes = np.flatnonzero(letters == QUOTE)
    doubtful = np.flatnonzero(letters[quotes - 1] == BACKSLASH)  # before the first byte numpy has the last: harmless
    escaped = [at for at in doubtful.tolist() if _count_backslashes(text, int(quotes[at])) % 2]
    quotes = np.delete(quotes, escaped)
    letters = letters | BRACKET_BIT
    places = np.flatnonzero((letters == OPENING) | (letters == CLOSING))
    places = places[np.searchsorted(quotes, places) % 2 == 0]
    return places, letters[places] == OPENING


def _count_backslashes(text: bytes, end: int) -> int:
    """Backslashes that stand directly before a place."""
    start = end
    while start and text[start - 1] == BACKSLASH:
        start -= 1
    return end - start
