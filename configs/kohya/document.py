"""Generate docs/FROM_KOHYA.md and its translations from the table that the import uses.

python -m sdxl_trainer.configs.kohya.document --language en > docs/FROM_KOHYA.md
python -m sdxl_trainer.configs.kohya.document --language zh > docs/zh/FROM_KOHYA.md
"""

import sys
from collections.abc import Callable, Iterator, Sequence

from sdxl_trainer.configs.kohya.entries import Option
from sdxl_trainer.configs.kohya.first_trainer import FIRST_TRAINER_OPTIONS, TRAINER_NAME
from sdxl_trainer.configs.kohya.options import KOHYA_DEFAULTS, KOHYA_GROUPS
from sdxl_trainer.configs.kohya.values import TRAINER
from sdxl_trainer.configs.language.arguments import TranslatedParser, add_language
from sdxl_trainer.configs.language.translate import CATALOGUES, load_translator

HEADER = """# From kohya's scripts, kohya_ss and the first sdxl-trainer

This page is for users of kohya's `sdxl_train.py` and `sdxl_train_network.py`, of their interface kohya_ss, and of the
first sdxl-trainer and its successor. It shows how to convert your settings, and lists what each option becomes.

```bash
python -m sdxl_trainer.configs.import_config train.toml dataset.toml --out my.yaml
```

The importer writes one YAML file. It reads:

| file | from |
|---|---|
| `.toml` | training arguments or datasets of kohya's scripts, with the `config_file` and `dataset_config` they name |
| `.sh`, `.bat`, `.ps1`, `.txt` | a command line of kohya's scripts |
| `.json` | the settings that kohya_ss saves, or datasets of kohya's scripts |
| `.py` | the settings of the first sdxl-trainer or its successor ([below](#settings-of-the-first-sdxl-trainer)) |

- `--ranks` gives the number of GPUs, if accelerate's `--num_processes` does not.
- `--samples` gives the samples per epoch, repeats included. Options such as `sample_every_n_epochs` need it, because
  their settings count steps here. If your image folders are on this machine, the importer counts the images itself.

The length of a run becomes `train.max_epochs` or `train.max_steps`. Latents get a folder of their own
(`cache.dir: latents/<run.name>`, below `run.dir` if that is an absolute path).

The report, on the console and as a comment in the YAML, begins with the number of keys in your files. Each of them is
in one part of the report: imported as it is, imported with a difference, without a counterpart here, unknown (with the
nearest name), rejected, always on here, without effect in the other program either, or empty. Whatever is not imported
exactly has its reason, and so has every default of the other program that is written.

The YAML passes the check of the settings. A value that breaks a rule here is left out, and the report names the key of
your file, the rule and the default that applies. A path with a variable that is not set on this machine is kept. Set
the variable before a run, because an `export` in an imported file is not executed. A value that the other program could
not read either, such as `resolution = "big"`, ends the import with the file, the key and the form that is looked for;
nothing is written. Cached text is left out where text encoders are trained or captions change from step to step, which
exclude it. Adapters of other kinds than LoRA, DoRA, LoHa and LoKr become plain LoRA, with a warning at the top of the
report. Not carried over are saved states, adapters to start from (`network_weights`), their dropout, `random_crop` and
`color_aug`. Read the YAML and run the doctor before you fill the cache: kohya's default precision, fp32, takes more
memory.

The tables below use two signs. `always` means that the option's effect is always on here, without a setting. A
dash means that there is no setting; the third column gives the reason, or what to do instead.

Latents and text encoder outputs that kohya's scripts have cached can be used as they are. Adopt them with `--adopt`;
the cache job without `--adopt` then encodes what is missing:

```bash
bash launch/cache.sh --cfg my.yaml --adopt
bash launch/cache.sh --cfg my.yaml
bash launch/train.sh --cfg my.yaml
```

## Differences without an option

- Captions are cleaned by ftfy, as kohya's tokenizers do (`data.caption.fix_text`). Blank lines at the beginning of a
  caption file are skipped, where kohya's scripts read an empty caption.
- Beside an image, a `.txt` file comes before a `.caption` file, whatever `caption_extension` is.
- Of metadata with `caption` and `tags`, the tags follow the whole caption. If the caption has several lines,
  `data.caption.first_line` leaves only its first line, as in kohya's scripts.
- The settings of captions, buckets, batches and flips apply to the whole training set. If captions differ between your
  subsets, write a strategy (docs/STRATEGY.md).
- `train.global_batch_size` is the batch of all GPUs and accumulation steps together. The run is the same on any number
  of GPUs.
- Samples that do not fill a global batch are carried over to the next epoch. All ranks work on the same bucket.
- The model is conditioned on the crop that was actually made.
- Weight decay is not applied to biases and norm weights.
- An SDXL file is read and written in SDXL's own layout. Set `model.text_projection: legacy` only to continue a model
  whose second text projection was saved untransposed.
- The same command resumes exactly, because checkpoints contain the whole state. Models are exported at the end, and
  from any checkpoint with `train/convert.py`.

Defaults of kohya's scripts that change the result and differ from the defaults here are written into the YAML:
DEFAULTS.

This page is generated by `python -m sdxl_trainer.configs.kohya.document > docs/FROM_KOHYA.md`.
"""
FIRST_TRAINER = """
## Settings of the first sdxl-trainer

```bash
python -m sdxl_trainer.configs.import_config config.py --out my.yaml
```

The importer reads the settings that `get_config` assigns or returns, without executing the file. Names that are not in
this table are those of kohya's options. Metadata may stay in waifuset's SQLite files
([DATA.md](DATA.md#sqlite-waifuset)), and latents that were cached beside the images are used (`--adopt`, as above).
"""
COLUMNS = "| option | setting here | note |"
FIRST_COLUMNS = "| setting | setting here | note |"
RULE = "|---|---|---|"
ALWAYS = "always"

# Translates a text of the page.
Translate = Callable[[str], str]


def build_page(language: str = "en") -> str:
    """Return the whole page as Markdown, in English or the language of a catalogue."""
    return _build_page(load_translator(language).translate_label if language in CATALOGUES else str)


def list_texts() -> Iterator[str]:
    """Yield every text of the page that only the page has; the notes are messages of the importer."""
    yield from (part.strip("\n") for part in f"{HEADER}\n{FIRST_TRAINER}".split("\n\n") if _is_translated(part))
    yield from (*KOHYA_GROUPS, COLUMNS, FIRST_COLUMNS, ALWAYS)


def _build_page(translate: Translate) -> str:
    defaults = ", ".join(
        f"`{name}` {value:g}" if isinstance(value, float) else f"`{name}` {value}"
        for name, value in KOHYA_DEFAULTS.items()
    )
    parts = [_translate_text(HEADER, translate).replace("DEFAULTS", defaults)]
    for title, options in KOHYA_GROUPS.items():
        parts.append(f"\n## {translate(title)}\n\n{translate(COLUMNS)}\n{RULE}\n")
        parts += [_build_row(name, option, "kohya's scripts", translate) for name, option in options.items()]
    parts.append(f"{_translate_text(FIRST_TRAINER, translate)}\n{translate(FIRST_COLUMNS)}\n{RULE}\n")
    parts += [_build_row(name, ours, TRAINER_NAME, translate) for name, ours in FIRST_TRAINER_OPTIONS.items()]
    return "".join(parts)


def _is_translated(paragraph: str) -> bool:
    return bool(paragraph.strip()) and not paragraph.lstrip("\n").startswith("```")


def _translate_text(text: str, translate: Translate) -> str:
    """Translate each paragraph of a text, but no commands."""
    paragraphs = [part if not _is_translated(part) else _keep_breaks(part, translate) for part in text.split("\n\n")]
    return "\n\n".join(paragraphs)


def _keep_breaks(paragraph: str, translate: Translate) -> str:
    content = paragraph.strip("\n")
    return paragraph.replace(content, translate(content))


def _build_row(name: str, option: Option | str, trainer: str, translate: Translate) -> str:
    if isinstance(option, str):
        return f"| `{name}` | {translate(f'as `{option}`')} | |\n"
    keys = ", ".join(f"`{key}`" for key in option.keys) or (translate(ALWAYS) if option.is_built_in else "–")
    note = "; ".join(filter(None, (option.note, option.difference))).replace(TRAINER, trainer)
    return f"| `{name}` | {keys} | {translate(note)} |\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the page in the language of the command line. Returns 0."""
    parser = TranslatedParser(
        prog="python -m sdxl_trainer.configs.kohya.document",
        description="Print the page of all options that the importer knows.",
    )
    add_language(parser)
    sys.stdout.write(build_page(parser.parse_args(arguments).language))
    return 0


if __name__ == "__main__":
    sys.exit(main())
