"""Numbers that the scripts read from the command line; what is out of range ends with a clear message."""

import argparse
import math


def whole_number(text: str) -> int:
    """Read an integer from 1."""
    value = int(text) if text.replace("_", "").isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer from 1, got {text}")
    return value


def seed(text: str) -> int:
    """Read an integer from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer from 0, got {text}")
    return int(text)


def number(text: str) -> float:
    """Read a float; what is none is NaN, which is in no range."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def positive_number(text: str) -> float:
    """Read a time, or another number above 0 and below inf."""
    value = number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return value


def non_negative_number(text: str) -> float:
    """Read a number from 0 to inf."""
    value = number(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be in [0, inf], got {text}")
    return value
