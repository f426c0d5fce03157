// Copies of sends and receives: by warps through registers, whatever the addresses; and by bulk copies.
#ifndef ULTRAEP_P2P_COPY_CUH_
#define ULTRAEP_P2P_COPY_CUH_

#include "bulk.cuh"
#include "elements.cuh"
#include "p2p_state.cuh"

namespace ultraep {

// ---- by a warp ----

__device__ __forceinline__ void copyBytes(char *to, const char *from, uint64_t bytes) {
  for (uint64_t i = threadIdx.x % kWarp; i < bytes; i += kWarp) to[i] = from[i];
}

// Both on 16 bytes, a multiple of 16 bytes.
__device__ __forceinline__ void copyAligned(char *to, const char *from, uint64_t bytes) {
  constexpr int kAtOnce = 8;
#pragma unroll 1
  for (uint64_t first = threadIdx.x % kWarp * 16; first < bytes; first += kAtOnce * kWarp * 16) {
    uint4 value[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; i++)
      if (first + i * kWarp * 16 < bytes) value[i] = loadRow(from + first + i * kWarp * 16);
#pragma unroll
    for (int i = 0; i < kAtOnce; i++)
      if (first + i * kWarp * 16 < bytes) *reinterpret_cast<uint4 *>(to + first + i * kWarp * 16) = value[i];
  }
}

// `to` on 16 bytes, `from` not: words of four bytes, shifted together. Reads whole words, so `bytes` must end
// four bytes before the source does.
__device__ __forceinline__ void copyShifted(char *to, const char *from, uint64_t bytes) {
  constexpr int kAtOnce = 4;
  uint32_t shift = uint32_t(reinterpret_cast<uintptr_t>(from) % 4) * 8;
  auto words = reinterpret_cast<const uint32_t *>(from - shift / 8);
#pragma unroll 1
  for (uint64_t first = threadIdx.x % kWarp * 16; first < bytes; first += kAtOnce * kWarp * 16) {
    uint32_t w[kAtOnce][5];
#pragma unroll
    for (int i = 0; i < kAtOnce; i++)
#pragma unroll
      for (int j = 0; j < 5; j++)
        if (first + i * kWarp * 16 < bytes) w[i][j] = __ldcg(words + (first + i * kWarp * 16) / 4 + j);
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      if (first + i * kWarp * 16 >= bytes) continue;
      uint4 v = {__funnelshift_r(w[i][0], w[i][1], shift), __funnelshift_r(w[i][1], w[i][2], shift),
                 __funnelshift_r(w[i][2], w[i][3], shift), __funnelshift_r(w[i][3], w[i][4], shift)};
      *reinterpret_cast<uint4 *>(to + first + i * kWarp * 16) = v;
    }
  }
}

__device__ inline void copyByWarp(char *to, const char *from, uint64_t bytes) {
  uint64_t head = min(bytes, uint64_t(-reinterpret_cast<uintptr_t>(to) % 16));
  copyBytes(to, from, head);
  to += head, from += head, bytes -= head;
  uint64_t middle = bytes / 16 * 16;
  if (reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    copyAligned(to, from, middle);
  } else {
    middle = bytes < 32 ? 0 : middle - 16;
    // The word that holds the first byte may begin before the buffer: that sixteen goes by bytes.
    uint64_t first = middle == 0 ? 0 : 16;
    copyBytes(to, from, first);
    copyShifted(to + first, from + first, middle - first);
  }
  copyBytes(to + middle, from + middle, bytes - middle);
}

// Moves a chunk that bulk copies cannot, if there is one.
__device__ inline bool moveByWarp(const P2pContext &c, uint32_t nMovers) {
  P2pChunk chunk = takeChunk(c, nMovers, true);
  if (!chunk.from) return false;
  copyByWarp(chunk.to, chunk.from, chunk.bytes);
  __syncwarp();
  if (threadIdx.x % kWarp == 0) finishChunk(chunk.job, chunk.flag, chunk.flagValue, chunk.bytes);
  return true;
}

// ---- by bulk copies: one warp takes chunks and loads their tiles, one thread of another stores them ----

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr int kP2pMostStages = 13;

struct P2pTile {
  char *to;
  uint32_t bytes;
  P2pJob *job; // of the chunk that ends with this tile; null: it does not
  uint64_t *flag;
  uint64_t flagValue, chunkBytes;
};

struct P2pPipe {
  uint64_t full[kP2pMostStages]; // barriers: the tile is here
  P2pTile tile[kP2pMostStages];  // tile i of the block is in stage i % nStages
  uint32_t nLoaded;              // tiles whose loads have begun
  uint32_t nFreed;               // tiles whose stages may be loaded again
  uint32_t isOver;               // nLoaded is the last
};

__device__ __forceinline__ uint32_t loadShared(const uint32_t *at) {
  uint32_t value;
  asm volatile("ld.acquire.cta.shared::cta.u32 %0, [%1];" : "=r"(value) : "r"(sharedAddress(at)) : "memory");
  return value;
}
__device__ __forceinline__ void storeShared(uint32_t *at, uint32_t value) {
  asm volatile("st.release.cta.shared::cta.u32 [%0], %1;" ::"r"(sharedAddress(at)), "r"(value) : "memory");
}

__device__ __forceinline__ bool isKernelOver(const P2pContext &c) {
  return *reinterpret_cast<volatile uint32_t *>(&c.s.lanesOver) == uint32_t(c.nLanes) || c.hasFailed();
}

__device__ inline void loadChunks(const P2pContext &c, P2pPipe &pipe, char *buffers, uint32_t nStages) {
  uint32_t loaded = 0;
  while (!__any_sync(kFullWarp, isKernelOver(c))) {
    P2pChunk chunk = takeChunk(c, gridDim.x, false);
    if (!chunk.from) {
      __nanosleep(32);
      continue;
    }
    if (threadIdx.x % kWarp == 0) {
      bulkFence(); // what a peer wrote, or may read no more, was acquired by ordinary loads
      for (uint64_t at = 0; at < chunk.bytes; at += kP2pTile, loaded++) {
        while (loaded - loadShared(&pipe.nFreed) >= nStages) {
        }
        uint32_t stage = loaded % nStages, bytes = uint32_t(min(chunk.bytes - at, uint64_t(kP2pTile)));
        bool isLast = at + bytes == chunk.bytes;
        pipe.tile[stage] = {chunk.to + at, bytes,           isLast ? chunk.job : nullptr,
                            chunk.flag,    chunk.flagValue, chunk.bytes};
        bulkLoad(buffers + stage * kP2pTile, chunk.from + at, bytes, &pipe.full[stage]);
        storeShared(&pipe.nLoaded, loaded + 1);
      }
    }
    loaded = __shfl_sync(kFullWarp, loaded, 0);
  }
  if (threadIdx.x % kWarp == 0) storeShared(&pipe.isOver, 1);
}

// By one thread. A chunk is told as done when its last store, and so all, have been written; while the next
// tile is on its way, if there is one.
__device__ inline void storeTiles(P2pPipe &pipe, const char *buffers, uint32_t nStages) {
  P2pTile ended = {}; // the newest store's, if it ends a chunk
  uint32_t stored = 0;
  for (;;) {
    bool isOver = loadShared(&pipe.isOver);
    uint32_t stage = stored % nStages;
    bool isHere = stored < loadShared(&pipe.nLoaded) && barrierTest(&pipe.full[stage], stored / nStages & 1);
    if (isHere) {
      P2pTile tile = pipe.tile[stage];
      bulkStore(tile.to, buffers + stage * kP2pTile, tile.bytes);
      bulkCommit();
      bulkWaitRead<1>();
      storeShared(&pipe.nFreed, stored);
      if (ended.job) {
        bulkWaitWritten<1>();
        finishChunk(ended.job, ended.flag, ended.flagValue, ended.chunkBytes);
      }
      ended = tile;
      stored++;
    } else if (stored > loadShared(&pipe.nFreed)) {
      bulkWaitRead<0>();
      storeShared(&pipe.nFreed, stored);
    } else if (ended.job) {
      bulkWaitWritten<0>();
      finishChunk(ended.job, ended.flag, ended.flagValue, ended.chunkBytes);
      ended.job = nullptr;
    } else if (isOver && stored == loadShared(&pipe.nLoaded)) {
      break;
    }
  }
  bulkWaitWritten<0>();
}
#endif

} // namespace ultraep

#endif
