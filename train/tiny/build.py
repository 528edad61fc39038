"""The tiny SDXL: a complete model folder in diffusers layout, with SDXL's topology and about 3 million weights.

The tests and the learning benchmark use it to run the real programs on a CPU. The VAE is trained (train/tiny/vae.py
wrote its weights); the U-Net and the text encoders have random weights from a seed. The quick start fine-tunes the
pre-trained tiny SDXL, whose U-Net knows four shapes (train/tiny/pretraining.py wrote its weights).
"""

import json
import math
import shutil
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sdxl_trainer.configs
from sdxl_trainer.configs.language.arguments import TranslatedParser
from sdxl_trainer.configs.language.translate import translate
from sdxl_trainer.configs.paths import parse_path
from sdxl_trainer.launch.logger import quiet_libraries

if TYPE_CHECKING:
    import torch

CONFIG_FOLDER = Path(sdxl_trainer.configs.__file__).parent / "tiny"
VAE_WEIGHTS = CONFIG_FOLDER / "vae" / "diffusion_pytorch_model.safetensors"
# fp16 weights of the pre-trained U-Net and its text encoders; names begin with the component's folder.
PRETRAINED_WEIGHTS = CONFIG_FOLDER / "pretrained.safetensors"
# Folder of a component → its file in diffusers' layout.
PRETRAINED_FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}
# Settings of the scheduler for v-prediction with zero terminal SNR, with which the U-Net was pre-trained.
PRETRAINED_SCHEDULER = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
# Standard deviation of a text encoder's random weights, times the square root of their fan-in, by part of their name.
TEXT_ENCODER_GAINS = {
    "token_embedding": 1.0,
    "position_embedding": 0.3,
    "q_proj": 0.5,
    "k_proj": 0.5,
    "fc1": 0.5,
    "fc2": 0.5,
    "": 1.5,  # all other weights
}
TRAINED_CHANNELS, CHANNELS = 4, (4, 16, 32)  # of the latents
COPIED_PARTS = ("model_index.json", "scheduler", "tokenizer", "tokenizer_2")


def build_tiny_sdxl(folder: Path, seed: int = 0, channels: int = 4) -> Path:
    """Write the tiny SDXL into a folder, in fp32 safetensors, and return the folder.

    `StableDiffusionXLPipeline.from_pretrained(folder)` loads it. A seed always gives the same weights, and torch's
    global random state does not change.

    Args:
        channels: of the latents, 4, 16 or 32 (see train/tiny/wide_vae.py).
    """
    import torch

    folder = _copy_parts(Path(folder))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build_tiny_unet(channels).save_pretrained(folder / "unet")
        for name, model in build_tiny_text_encoders().items():
            model.save_pretrained(folder / name)
        load_wide_vae(channels).save_pretrained(folder / "vae")
    _make_readable(folder)
    return folder


def _make_readable(folder: Path) -> None:
    """Give the weights the mode of the other files; safetensors leaves 0600."""
    mode = (folder / "model_index.json").stat().st_mode
    for file in folder.glob("*/*.safetensors"):
        file.chmod(stat.S_IMODE(mode))


def build_pretrained_sdxl(folder: Path, weights: Path = PRETRAINED_WEIGHTS) -> Path:
    """Write the pre-trained tiny SDXL into a folder, in fp32 safetensors, and return the folder."""
    from safetensors.torch import load_file, save_file

    folder = _copy_parts(Path(folder))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(scheduler.read_text(encoding="utf-8")) | PRETRAINED_SCHEDULER
    scheduler.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    tensors = load_file(weights)
    for name, file in PRETRAINED_FILES.items():
        (folder / name).mkdir(exist_ok=True)
        shutil.copyfile(CONFIG_FOLDER / name / "config.json", folder / name / "config.json")
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        save_file({key: value.float() for key, value in own.items()}, folder / name / file, {"format": "pt"})
    load_tiny_vae().save_pretrained(folder / "vae")
    _make_readable(folder)
    return folder


def _copy_parts(folder: Path) -> Path:
    """Copy the tokenizers, the scheduler's settings and the list of components into a folder, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED_PARTS:
        source = CONFIG_FOLDER / name
        if source.is_dir():
            shutil.copytree(source, folder / name, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, folder / name)
    return folder


def build_tiny_unet(channels: int = 4) -> Any:
    """Build the U-Net (UNet2DConditionModel), initialised from torch's global random state."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_config({**_read_config("unet"), "in_channels": channels, "out_channels": channels})


def build_tiny_vae() -> Any:
    """Build the untrained VAE (AutoencoderKL), initialised from torch's global random state."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(_read_config("vae"))


def build_tiny_text_encoders() -> dict[str, Any]:
    """Build both text encoders, by folder name, initialised from torch's global random state."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    encoders = {}
    for name, model_class in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        model = model_class(CLIPTextConfig.from_pretrained(CONFIG_FOLDER / name))
        _initialise_text_encoder(model)
        encoders[name] = model.eval()
    return encoders


def load_tiny_vae(weights: Path = VAE_WEIGHTS) -> Any:
    """Load the trained VAE (AutoencoderKL) in fp32; the weights in the repository are fp16."""
    from safetensors.torch import load_file

    vae = build_tiny_vae()
    vae.load_state_dict({name: value.float() for name, value in load_file(weights).items()})
    return vae.eval()


def load_wide_vae(channels: int) -> Any:
    """Load the trained VAE with 4 latent channels, or widened to 16 or 32, in fp32."""
    from sdxl_trainer.train.tiny.wide_vae import widen_vae

    return load_tiny_vae() if channels == TRAINED_CHANNELS else widen_vae(load_tiny_vae(), channels)


def _read_config(name: str) -> dict[str, Any]:
    return json.loads((CONFIG_FOLDER / name / "config.json").read_text(encoding="utf-8"))


def _initialise_text_encoder(model: "torch.nn.Module") -> None:
    """Initialise a frozen text encoder so that different words give clearly different hidden and pooled states.

    CLIP's own initialisation (std 0.02) is meant for training: its states differ only in the third decimal place. Here
    a word's embedding has std 1 and dominates its state. Queries and keys are small, so attention averages over the
    preceding words. The pooled state, at EOS, is therefore about a bag of the caption's words.
    """
    import torch

    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:  # biases and norms stay zeros and ones, as built
            gain = next(gain for part, gain in TEXT_ENCODER_GAINS.items() if part in name)
            fan_in = 1 if "embedding" in name else parameter.shape[1]
            torch.nn.init.normal_(parameter, std=gain / math.sqrt(fan_in))


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and write the tiny SDXL."""
    parser = TranslatedParser(prog="python -m sdxl_trainer.train.tiny", description="Write the tiny SDXL.")
    parser.add_argument("--out", type=parse_path, required=True, metavar="DIR", help="model folder to write")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the random weights (0)")
    parser.add_argument("--pretrained", action="store_true", help="write the model that was pre-trained on four shapes")
    parser.add_argument("--channels", type=int, choices=CHANNELS, default=4, help="channels of the latents (4)")
    options = parser.parse_args(arguments)
    quiet_libraries()
    if options.pretrained:
        message = f"pre-trained tiny SDXL in {build_pretrained_sdxl(options.out)}"
    else:
        message = f"tiny SDXL in {build_tiny_sdxl(options.out, options.seed, options.channels)}"
    sys.stdout.write(f"{translate(message)}\n")
