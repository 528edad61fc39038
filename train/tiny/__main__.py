"""Write the tiny SDXL: `python -m sdxl_trainer.train.tiny --out DIR`."""

from sdxl_trainer.train.tiny.build import main

if __name__ == "__main__":
    main()
