"""Makes a YAML file of what kohya's scripts, or the first sdxl-trainer, were started with:

python -m sdxl_trainer.configs.import_config train.toml dataset.toml --out my.yaml

FILEs are TOML files of training arguments or of data sets, a file that holds the command line, and the Python file of
the first sdxl-trainer; a later one wins. What has no counterpart is named with its reason, and stands in the YAML too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdxl_trainer.configs.kohya.options import KOHYA_DEFAULTS, KOHYA_OPTIONS, Option
from sdxl_trainer.configs.kohya.readers import (
    flatten_sections,
    is_dataset_config,
    read_command,
    read_python,
    read_toml,
)
from sdxl_trainer.configs.kohya.seed_options import SEED_DEFAULTS, SEED_OPTIONS
from sdxl_trainer.configs.kohya.subsets import list_places, list_repeated_folders, read_datasets
from sdxl_trainer.configs.kohya.values import Given, NoCounterpart
from sdxl_trainer.configs.schema import Config

Remark = tuple[str, Any, str]  # option, value, why
OF_DATA_SETS = ("train_data_dir", "reg_data_dir", "in_json")  # which such files say themselves
ON_BY_DEFAULT = ("train_nnet",)  # whose False says something
FOLLOWED = ("config_file", "dataset_config")  # name further files
RENAMED = {name: ours for name, ours in SEED_OPTIONS.items() if isinstance(ours, str)}
NO_FOLDER = (
    "is no folder on this machine, so its `N_name` folders could not be read: taken as one folder, without weights; "
    "import where it is, or list them in data.image_dirs, with their N in data.source_weights"
)
NO_SUBFOLDERS = "has no `N_name` folders, where kohya's scripts look for images: taken as one, without weights"
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
    defaults = flatten_settings(Config().model_dump(mode="json"))
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


def flatten_settings(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted key; mappings that are settings themselves stay whole."""
    whole = ("optim.kwargs", "engine.deepspeed", "data.caption.replacements")
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = prefix + name
        flat |= flatten_settings(value, f"{key}.") if isinstance(value, dict) and key not in whole else {key: value}
    return flat


def nest_settings(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree
