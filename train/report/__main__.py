"""Write the report of a run: `python -m sdxl_trainer.train.report RUN_FOLDER`."""

import sys

from sdxl_trainer.train.report.page import main

if __name__ == "__main__":
    sys.exit(main())
