"""Patches of DeepSpeed that only lower the number of kernels and of waits for the device in a step.

Written for deepspeed 0.19.8 and torch 2.13.0, by the rules of patches.py. The results stay the same to the bit, except
where a function says otherwise. SDXL's U-Net has 1,680 weights, so a kernel for each is thousands in a step, which take
longer to start than to run. `python benchmarks/launches.py` counts them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

from sdxl_trainer.train.engine.gradient_sums import GradientSums
from sdxl_trainer.train.engine.patches import deepspeed


def start_fewer_kernels(engine: Any, sum_dtype: torch.dtype, is_muon: bool) -> None:
    """Apply the patches of this module that suit an engine of ZeRO 0, 1 or 2.

    Args:
        sum_dtype: of the sums of gradients at ZeRO 0.
        is_muon: the optimizer is Muon, whose updates have a scale of their own.
    """
    stage = engine.zero_optimization_stage()
    if stage == 0:
        keep_averaged_gradients(engine, sum_dtype)
        if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
            update_masters_together(engine.optimizer)
    if stage not in (1, 2):
        return
    optimizer: Any = engine.optimizer
    spread_reduced_gradients(optimizer)
    if optimizer.cpu_offload:
        return
    if optimizer.compute_grad_norm and not is_muon:
        measure_norm_at_once(optimizer)
    if stage == 2 and optimizer.gradient_accumulation_dtype == torch.float32 and not is_muon:
        add_in_flat_buffers(optimizer)
    if optimizer.use_grad_accum_attribute:
        add_together_before_reducing(optimizer)
    if engine.world_size == 1 and not optimizer.contiguous_gradients:
        keep_gradients_of_one_rank(optimizer)
    elif optimizer.contiguous_gradients:
        fill_buckets_in_pieces(optimizer)
    if optimizer.overlap_comm:
        finish_without_waiting(optimizer)


def measure_norm_at_once(optimizer: Any) -> None:
    """Let ZeRO 1 and 2 compute the norm of all gradients by few operators, and read it on the host once.

    Why: DeepSpeed casts each gradient to fp64 and takes its norm, 2 kernels a weight. It then sums over the ranks group
    by group, and checks the norm on the host group by group when it clips. Looked for: a setting; `compute_grad_norm:
    false` excludes clipping.
    """
    norm = torch.zeros(())
    factor: Any = None  # of this update; None before it is computed

    def compute_norm(norm_type: int = 2) -> float:
        nonlocal norm, factor
        parts = enumerate(optimizer.params_in_partition)
        own = [list_gradients(optimizer.averaged_gradients[group], parameters) for group, parameters in parts]
        squares = add_squares(own, optimizer.device)
        deepspeed.comm.all_reduce(squares, group=optimizer.dp_process_group)
        norm, factor = torch.linalg.vector_norm(squares.sqrt(), norm_type), None
        return norm.item()

    def scale_gradients(gradients: Sequence[torch.Tensor], _: object) -> None:
        nonlocal factor
        scale = optimizer.loss_scale
        if optimizer.clip_grad == 0.0 and scale == 1.0:
            return
        if factor is None:
            excess = (norm / scale + 1e-6) / optimizer.clip_grad if optimizer.clip_grad > 0.0 else None
            factor = 1.0 / (scale if excess is None else excess.clamp(min=1.0) * scale)
        for gradient in gradients:
            gradient.data.mul_(factor)

    optimizer.scaled_global_norm, optimizer.unscale_and_clip_grads = compute_norm, scale_gradients


def list_gradients(gradients: Sequence[Any], parameters: Sequence[Any]) -> list[torch.Tensor]:
    """Return a group's gradients on this rank without the padding between them and at the end.

    Args:
        parameters: those that the gradients belong to.
    """
    own = [gradient.data for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
    return own[: len(parameters)]


def add_squares(groups: Sequence[Sequence[torch.Tensor]], device: torch.device | str) -> torch.Tensor:
    """Return the sum of the squares of each group of gradients, [number of groups] in fp32, computed in fp64."""
    gradients = [gradient for group in groups for gradient in group]
    if not gradients:
        return torch.zeros(len(groups), device=device)
    squares = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64)).square()
    return torch.stack([part.sum() for part in squares.split([len(group) for group in groups])]).float()


def get_current_stream() -> Any:
    """Return the device's stream that work joins now."""
    accelerator: Any = deepspeed.accelerator.get_accelerator()
    return accelerator.current_stream()


class _Piece(NamedTuple):
    """A gradient that waits to be copied into the bucket."""

    gradient: torch.Tensor
    start: int  # of its place in the bucket


def fill_buckets_in_pieces(optimizer: Any) -> None:
    """Let ZeRO 1 and 2 copy gradients into the bucket many at a time.

    Why: DeepSpeed copies each gradient by a kernel of its own when autograd hands it over. Looked for: a setting;
    `contiguous_gradients: false` copies whole buckets at once, but then all-reduces them, which sends twice as much.
    """
    ((dtype, bucket),) = optimizer.ipg_buckets.items()
    # ZeRO 1 holds the sums until they are copied, so none are freed by copying them earlier.
    most_waiting_values = optimizer.reduce_bucket_size // (1 if optimizer.use_grad_accum_attribute else 3)
    reduce, collect_one = optimizer.reduce_ipg_grads, optimizer.reduce_independent_p_g_buckets_and_remove_grads
    waiting: list[_Piece] = []

    def fill() -> None:
        if not waiting:
            return
        buffer, end = bucket.buffer[bucket.index], bucket.elements
        flat = [piece.gradient.reshape(-1) for piece in waiting]
        torch.cat(flat, out=buffer[waiting[0].start : end])
        for gradient, start in waiting:
            gradient.data = buffer[start : start + gradient.numel()].view_as(gradient)
        waiting.clear()
        if optimizer.overlap_comm and optimizer.reduction_stream is not None:
            bucket.copy_streams.add(get_current_stream())

    def collect(parameter: Any, group: int) -> None:
        size = parameter.numel()
        if not 0 < size <= optimizer.reduce_bucket_size:
            collect_one(parameter, group)
            return
        if bucket.elements + size > optimizer.reduce_bucket_size:
            optimizer.reduce_ipg_grads(comm_dtype=dtype)
            if optimizer.overlap_comm:
                bucket.index = 1 - bucket.index
        number = optimizer.get_param_id(parameter)
        assert not optimizer.params_already_reduced[number], "a gradient was computed twice"
        gradient = optimizer.get_gradient_for_reduction(parameter)
        waiting.append(_Piece(gradient, bucket.elements))
        bucket.elements += size
        bucket.grads.append(gradient)
        bucket.params.append((group, parameter.param_idx_in_group, number))
        if bucket.elements - waiting[0].start >= most_waiting_values:
            fill()

    def fill_and_reduce(comm_dtype: torch.dtype | None = None) -> None:
        fill()
        reduce(comm_dtype=comm_dtype)

    optimizer.reduce_ipg_grads = fill_and_reduce
    optimizer.reduce_independent_p_g_buckets_and_remove_grads = collect


def spread_reduced_gradients(optimizer: Any) -> None:
    """Let ZeRO 1 and 2 add reduced gradients to their sums by few operators, without synchronizing the device.

    Why: DeepSpeed adds each gradient of a bucket by itself, and copies it back into the bucket, where nothing reads it
    afterwards if its sum is kept elsewhere. With `overlap_comm`, it also synchronizes the device before each part that
    it reduces to one rank, to free gradients outside the bucket's buffer (`contiguous_gradients: false`). Nothing then
    overlaps. Looked for: a setting; there is none.
    """

    def reduce(
        small_bucket: list[torch.Tensor],
        communication_data_type: torch.dtype,
        rank: int | None = None,
        log: object = None,
        divide: bool = True,
        process_group: Any = None,
        output_bucket: list[torch.Tensor | None] | None = None,
    ) -> None:
        # The caller has entered the stream of reductions.
        group = process_group or optimizer.dp_process_group
        reduced = optimizer.allreduce_bucket(
            small_bucket, communication_data_type, rank=rank, divide=divide, process_group=group
        )
        if optimizer.overlap_comm and optimizer.reduction_stream is not None:
            for gradient in small_bucket:
                gradient.record_stream(optimizer.reduction_stream)
        if rank is None or rank == deepspeed.comm.get_rank(group=group):
            spread(reduced, small_bucket, output_bucket or [None] * len(small_bucket), optimizer.unflatten)

    optimizer.allreduce_and_copy = reduce


def spread(
    reduced: torch.Tensor, gradients: Sequence[torch.Tensor], sums: Sequence[torch.Tensor | None], unflatten: Any
) -> None:
    """Add parts of a flat tensor to their sums; copy parts without a sum back to their gradients."""
    whole = next((total for total in sums if total is not None), None)
    parts = unflatten(reduced if whole is None else reduced.to(whole.dtype), gradients)
    rows = list(zip(gradients, sums, parts, strict=True))
    added = [(total, part) for _, total, part in rows if total is not None]
    copied = [(gradient, part) for gradient, total, part in rows if total is None]
    if added:
        torch._foreach_add_([total for total, _ in added], [part for _, part in added])
    if copied:
        torch._foreach_copy_([gradient for gradient, _ in copied], [part for _, part in copied])


def keep_gradients_of_one_rank(optimizer: Any) -> None:
    """Let a single rank with ZeRO 1 or 2 send no gradients to itself; those with an fp32 sum are added to it at once.

    Why: DeepSpeed copies each bucket, reduces it on one rank, adds each part to its sum, and copies each back. Looked
    for: a setting; `contiguous_gradients: false`, which this needs, omits the copy into the bucket only.
    """

    def add_up(gradients: list[torch.Tensor], places: list[tuple[int, int, int]], *more: Any, **named: Any) -> None:
        rows = []
        for gradient, (group, _, number) in zip(gradients, places, strict=True):
            start = optimizer.grad_partition_insertion_offset[group][0][number]
            rows.append((_Run(group, start, gradient.numel()), gradient.reshape(-1)))
            optimizer.clear_grad_attribute(optimizer.param_dict[number])
        rows.sort(key=lambda row: row[0])
        runs, parts = [run for run, _ in rows], [part for _, part in rows]
        if parts[0].dtype != torch.float32:
            runs = join_runs(runs)
            parts = list(torch.cat(parts).split([run.numel for run in runs]))
        buffers = {group: optimizer._get_compact_grad_partition_buffer(group).flat_partition for group, _, _ in runs}
        sums = [buffers[group][start : start + numel] for group, start, numel in runs]
        add_lists(sums, parts)

    optimizer._buffered_reduce_fallback_preserving_fp32 = add_up
    optimizer.buffered_reduce_fallback = lambda *_, **__: None


class _Run(NamedTuple):
    """Neighbouring values of the flat buffer of a group's sums."""

    group: int
    start: int
    numel: int


def join_runs(runs: Sequence[_Run]) -> list[_Run]:
    """Join sorted runs that follow each other without a gap."""
    joined: list[_Run] = []
    for run in runs:
        last = joined[-1] if joined else None
        if last is not None and (last.group, last.start + last.numel) == run[:2]:
            joined[-1] = last._replace(numel=last.numel + run.numel)
        else:
            joined.append(run)
    return joined


def add_lists(sums: Sequence[torch.Tensor], added: Sequence[torch.Tensor]) -> None:
    """Add tensors to fp32 sums. PyTorch adds a list together only if all have one type."""
    if added[0].dtype == torch.float32:
        torch._foreach_add_(list(sums), list(added))
        return
    for total, part in zip(sums, added, strict=True):
        total.add_(part)


def add_in_flat_buffers(optimizer: Any) -> None:
    """Let ZeRO 2 in fp32 add gradients up in flat buffers, as DeepSpeed does in 16 bit with sums in fp32.

    Why: DeepSpeed copies each reduced gradient, adds each copy to a sum of its own, and concatenates the sums for the
    update. Looked for: a setting; there is none.
    """
    optimizer._use_compact_grad_partition_buffer = lambda _: True


def add_together_before_reducing(optimizer: Any) -> None:
    """Let ZeRO 1 add the gradients of all micro steps, which each rank keeps whole until the last, by few operators.

    Why: DeepSpeed casts and adds each gradient by itself. Looked for: a setting; there is none.
    """
    groups = {parameter: number for number, group in enumerate(optimizer.bit16_groups) for parameter in group}
    sums, reduce = GradientSums(groups, optimizer.gradient_accumulation_dtype), optimizer.reduce_gradients

    def add() -> None:
        added = sums.add_waiting()
        for parameter in added:
            parameter.grad_accum = sums.get(parameter)  # pyright: ignore
        if optimizer.is_gradient_accumulation_boundary():
            # DeepSpeed frees a sum once it is reduced.
            sums.drop(added)
        if optimizer.overlap_comm:
            for parameter in added:
                optimizer.reduce_ready_partitions_and_remove_grads(parameter, groups[parameter])

    def process(parameter: torch.Tensor, _: int) -> None:
        optimizer.setup_buckets()
        if sums.take(parameter):
            add()

    def add_and_reduce(**settings: Any) -> None:
        add()
        sums.pop_all()
        reduce(**settings)

    optimizer.process_gradients, optimizer.fill_grad_accum_attribute = process, add
    optimizer.reduce_gradients = add_and_reduce


def finish_without_waiting(optimizer: Any) -> None:
    """Let the device's stream of work, and not the host, wait for the last reductions of a micro step.

    Why: with `overlap_comm`, DeepSpeed synchronizes the device at the end of each backward pass, so that the host can
    prepare no work ahead. Looked for: a setting; there is none.
    """
    finish = optimizer.independent_gradient_partition_epilogue

    def finish_on_stream() -> None:
        optimizer.reduce_ipg_grads()
        if optimizer.reduction_stream is not None:
            get_current_stream().wait_stream(optimizer.reduction_stream)
        optimizer._clear_previous_reduced_grads()
        optimizer.overlap_comm = False
        try:
            finish()  # whose buckets are empty now
        finally:
            optimizer.overlap_comm = True

    optimizer.independent_gradient_partition_epilogue = finish_on_stream


def add_up_at_zero_0(engine: Any, dtype: torch.dtype) -> None:
    """Let ZeRO 0 add the gradients of all micro steps up in a type of their own, by few operators.

    Why: DeepSpeed raises NotImplementedError for another type than the weights', but takes fp32 gradients as they are.
    Looked for: a setting; there is none for ZeRO 0. PyTorch's `grad_dtype` casts and adds each gradient by itself.
    """
    weights = [weight for weight in engine.module.parameters() if weight.requires_grad]
    finish, sums = engine._backward_epilogue, GradientSums(weights, dtype)

    def take(weight: torch.Tensor) -> None:
        if sums.take(weight):
            sums.add_waiting()

    def add_and_finish() -> None:
        sums.add_waiting()
        if engine.is_gradient_accumulation_boundary():
            for weight, total in sums.pop_all().items():
                weight.grad = total
        finish()

    for weight in weights:
        if dtype != weight.dtype:
            weight.grad_dtype = None  # any
        weight.register_post_accumulate_grad_hook(take)
    engine._backward_epilogue = add_and_finish


def update_masters_together(optimizer: Any) -> None:
    """Let ZeRO 0 in 16 bit update all masters by few operators.

    Why: DeepSpeed scans, casts, measures, scales and copies each weight by itself: 19 kernels for each, and the host
    waits for one of them. Gradients are clipped by their norm in fp64 here; DeepSpeed rounds them to 16 bit before, and
    takes it in fp32. Looked for: a setting; DeepSpeed treats only its own fused optimizers otherwise.
    """
    weights = [weight for group in optimizer.fp16_groups for weight in group]
    masters = [master for group in optimizer.fp32_groups for master in group]

    def step(closure: None = None) -> bool:
        for weight, master in zip(weights, masters, strict=True):
            master.grad = torch.zeros_like(master) if weight.grad is None else None
        given = [
            (weight.grad, master) for weight, master in zip(weights, masters, strict=True) if weight.grad is not None
        ]
        for (_, master), gradient in zip(given, cast_together([gradient for gradient, _ in given]), strict=True):
            master.grad = gradient
        gradients = [master.grad for master in masters]
        norm = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64)).square().sum().sqrt().item()
        if norm != norm or norm in (float("inf"), -float("inf")):
            return optimizer._skip_invalid_grad_norm()
        optimizer.overflow, optimizer._global_grad_norm = False, norm
        optimizer._update_scale(False)
        scale = optimizer.unscale_and_clip_grads(norm, apply_scale=False)
        if scale != 1.0:
            torch._foreach_mul_(gradients, 1.0 / scale)
        optimizer.optimizer.step()
        for master in masters:
            master.grad = None
        torch._foreach_copy_([weight.data for weight in weights], [master.data for master in masters])
        return False

    optimizer.step = step


def cast_together(gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return gradients in fp32; those that are in fp32 are returned as they are."""
    others = [gradient for gradient in gradients if gradient.dtype != torch.float32]
    cast = [torch.empty_like(gradient, dtype=torch.float32) for gradient in others]
    if others:
        torch._foreach_copy_(cast, others)
    found = iter(cast)
    return [gradient if gradient.dtype == torch.float32 else next(found) for gradient in gradients]


def keep_averaged_gradients(engine: Any, dtype: torch.dtype) -> None:
    """Let the gradients of ZeRO 0 stay in the flat tensors in which they were averaged over ranks.

    Why: DeepSpeed copies each back by itself. It hands on aliases of the gradients, which cannot give the gradients
    other memory. For a weight without a gradient it makes one in the weight's type, beside sums in another; here it has
    the type of the sums. Looked for: a setting; there is none.
    """
    weights = [weight for weight in engine.module.parameters() if weight.requires_grad and weight.numel()]

    def collect() -> tuple[list[torch.Tensor | None], dict[str, list[torch.Tensor]]]:
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight, dtype=dtype)
        return [weight.grad for weight in weights], {}

    def reduce(small_bucket: list[torch.Tensor], dp_group: Any, dp_world_size: int | None = None) -> None:
        reduced = engine.allreduce_bucket(small_bucket, dp_group, dp_world_size)
        for gradient, part in zip(small_bucket, engine.unflatten(reduced, small_bucket), strict=True):
            if gradient.is_contiguous():
                gradient.data = part.data
            else:
                gradient.copy_(part)

    engine._get_gradients_for_reduction, engine.allreduce_and_copy = collect, reduce
