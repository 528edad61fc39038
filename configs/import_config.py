"""Convert settings of other trainers: `python -m sdxl_trainer.configs.import_config train.toml --out my.yaml`."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sdxl_trainer.configs.kohya.importer import Imported, convert, flatten_settings, nest_settings, read_files
from sdxl_trainer.configs.kohya.subsets import Remark
from sdxl_trainer.configs.language.arguments import TranslatedParser
from sdxl_trainer.configs.language.translate import translate
from sdxl_trainer.configs.load import build_config
from sdxl_trainer.configs.paths import parse_path
from sdxl_trainer.configs.problems import Problem, UserInputError, parse_count
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.configs.yaml_file import dump_yaml


class ImportedYaml(NamedTuple):
    """Imported settings as YAML, and remarks on the settings that break a rule of the schema."""

    text: str
    rejected: list[Remark]


def build_yaml(imported: Imported) -> ImportedYaml:
    """Return imported settings as YAML.

    A setting that breaks a rule of its own is left out. If the settings break a rule of a whole section, they are kept,
    to be corrected by hand. Paths with a variable that is not set here are kept, too.
    """
    problems = build_config(nest_settings(imported.settings))[1]
    rejected = [Remark(problem.key, problem.value, problem.rule) for problem in problems]
    keys = [key for key in flatten_settings(Config().model_dump(mode="json")) if key in imported.settings]
    wrong = [problem.key for problem in problems if "$" not in str(problem.value)]
    kept = [key for key in keys if not any(f"{name}.".startswith(f"{key}.") for name in wrong)]
    settings = nest_settings({key: imported.settings[key] for key in kept})
    return ImportedYaml(dump_yaml(settings), rejected)


def format_remarks(imported: Imported, rejected: Sequence[Remark]) -> str:
    """Return the remarks to read before the YAML is used, as one text; empty if there are none."""
    parts = {
        "not in your files, so the defaults of that program are written": imported.defaults,
        "imported, but not exactly the same": imported.changed,
        "not imported (docs/FROM_KOHYA.md describes further differences)": imported.unsupported,
        "rejected by the rules of the settings here": rejected,
        "always on here, without a setting": imported.built_in,
    }
    lines = []
    for title, remarks in parts.items():
        if remarks:
            lines.append(f"{translate(title)}:")
            lines += [f"  {remark.option} = {_shorten(remark.value)}: {translate(remark.reason)}" for remark in remarks]
    return "\n".join(lines)


def _shorten(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


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


def _import_files(options: argparse.Namespace) -> None:
    """Import the files of the command line and write the YAML.

    Raises:
        UserInputError: a file cannot be read or written.
    """
    contents = read_files(options.files)
    given = {"num_processes": options.ranks, "num_samples": options.samples}
    arguments = {name: value for name, value in given.items() if value}
    imported = convert(replace(contents, options=contents.options | arguments))
    result = build_yaml(imported)
    remarks = format_remarks(imported, result.rejected)
    files = ", ".join(map(str, options.files))
    title = translate(f"Imported from {files}; docs/FROM_KOHYA.md lists differences without an option")
    text = "".join(f"# {line}\n" for line in f"{title}\n{remarks}".splitlines()) + f"\n{result.text}"
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
    sys.stderr.write(f"{remarks}\n{closing}\n" if remarks else f"{closing}\n")


if __name__ == "__main__":
    sys.exit(main())
