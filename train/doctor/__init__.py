"""The doctor: every check of machine, settings, and data, before a run."""
