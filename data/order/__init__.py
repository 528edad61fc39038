"""The order of batches: keyed randomness, plans, held-out splits, and how often each row is used.

All of them are functions of integers; nothing here opens an image or a latent file.
"""
