"""Model files: export of the model in training, conversion of checkpoints and models, model cards and their upload."""
