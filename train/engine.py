"""The only module that talks to DeepSpeed: one training engine with backward, step, state and full weights."""

import inspect
import math
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

# DeepSpeed would probe for accelerators, and warn, where there are none.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.tensor_fragment import fragment_address
from loguru import logger

from sdxl_trainer.configs.schema import EngineConfig
from sdxl_trainer.train.resharding import Layout, SavedState, Shard, build_shard, describe_layout, reshard

if not torch.cuda.is_available():
    # DeepSpeed would spend minutes compiling a shared-memory all-reduce that only its inference uses, and would fail
    # on a machine without a compiler.
    setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010 (a lazy attribute that type checkers do not see)
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's use of older names

STATE_TAG = "state"  # name of DeepSpeed's folder within a checkpoint
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What DeepSpeed's files hold besides tensors and plain values; nothing else is unpickled from them.
SAFE_TYPES: list[Any] = [fragment_address, ZeroStageEnum, LossScaler, DynamicLossScaler]
# DeepSpeed's own converter, should someone want to use it, asks for this in checkpoints of ZeRO 1 and 2.
UNIVERSAL_INFO = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}


class Engine:
    """A model under DeepSpeed ZeRO.

    Args:
        model: in fp32; DeepSpeed casts it to the precision of training and keeps fp32 masters.
        optimizer: over groups of the model's parameters.
        config: the `engine` section.
        batch: (global batch size, micro batch size, accumulation steps).
        max_grad_norm: gradients are scaled down to this global norm; 0 leaves them.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        config: EngineConfig,
        batch: tuple[int, int, int],
        max_grad_norm: float,
    ):
        self.zero_stage = config.zero_stage
        self.dtype = DTYPES[config.precision]
        engine, wrapped, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=build_deepspeed_config(config, batch, max_grad_norm),
            dist_init_required=False,
        )
        self._engine: Any = engine  # DeepSpeed's attributes are too loosely typed to be checked
        self._optimizer: Any = wrapped
        if not hasattr(wrapped, "overflow"):
            guard_updates(wrapped, max_grad_norm)
            self._engine._config.gradient_clipping = 0.0  # the guard clips
        self._engine._copy_recovery_script = lambda save_path: None  # it would drop scripts where the job was started
        self._updating = threading.Lock()
        self._torn = False  # while the weights are of no one step; an error in the middle of an update leaves it so
        self._engine.basic_optimizer.register_step_pre_hook(lambda *_: setattr(self, "_torn", True))
        self.completed_steps = 0  # since the engine was made
        self._parameters = dict(self.model.named_parameters())
        self._host_memory = HostMemory()

    @property
    def model(self) -> Any:
        """The wrapped module; call its parts for forward passes without gradient, as sampling does."""
        return self._engine.module

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._engine.device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients of `loss`, already divided by the accumulation steps inside, averaged over ranks."""
        self._engine.backward(loss)

    def step(self) -> bool:
        """Close a micro step; after the last one of a global batch, clip and update the weights.

        Returns:
            Whether the weights were updated. A gradient that is not finite, on any rank, leaves weights and optimizer
            as they were, and every rank is told so; the step counts as completed all the same.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return False
        with self._updating:
            # Ranks first agree on the gradients' norm. If one is dead then, no weight has been touched yet.
            self._engine.step()
            self._torn = False
            self.completed_steps += 1
        return self._engine.was_step_applied()

    @contextmanager
    def hold_updates(self, timeout_seconds: float) -> Iterator[int | None]:
        """Keep updates from beginning, and tell how many optimizer steps this engine has completed since it was made.

        None if an update is under way and does not end in time: then the state is of no one step.
        """
        held = self._updating.acquire(timeout=timeout_seconds)
        try:
            yield self.completed_steps if held and not self._torn else None
        finally:
            if held:
                self._updating.release()

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every group."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def grad_norm(self) -> float:
        """Global norm of the gradients of the last step, before clipping."""
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    @property
    def loss_scale(self) -> float | None:
        """What the loss is multiplied with for the sake of fp16 gradients; None in other precisions."""
        return float(self._engine._get_optimizer_loss_scale()) if self._engine.fp16_enabled() else None

    def capture_state(self, alone: bool = False, reuse: bool = False) -> dict[str, Any]:
        """This rank's files of a checkpoint: path within it → content, copied to the host.

        They are in DeepSpeed's own format, and one more says where in them each parameter lies (train/resharding.py).

        Args:
            alone: take no part in collectives, because other ranks may be dead; training cannot go on afterwards.
            reuse: write over the copy that was made before, which the caller no longer needs. Memory that is there
                already takes a copy several times faster.
        """
        capture = _Capture(self._engine.checkpoint_engine, self._host_memory if reuse else None)
        optimizer = self._engine.optimizer
        prologue = getattr(optimizer, "checkpoint_event_prologue", None)  # ZeRO-3 only: lets go of gathered weights
        self._engine.checkpoint_engine = capture
        try:
            if prologue:
                prologue()
            self._engine._save_checkpoint("", STATE_TAG, client_state=UNIVERSAL_INFO)
            if self._engine.save_zero_checkpoint:
                self._engine._save_zero_checkpoint("", STATE_TAG)
            if prologue and not alone:
                optimizer.checkpoint_event_epilogue()
        finally:
            self._engine.checkpoint_engine = capture.replaced
        layout = self._describe_layout()
        return capture.files | {f"{STATE_TAG}/layout_rank_{layout.rank:05d}.pt": layout.to_plain()}

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint, whatever number of ranks and ZeRO stage wrote it. All ranks call it together.

        The optimizer's settings are those of now; what it has learnt on the way is the checkpoint's.

        Raises:
            ReshardingError: the checkpoint cannot be taken up by these ranks.
        """
        saved, layout = SavedState(folder / STATE_TAG, map_file), self._describe_layout()
        fitting = next((rank for rank, other in enumerate(saved.layouts) if layout.fits(other)), None)
        if fitting is not None:
            shard = SavedState(folder / STATE_TAG, read_file).load_shard(fitting)
            shard = replace(shard, model=shard.model or saved.load_shard(0).model)
        else:
            logger.info("the checkpoint of {} ranks at ZeRO stage {} is taken up by {} at stage {}", saved.world_size,
                        saved.layouts[0].zero_stage, layout.world_size, layout.zero_stage)  # fmt: skip
            shard = build_shard(layout, self._capture_template())
            reshard(shard, saved)
        settings = [dict(group) for group in self._optimizer.param_groups]
        self._load_shard(shard)
        restore_settings(self._optimizer.param_groups, settings, self._engine.basic_optimizer)

    def _describe_layout(self) -> Layout:
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        engine = self._engine
        return describe_layout(engine.optimizer, names, engine.global_rank, engine.world_size, self.zero_stage)

    def _capture_template(self) -> dict[str, Any]:
        """This rank's files as they would be if it wrote the module's weights too, as only rank 0 does."""
        writes_module = self._engine.save_non_zero_checkpoint
        self._engine.save_non_zero_checkpoint = True
        try:
            return self.capture_state()
        finally:
            self._engine.save_non_zero_checkpoint = writes_module

    def _load_shard(self, shard: Shard) -> None:
        """Hand a rank's files, made for this very layout, to DeepSpeed."""
        optimizer, model = self._engine.optimizer, shard.model
        assert model is not None
        prologue = getattr(optimizer, "checkpoint_event_prologue", None)
        if prologue:
            prologue()
        self._engine.load_module_state_dict(model)
        if self.zero_stage:
            shards = [None] * self._engine.world_size
            shards[self._engine.global_rank] = shard.owner
            optimizer.load_state_dict(shards, load_optimizer_states=True, load_from_fp32_weights=True)
        else:
            optimizer.load_state_dict(shard.owner)
        for counter in ("global_steps", "global_samples", "skipped_steps"):
            setattr(self._engine, counter, model[counter])
        if prologue:
            optimizer.checkpoint_event_epilogue()

    def gather_weight(self, name: str) -> torch.Tensor:
        """One parameter whole, in fp32 from the masters, on the CPU. All ranks ask for the same one together."""
        parameter = self._parameters[name]
        full = safe_get_full_fp32_param(parameter) if self.zero_stage else parameter.detach()
        assert full is not None, f"DeepSpeed holds no master of {name}"
        return full.float().cpu()


def guard_updates(optimizer: Any, max_grad_norm: float) -> None:
    """Let a plain torch optimizer, which DeepSpeed uses as it is for fp32 without ZeRO, do what DeepSpeed's own do:
    clip, tell the norm, and make no update of gradients that are not finite (`overflow`, which the engine reads)."""
    update = optimizer.step
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step() -> None:
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
        optimizer._global_grad_norm, optimizer.overflow = norm, not bool(norm.isfinite())
        if not optimizer.overflow:
            update()

    optimizer.step = step


class _Capture:
    """Stands in for DeepSpeed's checkpoint engine and keeps what would be written, so that a thread can write it."""

    def __init__(self, replaced: Any, memory: "HostMemory | None"):
        self.replaced = replaced
        self.files: dict[str, Any] = {}
        self._memory = memory.begin() if memory else None

    def save(self, state_dict: Any, path: str) -> None:
        self.files[path] = copy_to_host(state_dict, self._memory)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.replaced, name)


def read_file(path: Path) -> Any:
    """One of DeepSpeed's files, read whole into memory."""
    with torch.serialization.safe_globals(SAFE_TYPES):
        return torch.load(path, map_location="cpu", weights_only=True)


def map_file(path: Path) -> Any:
    """One of DeepSpeed's files, its tensors mapped from disk: only what is looked at is read."""
    with torch.serialization.safe_globals(SAFE_TYPES):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def restore_settings(groups: list[dict[str, Any]], settings: list[dict[str, Any]], optimizer: Any) -> None:
    """Set what the optimizer's constructor takes back to the settings of now; a checkpoint brings those of then.

    What is not an argument of it is memory, such as the step size that Prodigy has found.
    """
    names = set(inspect.signature(type(optimizer).__init__).parameters) - {"self", "params"}
    for group, wanted in zip(groups, settings, strict=True):
        group.update({name: value for name, value in wanted.items() if name in names})


class HostMemory:
    """Tensors on the host that take copies of the same things in the same order, again and again."""

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []
        self._next = 0

    def begin(self) -> "HostMemory":
        """The next copy is the first one again."""
        self._next = 0
        return self

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the host."""
        place, self._next = self._next, self._next + 1
        held = self._tensors[place] if place < len(self._tensors) else None
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            self._tensors[place : place + 1] = [held]
        return held.copy_(tensor)


def copy_to_host(content: Any, memory: HostMemory | None = None) -> Any:
    """A copy of nested dicts, lists and tuples with all tensors on the CPU, sharing no memory with the original.

    A tensor that is a view is copied alone: torch.save would write the whole buffer behind it.
    """
    if isinstance(content, torch.Tensor):
        return memory.copy(content.detach()) if memory else content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        return type(content)((key, copy_to_host(value, memory)) for key, value in content.items())
    if isinstance(content, (list, tuple)) and type(content) in (list, tuple):
        return type(content)(copy_to_host(value, memory) for value in content)
    return content


def build_deepspeed_config(config: EngineConfig, batch: tuple[int, int, int], max_grad_norm: float) -> dict[str, Any]:
    """DeepSpeed's JSON for our settings, with the user's own merged over it."""
    global_batch_size, micro_batch_size, accumulation_steps = batch
    settings: dict[str, Any] = {
        "train_batch_size": global_batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": {"stage": config.zero_stage},
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": True},
        # Any torch optimizer whose update is elementwise is sound on a shard; the list DeepSpeed trusts is shorter.
        "zero_allow_untrusted_optimizer": True,
        "steps_per_print": 2**31,
    }
    return _merge(settings, config.deepspeed)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = _merge(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return merged
