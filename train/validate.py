"""The loss on samples that are not trained on: the same number for the same weights, on any number of ranks.

Each sample meets the same noise at the same timesteps every time, because all of it is keyed to the sample's own key.
Micro batches are the same whatever the number of ranks, who take turns with them, and the sum is taken in their order.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from loguru import logger

from sdxl_trainer.configs.validation import ValidationConfig
from sdxl_trainer.data.dataset import LatentDataset, MicroBatch, MicroSpec
from sdxl_trainer.data.plan import Stream, mix_keys
from sdxl_trainer.data.split import hash_keys, select_share
from sdxl_trainer.launch.distributed import gather_objects
from sdxl_trainer.train.diffusion import NUM_TIMESTEPS
from sdxl_trainer.train.objective import Objective, SampleKeys
from sdxl_trainer.train.run import Run

READ_AHEAD = 4
# Of one sample at one timestep: (timestep, bucket, loss).
Loss = tuple[float, tuple[int, int], float]


@dataclass(frozen=True)
class ValidationSet:
    """What is validated on: `batches` of rows of one bucket each, and what each row's draws are keyed to."""

    dataset: LatentDataset
    batches: list[MicroSpec]
    ids: np.ndarray  # [rows of the index] int64
    config: ValidationConfig


def build_validation_set(
    dataset: LatentDataset, rows: np.ndarray, config: ValidationConfig, batch_size: int
) -> ValidationSet:
    """The first `validation.max_samples` of `rows`, in micro batches of one bucket."""
    index = dataset.index
    ids = (hash_keys(index.strings("key"), config.seed) >> np.uint64(1)).astype(np.int64)
    rows = rows[: config.max_samples]
    widths, heights = (index.column(f"bucket_{side}")[rows] for side in ("width", "height"))
    order = np.lexsort((ids[rows], heights, widths))
    batches = []
    for bucket in sorted(set(zip(widths.tolist(), heights.tolist(), strict=True))):
        mine = rows[order][(widths[order] == bucket[0]) & (heights[order] == bucket[1])]
        for start in range(0, len(mine), batch_size):
            part = mine[start : start + batch_size]
            batches.append(MicroSpec(bucket, part, np.zeros(len(part), np.int64), np.arange(len(part))))
    return ValidationSet(dataset, batches, ids, config)


def select_validation_rows(dataset: LatentDataset, config: ValidationConfig) -> np.ndarray:
    """Rows to validate on, in the order in which they are taken: the held-out share, or all of a set of its own."""
    return select_share(hash_keys(dataset.index.strings("key"), config.seed), config.share or 1 - 2.0**-53)


def validate(run: Run) -> None:
    """Compute the validation losses of the weights as they are, and write them down. All ranks call it together."""
    assert run.validation is not None, "there is something to validate on"
    run.engine.model.eval()
    with torch.no_grad():
        losses = compute_validation_losses(run, run.validation)
    run.engine.model.train()
    values = summarize_losses(losses, run.validation.config.num_bins)
    if run.metrics is not None:
        run.metrics.write(run.state.step, {f"validation/{name}": value for name, value in values.items()})
        logger.info("step {}: validation loss {:.5f} of {} losses", run.state.step, values["loss"], len(losses))


def compute_validation_losses(run: Run, held_out: ValidationSet) -> list[Loss]:
    """Every sample's loss at each of its timesteps, on every rank in the same order."""
    batches, ranks = held_out.batches, run.ranks
    rounds = -(-len(batches) // ranks.world_size)
    # Under ZeRO-3 a forward pass is a collective, so in the last round some batches are computed twice.
    numbers = [(ranks.rank + turn * ranks.world_size) % len(batches) for turn in range(rounds)]
    found = {}
    for number, batch in zip(numbers, _read_ahead(held_out.dataset, (batches[number] for number in numbers)), strict=True):
        found[number] = [loss for turn in range(held_out.config.timesteps_per_sample)
                         for loss in compute_batch_losses(run, held_out, batches[number], batch, turn)]  # fmt: skip
    everyone: dict[int, list[Loss]] = {}
    for part in gather_objects(found):
        everyone |= part
    return [loss for number in sorted(everyone) for loss in everyone[number]]


def compute_batch_losses(
    run: Run, held_out: ValidationSet, spec: MicroSpec, batch: MicroBatch, turn: int
) -> list[Loss]:
    """The loss of each readable sample of a batch at its timestep number `turn`, without weights of samples."""
    objective, device, dtype = run.objective, run.ranks.device, run.engine.dtype
    ids = held_out.ids[spec.rows].tolist()
    keys = SampleKeys(mix_keys(held_out.config.seed, Stream.VALIDATION), turn, ids)
    x0 = objective.normalize_latents(batch.latents)  # [B, 4, h, w]
    noise = objective.sample_noise(x0, keys)
    timesteps = spread_timesteps(objective, keys, held_out.config.timesteps_per_sample)
    x_t = objective.add_noise(x0, noise, timesteps, keys)
    text = run.conditioner.prepare(batch.input_ids.to(device), batch.input_ids_2.to(device))
    prediction = run.engine.model(x_t.to(dtype), timesteps, text, batch.time_ids.to(device))
    target = objective.compute_target(x0, noise, timesteps)
    losses = objective.compute_losses(prediction, target, timesteps, batch.masks)  # [B]
    readable = batch.weights.tolist()
    triples = zip(timesteps.tolist(), [spec.bucket] * len(ids), losses.tolist(), strict=True)
    return [triple for triple, weight in zip(triples, readable, strict=True) if weight > 0]


def spread_timesteps(objective: Objective, keys: SampleKeys, num_turns: int) -> torch.Tensor:
    """[B] timesteps of a turn: part number `turn` of the trained range, each sample's at a place of its own in it."""
    own = SampleKeys(keys.seed, 0, keys.positions)  # the same in every turn
    return objective.place_timesteps((keys.step + objective.draw(own, Stream.TIMESTEP)) / num_turns)


def summarize_losses(losses: list[Loss], num_bins: int) -> dict[str, float]:
    """The mean loss, and that of each part of the timesteps and of each bucket, by name; parts without any are left
    out."""
    values: dict[str, list[float]] = {"loss": []}
    for timestep, (width, height), loss in losses:
        part = min(int(timestep * num_bins / NUM_TIMESTEPS), num_bins - 1)
        first, last = (NUM_TIMESTEPS * edge // num_bins for edge in (part, part + 1))
        for name in ("loss", f"loss_t{first:03d}-{last - 1:03d}", f"loss_{width}x{height}"):
            values.setdefault(name, []).append(loss)
    return {name: float(np.mean(values[name])) for name in sorted(values) if values[name]}


def _read_ahead(dataset: LatentDataset, specs: Iterable[MicroSpec]) -> Iterator[MicroBatch]:
    """Micro batches in order, the next ones being read meanwhile."""
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        waiting = deque()
        for spec in specs:
            waiting.append(pool.submit(dataset.__getitem__, spec))
            if len(waiting) > READ_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
