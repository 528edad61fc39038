"""Every setting a user may make, its default, its rule and its meaning.

One model per section of the YAML file. The text under a field is its documentation, from which docs/CONFIG.md is made.
Relative paths are taken from the working directory.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A section of the file: unknown keys are errors, and the text under a field is its description."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)


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
    """Folder with CLIP's `vocab.json` and `merges.txt`, used when `model.path` is a single file (such files carry no
    vocabulary). Without it the vocabulary of an installed `open_clip_torch` is used."""
    text_projection: Literal["correct", "legacy"] = "correct"
    """How encoder 2's `text_projection` is stored in single files. `legacy` reads and writes it untransposed, to
    continue a model made by tools that copy it so."""


class DataConfig(Section):
    """What is trained on."""

    metadata: list[Path] = []
    """Metadata files (JSON objects keyed by file stem: `image_path`, `caption` or `tags`, ...). Later files update
    earlier ones key by key."""
    image_dirs: list[Path] = []
    """Image folders. Without `data.metadata` every picture in them is used, captioned by the `.txt` or `.caption` file
    beside it; with it, they are where pictures are looked for whose `image_path` does not exist."""
    resolution_px: int = Field(1024, ge=64, le=8192)
    """Side of the square whose area every bucket keeps to."""
    min_bucket_px: int = Field(256, ge=32)
    """Shortest side of a bucket."""
    max_bucket_px: int = Field(2048, ge=32)
    """Longest side of a bucket."""
    bucket_step_px: int = Field(64, ge=32, multiple_of=32)
    """Bucket sides are multiples of this; SDXL's U-Net needs multiples of 32."""
    no_upscale: bool = False
    """Never enlarge a picture: those smaller than the area get a bucket of their own size, rounded down to the step."""
    caption_dropout_rate: float = Field(0.0, ge=0, le=1)
    """Share of captions replaced by the empty one, so that the model also learns to go without (classifier-free
    guidance)."""
    max_tokens: Literal[75, 150, 225] = 75
    """Longest caption, in tokens without the start and end marks; more than 75 are encoded in windows of 75."""
    num_workers: int = Field(2, ge=0)
    """Processes per rank that read latents and tokenise; 0 does it in the training process."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Share of bad samples (unreadable, wrong shape, missing) past which the job stops with status 1."""

    @model_validator(mode="after")
    def _bucket_sides_fit(self) -> "DataConfig":
        if not self.min_bucket_px <= self.resolution_px <= self.max_bucket_px:
            raise ValueError("min_bucket_px <= resolution_px <= max_bucket_px must hold")
        return self


class CacheConfig(Section):
    """The latent cache: written by the cache job, read by training."""

    dir: Path | None = None
    """Folder of the cache. Without it latents are written beside the pictures, and the manifest into the folder of the
    first metadata file or image folder."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the stored latents; `float32` is what other tools write."""
    posterior: Literal["sample", "mean"] = "sample"
    """What is stored of the VAE's posterior: one sample (as other tools do) or its mean."""
    batch_size: int = Field(4, ge=1)
    """Pictures encoded at once on a rank."""
    vae_precision: Literal["fp32", "bf16"] = "fp32"
    """Precision in which the VAE runs. SDXL's own VAE overflows in fp16, which is therefore not offered."""
    num_workers: int = Field(4, ge=1)
    """Threads per rank that decode and resize pictures."""


class ObjectiveConfig(Section):
    """What the U-Net learns to predict and how the error is measured."""

    prediction: Literal["epsilon"] = "epsilon"
    """`epsilon`: the noise, as SDXL base was trained."""


class OptimConfig(Section):
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw"] = "adamw"
    """Optimizer."""
    lr: float = Field(1e-5, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay; biases and norm weights get none."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: held, or lowered to 0 at `train.max_steps`."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises from 0."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled down to this global norm; 0 leaves them."""


class EngineConfig(Section):
    """DeepSpeed: how state is sharded and in what precision training runs."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """ZeRO stage: 0 shards nothing, 1 optimizer state, 2 gradients too, 3 parameters too."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """`bf16` keeps fp32 master weights in the (sharded) optimizer."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, far less memory."""
    deepspeed: dict[str, Any] = {}
    """Further DeepSpeed settings, merged over the ones this program makes."""


class TrainConfig(Section):
    """Length and batch arithmetic."""

    max_steps: int = Field(1000, ge=1)
    """Optimizer steps of the whole run."""
    global_batch_size: int = Field(4, ge=1)
    """Samples per optimizer step over all ranks; the order of batches depends on it and not on the number of ranks."""
    micro_batch_size: int = Field(1, ge=1)
    """Samples per forward pass on a rank. Accumulation is what remains: global / (micro x ranks)."""


class CheckpointConfig(Section):
    """What is saved of the training state, and when."""

    every_steps: int = Field(1000, ge=0)
    """Steps between checkpoints; 0 saves at the end only."""
    keep_last: int = Field(2, ge=1)
    """Checkpoints kept; older ones are deleted once the next one is valid."""
    export_dtype: Literal["fp32", "fp16", "bf16"] = "fp16"
    """Type of the weights in `models/*.safetensors`."""


class SampleConfig(Section):
    """Pictures drawn from fixed prompts during and after training."""

    prompts: list[str] = []
    """Prompts; none draws nothing."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    every_steps: int = Field(0, ge=0)
    """Steps between sample grids; 0 draws at the end only."""
    num_inference_steps: int = Field(28, ge=1)
    """Denoising steps of a sample."""
    guidance_scale: float = Field(6.0, ge=0)
    """Strength of classifier-free guidance; 1 or less turns it off."""
    width_px: int = Field(1024, ge=64, multiple_of=8)
    """Width of a sample."""
    height_px: int = Field(1024, ge=64, multiple_of=8)
    """Height of a sample."""
    seed: int = Field(0, ge=0)
    """Seed of the first prompt; the others follow it."""


class LogConfig(Section):
    """What is written while training."""

    every_steps: int = Field(10, ge=1)
    """Steps between lines on the console; `logs/metrics.jsonl` and TensorBoard get every step."""
    level: Literal["DEBUG", "INFO", "WARNING"] = "INFO"
    """Least important level shown on the console."""


class Config(Section):
    """The whole file."""

    run: RunConfig = RunConfig()  # pyright: ignore[reportCallIssue]  (pydantic fills the defaults)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()  # pyright: ignore[reportCallIssue]
    cache: CacheConfig = CacheConfig()  # pyright: ignore[reportCallIssue]
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()  # pyright: ignore[reportCallIssue]
    engine: EngineConfig = EngineConfig()
    train: TrainConfig = TrainConfig()  # pyright: ignore[reportCallIssue]
    checkpoint: CheckpointConfig = CheckpointConfig()  # pyright: ignore[reportCallIssue]
    sample: SampleConfig = SampleConfig()  # pyright: ignore[reportCallIssue]
    log: LogConfig = LogConfig()  # pyright: ignore[reportCallIssue]
