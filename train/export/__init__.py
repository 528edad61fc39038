"""Model files for other programs, from a live run or from a checkpoint."""
