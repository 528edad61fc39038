"""Paths in settings and on the command line: home folders and environment variables in them are replaced."""

import argparse
import os
import re
from pathlib import Path

# In an annotation such as `Annotated[str, IS_PATH]`, marks a text as a path, or as something that may be a path.
IS_PATH = "path"
CHECK_PATH = "check the path (relative to the working directory)"  # cure of a setting that names no file or folder
# Folders of kohya's scripts begin with the repeats of their images: `10_dog`.
REPEATS_PREFIX = r"(\d+)_"
WINDOWS_PATH = re.compile(r"([A-Za-z]):[\\/]")
VARIABLE = re.compile(r"\$(?:(\w+)|\{([^{}]*)\})")


class PathError(ValueError):
    """A path cannot be expanded.

    Args:
        cure: what to do about it.
    """

    def __init__(self, rule: str, cure: str):
        super().__init__(rule)
        self.cure = cure


def expand_path(path: str) -> str:
    """Return a path or URL with `~`, `~user`, `$VAR` and `${VAR}` replaced. A command (`pipe:`) is left to its shell.

    Raises:
        PathError: the path is empty, one of Windows, or names a variable without a value or a user that does not
            exist.
    """
    if path.startswith("pipe:"):
        return path
    if not path.strip():
        raise PathError("is an empty path", "write the path")
    if os.name == "posix" and (drive := WINDOWS_PATH.match(path)) and not os.path.lexists(path):
        here = f"/mnt/{drive[1].lower()}/{path[3:]}".replace("\\", "/")
        raise PathError("is a path of Windows", f"write this machine's, under WSL {here}")

    def expand_variable(match: re.Match) -> str:
        name = match[1] or match[2]
        if not os.environ.get(name) and not os.path.lexists(path):
            rule = f"names the environment variable {name}, which is not set"
            raise PathError(rule, "export it, or write the path without it")
        return os.environ.get(name) or match[0]

    expanded = os.path.expanduser(VARIABLE.sub(expand_variable, path))
    if expanded.startswith("~") and not os.path.lexists(expanded):
        rule = f"names the home folder of {expanded.split('/')[0]}, which does not exist"
        raise PathError(rule, "correct the user's name, or write the path without it")
    # A folder that is really named `~`, such as `./~`, must not be expanded when saved settings are read again.
    return os.path.abspath(expanded) if os.path.normpath(expanded).startswith("~") else expanded


def parse_path(text: str) -> Path:
    """Return the path in an argument of a program. The shell does not replace the `~` of `--out=~/images`."""
    try:
        return Path(expand_path(text))
    except PathError as error:
        raise argparse.ArgumentTypeError(f"'{text}' {error}; {error.cure}") from None


def remove_file_scheme(name: Path | str) -> Path | str:
    """Return the path that a `file://` URL names, and any other path or URL unchanged."""
    return name.removeprefix("file://") if isinstance(name, str) else name


def tell_url_from_path(name: Path | str | None) -> Path | str | None:
    """Return a URL as text without a slash at its end, and a path, also one that a `file://` URL names, as a path."""
    if name is None or isinstance(name, Path):
        return name
    text = name.removeprefix("file://")
    return text.rstrip("/") if "://" in text else Path(text)
