"""Softmax with temperature, and its limits at temperature 0 and infinity."""

from fastmax import _overloads as _overloads
from fastmax._api import entropy, log_softmax, logsumexp, softmax

__all__ = ["entropy", "log_softmax", "logsumexp", "softmax"]
__version__ = "0.1.0"
