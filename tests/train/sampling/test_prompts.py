"""Prompt files: kohya's flags, JSON, defaults from the settings, and a message with the location of each mistake."""

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from sdxl_trainer.configs.load import build_config
from sdxl_trainer.configs.objective import ObjectiveConfig
from sdxl_trainer.configs.problems import UserInputError
from sdxl_trainer.configs.samples import FLOW_SAMPLERS, SAMPLER_ALIASES, ZERO_SNR_SAMPLERS, SampleConfig, SamplerName
from sdxl_trainer.train.sampling.job import run_sampling
from sdxl_trainer.train.sampling.pipeline import assign_prompts
from sdxl_trainer.train.sampling.prompts import Prompt, load_prompts

SETTINGS = {"width_px": 512, "height_px": 768, "num_inference_steps": 20, "guidance_scale": 5.0, "seed": 40}
PLAIN = Prompt(
    text="", negative="dull", sampler="euler", schedule_type="normal", **SETTINGS
)  # every field is from SETTINGS
FULL = replace(PLAIN, width_px=1024, height_px=832, num_inference_steps=30, seed=9)  # with its own size, steps and seed


def load(prompts: list[str], file: Path | None = None, **objective) -> tuple[list[Prompt], list[str]]:
    config = SampleConfig(prompts=prompts, prompt_file=file, negative_prompt="dull", **SETTINGS)
    found, problems = load_prompts(config, ObjectiveConfig(**objective))
    return found, [f"{problem.key}: {problem.rule}; {problem.cure}" for problem in problems]


def test_flags_and_settings_make_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(
        "\ufeff# a comment\n\na cat, well-made -- really --n ugly, bad --w 1024 --h 832 --s 30 --l 7.5 --d 9\n"
        "  a dog --ss k_euler_a\na fox --ss dpmsolver++ --st karras\n"
    )
    prompts, problems = load(["a {mouse}, {b|c}", ""], file)
    assert problems == []
    assert prompts == [
        replace(PLAIN, text="a {mouse}, {b|c}", seed=40),
        replace(PLAIN, text="", seed=41),
        replace(FULL, text="a cat, well-made -- really", negative="ugly, bad", guidance_scale=7.5),
        replace(PLAIN, text="a dog", seed=43, sampler="euler_a"),
        replace(PLAIN, text="a fox", seed=44, sampler="dpmpp_2m", schedule_type="karras"),
    ]


def test_json_objects_and_settings_make_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    entry = {
        "prompt": "a cat",
        "negative_prompt": "",
        "width": 1024,
        "height": 832,
        "sample_steps": 30,
        "scale": 7,
        "seed": 9,
        "sample_sampler": "DDIMScheduler",
    }
    file.write_text(json.dumps([entry, "a dog --w 64", {"prompt": "a fox", "schedule_type": "simple"}]))
    prompts, problems = load([], file)
    assert problems == []
    assert prompts == [
        replace(FULL, text="a cat", negative="", guidance_scale=7.0, sampler="ddim"),
        replace(PLAIN, text="a dog", width_px=64, seed=41),
        replace(PLAIN, text="a fox", seed=42, schedule_type="simple"),
    ]


def test_prompts_of_kohyas_toml(tmp_path: Path) -> None:
    file = tmp_path / "prompts.TOML"
    file.write_text(
        "[prompt]\nwidth = 1024\nheight = 832\nscale = 7.5\n[[prompt.subset]]\nprompt = 'a cat'\nseed = 9\n"
        "sample_steps = 30\nnegative_prompt = ''\n[[prompt.subset]]\nprompt = 'a dog'\nheight = 64\n"
    )
    prompts, problems = load([], file)
    assert problems == []
    assert prompts == [
        replace(FULL, text="a cat", negative="", guidance_scale=7.5),
        replace(PLAIN, text="a dog", width_px=1024, height_px=64, guidance_scale=7.5, seed=41),
    ]


def test_only_newlines_end_the_lines_of_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("a\u2028b\x0bc\x85d\r\ne --w\t64 --n\xa0ugly".encode())
    prompts, problems = load([], file)
    assert problems == []
    assert prompts == [
        replace(PLAIN, text="a\u2028b\x0bc\x85d"),
        replace(PLAIN, text="e", width_px=64, negative="ugly", seed=41),
    ]


def test_the_empty_prompt_is_one_in_every_form(tmp_path: Path) -> None:
    expected = [replace(PLAIN, text="", width_px=64), replace(PLAIN, text="", negative="ugly", seed=41)]
    assert load(["--w 64", "--n ugly"]) == (expected, [])
    objects = [{"prompt": "", "width": 64}, {"prompt": " ", "negative_prompt": "ugly"}]
    subsets = "[[prompt.subset]]\nprompt = ''\nwidth = 64\n[[prompt.subset]]\nprompt = ''\nnegative_prompt = 'ugly'\n"
    for name, text in {
        "p.txt": "\n--w 64\n \n--n ugly\n",
        "p.json": json.dumps(objects),
        "q.json": json.dumps(["--w 64", "--n ugly"]),
        "p.toml": subsets,
    }.items():
        (tmp_path / name).write_text(text)
        assert load([], tmp_path / name) == (expected, []), name


@pytest.mark.parametrize("dash", ["\u2013", "\u2014", "\u2212", "\u2010\u2010", "-\u2013", "\u2013-", "\uff0d\uff0d"])
def test_a_dash_of_a_word_processor_is_named(dash: str) -> None:
    for flag in ("w", "ss", "st"):
        _, problems = load([f"a cat {dash}{flag} 64"])
        assert problems == [f"sample.prompts.0: has the flag {dash}{flag} with a word processor's dash; write --{flag}"]
    prompts, problems = load([f"a cat {dash} sleeping {dash}wild, well{dash}w 3"])
    assert problems == [] and len(prompts) == 1


@pytest.mark.parametrize("name", ["p.yaml", "p.csv", "p.md", "p"])
def test_a_prompt_file_of_an_unknown_kind_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("a cat\n")
    prompts, problems = load([], tmp_path / name)
    assert prompts == []
    rule = "sample.prompt_file: is not a file of prompts: its name must end in .txt, .json, .toml"
    assert [problem.startswith(rule) for problem in problems] == [True]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt = ", "is not valid TOML"),
        ("[prompt]\nprompt = 'a'", "has no [[prompt.subset]]"),
        ("prompt = 'a'", "has no [[prompt.subset]]"),
        ("[prompt]\nsubset = ['a']", ", entry 1: is not a table"),
        ("[prompt]\nstep = 3\n[[prompt.subset]]\nprompt = 'a'", ", entry 1: has the unknown key `step`"),
        ("[[prompt.subset]]\nwidth = 64", ", entry 1: has no `prompt`"),
    ],
)
def test_a_mistake_in_toml_is_reported_with_its_location(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "prompts.toml"
    file.write_text(content)
    _, problems = load([], file)
    assert len(problems) == 1 and message in problems[0], problems


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb --q 3", ":2: has the unknown flag --q"),
        ("a --q 3", "--q; remove it; known flags are --n, --w, --h, --s, --l, --d, --ss, --st"),
        ("a --W 64", "unknown flag --W; did you mean --w?"),
        ("a --width 64", "unknown flag --width; did you mean --w?"),
        ("a --negative-prompt b", "unknown flag --negative-prompt; did you mean --n?"),
        ("a --cfg_scale 3", "unknown flag --cfg_scale; did you mean --l?"),
        ("a --sampler euler", "unknown flag --sampler; did you mean --ss?"),
        ("a --w 100", ":1: has --w = '100', which is not a multiple of 8; write 96 or 104"),
        ("a --h 8", ":1: has --h = '8', which is below 64; write 64 or more, in multiples of 8"),
        ("a --w", ":1: has --w = '', which is not a whole number of at least 0; write a multiple of 8 from 64 on"),
        ("a --s 0", "--s = '0', which is not a whole number of at least 1; write a number of steps from 1 to 1000"),
        ("a --d -1", "--d = '-1', which is not a whole number of at least 0; write a seed such as 42"),
        ("a --l x", "--l = 'x', which is not a number of at least 0; write a guidance scale such as 7.5"),
        ("a --l inf", "--l = 'inf', which is not a number"),
        ("a --ss best", "is none of euler, dpmpp_2m, euler_a"),
        ("a --ss dpmpp_2n", "unipc; did you mean dpmpp_2m?"),
        ("a --ss best", "euler_a, heun, dpm_2, dpm_2_a, dpmsingle, ddim, ddpm, pndm, deis, unipc; write one of these"),
        ("a --ss karras", "is no sampler but a schedule type; write --st karras"),
        (
            "a --st kaRas",
            "which is none of normal, karras, exponential, simple, sgm_uniform; did you mean karras?",
        ),
        ("a --ss ddim --st simple", "has a schedule type, but ddim has none; choose the sampler euler or dpmpp_2m"),
        ("a --s 1001", "--s = '1001', which is above 1000, the timesteps of the model"),
        ("a --d 1 --d 2", "has --d twice; remove one of them"),
        ("# nothing\n", "contains no prompt"),
        (b"\xff\xfe", "is not UTF-8"),
        ("[", ".json:1:2: malformed JSON"),
        ("{}", "is not a JSON list"),
        pytest.param("[" * 100_000, "is nested too deeply", id="deep"),
        ("[3]", "is not a JSON list"),
        ('["a", {"text": "b"}]', ', entry 2: has no `prompt`; add it, as "" for the empty prompt'),
        ('[{"prompt": 3}]', ", entry 1: has `prompt` = 3, which is not a string; write a text in quotes"),
        ('[{"prompt": "b", "widht": 64}]', "has the unknown key `widht`; did you mean width?"),
        (
            '[{"prompt": "b", "colour": 3}]',
            ", entry 1: has the unknown key `colour`; remove it; known keys are prompt, negative_prompt",
        ),
        ('[{"prompt": "b", "seed": 1, "seed": 2}]', "has the key `seed` twice"),
        ('[{"prompt": "b", "width": 64.5}]', "has `width` = 64.5, which is not a whole number"),
        ('[{"prompt": "b", "scale": true}]', "has `scale` = True, which is not a number"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_mistake_is_reported_with_its_location(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    is_json = isinstance(content, str) and content[0] in "[{"
    file = tmp_path / ("prompts.json" if is_json else "prompts.txt")
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    _, problems = load([], file)
    assert len(problems) == 1 and problems[0].startswith("sample.prompt_file: ") and message in problems[0], problems


def test_the_cure_for_a_missing_file_is_to_check_the_path(tmp_path: Path) -> None:
    _, problems = load_prompts(SampleConfig(prompt_file=tmp_path / "absent.txt"), ObjectiveConfig())
    assert [problem.cure for problem in problems] == ["check the path (relative to the working directory)"]


def test_the_sampling_program_names_its_option(tmp_path: Path) -> None:
    """An override of `sample.prompt_file` keeps the name of the setting."""
    file = tmp_path / "prompts.txt"
    file.write_text("a --w 100\n")
    for overrides, keys in (([], ["--prompts"]), ([f"sample.prompt_file={tmp_path / 'p'}"], ["sample.prompt_file"])):
        with pytest.raises(UserInputError) as caught:
            run_sampling("no/model", file, tmp_path / "out", None, overrides)
        found = [problem.key for problem in caught.value.problems]
        assert [key for key in found if key in ("--prompts", "sample.prompt_file")] == keys, found


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a --w 3\nb\nc --x\n")
    prompts, problems = load(["d --y"], file)
    assert [prompt.text for prompt in prompts] == ["b"]
    assert [problem.split(":")[0] for problem in problems] == ["sample.prompts.0", *["sample.prompt_file"] * 2]


@pytest.mark.parametrize(
    ("objective", "supported", "message"),
    [
        ({"prediction": "v", "zero_terminal_snr": True}, ZERO_SNR_SAMPLERS, "does not support zero terminal SNR"),
        ({"prediction": "flow"}, FLOW_SAMPLERS, "does not support rectified flow"),
    ],
)
def test_a_sampler_must_support_the_objective(objective: dict, supported: tuple[str, ...], message: str) -> None:
    for name in get_args(SamplerName):
        _, problems = load([f"a --ss {name}"], **objective)
        assert problems == [] if name in supported else message in problems[0], name


def test_samplers_are_known_by_their_names_in_other_programs() -> None:
    """As a flag, and as the setting, which an earlier version called `sample.scheduler`."""
    for alias, name in SAMPLER_ALIASES.items():
        prompts, problems = load([f"a --ss {alias}"])
        assert problems == [] and prompts[0].sampler == name
        config, problems = build_config({}, [f"sample.scheduler={alias}"])
        assert problems == [] and config.sample.sampler == name


@pytest.mark.parametrize(
    ("words", "key", "hint"),
    [
        ("sample.sampler=karras", "sample.sampler", "set sample.schedule_type to karras"),
        ("sample.sampler=dpmpp_2n", "sample.sampler", "did you mean dpmpp_2m?"),
        ("sample.schedule_type=kerras", "sample.schedule_type", "did you mean karras?"),
        ("sample.sampler=ddim sample.schedule_type=karras", "sample.schedule_type", "set that to euler or dpmpp_2m"),
        ("sample.num_inference_steps=1001", "sample.num_inference_steps", "1000"),
        ("sample.guidance_rescale=7", "sample.guidance_rescale", "1"),
    ],
)
def test_a_wrong_sampler_is_explained(words: str, key: str, hint: str) -> None:
    [problem] = build_config({}, words.split())[1]
    assert problem.key == key and hint in f"{problem.rule} {problem.cure}"


def test_prompts_are_assigned_to_ranks() -> None:
    prompts, _ = load([f"p --s {steps}" for steps in (1, 2, 1, 1, 2, 3)])
    assert [assign_prompts(prompts, rank, 4, in_lockstep=False) for rank in range(4)] == [[0, 4], [1, 5], [2], [3]]
    for world_size in (1, 2, 3, 5):
        shares = [assign_prompts(prompts, rank, world_size, in_lockstep=True) for rank in range(world_size)]
        assert {number for share in shares for number in share} == set(range(6))
        for turn in zip(*shares, strict=True):  # in each turn all ranks make the same number of forward passes
            assert len({prompts[number].num_inference_steps for number in turn}) == 1


def test_prompts_are_cleaned_as_captions_are() -> None:
    config = SampleConfig(prompts=["“a” --n ﬁne"])
    for with_fixed_text, expected in ((True, ('"a"', "fine")), (False, ("“a”", "ﬁne"))):
        [prompt], _ = load_prompts(config, ObjectiveConfig(), with_fixed_text)
        assert (prompt.text, prompt.negative) == expected
