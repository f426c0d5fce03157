// Alias fill of one domain by one warp, as in balancer/fill.c: every choice is made by the same keys and
// tie-breaks, so fills equal the host's to the bit. WarpFill is for any size, RegisterFill for the common
// one.
#ifndef ULTRAEP_PLANNER_FILL_CUH_
#define ULTRAEP_PLANNER_FILL_CUH_

#include "kernels.h"
#include "warp.cuh"

namespace ultraep {

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

} // namespace ultraep

#endif
