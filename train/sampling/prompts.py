"""Prompts for generated images, from the settings and from prompt files in the format of kohya's scripts.

All problems are collected, each with its file and line, before a network is loaded.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from sdxl_trainer.configs.objective import ObjectiveConfig
from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.configs.samples import FLOW_SCHEDULERS, SCHEDULERS, ZERO_SNR_SCHEDULERS, SampleConfig

KEY = "sample.prompt_file"


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
    scheduler: str

    def describe(self) -> str:
        """Return the prompt in the form that most programs write into PNG files as `parameters`."""
        return (
            f"{self.text}\nNegative prompt: {self.negative}\nSteps: {self.num_inference_steps}, Sampler: "
            f"{self.scheduler}, CFG scale: {self.guidance_scale:g}, Seed: {self.seed}, "
            f"Size: {self.width_px}x{self.height_px}"
        )


class PromptEntry(NamedTuple):
    """A prompt as the settings or a prompt file hold it."""

    key: str  # the setting that it comes from
    place: str  # its file and line, as the start of a message; "" for a prompt of the settings
    content: str | dict[str, Any]  # a line with flags, or a JSON object


def parse_side(value: Any) -> int:
    """Parse a width or height in pixels. Raises ValueError."""
    side = parse_count(value)
    if side < 64 or side % 8:
        raise ValueError("is not a multiple of 8 of at least 64")
    return side


def parse_count(value: Any) -> int:
    """Parse a whole number of at least 1. Raises ValueError."""
    if (number := parse_seed(value)) < 1:
        raise ValueError("is not a whole number of at least 1")
    return number


def parse_seed(value: Any) -> int:
    """Parse a whole number of at least 0. Raises ValueError."""
    if isinstance(value, (bool, float)) or not re.fullmatch(r"\d{1,19}", str(value)):
        raise ValueError("is not a whole number of at least 0")
    return int(value)


def parse_scale(value: Any) -> float:
    """Parse a finite number of at least 0. Raises ValueError."""
    if isinstance(value, bool) or not re.fullmatch(r"\d+(\.\d*)?|\.\d+", str(value)):
        raise ValueError("is not a number of at least 0")
    return float(value)


def parse_prompt_text(value: Any) -> str:
    """Parse a text. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError("is not a text")
    return value.strip()


def parse_scheduler(value: Any) -> str:
    """Parse a scheduler: kohya's name, with or without `k_`, or diffusers' class name. Raises ValueError."""
    name = str(value).removeprefix("k_")
    names = {class_name: known for known, class_name in SCHEDULERS.items()}
    if name not in SCHEDULERS and name not in names:
        raise ValueError(f"is none of the schedulers {', '.join(SCHEDULERS)}")
    return names.get(name, name)


class PromptField(NamedTuple):
    """A field of `Prompt` that an entry may set."""

    name: str
    parse: Callable[[Any], Any]


# Fields by kohya's flag, and by the name in a JSON object.
FLAGS: dict[str, PromptField] = {
    "n": PromptField("negative", parse_prompt_text),
    "w": PromptField("width_px", parse_side),
    "h": PromptField("height_px", parse_side),
    "s": PromptField("num_inference_steps", parse_count),
    "l": PromptField("guidance_scale", parse_scale),
    "d": PromptField("seed", parse_seed),
    "ss": PromptField("scheduler", parse_scheduler),
}
NAMES: dict[str, PromptField] = {
    "prompt": PromptField("text", parse_prompt_text),
    "negative_prompt": FLAGS["n"],
    "width": FLAGS["w"],
    "height": FLAGS["h"],
    "sample_steps": FLAGS["s"],
    "scale": FLAGS["l"],
    "seed": FLAGS["d"],
    "sample_sampler": FLAGS["ss"],
}


def load_prompts(config: SampleConfig, objective: ObjectiveConfig) -> tuple[list[Prompt], list[Problem]]:
    """Load all prompts, and the problems of those that are wrong.

    A prompt without a seed of its own gets `sample.seed` plus its number.
    """
    prompts: list[Prompt] = []
    problems: list[Problem] = []
    entries = [PromptEntry(f"sample.prompts.{number}", "", text) for number, text in enumerate(config.prompts)]
    if config.prompt_file is not None:
        read = read_json_prompts if config.prompt_file.suffix.lower() == ".json" else read_text_prompts
        try:
            entries += read(config.prompt_file)
        except ValueError as error:
            cure = "see the setting in docs/CONFIG.md" if config.prompt_file.exists() else "check the path"
            problems.append(Problem(KEY, config.prompt_file, str(error), cure))
    try:
        validate_scheduler(config.scheduler, objective)
    except ValueError as error:
        problems.append(Problem("sample.scheduler", config.scheduler, str(error), "see docs/CONFIG.md"))
    for key, place, content in entries:
        try:
            given = parse_object(content) if isinstance(content, dict) else parse_line(content)
            prompt = build_prompt(given, config, number=len(prompts))
            if "scheduler" in given:
                validate_scheduler(prompt.scheduler, objective)
            prompts.append(prompt)
        except ValueError as error:
            cure = "flags: " + " ".join(f"--{flag}" for flag in FLAGS)
            problems.append(Problem(key, content, f"{place}{error}", cure))
    return prompts, problems


def build_prompt(given: dict[str, Any], config: SampleConfig, number: int) -> Prompt:
    """Build a prompt from the fields that its entry gives, with the settings as defaults."""
    defaults = {field.name: getattr(config, field.name, None) for field in fields(Prompt)}
    defaults |= {"negative": config.negative_prompt, "seed": config.seed + number}
    return Prompt(**{**defaults, **given})


def validate_scheduler(name: str, objective: ObjectiveConfig) -> None:
    """Raise ValueError if diffusers' scheduler of this name does not support the model's objective."""
    if objective.prediction == "flow" and name not in FLOW_SCHEDULERS:
        known = " or ".join(sorted(FLOW_SCHEDULERS))
        raise ValueError(f"the scheduler {name} does not support rectified flow; choose {known}")
    if objective.zero_terminal_snr and name not in ZERO_SNR_SCHEDULERS:
        known = ", ".join(sorted(ZERO_SNR_SCHEDULERS))
        raise ValueError(f"the scheduler {name} does not support zero terminal SNR; choose one of {known}")


def parse_line(line: str) -> dict[str, Any]:
    """Parse a prompt with kohya's flags, such as `a cat --n ugly --w 768`, into fields of `Prompt`.

    Raises:
        ValueError: a flag is unknown, given twice, or has an invalid value.
    """
    text, *words = re.split(r"\s--(?=\S)", f" {line}")
    given: dict[str, Any] = {"text": text.strip()}
    if words and not given["text"]:
        raise ValueError("has no prompt before its flags")
    for word in words:
        flag, _, value = word.partition(" ")
        if flag not in FLAGS:
            raise ValueError(f"has the unknown flag --{flag}")
        _parse_into(given, FLAGS[flag], f"--{flag}", value.strip())
    return given


def parse_object(entry: dict[str, Any]) -> dict[str, Any]:
    """Parse a prompt in JSON into fields of `Prompt`. Raises ValueError."""
    if not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        raise ValueError("has no `prompt`")
    given: dict[str, Any] = {}
    for name, value in entry.items():
        if name not in NAMES:
            raise ValueError(f"has the unknown name `{name}`; known names are {', '.join(NAMES)}")
        _parse_into(given, NAMES[name], f"`{name}`", value)
    return given


def read_text_prompts(file: Path) -> Iterator[PromptEntry]:
    """Yield the lines of a text file, without empty lines and comments (`#`). Raises ValueError."""
    lines = [(number, line.strip()) for number, line in enumerate(_read_file(file).splitlines(), start=1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not lines:
        raise ValueError("holds no prompt")
    for number, line in lines:
        yield PromptEntry(KEY, f"{file}:{number}: ", line)


def read_json_prompts(file: Path) -> Iterator[PromptEntry]:
    """Yield the entries of a JSON list of prompts or objects. Raises ValueError."""
    try:
        contents = json.loads(_read_file(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}:{error.colno}: malformed JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(contents, list) or not contents or not all(isinstance(each, (str, dict)) for each in contents):
        raise ValueError("is not a JSON list of prompts or objects with `prompt`")
    for number, content in enumerate(contents, start=1):
        yield PromptEntry(KEY, f"{file}, entry {number}: ", content)


def _read_file(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8: {error.reason} at byte {error.start}") from None


def _parse_into(given: dict[str, Any], field: PromptField, shown: str, value: Any) -> None:
    if field.name in given:
        raise ValueError(f"has {shown} twice")
    try:
        given[field.name] = field.parse(value)
    except ValueError as error:
        raise ValueError(f"has {shown} = {value!r:.60}, which {error}") from None
