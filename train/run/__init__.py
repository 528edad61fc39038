"""A training run: set-up, checks, the loop, validation, interruption, and the console."""
