"""The tiny SDXL of the demo and the tests: the model's builder, its tokenizers, and the training of its VAE."""
