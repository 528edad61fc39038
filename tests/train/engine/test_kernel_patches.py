"""train/engine/kernel_patches.py: equal results on one rank and on two, and DeepSpeed's parts that are replaced."""

# ruff: noqa: TID251 (the tests look into DeepSpeed itself)

import inspect

import pytest
import torch
from campaigns import patched_updates
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from programs import run_program

from sdxl_trainer.launch.distributed import init_ranks
from sdxl_trainer.train.engine import kernel_patches, patches


def get_source(function: object) -> str:
    return " ".join(inspect.getsource(function).split())  # pyright: ignore


def list_arguments(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)[1:]  # pyright: ignore


def test_the_versions_are_those_of_the_other_patches() -> None:
    versions = "deepspeed 0.19.8 and torch 2.13.0"
    assert versions in (patches.__doc__ or "") and versions in (kernel_patches.__doc__ or "")


@pytest.mark.parametrize("case", patched_updates.CASES)
def test_one_rank_trains_to_the_same_weights(case: patched_updates.Case) -> None:
    assert patched_updates.compare(case, init_ranks()) == ""


def test_two_ranks_train_to_the_same_weights() -> None:
    printed = run_program("tests/campaigns/patched_updates.py", ranks=2)
    assert printed.count(": ok") == len(patched_updates.CASES), printed


def test_a_gradient_that_is_not_finite_is_reported_by_the_norm() -> None:
    """A step that is skipped is tested in test_stages.py and test_non_finite.py."""
    for value in (torch.nan, torch.inf, -torch.inf):
        squares = kernel_patches.add_squares([[torch.ones(2)], [torch.tensor([1.0, value]).bfloat16()]], "cpu")
        assert squares.isfinite().tolist() == [True, False]
    padding = torch.full((3,), 5.0)
    padding._zero_padding = True  # pyright: ignore
    own = [torch.tensor([3.0]), padding, torch.tensor([[4.0]]), torch.zeros(2)]
    own = kernel_patches.list_gradients(own, [None, None])
    assert kernel_patches.add_squares([own, [], own[:1]], "cpu").tolist() == [25, 0, 9]
    assert kernel_patches.add_squares([[], []], "cpu").tolist() == [0, 0]


def test_the_norm_is_computed_and_used_where_it_is_replaced() -> None:
    source = get_source(DeepSpeedZeroOptimizer.step)
    assert "scaled_global_grad_norm = self.scaled_global_norm()" in source
    assert source.count("self.unscale_and_clip_grads([single_grad_partition], scaled_global_grad_norm)") == 2
    assert "is_invalid_grad_norm(scaled_global_grad_norm)" in source
    assert "self._global_grad_norm = scaled_global_grad_norm / prev_scale" in source
    assert list_arguments(DeepSpeedZeroOptimizer.unscale_and_clip_grads) == ["grad_groups_flat", "total_norm"]


def test_gradients_are_collected_and_reduced_by_the_replaced_methods() -> None:
    optimizer = DeepSpeedZeroOptimizer
    collected = "self.reduce_independent_p_g_buckets_and_remove_grads(param, i)"
    assert collected in get_source(optimizer.reduce_ready_partitions_and_remove_grads)
    source = get_source(optimizer.reduce_independent_p_g_buckets_and_remove_grads)
    for part in (
        "if bucket.elements + param.numel() > self.reduce_bucket_size:",
        "self.reduce_ipg_grads(comm_dtype=comm_dtype)",
        "bucket.index = 1 - bucket.index",
        "new_grad_tensor = bucket.buffer[bucket.index].narrow(0, bucket.elements, param.numel())",
        "grad_reduc.data = new_grad_tensor.data.view_as(grad_reduc)",
        "bucket.copy_streams.add(get_accelerator().current_stream())",
        "bucket.elements += param.numel()",
        "bucket.grads.append(grad_reduc) bucket.params.append((i, param.param_idx_in_group, param_id))",
    ):
        assert part in source
    assert "self.reduce_ipg_grads()" in get_source(optimizer.independent_gradient_partition_epilogue)
    source = get_source(optimizer.allreduce_and_copy)
    assert source.index("if self.overlap_comm:") < source.index("get_accelerator().synchronize()")
    assert "self._add_to_grad_partition_buffer(output, synced) buf.copy_(synced)" in source
    assert "with get_accelerator().stream(stream):" in get_source(optimizer.average_tensor)
    assert "self.allreduce_and_copy(" in get_source(optimizer.allreduce_no_retain)
    # A gradient with an fp32 sum is not read after it was added.
    kept = "if self._use_compact_grad_partition_buffer(group_idx): if self.use_grad_accum_attribute: "
    assert kept + "self.clear_grad_attribute(param) return" in get_source(optimizer.copy_grads_in_partition)


def test_a_single_rank_reduces_buckets_by_the_replaced_methods() -> None:
    optimizer = DeepSpeedZeroOptimizer
    source = get_source(optimizer.reduce_ipg_grads)
    assert "self._buffered_reduce_fallback_preserving_fp32(bucket.grads, bucket.params, comm_dtype," in source
    assert "self.buffered_reduce_fallback(None, bucket.grads, comm_dtype," in source
    source = get_source(optimizer._get_compact_grad_partition_slice)
    assert "dest_offset = int(self.grad_partition_insertion_offset[group_idx][partition_id][param_id])" in source
    assert "return grad_group.flat_partition.narrow(0, dest_offset, int(num_elements))" in source
    assert list_arguments(optimizer._get_compact_grad_partition_buffer) == ["group_idx"]


def test_neighbouring_runs_are_joined() -> None:
    run = kernel_patches._Run
    runs = [run(0, 0, 3), run(0, 3, 2), run(0, 6, 1), run(1, 7, 1), run(1, 8, 4)]
    assert kernel_patches.join_runs(runs) == [(0, 0, 5), (0, 6, 1), (1, 7, 5)]


def test_flat_buffers_of_sums_are_chosen_by_the_replaced_method() -> None:
    optimizer = DeepSpeedZeroOptimizer
    assert list_arguments(optimizer._use_compact_grad_partition_buffer) == ["group_idx"]
    assert "if self._use_compact_grad_partition_buffer(i):" in get_source(
        optimizer.independent_gradient_partition_epilogue
    )


def test_zero_1_adds_micro_steps_by_the_replaced_methods() -> None:
    optimizer = DeepSpeedZeroOptimizer
    source = get_source(optimizer.process_gradients)
    assert (
        "self.setup_buckets() if self.use_grad_accum_attribute: self._fill_param_grad_accum_attribute(param)" in source
    )
    assert "if self.partition_gradients or self.overlap_comm: self.reduce_ready_partitions_and_remove_grads" in source
    assert "self.is_gradient_accumulation_boundary()" in get_source(optimizer.reduce_ready_partitions_and_remove_grads)
    assert "self.process_gradients(param, i)" in get_source(optimizer.create_gradient_handling_hooks)
    assert "if self.use_grad_accum_attribute: self.fill_grad_accum_attribute()" in get_source(
        optimizer.backward_epilogue
    )
    assert "self.optimizer.reduce_gradients(pipeline_parallel=" in get_source(DeepSpeedEngine)


def test_the_device_is_synchronized_after_the_last_reduction_only_with_overlap() -> None:
    source = get_source(DeepSpeedZeroOptimizer.independent_gradient_partition_epilogue)
    parts = ("self.reduce_ipg_grads()", "if self.overlap_comm:", "get_accelerator().synchronize()")
    assert [source.index(part) for part in parts] == sorted(source.index(part) for part in parts)
    assert source.count("synchronize()") == 1 and source.count("overlap_comm") == 1
    called = "self.independent_gradient_partition_epilogue()"
    assert called in get_source(DeepSpeedZeroOptimizer.overlapping_partition_gradients_reduce_epilogue)


def test_zero_0_takes_sums_of_another_type_as_gradients() -> None:
    source = get_source(DeepSpeedEngine._get_gradients_for_reduction)
    assert "param.grad = torch.zeros(param.size(), dtype=param.dtype, device=param.device)" in source
    assert "self._get_gradients_for_reduction()" in get_source(DeepSpeedEngine.buffered_allreduce_fallback)
    assert "loss.backward(**backward_kwargs)" in get_source(DeepSpeedEngine)
    assert "self.allreduce_gradients()" in get_source(DeepSpeedEngine._backward_epilogue)


def test_zero_0_in_16_bit_has_the_parts_that_are_replaced() -> None:
    source = get_source(FP16_UnfusedOptimizer.step)
    assert "self.unscale_and_clip_grads(self._global_grad_norm) self.optimizer.step()" in source
    assert source.count("return self._skip_invalid_grad_norm()") == 2
    assert list_arguments(FP16_UnfusedOptimizer.unscale_and_clip_grads) == ["total_norm", "apply_scale"]
    arguments = ["small_bucket", "dp_group", "dp_world_size"]
    assert list_arguments(DeepSpeedEngine.allreduce_and_copy) == arguments
