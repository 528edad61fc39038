"""The DeepSpeed engine: its settings, the training step, and reading, saving and loading its state.

No other room imports DeepSpeed. Files of checkpoints are written in train/checkpoint.
"""
