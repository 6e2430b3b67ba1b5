// What kernels of warpgroup products share (PTX ISA, "Asynchronous warpgroup level matrix instructions"), beside the product
// itself, whose header is made for its columns (`hopper.py`).
//
// Layout of operands: "Matrix descriptor" and "Swizzling modes", 128B: eight rows of 128 bytes are 1024 that follow each
// other; a step of 16 along the depth is 32 bytes in each of them.

#pragma once

#include "hopper.cuh"
#include "multiply_group.cuh"

constexpr int BOX = 64;        // of the depth: the 128 bytes that a swizzle spans
constexpr int LINE = BOX * 2;  // bytes of a box's row

__device__ __forceinline__ u64 descriptor(u32 address) {
  return u64((address & 0x3FFFF) >> 4) | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}

__device__ __forceinline__ void group_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
