"""The CUDA kernels as the compiler makes them, without a GPU: PTX, and what the assembler says of it."""

import importlib
import re

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from fastmax import _cuda_plan, _cuda_target

try:
    importlib.import_module("cuda.bindings.nvjitlink").version()
    importlib.import_module("cuda.bindings.nvvm").version()
except Exception as error:  # whatever a missing or old library raises
    pytest.skip(f"the CUDA compiler is not installed: {error}", allow_module_level=True)

ROWS, COLUMNS = _cuda_plan.ROWS, _cuda_plan.COLUMNS
HOPPER = (9, 0)


def full(operation, dtype, class_, access, function=None, per_slice=False):
    """Spec of the largest kernel of a class."""
    lanes = 16 // _cuda_plan.ITEMSIZE[dtype]
    words = _cuda_plan.held_words(class_, operation, dtype) // (2 if dtype == "float64" else 1)
    verb = function or ("transform" if _cuda_plan.elementwise(operation) else "reduce")
    return _cuda_plan._spec(verb, operation, dtype, class_, max(1, words // lanes), access, per_slice)


def strided(operation):
    return _cuda_plan.strided_plan(operation, "float32", 1000, False, True, True, (2, 1))


def short(operation, dtype, n):
    return _cuda_plan.plan(operation, dtype, n, False, True, 1, False, HOPPER)[0]


# A kernel of each kind, with the most entries per thread, where registers are scarce.
SPECS = {
    "short": short("softmax", "float32", 32),
    "short float64": short("log_softmax", "float64", 16),
    "warp": full("softmax", "float32", ROWS[4], 4),
    "warp float64": full("entropy", "float64", ROWS[4], 2),
    "block": full("softmax", "float32", ROWS[11], 4),
    "block, not aligned": full("softmax", "float32", ROWS[11], 1),
    "block bfloat16": full("softmax", "bfloat16", ROWS[11], 8),
    "block float64": full("softmax", "float64", ROWS[11], 2),
    "block log_softmax float16": full("log_softmax", "float16", ROWS[11], 8, per_slice=True),
    "block logsumexp": full("logsumexp", "float32", ROWS[11], 4),
    "block entropy": full("entropy", "float32", ROWS[11], 4),
    "cluster": full("softmax", "float32", ROWS[10], 4),
    "cluster entropy": full("entropy", "float32", ROWS[12], 1),
    "column": full("softmax", "float32", COLUMNS[3], 1),
    "column logsumexp": full("logsumexp", "float32", COLUMNS[1], 1),
    "first part": full("softmax", "float32", _cuda_plan.SPLIT_ROWS, 4, "summarise"),
    "second part": full("log_softmax", "float32", _cuda_plan.SPLIT_ROWS, 4, "transform_parts"),
    "merging": _cuda_plan._spec("merge_slices", "softmax", "float32", _cuda_plan.STRIDED_BLOCK, 1, 1, False),
    "part of a column": full("softmax", "float32", _cuda_plan.SPLIT_COLUMNS, 1, "transform_parts", True),
    "strided": strided("softmax"),
}


def assembled(ptx, capability):
    """Return the registers, stack and spilled bytes of a kernel's machine code."""
    _, report = _cuda_target.assemble(ptx, capability)
    (registers,) = re.findall(r"Used (\d+) registers", report)
    ((stack, spilled),) = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)
    return int(registers), int(stack), int(spilled)


@pytest.mark.parametrize("kind", SPECS)
def test_kernels_fit_the_registers_and_keep_to_their_precision(kind):
    spec = SPECS[kind]
    ptx = _cuda_plan.build(spec, HOPPER)
    registers, stack, spilled = assembled(ptx, HOPPER)
    assert (stack, spilled) == (0, 0)
    # Registers are given out by eights, and there are 65536 for the blocks that a multiprocessor shall hold.
    assert -(-registers // 8) * 8 * spec.threads * spec.resident <= 65536
    assert (".f64" in ptx) == (spec.dtype == "float64")
    if spec.operation == "softmax":  # the others call the log1p of NVIDIA's library, which has its own ways
        # No product may have been contracted with a sum: all are rounded by name.
        assert not re.findall(r"\b(?:add|sub|mul|fma)\.f(?:32|64)", ptx)
        assert ".ftz" not in ptx
        assert ".approx" not in ptx
    kinds = {"float32": "v4.f32", "float64": "v2.f64"}
    if spec.access * _cuda_plan.ITEMSIZE[spec.dtype] == 16:
        wide = kinds.get(spec.dtype, "v4.u32")
        assert ptx.count(f"ld.global.{wide}") >= spec.pieces
        if spec.function.startswith("transform"):
            assert ptx.count(f"st.global.{wide}") == spec.pieces


@pytest.mark.parametrize("capability", [(8, 0), (10, 0)])
@pytest.mark.parametrize("kind", ["block bfloat16", "second part"])
def test_kernels_compile_for_other_gpus(kind, capability):
    ptx = _cuda_plan.build(SPECS[kind], capability)
    assert f".target sm_{capability[0]}{capability[1]}" in ptx
    _, stack, spilled = assembled(ptx, capability)
    assert (stack, spilled) == (0, 0)


def test_laws_are_worked_out_in_float64():
    ptx = _cuda_plan.build(_cuda_plan.laws_plan("float32", "float32", 1), HOPPER)
    assert "div.rn.f64" in ptx
