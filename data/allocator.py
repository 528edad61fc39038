"""How the C library keeps memory: buffers of megabytes come and go, and the system would clear each page anew."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_MMAP_THRESHOLD = 32 << 20  # what glibc takes at most
LIBRARY = ctypes.CDLL(None)


def keep_freed_memory(kept_bytes: int = 256 << 20) -> None:
    """Let freed buffers be used again instead of going back to the system, but for what is free beyond `kept_bytes`.

    That was a sixth of the cache job's work, and a tenth of building an index. Does nothing where the C library is not
    glibc.
    """
    if hasattr(LIBRARY, "mallopt"):
        LIBRARY.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        LIBRARY.mallopt(M_TRIM_THRESHOLD, kept_bytes)


def give_freed_memory_back() -> None:
    """Give the system what is kept."""
    if hasattr(LIBRARY, "malloc_trim"):
        LIBRARY.malloc_trim(0)
