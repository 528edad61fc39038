"""Examples for `optim.schedule`, `objective.loss` and `objective.weighting`. docs/OWN_CODE.md explains them."""

import math


def rise_and_fall(progress, num_steps):
    """Schedule: constant, with a dip to a tenth in every thousand steps after the warm-up."""
    phase = progress * num_steps / 1000
    return 0.1 + 0.9 * abs(math.cos(math.pi * phase))


def log_cosh(prediction, target):
    """Loss: log(cosh(d)) of each value, quadratic for small differences and linear for large ones."""
    distance = (prediction - target).abs()
    return distance + (-2 * distance).exp().log1p() - math.log(2)


def favour_middle(snr, gamma):
    """Weighting: most for timesteps whose signal-to-noise ratio is near gamma (`objective.weighting_gamma`)."""
    return 1 / (1 + (snr.clamp(min=1e-6) / gamma).log().square())
