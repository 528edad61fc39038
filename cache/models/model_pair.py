"""The pair of U-Net and VAE: both must have the same number of latent channels, or the U-Net is adapted."""

from collections.abc import Iterator
from dataclasses import replace

from sdxl_trainer.cache.models.adaptation import ChannelAdaptation
from sdxl_trainer.cache.models.source import ModelSource, is_local, is_vae_local, resolve_model
from sdxl_trainer.cache.models.vae import read_vae_config
from sdxl_trainer.configs.problems import Problem, UserInputError, raise_if_any
from sdxl_trainer.configs.schema import Config

NUM_CHANNELS = 4  # of SDXL's U-Net, for configs without them


def check_pair(config: Config) -> Iterator[Problem]:
    """Yield a problem if U-Net and VAE have other channels, and the settings do not adapt the U-Net or cannot.

    Only for a model that `check_model` accepts. What is on the hub is not checked before `resolve_pair` downloads it.
    """
    if is_local(config.model) and is_vae_local(config.model):
        try:
            yield from _compare(config, resolve_model(config.model))
        except UserInputError as error:
            yield from error.problems


def resolve_pair(config: Config) -> ModelSource:
    """Return the location of a checked model, whose U-Net is adapted to the channels of the VAE if they differ.

    Raises:
        UserInputError: the channels differ, and the settings do not adapt the U-Net or cannot; or the hub does not have
            the model.
    """
    source = resolve_model(config.model)
    raise_if_any(list(_compare(config, source)))
    channels = read_vae_config(source, config.model)["latent_channels"]
    if count_channels(source) == channels:
        return source
    return replace(source, adaptation=ChannelAdaptation(channels, config.run.seed))


def count_channels(source: ModelSource) -> int:
    """Return the number of latent channels of the U-Net."""
    return source.read_config("unet").get("in_channels", NUM_CHANNELS)


def describe_adaptation(config: Config, source: ModelSource) -> str:
    """Return a sentence on what `model.adapt_channels` does to the model."""
    if source.adaptation is None:
        return f"nothing to adapt: U-Net and VAE have {count_channels(source)} channels"
    stored = source.read_stored_config("unet").get("in_channels", NUM_CHANNELS)
    return (
        f"the U-Net is adapted from {stored} to {source.adaptation.channels} channels: its conv_in and conv_out begin "
        f"with new weights, drawn from run.seed {config.run.seed}"
    )


def _compare(config: Config, source: ModelSource) -> Iterator[Problem]:
    model, of_unet = config.model, count_channels(source)
    of_vae = read_vae_config(source, model)["latent_channels"]
    if of_unet == of_vae:
        return
    if not model.adapt_channels:
        rule = f"does not allow a U-Net of {of_unet} channels with a VAE of {of_vae}"
        cure = (
            f"set it to true, which replaces the first and the last layer of the U-Net by untrained ones of {of_vae} "
            f"channels; or set model.vae to a VAE of {of_unet} channels"
        )
        yield Problem("model.adapt_channels", False, rule, cure)
    elif config.lora.rank:
        rule = f"leaves untrained the new first and last layers that a U-Net of {of_unet} channels gets for this VAE"
        cure = (
            "train the whole U-Net first, with lora.rank: 0, and set model.path to the model that this exports "
            "(docs/RECIPES.md)"
        )
        yield Problem("lora.rank", config.lora.rank, rule, cure)
