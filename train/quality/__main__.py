"""Measure generated images: `bash launch/quality.sh --model RUN_FOLDER --features PATH`, on any number of ranks."""

import sys
from pathlib import Path

try:
    from sdxl_trainer.launch.program import end_program, require_checkout
    from sdxl_trainer.train.quality.program import main
except ImportError:
    activate = Path(__file__).resolve().parents[2] / ".venv" / "bin" / "activate"
    cure = f"source {activate}" if activate.is_file() else "pip install -e . (in the checkout)"
    sys.exit(f"sdxl_trainer is not installed here; run: {cure}")

if __name__ == "__main__":
    require_checkout(str(Path(__file__).parent))
    end_program(main())
