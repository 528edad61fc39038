"""An ablation from its command line to its table: plan, train, compare."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from sdxl_trainer.configs.language.translate import translate, translate_label
from sdxl_trainer.configs.problems import FailedError, Problem, UserInputError, format_count
from sdxl_trainer.launch.folder_lock import lock_folder
from sdxl_trainer.launch.program import announce
from sdxl_trainer.launch.signals import StopRequest
from sdxl_trainer.train.ablation.hopeless import describe_hopeless, find_diverged
from sdxl_trainer.train.ablation.plan import Plan, PlannedRun, Request, plan_runs
from sdxl_trainer.train.ablation.training import Training
from sdxl_trainer.train.evidence.comparison import Comparison, Options, RunCurve
from sdxl_trainer.train.evidence.printing import align_rows, compare_folders, measure_folders, write_lines
from sdxl_trainer.train.evidence.text import format_share

PAGE = "comparison.html"  # in the ablation's folder
HEADINGS = ("arm", "runs", "verdict", "difference", "v error", "steps")


def run_study(request: Request, dry_run: bool) -> None:
    """Train the runs of an ablation that are not finished, compare them, and print the result.

    Args:
        dry_run: list the runs and stop.

    Raises:
        UserInputError: the grid, a setting or a folder is wrong.
        Interrupted: the user asked to stop; the runs at work are saved.
        FailedError: a run has failed.
    """
    devices = list_devices(request.per_gpu)
    num_ranks = 1 if request.per_gpu else int(os.environ.get("NPROC") or max(1, torch.cuda.device_count()))
    plan = plan_runs(request, num_ranks)
    count = format_count(len(plan.runs), "run")
    announce(f"{count} in {plan.folder}: {format_count(len(plan.arms), 'arm')}, each with seeds {list_seeds(plan)}")
    if dry_run:
        sys.stdout.write("".join(f"{run.folder.name}  {run.label}\n" for run in plan.runs))
        return
    stop = StopRequest("the state of each run at work", announce=announce)
    with lock_folder(plan.folder, "--name", "choose another --name"):
        training = Training(plan, devices, request.keep_hopeless, stop)
        training.train_all()
    finish(plan, training)


def list_devices(per_gpu: bool) -> list[str | None]:
    """Return the GPU of each place where a run can be trained; None stands for all GPUs, or for the CPU.

    Raises:
        UserInputError: a run on each GPU is asked for, and there is none.
    """
    if not per_gpu:
        return [None]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    number = torch.cuda.device_count()
    if not number:
        raise UserInputError([Problem("--per-gpu", None, "finds no GPU", "leave it out")])
    names = [name.strip() for name in visible.split(",")] if visible else [str(device) for device in range(number)]
    return [*names[:number]]


def list_seeds(plan: Plan) -> str:
    """Return the seeds of each arm, such as `0, 1, 2`."""
    return ", ".join(dict.fromkeys(str(run.seed) for run in plan.runs))


def finish(plan: Plan, training: Training) -> None:
    """Compare the finished runs, print the comparison and the table of all arms, and write the page.

    Raises:
        FailedError: a run has failed, and the same command tries it again.
    """
    done = [run for run in plan.runs if run.arm.name not in training.hopeless and run.is_finished(plan.num_steps)]
    for run in done:  # of an arm that was kept
        if diverged := find_diverged(run.folder):
            training.hopeless[run.arm.name] = diverged
    done = [run for run in done if run.arm.name not in training.hopeless]
    comparison, curves, num_arms = None, [], len({run.arm.name for run in done})
    if num_arms > 1:
        page = plan.folder / PAGE
        comparison = compare_folders([run.folder for run in done], Options(groups={}), page)
        curves = comparison.curves
        sys.stdout.write("".join(f"{line}\n" for line in write_lines(comparison)) + f"\n{page}\n")
    else:
        curves = measure_folders([run.folder for run in done], Options(groups={})) if done else []
        count = format_count(num_arms, "arm")
        message = f"no comparison and no {PAGE}: they need two arms that are not hopeless, and {count} finished"
        sys.stdout.write(f"{translate(message)}\n")
    rows = [[translate_label(heading) for heading in HEADINGS], *list_rows(plan, training, done, comparison, curves)]
    sys.stdout.write("\n" + "".join(f"{line}\n" for line in align_rows(rows)))
    for arm in plan.arms:
        if arm.name in training.hopeless:
            reason = describe_hopeless(training.hopeless[arm.name])
            sys.stdout.write(f"{translate(f'{arm.label} is hopeless: {reason}')}\n")
    if training.failed:
        names = ", ".join(folder.name for folder in training.failed)
        raise FailedError(
            f"{format_count(len(training.failed), 'run')} failed: {names}\ncure: the same command continues"
        )


def list_rows(
    plan: Plan,
    training: Training,
    done: Sequence[PlannedRun],
    comparison: Comparison | None,
    all_curves: Sequence[RunCurve],
) -> Iterator[list[str]]:
    """Yield the line of each arm in the table: the baseline first, then from the lowest error to the highest."""
    judged = {arm.arm: arm for arm in comparison.arms} if comparison else {}
    last = {curve.run: curve for curve in all_curves}

    def find(arm: str) -> list[Path]:
        return [run.folder for run in done if run.arm.name == arm]

    rows = []
    for arm in plan.arms:
        folders = find(arm.name)
        curves = [last[folder.name] for folder in folders if folder.name in last]
        error = sum(curve.errors[-1] for curve in curves) / len(curves) if curves else float("inf")
        found = judged.get(curves[0].arm) if curves else None
        verdict, change = ("", "")
        if arm is plan.arms[0]:
            verdict = "baseline"
        elif found is not None:
            verdict, change = found.setting.verdict, format_share(found.setting.difference, found.weights.baseline)
        elif arm.name in training.hopeless:
            verdict, excess = "hopeless", training.hopeless[arm.name].excess
            change = "" if excess is None else f"{100 * excess:+.2f} %"
        steps = str(training.hopeless[arm.name].step) if arm.name in training.hopeless else ""
        steps = str(curves[0].steps[-1]) if curves else steps
        shown = f"{error:.4g}" if curves else ""
        cells = [arm.label, str(len(folders)), translate_label(verdict) if verdict else "", change, shown, steps]
        rows.append((arm is not plan.arms[0], error, cells))
    yield from (cells for *_, cells in sorted(rows, key=lambda row: row[:2]))
