// Instructions that CUDA C++ has no words for: memory with order and scope, the clock, shared memory by its
// own addresses. All of the kernels' inline PTX is here and in bulk.cuh.
#ifndef ULTRAEP_PTX_CUH_
#define ULTRAEP_PTX_CUH_

#include <cstdint>
#include <cuda_runtime.h>

namespace ultraep {

// ---- flags between ranks ----

__device__ __forceinline__ uint64_t loadAcquireSystem(const uint64_t *at) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
}
__device__ __forceinline__ uint32_t loadAcquireSystem(const uint32_t *at) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
__device__ __forceinline__ void storeReleaseSystem(uint64_t *at, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}
__device__ __forceinline__ void storeReleaseSystem(uint32_t *at, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
// After a fence of the storing thread.
__device__ __forceinline__ void storeRelaxedSystem(uint64_t *at, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}

// Two words of which each arrives whole, in any order.
__device__ __forceinline__ void storePair(char *at, uint64_t first, uint64_t second) {
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(at), "l"(first), "l"(second) : "memory");
}
__device__ __forceinline__ void loadPair(const char *at, uint64_t &first, uint64_t &second) {
  asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];"
               : "=l"(first), "=l"(second)
               : "l"(at)
               : "memory");
}

// ---- between blocks of one device ----

__device__ __forceinline__ uint32_t loadAcquireDevice(const uint32_t *at) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
__device__ __forceinline__ uint64_t loadAcquireDevice64(const void *at) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
}
__device__ __forceinline__ void storeReleaseDevice64(void *at, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}
__device__ __forceinline__ void storeRelaxedDevice64(void *at, uint64_t value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}
__device__ __forceinline__ void addReleaseDevice(uint32_t *at, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
__device__ __forceinline__ void addReleaseDevice64(void *at, uint64_t value) {
  asm volatile("red.release.gpu.global.add.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}
// Returns what was there before.
__device__ __forceinline__ uint32_t addAcquireReleaseDevice(uint32_t *at, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(at), "r"(value)
               : "memory");
  return before;
}
__device__ __forceinline__ uint64_t addAcquireReleaseDevice64(void *at, uint64_t value) {
  uint64_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(at), "l"(value)
               : "memory");
  return before;
}
// What this thread does before comes before what it does after, as others on the device see it.
__device__ __forceinline__ void fenceDevice() {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
}
// Looks without order, which the compiler may move; the two words at once, on 16 bytes.
__device__ __forceinline__ uint32_t lookDevice(const uint32_t *at) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at));
  return value;
}
__device__ __forceinline__ uint64_t lookDevice64(const void *at) {
  uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(at));
  return value;
}
__device__ __forceinline__ void lookDevice64(const void *at, uint64_t &first, uint64_t &second) {
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(first), "=l"(second) : "l"(at));
}

// ---- rows ----

// 16 bytes that this SM reads once.
__device__ __forceinline__ uint4 loadRow(const char *at) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at)
               : "memory");
  return v;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// Adds 16 bytes of numbers to memory of any rank, each sum rounded to its type; nobody waits for it.
__device__ __forceinline__ void addFloat32(char *at, const uint4 &v) {
  asm volatile("red.relaxed.sys.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(at),
               "f"(__uint_as_float(v.x)), "f"(__uint_as_float(v.y)), "f"(__uint_as_float(v.z)),
               "f"(__uint_as_float(v.w))
               : "memory");
}
__device__ __forceinline__ void addBfloat16(char *at, const uint4 &v) {
  asm volatile("red.relaxed.sys.global.add.noftz.v4.bf16x2 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
#endif

// ---- shared memory ----

__device__ __forceinline__ uint32_t sharedAddress(const void *at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}
// Between warps of a block.
__device__ __forceinline__ uint32_t loadAcquireBlock(const uint32_t *shared) {
  uint32_t value;
  asm volatile("ld.acquire.cta.shared::cta.u32 %0, [%1];"
               : "=r"(value)
               : "r"(sharedAddress(shared))
               : "memory");
  return value;
}
__device__ __forceinline__ void storeReleaseBlock(uint32_t *shared, uint32_t value) {
  asm volatile("st.release.cta.shared::cta.u32 [%0], %1;" ::"r"(sharedAddress(shared)), "r"(value)
               : "memory");
}
// The value, of which the compiler does not know how it came about: it cannot take it apart again.
__device__ __forceinline__ uint32_t opaque(uint32_t value) {
  asm("" : "+r"(value));
  return value;
}
// By addresses within shared memory. Stores that are made or not, without a branch.
__device__ __forceinline__ uint32_t loadShared(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ void storeIf(bool condition, uint32_t address, uint32_t value) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.u32 p, %0, 0;\n @p st.shared.u32 [%1], %2;\n}" ::"r"(uint32_t(condition)),
      "r"(address), "r"(value)
      : "memory");
}
__device__ __forceinline__ void storeIf(bool condition, uint32_t address, uint32_t low, uint32_t high) {
  asm volatile("{\n .reg .pred p;\n setp.ne.u32 p, %0, 0;\n @p st.shared.v2.u32 [%1], {%2, %3};\n}" ::"r"(
                   uint32_t(condition)),
               "r"(address), "r"(low), "r"(high)
               : "memory");
}

// ---- kernels of one stream (sm_90 and later) ----

// Waits until the kernel before is over, and all that it has written is there: before anything is touched
// that it may use.
__device__ __forceinline__ void awaitKernelBefore() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Blocks of the kernel after may be put on SMs from when all of this one's have called this, or ended.
__device__ __forceinline__ void letKernelAfterBegin() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- the clock ----

__device__ __forceinline__ uint64_t nowNs() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

} // namespace ultraep

#endif
