"""Conversion of files of kohya's scripts, or of the first sdxl-trainer, to settings and remarks.

Files are TOML files of training arguments or datasets, files with a command line, the JSON file of kohya_ss, and the
Python file of the first sdxl-trainer. Later files override earlier ones. Every option that is not imported exactly is
reported with the reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sdxl_trainer.configs.kohya.entries import Option
from sdxl_trainer.configs.kohya.first_trainer import FIRST_TRAINER_DEFAULTS, FIRST_TRAINER_OPTIONS
from sdxl_trainer.configs.kohya.gui_file import convert_gui, is_gui_file
from sdxl_trainer.configs.kohya.options import KOHYA_DEFAULTS, KOHYA_OPTIONS
from sdxl_trainer.configs.kohya.python_file import read_python
from sdxl_trainer.configs.kohya.readers import (
    check_dataset_tables,
    flatten_sections,
    is_dataset_config,
    read_command,
    read_json,
    read_toml,
)
from sdxl_trainer.configs.kohya.subsets import (
    Remark,
    count_samples,
    list_repeated_folders,
    read_datasets,
)
from sdxl_trainer.configs.kohya.values import Given, UnsupportedError
from sdxl_trainer.configs.paths import expand_path
from sdxl_trainer.configs.problems import Problem, UserInputError, raise_if_any
from sdxl_trainer.configs.schema import Config

# Options that have no effect together with a dataset file.
SOURCE_OPTIONS = ("train_data_dir", "reg_data_dir", "in_json")
# Options that are on by default, so that False is not the same as leaving them out.
ON_BY_DEFAULT = ("train_nnet", "arb")
# Options that name further files to read.
FILE_OPTIONS = ("config_file", "dataset_config")
# Setting of the first sdxl-trainer → the same option of kohya's scripts.
KOHYA_NAMES = {name: option for name, option in FIRST_TRAINER_OPTIONS.items() if isinstance(option, str)}
NO_FOLDER = (
    "is not a folder on this machine, so its `N_name` folders cannot be listed: images outside of these, which kohya's "
    "scripts do not read, are trained too"
)
NO_SUBFOLDERS = "has no `N_name` folders, where kohya's scripts search for images; used as one folder"
SECRETS = ("wandb_api_key", "wandb_token", "huggingface_token")
# What converting a wrong value raises; the last two for a text with deep nesting.
WRONG_VALUE_ERRORS = (
    TypeError,
    ValueError,
    SyntaxError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
    MemoryError,
)


@dataclass
class Imported:
    """Imported settings by dotted key, and remarks on the options that are not imported exactly."""

    settings: dict[str, Any] = field(default_factory=dict)
    unsupported: list[Remark] = field(default_factory=list)  # no setting here
    changed: list[Remark] = field(default_factory=list)  # imported, but not exactly the same
    built_in: list[Remark] = field(default_factory=list)  # always on here, without a setting
    defaults: list[Remark] = field(default_factory=list)  # not in the files, and written because they differ from here


@dataclass
class FileContents:
    """Contents of the files before conversion."""

    options: dict[str, Any] = field(default_factory=dict)
    datasets: list[dict[str, Any]] = field(default_factory=list)  # tables of dataset files
    unsupported: list[Remark] = field(default_factory=list)
    is_first_trainer: bool = False  # settings of the first sdxl-trainer, not of kohya's scripts

    def add(self, other: "FileContents") -> None:
        """Add the contents of another file, whose options override those here."""
        self.options |= other.options
        self.datasets += other.datasets
        self.unsupported += other.unsupported


def read_files(files: Sequence[Path], known: frozenset[Path] = frozenset()) -> FileContents:
    """Read files, and the files that they name.

    Args:
        known: files that are skipped when another file names them, because they are read separately.

    Raises:
        UserInputError: a file cannot be read.
    """
    contents = FileContents()
    known |= {file.resolve() for file in files}
    for file in dict.fromkeys(files):
        if file.suffix == ".py":
            python = read_python(file)
            values = {KOHYA_NAMES.get(name, name): value for name, value in python.values.items()}
            # None stands for full precision there, and not for a default.
            if "mixed_precision" in values:
                values["mixed_precision"] = values["mixed_precision"] or "no"
            contents.options |= values
            contents.unsupported += [Remark(name, text, _explain_python(name)) for name, text in python.sources.items()]
            contents.is_first_trainer = True
            continue
        tables = read_toml(file) if file.suffix == ".toml" else _read_gui(file) if file.suffix == ".json" else {}
        if is_dataset_config(tables):
            raise_if_any(check_dataset_tables(file, tables))
            contents.datasets.append(tables)
            continue
        options = flatten_sections(tables) if file.suffix in (".toml", ".json") else read_command(file)
        for name in FILE_OPTIONS:
            if name in options and (named := _locate(str(options.pop(name)), file)).resolve() not in known:
                contents.add(read_files([named], known))
        contents.options |= options
    return contents


def convert(contents: FileContents) -> Imported:
    """Convert all options, in the order of the table."""
    imported = Imported(unsupported=list(contents.unsupported))
    given = dict(contents.options)
    for tables in contents.datasets:
        dataset = read_datasets(tables, contents.options)
        given |= dataset.options
        imported.settings |= dataset.settings
        imported.changed += dataset.remarks
    given = {name: value for name, value in given.items() if name in ON_BY_DEFAULT or not _is_unset(value)}
    if imported.settings:
        reason = "has no effect with a dataset file, as in kohya's scripts"
        imported.unsupported += [Remark(name, given.pop(name), reason) for name in SOURCE_OPTIONS if name in given]
    if "train_data_dir" in given and "in_json" not in given:
        _convert_repeated_folders(given, imported)
    own = {name: option for name, option in FIRST_TRAINER_OPTIONS.items() if isinstance(option, Option)}
    table = KOHYA_OPTIONS | (own if contents.is_first_trainer else {})
    given_or_default = (FIRST_TRAINER_DEFAULTS if contents.is_first_trainer else KOHYA_DEFAULTS) | given
    defaults = flatten_settings(Config().model_dump(mode="json"))
    for name, option in table.items():
        if name in given:
            _convert_option(name, option, given_or_default, imported)
        elif name in given_or_default:
            _convert_default(name, option, given_or_default, imported, defaults)
    unknown = [name for name in given if name not in (*table, "num_samples")]
    imported.unsupported += [Remark(name, given[name], _explain_unknown(name, table)) for name in unknown]
    # Latents are kept apart from the images. Those that other programs wrote beside the images are found, too.
    imported.settings.setdefault("cache.dir", f"latents/{imported.settings.get('run.name', 'run')}")
    hidden = [remark._replace(value="...") if remark.option in SECRETS else remark for remark in imported.unsupported]
    return replace(imported, unsupported=hidden)


def _convert_repeated_folders(given: dict[str, Any], imported: Imported) -> None:
    """Convert `train_data_dir` to its `N_name` folders, and remove it from the options if there are any."""
    folder = _expand(str(given["train_data_dir"]))
    subsets = list_repeated_folders(folder)
    imported.settings["data.kohya_folders"] = True  # repeats, and captions of images without one
    if subsets:
        imported.settings["data.image_dirs"] = [subset["image_dir"] for subset in subsets]
        del given["train_data_dir"]
        reg_folder = _expand(str(given["reg_data_dir"])) if "reg_data_dir" in given else None
        reg = [] if reg_folder is None else [{"image_dir": str(reg_folder), "is_reg": True}]
        if num_samples := count_samples([*subsets, *reg]):
            given.setdefault("num_samples", num_samples)
    else:
        reason = NO_SUBFOLDERS if folder.is_dir() else NO_FOLDER
        imported.changed.append(Remark("train_data_dir", str(folder), reason))


def _convert_default(name: str, option: Option, given: Given, imported: Imported, defaults: Mapping[str, Any]) -> None:
    """Convert the default of an option that is not set, where it differs from the defaults here."""
    by_default = Imported()
    _convert_option(name, option, given, by_default)
    found = {key: value for key, value in by_default.settings.items() if value != defaults[key]}
    if found:
        imported.settings |= found
        imported.changed += by_default.changed
        written = _shorten(", ".join(f"{key}: {value}" for key, value in found.items()))
        imported.defaults.append(Remark(name, given[name], written))


def _convert_option(name: str, option: Option, given: Given, imported: Imported) -> None:
    value = given[name]
    if option.is_built_in:
        imported.built_in.append(Remark(name, value, option.note))
        return
    if not option.keys:
        if value:  # a strength of 0 has no effect
            imported.unsupported.append(Remark(name, value, option.note))
        return
    try:
        converted = option.convert(value, given) if option.convert else value
    except UnsupportedError as error:
        imported.settings |= error.settings
        (imported.changed if error.settings else imported.unsupported).append(Remark(name, value, str(error)))
        return
    except WRONG_VALUE_ERRORS as error:
        imported.unsupported.append(Remark(name, value, f"cannot be read: {error}"))
        return
    if converted is None:
        return
    if option.difference and value:
        imported.changed.append(Remark(name, value, option.difference))
    imported.settings |= converted if isinstance(converted, dict) else {option.keys[0]: converted}


def _read_gui(file: Path) -> dict[str, Any]:
    """Return the options that a settings file of kohya_ss gives kohya's scripts.

    Raises:
        UserInputError: the file is not one, or cannot be read.
    """
    fields = read_json(file)
    try:
        options = convert_gui(fields) if is_gui_file(fields) else {}
    except WRONG_VALUE_ERRORS as error:
        rule, cure = f"holds a value that kohya_ss does not write: {error}", "correct it"
        raise UserInputError([Problem("FILE", file, rule, cure)]) from None
    if not options:
        rule = "does not hold the settings of kohya_ss"
        cure = "give the file that its button `Save` writes; metadata of images belong into data.metadata"
        raise UserInputError([Problem("FILE", file, rule, cure)])
    return options


def _explain_unknown(name: str, table: Mapping[str, Option]) -> str:
    near = get_close_matches(name, list(table), n=1, cutoff=0.75)
    return f"is not a known option; did you mean {near[0]}?" if near else "is not a known option"


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _explain_python(name: str) -> str:
    option = FIRST_TRAINER_OPTIONS.get(name)
    if isinstance(option, Option) and not option.keys:
        return option.note
    return "is not a plain value, and the file is not executed; write the setting by hand"


def _is_unset(value: Any) -> bool:
    return value is None or value is False or value in ("", "None", "none") or value in ([], {})


def _locate(name: str, file: Path) -> Path:
    """Return the path of a file that another file names, relative to the working directory or to that file."""
    path = _expand(name)
    candidates = [path, file.parent / path, path.with_suffix(".toml"), file.parent / path.with_suffix(".toml")]
    return next((candidate for candidate in candidates if candidate.is_file()), path)


def _expand(name: str) -> Path:
    """Return a path with its variables replaced, or as it is written if that cannot be done on this machine."""
    try:
        return Path(expand_path(name))
    except ValueError:
        return Path(name)


def flatten_settings(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key, without flattening the values of settings that are mappings."""
    mappings = ("optim.kwargs", "engine.deepspeed", "data.caption.replacements")
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = prefix + name
        is_section = isinstance(value, dict) and key not in mappings
        flat |= flatten_settings(value, f"{key}.") if is_section else {key: value}
    return flat


def nest_settings(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted key as nested dicts."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree
