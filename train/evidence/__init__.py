"""Evidence of which setting helps: errors of each validation sample, and the comparison of runs by them."""
