"""Choices among CUDA kernels: the order of attention's back ends, and the limit of cuDNN's search."""

import pytest
import torch
from loguru import logger
from torch.nn.attention import SDPBackend

from sdxl_trainer.launch.kernels import MAX_SEARCHED_SIZES, list_attention_backends, search_convolutions, use_attention

CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
EFFICIENT, MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH


@pytest.mark.parametrize(
    ("choice", "capability", "backends"),
    [
        ("auto", (9, 0), [CUDNN, FLASH, EFFICIENT, MATH]),
        ("auto", (12, 0), [CUDNN, FLASH, EFFICIENT, MATH]),
        ("auto", (8, 9), [FLASH, CUDNN, EFFICIENT, MATH]),
        ("efficient", (9, 0), [EFFICIENT, CUDNN, FLASH, MATH]),
        ("sdpa", (9, 0), []),
        ("xformers", (9, 0), []),
    ],
)
def test_attention_tries_the_chosen_back_end_first(choice, capability, backends):
    assert list_attention_backends(choice, capability) == backends


def test_the_order_holds_within_the_block(monkeypatch):
    """PyTorch keeps the order for the whole process, so recomputation in autograd's threads follows it, too."""
    before = torch._C._get_sdp_priority_order()
    with use_attention("efficient"):
        assert torch._C._get_sdp_priority_order() == before  # a CPU has no such choice
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with use_attention("auto"):
        assert torch._C._get_sdp_priority_order()[:4] == [int(choice) for choice in (CUDNN, FLASH, EFFICIENT, MATH)]
    assert torch._C._get_sdp_priority_order() == before


def test_cudnn_searches_for_few_sizes_only():
    lines = []
    sink = logger.add(lambda message: lines.append(message.record["message"]))
    found = []
    for wanted, num_sizes in ((True, MAX_SEARCHED_SIZES), (True, MAX_SEARCHED_SIZES + 1), (False, 1)):
        with search_convolutions(wanted, num_sizes):
            found.append(torch.backends.cudnn.benchmark)
    logger.remove(sink)
    assert found == [True, False, False] and not torch.backends.cudnn.benchmark
    [line] = lines
    assert line.startswith("engine.cudnn_benchmark: off, because the training set has 21 buckets")
