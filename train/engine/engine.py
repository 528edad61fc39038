"""One training engine over DeepSpeed ZeRO: build, forward, backward, step."""

import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from sdxl_trainer.configs.engine import WEIGHT_TYPES, EngineConfig
from sdxl_trainer.configs.schema import EmaConfig
from sdxl_trainer.launch.activity import ACTIVITY
from sdxl_trainer.launch.distributed import read_environment
from sdxl_trainer.train.engine.block_offload import BlockOffload
from sdxl_trainer.train.engine.deepspeed_config import (
    DTYPES,
    BatchSizes,
    build_deepspeed_config,
    describe_deepspeed_config,
    resolve_gradient_types,
    uses_muon,
)
from sdxl_trainer.train.engine.gradient_release import ReleasingEngine, copy_tensors
from sdxl_trainer.train.engine.host_memory import HostMemory
from sdxl_trainer.train.engine.kernel_patches import add_up_at_zero_0, start_fewer_kernels
from sdxl_trainer.train.engine.patches import (
    deepspeed,
    forget_first_update,
    guard_updates,
    replace_zero_grad,
    skip_empty_groups,
    skip_gradient_allreduce,
    skip_overflow_scan,
)
from sdxl_trainer.train.engine.snapshot import capture_state, load_state
from sdxl_trainer.train.engine.update_guard import UpdateGuard
from sdxl_trainer.train.engine.weights import Weights, copy_fp32_share
from sdxl_trainer.train.networks.blocks import choose_offloaded_blocks


class Engine:
    """A model under DeepSpeed ZeRO, or with gradient release (gradient_release.py).

    Args:
        model: in the precision of training, or in fp32, which DeepSpeed casts to that precision.
        optimizer: over groups of the model's parameters; the learning rate of a group is multiplied by its `lr_scale`.
        config: the `engine` section, with a ZeRO stage (`resolve_zero_stage`).
        max_grad_norm: gradients are scaled down to this global norm; 0 leaves them.
        ema: the `ema` section.
        exact_weights: name and value of trained weights in full precision. The fp32 masters of a 16-bit run begin as
            these, or as the model's own weights if those are in fp32.

    Attributes:
        weights: access to the trained weights by name, and their moving averages.
        dtype: data type in which the model computes.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        config: EngineConfig,
        batch: BatchSizes,
        max_grad_norm: float,
        ema: EmaConfig | None = None,
        exact_weights: Iterable[tuple[str, torch.Tensor]] = (),
    ):
        assert config.zero_stage is not None, "resolve_zero_stage chooses a stage"
        self.zero_stage: int = config.zero_stage
        self.dtype = DTYPES[config.precision]
        self._lr_scales = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]
        rank, _, world_size = read_environment()
        settings = [copy_tensors(group) for group in optimizer.param_groups]
        has_masters = config.precision in ("bf16", "fp16")
        copies = copy_fp32_share(model, rank, world_size) if has_masters else None
        if config.gradient_release:
            self._engine: Any = ReleasingEngine(model, optimizer, config, max_grad_norm)
        else:
            self._engine = _build_deepspeed(model, optimizer, config, batch, max_grad_norm)
        self._updates_in_backward = config.gradient_release
        self._offload = _offload_blocks(self._engine, config) if config.offload_blocks else None
        self._guard = UpdateGuard(self._engine.device)
        exact_weights = exact_weights if has_masters else ()
        self.weights = Weights(self._engine, copies, exact_weights, ema, self._guard.mark.record)
        if self.zero_stage == 0 and not config.gradient_release:
            forget_first_update(self._engine.basic_optimizer, settings)
        self._host_memory = HostMemory()
        self._lends_state = config.offload_optimizer
        # Set while no other thread reads the live state (see `capture_state`).
        self._state_is_free = threading.Event()
        self._state_is_free.set()
        self._engine.basic_optimizer.register_step_pre_hook(lambda *_: self._begin_writing())
        # DeepSpeed moves the momentum of Muon before the ranks agree on the norm.
        self._writes_early = uses_muon(optimizer)

    @property
    def model(self) -> Any:
        """The wrapped module; call its parts for forward passes without gradient, as sampling does."""
        return self._engine.module

    @property
    def completed_steps(self) -> int:
        """Optimizer steps since the engine was built, skipped updates included."""
        return self._guard.completed_steps

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self._engine.device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients of `loss`, averaged over ranks; the engine divides it by the accumulation steps."""
        if self._updates_in_backward:
            self._begin_writing()
        self._engine.backward(loss)
        if self._offload is not None:
            self._offload.end_backward()

    def step(self) -> bool:
        """Close a micro step; after the last one of a global batch, clip and update the weights.

        Returns:
            Whether the weights were updated, equal on every rank. A gradient that is not finite, on any rank, leaves
            weights and optimizer unchanged, but the step still counts as completed.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return False
        ACTIVITY.follow(self._state_is_free.wait)
        with self._guard.update():
            if self._writes_early:
                self._begin_writing()
            # The ranks first agree on the gradients' norm. The hook of the optimizer marks the end of that.
            self._engine.step()
            if self._engine.was_step_applied():
                self.weights.update_averages()
        return self._engine.was_step_applied()

    def _begin_writing(self) -> None:
        """Wait until nothing reads the weights, and keep saves from starting until the step ends."""
        self.weights.finish_reading()
        self._guard.begin_writing()

    def hold_updates(self, timeout_seconds: float) -> AbstractContextManager[int | None]:
        """Keep weights from being changed within the context; see `UpdateGuard.hold`."""
        return self._guard.hold(timeout_seconds)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every group to `lr` times the group's scale."""
        for group, scale in zip(self._engine.optimizer.param_groups, self._lr_scales, strict=True):
            group["lr"] = lr * scale

    def grad_norm(self) -> float | None:
        """Return the global norm of the gradients of the last step, before clipping.

        None with Muon at ZeRO 1 to 3, where DeepSpeed replaces gradients by Muon's updates before it takes the norm.
        """
        if self._writes_early and self.zero_stage:
            return None
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    @property
    def loss_scale(self) -> float | None:
        """Factor of the loss that keeps fp16 gradients in range; None in other precisions."""
        return float(self._engine.optimizer.loss_scale) if self._engine.fp16_enabled() else None

    def read_local_module(self) -> dict[str, torch.Tensor]:
        """Return this rank's own copy of the wrapped module's state, without collectives."""
        is_released = isinstance(self._engine, ReleasingEngine)
        return self._engine.read_module() if is_released else self.model.state_dict()

    def capture_state(self, alone: bool = False, reuse: bool = False, lend: bool = False) -> dict[str, Any]:
        """Return this rank's files of a checkpoint: path within it → content, copied to the host.

        Args:
            alone: take no part in collectives, because other ranks may be dead; training cannot continue afterwards.
            reuse: overwrite the copy that was captured before, which the caller no longer needs.
            lend: with `engine.offload_optimizer`, return the optimizer's state itself, which is in host memory
                already. The next update waits for `release_state`; forward and backward passes do not.
        """
        lend = lend and self._lends_state
        if lend:
            self._state_is_free.clear()
        memory = self._host_memory.rewind() if reuse else None
        return capture_state(self._engine, self.weights, memory, alone, lend=lend)

    def release_state(self) -> None:
        """Allow updates again after the caller has written the state that `capture_state` has lent."""
        self._state_is_free.set()

    def load_state(self, folder: Path) -> None:
        """Load a checkpoint that any number of ranks has written at any ZeRO stage. All ranks call it together.

        Raises:
            ReshardingError: these ranks cannot load the checkpoint.
        """
        load_state(self._engine, self.weights, folder)


def _offload_blocks(engine: Any, config: EngineConfig) -> BlockOffload:
    """Let blocks of the U-Net wait in host memory: whole with gradient release, else their frozen weights alone."""
    assert config.gradient_checkpointing == "full", "plan_memory chooses it"
    unet = engine.module.unet
    blocks = choose_offloaded_blocks(unet, config.offload_blocks)
    if isinstance(engine, ReleasingEngine):
        offload = BlockOffload(unet, blocks, engine.device, engine.optimizer, engine.finish_updates)
        engine.list_homes = offload.list_homes
        return offload
    return BlockOffload(unet, blocks, engine.device, None)


def _build_deepspeed(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    config: EngineConfig,
    batch: BatchSizes,
    max_grad_norm: float,
) -> Any:
    """Build DeepSpeed's engine and apply the patches that suit its stage and precision.

    The result is typed as Any because DeepSpeed's attributes are too loosely typed to be checked.
    """
    settings = build_deepspeed_config(config, batch, max_grad_norm, optimizer)
    types = resolve_gradient_types(config, batch.world_size, batch.accumulation_steps, uses_muon(optimizer))
    sent = f", sent in {types.communication}" if batch.world_size > 1 else ""
    described = describe_deepspeed_config(settings)
    logger.info("DeepSpeed: {}, gradients added in {}{}", described, types.accumulation, sent)
    # DeepSpeed uses a plain optimizer as it is: it neither clips by its norm nor skips an update.
    is_plain = config.zero_stage == 0 and config.precision == "fp32"
    if is_plain:
        settings["gradient_clipping"] = 0.0
    if config.zero_stage == 3:
        gather_adapters_with_layers(model)
    built: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    engine = built[0]
    if is_plain:
        guard_updates(engine.optimizer, max_grad_norm)
    own_type = WEIGHT_TYPES[config.precision]
    if config.zero_stage == 0 and (batch.accumulation_steps > 1 or types.accumulation != own_type):
        add_up_at_zero_0(engine, DTYPES[types.accumulation])
    if config.zero_stage == 0 and engine.world_size == 1:
        skip_gradient_allreduce(engine)
        replace_zero_grad(engine)
    if config.zero_stage in (1, 2) and not config.offload_optimizer and engine.optimizer.compute_grad_norm:
        skip_overflow_scan(engine.optimizer)
    if config.zero_stage == 3:
        skip_empty_groups(engine.basic_optimizer)
    start_fewer_kernels(engine, DTYPES[types.accumulation], uses_muon(optimizer))
    return engine


def gather_adapters_with_layers(model: torch.nn.Module) -> None:
    """Let ZeRO 3 gather all weights of a layer with an adapter for that layer's passes.

    ZeRO 3 gathers weights for the module that holds them, when it is called. PEFT computes DoRA, LoHa and LoKr from the
    weights of modules that it does not call.
    """
    for layer in model.modules():
        if hasattr(layer, "base_layer"):
            for weight in layer.parameters():
                deepspeed.zero.register_external_parameter(layer, weight)
