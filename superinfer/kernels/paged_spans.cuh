// How the tiles of all sequences are cut into spans, one a program: by each program itself, from kv_indptr.
//
// Mostly into equal ones, whoever's the tiles are ("stream-K" of matrix products, Osama et al. 2023). Of few short sequences
// each has spans of its own: a program's second sequence begins when its first is written, and tiles on their way do not
// hide that where there are few.
//
// Constants: PAGE, MIN_TILES of `paged_hopper.cu`.

#pragma once
#include "hopper.cuh"

constexpr int TILE = 16;  // tokens
constexpr int TILES_PER_PAGE = PAGE / TILE;
constexpr int APART = 32;   // sequences, at most, that have spans of their own: one a lane
constexpr int SHORT = 12;   // tiles of the longest equal spans for which that is worth it
constexpr int LONGER = 3;   // tiles that spans of one sequence may be longer than equal ones

// What a program has of all tiles: first to end, of this sequence and, unless sequences are apart, those behind it. span:
// tiles of a program. from, last: programs of the sequence, where sequences are apart.
struct Share {
  int first, end, sequence, span, from, last;
  bool apart;

  // tiles: of all.
  __device__ void of_equal(const int* kv_indptr, int sequences, int tiles, int lane) {
    apart = false;
    span = max((tiles + int(gridDim.x) - 1) / int(gridDim.x), MIN_TILES);
    first = blockIdx.x * span, end = min(tiles, first + span);
    if (first >= end) return;
    // The last sequence that begins there or before. 32 are looked at at once, for each look is a trip to memory.
    int low = 0, high = sequences;
    while (high - low > 1) {
      int step = (high - low + 31) / 32, at = low + lane * step;
      bool begun = at < high && kv_indptr[at] * TILES_PER_PAGE <= first;
      low += (__popc(__ballot_sync(~0u, begun)) - 1) * step;
      high = min(high, low + step);
    }
    sequence = low;
  }

  // begin, tiles: of the sequence at `lane`. False where equal spans are better.
  __device__ bool of_one(int begin, int tiles, int lane) {
    int programs = gridDim.x, all = __reduce_add_sync(~0u, tiles);
    int equal = max((all + programs - 1) / programs, MIN_TILES), count;
    if (equal > SHORT) return false;
    for (span = equal;; ++span) {
      if (span > equal + LONGER) return false;
      count = (tiles + span - 1) / span;
      if (__reduce_add_sync(~0u, count) <= programs) break;
    }
    apart = true;
    int before = count;
    for (int step = 1; step < 32; step *= 2) {
      int further = __shfl_up_sync(~0u, before, step);
      if (lane >= step) before += further;
    }
    before -= count;
    sequence = __popc(__ballot_sync(~0u, count && before <= int(blockIdx.x))) - 1;  // those without tiles are the last
    from = __shfl_sync(~0u, before, sequence), last = from + __shfl_sync(~0u, count, sequence) - 1;
    first = end = 0;
    if (int(blockIdx.x) > last) return true;
    begin = __shfl_sync(~0u, begin, sequence);
    first = begin + (blockIdx.x - from) * span;
    end = min(first + span, begin + __shfl_sync(~0u, tiles, sequence));
    return true;
  }
};

__device__ Share share_of(const int* kv_indptr, int sequences, int lane) {
  Share share;
  if (sequences <= APART) {
    int begin = lane < sequences ? kv_indptr[lane] : 0, stop = lane < sequences ? kv_indptr[lane + 1] : 0;
    if (share.of_one(begin * TILES_PER_PAGE, (stop - begin) * TILES_PER_PAGE, lane)) return share;
  }
  share.of_equal(kv_indptr, sequences, kv_indptr[sequences] * TILES_PER_PAGE, lane);
  return share;
}
