/* What ultraep_moe fills its tensors with, and bfloat16: the same to the bit on the host and on GPUs. */
#ifndef ULTRAEP_PERF_MOE_VALUES_H_
#define ULTRAEP_PERF_MOE_VALUES_H_

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define MOE_BOTH static __host__ __device__ inline
#else
#define MOE_BOTH static inline
#endif

/* Element `index` of tensor `seed`: 24 bits, uniform in [-1, 1). */
MOE_BOTH float moeValue(uint64_t seed, uint64_t index) {
  uint64_t z = seed * 0x9e3779b97f4a7c15u + index * 0xd1b54a32d192ed03u + 0x8cb92ba72f3d8dd7u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return (float)((int32_t)(z >> 40) - (1 << 23)) * (1.0f / (1 << 23));
}

MOE_BOTH float moeFloat(uint16_t bits) {
  uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, sizeof(value));
  return value;
}

/* Rounds to nearest even; not for NaN. */
MOE_BOTH uint16_t moeBfloat(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

#endif
