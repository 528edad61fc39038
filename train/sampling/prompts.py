"""Prompts to draw: from the settings, and from prompt files as kohya's scripts read them.

All that is wrong with them is collected, each with its file and line, before any network is loaded.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sdxl_trainer.configs.objective import ObjectiveConfig
from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.configs.samples import FLOW_SCHEDULERS, SCHEDULERS, ZERO_SNR_SCHEDULERS, SampleConfig

KEY = "sample.prompt_file"


@dataclass(frozen=True)
class Prompt:
    """All that decides an image, besides the model."""

    text: str
    negative: str
    width_px: int
    height_px: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    scheduler: str

    def describe(self) -> str:
        """In the form that most programs write into their PNG files."""
        return (
            f"{self.text}\nNegative prompt: {self.negative}\nSteps: {self.num_inference_steps}, Sampler: "
            f"{self.scheduler}, CFG scale: {self.guidance_scale:g}, Seed: {self.seed}, "
            f"Size: {self.width_px}x{self.height_px}"
        )


def parse_side(value: Any) -> int:
    """An image's side. Raises ValueError."""
    side = parse_count(value)
    if side < 64 or side % 8:
        raise ValueError("is not a multiple of 8 from 64 on")
    return side


def parse_count(value: Any) -> int:
    """A whole number from 1 on. Raises ValueError."""
    if (number := parse_seed(value)) < 1:
        raise ValueError("is not a whole number from 1 on")
    return number


def parse_seed(value: Any) -> int:
    """A whole number from 0 on. Raises ValueError."""
    if isinstance(value, (bool, float)) or not re.fullmatch(r"\d{1,19}", str(value)):
        raise ValueError("is not a whole number from 0 on")
    return int(value)


def parse_scale(value: Any) -> float:
    """A finite number from 0 on. Raises ValueError."""
    if isinstance(value, bool) or not re.fullmatch(r"\d+(\.\d*)?|\.\d+", str(value)):
        raise ValueError("is not a number from 0 on")
    return float(value)


def parse_text(value: Any) -> str:
    """A text. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError("is not a text")
    return value.strip()


def parse_scheduler(value: Any) -> str:
    """The name of a scheduler: kohya's, with or without `k_`, or that of the class. Raises ValueError."""
    name = str(value).removeprefix("k_")
    classes = {kind: known for known, kind in SCHEDULERS.items()}
    if name not in SCHEDULERS and name not in classes:
        raise ValueError(f"is none of the schedulers {', '.join(SCHEDULERS)}")
    return classes.get(name, name)


# Of each flag and of each name in JSON: the field of Prompt and how its value is read.
FLAGS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "n": ("negative", parse_text),
    "w": ("width_px", parse_side),
    "h": ("height_px", parse_side),
    "s": ("num_inference_steps", parse_count),
    "l": ("guidance_scale", parse_scale),
    "d": ("seed", parse_seed),
    "ss": ("scheduler", parse_scheduler),
}
NAMES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "prompt": ("text", parse_text),
    "negative_prompt": FLAGS["n"],
    "width": FLAGS["w"],
    "height": FLAGS["h"],
    "sample_steps": FLAGS["s"],
    "scale": FLAGS["l"],
    "seed": FLAGS["d"],
    "sample_sampler": FLAGS["ss"],
}


def load_prompts(config: SampleConfig, objective: ObjectiveConfig) -> tuple[list[Prompt], list[Problem]]:
    """All prompts to draw, and what is wrong with any. One without a seed of its own gets `sample.seed` + number."""
    prompts: list[Prompt] = []
    problems: list[Problem] = []
    entries: list[tuple[str, str, Any]] = [
        (f"sample.prompts.{number}", "", text) for number, text in enumerate(config.prompts)
    ]
    if config.prompt_file is not None:
        read = read_json if config.prompt_file.suffix.lower() == ".json" else read_lines
        try:
            entries += [(KEY, place, entry) for place, entry in read(config.prompt_file)]
        except ValueError as error:
            cure = "see the setting in docs/CONFIG.md" if config.prompt_file.exists() else "check the path"
            problems.append(Problem(KEY, config.prompt_file, str(error), cure))
    try:
        validate_scheduler(config.scheduler, objective)
    except ValueError as error:
        problems.append(Problem("sample.scheduler", config.scheduler, str(error), "see docs/CONFIG.md"))
    for key, place, entry in entries:
        try:
            given = parse_object(entry) if isinstance(entry, dict) else parse_line(entry)
            prompt = build_prompt(given, config, number=len(prompts))
            if "scheduler" in given:
                validate_scheduler(prompt.scheduler, objective)
            prompts.append(prompt)
        except ValueError as error:
            problems.append(Problem(key, entry, f"{place}{error}", "flags: " + " ".join(f"--{flag}" for flag in FLAGS)))
    return prompts, problems


def build_prompt(given: dict[str, Any], config: SampleConfig, number: int) -> Prompt:
    """A prompt from what its entry gives, and from the settings for the rest."""
    defaults = {field.name: getattr(config, field.name, None) for field in fields(Prompt)}
    defaults |= {"negative": config.negative_prompt, "seed": config.seed + number}
    return Prompt(**{**defaults, **given})


def validate_scheduler(name: str, objective: ObjectiveConfig) -> None:
    """Raise ValueError if diffusers' scheduler of that name cannot follow what the model predicts."""
    if objective.prediction == "flow" and name not in FLOW_SCHEDULERS:
        raise ValueError(f"the scheduler {name} cannot follow a flow; choose {' or '.join(sorted(FLOW_SCHEDULERS))}")
    if objective.zero_terminal_snr and name not in ZERO_SNR_SCHEDULERS:
        known = ", ".join(sorted(ZERO_SNR_SCHEDULERS))
        raise ValueError(f"the scheduler {name} does not know zero terminal SNR; choose one of {known}")


def parse_line(line: str) -> dict[str, Any]:
    """Fields of a prompt with kohya's flags: `a cat --n ugly --w 768`.

    Raises:
        ValueError: a flag is unknown, stands twice, or has no sound value.
    """
    text, *words = re.split(r"\s--(?=\S)", f" {line}")
    given: dict[str, Any] = {"text": text.strip()}
    if words and not given["text"]:
        raise ValueError("has no prompt before its flags")
    for word in words:
        flag, _, value = word.partition(" ")
        if flag not in FLAGS:
            raise ValueError(f"has the unknown flag --{flag}")
        _read_into(given, *FLAGS[flag], f"--{flag}", value.strip())
    return given


def parse_object(entry: dict[str, Any]) -> dict[str, Any]:
    """Fields of a prompt in JSON. Raises ValueError."""
    if not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        raise ValueError("has no `prompt`")
    given: dict[str, Any] = {}
    for name, value in entry.items():
        if name not in NAMES:
            raise ValueError(f"has the unknown name `{name}`; known are {', '.join(NAMES)}")
        _read_into(given, *NAMES[name], f"`{name}`", value)
    return given


def read_lines(file: Path) -> Iterator[tuple[str, str]]:
    """(place, prompt) of each line that is not empty and no comment. Raises ValueError."""
    prompts = [
        (f"{file}:{number}: ", line.strip())
        for number, line in enumerate(_read_file(file).splitlines(), start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not prompts:
        raise ValueError("holds no prompt")
    return iter(prompts)


def read_json(file: Path) -> Iterator[tuple[str, str | dict[str, Any]]]:
    """(place, prompt with flags or object) of each entry of a JSON list. Raises ValueError."""
    try:
        entries = json.loads(_read_file(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}:{error.colno}: malformed JSON: {error.msg}") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, (str, dict)) for entry in entries):
        raise ValueError("is not a JSON list of prompts or objects with `prompt`")
    return iter([(f"{file}, entry {number}: ", entry) for number, entry in enumerate(entries, start=1)])


def _read_file(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8: {error.reason} at byte {error.start}") from None


def _read_into(given: dict[str, Any], name: str, read: Callable[[Any], Any], shown: str, value: Any) -> None:
    if name in given:
        raise ValueError(f"has {shown} twice")
    try:
        given[name] = read(value)
    except ValueError as error:
        raise ValueError(f"has {shown} = {value!r:.60}, which {error}") from None
