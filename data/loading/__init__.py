"""Micro batches: the dataset, its worker processes, and where it reads latents from."""
