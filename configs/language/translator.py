"""Look-up of finished texts in a catalogue."""

import re
from collections.abc import Sequence

from sdxl_trainer.configs.language.catalogue import Entry
from sdxl_trainer.configs.language.templates import WORD, Template, parse_template

# Between the parts of a text that was put together at run time, strongest first, and what they become between parts in
# Chinese.
SEPARATORS = (("; ", "；"), (": ", "："), (", ", "，"))
SINGLE = re.compile(r"(?=\S*\w)\S{1,200}|[\d.,]+ (?:[kMGT]i?B|px|s)")  # a name or a number, with its unit
PLAIN = re.compile(r"[a-z]+")  # a word of any sentence


class Translator:
    """Finds the messages of a catalogue in finished texts.

    Args:
        entries: a catalogue. Entries without a translation are passed over.
    """

    def __init__(self, entries: Sequence[Entry]):
        usable = [entry for entry in entries if entry.translation and not entry.is_fuzzy]
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

    def translate_label(self, text: str) -> str:
        """Return a heading or the name of a row in the catalogue's language."""
        return self._exact.get(text) or self.translate(text)

    def translate(self, text: str) -> str:
        """Return a text in the catalogue's language, as far as it is made of the catalogue's messages."""
        return self._match(text) or self._translate_parts(text)

    def _match(self, text: str) -> str | None:
        """Return the translation of a text that is one message as a whole."""
        if not WORD.search(text):
            return None
        if " " in text and text in self._exact:  # single words may be values or names of the user's
            return self._exact[text]
        words = {"", *WORD.findall(text)}
        candidates = [template for word in words for template in self._by_word.get(word, ())]
        for template in sorted(candidates, key=lambda template: -template.weight):
            if (found := template.pattern.fullmatch(text)) and (filled := self._fill(template, found.groups())):
                return filled
        return None

    def _fill(self, template: Template, values: Sequence[str]) -> str | None:
        """Return the translation of a template; None if the values show that another message was meant."""
        translated = [self.translate(value) if " " in value else value for value in values]
        if template.is_weak:
            if any("; " in value for value in values):  # several messages
                return None
            raw = [value for value, shown in zip(values, translated, strict=True) if value == shown]
            has_digit = any(character.isdigit() for value in raw for character in value)
            if not all(SINGLE.fullmatch(value) and (has_digit or not PLAIN.fullmatch(value)) for value in raw):
                return None
        return template.fill(translated)

    def _translate_parts(self, text: str) -> str:
        """Translate the lines and the clauses of a text, each by itself."""
        if "\n" in text:
            return "\n".join(self._translate_line(line) for line in text.split("\n"))
        for separator, replacement in SEPARATORS:
            parts = text.split(separator) if separator != ": " else text.split(separator, 1)
            translated = [self.translate(part) for part in parts] if len(parts) > 1 else parts
            ends = [self._match(separator + part) for part in parts]  # messages that begin with the separator
            if translated != parts or any(ends[1:]):
                if separator == ", ":  # single words beside messages; before a colon a name of the user's may stand
                    translated = [self._exact.get(part, part) for part in translated]
                # A name or a path keeps the English punctuation behind it.
                whole = all(new != old or not WORD.search(old) for new, old in zip(translated, parts, strict=True))
                between = replacement if whole else separator
                rest = (end or between + part for end, part in zip(ends[1:], translated[1:], strict=True))
                return translated[0] + "".join(rest)
        path, _, rest = text.partition(" ")
        matched = self._match(rest) if "/" in path else None  # a file, and what is wrong with it
        return f"{path} {matched}" if matched else text

    def _translate_line(self, line: str) -> str:
        content = line.strip()
        indent = line[: len(line) - len(line.lstrip())]
        return indent + self.translate(content) if content else line


def _fill_braces(text: str) -> str:
    """Return a message without fields as it is printed: doubled braces are single ones."""
    try:
        parts = list(parse_template(text))
    except ValueError:
        return text
    return "".join(map(str, parts))
