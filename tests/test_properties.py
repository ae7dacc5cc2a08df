"""Properties that hold for every vector, and the document's two propositions."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastmax

settings.register_profile(
    "fastmax",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fastmax")

FINITE = st.floats(-1e3, 1e3)
TEMPERATURES = st.one_of(st.sampled_from([0.0, np.inf]), st.floats(0, np.inf, exclude_min=True))
MODERATE = st.floats(1e-3, 1e3)


@st.composite
def vectors(draw, elements=FINITE, max_size=40):
    """Return a vector in float32 or float64; drawn from few values, so that ties are common."""
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    pool = draw(st.lists(elements, min_size=1, max_size=8))
    values = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=max_size))
    return np.array(values, dtype)


def close(x, y, ulp):
    """Whether two arrays agree within some ulp of either and of the smallest subnormal."""
    info = np.finfo(x.dtype)
    return np.abs(x - y) <= ulp * (info.eps * np.maximum(x, y) + info.smallest_subnormal)


@given(vectors(), TEMPERATURES)
def test_probabilities_sum_to_1(x, temperature):
    p = fastmax.softmax(x, temperature)
    assert ((p >= 0) & (p <= 1)).all()
    # each of them is off by 2 ulp at most, so their exact sum is off by 2 eps
    assert abs(np.sum(p, dtype=np.longdouble) - 1) <= 2 * np.finfo(x.dtype).eps


@given(vectors(st.integers(-1000, 1000).map(float)), st.integers(-4096, 4096), TEMPERATURES)
def test_shifts_that_are_exact_change_nothing(x, shift, temperature):
    shifted = x + x.dtype.type(shift)
    assert close(fastmax.softmax(shifted, temperature), fastmax.softmax(x, temperature), 4).all()


@given(vectors(), TEMPERATURES, st.randoms(use_true_random=False))
def test_permutations_permute_the_result(x, temperature, random):
    order = np.array(random.sample(range(len(x)), len(x)))
    p = fastmax.softmax(x, temperature)
    assert close(fastmax.softmax(x[order], temperature), p[order], 4).all()


@given(vectors(), TEMPERATURES)
def test_order_is_preserved(x, temperature):
    p = fastmax.softmax(x, temperature)
    order = np.argsort(x)
    assert (np.diff(p[order]) >= 0).all()
    # equal entries have equal probabilities
    same = np.diff(x[order]) == 0
    assert (np.diff(p[order])[same] == 0).all()


@given(vectors(), st.integers(-40, 40))
def test_temperature_divides_the_vector(x, exponent):
    """A power of two divides without rounding."""
    temperature = 2.0**exponent
    divided = np.ldexp(x, -exponent)
    assert close(fastmax.softmax(x, temperature), fastmax.softmax(divided), 4).all()


@given(vectors(st.integers(-20, 20).map(lambda n: 15.0 * n)), st.sampled_from([3.0, 5.0, 15.0]))
def test_temperature_divides_a_vector_of_multiples(x, temperature):
    divided = x / x.dtype.type(temperature)
    assert close(fastmax.softmax(x, temperature), fastmax.softmax(divided), 4).all()


@given(vectors(), MODERATE)
def test_log_softmax_is_the_logarithm(x, temperature):
    p, log_p = fastmax.softmax(x, temperature), fastmax.log_softmax(x, temperature)
    normal = p >= np.finfo(x.dtype).smallest_normal
    assert (log_p <= 0).all()
    np.testing.assert_allclose(
        np.exp(log_p[normal].astype(float)), p[normal], rtol=1000 * np.finfo(x.dtype).eps
    )


@given(vectors(), MODERATE)
def test_logsumexp_lies_above_the_maximum(x, temperature):
    value, top = float(fastmax.logsumexp(x, temperature)), float(x.max())
    spread = temperature * np.log(len(x))
    slack = 8 * np.finfo(x.dtype).eps * (abs(top) + spread)
    assert top - slack <= value <= top + spread + slack


@given(vectors(), TEMPERATURES, TEMPERATURES)
def test_entropy_grows_with_temperature(x, first, second):
    low, high = sorted([first, second])
    tolerance = (1e-14 if x.dtype == np.float64 else 1e-6) * np.log(len(x))
    assert fastmax.entropy(x, low) <= fastmax.entropy(x, high) + 2 * tolerance


@given(vectors(), TEMPERATURES, st.integers(2, 5))
def test_slices_of_a_batch_are_those_alone(x, temperature, copies):
    alone = fastmax.softmax(x, temperature)
    rows = fastmax.softmax(np.tile(x, (copies, 1)), temperature, axis=1)
    np.testing.assert_array_equal(rows, np.tile(alone, (copies, 1)))


# --- the document's propositions ------------------------------------------------------------------


def gap(x):
    """Return the distance of the largest entry below the maximum from it; inf if there is none."""
    below = x[x < x.max()].astype(float)
    return float(x.max()) - below.max() if below.size else np.inf


@given(vectors(), st.floats(1e-3, 1.0))
def test_first_proposition_convergence_as_temperature_falls_to_0(x, fraction):
    """|sigma_T - sigma_0| <= k exp(-gap / T), which goes to 0 with T."""
    limit = fastmax.softmax(x, 0)
    maxima = x == x.max()
    np.testing.assert_array_equal(limit, (maxima / maxima.sum()).astype(x.dtype))
    temperature = fraction * min(gap(x), 1e3)
    distance = np.abs(fastmax.softmax(x, temperature).astype(float) - limit).max()
    assert distance <= len(x) * np.exp(-1 / fraction) + 4 * np.finfo(x.dtype).eps


@given(vectors())
def test_first_proposition_equality_before_the_limit(x):
    """Where exp(-gap / T) vanishes, sigma_T is sigma_0 to the last bit."""
    temperature = min(gap(x), 1e3) / 2000
    limit = fastmax.softmax(x, 0)
    assert close(fastmax.softmax(x, temperature), limit, 2).all()
    assert ((fastmax.softmax(x, temperature) == 0) == (limit == 0)).all()


@given(vectors(), st.floats(1.0, 1e300))
def test_second_proposition_convergence_as_temperature_grows(x, factor):
    """|sigma_T - 1/k| <= exp(spread / T) - 1, which goes to 0 as T grows."""
    limit = fastmax.softmax(x, np.inf)
    np.testing.assert_array_equal(limit, np.full(len(x), 1 / len(x), x.dtype))
    spread = max(float(x.max()) - float(x.min()), 1e-3)
    distance = np.abs(fastmax.softmax(x, spread * factor).astype(float) - limit).max()
    assert distance <= np.expm1(1 / factor) + 4 * np.finfo(x.dtype).eps


@given(vectors())
def test_second_proposition_equality_before_the_limit(x):
    limit = fastmax.softmax(x, np.inf)
    assert close(fastmax.softmax(x, 1e300), limit, 2).all()


@pytest.mark.parametrize(
    ("x", "limit"), [([1, 2, 3], [0, 0, 1]), ([1, 3, 3], [0, 0.5, 0.5]), ([2, 2], [0.5, 0.5])]
)
def test_distance_to_the_limits_never_grows(x, limit):
    """Along a sweep of temperatures, towards 0 and towards inf."""
    sweep = np.concatenate([[0], np.logspace(-3, 3, 61), [np.inf]])
    p = fastmax.softmax(x, sweep, axis=-1)
    to_0 = np.abs(p - limit).max(axis=1)
    to_inf = np.abs(p - 1 / len(x)).max(axis=1)
    assert to_0[0] == 0
    assert to_inf[-1] == 0
    assert (np.diff(to_0) >= -1e-15).all()
    assert (np.diff(to_inf) <= 1e-15).all()
