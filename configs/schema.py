"""Every setting a user may make, its default, its rule and its meaning.

One model per section of the YAML file. The text under a field is its documentation, from which docs/CONFIG.md is made.
Relative paths are taken from the working directory.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, ValidationInfo, field_validator, model_validator

from sdxl_trainer.configs.captions import CaptionConfig
from sdxl_trainer.configs.checkpoint import CheckpointConfig
from sdxl_trainer.configs.ema import EmaConfig
from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.configs.lora import LoraConfig
from sdxl_trainer.configs.objective import ObjectiveConfig
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.configs.remote_shards import RemoteShardsConfig
from sdxl_trainer.configs.samples import SampleConfig
from sdxl_trainer.configs.section import Section
from sdxl_trainer.configs.validation import ValidationConfig


class RunConfig(Section):
    """Where a run lives and what makes it repeatable."""

    name: str = Field("run", min_length=1, pattern=r"^[\w.\-]+$")
    """Name of the run; its folder is `<run.dir>/<run.name>`."""
    dir: Path = Path("runs")
    """Folder that holds all runs."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of everything random: order of batches, captions, noise, timesteps, posterior samples."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` continues from the newest valid checkpoint in the run folder; `never` starts anew, and refuses to do so in
    a run folder that already holds checkpoints."""
    on_data_change: Literal["stop", "continue"] = "stop"
    """What a resume does when other samples are trained on than before: `stop` refuses it; `continue` keeps the step
    and goes on at the same share of the epoch, in the new order. Records added, removed or moved to another bucket
    count as a change, and so do other repeats; other captions do not."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.dir / self.name


class ModelConfig(Section):
    """The SDXL model that training starts from."""

    path: str = ""
    """Diffusers folder, single `.safetensors` file, or hub id of an SDXL model. Needed."""
    config: Path | None = None
    """Folder with the components' configs (diffusers layout) of a single file; SDXL base's own by default."""
    vae: str | None = None
    """Another VAE than the model's own: diffusers folder, or hub id."""
    tokenizer: Path | None = None
    """Folder with CLIP's `vocab.json` and `merges.txt`. Single files carry no vocabulary: for them this, or the one
    within an installed open_clip_torch (`pip install --no-deps open_clip_torch`), is needed."""
    text_projection: Literal["correct", "legacy"] = "correct"
    """How encoder 2's `text_projection` is stored in single files. `legacy` reads and writes it untransposed, to
    continue a model made by tools that copy it so."""
    latents_mean: tuple[float, float, float, float] | None = None
    """Mean of each channel of the VAE's latents. With `latents_std` the U-Net works on (latent - mean)/std instead of
    the latent times the VAE's scaling factor. Models that were trained so need it; the VAE's own config may hold it."""
    latents_std: tuple[float, float, float, float] | None = None
    """Standard deviation of each channel of the VAE's latents, for `model.latents_mean`."""

    @field_validator("latents_std")
    @classmethod
    def _statistics_are_whole(cls, std: tuple[float, ...] | None, info: ValidationInfo) -> tuple[float, ...] | None:
        if std is not None and min(std) <= 0:
            raise ValueError("must be above 0")
        if (std is None) != (info.data.get("latents_mean") is None):
            raise ValueError("model.latents_mean and model.latents_std must both be given, or neither")
        return std


class DataConfig(Section):
    """What is trained on."""

    metadata: list[Path | str] = []
    """Metadata files: JSON in the form of the first sdxl-trainer or of kohya's scripts, JSON Lines, CSV, Parquet, or
    webdataset shards of latents (docs/DATA.md shows each). Paths, or URLs that fsspec opens (`s3://`, `gs://`,
    `https://`). `{000..012}`, `{a,b}` and `*` name many at once. Later entries update earlier ones key by key."""
    image_dirs: list[Path] = []
    """Image folders. Without `data.metadata` every image in them is used, captioned by the `.txt` or `.caption` file
    beside it; with it, they are where images are looked for whose `image_path` does not exist. In a folder without
    images latent files (.npz) stand in for them."""
    masks: str | None = None
    """Where mask files are: grey images that say where the loss counts, for `objective.masked_loss`. Either how their
    names end beside the images, as `-masklabel.png` for OneTrainer's, or a folder in which they have the images'
    stems, as kohya's `conditioning_data_dir`. They are no images to train on, and the cache job stores them with the
    latents, as float32 in pixels: 4 MB at 1024 px. Where an image has none, its loss counts everywhere."""
    source_weights: list[NonNegativeFloat] = []
    """How often samples of each entry of `data.metadata` come in an epoch, or, without metadata, of each folder of
    `data.image_dirs`: one number per entry, such as `[1, 0.5]`. Multiplied with the repeats of `data.strategy`; a
    fraction is kept over the epochs, and 0 leaves an entry out. Empty: once each."""
    regularisation_dirs: list[Path] = []
    """Folders of regularisation images (prior preservation), besides `data.image_dirs`. In metadata such records have
    `is_reg: true` instead. Their loss counts `objective.prior_loss_weight`."""
    regularisation_repeats: Literal["balanced"] | PositiveFloat = "balanced"
    """How often regularisation samples come in an epoch, relative to once: a number, or `balanced`: as often as makes
    them as many as all other samples together."""
    on_missing_caption: Literal["empty", "skip", "error"] = "empty"
    """What happens to samples without a caption: they are trained with the empty one, left out, or an error. They are
    counted in a warning."""
    verify_latents: Literal["none", "stat", "header", "full"] = "stat"
    """How latents are looked at before training: not at all, that each is there and has its size, that its header
    agrees with its bucket, or that its bytes have the manifest's checksum. Bad ones are named and left out."""
    resolution_px: list[Annotated[int, Field(ge=64, le=8192)]] = Field([1024], min_length=1)
    """Side of the square whose area every bucket keeps to. Several, such as `[512, 1024]`, train every image at each
    of them: they are so many samples, and an epoch holds them all."""
    buckets: list[tuple[int, int]] = []
    """Buckets as [width, height], such as `[[1024, 1024], [832, 1216]]`, in place of the list that the resolution,
    `min_bucket_px`, `max_bucket_px` and `bucket_step_px` make. Of two with one aspect ratio the first is used."""
    min_bucket_px: int = Field(256, ge=32)
    """Shortest side of a bucket."""
    max_bucket_px: int = Field(2048, ge=32)
    """Longest side of a bucket."""
    bucket_step_px: int = Field(64, ge=32, multiple_of=32)
    """Bucket sides are multiples of this; SDXL's U-Net needs multiples of 32."""
    no_upscale: bool = False
    """Never enlarge an image: those smaller than the area get a bucket of their own size, rounded down to the step."""
    flip_rate: float = Field(0.0, ge=0, le=1)
    """Probability, drawn for each sample and epoch, that the latents of the mirrored image are trained instead. Needs
    a cache made with `cache.flip: true`; samples without such latents are never flipped, and counted in a warning."""
    caption: CaptionConfig = CaptionConfig()  # pyright: ignore[reportCallIssue]
    """What is done to captions."""
    strategy: str | None = None
    """Your own class, `path/to/file.py:ClassName` or `module:ClassName`, that says how often a sample is used, what its
    caption is and what its loss weighs. See docs/STRATEGY.md."""
    max_tokens: Literal[75, 150, 225] = 75
    """Longest caption, in tokens without the start and end marks; more than 75 are encoded in windows of 75."""
    remote_shards: RemoteShardsConfig = RemoteShardsConfig()  # pyright: ignore[reportCallIssue]
    """How shards on a store are read."""
    num_workers: int = Field(2, ge=0)
    """Processes per rank that read latents and tokenise; 0 does it in the training process."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Share of bad samples (unreadable, wrong shape, missing) past which the job stops with status 1."""

    @field_validator("resolution_px", "metadata", "image_dirs", "regularisation_dirs", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, (str, Path, int)) else value

    @field_validator("resolution_px", "buckets")
    @classmethod
    def _all_differ(cls, values: list) -> list:
        if len(set(values)) < len(values):
            raise ValueError("names one twice")
        return values

    @field_validator("buckets")
    @classmethod
    def _buckets_fit_the_unet(cls, buckets: list[tuple[int, int]]) -> list[tuple[int, int]]:
        wrong = [side for bucket in buckets for side in bucket if side < 32 or side % 32]
        if wrong:
            raise ValueError(f"sides must be multiples of 32, which {wrong[0]} is not")
        return buckets

    @model_validator(mode="after")
    def _bucket_sides_fit(self) -> "DataConfig":
        if self.buckets and (len(self.resolution_px) > 1 or self.no_upscale):
            raise ValueError("data.buckets goes with one resolution_px, and without no_upscale")
        if not self.min_bucket_px <= min(self.resolution_px) <= max(self.resolution_px) <= self.max_bucket_px:
            raise ValueError("min_bucket_px <= resolution_px <= max_bucket_px must hold")
        return self

    @property
    def largest_size(self) -> tuple[int, int]:
        """(width, height) of the largest bucket, or of the square that buckets keep to."""
        side = max(self.resolution_px)
        return max(self.buckets, key=lambda size: size[0] * size[1], default=(side, side))


class CacheConfig(Section):
    """The latent cache: written by the cache job, read by training."""

    dir: Path | None = None
    """Folder of the cache. Without it latents are written beside the images, and the manifest into the folder of the
    first metadata file or image folder."""
    format: Literal["npz", "shards"] = "npz"
    """`npz`: one file an image, as kohya's scripts read them; `shards`: webdataset tars of one bucket each."""
    shard_mb: int = Field(1000, ge=1)
    """Size at which a shard is full, in megabytes."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of the stored latents. Other tools write and read `float32`; docs/CACHE.md says how `bfloat16` is stored."""
    posterior: Literal["sample", "mean", "moments"] = "sample"
    """What is stored of the VAE's posterior: one sample (as other tools do), its mean, or its two moments, from which
    training draws a fresh sample at each read."""
    flip: bool = False
    """Also store the latents of the mirrored image, as kohya's `flip_aug` does."""
    alpha_mask: bool = False
    """Also store the opacity of images that have one, as kohya's `alpha_mask` does: where the loss counts, for
    `objective.masked_loss`. As float32 in pixels it takes 4 MB at 1024 px. Images are laid on white either way. A
    image's mask file (`data.masks`) goes before its opacity."""
    batch_size: int = Field(4, ge=1)
    """Images encoded at once on a rank. What a device has no memory for is encoded in halves."""
    vae_precision: Literal["fp32", "bf16"] = "fp32"
    """Precision in which the VAE runs. SDXL's own VAE overflows in fp16, which is therefore not offered."""
    num_workers: int = Field(4, ge=1)
    """Threads per rank that decode and resize images."""
    text: bool = False
    """Also store what the text encoders make of the captions, so that training needs no text encoder. In the type of
    `cache.dtype`: at SDXL's size and 75 tokens 0.6 MB a caption in float32, more than latents of 1024 px take."""
    text_variants: int = Field(1, ge=1, le=64)
    """Captions stored of each image, for captions that are drawn at random (`data.caption`, or your own class).
    Training draws one of them for each sample and epoch. With 1, captions must not be random."""
    on_missing: Literal["skip", "error", "encode"] = "skip"
    """What training does about images that have no latents: leave them out with a warning, stop, or encode each when
    it is first met, and keep the latents in the cache. `encode` loads the VAE only if something is missing."""
    tile_above_px: int = Field(0, ge=0)
    """Encode images with a longer side than this in overlapping tiles, which takes less memory; 0 never does."""


class TrainConfig(Section):
    """Length and batch arithmetic."""

    max_steps: int = Field(1000, ge=1)
    """Optimizer steps of the whole run."""
    global_batch_size: int = Field(4, ge=1)
    """Samples per optimizer step over all ranks; the order of batches depends on it and not on the number of ranks."""
    micro_batch_size: int = Field(1, ge=1)
    """Samples per forward pass on a rank. Accumulation is what remains: global / (micro x ranks)."""
    on_non_finite: Literal["skip", "stop"] = "skip"
    """What happens when the loss or the gradient of a step is not finite (NaN or infinite). The weights are never
    updated by it, and the samples are named in `logs/bad_samples.jsonl`. `skip` goes on with the next global batch,
    `stop` saves a checkpoint of the state before the step and ends with status 1."""
    max_non_finite_steps: int = Field(10, ge=0)
    """Steps of the whole run that `train.on_non_finite: skip` may skip; one more stops as `stop` does."""


class LogConfig(Section):
    """What is written while training."""

    every_steps: int = Field(10, ge=1)
    """Steps between lines on the console; `logs/metrics.jsonl` and TensorBoard get every step."""
    level: Literal["DEBUG", "INFO", "WARNING"] = "INFO"
    """Least important level shown on the console."""
    wandb: str | None = Field(None, min_length=1)
    """Project at Weights & Biases that the numbers are sent to as well (`pip install wandb`); they are not by default.
    Where the machine has no network, set `WANDB_MODE=offline` in the environment and run `wandb sync` later."""


class Config(Section):
    """The whole file."""

    run: RunConfig = RunConfig()  # pyright: ignore[reportCallIssue]  (pydantic fills the defaults)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()  # pyright: ignore[reportCallIssue]
    cache: CacheConfig = CacheConfig()  # pyright: ignore[reportCallIssue]
    objective: ObjectiveConfig = ObjectiveConfig()  # pyright: ignore[reportCallIssue]
    optim: OptimConfig = OptimConfig()  # pyright: ignore[reportCallIssue]
    engine: EngineConfig = EngineConfig()  # pyright: ignore[reportCallIssue]
    lora: LoraConfig = LoraConfig()  # pyright: ignore[reportCallIssue]
    ema: EmaConfig = EmaConfig()
    train: TrainConfig = TrainConfig()  # pyright: ignore[reportCallIssue]
    checkpoint: CheckpointConfig = CheckpointConfig()  # pyright: ignore[reportCallIssue]
    validation: ValidationConfig = ValidationConfig()  # pyright: ignore[reportCallIssue]
    sample: SampleConfig = SampleConfig()  # pyright: ignore[reportCallIssue]
    log: LogConfig = LogConfig()  # pyright: ignore[reportCallIssue]
