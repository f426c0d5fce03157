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
constexpr uint64_t kCostUnknown = ~uint64_t(0);
constexpr int kMaxDomainWarps = 32;

// A fill as a function of its own: called from several places of a search, compiled once.
template <typename Fill>
__device__ __noinline__ Outcome runFill(FillShape shape, PlanArrays arrays, int firstRank, int64_t target) {
  return Fill(shape, arrays, firstRank).run(target);
}

__device__ __forceinline__ void keepOutcome(Outcome *best, const Outcome &run) {
  if (run.most < best->most || (run.most == best->most && run.nReplicas < best->nReplicas)) *best = run;
}

// What the warps of a block tell each other about a search over all domains.
struct PlanShared {
  int64_t total, before, tolerated;
  int64_t meanBound; // with replicaRows the least target
  int64_t sums[kMaxDomainWarps][3];
  Outcome tried[kMaxDomainWarps]; // fills of one domain, one beside the other
  Outcome all;
  kernelPlanner_t p; // here, not in registers that would live beside a fill's
  PlanCopies copies;
  unsigned long long costs[kSearchGateSteps];
};

// Fills of one domain for n targets, at most one more than there are copies, each by a warp; the outcomes are
// in shared.tried. The first writes the plan's own arrays. By the whole block.
template <typename Fill, typename TargetOf>
__device__ __forceinline__ void tryFills(FillShape shape, const PlanArrays &a, PlanShared &shared, int first,
                                         int n, TargetOf targetOf) {
  int warp = threadIdx.x / kWarp;
  __syncthreads(); // what was tried before has been read
  if (warp < n) {
    Outcome run = runFill<Fill>(shape, shared.copies.arraysOf(warp, a), first, targetOf(warp));
    if (threadIdx.x % kWarp == 0) shared.tried[warp] = run;
  }
  __syncthreads();
}

// What search_domain of balancer/search.c does when the target is missed by the first fill, `last`: the same
// targets in the same order, but as many at a time as there are copies, so that some are filled for nothing.
// By the whole block.
template <typename Fill>
__device__ __noinline__ Outcome searchHigher(FillShape p, PlanArrays a, PlanShared &shared, int first,
                                             Outcome last) {
  Outcome best = last;
  uint64_t before = 0;
  for (int r = first + int(threadIdx.x) % kWarp; r < first + p.nDomainRanks; r += kWarp)
    before = max(before, uint64_t(a.rankBefore[r]));
  int64_t target = last.target, high = int64_t(warpMax(before)), missed = target;
  int width = shared.copies.n + 1;
  for (int k = 1; k <= kSearchSteps && last.most > last.target; k += width) {
    int n = min(width, kSearchSteps + 1 - k);
    tryFills<Fill>(p, a, shared, first, n, [&](int i) {
      if (k + i == kSearchSteps) return high;
      return min(high, target + target / 1000000 * kSearchStepsPpm[k + i] +
                           target % 1000000 * kSearchStepsPpm[k + i] / 1000000);
    });
    for (int i = 0; i < n && last.most > last.target; i++) {
      Outcome run = shared.tried[i];
      if (run.target == last.target) continue;
      missed = last.target;
      last = run;
      keepOutcome(&best, last);
    }
  }
  int64_t low = missed;
  high = last.target;
  bool isReached = false;
  for (int j = 1; j < kSearchBetween && !isReached; j += width) {
    int n = min(width, kSearchBetween - j);
    tryFills<Fill>(p, a, shared, first, n,
                   [&](int i) { return low + (high - low) * (j + i) / kSearchBetween; });
    for (int i = 0; i < n && !isReached; i++) {
      Outcome run = shared.tried[i];
      if (run.target == low) continue;
      keepOutcome(&best, run);
      isReached = run.most <= run.target;
    }
  }
  tryFills<Fill>(p, a, shared, first, 1, [&](int) { return best.target; });
  return best;
}

// search_target of balancer/search.c: the first fill of every domain by a warp, then, one domain after the
// other, what is left to search; the block has the result in shared.all.
template <typename Fill>
__device__ __forceinline__ void planTarget(const kernelPlanner_t &p, const PlanArrays &a, PlanShared &shared,
                                           int64_t target) {
  int nWarps = blockDim.x / kWarp;
  FillShape shape(p);
  for (int first = int(threadIdx.x / kWarp) * p.nDomainRanks; first < p.nRanks;
       first += nWarps * p.nDomainRanks) {
    Outcome run = runFill<Fill>(shape, a, first, target);
    if (threadIdx.x == 0) shared.tried[0] = run;
  }
  __syncthreads();
  if (threadIdx.x == 0) shared.all = {0, target, 0};
  for (int first = 0; first < p.nRanks; first += p.nDomainRanks) {
    // Of a single domain the warp that has filled it has told: nothing to look for on the way that is timed.
    Outcome run = p.nDomainRanks == p.nRanks ? shared.tried[0]
                                             : outcomeOf<uint64_t>(a, first, first + p.nDomainRanks, target);
    if (run.most > target && p.nSlots > 0 && p.nDomainRanks > 1)
      run = searchHigher<Fill>(shape, a, shared, first, run);
    if (threadIdx.x == 0) {
      shared.all.most = max(shared.all.most, run.most);
      shared.all.nReplicas += run.nReplicas;
    }
  }
  __syncthreads();
}

// Expert copies over the busiest link, of what a warp has just filled; see balancer/search.c. By one warp. An
// expert that has replicas has given rows away.
__device__ inline int64_t planBusiestLink(const kernelPlanner_t &p, const PlanArrays &a) {
  int lane = threadIdx.x % kWarp, busiest = 0;
  int32_t *sends = a.kind; // not needed after a fill
  for (int r = lane; r < p.nRanks; r += kWarp) sends[r] = 0;
  __syncwarp();
  if (p.relayCopies) {
    for (int e = lane; e < p.nExperts; e += kWarp)
      if (a.rem[e] != a.expertLoad[e]) atomicAdd(&sends[e / p.perRank], 1);
  } else {
    for (int i = lane; i < p.nRanks * p.nSlots; i += kWarp)
      if (i % p.nSlots < a.slotCount[i / p.nSlots]) atomicAdd(&sends[a.slotExpert[i] / p.perRank], 1);
  }
  __syncwarp();
  for (int r = lane; r < p.nRanks; r += kWarp) busiest = max(busiest, max(sends[r], a.slotCount[r]));
  return __reduce_max_sync(kFullWarp, busiest);
}

// search_cost of balancer/search.c, by one warp.
__device__ inline uint64_t planCost(const kernelPlanner_t &p, const PlanArrays &a, Outcome run) {
  uint64_t cost = uint64_t(run.most) * p.rowPs;
  if (run.nReplicas > 0) cost += uint64_t(planBusiestLink(p, a)) * p.copyPs;
  return cost;
}

// The gate's k-th target.
__device__ __forceinline__ int64_t planGateTarget(const PlanShared &shared, int64_t lowest, int k) {
  return lowest + (shared.before - lowest) * k / kSearchGateSteps;
}

// What the gate's targets cost, in shared.costs: as many at a time as there are copies, each filled by a
// warp. kCostUnknown where that does not do, since the target is missed or there are several domains.
template <typename Fill> __device__ __noinline__ void planGate(PlanShared &shared, int64_t lowest) {
  const kernelPlanner_t &p = shared.p;
  PlanArrays a;
  a.carve(p.nRanks, p.nExperts, p.nSlots);
  int warp = threadIdx.x / kWarp, width = p.nDomainRanks == p.nRanks ? shared.copies.n + 1 : 0;
  FillShape shape(p);
  if (threadIdx.x < kSearchGateSteps) shared.costs[threadIdx.x] = kCostUnknown;
  a = shared.copies.arraysOf(warp, a);
  __syncthreads();
  for (int k = warp; warp < width && k < kSearchGateSteps; k += width) {
    Outcome run = runFill<Fill>(shape, a, 0, planGateTarget(shared, lowest, k));
    if (run.most > run.target) continue;
    __syncwarp();
    uint64_t cost = planCost(p, a, run);
    if (threadIdx.x % kWarp == 0) shared.costs[k] = cost;
  }
  __syncthreads();
}

// search_tolerated of balancer/search.c.
__device__ inline int64_t planTolerated(const kernelPlanner_t &p, int64_t total) {
  int64_t ppm = p.tolerancePpm, n = p.nRanks, mean = total / n, rest = total % n;
  int64_t part = mean % 1000000 * ppm + (rest * (1000000 + ppm)) / n;
  return max(mean + (rest > 0), mean + mean / 1000000 * ppm + part / 1000000);
}

// planner_search of balancer/search.c: the gate's targets, if any, then the best one. A function of its own,
// with its own view of the arrays, so that a route's registers need not live beside a fill's.
template <typename Fill> __device__ __noinline__ void planSearch(PlanShared &shared) {
  const kernelPlanner_t &p = shared.p;
  PlanArrays a;
  a.carve(p.nRanks, p.nExperts, p.nSlots);
  int64_t lowest = max(shared.tolerated, shared.meanBound);
  uint64_t none = uint64_t(shared.before) * p.rowPs; // no replica at all
  bool isGated = p.copyPs != 0, isTried = isGated && uint64_t(lowest) * p.rowPs + p.copyPs < none;
  if (isTried) planGate<Fill>(shared, lowest);
#pragma unroll 1
  for (int k = isTried ? 0 : kSearchGateSteps;; k++) {
    int64_t target = lowest;
    if (k < kSearchGateSteps) {
      if (shared.costs[k] != kCostUnknown) continue;
      target = planGateTarget(shared, lowest, k);
    } else if (isGated) {
      target = max(shared.before, lowest);
      uint64_t least = none;
      for (int i = 0; isTried && i < kSearchGateSteps; i++) {
        if (shared.costs[i] >= least) continue;
        least = shared.costs[i];
        target = planGateTarget(shared, lowest, i);
      }
    }
    planTarget<Fill>(p, a, shared, target);
    if (k >= kSearchGateSteps) return;
    if (threadIdx.x < kWarp) {
      uint64_t cost = planCost(p, a, shared.all);
      if (threadIdx.x == 0) shared.costs[k] = cost;
    }
    __syncthreads();
  }
}

// 64-bit division is a long subroutine; sums mostly fit 32 bits.
__device__ __forceinline__ int64_t ceilDivide(int64_t sum, int n) {
  if (sum <= 0x7fffffff) return (uint32_t(sum) + uint32_t(n) - 1) / uint32_t(n);
  return (sum + n - 1) / n;
}

// Sums of the load matrix [R][E], in global or shared memory, by expert: a warp takes four times four
// columns, each by eight lanes that share the sources.
__device__ inline void planSumExperts(const kernelPlanner_t &p, const PlanArrays &a, const int32_t *loads) {
  int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  int quads = p.nExperts % 4 == 0 ? p.nExperts / 4 : 0; // else rows are not aligned to int4
  for (int first = int(threadIdx.x / kWarp) * 4; first < quads; first += warps * 4) {
    int quad = first + lane % 4;
    int64_t sum[4] = {};
    if (quad < quads) {
#pragma unroll 8
      for (int src = lane / 4; src < p.nRanks; src += 8) {
        int4 value = *reinterpret_cast<const int4 *>(loads + int64_t(src) * p.nExperts + quad * 4);
        sum[0] += value.x;
        sum[1] += value.y;
        sum[2] += value.z;
        sum[3] += value.w;
      }
    }
    // Halving: lanes that differ in one bit give each other the columns that the other goes on with.
    bool upper = lane & 4, odd = lane & 8;
    int64_t pair[2] = {upper ? sum[2] : sum[0], upper ? sum[3] : sum[1]};
    pair[0] += __shfl_xor_sync(kFullWarp, upper ? sum[0] : sum[2], 4);
    pair[1] += __shfl_xor_sync(kFullWarp, upper ? sum[1] : sum[3], 4);
    int64_t one = odd ? pair[1] : pair[0];
    one += __shfl_xor_sync(kFullWarp, odd ? pair[0] : pair[1], 8);
    one += __shfl_xor_sync(kFullWarp, one, 16);
    if (lane < 16 && quad < quads) a.expertLoad[quad * 4 + (upper ? 2 : 0) + (odd ? 1 : 0)] = one;
  }
  for (int e = quads * 4 + int(threadIdx.x); e < p.nExperts; e += blockDim.x) {
    int64_t sum = 0;
    for (int src = 0; src < p.nRanks; src++) sum += loads[int64_t(src) * p.nExperts + e];
    a.expertLoad[e] = sum;
  }
  __syncthreads();
}

// Sums by rank; then the whole problem's total, heaviest rank and largest mean of a domain.
__device__ inline void planSumLoads(const kernelPlanner_t &p, const PlanArrays &a, PlanShared &shared,
                                    const int32_t *loads) {
  int perRank = p.perRank, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int nDomains = p.nRanks / p.nDomainRanks,
      nWarps = min(min(int(blockDim.x / kWarp), kMaxDomainWarps), nDomains);
  planSumExperts(p, a, loads);
  if (perRank <= 8) {
    for (int r = threadIdx.x; r < p.nRanks; r += blockDim.x) {
      int64_t sum = 0;
      for (int i = 0; i < perRank; i++) sum += a.expertLoad[r * perRank + i];
      a.rankBefore[r] = sum;
    }
  } else {
    for (int r = warp; r < p.nRanks; r += blockDim.x / kWarp) {
      int64_t sum = 0;
#pragma unroll 1
      for (int i = lane; i < perRank; i += kWarp) sum += a.expertLoad[r * perRank + i];
      sum = warpSum(sum);
      if (lane == 0) a.rankBefore[r] = sum;
    }
  }
  __syncthreads();
  int64_t total = 0, most = 0, mean = 0; // of the domains that this warp looks at
#pragma unroll 1
  for (int d = warp; d < nDomains; d += nWarps) {
    if (warp >= nWarps) break;
    int64_t domain = 0;
#pragma unroll 2
    for (int r = d * p.nDomainRanks + lane; r < (d + 1) * p.nDomainRanks; r += kWarp) {
      domain += a.rankBefore[r];
      most = max(most, a.rankBefore[r]);
    }
    domain = warpSum(domain);
    total += domain;
    mean = max(mean, ceilDivide(domain, p.nDomainRanks));
  }
  if (warp < nWarps) most = int64_t(warpMax(uint64_t(most)));
  if (nWarps > 1) {
    if (lane == 0 && warp < nWarps) {
      shared.sums[warp][0] = total;
      shared.sums[warp][1] = most;
      shared.sums[warp][2] = mean;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    for (int w = 1; w < nWarps; w++) {
      total += shared.sums[w][0];
      most = max(most, shared.sums[w][1]);
      mean = max(mean, shared.sums[w][2]);
    }
    shared.total = total;
    shared.before = most;
    shared.meanBound = mean;
    // Without a tolerance the mean over all ranks is below the domains' means.
    shared.tolerated = p.tolerancePpm == 0 ? 0 : planTolerated(p, total);
  }
  __syncthreads();
}

// planner_least_target of balancer/bound.c, in the mean bound's place, where replicas count rows. A function
// of its own, so that plans which do not need it are not the slower for it.
__device__ __noinline__ inline void planRaiseBound(PlanShared &shared) {
  const kernelPlanner_t &p = shared.p;
  PlanArrays a;
  a.carve(p.nRanks, p.nExperts, p.nSlots);
  int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, d = p.nDomainRanks, nDomains = p.nRanks / d;
  int nWarps = min(min(int(blockDim.x / kWarp), kMaxDomainWarps), nDomains);
  int64_t least = shared.meanBound;
  for (int first = warp * d; warp < nWarps && first < p.nRanks; first += nWarps * d) {
    uint64_t before = 0;
    for (int r = first + lane; r < first + d; r += kWarp) before = max(before, uint64_t(a.rankBefore[r]));
    int64_t high = int64_t(warpMax(before));
    while (least < high) {
      int64_t middle = least + (high - least) / 2, room = 0;
      for (int r = first + lane; r < first + d; r += kWarp) {
        int64_t below = middle - a.rankBefore[r];
        room += below > 0 ? max(below - p.replicaRows, int64_t(0)) : below;
      }
      if (warpSum(room) >= 0) {
        high = middle;
      } else {
        least = middle + 1;
      }
    }
  }
  if (lane == 0 && warp < nWarps) shared.sums[warp][2] = least;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 0; w < nWarps; w++) shared.meanBound = max(shared.meanBound, shared.sums[w][2]);
  __syncthreads();
}

// Takes the replicas' worth out of the loads that a search has left, and of their maximum.
__device__ __noinline__ inline void planCountRows(PlanShared &shared) {
  const kernelPlanner_t &p = shared.p;
  PlanArrays a;
  a.carve(p.nRanks, p.nExperts, p.nSlots);
  if (threadIdx.x < kWarp) {
    uint64_t most = 0;
    for (int r = threadIdx.x; r < p.nRanks; r += kWarp) {
      int64_t rows = a.rankLoad[r] - int64_t(a.slotCount[r]) * p.replicaRows;
      a.rankLoad[r] = rows;
      most = max(most, uint64_t(rows));
    }
    most = warpMax(most);
    if (threadIdx.x == 0) shared.all.most = int64_t(most);
  }
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
                                 const int32_t *loads, PlanCopies copies) {
  if (threadIdx.x == 0) {
    shared.p = p;
    shared.copies = copies;
  }
  planSumLoads(p, a, shared, loads);
  if (p.replicaRows > 0) planRaiseBound(shared);
  if (p.nSlots == 0 || shared.before <= max(shared.tolerated, shared.meanBound)) {
    planNothing(p, a, shared);
    return;
  }
  // Where replicas count rows a plan takes several fills, so it is the slower one anyway.
  bool isPacked = shared.total < kPackedTotal && p.replicaRows == 0;
  if (isPacked && p.nDomainRanks <= kWarp)
    planSearch<PackedFill<1>>(shared);
  else if (isPacked && p.nDomainRanks <= 2 * kWarp)
    planSearch<PackedFill<2>>(shared);
  else if (shared.total <= 0x7fffffff)
    planSearch<WarpFill<uint32_t>>(shared);
  else
    planSearch<WarpFill<uint64_t>>(shared);
  if (p.replicaRows > 0) planCountRows(shared);
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
