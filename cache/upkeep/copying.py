"""Copy a cache, or a subset of it, to a folder or a store: `--copy-to`.

The manifest decides what a cache holds, so the images and their metadata may be gone. Each file is checked at the
target before it counts. Until the copy is complete, a journal says what has arrived: lines of a manifest, which becomes
a part of the target's manifest in the end. The same command continues after any interruption.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import orjson
from loguru import logger

from sdxl_trainer.cache.encode.cache_setup import lock_cache
from sdxl_trainer.cache.upkeep.copy_records import CopyRecords
from sdxl_trainer.cache.upkeep.copy_request import CopiedItem, CopyRequest, select_items
from sdxl_trainer.cache.upkeep.copy_targets import CopyTarget, check_target, choose_number, open_target
from sdxl_trainer.cache.upkeep.copy_units import (
    build_unit,
    compute_size,
    list_entry_files,
    list_files,
    plan_units,
    verify_built,
)
from sdxl_trainer.configs.problems import FailedError, Problem, UserInputError, format_count, raise_if_any
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.files import write_atomic
from sdxl_trainer.data.formats.manifest import ManifestEntry, ManifestWriter, read_latest, read_part
from sdxl_trainer.data.formats.text_cache import EMPTY_FILE
from sdxl_trainer.data.stores.remote import StoreError
from sdxl_trainer.launch.activity import ACTIVITY

MAX_SHOWN = 5
REQUEST_FILE, RECORDS_FILE, PLANNED_FILE = "request.json", "metadata.jsonl", "planned.jsonl"  # of a journal
IDENTITY_FILES = {"cache.json": ("name", "further"), "text.json": ("name",)}  # file → its fields that must agree


@dataclass
class Journal:
    """The items that have arrived at a target so far, in a manifest of its own in a local folder."""

    folder: Path
    number: int  # of the part of the target's manifest that this becomes
    done: dict[str, ManifestEntry] = field(default_factory=dict)  # key at the target → entry

    @property
    def part(self) -> Path:
        """The lines of the manifest."""
        return self.folder / "manifest" / f"part-{self.number:05d}.jsonl"

    def plan(self, names: Iterable[str]) -> None:
        """Note files that are about to be made at the target."""
        with open(self.folder / PLANNED_FILE, "ab") as file:
            file.writelines(orjson.dumps(name) + b"\n" for name in names)

    def read_planned(self) -> set[str]:
        """Return the files that were made at the target, or were about to be."""
        file = self.folder / PLANNED_FILE
        lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
        return {orjson.loads(line) for line in lines if line.endswith(b"\n")}

    @property
    def records(self) -> Path:
        """The records of npz files."""
        return self.folder / RECORDS_FILE


@dataclass
class CopyResult:
    """Counts of a copy; `bad` maps key → reason."""

    num_copied: int = 0
    num_bytes: int = 0
    bad: dict[str, str] = field(default_factory=dict)


def run_copy(config: Config, folder: Path, request: CopyRequest) -> CopyResult:
    """Copy the cache in `folder` as a request says, and return the counts.

    Raises:
        UserInputError: the request is wrong, or the target holds another cache.
        FailedError: the target has no space or does not answer; the same command continues.
    """
    raise_if_any(check_target(request.target, folder))
    target = open_target(request.target, choose_work_folder(folder, request.target))
    with lock_cache(folder) if os.access(folder, os.W_OK) else nullcontext():
        records = CopyRecords(config, folder)
        try:
            items = select_items(records.entries, request, records.read)
            with target.lock():
                raise_if_any(check_identity(folder, target, request))
                return copy_items(folder, target, items, request, config.cache.shard_mb * 1_000_000, records)
        except (OSError, StoreError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise FailedError(
                f"{request.target}: {reason}. Solve this and run the same command again: it continues with what is not "
                "there yet"
            ) from error


def choose_work_folder(folder: Path, target: str) -> Path:
    """Return the local folder for a copy to a store: below the cache's logs, or elsewhere if the cache is read-only."""
    name = f"copy-{hashlib.sha256(target.rstrip('/').encode()).hexdigest()[:16]}"
    return (folder / "logs" if os.access(folder, os.W_OK) else Path(tempfile.gettempdir(), "sdxl-trainer")) / name


def check_identity(folder: Path, target: CopyTarget, request: CopyRequest) -> Iterator[Problem]:
    """Yield a problem for each file at the target that says that its latents or its text are of other settings."""
    for name, keys in IDENTITY_FILES.items():
        found, own = target.read(name), folder / name
        if found is None or not own.is_file():
            continue
        there, here = _load(found), _load(own.read_bytes())
        if any(there.get(key) != here.get(key) for key in keys):
            differing = {key for key in {*there, *here} - {"vae", "files"} if there.get(key) != here.get(key)}
            rule = f"holds a cache of other settings: its {name} differs in {', '.join(sorted(differing))}"
            yield Problem("--copy-to", request.target, rule, "give another target")


def _load(content: bytes) -> dict:
    """Return a JSON object; {} for anything else."""
    try:
        fields = orjson.loads(content)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def copy_items(
    folder: Path,
    target: CopyTarget,
    items: list[CopiedItem],
    request: CopyRequest,
    shard_bytes: int,
    records: CopyRecords,
) -> CopyResult:
    """Copy what is not at the target yet, then write its identity and last its manifest."""
    journal = open_journal(target, folder, request)
    remaining = list_remaining(items, read_target_manifest(target, journal), journal.done, request)
    raise_if_any(check_space(target, remaining, request))
    megabytes, num_there = sum(item.source.bytes for item in remaining) / 1e6, len(items) - len(remaining)
    logger.info("{} to copy ({:.1f} MB); {} there already", format_count(len(remaining), "item"), megabytes, num_there)
    result = CopyResult()
    manifest = ManifestWriter(journal.folder, journal.number)
    try:
        taken = count_shards(journal.done)
        for unit in plan_units(remaining, request.form, journal.number, taken, shard_bytes):
            ACTIVITY.note()
            journal.plan(list_files(unit, request.form))
            built = build_unit(records.source, target.root, unit, request.form, records.get_json)
            target.publish(built.files, lambda built=built: verify_built(target.root, built))
            with open(journal.records, "ab") as lines:
                lines.writelines(built.records)
            for entry in built.entries:
                manifest.append(entry)
            manifest.sync()
            result.num_copied += len(built.entries)
            result.num_bytes += sum(entry.bytes for entry in built.entries)
            result.bad |= built.bad
    finally:
        manifest.close()
    finish_copy(folder, target, journal)
    return result


def open_journal(target: CopyTarget, folder: Path, request: CopyRequest) -> Journal:
    """Open the journal of a copy that was interrupted, or begin one.

    What an interrupted copy of another request has brought to the target is deleted there: nothing lists it.
    """
    wanted = {"source": str(folder.absolute()), **asdict(request)}
    file, names = target.journal / REQUEST_FILE, target.list_names()
    known = _load(file.read_bytes()) if file.is_file() else {}
    if known:
        journal = Journal(target.journal, int(known.pop("number", 0)))
        if known == orjson.loads(orjson.dumps(wanted)):
            held = read_part(journal.part) if journal.part.is_file() else ()
            journal.done = {entry.key: entry for entry in held if target.has(entry.file)}
            drop_lines(journal)
            return journal
        target.delete(journal.read_planned() - _list_listed(target, names))
    shutil.rmtree(target.journal, ignore_errors=True)
    (target.journal / "manifest").mkdir(parents=True)
    target.root.mkdir(parents=True, exist_ok=True)
    number = choose_number(names)
    write_atomic(file, orjson.dumps({**wanted, "number": number}))
    return Journal(target.journal, number)


def drop_lines(journal: Journal) -> None:
    """Remove the lines of items whose files are not at the target any more."""
    lines = journal.part.read_bytes().splitlines(keepends=True) if journal.part.is_file() else []
    kept = [line for line in lines if line.endswith(b"\n") and _load(line).get("key") in journal.done]
    if len(kept) < len(lines):
        write_atomic(journal.part, b"".join(kept))


def _list_listed(target: CopyTarget, names: set[str]) -> set[str]:
    """Return the files that the manifest of a target lists."""
    return list_entry_files(_fetch_manifest(target, Journal(target.journal, -1), names).values())


def read_target_manifest(target: CopyTarget, journal: Journal) -> dict[str, ManifestEntry]:
    """Return what the manifest of a target lists: key → entry.

    Its parts lie beside the journal's own afterwards, so that the journal numbers its lines after theirs.
    """
    return _fetch_manifest(target, journal, target.list_names())


def _fetch_manifest(target: CopyTarget, journal: Journal, names: set[str]) -> dict[str, ManifestEntry]:
    there = journal.folder / "there"
    for name in sorted(names):
        if name.startswith("manifest/part-"):
            path = there / name
            path.parent.mkdir(parents=True, exist_ok=True)
            target.fetch(name, path)
            shutil.copyfile(path, journal.folder / "manifest" / path.name)
    return read_latest(there) if there.is_dir() else {}


def list_remaining(
    items: list[CopiedItem],
    there: Mapping[str, ManifestEntry],
    done: Mapping[str, ManifestEntry],
    request: CopyRequest,
) -> list[CopiedItem]:
    """Return the items that are not at the target.

    Raises:
        UserInputError: the target has other latents under the key of an item.
    """
    remaining, conflicts = [], []
    for item in items:
        listed, arrived = there.get(item.entry.key), done.get(item.entry.key)
        if listed is not None and _hash_item(listed) != _hash_item(item.source):
            conflicts.append(item.entry.key)
        elif listed is None and (arrived is None or _hash_item(arrived) != _hash_item(item.source)):
            remaining.append(item)
    if conflicts:
        shown = ", ".join(conflicts[:MAX_SHOWN])
        rule = f"has other latents under {format_count(len(conflicts), 'key')}: {shown}"
        cure = "give another target, or other keys by --rekey"
        raise UserInputError([Problem("--copy-to", request.target, rule, cure)])
    return remaining


def _hash_item(entry: ManifestEntry) -> tuple[str, str | None]:
    return entry.sha256, entry.text.sha256 if entry.text else None


def check_space(target: CopyTarget, items: list[CopiedItem], request: CopyRequest) -> Iterator[Problem]:
    """Yield a problem if a disk has less space than the items take."""
    free, needed = target.free_bytes(), sum(compute_size(item.source) for item in items)
    if free is not None and needed > free:
        rule = f"has {free:,} bytes free and the copy needs about {needed:,}"
        cure = "free some space, give another target, or copy a part by --part or --where"
        yield Problem("--copy-to", request.target, rule, cure)


def count_shards(done: Mapping[str, ManifestEntry]) -> dict[str, int]:
    """Return how many shards of each bucket have arrived, as one more than their highest number."""
    counts: dict[str, int] = {}
    for entry in done.values():
        if entry.offset is not None:
            bucket, _, number = Path(entry.file).stem.split("-")
            counts[bucket] = max(counts.get(bucket, 0), int(number) + 1)
    return counts


def finish_copy(folder: Path, target: CopyTarget, journal: Journal) -> None:
    """Write the identity of the cache, the records of npz files and, last, the part of the manifest.

    Raises:
        FailedError: another job has taken over the target.
    """
    target.verify_lock()
    for name in (*IDENTITY_FILES, EMPTY_FILE):
        if (folder / name).is_file() and target.read(name) is None:
            target.write(name, (folder / name).read_bytes())
    lines = dict.fromkeys(journal.records.read_bytes().splitlines(keepends=True)) if journal.records.is_file() else {}
    if lines:
        target.write(f"metadata-{journal.number:05d}.jsonl", b"".join(lines))
    if journal.part.is_file() and journal.part.stat().st_size:
        made = list_entry_files({entry.key: entry for entry in read_part(journal.part)}.values())
        target.delete(journal.read_planned() - made)  # of a unit that was built and not listed
        target.write(f"manifest/{journal.part.name}", journal.part.read_bytes())
    shutil.rmtree(journal.folder, ignore_errors=True)
