"""Preview of the data as the model will see it: `bash launch/preview.sh --cfg x.yaml`.

It works before anything is cached. Tables and a page name the images that are worth a look (without captions,
duplicates, enlarged, cropped, broken), and show buckets, tags, lengths of captions and drawn captions. A contact sheet
shows the first samples of the run, decoded from their latents, cropped and flipped as in training, with captions.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from rich.console import Console

from sdxl_trainer.cache.models.encoders import load_tokenizers
from sdxl_trainer.cache.models.source import check_model, resolve_model
from sdxl_trainer.cache.models.vae import read_vae_config
from sdxl_trainer.cache.preview.contact_sheet import PreviewSample, decode_samples, iterate_samples, write_sheet
from sdxl_trainer.cache.preview.limits import SurveyLimits
from sdxl_trainer.cache.preview.page import PageWriter, RecordNames
from sdxl_trainer.cache.preview.survey import find_cut_captions, survey_records
from sdxl_trainer.cache.preview.tables import (
    DataTable,
    tabulate_buckets,
    tabulate_captions,
    tabulate_lengths,
    tabulate_repeats,
    tabulate_section,
    tabulate_state,
    tabulate_survey,
    tabulate_tags,
)
from sdxl_trainer.configs.language.translate import join_label, translate, translate_label
from sdxl_trainer.configs.problems import Problem, raise_if_any
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.checks.latent_files import count_unflipped
from sdxl_trainer.data.checks.records import open_checked_records
from sdxl_trainer.data.checks.training_set import check_flip, warn_about_unflipped
from sdxl_trainer.data.formats.latents import SDXL_CHANNELS
from sdxl_trainer.data.index.index import Index, open_sample_index
from sdxl_trainer.data.index.selection import build_bucket_rules, build_latent_selection, get_cache_folder
from sdxl_trainer.data.loading.counts import count_buckets, count_lengths
from sdxl_trainer.data.loading.dataset import LatentDataset
from sdxl_trainer.data.loading.loader import build_dataset, build_plan
from sdxl_trainer.data.order.plan import Plan
from sdxl_trainer.data.order.source_weights import apply_data_repeats, check_weighted_samples
from sdxl_trainer.data.text.strategy import Strategy, compute_repeats, load_strategy


def show_preview(config: Config, problems: list[Problem], options: argparse.Namespace, console: Console) -> None:
    """Print the tables, and write the page, the list of findings, and the contact sheet.

    Args:
        options: of the command line; see `main`.

    Raises:
        UserInputError: settings or data are wrong; all problems at once.
    """
    raise_if_any(problems)
    records, found = open_checked_records(config, need_captions=False)
    raise_if_any([*found, *check_model(config.model)])
    assert records is not None, "records without problems have an index"
    limits = SurveyLimits(
        num_opened=options.examine, max_enlargement=options.enlarged, max_cropped=options.cropped / 100
    )
    samples = open_sample_index(get_cache_folder(config), records, build_latent_selection(config))
    console.print(tabulate_state(config, records, samples).draw())
    strategy = load_strategy(config.data.strategy) if config.data.strategy else None
    plan = build_sample_plan(config, samples, strategy) if len(samples) else None
    source = resolve_model(config.model)
    # Captions are drawn from the records, so the preview needs no cached text.
    textless = config.model_copy(update={"cache": config.cache.model_copy(update={"text": False})})
    tokenizers = load_tokenizers(source, config.model)
    # Without latents no VAE is needed, which may have to be downloaded.
    channels = read_vae_config(source, config.model)["latent_channels"] if plan else SDXL_CHANNELS
    dataset = build_dataset(textless, samples if plan else records, tokenizers, strategy, channels)
    survey = survey_records(config, records, samples, limits, console)
    cut, measured = find_cut_captions(dataset, records, limits)
    survey = replace(survey, sections=[*survey.sections, cut])
    folders = [*config.data.image_dirs, *config.data.regularisation_dirs, get_cache_folder(config)]
    writer = PageWriter(
        name=config.run.name,
        survey=survey,
        names=RecordNames(records, folders, config.data.caption.separator),
        rule=build_bucket_rules(config.data)[""],
        num_workers=config.cache.num_workers,
    )
    buckets = build_bucket_table(writer, plan, config.train.global_batch_size)
    tables = [
        *tabulate_repeats(samples if plan else records, config.data),
        tabulate_tags(survey.tags),
        tabulate_lengths(count_lengths(measured, config.data.max_tokens)),
        tabulate_captions(dataset),
    ]
    print_tables(writer, [buckets, *tables], console)
    out = options.out or config.run.folder / "preview.png"
    page, listed, sheet = (out.with_suffix(suffix) for suffix in (".html", ".jsonl", ".png"))
    out.parent.mkdir(parents=True, exist_ok=True)
    writer.write_list(listed)
    writer.write_page(page, listed, buckets, tables)
    written = {"page": page, "all findings": listed}
    if options.images:
        samples_shown = choose_samples(writer, dataset, plan, options.images)
        write_sheet(sheet, decode_samples(samples_shown, source, config.model))
        written[f"{len(samples_shown)} samples"] = sheet
    for name, file in written.items():
        console.print(join_label(translate_label(name), str(file)), markup=False, highlight=False, soft_wrap=True)
    if plan is None:
        console.print(translate("no latents yet: bash launch/cache.sh with the same settings encodes the images"))


def build_sample_plan(config: Config, samples: Index, strategy: Strategy | None) -> Plan:
    """Check the samples as training does, and build the order of batches.

    Raises:
        UserInputError: the samples do not fit the settings.
    """
    data = config.data
    num_unflipped = count_unflipped(samples, get_cache_folder(config)) if data.flip_rate else 0
    warn_about_unflipped(num_unflipped, len(samples))
    weights = check_weighted_samples(data, samples)
    raise_if_any([*check_flip(data.flip_rate, num_unflipped, len(samples)), *weights])
    repeats = compute_repeats(strategy, samples) if strategy and strategy.has("repeats") else None
    repeats = apply_data_repeats(samples, repeats, data)
    shuffle_shards = data.remote_shards.shuffle_shards
    return build_plan(samples, config.train.global_batch_size, config.run.seed, repeats, shuffle_shards)


def build_bucket_table(writer: PageWriter, plan: Plan | None, per_batch: int) -> DataTable:
    """Build the table of buckets: of the plan, or without latents of all images whose size is known."""
    if plan is None:
        sizes = writer.count_buckets()
        title = f"{len(sizes)} buckets of {sum(sizes.values()):,} images whose size is known; no latents yet"
        return tabulate_buckets(sizes, title, per_batch)
    sizes = count_buckets(plan)
    total = f"{sum(sizes.values()):,} samples and {plan.num_batches(0):,} global batches in epoch 0"
    return tabulate_buckets(sizes, f"{len(sizes)} buckets, {total}", per_batch)


def print_tables(writer: PageWriter, tables: Sequence[DataTable], console: Console) -> None:
    """Print what is worth a look, and the tables of the page."""
    console.print(translate(writer.survey.extent), "\n", highlight=False)
    console.print(tabulate_survey(writer.survey).draw())
    for section in writer.survey.sections:
        if section.findings:
            names = [writer.names.get_name(finding.row) for finding in section.findings]
            console.print(tabulate_section(section, names).draw())
    for table in tables:
        console.print(table.draw())


def choose_samples(writer: PageWriter, dataset: LatentDataset, plan: Plan | None, number: int) -> list[PreviewSample]:
    """Return the first samples that the run trains on; without latents, images of every bucket, cropped alike."""
    if plan is None:
        return writer.crop_examples(number)
    return list(islice(iterate_samples(dataset, plan), min(number, len(dataset.index))))
