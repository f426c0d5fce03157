// Combine: expert-major rows -> tokens. A warp takes one token: each lane holds 16-byte columns of all its
// rows, sums them in fp32 in order of k, rounds once and writes once. Products and sums are separate
// roundings (no fused multiply-add), so that the host backend gives the same bits.
//
// PARTIAL: first each rank sums, for every token of another rank with two or more rows here, those rows into
// a staging area of its window; then a token's rank reads one row of every other rank, and its own rows.
#include "elements.cuh"
#include "load.cuh"
#include "meta.cuh"
#include "signal.cuh"
#include "warp.cuh"

#include <algorithm>

namespace ultraep {

constexpr int kCombineThreads = 512;

// Adds the rows of the lanes in `rows` to columns [at + i * kWarp * 16, + 16 bytes), i < kColumns, of which
// those below `to` are there, and writes them. kRows * kColumns loads are in flight together.
template <typename As, bool kWeighted, int kRows, int kColumns>
__device__ __forceinline__ void sumColumns(char *out, const char *row, float weight, unsigned rows, int at,
                                           int to) {
  constexpr int kBlock = kWarp * 16;
  float sum[kColumns][As::kElements] = {};
  for (unsigned left = rows; left;) {
    uint4 value[kColumns][kRows];
    float scale[kRows];
    unsigned batch = left;
#pragma unroll
    for (int j = 0; j < kRows; j++) {
      if (!left) break;
      int source = __ffs(left) - 1;
      left &= left - 1;
      auto *start =
          reinterpret_cast<const char *>(__shfl_sync(kFullWarp, reinterpret_cast<uintptr_t>(row), source));
      if (kWeighted) scale[j] = __shfl_sync(kFullWarp, weight, source);
#pragma unroll
      for (int c = 0; c < kColumns; c++)
        value[c][j] = at + c * kBlock < to ? loadRow(start + at + c * kBlock) : uint4{};
    }
#pragma unroll
    for (int j = 0; j < kRows; j++) {
      if (!batch) break;
      batch &= batch - 1;
#pragma unroll
      for (int c = 0; c < kColumns; c++) {
#pragma unroll
        for (int i = 0; i < As::kElements; i++) {
          float x = As::get(value[c][j], i);
          sum[c][i] = __fadd_rn(sum[c][i], kWeighted ? __fmul_rn(scale[j], x) : x);
        }
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kColumns; c++)
    if (at + c * kBlock < to) *reinterpret_cast<uint4 *>(out + at + c * kBlock) = As::put(sum[c]);
}

// Writes columns [from, to) of round(0 + w0 * row0 + w1 * row1 + ...). Lane i holds row i (null: none) and
// its weight; kWeighted: else plain sums. kRows, kColumns: as of sumColumns. By a warp.
template <typename As, bool kWeighted, int kRows, int kColumns>
__device__ __forceinline__ void sumRows(char *out, const char *row, float weight, int from, int to,
                                        int lane) {
  unsigned rows = __ballot_sync(kFullWarp, row != nullptr);
  for (int column = from; column < to; column += kColumns * kWarp * 16)
    sumColumns<As, kWeighted, kRows, kColumns>(out, row, weight, rows, column + lane * 16, to);
}

// PARTIAL, at the experts' rank: sums for every token of another rank with two or more rows here. chains and
// weights: see followChains.
template <typename As, bool kWeighted>
__device__ void combinePartials(const kernelGroup_t &g, const kernelRoute_t &route, const kernelExchange_t &x,
                                int32_t *chains, float *weights, int first, int stride) {
  int lane = threadIdx.x % kWarp, topK = g.topK;
  auto *meta = reinterpret_cast<const kernelMeta_t *>(g.windows[g.rank] + route.metaOffset);
  const char *rows = x.peerRows[g.rank] + x.peerRowsOffset;
  char *partials = g.windows[g.rank] + x.partialsOffset;
  forMetaRows(g, route, first, stride, [&](int64_t at, int64_t end) {
    float headWeight;
    for (unsigned left = followChains(g, meta, at, end, chains, weights, &headWeight); left;
         left &= left - 1) {
      int head = __ffs(left) - 1, nth = head * topK + lane - 1; // lane 0 takes the first row
      int64_t mine = lane == 0 ? at + head : lane < topK ? chains[nth] : -1;
      float weight = __shfl_sync(kFullWarp, headWeight, head);
      if (lane > 0 && lane < topK) weight = weights[nth];
      sumRows<As, kWeighted, 4, 3>(partials + (at + head) * x.rowBytes,
                                   mine < 0 ? nullptr : rows + mine * x.rowBytes, weight, 0, x.rowBytes,
                                   lane);
    }
    __syncwarp();
  });
}

// This rank's tokens, or, where there are fewer tokens than warps, parts of their columns. Lane k looks at
// the k-th row; PARTIAL: on other ranks at the partial sum that begins with it, if any.
template <typename As, bool kWeighted>
__device__ void combineTokens(const kernelGroup_t &g, const kernelRoute_t &route, const kernelExchange_t &x,
                              const char *const *bases, int first, int stride) {
  constexpr int kBlock = 2 * kWarp * 16;
  int lane = threadIdx.x % kWarp, blocks = (x.rowBytes + kBlock - 1) / kBlock;
  int parts = max(1, min(blocks, stride / max(1, x.nTokens))), width = (blocks + parts - 1) / parts * kBlock;
  unsigned long long crossed = 0;
  for (int item = first; item < x.nTokens * parts; item += stride) {
    int token = item / parts, from = item % parts * width;
    int64_t at = int64_t(token) * g.topK + lane;
    kernelPlace_t place = lane < g.topK ? route.places[at] : kernelPlace_t{-1, -1};
    int rank = place.rank & KERNEL_PLACE_RANK_MASK;
    bool sums = x.once && rank != g.rank; // at the row's rank
    bool read = place.rank >= 0 && !(sums && (place.rank & KERNEL_PLACE_LATER));
    bool partial = read && sums && (place.rank & KERNEL_PLACE_SHARED);
    const char *row = nullptr;
    if (read) row = partial ? g.windows[rank] + x.partialsOffset : bases[rank];
    if (read) row += int64_t(place.row) * x.rowBytes;
    float weight = kWeighted && read && !partial ? route.weights[at] : 1.0f;
    if (read && rank != g.rank && from == 0) crossed += x.rowBytes;
    sumRows<As, kWeighted, 8, 2>(x.recvRows + int64_t(token) * x.rowBytes, row, weight, from,
                                 min(x.rowBytes, from + width), lane);
  }
  warpCount(&g.state->combineBytes, crossed);
}

template <typename As, bool kWeighted>
__global__ void __launch_bounds__(kCombineThreads, 1)
    combineKernel(const __grid_constant__ kernelGroup_t g, const __grid_constant__ kernelRoute_t route,
                  const __grid_constant__ kernelExchange_t x) {
  extern __shared__ __align__(16) char combineMemory[];
  if (routeRefuses(g, route)) return; // alike on every rank
  auto *bases = reinterpret_cast<const char **>(combineMemory);
  uint32_t call = callOf(g);
  for (int r = threadIdx.x; r < g.planner.nRanks; r += blockDim.x)
    bases[r] = x.peerRows[r] + x.peerRowsOffset;
  int warps = blockDim.x / kWarp, first = int(blockIdx.x) * warps + int(threadIdx.x) / kWarp;
  int stride = int(gridDim.x) * warps, other = -1;
  bool alive = true;
  if (x.once) {
    auto *chains = reinterpret_cast<int32_t *>(bases + g.planner.nRanks) +
                   int(threadIdx.x) / kWarp * 2 * kMetaRows * g.topK;
    auto *weights = reinterpret_cast<float *>(chains + kMetaRows * g.topK);
    combinePartials<As, kWeighted>(g, route, x, chains, weights, first, stride);
    alive = gridBarrier(g, 0, KERNEL_PHASE_COMBINE);
  }
  if (alive) alive = openExchange(g, x.check, call, KERNEL_PHASE_COMBINE, &other);
  if (alive) combineTokens<As, kWeighted>(g, route, x, bases, first, stride);
  closeExchange(g, route, x.check, call, KERNEL_PHASE_COMBINE, alive, other);
}

template <typename As> static auto combineKernelOf(bool weighted) {
  return weighted ? combineKernel<As, true> : combineKernel<As, false>;
}

cudaError_t loadCombineKernels() {
  return loadKernels(
      {kernelAddress(combineKernel<AsBfloat16, true>), kernelAddress(combineKernel<AsBfloat16, false>),
       kernelAddress(combineKernel<AsFloat16, true>), kernelAddress(combineKernel<AsFloat16, false>),
       kernelAddress(combineKernel<AsFloat32, true>), kernelAddress(combineKernel<AsFloat32, false>)});
}

} // namespace ultraep

int kernelCombineLaunch(const kernelGroup_t *group, const kernelRoute_t *route,
                        const kernelExchange_t *exchange, cudaStream_t stream) {
  using namespace ultraep;
  bool weighted = exchange->weighted;
  auto kernel = exchange->dataType == 0   ? combineKernelOf<AsBfloat16>(weighted)
                : exchange->dataType == 1 ? combineKernelOf<AsFloat16>(weighted)
                                          : combineKernelOf<AsFloat32>(weighted);
  // A warp for every two blocks of columns, up to the group's blocks.
  int64_t columns = (exchange->rowBytes + 2 * kWarp * 16 - 1) / (2 * kWarp * 16),
          warps = kCombineThreads / kWarp;
  int64_t wanted = (exchange->nTokens * columns + warps - 1) / warps;
  int nBlocks =
      exchange->once ? group->nBlocks : int(std::max<int64_t>(1, std::min<int64_t>(group->nBlocks, wanted)));
  size_t bytes = group->planner.nRanks * sizeof(char *);
  if (exchange->once) bytes += size_t(warps) * 2 * kMetaRows * group->topK * sizeof(int32_t);
  return launchKernel(kernel, {nBlocks, kCombineThreads, bytes, stream}, *group, *route, *exchange);
}
