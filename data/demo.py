"""Draw the demo set: `python -m sdxl_trainer.data.demo --out DIR`."""

from sdxl_trainer.data.images.demo_set import main

if __name__ == "__main__":
    main()
