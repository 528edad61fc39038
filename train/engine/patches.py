"""Every change to DeepSpeed's behaviour, and every use of private parts of DeepSpeed and PyTorch.

Written for deepspeed 0.19.8 and torch 2.13.0. Each function states why it is needed and which public way was looked
for. tests/train/engine/test_patches.py fails when something that a function relies on is gone or has another shape.

Import DeepSpeed from here (`from sdxl_trainer.train.engine.patches import deepspeed`), so that it loads patched.
Rooms below this one (train/networks, train/optim) use public parts only.
"""

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch

# DeepSpeed's documented choice of accelerator, read when it is imported. Without it, DeepSpeed probes for accelerators
# and warns that there are none.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
import deepspeed.runtime.compiler
from deepspeed.accelerator import cuda_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION, ZeroStageEnum
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.tensor_fragment import fragment_address

# Types in DeepSpeed's checkpoint files besides tensors and plain values; nothing else is unpickled from them.
# Looked for: a list of DeepSpeed's own. It loads its files with `weights_only=False`.
SAFE_TYPES: list[Any] = [fragment_address, ZeroStageEnum, LossScaler, DynamicLossScaler]


def skip_op_probe() -> None:
    """Without a GPU, declare that none of DeepSpeed's compiled operators is compatible.

    Why: DeepSpeed would spend minutes compiling a shared-memory all-reduce that only its inference uses, and would fail
    on a machine without a compiler. Looked for: an environment variable; DS_BUILD_* act at installation only.
    """
    if not torch.cuda.is_available():
        # A lazy attribute of the module, which type checkers do not see.
        setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010


def ignore_nvml() -> None:
    """Let DeepSpeed read the free memory of a GPU from PyTorch if CUDA_VISIBLE_DEVICES has names instead of numbers.

    Why: with the package pynvml, `available_memory` reads these names (`GPU-...`, `MIG-...`) as numbers, and ZeRO 1 and
    2 end with a ValueError. Looked for: a setting; the accelerator has none.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if any(name and not name.strip().isdecimal() for name in visible.split(",")):
        cuda_accelerator.pynvml = None


def delay_kernel_compilation() -> None:
    """Let DeepSpeed's Muon kernels import the compiler when they are first called, not when they are defined.

    Why: DeepSpeed imports its Muon module to check the type of every optimizer. The decorator in it loads
    `torch._dynamo`, 1.5 s of every rank's start. Looked for: a setting; the decorator is unconditional.
    """
    deepspeed.runtime.compiler.compile = lambda: compile_at_first_call


def compile_at_first_call(function: Callable) -> Callable:
    """Decorate a function so that `torch.compile` compiles it when it is first called."""
    compiled = None

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal compiled
        compiled = compiled or torch.compile(function)
        return compiled(*arguments, **named)

    return call


def silence_renamed_functions() -> None:
    """Hide torch's warnings that functions have new names, which a user of them cannot call.

    Why: DeepSpeed calls the old `all_gather_into_tensor` and `reduce_scatter_tensor` at every step of ZeRO, and torch's
    own compiler the old `check` when it compiles Muon. Looked for: a setting of either; there is none, and a filter of
    warnings is Python's public way.
    """
    for module in ("torch.distributed", "torch._inductor"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)


def skip_gradient_allocation() -> None:
    """Let ZeRO 1 and 2 allocate no gradients of the masters when they are built, unless those stay, in host memory.

    Why: DeepSpeed allocates fp32 zeros for all masters and frees them again, which is the peak of memory while a run
    starts: 4 bytes a weight more than it holds afterwards. Looked for: a setting; there is none. Only Adagrad, which no
    setting here names, would need them.
    """
    initialize = DeepSpeedZeroOptimizer.initialize_optimizer_states

    def initialize_if_offloaded(self: Any) -> None:
        if self.cpu_offload or isinstance(self.optimizer, torch.optim.Adagrad):
            initialize(self)

    DeepSpeedZeroOptimizer.initialize_optimizer_states = initialize_if_offloaded


def keep_zero_optimizer() -> None:
    """Let ZeRO 1 in bf16 with fp32 accumulation use DeepSpeed's optimizer of ZeRO 1 and 2, as it does in fp16.

    Why: DeepSpeed takes `BF16_Optimizer` instead, which all-reduces whole gradients, applies gradients that are not
    finite, and keeps its state in attributes of its own. Looked for: a setting; only offloading the optimizer has this
    effect.
    """
    choose = DeepSpeedEngine._do_optimizer_sanity_check

    @wraps(choose)
    def choose_wrapper(self: Any, basic_optimizer: Any) -> Any:
        return ZERO_OPTIMIZATION if self.zero_optimization_stage() == 1 else choose(self, basic_optimizer)

    DeepSpeedEngine._do_optimizer_sanity_check = choose_wrapper


skip_op_probe()
ignore_nvml()
delay_kernel_compilation()
silence_renamed_functions()
skip_gradient_allocation()
keep_zero_optimizer()


def guard_updates(optimizer: Any, max_grad_norm: float) -> None:
    """Replace `step` of a plain torch optimizer by one that clips, and that skips gradients that are not finite.

    Why: for fp32 without ZeRO, DeepSpeed uses the optimizer as it is. Its own optimizers clip, keep the norm in
    `_global_grad_norm` and report a skipped update in `overflow`; the engine reads both from any optimizer. Looked for:
    torch's step hooks, which cannot skip a step, and DeepSpeed's `gradient_clipping`, which reports no norm. That
    setting must be 0 with this guard.

    Args:
        max_grad_norm: gradients are scaled down to this global norm; 0 leaves them.
    """
    update = optimizer.step
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step() -> None:
        # Read here once, because the host must know whether to update. Later it would wait for the update too.
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf).item()
        optimizer._global_grad_norm, optimizer.overflow = norm, not math.isfinite(norm)
        if not optimizer.overflow:
            update()

    optimizer.step = step


def skip_empty_groups(optimizer: Any) -> None:
    """Let each of ZeRO 3's updates see the one parameter group that it is for, as those of ZeRO 1 and 2 do.

    Why: DeepSpeed calls the optimizer once for each group, with all groups in it, of which the others are empty. Many
    optimizers count steps in their groups, and would count as many in one step as there are groups. Looked for: a
    setting; there is none.

    Args:
        optimizer: torch's, which DeepSpeed calls.
    """
    update = optimizer.step

    def step() -> None:
        groups = optimizer.param_groups
        optimizer.param_groups = [group for group in groups if group["params"]]
        try:
            update()
        finally:
            optimizer.param_groups = groups

    optimizer.step = step


def forget_first_update(optimizer: Any, settings: Sequence[Mapping[str, Any]]) -> None:
    """Clear an optimizer's state, and set its groups back.

    Why: without ZeRO, DeepSpeed updates 16-bit weights once with gradients of zero, which an optimizer counts as its
    first step: in its state, or in its groups. Looked for: a setting; there is none.

    Args:
        settings: of each group before DeepSpeed had it.
    """
    optimizer.state.clear()
    for group, begun in zip(optimizer.param_groups, settings, strict=True):
        parameters = group["params"]
        group.clear()
        group.update({**begun, "params": parameters})


def skip_gradient_allreduce(engine: Any) -> None:
    """Stop a single rank from averaging gradients with itself.

    Why: DeepSpeed copies each gradient into a bucket and back. Looked for: a setting; ZeRO 0 always averages.
    """
    engine.enable_backward_allreduce = False


def replace_zero_grad(engine: Any) -> None:
    """Replace `zero_grad` of the engine by a loop over a list of the parameters.

    Why: DeepSpeed's walks through the tree of modules at every step. Looked for: `zero_grad(set_to_none)` of the
    optimizer; with ZeRO 0 in fp32 the engine calls its own method only.
    """
    weights = list(engine.module.parameters())

    def zero_grad() -> None:
        for weight in weights:
            weight.grad = None

    engine.zero_grad = zero_grad


def skip_overflow_scan(optimizer: Any) -> None:
    """Let ZeRO 1 and 2 find gradients that are not finite by their norm alone, which every rank has.

    Why: DeepSpeed scans each gradient first. Looked for: `bf16.check_grad_overflow: false`, which switches off the
    check of the norm too, so that NaN reaches the weights.
    """
    optimizer.check_overflow = lambda **_: None


# Attributes in which DeepSpeed's optimizers keep their master weights, by stage and precision. A plain torch optimizer
# has `param_groups` alone.
MASTER_KINDS = (
    "fp32_partitioned_groups_flat",  # stage 3
    "single_partition_of_fp32_groups",  # stages 1 and 2
    "fp32_groups_flat",  # stage 0 in 16 bit, a fused optimizer
    "fp32_groups",  # stage 0 in 16 bit, any other optimizer
    "param_groups",
)


class MasterWeights(NamedTuple):
    """The master weights of a live engine, as DeepSpeed's optimizer keeps them."""

    kind: str  # one of MASTER_KINDS
    groups: list[list[Any]]  # the trained parameters by group
    tensors: list[torch.Tensor]  # fp32 tensors that the optimizer updates, in its order


def read_master_weights(optimizer: Any) -> MasterWeights:
    """Read the master weights of DeepSpeed's optimizer, and the parameters that they belong to.

    Why: averages, exports and checkpoints need this rank's masters without a collective. Looked for:
    `safe_get_full_fp32_param` gathers whole parameters, and `state_dict` copies everything.
    """
    kind = next(name for name in MASTER_KINDS if hasattr(optimizer, name))
    own_groups = [group["params"] for group in optimizer.param_groups]
    if kind == "param_groups":
        return MasterWeights(kind, own_groups, [parameter for group in own_groups for parameter in group])
    names = ("bit16_groups", "fp16_groups")  # at most one of them belongs to an optimizer
    groups = next(filter(None, (getattr(optimizer, name, None) for name in names)), own_groups)
    masters = getattr(optimizer, kind)
    tensors = [master for group in masters for master in group] if kind == "fp32_groups" else list(masters)
    return MasterWeights(kind, groups, tensors)


def count_group_masters(optimizer: Any) -> list[int]:
    """Count the tensors of master weights in each parameter group of a live engine.

    Why: a checkpoint of other groups cannot be loaded as it is, even where the tensors are the same. Looked for:
    `param_groups`, which ZeRO 3 keeps empty between updates.
    """
    if hasattr(optimizer, "sub_group_to_group_id"):
        owners = list(optimizer.sub_group_to_group_id.values())
        return [owners.count(number) for number in range(len(optimizer.param_groups))]
    return [len(group["params"]) for group in optimizer.param_groups]


class ParameterShare(NamedTuple):
    """Sizes of a parameter under ZeRO 3."""

    share: int  # values of each rank's part, padding included
    numel: int  # values of the whole parameter


def read_parameter_share(parameter: Any) -> ParameterShare:
    """Read how ZeRO 3 divides a parameter.

    Why: checkpoints record the place of every parameter. Looked for: a public attribute; there is none.
    """
    return ParameterShare(parameter.ds_tensor.ds_numel, parameter.ds_numel)


def abandon_gathers(engine: Any) -> None:
    """Let ZeRO 3 release weights whose gather never ends, without waiting for it.

    Why: `checkpoint_event_prologue` waits for gathers that are under way, or refuses them, so a rank could not save
    while another one hangs in the forward or backward pass. Nothing is lost: each rank keeps its own part. Looked for:
    an argument; there is none. Training cannot continue afterwards.
    """
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    coordinator._PartitionedParameterCoordinator__inflight_param_registry.clear()
    for parameter in engine.module.parameters():
        if parameter.ds_status == ZeroParamStatus.INFLIGHT:
            parameter.ds_status = ZeroParamStatus.AVAILABLE


def get_whole_shape(parameter: Any) -> tuple[int, ...]:
    """Return the shape of a whole parameter, which ZeRO 3 keeps beside its empty stand-in.

    Looked for: a public attribute; there is none.
    """
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def get_local_part(parameter: Any) -> torch.Tensor:
    """Return the part of a 16-bit weight that lies on this rank: the whole weight, except under ZeRO 3.

    Looked for: a public attribute; there is none.
    """
    return getattr(parameter, "ds_tensor", parameter).data


class FragmentOffsets(NamedTuple):
    """The part of a parameter that lies in this rank's flat tensor."""

    start: int  # first element of the part, counted in the parameter
    offset: int  # of that element in the flat tensor
    numel: int


def read_fragment_offsets(parameter: Any) -> FragmentOffsets | None:
    """Read the place of a parameter in this rank's flat tensor under ZeRO 1 and 2; None if no part lies there.

    Why: checkpoints record the place of every parameter. Looked for: `safe_get_full_fp32_param` and its siblings gather
    whole parameters by a collective and report no place; `param_slice_mappings` in the state dict lacks the start.
    """
    mapping = parameter._hp_mapping
    if not mapping:
        return None
    address = mapping.hp_fragment_address
    return FragmentOffsets(mapping.lp_fragment_address.start, address.start, address.numel)


class StateCopies(NamedTuple):
    """Functions that copy the content of a checkpoint's files. Each is called before the next file is built."""

    module: Callable[[Any], Any]
    optimizer: Callable[[Any], Any]


def collect_state_files(
    engine: Any, tag: str, client_state: dict[str, Any], copies: StateCopies, with_module: bool
) -> dict[str, Any]:
    """Return this rank's files of a checkpoint in DeepSpeed's own format: path → copied content. No collectives.

    Frozen weights are left out: they are those of the base model.

    Why: the public `save_checkpoint` writes to disk itself, between barriers, at which a rank waits forever if
    another one is dead. Looked for: DeepSpeed's checkpoint engines (`checkpoint.writer`), which run between the same
    barriers. The caller runs ZeRO-3's prologue and epilogue (`Weights.release_gathered`, `Weights.gather_persistent`).

    Args:
        tag: folder of the files.
        client_state: further entries of the module's file.
        copies: copy the module's file, and the file of the optimizer under ZeRO 1 to 3.
        with_module: return the file with the module's weights even if rank 0 alone writes it.
    """
    recorder = _Recorder(engine.checkpoint_engine, copies.module)
    replaced = engine.checkpoint_engine, engine.save_non_zero_checkpoint
    engine.checkpoint_engine = recorder
    engine.save_non_zero_checkpoint |= with_module
    try:
        engine._save_checkpoint("", tag, client_state=client_state, exclude_frozen_parameters=True)
    finally:
        engine.checkpoint_engine, engine.save_non_zero_checkpoint = replaced
    if engine.save_zero_checkpoint:
        # As `_save_zero_checkpoint`, which besides copies scripts into the working directory.
        content = {
            "optimizer_state_dict": engine.optimizer.state_dict(),
            "ds_config": engine.config,
            "ds_version": deepspeed.__version__,
        }
        recorder.files[engine._get_zero_ckpt_name("", tag)] = copies.optimizer(content)
    return recorder.files


class _Recorder:
    """Stand-in for DeepSpeed's checkpoint engine that keeps what would be written."""

    def __init__(self, replaced: Any, copy: Callable[[Any], Any]):
        self.files: dict[str, Any] = {}
        self._replaced = replaced
        self._copy = copy

    def save(self, state_dict: Any, path: str) -> None:
        self.files[path] = self._copy(state_dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._replaced, name)
