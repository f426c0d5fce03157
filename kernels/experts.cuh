// What the kernels of weights and gradients share: the chains of replicas, experts cut into tiles, and the
// flags of tiles.
//
// An expert and its n replicas are a chain: the master is its place 0, the replicas are places 1..n. Weights
// go from place to place, in the order of ultraepPlanRelay. Gradients come straight to the master, where they
// are added ascending by rank; so their chains have that order, too.
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
  int8_t turns[2]; // tiles in a row that the master's rank takes, and a replica's; with several replicas 1
};

// Which of a chain's tiles a rank takes: of every `round` in a row `mine`, from the `first` on.
struct Turns {
  int round, first, mine;

  // How many there are below a tile.
  __device__ int below(int tile) const {
    int rounds = int(uint32_t(tile) / uint32_t(round));
    return rounds * mine + min(max(tile - rounds * round - first, 0), mine);
  }
  __device__ int tile(int nth) const {
    int rounds = int(uint32_t(nth) / uint32_t(mine));
    return rounds * (round - mine) + first + nth;
  }
};

// Chains that one rank can be part of: those of its slots, and of its masters that others replicate.
inline int mostChains(const kernelPlanner_t &p) {
  return p.nSlots + std::min(p.perRank, (p.nRanks - 1) * p.nSlots);
}

// ---- the order of a chain ----

enum class Order { kRank, kRelay }; // ascending by rank; as ultraepPlanRelay has it

// The experts that have replicas, a bit each.
struct ReplicatedExperts {
  uint32_t words[4096 / kWarp]; // ULTRAEP_MAX_EXPERTS

  // How many of first..end-1 have replicas.
  __device__ int count(int first, int end) const {
    int n = 0;
#pragma unroll 1
    for (int w = first / kWarp; w * kWarp < end; w++) {
      uint32_t word = words[w];
      if (w == first / kWarp) word &= ~0u << first % kWarp;
      if (w == end / kWarp) word &= (1u << end % kWarp) - 1;
      n += __popc(word);
    }
    return n;
  }
  // All of them, by a warp.
  __device__ int countAll(int nExperts) const {
    int n = 0;
    for (int w = threadIdx.x % kWarp; w * kWarp < nExperts; w += kWarp) n += __popc(words[w]);
    return warpSum(n);
  }
  // The nth, from 0, of those from `first` on; there must be as many.
  __device__ int find(int first, int nth) const {
    int w = first / kWarp;
#pragma unroll 1
    for (nth += count(w * kWarp, first); nth >= __popc(words[w]); w++) nth -= __popc(words[w]);
    return w * kWarp + int(__fns(words[w], 0, nth + 1));
  }
};

// Fills them in; false if there are none: alike on every rank, and in every thread. By all threads of a
// block.
__device__ inline bool findReplicated(const kernelGroup_t &g, const kernelRoute_t &route,
                                      ReplicatedExperts *replicated) {
  const kernelPlanner_t &p = g.planner;
  bool some = false;
#pragma unroll 1
  for (int w = threadIdx.x; w * kWarp < p.nExperts; w += blockDim.x) replicated->words[w] = 0;
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < p.nRanks * p.nSlots; i += blockDim.x) {
    int expert = route.slotExpert[i];
    if (expert < 0) continue;
    atomicOr(&replicated->words[expert / kWarp], 1u << expert % kWarp);
    some = true;
  }
  return __syncthreads_or(some);
}

// Numbers that ascend along a chain. A replica's is made of what ultraepPlanRelay sorts by, how many experts
// with replicas have their masters on its rank, and of its slot among those of all ranks, which ascends by
// rank.
template <Order kOrder> struct ChainKeys {
  // Below and above all places, where a chain does not go.
  static constexpr uint32_t kBefore = 0, kMaster = 1, kAfter = 0xffffffff;

  const kernelPlanner_t &p;
  const ReplicatedExperts &replicated;
  float perSlots = 1.0f / float(p.nSlots), perExperts = 1.0f / float(p.perRank);

  // A slot's rank, and an expert's: below 2^16 no rounding reaches the half.
  __device__ int slotRank(int slot) const { return int((float(slot) + 0.5f) * perSlots); }
  __device__ int masterRank(int expert) const { return int((float(expert) + 0.5f) * perExperts); }
  __device__ uint32_t key(int slot) const {
    int first = slotRank(slot) * p.perRank;
    uint32_t own = kOrder == Order::kRelay ? replicated.count(first, first + p.perRank) : 0;
    return (own + 1) << 16 | uint32_t(slot);
  }
  __device__ Place place(int expert, uint32_t key) const {
    int slot = int(key & 0xffff), rank = slotRank(slot);
    if (key == kBefore || key == kAfter) return {-1, -1};
    if (key == kMaster) return {int16_t(masterRank(expert)), -1};
    return {int16_t(rank), int16_t(slot - rank * p.nSlots)};
  }
};

// ---- chains ----

// Looks along all slots for one expert's replicas. By a warp.
template <Order kOrder>
__device__ inline Chain followChain(const kernelGroup_t &g, const kernelRoute_t &route,
                                    const ChainKeys<kOrder> &keys, int expert, int slot) {
  using Keys = ChainKeys<kOrder>;
  int nSlots = g.planner.nSlots, at = 0;
  uint32_t own = slot < 0 ? Keys::kMaster : keys.key(g.rank * nSlots + slot);
  // The nearest first: the two largest keys below this rank's, and the two smallest above it.
  uint32_t before[2] = {Keys::kBefore, Keys::kBefore}, after[2] = {Keys::kAfter, Keys::kAfter};
  auto look = [&](uint32_t key) {
    if (key < own) {
      at++;
      before[1] = max(before[1], min(before[0], key));
      before[0] = max(before[0], key);
    } else if (key > own) {
      after[1] = min(after[1], max(after[0], key));
      after[0] = min(after[0], key);
    }
  };
  look(Keys::kMaster);
  auto visit = [&](int first, unsigned here, int) {
    for (; here; here &= here - 1) look(keys.key(first + __ffs(here) - 1));
  };
  int n = warpReplicas<1>(route.slotExpert, g.planner.nRanks * nSlots, expert, visit);
  Chain chain = {expert, int16_t(n), int16_t(at), int16_t(slot), {}, {}, {1, 1}};
  for (int i = 0; i < 2; i++) {
    chain.before[i] = keys.place(expert, before[i]);
    chain.after[i] = keys.place(expert, after[i]);
  }
  return chain;
}

// With one replica two ranks share the work on a chain, each the less the more chains it is part of: the hot
// experts' rank has many, which would all wait for it. By a warp.
__device__ inline void shareTurns(const kernelPlanner_t &p, const int32_t *slotExpert,
                                  const ReplicatedExperts &replicated, int ownChains, Chain *chain) {
  constexpr int kMostTurns = 16;
  int other = chain->at == 0 ? chain->after[0].rank : chain->before[0].rank, first = other * p.perRank;
  int mine = ownChains, theirs = replicated.count(first, first + p.perRank);
#pragma unroll 1
  for (int s = 0; s < p.nSlots; s += kWarp) {
    int slot = s + int(threadIdx.x % kWarp);
    theirs += __popc(__ballot_sync(kFullWarp, slot < p.nSlots && slotExpert[other * p.nSlots + slot] >= 0));
  }
#pragma unroll 1
  for (; max(mine, theirs) > kMostTurns; mine = (mine + 1) / 2) theirs = (theirs + 1) / 2;
  chain->turns[0] = int8_t(chain->at == 0 ? theirs : mine);
  chain->turns[1] = int8_t(chain->at == 0 ? mine : theirs);
}

// Fills the table of this rank's chains, ascending by expert: the order of work that all ranks share. Returns
// their number. By all threads of a block.
template <Order kOrder>
__device__ inline int findChains(const kernelGroup_t &g, const kernelRoute_t &route,
                                 const ReplicatedExperts &replicated, Chain *chains) {
  const kernelPlanner_t &p = g.planner;
  int firstExpert = g.rank * p.perRank;
  const int32_t *mine = route.slotExpert + g.rank * p.nSlots; // ascending, other ranks' experts
  int nLow = 0, nOwn = 0, nMasters = replicated.count(firstExpert, firstExpert + p.perRank);
#pragma unroll 1
  for (int s = 0; s < p.nSlots; s++) {
    nOwn += mine[s] >= 0;
    nLow += mine[s] >= 0 && mine[s] < firstExpert;
  }
  ChainKeys<kOrder> keys = {p, replicated};
#pragma unroll 1
  for (int i = threadIdx.x / kWarp; i < nOwn + nMasters; i += blockDim.x / kWarp) {
    bool isMaster = i >= nLow && i < nLow + nMasters;
    int slot = isMaster ? -1 : i < nLow ? i : i - nMasters;
    int expert = isMaster ? replicated.find(firstExpert, i - nLow) : mine[slot];
    Chain chain = followChain(g, route, keys, expert, slot);
    if (chain.n == 1) shareTurns(p, route.slotExpert, replicated, nOwn + nMasters, &chain);
    if (threadIdx.x % kWarp == 0) chains[i] = chain;
  }
  __syncthreads();
  return nOwn + nMasters;
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

// A tensor in one slot of a rank's slot memory.
__device__ __forceinline__ char *inSlot(char *slots, const kernelTensor_t &tensor, int slot) {
  return slots + tensor.slotOffset + size_t(slot) * tensor.bytes;
}
__device__ __forceinline__ char *slotAddress(const kernelExperts_t &x, const kernelTensor_t &tensor,
                                             Place place) {
  return inSlot(x.slots[place.rank], tensor, place.slot);
}

// The flag of a tile of a slot, in the slot memory of the slot's rank.
__device__ __forceinline__ uint32_t *inFlags(const kernelExperts_t &x, char *slots, int slot, int number) {
  return reinterpret_cast<uint32_t *>(slots + x.flagsOffset) + size_t(slot) * x.nFlags + number;
}
__device__ __forceinline__ uint32_t *tileFlag(const kernelExperts_t &x, Place place, int number) {
  return inFlags(x, x.slots[place.rank], place.slot, number);
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

} // namespace ultraep

#endif
