"""The validation: loss and errors on held-out samples, equal for equal weights on any number of ranks.

A sample gets the same noise at the same timesteps in every validation, because its random numbers are keyed to its own
key. Micro batches do not depend on the number of ranks: the ranks share them, and their losses are summed in order.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from loguru import logger

from sdxl_trainer.configs.validation import ValidationConfig
from sdxl_trainer.data.counted_warnings import CountedWarnings
from sdxl_trainer.data.loading.device_copy import copy_to_device
from sdxl_trainer.data.loading.micro_batch import MicroBatch
from sdxl_trainer.data.order.keyed_random import RandomStream, derive_seed
from sdxl_trainer.launch.activity import ACTIVITY
from sdxl_trainer.launch.distributed import Ranks, gather_objects
from sdxl_trainer.launch.signals import BrokenOff
from sdxl_trainer.train.held_out.best_step import find_lowest
from sdxl_trainer.train.held_out.history import ErrorHistory, read_histories
from sdxl_trainer.train.held_out.over_fitting import choose_stale_step, find_over_fitting
from sdxl_trainer.train.held_out.sample_errors import (
    WEIGHTS,
    Facts,
    SampleError,
    get_file,
    list_files,
    write_sample_errors,
)
from sdxl_trainer.train.networks.conditioning import TextConditioner
from sdxl_trainer.train.objective.diffusion import NUM_TIMESTEPS
from sdxl_trainer.train.objective.objective import Objective, SampleKeys
from sdxl_trainer.train.objective.timesteps import draw_uniform
from sdxl_trainer.train.report.metrics import CHANGES_FILE, read_changes, read_course
from sdxl_trainer.train.run.run import Run
from sdxl_trainer.train.run.training_data import ValidationSet


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A model, and what its errors are computed with."""

    model: Any  # TrainedNetworks, or DeepSpeed's engine around them
    dtype: torch.dtype  # in which the model computes
    conditioner: TextConditioner
    objective: Objective
    ranks: Ranks
    in_lockstep: bool  # every forward pass needs all ranks, as under ZeRO-3
    break_off_if_stopped: Callable[[bool], None]  # takes `in_lockstep`; raises BrokenOff


class BatchErrors(NamedTuple):
    """Errors of a micro batch at one timestep of each sample, still on the device."""

    number: int  # of the micro batch
    turn: int
    places: list[int]  # of the samples that could be read
    values: torch.Tensor  # [len(VALUES), B] float32


# Fields of SampleError that are computed on the device.
VALUES = ("timestep", "log_snr", "x0_power", "loss", "x0_error", "v_error")


def validate(run: Run) -> None:
    """Compute and log the validation losses of the weights and of each moving average.

    All ranks call it together.

    Raises:
        BrokenOff: a rank was asked to stop (raised on all ranks).
    """
    assert run.validation is not None, "nothing is held out to validate on"
    values, averages, errors = {}, run.engine.weights.average_names, {}
    run.engine.model.eval()
    try:
        for average in (None, *averages):
            with run.engine.weights.use_average(average), torch.no_grad():
                errors[average or WEIGHTS] = found = compute_validation_errors(get_measured(run), run.validation)
            suffix = f"_ema_{average}" if average else ""
            means = average_losses(found, run.validation.config.num_bins)
            values |= {f"validation/{name}{suffix}": value for name, value in means.items()}
    finally:
        run.engine.model.train()
    if run.ranks.is_main:
        store_errors(run, run.validation.config, errors)
    if run.metrics is not None:
        shown = [f"{values['validation/loss']:.5f}"]
        shown += [f"{values[f'validation/loss_ema_{name}']:.5f} with EMA {name}" for name in averages]
        logger.info("step {}: validation loss {}", run.state.step, ", ".join(shown))
        run.metrics.write(run.state.step, values | judge_course(run))


def get_measured(run: Run) -> Measured:
    """Return the live model of a run, to be measured."""
    return Measured(
        model=run.engine.model,
        dtype=run.engine.dtype,
        conditioner=run.conditioner,
        objective=run.objective,
        ranks=run.ranks,
        in_lockstep=run.engine.zero_stage == 3,
        break_off_if_stopped=run.requests.break_off_if_stopped,
    )


def has_errors(run: Run) -> bool:
    """Return whether the errors of the current step's validation are stored."""
    return get_file(run.folder, run.state.step).exists()


def store_errors(run: Run, config: ValidationConfig, errors: dict[str, list[SampleError]]) -> None:
    """Write the errors of each sample. A file that cannot be written, as on a full disk, is a warning."""
    facts = Facts(
        step=run.state.step,
        samples_seen=run.state.samples_seen,
        seed=config.seed,
        timesteps_per_sample=config.timesteps_per_sample,
        prediction=run.config.objective.prediction,
    )
    try:
        write_sample_errors(run.folder, errors, facts)
        run.lost_validations.end()
    except OSError as error:
        run.lost_validations.add(str(error))


def judge_course(run: Run) -> dict[str, float]:
    """Log the x0 error and its lowest step, and return metrics. Over-fitting is named once for each best step.

    `validation/over_fitting` is the best step of the weights; the metric is missing while there is no over-fitting.
    """
    values, over_fitting = {}, None
    for average, history in read_histories(list_files(run.folder)).by_average.items():
        best = find_lowest(history.means)
        if best is None or history.steps[-1] != run.state.step:  # the file could not be written
            continue
        suffix = "" if average == WEIGHTS else f"_ema_{average}"
        values[f"validation/x0_error{suffix}"] = float(history.means[-1])
        if average == WEIGHTS:
            shown = (history.means[-1], history.means[best], history.steps[best])
            logger.info("step {}: x0 error {:.5f}, lowest {:.5f} at step {}", run.state.step, *shown)
            over_fitting = watch_over_fitting(run, history)
    run.progress.over_fitting = "" if over_fitting is None else f"since step {over_fitting}"
    return values if over_fitting is None else {**values, "validation/over_fitting": over_fitting}


def watch_over_fitting(run: Run, history: ErrorHistory) -> int | None:
    """Return the best step of the weights if they over-fit since then, and warn unless an earlier validation has."""
    logs, best_step = run.folder / "logs", choose_stale_step(history)
    if best_step is None:
        return None
    # Losses before a change of settings or data may be on another scale.
    first_step = max([best_step, *read_changes(logs / CHANGES_FILE)])
    course = read_course(logs / "metrics.jsonl", first_step, run.state.step)
    if best_step in course.over_fitting:
        return best_step
    excess = find_over_fitting(history, course.losses)
    if excess is None:
        return None
    logger.warning(
        "over-fitting: the x0 error of the validation has risen by {:.1f} % since step {} (95 % interval {:.1f} % to "
        "{:.1f} %), while the training loss falls; take the model of step {} (docs/WHEN_TO_STOP.md)",
        *(100 * excess.mean, best_step, 100 * excess.low, 100 * excess.high, best_step),
    )
    return best_step


def compute_validation_errors(measured: Measured, held_out: ValidationSet) -> list[SampleError]:
    """Return every sample's errors at each of its timesteps, in the same order on every rank.

    Raises:
        BrokenOff: a rank was asked to stop (raised on all ranks).
    """
    batches, ranks = held_out.batches, measured.ranks
    rounds = -(-len(batches) // ranks.world_size)
    # Under ZeRO-3 every forward pass needs all ranks, so in the last round some batches are computed twice.
    numbers = [(ranks.rank + turn * ranks.world_size) % len(batches) for turn in range(rounds)]
    computed: list[BatchErrors] = []
    is_broken_off = False
    skipped = CountedWarnings("bad sample skipped in validation", "the log file", ranks.world_size)
    try:
        read = held_out.read([batches[number] for number in numbers])
        for place, (number, batch) in enumerate(zip(numbers, read, strict=True), 1):
            for _, reason in batch.bad:
                skipped.add(reason)
            for turn in range(held_out.config.timesteps_per_sample):
                measured.break_off_if_stopped(measured.in_lockstep)
                computed.append(compute_batch_errors(measured, held_out, number, batch, turn))
            ACTIVITY.note_piece(min(place * ranks.world_size, len(batches)), len(batches))
    except BrokenOff:
        is_broken_off = True
    skipped.close()
    parts = gather_objects(None if is_broken_off else move_to_host(held_out, computed))
    if None in parts:
        raise BrokenOff
    of_all_ranks = {number: errors for part in parts for number, errors in part.items()}
    return [error for number in sorted(of_all_ranks) for error in of_all_ranks[number]]


def compute_batch_errors(
    measured: Measured, held_out: ValidationSet, number: int, batch: MicroBatch, turn: int
) -> BatchErrors:
    """Return the errors of a micro batch at one timestep of each sample. No weights of samples count.

    The noise is Gaussian whatever the objective's is, so that runs are measured on the same inputs.

    Args:
        number: of the micro batch.
        turn: number of the timestep, from 0 to `validation.timesteps_per_sample` - 1.
    """
    objective, device, spec = measured.objective, measured.ranks.device, held_out.batches[number]
    keys = SampleKeys(
        derive_seed(held_out.config.seed, RandomStream.VALIDATION), turn, held_out.ids[spec.rows].tolist()
    )
    x0 = objective.normalize_latents(batch.latents)  # [B, C, h, w]
    noise = objective.sample_plain_noise(x0, keys)
    timesteps = spread_timesteps(objective, keys, held_out.config.timesteps_per_sample)
    x_t = objective.add_plain_noise(x0, noise, timesteps)
    text = measured.conditioner.build_inputs(batch, device)
    prediction = measured.model(x_t.to(measured.dtype), timesteps, text, copy_to_device(batch.time_ids, device))
    target = objective.compute_target(x0, noise, timesteps)
    common = objective.compute_common_errors(prediction, target, timesteps)
    values = {
        "timestep": timesteps.float(),
        "log_snr": objective.compute_log_snr(timesteps),
        "x0_power": x0.square().flatten(1).mean(1),
        "loss": objective.compute_losses(prediction, target, timesteps, batch.masks),
        "x0_error": common.x0,
        "v_error": common.v,
    }
    bad, row_keys = {key for key, _ in batch.bad}, held_out.dataset.index.arrow_column("key")
    places = [place for place, row in enumerate(spec.rows.tolist()) if row_keys[row].as_py() not in bad]
    return BatchErrors(number, turn, places, torch.stack([values[name] for name in VALUES]))


def move_to_host(held_out: ValidationSet, computed: Sequence[BatchErrors]) -> dict[int, list[SampleError]]:
    """Move all errors of a rank to the host at once, and return them by the number of their micro batch."""
    index, found = held_out.dataset.index, {part.number: [] for part in computed}
    keys, sources = index.arrow_column("key"), index.column("source")
    if not computed:
        return found
    moved = torch.cat([part.values for part in computed], 1).tolist()  # the only wait for the device
    start = 0
    for number, turn, places, values in computed:
        spec = held_out.batches[number]
        for place in places:
            row = int(spec.rows[place])
            found[number].append(
                SampleError(
                    key=keys[row].as_py(),
                    bucket=spec.bucket,
                    source=int(sources[row]),
                    turn=turn,
                    **{name: column[start + place] for name, column in zip(VALUES, moved, strict=True)},
                )
            )
        start += values.shape[1]
    return found


def spread_timesteps(objective: Objective, keys: SampleKeys, num_turns: int) -> torch.Tensor:
    """Return [B] timesteps in part `keys.step` of the trained range, which is cut into `num_turns` parts.

    Each sample has its own place within a part, the same in every part.
    """
    first_turn = SampleKeys(keys.seed, 0, keys.positions)
    draws = draw_uniform(first_turn.derive_seeds(RandomStream.TIMESTEP))
    return objective.convert_to_timesteps((keys.step + draws) / num_turns)


def average_losses(errors: Iterable[SampleError], num_bins: int) -> dict[str, float]:
    """Return the mean loss of all samples, of each bin of timesteps and of each bucket, by metric name.

    Bins and buckets without samples are missing from the result.
    """
    values: dict[str, list[float]] = {"loss": []}
    for error in errors:
        bin_number = min(int(error.timestep * num_bins / NUM_TIMESTEPS), num_bins - 1)
        first, end = (NUM_TIMESTEPS * edge // num_bins for edge in (bin_number, bin_number + 1))
        for name in ("loss", f"loss_t{first:03d}-{end - 1:03d}", f"loss_{error.bucket}"):
            values.setdefault(name, []).append(error.loss)
    return {name: float(np.mean(values[name])) for name in sorted(values) if values[name]}
