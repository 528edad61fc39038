"""Fit imported settings to the rules of the schema, so that the written file passes the check of the settings."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sdxl_trainer.configs.kohya.importer import Imported, get_default_settings, nest_settings
from sdxl_trainer.configs.kohya.subsets import Remark
from sdxl_trainer.configs.kohya.values import NOT_EXECUTED
from sdxl_trainer.configs.problems import Problem, format_value

SIDE_PX = 32  # bucket sides are multiples of this
KEPT = f"; kept as it is, but {NOT_EXECUTED}: set the variable before a run, or write the path"


# Returns the problems of nested settings by the rules of the schema.
Check = Callable[[dict[str, Any]], list[Problem]]


class Fitted(NamedTuple):
    """Settings by dotted key that keep the rules, and remarks on those that had to be changed or left out."""

    settings: dict[str, Any]
    changed: list[Remark]
    rejected: list[Remark]


def fit_settings(imported: Imported, check: Check) -> Fitted:
    """Return the imported settings without those that break a rule.

    A path with a variable that is not set on this machine is kept, since it may be set where the run takes place.
    Without it, the run would use another path in silence.
    """
    defaults = get_default_settings()
    settings = {key: imported.settings[key] for key in defaults if key in imported.settings}
    changed = _widen_limits(settings, imported, defaults)
    problems = check(nest_settings(settings))
    changed += [_build_remark(imported, problem.key, problem, KEPT) for problem in problems if _names_variable(problem)]
    rejected: list[Remark] = []
    while problem := next((problem for problem in problems if not _names_variable(problem)), None):
        key = _find_culprit(problem, settings, check)
        ending = f"; left out, so the default applies here: {format_value(defaults[key])}"
        rejected.append(_build_remark(imported, key, problem, ending))
        del settings[key]
        problems = check(nest_settings(settings))
    return Fitted({key: settings[key] for key in defaults if key in settings}, changed, rejected)


def _widen_limits(settings: dict[str, Any], imported: Imported, defaults: Mapping[str, Any]) -> list[Remark]:
    """Move the limits of bucket sides, in place, if a resolution lies outside of them."""
    resolution: Any = settings.get("data.resolution_px")
    sides: list[Any] = resolution if isinstance(resolution, list) else [resolution]
    if not all(isinstance(side, int) and side >= SIDE_PX for side in sides):
        return []
    remarks = []
    for key, outermost, choose, round_steps in (
        ("data.min_bucket_px", min(sides), min, math.floor),
        ("data.max_bucket_px", max(sides), max, math.ceil),
    ):
        limit = settings.get(key, defaults[key])
        if isinstance(limit, int) and choose(limit, outermost) != limit:
            settings[key] = round_steps(outermost / SIDE_PX) * SIDE_PX
            option = imported.origins["data.resolution_px"]
            reason = (
                f"is {'below' if choose is min else 'above'} the limit of {limit} px for bucket sides, "
                f"so {key} is set to {settings[key]}"
            )
            remarks.append(Remark(option, imported.values.get(option, sides), reason))
    return remarks


def _names_variable(problem: Problem) -> bool:
    return "names the environment variable" in problem.rule


def _find_culprit(problem: Problem, settings: Mapping[str, Any], check: Check) -> str:
    """Return the setting to leave out so that a problem is gone.

    It is the one that the problem names, or else the first of its section whose absence solves it: rules of a whole
    section name none, and those of a missing setting name another.
    """
    named = [key for key in settings if f"{problem.key}.".startswith(f"{key}.")]
    if named:
        return named[0]
    section = problem.key.partition(".")[0]
    candidates = [key for key in settings if key.startswith(f"{section}.")] or list(settings)
    for key in candidates:
        rest = {other: value for other, value in settings.items() if other != key}
        if all(problem.key != left.key for left in check(nest_settings(rest))):
            return key
    return candidates[0]


def _build_remark(imported: Imported, key: str, problem: Problem, ending: str) -> Remark:
    """Return the remark on an option whose setting breaks a rule. The parts of its reason are on lines of their own."""
    option = imported.origins.get(key, key)
    value = imported.values.get(option, imported.settings.get(key))
    return Remark(option, value, "\n".join((f"{problem.key}: ", problem.rule, ending)))
