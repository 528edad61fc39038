"""Writes docs/FROM_KOHYA.md from the import's table, as docs/CONFIG.md is from the schema:
`python -m sdxl_trainer.configs.kohya.document > docs/FROM_KOHYA.md`."""

import sys

from sdxl_trainer.configs.kohya.options import KOHYA_DEFAULTS, KOHYA_GROUPS, Option
from sdxl_trainer.configs.kohya.seed_options import SEED_OPTIONS

HEADER = """# From kohya's scripts, option by option

```bash
python -m sdxl_trainer.configs.import_config train.toml dataset.toml --out my.yaml
```

makes a YAML file of what `sdxl_train.py` or `sdxl_train_network.py` is started with: TOML files of training arguments
and of data sets (a `config_file` and `dataset_config` that they name are found too), or a script with the command line.
`--ranks` says how many GPUs there were, if not accelerate's `--num_processes`. Runs counted in epochs need
`--samples`, how many samples an epoch has with repeats, because length is counted in steps here. Options without a
counterpart are named with the reason, on the console and as comments in the YAML, and so is what is taken over but not
quite the same. Nothing is lost unnamed, and no file is run, so variables of a script are not filled in. It is a program
of its own, and no option of training, because what it makes is to be read by a person before anything is cached.

In the tables below `always` stands where the option's effect is there without a setting, and a dash where no setting
has it: the third column says why, or what to do instead.

Latents and text outputs that kohya's scripts have cached are taken as they are; without `--adopt` the cache job makes
what is missing:

```bash
bash launch/cache.sh --cfg my.yaml --adopt
bash launch/cache.sh --cfg my.yaml
bash launch/train.sh --cfg my.yaml
```

What is different, whatever the options say:

- The settings of captions and buckets hold for all data. Where subsets differ there, a strategy (docs/STRATEGY.md)
  tells samples apart.
- Batches are global: `train.global_batch_size` is what all GPUs and accumulation steps add up to, and the run is the
  same on any number of GPUs.
- A batch that is not full is carried into the next epoch, and all ranks work on the same bucket.
- The crop that the model is told of is the one that was made.
- Biases and the weights of norms do not decay.
- The weights of an SDXL file keep their meaning: `model.text_projection: legacy` is for going on with a model whose
  second text projection was saved untransposed.
- The same command resumes, exactly, and checkpoints hold the whole state; models are made at the end, and of any
  checkpoint by `train/convert.py`.

Of kohya's defaults those that change what is learned, and differ from those here, are written into the YAML:
DEFAULTS.

This page is made from the table that the import goes by, by
`python -m sdxl_trainer.configs.kohya.document > docs/FROM_KOHYA.md`.
"""
SEED = """
## Settings of the first sdxl-trainer

```bash
python -m sdxl_trainer.configs.import_config config.py --out my.yaml
```

reads what `get_config` assigns, without running it. Names that are not in this table are those of kohya's options.

| setting | here | |
|---|---|---|
"""


def build_page() -> str:
    """The whole page as Markdown."""
    defaults = ", ".join(
        f"`{name}` {value:g}" if isinstance(value, float) else f"`{name}` {value}"
        for name, value in KOHYA_DEFAULTS.items()
    )
    parts = [HEADER.replace("DEFAULTS", defaults)]
    for title, options in KOHYA_GROUPS.items():
        parts.append(f"\n## {title}\n\n| option | here | |\n|---|---|---|\n")
        parts += [_build_row(name, option) for name, option in options.items()]
    parts.append(SEED)
    parts += [_build_row(name, ours) for name, ours in SEED_OPTIONS.items()]
    return "".join(parts)


def _build_row(name: str, option: Option | str) -> str:
    if isinstance(option, str):
        return f"| `{name}` | as `{option}` | |\n"
    keys = ", ".join(f"`{key}`" for key in option.keys) or ("always" if option.is_always else "–")
    return f"| `{name}` | {keys} | {option.note} |\n"


if __name__ == "__main__":
    sys.stdout.write(build_page())
