"""The only module that talks to DeepSpeed: one training engine with backward, step, state and full weights."""

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

# DeepSpeed would probe for accelerators, and warn, where there are none.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.utils import safe_get_full_fp32_param

from sdxl_trainer.configs.schema import EngineConfig

if not torch.cuda.is_available():
    # DeepSpeed would spend minutes compiling a shared-memory all-reduce that only its inference uses, and would fail
    # on a machine without a compiler.
    setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010 (a lazy attribute that type checkers do not see)
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's use of older names

STATE_TAG = "state"  # name of DeepSpeed's folder within a checkpoint
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# DeepSpeed's converter to other world sizes and stages asks for this in checkpoints of ZeRO 1 and 2.
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
        self._engine._copy_recovery_script = lambda save_path: None  # it would drop scripts where the job was started
        self._updating = threading.Lock()
        self._torn = False
        self.completed_steps = 0  # since the engine was made
        self._parameters = dict(self.model.named_parameters())

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

    def step(self) -> None:
        """Close a micro step; after the last one of a global batch, clip and update the weights."""
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return
        with self._updating:
            self._torn = True  # until the update is whole; an error inside leaves it so
            self._engine.step()
            self._torn = False
            self.completed_steps += 1

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

    def capture_state(self, alone: bool = False) -> dict[str, Any]:
        """This rank's files of a checkpoint, in DeepSpeed's own format: path within it → content, copied to the host.

        Args:
            alone: take no part in collectives, because other ranks may be dead; training cannot go on afterwards.
        """
        capture = _Capture(self._engine.checkpoint_engine)
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
        return capture.files

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. All ranks call it together.

        Raises:
            RuntimeError: DeepSpeed found no state in the folder.
        """
        path, _ = self._engine.load_checkpoint(str(folder), tag=STATE_TAG)
        if path is None:
            raise RuntimeError(f"{folder}: DeepSpeed found no state to load")

    def gather_weight(self, name: str) -> torch.Tensor:
        """One parameter whole, in fp32 from the masters, on the CPU. All ranks ask for the same one together."""
        parameter = self._parameters[name]
        full = safe_get_full_fp32_param(parameter) if self.zero_stage else parameter.detach()
        assert full is not None, f"DeepSpeed holds no master of {name}"
        return full.float().cpu()


class _Capture:
    """Stands in for DeepSpeed's checkpoint engine and keeps what would be written, so that a thread can write it."""

    def __init__(self, replaced: Any):
        self.replaced = replaced
        self.files: dict[str, Any] = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.files[path] = copy_to_host(state_dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.replaced, name)


def copy_to_host(content: Any) -> Any:
    """A copy of nested dicts, lists and tuples with all tensors on the CPU, sharing no memory with the original.

    A tensor that is a view is copied alone: torch.save would write the whole buffer behind it.
    """
    if isinstance(content, torch.Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        return type(content)((key, copy_to_host(value)) for key, value in content.items())
    if isinstance(content, (list, tuple)) and type(content) in (list, tuple):
        return type(content)(copy_to_host(value) for value in content)
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
        "bf16": {"enabled": config.precision == "bf16"},
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
