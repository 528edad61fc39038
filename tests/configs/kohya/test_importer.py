"""Import of settings from kohya's scripts and the first sdxl-trainer: every option is converted or reported."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from sdxl_trainer.configs.captions import CaptionConfig
from sdxl_trainer.configs.import_config import main
from sdxl_trainer.configs.kohya import options as kohya_options
from sdxl_trainer.configs.kohya.first_trainer import FIRST_TRAINER_OPTIONS
from sdxl_trainer.configs.kohya.options import KOHYA_GROUPS, KOHYA_OPTIONS
from sdxl_trainer.configs.kohya.python_file import read_python
from sdxl_trainer.configs.kohya.readers import read_command
from sdxl_trainer.configs.kohya.subsets import list_repeated_folders
from sdxl_trainer.configs.load import build_config, iterate_keys, load_config
from sdxl_trainer.configs.problems import UserInputError
from sdxl_trainer.data.text.captions import build_caption, build_caption_settings

TRAINING = """
[model_arguments]
pretrained_model_name_or_path = "/models/sd_xl_base_1.0.safetensors"
v_parameterization = true
zero_terminal_snr = true
[dataset_arguments]
dataset_config = "data.toml"
cache_latents = true
cache_latents_to_disk = true
[training_arguments]
output_dir = "/out"
output_name = "123"
save_precision = "fp16"
save_every_n_steps = 500
save_last_n_steps = 1500
train_batch_size = 4
gradient_accumulation_steps = 8
max_train_epochs = 10
max_token_length = 225
weighted_captions = true
xformers = true
sdpa = false
seed = 42
gradient_checkpointing = true
mixed_precision = "bf16"
clip_skip = 2
loss_type = "huber"
min_snr_gamma = 5
debiased_estimation_loss = true
wandb_api_key = "0123456789abcdef"
made_up = 3
[optimizer_arguments]
optimizer_type = "AdaFactor"
learning_rate = 4e-7
lr_scheduler = "constant_with_warmup"
lr_warmup_steps = 0.1
max_grad_norm = 0.0
optimizer_args = ["scale_parameter=False", "relative_step=False", "warmup_init=False", "weight_decay=0.03"]
"""
DATASETS = """
[general]
enable_bucket = true
shuffle_caption = true
caption_extension = ".txt"
keep_tokens = 1
[[datasets]]
resolution = 1024
batch_size = 2
max_bucket_reso = 2048
bucket_reso_steps = 64
  [[datasets.subsets]]
  image_dir = "/data/a"
  num_repeats = 2
  flip_aug = true
  [[datasets.subsets]]
  image_dir = "/data/b"
  flip_aug = true
  keep_tokens = 3
  class_tokens = "dog"
  [[datasets.subsets]]
  image_dir = "/data/reg"
  is_reg = true
  flip_aug = true
"""
COMMAND = r"""#!/bin/bash
source venv/bin/activate  # the environment
accelerate launch --num_processes 4 --mixed_precision=fp16 ./sdxl_train_network.py \
  --pretrained_model_name_or_path="/models/my model.safetensors" --in_json meta.json --train_data_dir=/data/images \
  --network_module networks.lora --network_dim=32 --network_alpha 16 --network_args "conv_dim=4" "conv_alpha=1" \
  --unet_lr 1e-4 --text_encoder_lr 5e-5 2.5e-5 --learning_rate 1e-4 --train_batch_size=2 \
  --optimizer_type AdamW8bit --optimizer_args weight_decay=0.1 betas=0.9,0.99 eps=1e-6 amsgrad=True \
  --resolution=1024,1024 --enable_bucket --lr_scheduler cosine_with_restarts --lr_scheduler_num_cycles 3 \
  --max_train_steps 2000 --lr_warmup_steps 0.05 --noise_offset 0.0357 --sample_prompts p.txt \
  --sample_sampler k_euler_a \
  && echo --seed 3
"""
FIRST_TRAINER = """
import os
from ml_collections import ConfigDict
from tools import captions

def cfg(**kwargs):
    return ConfigDict(initial_dictionary=kwargs)

def get_config():
    config = ConfigDict()
    config.pretrained_model_name_or_path = r'/models/x.safetensors'
    config.metadata_files = ['/data/a.json', '/data/b.json']
    config.image_dirs = ['/data/images']
    config.output_dir = 'projects/mine'
    config.cache_path = os.path.join(config.output_dir, 'cache')
    config.caption_getter = captions.get_caption
    config.resolution = 1024
    config.arb = True
    config.flip_aug = True
    config.max_area = 1024 * 1024
    config.bucket_reso_step = 32
    config.max_width = None
    config.num_train_epochs = 100
    config.batch_size = 2
    config.gradient_accumulation_steps = 4
    config.learning_rate = 2e-5
    config.train_text_encoder = True
    config.learning_rate_te1 = 1e-5
    config.learning_rate_te2 = None
    config.optimizer_type = 'Adafactor'
    config.optimizer_kwargs = cfg(relative_step=False, scale_parameter=False, warmup_init=False)
    config.mixed_precision = 'bf16'
    config.min_snr_gamma = 0
    config.debiased_estimation_loss = True
    config.noise_offset = 0
    config.multires_noise_iterations = 0
    config.multires_noise_discount = 0
    config.prediction_type = 'v_prediction'
    config.timestep_sampler_type = "logit_normal"
    config.timestep_sampler_kwargs = cfg(mu=1.1, sigma=0.8)
    config.eval_every_n_steps = 500
    config.eval_params = cfg(prompt="1girl", steps=28, scale=7.5, width=832, height=1216, batch_size=1)
    config.save_max_n_models = 5
    return config
"""


def import_files(folder: Path, files: dict[str, str], *words: str) -> tuple[dict, str]:
    """Import files and return the settings and the remarks in the comment of the YAML, without its lists of names."""
    for name, text in files.items():
        (folder / name).write_text(text)
    first = next(iter(files))
    assert main([str(folder / first), "--out", str(folder / "x.yaml"), *words]) == 0
    text = (folder / "x.yaml").read_text()
    settings = yaml.safe_load(text)
    assert build_config(yaml.safe_load(text))[1] == [], text
    comment = "\n".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    return settings, re.split(
        r"\n(?:without effect, because|in the same part|imported as they are|empty or off)", comment
    )[0]


def test_training_and_dataset_files_of_kohya(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = {"train.toml": TRAINING, "data.toml": DATASETS}
    settings, comment = import_files(tmp_path, files, "--ranks", "2", "--samples", "3200")
    assert settings == {
        "run": {"name": "123", "dir": "/out", "seed": 42},
        "model": {"path": "/models/sd_xl_base_1.0.safetensors"},
        "data": {
            "image_dirs": ["/data/a", "/data/b"],
            "source_weights": [2, 1],
            "regularisation_dirs": ["/data/reg"],
            "resolution_px": 1024,
            "max_bucket_px": 2048,
            "bucket_step_px": 64,
            "flip_rate": 0.5,
            "caption": {"first_line": True, "keep_tokens": 1, "shuffle": True, "weighted": True},
            "max_tokens": 225,
        },
        "cache": {"dir": "/out/latents/123", "flip": True},
        "objective": {
            "prediction": "v",
            "zero_terminal_snr": True,
            "loss": "huber",
            "huber_schedule": "snr",
            "weighting": "min_snr",
            "weighting_gamma": 5,
        },
        "optim": {
            "name": "adafactor",
            "lr": 4e-7,
            "weight_decay": 0.03,
            "schedule": "constant",
            "warmup_steps": 100,  # a tenth of 10 epochs of 3200 samples in global batches of 2 x 8 x 2 ranks
            "max_grad_norm": 0.0,
        },
        "engine": {
            "zero_stage": 0,
            "precision": "bf16",
            "gradient_checkpointing": True,
            "attention": "xformers",
        },
        # The dataset file's batch size 2 overrides 4.
        "train": {"max_epochs": 10, "global_batch_size": 32, "micro_batch_size": 2},
        "checkpoint": {"every_steps": 500, "keep_last": 4, "export_dtype": "fp16"},  # of the last 1500 steps
    }
    for name in ("clip_skip", "cache_latents", "cache_latents_to_disk", "debiased_estimation_loss", "class_tokens"):
        assert f"{name} = " in comment, name
    assert "made_up = 3: is not a known option" in comment
    assert "keep_tokens = [1, 3]: differs" in comment
    assert "0123456789abcdef" not in comment and "wandb_api_key" in comment
    assert "sdpa" not in comment  # false in the file
    assert "clip_skip = 2" in capsys.readouterr().err


def test_a_command_line_of_kohya(tmp_path: Path) -> None:
    settings, comment = import_files(tmp_path, {"train.sh": COMMAND})
    assert settings["model"]["path"] == "/models/my model.safetensors"
    assert settings["data"]["metadata"] == ["meta.json"] and settings["data"]["image_dirs"] == ["/data/images"]
    assert settings["data"]["resolution_px"] == 1024
    assert settings["data"]["max_bucket_px"] == 1024  # kohya's default
    assert settings["lora"] == {"rank": 32, "alpha": 16, "conv_rank": 4, "conv_alpha": 1}
    assert settings["optim"] == {
        "name": "adamw8bit",
        "kwargs": {"amsgrad": True},
        "lr": 1e-4,
        "betas": [0.9, 0.99],
        "eps": 1e-6,
        "weight_decay": 0.1,
        "text_encoder_lr": 5e-5,
        "text_encoder_2_lr": 2.5e-5,
        "schedule": "cosine_with_restarts",
        "warmup_steps": 100,
        "num_cycles": 3,
    }
    assert settings["train"] == {"max_steps": 2000, "global_batch_size": 8, "micro_batch_size": 2}
    assert settings["engine"]["precision"] == "fp16"  # option of accelerate
    assert settings["sample"] == {"prompt_file": "p.txt", "sampler": "euler_a"}
    assert "seed" not in settings.get("run", {})  # belongs to another command
    assert "network_args" not in comment  # imported whole


def test_the_first_sdxl_trainer(tmp_path: Path) -> None:
    settings, comment = import_files(tmp_path, {"config.py": FIRST_TRAINER}, "--samples", "800")
    assert settings["data"] == {
        "metadata": ["/data/a.json", "/data/b.json"],
        "image_dirs": ["/data/images"],
        "resolution_px": 1024,
        "bucket_step_px": 32,
        "no_upscale": True,
        "flip_rate": 0.5,
        "max_tokens": 225,
    }
    assert settings["run"] == {"name": "mine", "dir": "projects"} and settings["cache"]["dir"] == "latents/mine"
    assert settings["optim"]["lr"] == 2e-5
    assert settings["optim"]["text_encoder_lr"] == 1e-5
    assert settings["optim"]["text_encoder_2_lr"] == 2e-5  # the U-Net's
    assert settings["objective"] == {
        "prediction": "v",
        "weighting": "debiased",
        "timestep_density": "logit_normal",
        "logit_mean": 1.1,
        "logit_std": 0.8,
        "noise_offset": 0,
        "multires_noise_iterations": 0,
    }
    assert settings["train"] == {"max_epochs": 100, "global_batch_size": 8, "micro_batch_size": 2}
    assert settings["sample"]["prompts"] == ["1girl"] and settings["sample"]["width_px"] == 832
    assert settings["checkpoint"]["keep_last"] == 5
    assert "caption_getter = 'captions.get_caption': is Python" in comment
    assert "max_area" not in comment  # no bucket is larger
    assert "max_token_length = 225: data.max_tokens: 225" in comment  # a default that is written
    assert "cache_path = 'projects/mine/cache': is not a known option" in comment


def import_python(folder: Path, **settings: object) -> tuple[dict, str]:
    """Import settings of the first trainer that a function returns as a whole."""
    words = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    text = f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict(dict({words}))\n"
    return import_files(folder, {"config.py": text}, "--ranks", "4")


def test_the_first_trainers_own_rules(tmp_path: Path) -> None:
    """Its buckets are fixed, its folder is that of the run, and fp16 cannot be combined with Adafactor here."""
    settings, comment = import_python(
        tmp_path,
        image_dirs=["/a"],
        output_dir="out/train-%index%",
        resolution=1024,
        mixed_precision="fp16",
        full_bf16=True,
        optimizer_type="AdaFactor",
        optimizer_kwargs={"relative_step": False, "scale_parameter": False},
        lr_warmup_steps=100,
        sample_benchmark="b.json",
        sample_params={"prompt": "1girl", "steps": 28},
        batch_sise=3,
    )
    assert len(settings["data"]["buckets"]) == 41 and [832, 1216] in settings["data"]["buckets"]
    assert min(map(min, settings["data"]["buckets"])) == 512 and "resolution_px" not in settings["data"]
    assert settings["run"] == {"name": "train", "dir": "out"} and "another run.name starts anew" in comment
    assert settings["engine"] == {"zero_stage": 0, "precision": "bf16"} and "fp16': needs ZeRO 1 to 3" in comment
    assert "full_bf16 = true: has no effect without" in comment
    assert settings["optim"]["warmup_steps"] == 25  # accelerate advances the schedule once for each of 4 processes
    assert settings["sample"] == {"prompt_file": "b.json", "num_inference_steps": 28}
    assert "batch_sise = 3: is not a known option; did you mean batch_size?" in comment


def test_the_successors_own_rules(tmp_path: Path) -> None:
    """Its first source counts most, its buckets are those of `arb`, and a table is named behind a database."""
    sources = [
        {"name_or_path": "/m.sqlite3", "tbname": "meta"},
        {"name_or_path": "/images", "read_attrs": True},
        "/b.json",
    ]
    settings, comment = import_python(tmp_path, dataset_source=sources, arb=False, resolution=(832, 1216), seed=1)
    assert settings["data"]["metadata"] == ["/b.json", "/m.sqlite3:meta"]
    assert settings["data"]["image_dirs"] == ["/images"] and settings["data"]["buckets"] == [[832, 1216]]
    assert "the order of metadata is reversed" in comment and "images that no metadata name" in comment
    settings, _ = import_python(tmp_path, dataset_source="/images", predefined_buckets=[(1024, 1024), (1152, 896)])
    assert settings["data"]["buckets"] == [[1024, 1024], [1152, 896]]
    settings, _ = import_python(tmp_path, dataset_source="/images", max_area=1024 * 1024, mixed_precision=None)
    assert settings["data"]["no_upscale"] and settings["data"]["bucket_step_px"] == 32
    assert settings["engine"] == {"precision": "fp32"}


GUI = {
    "LoRA_type": "Standard",
    "additional_parameters": "--max_grad_norm=0.5",
    "bucket_no_upscale": True,
    "caption_extension": ".txt",
    "clip_skip": "1",
    "conv_dim": 1,
    "enable_bucket": True,
    "epoch": 5,
    "learning_rate": 0.0001,
    "lr_scheduler": "cosine",
    "lr_warmup": 10,
    "max_bucket_reso": 2048,
    "max_resolution": "1024,1024",
    "max_train_steps": "",
    "max_data_loader_n_workers": "0",
    "min_snr_gamma": 5,
    "mixed_precision": "bf16",
    "model_list": "custom",
    "multires_noise_iterations": 8,
    "network_alpha": 16,
    "network_dim": 32,
    "noise_offset": 0.03,
    "noise_offset_type": "Original",
    "optimizer": "AdamW",
    "optimizer_args": '"weight_decay=0.1" "betas=0.9,0.99"',
    "output_name": "123",
    "pretrained_model_name_or_path": "/m/sdxl.safetensors",
    "rank_dropout": 0,
    "sample_every_n_epochs": 1,
    "sample_prompts": "a dog --w 1024\n# a comment\na cat",
    "save_every_n_epochs": 1,
    "sdxl": True,
    "seed": "",
    "text_encoder_lr": 0.0,
    "train_batch_size": 2,
    "unet_lr": 0.0002,
    "vae_batch_size": 0,
    "xformers": "sdpa",
}


def test_the_settings_of_kohya_ss(tmp_path: Path) -> None:
    """Its own fields become options, and images in `N_name` folders are counted to convert epochs to steps."""
    for number in range(4):
        (tmp_path / "img" / "10_dog").mkdir(parents=True, exist_ok=True)
        (tmp_path / "img" / "10_dog" / f"{number}.png").touch()
    text = json.dumps({**GUI, "train_data_dir": str(tmp_path / "img")})
    settings, comment = import_files(tmp_path, {"gui.json": text})
    assert settings["run"] == {"name": "123"} and settings["model"] == {"path": "/m/sdxl.safetensors"}
    assert settings["data"] == {
        "image_dirs": [str(tmp_path / "img" / "10_dog")],
        "kohya_folders": True,
        "resolution_px": 1024,
        "max_bucket_px": 2048,
        "no_upscale": True,
        "caption": {"first_line": True},
        "num_workers": 0,
    }
    assert settings["objective"] == {"weighting": "min_snr", "weighting_gamma": 5, "noise_offset": 0.03}
    assert settings["optim"] == {
        "name": "adamw",
        "lr": 0.0002,
        "betas": [0.9, 0.99],
        "weight_decay": 0.1,
        "schedule": "cosine",
        "warmup_steps": 10,  # a tenth of 5 epochs of 40 samples in batches of 2
        "max_grad_norm": 0.5,
    }
    assert settings["lora"] == {"rank": 32, "alpha": 16}
    assert settings["train"] == {"max_epochs": 5, "global_batch_size": 2, "micro_batch_size": 2}
    assert settings["sample"] == {"prompts": ["a dog --w 1024", "a cat"], "every_steps": 20}
    assert "is not a known option" not in comment and "conv_dim" not in comment


def test_defaults_that_are_written_are_reported(tmp_path: Path) -> None:
    _, comment = import_files(tmp_path, {"x.txt": "sdxl_train.py --seed 1"})
    assert "max_train_steps = 1600: train.max_steps: 1600" in comment
    _, comment = import_files(tmp_path, {"x.txt": "sdxl_train.py --max_train_epochs 3 --lr_warmup_steps 0.1"})
    assert "max_train_steps" not in comment and "lr_warmup_steps = 0.1: is a share of a run whose" in comment


def test_settings_of_kohya_ss_that_a_run_would_refuse_are_settled(tmp_path: Path) -> None:
    """Cached text beside trained text encoders; options that are unknown or have no counterpart; an empty folder."""
    (tmp_path / "img" / "10_dog").mkdir(parents=True)
    own = {
        "output_dir": "/out",
        "train_data_dir": str(tmp_path / "img"),
        "sdxl_cache_text_encoder_outputs": True,
        "text_encoder_lr": 5e-5,
        "stop_text_encoder_training": 20,
        "additional_parameters": "--min_snr_gama=5 --clever_training_mode",
    }
    settings, comment = import_files(tmp_path, {"gui.json": json.dumps({**GUI, **own})})
    assert settings["cache"] == {"dir": "/out/latents/123"} and settings["optim"]["text_encoder_lr"] == 5e-5
    assert (
        "sdxl_cache_text_encoder_outputs = true: cannot be combined with optim.text_encoder_lr and "
        "optim.text_encoder_2_lr; captions are encoded in each step" in comment
    )
    assert f"train_data_dir = '10_dog': WARNING: {tmp_path}/img/10_dog holds no images" in comment
    assert "stop_text_encoder_training = 20: text encoders with a learning rate are trained to the end" in comment
    assert "min_snr_gama = 5: is not a known option; did you mean min_snr_gamma?" in comment
    assert "clever_training_mode = true: is not a known option; docs/FROM_KOHYA.md lists" in comment
    own |= {"text_encoder_lr": 0, "unet_lr": 1e-4}
    (tmp_path / "img" / "10_dog" / "a.png").touch()
    settings, comment = import_files(tmp_path, {"gui.json": json.dumps({**GUI, **own})})
    assert settings["cache"]["text"] is True and "cannot be combined" not in comment and "no images" not in comment


@pytest.mark.parametrize("name", ["train.toml", "config.py", "train.sh", "gui.json"])
def test_settings_of_other_programs_name_the_importer(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps(GUI))
    with pytest.raises(UserInputError, match=f"import_config {tmp_path / name} --out my.yaml"):
        load_config(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        ("--resolution 832,1216", "data.buckets", [[832, 1216]]),
        ("--resolution 832,1216 --enable_bucket", "data.resolution_px", 1006),
        ("--resolution 512", "data.buckets", [[512, 512]]),
        ("", "optim.lr", 2e-6),
        ("", "train.max_steps", 1600),
        ("", "engine.precision", "fp32"),
        ("--mixed_precision bf16 --full_bf16", "engine.precision", "bf16_stochastic"),
        ("--mixed_precision bf16 --full_bf16 --optimizer_type Prodigy", "engine.precision", "bf16"),
        ("--fused_backward_pass --optimizer_type Adafactor", "engine.gradient_release", True),
        ("--fused_backward_pass --optimizer_type Adafactor", "optim.clipping", "parameter"),
        ("--fused_backward_pass --optimizer_type Adafactor --max_grad_norm 0", "optim.clipping", None),
        ("--fused_optimizer_groups 10 --mixed_precision bf16", "engine.gradient_release", True),
        ("--fused_optimizer_groups 10 --mixed_precision bf16", "engine.precision", "bf16_kahan"),
        (
            "--fused_backward_pass --optimizer_type Adafactor --mixed_precision bf16 --full_bf16",
            "engine.precision",
            "bf16_stochastic",
        ),
        ("--optimizer_type Prodigy", "engine.zero_stage", 0),
        ("--optimizer_type AdamWScheduleFree --lr_scheduler cosine", "optim.name", "adamw_schedule_free"),
        ("--optimizer_type AdamWScheduleFree --lr_scheduler cosine", "optim.schedule", None),
        ("--optimizer_type AdamWScheduleFree --lr_warmup_steps 10", "optim.warmup_steps", None),
        (
            "--optimizer_type prodigyplus.ProdigyPlusScheduleFree --optimizer_args d_coef=2",
            "optim.name",
            "prodigy_plus_schedule_free",
        ),
        ("--optimizer_type prodigyplus.ProdigyPlusScheduleFree", "engine.zero_stage", 0),
        ("--optimizer_type pytorch_optimizer.CAME", "optim.name", "came"),
        ("--optimizer_type pytorch_optimizer.CAME", "engine.zero_stage", 0),
        ("--optimizer_type Lion", "optim.weight_decay", 0.0),
        ("--optimizer_type PagedAdamW8bit", "optim.name", "bitsandbytes.optim.PagedAdamW8bit"),
        ("--optimizer_type my.module.Thing", "optim.name", "my.module.Thing"),
        ("--optimizer_type RAdam", "optim.name", "torch.optim.RAdam"),
        ("--optimizer_type RAdam", "optim.weight_decay", 0.0),
        ("--optimizer_type Adafactor", "optim.name", "adafactor"),
        ("--optimizer_type Adafactor --optimizer_args weight_decay=0.02", "optim.weight_decay", 0.02),
        ("--optimizer_type Adafactor --optimizer_args relative_step=False", "optim.kwargs", {"scale_parameter": True}),
        (
            "--optimizer_type SGDNesterov --optimizer_args momentum=0.8",
            "optim.kwargs",
            {"momentum": 0.8, "nesterov": True},
        ),
        ("--use_8bit_adam", "optim.name", "adamw8bit"),
        ("--save_every_n_epochs 2", "checkpoint.every_steps", 0),
        ("--save_every_n_epochs 2", "checkpoint.every_epochs", 2),
        ("--save_every_n_epochs 2 --save_last_n_epochs 5", "checkpoint.keep_last", 5),
        ("--save_last_n_steps 500", "checkpoint.keep_last", None),  # without save_every_n_steps nothing is saved
        ("--zero_stage 3", "engine.zero_stage", None),  # without --deepspeed
        ("--deepspeed --zero_stage 3 --offload_param_device none", "engine.zero_stage", 3),
        ("--ddp_timeout 90", "engine.timeout_minutes", 90),
        ("--network_module networks.lora --network_train_unet_only", "optim.text_encoder_lr", None),
        ("--network_module networks.lora", "optim.text_encoder_lr", 2e-6),
        ("--network_module lycoris.kohya --network_dim 8", "lora.rank", 8),
        ("--network_module lycoris.kohya", "lora.rank", 4),  # adapters, not the whole network
        ("--network_dim 8", "lora.rank", None),
        ("--scale_v_pred_loss_like_noise_pred --v_parameterization", "objective.weighting", "v_like_epsilon"),
        ("--v_pred_like_loss 0.5", "objective.weighting_gamma", 0.5),
        ("--huber_schedule snr --huber_c 0.2", "objective.huber_c", None),  # the loss is l2
        ("--huber_schedule constant --loss_type smooth_l1", "objective.huber_schedule", "constant"),
        ("--alpha_mask", "objective.masked_loss", True),
        ("--masked_loss --alpha_mask", "data.masks", None),
        ("--masked_loss", "objective.masked_loss", None),  # without masks
        ("--masked_loss --conditioning_data_dir masks", "objective.masked_loss", True),
        ("--masked_loss --conditioning_data_dir masks", "data.masks", "masks"),
        ("--conditioning_data_dir masks", "data.masks", None),
        ("--log_with wandb", "log.wandb", "finetuning"),  # kohya's name of the tracker
        ("--log_with all --network_module networks.lora", "log.wandb", "network_train"),
        ("--log_with wandb --log_tracker_name mine", "log.wandb", "mine"),
        ("--log_with tensorboard", "log.wandb", None),
        ("--log_with wandb --wandb_run_name a", "run.name", "a"),
        ("--log_with wandb --wandb_run_name a --output_name b", "run.name", "b"),
        (
            "--bucket_reso_steps 8 --enable_bucket --resolution 1024",
            "data.bucket_step_px",
            None,
        ),  # rejected by the schema
        ("--train_text_encoder --learning_rate_te1 0", "optim.text_encoder_lr", 0),
        ("--block_lr 1e-5," + ",".join(["2e-5"] * 22), "optim.block_lrs", [1e-5, *[2e-5] * 22]),
    ],
)
def test_conversion_of_single_options(tmp_path: Path, options: str, key: str, value: object) -> None:
    settings, _ = import_files(tmp_path, {"x.txt": f"sdxl_train.py --seed 1 {options}"})
    section, name = key.split(".")
    assert settings.get(section, {}).get(name) == value


def test_the_same_images_at_several_resolutions(tmp_path: Path) -> None:
    sets = "".join(
        f"[[datasets]]\nresolution = {side}\nbatch_size = {batch}\n[[datasets.subsets]]\nimage_dir = '/a'\n"
        for side, batch in ((512, 8), (1024, 2))
    )
    settings, comment = import_files(tmp_path, {"d.toml": sets})
    assert settings["data"]["resolution_px"] == [512, 1024] and settings["data"]["image_dirs"] == ["/a"]
    assert settings["train"]["micro_batch_size"] == 8 and "batch_size = [8, 2]: differs" in comment
    assert "enable_bucket = false" in comment  # one bucket per resolution in kohya's scripts


def test_datasets_that_share_some_folders(tmp_path: Path) -> None:
    """A folder that is listed twice is used once, and every difference is reported."""
    first = "[[datasets]]\nresolution = 1024\n[[datasets.subsets]]\nimage_dir = '/a'\nnum_repeats = 2\n"
    regularisation = "[[datasets.subsets]]\nimage_dir = '/r'\nis_reg = true\nnum_repeats = 7\n"
    second = "[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = '/a/'\nnum_repeats = 3\n"
    settings, comment = import_files(tmp_path, {"d.toml": first + regularisation + second})
    data = settings["data"]
    assert (data["resolution_px"], data["image_dirs"], data["source_weights"]) == ([1024, 512], ["/a"], [2])
    assert "num_repeats = [[2], [3]]: differs between resolutions" in comment
    # Regularisation images are balanced for every value of num_repeats.
    assert data["regularisation_dirs"] == ["/r"] and "regularisation_repeats" not in data
    assert "num_repeats = 7: has no effect with is_reg" in comment and "data.regularisation_repeats: 7" in comment
    other = "[[datasets.subsets]]\nimage_dir = '/b'\n"
    settings, comment = import_files(tmp_path, {"d.toml": first + other + second})
    assert settings["data"]["image_dirs"] == ["/a", "/b"] and settings["data"]["source_weights"] == [5, 1]
    assert "resolution = [1024, 512]: differs between datasets with different folders" in comment
    assert "image_dir = ['/a']: is in several" in comment


def test_unset_options_are_compared_by_their_defaults(tmp_path: Path) -> None:
    """Unset options are compared by the training file's value or kohya's default; each file is read once."""
    sets = (
        "[general]\nenable_bucket = true\n[[datasets]]\nresolution = 1024\nbucket_reso_steps = 64\nbatch_size = 4\n"
        "[[datasets.subsets]]\nimage_dir = '/a'\n[[datasets.subsets]]\nimage_dir = '/b'\ncaption_prefix = 'x, '\n"
        "[[datasets]]\nresolution = 1024\n[[datasets.subsets]]\nimage_dir = '/c'\nkeep_tokens = 2\n"
    )
    files = {"t.toml": "dataset_config = 'd.toml'\ntrain_batch_size = 4\n", "d.toml": sets}
    settings, comment = import_files(tmp_path, files, str(tmp_path / "d.toml"))
    assert "bucket_reso_steps" not in comment and "batch_size" not in comment
    assert comment.count("caption_prefix = [unset, 'x, ']: differs") == 1
    assert comment.count("keep_tokens = [0, 2]: differs") == 1
    assert settings["train"]["micro_batch_size"] == 4 and settings["data"]["caption"] == {"first_line": True}


def test_a_vae_in_a_single_file_and_the_forks_options_of_it(tmp_path: Path) -> None:
    words = "--vae /m/eq.safetensors --vae_reflection_padding --vae_custom_scale 0.1406 --vae_custom_shift -0.4743"
    settings, _ = import_files(tmp_path, {"x.txt": f"sdxl_train.py --seed 1 {words}"})
    factors = {"vae_scaling_factor": 0.1406, "vae_shift_factor": -0.4743}
    assert settings["model"] == {"vae": "/m/eq.safetensors", "vae_padding": "reflect", **factors}
    settings, comment = import_files(tmp_path, {"x.txt": "sdxl_train.py --seed 1 --vae /m/best.ckpt"})
    assert "model" not in settings and "is not a safetensors file" in comment


def test_built_in_options_are_not_reported_as_unsupported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _, comment = import_files(tmp_path, {"x.txt": "sdxl_train.py --cache_latents --color_aug --save_state"})
    unsupported, built_in = comment.split("always on here, without a setting")
    assert "color_aug" in unsupported and "color_aug" not in built_in
    assert "cache_latents" in built_in and "save_state" in built_in
    assert capsys.readouterr().err.endswith(f"doctor.sh --cfg {tmp_path / 'x.yaml'}\n")


def test_a_dataset_file_overrides_folders_in_the_command(tmp_path: Path) -> None:
    sets = "".join(
        f"[[datasets]]\nresolution = [1024, 1024]\n[[datasets.subsets]]\nimage_dir = '/{name}'\n" for name in "ab"
    )
    command = "sdxl_train.py --dataset_config d.toml --train_data_dir /c --in_json m.json --enable_bucket"
    settings, comment = import_files(tmp_path, {"x.txt": command, "d.toml": sets})
    assert settings["data"]["image_dirs"] == ["/a", "/b"] and "metadata" not in settings["data"]
    assert "train_data_dir = '/c': has no effect" in comment and "in_json = 'm.json': has no effect" in comment


def test_folders_with_repeats(tmp_path: Path) -> None:
    for name in ("10_dog", "2_a cat", "notes"):
        (tmp_path / "train" / name).mkdir(parents=True)
    assert list_repeated_folders(tmp_path / "absent") == []
    settings, _ = import_files(tmp_path, {"x.txt": f"sdxl_train.py --train_data_dir {tmp_path / 'train'}"})
    folders = [str(tmp_path / "train" / name) for name in ("10_dog", "2_a cat")]
    assert settings["data"]["image_dirs"] == folders and settings["data"]["kohya_folders"]
    assert "source_weights" not in settings["data"]
    settings, comment = import_files(tmp_path, {"x.txt": "sdxl_train.py --train_data_dir /elsewhere"})
    assert settings["data"]["image_dirs"] == ["/elsewhere"] and settings["data"]["kohya_folders"]
    assert "is not a folder on this machine" in comment
    assert "not imported (" not in comment


def test_commands_of_other_shells(tmp_path: Path) -> None:
    (tmp_path / "x.bat").write_text(
        'accelerate launch sdxl_train.py ^\r\n  --output_dir="C:\\out\\new\\" ^\r\n  --seed=3\r\nREM --seed=4\r\n'
    )
    assert read_command(tmp_path / "x.bat").options == {"output_dir": "C:\\out\\new\\", "seed": 3}


def test_comments_and_number_signs_in_quotes(tmp_path: Path) -> None:
    (tmp_path / "x.sh").write_text(
        "# it's a comment\nsdxl_train.py --caption_prefix 'a #1 photo, ' --output_name \"b # c\" # don't\n"
    )
    assert read_command(tmp_path / "x.sh").options == {"caption_prefix": "a #1 photo, ", "output_name": "b # c"}


def test_python_settings_of_every_form(tmp_path: Path) -> None:
    text = """
ROOT = "/data"
SHARED = dict(seed=3, lr=1e-5)
def get_config(size=2):
    c = ml_collections.ConfigDict({"a": ROOT + "/x", **SHARED})
    c.b = f"{ROOT}/y"
    c["d"] = c.a
    c.update(dict(e=2 ** 10))
    c.f: float = 10 ** 1000 * 1e300
    return c
"""
    (tmp_path / "x.py").write_text(text)
    values, sources = read_python(tmp_path / "x.py")
    assert values == {"a": "/data/x", "seed": 3, "lr": 1e-5, "b": "/data/y", "d": "/data/x", "e": 1024}
    assert sources == {"f": "10 ** 1000 * 1e+300"}


def test_python_is_never_executed(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("config.a = [1, (2, 3)]\nconfig.b = open('/etc/passwd')\nconfig.c = -1 / 0\n")
    assert read_python(tmp_path / "x.py") == ({"a": [1, [2, 3]]}, {"b": "open('/etc/passwd')", "c": "-1 / 0"})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.toml", "a = ", "is not valid TOML"),
        ("x.json", "{", "is not valid JSON"),
        ("x.json", '{"a": {"image_path": "b.png"}}', "does not hold the settings of kohya_ss"),
        ("x.json", '{"LoRA_type": "Standard", "lr_warmup": [1]}', "lr_warmup = [1]"),
        ("x.json", '{"seed": 1}', "at least two keys such as pretrained_model_name_or_path, max_resolution"),
        ("x.json", '{"seed": 1}', "found: seed"),
        ("x.sh", "echo hello", "contains no options"),
        ("x.sh", "sdxl_train.py --a 'b", "is not a command line"),
        ("x.py", "def f(:", "is not valid Python"),
        ("x.py", "a = 1", "assigns nothing"),
        ("x.toml", 'dataset_config = "absent.toml"', "No such file"),
    ],
)
def test_files_that_cannot_be_read_are_reported(tmp_path: Path, name: str, text: str, message: str, capsys) -> None:
    (tmp_path / name).write_text(text)
    assert main([str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


def test_a_frozen_unet_of_the_first_sdxl_trainer(tmp_path: Path) -> None:
    settings, _ = import_files(tmp_path, {"config.py": "config.train_nnet = False\nconfig.seed = 1\n"})
    assert settings["optim"]["groups"] == [{"match": "^unet\\.", "lr": 0}]


def test_an_output_that_cannot_be_written_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "x.txt").write_text("sdxl_train.py --seed 1")
    assert main([str(tmp_path / "x.txt"), "--out", str(tmp_path / "absent" / "x.yaml")]) == 2
    assert "--out" in capsys.readouterr().err


def test_every_option_names_keys_of_the_schema_or_a_reason() -> None:
    own = [option for option in FIRST_TRAINER_OPTIONS.values() if not isinstance(option, str)]
    known = set(iterate_keys())
    assert len(KOHYA_OPTIONS) > 180 and len(KOHYA_OPTIONS) == sum(map(len, KOHYA_GROUPS.values()))
    for option in (*KOHYA_OPTIONS.values(), *own):
        assert set(option.keys) <= known and (option.keys or option.note), option
    assert {name for name in FIRST_TRAINER_OPTIONS.values() if isinstance(name, str)} <= set(KOHYA_OPTIONS)
    assert set(kohya_options.KOHYA_DEFAULTS) <= set(KOHYA_OPTIONS)


def test_captions_are_shaped_as_kohyas_scripts_shape_them(tmp_path: Path) -> None:
    """The first line without wildcards, the option's separator for splitting, and a comma and a space for joining."""
    command = "sdxl_train.py --seed 1 --caption_separator ';' --shuffle_caption --keep_tokens 3 ; x --seed 3"
    settings, comment = import_files(tmp_path, {"x.txt": command})
    caption = CaptionConfig(**settings["data"]["caption"])
    shaped = build_caption({"caption": "a;b ; c\nd; e"}, build_caption_settings(caption), np.random.default_rng(0))
    assert shaped == "a, b, c" and caption.fix_text
    assert "shuffle_caption = true: empty tags" in comment and "docs/FROM_KOHYA.md lists differences" in comment
    settings, comment = import_files(tmp_path, {"x.txt": "sdxl_train.py --enable_wildcard --caption_suffix x"})
    assert settings["data"]["caption"] == {"suffix": "x", "wildcards": True}
    assert "enable_wildcard = true: of metadata" in comment and "caption_suffix = 'x': follows" in comment


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        ("--min_bucket_reso 300 --max_bucket_reso 1900", (256, 1920)),
        ("--min_bucket_reso 256 --max_bucket_reso 1920", (256, 1920)),
        ("--bucket_reso_steps 96", (192, 1056)),  # kohya's defaults, 256 and 1024
        ("--min_bucket_reso 50", (64, 1024)),
    ],
)
def test_limits_of_buckets_are_rounded_as_kohyas_scripts_round_them(tmp_path: Path, given: str, limits: tuple) -> None:
    settings, _ = import_files(tmp_path, {"x.txt": f"sdxl_train.py --enable_bucket --resolution 768 {given}"})
    assert (settings["data"].get("min_bucket_px"), settings["data"]["max_bucket_px"]) == limits


def test_the_prompt_files_of_kohyas_scripts_are_imported(tmp_path: Path) -> None:
    settings, comment = import_files(tmp_path, {"x.txt": "sdxl_train.py --seed 1 --sample_prompts p.toml"})
    assert settings["sample"]["prompt_file"] == "p.toml" and "kohya's scripts use 512 x 512, 30 steps" in comment


def test_paths_with_variables_are_imported_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.delenv("ABSENT", raising=False)
    (tmp_path / "train" / "3_dog").mkdir(parents=True)
    (tmp_path / "x.txt").write_text("sdxl_train.py --output_dir '$ABSENT/out' --train_data_dir '$HERE/train'")
    assert main([str(tmp_path / "x.txt"), "--out", str(tmp_path / "x.yaml")]) == 0
    text = (tmp_path / "x.yaml").read_text()
    settings = yaml.safe_load(text)
    assert settings["run"]["dir"] == "$ABSENT/out" and ", 0 rejected, " in text
    remark = (
        "output_dir = '$ABSENT/out': run.dir: names the environment variable ABSENT, which is not set; kept as it is, "
        "but an `export` in an imported file is not executed: set the variable before a run, or write the path"
    )
    assert remark in text.split("imported, but not exactly the same")[1]
    assert settings["data"]["image_dirs"] == [str(tmp_path / "train" / "3_dog")]


DIFFERING = """
[[datasets]]
resolution = 1024
batch_size = 4
  [[datasets.subsets]]
  image_dir = "/data/10_sks dog"
  num_repeats = 3
  class_tokens = "sks dog"
  caption_extension = ".txt"
  flip_aug = true
  [[datasets.subsets]]
  image_dir = "/data/b"
  class_tokens = "style"
  caption_extension = ".cap"
  keep_tokens = 2
  token_warmup_step = 4
  alpha_mask = true
  made_up = 3
  [[datasets.subsets]]
  image_dir = "/data/reg"
  is_reg = true
  class_tokens = "dog"
[[datasets]]
resolution = 1024
batch_size = 2
  [[datasets.subsets]]
  image_dir = "/data/c"
"""


def test_options_that_differ_between_subsets_have_true_reasons(tmp_path: Path) -> None:
    settings, comment = import_files(tmp_path, {"d.toml": DIFFERING})
    remarks = {line.split(" = ")[0].strip(): line for line in comment.splitlines() if " = " in line}
    assert remarks["class_tokens"].endswith(
        " = ['sks dog', 'style', 'dog']: an image without a caption gets the empty caption; write .txt files; or set "
        "data.kohya_folders: true: then `sks dog` is the caption of such images in 10_sks dog, and 10 multiplies their "
        "repeats, so divide data.source_weights by it"
    )
    assert "caption_extension = '.cap': is not available here; choose one of .txt, .caption" in comment
    assert "batch_size = [4, 2]: differs between datasets or subsets, but all micro batches have the same" in comment
    assert remarks["flip_aug"].endswith("; flips are on for all images here") and settings["data"]["flip_rate"] == 0.5
    assert remarks["alpha_mask"].endswith("; masks from alpha channels are off for all images here")
    assert "alpha_mask" not in settings["cache"]
    assert "made_up = 3: is not a known option" in comment
    # A strategy makes captions, but does not know the step.
    assert [name for name, line in remarks.items() if "a strategy can" in line] == ["keep_tokens"]
    settings, comment = import_files(tmp_path, {"d.toml": DIFFERING.replace(".cap", ".caption").replace("/10_", "/")})
    assert "caption_extension" not in comment and "kohya_folders" not in comment
    _, comment = import_files(tmp_path, {"d.toml": DIFFERING.replace('".txt"', '".wd"')})
    assert "caption_extension = ['.wd', '.cap']: is not available here" in comment


def test_names_of_runs_are_made_valid(tmp_path: Path) -> None:
    """The folders of the run and of its latents agree, and the change is reported."""
    words = "--log_with wandb --wandb_run_name 'my style v1'"
    for name in ("my style v1", "my/style v1"):
        settings, comment = import_files(tmp_path, {"x.txt": f"sdxl_train.py --output_name '{name}'"})
        assert settings["run"]["name"] == "my_style_v1" and settings["cache"]["dir"] == "latents/my_style_v1"
        changed = comment.split("imported, but not exactly the same")[1]
        assert f"output_name = '{name}': becomes my_style_v1: run.name consists of letters, digits" in changed
    settings, _ = import_files(tmp_path, {"x.txt": f"sdxl_train.py --output_name 'my style v1' {words}"})
    assert settings["run"]["name"] == "my_style_v1"
    settings, comment = import_files(tmp_path, {"x.txt": "sdxl_train.py --seed 1 --output_name '$NAME'"})
    assert "name" not in settings["run"] and settings["cache"]["dir"] == "latents/run"
    assert "output_name = '$NAME': contains the variable $NAME; an `export` in an imported file is not" in comment
    settings, comment = import_python(tmp_path, image_dirs=["/a"], output_dir="out/my style")
    assert settings["run"]["name"] == "my_style" and "output_dir = 'out/my style': becomes my_style: " in comment
