"""Typical mistakes of people who come from other trainers, and what each message must hold: value, place and cure.

A message is graded here, not its wording: the fragments are the value or name that is wrong, the setting or file, and
what to do. Everything runs in this process, without a network and without ranks.
"""

import errno
import io
import json
import os
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import GatedRepoError
from programs import TINY
from samples.single_file_samples import FULL, fake_tensors, write_fake
from samples.single_file_samples import TINY as TINY_CONFIGS

from sdxl_trainer.cache.models import encoders
from sdxl_trainer.cache.models.source import fetch_from_hub
from sdxl_trainer.configs.language.translate import load_translator
from sdxl_trainer.configs.load import build_config, load_config
from sdxl_trainer.configs.problems import FailedError, UserInputError, raise_if_any
from sdxl_trainer.data.formats.latents import LatentSample, write_latents
from sdxl_trainer.data.formats.manifest import Identity, write_identity
from sdxl_trainer.data.images.bucket import BucketRule, CropBox, Size, list_buckets
from sdxl_trainer.data.images.transforms import BadImageError, prepare_image
from sdxl_trainer.launch.failures import explain_failure
from sdxl_trainer.launch.folder_lock import lock_folder
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.engine.deepspeed_config import find_bf16_fault
from sdxl_trainer.train.run.checks import check_prediction, verify_run

# Quoted values, file names and commands, which no language changes; three words of English in a row are a sentence.
UNTRANSLATED = re.compile(
    r"'[^']*'|`[^`]*`|\"[^\"]*\"|\S*[/.=_:]\S*|git lfs pull|pip install( -U)?( --no-deps)? \S+|hf auth login"
    r"|docker run --shm-size=8g|apt-get install|unable to write to file|No space left|Connection closed by peer"
    r"|access is restricted"
)
CSV_IN_GBK = "image_path,caption\na.png,红色的猫".encode("gb18030")
ENGLISH = re.compile(r"\b[A-Za-z]?[a-z]+ [a-z]+ [a-z]+\b")

RULE = BucketRule(resolution_px=64, min_px=64, max_px=64, step_px=64, no_upscale=False, fixed=())
UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a model whose weights are empty files, and four latents with captions."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(TINY, folder / "model")
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (folder / "model" / name / "x.safetensors").touch()
    (folder / "data").mkdir()
    for number in range(4):
        sample = LatentSample(
            latents=np.zeros((4, 8, 8), np.float32), original_size=Size(64, 64), crop_ltrb=CropBox(0, 0, 64, 64)
        )
        write_latents(folder / "data" / f"{number}.npz", sample)
        (folder / "data" / f"{number}.txt").write_text("a b, c")
    return folder


@pytest.fixture(autouse=True)
def no_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide an installed open_clip_torch: a wrong model is one problem, with or without it."""
    monkeypatch.setattr(encoders, "find_installed_vocabulary", lambda: None)


def find_english(message: str) -> list[str]:
    """Return the English sentences that are left in the Chinese form of a message."""
    translated = load_translator("zh").translate(message)
    return [line for line in translated.splitlines() if ENGLISH.search(UNTRANSLATED.sub("", line))]


def check(base: Path, folder: Path, words: list[str] | str) -> str:
    """Return the message that a start with these overrides, or with this file of settings, ends with."""
    raw = {
        "run": {"dir": str(folder / "runs")},
        "model": {"path": str(base / "model")},
        "data": {"image_dirs": [str(base / "data")], "resolution_px": 64, "min_bucket_px": 64},
    }
    cfg = folder / "my.yaml"
    cfg.write_text(words if isinstance(words, str) else json.dumps(raw))
    try:
        config, problems = load_config(cfg, [] if isinstance(words, str) else words)
        raise_if_any(problems)
        raise_if_any(verify_run(config, 1)[1])
    except (UserInputError, FailedError) as error:
        return str(error)
    return ""


def write_file(folder: Path, name: str, content: bytes | str) -> Path:
    """Write a file, and return its path."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def give_model(name: str, content: bytes | str) -> Callable[[Path], list[str]]:
    """Return the mistake of giving a file with this content as the model."""
    return lambda folder: [f"model.path={write_file(folder, name, content)}"]


def give_tensors(tensors: dict[str, tuple[int, ...]]) -> Callable[[Path], list[str]]:
    """Return the mistake of giving a safetensors file with these tensors as the model."""
    fakes = {name: ("F16", shape) for name, shape in tensors.items()}
    return lambda folder: [f"model.path={write_fake(folder / 'm.safetensors', fakes)}"]


def give_words(*words: str) -> Callable[[Path], list[str]]:
    """Return the mistake of these overrides."""
    return lambda folder: list(words)


def give_yaml(text: str) -> Callable[[Path], str]:
    """Return the mistake of a file of settings with this text."""
    return lambda folder: text


def give_pickle(folder: Path) -> list[str]:
    """Give a .ckpt as torch.save writes it."""
    with zipfile.ZipFile(folder / "old.ckpt", "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}.")
    return [f"model.path={folder / 'old.ckpt'}"]


def give_cut_download(folder: Path) -> list[str]:
    """Give an SDXL file whose download broke off."""
    path = write_fake(folder / "sdxl.safetensors", fake_tensors(TINY_CONFIGS))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    return [f"model.path={path}"]


def give_sd15_folder(folder: Path) -> list[str]:
    """Give a diffusers folder of SD 1.5."""
    write_file(folder, "sd15/model_index.json", '{"_class_name": "StableDiffusionPipeline"}')
    return [f"model.path={folder / 'sd15'}"]


def give_bin_weights(folder: Path) -> list[str]:
    """Give a diffusers folder with pickled weights."""
    shutil.copytree(TINY, folder / "m")
    for file in folder.glob("m/*/*.safetensors"):
        file.unlink()
    write_file(folder, "m/unet/diffusion_pytorch_model.bin", "")
    return [f"model.path={folder / 'm'}"]


def give_vae(folder: Path, **config: object) -> list[str]:
    """Give a VAE with other settings than SDXL's."""
    write_file(folder, "vae/config.json", json.dumps({**FULL["vae"], **config}))
    write_file(folder, "vae/x.safetensors", "")
    return [f"model.vae={folder / 'vae'}"]


def give_images(folder: Path) -> list[str]:
    """Give images without captions, whose latents are cached."""
    sample = LatentSample(
        latents=np.zeros((4, 8, 8), np.float32), original_size=Size(64, 64), crop_ltrb=CropBox(0, 0, 64, 64)
    )
    (folder / "images").mkdir()
    write_latents(folder / "images" / "a.npz", sample)
    return [f"data.image_dirs=[{folder / 'images'}]"]


def give_wide_latents(folder: Path) -> list[str]:
    """Give latents of 16 channels for a model of 4."""
    sample = LatentSample(
        latents=np.zeros((16, 8, 8), np.float32), original_size=Size(64, 64), crop_ltrb=CropBox(0, 0, 64, 64)
    )
    (folder / "wide").mkdir()
    write_latents(folder / "wide" / "a.npz", sample)
    (folder / "wide" / "a.txt").write_text("a b, c")
    return [f"data.image_dirs=[{folder / 'wide'}]"]


def give_cache_of_another_vae(folder: Path) -> list[str]:
    """Give a cache whose latents are of a VAE with other weights."""
    identity = Identity(
        vae_sha256="0" * 64,
        vae_precision="fp32",
        dtype="float32",
        posterior="sample",
        flip=False,
        resolution_px=64,
        min_bucket_px=64,
        max_bucket_px=2048,
        bucket_step_px=64,
        no_upscale=False,
    )
    write_file(folder, "cache/manifest/part-00000.jsonl", "{}\n")
    write_identity(folder / "cache", identity, vae={"name": "my/eq-vae", "files": []})
    return [f"cache.dir={folder / 'cache'}"]


def pack_arrays(**arrays: np.ndarray) -> bytes:
    """Return the content of an npz file."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def give_tar(folder: Path, members: dict[str, bytes], num_bytes: int | None = None) -> list[str]:
    """Give a shard with these members, cut after `num_bytes`."""
    with tarfile.open(folder / "set.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    if num_bytes:
        os.truncate(folder / "set.tar", num_bytes)
    return ["data.image_dirs=[]", f"data.metadata={folder / 'set.tar'}", f"cache.dir={folder / 'cache'}"]


def give_unusable_image(folder: Path) -> list[str]:
    """Give two images, of which the cache job has encoded one and listed the other as bad."""
    [words] = give_images(folder)
    for name in ("a.png", "a.txt", "b.png", "b.txt"):
        write_file(folder, f"images/{name}", name)
    file = folder / "images" / "b.png"
    line = {"key": "b", "file": str(file), "reason": f"{file}: not an image in a format that Pillow knows"}
    source = [file.stat().st_size, file.stat().st_mtime_ns, "rules"]
    write_file(folder, "images/logs/bad_samples.jsonl", json.dumps({**line, "source": source}) + "\n")
    return [words, "cache.on_missing=error"]


def give_json(text: str) -> Callable[[Path], list[str]]:
    """Return the mistake of metadata with this text."""
    return lambda folder: ["data.image_dirs=[]", f"data.metadata={write_file(folder, 'meta.json', text)}"]


def give_tags(setting: str, text: str) -> Callable[[Path], list[str]]:
    """Return the mistake of a file of tags with this text."""
    return lambda folder: [f"data.caption.{setting}={write_file(folder, 'tags.csv', text)}"]


def give_finished_run(folder: Path) -> list[str]:
    """Start a run anew whose folder holds a checkpoint."""
    checkpoint = folder / "runs" / "run" / "checkpoints" / "step-00000005"
    checkpoint.mkdir(parents=True)
    TrainState(step=5).save(checkpoint)
    write_file(checkpoint, "manifest.json", '{"files": {}, "step": 5}')
    return ["run.resume=never"]


# Mistake → what the message must hold.
MISTAKES: dict[str, tuple[Callable[[Path], list[str] | str], tuple[str, ...]]] = {
    # the file of settings
    "a full-width colon": (
        give_yaml("train:\n  max_steps： 5\n  micro_batch_size: 1\n"),
        ("my.yaml", "full-width colon in line 2", "a colon of half width, and a space"),
    ),
    "tabs in YAML": (give_yaml("train:\n\tmax_steps: 5\n"), ("my.yaml", "line 2", "spaces", "no tabs")),
    "no space after a colon": (give_words("optim=lr:1e-4"), ("optim", "'lr:1e-4'", "colon")),
    "a path in double quotes": (give_yaml('model: {path: "C:\\models\\x"}'), ("line 1", "single quotes")),
    "a pattern without quotes": (
        give_words("data.metadata=[s3://b/s-{0..2}.tar, a.json]"),
        ("data.metadata", "valid YAML", "\"data.metadata=['s3://b/s-{0..2}.tar', 'a.json']\""),
    ),
    "a pattern without quotes in a file": (
        give_yaml("data: {metadata: [s3://b/s-{0..2}.tar]}"),
        ("my.yaml", "line 1", "quotes around texts with braces", "['s3://bucket/set-{0..9}.tar']"),
    ),
    "settings in another encoding": (
        lambda folder: [f"data.metadata={write_file(folder, 'm.csv', CSV_IN_GBK)}"],
        ("m.csv", "probably gb18030", "iconv -f gb18030 -t UTF-8"),
    ),
    "a word processor's dash": (
        give_words("sample.prompts=['a cat –n ugly']"),
        ("sample.prompts.0", "flag –n", "word processor's dash", "write --n"),
    ),
    "a key twice": (give_yaml("train:\n  max_steps: 5\n  max_steps: 6\n"), ("max_steps", "twice", "line 3", "remove")),
    "a path of Windows": (give_words(r"model.path=D:\sd\x.safetensors"), ("model.path", "Windows", "/mnt/d/sd/x.safe")),
    "a variable without a value": (give_words("cache.dir=$NO_SUCH_DISK/x"), ("cache.dir", "NO_SUCH_DISK", "not set")),
    "a word for a number": (give_words("optim.lr=1e-4f"), ("optim.lr", "'1e-4f'", "number", "1e-5")),
    "a comma in a number": (give_words("optim.lr='0,0001'"), ("optim.lr", "'0,0001'", "number", "0.1")),
    "a list for a value": (give_words("optim.lr=[1e-4]"), ("optim.lr", "0.0001", "number", "without brackets")),
    "a value for a list": (give_words("optim.betas=0.9"), ("optim.betas", "0.9", "list", "brackets")),
    "a value for a section": (give_words("lora=32"), ("lora", "32", "section", "indented")),
    "a fraction of a step": (give_words("train.max_steps=1.5"), ("train.max_steps", "1.5", "whole number")),
    "the wrong section": (give_words("train.lr=1e-4"), ("train.lr", "did you mean optim.lr?")),
    "a name of kohya's": (give_words("train.train_batch_size=4"), ("train_batch_size", "train.micro_batch_size")),
    "kohya's network_dim": (give_words("lora.network_dim=32"), ("lora.network_dim", "did you mean lora.rank?")),
    "capitals in a key": (give_words("optim.LR=1e-4"), ("optim.LR", "did you mean optim.lr?")),
    "capitals in an optimizer": (give_words("optim.name=AdamW8bit"), ("'AdamW8bit'", "did you mean adamw8bit?")),
    "capitals in a weighting": (give_words("objective.weighting=Min-SNR"), ("'Min-SNR'", "did you mean min_snr?")),
    "a precision of diffusers": (give_words("engine.precision='no'"), ("engine.precision", "'no'", "write fp32")),
    "v_prediction": (
        give_words("objective.prediction=v_prediction", "objective.zero_terminal_snr=true"),
        ("'v_prediction'", "write v"),
    ),
    "a mistyped key of the cache's resolution": (
        give_words("data.resolution=512", "data.max_bucket_px=64"),
        ("data.resolution", "did you mean data.resolution_px?"),
    ),
    "a VAE in fp16": (give_words("cache.vae_precision=fp16"), ("vae_precision", "overflows in fp16", "NaN", "bf16")),
    # the model
    "no model": (give_words("model.path="), ("model.path", "has no value", "write one")),
    "a model that is not there": (give_words("model.path=/models/x.safetensors"), ("/models/x.safe", "neither a file")),
    "an address as model": (
        give_words("model.path=https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/tree/main"),
        ("model.path", "an address", "stabilityai/stable-diffusion-xl-base-1.0"),
    ),
    "a LoRA as model": (give_tensors({"lora_unet_a.lora_down.weight": (4, 4)}), ("a LoRA", "merge it into a base")),
    "SD 1.5 as model": (give_tensors({f"{UNET}a.attn2.to_k.weight": (320, 768)}), ("SD1.5", "an SDXL model")),
    "SD 2 as model": (give_tensors({f"{UNET}a.attn2.to_k.weight": (320, 1024)}), ("SD2", "an SDXL model")),
    "an SD 1.5 folder": (give_sd15_folder, ("model.path", "StableDiffusionPipeline", "an SDXL model")),
    "a .ckpt": (give_pickle, ("old.ckpt", "pickled", "python train/convert.py", "old.safetensors")),
    "a .ckpt under another name": (give_model("x.safetensors", b"\x80\x02}q\x00(X\x05" * 9), ("pickled", "convert.py")),
    "a web page": (give_model("sdxl.safetensors", "<!doctype html>" * 9), ("sdxl.safe", "web page", "/resolve/")),
    "a pointer of LFS": (give_model("m.safetensors", "version https://git-lfs" * 9), ("Git LFS", "git lfs pull")),
    "an empty model": (give_model("m.safetensors", ""), ("m.safetensors is empty", "download")),
    "a download that broke off": (give_cut_download, ("is damaged", "bytes", "download")),
    "a tiny model without its configs": (
        lambda folder: [f"model.path={write_fake(folder / 'tiny.safetensors', fake_tensors(TINY_CONFIGS))}"],
        ("SDXL's networks in other sizes", "unet: ", "set model.config"),
    ),
    "the folder of a model file": (
        lambda folder: [f"model.path={write_file(folder, 'checkpoints/sdxl.safetensors', '').parent}"],
        ("checkpoints", "not an SDXL model in diffusers layout", "give the file itself", "sdxl.safetensors"),
    ),
    "pickled weights in a folder": (give_bin_weights, ("no safetensors weights in unet/", ".safetensors")),
    "an empty VAE file": (
        lambda folder: [f"model.vae={write_file(folder, 'vae.safetensors', '')}"],
        ("model.vae", "vae.safetensors is empty", "download or copy it again"),
    ),
    "the VAE of SD 1.5": (lambda folder: give_vae(folder, scaling_factor=0.18215), ("model.vae", "VAE of SD 1.5")),
    "a VAE for video": (lambda folder: give_vae(folder, _class_name="AutoencoderKLWan"), ("a AutoencoderKLWan",)),
    "latents of another VAE": (
        give_wide_latents,
        (
            "cache.dir",
            "latents of 16 channels",
            "gives 4 (first sample: a; 1 of 1",
            "set model.vae to the VAE that made",
        ),
    ),
    "a cache of another VAE": (
        give_cache_of_another_vae,
        ("cache.dir", "latents of the VAE my/eq-vae (4 channels", "set model.vae (and", "cache.sh --repair"),
    ),
    # the data
    "no data": (give_words("data.image_dirs=[]"), ("data", "neither metadata nor", "data.image_dirs")),
    "a folder that is not there": (give_words("data.image_dirs=/no/images"), ("/no/images", "not a folder", "check")),
    "a folder as metadata": (
        lambda folder: ["data.image_dirs=[]", f"data.metadata={folder}"],
        ("data.metadata.0", "is a folder", "data.image_dirs"),
    ),
    "metadata as a folder": (
        lambda folder: [f"data.image_dirs={write_file(folder, 'meta.json', '{}')}"],
        ("data.image_dirs.0", "meta.json", "is a file", "data.metadata"),
    ),
    "an empty folder": (
        lambda folder: [f"data.image_dirs={write_file(folder, 'e/x.pdf', '').parent}"],
        ("data.image_dirs", "holds no images", "file types"),
    ),
    "images without captions": (give_images, ("not one caption", ".txt file", "beside each image")),
    "broken JSON": (
        give_json('{"a": {"caption": "x"},}'),
        ("data.metadata", "meta.json:1:23", "trailing comma", "correct"),
    ),
    "empty metadata": (give_json(""), ("data.metadata", "meta.json")),
    "a limit of tokens": (give_words("data.max_tokens=100"), ("data.max_tokens", "100", "a multiple of 75")),
    "aliases in a circle": (
        give_tags("aliases", "x,y\n\nkitty,cat\ncat,kitty\n"),
        ("data.caption.aliases", "tags.csv", "line 3", "kitty → cat → kitty", "correct the file"),
    ),
    "implications without a column": (
        give_tags("implications", "cat\n"),
        ("data.caption.implications", "tags.csv", "line 1", "1 columns, not 2", "antecedent,consequent"),
    ),
    "no latent cache": (
        give_json('{"a": {"image_path": "/x/a.png", "caption": "x"}}'),
        ("no latent", "launch/cache.sh"),
    ),
    "a tar without latents": (
        lambda folder: give_tar(folder, {"0.npz": pack_arrays(moments=np.zeros((4, 8, 8))), "0.txt": b"a"}),
        (
            "set.tar",
            "holds moments, but no `latents`, floats [channels, height",
            "(sample 0)",
            "again with the program",
        ),
    ),
    "a tar that is cut short": (
        lambda folder: give_tar(folder, {"0.npz": pack_arrays(latents=np.zeros((4, 8, 8)))}, num_bytes=1500),
        ("set.tar", "is cut short", "its own headers", "copy or write the tar again"),
    ),
    "a tar of images": (
        lambda folder: give_tar(folder, {"0.jpg": b"x", "0.txt": b"a"}),
        ("set.tar", "0.jpg", "no latents", "unpack it into a folder", "data.image_dirs"),
    ),
    "an image that cannot be cached": (
        give_unusable_image,
        ("cache.on_missing", "1 of 2 samples have no latents", "b.png: not an image", "repair or remove"),
    ),
    "a missing package of a store": (
        give_words("data.image_dirs=[]", "data.metadata=gs://bucket/a.jsonl", "cache.dir=runs"),
        ("gs://bucket/a.jsonl", "gcsfs", "install"),
    ),
    "a missing object on a store": (
        give_words("data.image_dirs=[]", "data.metadata=memory://bucket/a.jsonl", "cache.dir=runs"),
        ("memory://bucket/a.jsonl", "no such object", "check"),
    ),
    "buckets that are no multiples of 32": (give_words("data.buckets=[[1000, 1000]]"), ("data.buckets", "1000", "32")),
    "a resolution above its bounds": (
        give_words("data.max_bucket_px=64", "data.resolution_px=128"),
        ("data", "resolution_px must lie between min_bucket_px and max_bucket_px"),
    ),
    "flips without mirrored latents": (give_words("data.flip_rate=0.5"), ("data.flip_rate", "cache.flip: true")),
    # training
    "a micro batch above the global batch": (
        give_words("train.micro_batch_size=8"),
        ("train.global_batch_size", "micro_batch_size 8", "multiple of 8"),
    ),
    "a validation share of nearly all": (give_words("validation.share=0.99"), ("0.99", "0.5", "did you mean 0.01?")),
    "a share in percent": (give_words("validation.share=5"), ("validation.share", "write 5 % as 0.05")),
    "validation of nothing": (give_words("validation.every_steps=9"), ("validation.every_steps", "validation.share")),
    "text encoders with cached text": (
        give_words("cache.text=true", "optim.text_encoder_lr=1e-5"),
        ("optim.text_encoder_lr", "cache.text: false"),
    ),
    "prodigy with a usual rate": (give_words("optim.name=prodigy", "engine.zero_stage=0"), ("optim.lr", "set it to 1")),
    "an argument that no optimizer has": (
        give_words("optim.kwargs={d_coef: 2}"),
        ("optim.kwargs.d_coef", "adamw", "it takes"),
    ),
    "a missing extra": (give_words("log.wandb=mine"), ("log.wandb", "wandb", "pip install wandb")),
    "a missing attention": (give_words("engine.attention=xformers"), ("engine.attention", "cure: set it to sdpa")),
    "a missing module": (give_words("optim.name=came_pytorch.CAME"), ("came_pytorch", "pip install came_pytorch")),
    "a wrong class of a module": (give_words("optim.name=torch.optim.Adamm"), ("did you mean torch.optim.Adam?",)),
    "a sampler in capitals": (
        give_words("sample.prompts=[a]", "sample.sampler=Euler_A"),
        ("did you mean euler_a?",),
    ),
    "an odd size of images": (give_words("sample.prompts=['a --w 1001']"), ("--w", "1001", "8")),
    "a start over a run": (give_finished_run, ("run.resume", "runs/run", "run.name")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_settings_is_explained(base: Path, tmp_path: Path, mistake: str) -> None:
    make, fragments = MISTAKES[mistake]
    message = check(base, tmp_path, make(tmp_path))
    assert [fragment for fragment in fragments if fragment not in message] == [], message
    assert message.count("\n  - ") == 1 and "\n      cure: " in message, message
    assert find_english(message) == []


def name_bad_image(folder: Path, content: bytes) -> str:
    """Return the reason why a file is no image."""
    with pytest.raises(BadImageError) as caught:
        prepare_image(write_file(folder, "a.png", content), RULE, list_buckets(RULE))
    return str(caught.value)


def ask_for_gated_model(folder: Path) -> str:
    """Return the message about a model that needs a login; the hub's answer is what its library raises."""

    def refuse(*_: object, **__: object) -> None:
        error = GatedRepoError.__new__(GatedRepoError)  # without a response, whose class depends on the version
        error.args = ("401: access is restricted",)
        raise error

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserInputError) as caught:
        patch.setattr(huggingface_hub, "snapshot_download", refuse)
        fetch_from_hub("model.path", "somebody/gated")
    return str(caught.value)


def train_other_prediction(folder: Path) -> str:
    """Return the warning about a model in one file that declares v-prediction with zero terminal SNR."""
    marks = {"v_pred": ("F16", ()), "ztsnr": ("F16", ())}
    model = write_fake(folder / "noob.safetensors", {**fake_tensors(TINY_CONFIGS), **marks})
    [problem] = check_prediction(build_config({"model": {"path": str(model)}})[0])
    return str(problem)


def lock_twice(folder: Path) -> str:
    """Return the message of a second job in one run folder."""
    with lock_folder(folder, "run.name", "set another run.name"), pytest.raises(UserInputError) as caught:
        with lock_folder(folder, "run.name", "set another run.name"):
            pass
    return str(caught.value)


# Mistake → message, what it must hold.
OTHERS: dict[str, tuple[Callable[[Path], str | None], tuple[str, ...]]] = {
    "an empty image": (lambda folder: name_bad_image(folder, b""), ("a.png", "empty (0 bytes)")),
    "a web page as image": (lambda folder: name_bad_image(folder, b"<html>"), ("a.png", "web page", "download")),
    "text as image": (lambda folder: name_bad_image(folder, b"hello"), ("a.png", "not an image")),
    "a gated model": (ask_for_gated_model, ("somebody/gated", "hf auth login", "HF_TOKEN")),
    "another prediction type": (
        train_other_prediction,
        (
            *("objective.prediction = 'epsilon'", "trained with v"),
            "cure: set objective.prediction: v and objective.zero_terminal_snr: true, unless",
        ),
    ),
    "two jobs in one folder": (lock_twice, ("run.name", "another job", "set another run.name")),
    "bf16 on an old GPU": (lambda folder: find_bf16_fault((7, 5), "RTX 2080"), ("RTX 2080", "8.0", "7.5")),
    "a full disk": (
        lambda folder: explain_failure(OSError(errno.ENOSPC, "No space left on device", "/data/x.npz")),
        ("/data/x.npz", "No space left", "free some space", "same command"),
    ),
    "too little shared memory": (
        lambda folder: explain_failure(RuntimeError("unable to write to file </torch_1_2>: No space left")),
        ("/dev/shm", "data.num_workers", "--shm-size"),
    ),
    "too little memory": (
        lambda folder: explain_failure(MemoryError()),
        ("too little memory", "lower data.num_workers"),
    ),
    "a rank that was killed": (
        lambda folder: explain_failure(RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:9")),
        ("another rank has ended", "the same command resumes"),
    ),
}


@pytest.mark.parametrize("mistake", OTHERS)
def test_another_mistake_is_explained(tmp_path: Path, mistake: str) -> None:
    make, fragments = OTHERS[mistake]
    message = make(tmp_path) or ""
    assert [fragment for fragment in fragments if fragment not in message] == [], message
    assert find_english(message) == []
