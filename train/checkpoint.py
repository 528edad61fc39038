"""Checkpoints: a folder is one if its manifest, written last, names every file with its size and SHA-256."""

import os
import shutil
from pathlib import Path

import orjson
from loguru import logger

from sdxl_trainer.data.files import hash_file, sync_folder, write_atomic
from sdxl_trainer.launch.distributed import Ranks, barrier, broadcast_object
from sdxl_trainer.train.engine import Engine
from sdxl_trainer.train.state import TrainState

MANIFEST = "manifest.json"


def save_checkpoint(folder: Path, engine: Engine, state: TrainState, ranks: Ranks, keep_last: int) -> Path:
    """Write the checkpoint of `state.step` under `folder`, then delete the oldest ones beyond `keep_last`.

    It is built under a temporary name and renamed when it is whole, so no crash leaves half a checkpoint.
    All ranks call it together.
    """
    final = folder / f"step-{state.step:08d}"
    partial = folder / f".{final.name}.partial"
    if ranks.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    engine.save(partial, client_state={})
    barrier()
    if ranks.is_main:
        state.save(partial)
        write_manifest(partial)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        sync_folder(folder)
        for old in list_checkpoints(folder)[:-keep_last]:
            shutil.rmtree(old)
        logger.info("checkpoint {}", final)
    barrier()
    return final


def find_checkpoint(folder: Path, ranks: Ranks) -> Path | None:
    """The newest whole checkpoint, the same on all ranks; one with a wrong byte is passed over with a warning."""
    found = None
    for path in reversed(list_checkpoints(folder)) if ranks.is_main else []:
        problem = verify_manifest(path)
        if problem is None:
            found = path
            break
        logger.warning("{} is damaged and passed over: {}", path, problem)
    return broadcast_object(found)


def load_checkpoint(path: Path, engine: Engine) -> TrainState:
    """Load weights and optimizer state into the engine and return where training stood. All ranks together."""
    engine.load(path)
    return TrainState.load(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders that hold a manifest, oldest step first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))


def write_manifest(folder: Path) -> None:
    """List every file below `folder`, after flushing it to disk."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    write_atomic(folder / MANIFEST, orjson.dumps({"files": files}, option=orjson.OPT_INDENT_2))


def verify_manifest(folder: Path) -> str | None:
    """What differs between a folder and its manifest, or None."""
    try:
        files = orjson.loads((folder / MANIFEST).read_bytes())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if hash_file(path) != expected["sha256"]:
            return f"{name} has another SHA-256"
    return None
