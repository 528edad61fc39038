"""Counting of the work that a GPU would be given: kernel launches and host syncs, by phase, seen on a CPU.

Every operator that PyTorch dispatches is counted by the kernels that its CUDA implementation starts (torch 2.13): views
and empty tensors none, most others one. Multi-tensor operators (`_foreach_*`, fused optimizers) and `cat` are counted
by arithmetic, with the sizes that their tensors have in the real model. A copy counts as a launch. A host sync makes
the host wait for the device: `item`, `nonzero`, `tolist`, and copies between host and device that block.

On a CPU, host and device are the same to PyTorch. The counter therefore keeps a list of host tensors: the ones that it
is given, those that the phases in `OWN_PHASES` make without naming `DEVICE`, and results of host tensors alone.
Operators on them count nothing, and copying one to `DEVICE` is a copy to the device. It blocks, unless it is made with
`non_blocking` from a tensor that was given as pinned. DeepSpeed's accelerator is asked to `synchronize` on a CPU too,
which counts; other calls that exist on CUDA only are not seen.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from deepspeed.accelerator import get_accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# A CPU with a number. Tensors do not keep the number, so a move to it is always an operator that can be seen.
DEVICE = torch.device("cpu", 0)
OWN_PHASES = ("data", "objective", "loop")
CHUNK, MOST_BLOCKS = 65_536, 320  # of multi_tensor_apply: values of a block, blocks of a launch
MOST_TENSORS = (110, 64, 48, 36, 30)  # of a launch, by the number of lists
CAT_BATCH = 128  # tensors of a launch of `cat`
NORM_CLEANUP = 400  # norms of a launch of `_foreach_norm`'s second kernel

WITHOUT_KERNEL = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "set_", "resize_"),
    *("detach", "detach_", "alias", "_unsafe_view", "record_stream", "is_same_size", "requires_grad_", "wait_tensor"),
}
# Operator → kernels; more than one where CUDA's implementation is made of several.
KERNELS = {
    "native_group_norm": 3,  # moments, factors, application
    "native_group_norm_backward": 5,
    "native_layer_norm_backward": 2,  # of the input; of weight and bias
    "_scaled_dot_product_flash_attention_for_cpu_backward": 3,
    "nonzero": 2,
}
READS_VALUE = {"_local_scalar_dense", "nonzero"}
# Methods that bring values to the host and that no operator shows on a CPU.
READING_METHODS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}


class Count(NamedTuple):
    """Launches and host syncs of a phase."""

    launches: int
    syncs: int


class LaunchCounter:
    """Counts launches and host syncs within its context, by the phase that is entered with `phase`.

    Args:
        get_size: returns the number of values that a tensor has in the real model.

    Attributes:
        launches, syncs: by (part, phase, operator).
        part: number of the micro step that is counted.
    """

    def __init__(self, get_size: Callable[[torch.Tensor], int] = torch.Tensor.numel):
        self.get_size = get_size
        self.launches: Counter[tuple[int, str, str]] = Counter()
        self.syncs: Counter[tuple[int, str, str]] = Counter()
        self.part = 0
        self._phases = ["loop"]
        self._hosts: dict[int, torch.Tensor] = {}  # address of a storage → a tensor that keeps it alive
        self._pinned: set[int] = set()
        self._contexts = ExitStack()

    def __enter__(self) -> "LaunchCounter":
        self._contexts.enter_context(_Operators(self))
        self._contexts.enter_context(_Methods(self))
        self._contexts.enter_context(mock.patch.object(get_accelerator(), "synchronize", self._synchronize))
        return self

    def __exit__(self, *error: Any) -> None:
        self._contexts.close()

    def _synchronize(self, *_: Any) -> None:
        self.add("synchronize", 0, syncs=1)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the operators within the context for a phase; the innermost phase counts."""
        self._phases.append(name)
        try:
            yield
        finally:
            self._phases.pop()

    @property
    def is_own(self) -> bool:
        """Return whether the phase makes tensors on the host unless it names the device."""
        return self._phases[-1] in OWN_PHASES

    def read(self, *phases: str, part: int | None = None) -> Count:
        """Return the counts of some phases together, in one part or in all."""
        keys = [key for key in self.launches if key[1] in phases and part in (None, key[0])]
        return Count(sum(self.launches[key] for key in keys), sum(self.syncs[key] for key in keys))

    def add_host(self, tensor: torch.Tensor, pinned: bool = False) -> None:
        """List a tensor as one of the host."""
        address = get_address(tensor)
        self._hosts[address] = tensor
        if pinned:
            self._pinned.add(address)

    def is_host(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is one of the host."""
        return get_address(tensor) in self._hosts

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor was given as pinned."""
        return get_address(tensor) in self._pinned

    def add(self, name: str, launches: int, syncs: int = 0) -> None:
        """Add to the counts of an operator in the present phase."""
        key = (self.part, self._phases[-1], name)
        self.launches[key] += launches
        self.syncs[key] += syncs


class _Operators(TorchDispatchMode):
    """Shows every operator to a counter."""

    def __init__(self, counter: LaunchCounter):
        super().__init__()
        self._counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        count_operator(self._counter, func, args, kwargs, results)
        return results


class _Methods(TorchFunctionMode):
    """Shows a counter the methods that no operator shows."""

    def __init__(self, counter: LaunchCounter):
        super().__init__()
        self._counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        counter, kwargs = self._counter, kwargs or {}
        if func in READING_METHODS and not counter.is_host(args[0]):
            counter.add(func.__name__, 1, 1)
        if func is torch.tensor and is_for_device(counter, kwargs.get("device")):
            counter.add("tensor", 1, 1)  # made on the host and copied
        return func(*args, **kwargs)


def count_operator(counter: LaunchCounter, func: Any, args: Any, kwargs: Any, results: Any) -> None:
    """Count an operator that has run, and list its results as host tensors if they are."""
    name = func._opname
    tensors = [item for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)]
    if name == "_to_copy" and kwargs.get("device") == DEVICE and counter.is_host(args[0]):
        is_blocking = not (kwargs.get("non_blocking") and counter.is_pinned(args[0]))
        counter.add("copy to the device", 1, int(is_blocking))
        return
    if is_host_operator(counter, name, tensors, kwargs):
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                counter.add_host(result, pinned=any(counter.is_pinned(tensor) for tensor in tensors if func.is_view))
        return
    hosts = [tensor for tensor in tensors if counter.is_host(tensor)] if name == "copy_" else []
    if hosts:
        is_blocking = not ((kwargs.get("non_blocking") or True in args[2:]) and counter.is_pinned(hosts[0]))
        counter.add("copy to the device" if hosts[0] is args[1] else "copy to the host", 1, int(is_blocking))
        return
    is_no_op = name == "_to_copy" and kwargs.get("device") == DEVICE and results.dtype == args[0].dtype
    reads = name in READS_VALUE or (name.startswith("masked_fill") and func._overloadname == "Tensor")
    launches = 0 if is_no_op else count_launches(counter.get_size, func, args, kwargs, results)
    counter.add(name, launches, int(reads))


def is_host_operator(counter: LaunchCounter, name: str, tensors: Sequence[torch.Tensor], kwargs: Any) -> bool:
    """Return whether an operator works on the host: on host tensors alone, or on none and without naming the device."""
    if name == "lift_fresh":
        return counter.is_own
    if tensors:
        return all(counter.is_host(tensor) for tensor in tensors)
    return not is_for_device(counter, kwargs.get("device"))


def is_for_device(counter: LaunchCounter, device: Any) -> bool:
    """Return whether a tensor that is made for `device` is one of the device.

    DeepSpeed and the networks name the CPU when they mean the device of their weights.
    """
    return device is not None and (torch.device(device) == DEVICE or not counter.is_own)


def count_launches(get_size: Callable[[torch.Tensor], int], func: Any, args: Any, kwargs: Any, results: Any) -> int:
    """Return the kernels that an operator starts on CUDA."""
    name = func._opname
    if func.is_view or name in WITHOUT_KERNEL:
        return 0
    if name in ("cat", "stack"):
        return math.ceil(len(args[0]) / CAT_BATCH)
    if name.startswith(("_foreach_", "_fused_")):
        return count_multi_tensor(get_size, name, args, kwargs)
    if name == "convolution":
        return 1 + (args[2] is not None)  # the bias is added by a kernel of its own
    if name == "convolution_backward":
        return sum(args[-1])
    return KERNELS.get(name, 1)


def count_multi_tensor(get_size: Callable[[torch.Tensor], int], name: str, args: Any, kwargs: Any) -> int:
    """Return the kernels of an operator on lists of tensors."""
    values = [*args, *kwargs.values()]
    lists = [item for item in values if isinstance(item, (list, tuple)) and item and torch.is_tensor(item[0])]
    if name.startswith("_fused_"):
        # The last list holds steps. AMSGrad's maxima are an empty list.
        lists = lists[:-1]
    sizes = [get_size(tensor) for tensor in lists[0]]
    # Copies may change the type, but all from one into another.
    kinds = lists if name.startswith("_foreach_copy") else [[tensor for tensors in lists for tensor in tensors]]
    has_types = all(len({tensor.dtype for tensor in tensors}) == 1 for tensors in kinds)
    if not name.startswith("_fused_") and not (has_types and have_one_layout(lists)):  # one tensor after the other
        return len(sizes)
    depth = len(lists) + (not name.endswith("_") and name != "_foreach_norm")
    launches = count_chunked_launches(sizes, MOST_TENSORS[depth - 1])
    if name == "_foreach_norm":
        launches += 1 + math.ceil(len(sizes) / NORM_CLEANUP)  # zeros of the partial norms, and their sums
    return launches


def have_one_layout(lists: Sequence[Sequence[torch.Tensor]]) -> bool:
    """Return whether tensors at the same place of all lists have one shape and one order in memory, without gaps."""
    rows = zip(*lists, strict=False)
    return all(len({(tensor.shape, tensor.stride()) for tensor in row}) == 1 and is_dense(row[0]) for row in rows)


def is_dense(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's values lie in memory without gaps, in any order of dimensions."""
    dimensions = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    expected = 1
    for stride, size in dimensions:
        if stride != expected:
            return False
        expected *= size
    return True


def count_chunked_launches(sizes: Sequence[int], most_tensors: int) -> int:
    """Return the launches of multi_tensor_apply: one whenever its places for tensors or for blocks are full."""
    launches = blocks = tensors = 0
    for place, size in enumerate(sizes):
        num_chunks, is_last_tensor = math.ceil(size / CHUNK), place == len(sizes) - 1
        tensors += num_chunks > 0
        for chunk in range(1, num_chunks + 1):
            blocks += 1
            is_end = chunk == num_chunks
            if blocks == MOST_BLOCKS or (is_end and (tensors == most_tensors or is_last_tensor)):
                launches, blocks, tensors = launches + 1, 0, int(not is_end)
    return launches + (blocks > 0)


def get_address(tensor: torch.Tensor) -> int:
    """Return the address of a tensor's storage."""
    return tensor.untyped_storage().data_ptr()
