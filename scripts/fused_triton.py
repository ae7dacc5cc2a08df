"""The fused softmax that one writes in Triton, for `benchmark_cuda.py`: a program holds a row."""

from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def _rows(x, out, n, block: tl.constexpr):
    """Softmax of the row that belongs to this program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < n
    entries = tl.load(x + row * n + columns, mask=inside, other=float("-inf"))
    if entries.dtype.primitive_bitwidth == 16:
        entries = entries.to(tl.float32)
    terms = tl.exp(entries - tl.max(entries, axis=0))
    tl.store(out + row * n + columns, terms / tl.sum(terms, axis=0), mask=inside)


def softmax(x):
    """Softmax of the rows of a contiguous 2-d tensor."""
    count, n = x.shape
    out = torch.empty_like(x)
    block = triton.next_power_of_2(n)
    warps = min(max(block // 512, 1), 16)
    kernel: Any = _rows
    kernel[(count,)](x, out, n, block, num_warps=warps)
    return out
