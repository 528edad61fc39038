"""Generated images: prompts, samplers, the pipeline, and image grids."""
