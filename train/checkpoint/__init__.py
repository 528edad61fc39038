"""Checkpoint files: written in the background, sealed, found, verified, resumed from, and saved in an emergency.

The content of the files comes from train/engine.
"""
