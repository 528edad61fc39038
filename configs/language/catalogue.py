"""Catalogues of translations in gettext's PO format: reader and writer.

They use the part of the format that the catalogues here need: `#:` (sources), `#, fuzzy` (a translation to check),
`msgid` and `msgstr`. Any PO editor can edit them. PO's escapes in quoted texts are among those of JSON.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HEADER = """\
msgid ""
msgstr ""
"Project-Id-Version: sdxl-trainer\\n"
"Language: {language}\\n"
"MIME-Version: 1.0\\n"
"Content-Type: text/plain; charset=UTF-8\\n"
"Content-Transfer-Encoding: 8bit\\n"
"Plural-Forms: nplurals=1; plural=0;\\n"
"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A message and its translation.

    Args:
        text: the English text, with fields as in the sources: `{num_files:,} files`.
        translation: empty if there is none.
        sources: files that contain the message.
        is_fuzzy: the translation is of a similar message that the sources no longer contain. It is not used.
    """

    text: str
    translation: str = ""
    sources: tuple[str, ...] = ()
    is_fuzzy: bool = False

    @property
    def is_of_page(self) -> bool:
        """True if only pages contain the message."""
        return bool(self.sources) and all(source.endswith((".html", ".js")) for source in self.sources)


def read_catalogue(path: Path) -> list[Entry]:
    """Read a PO file.

    Raises:
        ValueError: a line is neither a comment, a keyword nor a quoted text.
    """
    entries: list[Entry] = []
    for number, block in enumerate(path.read_text(encoding="utf-8").split("\n\n")):
        texts, sources, is_fuzzy, keyword = {"msgid": "", "msgstr": ""}, [], False, ""
        for line in block.splitlines():
            if line.startswith("#"):
                sources += line[2:].split() if line.startswith("#:") else []
                is_fuzzy = is_fuzzy or line.startswith("#, fuzzy")
                continue
            word, _, rest = line.partition(" ")
            keyword, quoted = (word, rest) if word in texts else (keyword, line)
            if keyword not in texts or not (quoted.startswith('"') and quoted.endswith('"')):
                raise ValueError(f"{path}: entry {number}: {line!r} is no line of a PO file")
            texts[keyword] += json.loads(quoted)
        if texts["msgid"]:
            entry = Entry(text=texts["msgid"], translation=texts["msgstr"], sources=tuple(sources), is_fuzzy=is_fuzzy)
            entries.append(entry)
    return entries


def format_catalogue(language: str, entries: Iterable[Entry]) -> str:
    """Return a PO file, sorted by source, so that changes of one module stand together."""
    blocks = [HEADER.format(language=language)]
    for entry in sorted(entries, key=lambda entry: (entry.sources, entry.text)):
        sources = "".join(f"#: {source}\n" for source in entry.sources)
        fuzzy = "#, fuzzy\n" if entry.is_fuzzy else ""
        blocks.append(f"{sources}{fuzzy}msgid {_quote(entry.text)}\nmsgstr {_quote(entry.translation)}\n")
    return "\n".join(blocks)


def _quote(text: str) -> str:
    """Return a text in PO's quotes; a text of several lines takes a line of the file for each."""
    lines = text.splitlines(keepends=True)
    parts = lines if len(lines) < 2 else ["", *lines]
    return "\n".join(json.dumps(part, ensure_ascii=False) for part in parts or [""])
