"""Every command in the documents is run, or marked with why it cannot be; every setting that they name exists.

A block of ```bash is run line by line by tests/support/document_commands.py, unless the line before it is
`<!-- not run: REASON -->`, or `<!-- run by FILE -->` or `<!-- run by FILE::TEST -->`, which says what runs it.
Every preset goes through a dry run in the same process: settings, data, cache, networks and engine.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from document_commands import split_command
from programs import ROOT, run_program

from sdxl_trainer.configs.load import build_config, iterate_keys, load_config
from sdxl_trainer.data.images.demo_set import draw_demo_set
from sdxl_trainer.train import convert
from sdxl_trainer.train.tiny.build import build_tiny_sdxl, load_wide_vae

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PRESETS = sorted((ROOT / "configs").glob("*.yaml"))
BLOCK = re.compile(r"^(?:<!-- ([^\n]*) -->\n)?```(\w+)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"not run: (.{10,})|run by (\S+?)(?:::(\w+))?")
SECTIONS = {key.partition(".")[0] for key in iterate_keys()}
# What looks like a setting of ours and is a file, or an argument that is handed on.
NO_SETTINGS = re.compile(r".*\.(py|sh|json|jsonl|log|html|yaml)|optim\.kwargs\..*|engine\.deepspeed\..*")
TOML = '[a]\npretrained_model_name_or_path = "/models/sd_xl_base_1.0.safetensors"\nlearning_rate = 1e-5\n'
DATASET_TOML = '[[datasets]]\nenable_bucket = true\nresolution = 1024\n[[datasets.subsets]]\nimage_dir = "{}"\n'
SEED_CONFIG = "def get_config():\n    config = ConfigDict()\n    config.learning_rate = 1e-5\n    return config\n"


def list_blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """(mark, body) of the code blocks in a language; those that name a file are examples of its content."""
    found = BLOCK.findall(page.read_text())
    return [(mark, body) for mark, kind, name, body in found if kind == language and not name.strip()]


def split_lines(body: str) -> list[str]:
    """The commands of a block, without comments; one that is not closed yet runs on in the next line."""
    commands, part = [], ""
    for line in body.replace("\\\n", " ").splitlines():
        part += f"\n{line}" if part else line
        try:
            words = shlex.split(part, comments=True)
        except ValueError:
            continue  # an open quotation
        if words:
            commands.append(part if "\n" in part else re.sub(r"\s+#.*", "", part))
        part = ""
    assert not part, f"not a whole command: {part}"
    return commands


def list_commands() -> list[str]:
    """What is to be run, page by page; each page begins with a new my.yaml."""
    commands = []
    for page in PAGES:
        commands.append("cp configs/sdxl_full.yaml my.yaml")
        for mark, body in list_blocks(page, "bash"):
            commands += [] if mark else split_lines(body)
    return commands


def fill_stage(stage: Path, tiny_folder: Path, run: Path) -> None:
    """A folder with all that the commands speak of: the checkout, models, images, settings, a run, prompts."""
    for folder in ("launch", "configs", "cache", "train", "docs", "tests"):
        (stage / folder).symlink_to(ROOT / folder)
    models, images = stage / "models", stage / "data" / "images"
    models.mkdir()
    (models / "sdxl-diffusers").symlink_to(tiny_folder / "model")
    (models / "clip-tokenizer").symlink_to(tiny_folder / "model" / "tokenizer")
    assert convert.main([str(tiny_folder / "model"), str(models / "sd_xl_base_1.0.safetensors"), "--dtype=fp32"]) == 0
    load_wide_vae(32).save_pretrained(models / "flux2-vae")
    wide, first = build_tiny_sdxl(stage / "wide", channels=32), stage / "runs" / "first" / "models"
    first.mkdir(parents=True)
    assert convert.main([str(wide), str(first / "step-00002000.safetensors"), "--dtype=fp32"]) == 0
    metadata = json.loads(draw_demo_set(images, num_images=8).read_text())
    for record in metadata.values():
        (images / record["image_path"]).with_suffix(".txt").write_text(record["caption"])
        record["image_path"] = str(images / record["image_path"])
    (stage / "val.json").write_text(json.dumps(metadata))
    (stage / "my-cache").symlink_to(stage / "data" / "latents")
    (stage / "my.yaml").write_text((ROOT / "configs" / "sdxl_full.yaml").read_text())
    (stage / "train.toml").write_text(TOML)
    (stage / "dataset.toml").write_text(DATASET_TOML.format(images))
    (stage / "config.py").write_text(SEED_CONFIG)
    (stage / "prompts.txt").write_text("a red circle on a white background\n")
    mine = stage / "runs" / "my"
    (mine / "checkpoints").mkdir(parents=True)
    (mine / "models").mkdir()
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (mine / "config.yaml").write_text(yaml.safe_dump(settings))
    (mine / "logs").symlink_to(run / "logs")
    for name in ("step-00005000", "step-00010000"):
        (mine / "checkpoints" / name).symlink_to(run / "checkpoints" / "step-00000020")
        (mine / "models" / f"{name}.safetensors").symlink_to(run / "models" / "step-00000020.safetensors")


def test_commands_of_the_documents_and_presets_run(tiny_folder: Path, one_rank: Path, tmp_path: Path) -> None:
    fill_stage(tmp_path, tiny_folder, one_rank)
    commands = [re.sub(r"(?<![\w.])/(?=(models|data)/)", f"{tmp_path}/", command) for command in list_commands()]
    commands += [f"bash launch/train.sh --cfg configs/{preset.name}" for preset in PRESETS]
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    printed = run_program("tests/support/document_commands.py", tmp_path)
    assert len(re.findall(r"x \d+ ranks? = ", printed)) >= len(PRESETS)
    names = {load_config(path)[0].run.name for path in PRESETS}
    assert names <= {path.name for path in (tmp_path / "runs").iterdir()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_not_run_says_why(page: Path) -> None:
    for mark, body in list_blocks(page, "bash"):
        commands = split_lines(body)
        if not mark:
            assert commands
            continue
        said = MARK.fullmatch(mark)
        assert said, f"{page.name}: {mark}"
        for command in commands:
            split_command(command)  # torchrun's and DeepSpeed's own options are right all the same
        if said[2]:
            text = (ROOT / said[2]).read_text()
            for wanted in [f"def {said[3]}("] if said[3] else commands:
                assert wanted in text, f"{page.name}: {wanted!r} is not in {said[2]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_in_documents_exist(page: Path) -> None:
    """Blocks of YAML are right by the schema, and dotted keys in the text are keys."""
    for _, body in list_blocks(page, "yaml"):
        assert build_config(yaml.safe_load(body))[1] == [], body
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    dotted = re.findall(rf"`((?:{'|'.join(SECTIONS)})\.[\w.]+)", prose)
    known = set(iterate_keys())
    assert [key for key in dotted if key.rstrip(".") not in known and not NO_SETTINGS.fullmatch(key)] == []


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_says_what_to_change(preset: Path) -> None:
    config, problems = load_config(preset)
    assert problems == [] and config.model.path and config.cache.dir
    assert all(preset.read_text().count(f"# ({number})") == 1 for number in (1, 2, 3, 4))
