"""A frozen base in 8 or 4 bit: its values, its gradients, its bytes, and a run that resumes exactly."""

from pathlib import Path

import pytest
import torch
from programs import read_losses, run_program
from safetensors.torch import load_file

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.load import build_config
from sdxl_trainer.configs.lora import LoraConfig, QuantisedBase
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.train.estimates.memory import estimate_memory
from sdxl_trainer.train.estimates.memory_choice import replace_settings
from sdxl_trainer.train.estimates.memory_table import MemoryLimits
from sdxl_trainer.train.estimates.networks import measure_networks
from sdxl_trainer.train.networks.adapters import add_adapters
from sdxl_trainer.train.networks.quantised_base import VALUE_BYTES, QuantisedLinear, find_base_linears, quantise_base
from sdxl_trainer.train.setting_checks import check_model_settings
from sdxl_trainer.train.tiny.build import build_tiny_unet

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
CONFIGS = Path(__file__).parents[3] / "configs"
KINDS: list[QuantisedBase] = ["int8", "nf4"]
# Root mean square of the error of a normal distribution's values, in standard deviations.
ERRORS = {"int8": 0.012, "nf4": 0.1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_the_product_with_what_its_codes_stand_for(kind: QuantisedBase, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 512).to(dtype).requires_grad_(False)
    layer.weight.normal_()
    quantised = QuantisedLinear(layer, kind)
    weight = quantised.read_weight(dtype)
    error = (weight.float() - layer.weight.float()).square().mean().sqrt().item()
    assert ERRORS[kind] / 4 < error < ERRORS[kind]
    x = torch.randn(3, 7, 256, dtype=dtype, requires_grad=True)
    y, expected = quantised(x), torch.nn.functional.linear(x, weight, layer.bias)
    gradient = torch.randn_like(y)
    assert y.equal(expected)
    found, wanted = (torch.autograd.grad(result, x, gradient)[0] for result in (y, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-4)
    scales = quantised._scales
    state2 = scales.state2.absmax.nbytes if kind == "nf4" else 0
    held = quantised._codes.nbytes + scales.absmax.nbytes + state2
    assert held / weight.numel() == pytest.approx(VALUE_BYTES[kind], rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_of_adapters_is_replaced_and_nothing_else(kind: QuantisedBase) -> None:
    unet = build_tiny_unet()
    add_adapters({"unet": unet}, LoraConfig.model_validate({"rank": 4}), seed=1)
    trained = {name for name, weight in unet.named_parameters() if weight.requires_grad}
    names = set(find_base_linears(unet))
    quantise_base(unet, kind)
    replaced = {name for name, layer in unet.named_modules() if isinstance(layer, QuantisedLinear)}
    assert replaced == names and len(names) > 50 and all(".attentions." in name for name in names)
    assert {name for name, weight in unet.named_parameters() if weight.requires_grad} == trained
    saved = set(unet.state_dict())
    assert trained <= saved and not any(f"{name}.weight" in saved for name in names)


def test_the_estimate_counts_the_codes() -> None:
    """SDXL: 2.2 billion of 2.57 billion values are in the linear layers of the attention blocks."""
    config, problems = build_config({}, ["lora.rank=32", "engine.zero_stage=1"])
    assert problems == []
    sizes = measure_networks(config, ModelSource(CONFIGS / "sdxl"), Size(1024, 1024))
    frozen = {}
    for kind in ("none", *KINDS):
        chosen = replace_settings(config, "lora", quantised_base=kind)
        table = estimate_memory(chosen, sizes, 1, MemoryLimits(device=8 << 30, host=None))
        frozen[kind] = next(line.device for line in table.lines if line.component == "frozen weights")
    assert frozen["none"] == 2 * 2_567_463_684 and sizes.base_linears == 2_207_744_000
    for kind in KINDS:
        assert frozen["none"] - frozen[kind] == pytest.approx(sizes.base_linears * (2 - VALUE_BYTES[kind]))


@pytest.mark.parametrize(
    ("words", "cure"),
    [
        (["engine.compile=regional"], "engine.compile: none"),
        (["engine.offload_blocks=3"], "leave engine.offload_blocks out"),
        (["engine.zero_stage=3"], "leave engine.zero_stage out"),
    ],
)
def test_what_does_not_go_together_is_refused(words: list[str], cure: str) -> None:
    config, problems = build_config({}, ["lora.rank=4", "lora.quantised_base=nf4", *words])
    assert problems == []
    found = [problem.cure for problem in check_model_settings(config) if problem.key == "lora.quantised_base"]
    assert len(found) == 1 and cure in found[0]
    _, problems = build_config({}, ["lora.quantised_base=nf4"])
    assert [problem.key for problem in problems] == ["lora.quantised_base"]


def test_a_resume_is_exact_and_the_file_is_that_of_adapters(cached_folder: Path, tmp_path: Path) -> None:
    settings = {"run.dir": tmp_path, "lora.rank": 4, "lora.quantised_base": "nf4", "optim.lr": 1e-3}
    settings |= {"engine.precision": "bf16", "checkpoint.every_steps": 2, "sample.prompts": []}

    def train(name: str, steps: int) -> list[float]:
        words = [f"{key}={value}" for key, value in (settings | {"run.name": name, "train.max_steps": steps}).items()]
        run_program("train/main.py", "--cfg", cached_folder / "tiny.yaml", *words)
        return read_losses(tmp_path / name)

    whole = train("whole", 4)
    assert train("resumed", 2) == whole[:2]
    assert train("resumed", 4) == whole
    files = [tmp_path / name / "models" / "step-00000004-lora.safetensors" for name in ("whole", "resumed")]
    tensors, resumed = map(load_file, files)  # the metadata have the names of the runs
    assert tensors.keys() == resumed.keys() and all(tensors[key].equal(resumed[key]) for key in tensors)
