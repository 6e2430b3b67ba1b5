// Products of few rows, y = x W^T, for GPUs that copy in bulk (Hopper and later): a read of the whole of W.
//
// As in decode attention (paged_hopper.cu) a producer warp keeps STAGES tiles in flight, 16 rows of W by DEPTH each, one
// bulk copy a row; eight warps compute, each an eighth of the tile's depth, and add their sums up once a group of 16 rows
// is through. x stays in shared memory. W does not depend on the kernel in front, so that the first tiles are there by
// the time x is.
//
// Products are transposed, as W's rows are the long side: of the tensor core's 16 x 8 tile x has the 8. Layouts of
// fragments: PTX ISA, "Matrix fragments for mma.m16n8k16".
//
// Constants, given by the compiler's command line: EIGHTHS (of rows of x, at most), DEPTH (of a tile, a multiple of 128),
// STAGES, GATED (1: W's first half are gates and its second half what they gate; y is silu(gate) times the other),
// HALF (1: float16, 0: bfloat16).

#include "hopper.cuh"

constexpr int TILE = 16;                     // rows of W
constexpr int WARPS = 8;                     // that compute
constexpr int STEPS = DEPTH / WARPS / 16;    // of the tensor core along a warp's part of a tile
constexpr int ROW = DEPTH * 2 + 16;          // in shared memory: eight rows then lie in different banks
constexpr int STAGE = TILE * ROW;
constexpr int BARRIERS = 128;                // bytes before the first stage
constexpr int SUMS = 20;                     // floats from one row of x to the next in a warp's sums: no two in one bank
constexpr int MOST = 8 * EIGHTHS;
constexpr int ANSWERS = GATED ? 8 : 16;      // outputs of a group

__device__ __forceinline__ void wait_for_each_other() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

__device__ __forceinline__ void load_pair(u32& b0, u32& b1, u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(b0), "=r"(b1) : "r"(address) : "memory");
}

__device__ __forceinline__ float rounded(float x) {
  u32 both = pack(x, 0.0f);
#if HALF
  float y;
  asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.f32.f16 %0, l;\n}" : "=f"(y) : "r"(both));
  return y;
#else
  return __uint_as_float(both << 16);
#endif
}

// x: [rows, depth]; weight: [all outputs, depth]. out: float32 [gridDim.y, rows, outputs], to be added up; GATED: in x's
// type [rows, outputs], gridDim.y = 1. outputs: a multiple of ANSWERS. slice: depth / gridDim.y, a multiple of DEPTH.
// Grid: (programs, parts of the depth); WARPS + 1 warps; shared memory: BARRIERS, STAGES x STAGE, WARPS x MOST x SUMS
// floats, x: rows x (2 slice + 16) bytes.
extern "C" __global__ void __launch_bounds__(32 * (WARPS + 1))
    few_rows(const u16* x, const u16* weight, void* out, int rows, int depth, int outputs, int slice) {
  extern __shared__ __align__(128) unsigned char shared[];
  u32 memory = static_cast<u32>(__cvta_generic_to_shared(shared));
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(memory + 8 * i, 1);
      barrier_init(memory + 8 * (STAGES + i), WARPS);
    }
    barrier_init(memory + 16 * STAGES, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");

  u32 inputs_at = memory + BARRIERS + STAGES * STAGE + WARPS * MOST * SUMS * 4, inputs_full = memory + 16 * STAGES;
  int x_row = slice * 2 + 16;
  int groups = outputs / ANSWERS, tiles = slice / DEPTH;
  int share = (groups + int(gridDim.x) - 1) / int(gridDim.x);
  int first = blockIdx.x * share, end = min(groups, first + share);
  if (warp == WARPS) {
    if (lane >= TILE) return;
    u64 policy = read_once_policy();
    u32 to = memory + BARRIERS + lane * ROW;
    const u16* from = weight + u64(blockIdx.y) * slice;
    if (GATED && lane >= 8) from += (u64(outputs) + lane - 8) * depth;
    else from += u64(lane) * depth;
    int i = 0;
    auto fetch_inputs = [&] {
      wait_for_kernels_in_front();
      if (lane == 0) barrier_expect(inputs_full, rows * slice * 2);
      __syncwarp(0xffff);
      const u16* mine = x + u64(blockIdx.y) * slice;
      for (int row = lane; row < rows; row += TILE) {
        bulk_copy(inputs_at + row * x_row, mine + u64(row) * depth, slice * 2, inputs_full);
      }
    };
    for (int group = first; group < end; ++group) {
      const u16* row = from + u64(group) * ANSWERS * depth;
      for (int tile = 0; tile < tiles; ++tile, ++i) {
        int stage = i % STAGES;
        u32 full = memory + 8 * stage;
        if (i == STAGES) fetch_inputs();
        if (i >= STAGES) barrier_wait(full + 8 * STAGES, (i / STAGES - 1) & 1);
        if (lane == 0) barrier_expect(full, TILE * DEPTH * 2);
        __syncwarp(0xffff);
        bulk_copy(to + stage * STAGE, row + tile * DEPTH, DEPTH * 2, full, policy);
      }
    }
    if (i <= STAGES) fetch_inputs();
    return;
  }

  float* sums = reinterpret_cast<float*>(shared + BARRIERS + STAGES * STAGE);
  barrier_wait(inputs_full, 0);
  u32 mine = warp * (DEPTH / WARPS * 2);
  u32 a_at = memory + BARRIERS + (lane % 16) * ROW + (lane / 16) * 16 + mine;
  u32 b_at[EIGHTHS];
#pragma unroll
  for (int n = 0; n < EIGHTHS; ++n) {
    int row = min(n * 8 + lane % 8, rows - 1);  // what is computed twice is written once
    b_at[n] = inputs_at + row * x_row + lane / 8 % 2 * 16 + mine;
  }
  int i = 0;
  for (int group = first; group < end; ++group) {
    float c[EIGHTHS][4] = {};
    for (int tile = 0; tile < tiles; ++tile, ++i) {
      int stage = i % STAGES;
      u32 full = memory + 8 * stage;
      barrier_wait(full, (i / STAGES) & 1);
#pragma unroll
      for (int k = 0; k < STEPS; ++k) {
        u32 a[4];
        load_matrices(a, a_at + stage * STAGE + k * 32);
#pragma unroll
        for (int n = 0; n < EIGHTHS; ++n) {
          u32 b0, b1;
          load_pair(b0, b1, b_at[n] + tile * (DEPTH * 2) + k * 32);
          multiply(c[n], a, b0, b1);
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(full + 8 * STAGES);
    }
    float* my_sums = sums + warp * (MOST * SUMS) + lane % 4 * 2 * SUMS + lane / 4;
    if (group > first) wait_for_each_other();  // who is behind has read the last group's
#pragma unroll
    for (int n = 0; n < EIGHTHS; ++n) {
      float* to = my_sums + n * 8 * SUMS;
      to[0] = c[n][0], to[SUMS] = c[n][1], to[8] = c[n][2], to[SUMS + 8] = c[n][3];
    }
    wait_for_each_other();
    for (int at = threadIdx.x; at < rows * ANSWERS; at += 32 * WARPS) {
      int row = at / ANSWERS, output = at % ANSWERS;
      const float* from = sums + row * SUMS + output;
      float total = 0.0f, other = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        total += from[w * (MOST * SUMS)];
        if (GATED) other += from[w * (MOST * SUMS) + 8];
      }
      u64 to = (u64(blockIdx.y) * rows + row) * outputs + group * ANSWERS + output;
      if (GATED) {
        total = rounded(total), other = rounded(other);
        float y = total / (1.0f + __expf(-total)) * other;
        static_cast<u16*>(out)[to] = static_cast<u16>(pack(y, 0.0f));
      } else {
        static_cast<float*>(out)[to] = total;
      }
    }
  }
}
