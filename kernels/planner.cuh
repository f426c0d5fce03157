// The planner on the device: the same alias fill as balancer/fill.c and balancer/search.c, by one thread
// block. One warp fills one domain; every choice is made by the same keys and tie-breaks, so plans equal the
// host's to the bit.
#ifndef ULTRAEP_PLANNER_CUH_
#define ULTRAEP_PLANNER_CUH_

#include "kernels.h"
#include "warp.cuh"

namespace ultraep {

// Steps above the target that a fill is tried for, as in balancer/search.c.
__device__ constexpr int64_t kSearchStepsPpm[] = {
    0,     250,   500,   1000,  1500,   2000,   3000,   4000,   6000,   8000,   12000,   16000,   24000,
    32000, 48000, 64000, 96000, 128000, 192000, 256000, 384000, 512000, 768000, 1000000, 2000000, 4000000};
constexpr int kSearchSteps = sizeof(kSearchStepsPpm) / sizeof(kSearchStepsPpm[0]);
constexpr int kSearchBetween = 8;
constexpr int kSearchGateSteps = 16;
constexpr int kMaxDomainWarps = 32;

// Working arrays of one plan, in shared memory where they fit.
struct PlanArrays {
  int64_t *expertLoad; // [E]
  int64_t *rem;        // [E] what masters keep during a fill; afterwards their quotas
  int64_t *rankBefore; // [R]
  int64_t *rankLoad;   // [R]
  int64_t *largest;    // [R] largest rem of a heavy rank
  int64_t *slotQuota;  // [R*S]
  int32_t *slotExpert; // [R*S]
  int32_t *slotCount;  // [R]
  int32_t *kind;       // [R] Kind, during a fill
  int32_t *scratch;    // [E + R] for the cost gate

  __host__ __device__ static size_t bytes(int64_t nRanks, int64_t nExperts, int64_t nSlots) {
    return size_t(8 * (2 * nExperts + 3 * nRanks + nRanks * nSlots) +
                  4 * (nRanks * nSlots + 3 * nRanks + nExperts)) +
           16;
  }
  __device__ void carve(char *base, int64_t nRanks, int64_t nExperts, int64_t nSlots) {
    expertLoad = reinterpret_cast<int64_t *>(base);
    rem = expertLoad + nExperts;
    rankBefore = rem + nExperts;
    rankLoad = rankBefore + nRanks;
    largest = rankLoad + nRanks;
    slotQuota = largest + nRanks;
    slotExpert = reinterpret_cast<int32_t *>(slotQuota + nRanks * nSlots);
    slotCount = slotExpert + nRanks * nSlots;
    kind = slotCount + nRanks;
    scratch = kind + nRanks;
  }
};

enum Kind : int32_t { kSettled = 0, kLight = 1, kHeavy = 2 };

struct Outcome {
  int64_t most, target;
  int32_t nReplicas;
};

// One warp's fill of one domain. Key is wide enough for the problem's total.
template <typename Key> struct WarpFill {
  const kernelPlanner_t &p;
  const PlanArrays &a;
  int first, end, lane, perRank,
      span; // span: ranks a lane looks at, consecutive, so lower lanes have lower ranks

  __device__ WarpFill(const kernelPlanner_t &planner, const PlanArrays &arrays, int firstRank)
      : p(planner), a(arrays), first(firstRank), end(firstRank + planner.nDomainRanks),
        lane(threadIdx.x % kWarp), perRank(planner.nExperts / planner.nRanks),
        span((planner.nDomainRanks + kWarp - 1) / kWarp) {}

  // The largest rem of a rank's experts, known to the whole warp.
  __device__ Key largestOf(int rank) const {
    Key most = 0;
    for (int i = lane; i < perRank; i += kWarp) most = max(most, Key(a.rem[rank * perRank + i]));
    return warpMax(most);
  }

  // The rank of the wanted kind with the best key, the lowest of equals; -1 if there is none. keyOf gives 0
  // for "not this one".
  template <typename KeyOf> __device__ int pick(KeyOf keyOf, Key *best) const {
    Key mine = 0;
    int at = -1;
    for (int i = 0; i < span; i++) {
      int r = first + lane * span + i;
      Key key = r < end ? keyOf(r) : Key(0);
      if (key > mine) {
        mine = key;
        at = r;
      }
    }
    *best = warpMax(mine);
    int from = warpFirst(mine == *best && at >= 0);
    return from < 0 ? -1 : __shfl_sync(kFullWarp, at, from);
  }

  __device__ int pickReceiver() const {
    Key best;
    return pick([&](int r) { return a.kind[r] == kLight ? ~Key(a.rankLoad[r]) : Key(0); }, &best);
  }

  __device__ int pickDonor(Key want) const {
    Key best;
    int heaviest = pick([&](int r) { return a.kind[r] == kHeavy ? Key(a.rankLoad[r]) : Key(0); }, &best);
    if (heaviest < 0 || Key(a.largest[heaviest]) >= want) return heaviest;
    int covering = pick(
        [&](int r) { return a.kind[r] == kHeavy && Key(a.largest[r]) >= want ? Key(a.rankLoad[r]) : Key(0); },
        &best);
    if (covering >= 0) return covering;
    // No expert covers: the rank with the largest one, the heavier of equals.
    Key biggest;
    pick([&](int r) { return a.kind[r] == kHeavy ? Key(a.largest[r]) : Key(0); }, &biggest);
    return pick(
        [&](int r) {
          return a.kind[r] == kHeavy && Key(a.largest[r]) == biggest ? Key(a.rankLoad[r]) : Key(0);
        },
        &best);
  }

  // The donor's smallest expert that covers want, or its largest; the lowest of equals.
  __device__ int pickExpert(int donor, Key want) const {
    Key cover = ~Key(0), most = 0;
    int coverAt = -1, mostAt = -1;
    int perLane = (perRank + kWarp - 1) / kWarp;
    for (int i = 0; i < perLane; i++) {
      int e = lane * perLane + i;
      if (e >= perRank) break;
      Key rem = Key(a.rem[donor * perRank + e]);
      if (rem >= want && rem < cover) {
        cover = rem;
        coverAt = e;
      }
      if (rem > most) {
        most = rem;
        mostAt = e;
      }
    }
    Key least = warpMin(cover);
    int from = warpFirst(coverAt >= 0 && cover == least);
    if (from >= 0) return donor * perRank + __shfl_sync(kFullWarp, coverAt, from);
    Key biggest = warpMax(most);
    from = warpFirst(mostAt >= 0 && most == biggest);
    return donor * perRank + __shfl_sync(kFullWarp, mostAt, from);
  }

  // Fills one receiver to the target or until its slots are used; nHeavy counts the ranks above the target.
  __device__ void fillReceiver(int receiver, Key target, int *nHeavy) const {
    Key load = Key(a.rankLoad[receiver]);
    int used = 0; // a receiver is filled once, so its slots are empty
    while (*nHeavy > 0 && load < target && used < p.nSlots) {
      Key want = target - load;
      int donor = pickDonor(want), expert = pickExpert(donor, want);
      Key rem = Key(a.rem[expert]), amount = min(want, rem), donorLoad = Key(a.rankLoad[donor]) - amount;
      load += amount;
      __syncwarp(); // all lanes have read before lane 0 writes
      if (lane == 0) {
        a.slotExpert[receiver * p.nSlots + used] = expert;
        a.slotQuota[receiver * p.nSlots + used] = int64_t(amount);
        a.rem[expert] = int64_t(rem - amount);
        a.rankLoad[donor] = int64_t(donorLoad);
      }
      __syncwarp();
      used++;
      if (donorLoad <= target) (*nHeavy)--;
      Key largest = largestOf(donor);
      if (lane == 0) {
        a.largest[donor] = int64_t(largest);
        if (donorLoad <= target) a.kind[donor] = donorLoad < target ? kLight : kSettled;
      }
      __syncwarp();
    }
    if (lane == 0) {
      a.rankLoad[receiver] = int64_t(load);
      a.slotCount[receiver] = used;
      a.kind[receiver] = kSettled;
    }
    __syncwarp();
  }

  __device__ Outcome run(int64_t target) const {
    int nHeavy = 0, nReplicas = 0;
    __syncwarp();
    for (int r = first + lane; r < end; r += kWarp) {
      int64_t load = a.rankBefore[r];
      a.rankLoad[r] = load;
      a.slotCount[r] = 0;
      a.kind[r] = load > target ? kHeavy : load < target ? kLight : kSettled;
      nHeavy += load > target;
    }
    nHeavy = __reduce_add_sync(kFullWarp, nHeavy);
    for (int e = first * perRank + lane; e < end * perRank; e += kWarp) a.rem[e] = a.expertLoad[e];
    __syncwarp();
    if (nHeavy > 0 && p.nSlots > 0) {
      for (int r = first + lane; r < end; r += kWarp) {
        int64_t most = 0;
        for (int i = 0; i < perRank; i++) most = max(most, a.rem[r * perRank + i]);
        a.largest[r] = most;
      }
      __syncwarp();
      while (nHeavy > 0) {
        int receiver = pickReceiver();
        if (receiver < 0) break;
        fillReceiver(receiver, Key(target), &nHeavy);
      }
    }
    Key most = 0;
    for (int r = first + lane; r < end; r += kWarp) {
      most = max(most, Key(a.rankLoad[r]));
      nReplicas += a.slotCount[r];
    }
    return {int64_t(warpMax(most)), target, int32_t(__reduce_add_sync(kFullWarp, nReplicas))};
  }

  __device__ static void keep(Outcome *best, const Outcome &run) {
    if (run.most < best->most || (run.most == best->most && run.nReplicas < best->nReplicas)) *best = run;
  }

  // search_domain of balancer/search.c.
  __device__ Outcome search(int64_t target) const {
    Outcome last = run(target), best = last;
    if (last.most <= target || p.nSlots == 0 || p.nDomainRanks == 1) return best;
    Key before = 0;
    for (int r = first + lane; r < end; r += kWarp) before = max(before, Key(a.rankBefore[r]));
    int64_t high = int64_t(warpMax(before)), missed = target;
    for (int k = 1; k <= kSearchSteps && last.most > last.target; k++) {
      int64_t next = high;
      if (k < kSearchSteps)
        next = min(high, target + target / 1000000 * kSearchStepsPpm[k] +
                             target % 1000000 * kSearchStepsPpm[k] / 1000000);
      if (next == last.target) continue;
      missed = last.target;
      last = run(next);
      keep(&best, last);
    }
    int64_t low = missed;
    high = last.target;
    for (int j = 1; j < kSearchBetween; j++) {
      int64_t between = low + (high - low) * j / kSearchBetween;
      if (between == low) continue;
      last = run(between);
      keep(&best, last);
      if (last.most <= between) break;
    }
    if (last.target != best.target) run(best.target);
    return best;
  }
};

// What the warps of a block tell each other about a search over all domains.
struct PlanShared {
  int64_t total, meanBound, before;
  Outcome domain[kMaxDomainWarps];
  Outcome all;
  unsigned long long cost;
};

// search_target of balancer/search.c: every domain by a warp; the block has the result in shared.all.
template <typename Key>
__device__ void planTarget(const kernelPlanner_t &p, const PlanArrays &a, PlanShared &shared,
                           int64_t target) {
  int warp = threadIdx.x / kWarp, nWarps = min(int(blockDim.x / kWarp), kMaxDomainWarps);
  Outcome mine = {0, target, 0};
  if (warp < nWarps) {
    for (int d = warp; d < p.nRanks / p.nDomainRanks; d += nWarps) {
      Outcome run = WarpFill<Key>(p, a, d * p.nDomainRanks).search(target);
      mine.most = max(mine.most, run.most);
      mine.nReplicas += run.nReplicas;
    }
    if (threadIdx.x % kWarp == 0) shared.domain[warp] = mine;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    Outcome all = {0, target, 0};
    for (int w = 0; w < nWarps; w++) {
      all.most = max(all.most, shared.domain[w].most);
      all.nReplicas += shared.domain[w].nReplicas;
    }
    shared.all = all;
  }
  __syncthreads();
}

// Expert copies over the busiest link; see balancer/search.c. By thread 0: the gate runs seldom and matrices
// are small.
__device__ inline int64_t planBusiestLink(const kernelPlanner_t &p, const PlanArrays &a) {
  int32_t *sent = a.scratch, *sends = a.scratch + p.nExperts;
  int perRank = p.nExperts / p.nRanks;
  int64_t busiest = 0;
  for (int i = 0; i < p.nExperts + p.nRanks; i++) a.scratch[i] = 0;
  for (int r = 0; r < p.nRanks; r++) {
    busiest = max(busiest, int64_t(a.slotCount[r]));
    for (int s = 0; s < a.slotCount[r]; s++) {
      int e = a.slotExpert[r * p.nSlots + s];
      if (p.relayCopies && sent[e]) continue;
      sent[e] = 1;
      busiest = max(busiest, int64_t(++sends[e / perRank]));
    }
  }
  return busiest;
}

// search_tolerated of balancer/search.c.
__device__ inline int64_t planTolerated(const kernelPlanner_t &p, int64_t total) {
  int64_t ppm = p.tolerancePpm, n = p.nRanks, mean = total / n, rest = total % n;
  int64_t part = mean % 1000000 * ppm + (rest * (1000000 + ppm)) / n;
  return max((total + n - 1) / n, mean + mean / 1000000 * ppm + part / 1000000);
}

// planner_search of balancer/search.c.
template <typename Key>
__device__ void planSearch(const kernelPlanner_t &p, const PlanArrays &a, PlanShared &shared) {
  int64_t lowest = max(planTolerated(p, shared.total), shared.meanBound), before = shared.before;
  int64_t bestTarget = lowest;
  if (p.copyPs != 0) {
    bestTarget = max(before, lowest);
    uint64_t bestCost = uint64_t(before) * p.rowPs;
    if (uint64_t(lowest) * p.rowPs + p.copyPs < bestCost) {
      for (int k = 0; k < kSearchGateSteps; k++) {
        int64_t target = lowest + (before - lowest) * k / kSearchGateSteps;
        planTarget<Key>(p, a, shared, target);
        if (threadIdx.x == 0) {
          uint64_t cost = uint64_t(shared.all.most) * p.rowPs;
          if (shared.all.nReplicas > 0) cost += uint64_t(planBusiestLink(p, a)) * p.copyPs;
          shared.cost = cost;
        }
        __syncthreads();
        if (shared.cost < bestCost) {
          bestCost = shared.cost;
          bestTarget = target;
        }
        __syncthreads();
      }
    }
  }
  planTarget<Key>(p, a, shared, bestTarget);
}

// Sums the load matrix [R][E] by expert and rank. loads may be written by peers before this kernel's acquire.
__device__ inline void planSumLoads(const kernelPlanner_t &p, const PlanArrays &a, PlanShared &shared,
                                    const int32_t *loads) {
  int perRank = p.nExperts / p.nRanks;
  for (int e = threadIdx.x; e < p.nExperts; e += blockDim.x) a.expertLoad[e] = 0;
  __syncthreads();
  // With fewer experts than threads, groups of threads share the sources of a column.
  int groups = max(1, int(blockDim.x) / p.nExperts), lanes = groups == 1 ? int(blockDim.x) : p.nExperts;
  int group = threadIdx.x / lanes;
  if (group < groups) {
    int rows = (p.nRanks + groups - 1) / groups, from = group * rows, to = min(p.nRanks, from + rows);
    for (int e = threadIdx.x % lanes; e < p.nExperts; e += lanes) {
      int64_t sum = 0;
#pragma unroll 8
      for (int src = from; src < to; src++) sum += __ldcg(loads + int64_t(src) * p.nExperts + e);
      if (groups == 1)
        a.expertLoad[e] = sum;
      else if (sum != 0)
        atomicAdd(reinterpret_cast<unsigned long long *>(&a.expertLoad[e]),
                  static_cast<unsigned long long>(sum));
    }
  }
  __syncthreads();
  for (int r = threadIdx.x; r < p.nRanks; r += blockDim.x) {
    int64_t sum = 0;
    for (int i = 0; i < perRank; i++) sum += a.expertLoad[r * perRank + i];
    a.rankBefore[r] = sum;
  }
  __syncthreads();
  if (threadIdx.x < kWarp) {
    int64_t total = 0, most = 0, mean = 0;
    for (int first = threadIdx.x * p.nDomainRanks; first < p.nRanks; first += kWarp * p.nDomainRanks) {
      int64_t sum = 0;
      for (int r = first; r < first + p.nDomainRanks; r++) sum += a.rankBefore[r];
      mean = max(mean, (sum + p.nDomainRanks - 1) / p.nDomainRanks);
    }
    for (int r = threadIdx.x; r < p.nRanks; r += kWarp) {
      total += a.rankBefore[r];
      most = max(most, a.rankBefore[r]);
    }
    for (int step = kWarp / 2; step > 0; step /= 2) total += __shfl_xor_sync(kFullWarp, total, step);
    most = int64_t(warpMax(uint64_t(most)));
    mean = int64_t(warpMax(uint64_t(mean)));
    if (threadIdx.x == 0) {
      shared.total = total;
      shared.before = most;
      shared.meanBound = mean;
    }
  }
  __syncthreads();
}

// The whole plan by one block: afterwards a.slotExpert (ascending on each rank), a.slotQuota, a.slotCount,
// a.rem (the masters' quotas), a.rankLoad and shared.all are set.
__device__ inline void planBlock(const kernelPlanner_t &p, const PlanArrays &a, PlanShared &shared,
                                 const int32_t *loads) {
  planSumLoads(p, a, shared, loads);
  if (shared.total <= 0x7fffffff)
    planSearch<uint32_t>(p, a, shared);
  else
    planSearch<uint64_t>(p, a, shared);
  for (int r = threadIdx.x; r < p.nRanks; r += blockDim.x) {
    int32_t *expert = a.slotExpert + int64_t(r) * p.nSlots;
    int64_t *quota = a.slotQuota + int64_t(r) * p.nSlots;
    for (int i = 1; i < a.slotCount[r]; i++) {
      int32_t e = expert[i];
      int64_t q = quota[i];
      int j = i;
      for (; j > 0 && expert[j - 1] > e; j--) {
        expert[j] = expert[j - 1];
        quota[j] = quota[j - 1];
      }
      expert[j] = e;
      quota[j] = q;
    }
    for (int i = a.slotCount[r]; i < p.nSlots; i++) {
      expert[i] = -1;
      quota[i] = 0;
    }
  }
  __syncthreads();
}

} // namespace ultraep

#endif
