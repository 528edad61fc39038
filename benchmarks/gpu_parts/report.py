"""The JSON of a part: its cases, written to disk after every measurement, so that a stop loses nothing."""

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from harness import Figure

Status = Literal["started", "done", "failed", "skipped"]
LONGEST_ERROR = 3000  # characters


class SkippedCase(Exception):  # noqa: N818 (it is no error)
    """Raised by a case that cannot be measured here. The message is the reason."""


@dataclass
class Case:
    """The measurements of one case."""

    name: str
    save: Callable[[], None]  # writes the whole report
    status: Status = "started"
    reason: str = ""  # for which it failed or was skipped
    seconds: float = 0.0
    values: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)

    def note(self, **values: Any) -> None:
        """Add values that have no target. Floats are rounded to six digits."""
        self.values.update({name: shorten(value) for name, value in values.items()})
        self.save()

    def check(self, name: str, value: float, sign: str, target: float) -> None:
        """Add a figure that must be `>=` or `<=` a target."""
        self.figures[name] = Figure(value, sign, target)
        self.save()

    def describe(self) -> dict[str, Any]:
        """Return the case as JSON has it."""
        return {
            "status": self.status,
            "reason": self.reason,
            "seconds": round(self.seconds, 1),
            "figures": {name: describe_figure(figure) for name, figure in self.figures.items()},
            "values": self.values,
        }


Cases = dict[str, Callable[[Case], None]]  # name → function that measures


class Report:
    """The cases of a part and the file that holds them. A part that is started again keeps what has been measured."""

    def __init__(self, path: Path):
        self._path = path
        self._document: dict[str, Any] = read_report(path) or {
            "part": path.stem,
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "cases": {},
        }
        for case in self._document["cases"].values():
            if case["status"] == "started":
                case.update(status="failed", reason="the process ended within this case")

    def run_cases(self, cases: Cases, clean_up: Callable[[], None] = lambda: None) -> None:
        """Run the cases that have not been run yet, in order.

        Args:
            clean_up: called after each case; it may end the process, which is then started again for the other cases.
        """
        for name, measure in cases.items():
            if name not in self._document["cases"]:
                self._run(name, measure)
                clean_up()

    def _run(self, name: str, measure: Callable[[Case], None]) -> None:
        case, started = Case(name, lambda: self._save(case)), time.monotonic()
        self._save(case)
        print(f"-- {name}", flush=True)
        try:
            measure(case)
            case.status = "done"
        except SkippedCase as skipped:
            case.status, case.reason = "skipped", str(skipped)
        except Exception as error:  # noqa: BLE001 (other cases may succeed; the report holds the error)
            traceback.print_exc()
            case.status, case.reason = "failed", f"{type(error).__name__}: {error}"[-LONGEST_ERROR:]
        case.seconds = time.monotonic() - started
        self._save(case)

    def _save(self, case: Case) -> None:
        self._document["cases"][case.name] = case.describe()
        write_report(self._path, self._document)


def read_report(path: Path) -> dict[str, Any] | None:
    """Read a report; None if there is none, or if its writer was killed while it wrote."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def write_report(path: Path, document: dict[str, Any]) -> None:
    """Write a report under a temporary name, and rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(document, indent=1, default=str))
    temporary.replace(path)


def describe_figure(figure: Figure) -> dict[str, Any]:
    """Return a figure as JSON has it."""
    return {"value": shorten(figure.value), "target": f"{figure.sign} {figure.target:g}", "met": figure.met}


def shorten(value: Any) -> Any:
    """Round floats to six digits, within lists and dicts too."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: shorten(part) for name, part in value.items()}
    return [shorten(part) for part in value] if isinstance(value, (list, tuple)) else value
