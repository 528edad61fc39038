"""The only module that talks to DeepSpeed: one training engine with backward, step, state and full weights."""

import os
import warnings
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
        self._parameters = dict(self.model.named_parameters())

    @property
    def model(self) -> torch.nn.Module:
        """The wrapped model; call it for a forward pass without gradient, as sampling does."""
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
        self._engine.step()

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every group."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def grad_norm(self) -> float:
        """Global norm of the gradients of the last step, before clipping."""
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def save(self, folder: Path, client_state: dict[str, Any]) -> None:
        """Write this rank's part of the state under `folder`. All ranks call it together."""
        self._engine.save_checkpoint(str(folder), tag=STATE_TAG, client_state=client_state, save_latest=False)

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
