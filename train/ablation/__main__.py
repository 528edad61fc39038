"""Train a grid of settings and compare them: `python -m sdxl_trainer.train.ablation --cfg x.yaml --vary key=a,b`."""

import sys

from sdxl_trainer.train.ablation.program import main

if __name__ == "__main__":
    sys.exit(main())
