/* Groups, routes and memory over time: two groups on one communicator, several routes in flight, registered
 * memory, groups made and destroyed over and over, properties, plans. */
#include "gpu_case.h"
#include "group.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "gpu_common.h"

#define RANKS 4
#define ROUTES 4
#define GRANULE ((size_t)2 << 20) /* of NCCL's and CUDA's device memory */

static int nRounds = 100;

/* Both sides of one group, and data for several exchanges. */
typedef struct {
  gpuShape_t shape;
  gpuSide_t host, device;
  gpuData_t data[ROUTES];
  ultraepRoute_t routes[2][ROUTES]; /* [host, device] */
  planner_random_t random;
} pair_t;

static const char *pair_make(gpuWorld_t *world, int rank, pair_t *pair) {
  RANK_DO(gpu_side_make(world, &pair->shape, rank, false, &pair->host));
  RANK_DO(gpu_side_make(world, &pair->shape, rank, true, &pair->device));
  pair->random = (planner_random_t){pair->shape.seed * 1000 + (uint64_t)rank};
  pair->routes[0][0] = pair->host.route;
  pair->routes[1][0] = pair->device.route;
  for (int i = 0; i < ROUTES; i++)
    RANK_DO(gpu_data_make(&pair->shape, rank, pair->device.nRows, true, &pair->data[i]));
  for (int i = 1; i < pair->shape.config.maxRoutes; i++) {
    RANK_OK(ultraepRouteCreate(pair->host.group, &pair->routes[0][i]));
    RANK_OK(ultraepRouteCreate(pair->device.group, &pair->routes[1][i]));
  }
  RANK_MEET(world);
  return NULL;
}

static const char *pair_free(gpuWorld_t *world, pair_t *pair) {
  RANK_MEET(world);
  for (int i = 0; i < ROUTES; i++) gpu_data_free(&pair->data[i]);
  RANK_DO(gpu_side_free(&pair->device));
  RANK_DO(gpu_side_free(&pair->host));
  RANK_MEET(world);
  return NULL;
}

static void run(gpuWorldRank_t rank, void *argument) {
  gpuWorld_t world;
  const char *flaw = gpu_world_make(&world, RANKS);
  if (!flaw) flaw = gpu_world_run(&world, rank, argument);
  if (flaw) fail_msg("%s", flaw);
  gpu_world_free(&world);
}

/* ---- two groups on one communicator ---- */

/* Groups that share nothing but the communicator: other experts, types, rows and modes. */
static const char *two_make(gpuWorld_t *world, int rank, pair_t pairs[2]) {
  memset(pairs, 0, 2 * sizeof(*pairs));
  for (int i = 0; i < 2; i++) {
    pairs[i].shape = gpu_shape_small(RANKS);
    pairs[i].shape.seed = (uint64_t)i + 11;
  }
  ultraepConfig_t *c = &pairs[1].shape.config;
  c->dataType = ULTRAEP_FLOAT32;
  c->hidden = 1000;
  c->nExperts = 32 * RANKS;
  c->topK = 7;
  c->scaleBytes = 12;
  c->dispatchMode = ULTRAEP_DISPATCH_ONCE;
  c->combineMode = ULTRAEP_COMBINE_PARTIAL;
  c->maxRecvRows = (int64_t)RANKS * c->maxTokens * c->topK + (int64_t)(32 + c->nSlots) * c->alignment;
  pairs[1].shape.nTokens[0] = 0;
  pairs[1].shape.nTokens[1] = 64;
  for (int i = 0; i < 2; i++) RANK_DO(pair_make(world, rank, &pairs[i]));
  return NULL;
}

static const char *two_rank(gpuWorld_t *world, int rank, void *argument) {
  (void)argument;
  pair_t *pairs = calloc(2, sizeof(*pairs));
  RANK_CHECK(pairs, "no memory");
  RANK_DO(two_make(world, rank, pairs));
  /* The first group on the world's stream, the second on one of its own. */
  cudaStream_t streams[2] = {world->streams[rank]};
  RANK_CUDA(cudaStreamCreateWithFlags(&streams[1], cudaStreamNonBlocking));
  RANK_MEET(world);
  for (int i = 0; i < nRounds; i++) {
    for (int j = 0; j < 2; j++) {
      gpu_data_fill(&pairs[j].shape, (gpuLoads_t)(i % GPU_LOADS_KINDS), &pairs[j].data[0], &pairs[j].random);
      RANK_DO(gpu_host_run(&pairs[j].host, &pairs[j].data[0]));
    }
    /* Groups are independent: ranks enqueue them in different orders, which needs a stream for each; in every
     * third round all do it in one order on one stream. */
    bool isOne = i % 3 == 2;
    for (int j = 0; j < 2; j++) {
      int at = isOne ? j : (j + rank) % 2;
      RANK_DO(gpu_device_enqueue(&pairs[at].device, &pairs[at].data[0], false, streams[isOne ? 0 : at]));
    }
    for (int j = 0; j < 2; j++) RANK_CUDA(cudaStreamSynchronize(streams[j]));
    for (int j = 0; j < 2; j++) {
      const char *flaw = gpu_compare_data(&pairs[j].shape, &pairs[j].data[0]);
      RANK_CHECK(!flaw, "round %d, group %d: %s", i, j, flaw);
    }
  }
  for (int j = 0; j < 2; j++) RANK_DO(gpu_compare_counters(pairs[j].host.group, pairs[j].device.group));
  for (int j = 0; j < 2; j++) RANK_DO(pair_free(world, &pairs[j]));
  RANK_CUDA(cudaStreamDestroy(streams[1]));
  free(pairs);
  return NULL;
}

static void test_two_groups(void **state) {
  (void)state;
  run(two_rank, NULL);
}

/* ---- routes in flight ---- */

/* Updates every route in one order, then uses them in others: dispatch and combine, then once more as a
 * backward pass does on a kept route. */
static const char *flight_round(pair_t *pair, planner_random_t *choices, cudaStream_t stream) {
  int order[ROUTES] = {0};
  for (int i = 1; i < ROUTES; i++) {
    int j = planner_random_below(choices, i + 1);
    order[i] = order[j];
    order[j] = i;
  }
  gpuSide_t host = pair->host;
  for (int i = 0; i < ROUTES; i++) {
    gpu_data_fill(&pair->shape, (gpuLoads_t)planner_random_below(choices, GPU_LOADS_KINDS), &pair->data[i],
                  &pair->random);
    host.route = pair->routes[0][i];
    RANK_DO(gpu_host_run(&host, &pair->data[i]));
  }
  for (int i = 0; i < ROUTES; i++) {
    int at = order[i];
    RANK_DO(gpu_device_inputs(&pair->device, &pair->data[at], stream));
    RANK_DO(gpu_device_update(&pair->device, pair->routes[1][at], stream));
  }
  for (int pass = 0; pass < 2; pass++)
    for (int i = 0; i < ROUTES; i++) {
      int at = order[pass ? ROUTES - 1 - i : (i + 1) % ROUTES];
      RANK_DO(gpu_device_inputs(&pair->device, &pair->data[at], stream));
      RANK_DO(gpu_device_exchange(&pair->device, pair->routes[1][at], stream));
      RANK_DO(gpu_device_outputs(&pair->device, &pair->data[at], stream));
      if (pass == 0) continue;
      RANK_CUDA(cudaStreamSynchronize(stream));
      const char *flaw = gpu_compare_data(&pair->shape, &pair->data[at]);
      RANK_CHECK(!flaw, "route %d: %s", at, flaw);
    }
  for (int i = 0; i < ROUTES; i++) {
    RANK_DO(gpu_compare_segments(pair->routes[0][i], pair->routes[1][i], stream));
    RANK_DO(gpu_compare_plans(pair->routes[0][i], pair->routes[1][i]));
  }
  return NULL;
}

/* A combine straight after an update, with no dispatch between that would have made the ranks meet. The rows
 * are what the last dispatch left, on both backends alike. */
static const char *combine_first(pair_t *pair, cudaStream_t stream) {
  gpuData_t *data = &pair->data[0];
  size_t outBytes = (data->nTokens + 1) * data->rowBytes;
  gpu_data_fill(&pair->shape, GPU_LOADS_UNIFORM, data, &pair->random);
  RANK_DO(gpu_host_run(&pair->host, data));
  RANK_DO(gpu_device_enqueue(&pair->device, data, false, stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  for (int i = 0; i < 4; i++) {
    int n = (int)data->nTokens;
    gpu_data_fill(&pair->shape, GPU_LOADS_SKEW, data, &pair->random);
    memset(data->out[0], GPU_POISON, outBytes);
    RANK_OK(ultraepRouteUpdate(pair->host.route, data->topk, data->weights, n, NULL));
    RANK_OK(ultraepAllToAll(pair->host.rows, data->out[0], ULTRAEP_COMBINE, pair->host.route, NULL));
    const enum cudaMemcpyKind up = cudaMemcpyHostToDevice, down = cudaMemcpyDeviceToHost;
    const gpuSide_t *d = &pair->device;
    size_t entries = data->nTokens * data->topK;
    RANK_CUDA(cudaMemcpyAsync(d->topk, data->topk, entries * sizeof(int32_t), up, stream));
    RANK_CUDA(cudaMemcpyAsync(d->topkWeights, data->weights, entries * sizeof(float), up, stream));
    RANK_CUDA(cudaMemsetAsync(d->out, GPU_POISON, outBytes, stream));
    RANK_DO(gpu_device_update(d, d->route, stream));
    RANK_OK(ultraepAllToAll(d->rows, d->out, ULTRAEP_COMBINE, d->route, stream));
    RANK_CUDA(cudaMemcpyAsync(data->out[1], d->out, outBytes, down, stream));
    RANK_CUDA(cudaStreamSynchronize(stream));
    RANK_CHECK(memcmp(data->out[0], data->out[1], outBytes) == 0, "a combine without a dispatch differs");
  }
  return NULL;
}

static const char *flight_rank(gpuWorld_t *world, int rank, void *argument) {
  bool once = *(const bool *)argument;
  pair_t *pair = calloc(1, sizeof(*pair));
  RANK_CHECK(pair, "no memory");
  pair->shape = gpu_shape_small(RANKS);
  pair->shape.seed = 5;
  pair->shape.config.maxRoutes = ROUTES;
  pair->shape.config.dispatchMode = once ? ULTRAEP_DISPATCH_ONCE : ULTRAEP_DISPATCH_DIRECT;
  pair->shape.config.combineMode = once ? ULTRAEP_COMBINE_PARTIAL : ULTRAEP_COMBINE_EXACT;
  RANK_DO(pair_make(world, rank, pair));
  planner_random_t choices = {6};
  for (int i = 0; i < nRounds / 4; i++) {
    const char *flaw = flight_round(pair, &choices, world->streams[rank]);
    if (!flaw) flaw = combine_first(pair, world->streams[rank]);
    RANK_CHECK(!flaw, "round %d: %s", i, flaw);
  }
  RANK_DO(pair_free(world, pair));
  free(pair);
  return NULL;
}

static void test_routes_in_flight(void **state) {
  (void)state;
  for (int once = 0; once < 2; once++) run(flight_rank, &(bool){once});
}

/* ---- registered memory ---- */

/* The caller's memory, taken from an offset on, instead of the group's own. */
static const char *register_rank(gpuWorld_t *world, int rank, void *argument) {
  size_t offset = *(const size_t *)argument;
  pair_t *pair = calloc(1, sizeof(*pair));
  RANK_CHECK(pair, "no memory");
  pair->shape = gpu_shape_small(RANKS);
  RANK_DO(pair_make(world, rank, pair));
  size_t bytes = pair->data[0].nRows * pair->data[0].rowBytes;
  unsigned char *mine = gpu_world_alloc(offset + bytes + 4096);
  RANK_CHECK(mine, "ncclMemAlloc failed");
  RANK_MEET(world);
  for (int i = 0; i < 3; i++) {
    gpuSide_t device = pair->device;
    RANK_OK(ultraepMemRegister(device.group, mine + offset, bytes + 256));
    device.rows = mine + offset + 256; /* the symmetric buffer need not be the start of a region */
    gpu_data_fill(&pair->shape, GPU_LOADS_SKEW, &pair->data[0], &pair->random);
    RANK_DO(gpu_host_run(&pair->host, &pair->data[0]));
    RANK_DO(gpu_device_enqueue(&device, &pair->data[0], false, world->streams[rank]));
    RANK_CUDA(cudaStreamSynchronize(world->streams[rank]));
    RANK_DO(gpu_compare_data(&pair->shape, &pair->data[0]));
    RANK_OK(ultraepMemFree(device.group, mine + offset));
    RANK_IS(ultraepAllToAll(device.tokens, device.rows, ULTRAEP_DISPATCH, device.route, world->streams[rank]),
            ultraepInvalidArgument);
    RANK_MEET(world);
  }
  RANK_DO(pair_free(world, pair));
  gpu_world_release(mine);
  free(pair);
  return NULL;
}

static void test_register(void **state) {
  (void)state;
  run(register_rank, &(size_t){0});
  run(register_rank, &(size_t){4096});
}

/* NCCL's windows begin at multiples of 4096 bytes: anything else is refused by every rank on its own. Not so
 * with IPC. */
static const char *unaligned_rank(gpuWorld_t *world, int rank, void *argument) {
  (void)argument;
  pair_t *pair = calloc(1, sizeof(*pair));
  RANK_CHECK(pair, "no memory");
  pair->shape = gpu_shape_small(RANKS);
  RANK_DO(pair_make(world, rank, pair));
  unsigned char *mine = gpu_world_alloc(1 << 20);
  RANK_CHECK(mine, "ncclMemAlloc failed");
  RANK_MEET(world);
  if (pair->device.group->config.peers == ULTRAEP_PEERS_IPC) {
    RANK_OK(ultraepMemRegister(pair->device.group, mine + 16, 4096));
    RANK_OK(ultraepMemFree(pair->device.group, mine + 16));
  } else {
    RANK_IS(ultraepMemRegister(pair->device.group, mine + 16, 4096), ultraepInvalidArgument);
  }
  RANK_MEET(world);
  RANK_DO(pair_free(world, pair));
  gpu_world_release(mine);
  free(pair);
  return NULL;
}

static void test_register_unaligned(void **state) {
  (void)state;
  run(unaligned_rank, NULL);
}

/* ---- over and over ---- */

static const char *again_once(gpuWorld_t *world, int rank, const gpuShape_t *shape, int round,
                              gpuData_t *data, planner_random_t *random) {
  gpuSide_t host, device;
  cudaStream_t stream = world->streams[rank];
  RANK_DO(gpu_side_make(world, shape, rank, false, &host));
  RANK_DO(gpu_side_make(world, shape, rank, true, &device));
  RANK_MEET(world);
  gpu_data_fill(shape, GPU_LOADS_SKEW, data, random);
  RANK_DO(gpu_host_run(&host, data));
  RANK_DO(gpu_device_enqueue(&device, data, true, stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  RANK_DO(gpu_compare_data(shape, data));
  /* Sometimes tidy, sometimes all at once. */
  if (round % 2) {
    RANK_OK(ultraepMemFree(device.group, device.scales));
    RANK_OK(ultraepRouteDestroy(device.route));
    RANK_OK(ultraepMemFree(device.group, device.rows));
  }
  RANK_MEET(world);
  RANK_DO(gpu_side_free(&device));
  RANK_DO(gpu_side_free(&host));
  RANK_MEET(world);
  return NULL;
}

static const char *again_rank(gpuWorld_t *world, int rank, void *argument) {
  const gpuShape_t *shape = argument;
  enum { WARM_UP = 4 };
  size_t before = 0, after = 0, total;
  gpuData_t data;
  planner_random_t random = {(uint64_t)rank};
  RANK_DO(gpu_data_make(shape, rank, (size_t)shape->config.maxRecvRows, true, &data));
  for (int i = 0; i < WARM_UP + nRounds; i++) {
    const char *flaw = again_once(world, rank, shape, i, &data, &random);
    RANK_CHECK(!flaw, "round %d: %s", i, flaw);
    RANK_CUDA(cudaMemGetInfo(i < WARM_UP ? &before : &after, &total));
    RANK_MEET(world);
  }
  RANK_CHECK(before <= after + GRANULE, "%d groups took %zu bytes of device memory for good", nRounds,
             before - after);
  gpu_data_free(&data);
  return NULL;
}

static void test_again(void **state) {
  (void)state;
  gpuShape_t shape = gpu_shape_small(RANKS);
  shape.config.dispatchMode = ULTRAEP_DISPATCH_ONCE;
  shape.config.combineMode = ULTRAEP_COMBINE_PARTIAL;
  run(again_rank, &shape);
}

/* ---- properties ---- */

static const char *properties_rank(gpuWorld_t *world, int rank, void *argument) {
  gpuShape_t shape = *(const gpuShape_t *)argument;
  ultraepGroup_t groups[2];
  ultraepGroupProperties_t p[2], small;
  ultraepRoute_t route;
  RANK_OK(ultraepGroupCreateHost(&groups[0], world->host, rank, &shape.config));
  RANK_OK(ultraepGroupCreate(&groups[1], world->comms[rank], &shape.config));
  for (int i = 0; i < 2; i++) RANK_OK(ultraepGroupProperties(groups[i], &p[i]));
  RANK_CHECK(p[1].rank == rank && p[1].nRanks == p[0].nRanks && p[1].nDomainRanks == p[0].nDomainRanks &&
                 p[1].nLocalInstances == p[0].nLocalInstances && p[1].maxRecvRows == p[0].maxRecvRows,
             "properties: rank %d of %d, domain %d, %d instances, %lld rows", p[1].rank, p[1].nRanks,
             p[1].nDomainRanks, p[1].nLocalInstances, (long long)p[1].maxRecvRows);
  /* Partial sums are one row of the group's type for each row, beside which the rest is small. */
  int64_t partials = p[1].maxRecvRows * 2 * shape.config.hidden;
  RANK_CHECK(
      p[1].windowBytes >= partials && p[1].windowBytes < 2 * partials + (1 << 20) && p[1].slotBytes == 0,
      "%lld bytes of window for %lld of partial sums", (long long)p[1].windowBytes, (long long)partials);
  RANK_OK(ultraepRouteCreate(groups[1], &route));
  RANK_OK(ultraepGroupProperties(groups[1], &small));
  RANK_CHECK(small.privateBytes > p[1].privateBytes && small.windowBytes == p[1].windowBytes,
             "a route took no memory");
  RANK_OK(ultraepRouteDestroy(route));
  RANK_OK(ultraepGroupProperties(groups[1], &small));
  RANK_CHECK(small.privateBytes == p[1].privateBytes, "a route's memory is still counted");
  RANK_MEET(world);
  for (int i = 0; i < 2; i++) RANK_OK(ultraepGroupDestroy(groups[i]));
  RANK_MEET(world);
  shape.config.combineMode = ULTRAEP_COMBINE_EXACT; /* neither metadata nor partial sums */
  RANK_OK(ultraepGroupCreate(&groups[1], world->comms[rank], &shape.config));
  RANK_OK(ultraepGroupProperties(groups[1], &small));
  RANK_CHECK(small.windowBytes < 1 << 20, "%lld bytes of window for flags and loads",
             (long long)small.windowBytes);
  RANK_MEET(world);
  RANK_OK(ultraepGroupDestroy(groups[1]));
  return NULL;
}

static void test_properties(void **state) {
  (void)state;
  gpuShape_t shape = gpu_shape_small(RANKS);
  shape.config.dispatchMode = ULTRAEP_DISPATCH_DIRECT;
  shape.config.combineMode = ULTRAEP_COMBINE_PARTIAL;
  shape.config.hidden = 4096;
  shape.config.maxRecvRows = 0; /* the library's choice */
  run(properties_rank, &shape);
}

/* Optional argument: rounds (fewer under a checker). */
int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_two_groups), cmocka_unit_test(test_routes_in_flight),
      cmocka_unit_test(test_register),   cmocka_unit_test(test_again),
      cmocka_unit_test(test_properties), cmocka_unit_test(test_register_unaligned),
  };
  if (!gpu_world_usable(true)) return GPU_SKIP_CODE;
  if (argc > 1) nRounds = atoi(argv[1]);
  return cmocka_run_group_tests_name("gpu_groups", tests, NULL, NULL);
}
