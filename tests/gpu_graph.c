/* CUDA graphs: route update, dispatch and combines captured once on every rank and replayed with changing
 * routing in the same buffers, queued several deep, between eager calls; every replay must give what the host
 * backend gives. */
#include "gpu_case.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "gpu_common.h"

enum { GRAPH_ALL, GRAPH_FUSED, GRAPH_EXCHANGE, GRAPHS };

#define DEPTH 4 /* exchanges that are queued before anything is waited for */

static int nRounds = 300; /* of DEPTH exchanges, for each number of ranks and each mode */

/* Captures what `record` enqueues on the stream; the graph is ready to launch without further allocation. */
static const char *capture(const gpuSide_t *side, const char *(*record)(const gpuSide_t *, cudaStream_t),
                           cudaStream_t stream, cudaGraphExec_t *exec) {
  cudaGraph_t graph;
  RANK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  const char *flaw = record(side, stream);
  cudaError_t error = cudaStreamEndCapture(stream, &graph);
  if (flaw) return flaw;
  RANK_CHECK(error == cudaSuccess, "end of capture: %s", cudaGetErrorString(error));
  RANK_CUDA(cudaGraphInstantiate(exec, graph, 0));
  RANK_CUDA(cudaGraphDestroy(graph));
  RANK_CUDA(cudaGraphUpload(*exec, stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  return NULL;
}

static const char *record_all(const gpuSide_t *side, cudaStream_t stream) {
  RANK_DO(gpu_device_update(side, side->route, stream));
  return gpu_device_exchange(side, side->route, stream);
}

static const char *record_fused(const gpuSide_t *side, cudaStream_t stream) {
  return gpu_device_fused(side, side->route, stream);
}

static const char *record_exchange(const gpuSide_t *side, cudaStream_t stream) {
  return gpu_device_exchange(side, side->route, stream);
}

/* One exchange, in one of the ways that a program may mix. The same choice on every rank. */
static const char *enqueue(const gpuSide_t *side, gpuData_t *data, int way,
                           const cudaGraphExec_t graphs[GRAPHS], cudaStream_t stream) {
  RANK_DO(gpu_device_inputs(side, data, stream));
  switch (way) {
  case 0: /* eager */
    RANK_DO(record_all(side, stream));
    break;
  case 1: /* an eager update, then a graph of the exchange */
    RANK_DO(gpu_device_update(side, side->route, stream));
    RANK_CUDA(cudaGraphLaunch(graphs[GRAPH_EXCHANGE], stream));
    break;
  case 2: /* the exchange again on the route that the graph updated, as in a backward pass */
    RANK_CUDA(cudaGraphLaunch(graphs[GRAPH_ALL], stream));
    RANK_DO(gpu_device_exchange(side, side->route, stream));
    break;
  case 3:
    RANK_DO(record_fused(side, stream));
    break;
  case 4:
  case 5:
  case 6:
    RANK_CUDA(cudaGraphLaunch(graphs[GRAPH_FUSED], stream));
    break;
  default:
    RANK_CUDA(cudaGraphLaunch(graphs[GRAPH_ALL], stream));
  }
  return gpu_device_outputs(side, data, stream);
}

/* Fills, queues and compares DEPTH exchanges. `choices` gives the same on every rank. */
static const char *replay_round(const gpuSide_t sides[2], gpuData_t *data,
                                const cudaGraphExec_t graphs[GRAPHS], planner_random_t *random,
                                planner_random_t *choices, cudaStream_t stream) {
  int ways[DEPTH], kinds[DEPTH];
  for (int i = 0; i < DEPTH; i++) {
    kinds[i] = planner_random_below(choices, GPU_LOADS_KINDS);
    ways[i] = planner_random_below(choices, 12);
    gpu_data_fill(sides[0].shape, (gpuLoads_t)kinds[i], &data[i], random);
    RANK_DO(gpu_host_run(&sides[0], &data[i]));
  }
  for (int i = 0; i < DEPTH; i++) RANK_DO(enqueue(&sides[1], &data[i], ways[i], graphs, stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  for (int i = 0; i < DEPTH; i++) {
    const char *flaw = gpu_compare_data(sides[0].shape, &data[i]);
    RANK_CHECK(!flaw, "exchange %d of the round (way %d, loads %d): %s", i, ways[i], kinds[i], flaw);
  }
  return gpu_compare_segments(sides[0].route, sides[1].route, stream);
}

static const char *replay_rank(gpuWorld_t *world, int rank, void *argument) {
  const gpuShape_t *shape = argument;
  cudaStream_t stream = world->streams[rank];
  cudaGraphExec_t graphs[GRAPHS];
  gpuSide_t sides[2];
  gpuData_t data[DEPTH];
  RANK_DO(gpu_side_make(world, shape, rank, false, &sides[0]));
  RANK_DO(gpu_side_make(world, shape, rank, true, &sides[1]));
  for (int i = 0; i < DEPTH; i++) RANK_DO(gpu_data_make(shape, rank, sides[1].nRows, true, &data[i]));
  RANK_DO(capture(&sides[1], record_all, stream, &graphs[GRAPH_ALL]));
  RANK_MEET(world);
  /* A graph of the exchange alone needs a route that has been updated once. */
  RANK_DO(gpu_device_inputs(&sides[1], &data[0], stream));
  RANK_CUDA(cudaMemsetAsync(sides[1].topk, 0xff, data[0].nTokens * data[0].topK * sizeof(int32_t), stream));
  RANK_DO(gpu_device_update(&sides[1], sides[1].route, stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  RANK_MEET(world);
  RANK_DO(capture(&sides[1], record_exchange, stream, &graphs[GRAPH_EXCHANGE]));
  RANK_DO(capture(&sides[1], record_fused, stream, &graphs[GRAPH_FUSED]));
  RANK_MEET(world);
  planner_random_t random = {shape->seed * 100 + (uint64_t)rank}, choices = {shape->seed};
  for (int i = 0; i < nRounds; i++) {
    const char *flaw = replay_round(sides, data, graphs, &random, &choices, stream);
    RANK_CHECK(!flaw, "round %d: %s", i, flaw);
  }
  RANK_OK(ultraepGroupStatus(sides[1].group, NULL));
  RANK_MEET(world);
  for (int i = 0; i < GRAPHS; i++) RANK_CUDA(cudaGraphExecDestroy(graphs[i]));
  for (int i = 0; i < DEPTH; i++) gpu_data_free(&data[i]);
  RANK_DO(gpu_side_free(&sides[1]));
  return gpu_side_free(&sides[0]);
}

static void run(int nRanks, gpuWorldRank_t rank, gpuShape_t *shape) {
  gpuWorld_t world;
  const char *flaw = gpu_world_make(&world, nRanks);
  if (!flaw) flaw = gpu_world_run(&world, rank, shape);
  if (flaw) fail_msg("%s", flaw);
  gpu_world_free(&world);
}

static void check_modes(int nRanks, int dispatchMode, int combineMode) {
  gpuShape_t shape = gpu_shape_small(nRanks);
  shape.seed = 100 * (uint64_t)nRanks + 10 * (uint64_t)dispatchMode + (uint64_t)combineMode;
  shape.config.dispatchMode = dispatchMode;
  shape.config.combineMode = combineMode;
  run(nRanks, replay_rank, &shape);
  print_message("%d exchanges on %d ranks\n", nRounds * DEPTH, nRanks);
}

static void test_two_direct(void **state) {
  (void)state;
  check_modes(2, ULTRAEP_DISPATCH_DIRECT, ULTRAEP_COMBINE_EXACT);
}
static void test_two_once(void **state) {
  (void)state;
  check_modes(2, ULTRAEP_DISPATCH_ONCE, ULTRAEP_COMBINE_PARTIAL);
}
static void test_eight_direct(void **state) {
  (void)state;
  check_modes(8, ULTRAEP_DISPATCH_DIRECT, ULTRAEP_COMBINE_EXACT);
}
static void test_eight_once(void **state) {
  (void)state;
  check_modes(8, ULTRAEP_DISPATCH_ONCE, ULTRAEP_COMBINE_PARTIAL);
}
static void test_eight_mixed(void **state) {
  (void)state;
  check_modes(8, ULTRAEP_DISPATCH_DIRECT, ULTRAEP_COMBINE_PARTIAL);
}

/* Replays whose route fails, for want of room or for a bad entry, move nothing, and say nothing of an eager
 * update that follows. */
static const char *failing_rank(gpuWorld_t *world, int rank, void *argument) {
  const gpuShape_t *shape = argument;
  cudaStream_t stream = world->streams[rank];
  cudaGraphExec_t graph = NULL;
  gpuSide_t sides[2] = {0};
  gpuData_t data = {0};
  ultraepStatus_t status;
  RANK_DO(gpu_side_make(world, shape, rank, false, &sides[0]));
  RANK_DO(gpu_side_make(world, shape, rank, true, &sides[1]));
  RANK_DO(gpu_data_make(shape, rank, sides[1].nRows, true, &data));
  RANK_DO(capture(&sides[1], record_all, stream, &graph));
  RANK_MEET(world);
  planner_random_t random = {shape->seed + (uint64_t)rank};
  for (int i = 0; i < 20; i++) {
    bool isBad = i % 2; /* an entry out of range on the last rank, else too much for one expert */
    gpu_data_fill(shape, GPU_LOADS_ONE_EXPERT, &data, &random);
    if (isBad && rank == world->nRanks - 1) data.topk[3] = shape->config.nExperts;
    RANK_DO(gpu_device_inputs(&sides[1], &data, stream));
    for (int j = 0; j < 3; j++) RANK_CUDA(cudaGraphLaunch(graph, stream));
    RANK_DO(gpu_device_outputs(&sides[1], &data, stream));
    RANK_CUDA(cudaStreamSynchronize(stream));
    for (size_t j = 0; j < data.nRows * data.rowBytes; j++)
      RANK_CHECK(data.rows[1][j] == GPU_POISON, "round %d: a failed route wrote row %zu", i,
                 j / data.rowBytes);
    ultraepResult_t expected = !isBad                      ? ultraepCapacityExceeded
                               : rank == world->nRanks - 1 ? ultraepInvalidArgument
                                                           : ultraepRemoteError;
    RANK_IS(ultraepGroupStatus(sides[1].group, &status), expected);
    RANK_CHECK(status.code == expected, "status.code is %d, not %d", status.code, expected);
    RANK_MEET(world);
    /* At once, so that the last replay's verdict may be all that the host knows. */
    gpu_data_fill(shape, GPU_LOADS_UNIFORM, &data, &random);
    RANK_DO(gpu_host_run(&sides[0], &data));
    RANK_DO(gpu_device_enqueue(&sides[1], &data, i % 2, stream));
    RANK_CUDA(cudaStreamSynchronize(stream));
    const char *flaw = gpu_compare_data(shape, &data);
    RANK_CHECK(!flaw, "round %d: %s", i, flaw);
    RANK_OK(ultraepGroupStatus(sides[1].group, &status));
    RANK_MEET(world);
  }
  RANK_CUDA(cudaGraphExecDestroy(graph));
  gpu_data_free(&data);
  RANK_DO(gpu_side_free(&sides[1]));
  return gpu_side_free(&sides[0]);
}

static void test_failing_replays(void **state) {
  (void)state;
  gpuShape_t shape = gpu_shape_small(4);
  shape.config.balance = 0;
  shape.config.maxRecvRows = 3 * 64 * 4; /* everything to one expert needs 4 * 64 * 4 */
  for (int r = 0; r < 4; r++) shape.nTokens[r] = 64;
  run(4, failing_rank, &shape);
}

/* Optional argument: rounds (fewer under a checker). */
int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_two_direct),   cmocka_unit_test(test_two_once),
      cmocka_unit_test(test_eight_direct), cmocka_unit_test(test_eight_once),
      cmocka_unit_test(test_eight_mixed),  cmocka_unit_test(test_failing_replays),
  };
  if (!gpu_world_usable(true)) return GPU_SKIP_CODE;
  if (argc > 1) nRounds = atoi(argv[1]);
  return cmocka_run_group_tests_name("gpu_graph", tests, NULL, NULL);
}
