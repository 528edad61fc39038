"""Conversion of files of kohya's scripts, or of the first sdxl-trainer, to settings and remarks.

Files are TOML files of training arguments or datasets, files with a command line, the JSON file of kohya_ss, and the
Python file of the first sdxl-trainer. Later files override earlier ones. Every option that is not imported exactly is
reported with the reason.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from sdxl_trainer.configs.kohya.contents import FileContents, expand_or_keep, is_unset
from sdxl_trainer.configs.kohya.entries import WHOLE, Option
from sdxl_trainer.configs.kohya.first_trainer import FIRST_TRAINER_DEFAULTS, FIRST_TRAINER_OPTIONS
from sdxl_trainer.configs.kohya.options import KOHYA_DEFAULTS, KOHYA_OPTIONS
from sdxl_trainer.configs.kohya.subsets import (
    Remark,
    count_samples,
    has_images,
    list_repeated_folders,
    read_datasets,
)
from sdxl_trainer.configs.kohya.values import Given, NoEffectError, UnsupportedError, WrongValueError
from sdxl_trainer.configs.paths import REPEATS_PREFIX
from sdxl_trainer.configs.problems import Problem, format_value, raise_if_any
from sdxl_trainer.configs.schema import Config

# Options that have no effect together with a dataset file.
SOURCE_OPTIONS = ("train_data_dir", "reg_data_dir", "in_json")
# Setting of a dataset file's sources → the option of its subsets that gives it, unless that is image_dir.
SOURCE_NAMES = {"data.metadata": "metadata_file", "data.source_weights": "num_repeats"}
# Options for cached outputs of the text encoders, and the settings that they cannot be combined with.
TEXT_OPTIONS = ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk")
NOT_CACHED = (
    *("optim.text_encoder_lr", "optim.text_encoder_2_lr", "data.caption.shuffle", "data.caption.wildcards"),
    *("data.caption.tag_dropout_rate", "data.caption.token_warmup_steps"),
)
ABSOLUTE = ("/", "~", "$")  # first letters of paths that do not depend on the working directory
# Options that are on by default, so that False is not the same as leaving them out.
ON_BY_DEFAULT = ("train_nnet", "arb")
NO_FOLDER = (
    "is not a folder on this machine, so its `N_name` folders cannot be listed: images outside of these, which kohya's "
    "scripts do not read, are trained too"
)
NO_SUBFOLDERS = "has no `N_name` folders, where kohya's scripts search for images; used as one folder"
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
    origins: dict[str, str] = field(default_factory=dict)  # setting → the option that it comes from
    values: dict[str, Any] = field(default_factory=dict)  # option → value, defaults of that program included
    other_training: list[Remark] = field(default_factory=list)  # what is imported trains something else
    unsupported: list[Remark] = field(default_factory=list)  # no setting here
    unknown: list[Remark] = field(default_factory=list)  # no option of that program
    changed: list[Remark] = field(default_factory=list)  # imported, but not exactly the same
    built_in: list[Remark] = field(default_factory=list)  # always on here, without a setting
    without_effect: list[Remark] = field(default_factory=list)  # that program ignores them too
    defaults: list[Remark] = field(default_factory=list)  # not in the files, and written because they differ from here
    problems: list[Problem] = field(default_factory=list)  # values that cannot be read

    def set_all(self, settings: Mapping[str, Any], option: str) -> None:
        """Set the settings that an option becomes."""
        self.settings |= settings
        self.origins |= dict.fromkeys(settings, option)


def convert(contents: FileContents) -> Imported:
    """Convert all options, in the order of the table.

    Raises:
        UserInputError: values cannot be read.
    """
    imported = Imported(unsupported=list(contents.unsupported))
    own = {name: option for name, option in FIRST_TRAINER_OPTIONS.items() if isinstance(option, Option)}
    table = KOHYA_OPTIONS | (own if contents.is_first_trainer else {})
    defaults = FIRST_TRAINER_DEFAULTS if contents.is_first_trainer else KOHYA_DEFAULTS
    given = _collect_options(contents, imported, (*ON_BY_DEFAULT, *defaults))
    given_or_default = imported.values = defaults | given
    written_here = get_default_settings()
    for name, option in table.items():
        if name in given:
            _convert_option(name, option, given_or_default, imported)
        elif name in given_or_default:
            _convert_default(name, option, given_or_default, imported, written_here)
    imported.unknown = [
        Remark(
            name, value, _explain_unknown(name, [*table, *(FIRST_TRAINER_OPTIONS if contents.is_first_trainer else ())])
        )
        for name, value in given.items()
        if name not in (*table, "num_samples") and not is_unset(value)
    ]
    raise_if_any(_name_file(problem, contents) for problem in imported.problems)
    _leave_out_cached_text(imported)
    _remark_on_empty_folders(imported)
    _suggest_kohya_folders(imported)
    # Latents are kept apart from the images. Those that other programs wrote beside the images are found, too.
    runs = str(imported.settings.get("run.dir", ""))
    folder = Path(runs if runs.startswith(ABSOLUTE) else "")  # beside the runs, wherever a job is started
    imported.settings.setdefault("cache.dir", f"{folder / 'latents' / imported.settings.get('run.name', 'run')}")
    return imported


def _leave_out_cached_text(imported: Imported) -> None:
    """Remove `cache.text` beside settings that give a caption other encoder outputs in each step, and remark on it."""
    changing = [key for key in NOT_CACHED if imported.settings.get(key)]
    if not (changing and imported.settings.pop("cache.text", False)):
        return
    reason = (
        f"cannot be combined with {' and '.join(changing)}; captions are encoded in each step, and cache.text: true is "
        "for a run without these"
    )
    options = [name for name in TEXT_OPTIONS if imported.values.get(name)]
    imported.unsupported += [Remark(name, imported.values[name], reason) for name in options]


def _remark_on_empty_folders(imported: Imported) -> None:
    """Remark on folders of this machine that hold neither images nor latents."""
    if imported.settings.get("data.metadata"):
        return
    for name in imported.settings.get("data.image_dirs", ()):
        folder = expand_or_keep(str(name))
        if folder.is_dir() and not has_images(folder):
            option = imported.origins["data.image_dirs"]
            reason = f"WARNING: {folder} holds no images; check the path"  # a long value is shown in part
            imported.changed.append(Remark(option, folder.name, reason))


def _suggest_kohya_folders(imported: Imported) -> None:
    """Extend the remark on class tokens if the name of a folder can caption its images instead."""
    settings = imported.settings
    if settings.get("data.metadata") or settings.get("data.kohya_folders"):
        return
    names = [Path(str(folder)).name for folder in settings.get("data.image_dirs", ())]
    named = next((name for name in names if re.match(rf"{REPEATS_PREFIX}\s*\S", name)), None)
    if named is None:
        return
    number, _, caption = named.partition("_")
    hint = (
        f"; or set data.kohya_folders: true: then `{caption.strip()}` is the caption of such images in {named}, and "
        f"{number} multiplies their repeats, so divide data.source_weights by it"
    )
    imported.unsupported = [
        remark._replace(reason=f"{remark.reason}\n{hint}") if remark.option == "class_tokens" else remark
        for remark in imported.unsupported
    ]


def _collect_options(contents: FileContents, imported: Imported, kept: tuple[str, ...]) -> dict[str, Any]:
    """Return all options that are set, those of dataset files included, whose sources become settings.

    Args:
        kept: options for which False is not the same as leaving them out.
    """
    given = dict(contents.options)
    for tables in contents.datasets:
        dataset = read_datasets(tables, contents.options)
        given |= dataset.options
        for key, value in dataset.settings.items():
            imported.set_all({key: value}, SOURCE_NAMES.get(key, "image_dir"))
        imported.changed += dataset.remarks
    given = {name: value for name, value in given.items() if not is_unset(value) or (name in kept and value is False)}
    if imported.settings:
        reason = "has no effect with a dataset file, as in kohya's scripts"
        imported.unsupported += [Remark(name, given.pop(name), reason) for name in SOURCE_OPTIONS if name in given]
    if "train_data_dir" in given and "in_json" not in given:
        _convert_repeated_folders(given, imported)
    return given


def _name_file(problem: Problem, contents: FileContents) -> Problem:
    """Return the problem of an option under the name that its file gives it."""
    files = dict.fromkeys(str(key.file) for key in contents.keys if key.option == problem.key and not key.note)
    file = ", ".join(files)
    rule = f"cannot be read (in {file})" if files else problem.rule
    return replace(problem, key=contents.names.get(problem.key, problem.key), rule=rule)


def _convert_repeated_folders(given: dict[str, Any], imported: Imported) -> None:
    """Convert `train_data_dir` to its `N_name` folders, and remove it from the options if there are any."""
    folder = expand_or_keep(str(given["train_data_dir"]))
    subsets = list_repeated_folders(folder)
    # Repeats, and captions of images without one.
    imported.set_all({"data.kohya_folders": True}, "train_data_dir")
    if subsets:
        imported.set_all({"data.image_dirs": [subset["image_dir"] for subset in subsets]}, "train_data_dir")
        del given["train_data_dir"]
        reg_folder = expand_or_keep(str(given["reg_data_dir"])) if "reg_data_dir" in given else None
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
    imported.problems += by_default.problems
    found = {key: value for key, value in by_default.settings.items() if value != defaults[key]}
    if found:
        imported.set_all(found, name)
        imported.changed += by_default.changed
        shown = {key: value if isinstance(value, str) else format_value(value) for key, value in found.items()}
        written = _shorten(", ".join(f"{key}: {value}" for key, value in shown.items()))
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
        _convert_partly(name, value, error, imported)
        return
    except NoEffectError as error:
        imported.without_effect.append(Remark(name, value, str(error)))
        return
    except WRONG_VALUE_ERRORS as error:
        culprit = str(error) if isinstance(error, WrongValueError) else ""
        expects = WHOLE if culprit else option.expects
        problem = Problem(culprit or name, given.get(culprit or name), "cannot be read", f"write {expects}")
        imported.problems += [problem] if problem not in imported.problems else []
        return
    if converted is None:
        return
    if option.difference and value:
        imported.changed.append(Remark(name, value, option.difference))
    # A mapping that is a value, and not settings by key, is refused by the rules of its setting.
    is_settings = isinstance(converted, dict) and set(converted) <= set(option.keys)
    imported.set_all(converted if is_settings else {option.keys[0]: converted}, name)


def _convert_partly(name: str, value: Any, error: UnsupportedError, imported: Imported) -> None:
    """Set what can be converted of a value, and remark on the rest."""
    imported.set_all(error.settings, name)
    if error.is_other_training:
        imported.other_training.append(Remark(name, value, str(error)))
    elif str(error):
        (imported.changed if error.settings else imported.unsupported).append(Remark(name, value, str(error)))
    for entry, reason in error.entries.items():
        found = [item.get(entry) for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]
        shown = next((item for item in found if item is not None), None)
        imported.unsupported.append(Remark(f"{name}.{entry}", shown, reason))


def _explain_unknown(name: str, known: list[str]) -> str:
    near = get_close_matches(name.lower(), known, n=1, cutoff=0.75) or _find_by_word(name, known)
    if near:
        return f"is not a known option; did you mean {near[0]}?"
    return "is not a known option; docs/FROM_KOHYA.md lists those that are"


def _find_by_word(name: str, known: list[str]) -> list[str]:
    """Return the option that alone shares a word with a name, such as `shuffle_caption` for `shuffle_tags`."""
    words = name.lower().split("_")
    for word in sorted(words, key=len, reverse=True):
        sharing = [option for option in dict.fromkeys(known) if word in option.split("_")]
        if len(word) > 3 and len(sharing) == 1:
            # One word of many, such as `training`, says nothing.
            common = set(words).intersection(sharing[0].split("_"))
            return sharing if 2 * len(common) >= len(words) else []
    return []


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


@cache
def get_default_settings() -> Mapping[str, Any]:
    """Return the defaults of all settings by dotted key, in the order of the schema."""
    return flatten_settings(Config().model_dump(mode="json"))


def flatten_settings(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key, without flattening the values of settings that are mappings."""
    mappings = (
        *("optim.kwargs", "engine.deepspeed", "data.caption.replacements"),
        *("lora.rank_pattern", "lora.alpha_pattern"),
    )
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
