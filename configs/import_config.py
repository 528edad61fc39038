"""Convert settings of other trainers: `python -m sdxl_trainer.configs.import_config train.toml --out my.yaml`."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sdxl_trainer.configs.kohya.contents import read_files
from sdxl_trainer.configs.kohya.fit import fit_settings
from sdxl_trainer.configs.kohya.importer import convert, nest_settings
from sdxl_trainer.configs.kohya.report import format_report
from sdxl_trainer.configs.language.arguments import TranslatedParser
from sdxl_trainer.configs.language.translate import translate
from sdxl_trainer.configs.load import build_config
from sdxl_trainer.configs.paths import parse_path
from sdxl_trainer.configs.problems import Problem, UserInputError, parse_count
from sdxl_trainer.configs.yaml_file import dump_yaml


def main(arguments: Sequence[str] | None = None) -> int:
    """Import files and return the exit status (0 done, 2 wrong input)."""
    parser = TranslatedParser(
        prog="python -m sdxl_trainer.configs.import_config",
        description="Convert settings of kohya's scripts, kohya_ss or the first sdxl-trainer to YAML for this trainer. "
        "It names each option that has no counterpart here, and why.",
        examples=[
            "%(prog)s train.toml dataset.toml --out my.yaml",
            "%(prog)s train.sh --out my.yaml",
            "%(prog)s config.py --out my.yaml",
        ],
        epilog="Every option and the setting for it: docs/FROM_KOHYA.md.",
    )
    files_help = (
        "TOML file, script with the command line, JSON file of kohya_ss, or Python file of the first sdxl-trainer; "
        "later files override"
    )
    parser.add_argument("files", nargs="+", type=parse_path, metavar="FILE", help=files_help)
    parser.add_argument("--out", type=parse_path, metavar="YAML", help="file to write (default: standard output)")
    parser.add_argument(
        "--ranks", type=parse_count, help="number of GPUs of the run (default: accelerate's --num_processes)"
    )
    parser.add_argument(
        "--samples",
        type=parse_count,
        help="samples per epoch (images x repeats), for options that count epochs and have no such setting here",
    )
    # Intermixed, so that files can follow options.
    options = parser.parse_intermixed_args(arguments)
    try:
        _import_files(options)
    except UserInputError as error:
        sys.stderr.write(f"\n{error.format()}\n\n")
        return 2
    return 0


def list_problems(settings: dict[str, Any]) -> list[Problem]:
    """Return the problems of nested settings by the rules of the schema."""
    try:
        return build_config(settings)[1]
    except UserInputError as error:
        return error.problems


def _import_files(options: argparse.Namespace) -> None:
    """Import the files of the command line and write the YAML.

    Raises:
        UserInputError: a file or a value cannot be read, or the YAML cannot be written.
    """
    contents = read_files(options.files)
    given = {"num_processes": options.ranks, "num_samples": options.samples}
    arguments = {name: value for name, value in given.items() if value}
    contents = replace(contents, options=contents.options | arguments)
    imported = convert(contents)
    fitted = fit_settings(imported, list_problems)
    remarks = format_report(contents, imported, fitted)
    files = ", ".join(map(str, options.files))
    title = translate(f"Imported from {files}; docs/FROM_KOHYA.md lists differences without an option")
    text = "".join(f"# {line}\n" for line in f"{title}\n{remarks}".splitlines())
    text += f"\n{dump_yaml(nest_settings(fitted.settings))}"
    if options.out is None:
        sys.stdout.write(text)
        return
    try:
        options.out.write_text(text, encoding="utf-8")
    except OSError as error:
        rule = f"cannot be written: {error.strerror}"
        raise UserInputError([Problem("--out", options.out, rule, "choose a path that can be written")]) from None
    command = f"bash launch/doctor.sh --cfg {shlex.quote(str(options.out))}"
    closing = translate(f"wrote {options.out}; read it, then run: {command}")
    sys.stderr.write(f"{remarks}\n{closing}\n")


if __name__ == "__main__":
    sys.exit(main())
