"""Gradient checkpointing that is chosen by memory: logged, kept by a resume, and without effect on the losses."""

import shutil
from pathlib import Path

import numpy as np
import orjson
import pytest
from programs import read_losses, run_program

from sdxl_trainer.configs.load import load_config
from sdxl_trainer.launch import machine
from sdxl_trainer.train.checkpoint.resume import is_harmless
from sdxl_trainer.train.run import memory_plan
from sdxl_trainer.train.run.build import build_run
from sdxl_trainer.train.run.job import set_up


def test_full_checkpointing_is_kept_by_a_resume_and_has_the_same_losses(one_rank: Path, cached_folder: Path) -> None:
    assert is_harmless("engine.gradient_checkpointing")
    state = orjson.loads((one_rank / "checkpoints" / "step-00000004" / "trainer_state.json").read_bytes())
    assert state["gradient_checkpointing"] == "none"  # `auto` on a host with room for the tiny model
    log = (one_rank / "logs" / "train.log").read_text()
    assert "engine.gradient_checkpointing: none, because a rank needs " in log and "largest micro batch" in log
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
