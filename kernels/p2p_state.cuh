// What the parts of the kernel of sends and receives share: lanes, jobs, flags, failures.
#ifndef ULTRAEP_P2P_STATE_CUH_
#define ULTRAEP_P2P_STATE_CUH_

#include "bulk.cuh"
#include "kernel_p2p.h"
#include "signal.cuh"
#include "warp.cuh"

namespace ultraep {

constexpr int kP2pMaxLanes = 2 * KERNEL_P2P_MAX_RANKS;
constexpr uint32_t kP2pTile = 16384; // bytes of one bulk copy
constexpr uint64_t kP2pLeastChunk = 4 * kP2pTile, kP2pMostChunk = 32 * kP2pTile;
constexpr uint64_t kP2pWarpChunk = 32768; // of what a warp copies through registers
constexpr int kP2pOffsetBits = 44;        // of a P2pJob's words; the rest counts jobs

enum P2pJobKind : uint32_t { kP2pDirect, kP2pStagedSend, kP2pStagedRecv };

// A large transfer that is being moved, once a lane has it. What has been taken of it is told by one of three
// words, by who may take: bulk copies or warps of a direct job, and both of a staged one, whose chunks have
// numbers. The other two words stand beyond all bytes.
//
// Words, and the number of bytes, have the job's generation above it. Whoever adds to a direct job's word has
// taken what he added, if the bytes are of the word's generation and there were as many: then the job is not
// over before he is, so that its other fields are its own, too. A staged job's word is advanced by comparing,
// never beyond `limit`, which is 0 for a direct one. Fields change only while nothing can be taken, before
// the words.
struct __align__(128) P2pJob {
  unsigned long long bulk, limit; // limit: staged bytes that may be taken so far; grows
  unsigned long long warps, bytes;
  unsigned long long staged, done; // done: bytes moved, and told to the peer where staged
  char *user, *other;              // the user's buffer; direct: the receiver's
  uint64_t firstChunk;             // staged: number of the pair's chunk at byte 0
  uint64_t *mark;                  // direct: at the receiver, raised to markWord by who moves the last chunk;
                                   // null: by the lane
  uint64_t markWord;
  uint32_t kind; // P2pJobKind
  int32_t peer;
  uint32_t byWarps; // addresses that bulk copies cannot take
};
static_assert(sizeof(P2pJob) == 128, "one line");
constexpr uint64_t kP2pOffsetMask = (uint64_t(1) << kP2pOffsetBits) - 1;
constexpr uint64_t kP2pBeyond = uint64_t(1) << (kP2pOffsetBits - 1);
__device__ __forceinline__ bool sameGeneration(uint64_t a, uint64_t b) {
  return (a ^ b) >> kP2pOffsetBits == 0;
}

enum P2pStep : int32_t { kP2pBegin, kP2pAwaitPeer, kP2pMoving, kP2pAwaitStage };
enum P2pProgress { kP2pNone, kP2pSome, kP2pOver }; // of a step: over is the transfer

// Of the warp that looks after the lane, in its block's shared memory.
struct P2pLaneState {
  int32_t op;          // of the lane, under way
  int32_t step;        // P2pStep
  uint64_t number;     // of the transfer under way
  uint64_t chunk;      // of the pair, the next that is staged
  uint64_t bytes;      // of the transfer under way, once known
  uint64_t chunks;     // of the job that may be taken
  uint64_t room;       // sends: chunks below this have had a free stage
  uint64_t over;       // sends: transfers that the receiver was seen to be done with
  uint64_t generation; // of the lane's job
  uint64_t markWord;   // that the lane raises when its direct job is done; 0: it does not
  char *own, *peer;    // windows: this rank's, and the other's as seen from here
  int32_t isDirect;
  int32_t forWarps;  // the job has something for them
  int32_t polls;     // for the transfer's mark
  uint32_t units;    // of packets that have been copied
  uint32_t isOwed;   // receives: the sender has not been told that the last transfer is over
  uint32_t hasBegun; // receives: the sender has, where it goes directly
  uint32_t isMet;    // of the lane's last transfer the peer's kernel has begun
};

} // namespace ultraep

struct kernelP2pState {
  int32_t failed; // ultraepResult_t
  uint32_t left;  // blocks that have finished
  uint32_t lanesOver;
  uint32_t nWarpJobs;                                                  // open jobs that warps may take from
  uint64_t runs;                                                       // kernels that have ended
  uint64_t sent[KERNEL_P2P_MAX_RANKS], received[KERNEL_P2P_MAX_RANKS]; // transfers that are over
  uint64_t sentChunks[KERNEL_P2P_MAX_RANKS], receivedChunks[KERNEL_P2P_MAX_RANKS];
  uint64_t room[KERNEL_P2P_MAX_RANKS], over[KERNEL_P2P_MAX_RANKS]; // as in P2pLaneState
  uint32_t isOwed[KERNEL_P2P_MAX_RANKS];
  ultraep::P2pJob jobs[ultraep::kP2pMaxLanes];
  kernelP2pMap_t maps[KERNEL_P2P_MAX_RANKS][KERNEL_P2P_SLOTS]; // what was seen of the host's
};

static_assert(offsetof(kernelP2pState, failed) % 16 == 0 && offsetof(kernelP2pState, nWarpJobs) == 12,
              "looked at at once");

namespace ultraep {

// The first failure stands. By one thread.
__device__ __noinline__ void failP2p(int32_t *failed, kernelP2pFailure_t *host, int32_t code, int32_t peer) {
  if (atomicCAS(failed, 0, code) != 0) return;
  volatile kernelP2pFailure_t *failure = host;
  failure->peer = peer;
  __threadfence_system();
  failure->code = code;
}
// Sizes of a transfer's two ends differ: told once, and everything goes on.
__device__ __noinline__ void tellP2pSizes(kernelP2pFailure_t *host, int32_t peer, uint64_t sent,
                                          uint64_t expected) {
  volatile kernelP2pFailure_t *failure = host;
  if (failure->code != 0) return;
  failure->peer = peer;
  failure->sent = sent;
  failure->expected = expected;
  __threadfence_system();
  failure->code = kInvalidUsage;
}

// Everything a part of the kernel needs. Lanes and ops may lie in the kernel's argument.
struct P2pContext {
  const kernelP2p_t &p;
  const kernelP2pLayout_t &layout;
  const kernelP2pLane_t *lanes;
  const kernelP2pOp_t *ops;
  int nLanes;
  kernelP2pState_t &s;

  __device__ uint64_t stages() const { return uint64_t(p.geometry.nStages); }
  __device__ int stageShift() const { return __ffs(int(p.geometry.stageBytes >> 10)) + 9; }
  __device__ uint64_t stagesOf(uint64_t bytes) const {
    return (bytes + p.geometry.stageBytes - 1) >> stageShift();
  }
  // Of the chunk among all stages in a window.
  __device__ size_t stageOf(int from, uint64_t chunk) const {
    return size_t(from) * stages() + (chunk & (stages() - 1));
  }
  template <typename T> __device__ T *at(char *window, size_t offset, size_t index) const {
    return reinterpret_cast<T *>(window + offset) + index;
  }
  // Entries in a window, as p.windows has it, that belong to `from`.
  __device__ kernelP2pMark_t *mark(char *window, int from, uint64_t number) const {
    return at<kernelP2pMark_t>(window, layout.marks,
                               size_t(from) * KERNEL_P2P_RING + number % KERNEL_P2P_RING);
  }
  __device__ char *post(char *window, int from, uint64_t number) const {
    return window + layout.posts +
           (size_t(from) * KERNEL_P2P_RING + number % KERNEL_P2P_RING) * sizeof(kernelP2pPost_t);
  }
  __device__ uint64_t *taken(char *window, int from) const {
    return at<uint64_t>(window, layout.taken, from);
  }
  __device__ uint64_t *gone(char *window, int from) const { return at<uint64_t>(window, layout.gone, from); }
  __device__ uint64_t *arrived(char *window, int from, uint64_t chunk) const {
    return at<uint64_t>(window, layout.arrived, stageOf(from, chunk));
  }
  __device__ uint64_t *freed(char *window, int from, uint64_t chunk) const {
    return at<uint64_t>(window, layout.freed, stageOf(from, chunk));
  }
  __device__ char *stage(char *window, int from, uint64_t chunk) const {
    return window + layout.stages + stageOf(from, chunk) * p.geometry.stageBytes;
  }

  __device__ char *packets(char *window, int from, uint64_t chunk) const {
    return window + layout.packets + stageOf(from, chunk) * layout.packetRoom;
  }

  __device__ bool hasFailed() const { return *reinterpret_cast<volatile int32_t *>(&s.failed) != 0; }
  __device__ void fail(int32_t code, int32_t peer) const { failP2p(&s.failed, p.failure, code, peer); }
  __device__ void tellSizes(int32_t peer, uint64_t sent, uint64_t expected) const {
    tellP2pSizes(p.failure, peer, sent, expected);
  }
};

// By a warp: what its first thread sees; what that has acquired, all have.
__device__ __forceinline__ uint64_t seeSystem(const uint64_t *at) {
  uint64_t value = 0;
  if (threadIdx.x % kWarp == 0) value = loadAcquireSystem(at);
  value = __shfl_sync(kFullWarp, value, 0);
  __syncwarp();
  return value;
}
__device__ __forceinline__ uint64_t seeDevice(const void *at) {
  uint64_t value = 0;
  if (threadIdx.x % kWarp == 0) value = loadAcquireDevice64(at);
  value = __shfl_sync(kFullWarp, value, 0);
  __syncwarp();
  return value;
}

// ---- chunks of jobs ----

// A chunk of a job, taken.
struct P2pChunk {
  const char *from; // null: there was none
  char *to;
  uint64_t bytes;
  uint64_t before; // bytes of the job before it that may be read, too
  uint64_t *flag;  // raised at the peer when it has been moved; null: none
  uint64_t flagValue;
  uint64_t all; // not 0: the flag is for the whole job, which has so many bytes
  P2pJob *job;
};

// Bulk copies move multiples of 16 bytes, so a staged job's odd end is for warps.
__device__ __forceinline__ bool isForWarps(bool byWarps, uint64_t at, uint64_t bytes, uint64_t all) {
  return byWarps || (all % 16 != 0 && at + bytes == all);
}

// Bytes left of a job of which something can be taken, as it seems at a look without order; else 0.
__device__ __forceinline__ uint64_t lookAtJob(const P2pContext &c, const P2pJob &job, bool byWarp) {
  uint64_t bulk, limit, warps, bytes;
  lookDevice64(&job.bulk, bulk, limit);
  lookDevice64(&job.warps, warps, bytes);
  uint64_t staged = lookDevice64(&job.staged);
  bool byWarps = lookDevice(&job.byWarps);
  uint64_t word = byWarp ? warps : bulk, at = word & kP2pOffsetMask;
  bool isNow = sameGeneration(word, bytes);
  bytes &= kP2pOffsetMask;
  if (isNow && at < bytes) return bytes - at;
  at = staged & kP2pOffsetMask;
  if (at >= min(limit, bytes)) return 0;
  uint64_t chunk = min(bytes - at, c.p.geometry.stageBytes);
  return isForWarps(byWarps, at, chunk, bytes) == byWarp ? bytes - at : 0;
}

// Of a job a mover takes his part of what is left of all jobs at a time: much at first, less towards the end.
__device__ __forceinline__ uint32_t chunkBytes(uint32_t leftKb, uint32_t nMovers, bool byWarp) {
  if (byWarp) return kP2pWarpChunk;
  uint32_t tiles = min(leftKb / nMovers, uint32_t(kP2pMostChunk >> 10)) / (kP2pTile >> 10);
  return max(tiles * kP2pTile, uint32_t(kP2pLeastChunk));
}

// The chunk at `at` of a staged job, of which that much has been taken.
__device__ inline P2pChunk stagedChunk(const P2pContext &c, P2pJob &job, uint64_t at, uint64_t bytes) {
  uint64_t number = job.firstChunk + (at >> c.stageShift());
  if (job.kind == kP2pStagedSend) {
    char *peer = c.p.windows[job.peer];
    return {job.user + at,
            c.stage(peer, c.p.rank, number),
            bytes,
            at,
            c.arrived(peer, c.p.rank, number),
            number + 1,
            0,
            &job};
  }
  return {c.stage(c.p.windows[c.p.rank], job.peer, number), job.user + at, bytes, 0,
          c.freed(c.p.windows[job.peer], c.p.rank, number), number + 1,    0,     &job};
}

// By one thread: takes the next chunk of a job, if it still can. Memory is far, so what does not depend on
// one another is looked up at once.
__device__ inline P2pChunk takeDirect(P2pJob &job, uint64_t bytes, bool byWarp) {
  uint64_t word = atomicAdd(byWarp ? &job.warps : &job.bulk, bytes), at = word & kP2pOffsetMask;
  fenceDevice();
  uint64_t all = lookDevice64(&job.bytes), user = lookDevice64(&job.user), other = lookDevice64(&job.other);
  uint64_t mark = lookDevice64(&job.mark), markWord = lookDevice64(&job.markWord);
  bool isNow = sameGeneration(word, all);
  all &= kP2pOffsetMask;
  if (!isNow || at >= all) return {};
  return {reinterpret_cast<const char *>(user + at),
          reinterpret_cast<char *>(other + at),
          min(bytes, all - at),
          at,
          reinterpret_cast<uint64_t *>(mark),
          markWord,
          mark ? all : 0,
          &job};
}
__device__ inline P2pChunk takeStaged(const P2pContext &c, P2pJob &job, bool byWarp) {
  uint64_t word = loadAcquireDevice64(&job.staged), at = word & kP2pOffsetMask;
  uint64_t limit = loadAcquireDevice64(&job.limit), all = loadAcquireDevice64(&job.bytes) & kP2pOffsetMask;
  if (at >= min(limit, all)) return {};
  uint64_t bytes = min(all - at, c.p.geometry.stageBytes);
  if (isForWarps(job.byWarps, at, bytes, all) != byWarp) return {};
  if (atomicCAS(&job.staged, word, word + bytes) != word) return {};
  return stagedChunk(c, job, at, bytes);
}

// The kernel as a whole, at one look.
struct P2pLook {
  bool isOver;      // nothing may be taken any more
  bool hasWarpJobs; // warps may take, too
};
__device__ __forceinline__ P2pLook lookAtKernel(const P2pContext &c) {
  uint64_t failed, word;
  lookDevice64(&c.s.failed, failed, word);
  return {uint32_t(word) == uint32_t(c.nLanes) || uint32_t(failed) != 0, word >> 32 != 0};
}

// Takes the next chunk each of the jobs that have most left, or not less than half of it, of `most` at most,
// and of no more than a mover's part of all. By a warp: returns the lanes that have taken one. *kernel: as it
// was meanwhile.
__device__ inline unsigned takeSome(const P2pContext &c, uint32_t nMovers, bool byWarp, uint32_t most,
                                    P2pChunk &chunk, P2pLook *kernel) {
  int lane = threadIdx.x % kWarp, best = -1;
  int shift = int(blockIdx.x) % c.nLanes; // blocks that find jobs alike begin with different ones
  P2pLook seen = lookAtKernel(c);         // on its way while jobs are looked at
  uint64_t bestLeft = 0;
  uint32_t allLeft = 0; // in KiB; as much as a word holds will do
#pragma unroll 1
  for (int j = lane; j < c.nLanes; j += kWarp) {
    int i = j + shift < c.nLanes ? j + shift : j + shift - c.nLanes;
    uint64_t left = lookAtJob(c, c.s.jobs[i], byWarp);
    allLeft += uint32_t(min(left >> 10, uint64_t(0x3ffff)));
    if (left > bestLeft) {
      bestLeft = left;
      best = i;
    }
  }
  uint32_t key = best < 0 ? 0 : uint32_t(min(bestLeft >> 10, uint64_t(0x3ffffff))) + 1, least = 1;
  allLeft = warpSum(allLeft);
  uint32_t bytes = chunkBytes(allLeft, nMovers, byWarp);
  most = min(most, max(allLeft / (nMovers * (bytes >> 10)), 1u));
  bool isMine = false;
  chunk = {};
  *kernel = {__any_sync(kFullWarp, seen.isOver) != 0, __any_sync(kFullWarp, seen.hasWarpJobs) != 0};
#pragma unroll 1
  for (uint32_t n = 0; n < most && !kernel->isOver; n++) {
    uint32_t largest = warpMax(isMine ? 0 : key);
    if (largest < least) break;
    int winner = warpFirst(!isMine && key == largest);
    if (n == 0) least = (largest + 1) / 2;
    isMine = isMine || lane == winner;
  }
  if (isMine) {
    P2pJob &job = c.s.jobs[best];
    chunk = *reinterpret_cast<volatile uint32_t *>(&job.kind) == kP2pDirect ? takeDirect(job, bytes, byWarp)
                                                                            : takeStaged(c, job, byWarp);
  }
  return __ballot_sync(kFullWarp, chunk.from != nullptr);
}

// What a block's warps know of the kernel where one of them takes chunks for bulk copies. Others that have
// nothing to do sleep until that warp wakes them: awake, even if only now and then, they slow down those that
// move.
struct P2pBlock {
  static constexpr uint32_t kSleepNs = 20000; // at most, at a time
  uint64_t wake;                              // barrier
  uint32_t isOver, hasWarpJobs;
  uint32_t nUnmet; // lanes of the block; the next kernel may begin at 0

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  // By one thread.
  __device__ void begin(int nLanes, bool overlaps) {
    barrierInit(&wake);
    isOver = hasWarpJobs = 0;
    nUnmet = uint32_t(max((nLanes - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x), 0));
    if (!overlaps) nUnmet += kP2pMaxLanes; // never
    if (nUnmet == 0) letKernelAfterBegin();
  }
  __device__ void tell(uint32_t *what, bool is) {
    storeReleaseBlock(what, is);
    barrierArrive(&wake);
  }
  // Sleeps; whether it has been woken for that time.
  __device__ bool await(uint32_t time) {
    return barrierSleep(&wake, time & 1, kSleepNs);
  }
#else
  __device__ bool await(uint32_t) {
    return false;
  }
#endif
  // By one thread for each lane of the block.
  __device__ void meet() {
    if (atomicSub(&nUnmet, 1u) == 1) letKernelAfterBegin();
  }
};

// What was moved is whole, and seen by whoever sees the flag or the count. By one thread, after the others'
// writes are ordered before.
__device__ __forceinline__ void finishChunk(P2pJob *job, uint64_t *flag, uint64_t flagValue, uint64_t all,
                                            uint64_t bytes) {
  bool raises = flag != nullptr;
  if (all != 0) raises = addAcquireReleaseDevice64(&job->done, bytes) + bytes == all;
  if (raises) storeReleaseSystem(flag, flagValue);
  if (all == 0) addReleaseDevice64(&job->done, bytes);
}

} // namespace ultraep

#endif
