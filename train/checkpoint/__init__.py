"""Checkpoints: state, seal, search, background writer, resume, and emergency saves."""
