/* The emulated CUDA driver, as far as collectives/peer_memory.c knows it: contexts, what is known of a
 * pointer, cudaIpc. The functions have their real names, so that a library that links this one can pass for
 * libcuda.so.1; cuMem is in driver_memory.c. */
#include "driver.h"
#include "runtime.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static CUdeviceptr driver_pointer(const void *ptr) {
  return (CUdeviceptr)(uintptr_t)ptr;
}

static void *driver_address(CUdeviceptr ptr) {
  return (void *)(uintptr_t)ptr;
}

bool driver_is_device(int device) {
  return device >= 0 && device < runtime_devices();
}

/* ---- errors, devices ---- */

CUresult cuGetErrorString(CUresult error, const char **text) {
  static const struct {
    CUresult error;
    const char *text;
  } texts[] = {
      {CUDA_SUCCESS, "no error"},
      {CUDA_ERROR_INVALID_VALUE, "invalid argument"},
      {CUDA_ERROR_OUT_OF_MEMORY, "out of memory"},
      {CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"},
      {CUDA_ERROR_INVALID_CONTEXT, "invalid device context"},
      {CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"},
      {CUDA_ERROR_NOT_FOUND, "named symbol not found"},
      {CUDA_ERROR_PEER_ACCESS_UNSUPPORTED, "peer access is not supported between these two devices"},
      {CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED, "peer access is already enabled"},
      {CUDA_ERROR_PEER_ACCESS_NOT_ENABLED, "peer access has not been enabled"},
      {CUDA_ERROR_NOT_PERMITTED, "operation not permitted"},
      {CUDA_ERROR_NOT_SUPPORTED, "operation not supported"},
  };
  for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++) {
    if (texts[i].error != error) continue;
    *text = texts[i].text;
    return CUDA_SUCCESS;
  }
  *text = NULL;
  return CUDA_ERROR_INVALID_VALUE;
}

/* EMULATED_CUMEM=0: a driver without cuMem, as where a virtual machine forbids it. */
static bool driver_has_cumem(void) {
  const char *text = getenv("EMULATED_CUMEM");
  return !text || strcmp(text, "0") != 0;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  enum cudaDeviceAttr same = (enum cudaDeviceAttr)attribute; /* the runtime's numbers are the driver's */
  if (!driver_is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
  case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED:
    *value = driver_has_cumem();
    return CUDA_SUCCESS;
  default:
    return cudaDeviceGetAttribute(value, same, device) == cudaSuccess ? CUDA_SUCCESS
                                                                      : CUDA_ERROR_INVALID_VALUE;
  }
}

/* ---- contexts ---- */

enum { CONTEXT_MAX_DEPTH = 16 };

struct CUctx_st {
  atomic_int refs;     /* by cuDevicePrimaryCtxRetain; the runtime's own use is not counted */
  atomic_bool isInUse; /* by the runtime */
  atomic_uint peers;   /* bits: devices that this one may reach; gone with the context */
};

static struct CUctx_st contexts[RUNTIME_MAX_DEVICES];
static _Thread_local struct {
  CUcontext stack[CONTEXT_MAX_DEPTH];
  int depth;
} contextThread;

static int context_device(const struct CUctx_st *context) {
  for (int device = 0; device < runtime_devices(); device++)
    if (context == &contexts[device]) return device;
  return -1;
}

bool driver_pushed(int *device) {
  if (contextThread.depth == 0) return false;
  *device = context_device(contextThread.stack[contextThread.depth - 1]);
  return true;
}

bool driver_replace_pushed(int device) {
  if (contextThread.depth == 0) return false;
  contextThread.stack[contextThread.depth - 1] = &contexts[device];
  return true;
}

void driver_use_context(int device) {
  atomic_store(&contexts[device].isInUse, true);
}

bool driver_context(int *device) {
  if (driver_pushed(device)) return true;
  *device = 0;
  return runtime_has_context() && cudaGetDevice(device) == cudaSuccess;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  if (!driver_is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  atomic_fetch_add(&contexts[device].refs, 1);
  *context = &contexts[device];
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
  if (!driver_is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  int before = atomic_fetch_sub(&contexts[device].refs, 1);
  if (before == 1 && !atomic_load(&contexts[device].isInUse)) atomic_store(&contexts[device].peers, 0);
  if (before > 0) return CUDA_SUCCESS;
  atomic_fetch_add(&contexts[device].refs, 1);
  return CUDA_ERROR_INVALID_CONTEXT;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned int *flags, int *isActive) {
  if (!driver_is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  *flags = 0;
  *isActive = atomic_load(&contexts[device].isInUse) || atomic_load(&contexts[device].refs) > 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent(CUcontext context) {
  if (context_device(context) < 0) return CUDA_ERROR_INVALID_CONTEXT;
  if (contextThread.depth == CONTEXT_MAX_DEPTH) return CUDA_ERROR_INVALID_VALUE;
  contextThread.stack[contextThread.depth++] = context;
  return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(CUcontext *context) {
  if (contextThread.depth == 0) return CUDA_ERROR_INVALID_CONTEXT;
  *context = contextThread.stack[--contextThread.depth];
  return CUDA_SUCCESS;
}

CUresult cuDeviceCanAccessPeer(int *can, CUdevice device, CUdevice peer) {
  if (!driver_is_device(device) || !driver_is_device(peer)) return CUDA_ERROR_INVALID_DEVICE;
  *can = device != peer;
  return CUDA_SUCCESS;
}

CUresult cuCtxEnablePeerAccess(CUcontext peer, unsigned int flags) {
  int device, other = context_device(peer);
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  if (!driver_context(&device) || other < 0) return CUDA_ERROR_INVALID_CONTEXT;
  if (other == device) return CUDA_ERROR_INVALID_DEVICE;
  unsigned bit = 1u << other, before = atomic_fetch_or(&contexts[device].peers, bit);
  return before & bit ? CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED : CUDA_SUCCESS;
}

CUresult cuCtxDisablePeerAccess(CUcontext peer) {
  int device, other = context_device(peer);
  if (!driver_context(&device) || other < 0) return CUDA_ERROR_INVALID_CONTEXT;
  unsigned bit = 1u << other, before = atomic_fetch_and(&contexts[device].peers, ~bit);
  return before & bit ? CUDA_SUCCESS : CUDA_ERROR_PEER_ACCESS_NOT_ENABLED;
}

bool driver_reaches(int device, int other) {
  return atomic_load(&contexts[device].peers) >> other & 1;
}

/* ---- pointers ---- */

static CUresult pointer_attribute(const emulatedRange_t *range, CUpointer_attribute attribute, void *value) {
  switch (attribute) {
  case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
    *(CUmemorytype *)value = range->kind == EMULATED_HOST ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
    return CUDA_SUCCESS;
  case CU_POINTER_ATTRIBUTE_IS_MANAGED:
    *(unsigned *)value = range->kind == EMULATED_MANAGED;
    return CUDA_SUCCESS;
  case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
    *(int *)value = range->device;
    return CUDA_SUCCESS;
  case CU_POINTER_ATTRIBUTE_BUFFER_ID:
    *(unsigned long long *)value = range->bufferId;
    return CUDA_SUCCESS;
  case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE:
    *(CUmemoryPool *)value = range->kind == EMULATED_POOL ? (CUmemoryPool)(void *)contexts : NULL;
    return CUDA_SUCCESS;
  case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
    *(unsigned *)value = range->kind == EMULATED_MALLOC;
    return CUDA_SUCCESS;
  default:
    return CUDA_ERROR_INVALID_VALUE;
  }
}

/* Of what is not CUDA's, all is zero, and no error. */
CUresult cuPointerGetAttributes(unsigned int n, CUpointer_attribute *attributes, void **values,
                                CUdeviceptr ptr) {
  emulatedRange_t range;
  bool isKnown = emulated_range_find(driver_address(ptr), &range);
  CUresult result = CUDA_SUCCESS;
  for (unsigned i = 0; i < n && result == CUDA_SUCCESS; i++) {
    emulatedRange_t none = {.kind = EMULATED_HOST};
    result = pointer_attribute(isKnown ? &range : &none, attributes[i], values[i]);
    if (!isKnown && attributes[i] == CU_POINTER_ATTRIBUTE_MEMORY_TYPE) *(unsigned *)values[i] = 0;
  }
  return result;
}

/* Of memory of the current context's device only. */
CUresult cuMemGetAddressRange(CUdeviceptr *base, size_t *bytes, CUdeviceptr ptr) {
  emulatedRange_t range;
  int device;
  if (!driver_context(&device)) return CUDA_ERROR_INVALID_CONTEXT;
  if (!emulated_range_find(driver_address(ptr), &range) || range.device != device)
    return CUDA_ERROR_NOT_FOUND;
  if (base) *base = driver_pointer(range.base);
  if (bytes) *bytes = range.bytes;
  return CUDA_SUCCESS;
}

CUresult cuMemAlloc(CUdeviceptr *ptr, size_t bytes) {
  int device;
  void *made = NULL;
  if (!driver_context(&device)) return CUDA_ERROR_INVALID_CONTEXT;
  if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  if (runtime_memory_make(EMULATED_MALLOC, device, bytes, &made) != cudaSuccess)
    return CUDA_ERROR_OUT_OF_MEMORY;
  *ptr = driver_pointer(made);
  return CUDA_SUCCESS;
}

CUresult cuMemFree(CUdeviceptr ptr) {
  int device;
  if (!driver_context(&device)) return CUDA_ERROR_INVALID_CONTEXT;
  bool isFreed = runtime_memory_free(driver_address(ptr), 1u << EMULATED_MALLOC | 1u << EMULATED_POOL);
  return isFreed ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

/* ---- cudaIpc: another process opens the owner's memory file by way of /proc ---- */

typedef struct {
  int32_t pid, fd;
  uint64_t file, bytes; /* the file's number, so that another one behind the descriptor is noticed */
} ipcHandle_t;
_Static_assert(sizeof(ipcHandle_t) <= sizeof(CUipcMemHandle), "a handle holds it");

CUresult cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr ptr) {
  emulatedRange_t range;
  struct stat status;
  int device, fd = runtime_memory_file(driver_address(ptr));
  if (!driver_context(&device)) return CUDA_ERROR_INVALID_CONTEXT;
  if (fd < 0 || !emulated_range_find(driver_address(ptr), &range) || fstat(fd, &status) != 0)
    return CUDA_ERROR_INVALID_VALUE;
  ipcHandle_t made = {(int32_t)getpid(), fd, status.st_ino, range.bytes};
  memset(handle, 0, sizeof(*handle));
  memcpy(handle, &made, sizeof(made));
  return CUDA_SUCCESS;
}

static void *ipc_map(const ipcHandle_t *handle) {
  char path[64];
  struct stat status;
  snprintf(path, sizeof(path), "/proc/%d/fd/%d", (int)handle->pid, (int)handle->fd);
  int fd = open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return NULL;
  bool isSame = fstat(fd, &status) == 0 && status.st_ino == handle->file;
  void *base = isSame ? mmap(NULL, handle->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) : MAP_FAILED;
  (void)close(fd);
  return base == MAP_FAILED ? NULL : base;
}

CUresult cuIpcOpenMemHandle(CUdeviceptr *ptr, CUipcMemHandle handle, unsigned int flags) {
  ipcHandle_t given;
  int device;
  if (flags != CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS) return CUDA_ERROR_INVALID_VALUE;
  memcpy(&given, &handle, sizeof(given));
  /* CUDA does not open what its own process made. */
  if (!driver_context(&device) || given.pid == (int32_t)getpid()) return CUDA_ERROR_INVALID_CONTEXT;
  void *base = ipc_map(&given);
  if (!base) return CUDA_ERROR_INVALID_VALUE;
  emulated_range_add(base, given.bytes, EMULATED_CUMEM, device);
  *ptr = driver_pointer(base);
  return CUDA_SUCCESS;
}

CUresult cuIpcCloseMemHandle(CUdeviceptr ptr) {
  emulatedRange_t range;
  void *base = driver_address(ptr);
  CUmemGenericAllocationHandle memory;
  if (cuMemRetainAllocationHandle(&memory, base) == CUDA_SUCCESS) { /* cuMem's, not ours */
    (void)cuMemRelease(memory);
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (!emulated_range_find(base, &range) || range.base != base || range.kind != EMULATED_CUMEM)
    return CUDA_ERROR_INVALID_VALUE;
  (void)emulated_range_remove(base);
  (void)munmap(base, range.bytes);
  return CUDA_SUCCESS;
}

/* ---- by name ---- */

void *emulated_driver_find(const char *name) {
  static const struct {
    const char *name;
    void *function;
  } functions[] = {
/* The name before cuda.h renames some of them to their newer versions, as the driver takes it too. */
#define FUNCTION(name) {#name, (void *)(name)}
      FUNCTION(cuGetErrorString),
      FUNCTION(cuDeviceGetAttribute),
      FUNCTION(cuDevicePrimaryCtxRetain),
      FUNCTION(cuDevicePrimaryCtxRelease),
      FUNCTION(cuDevicePrimaryCtxGetState),
      FUNCTION(cuCtxPushCurrent),
      FUNCTION(cuCtxPopCurrent),
      FUNCTION(cuCtxEnablePeerAccess),
      FUNCTION(cuCtxDisablePeerAccess),
      FUNCTION(cuDeviceCanAccessPeer),
      FUNCTION(cuPointerGetAttributes),
      FUNCTION(cuMemGetAddressRange),
      FUNCTION(cuMemAlloc),
      FUNCTION(cuMemFree),
      FUNCTION(cuIpcGetMemHandle),
      FUNCTION(cuIpcOpenMemHandle),
      FUNCTION(cuIpcCloseMemHandle),
      FUNCTION(cuMemGetAllocationGranularity),
      FUNCTION(cuMemCreate),
      FUNCTION(cuMemRelease),
      FUNCTION(cuMemRetainAllocationHandle),
      FUNCTION(cuMemGetAllocationPropertiesFromHandle),
      FUNCTION(cuMemExportToShareableHandle),
      FUNCTION(cuMemImportFromShareableHandle),
      FUNCTION(cuMemAddressReserve),
      FUNCTION(cuMemAddressFree),
      FUNCTION(cuMemMap),
      FUNCTION(cuMemUnmap),
      FUNCTION(cuMemSetAccess),
      FUNCTION(cuMemGetAccess),
#undef FUNCTION
  };
  for (size_t i = 0; i < sizeof(functions) / sizeof(functions[0]); i++)
    if (strcmp(functions[i].name, name) == 0) return functions[i].function;
  return NULL;
}
