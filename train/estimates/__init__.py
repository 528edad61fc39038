"""Estimates made before and during a run: memory, FLOPs, and duration."""
