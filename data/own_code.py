"""Your own code that a setting names, as `path/to/file.py:Name` or `module:Name`: loaded, called and identified.

An exception in it becomes a UserCodeError with its traceback; a name that leads nowhere is a problem with the setting.
"""

import hashlib
import importlib
import importlib.util
import inspect
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from sdxl_trainer.configs.paths import CHECK_PATH
from sdxl_trainer.configs.problems import Problem, UserInputError, suggest_name

FORM = "path/to/file.py:{0} or module:{0}"
# Pages that show how to write the code of a setting; the others are on docs/OWN_CODE.md.
GUIDES = {"data.strategy": "docs/STRATEGY.md"}


class UserCodeError(RuntimeError):
    """The user's code raised an exception; the message holds it with its traceback."""


class OwnCode(NamedTuple):
    """A class or function of the user."""

    spec: str  # as the setting names it, with an absolute path
    target: Any


def load_own_code(key: str, spec: str, kind: str = "class") -> OwnCode:
    """Load the class or function that a setting names.

    Args:
        key: dotted key of the setting.
        spec: `path/to/file.py:Name`, or `module:Name` for a module that Python can import.
        kind: `class` or `function`.

    Raises:
        UserInputError: the file, module or name does not exist, cannot be loaded, or is of another kind.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        form = FORM.format("ClassName" if kind == "class" else "function_name")
        rule, cure = f"is not {form}", f"name the {kind} after a colon"
        raise UserInputError([Problem(key, spec, rule, cure)])
    load: Callable[[str], ModuleType] = importlib.import_module
    if place.endswith(".py"):
        place = str(Path(place).resolve())
        if not Path(place).is_file():
            raise UserInputError([Problem(key, spec, f"{place} is not a file", CHECK_PATH)])
        load, spec = _load_file, f"{place}:{name}"
    elif is_missing_module(place):
        cure = "check the name, install its package, or give the file: path/to/file.py:Name"
        raise UserInputError([Problem(key, spec, f"names a module that does not exist: {place}", cure)])
    try:
        module = call_user_code(load, place)
    except UserCodeError as error:
        rule = f"cannot be loaded: {error}"
        raise UserInputError([Problem(key, spec, rule, "correct it; Python must be able to import it")]) from None
    target = getattr(module, name, None)
    if not (isinstance(target, type) if kind == "class" else callable(target)):
        rule = f"needs a {kind}, but {name} is of type {type(target).__name__}"
        rule = f"has no {kind} {name}" if target is None else rule
        raise UserInputError([Problem(key, spec, rule, _suggest_target(module, name, kind, key))])
    return OwnCode(spec, target)


@cache
def load_own_function(key: str, spec: str) -> Callable[..., Any]:
    """Load the function that a setting names, once. Raises like `load_own_code`."""
    return load_own_code(key, spec, "function").target


def bind_arguments(function: Callable[..., Any], values: Mapping[str, Any]) -> Callable[..., Any]:
    """Bind those of some named values that a function has parameters for."""
    parameters = inspect.signature(function).parameters
    return partial(function, **{name: value for name, value in values.items() if name in parameters})


def is_missing_module(name: str) -> bool:
    """Return whether Python finds no module or package of this name."""
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError as error:  # a parent package is missing
        return f"{name}.".startswith(f"{error.name}.")
    except (ImportError, ValueError, AttributeError):
        return False  # the import itself names the fault


def call_user_code(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call the user's code, and turn any exception into one type. Signals and exits pass through.

    Raises:
        UserCodeError: the code raised an exception.
    """
    try:
        return function(*arguments, **named)
    except Exception as error:
        trace = error.__traceback__.tb_next if error.__traceback__ else None  # without the frame of this function
        lines = textwrap.indent("".join(traceback.format_exception(type(error), error, trace)).rstrip(), "  ")
        raise UserCodeError(f"{type(error).__name__}: {error}\n{lines}") from error


def hash_own_code(spec: str) -> str:
    """Return a hash of the file that holds the user's code, by which a resumed run notices that it has changed.

    Returns "" for a module without a file.
    """
    place = spec.rpartition(":")[0]
    file = place if place.endswith(".py") else getattr(sys.modules.get(place), "__file__", None)
    if file is None or not Path(file).is_file():
        return ""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def _load_file(path: str) -> ModuleType:
    # The unusual name keeps a user's file from shadowing a module. Dataclasses look their module up in sys.modules.
    name = f"sdxl_trainer_own_{hashlib.sha256(path.encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _suggest_target(module: ModuleType, name: str, kind: str, key: str) -> str:
    """Return the cure for a name that a module does not have, or not as a class or function."""
    is_package = hasattr(module, "__path__")  # which shows names of its modules; a file only imports others
    found = [
        own
        for own, value in vars(module).items()
        if not own.startswith("_")
        and (isinstance(value, type) if kind == "class" else callable(value))
        and (is_package or getattr(value, "__module__", module.__name__) == module.__name__)
    ]
    if near := suggest_name(name, found):
        return f"did you mean {near}?"
    if found:
        return f"name one that it has: {', '.join(found)}"
    guide = GUIDES.get(key, "docs/OWN_CODE.md")
    return f"write a class with the methods that {guide} shows" if kind == "class" else f"write one, as {guide} shows"
