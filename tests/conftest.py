"""Shared by the tests: a small demo set, the tiny SDXL, its latents, and a way to start the real programs."""

import os

# Before torch is imported. One thread, as the launch scripts give each rank: kernels on several threads may round
# differently with the size of the batch.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["LANGUAGE"] = "en"  # tests look for English messages, in any locale

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from console_screen import run_in_terminal
from filelock import FileLock
from forked_ranks import PLACE_VARIABLE, REPORT_VARIABLE
from loguru import logger
from programs import IN_EACH_STEP, MIXED_PROMPTS, ROOT, list_validation_words, run_program

signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs of tests inherit it; behind a shell's & it is ignored

STARTERS = {"run_program", "run_forked", "start_forked"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start ranks come first: a long one begun last would leave the other workers with nothing to do."""
    starting = {item.path for item in items if starts_ranks(item)}
    items.sort(key=lambda item: item.path not in starting)


def starts_ranks(item: pytest.Item) -> bool:
    """Whether a test starts ranks, or belongs to a file that can."""
    names = vars(getattr(item, "module", None) or object)
    return "tiny_folder" in getattr(item, "fixturenames", ()) or not STARTERS.isdisjoint(names)


@pytest.fixture(scope="session", autouse=True)
def rank_server(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where the workers of this session find the process that their ranks are forked from."""
    os.environ[PLACE_VARIABLE] = str(find_common_folder(tmp_path_factory) / "rank-server.json")


@pytest.fixture(autouse=True)
def same_process() -> Iterator[None]:
    """Every test begins with one thread, PyTorch's own linear layers and no listener of signals, as a new process does.

    Moving averages in host memory change the number of threads, and DeepSpeed's ZeRO-3 replaces the function, for the
    whole process. A run that a test builds without ending it listens to signals.
    """
    yield
    if signals := sys.modules.get("sdxl_trainer.launch.signals"):
        signals.LISTENER.clear()
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
        torch.nn.functional.linear = torch._C._nn.linear


def find_common_folder(factory: pytest.TempPathFactory) -> Path:
    """The temporary folder that the workers of the session share."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first worker to need it fills, and that all workers of the session then share."""
    folder = find_common_folder(factory) / name
    done = folder.with_suffix(".done")
    with FileLock(folder.with_suffix(".lock")):
        if not done.exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """Collect the messages that a test logs."""
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(message.record["message"]))
    yield lines
    logger.remove(sink)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 24 demo images (`data/`), the tiny SDXL (`model/`) and a config for both (`tiny.yaml`)."""
    return make_once(tmp_path_factory, "tiny", make_tiny_folder)


def make_tiny_folder(folder: Path) -> None:
    """Fill `tiny_folder`."""
    from sdxl_trainer.data.images.demo_set import draw_demo_set
    from sdxl_trainer.train.tiny.build import build_tiny_sdxl

    metadata = draw_demo_set(folder / "data", num_images=24)
    build_tiny_sdxl(folder / "model")
    config = {
        "run": {"name": "tiny", "dir": str(folder / "runs")},
        "model": {"path": str(folder / "model")},
        "data": {
            "metadata": [str(metadata)],
            "resolution_px": 128,
            "min_bucket_px": 64,
            "max_bucket_px": 256,
            "bucket_step_px": 32,
            "caption": {"dropout_rate": 0.1},
            "num_workers": 0,
        },
        "cache": {"dir": str(folder / "latents"), "batch_size": 4},
        "optim": {"lr": 1e-3, "warmup_steps": 2},
        # To find out how soon a weight is needed again, ZeRO-3 would search the whole of so small a model for each.
        "engine": {
            "precision": "fp32",
            "deepspeed": {"zero_optimization": {"stage3_max_reuse_distance": 30_000}},
        },
        "train": {"max_steps": 20, "global_batch_size": 4, "micro_batch_size": 2},
        "checkpoint": {"every_steps": 4, "keep_last": 9, "export_dtype": "fp32"},
        "sample": {
            "prompts": ["a red circle on a white background", "a blue star on a grey background"],
            "num_inference_steps": 4,
            "width_px": 128,
            "height_px": 96,
            "guidance_scale": 3.0,
        },
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="session")
def cached_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_folder` after the cache job ran on two ranks, with the images removed: training must not need them."""

    def make(_: Path) -> None:
        run_program("cache/main.py", "--cfg", tiny_folder / "tiny.yaml", ranks=2)
        (tiny_folder / "data" / "images").rename(tiny_folder / "images-put-away")

    make_once(tmp_path_factory, "cached", make)
    return tiny_folder


@pytest.fixture(scope="session")
def one_rank(cached_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps on one rank, without a launcher, on a terminal; `one.terminal` is what was written there."""

    def make(_: Path) -> None:
        words = ("--cfg", cached_folder / "tiny.yaml", "run.name=one")
        environment = {REPORT_VARIABLE: "1"}
        status, written = run_in_terminal(ROOT / "train" / "main.py", *words, environment=environment)
        assert status == 0, written[-6000:]
        (cached_folder / "one.terminal").write_bytes(written.encode())

    make_once(tmp_path_factory, "one", make)
    return cached_folder / "runs" / "one"


@pytest.fixture(scope="session")
def two_ranks(cached_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 20 steps on two ranks."""
    words = ("--cfg", cached_folder / "tiny.yaml", "run.name=two", "sample.prompts=[]")
    make_once(tmp_path_factory, "two", lambda _: run_program("train/main.py", *words, ranks=2))
    return cached_folder / "runs" / "two"


@pytest.fixture(scope="session")
def validated(cached_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs of 2 steps on one rank (ZeRO-2) and on two (ZeRO-3) that validate on a set of their own, latents of other
    programs with captions beside them, and draw samples, the first one also on the way."""

    def make(folder: Path) -> None:
        own = folder / "own"
        own.mkdir(parents=True)
        for number, latents in enumerate(sorted((cached_folder / "latents").glob("*.npz"))[:7]):
            shutil.copy(latents, own / f"own_{number}.npz")
            (own / f"own_{number}.txt").write_text("a " + latents.stem.replace("_", " ")[5:])
        (folder / "prompts.txt").write_text(MIXED_PROMPTS)
        words = list_validation_words(cached_folder, folder)
        run_program("train/main.py", *words, *IN_EACH_STEP, "run.name=ranks-1", writes_report=True)
        (folder / "ranks-2").mkdir()
        (folder / "ranks-2" / "sample").touch()  # asks for images after the first step
        run_program("train/main.py", *words, "run.name=ranks-2", "engine.zero_stage=3", ranks=2)

    folder = make_once(tmp_path_factory, "validated", make)
    return {ranks: folder / f"ranks-{ranks}" for ranks in (1, 2)}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield place
    logger.remove()  # closes the log file, which may lie on it
    subprocess.run(["umount", "--lazy", str(place)], check=True)  # some process may just be looking at the disks
