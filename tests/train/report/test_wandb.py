"""Metrics at Weights & Biases, with the real package offline. test_contradictions.py covers a missing package."""

import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from sdxl_trainer.configs.load import load_config
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.train.report.metrics import check_wandb

LOG = """
import sys
from pathlib import Path
from sdxl_trainer.configs.load import load_config
from sdxl_trainer.train.report.metrics import MetricsLog, open_wandb
config, _ = load_config(Path(sys.argv[1]))
first = int(sys.argv[2])
logs = config.run.folder / "logs"
log = MetricsLog(logs, first, open_wandb(config.log.wandb, config.run.name, logs, config.model_dump(mode="json")))
for step in (first + 1, first + 2):
    log.write(step, {"loss": step / 1024})
log.write(step, {"validation/loss": 7.25})
log.close()
"""


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    file = tmp_path / "settings.yaml"
    file.write_text(f"{{run: {{dir: {tmp_path}, name: shown}}, model: {{path: x}}, log: {{wandb: my-project}}}}")
    return file


def test_wandb_is_off_by_default() -> None:
    assert Config().log.wandb is None and list(check_wandb(Config().log.wandb)) == []


@pytest.mark.skipif("wandb" not in packages_distributions(), reason="wandb is not installed")
def test_a_resumed_run_keeps_its_id(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config, _ = load_config(settings)
    assert list(check_wandb(config.log.wandb)) == []
    logs = config.run.folder / "logs"
    ids = []
    for first in (0, 1):  # the second run repeats step 2
        subprocess.run([sys.executable, "-c", LOG, str(settings), str(first)], check=True, timeout=120)
        ids.append((logs / "wandb_id.txt").read_text())
    files = sorted(logs.glob("wandb/offline-run-*/*.wandb"))
    assert ids[0] == ids[1] and {file.stem for file in files} == {f"run-{ids[0]}"} and len(files) == 2
    for file, step in zip(files, (2, 3), strict=True):
        content = file.read_bytes()
        assert b"my-project" in content and b"7.25" in content and str(step / 1024).encode() in content
