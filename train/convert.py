"""Convert a checkpoint, single file or diffusers folder: `python train/convert.py SOURCE TARGET`."""

import sys
from pathlib import Path

try:
    from sdxl_trainer.launch.program import require_checkout
    from sdxl_trainer.train.export.convert import main
except ImportError:
    activate = Path(__file__).resolve().parent.parent / ".venv" / "bin" / "activate"
    cure = f"source {activate}" if activate.is_file() else "pip install -e . (in the checkout)"
    sys.exit(f"sdxl_trainer is not installed here; run: {cure}")

if __name__ == "__main__":
    require_checkout(__file__)
    sys.exit(main())
