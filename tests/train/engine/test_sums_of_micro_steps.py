"""train/engine/gradient_sums.py: sums equal those of adding each gradient by itself, in any order of parameters."""

import torch

from sdxl_trainer.train.engine.gradient_sums import GradientSums, flatten


def draw_parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Return parameters of several shapes; one is in channels_last."""
    shapes = [(3,), (2, 5), (4, 3, 2, 2), (7,)]
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    parameters[2].data = parameters[2].data.to(memory_format=torch.channels_last)
    return parameters


def test_sums_equal_those_of_single_gradients_in_any_order() -> None:
    generator = torch.Generator().manual_seed(0)
    for kind in (torch.float32, torch.bfloat16):
        parameters = draw_parameters(kind)
        sums, expected = GradientSums(parameters, torch.float32), [torch.zeros(one.shape) for one in parameters]
        # The second micro step has the order of the first, the third another one, the fourth lacks a gradient.
        for order in ([0, 1, 2, 3], [0, 1, 2, 3], [3, 1, 2, 0], [0, 1, 2]):
            for number in order:
                parameter = parameters[number]
                gradient = torch.randn(parameter.shape, generator=generator).to(kind)
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
                expected[number] += gradient.float()
                sums.take(parameter)
            assert sums.add_waiting() == [parameters[number] for number in order]
            assert all(parameter.grad is None for parameter in parameters)
        totals = sums.pop_all()
        for parameter, total in zip(parameters, expected, strict=True):
            assert totals[parameter].dtype == torch.float32 and totals[parameter].equal(total)
            assert totals[parameter].stride() == parameter.stride()
        assert sums.add_waiting() == [] and sums.pop_all() == {}


def test_a_share_of_all_gradients_waits() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(10)) for _ in range(160)]
    sums, added = GradientSums(parameters, torch.float32), []
    for number in range(30):
        parameters[number].grad = torch.ones(10)
        if sums.take(parameters[number]) and sums.take(parameters[number]):  # the same one is taken once
            added.append(len(sums.add_waiting()))
    assert added == [5] * 6  # 1/32 of 160
    sums.drop(parameters[:5])
    assert set(sums.pop_all()) == set(parameters[5:30])


def test_values_are_flattened_in_the_order_of_memory() -> None:
    values = torch.arange(24.0).view(2, 3, 2, 2)
    assert flatten(values).tolist() == list(range(24))
    last = values.to(memory_format=torch.channels_last)
    assert flatten(last)[:3].tolist() == [0, 4, 8] and flatten(last).data_ptr() == last.data_ptr()
