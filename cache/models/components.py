"""The networks of a model on disk, for single files and diffusers folders alike: read, load into a module, identify."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from isal.isal_zlib import crc32
from torch.overrides import TorchFunctionMode

from sdxl_trainer.cache.models.diffusers_folder import open_folder_component, read_folder_component
from sdxl_trainer.cache.models.single_file import open_single_file, read_single_file
from sdxl_trainer.cache.models.single_file_names import TextProjection, get_canonical_name
from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.cache.models.tensor_stream import TensorSource
from sdxl_trainer.data.files import read_with_retries


def read_component(
    source: ModelSource, component: str, text_projection: TextProjection = "correct"
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (source name, tensor) of a network, memory-mapped, in the precision of the file.

    The new layers of an adapted U-Net (`ModelSource.adaptation`) are in fp32.

    Raises:
        FileNotFoundError: the model has no weights of that network.
        ValueError: a single file lacks tensors, or has unknown or misshapen ones.
    """
    if source.file is None:
        tensors = read_folder_component(source.folder, component)
    else:
        config = source.read_stored_config(component)
        tensors = read_single_file(source.file, component, config, text_projection=text_projection)
    if source.adaptation is not None and component == "unet":
        return source.adaptation.replace_tensors(tensors)
    return tensors


def open_component(
    source: ModelSource, component: str, text_projection: TextProjection = "correct"
) -> dict[str, TensorSource]:
    """Map each source name of a network to a function that reads its tensor. Raises like `read_component`."""
    config = source.read_stored_config(component)
    if source.file is None:
        sources = open_folder_component(source.folder, component)
    else:
        sources = open_single_file(source.file, component, config, text_projection=text_projection)
    if source.adaptation is not None and component == "unet":
        return source.adaptation.replace_sources(sources, config["block_out_channels"][0])
    return sources


def build_component(
    build: Callable[[], Any],
    source: ModelSource,
    component: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    text_projection: TextProjection = "correct",
) -> Any:
    """Build a network on its device and load its weights, each cast to `dtype` while it is read.

    The file stays memory-mapped, so the ranks of a machine share its pages, and a rank with a GPU holds no copy in host
    memory. Random initialisation is skipped, because it takes a minute for SDXL's networks. Raises like
    `read_component` and `copy_weights`.

    Args:
        build: returns the module.
    """
    with torch.device(device), UninitializedWeights(dtype):
        module = build()
    for weight in module.parameters():
        weight.data = weight.data.to(dtype)

    def load() -> None:
        copy_weights(module, component, read_component(source, component, text_projection))

    read_with_retries(load, source.file or Path(source.folder / component))
    return module


def copy_weights(module: torch.nn.Module, component: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy a network's tensors into its module, whose names may be those of any transformers version.

    Raises:
        ValueError: a weight is missing or has another shape.
    """
    missing = {get_canonical_name(component, name): weight for name, weight in module.state_dict().items()}
    for name, tensor in tensors:
        weight = missing.pop(name, None)
        if weight is None:
            continue
        if weight.shape != tensor.shape:
            raise ValueError(f"{component} {name} is {list(tensor.shape)}, not {list(weight.shape)}")
        # Casting on the device spares the host, which has one thread for each rank.
        weight.copy_(tensor.to(weight.device))
    if missing:
        raise ValueError(f"{component} lacks {', '.join([*missing][:5])}" + (" and more" if len(missing) > 5 else ""))


def hash_component(source: ModelSource, component: str, text_projection: TextProjection = "correct") -> str:
    """Return the SHA-256 of a network's names, types, shapes and CRC-32s of its tensors, for a file or a folder.

    CRC-32 reads as fast as memory does; SHA-256 of the U-Net's 5 GB would take a processor core six seconds.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(read_component(source, component, text_projection), key=lambda item: item[0]):
        checksum = crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} {checksum:08x}\n".encode())
    return digest.hexdigest()


class UninitializedWeights(TorchFunctionMode):
    """Context in which new weights have a type and no values, in torch's modules and those of other libraries.

    Only for modules whose weights are all loaded afterwards. Unlike `torch.set_default_dtype`, it leaves other threads
    alone.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("dtype") is None:
            kwargs["dtype"] = self._dtype
        is_random = getattr(func, "__name__", "") in ("uniform_", "normal_")
        if is_random or getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
