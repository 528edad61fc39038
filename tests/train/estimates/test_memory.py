"""The memory estimate: bytes of a weight, a live engine's tensors, SDXL's lines, and what follows from them."""

import gc
from dataclasses import replace

import pytest
import torch

from sdxl_trainer.configs.engine import CHECKPOINTING
from sdxl_trainer.configs.load import build_config
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.launch.distributed import init_ranks
from sdxl_trainer.train.engine.deepspeed_config import BatchSizes, resolve_zero_stage
from sdxl_trainer.train.engine.engine import Engine
from sdxl_trainer.train.estimates.memory import estimate_memory, round_pinned
from sdxl_trainer.train.estimates.memory_choice import list_savings, plan_memory
from sdxl_trainer.train.estimates.memory_table import PHASES, MemoryLimits, MemoryTable
from sdxl_trainer.train.estimates.networks import Activations, NetworkSizes
from sdxl_trainer.train.networks.blocks import BlockSize
from sdxl_trainer.train.optim.optimizers import build_optimizer
from sdxl_trainer.train.run.memory_plan import RankMemory, check_device, check_room, find_smallest

GIB = 1 << 30
CPU = MemoryLimits(device=None, host=None)
NO_ACTIVATIONS = Activations(kept=0, recomputed=0)
# As test_networks.py finds them.
SDXL = NetworkSizes(
    shapes=((4, 382_063),) * 1680,
    frozen=0,
    frozen_encoders=817_720_320,
    vae=83_653_863,
    bucket=Size(1024, 1024),
    activations={
        "off": Activations(kept=6_888_906_624, recomputed=0),
        "selective": Activations(kept=4_697_405_952, recomputed=94_371_968),
        "full": Activations(kept=587_672_448, recomputed=147_739_136),
    },
    generation=3_222_011_904,
)


def build(*words: str, ranks: int = 1) -> Config:
    """Settings with stage and checkpointing chosen; one micro step on each rank unless the words say otherwise."""
    batch = f"train.global_batch_size={ranks}"
    config, problems = build_config({}, ["engine.gradient_checkpointing=off", batch, *words])
    assert problems == []
    return resolve_zero_stage(config, ranks)[0]


def build_sizes(*trained: int) -> NetworkSizes:
    return NetworkSizes(
        shapes=tuple((numel,) for numel in trained),
        frozen=0,
        frozen_encoders=0,
        vae=0,
        bucket=Size(64, 64),
        activations=dict.fromkeys(CHECKPOINTING, NO_ACTIVATIONS),
        generation=0,
    )


def get_line(table: MemoryTable, component: str) -> tuple[float, float]:
    """Bytes on the device and on the host."""
    line = next((line for line in table.lines if line.component.startswith(component)), None)
    return (line.device, line.host) if line else (0, 0)


@pytest.mark.parametrize(
    ("words", "ranks", "weights", "gradients", "state"),
    [
        ("", 1, 2, 2, 12),  # bf16: weight, gradient, and master with two moments
        ("train.global_batch_size=2", 1, 2, 4, 12),  # what is added up is added in fp32
        ("", 4, 2, 1, 3),
        ("engine.zero_stage=1", 4, 2, 4, 3),
        ("engine.zero_stage=3", 4, 0.5, 1, 3),
        ("engine.zero_stage=3 engine.accumulation_dtype=bf16", 4, 0.5, 0.5, 3),
        ("engine.precision=bf16_stochastic", 1, 2, 2, 6),
        ("engine.precision=bf16_kahan", 1, 2, 2, 8),
        ("engine.precision=fp32", 1, 4, 4, 8),
        ("engine.precision=fp32", 2, 4, 2, 6),  # ZeRO keeps separate masters in fp32 too
        ("optim.name=adamw8bit", 1, 2, 2, 12),  # moments of less than 4096 values are in fp32
        ("engine.precision=bf16_stochastic engine.gradient_release=true optim.max_grad_norm=0", 1, 2, 1.2, 4),
        ("engine.precision=bf16_kahan engine.gradient_release=true optim.max_grad_norm=0", 1, 2, 1.2, 6),
        ("ema.decays=[0.9,0.99]", 2, 2, 2, 10),
        ("ema.decays=[0.9] ema.lengths=[0.05,0.1]", 2, 2, 2, 12),
    ],
)
def test_bytes_of_a_weight(words: str, ranks: int, weights: float, gradients: float, state: float) -> None:
    table = estimate_memory(build(*words.split(), ranks=ranks), build_sizes(600, 400), ranks, CPU)
    found = [get_line(table, name)[0] / 1000 for name in ("trained weights", "gradients")]
    assert found == [weights, gradients]
    names = ("master weights", "moments of the optimizer", "moving averages")
    assert sum(get_line(table, name)[0] for name in names) / 1000 == state


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_live_engine_holds_what_is_estimated(stage: int, precision: str) -> None:
    """Weights, masters, moments and averages between two steps, to the byte; 64 x 64 weights need no padding."""
    init_ranks()
    averages = ("ema.decays=[0.5]", "ema.lengths=[0.1]")
    config = build(f"engine.zero_stage={stage}", f"engine.precision={precision}", *averages)
    gc.collect()
    before = list_storages()  # kept, because the id of one that is gone may be used again
    net = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(2)))
    groups = [{"params": list(net.parameters()), "lr": 0.1, "lr_scale": 1.0}]
    optimizer = build_optimizer(groups, OptimConfig(), config.engine)
    engine = Engine(net, optimizer, config.engine, BatchSizes(2, 2, 1), 0.0, config.ema)
    engine.backward(engine(torch.ones(2, 64, dtype=engine.dtype)).float().square().mean())
    engine.step()
    gc.collect()
    known = {id(storage) for storage in before}
    made = [storage.nbytes() for storage in list_storages() if id(storage) not in known]
    held = sum(num_bytes for num_bytes in made if num_bytes > 64)  # less are counters
    table = estimate_memory(config, build_sizes(4096, 4096), 1, CPU)
    names = ["trained weights", "master weights", "moments of the optimizer", "moving averages"]
    # ZeRO 3 keeps gradients, and the buffer to send them, which is larger than these.
    names += ["gradients", "buffers of gradients to send"] if stage == 3 else []
    assert held == sum(get_line(table, name)[0] for name in names), sorted(made)
    del engine, optimizer, net


def list_storages() -> list[torch.UntypedStorage]:
    """Storages of all live tensors of this process, each once; DeepSpeed's copies on the meta device take no memory."""
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor) and not item.is_meta]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return list({id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in tensors}.values())


def test_an_update_copies_the_gradients_of_one_group() -> None:
    config = build()
    whole, pieces = (estimate_memory(config, SDXL, 1, CPU, limit) for limit in (1 << 40, 1 << 28))
    assert get_line(whole, "copies in an update")[0] / SDXL.num_trained == pytest.approx(6)
    assert get_line(pieces, "copies in an update")[0] / SDXL.num_trained == pytest.approx(0.6, abs=0.01)
    sharded = estimate_memory(build("engine.accumulation_dtype=bf16", ranks=2), SDXL, 2, CPU, 1 << 40)
    assert get_line(sharded, "copies in an update")[0] / SDXL.num_trained == pytest.approx(3)
    assert get_line(estimate_memory(build(ranks=2), SDXL, 2, CPU, 1 << 40), "copies in an update")[0] == 0


@pytest.mark.parametrize(
    ("stage", "one_step", "four_steps", "two_ranks"),
    [(0, 18.4, 18.4, None), (1, 16.6, None, None), (2, 16.6, 18.1, 10.6), (3, 16.6, 18.4, None)],
)
def test_an_update_takes_what_was_counted(stage: int, one_step: float, four_steps: float, two_ranks: float) -> None:
    """Bytes a weight of benchmarks/gradients.py, in docs/PRECISION.md, without its buckets of some 0.4."""
    sizes = replace(SDXL, frozen_encoders=0, generation=0)
    for words, ranks, counted in ((1, 1, one_step), (4, 1, four_steps), (8, 2, two_ranks)):
        if counted is not None:
            config = build(f"train.global_batch_size={words}", f"engine.zero_stage={stage}", ranks=ranks)
            table = estimate_memory(config, sizes, ranks, MemoryLimits(device=80 * GIB, host=None))
            buffers = get_line(table, "buffers")[0] if stage == 3 else 0
            found = (table.sum_device("weight update") - 0.8e9 - buffers) / sizes.num_trained
            assert counted - 0.7 <= found <= counted + 0.1, (words, ranks)


def test_sdxl_on_a_gpu() -> None:
    """Each phase has a peak of its own, and the largest micro batch is the last that leaves room."""
    gpu = MemoryLimits(device=80 * GIB, host=500 * GIB)
    table = estimate_memory(build("train.micro_batch_size=4", "train.global_batch_size=4"), SDXL, 1, gpu)
    fixed = 14 * SDXL.num_trained + 2 * SDXL.frozen_encoders + 0.8e9
    assert table.sum_device("forward pass") == pytest.approx(fixed + 4 * 6.889e9, rel=1e-4)
    assert table.sum_device("backward pass") == pytest.approx(fixed + 2 * SDXL.num_trained + 0.1e9, rel=1e-3)
    assert table.sum_device("weight update") == pytest.approx(fixed + 2.6 * SDXL.num_trained, rel=1e-2)
    assert table.sum_device("image generation") == pytest.approx(fixed + 4 * 83_653_863 + 3.222e9, rel=1e-4)
    assert table.peak_phase == "forward pass" and table.fits_device
    assert table.find_largest_micro_batch() == 5
    assert table.describe()["largest micro batch"] == "5 (train.micro_batch_size is 4)"
    full = estimate_memory(build("engine.gradient_checkpointing=full"), SDXL, 1, gpu)
    largest = full.find_largest_micro_batch()
    assert largest is not None
    for size, fits in ((largest, True), (largest + 1, False)):
        peak = max(full.sum_device(phase, micro_batch_size=size) for phase in PHASES)
        assert (peak <= 0.92 * 80 * GIB) == fits
    # Gradients of earlier micro steps lie beside the activations.
    summed = estimate_memory(build("train.global_batch_size=4"), SDXL, 1, gpu)
    assert summed.sum_device("forward pass") == pytest.approx(fixed + 6.889e9 + 4 * SDXL.num_trained, rel=1e-4)


def test_host_memory_under_offload() -> None:
    """105 GB as one group with a copy for checkpoints, by the reference; pieces of 2^28 values and no copy save 31."""
    gpu, words = MemoryLimits(device=24 * GIB, host=48 * GIB), ["engine.offload_optimizer=true"]
    words += ["engine.accumulation_dtype=bf16"]  # in fp32 the sum would be on the GPU
    config = build(*words, "train.global_batch_size=16", "engine.gradient_checkpointing=full")
    one_group = estimate_memory(config, SDXL, 1, gpu, 1 << 40)
    copied = one_group.host_peak - 3e9 + 12 * SDXL.num_trained
    assert copied == pytest.approx(105e9, rel=0.05)
    table = estimate_memory(config, SDXL, 1, gpu)
    assert get_line(table, "master weights") == (0, 10 * GIB)  # ten groups, each pinned in a GiB
    assert get_line(table, "moments") == (0, 8 * SDXL.num_trained)
    assert get_line(table, "copy of the weights for a") == (0, 2 * SDXL.num_trained)
    assert get_line(table, "copy of the optimizer") == (0, 0)
    assert table.host_peak < one_group.host_peak - 10e9 and not table.fits_host
    rules = [problem.rule for problem in check_room(table, "")]
    assert len(rules) == 1 and "of host memory are needed" in rules[0] and "51.5 GB" in rules[0]
    assert round_pinned(3.0, is_pinned=True) == 4 and round_pinned(3.0, is_pinned=False) == 3


def test_offloaded_blocks_leave_two_visitors_on_the_gpu() -> None:
    """Adapters leave their frozen weights on the host alone, gradient release all of a block, with its state."""
    gpu = MemoryLimits(device=12 * GIB, host=None)
    release = ["engine.gradient_release=true", "engine.precision=bf16_stochastic", "ema.decays=[0.9]"]
    sizes = replace(SDXL, blocks=(BlockSize(50_000_000, 1_000_000), *[BlockSize(30_000_000, 1_000_000)] * 60))
    config = build("engine.offload_blocks=11", "engine.gradient_checkpointing=full", *release)
    table = estimate_memory(config, sizes, 1, gpu)
    values = 50_000_000 + 10 * 30_000_000
    assert get_line(table, "offloaded blocks") == (0, 2 * (values + 11_000_000))
    assert get_line(table, "visiting blocks") == (2 * 82_000_000, 0)
    assert get_line(table, "trained weights") == (2 * (sizes.num_trained - values), 0)
    assert get_line(table, "moments of the optimizer") == (4 * (sizes.num_trained - values), 4 * values)
    assert get_line(table, "moving averages") == (4 * (sizes.num_trained - values), 4 * values)
    assert get_line(table, "state of visiting blocks") == (4 * 80_000_000, 0)
    sizes = replace(sizes, frozen=100_000_000)
    adapters = build("engine.offload_blocks=11", "engine.gradient_checkpointing=full", "lora.rank=4")
    table = estimate_memory(adapters, sizes, 1, gpu)
    assert get_line(table, "offloaded blocks") == (0, 2 * 11_000_000)
    assert get_line(table, "frozen weights") == (2 * 89_000_000, 0)
    assert get_line(table, "moments of the optimizer") == (8 * sizes.num_trained, 0)
    chosen = plan_memory(build("engine.offload_blocks=1", "engine.gradient_checkpointing=auto", *release), SDXL, 1, gpu)
    assert chosen.config.engine.gradient_checkpointing == "full"
    assert chosen.reason == "full, which engine.offload_blocks needs"


@pytest.mark.parametrize(
    ("words", "has_phase", "keeps_weights"),
    [
        ("", False, False),
        ("validation.share=0.1", True, False),
        ("validation.share=0.1 ema.decays=[0.9]", True, True),
        ("validation.metadata=[a.json] ema.lengths=[0.1]", True, True),
        ("ema.decays=[0.9]", False, False),
    ],
)
def test_validation_of_an_average_puts_the_weights_aside(words: str, has_phase: bool, keeps_weights: bool) -> None:
    gpu = MemoryLimits(device=80 * GIB, host=500 * GIB)
    table = estimate_memory(build(*words.split()), replace(SDXL, generation=0), 1, gpu)
    lines = {line.component: line for line in table.lines if "validation" in line.phases and line.phases != PHASES}
    assert ("activations of a block" in lines) == has_phase
    kept = lines.pop("weights while an average is used", None)
    assert (kept is not None) == keeps_weights
    assert kept is None or (kept.device == 2 * SDXL.num_trained and kept.phases == ("validation",))


def test_ranks_of_a_host_add_up() -> None:
    """All ranks hold their share of the copied optimizer, and rank 0 the copy of the weights."""
    limits = MemoryLimits(device=80 * GIB, host=200 * GIB, ranks_per_host=8)
    table = estimate_memory(build(ranks=8), SDXL, 8, limits)
    assert table.host_peak == pytest.approx(8 * 3e9 + (12 + 2) * SDXL.num_trained)
    assert table.describe()["host, peak"].endswith(" of 215 GB, for 8 ranks on a host")


def test_the_choice_follows_the_memory_of_the_smallest_gpu() -> None:
    config = build("engine.gradient_checkpointing=auto", "train.micro_batch_size=4", "train.global_batch_size=4")
    limits = find_smallest(
        [RankMemory(80 * GIB, 900, "a"), RankMemory(40 * GIB, 700, "a"), RankMemory(80 * GIB, 800, "b")]
    )
    assert limits == MemoryLimits(device=40 * GIB, host=700, ranks_per_host=2)
    for gib, choice in ((141, "off"), (80, "off"), (64, "selective"), (56, "full")):
        planned = plan_memory(config, SDXL, 1, MemoryLimits(device=gib * GIB, host=None))
        assert planned.config.engine.gradient_checkpointing == choice, planned.reason
        needed = "a rank needs 65.9 GB with off, 57.5 GB with selective and 45.1 GB with full, and has "
        assert planned.reason.startswith(f"{choice}, because {needed}"), planned.reason
        assert planned.table.fits_device
    for name in ("off", "none"):  # `none` in checkpoints of earlier versions
        kept = plan_memory(config, SDXL, 1, limits, kept=name)
        assert kept.config.engine.gradient_checkpointing == "off" and not kept.table.fits_device
    on_host = MemoryLimits(device=None, host=120 * GIB, ranks_per_host=2)
    assert plan_memory(config, SDXL, 1, on_host).config.engine.gradient_checkpointing == "full"
    assert plan_memory(config, SDXL, 1, CPU).config.engine.gradient_checkpointing == "off"
    compiled = build("engine.gradient_checkpointing=selective", "engine.compile=regional")
    assert get_line(estimate_memory(compiled, SDXL, 1, CPU), "activations") == (6_888_906_624, 0)
    asked = build("engine.gradient_checkpointing=off")
    assert plan_memory(asked, SDXL, 1, limits) == (asked, estimate_memory(asked, SDXL, 1, limits), "")


def test_a_gpu_that_is_too_small_is_refused_with_what_saves_memory() -> None:
    gpu = MemoryLimits(device=24 * GIB, host=None)
    config = build("ema.decays=[0.9]", "ema.sample=false")
    table = estimate_memory(config, SDXL, 1, gpu)
    problems = list(check_device(table, "x saves 9 GB"))
    assert (
        len(problems) == 1 and "x saves 9 GB; or train adapters" in problems[0].cure and "25.8 GB" in problems[0].rule
    )
    savings = {saving.setting: saving.saved_bytes / 1e9 for saving in list_savings(config, SDXL, 1, gpu)}
    assert list(savings)[0] == "engine.offload_optimizer: true" and savings["ema.decays: []"] == pytest.approx(
        10.3, abs=0.1
    )
    assert savings["engine.precision: bf16_stochastic"] > 15 and savings["cache.text: true"] == pytest.approx(
        1.64, abs=0.01
    )
    assert list(check_device(estimate_memory(config, SDXL, 1, MemoryLimits(device=80 * GIB, host=None)), "")) == []
    stored = build("ema.lengths=[0.05,0.1]", "ema.sample=false")
    savings = {saving.setting: saving.saved_bytes / 1e9 for saving in list_savings(stored, SDXL, 1, gpu)}
    assert savings["ema.lengths: []"] == savings["ema.on_host: true"] == pytest.approx(20.5, abs=0.1)
    released = ["engine.gradient_release=true", "engine.precision=bf16_stochastic", "optim.max_grad_norm=0"]
    config = build(*released, "engine.gradient_checkpointing=full", "sample.prompts=[]", ranks=2)
    settings = [saving.setting for saving in list_savings(config, replace(SDXL, generation=0), 2, gpu)]
    assert settings == ["optim.name: adafactor", "optim.name: adamw8bit", "cache.text: true"]
