"""Readers of TOML files, JSON files and command lines of kohya's scripts.

No file is ever executed.
"""

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sdxl_trainer.configs.kohya.values import read_literal
from sdxl_trainer.configs.problems import Problem, UserInputError, describe_encoding

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


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        UserInputError: the file cannot be read, or is not TOML.
    """
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits are plain ValueErrors
        raise UserInputError(
            [Problem("FILE", path, f"is not valid TOML: {error}", "correct the line that is named")]
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file whose value is an object.

    Raises:
        UserInputError: the file cannot be read, or is not a JSON object.
    """
    try:
        fields = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        rule, cure = f"is not valid JSON: {error}", "correct the line that is named"
        raise UserInputError([Problem("FILE", path, rule, cure)]) from None
    if not isinstance(fields, dict):
        raise UserInputError([Problem("FILE", path, "is not a JSON object", "give the settings that kohya_ss saves")])
    return fields


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


class Command(NamedTuple):
    """The options of a command line, and those of its launcher that do not change the training."""

    options: dict[str, Any]
    launcher: dict[str, Any]


def read_command(path: Path) -> Command:
    """Return the options of a command line in a shell script or a text file; flags are True, several words a list.

    Raises:
        UserInputError: the file contains no options.
    """
    text = CONTINUED.sub(" ", read_text(path))
    if path.suffix.lower() in WINDOWS:
        text = text.replace("\\", "\\\\")  # backslashes separate folders there and escape nothing
    text = QUOTED_OR_COMMENT.sub(lambda match: match[1] or "", text)
    text = QUOTED_END.sub(lambda match: f"'{QUOTE_MARK}{match[2]}'", text)
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserInputError([Problem("FILE", path, f"is not a command line: {error}", "correct the quotes")]) from None
    script = next((number for number, word in enumerate(words) if SCRIPT.search(word)), -1)
    launcher = collect_options(words[:script]) if script >= 0 else {}
    options = {name: launcher.pop(name) for name in LAUNCHER_OPTIONS if name in launcher}
    options |= collect_options(words[script + 1 :])
    if not options:
        rule = "contains no options such as --learning_rate=1e-5"
        cure = "give a TOML file, a command line, or the Python settings of the first sdxl-trainer"
        raise UserInputError([Problem("FILE", path, rule, cure)])
    return Command(options, {name: value for name, value in launcher.items() if name not in options})


def collect_options(words: list[str]) -> dict[str, Any]:
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


def read_text(path: Path) -> str:
    """Return a file's text.

    Raises:
        UserInputError: the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        rule = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        rule = describe_encoding(error)
    raise UserInputError([Problem("FILE", path, rule, "check the path")])
