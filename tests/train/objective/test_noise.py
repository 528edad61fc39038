"""Noise: the formulas of offset, pyramid and perturbation, and the independence of a sample's noise from its batch."""

import pytest
import torch
from torch.nn.functional import interpolate

from sdxl_trainer.configs.objective import ObjectiveConfig
from sdxl_trainer.data.order.keyed_random import RandomStream, derive_seed
from sdxl_trainer.train.objective.diffusion import LatentStatistics
from sdxl_trainer.train.objective.drawn_noise import DrawnNoise
from sdxl_trainer.train.objective.noise import (
    add_offset,
    add_pyramid,
    build_generator,
    draw_nearest_noise,
    draw_noise,
    perturb_noise,
)
from sdxl_trainer.train.objective.objective import Objective, SampleKeys

STATISTICS = LatentStatistics(mean=torch.zeros(1), scale=torch.ones(1))
SHAPE = (4, 16, 24)
PIXELS = 128 * 192
SEEDS = [derive_seed(number) for number in range(6)]


def draw_x0(count: int = 6) -> torch.Tensor:
    return draw_noise(SHAPE, [derive_seed(99, number) for number in range(count)]) + 0.5


def build(**settings) -> Objective:
    return Objective(ObjectiveConfig(**settings), STATISTICS, global_batch_size=6)


def test_plain_noise_is_a_seeded_unit_gaussian():
    noise = draw_noise((4, 64, 64), SEEDS)
    assert noise.shape == (6, 4, 64, 64) and noise.dtype == torch.float32
    assert noise.mean().abs() < 0.01 and (noise.std() - 1).abs() < 0.01
    assert noise[2].equal(torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(SEEDS[2])))


@pytest.mark.parametrize("num_candidates", [2, 16, 40])
def test_the_nearest_noise_is_that_found_by_hand(num_candidates):
    x0 = draw_x0()
    nearest = draw_nearest_noise(x0, num_candidates, SEEDS)
    for own, seed, chosen in zip(x0, SEEDS, nearest, strict=True):
        generator, parts = build_generator(seed), []
        for start in range(0, num_candidates, 16):
            parts.append(torch.randn(min(16, num_candidates - start), *SHAPE, generator=generator))
        candidates = torch.cat(parts)
        distances = [(candidate - own).double().square().sum().item() for candidate in candidates]
        assert len(distances) == num_candidates and chosen.equal(candidates[distances.index(min(distances))])


def test_one_candidate_is_the_plain_noise():
    x0, keys = draw_x0(), SampleKeys(0, 1, list(range(6)))
    plain = draw_noise(SHAPE, keys.derive_seeds(RandomStream.NOISE))
    assert build(noise_candidates=1).sample_noise(x0, keys).equal(plain)
    assert draw_nearest_noise(x0, 1, keys.derive_seeds(RandomStream.NOISE)).equal(plain)
    chosen = draw_nearest_noise(x0, 16, keys.derive_seeds(RandomStream.NOISE))
    assert build(noise_candidates=16).sample_noise(x0, keys).equal(chosen) and not chosen.equal(plain)
    drawn = DrawnNoise()
    on_cpu = Objective(ObjectiveConfig(noise_candidates=16), STATISTICS, 6, drawn_noise=drawn)
    on_cpu.request_noise(SHAPE, keys)  # draws nothing ahead, because the choice needs x0
    assert drawn.take(SHAPE, keys.derive_seeds(RandomStream.NOISE), torch.device("cpu")) is None
    assert on_cpu.sample_noise(x0, keys).equal(chosen)


def test_the_nearest_of_16_keeps_the_variance_of_a_gaussian():
    """d values near an x0 of variance 1: |n|² falls by E·2d/sqrt(6d), with E = 1.766 the mean maximum of 16 normals."""
    shape, seeds = (4, 64, 64), [derive_seed(5, number) for number in range(24)]
    x0 = draw_noise(shape, [derive_seed(6, number) for number in range(24)])
    chosen = draw_nearest_noise(x0, 16, seeds)
    assert chosen.mean().abs() < 0.01
    assert chosen.var().item() == pytest.approx(1 - 1.766 * 2 / (6 * 4 * 64 * 64) ** 0.5, abs=0.007)  # 0.989
    gain = (draw_noise(shape, seeds) - x0).square().sum() - (chosen - x0).square().sum()
    assert gain.item() / 24 == pytest.approx(1.766 * (6 * 4 * 64 * 64) ** 0.5, rel=0.35)


def test_offset_adds_a_constant_to_each_channel():
    x0, noise = draw_x0(), draw_noise(SHAPE, SEEDS)
    strength = torch.tensor([0.1, 0.1, 0.1, 0.2, 0.0, 0.1])
    added = add_offset(noise, x0, strength, 0.0, SEEDS) - noise
    randn = torch.stack([torch.randn(4, 1, 1, generator=build_generator(seed)) for seed in SEEDS])
    torch.testing.assert_close(added, (strength.view(6, 1, 1, 1) * randn).expand_as(added), rtol=1e-3, atol=1e-6)


def test_adaptive_offset_follows_the_mean_of_each_channel():
    x0 = torch.tensor([0.5, -1.0, 0.0, 2.0]).view(1, 4, 1, 1).expand(1, *SHAPE)
    noise, randn = torch.zeros(1, *SHAPE), torch.randn(4, 1, 1, generator=build_generator(SEEDS[0]))
    for scale, strengths in ((0.1, [0.15, 0.2, 0.1, 0.3]), (-0.1, [0.05, 0, 0.1, 0])):  # 0.1 + a·|mean|, at least 0
        added = add_offset(noise, x0, torch.tensor([0.1]), scale, SEEDS[:1])
        expected = torch.tensor(strengths).view(1, 4, 1, 1) * randn
        torch.testing.assert_close(added, expected.expand_as(added), rtol=1e-5, atol=1e-8)


def test_pyramid_noise_is_the_sum_of_enlarged_levels():
    noise = draw_noise(SHAPE, SEEDS[:1])
    ratios = 2 + 2 * torch.rand(6, generator=build_generator(SEEDS[0]))
    generator, expected, sizes = build_generator(SEEDS[0]), noise.clone(), []
    for level in range(6):
        divisor = ratios[level].item() ** level
        sizes.append((max(1, int(16 / divisor)), max(1, int(24 / divisor))))
        small = torch.randn(1, 4, *sizes[-1], generator=generator)
        expected += 0.3**level * interpolate(small, SHAPE[1:], mode="bilinear", align_corners=False)
        if min(sizes[-1]) == 1:
            break
    torch.testing.assert_close(add_pyramid(noise, 6, 0.3, SEEDS[:1]), expected / expected.std())
    assert sizes[0] == (16, 24) and min(sizes[-1]) == 1 and 3 <= len(sizes) <= 5


def test_pyramid_noise_has_unit_deviation_and_more_low_frequencies():
    noise = draw_noise((4, 64, 64), SEEDS)
    pyramid = add_pyramid(noise, 8, 0.7, SEEDS)
    assert pyramid.flatten(1).std(1).tolist() == pytest.approx([1.0] * 6, abs=1e-5)
    assert pyramid.mean(dim=(2, 3)).std() > 5 * noise.mean(dim=(2, 3)).std()
    assert not add_pyramid(noise, 1, 0.7, SEEDS).equal(noise)  # level 0 is a second noise of full size


def test_the_objective_draws_offset_and_pyramid_noise_from_separate_streams():
    x0, keys = draw_x0(), SampleKeys(0, 1, list(range(6)))
    plain = build().sample_noise(x0, keys)
    offset = add_offset(plain, x0, torch.zeros(6), 0.2, keys.derive_seeds(RandomStream.NOISE_OFFSET))
    assert build(adaptive_noise_scale=0.2).sample_noise(x0, keys).equal(offset) and not offset.equal(plain)
    pyramid = add_pyramid(offset, 4, 0.5, keys.derive_seeds(RandomStream.PYRAMID_NOISE))
    both = build(adaptive_noise_scale=0.2, multires_noise_iterations=4, multires_noise_discount=0.5)
    assert both.sample_noise(x0, keys).equal(pyramid)


def test_perturbation_changes_only_the_input():
    x0, keys = draw_x0(), SampleKeys(0, 1, list(range(6)))
    plain, perturbed = build(), build(ip_noise_gamma=0.1)
    timesteps, noise = plain.sample_timesteps(keys, PIXELS).values, plain.sample_noise(x0, keys)
    assert perturbed.sample_noise(x0, keys).equal(noise)
    assert perturbed.sample_timesteps(keys, PIXELS).values.equal(timesteps)
    assert perturbed.compute_target(x0, noise, timesteps).equal(noise)
    x_t, levels = plain.add_noise(x0, noise, timesteps, keys), plain._process.compute_levels(timesteps)
    added = (perturbed.add_noise(x0, noise, timesteps, keys) - x_t) / levels.noise_level.view(-1, 1, 1, 1)
    expected = 0.1 * draw_noise(SHAPE, keys.derive_seeds(RandomStream.INPUT_PERTURBATION))
    torch.testing.assert_close(added, expected, rtol=1e-3, atol=1e-5)
    assert perturb_noise(noise, torch.zeros(6), SEEDS).equal(noise)


@pytest.mark.parametrize("name", ["noise_offset", "ip_noise_gamma"])
def test_random_strengths_are_uniform_up_to_the_setting(name):
    objective = build(**{name: 0.2, f"{name}_random_strength": True})
    is_offset, x0 = name == "noise_offset", torch.zeros(500, 1, 1, 1)
    stream = RandomStream.NOISE_OFFSET if is_offset else RandomStream.INPUT_PERTURBATION
    keys = SampleKeys(0, 0, list(range(500)))
    strengths = objective._draw_strength(0.2, True, stream, keys)
    assert 0 <= strengths.min() and strengths.max() < 0.2 and strengths.mean().item() == pytest.approx(0.1, abs=0.01)
    added = draw_noise((1, 1, 1), keys.derive_seeds(stream)) * strengths.view(-1, 1, 1, 1)
    plain = build().sample_noise(x0, keys)
    if is_offset:
        torch.testing.assert_close(objective.sample_noise(x0, keys), plain + added)
    else:
        end = torch.full((500,), 999)
        level = objective._process.noise_levels[999]
        torch.testing.assert_close(objective.add_noise(x0, plain, end, keys), level * (plain + added))


@pytest.mark.parametrize("low_discrepancy", [False, True])
def test_draws_of_a_sample_do_not_depend_on_its_batch(low_discrepancy):
    objective = build(
        noise_offset=0.1,
        noise_offset_random_strength=True,
        adaptive_noise_scale=0.1,
        multires_noise_iterations=6,
        ip_noise_gamma=0.1,
        ip_noise_gamma_random_strength=True,
        text_dropout_rate=0.5,
        noise_candidates=3,
        low_discrepancy=low_discrepancy,
    )
    x0 = draw_x0()

    def draw(positions: list[int]) -> list[torch.Tensor]:
        keys, own = SampleKeys(7, 3, positions), x0[positions]
        noise, timesteps = objective.sample_noise(own, keys), objective.sample_timesteps(keys, PIXELS).values
        x_t = objective.add_noise(own, noise, timesteps, keys)
        return [noise, timesteps, x_t, objective.sample_text_keep(keys)]

    whole = draw(list(range(6)))
    for positions in ([4], [5, 0, 2]):
        for together, alone in zip(whole, draw(positions), strict=True):
            assert together[positions].equal(alone)
    other_step = objective.sample_noise(x0, SampleKeys(7, 4, list(range(6))))
    other_seed = objective.sample_noise(x0, SampleKeys(8, 3, list(range(6))))
    assert not whole[0].equal(other_step) and not whole[0].equal(other_seed) and not whole[0][0].equal(whole[0][1])


def test_noise_drawn_ahead_is_that_of_the_cpu():
    drawn = DrawnNoise()
    drawn.request(SHAPE, SEEDS)
    drawn.request((4, 2, 3), SEEDS)
    assert drawn.take((4, 2, 3), SEEDS, torch.device("cpu")).equal(draw_noise((4, 2, 3), SEEDS))
    assert drawn.take(SHAPE, SEEDS, torch.device("cpu")).equal(draw_noise(SHAPE, SEEDS))
    assert drawn.take(SHAPE, SEEDS, torch.device("cpu")) is None  # it is handed out once
    assert drawn.take(SHAPE, SEEDS[:3], torch.device("cpu")) is None


def test_with_noise_of_the_cpu_no_draw_uses_a_generator_of_the_device():
    """The meta device has no generators, so each draw on the device would fail."""
    settings = {name: 0.1 for name in ("noise_offset", "adaptive_noise_scale", "ip_noise_gamma")}
    config = ObjectiveConfig(**settings, multires_noise_iterations=3, noise_candidates=20)
    objective = Objective(config, STATISTICS, 6, "meta", DrawnNoise())
    x0, keys = draw_x0().to("meta"), SampleKeys(0, 1, list(range(6)))
    noise = objective.sample_noise(x0, keys)
    assert noise.is_meta and noise.shape == x0.shape
    x_t = objective.add_noise(x0, noise, objective.sample_timesteps(keys, PIXELS).values, keys)
    assert x_t.is_meta and x_t.shape == x0.shape
    with pytest.raises(RuntimeError):
        Objective(config, STATISTICS, 6, "meta").sample_noise(x0, keys)
