"""Show runs in a browser while they train: `python -m sdxl_trainer.train.watch [RUNS]`."""

import sys

from sdxl_trainer.train.watch.program import main

if __name__ == "__main__":
    sys.exit(main())
