"""Every patch finds what it changes: these tests fail when DeepSpeed or torch alter the parts that patches.py uses."""

# ruff: noqa: TID251 (the tests look into DeepSpeed itself)

import inspect
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from deepspeed.accelerator import cuda_accelerator
from deepspeed.comm.torch import TorchBackend
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.launch.distributed import init_ranks
from sdxl_trainer.train.engine import patches
from sdxl_trainer.train.engine.deepspeed_config import BatchSizes
from sdxl_trainer.train.engine.engine import Engine
from sdxl_trainer.train.engine.quantised import WRAPPED
from sdxl_trainer.train.engine.saved_state import build_shard


def build_engine(stage: int, precision: str = "fp32", **settings: str) -> Engine:
    init_ranks()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    config = EngineConfig(zero_stage=stage, precision=precision, **settings)  # pyright: ignore
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    return Engine(net, optimizer, config, BatchSizes(2, 2, 1), max_grad_norm=0.5)


def list_arguments(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # pyright: ignore


def get_source(function: object) -> str:
    return inspect.getsource(function)  # pyright: ignore


def test_the_versions_that_the_patches_were_written_for():
    """If this fails after an upgrade, check every reason in patches.py, then change the versions there and here."""
    assert version("deepspeed") == "0.19.8" and version("torch").split("+")[0] == "2.13.0"
    assert patches.__doc__ and "deepspeed 0.19.8 and torch 2.13.0" in patches.__doc__


def test_operators_are_probed_through_the_module_attribute():
    from deepspeed import ops
    from deepspeed.comm.torch import build_shm_op

    assert "__compatible_ops__" in get_source(ops.__getattr__)
    assert "deepspeed.ops.__compatible_ops__.get" in get_source(build_shm_op)
    if not torch.cuda.is_available():
        assert ops.__compatible_ops__ == {} and build_shm_op() is None  # pyright: ignore


def test_deepspeed_binds_a_device_by_the_rule_of_init_ranks():
    source = get_source(TorchBackend.init_process_group)
    assert "known_world_size(world_size) != 1" in source
    assert 'version.parse("2.6.0") < version.parse(torch.__version__) < version.parse("2.7.1")' in source


@pytest.mark.parametrize(("visible", "is_used"), [("GPU-5ebe,MIG-41b3", False), ("1, 0", True), ("", True)])
def test_nvml_is_asked_only_if_gpus_are_named_by_numbers(monkeypatch, visible: str, is_used: bool):
    assert 'map(int, os.environ.get("CUDA_VISIBLE_DEVICES"' in get_source(cuda_accelerator.CUDA_Accelerator)
    assert "if pynvml:" in get_source(cuda_accelerator.CUDA_Accelerator.available_memory)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = object()
    monkeypatch.setattr(cuda_accelerator, "pynvml", nvml)
    patches.ignore_nvml()
    assert cuda_accelerator.pynvml is (nvml if is_used else None)


def test_muon_kernels_are_decorated_by_the_patched_function_and_still_compute():
    """The code runs in a new process, because another test may have loaded the compiler."""
    code = (
        "from sdxl_trainer.train.engine import patches\n"
        "import sys, torch\n"
        "from deepspeed.runtime.zero.muon import original_muon\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "function = original_muon.zeropower_via_newtonschulz5\n"
        "assert function.__module__ == original_muon.__name__ and function.__wrapped__\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    compiled = patches.compile_at_first_call(lambda number: number + 1)
    with torch.compiler.set_stance("force_eager"):
        assert compiled(1) == 2


def test_collectives_that_deepspeed_calls_are_still_deprecated():
    source = get_source(DeepSpeedZeroOptimizer) + get_source(TorchBackend)
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        assert name in source and "deprecated" in getattr(torch.distributed, name).__deprecated__


def test_the_engine_reads_norm_and_overflow_of_a_plain_optimizer():
    source = get_source(DeepSpeedEngine._take_model_step)
    assert "self.optimizer._global_grad_norm" in source and "self.optimizer.overflow" in source
    assert "self.gradient_clipping() > 0.0" in source
    engine = build_engine(0)
    before = engine.weights.gather("0.weight")
    engine.backward(engine(torch.full((2, 3), torch.nan)).sum())
    assert not engine.step() and engine.grad_norm() != engine.grad_norm()
    assert engine.weights.gather("0.weight").equal(before)


def test_a_single_rank_skips_the_average_of_gradients():
    source = get_source(DeepSpeedEngine)
    assert "if self.enable_backward_allreduce and not self.inside_no_sync_ctxt:" in source
    assert "enable_backward_allreduce" in vars(build_engine(0)._engine)


def test_zero_grad_is_called_by_the_engine_and_replaced():
    assert "self.zero_grad()" in get_source(DeepSpeedEngine._take_model_step)
    assert list_arguments(DeepSpeedEngine.zero_grad) == ["self"]
    engine = build_engine(0)
    engine.backward(engine(torch.ones(2, 3)).sum())
    engine.step()
    assert all(weight.grad is None for weight in engine.model.parameters())


def test_zero_1_in_bf16_with_sums_in_fp32_has_the_optimizer_of_zero_2():
    wrapped = DeepSpeedEngine._do_optimizer_sanity_check.__wrapped__  # pyright: ignore
    assert "grad_accum_dtype == torch.float32 and self.zero_optimization_stage(\n            ) == 1" in get_source(
        wrapped
    )
    assert "optimizer_wrapper == ZERO_OPTIMIZATION" in get_source(DeepSpeedEngine._configure_optimizer)
    engine = build_engine(1, "bf16", accumulation_dtype="fp32")._engine
    assert type(engine.optimizer) is DeepSpeedZeroOptimizer and engine.optimizer.use_grad_accum_attribute


def test_overflow_is_scanned_by_the_replaced_method_and_by_the_norm():
    assert list_arguments(DeepSpeedZeroOptimizer.check_overflow) == ["self", "partition_gradients"]
    source = get_source(DeepSpeedZeroOptimizer.step)
    assert "self.check_overflow(partition_gradients=self.partition_gradients)" in source
    assert "is_invalid_grad_norm(scaled_global_grad_norm)" in source
    assert "compute_grad_norm" in vars(build_engine(2)._engine.optimizer)


def test_gradients_of_masters_are_allocated_at_the_start_only_to_stay():
    assert "self.initialize_optimizer_states()" in get_source(DeepSpeedZeroOptimizer.__init__)
    assert list_arguments(DeepSpeedZeroOptimizer.initialize_optimizer_states) == ["self"]
    # The replaced method, which the patch keeps in its closure.
    (replaced,) = inspect.getclosurevars(DeepSpeedZeroOptimizer.initialize_optimizer_states).nonlocals.values()
    source = " ".join(get_source(replaced).split())
    assert "self.single_partition_of_fp32_groups[i].grad = " in source
    assert "if not self.cpu_offload: for group in self.single_partition_of_fp32_groups: group.grad = None" in source
    optimizer = build_engine(2)._engine.optimizer
    assert all(master.grad is None for master in optimizer.single_partition_of_fp32_groups)


def test_fragment_offsets_cover_every_parameter():
    for stage in (1, 2):
        engine = build_engine(stage)
        found = [patches.read_fragment_offsets(weight) for weight in engine.model.parameters()]
        assert [(offsets.start, offsets.numel) for offsets in found if offsets] == [(0, 12), (0, 4), (0, 8), (0, 2)]
        assert sorted(offsets.offset for offsets in found if offsets) == [0, 12, 16, 24]


def test_state_files_are_built_without_collectives_and_named_as_by_deepspeed(tmp_path, monkeypatch):
    """The files equal those of the public `save_checkpoint`, which needs all ranks."""
    assert list_arguments(DeepSpeedEngine._save_checkpoint) == [
        *("self", "save_dir", "tag", "client_state", "exclude_frozen_parameters"),
    ]
    assert list_arguments(DeepSpeedEngine._get_zero_ckpt_name) == ["self", "checkpoints_path", "tag"]
    assert "optimizer_state_dict=self.optimizer.state_dict(), ds_config=self.config, ds_version=version" in get_source(
        DeepSpeedEngine._save_zero_checkpoint
    )
    as_it_is = patches.StateCopies(lambda content: content, lambda content: content)
    for stage, precision in ((0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")):
        engine = build_engine(stage, precision)._engine
        folder = tmp_path / f"{stage}"
        engine.save_checkpoint(str(folder), tag="tag", save_latest=False)
        monkeypatch.chdir(tmp_path)
        made = patches.collect_state_files(engine, "tag", {}, as_it_is, with_module=False)
        assert sorted(made) == sorted(str(path.relative_to(folder)) for path in folder.rglob("*.pt"))
        for name, content in made.items():
            written = torch.load(folder / name, weights_only=False)
            assert written.keys() == content.keys(), name
        assert engine.checkpoint_engine.__class__.__name__ == "TorchCheckpointEngine"
    assert list(tmp_path.glob("*.py")) == [], "no script is copied into the working directory"


@pytest.mark.parametrize(
    ("stage", "precision", "kind"),
    [
        *((0, "fp32", "param_groups"), (0, "bf16", "fp32_groups")),
        *((1, "fp32", "single_partition_of_fp32_groups"), (2, "bf16", "single_partition_of_fp32_groups")),
        *((3, "fp32", "fp32_partitioned_groups_flat"), (3, "bf16", "fp32_partitioned_groups_flat")),
    ],
)
def test_master_weights_are_kept_where_the_layout_looks(stage: int, precision: str, kind: str):
    engine = build_engine(stage, precision)
    assert patches.read_master_weights(engine._engine.optimizer).kind == kind
    assert sum(master.numel() for master in engine.weights.list_masters()) >= 12 + 4 + 8 + 2


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_masters_are_counted_by_group_and_as_in_the_file(stage: int):
    init_ranks()
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW([{"params": net[0].parameters()}, {"params": [net[1].weight]}], lr=0.1)
    net[1].bias.requires_grad_(False)
    settings = {"zero_optimization": {"sub_group_size": 1}}  # ZeRO 3 makes a tensor of each parameter
    config = EngineConfig(zero_stage=stage, precision="fp32", deepspeed=settings)  # pyright: ignore
    engine = Engine(net, optimizer, config, BatchSizes(2, 2, 1), max_grad_norm=0.5)
    expected = [1, 1] if stage in (1, 2) else [2, 1]
    assert patches.count_group_masters(engine._engine.optimizer) == expected
    assert build_shard(engine.weights.layout, engine.capture_state()).count_group_masters() == expected


def test_the_loss_scale_is_a_property_of_every_sharded_optimizer():
    for kind in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        assert isinstance(kind.loss_scale, property)


def test_gathers_of_zero_3_are_kept_where_they_are_abandoned():
    engine = build_engine(3)._engine
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    weight = next(engine.module.parameters())
    weight.ds_status = ZeroParamStatus.INFLIGHT
    coordinator._PartitionedParameterCoordinator__inflight_param_registry[weight] = None  # waiting for it would raise
    patches.abandon_gathers(engine)
    engine.optimizer.checkpoint_event_prologue()
    assert weight.ds_status == ZeroParamStatus.NOT_AVAILABLE


def test_averages_are_moved_by_torch_in_place():
    average, weight = [torch.zeros(3)], [torch.ones(3)]
    get_ema_multi_avg_fn(0.75)(average, weight, 1)
    assert average[0].tolist() == [0.25] * 3


def test_bitsandbytes_still_wraps_its_state_under_the_known_key():
    optimizer = pytest.importorskip("bitsandbytes.optim.optimizer")
    assert WRAPPED in inspect.getsource(optimizer)
