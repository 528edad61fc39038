"""The objective of a run: the computation of a step, masks and weights in batches, and settings that are refused."""

from types import SimpleNamespace

import numpy as np
import orjson
import pytest
import torch
from tiny_tokenizers import load_tiny_tokenizers

from sdxl_trainer.configs.load import dump_config, load_config
from sdxl_trainer.configs.objective import USED_WITH, ObjectiveConfig
from sdxl_trainer.data.formats.latents import BadLatentError, LatentSample, pack_latents, parse_latents, write_latents
from sdxl_trainer.data.loading.dataset import LatentDataset, SampleSettings
from sdxl_trainer.data.loading.micro_batch import MicroSpec
from sdxl_trainer.data.order.keyed_random import RandomStream, derive_seed
from sdxl_trainer.data.text.captions import CaptionSettings
from sdxl_trainer.train.main import main
from sdxl_trainer.train.networks.trained_networks import TrainedNetworks
from sdxl_trainer.train.objective import diffusion
from sdxl_trainer.train.objective.diffusion import LatentStatistics
from sdxl_trainer.train.objective.losses import rotate_samples
from sdxl_trainer.train.objective.objective import Objective, SampleKeys

STATISTICS = LatentStatistics(mean=torch.zeros(1), scale=torch.tensor([0.5]))
KEYS = SampleKeys(3, 11, [4, 5, 6])


def build(**settings) -> Objective:
    return Objective(ObjectiveConfig(**settings), STATISTICS, global_batch_size=8)


def draw_latents() -> torch.Tensor:
    return torch.randn(3, 4, 6, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
def test_a_step_from_latents_to_losses(prediction):
    """Every part of the equation is compared with its definition."""
    objective = build(prediction=prediction)
    x0 = objective.normalize_latents(draw_latents())
    assert x0.equal(0.5 * draw_latents())
    noise, timesteps = objective.sample_noise(x0, KEYS), objective.sample_timesteps(KEYS, 48 * 64).values
    x_t, target = objective.add_noise(x0, noise, timesteps, KEYS), objective.compute_target(x0, noise, timesteps)
    if prediction == "flow":
        share = (timesteps / 1000).view(3, 1, 1, 1)
        signal, level, velocity = 1 - share, share, noise - x0
    else:
        abar = diffusion.compute_alphas_cumprod()[timesteps].float().view(3, 1, 1, 1)
        signal, level = abar.sqrt(), (1 - abar).sqrt()
        velocity = signal * noise - level * x0
    torch.testing.assert_close(x_t, signal * x0 + level * noise)
    torch.testing.assert_close(target, noise if prediction == "epsilon" else velocity)
    guess = target + torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1)
    assert objective.compute_losses(guess, target, timesteps).tolist() == pytest.approx([1, 4, 9], rel=1e-5)


def test_losses_use_the_weight_and_huber_c_of_their_timestep():
    settings = {"weighting": "min_snr", "loss": "huber", "huber_schedule": "exponential", "huber_c": 0.25}
    timesteps, target = torch.tensor([0, 500, 999]), torch.zeros(3, 4, 2, 2)
    snr = diffusion.compute_snr(diffusion.compute_alphas_cumprod())[timesteps]
    losses = build(**settings).compute_losses(target + 2, target, timesteps)
    c = 0.25 ** (timesteps.double() / 1000)
    expected = 2 * c * ((4 + c**2).sqrt() - c) * snr.clamp(max=5) / snr
    torch.testing.assert_close(losses, expected.float())


def test_zero_terminal_snr_is_applied_before_the_snr_is_computed():
    timesteps, target = torch.tensor([998, 999]), torch.zeros(2, 4, 2, 2)
    losses = build(prediction="v", zero_terminal_snr=True, weighting="min_snr").compute_losses(
        target + 1, target, timesteps
    )
    snr = diffusion.build_diffusion_process(zero_terminal_snr=True).snr[998].item()
    assert losses.tolist() == pytest.approx([snr / (snr + 1), 0])


def test_the_contrastive_loss_is_that_computed_by_hand():
    """|p - T|² - λ·|p - T of another sample|², both under the sample's own mask."""
    objective = build(prediction="flow", contrastive_weight=0.05, masked_loss=True)
    x0 = objective.normalize_latents(draw_latents())
    timesteps = objective.sample_timesteps(KEYS, 48 * 64).values
    target = objective.compute_target(x0, objective.sample_noise(x0, KEYS), timesteps)
    rotation = 1 + derive_seed(3, RandomStream.CONTRAST, 11, 4) % 2  # seed, step, first position; of 3 samples
    others = [(number + rotation) % 3 for number in range(3)]
    negatives = objective.choose_negatives(target, KEYS, torch.ones(3))
    assert negatives is not None and negatives.equal(target[others])
    masks = torch.ones(3, 48, 64)
    masks[1, :, :32] = 0.5
    prediction = target + torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1)
    losses = objective.compute_losses(prediction, target, timesteps, masks, negatives)
    weights = torch.nn.functional.avg_pool2d(masks[:, None], 8)
    errors = (prediction - target).square() - 0.05 * (prediction - target[others]).square()
    torch.testing.assert_close(losses, (errors * weights).mean(dim=(1, 2, 3)))
    assert build(prediction="flow").choose_negatives(target, KEYS, torch.ones(3)) is None


def test_each_sample_of_a_micro_batch_is_another_ones_negative():
    rotations = {tuple(rotate_samples(torch.ones(4), derive_seed(number)).tolist()) for number in range(50)}
    assert rotations == {(1, 2, 3, 0), (2, 3, 0, 1), (3, 0, 1, 2)}
    # Unreadable samples, of weight 0, are nobody's negative.
    assert rotate_samples(torch.tensor([1.0, 0.0, 0.5, 2.0]), 0).tolist() == [2, 1, 3, 0]
    assert rotate_samples(torch.tensor([1.0, 0.0, 0.5, 2.0]), 1).tolist() == [3, 1, 0, 2]
    assert rotate_samples(torch.tensor([0.0, 3.0]), 5).tolist() == [0, 1]


def test_negatives_depend_on_the_step_and_the_place_of_the_micro_batch_alone():
    objective, target = build(prediction="flow", contrastive_weight=0.05), torch.arange(16.0).view(16, 1, 1, 1)

    def choose(step: int, first: int) -> tuple[float, ...]:
        negatives = objective.choose_negatives(
            target, SampleKeys(3, step, list(range(first, first + 16))), torch.ones(16)
        )
        assert negatives is not None
        return tuple(negatives.flatten().tolist())

    chosen = [choose(step, first) for step in range(4) for first in (0, 16, 32)]
    assert chosen == [choose(step, first) for step in range(4) for first in (0, 16, 32)]
    assert len(set(chosen)) > 5  # of 15 rotations


def test_masks_count_only_with_masked_loss():
    masks, target = torch.zeros(3, 48, 64), torch.zeros(3, 4, 6, 8)
    masks[0] = 1
    masks[1, :, :32] = 0.5
    timesteps = torch.tensor([1, 2, 3])
    assert build().compute_losses(target + 1, target, timesteps, masks).tolist() == [1, 1, 1]
    masked = build(masked_loss=True)
    assert masked.compute_losses(target + 1, target, timesteps, masks).tolist() == [1, 0.25, 0]
    assert masked.compute_losses(target + 1, target, timesteps).tolist() == [1, 1, 1]


def test_text_dropout_zeroes_both_embeddings_of_a_share_of_the_samples():
    keys = SampleKeys(0, 0, list(range(4000)))
    kept = build(text_dropout_rate=0.2).sample_text_keep(keys)
    assert kept is not None and set(kept.tolist()) == {0, 1} and kept.mean().item() == pytest.approx(0.8, abs=0.02)
    assert build().sample_text_keep(keys) is None
    all_dropped = build(text_dropout_rate=1).sample_text_keep(keys)
    assert all_dropped is not None and not all_dropped.any()

    unet = RecordingUnet()
    text = {"hidden": torch.ones(3, 4, 2), "hidden_2": torch.ones(3, 4, 3), "pooled": torch.ones(3, 5)}
    keep = torch.tensor([1.0, 0, 1])
    TrainedNetworks(unet)(torch.zeros(3, 4, 2, 2), torch.zeros(3), text, torch.zeros(3, 6), keep)
    assert unet.hidden.equal(keep.view(3, 1, 1).expand(3, 4, 5))
    assert unet.pooled.equal(keep[:, None].expand(3, 5))


class RecordingUnet(torch.nn.Module):
    """A stand-in for the U-Net that stores its text conditioning."""

    def forward(self, x_t, timesteps, hidden, added_cond_kwargs):
        self.hidden, self.pooled = hidden, added_cond_kwargs["text_embeds"]
        return SimpleNamespace(sample=x_t)


class Rows:
    """A stand-in for an index of four samples of 64 x 32 px."""

    records = ({}, {"is_reg": False}, {"is_reg": True}, {"is_reg": True})

    def __len__(self) -> int:
        return len(self.records)

    def row(self, number: int) -> dict:
        sizes = {"bucket_width": 64, "bucket_height": 32, "original_width": 64, "original_height": 32}
        place = {"file": f"{number}.npz", "offset": None, "bytes": 1, "crop_left": 0, "crop_top": 0}
        record = orjson.dumps({"key": str(number), "caption": "a", **self.records[number]})
        return {"key": str(number), "image_path": "", "record": record, "resized_width": 64, **sizes, **place}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> LatentDataset:
    """Four samples: plain, masked, regularisation, masked regularisation."""
    folder = tmp_path_factory.mktemp("cache")
    for number in range(4):
        mask = np.linspace(0, 1, 32 * 64, dtype=np.float32).reshape(32, 64) if number % 2 else None
        latents = np.full((4, 4, 8), number, np.float32)
        write_latents(
            folder / f"{number}.npz",
            LatentSample(latents=latents, original_size=(64, 32), crop_ltrb=(0, 0, 64, 32), alpha_mask=mask),
        )
    tokenizers = load_tiny_tokenizers()
    settings = SampleSettings(seed=0, max_tokens=75, caption=CaptionSettings(), prior_loss_weight=0.25)
    return LatentDataset(Rows(), folder, tokenizers, settings)


def read(dataset: LatentDataset, rows: list[int]):
    return dataset[
        MicroSpec(bucket=(64, 32), rows=np.array(rows), epochs=np.zeros(len(rows), int), positions=np.arange(len(rows)))
    ]


def test_regularisation_samples_have_the_prior_loss_weight(dataset):
    assert read(dataset, [0, 1, 2, 3, 2]).weights.tolist() == [1, 1, 0.25, 0.25, 0.25]


def test_samples_without_a_mask_get_a_mask_of_ones(dataset):
    assert read(dataset, [0, 2]).masks is None
    masks = read(dataset, [2, 1]).masks
    assert masks is not None and masks.dtype == torch.float32 and masks.shape == (2, 32, 64)
    assert masks[0].eq(1).all() and masks[1].flatten().tolist() == pytest.approx(np.linspace(0, 1, 2048), abs=1e-6)


@pytest.mark.parametrize(
    "mask", [np.ones((4, 8)), np.full((32, 64), 2.0), np.full((32, 64), np.nan), -np.ones((32, 64))]
)
def test_a_wrong_mask_is_a_bad_latent(mask):
    sample = LatentSample(
        latents=np.zeros((4, 4, 8), np.float32), original_size=(64, 32), crop_ltrb=(0, 0, 64, 32), alpha_mask=mask
    )
    with pytest.raises(BadLatentError, match="`alpha_mask` is float32"):
        parse_latents(pack_latents(sample))


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        ("zero_terminal_snr: true", "zero_terminal_snr", "set it to v"),
        ("{prediction: flow, zero_terminal_snr: true}", "zero_terminal_snr", "leave this out"),
        ("{prediction: flow, weighting: min_snr}", "weighting", "set it to none"),
        ("{prediction: flow, weighting: debiased}", "weighting", "objective.timestep_density"),
        ("weighting: v_like_epsilon", "weighting", "needs objective.prediction v, but that is epsilon"),
        ("{prediction: v, weighting: v_pred_like}", "weighting", "needs objective.prediction epsilon, but that is v"),
        ("{prediction: flow, loss: huber, huber_schedule: snr}", "huber_schedule", "set it to constant or exponential"),
        ("weighting_gamma: 5", "weighting_gamma", "set that to min_snr or soft_min_snr or p2"),
        ("{weighting: min_snr, sigma_data: 2}", "sigma_data", "objective.weighting is min_snr"),
        ("{weighting: min_snr, weighting_gamma: 0}", "weighting_gamma", "greater than 0"),
        ("huber_c: 0.5", "huber_c", "has no effect: objective.loss is l2"),
        ("{loss: l1, huber_schedule: exponential}", "huber_schedule", "set that to huber or smooth_l1"),
        ("{min_timestep: 500, max_timestep: 500}", "max_timestep", "must be above objective.min_timestep"),
        ("max_timestep: 1001", "max_timestep", "less than or equal to 1000"),
        ("logit_mean: 1", "logit_mean", "objective.timestep_density is uniform"),
        ("{timestep_density: [1, 2], logit_std: 2}", "logit_std", "set that to logit_normal"),
        ("mode_scale: 1", "mode_scale", "set that to mode"),
        ("{timestep_density: mode, mode_scale: 1.76}", "mode_scale", "less than or equal to 1.75"),
        ("timestep_shift_base_px: 0", "timestep_shift_base_px", "greater than or equal to 64"),
        ("noise_candidates: 0", "noise_candidates", "greater than or equal to 1"),
        ("noise_candidates: -3", "noise_candidates", "greater than or equal to 1"),
        ("noise_candidates: 1025", "noise_candidates", "less than or equal to 1024"),
        ("contrastive_weight: 0.05", "contrastive_weight", "needs objective.prediction flow, but that is epsilon"),
        ("{prediction: v, contrastive_weight: 0.05}", "contrastive_weight", "needs objective.prediction flow"),
        ("{prediction: flow, loss: l1, contrastive_weight: 0.05}", "contrastive_weight", "needs objective.loss l2"),
        ("{prediction: flow, contrastive_weight: 1}", "contrastive_weight", "less than 1"),
        ("{learned_weighting: true, weighting: min_snr}", "learned_weighting", "is min_snr; set that to none"),
        (
            "{prediction: flow, contrastive_weight: 0.05, learned_weighting: true}",
            "learned_weighting",
            "objective.contrastive_weight, which is 0.05; set that to 0",
        ),
        ("learned_weighting_lr: 0.1", "learned_weighting_lr", "learned_weighting is False; set that to true"),
        ("{learned_weighting: true, learned_weighting_lr: 0}", "learned_weighting_lr", "greater than 0"),
        ("adaptive_timestep_bins: 1", "adaptive_timestep_bins", "must be at least 2"),
        ("adaptive_timestep_bins: 1001", "adaptive_timestep_bins", "less than or equal to 1000"),
        ("adaptive_timestep_bins: -1", "adaptive_timestep_bins", "greater than or equal to 0"),
        ("{min_timestep: 950, adaptive_timestep_bins: 51}", "adaptive_timestep_bins", "the 50 timesteps to train"),
        ("timestep_density: [0, 0]", "timestep_density", "at least one of them above 0"),
        ("timestep_density: [2, -1]", "timestep_density", "0 or more"),
        ("timestep_density: []", "timestep_density", "at least one of them above 0"),
        ("noise_offset_random_strength: true", "noise_offset_random_strength", "set that above 0"),
        ("multires_noise_discount: 0.5", "multires_noise_discount", "multires_noise_iterations is 0"),
        ("ip_noise_gamma_random_strength: true", "ip_noise_gamma_random_strength", "ip_noise_gamma is 0"),
        ("prior_loss_weight: 0", "prior_loss_weight", "greater than 0"),
        ("text_dropout_rate: 2", "text_dropout_rate", "less than or equal to 1"),
        ("prediction: x", "prediction", "'epsilon', 'v' or 'flow'"),
    ],
)
def test_a_contradictory_setting_is_one_problem_with_a_cure(tmp_path, settings, key, message):
    path = tmp_path / "x.yaml"
    path.write_text(f"objective:\n  {settings}")
    _, problems = load_config(path)
    # pydantic reports a wrong list of numbers once for each type that the key allows.
    assert {problem.key.split(".")[1] for problem in problems} == {key}
    assert message in " ".join(problem.rule for problem in problems)


def test_latents_mean_and_latents_std_must_be_set_together(tmp_path):
    path = tmp_path / "x.yaml"
    for settings, message in (
        ("latents_mean: [0, 0, 0, 0]", "set both or neither"),
        ("latents_std: [1, 1, 1, 1]", "set both or neither"),
        ("{latents_mean: [0, 0, 0, 0], latents_std: [1, 1, 0, 1]}", "must be above 0"),
    ):
        path.write_text(f"model:\n  {settings}")
        assert message in load_config(path)[1][0].rule
    path.write_text("model: {latents_mean: [0, 0, 0], latents_std: [1, 1, 1, 1]}")
    assert load_config(path)[1]


@pytest.mark.parametrize(
    "settings",
    [
        "{prediction: v, zero_terminal_snr: true, weighting: min_snr, loss: huber, huber_schedule: snr, huber_c: 0.2}",
        "{prediction: flow, timestep_density: logit_normal, logit_mean: 1, timestep_shift: 2.5, low_discrepancy: true}",
        "{prediction: flow, timestep_density: mode, mode_scale: -1, timestep_shift_base_px: 1024}",
        "{prediction: flow, timestep_density: cosmap, contrastive_weight: 0.05, noise_candidates: 16}",
        "{weighting: soft_min_snr, weighting_gamma: 0.2, sigma_data: 0.5, timestep_density: [1, 2.5]}",
        "{noise_offset: 0.1, noise_offset_random_strength: true, adaptive_noise_scale: -0.1, ip_noise_gamma: 0.1}",
        "{prediction: flow, learned_weighting: true, learned_weighting_lr: 0.1, adaptive_timestep_bins: 1000}",
        "{prediction: flow, contrastive_weight: 0.05, min_timestep: 950, adaptive_timestep_bins: 100}",
        "{adaptive_noise_scale: 0.1, multires_noise_iterations: 6, multires_noise_discount: 0.4, masked_loss: true}",
    ],
)
def test_compatible_settings_are_accepted_saved_and_loaded(tmp_path, settings):
    (tmp_path / "x.yaml").write_text(
        f"objective: {settings}\nmodel: {{latents_mean: [0,0,0,0], latents_std: [1,1,1,1]}}"
    )
    config, problems = load_config(tmp_path / "x.yaml")
    assert problems == []
    (tmp_path / "saved.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "saved.yaml") == (config, [])
    Objective(config.objective, STATISTICS, 8).sample_timesteps(KEYS, 1024**2)


def test_settings_are_checked_after_those_they_depend_on():
    order = list(ObjectiveConfig.model_fields)
    assert [name for name, (other, _) in USED_WITH.items() if order.index(other) > order.index(name)] == []


def test_contradictory_settings_end_the_program_with_status_2(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("objective: {zero_terminal_snr: true, weighting: v_like_epsilon}")
    assert main(["--cfg", str(tmp_path / "x.yaml")]) == 2
    printed = capsys.readouterr().err
    assert "objective.zero_terminal_snr = true" in printed and "objective.weighting = 'v_like_epsilon'" in printed
    assert "Traceback" not in printed
