"""Reading and writing of YAML, with the plain words of YAML 1.2.

PyYAML reads words by YAML 1.1, where `5e8` is a text, `010` is 8, `no` is false and `2024-01-01` is a date. Here
numbers are read as YAML 1.2 and JSON read them. A word on which the versions disagree becomes an `AmbiguousWord`, which
configs/load.py refuses, except for `yes`, `no`, `on` and `off` in settings that hold no text.
"""

import math
import re
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple

import yaml

TAG = "tag:yaml.org,2002:"
AMBIGUOUS = "!ambiguous"
NULL = re.compile(r"~|null|Null|NULL|")
BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(
    r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))"
    r"|\.(?:nan|NaN|NAN)"
)
# Words that YAML 1.1 reads as another value: switches, `=`, octal and binary numbers, underscores, base 60, and dates.
SURPRISES = re.compile(
    r"""yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF|=
    |[-+]?0[bB][01_]+ | [-+]?0[xX][0-9a-fA-F_]+
    |[-+]?\.?[0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?
    |[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:(?:[Tt]|[ \t]+)[0-9]{1,2}:[0-9]{2}:[0-9]{2}.*)?""",
    re.VERBOSE,
)
# The tag of a plain word is that of the first pattern that it matches.
PATTERNS = {NULL: TAG + "null", BOOL: TAG + "bool", INT: TAG + "int", FLOAT: TAG + "float", SURPRISES: AMBIGUOUS}
LINE_ENDS = re.compile("[\\r\\x85\\u2028\\u2029]")
SWITCHES = {"yes": True, "on": True, "no": False, "off": False}
MAX_DEPTH = 64
MISSING_COLON = "could not find expected ':'"  # PyYAML's words
OPEN_BRACKET = re.compile(r"expected ',' or .*, but got '(?!<scalar>|\{|\[)")  # PyYAML's words, too
NO_SPACE = re.compile(r"\s*(?:- )?[A-Za-z_]\w*:(?![\s/])")  # a key whose colon is no YAML
NUMBER = re.compile(r"[-+]?[0-9][0-9.]*(?:[eE][-+]?[0-9]+)?")
COMMA_CURE = "write a decimal point instead of the comma, and thousands without a separator"
SPACE_CURE = "put a space after the colon of each setting"
# Words of the errors of PyYAML and of this module → what to do.
CURES = {
    r"'\t'": "indent with spaces: YAML allows no tabs",
    "escape character": "write / instead of \\ in paths, or put single quotes around the text",
    "mapping values are not allowed": "indent settings of one section alike, and quote texts that hold a colon",
    "'{'": "put quotes around texts with braces: ['s3://bucket/set-{0..9}.tar']",
    "expected ',' or": "separate the values by commas, and quote texts that hold brackets or quotation marks",
    MISSING_COLON: SPACE_CURE,
    "is given twice": "remove one of the two",
    "separates": COMMA_CURE,
}


class YamlError(ValueError):
    """A YAML document is malformed. The message is a single line.

    Args:
        cure: what to do about it.
    """

    def __init__(self, message: str, cure: str):
        super().__init__(message)
        self.cure = cure


class AmbiguousWord(str):
    """A word without quotes that YAML 1.1 and YAML 1.2 read as different values."""

    @property
    def switch(self) -> bool | None:
        """The value of `yes`, `no`, `on` and `off`; None for other words."""
        return SWITCHES.get(self.lower())


def load_yaml(text: str) -> Any:
    """Parse a YAML document. Words whose value is ambiguous become `AmbiguousWord`s.

    Raises:
        YamlError: the document is malformed, gives a key twice, contains itself, or is nested too deeply.
    """
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise _explain_error(error, text) from None
    except RecursionError:
        raise YamlError(f"it is nested more than {MAX_DEPTH} levels deep", "nest it less deeply") from None
    _verify_depth(content, (), set())
    return content


def _explain_error(error: yaml.YAMLError, text: str) -> YamlError:
    """Return the place of a mistake and its reason in one line, without the excerpt of the document, and the cure."""
    if isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position]
        line, column = before.count("\n") + 1, error.position - before.rfind("\n")
        reason = f"the character U+{error.character:04X} is not allowed"
        return YamlError(f"line {line}, column {column}: {reason}", "remove this character")
    if not isinstance(error, yaml.MarkedYAMLError):
        return YamlError(str(error).partition("\n")[0], "correct the file")
    # The parser notices a missing colon only in the line below the key, whose place is the context.
    mark = error.context_mark if error.problem == MISSING_COLON else error.problem_mark
    mark, reason = mark or error.context_mark, error.problem or error.context or ""
    if mark is None:
        return YamlError(reason, "correct the file")
    cure = next((cure for words, cure in CURES.items() if words in reason), "correct the line that is named")
    line, column = mark.line, mark.column
    if quoted := _find_quotation(error, text):
        if quoted.start_mark.line == line:
            cure = "double the quotation mark inside the text, or quote the text with the other kind"
        else:
            reason, cure = "the quotation mark is not closed in its line", "close it at the end of the text"
            line, column = quoted.start_mark.line, quoted.start_mark.column
    elif (opened := _find_open_bracket(error, reason)) is not None:
        reason, cure = f"the bracket is not closed before line {line + 1}", "close it after its last entry"
        line, column = opened.line, opened.column
    elif (number := _find_missing_space(reason, text.splitlines(), line)) is not None:
        reason, cure = "there is no space after the colon", SPACE_CURE
        line, column = number, text.splitlines()[number].index(":")
    return YamlError(f"line {line + 1}, column {column + 1}: {reason}", cure)


def dump_yaml(content: Any) -> str:
    """Return nested values as YAML. Readers of YAML 1.1 and of YAML 1.2 read the same values from it."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Quotation(NamedTuple):
    """A text in quotation marks, or one whose quotation mark is not closed."""

    start_mark: yaml.Mark
    end_mark: yaml.Mark


def _find_quotation(error: yaml.MarkedYAMLError, text: str) -> _Quotation | None:
    """Return the text in quotation marks that a mistake follows from, or None.

    A quotation mark that is not closed ends at the next one, lines further down, or nowhere; a quotation mark inside a
    text ends it. What follows is the mistake that PyYAML notices.
    """
    noticed = error.problem_mark
    if noticed is None:
        return None
    opened = error.context_mark if error.context == "while scanning a quoted scalar" else None
    line = opened.line if opened else noticed.line
    with suppress(yaml.YAMLError):
        for token in yaml.scan(text, Loader=_Loader):
            start, end = token.start_mark, token.end_mark
            if not isinstance(token, yaml.ScalarToken) or token.plain or end.line != line:
                continue
            if start.line < line or (end.index == noticed.index and not opened):
                return _Quotation(start, end)
    return _Quotation(opened, noticed) if opened and error.problem == "found unexpected end of stream" else None


def _find_open_bracket(error: yaml.MarkedYAMLError, reason: str) -> yaml.Mark | None:
    """Return the place of the bracket whose end the parser misses in a later line, or None for another mistake."""
    opened, noticed = error.context_mark, error.problem_mark
    if opened is None or noticed is None or not OPEN_BRACKET.match(reason):
        return None
    return opened if opened.line < noticed.line or "<stream end>" in reason else None


def _find_missing_space(reason: str, lines: list[str], number: int) -> int | None:
    """Return the line, counted from 0, whose colon lacks a space and is therefore a part of a word; None if none."""
    if reason.startswith("mapping values are not allowed"):
        # The word continues in the next line with text, whose own colon is the mistake that PyYAML notices.
        number = next((above for above in range(number - 1, -1, -1) if lines[above].strip()), number)
    elif reason != MISSING_COLON:
        return None
    return number if NO_SPACE.match(lines[number]) else None


def _verify_depth(value: Any, parents: tuple[int, ...], finished: set[int]) -> None:
    """Verify that nested values end. An anchor inside its own value makes a value that contains itself."""
    if not isinstance(value, (dict, list)) or id(value) in finished:
        return
    if id(value) in parents or len(parents) >= MAX_DEPTH:
        raise YamlError(f"it contains itself, or is nested more than {MAX_DEPTH} levels deep", "nest it less deeply")
    for item in value.values() if isinstance(value, dict) else value:
        _verify_depth(item, (*parents, id(value)), finished)
    finished.add(id(value))


def _refuse_decimal_comma(node: yaml.MappingNode) -> None:
    """Raise if a number in braces has a comma, such as `{lr: 5,0e-4}`: YAML reads its second half as a key."""
    for (_, value), (key, nothing) in pairwise(node.value):
        halves = [part.value for part in (value, key) if isinstance(part, yaml.ScalarNode) and part.style is None]
        is_close = key.start_mark.index == value.end_mark.index + 1
        if is_close and nothing.value == "" and len(halves) == 2 and all(map(NUMBER.fullmatch, halves)):
            reason = f"the comma in {halves[0]},{halves[1]} separates two entries"
            raise yaml.constructor.ConstructorError(None, None, reason, value.start_mark)


class _WordResolver(yaml.resolver.BaseResolver):
    """Resolver of plain words by PATTERNS."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0]:
            tag = next((tag for pattern, tag in PATTERNS.items() if pattern.fullmatch(value)), self.DEFAULT_SCALAR_TAG)
            return TAG + "merge" if value == "<<" else tag
        return super().resolve(kind, value, implicit)


class _Dumper(_WordResolver, yaml.SafeDumper):
    """A safe YAML dumper that quotes texts which would be read as another value."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Represent a text, between quotes if it holds line ends that plain YAML would change."""
        return self.represent_scalar(TAG + "str", text, style='"' if LINE_ENDS.search(text) else None)

    def represent_items(self, items: list) -> yaml.SequenceNode:
        """Represent a list; numbers stand on one line."""
        are_numbers = all(isinstance(item, (int, float)) for item in items)
        return self.represent_sequence(TAG + "seq", items, flow_style=are_numbers)


class _Loader(_WordResolver, yaml.SafeLoader):
    """A safe YAML loader for the types of JSON. It rejects duplicate keys, of which YAML would use the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        _refuse_decimal_comma(node)
        for key_node, _ in node.value:
            if key_node.tag == TAG + "merge":
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float | AmbiguousWord:
        """Return a number, as an integer where it is written as one."""
        word = node.value
        is_infinite = word.lower().endswith(("inf", "nan"))
        try:
            number = int(word, 0) if INT.fullmatch(word) else float(word.replace(".", "", 1) if is_infinite else word)
        except ValueError as error:  # thousands of digits, or a text with the tag `!!int`
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None
        return AmbiguousWord(word) if isinstance(number, float) and not is_infinite and math.isinf(number) else number

    def construct_switch(self, node: yaml.ScalarNode) -> bool | AmbiguousWord:
        """Return the value of `true` or `false`. Only the tag `!!bool` makes a switch of another word."""
        return node.value.lower() == "true" if BOOL.fullmatch(node.value) else AmbiguousWord(node.value)

    def construct_ambiguous(self, node: yaml.ScalarNode) -> AmbiguousWord:
        """Return a word that is refused later, when the key of its setting is known."""
        return AmbiguousWord(node.value)


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_representer(list, _Dumper.represent_items)
# Settings have the types of JSON. SafeLoader also builds dates, sets and bytes.
SHARED = (None, *(TAG + kind for kind in ("null", "str", "seq", "map")))
_Loader.yaml_constructors = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in SHARED} | {
    TAG + "int": _Loader.construct_number,
    TAG + "float": _Loader.construct_number,
    TAG + "bool": _Loader.construct_switch,
    AMBIGUOUS: _Loader.construct_ambiguous,
}
