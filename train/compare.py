"""Compare runs: `python -m sdxl_trainer.train.compare RUN_FOLDER RUN_FOLDER [...]`."""

import sys

from sdxl_trainer.train.evidence.program import main

if __name__ == "__main__":
    sys.exit(main())
