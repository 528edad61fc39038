"""Errors on held-out samples: their files, their statistics, and the best step of a run. Imports no torch."""
