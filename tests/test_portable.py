"""The passes vectorise on processors that this machine need not have: their code is compiled, not run."""

import re

import llvmlite.binding as llvm
import numba
import pytest
from numba import types

from fastmax import _slice
from fastmax._math import Scale

VECTOR_FMA = {
    ("aarch64-unknown-linux-gnu", "neoverse-n1"): r"\bfml[as]\s+v\d+\.[24][sd]",
    ("x86_64-unknown-linux-gnu", "haswell"): r"\bvfn?m\w+p[sd]\s.*%ymm",
}
SCALAR_FMA = r"\bfn?m(add|sub)\s+[sd]\d|\bvfn?m\w+s[sd]\s"


@pytest.fixture(scope="module", autouse=True)
def targets():
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()


def compiled_for(triple, cpu, dtype):
    """Assembly of the pass that takes most of the time, for another processor."""
    array, size = types.CPointer(dtype), types.intp
    scale = types.NamedTuple([dtype] * 4, Scale)
    dispatcher = numba.njit(error_model="numpy")(_slice.lane_sums.py_func)
    signature = (array, size, size, scale, types.none, array, size, types.none)
    dispatcher.compile(signature)
    code = dispatcher.inspect_llvm(signature)
    code = re.sub(r'target triple = ".*"', f'target triple = "{triple}"', code)
    code = re.sub(r'target datalayout = ".*"|"target-(cpu|features)"="[^"]*"', "", code)
    module = llvm.parse_assembly(code)
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
    return machine.emit_assembly(module)


@pytest.mark.parametrize("dtype", [types.float32, types.float64], ids=str)
@pytest.mark.parametrize(("triple", "cpu"), VECTOR_FMA)
def test_terms_are_vectors_on(triple, cpu, dtype):
    assembly = compiled_for(triple, cpu, dtype)
    assert len(re.findall(VECTOR_FMA[triple, cpu], assembly)) >= 26  # at least two registers at a time
    assert not re.search(SCALAR_FMA, assembly)
    assert not re.search(r"\b(fmaf?|ldexpf?|exp2f?|rintf?)\b", assembly)  # as calls of a library
