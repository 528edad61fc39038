"""How the C library keeps memory: pictures come and go, tens of MB a second on each thread."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_MMAP_THRESHOLD = 32 << 20  # what glibc takes at most
KEPT_BYTES = 256 << 20


def keep_freed_memory() -> None:
    """Let freed buffers be used again instead of going back to the system, which would have to clear each page anew.

    That was a sixth of the job's work. Does nothing where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
