"""Gradients and the U-Net: the training run, objective, engine, checkpoints, samples, and model export."""
