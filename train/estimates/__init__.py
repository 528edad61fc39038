"""Estimates of memory, FLOPs, a step's time and duration, before and during a run; which ranks of a run are slow."""
