"""Encoding of images and captions into the cache: plan, decoder, encoders, pipeline, storage, and progress."""
