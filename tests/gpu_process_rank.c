/* One rank of several processes: exchanges with the other ranks' processes and compares with the host
 * backend, all of whose ranks are threads here. Started by gpu_processes.sh:
 *
 *   gpu_process_rank probe                          0 if a device can be used, else 77
 *   gpu_process_rank RANK RANKS ID_FILE [SHAPES]    ID_FILE: where rank 0 leaves the communicator's id */
#include "gpu_case.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gpu_common.h"

/* Shapes take every mode in turn, the same in every process. */
static gpuShape_t process_shape(int nRanks, int number) {
  static const int hiddens[] = {64, 1024, 7168, 8};
  gpuShape_t shape = gpu_shape_small(nRanks);
  ultraepConfig_t *c = &shape.config;
  shape.seed = (uint64_t)number + 1;
  shape.weighted = number % 3 != 0;
  c->hidden = hiddens[number % 4];
  c->dispatchMode = number % 2 ? ULTRAEP_DISPATCH_ONCE : ULTRAEP_DISPATCH_DIRECT;
  c->combineMode = number / 2 % 2 ? ULTRAEP_COMBINE_PARTIAL : ULTRAEP_COMBINE_EXACT;
  c->scaleBytes = number % 5 == 0 ? 16 : 0;
  c->timeoutMs = 60000; /* processes start one after the other */
  for (int r = 0; r < nRanks; r++) shape.nTokens[r] = (r + number) % nRanks ? c->maxTokens - 7 * r : 0;
  return shape;
}

static const char *process_check(const gpuShape_t *shape, gpuSide_t sides[2], gpuData_t *data,
                                 cudaStream_t stream) {
  RANK_DO(gpu_device_enqueue(&sides[1], data, shape->seed % 2, stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  RANK_DO(gpu_compare_segments(sides[0].route, sides[1].route, stream));
  RANK_DO(gpu_compare_plans(sides[0].route, sides[1].route));
  return gpu_compare_data(shape, data);
}

static const char *process_rank(gpuWorld_t *world, int rank, void *argument) {
  const gpuShape_t *shape = argument;
  bool isMine = rank == world->onlyRank;
  gpuSide_t sides[2];
  gpuData_t data;
  planner_random_t random = {shape->seed * 100 + (uint64_t)rank};
  RANK_DO(gpu_side_make(world, shape, rank, false, &sides[0]));
  if (isMine) RANK_DO(gpu_side_make(world, shape, rank, true, &sides[1]));
  RANK_DO(gpu_data_make(shape, rank, sides[0].nRows, false, &data));
  for (int i = 0; i < GPU_LOADS_KINDS; i++) {
    gpu_data_fill(shape, (gpuLoads_t)i, &data, &random);
    RANK_DO(gpu_host_run(&sides[0], &data));
    if (isMine) RANK_DO(process_check(shape, sides, &data, world->streams[rank]));
  }
  if (isMine) RANK_DO(gpu_compare_counters(sides[0].group, sides[1].group));
  gpu_data_free(&data);
  if (isMine) RANK_DO(gpu_side_free(&sides[1]));
  RANK_MEET(world); /* a host rank that leaves early would fail the others */
  return gpu_side_free(&sides[0]);
}

int main(int argc, char **argv) {
  GPU_REQUIRE();
  if (argc == 2 && strcmp(argv[1], "probe") == 0) return cudaFree(NULL) == cudaSuccess ? 0 : GPU_SKIP_CODE;
  int rank = argc > 3 ? atoi(argv[1]) : -1, nRanks = argc > 3 ? atoi(argv[2]) : 0;
  int nShapes = argc > 4 ? atoi(argv[4]) : 12;
  if (rank < 0 || rank >= nRanks || nRanks > GPU_WORLD_MAX_RANKS) {
    fprintf(stderr, "usage: %s probe | RANK RANKS ID_FILE [SHAPES]\n", argv[0]);
    return 2;
  }
  if (!gpu_world_usable(false)) return GPU_SKIP_CODE;
  gpuWorld_t world;
  const char *flaw = gpu_world_make_process(&world, nRanks, rank, argv[3]);
  for (int i = 0; i < nShapes && !flaw; i++) {
    gpuShape_t shape = process_shape(nRanks, i);
    flaw = gpu_world_run(&world, process_rank, &shape);
    if (flaw) printf("shape %d: ", i);
  }
  if (flaw) {
    printf("process of rank %d: %s\n", rank, flaw);
    return 1;
  }
  gpu_world_free(&world);
  printf("process of rank %d: %d shapes on %d ranks\n", rank, nShapes, nRanks);
  return 0;
}
