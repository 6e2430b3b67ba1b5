// What kernels for Hopper and later share: barriers in shared memory, bulk copies, tensor cores, waiting for the kernel in
// front (PTX ISA of these names). HALF, given by the compiler's command line: numbers are float16 (1) or bfloat16 (0).

#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  u32 done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  } while (!done);
}

constexpr u32 MOST_TRIES = 1u << 27;  // seconds: longer than any kernel in front

// barrier_wait of a kernel that fails rather than hang.
__device__ __forceinline__ void await(u32 barrier, u32 parity) {
  for (u32 tries = 0; tries < MOST_TRIES; ++tries) {
    u32 done;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    if (done) return;
  }
  __trap();
}

// Of each stage of a product's boxes three barriers: W is there, x is there, what was there has been read.
struct StageBarriers {
  u32 weights, inputs, empty;  // each the first of as many as there are stages, 8 bytes apart

  __device__ __forceinline__ StageBarriers(u32 at, int stages)
      : weights(at), inputs(at + 8 * stages), empty(at + 16 * stages) {}

  // By one thread. readers: arrivals that make a stage empty.
  __device__ __forceinline__ void init(int stages, u32 readers) const {
    for (int i = 0; i < stages; ++i) {
      barrier_init(weights + 8 * i, 1);
      barrier_init(inputs + 8 * i, 1);
      barrier_init(empty + 8 * i, readers);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
};

// Everything that kernels in front have written is there from here on.
__device__ __forceinline__ void wait_for_kernels_in_front() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Of bytes that are read or written once: the second-level cache need not keep them.
__device__ __forceinline__ u64 read_once_policy() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void bulk_copy(u32 to, const u16* from, u32 bytes, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}

// A tensor's CUtensorMap, of cuda.h, which NVRTC does not have.
struct alignas(64) TensorMap {
  u64 words[16];
};

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The map's box whose first number is at (row, column); its bytes count in full where it reaches beyond the tensor, and are
// zeros there.
__device__ __forceinline__ void tensor_copy(u32 to, const TensorMap& map, int column, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier) : "memory");
}

__device__ __forceinline__ void tensor_copy(u32 to, const TensorMap& map, int column, int row, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "l"(policy) : "memory");
}

// The other way; what lies beyond the tensor is not written.
__device__ __forceinline__ void tensor_store(const TensorMap& map, int column, int row, u32 from, u64 policy) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%1, %2}], [%3], %4;" ::"l"(
                   &map),
               "r"(column), "r"(row), "r"(from), "l"(policy) : "memory");
}

__device__ __forceinline__ void load_matrices(u32 (&a)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(address) : "memory");
}

__device__ __forceinline__ void load_transposed(u32 (&a)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(address) : "memory");
}

__device__ __forceinline__ void store_matrices(u32 address, const u32 (&a)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a[0]), "r"(a[1]),
               "r"(a[2]), "r"(a[3]) : "memory");
}

#if HALF
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif

// c[16 x 8] += a[16 x 16] b[16 x 8]
__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 pack(float low, float high) {
  u32 x;
  asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}

// Two numbers of its type, the first in the lower half.
__device__ __forceinline__ float2 unpack(u32 both) {
#if HALF
  float2 x;
  asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}" : "=f"(x.x), "=f"(x.y) : "r"(both));
  return x;
#else
  return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
#endif
}

// To its type and back.
__device__ __forceinline__ float rounded(float x) { return unpack(pack(x, 0.0f)).x; }

// silu(gate) times up, of numbers that were rounded to their type, as in products that have no gates in them.
__device__ __forceinline__ float gate_of(float gate, float up) {
  gate = rounded(gate);
  return gate / (1.0f + __expf(-gate)) * rounded(up);
}
