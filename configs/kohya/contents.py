"""Contents of imported files before conversion: their options, and every key with the option that it became."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdxl_trainer.configs.kohya.entries import Option
from sdxl_trainer.configs.kohya.first_trainer import FIRST_TRAINER_OPTIONS, SUCCESSOR, TRAINER_NAME, is_successor
from sdxl_trainer.configs.kohya.gui_file import (
    WORDS_FIELD,
    convert_gui,
    is_gui_file,
    list_known_fields,
    list_looked_for,
)
from sdxl_trainer.configs.kohya.python_file import read_python
from sdxl_trainer.configs.kohya.readers import (
    check_dataset_tables,
    flatten_sections,
    is_dataset_config,
    read_command,
    read_json,
    read_toml,
)
from sdxl_trainer.configs.kohya.subsets import TRAINING_NAMES, Remark, list_dataset_keys
from sdxl_trainer.configs.kohya.values import WrongValueError
from sdxl_trainer.configs.paths import expand_path
from sdxl_trainer.configs.problems import Problem, UserInputError, raise_if_any

DATASET_TABLES = ("general", "datasets")  # in this order: `datasets` marks such a file
# Options that name further files to read.
FILE_OPTIONS = ("config_file", "dataset_config")
# Setting of the first sdxl-trainer → the same option of kohya's scripts.
KOHYA_NAMES = {name: option for name, option in FIRST_TRAINER_OPTIONS.items() if isinstance(option, str)}
# Endings of files that can be imported, and what is looked for in a folder at most.
SUFFIXES = (".toml", ".json", ".py", ".sh", ".bat", ".cmd", ".ps1", ".txt")
MAX_LISTED, MAX_TRIED, MAX_TRIED_BYTES = 5, 200, 1_000_000


@dataclass(frozen=True)
class FileKey:
    """A key of a file, and what became of it.

    Attributes:
        name: as the file has it; an entry of a mapping stands behind a dot.
        option: the option of the table (kohya's name).
        note: why the key has no effect in its own program; empty if it has one.
    """

    file: Path
    name: str
    value: Any
    option: str = ""
    note: str = ""


@dataclass
class FileContents:
    """Contents of the files before conversion."""

    options: dict[str, Any] = field(default_factory=dict)
    datasets: list[dict[str, Any]] = field(default_factory=list)  # tables of dataset files
    unsupported: list[Remark] = field(default_factory=list)
    keys: list[FileKey] = field(default_factory=list)  # every key of the files, in their order
    is_first_trainer: bool = False  # settings of the first sdxl-trainer, not of kohya's scripts

    @property
    def trainer(self) -> str:
        """The name of the program that the files are of."""
        if not self.is_first_trainer:
            return "kohya's scripts"
        return SUCCESSOR if is_successor(self.options) else TRAINER_NAME

    @property
    def names(self) -> dict[str, str]:
        """Option → the keys that set it, as the files name them, without the entries of mappings."""
        found: dict[str, list[str]] = {}
        for key in self.keys:
            is_entry = "." in key.name and not key.name.startswith(WORDS_FIELD)
            if key.option and not key.note and not is_unset(key.value) and not is_entry and key.name != WORDS_FIELD:
                found.setdefault(key.option, []).append(key.name)
        return {option: ", ".join(dict.fromkeys(names)) for option, names in found.items()}

    def add(self, other: "FileContents") -> None:
        """Add the contents of another file, whose options override those here."""
        self.override(other.options, ", ".join(dict.fromkeys(key.file.name for key in other.keys)))
        self.options |= other.options
        self.datasets += other.datasets
        self.unsupported += other.unsupported
        self.keys += other.keys
        self.is_first_trainer |= other.is_first_trainer

    def override(self, options: Mapping[str, Any], by: str) -> None:
        """Note that options override the keys here that set the same ones."""
        note = f"is overridden by {by}"
        self.keys = [
            replace(key, note=note) if key.option in options and not key.note and not is_unset(key.value) else key
            for key in self.keys
        ]


def is_unset(value: Any) -> bool:
    """Return whether a value stands for an option that is not set."""
    return value is None or value is False or value in ("", "None", "none") or value in ([], {})


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
        own = read_file(file)
        for name in FILE_OPTIONS:
            value = own.options.pop(name, None)
            if not is_unset(value) and (named := _locate(str(value), file)).resolve() not in known:
                contents.add(read_files([named], known))
        contents.add(own)
    return contents


def read_file(file: Path) -> FileContents:
    """Read one file.

    Raises:
        UserInputError: it cannot be read, or is a folder.
    """
    if file.is_dir():
        raise UserInputError([_describe_folder(file)])
    suffix = file.suffix.lower()
    if suffix == ".py":
        return _read_python(file)
    if suffix in (".json", ".toml"):
        tables = read_json(file) if suffix == ".json" else read_toml(file)
        datasets = {name: tables.pop(name) for name in DATASET_TABLES if name in tables and is_dataset_config(tables)}
        contents = _read_gui(file, tables) if suffix == ".json" and not datasets else _list_options(file, tables)
        if datasets:
            raise_if_any(check_dataset_tables(file, datasets))
            contents.datasets.append(datasets)
            contents.keys += [
                FileKey(file, name, value, TRAINING_NAMES.get(name, name))
                for name, value in list_dataset_keys(datasets).items()
            ]
        return contents
    command = read_command(file)
    contents = _list_options(file, command.options)
    note = "belongs to accelerate; it does not change the training"
    contents.keys += [FileKey(file, name, value, note=note) for name, value in command.launcher.items()]
    return contents


def _list_options(file: Path, tables: dict[str, Any]) -> FileContents:
    """Return contents whose keys are kohya's options, in sections or not."""
    options = flatten_sections(tables)
    return FileContents(options=options, keys=[FileKey(file, name, value, name) for name, value in options.items()])


def _read_python(file: Path) -> FileContents:
    """Read settings of the first sdxl-trainer. Of two names of one setting, the last that has a value counts."""
    python = read_python(file)
    contents = FileContents(is_first_trainer=True)
    for name, value in python.values.items():
        option = KOHYA_NAMES.get(name, name)
        if name == "mixed_precision":
            value = value or "no"  # None stands for full precision there, and not for a default
        if is_unset(contents.options.get(option)) or not is_unset(value):
            contents.override({option: value}, name)
            contents.options[option] = value
        contents.keys.append(FileKey(file, name, value, option))
        contents.keys += [FileKey(file, f"{name}.{entry}", item, option) for entry, item in _list_entries(value)]
    contents.unsupported = [Remark(name, text, _explain_python(name)) for name, text in python.sources.items()]
    contents.keys += [FileKey(file, name, text, name) for name, text in python.sources.items()]
    return contents


def _list_entries(value: Any) -> list[tuple[str, Any]]:
    """Return the entries of a mapping, or of the mappings in a list, each name once."""
    entries: dict[str, Any] = {}
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict):
            entries = {str(name): entry for name, entry in item.items()} | entries
    return list(entries.items())


def _read_gui(file: Path, fields: dict[str, Any]) -> FileContents:
    """Read the settings of kohya_ss.

    Raises:
        UserInputError: they are none, or a value cannot be read.
    """
    if not is_gui_file(fields):
        found = ", ".join(list_known_fields(fields)) or "none of them"
        rule = (
            f"does not hold the settings of kohya_ss: at least two keys such as {list_looked_for()} are looked for; "
            f"found: {found}"
        )
        cure = "give the file that its button `Save` writes; metadata of images belong into data.metadata"
        raise UserInputError([Problem("FILE", file, rule, cure)])
    try:
        settings = convert_gui(fields)
    except WrongValueError as error:
        name = str(error)
        rule = f"is not a number, as kohya_ss writes it ({file})"
        raise UserInputError([Problem(name, fields[name], rule, "correct it in that file")]) from None
    keys = [FileKey(file, source.field, source.value, source.option, source.note) for source in settings.sources]
    return FileContents(options=settings.options, keys=keys)


def _explain_python(name: str) -> str:
    option = FIRST_TRAINER_OPTIONS.get(name)
    if isinstance(option, Option) and not option.keys:
        return option.note
    return "is not a plain value, and the file is not executed; write the setting by hand"


def _describe_folder(folder: Path) -> Problem:
    """Return the problem of a folder that was given as a file, with files in it that can be imported."""
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    except OSError:
        files = []
    names = ", ".join(str(file) for file in _choose_importable(files[:MAX_TRIED]))
    looked_for = f"none of its files can be imported; {', '.join(SUFFIXES)} files are looked for"
    return Problem("FILE", folder, "is a folder", f"give one of its files: {names}" if names else looked_for)


def _choose_importable(files: Iterable[Path]) -> list[Path]:
    """Return the first files that can be imported."""
    chosen: list[Path] = []
    for file in files:
        if len(chosen) == MAX_LISTED:
            break
        try:
            if file.stat().st_size <= MAX_TRIED_BYTES and (read := read_file(file)) and (read.options or read.datasets):
                chosen.append(file)
        except (UserInputError, OSError):
            continue
    return chosen


def _locate(name: str, file: Path) -> Path:
    """Return the path of a file that another file names, relative to the working directory or to that file."""
    path = expand_or_keep(name)
    folders = [Path(), file.parent]
    candidates = [folder / f"{path}{ending}" for ending in ("", ".toml") for folder in folders]
    return next((candidate for candidate in candidates if candidate.is_file()), path)


def expand_or_keep(name: str) -> Path:
    """Return a path with its variables replaced, or as it is written if that cannot be done on this machine."""
    try:
        return Path(expand_path(name))
    except ValueError:
        return Path(name)
