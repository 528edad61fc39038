"""YAML file and `key.sub=value` words in, one checked `Config` out, with every problem named at once."""

import copy
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ValidationError

from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.configs.renames import RENAMED, find_old_keys, rename_key, rename_settings, warn_of_old_names
from sdxl_trainer.configs.schema import Config

if TYPE_CHECKING:
    from sdxl_trainer.configs.kohya.options import Option


def load_config(path: Path, overrides: Sequence[str] = ()) -> tuple[Config, list[Problem]]:
    """Read `path`, apply `overrides` and check the result against the schema; see `build_config`.

    Raises:
        UserInputError: the file cannot be read, or so much is wrong that no config can be made of the rest.
    """
    return build_config(_read_yaml(path), overrides)


def build_config(raw: dict[str, Any], overrides: Sequence[str] = ()) -> tuple[Config, list[Problem]]:
    """Apply `overrides` to nested dicts of settings, and check the result against the schema.

    Settings with an old name (configs/renames.py) are accepted with a warning.

    Returns the config with each wrong value left at its default, and the problems found, so that the caller can look
    for further ones (missing folders, a world size that does not fit) and report all of them together.

    Raises:
        UserInputError: so much is wrong that no config can be built from the rest.
    """
    settings = copy.deepcopy(raw)
    in_file = rename_settings(settings)
    settings = _fill_sections(settings, Config)
    in_overrides = find_old_keys(word.partition("=")[0] for word in overrides)
    problems = [problem for word in overrides for problem in _apply_override(settings, word)]
    in_values = rename_settings(settings)  # of overrides that set a whole section: data={check: full}
    warn_of_old_names([*in_file.used, *in_overrides.used, *in_values.used])
    problems = [*in_file.problems, *in_overrides.problems, *in_values.problems, *problems]
    while True:
        try:
            return Config.model_validate(settings), problems
        except ValidationError as error:
            found, removable = _explain(error, settings)
            problems += [problem for problem in found if problem not in problems]
            if not removable:
                raise UserInputError(problems) from None
            for location in removable:
                _remove(settings, location)


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML, to be kept with the run."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def iterate_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """All dotted keys of the schema, sections first."""
    sections = dict(iterate_sections(model))
    for name in model.model_fields:
        yield prefix + name
        if name in sections:
            yield from iterate_keys(sections[name], f"{prefix}{name}.")


def iterate_sections(model: type[BaseModel] = Config) -> Iterator[tuple[str, type[BaseModel]]]:
    """The fields of a section that are sections themselves."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield name, field.annotation


def suggest_key(key: str) -> str:
    """The known dotted key that is meant by `key`, by its name in kohya's scripts or by its looks, or an empty
    string."""
    known = [*iterate_keys(), *RENAMED]
    last = key.rsplit(".", 1)[-1]
    option = _find_kohya_option(last)
    if option is not None and option.keys:
        return option.keys[0]
    # A key in the wrong section is as common a slip as a mistyped one.
    moved = [name for name in known if "." in name and name.rsplit(".", 1)[-1] == last]
    near = moved or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        leaves = {name.rsplit(".", 1)[-1]: name for name in known}
        near = [leaves[leaf] for leaf in difflib.get_close_matches(last, list(leaves), n=1, cutoff=0.7)]
    return rename_key(near[0]) if near else ""


def suggest_cure(key: str) -> str:
    """What to write in place of an unknown key."""
    last, near = key.rsplit(".", 1)[-1], suggest_key(key)
    option = _find_kohya_option(last)
    if option is None:
        return f"did you mean {near}?" if near else "see docs/CONFIG.md for the known keys"
    if near and (option.keys or near.rsplit(".", 1)[-1] == last):
        page = f" docs/FROM_KOHYA.md says how kohya's {last} is written" if option.convert is not None else ""
        return f"did you mean {near}?{page}"
    return f"leave it out; of this option of kohya's scripts: {option.note}"


def _find_kohya_option(name: str) -> "Option | None":
    """What an option of kohya's scripts is here; the table is imported only where a key is wrong."""
    from sdxl_trainer.configs.kohya.options import KOHYA_OPTIONS

    return KOHYA_OPTIONS.get(name)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets a later key silently win over an earlier one of the same name; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict:
    try:
        with path.open(encoding="utf-8") as file:  # whose name YAML tells with a mistake
            raw = yaml.load(file, Loader=_UniqueKeyLoader)  # a SafeLoader
    except OSError as error:
        raise UserInputError(
            [Problem("--cfg", path, f"cannot be read: {error.strerror}", "give a YAML file")]
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserInputError([Problem("--cfg", path, f"is not valid YAML: {error}", "mend the line named")]) from None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        rule = "must be a mapping of sections"
        raise UserInputError([Problem("--cfg", path, rule, "start from one of configs/*.yaml")])
    return raw


def _fill_sections(raw: dict, model: type[BaseModel]) -> dict:
    """Sections whose keys are all commented out read as null; they are meant as empty."""
    filled = dict(raw)
    for name, section in iterate_sections(model):
        if name in raw and raw[name] is None:
            filled[name] = {}
        elif isinstance(raw.get(name), dict):
            filled[name] = _fill_sections(raw[name], section)
    return filled


def _apply_override(raw: dict, word: str) -> list[Problem]:
    key, equals, text = word.partition("=")
    if not equals or not key:
        return [Problem(word, None, "is not a setting", "write key.sub=value")]
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return [Problem(key, text, "is not valid YAML", "quote the value")]
    node = raw
    *parents, last = rename_key(key).split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            return [Problem(key, text, f"'{parent}' is not a section", "check the dotted key")]
    node[last] = value
    return []


def _explain(error: ValidationError, raw: dict) -> tuple[list[Problem], list[tuple]]:
    """Problems for people, and the places whose removal lets the rest be checked."""
    problems, removable = [], []
    for item in error.errors(include_url=False):
        location = _trim_to_raw(item["loc"], raw)
        key = ".".join(str(part) for part in location) or "--cfg"
        if item["type"] == "extra_forbidden":
            problems.append(Problem(key, item["input"], "is not a known key", suggest_cure(key)))
        else:
            value = None if isinstance(item["input"], dict) else item["input"]
            problems.append(Problem(key, value, item["msg"].removeprefix("Value error, "), "see docs/CONFIG.md"))
        if location and location not in removable:
            removable.append(location)
    return problems, removable


def _trim_to_raw(location: tuple, raw: Any) -> tuple:
    """The part of a pydantic location that exists in the user's file (union members add parts that do not)."""
    trimmed = []
    for part in location:
        if not isinstance(raw, dict) or part not in raw:
            break
        trimmed.append(part)
        raw = raw[part]
    return tuple(trimmed)


def _remove(raw: dict, location: tuple) -> None:
    node: Any = raw
    for part in location[:-1]:
        if not isinstance(node, dict) or part not in node:
            return
        node = node[part]
    node.pop(location[-1], None)
