"""Micro batches: the dataset, the store it reads latents from, and the loader with its worker processes."""
