"""Checks of data before a run: sources, captions, latents, and the validation set.

`open_*` functions open an index and return it with every problem found in it, `check_*` functions yield problems
without a side effect, and `verify_*` functions read latent files. The formats themselves belong to data/formats.
"""
