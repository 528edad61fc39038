"""State of cached text: `text.json` with the identity of all outputs, and the outputs of the empty caption.

A dropped caption uses the outputs of the empty caption, which are stored once.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from sdxl_trainer.data.files import read_with_retries, write_atomic
from sdxl_trainer.data.formats.manifest import TextIdentity
from sdxl_trainer.data.formats.text_outputs import BadTextError, TextOutputs, parse_text_outputs

STATE_FILE = "text.json"
EMPTY_FILE = "manifest/empty_te_outputs.npz"  # a path that no key of an image is likely to give


@dataclass(frozen=True)
class TextState:
    """The content of `text.json`."""

    identity: TextIdentity
    sources: list[Any]  # path, size and time of the encoders' files, so that they are not hashed again
    empty_sha256: str


def write_text_state(folder: Path, identity: TextIdentity, sources: Sequence[Any], empty: bytes) -> None:
    """Write `text.json` and the npz of the empty caption."""
    (folder / EMPTY_FILE).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / EMPTY_FILE, empty)
    state = TextState(identity, list(sources), hashlib.sha256(empty).hexdigest())
    write_atomic(folder / STATE_FILE, _dump(state))


def read_text_state(folder: Path) -> TextState | None:
    """Read `text.json`; None if it is missing or damaged."""
    try:
        content = read_with_retries((folder / STATE_FILE).read_bytes, folder / STATE_FILE)
        fields = orjson.loads(content)
        state = TextState(TextIdentity(**fields["identity"]), fields["sources"], fields["empty_sha256"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return state if _dump(state) == content else None


def read_empty_text(folder: Path, state: TextState) -> TextOutputs:
    """Read the outputs of the empty caption.

    Raises:
        BadTextError: the outputs are missing, or their checksum differs from the one in `text.json`.
    """
    try:
        content = read_with_retries((folder / EMPTY_FILE).read_bytes, folder / EMPTY_FILE)
    except OSError as error:
        raise BadTextError(f"{EMPTY_FILE}: cannot be read: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != state.empty_sha256:
        raise BadTextError(f"{EMPTY_FILE}: the SHA-256 differs from the one in {STATE_FILE}")
    return parse_text_outputs(content, 1, check_crc=False)[0]


def verify_text_state(folder: Path) -> str | None:
    """Return a message if `text.json` or the outputs of the empty caption are damaged, or None."""
    if not (folder / STATE_FILE).is_file():
        return None
    state = read_text_state(folder)
    if state is None:
        return f"{STATE_FILE}: damaged"
    try:
        read_empty_text(folder, state)
    except BadTextError as error:
        return str(error)
    return None


def _dump(state: TextState) -> bytes:
    fields = {"name": state.identity.name, **asdict(state), "identity": state.identity.list_fields()}
    checksum = hashlib.sha256(orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)).hexdigest()
    return orjson.dumps({**fields, "sha256": checksum}, option=orjson.OPT_INDENT_2)
