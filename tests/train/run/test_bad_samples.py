"""Bad samples: the limit over the last samples, and a run that continues once they are readable again."""

from pathlib import Path

import orjson
import pytest
import torch
from programs import run_program

from sdxl_trainer.launch.distributed import Ranks
from sdxl_trainer.train.report.metrics import read_metrics
from sdxl_trainer.train.run.bad_samples import BadSamples, BadSampleWindow

# Reads no caption while `away` exists and the run trains, and deletes the run folder after step 3.
CAPTIONS = """
import os, shutil

class Captions:
    def caption(self, record, rng):
        here = os.path.dirname(__file__)
        if os.path.exists(here + "/away") and os.path.exists(here + "/run/logs/train.log"):
            raise OSError("the storage is away")
        metrics = here + "/run/logs/metrics.jsonl"
        if os.path.exists(metrics) and open(metrics).read().count("\\n") == 3:
            shutil.rmtree(here + "/run")
        return record["caption"]
"""


def test_the_limit_is_that_of_the_last_samples() -> None:
    window = BadSampleWindow(num_samples=1000, max_fraction=0.01)
    assert [window.add(4, 2) for _ in range(5)] == [None] * 5, "10 of an epoch's 1,000"
    assert window.add(4, 1) == "11 of the last 24 samples are bad, more than data.max_bad_fraction = 0.01 allows"
    assert window.add(4, 0) is None, "a step without a bad sample stops no run"
    assert window.add(8_000, 60) is None, "71 of 8,028"
    assert window.add(3_000, 40) is None, "100 of the last 10,000: the first steps have left the window"
    assert window.add(4, 1) == "101 of the last 10000 samples are bad, more than data.max_bad_fraction = 0.01 allows"
    assert BadSampleWindow(10**8, 0.01).add(10**6, 1_001) is not None, "of the last 100,000"
    assert BadSampleWindow(10, 0.0).add(4, 1) is not None and BadSampleWindow(10, 1.0).add(4, 4) is None


@pytest.mark.parametrize(
    ("num_samples", "keys", "is_stopped"),
    [
        (48, "a", False),
        (48, "aaaa", False),  # a sample with repeats
        (48, "ab", False),
        (48, "abc", True),
        (3, "abc", True),
        (2, "a", False),
        (2, "ab", True),
        (1, "a", True),
    ],
)
def test_one_or_two_bad_files_never_end_a_run_of_a_small_set(
    tmp_path: Path, num_samples: int, keys: str, is_stopped: bool
) -> None:
    bad_samples = BadSamples(tmp_path, Ranks(0, 0, 1, torch.device("cpu")), num_samples, max_fraction=0.01)
    messages = []
    for step in range(100):
        bad_samples.skip(step, [(key, "is cut off") for key in keys])
        messages.append(bad_samples.find_excess(48, len(keys)))
    assert any(messages) == is_stopped and (not is_stopped or messages[0])


STRATEGY_ERROR = "b: Mine.caption of data.strategy = /own.py:Mine raised KeyError: 'x'"


@pytest.mark.parametrize(
    ("reasons", "cure"),
    [
        (["is cut off"] * 3, "make the samples readable"),
        ([STRATEGY_ERROR] * 3, "correct the class of data.strategy"),
        ([STRATEGY_ERROR, "is cut off", STRATEGY_ERROR], "make the samples readable and correct the class of data.str"),
    ],
)
def test_the_cure_is_that_of_the_reasons(tmp_path: Path, reasons: list[str], cure: str) -> None:
    bad_samples = BadSamples(tmp_path, Ranks(0, 0, 1, torch.device("cpu")), 48, max_fraction=0.01)
    bad_samples.skip(0, list(zip("abc", reasons, strict=True)))
    excess = bad_samples.find_excess(48, 3)
    assert excess is not None and excess.cure.startswith(cure)


RANKS = """
import sys
from pathlib import Path
from sdxl_trainer.launch.distributed import close_ranks, init_ranks
from sdxl_trainer.train.run.bad_samples import BadSamples

ranks = init_ranks()
bad = BadSamples(Path(sys.argv[1]), ranks, 48, 0.01)
bad.skip(0, [(key, "is cut off") for key in (["a", "b"], ["b", "a"])[ranks.rank]])
assert bad.find_excess(8, 4) is None, "the same two"
bad.skip(1, [("c", "is cut off")] if ranks.rank else [])
rule = "5 of the last 16 samples are bad, more than data.max_bad_fraction = 0.01 allows"
assert bad.find_excess(8, 1) == (rule, "make the samples readable")
close_ranks()
"""


def test_ranks_count_the_same_bad_samples_once(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(RANKS)
    run_program(tmp_path / "program.py", tmp_path, ranks=2)


def test_a_run_continues_when_its_samples_are_readable_again(cached_folder: Path, tmp_path: Path) -> None:
    """The second start deletes its run folder while it trains: the metrics are written anew."""
    (tmp_path / "captions.py").write_text(CAPTIONS)
    words = ["--cfg", cached_folder / "tiny.yaml", f"run.dir={tmp_path}", "run.name=run", "sample.prompts=[]"]
    words += [f"data.strategy={tmp_path / 'captions.py'}:Captions", "train.max_steps=4", "checkpoint.every_steps=0"]
    (tmp_path / "away").touch()
    printed = run_program("train/main.py", *words, "data.max_bad_fraction=0.2", expect=1)
    assert "8 of the last 8 samples are bad, more than data.max_bad_fraction = 0.2 allows" in printed, printed
    cure = "cure: correct the class of data.strategy, or raise data.max_bad_fraction; the same command continues"
    assert cure in printed and "FailedError" not in printed, printed
    bad = [orjson.loads(line) for line in (tmp_path / "run/logs/bad_samples.jsonl").read_bytes().splitlines()]
    assert [line["step"] for line in bad] == [0] * 4 + [1] * 4 and "the storage is away" in bad[0]["reason"]
    (tmp_path / "away").unlink()
    run_program("train/main.py", *words, "data.max_bad_fraction=0.2")
    run = tmp_path / "run"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]
    assert [line["num_bad"] for line in read_metrics(run / "logs" / "metrics.jsonl")] == [4, 8, 8, 8]
