"""The doctor: examination of machine, settings and data before a run."""
