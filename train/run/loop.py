"""The training loop: fit, and the step that reads like the equation."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import orjson
import torch
from loguru import logger

from sdxl_trainer.data.loading.dataset import MicroBatch
from sdxl_trainer.data.order.plan import Plan, Position
from sdxl_trainer.launch.distributed import reduce_sum
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.estimates.memory import StepMemoryLogger
from sdxl_trainer.train.export.export import export_model, get_model_path
from sdxl_trainer.train.objective.objective import SampleKeys
from sdxl_trainer.train.optim.schedules import compute_lr
from sdxl_trainer.train.run.non_finite import Suspect, find_suspects, give_up_update, spread_non_finite
from sdxl_trainer.train.run.run import Run
from sdxl_trainer.train.run.sample import draw_samples
from sdxl_trainer.train.run.validate import validate


@dataclass(frozen=True)
class StepResult:
    """Numbers of one optimizer step, over all ranks."""

    loss: float
    updated: bool  # whether the weights were; not by a loss or gradient that is not finite
    data_wait_seconds: float
    num_bad: int
    stop: bool  # some rank was asked to
    save: bool
    suspects: list[Suspect]  # of this rank, if the weights were not updated
    latent_size: tuple[int, int]  # (h, w) of the global batch's bucket


def fit(run: Run, batches: Iterator[MicroBatch]) -> None:
    """Train to `train.max_steps`, saving, sampling and logging on the way.

    Raises:
        Interrupted: a rank was asked to stop; the state is saved.
        NonFiniteError: of more steps than allowed the loss or the gradient was not finite; the state is saved.
    """
    config, state, memory = run.config, run.state, StepMemoryLogger(run.ranks.device)
    if state.step == 0:
        show_progress(run)
    while state.step < config.train.max_steps:
        started, epoch = time.monotonic(), state.epoch
        lr = compute_lr(state.step, config.optim, config.train.max_steps)
        result = train_step(run, batches, lr)
        if not result.updated:
            give_up_update(run, result.loss, result.suspects)
        advance(run, result)
        report_step(run, result, lr, time.monotonic() - started)
        memory.note_step()
        last = state.step == config.train.max_steps
        if last or result.stop or result.save or is_save_due(run, epoch):
            run.requests.note_save()
            with run.progress.doing("copying the state for a checkpoint"):
                run.checkpoints.save(run.engine, state)
            update_report(run)
        if result.stop and not last:
            run.checkpoints.wait()
            run.requests.interrupt()
        show_progress(run, last)


def train_step(run: Run, batches: Iterator[MicroBatch], lr: float) -> StepResult:
    """One optimizer step: accumulate the gradients of a global batch, then update.

    A loss that is not finite, of any sample on any rank, makes the gradient so, and the engine then makes no update.
    """
    run.engine.set_lr(lr)
    total = torch.zeros(4, device=run.ranks.device)  # loss, bad samples, requests to stop, to save
    wait_seconds, updated, seen = 0.0, False, []
    for _ in range(run.accumulation_steps):
        asked = time.monotonic()
        batch = next(batches)
        wait_seconds += time.monotonic() - asked
        losses = compute_losses(run, batch)  # [B]
        loss = losses.mean()
        run.engine.backward(spread_non_finite(loss))
        total[0] += loss.detach()
        total[1] += len(batch.bad)
        seen.append((batch, losses.detach()))
        updated = run.engine.step()
    name_bad_samples(run, [batch for batch, _ in seen])
    total[2:] = torch.tensor(run.requests.collect())
    loss_sum, num_bad, stop, save = reduce_sum(total).tolist()
    loss_mean = loss_sum / (run.accumulation_steps * run.ranks.world_size)
    suspects = [] if updated else find_suspects(run.index, seen, loss_mean)
    height, width = seen[-1][0].latents.shape[2:]
    return StepResult(loss_mean, updated, wait_seconds, int(num_bad), stop > 0, save > 0, suspects, (height, width))


def compute_losses(run: Run, batch: MicroBatch) -> torch.Tensor:
    """Each sample's weighted loss, [B]: noise and timestep → x_t → prediction → target → weight."""
    objective, device, dtype = run.objective, run.ranks.device, run.engine.dtype
    keys = SampleKeys(run.config.run.seed, run.state.step, batch.positions.tolist())
    x0 = objective.normalize_latents(batch.latents)  # [B, 4, h, w]
    noise, timesteps = objective.sample_noise(x0, keys), objective.sample_timesteps(keys)
    x_t = objective.add_noise(x0, noise, timesteps, keys)
    text = run.conditioner.build_inputs(batch, device)
    text_keep = objective.sample_text_keep(keys)  # [B]
    prediction = run.engine(x_t.to(dtype), timesteps, text, batch.time_ids.to(device), text_keep)
    target = objective.compute_target(x0, noise, timesteps)
    losses = objective.compute_losses(prediction, target, timesteps, batch.masks)  # [B]
    return losses * batch.weights.to(device)


def advance(run: Run, result: StepResult) -> None:
    """Move the state past a finished step.

    Raises:
        RuntimeError: more samples were bad than `data.max_bad_fraction` allows.
    """
    state, limit = run.state, run.config.data.max_bad_fraction
    move_on(state, run.plan)
    state.num_bad += result.num_bad
    if state.num_bad > max(limit * state.samples_seen, limit * len(run.index)):
        raise RuntimeError(
            f"{state.num_bad} of {state.samples_seen} samples were bad, more than data.max_bad_fraction "
            f"= {limit:g}; they are named in {run.folder / 'logs'}/bad_samples*.jsonl"
        )


def move_on(state: TrainState, plan: Plan) -> None:
    """Count a finished step and set the position of the next global batch."""
    state.epoch, state.index = plan.next_position(Position(state.epoch, state.index))
    state.epoch_batches = plan.num_batches(state.epoch)
    state.step += 1
    state.samples_seen += plan.global_batch_size


def state_at(run: Run, step: int) -> TrainState:
    """A copy of the state as of a step that the engine has completed, be it counted already or not."""
    state = replace(run.state)
    while state.step < step:
        move_on(state, run.plan)
    return state


def report_step(run: Run, result: StepResult, lr: float, seconds: float) -> None:
    """Write a step's numbers, show them, and every so often make a line of them."""
    if run.metrics is None:
        return
    step, values = (
        run.state.step,
        {
            "loss": result.loss,
            "lr": lr,
            "grad_norm": run.engine.grad_norm(),
            "epoch": run.state.epoch,
            "samples_per_second": run.plan.global_batch_size / seconds,
            "step_seconds": seconds,
            "data_wait_share": result.data_wait_seconds / seconds,
            "num_bad": run.state.num_bad,
            "num_non_finite": run.state.num_non_finite,
        },
    )
    run.metrics.write(step, values)
    run.progress.update(values, result.latent_size)
    if _is_due(step, run.config.log.every_steps) or step == run.config.train.max_steps:
        run.progress.log_line()


def show_progress(run: Run, last: bool = False) -> None:
    """Validate, and draw samples, each where its settings say that it is due."""
    step, validation, sample = run.state.step, run.config.validation, run.config.sample
    if run.validation and (validation.at_start if step == 0 else last or _is_due(step, validation.every_steps)):
        with run.progress.doing("validating"):
            validate(run)
        update_report(run)
    if sample.draws and (sample.at_start if step == 0 else last or _is_due(step, sample.every_steps)):
        with run.progress.doing("drawing samples"):
            draw_samples(run)
        update_report(run)


def update_report(run: Run) -> None:
    """Have the report drawn anew beside the training, if the last one is old enough."""
    if run.reporter is not None:
        run.reporter.update()


def finish(run: Run) -> None:
    """Export the model and its moving averages and write the report, once the last checkpoint is on disk."""
    with run.progress.doing("writing the model"):
        for average in (None, *run.engine.weights.average_names):
            path = get_model_path(run.config, run.state.step, average)
            export_model(path, run.engine, run.conditioner, run.source, run.config, run.ranks, average)
        run.checkpoints.wait()
    if run.metrics is not None:
        run.metrics.close()
    if run.reporter is not None:
        with run.progress.doing("writing the report"):
            run.reporter.finish()


def name_bad_samples(run: Run, batches: list[MicroBatch]) -> None:
    """Append what was passed over to this rank's bad_samples file."""
    bad = [item for batch in batches for item in batch.bad]
    if not bad:
        return
    suffix = "" if run.ranks.is_main else f"-rank{run.ranks.rank}"
    with open(run.folder / "logs" / f"bad_samples{suffix}.jsonl", "ab") as file:
        for key, reason in bad:
            logger.warning("bad sample skipped: {}", reason)
            file.write(orjson.dumps({"step": run.state.step, "key": key, "reason": reason}) + b"\n")


def is_save_due(run: Run, epoch: int) -> bool:
    """Whether a checkpoint is due after the step that began in `epoch`, by steps or by epochs."""
    settings, state = run.config.checkpoint, run.state
    every_epochs = settings.every_epochs
    epochs_due = every_epochs > 0 and state.epoch // every_epochs > epoch // every_epochs
    return epochs_due or _is_due(state.step, settings.every_steps)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
