"""Micro batches: the dataset, the latent store that it reads, and the loader with its worker processes."""
