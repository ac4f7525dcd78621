"""Integer hashing: the only source of randomness in data order, masks, drops and splits.

A hash is a pure function of its arguments: equal on every rank, in every batch, on CPU and GPU, and
no generator state has to be saved. The mixing step is the 32-bit finaliser "lowbias32" (C. Wellons,
public domain), for Python ints and torch tensors; arrays have a faster one with the same results.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

Ints = Any  # an int64 numpy array, an int64 torch tensor or a Python int

_MASK = 0xFFFFFFFF
_STEPS = tuple((np.uint32(s), np.uint32(f)) for s, f in ((16, 0x7FEB352D), (15, 0x846CA68B)))
_LAST = np.uint32(16)


def mix(x: Ints) -> Ints:
    """Scramble 32-bit values; ``x`` holds integers, only their lower 32 bits count."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def hash_ints(*parts: Ints) -> Ints:
    """Hash the lower 64 bits of integers, or of broadcastable integer arrays, in this order.

    Returns integers in ``[0, 2**32)`` of the broadcast shape; int64 arrays stay int64.
    """
    h: Ints = 0x9E3779B9
    for part in parts:
        if isinstance(part, np.ndarray) and part.ndim:
            h = _mix_array(_mix_array(h ^ part.astype(np.uint32)) ^ (part >> 32).astype(np.uint32))
        else:
            part = int(part) if isinstance(part, np.generic | np.ndarray) else part
            h = mix(mix(h ^ (part & _MASK)) ^ ((part >> 32) & _MASK))
    return h.astype(np.int64) if isinstance(h, np.ndarray) else h


def _mix_array(x: Ints) -> Ints:
    """:func:`mix` of a uint32 array, in place: it wraps by itself, and vector instructions serve it."""
    for shift, factor in _STEPS:
        x ^= x >> shift
        x *= factor
    x ^= x >> _LAST
    return x


def hash_text(text: str) -> int:
    """Map text to an integer in ``[0, 2**64)`` by sha256; equal text gives an equal one always."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def unit_interval(key: str) -> float:
    """Map text to a number in ``[0, 1)`` by sha256; equal text gives an equal number always."""
    return hash_text(key) / 2**64
