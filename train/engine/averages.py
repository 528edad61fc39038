"""Moving averages of the weights, on the device or, beside the steps, on the host."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sdxl_trainer.configs.schema import EmaConfig
from sdxl_trainer.train.engine.host_memory import HostMemory
from sdxl_trainer.train.engine.power_profiles import compute_gamma, compute_power_decay
from sdxl_trainer.train.optim.host_threads import choose_num_threads, use_threads

# Moves averages towards masters by the decay of each.
Move = Callable[[Sequence[torch.Tensor], Mapping[str, float]], None]
GROUP_VALUES = 2**24  # weights that are converted to fp32 at a time


@dataclass
class PowerClock:
    """Time of the power-function averages, which a decay depends on. Checkpoints hold it.

    It starts with the run, or with the checkpoint after which a run first keeps such averages. An average that is
    added later begins as the weights of that moment.
    """

    first_step: int = 0  # step of the run at which the clock started
    updates: int = 0  # since then
    joined: dict[str, int] = field(default_factory=dict)  # average → `updates` when it was added

    def to_plain(self) -> dict[str, Any]:
        """Return the content of a checkpoint; see `from_plain`."""
        return asdict(self)

    @classmethod
    def from_plain(cls, saved: Mapping[str, Any] | None, names: Sequence[str], step: int) -> "PowerClock":
        """Return the clock for averages that continue from a checkpoint.

        Args:
            saved: None if the checkpoint holds no power-function average.
            names: of the averages.
            step: of the checkpoint.
        """
        if not saved or not saved["joined"]:
            return cls(first_step=step, joined=dict.fromkeys(names, 0))
        updates = int(saved["updates"])
        joined = {name: int(saved["joined"].get(name, updates)) for name in names}
        return cls(first_step=int(saved["first_step"]), updates=updates, joined=joined)


class Ema:
    """Moving averages of flat tensors, one set for each decay or length. Each rank averages its own masters only.

    Args:
        config: with a decay for each exponential average, named `name_average(decay)`, and a length for each
            power-function average (power_profiles.py), named `name_length(length)`.
        masters: the tensors to average, of any shapes; the averages are flat, in fp32, and begin as copies.
        device: of the model.
    """

    def __init__(self, config: EmaConfig, masters: Sequence[torch.Tensor], device: torch.device):
        self.warmup = config.warmup
        self.num_updates = 0
        self._decays = {name_average(decay): decay for decay in config.decays}
        self._gammas = {name_length(length): compute_gamma(length) for length in config.lengths}
        self.clock = PowerClock(joined=dict.fromkeys(self._gammas, 0))
        self._beside = HostUpdates(device) if config.on_host else None
        places = ["cpu" if config.on_host else master.device for master in masters]
        copied = list(zip(masters, places, strict=True))
        self._averages = {
            name: [flatten(master).to(place, copy=True) for master, place in copied]
            for name in (*self._decays, *self._gammas)
        }

    @property
    def length_names(self) -> list[str]:
        """Names of the power-function averages."""
        return list(self._gammas)

    @property
    def averages(self) -> dict[str, list[torch.Tensor]]:
        """Flat tensors of each average by its name, after all updates so far."""
        if self._beside is not None:
            self._beside.finish()
        return self._averages

    def update(self, masters: Sequence[torch.Tensor]) -> None:
        """Move every average towards the weights after they were updated.

        On the host this begins here, when the last update has ended, and runs beside the caller.
        """
        self.num_updates += 1
        self.clock.updates += 1
        decays = {name: compute_decay(self.num_updates, decay, self.warmup) for name, decay in self._decays.items()}
        decays |= {name: compute_power_decay(self.clock.updates, gamma) for name, gamma in self._gammas.items()}
        if self._beside is None:
            self._move(masters, decays)
        else:
            # The masters' present memory: a parameter may point elsewhere in a pass.
            self._beside.start([master.detach() for master in masters], self._move, decays)

    def finish_reading(self) -> None:
        """Wait until an update beside the caller has read the masters, which may change then."""
        if self._beside is not None:
            self._beside.finish_reading()

    @torch.no_grad()
    def _move(self, masters: Sequence[torch.Tensor], decays: Mapping[str, float]) -> None:
        for part in divide_values(masters):
            values = [flatten(master) for master in masters[part]]
            for key, averages in self._averages.items():
                get_ema_multi_avg_fn(decays[key])(averages[part], values, 0)


class HostUpdates:
    """Updates of averages on a thread of the host: first a copy of the masters, then the averages.

    Args:
        device: of the masters.
    """

    def __init__(self, device: torch.device):
        self._memory = HostMemory()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # On a CPU the passes use the cores.
        begin = partial(_begin_thread, device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "averages", begin)
        self._running: Future[None] | None = None
        self._has_read = threading.Event()
        self._has_read.set()

    def start(self, masters: Sequence[torch.Tensor], move: Move, decays: Mapping[str, float]) -> None:
        """Start an update after the last one has ended."""
        self.finish()
        self._has_read.clear()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._running = self._thread.submit(self._run, masters, move, decays)

    def finish_reading(self) -> None:
        """Wait until the masters are copied. Raises what the copy has raised."""
        self._has_read.wait()
        if self._running is not None and self._running.done():
            self._running.result()

    def finish(self) -> None:
        """Wait for the update that runs, if any. Raises what it has raised."""
        if self._running is not None:
            self._running.result()

    def _run(self, masters: Sequence[torch.Tensor], move: Move, decays: Mapping[str, float]) -> None:
        try:
            memory = self._memory.rewind()
            with torch.cuda.stream(self._stream):
                copies = [memory.copy(master) for master in masters]
        finally:
            self._has_read.set()
        move(copies, decays)


def _begin_thread(device: torch.device) -> None:
    # PyTorch's choice of a device holds for a single thread.
    torch.cuda.set_device(device)
    use_threads(choose_num_threads())


def divide_values(tensors: Sequence[torch.Tensor]) -> Iterator[slice]:
    """Yield slices of a list: each has at most `GROUP_VALUES` values, or one tensor."""
    start = total = 0
    for number, tensor in enumerate(tensors):
        if number > start and total + tensor.numel() > GROUP_VALUES:
            yield slice(start, number)
            start, total = number, 0
        total += tensor.numel()
    yield slice(start, len(tensors))


def name_average(decay: float) -> str:
    """Return the name of an exponential average, such as `"0.999"`."""
    return f"{decay:g}"


def name_length(length: float) -> str:
    """Return the name of a power-function average, such as `"length-0.05"`."""
    return f"length-{length:g}"


def compute_decay(num_updates: int, decay: float, warmup: bool) -> float:
    """Return the decay of an average at its update number `num_updates` (from 1)."""
    return min(decay, (1 + num_updates) / (10 + num_updates)) if warmup else decay


def flatten(master: torch.Tensor) -> torch.Tensor:
    """Return [N] fp32, in the order of the tensor's elements whatever its strides; shares memory where it can."""
    return master.detach().float().reshape(-1)
