"""The config of a VAE: read from a diffusers folder or derived from a single file, completed by the settings, checked.

Everything here works on configs and headers, and loads no weights. `cache/models/vae.py` finds the VAE of the settings
and loads it.

A single file carries no scaling factor, shift or padding, unless this project wrote it (`VAE_KEY`). Other sources, in
this order: `model.latents_mean` and `model.latents_std`, `model.vae_scaling_factor` and `model.vae_shift_factor`, the
VAE's own config, and `KNOWN_PAIRS` where the number of channels leaves no choice.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdxl_trainer.cache.models.single_file_check import (
    SDXL_CONFIG_FOLDER,
    SafetensorsHeader,
    read_component_config,
    read_json_object,
    read_safetensors_header,
)
from sdxl_trainer.cache.models.single_file_names import COMPONENT_PREFIXES, Shape
from sdxl_trainer.configs.problems import Problem, raise_if_any
from sdxl_trainer.configs.schema import ModelConfig
from sdxl_trainer.data.formats.latents import SDXL_CHANNELS, VAE_FACTOR

VAE_KEY = "sdxl_trainer.vae"  # in a file's metadata: the config of its VAE as JSON
VAE_PREFIX = COMPONENT_PREFIXES["vae"]
AUTOENCODER, FLUX2_AUTOENCODER = "AutoencoderKL", "AutoencoderKLFlux2"
DEFAULT_CHANNELS = {AUTOENCODER: 4, FLUX2_AUTOENCODER: 32}  # of configs that leave the number out
# Keys of AutoencoderKLFlux2 that concern its latents in patches of 2x2, which SDXL does not use.
PATCH_KEYS = ("batch_norm_eps", "batch_norm_momentum", "patch_size", "decoder_block_out_channels")
STATISTICS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
PADDING = "padding_mode"  # of the convolutions; diffusers has no such key
PADDINGS = ("zeros", "reflect")
SD1_SCALING_FACTOR = 0.18215
CONFIG_CURE = "correct the VAE's config.json, or give another VAE"
VAE_CURE = (
    "give a VAE as a diffusers folder, a single .safetensors file in LDM (ComfyUI) names, or a hub id; or leave it out"
)
# Flux2's files hold these two layers inside the encoder and the decoder.
INNER_LAYERS = {"encoder.quant_conv.": "quant_conv.", "decoder.post_quant_conv.": "post_quant_conv."}
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # others are no weights of the VAE
LEVEL = re.compile(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight")


class KnownPair(NamedTuple):
    """Scaling and shift that models of a family apply to their VAE's latents: x0 = (latent - shift)·scaling."""

    name: str
    channels: int
    scaling: float
    shift: float
    padding: str = "zeros"


# Sources: the VAE configs of diffusers; bluvoll/sd-scripts-f2vae for Flux2 with SDXL and for the EQ-VAE.
KNOWN_PAIRS = (
    KnownPair("SDXL", 4, 0.13025, 0.0),
    KnownPair("EQ-VAE", 4, 0.1406, -0.4743, padding="reflect"),
    KnownPair("SD3", 16, 1.5305, 0.0609),
    KnownPair("Flux", 16, 0.3611, 0.1159),
    KnownPair("Flux2", 32, 0.6043, 0.0760),
)


class BadVaeError(ValueError):
    """A file or folder that is no VAE for this project; the message is the reason, `cure` what to do."""

    def __init__(self, reason: str, cure: str = VAE_CURE):
        self.cure = cure
        super().__init__(reason)


def read_folder_config(folder: Path) -> dict[str, Any]:
    """Read the config of a VAE in a diffusers folder.

    Raises:
        BadVaeError: there is no usable `config.json`, or no safetensors weights.
    """
    if not (folder / "config.json").is_file():
        nested = folder / "vae"
        cure = f"give its folder {nested}" if (nested / "config.json").is_file() else VAE_CURE
        raise BadVaeError("has no config.json", cure)
    try:
        config = read_json_object(folder / "config.json")
    except ValueError as error:
        raise BadVaeError(f"cannot be used: {error}") from None
    if not list(folder.glob("*.safetensors")):
        raise BadVaeError("has no safetensors weights")
    return config


def read_file_config(path: Path, folder: Path = SDXL_CONFIG_FOLDER) -> dict[str, Any]:
    """Derive the config of the VAE in a single file, of a VAE or of a whole model, from its header.

    Args:
        folder: diffusers folder with the values that no header shows, such as the groups of the norms. The statistics
            of SDXL's own folder are not taken, because the file may hold any VAE.

    Raises:
        BadVaeError: the file is no safetensors file, or holds no VAE in LDM names.
        OSError: the file cannot be read.
    """
    try:
        header = read_safetensors_header(path)
    except ValueError as error:
        raise BadVaeError(str(error), getattr(error, "cure", VAE_CURE)) from None
    base = read_component_config(folder, "vae")
    return derive_config(header, base, is_template=folder == SDXL_CONFIG_FOLDER)


def derive_config(header: SafetensorsHeader, base: Mapping[str, Any], is_template: bool = True) -> dict[str, Any]:
    """Derive the config of the VAE in a single file from its tensors' shapes and from the metadata of `VAE_KEY`.

    Args:
        base: config with the values that shapes do not show.
        is_template: `base` is not of this VAE, so its statistics are left out. They are also left out if it has
            another number of channels than the file.

    Raises:
        BadVaeError: the file holds no VAE in LDM names, or its metadata cannot be read.
    """
    shapes = {name: header.shapes[own] for name, own in map_file_names(header.shapes).items()}
    structure = _derive_structure(shapes)
    is_other = is_template or base.get("latent_channels") != structure["latent_channels"]
    given = {key: value for key, value in base.items() if not (is_other and key in (*STATISTICS, PADDING))}
    return {**given, **_load_metadata(header.metadata), **structure}


def map_file_names(names: Mapping[str, Any] | Sequence[str]) -> dict[str, str]:
    """Map the names of a VAE's tensors as a single-file model has them, without their prefix, to a file's own names."""
    in_model = any(name.startswith(VAE_PREFIX) for name in names)
    found = {}
    for own in names:
        if in_model and not own.startswith(VAE_PREFIX):
            continue
        name = own.removeprefix(VAE_PREFIX)
        for inner, outer in INNER_LAYERS.items():
            name = outer + name.removeprefix(inner) if name.startswith(inner) else name
        if name.startswith(PARTS):
            found[name] = own
    return found


def _derive_structure(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Return the entries of a config that follow from the shapes of a VAE in LDM names.

    Raises:
        BadVaeError: the tensors are not those of a VAE, or contradict each other.
    """
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in shapes:
        cure = "give the folder that holds the file and its config.json instead of the file"
        raise BadVaeError("holds a VAE in diffusers names", cure)
    ends = [shapes.get(f"{part}.weight", ()) for part in ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in")]
    levels = {tuple(map(int, match.groups())): shapes[name] for name in shapes if (match := LEVEL.fullmatch(name))}
    if not levels or any(len(shape) != 4 for shape in (*ends, *levels.values())):
        raise BadVaeError("holds no VAE in LDM names (encoder.down.0.block.0.conv1.weight and others)")
    images, moments, latents = ends
    if moments[0] != 2 * latents[1]:
        raise BadVaeError(f"encodes {moments[0] / 2:g} latent channels and decodes {latents[1]}")
    num_levels = 1 + max(level for level, _ in levels)
    if any((level, 0) not in levels for level in range(num_levels)):
        raise BadVaeError("lacks a level of its encoder")
    return {
        "_class_name": AUTOENCODER,
        "latent_channels": latents[1],
        "in_channels": images[1],
        "out_channels": shapes.get("decoder.conv_out.weight", images[1:2])[0],
        "block_out_channels": [levels[level, 0][0] for level in range(num_levels)],
        "down_block_types": ["DownEncoderBlock2D"] * num_levels,
        "up_block_types": ["UpDecoderBlock2D"] * num_levels,
        "layers_per_block": 1 + max(block for _, block in levels),
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def build_vae_metadata(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of a single file with the statistics and the padding of its VAE."""
    return {VAE_KEY: json.dumps({key: config[key] for key in sorted(config) if not key.startswith("_")})}


def _load_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    if VAE_KEY not in metadata:
        return {}
    try:
        config = json.loads(metadata[VAE_KEY])
    except (ValueError, RecursionError) as error:
        raise BadVaeError(f"has unreadable metadata in {VAE_KEY}: {error}") from None
    if not isinstance(config, dict):
        raise BadVaeError(f"has unreadable metadata in {VAE_KEY}: no JSON object")
    return config


def check_vae_config(config: Mapping[str, Any], model: ModelConfig) -> Iterator[Problem]:
    """Yield the reasons why a VAE cannot be used, or not with these settings.

    Args:
        config: as `read_folder_config` or `read_file_config` returns it.
    """
    faults = list(_find_faults(config, is_chosen=model.vae is not None))
    for rule, cure in faults:
        yield Problem("model.vae" if model.vae else "model.path", model.vae or model.path, rule, cure)
    if not faults:
        yield from _check_statistics(config, model)
        yield from _check_padding(config, model)


def _find_faults(config: Mapping[str, Any], is_chosen: bool) -> Iterator[tuple[str, str]]:
    """Yield (rule, cure) for each part of a VAE's config that this project cannot use."""
    kind = config.get("_class_name", AUTOENCODER)
    if kind not in DEFAULT_CHANNELS:
        cure = f"give a VAE of the class {AUTOENCODER} or {FLUX2_AUTOENCODER}"
        yield f"is a {kind}, whose latents SDXL's U-Net cannot use", cure
        return
    widths, channels = config.get("block_out_channels"), count_channels(config)
    if not isinstance(channels, int) or channels < 1:
        yield f"has {channels!r} latent channels", CONFIG_CURE
        return
    factor = 2 ** (len(widths) - 1) if isinstance(widths, (list, tuple)) else None
    if factor != VAE_FACTOR:
        cure = "give a VAE with 4 levels (block_out_channels)"
        yield f"encodes {factor}x{factor} pixels as one latent, and SDXL needs {VAE_FACTOR}x{VAE_FACTOR}", cure
    if kind == FLUX2_AUTOENCODER and config.get("decoder_block_out_channels") not in (None, widths):
        yield "has a decoder of other widths than its encoder", "give the VAE with the full decoder"
    if is_chosen and channels == SDXL_CHANNELS and config.get("scaling_factor") == SD1_SCALING_FACTOR:
        rule = f"has the scaling factor {SD1_SCALING_FACTOR}: it is the VAE of SD 1.5, not of SDXL"
        yield rule, "give a VAE of SDXL; or leave model.vae out"
    yield from _find_bad_statistics(config, channels)


def _find_bad_statistics(config: Mapping[str, Any], channels: int) -> Iterator[tuple[str, str]]:
    """Yield (rule, cure) for statistics of a VAE's own config that cannot be used."""
    for name in STATISTICS[:2]:
        value = config.get(name)
        is_wrong = value is not None and not _is_number(value)
        if is_wrong or (name == "scaling_factor" and value is not None and not value > 0):
            yield f"has the {name} {value!r}", CONFIG_CURE
    mean, std = (config.get(name) for name in STATISTICS[2:])
    if (mean is None) != (std is None):
        yield "has one of latents_mean and latents_std in its config, not both", CONFIG_CURE
    for name, values in (("latents_mean", mean), ("latents_std", std)):
        if values is None:
            continue
        if not isinstance(values, (list, tuple)) or len(values) != channels or not all(map(_is_number, values)):
            yield f"has {channels} latent channels, and its {name} is not a list of as many numbers", CONFIG_CURE
        elif name == "latents_std" and min(values) <= 0:
            yield "has a latents_std that is not above 0", CONFIG_CURE


def _check_statistics(config: Mapping[str, Any], model: ModelConfig) -> Iterator[Problem]:
    """Yield the problems of the settings that concern the statistics of latents."""
    channels = count_channels(config)
    if model.latents_mean and len(model.latents_mean) != channels:  # latents_std is as long
        rule = f"has {len(model.latents_mean)} values, and the VAE has {channels} latent channels"
        yield Problem("model.latents_mean", list(model.latents_mean), rule, "give one value for each channel")
        return
    for name in STATISTICS[2:]:
        given, own = getattr(model, name), config.get(name)
        if given and own and not all(map(_is_close, given, own)):
            rule = f"contradicts the VAE's own config, which has {list(own)}"
            yield Problem(f"model.{name}", list(given), rule, f"leave it out, or correct {name} in the VAE's config")
    for name in STATISTICS[:2]:
        given, own = getattr(model, f"vae_{name}"), config.get(name)
        if given is not None and own is not None and not _is_close(given, own):
            rule = f"contradicts the VAE's own config, which has {own}"
            yield Problem(f"model.vae_{name}", given, rule, f"leave it out, or correct {name} in the VAE's config")
    if model.vae_shift_factor is not None and config.get("latents_mean"):
        rule = f"contradicts the VAE's own config, which has the latents_mean {list(config['latents_mean'])}"
        yield Problem("model.vae_shift_factor", model.vae_shift_factor, rule, "leave it out")
    if not model.latents_mean and _find_pair(config, model) is None:
        rule = f"must be set: the VAE, of {channels} channels, has no scaling_factor"
        yield Problem("model.vae_scaling_factor", None, rule, _describe_pairs(channels))


def _describe_pairs(channels: int) -> str:
    known = [f"{pair.name} {pair.scaling:g}, {pair.shift:g}" for pair in KNOWN_PAIRS if pair.channels == channels]
    if not known:
        return "set it and model.vae_shift_factor, or give the VAE as a diffusers folder with a config.json"
    pairs = "; ".join(known)
    return f"set it and model.vae_shift_factor ({pairs}), or give the VAE as a diffusers folder with a config.json"


def _check_padding(config: Mapping[str, Any], model: ModelConfig) -> Iterator[Problem]:
    own = config.get(PADDING)
    if own is not None and own not in PADDINGS:
        rule = f"has the {PADDING} {own!r} in its config"
        yield Problem("model.vae", model.vae or model.path, rule, "set it to zeros or reflect in the VAE's config.json")
    elif own is not None and model.vae_padding not in (None, own):
        rule = f"contradicts the VAE's own config, which has {own}"
        yield Problem("model.vae_padding", model.vae_padding, rule, f"leave it out, or correct {PADDING} in the config")


def count_channels(config: Mapping[str, Any]) -> int:
    """Return the number of latent channels of a VAE's config, which may leave it to the class."""
    return config.get("latent_channels", DEFAULT_CHANNELS[config.get("_class_name", AUTOENCODER)])


def resolve_vae_config(config: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    """Return the config of the VAE as a run uses it: AutoencoderKL's, with its statistics and `padding_mode`.

    A VAE of Flux2's class has the same layers as AutoencoderKL. What that class does with patches of 2x2 latents, its
    batch norm included, is left out.

    Raises:
        UserInputError: the VAE cannot be used, or contradicts the settings.
    """
    raise_if_any(check_vae_config(config, model))
    used = {key: value for key, value in config.items() if key not in PATCH_KEYS}
    used |= {"_class_name": AUTOENCODER, "latent_channels": count_channels(config)}
    used[PADDING] = model.vae_padding or config.get(PADDING) or PADDINGS[0]
    if model.latents_mean and model.latents_std:
        own = {"latents_mean": list(model.latents_mean), "latents_std": list(model.latents_std)}
        return {**used, "scaling_factor": 1.0, "shift_factor": None, **own}
    pair = _find_pair(config, model)
    assert pair is not None, "check_vae_config reports a VAE without a scaling factor"
    return {**used, "scaling_factor": pair.scaling, "shift_factor": pair.shift or None}


def _find_pair(config: Mapping[str, Any], model: ModelConfig) -> KnownPair | None:
    """Return scaling and shift: of the settings, of the VAE's own config, or the only known ones; None if unknown."""
    channels, padding = count_channels(config), model.vae_padding or config.get(PADDING) or PADDINGS[0]
    # Statistics of each channel take the place of a scaling factor, which diffusers divides them by if there is one.
    scaling = _first(model.vae_scaling_factor, config.get("scaling_factor"), 1.0 if config.get("latents_std") else None)
    shift = _first(model.vae_shift_factor, config.get("shift_factor"))
    if scaling is not None:
        return KnownPair("", channels, scaling, shift or 0.0)
    # Padding by reflection marks a VAE that was trained further, whose latents may have any statistics.
    known = [pair for pair in KNOWN_PAIRS if pair.channels == channels and pair.padding == PADDINGS[0]]
    return known[0] if len(known) == 1 and shift is None and padding == PADDINGS[0] else None


def build_exported_vae_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config of `resolve_vae_config` for an exported diffusers folder.

    diffusers' SDXL pipeline ignores `shift_factor`, so the shift is written as `latents_mean`, too: both give the same
    x0. Not with other than 4 channels, with which that pipeline stops at a `latents_mean`. `padding_mode`, which
    diffusers does not know, is written only if it is not zeros.
    """
    exported = {key: value for key, value in config.items() if (key, value) != (PADDING, PADDINGS[0])}
    shift, channels = config.get("shift_factor"), config["latent_channels"]
    if shift and channels == SDXL_CHANNELS and not config.get("latents_mean"):
        exported |= {"latents_mean": [shift] * channels, "latents_std": [1.0] * channels}
    return exported


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_close(first: float, second: float) -> bool:
    return math.isclose(first, second, rel_tol=1e-6, abs_tol=1e-9)
