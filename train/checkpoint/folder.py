"""Checkpoints on disk: how one is sealed, found, checked and deleted.

While it is written, a checkpoint is a hidden folder `.step-N.<token>.partial` that every rank fills on its own: its
files, then `parts/rank-R.json` with their sizes and SHA-256. Once every rank's part is there it can be sealed: the
parts become `manifest.json`, written last, and the folder gets its name. No collective is needed, so the same way
serves for checkpoints written while training goes on, and for the emergency when other ranks are dead. What a killed
job left whole is sealed at the next start.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
from loguru import logger

from sdxl_trainer.data.files import hash_file, sync_folder, write_atomic
from sdxl_trainer.train.checkpoint.state import FILE as STATE_FILE
from sdxl_trainer.train.checkpoint.state import TrainState

MANIFEST = "manifest.json"
PARTS = "parts"


def get_partial_folder(folder: Path, step: int, token: str) -> Path:
    """Where the checkpoint of a step is built. The token, one per start of the job, keeps attempts apart."""
    return folder / f".step-{step:08d}.{token}.partial"


def write_part(partial: Path, rank: int, world_size: int, files: dict[str, dict[str, Any]]) -> None:
    """Say that a rank's files are whole and on disk. `files`: path within the checkpoint → bytes, sha256."""
    (partial / PARTS).mkdir(exist_ok=True)
    part = {"rank": rank, "world_size": world_size, "files": files}
    write_atomic(partial / PARTS / f"rank-{rank:05d}.json", orjson.dumps(part))


def read_parts(partial: Path) -> list[dict[str, Any]] | None:
    """Every rank's part, or None while one is missing."""
    parts = [orjson.loads(path.read_bytes()) for path in sorted(partial.glob(f"{PARTS}/rank-*.json"))]
    if not parts or len(parts) < parts[0]["world_size"] or not (partial / STATE_FILE).is_file():
        return None
    return parts


def seal_checkpoint(partial: Path) -> Path | None:
    """Turn a partial folder that every rank has finished into a checkpoint, or return None if it is not whole."""
    parts = read_parts(partial)
    if parts is None:
        return None
    files = {name: entry for part in parts for name, entry in part["files"].items()}
    state = partial / STATE_FILE
    files[STATE_FILE] = {"bytes": state.stat().st_size, "sha256": hash_file(state)}
    write_atomic(partial / MANIFEST, orjson.dumps({"files": files}, option=orjson.OPT_INDENT_2))
    final = partial.parent / f"step-{TrainState.load(partial).step:08d}"
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    sync_folder(partial.parent)
    shutil.rmtree(final / PARTS)  # last: as long as they are there, a start can do what a killed job left undone
    return final


def settle_partials(folder: Path) -> None:
    """At a start: seal what an earlier job left whole, delete what it left half done."""
    for partial in sorted(folder.glob(".step-*.partial")):
        try:
            sealed = seal_checkpoint(partial)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("{} cannot be sealed: {}", partial, error)
            sealed = None
        if sealed is not None:
            logger.info("{} was complete though its job was ended; it is a checkpoint now", sealed)
        else:
            shutil.rmtree(partial, ignore_errors=True)


def find_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; one with a wrong byte is passed over with a warning."""
    for path in reversed(list_checkpoints(folder)):
        problem = verify_manifest(path)
        if problem is None:
            return path
        logger.warning("{} is damaged and passed over: {}", path, problem)
    return None


def set_aside_damaged(folder: Path, newest: Path | None) -> None:
    """Rename checkpoints after the newest whole one, `newest`: they would be kept in its place as the newer ones."""
    for path in list_checkpoints(folder):
        if newest is None or path.name > newest.name:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            logger.warning("{} is set aside as {}", path, aside.name)


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders that hold a manifest, oldest step first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))


def prune_checkpoints(folder: Path, keep_last: int, keep_every_steps: int) -> None:
    """Delete the oldest checkpoints beyond `keep_last`, but none whose step is a multiple of `keep_every_steps`."""
    for path in list_checkpoints(folder)[:-keep_last]:
        step = int(path.name.removeprefix("step-"))
        if not keep_every_steps or step % keep_every_steps:
            # First the manifest: a deletion cut short must not leave a folder that looks like a checkpoint.
            (path / MANIFEST).unlink()
            shutil.rmtree(path)


def verify_manifest(folder: Path) -> str | None:
    """What differs between a folder and its manifest, or None."""
    try:
        files = orjson.loads((folder / MANIFEST).read_bytes())["files"]
        expected_files = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    if STATE_FILE not in expected_files:
        return f"{MANIFEST} does not list {STATE_FILE}"
    for name, (size, _) in expected_files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        found = pool.map(hash_file, [folder / name for name in expected_files])
        for (name, (_, digest)), actual in zip(expected_files.items(), found, strict=True):
            if actual != digest:
                return f"{name} has another SHA-256"
    return None
