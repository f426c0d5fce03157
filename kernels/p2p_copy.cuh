// Copies of sends and receives: by warps through registers, whatever the addresses; and by bulk copies. What
// is seldom needed is no inline code: a kernel of a few microseconds waits for every line of its own code.
#ifndef ULTRAEP_P2P_COPY_CUH_
#define ULTRAEP_P2P_COPY_CUH_

#include "bulk.cuh"
#include "elements.cuh"
#include "p2p_state.cuh"

namespace ultraep {

// ---- by a warp ----

__device__ __forceinline__ void copyBytes(char *to, const char *from, uint64_t bytes) {
#pragma unroll 1
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

// Sixteen bytes out of the 32 of two words, from byte 4 * kWords + shift / 8 on.
template <int kWords>
__device__ __forceinline__ uint4 shifted(const uint4 &a, const uint4 &b, uint32_t shift) {
  const uint32_t w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  return {__funnelshift_r(w[kWords], w[kWords + 1], shift),
          __funnelshift_r(w[kWords + 1], w[kWords + 2], shift),
          __funnelshift_r(w[kWords + 2], w[kWords + 3], shift),
          __funnelshift_r(w[kWords + 3], w[kWords + 4], shift)};
}

// `to` on 16 bytes, `from` kWords words and `shift` bits beyond. Reads whole sixteens: of the first that
// `from` lies in, to the one after the last.
template <int kWords>
__device__ __forceinline__ void copyShiftedBy(char *to, const char *from, uint64_t bytes, uint32_t shift) {
  constexpr int kAtOnce = 4;
  uint32_t lane = threadIdx.x % kWarp;
  const char *words = from - 4 * kWords - shift / 8;
#pragma unroll 1
  for (uint64_t block = 0; block < bytes; block += kAtOnce * kWarp * 16) {
    uint4 here[kAtOnce], after[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      uint64_t at = block + (i * kWarp + lane) * 16;
      bool isLast = lane == kWarp - 1 || at + 16 >= bytes;
      here[i] = at < bytes ? loadRow(words + at) : uint4{};
      after[i] = at < bytes && isLast ? loadRow(words + at + 16) : uint4{};
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      uint64_t at = block + (i * kWarp + lane) * 16;
      bool isLast = lane == kWarp - 1 || at + 16 >= bytes;
      uint4 next = {__shfl_down_sync(kFullWarp, here[i].x, 1), __shfl_down_sync(kFullWarp, here[i].y, 1),
                    __shfl_down_sync(kFullWarp, here[i].z, 1), __shfl_down_sync(kFullWarp, here[i].w, 1)};
      if (isLast) next = after[i];
      if (at < bytes) *reinterpret_cast<uint4 *>(to + at) = shifted<kWords>(here[i], next, shift);
    }
  }
}

__device__ __noinline__ void copyShifted(char *to, const char *from, uint64_t bytes) {
  uint32_t phase = uint32_t(reinterpret_cast<uintptr_t>(from) % 16), shift = phase % 4 * 8;
  switch (phase / 4) {
  case 0:
    return copyShiftedBy<0>(to, from, bytes, shift);
  case 1:
    return copyShiftedBy<1>(to, from, bytes, shift);
  case 2:
    return copyShiftedBy<2>(to, from, bytes, shift);
  default:
    return copyShiftedBy<3>(to, from, bytes, shift);
  }
}

__device__ __noinline__ void copyByWarp(char *to, const char *from, uint64_t bytes) {
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

// ---- packets ----

// A transfer as packets: each is a word with four bytes below and above, alike in all, a stamp of the pair's
// transfer that it is, so that it says itself whether it has arrived. Units of two: the first says how many
// bytes the transfer has, each after that has 8 of them.
constexpr int kP2pLaneUnits = 4; // of a look: memory is far, so several at once
constexpr uint32_t kP2pLookUnits = kP2pLaneUnits * kWarp;

struct P2pUnit {
  uint64_t first, second;

  __device__ bool isOf(uint64_t stamp) const {
    return (first ^ stamp) >> 32 == 0 && (second ^ stamp) >> 32 == 0;
  }
};
__device__ __forceinline__ uint64_t packetStamp(uint64_t number) {
  return (number << 1 | 1) << 32; // never 0
}
__device__ __forceinline__ char *unitAt(char *units, uint32_t number) {
  return units + 16 * number;
}
__device__ __forceinline__ uint32_t lastUnit(uint64_t bytes) {
  return uint32_t(bytes + 7) / 8;
}
__device__ __forceinline__ uint32_t bytesOfUnit(uint64_t bytes, uint32_t number) {
  return uint32_t(min(bytes - 8 * uint64_t(number - 1), uint64_t(8)));
}

__device__ __forceinline__ void storeUnit(char *units, uint32_t number, uint64_t stamp, uint32_t low,
                                          uint32_t high) {
  storePair(unitAt(units, number), stamp | low, stamp | high);
}
__device__ __forceinline__ bool isOfWords(const void *at, uint64_t bytes) {
  return (reinterpret_cast<uintptr_t>(at) | bytes) % 4 == 0;
}

// As below, of any address and size.
__device__ __noinline__ void sendOddPackets(char *units, uint64_t stamp, const char *from, uint64_t bytes) {
  uint32_t last = lastUnit(bytes);
#pragma unroll 1
  for (uint32_t at = 1 + threadIdx.x % kWarp; at <= last; at += kWarp) {
    uint64_t word = 0;
#pragma unroll 1
    for (uint32_t i = 0; i < bytesOfUnit(bytes, at); i++)
      word |= uint64_t(uint8_t(from[8 * (at - 1) + i])) << 8 * i;
    storeUnit(units, at, stamp, uint32_t(word), uint32_t(word >> 32));
  }
}
// By a warp: whether all packets of so many bytes are here.
__device__ __noinline__ bool hasAllPackets(char *units, uint64_t stamp, uint64_t bytes) {
  uint32_t last = lastUnit(bytes);
  bool isAll = true;
#pragma unroll 1
  for (uint32_t at = 1 + threadIdx.x % kWarp; at <= last; at += kWarp) {
    P2pUnit unit;
    loadPair(unitAt(units, at), unit.first, unit.second);
    isAll = isAll && unit.isOf(stamp);
  }
  return __all_sync(kFullWarp, isAll);
}
__device__ __noinline__ void copyOddPackets(char *units, char *to, uint64_t bytes) {
  uint32_t last = lastUnit(bytes);
#pragma unroll 1
  for (uint32_t at = 1 + threadIdx.x % kWarp; at <= last; at += kWarp) {
    P2pUnit unit;
    loadPair(unitAt(units, at), unit.first, unit.second);
    uint64_t word = unit.second << 32 | uint32_t(unit.first);
#pragma unroll 1
    for (uint32_t i = 0; i < bytesOfUnit(bytes, at); i++) to[8 * (at - 1) + i] = char(word >> 8 * i);
  }
}

// By a warp.
__device__ inline void sendPackets(char *units, uint64_t stamp, const char *from, uint64_t bytes) {
  uint32_t nWords = uint32_t(bytes / 4), lane = threadIdx.x % kWarp;
  if (lane == 0) storePair(unitAt(units, 0), stamp | bytes, stamp);
  if (!isOfWords(from, bytes)) return sendOddPackets(units, stamp, from, bytes);
  auto *words = reinterpret_cast<const uint32_t *>(from);
#pragma unroll 1
  for (uint32_t first = lane; 2 * (first - lane) < nWords; first += kP2pLookUnits) {
    uint32_t low[kP2pLaneUnits], high[kP2pLaneUnits];
#pragma unroll
    for (int i = 0; i < kP2pLaneUnits; i++) {
      uint32_t at = 2 * (first + i * kWarp);
      low[i] = at < nWords ? words[at] : 0;
      high[i] = at + 1 < nWords ? words[at + 1] : 0;
    }
#pragma unroll
    for (int i = 0; i < kP2pLaneUnits; i++)
      if (uint32_t at = first + i * kWarp; 2 * at < nWords) storeUnit(units, 1 + at, stamp, low[i], high[i]);
  }
}

// What a warp sees of a transfer's packets at one look: the first, and kP2pLookUnits after `first` others.
struct P2pPackets {
  P2pUnit head, mine[kP2pLaneUnits];

  __device__ __forceinline__ void look(char *units, uint32_t first, uint64_t bytes) {
    uint32_t last = lastUnit(bytes), lane = threadIdx.x % kWarp;
    loadPair(unitAt(units, 0), head.first, head.second);
#pragma unroll
    for (int i = 0; i < kP2pLaneUnits; i++)
      if (uint32_t at = 1 + first + lane + i * kWarp; at <= last)
        loadPair(unitAt(units, at), mine[i].first, mine[i].second);
  }
  // Whether they are here, of so many bytes in all.
  __device__ __forceinline__ bool has(uint64_t stamp, uint32_t first, uint64_t bytes) const {
    uint32_t last = lastUnit(bytes), lane = threadIdx.x % kWarp;
    bool isAll = true;
#pragma unroll
    for (int i = 0; i < kP2pLaneUnits; i++)
      if (1 + first + lane + i * kWarp <= last) isAll = isAll && mine[i].isOf(stamp);
    return __all_sync(kFullWarp, isAll);
  }
  // Where they are, and are of words.
  __device__ __forceinline__ void copy(uint32_t first, char *to, uint64_t bytes) const {
    uint32_t nWords = uint32_t(bytes / 4), lane = threadIdx.x % kWarp;
    auto *words = reinterpret_cast<uint32_t *>(to);
#pragma unroll
    for (int i = 0; i < kP2pLaneUnits; i++) {
      uint32_t at = 2 * (first + lane + i * kWarp);
      if (at < nWords) words[at] = uint32_t(mine[i].first);
      if (at + 1 < nWords) words[at + 1] = uint32_t(mine[i].second);
    }
  }
};

// Moves a chunk that bulk copies cannot, if there is one.
__device__ inline bool moveByWarp(const P2pContext &c, uint32_t nMovers) {
  P2pChunk mine;
  P2pLook kernel;
  unsigned taken = takeSome(c, nMovers, true, 1, mine, &kernel);
  if (taken == 0) return false;
  int winner = __ffs(taken) - 1;
  auto to = reinterpret_cast<char *>(__shfl_sync(kFullWarp, reinterpret_cast<uintptr_t>(mine.to), winner));
  auto from =
      reinterpret_cast<const char *>(__shfl_sync(kFullWarp, reinterpret_cast<uintptr_t>(mine.from), winner));
  uint64_t bytes = __shfl_sync(kFullWarp, mine.bytes, winner);
  __syncwarp(); // what the winner has acquired, all have
  copyByWarp(to, from, bytes);
  __syncwarp();
  if (int(threadIdx.x % kWarp) == winner)
    finishChunk(mine.job, mine.flag, mine.flagValue, mine.all, mine.bytes);
  return true;
}

// ---- by bulk copies: a warp takes chunks, a thread of another loads their tiles, one of a third stores them
// ----

constexpr int kP2pMostStages = 13;
constexpr uint32_t kP2pLine = 128; // bytes that memory moves at once
constexpr uint32_t kP2pStageRoom = kP2pTile + kP2pLine;
constexpr uint32_t kP2pAhead = 4; // chunks taken before they are loaded

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
struct P2pTile {
  char *to;
  uint32_t bytes;
  uint32_t lead; // bytes in the stage before the tile's
  P2pJob *job;   // of the chunk that ends with this tile; null: it does not
  uint64_t *flag;
  uint64_t flagValue, all, chunkBytes;
};

struct P2pPipe {
  uint64_t full[kP2pMostStages]; // barriers: the tile is here
  P2pTile tile[kP2pMostStages];  // tile i of the block is in stage i % nStages
  P2pChunk chunk[kP2pAhead];     // chunk i of the block is in entry i % kP2pAhead
  uint32_t nTaken, nBegun;       // chunks taken; whose entries may be used again
  uint32_t nLoaded;              // tiles whose loads have begun
  uint32_t nFreed;               // tiles whose stages may be loaded again
  uint32_t isTakenAll;           // nTaken is the last
  uint32_t isLoadedAll;          // nLoaded is the last
};

// By a warp.
__device__ inline void takeChunks(const P2pContext &c, P2pPipe &pipe, P2pBlock &block) {
  constexpr int kLook = 16; // waits between looks
  uint32_t taken = 0, nWaits = 0;
  bool isLarge = false; // what was taken last: then one ahead will do, and others may have the rest
  P2pLook kernel = {false, false};
  for (;;) {
    uint32_t room = __shfl_sync(kFullWarp, kP2pAhead - (taken - loadAcquireBlock(&pipe.nBegun)), 0);
    bool waits = room == 0 || (isLarge && room < kP2pAhead), hadWarpJobs = kernel.hasWarpJobs;
    P2pChunk chunk = {};
    unsigned mine = 0;
    if (!waits)
      mine = takeSome(c, gridDim.x, false, room, chunk, &kernel);
    else if (++nWaits % kLook == 0)
      kernel = lookAtKernel(c);
    if (__any_sync(kFullWarp, kernel.isOver)) break;
    if (threadIdx.x % kWarp == 0 && kernel.hasWarpJobs != hadWarpJobs)
      block.tell(&block.hasWarpJobs, kernel.hasWarpJobs);
    if (mine == 0) {
      __nanosleep(waits ? 50 : 32);
      continue;
    }
    if (chunk.from)
      pipe.chunk[(taken + __popc(mine & ((1u << threadIdx.x % kWarp) - 1))) % kP2pAhead] = chunk;
    taken += __popc(mine);
    isLarge = __any_sync(kFullWarp, chunk.from && chunk.bytes > kP2pLeastChunk);
    __syncwarp();
    if (threadIdx.x % kWarp == 0) storeReleaseBlock(&pipe.nTaken, taken);
  }
  if (threadIdx.x % kWarp == 0) {
    storeReleaseBlock(&pipe.isTakenAll, 1);
    block.tell(&block.isOver, true);
  }
}

// Tiles end where lines of the destination do, and are loaded from where a line of the source begins: what
// lies before the tile in that line is the job's, too, or is left out.
__device__ inline void loadChunk(const P2pChunk &chunk, P2pPipe &pipe, char *buffers, uint32_t nStages,
                                 uint32_t &loaded) {
  for (uint64_t at = 0; at < chunk.bytes; loaded++) {
    uint32_t beyond = uint32_t(reinterpret_cast<uintptr_t>(chunk.to + at) % kP2pLine);
    uint32_t lead = uint32_t(reinterpret_cast<uintptr_t>(chunk.from + at) % kP2pLine);
    uint32_t bytes = uint32_t(min(chunk.bytes - at, uint64_t(kP2pTile - beyond)));
    if (lead > chunk.before + at) lead = 0;
    while (loaded - loadAcquireBlock(&pipe.nFreed) >= nStages) {
    }
    uint32_t stage = loaded % nStages;
    bool isLast = at + bytes == chunk.bytes;
    pipe.tile[stage] = {chunk.to + at, bytes,           lead,      isLast ? chunk.job : nullptr,
                        chunk.flag,    chunk.flagValue, chunk.all, chunk.bytes};
    bulkLoad(buffers + stage * kP2pStageRoom, chunk.from + at - lead, bytes + lead, &pipe.full[stage]);
    storeReleaseBlock(&pipe.nLoaded, loaded + 1);
    at += bytes;
  }
}

// By one thread.
__device__ inline void loadChunks(P2pPipe &pipe, char *buffers, uint32_t nStages) {
  uint32_t begun = 0, loaded = 0;
  for (;;) {
    bool isAll = loadAcquireBlock(&pipe.isTakenAll);
    if (begun == loadAcquireBlock(&pipe.nTaken)) {
      if (isAll) break;
      continue;
    }
    P2pChunk chunk = pipe.chunk[begun % kP2pAhead];
    storeReleaseBlock(&pipe.nBegun, ++begun);
    bulkFence(); // what a peer wrote, or may read no more, was acquired by ordinary loads
    loadChunk(chunk, pipe, buffers, nStages, loaded);
  }
  storeReleaseBlock(&pipe.isLoadedAll, 1);
}

// By one thread. A chunk is told as done when its last store, and so all, have been written; while the next
// tile is on its way, if there is one.
__device__ inline void storeTiles(P2pPipe &pipe, const char *buffers, uint32_t nStages) {
  P2pTile ended = {}; // the newest store's, if it ends a chunk
  uint32_t stored = 0;
  for (;;) {
    bool isAll = loadAcquireBlock(&pipe.isLoadedAll);
    uint32_t stage = stored % nStages;
    bool isHere =
        stored < loadAcquireBlock(&pipe.nLoaded) && barrierTest(&pipe.full[stage], stored / nStages & 1);
    if (isHere) {
      P2pTile tile = pipe.tile[stage];
      bulkStore(tile.to, buffers + stage * kP2pStageRoom + tile.lead, tile.bytes);
      bulkCommit();
      bulkWaitRead<1>();
      storeReleaseBlock(&pipe.nFreed, stored);
      if (ended.job) {
        bulkWaitWritten<1>();
        finishChunk(ended.job, ended.flag, ended.flagValue, ended.all, ended.chunkBytes);
      }
      ended = tile;
      stored++;
    } else if (stored > loadAcquireBlock(&pipe.nFreed)) {
      bulkWaitRead<0>();
      storeReleaseBlock(&pipe.nFreed, stored);
    } else if (ended.job) {
      bulkWaitWritten<0>();
      finishChunk(ended.job, ended.flag, ended.flagValue, ended.all, ended.chunkBytes);
      ended.job = nullptr;
    } else if (isAll && stored == loadAcquireBlock(&pipe.nLoaded)) {
      break;
    }
  }
  bulkWaitWritten<0>();
}

// By the first kP2pMovers warps of a block.
__device__ inline void moveByBulk(const P2pContext &c, P2pPipe &pipe, P2pBlock &block, char *buffers,
                                  uint32_t nStages) {
  int warp = threadIdx.x / kWarp;
  bool isFirst = threadIdx.x % kWarp == 0;
  if (warp == 0) takeChunks(c, pipe, block);
  if (warp == 1 && isFirst) loadChunks(pipe, buffers, nStages);
  if (warp == 2 && isFirst) storeTiles(pipe, buffers, nStages);
}
#endif

} // namespace ultraep

#endif
