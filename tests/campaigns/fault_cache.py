"""Faults of the cache: kills, power cuts, full disks, clock jumps, hostile images, and damages."""

import io
import os
import random
import shutil
import signal
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from campaigns.fault_jobs import (
    HANG,
    LOST,
    MESSAGE,
    TORN,
    WRONG,
    Case,
    Job,
    Outcome,
    describe_end,
    fill_disk,
    kill_group,
    kill_self,
    open_disk,
    open_small_disk,
    plant_at,
)
from PIL import Image, PngImagePlugin

from sdxl_trainer.cache.upkeep.verify import verify_entries
from sdxl_trainer.data.formats.latents import BadLatentError, parse_latents
from sdxl_trainer.data.formats.manifest import read_latest
from sdxl_trainer.data.formats.shards import BadShardError, iterate_members
from sdxl_trainer.data.formats.text_outputs import BadTextError, parse_text_outputs
from sdxl_trainer.data.images.image_files import TEXT_OUTPUTS_SUFFIX

DAY_NS = 86_400 * 10**9


def check_folder(folder: Path, whole: dict[str, str] | None = None) -> list[str]:
    """Return what is torn under a final name, or listed and not true.

    Args:
        whole: key → SHA-256 that each item must have.
    """
    problems = []
    for path in sorted(folder.rglob("*.npz")):
        if not path.name.startswith("."):
            problems += _check_npz(path.read_bytes(), str(path), is_text=path.name.endswith(TEXT_OUTPUTS_SUFFIX))
    for path in sorted(folder.glob("shards/*.tar")):
        if not path.name.startswith("."):
            problems += _check_shard(path)
    entries = read_latest(folder) if folder.is_dir() else {}
    problems += verify_entries(folder, entries).reasons
    for key, entry in entries.items():
        if whole is not None and entry.sha256 != whole.get(key):
            problems.append(f"{key}: other latents than the unbroken job's")
    return problems


def _check_shard(path: Path) -> list[str]:
    content, problems = path.read_bytes(), []
    try:
        for key, suffix, offset, size in iterate_members(path):
            if suffix in ("npz", "te.npz"):
                member = content[offset : offset + size]
                problems += _check_npz(member, f"{path}: {key}.{suffix}", is_text=suffix == "te.npz")
    except BadShardError as error:
        problems.append(str(error))
    return problems


def _check_npz(content: bytes, name: str, is_text: bool) -> list[str]:
    try:
        if is_text:
            parse_text_outputs(content, 1)
        else:
            parse_latents(content)
    except (BadLatentError, BadTextError) as error:
        return [f"{name}: {error}"]
    return []


def finish_cache(case: Case, cache: Path, form: str, outcome: Outcome, *further: str) -> None:
    """Run the cache job to its end and compare all items with the unbroken job's."""
    job = Job("cache", [*case.words(cache_dir=cache, cache_format=form), *further], case.folder / "end.log")
    if describe_end(outcome, job, job.wait(), {0}):
        entries = read_latest(cache)
        wrong = check_folder(cache, case.base.hashes)
        outcome.check(TORN, not wrong, wrong)
        outcome.check(LOST, entries.keys() == case.base.hashes.keys(), f"{len(entries)} items")
        left = [path.name for path in cache.rglob(".*") if path.name.endswith((".tmp", ".partial"))]
        outcome.check(TORN, not left, f"left behind: {left}")


def kill_cache(case: Case) -> Iterator[Outcome]:
    """Kill a job four times, each time going on in what the last one left, then let it end."""
    rng, form, cache = case.rng, case.rng.choice(("npz", "shards")), case.folder / "cache"
    outcomes = []
    for number in range(4):
        ranks = rng.choice((1, 1, 2))
        what = rng.choice(("SIGKILL", "SIGKILL", "SIGTERM", "SIGKILL of one rank" if ranks == 2 else "SIGINT"))
        action = kill_self if "one rank" in what else partial(kill_group, getattr(signal, what.split()[0]))
        moment = rng.randint(1, case.base.operations[f"cache {form}"] // (number + ranks))
        outcome = Outcome(f"{what} at operation {moment}, {form}, {ranks} ranks")
        before = read_latest(cache).keys() if cache.exists() else set()
        plant = plant_at(moment, action, victim=rng.randrange(ranks))
        job = Job("cache", case.words(cache_dir=cache, cache_format=form), case.folder / "log", ranks, plant)
        signal_number = getattr(signal, what.split()[0])
        describe_end(outcome, job, job.wait(), {0, -signal_number, 128 + signal_number, 1, -signal.SIGTERM, 143})
        wrong = check_folder(cache, case.base.hashes)
        outcome.check(TORN, not wrong, wrong)
        lost = before - read_latest(cache).keys() if before else set()
        outcome.check(LOST, not lost, f"{lost} were listed before")
        outcomes.append(outcome)
    finish_cache(case, cache, form, outcomes[-1])
    yield from outcomes


def cut_power_of_cache(case: Case) -> Iterator[Outcome]:
    """Cut the power under a job three times, then let it end."""
    form, outcomes = case.rng.choice(("npz", "shards")), []
    with open_disk(case.folder) as disk:
        cache = disk.place / "cache"
        for number in range(3):
            moment = case.rng.randint(1, case.base.operations[f"cache {form}"] // (number + 1))
            outcome = Outcome(f"power cut at operation {moment}, {form}")
            words = case.words(cache_dir=cache, cache_format=form)
            job = Job("cache", words, case.folder / "log", plant=plant_at(moment, disk.cut_power))
            job.wait()
            disk.restart()
            wrong = check_folder(cache, case.base.hashes)
            outcome.check(TORN, not wrong, wrong)
            outcomes.append(outcome)
        finish_cache(case, cache, form, outcomes[-1])
    yield from outcomes


def cut_power_of_upkeep(case: Case) -> Iterator[Outcome]:
    """Cut the power while shards are packed, unpacked or tidied; no item may be lost, wherever it is."""
    form, command = case.rng.choice((("npz", "--pack"), ("shards", "--unpack")))
    with open_disk(case.folder) as disk:
        cache = disk.place / "cache"
        shutil.copytree(case.base.folder / form, cache)
        os.sync()
        for number in range(3):
            moment = case.rng.randint(1, case.base.operations[command] // (number + 1))
            outcome = Outcome(f"power cut at operation {moment} of {command}")
            words = [*case.words(cache_dir=cache, cache_format=form), command]
            Job("cache", words, case.folder / "log", plant=plant_at(moment, disk.cut_power)).wait()
            disk.restart()
            wrong = check_folder(cache, case.base.hashes)
            outcome.check(TORN, not wrong, wrong)
            lost = case.base.hashes.keys() - read_latest(cache).keys()
            outcome.check(LOST, not lost, f"lost: {sorted(lost)[:5]}")
            yield outcome


def fill_disk_of_cache(case: Case) -> Iterator[Outcome]:
    """Fill the disk under a job, look, make room, and let it end."""
    form = case.rng.choice(("npz", "shards"))
    with open_small_disk(case.folder, 16 << 10) as disk:
        cache, moment = disk / "cache", case.rng.randint(1, case.base.operations[f"cache {form}"])
        outcome = Outcome(f"disk full from operation {moment} on, {form}")
        words = case.words(cache_dir=cache, cache_format=form)
        job = Job("cache", words, case.folder / "log", plant=plant_at(moment, partial(fill_disk, disk)))
        status = job.wait()
        describe_end(outcome, job, status, {0, 1, 2})
        if status:
            outcome.check(MESSAGE, str(disk) in job.read_log(), f"folder not named: {job.read_log()[-200:]}")
        wrong = check_folder(cache, case.base.hashes)
        outcome.check(TORN, not wrong, wrong)
        (disk / "filler").unlink(missing_ok=True)
        finish_cache(case, cache, form, outcome)
    yield outcome


def move_clock_of_cache(case: Case) -> Iterator[Outcome]:
    """Fill a cache with the clock wrong, change images with the clock right: what is newest must still count."""
    rng, form = case.rng, case.rng.choice(("npz", "shards"))
    days = rng.choice((1, 30, -30, 3650))
    outcome = Outcome(f"clock {days} days off, {form}")
    data, cache = case.folder / "data", case.folder / "cache"
    shutil.copytree(case.base.folder / "data", data)
    words = [*case.words(cache_dir=cache, cache_format=form), f"data.metadata=[{data / 'metadata.json'}]"]

    def shift(_: int) -> None:
        for name, scale in (("time", 1e-9), ("time_ns", 1)):
            original = getattr(time, name)
            setattr(time, name, lambda original=original, scale=scale: original() + int(days * DAY_NS * scale))

    job = Job("cache", words, case.folder / "log", plant=shift)
    describe_end(outcome, job, job.wait(), {0})
    for part in cache.glob("manifest/*.jsonl"):
        moved_ns = part.stat().st_mtime_ns + days * DAY_NS
        os.utime(part, ns=(moved_ns, moved_ns))
    changed = rng.sample(sorted(case.base.hashes), 5)
    for key in changed:
        image = next((data / "images").glob(f"{key}.*"))
        Image.open(image).transpose(Image.Transpose.ROTATE_180).save(image)
    for _ in range(2):
        lines = sum(part.read_bytes().count(b"\n") for part in cache.glob("manifest/*.jsonl"))
        job = Job("cache", words, case.folder / "log")
        describe_end(outcome, job, job.wait(), {0})
    again = sum(part.read_bytes().count(b"\n") for part in cache.glob("manifest/*.jsonl")) - lines
    outcome.check(WRONG, again == 0, f"{again} items are encoded again by a start after the last one")
    same = [key for key in changed if read_latest(cache)[key].sha256 == case.base.hashes[key]]
    outcome.check(WRONG, not same, f"old latents of changed images count: {same}")
    yield outcome


Hostile = Callable[[Path, random.Random], Path]  # makes a fault in a folder, returns the path that a user would name
BAD, SKIPPED, GOOD = "bad", "skipped", "good"


def feed_images(case: Case) -> Iterator[Outcome]:
    """Feed a live job with hostile files among good images; each is named or skipped, and the others are encoded.

    If the job fails as a whole, each is tried alone, to find out which it was.
    """
    names = case.rng.sample(sorted(HOSTILE), 12)
    seed = case.rng.random()
    outcomes = list(_feed(case, names, "all", seed))
    if any(outcome.problems.keys() & {HANG, LOST} for outcome in outcomes):
        outcomes = [outcome for name in names for outcome in _feed(case, [name], name.replace(" ", "-"), seed)]
    yield from outcomes


def _feed(case: Case, names: list[str], title: str, seed: float) -> Iterator[Outcome]:
    folder = case.folder / title
    good = sorted(case.base.hashes)[:3]
    (folder / "images").mkdir(parents=True)
    for key in good:
        image = next((case.base.folder / "data" / "images").glob(f"{key}.*"))
        shutil.copy(image, folder / "images")
    rng = random.Random(seed)
    paths = {name: HOSTILE[name][1](folder / "images", rng) for name in names}
    words = case.words(cache_dir=folder / "cache", data_image__dirs=f"[{folder / 'images'}]")
    words = [word.replace("image__dirs", "image_dirs") for word in words]
    settings = ["data.metadata=[]", "data.max_bad_fraction=1", "data.on_missing_caption=empty", "cache.text=false"]
    job = Job("cache", [*words, *settings], folder / "log")
    status = job.wait()
    printed = job.read_log()
    bad_file = folder / "cache" / "logs" / "bad_samples.jsonl"
    told = printed + (bad_file.read_text(errors="replace") if bad_file.is_file() else "")
    entries = read_latest(folder / "cache") if status == 0 else {}
    for name, path in paths.items():
        outcome = Outcome(f"image: {name}")
        describe_end(outcome, job, status, {0})
        outcome.check(LOST, set(good) <= entries.keys(), "good images beside it are not encoded")
        taken = [entry for entry in entries.values() if Path(entry.source_path).stem == path.stem]
        kind = HOSTILE[name][0]
        if status == 0:
            outcome.check(WRONG, bool(taken) == (kind == GOOD), f"{kind}, but {len(taken)} items come from it")
            named = os.fsencode(path.stem[:40]).decode("utf-8", "backslashreplace")
            is_named = named in told or path.stem[:8] in told
            outcome.check(MESSAGE, kind != BAD or is_named, f"is not named: {path.name!r}")
            outcome.check(MESSAGE, "\x1b]" not in printed and "\nFORGED" not in printed, "a name forges the log")
        yield outcome


def _png(width: int = 64, height: int = 64, mode: str = "RGB") -> Image.Image:
    return Image.effect_noise((width, height), 64).convert(mode)


def _save(name: str, kind: str | None = None, mode: str = "RGB", **options: object) -> Hostile:
    def make(folder: Path, rng: random.Random) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _png(mode=mode).save(path, kind or "PNG", **options)
        return path

    return make


def _write(name: str, content: Callable[[random.Random], bytes]) -> Hostile:
    def make(folder: Path, rng: random.Random) -> Path:
        (folder / name).write_bytes(content(rng))
        return folder / name

    return make


def _link(name: str, target: str) -> Hostile:
    def make(folder: Path, rng: random.Random) -> Path:
        (folder / name).symlink_to(target)
        return folder / name

    return make


def _make(name: str, how: Callable[[Path], object]) -> Hostile:
    def make(folder: Path, rng: random.Random) -> Path:
        how(folder / name)
        return folder / name

    return make


def _claim(width: int, height: int) -> bytes:
    """Build a PNG of a few bytes whose header claims this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")
    )


def _save_strip(path: Path) -> None:
    Image.new("L", (1, 200_000)).save(path)


def _save_text(path: Path) -> None:
    information = PngImagePlugin.PngInfo()
    information.add_text("prompt", "a" * 3_000_000, zip=True)
    _png().save(path, pnginfo=information)


def _save_transparent_grey(path: Path) -> None:
    """Save 16-bit grey with a transparent value."""
    Image.fromarray(np.full((64, 64), 40_000, np.uint16)).save(path, transparency=40_000)


def _truncate(rng: random.Random) -> bytes:
    content = _encode()
    return content[: rng.randrange(30, len(content) - 30)]


def _encode() -> bytes:
    buffer = io.BytesIO()
    _png().save(buffer, "PNG")
    return buffer.getvalue()


def _save_sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(40 << 30)


# What each must be to the job: bad (named, not taken), skipped (not taken) or good (taken).
HOSTILE: dict[str, tuple[str, Hostile]] = {
    "empty file": (BAD, _write("empty.png", lambda rng: b"")),
    "text": (BAD, _write("words.png", lambda rng: b"not an image")),
    "random bytes": (BAD, _write("noise.jpg", lambda rng: rng.randbytes(3000))),
    "cut": (BAD, _write("cutoff.png", _truncate)),
    "claims 60000 x 60000": (BAD, _write("bomb.png", lambda rng: _claim(60_000, 60_000))),
    "claims 0 x 64": (BAD, _write("nowidth.png", lambda rng: _claim(0, 64))),
    "strip of 1 x 200,000": (BAD, _make("strip.png", _save_strip)),
    "FIFO": (BAD, _make("fifo.png", os.mkfifo)),
    "device": (BAD, _link("device.png", "/dev/zero")),
    "null device": (BAD, _link("nulldev.png", "/dev/null")),
    "proc": (BAD, _link("procfile.png", "/proc/self/maps")),
    "link loop": (BAD, _link("loop.png", "loop.png")),
    "broken link": (BAD, _link("broken.png", "missing.png")),
    "directory": (SKIPPED, _make("folder.png", os.mkdir)),
    "sparse giant": (BAD, _make("giant.png", _save_sparse)),
    "32-bit grey": (BAD, _save("grey32.tiff", "TIFF", "F")),
    "hidden": (SKIPPED, _save("._hidden.png")),
    "hidden folder": (SKIPPED, _save(".ipynb_checkpoints/checkpointed.png")),
    "macOS folder": (SKIPPED, _save("__MACOSX/resource.png")),
    "Synology folder": (SKIPPED, _save("@eaDir/thumb.png")),
    "thumbnails": (SKIPPED, _save(".thumbnails/tiny.png")),
    "compressed text of 3 MB": (GOOD, _make("longtext.png", _save_text)),
    "16-bit grey with transparency": (GOOD, _make("deepgrey.png", _save_transparent_grey)),
    "jfif": (GOOD, _save("camera.jfif", "JPEG")),
    "JPEG 2000": (GOOD, _save("medical.jp2", "JPEG2000")),
    "TGA": (GOOD, _save("targa.tga", "TGA")),
    "suffix in capitals": (GOOD, _save("CAPITALS.PNG")),
    "wrong suffix": (GOOD, _save("really-jpeg.png", "JPEG")),
    "space and percent": (GOOD, _save("100% sure.png")),
    "dots": (GOOD, _save("a.b.c.png")),
    "unicode": (GOOD, _save("café-日本語.png")),
    "leading dash": (GOOD, _save("-rf.png")),
    "newline in its name": (GOOD, _save("new\nFORGED line.png")),
    "escape in its name": (GOOD, _save("esc\x1b]0;title\x07.png")),
    "name of 250 bytes": (GOOD, _save("n" * 246 + ".png")),
    "name of 255 bytes": (GOOD, _save("m" * 251 + ".png")),
    "name that is not UTF-8": (BAD, _save("latin\udce9.png")),
    "named like text outputs": (GOOD, _save("x_te_outputs.png")),
    "linked folder": (GOOD, _make("linked", lambda path: _link_folder(path))),
    "folder that contains itself": (SKIPPED, _link("again", ".")),
    "CMYK": (GOOD, _save("print.jpg", "JPEG", "CMYK")),
    "1 bit": (GOOD, _save("onebit.png", "PNG", "1")),
    "animation": (GOOD, _save("moving.gif", "GIF", "P", save_all=True)),
    "EXIF garbage": (GOOD, _save("exif.jpg", "JPEG", exif=b"Exif\0\0garbage")),
    "ICC garbage": (GOOD, _save("profile.png", "PNG", icc_profile=b"garbage")),
}


def _link_folder(path: Path) -> None:
    real = path.parent.parent / "elsewhere"
    real.mkdir(exist_ok=True)
    _png().save(real / "linked.png")
    path.symlink_to(real)


def damage_cache(case: Case) -> Iterator[Outcome]:
    """Damage items of a finished cache; verify must name them, and a repair must mend them."""
    rng, cache = case.rng, case.folder / "cache"
    shutil.copytree(case.base.folder / "npz", cache)
    entries = read_latest(cache)
    keys = rng.sample(sorted(entries), 8)
    chosen = {key: rng.choice(sorted(DAMAGES)) for key in keys}
    for key, name in chosen.items():
        DAMAGES[name](cache / entries[key].file, rng)
    extra = rng.choice(sorted(CACHE_DAMAGES))
    CACHE_DAMAGES[extra](cache, rng)
    verify = Job("cache", [*case.words(cache_dir=cache), "--verify"], case.folder / "verify.log")
    status = verify.wait()
    told = verify.read_log()
    last = Outcome(f"cache: {extra}")
    for key, name in chosen.items():
        outcome = Outcome(f"item: {name}")
        describe_end(outcome, verify, status, {1, 2})
        outcome.check(MESSAGE, key in told, f"{key} is not named by --verify")
        if name == "a directory":
            (cache / entries[key].file).rmdir()  # as a user does who was told; no program deletes folders of others
        yield outcome
    repair = Job("cache", [*case.words(cache_dir=cache), "--repair"], case.folder / "repair.log")
    if describe_end(last, repair, repair.wait(), {0}):
        finish_cache(case, cache, "npz", last)
    yield last


def _flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def _replace(how: Callable[[Path], object]) -> Callable[[Path, random.Random], object]:
    def damage(path: Path, rng: random.Random) -> None:
        path.unlink()
        how(path)

    return damage


DAMAGES: dict[str, Callable[[Path, random.Random], object]] = {
    "bit flipped": _flip,
    "cut": _cut,
    "empty": lambda path, rng: path.write_bytes(b""),
    "one byte more": lambda path, rng: path.write_bytes(path.read_bytes() + b"\0"),
    "deleted": _replace(lambda path: None),
    "a directory": _replace(os.mkdir),
    "a FIFO": _replace(os.mkfifo),
    "a link loop": _replace(lambda path: path.symlink_to(path.name)),
    "a device": _replace(lambda path: path.symlink_to("/dev/zero")),
    "random bytes": lambda path, rng: path.write_bytes(rng.randbytes(path.stat().st_size)),
}


def _edit_manifest(
    edit: Callable[[list[bytes], random.Random], list[bytes]],
) -> Callable[[Path, random.Random], object]:
    def damage(cache: Path, rng: random.Random) -> None:
        part = rng.choice(sorted(cache.glob("manifest/*.jsonl")))
        part.write_bytes(b"".join(edit(part.read_bytes().splitlines(keepends=True), rng)))

    return damage


def _garble(lines: list[bytes], rng: random.Random) -> list[bytes]:
    at = rng.randrange(len(lines))
    return [
        *lines[:at],
        rng.choice((b"{}\n", b"[]\n", b"\0" * 50 + b"\n", b'{"key": 3}\n', lines[at][:40] + b"\n")),
        *lines[at:],
    ]


CACHE_DAMAGES: dict[str, Callable[[Path, random.Random], object]] = {
    "garbage between manifest lines": _edit_manifest(_garble),
    "manifest line flipped": _edit_manifest(lambda lines, rng: [lines[0].replace(b'"bytes"', b'"bites"'), *lines[1:]]),
    "manifest line cut at the end": _edit_manifest(lambda lines, rng: [*lines, lines[0][:30]]),
    "cache.json garbage": lambda cache, rng: (cache / "cache.json").write_bytes(rng.randbytes(99)),
    "cache.json of another kind": lambda cache, rng: (cache / "cache.json").write_bytes(b"[]"),
    "text.json garbage": lambda cache, rng: (cache / "text.json").write_bytes(b"{"),
    "index garbage": lambda cache, rng: [_cut(path, rng) for path in cache.rglob("*.arrow")],
    "temporary files": lambda cache, rng: (cache / ".x.npz.0123abcd.tmp").write_bytes(b"x"),
    "lock left": lambda cache, rng: [path.write_bytes(b"garbage") for path in cache.glob("*.lock")],
}
