"""Preview of the data as the model will see it: `bash launch/preview.sh --cfg x.yaml`.

Tables show bucket counts, caption lengths in tokens, drawn captions, and what is missing or bad. A contact sheet shows
the first samples of the run, decoded from their latents, cropped and flipped as in training, with their captions.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from sdxl_trainer.cache.models.encoders import load_tokenizers
from sdxl_trainer.cache.models.source import ModelSource, check_model, resolve_model
from sdxl_trainer.cache.preview.contact_sheet import PreviewSample, decode_samples, draw_sheet
from sdxl_trainer.configs.load import load_config
from sdxl_trainer.configs.paths import parse_path
from sdxl_trainer.configs.problems import Problem, UserInputError, parse_count, raise_if_any
from sdxl_trainer.configs.schema import Config, ModelConfig
from sdxl_trainer.data.checks.latent_files import ROWS_A_TASK, count_unflipped, find_bad_latents
from sdxl_trainer.data.checks.records import count_uncaptioned, open_checked_records
from sdxl_trainer.data.checks.training_set import check_flip, count_missing, warn_about_unflipped
from sdxl_trainer.data.files import open_atomic
from sdxl_trainer.data.index.index import Index, open_sample_index
from sdxl_trainer.data.index.schema import BadSample
from sdxl_trainer.data.index.selection import build_latent_selection, get_cache_folder
from sdxl_trainer.data.loading.counts import count_buckets, count_tokens, draw_captions
from sdxl_trainer.data.loading.dataset import LatentDataset
from sdxl_trainer.data.loading.loader import build_dataset, build_plan, iterate_specs
from sdxl_trainer.data.order.even_selection import select_evenly
from sdxl_trainer.data.order.plan import Plan, Position
from sdxl_trainer.data.order.source_weights import apply_source_weights, check_weighted_samples
from sdxl_trainer.data.text.strategy import compute_repeats, load_strategy
from sdxl_trainer.launch.logger import init_logger
from sdxl_trainer.launch.program import build_parser, run_program

NUM_BLOCKS = 8  # blocks of ROWS_A_TASK samples whose latents are verified
NUM_SHOWN, NUM_DRAWS = 5, 3  # samples in the table of captions, and captions drawn of each
MAX_BUCKETS = 60


def show_preview(config: Config, problems: list[Problem], file: Path | None, num_images: int, console: Console) -> None:
    """Print the tables and write the contact sheet to `file` (default: `preview.png` in the run folder).

    Raises:
        UserInputError: settings or data are wrong; all problems at once.
    """
    records, found = open_checked_records(config)
    raise_if_any([*problems, *found, *check_model(config.model)])
    assert records is not None, "records without problems have an index"
    index = open_sample_index(get_cache_folder(config), records, build_latent_selection(config))
    console.print(tabulate_state(config, records, index))
    if len(index) == 0:
        rule = "holds no latents of these records"
        cure = "run bash launch/cache.sh first, or set cache.on_missing: encode"
        raise UserInputError([Problem("cache.dir", get_cache_folder(config), rule, cure)])
    data = config.data
    num_unflipped = count_unflipped(index, get_cache_folder(config)) if data.flip_rate else 0
    warn_about_unflipped(num_unflipped, len(index))
    raise_if_any(
        [
            *check_flip(data.flip_rate, num_unflipped, len(index)),
            *check_weighted_samples(data.source_weights, index),
        ]
    )
    source = resolve_model(config.model)
    strategy = load_strategy(config.data.strategy) if config.data.strategy else None
    repeats = compute_repeats(strategy, index) if strategy and strategy.has("repeats") else None
    repeats = apply_source_weights(index, repeats, config.data.source_weights)
    shuffle_shards = config.data.remote_shards.shuffle_shards
    plan = build_plan(index, config.train.global_batch_size, config.run.seed, repeats, shuffle_shards)
    # Captions are drawn from the records, so the preview needs no cached text.
    cache = config.cache.model_copy(update={"text": False})
    textless = config.model_copy(update={"cache": cache})
    dataset = build_dataset(textless, index, load_tokenizers(source, config.model), strategy)
    console.print(tabulate_buckets(plan))
    console.print(tabulate_lengths(dataset))
    console.print(tabulate_captions(dataset))
    if num_images:
        write_sheet(config.model, source, dataset, plan, file or config.run.folder / "preview.png", num_images, console)


def tabulate_state(config: Config, records: Index, index: Index) -> Table:
    """Build the table of sample counts: total, missing and bad."""
    num_wanted = index.summary.num_wanted
    blocks = select_evenly(-(-len(index) // ROWS_A_TASK), NUM_BLOCKS) * ROWS_A_TASK
    num_verified = int(np.minimum(len(index) - blocks, ROWS_A_TASK).sum())
    bad = find_bad_latents(index, get_cache_folder(config), "header", blocks.tolist())
    table = Table(title=f"{config.run.name}: samples", show_header=False)
    counts = {
        "records": len(records),
        "without a caption": count_uncaptioned(records),
        "samples (records x resolutions)": num_wanted,
        "with latents": len(index) - index.summary.num_uncached,
        "encoded during training": index.summary.num_uncached,
        "skipped: no latents": count_missing(index),
        "skipped: bad": index.summary.num_bad,
    }
    for name, count in counts.items():
        table.add_row(name, f"{count:,}", f"{count / max(1, num_wanted):.1%}")
    table.add_row(f"bad among {num_verified:,} verified", f"{len(bad):,}", f"{len(bad) / max(1, num_verified):.1%}")
    for row in bad[:NUM_SHOWN]:
        table.add_row("", row.reason, "")
    return table


def tabulate_buckets(plan: Plan) -> Table:
    """Build the table of samples and global batches per bucket, the fullest bucket first."""
    sizes = count_buckets(plan)
    total, per_batch = sum(sizes.values()), plan.global_batch_size
    names = list(sizes)
    title = f"{len(sizes)} buckets, {total:,} samples and {plan.num_batches(0):,} global batches in epoch 0"
    table = Table("bucket", "ratio", "samples", "share", "batches", title=title)
    for bucket in names[:MAX_BUCKETS]:
        (width, height), count = map(int, bucket.split("x")), sizes[bucket]
        table.add_row(bucket, f"{width / height:.2f}", f"{count:,}", f"{count / total:.1%}", f"{count / per_batch:.1f}")
    if len(names) > MAX_BUCKETS:
        rest = sum(sizes[bucket] for bucket in names[MAX_BUCKETS:])
        table.add_row(f"{len(names) - MAX_BUCKETS} others", "", f"{rest:,}", f"{rest / total:.1%}", "")
    return table


def tabulate_lengths(dataset: LatentDataset) -> Table:
    """Build the table of caption lengths for both tokenizers, from samples spread over the whole set."""
    counts = count_tokens(dataset)
    number, (num_cut, num_cut_2) = counts.num_captions, counts.num_cut
    longer = f"{num_cut} and {num_cut_2} are longer than data.max_tokens = {counts.max_tokens}"
    table = Table("tokens", "encoder 1", "", "encoder 2", "", title=f"tokens of {number:,} captions; {longer}")
    for name, counted in counts.classes.items():
        shares = [count / max(1, number) for count in counted]
        table.add_row(
            name,
            *(
                cell
                for count, share in zip(counted, shares, strict=True)
                for cell in (str(count), "█" * round(20 * share))
            ),
        )
    return table


def tabulate_captions(dataset: LatentDataset) -> Table:
    """Build the table of a few samples' captions, as drawn in the first epochs."""
    rows = select_evenly(len(dataset.index), NUM_SHOWN)
    table = Table("sample", *(f"epoch {epoch}" for epoch in range(NUM_DRAWS)), title="captions", show_lines=True)
    drawn = [draw_captions(dataset, rows, epoch) for epoch in range(NUM_DRAWS)]
    for row, *captions in zip(rows.tolist(), *drawn, strict=True):
        table.add_row(
            str(dataset.index.arrow_column("key")[row]),
            *("(the strategy failed)" if caption is None else caption or "(empty)" for caption in captions),
        )
    return table


def write_sheet(
    model: ModelConfig,
    source: ModelSource,
    dataset: LatentDataset,
    plan: Plan,
    file: Path,
    num_samples: int,
    console: Console,
) -> None:
    """Write the contact sheet of the first samples that the run trains on."""
    samples = list(islice(iterate_samples(dataset, plan), min(num_samples, len(dataset.index))))
    sheet = draw_sheet(decode_samples(samples, source, model))
    file.parent.mkdir(parents=True, exist_ok=True)
    with open_atomic(file) as stream:
        sheet.save(stream, "PNG")
    for place, sample in enumerate(samples):
        console.print(f"{place:3d} {sample.key}: {sample.note}", markup=False)
    console.print(f"{len(samples)} samples: {file}", markup=False)


def iterate_samples(dataset: LatentDataset, plan: Plan) -> Iterator[PreviewSample]:
    """Yield the training samples in the order in which the run uses them."""
    for spec in iterate_specs(plan, Position(0, 0), 0, 1, 1):
        batch, row = dataset[spec], dataset.index.row(int(spec.rows[0]))
        caption = dataset.draw_caption(row, spec.step, int(spec.epochs[0]), int(spec.rows[0]))
        left = int(batch.time_ids[0, 3])
        pixels = batch.pending[0].pixels.numpy() if batch.pending else None
        size = f"{row['original_width']}x{row['original_height']} to {spec.bucket[0]}x{spec.bucket[1]}"
        note = f"{size}, crop left {left} top {row['crop_top']}" + (", no latents yet" if batch.pending else "")
        yield PreviewSample(
            key=row["key"],
            caption="" if isinstance(caption, BadSample) else caption.text,
            note=note,
            latents=batch.latents[0],
            pixels=pixels,
            bad=batch.bad[0].reason if batch.bad else None,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Show the data as the model will see it; return the exit status (0 done, 2 wrong input)."""
    parser = build_parser("Show the data as the model will see it.")
    parser.add_argument("--out", type=parse_path, help="file of the contact sheet (preview.png in the run folder)")
    parser.add_argument(
        "--images",
        "--pictures",
        dest="images",
        type=partial(parse_count, least=0),
        default=16,
        help="samples in the contact sheet; 0 draws none",
    )
    options = parser.parse_intermixed_args(arguments)

    def work() -> None:
        config, problems = load_config(options.cfg, options.overrides)
        init_logger(0, config.log.level)
        show_preview(config, problems, options.out, options.images, Console())

    return run_program(work)
