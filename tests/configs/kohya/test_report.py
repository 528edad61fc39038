"""The report of an import: every key of every file is in it, and what is written passes the check of the settings."""

import ast
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from sdxl_trainer.configs.import_config import list_problems, main
from sdxl_trainer.configs.kohya.contents import FileContents, FileKey, read_files
from sdxl_trainer.configs.kohya.first_trainer import FIRST_TRAINER_OPTIONS
from sdxl_trainer.configs.kohya.fit import fit_settings
from sdxl_trainer.configs.kohya.gui_file import IGNORED_FIELDS, LYCORIS_FIELDS, NETWORK_FIELDS, RENAMED_FIELDS
from sdxl_trainer.configs.kohya.importer import convert, nest_settings
from sdxl_trainer.configs.kohya.networks import convert_network, convert_network_args
from sdxl_trainer.configs.kohya.options import KOHYA_OPTIONS
from sdxl_trainer.configs.kohya.readers import tomllib
from sdxl_trainer.configs.kohya.report import Report, format_report, sort_keys
from sdxl_trainer.configs.kohya.values import UnsupportedError
from sdxl_trainer.configs.problems import UserInputError

TOML = """
[model_arguments]
pretrained_model_name_or_path = "/m/sdxl.safetensors"
vae = "/m/vae.safetensors"
v2 = false
[additional_network_arguments]
network_module = "lycoris.kohya"
network_dim = 100000
network_alpha = 8
network_args = ["algo=loha", "conv_dim=8"]
network_train_unet_only = true
unet_lr = 1e-4
text_encoder_lr = 5e-5
[training_arguments]
mixed_precision = "no"
enable_wildcard = false
max_train_epochs = 10
max_train_steps = 1600
huber_c = 0.1
resolution = "1024x768"
shuffle_tags = true
dataset_config = ""
cache_latents = true
seed = 3
lr_scheduler_args = []
"""
DATASETS = """
[general]
enable_bucket = true
keep_tokens = 0
flip_aug = false
[[datasets]]
resolution = "1024,1024"
batch_size = 4
bucket_reso_steps = 8
  [[datasets.subsets]]
  image_dir = "/a"
  num_repeats = 2
  class_tokens = "dog"
  [[datasets.subsets]]
  image_dir = "/b"
  caption_prefix = "x, "
  color_aug = true
"""
COMMAND = """accelerate launch --num_cpu_threads_per_process 4 --num_processes 2 sdxl_train.py \\
  --resolution 1024 --max_train_steps 10 --xformers --lr_warmup_steps 0.1 --made_up=3 --wandb_api_key secret
"""
SUCCESSOR = """
def get_config():
    config = ConfigDict()
    config.dataset_source = [
        dict(name_or_path="/dog/", read_attrs=True), dict(name_or_path="/cat", recur=False, column_mapping={"a": "b"})
    ]
    config.arb = True
    config.resolution = 1024
    config.vae = None
    config.vae_model_name_or_path = "/m/vae-folder"
    config.output_name = cfg(models=None, train_state=None)
    config.eval_params = cfg(prompt="1girl", steps=28, batch_size=1, batch_count=4, save_latents=False)
    config.prediction_type = "epsilon"
    config.zero_terminal_snr = True
    config.learning_rate_te1 = 1e-6
    config.mixed_precision = None
    config.eval_every_n_steps = 500
    config.eval_every_n_epochs = 1
    config.shuffle_tags = True
    config.caption_getter = own.get_caption
    return config
"""
GUI = {
    "LoRA_type": "LyCORIS/LoKr",
    "LyCORIS_preset": "full",
    "additional_parameters": "--max_grad_norm=0.5 --weighted_captions",
    "block_lr_zero_threshold": "",
    "bucket_reso_steps": 64,
    "clip_skip": "1",
    "conv_dim": 64,
    "enable_bucket": False,
    "epoch": 20,
    "factor": -1,
    "learning_rate": 1.0,
    "lr_warmup": 10,
    "max_grad_norm": 1,
    "max_resolution": "1024X768",
    "max_train_steps": "",
    "mixed_precision": "no",
    "model_list": "custom",
    "multires_noise_iterations": 8,
    "network_dim": 32,
    "noise_offset": 0.03,
    "noise_offset_type": "Multires",
    "num_processes": 2,
    "sample_sampler": "euler_a",
    "sdxl": True,
    "text_encoder_lr": 0.0,
    "train_batch_size": 2,
    "unet_lr": 1.0,
    "xformers": "sdpa",
}
FILES = {"a.toml": TOML, "b.toml": DATASETS, "c.sh": COMMAND, "d.py": SUCCESSOR, "e.json": json.dumps(GUI)}


def list_keys(name: str, text: str) -> set[str]:
    """The keys of a file, found without the importer; entries of mappings stand behind a dot."""
    if name.endswith(".toml"):
        return {line.partition("=")[0].strip() for line in text.splitlines() if "=" in line and line[0] != "["}
    if name.endswith(".sh"):
        return set(re.findall(r"--(\w+)", text))
    if name.endswith(".json"):
        fields = json.loads(text)
        return {*fields, *(f"additional_parameters.{word}" for word in ("max_grad_norm", "weighted_captions"))}
    keys = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            name = node.targets[0].attr
            calls = [call for call in ast.walk(node.value) if isinstance(call, ast.Call)]
            keys |= {name, *(f"{name}.{word.arg}" for call in calls for word in call.keywords)}
    return keys


def report_on(*paths: Path) -> tuple[Report, str, dict[str, Any]]:
    """Import files; return the keys of the report, its text, and the settings that would be written."""
    contents = read_files(paths)
    imported = convert(contents)
    fitted = fit_settings(imported, list_problems)
    return sort_keys(contents, imported, fitted), format_report(contents, imported, fitted), fitted.settings


def list_names(keys: Iterable[FileKey]) -> set[str]:
    return {key.name for key in keys}


@pytest.mark.parametrize("name", FILES)
def test_every_key_of_a_file_is_in_one_part_of_the_report(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FILES[name])
    report, text, _ = report_on(tmp_path / name)
    found = [key.name for keys in vars(report).values() for key in keys]
    assert sorted(found) == sorted(list_keys(name, FILES[name]))
    assert f"{len(found)} keys in your files: {len(report.exact)} imported as they are, " in text
    names = set(re.findall(r"[\w.]+", text))
    assert set(found) - names == set()


def test_what_became_of_the_keys_of_kohyas_scripts(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(TOML)
    report, text, settings = report_on(tmp_path / "a.toml")
    # Values that are the defaults of kohya's scripts are the file's own all the same.
    assert {"mixed_precision", "enable_wildcard", "seed", "resolution", "unet_lr"} <= list_names(report.exact)
    assert settings["engine.precision"] == "fp32" and settings["data.buckets"] == [[1024, 768]]
    assert list_names(report.unset) == {"v2", "dataset_config", "lr_scheduler_args"}
    assert list_names(report.without_effect) == {"max_train_steps", "huber_c"}
    assert "max_train_steps = 1600: max_train_epochs decides the length of the run" in text
    assert "shuffle_tags = true: is not a known option; did you mean shuffle_caption?" in text
    assert "mixed_precision = " not in text  # neither a default nor changed


def test_other_adapters_than_those_here_are_a_warning(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(TOML)
    report, text, settings = report_on(tmp_path / "a.toml")
    assert "network_module" in list_names(report.exact) and settings["lora.rank"] == settings["lora.alpha"] == 16
    assert settings["lora.kind"] == "loha" and settings["lora.conv_rank"] == 8 == settings["lora.conv_alpha"]
    assert "network_dim = 100000: stands for whole matrices in LyCORIS; lora.rank is 16" in text
    (tmp_path / "a.toml").write_text(TOML.replace("algo=loha", "algo=boft"))
    report, text, settings = report_on(tmp_path / "a.toml")
    assert "network_module" in list_names(report.unsupported) and "lora.kind" not in settings
    assert "another training than in your files:\n  network_module = 'lycoris.kohya': WARNING: trains BOFT" in text
    (tmp_path / "e.json").write_text(FILES["e.json"])
    _, text, settings = report_on(tmp_path / "e.json")
    assert "WARNING" not in text and settings["lora.rank"] == 32 and settings["lora.kind"] == "lokr"
    assert settings["lora.conv_rank"] == 64 and settings["lora.alpha"] == settings["lora.conv_alpha"] == 1
    (tmp_path / "e.json").write_text(json.dumps({**GUI, "LoRA_type": "LyCORIS/Native Fine-Tuning"}))
    _, text, settings = report_on(tmp_path / "e.json")
    assert "WARNING: trains whole matrices" in text and not any(key.startswith("lora.") for key in settings)


def test_arguments_of_networks() -> None:
    """Defaults are those of LyCORIS, which trains convolutions, and of kohya's scripts, which need `conv_dim`."""
    lycoris = {"network_module": "lycoris.kohya", "network_dim": 8, "network_alpha": 4, "learning_rate": 1e-4}
    lora = {"lora.rank": 8, "lora.alpha": 4}
    full = {"lora.conv_rank": 8, "lora.conv_alpha": 4}
    text = {"optim.text_encoder_lr": 1e-4, "optim.text_encoder_2_lr": 1e-4}
    attention = {"lora.targets": ["to_q", "to_k", "to_v", "to_out.0"]}
    cases = (
        ("networks.lora", "", lora, {}),
        ("networks.lora", "conv_dim=4 loraplus_lr_ratio=16", {**lora, "lora.conv_rank": 4, "lora.conv_alpha": 1}, 16),
        ("lycoris.kohya", "", {**lora, **full}, {}),
        ("lycoris.kohya", "preset=attn-mlp dora_wd=True", {**lora, "lora.kind": "dora"}, {}),
        ("lycoris.kohya", "preset=attn-only algo=loha", {**lora, **attention, "lora.kind": "loha"}, {}),
        (
            "lycoris.kohya",
            "algo=lokr conv_dim=2 conv_alpha=1 factor=8 decompose_both=True",
            {**lora, "lora.kind": "lokr", "lora.conv_rank": 2, "lora.conv_alpha": 1},
            {"lora.factor": 8, "lora.decompose_both": True},
        ),
    )
    for module, words, expected, further in cases:
        given = {**lycoris, "network_module": module, "network_args": words}
        found = convert_network(module, given)
        found.pop("lora.text_targets", None)
        assert found == {**expected, **text}, words
        further = {"lora.b_lr_ratio": further} if isinstance(further, int) else further
        assert convert_network_args(words, given) == further, words
    given = {**lycoris, "network_args": "algo=lokr full_matrix=True"}
    assert convert_network("", given)["lora.rank"] == convert_network("", given)["lora.conv_rank"] == 100_000
    given = {**lycoris, "network_args": "algo=loha rank_dropout=0.1 use_tucker=False preset=full-lin"}
    with pytest.raises(UnsupportedError, match="without rank_dropout=0.1, preset=full-lin, which have no setting"):
        convert_network_args(given["network_args"], given)
    given = {**lycoris, "network_args": "algo=loha dora_wd=True loraplus_lr_ratio=4"}
    with pytest.raises(UnsupportedError, match="this YAML trains loha without them"):
        convert_network("", given)
    with pytest.raises(UnsupportedError, match="without loraplus_lr_ratio=4"):
        convert_network_args(given["network_args"], given)


def test_what_became_of_the_fields_of_kohya_ss(tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(FILES["e.json"])
    report, text, settings = report_on(tmp_path / "e.json")
    assert "mixed_precision" in list_names(report.exact) and settings["engine.precision"] == "fp32"
    assert "mixed_precision = " not in text and settings["data.buckets"] == [[1024, 768]]
    assert list_names(report.without_effect) == {
        *("bucket_reso_steps", "clip_skip", "noise_offset", "sample_sampler", "model_list", "sdxl", "max_grad_norm")
    }
    assert settings["optim.max_grad_norm"] == 0.5  # of additional_parameters
    assert "lr_warmup = 10: is a share of a run" in text  # percent, as in the interface
    # With a dataset file the interface counts no epochs, and kohya's default length applies.
    datasets = tmp_path / "d.toml"
    datasets.write_text("[[datasets]]\nresolution = 1024\n[[datasets.subsets]]\nimage_dir = '/a'\n")
    (tmp_path / "e.json").write_text(json.dumps({**GUI, "dataset_config": str(datasets)}))
    _, _, settings = report_on(tmp_path / "e.json")
    assert settings["train.max_steps"] == 1600 and "train.max_epochs" not in settings


def test_what_became_of_the_keys_of_the_successor(tmp_path: Path) -> None:
    (tmp_path / "d.py").write_text(SUCCESSOR)
    report, text, settings = report_on(tmp_path / "d.py")
    assert {"dataset_source.read_attrs", "eval_params.prompt", "mixed_precision"} <= list_names(
        [*report.exact, *report.changed]
    )
    assert settings["model.vae"] == "/m/vae-folder"  # not lost to the empty `vae`
    assert "eval_params.batch_count = 4: has no setting here" in text
    assert "dataset_source.recur = false: folders are always read" in text
    assert "dataset_source.column_mapping = {a: 'b'}: columns cannot be renamed" in text
    assert "captions in text files are read here; there only with read_attrs = True" in text
    assert (
        "learning_rate_te1 = 1e-06: has no effect without train_text_encoder, as in the first sdxl-trainer's succ"
        in text
    )
    assert "zero_terminal_snr = true: objective.zero_terminal_snr: needs objective.prediction v" in text
    assert "eval_every_n_epochs = 1: every_n_steps counts more often" in text
    assert "kohya" not in text.replace("FROM_KOHYA", "")
    (tmp_path / "d.py").write_text("config.learning_rate_te1 = 1e-6\nconfig.cache_latents = True\n")
    _, text, _ = report_on(tmp_path / "d.py")
    assert "has no effect without train_text_encoder, as in the first sdxl-trainer\n" in text


SIZES = {
    "1024": (1024, 1024),
    "1024,768": (1024, 768),
    "1024, 768": (1024, 768),
    "1024x768": (1024, 768),
    "1024X768": (1024, 768),
    1024: (1024, 1024),
    (1024, 768): (1024, 768),
    "1000x1000": (992, 992),
    128: (128, 128),
}


@pytest.mark.parametrize("size", SIZES)
def test_a_resolution_of_every_form(tmp_path: Path, size: Any) -> None:
    written = list(size) if isinstance(size, tuple) else size
    (tmp_path / "x.json").write_text(json.dumps({**GUI, "max_resolution": written}))
    assert report_on(tmp_path / "x.json")[2]["data.buckets"] == [list(SIZES[size])]
    (tmp_path / "x.toml").write_text(f"enable_bucket = true\nresolution = {json.dumps(written)}\n")
    _, text, settings = report_on(tmp_path / "x.toml")
    width, height = SIZES[size] if size != "1000x1000" else (1000, 1000)
    assert (settings["data.resolution_px"] - 1) ** 2 < width * height <= settings["data.resolution_px"] ** 2
    if size == 128:
        assert settings["data.min_bucket_px"] == 128
        remark = "resolution = 128: is below the limit of 256 px for bucket sides, so data.min_bucket_px is set to 128"
        assert remark in text and "None" not in text


def test_values_that_cannot_be_read_are_named_with_file_key_and_form(tmp_path: Path, capsys) -> None:
    (tmp_path / "x.json").write_text(json.dumps({**GUI, "max_resolution": "1024by768", "train_batch_size": "four"}))
    assert main([str(tmp_path / "x.json")]) == 2
    printed = capsys.readouterr().err
    assert f"- max_resolution = '1024by768'\n      cannot be read (in {tmp_path / 'x.json'})\n" in printed
    assert "cure: write a side in pixels, such as 1024, or width and height, such as 832,1216 or 832x1216" in printed
    assert "- train_batch_size = 'four'" in printed and "2 problems" in printed


def test_a_folder_is_answered_with_files_that_can_be_imported(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path)]) == 2
    assert "none of its files can be imported; .toml, .json, .py" in capsys.readouterr().err
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "caption.txt").write_text("a cat")
    (tmp_path / "metadata.json").write_text('{"a": {"caption": "x"}}')
    (tmp_path / "z.toml").write_text(TOML)
    assert main([str(tmp_path)]) == 2
    names = ", ".join(str(tmp_path / name) for name in FILES)
    assert f"is a folder\n      cure: give one of its files: {names}\n" in capsys.readouterr().err


def test_a_short_file_of_kohya_ss(tmp_path: Path) -> None:
    fields = {"pretrained_model_name_or_path": "/m.safetensors", "max_resolution": "1024,1024"}
    (tmp_path / "x.json").write_text(json.dumps(fields))
    settings = report_on(tmp_path / "x.json")[2]
    assert settings["model.path"] == "/m.safetensors" and settings["train.max_steps"] == 1600


# Values that people, interfaces and mistakes write. Each option is tried with every fourth of them.
ODD_VALUES = (
    *(0, 1, -1, 2.5, 10**12, float("inf"), True, False, "", "none", "no", "x", "1,2", "4x4", "$X/y", "C:\\a"),
    *([], [1], ["a=1"], ["a"], [[1]], {"a": 1}, "1e-5", "[", "a b=c", "\u00e9"),
)
# What most options need to have an effect, so that their values are looked at.
BASE = {
    **{"enable_bucket": True, "resolution": 1024, "network_module": "networks.lora", "train_text_encoder": True},
    **{"deepspeed": True, "log_with": "wandb", "sample_prompts": "p.txt", "max_train_epochs": 2, "num_samples": 10},
    **{"save_every_n_steps": 10, "save_every_n_epochs": 1, "multires_noise_iterations": 6, "masked_loss": True},
    **{"loss_type": "huber", "optimizer_type": "AdamW", "alpha_mask": True},
}


def check_import(contents: FileContents, name: str, value: Any) -> None:
    """An import ends with settings that pass the check, or with problems that name the key."""
    try:
        imported = convert(contents)
    except UserInputError as error:
        keys = [problem.key for problem in error.problems]
        assert keys and all("cannot be read" in problem.rule and problem.cure for problem in error.problems), error
        return
    fitted = fit_settings(imported, list_problems)
    left = [problem.rule for problem in list_problems(nest_settings(fitted.settings))]
    assert all("names the environment variable" in rule for rule in left), (name, value, left)
    report = sort_keys(contents, imported, fitted)
    assert report.num_keys == len(contents.keys)
    lost = [imported.origins[key] for key in imported.settings if key not in fitted.settings]
    text = format_report(contents, imported, fitted)
    assert all(f"{contents.names.get(option, option)} = " in text for option in lost), (name, value, lost)


@pytest.mark.parametrize("is_first_trainer", [False, True])
def test_odd_values_of_every_option(is_first_trainer: bool) -> None:
    own = [name for name, option in FIRST_TRAINER_OPTIONS.items() if not isinstance(option, str)]
    for number, name in enumerate(own if is_first_trainer else KOHYA_OPTIONS):
        for value in ODD_VALUES[number % 4 :: 4]:
            options = {**BASE, name: value}
            keys = [FileKey(Path("x"), option, item, option) for option, item in options.items()]
            check_import(FileContents(options, keys=keys, is_first_trainer=is_first_trainer), name, value)


def test_odd_values_of_every_field_of_kohya_ss(tmp_path: Path) -> None:
    fields = {*IGNORED_FIELDS, *LYCORIS_FIELDS, *NETWORK_FIELDS, *RENAMED_FIELDS, *GUI, "dataset_config"}
    for number, name in enumerate(sorted(fields)):
        for value in ODD_VALUES[number % 4 :: 4]:
            (tmp_path / "x.json").write_text(json.dumps({**GUI, name: value}))
            try:
                contents = read_files([tmp_path / "x.json"])
            except UserInputError as error:
                assert name in str(error) or name == "dataset_config", error
                continue
            check_import(contents, name, value)


def test_odd_values_in_dataset_files(tmp_path: Path) -> None:
    tables = tomllib.loads(DATASETS)
    for name in ("resolution", "batch_size", "num_repeats", "image_dir", "keep_tokens", "is_reg", "metadata_file"):
        for value in ODD_VALUES:
            subset = {"image_dir": "/a", name: value}
            (tmp_path / "x.json").write_text(json.dumps({**tables, "datasets": [{"subsets": [subset, subset]}]}))
            try:
                contents = read_files([tmp_path / "x.json"])
            except UserInputError as error:
                assert name in str(error), error
                continue
            check_import(contents, name, value)
