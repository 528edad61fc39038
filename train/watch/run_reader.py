"""Numbers, images, settings and messages of one run. Every poll reads only what has changed in the run's files."""

import re
import time
from pathlib import Path
from typing import Any

import orjson

from sdxl_trainer.configs.language.translate import translate, translate_label
from sdxl_trainer.data.files import open_stream, read_regular
from sdxl_trainer.launch.folder_lock import LOCK_FILE
from sdxl_trainer.train.report.metrics import CHANGES_FILE, read_changes
from sdxl_trainer.train.report.run_state import RUNNING, STARTING, read_holder, resolve_state
from sdxl_trainer.train.report.run_status import STATUS_FILE, RunStatus, read_status
from sdxl_trainer.train.report.settings import MAX_CONFIG_BYTES, read_settings
from sdxl_trainer.train.watch.curves import Curves
from sdxl_trainer.train.watch.file_tail import FileTail
from sdxl_trainer.train.watch.messages import Messages
from sdxl_trainer.train.watch.run_folder import (
    clean_text,
    describe_file,
    list_images,
    locate,
    locate_image,
    read_prompt,
    split_parameters,
)

READ_BYTES = 1 << 20  # of the metrics at a time
READ_SECONDS = 0.2  # that a poll may spend on metrics; the next ones continue
LAST_BYTES = 1 << 14  # of the metrics, in which the last step is looked for
REQUESTS = ("save", "sample", "stop")  # files that a running job looks for (train/run/interruption.py)
MAX_STEPS = re.compile(rb"^  max_steps: (\d{1,12})\s*$", re.MULTILINE)
NO_FILE = Path("/nonexistent")
SHOWN_STATUS = (
    *("epoch", "seconds_left", "images_per_second", "data_wait_share", "loss", "memory", "num_bad"),
    *("num_non_finite", "num_ranks", "slow_ranks", "over_fitting", "has_prompts", "host", "started"),
)


class RunReader:
    """Reader of a run folder.

    Args:
        folder: the run folder, without symbolic links.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self._versions: dict[str, Any] = {}  # name of a file → its size and time when it was read
        self._status: RunStatus | None = None
        self._last_row: dict[str, Any] = {}
        self._max_steps = 0
        self._watched = [folder / "logs" / STATUS_FILE, folder / "logs" / "metrics.jsonl", folder / LOCK_FILE]
        self._watched.append(folder / "config.yaml")
        self._summary: dict[str, Any] = {}
        self._heard_at = float("-inf")  # on the monotonic clock: when a new sign of life was seen
        self.forget()

    def forget(self) -> None:
        """Free what only an opened run needs. It is read again when it is needed."""
        self._opened_ns = time.monotonic_ns()
        self._tail, self._curves = FileTail(self._locate("logs", "metrics.jsonl")), Curves()
        self._messages = Messages(self.folder)
        self._settings: dict[str, str] = {}
        self._images: dict[str, Any] = {}
        for name in ("settings", "images"):
            self._versions.pop(name, None)

    def summarize(self) -> dict[str, Any]:
        """Return state and progress for JSON. A run that is not running is read again only if a file has changed."""
        versions = [describe_file(path) for path in self._watched]
        if self._summary.get("state", RUNNING) == RUNNING or self._versions.get("summary") != versions:
            self._summary, self._versions["summary"] = self._build_summary(), versions
        return self._summary

    def _build_summary(self) -> dict[str, Any]:
        status_file, metrics_file = self._locate("logs", STATUS_FILE), self._locate("logs", "metrics.jsonl")
        if self._has_changed(STATUS_FILE, status_file):
            self._status = read_status(status_file)
        if self._has_changed("metrics", metrics_file):
            self._last_row = _read_last_row(metrics_file)
        status, last_step = self._status, int(self._last_row.get("step", 0))
        if status is None and self._has_changed("max_steps", config := self._locate("config.yaml")):
            self._max_steps = _read_max_steps(config)
        max_steps = status.max_steps if status else self._max_steps
        silent = self._measure_silence(metrics_file if status is None else status_file)
        state, text = resolve_state(status, read_holder(self.folder), silent, last_step, max_steps)
        shown = {name: getattr(status, name) for name in SHOWN_STATUS} if status else {}
        if status is None:
            shown |= {"loss": self._last_row.get("loss"), "epoch": self._last_row.get("epoch")}
        if state != RUNNING:
            shown["seconds_left"] = None
        return {
            "name": self.name,
            "state": state,
            "text": clean_text(translate_label(text)),
            "step": max(status.step if status else 0, last_step),
            "max_steps": max_steps,
            "changed": max(map(_get_time, (status_file, metrics_file))),
            "accepts": _list_accepted(state, text, status),
            "requests": [name for name in REQUESTS if state == RUNNING and (self.folder / name).exists()],
            **{
                name: clean_text(translate(value)) if isinstance(value, str) else value for name, value in shown.items()
            },
        }

    def read_curves(self, version: str, first: int) -> dict[str, Any]:
        """Return the curves for JSON, or what is new since an earlier call. Long files are read in several calls.

        Args:
            version: that of the earlier call. If it is another one by now, everything is returned.
            first: number of the last range that the earlier call returned, which may have changed.
        """
        deadline = time.monotonic() + READ_SECONDS
        while time.monotonic() < deadline:
            generation = self._tail.generation
            lines = self._tail.read(READ_BYTES)
            if self._tail.generation != generation:
                self._curves = Curves()
            if not lines:
                break
            self._curves.add_lines(lines)
        current = f"{self._opened_ns}-{self._tail.generation}-{self._curves.revision}"
        first = max(first, 0) if version == current else 0
        return {
            "version": current,
            "first": first,
            "width": self._curves.width,
            "share": self._tail.share,
            "last_step": self._curves.last_step,
            "changes": {
                str(step): [clean_text(translate(text)) for text in texts]
                for step, texts in read_changes(self._locate("logs", CHANGES_FILE)).items()
            },
            "curves": {clean_text(name): curve for name, curve in self._curves.export(first).items()},
        }

    def read_images(self) -> dict[str, Any]:
        """Return steps and prompts of the generated images for JSON."""
        newest = self._images.get("steps", [])[-1:]
        folders = [self._locate("samples"), *(self._locate("samples", f"step-{step:08d}") for step in newest)]
        version = [describe_file(folder) for folder in folders]
        if version != self._versions.get("images") or not newest:
            images = list_images(self.folder)
            steps_of: dict[int, list[int]] = {}
            for step, numbers in images.items():
                for number in numbers:
                    steps_of.setdefault(number, []).append(step)
            prompts = [
                {"number": number, "steps": steps, **self._read_prompt(steps[-1], number)}
                for number, steps in sorted(steps_of.items())
            ]
            self._images = {"steps": list(images), "prompts": prompts}
            self._versions["images"] = version
        return self._images

    def read_settings(self) -> dict[str, str]:
        """Return all settings as texts."""
        if self._has_changed("settings", file := self._locate("config.yaml")):
            self._settings = {clean_text(key): clean_text(value) for key, value in read_settings(file).items()}
        return self._settings

    def read_messages(self) -> dict[str, Any]:
        """Return warnings and bad samples for JSON."""
        return self._messages.read()

    def _read_prompt(self, step: int, number: int) -> dict[str, Any]:
        try:
            return split_parameters(read_prompt(locate_image(self.folder, step, number)))
        except OSError:
            return split_parameters("")

    def _locate(self, *parts: str) -> Path:
        """Return the path of a file, or of no file if a link leads out of the run folder."""
        try:
            return locate(self.folder, *parts)
        except OSError:
            return NO_FILE

    def _has_changed(self, name: str, file: Path) -> bool:
        """Return whether a file has changed since the last call with this name."""
        version = describe_file(file)
        is_new = name not in self._versions or self._versions[name] != version
        if is_new and self._versions.get(name) and version and name in (STATUS_FILE, "metrics"):
            self._heard_at = time.monotonic()
        self._versions[name] = version
        return is_new

    def _measure_silence(self, file: Path) -> float:
        """Return the seconds since the last sign of life.

        The clock of the machine that wrote the file may differ from this one's, so a change that was seen counts too.
        """
        return min(max(0.0, time.time() - _get_time(file)), time.monotonic() - self._heard_at)


def _list_accepted(state: str, text: str, status: RunStatus | None) -> list[str]:
    """List the requests that a run accepts now. A start would delete an earlier `stop` file."""
    if state != RUNNING or text == STARTING:
        return []
    is_useless = status is None or not status.has_prompts
    return [name for name in REQUESTS if not (name == "sample" and is_useless)]


def _get_time(file: Path) -> float:
    """Return the time of the last change of a file; 0 if it is missing."""
    described = describe_file(file)
    return described[2] / 1e9 if described else 0.0


def _read_last_row(file: Path) -> dict[str, Any]:
    """Read the last whole line of a step from a metrics file; {} without one."""
    try:
        with open_stream(file) as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - LAST_BYTES))
            lines = stream.read(LAST_BYTES).split(b"\n")[:-1]
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and "loss" in row:
            return {name: value for name, value in row.items() if isinstance(value, (int, float))}
    return {}


def _read_max_steps(config: Path) -> int:
    """Read `train.max_steps` without parsing the file, which takes much longer; 0 if it is not there."""
    try:
        found = MAX_STEPS.search(read_regular(config, MAX_CONFIG_BYTES).content)
    except OSError:
        return 0
    return int(found[1]) if found else 0
