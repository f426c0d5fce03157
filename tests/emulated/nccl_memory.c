/* Windows and memory. */
#include "nccl_emulated.h"

#include "emulated.h"

#include <cuda.h>
#include <stdlib.h>
#include <string.h>

#define WINDOW_ALIGNMENT 4096
#define WINDOW_SYMMETRIC 1

/* ---- the driver ---- */

typedef struct {
  __typeof__(&cuMemGetAllocationGranularity) granularity;
  __typeof__(&cuMemCreate) create;
  __typeof__(&cuMemAddressReserve) reserve;
  __typeof__(&cuMemMap) map;
  __typeof__(&cuMemSetAccess) setAccess;
  __typeof__(&cuMemRelease) release;
  __typeof__(&cuMemUnmap) unmap;
  __typeof__(&cuMemAddressFree) addressFree;
  __typeof__(&cuMemRetainAllocationHandle) retain;
} driver_t;

static bool driver_find(driver_t *driver) {
  const struct {
    const char *name;
    void **slot;
  } wanted[] = {
      {"cuMemGetAllocationGranularity", (void **)&driver->granularity},
      {"cuMemCreate", (void **)&driver->create},
      {"cuMemAddressReserve", (void **)&driver->reserve},
      {"cuMemMap", (void **)&driver->map},
      {"cuMemSetAccess", (void **)&driver->setAccess},
      {"cuMemRelease", (void **)&driver->release},
      {"cuMemUnmap", (void **)&driver->unmap},
      {"cuMemAddressFree", (void **)&driver->addressFree},
      {"cuMemRetainAllocationHandle", (void **)&driver->retain},
  };
  for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++) {
    *wanted[i].slot = emulated_driver_find(wanted[i].name);
    if (!*wanted[i].slot) return false;
  }
  return true;
}

static bool memory_map(const driver_t *driver, CUmemGenericAllocationHandle handle, size_t bytes, int device,
                       CUdeviceptr *address) {
  const CUmemAccessDesc access = {.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device},
                                  .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  if (driver->reserve(address, bytes, 0, 0, 0) != CUDA_SUCCESS) return false;
  if (driver->map(*address, bytes, 0, handle, 0) == CUDA_SUCCESS) {
    if (driver->setAccess(*address, bytes, &access, 1) == CUDA_SUCCESS) return true;
    (void)driver->unmap(*address, bytes);
  }
  (void)driver->addressFree(*address, bytes);
  return false;
}

static bool memory_unmap(const driver_t *driver, void *base, size_t bytes) {
  CUdeviceptr address = (CUdeviceptr)(uintptr_t)base;
  return driver->unmap(address, bytes) == CUDA_SUCCESS && driver->addressFree(address, bytes) == CUDA_SUCCESS;
}

/* ---- windows ---- */

/* A window as one rank has it: every rank's memory, this one's, too, is mapped once more, so that it lives as
 * long as the window does. */
struct ncclWindow_vidmem {
  ncclWindow_t next; /* of the communicator */
  int nRanks;
  struct {
    char *base;
    size_t bytes;
    emulatedRange_t mapped;
  } peers[];
};

void nccl_window_free(ncclWindow_t window) {
  driver_t driver;
  bool isFound = driver_find(&driver);
  for (int r = 0; r < window->nRanks && isFound; r++)
    if (window->peers[r].mapped.base)
      (void)memory_unmap(&driver, window->peers[r].mapped.base, window->peers[r].mapped.bytes);
  free(window);
}

static bool window_map(ncclWindow_t window, int peer, const ncclJob_t *job, int device) {
  driver_t driver;
  emulatedRange_t range;
  CUmemGenericAllocationHandle handle;
  CUdeviceptr address = 0;
  if (!driver_find(&driver) || !emulated_range_find(job->buffer, &range) ||
      driver.retain(&handle, range.base) != CUDA_SUCCESS)
    return false;
  bool isMapped = memory_map(&driver, handle, range.bytes, device, &address);
  (void)driver.release(handle);
  if (!isMapped) return false;
  window->peers[peer].mapped.base = (void *)(uintptr_t)address;
  window->peers[peer].mapped.bytes = range.bytes;
  window->peers[peer].base = (char *)(uintptr_t)address + ((char *)job->buffer - (char *)range.base);
  window->peers[peer].bytes = job->bytes;
  return true;
}

/* All ranks' memory is symmetric, or none has a window. */
void nccl_windows_make(const ncclPlace_t *places, int n) {
  for (int r = 0; r < n; r++)
    if (!places[r].op->job->buffer) return;
  for (int r = 0; r < n; r++) {
    ncclWindow_t window = nccl_need(1, sizeof(*window) + (size_t)n * sizeof(window->peers[0]));
    bool isWhole = true;
    window->nRanks = n;
    for (int peer = 0; peer < n && isWhole; peer++)
      isWhole = window_map(window, peer, places[peer].op->job, places[r].comm->device);
    if (isWhole)
      places[r].op->job->made = window;
    else
      nccl_window_free(window);
  }
}

void nccl_window_add(ncclComm_t comm, ncclWindow_t window) {
  window->next = comm->windows;
  comm->windows = window;
}

void nccl_windows_free(ncclComm_t comm) {
  while (comm->windows) {
    ncclWindow_t window = comm->windows;
    comm->windows = window->next;
    nccl_window_free(window);
  }
}

static bool window_is_off(void) {
  const char *text = getenv("EMULATED_NCCL_WINDOWS");
  return text && strcmp(text, "0") == 0;
}

static bool window_is_symmetric(const void *buffer, size_t bytes, int flags) {
  emulatedRange_t range;
  if (!(flags & WINDOW_SYMMETRIC) || !emulated_range_find(buffer, &range) || range.kind != EMULATED_CUMEM)
    return false;
  size_t offset = (size_t)((const char *)buffer - (const char *)range.base);
  return bytes <= range.bytes - offset;
}

NCCL_EXPORT int ncclCommWindowRegister(ncclComm_t comm, void *buffer, size_t bytes, ncclWindow_t *window,
                                       int flags) {
  if (!buffer || (uintptr_t)buffer % WINDOW_ALIGNMENT != 0 || bytes == 0 || !window)
    return nccl_group_fail(nccl_fail(NCCL_INVALID_ARGUMENT, "a window's memory is null or not aligned"));
  int result = nccl_comm_use(comm);
  if (result != NCCL_SUCCESS) return nccl_group_fail(result);
  *window = NULL;
  if (window_is_off()) {
    nccl_comm_release(comm);
    return NCCL_SUCCESS;
  }
  return nccl_job_issue((ncclJob_t){.kind = NCCL_REGISTER,
                                    .comm = comm,
                                    .buffer = window_is_symmetric(buffer, bytes, flags) ? buffer : NULL,
                                    .bytes = bytes,
                                    .window = window});
}
NCCL_TWIN(ncclCommWindowRegister);

/* With the lock held. */
static bool window_take(ncclComm_t comm, ncclWindow_t window) {
  for (ncclWindow_t *link = &comm->windows; *link; link = &(*link)->next)
    if (*link == window) {
      *link = window->next;
      return true;
    }
  return false;
}

NCCL_EXPORT int ncclCommWindowDeregister(ncclComm_t comm, ncclWindow_t window) {
  bool isFound = false;
  if (!window) return NCCL_SUCCESS;
  nccl_lock();
  if (nccl_comm_hold(comm)) {
    isFound = window_take(comm, window);
    nccl_comm_drop(comm);
  }
  nccl_unlock();
  if (!isFound) return nccl_fail(NCCL_INVALID_ARGUMENT, "there is no such window");
  nccl_window_free(window);
  return NCCL_SUCCESS;
}
NCCL_TWIN(ncclCommWindowDeregister);

NCCL_EXPORT int ncclGetPeerDevicePointer(ncclWindow_t window, size_t offset, int peer, void **ptr) {
  int result = NCCL_INVALID_ARGUMENT;
  nccl_lock();
  for (ncclComm_t comm = ncclListed; comm && ptr; comm = comm->next)
    for (ncclWindow_t each = comm->windows; each; each = each->next) {
      if (each != window || peer < 0 || peer >= window->nRanks || offset >= window->peers[peer].bytes)
        continue;
      *ptr = window->peers[peer].base + offset;
      result = NCCL_SUCCESS;
    }
  nccl_unlock();
  return result == NCCL_SUCCESS ? result
                                : nccl_fail(result, "there is no such window, or no such place in it");
}
NCCL_TWIN(ncclGetPeerDevicePointer);

/* ---- memory ---- */

/* As NCCL allocates: shareable with other processes, in whole pages, mapped on one device. */
static void *memory_create(const driver_t *driver, size_t *bytes, int device) {
  const CUmemAllocationProp properties = {
      .type = CU_MEM_ALLOCATION_TYPE_PINNED,
      .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
      .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device},
  };
  size_t granule = 0;
  CUmemGenericAllocationHandle handle;
  CUdeviceptr address = 0;
  if (driver->granularity(&granule, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED) != CUDA_SUCCESS)
    return NULL;
  *bytes = (*bytes + granule - 1) / granule * granule;
  if (driver->create(&handle, *bytes, &properties, 0) != CUDA_SUCCESS) return NULL;
  bool isMapped = memory_map(driver, handle, *bytes, device, &address);
  (void)driver->release(handle); /* the mapping keeps it */
  return isMapped ? (void *)(uintptr_t)address : NULL;
}

/* Aligned as windows must be; the rest before it belongs to the allocation. */
static void *memory_malloc(size_t bytes) {
  void *base;
  if (cudaMalloc(&base, bytes + WINDOW_ALIGNMENT) != cudaSuccess) return NULL;
  size_t beyond = (uintptr_t)base % WINDOW_ALIGNMENT;
  return (char *)base + (beyond ? WINDOW_ALIGNMENT - beyond : 0);
}

/* Poisoned by the driver, for device memory is not zero, either. */
NCCL_EXPORT int ncclMemAlloc(void **ptr, size_t bytes) {
  driver_t driver;
  size_t unused, total;
  int device;
  if (!ptr) return nccl_fail(NCCL_INVALID_ARGUMENT, "there is no place for a pointer");
  if (cudaGetDevice(&device) != cudaSuccess || cudaMemGetInfo(&unused, &total) != cudaSuccess)
    return nccl_fail(NCCL_CUDA_ERROR, "there is no device");
  if (bytes > unused) return nccl_fail(NCCL_CUDA_ERROR, "out of memory");
  void *made = driver_find(&driver) && bytes > 0 ? memory_create(&driver, &bytes, device) : NULL;
  if (!made) made = memory_malloc(bytes);
  if (!made) return nccl_fail(NCCL_CUDA_ERROR, "out of memory");
  *ptr = made;
  return NCCL_SUCCESS;
}
NCCL_TWIN(ncclMemAlloc);

NCCL_EXPORT int ncclMemFree(void *ptr) {
  emulatedRange_t range;
  driver_t driver;
  if (!ptr) return NCCL_SUCCESS;
  if (!emulated_range_find(ptr, &range)) return nccl_fail(NCCL_INVALID_ARGUMENT, "there is no such memory");
  if (range.kind != EMULATED_CUMEM || !driver_find(&driver))
    return cudaFree(range.base) == cudaSuccess ? NCCL_SUCCESS : NCCL_CUDA_ERROR;
  return memory_unmap(&driver, range.base, range.bytes)
             ? NCCL_SUCCESS
             : nccl_fail(NCCL_CUDA_ERROR, "the memory was not freed");
}
NCCL_TWIN(ncclMemFree);
