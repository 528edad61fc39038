"""Look-up of finished texts in a catalogue."""

import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import attrgetter

from sdxl_trainer.configs.language.catalogue import Entry
from sdxl_trainer.configs.language.templates import WORD, Template, count_characters, is_wide, parse_template

# Between the parts of a text that was put together at run time, strongest first, and what they become between parts in
# Chinese.
SEPARATORS = {"; ": "；", ": ": "：", ", ": "，"}
ANY_SEPARATOR = re.compile("(; |: |, )")
MAX_PARTS = 8  # of a text whose parts are tried in every grouping
MAX_NESTED = 24  # of a text whose first and last part are tried by themselves; a longer one is a list
MAX_PLACES = 3  # before a message of several lines
MAX_DEPTH = 40  # of messages inside messages; a text that seems to hold more is a list of names
NUM_KEPT = 4096  # readings of texts and of their parts
PLACE = re.compile(r"(\{\w+\}): (?=[a-z])")  # the file that a message is about
SETTING = re.compile(r"[a-z_]+(?:\.[a-z_]+)+")
SINGLE = re.compile(r"(?=\S*\w)\S{1,200}|[\d.,]+ (?:[kMGT]i?B|px|s)")  # a name or a number, with its unit
LETTER = re.compile(r"[A-Za-z]")
PLAIN = re.compile(r"[a-z]+")  # a word of any sentence


@dataclass(frozen=True)
class Reading:
    """A way to read a text as messages.

    Args:
        translation: the text in the catalogue's language.
        coverage: characters of the text that belong to messages, and not to their fields. Spaces do not count.
        num_odd: fields whose value looks like a part of another message.
        num_messages: messages that the text consists of.
    """

    translation: str
    coverage: int = 0
    num_odd: int = 0
    num_messages: int = 0

    @property
    def rank(self) -> tuple[int, int, int]:
        """The best reading has the largest one: more of the text in fewer messages."""
        return self.coverage, -self.num_odd, -self.num_messages


class Translator:
    """Finds the messages of a catalogue in finished texts.

    A text may be a message, or several that were put together at run time: `prompts.txt:2: has no prompt; cure: ...`.
    Of all ways to read it, the one is taken in which messages cover the most characters.

    Args:
        entries: a catalogue. Entries without a translation are passed over.
    """

    def __init__(self, entries: Sequence[Entry]):
        usable = [entry for entry in entries if entry.translation and not entry.is_fuzzy]
        usable += list(map(_remove_place, filter(_begins_with_place, usable)))
        self._exact = {_fill_braces(entry.text): _fill_braces(entry.translation) for entry in usable}
        # A page looks its texts up before it fills them in; short as they are, they would be found in other messages.
        templates = [Template(e.text, e.translation) for e in usable if "{" in e.text and not e.is_of_page]
        frequency: dict[str, int] = {}
        for template in templates:
            for word in set(template.words):
                frequency[word] = frequency.get(word, 0) + 1
        self._by_word: dict[str, list[Template]] = {}  # by the rarest word of each template; "" for those without any
        for template in templates:
            rarest = min(template.words, key=lambda word: (frequency[word], -len(word)), default="")
            self._by_word.setdefault(rarest, []).append(template)
        self._thread = threading.local()  # its attribute `depth`: texts inside texts that are being read
        self._find_best = lru_cache(NUM_KEPT)(self._compare_readings)

    def translate_label(self, text: str) -> str:
        """Return a heading or the name of a row in the catalogue's language."""
        return self._exact.get(text) or self.translate(text)

    def translate(self, text: str) -> str:
        """Return a text in the catalogue's language, as far as it is made of the catalogue's messages."""
        return self._read(text).translation

    def _read(self, text: str) -> Reading:
        """Return the best reading of a text."""
        depth = getattr(self._thread, "depth", 0)
        if depth >= MAX_DEPTH:
            return Reading(text)
        self._thread.depth = depth + 1
        try:
            return self._find_best(text)
        finally:
            self._thread.depth = depth

    def _compare_readings(self, text: str) -> Reading:
        """Like `_read`, without a limit of depth."""
        if not LETTER.search(text):
            return Reading(text)
        whole = self._read_whole(text)
        if whole and not whole.num_odd and whole.coverage == count_characters(text):
            return whole
        readings = [] if whole is None else [whole]
        if "\n" in text:
            readings += [self._read_lines(text), *self._read_behind_places(text)]
        else:
            readings += self._read_parts(text)
        best = max(readings, key=attrgetter("rank"), default=Reading(text))
        return best if best.coverage else Reading(text)

    def _read_whole(self, text: str) -> Reading | None:
        """Return the best reading of a text as one message; None if it is none."""
        if " " in text and text in self._exact:  # single words may be values or names of the user's
            return Reading(self._exact[text], count_characters(text), num_messages=1)
        words = {"", *WORD.findall(text)}
        candidates = [template for word in words for template in self._by_word.get(word, ())]
        readings = []
        for template in sorted(candidates, key=lambda template: -template.weight):
            if (found := template.pattern.fullmatch(text)) and (reading := self._fill(template, found.groups())):
                readings.append(reading)
        return max(readings, key=attrgetter("rank"), default=None)

    def _fill(self, template: Template, values: Sequence[str]) -> Reading | None:
        """Return the reading of a text by a template; None if the values show that another message was meant."""
        readings = [self._read(value) if " " in value else Reading(value) for value in values]
        translated = [reading.translation for reading in readings]
        if template.is_weak:
            if any("; " in value for value in values):  # several messages
                return None
            raw = [value for value, shown in zip(values, translated, strict=True) if value == shown]
            has_digit = any(character.isdigit() for value in raw for character in value)
            if not all(SINGLE.fullmatch(value) and (has_digit or not PLAIN.fullmatch(value)) for value in raw):
                return None
        num_odd = sum(reading.num_odd for reading in readings)
        for name, value, reading in zip(template.names, values, readings, strict=True):
            if ANY_SEPARATOR.search(value) or "\n" in value:
                num_odd += (not reading.coverage) + (name != template.wrapped)
        coverage = template.coverage + sum(reading.coverage for reading in readings)
        num_messages = 1 + sum(reading.num_messages for reading in readings)
        return Reading(template.fill(translated), coverage, num_odd, num_messages)

    def _read_lines(self, text: str) -> Reading:
        """Read each line of a text by itself."""
        readings = []
        for line in text.split("\n"):
            content = line.strip()
            indent, reading = line[: len(line) - len(line.lstrip())], self._read(content)
            readings.append(replace(reading, translation=f"{indent}{reading.translation}" if content else line))
        return _join_readings(readings, "\n")

    def _read_behind_places(self, text: str) -> Iterator[Reading]:
        """Yield readings of a message of several lines behind a place or a name in its first line."""
        for place in list(ANY_SEPARATOR.finditer(text.partition("\n")[0]))[:MAX_PLACES]:
            if right := self._read_whole(text[place.end() :]):
                left = self._read(text[: place.start()])
                between = _choose_separator(place[0], left.translation, right)
                yield _join_readings([left, right], between, place[0])

    def _read_parts(self, text: str) -> Iterator[Reading]:
        """Yield readings of a text as two parts, whose separator may belong to one of them."""
        pieces = ANY_SEPARATOR.split(text)  # parts, with the separators between them
        places = list(range(1, len(pieces), 2))
        if len(places) >= MAX_PARTS:
            strongest = next(separator for separator in SEPARATORS if separator in pieces)
            if len(places) >= MAX_NESTED:
                yield self._read_list(text.split(strongest), strongest)
                return
            places = [places[0], pieces.index(strongest), places[-1]]
        for place in places:
            first, separator, second = "".join(pieces[:place]), pieces[place], "".join(pieces[place + 1 :])
            left, right = self._read(first), self._read(second)
            if separator == ", ":  # single words beside messages; before a colon a name of the user's may stand
                left, right = self._read_label(first, left, right), self._read_label(second, right, left)
            if left.coverage or right.coverage:
                between = _choose_separator(separator, left.translation, right)
                yield _join_readings([left, right], between, separator)
            if (end := self._read_whole(separator + second)) and second:
                yield _join_readings([left, end], "")
            if (start := self._read_whole(first + separator)) and first:
                yield _join_readings([start, right], "")
        path, _, rest = text.partition(" ")
        if "/" in path and (matched := self._read_whole(rest)):  # a file, and what is wrong with it
            yield replace(matched, translation=f"{path} {matched.translation}")

    def _read_list(self, parts: Sequence[str], separator: str) -> Reading:
        """Read many parts, each by itself."""
        readings = [self._read(part) for part in parts]
        shown = readings[0].translation
        for reading in readings[1:]:
            shown += _choose_separator(separator, shown, reading) + reading.translation
        return replace(_join_readings(readings, separator), translation=shown)

    def _read_label(self, text: str, reading: Reading, other: Reading) -> Reading:
        """Return the reading of a part beside another one; a single word beside a message is a label."""
        is_label = not reading.coverage and other.coverage and text in self._exact
        return Reading(self._exact[text], count_characters(text), num_messages=1) if is_label else reading


def _join_readings(readings: Sequence[Reading], between: str, separator: str = "") -> Reading:
    """Return the reading of a text from those of its parts.

    Args:
        between: what the translation has between the parts.
        separator: what the text has there, as far as it belongs to none of the parts.
    """
    return Reading(
        between.join(part.translation for part in readings),
        sum(part.coverage for part in readings) + count_characters(separator),
        sum(part.num_odd for part in readings),
        sum(part.num_messages for part in readings),
    )


def _choose_separator(separator: str, left: str, right: Reading) -> str:
    """Return the separator of two parts: of Chinese between messages, and of English between names and values."""
    first = right.translation[:1]
    is_value = SETTING.fullmatch(left) is not None and first.isdigit()
    is_message = separator == ": " and right.coverage and not is_value
    is_chinese = separator == "; " or is_message or is_wide(left[-1:]) or is_wide(first)
    return SEPARATORS[separator] if is_chinese else separator


def _begins_with_place(entry: Entry) -> bool:
    begin = PLACE.match(entry.text)
    return begin is not None and entry.translation.startswith(f"{begin[1]}：")


def _remove_place(entry: Entry) -> Entry:
    """Return a message without the field and the colon at its beginning: where a setting names the file already."""
    text = PLACE.sub("", entry.text)
    return replace(entry, text=text, translation=entry.translation.partition("：")[2])


def _fill_braces(text: str) -> str:
    """Return a message without fields as it is printed: doubled braces are single ones."""
    try:
        parts = list(parse_template(text))
    except ValueError:
        return text
    return "".join(map(str, parts))
