"""The numbers of a run at Weights & Biases, beside the files and only if `log.wandb` asks for it."""

import importlib.metadata
import uuid
from collections.abc import Iterator

from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.train.report.metrics import WandbLog

ID_FILE = "wandb_id.txt"  # in the log folder: a resumed run goes on under the same id


def check_wandb(config: Config) -> Iterator[Problem]:
    """Whether what `log.wandb` asks for is installed."""
    try:
        if config.log.wandb is not None:
            importlib.metadata.version("wandb")  # a folder named wandb, as it leaves behind itself, would be importable
    except importlib.metadata.PackageNotFoundError:
        yield Problem("log.wandb", config.log.wandb, "needs the package wandb", "pip install wandb, or leave it out")


def open_wandb(config: Config) -> WandbLog | None:
    """Begin the run at wandb, with all settings, or go on with it; None if `log.wandb` does not ask for it.

    Raises:
        UserInputError: wandb refuses it, say because nobody is logged in.
    """
    if config.log.wandb is None:
        return None
    import wandb  # pyright: ignore[reportMissingImports]  (an optional package)

    folder = config.run.folder / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ID_FILE
    if not file.is_file():
        file.write_text(uuid.uuid4().hex[:8])
    try:
        run = wandb.init(
            project=config.log.wandb,
            name=config.run.name,
            id=file.read_text(),
            resume="allow",
            dir=str(folder),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(console="off"),  # the console is the run's own
        )
    except wandb.Error as error:
        cure = "run wandb login, or set WANDB_MODE=offline in the environment"
        raise UserInputError([Problem("log.wandb", config.log.wandb, f"wandb says: {error}", cure)]) from error
    return WandbLog(run)
