"""Values of parametrized tests that are taken at night only."""

import pytest


def nightly(*values):
    """Mark values, or tuples of several, which show little that others do not, and take seconds each."""
    tuples = (value if isinstance(value, tuple) else (value,) for value in values)
    return [pytest.param(*value, marks=pytest.mark.nightly) for value in tuples]
