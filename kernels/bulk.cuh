// Bulk copies of sm_90 and later: global -> shared, completing on an mbarrier, and shared -> global in groups
// of the issuing thread.
#ifndef ULTRAEP_BULK_CUH_
#define ULTRAEP_BULK_CUH_

#include "ptx.cuh"

namespace ultraep {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ __forceinline__ void barrierInit(uint64_t *barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(sharedAddress(barrier)) : "memory");
}
// After inits, before the barriers are used by bulk copies.
__device__ __forceinline__ void barrierInitFence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Starts a copy of `bytes` (a multiple of 16) and tells the barrier to expect them. By one thread.
__device__ __forceinline__ void bulkLoad(void *shared, const void *global, uint32_t bytes,
                                         uint64_t *barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(sharedAddress(barrier)),
               "r"(bytes)
               : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          sharedAddress(shared)),
      "l"(global), "r"(bytes), "r"(sharedAddress(barrier))
      : "memory");
}

// Waits for a phase of the barrier: local memory answers, no other rank is involved.
__device__ __forceinline__ void barrierWait(uint64_t *barrier, uint32_t phase) {
  uint32_t done;
  do {
    asm volatile(
        "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(sharedAddress(barrier)), "r"(phase)
        : "memory");
  } while (!done);
}

// Whether a phase of the barrier is over, without waiting.
__device__ __forceinline__ bool barrierTest(uint64_t *barrier, uint32_t phase) {
  uint32_t done;
  asm volatile(
      "{\n .reg .pred p;\n mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(sharedAddress(barrier)), "r"(phase)
      : "memory");
  return done;
}

// Ends the barrier's phase, where no copy does.
__device__ __forceinline__ void barrierArrive(uint64_t *barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(sharedAddress(barrier))
               : "memory");
}
// Whether a phase of the barrier is over; sleeps until it is, but not for ever.
__device__ __forceinline__ bool barrierSleep(uint64_t *barrier, uint32_t phase, uint32_t ns) {
  uint32_t done;
  asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2, %3;\n"
               " selp.u32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(sharedAddress(barrier)), "r"(phase), "r"(ns)
               : "memory");
  return done;
}

__device__ __forceinline__ void bulkStore(void *global, const void *shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(sharedAddress(shared)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulkCommit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// This thread's stores, but for the newest N groups, have read their source.
template <int N> __device__ __forceinline__ void bulkWaitRead() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
// This thread's stores, but for the newest N groups, have been written, and what follows by ordinary accesses
// comes after them.
template <int N = 0> __device__ __forceinline__ void bulkWaitWritten() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
  asm volatile("fence.proxy.async.global;" ::: "memory");
}
// What this thread wrote to shared memory by ordinary accesses comes before bulk copies that follow.
__device__ __forceinline__ void bulkFenceShared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// What this thread read or acquired by ordinary accesses comes before bulk copies that follow.
__device__ __forceinline__ void bulkFence() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

#endif

} // namespace ultraep

#endif
