"""The doctor: examination of the machine, the settings and the data before a run."""
