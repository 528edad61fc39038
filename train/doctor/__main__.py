"""Examine the machine, the settings and the data: `python -m sdxl_trainer.train.doctor [--cfg x.yaml]`."""

from sdxl_trainer.launch.program import end_program
from sdxl_trainer.train.doctor.program import main

if __name__ == "__main__":
    end_program(main())
