// Selections over a warp. Keys are unsigned; Key is uint32_t where all loads of the problem fit, else
// uint64_t.
#ifndef ULTRAEP_WARP_CUH_
#define ULTRAEP_WARP_CUH_

#include <cstdint>

namespace ultraep {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarp = 32;

__device__ __forceinline__ uint32_t warpMin(uint32_t value) {
  return __reduce_min_sync(kFullWarp, value);
}
__device__ __forceinline__ uint32_t warpMax(uint32_t value) {
  return __reduce_max_sync(kFullWarp, value);
}

// 64 bits as two reductions: the high halves, then the low halves of those that have the best high half.
__device__ __forceinline__ uint64_t warpMin(uint64_t value) {
  uint32_t high = __reduce_min_sync(kFullWarp, uint32_t(value >> 32));
  uint32_t low = __reduce_min_sync(kFullWarp, uint32_t(value >> 32) == high ? uint32_t(value) : 0xffffffffu);
  return uint64_t(high) << 32 | low;
}
__device__ __forceinline__ uint64_t warpMax(uint64_t value) {
  return ~warpMin(~value);
}

// The sum over all lanes, in every lane.
template <typename T> __device__ __forceinline__ T warpSum(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
  return value;
}

// Adds what the lanes counted to a counter in device memory. By a whole warp.
__device__ __forceinline__ void warpCount(unsigned long long *counter, unsigned long long mine) {
  mine = warpSum(mine);
  if (threadIdx.x % kWarp == 0 && mine) atomicAdd(counter, mine);
}

// The lowest lane where the condition holds, -1 if none does.
__device__ __forceinline__ int warpFirst(bool condition) {
  return __ffs(__ballot_sync(kFullWarp, condition)) - 1;
}

// Looks along the slots of all ranks for one expert's replicas: calls visit(first, here, before) for 32 slots
// at a time, a bit in `here` for each that has the expert, `before` of which came earlier. Returns how many
// there are. By a whole warp. kUnroll: as of the loop; 1 where code that is seldom run, or often inlined,
// should be small.
template <int kUnroll, typename Visit>
__device__ __forceinline__ int warpReplicas(const int32_t *slotExpert, int nSlots, int expert, Visit visit) {
  int lane = threadIdx.x % kWarp, found = 0;
#pragma unroll kUnroll
  for (int first = 0; first < nSlots; first += kWarp) {
    unsigned here = __ballot_sync(kFullWarp, first + lane < nSlots && slotExpert[first + lane] == expert);
    visit(first, here, found);
    found += __popc(here);
  }
  return found;
}

// The slot of the expert's nth replica, from 0, ascending by rank; each lane asks for its own, and gets -1 if
// there is none. *n: how many there are.
template <int kUnroll>
__device__ __forceinline__ int warpReplica(const int32_t *slotExpert, int nSlots, int expert, int nth,
                                           int *n) {
  int slot = -1;
  *n = warpReplicas<kUnroll>(slotExpert, nSlots, expert, [&](int first, unsigned here, int before) {
    if (nth >= before && nth < before + __popc(here)) slot = first + int(__fns(here, 0, nth - before + 1));
  });
  return slot;
}

} // namespace ultraep

#endif
