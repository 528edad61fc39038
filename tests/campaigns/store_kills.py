"""Kill cache jobs that write to a store, and count torn and unlisted objects.

Two nodes of two ranks, each node with a spool folder of its own, fill a cache on an S3 server on loopback. A proxy
before the server injects faults (500, 503, expired credentials, connections reset before and after the request is done)
and kills all ranks, or one node's, while a chosen request is on its way. The job is started again, also with fewer
ranks and without the spool of a lost node, until it has ended; then every object is compared with the manifest.

    python tests/campaigns/store_kills.py --kills 100 --work /tmp/store-kills
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from forked_ranks import PRELOADED, SERVER, RankProcess, run_rank  # noqa: E402
from rank_port import find_rank_port  # noqa: E402
from servers.object_store import FAULTS, FaultyStore, Request, serve_store  # noqa: E402

from sdxl_trainer.data.formats.manifest import ManifestEntry, read_latest  # noqa: E402
from sdxl_trainer.data.formats.shards import compute_sample_span  # noqa: E402
from sdxl_trainer.data.images.demo_set import draw_demo_set  # noqa: E402
from sdxl_trainer.data.stores.uploads import list_objects, read_bytes  # noqa: E402
from sdxl_trainer.train.tiny.build import build_tiny_sdxl  # noqa: E402

JOB_SECONDS = 900.0
END_BYTES = 1024  # of a tar
LAYOUTS = ((2, 2), (2, 2), (1, 2), (2, 1), (1, 1))  # nodes, ranks of each
NUM_IMAGES = 24


@dataclass
class Tally:
    """Counts of the campaign."""

    kills: int = 0
    starts: int = 0
    caches: int = 0
    faults: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass
class Plan:
    """The request during which the job is killed, and the nodes that are killed."""

    at: int
    nodes: int
    count: int = 0
    processes: list[list[BaseProcess]] = field(default_factory=list)
    happened: threading.Event = field(default_factory=threading.Event)


def make_set(work: Path) -> Path:
    """Write a set, the tiny SDXL and their settings, and return the file of settings."""
    metadata = draw_demo_set(work / "data", num_images=NUM_IMAGES)
    build_tiny_sdxl(work / "model")
    settings = {
        "run": {"name": "x", "dir": str(work / "runs")},
        "model": {"path": str(work / "model")},
        "data": {
            "metadata": [str(metadata)],
            **{"resolution_px": 128, "min_bucket_px": 64, "max_bucket_px": 256, "bucket_step_px": 32},
        },
        "cache": {"batch_size": 1, "format": "shards", "shard_mb": 1, "spool_gb": 0.01, "spool": "$NODE_SPOOL"},
    }
    (work / "settings.yaml").write_text(json.dumps(settings))
    return work / "settings.yaml"


def start_job(settings: Path, url: str, work: Path, layout: tuple[int, int], output: Path) -> list[list[BaseProcess]]:
    """Start the ranks of a cache job, and return the processes of each node."""
    num_nodes, num_ranks = layout
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_rank_port()), "WORLD_SIZE": str(num_nodes * num_ranks)}
    nodes: list[list[BaseProcess]] = []
    for node in range(num_nodes):
        nodes.append([])
        for local in range(num_ranks):
            own = {"RANK": str(node * num_ranks + local), "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(num_ranks)}
            environment = {
                **os.environ,
                **place,
                **own,
                "NODE_SPOOL": str(work / f"node-{node}"),
                "OMP_NUM_THREADS": "1",
            }
            words = ["--cfg", str(settings), f"cache.dir={url}", "engine.timeout_minutes=2"]
            arguments = (str(ROOT / "cache" / "main.py"), words, environment, [str(output), str(output)])
            nodes[-1].append(RankProcess(target=run_rank, args=arguments))
            nodes[-1][-1].start()
    return nodes


@dataclass
class FaultChooser:
    """Choose the fault of each request, and kill the job by its plan."""

    rng: random.Random
    rate: float  # share of requests that fail
    plan: Plan | None
    num_faults: int = 0
    guard: threading.Lock = field(default_factory=threading.Lock)

    def choose(self, request: Request) -> str | None:
        """Return the fault of a request, or None. The proxy calls it on many threads."""
        with self.guard:
            if self.plan is not None and self._is_due(self.plan, request):
                self._kill(self.plan)
                return self.rng.choice(("reset", "lost", None))
            if self.rng.random() < self.rate:
                self.num_faults += 1
                return self.rng.choice(FAULTS)
        return None

    def _is_due(self, plan: Plan, request: Request) -> bool:
        if plan.happened.is_set():
            return False
        plan.count += request.method in ("PUT", "POST", "DELETE")
        return plan.count >= plan.at and bool(plan.processes)

    def _kill(self, plan: Plan) -> None:
        plan.happened.set()
        kill_running([process for node in plan.processes[: plan.nodes] for process in node])


def kill_running(processes: list[BaseProcess]) -> None:
    """Kill the processes that have not ended."""
    for process in processes:
        if process.exitcode is None:
            process.kill()


def run_once(
    settings: Path, url: str, work: Path, proxy: FaultyStore, rng: random.Random, rate: float, plan: Plan | None
) -> tuple[int, str, int]:
    """Run a job, killed by the plan. Return its status (the worst of its ranks), its output, and the faults."""
    layout, output, chooser = rng.choice(LAYOUTS), work / "output.txt", FaultChooser(rng, rate, plan)
    output.write_text("")
    proxy.choose_fault = chooser.choose
    nodes = start_job(settings, url, work, layout, output)
    if plan is not None:
        plan.processes = rng.sample(nodes, len(nodes))
    processes = [process for node in nodes for process in node]
    wait_for_job(processes)
    proxy.choose_fault = lambda request: None
    statuses = [process.exitcode or 0 for process in processes]
    return next((status for status in statuses if status), 0), output.read_text(errors="replace"), chooser.num_faults


def wait_for_job(processes: list[BaseProcess]) -> None:
    """Wait until all ranks have ended. Ten seconds after one has failed, the others are killed as by a launcher."""
    deadline, grace = time.monotonic() + JOB_SECONDS, None
    while any(process.exitcode is None for process in processes):
        time.sleep(0.05)
        failed = any(process.exitcode for process in processes)
        grace = grace or (time.monotonic() + 10.0 if failed else None)
        if (grace is not None and time.monotonic() > grace) or time.monotonic() > deadline:
            kill_running(processes)


def read_store(url: str, folder: Path) -> dict[str, ManifestEntry]:
    """Return the entries that the store's manifest lists."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "manifest").mkdir(parents=True)
    for item in list_objects(f"{url}/manifest"):
        (folder / "manifest" / item.url.rpartition("/")[2]).write_bytes(read_bytes(item.url))
    return read_latest(folder)


def check_listed(url: str, entries: dict[str, ManifestEntry], contents: dict[str, bytes]) -> list[str]:
    """Compare the bytes of every listed item with the manifest."""
    import hashlib

    problems = []
    for key, entry in entries.items():
        if entry.file not in contents:
            try:
                contents[entry.file] = read_bytes(f"{url}/{entry.file}")
            except FileNotFoundError:
                problems.append(f"{key}: {entry.file} is listed and not there")
                continue
        assert entry.offset is not None
        part = contents[entry.file][entry.offset : entry.offset + entry.bytes]
        if hashlib.sha256(part).hexdigest() != entry.sha256:
            problems.append(f"{key}: torn in {entry.file}")
    return problems


def check_kept(before: dict[str, ManifestEntry], after: dict[str, ManifestEntry], output: str) -> list[str]:
    """Compare what was listed before a job with what is listed after it, and with the images that it planned to encode.

    An entry may change its place: items of a partly listed shard are copied into another one.
    """
    lost = [key for key, entry in before.items() if key not in after or after[key].sha256 != entry.sha256]
    problems = [f"{key}: listed before, and lost or changed" for key in lost]
    planned = sum(int(number) for number in re.findall(r"; (\d+) to do on", output))
    if planned > NUM_IMAGES - len(before):
        problems.append(f"{planned} images to encode, though {len(before)} of {NUM_IMAGES} were listed")
    return problems


def check_whole(url: str, entries: dict[str, ManifestEntry], contents: dict[str, bytes]) -> list[str]:
    """Find torn, unlisted and left objects of a cache whose job has ended."""
    names = {item.url[len(url) + 1 :] for item in list_objects(url)}
    shards = {name for name in names if name.startswith("shards/")}
    problems = [f"{name}: unlisted" for name in shards - {entry.file for entry in entries.values()}]
    problems += [f"{name}: left" for name in names if name.startswith(("pending/", "lock/"))]
    if len(entries) != NUM_IMAGES:
        problems.append(f"{len(entries)} of {NUM_IMAGES} images are cached")
    for shard in shards & contents.keys():
        held = (entry for entry in entries.values() if entry.file == shard)
        spans = (compute_sample_span(e.key, e.record_bytes or 0, e.offset or 0, e.bytes).size for e in held)
        if (end := sum(spans) + END_BYTES) != len(contents[shard]):
            problems.append(f"{shard}: has {len(contents[shard])} bytes, and its items take {end}")
    return problems


def run_campaign(work: Path, num_kills: int, seconds: float, seed: int, rate: float) -> Tally:
    """Run jobs until `num_kills` kills have happened, or `seconds` have passed."""
    rng, tally, deadline = random.Random(seed), Tally(), time.monotonic() + seconds
    settings = make_set(work)
    SERVER.set_forkserver_preload(PRELOADED)

    def draw_plan() -> Plan | None:
        wants_kill = tally.kills < num_kills and time.monotonic() < deadline and rng.random() < 0.85
        return Plan(at=rng.randint(1, 30), nodes=rng.choice((1, 2, 2))) if wants_kill else None

    with serve_store() as proxy:
        import s3fs

        s3fs.S3FileSystem().mkdir("campaign")
        while tally.kills < num_kills and time.monotonic() < deadline:
            url, listed, status = f"s3://campaign/cache-{tally.caches}", {}, None
            while status != 0:
                plan = draw_plan()
                status, output, faults = run_once(settings, url, work, proxy, rng, rate, plan)
                killed = plan is not None and plan.happened.is_set()
                tally.starts, tally.kills, tally.faults = tally.starts + 1, tally.kills + killed, tally.faults + faults
                entries, contents = read_store(url, work / "seen"), {}
                found = [*check_listed(url, entries, contents), *check_kept(listed, entries, output)]
                if status and not killed:
                    found.append(f"a job that was not killed ended with {status}: {output[-2000:]}")
                if status == 0:
                    found += check_whole(url, entries, contents)
                listed = entries
                report(tally, url, status, len(entries), found)
                if status and rng.random() < 0.3:  # a node is replaced by another one
                    shutil.rmtree(work / f"node-{rng.randint(0, 1)}", ignore_errors=True)
            tally.caches += 1
    return tally


def report(tally: Tally, url: str, status: int, num_listed: int, problems: list[str]) -> None:
    """Add the problems of a start to the tally, and print them."""
    tally.problems += problems
    counts = f"{tally.kills} kills, {tally.starts} starts, {tally.faults} faults"
    print(f"{counts}: {url} status {status}, {num_listed} listed, {len(tally.problems)} problems", flush=True)
    for problem in problems:
        print(f"  PROBLEM {problem}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=1e9, help="after which no further kill is begun")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.03, help="share of requests that fail")
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tally = run_campaign(options.work, options.kills, options.seconds, options.seed, options.rate)
    summary: dict[str, Any] = {**vars(tally), "problems": len(tally.problems)}
    print(json.dumps(summary))
    return 1 if tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
