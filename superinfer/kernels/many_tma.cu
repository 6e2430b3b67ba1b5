// What gates let through of many rows, y = silu(gate) times up of x W^T = [gate, up], for Hopper: prompts'.
//
// A tile is 128 rows of x by COLUMNS of W, half of them gates and half what they gate. Two warpgroups take tiles by turns,
// each with all of a tile's sums in its registers: while one writes its answers the other has the tensor cores. Two programs
// are a cluster and have two tiles of the same rows of W, or of the same rows of x where a row of tiles is left over: each
// brings half of what they share to both, by multicast. That is not quicker as such, but what limits these products is
// power, and it takes less. A producer warp keeps STAGES of boxes in flight, across tiles too. Clusters go down GROUP pairs
// of tiles before they go on to the next columns, so that what all of them read at one time is few rows of x and of W.
//
// Constants, given by the compiler's command line: COLUMNS (a multiple of 32, to 192), STAGES, GROUP, HALF (1: float16, 0:
// bfloat16). `multiply_group.cuh` is made for COLUMNS (`warpgroup.py`).

#include "cluster.cuh"
#include "warpgroup.cuh"

constexpr int ROWS = 128;                // of a tile
constexpr int ANSWERS = COLUMNS / 2;     // of its columns
constexpr int WEIGHTS = COLUMNS * LINE;  // bytes of W in 64 of the depth
constexpr int INPUTS = ROWS * LINE;      // and of x
constexpr int STAGE = WEIGHTS + INPUTS;  // gates, up, x: all at multiples of 1024
constexpr int PITCH = ANSWERS * 2;       // bytes of a row of answers
constexpr int ROOM = ROWS * PITCH;       // of a tile's answers
constexpr int READERS = 4;               // warps of a warpgroup

static_assert(COLUMNS % 32 == 0 && COLUMNS <= 192, "boxes of whole groups of eight rows, and sums that fit in registers");

struct Tile {
  int row, column;    // the first
  bool same_weights;  // as the other program's, which otherwise has the same rows of x
};

// What a cluster has to do, in turn: pairs of tiles one below the other, then those of a last row two by two.
struct Tiles {
  int down, across;  // in tiles

  __device__ __forceinline__ Tiles(int rows, int outputs)
      : down((rows + ROWS - 1) / ROWS), across((outputs + ANSWERS - 1) / ANSWERS) {}

  __device__ __forceinline__ int turns() const { return down / 2 * across + down % 2 * ((across + 1) / 2); }

  __device__ __forceinline__ Tile at(int turn, int rank) const {
    int pairs = down / 2, left = turn - pairs * across;
    if (left >= 0) return {(down - 1) * ROWS, (2 * left + rank) * ANSWERS, false};
    int first = turn / (GROUP * across) * GROUP, within = turn - first * across, height = min(GROUP, pairs - first);
    return {(2 * (first + within % height) + rank) * ROWS, within / height * ANSWERS, true};
  }
};

// x: of [rows, depth], boxes of 64 rows; weight: of [2 outputs, depth], boxes of ANSWERS rows; both of 64 columns, swizzled
// by 128 bytes; out: of [rows, outputs], boxes of 128 rows by ANSWERS, as they are. depth: a multiple of 64. Grid: programs,
// an even number; 3 warpgroups; shared memory: STAGES x (STAGE + 16) + 2 ROOM bytes.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    many_rows(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
              const __grid_constant__ TensorMap out, int rows, int outputs, int depth) {
  extern __shared__ __align__(1024) unsigned char shared[];
  u32 memory = static_cast<u32>(__cvta_generic_to_shared(shared));
  u32 answers = memory + STAGES * STAGE, full = answers + 2 * ROOM, empty = full + 8 * STAGES;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = cluster_rank(), group = warp / 4;
  int steps = depth / BOX, clusters = gridDim.x / 2;
  const Tiles tiles(rows, outputs);
  if (threadIdx.x == 0) {
    if (memory % 1024 != 0) __trap();  // a swizzle goes by addresses
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, 2 * READERS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");

  int stage = 0, parity = 0, turns = tiles.turns();
  if (group == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (warp == 8 && lane == 0) {
      prefetch_map(x);
      prefetch_map(weight);
      wait_for_kernels_in_front();
      u64 policy = read_once_policy();  // x is read for all of W, and is what the second-level cache is to keep
      for (int turn = blockIdx.x / 2; turn < turns; turn += clusters) {
        auto [row, column, same_weights] = tiles.at(turn, rank);
        for (int step = 0; step < steps; ++step) {
          u32 weights = memory + stage * STAGE, inputs = weights + WEIGHTS, there = full + 8 * stage;
          await(empty + 8 * stage, parity ^ 1);  // in both programs
          barrier_expect(there, STAGE);
          if (same_weights) {
            tensor_copy(inputs, x, step * BOX, row, there);
            tensor_copy(inputs + INPUTS / 2, x, step * BOX, row + 64, there);
            tensor_copy_to_both(weights + rank * (WEIGHTS / 2), weight, step * BOX, column + rank * outputs, there, policy);
          } else {
            tensor_copy_to_both(inputs + rank * (INPUTS / 2), x, step * BOX, row + rank * 64, there);
            tensor_copy(weights, weight, step * BOX, column, there, policy);
            tensor_copy(weights + WEIGHTS / 2, weight, step * BOX, column + outputs, there, policy);
          }
          if (++stage == STAGES) stage = 0, parity ^= 1;
        }
      }
    }
    __syncwarp();
    cluster_sync();
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
  bool first_of_group = threadIdx.x % 128 == 0;
  u32 room = answers + group * ROOM;
  u64 policy = read_once_policy();
  auto release = [&](int stage) {
    if (lane < 2) arrive_at(empty + 8 * stage, lane);
  };
  auto group_sync = [&]() { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); };
  // A group waits for the phase of a barrier that is the next: so its turn is when the other has seen all of its own.
  auto await_turn = [&]() { asm volatile("bar.sync %0, 256;" ::"r"(group + 3) : "memory"); };
  auto pass_turn = [&]() { asm volatile("bar.arrive %0, 256;" ::"r"(4 - group) : "memory"); };
  auto skip_tile = [&]() {  // the other group's
    stage += steps % STAGES;
    parity ^= steps / STAGES & 1;
    if (stage >= STAGES) stage -= STAGES, parity ^= 1;
  };
  if (group) skip_tile(), pass_turn();
  for (int turn = blockIdx.x / 2 + group * clusters; turn < turns; turn += 2 * clusters) {
    auto [row, column, same_weights] = tiles.at(turn, rank);
    float upper[ANSWERS] = {}, lower[ANSWERS] = {};  // of the tile's 64 and of its other 64 rows
    int before = 0;
    await_turn();
    for (int step = 0; step < steps; ++step) {
      await(full + 8 * stage, parity);
      u64 b = descriptor(memory + stage * STAGE), a = descriptor(memory + stage * STAGE + WEIGHTS);
      group_fence();
#pragma unroll
      for (int k = 0; k < BOX / 16; ++k) {
        multiply_group(upper, a + 2 * k, b + 2 * k);
        multiply_group(lower, a + 2 * k + (64 * LINE >> 4), b + 2 * k);
      }
      group_commit();
      if (step) {
        group_wait<1>(upper);
        release(before);
      }
      before = stage;
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    pass_turn();
    group_wait<0>(upper);
    group_wait<0>(lower);
    release(before);
    skip_tile();

    if (first_of_group) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    group_sync();  // what was here before has been written to the device's memory
    // Of a warp's 16 rows a lane has lane / 4 and 8 further, of each eight columns 2 (lane % 4) and the next. A warp writes
    // four matrices of eight by eight at once: its rows 0 to 7 and 8 to 15 of eight columns, and of the next eight.
    u32 to = room + (warp % 4 * 16 + lane % 16) * PITCH + lane / 16 * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* sums = half ? lower : upper;
#pragma unroll
      for (int j = 0; j < ANSWERS / 8; j += 2) {
        u32 packed[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float *gate = sums + 4 * (j + i / 2) + 2 * (i % 2), *up = gate + ANSWERS / 2;
          packed[i] = pack(gate_of(gate[0], up[0]), gate_of(gate[1], up[1]));
        }
        store_matrices(to + half * 64 * PITCH + j * 16, packed);
      }
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    group_sync();
    if (first_of_group) {
      tensor_store(out, column, row, room, policy);
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
  }
  if (first_of_group) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  __syncwarp();
  cluster_sync();  // until then the other program may copy to here, and count here
}
