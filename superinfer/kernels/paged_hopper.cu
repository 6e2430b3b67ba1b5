// One query per sequence over a block-first paged cache, for GPUs that copy in bulk (Hopper and later).
//
// Decode attention is a read of the whole cache: what counts is how many bytes are on their way. A producer warp keeps
// STAGES tiles of 16 tokens in flight, keys and values of HEADS KV heads each, one bulk copy a token; one warp a KV
// head computes. No host plan: all tiles of all sequences, in the order of kv_indices, are cut into spans, one a program
// (`paged_spans.cuh`), and whoever finishes a sequence that several spans share adds up its parts (merged as in
// FlashDecoding, Dao et al. 2023).
//
// In a step of decodes alone nobody need rotate and store first: each warp rotates its queries as it reads them from the
// projection (`paged_projected.cuh`), and whoever has a sequence's last tile puts the newest key and value into it, and
// into the cache.
//
// Products are transposed, tokens x heads and dims x heads, so that the heads that share a KV head are the short side
// of the tensor core's tile (8) and not the long one (16): S = K q, O += V^T P. Layouts of fragments: PTX ISA,
// "Matrix fragments for mma.m16n8k16".
//
// Constants, given by the compiler's command line: HEAD_DIM (multiple of 16), GROUP (query heads per KV head, at most 8),
// KV_HEADS, HEADS (KV heads of a program, a divisor of KV_HEADS), PAGE (multiple of 16), STAGES, MIN_TILES (shortest
// span), TOGETHER_ON_ONE (programs that a multiprocessor has shared memory for), HALF (1: float16, 0: bfloat16).

#include "hopper.cuh"
#include "paged_projected.cuh"
#include "paged_spans.cuh"

constexpr int ROW_BYTES = HEADS * HEAD_DIM * 2;   // of one token's keys or values
constexpr int ROW = ROW_BYTES + 16;               // in shared memory: eight rows then lie in different banks
constexpr int STAGE = 2 * TILE * ROW;
constexpr int BARRIERS = 128;                     // bytes before the first stage
constexpr int AHEAD = HEADS > 4 || TOGETHER_ON_ONE > 1 ? 2 : 4;  // parts that are read at once, as registers allow
constexpr int MOST_AT_ONCE = 16;                  // parts that one warp adds up, where there are no more
constexpr int TOGETHER = 8;                       // parts of a group, where there are
constexpr float LOWEST = -1e30f;                  // below any score, and finite
constexpr float SLACK = 8.0f;                     // powers of two that weights may exceed 1 by before all is rescaled

__device__ __forceinline__ u32 transpose(u32 x) {
  u32 y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Over the lanes that hold the same two heads.
__device__ __forceinline__ float largest(float x) {
  for (int other = 4; other < 32; other *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, other));
  return x;
}

__device__ __forceinline__ float sum(float x) {
  for (int other = 4; other < 32; other *= 2) x += __shfl_xor_sync(~0u, x, other);
  return x;
}

__device__ __forceinline__ float4 read_once(const float4* from) {
  float4 x;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(from) : "memory");
  return x;
}

// One KV head's state of the softmax over a sequence's tokens so far. Of each 16 x 8 fragment a lane holds heads
// 2 (lane % 4) and the next, and rows lane / 4 and 8 more.
struct Part {
  float o[STEPS][4];        // dims x heads, not yet divided by total
  float most[2], total[2];  // by head; most in powers of two; total of this lane's tokens alone until `finish`

  __device__ void clear() {
    for (int j = 0; j < STEPS; ++j) o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0.0f;
    most[0] = most[1] = LOWEST;
    total[0] = total[1] = 0.0f;
  }

  __device__ void raise(float first, float second) {
    float f0 = power_of_two(most[0] - first), f1 = power_of_two(most[1] - second);
    most[0] = first, most[1] = second;
    total[0] *= f0, total[1] *= f1;
#pragma unroll
    for (int j = 0; j < STEPS; ++j) o[j][0] *= f0, o[j][2] *= f0, o[j][1] *= f1, o[j][3] *= f1;
  }

  // keys, values: this head's first token in shared memory. known: tokens of the tile that exist.
  __device__ void attend(const u32 (&query)[STEPS][2], u32 keys, u32 values, int known, float scale, int lane) {
    float even[4] = {}, odd[4] = {};
    u32 a[4];
    u32 at = keys + (lane % 16) * ROW + (lane / 16) * 16;
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
      load_matrices(a, at + k * 32);
      multiply(k % 2 ? odd : even, a, query[k][0], query[k][1]);
    }
    float score[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) score[i] = (even[i] + odd[i]) * scale;
    if (known < TILE) {
      const float never = __int_as_float(0xff800000);
      if (lane / 4 >= known) score[0] = score[1] = never;
      if (lane / 4 + 8 >= known) score[2] = score[3] = never;
    }
    float first = fmaxf(score[0], score[2]), second = fmaxf(score[1], score[3]);
    if (__any_sync(~0u, first > most[0] + SLACK || second > most[1] + SLACK)) {
      raise(fmaxf(most[0], largest(first)), fmaxf(most[1], largest(second)));
    }
    float w0 = power_of_two(score[0] - most[0]), w1 = power_of_two(score[1] - most[1]);
    float w2 = power_of_two(score[2] - most[0]), w3 = power_of_two(score[3] - most[1]);
    total[0] += w0 + w2, total[1] += w1 + w3;
    u32 b0 = transpose(pack(w0, w1)), b1 = transpose(pack(w2, w3));
    at = values + (lane % 8 + lane / 16 * 8) * ROW + (lane / 8 % 2) * 16;
#pragma unroll
    for (int j = 0; j < STEPS; ++j) {
      load_transposed(a, at + j * 32);
      multiply(o[j], a, b0, b1);
    }
  }

  __device__ void finish() {
    total[0] = sum(total[0]), total[1] = sum(total[1]);
  }

  // A part of a sequence, for whoever merges them. at: of this sequence's part and head.
  __device__ void leave(float4* at, int lane) const {
    for (int j = 0; j < STEPS; ++j) at[j * 32 + lane] = make_float4(o[j][0], o[j][1], o[j][2], o[j][3]);
    at[STEPS * 32 + lane] = make_float4(most[0], most[1], total[0], total[1]);
  }

  // Parts of the same sequence, `count` of them (at most AHEAD), read all at once: each is a trip to memory.
  __device__ void add(const float4* (&at)[AHEAD], int count, int lane) {
    float4 given[AHEAD][STEPS + 1];
#pragma unroll
    for (int n = 0; n < AHEAD; ++n) {
#pragma unroll
      for (int j = 0; j <= STEPS; ++j) given[n][j] = read_once(at[n] + j * 32 + lane);
    }
#pragma unroll
    for (int n = 0; n < AHEAD; ++n) {
      if (n >= count) continue;
      float4 end = given[n][STEPS];
      raise(fmaxf(most[0], end.x), fmaxf(most[1], end.y));
      float f0 = power_of_two(end.x - most[0]), f1 = power_of_two(end.y - most[1]);
      total[0] += f0 * end.z, total[1] += f1 * end.w;
#pragma unroll
      for (int j = 0; j < STEPS; ++j) {
        float4 more = given[n][j];
        o[j][0] += f0 * more.x, o[j][1] += f1 * more.y, o[j][2] += f0 * more.z, o[j][3] += f1 * more.w;
      }
    }
  }

  // out: of this sequence's and KV head's first query head.
  __device__ void answer(u16* out, int lane) const {
    float f0 = 1.0f / total[0], f1 = 1.0f / total[1];
    int head = lane / 4, dim = lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < STEPS; ++j) {
      u32 low = transpose(pack(o[j][0] * f0, o[j][1] * f1)), high = transpose(pack(o[j][2] * f0, o[j][3] * f1));
      if (head < GROUP) {
        u32* to = reinterpret_cast<u32*>(out + head * HEAD_DIM + j * 16 + dim);
        to[0] = low, to[4] = high;
      }
    }
  }
};

constexpr int PART = (STEPS + 1) * 32;  // float4 of a part

// settled: the first tile that the kernel in front may still write to.
__device__ void produce(const u16* kv, const int* kv_indices, u32 memory, int first, int end, int settled,
                        u64 block_step, u64 value_step, u64 token_step, int lane) {
  int row = lane % TILE;
  const u16* mine = kv + (lane / TILE) * value_step + row * token_step + blockIdx.y * (HEADS * HEAD_DIM);
  u32 to = memory + BARRIERS + lane * ROW;
  auto block_of = [&](int tile) { return tile < end ? kv_indices[tile / TILES_PER_PAGE] : 0; };
  u64 policy = read_once_policy();
  int blocks = 0, ahead = block_of(first + lane);
  for (int tile = first, i = 0; tile < end; ++tile, ++i) {
    if (tile == settled) wait_for_kernels_in_front();
    if (i % 32 == 0) blocks = ahead, ahead = block_of(tile + 32 + lane);
    u64 block = __shfl_sync(~0u, blocks, i % 32);
    int stage = i % STAGES;
    u32 full = memory + 8 * stage;
    if (i >= STAGES) barrier_wait(full + 8 * STAGES, (i / STAGES - 1) & 1);
    if (lane == 0) barrier_expect(full, 2 * TILE * ROW_BYTES);
    __syncwarp();
    bulk_copy(to + stage * STAGE, mine + block * block_step + tile % TILES_PER_PAGE * (TILE * token_step), ROW_BYTES,
              full, policy);
  }
  if (settled >= end) wait_for_kernels_in_front();  // all do, so that who comes behind need not
}

// qkv and the five after `scale`: see Asked; cos null or not. out: [sequences, QUERY_HEADS, HEAD_DIM]. kv: a layer's keys
// of block 0; steps in elements: between blocks, from keys to values, between tokens. kv_indptr [sequences + 1],
// kv_indices, last_page_len [sequences]: as in PagedBatch. parts: [2 gridDim.x, KV_HEADS, PART]. arrived: [sequences + 2
// gridDim.x, KV_HEADS], zero, and left so. scale: of scores, in powers of two. Grid: (spans, KV_HEADS / HEADS); HEADS + 1
// warps; BARRIERS + STAGES x STAGE bytes of shared memory.
//
// kv_indptr, kv_indices, last_page_len, cos and sin, and of the cache all but each sequence's last block, where it rotates
// all but the newest tokens, were there before the kernel in front of this one began: they are read before it is over.
extern "C" __global__ void __launch_bounds__(32 * (HEADS + 1), TOGETHER_ON_ONE)
    decode_attention(const void* qkv, u16* kv, u16* out, const int* kv_indptr, const int* kv_indices,
                     const int* last_page_len, float4* parts, u32* arrived, u64 block_step, u64 value_step,
                     u64 token_step, int sequences, float scale, u64 row, u64 part_step, int qkv_parts, const u16* cos,
                     const u16* sin) {
  extern __shared__ __align__(128) unsigned char shared[];
  u32 memory = static_cast<u32>(__cvta_generic_to_shared(shared));
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(memory + 8 * i, 1);
      barrier_init(memory + 8 * (STAGES + i), HEADS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");

  const Share share = share_of(kv_indptr, sequences, lane);
  const int first = share.first, end = share.end;
  if (first >= end) {  // its multiprocessor is free for the kernel behind, which need wait for this one alone
    if (blockIdx.x == 0) wait_for_kernels_in_front();
    return;
  }
  if (warp == HEADS) {
    int settled = cos ? end : max(first, (kv_indptr[share.sequence + 1] - 1) * TILES_PER_PAGE);
    produce(kv, kv_indices, memory, first, end, settled, block_step, value_step, token_step, lane);
    return;
  }

  int head = blockIdx.y * HEADS + warp;
  const Asked asked = {qkv, row, part_step, qkv_parts, cos, sin};
  Begun with;
  Part part;
  for (int sequence = share.sequence, tile = first, i = 0; tile < end; ++sequence) {
    int pages = kv_indptr[sequence], begin = pages * TILES_PER_PAGE;
    pages = kv_indptr[sequence + 1] - pages;
    int stop = begin + pages * TILES_PER_PAGE, until = min(stop, end);
    int context = (pages - 1) * PAGE + last_page_len[sequence];
    bool whole = tile == begin && until == stop;
    with.read(asked, sequence, head, lane);
    u64 newest = kv_indices[begin / TILES_PER_PAGE + (context - 1) / PAGE] * block_step;
    newest += (context - 1) % PAGE * token_step + head * HEAD_DIM;
    part.clear();
    for (; tile < until; ++tile, ++i) {
      int stage = i % STAGES, known = context - (tile - begin) * TILE;
      u32 full = memory + 8 * stage, keys = memory + BARRIERS + stage * STAGE + warp * (HEAD_DIM * 2);
      u32 values = keys + TILE * ROW;
      barrier_wait(full, (i / STAGES) & 1);
      if (known <= TILE) {  // what lies behind the last token may be anything, and 0 x NaN is NaN
        if (cos && known > 0) {
          u32 down = (known - 1) * ROW;
          with.store(keys + down, values + down, kv + newest, kv + newest + value_step, lane);
        }
        for (int at = max(known, 0) * (HEAD_DIM / 8) + lane; at < TILE * (HEAD_DIM / 8); at += 32) {
          u32 to = values + at / (HEAD_DIM / 8) * ROW + at % (HEAD_DIM / 8) * 16;
          asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
      }
      part.attend(with.query, keys, values, known, scale, lane);
      __syncwarp();
      if (lane == 0) barrier_arrive(full + 8 * STAGES);
    }
    part.finish();
    u16* to = out + (u64(sequence) * QUERY_HEADS + head * GROUP) * HEAD_DIM;
    if (whole) {
      part.answer(to, lane);
      continue;
    }
    int from = share.apart ? share.from : begin / share.span;
    int last = share.apart ? share.last : (stop - 1) / share.span;
    auto part_of = [&](int one) { return parts + (u64(2 * one + (one == from)) * KV_HEADS + head) * PART; };
    auto last_of = [&](u32* counter, int count) {  // whether all the others have come here before
      __threadfence();
      __syncwarp();
      u32 before = 0;
      if (lane == 0) before = atomicAdd(counter, 1);
      if (__shfl_sync(~0u, before, 0) != u32(count - 1)) return false;
      __threadfence();
      if (lane == 0) *counter = 0;
      return true;
    };
    // In the spans' order, whoever comes last, so that the same batch gives the same bits.
    auto add_up = [&](int first_one, int last_one, int step) {
      part.clear();
      for (int one = first_one; one <= last_one; one += AHEAD * step) {
        const float4* at[AHEAD];
#pragma unroll
        for (int n = 0; n < AHEAD; ++n) at[n] = part_of(one + n * step <= last_one ? one + n * step : one);
        part.add(at, (last_one - one) / step + 1, lane);
      }
    };
    part.leave(part_of(blockIdx.x), lane);
    int count = last - from + 1, step = 1;
    if (count > MOST_AT_ONCE) {  // one warp would be at it for long: by groups first
      step = TOGETHER;
      int group = from + (int(blockIdx.x) - from) / step * step, group_end = min(group + step - 1, last);
      u32* counter = &arrived[(sequences + 2 * group + (group == from)) * KV_HEADS + head];
      if (!last_of(counter, group_end - group + 1)) continue;
      add_up(group, group_end, 1);
      part.leave(part_of(group), lane);
      count = (count + step - 1) / step;
    }
    if (!last_of(&arrived[sequence * KV_HEADS + head], count)) continue;
    add_up(from, last, step);
    part.answer(to, lane);
  }
}
