#include "gpu_world.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  char bytes[128];
} worldId_t; /* ncclUniqueId */

static struct {
  int (*getVersion)(int *);
  int (*getUniqueId)(worldId_t *);
  int (*initRank)(ncclComm_t *, int, worldId_t, int);
  int (*destroy)(ncclComm_t);
  int (*abort)(ncclComm_t);
} worldNccl;

const char *gpu_world_say(const char *format, ...) {
  static _Thread_local char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  return text;
}

bool gpu_world_usable(void) {
  /* Several ranks on one GPU; the caller's own settings stand. */
  setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1", 0);
  setenv("NCCL_MAX_CTAS", "4", 0);
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
  setenv("NCCL_NVLS_ENABLE", "0", 0);
  void *library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_GLOBAL);
  int version = 0;
  if (library) {
    worldNccl.getVersion = (int (*)(int *))dlsym(library, "ncclGetVersion");
    worldNccl.getUniqueId = (int (*)(worldId_t *))dlsym(library, "ncclGetUniqueId");
    worldNccl.initRank = (int (*)(ncclComm_t *, int, worldId_t, int))dlsym(library, "ncclCommInitRank");
    worldNccl.destroy = (int (*)(ncclComm_t))dlsym(library, "ncclCommDestroy");
    worldNccl.abort = (int (*)(ncclComm_t))dlsym(library, "ncclCommAbort");
    (void)worldNccl.getVersion(&version);
  }
  if (version < 23000) printf("NCCL 2.30 or later is needed, this is %d: skipped\n", version);
  return version >= 23000;
}

typedef struct {
  gpuWorld_t *world;
  int rank;
  gpuWorldRank_t run;
  void *argument;
  char complaint[1024];
} worldThread_t;

static void *world_thread(void *argument) {
  worldThread_t *self = argument;
  int nDevices = 1;
  (void)cudaGetDeviceCount(&nDevices);
  cudaError_t error = cudaSetDevice(self->rank % nDevices);
  const char *complaint =
      error == cudaSuccess ? self->run(self->world, self->rank, self->argument) : cudaGetErrorString(error);
  if (complaint) snprintf(self->complaint, sizeof(self->complaint), "rank %d: %s", self->rank, complaint);
  return NULL;
}

const char *gpu_world_run(gpuWorld_t *world, gpuWorldRank_t run, void *argument) {
  worldThread_t threads[GPU_WORLD_MAX_RANKS] = {0};
  pthread_t handles[GPU_WORLD_MAX_RANKS];
  const char *complaint = NULL;
  for (int r = 0; r < world->nRanks; r++) {
    threads[r] = (worldThread_t){.world = world, .rank = r, .run = run, .argument = argument};
    if (pthread_create(&handles[r], NULL, world_thread, &threads[r]) != 0) {
      printf("cannot start a thread\n");
      exit(1);
    }
  }
  for (int r = 0; r < world->nRanks; r++) (void)pthread_join(handles[r], NULL);
  for (int r = 0; r < world->nRanks && !complaint; r++)
    if (threads[r].complaint[0]) complaint = gpu_world_say("%s", threads[r].complaint);
  return complaint;
}

static const char *world_init(gpuWorld_t *world, int rank, void *id) {
  RANK_CUDA(cudaStreamCreateWithFlags(&world->streams[rank], cudaStreamNonBlocking));
  int status = worldNccl.initRank(&world->comms[rank], world->nRanks, *(worldId_t *)id, rank);
  RANK_CHECK(status == 0, "ncclCommInitRank: %d", status);
  return NULL;
}

const char *gpu_world_make(gpuWorld_t *world, int nRanks) {
  worldId_t id;
  *world = (gpuWorld_t){.nRanks = nRanks};
  if (worldNccl.getUniqueId(&id) != 0) return "ncclGetUniqueId failed";
  RANK_OK(ultraepHostWorldCreate(&world->host, nRanks));
  return gpu_world_run(world, world_init, &id);
}

static const char *world_fini(gpuWorld_t *world, int rank, void *argument) {
  (void)argument;
  (void)worldNccl.destroy(world->comms[rank]);
  (void)cudaStreamDestroy(world->streams[rank]);
  return NULL;
}

void gpu_world_free(gpuWorld_t *world) {
  (void)gpu_world_run(world, world_fini, NULL);
  (void)ultraepHostWorldDestroy(world->host);
}
