"""The order of batches: plans, splits, weights of sources, and regularisation, as functions of integers.

Nothing here opens an image or a latent file.
"""
