"""Linear layers that multiply in fp8, by torchao. Weights, their gradients and the optimizer are unchanged.

Input, weight and output gradient of a layer are scaled by their largest absolute value (one scale a tensor) and rounded
to fp8 for each of the three matrix products: e4m3 in the forward pass, e5m2 for the gradient (Micikevicius et al. 2022,
arXiv 2209.05433).
"""

import importlib
import importlib.util
from collections.abc import Iterator

import torch

from sdxl_trainer.configs.engine import WEIGHT_TYPES, EngineConfig
from sdxl_trainer.configs.problems import Problem

FP8_CAPABILITY = (9, 0)  # NVIDIA Hopper
MULTIPLE = 16  # of the matrices' sides that the kernels require
# Products with 77 tokens a caption are too small to gain.
TEXT_LAYERS = ("attn2.to_k", "attn2.to_v")


def check_fp8(engine: EngineConfig, uses_adapters: bool) -> Iterator[Problem]:
    """Yield a problem for each reason why the layers cannot multiply in fp8 on this machine."""
    if engine.fp8 == "none":
        return
    off = "leave engine.fp8 out"
    if WEIGHT_TYPES[engine.precision] != "bf16":
        rule, cure = f"needs weights in bf16, and engine.precision is {engine.precision}", f"set that to bf16, or {off}"
        yield Problem("engine.fp8", engine.fp8, rule, cure)
    if uses_adapters:
        yield Problem("engine.fp8", engine.fp8, "does not work with adapters (lora.rank)", off)
    if not torch.cuda.is_available() or torch.version.hip is not None:
        yield Problem("engine.fp8", engine.fp8, "needs an NVIDIA GPU", off)
    elif fault := find_fp8_fault(*_find_oldest_gpu()):
        yield Problem("engine.fp8", engine.fp8, fault, off)
    if importlib.util.find_spec("torchao") is None:
        yield Problem(
            "engine.fp8", engine.fp8, "needs torchao, which is not installed", f"pip install torchao, or {off}"
        )


def find_fp8_fault(capability: tuple[int, int], name: str) -> str:
    """Return why a GPU cannot multiply in fp8, by its compute capability, or an empty string."""
    if capability >= FP8_CAPABILITY:
        return ""
    major, minor = capability
    return f"needs compute capability 9.0 (NVIDIA Hopper or newer), and {name} has {major}.{minor}"


def _find_oldest_gpu() -> tuple[tuple[int, int], str]:
    """Return the compute capability and the name of this machine's oldest GPU."""
    devices = range(torch.cuda.device_count())
    return min((torch.cuda.get_device_capability(at), torch.cuda.get_device_name(at)) for at in devices)


def convert_linears(unet: torch.nn.Module) -> int:
    """Let the linear layers of the transformer blocks multiply in fp8, and return their number.

    Names, shapes and types of the weights stay. Without a GPU the rounding is emulated: the same numbers, but slower
    than without it.
    """
    float8 = importlib.import_module("torchao.float8")  # an optional package
    # The gradient of a weight sums over tokens, whose number is a multiple of 4 in small buckets.
    config = float8.Float8LinearConfig(pad_inner_dim=True, emulate=not torch.cuda.is_available())
    float8.convert_to_float8_training(unet, module_filter_fn=uses_fp8, config=config)
    return sum(uses_fp8(layer, name) for name, layer in unet.named_modules())


def uses_fp8(layer: torch.nn.Module, name: str) -> bool:
    """Return whether a layer of the U-Net multiplies in fp8."""
    return (
        isinstance(layer, torch.nn.Linear)
        and ".transformer_blocks." in name
        and not name.endswith(TEXT_LAYERS)
        and layer.in_features % MULTIPLE == layer.out_features % MULTIPLE == 0
    )
