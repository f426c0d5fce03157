/* Device memory of other ranks: which kind it is found to be, what threads and processes see through their
 * mappings of it, when it is alive; and groups that reach their peers by it. */
#include "group.h"
#include "peer_memory.h"
#include "peer_socket.h"

#include <cuda.h>
#include <dlfcn.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "gpu_common.h"
#include "gpu_copy.h"
#include "gpu_world.h"

#define BYTES ((size_t)1 << 20)
#define SPOT 4096 /* bytes looked at and changed */
#define ANSWER_MS 20000
#define RANKS 4

static bool hasNccl;
/* Owners' memory is on device 0, and who maps it on the last one, which may be the same. */
static int nDevices = 1;

static int mapper_device(void) {
  return nDevices - 1;
}

static int on_owners_device(void **state) {
  (void)state;
  return cudaSetDevice(0) == cudaSuccess ? 0 : -1;
}

/* ---- what lies behind a mapping ----
 *
 * By kernels on the mapper's device, as ranks see it: that is all that a mapping is for, and CUDA's memsets
 * want more. At most SPOT bytes; afterwards that device is the current one. */

/* Page-locked, this process's own and there to its end. */
static unsigned char *mapped_buffer(void) {
  static void *buffer;
  if (!buffer && cudaMallocHost(&buffer, SPOT) != cudaSuccess) buffer = NULL;
  return buffer;
}

static cudaError_t mapped_copy(void *to, const void *from, size_t bytes) {
  cudaError_t error = to && from ? cudaSetDevice(mapper_device()) : cudaErrorMemoryAllocation;
  if (error == cudaSuccess) error = (cudaError_t)gpu_copy(to, from, bytes, NULL);
  return error == cudaSuccess ? cudaDeviceSynchronize() : error;
}

static cudaError_t mapped_read(unsigned char *to, const void *mapped, size_t bytes) {
  cudaError_t error = mapped_copy(mapped_buffer(), mapped, bytes);
  if (error == cudaSuccess) memcpy(to, mapped_buffer(), bytes);
  return error;
}

static cudaError_t mapped_set(void *mapped, uint8_t value, size_t bytes) {
  unsigned char *buffer = mapped_buffer();
  if (buffer) memset(buffer, value, bytes);
  return mapped_copy(mapped, buffer, bytes);
}

/* ---- another process: a child from before CUDA's start ---- */

/* To the child, with the descriptor: map, find `old` at the offset, write `new`, unmap. And its answer. */
typedef struct {
  peerMemoryName_t name;
  uint64_t offset;
  uint8_t old, new, quits;
} order_t;
typedef struct {
  int32_t result, found; /* found: the first byte */
  uint32_t kind;
  char text[128];
} answer_t;

static peerSocket_t parentSocket, childSocket;
static pid_t childPid;

static answer_t child_do(const order_t *order, int fd) {
  answer_t answer = {.found = -1};
  peerMapping_t mapping;
  unsigned char spot[SPOT] = {0};
  ultraepResult_t result = peer_memory_map(&order->name, fd, mapper_device(), &mapping);
  if (result == ultraepSuccess) {
    char *at = (char *)mapping.base + order->offset;
    cudaError_t error = mapped_read(spot, at, SPOT);
    bool isWhole = error == cudaSuccess;
    for (int i = 0; i < SPOT && isWhole; i++) isWhole = spot[i] == order->old;
    if (error == cudaSuccess) error = mapped_set(at, order->new, SPOT);
    answer.found = isWhole ? order->old : spot[0];
    answer.kind = mapping.kind;
    peer_memory_unmap(&mapping);
    if (error != cudaSuccess) {
      snprintf(answer.text, sizeof(answer.text), "%s", cudaGetErrorString(error));
      result = ultraepUnhandledCudaError;
    } else if (!isWhole) {
      snprintf(answer.text, sizeof(answer.text), "other contents");
      result = ultraepInternalError;
    }
  } else {
    snprintf(answer.text, sizeof(answer.text), "%s", ultraepGetLastError());
  }
  answer.result = (int32_t)result;
  return answer;
}

static int child_run(void) {
  for (;;) {
    order_t order;
    size_t bytes;
    int fd;
    if (peer_socket_receive(&childSocket, &order, sizeof(order), &bytes, &fd, 60000) != ultraepSuccess)
      return 1;
    if (order.quits) return 0;
    (void)cudaGetDeviceCount(&nDevices);
    (void)cudaSetDevice(mapper_device());
    answer_t answer = child_do(&order, fd);
    if (fd >= 0) (void)close(fd);
    if (peer_socket_send(&childSocket, &parentSocket.address, &answer, sizeof(answer), -1) != ultraepSuccess)
      return 2;
  }
}

static void child_end(void) {
  order_t order = {.quits = 1};
  int status = -1;
  (void)peer_socket_send(&parentSocket, &childSocket.address, &order, sizeof(order), -1);
  if (waitpid(childPid, &status, 0) != childPid || status != 0) printf("the child ended with %d\n", status);
}

/* The child writes through its mapping what is then found here. */
static void check_process(unsigned char *ptr, uint32_t kind) {
  static uint8_t pattern = 1;
  order_t order = {.old = pattern, .new = (uint8_t)(pattern + 1)};
  answer_t answer = {0};
  unsigned char spot[SPOT];
  size_t bytes;
  int fd = -1, none = -1;
  pattern += 2;
  GPU_OK(cudaMemset(ptr, order.old, SPOT));
  GPU_OK(cudaDeviceSynchronize());
  if (peer_memory_describe(ptr, &order.name, &fd) != ultraepSuccess) fail_msg("%s", ultraepGetLastError());
  if (order.name.kind == PEER_MEMORY_FABRIC && kind == PEER_MEMORY_FD) kind = PEER_MEMORY_FABRIC;
  assert_int_equal(order.name.kind, kind);
  assert_int_equal(fd >= 0, kind == PEER_MEMORY_FD);
  order.offset = (uint64_t)(uintptr_t)ptr - order.name.base;
  assert_int_equal(peer_socket_send(&parentSocket, &childSocket.address, &order, sizeof(order), fd),
                   ultraepSuccess);
  if (fd >= 0) (void)close(fd);
  assert_int_equal(peer_socket_receive(&parentSocket, &answer, sizeof(answer), &bytes, &none, ANSWER_MS),
                   ultraepSuccess);
  if (answer.result != ultraepSuccess) fail_msg("in the child: %s (found %d)", answer.text, answer.found);
  assert_int_equal(answer.kind, kind);
  GPU_OK(cudaMemcpy(spot, ptr, SPOT, cudaMemcpyDeviceToHost));
  for (int i = 0; i < SPOT; i++) assert_int_equal(spot[i], order.new);
  assert_true(peer_memory_is_alive(&order.name));
}

static void test_process_malloc(void **state) {
  (void)state;
  unsigned char *ptr = NULL, *small = NULL;
  GPU_OK(cudaMalloc((void **)&ptr, BYTES));
  GPU_OK(cudaMalloc((void **)&small, SPOT)); /* shares its page of device memory with others */
  check_process(ptr, PEER_MEMORY_IPC);
  check_process(ptr + BYTES - SPOT, PEER_MEMORY_IPC);
  check_process(small, PEER_MEMORY_IPC);
  GPU_OK(cudaFree(small));
  GPU_OK(cudaFree(ptr));
}

static void test_process_cumem(void **state) {
  (void)state;
  void *ptr = NULL;
  if (peer_memory_alloc(0, BYTES, &ptr) != ultraepSuccess) fail_msg("%s", ultraepGetLastError());
  check_process(ptr, PEER_MEMORY_FD);
  check_process((unsigned char *)ptr + BYTES - SPOT, PEER_MEMORY_FD);
  peer_memory_free(ptr);
  if (!hasNccl) return;
  ptr = gpu_world_alloc(BYTES);
  assert_non_null(ptr);
  check_process((unsigned char *)ptr + SPOT, PEER_MEMORY_FD);
  gpu_world_release(ptr);
}

/* Two handles side by side, as in expandable segments: each is an allocation of its own. */
static void test_process_segments(void **state) {
  (void)state;
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  assert_non_null(library);
#define DRIVER(name)                                                                                         \
  __typeof__(&name) name##At;                                                                                \
  *(void **)&name##At = dlsym(library, #name);                                                               \
  assert_non_null(name##At)
  DRIVER(cuMemGetAllocationGranularity);
  DRIVER(cuMemAddressReserve);
  DRIVER(cuMemCreate);
  DRIVER(cuMemMap);
  DRIVER(cuMemSetAccess);
  DRIVER(cuMemUnmap);
  DRIVER(cuMemRelease);
  DRIVER(cuMemAddressFree);
#undef DRIVER
  CUmemAllocationProp properties = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                    .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                    .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = 0}};
  CUmemAccessDesc access = {properties.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  CUmemGenericAllocationHandle handles[2];
  CUdeviceptr base = 0;
  size_t unit = 0;
  assert_int_equal(cuMemGetAllocationGranularityAt(&unit, &properties, CU_MEM_ALLOC_GRANULARITY_MINIMUM), 0);
  assert_int_equal(cuMemAddressReserveAt(&base, 3 * unit, 0, 0, 0), 0);
  for (size_t i = 0; i < 2; i++) {
    assert_int_equal(cuMemCreateAt(&handles[i], (i + 1) * unit, &properties, 0), 0);
    assert_int_equal(cuMemMapAt(base + i * unit, (i + 1) * unit, 0, handles[i], 0), 0);
  }
  assert_int_equal(cuMemSetAccessAt(base, 3 * unit, &access, 1), 0);
  uint64_t start[2], bytes[2], id[2];
  for (size_t i = 0; i < 2; i++) {
    const void *inside = (const void *)(uintptr_t)(base + i * unit + 512);
    assert_int_equal(peer_memory_look(inside, &start[i], &bytes[i], &id[i]), ultraepSuccess);
    print_message("segment %zu of %zu bytes: %+lld, %llu bytes, id %llu\n", i, (i + 1) * unit,
                  (long long)(start[i] - base), (unsigned long long)bytes[i], (unsigned long long)id[i]);
    check_process((unsigned char *)(uintptr_t)(base + i * unit + unit - SPOT), PEER_MEMORY_FD);
  }
  for (size_t i = 0; i < 2; i++) {
    assert_int_equal(start[i], base + i * unit);
    assert_int_equal(bytes[i], (i + 1) * unit);
  }
  assert_true(id[0] != id[1]);
  for (size_t i = 0; i < 2; i++) {
    (void)cuMemUnmapAt(base + i * unit, (i + 1) * unit);
    (void)cuMemReleaseAt(handles[i]);
  }
  (void)cuMemAddressFreeAt(base, 3 * unit);
}

/* ---- names ---- */

static void check_unshared(const void *ptr) {
  peerMemoryName_t name;
  peerMapping_t mapping;
  int fd = 77;
  if (peer_memory_describe(ptr, &name, &fd) != ultraepSuccess) fail_msg("%s", ultraepGetLastError());
  assert_int_equal(name.kind, PEER_MEMORY_NONE);
  assert_int_equal(fd, -1);
  assert_false(peer_memory_is_alive(&name));
  assert_int_equal(peer_memory_map(&name, -1, 0, &mapping), ultraepInvalidUsage);
}

static void test_unshared(void **state) {
  (void)state;
  void *managed = NULL, *pinned = NULL, *pooled = NULL;
  int local = 0;
  uint64_t base, bytes, id;
  GPU_OK(cudaMallocManaged(&managed, BYTES, cudaMemAttachGlobal));
  GPU_OK(cudaMallocHost(&pinned, BYTES));
  GPU_OK(cudaMallocAsync(&pooled, BYTES, NULL));
  GPU_OK(cudaStreamSynchronize(NULL));
  check_unshared(managed);
  check_unshared(pinned);
  check_unshared(pooled);
  check_unshared(&local);
  check_unshared(NULL);
  assert_int_equal(peer_memory_look(&local, &base, &bytes, &id), ultraepInvalidArgument);
  GPU_OK(cudaFreeAsync(pooled, NULL));
  GPU_OK(cudaFreeHost(pinned));
  GPU_OK(cudaFree(managed));
  assert_int_equal(cudaGetLastError(), cudaSuccess);
}

typedef struct {
  bool isCumem;
} memory_t;

static unsigned char *memory_make(const memory_t *memory) {
  void *ptr = NULL;
  if (!memory->isCumem) return cudaMalloc(&ptr, BYTES) == cudaSuccess ? ptr : NULL;
  return peer_memory_alloc(0, BYTES, &ptr) == ultraepSuccess ? ptr : NULL;
}

static void memory_free(const memory_t *memory, void *ptr) {
  if (memory->isCumem)
    peer_memory_free(ptr);
  else
    (void)cudaFree(ptr);
}

static void check_alive(const memory_t *memory) {
  peerMemoryName_t name, inside;
  uint64_t base, bytes, id;
  int fd = -1;
  unsigned char *ptr = memory_make(memory);
  assert_non_null(ptr);
  assert_int_equal((uintptr_t)ptr % 256, 0);
  assert_int_equal(peer_memory_describe(ptr, &name, &fd), ultraepSuccess);
  if (fd >= 0) (void)close(fd);
  assert_int_equal(peer_memory_describe(ptr + BYTES - 1, &inside, &fd), ultraepSuccess);
  if (fd >= 0) (void)close(fd);
  assert_int_equal(name.base, (uintptr_t)ptr);
  assert_true(name.bytes >= BYTES && name.bufferId != 0);
  assert_true(inside.base == name.base && inside.bytes == name.bytes && inside.bufferId == name.bufferId);
  assert_int_equal(peer_memory_look(ptr + 1, &base, &bytes, &id), ultraepSuccess);
  assert_true(base == name.base && bytes == name.bytes && id == name.bufferId);
  assert_true(peer_memory_is_alive(&name) && peer_memory_is_mine(&name));
  memory_free(memory, ptr);
  assert_false(peer_memory_is_alive(&name));
  /* Most likely at the same address, and still another. */
  ptr = memory_make(memory);
  assert_non_null(ptr);
  if ((uintptr_t)ptr != name.base) print_message("another address: nothing learned of a second life\n");
  assert_false(peer_memory_is_alive(&name));
  memory_free(memory, ptr);
}

static void test_alive(void **state) {
  (void)state;
  for (int cumem = 0; cumem < 2; cumem++) check_alive(&(memory_t){cumem});
}

/* ---- threads ---- */

typedef struct {
  peerMemoryName_t name;
  bool kept;
  peerMapping_t mapping;
  ultraepResult_t result;
} mapper_t;

static void *mapper_thread(void *argument) {
  mapper_t *self = argument; /* a thread that has set no device */
  self->result = self->kept ? peer_memory_map_kept(&self->name, -1, mapper_device(), &self->mapping)
                            : peer_memory_map(&self->name, -1, mapper_device(), &self->mapping);
  return NULL;
}

static void check_thread(const memory_t *memory, bool kept) {
  mapper_t mapper = {.kept = kept};
  pthread_t thread;
  int fd = -1;
  unsigned char *ptr = memory_make(memory), byte = 0;
  assert_non_null(ptr);
  assert_int_equal(peer_memory_describe(ptr, &mapper.name, &fd), ultraepSuccess);
  if (fd >= 0) (void)close(fd);
  assert_int_equal(pthread_create(&thread, NULL, mapper_thread, &mapper), 0);
  assert_int_equal(pthread_join(thread, NULL), 0);
  assert_int_equal(mapper.result, ultraepSuccess);
  char *mapped = mapper.mapping.base;
  GPU_OK(mapped_set(mapped + 100, 42, 1));
  GPU_OK(cudaSetDevice(0));
  GPU_OK(cudaMemcpy(&byte, ptr + 100, 1, cudaMemcpyDeviceToHost));
  assert_int_equal(byte, 42);
  if (kept && memory->isCumem && mapper.name.kind != PEER_MEMORY_IPC) {
    assert_true(mapped != (char *)ptr);
    memory_free(memory, ptr);
    byte = 0;
    GPU_OK(mapped_read(&byte, mapped + 100, 1)); /* it lives on */
    GPU_OK(cudaSetDevice(0));
    assert_int_equal(byte, 42);
    peer_memory_unmap(&mapper.mapping);
  } else {
    assert_int_equal(mapper.mapping.kind, PEER_MEMORY_PROCESS);
    assert_ptr_equal(mapped, ptr);
    peer_memory_unmap(&mapper.mapping);
    memory_free(memory, ptr);
  }
  assert_int_equal(mapper.mapping.kind, PEER_MEMORY_NONE);
  peer_memory_unmap(&mapper.mapping);
  assert_int_equal(peer_memory_map(&mapper.name, -1, mapper_device(), &mapper.mapping),
                   ultraepInvalidUsage); /* freed */
}

static void test_threads(void **state) {
  (void)state;
  for (int i = 0; i < 4; i++) check_thread(&(memory_t){i % 2}, i / 2);
}

/* ---- groups ---- */

static ultraepConfig_t group_config(int32_t peers) {
  ultraepConfig_t config = ULTRAEP_CONFIG_INITIALIZER;
  config.nExperts = 2 * RANKS;
  config.topK = 2;
  config.maxTokens = 16;
  config.hidden = 64;
  config.peers = peers;
  config.timeoutMs = 20000;
  return config;
}

/* Every rank's memory, elsewhere in its allocation on each, as all others see it. */
static const char *group_see_peers(gpuWorld_t *world, int rank, ultraepGroup_t group, char *mine,
                                   size_t bytes) {
  char seen;
  cudaStream_t stream = world->streams[rank];
  RANK_OK(ultraepMemRegister(group, mine, bytes));
  RANK_CUDA(cudaMemsetAsync(mine, rank + 1, bytes, stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  RANK_MEET(world);
  groupPlace_t place;
  RANK_CHECK(group_find_place(group, mine + bytes - 1, 1, &place), "the region is not there");
  for (int r = 0; r < world->nRanks; r++) {
    RANK_CUDA(cudaMemcpyAsync(&seen, group_peer(group, place, r), 1, cudaMemcpyDeviceToHost, stream));
    RANK_CUDA(cudaStreamSynchronize(stream));
    RANK_CHECK(seen == r + 1, "rank %d sees %d in rank %d's memory", rank, seen, r);
  }
  RANK_MEET(world);
  RANK_OK(ultraepMemFree(group, mine));
  return NULL;
}

static const char *ipc_rank(gpuWorld_t *world, int rank, void *argument) {
  ultraepConfig_t config = group_config(ULTRAEP_PEERS_IPC);
  ultraepGroup_t group;
  void *mine = NULL, *owned = NULL;
  (void)argument;
  RANK_CUDA(cudaMalloc(&mine, BYTES));
  RANK_MEET(world);
  RANK_OK(ultraepGroupCreate(&group, world->comms[rank], &config));
  RANK_CHECK(group->config.peers == ULTRAEP_PEERS_IPC, "it is not IPC");
  size_t offset = 16 * (size_t)(rank + 1);
  RANK_DO(group_see_peers(world, rank, group, (char *)mine + offset, SPOT));
  /* Beyond the allocation on one rank, and no memory of a device: all refuse it and work on. */
  uint64_t base, bytes, id;
  RANK_OK(peer_memory_look(mine, &base, &bytes, &id));
  char *last = (char *)mine + bytes - SPOT;
  ultraepResult_t expected = rank == 1 ? ultraepInvalidUsage : ultraepRemoteError;
  RANK_IS(ultraepMemRegister(group, rank == 1 ? last + 16 : last, SPOT), expected);
  void *host = aligned_alloc(256, SPOT);
  RANK_IS(ultraepMemRegister(group, rank == 1 ? host : mine, SPOT), expected);
  free(host);
  RANK_OK(ultraepMemAlloc(group, &owned, BYTES));
  RANK_OK(ultraepMemFree(group, owned));
  RANK_DO(group_see_peers(world, rank, group, last, SPOT));
  RANK_MEET(world);
  RANK_OK(ultraepMemAlloc(group, &owned, BYTES)); /* freed with the group, on one rank after the other */
  for (int r = 0; r < world->nRanks; r++) {
    if (r == rank) RANK_OK(ultraepGroupDestroy(group));
    RANK_MEET(world);
  }
  RANK_CUDA(cudaFree(mine));
  return NULL;
}

/* What the config says stands; what it leaves open, ULTRAEP_PEERS says. */
static const char *choice_rank(gpuWorld_t *world, int rank, void *argument) {
  const int32_t *choice = argument; /* the config's, and the outcome */
  ultraepConfig_t config = group_config(choice[0]);
  ultraepGroup_t group;
  RANK_OK(ultraepGroupCreate(&group, world->comms[rank], &config));
  RANK_CHECK(group->config.peers == choice[1], "peers: %d", group->config.peers);
  RANK_MEET(world);
  RANK_OK(ultraepGroupDestroy(group));
  return NULL;
}

static void run_world(gpuWorldRank_t rank, void *argument) {
  gpuWorld_t world;
  const char *flaw = gpu_world_make(&world, RANKS);
  if (!flaw) flaw = gpu_world_run(&world, rank, argument);
  if (flaw) fail_msg("%s", flaw);
  gpu_world_free(&world);
}

static void test_group(void **state) {
  (void)state;
  if (!hasNccl) skip();
  run_world(ipc_rank, NULL);
}

static void test_choice(void **state) {
  (void)state;
  if (!hasNccl) skip();
  const char *given = getenv("ULTRAEP_PEERS");
  char *before = given ? strdup(given) : NULL;
  setenv("ULTRAEP_PEERS", "ipc", 1);
  run_world(choice_rank, (int32_t[]){ULTRAEP_PEERS_AUTO, ULTRAEP_PEERS_IPC});
  run_world(choice_rank, (int32_t[]){ULTRAEP_PEERS_WINDOW, ULTRAEP_PEERS_WINDOW});
  setenv("ULTRAEP_PEERS", "window", 1);
  run_world(choice_rank, (int32_t[]){ULTRAEP_PEERS_AUTO, ULTRAEP_PEERS_WINDOW});
  run_world(choice_rank, (int32_t[]){ULTRAEP_PEERS_IPC, ULTRAEP_PEERS_IPC});
  setenv("ULTRAEP_PEERS", "neither", 1); /* a warning */
  run_world(choice_rank, (int32_t[]){ULTRAEP_PEERS_AUTO, ULTRAEP_PEERS_WINDOW});
  unsetenv("ULTRAEP_PEERS");
  run_world(choice_rank, (int32_t[]){ULTRAEP_PEERS_AUTO, ULTRAEP_PEERS_WINDOW});
  if (before) setenv("ULTRAEP_PEERS", before, 1);
  free(before);
}

#define TEST(test) cmocka_unit_test_setup(test, on_owners_device)

int main(void) {
  const struct CMUnitTest tests[] = {
      TEST(test_alive),         TEST(test_unshared),         TEST(test_threads), TEST(test_process_malloc),
      TEST(test_process_cumem), TEST(test_process_segments), TEST(test_group),   TEST(test_choice),
  };
  if (peer_socket_open(&parentSocket) != ultraepSuccess || peer_socket_open(&childSocket) != ultraepSuccess) {
    printf("%s\n", ultraepGetLastError());
    return 1;
  }
  childPid = fork();
  if (childPid == 0) _exit(child_run());
  int failed = GPU_SKIP_CODE;
  if (childPid > 0) hasNccl = gpu_world_usable(true);
  if (childPid > 0 && cudaGetDeviceCount(&nDevices) == cudaSuccess && nDevices > 0) {
    /* As a rank's, the mapper's device has a context: peer access to cudaMalloc's memory ends with it. */
    (void)cudaSetDevice(mapper_device());
    (void)cudaFree(NULL);
    failed = cmocka_run_group_tests_name("gpu_peer_memory", tests, NULL, NULL);
  } else {
    printf("no CUDA device: skipped\n");
  }
  if (childPid > 0) child_end();
  return failed;
}
