"""Sizes of a run's networks: weights and saved activations, counted on PyTorch's meta device, which holds no values."""

import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.cache.models.vae import read_vae_config
from sdxl_trainer.configs.engine import CHECKPOINTING, Checkpointing
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.formats.latents import VAE_FACTOR
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.data.text.tokens import WINDOW
from sdxl_trainer.train.engine.deepspeed_config import DTYPES
from sdxl_trainer.train.networks.blocks import BlockSize, measure_blocks
from sdxl_trainer.train.networks.checkpointing import RunRegion, set_checkpointing
from sdxl_trainer.train.networks.conditioning import TextInputs
from sdxl_trainer.train.networks.empty_networks import (
    build_empty_encoder,
    build_empty_run_networks,
    build_empty_vae,
)
from sdxl_trainer.train.networks.quantised_base import find_base_linears
from sdxl_trainer.train.networks.trained_networks import (
    ENCODERS,
    TrainedNetworks,
    checkpoint_text_encoder,
    list_trained_encoders,
)
from sdxl_trainer.train.sampling.prompts import load_prompts

TIME_IDS = 6  # numbers of SDXL's size and crop conditioning


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of activations: of one image, and those of a whole micro batch that do not grow with it.

    The latter are weights that DoRA, LoHa and LoKr compute in each pass.
    """

    kept: int  # saved by the forward pass for the backward pass
    recomputed: int  # of the largest checkpointed block, which exist only while its own backward pass runs
    fixed_kept: int = 0
    fixed_recomputed: int = 0


@dataclass(frozen=True, kw_only=True)
class NetworkSizes:
    """Sizes of a run's networks, on which its memory depends."""

    shapes: tuple[tuple[int, ...], ...]  # of each trained weight
    frozen: int  # frozen values of the networks that are trained, such as those under adapters
    frozen_encoders: int  # values of the text encoders that are not trained
    vae: int
    bucket: Size  # for which the activations are counted
    activations: Mapping[Checkpointing, Activations]  # by gradient checkpointing
    generation: int  # bytes of the largest activations at a time while an image is generated; 0 without prompts
    blocks: tuple[BlockSize, ...] = ()  # of the U-Net, the largest first
    base_linears: int = 0  # frozen values that `lora.quantised_base` quantises

    @property
    def trained(self) -> list[int]:
        """Values of each trained weight."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def num_trained(self) -> int:
        """Number of trained values."""
        return sum(self.trained)


def measure_networks(config: Config, source: ModelSource, bucket: Size) -> NetworkSizes:
    """Count weights and activations of the networks that the settings train.

    Runs the forward pass with each kind of gradient checkpointing, for one image. For SDXL this takes about three
    seconds of CPU time besides importing diffusers. Activations grow in proportion to the micro batch.

    Args:
        bucket: the largest of the training data.

    Raises:
        UserInputError: the settings name parameters that the networks do not have.
    """
    dtype = DTYPES[config.engine.precision]
    networks = build_empty_run_networks(source, config, dtype)
    weights = list(networks.parameters())
    frozen_encoders = set(ENCODERS) - set(list_trained_encoders(config.optim))
    vae = build_empty_vae(read_vae_config(source, config.model))
    return NetworkSizes(
        shapes=tuple(tuple(weight.shape) for weight in weights if weight.requires_grad),
        frozen=sum(weight.numel() for weight in weights if not weight.requires_grad),
        frozen_encoders=sum(count_values(build_empty_encoder(source, name)) for name in frozen_encoders),
        vae=count_values(vae),
        bucket=bucket,
        activations={policy: count_activations(networks, config, bucket, policy) for policy in CHECKPOINTING},
        generation=measure_generation(networks.unet, vae, config),
        blocks=measure_blocks(networks.unet),
        base_linears=sum(layer.weight.numel() for layer in find_base_linears(networks.unet).values()),
    )


def count_values(network: torch.nn.Module) -> int:
    """Return the number of a network's weights."""
    return sum(weight.numel() for weight in network.parameters())


def count_activations(networks: TrainedNetworks, config: Config, bucket: Size, policy: Checkpointing) -> Activations:
    """Count the activations that the forward pass saves for the backward pass.

    Args:
        networks: on the meta device; the text encoders stay checkpointed after `full`.
    """
    one = count_saved(networks, config, bucket, policy, batch_size=1)
    if config.lora.kind == "lora":
        return one
    two = count_saved(networks, config, bucket, policy, batch_size=2)
    kept, recomputed = two.kept - one.kept, max(0, two.recomputed - one.recomputed)
    fixed = {"fixed_kept": one.kept - kept, "fixed_recomputed": one.recomputed - recomputed}
    return Activations(kept=kept, recomputed=recomputed, **fixed)


def count_saved(
    networks: TrainedNetworks, config: Config, bucket: Size, policy: Checkpointing, batch_size: int
) -> Activations:
    """Count the activations that the forward pass of so many images saves, all as if they grew with the images."""
    held = list_held_storages(networks)
    saved, units = SavedBytes(held), [0]

    def run_checkpointed(region: Callable[..., Any], *arguments: Any) -> Any:
        unit = SavedBytes(held)

        def run(*again: Any) -> Any:
            with unit.hooks():
                return region(*again)

        output = checkpoint(run, *arguments, use_reentrant=False)
        units.append(unit.total)
        return output

    checkpoint_networks(networks, policy, run_checkpointed)
    with saved.hooks(), FlashAttention():
        networks(**build_inputs(networks, config, bucket, batch_size))
    return Activations(kept=saved.total, recomputed=max(units))


def list_held_storages(network: torch.nn.Module) -> list[torch.UntypedStorage]:
    """List the storages of a network's weights and buffers, which are no activations."""
    return [tensor.untyped_storage() for tensor in (*network.parameters(), *network.buffers())]


def checkpoint_networks(networks: TrainedNetworks, policy: Checkpointing, run: RunRegion | None = None) -> None:
    """Set the gradient checkpointing of all networks; `run` runs a region of the U-Net (see `set_checkpointing`)."""
    set_checkpointing(networks.unet, policy, run)
    if policy != "full":
        return
    encoders: list[Any] = [networks.text_encoder, networks.text_encoder_2]
    for encoder in filter(None, encoders):
        checkpoint_text_encoder(encoder)


def build_inputs(networks: TrainedNetworks, config: Config, bucket: Size, batch_size: int = 1) -> dict[str, Any]:
    """Build the inputs of a forward pass, without meaningful values, as the training step builds them."""
    unet: Any = networks.unet
    make = partial(torch.zeros, device=unet.device)
    return {
        "x_t": make(batch_size, *get_latent_shape(unet, bucket), dtype=unet.dtype),
        "timesteps": make(batch_size, dtype=torch.long),
        "text": build_text_inputs(networks, config.data.max_tokens // WINDOW, batch_size),
        "time_ids": make(batch_size, TIME_IDS),
    }


def build_text_inputs(networks: TrainedNetworks, windows: int, batch_size: int) -> TextInputs:
    """Build the text of a forward pass: token ids for encoders that are trained, hidden states for the others."""
    unet: Any = networks.unet
    encoders: dict[str, Any] = {name: getattr(networks, name) for name in ENCODERS}
    ids = torch.zeros(batch_size, windows, WINDOW + 2, dtype=torch.long, device=unet.device)
    make = partial(torch.zeros, dtype=unet.dtype, device=unet.device)
    # The states of both encoders are joined, so between two frozen ones any division of the width is as good.
    trained_widths = [encoder.config.hidden_size for encoder in encoders.values() if encoder is not None]
    width = unet.config.cross_attention_dim - sum(trained_widths)
    shares = iter([width] if trained_widths else [width // 2, width - width // 2])
    length, text = windows * WINDOW + 2, TextInputs()
    if encoders["text_encoder"] is not None:
        text["input_ids"] = ids
    else:
        text["hidden"] = make(batch_size, length, next(shares))
    if encoders["text_encoder_2"] is not None:
        text["input_ids_2"] = ids
    else:
        text["hidden_2"] = make(batch_size, length, next(shares))
        text["pooled"] = make(batch_size, get_pooled_width(unet))
    return text


def get_pooled_width(unet: Any) -> int:
    """Return the width of the pooled text state that the U-Net takes."""
    return unet.config.projection_class_embeddings_input_dim - TIME_IDS * unet.config.addition_time_embed_dim


def get_latent_shape(unet: Any, size: Size) -> tuple[int, int, int]:
    """Return the shape of the latent of an image of this size, [C, h, w]."""
    return unet.config.in_channels, size.height // VAE_FACTOR, size.width // VAE_FACTOR


def measure_generation(unet: Any, vae: Any, config: Config) -> int:
    """Measure the largest activations at a time, in bytes, of generating the largest image of the prompts.

    The U-Net predicts with and without the prompt in one batch of two; then the VAE decodes in fp32.
    """
    prompts, _ = load_prompts(config.sample, config.objective)
    if not prompts:
        return 0
    largest = max((Size(prompt.width_px, prompt.height_px) for prompt in prompts), key=get_area)
    make = partial(torch.zeros, dtype=unet.dtype, device="meta")
    x_t = make(2, *get_latent_shape(unet, largest))
    latent = torch.zeros(1, vae.config.latent_channels, *x_t.shape[2:], device="meta")
    hidden = make(2, config.data.max_tokens + 2, unet.config.cross_attention_dim)
    conditions = {"text_embeds": make(2, get_pooled_width(unet)), "time_ids": make(2, TIME_IDS)}
    timestep = torch.zeros((), device="meta")
    passes = {
        unet: lambda: unet(x_t, timestep, hidden, added_cond_kwargs=conditions),
        vae: lambda: vae.decode(latent),
    }
    peaks = []
    for network, run in passes.items():
        live = LiveBytes(list_held_storages(network))
        with torch.no_grad(), live, FlashAttention():
            run()
        peaks.append(live.peak)
    return max(peaks)


def get_area(size: Size) -> int:
    """Return the number of pixels of a size."""
    return size.width * size.height


class SavedBytes:
    """Counts the bytes of tensors that autograd saves for the backward pass, each storage once.

    Args:
        excluded: storages that are not counted, such as those of weights.
    """

    def __init__(self, excluded: Iterable[torch.UntypedStorage]):
        # Storages are kept here, because the id of one that is gone may be used again.
        self._excluded = {id(storage): storage for storage in excluded}
        self._counted: dict[int, torch.UntypedStorage] = {}

    @property
    def total(self) -> int:
        """Bytes counted so far."""
        return sum(storage.nbytes() for storage in self._counted.values())

    def hooks(self) -> Any:
        """Return a context within which forward passes are counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in self._excluded:
            self._counted.setdefault(id(storage), storage)
        return tensor


class LiveBytes(TorchDispatchMode):
    """Measures the largest total size of the tensors that are alive at a time within the context.

    Args:
        excluded: storages that are not counted.
    """

    def __init__(self, excluded: Iterable[torch.UntypedStorage]):
        super().__init__()
        self.peak = self._live = 0
        self._excluded = {id(storage): storage for storage in excluded}
        self._references: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the storages of its results."""
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, torch.Tensor):
                self._note(result.untyped_storage())
        return results

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._excluded or key in self._references:
            return

        def forget(_: object) -> None:
            self._live -= size
            del self._references[key]

        self._references[key] = weakref.ref(storage, forget)
        self._live += size
        self.peak = max(self.peak, self._live)


class FlashAttention(TorchFunctionMode):
    """Computes attention on the meta device by the flash kernel, as GPUs do.

    PyTorch would choose its plain formula there, which saves the matrix of all queries and keys: 13.1 GB for an image
    of 1024² px. The kernels of GPUs save queries, keys, values, results, and one fp32 number for each query. Looked
    for: `torch.nn.attention.sdpa_kernel`, which has no effect on the meta device.
    """

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Run a function, attention on the meta device by the flash kernel."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            given = dict(zip(names, args, strict=False)) | kwargs
            query = given["query"]
            if query.is_meta and given.get("attn_mask") is None:
                flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
                is_causal = bool(given.get("is_causal", False))
                return flash(query, given["key"], given["value"], 0.0, is_causal, scale=given.get("scale"))[0]
        return func(*args, **kwargs)
