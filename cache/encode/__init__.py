"""Encoding of images and captions into the cache: plan, decoder, encoders, pipeline, storage, and progress.

Loading of networks belongs in models/, maintenance of a filled cache in upkeep/, file formats in data/formats/.
"""
