"""Frozen networks: the cache job, model files, and what maintains a cache."""
