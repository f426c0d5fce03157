// In place of kernels/ptx.cuh, bulk.cuh and kernel_address.cuh, whose guards it sets.
#ifndef ULTRAEP_TESTS_EMULATED_DEVICE_PTX_CUH_
#define ULTRAEP_TESTS_EMULATED_DEVICE_PTX_CUH_

#define ULTRAEP_PTX_CUH_
#define ULTRAEP_BULK_CUH_
#define ULTRAEP_KERNEL_ADDRESS_CUH_

#include "device.h"

namespace ultraep {

// ---- memory with order ----

template <typename T> T emulatedLoad(const T *at) {
  emulated::poll();
  return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}

inline uint64_t loadAcquireSystem(const uint64_t *at) {
  return emulatedLoad(at);
}
inline uint32_t loadAcquireSystem(const uint32_t *at) {
  return emulatedLoad(at);
}
inline void storeReleaseSystem(uint64_t *at, uint64_t value) {
  __atomic_store_n(at, value, __ATOMIC_RELEASE);
}
inline void storeReleaseSystem(uint32_t *at, uint32_t value) {
  __atomic_store_n(at, value, __ATOMIC_RELEASE);
}
inline void storeRelaxedSystem(uint64_t *at, uint64_t value) {
  __atomic_store_n(at, value, __ATOMIC_RELAXED);
}
inline void awaitKernelBefore() {}
inline void letKernelAfterBegin() {}
inline void storePair(char *at, uint64_t first, uint64_t second) {
  auto *words = reinterpret_cast<uint64_t *>(at);
  __atomic_store_n(&words[1], second, __ATOMIC_RELAXED); // the order is nobody's business
  __atomic_store_n(&words[0], first, __ATOMIC_RELAXED);
}
inline void loadPair(const char *at, uint64_t &first, uint64_t &second) {
  auto *words = reinterpret_cast<const uint64_t *>(at);
  first = __atomic_load_n(&words[0], __ATOMIC_RELAXED);
  second = __atomic_load_n(&words[1], __ATOMIC_RELAXED);
}
inline uint32_t loadAcquireDevice(const uint32_t *at) {
  return emulatedLoad(at);
}
inline uint64_t loadAcquireDevice64(const void *at) {
  return emulatedLoad(static_cast<const uint64_t *>(at));
}
inline void storeReleaseDevice64(void *at, uint64_t value) {
  __atomic_store_n(static_cast<uint64_t *>(at), value, __ATOMIC_RELEASE);
}
inline void storeRelaxedDevice64(void *at, uint64_t value) {
  __atomic_store_n(static_cast<uint64_t *>(at), value, __ATOMIC_RELAXED);
}
inline void addReleaseDevice(uint32_t *at, uint32_t value) {
  (void)__atomic_fetch_add(at, value, __ATOMIC_RELEASE);
}
inline void addReleaseDevice64(void *at, uint64_t value) {
  (void)__atomic_fetch_add(static_cast<uint64_t *>(at), value, __ATOMIC_RELEASE);
}
inline uint32_t addAcquireReleaseDevice(uint32_t *at, uint32_t value) {
  return __atomic_fetch_add(at, value, __ATOMIC_ACQ_REL);
}
inline uint64_t addAcquireReleaseDevice64(void *at, uint64_t value) {
  return __atomic_fetch_add(static_cast<uint64_t *>(at), value, __ATOMIC_ACQ_REL);
}
inline void fenceDevice() {
  __atomic_thread_fence(__ATOMIC_ACQ_REL);
}
inline uint32_t lookDevice(const uint32_t *at) {
  return __atomic_load_n(at, __ATOMIC_RELAXED);
}
inline uint64_t lookDevice64(const void *at) {
  return __atomic_load_n(static_cast<const uint64_t *>(at), __ATOMIC_RELAXED);
}
template <typename T> void lookDevice64(const void *at, T &first, T &second) {
  auto *words = static_cast<const uint64_t *>(at);
  first = __atomic_load_n(&words[0], __ATOMIC_RELAXED);
  second = __atomic_load_n(&words[1], __ATOMIC_RELAXED);
}

// ---- rows ----

template <typename T> T *emulatedAligned(T *at) {
  if (reinterpret_cast<uintptr_t>(at) % 16 != 0) emulated::fail("16 bytes at an odd address");
  return at;
}
inline uint4 loadRow(const char *at) {
  return *reinterpret_cast<const uint4 *>(emulatedAligned(at));
}
// Each number by itself, in any order with others' sums.
template <typename Word, typename Add> void emulatedAdd(char *at, const uint4 &v, Add add) {
  auto *words = reinterpret_cast<Word *>(emulatedAligned(at));
  auto *values = reinterpret_cast<const Word *>(&v);
  for (unsigned i = 0; i < sizeof(v) / sizeof(Word); i++) {
    Word before = __atomic_load_n(&words[i], __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(&words[i], &before, add(before, values[i]), false, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED)) {
    }
  }
}
inline void addFloat32(char *at, const uint4 &v) {
  emulatedAdd<uint32_t>(
      at, v, [](uint32_t a, uint32_t b) { return __float_as_uint(__uint_as_float(a) + __uint_as_float(b)); });
}
inline void addBfloat16(char *at, const uint4 &v) {
  emulatedAdd<uint16_t>(at, v, [](uint16_t a, uint16_t b) {
    float sum = __uint_as_float(uint32_t(a) << 16) + __uint_as_float(uint32_t(b) << 16);
    return emulated::valueOf<uint16_t>(emulated::bitsOf(__float2bfloat16_rn(sum)));
  });
}

// ---- shared memory ----

inline uint32_t sharedAddress(const void *at) {
  return uint32_t(__cvta_generic_to_shared(at));
}
inline uint32_t loadAcquireBlock(const uint32_t *shared) {
  return emulatedLoad(shared);
}
inline void storeReleaseBlock(uint32_t *shared, uint32_t value) {
  __atomic_store_n(shared, value, __ATOMIC_RELEASE);
}
inline uint32_t *emulatedShared(uint32_t address) {
  return reinterpret_cast<uint32_t *>(planMemory + address);
}
inline uint32_t loadShared(uint32_t address) {
  return *emulatedShared(address);
}
inline uint32_t opaque(uint32_t value) {
  return value;
}
inline void storeIf(bool condition, uint32_t address, uint32_t value) {
  if (condition) *emulatedShared(address) = value;
}
inline void storeIf(bool condition, uint32_t address, uint32_t low, uint32_t high) {
  if (!condition) return;
  emulatedShared(address)[0] = low;
  emulatedShared(address)[1] = high;
}

inline uint64_t nowNs() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return uint64_t(now.tv_sec) * 1000000000 + uint64_t(now.tv_nsec);
}

// ---- bulk copies ----

inline void barrierInit(uint64_t *barrier) {
  emulated::bulkBarrierInit(barrier);
}
inline void barrierInitFence() {}
inline void bulkLoad(void *shared, const void *global, uint32_t bytes, uint64_t *barrier) {
  emulated::bulkLoad(shared, global, bytes, barrier);
}
inline bool barrierTest(uint64_t *barrier, uint32_t phase) {
  emulated::poll();
  return emulated::bulkBarrierIsOver(barrier, phase);
}
inline bool barrierSleep(uint64_t *barrier, uint32_t phase, uint32_t) {
  return barrierTest(barrier, phase);
}
inline void barrierArrive(uint64_t *barrier) {
  emulated::bulkBarrierArrive(barrier);
}
inline void barrierWait(uint64_t *barrier, uint32_t phase) {
  while (!barrierTest(barrier, phase)) {
  }
}
inline void bulkStore(void *global, const void *shared, uint32_t bytes) {
  emulated::bulkStore(global, shared, bytes);
}
inline void bulkCommit() {
  emulated::bulkCommit();
}
template <int N> void bulkWaitRead() {
  emulated::bulkWait(N, false);
}
template <int N = 0> void bulkWaitWritten() {
  emulated::bulkWait(N, true);
}
inline void bulkFenceShared() {}
inline void bulkFence() {}

// ---- launches ----

template <typename... Parameters, size_t... I>
void emulatedCall(void (*kernel)(Parameters...), void *const *arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_reference_t<Parameters> *>(arguments[I])...);
}
template <typename... Parameters> void emulatedRun(const void *address, void *const *arguments) {
  auto kernel = reinterpret_cast<void (*)(Parameters...)>(const_cast<void *>(address));
  emulatedCall(kernel, arguments, std::index_sequence_for<Parameters...>{});
}

// Whoever names a kernel to the runtime makes it known here.
template <typename... Parameters> const void *kernelAddress(void (*kernel)(Parameters...)) {
  auto *address = reinterpret_cast<const void *>(kernel);
  const emulatedKernel_t known = {address,
                                  int(sizeof...(Parameters)),
                                  {sizeof(Parameters)...},
                                  {alignof(Parameters)...},
                                  emulatedRun<Parameters...>};
  emulated_kernel_add(&known);
  return address;
}

} // namespace ultraep

#endif
