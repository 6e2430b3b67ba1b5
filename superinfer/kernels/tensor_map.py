"""Tensor maps: how Hopper's tensor copies find the boxes of a matrix.

CUDA driver API, "Tensor Map Object Management".
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import numpy as np

BOX = 64  # of the depth, 128 bytes: what a tensor copy swizzles


@functools.cache
def _encode() -> Callable[..., int]:
    """The driver's cuTensorMapEncodeTiled. Not that of cuda.bindings, whose CUtensorMap need not lie at a multiple of
    64 bytes, as the driver asks for (github.com/NVIDIA/cuda-python/pull/1692)."""
    call = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    pointer, number = ctypes.c_void_p, ctypes.c_int
    call.argtypes = (pointer, number, ctypes.c_uint32, *(pointer,) * 5, *(number,) * 4)
    return call


@functools.lru_cache(maxsize=1 << 13)
def tensor_map(address: int, rows: int, depth: int, tall: int, wide: int = 0) -> np.ndarray:
    """CUtensorMap of a contiguous [rows, depth] of 2-byte numbers at an address, by boxes [tall, 64], swizzled, or
    [tall, wide], which are not; 16 words. It says nothing else of what is there, so that a tensor freed and another
    made at the same place is no matter."""
    from cuda.bindings import driver

    from superinfer.kernels.nvrtc import checked

    room = np.zeros(24, dtype=np.uint64)
    skipped = -room.ctypes.data % 64 // 8
    words = room[skipped : skipped + 16]
    dims, strides = np.array([depth, rows], dtype=np.uint64), np.array([2 * depth], dtype=np.uint64)
    box, ones = np.array([wide or BOX, tall], dtype=np.uint32), np.ones(2, dtype=np.uint32)
    swizzles = driver.CUtensorMapSwizzle
    swizzle = swizzles.CU_TENSOR_MAP_SWIZZLE_NONE if wide else swizzles.CU_TENSOR_MAP_SWIZZLE_128B
    status = _encode()(
        words.ctypes.data, driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT16.value, 2, address,
        dims.ctypes.data, strides.ctypes.data, box.ctypes.data, ones.ctypes.data,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE.value,
        swizzle.value,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B.value,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE.value,
    )  # fmt: skip
    checked((driver.CUresult(status),))
    return words
