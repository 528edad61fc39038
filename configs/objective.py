"""Settings of the objective, `objective`: prediction, loss, weighting, timesteps and noise."""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationInfo, field_validator

from sdxl_trainer.configs.paths import IS_PATH
from sdxl_trainer.configs.section import KNOWN_NAME, NAME_OR_CODE, OwnCodeName, Section, is_own_code

LossName = Literal["l2", "l1", "huber", "smooth_l1"]
WeightingName = Literal["none", "min_snr", "soft_min_snr", "debiased", "p2", "v_like_epsilon", "v_pred_like"]
HUBER_LOSSES = ("huber", "smooth_l1")
MAX_MODE_SCALE = 1.7519  # 2/(π - 2), beyond which the map of `mode` is not monotonic
# Weighting → its usual gamma.
USUAL_GAMMA = {"min_snr": 5.0, "soft_min_snr": 5.0, "p2": 1.0, "v_pred_like": 1.0}


class Dependency(NamedTuple):
    """A setting that another setting depends on: it must have one of `values`; without any, be true or above 0."""

    setting: str
    values: tuple[str, ...] = ()


# Setting → the setting that it depends on.
USED_WITH = {
    "huber_schedule": Dependency("loss", HUBER_LOSSES),
    "huber_c": Dependency("loss", HUBER_LOSSES),
    "weighting_gamma": Dependency("weighting", tuple(USUAL_GAMMA)),
    "sigma_data": Dependency("weighting", ("soft_min_snr",)),
    "learned_weighting_lr": Dependency("learned_weighting"),
    "logit_mean": Dependency("timestep_density", ("logit_normal",)),
    "logit_std": Dependency("timestep_density", ("logit_normal",)),
    "mode_scale": Dependency("timestep_density", ("mode",)),
    "noise_offset_random_strength": Dependency("noise_offset"),
    "multires_noise_discount": Dependency("multires_noise_iterations"),
    "ip_noise_gamma_random_strength": Dependency("ip_noise_gamma"),
}


class ObjectiveConfig(Section):
    """Prediction target, loss, weighting, timesteps and noise. Random numbers are drawn separately for each sample,
    from the seed, the step and the sample's position in the global batch. Settings that contradict each other, or that
    have no effect because of another setting, are errors."""

    prediction: Literal["epsilon", "v", "flow"] = "epsilon"
    """Target that the U-Net learns to predict. `epsilon`: the noise, as SDXL base was trained; `v`: sqrt(abar)·noise -
    sqrt(1 - abar)·latent; `flow`: rectified flow, noise - latent on a straight line between the two. Generated images
    and exported files use the same prediction."""
    zero_terminal_snr: bool = False
    """Rescale the noise schedule so that the last timestep is pure noise (arXiv 2305.08891). The model can then
    generate entirely dark or bright images. Needs `prediction: v`."""

    loss: Annotated[Annotated[LossName, KNOWN_NAME] | OwnCodeName, NAME_OR_CODE, IS_PATH] = "l2"
    """Error of each value with difference d: d² (`l2`), |d| (`l1`), 2c(sqrt(d² + c²) - c) (`huber`) or
    2(sqrt(d² + c²) - c) (`smooth_l1`). The last two reduce the effect of outliers. Or your own function, as
    `path/to/file.py:name` or `module:name` (docs/OWN_CODE.md)."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "constant"
    """Value of c at each timestep for `huber` and `smooth_l1`: `huber_c` at every timestep (`constant`), or falling
    from 1 without noise to `huber_c`, as exp(t·ln(c)/1000) (`exponential`) or (1 - c)/(1 + sigma)² + c (`snr`, not for
    `flow`)."""
    huber_c: float = Field(0.1, gt=0, le=1)
    """Difference c at which `huber` and `smooth_l1` change from quadratic to linear."""
    masked_loss: bool = False
    """Multiply the error by the sample's mask (`alpha_mask` in its latent file, 0 to 1) before the mean is taken.
    Samples without a mask count fully. `data.masks` and `cache.alpha_mask` provide masks."""
    contrastive_weight: float = Field(0.0, ge=0, lt=1)
    """Weight of contrastive flow matching (arXiv 2506.05350): the squared error against the target of another sample of
    the micro batch, times this, is subtracted from the loss; 0.02 to 0.05 is usual. The loss can become negative. A
    random rotation of the micro batch, drawn for each step, chooses the other sample. So losses agree on any number of
    ranks only with the same `train.micro_batch_size`, which must be at least 2. Only with `prediction: flow` and
    `loss: l2`. Validation measures the loss without it."""
    prior_loss_weight: float = Field(1.0, gt=0)
    """Loss weight of regularisation samples (prior preservation): samples from `data.regularisation_dirs`, or with
    `is_reg: true` in their metadata."""

    weighting: Annotated[Annotated[WeightingName, KNOWN_NAME] | OwnCodeName, NAME_OR_CODE, IS_PATH] = "none"
    """Loss weight of each timestep, from its signal-to-noise ratio (SNR). `min_snr`: min(snr, gamma)/snr, with `v`
    min(snr, gamma)/(snr + 1) (arXiv 2303.09556); `soft_min_snr`: like `min_snr`, with (sigma·s)²/(sigma² + s²)² as the
    SNR; `debiased`: 1/sqrt(snr), with `v` 1/(snr + 1) (arXiv 2310.08442); `p2`: (1 + snr)^-gamma; `v_like_epsilon`,
    only with `v`: snr/(snr + 1), as if the noise were predicted; `v_pred_like`, only with `epsilon`: 1 + gamma·(snr +
    1)/snr, which adds the loss of v-prediction. `debiased`, `v_like_epsilon` and `v_pred_like` limit the SNR to 1000.
    With `flow` only `none` is possible. Or your own function, as `path/to/file.py:name` or `module:name`
    (docs/OWN_CODE.md)."""
    weighting_gamma: float | None = Field(None, gt=0)
    """Gamma of the weighting. The default is 5 for `min_snr` and `soft_min_snr`, and 1 for `p2` and `v_pred_like`. The
    SNR of `soft_min_snr` is never above 1/4, so with `epsilon` a larger gamma gives all timesteps the weight 1."""
    sigma_data: float = Field(1.0, gt=0)
    """Standard deviation s of the (scaled) latents, for `soft_min_snr`."""
    learned_weighting: bool = False
    """Learn the loss weight of each noise level (EDM2, arXiv 2312.02696): a sample's loss L becomes L/exp(u) + u, where
    u is a linear layer over 128 Fourier features of ln(sigma)/4, trained by an Adam of its own. exp(u) approaches the
    mean loss of the noise level, so all noise levels have an equal share. It starts at weight 1 everywhere, and is
    saved in checkpoints. sigma is limited to 1/4096 .. 4096, as pure noise has an infinite one. The logged loss and
    validation are unweighted. Not together with `weighting` or `contrastive_weight`."""
    learned_weighting_lr: float = Field(0.01, gt=0, le=1)
    """Learning rate of the learned weighting, constant over the run."""

    min_timestep: int = Field(0, ge=0, le=999)
    """First timestep to train."""
    max_timestep: int = Field(1000, ge=1, le=1000)
    """End of the timesteps to train: the last one trained is this minus 1."""
    timestep_density: Literal["uniform", "logit_normal", "mode", "cosmap"] | list[float] = "uniform"
    """Distribution of the timesteps over the trained range: `uniform`; `logit_normal`, which is sigmoid(`logit_mean` +
    `logit_std`·z) with a normal z; `mode`, which is u - `mode_scale`·(sin²(πu/2) - u) with a uniform u; `cosmap`, with
    the density 2/(π(1 - 2s + 2s²)); or a list such as `[1, 2, 4]`, which divides the range into equal parts and gives
    their relative frequencies. `logit_normal`, `mode` and `cosmap` are from arXiv 2403.03206."""
    logit_mean: float = 0.0
    """Mean of `logit_normal` before the sigmoid; above 0 gives more noise."""
    logit_std: float = Field(1.0, gt=0)
    """Standard deviation of `logit_normal` before the sigmoid."""
    mode_scale: float = Field(1.29, ge=-1, le=MAX_MODE_SCALE)
    """Scale of `mode`: above 0 gives more timesteps in the middle, below 0 more at both ends, and 0 is `uniform`."""
    timestep_shift: float = Field(1.0, gt=0)
    """Shift of the timesteps: s becomes shift·s/(1 + (shift - 1)·s), after `timestep_density`. Above 1 gives more
    noise, which large images need with `flow`; 2.5 to 6 is usual. Images of a `flow` model are generated with the same
    shift by every scheduler. Exported files declare it."""
    timestep_shift_base_px: int | None = Field(None, ge=64)
    """Side of a square image that has the shift `timestep_shift`. A bucket of another size has
    `timestep_shift`·sqrt(width·height)/side instead, so larger images get more noise (arXiv 2403.03206, equation 23);
    1024 is usual for SDXL. Images of a `flow` model are generated by the same rule. Without it, all sizes have the same
    shift."""
    low_discrepancy: bool = False
    """Spread the timesteps of each global batch evenly over their distribution instead of drawing them independently.
    The loss and the gradient vary less; each single timestep is still random."""
    adaptive_timestep_bins: int = Field(0, ge=0, le=1000)
    """Draw timesteps with large losses more often (arXiv 2102.09672). This is the number of bins of equal probability
    that the distribution of the other settings is cut into; 0 turns it off, and 50 to 100 is a good number. Once every
    bin has 10 losses, a bin is drawn in proportion to the root of the mean of its last 10 squared losses, mixed with
    1 % of the original distribution. A sample's loss is divided by its bin's probability times the number of bins, so
    the objective stays the same. The losses are saved in checkpoints."""

    noise_candidates: int = Field(1, ge=1, le=1024)
    """Noises that are drawn for a sample; the one with the smallest L2 distance to its latent is used (immiscible
    diffusion, arXiv 2505.18521). 1 is ordinary noise; 16 to 256 are usual. Noise of the other settings is added to the
    chosen one. Each sample draws and compares 16 candidates at a time, so memory does not grow, but time does:
    docs/RECIPES.md has the measured cost. With `run.noise_device: cpu` the candidates are drawn during the step, not
    ahead of it."""
    noise_offset: float = Field(0.0, ge=0)
    """Strength of a random offset added to the noise, constant over the image and drawn for each channel. Helps
    `epsilon` to learn dark and bright images; 0.05 to 0.1 is usual."""
    noise_offset_random_strength: bool = False
    """Draw the strength of the offset for each sample, between 0 and `noise_offset`."""
    adaptive_noise_scale: float = 0.0
    """Factor a of the adaptive offset: the strength of a channel is `noise_offset` + a·|mean of the channel|, and at
    least 0."""
    multires_noise_iterations: int = Field(0, ge=0, le=16)
    """Levels of pyramid noise, the sum of enlarged noise that is drawn at full size and at ever smaller sizes. 0 uses
    plain noise; 6 to 10 is usual."""
    multires_noise_discount: float = Field(0.3, gt=0, lt=1)
    """Strength of each level of pyramid noise, relative to the level before."""
    ip_noise_gamma: float = Field(0.0, ge=0)
    """Input perturbation (arXiv 2301.11706): strength of additional noise in the U-Net's input that the target does not
    contain; 0.1 is usual."""
    ip_noise_gamma_random_strength: bool = False
    """Draw the strength of the perturbation for each sample, between 0 and `ip_noise_gamma`."""

    text_dropout_rate: float = Field(0.0, ge=0, le=1)
    """Share of samples whose text embeddings and pooled embedding are set to zero, as diffusers' pipelines do for SDXL
    base without a negative prompt. To train with empty captions instead, use `data.caption.dropout_rate`."""

    @field_validator("zero_terminal_snr")
    @classmethod
    def _require_v_prediction(cls, zero_terminal_snr: bool, info: ValidationInfo) -> bool:
        prediction = info.data.get("prediction")
        if zero_terminal_snr and prediction == "epsilon":
            raise ValueError(
                "needs objective.prediction v: the noise is trivial to predict from pure noise; set it to v"
            )
        if zero_terminal_snr and prediction == "flow":
            raise ValueError("has no effect with objective.prediction flow, which ends in pure noise; leave this out")
        return zero_terminal_snr

    @field_validator("huber_schedule")
    @classmethod
    def _reject_snr_with_flow(cls, schedule: str, info: ValidationInfo) -> str:
        if schedule == "snr" and info.data.get("prediction") == "flow":
            raise ValueError("cannot be snr with objective.prediction flow; set it to constant or exponential")
        return schedule

    @field_validator("contrastive_weight")
    @classmethod
    def _require_flow_and_l2(cls, weight: float, info: ValidationInfo) -> float:
        for name, needed in (("prediction", "flow"), ("loss", "l2")):
            chosen = info.data.get(name, needed)
            if weight and chosen != needed:
                raise ValueError(
                    f"needs objective.{name} {needed}, but that is {chosen}; set that to {needed}, or this to 0"
                )
        return weight

    @field_validator("weighting")
    @classmethod
    def _require_matching_prediction(cls, weighting: str, info: ValidationInfo) -> str:
        prediction, needed = info.data.get("prediction"), {"v_like_epsilon": "v", "v_pred_like": "epsilon"}
        if prediction == "flow" and weighting != "none":
            raise ValueError(
                "cannot be used with objective.prediction flow, which has no SNR; set it to none, and use "
                "objective.timestep_density instead"
            )
        if prediction and prediction != needed.get(weighting, prediction):
            raise ValueError(f"needs objective.prediction {needed[weighting]}, but that is {prediction}")
        return weighting

    @field_validator("learned_weighting")
    @classmethod
    def _reject_other_weights(cls, learned: bool, info: ValidationInfo) -> bool:
        for name, off in (("weighting", "none"), ("contrastive_weight", 0)):
            chosen = info.data.get(name, off)
            if learned and chosen != off:
                raise ValueError(
                    f"cannot be used with objective.{name}, which is {chosen}; set that to {off}, or leave this out"
                )
        return learned

    @field_validator("max_timestep")
    @classmethod
    def _require_range(cls, maximum: int, info: ValidationInfo) -> int:
        if maximum <= info.data.get("min_timestep", 0):
            raise ValueError(f"must be above objective.min_timestep, which is {info.data['min_timestep']}")
        return maximum

    @field_validator("timestep_density")
    @classmethod
    def _require_density(cls, density: str | list[float]) -> str | list[float]:
        if isinstance(density, list) and (not any(density) or min(density) < 0):
            raise ValueError("must contain numbers of 0 or more, at least one of them above 0")
        return density

    @field_validator("adaptive_timestep_bins")
    @classmethod
    def _require_bins(cls, number: int, info: ValidationInfo) -> int:
        num_timesteps = info.data.get("max_timestep", 1000) - info.data.get("min_timestep", 0)
        if number == 1:
            raise ValueError("must be at least 2: a single bin is always as frequent; set it to 100, or to 0")
        if number > num_timesteps and info.data.get("prediction", "flow") != "flow":
            raise ValueError(f"is more than the {num_timesteps} timesteps to train; lower it, or set it to 0")
        return number

    @field_validator(*USED_WITH)
    @classmethod
    def _require_effect(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None, "a field validator has a field"
        other, values = USED_WITH[info.field_name]
        chosen = info.data.get(other)
        has_effect = chosen in values if values else bool(chosen)
        has_effect = has_effect or (other == "weighting" and is_own_code(chosen))  # which may take any of them
        if value != cls.model_fields[info.field_name].default and other in info.data and not has_effect:
            needed = f"to {' or '.join(values)}" if values else "to true" if chosen is False else "above 0"
            raise ValueError(f"has no effect: objective.{other} is {chosen}; set that {needed}, or leave this out")
        return value

    @property
    def gamma(self) -> float:
        """Return `weighting_gamma`, or the usual value for the weighting."""
        return self.weighting_gamma or USUAL_GAMMA.get(self.weighting, 1.0)
