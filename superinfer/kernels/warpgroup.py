"""The header that kernels of warpgroup products include, made for a number of columns."""

from __future__ import annotations


def made_for(columns: int) -> tuple[tuple[str, str], ...]:
    """The header of warpgroup products of 64 rows by so many columns: an instruction with a register for each sum."""
    sums = columns // 2
    places = ", ".join(f"%{i}" for i in range(sums))
    held = ", ".join(f'"+f"(d[{i}])' for i in range(sums))
    text = f"""#pragma once

// d[64 x {columns}] += a[64 x 16] b[{columns} x 16]^T, begun; a and b: descriptors.
__device__ __forceinline__ void multiply_group(float (&d)[{sums}], u64 a, u64 b) {{
  asm volatile("wgmma.mma_async.sync.aligned.m64n{columns}k16.f32." TYPE "." TYPE
               " {{{places}}}, %{sums}, %{sums + 1}, 1, 1, 1, 0, 0;" : {held} : "l"(a), "l"(b));
}}

// All but the last LEFT of the groups that were committed are over.
template <int LEFT>
__device__ __forceinline__ void group_wait(float (&d)[{sums}]) {{
  asm volatile("wgmma.wait_group.sync.aligned %{sums};" : {held} : "n"(LEFT) : "memory");
}}
"""
    return (("multiply_group.cuh", text),)
