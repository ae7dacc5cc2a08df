"""Every code path of every backend returns the exact values, within the table of tolerances."""

import numpy as np
import oracle
import pytest
from conformance import failures
from marks import SIXTEEN_BITS, nightly
from paths import IN_PLACE, PATHS

# a backend is a module with the four functions; one that cannot be imported is skipped
BACKENDS = {"cpu": "fastmax"}


# Of float64 other tests take masks by day as well.
AT_NIGHT = [(path, name) for path in ("masked", "masked columns") for name in ("log_softmax", "entropy")]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return pytest.importorskip(BACKENDS[request.param])


@pytest.mark.parametrize(
    ("path", "name", "dtype"),
    [
        *((path, name, np.float32) for path in PATHS for name in oracle.FUNCTIONS),
        *(
            (path, name, np.float64)
            for path in PATHS
            for name in oracle.FUNCTIONS
            if (path, name) not in AT_NIGHT
        ),
        *nightly(*((*case, np.float64) for case in AT_NIGHT)),
    ],
)
def test_path_conforms(backend, path, name, dtype):
    assert failures(getattr(backend, name), name, PATHS[path], dtype) == []


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", oracle.ELEMENTWISE)
@pytest.mark.parametrize("path", IN_PLACE)
def test_path_in_place_conforms(backend, path, name, dtype):
    assert failures(getattr(backend, name), name, IN_PLACE[path], dtype) == []


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize(
    ("path", "name"),
    [
        *((path, name) for path in ("vector", "rows", "columns") for name in oracle.FUNCTIONS),
        *((path, "softmax") for path in ("strided", "masked", "out given")),
        *nightly(*((p, name) for p in ("strided", "masked", "out given") for name in oracle.FUNCTIONS[1:])),
    ],
)
def test_16_bits_conform(backend, path, name, dtype):
    assert failures(getattr(backend, name), name, PATHS[path], dtype) == []
