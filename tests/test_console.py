"""What people see of a run: the display on a real terminal, lines elsewhere, and the numbers in both."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from console_screen import Terminal, run_in_terminal

from sdxl_trainer.configs.checkpoint import CheckpointConfig
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.train.console import Averages, StepNumbers, describe_rates, find_next_save, format_seconds
from sdxl_trainer.train.flops import count_forward_flops, count_training_flops, find_peak_flops
from sdxl_trainer.train.state import TrainState

ROOT = Path(__file__).parent.parent
PROGRAM = Path(__file__).parent / "console_screen.py"


@pytest.mark.parametrize(("ending", "status"), [("end", 0), ("raise", 1), ("kill", -9)])
def test_lines_come_above_the_display_and_the_terminal_is_left_whole(ending: str, status: int) -> None:
    ended_with, written = run_in_terminal(PROGRAM, 0, ending)
    screen, terminal = str(Terminal(written)), Terminal(written)
    assert ended_with == status and terminal.cursor_is_visible and terminal.column == 0
    assert screen.count("first row\nsecond row") == 1, screen  # every drawing but the last was wiped
    order = ["a table", "its cell"]
    for number in range(3):
        order += [f"WARNING {number} xxx", f"printed {number}"]
    order += ["first row", "ValueError: broken" if ending == "raise" else "second row"]
    places = [screen.index(text) for text in order]
    assert places == sorted(places), screen
    assert screen.replace("\n", "").count("x" * 150) == 3  # long lines too
    assert "what the display shows" not in screen


def test_another_ranks_warnings_are_clear_of_the_display() -> None:
    _, written = run_in_terminal(PROGRAM, 1, "end")
    rows = Terminal(written).rows
    for number in range(3):
        place = next(at for at, row in enumerate(rows) if f"[rank 1] {number} xxx" in row)
        assert rows[place + 2 : place + 4] == ["", ""], rows  # after its own two rows; rank 0 draws over these


@pytest.mark.parametrize("environment", [{"SLURM_JOB_ID": "7"}, {"TERM": "dumb"}])
def test_plain_lines_under_slurm_and_on_a_dumb_terminal(environment: dict[str, str]) -> None:
    _, written = run_in_terminal(PROGRAM, 0, "end", environment=environment)
    assert "\x1b" not in written and "first row" not in written
    assert "its cell" in written and "what the display shows" in written


def test_plain_lines_into_a_file() -> None:
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm"}
    done = subprocess.run([sys.executable, PROGRAM, "0", "end"], env=environment, capture_output=True, text=True)
    assert "\x1b" not in done.stdout + done.stderr and "first row" not in done.stderr
    assert "its cell" in done.stderr and "what the display shows" in done.stderr


def test_a_run_on_a_terminal(cached_folder: Path) -> None:
    words = ["--cfg", cached_folder / "tiny.yaml", "run.name=seen", "train.max_steps=6", "log.every_steps=3"]
    words += ["checkpoint.every_steps=4", "optim.text_encoder_lr=5e-4", "sample.prompts=[a red circle]"]
    status, written = run_in_terminal(ROOT / "train" / "main.py", *words)
    terminal = Terminal(written)
    screen = str(terminal)
    assert status == 0, screen
    assert terminal.cursor_is_visible
    # Before: the table, with the batch arithmetic.
    assert "Training seen" in screen and "2 micro x 2 accumulation x 1 ranks = 4 global" in screen
    # Meanwhile, and as it stays: the display, once.
    assert screen.count("step 6 of 6") == 1, screen
    display = screen[screen.index("╭─ seen") :]
    losses = [line["loss"] for line in map(json.loads, (cached_folder / "runs/seen/logs/metrics.jsonl").open())]
    assert re.search(rf"loss +{losses[-1]:.4f}", display), display
    assert re.search(rf"average of 6 +{sum(losses) / 6:.4f}", display), display
    for name in ("gradient norm", "images/s", "data wait", "memory"):
        assert re.search(rf"{name} +[\d.]", display), name
    assert re.search(r"MFU +–", display), "a CPU's peak is not known"
    assert re.search(r"learning rate +U-Net \d.\d\de-\d\d, text 1 \d.\d\de-\d\d", display)
    assert re.search(r"100% +0:0\d:\d\d gone, 0:00:00 left", display)
    # Drawn at the start, and with each line that comes above it.
    meanwhile = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", written)
    assert re.search("next checkpoint +at step 4, in ", meanwhile) and "drawing samples" in meanwhile
    # Log lines stay whole above it; those with the same numbers go to the file alone.
    assert re.search(r"^\d\d:\d\d:\d\d INFO    samples .*step-00000006.png$", screen, re.MULTILINE), screen
    log = (cached_folder / "runs/seen/logs/train.log").read_text()
    assert "next checkpoint at step 4, in 0:" in log and "next checkpoint" not in screen[: screen.index("╭─ seen")]
    assert "4 global" in log and "\x1b" not in log
    # Afterwards: what was done.
    assert "Trained seen" in screen and "step-00000006.safetensors" in screen


def test_averages_leave_out_losses_that_are_not_finite() -> None:
    steps = [StepNumbers(1.0, 2.0, 0.5, 8, 4e12), StepNumbers(float("nan"), 1.0, 0.0, 8, 2e12),
             StepNumbers(3.0, 1.0, 0.5, 8, 2e12)]  # fmt: skip
    averages = Averages(steps)
    assert (averages.loss, averages.images_per_second, averages.data_wait_share) == (2.0, 6.0, 0.25)
    assert averages.step_seconds == pytest.approx(4 / 3) and averages.flops_per_second == 2e12
    assert [format_seconds(seconds) for seconds in (Averages([]).step_seconds, 59.6, 90_000)] == [
        "–", "0:01:00", "1 day, 1:00:00",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"every_steps": 50}, 150),
        ({"every_steps": 1000}, 400),  # the end
        ({"every_steps": 0, "every_epochs": 1}, 107),
        ({"every_steps": 0, "every_epochs": 4}, 117),  # epoch 2 of ten batches ends at 107
        ({"every_steps": 105, "every_epochs": 2}, 105),
    ],
)
def test_the_next_checkpoint(settings: dict[str, Any], expected: int) -> None:
    state = TrainState(step=100, epoch=2, index=3, epoch_batches=10)
    assert find_next_save(CheckpointConfig(**settings), state, 400) == expected


def test_all_learning_rates_are_told() -> None:
    assert describe_rates(OptimConfig(lr=1e-4), 5e-5) == "5.00e-05"
    rates = OptimConfig(lr=1e-4, text_encoder_2_lr=1e-5, block_lrs=[0, *[1e-4] * 21, 2e-4],
                        groups=[{"match": "x", "lr": 3e-4}])  # pyright: ignore  # fmt: skip
    assert describe_rates(rates, 5e-5) == "U-Net 5.00e-05 to 1.00e-04, text 2 5.00e-06, patterns 1.50e-04"


def test_flops_are_those_of_a_count_with_the_backward_pass() -> None:
    """SDXL's figure, and for a small U-Net, on a grid that is not square, torch's count of both passes."""
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    sdxl, tiny = (json.loads((ROOT / f"configs/{name}/unet/config.json").read_text()) for name in ("sdxl", "tiny"))
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(sdxl)
        assert 3 * count_forward_flops(unet, (128, 128), 77) == pytest.approx(20.28e12, rel=1e-3)
        unet = UNet2DConditionModel.from_config(tiny)
        pooled = tiny["projection_class_embeddings_input_dim"] - 6 * tiny["addition_time_embed_dim"]
        conditions = {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}
        text = torch.zeros(1, 77, tiny["cross_attention_dim"])
        with FlopCounterMode(display=False) as counter:
            unet(torch.zeros(1, 4, 40, 24), torch.zeros(1), text, added_cond_kwargs=conditions).sample.sum().backward()
    # The first layers' inputs need no gradient.
    assert count_training_flops(tiny, 77).compute((40, 24)) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989.5),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("some other device", None),
    ],
)
def test_mfu_is_told_only_where_the_peak_is_known(name: str, tflops: float | None) -> None:
    assert find_peak_flops(name) == (None if tflops is None else tflops * 1e12)
