"""Checkpoints on disk: seal, find, verify and delete them.

While a checkpoint is written, it is a hidden folder `.step-N.<token>.partial`. Every rank fills it alone: its files,
then `parts/rank-R.json` with their sizes and SHA-256. Once the part of every rank is there, the checkpoint can be
sealed: the parts become `manifest.json`, written last, and the folder gets its name. No collective is needed, so the
same code serves checkpoints that are written during training and emergency saves when other ranks are dead. A partial
folder that a killed job left complete is sealed at the next start.
"""

import errno
import re
import shutil
import stat
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from loguru import logger

from sdxl_trainer.data.files import create_folder, hash_file, replace_file, write_atomic
from sdxl_trainer.launch.activity import ACTIVITY
from sdxl_trainer.train.checkpoint.state import STATE_FILE, TrainState
from sdxl_trainer.train.held_out.best_step import rank_steps

MANIFEST = "manifest.json"
PARTS = "parts"
NAME = re.compile(r"step-\d+")
NO_SUCH_NAME = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP}  # a damaged name, or a folder that became a file
DAMAGED = "damaged-"  # before the name of a checkpoint that is not intact


class VanishedError(FileNotFoundError):
    """A file of a checkpoint that is being written has been deleted or cut meanwhile."""


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
    create_folder(partial / PARTS)
    part = {"rank": rank, "world_size": world_size, "files": files}
    write_atomic(get_part_file(partial, rank), orjson.dumps(part))


def get_part_file(partial: Path, rank: int) -> Path:
    """Return the file by which a rank declares its part of a checkpoint complete."""
    return partial / PARTS / f"rank-{rank:05d}.json"


def read_parts(partial: Path) -> list[dict[str, Any]] | None:
    """Return the part of every rank, or None while one is missing."""
    parts = [orjson.loads(path.read_bytes()) for path in sorted(partial.glob(f"{PARTS}/rank-*.json"))]
    if not parts or len(parts) < parts[0]["world_size"] or not (partial / STATE_FILE).is_file():
        return None
    return parts


def seal_checkpoint(partial: Path) -> Path | None:
    """Turn a partial folder that every rank has finished into a checkpoint, or return None if it is incomplete.

    Raises:
        VanishedError: a file is no longer there, or has another size than the one that was written.
    """
    parts = read_parts(partial)
    if parts is None:
        return None
    files = {name: entry for part in parts for name, entry in part["files"].items()}
    require_files(partial, files)
    state = partial / STATE_FILE
    files[STATE_FILE] = {"bytes": state.stat().st_size, "sha256": hash_file(state)}
    write_atomic(partial / MANIFEST, orjson.dumps({"files": files}, option=orjson.OPT_INDENT_2))
    final = partial.parent / f"step-{TrainState.load(partial).step:08d}"
    shutil.rmtree(final, ignore_errors=True)
    replace_file(partial, final)
    # The parts are deleted last, because the next start needs them to finish a seal that was cut short.
    shutil.rmtree(final / PARTS, ignore_errors=True)
    return final


def require_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that all files are there with the sizes that were written.

    Raises:
        VanishedError: one is not.
    """
    problem = find_wrong_size(folder, {name: entry["bytes"] for name, entry in files.items()})
    if problem:
        raise VanishedError(f"{folder}: {problem}")


def find_wrong_size(folder: Path, sizes: Mapping[str, int]) -> str | None:
    """Describe the first file that is missing or has another size; None if there is none."""
    for name, size in sizes.items():
        try:
            found = (folder / name).stat()
        except FileNotFoundError:
            return f"{name} is missing"
        except ValueError as error:  # a null character in a damaged name
            return f"{name!r} is missing: {error}"
        except OSError as error:
            if error.errno not in NO_SUCH_NAME:
                raise
            return f"{name[:100]} is missing: {error.strerror}"
        if not stat.S_ISREG(found.st_mode):
            return f"{name} is not a file"
        if found.st_size != size:
            return f"{name} has {found.st_size} bytes instead of {size}"
    return None


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


class FoundCheckpoints(NamedTuple):
    """The newest intact checkpoint of a folder, and the damage of each later one by the name of its folder."""

    newest: Path | None
    damages: dict[str, str]


def find_checkpoints(folder: Path) -> FoundCheckpoints:
    """Verify the checkpoints, newest first, until one is intact."""
    damages = {}
    for path in reversed(list_step_folders(folder)):
        damage = verify_manifest(path)
        if damage is None:
            return FoundCheckpoints(path, damages)
        damages[path.name] = damage
    return FoundCheckpoints(None, damages)


def find_newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest intact checkpoint; warn about each damaged one and skip it."""
    newest, damages = find_checkpoints(folder)
    for name, damage in damages.items():
        logger.warning("{} is damaged and skipped: {}", folder / name, damage)
    return newest


def tidy_checkpoints(folder: Path, newest: Path) -> None:
    """Rename the damaged checkpoints after `newest`, the newest intact one. Pruning would keep them in its place.

    Folders without a manifest before `newest` are deleted: a deletion of theirs was cut short.
    """
    for path in list_step_folders(folder):
        if get_step(path) > get_step(newest):
            aside = path.with_name(DAMAGED + path.name)
            shutil.rmtree(aside, ignore_errors=True)
            replace_file(path, aside)
            logger.warning("{} is renamed to {}", path, aside.name)
        elif not (path / MANIFEST).exists():
            logger.warning("{} has no {} and is deleted", path, MANIFEST)
            delete_checkpoint(path)


def list_step_folders(folder: Path) -> list[Path]:
    """List the folders with names of checkpoints, oldest step first, intact or not."""
    paths = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(paths, key=get_step)


def list_checkpoints(folder: Path) -> list[Path]:
    """List the folders that hold a manifest, oldest step first."""
    return [path for path in list_step_folders(folder) if (path / MANIFEST).is_file()]


def get_step(path: Path) -> int:
    """Return the step of a checkpoint from the name of its folder."""
    return int(path.name.rpartition("-")[2])


def prune_checkpoints(folder: Path, keep_last: int, keep_every_steps: int, keep_best: int = 0) -> None:
    """Delete the oldest checkpoints beyond `keep_last`, except steps that are multiples of `keep_every_steps`, except
    the best ones by their validations, and except one to go back to (`find_fallback`).

    A checkpoint whose files are not all there is not counted as kept, so that an intact one is not deleted for it.
    """
    num_kept, checkpoints = 0, list_checkpoints(folder)
    fallback = find_fallback(checkpoints)
    kept = find_best_checkpoints(folder.parent, checkpoints, keep_best) if keep_best else set()
    for path in reversed(checkpoints):
        if num_kept < keep_last:
            num_kept += read_manifest(path).damage is None
        elif path not in kept and path != fallback and (not keep_every_steps or get_step(path) % keep_every_steps):
            delete_checkpoint(path)


def find_fallback(checkpoints: Sequence[Path]) -> Path | None:
    """Return the newest checkpoint with weights that a later update began with, if the newest one of all has others.

    If an update broke the weights, no later step makes one, and all later checkpoints hold the broken weights.
    """
    if not checkpoints:
        return None
    try:
        state = orjson.loads((checkpoints[-1] / STATE_FILE).read_bytes())
        step, num_until_update = get_step(checkpoints[-1]), int(state.get("num_until_update", state["step"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    earlier = [path for path in checkpoints if get_step(path) < num_until_update < step]
    return next((path for path in reversed(earlier) if read_manifest(path).damage is None), None)


def find_best_checkpoints(run_folder: Path, checkpoints: Sequence[Path], keep_best: int) -> set[Path]:
    """Return the best checkpoints by their validations, and those whose validation cannot be read at this moment.

    The ranking is computed from files alone, so that a resume and a deletion by hand need no bookkeeping.
    """
    of_step = {get_step(path): path for path in checkpoints}
    ranking = rank_steps(run_folder, list(of_step))
    for step, reason in ranking.damaged.items():
        logger.warning("{} is kept, because its validation cannot be read: {}", of_step[step], reason)
    best, num_kept = {of_step[step] for step in ranking.damaged}, 0
    for path in (of_step[step] for step in ranking.steps):
        if num_kept < keep_best:
            best.add(path)
            num_kept += read_manifest(path).damage is None
    return best


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint, or warn if it cannot be deleted: training continues, and the next start tries again."""
    try:
        # The manifest goes first: a deletion cut short must not leave a folder that looks like a checkpoint.
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)
    except OSError as error:
        if path.exists():
            logger.warning("{} cannot be deleted: {}", path, error)


class Manifest(NamedTuple):
    """SHA-256 of each file that a checkpoint's manifest lists, and the first damage that is found without hashing."""

    hashes: dict[str, str]
    damage: str | None


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest, and check that all its files are there with their sizes."""
    try:
        files = orjson.loads((folder / MANIFEST).read_bytes())["files"]
        hashes = {str(name): str(entry["sha256"]) for name, entry in files.items()}
        sizes = {str(name): int(entry["bytes"]) for name, entry in files.items()}
    except FileNotFoundError:
        return Manifest({}, f"{MANIFEST} is missing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Manifest({}, f"{MANIFEST} cannot be read: {error}")
    if STATE_FILE not in hashes:
        return Manifest({}, f"{MANIFEST} does not list {STATE_FILE}")
    return Manifest(hashes, find_wrong_size(folder, sizes))


def verify_manifest(folder: Path) -> str | None:
    """Compare a folder with its manifest. Returns the first difference, or None."""
    hashes, damage = read_manifest(folder)
    if damage is not None:
        return damage
    # Hashing releases the interpreter, so threads share the cores.
    with ThreadPoolExecutor() as pool:
        found = pool.map(hash_file, [folder / name for name in hashes])
        for (name, digest), actual in zip(hashes.items(), found, strict=True):
            ACTIVITY.note()
            if actual != digest:
                return f"{name} has another SHA-256"
    return None
