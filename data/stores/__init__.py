"""Remote stores: byte ranges of objects through fsspec, and local copies of metadata and shards."""
