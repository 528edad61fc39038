"""The tiny SDXL of the quick start and the tests: builder, tokenizers, and the training of its VAE and U-Net."""
