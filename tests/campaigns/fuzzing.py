"""Fuzzing of every reader of foreign files: nothing but the reader's named error may pass its border.

    python tests/campaigns/fuzzing.py [--seconds 60] [--seed 0] [--only NAME...] [--crashers DIR]

Each reader gets valid files that were damaged: bits, numbers and ranges of bytes, words that parsers stumble over, and
members of archives and chunks of PNGs with their checksums made right again. A reader runs in a process of its own with
a limit on memory, so that a crash and a huge allocation are found too. tests/campaigns/faults.py runs parts of it.
"""

import argparse
import io
import json
import os
import random
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HANG_SECONDS = 20
EXTRA_MEMORY_BYTES = 3 << 30
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1)
WORDS = [
    *(b"[" * 100_000, b"{" * 3000, b'{"a":' * 5000, b"(" * 3000, b"-" * 3000, b"9" * 5000, b"0" * 400),
    *(
        b"NaN",
        b"1e999",
        b"-Infinity",
        b"null",
        b"true",
        b"-1",
        b"0.5",
        b"010",
        b"2026-01-01",
        b"5e8",
        b"0x7f",
        b"1_000",
    ),
    *(b'"\\ud800"', b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1b[31m", b"\n", b"\r", b"\x85", b'"', b"'", b"\\", b","),
    *(b"[]", b"{}", b'""', b"*a", b"&a ", b"!!python/object:os.system ", b"<<: ", b": ", b"- ", b"\t", b"%", b"../"),
]


@dataclass(frozen=True)
class Border:
    """A reader, valid files for it, and the errors that it may raise.

    `parts` lists functions that damage the inside of a file and make its checksums right again.
    """

    name: str
    suffix: str
    seeds: Callable[[Path], list[bytes]]
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...] = (ValueError,)
    parts: tuple[Callable[[bytes, random.Random], bytes], ...] = ()


@dataclass
class Findings:
    """Inputs that were tried, and for each way to fail, its first input."""

    num_inputs: int = 0
    failures: dict[str, bytes] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.failures = self.failures or {}


def mutate(content: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """Damage a file in one to four places."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        place, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 64, 512))
        match rng.randrange(9):
            case 0 if data:
                data[place % len(data)] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[place % len(data)] = rng.randrange(256)
            case 2:
                del data[place:]
            case 3:
                del data[place : place + length]
            case 4:
                data[place:place] = data[place : place + length] * rng.choice((1, 2, 50))
            case 5:
                data[place:place] = rng.randbytes(length)
            case 6:
                size, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
                number = rng.choice(NUMBERS) & ((1 << 8 * size) - 1)
                data[place : place + size] = number.to_bytes(size, order)  # type: ignore[arg-type]
            case 7:
                data[place : place + rng.choice((0, 0, length))] = rng.choice(WORDS)
            case _:
                start = rng.randrange(len(other) + 1)
                data[place : place + length] = other[start : start + length]
    return bytes(data)


def mutate_value(content: bytes, rng: random.Random) -> bytes:
    """Put another JSON value in the place of one value of a text that is JSON, or a line of which is."""
    values = [None, True, 0, -1, 1.5, 1e300, 10**30, "", " ", "a", [], [[]], {}, {"1girl": 0.99}, [None], [1, "a"]]
    lines = content.splitlines() if content.count(b"\n") else [content]
    at = rng.randrange(len(lines))
    try:
        document = json.loads(lines[at])
    except ValueError:
        return mutate(content, rng)
    place = document
    while isinstance(place, dict | list) and place:
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.4:
            place[key] = rng.choice(values)
            break
        place = inner
    lines[at] = json.dumps(document).encode()
    return b"\n".join(lines) + b"\n"


def mutate_zip(content: bytes, rng: random.Random) -> bytes:
    """Damage one member of a zip; all checksums stay right."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    head, body = members[name][:128], members[name][128:]
    members[name] = mutate(head, rng) + body if rng.random() < 0.8 else mutate(members[name], rng)
    if rng.random() < 0.2:
        members[rng.choice(["latents_flipped.npy", "alpha_mask.npy", "x.npy", "crop_ltrb.npy"])] = members[name]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as to:
        for name, member in members.items():
            to.writestr(name, member)
    return buffer.getvalue()


def mutate_npy_fields(content: bytes, rng: random.Random) -> bytes:
    """Put other types and shapes into the npy headers of an npz."""
    types = ["<f4", "<f2", "|O", "<U0", "|V0", "<M8[s]", ">f8", "<c16", "|b1", "<i8", "f4, i4", "(2,2)f4", "<f4" * 99]
    shapes = [
        "()",
        "(0,)",
        "(4, 8, 8)",
        "(4, 0, 8)",
        "(-1,)",
        "(4, 8)",
        "(9" + "0" * 30 + ", 0)",
        "(1,) * 40",
        "[4]",
        "(True,)",
    ]
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    fields = f"{{'descr': {rng.choice(types)!r}, 'fortran_order': {rng.choice(['True', 'False', 'None'])}, "
    fields = (fields + f"'shape': {rng.choice(shapes)}, }}").encode()
    values = members[name][128:] if rng.random() < 0.7 else b""
    members[name] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(fields)) + fields + values
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as to:
        for name, member in members.items():
            to.writestr(name, member)
    return buffer.getvalue()


def mutate_tar(content: bytes, rng: random.Random) -> bytes:
    """Damage the header or the content of one member of a tar; the headers' checksums stay right."""
    data = bytearray(content)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        member = rng.choice(tar.getmembers())
    if rng.random() < 0.3:
        place = slice(member.offset_data, member.offset_data + member.size)
        data[place] = mutate(bytes(data[place]), rng)[: member.size].ljust(member.size, b" ")
        return bytes(data)
    header = bytearray(mutate(bytes(data[member.offset : member.offset + 512]), rng)[:512].ljust(512, b"\0"))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[member.offset : member.offset + 512] = header
    return bytes(data)


def mutate_png(content: bytes, rng: random.Random) -> bytes:
    """Damage one chunk of a PNG; its checksum is made right."""
    if not content.startswith(b"\x89PNG"):
        return mutate(content, rng)
    chunks, place = [], 8
    while place + 12 <= len(content):
        size = int.from_bytes(content[place : place + 4], "big")
        chunks.append([content[place + 4 : place + 8], content[place + 8 : place + 8 + size]])
        place += size + 12
    chosen = rng.choice(chunks)
    chosen[1] = mutate(chosen[1], rng)
    if rng.random() < 0.3:
        chunks.insert(rng.randrange(1, len(chunks) + 1), list(rng.choice(chunks)))
    if rng.random() < 0.2:
        extra = rng.choice(
            [[b"zTXt", b"a\0\0" + zlib.compress(bytes(3_000_000))], [b"acTL", bytes(8)], [b"iCCP", b"a\0\0x"]]
        )
        chunks.insert(1, extra)
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return content[:8] + b"".join(packed)


def mutate_header(content: bytes, rng: random.Random) -> bytes:
    """Damage the JSON header of a safetensors file; its length is made right."""
    size = int.from_bytes(content[:8], "little")
    header = rng.choice((mutate, mutate_value))(content[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def fuzz(border: Border, seed: str, seconds: float, limit: int = 10**9) -> Findings:
    """Feed a reader with damaged files, in processes of their own; one that dies is followed by another.

    Args:
        limit: number of inputs.
    """
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        seeds = border.seeds(folder)
        inputs = make_inputs(border, seeds, random.Random(seed))
        findings, deadline = Findings(), time.monotonic() + seconds
        while time.monotonic() < deadline and findings.num_inputs < limit:
            batch = [next(inputs) for _ in range(min(200, limit - findings.num_inputs))]
            findings.failures = {**run_batch(border, batch, folder, deadline, findings), **findings.failures}
    return findings


def make_inputs(border: Border, seeds: list[bytes], rng: random.Random) -> Iterator[bytes]:
    """Yield damaged files without end."""
    while True:
        content = rng.choice(seeds)
        if border.parts and rng.random() < 0.6:
            yield rng.choice(border.parts)(content, rng)
        else:
            yield mutate(content, rng, rng.choice(seeds))


def run_batch(
    border: Border, batch: list[bytes], folder: Path, deadline: float, findings: Findings
) -> dict[str, bytes]:
    """Read a batch of inputs in a child. Return failure → input, and add the inputs to the findings' number."""
    report = folder / "report.jsonl"
    failures: dict[str, bytes] = {}
    start = 0
    while start < len(batch) and (start == 0 or time.monotonic() < deadline):
        report.write_bytes(b"")
        child = os.fork()
        if child == 0:
            _read_all(border, batch, start, folder, report, deadline)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        lines = [json.loads(line) for line in report.read_bytes().splitlines()]
        failures.update({line["failure"]: batch[line["at"]] for line in lines if "failure" in line})
        reached = max((line["at"] for line in lines), default=start)
        if status == 0:
            findings.num_inputs += reached + 1 - start
            return failures
        number = -status
        name = (
            "hangs" if number == signal.SIGALRM else f"dies of {signal.Signals(number).name}" if number > 0 else "exits"
        )
        failures[f"{name} ({status})"] = batch[reached]
        findings.num_inputs += reached + 1 - start
        start = reached + 1
    return failures


def _read_all(border: Border, batch: list[bytes], start: int, folder: Path, report: Path, deadline: float) -> None:
    """Read inputs in this child, note the number of each before and what it raised after, and end the process."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_MEMORY_BYTES, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    status = 1
    try:
        with open(report, "ab", buffering=0) as lines:
            for entry in _try_inputs(border, batch, start, folder, deadline):
                lines.write(json.dumps(entry).encode() + b"\n")
        status = 0
    finally:
        os._exit(status)


def _try_inputs(
    border: Border, batch: list[bytes], start: int, folder: Path, deadline: float
) -> Iterator[dict[str, Any]]:
    """Yield the number of each input before it is read, and what it raised after."""
    for at in range(start, len(batch)):
        yield {"at": at}
        signal.alarm(HANG_SECONDS)
        failure = try_input(border, batch[at], folder)
        signal.alarm(0)
        if failure:
            yield {"at": at, "failure": failure}
        if time.monotonic() > deadline:
            return


def try_input(border: Border, content: bytes, folder: Path) -> str | None:
    """Read one input. Return the failure: an exception that is not the reader's own, and the line that raised it."""
    path = folder / f"input{border.suffix}"
    path.write_bytes(content)
    try:
        border.read(path)
    except Exception as error:  # noqa: BLE001  (whatever passes the border is what is looked for)
        if type(error) in border.errors:
            return None
        return f"{type(error).__name__} in {locate(error.__traceback__)}"
    return None


def locate(trace: TracebackType | None) -> str:
    """Return the innermost line of the project that an exception passed."""
    place = "?"
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and "campaigns" not in file.parts or "sdxl_trainer" in file.parts:
            place = f"{file.name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def main() -> int:
    """Fuzz each reader, print a table, and keep the crashers; 1 if there are any."""
    from campaigns.fuzzed_readers import BORDERS

    parser = argparse.ArgumentParser(description="Fuzz every reader of foreign files.")
    parser.add_argument("--seconds", type=float, default=60, help="for each reader (60)")
    parser.add_argument("--seed", default="0", help="of the damages (0)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these readers")
    parser.add_argument("--crashers", type=Path, help="folder for inputs that pass a border")
    options = parser.parse_args()
    totals: Counter[str] = Counter()
    for border in [border for border in BORDERS if options.only is None or border.name in options.only]:
        findings = fuzz(border, f"{options.seed}:{border.name}", options.seconds)
        totals.update(inputs=findings.num_inputs, failures=len(findings.failures))
        print(f"{border.name:18} {findings.num_inputs:8,} inputs  {len(findings.failures)} failures", flush=True)
        for number, (failure, content) in enumerate(findings.failures.items()):
            print(f"    {failure}", flush=True)
            if options.crashers:
                options.crashers.mkdir(parents=True, exist_ok=True)
                (options.crashers / f"{border.name}-{number}{border.suffix}").write_bytes(content)
    print(f"{totals['inputs']:,} inputs, {totals['failures']} failures")
    return 1 if totals["failures"] else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
