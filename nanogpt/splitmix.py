"""SplitMix64, the hash behind the order of the data, the seeds of rows and the draws of tokens."""

from typing import TypeVar

import numpy as np

GAMMA = 0x9E3779B97F4A7C15  # what a SplitMix64 generator adds to its state before each output
_WORD = 2**64 - 1

Words = TypeVar("Words", int, np.ndarray)


def splitmix64(x: Words) -> Words:
    """Return the 64-bit hash of an integer, or of each element of a uint64 array of any shape.

    It is the finalizer of "Fast Splittable Pseudorandom Number Generators" (Steele, Lea, Flood,
    2014), section 5. Of an integer the lower 64 bits count.

    >>> splitmix64(GAMMA) == splitmix64(np.array([GAMMA], np.uint64))[0]
    True
    """
    x = x & _WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _WORD
    return x ^ (x >> 31)
