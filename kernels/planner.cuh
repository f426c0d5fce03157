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

// All shared memory of a kernel that plans; the arrays lie in it at offsets, so that the compiler knows what
// they are.
extern __shared__ __align__(16) char planMemory[];

template <typename T> struct SharedArray {
  uint32_t at; // bytes from planMemory
  __device__ __forceinline__ operator T *() const { return reinterpret_cast<T *>(planMemory + at); }
};

// Working arrays of one plan.
struct PlanArrays {
  SharedArray<int64_t> expertLoad; // [E]
  SharedArray<int64_t> rem;        // [E] what masters keep during a fill; afterwards their quotas
  SharedArray<int64_t> rankBefore; // [R]
  SharedArray<int64_t> rankLoad;   // [R]
  SharedArray<int64_t> largest;    // [R] largest rem of a heavy rank
  SharedArray<int64_t> slotQuota;  // [R*S]
  SharedArray<int32_t> slotExpert; // [R*S]
  SharedArray<int32_t> slotCount;  // [R]
  SharedArray<int32_t> kind;       // [R] Kind, during a fill
  SharedArray<int32_t> scratch;    // [E + R] for the cost gate

  __host__ __device__ static size_t bytes(int64_t nRanks, int64_t nExperts, int64_t nSlots) {
    return size_t(8 * (2 * nExperts + 3 * nRanks + nRanks * nSlots) +
                  4 * (nRanks * nSlots + 3 * nRanks + nExperts)) +
           16;
  }
  __device__ void carve(uint32_t nRanks, uint32_t nExperts, uint32_t nSlots) {
    expertLoad.at = 0;
    rem.at = expertLoad.at + 8 * nExperts;
    rankBefore.at = rem.at + 8 * nExperts;
    rankLoad.at = rankBefore.at + 8 * nRanks;
    largest.at = rankLoad.at + 8 * nRanks;
    slotQuota.at = largest.at + 8 * nRanks;
    slotExpert.at = slotQuota.at + 8 * nRanks * nSlots;
    slotCount.at = slotExpert.at + 4 * nRanks * nSlots;
    kind.at = slotCount.at + 4 * nRanks;
    scratch.at = kind.at + 4 * nRanks;
  }
};

// What a fill needs of the config.
struct FillShape {
  int nSlots, perRank, nDomainRanks;
};

enum Kind : int32_t { kSettled = 0, kLight = 1, kHeavy = 2 };

struct Outcome {
  int64_t most, target;
  int32_t nReplicas;
};

// One warp's fill of one domain. Key is wide enough for the problem's total.
template <typename Key> struct WarpFill {
  const FillShape p;
  const PlanArrays a;
  int first, end, lane, perRank,
      span; // span: ranks a lane looks at, consecutive, so lower lanes have lower ranks

  __device__ WarpFill(FillShape shape, PlanArrays arrays, int firstRank)
      : p(shape), a(arrays), first(firstRank), end(firstRank + shape.nDomainRanks), lane(threadIdx.x % kWarp),
        perRank(shape.perRank), span((shape.nDomainRanks + kWarp - 1) / kWarp) {}

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
};

// The same fill with the ranks' loads in registers, kSpan consecutive ranks a lane, where loads fit 31 bits
// and the domain has at most kSpan * 32 ranks. The heaviest rank mostly has an expert that covers; only where
// it has none are the others looked at, by the general fill's rules.
template <int kSpan> struct RegisterFill {
  const FillShape p;
  const PlanArrays a;
  int first, end, lane, perRank;
  uint32_t light[kSpan]; // ~load of a light rank, else 0
  uint32_t heavy[kSpan]; // load of a heavy rank, else 0

  __device__ RegisterFill(FillShape shape, PlanArrays arrays, int firstRank)
      : p(shape), a(arrays), first(firstRank), end(firstRank + shape.nDomainRanks), lane(threadIdx.x % kWarp),
        perRank(shape.perRank) {}

  __device__ int rankOf(int i) const { return first + lane * kSpan + i; }

  // The rank with the largest key, the lowest of equals; -1 where all keys are 0.
  __device__ int pick(const uint32_t (&key)[kSpan], uint32_t *best) const {
    uint32_t mine = key[0];
    int at = 0;
#pragma unroll
    for (int i = 1; i < kSpan; i++) {
      if (key[i] > mine) {
        mine = key[i];
        at = i;
      }
    }
    *best = warpMax(mine);
    if (*best == 0) return -1;
    int from = warpFirst(mine == *best);
    return first + from * kSpan + __shfl_sync(kFullWarp, at, from);
  }

  // The donor's smallest expert that covers want, the lowest of equals; -1 if none does.
  __device__ int pickCovering(int donor, uint32_t want, uint32_t *rem) const {
    uint32_t cover = 0xffffffffu;
    int at = -1, perLane = perRank <= kWarp ? 1 : (perRank + kWarp - 1) / kWarp;
#pragma unroll 1
    for (int i = 0; i < perLane; i++) {
      int e = lane * perLane + i;
      uint32_t left = e < perRank ? uint32_t(a.rem[donor * perRank + e]) : 0;
      if (left >= want && left < cover) {
        cover = left;
        at = e;
      }
    }
    *rem = warpMin(cover);
    if (*rem == 0xffffffffu) return -1;
    return donor * perRank + __shfl_sync(kFullWarp, at, warpFirst(cover == *rem));
  }

  __device__ uint32_t largestOf(int rank) const {
    uint32_t most = 0;
#pragma unroll 4
    for (int i = 0; i < perRank; i++) most = max(most, uint32_t(a.rem[rank * perRank + i]));
    return most;
  }

  // No expert of the heaviest rank covers: the heaviest that has one, else the rank with the largest expert
  // (the heavier of equals) and that expert.
  __device__ int pickElsewhere(uint32_t want, int *expert, uint32_t *rem) const {
    uint32_t largest[kSpan], key[kSpan], best;
#pragma unroll
    for (int i = 0; i < kSpan; i++) {
      largest[i] = heavy[i] ? largestOf(rankOf(i)) : 0;
      key[i] = largest[i] >= want ? heavy[i] : 0;
    }
    int donor = pick(key, &best);
    if (donor >= 0) {
      *expert = pickCovering(donor, want, rem);
      return donor;
    }
    pick(largest, rem);
#pragma unroll
    for (int i = 0; i < kSpan; i++) key[i] = largest[i] == *rem ? heavy[i] : 0;
    donor = pick(key, &best);
    uint32_t found; // the lowest of its largest experts: the smallest that covers its own size
    *expert = pickCovering(donor, *rem, &found);
    return donor;
  }

  __device__ void fillReceiver(int receiver, uint32_t target, uint32_t load) {
    int used = 0;
    while (load < target && used < p.nSlots) {
      uint32_t want = target - load, best, rem;
      int donor = pick(heavy, &best), expert;
      if (donor < 0) break;
      expert = pickCovering(donor, want, &rem);
      if (expert < 0) donor = pickElsewhere(want, &expert, &rem);
      uint32_t amount = min(want, rem);
      load += amount;
      __syncwarp(); // all lanes have read rem before it changes
      if (lane == 0) {
        a.slotExpert[receiver * p.nSlots + used] = expert;
        a.slotQuota[receiver * p.nSlots + used] = amount;
        a.rem[expert] = rem - amount;
      }
      used++;
#pragma unroll
      for (int i = 0; i < kSpan; i++) {
        if (rankOf(i) != donor) continue;
        uint32_t left = heavy[i] - amount;
        heavy[i] = left > target ? left : 0;
        if (left < target) light[i] = ~left;
        a.rankLoad[donor] = left;
      }
      __syncwarp();
    }
    if (lane == 0) {
      a.rankLoad[receiver] = load;
      a.slotCount[receiver] = used;
    }
  }

  // Fills the lightest rank; false when no rank is light or none is heavy. Both are picked at once; mostly
  // the heaviest rank has one expert that covers the whole deficit, and everything else goes the general way.
  __device__ bool step(uint32_t target) {
    uint32_t lightest = light[0], heaviest = heavy[0];
    int lightAt = 0, heavyAt = 0;
#pragma unroll
    for (int i = 1; i < kSpan; i++) {
      if (light[i] > lightest) lightAt = i;
      if (heavy[i] > heaviest) heavyAt = i;
      lightest = max(lightest, light[i]);
      heaviest = max(heaviest, heavy[i]);
    }
    uint32_t bestLight = warpMax(lightest), bestHeavy = warpMax(heaviest);
    if (bestLight == 0 || bestHeavy == 0) return false;
    int lightLane = warpFirst(lightest == bestLight), heavyLane = warpFirst(heaviest == bestHeavy);
    lightAt = __shfl_sync(kFullWarp, lightAt, lightLane);
    heavyAt = __shfl_sync(kFullWarp, heavyAt, heavyLane);
    int receiver = first + lightLane * kSpan + lightAt, donor = first + heavyLane * kSpan + heavyAt;
    uint32_t want = target - ~bestLight;
#pragma unroll
    for (int i = 0; i < kSpan; i++)
      if (lane == lightLane && i == lightAt) light[i] = 0;
    uint32_t rem = lane < perRank ? uint32_t(a.rem[donor * perRank + lane]) : 0;
    uint32_t cover = rem >= want ? rem : 0xffffffffu, least = warpMin(cover);
    if (perRank > kWarp || least == 0xffffffffu) {
      fillReceiver(receiver, target, ~bestLight);
      return true;
    }
    int owner = warpFirst(cover == least);
    uint32_t left = bestHeavy - want;
    if (lane == owner) {
      a.rem[donor * perRank + lane] = rem - want;
      a.slotExpert[receiver * p.nSlots] = donor * perRank + lane;
      a.slotQuota[receiver * p.nSlots] = want;
      a.slotCount[receiver] = 1;
      a.rankLoad[receiver] = target;
      a.rankLoad[donor] = left;
    }
#pragma unroll
    for (int i = 0; i < kSpan; i++) {
      if (lane != heavyLane || i != heavyAt) continue;
      heavy[i] = left > target ? left : 0;
      if (left < target) light[i] = ~left;
    }
    __syncwarp();
    return true;
  }

  __device__ Outcome run(int64_t target64) {
    uint32_t target = uint32_t(min(target64, int64_t(0x7fffffff)));
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kSpan; i++) {
      int r = rankOf(i);
      uint32_t load = r < end ? uint32_t(a.rankBefore[r]) : target;
      light[i] = load < target ? ~load : 0;
      heavy[i] = load > target ? load : 0;
      if (r >= end) continue;
      a.rankLoad[r] = load;
      a.slotCount[r] = 0;
    }
    for (int e = first * perRank + lane; e < end * perRank; e += kWarp) a.rem[e] = a.expertLoad[e];
    __syncwarp();
    while (p.nSlots > 0 && step(target)) {
    }
    __syncwarp();
    uint32_t most = 0, nReplicas = 0;
    for (int r = first + lane; r < end; r += kWarp) {
      most = max(most, uint32_t(a.rankLoad[r]));
      nReplicas += a.slotCount[r];
    }
    return {int64_t(warpMax(most)), target64, int32_t(__reduce_add_sync(kFullWarp, nReplicas))};
  }
};

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

__device__ __forceinline__ int64_t warpSum(int64_t value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
  return value;
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
