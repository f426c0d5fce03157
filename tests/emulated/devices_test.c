/* The emulated runtime and driver with several devices: what CUDA permits on streams, events and memory of a
 * device that is not the thread's current one, and whose contexts there are. */
#include "emulated.h"

#include <cuda.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

#define OK(call) assert_int_equal(call, 0)
#define IS(call, error)                                                                                      \
  do {                                                                                                       \
    assert_int_equal(call, error);                                                                           \
    assert_int_equal(cudaGetLastError(), error);                                                             \
  } while (0)
#define BYTES ((size_t)4096)
#define LARGE ((size_t)100000) /* shared memory that a kernel has only where it has asked for it */

/* ---- a kernel without arguments ---- */

static char kernelAddress;
static int nRuns;

static void kernel_run(const void *address, void *const *arguments) {
  (void)address;
  (void)arguments;
  nRuns++;
}

static const emulatedKernel_t kernel = {.address = &kernelAddress, .run = kernel_run};

const emulatedKernel_t *emulated_kernel_find(const void *address) {
  return address == kernel.address ? &kernel : NULL;
}

void emulated_grid_run(const emulatedKernel_t *found, dim3 grid, dim3 block, size_t sharedBytes,
                       void *const *arguments) {
  (void)grid;
  (void)block;
  (void)sharedBytes;
  found->run(found->address, arguments);
}

static cudaError_t launch(size_t sharedBytes, cudaStream_t stream) {
  return cudaLaunchKernel(&kernelAddress, (dim3){1, 1, 1}, (dim3){1, 1, 1}, NULL, sharedBytes, stream);
}

/* ---- what is on which device ---- */

static int device_now(void) {
  int device = -1;
  OK(cudaGetDevice(&device));
  return device;
}

static int device_of(const void *ptr) {
  struct cudaPointerAttributes attributes;
  OK(cudaPointerGetAttributes(&attributes, ptr));
  return attributes.device;
}

static bool has_context(int device) {
  unsigned flags;
  int isActive = 0;
  OK(cuDevicePrimaryCtxGetState(device, &flags, &isActive));
  return isActive != 0;
}

static void *other_thread(void *argument) {
  CUcontext context;
  (void)argument;
  assert_int_equal(device_now(), 0);
  OK(cuDevicePrimaryCtxRetain(&context, 1));
  OK(cuCtxPushCurrent(context));
  assert_int_equal(device_now(), 1);
  OK(cudaSetDevice(2)); /* in its place */
  assert_int_equal(device_now(), 2);
  OK(cuCtxPopCurrent(&context));
  assert_int_equal(device_now(), 0);
  OK(cuDevicePrimaryCtxRelease(1));
  return NULL;
}

/* Before any other test: of the devices nobody has used one has a context. */
static void test_contexts(void **state) {
  pthread_t thread;
  CUcontext context;
  (void)state;
  for (int device = 0; device < 4; device++) assert_false(has_context(device));
  OK(pthread_create(&thread, NULL, other_thread, NULL));
  OK(pthread_join(thread, NULL));
  assert_false(has_context(0) || has_context(1) || has_context(3));
  assert_true(has_context(2));
  OK(cuDevicePrimaryCtxRetain(&context, 3));
  assert_true(has_context(3));
  OK(cuDevicePrimaryCtxRelease(3));
  assert_false(has_context(3));
  OK(cudaFree(NULL));
  assert_true(has_context(0));
}

static void test_streams(void **state) {
  cudaStream_t stream;
  cudaEvent_t events[2];
  float ms;
  (void)state;
  OK(cudaSetDevice(1));
  OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  OK(cudaEventCreate(&events[1]));
  OK(cudaSetDevice(0));
  OK(cudaEventCreate(&events[0]));
  IS(launch(0, stream), cudaErrorInvalidResourceHandle);
  OK(launch(0, NULL)); /* each device has its own */
  IS(cudaEventRecord(events[0], stream), cudaErrorInvalidResourceHandle);
  IS(cudaEventRecord(events[1], NULL), cudaErrorInvalidResourceHandle);
  OK(cudaEventRecord(events[0], NULL));
  OK(cudaEventRecord(events[1], stream)); /* the current device does not matter */
  OK(cudaStreamWaitEvent(stream, events[0], 0));
  OK(cudaEventSynchronize(events[1]));
  OK(cudaEventQuery(events[1]));
  IS(cudaEventElapsedTime(&ms, events[0], events[1]), cudaErrorInvalidResourceHandle);
  OK(cudaStreamSynchronize(stream));
  assert_int_equal(nRuns, 1);
  OK(cudaSetDevice(1));
  OK(launch(0, stream));
  OK(cudaStreamSynchronize(stream));
  assert_int_equal(nRuns, 2);
  OK(cudaSetDevice(0));
  for (int i = 0; i < 2; i++) OK(cudaEventDestroy(events[i]));
  OK(cudaStreamDestroy(stream));
}

static void test_memory(void **state) {
  cudaStream_t stream;
  unsigned char *here = NULL, *there = NULL, *pooled = NULL, *host = NULL;
  CUdeviceptr base = 0;
  size_t bytes = 0;
  (void)state;
  OK(cudaMalloc((void **)&here, BYTES));
  OK(cudaSetDevice(1));
  OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  OK(cudaMalloc((void **)&there, BYTES));
  OK(cuMemGetAddressRange(&base, &bytes, (CUdeviceptr)(uintptr_t)(there + 5)));
  assert_true(base == (CUdeviceptr)(uintptr_t)there && bytes == BYTES);
  OK(cudaSetDevice(0));
  assert_true(device_of(here) == 0 && device_of(there) == 1);
  assert_int_equal(cuMemGetAddressRange(&base, &bytes, (CUdeviceptr)(uintptr_t)there), CUDA_ERROR_NOT_FOUND);
  OK(cudaMallocAsync((void **)&pooled, BYTES, stream));
  assert_int_equal(device_of(pooled), 1);
  /* Copies may be on any stream. */
  OK(cudaMallocHost((void **)&host, BYTES));
  OK(cudaMemsetAsync(there, 7, BYTES, stream));
  OK(cudaMemcpyAsync(here, there, BYTES, cudaMemcpyDeviceToDevice, stream));
  OK(cudaMemcpyAsync(host, here, BYTES, cudaMemcpyDeviceToHost, stream));
  OK(cudaStreamSynchronize(stream));
  assert_int_equal(host[BYTES - 1], 7);
  OK(cudaFreeAsync(pooled, stream));
  OK(cudaFree(there));
  OK(cudaFree(here));
  OK(cudaFreeHost(host));
  OK(cudaStreamDestroy(stream));
}

/* Stream-ordered memory is copied with the stream's device as the current one. */
static void test_pool(void **state) {
  cudaStream_t stream;
  unsigned char *pooled = NULL, byte = 0;
  (void)state;
  OK(cudaSetDevice(1));
  OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  OK(cudaMallocAsync((void **)&pooled, BYTES, stream));
  OK(cudaSetDevice(0));
  OK(cudaMemsetAsync(pooled, 3, BYTES, stream));
  IS(cudaMemcpyAsync(&byte, pooled, 1, cudaMemcpyDeviceToHost, stream), cudaErrorInvalidValue);
  IS(cudaMemcpyAsync(pooled, &byte, 1, cudaMemcpyHostToDevice, stream), cudaErrorInvalidValue);
  OK(cudaSetDevice(1));
  OK(cudaMemcpyAsync(&byte, pooled, 1, cudaMemcpyDeviceToHost, stream));
  OK(cudaStreamSynchronize(stream));
  assert_int_equal(byte, 3);
  OK(cudaFreeAsync(pooled, stream));
  OK(cudaStreamDestroy(stream));
  OK(cudaSetDevice(0));
}

static CUdeviceptr cumem_map(CUmemGenericAllocationHandle memory, size_t bytes, int device) {
  const CUmemAccessDesc access = {.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device},
                                  .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  CUdeviceptr base;
  OK(cuMemAddressReserve(&base, bytes, 0, 0, 0));
  OK(cuMemMap(base, bytes, 0, memory, 0));
  OK(cuMemSetAccess(base, bytes, &access, 1));
  return base;
}

/* Memory of device 0, mapped for it and once more for device 1: copies need access for the device that makes
 * them, memsets for the memory's, too. */
static void test_cumem(void **state) {
  const CUmemAllocationProp properties = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                          .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = 0}};
  CUmemGenericAllocationHandle memory;
  unsigned char *at[2], byte = 0;
  size_t bytes;
  (void)state;
  OK(cuMemGetAllocationGranularity(&bytes, &properties, CU_MEM_ALLOC_GRANULARITY_MINIMUM));
  OK(cuMemCreate(&memory, bytes, &properties, 0));
  for (int i = 0; i < 2; i++) at[i] = (unsigned char *)(uintptr_t)cumem_map(memory, bytes, i);
  OK(cuMemRelease(memory));
  for (int device = 0; device < 2; device++) {
    OK(cudaSetDevice(device));
    OK(cudaMemcpy(at[device], &byte, 1, cudaMemcpyHostToDevice));
    OK(cudaMemcpy(&byte, at[device], 1, cudaMemcpyDeviceToHost));
    IS(cudaMemcpy(&byte, at[!device], 1, cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
    IS(cudaMemcpyAsync(at[!device], &byte, 1, cudaMemcpyHostToDevice, NULL), cudaErrorInvalidValue);
    IS(cudaMemset(at[!device], 1, 1), cudaErrorInvalidValue);
  }
  IS(cudaMemset(at[1], 1, 1), cudaErrorInvalidValue); /* on device 1, for which it is mapped */
  OK(cudaSetDevice(0));
  OK(cudaMemset(at[0], 1, 1));
  for (int i = 0; i < 2; i++) {
    OK(cuMemUnmap((CUdeviceptr)(uintptr_t)at[i], bytes));
    OK(cuMemAddressFree((CUdeviceptr)(uintptr_t)at[i], bytes));
  }
}

/* A kernel asks for shared memory on each device. */
static void test_functions(void **state) {
  (void)state;
  OK(cudaFuncSetAttribute(&kernelAddress, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)LARGE));
  OK(launch(LARGE, NULL));
  OK(cudaSetDevice(1));
  IS(launch(LARGE, NULL), cudaErrorInvalidValue);
  OK(cudaFuncSetAttribute(&kernelAddress, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)LARGE));
  OK(launch(LARGE, NULL));
  OK(cudaSetDevice(0));
}

static void test_peers(void **state) {
  int can = -1;
  (void)state;
  OK(cudaDeviceCanAccessPeer(&can, 0, 1));
  assert_int_equal(can, 1);
  OK(cudaDeviceCanAccessPeer(&can, 1, 1));
  assert_int_equal(can, 0);
  IS(cudaDeviceCanAccessPeer(&can, 0, 4), cudaErrorInvalidDevice);
  IS(cudaDeviceDisablePeerAccess(1), cudaErrorPeerAccessNotEnabled);
  OK(cudaDeviceEnablePeerAccess(1, 0));
  IS(cudaDeviceEnablePeerAccess(1, 0), cudaErrorPeerAccessAlreadyEnabled);
  IS(cudaDeviceEnablePeerAccess(0, 0), cudaErrorInvalidDevice);
  IS(cudaDeviceEnablePeerAccess(4, 0), cudaErrorInvalidDevice);
  IS(cudaDeviceEnablePeerAccess(2, 1), cudaErrorInvalidValue);
  OK(cudaSetDevice(1)); /* only one way */
  IS(cudaDeviceDisablePeerAccess(0), cudaErrorPeerAccessNotEnabled);
  OK(cudaSetDevice(0));
  OK(cudaDeviceDisablePeerAccess(1));
}

/* A memset of cudaMalloc's memory of another device needs peer access, which ends with the context. */
static void test_peer_memset(void **state) {
  unsigned char *there = NULL;
  CUcontext contexts[2];
  (void)state;
  OK(cudaSetDevice(1));
  OK(cudaMalloc((void **)&there, BYTES));
  OK(cudaSetDevice(0));
  IS(cudaMemset(there, 1, BYTES), cudaErrorInvalidValue);
  OK(cudaDeviceEnablePeerAccess(1, 0));
  OK(cudaMemset(there, 1, BYTES));
  OK(cudaDeviceDisablePeerAccess(1));
  OK(cuDevicePrimaryCtxRetain(&contexts[0], 3)); /* nobody else uses it */
  OK(cuDevicePrimaryCtxRetain(&contexts[1], 1));
  OK(cuCtxPushCurrent(contexts[0]));
  OK(cuCtxEnablePeerAccess(contexts[1], 0));
  assert_int_equal(cuCtxEnablePeerAccess(contexts[1], 0), CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED);
  OK(cuCtxPopCurrent(&contexts[0]));
  OK(cuDevicePrimaryCtxRelease(3));
  OK(cudaSetDevice(3));
  IS(cudaMemset(there, 1, BYTES), cudaErrorInvalidValue);
  OK(cudaSetDevice(0));
  OK(cuDevicePrimaryCtxRelease(1));
  OK(cudaFree(there));
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_contexts), cmocka_unit_test(test_streams),
                                     cmocka_unit_test(test_memory),   cmocka_unit_test(test_functions),
                                     cmocka_unit_test(test_pool),     cmocka_unit_test(test_cumem),
                                     cmocka_unit_test(test_peers),    cmocka_unit_test(test_peer_memset)};
  (void)setenv("EMULATED_DEVICES", "4", 1);
  (void)unsetenv("EMULATED_SM");
  return cmocka_run_group_tests_name("emulated_devices", tests, NULL, NULL);
}
