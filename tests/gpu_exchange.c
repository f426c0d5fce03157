/* The NCCL backend gives what the host backend gives, bit for bit: routes, rows, weights, scales and combined
 * tokens, on random shapes, with poisoned outputs. */
#include "gpu_case.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "gpu_common.h"

/* Of one rank's rows; much memory takes time, and finds nothing. */
#define MOST_BYTES ((int64_t)96 << 20)
#define FEW_BYTES ((int64_t)3 << 20) /* under a checker */

typedef struct {
  gpuShape_t shape;
  gpuLoads_t loads;
  int nUpdates;
  bool fused; /* the first update; then by turns */
} exchange_t;

static int mostTokens = 4096; /* of every tenth shape */

static exchange_t exchange_make(planner_random_t *random, int nRanks, int number) {
  static const int hiddens[] = {16, 64, 208, 1024, 4096, 7168, 8192};
  static const int perRank[] = {1, 2, 3, 8, 32, 128};
  exchange_t x = {.shape = {.seed = planner_random_next(random), .config = ULTRAEP_CONFIG_INITIALIZER}};
  ultraepConfig_t *c = &x.shape.config;
  c->nExperts = nRanks * perRank[planner_random_below(random, 6)];
  c->topK = 1 + planner_random_below(random, 16);
  c->hidden = hiddens[planner_random_below(random, 7)];
  c->dataType = planner_random_below(random, 5);
  c->nSlots = planner_random_below(random, 5);
  c->alignment = planner_random_below(random, 2) ? 1 : 1 << planner_random_below(random, 8);
  c->scaleBytes = planner_random_below(random, 3) ? 0 : 4 * (1 + planner_random_below(random, 56));
  c->maxTokens =
      number % 10 == 0 ? mostTokens : 1 + planner_random_below(random, mostTokens < 600 ? mostTokens : 600);
  if (c->maxTokens == mostTokens && c->hidden > 208)
    c->hidden = 208; /* capacity is the worst case: gigabytes */
  int64_t most = mostTokens < 4096 ? FEW_BYTES : MOST_BYTES;
  int64_t rows = (int64_t)nRanks * c->topK, bytes = rows * c->hidden * 4;
  if (c->maxTokens < mostTokens && c->maxTokens * bytes > most) c->maxTokens = (int32_t)(most / bytes) + 1;
  while (mostTokens < 4096 && c->alignment > 1 &&
         (c->nExperts + 4) * (int64_t)c->alignment * c->hidden > 4 * FEW_BYTES)
    c->alignment /= 2;
  c->dispatchMode = planner_random_below(random, 3);
  c->combineMode = planner_random_below(random, 4) == 0;
  c->tolerance = planner_random_below(random, 3) ? 0 : 0.02;
  c->replicaRows = planner_random_below(random, 3) ? 0 : 1 + planner_random_below(random, 64);
  c->maxCtas = 1 + planner_random_below(random, 16);
  c->balance = planner_random_below(random, 5) != 0;
  c->maxRecvRows = (int64_t)nRanks * c->maxTokens * c->topK + (int64_t)(c->nExperts + 4) * c->alignment;
  c->timeoutMs = 20000;
  for (int r = 0; r < nRanks; r++) {
    int kind = planner_random_below(random, 4);
    x.shape.nTokens[r] = kind == 0   ? 0
                         : kind == 1 ? c->maxTokens
                                     : planner_random_below(random, c->maxTokens + 1);
  }
  x.shape.weighted = planner_random_below(random, 3) != 0;
  x.loads = planner_random_below(random, 8) == 0 ? GPU_LOADS_ONE_EXPERT
            : planner_random_below(random, 2)    ? GPU_LOADS_UNUSED
                                                 : GPU_LOADS_SKEW;
  x.nUpdates = 1 + planner_random_below(random, 3);
  x.fused = planner_random_below(random, 2);
  return x;
}

/* Copies to and from pageable memory go through queues that ranks on one device share: a copy out that waits
 * for its rank's kernels, which wait for the other ranks, would hold up one that brings another rank its
 * inputs. So all ranks have their inputs before any begins, and copies out begin when kernels are done. */
static const char *exchange_device(gpuWorld_t *world, const gpuSide_t *device, gpuData_t *data, bool fused,
                                   cudaStream_t stream) {
  RANK_DO(gpu_device_inputs(device, data, stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  RANK_MEET(world);
  RANK_DO(gpu_device_run(device, fused, stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  RANK_DO(gpu_device_outputs(device, data, stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  return NULL;
}

static const char *exchange_rank(gpuWorld_t *world, int rank, void *argument) {
  const exchange_t *x = argument;
  const gpuShape_t *shape = &x->shape;
  gpuSide_t host, device;
  gpuData_t data;
  cudaStream_t stream = world->streams[rank];
  RANK_DO(gpu_side_make(world, shape, rank, false, &host));
  RANK_DO(gpu_side_make(world, shape, rank, true, &device));
  RANK_DO(gpu_data_make(shape, rank, device.nRows, false, &data));
  RANK_MEET(world);
  planner_random_t random = {shape->seed + (uint64_t)rank};
  for (int i = 0; i < x->nUpdates; i++) {
    gpu_data_fill(shape, x->loads, &data, &random);
    RANK_DO(gpu_host_run(&host, &data));
    RANK_DO(exchange_device(world, &device, &data, (x->fused + i) % 2, stream));
    RANK_DO(gpu_compare_segments(host.route, device.route, stream));
    RANK_DO(gpu_compare_data(shape, &data));
  }
  RANK_DO(gpu_compare_counters(host.group, device.group));
  RANK_MEET(world);
  gpu_data_free(&data);
  RANK_DO(gpu_side_free(&device));
  return gpu_side_free(&host);
}

static int nShapes = 100; /* for each number of ranks */

static void check_ranks(int nRanks) {
  gpuWorld_t world;
  planner_random_t random = {(uint64_t)nRanks * 1000};
  const char *flaw = gpu_world_make(&world, nRanks);
  if (flaw) fail_msg("%s", flaw);
  for (int i = 0; i < nShapes; i++) {
    exchange_t x = exchange_make(&random, nRanks, i);
    const ultraepConfig_t *c = &x.shape.config;
    flaw = gpu_world_run(&world, exchange_rank, &x);
    if (flaw)
      fail_msg("shape %d (R %d E %d K %d S %d hidden %d type %d tokens %d alignment %d scales %d dispatch %d "
               "combine %d blocks %d balance %d loads %d fused %d): %s",
               i, nRanks, c->nExperts, c->topK, c->nSlots, c->hidden, c->dataType, c->maxTokens, c->alignment,
               c->scaleBytes, c->dispatchMode, c->combineMode, c->maxCtas, c->balance, x.loads, x.fused,
               flaw);
  }
  gpu_world_free(&world);
  print_message("%d shapes on %d ranks\n", nShapes, nRanks);
}

static void test_two(void **state) {
  (void)state;
  check_ranks(2);
}
static void test_four(void **state) {
  (void)state;
  check_ranks(4);
}
static void test_eight(void **state) {
  (void)state;
  check_ranks(8);
}

/* Optional arguments: shapes for each number of ranks, the most tokens of a rank (fewer under a checker), and
 * which tests. */
int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_two), cmocka_unit_test(test_four),
                                     cmocka_unit_test(test_eight)};
  if (!gpu_world_usable(true)) return GPU_SKIP_CODE;
  if (argc > 1) nShapes = atoi(argv[1]);
  if (argc > 2) mostTokens = atoi(argv[2]);
  if (argc > 3) cmocka_set_test_filter(argv[3]);
  return cmocka_run_group_tests_name("gpu_exchange", tests, NULL, NULL);
}
