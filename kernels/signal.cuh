// How blocks and ranks meet: flags in windows, barriers of one kernel's blocks, bounded waits, failures.
//
// Calls are counted in device memory (kernelState_t), so a replayed CUDA graph waits for new flags, not old
// ones. A wait ends with the flag, with the group's failure, or with the timeout; afterwards the kernel
// leaves by its normal path. Kernels of the other lane may run at the same time: of what is here they share
// failures alone.
#ifndef ULTRAEP_SIGNAL_CUH_
#define ULTRAEP_SIGNAL_CUH_

#include "kernels.h"
#include "ptx.cuh"
#include "warp.cuh"

namespace ultraep {

// Codes of ultraepResult_t that kernels set.
enum Code : int32_t {
  kSuccess = 0,
  kInvalidArgument = 4,
  kInvalidUsage = 5,
  kRemoteError = 6,
  kTimeout = 8,
  kCapacityExceeded = 64
};

// A flag word of rank `from` in rank `at`'s window.
__device__ __forceinline__ uint64_t *flagOf(const kernelGroup_t &g, int at, int kind, int from) {
  return reinterpret_cast<uint64_t *>(g.windows[at]) + kind * g.planner.nRanks + from;
}
__device__ __forceinline__ uint64_t *failMarkOf(const kernelGroup_t &g, int at) {
  return flagOf(g, at, KERNEL_FLAG_KINDS, 0);
}
// The kinds of this lane's flags.
__device__ __forceinline__ int openKind(const kernelGroup_t &g, uint32_t call) {
  return KERNEL_FLAG_OPEN + 2 * g.lane + int(call & 1);
}
__device__ __forceinline__ int doneKind(const kernelGroup_t &g) {
  return KERNEL_FLAG_DONE + g.lane;
}

// The number of the call that this kernel is.
__device__ __forceinline__ uint32_t callOf(const kernelGroup_t &g) {
  return g.laneState->calls + 1;
}
// Whether calls of this lane are refused on the route: alike on every rank.
__device__ __forceinline__ bool routeRefuses(const kernelGroup_t &g, const kernelRoute_t &route) {
  return route.status[g.lane].code != kSuccess;
}

__device__ __forceinline__ bool hasFailed(const kernelGroup_t &g) {
  return *reinterpret_cast<const volatile int32_t *>(&g.state->failed) != 0;
}

// The first failure stands: recorded for the host as `code`, told to every peer as `told`, both with the
// phase and the rank to blame. By one thread.
__device__ inline void failGroup(const kernelGroup_t &g, int32_t code, int32_t phase, int32_t rank,
                                 int32_t told) {
  if (atomicCAS(&g.state->failed, 0, code) != 0) return;
  volatile kernelFailure_t *failure = g.failure;
  failure->phase = phase;
  failure->rank = rank;
  __threadfence_system();
  failure->code = code;
  storeReleaseSystem(&g.state->isRecorded, 1);
  for (int r = 0; r < g.planner.nRanks; r++)
    if (r != g.rank)
      storeReleaseSystem(failMarkOf(g, r), uint64_t(phase) << 48 | uint64_t(told) << 32 | uint32_t(rank + 1));
}
__device__ inline void failGroup(const kernelGroup_t &g, int32_t code, int32_t phase, int32_t rank) {
  failGroup(g, code, phase, rank, code);
}

// What ends a wait besides its flag: a failure here or told by a peer, and, where the host is looked at too
// (which takes a microsecond or more), an abort. By one thread.
__device__ inline bool groupIsOver(const kernelGroup_t &g, int32_t phase, bool lookAtHost) {
  if (hasFailed(g)) return true;
  uint64_t mark = loadAcquireSystem(failMarkOf(g, g.rank));
  if (mark != 0) {
    int32_t where = int32_t(mark >> 48), told = int32_t(mark >> 32 & 0xffff),
            culprit = int32_t(uint32_t(mark)) - 1;
    // The failure may be in the other lane. A host that aborts tells no phase.
    if (where != KERNEL_PHASE_NONE) phase = where;
    // A rank that is blamed for not coming did not wait itself: the others gave up. Those hear from it what
    // it was told.
    failGroup(g, told == kTimeout && culprit == g.rank ? kRemoteError : told, phase, culprit, told);
  } else if (lookAtHost && *reinterpret_cast<const volatile int32_t *>(&g.failure->abort) != 0) {
    failGroup(g, kRemoteError, phase, g.rank);
  }
  return hasFailed(g);
}

constexpr int kPollsBetweenLooks = 1024;

// Waits until rank's flag has counted `call`; false when the group failed instead. The flag's high half goes
// to *word. extraNs: beyond the timeout, where other waits must end before this one.
__device__ inline bool waitFlag(const kernelGroup_t &g, const uint64_t *flag, uint32_t call, int32_t phase,
                                int32_t rank, uint32_t *word, uint64_t extraNs = 0) {
  uint64_t start = nowNs();
  for (int polls = 1;; polls++) {
    bool look = polls % kPollsBetweenLooks == 0;
    bool gone = look && loadAcquireSystem(flagOf(g, g.rank, KERNEL_FLAG_GONE, rank)) !=
                            0; // before the flag's last look
    uint64_t value = loadAcquireSystem(flag);
    if (int32_t(uint32_t(value) - call) >= 0) {
      *word = uint32_t(value >> 32);
      return true;
    }
    if (!look) continue;
    if (groupIsOver(g, phase, true)) return false;
    if (gone) failGroup(g, kRemoteError, phase, rank);
    if (nowNs() - start > g.timeoutNs + extraNs) failGroup(g, kTimeout, phase, rank);
    if (hasFailed(g)) return false;
  }
}

// All threads of all blocks have done what they do before, when any goes on. False when the group failed.
// Every thread of the block calls it; `at` numbers the barriers of one kernel.
__device__ inline bool gridBarrier(const kernelGroup_t &g, int at, int32_t phase) {
  __shared__ bool passed;
  __syncthreads();
  if (threadIdx.x == 0) {
    addReleaseDevice(&g.laneState->arrived[at], 1);
    uint64_t start = nowNs();
    passed = true;
    for (int polls = 1; loadAcquireDevice(&g.laneState->arrived[at]) < gridDim.x; polls++) {
      if (polls % kPollsBetweenLooks != 0) continue;
      if (!groupIsOver(g, phase, true) && nowNs() - start > g.timeoutNs)
        failGroup(g, kTimeout, phase, g.rank);
      if (hasFailed(g)) {
        passed = false;
        break;
      }
    }
  }
  __syncthreads();
  return passed;
}

// Counts blocks out. True on the last block, in every thread, with all other blocks' writes visible.
__device__ inline bool lastBlockOut(const kernelGroup_t &g) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    last = addAcquireReleaseDevice(&g.laneState->left, 1) == gridDim.x - 1;
  }
  __syncthreads();
  return last;
}

// What the last block of a kernel does at its end: the lane's counters are ready for its next kernel. A
// kernel that leaves for a failure found in the other lane does not end before the host can know of it: the
// thread that found it has two stores to do.
__device__ inline void resetLane(const kernelGroup_t &g, uint32_t call) {
  uint64_t start = nowNs();
  while (hasFailed(g) && loadAcquireDevice(&g.state->isRecorded) == 0 && nowNs() - start < g.timeoutNs) {
  }
  for (uint32_t &blocks : g.laneState->arrived) blocks = 0;
  g.laneState->left = 0;
  g.laneState->calls = call;
}

// Sets a route's status for a lane's calls; the host's copy is whole once its last word, nUpdates and code,
// is there. By one thread.
__device__ inline void concludeRoute(const kernelRoute_t &route, int lane, kernelRouteStatus_t status) {
  volatile kernelRouteStatus_t *host = &route.hostStatus[lane];
  route.status[lane] = status;
  if (status.code != kSuccess) { // nobody reads the rest of a success
    host->rank = status.rank;
    host->rows = status.rows;
    __threadfence_system();
  }
  *reinterpret_cast<volatile uint64_t *>(&host->code) =
      uint64_t(uint32_t(status.nUpdates)) << 32 | uint32_t(status.code);
}

// Raises a flag at every rank. Threads of one block; everything the block (or, after lastBlockOut, the grid)
// wrote before is visible to who sees the flag.
__device__ inline void raiseFlags(const kernelGroup_t &g, int kind, uint32_t call, uint32_t word) {
  __syncthreads();
  for (int r = threadIdx.x; r < g.planner.nRanks; r += blockDim.x)
    storeReleaseSystem(flagOf(g, r, kind, g.rank), uint64_t(word) << 32 | call);
}

// Waits for every rank's flag, a thread for each rank; false in every thread when the group failed. Words
// that differ from `expected` are told by *differs (the lowest rank, else -1), those that only have the bit
// KERNEL_CHECK_BAD_ENTRY more by *marked.
__device__ inline bool waitFlags(const kernelGroup_t &g, int kind, uint32_t call, int32_t phase,
                                 uint32_t expected, int *differs, int *marked = nullptr,
                                 uint64_t extraNs = 0) {
  constexpr int kNone = 0x7fffffff;
  __shared__ int failures, different, bad;
  if (threadIdx.x == 0) {
    failures = 0;
    different = bad = kNone;
  }
  __syncthreads();
  for (int r = threadIdx.x; r < g.planner.nRanks; r += blockDim.x) {
    uint32_t word;
    if (!waitFlag(g, flagOf(g, g.rank, kind, r), call, phase, r, &word, extraNs))
      atomicAdd(&failures, 1);
    else if (word == (expected | KERNEL_CHECK_BAD_ENTRY))
      atomicMin(&bad, r);
    else if (word != expected)
      atomicMin(&different, r);
  }
  // Flags that were there at once say nothing of a failure: a late rank must not write to peers that gave it
  // up.
  if (threadIdx.x == blockDim.x - 1 && groupIsOver(g, phase, false)) atomicAdd(&failures, 1);
  __syncthreads();
  *differs = different == kNone ? -1 : different;
  if (marked) *marked = bad == kNone ? -1 : bad;
  bool all = failures == 0;
  __syncthreads();
  return all;
}

// The opening of a call: this rank is in it, and so is every other. The second half is true when rows may
// move; *other is the lowest rank in another call or with other places, -1 if none: all ranks see a
// difference alike, and none goes on.
__device__ inline void raiseOpen(const kernelGroup_t &g, uint32_t check, uint32_t call) {
  if (blockIdx.x == 0) raiseFlags(g, openKind(g, call), call, check);
}
__device__ inline bool waitOpen(const kernelGroup_t &g, uint32_t check, uint32_t call, int32_t phase,
                                int *other) {
  bool alive = waitFlags(g, openKind(g, call), call, phase, check, other);
  return alive && *other < 0;
}
__device__ inline bool openExchange(const kernelGroup_t &g, uint32_t check, uint32_t call, int32_t phase,
                                    int *other) {
  raiseOpen(g, check, call);
  return waitOpen(g, check, call, phase, other);
}

// The same by a warp of each block.
__device__ inline void warpRaiseOpen(const kernelGroup_t &g, uint32_t check, uint32_t call) {
  if (blockIdx.x != 0) return;
#pragma unroll 1
  for (int r = threadIdx.x % kWarp; r < g.planner.nRanks; r += kWarp)
    storeReleaseSystem(flagOf(g, r, openKind(g, call), g.rank), uint64_t(check) << 32 | call);
}
__device__ inline bool warpWaitOpen(const kernelGroup_t &g, uint32_t check, uint32_t call, int32_t phase,
                                    int *other) {
  int lane = threadIdx.x % kWarp;
  uint32_t differs = ~0u;
  bool failed = false;
#pragma unroll 1
  for (int r = lane; r < g.planner.nRanks; r += kWarp) {
    uint32_t word;
    if (!waitFlag(g, flagOf(g, g.rank, openKind(g, call), r), call, phase, r, &word))
      failed = true;
    else if (word != check)
      differs = min(differs, uint32_t(r));
  }
  if (lane == kWarp - 1 && groupIsOver(g, phase, false)) failed = true; // as in waitFlags
  __syncwarp();                                                         // what a lane has acquired, all have
  *other = int(warpMin(differs));
  return !__any_sync(kFullWarp, failed) && *other < 0;
}

// The end: the last block says that this rank is done and waits for the others (`raise`), tells a difference
// that openExchange found, and leaves the counters ready for the next call.
__device__ inline void closeExchange(const kernelGroup_t &g, const kernelRoute_t &route, uint32_t check,
                                     uint32_t call, int32_t phase, bool raise, int other,
                                     uint64_t extraNs = 0) {
  if (!lastBlockOut(g)) return;
  int ignored;
  if (raise && !hasFailed(g)) {
    raiseFlags(g, doneKind(g), call, check);
    waitFlags(g, doneKind(g), call, phase, check, &ignored, nullptr, extraNs);
  }
  if (threadIdx.x != 0) return;
  if (other >= 0 && !hasFailed(g))
    concludeRoute(route, g.lane, {kInvalidUsage, route.status[g.lane].nUpdates, other, 0, 0});
  resetLane(g, call);
}

} // namespace ultraep

#endif
