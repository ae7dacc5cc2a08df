"""The error over lengths, temperatures and offsets: softmax 2 ulp, log_softmax, logsumexp 4 ulp."""

import math

import mpmath
import numba
import numpy as np
import oracle
import pytest
from marks import SIXTEEN_BITS
from paths import PATHS

import fastmax
from fastmax._lanes import LANE_BYTES, REGISTERS
from fastmax._math import log_one_plus
from fastmax._slice import CHUNK

LENGTHS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 100, 1000, 16383, 16384, 16385, 100_003)
LONG = (10**6, 10**7)
EXPONENTS = (-300, -200, -100, -38, -10, -3, 0, 3, 10, 38, 100, 200, 300)  # T = 10**exponent
OFFSETS = (0.0, 1.0, -1.0, 30.0, -700.0, 1e3, -1e4, 1e6, -1e6)

float_types = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def draw(k, spread, offset, dtype, seed):
    """Return k normal entries around an offset, drawn from a pool of at most 300."""
    rng = np.random.default_rng(seed)
    pool = (offset + rng.normal(scale=spread, size=min(k, 300))).astype(dtype)
    return pool if k <= 300 else rng.choice(pool, size=k)


def faults(x, temperature, paths):
    """Return what the four functions get wrong for one slice, called through some paths."""
    expected = oracle.expect(x, temperature)
    return [
        f"{path}, k = {len(x)}, T = {temperature}: {fault}"
        for name in oracle.FUNCTIONS
        for path in paths
        if (fault := oracle.fault(name, PATHS[path](getattr(fastmax, name), x, temperature), expected))
    ]


@float_types
@pytest.mark.parametrize("k", LENGTHS)
def test_lengths_and_offsets(dtype, k):
    found = []
    for seed, offset in enumerate(OFFSETS):
        x = draw(k, 3.0, offset, dtype, seed)
        found += faults(x, 1.0, ["vector", "strided"] if k > 1000 else ["rows", "columns"])
    assert found == []


@float_types
@pytest.mark.parametrize(("spread", "temperature"), [(1.0, 1.0), (30.0, 0.7), (1e-3, 1e-3)])
def test_many_different_entries(dtype, spread, temperature):
    """Ten thousand fractions of the exponential, on both sides of every power of two."""
    x = np.random.default_rng(18).uniform(-2 * spread, spread, size=10_000).astype(dtype)
    assert faults(x, temperature, ["vector", "columns"]) == []


@float_types
@pytest.mark.parametrize("k", LONG)
def test_long_vectors(dtype, k):
    x = draw(k, 3.0, 1e3, dtype, seed=k)
    assert faults(x, 1.0, ["vector"]) == []


@float_types
def test_long_columns(dtype):
    x = draw(10**6, 3.0, 1e3, dtype, seed=11)
    expected = oracle.expect(x, 0.7)
    columns = np.stack([x, x[::-1], x], axis=1)
    for name in oracle.FUNCTIONS:
        result = getattr(fastmax, name)(columns, 0.7)
        assert oracle.fault(name, result[..., 0], expected) == ""


@float_types
@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("spread", [0.1, 10.0, 300.0])
def test_temperatures(dtype, exponent, spread):
    """x is scaled with T where it can be; where it cannot, T is as good as 0 or inf."""
    temperature = 10.0**exponent * 1.37
    info = np.finfo(dtype)
    found = []
    for seed, k in enumerate((3, 17, 100, 1000)):
        noise = np.random.default_rng(seed).normal(scale=spread, size=k)
        scale = np.clip(temperature, 1e4 * float(info.smallest_subnormal), float(info.max) / 1e4)
        found += faults((noise * scale).astype(dtype), temperature, ["vector", "columns"])
    assert found == []


@float_types
@pytest.mark.parametrize("offset", [1.0, 1e3, 1e6, -1e6])
@pytest.mark.parametrize("exponent", [-300, -30, -6, -3, 3, 6, 30, 300])
def test_temperatures_far_from_the_offset(dtype, offset, exponent):
    found = []
    for seed, k in enumerate((2, 33, 1000)):
        x = draw(k, 1.0, offset, dtype, seed)
        found += faults(x, 10.0**exponent, ["vector", "columns", "strided"])
    assert found == []


@float_types
@pytest.mark.parametrize("temperature", [1.0, 1e-3, 7.3])
def test_large_gaps_over_a_large_offset(dtype, temperature):
    """x / T loses its fraction, and the gaps are exact all the same."""
    found = []
    for seed, offset in enumerate((0.0, 1e4, -1e5, 1e6)):
        gaps = np.random.default_rng(seed).uniform(-90, 0, size=200) * temperature
        found += faults((offset + gaps).astype(dtype), temperature, ["vector", "columns"])
    assert found == []


@float_types
@pytest.mark.parametrize("path", ["vector", "rows", "columns", "strided"])
def test_subnormal_results(dtype, path):
    info = np.finfo(dtype)
    low = float(np.log(np.float64(info.smallest_subnormal)))
    x = np.append(0.0, np.linspace(low - 2, low + 20, 999)).astype(dtype)
    for temperature in (1.0, 2.0**-20, 3.0):
        scaled = (x * dtype(temperature)).astype(dtype)
        assert faults(scaled, temperature, [path]) == []


@float_types
def test_subnormal_results_of_many_entries(dtype):
    """A sum of 10^5 pushes probabilities below the normal range that their terms are within."""
    low = float(np.log(np.float64(np.finfo(dtype).smallest_subnormal)))
    tail = np.linspace(low, low + 40, 200)
    x = np.append(np.zeros(100_000), tail).astype(dtype)
    assert faults(x, 1.0, ["vector", "strided"]) == []


@float_types
@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1.0, 1e3, 1e30])
def test_small_logarithms_of_sums_at_a_maximum_of_0(dtype, temperature):
    """Where max(x) is 0, logsumexp is T log(sum), however small the logarithm is beside T."""
    found = []
    for gap in (1.0, 20.0, 60.0, 90.0, 104.0, 120.0, 160.0, 700.0, 750.0, 800.0):
        found += faults(np.array([-gap * temperature, 0.0]).astype(dtype), temperature, ["vector"])
    assert found == []


# What a search for the worst found while parts of terms that a total leaves out were summed up plainly:
# errors of 4.9, 7.6, 4.4 and 6.7 ulp. The largest term is rounded by more than the others are together.
FAINT = {
    "6 float32": (0.9096179235641078, "-46.147896 -36.9241 -46.453934 -43.242767 -32.783726 0.024575874"),
    "17 float32": (
        1.0,
        "-26.33183 -63.140186 -39.219604 -44.053566 -34.197884 -47.917706 0.71783423 -44.24103 -36.7004 "
        "-53.385296 -94.99775 -45.015114 -42.988644 -44.526787 -44.449818 -70.07491 -36.496635",
    ),
    "6 float64": (
        0.971121478831861,
        "-179.70699358473726 -192.3436541976215 -192.39265559237603 -192.58071760140268 "
        "-196.78306746991746 0.0",
    ),
    "17 float64": (
        0.8874471759496763,
        "-138.75006267592272 -137.51023207257748 -140.32007246065953 -121.15807613994504 "
        "-139.32503452209068 0.0 -144.81793045158466 -139.15804164359113 -138.56518761358413 "
        "-137.1228281642186 -139.48498166489233 -138.51215121344057 -2732875.799153363 "
        "-13156.323613657387 -137.27243529225322 -137.8647955194346 -137.2964897278629",
    ),
}


@pytest.mark.parametrize("case", FAINT)
def test_entries_that_are_faint_beside_one(case):
    temperature, entries = FAINT[case]
    x = np.array(entries.split(), dtype=case.split()[1])
    paths = ["vector", "strided", "rows", "many rows", "columns", "many columns"]
    assert faults(x, temperature, paths) == []


# The same for chunks whose sums were rounded to pairs before they were added: 4.4 and 4.8 ulp. The entries
# stand first in a lane of each chunk.
FAINT_IN_CHUNKS = {
    "2 float32": (
        (3, 3),
        2.2788834894684644,
        "-106.177055 18.656736 -118.471794 -118.86503 -80.880745 -101.794983",
    ),
    "3 float64": (
        (4, 4, 2),
        1.551497409782868,
        "0.0 -86.11710502738626 -66.53443155262389 -71.17508112604011 -95.65436206118481 -63.34946128063832 "
        "-56.66939144533405 -74.499545952941 -86.4313291092393 -89.41082099147759",
    ),
}


@pytest.mark.parametrize("path", ["strided", "columns", "many columns", "vector", "rows"])
@pytest.mark.parametrize("case", FAINT_IN_CHUNKS)
def test_chunks_that_are_faint_beside_one(case, path):
    counts, temperature, entries = FAINT_IN_CHUNKS[case]
    entries = np.array(entries.split(), dtype=case.split()[1])
    lanes, step = 1, 1
    if path in ("vector", "rows"):
        lanes, step = LANE_BYTES // entries.itemsize, LANE_BYTES // REGISTERS // entries.itemsize
    places = [chunk * CHUNK * lanes + i * step for chunk, count in enumerate(counts) for i in range(count)]
    x = np.full(places[-1] + 1000, -1e4, dtype=entries.dtype)
    x[places] = entries
    assert faults(x, temperature, [path]) == []


@float_types
@pytest.mark.parametrize("magnitude", [0.25, 0.5, 0.9, 1.0])
def test_entries_near_the_ends_of_the_range(dtype, magnitude):
    largest = magnitude * float(np.finfo(dtype).max)
    unit = np.random.default_rng(12).uniform(-1, 1, size=50)
    found = []
    for temperature in (1e-300, 1.0, largest / 100, largest / 3, min(largest * 3, 1.7e308)):
        found += faults((unit * largest).astype(dtype), temperature, ["vector", "columns"])
    assert found == []


@float_types
def test_every_gap_between_two_entries(dtype):
    """softmax((0, -g)) for gaps g over the whole range in which it is not 0 or 1/2."""
    low = float(np.log(np.float64(np.finfo(dtype).smallest_subnormal)))
    gaps = np.concatenate([np.logspace(-12, 0, 60), np.linspace(1, 2 - low, 400)]).astype(dtype)
    pairs = np.stack([np.zeros_like(gaps), -gaps], axis=1)
    expected = [oracle.expect(pair) for pair in pairs]
    for name in oracle.FUNCTIONS:
        results = getattr(fastmax, name)(pairs, axis=1)
        found = [oracle.fault(name, *case) for case in zip(results, expected, strict=True)]
        assert [fault for fault in found if fault] == []


def triples(count, dtype, rng):
    """Draw slices of a maximum and two entries at gaps that are hard for an exponential, and T."""
    temperature = np.exp2(rng.uniform(-4, 4, count))
    offset = np.exp2(rng.uniform(-6, 18 if dtype == np.float32 else 42, count)) * rng.integers(-1, 2, count)
    octaves = rng.choice([0.0, 0.415, 0.5, 0.585, 1.0], (count, 2)) + rng.normal(scale=0.05, size=(count, 2))
    octaves = np.abs(octaves + rng.integers(0, 12, (count, 2)) * rng.integers(0, 2, (count, 1)))
    gaps = np.column_stack([np.zeros(count), octaves * math.log(2)])
    return ((offset[:, None] - gaps) * temperature[:, None]).astype(dtype), temperature


def rough_errors(x, temperature):
    """Largest error in ulp of each row, from float64 or long doubles, which may be no better than float64."""
    wider = np.float64 if x.dtype == np.float32 else np.longdouble
    gaps = (x.astype(wider) - x.max(axis=1, keepdims=True)) / temperature[:, None]
    terms = np.exp(gaps)
    exact = terms / terms.sum(axis=1, keepdims=True)
    return (np.abs(fastmax.softmax(x, temperature, axis=1) - exact) / np.spacing(exact.astype(x.dtype))).max(
        1
    )


@float_types
def test_search_for_the_worst_of_three_entries(dtype):
    """The worst slices found so far are changed a little, over and over; mpmath judges the last ones."""
    rng = np.random.default_rng(7)
    x, temperature = triples(20_000, dtype, rng)
    for _ in range(60):
        worst = np.argsort(rough_errors(x, temperature))[-1000:]
        x, temperature = x[worst], temperature[worst]
        chosen = rng.integers(len(x), size=10_000)
        near, near_temperature = x[chosen], temperature[chosen]
        near += np.spacing(near) * rng.integers(-64, 65, near.shape) * rng.integers(0, 2, near.shape)
        near_temperature *= 1 + rng.normal(size=10_000) * 10.0 ** rng.uniform(-20, -3, 10_000)
        others, other_temperatures = triples(5_000, dtype, rng)
        x = np.concatenate([x, near.astype(dtype), others])
        temperature = np.concatenate([temperature, near_temperature, other_temperatures])
    worst = np.argsort(rough_errors(x, temperature))[-50:]
    found = [
        oracle.errors("softmax", PATHS[path](fastmax.softmax, x[i], temperature[i]), expected).max()
        for i in worst
        for expected in [oracle.expect(x[i], float(temperature[i]))]
        for path in ("vector", "columns", "strided")
    ]
    # The bound of 2 ulp has room for what the search does not find.
    assert max(found) < 1.75


@float_types
@pytest.mark.parametrize("octaves", [0.43, 0.48, 0.53, 1.2])
def test_neighbours_keep_their_order(dtype, octaves):
    rng = np.random.default_rng(8)
    for temperature in rng.uniform(0.2, 3, 20):
        x = np.empty(50_001, dtype)
        x[1:] = np.spacing(dtype(-octaves * math.log(2) * temperature)) * np.arange(50_000)
        x[1:] += dtype(-octaves * math.log(2) * temperature)
        x[0] = 0
        probs = fastmax.softmax(x, temperature)[1:]
        assert (np.diff(probs) * np.sign(np.diff(x[1:])) >= 0).all()


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("k", [1, 2, 17, 1000])
def test_16_bits_are_rounded_once(dtype, k):
    found = []
    for seed, temperature in enumerate((0.1, 1.0, 10.0)):
        found += faults(draw(k, 3.0, 0.5, dtype, seed), temperature, ["vector", "columns"])
    assert found == []


def test_logarithm_of_one_plus_is_within_an_ulp():
    @numba.njit(error_model="numpy")
    def evaluate(x, out):
        for i in range(len(x)):
            out[i] = log_one_plus(x[i])

    rng = np.random.default_rng(20)
    powers = 2.0 ** np.arange(32)
    seams = np.concatenate([powers - 1, powers * math.sqrt(2) - 1])
    x = np.concatenate(
        [10 ** rng.uniform(-320, 10, 5000), rng.uniform(0, 4, 5000), seams, np.nextafter(seams, 0), [0.0]]
    )
    result = np.empty_like(x)
    evaluate(x, result)
    with mpmath.workprec(200):
        exact = [mpmath.log1p(value) for value in x.tolist()]
        errors = [abs(mpmath.mpf(got) - want) for got, want in zip(result.tolist(), exact, strict=True)]
    ulp = np.spacing(np.array([float(want) for want in exact]))
    assert max(float(error / unit) for error, unit in zip(errors, ulp.tolist(), strict=True)) < 1.0
