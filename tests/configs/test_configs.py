"""Settings: all problems are reported together with key, value and cure, and correct settings are kept."""

import argparse
import importlib.util
import math
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from programs import ROOT

from sdxl_trainer.configs.document import build_page
from sdxl_trainer.configs.load import (
    PATTERN_RULES,
    SEE_ALSO,
    build_config,
    dump_config,
    iterate_keys,
    iterate_sections,
    load_config,
    suggest_key,
)
from sdxl_trainer.configs.paths import IS_PATH, parse_path
from sdxl_trainer.configs.problems import (
    Problem,
    UserInputError,
    describe_encoding,
    format_count,
    format_rate,
    format_value,
    parse_count,
)
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.configs.section import OwnCodeName, holds_type
from sdxl_trainer.configs.yaml_file import dump_yaml, load_yaml
from sdxl_trainer.data.checks.records import check_data_settings
from sdxl_trainer.data.index.selection import get_cache_folder
from sdxl_trainer.data.packages import list_missing_packages
from sdxl_trainer.launch.program import build_parser

PAGE = "docs/FROM_KOHYA.md explains how to convert kohya's"
PRESETS = sorted((ROOT / "configs").glob("*.yaml"))
KOHYA_SUGGESTIONS = {
    "learning_rate": "optim.lr",
    "train.learning_rate": "optim.lr",
    "optim.optimizer_type": "optim.name",
    "objective.min_snr_gamma": "objective.weighting",
    "data.train_data_dir": "data.image_dirs",
    "lora.network_dim": "lora.rank",
    "model.pretrained_model_name_or_path": "model.path",
    "train.gradient_accumulation_steps": "train.global_batch_size",
}


def load(folder: Path, text: str, *overrides: str):
    path = folder / "x.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def list_fields(model=Config, prefix: str = "") -> dict:
    """Return the fields of all settings by dotted key."""
    sections = dict(iterate_sections(model))
    fields = {prefix + name: field for name, field in model.model_fields.items() if name not in sections}
    for name, section in sections.items():
        fields |= list_fields(section, f"{prefix}{name}.")
    return fields


FIELDS = list_fields()
PATHS = [
    key
    for key, field in FIELDS.items()
    if (IS_PATH in field.metadata and OwnCodeName not in get_args(field.annotation))
    or holds_type(field.annotation, Path)
]
OPTIONAL_TEXTS = [
    key
    for key, field in FIELDS.items()
    if holds_type(field.annotation, type(None)) and holds_type(field.annotation, str, Path)
]


def get(config: Config, key: str):
    for name in key.split("."):
        config = getattr(config, name)
    return config


def nest(key: str, text: str) -> str:
    """Return YAML that sets a dotted key."""
    for name in reversed(key.split(".")):
        text = f"{{{name}: {text}}}"
    return text


def list_problems(folder: Path, text: str, *overrides: str) -> list[tuple]:
    return [(problem.key, problem.value, problem.cure) for problem in load(folder, text, *overrides)[1]]


def test_file_urls_of_metadata_are_the_paths_they_name(tmp_path: Path) -> None:
    text = "{metadata: ['file:///set/{0..9}.json', 's3://set/a.json', b.json]}"
    config, problems = load(tmp_path, f"data: {text}\nvalidation: {text}")
    assert problems == []
    expected = ["/set/{0..9}.json", "s3://set/a.json", "b.json"]
    assert [*map(str, config.data.metadata)] == [*map(str, config.validation.metadata)] == expected
    assert get_cache_folder(config) == Path("/set")
    data = config.data.model_copy(update={"metadata": config.data.metadata[:1]})
    assert {problem.key for problem in check_data_settings(data, None)} == {"data.metadata.0"}  # not cache.dir


@pytest.mark.parametrize(
    ("text", "key", "value", "cure"),
    [
        ("train: {max_step: 3}", "train.max_step", 3, "did you mean train.max_steps?"),
        ("train: {lr: 1}", "train.lr", 1, "did you mean optim.lr?"),  # right key, wrong section
        ("optm: {lr: 1}", "optm", {"lr": 1}, "did you mean optim?"),
        ("optim: {learning_rate: 1}", "optim.learning_rate", 1, "did you mean optim.lr?"),  # kohya's names
        (
            "train: {batch_size: 1}",
            "train.batch_size",
            1,
            f"did you mean train.micro_batch_size? {PAGE} batch_size",
        ),
        (
            "train: {dataset_repeats: 2}",
            "train.dataset_repeats",
            2,
            "leave it out; kohya's dataset_repeats has no setting here: repeats all images; train more steps instead",
        ),
        ("train: {resume: a}", "train.resume", "a", "did you mean run.resume?"),  # not kohya's option
        ("train: {qqqqqq: 1}", "train.qqqqqq", 1, "see docs/CONFIG.md for the known keys"),
        ("train: {max_steps: many}", "train.max_steps", "many", "write digits, without units and separators"),
        ("train: {max_steps: 1.5}", "train.max_steps", 1.5, "write it without a fraction"),
        ("train: {max_steps: true}", "train.max_steps", True, SEE_ALSO),
        ("optim: {lr: yes}", "optim.lr", True, SEE_ALSO),
        ("optim: {betas: [0.9, on]}", "optim.betas", [0.9, True], SEE_ALSO),
        ("engine: {zero_stage: true}", "engine.zero_stage", True, SEE_ALSO),
        ("train: {max_steps: 0}", "train.max_steps", 0, f"change it; {SEE_ALSO}"),
        ("optim: {lr: .inf}", "optim.lr", math.inf, "write digits, such as 0.1 or 1e-5"),
        (
            "optim: {lr: “1e-4”}",
            "optim.lr",
            "“1e-4”",
            "write brackets, commas and quotation marks of half width, not “",
        ),
        (
            "lora: {dropout: 0.1}",
            "lora.dropout",
            0.1,
            "see docs/CONFIG.md for the known keys",
        ),  # no dropout of captions
        ("optim: {schedule: cosin}", "optim.schedule", "cosin", "did you mean cosine?"),
        ("engine: {zero_stage: 4}", "engine.zero_stage", 4, "choose one of them"),
        ("data: {metadata: 7.5}", "data.metadata", 7.5, "write it between brackets: [7.5]"),
        (
            "train: 5",
            "train",
            5,
            "write each on a line of its own, indented, with a colon (:) of half width and a space after it",
        ),
        ("1: 2", "1", 1, "docs/CONFIG.md lists the names"),
        ("data: {max_tokens: 100}", "data.max_tokens", 100, f"change it; {SEE_ALSO}"),
        ("data: {max_tokens: 0}", "data.max_tokens", 0, f"change it; {SEE_ALSO}"),
        ("data: {min_bucket_px: 1024, resolution_px: 512}", "data", None, SEE_ALSO),
    ],
)
def test_a_wrong_setting_is_reported_and_left_at_its_default(tmp_path, text, key, value, cure):
    config, problems = load(tmp_path, text)
    assert [(problem.key, problem.value, problem.cure) for problem in problems] == [(key, value, cure)]
    assert config == Config()


def test_all_problems_are_reported_at_once_and_the_rest_is_kept(tmp_path):
    text = "data: {resolution_px: 64, num_worker: 1}\ntrain: {max_steps: 0, global_batch_size: 6}\n"
    text += "run: {seed: -1, name: a}"
    config, problems = load(tmp_path, text, "optim.lr=fast", "nonsense", "objectve.prediction=v")
    assert {problem.key for problem in problems} == {
        "nonsense",
        "run.seed",
        "data.num_worker",
        "train.max_steps",
        "optim.lr",
        "objectve",
        "data",
    }
    assert len(problems) == 7
    assert (config.run.name, config.train.global_batch_size) == ("a", 6)
    message = str(UserInputError(problems))
    assert message.startswith("7 problems in the settings:")
    assert "  - data.num_worker = 1\n      is not a known key\n      cure: did you mean data.num_workers?" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {name: a}\nrun: {name: b}", "key 'run' is given twice"),
        ("run:\n  name: a\n  seed: 1\n  name: b", "line 4"),
        ("run: [a", "line 1"),
        ("run: [a\n", "line 1, column 6"),
        (
            "run:\n  name\n  seed: 1\ntrain: {}",
            "is not valid YAML: line 3, column 7: mapping values are not allowed here",
        ),
        ("run:\n  name: a\n  seed 1\ntrain: {}", "is not valid YAML: line 3, column 3: could not find expected ':'"),
        ("run: {name: a}\n\tb: 3", "line 2"),
        ("[a, b]: 1", "a key must be a word"),
        ("- a", "must be a mapping"),
        ("just words", "must be a mapping"),
    ],
)
def test_a_file_that_is_not_a_mapping_is_rejected(tmp_path, text, message):
    with pytest.raises(UserInputError, match=message) as caught:
        load(tmp_path, text)
    assert [problem.key for problem in caught.value.problems] == ["--cfg"]
    assert "unicode string" not in str(caught.value) and "\\n" not in str(caught.value)


def test_missing_and_binary_files_are_rejected(tmp_path):
    with pytest.raises(UserInputError, match="No such file"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "x.yaml").write_bytes("run: {name: 红色的猫}".encode("gb18030"))
    with pytest.raises(UserInputError, match="is not UTF-8, but probably gb18030"):
        load_config(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("一只猫，坐在垫子上", "gb18030"),
        ("1girl, 长发", "gb18030"),
        ("かわいい猫、座っている", "shift_jis"),
        ("une café, près de la fenêtre", "latin1"),
        ("a cat", "UTF-16"),
    ],
)
def test_the_likely_encoding_of_a_text_is_named(text, encoding):
    with pytest.raises(UnicodeDecodeError) as caught:
        text.encode(encoding).decode("utf-8")
    cure = f"iconv -f {encoding} -t UTF-8 FILE > NEW"
    assert describe_encoding(caught.value) == f"is not UTF-8, but probably {encoding}; convert it: {cure}"


def test_values_in_messages_are_those_of_yaml():
    values = [None, True, 0.1, math.inf, "a b", ["a", None], {"b": False}, (1, 2), Path("/x")]
    shown = ["null", "true", "0.1", ".inf", "'a b'", "['a', null]", "{b: false}", "[1, 2]", "'/x'"]
    assert [format_value(value) for value in values] == shown
    assert [load_yaml(text) for text in shown[:-2]] == values[:-2]


def test_overrides_take_precedence_over_the_file(tmp_path):
    words = [
        "train.max_steps=5",
        "optim.lr=1e-5",
        "sample.prompts=[a, 'b, c']",
        "engine.deepspeed.zero.x=1",
        "model.path=a=b",
    ]
    config, problems = load(tmp_path, "train: {max_steps: 7, micro_batch_size: 3}\nsample:\n", *words)
    assert problems == []
    assert (config.train.max_steps, config.train.micro_batch_size, config.optim.lr) == (5, 3, 1e-5)
    assert (config.sample.prompts, config.model.path) == (["a", "b, c"], "a=b")
    assert config.engine.deepspeed == {"zero": {"x": 1}}


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("nonsense", "nonsense"),
        ("=3", "=3"),
        ("run.name=[", "run.name"),
        ("train.max_steps.x=3", "train.max_steps"),
        ("trian.max_steps=3", "trian"),
        ("optim.lr=", "optim.lr"),
        ("run.name=..", "run.name"),  # the folder above all runs
    ],
)
def test_a_wrong_override_is_reported(tmp_path, word, key):
    assert [problem[0] for problem in list_problems(tmp_path, "", word)] == [key]


def test_yaml_anchors_and_merges_work(tmp_path):
    config, problems = load(tmp_path, "run: &a {name: x, seed: 3}\nengine:\n  deepspeed:\n    <<: *a\n    name: y")
    assert problems == []
    assert config.engine.deepspeed == {"name": "y", "seed": 3}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_every_preset_can_be_loaded_saved_and_loaded_again(tmp_path, path):
    config, problems = load_config(path)
    assert problems == []
    assert config != Config()
    (tmp_path / "saved.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "saved.yaml") == (config, [])


def test_special_characters_and_null_are_kept_when_saved(tmp_path):
    text = "run: {name: a.b-c}\nsample: {prompts: ['ein Mädchen: \"x\" # y', '']}\ncache: {dir: ~}"
    config, problems = load(tmp_path, text)
    assert problems == []
    (tmp_path / "saved.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "saved.yaml") == (config, [])


def test_the_page_of_settings_is_current():
    page = build_page()
    assert (ROOT / "docs" / "CONFIG.md").read_text() == page, "python -m sdxl_trainer.configs.document > docs/CONFIG.md"
    leaves = [key for key in iterate_keys() if "." in key]
    assert len(leaves) > 40
    assert [key for key in leaves if f"| `{key}` |" not in page] == []
    # Every setting is explained: no row ends in an empty cell.
    assert [line for line in page.splitlines() if line.startswith("| `") and line.endswith("|  |")] == []
    chinese, command = build_page("zh"), "python -m sdxl_trainer.configs.document --language zh > docs/zh/CONFIG.md"
    assert (ROOT / "docs" / "zh" / "CONFIG.md").read_text() == chinese, command
    assert re.findall(r"^(?:#+|\| `[\w.]+`)", chinese, re.M) == re.findall(r"^(?:#+|\| `[\w.]+`)", page, re.M)


def test_suggested_keys_exist():
    assert suggest_key("checkpoint.keep_latest") == "checkpoint.keep_last"
    assert suggest_key("learning_rte") == ""
    assert {key: suggest_key(key) for key in KOHYA_SUGGESTIONS} == KOHYA_SUGGESTIONS
    known = set(iterate_keys())
    assert all(suggest_key(key[:-1]) in known for key in known if "." in key and len(key.rsplit(".")[-1]) > 4)


def test_a_single_value_is_wrapped_in_a_list():
    config, problems = build_config({}, ["data.image_dirs=../images", "data.resolution_px=512"])
    assert problems == [] and config.data.image_dirs == [Path("../images")] and config.data.resolution_px == [512]


def test_a_long_path_in_a_problem_keeps_its_end() -> None:
    shown = str(Problem("model.path", Path("/data") / ("x" * 200) / "model.safetensors", "is not there"))
    assert "'/data/xxx" in shown and "xxx/model.safetensors'" in shown and "..." in shown and len(shown) < 150


def test_counts_in_messages_are_singular_for_one() -> None:
    assert [format_count(count, "rank") for count in (0, 1, 2, 2000)] == ["0 ranks", "1 rank", "2 ranks", "2,000 ranks"]
    assert [format_count(count, "batch", "batches") for count in (1, 3)] == ["1 batch", "3 batches"]
    rates = {
        0: "-",
        math.nan: "-",
        1500: "1,500 images/s",
        12.34: "12.3 images/s",
        1: "1.0 images/s",
        0.4: "2.5 s/image",
    }
    assert [format_rate(rate) for rate in rates] == list(rates.values())
    assert format_rate(0.0004, "step") == "2,500 s/step"


def test_zero_and_an_empty_list_turn_off_what_a_preset_asks_for() -> None:
    preset = {
        "validation": {"share": 0.01, "every_steps": 5, "at_start": True},
        "sample": {"prompts": ["a"], "every_steps": 5},
    }
    config, problems = build_config(preset, ["validation.share=0", "sample.prompts=[]"])
    assert problems == [] and (config.validation.every_steps, config.sample.every_steps) == (0, 0)
    assert not config.validation.at_start
    for words in (
        ["validation.every_steps=5"],
        ["sample.every_steps=5"],
    ):  # without samples or prompts at all: an error
        assert [problem.key for problem in build_config({}, words)[1]] == [words[0].split("=")[0]]


@pytest.mark.skipif(bool(importlib.util.find_spec("xformers") or importlib.util.find_spec("wandb")), reason="installed")
def test_packages_that_training_needs_are_listed() -> None:
    words = ["engine.attention=xformers", "log.wandb=mine", "lora.rank=4", "optim.name=adamw"]
    missing = {"engine.attention: xformers": "xformers", "log.wandb: mine": "wandb"}
    assert list_missing_packages(build_config({}, words)[0]) == missing
    assert str(UserInputError([Problem("a", 1, "b")])).startswith("1 problem in the settings:")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["objective.prediction=v_prediction", "objective.zero_terminal_snr=true"], "objective.prediction"),
        (["data.max_bucket=4096", "data.resolution_px=3000"], "data.max_bucket"),
        (["validation.shar=0.1", "validation.every_steps=5"], "validation.shar"),
        (["model.latents_mean=[0]", "model.latents_std=[0]"], "model.latents_std"),  # refused by a rule of the project
    ],
)
def test_the_default_of_a_wrong_setting_contradicts_nothing(tmp_path: Path, words: list[str], key: str) -> None:
    """The setting that was meant has its default now, of which the user knows nothing."""
    assert [problem[0] for problem in list_problems(tmp_path, "", *words)] == [key]


def test_counts_of_a_command_line_are_whole_numbers() -> None:
    assert parse_count("12") == 12 and parse_count("0", least=0) == 0
    for text in ("0", "-1", "1.5", "many", "", "1e3"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not a whole number of at least 1"):
            parse_count(text)


def test_the_settings_that_are_paths_are_known():
    assert {"run.dir", "model.path", "model.vae", "data.metadata", "data.masks", "data.strategy", "cache.dir"} <= {
        *PATHS
    }
    assert {f"data.caption.{name}" for name in ("aliases", "implications", "protected_tags_file")} <= {*PATHS}
    assert {"model.vae", "model.config", "cache.dir", "log.wandb", "sample.prompt_file"} <= {*OPTIONAL_TEXTS}


@pytest.mark.parametrize("word", ["none", "None", "null", "~", '""', "'~'", "' none '"])
@pytest.mark.parametrize("key", OPTIONAL_TEXTS)
def test_every_optional_text_is_null_by_any_word_for_it(tmp_path, key, word):
    given = nest(key, "x")
    assert get(load(tmp_path, given, f"{key}={word}")[0], key) is None
    config, problems = load(tmp_path, nest(key, word))
    assert (get(config, key), problems) == (None, [])


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("path", ["~/a", "$DATA/a", "${DATA}/a"])
def test_every_path_is_expanded(tmp_path, monkeypatch, key, path):
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.setenv("DATA", "/home/x")
    is_list = isinstance(FIELDS[key].default, list)
    for text in [f"'{path}'", f"['{path}', b]"][: 1 + is_list]:
        value = get(load(tmp_path, nest(key, text))[0], key)
        assert str(value[0] if is_list else value) == "/home/x/a"


@pytest.mark.parametrize(
    ("path", "rule", "cure"),
    [
        ("$ABSENT/a", "names the environment variable ABSENT, which is not set", "export it, or write the path"),
        ("/a/${EMPTY}", "names the environment variable EMPTY, which is not set", "export it, or write the path"),
        ("~no-such-user/a", "names the home folder of ~no-such-user, which does not exist", "correct the user's name"),
        ("' '", "is an empty path", "write the path"),
        ("'D:\\a'", "is a path of Windows", "write this machine's, under WSL /mnt/d/a"),
    ],
)
def test_a_path_that_cannot_be_expanded_is_a_problem(monkeypatch, path, rule, cure):
    monkeypatch.delenv("ABSENT", raising=False)
    monkeypatch.setenv("EMPTY", "")
    for key in ("run.dir", "data.image_dirs", "model.path", "engine.deepspeed.nvme_path"):
        [problem] = build_config({}, [f"{key}={path}"])[1]
        assert problem.key == (key if key != "engine.deepspeed.nvme_path" else "engine.deepspeed")
        assert problem.rule == rule and problem.cure.startswith(cure)


def test_folders_with_special_names_are_found_again_from_saved_settings(tmp_path, monkeypatch):
    """A folder that exists under the name as it is written needs no variable, and `./~` is not the home folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("b", raising=False)
    (tmp_path / "a$b").mkdir()
    config, problems = build_config({"run": {"dir": "./~/x"}, "cache": {"dir": "a$b"}})
    assert (problems, config.run.dir, config.cache.dir) == ([], tmp_path / "~" / "x", Path("a$b"))
    (tmp_path / "saved.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "saved.yaml") == (config, [])


def test_paths_among_deepspeeds_settings_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    given = {"zero_optimization": {"offload_param": {"device": "none", "nvme_path": "~/nvme"}}, "x": "~"}
    expected = {"zero_optimization": {"offload_param": {"device": "none", "nvme_path": "/home/x/nvme"}}, "x": "~"}
    assert build_config({"engine": {"deepspeed": given}})[0].engine.deepspeed == expected


NUMBERS = {"5e8": 5e8, "1e0": 1.0, "1E-5": 1e-5, "+.5e3": 500.0, "-7": -7, "0o17": 15, "0x1F": 31, "0": 0, "007.5": 7.5}


@pytest.mark.parametrize(("word", "number"), NUMBERS.items())
def test_numbers_in_mappings_of_any_type_are_numbers(tmp_path, word, number):
    text = f"{{engine: {{deepspeed: {{a: [{word}]}}}}, optim: {{kwargs: {{a: {word}, b: '{word}'}}}}}}"
    for config, problems in (load(tmp_path, text), load(tmp_path, text, f"optim.kwargs.a={word}")):
        values = [config.engine.deepspeed["a"][0], config.optim.kwargs["a"]]
        assert problems == [] and values == [number, number] and {type(value) for value in values} == {type(number)}
        assert config.optim.kwargs["b"] == word


SURPRISES = ["010", "-08", "1_000", "1_0.5", "0b11", "12:30", "1:30:00.5", "2024-01-01", "2024-1-2 10:00:00", "1e999"]


@pytest.mark.parametrize("word", [*SURPRISES, "no", "Yes", "ON", "off"])
def test_words_that_older_yaml_reads_differently_are_refused(tmp_path, word):
    for key in ("run.name", "run.dir", "optim.kwargs.a", "sample.prompts.0", "data.caption.replacements.a"):
        text = nest("sample.prompts", f"[{word}]") if key == "sample.prompts.0" else nest(key, word)
        config, problems = load(tmp_path, text)
        assert config == Config() and [(problem.key, problem.value) for problem in problems] == [(key, word)]
        assert f'quote it ("{word}")' in problems[0].cure
    assert [problem.key for problem in load(tmp_path, nest("optim.kwargs", f"{{{word}: 1}}"))[1]] == [
        f"optim.kwargs.{word}"
    ]
    quoted = load(tmp_path, nest("data.caption.prefix", f"'{word}'"), f'data.caption.suffix="{word}"')
    assert quoted[1] == [] and (quoted[0].data.caption.prefix, quoted[0].data.caption.suffix) == (word, word)


def test_switches_of_older_yaml_are_read_where_a_setting_is_no_text(tmp_path):
    config, problems = load(tmp_path, "data: {no_upscale: yes}\nema: {warmup: Off}", "cache.flip=on")
    assert problems == []
    assert (config.data.no_upscale, config.ema.warmup, config.cache.flip) == (True, False, True)


@pytest.mark.parametrize(
    "text", ["a: &x [*x]", "[" * 5000, "a: !!timestamp 2024-01-01", "a: !!int x", "a: " + "1" * 5000]
)
def test_hostile_yaml_is_one_problem(tmp_path, text):
    with pytest.raises(UserInputError, match="is not valid YAML"):
        load(tmp_path, text)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.sampled_from([*NUMBERS, *SURPRISES, "no", "~", "none", "=", "<<", "-", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(JSON)
def test_any_values_are_read_as_they_were_written_by_this_and_by_other_readers(content):
    text = dump_yaml({"a": content})
    assert load_yaml(text) == {"a": content} == yaml.safe_load(text)


def test_a_full_width_colon_in_a_key_is_named(tmp_path):
    [(key, _, cure)] = list_problems(tmp_path, "run： {name: x}")
    assert key.startswith("run：") and cure == "write a colon of half width, and a space"


def test_a_number_for_a_text_is_to_be_quoted(tmp_path):
    assert list_problems(tmp_path, "run: {name: 123}") == [("run.name", 123, 'quote it: "123"')]


def test_a_single_path_is_enough_for_every_list_of_paths():
    keys = [key for key in PATHS if isinstance(FIELDS[key].default, list)]
    assert len(keys) == 5
    config, problems = build_config({}, [f"{key}=../images" for key in keys])
    assert problems == [] and all(list(map(str, get(config, key))) == ["../images"] for key in keys)


def test_paths_on_the_command_line_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.delenv("ABSENT", raising=False)
    parser = build_parser("")
    assert parser.parse_args(["--cfg=~/a.yaml"]).cfg == Path("/home/x/a.yaml")
    with pytest.raises(argparse.ArgumentTypeError, match="'.ABSENT/a' names the environment variable ABSENT"):
        parse_path("$ABSENT/a")


NAME_RULE = "must consist of letters, digits, `_`, `-` and `.`, without spaces, and not of dots alone"
HUB_RULE = "must be a hub id: the owner, a slash and the model's name"


@pytest.mark.parametrize(
    ("key", "value", "rule", "instead"),
    [
        ("run.name", "my run", NAME_RULE, "my_run"),
        ("run.name", "../cats/a", NAME_RULE, "cats_a"),
        ("run.name", "..", NAME_RULE, "my_run"),
        ("about.base_model", "sdxl", HUB_RULE, "stabilityai/stable-diffusion-xl-base-1.0"),
        ("about.base_model", "https://huggingface.co/a/b-1/tree/main", HUB_RULE, "a/b-1"),
    ],
)
def test_a_text_that_does_not_match_a_pattern_gets_one_that_does(key: str, value: str, rule: str, instead: str) -> None:
    [problem] = build_config({}, [f"{key}='{value}'"])[1]
    assert (problem.key, problem.rule, problem.cure) == (key, rule, f"write one such as {instead}")
    assert build_config({}, [f"{key}={instead}"])[1] == []


def test_every_pattern_is_explained() -> None:
    with_pattern = {key for key, field in FIELDS.items() for limit in field.metadata if getattr(limit, "pattern", None)}
    assert with_pattern == PATTERN_RULES.keys()


@pytest.mark.parametrize(
    ("text", "rule", "cure"),
    [
        ("run: {name: ''}", "must not be empty", "write one, or remove the line"),
        ("data: {resolution_px: []}", "must not be empty", "write its entries, or remove the line"),
        ("optim: {betas: [0,9, 0,999]}", "must have at most 2 values, not 4", "decimal point, not a comma"),
        ("optim:\n  lr: 5,0e-4", "must be a number", "write a decimal point instead of the comma"),
        ("run: {name:my, seed: 1}", "is not a known key", "put a space after the colon: name: ..."),
        ("run:{name: my}", "is not a known key", "put a space after the colon: run: ..."),
        ("optim: {groups: [{match: a, lr:1}]}", "is not a known key", "put a space after the colon: lr: ..."),
    ],
)
def test_a_slip_in_a_value_or_key_is_explained(tmp_path: Path, text: str, rule: str, cure: str) -> None:
    [problem] = load(tmp_path, text)[1]
    assert problem.rule == rule and cure in problem.cure


OPEN_QUOTE = "the quotation mark is not closed in its line"


@pytest.mark.parametrize(
    ("text", "reason", "cure"),
    [
        ('run:\n  name: "a\ntrain:\n  max_steps: 5\n', f"line 2, column 9: {OPEN_QUOTE}", "close it"),
        # The next quotation mark, lines further down, ends the text.
        ("run:\n  name: 'a\nsample:\n  prompts: ['b', 'c']\n", f"line 2, column 9: {OPEN_QUOTE}", "close it"),
        ("run: {name: 'a}\ntrain: {max_steps: 5} # don't\n", f"line 1, column 13: {OPEN_QUOTE}", "close it"),
        ("data:\n  image_dirs: ['a', 'b]\n", f"line 2, column 21: {OPEN_QUOTE}", "close it"),
        ("sample:\n  prompts: ['it's a cat', 'b']\n", "line 2, column 17", "double the quotation mark inside"),
        ("run: {name: a\ntrain: {max_steps: 5}\n", "line 1, column 6: the bracket is not closed", "close it"),
        ("optim: {lr: 5,0e-4}", "line 1, column 13: the comma in 5,0e-4", "a decimal point instead of the comma"),
        ("train: {max_steps: 10,000}", "line 1, column 20: the comma in 10,000", "thousands without a separator"),
        ("train:\n  max_steps:8\n\n  seed: 5\n", "line 2, column 12: there is no space", "a space after the colon"),
        ("train:\n  seed: 5\n  max_steps:8\n", "line 3, column 12: there is no space", "a space after the colon"),
        ("run:\n  name: a\x07b\n", "line 2, column 10: the character U+0007", "remove this character"),
        ("run: {name: a}\n\x1b", "line 2, column 1: the character U+001B", "remove this character"),
    ],
)
def test_the_place_of_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, reason: str, cure: str) -> None:
    with pytest.raises(UserInputError) as caught:
        load(tmp_path, text)
    [problem] = caught.value.problems
    assert problem.key == "--cfg" and problem.rule.startswith(f"is not valid YAML: {reason}")
    assert cure in problem.cure


def test_texts_and_numbers_that_look_like_mistakes_are_read(tmp_path: Path) -> None:
    text = "run:\n  name: 'a\n    b'\noptim: {kwargs: {1: 2,3: 4, a: 5, 6: }}\nsample: {prompts: [1024,1024]}\n"
    assert load_yaml(text) == {
        "run": {"name": "a b"},
        "optim": {"kwargs": {1: 2, 3: 4, "a": 5, 6: None}},
        "sample": {"prompts": [1024, 1024]},
    }
    assert build_config({}, ["optim={lr: 5,0e-4}"])[1][0].cure.startswith("write a decimal point")
