"""Makes a YAML file of what kohya's scripts, or the first sdxl-trainer, were started with:

python -m sdxl_trainer.configs.import_config train.toml dataset.toml --out my.yaml

FILEs are TOML files of training arguments or of data sets, a file that holds the command line, and the Python file of
the first sdxl-trainer; a later one wins. What has no counterpart is named with its reason, and stands in the YAML too.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sdxl_trainer.configs.kohya_data import list_places, list_repeated_folders, read_datasets
from sdxl_trainer.configs.kohya_files import (
    flatten_sections,
    is_dataset_config,
    read_command,
    read_python,
    read_toml,
)
from sdxl_trainer.configs.kohya_options import KOHYA_DEFAULTS, KOHYA_OPTIONS, Option
from sdxl_trainer.configs.kohya_values import Given, NoCounterpart
from sdxl_trainer.configs.load import build_config
from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.configs.seed_options import SEED_DEFAULTS, SEED_OPTIONS

Remark = tuple[str, Any, str]  # option, value, why
OF_DATA_SETS = ("train_data_dir", "reg_data_dir", "in_json")  # which such files say themselves
ON_BY_DEFAULT = ("train_nnet",)  # whose False says something
FOLLOWED = ("config_file", "dataset_config")  # name further files
RENAMED = {name: ours for name, ours in SEED_OPTIONS.items() if isinstance(ours, str)}
NO_FOLDER = (
    "is no folder on this machine, so its `N_name` folders could not be read: taken as one folder, without weights; "
    "import where it is, or list them in data.image_dirs, with their N in data.weights"
)
NO_SUBFOLDERS = "has no `N_name` folders, where kohya's scripts look for pictures: taken as one, without weights"
SECRETS = ("wandb_api_key", "wandb_token", "huggingface_token")


@dataclass
class Imported:
    """What became of the options: settings by dotted key, and what is to be said of the others."""

    settings: dict[str, Any] = field(default_factory=dict)
    lost: list[Remark] = field(default_factory=list)  # without a counterpart
    partial: list[Remark] = field(default_factory=list)  # taken over, but not quite the same
    always: list[Remark] = field(default_factory=list)  # so without being set


@dataclass
class Sources:
    """What files say, before it is converted."""

    options: dict[str, Any] = field(default_factory=dict)
    datasets: list[dict[str, Any]] = field(default_factory=list)  # tables of dataset files
    lost: list[Remark] = field(default_factory=list)
    is_seed: bool = False

    def add(self, other: "Sources") -> None:
        """Take up what another file says, which wins."""
        self.options |= other.options
        self.datasets += other.datasets
        self.lost += other.lost


def read_files(files: Sequence[Path], known: frozenset[Path] = frozenset()) -> Sources:
    """All that the files say, and those that they name, but those `known`, which are read elsewhere.

    Raises:
        UserInputError: one cannot be read.
    """
    found = Sources()
    known |= {file.resolve() for file in files}
    for file in dict.fromkeys(files):
        if file.suffix == ".py":
            options, others = read_python(file)
            found.options |= {RENAMED.get(name, name): value for name, value in options.items()}
            found.lost += [(name, text, _explain_python(name)) for name, text in others.items()]
            found.is_seed = True
            continue
        tables = read_toml(file) if file.suffix == ".toml" else {}
        if is_dataset_config(tables):
            found.datasets.append(tables)
            continue
        options = flatten_sections(tables) if file.suffix == ".toml" else read_command(file)
        for name in FOLLOWED:
            if name in options and (named := _locate(str(options.pop(name)), file)).resolve() not in known:
                found.add(read_files([named], known))
        found.options |= options
    return found


def convert(sources: Sources) -> Imported:
    """Settings of all options, in the order of the table."""
    found = Imported(lost=list(sources.lost))
    given = dict(sources.options)
    for tables in sources.datasets:
        options, places, remarks = read_datasets(tables, sources.options)
        given |= options
        found.settings |= places
        found.partial += remarks
    given = {name: value for name, value in given.items() if name in ON_BY_DEFAULT or not _is_unset(value)}
    if found.settings:
        why = "has no effect beside a file of data sets, in kohya's scripts either"
        found.lost += [(name, given.pop(name), why) for name in OF_DATA_SETS if name in given]
    if "train_data_dir" in given and "in_json" not in given:
        folder = Path(str(given["train_data_dir"]))
        subsets = list_repeated_folders(folder)
        found.settings |= list_places(subsets)[0]
        if subsets:
            del given["train_data_dir"]
        else:
            found.partial.append(("train_data_dir", str(folder), NO_SUBFOLDERS if folder.is_dir() else NO_FOLDER))
    own = {name: option for name, option in SEED_OPTIONS.items() if isinstance(option, Option)}
    table = KOHYA_OPTIONS | (own if sources.is_seed else {})
    known = (SEED_DEFAULTS if sources.is_seed else KOHYA_DEFAULTS) | given
    defaults = _flatten(Config().model_dump(mode="json"))
    for name, option in table.items():
        if name in given:
            _convert_option(name, option, known, found)
        elif name in known:
            guessed = Imported()
            _convert_option(name, option, known, guessed)
            found.settings |= {key: value for key, value in guessed.settings.items() if value != defaults[key]}
    found.lost += [(name, given[name], "is not known") for name in given if name not in (*table, "num_samples")]
    found.lost = [(name, "..." if name in SECRETS else value, why) for name, value, why in found.lost]
    return found


def build_yaml(found: Imported) -> tuple[str, list[tuple[str, Any, str]]]:
    """The YAML of what was imported, and what of it is against the settings' rules (key, value, why). Single keys among
    that are left out; of rules for a whole section the keys stay, to be mended by hand."""
    problems = build_config(_nest(found.settings))[1]
    refused = [(problem.key, problem.value, problem.rule) for problem in problems]
    keys = [key for key in _flatten(Config().model_dump(mode="json")) if key in found.settings]
    kept = [key for key in keys if not any(f"{problem.key}.".startswith(f"{key}.") for problem in problems)]
    text = yaml.safe_dump(_nest({key: found.settings[key] for key in kept}), sort_keys=False, allow_unicode=True)
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


def _convert_option(name: str, option: Option, given: Given, found: Imported) -> None:
    value = given[name]
    if option.is_always:
        found.always.append((name, value, option.note))
        return
    if not option.keys:
        found.lost += [(name, value, option.note)] if value else []  # a strength of 0 is none
        return
    try:
        made = option.convert(value, given) if option.convert else value
    except NoCounterpart as error:
        found.settings |= error.settings
        (found.partial if error.settings else found.lost).append((name, value, str(error)))
        return
    except (TypeError, ValueError, SyntaxError) as error:
        found.lost.append((name, value, f"cannot be understood: {error}"))
        return
    if made is None:
        return
    found.settings |= made if isinstance(made, dict) else {option.keys[0]: made}


def _explain_python(name: str) -> str:
    option = SEED_OPTIONS.get(name)
    if isinstance(option, Option) and not option.keys:
        return option.note
    return "is not a plain value, and nothing is run to find it; write it by hand"


def _is_unset(value: Any) -> bool:
    return value is None or value is False or value in ("", "None", "none") or value in ([], {})


def _locate(name: str, file: Path) -> Path:
    """A file that another one names: relative to the working directory, or to that file."""
    path = Path(name)
    candidates = [path, file.parent / path, path.with_suffix(".toml"), file.parent / path.with_suffix(".toml")]
    return next((candidate for candidate in candidates if candidate.is_file()), path)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted key; mappings that are settings themselves stay whole."""
    whole = ("optim.kwargs", "engine.deepspeed", "data.caption.replacements")
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = prefix + name
        flat |= _flatten(value, f"{key}.") if isinstance(value, dict) and key not in whole else {key: value}
    return flat


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _shorten(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def main(arguments: Sequence[str] | None = None) -> int:
    """Import files; return the exit status (0 done, 2 wrong input)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, metavar="YAML", help="where to write (default: the console)")
    parser.add_argument("--ranks", type=int, help="processes there; accelerate's --num_processes by default")
    parser.add_argument("--samples", type=int, help="samples of an epoch (pictures x repeats), for epochs as steps")
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
