"""The model card: a README.md as the hub shows it, with images and charts, made from a model file and its run.

Whatever stands in a card is meant for the public: no path of the user's machine gets there.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sdxl_trainer import __version__
from sdxl_trainer.configs.problems import format_count
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.files import create_folder, write_atomic
from sdxl_trainer.train.checkpoint.model_argument import DeclaredPrediction
from sdxl_trainer.train.export.card_facts import CardFacts, collect_facts
from sdxl_trainer.train.export.model_run import ModelRun

CARD = "README.md"
NO_ID = "YOUR_NAME/YOUR_MODEL"  # in a card that is not pushed yet
BASE_ID = "stabilityai/stable-diffusion-xl-base-1.0"
MAX_BUCKETS = 8
# Identifiers that the hub knows; it asks for `other` and a name or a link for all others.
LICENSES = frozenset(
    "afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd-2-clause bsd-3-clause bsl-1.0 cc cc-by-2.0 cc-by-3.0 cc-by-4.0 "
    "cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-4.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 "
    "cc0-1.0 creativeml-openrail-m gpl-2.0 gpl-3.0 isc lgpl-2.1 lgpl-3.0 mit mpl-2.0 openrail openrail++ unlicense "
    "wtfpl zlib".split()
)
# Settings that say how the model was trained. Names of files and folders are none of them.
PUBLIC_SETTINGS: dict[str, Any] = {
    "model": {
        *("vae_padding", "vae_scaling_factor", "vae_shift_factor", "text_projection", "latents_mean", "latents_std"),
    },
    "data": {
        *("resolution_px", "buckets", "min_bucket_px", "max_bucket_px", "bucket_step_px", "no_upscale", "flip_rate"),
        *("caption", "max_tokens"),
    },
    "cache": {"posterior", "dtype", "vae_precision", "flip", "text_variants"},
    "objective": ...,
    "optim": ...,
    "engine": {"precision", "gradient_release"},
    "lora": ...,
    "ema": {"decays", "lengths", "warmup"},
    "train": ...,
    "validation": {"share", "every_steps"},
}


def get_card_folder(model: Path) -> Path:
    """Return the folder of a model's card: the model's own, or for a file one beside it."""
    return model if model.is_dir() else model.with_suffix(".card")


def write_card(model: Path, run: ModelRun | None, config: Config | None, hub_id: str = NO_ID) -> Path:
    """Write the card of a model, with its images and charts, and return its file.

    Args:
        config: settings of the run; None for a model of other programs.
    """
    folder = get_card_folder(model)
    create_folder(folder / "images")
    facts = collect_facts(model, run, config, folder)
    write_atomic(folder / CARD, build_card(facts, hub_id))
    return folder / CARD


def build_card(facts: CardFacts, hub_id: str = NO_ID) -> str:
    """Return the text of a card."""
    parts = [
        build_front_matter(facts),
        f"# {make_line(facts.about['title'])}",
        facts.about.get("description", ""),
        "\n".join(list_hints(facts.about)),
        build_images(facts.images),
        build_usage(facts, hub_id),
        build_training(facts),
        build_data(facts.counts),
        build_charts(facts.charts),
        f"Made with sdxl-trainer {__version__}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def build_front_matter(facts: CardFacts) -> str:
    """Return the YAML at the head of a card, by which the hub sorts and shows models."""
    about = facts.about
    tags = ["stable-diffusion-xl", *(["lora"] if facts.is_adapter else [])]
    tags += [tag.strip() for tag in about.get("tags", "").split(",") if tag.strip()]
    relation = {"base_model_relation": "adapter" if facts.is_adapter else "finetune"}
    fields = {
        **describe_license(about.get("license", "")),
        **({"base_model": facts.base_model, **relation} if facts.base_model else {}),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": list(dict.fromkeys(tags)),
        **({"instance_prompt": about["trigger_phrase"]} if "trigger_phrase" in about else {}),
    }
    widget = [{"text": prompt, "output": {"url": file}} for file, prompt in facts.images.items() if prompt]
    text = yaml.safe_dump({**fields, **({"widget": widget} if widget else {})}, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---"


def describe_license(text: str) -> dict[str, str]:
    """Return the hub's keys of a licence: its identifier, or `other` with the name or the address."""
    if not text:
        return {}
    if text.lower() in LICENSES:
        return {"license": text.lower()}
    is_address = text.startswith(("http://", "https://"))
    return {"license": "other", "license_link" if is_address else "license_name": make_line(text)}


def list_hints(about: Mapping[str, str]) -> Iterator[str]:
    """Yield lines for those who use the model: author, trigger phrase, hint, origin."""
    for key, title in (
        ("author", "Author"),
        ("trigger_phrase", "Trigger phrase"),
        ("usage_hint", "Hint"),
        ("merged_from", "Merged from"),
    ):
        if key in about:
            yield f"- {title}: {make_line(about[key])}"


def build_images(images: Mapping[str, str]) -> str:
    """Return the section of the generated images."""
    if not images:
        return ""
    shown = [f"![]({file})\n\n`{make_line(prompt).replace('`', chr(39))}`" for file, prompt in images.items()]
    text = "The run drew these. Each PNG holds its parameters, which ComfyUI and A1111 read."
    return "\n\n".join(["## Generated images", text, *shown])


def build_usage(facts: CardFacts, hub_id: str) -> str:
    """Return the section on loading the model in ComfyUI and diffusers."""
    lines = ["## Use", ""]
    if facts.is_folder:
        lines += [f'This is a diffusers folder: `DiffusionPipeline.from_pretrained("{hub_id}")` loads it.']
    elif facts.is_adapter:
        lines += [f"ComfyUI: put `{facts.name}` into `models/loras` and load it with the node *Load LoRA*."]
    else:
        lines += [f"ComfyUI: put `{facts.name}` into `models/checkpoints` and load it with *Load Checkpoint*."]
    lines += list(describe_prediction(facts.prediction))
    return "\n".join([*lines, "", "```python", *build_code(facts, hub_id), "```"])


def describe_prediction(declared: DeclaredPrediction | None) -> Iterator[str]:
    """Yield what other programs must know of the prediction type; nothing for epsilon, which they assume."""
    if declared is None or declared.prediction == "epsilon":
        return
    if declared.prediction == "v":
        snr = ", with zero terminal SNR" if declared.zero_terminal_snr else ""
        yield f"It predicts v{snr}. The file declares this, which ComfyUI reads."
    else:
        yield f"It is a rectified flow with shift {declared.timestep_shift:g}: use *ModelSamplingSD3* with that shift."


def build_code(facts: CardFacts, hub_id: str) -> list[str]:
    """Return lines of Python that load the model with diffusers and draw an image."""
    pipeline = "pipeline = StableDiffusionXLPipeline"
    if facts.is_folder:
        load = [f'{pipeline}.from_pretrained("{hub_id}", torch_dtype=torch.float16)']
    elif facts.is_adapter:
        base = facts.base_model or BASE_ID
        load = [
            f'{pipeline}.from_pretrained("{base}", torch_dtype=torch.float16)',
            f'pipeline.load_lora_weights("{hub_id}", weight_name="{facts.name}")',
        ]
    else:
        address = f"https://huggingface.co/{hub_id}/blob/main/{facts.name}"
        load = [f'{pipeline}.from_single_file("{address}", torch_dtype=torch.float16)']
    names = ["StableDiffusionXLPipeline"]
    declared = facts.prediction
    if declared is not None and declared.prediction == "v" and not facts.is_folder:
        names.insert(0, "EulerDiscreteScheduler")
        options = 'prediction_type="v_prediction", timestep_spacing="trailing"'
        options += ", rescale_betas_zero_snr=True" if declared.zero_terminal_snr else ""
        load.append(f"pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, {options})")
    prompt = next(iter(facts.images.values()), "") or facts.about.get("trigger_phrase", "a photo of a lighthouse")
    return [
        "import torch",
        f"from diffusers import {', '.join(names)}",
        "",
        *load,
        f'image = pipeline.to("cuda")({make_line(prompt)!r}).images[0]',
    ]


def build_training(facts: CardFacts) -> str:
    """Return the section on how the model was trained, with the settings that differ from the defaults."""
    config, run = facts.config, facts.run
    if config is None or run is None:
        return ""
    rows = {
        "base model": f"[{facts.base_model}](https://huggingface.co/{facts.base_model})" if facts.base_model else "",
        "trained": f"{config.lora.kind} of rank {config.lora.rank}" if config.lora.rank else "the whole U-Net",
        "steps": f"{run.step:,} of {config.train.global_batch_size:,} images" if run.step else "",
        "weights": f"moving average {run.average}" if run.average else "of the last step",
        "resolution": facts.resolution,
        "prediction": config.objective.prediction,
        "optimizer": f"{make_public(config.optim.name)}, learning rate {config.optim.lr:g}, "
        f"{make_public(config.optim.schedule)}",
        "precision": config.engine.precision,
        **facts.facts,
    }
    table = ["| | |", "|---|---|", *(f"| {name} | {make_cell(value)} |" for name, value in rows.items() if value)]
    settings = yaml.safe_dump(list_public_settings(config), sort_keys=False, allow_unicode=True).strip()
    details = [
        "<details><summary>Settings that differ from the defaults</summary>",
        f"\n```yaml\n{settings}\n```\n\n</details>",
    ]
    return "\n".join(["## Training", "", *table, "", *details])


def list_public_settings(config: Config) -> dict[str, Any]:
    """Return the settings that differ from the defaults and say how the model was trained, without any path."""
    settings = config.model_dump(mode="json", exclude_defaults=True, include=PUBLIC_SETTINGS)
    return {name: kept for name, section in settings.items() if (kept := drop_paths(section))}


def drop_paths(value: Any) -> Any:
    """Return a setting without the texts in it that may be paths; None if nothing is left."""
    if isinstance(value, dict):
        return {key: kept for key, item in value.items() if (kept := drop_paths(item)) is not None} or None
    if isinstance(value, list):
        return [kept for item in value if (kept := drop_paths(item)) is not None] or None
    return None if isinstance(value, str) and is_path_like(value) else value


def is_path_like(text: str) -> bool:
    """Return whether a text may be the path of a file, or name the user's own code by one."""
    return "/" in text or text.startswith(("~", ".")) or ".py:" in text


def make_public(name: str) -> str:
    """Return the name of an optimizer or schedule; the user's own code is not named by its path."""
    return "own code" if ":" in name or is_path_like(name) else name


def build_data(counts: Mapping[str, Any]) -> str:
    """Return the section on the training set, which gives numbers alone."""
    if not counts:
        return ""
    buckets, tokens = counts["buckets"], counts["tokens"]
    largest = sorted(buckets.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} ({count:,})" for name, count in largest[:MAX_BUCKETS])
    more = f" and {len(largest) - MAX_BUCKETS:,} more" if len(largest) > MAX_BUCKETS else ""
    lines = [
        f"- {format_count(sum(buckets.values()), 'image')} an epoch, repeats included",
        f"- {format_count(len(buckets), 'bucket')}: {shown}{more}",
        f"- captions of up to {tokens['max_tokens']:,} tokens",
    ]
    return "\n".join(["## Data", "", *lines])


def build_charts(charts: Mapping[str, str]) -> str:
    """Return the section of the charts."""
    return "\n\n".join(["## Charts", *(f"![{title}]({file})" for file, title in charts.items())]) if charts else ""


def make_line(text: str) -> str:
    """Return a text in one line."""
    return " ".join(text.split())


def make_cell(text: str) -> str:
    """Return a text as a cell of a table."""
    return make_line(text).replace("|", "\\|")


def set_hub_id(card: Path, hub_id: str) -> None:
    """Put the hub id into a card that was written before it was known."""
    text = card.read_text(encoding="utf-8")
    if NO_ID in text:
        write_atomic(card, text.replace(NO_ID, hub_id))


def list_card_files(folder: Path) -> Sequence[Path]:
    """Return the files of a card, the card itself first."""
    return [folder / CARD, *sorted(path for path in (folder / "images").glob("*") if path.is_file())]
