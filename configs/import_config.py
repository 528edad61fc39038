"""Convert settings of kohya's scripts, or of the first sdxl-trainer, to YAML:

python -m sdxl_trainer.configs.import_config train.toml dataset.toml --out my.yaml
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sdxl_trainer.configs.kohya.importer import Imported, convert, flatten_settings, nest_settings, read_files
from sdxl_trainer.configs.load import build_config
from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.configs.schema import Config


def build_yaml(found: Imported) -> tuple[str, list[tuple[str, Any, str]]]:
    """The YAML of what was imported, and what of it is against the settings' rules (key, value, why). Single keys among
    that are left out; of rules for a whole section the keys stay, to be mended by hand."""
    problems = build_config(nest_settings(found.settings))[1]
    refused = [(problem.key, problem.value, problem.rule) for problem in problems]
    keys = [key for key in flatten_settings(Config().model_dump(mode="json")) if key in found.settings]
    kept = [key for key in keys if not any(f"{problem.key}.".startswith(f"{key}.") for problem in problems)]
    text = yaml.safe_dump(
        nest_settings({key: found.settings[key] for key in kept}), sort_keys=False, allow_unicode=True
    )
    return text, refused


def describe(found: Imported, refused: Sequence[tuple[str, Any, str]]) -> str:
    """What a person should read before the YAML is used."""
    parts = {
        "taken over, but not quite the same": found.partial,
        "without a counterpart (docs/FROM_KOHYA.md says what is different about the others)": found.lost,
        "against the rules here": refused,
        "always so here, without a setting": found.always,
    }
    lines = []
    for title, entries in parts.items():
        if entries:
            lines += [f"{title}:", *(f"  {name} = {_shorten(value)}: {why}" for name, value, why in entries)]
    return "\n".join(lines)


def _shorten(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def main(arguments: Sequence[str] | None = None) -> int:
    """Import files; return the exit status (0 done, 2 wrong input)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, metavar="YAML", help="where to write (default: the console)")
    parser.add_argument("--ranks", type=int, help="processes there; accelerate's --num_processes by default")
    parser.add_argument("--samples", type=int, help="samples of an epoch (images x repeats), for epochs as steps")
    options = parser.parse_intermixed_args(arguments)  # files may stand after --out too
    try:
        _import_files(options)
    except UserInputError as error:
        sys.stderr.write(f"\n{error}\n\n")
        return 2
    return 0


def _import_files(options: argparse.Namespace) -> None:
    """Do what the command line asks for.

    Raises:
        UserInputError: a file cannot be read or written.
    """
    sources = read_files(options.files)
    told = {"num_processes": options.ranks, "num_samples": options.samples}
    sources.options |= {name: value for name, value in told.items() if value}
    found = convert(sources)
    text, refused = build_yaml(found)
    remarks = describe(found, refused)
    title = f"Imported from {', '.join(map(str, options.files))}"
    page = "".join(f"# {line}\n" for line in [title, *remarks.splitlines()]) + f"\n{text}"
    if options.out is None:
        sys.stdout.write(page)
        return
    try:
        options.out.write_text(page, encoding="utf-8")
    except OSError as error:
        rule = f"cannot be written: {error.strerror}"
        raise UserInputError([Problem("--out", options.out, rule, "give a path that can be written to")]) from None
    closing = f"wrote {options.out}; read it, then: bash launch/doctor.sh --cfg {shlex.quote(str(options.out))}"
    sys.stderr.write(f"{remarks}\n{closing}\n" if remarks else f"{closing}\n")


if __name__ == "__main__":
    sys.exit(main())
