"""Blocks that wait in host memory: losses and weights are equal to the bit to those of a run without."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.configs.load import build_config
from sdxl_trainer.configs.lora import LoraConfig
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.configs.problems import UserInputError
from sdxl_trainer.configs.schema import EmaConfig
from sdxl_trainer.launch.distributed import init_ranks
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.checkpoint.writer import CheckpointWriter
from sdxl_trainer.train.engine import block_offload
from sdxl_trainer.train.engine.block_offload import BlockOffload, Parcel
from sdxl_trainer.train.engine.deepspeed_config import DTYPES, BatchSizes
from sdxl_trainer.train.engine.engine import Engine
from sdxl_trainer.train.networks.adapters import add_adapters
from sdxl_trainer.train.networks.blocks import (
    choose_offloaded_blocks,
    list_repeated_blocks,
    measure_block,
    measure_blocks,
)
from sdxl_trainer.train.networks.checkpointing import set_checkpointing
from sdxl_trainer.train.networks.compilation import list_blocks
from sdxl_trainer.train.optim.optimizers import build_optimizer
from sdxl_trainer.train.setting_checks import check_model_settings

TINY = ModelSource(Path(__file__).parents[3] / "configs" / "tiny")
NUM_BLOCKS = 11  # of the U-Net below that are repeated
STEPS = 3
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, which copies on a stream of its own")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


class Net(torch.nn.Module):
    """A U-Net of two levels, and its loss on inputs drawn for a step."""

    def __init__(self, device: str, adapters: bool, policy: Any):
        super().__init__()
        from diffusers import UNet2DConditionModel

        levels = {
            "block_out_channels": [32, 64],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "attention_head_dim": [2, 4],
            "transformer_layers_per_block": [1, 1],
            "layers_per_block": 1,
        }
        torch.manual_seed(0)
        self.unet: Any = UNet2DConditionModel.from_config({**TINY.read_config("unet"), **levels})
        if adapters:
            add_adapters({"unet": self.unet}, LoraConfig.model_validate({"rank": 4}), seed=5)
        set_checkpointing(self.unet, policy)
        self.to(device)

    def forward(self, step: int) -> torch.Tensor:
        config, make = self.unet.config, {"device": self.unet.device, "dtype": self.unet.dtype}
        generator = torch.Generator().manual_seed(step)
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        conditions = {"text_embeds": torch.ones(2, pooled, **make), "time_ids": torch.ones(2, 6, **make)}
        x_t = torch.randn(2, 4, 8, 12, generator=generator).to(**make)
        hidden = torch.randn(2, 7, config.cross_attention_dim, generator=generator).to(**make)
        times = torch.tensor([3, 700], device=make["device"])
        predicted = self.unet(x_t, times, hidden, added_cond_kwargs=conditions).sample
        return (predicted.float() - 1).square().mean()


def build_engine(
    number: int, device: str = "cpu", name: str = "adamw", adapters: bool = False, **engine: Any
) -> Engine:
    init_ranks()
    settings = {"gradient_release": True, "precision": "bf16_stochastic", "gradient_checkpointing": "full"} | engine
    config = EngineConfig.model_validate({"zero_stage": 0, **settings, "offload_blocks": number})
    net = Net(device, adapters, config.gradient_checkpointing)
    torch.nn.Module.to(net, DTYPES[config.precision])
    trained = [weight for weight in net.parameters() if weight.requires_grad]
    optim = OptimConfig.model_validate({"name": name, "lr": 1e-3})
    optimizer = build_optimizer([{"params": trained, "lr_scale": 1.0}], optim, config)
    return Engine(net, optimizer, config, BatchSizes(2, 2, 1), 0.0, EmaConfig(decays=[0.9]))


def train(engine: Engine, steps: range = range(STEPS)) -> list[float]:
    """Train, with a pass without gradients after each step; return all losses."""
    losses = []
    for step in steps:
        engine.set_lr(1e-3)
        loss = engine(step)
        engine.backward(loss)
        assert engine.step()
        with torch.no_grad(), engine.weights.use_average("0.9"):
            losses += [loss.item(), engine.model(step + 100).item()]
    return losses


def read_values(engine: Engine) -> dict[str, torch.Tensor]:
    """Read all weights, averages and tensors of the optimizer's state by name."""
    names = [name for name, _ in engine.model.named_parameters()]
    values = {name: engine.weights.gather(name) for name in names}
    values |= {f"average {name}": engine.weights.gather(name, "0.9") for name in engine.weights.trained_names}
    for number, weight in enumerate(engine._engine.basic_optimizer.param_groups[0]["params"]):
        state = engine._engine.basic_optimizer.state[weight]
        tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        values |= {f"state {number} {key}": value.cpu() for key, value in tensors.items()}
    return values


def assert_equal(engine: Engine, other: Engine) -> None:
    values, others = read_values(engine), read_values(other)
    assert values.keys() == others.keys()
    assert [name for name in values if not values[name].equal(others[name])] == []


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a GPU, choose kernels whose sums have one order, so that equal work gives equal bits."""
    if not torch.cuda.is_available():
        yield
        return
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.use_deterministic_algorithms(True)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Overwrite a copy on the device as soon as it is freed, because reading it then may be right by chance."""
    leave = Parcel.leave

    def spoil(parcel: Parcel) -> None:
        copy = parcel._copy
        leave(parcel)
        if copy is not None and copy.device.type == "cpu":
            copy.fill_(255)  # as numbers: not a number

    monkeypatch.setattr(Parcel, "leave", spoil)


@pytest.fixture
def travelling_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the state of these small blocks travel, as that of large ones does."""
    monkeypatch.setattr(block_offload, "MIN_TRAVELLING_BYTES", 0)


CASES: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "AdamW, fp32": {"precision": "fp32"},
    "AdamW, Kahan": {"precision": "bf16_kahan"},
    "Adafactor": {"name": "adafactor"},
    "adapters": {"adapters": True, "gradient_release": False, "precision": "bf16", "zero_stage": 1},
    "adapters, released": {"adapters": True},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
@pytest.mark.usefixtures("spoiled", "travelling_state")
def test_nothing_changes_by_a_bit(settings: dict, device: str) -> None:
    plain, offloaded = (build_engine(number, device, **settings) for number in (0, NUM_BLOCKS - 1))
    losses = train(plain)
    assert train(offloaded) == losses and len(set(losses)) == 2 * STEPS
    assert_equal(offloaded, plain)
    assert offloaded.grad_norm() == plain.grad_norm()


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("travelling_state")
def test_checkpoints_are_those_of_a_run_without(name: str, device: str, tmp_path: Path) -> None:
    whole = build_engine(0, device, name)
    expected = train(whole)
    checkpoints = []
    for number in (0, NUM_BLOCKS):
        first = build_engine(number, device, name)
        assert train(first, range(1)) == expected[:2]
        writer = CheckpointWriter(folder=tmp_path / str(number), rank=0, world_size=1, token="t", keep_last=1)
        writer.save(first, TrainState(step=1, world_size=1))
        writer.wait()
        checkpoints.append(tmp_path / str(number) / "step-00000001")
    for number, checkpoint in zip((NUM_BLOCKS, 0), checkpoints, strict=True):
        resumed = build_engine(number, device, name)
        resumed.load_state(checkpoint)
        assert train(resumed, range(1, STEPS)) == expected[2:]
        assert_equal(resumed, whole)


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    plain, offloaded = build_engine(0), build_engine(NUM_BLOCKS)
    for engine in (plain, offloaded):
        train(engine, range(1))
        engine.backward(engine(1) * torch.nan)
        assert not engine.step()
        train(engine, range(1, 2))
    assert_equal(offloaded, plain)


def follow(monkeypatch: pytest.MonkeyPatch, engine: Engine, calls: list[str], note: Callable[[], None]) -> None:
    """Note the starts (`+3`) and arrivals (`3`) of the blocks' weights, numbered by their order in a forward pass."""
    offload: Any = engine._offload
    numbers = {id(offload._weights[block]): number for number, block in enumerate(offload._order)}
    for method, sign in (("start", "+"), ("arrive", "")):
        original = getattr(Parcel, method)

        def call(parcel: Parcel, *inputs: Any, original: Any = original, sign: str = sign) -> None:
            if id(parcel) in numbers:
                calls.append(f"{sign}{numbers[id(parcel)]}")
            original(parcel, *inputs)
            note()

        monkeypatch.setattr(Parcel, method, call)


@pytest.mark.usefixtures("travelling_state")
def test_copies_run_ahead_and_two_blocks_visit_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, calls, present = build_engine(4), [], []
    train(engine, range(1))
    offload: Any = engine._offload
    homes = [weight.data_ptr() for weight in engine.model.parameters()]
    parcels = [*offload._weights.values(), *offload._states.values()]
    follow(monkeypatch, engine, calls, lambda: present.append(sum(parcel._copy is not None for parcel in parcels)))
    loss = engine(1)
    assert calls == "+0 0 +1 1 +2 2 +3 3 +3".split(), "the last block is the first of the backward pass"
    assert max(present) == 2 and homes == [weight.data_ptr() for weight in engine.model.parameters()]
    calls.clear()
    engine.backward(loss)
    assert calls == "3 +2 2 +1 1 +0 0".split() and max(present) == 4  # weights and state of two
    assert homes == [weight.data_ptr() for weight in engine.model.parameters()]
    assert engine.step()
    calls.clear()
    with torch.no_grad():
        engine.model(1)
    assert calls == "+0 0 +1 1 +2 2 +3 3".split()
    assert not any(parcel._copy is not None for parcel in parcels)


@pytest.mark.usefixtures("travelling_state")
def test_state_travels_with_its_block() -> None:
    """The moments in the buffer are those of the optimizer, and change there."""
    engine = build_engine(NUM_BLOCKS)
    train(engine, range(1))
    offload: Any = engine._offload
    state = engine._engine.basic_optimizer.state
    blocks = list_repeated_blocks(engine.model.unet)
    moments = [
        value
        for block in blocks
        for weight in block.parameters()
        for value in state[weight].values()
        if isinstance(value, torch.Tensor) and value.numel() >= 1024
    ]
    buffers = {parcel._host.untyped_storage().data_ptr() for parcel in offload._states.values()}
    assert len(buffers) == NUM_BLOCKS and len(moments) > NUM_BLOCKS
    assert {moment.untyped_storage().data_ptr() for moment in moments} == buffers
    before = [moment.clone() for moment in moments]
    train(engine, range(1, 2))
    assert not any(moment.equal(old) for moment, old in zip(moments, before, strict=True))
    assert {moment.untyped_storage().data_ptr() for moment in moments} == buffers


def test_a_save_beside_a_forward_pass_reads_no_copy_that_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emergency's stream does not wait for the copies of visiting blocks."""
    engine, saved = build_engine(NUM_BLOCKS), []
    train(engine, range(1))
    expected = {name: engine.weights.gather(name).to(engine.dtype) for name in engine.weights.trained_names}
    arrive = Parcel.arrive

    def save_before_the_copy_is_made(parcel: Parcel) -> None:
        arrive(parcel)
        assert parcel._copy is not None
        made = parcel._copy.clone()
        parcel._copy.fill_(255)
        saved.append((engine.capture_state(alone=True), {**engine.read_local_module()}))
        parcel._copy.copy_(made)

    monkeypatch.setattr(Parcel, "arrive", save_before_the_copy_is_made)
    engine(1)
    assert len(saved) == NUM_BLOCKS
    for files, own in saved:
        (module,) = (content["module"] for content in files.values() if "module" in content)
        for state in (module, own):
            assert [name for name, weight in expected.items() if not state[name].equal(weight)] == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("spoiled")
def test_a_small_state_stays_on_the_device(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """With a limit between those of the blocks, as Adafactor has with SDXL."""
    plain, offloaded = build_engine(0, device), build_engine(NUM_BLOCKS, device)
    sizes = [2 * 2 * size.trained for size in measure_blocks(offloaded.model.unet)]
    monkeypatch.setattr(block_offload, "MIN_TRAVELLING_BYTES", sorted(sizes)[NUM_BLOCKS // 2])
    assert train(offloaded) == train(plain)
    assert_equal(offloaded, plain)
    offload: Any = offloaded._offload
    state = offloaded._engine.basic_optimizer.state
    num_travelling = len(offload._states)
    assert 0 < num_travelling < NUM_BLOCKS
    for block in list_repeated_blocks(offloaded.model.unet):
        moments = [value for weight in block.parameters() for value in state[weight].values() if torch.is_tensor(value)]
        large = [moment for moment in moments if moment.numel() >= block_offload.MIN_TRAVELLING_VALUES]
        assert all(moment.device.type == ("cpu" if block in offload._states else device) for moment in large)


@NEEDS_GPU
def test_the_gpu_holds_two_blocks_and_the_host_locks_the_rest() -> None:
    engine = build_engine(NUM_BLOCKS, "cuda")
    train(engine, range(1))
    offload: Any = engine._offload
    blocks = list_repeated_blocks(engine.model.unet)
    assert all(weight.device.type == "cpu" for block in blocks for weight in block.parameters())
    large = [parcel._host for parcel in offload._weights.values() if parcel._host.nbytes >= 2**20]
    assert all(host.is_pinned() for host in large)


def test_blocks_that_may_wait_are_those_that_checkpointing_runs() -> None:
    net, repeated = Net("cpu", False, "off"), []

    def run(block: Any, *inputs: Any) -> Any:
        repeated.append(block)
        return block(*inputs)

    set_checkpointing(net.unet, "full", run)
    net(0)
    assert {id(block) for block in repeated} == {id(block) for block in list_repeated_blocks(net.unet)}
    assert len(repeated) == NUM_BLOCKS == len(list_blocks(net.unet)) - 1


def test_the_largest_blocks_are_chosen_and_equal_ones_apart() -> None:
    net = Net("cpu", False, "full")
    sizes = [sum(size) for size in measure_blocks(net.unet)]
    assert len(sizes) == NUM_BLOCKS and sizes == sorted(sizes, reverse=True)
    for number in range(1, NUM_BLOCKS + 1):
        chosen = choose_offloaded_blocks(net.unet, number)
        assert len(set(chosen)) == number
        assert sorted((sum(measure_block(block)) for block in chosen), reverse=True) == sizes[:number]
    with pytest.raises(UserInputError, match="(?s)is more than the 11 blocks that can wait on the host.*at most 11"):
        choose_offloaded_blocks(net.unet, NUM_BLOCKS + 1)
    equal = Equal()
    assert [list(equal.blocks).index(block) for block in choose_offloaded_blocks(equal, 3)] == [0, 2, 5]


class Equal(torch.nn.Module):
    """Eight equal blocks, and one that is not repeated."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers.models.resnet import ResnetBlock2D

        blocks = [ResnetBlock2D(in_channels=32, temb_channels=8, groups=8) for _ in range(9)]
        self.blocks: Any = torch.nn.ModuleList(blocks[:-1])
        self.mid_block = torch.nn.Module()
        self.mid_block.resnets = torch.nn.ModuleList(blocks[-1:])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"zero_stage": 3}, "leave engine.offload_blocks out"),
        ({"offload_optimizer": True, "offload_param": True}, "leave engine.offload_blocks out"),
        ({"gradient_checkpointing": "selective"}, "set engine.gradient_checkpointing: full"),
        ({"compile": "regional"}, "set that to none"),
    ],
)
def test_settings_that_contradict_it(settings: dict, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        EngineConfig.model_validate({"offload_blocks": 5, **settings})


def test_weights_that_deepspeed_trains_stay() -> None:
    def list_rules(*words: str) -> list[str]:
        config, problems = build_config({}, [*words, f"model.path={TINY.folder}"])
        assert problems == []
        return [problem.cure for problem in check_model_settings(config) if problem.key == "engine.offload_blocks"]

    assert list_rules("engine.offload_blocks=5")[0].startswith("set engine.gradient_release: true, train adapters")
    assert list_rules("engine.offload_blocks=5", "lora.rank=4") == list_rules() == []


def test_the_hook_of_a_block_is_that_of_its_weights() -> None:
    """Without a frozen weight in a block, DeepSpeed's engine moves nothing."""
    net = Net("cpu", False, "full")
    offload: Any = BlockOffload(net.unet, list_blocks(net.unet), torch.device("cpu"), None)
    assert offload._weights == {}
