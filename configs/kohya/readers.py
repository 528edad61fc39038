"""Readers of TOML files, command lines and Python settings of kohya's scripts and the first sdxl-trainer.

No file is ever executed.
"""

import ast
import operator
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sdxl_trainer.configs.kohya.values import read_literal
from sdxl_trainer.configs.problems import Problem, UserInputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

SCRIPT = re.compile(r"\w*train\w*\.py$")
# Options of accelerate that affect training.
LAUNCHER_OPTIONS = ("num_processes", "mixed_precision")
SHELL_ENDS = {"&&", "||", "|", ";", "&", ">", ">>", "2>&1"}
# A quoted sign of the shell, such as the separator `";"`. shlex removes the quotes, so that a mark takes their place.
QUOTED_END = re.compile(r"""(["'])(&&|\|\||[|;&>]|>>)\1""")
QUOTE_MARK = "\0"
# Line continuations of POSIX shells, cmd.exe and PowerShell.
CONTINUED = re.compile(r"[\\^`][ \t]*\r?\n")
# A quoted text, which may contain the signs of a comment, or a comment.
QUOTED_OR_COMMENT = re.compile(r"""(?m)("(?:\\.|[^"\\])*"|'[^']*')|(?:^|(?<=\s))(?:#|REM |::).*$""")
WINDOWS = (".bat", ".cmd", ".ps1")
ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


class NotPlainError(ValueError):
    """A Python expression whose value is unknown without executing it."""


class PythonSettings(NamedTuple):
    """Assigned values by name, and the source code of expressions whose value is unknown, by name."""

    values: dict[str, Any]
    sources: dict[str, str]


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        UserInputError: the file cannot be read, or is not TOML.
    """
    text = _read_text(path)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits are plain ValueErrors
        raise UserInputError(
            [Problem("FILE", path, f"is not valid TOML: {error}", "correct the line that is named")]
        ) from None


def is_dataset_config(tables: dict[str, Any]) -> bool:
    """Return whether a TOML file describes datasets instead of training arguments."""
    return "datasets" in tables


def check_dataset_tables(path: Path, tables: dict[str, Any]) -> Iterator[Problem]:
    """Yield a problem for each part of a dataset file that is not the table or the number it must be."""
    datasets = tables["datasets"] if isinstance(tables["datasets"], list) else [None]
    subsets = [table.get("subsets", []) if isinstance(table, dict) else [] for table in datasets]
    parts = {
        "[general]": [tables.get("general", {})],
        "[[datasets]]": datasets,
        "[[datasets.subsets]]": [part for group in subsets for part in (group if isinstance(group, list) else [None])],
    }
    for name, found in parts.items():
        if not all(isinstance(table, dict) for table in found):
            yield Problem("FILE", path, f"{name} is not a table", f"write {name} on a line of its own")
        elif not all(isinstance(table.get("num_repeats", 1), int) for table in found):
            yield Problem("FILE", path, f"num_repeats in {name} is not a whole number", "write num_repeats = 1")


def flatten_sections(tables: dict[str, Any]) -> dict[str, Any]:
    """Return the options in a file of training arguments; the names of its sections have no meaning."""
    options: dict[str, Any] = {}
    for name, value in tables.items():
        options |= value if isinstance(value, dict) else {name: value}
    return options


def read_command(path: Path) -> dict[str, Any]:
    """Return the options of a command line in a shell script or a text file; flags are True, several words a list.

    Raises:
        UserInputError: the file contains no options.
    """
    text = CONTINUED.sub(" ", _read_text(path))
    if path.suffix.lower() in WINDOWS:
        text = text.replace("\\", "\\\\")  # backslashes separate folders there and escape nothing
    text = QUOTED_OR_COMMENT.sub(lambda match: match[1] or "", text)
    text = QUOTED_END.sub(lambda match: f"'{QUOTE_MARK}{match[2]}'", text)
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserInputError([Problem("FILE", path, f"is not a command line: {error}", "correct the quotes")]) from None
    script = next((number for number, word in enumerate(words) if SCRIPT.search(word)), -1)
    options = {name: value for name, value in _collect_options(words[:script]).items() if name in LAUNCHER_OPTIONS}
    options = (options if script >= 0 else {}) | _collect_options(words[script + 1 :])
    if not options:
        rule = "contains no options such as --learning_rate=1e-5"
        cure = "give a TOML file, a command line, or the Python settings of the first sdxl-trainer"
        raise UserInputError([Problem("FILE", path, rule, cure)])
    return options


def _collect_options(words: list[str]) -> dict[str, Any]:
    """Return the options in words, up to the end of the shell command; words before the first option are ignored."""
    options: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word in SHELL_ENDS:
            break
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            options[name] = [value] if equals else []
        elif name:
            options[name].append(word)
    return {name: _read_values(values) for name, values in options.items() if name}


def _read_values(words: list[str]) -> Any:
    values = [read_literal(word.removeprefix(QUOTE_MARK)) for word in words] or [True]
    return values if len(values) > 1 else values[0]


def read_python(path: Path) -> PythonSettings:
    """Read the settings that `get_config` of the first sdxl-trainer assigns.

    The file is parsed, not executed: constants, lists, `dict(...)`, `cfg(...)`, arithmetic and os.path.join are
    evaluated.

    Raises:
        UserInputError: the file cannot be read, is not Python, or assigns nothing to `config.<name>`.
    """
    text = _read_text(path)
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two for deep nesting
        reason = f"{error.msg} (line {error.lineno})" if isinstance(error, SyntaxError) else "nested too deeply"
        rule = f"is not valid Python: {reason}"
        raise UserInputError([Problem("FILE", path, rule, "correct the line that is named")]) from None
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for node in ast.walk(tree):
        target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
        if not (isinstance(node, ast.Assign) and isinstance(target, ast.Attribute)):
            continue
        if isinstance(target.value, ast.Name) and target.value.id == "config":
            try:
                values[target.attr] = _evaluate(node.value, values)
            except NotPlainError as error:
                sources[target.attr] = str(error)
    if not values:
        rule = "assigns nothing to config.<name>"
        raise UserInputError([Problem("FILE", path, rule, "give the file that contains get_config()")])
    return PythonSettings(values, sources)


def _evaluate(node: ast.expr, known: dict[str, Any]) -> Any:
    """Return the value of a plain expression.

    Raises:
        NotPlainError: the expression is not plain.
    """
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_evaluate(item, known) for item in node.elts]
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        sides = _evaluate(node.left, known), _evaluate(node.right, known)
        if all(isinstance(side, (int, float)) for side in sides) and sides[1] != 0:
            return ARITHMETIC[type(node.op)](*sides)
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        if called in ("cfg", "dict", "ConfigDict") and not node.args:
            return {word.arg: _evaluate(word.value, known) for word in node.keywords if word.arg}
        if called == "os.path.join":
            return "/".join(str(_evaluate(item, known)) for item in node.args)
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "config" and node.attr in known:
        return known[node.attr]
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise NotPlainError(ast.unparse(node)) from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        rule = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError:
        rule = "is not UTF-8 text"
    raise UserInputError([Problem("FILE", path, rule, "check the path")])
