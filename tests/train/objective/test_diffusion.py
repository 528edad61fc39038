"""The formulas of the objective, compared with numbers computed by hand and with diffusers' functions."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr as compute_snr_of_diffusers

from sdxl_trainer.configs.objective import USUAL_GAMMA, ObjectiveConfig
from sdxl_trainer.train.objective import diffusion
from sdxl_trainer.train.objective.losses import HUBER_SCHEDULES, LOSSES, compute_sample_loss, resize_masks
from sdxl_trainer.train.objective.objective import build_weighting
from sdxl_trainer.train.objective.weightings import WEIGHTINGS

SCHEDULE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
ALL = torch.arange(1000)


def draw_pair(count: int = 1000) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, 2, 3, generator=generator), torch.randn(count, 4, 2, 3, generator=generator)


def weigh(snr: list[float], **settings) -> list[float]:
    return build_weighting(ObjectiveConfig(**settings))(torch.tensor(snr)).tolist()


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_schedule_noise_and_targets_match_diffusers(zero_terminal_snr):
    scheduler = DDPMScheduler(**SCHEDULE, rescale_betas_zero_snr=zero_terminal_snr)
    process = diffusion.build_diffusion_process(zero_terminal_snr)
    torch.testing.assert_close(process.signals**2, scheduler.alphas_cumprod, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(process.snr, compute_snr_of_diffusers(scheduler, ALL), rtol=2e-4, atol=1e-7)
    x0, noise = draw_pair()
    levels = process.compute_levels(ALL)
    torch.testing.assert_close(
        diffusion.add_noise(x0, noise, *levels), scheduler.add_noise(x0, noise, ALL), rtol=0, atol=2e-5
    )
    torch.testing.assert_close(
        diffusion.compute_target("v", x0, noise, *levels), scheduler.get_velocity(x0, noise, ALL), rtol=0, atol=2e-5
    )
    assert diffusion.compute_target("epsilon", x0, noise, *levels).equal(noise)


def test_the_first_and_last_timesteps_of_the_schedule():
    process = diffusion.build_diffusion_process()
    assert process.signals[0].item() ** 2 == pytest.approx(1 - 0.00085, rel=1e-7)
    assert process.snr[0].item() == pytest.approx((1 - 0.00085) / 0.00085, rel=1e-6)  # 1 - abar has not cancelled
    assert process.snr[-1].item() == pytest.approx(0.004682, rel=1e-3)  # SDXL is never trained on pure noise ...
    zero = diffusion.build_diffusion_process(zero_terminal_snr=True)
    assert zero.signals[-1] == zero.snr[-1] == 0 and zero.noise_levels[-1] == 1  # ... unless the schedule is rescaled
    assert zero.signals[0] == process.signals[0]
    assert (zero.snr[1:] < process.snr[1:]).all()  # computed from the rescaled schedule


def test_zero_terminal_snr_shifts_and_scales_the_root():
    alphas_cumprod = torch.tensor([0.81, 0.36, 0.09], dtype=torch.float64)  # roots 0.9, 0.6, 0.3
    expected = torch.tensor([0.9, 0.45, 0.0], dtype=torch.float64) ** 2  # (root - 0.3) · 0.9/0.6
    torch.testing.assert_close(diffusion.rescale_zero_terminal_snr(alphas_cumprod), expected)


def test_flow_is_a_straight_line_whose_velocity_is_the_target():
    x0, noise = draw_pair(4)
    timesteps = torch.tensor([0.0, 250.0, 999.0, 1000.0])  # 1000·s
    levels = diffusion.FlowProcess().compute_levels(timesteps)
    x_t = diffusion.add_noise(x0, noise, *levels)
    torch.testing.assert_close(x_t[1], 0.75 * x0[1] + 0.25 * noise[1])
    assert x_t[0].equal(x0[0]) and x_t[3].equal(noise[3])
    target = diffusion.compute_target("flow", x0, noise, *levels)
    torch.testing.assert_close(target, noise - x0)
    scheduler = FlowMatchEulerDiscreteScheduler()
    torch.testing.assert_close(scheduler.scale_noise(x0[1:2], torch.tensor([250.0]), noise[1:2]), x_t[1:2])
    assert diffusion.FlowProcess().compute_snr(torch.tensor([200.0])).item() == pytest.approx(16)  # (0.8 / 0.2)²


def test_latents_are_normalized_per_channel():
    latents = torch.full((1, 4, 1, 1), 3.0)
    mean, std = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 4.0, 8.0])
    normalized = diffusion.normalize_latents(latents, mean, 1 / std)
    assert normalized.flatten().tolist() == [2, 0.5, 0, -0.125]
    scaled = diffusion.normalize_latents(latents, torch.zeros(1), torch.tensor([0.13025]))
    torch.testing.assert_close(scaled, latents * 0.13025)


@pytest.mark.parametrize(
    ("settings", "weights"),  # at SNR 1/4, 4 and 2500
    [
        ({"weighting": "none"}, [1, 1, 1]),
        ({"weighting": "min_snr"}, [1, 1, 5 / 2500]),
        ({"weighting": "min_snr", "weighting_gamma": 1}, [1, 1 / 4, 1 / 2500]),
        ({"weighting": "min_snr", "prediction": "v"}, [0.25 / 1.25, 4 / 5, 5 / 2501]),
        ({"weighting": "soft_min_snr"}, [1, 1, 1]),  # the soft SNR is at most 1/4
        ({"weighting": "soft_min_snr", "weighting_gamma": 0.1}, [0.1 / 0.16, 0.1 / 0.16, 1]),
        ({"weighting": "soft_min_snr", "prediction": "v"}, [0.16 / 1.16, 0.16 / 1.16, 2500 / (2501**2 + 2500)]),
        # s = 2: (2·2)²/(4 + 4)² = 1/4, (1/2·2)²/(1/4 + 4)² = 16/289, (1/50·2)²/(1/2500 + 4)² = 10000/10001²
        (
            {"weighting": "soft_min_snr", "prediction": "v", "sigma_data": 2},
            [0.25 / 1.25, 16 / 305, 10000 / (10001**2 + 10000)],
        ),
        ({"weighting": "debiased"}, [2, 1 / 2, 1 / math.sqrt(1000)]),
        ({"weighting": "debiased", "prediction": "v"}, [0.8, 0.2, 1 / 1001]),
        ({"weighting": "p2"}, [0.8, 0.2, 1 / 2501]),
        ({"weighting": "p2", "weighting_gamma": 0.5, "prediction": "v"}, [0.8**0.5, 0.2**0.5, 2501**-0.5]),
        ({"weighting": "v_like_epsilon", "prediction": "v"}, [0.2, 0.8, 1000 / 1001]),
        ({"weighting": "v_pred_like"}, [6, 2.25, 1 + 1001 / 1000]),
        ({"weighting": "v_pred_like", "weighting_gamma": 0.5}, [3.5, 1.625, 1 + 0.5 * 1001 / 1000]),
    ],
    ids=str,
)
def test_weightings_match_values_computed_by_hand(settings, weights):
    assert weigh([0.25, 4, 2500], **settings) == pytest.approx(weights, rel=1e-5)


def test_min_snr_matches_diffusers_training_script():
    """diffusers' train_text_to_image_sdxl.py: min(snr, γ), divided by snr or by snr + 1, over the whole schedule."""
    snr = compute_snr_of_diffusers(DDPMScheduler(**SCHEDULE), ALL)
    least = torch.stack([snr, 5 * torch.ones(1000)], dim=1).min(dim=1)[0]
    own = diffusion.build_diffusion_process().snr
    for prediction, expected in (("epsilon", least / snr), ("v", least / (snr + 1))):
        weights = build_weighting(ObjectiveConfig(prediction=prediction, weighting="min_snr"))(own)
        torch.testing.assert_close(weights, expected, rtol=2e-4, atol=0)


def test_v_like_epsilon_converts_the_error_of_v_to_that_of_epsilon():
    """v's squared error is epsilon's times (snr + 1)/snr if both predictions imply the same x0."""
    x0, noise = draw_pair()
    process = diffusion.build_diffusion_process()
    signal, level = (diffusion.expand_like(values, x0) for values in process.compute_levels(ALL))
    guess = x0 + 0.1 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    x_t = signal * x0 + level * noise
    errors = {}
    for name in ("epsilon", "v"):
        implied = diffusion.compute_target(
            name, guess, (x_t - signal * guess) / level, signal.flatten(), level.flatten()
        )
        target = diffusion.compute_target(name, x0, noise, signal.flatten(), level.flatten())
        errors[name] = compute_sample_loss(implied, target)
    weights = build_weighting(ObjectiveConfig(prediction="v", weighting="v_like_epsilon"))(process.snr)
    low = process.snr < 100  # above, the clamp and rounding matter
    torch.testing.assert_close((errors["v"] * weights)[low], errors["epsilon"][low], rtol=5e-3, atol=0)


def test_weights_are_finite_with_zero_terminal_snr():
    snr = diffusion.build_diffusion_process(zero_terminal_snr=True).snr
    for name in set(WEIGHTINGS) - {"v_pred_like"}:
        weights = build_weighting(ObjectiveConfig(prediction="v", zero_terminal_snr=True, weighting=name))(snr)
        assert weights.isfinite().all() and (weights >= 0).all(), name
        assert (weights[-1] == 0) == (name in ("min_snr", "soft_min_snr", "v_like_epsilon"))


def test_losses_match_values_computed_by_hand():
    difference, c = torch.tensor([0.3, -0.3]), torch.tensor([0.4, 0.4])  # sqrt(d² + c²) = 0.5
    expected = {"l2": 0.09, "l1": 0.3, "huber": 2 * 0.4 * 0.1, "smooth_l1": 2 * 0.1}
    assert LOSSES.keys() == expected.keys()
    for name, value in expected.items():
        assert LOSSES[name](difference, c).tolist() == pytest.approx([value, value]), name


def test_huber_schedules_fall_from_one_to_c():
    timesteps, snr = torch.tensor([0, 500, 999]), torch.tensor([float("inf"), 1.0, 1 / 9])  # σ = 0, 1, 3
    values = {name: schedule(0.25, timesteps, snr).tolist() for name, schedule in HUBER_SCHEDULES.items()}
    assert values["constant"] == [0.25] * 3
    assert values["exponential"] == pytest.approx([1, 0.5, math.exp(999 * math.log(0.25) / 1000)])
    assert values["snr"] == pytest.approx([1, 0.75 / 4 + 0.25, 0.75 / 16 + 0.25])
    zero = diffusion.build_diffusion_process(zero_terminal_snr=True).snr[-1:]
    assert HUBER_SCHEDULES["snr"](0.1, ALL[-1:], zero).item() == pytest.approx(0.1)


def test_each_sample_has_its_own_huber_c():
    prediction, target = torch.full((2, 4, 2, 2), 0.3), torch.zeros(2, 4, 2, 2)
    losses = compute_sample_loss(prediction, target, "huber", torch.tensor([0.4, 1.0]))
    assert losses.tolist() == pytest.approx([0.08, 2 * (math.sqrt(1.09) - 1)])
    bf16_losses = compute_sample_loss(prediction.bfloat16(), target.bfloat16())
    assert bf16_losses.equal(compute_sample_loss(prediction.bfloat16().float(), target))
    assert bf16_losses.dtype == torch.float32


def test_masks_are_resized_by_area_and_applied_before_the_mean():
    masks = torch.tensor([[[1.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.5, 0.5]]])  # [1, 2, 4] over a latent of 1 x 2
    assert resize_masks(masks, (1, 2)).tolist() == [[[[0.25, 0.5]]]]
    prediction = torch.tensor([2.0, 4.0]).expand(1, 4, 1, 2)
    losses = compute_sample_loss(prediction, torch.zeros(1, 4, 1, 2), masks=masks)
    assert losses.item() == (4 * 0.25 + 16 * 0.5) / 2  # not divided by the mask's mean
    whole = compute_sample_loss(prediction, torch.zeros(1, 4, 1, 2), masks=torch.ones(1, 8, 16))
    assert whole.equal(compute_sample_loss(prediction, torch.zeros(1, 4, 1, 2)))


def test_every_weighting_with_a_gamma_has_a_default_gamma():
    with_gamma = {name for name, function in WEIGHTINGS.items() if "gamma" in function.__annotations__}
    assert with_gamma == set(USUAL_GAMMA)
    assert np.isfinite(list(USUAL_GAMMA.values())).all()


def test_errors_of_every_prediction_convert_to_those_of_x0_and_v():
    """By hand: a wrong output is turned into x0 and v as a sampler would, and those are compared with the true ones."""
    signal, noise_level = torch.tensor([0.6]), torch.tensor([0.8])
    errors = torch.tensor([0.09])
    for prediction, x0_error, v_error in (
        ("epsilon", 0.09 * 0.64 / 0.36, 0.09 / 0.36),  # x0 = (x_t - 0.8 n) / 0.6
        ("v", 0.09 * 0.64, 0.09),  # x0 = 0.6 x_t - 0.8 v
    ):
        converted = diffusion.convert_errors(prediction, errors, signal, noise_level)
        assert converted.x0.item() == pytest.approx(x0_error) and converted.v.item() == pytest.approx(v_error)
    flow = diffusion.convert_errors("flow", errors, torch.tensor([0.75]), torch.tensor([0.25]))
    assert flow.x0.item() == pytest.approx(0.09 / 16)  # x0 = x_t - 0.25 u
    assert flow.v.item() == pytest.approx(0.09 / 16 * (1 + 9))  # an SNR of 9


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
def test_converted_errors_are_those_of_the_reconstructed_latents(prediction):
    x0, noise = draw_pair(3)
    is_flow = prediction == "flow"
    process = diffusion.FlowProcess() if is_flow else diffusion.build_diffusion_process()
    signal, noise_level = process.compute_levels(torch.tensor([50.0, 400.0, 950.0] if is_flow else [50, 400, 950]))
    s, n = (diffusion.expand_like(level, x0).double() for level in (signal, noise_level))
    x_t, target = s * x0 + n * noise, diffusion.compute_target(prediction, x0, noise, signal, noise_level)
    output = target + 0.3 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    found = {"epsilon": (x_t - n * output) / s, "v": s * x_t - n * output, "flow": x_t - n * output}[prediction]
    length = (s**2 + n**2).sqrt()
    true_v = (s * noise - n * x0) / length
    found_v = (s * (x_t - s * found) / n - n * found) / length
    errors = (output - target).square().flatten(1).mean(1)
    converted = diffusion.convert_errors(prediction, errors, signal, noise_level)
    for error, got, wanted in ((converted.x0, found, x0), (converted.v, found_v, true_v)):
        expected = (got - wanted).square().flatten(1).mean(1).float()
        torch.testing.assert_close(error, expected, rtol=1e-4, atol=0)


def test_errors_without_any_signal():
    """At the last timestep with zero terminal SNR, x_t is the noise: v is minus x0, and epsilon says nothing of x0."""
    levels = diffusion.build_diffusion_process(zero_terminal_snr=True).compute_levels(torch.tensor([999]))
    converted = diffusion.convert_errors("v", torch.tensor([0.25]), *levels)
    assert converted.x0.item() == converted.v.item() == 0.25
    assert all(error.isnan() for error in diffusion.convert_errors("epsilon", torch.tensor([0.25]), *levels))
    assert diffusion.convert_errors("flow", torch.tensor([0.25]), torch.zeros(1), torch.ones(1)).x0.item() == 0.25
    assert diffusion.compute_log_snr(*levels).item() == -torch.inf
    assert diffusion.compute_log_snr(torch.ones(1), torch.ones(1)).item() == 0
