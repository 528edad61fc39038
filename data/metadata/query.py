"""Queries on records, such as `aesthetic_score >= 5 and tags contains cat`: a small language without code in it.

    query       = alternative {"or" alternative}
    alternative = condition {"and" condition}
    condition   = "not" condition | "(" query ")" | field operator value | field "exists"
    operator    = "==" | "=" | "!=" | "<" | "<=" | ">" | ">=" | "contains"
    value       = number | true | false | word | 'text' | "text"

A record without the field satisfies no comparison. `contains` finds an element of a list, or whole words of a text,
and ignores case.
"""

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Value = str | float | bool
Test = Callable[[Mapping[str, Any]], bool]
TOKEN = re.compile(r"""\s*(?:(?P<text>'[^']*'|"[^"]*")|(?P<mark>==|!=|<=|>=|[=<>()])|(?P<word>[^\s'"=!<>()]+))""")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
KEYWORDS = ("and", "or", "not", "contains", "exists")
MAX_DEPTH = 100  # of brackets and negations


class QueryError(ValueError):
    """A query that cannot be read; the message says at which word."""


@dataclass(frozen=True)
class Query:
    """A query that was read.

    Args:
        fields: names of the fields that it asks for.
        matches: returns whether a record satisfies the query.
    """

    fields: frozenset[str]
    matches: Test


def parse_query(text: str) -> Query:
    """Read a query.

    Raises:
        QueryError: it is none.
    """
    parser = _Parser(list(_split(text)))
    test = parser.read_query()
    if parser.word is not None:
        raise QueryError(f"ends before {parser.word!r}: combine conditions by and, or")
    return Query(frozenset(parser.fields), test)


def _split(text: str) -> Iterator[tuple[str, str]]:
    """Yield the kind and the text of each word."""
    place = 0
    while text[place:].strip():
        match = TOKEN.match(text, place)
        if match is None:
            raise QueryError(f"cannot be read at {text[place:].strip()[:20]!r}")
        place = match.end()
        yield str(match.lastgroup), str(match[str(match.lastgroup)])


class _Parser:
    """Reads a query from its words, one after the other."""

    def __init__(self, words: list[tuple[str, str]]):
        self._words, self._place, self._depth = words, 0, 0
        self.fields: set[str] = set()

    @property
    def word(self) -> str | None:
        """The next word; None at the end."""
        return self._words[self._place][1] if self._place < len(self._words) else None

    def read_query(self) -> Test:
        return self._read_chain("or", lambda: self._read_chain("and", self._read_condition, all), any)

    def _read_chain(self, word: str, read: Callable[[], Test], combine: Callable[[Iterator[bool]], bool]) -> Test:
        tests = [read()]
        while self.word == word:
            self._place += 1
            tests.append(read())
        return tests[0] if len(tests) == 1 else lambda record: combine(test(record) for test in tests)

    def _read_condition(self) -> Test:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise QueryError(f"has more than {MAX_DEPTH} brackets and negations")
        word = self.word
        if word == "not":
            self._place += 1
            test = self._read_condition()
            return lambda record: not test(record)
        if word == "(":
            self._place += 1
            test = self.read_query()
            if self.word != ")":
                raise QueryError("lacks a closing bracket")
            self._place += 1
            return test
        return self._read_comparison()

    def _read_comparison(self) -> Test:
        kind, field = self._take("a field")
        if kind != "word" or field in KEYWORDS:
            raise QueryError(f"has {field!r} where the name of a field must stand")
        self.fields.add(field)
        _, mark = self._take("an operator, such as >= or contains,")
        if mark == "exists":
            return lambda record: record.get(field) is not None
        if mark != "contains" and mark not in COMPARISONS:
            raise QueryError(f"has {mark!r} where an operator must stand: == != < <= > >= contains exists")
        kind, text = self._take("a value")
        if kind == "mark" or (kind == "word" and text in KEYWORDS):
            raise QueryError(f"has {text!r} where a value must stand; put texts with signs in quotes")
        value = text[1:-1] if kind == "text" else _read_value(text)
        if mark == "contains":
            return lambda record: _contains(record.get(field), str(value))
        return lambda record: _compare(COMPARISONS[mark], record.get(field), value)

    def _take(self, wanted: str) -> tuple[str, str]:
        if self._place == len(self._words):
            raise QueryError(f"ends where {wanted} must stand")
        self._place += 1
        return self._words[self._place - 1]


def _read_value(word: str) -> Value:
    """Return the number, the truth value or the text that a word without quotes means."""
    if NUMBER.fullmatch(word):
        return float(word)
    return {"true": True, "false": False}.get(word.lower(), word)


def _compare(compare: Callable[[Any, Any], bool], found: Any, value: Value) -> bool:
    """Compare a record's value; False if it is missing or of another type. Texts of numbers count as numbers."""
    if found is None:
        return False
    if isinstance(value, float) and isinstance(found, str):
        found = float(found) if NUMBER.fullmatch(found.strip()) else None
    is_number = isinstance(found, (int, float)) and not isinstance(found, bool)
    fits = is_number if isinstance(value, float) else type(found) is type(value)
    return bool(fits and compare(found, value))


def _contains(found: Any, value: str) -> bool:
    """Return whether a list has an element, or a text has these words."""
    if isinstance(found, (list, tuple)):
        return any(str(item).strip().lower() == value.lower() for item in found)
    if not isinstance(found, str):
        return False
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", found, re.IGNORECASE) is not None
