// What decode attention begins with: a token a sequence, rotated as it is read.
//
// Constants: HEAD_DIM, GROUP, KV_HEADS, HALF of `paged_hopper.cu`.

#pragma once
#include "hopper.cuh"

constexpr int STEPS = HEAD_DIM / 16;    // of the tensor core along a head
constexpr int QUERY_HEADS = KV_HEADS * GROUP;
constexpr int HALF_DIM = HEAD_DIM / 2;  // dimension i is rotated with i + HALF_DIM

// What attention begins with. qkv: a row a sequence, `row` numbers apart, of its type; or `parts` of float32, `part_step`
// numbers apart, to be added up and rounded once (0: it is of its type). A row has QUERY_HEADS queries, then, where cos
// is given, KV_HEADS keys and as many values. cos, sin: [sequences, HEAD_DIM] of the rows' positions (rope.rope_angles:
// both halves alike, sin negative in the first); null: queries are rotated, the newest keys and values in the cache.
struct Asked {
  const void* qkv;
  u64 row, part_step;
  int parts;
  const u16 *cos, *sin;

  // Pairs of neighbouring numbers, all on their way at once.
  template <int N>
  __device__ __forceinline__ void read(float2 (&x)[N], const u64 (&at)[N]) const {
    if (!parts) {
      u32 both[N];
#pragma unroll
      for (int i = 0; i < N; ++i) both[i] = *reinterpret_cast<const u32*>(static_cast<const u16*>(qkv) + at[i]);
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = unpack(both[i]);
      return;
    }
    const float* from = static_cast<const float*>(qkv);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = make_float2(0.0f, 0.0f);
    for (int part = 0; part < parts; part += 2) {
      float2 one[N], two[N];
      u64 further = part + 1 < parts ? part_step : 0;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        one[i] = *reinterpret_cast<const float2*>(from + part * part_step + at[i]);
        two[i] = *reinterpret_cast<const float2*>(from + part * part_step + further + at[i]);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        x[i].x += one[i].x, x[i].y += one[i].y;
        if (further) x[i].x += two[i].x, x[i].y += two[i].y;
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = unpack(pack(x[i].x, x[i].y));
  }
};

// By their position's angles, two pairs of numbers that are rotated with each other.
__device__ __forceinline__ void rotate(float2& low, float2& high, u32 cosines, u32 sines) {
  float2 c = unpack(cosines), s = unpack(sines), a = low, b = high;
  low = make_float2(fmaf(a.x, c.x, -b.x * s.x), fmaf(a.y, c.y, -b.y * s.y));
  high = make_float2(fmaf(b.x, c.x, a.x * s.x), fmaf(b.y, c.y, a.y * s.y));
}

// A warp's queries of one sequence, as its products take them, and each lane's four pairs of the newest token: of the
// key's first and second half and of the value's.
struct Begun {
  u32 query[STEPS][2], newest[4];

  // Of a sequence and a KV head. Waits for the kernel in front.
  __device__ __forceinline__ void read(const Asked& asked, int sequence, int head, int lane) {
    const int whose = min(lane / 4, GROUP - 1), dim = lane % 4 * 2, own = lane % (HALF_DIM / 2) * 2;
    const bool rotates = asked.cos != nullptr;
    u32 cosines[STEPS + 1], sines[STEPS + 1];
    if (rotates) {
      const u16 *cos = asked.cos + u64(sequence) * HEAD_DIM, *sin = asked.sin + u64(sequence) * HEAD_DIM + HALF_DIM;
#pragma unroll
      for (int i = 0; i <= STEPS; ++i) {
        int d = i < STEPS ? i * 8 + dim : own;
        cosines[i] = *reinterpret_cast<const u32*>(cos + d), sines[i] = *reinterpret_cast<const u32*>(sin + d);
      }
    }
    wait_for_kernels_in_front();
    constexpr int N = 2 * STEPS + 4;
    u64 row = sequence * asked.row, at[N];
#pragma unroll
    for (int i = 0; i < 2 * STEPS; ++i) at[i] = row + (head * GROUP + whose) * HEAD_DIM + i * 8 + dim;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // without rotation there is nothing to read there
      u64 there = row + (QUERY_HEADS + i / 2 * KV_HEADS + head) * HEAD_DIM + i % 2 * HALF_DIM + own;
      at[2 * STEPS + i] = rotates ? there : at[0];
    }
    float2 x[N];
    asked.read(x, at);
    if (rotates) {
#pragma unroll
      for (int i = 0; i < STEPS; ++i) rotate(x[i], x[i + STEPS], cosines[i], sines[i]);
      rotate(x[2 * STEPS], x[2 * STEPS + 1], cosines[STEPS], sines[STEPS]);
    }
#pragma unroll
    for (int i = 0; i < 2 * STEPS; ++i) query[i / 2][i % 2] = lane / 4 < GROUP ? pack(x[i].x, x[i].y) : 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) newest[i] = pack(x[2 * STEPS + i].x, x[2 * STEPS + i].y);
  }

  // Into a tile in shared memory, and into the cache. keys, values, key, value: of its row.
  __device__ __forceinline__ void store(u32 keys, u32 values, u16* key, u16* value, int lane) const {
    if (lane >= HALF_DIM / 2) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      u32 to = (i < 2 ? keys : values) + (i % 2 * HALF_DIM + lane * 2) * 2;
      asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(newest[i]) : "memory");
      *reinterpret_cast<u32*>((i < 2 ? key : value) + i % 2 * HALF_DIM + lane * 2) = newest[i];
    }
  }
};
