"""The console of a run: the display on a real terminal, log lines elsewhere, and the numbers in both."""

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from console_screen import Terminal, run_in_terminal
from forked_ranks import run_forked
from programs import ROOT
from rich.cells import cell_len
from rich.console import Console

from sdxl_trainer.configs.checkpoint import CheckpointConfig
from sdxl_trainer.configs.language.translate import choose_language
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.estimates.flops import count_training_flops
from sdxl_trainer.train.estimates.gpus import find_gpu
from sdxl_trainer.train.run.console import (
    Averages,
    Display,
    StepNumbers,
    describe_learning_rates,
    find_next_checkpoint_step,
    format_seconds,
)

LOSS, MEMORY = ("average of 100", "0.1234"), ("memory", "141.2 of 139.8 GiB")
PROGRAM = ROOT / "tests" / "support" / "console_screen.py"


@pytest.mark.parametrize(("ending", "status"), [("end", 0), ("raise", 1), ("interrupt", -2), ("kill", -9)])
def test_lines_come_above_the_display_and_the_terminal_is_left_whole(ending: str, status: int) -> None:
    ended_with, written = run_in_terminal(PROGRAM, 0, ending)
    terminal = Terminal(written)
    screen = str(terminal)
    assert ended_with == status and terminal.cursor_is_visible and terminal.column == 0
    order = ["a table", "its cell"]
    for number in range(3):
        order += [f"WARNING {number} xxx", f"printed {number} [/no markup]"]
    last = {"raise": "ValueError: broken", "interrupt": "KeyboardInterrupt"}.get(ending, "its end ─╯")
    order += ["[/half a line]", "╭─ the title", "first   1", "third   3", last]
    places = [screen.index(text) for text in order]
    assert places == sorted(places), screen
    assert screen.count("the title") == 1, screen  # every drawing but the last was wiped
    assert screen.replace("\n", "").count("x" * 150) == 3  # long lines are not cut off
    assert "what the display shows" not in screen


def test_the_display_follows_a_terminal_that_becomes_narrow() -> None:
    _, written = run_in_terminal(PROGRAM, 0, "narrow", then=("printed 0", 40))
    display = str(Terminal(written)).splitlines()[-7:-1]
    assert [len(row) for row in display] == [40] * 6
    assert ["first   1", "second  2", "third   3"] == [row.strip("│ ") for row in display[2:5]]


def test_a_terminal_that_goes_away_is_no_error() -> None:
    ended_with, written = run_in_terminal(PROGRAM, 0, "gone", then=("printed 0", 0))
    assert ended_with == 0 and "printed 2" not in written


def test_lines_of_another_rank_are_clear_of_the_display() -> None:
    """Warnings and errors of rank 1 leave room below, because rank 0 draws over the rows that follow."""
    _, written = run_in_terminal(PROGRAM, 1, "raise")
    rows = Terminal(written).rows
    for number in range(3):
        place = next(at for at, row in enumerate(rows) if f"[rank 1] {number} xxx" in row)
        assert rows[place + 3 : place + 8] == [""] * 5, rows  # after the three rows of the line itself
    assert rows[rows.index("ValueError: broken") + 1 :] == [""] * 7


@pytest.mark.parametrize("environment", [{"SLURM_JOB_ID": "7"}, {"TERM": "dumb"}])
def test_plain_lines_under_slurm_and_on_a_dumb_terminal(environment: dict[str, str]) -> None:
    _, written = run_in_terminal(PROGRAM, 0, "end", environment=environment)
    assert "\x1b" not in written and "the title" not in written
    assert "its cell" in written and "what the display shows" in written


def test_no_colours_and_plain_letters_where_they_are_asked_for() -> None:
    environment = {"NO_COLOR": "1", "PYTHONIOENCODING": "latin-1"}
    _, written = run_in_terminal(PROGRAM, 0, "end", environment=environment)
    assert written.isascii()
    assert {code for codes in re.findall(r"\x1b\[([\d;]*)m", written) for code in codes.split(";")} <= {
        "0",
        "1",
        "2",
        "3",
    }
    assert "=----" in str(Terminal(written)), "done and to do look alike"


def test_plain_lines_into_a_file() -> None:
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm", "PYTHONIOENCODING": "latin-1"}
    status, printed = run_forked(PROGRAM, [0, "end"], 1, environment, timeout=60)
    assert status == 0 and "\x1b" not in printed and "the title" not in printed, printed
    assert "its cell" in printed and "what the display shows" in printed
    assert "\\u" not in printed, "the frame is not in this encoding"


def test_a_run_on_a_terminal_of_80_columns(one_rank: Path) -> None:
    terminal = Terminal(written := (one_rank.parent.parent / "one.terminal").read_bytes().decode())
    screen = str(terminal)
    assert terminal.cursor_is_visible
    # At the start: the table with the batch sizes.
    assert "Training one" in screen
    assert "2 micro x 2 accumulation x 1 rank = 4 global" in re.sub(r" *│\n│ *│ +", " ", screen)
    # During the run, and still there at the end: the display, once.
    assert screen.count("step 20 of 20") == 1, screen
    display = screen[screen.index("╭─ step 20") :]
    losses = [line["loss"] for line in map(json.loads, (one_rank / "logs" / "metrics.jsonl").open())]
    assert re.search(rf"loss +{losses[-1]:.4f}", display), display
    assert re.search(rf"average of 20 +{sum(losses) / 20:.4f}", display), display
    for name in ("gradient norm", "speed", "data wait", "memory", "epoch"):
        assert re.search(rf"{name} +[\d.]", display), name
    assert re.search(r"MFU +-", display), "a CPU's peak is not known"
    assert re.search(r"100% │", display) and re.search(r"time +0:\d\d:\d\d elapsed, 0:00:00 left", display)
    assert re.search("now +ended", display) and "…" not in screen and " one ─╯" in display
    # The display is drawn at the start, and again below each log line.
    meanwhile = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", written)
    assert re.search("next checkpoint +at step 4, in ", meanwhile) and "generating images" in meanwhile
    # Log lines stay whole above the display; lines with the same numbers go only to the file.
    assert re.search(r"^\d\d:\d\d:\d\d INFO    generated images: ", screen, re.MULTILINE), screen
    log = (one_rank / "logs" / "train.log").read_text()
    assert re.search(r"step 10/20: loss .* next checkpoint at step 12, in 0:", log) and "step 10/20" not in screen
    assert "4 global" in log and "\x1b" not in log
    # At the end: the summary.
    assert "Trained one" in screen and "step-00000020.safetensors" in screen


def build_display(lines: dict[str, str]) -> Display:
    return Display(
        title="step 123456 of 1000000",
        subtitle="name",
        share=0.7,
        left=dict([LOSS]),
        right=dict([MEMORY]),
        lines=lines,
    )


@pytest.mark.parametrize("columns", [80, 40])
def test_nothing_is_cut_off(columns: int) -> None:
    values = {
        "rates": "U-Net 5.00e-05 to 1.00e-04, text 1 5.00e-06, text 2 5.00e-06, patterns 1.50e-04",
        "now": "copying the state for a checkpoint, writing a checkpoint",
    }
    drawn = io.StringIO()
    Console(file=drawn, width=columns).print(build_display(values))
    rows = drawn.getvalue().splitlines()
    assert {len(row) for row in rows} == {columns} and "…" not in drawn.getvalue()
    words = " ".join(row.strip("│ ") for row in rows[2:-1]).split()
    assert words == " ".join([*LOSS, *MEMORY, *(f"{name} {value}" for name, value in values.items())]).split()


@pytest.mark.parametrize("columns", range(1, 12))
def test_no_terminal_is_too_narrow(columns: int) -> None:
    drawn = io.StringIO()
    Console(file=drawn, width=columns).print(build_display({"now": "this and that"}))
    assert all(len(row) <= columns for row in drawn.getvalue().splitlines())


@pytest.mark.parametrize("columns", [80, 50])
def test_chinese_takes_two_columns_a_character(columns: int) -> None:
    choose_language("zh")
    try:
        written = io.StringIO()
        Console(file=written, width=columns, force_terminal=True, color_system=None).print(
            build_display({"now": "training, writing a checkpoint", "time": "1:00:00 elapsed, 2:00:00 left"})
        )
    finally:
        choose_language("en")
    rows = written.getvalue().splitlines()
    assert {cell_len(row) for row in rows} == {columns}
    assert "最近 100 步平均" in rows[2] and "已用 1:00:00，剩余 2:00:00" in "".join(rows)


def test_averages_leave_out_losses_that_are_not_finite() -> None:
    steps = [
        StepNumbers(loss=1.0, seconds=2.0, data_wait_seconds=0.5, num_images=8, flops=4e12),
        StepNumbers(loss=float("nan"), seconds=1.0, data_wait_seconds=0.0, num_images=8, flops=2e12),
        StepNumbers(loss=3.0, seconds=1.0, data_wait_seconds=0.5, num_images=8, flops=2e12),
    ]
    averages = Averages(steps)
    assert (averages.loss, averages.images_per_second, averages.data_wait_share) == (2.0, 6.0, 0.25)
    assert averages.step_seconds == pytest.approx(4 / 3) and averages.flops_per_second == 2e12
    assert [format_seconds(seconds) for seconds in (Averages([]).step_seconds, 59.6, 90_000)] == [
        "-",
        "0:01:00",
        "1 day, 1:00:00",
    ]


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
    assert find_next_checkpoint_step(CheckpointConfig(**settings), state, 400) == expected


def test_all_learning_rates_are_shown() -> None:
    assert describe_learning_rates(OptimConfig(lr=1e-4), 5e-5) == "5.00e-05"
    rates = OptimConfig(
        lr=1e-4, text_encoder_2_lr=1e-5, block_lrs=[0, *[1e-4] * 21, 2e-4], groups=[{"match": "x", "lr": 3e-4}]
    )  # pyright: ignore
    assert describe_learning_rates(rates, 5e-5) == "U-Net 5.00e-05 to 1.00e-04, text 2 5.00e-06, patterns 1.50e-04"
    groups = [{"match": "x", "lr": 3e-4}, {"match": "", "lr": 0}]
    assert describe_learning_rates(OptimConfig(lr=1e-4, groups=groups), 5e-5) == "patterns 1.50e-04"  # pyright: ignore


def test_flops_of_sdxl() -> None:
    """The numbers are three times the count of torch.utils.flop_counter for a forward pass."""
    sdxl = json.loads((ROOT / "configs/sdxl/unet/config.json").read_text())
    assert count_training_flops(sdxl, 77).compute(128 * 128) == 20_283_709_194_240
    assert count_training_flops(sdxl, 227).compute(104 * 152) == 19_988_481_638_400


def test_flops_are_those_that_torch_counts() -> None:
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    tiny = json.loads((ROOT / "configs/tiny/unet/config.json").read_text())
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(tiny)
        pooled = tiny["projection_class_embeddings_input_dim"] - 6 * tiny["addition_time_embed_dim"]
        conditions = {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}
        text = torch.zeros(1, 152, tiny["cross_attention_dim"])
        with FlopCounterMode(display=False) as forward:
            prediction = unet(torch.zeros(1, 4, 40, 24), torch.zeros(1), text, added_cond_kwargs=conditions).sample
        with FlopCounterMode(display=False) as backward:
            prediction.sum().backward()
    counted = count_training_flops(tiny, 152).compute(40 * 24)
    assert counted == 3 * forward.get_total_flops()
    # The first layers' inputs need no gradient.
    assert counted == pytest.approx(forward.get_total_flops() + backward.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989.5),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A40-12Q", None),  # a quarter, as a virtual machine sees it
    ],
)
def test_mfu_is_shown_only_if_the_peak_is_known(name: str, tflops: float | None) -> None:
    gpu = find_gpu(name)
    assert (gpu.peak_flops if gpu else None) == (None if tflops is None else tflops * 1e12)
