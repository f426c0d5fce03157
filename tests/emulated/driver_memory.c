/* The emulated CUDA driver: cuMem. Memory is a memory file, so that processes share it for real by file
 * descriptors; a reservation is addresses that nobody may touch, a mapping is the file mapped over them. */
#include "driver.h"
#include "runtime.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static const size_t cumemUnit = 64 << 10;

/* Physical memory; its address is the handle. */
typedef struct cumemMemory {
  struct cumemMemory *next;
  int refs; /* of handles and of mappings */
  int fd;
  size_t bytes, taken; /* taken: of a device, 0 where another process made it */
  CUmemAllocationProp properties;
} cumemMemory_t;

typedef struct cumemMapping {
  struct cumemMapping *next;
  char *base;
  size_t bytes;
  cumemMemory_t *memory;
  unsigned readers, writers; /* bits: devices */
} cumemMapping_t;

typedef struct cumemReservation {
  struct cumemReservation *next;
  char *base;
  size_t bytes;
} cumemReservation_t;

static struct {
  pthread_mutex_t lock;
  cumemMemory_t *memories;
  cumemMapping_t *mappings;
  cumemReservation_t *reservations;
} cumem = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void cumem_lock(void) {
  (void)pthread_mutex_lock(&cumem.lock);
}

static CUresult cumem_unlock(CUresult result) {
  (void)pthread_mutex_unlock(&cumem.lock);
  return result;
}

static char *cumem_address(CUdeviceptr ptr) {
  return (char *)(uintptr_t)ptr;
}

static bool cumem_is_whole(size_t bytes) {
  return bytes > 0 && bytes % cumemUnit == 0;
}

/* ---- memory; under the lock ---- */

static cumemMemory_t *memory_find(CUmemGenericAllocationHandle handle) {
  cumemMemory_t *memory = cumem.memories;
  while (memory && (uintptr_t)memory != handle) memory = memory->next;
  return memory;
}

static CUmemGenericAllocationHandle memory_add(int fd, size_t bytes, size_t taken,
                                               const CUmemAllocationProp *properties) {
  cumemMemory_t *made = runtime_allocate(sizeof(*made));
  *made = (cumemMemory_t){
      .next = cumem.memories, .refs = 1, .fd = fd, .bytes = bytes, .taken = taken, .properties = *properties};
  cumem.memories = made;
  runtime_memory_take(taken);
  return (uintptr_t)made;
}

static void memory_drop(cumemMemory_t *memory) {
  cumemMemory_t **at = &cumem.memories;
  if (--memory->refs > 0) return;
  while (*at != memory) at = &(*at)->next;
  *at = memory->next;
  runtime_memory_give(memory->taken);
  (void)close(memory->fd);
  free(memory);
}

static cumemMapping_t *mapping_find(const char *ptr) {
  cumemMapping_t *mapping = cumem.mappings;
  while (mapping && (ptr < mapping->base || ptr >= mapping->base + mapping->bytes)) mapping = mapping->next;
  return mapping;
}

/* ---- making ---- */

static CUresult properties_check(const CUmemAllocationProp *properties) {
  if (!properties || properties->type != CU_MEM_ALLOCATION_TYPE_PINNED ||
      properties->location.type != CU_MEM_LOCATION_TYPE_DEVICE)
    return CUDA_ERROR_INVALID_VALUE;
  if (!driver_is_device(properties->location.id)) return CUDA_ERROR_INVALID_DEVICE;
  unsigned others = (unsigned)properties->requestedHandleTypes & ~CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  return others ? CUDA_ERROR_NOT_SUPPORTED : CUDA_SUCCESS;
}

CUresult cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *properties,
                                       CUmemAllocationGranularity_flags option) {
  (void)option;
  CUresult result = properties_check(properties);
  if (result == CUDA_SUCCESS) *bytes = cumemUnit;
  return result;
}

static bool cumem_poison(int fd, size_t bytes) {
  void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED) return false;
  runtime_poison(base, bytes);
  return munmap(base, bytes) == 0;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t bytes,
                     const CUmemAllocationProp *properties, unsigned long long flags) {
  CUresult result = properties_check(properties);
  if (result == CUDA_SUCCESS && (!cumem_is_whole(bytes) || flags != 0)) result = CUDA_ERROR_INVALID_VALUE;
  if (result == CUDA_SUCCESS && bytes > runtime_memory_unused()) result = CUDA_ERROR_OUT_OF_MEMORY;
  if (result != CUDA_SUCCESS) return result;
  int fd = runtime_file_make(bytes);
  if (fd < 0) return CUDA_ERROR_OUT_OF_MEMORY;
  if (!cumem_poison(fd, bytes)) {
    (void)close(fd);
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  cumem_lock();
  *handle = memory_add(fd, bytes, bytes, properties);
  return cumem_unlock(CUDA_SUCCESS);
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  cumem_lock();
  cumemMemory_t *memory = memory_find(handle);
  if (memory) memory_drop(memory);
  return cumem_unlock(memory ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE);
}

CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle *handle, void *address) {
  cumem_lock();
  const cumemMapping_t *mapping = mapping_find(address);
  if (mapping) {
    mapping->memory->refs++;
    *handle = (uintptr_t)mapping->memory;
  }
  return cumem_unlock(mapping ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE);
}

CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp *properties,
                                                CUmemGenericAllocationHandle handle) {
  cumem_lock();
  const cumemMemory_t *memory = memory_find(handle);
  if (memory) *properties = memory->properties;
  return cumem_unlock(memory ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE);
}

/* ---- to and from other processes ---- */

CUresult cuMemExportToShareableHandle(void *shareable, CUmemGenericAllocationHandle handle,
                                      CUmemAllocationHandleType type, unsigned long long flags) {
  int fd = -1;
  if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) return CUDA_ERROR_NOT_SUPPORTED;
  cumem_lock();
  const cumemMemory_t *memory = memory_find(handle);
  bool isExportable = memory && flags == 0 && (memory->properties.requestedHandleTypes & type) != 0;
  if (isExportable) fd = fcntl(memory->fd, F_DUPFD_CLOEXEC, 0);
  if (fd >= 0) *(int *)shareable = fd;
  return cumem_unlock(fd >= 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE);
}

/* Where the memory lies is not said by the file: on the current device, or the first. */
CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *handle, void *shareable,
                                        CUmemAllocationHandleType type) {
  struct stat status;
  CUmemAllocationProp properties = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                    .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                    .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE}};
  if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) return CUDA_ERROR_NOT_SUPPORTED;
  int fd = fcntl((int)(intptr_t)shareable, F_DUPFD_CLOEXEC, 0);
  if (fd < 0) return CUDA_ERROR_INVALID_VALUE;
  if (fstat(fd, &status) != 0 || !cumem_is_whole((size_t)status.st_size)) {
    (void)close(fd);
    return CUDA_ERROR_INVALID_VALUE;
  }
  (void)driver_context(&properties.location.id);
  cumem_lock();
  *handle = memory_add(fd, (size_t)status.st_size, 0, &properties);
  return cumem_unlock(CUDA_SUCCESS);
}

/* ---- addresses ---- */

CUresult cuMemAddressReserve(CUdeviceptr *ptr, size_t bytes, size_t alignment, CUdeviceptr wish,
                             unsigned long long flags) {
  (void)wish;
  if (!cumem_is_whole(bytes) || flags != 0 || alignment > cumemUnit) return CUDA_ERROR_INVALID_VALUE;
  /* Aligned as the GPU's pages are: the ends that are too much go back. */
  const int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  char *all = mmap(NULL, bytes + cumemUnit, PROT_NONE, kind, -1, 0);
  if (all == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  size_t before = (cumemUnit - (uintptr_t)all % cumemUnit) % cumemUnit;
  if (before > 0) (void)munmap(all, before);
  (void)munmap(all + before + bytes, cumemUnit - before);
  cumemReservation_t *made = runtime_allocate(sizeof(*made));
  cumem_lock();
  *made = (cumemReservation_t){.next = cumem.reservations, .base = all + before, .bytes = bytes};
  cumem.reservations = made;
  *ptr = (uintptr_t)made->base;
  return cumem_unlock(CUDA_SUCCESS);
}

/* Whether a mapping has bytes in [base, base + bytes). */
static bool mapping_is_in(const cumemMapping_t *mapping, const char *base, size_t bytes) {
  return mapping->base < base + bytes && base < mapping->base + mapping->bytes;
}

static bool cumem_is_unmapped(const char *base, size_t bytes) {
  for (const cumemMapping_t *mapping = cumem.mappings; mapping; mapping = mapping->next)
    if (mapping_is_in(mapping, base, bytes)) return false;
  return true;
}

CUresult cuMemAddressFree(CUdeviceptr ptr, size_t bytes) {
  char *base = cumem_address(ptr);
  cumem_lock();
  cumemReservation_t **at = &cumem.reservations;
  while (*at && (*at)->base != base) at = &(*at)->next;
  cumemReservation_t *found = *at;
  if (!found || found->bytes != bytes || !cumem_is_unmapped(base, bytes))
    return cumem_unlock(CUDA_ERROR_INVALID_VALUE);
  *at = found->next;
  (void)munmap(base, bytes);
  free(found);
  return cumem_unlock(CUDA_SUCCESS);
}

static bool cumem_is_reserved(const char *base, size_t bytes) {
  for (const cumemReservation_t *r = cumem.reservations; r; r = r->next)
    if (base >= r->base && bytes <= r->bytes && base - r->base <= (ptrdiff_t)(r->bytes - bytes)) return true;
  return false;
}

/* ---- mappings ---- */

/* Until an access is set, nobody may touch it. */
CUresult cuMemMap(CUdeviceptr ptr, size_t bytes, size_t offset, CUmemGenericAllocationHandle handle,
                  unsigned long long flags) {
  char *base = cumem_address(ptr);
  if (!cumem_is_whole(bytes) || ptr % cumemUnit != 0 || offset != 0 || flags != 0)
    return CUDA_ERROR_INVALID_VALUE;
  cumem_lock();
  cumemMemory_t *memory = memory_find(handle);
  if (!memory || bytes > memory->bytes || !cumem_is_reserved(base, bytes) || !cumem_is_unmapped(base, bytes))
    return cumem_unlock(CUDA_ERROR_INVALID_VALUE);
  if (mmap(base, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, memory->fd, 0) == MAP_FAILED)
    return cumem_unlock(CUDA_ERROR_OUT_OF_MEMORY);
  cumemMapping_t *made = runtime_allocate(sizeof(*made));
  *made = (cumemMapping_t){.next = cumem.mappings, .base = base, .bytes = bytes, .memory = memory};
  cumem.mappings = made;
  memory->refs++;
  emulated_range_add(base, bytes, EMULATED_CUMEM, memory->properties.location.id);
  return cumem_unlock(CUDA_SUCCESS);
}

/* Whether whole mappings lie there, side by side. */
static bool mappings_cover(const char *base, size_t bytes) {
  const char *at = base;
  while (at < base + bytes) {
    const cumemMapping_t *mapping = mapping_find(at);
    if (!mapping || mapping->base != at) return false;
    at += mapping->bytes;
  }
  return bytes > 0 && at == base + bytes;
}

static void mapping_free(cumemMapping_t *mapping) {
  (void)emulated_range_remove(mapping->base);
  (void)mmap(mapping->base, mapping->bytes, PROT_NONE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  memory_drop(mapping->memory);
  free(mapping);
}

CUresult cuMemUnmap(CUdeviceptr ptr, size_t bytes) {
  const char *base = cumem_address(ptr);
  cumem_lock();
  if (!mappings_cover(base, bytes)) return cumem_unlock(CUDA_ERROR_INVALID_VALUE);
  for (cumemMapping_t **at = &cumem.mappings; *at;) {
    cumemMapping_t *mapping = *at;
    if (mapping_is_in(mapping, base, bytes)) {
      *at = mapping->next;
      mapping_free(mapping);
    } else {
      at = &mapping->next;
    }
  }
  return cumem_unlock(CUDA_SUCCESS);
}

/* ---- access: what any device may do, the process may ---- */

static void mapping_allow(cumemMapping_t *mapping, const CUmemAccessDesc *access) {
  unsigned bit = 1u << access->location.id;
  bool canRead = access->flags != CU_MEM_ACCESS_FLAGS_PROT_NONE;
  bool canWrite = access->flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  mapping->readers = canRead ? mapping->readers | bit : mapping->readers & ~bit;
  mapping->writers = canWrite ? mapping->writers | bit : mapping->writers & ~bit;
  int protection = (mapping->readers ? PROT_READ : PROT_NONE) | (mapping->writers ? PROT_WRITE : PROT_NONE);
  (void)mprotect(mapping->base, mapping->bytes, protection);
}

CUresult cuMemSetAccess(CUdeviceptr ptr, size_t bytes, const CUmemAccessDesc *accesses, size_t n) {
  const char *base = cumem_address(ptr);
  for (size_t i = 0; i < n; i++)
    if (accesses[i].location.type != CU_MEM_LOCATION_TYPE_DEVICE ||
        !driver_is_device(accesses[i].location.id))
      return CUDA_ERROR_INVALID_DEVICE;
  cumem_lock();
  if (!mappings_cover(base, bytes)) return cumem_unlock(CUDA_ERROR_INVALID_VALUE);
  for (cumemMapping_t *mapping = cumem.mappings; mapping; mapping = mapping->next)
    for (size_t i = 0; i < n && mapping_is_in(mapping, base, bytes); i++)
      mapping_allow(mapping, &accesses[i]);
  return cumem_unlock(CUDA_SUCCESS);
}

CUresult cuMemGetAccess(unsigned long long *flags, const CUmemLocation *location, CUdeviceptr ptr) {
  if (location->type != CU_MEM_LOCATION_TYPE_DEVICE || !driver_is_device(location->id))
    return CUDA_ERROR_INVALID_DEVICE;
  unsigned bit = 1u << location->id;
  cumem_lock();
  const cumemMapping_t *mapping = mapping_find(cumem_address(ptr));
  if (!mapping) return cumem_unlock(CUDA_ERROR_INVALID_VALUE);
  *flags = CU_MEM_ACCESS_FLAGS_PROT_NONE;
  if (mapping->readers & bit) *flags = CU_MEM_ACCESS_FLAGS_PROT_READ;
  if (mapping->writers & bit) *flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  return cumem_unlock(CUDA_SUCCESS);
}
