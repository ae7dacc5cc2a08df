"""The benchmark of the CUDA kernels, as far as it goes without a GPU."""

import math
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from fastmax import _cuda_launch, _cuda_plan

torch: Any = pytest.importorskip("torch")

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark_cuda.py"
HOPPER = _cuda_plan.Gpu((9, 0), 132, 227 * 2**10, 16)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return types.SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def test_types_that_are_not_asked_for_are_neither_compiled_nor_checked(script, monkeypatch):
    """A GPU without types of 16 bits would fail otherwise."""
    specs = [spec for spec, _ in script.specs_needed(["float32"], HOPPER)]
    assert {spec.dtype for spec in specs} == {"float32"}
    checked = []
    names = script.check_everything.__globals__
    monkeypatch.setitem(names, "check_case", lambda torch, operation, dtype, *_: checked.append(dtype) or 0.0)
    monkeypatch.setitem(names, "lengths_to_check", lambda operation, dtype: [3])
    assert script.check_everything(None, ["float32", "float64"]) == (8, [])
    assert checked == 4 * ["float32", "float64"]


@pytest.mark.parametrize(("fails", "shares"), [(False, [1.0, 1.0]), (True, [math.nan])])
def test_without_a_copy_nothing_is_measured_by_it(script, monkeypatch, fails, shares):
    def copy(x):
        if fails:
            raise RuntimeError("out of memory")
        return x

    makers = {"copy": lambda: copy, "torch": lambda: lambda x: torch.softmax(x, 1)}
    names, usual, absent = script.time_case.__globals__, torch.randn, {}
    monkeypatch.setitem(names, "contenders", lambda *_: makers)
    monkeypatch.setitem(names, "device_seconds", lambda *_: [1.0])
    monkeypatch.setitem(names, "CACHE_BYTES", 1)
    monkeypatch.setattr(torch, "randn", lambda shape, device, dtype: usual(shape, dtype=dtype))
    rows = script.time_case(torch, "rows", "float32", (3, 5), 1, absent)
    assert [row["of copy"] for row in rows] == pytest.approx(shares, nan_ok=True)
    assert list(absent) == ["copy on float32 3x5"] * fails


def test_a_pytorch_without_cuda_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(_cuda_launch, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--output", str(tmp_path / "new")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 1
    assert "cannot use the GPU" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
