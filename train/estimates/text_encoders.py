"""Cost of frozen text encoders that run in each step, and what `cache.text` would save."""

from collections.abc import Mapping, Sequence
from typing import Any

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.text.strategy import supplies_captions
from sdxl_trainer.data.text.tokens import WINDOW
from sdxl_trainer.data.text.variants import list_random_settings
from sdxl_trainer.train.estimates.flops import BACKWARD_PASSES, REPEATED_BY_FULL, average_training_flops
from sdxl_trainer.train.estimates.memory import FROZEN_ENCODERS
from sdxl_trainer.train.estimates.memory_table import MemoryTable, format_gb
from sdxl_trainer.train.networks.trained_networks import ENCODERS, list_trained_encoders

ADVISED_VARIANTS = 8  # of random captions
BYTES_OF_VALUE = {"float32": 4, "float16": 2, "bfloat16": 2}  # by `cache.dtype`


def describe_text_encoders(config: Config, source: ModelSource, table: MemoryTable) -> str:
    """Describe what the text encoders cost in each step, and what it takes to store their outputs instead.

    Args:
        config: with `engine.gradient_checkpointing` chosen.
        table: memory of a rank with these settings.

    Returns:
        "" if the encoders run in no step, if their outputs cannot be stored, or if the U-Net does not have SDXL's
        topology.
    """
    if config.cache.text or config.data.caption.token_warmup_steps or list_trained_encoders(config.optim):
        return ""
    num_windows = config.data.max_tokens // WINDOW
    try:
        encoders = [source.read_config(name) for name in ENCODERS]
        flops = num_windows * sum(map(count_encoder_flops, encoders))
        unet_flops = average_training_flops(source.read_config("unet"), config.data)
        caption_bytes = compute_caption_bytes(encoders, num_windows, BYTES_OF_VALUE[config.cache.dtype])
    except (OSError, ValueError, KeyError):
        return ""
    # Adapters need no gradients of the frozen weights, and checkpointing repeats much of the forward pass.
    repeated = REPEATED_BY_FULL if config.engine.gradient_checkpointing == "full" else 0
    passes = BACKWARD_PASSES + (not config.lora.rank) + repeated
    share = flops / (flops + unet_flops * passes / (1 + BACKWARD_PASSES))
    memory = format_gb(sum(line.device for line in table.lines if line.component == FROZEN_ENCODERS))
    if not has_random_captions(config):
        return (
            f"{share:.1%} of the step's FLOPs and {memory}; cache.text: true saves both and stores "
            f"{caption_bytes / 1e6:.2g} MB an image"
        )
    variants = max(config.cache.text_variants, ADVISED_VARIANTS)
    return (
        f"{share:.1%} of the step's FLOPs and {memory}; cache.text: true saves both. Captions are random: with "
        f"cache.text_variants: {variants} it stores {variants * caption_bytes / 1e6:.2g} MB an image"
    )


def has_random_captions(config: Config) -> bool:
    """Return whether settings or the user's class build another caption each time, dropout aside."""
    return supplies_captions(config.data.strategy) or bool(list_random_settings(config.data.caption))


def count_encoder_flops(encoder: Mapping[str, Any]) -> float:
    """Count the FLOPs of one window of 77 tokens from the config of a CLIP text encoder, without the pooled output's.

    A layer has four square projections, two of the feed-forward network, and attention over the window.
    """
    length = WINDOW + 2
    # Multiplications of a token: with all keys, and with all values.
    attention = encoder["num_hidden_layers"] * 2 * length * encoder["hidden_size"]
    return 2.0 * length * (count_encoder_weights(encoder) + attention)


def count_encoder_weights(encoder: Mapping[str, Any]) -> int:
    """Count the weights of a CLIP text encoder's layers from its config, without biases and embeddings."""
    width = encoder["hidden_size"]
    return encoder["num_hidden_layers"] * (4 * width * width + 2 * width * encoder["intermediate_size"])


def compute_caption_bytes(encoders: Sequence[Mapping[str, Any]], num_windows: int, bytes_of_value: int) -> int:
    """Return the bytes of a caption's stored outputs: the states of both encoders, and the second's pooled state.

    Args:
        encoders: configs of both text encoders.
    """
    states = (num_windows * WINDOW + 2) * sum(encoder["hidden_size"] for encoder in encoders)
    return (states + encoders[-1]["projection_dim"]) * bytes_of_value
