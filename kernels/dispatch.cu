// Dispatch: tokens -> expert-major rows, straight to their final places on the destinations.
//
// A warp takes one token (or a chunk of its row) at a time. With bulk copies: one load into the warp's
// buffer, then each lane k stores it to the token's k-th place; two buffers, so that the next load runs
// beside the stores. Without them (sm_80): 16 bytes a lane, loaded once and stored K times.
//
// ONCE: only the first of a token's rows on a rank crosses the link; when every rank is done, the
// destination's own blocks copy it to the token's other rows there, along the chain that the route left in
// the window.
#include "bulk.cuh"
#include "load.cuh"
#include "signal.cuh"
#include "warp.cuh"

#include <algorithm>

namespace ultraep {

constexpr int kMaxDispatchWarps = 16;
constexpr int kBuffers = 2; // of each warp

// How the rows are cut, and what a warp's lanes know of the current token.
struct DispatchShape {
  int nWarps, chunkBytes, nChunks; // every chunk but the last has chunkBytes
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
  // Lane k's destination of a token, null where it has none (or, ONCE, where an earlier row carries it).
  __device__ char *destination(kernelPlace_t place) const {
    if (place.rank < 0 || (x.once && (place.rank & KERNEL_PLACE_LATER))) return nullptr;
    return bases[place.rank & KERNEL_PLACE_RANK_MASK] + int64_t(place.row) * x.rowBytes;
  }
  // Bytes that lane k's row takes to another rank.
  __device__ int crossing(kernelPlace_t place) const {
    bool sent = place.rank >= 0 && !(x.once && (place.rank & KERNEL_PLACE_LATER));
    return sent && (place.rank & KERNEL_PLACE_RANK_MASK) != g.rank
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
      if (to < 0 || (x.once && (to & KERNEL_PLACE_LATER))) continue;
      auto *out = reinterpret_cast<uint32_t *>(x.peerScales[to & KERNEL_PLACE_RANK_MASK] +
                                               x.peerScalesOffset + int64_t(row) * x.scaleBytes);
      for (int i = lane; i < x.scaleBytes / 4; i += kWarp) out[i] = scales[i];
    }
  }
  __device__ kernelPlace_t placeOf(int token, int lane) const {
    return lane < g.topK ? route.places[int64_t(token) * g.topK + lane] : kernelPlace_t{-1, -1};
  }
};

// Adds what the lanes counted. By a whole warp.
__device__ __forceinline__ void addBytes(unsigned long long *counter, unsigned long long mine) {
  for (int step = kWarp / 2; step > 0; step /= 2) mine += __shfl_xor_sync(kFullWarp, mine, step);
  if (threadIdx.x % kWarp == 0 && mine) atomicAdd(counter, mine);
}

// Copies through registers: from one row to the places that the lanes hold (null: none).
__device__ __forceinline__ void copyPortable(const char *from, char *to, int nTargets, int bytes, int lane) {
  unsigned targets = __ballot_sync(kFullWarp, lane < nTargets && to != nullptr);
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
// A warp's two buffers and the barriers that say when they are loaded.
struct BulkPipe {
  char *buffers;
  uint64_t *barrier; // [kBuffers]
  uint32_t phases;   // a bit for each buffer
  int lane, bytes;

  __device__ void start(char *memory, uint64_t *barriers, int chunkBytes, int warp) {
    lane = threadIdx.x % kWarp;
    barrier = barriers + warp * kBuffers;
    buffers = memory + size_t(warp) * kBuffers * chunkBytes;
    bytes = chunkBytes;
    phases = 0;
    for (int i = 0; i < kBuffers && lane == 0; i++) barrierInit(&barrier[i]);
    if (lane == 0) barrierInitFence();
    __syncwarp();
  }
  __device__ char *buffer(int i) const { return buffers + i * bytes; }
  __device__ void load(int i, const char *from, int size) const {
    if (lane == 0) bulkLoad(buffer(i), from, size, &barrier[i]);
  }
  __device__ void wait(int i) {
    barrierWait(&barrier[i], phases >> i & 1);
    phases ^= 1u << i;
  }
};

// One warp's share of the tokens through its buffers. Items are (token, chunk) pairs, every `stride`-th
// token.
__device__ void dispatchBulk(const DispatchContext &c, char *memory, uint64_t *barriers, int first,
                             int stride) {
  BulkPipe pipe;
  pipe.start(memory, barriers, c.shape.chunkBytes, threadIdx.x / kWarp);
  int nTokens = first < c.x.nTokens ? (c.x.nTokens - first + stride - 1) / stride : 0;
  int nItems = nTokens * c.shape.nChunks;
  auto load = [&](int item) {
    int token = first + item / c.shape.nChunks * stride, chunk = item % c.shape.nChunks;
    pipe.load(item % kBuffers, c.x.sendRows + int64_t(token) * c.x.rowBytes + chunk * c.shape.chunkBytes,
              c.chunkSize(chunk));
  };
  if (nItems > 0) load(0);
  kernelPlace_t place = {-1, -1};
  unsigned long long crossed = 0;
  for (int item = 0; item < nItems; item++) {
    int token = first + item / c.shape.nChunks * stride, chunk = item % c.shape.nChunks;
    if (chunk == 0) {
      place = c.placeOf(token, pipe.lane);
      c.sendExtras(token, place, pipe.lane);
      crossed += c.crossing(place);
    }
    if (item + 1 < nItems) {
      bulkWaitRead<0>(); // the other buffer's stores, issued one item ago, have read it
      __syncwarp();
      load(item + 1);
    }
    pipe.wait(item % kBuffers);
    char *to = c.destination(place);
    if (to) bulkStore(to + chunk * c.shape.chunkBytes, pipe.buffer(item % kBuffers), c.chunkSize(chunk));
    bulkCommit();
  }
  bulkWaitWritten();
  addBytes(&c.g.state->dispatchBytes, crossed);
}
#endif

// ONCE, at the destination: rows that came copy on to their tokens' other rows here. Warps take every
// stride-th row.
__device__ void dispatchSpread(const DispatchContext &c, int first, int stride) {
  int lane = threadIdx.x % kWarp;
  auto *meta = reinterpret_cast<const kernelMeta_t *>(c.g.windows[c.g.rank] + c.route.metaOffset);
  char *rows = c.bases[c.g.rank];
  for (int segment = 0; segment < c.g.nSegments; segment++) {
    int64_t from = c.route.firstRow[segment], end = from + c.route.rows[segment];
    for (int64_t row = from + first; row < end; row += stride) {
      int next = __ldcg(&meta[row].isFirst) ? __ldcg(&meta[row].next) : -1;
      if (next < 0) continue;
      // Lane i gets the token's i-th later row here.
      int mine = -1, n = 0;
      for (; next >= 0 && n < kWarp; n++) {
        if (lane == n) mine = next;
        next = __ldcg(&meta[next].next);
      }
      char *to = mine < 0 ? nullptr : rows + int64_t(mine) * c.x.rowBytes;
      copyPortable(rows + row * c.x.rowBytes, to, n, c.x.rowBytes, lane);
      if (c.x.scaleBytes == 0) continue;
      char *scales = c.x.peerScales[c.g.rank] + c.x.peerScalesOffset;
      for (int i = 0; i < n; i++) {
        auto *out =
            reinterpret_cast<uint32_t *>(scales + int64_t(__shfl_sync(kFullWarp, mine, i)) * c.x.scaleBytes);
        auto *in = reinterpret_cast<const uint32_t *>(scales + row * c.x.scaleBytes);
        for (int j = lane; j < c.x.scaleBytes / 4; j += kWarp) out[j] = in[j];
      }
    }
  }
}

template <bool kBulk>
__global__ void __launch_bounds__(kMaxDispatchWarps *kWarp, 1)
    dispatchKernel(const __grid_constant__ kernelGroup_t g, const __grid_constant__ kernelRoute_t route,
                   const __grid_constant__ kernelExchange_t x, const DispatchShape shape) {
  extern __shared__ __align__(128) char memory[];
  __shared__ uint64_t barriers[kMaxDispatchWarps * kBuffers];
  if (route.status->code != kSuccess) return; // alike on every rank
  char **bases = reinterpret_cast<char **>(memory);
  uint32_t call = g.state->exchangeCalls + 1;
  for (int r = threadIdx.x; r < g.planner.nRanks; r += blockDim.x)
    bases[r] = x.peerRows[r] + x.peerRowsOffset;
  DispatchContext c{g, route, x, shape, bases};
  int first = int(blockIdx.x) * shape.nWarps + int(threadIdx.x) / kWarp,
      stride = int(gridDim.x) * shape.nWarps;
  int differs;
  if (blockIdx.x == 0) raiseFlags(g, KERNEL_FLAG_READY, call, x.check);
  bool alive = waitFlags(g, KERNEL_FLAG_READY, call, KERNEL_PHASE_DISPATCH, x.check, &differs);
  if (alive && differs >= 0) {
    if (threadIdx.x == 0) failGroup(g, kInvalidUsage, KERNEL_PHASE_DISPATCH, differs);
    alive = false;
  }
  if (alive) {
    if constexpr (kBulk) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
      size_t table = (g.planner.nRanks * sizeof(char *) + 127) / 128 * 128;
      dispatchBulk(c, memory + table, barriers, first, stride);
#endif
    } else {
      int lane = threadIdx.x % kWarp;
      unsigned long long crossed = 0;
      for (int token = first; token < x.nTokens; token += stride) {
        kernelPlace_t place = c.placeOf(token, lane);
        c.sendExtras(token, place, lane);
        crossed += c.crossing(place);
        copyPortable(x.sendRows + int64_t(token) * x.rowBytes, c.destination(place), g.topK, x.rowBytes,
                     lane);
      }
      addBytes(&g.state->dispatchBytes, crossed);
    }
    if (x.once) {
      alive = gridBarrier(g, 0, KERNEL_PHASE_DISPATCH);
      if (alive && blockIdx.x == 0) raiseFlags(g, KERNEL_FLAG_DONE, call, x.check);
      if (alive) alive = waitFlags(g, KERNEL_FLAG_DONE, call, KERNEL_PHASE_DISPATCH, x.check, &differs);
      if (alive) dispatchSpread(c, first, stride);
    }
  }
  if (lastBlockOut(g)) {
    if (alive && !x.once) {
      raiseFlags(g, KERNEL_FLAG_DONE, call, x.check);
      waitFlags(g, KERNEL_FLAG_DONE, call, KERNEL_PHASE_DISPATCH, x.check, &differs);
    }
    if (threadIdx.x == 0) resetState(g, &g.state->exchangeCalls, call);
  }
}

cudaError_t loadDispatchKernels() {
  return loadKernels({kernelAddress(dispatchKernel<true>), kernelAddress(dispatchKernel<false>)});
}

} // namespace ultraep

int kernelDispatchLaunch(const kernelGroup_t *group, const kernelRoute_t *route,
                         const kernelExchange_t *exchange, cudaStream_t stream) {
  using namespace ultraep;
  int device, limit, major;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  size_t table = (group->planner.nRanks * sizeof(char *) + 127) / 128 * 128,
         room = size_t(limit) - table - 2048;
  DispatchShape shape = {kMaxDispatchWarps, 0, 0};
  // Chunks of at most 16 KiB; as many warps as buffers fit, at least half of the most.
  int most = std::min<int>(16384, int(room / (kMaxDispatchWarps / 2 * kBuffers)) / 128 * 128);
  shape.nChunks = (exchange->rowBytes + most - 1) / most;
  shape.chunkBytes = ((exchange->rowBytes + shape.nChunks - 1) / shape.nChunks + 127) / 128 * 128;
  shape.nChunks = (exchange->rowBytes + shape.chunkBytes - 1) / shape.chunkBytes;
  bool bulk = major >= 9;
  if (bulk)
    shape.nWarps = int(std::min<size_t>(kMaxDispatchWarps, room / (size_t(kBuffers) * shape.chunkBytes)));
  size_t bytes = table + (bulk ? size_t(shape.nWarps) * kBuffers * shape.chunkBytes : 0);
  int nBlocks = std::max(1, std::min(group->nBlocks, (exchange->nTokens + 3) / 4));
  if (exchange->once) nBlocks = group->nBlocks; // the destination's copies are not known here
  auto kernel = bulk ? dispatchKernel<true> : dispatchKernel<false>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error != cudaSuccess) return error;
  kernel<<<nBlocks, shape.nWarps * kWarp, bytes, stream>>>(*group, *route, *exchange, shape);
  return cudaGetLastError();
}
