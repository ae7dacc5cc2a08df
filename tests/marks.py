"""Values of parametrized tests that are taken at night only."""

import ml_dtypes
import numpy as np
import pytest


def nightly(*values):
    """Mark values which show little that others do not, and take seconds together.

    A tuple has the values of several parameters; a single value that is a tuple stands in one.
    """
    tuples = (value if isinstance(value, tuple) else (value,) for value in values)
    return [pytest.param(*value, marks=pytest.mark.nightly) for value in tuples]


# What arrays may hold. The types of 16 bits differ in how they are read and written alone: by day it is the
# one that is rounded by our own code.
FLOATS = [ml_dtypes.bfloat16, np.float32, np.float64, *nightly(np.float16)]
SIXTEEN_BITS = [ml_dtypes.bfloat16, *nightly(np.float16)]
