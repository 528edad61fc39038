"""Images: finding files, aspect-ratio buckets, decoding, resizing, masks, and the demo set.

Records of images belong in `metadata`, stored latents in `formats`.
"""
