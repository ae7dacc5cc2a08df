"""What `benchmark_cpu.py --learning` times: losses with gradients, and temperatures fitted and solved for.

Each function of fastmax is timed beside the libraries that do the same. A call is checked before it is timed,
against the definition in float64, and what it is off by is kept.
"""

import importlib
import math
from functools import partial
from typing import Any

import numba
import numpy as np
from contenders import SEED, Call, Case, Contender

import fastmax

LOSS, FIT, SOLVE = "cross_entropy_and_grad", "fit_temperature", "solve_temperature"
CASES = [
    Case(LOSS, (8192, 1000), 1, "float32"),
    Case(LOSS, (1000, 8192), 0, "float32"),
    Case(LOSS, (512, 32000), 1, "float32"),
    Case(LOSS, (64, 128256), 1, "float32"),
    Case(LOSS, (1000000, 10), 1, "float32"),
    Case(FIT, (50000, 1000), 1, "float32"),
    Case(SOLVE, (10000, 90), 1, "float32"),
]
PERPLEXITY = 30.0
# What a temperature divides the logits by whose labels are drawn: the one to be found.
TRUE_TEMPERATURE = 1.5
# At most so many samples are checked.
CHECKED_SAMPLES = 200
ERRORS = {
    LOSS: "gradient, ulp of largest",
    FIT: "loss above the least, relative",
    SOLVE: "entropy, nats",
}


def draw(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Draw logits, and labels at a temperature; or minus squared distances to neighbours."""
    rng = np.random.default_rng(SEED)
    if case.function == SOLVE:
        points = rng.standard_normal((case.shape[0], 5))
        some = points[rng.integers(0, len(points), 10 * case.shape[1])]
        squares = ((points[:, None] - some) ** 2).sum(axis=2)
        return -np.sort(squares, axis=1)[:, : case.shape[1]].astype(np.float32), np.empty(0)
    x = rng.standard_normal(case.shape, np.float32)
    x *= 3.0
    # The largest of logits with noise of Gumbel's distribution is a draw from their softmax.
    labels = [
        int((row / TRUE_TEMPERATURE + rng.gumbel(size=len(row))).argmax())
        for row in np.moveaxis(x, case.axis, -1)
    ]
    return x, np.array(labels)


def gradient_error(case: Case, x: np.ndarray, labels: np.ndarray, result: tuple[Any, Any]) -> float:
    """Return the largest error of the gradient in ulp of the largest entry of a sample."""
    rows, gradients = np.moveaxis(x, case.axis, -1), np.moveaxis(np.asarray(result[1]), case.axis, -1)
    worst = 0.0
    for i in np.linspace(0, len(rows) - 1, min(len(rows), CHECKED_SAMPLES)).astype(int):
        terms = np.exp(rows[i].astype(np.longdouble) - rows[i].max())
        others = np.delete(terms, labels[i]).sum() / terms.sum()
        expected = terms / terms.sum() / len(rows)
        expected[labels[i]] = -others / len(rows)
        ulp = np.spacing(np.abs(expected).max().astype(x.dtype))
        worst = max(worst, float(np.abs(gradients[i] - expected).max() / ulp))
    return worst


def loss_at(x: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    """Return the cross entropy in float64, without a copy of the logits in float64."""
    total = 0.0
    for start in range(0, len(x), 1000):
        part = slice(start, start + 1000)
        rows = x[part].astype(np.float64)
        total += math.fsum(fastmax.cross_entropy(rows, labels[part], temperature, axis=1, reduction="none"))
    return total / len(x)


def fit_error(case: Case, x: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    """Return by how much the loss at a temperature is above that at fastmax's, relative."""
    least = loss_at(x, labels, fastmax.fit_temperature(x, labels, axis=case.axis))
    return (loss_at(x, labels, float(temperature)) - least) / least


def solve_error(case: Case, x: np.ndarray, labels: np.ndarray, result: np.ndarray) -> float:
    """Return how far entropies are from the given one, of probabilities or at temperatures."""
    del labels
    if result.ndim == 2:
        logs = np.log(np.where(result > 0, result, 1.0))
        entropies = -(result * logs).sum(axis=1)
    else:
        entropies = fastmax.entropy(x.astype(np.float64), result, axis=case.axis)
    return float(np.abs(entropies - math.log(PERPLEXITY)).max())


def call_fastmax(case: Case, x: np.ndarray, labels: np.ndarray, threads: int) -> Call:
    """Return the call of fastmax."""
    numba.set_num_threads(threads)
    if case.function == SOLVE:
        return partial(fastmax.solve_temperature, x, entropy=math.log(PERPLEXITY), axis=case.axis)
    return partial(getattr(fastmax, case.function), x, labels, axis=case.axis)


def call_torch(case: Case, x: np.ndarray, labels: np.ndarray, threads: int) -> Call:
    """Return forward and backward, or a fit of log(T) by LBFGS with a line search."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(threads)
    logits, target = torch.from_numpy(np.moveaxis(x, case.axis, -1)), torch.from_numpy(labels)
    loss_of = torch.nn.functional.cross_entropy

    def differentiate() -> Any:
        own = logits.detach().requires_grad_(True)
        loss = loss_of(own, target)
        loss.backward()
        gradient = own.grad.numpy()
        return loss.item(), np.moveaxis(gradient, -1, case.axis)

    def fit() -> float:
        log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS(
            [log_temperature], max_iter=100, tolerance_grad=1e-9, tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure() -> Any:
            optimiser.zero_grad()
            loss = loss_of(logits / log_temperature.exp().float(), target)
            loss.backward()
            return loss

        optimiser.step(closure)
        return float(log_temperature.exp())

    return differentiate if case.function == LOSS else fit


def call_optax(case: Case, x: np.ndarray, labels: np.ndarray, threads: int) -> Call:
    """Return loss and gradient as JAX compiles them of the loss of Optax."""
    del threads  # the environment says how many
    jax, optax = importlib.import_module("jax"), importlib.import_module("optax")
    logits, target = jax.device_put(x), jax.device_put(labels)
    losses = partial(optax.softmax_cross_entropy_with_integer_labels, labels=target, axis=case.axis)
    compiled = jax.jit(jax.value_and_grad(lambda logits: losses(logits).mean()))
    return lambda: jax.block_until_ready(compiled(logits))


def call_sklearn(case: Case, x: np.ndarray, labels: np.ndarray, threads: int) -> Call:
    """Return the fit of a temperature, or the search for a perplexity."""
    del threads  # the environment says how many
    if case.function == FIT:
        module = importlib.import_module("sklearn.calibration")
        return lambda: 1.0 / float(module._TemperatureScaling().fit(x, labels).beta_)
    module = importlib.import_module("sklearn.manifold._utils")
    return partial(module._binary_search_perplexity, -x, PERPLEXITY, 0)


CHECKS = {LOSS: gradient_error, FIT: fit_error, SOLVE: solve_error}
# More than this, in the unit of `ERRORS`, is wrong; PyTorch and Optax round more than once.
LARGEST_ERROR = {LOSS: 1e4, FIT: 1e-4, SOLVE: 1e-3}


LEARNERS = {
    "fastmax": Contender("fastmax", ("numba",), call_fastmax, (LOSS, FIT, SOLVE)),
    "torch": Contender("PyTorch", ("torch",), call_torch, (LOSS, FIT)),
    "optax": Contender("JAX with Optax", ("jax", "optax"), call_optax, (LOSS,)),
    "scikit-learn": Contender("scikit-learn", ("sklearn",), call_sklearn, (FIT, SOLVE)),
}


def prepare(name: str, case: Case, threads: int) -> tuple[Call, float]:
    """Return the call of a library for a case, and the error of a first call."""
    x, labels = draw(case)
    call = LEARNERS[name].make_call(case, x, labels, threads)
    error = CHECKS[case.function](case, x, labels, call())
    if not error <= LARGEST_ERROR[case.function]:
        raise ArithmeticError(f"{ERRORS[case.function]}: wrong by {error:.3g}")
    return call, error
