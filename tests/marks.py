"""Values of parametrized tests that are taken at night only."""

import pytest


def nightly(*values):
    """Mark values which show little that others do not, and take seconds together.

    A tuple has the values of several parameters; a single value that is a tuple stands in one.
    """
    tuples = (value if isinstance(value, tuple) else (value,) for value in values)
    return [pytest.param(*value, marks=pytest.mark.nightly) for value in tuples]
