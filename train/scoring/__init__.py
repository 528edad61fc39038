"""Measures of a finished model: its validation on the validation set of a run."""
