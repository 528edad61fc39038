"""Paths of the checkout, and starting its programs the way users do."""

import os
import subprocess
import sys
from pathlib import Path

from forked_ranks import REPORT_VARIABLE, run_forked

ROOT = Path(__file__).resolve().parents[2]
FORKED_RANKS = Path(__file__).with_name("forked_ranks.py")
FIXTURES = ROOT / "tests" / "fixtures"
TINY = ROOT / "configs" / "tiny"
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what a launcher sets
TIMEOUT_SECONDS = 1800  # of a program that hangs; a busy machine takes long
IN_EACH_STEP = ("validation.every_steps=1", "sample.every_steps=1")
MIXED_PROMPTS = """a red circle on a white background
a blue star on a grey background --w 64 --h 128 --s 3 --d 77
a green square on a black background --ss euler_a --n a circle
"""


def run_program(
    program: str | Path,
    *words: object,
    ranks: int = 1,
    expect: int = 0,
    restarts: int | None = None,
    writes_report: bool = False,
) -> str:
    """Run train/main.py or another program on `ranks` ranks and return what it printed.

    Args:
        restarts: starts the ranks under torchrun, which restarts them so often. In any case they are forked from a
            process that has the libraries imported.
        writes_report: a training run writes its report page only then.
    """
    environment = {name: value for name, value in os.environ.items() if name not in PLACE}
    environment |= {"OMP_NUM_THREADS": "1", **({REPORT_VARIABLE: "1"} if writes_report else {})}
    arguments = [str(word) for word in words]
    if restarts is None:
        status, printed = run_forked(ROOT / program, arguments, ranks, environment, TIMEOUT_SECONDS)
    else:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        stand_in = [str(FORKED_RANKS), str(ROOT / program)]
        command = [sys.executable, *torchrun, f"--max-restarts={restarts}", *stand_in, *arguments]
        done = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
        status, printed = done.returncode, done.stdout
    assert status == expect, f"{program} {' '.join(arguments)} ended with {status}:\n{printed[-6000:]}"
    return printed


STAND_IN = """
import sys
sys.path.insert(0, {folder!r})
from forked_ranks import stand_in

if __name__ == "__main__":
    sys.exit(stand_in({program!r}, sys.argv[1:]))
"""


def lay_out_scripts(folder: Path, program: str) -> Path:
    """Make `folder` a checkout whose launch scripts start a program in forked ranks; return the folder of scripts."""
    (folder / program).parent.mkdir(parents=True)
    (folder / program).write_text(STAND_IN.format(folder=str(FORKED_RANKS.parent), program=str(ROOT / program)))
    (folder / "launch").symlink_to(ROOT / "launch")
    return folder / "launch"


def read_losses(run: Path) -> list[float]:
    """Return the loss of every step in a run folder."""
    from sdxl_trainer.train.report.metrics import read_metrics

    return [line["loss"] for line in read_metrics(run / "logs" / "metrics.jsonl")]


def list_validation_words(cached_folder: Path, folder: Path) -> list[str]:
    """Settings of the runs in the folder of `validated`."""
    return [
        "--cfg",
        str(cached_folder / "tiny.yaml"),
        f"run.dir={folder}",
        f"validation.image_dirs=[{folder / 'own'}]",
        f"validation.cache_dir={folder / 'own'}",
        "validation.timesteps_per_sample=2",
        "validation.at_start=true",
        "sample.prompts=[]",
        f"sample.prompt_file={folder / 'prompts.txt'}",
        "sample.num_inference_steps=2",
        "train.max_steps=2",
        "checkpoint.every_steps=0",
        "ema.decays=[0.5]",
        "ema.lengths=[0.1]",
        "ema.snapshot_every_steps=1",
        "ema.snapshot_dtype=fp32",
        "ema.sample=false",
    ]
