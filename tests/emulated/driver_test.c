/* The emulated CUDA driver by itself. */
#include "emulated.h"

#include <cuda.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define OK(call) assert_int_equal(call, 0)
#define BYTES ((size_t)100000)

/* There are no kernels here. */
const emulatedKernel_t *emulated_kernel_find(const void *address) {
  (void)address;
  return NULL;
}

void emulated_grid_run(const emulatedKernel_t *kernel, dim3 grid, dim3 block, size_t sharedBytes,
                       void *const *arguments) {
  (void)kernel;
  (void)grid;
  (void)block;
  (void)sharedBytes;
  (void)arguments;
}

/* ---- cuMem ---- */

static const CUmemAllocationProp cumemProperties = {
    .type = CU_MEM_ALLOCATION_TYPE_PINNED,
    .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
    .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = 0}};
static const CUmemAccessDesc cumemAccess = {.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = 0},
                                            .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};

static unsigned char *cumem_map(CUmemGenericAllocationHandle memory, size_t bytes) {
  CUdeviceptr base;
  OK(cuMemAddressReserve(&base, bytes, 0, 0, 0));
  OK(cuMemMap(base, bytes, 0, memory, 0));
  OK(cuMemSetAccess(base, bytes, &cumemAccess, 1));
  return (unsigned char *)(uintptr_t)base;
}

static void cumem_unmap(const unsigned char *base, size_t bytes) {
  assert_int_not_equal(cuMemAddressFree((uintptr_t)base, bytes), 0);
  OK(cuMemUnmap((uintptr_t)base, bytes));
  OK(cuMemAddressFree((uintptr_t)base, bytes));
}

/* Made, mapped, exported, imported, mapped again; each mapping outlives the other and the handles. */
static void test_cumem(void **state) {
  CUmemGenericAllocationHandle memory, imported, again;
  CUmemAllocationProp properties = cumemProperties;
  CUmemLocation second = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = 1};
  unsigned long long flags;
  size_t unit = 0, before, after, total;
  int fd = -1;
  emulatedRange_t range[2];
  (void)state;
  OK(cudaMemGetInfo(&before, &total));
  OK(cuMemGetAllocationGranularity(&unit, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED));
  assert_int_equal(cuMemCreate(&memory, unit + 1, &properties, 0), CUDA_ERROR_INVALID_VALUE);
  OK(cuMemCreate(&memory, 2 * unit, &properties, 0));
  unsigned char *one = cumem_map(memory, 2 * unit);
  OK(cudaMemGetInfo(&after, &total));
  assert_int_equal(before - after, 2 * unit);
  assert_int_equal(one[2 * unit - 1], 0xCB);
  OK(cuMemExportToShareableHandle(&fd, memory, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
  assert_int_equal(cuMemExportToShareableHandle(&fd, memory, CU_MEM_HANDLE_TYPE_FABRIC, 0),
                   CUDA_ERROR_NOT_SUPPORTED);
  OK(cuMemRelease(memory));
  OK(cuMemRetainAllocationHandle(&again, one + unit));
  assert_int_equal(again, memory);
  OK(cuMemGetAllocationPropertiesFromHandle(&properties, again));
  assert_int_equal(properties.requestedHandleTypes, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
  OK(cuMemRelease(again));
  OK(cuMemImportFromShareableHandle(&imported, (void *)(intptr_t)fd,
                                    CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
  (void)close(fd);
  unsigned char *two = cumem_map(imported, 2 * unit);
  OK(cuMemRelease(imported));
  assert_true(emulated_range_find(one + unit, &range[0]) && emulated_range_find(two, &range[1]));
  assert_true(range[0].base == one && range[0].bytes == 2 * unit && range[0].kind == EMULATED_CUMEM &&
              range[0].bufferId != range[1].bufferId);
  one[unit] = 1;
  assert_int_equal(two[unit], 1);
  OK(cuMemGetAccess(&flags, &cumemAccess.location, (uintptr_t)one));
  assert_int_equal(flags, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
  OK(cuMemGetAccess(&flags, &second, (uintptr_t)one));
  assert_int_equal(flags, CU_MEM_ACCESS_FLAGS_PROT_NONE);
  cumem_unmap(one, 2 * unit);
  assert_false(emulated_range_find(one, &range[0]));
  assert_int_equal(two[unit], 1); /* it lives on */
  assert_int_equal(cuMemRetainAllocationHandle(&again, one), CUDA_ERROR_INVALID_VALUE);
  cumem_unmap(two, 2 * unit);
  assert_int_equal(cuMemRelease(memory), CUDA_ERROR_INVALID_VALUE);
  OK(cudaMemGetInfo(&after, &total));
  assert_int_equal(before, after);
}

/* ---- pointers and contexts ---- */

static void check_pointer(const void *ptr, CUmemorytype type, unsigned managed, bool pool, unsigned ipc) {
  CUpointer_attribute wanted[] = {CU_POINTER_ATTRIBUTE_MEMORY_TYPE, CU_POINTER_ATTRIBUTE_IS_MANAGED,
                                  CU_POINTER_ATTRIBUTE_BUFFER_ID, CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE,
                                  CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE};
  CUmemorytype foundType;
  unsigned isManaged, isIpc;
  unsigned long long id;
  CUmemoryPool found;
  void *values[] = {&foundType, &isManaged, &id, &found, &isIpc};
  OK(cuPointerGetAttributes(5, wanted, values, (uintptr_t)ptr));
  assert_true(foundType == type && isManaged == managed && (found != NULL) == pool && isIpc == ipc);
  assert_int_equal(id != 0, (int)type != 0);
}

static void test_pointers(void **state) {
  void *made = NULL;
  CUmemGenericAllocationHandle memory;
  CUdeviceptr base, device;
  size_t bytes;
  const char *text;
  (void)state;
  OK(cudaMalloc(&made, BYTES));
  check_pointer((char *)made + 1, CU_MEMORYTYPE_DEVICE, 0, false, 1);
  OK(cuMemGetAddressRange(&base, &bytes, (uintptr_t)made + 77));
  assert_true(base == (uintptr_t)made && bytes == BYTES);
  assert_int_equal(cuMemRetainAllocationHandle(&memory, made), CUDA_ERROR_INVALID_VALUE);
  OK(cudaFree(made));
  check_pointer(made, (CUmemorytype)0, 0, false, 0);
  assert_int_equal(cuMemGetAddressRange(&base, &bytes, (uintptr_t)made), CUDA_ERROR_NOT_FOUND);
  check_pointer(NULL, (CUmemorytype)0, 0, false, 0);
  OK(cudaMallocManaged(&made, BYTES, cudaMemAttachGlobal));
  check_pointer(made, CU_MEMORYTYPE_DEVICE, 1, false, 0);
  OK(cudaFree(made));
  OK(cudaMallocHost(&made, BYTES));
  check_pointer(made, CU_MEMORYTYPE_HOST, 0, false, 0);
  OK(cudaFreeHost(made));
  OK(cudaMallocAsync(&made, BYTES, NULL));
  check_pointer(made, CU_MEMORYTYPE_DEVICE, 0, true, 0);
  OK(cudaFreeAsync(made, NULL));
  OK(cuMemAlloc(&device, BYTES));
  check_pointer((void *)(uintptr_t)device, CU_MEMORYTYPE_DEVICE, 0, false, 1);
  OK(cuMemFree(device));
  assert_int_equal(cuMemFree(device), CUDA_ERROR_INVALID_VALUE);
  OK(cuGetErrorString(CUDA_ERROR_INVALID_VALUE, &text));
  assert_string_equal(text, "invalid argument");
}

/* A thread that has called nothing of CUDA's has no context, and can borrow one. */
static void *thread_contexts(void *argument) {
  CUdeviceptr ptr = (uintptr_t)argument, base;
  CUcontext contexts[2], popped;
  size_t bytes;
  int can = 0;
  assert_int_equal(cuMemGetAddressRange(&base, &bytes, ptr), CUDA_ERROR_INVALID_CONTEXT);
  assert_int_equal(cuCtxPopCurrent(&popped), CUDA_ERROR_INVALID_CONTEXT);
  for (int i = 0; i < 2; i++) OK(cuDevicePrimaryCtxRetain(&contexts[i], i));
  OK(cuCtxPushCurrent(contexts[0]));
  OK(cuMemGetAddressRange(&base, &bytes, ptr));
  OK(cuDeviceCanAccessPeer(&can, 0, 1));
  assert_int_equal(can, 1);
  OK(cuCtxEnablePeerAccess(contexts[1], 0));
  assert_int_equal(cuCtxEnablePeerAccess(contexts[1], 0), CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED);
  assert_int_equal(cuCtxEnablePeerAccess(contexts[0], 0), CUDA_ERROR_INVALID_DEVICE);
  OK(cuCtxPopCurrent(&popped));
  assert_ptr_equal(popped, contexts[0]);
  for (int i = 0; i < 2; i++) OK(cuDevicePrimaryCtxRelease(i));
  assert_int_equal(cuDevicePrimaryCtxRelease(0), CUDA_ERROR_INVALID_CONTEXT);
  return NULL;
}

static void test_contexts(void **state) {
  void *made = NULL, *function = NULL;
  pthread_t thread;
  enum cudaDriverEntryPointQueryResult found;
  (void)state;
  OK(cudaMalloc(&made, BYTES));
  OK(pthread_create(&thread, NULL, thread_contexts, made));
  OK(pthread_join(thread, NULL));
  OK(cudaFree(made));
  OK(cudaGetDriverEntryPointByVersion("cuMemAlloc", &function, 12000, cudaEnableDefault, &found));
  assert_true(found == cudaDriverEntryPointSuccess && function == (void *)cuMemAlloc);
  OK(cudaGetDriverEntryPointByVersion("cuNothing", &function, 12000, cudaEnableDefault, &found));
  assert_true(found == cudaDriverEntryPointSymbolNotFound && !function);
}

/* ---- another process, from before the first thread ---- */

static int childSocket;
static pid_t childPid;

/* Opens what it is told to, and adds one to each byte. */
static int child_run(int given) {
  CUipcMemHandle handle;
  CUdeviceptr base = 0;
  if (read(given, &handle, sizeof(handle)) != (ssize_t)sizeof(handle)) return 1;
  (void)cudaSetDevice(0);
  if (cuIpcOpenMemHandle(&base, handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS) != CUDA_SUCCESS) return 2;
  unsigned char *bytes = (unsigned char *)(uintptr_t)base;
  for (size_t i = 0; i < BYTES; i++) bytes[i]++;
  if (cuIpcCloseMemHandle(base) != CUDA_SUCCESS) return 3;
  return cuIpcCloseMemHandle(base) == CUDA_SUCCESS ? 4 : 0; /* it is closed */
}

static void test_ipc(void **state) {
  unsigned char *made = NULL;
  CUipcMemHandle handle;
  CUdeviceptr base;
  int status = -1;
  (void)state;
  OK(cudaMalloc((void **)&made, BYTES));
  OK(cuIpcGetMemHandle(&handle, (uintptr_t)made + 5));
  assert_int_equal(cuIpcOpenMemHandle(&base, handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS),
                   CUDA_ERROR_INVALID_CONTEXT); /* not in the same process */
  assert_int_equal(write(childSocket, &handle, sizeof(handle)), sizeof(handle));
  assert_int_equal(waitpid(childPid, &status, 0), childPid);
  assert_int_equal(status, 0);
  for (size_t i = 0; i < BYTES; i++) assert_int_equal(made[i], 0xCC);
  OK(cudaFree(made));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_cumem),
      cmocka_unit_test(test_pointers),
      cmocka_unit_test(test_contexts),
      cmocka_unit_test(test_ipc),
  };
  int sockets[2];
  (void)setenv("EMULATED_DEVICES", "2", 1);
  (void)unsetenv("EMULATED_CUMEM");
  if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, sockets) != 0) return 1;
  childSocket = sockets[0];
  childPid = fork();
  if (childPid < 0) return 1;
  if (childPid == 0) {
    (void)close(sockets[0]); /* so that the end of the parent is seen */
    _exit(child_run(sockets[1]));
  }
  (void)close(sockets[1]);
  return cmocka_run_group_tests_name("emulated_driver", tests, NULL, NULL);
}
