"""The request of a copy: its target, a subset by a query on records, other keys, another form."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sdxl_trainer.configs.problems import Problem, UserInputError, format_count, suggest_name
from sdxl_trainer.data.formats.manifest import STALE, ManifestEntry
from sdxl_trainer.data.images.bucket import split_key
from sdxl_trainer.data.metadata.query import Query, QueryError, parse_query

FORMS = ("npz", "kohya", "shards")
MAX_SHOWN = 5
PART = re.compile(r"([1-9]\d{0,5})/([1-9]\d{0,5})")


@dataclass(frozen=True)
class CopyRequest:
    """A request to copy a cache, named as the command line's options."""

    target: str  # folder or URL
    where: str | None = None
    rekey: tuple[str, str] | None = None  # regular expression → replacement
    form: str | None = None  # one of FORMS; None keeps each item's
    part: str | None = None  # such as 1/4


@dataclass(frozen=True)
class CopiedItem:
    """An item to copy, and its entry at the target but for its place there."""

    source: ManifestEntry
    entry: ManifestEntry


def select_items(
    entries: Mapping[str, ManifestEntry], request: CopyRequest, read_record: Callable[[ManifestEntry], dict[str, Any]]
) -> list[CopiedItem]:
    """Return the items to copy, with their keys at the target.

    Args:
        read_record: returns the record of an item, {} if it has none.

    Raises:
        UserInputError: the query or the expression is wrong, nothing is left, or two items would have one key.
    """
    held = [entry for entry in entries.values() if entry.identity != STALE]
    chosen = choose_part(held, request.part)
    if request.where is not None:
        chosen = filter_entries(chosen, request.where, read_record)
    if not chosen:
        rule = "leaves nothing to copy" if request.where or request.part else "cannot copy a cache without items"
        key, value = ("--where", request.where) if request.where else ("--copy-to", request.target)
        raise UserInputError([Problem(key, value, rule, f"the cache holds {format_count(len(held), 'item')}")])
    return [CopiedItem(entry, replace(entry, key=key)) for entry, key in rename_keys(chosen, request.rekey)]


def choose_part(entries: list[ManifestEntry], part: str | None) -> list[ManifestEntry]:
    """Return the entries of one part of several, chosen by a hash of their keys, so that later items move none.

    All resolutions of an image are in one part.
    """
    if part is None:
        return entries
    match = PART.fullmatch(part)
    if match is None or int(match[1]) > int(match[2]):
        raise UserInputError([Problem("--part", part, "names no part", "give the number of one of the parts: 1/4")])
    number, count = int(match[1]) - 1, int(match[2])
    return [entry for entry in entries if _hash_key(entry.key) % count == number]


def _hash_key(key: str) -> int:
    return int.from_bytes(hashlib.sha256(split_key(key).name.encode(errors="surrogatepass")).digest()[:8], "little")


def filter_entries(
    entries: Iterable[ManifestEntry], where: str, read_record: Callable[[ManifestEntry], dict[str, Any]]
) -> list[ManifestEntry]:
    """Return the entries whose records satisfy a query. Besides the record's fields it knows key and bucket.

    Raises:
        UserInputError: the query cannot be read, or no record has one of its fields.
    """
    try:
        query: Query = parse_query(where)
    except QueryError as error:
        cure = "write it like this: aesthetic_score >= 5 and tags contains cat"
        raise UserInputError([Problem("--where", where, str(error), cure)]) from None
    kept, seen = [], Counter[str]()
    for entry in entries:
        width, height = entry.bucket
        record = {**read_record(entry), "key": split_key(entry.key).name}
        record |= {"bucket_width": width, "bucket_height": height}
        seen.update(record.keys())
        if query.matches(record):
            kept.append(entry)
    problems = []
    for field in sorted(query.fields - seen.keys()) if seen else ():
        near = suggest_name(field, seen)
        known = ", ".join(name for name, _ in seen.most_common(12))
        cure = f"did you mean {near}?" if near else f"records have: {known}"
        problems.append(Problem("--where", where, f"asks for {field}, which no record has", cure))
    if problems:
        raise UserInputError(problems)
    return kept


def rename_keys(entries: list[ManifestEntry], rekey: tuple[str, str] | None) -> list[tuple[ManifestEntry, str]]:
    """Return each entry with its key at the target. The prefix of a resolution stays.

    Raises:
        UserInputError: the expression is wrong, or gives an empty key or one key to two items.
    """
    if rekey is None:
        return [(entry, entry.key) for entry in entries]
    shown = " ".join(rekey)
    try:
        pattern = re.compile(rekey[0])
        renamed = []
        for entry in entries:
            prefix, name = split_key(entry.key)
            renamed.append((entry, prefix + pattern.sub(rekey[1], name)))
    except (re.error, IndexError) as error:
        cure = "give a regular expression and its replacement, such as '^' 'site_a_'"
        raise UserInputError([Problem("--rekey", shown, f"is no replacement: {error}", cure)]) from None
    empty = [entry.key for entry, key in renamed if not split_key(key).name]
    if empty:
        rule = f"leaves no key of {', '.join(empty[:MAX_SHOWN])}"
        raise UserInputError([Problem("--rekey", shown, rule, "keep a part of each key")])
    twice = [key for key, count in Counter(key for _, key in renamed).items() if count > 1]
    if twice:
        rule = f"gives one key to several items: {', '.join(twice[:MAX_SHOWN])}"
        raise UserInputError([Problem("--rekey", shown, rule, "keep what tells the keys apart")])
    return renamed
