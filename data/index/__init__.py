"""The memory-mapped index: records joined with cached latents, missing and unlisted latents included."""
