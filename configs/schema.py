"""All settings: one pydantic model per section of the YAML file, with defaults, rules and descriptions.

The string under a field is its description; docs/CONFIG.md is generated from these. Relative paths are relative to the
working directory.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, ValidationInfo, field_validator, model_validator

from sdxl_trainer.configs.captions import CaptionConfig
from sdxl_trainer.configs.checkpoint import AboutConfig, CheckpointConfig
from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.configs.lora import LoraConfig
from sdxl_trainer.configs.objective import ObjectiveConfig
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.configs.paths import IS_PATH, remove_file_scheme, tell_url_from_path
from sdxl_trainer.configs.samples import SampleConfig
from sdxl_trainer.configs.section import Section
from sdxl_trainer.configs.validation import ValidationConfig

DEFAULT_STEPS = 1000  # of a run without train.max_steps and train.max_epochs
NAME_PATTERN = r"^\.*[\w\-][\w.\-]*$"  # of a run, which names a folder
MAX_EMA_LENGTH = 0.28  # that of equal weights for all steps is 1/sqrt(12), 0.289


class RunConfig(Section):
    """Name, folder and seed of a run, and what happens when it is started again."""

    name: str = Field("run", min_length=1, pattern=NAME_PATTERN)
    """Name of the run. The run folder is `<run.dir>/<run.name>`."""
    dir: Path = Path("runs")
    """Folder that contains the run folders."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of all random choices: order of batches, captions, noise, timesteps, posterior samples."""
    noise_device: Literal["rank", "cpu"] = "rank"
    """Device that draws the noise: each `rank`'s own, or the `cpu`, whose noise is the same on every machine. The noise
    of a GPU depends on its kind (docs/OBJECTIVE.md). A thread draws the noise of the `cpu` ahead of the step."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` resumes from the newest valid checkpoint in the run folder, if there is one. `never` always starts from
    step 0, and is an error if the run folder already contains checkpoints."""
    on_data_change: Literal["stop", "continue"] = "stop"
    """What a resume does if the training set has changed. `stop` ends with an error. `continue` keeps the step and
    continues at the same fraction of the epoch, in the new order. Added, removed and re-bucketed records and different
    repeats are changes; different captions are not."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.dir / self.name


class ModelConfig(Section):
    """The SDXL model to start from."""

    path: Annotated[str, IS_PATH] = ""
    """SDXL model: a diffusers folder, a single `.safetensors` file, or a hub id. Required."""
    config: Path | None = None
    """Folder with the component configs (diffusers layout) for a single file. The default is the configs of SDXL
    base."""
    vae: Annotated[str | None, IS_PATH] = None
    """VAE to use instead of the model's own: a diffusers folder, a single `.safetensors` file in LDM (ComfyUI) names,
    or a hub id. It decides the number of latent channels: 4 for SDXL's own VAE, 16 for Flux's and SD3's, 32 for
    Flux2's. The cache must be filled with the same VAE."""
    vae_padding: Literal["zeros", "reflect"] | None = None
    """Padding of the VAE's convolutions: `zeros`, or `reflect` for VAEs that were trained with padding by reflection,
    such as EQ-VAEs. Without it, the VAE's own config decides (its key `padding_mode`), or else it is zeros."""
    vae_scaling_factor: PositiveFloat | None = None
    """Factor of the VAE's latents, for a VAE whose config contains none, such as a single file: the U-Net works on
    (latent - shift)·factor. A single file of 4 channels is taken as SDXL's (0.13025, unless the padding is `reflect`),
    one of 32 as Flux2's (0.6043, shift 0.0760); for others the setting is required."""
    vae_shift_factor: float | None = None
    """Shift of the VAE's latents, for `model.vae_scaling_factor`."""
    tokenizer: Path | None = None
    """Folder with CLIP's `vocab.json` and `merges.txt`, or `tokenizer.json`. Single files contain no vocabulary, so
    they need this setting, or an installed open_clip_torch (`pip install --no-deps open_clip_torch`), which has
    one."""
    text_projection: Literal["correct", "legacy"] = "correct"
    """Layout of text encoder 2's `text_projection` in single files. `legacy` reads and writes it untransposed; use it
    only to continue a model whose tool saved it that way."""
    adapt_channels: bool = False
    """Allow a VAE with another number of channels than the U-Net's: the U-Net's first and last layer (`conv_in`,
    `conv_out`) are replaced by untrained ones, drawn from `run.seed`, and all other weights are kept. Without it, such
    a pair is an error. Has no effect on a U-Net that fits its VAE, so you can leave it on to resume the run, and to
    continue from the exported model. Not with `lora.rank`, which would leave the new layers untrained. Train the new
    layers alone first: docs/RECIPES.md has a recipe."""
    latents_mean: tuple[float, ...] | None = None
    """Mean of each channel of the VAE's latents. With `model.latents_std`, the U-Net works on (latent - mean)/std
    instead of the latent times the VAE's scaling factor. Set both only for models that were trained this way, unless
    the VAE's own config contains them."""
    latents_std: tuple[float, ...] | None = None
    """Standard deviation of each channel of the VAE's latents, for `model.latents_mean`."""

    @field_validator("latents_mean", "latents_std")
    @classmethod
    def _require_values(cls, values: tuple[float, ...] | None, info: ValidationInfo) -> tuple[float, ...] | None:
        if values is not None and not values:
            raise ValueError("must not be empty; give one value for each channel")
        if values is not None and info.field_name == "latents_std" and min(values) <= 0:
            raise ValueError("must be above 0")
        return values

    @model_validator(mode="after")
    def _require_both_statistics(self) -> "ModelConfig":
        mean, std = self.latents_mean, self.latents_std
        if (std is None) != (mean is None):
            raise ValueError("needs model.latents_mean and model.latents_std together; set both or neither")
        if std is not None and mean is not None and len(std) != len(mean):
            counts = f"{len(mean)} and {len(std)}"
            raise ValueError(f"needs as many values in model.latents_mean as in model.latents_std, not {counts}")
        if std is not None and (self.vae_scaling_factor is not None or self.vae_shift_factor is not None):
            raise ValueError(
                "cannot combine model.latents_std with model.vae_scaling_factor or model.vae_shift_factor; "
                "leave those out"
            )
        return self


class RemoteShardsConfig(Section):
    """Reading of shards on a remote store (`s3://`, `gs://`, `https://`), and of streams (`pipe:`)."""

    shuffle_shards: int = Field(0, ge=0)
    """With 0, samples are shuffled over the whole training set, and each is one ranged read. With n, whole shards are
    downloaded one after the other, in an order that changes each epoch, and samples are shuffled over n shards at a
    time. Use it for stores where seeking is slow or expensive. 16 or more mix well if every shard contains samples of
    all kinds."""
    copies_dir: Path | None = None
    """Local folder that keeps a copy of everything that was read; the ranks of a node share it. Without it, every
    sample is read from the store each time. With `data.remote_shards.shuffle_shards`, the default is `copies` in the
    cache folder."""
    copies_gb: float = Field(100.0, gt=0)
    """Maximum size of `data.remote_shards.copies_dir`, in gigabytes. The least recently used copies are deleted
    first. With `data.remote_shards.shuffle_shards`, it must hold twice that number of the largest shard: the window
    that is read, and the next one. A start checks this."""


class DataConfig(Section):
    """The training set: metadata, images, captions and buckets."""

    metadata: list[Path | str] = []
    """Metadata files: JSON in the form of the first sdxl-trainer or of kohya's scripts, JSON Lines, CSV, Parquet,
    SQLite (waifuset), or webdataset shards of latents (examples in docs/DATA.md). Give paths, or URLs that fsspec opens
    (`s3://`, `gs://`, `https://`), or `pipe:COMMAND` for a shard that a shell command writes. One entry can name many
    files by `{000..012}`, `{a,b}`, `*` or `::` between two names. Records of later entries update records of earlier
    entries key by key."""
    image_dirs: list[Path] = []
    """Image folders. Without `data.metadata`, every image in these folders is a sample, with its caption in a `.txt` or
    `.caption` file beside it. With `data.metadata`, images whose `image_path` does not exist are searched for here. In
    a folder without images, latent files (`.npz`) take their place."""
    kohya_folders: bool = False
    """Read the names of folders below `data.image_dirs` as kohya's scripts do: the images in `10_sks dog` have 10
    repeats per epoch, and `sks dog` is the caption of those without a caption file. The nearest such folder counts, up
    to the entry of `data.image_dirs` itself; images in other folders have 1 repeat. The repeats are multiplied by
    `data.source_weights`."""
    masks: Annotated[str | None, IS_PATH] = None
    """Mask files for `objective.masked_loss`: greyscale images whose brightness weights the loss. Give either the
    ending of mask files beside the images, such as `-masklabel.png` (OneTrainer), or a folder where each mask has the
    stem of its image (kohya's `conditioning_data_dir`). Masks are not used as training images. The cache job stores
    them with the latents, as float32 per pixel: 4 MB at 1024 px. The loss of an image without a mask counts
    everywhere."""
    source_weights: list[NonNegativeFloat] = []
    """Repeats per epoch for the samples of each entry of `data.metadata` or, without metadata, of each folder of
    `data.image_dirs`: one number per entry, such as `[1, 0.5]`. Fractions are exact over several epochs, and 0 leaves
    an entry out. These numbers are multiplied by the repeats of `data.strategy`. An empty list uses every sample once
    per epoch."""
    regularisation_dirs: list[Path] = []
    """Folders of regularisation images (prior preservation), in addition to `data.image_dirs`. In metadata, mark such
    records with `is_reg: true` instead. `objective.prior_loss_weight` sets the weight of their loss."""
    regularisation_repeats: Literal["balanced"] | PositiveFloat = "balanced"
    """Repeats per epoch of the regularisation samples: a number, or `balanced`, which repeats them until they equal all
    other samples in number."""
    on_missing_caption: Literal["empty", "skip", "error"] = "empty"
    """What to do with samples without a caption: train on them with the `empty` caption, `skip` them, or stop with an
    `error`. A warning gives their number."""
    verify_latents: Literal["none", "stat", "header", "full"] = "stat"
    """Checks of the cached latents before training. `none` checks nothing. `stat` checks that each file exists with its
    recorded size, `header` also that its header fits its bucket, and `full` also that its bytes match the manifest's
    checksum. Bad latents are reported and left out. Each level takes longer; use `full` after copying a cache to
    another disk."""
    resolution_px: list[Annotated[int, Field(ge=64, le=8192)]] = Field([1024], min_length=1)
    """Side of the square whose area no bucket exceeds, in pixels. With several sides, such as `[512, 1024]`, every
    image is trained at each resolution: each is a separate sample, and an epoch contains them all."""
    buckets: list[tuple[int, int]] = []
    """Fixed buckets as [width, height] in pixels, such as `[[1024, 1024], [832, 1216]]`, instead of buckets computed
    from `resolution_px`, `min_bucket_px`, `max_bucket_px` and `bucket_step_px`. If two have the same aspect ratio, the
    first is used."""
    min_bucket_px: int = Field(256, ge=32)
    """Shortest side of a bucket, in pixels."""
    max_bucket_px: int = Field(2048, ge=32)
    """Longest side of a bucket, in pixels."""
    bucket_step_px: int = Field(64, ge=32, multiple_of=32)
    """Step between bucket sides, in pixels; SDXL's U-Net needs multiples of 32."""
    no_upscale: bool = False
    """Never enlarge an image. Images below the area of `resolution_px` get a bucket of their own size, rounded down to
    `bucket_step_px`."""
    max_aspect_ratio: float = Field(20, ge=1, le=1000)
    """Ratio of an image's longer side to its shorter one above which it counts as a bad sample: its bucket would show
    little of it."""
    flip_rate: float = Field(0.0, ge=0, le=1)
    """Probability of training on the mirrored image, drawn for each sample and epoch. Needs a cache filled with
    `cache.flip: true`; samples without mirrored latents are never flipped, and a warning gives their number."""
    caption: CaptionConfig = CaptionConfig()  # pyright: ignore[reportCallIssue]
    """Changes made to captions before they are tokenized."""
    strategy: Annotated[str | None, IS_PATH] = None
    """Your own class, as `path/to/file.py:ClassName` or `module:ClassName`, that chooses the repeats, the caption and
    the loss weight of each sample. See docs/STRATEGY.md."""
    max_tokens: int = Field(75, ge=75, multiple_of=75)
    """Maximum length of a caption, in tokens without the start and end tokens: any multiple of 75. Captions above 75
    tokens are encoded in windows of 75."""
    remote_shards: RemoteShardsConfig = RemoteShardsConfig()  # pyright: ignore[reportCallIssue]
    """Reading of shards on remote stores."""
    num_workers: int = Field(2, ge=0)
    """Worker processes per rank that read latents and tokenize captions; 0 does this in the training process. Raise it
    if training waits for data."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Maximum share of bad samples (unreadable, wrong shape, missing). Above it, the job stops with status 1. One or
    two bad images or samples of a set of any size are allowed, unless this is 0. Training counts the samples of one
    start: the last epoch's, but at least 10,000 and at most 100,000."""

    @field_validator("resolution_px", mode="before")
    @classmethod
    def _wrap_single_value(cls, value: Any) -> Any:
        return [value] if isinstance(value, (str, int)) else value

    @field_validator("metadata")
    @classmethod
    def _resolve_file_urls(cls, metadata: list[Path | str]) -> list[Path | str]:
        return [remove_file_scheme(name) for name in metadata]

    @field_validator("resolution_px", "buckets")
    @classmethod
    def _require_distinct(cls, values: list) -> list:
        if len(set(values)) < len(values):
            raise ValueError("contains a value twice; remove one")
        return values

    @field_validator("buckets")
    @classmethod
    def _require_multiples_of_32(cls, buckets: list[tuple[int, int]]) -> list[tuple[int, int]]:
        wrong = [side for bucket in buckets for side in bucket if side < 32 or side % 32]
        if wrong:
            raise ValueError(f"sides must be positive multiples of 32, but one is {wrong[0]}")
        return buckets

    @model_validator(mode="after")
    def _require_consistent_buckets(self) -> "DataConfig":
        if self.buckets and (len(self.resolution_px) > 1 or self.no_upscale):
            raise ValueError("data.buckets cannot be combined with several resolution_px or with no_upscale")
        if not self.min_bucket_px <= min(self.resolution_px) <= max(self.resolution_px) <= self.max_bucket_px:
            raise ValueError("resolution_px must lie between min_bucket_px and max_bucket_px")
        return self

    @property
    def largest_size(self) -> tuple[int, int]:
        """Width and height of the largest fixed bucket, or of the square of the largest resolution."""
        side = max(self.resolution_px)
        return max(self.buckets, key=lambda size: size[0] * size[1], default=(side, side))


class CacheConfig(Section):
    """The latent cache, written by the cache job (`bash launch/cache.sh`) and read by training."""

    dir: Path | str | None = None
    """Cache folder, or the URL of one on a store (`s3://`, `gs://`, `az://`, `hf://`), which needs `cache.format:
    shards` (docs/CACHE.md). Without it, latents are written beside the images, and the manifest into the folder of the
    first metadata file or image folder."""
    spool: Path | None = None
    """Folder on a local disk where the cache job builds the shards of a cache on a store before they are uploaded. The
    default lies in `run.dir`."""
    spool_gb: float = Field(50.0, gt=0)
    """Maximum size of `cache.spool`, in gigabytes, for all ranks of a node. It must hold two shards of `cache.shard_mb`
    for each rank. Full shards need more: one for each bucket."""
    format: Literal["npz", "shards"] = "npz"
    """`npz` writes one file per image, as kohya's scripts do. `shards` writes webdataset tar files, each with samples
    of one bucket; prefer it for very large sets and for remote stores."""
    shard_mb: int = Field(1000, ge=1)
    """Size of a full shard, in megabytes."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Data type of the stored latents. Other tools use `float32`; the others take half the disk space.
    docs/CACHE_FORMAT.md describes how `bfloat16` is stored."""
    posterior: Literal["sample", "mean", "moments"] = "sample"
    """Values of the VAE's posterior to store: one `sample` (as other tools do), its `mean`, or its `moments` (mean and
    standard deviation), from which training draws a new sample at each read. `moments` take twice the disk space."""
    flip: bool = False
    """Also store the latents of the mirrored image, as kohya's `flip_aug` does. Needed for `data.flip_rate`."""
    alpha_mask: bool = False
    """Also store the alpha channel of transparent images as a mask for `objective.masked_loss`, as kohya's `alpha_mask`
    does. Masks are float32 per pixel: 4 MB at 1024 px. A mask file (`data.masks`) takes precedence. Transparent images
    are composited onto white in any case."""
    batch_size: int = Field(4, ge=1)
    """Images per forward pass of the VAE on a rank. A batch that does not fit into GPU memory is halved."""
    vae_precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Precision of the VAE. With `tf32`, fp32 convolutions and matrix products round their inputs to 10 bits on NVIDIA
    GPUs, which is faster and less accurate. fp16 is not available because SDXL's own VAE overflows in it. A cache holds
    latents of one precision."""
    num_workers: int = Field(4, ge=1)
    """Threads per rank that decode and resize images. Raise it if the GPU waits for images."""
    text: bool = False
    """Also store the outputs of the text encoders, so that training loads no text encoder. They are stored in
    `cache.dtype`; with SDXL, a caption of 75 tokens takes 0.6 MB in float32, more than the latents of a 1024 px
    image."""
    text_variants: int = Field(1, ge=1, le=64)
    """Number of captions to encode per image with `cache.text`, for random captions (`data.caption` or your own class).
    Training draws one of them for each sample and epoch. With 1, captions must not be random."""
    on_missing: Literal["skip", "error", "encode"] = "skip"
    """What training does with images without latents: `skip` leaves them out with a warning, `error` stops, and
    `encode` encodes each when it is first needed and adds it to the cache. `encode` loads the VAE only if latents are
    missing."""
    tile_above_px: int = Field(0, ge=0)
    """Encode images whose longer side exceeds this number of pixels in overlapping tiles, which takes less memory; 0
    never does."""

    @field_validator("dir")
    @classmethod
    def _tell_urls_from_paths(cls, name: Path | str | None) -> Path | str | None:
        return tell_url_from_path(name)


class EmaConfig(Section):
    """Moving averages (EMA) of the weights, kept in fp32 beside the master weights and sharded like them."""

    decays: list[Annotated[float, Field(gt=0, lt=1)]] = []
    """Decay of each average, such as `[0.999, 0.9999]`; an empty list keeps no average. Each takes 4 bytes per weight,
    divided among the ranks under ZeRO 1 to 3, and is exported beside the model."""
    warmup: bool = True
    """Limit the decay to (1 + n)/(10 + n) after n updates, so that the average soon forgets the first weights."""
    on_host: bool = False
    """Keep the averages in host memory and update them there while the next step runs, which takes no GPU memory. The
    host keeps a copy of the weights for it, in their type. With `engine.offload_optimizer` the averages are in host
    memory anyway."""
    sample: bool = True
    """Generate images with the first average instead of the current weights."""
    lengths: list[Annotated[float, Field(gt=0, le=MAX_EMA_LENGTH)]] = []
    """Lengths of power-function averages, such as `[0.05, 0.1]`, as shares of the training so far (sigma_rel of arXiv
    2312.02696). Each takes as much memory as a decay. They are stored in `snapshots/` in the run folder, from which
    `train/convert.py --ema-length` computes averages of other lengths."""
    snapshot_every_steps: int = Field(1000, ge=1)
    """How often the averages of `ema.lengths` are stored, besides at the last step. With `[0.05, 0.1]`, 20 times in a
    run reach lengths from 0.02 to 0.25. Snapshots are never deleted."""
    snapshot_dtype: Literal["fp32", "fp16", "bf16"] = "fp16"
    """Data type of stored averages. `fp16` takes 5 GB for SDXL's U-Net and rounds as an exported model does. `fp32`
    doubles that and adds no rounding. `bf16` is 8 times coarser than `fp16`."""

    @field_validator("decays", "lengths")
    @classmethod
    def _require_distinct(cls, numbers: list[float]) -> list[float]:
        if len({f"{number:g}" for number in numbers}) < len(numbers):
            raise ValueError("contains a value twice (compared to six digits); remove one")
        return numbers

    @property
    def num_averages(self) -> int:
        """The number of averages that are kept."""
        return len(self.decays) + len(self.lengths)


class TrainConfig(Section):
    """Length of the run, batch sizes, and steps that are not finite."""

    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps of the whole run, resumes included. Set this or `train.max_epochs`; with neither, a run has 1,000
    steps."""
    max_epochs: int | None = Field(None, ge=1)
    """Epochs of the whole run, resumes included. An epoch uses each sample as often as its repeats ask. Samples that do
    not fill a global batch wait for the next epoch, so the last epoch leaves out less than one batch for each bucket.
    The number of steps follows from the data and `train.global_batch_size`; it is the same on any number of ranks."""
    global_batch_size: int = Field(4, ge=1)
    """Samples per optimizer step, over all ranks and accumulation steps. The order of batches depends on this number,
    not on the number of ranks."""
    micro_batch_size: int = Field(1, ge=1)
    """Samples per forward pass on a rank. The accumulation steps follow: global / (micro x ranks). Raise it until GPU
    memory is full, for speed; the result is the same."""
    on_non_finite: Literal["skip", "stop"] = "skip"
    """What to do when the loss or the gradient of a step is not finite (NaN or infinite). Such a step never updates the
    weights, and its samples are listed in `logs/bad_samples*.jsonl`. `skip` continues with the next global batch;
    `stop` saves a checkpoint of the state before the step and ends with status 1."""
    max_non_finite_steps: int = Field(10, ge=0)
    """Maximum number of steps that `train.on_non_finite: skip` skips in the whole run. One more acts like `stop`."""

    @field_validator("max_epochs")
    @classmethod
    def _require_one_length(cls, max_epochs: int | None, info: ValidationInfo) -> int | None:
        if max_epochs is not None and info.data.get("max_steps") is not None:
            raise ValueError("cannot be combined with train.max_steps; set one of them to null, or leave it out")
        return max_epochs

    @model_validator(mode="after")
    def _set_default_length(self) -> "TrainConfig":
        if self.max_epochs is None and self.max_steps is None:
            self.max_steps = DEFAULT_STEPS
        return self

    @property
    def length(self) -> str:
        """The setting that decides the length of the run, with its value."""
        return f"train.max_epochs = {self.max_epochs}" if self.max_epochs else f"train.max_steps = {self.num_steps:,}"

    @property
    def num_steps(self) -> int:
        """Steps of a run whose length is not counted in epochs."""
        return self.max_steps or DEFAULT_STEPS


class LogConfig(Section):
    """Console output and metrics."""

    every_steps: int = Field(10, ge=1)
    """Optimizer steps between console lines. `logs/metrics.jsonl` and TensorBoard record every step."""
    level: Literal["DEBUG", "INFO", "WARNING"] = "INFO"
    """Lowest level of messages shown on the console."""
    language: Literal["en", "zh"] | None = None
    """Language of the console, of error messages, and of the pages of report and preview: `en` (English) or `zh`
    (Chinese). Without it, the language of the environment (`LANG`), if that is one of them, else English. Files in
    `logs/` are English."""
    wandb: str | None = Field(None, min_length=1)
    """Project at Weights & Biases to which metrics are also sent (needs `pip install wandb`). On a machine without
    network access, set `WANDB_MODE=offline` in the environment and run `wandb sync` later."""


class Config(Section):
    """All sections of the YAML file."""

    run: RunConfig = RunConfig()  # pyright: ignore[reportCallIssue]  (pydantic fills the defaults)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()  # pyright: ignore[reportCallIssue]
    cache: CacheConfig = CacheConfig()  # pyright: ignore[reportCallIssue]
    objective: ObjectiveConfig = ObjectiveConfig()  # pyright: ignore[reportCallIssue]
    optim: OptimConfig = OptimConfig()  # pyright: ignore[reportCallIssue]
    engine: EngineConfig = EngineConfig()  # pyright: ignore[reportCallIssue]
    lora: LoraConfig = LoraConfig()  # pyright: ignore[reportCallIssue]
    ema: EmaConfig = EmaConfig()  # pyright: ignore[reportCallIssue]
    train: TrainConfig = TrainConfig()  # pyright: ignore[reportCallIssue]
    checkpoint: CheckpointConfig = CheckpointConfig()  # pyright: ignore[reportCallIssue]
    validation: ValidationConfig = ValidationConfig()  # pyright: ignore[reportCallIssue]
    sample: SampleConfig = SampleConfig()  # pyright: ignore[reportCallIssue]
    about: AboutConfig = AboutConfig()  # pyright: ignore[reportCallIssue]
    log: LogConfig = LogConfig()  # pyright: ignore[reportCallIssue]
