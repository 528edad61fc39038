"""Settings: all problems are reported together with key, value and cure, and correct settings are kept."""

import math
from pathlib import Path

import pytest
from programs import ROOT

from sdxl_trainer.configs.document import build_page
from sdxl_trainer.configs.load import build_config, iterate_keys, load_config, save_config, suggest_key
from sdxl_trainer.configs.problems import Problem, UserInputError, format_count
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.checks.records import check_data_settings
from sdxl_trainer.data.index.selection import get_cache_folder

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
        ("train: {max_steps: many}", "train.max_steps", "many", "see docs/CONFIG.md"),
        ("train: {max_steps: 1.5}", "train.max_steps", 1.5, "see docs/CONFIG.md"),
        ("train: {max_steps: true}", "train.max_steps", True, "see docs/CONFIG.md"),
        ("optim: {lr: yes}", "optim.lr", True, "see docs/CONFIG.md"),
        ("optim: {betas: [0.9, on]}", "optim.betas", [0.9, True], "see docs/CONFIG.md"),
        ("engine: {zero_stage: true}", "engine.zero_stage", True, "see docs/CONFIG.md"),
        ("train: {max_steps: 0}", "train.max_steps", 0, "see docs/CONFIG.md"),
        ("optim: {lr: .inf}", "optim.lr", math.inf, "see docs/CONFIG.md"),
        ("engine: {zero_stage: 4}", "engine.zero_stage", 4, "see docs/CONFIG.md"),
        ("data: {metadata: 7.5}", "data.metadata", 7.5, "see docs/CONFIG.md"),
        ("train: 5", "train", 5, "see docs/CONFIG.md"),
        ("1: 2", "1", 1, "see docs/CONFIG.md"),
        ("data: {min_bucket_px: 1024, resolution_px: 512}", "data", None, "see docs/CONFIG.md"),
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
    assert "unicode string" not in str(caught.value)


def test_missing_and_binary_files_are_rejected(tmp_path):
    with pytest.raises(UserInputError, match="No such file"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "x.yaml").write_bytes(b"run: {name: \xff}")
    with pytest.raises(UserInputError, match="not valid YAML"):
        load_config(tmp_path / "x.yaml")


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
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == (config, [])


def test_special_characters_and_null_are_kept_when_saved(tmp_path):
    text = "run: {name: a.b-c}\nsample: {prompts: ['ein Mädchen: \"x\" # y', '']}\ncache: {dir: ~}"
    config, problems = load(tmp_path, text)
    assert problems == []
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == (config, [])


def test_the_page_of_settings_is_current():
    page = build_page()
    assert (ROOT / "docs" / "CONFIG.md").read_text() == page, "python -m sdxl_trainer.configs.document > docs/CONFIG.md"
    leaves = [key for key in iterate_keys() if "." in key]
    assert len(leaves) > 40
    assert [key for key in leaves if f"| `{key}` |" not in page] == []
    # Every setting is explained: no row ends in an empty cell.
    assert [line for line in page.splitlines() if line.startswith("| `") and line.endswith("|  |")] == []


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
    assert str(UserInputError([Problem("a", 1, "b")])).startswith("1 problem in the settings:")
