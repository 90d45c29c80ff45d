"""The host's memory of freed tensors: kept for the next step, or given back to the system."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX, _NEVER = -1, -4, 2**31 - 1  # numbers of glibc's <malloc.h>


def keep_freed_memory() -> bool:
    """Have this process reuse the memory of freed tensors from now on; whether its C library (glibc) can.

    glibc gives every large block back at once, and the system zeroes its pages anew when the next step asks for
    them: a quarter of the time of a small model's step.
    """
    libc = ctypes.CDLL(None)
    return hasattr(libc, "mallopt") and bool(libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, _NEVER))


def give_freed_memory_back() -> None:
    """Return what is free to the system once, for instance after a teacher has gone."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
