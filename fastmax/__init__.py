"""Softmax with temperature, and its limits at temperature 0 and infinity."""

from fastmax import _overloads as _overloads
from fastmax._api import entropy, log_softmax, logsumexp, softmax
from fastmax._learning_api import (
    cross_entropy,
    cross_entropy_and_grad,
    fit_temperature,
    log_softmax_vjp,
    softmax_vjp,
    solve_temperature,
)

__all__ = [
    "cross_entropy",
    "cross_entropy_and_grad",
    "entropy",
    "fit_temperature",
    "log_softmax",
    "log_softmax_vjp",
    "logsumexp",
    "softmax",
    "softmax_vjp",
    "solve_temperature",
]
__version__ = "0.1.0"
