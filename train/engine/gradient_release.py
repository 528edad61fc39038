"""Gradient release: an engine that updates each weight when its gradient is there, and then frees the gradient.

The backward pass needs neither a gradient for each weight nor masters, so all of SDXL fits on one card. The price: an
error in a backward pass leaves weights that are halfway through an update, which no checkpoint may hold.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.configs.problems import FailedError, Problem
from sdxl_trainer.launch.distributed import broadcast_tensor, read_environment, reduce_sum, start_reduction
from sdxl_trainer.train.engine.deepspeed_config import DTYPES

MODEL_FILE = "mp_rank_00_model_states.pt"  # DeepSpeed's name for the file of a run without ZeRO
BUCKET_VALUES = 2**24  # gradients that ranks send each other at a time


def check_gradient_release(engine: EngineConfig, optim: OptimConfig, accumulation_steps: int) -> Iterator[Problem]:
    """Yield a problem for each setting that needs the gradients of all weights at the same time."""
    if not engine.gradient_release:
        if optim.clipping == "parameter":
            rule, cure = "needs engine.gradient_release", "leave it out, or set engine.gradient_release: true"
            yield Problem("optim.clipping", optim.clipping, rule, cure)
        return
    if accumulation_steps > 1:
        rule = f"leads to {accumulation_steps} micro steps a step, which engine.gradient_release cannot add up"
        cure = (
            f"raise train.micro_batch_size to {accumulation_steps} times its value, which keeps this batch; or set the "
            f"global batch to train.micro_batch_size times the number of ranks"
        )
        yield Problem("train.global_batch_size", None, rule, cure)
    if optim.max_grad_norm and optim.clipping == "global":
        rule = "needs the norm of all gradients, which engine.gradient_release never has at the same time"
        cure = "set it to 0, or set optim.clipping: parameter, which limits each weight tensor's norm"
        yield Problem("optim.max_grad_norm", optim.max_grad_norm, rule, cure)


class ReleasingEngine:
    """The part of DeepSpeed's engine that this project uses, with updates during the backward pass.

    Args:
        model: on this rank's device.
        optimizer: updates each weight by its own gradient alone.
        config: the `engine` section.
        max_norm: the gradient of each weight tensor is scaled down to this norm; 0 leaves it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        config: EngineConfig,
        max_norm: float,
    ):
        # Without the model's own `to`, in which diffusers warns of modules to keep in fp32.
        self.module = torch.nn.Module.to(model, DTYPES[config.precision])
        self.device = next(model.parameters()).device
        self.optimizer = self.basic_optimizer = optimizer
        self.global_rank, _, self.world_size = read_environment()
        self.global_steps = self.global_samples = self.skipped_steps = 0
        self.list_homes: Callable[[], Mapping[int, torch.Tensor]] | None = None  # of weights in host memory, by `id`
        self._max_norm = max_norm
        self._updates = SingleUpdates(optimizer)
        self._waiting: list[torch.nn.Parameter] = []  # have a gradient of this rank
        self._sent: SentGradients | None = None
        self._norms: list[torch.Tensor] = []
        self._grad_norm, self._is_finite = 0.0, True
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.data.copy_(broadcast_tensor(weight.data, 0))
                weight.register_post_accumulate_grad_hook(self._take_gradient)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Forward pass."""
        return self.module(*arguments, **named)

    def backward(self, loss: torch.Tensor) -> None:
        """Compute gradients and update the weights; do nothing if the loss of any rank is not finite.

        Raises:
            FailedError: a gradient is not finite, although the loss is. The weights are of no use then.
        """
        self._is_finite = not reduce_sum((~loss.detach().isfinite()).float())
        if not self._is_finite:
            return
        self._updates.begin_step()
        loss.backward()
        self.finish_updates()
        self._updates.end_step()
        self._grad_norm = float(torch.stack(self._norms).square().sum().sqrt())
        self._norms.clear()
        if self._grad_norm != self._grad_norm or self._grad_norm == float("inf"):
            raise FailedError(
                "a gradient is not finite although the loss is, and engine.gradient_release has updated weights with "
                "it; nothing is saved, and the next start resumes from the newest checkpoint"
            )

    def step(self) -> None:
        """Count the step. The backward pass has updated the weights."""
        self.global_steps += 1
        self.skipped_steps += not self._is_finite

    def finish_updates(self) -> None:
        """Update every weight whose gradient is there. All ranks call it together."""
        self._send_waiting()
        self._update_sent()

    def _take_gradient(self, weight: torch.nn.Parameter) -> None:
        """Update a weight whose gradient is complete; called by autograd."""
        if self.world_size == 1:
            self._update(weight)
            return
        self._waiting.append(weight)
        if sum(waiting.numel() for waiting in self._waiting) >= BUCKET_VALUES:
            self._send_waiting()

    def _send_waiting(self) -> None:
        """Start to add up the waiting gradients of all ranks, and update the weights whose sums are there."""
        waiting, self._waiting = self._waiting, []
        sent = SentGradients(waiting) if waiting else None
        self._update_sent()
        self._sent = sent

    def _update_sent(self) -> None:
        """Wait for the sums on their way, and update their weights."""
        if self._sent is not None:
            for weight in self._sent.receive(self.world_size):
                self._update(weight)
            self._sent = None

    def _update(self, weight: torch.nn.Parameter) -> None:
        """Clip the gradient of a weight, update the weight, and free the gradient."""
        assert weight.grad is not None, "autograd calls the hook when the gradient is there"
        norm = torch.linalg.vector_norm(weight.grad, dtype=torch.float32)
        self._norms.append(norm)
        if self._max_norm:
            weight.grad.mul_((self._max_norm / (norm + 1e-6)).clamp(max=1.0))
        self._updates.update(weight)
        weight.grad = None

    def is_gradient_accumulation_boundary(self) -> bool:
        """Return true: every micro step is a step."""
        return True

    def was_step_applied(self) -> bool:
        """Return whether the last step has updated the weights."""
        return self._is_finite

    def get_global_grad_norm(self) -> float:
        """Return the norm of all gradients of the last step, before clipping."""
        return self._grad_norm

    def fp16_enabled(self) -> bool:
        """Return false: there is no loss scale."""
        return False

    def zero_optimization_stage(self) -> int:
        """Return 0: nothing is sharded."""
        return 0

    def read_module(self) -> dict[str, torch.Tensor]:
        """Return the module's state, with the weights of offloaded blocks in host memory.

        A thread may read it while a forward pass runs, before a visiting block's copy to the device is made.
        """
        names = {name: id(weight) for name, weight in self.module.named_parameters()}
        homes = {} if self.list_homes is None else self.list_homes()
        return {name: homes.get(names.get(name, 0), value) for name, value in self.module.state_dict().items()}

    def collect_state_files(
        self, tag: str, client_state: Mapping[str, Any], copy: Callable[[Any], Any], with_module: bool
    ) -> dict[str, Any]:
        """Return this rank's files of a checkpoint, as DeepSpeed without ZeRO writes them: path → copied content."""
        if self.global_rank and not with_module:
            return {}
        frozen = {name for name, weight in self.module.named_parameters() if not weight.requires_grad}
        state = {name: value for name, value in self.read_module().items() if name not in frozen}
        content = {
            "module": state,
            "optimizer": self.optimizer.state_dict(),
            "global_steps": self.global_steps,
            "global_samples": self.global_samples,
            "skipped_steps": self.skipped_steps,
            "dp_world_size": self.world_size,
            "mp_world_size": 1,
            **client_state,
        }
        return {f"{tag}/{MODEL_FILE}": copy(content)}

    def load_module_state_dict(self, state: Mapping[str, Any], custom_load_fn: Callable[..., None]) -> None:
        """Load the module's weights from the content of the model's file."""
        custom_load_fn(src=state["module"], dst=self.module)


class SentGradients:
    """Gradients of several weights that are being added up over all ranks, in fp32."""

    def __init__(self, weights: list[torch.nn.Parameter]):
        self._weights = weights
        self._flat = torch.cat([weight.grad.reshape(-1).float() for weight in weights if weight.grad is not None])
        self._wait = start_reduction(self._flat)

    def receive(self, world_size: int) -> Iterator[torch.nn.Parameter]:
        """Wait for the sums, and yield each weight with its mean gradient."""
        self._wait()
        parts = self._flat.div_(world_size).split([weight.numel() for weight in self._weights])
        for weight, part in zip(self._weights, parts, strict=True):
            assert weight.grad is not None
            weight.grad.copy_(part.view_as(weight))
            yield weight


class SingleUpdates:
    """Updates of single weights by an optimizer that PyTorch lets update all of them only.

    Each weight gets an optimizer of its own that shares state and settings with the whole one, whose state dict so
    stays what it would be without.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._optimizer = optimizer
        self._singles: dict[torch.nn.Parameter, torch.optim.Optimizer] = {}
        optimizer.register_load_state_dict_post_hook(lambda _: self._singles.clear())

    def begin_step(self) -> None:
        """Take over the present settings of the groups, such as the learning rate."""
        if not self._singles:
            self._build()
        for group in self._optimizer.param_groups:
            settings = {name: value for name, value in group.items() if name != "params"}
            for weight in group["params"]:
                self._singles[weight].param_groups[0].update(copy_tensors(settings))

    def update(self, weight: torch.nn.Parameter) -> None:
        """Update one weight by its gradient."""
        self._singles[weight].step()

    def end_step(self) -> None:
        """Give the groups what the optimizer keeps in them, such as the number of steps, so that it is saved."""
        for group in self._optimizer.param_groups:
            for weight in group["params"][:1]:
                kept = self._singles[weight].param_groups[0]
                group.update({name: kept[name] for name in kept.keys() - {"params", "first_tensor"}})

    def _build(self) -> None:
        number = 0
        for group in self._optimizer.param_groups:
            for weight in group["params"]:
                single = object.__new__(type(self._optimizer))
                vars(single).update(vars(self._optimizer))
                # Optimizers that draw random numbers draw others for each tensor.
                settings = copy_tensors({name: value for name, value in group.items() if name != "params"})
                single.param_groups = [{**settings, "params": [weight], "first_tensor": number}]
                self._singles[weight] = single
                number += 1


def copy_tensors(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's settings with copies of its tensors, such as a counter of steps that updates count up."""
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in settings.items()}
