"""Changes of a catalogue when the messages in the sources have changed."""

import difflib
from collections.abc import Iterable, Mapping

from sdxl_trainer.configs.language.catalogue import Entry
from sdxl_trainer.configs.language.templates import list_fields

SIMILARITY = 0.8  # from which on an old translation is a good beginning


def update_entries(entries: Iterable[Entry], messages: Mapping[str, tuple[str, ...]]) -> list[Entry]:
    """Return the entries of a catalogue for the messages that there are now, each with its sources.

    New messages are added, messages that no source contains are dropped. A changed message takes the translation of the
    most similar one that was dropped, marked as fuzzy.
    """
    known = {entry.text: entry for entry in entries}
    dropped = {text: entry for text, entry in known.items() if text not in messages and entry.translation}
    updated = []
    for text, sources in messages.items():
        old, is_fuzzy = known.get(text), False
        if old is None:
            near = difflib.get_close_matches(text, list(dropped), n=1, cutoff=SIMILARITY)
            old, is_fuzzy = (dropped[near[0]], True) if near else (Entry(text=text), False)
        is_fuzzy = is_fuzzy or old.is_fuzzy
        updated.append(Entry(text=text, translation=old.translation, sources=sources, is_fuzzy=is_fuzzy))
    return updated


def list_faults(entries: Iterable[Entry]) -> list[str]:
    """Return what is left to do in a catalogue: a line for each message without a sound translation."""
    faults = []
    for entry in entries:
        if not entry.translation or entry.is_fuzzy:
            faults.append(f"{'check' if entry.translation else 'translate'}: {entry.text}")
        elif list_fields(entry.text) != list_fields(entry.translation):
            faults.append(f"other fields: {entry.text}: {entry.translation}")
    return faults
