"""Load settings: build a checked `Config` from a YAML file and `key.sub=value` overrides, or report all problems."""

import copy
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ValidationError

from sdxl_trainer.configs.language.translate import CATALOGUES, choose_language
from sdxl_trainer.configs.paths import PathError
from sdxl_trainer.configs.problems import Problem, UserInputError, choose_cure, describe_encoding, suggest_name
from sdxl_trainer.configs.renames import RENAMED, find_old_keys, rename_key, rename_settings, warn_of_old_names
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.configs.section import holds_type
from sdxl_trainer.configs.yaml_file import COMMA_CURE, AmbiguousWord, YamlError, dump_yaml, load_yaml

if TYPE_CHECKING:
    from sdxl_trainer.configs.kohya.entries import Option

MIN_BEGINNING = 4  # letters that a shortened name of a setting begins with
# Files that configs/import_config.py converts, and a key that only those of other programs have.
IMPORTED_SUFFIXES = (".toml", ".py", ".sh", ".bat", ".cmd", ".ps1")
IMPORTED_KEY = "pretrained_model_name_or_path"

SEE_ALSO = "docs/CONFIG.md describes it"
# Kind of pydantic's error → rule and cure. `{value}` is the value, `{words}` what pydantic says beside it.
KINDS = {
    "float_type": ("must be a number", "write one number, such as 0.1 or 1e-5, without brackets"),
    "float_parsing": ("must be a number", "write digits, such as 0.1 or 1e-5"),
    "finite_number": ("must be a finite number", "write digits, such as 0.1 or 1e-5"),
    "int_type": ("must be a whole number", "write one whole number, without brackets"),
    "int_parsing": ("must be a whole number", "write digits, without units and separators"),
    "int_from_float": ("must be a whole number", "write it without a fraction"),
    "bool_type": ("must be true or false", "write true or false"),
    "bool_parsing": ("must be true or false", "write true or false"),
    "list_type": ("must be a list", "write it between brackets: [{value}]"),
    "tuple_type": ("must be a list", "write it between brackets, such as [1024, 1024]"),
    "string_type": ("must be a text", "write one text, without brackets"),
    "path_type": ("must be a path", "write one path, without brackets"),
    "dict_type": ("must hold names with values", "write it between braces: {{name: value}}"),
    "model_type": (
        "is a section, which holds settings below it",
        "write each on a line of its own, indented, with a colon (:) of half width and a space after it",
    ),
    "string_too_short": ("must not be empty", "write one, or remove the line"),
    "too_short": ("must not be empty", "write its entries, or remove the line"),
    "missing": ("must be set", SEE_ALSO),
    "invalid_key": ("is not the name of a setting", "docs/CONFIG.md lists the names"),
}

# Setting with a pattern → rule and example.
PATTERN_RULES = {
    "run.name": ("must consist of letters, digits, `_`, `-` and `.`, without spaces, and not of dots alone", "my_run"),
    "about.base_model": (
        "must be a hub id: the owner, a slash and the model's name",
        "stabilityai/stable-diffusion-xl-base-1.0",
    ),
}
HUB_ADDRESS = re.compile(r"https?://[^/]+/([\w.\-]+/[\w.\-]+)")

# Values of other trainers → what to write here. The keys are dotted settings.
FOREIGN_VALUES: dict[str, dict[str, str]] = {
    "engine.precision": {"no": "fp32", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "half": "fp16"},
    "cache.vae_precision": {"fp16": "bf16 or fp32: SDXL's own VAE overflows in fp16 and gives NaN", "float32": "fp32"},
    "objective.prediction": {"v_prediction": "v", "v_pred": "v", "eps": "epsilon", "sample": "epsilon"},
    "objective.loss": {"mse": "l2", "mae": "l1"},
    "optim.schedule": {"constant_with_warmup": "constant, and the number of optim.warmup_steps"},
    "engine.attention": {"flash_attention_2": "flash", "mem_efficient": "efficient", "xformer": "xformers"},
}
WIDE_COLON_CURE = "write a colon of half width, and a space"
WIDE_COLON = re.compile(r"\s*[A-Za-z_][\w.-]*\s*：")


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

    Returns the config, with the default in place of each wrong value, and the problems. A caller reports them before it
    looks for others: a default that the user did not choose contradicts data and caches that are right.

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
    unset: list[str] = []
    while True:
        try:
            return Config.model_validate(settings), problems
        except ValidationError as error:
            violations = _list_violations(error, settings)
            unset += violations.unset
            problems += [problem for problem in violations.problems if problem not in problems]
            for problem in violations.contradictions:
                if problem not in problems and not _names_any(problem, unset):
                    _add_value_problem(problems, problem)
            # From here on these settings have their defaults, too.
            unset += [problem.key for problem in violations.contradictions]
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
    leaves = {name.rsplit(".", 1)[-1]: name for name in known}
    # A key of a known section means another section only if their names are much alike.
    cutoff = 0.85 if key.partition(".")[0] in Config.model_fields and "." in key else 0.7
    section = key.rpartition(".")[0]
    own = [name.removeprefix(f"{section}.") for name in known if section and name.startswith(f"{section}.")]
    same = [name for name in known if "." in name and name.rsplit(".", 1)[-1] == last.lower()]
    # A setting of the same section that is nearly called so is meant rather than an old name of another section.
    if (alike := suggest_name(last, own, cutoff=0.9)) and all(name in RENAMED for name in same):
        same = [f"{section}.{alike}", *same]
    near = next(iter(same), "")
    # Within a known section only the last part counts: the section's name would make any two keys much alike.
    begun = (name for name in own if len(last) >= MIN_BEGINNING and name.startswith(last[:MIN_BEGINNING]))
    found = suggest_name(last, own) or next(begun, "") if own else suggest_name(key, known)
    near = near or (f"{section}.{found}" if own and found else found)
    near = near or leaves.get(suggest_name(last, leaves, cutoff=cutoff), "")
    return rename_key(near)


def suggest_cure(key: str) -> str:
    """Return what to write instead of an unknown key."""
    if "：" in key:
        return WIDE_COLON_CURE
    before, colon, _ = key.partition(":")
    if colon:
        return f"put a space after the colon: {before.rpartition('.')[2]}: ..."
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

    return KOHYA_OPTIONS.get(name, KOHYA_OPTIONS.get(name.lower()))


def _read_yaml(path: Path) -> dict[str, Any]:
    if path.suffix.lower() in IMPORTED_SUFFIXES and path.is_file():
        raise _build_import_error(path)
    try:
        raw = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        rule, cure = f"cannot be read: {error.strerror}", "give a YAML file"
        raise UserInputError([Problem("--cfg", path, rule, cure)]) from None
    except UnicodeDecodeError as error:
        raise UserInputError([Problem("--cfg", path, describe_encoding(error), "save it as UTF-8")]) from None
    except YamlError as error:
        if number := _find_wide_colon(path):
            rule = f"has a full-width colon in line {number}"
            raise UserInputError([Problem("--cfg", path, rule, WIDE_COLON_CURE)]) from None
        raise UserInputError([Problem("--cfg", path, f"is not valid YAML: {error}", error.cure)]) from None
    if not isinstance(raw, dict | None):
        rule, cure = "must be a mapping of sections", "start from one of configs/*.yaml"
        raise UserInputError([Problem("--cfg", path, rule, cure)])
    if raw and IMPORTED_KEY in raw:
        raise _build_import_error(path)
    return raw or {}


def _find_wide_colon(path: Path) -> int | None:
    """Return the number of the first line in which a key is followed by a full-width colon, as Chinese input has."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((number for number, line in enumerate(lines, 1) if WIDE_COLON.match(line)), None)


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
        is_wide = bool(set(word) & set("＝："))
        cure = "write an equals sign of half width: key.sub=value" if is_wide else "write key.sub=value"
        return Problem(word, None, "is not a setting", cure)
    try:
        value = load_yaml(text)
    except YamlError as error:
        quoted = _quote_items(text)
        other = COMMA_CURE if error.cure == COMMA_CURE else "quote the value"
        cure = f'put quotes around the texts in it: "{key}={quoted}"' if quoted else other
        return Problem(key, text, "is not valid YAML", cure)
    node = settings
    *parents, last = rename_key(key).split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            return Problem(key, text, f"'{parent}' is not a section", "check the dotted key")
    node[last] = value
    return None


def _quote_items(text: str) -> str:
    """Return a list in brackets with quotes around its items, which hold braces; an empty string for another text."""
    if not re.fullmatch(r"\[[^'\"\[\]]*\]", text):
        return ""
    items = re.findall(r"(?:[^,{}]|\{[^{}]*\})+", text[1:-1])
    return f"[{', '.join(repr(item.strip()) for item in items)}]"


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
    contradictions: list[Problem]  # of the project's own rules, which may compare a setting with others
    locations: list[tuple]
    unset: list[str]  # settings that have their default now because their key is mistyped or their value is wrong


def _list_violations(error: ValidationError, settings: dict) -> _Violations:
    violations = _Violations([], [], [], [])
    for item in error.errors(include_url=False):
        location = _trim_location(item["loc"], settings)
        key = _name_location(item["loc"], settings) or "--cfg"
        if item["type"] == "missing":
            key = f"{key}.{item['loc'][-1]}"
        if item["type"] == "extra_forbidden":
            is_in_list = any(isinstance(part, int) for part in item["loc"])
            cure = SEE_ALSO if is_in_list and ":" not in key else suggest_cure(key)
            violations.problems.append(Problem(key, item["input"], "is not a known key", cure))
            violations.unset.append(suggest_key(key))
        elif item["type"] == "value_error":
            violations.contradictions.append(_build_value_problem(key, item))
        else:
            _add_value_problem(violations.problems, _build_value_problem(key, item))
            violations.unset.append(key)
        if location and location not in violations.locations:
            violations.locations.append(location)
    return violations


def _names_any(problem: Problem, keys: Iterable[str]) -> bool:
    """Return whether the rule of a problem names a setting."""
    names = {key.rpartition(".")[2] if "." in key else f"{key}." for key in keys if key and key != problem.key}
    return any(re.search(rf"\b{re.escape(name)}(?!\w)", problem.rule) for name in names)


def _add_value_problem(problems: list[Problem], problem: Problem) -> None:
    """Append the problem of a value, or join it with that of another type which the setting could have."""
    for number, other in enumerate(problems):
        if (other.key, repr(other.value)) == (problem.key, repr(problem.value)):
            problems[number] = replace(other, rule=f"{other.rule}, or {problem.rule.removeprefix('must be ')}")
            return
    problems.append(problem)


def _build_value_problem(key: str, item: Mapping[str, Any]) -> Problem:
    """Build the problem of a value that one of pydantic's errors refuses.

    Args:
        item: an entry of `ValidationError.errors()`.
    """
    kind, given = item["type"], item["input"]
    value = None if isinstance(given, dict) else given
    if given is None and kind != "value_error":
        return Problem(key, None, "has no value", "write one, or remove the line")
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", item["ctx"]["expected"])  # such as "'cosine', 'linear' or 'wsd'"
        foreign = FOREIGN_VALUES.get(key, {}).get(str(given).lower())
        near = suggest_name(str(given), allowed)
        cure = f"write {foreign}" if foreign else f"did you mean {near}?" if near else "choose one of them"
        return Problem(key, value, f"must be {item['ctx']['expected']}", cure)
    if kind == "string_type" and isinstance(given, (int, float)):
        return Problem(key, value, "must be a text", f'quote it: "{given}"')
    if kind == "string_pattern_mismatch":
        return Problem(key, value, *_explain_pattern(key, str(given), item["ctx"]["pattern"]))
    if kind == "too_long":
        rule = f"must have at most {item['ctx']['max_length']} values, not {item['ctx']['actual_length']}"
        return Problem(key, value, rule, "remove the others; a number has a decimal point, not a comma")
    if kind == "float_parsing" and "," in str(given):
        return Problem(key, value, KINDS[kind][0], "write a decimal point instead of the comma, such as 0.1 or 1e-5")
    if kind in KINDS:
        rule, cure = KINDS[kind]
        return Problem(key, value, rule, choose_cure(given, cure.format(value=given)))
    # The sentences of the project's own validators name the cure, except for those about paths.
    rule = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    error = item["ctx"]["error"] if kind == "value_error" else None
    cure = error.cure if isinstance(error, PathError) else SEE_ALSO if error else f"change it; {SEE_ALSO}"
    return Problem(key, value, rule, cure)


def _explain_pattern(key: str, text: str, pattern: str) -> tuple[str, str]:
    """Return the rule of a text that does not match its setting's pattern, and what to write: a like text, or an
    example."""
    rule, example = PATTERN_RULES[key]
    address = HUB_ADDRESS.match(text)
    name = address[1] if address else re.sub(r"[^\w.\-]+", "_", text).strip("_.")
    return rule, f"write one such as {name if re.fullmatch(pattern, name) else example}"


def _trim_location(location: tuple, settings: Any) -> tuple:
    """Return the part of a pydantic location that exists in the settings, without the names of union members."""
    trimmed = []
    for part in location:
        if not isinstance(settings, dict) or part not in settings:
            break
        trimmed.append(part)
        settings = settings[part]
    return tuple(trimmed)


def _name_location(location: tuple, settings: Any) -> str:
    """Return the dotted key of a pydantic location, which may be that of a default or lie in a list."""
    whole = ".".join(map(str, location))
    if whole in iterate_keys():
        return whole
    named = []
    for part in location:
        known = settings if isinstance(settings, dict) else range(len(settings)) if isinstance(settings, list) else ()
        if part not in known:
            break
        named.append(str(part))
        settings = settings[part]
    return ".".join(named)


def _remove(settings: dict, location: tuple) -> None:
    node: Any = settings
    for part in location[:-1]:
        if not isinstance(node, dict) or part not in node:
            return
        node = node[part]
    node.pop(location[-1], None)
