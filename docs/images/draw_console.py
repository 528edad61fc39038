"""Draw docs/images/console.svg: the console during a run of the quick start's model.

    python docs/images/draw_console.py console.svg

Run it after `bash launch/quickstart.sh`, in the checkout. The picture shows what a real run printed and displayed up to
step 40; the run is then stopped.
"""

import io
import shutil
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, RenderableType
from rich.text import Text

from sdxl_trainer.launch import logger
from sdxl_trainer.train.main import main

STEPS_SHOWN = 40
COLUMNS = 100
SETTINGS = "configs/quickstart.yaml"


class RecordedScreen(logger.Screen):
    """A screen that keeps what it would show."""

    def __init__(self) -> None:
        super().__init__()
        self.printed: list[RenderableType] = []
        self.display: RenderableType | None = None

    def write(self, message: "logger.Message") -> None:
        table = message.record["extra"].get("table")
        self.printed.append(Text.from_ansi(message.rstrip("\n")) if table is None else table)

    def is_shown(self, record: "logger.Record") -> bool:
        return "displayed" not in record["extra"]

    @contextmanager
    def show_live(self, display: RenderableType, num_rows: int, rank: int):
        self.display = display
        yield


def draw_at_step(screen: RecordedScreen, run: Path, target: Path) -> None:
    """Wait for the step, write the picture, and stop the run."""
    metrics = run / "logs" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < STEPS_SHOWN:
        time.sleep(0.2)
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, highlight=False)
    for renderable in [*screen.printed, screen.display]:
        console.print(renderable)
    console.save_svg(str(target), title="sdxl-trainer")
    (run / "stop").touch()


if __name__ == "__main__":
    folder = Path("runs") / "shapes"
    shutil.rmtree(folder, ignore_errors=True)
    screen = RecordedScreen()
    for name in ("SCREEN", "is_terminal"):
        setattr(logger, name, screen if name == "SCREEN" else lambda: True)
    from sdxl_trainer.train.run import console as console_module

    console_module.SCREEN = screen
    words = ["run.name=shapes", "sample.every_steps=30", "sample.num_inference_steps=4"]
    drawing = (screen, folder, Path(sys.argv[1]))
    threading.Thread(target=draw_at_step, args=drawing, daemon=True).start()
    sys.exit(main(["--cfg", SETTINGS, *words]) not in (0, 143))
