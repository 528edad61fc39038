"""Checks of data before a run: sources, captions, latents, and the validation set."""
