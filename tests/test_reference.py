"""The reference, and the package beside it, against mpmath and the document's printed examples."""

import mpmath
import numpy as np
import oracle
import pytest

import fastmax
from fastmax import reference

# The document's examples: a vector, a temperature, and exp(r_i / T) / sum(exp(r_j / T)) to 35
# digits, from mpmath at 60.
DOCUMENT = {
    "(1, 2, 3)": (
        [1.0, 2.0, 3.0],
        1.0,
        [
            "0.090030573170380457998022101484491798",
            "0.2447284710547976524729596183407628",
            "0.6652409557748218895290182801747454",
        ],
    ),
    "(1, 2, 3) / 10": (
        [1.0, 2.0, 3.0],
        10.0,
        [
            "0.30060960535572728640637164494170835",
            "0.3322249935333472443161242852833956",
            "0.36716540111092546927750406977489605",
        ],
    ),
    "(1, 2, 3) * 10": (
        [10.0, 20.0, 30.0],
        1.0,
        [
            "0.0000000020610600462090622924481768689630631",
            "0.00004539786860886666113914385681030093",
            "0.99995460007033108712979856369501283",
        ],
    ),
}


@pytest.fixture(params=[reference.softmax, fastmax.softmax], ids=["reference", "fastmax"])
def softmax(request):
    return request.param


@pytest.mark.parametrize(("r", "temperature", "digits"), DOCUMENT.values(), ids=DOCUMENT)
def test_digits_of_the_examples(r, temperature, digits):
    exact = oracle.expect(r, temperature).exact.softmax
    with mpmath.workprec(oracle.BITS):
        for value, expected in zip(exact, digits, strict=True):
            assert abs(value - mpmath.mpf(expected)) < 1e-34 * value


@pytest.mark.parametrize(("r", "temperature", "digits"), DOCUMENT.values(), ids=DOCUMENT)
def test_examples_of_the_document(softmax, r, temperature, digits):
    expected = np.array([float(value) for value in digits])
    # one more than the 2 ulp of the package: the literals are rounded to float64 here
    np.testing.assert_array_max_ulp(softmax(r, temperature), expected, 3)


@pytest.mark.parametrize(
    ("r", "temperature", "digits"),
    [
        (np.array([1, 2, 3]), 0.1, DOCUMENT["(1, 2, 3) * 10"][2]),
        (np.array([1, 2, 3]) * 10, 1, DOCUMENT["(1, 2, 3) * 10"][2]),
        (np.array([1, 2, 3]) / 10, 1, DOCUMENT["(1, 2, 3) / 10"][2]),
    ],
)
def test_examples_written_in_other_ways(softmax, r, temperature, digits):
    # 0.1 is 1/10 but for 6e-17 of it, which 20 / T turns into a part in 1e15
    np.testing.assert_allclose(softmax(r, temperature), [float(d) for d in digits], rtol=4e-15)


def test_temperature_0_is_m_over_em(softmax):
    np.testing.assert_array_equal(softmax([1, 2, 3], 0), [0, 0, 1])
    np.testing.assert_array_equal(softmax([1, 3, 3], 0), [0, 0.5, 0.5])
    np.testing.assert_array_equal(softmax([3, 3, 3], 0), 3 * [1 / 3])


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_temperature_inf_is_e_over_k(softmax, k):
    np.testing.assert_array_equal(softmax(np.arange(k), np.inf), k * [1 / k])


def test_sum_is_over_the_first_axis(softmax):
    r = np.random.default_rng(9).normal(size=(4, 3, 2))
    for temperature in (0, 0.5, np.inf):
        p = softmax(r, temperature)
        np.testing.assert_allclose(p.sum(axis=0), np.ones((3, 2)), rtol=1e-15)
        np.testing.assert_allclose(p[:, 1, 1], softmax(r[:, 1, 1], temperature), rtol=1e-15)


@pytest.mark.parametrize("temperature", [0, 0.2, 1, 5, np.inf])
@pytest.mark.parametrize("k", [1, 2, 10, 100])
def test_reference_against_mpmath(temperature, k):
    r = np.random.default_rng(k).normal(size=k)
    p, expected = reference.softmax(r, temperature), oracle.expect(r, temperature)
    # r / T is rounded, at |r / T| < 16, by 8 ulp of 1; exp, the sum and the quotient by a few more
    assert oracle.errors("softmax", p, expected).max() <= 12


@pytest.mark.parametrize("temperature", [0, 0.2, 1, 5, np.inf])
def test_package_against_reference(temperature):
    r = np.random.default_rng(10).normal(size=(50, 20))
    np.testing.assert_allclose(fastmax.softmax(r, temperature), reference.softmax(r, temperature), rtol=3e-15)
