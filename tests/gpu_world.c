#include "gpu_world.h"

#include "gpu_common.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MEET_SECONDS 60
#define NCCL_IN_PROGRESS 7 /* ncclInProgress */

typedef struct {
  char bytes[128];
} worldId_t; /* ncclUniqueId */

static struct {
  int (*getVersion)(int *);
  int (*getUniqueId)(worldId_t *);
  int (*initRank)(ncclComm_t *, int, worldId_t, int);
  int (*destroy)(ncclComm_t);
  int (*abort)(ncclComm_t);
  int (*getAsyncError)(ncclComm_t, int *);
  int (*memAlloc)(void **, size_t);
  int (*memFree)(void *);
} worldNccl;

const char *gpu_world_say(const char *format, ...) {
  static _Thread_local char text[1024];
  char made[sizeof(text)]; /* an argument may be the last message */
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(made, sizeof(made), format, arguments);
  va_end(arguments);
  return memcpy(text, made, sizeof(text));
}

double gpu_world_seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

void gpu_world_sleep_ms(int ms) {
  nanosleep(&(struct timespec){ms / 1000, (long)(ms % 1000) * 1000000}, NULL);
}

bool gpu_world_usable(bool threads) {
  gpu_share(threads);
  int nDevices = 0;
  if (cudaGetDeviceCount(&nDevices) != cudaSuccess || nDevices == 0) {
    printf("no CUDA device: skipped\n");
    return false;
  }
  const struct {
    const char *name;
    void **slot;
  } wanted[] = {
      {"ncclGetVersion", (void **)&worldNccl.getVersion},
      {"ncclGetUniqueId", (void **)&worldNccl.getUniqueId},
      {"ncclCommInitRank", (void **)&worldNccl.initRank},
      {"ncclCommDestroy", (void **)&worldNccl.destroy},
      {"ncclCommAbort", (void **)&worldNccl.abort},
      {"ncclCommGetAsyncError", (void **)&worldNccl.getAsyncError},
      {"ncclMemAlloc", (void **)&worldNccl.memAlloc},
      {"ncclMemFree", (void **)&worldNccl.memFree},
  };
  void *library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_GLOBAL);
  int version = 0;
  bool isWhole = library != NULL;
  for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]) && isWhole; i++)
    isWhole = (*wanted[i].slot = dlsym(library, wanted[i].name)) != NULL;
  if (isWhole) (void)worldNccl.getVersion(&version);
  if (version < 23000) printf("NCCL 2.30 or later is needed, this is %d: skipped\n", version);
  return version >= 23000;
}

/* ---- threads ---- */

typedef struct {
  gpuWorld_t *world;
  int rank;
  gpuWorldRank_t run;
  void *argument;
  double seconds; /* when it complained */
  char complaint[1024];
} worldThread_t;

static void world_break(gpuWorld_t *world) {
  pthread_mutex_lock(&world->lock);
  world->isBroken = true;
  pthread_cond_broadcast(&world->changed);
  pthread_mutex_unlock(&world->lock);
}

static void *world_thread(void *argument) {
  worldThread_t *self = argument;
  gpuWorld_t *world = self->world;
  int nDevices = 1;
  (void)cudaGetDeviceCount(&nDevices);
  cudaError_t error = cudaSetDevice(world->device >= 0 ? world->device : self->rank % nDevices);
  const char *complaint =
      error == cudaSuccess ? self->run(world, self->rank, self->argument) : cudaGetErrorString(error);
  if (complaint) {
    self->seconds = gpu_world_seconds();
    snprintf(self->complaint, sizeof(self->complaint), "rank %d: %s", self->rank, complaint);
    world_break(world);
  }
  return NULL;
}

const char *gpu_world_run(gpuWorld_t *world, gpuWorldRank_t run, void *argument) {
  worldThread_t threads[GPU_WORLD_MAX_RANKS] = {0};
  pthread_t handles[GPU_WORLD_MAX_RANKS];
  const worldThread_t *first = NULL;
  world->isBroken = false;
  world->nWaiting = 0;
  for (int r = 0; r < world->nRanks; r++) {
    threads[r] = (worldThread_t){.world = world, .rank = r, .run = run, .argument = argument};
    if (pthread_create(&handles[r], NULL, world_thread, &threads[r]) != 0) {
      printf("cannot start a thread\n");
      exit(1);
    }
  }
  for (int r = 0; r < world->nRanks; r++) (void)pthread_join(handles[r], NULL);
  /* The earliest complaint: later ones may only follow from it, but may also tell why. */
  for (int r = 0; r < world->nRanks; r++)
    if (threads[r].complaint[0] && (!first || threads[r].seconds < first->seconds)) first = &threads[r];
  for (int r = 0; r < world->nRanks; r++)
    if (threads[r].complaint[0] && &threads[r] != first)
      printf("%.3f s later: %s\n", threads[r].seconds - first->seconds, threads[r].complaint);
  return first ? gpu_world_say("%s", first->complaint) : NULL;
}

bool gpu_world_meet(gpuWorld_t *world) {
  struct timespec until;
  clock_gettime(CLOCK_REALTIME, &until);
  until.tv_sec += MEET_SECONDS;
  pthread_mutex_lock(&world->lock);
  int generation = world->generation;
  if (++world->nWaiting == world->nRanks) {
    world->nWaiting = 0;
    world->generation++;
    pthread_cond_broadcast(&world->changed);
  }
  while (world->generation == generation && !world->isBroken)
    if (pthread_cond_timedwait(&world->changed, &world->lock, &until) != 0) world->isBroken = true;
  bool met = world->generation != generation;
  pthread_mutex_unlock(&world->lock);
  return met;
}

/* ---- worlds ---- */

static const char *world_init(gpuWorld_t *world, int rank, void *id) {
  if (world->onlyRank >= 0 && world->onlyRank != rank) return NULL;
  RANK_CUDA(cudaStreamCreateWithFlags(&world->streams[rank], cudaStreamNonBlocking));
  int status = worldNccl.initRank(&world->comms[rank], world->nRanks, *(worldId_t *)id, rank);
  /* With NCCL_COMM_BLOCKING=0. */
  double start = gpu_world_seconds();
  while (status == NCCL_IN_PROGRESS && gpu_world_seconds() - start < MEET_SECONDS) {
    gpu_world_sleep_ms(1);
    int asked = worldNccl.getAsyncError(world->comms[rank], &status);
    if (asked != 0) status = asked;
  }
  RANK_CHECK(status == 0, "ncclCommInitRank: %d", status);
  return NULL;
}

static const char *world_start(gpuWorld_t *world, worldId_t *id) {
  (void)pthread_mutex_init(&world->lock, NULL);
  (void)pthread_cond_init(&world->changed, NULL);
  RANK_OK(ultraepHostWorldCreate(&world->host, world->nRanks));
  return gpu_world_run(world, world_init, id);
}

const char *gpu_world_make_on(gpuWorld_t *world, int nRanks, int device) {
  worldId_t id;
  *world = (gpuWorld_t){.nRanks = nRanks, .device = device, .onlyRank = -1};
  if (worldNccl.getUniqueId(&id) != 0) return "ncclGetUniqueId failed";
  return world_start(world, &id);
}

const char *gpu_world_make(gpuWorld_t *world, int nRanks) {
  return gpu_world_make_on(world, nRanks, -1);
}

/* The file appears whole: written beside its place, then renamed. */
static const char *world_write_id(const char *path, const worldId_t *id) {
  char beside[1024];
  snprintf(beside, sizeof(beside), "%s.new", path);
  FILE *file = fopen(beside, "wb");
  RANK_CHECK(file, "cannot write %s", beside);
  bool isWritten = fwrite(id, sizeof(*id), 1, file) == 1;
  isWritten = fclose(file) == 0 && isWritten;
  RANK_CHECK(isWritten && rename(beside, path) == 0, "cannot write %s", path);
  return NULL;
}

static const char *world_read_id(const char *path, worldId_t *id) {
  double start = gpu_world_seconds();
  FILE *file = NULL;
  while (!(file = fopen(path, "rb")) && gpu_world_seconds() - start < MEET_SECONDS) gpu_world_sleep_ms(10);
  RANK_CHECK(file, "%s did not appear within %d s", path, MEET_SECONDS);
  bool isRead = fread(id, sizeof(*id), 1, file) == 1;
  (void)fclose(file);
  RANK_CHECK(isRead, "%s is short", path);
  return NULL;
}

const char *gpu_world_make_process(gpuWorld_t *world, int nRanks, int rank, const char *idFile) {
  worldId_t id;
  int nDevices = 0;
  RANK_CUDA(cudaGetDeviceCount(&nDevices));
  *world = (gpuWorld_t){.nRanks = nRanks, .device = rank % nDevices, .onlyRank = rank};
  if (rank == 0 && worldNccl.getUniqueId(&id) != 0) return "ncclGetUniqueId failed";
  RANK_DO(rank == 0 ? world_write_id(idFile, &id) : world_read_id(idFile, &id));
  return world_start(world, &id);
}

static const char *world_fini(gpuWorld_t *world, int rank, void *argument) {
  (void)argument;
  if (world->comms[rank]) (void)worldNccl.destroy(world->comms[rank]);
  if (world->streams[rank]) (void)cudaStreamDestroy(world->streams[rank]);
  return NULL;
}

void gpu_world_free(gpuWorld_t *world) {
  (void)gpu_world_run(world, world_fini, NULL);
  (void)ultraepHostWorldDestroy(world->host);
  (void)pthread_cond_destroy(&world->changed);
  (void)pthread_mutex_destroy(&world->lock);
}

void gpu_world_abort(gpuWorld_t *world, int rank) {
  pthread_mutex_lock(&world->lock);
  ncclComm_t comm = world->comms[rank];
  world->comms[rank] = NULL;
  pthread_mutex_unlock(&world->lock);
  if (comm) (void)worldNccl.abort(comm);
}

void *gpu_world_alloc(size_t bytes) {
  void *ptr = NULL;
  return worldNccl.memAlloc(&ptr, bytes) == 0 ? ptr : NULL;
}

void gpu_world_release(void *ptr) {
  if (ptr) (void)worldNccl.memFree(ptr);
}
