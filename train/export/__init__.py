"""Model files: export of a live run, and conversion of checkpoints and models."""
