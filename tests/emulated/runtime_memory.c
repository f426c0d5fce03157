/* The emulated runtime: allocations and copies.
 *
 * All devices' memory is the host's. What cudaMalloc gives is a memory file between two pages that nobody may
 * touch, so that other processes can map it (cudaIpc); all else is the heap's. Either way AddressSanitizer
 * sees overruns. New memory holds a pattern, not zeros. */
#include "../sanitized.h"
#include "driver.h"
#include "runtime.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if SANITIZED_ADDRESS
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, bytes) ((void)(at), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(at, bytes) ((void)(at), (void)(bytes))
#endif

enum { MEMORY_ALIGNMENT = 512, MEMORY_POISON = 0xCB };

const size_t runtimeMemoryTotal = (size_t)256 << 30;

/* ---- ranges ---- */

typedef struct {
  emulatedRange_t range;
  int fd; /* cudaMalloc's memory file, else -1 */
} memoryEntry_t;

static struct {
  pthread_mutex_t lock;
  memoryEntry_t *entries;
  int n, room;
  size_t used; /* bytes of devices */
  unsigned long long lastId;
} memory = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* What is mapped is not taken once more. */
static size_t memory_charge(const emulatedRange_t *range) {
  return range->kind == EMULATED_HOST || range->kind == EMULATED_CUMEM ? 0 : range->bytes;
}

static void memory_add(emulatedRange_t range, int fd) {
  (void)pthread_mutex_lock(&memory.lock);
  if (memory.n == memory.room) {
    memory.room = memory.room ? 2 * memory.room : 64;
    memory.entries = realloc(memory.entries, (size_t)memory.room * sizeof(*memory.entries));
    if (!memory.entries) abort();
  }
  range.bufferId = ++memory.lastId;
  memory.used += memory_charge(&range);
  memory.entries[memory.n++] = (memoryEntry_t){range, fd};
  (void)pthread_mutex_unlock(&memory.lock);
}

/* Takes the entry that starts there out of the table. */
static bool memory_take(const void *base, unsigned kinds, memoryEntry_t *entry) {
  bool isThere = false;
  (void)pthread_mutex_lock(&memory.lock);
  for (int i = 0; i < memory.n && !isThere; i++) {
    if (memory.entries[i].range.base != base) continue;
    if (!(kinds >> memory.entries[i].range.kind & 1)) break;
    *entry = memory.entries[i];
    memory.entries[i] = memory.entries[--memory.n];
    memory.used -= memory_charge(&entry->range);
    isThere = true;
  }
  (void)pthread_mutex_unlock(&memory.lock);
  return isThere;
}

static bool memory_find(const void *ptr, memoryEntry_t *entry) {
  bool isThere = false;
  uintptr_t at = (uintptr_t)ptr;
  (void)pthread_mutex_lock(&memory.lock);
  for (int i = 0; i < memory.n && !isThere; i++) {
    const emulatedRange_t *range = &memory.entries[i].range;
    isThere = at >= (uintptr_t)range->base && at - (uintptr_t)range->base < range->bytes;
    if (isThere) *entry = memory.entries[i];
  }
  (void)pthread_mutex_unlock(&memory.lock);
  return isThere;
}

void emulated_range_add(void *base, size_t bytes, emulatedMemory_t kind, int device) {
  memory_add((emulatedRange_t){.base = base, .bytes = bytes, .kind = kind, .device = device}, -1);
}

bool emulated_range_remove(void *base) {
  memoryEntry_t entry;
  return memory_take(base, ~0u, &entry);
}

bool emulated_range_find(const void *ptr, emulatedRange_t *range) {
  memoryEntry_t entry;
  if (!memory_find(ptr, &entry)) return false;
  *range = entry.range;
  return true;
}

int runtime_memory_file(const void *ptr) {
  memoryEntry_t entry;
  return memory_find(ptr, &entry) ? entry.fd : -1;
}

void runtime_memory_take(size_t bytes) {
  (void)pthread_mutex_lock(&memory.lock);
  memory.used += bytes;
  (void)pthread_mutex_unlock(&memory.lock);
}

void runtime_memory_give(size_t bytes) {
  (void)pthread_mutex_lock(&memory.lock);
  memory.used -= bytes;
  (void)pthread_mutex_unlock(&memory.lock);
}

size_t runtime_memory_unused(void) {
  (void)pthread_mutex_lock(&memory.lock);
  size_t unused = memory.used < runtimeMemoryTotal ? runtimeMemoryTotal - memory.used : 0;
  (void)pthread_mutex_unlock(&memory.lock);
  return unused;
}

cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
  (void)runtime_device();
  *unused = runtime_memory_unused();
  *total = runtimeMemoryTotal;
  return cudaSuccess;
}

/* ---- making and freeing ---- */

/* Its begin and its end: what is large is mostly never touched, and a page that is takes time. */
void runtime_poison(void *base, size_t bytes) {
  const size_t most = (size_t)1 << 20, part = bytes < most ? bytes : most; /* they may overlap */
  memset(base, MEMORY_POISON, part);
  memset((char *)base + bytes - part, MEMORY_POISON, part);
}

int runtime_file_make(size_t bytes) {
  int fd = memfd_create("emulated_cuda", MFD_CLOEXEC);
  if (fd < 0) return -1;
  if (ftruncate(fd, (off_t)bytes) == 0) return fd;
  (void)close(fd);
  return -1;
}

static size_t memory_page(void) {
  return (size_t)sysconf(_SC_PAGESIZE);
}

static size_t memory_whole_pages(size_t bytes) {
  size_t page = memory_page();
  return (bytes + page - 1) / page * page;
}

/* A file's mapping with a forbidden page on either side. Null on failure. */
static void *memory_map(int fd, size_t bytes) {
  size_t page = memory_page(), whole = memory_whole_pages(bytes);
  char *around = mmap(NULL, whole + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (around == MAP_FAILED) return NULL;
  char *base = mmap(around + page, whole, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
  if (base != MAP_FAILED) return base;
  (void)munmap(around, whole + 2 * page);
  return NULL;
}

static void *memory_make_file(size_t bytes, int *fd) {
  size_t whole = memory_whole_pages(bytes);
  *fd = runtime_file_make(whole);
  void *base = *fd >= 0 ? memory_map(*fd, bytes) : NULL;
  if (!base) {
    if (*fd >= 0) (void)close(*fd);
    return NULL;
  }
  runtime_poison(base, whole);
  ASAN_POISON_MEMORY_REGION((char *)base + bytes, whole - bytes);
  return base;
}

static void memory_free_file(const memoryEntry_t *entry) {
  char *base = entry->range.base;
  size_t page = memory_page(), whole = memory_whole_pages(entry->range.bytes);
  ASAN_UNPOISON_MEMORY_REGION(base, whole);
  (void)munmap(base - page, whole + 2 * page);
  (void)close(entry->fd);
}

static void *memory_make_heap(size_t bytes) {
  void *base = NULL;
  if (posix_memalign(&base, MEMORY_ALIGNMENT, bytes) != 0) return NULL;
  runtime_poison(base, bytes);
  return base;
}

cudaError_t runtime_memory_make(emulatedMemory_t kind, int device, size_t bytes, void **ptr) {
  int fd = -1;
  *ptr = NULL;
  if (bytes == 0) return cudaSuccess;
  if (bytes > runtime_memory_unused()) return cudaErrorMemoryAllocation;
  void *base = kind == EMULATED_MALLOC ? memory_make_file(bytes, &fd) : memory_make_heap(bytes);
  if (!base) return cudaErrorMemoryAllocation;
  memory_add((emulatedRange_t){.base = base, .bytes = bytes, .kind = kind, .device = device}, fd);
  *ptr = base;
  return cudaSuccess;
}

static void memory_free(const memoryEntry_t *entry) {
  if (entry->fd >= 0)
    memory_free_file(entry);
  else
    free(entry->range.base);
}

bool runtime_memory_free(void *ptr, unsigned kinds) {
  memoryEntry_t entry;
  if (!memory_take(ptr, kinds, &entry)) return false;
  memory_free(&entry);
  return true;
}

static cudaError_t memory_allocate(emulatedMemory_t kind, size_t bytes, void **ptr) {
  int device = runtime_device();
  if (runtime_devices() == 0) return runtime_error(cudaErrorNoDevice);
  if (!ptr) return runtime_error(cudaErrorInvalidValue);
  if (runtime_capture_forbids()) return runtime_error(cudaErrorStreamCaptureUnsupported);
  return runtime_error(runtime_memory_make(kind, device, bytes, ptr));
}

/* CUDA waits here for work that may use the memory. This does not: who relied on it would touch memory that
 * is gone, which shows. */
static cudaError_t memory_release(unsigned kinds, void *ptr) {
  (void)runtime_device();
  if (!ptr) return cudaSuccess;
  if (runtime_capture_forbids()) return runtime_error(cudaErrorStreamCaptureUnsupported);
  return runtime_error(runtime_memory_free(ptr, kinds) ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaMalloc(void **ptr, size_t bytes) {
  return memory_allocate(EMULATED_MALLOC, bytes, ptr);
}

cudaError_t cudaFree(void *ptr) {
  return memory_release(1u << EMULATED_MALLOC | 1u << EMULATED_MANAGED | 1u << EMULATED_POOL, ptr);
}

cudaError_t cudaMallocManaged(void **ptr, size_t bytes, unsigned int flags) {
  if (flags != cudaMemAttachGlobal && flags != cudaMemAttachHost) return runtime_error(cudaErrorInvalidValue);
  return memory_allocate(EMULATED_MANAGED, bytes, ptr);
}

cudaError_t cudaHostAlloc(void **ptr, size_t bytes, unsigned int flags) {
  (void)flags; /* all of it is mapped and for every device */
  return memory_allocate(EMULATED_HOST, bytes, ptr);
}

cudaError_t cudaMallocHost(void **ptr, size_t bytes) {
  return memory_allocate(EMULATED_HOST, bytes, ptr);
}

cudaError_t cudaFreeHost(void *ptr) {
  return memory_release(1u << EMULATED_HOST, ptr);
}

cudaError_t cudaHostGetDevicePointer(void **devicePtr, void *ptr, unsigned int flags) {
  emulatedRange_t range;
  if (flags != 0 || !emulated_range_find(ptr, &range) || range.kind != EMULATED_HOST)
    return runtime_error(cudaErrorInvalidValue);
  *devicePtr = ptr;
  return cudaSuccess;
}

/* ---- in a stream's order ---- */

cudaError_t cudaMallocAsync(void **ptr, size_t bytes, cudaStream_t stream) {
  if (runtime_devices() == 0) return runtime_error(cudaErrorNoDevice);
  if (runtime_is_captured(stream)) return runtime_error(runtime_capture_refuse(stream)); /* not emulated */
  return runtime_error(runtime_memory_make(EMULATED_POOL, runtime_stream_device(stream), bytes, ptr));
}

static void memory_free_run(void *argument) {
  memory_free(argument);
}

/* From the call on it is no allocation any more, and free when the stream comes to it. */
cudaError_t cudaFreeAsync(void *ptr, cudaStream_t stream) {
  memoryEntry_t entry;
  (void)runtime_device();
  if (!ptr) return cudaSuccess;
  if (runtime_is_captured(stream)) return runtime_error(runtime_capture_refuse(stream)); /* not emulated */
  if (!memory_take(ptr, 1u << EMULATED_POOL | 1u << EMULATED_MALLOC, &entry))
    return runtime_error(cudaErrorInvalidValue);
  runtimeTask_t *task = runtime_task_make(memory_free_run, NULL, sizeof(entry));
  memcpy(task->argument, &entry, sizeof(entry));
  return runtime_error(runtime_enqueue(stream, task));
}

/* ---- copies ---- */

/* Word by word where it can be: a GPU's copies do not tear words, and hosts and kernels poll words that are
 * copied under their eyes. */
static void copy_bytes(unsigned char *to, const unsigned char *from, size_t bytes) {
  size_t at = 0;
  bool areWords = ((uintptr_t)to ^ (uintptr_t)from) % sizeof(uint64_t) == 0;
  while (at < bytes) {
    if (areWords && (uintptr_t)(to + at) % sizeof(uint64_t) == 0 && bytes - at >= sizeof(uint64_t)) {
      uint64_t word = __atomic_load_n((const uint64_t *)(const void *)(from + at), __ATOMIC_RELAXED);
      __atomic_store_n((uint64_t *)(void *)(to + at), word, __ATOMIC_RELAXED);
      at += sizeof(uint64_t);
    } else {
      __atomic_store_n(to + at, __atomic_load_n(from + at, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
      at++;
    }
  }
}

static void set_bytes(unsigned char *to, unsigned char value, size_t bytes) {
  const uint64_t word = 0x0101010101010101u * value;
  size_t at = 0;
  while (at < bytes) {
    if ((uintptr_t)(to + at) % sizeof(word) == 0 && bytes - at >= sizeof(word)) {
      __atomic_store_n((uint64_t *)(void *)(to + at), word, __ATOMIC_RELAXED);
      at += sizeof(word);
    } else {
      __atomic_store_n(to + at, value, __ATOMIC_RELAXED);
      at++;
    }
  }
}

typedef struct {
  unsigned char *to;
  const unsigned char *from; /* null: behind this, as it was when the copy was enqueued */
  size_t bytes;
} copy_t;

static void copy_run(void *argument) {
  const copy_t *copy = argument;
  copy_bytes(copy->to, copy->from ? copy->from : (const unsigned char *)(copy + 1), copy->bytes);
}

typedef struct {
  unsigned char *to;
  size_t bytes;
  unsigned char value;
} set_t;

static void set_run(void *argument) {
  const set_t *set = argument;
  set_bytes(set->to, set->value, set->bytes);
}

/* The first and the last byte are in allocations, which may lie side by side. */
static bool memory_covers(const void *ptr, size_t bytes) {
  memoryEntry_t entry;
  return memory_find(ptr, &entry) && memory_find((const char *)ptr + bytes - 1, &entry);
}

/* Whether a device has got access to cuMem's memory, by the flags; all other memory is open to it. */
static bool memory_is_open(const void *ptr, int device, unsigned long long flags) {
  CUmemLocation location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device};
  unsigned long long found;
  return cuMemGetAccess(&found, &location, (CUdeviceptr)(uintptr_t)ptr) != CUDA_SUCCESS ||
         (found & flags) == flags;
}

/* The stream's device must reach the memory, and so must the device that the memory lies on: a mapping for
 * another device alone will not do. */
static bool set_is_allowed(const void *to, size_t bytes, int device) {
  const unsigned long long flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  memoryEntry_t entry;
  if (!memory_covers(to, bytes) || !memory_find(to, &entry)) return false;
  emulatedMemory_t kind = entry.range.kind;
  int home = entry.range.device;
  if (kind == EMULATED_HOST || kind == EMULATED_MANAGED) return true;
  if (kind == EMULATED_CUMEM) return memory_is_open(to, device, flags) && memory_is_open(to, home, flags);
  return device == home || driver_reaches(device, home);
}

/* A copy runs on the stream's device, which must have access to cuMem's memory. */
static bool copy_reaches(const void *to, const void *from, int device) {
  return memory_is_open(to, device, CU_MEM_ACCESS_FLAGS_PROT_READWRITE) &&
         memory_is_open(from, device, CU_MEM_ACCESS_FLAGS_PROT_READ);
}

/* CUDA's guide: an asynchronous copy of cudaMallocAsync's memory wants the stream's device to be current. */
static bool copy_is_at_home(const void *to, const void *from, int device) {
  memoryEntry_t entry;
  bool isPooled = (memory_find(to, &entry) && entry.range.kind == EMULATED_POOL) ||
                  (memory_find(from, &entry) && entry.range.kind == EMULATED_POOL);
  return !isPooled || runtime_device() == device;
}

static bool copy_is_allowed(const void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
  bool isToDevice = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  bool isFromDevice = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if ((unsigned)kind > cudaMemcpyDefault || !to || !from) return false;
  return (!isToDevice || memory_covers(to, bytes)) && (!isFromDevice || memory_covers(from, bytes));
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
  memoryEntry_t entry;
  (void)runtime_device();
  if (bytes == 0) return cudaSuccess;
  int device = runtime_stream_device(stream);
  if (!copy_is_allowed(to, from, bytes, kind) || !copy_reaches(to, from, device) ||
      !copy_is_at_home(to, from, device))
    return runtime_error(cudaErrorInvalidValue);
  /* As CUDA does, what is in pageable memory is read before the call returns. */
  bool isStaged = !memory_find(from, &entry) && !runtime_is_captured(stream);
  runtimeTask_t *task = runtime_task_make(copy_run, NULL, sizeof(copy_t) + (isStaged ? bytes : 0));
  copy_t *copy = (copy_t *)(void *)task->argument;
  *copy = (copy_t){.to = to, .from = isStaged ? NULL : from, .bytes = bytes};
  if (isStaged) memcpy(copy + 1, from, bytes);
  return runtime_error(runtime_enqueue(stream, task));
}

cudaError_t cudaMemcpyPeerAsync(void *to, int toDevice, const void *from, int fromDevice, size_t bytes,
                                cudaStream_t stream) {
  (void)toDevice; /* an address says whose it is */
  (void)fromDevice;
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
  int device = runtime_device();
  if (bytes == 0) return cudaSuccess;
  if (runtime_capture_forbids()) return runtime_error(cudaErrorStreamCaptureImplicit);
  if (!copy_is_allowed(to, from, bytes, kind) || !copy_reaches(to, from, device))
    return runtime_error(cudaErrorInvalidValue);
  copy_bytes(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  if (!set_is_allowed(to, bytes, runtime_stream_device(stream))) return runtime_error(cudaErrorInvalidValue);
  runtimeTask_t *task = runtime_task_make(set_run, NULL, sizeof(set_t));
  *(set_t *)(void *)task->argument = (set_t){to, bytes, (unsigned char)value};
  return runtime_error(runtime_enqueue(stream, task));
}

cudaError_t cudaMemset(void *to, int value, size_t bytes) {
  int device = runtime_device();
  if (bytes == 0) return cudaSuccess;
  if (runtime_capture_forbids()) return runtime_error(cudaErrorStreamCaptureImplicit);
  if (!set_is_allowed(to, bytes, device)) return runtime_error(cudaErrorInvalidValue);
  set_bytes(to, (unsigned char)value, bytes);
  return cudaSuccess;
}

/* ---- what a pointer is ---- */

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *ptr) {
  memoryEntry_t entry;
  *attributes = (struct cudaPointerAttributes){.type = cudaMemoryTypeUnregistered, .device = -1};
  if (!memory_find(ptr, &entry)) return cudaSuccess;
  bool isHost = entry.range.kind == EMULATED_HOST;
  attributes->type = isHost                                 ? cudaMemoryTypeHost
                     : entry.range.kind == EMULATED_MANAGED ? cudaMemoryTypeManaged
                                                            : cudaMemoryTypeDevice;
  attributes->device = entry.range.device;
  attributes->devicePointer = attributes->hostPointer = (void *)(uintptr_t)ptr;
  return cudaSuccess;
}
