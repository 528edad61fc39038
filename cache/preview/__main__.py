"""Show the data as the model will see it: `python -m sdxl_trainer.cache.preview --cfg x.yaml`."""

from sdxl_trainer.cache.preview.program import main
from sdxl_trainer.launch.program import end_program

if __name__ == "__main__":
    end_program(main())
