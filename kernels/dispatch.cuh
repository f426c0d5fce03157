// Dispatch: tokens -> expert-major rows, straight to their final places on the destinations.
//
// A warp takes one token (or a chunk of its row) at a time. With bulk copies: one load into the warp's
// buffer, then each lane k stores it to the token's k-th place; two buffers, so that the next load runs
// beside the stores. Without them (sm_80): 16 bytes a lane, loaded once and stored K times.
//
// ONCE: only the first of a token's rows on another rank crosses the link; when every rank is done, the
// destination's own blocks copy it to the token's other rows there, along the chain that the route left in
// the window. Rows on the token's own rank go straight to their places.
#ifndef ULTRAEP_DISPATCH_CUH_
#define ULTRAEP_DISPATCH_CUH_

#include "bulk.cuh"
#include "meta.cuh"
#include "signal.cuh"
#include "warp.cuh"

#include <algorithm>

namespace ultraep {

constexpr int kMaxDispatchWarps = 16;
constexpr int kBuffers = 2; // of each warp

// How the rows are cut, and what a warp's lanes know of the current token.
struct DispatchShape {
  int nWarps, chunkBytes, nChunks; // every chunk but the last has chunkBytes
  int chainBytes;                  // of all warps, where rows are spread
};

struct DispatchContext {
  const kernelGroup_t &g;
  const kernelRoute_t &route;
  const kernelExchange_t &x;
  const DispatchShape &shape;
  char *const *bases; // [R] in shared memory: where the symmetric rows begin on each rank

  __device__ int chunkSize(int chunk) const {
    return chunk + 1 < shape.nChunks ? shape.chunkBytes : x.rowBytes - chunk * shape.chunkBytes;
  }
  // Whether the token's rank sends a row; else there is none, or, ONCE, an earlier row carries it.
  __device__ bool isSent(int rank) const {
    bool carried = x.once && (rank & KERNEL_PLACE_LATER) && (rank & KERNEL_PLACE_RANK_MASK) != g.rank;
    return rank >= 0 && !carried;
  }
  // Lane k's destination of a token, null where it has none.
  __device__ char *destination(kernelPlace_t place) const {
    if (!isSent(place.rank)) return nullptr;
    return bases[place.rank & KERNEL_PLACE_RANK_MASK] + int64_t(place.row) * x.rowBytes;
  }
  // Bytes that lane k's row takes to another rank.
  __device__ int crossing(kernelPlace_t place) const {
    return isSent(place.rank) && (place.rank & KERNEL_PLACE_RANK_MASK) != g.rank
               ? x.rowBytes + (x.sendScales ? x.scaleBytes : 0)
               : 0;
  }
  // Scales and weights of one token's rows, by one lane for the weight and the whole warp for scales.
  __device__ void sendExtras(int token, kernelPlace_t place, int lane) const {
    int rank = place.rank & KERNEL_PLACE_RANK_MASK;
    if (x.peerWeights && place.rank >= 0) {
      auto *weights = reinterpret_cast<float *>(x.peerWeights[rank] + x.peerWeightsOffset);
      weights[place.row] = route.weights[int64_t(token) * g.topK + lane];
    }
    if (!x.sendScales) return;
    auto *scales = reinterpret_cast<const uint32_t *>(x.sendScales + int64_t(token) * x.scaleBytes);
    for (int k = 0; k < g.topK; k++) {
      int to = __shfl_sync(kFullWarp, place.rank, k), row = __shfl_sync(kFullWarp, place.row, k);
      if (!isSent(to)) continue;
      auto *out = reinterpret_cast<uint32_t *>(x.peerScales[to & KERNEL_PLACE_RANK_MASK] +
                                               x.peerScalesOffset + int64_t(row) * x.scaleBytes);
      for (int i = lane; i < x.scaleBytes / 4; i += kWarp) out[i] = scales[i];
    }
  }
  // ONCE, at the destination: the scales of a row that came, to the row that this lane holds (-1: none).
  __device__ void spreadScales(int64_t row, int mine, int lane) const {
    if (x.scaleBytes == 0) return;
    char *scales = x.peerScales[g.rank] + x.peerScalesOffset;
    auto *in = reinterpret_cast<const uint32_t *>(scales + row * x.scaleBytes);
    for (unsigned left = __ballot_sync(kFullWarp, mine >= 0); left; left &= left - 1) {
      int to = __shfl_sync(kFullWarp, mine, __ffs(left) - 1);
      auto *out = reinterpret_cast<uint32_t *>(scales + int64_t(to) * x.scaleBytes);
      for (int i = lane; i < x.scaleBytes / 4; i += kWarp) out[i] = __ldcg(in + i);
    }
  }
  __device__ kernelPlace_t placeOf(int token, int lane) const {
    return lane < g.topK ? route.places[int64_t(token) * g.topK + lane] : kernelPlace_t{-1, -1};
  }
};

// Copies through registers: from one row to the places that the lanes hold (null: none).
__device__ __forceinline__ void copyPortable(const char *from, char *to, int bytes, int lane) {
  unsigned targets = __ballot_sync(kFullWarp, to != nullptr);
  for (int at = lane * 16; at - lane * 16 < bytes; at += kWarp * 16) {
    bool inside = at < bytes;
    uint4 value = inside ? *reinterpret_cast<const uint4 *>(from + at) : uint4{};
    for (unsigned left = targets; left; left &= left - 1) {
      auto *row =
          reinterpret_cast<char *>(__shfl_sync(kFullWarp, reinterpret_cast<uintptr_t>(to), __ffs(left) - 1));
      if (inside) *reinterpret_cast<uint4 *>(row + at) = value;
    }
  }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// A warp's two buffers, used in turn, and the barriers that say when they are loaded.
struct BulkPipe {
  char *buffers;
  uint64_t *barrier; // [kBuffers]
  uint32_t phases;   // a bit for each buffer
  int bytes, loads, waits;

  __device__ void start(char *memory, uint64_t *barriers, int chunkBytes) {
    int warp = threadIdx.x / kWarp;
    barrier = barriers + warp * kBuffers;
    buffers = memory + size_t(warp) * kBuffers * chunkBytes;
    bytes = chunkBytes;
    phases = loads = waits = 0;
    if (threadIdx.x % kWarp == 0) {
      for (int i = 0; i < kBuffers; i++) barrierInit(&barrier[i]);
      barrierInitFence();
    }
    __syncwarp();
  }
  __device__ void load(const char *from, int size) {
    int i = loads++ % kBuffers;
    if (threadIdx.x % kWarp == 0) bulkLoad(buffers + i * bytes, from, size, &barrier[i]);
  }
  // The buffer of the oldest load not yet waited for.
  __device__ const char *wait() {
    int i = waits++ % kBuffers;
    barrierWait(&barrier[i], phases >> i & 1);
    phases ^= 1u << i;
    return buffers + i * bytes;
  }
};

// Moves rows through a warp's buffers: source(i) is where row i of n begins, target(i) where this lane's copy
// of it goes (null: nowhere); both are asked once for each row, in order, source one row ahead.
template <typename Source, typename Target>
__device__ void moveBulk(BulkPipe &pipe, const DispatchContext &c, int n, Source source, Target target) {
  int nItems = n * c.shape.nChunks;
  const char *from = nullptr;
  char *to = nullptr;
  auto load = [&](int item) {
    int chunk = item % c.shape.nChunks;
    if (chunk == 0) from = source(item / c.shape.nChunks);
    pipe.load(from + chunk * c.shape.chunkBytes, c.chunkSize(chunk));
  };
  if (nItems > 0) load(0);
  for (int item = 0; item < nItems; item++) {
    int chunk = item % c.shape.nChunks;
    if (chunk == 0) to = target(item / c.shape.nChunks);
    if (item + 1 < nItems) {
      bulkWaitRead<0>(); // the other buffer's stores, issued one item ago, have read it
      __syncwarp();
      load(item + 1);
    }
    const char *buffer = pipe.wait();
    if (to) bulkStore(to + chunk * c.shape.chunkBytes, buffer, c.chunkSize(chunk));
    bulkCommit();
  }
  bulkWaitRead<0>();
  __syncwarp();
}
#endif

// One warp's share of the tokens: every stride-th.
struct DispatchTokens {
  int first, end, stride;
};

template <typename Move>
__device__ void dispatchTokens(const DispatchContext &c, DispatchTokens tokens, Move move) {
  int lane = threadIdx.x % kWarp, first = tokens.first, stride = tokens.stride;
  int n = first < tokens.end ? (tokens.end - first + stride - 1) / stride : 0;
  unsigned long long crossed = 0;
  move(
      n, [&](int i) { return c.x.sendRows + int64_t(first + i * stride) * c.x.rowBytes; },
      [&](int i) {
        kernelPlace_t place = c.placeOf(first + i * stride, lane);
        c.sendExtras(first + i * stride, place, lane);
        crossed += c.crossing(place);
        return c.destination(place);
      });
  warpCount(&c.g.state->dispatchBytes, crossed);
}

// ONCE, at the destination: rows that came go on to their tokens' other rows here. chains: see followChains.
template <typename Move>
__device__ void dispatchSpread(const DispatchContext &c, int32_t *chains, int first, int stride, Move move) {
  int lane = threadIdx.x % kWarp, topK = c.g.topK;
  auto *meta = reinterpret_cast<const kernelMeta_t *>(c.g.windows[c.g.rank] + c.route.metaOffset);
  char *rows = c.bases[c.g.rank];
  forMetaRows(c.g, c.route, first, stride, [&](int64_t at, int64_t end) {
    float weight;
    unsigned heads = followChains(c.g, meta, at, end, chains, nullptr, &weight);
    auto nth = [&](int i) { return __fns(heads, 0, i + 1); };
    move(
        __popc(heads), [&](int i) { return rows + (at + nth(i)) * c.x.rowBytes; },
        [&](int i) {
          int mine = lane < topK ? chains[nth(i) * topK + lane] : -1;
          c.spreadScales(at + nth(i), mine, lane);
          return mine < 0 ? nullptr : rows + int64_t(mine) * c.x.rowBytes;
        });
    __syncwarp();
  });
}

// The dynamic shared memory of a dispatch: the table of bases, chains where rows are spread, buffers.
struct DispatchMemory {
  char **bases;
  int32_t *chains; // of this warp
  char *buffers;

  __host__ __device__ static size_t tableBytes(int nRanks) {
    return (nRanks * sizeof(char *) + 127) / 128 * 128;
  }
  __device__ DispatchMemory(char *memory, const kernelGroup_t &g, const DispatchShape &shape) {
    bases = reinterpret_cast<char **>(memory);
    memory += tableBytes(g.planner.nRanks);
    chains = reinterpret_cast<int32_t *>(memory) + int(threadIdx.x) / kWarp * kMetaRows * g.topK;
    buffers = memory + shape.chainBytes;
  }
  __device__ void fillTable(const kernelGroup_t &g, const kernelExchange_t &x) const {
    for (int r = threadIdx.x; r < g.planner.nRanks; r += blockDim.x)
      bases[r] = x.peerRows[r] + x.peerRowsOffset;
  }
};

// All rows: this warp's tokens, then, ONCE, this rank's part of the spreading. Every thread of the grid calls
// it. False when the group failed; ONCE has raised DONE then.
template <bool kBulk>
__device__ inline bool dispatchRun(const DispatchContext &c, const DispatchMemory &memory, uint64_t *barriers,
                                   DispatchTokens tokens, uint32_t call, bool alive) {
  int warp = threadIdx.x / kWarp, first = int(blockIdx.x) * c.shape.nWarps + warp,
      stride = int(gridDim.x) * c.shape.nWarps;
  bool moves = warp < c.shape.nWarps;
  auto work = [&](auto move, auto written) {
    if (alive && moves) dispatchTokens(c, tokens, move);
    written();
    if (!alive || !c.x.once) return;
    int ignored;
    alive = gridBarrier(c.g, 1, KERNEL_PHASE_DISPATCH);
    if (alive && blockIdx.x == 0) raiseFlags(c.g, doneKind(c.g), call, c.x.check);
    if (alive) alive = waitFlags(c.g, doneKind(c.g), call, KERNEL_PHASE_DISPATCH, c.x.check, &ignored);
    if (alive && moves) dispatchSpread(c, memory.chains, first, stride, move);
    written();
  };
  if constexpr (kBulk) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    BulkPipe pipe;
    if (moves) pipe.start(memory.buffers, barriers, c.shape.chunkBytes);
    work(
        [&](int n, auto source, auto target) {
          bulkFence(); // what peers' bulk copies wrote was acquired by ordinary loads
          moveBulk(pipe, c, n, source, target);
        },
        [] { bulkWaitWritten(); });
#endif
  } else {
    int lane = threadIdx.x % kWarp;
    work(
        [&](int n, auto source, auto target) {
          for (int i = 0; i < n; i++) {
            const char *from = source(i);
            copyPortable(from, target(i), c.x.rowBytes, lane);
          }
        },
        [] {});
  }
  return alive;
}

// Chunks of at most 16 KiB; as many warps as buffers fit, at least half of the most. staticBytes: shared
// memory that the kernel declares, at most. *bytes: dynamic shared memory.
inline DispatchShape dispatchShape(const kernelGroup_t &g, const kernelExchange_t &x, size_t staticBytes,
                                   size_t *bytes) {
  size_t table = DispatchMemory::tableBytes(g.planner.nRanks);
  size_t chains = x.once ? size_t(kMaxDispatchWarps) * kMetaRows * g.topK * sizeof(int32_t) : 0;
  size_t room = size_t(g.sharedBytes) - table - chains - staticBytes;
  DispatchShape shape = {kMaxDispatchWarps, 0, 0, int(chains)};
  int most = std::min<int>(16384, int(room / (kMaxDispatchWarps / 2 * kBuffers)) / 128 * 128);
  shape.nChunks = (x.rowBytes + most - 1) / most;
  shape.chunkBytes = ((x.rowBytes + shape.nChunks - 1) / shape.nChunks + 127) / 128 * 128;
  shape.nChunks = (x.rowBytes + shape.chunkBytes - 1) / shape.chunkBytes;
  if (g.hasBulk)
    shape.nWarps = int(std::min<size_t>(kMaxDispatchWarps, room / (size_t(kBuffers) * shape.chunkBytes)));
  *bytes = table + chains + (g.hasBulk ? size_t(shape.nWarps) * kBuffers * shape.chunkBytes : 0);
  return shape;
}

// A block for every few tokens; ONCE all, as the destination's copies are not known here.
inline int dispatchBlocks(const kernelGroup_t &g, const kernelExchange_t &x) {
  return x.once ? g.nBlocks : std::max(1, std::min(g.nBlocks, (x.nTokens + 3) / 4));
}

} // namespace ultraep

#endif
