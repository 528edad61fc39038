"""Processes: launch scripts, the one module that asks for a rank, and logging."""
