"""Gradient checkpointing that is chosen by memory: logged, kept by a resume, and without effect on the losses."""

import shutil
from pathlib import Path

import numpy as np
import orjson
import pytest
from programs import read_losses, run_program

from sdxl_trainer.configs.load import build_config, load_config
from sdxl_trainer.launch import machine
from sdxl_trainer.train.checkpoint.resume import is_harmless
from sdxl_trainer.train.run import memory_plan
from sdxl_trainer.train.run.build import build_run
from sdxl_trainer.train.run.job import set_up


def test_full_checkpointing_is_kept_by_a_resume_and_has_the_same_losses(one_rank: Path, cached_folder: Path) -> None:
    assert is_harmless("engine.gradient_checkpointing")
    state = orjson.loads((one_rank / "checkpoints" / "step-00000004" / "trainer_state.json").read_bytes())
    assert state["gradient_checkpointing"] == "off"  # `auto` on a host with room for the tiny model
    log = (one_rank / "logs" / "train.log").read_text()
    assert "engine.gradient_checkpointing: off, because a rank needs " in log and "largest micro batch" in log
    assert "starting DeepSpeed on 1 rank\n" in log and "estimating the memory of a rank\n" in log
    part = cached_folder / "runs" / "checkpointed"
    shutil.copytree(one_rank / "checkpoints" / "step-00000004", part / "checkpoints" / "step-00000004")
    words = ["run.name=checkpointed", "train.max_steps=6", "sample.prompts=[]", "checkpoint.every_steps=1"]
    cfg = ("train/main.py", "--cfg", cached_folder / "tiny.yaml")
    run_program(*cfg, *words, "engine.gradient_checkpointing=full")
    np.testing.assert_allclose(read_losses(part), read_losses(one_rank)[4:6], rtol=0, atol=1e-6)
    config, problems = load_config(cached_folder / "tiny.yaml", [*words, "train.max_steps=7"])
    run, batches = build_run(*set_up(config, problems))
    assert run.config.engine.gradient_checkpointing == "full" and run.state.gradient_checkpointing == "full"
    assert run.engine.model.unet.is_gradient_checkpointing
    del batches


def test_host_memory_is_that_of_the_machine_or_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = machine.read_host_memory_bytes()
    assert whole is not None and whole > 1 << 30
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "CGROUP_LIMITS", (tmp_path / "absent", limit))
    for text, expected in (("max\n", None), (f"{1 << 20}\n", 1 << 20)):
        limit.write_text(text)
        found = machine.read_host_memory_bytes()
        assert found is not None and (found == expected or (expected is None and found >= whole))
    assert memory_plan.read_rank_memory(memory_plan.torch.device("cpu")).host == 1 << 20


def test_shared_memory_that_is_too_small_for_the_workers_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = build_config({"data": {"num_workers": 8}, "train": {"micro_batch_size": 8}})
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    free = 64 << 20  # docker's default
    monkeypatch.setattr(memory_plan.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))
    assert list(memory_plan.check_shared_memory(config, 4)) == [], "8 workers x 4 x 8 x 256 KiB are 67 MB"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    [problem] = memory_plan.check_shared_memory(config, 4)
    assert problem.key == "data.num_workers" and "need about 134 MB" in problem.rule and "has 67" in problem.rule
    none = config.model_copy(update={"data": config.data.model_copy(update={"num_workers": 0})})
    assert list(memory_plan.check_shared_memory(none, 4)) == []
