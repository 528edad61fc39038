"""Memory of a training step, as it is measured and logged."""

import torch
from loguru import logger

from sdxl_trainer.train.estimates.measured_memory import StepMemoryLogger


def test_memory_of_a_step_is_measured_in_the_second_one() -> None:
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(message.record["message"]))
    memory = StepMemoryLogger(torch.device("cpu"))
    try:
        for size_mb in (300, 150, 600):  # the second step is measured
            torch.ones(size_mb * 250_000)
            memory.note_step()
    finally:
        logger.remove(sink)
    assert len(lines) == 1
    assert 0.14 < float(lines[0].split("and ")[1].split()[0]) < 0.2
