"""File formats of the cache: npz latents, text encoder outputs, tar shards, and the manifest.

The writer and the reader of a format are in one module.
"""
