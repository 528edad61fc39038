"""Rules for single tags that come from settings and files: protected tags, aliases and implications.

Files of aliases and implications are CSV with `antecedent,consequent` in each row, or with a heading that has the
columns `antecedent_name` and `consequent_name`, as danbooru and e621 export them. Rows whose `status` is not `active`
are left out.
"""

import csv
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from sdxl_trainer.configs.captions import CaptionConfig
from sdxl_trainer.configs.paths import CHECK_PATH
from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.data.files import read_regular
from sdxl_trainer.data.text.weights import SPECIAL, WeightedText, format_weight, parse_weights

# Environment variable that names the files for the server of loader workers (data/loading/preload.py).
RULES_VARIABLE = "SDXL_TRAINER_TAG_RULES"
SECTION = "data.caption"
MAX_FILE_BYTES = 256 << 20
MAX_KEPT_KEYS = 1 << 16  # tags whose spelling is normalized once; they take some MB
SHORT_TAG = 3  # letters up to which an underscore may be part of an emoticon, such as ^_^
FILES = ("protected_tags_file", "aliases", "implications")
HEADINGS = (("antecedent_name", "consequent_name"), ("antecedent", "consequent"))
ESCAPED = re.compile(r"\\([\\()\[\]])")


# The rules loaded last, by their digest: settings are built several times in a process.
LOADED: dict[str, "TagRules"] = {}


class TagSources(NamedTuple):
    """Protected tags and files of tags, by the names of their settings."""

    protected_tags: tuple[str, ...] = ()
    protected_tags_file: str | None = None
    aliases: str | None = None
    implications: str | None = None


class TagPair(NamedTuple):
    """A row of a file of aliases or implications."""

    antecedent: str
    consequent: str
    key: str  # of the antecedent
    target: str  # key of the consequent
    line: int


class TagFileError(ValueError):
    """A file of tags that cannot be used; the message names the line."""


@dataclass(frozen=True, eq=False)
class TagRules:
    """Rules for tags. They pickle as the names of their files, so that loader workers share one copy.

    Args:
        digest: SHA-256 of the sources' contents.
        protected: keys of the tags that shuffling and dropout leave in their place.
        aliases: the tag that replaces another one, by the key of the latter.
        implied: the tags that a tag implies, by its key.
    """

    sources: TagSources
    digest: str
    protected: frozenset[str]
    aliases: dict[str, str]
    implied: dict[str, tuple[str, ...]]

    def __reduce__(self) -> tuple[Callable[..., "TagRules"], tuple[TagSources, str]]:
        return restore_tag_rules, (self.sources, self.digest)

    @property
    def has_changes(self) -> bool:
        """Return whether there are aliases or implications."""
        return bool(self.aliases or self.implied)

    def is_protected(self, tag: str, weighted: bool) -> bool:
        """Return whether a tag of a caption is protected."""
        return normalize_tag(tag, weighted) in self.protected

    def rewrite(self, parts: Sequence[list[str]], weighted: bool) -> list[list[str]]:
        """Replace tags by their aliases, and add the tags that are implied and absent to the end of `parts[1]`.

        A tag that is there already is not added again by an alias.

        Args:
            parts: a caption's tags: those kept at the front, those that may be shuffled, those kept at the end.
            weighted: whether brackets in tags are weights.
        """
        spell = _choose_spelling([tag for part in parts for tag in part], weighted)
        known: dict[str, None] = {}
        rewritten: list[list[str]] = [[] for _ in parts]
        for part, kept in zip(parts, rewritten, strict=True):
            for tag in part:
                key = normalize_tag(tag, weighted)
                name = self.aliases.get(key)
                if name is not None:
                    weight = parse_weights(tag)[0].weight if weighted else 1.0
                    tag, key = spell(name, weight), normalize_spelling(name)
                if self.aliases and key in known:
                    continue
                known[key] = None
                kept.append(tag)
        waiting = list(known)
        for key in waiting:  # grows while it is read: an implied tag may imply further ones
            for name in self.implied.get(key, ()):
                implied = normalize_spelling(name)
                if implied not in known:
                    known[implied] = None
                    waiting.append(implied)
                    rewritten[1].append(spell(name, 1.0))
        return rewritten


@lru_cache(MAX_KEPT_KEYS)
def normalize_tag(tag: str, weighted: bool = False) -> str:
    """Return the key of a tag in a caption: as `normalize_spelling`, without weights."""
    if weighted and SPECIAL.search(tag):
        return " ".join("".join(part.text for part in parse_weights(tag)).lower().replace("_", " ").split())
    return normalize_spelling(tag)


def normalize_spelling(tag: str) -> str:
    """Return the key of a tag: lower case, spaces for underscores, without escapes."""
    if "\\" in tag:
        tag = ESCAPED.sub(r"\1", tag)
    return " ".join(tag.lower().replace("_", " ").split())


def load_tag_rules(config: CaptionConfig) -> TagRules | None:
    """Load the rules that the settings name; None without any.

    Raises:
        UserInputError: a file cannot be read, or its rows contradict each other; one problem for each file.
    """
    sources = TagSources(tuple(config.protected_tags), config.protected_tags_file, config.aliases, config.implications)
    return load_sources(sources) if any(sources) else None


def load_sources(sources: TagSources) -> TagRules:
    """Load rules, or return those that this process has loaded last if no content has changed.

    Raises:
        UserInputError: see `load_tag_rules`.
    """
    problems: list[Problem] = []
    contents: dict[str, bytes] = dict.fromkeys(FILES, b"")
    for key in FILES:
        with _note_problem(problems, sources, key):
            contents[key] = _read_source(getattr(sources, key))
    if problems:
        raise UserInputError(problems)
    content_hash = hashlib.sha256(repr(sources).encode())
    for content in contents.values():
        content_hash.update(hashlib.sha256(content).digest())
    digest = content_hash.hexdigest()
    if digest not in LOADED:
        rules = _parse_contents(sources, contents, digest)
        LOADED.clear()
        LOADED[digest] = rules
    return LOADED[digest]


def restore_tag_rules(sources: TagSources, digest: str) -> TagRules:
    """Unpickle rules that another process sent.

    Raises:
        ValueError: a file has changed since.
    """
    rules = load_sources(TagSources(*sources))
    if rules.digest != digest:
        raise ValueError(f"{SECTION}: files of tags have changed since the run started")
    return rules


def check_tag_rules(config: CaptionConfig) -> Iterator[Problem]:
    """Yield a problem for each file of tags that cannot be used."""
    try:
        load_tag_rules(config)
    except UserInputError as error:
        yield from error.problems


def parse_list(content: bytes) -> list[str]:
    """Parse a file with one tag in each line.

    Raises:
        TagFileError: the file is not UTF-8.
    """
    return [line for line in map(str.strip, _decode(content).splitlines()) if line]


def parse_aliases(content: bytes) -> dict[str, str]:
    """Parse a file of aliases: the tag that replaces another one in the end, by the key of the latter.

    Raises:
        TagFileError: a row is damaged, gives a tag a second alias, or leads back to its own tag.
    """
    pairs: dict[str, TagPair] = {}
    for pair in _parse_pairs(content):
        known = pairs.setdefault(pair.key, pair)
        if known.target != pair.target:
            first, second, earlier = known.consequent, pair.consequent, known.line
            text = f"line {pair.line}: {pair.antecedent} is an alias of {second}, but of {first} in line {earlier}"
            raise TagFileError(text)
        if pair.key == pair.target:
            del pairs[pair.key]  # another spelling of the same tag
    targets = {key: pair.target for key, pair in pairs.items()}
    _refuse_cycles({key: [target] for key, target in targets.items()}, {key: pair.line for key, pair in pairs.items()})
    resolved: dict[str, str] = {}
    for key in pairs:
        path = [key]
        while path[-1] not in resolved and targets[path[-1]] in targets:
            path.append(targets[path[-1]])
        resolved.update(dict.fromkeys(path, resolved.get(path[-1], pairs[path[-1]].consequent)))
    return resolved


def parse_implications(content: bytes, aliases: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Parse a file of implications: the tags that a tag implies directly, by its key. Aliases apply to both.

    Raises:
        TagFileError: a row is damaged, or a tag implies itself by way of others.
    """
    implied: dict[str, dict[str, str]] = {}
    lines: dict[str, int] = {}
    for pair in _parse_pairs(content):
        key, target, name = pair.key, pair.target, pair.consequent
        if key in aliases:
            key = normalize_spelling(aliases[key])
        if target in aliases:
            name, target = aliases[target], normalize_spelling(aliases[target])
        if key != target:
            implied.setdefault(key, {}).setdefault(target, name)
            lines.setdefault(key, pair.line)
    _refuse_cycles(implied, lines)
    return {key: tuple(names.values()) for key, names in implied.items()}


def _refuse_cycles(graph: Mapping[str, Iterable[str]], lines: Mapping[str, int]) -> None:
    # Of a hundred thousand implications few lead to a tag that implies another one, and only these can form a cycle.
    linked = {key: inner for key, targets in graph.items() if (inner := [name for name in targets if name in graph])}
    try:
        TopologicalSorter(linked).prepare()
    except CycleError as error:
        # graphlib lists each tag after the one that leads to it.
        tags = list(reversed(error.args[1]))
        start = min(range(len(tags) - 1), key=lambda place: lines[tags[place]])
        circle = [*tags[start:-1], *tags[: start + 1]]
        line, path = lines[circle[0]], " → ".join(circle)
        raise TagFileError(f"line {line}: {path} leads back to its start") from None


def _parse_contents(sources: TagSources, contents: Mapping[str, bytes], digest: str) -> TagRules:
    problems: list[Problem] = []
    aliases: dict[str, str] = {}
    implied: dict[str, tuple[str, ...]] = {}
    protected = list(sources.protected_tags)
    with _note_problem(problems, sources, "protected_tags_file"):
        protected += parse_list(contents["protected_tags_file"])
    with _note_problem(problems, sources, "aliases"):
        aliases = parse_aliases(contents["aliases"])
    with _note_problem(problems, sources, "implications"):
        implied = parse_implications(contents["implications"], aliases)
    if problems:
        raise UserInputError(problems)
    keys = [normalize_spelling(tag) for tag in protected]
    keys += [normalize_spelling(aliases[key]) for key in keys if key in aliases]
    return TagRules(sources, digest, frozenset(keys) - {""}, aliases, implied)


@contextmanager
def _note_problem(problems: list[Problem], sources: TagSources, key: str) -> Iterator[None]:
    """Turn a TagFileError in the context into a problem with a setting."""
    try:
        yield
    except TagFileError as error:
        named = getattr(sources, key)
        is_missing = isinstance(named, str) and not Path(named).exists()
        cure = CHECK_PATH if is_missing else "correct the file, or leave the setting out"
        problems.append(Problem(f"{SECTION}.{key}", named, str(error), cure))


def _read_source(path: str | None) -> bytes:
    try:
        return b"" if path is None else read_regular(path, MAX_FILE_BYTES).content
    except OSError as error:
        raise TagFileError(f"cannot be read: {error.strerror}") from None


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise TagFileError(f"line {line}: is not UTF-8") from None


def _parse_pairs(content: bytes) -> Iterator[TagPair]:
    """Yield the rows of a CSV file, without those that are not active.

    Raises:
        TagFileError: a row has other columns than two, or an empty one.
    """
    rows = csv.reader(io.StringIO(_decode(content), newline=""), strict=True)
    columns, status, width = (0, 1), None, 2
    try:
        first = next(rows, [])
        names = [cell.strip().lower() for cell in first]
        heading = next((heading for heading in HEADINGS if set(heading) <= set(names)), None)
        if heading is not None:
            columns, width = (names.index(heading[0]), names.index(heading[1])), len(names)
            status = names.index("status") if "status" in names else None
        for row in rows if heading else chain([first], rows):
            if row and (status is None or len(row) != width or row[status] == "active"):
                yield _read_pair(row, columns, width, rows.line_num)
    except csv.Error as error:
        raise TagFileError(f"line {rows.line_num}: {error}") from None


def _read_pair(row: Sequence[str], columns: tuple[int, int], width: int, line: int) -> TagPair:
    if len(row) != width:
        raise TagFileError(f"line {line}: has {len(row)} columns, not {width}; write antecedent,consequent")
    antecedent, consequent = row[columns[0]].strip(), row[columns[1]].strip()
    pair = TagPair(antecedent, consequent, normalize_spelling(antecedent), normalize_spelling(consequent), line)
    if not pair.key or not pair.target:
        raise TagFileError(f"line {line}: has an empty tag; write antecedent,consequent")
    return pair


def _choose_spelling(tags: Sequence[str], weighted: bool) -> Callable[[str, float], str]:
    """Return a function that writes a tag of a file, with its weight, as the tags of a caption are written.

    Spaces stand for underscores unless the caption has tags with underscores. Brackets are escaped where weights are
    read or the caption escapes them.
    """
    underscored = any("_" in tag and " " not in tag and len(tag) > SHORT_TAG for tag in tags)
    escaped = any(ESCAPED.search(tag) for tag in tags)

    def spell(name: str, weight: float) -> str:
        if len(name) > SHORT_TAG:
            name = name.replace(" ", "_") if underscored else name.replace("_", " ")
        if weighted:
            return format_weight(WeightedText(name, weight))
        return SPECIAL.sub(r"\\\g<0>", name) if escaped else name

    return spell
