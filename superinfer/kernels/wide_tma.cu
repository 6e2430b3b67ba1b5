// Products of 33 to 128 rows, y = x W^T, for Hopper: a read of the whole of W, in boxes that its tensor copies bring.
//
// Where `skinny_tma.cu` has warps that share nothing, here warpgroups do: each has 64 rows of x and all of a tile's rows of W
// (m64nNk16, both operands from shared memory, N of them: PTX ISA, "Asynchronous warpgroup level matrix instructions"), as
// many rows of x would otherwise be read from shared memory too often. A program computes one tile after another; a producer
// warp keeps STAGES of boxes in flight, across tiles too. W does not depend on the kernel in front: the first stages' boxes
// of W are on their way before x is there, EARLY at once, as in `skinny_tma.cu`.
//
// Constants, given by the compiler's command line: GROUPS (warpgroups: 64 rows of x each), COLUMNS (rows of W in a tile: a
// multiple of 8, to 256), STAGES, EARLY, GATED (1: a tile's first half are gates, its second what they gate, and COLUMNS a multiple
// of 16; y is silu(gate) times the other), HALF (1: float16, 0: bfloat16).
// `multiply_group.cuh` is made for COLUMNS (`wide_tma.py`).

#include "warpgroup.cuh"

constexpr int WEIGHTS = COLUMNS * LINE;                // bytes of W in 64 of the depth
constexpr int INPUTS = 64 * GROUPS * LINE;             // and of x
constexpr int STAGE = WEIGHTS + INPUTS;                // W's boxes, then x's: all at multiples of 1024
constexpr int ANSWERS = GATED ? COLUMNS / 2 : COLUMNS; // outputs of a tile
constexpr int READERS = 4 * GROUPS;                    // warps

static_assert(COLUMNS % (GATED ? 16 : 8) == 0, "boxes of whole groups of eight rows");

// x: of [rows, depth], boxes of 64 GROUPS rows; weight: of [all outputs, depth], boxes of ANSWERS rows; both of 64 columns,
// swizzled by 128 bytes. out: float32 [gridDim.y, rows, outputs], to be added up; GATED: in x's type [rows, outputs],
// gridDim.y = 1. rows: up to 64 GROUPS. outputs: even. slice: depth / gridDim.y, a multiple of 64. Grid: (programs, parts of
// the depth); 4 GROUPS + 1 warps; shared memory: STAGES x (STAGE + 24) bytes.
extern "C" __global__ void __launch_bounds__(32 * (READERS + 1), 1)
    some_rows(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, void* out, int rows,
              int outputs, int slice) {
  extern __shared__ __align__(1024) unsigned char shared[];
  u32 memory = static_cast<u32>(__cvta_generic_to_shared(shared));
  const StageBarriers barriers(memory + STAGES * STAGE, STAGES);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int steps = slice / BOX, tiles = (outputs + ANSWERS - 1) / ANSWERS;
  if (threadIdx.x == 0) {
    if (memory % 1024 != 0) __trap();  // a swizzle goes by addresses
    barriers.init(STAGES, READERS);
  }
  __syncthreads();
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");

  int column = blockIdx.y * slice, early = min(steps, STAGES);
  auto fetch_inputs = [&](int step, int stage) {
    barrier_expect(barriers.inputs + 8 * stage, INPUTS);
    tensor_copy(memory + stage * STAGE + WEIGHTS, x, column + step * BOX, 0, barriers.inputs + 8 * stage);
  };
  if (warp == READERS) {
    if (lane != 0) return;
    prefetch_map(weight);
    u64 policy = read_once_policy();
    auto fetch_weights = [&](int tile, int step, int stage) {
      u32 to = memory + stage * STAGE, there = barriers.weights + 8 * stage;
      int first = tile * ANSWERS;
      barrier_expect(there, WEIGHTS);
      tensor_copy(to, weight, column + step * BOX, first, there, policy);
      if (GATED) tensor_copy(to + WEIGHTS / 2, weight, column + step * BOX, outputs + first, there, policy);
    };
    int tile = blockIdx.x;
    for (int step = 0; step < early; ++step) {
      if (step >= EARLY) await(barriers.weights + 8 * (step - EARLY), 0);
      fetch_weights(tile, step, step);
    }
    wait_for_kernels_in_front();  // what follows has x, too
    int stage = early % STAGES, parity = early == STAGES ? 0 : 1;  // of an empty barrier's phase before its first: 1
    for (int step = early; tile < tiles; tile += gridDim.x, step = 0) {
      for (; step < steps; ++step) {
        await(barriers.empty + 8 * stage, parity);
        fetch_weights(tile, step, stage);
        fetch_inputs(step, stage);
        if (++stage == STAGES) stage = 0, parity ^= 1;
      }
    }
    return;
  }
  if (warp == 0 && lane == 0) {  // the producer may still have weights to bring when x is there
    prefetch_map(x);
    wait_for_kernels_in_front();
    for (int step = 0; step < early; ++step) fetch_inputs(step, step);
  }
  __syncwarp();

  int group = warp / 4;
  auto release = [&](int stage) {
    if (lane == 0) barrier_arrive(barriers.empty + 8 * stage);
  };
  int stage = 0, parity = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float d[COLUMNS / 2] = {};
    int before = 0;
    for (int step = 0; step < steps; ++step) {
      await(barriers.weights + 8 * stage, parity);
      await(barriers.inputs + 8 * stage, parity);
      u64 b = descriptor(memory + stage * STAGE), a = descriptor(memory + stage * STAGE + WEIGHTS + group * 64 * LINE);
      group_fence();
#pragma unroll
      for (int k = 0; k < BOX / 16; ++k) multiply_group(d, a + 2 * k, b + 2 * k);
      group_commit();
      if (step) {
        group_wait<1>(d);
        release(before);
      }
      before = stage;
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    group_wait<0>(d);
    release(before);

    // Of a warp's 16 rows a lane has lane / 4 and 8 further, of each eight columns 2 (lane % 4) and the next.
    int row = group * 64 + warp % 4 * 16 + lane / 4, first = tile * ANSWERS + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < ANSWERS / 8; ++j) {
      int output = first + 8 * j;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int at = row + 8 * i;
        if (at >= rows || output >= outputs) continue;
        u64 to = (u64(blockIdx.y) * rows + at) * outputs + output;
        const float* sums = d + 4 * j + 2 * i;
        if (GATED) {
          const float* up = sums + COLUMNS / 4;
          *reinterpret_cast<u32*>(static_cast<u16*>(out) + to) = pack(gate_of(sums[0], up[0]), gate_of(sums[1], up[1]));
        } else {
          *reinterpret_cast<float2*>(static_cast<float*>(out) + to) = make_float2(sums[0], sums[1]);
        }
      }
    }
  }
}
