"""Print, as JSON, a digest of the bits of many results for each number of threads given.

Run as a script, so that the number of threads and the cache can be set before Numba is imported.
"""

import functools
import hashlib
import json
import sys

import numba
import numpy as np
import oracle

import fastmax

# on both sides of the lengths at which blocks, chunks and schedules begin
LENGTHS = (1, 15, 16, 17, 1000, 16384, 16385, 200_000)
LONG = 1_500_007
ENTRIES = 2**18  # in an array of many slices


@functools.cache
def entries(shape, dtype):
    rng = np.random.default_rng(shape)
    return rng.normal(scale=5.0, size=shape).astype(dtype)


def arguments(dtype):
    """Yield a description, an array and an axis."""
    for n in LENGTHS:
        many = max(3, ENTRIES // n)
        yield f"rows of {n}", entries((many, n), dtype), 1
        yield f"columns of {n}", entries((n, many), dtype), 0
        yield f"columns of {n} in blocks", entries((2, n, many // 2), dtype), 1
    yield "one long row", entries(LONG, dtype), 0
    yield "one long row of many", entries((2, LONG), dtype), 1
    yield "two long columns", entries((LONG, 2), dtype), 0


def digests(name):
    """Return the digest of every result of a function, by its description."""
    function = getattr(fastmax, name)
    found = {}
    for dtype in (np.float32, np.float64):
        for description, x, axis in arguments(dtype):
            result = np.ascontiguousarray(function(x, 0.7, axis=axis))
            key = f"{name}, {x.dtype}, {description}"
            found[key] = hashlib.sha256(result.tobytes()).hexdigest()
    return found


def main():
    by_threads = []
    for threads in map(int, sys.argv[1:]):
        numba.set_num_threads(threads)
        by_threads.append({k: d for name in oracle.FUNCTIONS for k, d in digests(name).items()})
    print(json.dumps(by_threads))


if __name__ == "__main__":
    main()
