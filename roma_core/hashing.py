"""Integer hashing: the only source of randomness in data order, masks, drops and splits.

A hash is a pure function of what it names, so the same object gets the same mask on every rank,
in every batch, on CPU and GPU, and no generator state has to be saved. The mixing step is the
32-bit finaliser "lowbias32" (C. Wellons, public domain); it is written with operators only, so one
body serves numpy arrays and torch tensors. Products wrap at 64 bits in tensors and at 32 in arrays;
both keep their lower 32 bits exact.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

Ints = Any  # an int64 numpy array, an int64 torch tensor or a Python int

_MASK = 0xFFFFFFFF


def mix(x: Ints) -> Ints:
    """Scramble 32-bit values; ``x`` holds integers, only their lower 32 bits count."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def hash_ints(*parts: Ints) -> Ints:
    """Hash integers (or integer arrays of broadcastable shapes) to 32 bits, order mattering.

    Every part counts with its lower 64 bits. Returns integers in ``[0, 2**32)`` of the broadcast
    shape; int64 arrays stay int64.
    """
    h: Ints = 0x9E3779B9
    for part in parts:
        low, high = part & _MASK, (part >> 32) & _MASK
        if isinstance(part, np.ndarray) and part.ndim:  # half the bytes, and vector instructions
            low, high = low.astype(np.uint32), high.astype(np.uint32)
        h = mix(mix(h ^ low) ^ high)
    return h.astype(np.int64) if isinstance(h, np.ndarray) else h


def hash_text(text: str) -> int:
    """Map text to an integer in ``[0, 2**64)`` by sha256; equal text gives an equal one for ever."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def unit_interval(key: str) -> float:
    """Map text to a number in ``[0, 1)`` by sha256; equal text gives an equal number for ever."""
    return hash_text(key) / 2**64
