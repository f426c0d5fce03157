#include "peer_memory.h"

#include "error.h"
#include "peer_socket.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <string.h>
#include <unistd.h>

_Static_assert(sizeof(CUipcMemHandle) == sizeof(((peerMemoryName_t *)0)->handle), "a name holds a handle");
_Static_assert(sizeof(CUmemFabricHandle) <= sizeof(((peerMemoryName_t *)0)->handle), "a name holds a handle");

/* ---- the driver: found at run time, libcuda is not linked ---- */

#define DRIVER_VERSION 12000 /* of the functions' ABI; cuda.h has no older one for any of them */

static struct {
  __typeof__(&cuGetErrorString) GetErrorString;
  __typeof__(&cuDeviceGetAttribute) DeviceGetAttribute;
  __typeof__(&cuDevicePrimaryCtxRetain) DevicePrimaryCtxRetain;
  __typeof__(&cuDevicePrimaryCtxRelease) DevicePrimaryCtxRelease;
  __typeof__(&cuCtxPushCurrent) CtxPushCurrent;
  __typeof__(&cuCtxPopCurrent) CtxPopCurrent;
  __typeof__(&cuCtxEnablePeerAccess) CtxEnablePeerAccess;
  __typeof__(&cuDeviceCanAccessPeer) DeviceCanAccessPeer;
  __typeof__(&cuPointerGetAttributes) PointerGetAttributes;
  __typeof__(&cuMemGetAddressRange) MemGetAddressRange;
  __typeof__(&cuMemAlloc) MemAlloc;
  __typeof__(&cuMemFree) MemFree;
  __typeof__(&cuIpcGetMemHandle) IpcGetMemHandle;
  __typeof__(&cuIpcOpenMemHandle) IpcOpenMemHandle;
  __typeof__(&cuIpcCloseMemHandle) IpcCloseMemHandle;
  __typeof__(&cuMemGetAllocationGranularity) MemGetAllocationGranularity;
  __typeof__(&cuMemCreate) MemCreate;
  __typeof__(&cuMemRelease) MemRelease;
  __typeof__(&cuMemRetainAllocationHandle) MemRetainAllocationHandle;
  __typeof__(&cuMemGetAllocationPropertiesFromHandle) MemGetAllocationPropertiesFromHandle;
  __typeof__(&cuMemExportToShareableHandle) MemExportToShareableHandle;
  __typeof__(&cuMemImportFromShareableHandle) MemImportFromShareableHandle;
  __typeof__(&cuMemAddressReserve) MemAddressReserve;
  __typeof__(&cuMemAddressFree) MemAddressFree;
  __typeof__(&cuMemMap) MemMap;
  __typeof__(&cuMemUnmap) MemUnmap;
  __typeof__(&cuMemSetAccess) MemSetAccess;
  __typeof__(&cuMemGetAccess) MemGetAccess;
} driver;

static const char *driverMissing; /* the first function not found */
static pthread_once_t driverOnce = PTHREAD_ONCE_INIT;

static void *driver_look_up(const char *name) {
  void *function = NULL;
  enum cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &function, DRIVER_VERSION, cudaEnableDefault, &found);
#else
  cudaError_t error = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? function : NULL;
}

static void driver_load(void) {
  const struct {
    const char *name;
    void **slot;
  } wanted[] = {
      {"cuGetErrorString", (void **)&driver.GetErrorString},
      {"cuDeviceGetAttribute", (void **)&driver.DeviceGetAttribute},
      {"cuDevicePrimaryCtxRetain", (void **)&driver.DevicePrimaryCtxRetain},
      {"cuDevicePrimaryCtxRelease", (void **)&driver.DevicePrimaryCtxRelease},
      {"cuCtxPushCurrent", (void **)&driver.CtxPushCurrent},
      {"cuCtxPopCurrent", (void **)&driver.CtxPopCurrent},
      {"cuCtxEnablePeerAccess", (void **)&driver.CtxEnablePeerAccess},
      {"cuDeviceCanAccessPeer", (void **)&driver.DeviceCanAccessPeer},
      {"cuPointerGetAttributes", (void **)&driver.PointerGetAttributes},
      {"cuMemGetAddressRange", (void **)&driver.MemGetAddressRange},
      {"cuMemAlloc", (void **)&driver.MemAlloc},
      {"cuMemFree", (void **)&driver.MemFree},
      {"cuIpcGetMemHandle", (void **)&driver.IpcGetMemHandle},
      {"cuIpcOpenMemHandle", (void **)&driver.IpcOpenMemHandle},
      {"cuIpcCloseMemHandle", (void **)&driver.IpcCloseMemHandle},
      {"cuMemGetAllocationGranularity", (void **)&driver.MemGetAllocationGranularity},
      {"cuMemCreate", (void **)&driver.MemCreate},
      {"cuMemRelease", (void **)&driver.MemRelease},
      {"cuMemRetainAllocationHandle", (void **)&driver.MemRetainAllocationHandle},
      {"cuMemGetAllocationPropertiesFromHandle", (void **)&driver.MemGetAllocationPropertiesFromHandle},
      {"cuMemExportToShareableHandle", (void **)&driver.MemExportToShareableHandle},
      {"cuMemImportFromShareableHandle", (void **)&driver.MemImportFromShareableHandle},
      {"cuMemAddressReserve", (void **)&driver.MemAddressReserve},
      {"cuMemAddressFree", (void **)&driver.MemAddressFree},
      {"cuMemMap", (void **)&driver.MemMap},
      {"cuMemUnmap", (void **)&driver.MemUnmap},
      {"cuMemSetAccess", (void **)&driver.MemSetAccess},
      {"cuMemGetAccess", (void **)&driver.MemGetAccess},
  };
  for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]) && !driverMissing; i++) {
    *wanted[i].slot = driver_look_up(wanted[i].name);
    if (!*wanted[i].slot) driverMissing = wanted[i].name;
  }
}

static ultraepResult_t driver_find(void) {
  (void)pthread_once(&driverOnce, driver_load);
  if (!driverMissing) return ultraepSuccess;
  return error_set(ultraepUnhandledCudaError, "peers' memory: the CUDA driver has no %s", driverMissing);
}

static const char *driver_text(CUresult status) {
  const char *text = NULL;
  return driver.GetErrorString(status, &text) == CUDA_SUCCESS && text ? text : "unknown error";
}

static ultraepResult_t driver_error(CUresult status, const char *what) {
  return error_set(status == CUDA_ERROR_OUT_OF_MEMORY ? ultraepSystemError : ultraepUnhandledCudaError,
                   "peers' memory: %s: %s", what, driver_text(status));
}

/* Makes the device's primary context current, over whatever was. It stays alive through its other users. */
static CUresult context_enter(int device) {
  CUcontext context;
  CUresult status = driver.DevicePrimaryCtxRetain(&context, device);
  if (status != CUDA_SUCCESS) return status;
  status = driver.CtxPushCurrent(context);
  if (status != CUDA_SUCCESS) (void)driver.DevicePrimaryCtxRelease(device);
  return status;
}

static void context_leave(int device) {
  CUcontext context;
  (void)driver.CtxPopCurrent(&context);
  (void)driver.DevicePrimaryCtxRelease(device);
}

bool peer_context_enter(int device) {
  return driver_find() == ultraepSuccess && context_enter(device) == CUDA_SUCCESS;
}

void peer_context_leave(int device) {
  context_leave(device);
}

static CUdeviceptr driver_pointer(const void *ptr) {
  return (CUdeviceptr)(uintptr_t)ptr;
}

/* ---- looking at memory ---- */

/* What the driver knows of a pointer. */
typedef struct {
  CUmemorytype type; /* 0: nothing */
  unsigned isManaged;
  int device;
  unsigned long long bufferId;
  CUmemoryPool pool;
  unsigned isIpcCapable;
} memoryFacts_t;

static CUresult memory_facts(CUdeviceptr ptr, memoryFacts_t *facts) {
  CUpointer_attribute wanted[] = {
      CU_POINTER_ATTRIBUTE_MEMORY_TYPE,    CU_POINTER_ATTRIBUTE_IS_MANAGED,
      CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, CU_POINTER_ATTRIBUTE_BUFFER_ID,
      CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE, CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE};
  *facts = (memoryFacts_t){0};
  void *values[] = {&facts->type,     &facts->isManaged, &facts->device,
                    &facts->bufferId, &facts->pool,      &facts->isIpcCapable};
  return driver.PointerGetAttributes(sizeof(wanted) / sizeof(wanted[0]), wanted, values, ptr);
}

/* The driver may know of no memory but that of the current context's device: then the memory's own is
 * borrowed, as by a thread without one. */
static CUresult memory_range(CUdeviceptr ptr, int device, CUdeviceptr *base, size_t *bytes) {
  CUresult status = driver.MemGetAddressRange(base, bytes, ptr);
  if (status == CUDA_SUCCESS) return status;
  status = context_enter(device);
  if (status != CUDA_SUCCESS) return status;
  status = driver.MemGetAddressRange(base, bytes, ptr);
  context_leave(device);
  return status;
}

static ultraepResult_t memory_look(const void *ptr, memoryFacts_t *facts, CUdeviceptr *base, size_t *bytes) {
  ultraepResult_t result = driver_find();
  if (result != ultraepSuccess) return result;
  CUresult status = memory_facts(driver_pointer(ptr), facts);
  if (status != CUDA_SUCCESS && status != CUDA_ERROR_INVALID_VALUE)
    return driver_error(status, "cuPointerGetAttributes");
  if (status != CUDA_SUCCESS || facts->type == 0 || facts->bufferId == 0)
    return error_set(ultraepInvalidArgument, "%p is not CUDA's memory", ptr);
  status = memory_range(driver_pointer(ptr), facts->device, base, bytes);
  if (status == CUDA_SUCCESS) return ultraepSuccess;
  if (status == CUDA_ERROR_INVALID_VALUE || status == CUDA_ERROR_NOT_FOUND)
    return error_set(ultraepInvalidArgument, "%p is in no allocation of CUDA's", ptr);
  return driver_error(status, "cuMemGetAddressRange");
}

ultraepResult_t peer_memory_look(const void *ptr, uint64_t *base, uint64_t *bytes, uint64_t *bufferId) {
  memoryFacts_t facts;
  CUdeviceptr start;
  size_t size;
  ultraepResult_t result = memory_look(ptr, &facts, &start, &size);
  if (result != ultraepSuccess) return result;
  *base = start;
  *bytes = size;
  *bufferId = facts.bufferId;
  return ultraepSuccess;
}

bool peer_memory_is_mine(const peerMemoryName_t *name) {
  return name->pid == (int32_t)getpid() && name->host == peer_host_id();
}

bool peer_memory_is_alive(const peerMemoryName_t *name) {
  memoryFacts_t facts;
  CUdeviceptr base;
  size_t bytes;
  /* Not by peer_memory_look: that memory is gone is an answer here, not an error to record. */
  return name->kind != PEER_MEMORY_NONE && peer_memory_is_mine(name) && driver_find() == ultraepSuccess &&
         memory_facts(name->base, &facts) == CUDA_SUCCESS && facts.bufferId == name->bufferId &&
         memory_range(name->base, facts.device, &base, &bytes) == CUDA_SUCCESS && base == name->base &&
         bytes == name->bytes;
}

/* ---- describing ---- */

/* A fabric handle that this process itself cannot open will do for nobody. */
static bool describe_fabric(CUmemGenericAllocationHandle memory, peerMemoryName_t *name) {
  CUmemFabricHandle handle;
  CUmemGenericAllocationHandle again;
  if (driver.MemExportToShareableHandle(&handle, memory, CU_MEM_HANDLE_TYPE_FABRIC, 0) != CUDA_SUCCESS ||
      driver.MemImportFromShareableHandle(&again, &handle, CU_MEM_HANDLE_TYPE_FABRIC) != CUDA_SUCCESS)
    return false;
  (void)driver.MemRelease(again);
  memcpy(name->handle, &handle, sizeof(handle));
  name->kind = PEER_MEMORY_FABRIC;
  return true;
}

static ultraepResult_t describe_cumem(CUmemGenericAllocationHandle memory, peerMemoryName_t *name, int *fd) {
  CUmemAllocationProp properties;
  CUresult status = driver.MemGetAllocationPropertiesFromHandle(&properties, memory);
  if (status != CUDA_SUCCESS) return driver_error(status, "cuMemGetAllocationPropertiesFromHandle");
  if (properties.location.type != CU_MEM_LOCATION_TYPE_DEVICE) return ultraepSuccess;
  int types = (int)properties.requestedHandleTypes;
  if ((types & CU_MEM_HANDLE_TYPE_FABRIC) && describe_fabric(memory, name)) return ultraepSuccess;
  if (!(types & CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)) return ultraepSuccess;
  int made = -1;
  status = driver.MemExportToShareableHandle(&made, memory, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
  if (status != CUDA_SUCCESS) return driver_error(status, "cuMemExportToShareableHandle");
  *fd = made;
  name->kind = PEER_MEMORY_FD;
  return ultraepSuccess;
}

static ultraepResult_t describe_ipc(const memoryFacts_t *facts, peerMemoryName_t *name) {
  CUipcMemHandle handle;
  CUresult status = context_enter(facts->device);
  if (status != CUDA_SUCCESS) return driver_error(status, "a context");
  status = driver.IpcGetMemHandle(&handle, name->base);
  context_leave(facts->device);
  if (status == CUDA_ERROR_INVALID_VALUE || status == CUDA_ERROR_NOT_SUPPORTED) return ultraepSuccess;
  if (status != CUDA_SUCCESS) return driver_error(status, "cuIpcGetMemHandle");
  memcpy(name->handle, &handle, sizeof(handle));
  name->kind = PEER_MEMORY_IPC;
  return ultraepSuccess;
}

ultraepResult_t peer_memory_describe(const void *ptr, peerMemoryName_t *name, int *fd) {
  ultraepResult_t result = driver_find();
  if (result != ultraepSuccess) return result;
  peerMemoryName_t made = {.kind = PEER_MEMORY_NONE, .pid = (int32_t)getpid(), .host = peer_host_id()};
  int madeFd = -1;
  memoryFacts_t facts;
  CUdeviceptr base = 0;
  size_t bytes = 0;
  CUmemGenericAllocationHandle memory;
  CUresult status = memory_facts(driver_pointer(ptr), &facts);
  if (status != CUDA_SUCCESS && status != CUDA_ERROR_INVALID_VALUE)
    return driver_error(status, "cuPointerGetAttributes");
  if (status == CUDA_SUCCESS && facts.type == CU_MEMORYTYPE_DEVICE && !facts.isManaged && !facts.pool) {
    result = memory_look(ptr, &facts, &base, &bytes);
    if (result != ultraepSuccess) return result;
    made.base = base;
    made.bytes = bytes;
    made.bufferId = facts.bufferId;
    if (driver.MemRetainAllocationHandle(&memory, (void *)(uintptr_t)ptr) == CUDA_SUCCESS) {
      result = describe_cumem(memory, &made, &madeFd);
      (void)driver.MemRelease(memory);
    } else if (facts.isIpcCapable) {
      result = describe_ipc(&facts, &made);
    }
  }
  if (result != ultraepSuccess) return result;
  *name = made;
  *fd = madeFd;
  return ultraepSuccess;
}

/* ---- mapping ---- */

/* Threads that map and unmap the same allocations one beside the other have met a double free in cuMemUnmap
 * (driver 580): one at a time. */
static pthread_mutex_t mapLock = PTHREAD_MUTEX_INITIALIZER;

static void map_end_cumem(CUdeviceptr base, size_t bytes) {
  pthread_mutex_lock(&mapLock);
  (void)driver.MemUnmap(base, bytes);
  (void)driver.MemAddressFree(base, bytes);
  pthread_mutex_unlock(&mapLock);
}

static ultraepResult_t map_out_of_reach(const char *how, CUresult status) {
  return error_set(ultraepInvalidUsage, "another rank's memory cannot be reached from this device (%s: %s)",
                   how, driver_text(status));
}

static CUresult map_allow(CUdeviceptr base, size_t bytes, int device) {
  CUmemAccessDesc access = {.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device},
                            .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  return driver.MemSetAccess(base, bytes, &access, 1);
}

/* The pointer is good already where owner and mapper share the device; else it is made good. */
static ultraepResult_t map_process(const peerMemoryName_t *name, int device) {
  memoryFacts_t facts;
  CUmemGenericAllocationHandle memory;
  CUresult status = memory_facts(name->base, &facts);
  if (status != CUDA_SUCCESS || facts.bufferId != name->bufferId)
    return error_set(ultraepInvalidUsage, "another rank's memory was freed before it was mapped");
  if (facts.device == device) return ultraepSuccess;
  if (driver.MemRetainAllocationHandle(&memory, (void *)(uintptr_t)name->base) == CUDA_SUCCESS) {
    (void)driver.MemRelease(memory);
    unsigned long long flags = 0;
    CUmemLocation location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device};
    if (driver.MemGetAccess(&flags, &location, name->base) == CUDA_SUCCESS &&
        flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE)
      return ultraepSuccess;
    status = map_allow(name->base, name->bytes, device);
    return status == CUDA_SUCCESS ? ultraepSuccess : map_out_of_reach("cuMemSetAccess", status);
  }
  int can = 0;
  status = driver.DeviceCanAccessPeer(&can, device, facts.device);
  if (status == CUDA_SUCCESS && !can) status = CUDA_ERROR_PEER_ACCESS_UNSUPPORTED;
  CUcontext owner;
  if (status == CUDA_SUCCESS) status = driver.DevicePrimaryCtxRetain(&owner, facts.device);
  if (status != CUDA_SUCCESS) return map_out_of_reach("cuDeviceCanAccessPeer", status);
  status = context_enter(device);
  if (status == CUDA_SUCCESS) {
    status = driver.CtxEnablePeerAccess(owner, 0);
    context_leave(device);
  }
  (void)driver.DevicePrimaryCtxRelease(facts.device);
  if (status == CUDA_SUCCESS || status == CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED) return ultraepSuccess;
  return map_out_of_reach("cuCtxEnablePeerAccess", status);
}

static ultraepResult_t map_ipc(const peerMemoryName_t *name, int device, CUdeviceptr *base) {
  CUipcMemHandle handle;
  memcpy(&handle, name->handle, sizeof(handle));
  CUresult status = context_enter(device);
  if (status != CUDA_SUCCESS) return driver_error(status, "a context");
  status = driver.IpcOpenMemHandle(base, handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
  context_leave(device);
  return status == CUDA_SUCCESS ? ultraepSuccess : map_out_of_reach("cuIpcOpenMemHandle", status);
}

/* A reference to the memory behind a name: this process's own, or imported. */
static ultraepResult_t map_refer(const peerMemoryName_t *name, int fd, CUmemGenericAllocationHandle *memory) {
  CUmemFabricHandle fabric;
  CUresult status;
  if (peer_memory_is_mine(name)) {
    if (!peer_memory_is_alive(name))
      return error_set(ultraepInvalidUsage, "another rank's memory was freed before it was mapped");
    status = driver.MemRetainAllocationHandle(memory, (void *)(uintptr_t)name->base);
    return status == CUDA_SUCCESS ? ultraepSuccess : driver_error(status, "cuMemRetainAllocationHandle");
  }
  if (name->kind == PEER_MEMORY_FD) {
    if (fd < 0) return error_set(ultraepInternalError, "peers' memory: no file descriptor to map");
    status = driver.MemImportFromShareableHandle(memory, (void *)(uintptr_t)fd,
                                                 CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
  } else {
    memcpy(&fabric, name->handle, sizeof(fabric));
    status = driver.MemImportFromShareableHandle(memory, &fabric, CU_MEM_HANDLE_TYPE_FABRIC);
  }
  return status == CUDA_SUCCESS ? ultraepSuccess : map_out_of_reach("cuMemImportFromShareableHandle", status);
}

/* The mapping keeps the memory; the handle is not needed for that. */
static ultraepResult_t map_cumem(const peerMemoryName_t *name, int fd, int device, CUdeviceptr *base) {
  CUmemGenericAllocationHandle memory;
  CUdeviceptr made = 0;
  ultraepResult_t result = map_refer(name, fd, &memory);
  if (result != ultraepSuccess) return result;
  CUresult status;
  const char *how = "cuMemAddressReserve";
  status = driver.MemAddressReserve(&made, name->bytes, 0, 0, 0);
  if (status != CUDA_SUCCESS) goto release_memory;
  how = "cuMemMap";
  status = driver.MemMap(made, name->bytes, 0, memory, 0);
  if (status != CUDA_SUCCESS) goto free_address;
  how = "cuMemSetAccess";
  status = map_allow(made, name->bytes, device);
  if (status != CUDA_SUCCESS) goto unmap_memory;
  (void)driver.MemRelease(memory);
  *base = made;
  return ultraepSuccess;

unmap_memory:
  (void)driver.MemUnmap(made, name->bytes);
free_address:
  (void)driver.MemAddressFree(made, name->bytes);
release_memory:
  (void)driver.MemRelease(memory);
  return map_out_of_reach(how, status);
}

static ultraepResult_t map_as(uint32_t kind, const peerMemoryName_t *name, int fd, int device,
                              peerMapping_t *mapping) {
  ultraepResult_t result = driver_find();
  if (result != ultraepSuccess) return result;
  CUdeviceptr base = name->base;
  switch (kind) {
  case PEER_MEMORY_PROCESS:
    result = peer_memory_is_mine(name)
                 ? map_process(name, device)
                 : error_set(ultraepInvalidUsage, "memory of another process has no way out of it");
    break;
  case PEER_MEMORY_IPC:
    result = map_ipc(name, device, &base);
    break;
  case PEER_MEMORY_FD:
  case PEER_MEMORY_FABRIC:
    result = map_cumem(name, fd, device, &base);
    break;
  default:
    result =
        error_set(ultraepInvalidUsage, "another rank's memory cannot be shared: it must be cudaMalloc's, "
                                       "ncclMemAlloc's or other cuMem memory with an exportable handle");
  }
  if (result != ultraepSuccess) return result;
  *mapping =
      (peerMapping_t){.base = (void *)(uintptr_t)base, .bytes = name->bytes, .kind = kind, .device = device};
  return ultraepSuccess;
}

static ultraepResult_t map_alone(uint32_t kind, const peerMemoryName_t *name, int fd, int device,
                                 peerMapping_t *mapping) {
  pthread_mutex_lock(&mapLock);
  ultraepResult_t result = map_as(kind, name, fd, device, mapping);
  pthread_mutex_unlock(&mapLock);
  return result;
}

ultraepResult_t peer_memory_map(const peerMemoryName_t *name, int fd, int device, peerMapping_t *mapping) {
  bool isOwn = name->kind != PEER_MEMORY_NONE && peer_memory_is_mine(name);
  return map_alone(isOwn ? PEER_MEMORY_PROCESS : name->kind, name, fd, device, mapping);
}

ultraepResult_t peer_memory_map_kept(const peerMemoryName_t *name, int fd, int device,
                                     peerMapping_t *mapping) {
  /* cudaIpc does not open what its own process made. */
  if (name->kind == PEER_MEMORY_IPC) return peer_memory_map(name, fd, device, mapping);
  return map_alone(name->kind, name, fd, device, mapping);
}

void peer_memory_unmap(peerMapping_t *mapping) {
  CUdeviceptr base = driver_pointer(mapping->base);
  if (mapping->kind == PEER_MEMORY_IPC && context_enter(mapping->device) == CUDA_SUCCESS) {
    (void)driver.IpcCloseMemHandle(base);
    context_leave(mapping->device);
  }
  if (mapping->kind == PEER_MEMORY_FD || mapping->kind == PEER_MEMORY_FABRIC)
    map_end_cumem(base, mapping->bytes);
  *mapping = (peerMapping_t){.kind = PEER_MEMORY_NONE};
}

/* ---- memory to share ---- */

/* With fabric handles if the driver gives them: on machines without a fabric it refuses when asked to. */
static CUresult alloc_create(int device, size_t bytes, CUmemGenericAllocationHandle *memory,
                             size_t *rounded) {
  int hasFabric = 0;
  size_t unit = 0;
  CUmemAllocationProp properties = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                    .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device}};
  (void)driver.DeviceGetAttribute(&hasFabric, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED, device);
  for (int fabric = hasFabric ? 1 : 0;; fabric = 0) {
    int types = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR | (fabric ? CU_MEM_HANDLE_TYPE_FABRIC : 0);
    properties.requestedHandleTypes = (CUmemAllocationHandleType)types;
    CUresult status =
        driver.MemGetAllocationGranularity(&unit, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
    if (status == CUDA_SUCCESS && (unit == 0 || bytes > SIZE_MAX - unit)) return CUDA_ERROR_OUT_OF_MEMORY;
    if (status == CUDA_SUCCESS) {
      *rounded = (bytes + unit - 1) / unit * unit;
      status = driver.MemCreate(memory, *rounded, &properties, 0);
    }
    if (status == CUDA_SUCCESS || status == CUDA_ERROR_OUT_OF_MEMORY || !fabric) return status;
  }
}

static CUresult alloc_cumem(int device, size_t bytes, CUdeviceptr *base, size_t *all) {
  CUmemGenericAllocationHandle memory;
  CUdeviceptr made = 0;
  size_t rounded = 0;
  CUresult status = alloc_create(device, bytes, &memory, &rounded);
  if (status != CUDA_SUCCESS) return status;
  status = driver.MemAddressReserve(&made, rounded, 0, 0, 0);
  if (status != CUDA_SUCCESS) goto release_memory;
  status = driver.MemMap(made, rounded, 0, memory, 0);
  if (status != CUDA_SUCCESS) goto free_address;
  status = map_allow(made, rounded, device);
  if (status != CUDA_SUCCESS) goto unmap_memory;
  (void)driver.MemRelease(memory); /* the mapping keeps it */
  *base = made;
  *all = rounded;
  return CUDA_SUCCESS;

unmap_memory:
  (void)driver.MemUnmap(made, rounded);
free_address:
  (void)driver.MemAddressFree(made, rounded);
release_memory:
  (void)driver.MemRelease(memory);
  return status;
}

/* Whether handles come out of it, which a sandbox may forbid. */
static bool alloc_is_shareable(CUdeviceptr base) {
  CUmemGenericAllocationHandle memory;
  peerMemoryName_t name = {.kind = PEER_MEMORY_NONE};
  int fd = -1;
  if (driver.MemRetainAllocationHandle(&memory, (void *)(uintptr_t)base) != CUDA_SUCCESS) return false;
  ultraepResult_t result = describe_cumem(memory, &name, &fd);
  (void)driver.MemRelease(memory);
  if (fd >= 0) (void)close(fd);
  return result == ultraepSuccess && name.kind != PEER_MEMORY_NONE;
}

ultraepResult_t peer_memory_alloc(int device, size_t bytes, void **ptr) {
  CUdeviceptr base = 0;
  int hasCumem = 0, hasFd = 0;
  ultraepResult_t result = driver_find();
  if (result != ultraepSuccess) return result;
  (void)driver.DeviceGetAttribute(&hasCumem, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device);
  (void)driver.DeviceGetAttribute(&hasFd, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
                                  device);
  size_t all = 0;
  CUresult status = CUDA_ERROR_NOT_SUPPORTED;
  if (hasCumem && hasFd) {
    pthread_mutex_lock(&mapLock);
    status = alloc_cumem(device, bytes, &base, &all);
    pthread_mutex_unlock(&mapLock);
  }
  if (status == CUDA_SUCCESS && !alloc_is_shareable(base)) {
    map_end_cumem(base, all);
    status = CUDA_ERROR_NOT_SUPPORTED;
  }
  if (status != CUDA_SUCCESS && status != CUDA_ERROR_OUT_OF_MEMORY) {
    status = context_enter(device);
    if (status != CUDA_SUCCESS) return driver_error(status, "a context");
    status = driver.MemAlloc(&base, bytes);
    context_leave(device);
  }
  if (status != CUDA_SUCCESS)
    return error_set(ultraepSystemError, "no device memory: %zu bytes asked for (%s)", bytes,
                     driver_text(status));
  *ptr = (void *)(uintptr_t)base;
  return ultraepSuccess;
}

void peer_memory_free(void *ptr) {
  memoryFacts_t facts;
  CUmemGenericAllocationHandle memory;
  CUdeviceptr base;
  size_t bytes;
  if (!ptr || memory_look(ptr, &facts, &base, &bytes) != ultraepSuccess) return;
  if (driver.MemRetainAllocationHandle(&memory, ptr) == CUDA_SUCCESS) {
    (void)driver.MemRelease(memory);
    map_end_cumem(base, bytes);
  } else if (context_enter(facts.device) == CUDA_SUCCESS) {
    (void)driver.MemFree(base);
    context_leave(facts.device);
  }
}
