"""Images: finding files, aspect-ratio buckets, decoding, resizing, masks, and the shapes of the demo set.

What is stored about an image belongs in `metadata` or `formats`.
"""
