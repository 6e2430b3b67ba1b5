// What kernels share whose programs are clusters of two (PTX ISA of these names).

#pragma once

#include "hopper.cuh"

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of both programs.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// At a barrier of one of the cluster's programs, by who has read what others may overwrite. Not `.release.cluster`, which
// waits for the device's memory: warpgroup products that are over have read all of their operands.
__device__ __forceinline__ void arrive_at(u32 barrier, u32 rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier), "r"(rank) : "memory");
}

// To the same place of both programs, whose barriers there count it.
__device__ __forceinline__ void tensor_copy_to_both(u32 to, const TensorMap& map, int column, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(u16(3))
      : "memory");
}

__device__ __forceinline__ void tensor_copy_to_both(u32 to, const TensorMap& map, int column, int row, u32 barrier,
                                                    u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(u16(3)),
      "l"(policy) : "memory");
}
