"""Estimates of memory, FLOPs and duration, before and during a run; and which ranks of a run are slow."""
