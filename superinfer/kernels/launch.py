"""How kernels of one step follow each other on a GPU.

Programmatic dependent launch (CUDA programming guide, 'Programmatic Dependent Launch'; Hopper and later): a kernel
starts while the one before it still runs, does what depends on nothing (fetches weights), and waits before it reads or
writes anything else. Between the short kernels of a decode step that hides a launch each.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import triton
import triton.language as tl


@functools.cache
def _overlaps(device: int) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 9


def overlap(x: torch.Tensor) -> dict[str, Any]:
    """Launch options of a kernel that has the constant PDL and calls `begin` with it before all that depends."""
    if not x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1" or not _overlaps(x.device.index or 0):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


@triton.jit
def begin(PDL: tl.constexpr):
    """The next kernel may start; go on when the one before is over and its results can be seen."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(address):
    """Bring a 128-byte line to the second-level cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )
