"""A store that fails during a run: reads are retried, then an error names the object, and the state is saved."""

import os
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import orjson
import pytest
from forked_ranks import start_forked

pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")

import s3fs  # noqa: E402

from sdxl_trainer.data.formats.manifest import read_entries  # noqa: E402
from sdxl_trainer.data.formats.shards import ShardWriter  # noqa: E402
from sdxl_trainer.train.checkpoint.folder import list_checkpoints, recover_partial_checkpoints  # noqa: E402
from sdxl_trainer.train.checkpoint.state import TrainState  # noqa: E402
from sdxl_trainer.train.report.metrics import read_metrics  # noqa: E402

# The training program, but retries of a store end after one second.
PROGRAM = """
from sdxl_trainer.data.stores import remote
remote.FIRST_WAIT_SECONDS, remote.RETRY_LIMIT_SECONDS = 0.05, 1.0
from sdxl_trainer.train.main import main
from sdxl_trainer.launch.program import end_program
end_program(main())
"""


def make_shard(cached_folder: Path, path: Path) -> None:
    """Write the latents of `cached_folder` and their captions into one shard."""
    metadata = orjson.loads((cached_folder / "data" / "metadata.json").read_bytes())
    writer = ShardWriter(path)
    for entry in read_entries(cached_folder / "latents"):
        content = (cached_folder / "latents" / entry.file).read_bytes()
        writer.append(entry.key, orjson.dumps({"caption": metadata[entry.key]["caption"]}), content)
    writer.close()


def wait_for_steps(process: BaseProcess, run: Path, number: int) -> None:
    """Wait until `number` steps are logged or the program has ended."""
    log = run / "logs" / "metrics.jsonl"
    while process.is_alive() and (not log.exists() or log.read_bytes().count(b"\n") < number):
        time.sleep(0.05)


def test_a_store_that_fails_ends_the_run_with_its_state_saved(cached_folder, tmp_path):
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    access = {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }
    store = s3fs.S3FileSystem(key="x", secret="y", endpoint_url=address, skip_instance_cache=True)
    store.mkdir("lost")
    make_shard(cached_folder, tmp_path / "a.tar")
    store.put_file(str(tmp_path / "a.tar"), "lost/a.tar")
    words = (
        "data.metadata=[s3://lost/a.tar]",
        f"cache.dir={tmp_path / 'cache'}",
        f"run.dir={tmp_path}",
        "run.name=run",
        "train.max_steps=5000",
        "sample.prompts=[]",
        "checkpoint.every_steps=0",
    )
    environment = {**os.environ, **access, "AWS_ENDPOINT_URL": address, "OMP_NUM_THREADS": "1"}
    run, program, printed = tmp_path / "run", tmp_path / "program.py", tmp_path / "printed"
    program.write_text(PROGRAM)
    printed.touch()
    [process] = start_forked(program, ["--cfg", cached_folder / "tiny.yaml", *words], environment, printed)
    wait_for_steps(process, run, 3)
    server.stop()
    process.join(120)
    process.kill()
    output = printed.read_text()
    assert process.exitcode == 1, output[-4000:]
    assert "StoreError: s3://lost/a.tar at byte" in output and "shard of step" in output
    recover_partial_checkpoints(run / "checkpoints")
    [folder] = list_checkpoints(run / "checkpoints")
    assert TrainState.load(folder).step == len(list(read_metrics(run / "logs" / "metrics.jsonl"))) >= 3
    assert not (run / "logs" / "bad_samples.jsonl").exists()  # no sample is at fault
