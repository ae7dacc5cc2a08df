"""The CUDA kernels as the compiler makes them, without a GPU: PTX, and what the assembler says of it."""

import functools
import importlib
import itertools
import re

import oracle
import pytest
from marks import nightly

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from fastmax import _cuda_plan, _cuda_target

try:
    importlib.import_module("cuda.bindings.nvjitlink").version()
    importlib.import_module("cuda.bindings.nvvm").version()
except Exception as error:  # whatever a missing or old library raises
    pytest.skip(f"the CUDA compiler is not installed: {error}", allow_module_level=True)

HOPPER = _cuda_plan.Gpu((9, 0), 132, 227 * 2**10)
CLUSTERED = HOPPER._replace(cluster=16)


def planned(operation, dtype, n, alignment="aligned", *, columns=0, per_slice=False, gpu=HOPPER):
    """Return the first spec for slices of n entries, which are rows or so many neighbouring columns."""
    packed, line = not columns, _cuda_plan.line_of(dtype, columns) if columns else 0
    return _cuda_plan.plan(operation, dtype, n, line, packed, alignment, per_slice, gpu)[0]


def parts(function, operation, class_, access, *, per_slice=False):
    return _cuda_plan._spec(function, operation, "float32", class_, class_.words // 4, access, per_slice)


def strided(operation):
    return _cuda_plan.strided_plan(operation, "float32", 1000, False, True, True, (2, 1))


# A kernel of each kind, with the most entries per thread, where registers are scarce.
SPECS = {
    "short": planned("softmax", "float32", 31, "shifted"),
    "short float64": planned("log_softmax", "float64", 15, "shifted"),
    "warp": planned("softmax", "float32", 1280),
    "warp, shifted": planned("softmax", "float32", 1025, "shifted"),
    "warp bfloat16, shifted": planned("softmax", "bfloat16", 2041, "shifted"),
    "warp float64": planned("entropy", "float64", 640),
    "warp float64, shifted": planned("softmax", "float64", 253, "shifted"),
    "half a warp": planned("softmax", "bfloat16", 1145, "shifted"),
    "block": planned("softmax", "float32", 6144),
    "block, not aligned": planned("softmax", "float32", 6144, "apart"),
    "block bfloat16": planned("softmax", "bfloat16", 8192),
    "block float64": planned("softmax", "float64", 3072),
    "block log_softmax float16": planned("log_softmax", "float16", 8192, per_slice=True),
    "block logsumexp": planned("logsumexp", "float32", 6144),
    "block entropy": planned("entropy", "float32", 6144),
    "tile": planned("softmax", "float32", 16000),
    "tile, not aligned": planned("log_softmax", "float32", 16001, "apart"),
    "team": planned("softmax", "float32", 100_000),
    "team bfloat16": planned("softmax", "bfloat16", 200_000, "shifted", per_slice=True),
    "team entropy": planned("entropy", "float32", 100_000),
    "cluster": planned("softmax", "float32", 128_256, gpu=CLUSTERED),
    "cluster bfloat16": planned("softmax", "bfloat16", 200_000, "shifted", per_slice=True, gpu=CLUSTERED),
    "cluster log_softmax": planned("log_softmax", "float32", 100_001, "apart", gpu=CLUSTERED),
    "lines of a cluster float16": planned("softmax", "float16", 10_000, columns=64, gpu=CLUSTERED),
    "narrow lines of a cluster": planned("softmax", "float32", 20_000, columns=4, gpu=CLUSTERED),
    "columns of a cluster": planned("logsumexp", "float32", 10_000, columns=64, gpu=CLUSTERED),
    "lines": planned("softmax", "float32", 1000, columns=64),
    "lines bfloat16": planned("softmax", "bfloat16", 1000, columns=64),
    "lines of a team": planned("softmax", "float32", 10_000, columns=64),
    "columns": planned("entropy", "float32", 1000, columns=64, per_slice=True),
    "columns in registers": planned("softmax", "float32", 768, "apart", columns=64),
    "short columns in registers": planned("softmax", "float32", 128, "apart", columns=64, per_slice=True),
    "half a warp, not aligned": planned("softmax", "bfloat16", 1152, "apart", per_slice=True),
    "warp float64, laws": planned("softmax", "float64", 255, "shifted", per_slice=True),
    "first part": parts("summarise", "softmax", _cuda_plan.SPLIT_ROWS, 4),
    "second part": parts("transform_parts", "log_softmax", _cuda_plan.SPLIT_ROWS, 4),
    "merging": _cuda_plan._spec("merge_slices", "softmax", "float32", _cuda_plan.STRIDED_BLOCK, 1, 1, False),
    "part of a column": parts("transform_parts", "softmax", _cuda_plan.SPLIT_COLUMNS, 1, per_slice=True),
    "strided": strided("softmax"),
}


# One of each function, those that fill their registers.
BY_DAY = (
    *("short", "warp float64", "warp float64, shifted", "block", "tile", "team entropy", "cluster bfloat16"),
    *("lines of a cluster float16", "columns", "first part", "part of a column", "merging", "strided"),
    *("short columns in registers", "half a warp, not aligned", "warp float64, laws"),
)


def assembled(ptx, capability):
    """Return the registers, stack and spilled bytes of a kernel's machine code."""
    _, report = _cuda_target.assemble(ptx, capability)
    (registers,) = re.findall(r"Used (\d+) registers", report)
    ((stack, spilled),) = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)
    return int(registers), int(stack), int(spilled)


@pytest.mark.parametrize("kind", [*BY_DAY, *nightly(*(kind for kind in SPECS if kind not in BY_DAY))])
def test_kernels_fit_the_registers_and_keep_to_their_precision(kind):
    spec = SPECS[kind]
    size = _cuda_plan.ITEMSIZE[spec.dtype]
    ptx = _cuda_plan.build(spec, HOPPER.capability)
    registers, stack, spilled = assembled(ptx, HOPPER.capability)
    assert (stack, spilled) == (0, 0)
    # Registers are given out by eights, and there are 65536 for the blocks that a multiprocessor shall hold.
    assert -(-registers // 8) * 8 * spec.threads * spec.resident <= 65536
    assert (".f64" in ptx) == (spec.dtype == "float64")
    if spec.operation == "softmax":  # the others call the log1p of NVIDIA's library, which has its own ways
        # No product may have been contracted with a sum: all are rounded by name.
        assert not re.findall(r"\b(?:add|sub|mul|fma)\.f(?:32|64)", ptx)
        # What is not exact to the last bit: 2**x for types of 16 bits, and a reciprocal that is corrected.
        loose = set(re.findall(r"\b\w+\.approx[.\w]*|\b\w+\.ftz[.\w]*", ptx))
        assert loose <= {"rcp.approx.ftz.f32", *(["ex2.approx.ftz.f32"] if size == 2 else [])}
    kinds = {"float32": "v4.f32", "float64": "v2.f64"}
    if spec.access * size == 16:
        wide = kinds.get(spec.dtype, "v4.u32")
        if spec.function.endswith(_cuda_plan.TILED) or spec.group == "thread":
            assert re.search(r"cp\.async\.cg\.shared\.global(\.L2::256B)? \[%r\d+\], \[%rd\d+\], 16", ptx)
        else:
            assert ptx.count(f"ld.global.{wide}") >= spec.pieces
        if spec.function == "transform":
            assert ptx.count(f"st.global.{wide}") == spec.pieces
        elif spec.function.startswith("transform") and not spec.function.endswith("parts"):
            assert re.search(r"st\.global\.v[24]\.\w+", ptx)


# Lengths for which a class holds the most, or a piece less, by the size of entries; then those of tiles.
LENGTHS = {
    2: (8, 16, 32, 256, 768, 1024, 1152, 1536, 2048, 3072, 4096, 6144, 8192),
    4: (4, 16, 32, 64, 256, 768, 1024, 1280, 2048, 3072, 4096, 6144),
    8: (2, 8, 16, 256, 384, 512, 640, 1024, 1536, 2048, 3072),
}
TILES = (10_000, 50_000, 200_000, 600_000)
COLUMN_LENGTHS = (16, 32, 64, 96, 128, 160, 192, 256, 512, 768)
COLUMN_TILES = (900, 3000, 10_000, 40_000)


def kernels_of(operation, dtype):
    """Return the specs of those kernels of each class that hold the most.

    Of softmax, which asks for several blocks at a time; of others, those that hold the most beside entries.
    """
    size, gpus = _cuda_plan.ITEMSIZE[dtype], (CLUSTERED, HOPPER)
    alignments, laws = ("apart",), (True,)
    if operation == "softmax":
        alignments, laws = ("aligned", "shifted", "apart"), (False, True)
    found = []
    for alignment, per_slice in itertools.product(alignments, laws):
        own = functools.partial(planned, operation, dtype, alignment=alignment, per_slice=per_slice)
        less = 16 // size - 1 if alignment == "shifted" else 0
        found += [own(n - less) for n in LENGTHS[size] if n > less]
        found += [own(n, gpu=gpu) for n in TILES for gpu in gpus]
    for per_slice in laws:
        own = functools.partial(planned, operation, dtype, columns=64, per_slice=per_slice)
        found += [own(n, alignment="apart") for n in COLUMN_LENGTHS]
        found += [own(n, gpu=gpu) for n in COLUMN_TILES for gpu in gpus]
    return list(dict.fromkeys(spec._replace(tile=0) for spec in found))


@pytest.mark.parametrize(
    ("operation", "dtype"),
    nightly(*itertools.product(oracle.FUNCTIONS, ("float32", "float64", "bfloat16"))),
)
def test_no_kernel_spills(operation, dtype):
    report = {}
    for spec in kernels_of(operation, dtype):
        report[spec] = assembled(_cuda_plan.build(spec, HOPPER.capability), HOPPER.capability)
    assert report
    assert {spec: found for spec, found in report.items() if found[1:] != (0, 0)} == {}


@pytest.mark.parametrize(
    ("kind", "capability"),
    [
        *[("block bfloat16", (8, 0)), ("cluster", (10, 0))],
        *nightly(("block bfloat16", (10, 0)), ("team", (8, 0)), ("team", (10, 0))),
        *nightly(*((kind, (major, 0)) for kind in ("lines", "second part") for major in (8, 10))),
    ],
)
def test_kernels_compile_for_other_gpus(kind, capability):
    ptx = _cuda_plan.build(SPECS[kind], capability)
    assert f".target sm_{capability[0]}{capability[1]}" in ptx
    _, stack, spilled = assembled(ptx, capability)
    assert (stack, spilled) == (0, 0)


@pytest.mark.parametrize(
    ("operation", "dtype", "n", "line"),
    [
        *[("softmax", "float32", 262_144, 0), ("logsumexp", "float64", 40_000, 64)],
        *nightly(("softmax", "bfloat16", 60_000, 0)),
        *nightly(("softmax", "float64", 10**6, 0), ("logsumexp", "float64", 60_000, 64)),
        *nightly(("entropy", "bfloat16", 40_000, 64), ("softmax", "float32", 40_000, 64)),
    ],
)
def test_a_block_has_the_shared_memory_for_its_tile_and_its_exchanges(operation, dtype, n, line):
    spec = _cuda_plan.plan(operation, dtype, n, line, not line, "aligned", False, CLUSTERED)[0]
    _, report = _cuda_target.assemble(_cuda_plan.build(spec, HOPPER.capability), HOPPER.capability)
    (found,) = re.findall(r"Used .* (\d+) bytes smem", report)
    assert int(found) <= _cuda_plan.static_bytes(spec)
    _, tile = _cuda_plan.shares(spec, n, _cuda_plan.blocks_needed(spec, n))
    assert int(found) + tile <= CLUSTERED.shared


def test_blocks_of_a_cluster_write_to_each_other():
    ptx = _cuda_plan.build(SPECS["cluster"], HOPPER.capability)
    assert ptx.count("barrier.cluster.arrive.release") == ptx.count("barrier.cluster.wait.acquire") > 1
    assert "st.shared::cluster.f32" in ptx
    assert "barrier.cluster" not in _cuda_plan.build(SPECS["team"], HOPPER.capability)


def test_laws_are_worked_out_in_float64():
    ptx = _cuda_plan.build(_cuda_plan.laws_plan("float32", "float32", 1), HOPPER.capability)
    assert "div.rn.f64" in ptx


def test_an_older_gpu_copies_to_shared_memory_at_once():
    ptx = _cuda_plan.build(SPECS["short"], (7, 5))
    assert "cp.async" not in ptx
    assert "ld.global.v4" in ptx
