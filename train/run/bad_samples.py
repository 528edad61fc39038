"""Bad samples of a run: the list of each rank, and the limit of `data.max_bad_fraction`."""

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import orjson

from sdxl_trainer.data.checks.bad_limit import count_few
from sdxl_trainer.data.counted_warnings import CountedWarnings
from sdxl_trainer.data.text.strategy import is_strategy_failure
from sdxl_trainer.launch.append_file import AppendFile
from sdxl_trainer.launch.distributed import Ranks, gather_objects

# The window is an epoch within these bounds. A shorter one would stop a run for a few bad samples by chance, and a
# longer one would let it continue for hours without its storage.
MIN_WINDOW, MAX_WINDOW = 10_000, 100_000


class Excess(NamedTuple):
    """More bad samples than `data.max_bad_fraction` allows: how many there are, and what makes them good."""

    rule: str
    cure: str


class BadSamples:
    """The file `bad_samples*.jsonl` of a rank, and the count of all ranks' bad samples over the last samples.

    Args:
        logs: the log folder of the run.
        num_samples: samples of an epoch.
        max_fraction: maximum share of bad samples.
    """

    def __init__(self, logs: Path, ranks: Ranks, num_samples: int, max_fraction: float):
        suffix = "" if ranks.is_main else f"-rank{ranks.rank}"
        self._file = AppendFile(logs / f"bad_samples{suffix}.jsonl")
        self._warnings = CountedWarnings("bad sample skipped", self._file.path, ranks.world_size)
        self._window, self._few = BadSampleWindow(num_samples, max_fraction), count_few(max_fraction, num_samples)
        # Keys of this rank's bad samples, as many as are needed to exceed the limit → whether the strategy failed.
        self._found: dict[str, bool] = {}

    def skip(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Warn of this rank's samples, each a key and a reason, that could not be read in a step, and list them."""
        for _, reason in samples:
            self._warnings.add(reason)
        self.append(step, [{"key": key, "reason": reason} for key, reason in samples])
        for key, reason in samples:
            if len(self._found) <= self._few:
                self._found.setdefault(key, is_strategy_failure(reason))

    def find_excess(self, num_samples: int, num_bad: int) -> Excess | None:
        """Count the samples of a step over all ranks; describe the excess if too many are bad now.

        One or two samples, which a small set uses often, may always be bad. All ranks call this together.
        """
        rule = self._window.add(num_samples, num_bad)
        if rule is None:
            return None
        found = {key: is_failure for each in gather_objects(self._found) for key, is_failure in each.items()}
        if len(found) <= self._few:
            return None
        cures = {False: "make the samples readable", True: "correct the class of data.strategy"}
        return Excess(rule, " and ".join(cures[is_failure] for is_failure in sorted(set(found.values()))))

    def append(self, step: int, samples: Sequence[Mapping[str, str]]) -> None:
        """List this rank's bad samples of a step, each with its key and reason."""
        lines = [orjson.dumps({"step": step, **sample}) + b"\n" for sample in samples]
        if lines:
            self._file.append(b"".join(lines), len(lines))

    def close(self) -> None:
        """Close the list, and log how many samples it names and how much could not be written."""
        self._warnings.close()
        self._file.close()


class BadSampleWindow:
    """Count of bad samples among the last samples of this job.

    A start counts anew: after a failure of the storage has passed, the same command continues.

    Args:
        num_samples: samples of an epoch.
        max_fraction: maximum share of bad samples.
    """

    def __init__(self, num_samples: int, max_fraction: float):
        self._size = min(max(num_samples, MIN_WINDOW), MAX_WINDOW)
        self._first_size = min(num_samples, self._size)
        self._max_fraction = max_fraction
        self._num_seen = self._num_bad = 0
        self._steps: deque[tuple[int, int]] = (
            deque()
        )  # samples seen at the end of a step with bad ones, and their number

    def add(self, num_samples: int, num_bad: int) -> str | None:
        """Count the samples of a step; describe the excess if too many are bad now.

        At the start, as many may be bad as in an epoch or, if that is shorter, in a window.
        """
        self._num_seen += num_samples
        if not num_bad:
            return None
        self._num_bad += num_bad
        self._steps.append((self._num_seen, num_bad))
        while self._steps[0][0] <= self._num_seen - self._size:
            self._num_bad -= self._steps.popleft()[1]
        num_last = min(self._num_seen, self._size)
        if self._num_bad <= self._max_fraction * max(num_last, self._first_size):
            return None
        limit = f"data.max_bad_fraction = {self._max_fraction:g}"
        return f"{self._num_bad} of the last {num_last} samples are bad, more than {limit} allows"
