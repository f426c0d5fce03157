/* One rank's exchange on both backends, to be compared bit for bit: inputs, buffers, calls. */
#ifndef ULTRAEP_TESTS_GPU_CASE_H_
#define ULTRAEP_TESTS_GPU_CASE_H_

#include "gpu_world.h"
#include "planner_common.h"

#define GPU_POISON 0xa5 /* every byte of an output that was not written */

typedef struct {
  uint64_t seed;
  ultraepConfig_t config;
  int nTokens[GPU_WORLD_MAX_RANKS];
  bool weighted;
} gpuShape_t;

/* What the top-k entries look like. */
typedef enum {
  GPU_LOADS_UNIFORM,
  GPU_LOADS_SKEW,       /* half of them to few experts */
  GPU_LOADS_UNUSED,     /* skew, and every ninth entry is -1 */
  GPU_LOADS_ONE_EXPERT, /* everything to the last expert */
  GPU_LOADS_NONE,       /* every entry is -1 */
  GPU_LOADS_KINDS
} gpuLoads_t;

/* A rank's inputs and outputs of an update, a dispatch and two combines, on the host. Outputs: [0] of the
 * host backend, [1] of the device. */
typedef struct {
  size_t rowBytes, scaleBytes, nRows, nTokens, topK;
  int32_t *topk;
  float *weights;
  unsigned char *tokens, *scales;
  unsigned char *rows[2], *rowScales[2], *rowWeights[2]; /* [nRows] */
  unsigned char *out[2], *sum[2];                        /* [nTokens + 1], the last row is never written */
  void *block;                                           /* all of it */
  bool isQueued;
} gpuData_t;

/* A rank's group of one backend with a route, symmetric buffers, and inputs and outputs where that backend
 * wants them. */
typedef struct {
  const gpuShape_t *shape;
  int rank;
  bool onDevice;
  size_t nRows;
  ultraepGroup_t group;
  ultraepRoute_t route;
  unsigned char *rows, *scales, *weights; /* symmetric */
  int32_t *topk;                          /* this and the rest: on the device alone */
  float *topkWeights;
  unsigned char *tokens, *tokenScales, *out, *sum;
  cudaEvent_t fed; /* gpu_device_enqueue's inputs are there */
} gpuSide_t;

bool gpu_type_adds(int32_t dataType);

/* nRows: the group's maxRecvRows. isQueued: several at once go through one side, so copies to and from the
 * device must not wait (page-locked memory), and the host's rows are copied; else they are the side's own. */
const char *gpu_data_make(const gpuShape_t *shape, int rank, size_t nRows, bool isQueued, gpuData_t *data);
void gpu_data_free(gpuData_t *data);
void gpu_data_fill(const gpuShape_t *shape, gpuLoads_t loads, gpuData_t *data, planner_random_t *random);

/* Collective: makes the group, the route and all memory. */
const char *gpu_side_make(gpuWorld_t *world, const gpuShape_t *shape, int rank, bool onDevice,
                          gpuSide_t *side);
/* Not before every rank's work is done: ranks may share a device. */
const char *gpu_side_free(gpuSide_t *side);

/* Update, dispatch and combines on the side's route, with outputs poisoned before. */
const char *gpu_host_run(const gpuSide_t *side, gpuData_t *data);
/* The device's part in pieces, all enqueued, nothing waited for. */
const char *gpu_device_inputs(const gpuSide_t *side, const gpuData_t *data, cudaStream_t stream);
const char *gpu_device_update(const gpuSide_t *side, ultraepRoute_t route, cudaStream_t stream);
const char *gpu_device_exchange(const gpuSide_t *side, ultraepRoute_t route, cudaStream_t stream);
/* Both of these, with update and dispatch in one call. */
const char *gpu_device_fused(const gpuSide_t *side, ultraepRoute_t route, cudaStream_t stream);
/* One or the other, on the side's own route. */
const char *gpu_device_run(const gpuSide_t *side, bool fused, cudaStream_t stream);
const char *gpu_device_outputs(const gpuSide_t *side, gpuData_t *data, cudaStream_t stream);
/* Inputs, a run, outputs. */
const char *gpu_device_enqueue(const gpuSide_t *side, gpuData_t *data, bool fused, cudaStream_t stream);

/* Null if both backends gave the same, else the first difference. */
const char *gpu_compare_data(const gpuShape_t *shape, const gpuData_t *data);
const char *gpu_compare_segments(ultraepRoute_t host, ultraepRoute_t device, cudaStream_t stream);
const char *gpu_compare_plans(ultraepRoute_t host, ultraepRoute_t device);
const char *gpu_compare_counters(ultraepGroup_t host, ultraepGroup_t device);

/* A small shape of the given number of ranks: bf16, some ranks with fewer tokens and one with none, rows for
 * the worst case. */
gpuShape_t gpu_shape_small(int nRanks);

/* Collective: what a rank writes at its peers' symmetric memory, there where it sees it, is in that memory.
 */
const char *gpu_check_mappings(gpuWorld_t *world, const gpuSide_t *side);

/* Waits for the end of what gpu_device_enqueue put there. Where that takes half the group's timeout, prints
 * once what the side's kernels wait for, and marks the world where the first of them has not begun: of
 * streams of one process on one device, which only may run side by side, CUDA has on H200s let one stand for
 * seconds while kernels of others waited for its kernel, about once in several hundred exchanges. */
const char *gpu_side_sync(gpuWorld_t *world, const gpuSide_t *side, cudaStream_t stream);

/* Collective: a whole exchange on a new group of the communicator is right. */
static inline const char *gpu_check_usable(gpuWorld_t *world, int rank) {
  gpuShape_t shape = gpu_shape_small(world->nRanks);
  shape.config.dispatchMode = ULTRAEP_DISPATCH_DIRECT;
  shape.config.combineMode = ULTRAEP_COMBINE_EXACT;
  gpuSide_t host, device;
  gpuData_t data;
  planner_random_t random = {(uint64_t)rank + 7};
  RANK_DO(gpu_side_make(world, &shape, rank, false, &host));
  RANK_DO(gpu_side_make(world, &shape, rank, true, &device));
  RANK_DO(gpu_data_make(&shape, rank, device.nRows, true, &data));
  RANK_DO(gpu_check_mappings(world, &device));
  gpu_data_fill(&shape, GPU_LOADS_SKEW, &data, &random);
  RANK_DO(gpu_host_run(&host, &data));
  RANK_DO(gpu_device_enqueue(&device, &data, false, world->streams[rank]));
  RANK_DO(gpu_side_sync(world, &device, world->streams[rank]));
  RANK_OK(ultraepGroupStatus(device.group, NULL));
  RANK_DO(gpu_compare_segments(host.route, device.route, world->streams[rank]));
  RANK_DO(gpu_compare_data(&shape, &data));
  RANK_MEET(world);
  gpu_data_free(&data);
  RANK_DO(gpu_side_free(&device));
  RANK_DO(gpu_side_free(&host));
  RANK_MEET(world);
  return NULL;
}

#endif
