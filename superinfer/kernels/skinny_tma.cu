// Products of up to 64 rows, y = x W^T, for Hopper: a read of the whole of W, in boxes that its tensor copies bring.
//
// A program has rows of W for its whole part of the depth, so that it reads x's part once: a producer warp keeps STAGES of
// boxes in flight, and each of WARPS others has TILES x 16 of these rows for itself and all rows of x, so that no sums are
// shared. W does not depend on the kernel in front: the first stages' boxes of W are on their way before x is there, but
// only EARLY at once: whatever the kernel in front still has to read would wait behind them.
//
// Products are transposed, as W's rows are the long side: of the tensor core's 16 x 8 tile x has the 8. Layouts of
// fragments: PTX ISA, "Matrix fragments for mma.m16n8k16"; of boxes: "Swizzling modes", 128B: of a row's eight chunks of
// 16 bytes the one at c lies at c ^ (row % 8), so that eight rows' chunks lie in different banks.
//
// Constants, given by the compiler's command line: EIGHTHS (of rows of x, at most), WARPS, TILES (1 or 2), BOXES (of a
// stage, each 64 of the depth), STAGES, EARLY (at most STAGES), GATED (1: W's first half are gates and its second half what
// they gate, TILES is 2, one of each; y is silu(gate) times the other), ROUTED (1: one row, through several of many matrices
// W, which lie one after another), HALF (1: float16, 0: bfloat16).

#include "hopper.cuh"

constexpr int BOX = 64;                                 // of the depth: the 128 bytes that a swizzle spans
constexpr int LINE = BOX * 2;                           // bytes of a box's row
constexpr int TILE = 16 * LINE;
constexpr int WEIGHTS = WARPS * TILES * TILE;           // bytes of W in 64 of the depth
constexpr int INPUTS = 8 * EIGHTHS * LINE;              // and of x
constexpr int STAGE = BOXES * (WEIGHTS + INPUTS);       // W's boxes, then x's: all at multiples of 1024
constexpr int ANSWERS = GATED ? 16 : 16 * TILES;        // outputs of a warp

static_assert(!GATED || TILES == 2, "a gate's tile and that of what it gates");

// What a kernel in front has just written, which the first-level cache may have an older copy of.
__device__ __forceinline__ int load_now(const int* from) {
  int x;
  asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}

__device__ __forceinline__ float load_now(const float* from) {
  float x;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(from) : "memory");
  return x;
}

// x: of [rows, depth], boxes of 8 EIGHTHS rows; weight: of [all outputs, depth], boxes of WARPS x ANSWERS rows; both of 64
// columns, swizzled by 128 bytes. out: float32 [gridDim.y, rows, outputs], to be added up; GATED: in x's type
// [rows, outputs], gridDim.y = 1. rows: up to 8 EIGHTHS. outputs: a multiple of 16. slice: depth / gridDim.y, a multiple of
// 64 BOXES. Grid: (programs of WARPS x ANSWERS outputs, parts of the depth); WARPS + 1 warps; shared memory: STAGES x
// (STAGE + 24) bytes.
// ROUTED: rows = 1; gridDim.z choices, of which the one at z is for the matrix experts[z]; x: its row z x_step; out: of all
// choices, one after another; if not GATED, times scales[z].
extern "C" __global__ void __launch_bounds__(32 * (WARPS + 1), 1)
    few_rows(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, void* out, int rows, int outputs,
             int slice, const int* experts, const float* scales, int x_step) {
  extern __shared__ __align__(1024) unsigned char shared[];
  u32 memory = static_cast<u32>(__cvta_generic_to_shared(shared));
  const StageBarriers barriers(memory + STAGES * STAGE, STAGES);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int first = blockIdx.x * (WARPS * ANSWERS), steps = slice / (BOX * BOXES);
  int active = min(WARPS, (outputs - first + ANSWERS - 1) / ANSWERS);  // warps with outputs
  if (threadIdx.x == 0) {
    if (memory % 1024 != 0) __trap();  // a swizzle goes by addresses
    barriers.init(STAGES, active);
  }
  __syncthreads();
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");

  int column = blockIdx.y * slice, early = min(steps, STAGES);
  auto fetch_inputs = [&](int step, int stage) {
    u32 to = memory + stage * STAGE + BOXES * WEIGHTS, there = barriers.inputs + 8 * stage;
    barrier_expect(there, BOXES * INPUTS);
#pragma unroll
    for (int box = 0; box < BOXES; ++box) {
      tensor_copy(to + box * INPUTS, x, column + (step * BOXES + box) * BOX, ROUTED ? blockIdx.z * x_step : 0, there);
    }
  };
  if (warp == WARPS) {
    if (lane != 0) return;
    prefetch_map(weight);
    u64 policy = read_once_policy();
    int above = 0;  // rows of W before those of this product
    if (ROUTED) {
      wait_for_kernels_in_front();
      above = load_now(experts + blockIdx.z) * (GATED ? 2 * outputs : outputs);
    }
    auto fetch_weights = [&](int step, int stage) {
      u32 to = memory + stage * STAGE, there = barriers.weights + 8 * stage;
      barrier_expect(there, BOXES * WEIGHTS);
#pragma unroll
      for (int box = 0; box < BOXES; ++box) {
        int at = column + (step * BOXES + box) * BOX;
        tensor_copy(to + box * WEIGHTS, weight, at, above + first, there, policy);
        if (GATED) tensor_copy(to + box * WEIGHTS + WEIGHTS / 2, weight, at, above + outputs + first, there, policy);
      }
    };
    for (int step = 0; step < early; ++step) {
      if (step >= EARLY) await(barriers.weights + 8 * (step - EARLY), 0);
      fetch_weights(step, step);
    }
    for (int step = STAGES, stage = 0, parity = 0; step < steps; ++step) {
      await(barriers.empty + 8 * stage, parity);
      fetch_weights(step, stage);
      fetch_inputs(step, stage);
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    return;
  }
  if (warp >= active) return;
  if (warp == 0 && lane == 0) {  // the producer may still have weights to bring when x is there
    prefetch_map(x);
    wait_for_kernels_in_front();
    for (int step = 0; step < early; ++step) fetch_inputs(step, step);
  }
  __syncwarp();

  // ldmatrix, W: lanes 0-15 have rows, lanes 16-31 the same rows 8 columns on; x: each eight lanes eight rows, 8 columns
  // on from the eight before. Steps along the depth are bits 5 and 6 of an address, in which nothing else is added.
  u32 turned = lane % 8;
  u32 a_at = memory + warp * (GATED ? 1 : TILES) * TILE + lane % 16 * LINE + ((lane / 16 ^ turned) << 4);
  u32 b_at = memory + BOXES * WEIGHTS + turned * LINE + ((lane / 8 ^ turned) << 4);
  constexpr int NEXT_TILE = GATED ? WEIGHTS / 2 : TILE;
  float c[TILES][EIGHTHS][4] = {};
  for (int step = 0, stage = 0, parity = 0; step < steps; ++step) {
    await(barriers.weights + 8 * stage, parity);
    await(barriers.inputs + 8 * stage, parity);
#pragma unroll
    for (int box = 0; box < BOXES; ++box) {
#pragma unroll
      for (int k = 0; k < BOX / 32; ++k) {
        u32 a[TILES][2][4];
        u32 even = (a_at + stage * STAGE) ^ (2 * k << 5), odd = (a_at + stage * STAGE) ^ (2 * k + 1 << 5);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
          load_matrices(a[tile][0], even + box * WEIGHTS + tile * NEXT_TILE);
          load_matrices(a[tile][1], odd + box * WEIGHTS + tile * NEXT_TILE);
        }
        u32 inputs = (b_at + stage * STAGE) ^ (k << 6);
#pragma unroll
        for (int n = 0; n < EIGHTHS; ++n) {
          u32 b[4];
          load_matrices(b, inputs + box * INPUTS + n * (8 * LINE));
#pragma unroll
          for (int tile = 0; tile < TILES; ++tile) {
            multiply(c[tile][n], a[tile][0], b[0], b[1]);
            multiply(c[tile][n], a[tile][1], b[2], b[3]);
          }
        }
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(barriers.empty + 8 * stage);
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }

  // Of a tile's 16 x 8 sums a lane has rows lane / 4 and 8 further (c[2], c[3]), columns 2 (lane % 4) and the next.
  int output = first + warp * ANSWERS + lane / 4;
  float scale = ROUTED && !GATED ? load_now(scales + blockIdx.z) : 1.0f;
#pragma unroll
  for (int n = 0; n < EIGHTHS; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int row = n * 8 + lane % 4 * 2 + i % 2;
      if (row >= rows) continue;
      u64 to = ((u64(blockIdx.z) * gridDim.y + blockIdx.y) * rows + row) * outputs + output + i / 2 * 8;
      if (GATED) {
        float y = gate_of(c[0][n][i], c[TILES - 1][n][i]);
        static_cast<u16*>(out)[to] = static_cast<u16>(pack(y, 0.0f));
      } else {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
          if (output - lane / 4 + tile * 16 < outputs) static_cast<float*>(out)[to + tile * 16] = c[tile][n][i] * scale;
        }
      }
    }
  }
}
