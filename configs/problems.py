"""Problems with the user's input, reported together in one message; errors that end programs; numbers in messages."""

import argparse
import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from sdxl_trainer.configs.language.translate import translate

MAX_PROBLEMS = 100  # shown in one message

# Terminal codes, line breaks, marks that reverse the direction of text, and halves of characters (names that are not
# UTF-8) could hide text in a log, or pass for further lines. A line break before spaces cannot: no line begins so.
CONTROLS = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
ALL_CONTROLS, CONTROLS_WITHIN_LINES = re.compile(rf"[{CONTROLS}]|\n(?!  )"), re.compile(f"[{CONTROLS}]")

WIDE_MARKS = re.compile("[［］【】，、“”‘’＂]")


@dataclass(frozen=True)
class Problem:
    """A problem with a setting or argument: its key, its value, the broken rule, and a cure."""

    key: str
    value: Any
    rule: str
    cure: str = ""
    is_next_step: bool = False  # nothing is wrong: the cure is what comes next, such as filling the cache

    def __str__(self) -> str:
        return self.format()

    def format(self, translate: Callable[[str], str] = str) -> str:
        """Return the problem as the lines of a message, whose rule and cure `translate` puts into another language."""
        shown = "" if self.value is None else f" = {_shorten(self.value)}"
        lines = [f"  - {escape_controls(self.key)}{shown}", escape_controls(translate(self.rule))]
        if self.cure:
            lines.append(escape_controls(translate(f"cure: {self.cure}")))
        return "\n      ".join(lines)


class UserInputError(ValueError):
    """The user's input is wrong. Programs print the whole message and exit with status 2."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = list(problems)
        super().__init__(self._format())

    def format(self) -> str:
        """Return the message in the user's language."""
        return self._format(translate)

    def _format(self, translate: Callable[[str], str] = str) -> str:
        title = translate(f"{format_count(len(self.problems), 'problem')} in the settings:")
        lines = [title, *(problem.format(translate) for problem in self.problems[:MAX_PROBLEMS])]
        if len(self.problems) > MAX_PROBLEMS:
            further = format_count(len(self.problems) - MAX_PROBLEMS, "further problem")
            lines.append(f"  - {translate(f'and {further}')}")
        return "\n".join(lines)


class FailedError(RuntimeError):
    """The work failed for a reason that the message explains in full. Programs exit with status 1 and no traceback."""


def raise_if_any(problems: Iterable[Problem]) -> None:
    """Raise one UserInputError that lists all problems; do nothing if there are none."""
    problems = list(problems)
    if problems:
        raise UserInputError(problems)


def join_reasons(reasons: Sequence[str], limit: int = 100) -> str:
    """Return reasons as lines of one message, at most `limit` of them and the number of the others."""
    more = [f"... and {len(reasons) - limit:,} more"] if len(reasons) > limit else []
    return "\n      ".join([*reasons[:limit], *more])


def format_count(count: int, noun: str, plural: str = "") -> str:
    """Return a count with its noun, in the singular for 1: `1 rank`, `2,000 ranks`. The plural adds an s by default."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def format_rate(per_second: float, noun: str = "image") -> str:
    """Return a speed as people read it: `12.3 images/s`, and below one a second `2.4 s/image`; "-" if it is unknown."""
    if not math.isfinite(per_second) or per_second <= 0:
        return "-"
    number, unit = (per_second, f"{noun}s/s") if per_second >= 1 else (1 / per_second, f"s/{noun}")
    return f"{number:,.0f} {unit}" if number >= 1000 else f"{number:.1f} {unit}"


def describe_seconds(seconds: float) -> str:
    """Return a duration as text, such as "40 s", "12 min", "3 h 20 min" or "2 d 4 h"."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes:,} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours:,} h {minutes:,} min"
    return f"{hours // 24:,} d {hours % 24} h"


def format_value(value: Any) -> str:
    """Return a value as YAML writes it in one line: `null`, `true`, `[1, 2]`, `{name: 1}`; a text is in quotes."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else f"{'-' if value < 0 else ''}.inf"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {format_value(item)}' for key, item in value.items())}}}"
    return repr(str(value)) if isinstance(value, (str, PurePath)) else str(value)


def choose_cure(value: Any, cure: str) -> str:
    """Return the cure of a wrong value, or what to write instead of a mark that an input method for Chinese gave."""
    found = WIDE_MARKS.search(str(value))
    return f"write brackets, commas and quotation marks of half width, not {found[0]}" if found else cure


def describe_encoding(error: UnicodeDecodeError) -> str:
    """Return what is wrong with a text that is not UTF-8: its likely encoding, and what converts it."""
    encoding = guess_encoding(error.object)
    return f"is not UTF-8, but probably {encoding}; convert it: iconv -f {encoding} -t UTF-8 FILE > NEW"


def guess_encoding(content: bytes) -> str:
    """Return the encoding that a text most likely has, which is not UTF-8; a name that Python and iconv know."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    runs = re.findall(rb"[\x80-\xff]+", content)
    kana = re.findall(rb"\x82[\x9f-\xf1]|\x83[\x40-\x96]", content)
    for encoding, is_likely in {
        "shift_jis": 4 * len(kana) > sum(map(len, runs)),
        "gb18030": any(len(run) > 1 for run in runs),  # letters of Latin-1 stand alone between those of ASCII
    }.items():
        with suppress(UnicodeDecodeError):
            content.decode(encoding)
            if is_likely:
                return encoding
    return "latin1"


def suggest_name(word: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the known name that a word most likely means, whatever its case, or an empty string.

    Args:
        cutoff: least likeness, 0 to 1.
    """
    by_lower_case: dict[str, str] = {}
    for name in names:
        by_lower_case.setdefault(name.lower(), name)
    near = difflib.get_close_matches(word.lower(), [*by_lower_case], n=1, cutoff=cutoff)
    return by_lower_case[near[0]] if near else ""


def parse_count(text: str, least: int = 1) -> int:
    """Return the whole number that an argument of a command line gives.

    Raises:
        argparse.ArgumentTypeError: it is not a whole number, or less than `least`.
    """
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def escape_controls(text: str, keep_lines: bool = False) -> str:
    """Return a text in which control characters are written as escapes, such as `\\n`: names in data may hold any.

    Args:
        keep_lines: leave all line breaks, because the text is meant to have several lines. Otherwise only those before
            two spaces remain.
    """
    controls = CONTROLS_WITHIN_LINES if keep_lines else ALL_CONTROLS
    return controls.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def _shorten(value: Any, limit: int = 100) -> str:
    text = format_value(value)
    # The end of a path says more than its middle.
    return text if len(text) <= limit else f"{text[: limit // 2 - 3]}...{text[-limit // 2 :]}"
