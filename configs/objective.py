"""Settings of the objective, `objective`: what the U-Net learns to predict, at which noise, and how errors count."""

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from sdxl_trainer.configs.section import Section

HUBER_LOSSES = ("huber", "smooth_l1")
# Weightings with a γ, and what is usual for it.
USUAL_GAMMA = {"min_snr": 5.0, "soft_min_snr": 5.0, "p2": 1.0, "v_pred_like": 1.0}
# Settings that mean nothing unless another one has one of these values, or, without values, is not 0.
USED_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
    "huber_schedule": ("loss", HUBER_LOSSES),
    "huber_c": ("loss", HUBER_LOSSES),
    "weighting_gamma": ("weighting", tuple(USUAL_GAMMA)),
    "sigma_data": ("weighting", ("soft_min_snr",)),
    "logit_mean": ("timestep_density", ("logit_normal",)),
    "logit_std": ("timestep_density", ("logit_normal",)),
    "noise_offset_random_strength": ("noise_offset", ()),
    "multires_noise_discount": ("multires_noise_iterations", ()),
    "ip_noise_gamma_random_strength": ("ip_noise_gamma", ()),
}


class ObjectiveConfig(Section):
    """What the U-Net learns to predict, at which noise, and how its errors count. What is random is drawn for each
    sample by itself, from the seed, the step and its place in the global batch. A choice that contradicts another, or
    that another one leaves without effect, is an error."""

    prediction: Literal["epsilon", "v", "flow"] = "epsilon"
    """`epsilon`: the noise, as SDXL base was trained; `v`: sqrt(abar)·noise - sqrt(1 - abar)·latent; `flow`: rectified
    flow, noise - latent on a straight line between them. Samples and exported files follow."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that the last timestep is pure noise (arXiv 2305.08891); for `v`. Images may then be
    all dark or all bright."""

    loss: Literal["l2", "l1", "huber", "smooth_l1"] = "l2"
    """Error of each value with difference d: d², |d|, 2c(sqrt(d² + c²) - c) or 2(sqrt(d² + c²) - c)."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "constant"
    """c of `huber` and `smooth_l1` over the timesteps: `huber_c` throughout, or from 1 without noise down to it, as
    exp(t·ln(c)/1000) or (1 - c)/(1 + sigma)² + c (not for `flow`)."""
    huber_c: float = Field(0.1, gt=0, le=1)
    """c of `huber` and `smooth_l1`: where the loss goes over from quadratic to linear."""
    masked_loss: bool = False
    """Multiply the error by the sample's mask (`alpha_mask` of its latent file, 0 to 1) before the mean; a sample
    without one counts whole."""
    prior_loss_weight: float = Field(1.0, gt=0)
    """Weight of regularisation samples, those with `is_reg: true` in their metadata (prior preservation)."""

    weighting: Literal["none", "min_snr", "soft_min_snr", "debiased", "p2", "v_like_epsilon", "v_pred_like"] = "none"
    """Weight of the loss by the timestep's SNR. `min_snr`: min(snr, gamma)/snr, for `v` /(snr + 1) (arXiv 2303.09556);
    `soft_min_snr`: the same with (sigma·s)²/(sigma² + s²)² as the SNR; `debiased`: 1/sqrt(snr), for `v` 1/(snr + 1)
    (arXiv 2310.08442); `p2`: (1 + snr)^-gamma; `v_like_epsilon`, for `v`: snr/(snr + 1), as if noise were predicted;
    `v_pred_like`, for `epsilon`: 1 + gamma·(snr + 1)/snr, which adds the loss of v-prediction. `debiased`,
    `v_like_epsilon` and `v_pred_like` take the SNR as 1000 at most. None of them goes with `flow`."""
    weighting_gamma: float | None = Field(None, gt=0)
    """gamma of the weighting; by default 5 for `min_snr` and `soft_min_snr`, 1 for `p2` and `v_pred_like`. The soft SNR
    is never above 1/4, so with `epsilon` a larger gamma makes `soft_min_snr` weigh nothing."""
    sigma_data: float = Field(1.0, gt=0)
    """s of `soft_min_snr`: the standard deviation of the (scaled) latents."""

    min_timestep: int = Field(0, ge=0, le=999)
    """First timestep that is trained."""
    max_timestep: int = Field(1000, ge=1, le=1000)
    """The timestep after the last one that is trained."""
    timestep_density: Literal["uniform", "logit_normal"] | list[float] = "uniform"
    """How often the timesteps of that range come: equally, by sigmoid(`logit_mean` + `logit_std`·z) with a normal z, or
    by numbers of your own, such as `[1, 2, 4]`, that say how often equal parts of the range come."""
    logit_mean: float = 0.0
    """Mean of `logit_normal` before the sigmoid; above 0 means more noise."""
    logit_std: float = Field(1.0, gt=0)
    """Standard deviation of `logit_normal` before the sigmoid."""
    timestep_shift: float = Field(1.0, gt=0)
    """Moves the timesteps: s becomes shift·s/(1 + (shift - 1)·s); above 1 means more noise, as large images need it
    with `flow`. Samples of a `flow` model are drawn with the same shift."""
    low_discrepancy: bool = False
    """Spread the timesteps of a global batch evenly over their density instead of drawing each by itself: a steadier
    loss and gradient. Each sample's own timestep is as random as before."""

    noise_offset: float = Field(0.0, ge=0)
    """Strength of a shift of the noise that is the same all over the image, drawn for each channel; 0.05 to 0.1 is
    usual. Lets `epsilon` learn dark and bright images."""
    noise_offset_random_strength: bool = False
    """Draw the strength of the offset for each sample, from 0 to `noise_offset`."""
    adaptive_noise_scale: float = 0.0
    """Added to the strength of the offset: this times the absolute mean of the sample's channel; the sum is at least
    0."""
    multires_noise_iterations: int = Field(0, ge=0, le=16)
    """Levels of pyramid noise: noise of full size and of smaller and smaller sizes, enlarged; 0 is plain noise, 6 to 10
    usual."""
    multires_noise_discount: float = Field(0.3, gt=0, lt=1)
    """Strength of each level of pyramid noise, relative to the one before."""
    ip_noise_gamma: float = Field(0.0, ge=0)
    """Input perturbation: strength of further noise that the U-Net's input gets and its target does not; 0.1 is
    usual (arXiv 2301.11706)."""
    ip_noise_gamma_random_strength: bool = False
    """Draw the strength of the perturbation for each sample, from 0 to `ip_noise_gamma`."""

    text_dropout_rate: float = Field(0.0, ge=0, le=1)
    """Share of samples whose text embeddings and pooled embedding are zeros, as diffusers' pipelines use for the absent
    negative prompt of SDXL base. The other way, an empty caption, is `data.caption.dropout_rate`."""

    @field_validator("zero_terminal_snr")
    @classmethod
    def _terminal_snr_is_for_v(cls, zero_terminal_snr: bool, info: ValidationInfo) -> bool:
        prediction = info.data.get("prediction")
        if zero_terminal_snr and prediction == "epsilon":
            raise ValueError(
                "cannot go with objective.prediction epsilon: pure noise says nothing of itself; set it to v"
            )
        if zero_terminal_snr and prediction == "flow":
            raise ValueError("has no meaning with objective.prediction flow, which ends in pure noise; leave it out")
        return zero_terminal_snr

    @field_validator("huber_schedule")
    @classmethod
    def _flow_has_no_snr_schedule(cls, schedule: str, info: ValidationInfo) -> str:
        if schedule == "snr" and info.data.get("prediction") == "flow":
            raise ValueError("cannot be snr with objective.prediction flow; choose constant or exponential")
        return schedule

    @field_validator("weighting")
    @classmethod
    def _weighting_fits_the_prediction(cls, weighting: str, info: ValidationInfo) -> str:
        prediction, needed = info.data.get("prediction"), {"v_like_epsilon": "v", "v_pred_like": "epsilon"}
        if prediction == "flow" and weighting != "none":
            raise ValueError(
                "cannot go with objective.prediction flow, without a schedule to weigh by; set it to none, and choose "
                "objective.timestep_density instead"
            )
        if prediction and prediction != needed.get(weighting, prediction):
            raise ValueError(f"needs objective.prediction {needed[weighting]}, which is {prediction}")
        return weighting

    @field_validator("max_timestep")
    @classmethod
    def _range_holds_something(cls, maximum: int, info: ValidationInfo) -> int:
        if maximum <= info.data.get("min_timestep", 0):
            raise ValueError(f"must be above objective.min_timestep, which is {info.data['min_timestep']}")
        return maximum

    @field_validator("timestep_density")
    @classmethod
    def _heights_are_a_density(cls, density: str | list[float]) -> str | list[float]:
        if isinstance(density, list) and (not any(density) or min(density) < 0):
            raise ValueError("must be numbers of 0 or more that are not all 0")
        return density

    @field_validator(*USED_WITH)
    @classmethod
    def _has_an_effect(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None, "a field validator has a field"
        other, values = USED_WITH[info.field_name]
        chosen = info.data.get(other)
        used = chosen in values if values and not isinstance(chosen, list) else not values and chosen
        if value != cls.model_fields[info.field_name].default and other in info.data and not used:
            needed = " or ".join(values) or "above 0"
            raise ValueError(f"has no effect: objective.{other} is {chosen}; set that to {needed}, or leave this out")
        return value

    @property
    def gamma(self) -> float:
        """`weighting_gamma`, or what is usual for the weighting."""
        return self.weighting_gamma or USUAL_GAMMA.get(self.weighting, 1.0)
