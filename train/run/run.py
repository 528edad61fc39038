"""The parts of a run that its steps, validations, generated images and checkpoints share."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.order.plan import Plan
from sdxl_trainer.data.text.tokens import Tokenizers
from sdxl_trainer.launch.append_file import LossCount
from sdxl_trainer.launch.distributed import Ranks
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.checkpoint.writer import CheckpointWriter
from sdxl_trainer.train.engine.deepspeed_config import BatchSizes
from sdxl_trainer.train.engine.engine import Engine
from sdxl_trainer.train.estimates.memory_table import MemoryTable
from sdxl_trainer.train.estimates.slow_ranks import NUM_SLOW_STEPS, RankTimer, SlowRanks
from sdxl_trainer.train.export.average_snapshots import SnapshotWriter
from sdxl_trainer.train.networks.conditioning import TextConditioner
from sdxl_trainer.train.objective.objective import Objective
from sdxl_trainer.train.report.metrics import MetricsLog
from sdxl_trainer.train.report.report_process import ReportProcess
from sdxl_trainer.train.run.bad_samples import BadSamples
from sdxl_trainer.train.run.console import Progress
from sdxl_trainer.train.run.interruption import Requests
from sdxl_trainer.train.run.training_data import ValidationSet


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a step, a validation, a generated image or a checkpoint needs."""

    config: Config
    ranks: Ranks
    source: ModelSource
    index: Index
    plan: Plan
    tokenizers: Tokenizers
    batch_sizes: BatchSizes
    engine: Engine
    conditioner: TextConditioner
    objective: Objective
    state: TrainState
    num_steps: int  # of the whole run, resumes included
    checkpoints: CheckpointWriter
    requests: Requests
    progress: Progress
    metrics: MetricsLog | None  # rank 0 only
    validation: ValidationSet | None  # None if nothing is held out
    report: ReportProcess | None  # rank 0 only, and only if the run publishes one
    memory: MemoryTable  # estimated
    bad_samples: BadSamples

    @cached_property
    def lost_images(self) -> LossCount:
        """Generated images that could not be written."""
        return LossCount(self.folder / "samples", "image")

    @cached_property
    def lost_validations(self) -> LossCount:
        """Files with the errors of validation samples that could not be written."""
        return LossCount(self.folder / "logs" / "validation", "file")

    @cached_property
    def snapshots(self) -> SnapshotWriter:
        """Writes the averages of `ema.lengths`."""
        return SnapshotWriter(self.folder, self.config.ema, self.ranks, self.state.step)

    @cached_property
    def rank_timer(self) -> RankTimer:
        """Measures this rank's own times. At ZeRO 3 the forward pass waits for weights of other ranks."""
        return RankTimer(self.ranks, sees_compute=self.engine.zero_stage < 3)

    @cached_property
    def slow_ranks(self) -> SlowRanks:
        """Ranks that the others wait for, on rank 0."""
        return SlowRanks(NUM_SLOW_STEPS)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.config.run.folder
