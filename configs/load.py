"""Load settings: build a checked `Config` from a YAML file and `key.sub=value` overrides, or report all problems."""

import copy
import difflib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ValidationError

from sdxl_trainer.configs.language.translate import CATALOGUES, choose_language
from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.configs.renames import RENAMED, find_old_keys, rename_key, rename_settings, warn_of_old_names
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.configs.section import holds_type
from sdxl_trainer.configs.yaml_file import AmbiguousWord, dump_yaml, load_yaml

if TYPE_CHECKING:
    from sdxl_trainer.configs.kohya.entries import Option

# Files that configs/import_config.py converts, and a key that only those of other programs have.
IMPORTED_SUFFIXES = (".toml", ".py", ".sh", ".bat", ".cmd", ".ps1")
IMPORTED_KEY = "pretrained_model_name_or_path"


def load_config(path: Path, overrides: Sequence[str] = ()) -> tuple[Config, list[Problem]]:
    """Read `path`, apply `overrides` and check the result; see `build_config`. Choose the language of messages.

    Raises:
        UserInputError: the file cannot be read, or so much is wrong that no config can be built from the rest.
    """
    raw = _read_yaml(path)
    choose_language(_find_language(raw, overrides))  # before the check, whose problems are printed in that language
    return build_config(raw, overrides)


def build_config(raw: dict[str, Any], overrides: Sequence[str] = ()) -> tuple[Config, list[Problem]]:
    """Apply `overrides` to nested dicts of settings, and check the result against the schema.

    Settings with an old name (configs/renames.py) are accepted with a warning.

    Returns the config, with the default in place of each wrong value, and the problems. The caller can look for further
    problems (missing folders, a world size that does not fit) and report all of them together.

    Raises:
        UserInputError: so much is wrong that no config can be built from the rest.
    """
    settings = copy.deepcopy(raw)
    in_file = rename_settings(settings)
    settings = _fill_sections(settings, Config)
    in_overrides = find_old_keys(word.partition("=")[0] for word in overrides)
    problems = [problem for word in overrides if (problem := _apply_override(settings, word))]
    in_values = rename_settings(settings)  # an override may set a whole section: data={check: full}
    warn_of_old_names([*in_file.used, *in_overrides.used, *in_values.used])
    problems = [*in_file.problems, *in_overrides.problems, *in_values.problems, *problems]
    problems += _resolve_ambiguous_words(settings)
    while True:
        try:
            return Config.model_validate(settings), problems
        except ValidationError as error:
            violations = _list_violations(error, settings)
            problems += [problem for problem in violations.problems if problem not in problems]
            if not violations.locations:
                raise UserInputError(problems) from None
            for location in violations.locations:
                _remove(settings, location)


def dump_config(config: Config) -> str:
    """Return all settings as YAML, defaults included."""
    return dump_yaml(config.model_dump(mode="json"))


def iterate_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Yield all dotted keys of the schema, each section before its keys."""
    sections = dict(iterate_sections(model))
    for name in model.model_fields:
        yield prefix + name
        if name in sections:
            yield from iterate_keys(sections[name], f"{prefix}{name}.")


def iterate_sections(model: type[BaseModel] = Config) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield name and model of each section inside a section."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield name, field.annotation


def suggest_key(key: str) -> str:
    """Return the known dotted key that an unknown one most likely means, or an empty string.

    The key may be a name of kohya's scripts, an old name, a key in the wrong section, or mistyped, tried in this order.
    """
    last = key.rsplit(".", 1)[-1]
    option = _find_kohya_option(last)
    if option is not None and option.keys:
        return option.keys[0]
    known = [*iterate_keys(), *RENAMED]
    near = [name for name in known if "." in name and name.rsplit(".", 1)[-1] == last]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        leaves = {name.rsplit(".", 1)[-1]: name for name in known}
        near = [leaves[leaf] for leaf in difflib.get_close_matches(last, list(leaves), n=1, cutoff=0.7)]
    return rename_key(near[0]) if near else ""


def suggest_cure(key: str) -> str:
    """Return what to write instead of an unknown key."""
    last, near = key.rsplit(".", 1)[-1], suggest_key(key)
    option = _find_kohya_option(last)
    if option is None:
        return f"did you mean {near}?" if near else "see docs/CONFIG.md for the known keys"
    if near and (option.keys or near.rsplit(".", 1)[-1] == last):
        hint = f" docs/FROM_KOHYA.md explains how to convert kohya's {last}" if option.convert is not None else ""
        return f"did you mean {near}?{hint}"
    return f"leave it out; kohya's {last} has no setting here: {option.note}"


def _find_kohya_option(name: str) -> "Option | None":
    # Imported here because the table is large and needed only for wrong keys.
    from sdxl_trainer.configs.kohya.options import KOHYA_OPTIONS

    return KOHYA_OPTIONS.get(name)


def _read_yaml(path: Path) -> dict[str, Any]:
    if path.suffix.lower() in IMPORTED_SUFFIXES and path.is_file():
        raise _build_import_error(path)
    try:
        with path.open(encoding="utf-8") as file:  # an open file, so that YAML's messages contain its name
            raw = load_yaml(file)
    except OSError as error:
        rule, cure = f"cannot be read: {error.strerror}", "give a YAML file"
        raise UserInputError([Problem("--cfg", path, rule, cure)]) from None
    except ValueError as error:
        rule, cure = f"is not valid YAML: {error}", "correct the line that is named"
        raise UserInputError([Problem("--cfg", path, rule, cure)]) from None
    if not isinstance(raw, dict | None):
        rule, cure = "must be a mapping of sections", "start from one of configs/*.yaml"
        raise UserInputError([Problem("--cfg", path, rule, cure)])
    if raw and IMPORTED_KEY in raw:
        raise _build_import_error(path)
    return raw or {}


def _build_import_error(path: Path) -> UserInputError:
    rule = "holds settings of kohya's scripts, kohya_ss or the first sdxl-trainer, or no settings at all"
    cure = f"convert it: python -m sdxl_trainer.configs.import_config {shlex.quote(str(path))} --out my.yaml"
    return UserInputError([Problem("--cfg", path, rule, cure)])


def _find_language(raw: dict[str, Any], overrides: Sequence[str]) -> str | None:
    """Return `log.language` of settings that are not checked yet; None if it is not set, or wrong."""
    section = raw.get("log")
    given = [section.get("language")] if isinstance(section, dict) else []
    given += [word.partition("=")[2] for word in overrides if word.startswith("log.language=")]
    return given[-1] if given and given[-1] in ("en", *CATALOGUES) else None


def _fill_sections(raw: dict, model: type[BaseModel]) -> dict:
    """Replace null with an empty section: YAML reads a section whose keys are all commented out as null."""
    filled = dict(raw)
    for name, section in iterate_sections(model):
        if name in raw and raw[name] is None:
            filled[name] = {}
        elif isinstance(raw.get(name), dict):
            filled[name] = _fill_sections(raw[name], section)
    return filled


def _apply_override(settings: dict, word: str) -> Problem | None:
    """Set the key of one `key.sub=value` word, in place, or return what is wrong with the word."""
    key, equals, text = word.partition("=")
    if not equals or not key:
        return Problem(word, None, "is not a setting", "write key.sub=value")
    try:
        value = load_yaml(text)
    except ValueError:
        return Problem(key, text, "is not valid YAML", "quote the value")
    node = settings
    *parents, last = rename_key(key).split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            return Problem(key, text, f"'{parent}' is not a section", "check the dotted key")
    node[last] = value
    return None


def _resolve_ambiguous_words(settings: dict) -> list[Problem]:
    """Replace `yes`, `no`, `on` and `off` by true and false, in place, in settings that hold no text.

    Returns a problem for each other word that YAML 1.1 and YAML 1.2 read differently. Its setting is removed.
    """
    problems = []
    for location, word, is_key in list(_find_ambiguous_words(settings, ())):
        if word.switch is not None and not is_key and not _may_hold_text(location):
            _get_node(settings, location[:-1])[location[-1]] = word.switch
            continue
        rule = "is a number, date or switch in YAML 1.1 and another value in YAML 1.2"
        number = "write true or false" if word.switch is not None else "write a number in decimal digits"
        cure = f'{number}, or quote it ("{word}") if it is a text'
        problems.append(Problem(".".join(map(str, location)), str(word), rule, cure))
        _remove(settings, _trim_location(location, settings))
    return problems


def _find_ambiguous_words(value: Any, location: tuple) -> Iterator[tuple[tuple, AmbiguousWord, bool]]:
    """Yield the location of each ambiguous word in nested values, the word, and whether it is the key of a mapping."""
    if isinstance(value, AmbiguousWord):
        yield location, value, False
    elif isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, AmbiguousWord):
                yield (*location, key), key, True
            else:
                yield from _find_ambiguous_words(item, (*location, key))


def _may_hold_text(location: tuple) -> bool:
    """Return whether the setting at a location may hold a text or a mapping of values of any type."""
    model: type[BaseModel] = Config
    for part in location:
        sections = dict(iterate_sections(model))
        if part not in sections:
            field = model.model_fields.get(part)
            return field is not None and holds_type(field.annotation, str, Path, Any)
        model = sections[part]
    return False


def _get_node(settings: Any, location: tuple) -> Any:
    for part in location:
        settings = settings[part]
    return settings


class _Violations(NamedTuple):
    """The problems of a ValidationError, and the locations of the values to remove before the rest can be checked."""

    problems: list[Problem]
    locations: list[tuple]


def _list_violations(error: ValidationError, settings: dict) -> _Violations:
    violations = _Violations([], [])
    for item in error.errors(include_url=False):
        location = _trim_location(item["loc"], settings)
        key = ".".join(str(part) for part in location) or "--cfg"
        if item["type"] == "extra_forbidden":
            rule, cure = "is not a known key", suggest_cure(key)
            violations.problems.append(Problem(key, item["input"], rule, cure, meant=suggest_key(key)))
        else:
            value = None if isinstance(item["input"], dict) else item["input"]
            rule = item["msg"].removeprefix("Value error, ")
            violations.problems.append(Problem(key, value, rule, _suggest_value(value, item)))
        if location and location not in violations.locations:
            violations.locations.append(location)
    return violations


def _suggest_value(value: Any, item: Mapping[str, Any]) -> str:
    """Return the cure for a value that one of pydantic's errors refuses."""
    if item["type"] == "string_type" and isinstance(value, (int, float)):
        return f'quote it: "{value}"'
    if item["type"] == "literal_error":
        allowed = item["ctx"]["expected"]  # such as "'cosine', 'linear' or 'wsd'"
        near = difflib.get_close_matches(str(value).lower(), re.findall(r"'([^']*)'", allowed), n=1, cutoff=0.6)
        if near:
            return f"did you mean {near[0]}?"
    return "see docs/CONFIG.md"


def _trim_location(location: tuple, settings: Any) -> tuple:
    """Return the part of a pydantic location that exists in the settings, without the names of union members."""
    trimmed = []
    for part in location:
        if not isinstance(settings, dict) or part not in settings:
            break
        trimmed.append(part)
        settings = settings[part]
    return tuple(trimmed)


def _remove(settings: dict, location: tuple) -> None:
    node: Any = settings
    for part in location[:-1]:
        if not isinstance(node, dict) or part not in node:
            return
        node = node[part]
    node.pop(location[-1], None)
