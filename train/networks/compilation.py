"""Compilation of the U-Net by `torch.compile`: as a whole, or block by block.

Block by block, all blocks of a kind share one graph, which serves every bucket. SDXL has 12 kinds of residual blocks
and 2 of transformer blocks, of 87 in all. Passes without gradients run the blocks as they are, because image generation
and validation would need graphs of their own. Looked for: diffusers' `compile_repeated_blocks` compiles transformer
blocks alone, and does not mark dimensions as dynamic.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from loguru import logger

from sdxl_trainer.configs.engine import Compile

# Seconds of compiling a graph with its backward pass: 12 graphs took 127 s on a busy CPU with an empty cache. Not yet
# measured on a GPU.
SECONDS_PER_GRAPH = 10.0
SPARE_GRAPHS = 8  # that may be compiled beyond the expected number before PyTorch runs blocks as they are


class Compilation:
    """The back end of `torch.compile`, which counts graphs and the time that compiling takes.

    Args:
        backend: PyTorch's name of the back end that compiles.

    Attributes:
        expected: what passes so far needed a graph for; empty if that is not known.
    """

    def __init__(self, backend: str = "inductor"):
        import torch._dynamo

        self.expected: set[tuple[Any, ...]] = set()
        self.num_graphs = self._num_logged = 0
        self.seconds = 0.0  # also of backward passes, which are compiled when they first run
        self._started = 0.0
        self._compile = torch._dynamo.lookup_backend(backend)
        torch._dynamo.on_compile_start(self._start)
        torch._dynamo.on_compile_end(self._end)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """Compile a graph."""
        self.num_graphs += 1
        return self._compile(graph, inputs)

    def log_progress(self) -> None:
        """Log graphs that were compiled since the last call, and warn if there are more than expected."""
        if self.num_graphs == self._num_logged:
            return
        self._num_logged = self.num_graphs
        logger.info("engine.compile: {} graphs are compiled, in {:.0f} s", self.num_graphs, self.seconds)
        if self.expected and self.num_graphs > len(self.expected):
            cure = "TORCH_LOGS=recompiles names the reason of each"
            logger.warning("engine.compile: only {} graphs were expected; {}", len(self.expected), cure)

    def _start(self, _: Any) -> None:
        self._started = time.perf_counter()

    def _end(self, _: Any) -> None:
        self.seconds += time.perf_counter() - self._started


def compile_unet(unet: Any, choice: Compile, backend: str = "inductor") -> Compilation | None:
    """Let a U-Net compile itself in its first passes, after adapters were added and checkpointing was set.

    Args:
        choice: `engine.compile`.
        backend: PyTorch's name of the back end that compiles.
    """
    if choice == "none":
        return None
    if choice == "full":
        compilation = Compilation(backend)
        unet.compile(backend=compilation)
        logger.info("engine.compile: the whole U-Net is compiled in the first step, and twice more for other buckets")
        return compilation
    blocks = list_blocks(unet)
    if backend == "inductor" and unet.device.type == "cpu":
        # On a CPU the compiler fixes the sizes of convolutions, because it converts them to channels_last.
        blocks = [block for block in blocks if type(block).__name__ == "BasicTransformerBlock"]
    kinds = {kind: number for number, kind in enumerate(dict.fromkeys(map(describe_kind, blocks)))}
    compilation, num_kinds = Compilation(backend), len(kinds)
    # PyTorch counts graphs by functions, and the shapes of weights are fixed in a graph: each kind needs one.
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, num_kinds + SPARE_GRAPHS)
    compiled = {kind: torch.compile(kind.forward, backend=compilation) for kind in {type(block) for block in blocks}}
    for block in blocks:
        if isinstance(getattr(block, "output_scale_factor", None), int):
            block.output_scale_factor = float(block.output_scale_factor)  # in the middle block; a graph has one type
        block.forward = partial(
            run_block, block, compiled[type(block)], compilation.expected, kinds[describe_kind(block)]
        )
    text = "engine.compile: the first step compiles {} kinds of blocks; about {:.0f} s unless they are in the cache"
    logger.info(text, num_kinds, SECONDS_PER_GRAPH * num_kinds)
    return compilation


def list_blocks(unet: torch.nn.Module) -> list[Any]:
    """List the residual and transformer blocks."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    return [block for block in unet.modules() if isinstance(block, (ResnetBlock2D, BasicTransformerBlock))]


def describe_kind(block: torch.nn.Module) -> tuple[Any, ...]:
    """Return what blocks have in common that share a graph: their type, and shape, type and training of each weight."""
    weights = [(name, weight.shape, weight.dtype, weight.requires_grad) for name, weight in block.named_parameters()]
    return (type(block), *weights)


def run_block(
    block: Any,
    compiled: Callable[..., Any],
    expected: set[tuple[Any, ...]],
    kind: int,
    x: torch.Tensor,
    *inputs: Any,
    **named: Any,
) -> torch.Tensor:
    """Run a block on x, [B, C, h, w] or [B, N, C], of which h, w and N differ by bucket.

    Args:
        expected: gets what may need a graph of its own: the kind, whether x needs a gradient, which it does not before
            the first trained layer, and the memory format.
    """
    if not torch.is_grad_enabled():
        return type(block).forward(block, x, *inputs, **named)
    expected.add((kind, x.requires_grad, x.is_contiguous()))
    for dimension in range(2, 4) if x.dim() == 4 else (1,):
        torch._dynamo.maybe_mark_dynamic(x, dimension)
    return compiled(block, x, *inputs, **named)
