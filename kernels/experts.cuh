// What the kernels of weights and gradients share: the chains of replicas, experts cut into tiles, and the
// flags of tiles.
//
// An expert and its n replicas, ascending by rank, are a chain: the master is its place 0, the replicas are
// places 1..n. Weights go from place to place, gradients come straight to the master.
#ifndef ULTRAEP_EXPERTS_CUH_
#define ULTRAEP_EXPERTS_CUH_

#include "signal.cuh"
#include "warp.cuh"

#include <algorithm>

namespace ultraep {

// A place of a chain. rank -1: the chain does not go that far; slot -1: the master.
struct Place {
  int16_t rank, slot;
};

// A chain that this rank is part of.
struct Chain {
  int32_t expert;
  int16_t n;                 // replicas
  int16_t at;                // this rank's place
  int16_t slot;              // -1 at the master
  Place before[2], after[2]; // the places next to this one, and next but one
};

// Chains that one rank can be part of: those of its slots, and of its masters that others replicate.
inline int mostChains(const kernelPlanner_t &p) {
  return p.nSlots + std::min(p.perRank, (p.nRanks - 1) * p.nSlots);
}

// Whether the plan has replicas at all: alike on every rank, and in every thread of the block.
__device__ inline bool planHasReplicas(const kernelGroup_t &g, const kernelRoute_t &route) {
  bool some = false;
  for (int i = threadIdx.x; i < g.planner.nRanks * g.planner.nSlots; i += blockDim.x)
    some |= route.slotExpert[i] >= 0;
  return __syncthreads_or(some);
}

// Looks along all slots for one expert's replicas. By a warp.
__device__ inline Chain followChain(const kernelGroup_t &g, const kernelRoute_t &route, int expert,
                                    int slot) {
  int nSlots = g.planner.nSlots, all = g.planner.nRanks * nSlots, lane = threadIdx.x % kWarp;
  int own = slot < 0 ? -1 : g.rank * nSlots + slot, n = 0, earlier = 0;
  int before[2] = {-1, -1}, after[2] = {-1, -1};
  for (int first = 0; first < all; first += kWarp) {
    unsigned here = __ballot_sync(kFullWarp, first + lane < all && route.slotExpert[first + lane] == expert);
    n += __popc(here);
    for (; here; here &= here - 1) {
      int at = first + __ffs(here) - 1;
      if (at < own) {
        earlier++;
        before[1] = before[0];
        before[0] = at;
      } else if (at > own && after[0] < 0) {
        after[0] = at;
      } else if (at > own && after[1] < 0) {
        after[1] = at;
      }
    }
  }
  auto place = [&](int at) {
    return at < 0 ? Place{-1, -1} : Place{int16_t(at / nSlots), int16_t(at % nSlots)};
  };
  Place master = {int16_t(expert / g.planner.perRank), -1};
  Chain chain = {expert, int16_t(n), int16_t(own < 0 ? 0 : earlier + 1), int16_t(slot), {}, {}};
  for (int i = 0; i < 2; i++) {
    chain.before[i] = own >= 0 && earlier == i ? master : place(before[i]);
    chain.after[i] = place(after[i]);
  }
  return chain;
}

// Fills the table of this rank's chains, ascending by expert: the order of work that all ranks share. Returns
// their number. By all threads of a block.
__device__ inline int findChains(const kernelGroup_t &g, const kernelRoute_t &route, Chain *chains) {
  constexpr int kWords = 4096 / kWarp;    // ULTRAEP_MAX_EXPERTS
  __shared__ uint32_t replicated[kWords]; // this rank's masters, a bit each
  const kernelPlanner_t &p = g.planner;
  int firstExpert = g.rank * p.perRank, nWords = (p.perRank + kWarp - 1) / kWarp;
  for (int w = threadIdx.x; w < nWords; w += blockDim.x) replicated[w] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < p.nRanks * p.nSlots; i += blockDim.x) {
    int local = route.slotExpert[i] - firstExpert;
    if (local >= 0 && local < p.perRank) atomicOr(&replicated[local / kWarp], 1u << local % kWarp);
  }
  __syncthreads();
  const int32_t *mine = route.slotExpert + g.rank * p.nSlots; // ascending, other ranks' experts
  int nLow = 0, nOwn = 0, nMasters = 0;
  for (int s = 0; s < p.nSlots; s++) {
    nOwn += mine[s] >= 0;
    nLow += mine[s] >= 0 && mine[s] < firstExpert;
  }
  for (int w = 0; w < nWords; w++) nMasters += __popc(replicated[w]);
  for (int i = threadIdx.x / kWarp; i < nOwn + nMasters; i += blockDim.x / kWarp) {
    int expert, slot = i < nLow ? i : i - nMasters;
    if (i >= nLow && i < nLow + nMasters) {
      int nth = i - nLow, w = 0;
      for (; nth >= __popc(replicated[w]); w++) nth -= __popc(replicated[w]);
      slot = -1;
      expert = firstExpert + w * kWarp + int(__fns(replicated[w], 0, nth + 1));
    } else {
      expert = mine[slot];
    }
    Chain chain = followChain(g, route, expert, slot);
    if (threadIdx.x % kWarp == 0) chains[i] = chain;
  }
  __syncthreads();
  return nOwn + nMasters;
}

// Opens a call: this rank is here, and so is every other. True when tiles may move; *other as in
// openExchange.
__device__ inline bool openChains(const kernelGroup_t &g, const kernelRoute_t &route, uint32_t check,
                                  uint32_t call, int32_t phase, Chain *chains, int *nChains, int *other) {
  raiseOpen(g, check, call);
  *nChains = findChains(g, route, chains); // while the others come
  return waitOpen(g, check, call, phase, other);
}

// ---- tiles ----

struct Tile {
  int tensor;
  size_t at; // bytes into the expert's tensor
  uint32_t bytes;
};

__device__ __forceinline__ Tile tileOf(const kernelTensor_t *tensors, int nTensors, int number) {
  int t = 0;
  while (t + 1 < nTensors && number >= tensors[t + 1].firstTile) t++;
  size_t at = size_t(number - tensors[t].firstTile) * KERNEL_TILE_BYTES;
  return {t, at, uint32_t(min(tensors[t].bytes - at, size_t(KERNEL_TILE_BYTES)))};
}

__device__ __forceinline__ char *slotAddress(const kernelExperts_t &x, const kernelTensor_t &tensor,
                                             Place place) {
  return x.slots[place.rank] + tensor.slotOffset + size_t(place.slot) * tensor.bytes;
}

// The flag of a tile of a slot, in the memory of the slot's rank.
__device__ __forceinline__ uint32_t *tileFlag(const kernelExperts_t &x, Place place, int number) {
  return reinterpret_cast<uint32_t *>(x.slots[place.rank] + x.flagsOffset) + size_t(place.slot) * x.nFlags +
         number;
}

// ---- bounded waits ----
//
// When a rank is missing amid a call, those that wait for it must give up before those that wait for them in
// turn, or the wrong one is blamed: the nearer to the start of a chain, the less patience, and the end of the
// call has most. All of it is below twice the timeout.

__device__ __forceinline__ uint64_t patience(const kernelGroup_t &g, int hop, int nHops) {
  return g.timeoutNs / 2 * uint32_t(hop) / uint32_t(nHops + 1);
}
__device__ __forceinline__ uint64_t patienceAtEnd(const kernelGroup_t &g) {
  return g.timeoutNs / 8 * 5;
}

// Looks now and then at what ends a wait besides its flag: the group has failed. By one thread, `polls`
// counts its looks at the flag from 1.
struct WaitClock {
  uint64_t start = 0;

  __device__ bool isOver(const kernelGroup_t &g, int polls, int32_t phase, int source, uint64_t extraNs) {
    if (polls == 1) start = nowNs();
    if (polls % kPollsBetweenLooks != 0) return false;
    if (!groupIsOver(g, phase, true) && nowNs() - start > g.timeoutNs + extraNs)
      failGroup(g, kTimeout, phase, source);
    return hasFailed(g);
  }
};

// ---- shares of the work ----

// Goes over numbered candidates, some of which are tasks, and gives every worker every nWorkers-th task in
// ascending order. By a warp, with `window` ([32] in shared memory) of its own.
struct TaskWalk {
  static constexpr int kEnough = 8; // tasks to know ahead

  int next = 0;        // candidate that the first lane looks at
  uint32_t before = 0; // tasks below it, of all workers

  // Returns how many tasks it put in the window, 0 at the end.
  template <typename IsTask>
  __device__ int take(int nCandidates, uint32_t worker, uint32_t nWorkers, int32_t *window, IsTask isTask) {
    int lane = threadIdx.x % kWarp, have = 0;
    unsigned lower = (1u << lane) - 1;
    __syncwarp(); // the last window has been read
    for (; next < nCandidates && have < kEnough; next += kWarp) {
      int candidate = next + lane;
      bool is = candidate < nCandidates && isTask(candidate);
      unsigned tasks = __ballot_sync(kFullWarp, is);
      bool ours = is && (before + __popc(tasks & lower)) % nWorkers == worker;
      unsigned mine = __ballot_sync(kFullWarp, ours);
      if (have + __popc(mine) > kWarp) break;
      if (ours) window[have + __popc(mine & lower)] = candidate;
      have += __popc(mine);
      before += __popc(tasks);
    }
    __syncwarp();
    return have;
  }
};

} // namespace ultraep

#endif
