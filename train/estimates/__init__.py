"""Estimates of memory, FLOPs and duration, before and during a run."""
