"""Remote stores: byte ranges through fsspec, local copies of metadata and shards."""
