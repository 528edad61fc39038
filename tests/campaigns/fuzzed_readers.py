"""The readers of foreign files, with valid files to begin with, for fuzzing.py."""

import io
import os
import sqlite3
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from campaigns.fuzzing import (
    Border,
    mutate_header,
    mutate_npy_fields,
    mutate_png,
    mutate_tar,
    mutate_value,
    mutate_zip,
)
from PIL import Image

from sdxl_trainer.cache.models.single_file_check import (
    SDXL_CONFIG_FOLDER,
    NotSafetensorsError,
    find_single_file_problems,
    load_component_configs,
    read_json_object,
    read_safetensors_header,
)
from sdxl_trainer.configs.import_config import list_problems
from sdxl_trainer.configs.kohya.contents import read_files
from sdxl_trainer.configs.kohya.fit import fit_settings
from sdxl_trainer.configs.kohya.importer import convert, nest_settings
from sdxl_trainer.configs.load import build_config, load_config
from sdxl_trainer.configs.objective import ObjectiveConfig
from sdxl_trainer.configs.problems import UserInputError
from sdxl_trainer.configs.samples import SampleConfig
from sdxl_trainer.data.formats.latent_header import read_latent_header
from sdxl_trainer.data.formats.latents import BadLatentError, LatentSample, pack_latents, read_latents
from sdxl_trainer.data.formats.manifest import read_latest, verify_identity
from sdxl_trainer.data.formats.shard_samples import list_shard_samples
from sdxl_trainer.data.formats.shards import BadShardError
from sdxl_trainer.data.formats.text_outputs import BadTextError, TextOutputs, pack_text, read_text_variant
from sdxl_trainer.data.images.bucket import BucketRule, CropBox, Size, list_buckets
from sdxl_trainer.data.images.image_files import ImageFolder, read_caption_file
from sdxl_trainer.data.images.masks import BadMaskError, add_mask
from sdxl_trainer.data.images.transforms import BadImageError, prepare_image, read_image_size
from sdxl_trainer.data.metadata.blocks import read_blocks
from sdxl_trainer.data.metadata.records import ImageFinder, build_record_rows, parse_record
from sdxl_trainer.data.text.tokens import END, load_tokenizer
from sdxl_trainer.train.checkpoint.folder import MANIFEST, verify_manifest
from sdxl_trainer.train.engine.saved_state import ReshardingError, load_state_file
from sdxl_trainer.train.sampling.prompts import load_prompts

RULE = BucketRule(resolution_px=128, min_px=64, max_px=256, step_px=32)
RECORDS: list[dict[str, Any]] = [
    {"image_path": "a/b.png", "caption": "a red circle", "tags": ["1girl", "solo"], "original_size": [128, 96]},
    {"image_path": "c.d.jpg", "caption": ["a", "b"], "width": 100, "height": "70", "score": 0.5},
    {"image_path": "/x/é.webp", "tags": "a, b", "description": None, "train_resolution": "1500x1000", "n": {"m": [1]}},
]


def make_latents(_: Path) -> list[bytes]:
    """Build latent files of every form."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((4, 8, 12)).astype(np.float32)
    plain = LatentSample(latents=latents, original_size=Size(100, 70), crop_ltrb=CropBox(0, 1, 96, 65))
    full = LatentSample(
        latents=latents,
        original_size=Size(100, 70),
        crop_ltrb=CropBox(0, 1, 96, 65),
        std=abs(latents),
        flipped=latents,
        flipped_std=abs(latents),
        alpha_mask=rng.random((64, 96)).astype(np.float32),
    )
    packed = io.BytesIO()
    np.savez_compressed(packed, latents=latents, original_size=np.array([100, 70]), crop_ltrb=np.zeros(4))
    return [pack_latents(plain), pack_latents(full), pack_latents(full, "bfloat16"), packed.getvalue()]


def make_text_outputs(_: Path) -> list[bytes]:
    """Build text encoder outputs of one and of two variants."""
    outputs = TextOutputs(np.ones((7, 4), np.float32), np.ones((7, 6), np.float32), np.ones(6, np.float32))
    return [pack_text([outputs]), pack_text([outputs] * 2), pack_text([outputs] * 2, "bfloat16")]


def make_shard(folder: Path) -> list[bytes]:
    """Build a webdataset shard with records, captions and latents."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        contents = {
            "a.json": orjson.dumps(RECORDS[0]),
            "a.npz": make_latents(folder)[0],
            "b.txt": b"a caption",
            "b.npz": b"x",
        }
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return [buffer.getvalue()]


def make_parquet(_: Path) -> list[bytes]:
    """Build Parquet tables with and without compression."""
    buffers = [io.BytesIO(), io.BytesIO()]
    table = pa.Table.from_pylist(
        [{"image_path": f"{n}.png", "caption": "a", "tags": ["b"], "width": n} for n in range(50)]
    )
    for buffer, codec in zip(buffers, ("none", "snappy"), strict=True):
        pq.write_table(table, buffer, compression=codec)
    return [buffer.getvalue() for buffer in buffers]


def make_database(folder: Path) -> list[bytes]:
    """Build SQLite databases with one table and with two."""
    contents = []
    for number, others in enumerate(([], ["CREATE TABLE notes (a)"])):
        file = folder / f"{number}.sqlite3"
        with closing(sqlite3.connect(file)) as database:
            database.execute("CREATE TABLE metadata (image_key TEXT PRIMARY KEY, image_path, tags, width INTEGER)")
            rows = [(f"k{n}", f"{n}.png", "['a', 'b']", n) for n in range(300)]
            database.executemany("INSERT INTO metadata VALUES (?, ?, ?, ?)", rows)
            for statement in others:
                database.execute(statement)
            database.commit()
        contents.append(file.read_bytes())
    return contents


def make_images(_: Path) -> list[bytes]:
    """Build small images of every format."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 56, 4), np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    images = [(image.convert("RGB"), form, {"exif": exif}) for form in ("PNG", "JPEG", "WEBP", "TIFF")]
    images += [(image, "PNG", {}), (image, "TIFF", {"compression": "tiff_lzw"}), (image.convert("P"), "GIF", {})]
    images += [(image.convert("RGB"), "BMP", {}), (image.convert("CMYK"), "JPEG", {"progressive": True})]
    grey = Image.fromarray(pixels[..., :2].reshape(40, 112).view(np.uint16).astype(np.uint16))
    images += [(grey, "PNG", {}), (image.convert("P"), "PNG", {"transparency": 3}), (image.convert("1"), "PNG", {})]
    if ".avif" in Image.registered_extensions():
        images.append((image.convert("RGB"), "AVIF", {}))
    contents = []
    for each, form, options in images:
        buffer = io.BytesIO()
        each.save(buffer, form, **options)
        contents.append(buffer.getvalue())
    return contents


def make_masks(folder: Path) -> list[bytes]:
    """Build masks, and the image that they belong to."""
    Image.new("RGB", (96, 64)).save(folder / "image.png")
    contents = []
    for form in ("PNG", "JPEG"):
        buffer = io.BytesIO()
        Image.linear_gradient("L").resize((96, 64)).save(buffer, form)
        contents.append(buffer.getvalue())
    return contents


def make_model_file(_: Path) -> list[bytes]:
    """Build a safetensors file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for number in range(4):
        entries[f"conditioner.{number}"] = {
            "dtype": "F16",
            "shape": [2, 3],
            "data_offsets": [12 * number, 12 * number + 12],
        }
    header = orjson.dumps(entries)
    return [len(header).to_bytes(8, "little") + header + bytes(48)]


def make_state_file(folder: Path) -> list[bytes]:
    """Build a `.pt` file of a checkpoint."""
    torch.save({"module": {"a": torch.ones(3)}, "step": 3, "groups": [torch.zeros(2, 2)]}, folder / "state.pt")
    return [(folder / "state.pt").read_bytes()]


def make_settings(_: Path) -> list[bytes]:
    """Build settings in YAML."""
    config = {
        "model": {"path": "x"},
        "data": {"metadata": ["a.json"], "resolution_px": 128, "caption": {"dropout_rate": 0.1}},
        "train": {"max_steps": 20},
        "optim": {"lr": 1e-3},
        "sample": {"prompts": ["a red circle"]},
        "engine": {"deepspeed": {"zero_optimization": {"stage3_max_reuse_distance": 30_000}}},
    }
    return [yaml.safe_dump(config).encode(), orjson.dumps(config)]


def make_manifest(_: Path) -> list[bytes]:
    """Build lines of a manifest, without their checksums."""
    line = {
        "key": "a",
        "file": "a.npz",
        "bytes": 9,
        "sha256": "0" * 64,
        "bucket": [96, 64],
        "original_size": [100, 70],
        "resized": [96, 67],
        "crop": [0, 1, 96, 65],
        "identity": "0123456789abcdef",
        "listed_ns": 5,
        "source": {"path": "/a.png", "size": 9, "mtime_ns": 17, "sha256": "1" * 64},
        "text": {"file": "t", "bytes": 1, "sha256": "", "identity": "", "captions_sha256": "", "variants": 1},
    }
    return [orjson.dumps(line) + b"\n" + orjson.dumps({**line, "key": "b"}) + b"\n"]


def make_cache_json(_: Path) -> list[bytes]:
    """Build a `cache.json`."""
    return [
        orjson.dumps(
            {"name": "0", "vae_sha256": "0", "resolution_px": 128, "buckets": [[64, 64]], "further": {"64px/": "0"}}
        )
    ]


def make_checkpoint_manifest(folder: Path) -> list[bytes]:
    """Build the manifest of a checkpoint."""
    files = {name: {"bytes": 2, "sha256": "0" * 64} for name in ("trainer_state.json", "state/a.pt")}
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{}")
    return [orjson.dumps({"files": files})]


def make_vocabulary(folder: Path) -> list[bytes]:
    """Build CLIP's vocab.json in small, with its merges."""
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    return [orjson.dumps({"a": 0, "b": 1, "ab": 2, "<|startoftext|>": 3, "<|endoftext|>": 4, "!": 5})]


def constant(*contents: bytes) -> Callable[[Path], list[bytes]]:
    """Return a function that returns these files."""
    return lambda _: list(contents)


def read_records(path: Path) -> None:
    """Read a metadata file up to the records that captions are made from."""
    finder = ImageFinder([])
    for block in read_blocks(path):
        for row in build_record_rows(block, finder, ",").to_pylist():
            parse_record(row)


def read_shard(path: Path) -> None:
    """List a shard with its latents' headers, and read it as metadata."""
    with open(path, "rb") as stream:
        list_shard_samples(str(path), stream, with_headers=True)
    read_records(path)


def read_image(path: Path) -> None:
    """Read an image and its size."""
    prepare_image(path, RULE, list_buckets(RULE), with_alpha=True)
    read_image_size(path)


def read_mask(path: Path) -> None:
    """Read a mask for its image."""
    image = path.with_name("image.png")
    add_mask(prepare_image(image, RULE, list_buckets(RULE)), image, path)


def read_model_file(path: Path) -> None:
    """Check a model file."""
    read_safetensors_header(path)
    find_single_file_problems(path, load_component_configs(SDXL_CONFIG_FOLDER))


def read_prompts(path: Path) -> None:
    """Load a prompt file. All that is wrong with it is returned."""
    settings = {"prompt_file": path}
    load_prompts(SampleConfig.model_validate(settings), ObjectiveConfig.model_validate({}))


def read_manifest(path: Path) -> None:
    """Read a manifest. Damaged lines are skipped."""
    (path.parent / "manifest").mkdir(exist_ok=True)
    os.replace(path, path.parent / "manifest" / "part-00000.jsonl")
    read_latest(path.parent)


def read_cache_json(path: Path) -> None:
    """Verify a `cache.json`. What is wrong with it is returned."""
    os.replace(path, path.parent / "cache.json")
    verify_identity(path.parent)


def read_checkpoint_manifest(path: Path) -> None:
    """Verify a checkpoint's manifest. What is wrong with it is returned."""
    os.replace(path, path.parent / MANIFEST)
    verify_manifest(path.parent)


def read_vocabulary(path: Path) -> None:
    """Load a tokenizer."""
    os.replace(path, path.parent / "vocab.json")
    load_tokenizer(path.parent, END)


def read_kohya(path: Path) -> None:
    """Import settings of kohya's scripts or the first sdxl-trainer, and check what would be written."""
    fitted = fit_settings(convert(read_files([path])), list_problems)
    problems = list_problems(nest_settings(fitted.settings))
    assert all("environment variable" in problem.rule for problem in problems), problems


def read_overrides(path: Path) -> None:
    """Read settings of the command line, one a line."""
    words = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")
    build_config({}, words)


JSON_OBJECT = orjson.dumps({str(record["image_path"]): record for record in RECORDS})
JSON_LINES = b"".join(orjson.dumps(record) + b"\n" for record in RECORDS)
CSV = b'image_path,caption,tags,width,height\na.png,"a ""red"" circle",x,100,70\nb.jpg,b,,1,\n'
TEXT_PROMPTS = b"# comment\na red circle --w 512 --h 768 --n ugly --s 3 --d 77\na blue star --ss euler_a --l 7.5\n"
JSON_PROMPTS = orjson.dumps([{"prompt": "a", "width": 512, "seed": 7, "sample_sampler": "ddim"}, "a star --w 64"])
TOML = (
    b'pretrained_model_name_or_path = "a"\nlearning_rate = 1e-5\n[x]\nresolution = "1024,1024"\nmax_train_steps = 10\n'
)
DATASET = (
    b'[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 1024\n'
    b'[[datasets.subsets]]\nimage_dir = "x"\nnum_repeats = 2\n'
)
COMMAND = (
    b"accelerate launch --num_processes=2 sdxl_train.py --learning_rate=1e-5 \\\n"
    b'  --resolution "1024,1024" --network_args a=b c\n'
)
PYTHON = (
    b"def get_config():\n    config = cfg()\n    config.lr = 1e-5 * 2\n"
    b"    config.a = dict(b=[1, 2])\n    return config\n"
)
WHOLE_PYTHON = (
    b'ROOT = "/a"\ndef get_config(n=2):\n'
    b'    return ConfigDict(dict(dataset_source=[dict(name_or_path=ROOT + "/b.db")],\n'
    b'    output_dir=f"{ROOT}/x-%index%", resolution=2 ** 10, predefined_buckets=[(64, 64)], arb=True, batch_size=2))\n'
)
GUI = (
    b'{"LoRA_type": "Standard", "lr_warmup": 10, "epoch": "3", "max_resolution": "512,512", "model_list": "x",\n'
    b'"network_dim": 8, "optimizer_args": "a=1 b=2", "additional_parameters": "--seed=3", "train_data_dir": "x"}'
)

BORDERS = [
    Border("latents", ".npz", make_latents, read_latents, (BadLatentError,), (mutate_zip, mutate_npy_fields)),
    Border(
        "latent header",
        ".npz",
        make_latents,
        lambda path: read_latent_header(str(path)),
        (BadLatentError,),
        (mutate_zip, mutate_npy_fields),
    ),
    *(
        Border(
            f"text outputs {variants}",
            ".npz",
            make_text_outputs,
            lambda path, variants=variants: read_text_variant(path, None, path.stat().st_size, variants - 1, variants),
            (BadTextError,),
            (mutate_zip, mutate_npy_fields),
        )
        for variants in (1, 2)
    ),
    Border("shard", ".tar", make_shard, read_shard, (BadShardError, ValueError), (mutate_tar,)),
    Border("json", ".json", constant(JSON_OBJECT), read_records, parts=(mutate_value,)),
    Border("json lines", ".jsonl", constant(JSON_LINES), read_records, parts=(mutate_value,)),
    Border("csv", ".csv", constant(CSV), read_records),
    Border("parquet", ".parquet", make_parquet, read_records),
    Border("sqlite", ".sqlite3", make_database, read_records),
    Border("sqlite table", ".sqlite3", make_database, lambda path: read_records(Path(f"{path}:metadata"))),
    Border("image", ".png", make_images, read_image, (BadImageError,), (mutate_png,)),
    Border("mask", ".png", make_masks, read_mask, (BadMaskError,), (mutate_png,)),
    Border(
        "caption",
        ".txt",
        constant(b"a red circle", "é\n".encode()),
        lambda path: read_caption_file(ImageFolder(str(path.parent), [], {"input": path.name}), "input.png"),
    ),
    Border("yaml", ".yaml", make_settings, load_config, (UserInputError,), (mutate_value,)),
    Border(
        "overrides",
        ".txt",
        constant(b"train.max_steps=3\ndata={resolution_px: 64}\n"),
        read_overrides,
        (UserInputError,),
    ),
    Border(
        "safetensors",
        ".safetensors",
        make_model_file,
        read_model_file,
        errors=(ValueError, NotSafetensorsError),
        parts=(mutate_header,),
    ),
    Border("pt", ".pt", make_state_file, load_state_file, (ReshardingError,), (mutate_zip,)),
    Border("text prompts", ".txt", constant(TEXT_PROMPTS), read_prompts, ()),
    Border("json prompts", ".json", constant(JSON_PROMPTS), read_prompts, (), (mutate_value,)),
    *(
        Border(f"kohya {suffix[1:]}", suffix, constant(*contents), read_kohya, (UserInputError,))
        for suffix, contents in (
            (".toml", (TOML, DATASET)),
            (".sh", (COMMAND,)),
            (".py", (PYTHON, WHOLE_PYTHON)),
            (".json", (GUI,)),
        )
    ),
    Border("manifest", ".jsonl", make_manifest, read_manifest, (), (mutate_value,)),
    Border("cache.json", ".json", make_cache_json, read_cache_json, (), (mutate_value,)),
    Border("model config", ".json", constant(b'{"a": [1, {"b": null}]}'), read_json_object, parts=(mutate_value,)),
    Border("checkpoint manifest", ".json", make_checkpoint_manifest, read_checkpoint_manifest, (), (mutate_value,)),
    Border("vocabulary", ".json", make_vocabulary, read_vocabulary, parts=(mutate_value,)),
]
