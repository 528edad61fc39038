"""The loss on samples that are not trained on: the same number for the same weights, on any number of ranks.

Each sample meets the same noise at the same timesteps every time, because all of it is keyed to the sample's own key.
Micro batches are the same whatever the number of ranks, who take turns with them, and the sum is taken in their order.
"""

import numpy as np
import torch
from loguru import logger

from sdxl_trainer.data.loading.dataset import MicroBatch, MicroSpec
from sdxl_trainer.data.order.keyed_random import RandomStream, derive_seed
from sdxl_trainer.launch.distributed import gather_objects
from sdxl_trainer.train.objective.diffusion import NUM_TIMESTEPS
from sdxl_trainer.train.objective.objective import Objective, SampleKeys
from sdxl_trainer.train.objective.timesteps import draw_uniform
from sdxl_trainer.train.run.run import Run
from sdxl_trainer.train.run.training_data import ValidationSet

# Of one sample at one timestep: (timestep, bucket, loss).
Loss = tuple[float, tuple[int, int], float]


def validate(run: Run) -> None:
    """Compute the validation losses of the weights and of each moving average of them, and write them down.

    All ranks call it together.
    """
    assert run.validation is not None, "there is something to validate on"
    values, averages = {}, run.engine.weights.average_names
    run.engine.model.eval()
    for average in (None, *averages):
        with run.engine.weights.use_average(average), torch.no_grad():
            losses = compute_validation_losses(run, run.validation)
        suffix = f"_ema_{average}" if average else ""
        means = summarize_losses(losses, run.validation.config.num_bins)
        values |= {f"validation/{name}{suffix}": value for name, value in means.items()}
    run.engine.model.train()
    if run.metrics is not None:
        run.metrics.write(run.state.step, values)
        shown = [f"{values['validation/loss']:.5f}"]
        shown += [f"{values[f'validation/loss_ema_{name}']:.5f} with the average of {name}" for name in averages]
        logger.info("step {}: validation loss {}", run.state.step, ", ".join(shown))


def compute_validation_losses(run: Run, held_out: ValidationSet) -> list[Loss]:
    """Every sample's loss at each of its timesteps, on every rank in the same order."""
    batches, ranks = held_out.batches, run.ranks
    rounds = -(-len(batches) // ranks.world_size)
    # Under ZeRO-3 a forward pass is a collective, so in the last round some batches are computed twice.
    numbers = [(ranks.rank + turn * ranks.world_size) % len(batches) for turn in range(rounds)]
    found = {}
    for number, batch in zip(numbers, held_out.read([batches[number] for number in numbers]), strict=True):
        for _, reason in batch.bad:
            logger.warning("bad sample left out of the validation: {}", reason)
        found[number] = [
            loss
            for turn in range(held_out.config.timesteps_per_sample)
            for loss in compute_batch_losses(run, held_out, batches[number], batch, turn)
        ]
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
    keys = SampleKeys(derive_seed(held_out.config.seed, RandomStream.VALIDATION), turn, ids)
    x0 = objective.normalize_latents(batch.latents)  # [B, 4, h, w]
    noise = objective.sample_noise(x0, keys)
    timesteps = spread_timesteps(objective, keys, held_out.config.timesteps_per_sample)
    x_t = objective.add_noise(x0, noise, timesteps, keys)
    text = run.conditioner.build_inputs(batch, device)
    prediction = run.engine.model(x_t.to(dtype), timesteps, text, batch.time_ids.to(device))
    target = objective.compute_target(x0, noise, timesteps)
    losses = objective.compute_losses(prediction, target, timesteps, batch.masks)  # [B]
    bad, rows = {key for key, _ in batch.bad}, held_out.dataset.index.arrow_column("key")
    triples = zip(timesteps.tolist(), [spec.bucket] * len(ids), losses.tolist(), strict=True)
    return [triple for row, triple in zip(spec.rows.tolist(), triples, strict=True) if rows[row].as_py() not in bad]


def spread_timesteps(objective: Objective, keys: SampleKeys, num_turns: int) -> torch.Tensor:
    """[B] timesteps of a turn: part number `turn` of the trained range, each sample's at a place of its own in it."""
    own = SampleKeys(keys.seed, 0, keys.positions)  # the same in every turn
    return objective.draws_to_timesteps((keys.step + draw_uniform(own.make_seeds(RandomStream.TIMESTEP))) / num_turns)


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
