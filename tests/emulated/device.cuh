// Before every kernel that is compiled for the CPU: CUDA's words, and in place of kernels/ptx.cuh, bulk.cuh
// and kernel_address.cuh the same functions for the emulated device.
//
// What differs from a GPU: memory is as strongly ordered as the CPU's, so a missing fence goes unseen. What
// does not: threads of a warp go on one by one between the points where they meet, blocks in any order, and a
// bulk copy is done as late as its waits allow.
#ifndef ULTRAEP_TESTS_EMULATED_DEVICE_CUH_
#define ULTRAEP_TESTS_EMULATED_DEVICE_CUH_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <initializer_list>
#include <tuple>
#include <type_traits>
#include <utility>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "device.h"

// ---- words ----

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __align__
#define __global__
#define __device__
#define __host__
#define __shared__ thread_local // a block's threads are fibers of one CPU thread
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

#define chainsMemory planMemory
#define combineMemory planMemory
#define dispatchMemory planMemory
#define gradsMemory planMemory
#define linksMemory planMemory
#define p2pMemory planMemory
#define weightsMemory planMemory

#define threadIdx (emulated::place->thread)
#define blockIdx (emulated::place->block)
#define blockDim (emulated::place->nThreads)
#define gridDim (emulated::place->nBlocks)

// ---- CUDA C++'s functions ----

namespace emulated {

template <typename T> uint64_t bitsOf(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "one register or two");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(value));
  return bits;
}
template <typename T> T valueOf(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// The value of lane `from`, or, where no such lane is asked for, this lane's own.
template <typename T> T shuffle(uint32_t mask, T value, int from) {
  uint32_t came;
  const uint64_t *seen = meet(Together::kShuffle, mask, bitsOf(value), &came);
  if (from < 0 || from >= int(kWarp)) return value;
  if (!(came >> from & 1)) fail("a shuffle from a lane that did not come");
  return valueOf<T>(seen[from]);
}

template <typename Pick> uint32_t reduce(uint32_t mask, uint32_t value, Pick pick) {
  uint32_t came;
  const uint64_t *seen = meet(Together::kReduce, mask, value, &came);
  for (unsigned i = 0; i < kWarp; i++)
    if (i != lane() && came >> i & 1) value = pick(value, uint32_t(seen[i]));
  return value;
}

} // namespace emulated

inline void __syncthreads() {
  (void)emulated::barrier(false);
}
inline int __syncthreads_or(int value) {
  return emulated::barrier(value != 0);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  uint32_t came;
  (void)emulated::meet(emulated::Together::kSync, mask, 0, &came);
}
template <typename T> T __shfl_sync(unsigned mask, T value, int from) {
  return emulated::shuffle(mask, value, from % int(emulated::kWarp));
}
template <typename T> T __shfl_xor_sync(unsigned mask, T value, int with) {
  return emulated::shuffle(mask, value, int(emulated::lane()) ^ with);
}
template <typename T> T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  return emulated::shuffle(mask, value, int(emulated::lane() + by));
}
template <typename T> T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  return emulated::shuffle(mask, value, int(emulated::lane()) - int(by));
}
inline unsigned __ballot_sync(unsigned mask, int value) {
  uint32_t came, set = 0;
  const uint64_t *seen = emulated::meet(emulated::Together::kBallot, mask, value != 0, &came);
  for (unsigned i = 0; i < emulated::kWarp; i++) set |= uint32_t(came >> i & 1 && seen[i]) << i;
  return set;
}
inline int __any_sync(unsigned mask, int value) {
  return __ballot_sync(mask, value) != 0;
}
inline int __all_sync(unsigned mask, int value) {
  return __ballot_sync(mask, !value) == 0;
}
template <typename T> unsigned __match_any_sync(unsigned mask, T value) {
  uint32_t came, same = 0;
  const uint64_t *seen = emulated::meet(emulated::Together::kMatch, mask, emulated::bitsOf(value), &came);
  for (unsigned i = 0; i < emulated::kWarp; i++)
    same |= uint32_t(came >> i & 1 && seen[i] == emulated::bitsOf(value)) << i;
  return same;
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return emulated::reduce(mask, value, [](uint32_t a, uint32_t b) { return a < b ? a : b; });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return emulated::reduce(mask, value, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return emulated::reduce(mask, value, [](uint32_t a, uint32_t b) { return a + b; });
}

inline int __popc(unsigned value) {
  return __builtin_popcount(value);
}
inline int __ffs(unsigned value) {
  return __builtin_ffs(int(value));
}
// Of bit `base` on, the offset-th that is set.
inline unsigned __fns(unsigned mask, unsigned base, int offset) {
  for (unsigned i = base; i < 32; i++)
    if (mask >> i & 1 && --offset == 0) return i;
  return 0xffffffffu;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline float __uint_as_float(unsigned bits) {
  return emulated::valueOf<float>(bits);
}
inline unsigned __float_as_uint(float value) {
  return unsigned(emulated::bitsOf(value));
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline void __nanosleep(unsigned) {
  emulated::sleep();
}
inline void __threadfence() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
inline void __threadfence_system() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
template <typename T> T __ldcg(const T *at) {
  T value;
  __asm__ volatile("" ::: "memory"); // another thread may have written it
  memcpy(&value, at, sizeof(value));
  return value;
}
template <typename T> size_t __cvta_generic_to_shared(T *at) {
  return size_t(reinterpret_cast<const volatile char *>(at) - ultraep::planMemory);
}

template <typename T, typename U> T atomicAdd(T *at, U value) {
  return __atomic_fetch_add(at, T(value), __ATOMIC_SEQ_CST);
}
template <typename T, typename U> T atomicSub(T *at, U value) {
  return __atomic_fetch_sub(at, T(value), __ATOMIC_SEQ_CST);
}
template <typename T, typename U> T atomicOr(T *at, U value) {
  return __atomic_fetch_or(at, T(value), __ATOMIC_SEQ_CST);
}
template <typename T, typename U> T atomicMin(T *at, U value) {
  T before = __atomic_load_n(at, __ATOMIC_SEQ_CST);
  while (T(value) < before &&
         !__atomic_compare_exchange_n(at, &before, T(value), false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return before;
}
template <typename T, typename U, typename V> T atomicCAS(T *at, U expected, V value) {
  T before = T(expected);
  (void)__atomic_compare_exchange_n(at, &before, T(value), false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return before;
}

namespace ultraep {
template <typename A, typename B> constexpr std::common_type_t<A, B> min(A a, B b) {
  return std::common_type_t<A, B>(b) < std::common_type_t<A, B>(a) ? b : a;
}
template <typename A, typename B> constexpr std::common_type_t<A, B> max(A a, B b) {
  return std::common_type_t<A, B>(a) < std::common_type_t<A, B>(b) ? b : a;
}
} // namespace ultraep

#include "device_ptx.cuh"

#endif
