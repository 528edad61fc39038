"""The only module that talks to DeepSpeed: one training engine with backward, step, state and full weights."""

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
from deepspeed.utils.tensor_fragment import fragment_address
from loguru import logger

from sdxl_trainer.configs.ema import EmaConfig
from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.launch.distributed import broadcast_tensor, read_environment, reduce_sum
from sdxl_trainer.train.engine.deepspeed_config import DTYPES, build_deepspeed_config, describe_deepspeed, spare_work
from sdxl_trainer.train.engine.ema import Ema, flatten
from sdxl_trainer.train.engine.host_memory import HostMemory, copy_to_host, copy_weights
from sdxl_trainer.train.engine.layout import Layout, Piece, describe_layout, list_masters
from sdxl_trainer.train.engine.resharding import AVERAGE, SavedState, Shard, build_shard, reshard
from sdxl_trainer.train.optim.optimizers import compile_at_first_call, guard_updates, restore_settings

if not torch.cuda.is_available():
    # DeepSpeed would spend minutes compiling a shared-memory all-reduce that only its inference uses, and would fail
    # on a machine without a compiler.
    setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010 (a lazy attribute that type checkers do not see)
# DeepSpeed asks of each optimizer whether it is Muon, and would bring in the whole compiler to decorate its kernels.
deepspeed.runtime.compiler.compile = lambda: compile_at_first_call  # pyright: ignore  (it does not see the module)
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's use of older names

STATE_TAG = "state"  # name of DeepSpeed's folder within a checkpoint
# What DeepSpeed's files hold besides tensors and plain values; nothing else is unpickled from them.
SAFE_TYPES: list[Any] = [fragment_address, ZeroStageEnum, LossScaler, DynamicLossScaler]
# DeepSpeed's own converter, should someone want to use it, asks for this in checkpoints of ZeRO 1 and 2.
UNIVERSAL_INFO = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}


class Engine:
    """A model under DeepSpeed ZeRO.

    Args:
        model: in fp32; DeepSpeed casts it to the precision of training and keeps fp32 masters.
        optimizer: over groups of the model's parameters; a group's `lr_scale` is what of the learning rate it gets.
        config: the `engine` section, with a stage (train/engine/defaults.py).
        batch: (global batch size, micro batch size, accumulation steps).
        max_grad_norm: gradients are scaled down to this global norm; 0 leaves them.
        ema: the `ema` section.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        config: EngineConfig,
        batch: tuple[int, int, int],
        max_grad_norm: float,
        ema: EmaConfig | None = None,
    ):
        assert config.zero_stage is not None, "settle_engine chooses a stage"
        self.zero_stage: int = config.zero_stage
        self.dtype = DTYPES[config.precision]
        self._lr_scales = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]
        rounded = config.precision in ("bf16", "fp16")
        rank, _, world_size = read_environment()
        exact = copy_weights(model, rank, world_size) if rounded else {}
        settings = build_deepspeed_config(config, batch, max_grad_norm, optimizer)
        logger.info("DeepSpeed: {}", describe_deepspeed(settings))
        engine, wrapped, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self._engine: Any = engine  # DeepSpeed's attributes are too loosely typed to be checked
        self._optimizer: Any = wrapped
        if not hasattr(wrapped, "overflow"):
            guard_updates(wrapped, max_grad_norm)
            self._engine._config.gradient_clipping = 0.0  # the guard clips
        spare_work(engine, wrapped, config)
        self._engine._copy_recovery_script = lambda save_path: None  # it would drop scripts where the job was started
        self._updating = threading.Lock()
        self._torn = False  # while the weights are of no one step; an error in the middle of an update leaves it so
        self._engine.basic_optimizer.register_step_pre_hook(lambda *_: setattr(self, "_torn", True))
        self.completed_steps = 0  # since the engine was made
        self._parameters = dict(self.model.named_parameters())
        self._host_memory = HostMemory()
        self._layout = self._describe_layout()
        self._pieces: dict[str, list[tuple[int, Piece]]] = {name: [] for name in self._layout.shapes}
        for number, flat in enumerate(self._layout.flats):
            for piece in flat.pieces:
                self._pieces[piece.name].append((number, piece))
        if rounded:
            self._set_masters(exact)
        if self.zero_stage == 0:
            # DeepSpeed has updated once, with a gradient of zero, which to Adam was the first step.
            self._engine.basic_optimizer.state.clear()
        self._replaced: list[torch.Tensor] = []  # see use_average
        self.ema = Ema(ema.decays, ema.warmup, self._list_masters()) if ema and ema.decays else None

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
            if self.ema and self._engine.was_step_applied():
                self.ema.update(self._list_masters())
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
        """Set the learning rate of every group, each by its scale."""
        for group, scale in zip(self._optimizer.param_groups, self._lr_scales, strict=True):
            group["lr"] = lr * scale

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

        They are in DeepSpeed's own format, and one more says where in them each parameter lies (resharding.py).

        Args:
            alone: take no part in collectives, because other ranks may be dead; training cannot go on afterwards.
            reuse: write over the copy that was made before, which the caller no longer needs. Memory that is there
                already takes a copy several times faster.
        """
        capture = _Capture(self._engine.checkpoint_engine, self._host_memory if reuse else None)
        self._put_back_weights()
        self._release_gathered()
        self._engine.checkpoint_engine = capture
        try:
            self._engine._save_checkpoint("", STATE_TAG, client_state=UNIVERSAL_INFO)
            if self._engine.save_zero_checkpoint:
                self._engine._save_zero_checkpoint("", STATE_TAG)
            if not alone:
                self._gather_again()
        finally:
            self._engine.checkpoint_engine = capture.replaced
        files, rank = capture.files, f"rank_{self._layout.rank:05d}.pt"
        files[f"{STATE_TAG}/layout_{rank}"] = self._layout.to_plain()
        if self.ema and (self.zero_stage or self._layout.rank == 0):
            averages = {"num_updates": self.ema.num_updates, "averages": self.ema.averages}
            capture.save(averages, f"{STATE_TAG}/ema_{rank}")
        return files

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint, whatever number of ranks and ZeRO stage wrote it. All ranks call it together.

        The optimizer's settings are those of now; what it has learnt on the way is the checkpoint's.

        Raises:
            ReshardingError: the checkpoint cannot be taken up by these ranks.
        """
        saved, layout = SavedState(folder / STATE_TAG, map_file), self._layout
        fitting = next((rank for rank, other in enumerate(saved.layouts) if layout.fits(other)), None)
        if fitting is not None:
            shard = SavedState(folder / STATE_TAG, read_file).load_shard(fitting)
            shard = replace(shard, model=shard.model or saved.load_shard(0).model)
        else:
            logger.info(
                "the checkpoint of {} ranks at ZeRO stage {} is taken up by {} at stage {}",
                saved.world_size,
                saved.layouts[0].zero_stage,
                layout.world_size,
                layout.zero_stage,
            )
            shard = build_shard(layout, self._capture_template())
            reshard(shard, saved)
        settings = [dict(group) for group in self._optimizer.param_groups]
        self._load_shard(shard)
        restore_settings(self._optimizer.param_groups, settings, self._engine.basic_optimizer)
        self._load_averages(saved)

    def _load_averages(self, saved: SavedState) -> None:
        """What the checkpoint has of the averages that are kept now; the others begin with its weights."""
        if not self.ema:
            return
        kept = saved.read_averages()
        self.ema.num_updates = kept["num_updates"]
        for key, averages in self.ema.averages.items():
            for flat, average, master in zip(self._layout.flats, averages, self._list_masters(), strict=True):
                average.copy_(flatten(master))
                for piece in flat.pieces if key in kept["averages"] else ():
                    if saved.has(piece.name):
                        part = saved.read(piece.name, AVERAGE + key, piece.start, piece.numel)
                        average[piece.offset : piece.offset + piece.numel] = part.to(average.device)

    def _list_masters(self) -> list[torch.Tensor]:
        return list_masters(self._engine.optimizer)

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
        self._release_gathered()
        self._engine.load_module_state_dict(model)
        if self.zero_stage:
            shards = [None] * self._engine.world_size
            shards[self._engine.global_rank] = shard.owner
            optimizer.load_state_dict(shards, load_optimizer_states=True, load_from_fp32_weights=True)
        else:
            optimizer.load_state_dict(shard.owner)
        for counter in ("global_steps", "global_samples", "skipped_steps"):
            setattr(self._engine, counter, model[counter])
        self._gather_again()

    def gather_weight(self, name: str, average: str | None = None) -> torch.Tensor:
        """One parameter whole, in fp32 from the masters, on the CPU. All ranks ask for the same one together.

        Args:
            average: take the moving average of this decay (a key of `ema.averages`) instead of the weight itself.
        """
        if name in self._pieces:
            return self._gather(name, self._list_flats(average)).cpu()
        with deepspeed.zero.GatheredParameters([self._parameters[name]]):  # frozen, and in pieces under ZeRO-3
            return self._parameters[name].detach().float().to("cpu", copy=True)

    @property
    def trained(self) -> list[str]:
        """Names of all parameters that are trained, the same on every rank."""
        return list(self._pieces)

    @property
    def averages(self) -> list[str]:
        """The moving averages that are kept, each by its decay."""
        return list(self.ema.averages) if self.ema else []

    @contextmanager
    def use_average(self, average: str | None) -> Iterator[None]:
        """Within it the model has a moving average for its weights; None leaves it as it is. All ranks enter together.

        A rank keeps what it holds of the weights meanwhile, and puts it back without the others, who may be dead then.
        """
        if average is None:
            yield
            return
        self._replaced = [weight.clone() for weight in self._list_local_weights()]
        try:
            self._set_weights(self._list_flats(average))
            yield
        finally:
            self._put_back_weights()

    def _put_back_weights(self) -> None:
        """Undo what `use_average` has replaced, if anything."""
        if self._replaced:
            for weight, replaced in zip(self._list_local_weights(), self._replaced, strict=True):
                weight.copy_(replaced)
            self._replaced = []

    def _list_local_weights(self) -> list[torch.Tensor]:
        """What this rank holds of the trained weights between steps: under ZeRO-3 its share of each, else all."""
        self._release_gathered()
        return [getattr(self._parameters[name], "ds_tensor", self._parameters[name]).data for name in self._pieces]

    def _release_gathered(self) -> None:
        """Let go of weights that ZeRO-3 has gathered."""
        if self.zero_stage == 3:
            self._engine.optimizer.checkpoint_event_prologue()

    def _gather_again(self) -> None:
        """Gather those weights that ZeRO-3 keeps gathered."""
        if self.zero_stage == 3:
            self._engine.optimizer.checkpoint_event_epilogue()

    def _list_flats(self, average: str | None = None) -> list[torch.Tensor]:
        """This rank's part of the masters, or of an average of theirs, as flat fp32 tensors."""
        if average is not None:
            assert self.ema is not None, "no averages are kept"
            return self.ema.averages[average]
        return [flatten(master) for master in self._list_masters()]

    def _gather(self, name: str, flats: list[torch.Tensor]) -> torch.Tensor:
        """A trained parameter put together from what each rank's flat tensors have of it."""
        shape = self._layout.shapes[name]
        whole = torch.zeros(torch.Size(shape).numel(), device=self.device)
        for number, piece in self._pieces[name]:
            part = flats[number][piece.offset : piece.offset + piece.numel]
            whole[piece.start : piece.start + piece.numel] = part.to(self.device)
        return (reduce_sum(whole) if self.zero_stage else whole).view(shape)

    @torch.no_grad()
    def _set_masters(self, held: dict[str, torch.Tensor]) -> None:
        """Begin with masters that were never rounded: DeepSpeed makes them from weights that it has cast to 16 bit.

        Args:
            held: this rank's share of the weights (`copy_weights`), which it sends to the others.
        """
        masters, engine = self._list_masters(), self._engine
        trained = (name for name, parameter in self._parameters.items() if parameter.requires_grad)
        for number, name in enumerate(trained):
            shape = torch.Size(self._layout.shapes[name])
            whole = held[name].to(self.device) if name in held else torch.empty(shape, device=self.device)
            broadcast_tensor(whole, number % engine.world_size)
            for flat, piece in self._pieces[name]:
                if masters[flat].shape == shape:  # whole, in whatever layout of memory
                    masters[flat].copy_(whole)
                else:
                    part = whole.view(-1)[piece.start : piece.start + piece.numel]
                    masters[flat][piece.offset : piece.offset + piece.numel] = part

    @torch.no_grad()
    def _set_weights(self, flats: list[torch.Tensor]) -> None:
        for name in self._pieces:
            whole, parameter = self._gather(name, flats), self._parameters[name]
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):  # does nothing but under ZeRO-3
                parameter.data.copy_(whole)


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
