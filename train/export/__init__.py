"""Model files: export of the model in training, and conversion of checkpoints and models."""
