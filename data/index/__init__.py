"""The memory-mapped indexes of records and samples, and the join of records with listed, unlisted and missing latents.

Nothing here reads pixels or the values of latents.
"""
