// Rows of numbers in 16-byte elements: as floats and back, and how they are read.
#ifndef ULTRAEP_ELEMENTS_CUH_
#define ULTRAEP_ELEMENTS_CUH_

#include "ptx.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace ultraep {

// Elements of 16 bytes as floats, and back with one rounding.
struct AsBfloat16 {
  static constexpr int kElements = 8;
  static __device__ __forceinline__ float get(const uint4 &v, int i) {
    uint32_t word = reinterpret_cast<const uint32_t *>(&v)[i / 2];
    return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
  }
  static __device__ __forceinline__ uint4 put(const float *f) {
    uint4 v;
    for (int i = 0; i < 4; i++) {
      __nv_bfloat162 pair = __floats2bfloat162_rn(f[2 * i], f[2 * i + 1]);
      reinterpret_cast<uint32_t *>(&v)[i] = *reinterpret_cast<uint32_t *>(&pair);
    }
    return v;
  }
};
struct AsFloat16 {
  static constexpr int kElements = 8;
  static __device__ __forceinline__ float get(const uint4 &v, int i) {
    return __half2float(reinterpret_cast<const __half *>(&v)[i]);
  }
  static __device__ __forceinline__ uint4 put(const float *f) {
    uint4 v;
    for (int i = 0; i < 4; i++) {
      __half2 pair = __floats2half2_rn(f[2 * i], f[2 * i + 1]);
      reinterpret_cast<uint32_t *>(&v)[i] = *reinterpret_cast<uint32_t *>(&pair);
    }
    return v;
  }
};
struct AsFloat32 {
  static constexpr int kElements = 4;
  static __device__ __forceinline__ float get(const uint4 &v, int i) {
    return reinterpret_cast<const float *>(&v)[i];
  }
  static __device__ __forceinline__ uint4 put(const float *f) {
    return {__float_as_uint(f[0]), __float_as_uint(f[1]), __float_as_uint(f[2]), __float_as_uint(f[3])};
  }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// Adds 16 bytes of numbers to memory of any rank, each sum rounded to its type; nobody waits for it.
template <typename As> __device__ __forceinline__ void addTo(char *at, const uint4 &v);
template <> __device__ __forceinline__ void addTo<AsFloat32>(char *at, const uint4 &v) {
  addFloat32(at, v);
}
template <> __device__ __forceinline__ void addTo<AsBfloat16>(char *at, const uint4 &v) {
  addBfloat16(at, v);
}
#endif

} // namespace ultraep

#endif
