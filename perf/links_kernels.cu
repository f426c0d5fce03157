#include "links_kernels.h"

#include "bulk.cuh"
#include "launch.cuh"
#include "load.cuh"

#include <algorithm>

namespace ultraep {

enum { THREADS = 1024, UNROLLED = 8 };

// ---- copies ----

// A thread has so many loads under way before it stores.
static __global__ void __launch_bounds__(THREADS) copyKernel(uint4 *to, const uint4 *from, int64_t count) {
  int64_t step = (int64_t)gridDim.x * THREADS * UNROLLED;
  for (int64_t first = (int64_t)blockIdx.x * THREADS * UNROLLED + threadIdx.x; first < count; first += step) {
    uint4 values[UNROLLED];
#pragma unroll
    for (int i = 0; i < UNROLLED; i++)
      if (first + i * THREADS < count) values[i] = from[first + i * THREADS];
#pragma unroll
    for (int i = 0; i < UNROLLED; i++)
      if (first + i * THREADS < count) to[first + i * THREADS] = values[i];
  }
}

// False where it is not so within LINKS_WAIT_SECONDS. The clock is slow: seldom looked at.
template <typename Ready> static __device__ bool waitUntil(Ready isReady) {
  uint64_t start = 0;
  for (uint32_t polls = 1;; polls++) {
    if (isReady()) return true;
    if (polls % 4096 != 0) continue;
    uint64_t now = nowNs();
    if (start == 0) start = now;
    if (now - start > (uint64_t)LINKS_WAIT_SECONDS * 1000000000) return false;
  }
}

constexpr int kBulkThreads = 64;        // the first thread of one warp loads, that of the other stores
constexpr uint32_t kStageBytes = 16384; // of one bulk copy
constexpr int kLeastStages = 4, kMostStages = 12;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// Older stores that may still read their stages when one more is begun.
constexpr uint32_t kStoring = 2;

// Tile i of a block is in stage i modulo nStages.
struct Pipe {
  uint64_t full[kMostStages]; // barriers: the tile is here
  uint32_t nFreed;            // tiles whose stages may be loaded again
};

// What the block copies: every gridDim.x-th tile.
template <typename Each> static __device__ void forTiles(int64_t bytes, Each each) {
  uint32_t i = 0;
  for (int64_t at = blockIdx.x * (int64_t)kStageBytes; at < bytes; at += gridDim.x * (int64_t)kStageBytes)
    if (!each(i++, at, (uint32_t)min(bytes - at, (int64_t)kStageBytes))) return;
}

// Both give up where a wait takes too long; the check of what arrived then tells.
static __device__ void loadTiles(Pipe &pipe, char *stages, const char *from, int64_t bytes,
                                 uint32_t nStages) {
  forTiles(bytes, [&](uint32_t i, int64_t at, uint32_t size) {
    if (!waitUntil([&] { return i - loadAcquireBlock(&pipe.nFreed) < nStages; })) return false;
    bulkLoad(stages + i % nStages * kStageBytes, from + at, size, &pipe.full[i % nStages]);
    return true;
  });
}
static __device__ void storeTiles(Pipe &pipe, const char *stages, char *to, int64_t bytes, uint32_t nStages) {
  forTiles(bytes, [&](uint32_t i, int64_t at, uint32_t size) {
    if (!waitUntil([&] { return barrierTest(&pipe.full[i % nStages], i / nStages & 1); })) return false;
    bulkStore(to + at, stages + i % nStages * kStageBytes, size);
    bulkCommit();
    bulkWaitRead<kStoring>();
    if (i >= kStoring) storeReleaseBlock(&pipe.nFreed, i + 1 - kStoring);
    return true;
  });
  bulkWaitWritten();
}
#endif

static __global__ void __launch_bounds__(kBulkThreads)
    bulkKernel(char *to, const char *from, int64_t bytes, uint32_t nStages) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char linksMemory[];
  __shared__ Pipe pipe;
  if (threadIdx.x == 0) {
    for (uint32_t i = 0; i < nStages; i++) barrierInit(&pipe.full[i]);
    barrierInitFence();
    pipe.nFreed = 0;
  }
  __syncthreads();
  if (threadIdx.x == 0) loadTiles(pipe, linksMemory, from, bytes, nStages);
  if (threadIdx.x == kBulkThreads / 2) storeTiles(pipe, linksMemory, to, bytes, nStages);
  __syncthreads(); // shared memory stays while either uses it
#endif
}

// ---- what is copied ----

// Differs by GPU and by position, and is nowhere 0.
static __device__ uint4 pattern(uint64_t seed, int64_t i) {
  uint64_t a = ((seed + 1) << 40 | (uint64_t)i) * UINT64_C(0x9e3779b97f4a7c15);
  return {(uint32_t)a, (uint32_t)(a >> 32), ~(uint32_t)a, ~(uint32_t)(a >> 32)};
}

static __global__ void __launch_bounds__(THREADS) fillKernel(uint4 *to, int64_t count, uint64_t seed) {
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += (int64_t)gridDim.x * THREADS)
    to[i] = pattern(seed, i);
}

static __global__ void __launch_bounds__(THREADS)
    checkKernel(const uint4 *at, int64_t count, uint64_t seed, unsigned long long *nWrong) {
  unsigned long long n = 0;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count;
       i += (int64_t)gridDim.x * THREADS) {
    uint4 is = at[i], was = pattern(seed, i);
    n += is.x != was.x || is.y != was.y || is.z != was.z || is.w != was.w;
  }
  if (n > 0) atomicAdd(nWrong, n);
}

// ---- flags ----

static __global__ void flagsKernel(uint64_t *mine, uint64_t *theirs, uint64_t trips, bool begins,
                                   linksFlagResult_t *result) {
  uint64_t start = 0;
  for (uint64_t i = 1; i <= LINKS_FLAG_UNTIMED + trips; i++) {
    if (begins) storeReleaseSystem(theirs, i);
    if (!waitUntil([&] { return loadAcquireSystem(mine) >= i; })) {
      result->failed = 1;
      return;
    }
    if (!begins) storeReleaseSystem(theirs, i);
    if (i == LINKS_FLAG_UNTIMED) start = nowNs();
  }
  result->ns = nowNs() - start;
}

// Of bulk copies on the current device; 0: it has none, or they are not in the code that it runs.
static cudaError_t stagesCount(int32_t *nStages) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernelAddress(bulkKernel));
  if (error != cudaSuccess) return error;
  int32_t room = std::min<int32_t>(attributes.maxDynamicSharedSizeBytes / kStageBytes, kMostStages);
  *nStages = attributes.ptxVersion >= 90 && room >= kLeastStages ? room : 0;
  return cudaSuccess;
}

} // namespace ultraep

using namespace ultraep;

extern "C" cudaError_t linksKernelsLoad(int32_t *nStages) {
  cudaError_t error =
      loadKernels({kernelAddress(copyKernel), kernelAddress(bulkKernel), kernelAddress(fillKernel),
                   kernelAddress(checkKernel), kernelAddress(flagsKernel)});
  return error == cudaSuccess ? stagesCount(nStages) : error;
}

extern "C" cudaError_t linksKernelCopy(void *to, const void *from, int64_t bytes, int32_t blocks,
                                       cudaStream_t stream) {
  return launchKernel(copyKernel, {blocks, THREADS, 0, stream}, (uint4 *)to, (const uint4 *)from, bytes / 16);
}

extern "C" cudaError_t linksKernelCopyBulk(void *to, const void *from, int64_t bytes, int32_t blocks,
                                           int32_t nStages, cudaStream_t stream) {
  return launchKernel(bulkKernel, {blocks, kBulkThreads, (size_t)nStages * kStageBytes, stream}, (char *)to,
                      (const char *)from, bytes, (uint32_t)nStages);
}

extern "C" cudaError_t linksKernelFill(void *to, int64_t bytes, int32_t seed, int32_t blocks,
                                       cudaStream_t stream) {
  return launchKernel(fillKernel, {blocks, THREADS, 0, stream}, (uint4 *)to, bytes / 16, (uint64_t)seed);
}

extern "C" cudaError_t linksKernelCheck(const void *at, int64_t bytes, int32_t seed, int32_t blocks,
                                        unsigned long long *nWrong, cudaStream_t stream) {
  return launchKernel(checkKernel, {blocks, THREADS, 0, stream}, (const uint4 *)at, bytes / 16,
                      (uint64_t)seed, nWrong);
}

extern "C" cudaError_t linksKernelFlags(uint64_t *mine, uint64_t *theirs, int32_t trips, int begins,
                                        linksFlagResult_t *result, cudaStream_t stream) {
  return launchKernel(flagsKernel, {1, 1, 0, stream}, mine, theirs, (uint64_t)trips, begins != 0, result);
}
