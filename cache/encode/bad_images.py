"""Images that cannot be used: warn of them, list them, and do not try them again while they do not change.

`logs/bad_samples.jsonl` in the cache folder lists them with key, file and reason. A line with `source` is of an image
whose bytes are at fault: `source` holds the file's size and time, and a hash of all that decides whether it is bad.
"""

import hashlib
import os
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import orjson
import PIL
from loguru import logger
from PIL import Image

from sdxl_trainer.cache.encode.decoder import SharedFileError
from sdxl_trainer.cache.encode.encode_plan import EncodePlan
from sdxl_trainer.configs.problems import format_count
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.checks.unusable_images import get_bad_images_file
from sdxl_trainer.data.counted_warnings import CountedWarnings
from sdxl_trainer.data.files import write_atomic
from sdxl_trainer.data.images.masks import BadMaskError
from sdxl_trainer.data.images.transforms import BadImageError


def hash_rules(config: Config) -> str:
    """Return a hash of the settings, and of the image formats of this machine, that decide whether an image is bad."""
    decoders = [PIL.__version__, sorted(Image.registered_extensions())]
    settings = [config.data.model_dump(mode="json", exclude={"max_bad_fraction"}), config.cache.model_dump(mode="json")]
    return hashlib.sha256(orjson.dumps([decoders, settings], option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


class BadImages:
    """The bad images of a rank's share: those of this job, and those of earlier jobs that have not changed.

    Args:
        folder: cache folder.
        rules: see `hash_rules`.

    Attributes:
        lines: a line for `write_bad_images` for each bad image.
        untried: lines of an earlier job of images that this one does not try.
    """

    def __init__(self, folder: Path, rules: str, num_ranks: int = 1):
        self._rules = rules
        self._listed = _read_lines(get_bad_images_file(folder))
        self._known = {key: line for key, line in self._listed.items() if _is_known(line, rules)}
        self._warnings = CountedWarnings("skipped bad image", get_bad_images_file(folder), num_ranks)
        self.lines: list[dict[str, Any]] = []
        self.untried: list[dict[str, Any]] = []

    def leave_out_known(self, plans: Sequence[EncodePlan], kept_keys: Container[str] = ()) -> None:
        """Remove images from plans that were bad in an earlier job and have not changed since.

        Args:
            kept_keys: keys of images whose lines are kept although no plan has them: a repair tries no new images.
        """
        for plan in plans if self._known else ():
            self._leave_out_of(plan)
        planned = {item.key for plan in plans for item in plan.items} | {line["key"] for line in self.lines}
        self.untried = [line for key, line in self._listed.items() if key in kept_keys and key not in planned]

    def _leave_out_of(self, plan: EncodePlan) -> None:
        kept = []
        for item in plan.items:
            line = self._known.get(item.key)
            if (
                line is not None
                and line["file"] == item.image_path
                and line["source"] == self._describe_source(item.image_path)
            ):
                self.lines.append(line)
                plan.counts["bad"] += 1
                state = next(state for state in ("new", "changed", "missing", "stale") if plan.counts[state])
                plan.counts[state] -= 1
            else:
                kept.append(item)
        plan.keep_items(kept)

    def add(self, key: str, file: str, error: Exception) -> None:
        """List an image, and warn of it."""
        reason = str(error)
        line: dict[str, Any] = {"key": key, "file": file, "reason": reason}
        if _is_lasting(error):
            line["source"] = self._describe_source(file)
        self.lines.append(line)
        self._warnings.add(reason)

    def close(self) -> None:
        """Log how many images were bad, if not all were named."""
        self._warnings.close()

    def _describe_source(self, file: str) -> list[Any] | None:
        """Return the size, the time and the rules of an image file, or None if it does not exist."""
        try:
            status = os.stat(file)
        except (OSError, ValueError):
            return None
        return [status.st_size, status.st_mtime_ns, self._rules]


def write_bad_images(folder: Path, lines: Sequence[dict[str, Any]]) -> Path:
    """Write the list of all ranks' bad images into the cache folder, and return the file."""
    file = get_bad_images_file(folder)
    write_atomic(file, b"".join(orjson.dumps(line) + b"\n" for line in lines))
    return file


def report_known(folder: Path, num_known: int) -> None:
    """Log that images are not tried again."""
    if num_known:
        logger.warning(
            "{} could not be used before, and did not change: not tried again; {} lists all (delete it to try them)",
            format_count(num_known, "image"),
            get_bad_images_file(folder),
        )


def _is_lasting(error: Exception) -> bool:
    """Return whether an image stays bad until its file changes. Storage may recover, and so may memory."""
    cause = error.__context__
    # PyTorch reports too little memory as a RuntimeError.
    may_pass = isinstance(cause, (MemoryError, RuntimeError)) or (
        isinstance(cause, OSError) and cause.errno is not None
    )
    return isinstance(error, BadImageError) and not isinstance(error, (BadMaskError, SharedFileError)) and not may_pass


def _read_lines(file: Path) -> dict[str, dict[str, Any]]:
    """Read the lines of bad images, by key. A line that cannot be read is left out."""
    lines = {}
    try:
        content = file.read_bytes()
    except OSError:
        return lines
    for text in content.splitlines():
        try:
            line = orjson.loads(text)
            lines[str(line["key"])] = line
        except (ValueError, LookupError, TypeError):
            continue
    return lines


def _is_known(line: dict[str, Any], rules: str) -> bool:
    """Return whether a line is of an image that stays bad under these rules."""
    source = line.get("source")
    return isinstance(source, list) and len(source) == 3 and source[2] == rules and "file" in line
