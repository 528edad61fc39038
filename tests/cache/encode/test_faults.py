"""Runs of the cache job with faults: bad images, full disks, signals, dead ranks."""

import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cache_samples import hash_items, list_files, run_job, write_settings
from campaigns.fault_cache import check_folder
from descendants import get_variable, list_descendants
from forked_ranks import start_forked
from PIL import Image
from programs import PLACE, ROOT, lay_out_scripts

from sdxl_trainer.cache.encode.storage import list_shards
from sdxl_trainer.cache.upkeep.verify import verify_entries
from sdxl_trainer.data.formats.latents import read_latents
from sdxl_trainer.data.formats.manifest import read_entries, read_latest
from sdxl_trainer.data.formats.shards import iterate_members
from sdxl_trainer.data.images.demo_set import draw_demo_set

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture(scope="module")
def model(tiny_folder) -> Path:
    return tiny_folder / "model"


@pytest.fixture(scope="module")
def many(tmp_path_factory, model) -> tuple[Path, dict[str, str]]:
    """Return settings for 120 images, and the SHA-256 of each item after a job without faults."""
    folder = tmp_path_factory.mktemp("many")
    settings = write_settings(folder, model, draw_demo_set(folder / "data", num_images=120), batch_size=2)
    assert run_job(settings, f"cache.dir={folder / 'whole'}") == 0
    return settings, hash_items(folder / "whole")


def make_bomb() -> bytes:
    """Build a PNG of a few bytes whose header claims 60000 x 60000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def encode(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def make_good_images() -> dict[str, tuple[bytes, Image.Image]]:
    """Return (content, image that viewers show) by file name."""
    size = (128, 128)
    gradient = np.zeros((128, 128, 3), np.uint8)
    gradient[..., 0], gradient[..., 1] = np.arange(128)[None] * 2, np.arange(128)[:, None]
    plain = Image.fromarray(gradient)
    grey = Image.fromarray((np.arange(128)[None].repeat(128, 0) * 2).astype(np.uint8))
    frames = [Image.new("RGB", size, BLUE), Image.new("RGB", size, RED)]
    palette = Image.new("P", size, 0)
    palette.putpalette([*RED, *BLUE])
    palette.paste(1, (64, 0, 128, 128))
    half_white = Image.new("RGB", size, WHITE)
    half_white.paste(BLUE, (64, 0, 128, 128))
    transparent = Image.new("RGBA", size, (0, 0, 0, 0))
    transparent.paste((*BLUE, 255), (64, 0, 128, 128))
    turned = Image.Exif()
    turned[0x0112] = 6
    cmyk = Image.new("CMYK", size, (0, 255, 255, 0))
    deep = Image.fromarray((np.arange(128)[None].repeat(128, 0) * 512).astype(np.uint16))
    return {
        "plain.png": (encode(plain, "PNG"), plain),
        "animated.gif": (encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), frames[0]),
        "animated.webp": (
            encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True),
            frames[0],
        ),
        "cmyk.jpg": (encode(cmyk, "JPEG", quality=100), Image.new("RGB", size, RED)),
        "palette.png": (encode(palette, "PNG", transparency=0), half_white),
        "deep.png": (encode(deep, "PNG"), grey.convert("RGB")),
        "turned.png": (encode(plain, "PNG", exif=turned), plain.transpose(Image.Transpose.ROTATE_270)),
        "alpha.png": (encode(transparent, "PNG"), half_white),
    }


def make_bad_images() -> dict[str, bytes]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8))
    whole = encode(noise, "JPEG", quality=95)
    return {
        "truncated.jpg": whole[: len(whole) // 2],
        "half.png": encode(noise, "PNG")[:5000],
        "text.jpg": b"<html>404 not found</html>",
        "empty.webp": b"",
        "bomb.png": make_bomb(),
    }


def test_unusual_images_are_encoded_as_viewers_show_them_and_bad_images_are_named(tmp_path, model, capsys):
    good, bad = make_good_images(), make_bad_images()
    (tmp_path / "images").mkdir()
    (tmp_path / "seen").mkdir()
    for name, (content, seen) in good.items():
        (tmp_path / "images" / f"{name}{Path(name).suffix}").write_bytes(content)
        seen.save(tmp_path / "seen" / f"{name}.png")
        (tmp_path / "seen" / f"{name}.txt").write_text("x")
    for name, content in bad.items():
        (tmp_path / "images" / f"{name}{Path(name).suffix}").write_bytes(content)
    folder = tmp_path / "images"
    (folder / "plain.png.txt").write_text("a caption")
    os.mkfifo(folder / "pipe.png")
    os.symlink("loop.png", folder / "loop.png")
    os.symlink("/dev/zero", folder / "device.png")
    for name in ("sparse.png", "narrow\n.png"):
        (folder / name).touch()
    os.truncate(folder / "sparse.png", 1 << 43)
    Image.new("RGB", (3000, 10)).save(folder / "narrow\n.png")
    bad |= dict.fromkeys(("pipe", "loop", "device", "sparse", "narrow\n"), b"")
    settings = write_settings(tmp_path, model, posterior="mean")
    assert run_job(settings, "data.max_bad_fraction=0.6") == 0
    assert run_job(settings, f"data.image_dirs=[{tmp_path}/seen]", f"cache.dir={tmp_path}/seen") == 0
    entries, expected = read_latest(tmp_path / "latents"), read_latest(tmp_path / "seen")
    assert set(entries) == set(expected) == set(good)
    for name in good:
        found = read_latents(tmp_path / "latents" / entries[name].file).latents
        wanted = read_latents(tmp_path / "seen" / expected[name].file).latents
        assert np.abs(found - wanted).max() < (0.1 if name == "cmyk.jpg" else 1e-5) * np.abs(wanted).max(), name
    log = tmp_path / "latents" / "logs" / "bad_samples.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == sorted(bad)
    reasons = {line["key"]: line["reason"] for line in lines}
    assert all(reason.startswith(f"{tmp_path}/images/{name}") for name, reason in reasons.items())
    assert not any(" object at " in reason for reason in reasons.values())
    assert "decompression bomb" in reasons["bomb.png"]
    assert "is a pipe" in reasons["pipe"] and "is a device" in reasons["device"] and "narrower" in reasons["narrow\n"]
    assert json.loads((tmp_path / "latents" / "cache_report.json").read_text())["bad"] == 10
    # The fraction is of the whole set, so a second job, which has only bad images, passes too. They are listed again,
    # but only the one that has changed is tried again, and those that could not be read.
    assert capsys.readouterr().err.count("skipped bad image") == 10
    os.utime(tmp_path / "images" / "half.png.png", ns=(1, 1))
    assert run_job(settings, "data.max_bad_fraction=0.6") == 0
    said = capsys.readouterr().err
    assert "5 images could not be used before" in said and said.count("skipped bad image") == 5 and "5 bad" in said
    assert sorted(json.loads(line)["key"] for line in log.read_text().splitlines()) == sorted(bad)
    assert json.loads((tmp_path / "latents" / "cache_report.json").read_text())["bad"] == 10
    assert run_job(settings) == 1  # more than 1 %
    assert "or raise data.max_bad_fraction" in capsys.readouterr().err
    assert hash_items(tmp_path / "latents").keys() == good.keys()


def test_too_little_disk_space_is_reported_before_encoding(tmp_path, model, monkeypatch, capsys):
    settings = write_settings(tmp_path, model, draw_demo_set(tmp_path / "data", num_images=4))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 3000))
    assert run_job(settings) == 2
    printed = capsys.readouterr().err
    assert "has 3,000 bytes free and the latents need about" in printed and "cache.dir" in printed
    assert read_latest(tmp_path / "latents") == {}


def test_two_jobs_do_not_write_one_cache(tmp_path, model, capsys):
    from sdxl_trainer.cache.encode.cache_setup import lock_cache

    settings = write_settings(tmp_path, model, draw_demo_set(tmp_path / "data", num_images=4))
    with lock_cache(tmp_path / "latents"):
        assert run_job(settings) == 2
        assert "is being written by another job" in capsys.readouterr().err
        assert run_job(settings, "--dry-run") == 0  # writes nothing
    assert run_job(settings) == 0 and len(hash_items(tmp_path / "latents")) == 4


@pytest.mark.parametrize("form", ["npz", "shards"])
def test_a_full_disk_ends_the_job_without_damage(many, small_disk, monkeypatch, capsys, form):
    settings, whole = many
    usage = shutil.disk_usage(small_disk)._replace(free=1 << 40)
    # The check before the start must pass here.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).total - 400_000))
    words = (f"cache.dir={small_disk / 'latents'}", f"cache.format={form}")
    assert run_job(settings, *words) == 1
    printed = capsys.readouterr().err
    assert "No space left on device" in printed and "run the same command again" in printed
    folder = small_disk / "latents"
    assert check_folder(folder) == []
    listed = {key for key, sha256 in hash_listed(folder).items() if sha256 == whole[key]}
    assert 10 < len(listed) < 120 and listed == set(read_latest(folder))
    ballast.unlink()
    assert run_job(settings, *words) == 0
    assert check_folder(folder) == []
    assert hash_items(folder) == whole
    assert run_job(settings, *words, "--verify") == 0


def hash_listed(folder: Path) -> dict[str, str]:
    """Verify all items, also in unfinished shards, and return the SHA-256 of each."""
    entries = read_latest(folder)
    assert verify_entries(folder, entries).bad == {}
    return {key: entry.sha256 for key, entry in entries.items()}


def start(scripts: Path, settings: Path, *words: object) -> subprocess.Popen:
    """Start two ranks by cache.sh, in a process group of their own."""
    environment = {**os.environ, "NPROC": "2", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(scripts / "cache.sh"), "--cfg", str(settings), *(str(word) for word in words)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_lines(folder: Path, count: int, is_running: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while sum(part.read_bytes().count(b"\n") for part in folder.glob("manifest/part-*")) < count:
        assert time.monotonic() < deadline and is_running(), "the job did not get this far"
        time.sleep(0.01)


def stop_script(number: str, settings: Path, *words: object) -> tuple[int, str]:
    """Send the signal to launch/cache.sh after ten images; return its status and what it wrote."""
    scripts = settings.parent / "checkout" / "launch"
    job = start(scripts if scripts.exists() else lay_out_scripts(scripts.parent, "cache/main.py"), settings, *words)
    wait_for_lines(settings.parent / "latents", 10, lambda: job.poll() is None)
    job.send_signal(getattr(signal, number))
    _, printed = job.communicate(timeout=60)
    return job.returncode, printed


def stop_rank(number: str, settings: Path, *words: object) -> tuple[int, str]:
    """Send the signal to a rank without a launcher."""
    output = settings.parent / "printed"
    output.write_text("")
    environment = {name: value for name, value in os.environ.items() if name not in PLACE}
    [job] = start_forked(ROOT / "cache" / "main.py", ["--cfg", settings, *words], environment, output)
    wait_for_lines(settings.parent / "latents", 10, job.is_alive)
    os.kill(job.pid or 0, getattr(signal, number))
    job.join(60)
    return job.exitcode or 0, output.read_text()


@pytest.mark.parametrize(("number", "stop", "form"), [("SIGTERM", stop_rank, "shards"), ("SIGINT", stop_script, "npz")])
def test_a_signal_ends_the_job_with_everything_saved(many, tmp_path, number, stop, form):
    source, whole = many
    settings = Path(shutil.copy(source, tmp_path))
    words = (f"cache.dir={tmp_path / 'latents'}", f"cache.format={form}")
    # On a busy machine the job may end before the signal is sent.
    for _ in range(5):
        shutil.rmtree(tmp_path / "latents", ignore_errors=True)
        status, printed = stop(number, settings, *words)
        if status:
            break
    assert status == 128 + getattr(signal, number), printed[-3000:]
    assert f"stopped by {number}; everything done so far is saved" in printed and "Traceback" not in printed
    assert check_folder(tmp_path / "latents") == []
    listed = hash_items(tmp_path / "latents")  # every shard is finished
    assert 10 <= len(listed) < 120 and listed.items() <= whole.items()
    report = json.loads((tmp_path / "latents" / "cache_report.json").read_text())
    assert report["encoded"] == len(listed) and report["seconds"] > 0
    before = list_files(tmp_path / "latents")
    assert run_job(settings, *words) == 0  # with another number of ranks
    assert hash_items(tmp_path / "latents") == whole
    assert len(list(read_entries(tmp_path / "latents"))) == 120  # nothing was encoded twice
    after = list_files(tmp_path / "latents")
    kept = [name for name in before if name.endswith((".npz", ".tar"))]
    assert kept and all(after[name] == before[name] for name in kept)


def test_a_second_signal_ends_the_job_at_once(tmp_path):
    """The first signal is only recorded, a repeat within two seconds is ignored, and a later one ends the process."""
    code = (
        "import time; from sdxl_trainer.launch.signals import StopRequest; request = StopRequest();"
        "print('ready', flush=True); [time.sleep(0.05) for _ in range(1200)]; print('not reached')"
    )
    environment = {**os.environ, "RANK": "0", "SDXL_TRAINER_STATUS_FILE": str(tmp_path / "status")}
    job = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert job.stdout is not None and job.stdout.readline() == "ready\n"
    job.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    job.send_signal(signal.SIGTERM)
    time.sleep(2.2)
    assert job.poll() is None, "torchrun repeats the terminal's signal, which does not count as a second one"
    job.send_signal(signal.SIGINT)
    printed, _ = job.communicate(timeout=30)
    assert job.returncode == 143 and printed == "" and (tmp_path / "status").read_text() == "143"


def test_a_dead_rank_ends_the_job_and_a_rerun_completes_it(many, tmp_path):
    settings, whole = many
    words = (f"cache.dir={tmp_path / 'latents'}", "cache.format=shards")
    job = start(ROOT / "launch", settings, *words)
    wait_for_lines(tmp_path / "latents", 6, lambda: job.poll() is None)
    os.kill(find_rank(job, 1), signal.SIGKILL)
    _, printed = job.communicate(timeout=90)
    assert job.returncode == 1 and "ChildFailedError" not in printed, printed[-3000:]
    assert printed.endswith(
        "rank 1 was killed by SIGKILL before any other; its messages are above; the same command resumes\n"
    )
    assert check_folder(tmp_path / "latents") == []
    assert 6 <= len(hash_listed(tmp_path / "latents")) < 120
    assert run_job(settings, *words) == 0
    assert check_folder(tmp_path / "latents") == []
    assert hash_items(tmp_path / "latents") == whole
    assert run_job(settings, *words, "--verify") == 0
    keys = [
        key
        for file in list_shards(tmp_path / "latents")
        for key, suffix, _, _ in iterate_members(tmp_path / "latents" / file)
        if suffix == "npz"
    ]
    assert len(keys) == len(set(keys)) == 120  # readers of the shards see every image once


def find_rank(job: subprocess.Popen, rank: int) -> int:
    """Return the process id of a rank among a job's descendants."""
    return next(process for process in list_descendants(job.pid) if get_variable(process, "RANK") == str(rank))
