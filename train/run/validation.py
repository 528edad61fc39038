"""The validation loss: the loss on held-out samples, equal for equal weights on any number of ranks.

A sample gets the same noise at the same timesteps in every validation, because its random numbers are keyed to its own
key. Micro batches do not depend on the number of ranks: the ranks share them, and their losses are summed in order.
"""

from typing import NamedTuple

import numpy as np
import torch
from loguru import logger

from sdxl_trainer.data.counted_warnings import CountedWarnings
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.data.loading.micro_batch import MicroBatch, MicroSpec
from sdxl_trainer.data.order.keyed_random import RandomStream, derive_seed
from sdxl_trainer.launch.activity import ACTIVITY
from sdxl_trainer.launch.distributed import gather_objects
from sdxl_trainer.launch.signals import BrokenOff
from sdxl_trainer.train.objective.device_copy import copy_to_device
from sdxl_trainer.train.objective.diffusion import NUM_TIMESTEPS
from sdxl_trainer.train.objective.objective import Objective, SampleKeys
from sdxl_trainer.train.objective.timesteps import draw_uniform
from sdxl_trainer.train.run.run import Run
from sdxl_trainer.train.run.training_data import ValidationSet


class SampleLoss(NamedTuple):
    """The loss of one sample at one timestep."""

    timestep: float
    bucket: Size
    loss: float


def validate(run: Run) -> None:
    """Compute and log the validation losses of the weights and of each moving average.

    All ranks call it together.

    Raises:
        BrokenOff: a rank was asked to stop (raised on all ranks).
    """
    assert run.validation is not None, "nothing is held out to validate on"
    values, averages = {}, run.engine.weights.average_names
    run.engine.model.eval()
    try:
        for average in (None, *averages):
            with run.engine.weights.use_average(average), torch.no_grad():
                losses = compute_validation_losses(run, run.validation)
            suffix = f"_ema_{average}" if average else ""
            means = average_losses(losses, run.validation.config.num_bins)
            values |= {f"validation/{name}{suffix}": value for name, value in means.items()}
    finally:
        run.engine.model.train()
    if run.metrics is not None:
        run.metrics.write(run.state.step, values)
        shown = [f"{values['validation/loss']:.5f}"]
        shown += [f"{values[f'validation/loss_ema_{name}']:.5f} with EMA {name}" for name in averages]
        logger.info("step {}: validation loss {}", run.state.step, ", ".join(shown))


def compute_validation_losses(run: Run, held_out: ValidationSet) -> list[SampleLoss]:
    """Return every sample's loss at each of its timesteps, in the same order on every rank.

    Raises:
        BrokenOff: a rank was asked to stop (raised on all ranks).
    """
    batches, ranks = held_out.batches, run.ranks
    rounds = -(-len(batches) // ranks.world_size)
    # Under ZeRO-3 every forward pass needs all ranks, so in the last round some batches are computed twice.
    numbers = [(ranks.rank + turn * ranks.world_size) % len(batches) for turn in range(rounds)]
    found: dict[int, list[SampleLoss]] | None = {}
    skipped = CountedWarnings("bad sample skipped in validation", "the log file", ranks.world_size)
    try:
        read = held_out.read([batches[number] for number in numbers])
        for place, (number, batch) in enumerate(zip(numbers, read, strict=True), 1):
            for _, reason in batch.bad:
                skipped.add(reason)
            found[number] = []
            for turn in range(held_out.config.timesteps_per_sample):
                run.requests.break_off_if_stopped(in_lockstep=run.engine.zero_stage == 3)
                found[number] += compute_batch_losses(run, held_out, batches[number], batch, turn)
            ACTIVITY.note_piece(min(place * ranks.world_size, len(batches)), len(batches))
    except BrokenOff:
        found = None
    skipped.close()
    parts = gather_objects(found)
    if None in parts:
        raise BrokenOff
    of_all_ranks = {number: losses for part in parts for number, losses in part.items()}
    return [loss for number in sorted(of_all_ranks) for loss in of_all_ranks[number]]


def compute_batch_losses(
    run: Run, held_out: ValidationSet, spec: MicroSpec, batch: MicroBatch, turn: int
) -> list[SampleLoss]:
    """Return the unweighted loss of each readable sample of a micro batch at one of its timesteps.

    Args:
        turn: number of the timestep, from 0 to `validation.timesteps_per_sample` - 1.
    """
    objective, device, dtype = run.objective, run.ranks.device, run.engine.dtype
    ids = held_out.ids[spec.rows].tolist()
    keys = SampleKeys(derive_seed(held_out.config.seed, RandomStream.VALIDATION), turn, ids)
    x0 = objective.normalize_latents(batch.latents)  # [B, 4, h, w]
    noise = objective.sample_noise(x0, keys)
    timesteps = spread_timesteps(objective, keys, held_out.config.timesteps_per_sample)
    x_t = objective.add_noise(x0, noise, timesteps, keys)
    text = run.conditioner.build_inputs(batch, device)
    prediction = run.engine.model(x_t.to(dtype), timesteps, text, copy_to_device(batch.time_ids, device))
    target = objective.compute_target(x0, noise, timesteps)
    losses = objective.compute_losses(prediction, target, timesteps, batch.masks)  # [B]
    bad, row_keys = {key for key, _ in batch.bad}, held_out.dataset.index.arrow_column("key")
    samples = zip(spec.rows.tolist(), timesteps.tolist(), losses.tolist(), strict=True)
    return [
        SampleLoss(timestep, spec.bucket, loss) for row, timestep, loss in samples if row_keys[row].as_py() not in bad
    ]


def spread_timesteps(objective: Objective, keys: SampleKeys, num_turns: int) -> torch.Tensor:
    """Return [B] timesteps in part `keys.step` of the trained range, which is cut into `num_turns` parts.

    Each sample has its own place within a part, the same in every part.
    """
    first_turn = SampleKeys(keys.seed, 0, keys.positions)
    draws = draw_uniform(first_turn.derive_seeds(RandomStream.TIMESTEP))
    return objective.convert_to_timesteps((keys.step + draws) / num_turns)


def average_losses(losses: list[SampleLoss], num_bins: int) -> dict[str, float]:
    """Return the mean loss of all samples, of each bin of timesteps and of each bucket, by metric name.

    Bins and buckets without samples are missing from the result.
    """
    values: dict[str, list[float]] = {"loss": []}
    for timestep, bucket, loss in losses:
        bin_number = min(int(timestep * num_bins / NUM_TIMESTEPS), num_bins - 1)
        first, end = (NUM_TIMESTEPS * edge // num_bins for edge in (bin_number, bin_number + 1))
        for name in ("loss", f"loss_t{first:03d}-{end - 1:03d}", f"loss_{bucket}"):
            values.setdefault(name, []).append(loss)
    return {name: float(np.mean(values[name])) for name in sorted(values) if values[name]}
