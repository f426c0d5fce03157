/* The emulated runtime: threads, devices, errors, and launches of kernels. */
#include "runtime.h"
#include "driver.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
  MULTIPROCESSORS = 4, /* few, for each block is a CPU thread; EMULATED_SMS says otherwise */
  MAX_THREADS = 1024,
  MAX_THREADS_Z = 64,
  MAX_GRID_YZ = 65535,
  SHARED_BYTES = 48 * 1024 /* that a kernel may have without asking for more */
};

/* ---- threads ---- */

static _Thread_local struct {
  int device; /* unless the driver's stack of contexts has another */
  bool hasContext;
  cudaError_t last;
} thread;

cudaError_t runtime_error(cudaError_t error) {
  if (error != cudaSuccess && error != cudaErrorNotReady) thread.last = error;
  return error;
}

int runtime_device(void) {
  int device;
  if (!driver_pushed(&device)) {
    device = thread.device;
    thread.hasContext = true;
  }
  driver_use_context(device);
  return device;
}

bool runtime_has_context(void) {
  return thread.hasContext;
}

void *runtime_allocate(size_t bytes) {
  void *made = calloc(1, bytes);
  if (!made) abort();
  return made;
}

/* ---- errors ---- */

static const struct {
  cudaError_t error;
  const char *name, *text;
} errors[] = {
#define ERROR(error, text)                                                                                   \
  { error, #error, text }
    ERROR(cudaSuccess, "no error"),
    ERROR(cudaErrorInvalidValue, "invalid argument"),
    ERROR(cudaErrorMemoryAllocation, "out of memory"),
    ERROR(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    ERROR(cudaErrorInvalidDeviceFunction, "invalid device function"),
    ERROR(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    ERROR(cudaErrorInvalidDevice, "invalid device ordinal"),
    ERROR(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    ERROR(cudaErrorIllegalState, "the operation cannot be performed in the present state"),
    ERROR(cudaErrorNotReady, "device not ready"),
    ERROR(cudaErrorPeerAccessUnsupported, "peer access is not supported between these two devices"),
    ERROR(cudaErrorPeerAccessAlreadyEnabled, "peer access is already enabled"),
    ERROR(cudaErrorPeerAccessNotEnabled, "peer access has not been enabled"),
    ERROR(cudaErrorNotSupported, "operation not supported"),
    ERROR(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"),
    ERROR(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture"),
    ERROR(cudaErrorStreamCaptureMerge, "operation would result in a merge of separate capture sequences"),
    ERROR(cudaErrorStreamCaptureUnmatched, "capture was not ended in the same stream as it began"),
    ERROR(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work"),
    ERROR(cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another stream"),
    ERROR(cudaErrorStreamCaptureImplicit,
          "operation would make the legacy stream depend on a capturing blocking stream"),
    ERROR(cudaErrorStreamCaptureWrongThread,
          "attempt to terminate a thread-local capture sequence from another thread"),
    ERROR(cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a capturing stream"),
#undef ERROR
};
enum { ERRORS = sizeof(errors) / sizeof(errors[0]) };

const char *cudaGetErrorString(cudaError_t error) {
  for (int i = 0; i < ERRORS; i++)
    if (errors[i].error == error) return errors[i].text;
  return "unrecognized error code";
}

const char *cudaGetErrorName(cudaError_t error) {
  for (int i = 0; i < ERRORS; i++)
    if (errors[i].error == error) return errors[i].name;
  return "unrecognized error code";
}

cudaError_t cudaGetLastError(void) {
  cudaError_t last = thread.last;
  thread.last = cudaSuccess;
  return last;
}

cudaError_t cudaPeekAtLastError(void) {
  return thread.last;
}

/* ---- devices ---- */

static pthread_once_t devicesOnce = PTHREAD_ONCE_INIT;
static struct {
  int count, major, minor, multiprocessors;
  int sharedBytes; /* a block's, at most */
} devices;

static int devices_setting(const char *name, int otherwise) {
  const char *text = getenv(name);
  return text && text[0] ? (int)strtol(text, NULL, 10) : otherwise;
}

static void devices_read(void) {
  int sm = devices_setting("EMULATED_SM", 90);
  devices.count = devices_setting("EMULATED_DEVICES", 1);
  if (devices.count < 0) devices.count = 0;
  if (devices.count > RUNTIME_MAX_DEVICES) devices.count = RUNTIME_MAX_DEVICES;
  devices.multiprocessors = devices_setting("EMULATED_SMS", MULTIPROCESSORS);
  devices.major = sm / 10;
  devices.minor = sm % 10;
  devices.sharedBytes = sm >= 90 ? 232448 : sm == 80 ? 166912 : 101376;
}

int runtime_devices(void) {
  (void)pthread_once(&devicesOnce, devices_read);
  return devices.count;
}

static bool device_is_there(int device) {
  return device >= 0 && device < runtime_devices();
}

cudaError_t cudaGetDeviceCount(int *count) {
  *count = runtime_devices();
  return runtime_error(*count > 0 ? cudaSuccess : cudaErrorNoDevice);
}

cudaError_t cudaDriverGetVersion(int *version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
  if (runtime_devices() == 0) return runtime_error(cudaErrorNoDevice);
  if (!driver_pushed(device)) *device = thread.device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (runtime_devices() == 0) return runtime_error(cudaErrorNoDevice);
  if (!device_is_there(device)) return runtime_error(cudaErrorInvalidDevice);
  /* As from CUDA 12 on, the device's context is there from now on. */
  driver_use_context(device);
  if (driver_replace_pushed(device)) return cudaSuccess;
  thread.device = device;
  thread.hasContext = true;
  return cudaSuccess;
}

static int device_attribute(enum cudaDeviceAttr attribute) {
  switch (attribute) {
  case cudaDevAttrComputeCapabilityMajor:
    return devices.major;
  case cudaDevAttrComputeCapabilityMinor:
    return devices.minor;
  case cudaDevAttrMaxSharedMemoryPerBlockOptin:
    return devices.sharedBytes;
  case cudaDevAttrMaxSharedMemoryPerBlock:
    return SHARED_BYTES;
  case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
    return devices.sharedBytes + 1024;
  case cudaDevAttrMultiProcessorCount:
    return devices.multiprocessors;
  case cudaDevAttrMaxThreadsPerBlock:
    return MAX_THREADS;
  case cudaDevAttrMaxThreadsPerMultiProcessor:
    return 2 * MAX_THREADS;
  case cudaDevAttrWarpSize:
    return 32;
  case cudaDevAttrClockRate:
    return 1000000;
  case cudaDevAttrManagedMemory:
  case cudaDevAttrConcurrentManagedAccess:
  case cudaDevAttrCanMapHostMemory:
  case cudaDevAttrUnifiedAddressing:
  case cudaDevAttrConcurrentKernels:
  case cudaDevAttrMemoryPoolsSupported:
  case cudaDevAttrCooperativeLaunch:
  case cudaDevAttrHostNativeAtomicSupported:
    return 1;
  default:
    return 0;
  }
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  if (!device_is_there(device)) return runtime_error(cudaErrorInvalidDevice);
  *value = device_attribute(attribute);
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
  if (!device_is_there(device)) return runtime_error(cudaErrorInvalidDevice);
  *properties = (struct cudaDeviceProp){
      .totalGlobalMem = runtimeMemoryTotal,
      .sharedMemPerBlock = SHARED_BYTES,
      .sharedMemPerBlockOptin = (size_t)devices.sharedBytes,
      .sharedMemPerMultiprocessor = (size_t)devices.sharedBytes + 1024,
      .warpSize = 32,
      .maxThreadsPerBlock = MAX_THREADS,
      .maxThreadsDim = {MAX_THREADS, MAX_THREADS, MAX_THREADS_Z},
      .maxGridSize = {INT32_MAX, MAX_GRID_YZ, MAX_GRID_YZ},
      .maxThreadsPerMultiProcessor = 2 * MAX_THREADS,
      .major = devices.major,
      .minor = devices.minor,
      .multiProcessorCount = devices.multiprocessors,
      .managedMemory = 1,
      .canMapHostMemory = 1,
      .unifiedAddressing = 1,
      .concurrentKernels = 1,
      .pciBusID = device + 1,
  };
  snprintf(properties->name, sizeof(properties->name), "emulated GPU");
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int bytes, int device) {
  if (!device_is_there(device)) return runtime_error(cudaErrorInvalidDevice);
  int needed = snprintf(text, bytes > 0 ? (size_t)bytes : 0, "0000:%02x:00.0", (unsigned)device + 1);
  return runtime_error(needed < bytes ? cudaSuccess : cudaErrorInvalidValue);
}

/* ---- peers; what kernels of one device may reach of another is not looked at ---- */

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
  return runtime_error((cudaError_t)cuDeviceCanAccessPeer(can, device, peer)); /* the numbers are the same */
}

/* Of the current device to the peer's memory. */
static cudaError_t peer_change(int peer, bool isAllowed, unsigned flags) {
  CUcontext context;
  (void)runtime_device();
  CUresult status = cuDevicePrimaryCtxRetain(&context, peer);
  if (status != CUDA_SUCCESS) return runtime_error((cudaError_t)status);
  status = isAllowed ? cuCtxEnablePeerAccess(context, flags) : cuCtxDisablePeerAccess(context);
  (void)cuDevicePrimaryCtxRelease(peer);
  return runtime_error((cudaError_t)status);
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned int flags) {
  return peer_change(peer, true, flags);
}

cudaError_t cudaDeviceDisablePeerAccess(int peer) {
  return peer_change(peer, false, 0);
}

/* ---- kernels ---- */

/* Shared memory that kernels have asked for on a device, by their addresses. */
typedef struct functionLimit {
  struct functionLimit *next;
  const void *function;
  int device;
  size_t bytes;
} functionLimit_t;

static pthread_mutex_t functionLock = PTHREAD_MUTEX_INITIALIZER;
static functionLimit_t *functionLimits;

/* Under the lock; null: it has asked for none. */
static functionLimit_t *function_find_limit(const void *function, int device) {
  functionLimit_t *limit = functionLimits;
  while (limit && (limit->function != function || limit->device != device)) limit = limit->next;
  return limit;
}

static void function_set_limit(const void *function, int device, size_t bytes) {
  (void)pthread_mutex_lock(&functionLock);
  functionLimit_t *limit = function_find_limit(function, device);
  if (!limit) {
    limit = runtime_allocate(sizeof(*limit));
    limit->function = function;
    limit->device = device;
    limit->next = functionLimits;
    functionLimits = limit;
  }
  limit->bytes = bytes;
  (void)pthread_mutex_unlock(&functionLock);
}

static size_t function_limit(const void *function, int device) {
  (void)pthread_mutex_lock(&functionLock);
  const functionLimit_t *limit = function_find_limit(function, device);
  size_t bytes = limit && limit->bytes > SHARED_BYTES ? limit->bytes : SHARED_BYTES;
  (void)pthread_mutex_unlock(&functionLock);
  return bytes;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
  if (!emulated_kernel_find(function)) return runtime_error(cudaErrorInvalidDeviceFunction);
  *attributes = (struct cudaFuncAttributes){
      .maxThreadsPerBlock = MAX_THREADS,
      .maxDynamicSharedSizeBytes = (int)function_limit(function, runtime_device()),
      .ptxVersion = 10 * devices.major + devices.minor,
      .binaryVersion = 10 * devices.major + devices.minor,
  };
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value) {
  (void)runtime_devices();
  if (!emulated_kernel_find(function)) return runtime_error(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > devices.sharedBytes)
    return runtime_error(cudaErrorInvalidValue);
  function_set_limit(function, runtime_device(), (size_t)value);
  return cudaSuccess;
}

/* The arguments lie behind it, each where its type may. */
typedef struct {
  const emulatedKernel_t *kernel;
  dim3 grid, block;
  size_t sharedBytes;
  void *arguments[EMULATED_MAX_ARGUMENTS];
} launch_t;

static void launch_run(void *argument) {
  const launch_t *launch = argument;
  emulated_grid_run(launch->kernel, launch->grid, launch->block, launch->sharedBytes, launch->arguments);
}

static size_t align_up(size_t at, size_t alignment) {
  return alignment > 1 ? (at + alignment - 1) / alignment * alignment : at;
}

/* Where argument i lies in the task, after one that ends at `at`. */
static size_t launch_place(const emulatedKernel_t *kernel, int i, size_t at) {
  return align_up(at, kernel->alignment[i]);
}

static runtimeTask_t *launch_make(const emulatedKernel_t *kernel, void *const *arguments) {
  size_t at = sizeof(launch_t);
  for (int i = 0; i < kernel->nArguments; i++) at = launch_place(kernel, i, at) + kernel->bytes[i];
  runtimeTask_t *task = runtime_task_make(launch_run, NULL, at);
  launch_t *launch = (launch_t *)(void *)task->argument;
  *launch = (launch_t){.kernel = kernel};
  at = sizeof(launch_t);
  for (int i = 0; i < kernel->nArguments; i++) {
    at = launch_place(kernel, i, at);
    launch->arguments[i] = task->argument + at;
    memcpy(task->argument + at, arguments[i], kernel->bytes[i]);
    at += kernel->bytes[i];
  }
  return task;
}

static bool launch_fits(dim3 grid, dim3 block) {
  uint64_t threads = (uint64_t)block.x * block.y * block.z;
  return grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= INT32_MAX && grid.y <= MAX_GRID_YZ &&
         grid.z <= MAX_GRID_YZ && block.x <= MAX_THREADS && block.y <= MAX_THREADS &&
         block.z <= MAX_THREADS_Z && threads > 0 && threads <= MAX_THREADS;
}

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments,
                             size_t sharedBytes, cudaStream_t stream) {
  const emulatedKernel_t *kernel = emulated_kernel_find(function);
  int device = runtime_device();
  if (!kernel) return runtime_error(cudaErrorInvalidDeviceFunction);
  if (!launch_fits(grid, block)) return runtime_error(cudaErrorInvalidConfiguration);
  if (runtime_stream_device(stream) != device) return runtime_error(cudaErrorInvalidResourceHandle);
  if (sharedBytes > function_limit(function, device)) return runtime_error(cudaErrorInvalidValue);
  for (int i = 0; i < kernel->nArguments; i++)
    if (kernel->alignment[i] > RUNTIME_ARGUMENT_ALIGNMENT) return runtime_error(cudaErrorInvalidValue);
  runtimeTask_t *task = launch_make(kernel, arguments);
  launch_t *launch = (launch_t *)(void *)task->argument;
  launch->grid = grid;
  launch->block = block;
  launch->sharedBytes = sharedBytes;
  return runtime_error(runtime_enqueue(stream, task));
}

/* Kernels of a stream run one after another here, as they may where they are allowed to overlap. */
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) {
  for (unsigned i = 0; i < config->numAttrs; i++)
    if (config->attrs[i].id != cudaLaunchAttributeProgrammaticStreamSerialization)
      return runtime_error(cudaErrorNotSupported);
  return cudaLaunchKernel(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes,
                          config->stream);
}

/* ---- the driver's functions ---- */

static cudaError_t entry_point(const char *symbol, void **function,
                               enum cudaDriverEntryPointQueryResult *status) {
  *function = emulated_driver_find(symbol);
  if (status) *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPoint(const char *symbol, void **function, unsigned long long flags,
                                    enum cudaDriverEntryPointQueryResult *status) {
  (void)flags;
  return entry_point(symbol, function, status);
}

#if CUDART_VERSION >= 12050
cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned int version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *status) {
  (void)version;
  (void)flags;
  return entry_point(symbol, function, status);
}
#endif
