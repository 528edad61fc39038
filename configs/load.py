"""Load settings: build a checked `Config` from a YAML file and `key.sub=value` overrides, or report all problems."""

import copy
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from pydantic import BaseModel, ValidationError

from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.configs.renames import RENAMED, find_old_keys, rename_key, rename_settings, warn_of_old_names
from sdxl_trainer.configs.schema import Config

if TYPE_CHECKING:
    from sdxl_trainer.configs.kohya.options import Option


def load_config(path: Path, overrides: Sequence[str] = ()) -> tuple[Config, list[Problem]]:
    """Read `path`, apply `overrides` and check the result; see `build_config`.

    Raises:
        UserInputError: the file cannot be read, or so much is wrong that no config can be built from the rest.
    """
    return build_config(_read_yaml(path), overrides)


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


def save_config(config: Config, path: Path) -> None:
    """Write all settings as YAML, defaults included."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


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


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe YAML loader that rejects duplicate keys, where YAML would silently use the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:  # an open file, so that YAML's messages contain its name
            raw = yaml.load(file, Loader=_UniqueKeyLoader)
    except OSError as error:
        rule, cure = f"cannot be read: {error.strerror}", "give a YAML file"
        raise UserInputError([Problem("--cfg", path, rule, cure)]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        rule, cure = f"is not valid YAML: {error}", "correct the line that is named"
        raise UserInputError([Problem("--cfg", path, rule, cure)]) from None
    if not isinstance(raw, dict | None):
        rule, cure = "must be a mapping of sections", "start from one of configs/*.yaml"
        raise UserInputError([Problem("--cfg", path, rule, cure)])
    return raw or {}


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
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return Problem(key, text, "is not valid YAML", "quote the value")
    node = settings
    *parents, last = rename_key(key).split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            return Problem(key, text, f"'{parent}' is not a section", "check the dotted key")
    node[last] = value
    return None


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
            violations.problems.append(Problem(key, item["input"], "is not a known key", suggest_cure(key)))
        else:
            value = None if isinstance(item["input"], dict) else item["input"]
            rule = item["msg"].removeprefix("Value error, ")
            violations.problems.append(Problem(key, value, rule, "see docs/CONFIG.md"))
        if location and location not in violations.locations:
            violations.locations.append(location)
    return violations


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
