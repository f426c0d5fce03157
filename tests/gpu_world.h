/* Ranks of a real NCCL communicator as threads on the GPUs of this machine, several of which may share one;
 * or one rank of several processes. NCCL is loaded at run time, so that the tests build without it. */
#ifndef ULTRAEP_TESTS_GPU_WORLD_H_
#define ULTRAEP_TESTS_GPU_WORLD_H_

#include "ultraep.h"

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdbool.h>

#define GPU_WORLD_MAX_RANKS 8

typedef struct gpuWorld {
  int nRanks;
  int device;   /* of every thread; -1: ranks take the machine's devices in turn */
  int onlyRank; /* the rank with a communicator in this process; -1: all */
  ncclComm_t comms[GPU_WORLD_MAX_RANKS];
  cudaStream_t streams[GPU_WORLD_MAX_RANKS];
  ultraepHostWorld_t host; /* a host world with as many ranks, for comparison */
  /* gpu_world_meet */
  pthread_mutex_t lock;
  pthread_cond_t changed;
  int nWaiting, generation;
  bool isBroken;  /* a rank complained: nobody meets any more in this run */
  bool isStalled; /* the device did not begin a rank's kernel while others ran (gpu_side_sync) */
} gpuWorld_t;

/* One rank's part of a test; returns null, or what went wrong. */
typedef const char *(*gpuWorldRank_t)(gpuWorld_t *world, int rank, void *argument);

/* What main calls before it asks CUDA anything. False, with the reason printed, where there is no device, or
 * NCCL 2.30 or later is not there. threads: several ranks in one process on one device need more hardware
 * queues than CUDA's default, which it looks for when it starts; with one rank a process they may be too
 * many. */
bool gpu_world_usable(bool threads);
/* Null on success, else what went wrong. */
const char *gpu_world_make(gpuWorld_t *world, int nRanks);
/* The same with all ranks on one device. */
const char *gpu_world_make_on(gpuWorld_t *world, int nRanks, int device);
/* One rank a process: rank 0 writes the communicator's id to the file, the others read it. All ranks of the
 * host world are threads of every process. */
const char *gpu_world_make_process(gpuWorld_t *world, int nRanks, int rank, const char *idFile);
void gpu_world_free(gpuWorld_t *world);
/* Runs every rank on a thread with its device set; returns the first rank's complaint, null if none. */
const char *gpu_world_run(gpuWorld_t *world, gpuWorldRank_t run, void *argument);
/* Waits for the other ranks of the run, a minute at most; false if one has complained or does not come. */
bool gpu_world_meet(gpuWorld_t *world);
/* Ends what NCCL still does on a rank's communicator, which is gone then. From any thread, once or more. */
void gpu_world_abort(gpuWorld_t *world, int rank);

/* ncclMemAlloc and ncclMemFree; null on failure. */
void *gpu_world_alloc(size_t bytes);
void gpu_world_release(void *ptr);

double gpu_world_seconds(void);
void gpu_world_sleep_ms(int ms);
/* A message in memory of this thread. */
const char *gpu_world_say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Returns from a rank's function with the call's text when a CUDA or ultraep call fails. */
#define RANK_CUDA(call)                                                                                      \
  do {                                                                                                       \
    cudaError_t rankError = (call);                                                                          \
    if (rankError != cudaSuccess) return gpu_world_say("%s: %s", #call, cudaGetErrorString(rankError));      \
  } while (0)
#define RANK_IS(call, expected)                                                                              \
  do {                                                                                                       \
    ultraepResult_t rankResult = (call);                                                                     \
    if (rankResult != (expected))                                                                            \
      return gpu_world_say("line %d: %s is %s, not %s: %s", __LINE__, #call,                                 \
                           ultraepGetErrorString(rankResult), ultraepGetErrorString(expected),               \
                           ultraepGetLastError());                                                           \
  } while (0)
#define RANK_OK(call) RANK_IS(call, ultraepSuccess)
#define RANK_CHECK(condition, ...)                                                                           \
  do {                                                                                                       \
    if (!(condition)) return gpu_world_say(__VA_ARGS__);                                                     \
  } while (0)
/* Passes on what a part of a rank's function returned. */
#define RANK_DO(call)                                                                                        \
  do {                                                                                                       \
    const char *rankFlaw = (call);                                                                           \
    if (rankFlaw) return rankFlaw;                                                                           \
  } while (0)
#define RANK_MEET(world) RANK_CHECK(gpu_world_meet(world), "another rank did not come (line %d)", __LINE__)

#endif
