"""Trains the tiny SDXL under ZeRO 0, 1, 2 and 3 on 1, 2 and 4 ranks in fp32: the losses must be the same everywhere.

    python tests/campaigns/zero_stages.py [--steps 20] [--tolerance 1e-5] [--released]

The U-Net, less a part that is frozen, and text encoder 1 learn; text encoder 2 is frozen. What is frozen must have
neither gradient nor optimizer state, and must end as it began. One launch trains under all four stages in turn, so that
imports are paid for once; it is this script again, started by torchrun with `--cfg`.

`--released` trains with gradient release instead, on 1 and 2 ranks with each optimizer that it allows. The losses of an
optimizer must be the same on both.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

STAGES, RANKS = (0, 1, 2, 3), (1, 2, 4)
# Optimizer → tolerance. AdamW's eps keeps gradients that are rounding errors small. Adafactor and Lion make whole
# updates of these, whose sign depends on the number of ranks, and moments in 8 bit jump from one code to the next.
RELEASED, RELEASED_RANKS = {"adamw": 1e-5, "adafactor": 1e-3, "adamw8bit": 1e-4, "lion": 1e-4}, (1, 2)
Case = int | str  # a ZeRO stage, or the optimizer under gradient release
ROOT = Path(__file__).resolve().parent.parent.parent
WORDS = (
    "optim.text_encoder_lr=1e-4",
    "optim.groups=[{match: 'unet.mid_block', lr: 0}]",
    "train.micro_batch_size=1",
    "sample.prompts=[]",
)


def list_settings(case: Case, global_batch_size: int) -> list[str]:
    """The settings of a case: gradient release adds up no micro steps, and clips by no global norm."""
    if isinstance(case, int):
        return [f"engine.zero_stage={case}"]
    micro_batch_size = global_batch_size // int(os.environ.get("WORLD_SIZE", 1))
    release = ["engine.gradient_release=true", "optim.max_grad_norm=0", f"train.micro_batch_size={micro_batch_size}"]
    rate = ["optim.lr=1e-4"] if case == "lion" else []  # a tenth of AdamW's, as is usual
    return [*release, *rate, f"optim.name={case}"]


def train_all_stages(settings: Path, steps: int, words: Sequence[str], cases: Sequence[Case]) -> None:
    """On one rank: train each case in turn, and on rank 0 write `losses-R.json` for R ranks beside the settings:
    the losses by stage, and what is wrong with frozen parts."""
    from sdxl_trainer.configs.load import load_config
    from sdxl_trainer.configs.problems import raise_if_any
    from sdxl_trainer.configs.schema import Config
    from sdxl_trainer.launch.distributed import Ranks, close_ranks
    from sdxl_trainer.train.optim.schedules import compute_lr
    from sdxl_trainer.train.run.build import build_run
    from sdxl_trainer.train.run.job import set_up
    from sdxl_trainer.train.run.loop import record_step, train_step

    def train(config: Config) -> tuple[list[float], list[str], Ranks]:
        config, index, ranks = set_up(config, [])
        run, batches = build_run(config, index, ranks)
        if not before:  # the same under every stage; without ZeRO no rank has to ask another
            before.update({name: run.engine.weights.gather(name) for name, _ in run.engine.model.named_parameters()})
        losses = []
        for step in range(steps):
            result = train_step(run, batches, compute_lr(step, config.optim, config.train.max_steps))
            record_step(run, result)
            losses.append(result.loss)
        return losses, find_thawed(run, before), ranks

    before: dict[str, Any] = {}
    found, wrong = {}, []
    global_batch_size = load_config(settings, words)[0].train.global_batch_size
    for case in cases:
        name = f"case-{case}-ranks-{os.environ.get('WORLD_SIZE', 1)}"
        chosen = [*WORDS, *words, f"run.name={name}", *list_settings(case, global_batch_size)]
        config, problems = load_config(settings, chosen)
        raise_if_any(problems)
        found[case], thawed, ranks = train(config)
        wrong += [f"{case} on {ranks.world_size} ranks: {problem}" for problem in thawed]
    if ranks.is_main:
        report = {"losses": found, "wrong": wrong}
        (settings.parent / f"losses-{ranks.world_size}.json").write_text(json.dumps(report))
    close_ranks()


def find_thawed(run: Any, before: dict[str, Any]) -> list[str]:
    """What is wrong with the parts that should be frozen."""
    parameters = dict(run.engine.model.named_parameters())
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    looked_at = frozen if run.engine.zero_stage else list(parameters)  # of what is trained, only pieces are at hand
    changed = {name for name in looked_at if not _hold(parameters[name], before[name])}
    layout = next(content for name, content in run.engine.capture_state().items() if "layout" in name)
    wrong = [f"{name} has a gradient" for name in frozen if parameters[name].grad is not None]
    wrong += [f"{name} is frozen and has changed" for name in frozen if name in changed]
    wrong += [
        f"{name} is trained and has not changed"
        for name in looked_at
        if name not in changed and name not in frozen and name.endswith("weight")
    ]
    if not any("mid_block" in name for name in frozen) or not any("text_encoder." in name for name in frozen):
        wrong.append("nothing is frozen")
    if set(layout["shapes"]) != parameters.keys() - set(frozen):
        wrong.append("the optimizer has not exactly what is trained")
    for name, parameter in run.conditioner.encoders.encoder_2.named_parameters():
        if parameter.requires_grad or parameter.grad is not None:
            wrong.append(f"text_encoder_2.{name} is not frozen")
    return wrong


def _hold(parameter: Any, whole: Any) -> bool:
    """Whether a parameter, or under ZeRO-3 this rank's piece of it, still is what it was."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach().equal(whole)
    piece = parameter.ds_tensor.flatten()
    part = whole.flatten()[int(os.environ["RANK"]) * piece.numel() :][: piece.numel()]  # the last piece is padded
    return piece[: part.numel()].equal(part)


def compare(
    settings: Path, ranks: Sequence[int], steps: int, words: Sequence[str] = (), released: bool = False
) -> tuple[dict[tuple[int, Case], list[float]], list[str]]:
    """Train on each number of ranks. Returns the losses by (ranks, case), and what is wrong with frozen
    parts."""
    losses, wrong = {}, []
    for number in ranks:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
        options = ["--cfg", str(settings), "--steps", str(steps), *(["--released"] if released else [])]
        command = [*launch, __file__, *options, *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1800)
        assert done.returncode == 0, done.stdout[-6000:]
        report = json.loads((settings.parent / f"losses-{number}.json").read_text())
        losses |= {(number, int(case) if case.isdigit() else case): found for case, found in report["losses"].items()}
        wrong += report["wrong"]
    return losses, wrong


def build_set(folder: Path) -> Path:
    """Settings with a demo set and its latents."""
    from sdxl_trainer.data.images.demo_set import draw_demo_set
    from sdxl_trainer.train.tiny.build import build_tiny_sdxl

    build_tiny_sdxl(folder / "model")
    config = {
        "run": {"dir": str(folder / "runs")},
        "model": {"path": str(folder / "model")},
        "data": {
            "metadata": [str(draw_demo_set(folder / "data", num_images=48))],
            "resolution_px": 128,
            "min_bucket_px": 64,
            "max_bucket_px": 256,
            "bucket_step_px": 32,
            "caption": {"dropout_rate": 0.1},
            "num_workers": 0,
        },
        "cache": {"dir": str(folder / "latents")},
        "optim": {"lr": 1e-3, "warmup_steps": 2},
        "engine": {"precision": "fp32", "deepspeed": {"zero_optimization": {"stage3_max_reuse_distance": 30_000}}},
        "train": {"global_batch_size": 4},
    }
    settings = folder / "settings.yaml"
    settings.write_text(yaml.safe_dump(config))
    subprocess.run([sys.executable, str(ROOT / "cache" / "main.py"), "--cfg", str(settings)], check=True)
    return settings


def main() -> int:
    """Run the campaign and print a table; 1 if losses differ or what is frozen moves."""
    parser = argparse.ArgumentParser(description="The same losses under every ZeRO stage on any number of ranks.")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (20)")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="how far losses may differ (1e-5)")
    parser.add_argument("--released", action="store_true", help="gradient release instead of ZeRO")
    parser.add_argument("--cfg", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cfg:
        from sdxl_trainer.launch.program import end_program

        train_all_stages(options.cfg, options.steps, options.words, list(RELEASED) if options.released else STAGES)
        end_program(0)
    with tempfile.TemporaryDirectory() as folder:
        ranks = RELEASED_RANKS if options.released else RANKS
        losses, wrong = compare(build_set(Path(folder)), ranks, options.steps, released=options.released)
    print(f"{'ranks':>5}  {'case':>9}  {'first loss':>10}  {'last loss':>10}  largest difference")
    for (number, case), values in losses.items():
        reference = losses[1, case if options.released else 0]
        difference = max(abs(one - other) for one, other in zip(values, reference, strict=True))
        print(f"{number:5}  {case:>9}  {values[0]:10.6f}  {values[-1]:10.6f}  {difference:.1e}")
        if difference > (RELEASED[case] if isinstance(case, str) else options.tolerance):
            wrong.append(f"{case} on {number} ranks: the losses differ by {difference:.1e}")
    print(*wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
