"""Sharing: what arrives at a stand-in for the hub, what a card says and does not say, and every refusal."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from PIL import Image
from programs import ROOT
from safetensors import safe_open
from safetensors.torch import save_file
from servers.hub_server import READ_TOKEN, TOKEN, Hub, serve_hub

from sdxl_trainer.configs.load import build_config
from sdxl_trainer.train.convert import main
from sdxl_trainer.train.export.card import describe_license, list_public_settings, make_public

ABOUT = [
    "about.title=Shapes",
    "about.author=somebody",
    "about.license=my own terms",
    "about.trigger_phrase=shapes style",
    "about.tags=[toy, shapes]",
    "about.base_model=them/base",
]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def small_model(tmp_path: Path) -> Path:
    """A file of adapters with metadata, as any program might have written it."""
    path = tmp_path / "style.safetensors"
    metadata = {"modelspec.title": "A style", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
    save_file({"lora_unet_x.lora_up.weight": torch.ones(4, 4)}, path, metadata)
    return path


def read_front_matter(card: bytes | str) -> dict:
    text = card.decode() if isinstance(card, bytes) else card
    return yaml.safe_load(text.split("---\n")[1])


def test_the_program_pushes_a_run_with_card_images_and_charts(one_rank: Path, tmp_path: Path) -> None:
    """The program itself, as a user starts it: everything that it wrote here is there, byte for byte."""
    Image.new("RGB", (600, 300), "red").save(tmp_path / "thumb.png")
    target = tmp_path / "my.safetensors"
    words = [*ABOUT, f"about.thumbnail={tmp_path / 'thumb.png'}", "about.description=Draws *shapes*."]
    with serve_hub() as server:
        environment = {**os.environ, "HF_ENDPOINT": server.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, ROOT / "train" / "convert.py", one_rank, target, "--push", "me/shapes", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"shared at {server.address}/me/shapes" in done.stderr
    repo, card_folder = server.repos["me/shapes"], tmp_path / "my.card"
    here = {path.relative_to(card_folder).as_posix(): path for path in card_folder.rglob("*") if path.is_file()}
    here["my.safetensors"] = target
    assert {name: path.read_bytes() for name, path in here.items()} == repo
    assert {"README.md", "images/000.png", "images/001.png", "images/loss.png"} <= repo.keys()
    assert server.private == {"me/shapes": False}
    check_card(repo["README.md"].decode(), one_rank)
    check_metadata(target)


def check_card(text: str, run: Path) -> None:
    front = read_front_matter(text)
    prompt = "a red circle on a white background"
    assert front["base_model"] == "them/base" and front["base_model_relation"] == "finetune"
    assert (front["license"], front["license_name"]) == ("other", "my own terms")
    assert front["tags"] == ["stable-diffusion-xl", "toy", "shapes"] and front["instance_prompt"] == "shapes style"
    assert front["widget"][0] == {"text": prompt, "output": {"url": "images/000.png"}}
    for part in (
        "# Shapes\n",
        "Draws *shapes*.",
        "- Trigger phrase: shapes style",
        f"![](images/000.png)\n\n`{prompt}`",
        'from_single_file("https://huggingface.co/me/shapes/blob/main/my.safetensors"',
        "| steps | 20 of 4 images |",
        "| optimizer | adamw, learning rate 0.001, constant |",
        "  resolution_px:\n  - 128\n",
        "- 24 images an epoch",
        "![Loss](images/loss.png)",
    ):
        assert part in text, part
    for folder in (run, run.parent.parent, Path.home()):
        assert str(folder) not in text
    assert "/tmp" not in text and "latents" not in text and "metadata.json" not in text


def check_metadata(model: Path) -> None:
    with safe_open(model, "pt") as file:
        found = {key.removeprefix("modelspec."): value for key, value in file.metadata().items()}
    assert (found["title"], found["author"], found["license"]) == ("Shapes", "somebody", "my own terms")
    assert (found["trigger_phrase"], found["tags"], found["encoder_layer"]) == ("shapes style", "toy, shapes", "2")
    assert found["description"] == "Draws *shapes*." and len(found["hash_sha256"]) == 66
    assert found["thumbnail"].startswith("data:image/jpeg;base64,/9j/")


def test_a_card_can_be_changed_before_it_is_pushed(hub: Hub, small_model: Path) -> None:
    assert main([str(small_model), "--card"]) == 0
    card = small_model.with_suffix(".card") / "README.md"
    assert "YOUR_NAME/YOUR_MODEL" in card.read_text() and "# A style\n" in card.read_text()
    card.write_text(card.read_text() + "\nWritten by hand.\n")
    assert main([str(small_model), "--push", "club/style", "--private"]) == 0
    repo = hub.repos["club/style"]
    assert repo.keys() == {"README.md", "style.safetensors"} and hub.private["club/style"]
    text = repo["README.md"].decode()
    assert "Written by hand." in text and "YOUR_NAME" not in text
    assert 'load_lora_weights("club/style", weight_name="style.safetensors")' in text
    assert read_front_matter(text)["tags"] == ["stable-diffusion-xl", "lora"]


def test_an_exported_model_of_a_run_is_pushed_as_it_is(hub: Hub, one_rank: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "models").mkdir(parents=True)
    shutil.copytree(one_rank / "logs", run / "logs")
    shutil.copytree(one_rank / "samples", run / "samples")
    shutil.copy(one_rank / "config.yaml", run)
    model = run / "models" / "step-00000004-ema-0.999.safetensors"
    shutil.copy(one_rank / "models" / "step-00000020.safetensors", model)
    assert main([str(model), "--push", "me/x"]) == 0
    repo = hub.repos["me/x"]
    assert repo[model.name] == model.read_bytes()
    text = repo["README.md"].decode()
    assert "| weights | moving average 0.999 |" in text and "| steps | 4 of 4 images |" in text
    # The run drew images at its end alone, which this model of step 4 did not draw.
    assert not any(name.startswith("images/0") for name in repo)


def test_a_diffusers_folder_holds_its_own_card(hub: Hub, one_rank: Path, tmp_path: Path) -> None:
    words = ["about.description=A folder.", "about.license=MIT"]
    assert main([str(one_rank), str(tmp_path / "folder"), "--push", "me/folder", *words]) == 0
    repo = hub.repos["me/folder"]
    here = {path.relative_to(tmp_path / "folder").as_posix(): path for path in (tmp_path / "folder").rglob("*.*")}
    assert {name: path.read_bytes() for name, path in here.items() if path.is_file()} == repo
    text = repo["README.md"].decode()
    assert 'from_pretrained("me/folder")' in text and "A folder." in text and "model_index.json" in repo
    assert read_front_matter(text)["license"] == "mit"


def test_an_upload_that_failed_is_continued_without_another_conversion(
    hub: Hub, one_rank: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    hub.refuses_uploads = True
    target = tmp_path / "my.safetensors"
    assert main([str(one_rank), str(target), "--push", "me/x"]) == 1
    printed = capsys.readouterr().err
    assert "the upload to me/x failed" in printed and "403" in printed
    assert f"continue with: python train/convert.py {target} --push me/x" in printed.replace("\n", " ")
    written = target.read_bytes()
    hub.refuses_uploads = False
    assert main([str(target), "--push", "me/x"]) == 0
    assert hub.repos["me/x"]["my.safetensors"] == written and "| steps | 20 " in hub.repos["me/x"]["README.md"].decode()
    uploads = hub.uploads
    assert main([str(target), "--push", "me/x"]) == 0
    assert hub.uploads == uploads  # the large files have arrived already


@pytest.mark.parametrize(
    ("change", "words", "text"),
    [
        ({"HF_TOKEN": "hf_wrong"}, [], "the hub does not accept the token\n      cure: log in with a token"),
        ({"HF_TOKEN": ""}, [], "needs a token of the hub, and there is none"),
        ({"HF_TOKEN": READ_TOKEN}, [], "this one may only read"),
        ({}, ["--push", "them/x"], "is in the namespace of somebody else\n      cure: yours are: me, club"),
        ({}, ["--push", "x"], "is no hub id\n      cure: give YOUR_NAME/YOUR_MODEL"),
        ({"ENDPOINT": "http://127.0.0.1:9"}, [], "cannot be reached"),
    ],
)
def test_a_push_that_cannot_succeed_is_refused_before_the_conversion(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, change, words, text
) -> None:
    """The source is a model that does not exist: had its conversion begun, that would be named instead."""
    for name, value in change.items():
        if name == "ENDPOINT":
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    arguments = [str(tmp_path / "nothing"), str(tmp_path / "x.safetensors"), "--push", "me/x"]
    assert main([*arguments, *words]) == 2
    assert text in capsys.readouterr().err
    assert not hub.repos


def test_models_that_cannot_be_shared_are_named(
    hub: Hub, one_rank: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "a.ckpt").touch()
    for source, text in (
        (tmp_path / "nothing", "does not exist"),
        (one_rank, "is no model that can be shared as it is\n      cure: give a target"),
        (tmp_path / "a.ckpt", "is no .safetensors file"),
    ):
        assert main([str(source), "--push", "me/x"]) == 2
        assert text in capsys.readouterr().err
    assert main([str(tmp_path / "nothing"), "--card", "--private"]) == 2
    assert "--private\n      needs --push" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(one_rank), "run.name=x"])
    assert "required: target" in capsys.readouterr().err
    assert main([str(one_rank), str(tmp_path / "y.safetensors"), f"about.thumbnail={tmp_path / 'a.ckpt'}"]) == 2
    assert "about.thumbnail = " in capsys.readouterr().err


def test_conversions_keep_what_a_file_says_about_its_model(one_rank: Path, tmp_path: Path) -> None:
    """Title, author and licence of a file that is converted stay, unless the settings say something else."""
    config = f"model.config={one_rank.parent.parent / 'model'}"
    first, second, third = (tmp_path / f"{name}.safetensors" for name in ("first", "second", "third"))
    assert main([str(one_rank), str(first), *ABOUT]) == 0
    assert main([str(first), str(second), config]) == 0
    assert main([str(second), str(third), config, "about.author=another", "run.name=mine"]) == 0
    for path, title, author in ((second, "Shapes", "somebody"), (third, "mine", "another")):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert (metadata["modelspec.title"], metadata["modelspec.author"]) == (title, author)
        assert metadata["modelspec.license"] == "my own terms"


def test_a_card_names_no_file_of_the_settings(tmp_path: Path) -> None:
    """Of settings that say how a model was trained, those that name files are left out; regular expressions stay."""
    words = [
        f"optim.name={tmp_path / 'mine.py'}:Mine",
        "optim.schedule=./wave.py:wave",
        "optim.groups=[{match: '^unet\\.', lr: 0.001}]",
        f"data.caption.aliases={tmp_path / 'aliases.csv'}",
        "optim.lr=0.5",
        f"data.image_dirs=[{tmp_path}]",
    ]
    config, _ = build_config({"model": {"path": str(tmp_path)}}, words)
    settings = list_public_settings(config)
    assert str(tmp_path) not in repr(settings) and "wave" not in repr(settings)
    assert settings["optim"]["lr"] == 0.5 and settings["optim"]["groups"][0]["match"] == r"^unet\."
    assert make_public(config.optim.name) == "own code" and make_public("adamw") == "adamw"
    assert describe_license("https://example.org/terms") == {
        "license": "other",
        "license_link": "https://example.org/terms",
    }
