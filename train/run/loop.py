"""The training loop and its step."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch

from sdxl_trainer.cache.encode.latent_encoder import HostCopy
from sdxl_trainer.configs.problems import FailedError
from sdxl_trainer.data.formats.latents import VAE_FACTOR
from sdxl_trainer.data.loading.device_copy import copy_to_device
from sdxl_trainer.data.loading.micro_batch import MicroBatch
from sdxl_trainer.data.order.plan import Plan, Position
from sdxl_trainer.launch.activity import ACTIVITY
from sdxl_trainer.launch.distributed import broadcast_object, reduce_sum
from sdxl_trainer.launch.folder_lock import renew_locks
from sdxl_trainer.launch.logger import warn_once
from sdxl_trainer.launch.signals import BrokenOff
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.estimates.measured_memory import StepMemoryLogger
from sdxl_trainer.train.estimates.slow_ranks import RankTimes, read_rank_times
from sdxl_trainer.train.objective.loss_feedback import StepLosses
from sdxl_trainer.train.objective.objective import SampleKeys
from sdxl_trainer.train.optim.schedules import compute_lr
from sdxl_trainer.train.run.generated_images import has_images, write_generated_images
from sdxl_trainer.train.run.interruption import SAMPLE_FILE
from sdxl_trainer.train.run.non_finite import (
    MicroStep,
    NonFiniteSample,
    find_non_finite_samples,
    handle_skipped_update,
    propagate_non_finite,
)
from sdxl_trainer.train.run.run import Run
from sdxl_trainer.train.run.validation import has_errors, validate


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Results of one optimizer step, over all ranks unless a field names this rank."""

    loss: float
    updated: bool  # False if the loss or the gradient was not finite
    data_wait_seconds: float  # of this rank
    num_bad: int
    stop: bool  # some rank was asked to stop
    save: bool  # some rank was asked to save
    sample: bool  # rank 0 was asked to generate images
    non_finite_samples: list[NonFiniteSample]  # of this rank; empty if the weights were updated
    latent_area: int  # h x w of the global batch's latents
    rank_times: list[RankTimes]  # of all ranks, ordered by rank; empty in steps without a log line, and for one rank


def fit(run: Run, batches: Iterator[MicroBatch]) -> None:
    """Train to the last step of the run; validate, generate images, save checkpoints and log on the way.

    Raises:
        Interrupted: a rank was asked to stop; the state is saved.
        NonFiniteError: the loss or the gradient was not finite in more steps than allowed; the state is saved.
        FailedError: more samples are bad than `data.max_bad_fraction` allows; the state is saved. Or another job has
            taken the run folder, which was deleted.
    """
    config, state, memory = run.config, run.state, StepMemoryLogger(run.ranks.device)
    # A job that is asked to stop does so before the validation and the images of its last step.
    validate_and_sample(run, state.step == run.num_steps, only_missing=state.step > 0)
    store_averages(run)
    while state.step < run.num_steps:
        started, epoch = time.monotonic(), state.epoch
        lr = compute_lr(state.step, config.optim, run.num_steps)
        result = train_step(run, batches, lr)
        if not result.updated:
            handle_skipped_update(run, result.loss, result.non_finite_samples)
        record_step(run, result)
        renew_locks()
        ACTIVITY.finish_step(state.step)
        log_step(run, result, lr, time.monotonic() - started)
        require_good_samples(run, result.num_bad)
        memory.note_step()
        if run.engine.model.compilation is not None:
            run.engine.model.compilation.log_progress()
        is_last = state.step == run.num_steps
        if is_last or result.stop or result.save or is_save_due(run, epoch):
            run.requests.restart_save_timer()
            if run.metrics is not None:
                run.metrics.sync()
            with run.progress.activity("copying the state for a checkpoint"):
                run.checkpoints.save(run.engine, state)
            update_report(run)
        if result.stop and not is_last:
            stop(run)
        store_averages(run)
        validate_and_sample(run, is_last, result.sample)


def stop(run: Run) -> None:
    """Save the state, unless that is done, and end the job. All ranks call it together, and not within a step.

    Raises:
        Interrupted: always.
    """
    if run.state.step:
        run.checkpoints.save_whole(run.engine, run.state)
    run.requests.interrupt()


def store_averages(run: Run) -> None:
    """Write the snapshots of averages that are due after this step, unless they are there.

    Raises:
        Interrupted: a rank was asked to stop; the state is saved, and the next start writes the snapshots.
    """
    step, is_last = run.state.step, run.state.step == run.num_steps
    if not run.snapshots.is_due(step, is_last):
        return
    break_off_if_stopped = partial(run.requests.break_off_if_stopped, in_lockstep=True)
    try:
        with run.progress.activity("storing averages"):
            run.snapshots.write_due(run.engine, step, is_last, break_off_if_stopped)
    except BrokenOff:
        stop(run)


def train_step(run: Run, batches: Iterator[MicroBatch], lr: float) -> StepResult:
    """Accumulate the gradients of a global batch, and update the weights and their moving averages.

    If the loss of one sample on any rank is not finite, the gradient is not finite, and the engine makes no update.
    """
    run.engine.set_lr(lr)
    accumulation_steps = run.batch_sizes.accumulation_steps
    loss_sum = torch.zeros((), device=run.ranks.device)
    wait_seconds, updated, micro_steps, shared = 0.0, False, [], None
    for number in range(1, accumulation_steps + 1):
        asked = time.monotonic()
        ACTIVITY.note("waiting for data")
        batch = next(batches)
        wait_seconds += time.monotonic() - asked
        ACTIVITY.note("computing gradients")
        with run.rank_timer.measure_compute():
            micro_step = compute_losses(run, batch)
        loss = micro_step.losses.mean()
        run.engine.backward(propagate_non_finite(loss))
        loss_sum += loss.detach()
        micro_steps.append(micro_step.detach())
        if number == accumulation_steps:
            shared = share_sums(run, loss_sum, micro_steps, wait_seconds)
        ACTIVITY.note("updating the weights")
        updated = run.engine.step()
    assert shared is not None, "a step has a micro step"
    log_skipped_samples(run, micro_steps)
    total_loss, num_bad, num_stop, num_save, num_sample, *time_sums = shared.read_notes()
    mean_loss = total_loss / (accumulation_steps * run.ranks.world_size)
    if run.objective.feedback is not None:
        mean_loss = shared.read_losses().mean
    return StepResult(
        loss=mean_loss,
        updated=updated,
        data_wait_seconds=wait_seconds,
        num_bad=int(num_bad),
        stop=num_stop > 0,
        save=num_save > 0,
        sample=num_sample > 0,
        non_finite_samples=[] if updated else find_non_finite_samples(run.index, micro_steps, mean_loss),
        latent_area=micro_steps[-1].batch.latents.shape[2:].numel(),
        rank_times=read_rank_times(time_sums),
    )


class SharedSums:
    """Sums over all ranks, on their way to the host.

    Args:
        num_notes: sums of the loss and the notes. With loss feedback, the losses of the global batch follow them.
    """

    def __init__(self, sums: torch.Tensor, num_notes: int):
        self._copy, self._num_notes = HostCopy([reduce_sum(sums)]), num_notes

    @cached_property
    def _sums(self) -> np.ndarray:
        return self._copy.wait()[0]

    def read_notes(self) -> list[float]:
        """Wait for the sums, and return those of the loss and the notes."""
        return self._sums[: self._num_notes].tolist()

    def read_losses(self) -> StepLosses:
        """Wait for the sums, and return the losses of the global batch."""
        return StepLosses(*self._sums[self._num_notes :].reshape(len(StepLosses._fields), -1))


def share_sums(run: Run, loss_sum: torch.Tensor, micro_steps: list[MicroStep], wait_seconds: float) -> SharedSums:
    """Start to add up the loss and the notes of this rank over all ranks: bad samples, requests, own times.

    With loss feedback, the loss of each sample of the global batch too. Before the update, in which the host waits for
    the norm of the gradients. The sums are there by then, so that reading them does not make the host wait for the
    update itself.
    """
    ACTIVITY.note("adding up the losses")
    stop, save, sample = run.requests.collect()
    own_times = run.rank_timer.finish_step(wait_seconds, _is_due(run.state.step + 1, run.config.log.every_steps))
    num_bad = sum(len(micro_step.batch.bad) for micro_step in micro_steps)
    notes = torch.tensor(
        (num_bad, stop, save or run.checkpoints.take_repeat(), sample, *own_times), dtype=torch.float32
    )
    feedback, device = run.objective.feedback, loss_sum.device
    if feedback is None:
        return SharedSums(torch.cat((loss_sum[None], copy_to_device(notes, device))), 1 + len(notes))
    known, losses = feedback.collect([micro_step.list_losses() for micro_step in micro_steps], device)
    sums = torch.cat((loss_sum[None], copy_to_device(torch.cat((notes, known)), device), losses))
    shared = SharedSums(sums, 1 + len(notes))
    feedback.expect(shared.read_losses)
    return shared


def compute_losses(run: Run, batch: MicroBatch) -> MicroStep:
    """Compute each sample's weighted loss: noise and timestep → x_t → prediction → target → loss → weight."""
    objective, device, dtype = run.objective, run.ranks.device, run.engine.dtype
    keys = SampleKeys(run.config.run.seed, run.state.step, batch.positions.tolist())
    x0 = objective.normalize_latents(batch.latents)  # [B, C, h, w]
    num_pixels = x0.shape[2:].numel() * VAE_FACTOR**2
    noise, (timesteps, levels) = objective.sample_noise(x0, keys), objective.sample_timesteps(keys, num_pixels)
    x_t = objective.add_noise(x0, noise, timesteps, keys)
    text = run.conditioner.build_inputs(batch, device)
    text_keep = objective.sample_text_keep(keys)  # [B]
    prediction = run.engine(x_t.to(dtype), timesteps, text, copy_to_device(batch.time_ids, device), text_keep)
    target = objective.compute_target(x0, noise, timesteps)
    negatives = objective.choose_negatives(target, keys, batch.weights)
    losses = objective.compute_losses(prediction, target, timesteps, batch.masks, negatives)  # [B]
    weights = batch.weights if levels is None else levels.weigh(batch.weights)
    return MicroStep(batch, losses * copy_to_device(weights, device), losses, levels)


def record_step(run: Run, result: StepResult) -> None:
    """Count a finished step in the state of the run, and learn from its losses."""
    if run.objective.feedback is not None:
        run.state.feedback = run.objective.feedback.finish_step()
    advance_position(run.state, run.plan)
    run.state.num_bad += result.num_bad
    if result.updated:
        run.state.num_until_update = run.state.step


def require_good_samples(run: Run, num_bad: int) -> None:
    """Count the bad samples of a finished step, and end the run if there are too many. All ranks call this together.

    Raises:
        FailedError: more samples are bad than `data.max_bad_fraction` allows; the state is saved.
    """
    state = run.state
    excess = run.bad_samples.find_excess(run.plan.global_batch_size, num_bad)
    if excess:
        run.checkpoints.save_whole(run.engine, state)
        raise FailedError(
            f"{excess.rule}; {run.folder / 'logs'}/bad_samples*.jsonl lists them. "
            f"The state of step {state.step} is saved\n"
            f"cure: {excess.cure}, or raise data.max_bad_fraction; the same command continues"
        )


def advance_position(state: TrainState, plan: Plan) -> None:
    """Move a state to the next step and global batch."""
    state.epoch, state.index = plan.next_position(Position(state.epoch, state.index))
    state.epoch_batches = plan.num_batches(state.epoch)
    state.step += 1
    state.samples_seen += plan.global_batch_size


def copy_state_at(run: Run, step: int) -> TrainState:
    """Return a copy of the state at a step that the engine has completed, whether or not the loop has counted it."""
    state = replace(run.state)
    if state.step < step and run.objective.feedback is not None:
        state.feedback = run.objective.feedback.read_next_state()
    while state.step < step:
        advance_position(state, run.plan)
    return state


def log_step(run: Run, result: StepResult, lr: float, seconds: float) -> None:
    """Write a step's metrics, update the display, and log a line every `log.every_steps`. Rank 0 only."""
    if run.metrics is None:
        return
    step, norm = run.state.step, run.engine.grad_norm()
    values = {
        "loss": result.loss,
        "lr": lr,
        **({} if norm is None else {"grad_norm": norm}),
        "epoch": run.state.epoch,
        "samples_per_second": run.plan.global_batch_size / seconds,
        "step_seconds": seconds,
        "data_wait_share": result.data_wait_seconds / seconds,
        "num_bad": run.state.num_bad,
        "num_non_finite": run.state.num_non_finite,
    }
    if result.rank_times:
        # Averages of the steps before this one.
        step_seconds = run.progress.averages.step_seconds
        values |= run.slow_ranks.add_window(result.rank_times, step_seconds, run.config.log.every_steps)
        run.progress.slow_ranks = run.slow_ranks.describe()
    run.metrics.write(step, values)
    run.progress.update(values, result.latent_area)
    if _is_due(step, run.config.log.every_steps) or step == run.num_steps:
        run.progress.log_line()


def log_skipped_samples(run: Run, micro_steps: list[MicroStep]) -> None:
    """Log the samples of a step that could not be read, and list them in this rank's bad_samples file."""
    skipped = [item for micro_step in micro_steps for item in micro_step.batch.bad]
    run.bad_samples.skip(run.state.step, skipped)


def validate_and_sample(run: Run, is_last: bool, is_sample_requested: bool = False, only_missing: bool = False) -> None:
    """Validate and generate images, each if the settings ask for it after this step, or images if the user does.

    Args:
        only_missing: leave out what an earlier job has stored for this step.

    Raises:
        Interrupted: a rank was asked to stop; the state is saved.
    """
    stored = broadcast_object((has_errors(run), has_images(run))) if only_missing else (False, False)
    try:
        _validate_and_sample(run, is_last, is_sample_requested, *stored)
    except BrokenOff:
        stop(run)


def _validate_and_sample(
    run: Run, is_last: bool, is_sample_requested: bool, is_validated: bool, is_drawn: bool
) -> None:
    step, validation, sample = run.state.step, run.config.validation, run.config.sample
    is_due = validation.at_start if step == 0 else is_last or _is_due(step, validation.every_steps)
    if run.validation and is_due and not is_validated:
        with run.progress.activity("validating"):
            validate(run)
        update_report(run)
    if is_sample_requested and not sample.has_prompts:
        warn_once("the file {} has no effect, because there are no prompts; set sample.prompts", SAMPLE_FILE)
    is_due = is_sample_requested or (sample.at_start if step == 0 else is_last or _is_due(step, sample.every_steps))
    if sample.has_prompts and is_due and not is_drawn:
        with run.progress.activity("generating images"):
            write_generated_images(run)
        update_report(run)


def update_report(run: Run) -> None:
    """Start writing the report page in the background, unless it is recent."""
    if run.report is not None:
        run.report.update()


def is_save_due(run: Run, epoch: int) -> bool:
    """Return whether `checkpoint.every_steps` or `every_epochs` asks for a checkpoint now.

    Args:
        epoch: in which the finished step began.
    """
    settings, state = run.config.checkpoint, run.state
    every_epochs = settings.every_epochs
    epochs_due = every_epochs > 0 and state.epoch // every_epochs > epoch // every_epochs
    return epochs_due or _is_due(state.step, settings.every_steps)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
