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

} // namespace ultraep

#endif
