"""Checkpoints on disk: seal, find, verify and delete them.

While a checkpoint is written, it is a hidden folder `.step-N.<token>.partial`. Every rank fills it alone: its files,
then `parts/rank-R.json` with their sizes and SHA-256. Once the part of every rank is there, the checkpoint can be
sealed: the parts become `manifest.json`, written last, and the folder gets its name. No collective is needed, so the
same code serves checkpoints that are written during training and emergency saves when other ranks are dead. A partial
folder that a killed job left complete is sealed at the next start.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
from loguru import logger

from sdxl_trainer.data.files import hash_file, sync_folder, write_atomic
from sdxl_trainer.launch.activity import ACTIVITY
from sdxl_trainer.train.checkpoint.state import STATE_FILE, TrainState

MANIFEST = "manifest.json"
PARTS = "parts"


def get_partial_folder(folder: Path, step: int, token: str) -> Path:
    """Return the folder in which the checkpoint of a step is built.

    Args:
        token: differs between starts of the job, so that files of two attempts do not mix.
    """
    return folder / f".step-{step:08d}.{token}.partial"


def write_part(partial: Path, rank: int, world_size: int, files: dict[str, dict[str, Any]]) -> None:
    """Record that a rank's files are complete and on disk.

    Args:
        files: path within the checkpoint → bytes, sha256.
    """
    (partial / PARTS).mkdir(exist_ok=True)
    part = {"rank": rank, "world_size": world_size, "files": files}
    write_atomic(partial / PARTS / f"rank-{rank:05d}.json", orjson.dumps(part))


def read_parts(partial: Path) -> list[dict[str, Any]] | None:
    """Return the part of every rank, or None while one is missing."""
    parts = [orjson.loads(path.read_bytes()) for path in sorted(partial.glob(f"{PARTS}/rank-*.json"))]
    if not parts or len(parts) < parts[0]["world_size"] or not (partial / STATE_FILE).is_file():
        return None
    return parts


def seal_checkpoint(partial: Path) -> Path | None:
    """Turn a partial folder that every rank has finished into a checkpoint, or return None if it is incomplete."""
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
    # The parts are deleted last, because the next start needs them to finish a seal that was cut short.
    shutil.rmtree(final / PARTS)
    return final


def recover_partial_checkpoints(folder: Path) -> None:
    """Seal the complete partial folders of an earlier job, and delete the incomplete ones. Called when a run starts."""
    for partial in sorted(folder.glob(".step-*.partial")):
        try:
            sealed = seal_checkpoint(partial)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("{} cannot be sealed: {}", partial, error)
            sealed = None
        if sealed is not None:
            logger.info("{} sealed: an earlier job ended after writing all of it", sealed)
        else:
            shutil.rmtree(partial, ignore_errors=True)


def find_newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest intact checkpoint; warn about each damaged one and skip it."""
    for path in reversed(list_checkpoints(folder)):
        problem = verify_manifest(path)
        if problem is None:
            return path
        logger.warning("{} is damaged and skipped: {}", path, problem)
    return None


def rename_damaged_checkpoints(folder: Path, newest: Path | None) -> None:
    """Rename the checkpoints after `newest`, the newest intact one. Pruning would keep them in its place."""
    for path in list_checkpoints(folder):
        if newest is None or path.name > newest.name:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            logger.warning("{} is renamed to {}", path, aside.name)


def list_checkpoints(folder: Path) -> list[Path]:
    """List the folders that hold a manifest, oldest step first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))


def prune_checkpoints(folder: Path, keep_last: int, keep_every_steps: int) -> None:
    """Delete the oldest checkpoints beyond `keep_last`, except steps that are multiples of `keep_every_steps`."""
    for path in list_checkpoints(folder)[:-keep_last]:
        step = int(path.name.removeprefix("step-"))
        if not keep_every_steps or step % keep_every_steps:
            # The manifest goes first: a deletion cut short must not leave a folder that looks like a checkpoint.
            (path / MANIFEST).unlink()
            shutil.rmtree(path)


def verify_manifest(folder: Path) -> str | None:
    """Compare a folder with its manifest. Returns the first difference, or None."""
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
    # Hashing releases the interpreter, so threads share the cores.
    with ThreadPoolExecutor() as pool:
        found = pool.map(hash_file, [folder / name for name in expected_files])
        for (name, (_, digest)), actual in zip(expected_files.items(), found, strict=True):
            ACTIVITY.note()
            if actual != digest:
                return f"{name} has another SHA-256"
    return None
