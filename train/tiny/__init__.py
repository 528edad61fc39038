"""The tiny SDXL of the demo and the tests: its builder, tokenizers, and VAE."""
