"""Block offload: blocks of the U-Net wait in host memory, and visit the device for their forward and backward passes.

A block's weights lie in one page-locked buffer. During a visit its parameters point into a copy of that buffer on the
device, which a side stream makes while the block before runs. After a backward pass, what gradient release has updated
is written back; after a forward pass nothing is.

Every block must be checkpointed. Autograd then keeps nothing of a weight between forward and backward pass, and within
the repetition refers to the copy itself, not to the parameter, so a parameter may point elsewhere afterwards. Blocks
visit one after the other: autograd finishes a block before it repeats an earlier one, whose operations are older.

The state that the optimizer keeps for a block travels with it in backward passes. Left on the device, moments of AdamW
in bf16 would take twice the bytes that the weights free. A state of less than a megabyte, such as Adafactor's factors
of a transformer block, stays on the device: its many small copies would make the host wait, because only larger buffers
are page-locked.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.train.engine.host_memory import REGISTERED_BYTES, HostMemory

ALIGNMENT = 256  # bytes, as PyTorch's allocator aligns tensors
# Smaller tensors of the optimizer's state stay on the device: counters, and tables that several weights share.
MIN_TRAVELLING_VALUES = 1024
MIN_TRAVELLING_BYTES = REGISTERED_BYTES  # of a block's state


def check_block_offload(engine: EngineConfig, uses_adapters: bool) -> Iterator[Problem]:
    """Yield a problem if the settings offload blocks whose weights DeepSpeed trains."""
    if engine.offload_blocks and not (engine.gradient_release or uses_adapters):
        rule = "moves weights that DeepSpeed trains, and DeepSpeed needs them on the GPU"
        cure = "set engine.gradient_release: true, train adapters (lora.rank), or leave engine.offload_blocks out"
        yield Problem("engine.offload_blocks", engine.offload_blocks, rule, cure)


class SideStream:
    """A stream for copies beside the computing of a GPU. On a CPU, copies are made at once."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self) -> AbstractContextManager[Any]:
        """Return a context whose copies begin when the GPU has finished what it was given so far.

        Memory of an earlier copy, which these may reuse, is not read any more by then.
        """
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        return torch.cuda.stream(self._stream)

    def record(self) -> torch.Event | None:
        """Return an event behind the copies so far."""
        return None if self._stream is None else self._stream.record_event()

    def keep_until_copied(self, tensor: torch.Tensor) -> None:
        """Keep the memory of a tensor that is freed now until the copies so far are made."""
        if self._stream is not None:
            tensor.record_stream(self._stream)

    def synchronize(self) -> None:
        """Wait for all copies."""
        if self._stream is not None:
            self._stream.synchronize()


class Parcel:
    """Tensors that travel between host and device together. They are on the host, in one buffer, but for visits.

    Args:
        tensors: on either side.
        memory: gives the buffer.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], memory: HostMemory, device: torch.device):
        self._tensors = list(tensors)
        self._device = device
        self._forms = [(tensor.shape, tensor.dtype) for tensor in tensors]
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
        packed = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        self._starts = [sum(sizes[:number]) for number in range(len(sizes))]
        for place, tensor in zip(self._list_places(packed), tensors, strict=True):
            place.copy_(tensor.detach())
        self._host = memory.copy(packed)
        self._homes = self._list_places(self._host)
        self._copy: torch.Tensor | None = None
        self._copied: torch.Event | None = None
        self.leave()

    def fits(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether the buffer has places for these tensors."""
        return self._forms == [(tensor.shape, tensor.dtype) for tensor in tensors]

    def start(self, stream: SideStream) -> None:
        """Start the copy to the device."""
        with stream.begin():
            self._copy = self._host.to(self._device, non_blocking=True, copy=True)
        self._copied = stream.record()

    def arrive(self) -> None:
        """Let the tensors point into the copy, which the device's computing waits for."""
        assert self._copy is not None, "the copy was started"
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
        for tensor, place in zip(self._tensors, self._list_places(self._copy), strict=True):
            tensor.data = place

    def leave(self) -> None:
        """Let the tensors point to the host, whose values they have, and free the copy."""
        for tensor, home in zip(self._tensors, self._homes, strict=True):
            tensor.data = home
        self._copy = self._copied = None

    def write_back(self, stream: SideStream, tensors: Sequence[torch.Tensor] | None = None) -> None:
        """Start the copy of changed values to the host, and leave.

        Args:
            tensors: instead of the present ones, if others have taken their places.
        """
        self._tensors = list(tensors or self._tensors)
        with stream.begin():
            for tensor, home in zip(self._tensors, self._homes, strict=True):
                if tensor.data_ptr() != home.data_ptr():
                    home.copy_(tensor.detach(), non_blocking=True)
                    stream.keep_until_copied(tensor.data)
        self.leave()

    def list_homes(self) -> dict[int, torch.Tensor]:
        """Return the values on the host by the tensors' `id`."""
        return {id(tensor): home for tensor, home in zip(self._tensors, self._homes, strict=True)}

    def _list_places(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """List the tensors' places in a buffer of bytes."""
        return [
            buffer[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for start, (shape, dtype) in zip(self._starts, self._forms, strict=True)
        ]


class BlockOffload:
    """Moves blocks of a U-Net between host and device. All weights are on the host outside of passes.

    Args:
        unet: whose blocks are checkpointed in passes with gradients.
        blocks: of the U-Net; they wait on the host from now on.
        optimizer: of an engine with gradient release; without, the trained weights of the blocks stay on the device.
        finish_updates: makes updates whose gradients are there.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        blocks: Sequence[torch.nn.Module],
        device: torch.device,
        optimizer: torch.optim.Optimizer | None,
        finish_updates: Callable[[], None] = lambda: None,
    ):
        self._device, self._optimizer, self._finish_updates = device, optimizer, finish_updates
        self._memory, self._stream = HostMemory(), SideStream(device)
        self._weights: dict[torch.nn.Module, Parcel] = {}
        self._states: dict[torch.nn.Module, Parcel] = {}
        self._order: list[torch.nn.Module] = []  # of the blocks in the last forward pass
        self._path: list[torch.nn.Module] = []  # of the blocks in the present forward pass
        self._is_backward = False
        self._started: list[torch.nn.Module] = []  # have a copy on the device, or on its way
        self._visitor: torch.nn.Module | None = None
        for block in blocks:
            weights = [weight for weight in block.parameters() if optimizer is not None or not weight.requires_grad]
            if weights:
                self._weights[block] = Parcel(weights, self._memory, device)
                block.register_forward_pre_hook(self._visit)
        unet.register_forward_pre_hook(self._begin_forward)
        unet.register_forward_hook(self._end_forward)

    def list_homes(self) -> dict[int, torch.Tensor]:
        """Return the values on the host of all offloaded weights by the weights' `id`; outdated in backward passes."""
        return {key: home for parcel in self._weights.values() for key, home in parcel.list_homes().items()}

    def end_backward(self) -> None:
        """Bring all blocks home after a backward pass, and wait until their values are there."""
        self._send_home()
        self._is_backward = False
        self._stream.synchronize()

    def _begin_forward(self, *_: Any) -> None:
        self._send_home()
        self._is_backward, self._path = False, []
        if self._order:
            self._start(self._order[0])

    def _end_forward(self, *_: Any) -> None:
        self._send_home()
        self._order = self._path
        self._is_backward = torch.is_grad_enabled()
        if self._is_backward and self._order:
            self._start(self._order[-1])

    def _visit(self, block: torch.nn.Module, _: Any) -> None:
        """Bring a block to the device, and start the copy of the next one. Called before each run of the block."""
        if not self._is_backward:
            self._path.append(block)
        self._send_home(but=block)
        self._start(block)
        for parcel in self._list_parcels(block):
            parcel.arrive()
        self._visitor = block
        following = self._find_following(block)
        if following is not None:
            self._start(following)

    def _find_following(self, block: torch.nn.Module) -> torch.nn.Module | None:
        """Return the block that ran after this one in the last forward pass; before it, in a backward pass."""
        if block not in self._order:
            return None
        place = self._order.index(block) + (-1 if self._is_backward else 1)
        return self._order[place] if 0 <= place < len(self._order) else None

    def _start(self, block: torch.nn.Module) -> None:
        """Start the copies of a block to the device."""
        if block in self._started:
            return
        self._started.append(block)
        if self._is_backward and self._optimizer is not None:
            self._find_state(block)
        for parcel in self._list_parcels(block):
            parcel.start(self._stream)

    def _send_home(self, but: torch.nn.Module | None = None) -> None:
        """Free the copies of all blocks but one; write back what the backward pass has changed."""
        for block in [started for started in self._started if started is not but]:
            if block is self._visitor and self._is_backward and self._optimizer is not None:
                self._finish_updates()
                has_gradients = any(weight.grad is not None for weight in block.parameters())
                assert not has_gradients, "autograd finishes a block before it repeats an earlier one"
                self._weights[block].write_back(self._stream)
                self._find_state(block)
            for parcel in self._list_parcels(block):
                parcel.leave()
            self._started.remove(block)
            if block is self._visitor:
                self._visitor = None

    def _list_parcels(self, block: torch.nn.Module) -> list[Parcel]:
        """List what travels of a block in the present pass."""
        state = self._states.get(block) if self._is_backward else None
        return [self._weights[block], *([state] if state is not None else [])]

    def _find_state(self, block: torch.nn.Module) -> None:
        """Bring home the optimizer's state of a block, which an update or a checkpoint may have replaced."""
        assert self._optimizer is not None
        states = [self._optimizer.state[weight] for weight in block.parameters() if weight in self._optimizer.state]
        values = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        tensors = [value for value in values if value.numel() >= MIN_TRAVELLING_VALUES]
        if sum(value.nbytes for value in tensors) < MIN_TRAVELLING_BYTES:
            tensors = []
        travelling = set(map(id, tensors))
        for value in values:
            if id(value) not in travelling and self._belongs_to_device(value):
                value.data = value.to(self._device)
        parcel = self._states.get(block)
        if parcel is not None and parcel.fits(tensors):
            parcel.write_back(self._stream, tensors)
        elif tensors:
            self._states[block] = Parcel(tensors, self._memory, self._device)

    def _belongs_to_device(self, value: torch.Tensor) -> bool:
        """Return whether a small tensor of the state belongs to the device.

        PyTorch loads checkpoints to the place of the weights. Its counters of steps are on the host by themselves
        unless a kernel reads them.
        """
        assert self._optimizer is not None
        reads_counters = any(group.get("fused") or group.get("capturable") for group in self._optimizer.param_groups)
        return value.dim() > 0 or reads_counters
