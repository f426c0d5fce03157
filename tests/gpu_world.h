/* Ranks of a real NCCL communicator as threads on the GPUs of this machine; several ranks may share one. NCCL
 * is loaded at run time, so that the tests build without it. */
#ifndef ULTRAEP_TESTS_GPU_WORLD_H_
#define ULTRAEP_TESTS_GPU_WORLD_H_

#include "ultraep.h"

#include <cuda_runtime_api.h>
#include <stdbool.h>

#define GPU_WORLD_MAX_RANKS 8

typedef struct gpuWorld {
  int nRanks;
  ncclComm_t comms[GPU_WORLD_MAX_RANKS];
  cudaStream_t streams[GPU_WORLD_MAX_RANKS];
  ultraepHostWorld_t host; /* a host world with as many ranks, for comparison */
} gpuWorld_t;

/* One rank's part of a test; returns null, or what went wrong. */
typedef const char *(*gpuWorldRank_t)(gpuWorld_t *world, int rank, void *argument);

/* False, with the reason printed, where NCCL 2.30 or later is not there. */
bool gpu_world_usable(void);
/* Null on success, else what went wrong. */
const char *gpu_world_make(gpuWorld_t *world, int nRanks);
void gpu_world_free(gpuWorld_t *world);
/* Runs every rank on a thread with its device set; returns the first rank's complaint, null if none. */
const char *gpu_world_run(gpuWorld_t *world, gpuWorldRank_t run, void *argument);

/* A message in memory of this thread. */
const char *gpu_world_say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Returns from a rank's function with the call's text when a CUDA or ultraep call fails. */
#define RANK_CUDA(call)                                                                                      \
  do {                                                                                                       \
    cudaError_t rankError = (call);                                                                          \
    if (rankError != cudaSuccess) return gpu_world_say("%s: %s", #call, cudaGetErrorString(rankError));      \
  } while (0)
#define RANK_OK(call)                                                                                        \
  do {                                                                                                       \
    ultraepResult_t rankResult = (call);                                                                     \
    if (rankResult != ultraepSuccess)                                                                        \
      return gpu_world_say("%s: %d %s", #call, rankResult, ultraepGetLastError());                           \
  } while (0)
#define RANK_CHECK(condition, ...)                                                                           \
  do {                                                                                                       \
    if (!(condition)) return gpu_world_say(__VA_ARGS__);                                                     \
  } while (0)

#endif
