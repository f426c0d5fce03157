// Alias fill of one domain by one warp, as in balancer/fill.c: every choice is made by the same keys and
// tie-breaks, so fills equal the host's to the bit. WarpFill is for any size, PackedFill for the common
// one.
#ifndef ULTRAEP_PLANNER_FILL_CUH_
#define ULTRAEP_PLANNER_FILL_CUH_

#include "kernels.h"
#include "ptx.cuh"
#include "warp.cuh"

#include <algorithm>

namespace ultraep {

// All shared memory of a kernel that plans; the arrays lie in it at offsets, so that the compiler knows what
// they are. Where a kernel moves rows, too, these are its buffers: bulk copies of memory at an odd multiple
// of 16 take a third longer.
extern __shared__ __align__(128) char planMemory[];

template <typename T> struct SharedArray {
  uint32_t at; // bytes from planMemory
  __device__ __forceinline__ operator T *() const { return reinterpret_cast<T *>(planMemory + at); }
};

// Working arrays of one plan. Those that a fill writes lie together: a search that tries several fills at
// once has copies of them behind everything else.
struct PlanArrays {
  SharedArray<int64_t> expertLoad; // [E]
  SharedArray<int64_t> rankBefore; // [R]
  SharedArray<int64_t> rem;        // [E] what masters keep during a fill; afterwards their quotas
  SharedArray<int64_t> rankLoad;   // [R] during a search with replicaRows for every replica
  SharedArray<int64_t> largest;    // [R] largest rem of a heavy rank
  SharedArray<int64_t> slotQuota;  // [R*S]
  SharedArray<int32_t> slotExpert; // [R*S]
  SharedArray<int32_t> slotCount;  // [R]
  SharedArray<int32_t> kind;       // [R] Kind, during a fill

  // What a fill writes, a multiple of 16.
  __host__ __device__ static size_t fillBytes(int64_t nRanks, int64_t nExperts, int64_t nSlots) {
    return (size_t(8 * (nExperts + 2 * nRanks + nRanks * nSlots) + 4 * (nRanks * nSlots + 2 * nRanks)) + 15) /
           16 * 16;
  }
  __host__ __device__ static size_t inputBytes(int64_t nRanks, int64_t nExperts) {
    return (size_t(8 * (nExperts + nRanks)) + 15) / 16 * 16;
  }
  // A multiple of 16, too.
  __host__ __device__ static size_t bytes(int64_t nRanks, int64_t nExperts, int64_t nSlots) {
    return inputBytes(nRanks, nExperts) + fillBytes(nRanks, nExperts, nSlots);
  }
  // Lets a fill write so many bytes further on.
  __device__ void moveFill(uint32_t bytes) {
    rem.at += bytes;
    rankLoad.at += bytes;
    largest.at += bytes;
    slotQuota.at += bytes;
    slotExpert.at += bytes;
    slotCount.at += bytes;
    kind.at += bytes;
  }
  __device__ void carve(uint32_t nRanks, uint32_t nExperts, uint32_t nSlots) {
    expertLoad.at = 0;
    rankBefore.at = expertLoad.at + 8 * nExperts;
    rem.at = uint32_t(inputBytes(nRanks, nExperts));
    rankLoad.at = rem.at + 8 * nExperts;
    largest.at = rankLoad.at + 8 * nRanks;
    slotQuota.at = largest.at + 8 * nRanks;
    slotExpert.at = slotQuota.at + 8 * nRanks * nSlots;
    slotCount.at = slotExpert.at + 4 * nRanks * nSlots;
    kind.at = slotCount.at + 4 * nRanks;
  }
};

// Copies of what a fill writes, for fills that are tried at once, behind all else in shared memory.
struct PlanCopies {
  int n = 0;
  uint32_t offset = 0; // of the first from the plan's own arrays
  uint32_t bytes = 0;  // of each

  PlanCopies() = default;
  // Behind `used` bytes as many as the limit has room for, of at most the warps but one.
  __host__ PlanCopies(const kernelPlanner_t &p, size_t used, size_t limit, size_t nWarps) {
    size_t each = PlanArrays::fillBytes(p.nRanks, p.nExperts, p.nSlots), at = (used + 15) / 16 * 16;
    if (p.nSlots == 0 || p.nDomainRanks == 1 || at > limit) return;
    n = int(std::min((limit - at) / each, nWarps - 1));
    offset = uint32_t(at - PlanArrays::inputBytes(p.nRanks, p.nExperts));
    bytes = uint32_t(each);
  }
  // What the fill of a warp writes: the plan's own arrays, a's, or a copy.
  __device__ PlanArrays arraysOf(int warp, PlanArrays a) const {
    if (warp > 0) a.moveFill(offset + uint32_t(warp - 1) * bytes);
    return a;
  }
  // Shared memory with them.
  __host__ size_t end(size_t used) const { return n == 0 ? used : (used + 15) / 16 * 16 + size_t(n) * bytes; }
};

// Addresses within shared memory.
__device__ __forceinline__ uint32_t planAddress(uint32_t at) {
  return sharedAddress(planMemory) + at;
}

// What a fill needs of the config.
struct FillShape {
  int nSlots, perRank, nDomainRanks, replicaRows;

  __device__ explicit FillShape(const kernelPlanner_t &p)
      : nSlots(p.nSlots), perRank(p.perRank), nDomainRanks(p.nDomainRanks), replicaRows(p.replicaRows) {}

  // The load below which a rank is light: one more replica leaves room for rows below the target.
  __device__ int64_t lightBelow(int64_t target) const { return max(target - replicaRows, int64_t(0)); }
};

enum Kind : int32_t { kSettled = 0, kLight = 1, kHeavy = 2 };

struct Outcome {
  int64_t most, target;
  int32_t nReplicas;
};

// What the fill of the domain of ranks first..end-1 has come to, by what it has left. Key is wide enough for
// the problem's total. By a warp.
template <typename Key>
__device__ __forceinline__ Outcome outcomeOf(const PlanArrays &a, int first, int end, int64_t target) {
  Key most = 0;
  int nReplicas = 0;
  for (int r = first + int(threadIdx.x) % kWarp; r < end; r += kWarp) {
    most = max(most, Key(a.rankLoad[r]));
    nReplicas += a.slotCount[r];
  }
  return {int64_t(warpMax(most)), target, int32_t(__reduce_add_sync(kFullWarp, nReplicas))};
}

// One warp's fill of one domain.
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

  // Fills one receiver until another replica would bring it to the target by itself, or its slots are used;
  // nHeavy counts the ranks above the target, and ranks below lightBelow are light.
  __device__ void fillReceiver(int receiver, Key target, Key lightBelow, int *nHeavy) const {
    Key load = Key(a.rankLoad[receiver]);
    int used = 0; // a receiver is filled once, so its slots are empty
    while (*nHeavy > 0 && load < lightBelow && used < p.nSlots) {
      Key want = lightBelow - load;
      int donor = pickDonor(want), expert = pickExpert(donor, want);
      Key rem = Key(a.rem[expert]), amount = min(want, rem), donorLoad = Key(a.rankLoad[donor]) - amount;
      load += amount + Key(p.replicaRows);
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
        if (donorLoad <= target) a.kind[donor] = donorLoad < lightBelow ? kLight : kSettled;
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
    int nHeavy = 0;
    int64_t lightBelow = p.lightBelow(target);
    __syncwarp();
    for (int r = first + lane; r < end; r += kWarp) {
      int64_t load = a.rankBefore[r];
      a.rankLoad[r] = load;
      a.slotCount[r] = 0;
      a.kind[r] = load > target ? kHeavy : load < lightBelow ? kLight : kSettled;
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
        fillReceiver(receiver, Key(target), Key(lightBelow), &nHeavy);
      }
    }
    return outcomeOf<Key>(a, first, end, target);
  }
};

// The same fill for domains of at most 32 * kSpan <= 64 ranks and totals below kPackedTotal: the ranks' loads
// live in registers, kSpan consecutive ranks a lane, each packed with its rank into one key, so that one
// reduction gives the best load and whose it is. What bounds a fill is one warp's instructions in a row, so
// the common step has as few as can be: keys are updated as keys, and a slot is one word, its quota in the
// low half and its expert in the high half, until the end.
constexpr int64_t kPackedTotal = (1 << 26) - 1;

template <int kSpan> struct PackedFill {
  static constexpr uint32_t kRankBits = 6, kRankMask = (1 << kRankBits) - 1;
  static_assert(kSpan * kWarp <= int(kRankMask) + 1, "a rank of the domain fits its bits");

  const FillShape p;
  const PlanArrays a;
  int first, lane;
  uint32_t target;
  uint32_t light[kSpan], heavy[kSpan]; // keys: the deficit of light ranks, the load of heavy ranks, else 0
  uint32_t settled[kSpan];             // load of a rank that is neither: the target, unless slots ran out

  __device__ PackedFill(FillShape shape, PlanArrays arrays, int firstRank)
      : p(shape), a(arrays), first(firstRank), lane(threadIdx.x % kWarp), target(0) {}

  // The larger value wins, then the lower rank. No two ranks have the same key.
  static __device__ uint32_t keyOf(uint32_t value, int rank) {
    return value << kRankBits | (kRankMask - uint32_t(rank));
  }
  static __device__ uint32_t valueOf(uint32_t key) { return key >> kRankBits; }
  static __device__ int rankOf(uint32_t key) { return int(kRankMask - (key & kRankMask)); }

  __device__ uint32_t best(const uint32_t (&key)[kSpan]) const {
    uint32_t most = key[0];
#pragma unroll
    for (int i = 1; i < kSpan; i++) most = max(most, key[i]);
    return warpMax(most);
  }

  // The donor, known by its key, gives `amount`, a value in a key's place.
  __device__ void give(uint32_t donor, uint32_t amount) {
    uint32_t left = donor - amount, level = target << kRankBits, rank = left & kRankMask;
    uint32_t newHeavy = left > (level | kRankMask) ? left : 0;
    uint32_t newLight = left < level ? level - left + 2 * rank : 0;
#pragma unroll
    for (int i = 0; i < kSpan; i++) {
      if (heavy[i] != donor) continue;
      heavy[i] = newHeavy;
      light[i] = newLight;
    }
  }
  // A receiver, known by its key, is not light any more: filled to the target, unless settle says otherwise.
  __device__ void unlight(uint32_t receiver) {
#pragma unroll
    for (int i = 0; i < kSpan; i++)
      if (light[i] == receiver) light[i] = 0;
  }
  __device__ void settle(uint32_t receiver, uint32_t load) {
#pragma unroll
    for (int i = 0; i < kSpan; i++)
      if (light[i] == receiver) settled[i] = load;
    unlight(receiver);
  }

  // Addresses of rank 0's i-th rem and slot, and those of the rank that a key names: the key holds the rank
  // from above.
  __device__ uint32_t remOf(uint32_t key, int i) const {
    uint32_t top = planAddress(a.rem.at) + 8 * uint32_t((first + int(kRankMask)) * p.perRank + i);
    return top - (key & kRankMask) * uint32_t(8 * p.perRank);
  }
  __device__ uint32_t slotOf(uint32_t key, int i) const {
    uint32_t top = planAddress(a.slotQuota.at) + 8 * uint32_t((first + int(kRankMask)) * p.nSlots + i);
    return top - (key & kRankMask) * uint32_t(8 * p.nSlots);
  }
  __device__ uint32_t expertOf(uint32_t key, int i) const {
    return uint32_t((first + int(kRankMask)) * p.perRank + i) - (key & kRankMask) * uint32_t(p.perRank);
  }

  // The donor's smallest expert that covers want, the lowest of equals, as its place on the rank; -1 if none
  // does.
  __device__ int pickCovering(uint32_t donor, uint32_t want, uint32_t *rem) const {
    uint32_t cover = 0xffffffffu;
    int at = -1, perLane = (p.perRank + kWarp - 1) / kWarp;
#pragma unroll 1
    for (int i = 0; i < perLane; i++) {
      int e = lane * perLane + i;
      uint32_t left = e < p.perRank ? loadShared(remOf(donor, e)) : 0;
      if (left >= want && left < cover) {
        cover = left;
        at = e;
      }
    }
    *rem = warpMin(cover);
    if (*rem == 0xffffffffu) return -1;
    return __shfl_sync(kFullWarp, at, warpFirst(cover == *rem));
  }

  __device__ uint32_t largestOf(uint32_t key) const {
    uint32_t most = 0;
#pragma unroll 4
    for (int i = 0; i < p.perRank; i++) most = max(most, loadShared(remOf(key, i)));
    return most;
  }

  // No expert of the heaviest rank covers: the heaviest that has one, else the rank with the largest expert
  // (the heavier of equals) and that expert.
  __device__ uint32_t pickElsewhere(uint32_t want, int *expert, uint32_t *rem) const {
    uint32_t largest[kSpan], key[kSpan], most = 0;
#pragma unroll
    for (int i = 0; i < kSpan; i++) {
      largest[i] = heavy[i] ? largestOf(heavy[i]) : 0;
      key[i] = largest[i] >= want ? heavy[i] : 0;
      most = max(most, largest[i]);
    }
    uint32_t donor = best(key), found;
    if (donor != 0) {
      *expert = pickCovering(donor, want, rem);
      return donor;
    }
    *rem = warpMax(most);
#pragma unroll
    for (int i = 0; i < kSpan; i++) key[i] = largest[i] == *rem ? heavy[i] : 0;
    donor = best(key);
    // The lowest of its largest experts: the smallest that covers its own size.
    *expert = pickCovering(donor, *rem, &found);
    return donor;
  }

  // Fills one receiver to the target or until its slots are used, by any donors.
  __device__ void fillReceiver(uint32_t receiver) {
    uint32_t want = valueOf(receiver);
    for (int slot = 0; want > 0 && slot < p.nSlots; slot++) {
      uint32_t donor = best(heavy), rem;
      if (donor == 0) break;
      int expert = pickCovering(donor, want, &rem);
      if (expert < 0) donor = pickElsewhere(want, &expert, &rem);
      uint32_t amount = min(want, rem);
      __syncwarp(); // all lanes have read rem before it changes
      storeIf(lane == 0, remOf(donor, expert), rem - amount);
      storeIf(lane == 0, slotOf(receiver, slot), amount, expertOf(donor, expert));
      give(donor, amount << kRankBits);
      want -= amount;
      __syncwarp();
    }
    settle(receiver, target - want);
  }

  // Fills the lightest rank until none is light or none is heavy. Mostly the heaviest rank has one expert
  // that covers the whole deficit. Then neither rank's new key depends on which expert that is: a step takes
  // it to be so, asks who is next, and only then looks whether it is so; if not, the keys are as they were,
  // and the receiver is filled the general way. No barrier is needed in between: rems are read by the lanes
  // that write them, and slots are not read.
  __device__ void fill() {
    // Not more experts than lanes, or none is tried; an address for each key by a single instruction.
    const int nLanes = p.perRank <= kWarp ? p.perRank : 0;
    uint32_t top = remOf(0, lane), step = opaque(uint32_t(-8 * p.perRank));
    for (;;) {
      uint32_t donor = best(heavy), receiver = best(light), at, rem;
      auto lookAtDonor = [&] {
        at = top + (donor & kRankMask) * step;
        rem = donor != 0 && lane < nLanes ? loadShared(at) : 0;
      };
      lookAtDonor();
      while (donor != 0 && receiver != 0) {
        uint32_t want = valueOf(receiver);
        uint32_t oldHeavy[kSpan], oldLight[kSpan];
#pragma unroll
        for (int i = 0; i < kSpan; i++) {
          oldHeavy[i] = heavy[i];
          oldLight[i] = light[i];
        }
        give(donor, receiver & ~kRankMask);
        unlight(receiver); // its load is the target, as settled has it
        uint32_t cover = rem >= want ? rem << 5 | uint32_t(lane) : 0xffffffffu;
        uint32_t nextDonor = best(heavy), nextReceiver = best(light), least = warpMin(cover);
        if (least == 0xffffffffu) {
#pragma unroll
          for (int i = 0; i < kSpan; i++) {
            heavy[i] = oldHeavy[i];
            light[i] = oldLight[i];
          }
          break;
        }
        storeIf(cover == least, at, rem - want);
        storeIf(cover == least, slotOf(receiver, 0), want, expertOf(donor, lane));
        donor = nextDonor;
        receiver = nextReceiver;
        lookAtDonor(); // early: what it has is there when it is needed
      }
      __syncwarp();
      if (donor == 0 || receiver == 0) return;
      fillReceiver(receiver);
    }
  }

  // The slots of a rank as the plan has them; their number.
  __device__ int unpackSlots(int rank) const {
    int used = 0;
#pragma unroll 1
    for (int i = 0; i < p.nSlots; i++) {
      int slot = rank * p.nSlots + i;
      auto word = uint64_t(a.slotQuota[slot]);
      a.slotExpert[slot] = int32_t(word >> 32);
      a.slotQuota[slot] = int64_t(word & 0xffffffffu);
      used += int32_t(word >> 32) >= 0;
    }
    return used;
  }

  __device__ Outcome run(int64_t target64) {
    target = uint32_t(min(target64, kPackedTotal));
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kSpan; i++) {
      int r = lane * kSpan + i;
      light[i] = heavy[i] = 0;
      settled[i] = target;
      if (r >= p.nDomainRanks) continue;
      uint32_t before = uint32_t(a.rankBefore[first + r]);
      if (before > target) heavy[i] = keyOf(before, r);
      if (before < target) light[i] = keyOf(target - before, r);
      for (int slot = 0; slot < p.nSlots; slot++)
        a.slotQuota[(first + r) * p.nSlots + slot] = int64_t(0xffffffff00000000);
    }
#pragma unroll 4
    for (int e = first * p.perRank + lane; e < (first + p.nDomainRanks) * p.perRank; e += kWarp)
      a.rem[e] = a.expertLoad[e];
    __syncwarp();
    if (p.nSlots > 0) fill();
    uint32_t most = 0, nReplicas = 0;
#pragma unroll
    for (int i = 0; i < kSpan; i++) {
      int r = lane * kSpan + i;
      if (r >= p.nDomainRanks) continue;
      uint32_t after = heavy[i] ? valueOf(heavy[i]) : light[i] ? target - valueOf(light[i]) : settled[i];
      int used = unpackSlots(first + r);
      a.rankLoad[first + r] = after;
      a.slotCount[first + r] = used;
      most = max(most, after);
      nReplicas += used;
    }
    __syncwarp();
    return {int64_t(warpMax(most)), target64, int32_t(__reduce_add_sync(kFullWarp, nReplicas))};
  }
};

} // namespace ultraep

#endif
