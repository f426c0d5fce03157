// The planner on the device: the same alias fill as balancer/fill.c and balancer/search.c, by one thread
// block. One warp fills one domain; every choice is made by the same keys and tie-breaks, so plans equal the
// host's to the bit.
#ifndef ULTRAEP_PLANNER_CUH_
#define ULTRAEP_PLANNER_CUH_

#include "planner_fill.cuh"

namespace ultraep {

// Steps above the target that a fill is tried for, as in balancer/search.c.
__device__ constexpr int64_t kSearchStepsPpm[] = {
    0,     250,   500,   1000,  1500,   2000,   3000,   4000,   6000,   8000,   12000,   16000,   24000,
    32000, 48000, 64000, 96000, 128000, 192000, 256000, 384000, 512000, 768000, 1000000, 2000000, 4000000};
constexpr int kSearchSteps = sizeof(kSearchStepsPpm) / sizeof(kSearchStepsPpm[0]);
constexpr int kSearchBetween = 8;
constexpr int kSearchGateSteps = 16;
constexpr int kMaxDomainWarps = 32;

// A fill as a function of its own: called from several places of a search, compiled once.
template <typename Fill>
__device__ __noinline__ Outcome runFill(FillShape shape, PlanArrays arrays, int firstRank, int64_t target) {
  return Fill(shape, arrays, firstRank).run(target);
}

__device__ __forceinline__ void keepOutcome(Outcome *best, const Outcome &run) {
  if (run.most < best->most || (run.most == best->most && run.nReplicas < best->nReplicas)) *best = run;
}

// What search_domain of balancer/search.c does when the target is missed by the first fill, `last`.
template <typename Fill>
__device__ __noinline__ Outcome searchHigher(FillShape p, PlanArrays a, int first, Outcome last) {
  Outcome best = last;
  uint64_t before = 0;
  for (int r = first + int(threadIdx.x) % kWarp; r < first + p.nDomainRanks; r += kWarp)
    before = max(before, uint64_t(a.rankBefore[r]));
  int64_t target = last.target, high = int64_t(warpMax(before)), missed = target;
  for (int k = 1; k <= kSearchSteps && last.most > last.target; k++) {
    int64_t next = high;
    if (k < kSearchSteps)
      next = min(high, target + target / 1000000 * kSearchStepsPpm[k] +
                           target % 1000000 * kSearchStepsPpm[k] / 1000000);
    if (next == last.target) continue;
    missed = last.target;
    last = runFill<Fill>(p, a, first, next);
    keepOutcome(&best, last);
  }
  int64_t low = missed;
  high = last.target;
  for (int j = 1; j < kSearchBetween; j++) {
    int64_t between = low + (high - low) * j / kSearchBetween;
    if (between == low) continue;
    last = runFill<Fill>(p, a, first, between);
    keepOutcome(&best, last);
    if (last.most <= between) break;
  }
  if (last.target != best.target) runFill<Fill>(p, a, first, best.target);
  return best;
}

// What the warps of a block tell each other about a search over all domains.
struct PlanShared {
  int64_t total, meanBound, before, tolerated;
  int64_t sums[kMaxDomainWarps][3];
  Outcome domain[kMaxDomainWarps];
  Outcome all;
  unsigned long long cost;
};

// search_target of balancer/search.c: every domain by a warp; the block has the result in shared.all.
template <typename Fill>
__device__ __noinline__ void planTarget(const kernelPlanner_t &p, const PlanArrays &a, PlanShared &shared,
                                        int64_t target) {
  int warp = threadIdx.x / kWarp, nWarps = min(int(blockDim.x / kWarp), kMaxDomainWarps);
  Outcome mine = {0, target, 0};
  FillShape shape = {p.nSlots, p.perRank, p.nDomainRanks};
  if (warp < nWarps) {
    for (int d = warp; d < p.nRanks / p.nDomainRanks; d += nWarps) {
      Outcome run = runFill<Fill>(shape, a, d * p.nDomainRanks, target);
      if (run.most > target && p.nSlots > 0 && p.nDomainRanks > 1)
        run = searchHigher<Fill>(shape, a, d * p.nDomainRanks, run);
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
  int perRank = p.perRank;
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
  return max(mean + (rest > 0), mean + mean / 1000000 * ppm + part / 1000000);
}

// planner_search of balancer/search.c.
template <typename Fill>
__device__ __noinline__ void planSearch(const kernelPlanner_t &p, const PlanArrays &a, PlanShared &shared) {
  int64_t lowest = max(shared.tolerated, shared.meanBound), before = shared.before;
  int64_t bestTarget = lowest;
  if (p.copyPs != 0) {
    bestTarget = max(before, lowest);
    uint64_t bestCost = uint64_t(before) * p.rowPs;
    if (uint64_t(lowest) * p.rowPs + p.copyPs < bestCost) {
      for (int k = 0; k < kSearchGateSteps; k++) {
        int64_t target = lowest + (before - lowest) * k / kSearchGateSteps;
        planTarget<Fill>(p, a, shared, target);
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
  planTarget<Fill>(p, a, shared, bestTarget);
}

// 64-bit division is a long subroutine; sums mostly fit 32 bits.
__device__ __forceinline__ int64_t ceilDivide(int64_t sum, int n) {
  if (sum <= 0x7fffffff) return (uint32_t(sum) + uint32_t(n) - 1) / uint32_t(n);
  return (sum + n - 1) / n;
}

// Sums the load matrix [R][E], in global or shared memory, by expert and rank.
__device__ inline void planSumLoads(const kernelPlanner_t &p, const PlanArrays &a, PlanShared &shared,
                                    const int32_t *loads) {
  int perRank = p.perRank, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int nWarps = min(int(blockDim.x / kWarp), kMaxDomainWarps);
  // Groups of threads share the sources of their columns, four columns a thread where rows allow it.
  int wide = p.nExperts % 4 == 0 ? 4 : 1, columns = p.nExperts / wide;
  int groups = max(1, int(blockDim.x) / columns), lanes = groups == 1 ? int(blockDim.x) : columns;
  int group = threadIdx.x / lanes, rows = (p.nRanks + groups - 1) / groups, from = group * rows;
  int to = group < groups ? min(p.nRanks, from + rows) : from;
  // Sums of groups meet by 32-bit atomics in two halves, 22 bits and the rest: neither can overflow, as a
  // column of a group is below 2^41 and there are at most 512 groups.
  auto *halves = reinterpret_cast<uint32_t *>(static_cast<int64_t *>(a.expertLoad));
  for (int e = threadIdx.x; e < 2 * p.nExperts; e += blockDim.x) halves[e] = 0;
  __syncthreads();
  for (int column = threadIdx.x % lanes; column < columns && from < to; column += lanes) {
    int64_t sum[4] = {};
#pragma unroll 4
    for (int src = from; src < to; src++) {
      const int32_t *at = loads + int64_t(src) * p.nExperts + column * wide;
      if (wide == 4) {
        int4 value = *reinterpret_cast<const int4 *>(at);
        sum[0] += value.x;
        sum[1] += value.y;
        sum[2] += value.z;
        sum[3] += value.w;
      } else {
        sum[0] += *at;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i >= wide || sum[i] == 0) continue;
      atomicAdd(&halves[2 * (column * wide + i)], uint32_t(sum[i]) & 0x3fffffu);
      atomicAdd(&halves[2 * (column * wide + i) + 1], uint32_t(sum[i] >> 22));
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < p.nExperts; e += blockDim.x)
    a.expertLoad[e] = (int64_t(halves[2 * e + 1]) << 22) + halves[2 * e];
  __syncthreads();
#pragma unroll 1
  for (int r = warp; r < p.nRanks; r += blockDim.x / kWarp) {
    int64_t sum = 0;
#pragma unroll 1
    for (int i = lane; i < perRank; i += kWarp) sum += a.expertLoad[r * perRank + i];
    sum = warpSum(sum);
    if (lane == 0) a.rankBefore[r] = sum;
  }
  __syncthreads();
  int64_t total = 0, most = 0, mean = 0; // of the domains that this warp looks at
#pragma unroll 1
  for (int d = warp; warp < nWarps && d < p.nRanks / p.nDomainRanks; d += nWarps) {
    int64_t domain = 0;
#pragma unroll 1
    for (int r = d * p.nDomainRanks + lane; r < (d + 1) * p.nDomainRanks; r += kWarp) {
      domain += a.rankBefore[r];
      most = max(most, a.rankBefore[r]);
    }
    domain = warpSum(domain);
    total += domain;
    mean = max(mean, ceilDivide(domain, p.nDomainRanks));
  }
  most = int64_t(warpMax(uint64_t(most)));
  if (lane == 0 && warp < nWarps) {
    shared.sums[warp][0] = total;
    shared.sums[warp][1] = most;
    shared.sums[warp][2] = mean;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int64_t all[3] = {};
    for (int w = 0; w < min(nWarps, p.nRanks / p.nDomainRanks); w++) {
      all[0] += shared.sums[w][0];
      all[1] = max(all[1], shared.sums[w][1]);
      all[2] = max(all[2], shared.sums[w][2]);
    }
    shared.total = all[0];
    shared.before = all[1];
    shared.meanBound = all[2];
    // Without a tolerance the mean over all ranks is below the domains' means.
    shared.tolerated = p.tolerancePpm == 0 ? 0 : planTolerated(p, all[0]);
  }
  __syncthreads();
}

// Nothing to move, or nowhere to move it: masters keep everything.
__device__ inline void planNothing(const kernelPlanner_t &p, const PlanArrays &a, PlanShared &shared) {
  for (int r = threadIdx.x; r < p.nRanks; r += blockDim.x) {
    a.rankLoad[r] = a.rankBefore[r];
    a.slotCount[r] = 0;
  }
  for (int e = threadIdx.x; e < p.nExperts; e += blockDim.x) a.rem[e] = a.expertLoad[e];
  for (int i = threadIdx.x; i < p.nRanks * p.nSlots; i += blockDim.x) {
    a.slotExpert[i] = -1;
    a.slotQuota[i] = 0;
  }
  // The target as balancer/search.c tells it: with the cost gate, that of no plan at all.
  int64_t lowest = max(shared.tolerated, shared.meanBound);
  if (threadIdx.x == 0) shared.all = {shared.before, p.copyPs == 0 ? lowest : max(shared.before, lowest), 0};
  __syncthreads();
}

// The whole plan by one block: afterwards a.slotExpert (ascending on each rank), a.slotQuota, a.slotCount,
// a.rem (the masters' quotas), a.rankLoad and shared.all are set.
__device__ inline void planBlock(const kernelPlanner_t &p, const PlanArrays &a, PlanShared &shared,
                                 const int32_t *loads) {
  planSumLoads(p, a, shared, loads);
  if (p.nSlots == 0 || shared.before <= max(shared.tolerated, shared.meanBound)) {
    planNothing(p, a, shared);
    return;
  }
  bool fits = shared.total <= 0x7fffffff;
  if (fits && p.nDomainRanks <= kWarp)
    planSearch<RegisterFill<1>>(p, a, shared);
  else if (fits && p.nDomainRanks <= 2 * kWarp)
    planSearch<RegisterFill<2>>(p, a, shared);
  else if (fits)
    planSearch<WarpFill<uint32_t>>(p, a, shared);
  else
    planSearch<WarpFill<uint64_t>>(p, a, shared);
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
