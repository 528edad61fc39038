"""Names and shapes of the tensors in single-file SDXL models: one name table per component, for writing and reading.

A table is built from the component's config alone, so it also fits small models of SDXL's topology. Each row maps one
tensor of the file to the model tensors that it holds. This module needs neither torch nor the model classes.

Terms: *file names* are those of the single file (LDM for the U-Net and the VAE, OpenCLIP for text encoder 2). *Source
names* are those of diffusers and transformers. Source names of text encoders have the classic `text_model.` prefix,
which newer transformers releases drop for `CLIPTextModel` (see `get_canonical_name`).

Source: the key layout of Stability's generative-models and of OpenCLIP, checked against diffusers' own loader.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Shape = tuple[int, ...]
TextProjection = Literal["correct", "legacy"]

COMPONENT_PREFIXES = {
    "unet": "model.diffusion_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
    "vae": "first_stage_model.",
}
LOGIT_SCALE_FILE_NAME = COMPONENT_PREFIXES["text_encoder_2"] + "logit_scale"

_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# transformers omits values that equal the defaults of its class from config.json.
_CLIP_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "max_position_embeddings": 77,
}


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One tensor of the file and the model tensors that it holds.

    Args:
        sources: one source name, or those of q, k and v, which are stacked on dimension 0.
        source_shape: shape of each model tensor. Apart from stacking and transposing, it differs from `file_shape` at
            most in trailing ones (a 1×1 convolution).
        transposed: the file holds the transpose.
        carried: no diffusers model has this tensor (logit_scale); it is kept because other tools require it.
    """

    file_name: str
    file_shape: Shape
    sources: tuple[str, ...]
    source_shape: Shape
    transposed: bool = False
    carried: bool = False


class _Table:
    """Rows of a component, whose file names start with `prefix`."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.rows: list[TableRow] = []

    def add(
        self,
        source: str | tuple[str, ...],
        file: str,
        source_shape: Shape,
        file_shape: Shape | None = None,
        **flags: bool,
    ) -> None:
        sources = (source,) if isinstance(source, str) else source
        row = TableRow(
            file_name=self.prefix + file,
            file_shape=file_shape or source_shape,
            sources=sources,
            source_shape=source_shape,
            **flags,
        )
        self.rows.append(row)

    def add_layer(self, source: str, file: str, *shape: int, bias: bool = True) -> None:
        """Add weight and bias of a linear, convolution or norm layer; norms have a one-dimensional weight.

        Names are given without `.weight` and `.bias`.
        """
        self.add(f"{source}.weight", f"{file}.weight", shape)
        if bias:
            self.add(f"{source}.bias", f"{file}.bias", shape[:1])


def build_name_table(
    component: str, config: Mapping[str, Any], text_projection: TextProjection = "correct"
) -> list[TableRow]:
    """Build the name table of one component from its diffusers config.

    Args:
        component: `unet`, `vae`, `text_encoder` or `text_encoder_2`.
        text_projection: `legacy` leaves encoder 2's projection untransposed, as kohya and others store it.

    Raises:
        ValueError: the component is unknown, or the config does not have SDXL's topology.
    """
    if component not in COMPONENT_PREFIXES:
        raise ValueError(f"component is {component!r}; it must be one of {', '.join(COMPONENT_PREFIXES)}")
    if text_projection not in ("correct", "legacy"):
        raise ValueError(f"text_projection is {text_projection!r}; it must be 'correct' or 'legacy'")
    table = _Table(COMPONENT_PREFIXES[component])
    if component == "unet":
        _add_unet(table, config)
    elif component == "vae":
        _add_vae(table, config)
    elif component == "text_encoder":
        _add_clip(table, {**_CLIP_DEFAULTS, **config})
    else:
        _add_open_clip(table, {**_CLIP_DEFAULTS, **config}, text_projection)
    return table.rows


def list_source_names(component: str, config: Mapping[str, Any]) -> list[str]:
    """List the source names of one component in the order in which the writer reads them."""
    return [name for row in build_name_table(component, config) if not row.carried for name in row.sources]


def get_canonical_name(component: str, name: str) -> str:
    """Return a source name with the classic `text_model.` prefix, which some versions of transformers leave out."""
    outside = ("text_model.", "text_projection.", "logit_scale")
    if component in ("text_encoder", "text_encoder_2") and not name.startswith(outside):
        return f"text_model.{name}"
    return name


def _validate_config(
    component: str, config: Mapping[str, Any], required: Iterable[str], allowed: Mapping[str, tuple[Any, ...]]
) -> None:
    """Raise one ValueError that lists missing keys and keys whose value is not allowed."""
    wrong = [f"{key} is missing" for key in required if config.get(key) is None]
    wrong += [f"{key} is {config.get(key)!r}" for key, values in allowed.items() if config.get(key) not in values]
    if wrong:
        raise ValueError(f"{component} config does not have SDXL's topology: {'; '.join(wrong)}")


def _get_per_block(config: Mapping[str, Any], key: str, default: int) -> list[int]:
    """Return the value of `key` for each down block; diffusers allows one number for all blocks."""
    num_blocks = len(config["block_out_channels"])
    value = config.get(key, default)
    values = [value] * num_blocks if isinstance(value, int) else list(value)
    if len(values) != num_blocks or not all(isinstance(item, int) for item in values):
        raise ValueError(f"unet config does not have SDXL's topology: {key} is {value!r}, not one number per block")
    return values


def _add_unet(table: _Table, config: Mapping[str, Any]) -> None:
    """Add the U-Net, whose blocks LDM numbers through all resolutions and diffusers within each resolution."""
    required = (
        "block_out_channels",
        "down_block_types",
        "up_block_types",
        "cross_attention_dim",
        "transformer_layers_per_block",
        "projection_class_embeddings_input_dim",
    )
    _validate_config(
        "unet",
        config,
        required,
        {
            "addition_embed_type": ("text_time",),
            "class_embed_type": (None,),
            "time_embedding_dim": (None,),
            "encoder_hid_dim": (None,),
            "attention_type": (None, "default"),
            "dual_cross_attention": (None, False),
            "reverse_transformer_layers_per_block": (None,),
            "mid_block_type": (None, "UNetMidBlock2DCrossAttn"),
        },
    )
    channels = list(config["block_out_channels"])
    if not len(channels) == len(config["down_block_types"]) == len(config["up_block_types"]):
        raise ValueError(
            "unet config does not have SDXL's topology: block_out_channels, down_block_types and "
            "up_block_types are of different lengths"
        )
    time_dim = 4 * channels[0]
    in_channels, out_channels = config.get("in_channels", 4), config.get("out_channels", 4)
    table.add_layer("time_embedding.linear_1", "time_embed.0", time_dim, channels[0])
    table.add_layer("time_embedding.linear_2", "time_embed.2", time_dim, time_dim)
    added_dim = config["projection_class_embeddings_input_dim"]
    table.add_layer("add_embedding.linear_1", "label_emb.0.0", time_dim, added_dim)
    table.add_layer("add_embedding.linear_2", "label_emb.0.2", time_dim, time_dim)
    table.add_layer("conv_in", "input_blocks.0.0", channels[0], in_channels, 3, 3)
    _add_unet_down(table, config, channels, time_dim)
    _add_resnet(table, "mid_block.resnets.0", "middle_block.0", _UNET_RESNET, (channels[-1], channels[-1]), time_dim)
    _add_transformer(table, "mid_block.attentions.0", "middle_block.1", config, len(channels) - 1)
    _add_resnet(table, "mid_block.resnets.1", "middle_block.2", _UNET_RESNET, (channels[-1], channels[-1]), time_dim)
    _add_unet_up(table, config, channels, time_dim)
    table.add_layer("conv_norm_out", "out.0", channels[0])
    table.add_layer("conv_out", "out.2", out_channels, channels[0], 3, 3)


def _add_unet_down(table: _Table, config: Mapping[str, Any], channels: list[int], time_dim: int) -> None:
    num_layers = _get_per_block(config, "layers_per_block", 2)
    index = 1  # input_blocks.0 is conv_in
    previous = channels[0]
    for block, width in enumerate(channels):
        for layer in range(num_layers[block]):
            source, file = f"down_blocks.{block}", f"input_blocks.{index}"
            _add_resnet(table, f"{source}.resnets.{layer}", f"{file}.0", _UNET_RESNET, (previous, width), time_dim)
            if _has_attention(config["down_block_types"][block]):
                _add_transformer(table, f"{source}.attentions.{layer}", f"{file}.1", config, block)
            previous = width
            index += 1
        if block < len(channels) - 1:
            source, file = f"down_blocks.{block}.downsamplers.0.conv", f"input_blocks.{index}.0.op"
            table.add_layer(source, file, width, width, 3, 3)
            index += 1


def _add_unet_up(table: _Table, config: Mapping[str, Any], channels: list[int], time_dim: int) -> None:
    num_layers = _get_per_block(config, "layers_per_block", 2)
    last = len(channels) - 1
    index = 0
    previous = channels[-1]
    for block in range(len(channels)):
        level = last - block  # the down block whose outputs are this up block's skip connections
        width, below = channels[level], channels[max(level - 1, 0)]
        attention = _has_attention(config["up_block_types"][block])
        for layer in range(num_layers[level] + 1):
            source, file = f"up_blocks.{block}", f"output_blocks.{index}"
            width_in = previous + (below if layer == num_layers[level] else width)
            _add_resnet(table, f"{source}.resnets.{layer}", f"{file}.0", _UNET_RESNET, (width_in, width), time_dim)
            if attention:
                _add_transformer(table, f"{source}.attentions.{layer}", f"{file}.1", config, level)
            previous = width
            index += 1
        # LDM puts the upsampler behind the last layer of the resolution, after its attention if it has one.
        if block < last:
            file = f"output_blocks.{index - 1}.{2 if attention else 1}.conv"
            table.add_layer(f"up_blocks.{block}.upsamplers.0.conv", file, width, width, 3, 3)


def _has_attention(block_type: str) -> bool:
    kinds = {"DownBlock2D": False, "UpBlock2D": False, "CrossAttnDownBlock2D": True, "CrossAttnUpBlock2D": True}
    if block_type not in kinds:
        raise ValueError(f"unet config does not have SDXL's topology: block type {block_type!r}")
    return kinds[block_type]


def _add_resnet(
    table: _Table,
    source: str,
    file: str,
    parts: Mapping[str, str],
    widths: tuple[int, int],
    time_dim: int | None = None,
) -> None:
    """Add a residual block from `widths[0]` to `widths[1]` channels; `time_dim` is None in the VAE."""
    width_in, width = widths
    shapes: dict[str, Shape] = {"norm1": (width_in,), "conv1": (width, width_in, 3, 3)}
    if time_dim is not None:
        shapes["time_emb_proj"] = (width, time_dim)
    shapes |= {"norm2": (width,), "conv2": (width, width, 3, 3)}
    if width_in != width:
        shapes["conv_shortcut"] = (width, width_in, 1, 1)
    for part, shape in shapes.items():
        table.add_layer(f"{source}.{part}", f"{file}.{parts[part]}", *shape)


def _add_transformer(table: _Table, source: str, file: str, config: Mapping[str, Any], level: int) -> None:
    """Add the spatial transformer of one U-Net layer; LDM and diffusers use the same names inside it."""
    width = config["block_out_channels"][level]
    context_dim = _get_per_block(config, "cross_attention_dim", 1280)[level]
    projection = (width, width) if config.get("use_linear_projection", False) else (width, width, 1, 1)
    layers: dict[str, tuple[Shape, bool]] = {"norm": ((width,), True), "proj_in": (projection, True)}
    for depth in range(_get_per_block(config, "transformer_layers_per_block", 1)[level]):
        block = f"transformer_blocks.{depth}"
        for attention, dim in (("attn1", width), ("attn2", context_dim)):
            layers[f"{block}.{attention}.to_q"] = ((width, width), False)
            layers[f"{block}.{attention}.to_k"] = ((width, dim), False)
            layers[f"{block}.{attention}.to_v"] = ((width, dim), False)
            layers[f"{block}.{attention}.to_out.0"] = ((width, width), True)
        layers[f"{block}.ff.net.0.proj"] = ((8 * width, width), True)  # GEGLU: value and gate, 4 × width each
        layers[f"{block}.ff.net.2"] = ((width, 4 * width), True)
        for norm in ("norm1", "norm2", "norm3"):
            layers[f"{block}.{norm}"] = ((width,), True)
    layers["proj_out"] = (projection, True)
    for layer, (shape, bias) in layers.items():
        table.add_layer(f"{source}.{layer}", f"{file}.{layer}", *shape, bias=bias)


def _add_vae(table: _Table, config: Mapping[str, Any]) -> None:
    """Add the VAE, whose decoder resolutions LDM numbers from the finest and diffusers from the coarsest."""
    _validate_config("vae", config, ("block_out_channels",), {})
    channels = list(config["block_out_channels"])
    last = len(channels) - 1
    num_layers, latent = config.get("layers_per_block", 1), config.get("latent_channels", 4)
    attention = config.get("mid_block_add_attention", True)
    table.add_layer("encoder.conv_in", "encoder.conv_in", channels[0], config.get("in_channels", 3), 3, 3)
    for level, width in enumerate(channels):
        for layer in range(num_layers):
            width_in = channels[max(level - 1, 0)] if layer == 0 else width
            _add_resnet(
                table,
                f"encoder.down_blocks.{level}.resnets.{layer}",
                f"encoder.down.{level}.block.{layer}",
                _VAE_RESNET,
                (width_in, width),
            )
        if level < last:
            table.add_layer(
                f"encoder.down_blocks.{level}.downsamplers.0.conv",
                f"encoder.down.{level}.downsample.conv",
                width,
                width,
                3,
                3,
            )
    _add_vae_middle(table, "encoder", channels[-1], attention)
    table.add_layer("encoder.conv_norm_out", "encoder.norm_out", channels[-1])
    table.add_layer("encoder.conv_out", "encoder.conv_out", 2 * latent, channels[-1], 3, 3)
    if config.get("use_quant_conv", True):
        table.add_layer("quant_conv", "quant_conv", 2 * latent, 2 * latent, 1, 1)
    if config.get("use_post_quant_conv", True):
        table.add_layer("post_quant_conv", "post_quant_conv", latent, latent, 1, 1)
    table.add_layer("decoder.conv_in", "decoder.conv_in", channels[-1], latent, 3, 3)
    _add_vae_middle(table, "decoder", channels[-1], attention)
    for block in range(len(channels)):
        level = last - block
        width = channels[level]
        for layer in range(num_layers + 1):
            width_in = channels[min(level + 1, last)] if layer == 0 else width
            _add_resnet(
                table,
                f"decoder.up_blocks.{block}.resnets.{layer}",
                f"decoder.up.{level}.block.{layer}",
                _VAE_RESNET,
                (width_in, width),
            )
        if block < last:
            table.add_layer(
                f"decoder.up_blocks.{block}.upsamplers.0.conv", f"decoder.up.{level}.upsample.conv", width, width, 3, 3
            )
    table.add_layer("decoder.conv_norm_out", "decoder.norm_out", channels[0])
    table.add_layer("decoder.conv_out", "decoder.conv_out", config.get("out_channels", 3), channels[0], 3, 3)


def _add_vae_middle(table: _Table, half: str, width: int, attention: bool) -> None:
    source, file = f"{half}.mid_block", f"{half}.mid"
    _add_resnet(table, f"{source}.resnets.0", f"{file}.block_1", _VAE_RESNET, (width, width))
    if attention:
        table.add_layer(f"{source}.attentions.0.group_norm", f"{file}.attn_1.norm", width)
        # Linear layers in diffusers are 1×1 convolutions in the file.
        for part, file_part in _VAE_ATTENTION.items():
            name, file_name = f"{source}.attentions.0.{part}", f"{file}.attn_1.{file_part}"
            table.add(f"{name}.weight", f"{file_name}.weight", (width, width), (width, width, 1, 1))
            table.add(f"{name}.bias", f"{file_name}.bias", (width,))
    _add_resnet(table, f"{source}.resnets.1", f"{file}.block_2", _VAE_RESNET, (width, width))


def _add_clip(table: _Table, config: Mapping[str, Any]) -> None:
    """Add text encoder 1, which keeps its classic transformers names in the file."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    layers: dict[str, Shape] = {}
    for index in range(config["num_hidden_layers"]):
        layer = f"text_model.encoder.layers.{index}"
        layers |= {f"{layer}.self_attn.{part}_proj": (hidden, hidden) for part in ("q", "k", "v", "out")}
        layers |= {f"{layer}.layer_norm1": (hidden,), f"{layer}.mlp.fc1": (inner, hidden)}
        layers |= {f"{layer}.mlp.fc2": (hidden, inner), f"{layer}.layer_norm2": (hidden,)}
    layers["text_model.final_layer_norm"] = (hidden,)
    for name, size in _list_embedding_sizes(config).items():
        table.add(name, name, (size, hidden))
    for name, shape in layers.items():
        table.add_layer(name, name, *shape)


def _add_open_clip(table: _Table, config: Mapping[str, Any], text_projection: TextProjection) -> None:
    """Add text encoder 2: OpenCLIP stacks q, k and v, and transposes the projection because it computes x @ W."""
    hidden, inner, projected = config["hidden_size"], config["intermediate_size"], config["projection_dim"]
    file_names = ("token_embedding.weight", "positional_embedding")
    for file, (source, size) in zip(file_names, _list_embedding_sizes(config).items(), strict=True):
        table.add(source, file, (size, hidden))
    for index in range(config["num_hidden_layers"]):
        layer, block = f"text_model.encoder.layers.{index}", f"transformer.resblocks.{index}"
        for kind, shape in (("weight", (hidden, hidden)), ("bias", (hidden,))):
            sources = tuple(f"{layer}.self_attn.{part}_proj.{kind}" for part in ("q", "k", "v"))
            table.add(sources, f"{block}.attn.in_proj_{kind}", shape, (3 * hidden, *shape[1:]))
        table.add_layer(f"{layer}.self_attn.out_proj", f"{block}.attn.out_proj", hidden, hidden)
        table.add_layer(f"{layer}.layer_norm1", f"{block}.ln_1", hidden)
        table.add_layer(f"{layer}.mlp.fc1", f"{block}.mlp.c_fc", inner, hidden)
        table.add_layer(f"{layer}.mlp.fc2", f"{block}.mlp.c_proj", hidden, inner)
        table.add_layer(f"{layer}.layer_norm2", f"{block}.ln_2", hidden)
    table.add_layer("text_model.final_layer_norm", "ln_final", hidden)
    correct = text_projection == "correct"
    file_shape = (hidden, projected) if correct else (projected, hidden)
    table.add("text_projection.weight", "text_projection", (projected, hidden), file_shape, transposed=correct)
    table.add("logit_scale", "logit_scale", (), carried=True)


def _list_embedding_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the source names of the token and position embeddings with their numbers of rows."""
    return {
        "text_model.embeddings.token_embedding.weight": config["vocab_size"],
        "text_model.embeddings.position_embedding.weight": config["max_position_embeddings"],
    }
