"""The passes vectorise on processors that this machine need not have: their code is compiled, not run."""

import os
import re
import subprocess
import sys

import pytest

VECTOR_FMA = {
    ("aarch64-unknown-linux-gnu", "neoverse-n1"): r"\bfml[as]\s+v\d+\.[24][sd]",
    ("x86_64-unknown-linux-gnu", "haswell"): r"\bvfn?m\w+p[sd]\s.*%ymm",
    ("x86_64-unknown-linux-gnu", "skylake-avx512"): r"\bvfn?m\w+p[sd]\s.*%zmm",
}
# Instructions that pick from a table, two for a register.
LOOKUP = {
    ("haswell", "float32"): r"\bvpermilps\s+[^$].*, %ymm\d+, %ymm",
    ("haswell", "float64"): r"\bvpermilpd\s+[^$].*, %ymm\d+, %ymm",
    ("skylake-avx512", "float32"): r"\bvperm(d|ps)\s.*%zmm",
    ("skylake-avx512", "float64"): r"\bvperm[it]2\w+\s.*%zmm",
}
SCALAR_FMA = r"\bfn?m(add|sub)\s+[sd]\d|\bvfn?m\w+s[sd]\s"
FEATURES = {"haswell": "+avx2,+fma", "skylake-avx512": "+avx512f,+avx512cd,+avx512bw,+avx512dq,+avx512vl"}
REGISTERS = {"skylake-avx512": 2}  # that a value fills, elsewhere 4

# Prints the assembly of the pass that takes most of the time, for another processor.
PROGRAM = """
import re, sys
import llvmlite.binding as llvm
import numba
from numba import types
from fastmax import _lanes, _slice
from fastmax._math import Scale

triple, cpu, dtype = sys.argv[1], sys.argv[2], getattr(types, sys.argv[3])
llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
array, size = types.CPointer(dtype), types.intp
scale = types.NamedTuple([dtype] * len(Scale._fields), Scale)
count = _lanes.REGISTER_BYTES * 8 // dtype.bitwidth
zero = _lanes.Lanes(dtype, count)
signature = (array, size, size, scale, types.none, types.none, array, size, types.none, zero)
target = numba.njit(error_model="numpy")(_slice.lane_sums.py_func)
target.compile(signature)
code = target.inspect_llvm(signature)
code = re.sub(r'target triple = ".*"', f'target triple = "{triple}"', code)
code = re.sub(r'target datalayout = ".*"|"target-(cpu|features)"="[^"]*"', "", code)
machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
print(machine.emit_assembly(llvm.parse_assembly(code)))
"""


def compiled_for(triple, cpu, dtype):
    """Assembly that a process prints which takes itself to run on such a processor."""
    environment = os.environ | {
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": FEATURES.get(cpu, ""),
    }
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, triple, cpu, dtype],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("triple", "cpu"), VECTOR_FMA)
def test_terms_are_vectors_on(triple, cpu, dtype):
    assembly = compiled_for(triple, cpu, dtype)
    # the seven of a term at least; both for whole vectors and for the last
    assert len(re.findall(VECTOR_FMA[triple, cpu], assembly)) >= 2 * 7 * REGISTERS.get(cpu, 4)
    assert not re.search(SCALAR_FMA, assembly)
    assert not re.search(r"\b(fmaf?|ldexpf?|exp2f?|rintf?)\b", assembly)  # as calls of a library
    if (cpu, dtype) in LOOKUP:
        assert len(re.findall(LOOKUP[cpu, dtype], assembly)) >= 2 * 2 * REGISTERS.get(cpu, 4)
    if cpu != "skylake-avx512":
        assert not re.search(r"\bvperm(d|ps|[it]2\w+)\s.*%zmm", assembly)
