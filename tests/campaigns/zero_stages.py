"""Trains the tiny SDXL under ZeRO 0, 1, 2 and 3 on 1, 2 and 4 ranks in fp32: the losses must be the same everywhere.

    python tests/campaigns/zero_stages.py [--steps 20] [--tolerance 1e-5]

The U-Net, less a part that is frozen, and text encoder 1 learn; text encoder 2 is frozen. What is frozen must have
neither gradient nor optimizer state, and must end as it began. One launch trains under all four stages in turn, so that
imports are paid for once; it is this script again, started by torchrun with `--cfg`.
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
ROOT = Path(__file__).resolve().parent.parent.parent
WORDS = (
    "optim.text_encoder_lr=1e-4",
    "optim.groups=[{match: 'unet.mid_block', lr: 0}]",
    "train.micro_batch_size=1",
    "sample.prompts=[]",
)


def train_all_stages(settings: Path, steps: int, words: Sequence[str]) -> None:
    """On one rank: train under each stage in turn, and on rank 0 write `losses-R.json` for R ranks beside the settings:
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
    for stage in STAGES:
        name = f"stage-{stage}-ranks-{os.environ.get('WORLD_SIZE', 1)}"
        config, problems = load_config(settings, [*WORDS, *words, f"run.name={name}", f"engine.zero_stage={stage}"])
        raise_if_any(problems)
        found[stage], thawed, ranks = train(config)
        wrong += [f"ZeRO-{stage} on {ranks.world_size} ranks: {problem}" for problem in thawed]
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


def compare(settings: Path, ranks: Sequence[int], steps: int, words: Sequence[str] = ()) -> tuple[dict, list[str]]:
    """Train on each number of ranks. Returns the losses by (ranks, stage), and what is wrong with frozen
    parts."""
    losses, wrong = {}, []
    for number in ranks:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
        command = [*launch, __file__, "--cfg", str(settings), "--steps", str(steps), *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1800)
        assert done.returncode == 0, done.stdout[-6000:]
        report = json.loads((settings.parent / f"losses-{number}.json").read_text())
        losses |= {(number, int(stage)): values for stage, values in report["losses"].items()}
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
    parser.add_argument("--cfg", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cfg:
        from sdxl_trainer.launch.program import end_program

        train_all_stages(options.cfg, options.steps, options.words)
        end_program(0)
    with tempfile.TemporaryDirectory() as folder:
        losses, wrong = compare(build_set(Path(folder)), RANKS, options.steps)
    reference, worst = losses[1, 0], 0.0
    print(f"{'ranks':>5}  {'ZeRO':>4}  {'first loss':>10}  {'last loss':>10}  largest difference")
    for (ranks, stage), values in losses.items():
        difference = max(abs(one - other) for one, other in zip(values, reference, strict=True))
        worst = max(worst, difference)
        print(f"{ranks:5}  {stage:4}  {values[0]:10.6f}  {values[-1]:10.6f}  {difference:.1e}")
    print(*wrong, sep="\n")
    return int(worst > options.tolerance or bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
