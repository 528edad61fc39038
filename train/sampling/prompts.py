"""Prompts for generated images, read from the settings and from prompt files in the formats of kohya's scripts.

All problems are reported together, each with its file and line, before a network is loaded.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

from sdxl_trainer.configs.kohya.readers import read_toml
from sdxl_trainer.configs.objective import ObjectiveConfig
from sdxl_trainer.configs.paths import CHECK_PATH
from sdxl_trainer.configs.problems import Problem, UserInputError, describe_encoding, suggest_name
from sdxl_trainer.configs.samples import (
    FLOW_SAMPLERS,
    MAX_STEPS,
    OWN_SAMPLERS,
    SAMPLER_ALIASES,
    ZERO_SNR_SAMPLERS,
    SampleConfig,
    SamplerName,
    ScheduleType,
)
from sdxl_trainer.data.text.captions import fix_text

PROMPT_FILE_KEY = "sample.prompt_file"
MIN_SIDE, SIDE_STEP = 64, 8  # of the width and height of images, as in configs/samples.py
# A flag such as `—w` with a dash that a word processor has put in place of `--`.
DASHES = r"\u2010-\u2015\u2212\uFE58\uFE63\uFF0D"
CHANGED_DASHES = re.compile(rf"\s(-*[{DASHES}][-{DASHES}]*)(ss|st|[nwhsld])(?=\s|$)")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Everything that determines a generated image, besides the model."""

    text: str
    negative: str
    width_px: int
    height_px: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    guidance_rescale: float = 0.0
    sampler: str
    schedule_type: str  # of the samplers OWN_SAMPLERS; the others have diffusers' own


class PromptError(ValueError):
    """A mistake in a prompt. The message is the broken rule.

    Args:
        cure: what to write instead.
    """

    def __init__(self, rule: str, cure: str):
        super().__init__(rule)
        self.cure = cure


class PromptEntry(NamedTuple):
    """An unparsed prompt of the settings or of a prompt file."""

    key: str  # the setting that contains or names the prompt
    location: str  # its file and line, as the start of a message; "" for a prompt of the settings
    content: str | dict[str, Any]  # a line with flags, or a JSON object


def parse_side(value: Any) -> int:
    """Parse a width or height in pixels. Raises PromptError."""
    side = _parse_whole(value, least=0, cure=f"write a multiple of {SIDE_STEP} from {MIN_SIDE} on, such as 1024")
    if side < MIN_SIDE:
        raise PromptError(f"is below {MIN_SIDE}", f"write {MIN_SIDE} or more, in multiples of {SIDE_STEP}")
    if side % SIDE_STEP:
        below = side - side % SIDE_STEP
        raise PromptError(f"is not a multiple of {SIDE_STEP}", f"write {below} or {below + SIDE_STEP}")
    return side


def parse_steps(value: Any) -> int:
    """Parse a number of steps, 1 to 1000. Raises PromptError."""
    cure = f"write a number of steps from 1 to {MAX_STEPS}, such as 28"
    if (number := _parse_whole(value, least=1, cure=cure)) > MAX_STEPS:
        raise PromptError(f"is above {MAX_STEPS}, the timesteps of the model", cure)
    return number


def parse_seed(value: Any) -> int:
    """Parse a whole number of at least 0. Raises PromptError."""
    return _parse_whole(value, least=0, cure="write a seed such as 42; without one, prompts get seeds of their own")


def parse_scale(value: Any) -> float:
    """Parse a finite number of at least 0. Raises PromptError."""
    if isinstance(value, bool) or not re.fullmatch(r"\d+(\.\d*)?|\.\d+", str(value)):
        raise PromptError("is not a number of at least 0", "write a guidance scale such as 7.5; 1 turns guidance off")
    return float(value)


def parse_prompt_text(value: Any) -> str:
    """Parse a string. Raises PromptError."""
    if not isinstance(value, str):
        raise PromptError("is not a string", 'write a text in quotes, such as "a cat", or "" for the empty one')
    return value.strip()


def parse_sampler(value: Any) -> str:
    """Parse a sampler: its name here, in kohya's scripts or in ComfyUI, or diffusers' class. Raises PromptError."""
    name = SAMPLER_ALIASES.get(str(value), str(value))
    if name in get_args(ScheduleType):
        raise PromptError("is no sampler but a schedule type", f"write --st {name}, or in JSON `schedule_type`")
    return _parse_name(name, get_args(SamplerName), SAMPLER_ALIASES)


def parse_schedule_type(value: Any) -> str:
    """Parse a schedule type. Raises PromptError."""
    return _parse_name(str(value), get_args(ScheduleType))


def _parse_whole(value: Any, least: int, cure: str) -> int:
    is_whole = not isinstance(value, (bool, float)) and re.fullmatch(r"\d{1,19}", str(value))
    if not is_whole or int(value) < least:
        raise PromptError(f"is not a whole number of at least {least}", cure)
    return int(value)


def _parse_name(name: str, names: Sequence[str], others: Iterable[str] = ()) -> str:
    if name not in names:
        near = suggest_name(name, [*names, *others])
        cure = f"did you mean {near}?" if near else "write one of these names"
        raise PromptError(f"is none of {', '.join(names)}", cure)
    return name


class PromptField(NamedTuple):
    """A field of `Prompt` that an entry can set, and the parser of its values."""

    name: str
    parse: Callable[[Any], Any]


# Fields by kohya's flag, and by the key in a JSON object.
FLAGS: dict[str, PromptField] = {
    "n": PromptField("negative", parse_prompt_text),
    "w": PromptField("width_px", parse_side),
    "h": PromptField("height_px", parse_side),
    "s": PromptField("num_inference_steps", parse_steps),
    "l": PromptField("guidance_scale", parse_scale),
    "d": PromptField("seed", parse_seed),
    "ss": PromptField("sampler", parse_sampler),
    "st": PromptField("schedule_type", parse_schedule_type),
}
JSON_KEYS: dict[str, PromptField] = {
    "prompt": PromptField("text", parse_prompt_text),
    "negative_prompt": FLAGS["n"],
    "width": FLAGS["w"],
    "height": FLAGS["h"],
    "sample_steps": FLAGS["s"],
    "steps": FLAGS["s"],  # of the first sdxl-trainer
    "scale": FLAGS["l"],
    "seed": FLAGS["d"],
    "sample_sampler": FLAGS["ss"],
    "schedule_type": FLAGS["st"],
}
# Longer names of the flags, which name the flag that is meant.
FLAG_WORDS = {
    word: flag
    for flag, field in FLAGS.items()
    for word in (flag, field.name, *(key for key in JSON_KEYS if JSON_KEYS[key] is field))
} | {"cfg": "l"}


def load_prompts(
    config: SampleConfig, objective: ObjectiveConfig, with_fixed_text: bool = False
) -> tuple[list[Prompt], list[Problem]]:
    """Load all prompts, and return the valid ones and a problem for each invalid one.

    A prompt without a seed gets `sample.seed` plus its number.

    Args:
        with_fixed_text: clean the texts as captions are cleaned (`data.caption.fix_text`).
    """
    prompts: list[Prompt] = []
    problems: list[Problem] = []
    entries = [PromptEntry(f"sample.prompts.{number}", "", text) for number, text in enumerate(config.prompts)]
    if config.prompt_file is not None:
        try:
            entries += read_prompt_file(config.prompt_file)
        except ValueError as error:
            cure = "docs/SAMPLING.md shows prompt files" if config.prompt_file.exists() else CHECK_PATH
            problems.append(Problem(PROMPT_FILE_KEY, config.prompt_file, str(error), cure))
    try:
        validate_sampler(config.sampler, objective)
    except PromptError as error:
        problems.append(Problem("sample.sampler", config.sampler, str(error), error.cure))
    for key, location, content in entries:
        try:
            given = parse_object(content) if isinstance(content, dict) else parse_line(content)
            prompt = build_prompt(given, config, number=len(prompts))
            if with_fixed_text:
                prompt = replace(prompt, text=fix_text(prompt.text), negative=fix_text(prompt.negative))
            if "sampler" in given:
                validate_sampler(prompt.sampler, objective)
            if "schedule_type" in given and prompt.sampler not in OWN_SAMPLERS:
                cure = f"choose the sampler {' or '.join(OWN_SAMPLERS)}, or leave the schedule type out"
                raise PromptError(f"has a schedule type, but {prompt.sampler} has none", cure)
            prompts.append(prompt)
        except PromptError as error:
            problems.append(Problem(key, content, f"{location}{error}", error.cure))
    return prompts, problems


def build_prompt(given: dict[str, Any], config: SampleConfig, number: int) -> Prompt:
    """Build a prompt from the fields that its entry sets, with the settings as defaults."""
    defaults = {field.name: getattr(config, field.name, None) for field in fields(Prompt)}
    defaults |= {"negative": config.negative_prompt, "seed": config.seed + number}
    return Prompt(**{**defaults, **given})


def validate_sampler(name: str, objective: ObjectiveConfig) -> None:
    """Raise PromptError if the sampler of this name does not support the model's objective."""
    if objective.prediction == "flow" and name not in FLOW_SAMPLERS:
        cure = f"choose one of {', '.join(FLOW_SAMPLERS)}"
        raise PromptError(f"the sampler {name} does not support rectified flow", cure)
    if objective.zero_terminal_snr and name not in ZERO_SNR_SAMPLERS:
        cure = f"choose one of {', '.join(ZERO_SNR_SAMPLERS)}"
        raise PromptError(f"the sampler {name} does not support zero terminal SNR", cure)


def parse_line(line: str) -> dict[str, Any]:
    """Parse a prompt with kohya's flags, such as `a cat --n ugly --w 768`, into fields of `Prompt`.

    The prompt before its flags may be empty.

    Raises:
        PromptError: a flag is unknown, given twice, has an invalid value, or begins with another dash.
    """
    if changed := CHANGED_DASHES.search(f" {line}"):
        rule = f"has the flag {changed[1]}{changed[2]} with a word processor's dash"
        raise PromptError(rule, f"write --{changed[2]}")
    text, *words = re.split(r"\s--(?=\S)", f" {line}")
    given: dict[str, Any] = {"text": text.strip()}
    for word in words:
        flag, value = (*word.split(maxsplit=1), "")[:2]
        if flag not in FLAGS:
            near = suggest_name(flag.replace("-", "_"), FLAG_WORDS)
            known = ", ".join(f"--{name}" for name in FLAGS)
            cure = f"did you mean --{FLAG_WORDS[near]}?" if near else f"remove it; known flags are {known}"
            raise PromptError(f"has the unknown flag --{flag}", cure)
        _parse_into(given, FLAGS[flag], f"--{flag}", value.strip())
    return given


def parse_object(entry: dict[str, Any]) -> dict[str, Any]:
    """Parse a prompt in JSON into fields of `Prompt`. Raises PromptError."""
    if "prompt" not in entry:
        raise PromptError("has no `prompt`", 'add it, as "" for the empty prompt')
    given: dict[str, Any] = {}
    for key, value in entry.items():
        if key not in JSON_KEYS:
            near = suggest_name(key, JSON_KEYS)
            cure = f"did you mean {near}?" if near else f"remove it; known keys are {', '.join(JSON_KEYS)}"
            raise PromptError(f"has the unknown key `{key}`", cure)
        _parse_into(given, JSON_KEYS[key], f"`{key}`", value)
    return given


def read_prompt_file(file: Path) -> Iterator[PromptEntry]:
    """Yield the prompts of a file.

    Raises:
        ValueError: the file cannot be read, is malformed, or is of another kind than PROMPT_READERS.
    """
    read = PROMPT_READERS.get(file.suffix.lower())
    if read is None:
        raise ValueError(f"is not a file of prompts: its name must end in {', '.join(PROMPT_READERS)}")
    yield from read(file)


def read_text_prompts(file: Path) -> Iterator[PromptEntry]:
    """Yield the prompts of a text file, one per line; empty lines and comments (`#`) are skipped. Raises ValueError."""
    # Not `splitlines`, which also ends lines at characters that captions may contain, such as U+2028.
    lines = [(number, line.strip()) for number, line in enumerate(_read_file(file).split("\n"), start=1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not lines:
        raise ValueError("contains no prompt")
    for number, line in lines:
        yield PromptEntry(PROMPT_FILE_KEY, f"{file}:{number}: ", line)


def read_json_prompts(file: Path) -> Iterator[PromptEntry]:
    """Yield the prompts of a JSON file, a list of strings or objects. Raises ValueError."""
    try:
        contents = json.loads(_read_file(file), object_pairs_hook=_reject_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}:{error.colno}: malformed JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(contents, list) or not contents or not all(isinstance(each, (str, dict)) for each in contents):
        raise ValueError("is not a JSON list of prompts or objects with `prompt`")
    for number, content in enumerate(contents, start=1):
        yield PromptEntry(PROMPT_FILE_KEY, f"{file}, entry {number}: ", content)


def read_toml_prompts(file: Path) -> Iterator[PromptEntry]:
    """Yield the prompts of a TOML file: a table `[prompt]` with defaults, and a `[[prompt.subset]]` for each prompt.

    Raises:
        ValueError: the file cannot be read, or is malformed.
    """
    try:
        table = read_toml(file).get("prompt")
    except UserInputError as error:
        raise ValueError(error.problems[0].rule) from None
    subsets = table.get("subset") if isinstance(table, dict) else None
    if not isinstance(table, dict) or not isinstance(subsets, list) or not subsets:
        raise ValueError("has no [[prompt.subset]], the table of a prompt in kohya's TOML files")
    defaults = {key: value for key, value in table.items() if key != "subset"}
    for number, subset in enumerate(subsets, start=1):
        if not isinstance(subset, dict):
            raise ValueError(f"{file}, entry {number}: is not a table")
        yield PromptEntry(PROMPT_FILE_KEY, f"{file}, entry {number}: ", defaults | subset)


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object. Raises ValueError if a key occurs twice, of which JSON would keep the last one."""
    if len(dict(pairs)) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"has the key `{next(key for key in keys if keys.count(key) > 1)}` twice in an object")
    return dict(pairs)


def _read_file(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(describe_encoding(error)) from None


def _parse_into(given: dict[str, Any], field: PromptField, label: str, value: Any) -> None:
    if field.name in given:
        raise PromptError(f"has {label} twice", "remove one of them")
    try:
        given[field.name] = field.parse(value)
    except PromptError as error:
        raise PromptError(f"has {label} = {value!r:.60}, which {error}", error.cure) from None


PROMPT_READERS: dict[str, Callable[[Path], Iterator[PromptEntry]]] = {
    ".txt": read_text_prompts,
    ".json": read_json_prompts,
    ".toml": read_toml_prompts,
}
