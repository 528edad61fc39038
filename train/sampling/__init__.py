"""Generated images: prompts, diffusers' schedulers and pipeline, image grids, and the sampling program."""
