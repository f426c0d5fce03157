// Rows of one rank that belong to the same token of another, as the route left word of them in the window:
// the first has been sent, or is summed, for the others (kernelMeta_t).
#ifndef ULTRAEP_META_CUH_
#define ULTRAEP_META_CUH_

#include "kernels.h"
#include "warp.cuh"

#include <cuda_runtime.h>

namespace ultraep {

constexpr int kMetaRows = 16; // that a warp looks at together

__device__ __forceinline__ kernelMeta_t loadMeta(const kernelMeta_t *at) {
  uint4 v = __ldcg(reinterpret_cast<const uint4 *>(at));
  return {int32_t(v.x), int32_t(v.y), __uint_as_float(v.z), int32_t(v.w)};
}

// Calls visit(at, end) for this warp's share of the rows of all segments: rows from `at` on, kMetaRows of
// them, but for what lies beyond `end`. By a warp, the first-th of `stride`; a lane looks up one segment
// of 32.
template <typename Visit>
__device__ __forceinline__ void forMetaRows(const kernelGroup_t &g, const kernelRoute_t &route, int first,
                                            int stride, Visit visit) {
  int lane = threadIdx.x % kWarp, before = 0; // parts of earlier segments
#pragma unroll 1
  for (int segment = lane; segment - lane < g.nSegments; segment += kWarp) {
    bool isThere = segment < g.nSegments;
    long long start = isThere ? route.firstRow[segment] : 0, count = isThere ? route.rows[segment] : 0;
    int parts = int((count + kMetaRows - 1) / kMetaRows), through = parts;
    for (int step = 1; step < kWarp; step *= 2) {
      int lower = __shfl_up_sync(kFullWarp, through, step);
      if (lane >= step) through += lower;
    }
    int all = __shfl_sync(kFullWarp, through, kWarp - 1);
#pragma unroll 1
    for (int i = (first - before % stride + stride) % stride; i < all; i += stride) {
      int owner = __ffs(__ballot_sync(kFullWarp, through > i)) - 1;
      int64_t from = __shfl_sync(kFullWarp, start, owner), end = from + __shfl_sync(kFullWarp, count, owner);
      visit(from + int64_t(i - __shfl_sync(kFullWarp, through - parts, owner)) * kMetaRows, end);
    }
    before += all;
  }
}

// The chains that begin at rows at .. at + kMetaRows - 1, a lane each: chains[lane][n], [kMetaRows][topK] of
// this warp, is the nth row after the first, -1 beyond the last, and weights (where not null) its weight;
// *weight is the first's. Returns a bit for each lane whose row has others, and is another rank's token's. By
// a warp.
__device__ __forceinline__ unsigned followChains(const kernelGroup_t &g, const kernelMeta_t *meta, int64_t at,
                                                 int64_t end, int32_t *chains, float *weights,
                                                 float *weight) {
  int lane = threadIdx.x % kWarp;
  int64_t row = at + lane;
  bool isMine = lane < kMetaRows, isThere = isMine && row < end;
  kernelMeta_t first = isThere ? loadMeta(meta + row) : kernelMeta_t{};
  int next = isThere && first.isFirst && first.source != g.rank ? first.next : -1;
  unsigned heads = __ballot_sync(kFullWarp, next >= 0);
  *weight = first.weight;
  for (int n = 0; n < g.topK; n++) {
    kernelMeta_t follower = next >= 0 ? loadMeta(meta + next) : kernelMeta_t{-1, 0, 0, 0};
    if (isMine) chains[lane * g.topK + n] = next;
    if (isMine && weights) weights[lane * g.topK + n] = follower.weight;
    next = follower.next;
  }
  __syncwarp();
  return heads;
}

} // namespace ultraep

#endif
