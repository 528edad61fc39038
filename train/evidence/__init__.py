"""Evidence of which setting helps: the comparison of runs by their validations."""
