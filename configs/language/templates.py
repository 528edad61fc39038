"""Messages with fields, such as `{num_files:,} files`: their parts, and the pattern that a finished text matches."""

import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

WORD = re.compile(r"[A-Za-z]{2,}")
HAN = re.compile(r"[\u3400-\u9fff]")
WIDE = re.compile(r"[\u2026\u3001-\u3011\u3400-\u9fff\uff01-\uff5e]")  # Chinese letters and punctuation
NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?%?|[-+]?(?:nan|inf)%?"
NUMBER_TYPES = "bcdeEfFgGnxX%,"
# Words that connect two values in too many texts to tell a message by them.
CONNECTORS = frozenset("and are at by for from in is no not of on or than the to with GB GiB MB px".split())


@dataclass(frozen=True)
class Field:
    """A field of a message: its name and Python's format, which tells numbers from texts."""

    name: str
    spec: str = ""

    def __str__(self) -> str:
        return f"{{{self.name}:{self.spec}}}" if self.spec else f"{{{self.name}}}"

    @property
    def is_number(self) -> bool:
        """True if the format is one of numbers."""
        return bool(self.spec) and self.spec[-1] in NUMBER_TYPES


Part = str | Field


def format_template(parts: Sequence[Part]) -> str:
    """Return the text of a message: braces of its own are doubled, as in an f-string."""
    return "".join(part.replace("{", "{{").replace("}", "}}") if isinstance(part, str) else str(part) for part in parts)


def parse_template(text: str) -> Iterator[Part]:
    """Yield the literal parts and the fields of a message's text.

    Raises:
        ValueError: its braces do not match.
    """
    for literal, name, spec, _ in string.Formatter().parse(text):
        if literal:
            yield literal
        if name is not None:
            yield Field(name, spec or "")


def list_fields(text: str) -> set[str]:
    """Return the names of the fields of a message's text."""
    return {part.name for part in parse_template(text) if isinstance(part, Field)}


def is_wide(character: str) -> bool:
    """Return whether a character is a Chinese letter or punctuation mark."""
    return WIDE.fullmatch(character) is not None


def count_characters(text: str) -> int:
    """Return the number of characters of a text that are no spaces."""
    return len(text) - text.count(" ")


def join_parts(left: str, right: str) -> str:
    """Join two parts of a text as usual in Chinese.

    A space separates Chinese from Latin letters and digits. The space that a message has beside a field for these is
    dropped where the field's value is Chinese.
    """
    if left.endswith(" ") and is_wide(left[-2:-1]) and is_wide(right[:1]):
        return left[:-1] + right
    follows_mark = is_wide(left[-1:]) and not HAN.fullmatch(left[-1:])
    if right.startswith(" ") and (follows_mark or is_wide(left[-1:]) and is_wide(right[1:2])):
        return left + right[1:]
    edges = left[-1:], right[:1]
    is_mixed = any(map(HAN.fullmatch, edges)) and any(edge.isascii() and edge.isalnum() for edge in edges)
    return f"{left} {right}" if is_mixed else left + right


@dataclass(frozen=True)
class Template:
    """A message with fields and its translation."""

    text: str
    translation: str

    @cached_property
    def parts(self) -> list[Part]:
        """Literal parts and fields."""
        return list(parse_template(self.text))

    @cached_property
    def words(self) -> list[str]:
        """Words of the literal parts that no field can touch, so that they are words of every finished text."""
        marked = "".join(part if isinstance(part, str) else "a" for part in self.parts)
        return [word for word in WORD.findall(marked) if any(word in WORD.findall(part) for part in self._literals)]

    @cached_property
    def weight(self) -> int:
        """Number of literal characters: of two messages that match a text, the one with more of them is meant."""
        return sum(map(len, self._literals))

    @cached_property
    def coverage(self) -> int:
        """Number of literal characters that are no spaces."""
        return sum(map(count_characters, self._literals))

    @cached_property
    def is_weak(self) -> bool:
        """True if the literal parts are found in many texts, such as ` of `; the fields must then be sound."""
        return all(word in CONNECTORS for part in self._literals for word in WORD.findall(part))

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Pattern of finished texts, with a group for each field."""
        groups = []
        for part in self.parts:
            if isinstance(part, str):
                groups.append(re.escape(part))
            else:
                groups.append(f"( *(?:{NUMBER}))" if part.is_number else "(.+?)" if self.is_weak else "(.*?)")
        return re.compile("".join(groups), re.DOTALL)

    @cached_property
    def names(self) -> list[str]:
        """Names of the fields, in the order of the English text."""
        return [part.name for part in self.parts if isinstance(part, Field)]

    @cached_property
    def wrapped(self) -> str:
        """Name of the field that ends both the text and its translation, as in `cure: {cure}`; "" if none does."""
        old, new = self.parts[-1], list(parse_template(self.translation))[-1]
        return old.name if isinstance(old, Field) and isinstance(new, Field) and old.name == new.name else ""

    def fill(self, values: list[str]) -> str:
        """Return the translation with `values` in place of the fields, in the order of the English text."""
        by_name, text = dict(zip(self.names, values, strict=True)), ""
        for part in parse_template(self.translation):
            text = join_parts(text, part if isinstance(part, str) else by_name[part.name])
        return text

    @property
    def _literals(self) -> list[str]:
        return [part for part in self.parts if isinstance(part, str)]
