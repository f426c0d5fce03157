/* Replicas' weights and gradients on GPUs: after a sync every slot holds its master's bytes, after a
 * reduction every master and every slot holds what the host backend gives, bit for bit; eagerly, in replayed
 * graphs, queued over many layers with two routes alive, and on a second stream beside exchanges. And what
 * registering takes of memory. */
#include "gpu_expert_case.h"

#include "nccl_backend.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "gpu_common.h"

static const char *experts_rank(gpuWorld_t *world, int rank, void *argument) {
  const gpuExperts_t *x = argument;
  gpuExpertRank_t self;
  RANK_DO(gpu_experts_make(world, x, rank, &self));
  for (int i = 0; i < x->nSteps; i++) {
    const char *flaw = gpu_experts_step(world, x, i, &self);
    RANK_CHECK(!flaw, "step %d: %s", i, flaw);
  }
  if (!x->usesGraphs) RANK_DO(gpu_experts_compare_counters(&self)); /* a graph is replayed more often */
  return gpu_experts_free(world, &self);
}

static size_t random_bytes(planner_random_t *random, int most) {
  return 16 * (size_t)(1 + planner_random_below(random, most)); /* of any number of tiles, odd or even */
}

static gpuExperts_t experts_make(planner_random_t *random, int nRanks) {
  gpuExperts_t x = {.shape = gpu_shape_small(nRanks)};
  ultraepConfig_t *c = &x.shape.config;
  x.shape.seed = planner_random_next(random) >> 8;
  c->nExperts = nRanks * (1 + planner_random_below(random, 6));
  c->nSlots = planner_random_below(random, 5);
  c->topK = 1 + planner_random_below(random, 4);
  c->maxCtas = 1 + planner_random_below(random, 16);
  c->expertCtas = planner_random_below(random, 16);
  c->maxRecvRows = (int64_t)nRanks * c->maxTokens * c->topK + (int64_t)(c->nExperts + 4) * c->alignment;
  x.nWeights = 1 + planner_random_below(random, 4);
  x.nGrads = planner_random_below(random, 4);
  x.nLayers = 3;
  x.nSteps = 4;
  for (int t = 0; t < x.nWeights + x.nGrads; t++) {
    x.bytes[t] = random_bytes(random, planner_random_below(random, 3) ? 64 : 10000);
    x.types[t] = planner_random_below(random, 2) ? ULTRAEP_FLOAT32 : ULTRAEP_BFLOAT16;
  }
  x.loads = planner_random_below(random, 2) ? GPU_LOADS_ONE_EXPERT : GPU_LOADS_SKEW;
  x.isPortable = planner_random_below(random, 3) == 0;
  x.sharesGrads = planner_random_below(random, 2);
  x.isWhole = planner_random_below(random, 2);
  if (x.isWhole) c->gradsMode = ULTRAEP_GRADS_UNORDERED;
  if (planner_random_below(random, 2)) c->gradsMode |= ULTRAEP_GRADS_LEAVE;
  return x;
}

static int nCases = 20; /* for each number of ranks */

static void run(gpuWorld_t *world, gpuWorldRank_t rank, gpuExperts_t *x, const char *what) {
  const ultraepConfig_t *c = &x->shape.config;
  const char *flaw = gpu_world_run(world, rank, x);
  if (flaw)
    fail_msg("%s (R %d E %d S %d blocks %d, %d weights of %zu .. bytes, %d gradients, %s): %s", what,
             world->nRanks, c->nExperts, c->nSlots, c->maxCtas, x->nWeights, x->bytes[0], x->nGrads,
             x->isPortable ? "portable" : "bulk", flaw);
}

static void check_random(int nRanks) {
  gpuWorld_t world;
  planner_random_t random = {(uint64_t)nRanks * 77};
  const char *flaw = gpu_world_make(&world, nRanks);
  if (flaw) fail_msg("%s", flaw);
  for (int i = 0; i < nCases; i++) {
    char what[32];
    snprintf(what, sizeof(what), "case %d", i);
    gpuExperts_t x = experts_make(&random, nRanks);
    run(&world, experts_rank, &x, what);
  }
  gpu_world_free(&world);
  print_message("%d cases on %d ranks\n", nCases, nRanks);
}

static void test_two(void **state) {
  (void)state;
  check_random(2);
}
static void test_four(void **state) {
  (void)state;
  check_random(4);
}
static void test_eight(void **state) {
  (void)state;
  check_random(8);
}

static void check_hot(bool usesGraphs, bool repeats, bool isPortable, bool sharesGrads, int gradsMode,
                      int nSteps) {
  gpuWorld_t world;
  gpuExperts_t x = gpu_experts_hot();
  const char *flaw = gpu_world_make(&world, 8);
  if (flaw) fail_msg("%s", flaw);
  x.usesGraphs = usesGraphs;
  x.repeats = repeats;
  x.isPortable = isPortable;
  x.sharesGrads = sharesGrads;
  x.shape.config.gradsMode = gradsMode;
  x.isWhole = gradsMode & ULTRAEP_GRADS_UNORDERED;
  x.nSteps = nSteps;
  run(&world, experts_rank, &x, usesGraphs ? "graphs" : "repeated");
  gpu_world_free(&world);
}

static void test_repeated(void **state) {
  (void)state;
  check_hot(false, true, false, false, ULTRAEP_GRADS_ORDERED, 20);
  check_hot(false, true, false, true, ULTRAEP_GRADS_ORDERED, 20);
  check_hot(false, true, true, true, ULTRAEP_GRADS_ORDERED, 5);
  check_hot(false, true, false, true, ULTRAEP_GRADS_UNORDERED, 5);
  check_hot(false, true, false, true, ULTRAEP_GRADS_ORDERED | ULTRAEP_GRADS_LEAVE, 10);
}
static void test_graphs(void **state) {
  (void)state;
  check_hot(true, false, false, false, ULTRAEP_GRADS_ORDERED, 60);
  check_hot(true, false, false, true, ULTRAEP_GRADS_ORDERED, 60);
  check_hot(true, false, false, true, ULTRAEP_GRADS_UNORDERED, 60);
  check_hot(true, false, false, true, ULTRAEP_GRADS_ORDERED | ULTRAEP_GRADS_LEAVE, 30);
}

/* ---- the gate by a measured rate ---- */

static ultraepPlannerConfig_t gatePlanners[GPU_WORLD_MAX_RANKS];

static const char *gate_rank(gpuWorld_t *world, int rank, void *argument) {
  const gpuExperts_t *x = argument;
  gpuExpertRank_t self;
  RANK_DO(gpu_experts_make(world, x, rank, &self));
  RANK_OK(ultraepGroupPlanner(self.device.side.group, &gatePlanners[rank]));
  RANK_MEET(world);
  return gpu_experts_free(world, &self);
}

static uint64_t check_gate(gpuWorld_t *world, gpuExperts_t *x) {
  run(world, gate_rank, x, "gate");
  for (int r = 1; r < world->nRanks; r++)
    if (gatePlanners[r].copyPs != gatePlanners[0].copyPs || gatePlanners[r].rowPs != gatePlanners[0].rowPs)
      fail_msg("ranks 0 and %d have another gate", r);
  return gatePlanners[0].copyPs;
}

/* Slots of one expert: 4 MiB of weights and 8 MiB of gradients. */
static void test_gate(void **state) {
  (void)state;
  gpuWorld_t world;
  gpuExperts_t x = {.shape = gpu_shape_small(4), .nWeights = 1, .nGrads = 1, .nLayers = 1, .nSteps = 1};
  const char *flaw = gpu_world_make(&world, 4);
  if (flaw) fail_msg("%s", flaw);
  x.shape.config.nSlots = 1;
  x.shape.config.nExperts = 4;
  x.shape.config.expertBytes = ULTRAEP_EXPERT_BYTES_REGISTERED;
  x.shape.config.rowSeconds = 4e-6; /* rows so dear that there is room for any copy */
  x.shape.config.maxRecvRows = 0;
  x.bytes[0] = 4 << 20;
  x.bytes[1] = 8 << 20;
  uint64_t measured = check_gate(&world, &x);
  assert_true(measured > 0);
  assert_true(measured != UINT64_C(16) * (1 << 20) * 5 / 2); /* 16 MiB at the default 400e9 */
  x.shape.config.linkBytesPerSecond = 200e9;
  assert_int_equal(check_gate(&world, &x), UINT64_C(16) * (1 << 20) * 5);
  gpu_world_free(&world);
}

/* ---- memory ---- */

#define GRANULE ((size_t)2 << 20) /* of NCCL's device memory */
#define MEMORY_LAYERS 2

/* Bytes that registering took on rank 0: as the group says, and on its device for all ranks there. */
static int64_t memorySaid;
static size_t memoryTaken;

static const char *memory_there(ultraepGroup_t group, int64_t *said, size_t *unused) {
  ultraepGroupProperties_t p;
  size_t total;
  RANK_OK(ultraepGroupProperties(group, &p));
  RANK_CUDA(cudaMemGetInfo(unused, &total));
  *said = p.windowBytes + p.privateBytes + p.slotBytes;
  return NULL;
}

/* All layers, with the masters there before. */
static const char *memory_measure(gpuWorld_t *world, const gpuExperts_t *x, const gpuExpertSide_t *side) {
  int64_t said[2] = {0};
  size_t unused[2] = {0};
  RANK_MEET(world);
  RANK_DO(memory_there(side->side.group, &said[0], &unused[0]));
  RANK_MEET(world);
  for (int layer = 0; layer < MEMORY_LAYERS; layer++) {
    ultraepExperts_t experts = gpu_experts_of(x, side, gpu_experts_local(x, world), layer);
    RANK_OK(ultraepExpertsRegister(side->side.group, layer, &experts));
  }
  RANK_MEET(world);
  RANK_DO(memory_there(side->side.group, &said[1], &unused[1]));
  if (side->side.rank == 0) {
    memorySaid = said[1] - said[0];
    memoryTaken = unused[0] > unused[1] ? unused[0] - unused[1] : 0;
  }
  RANK_MEET(world);
  return NULL;
}

static const char *memory_rank(gpuWorld_t *world, int rank, void *argument) {
  const gpuExperts_t *x = argument;
  size_t nLocal = (size_t)gpu_experts_local(x, world), weights = 0;
  gpuExpertSide_t side = {.ownsGrads = true};
  for (int t = 0; t < x->nWeights; t++) weights += nLocal * x->bytes[t];
  RANK_DO(gpu_side_make(world, &x->shape, rank, true, &side.side));
  RANK_MEET(world);
  RANK_OK(ultraepMemAlloc(side.side.group, (void **)&side.masters, MEMORY_LAYERS * weights));
  for (int t = 0; t < x->nGrads; t++)
    RANK_CUDA(cudaMalloc((void **)&side.grads[t], nLocal * x->bytes[x->nWeights + t]));
  RANK_DO(memory_measure(world, x, &side));
  for (int t = 0; t < x->nGrads; t++) RANK_CUDA(cudaFree(side.grads[t]));
  return gpu_side_free(&side.side);
}

/* Experts of 4096 x 1536, gate and up, and down, in bfloat16, with gradients in fp32 where `trains`; where
 * memory is the host's, an eighth of that. */
static void check_memory(gpuWorld_t *world, bool trains, int64_t divisor) {
  gpuExperts_t x = {.shape = gpu_shape_small(world->nRanks), .nWeights = 2, .nGrads = trains ? 2 : 0};
  int64_t slots = 0;
  int nDevices;
  x.shape.config.nExperts = world->nRanks;
  x.shape.config.nSlots = 2;
  for (int t = 0; t < x.nWeights + x.nGrads; t++) {
    int64_t values = (int64_t)4096 * 1536 * (t % 2 ? 1 : 2) / divisor;
    x.bytes[t] = (size_t)values * (t < x.nWeights ? 2 : 4);
    x.types[t] = ULTRAEP_FLOAT32;
    slots += x.shape.config.nSlots * (int64_t)x.bytes[t];
  }
  run(world, memory_rank, &x, "memory");
  GPU_OK(cudaGetDeviceCount(&nDevices));
  int64_t nHere = world->device >= 0 ? world->nRanks : (world->nRanks + nDevices - 1) / nDevices;
  print_message(
      "2 slots of %.2f MB on each of %lld ranks of a device: the group has %.4f %% more, the device "
      "%.2f MB\n",
      (double)slots / 2e6, (long long)nHere, 100.0 * (double)(memorySaid - slots) / (double)slots,
      ((double)memoryTaken - (double)(nHere * slots)) / 1e6);
  assert_true(memorySaid >= slots && 100 * (memorySaid - slots) <= slots);
  assert_true((int64_t)memoryTaken <= nHere * (slots + slots / 100 + (int64_t)GRANULE));
}

static void test_memory(void **state) {
  (void)state;
  gpuWorld_t world;
  const char *flaw = gpu_world_make(&world, 2);
  if (flaw) fail_msg("%s", flaw);
  check_memory(&world, false, GPU_PATIENCE > 1 ? 8 : 1);
  check_memory(&world, true, GPU_PATIENCE > 1 ? 8 : 1);
  gpu_world_free(&world);
}

/* ---- many layers, two routes alive ---- */

#define LAYERS 100
#define SYNCS (4 * LAYERS) /* forward on each route, then backward in the other order */

typedef struct {
  gpuKept_t kept;
  ultraepRoute_t routes[2];
  int32_t *topk; /* [LAYERS][2][nTokens][topK] */
  size_t nEntries;
} layers_t;

static const char *layers_enqueue(const layers_t *l, int nTokens, cudaStream_t stream) {
  int sync = 0;
  for (int layer = 0; layer < LAYERS; layer++)
    for (int i = 0; i < 4; i++, sync++) { /* routes 0 1 1 0 */
      int which = i == 1 || i == 2;
      if (i < 2)
        RANK_OK(ultraepRouteUpdate(l->routes[which], l->topk + (size_t)(2 * layer + which) * l->nEntries,
                                   NULL, nTokens, stream));
      l->kept.layer[sync] = i < 2 ? layer : LAYERS - 1 - layer;
      RANK_OK(ultraepWeightsSync(l->routes[which], 3 * l->kept.layer[sync], stream));
      RANK_DO(gpu_keep(&l->kept, l->routes[which], sync, stream));
    }
  RANK_CUDA(cudaStreamSynchronize(stream));
  return NULL;
}

static const char *layers_rank(gpuWorld_t *world, int rank, void *argument) {
  const gpuExperts_t *x = argument;
  cudaStream_t stream = world->streams[rank];
  gpuExpertRank_t self;
  layers_t l = {.nEntries = (size_t)x->shape.nTokens[rank] * (size_t)x->shape.config.topK};
  int64_t nReplicas = 0;
  RANK_DO(gpu_experts_make(world, x, rank, &self));
  ultraepGroup_t group = self.device.side.group;
  l.routes[0] = self.device.side.route;
  RANK_OK(ultraepRouteCreate(group, &l.routes[1]));
  RANK_CUDA(cudaMalloc((void **)&l.topk, (2 * LAYERS * l.nEntries + 1) * sizeof(int32_t)));
  for (int i = 0; i < 2 * LAYERS; i++) {
    gpu_data_fill(&x->shape, i % 3 ? GPU_LOADS_SKEW : GPU_LOADS_ONE_EXPERT, &self.data, &self.random);
    RANK_CUDA(cudaMemcpyAsync(l.topk + (size_t)i * l.nEntries, self.data.topk, l.nEntries * sizeof(int32_t),
                              cudaMemcpyHostToDevice, stream));
    RANK_CUDA(cudaStreamSynchronize(stream));
  }
  RANK_DO(gpu_kept_make(world, x, &self, SYNCS, &l.kept));
  RANK_DO(layers_enqueue(&l, x->shape.nTokens[rank], stream));
  RANK_OK(ultraepGroupStatus(group, NULL));
  RANK_MEET(world);
  RANK_DO(gpu_kept_check(x, group, &l.kept, &nReplicas));
  RANK_CHECK(rank == world->nRanks - 1 || nReplicas > LAYERS / 2, "only %lld replicas", (long long)nReplicas);
  RANK_MEET(world);
  RANK_CUDA(cudaFree(l.topk));
  RANK_DO(gpu_kept_free(&l.kept));
  return gpu_experts_free(world, &self);
}

static void check_layers(int nRanks, bool isPortable) {
  gpuWorld_t world;
  gpuExperts_t x = {
      .shape = gpu_shape_small(nRanks), .nWeights = 3, .nLayers = LAYERS, .isPortable = isPortable};
  const char *flaw = gpu_world_make(&world, nRanks);
  if (flaw) fail_msg("%s", flaw);
  x.shape.config.nSlots = 2;
  x.shape.config.maxRoutes = 2;
  x.shape.config.nExperts = 2 * nRanks;
  x.shape.nTokens[1] = x.shape.config.maxTokens;
  x.bytes[0] = 40016;
  x.bytes[1] = 16 * 33;
  x.bytes[2] = 16384;
  run(&world, layers_rank, &x, "layers");
  gpu_world_free(&world);
}

static void test_layers(void **state) {
  (void)state;
  check_layers(8, false);
  check_layers(4, true);
}

/* ---- weights and gradients on a second stream, beside exchanges ---- */

enum { LANES_DEPTH = 3 };                                              /* forward passes queued at once */
enum { LANES_SYNC_FIRST, LANES_SYNC_LAST, LANES_GRADS, LANES_GRAPHS }; /* what a graph holds */

static int nLaneRounds = 40;

typedef struct {
  cudaStream_t main, beside;
  cudaEvent_t fork, join;
  gpuSide_t hosts[2], devices[2]; /* two routes of the same groups */
  gpuData_t data[LANES_DEPTH];
  cudaGraphExec_t graphs[LANES_GRAPHS];
  gpuKept_t kept;
  planner_random_t order; /* each rank's own */
} lanes_t;

/* `beside` goes on from where the main stream is; or the other way round. */
static const char *lanes_follow(cudaStream_t follower, cudaStream_t leader, cudaEvent_t event) {
  RANK_CUDA(cudaEventRecord(event, leader));
  RANK_CUDA(cudaStreamWaitEvent(follower, event, 0));
  return NULL;
}

/* The sync is enqueued before or after the exchange that it runs beside. The previous readers of the slots
 * are in the main stream, before the fork. */
static const char *lanes_forward(const lanes_t *l, int layer, bool syncFirst) {
  const gpuSide_t *side = &l->devices[0];
  RANK_DO(gpu_device_update(side, side->route, l->main));
  RANK_DO(lanes_follow(l->beside, l->main, l->fork));
  if (syncFirst) RANK_OK(ultraepWeightsSync(side->route, 3 * layer, l->beside));
  RANK_DO(gpu_device_exchange(side, side->route, l->main));
  if (!syncFirst) RANK_OK(ultraepWeightsSync(side->route, 3 * layer, l->beside));
  return lanes_follow(l->main, l->beside, l->join);
}

/* Gradients of the first route beside an update and an exchange of the second. */
static const char *lanes_backward(const lanes_t *l, bool gradsFirst) {
  const gpuSide_t *side = &l->devices[1];
  RANK_DO(lanes_follow(l->beside, l->main, l->fork));
  if (gradsFirst) RANK_OK(ultraepGradsReduce(l->devices[0].route, 0, l->beside));
  RANK_DO(gpu_device_fused(side, side->route, l->main));
  if (!gradsFirst) RANK_OK(ultraepGradsReduce(l->devices[0].route, 0, l->beside));
  return lanes_follow(l->main, l->beside, l->join);
}

static const char *lanes_capture(lanes_t *l, int which) {
  cudaGraph_t graph;
  RANK_CUDA(cudaStreamBeginCapture(l->main, cudaStreamCaptureModeThreadLocal));
  const char *flaw =
      which == LANES_GRADS ? lanes_backward(l, true) : lanes_forward(l, 0, which == LANES_SYNC_FIRST);
  cudaError_t error = cudaStreamEndCapture(l->main, &graph);
  if (flaw) return flaw;
  RANK_CUDA(error);
  RANK_CUDA(cudaGraphInstantiate(&l->graphs[which], graph, 0));
  RANK_CUDA(cudaGraphDestroy(graph));
  RANK_CUDA(cudaGraphUpload(l->graphs[which], l->main));
  RANK_CUDA(cudaStreamSynchronize(l->main));
  return NULL;
}

/* Graphs in one way on all ranks, since a device may run their branches one after another; eager calls in an
 * order that is each rank's own. `choices` gives the same on every rank. */
static const char *lanes_round(gpuWorld_t *world, const gpuExperts_t *x, gpuExpertRank_t *rank, lanes_t *l,
                               int64_t *nReplicas) {
  const gpuShape_t *shape = &x->shape;
  int ways[LANES_DEPTH], grads = planner_random_below(&rank->choices, 2);
  for (int i = 0; i < LANES_DEPTH; i++) {
    gpuLoads_t loads = (gpuLoads_t)planner_random_below(&rank->choices, GPU_LOADS_KINDS);
    ways[i] = planner_random_below(&rank->choices, 4);
    l->kept.layer[i] = ways[i] < LANES_GRADS ? 0 : planner_random_below(&rank->choices, x->nLayers);
    gpu_data_fill(shape, loads, &l->data[i], &rank->random);
    RANK_DO(gpu_host_run(&l->hosts[0], &l->data[i]));
  }
  RANK_OK(ultraepWeightsSync(l->hosts[0].route, 3 * l->kept.layer[LANES_DEPTH - 1], NULL));
  for (int i = 0; i < LANES_DEPTH; i++) {
    RANK_DO(gpu_device_inputs(&l->devices[0], &l->data[i], l->main));
    if (ways[i] < LANES_GRADS)
      RANK_CUDA(cudaGraphLaunch(l->graphs[ways[i]], l->main));
    else
      RANK_DO(lanes_forward(l, l->kept.layer[i], planner_random_below(&l->order, 2)));
    RANK_DO(gpu_keep(&l->kept, l->devices[0].route, i, l->main));
    RANK_DO(gpu_device_outputs(&l->devices[0], &l->data[i], l->main));
  }
  RANK_CUDA(cudaStreamSynchronize(l->main));
  for (int i = 0; i < LANES_DEPTH; i++) RANK_DO(gpu_compare_data(shape, &l->data[i]));
  RANK_DO(gpu_kept_check(x, l->devices[0].group, &l->kept, nReplicas));
  RANK_DO(gpu_experts_compare(x, rank, 0, x->nWeights, l->main));
  RANK_DO(gpu_experts_fill_grads(x, rank, l->main));
  gpu_data_fill(shape, GPU_LOADS_SKEW, &l->data[0], &rank->random);
  RANK_MEET(world);
  RANK_OK(ultraepGradsReduce(l->hosts[0].route, 0, NULL));
  RANK_DO(gpu_host_run(&l->hosts[1], &l->data[0]));
  RANK_DO(gpu_device_inputs(&l->devices[1], &l->data[0], l->main));
  if (grads)
    RANK_CUDA(cudaGraphLaunch(l->graphs[LANES_GRADS], l->main));
  else
    RANK_DO(lanes_backward(l, planner_random_below(&l->order, 2)));
  RANK_DO(gpu_device_outputs(&l->devices[1], &l->data[0], l->main));
  RANK_CUDA(cudaStreamSynchronize(l->main));
  RANK_DO(gpu_compare_data(shape, &l->data[0]));
  return gpu_experts_compare(x, rank, x->nWeights, x->nWeights + x->nGrads, l->main);
}

static const char *lanes_make(gpuWorld_t *world, const gpuExperts_t *x, gpuExpertRank_t *rank, lanes_t *l) {
  int number = rank->device.side.rank;
  *l = (lanes_t){.main = world->streams[number], .order = {x->shape.seed * 1000 + (uint64_t)number}};
  RANK_CUDA(cudaStreamCreateWithFlags(&l->beside, cudaStreamNonBlocking));
  RANK_CUDA(cudaEventCreateWithFlags(&l->fork, cudaEventDisableTiming));
  RANK_CUDA(cudaEventCreateWithFlags(&l->join, cudaEventDisableTiming));
  for (int i = 0; i < 2; i++) {
    l->hosts[i] = rank->host.side;
    l->devices[i] = rank->device.side;
  }
  RANK_OK(ultraepRouteCreate(rank->host.side.group, &l->hosts[1].route));
  RANK_OK(ultraepRouteCreate(rank->device.side.group, &l->devices[1].route));
  for (int i = 0; i < LANES_DEPTH; i++)
    RANK_DO(gpu_data_make(&x->shape, number, rank->device.side.nRows, true, &l->data[i]));
  gpu_data_fill(&x->shape, GPU_LOADS_SKEW, &rank->data, &rank->random);
  RANK_DO(gpu_kept_make(world, x, rank, LANES_DEPTH, &l->kept));
  for (int i = 0; i < LANES_GRAPHS; i++) RANK_DO(lanes_capture(l, i));
  RANK_MEET(world);
  return NULL;
}

static const char *lanes_rank(gpuWorld_t *world, int rank, void *argument) {
  const gpuExperts_t *x = argument;
  static _Thread_local gpuExpertRank_t self;
  static _Thread_local lanes_t l;
  int64_t nReplicas = 0;
  RANK_DO(gpu_experts_make(world, x, rank, &self));
  RANK_DO(lanes_make(world, x, &self, &l));
  for (int i = 0; i < nLaneRounds; i++) {
    const char *flaw = lanes_round(world, x, &self, &l, &nReplicas);
    RANK_CHECK(!flaw, "round %d: %s", i, flaw);
  }
  RANK_OK(ultraepGroupStatus(self.device.side.group, NULL));
  RANK_CHECK(rank != 0 || nReplicas > 0, "no replicas");
  RANK_MEET(world);
  for (int i = 0; i < LANES_GRAPHS; i++) RANK_CUDA(cudaGraphExecDestroy(l.graphs[i]));
  for (int i = 0; i < LANES_DEPTH; i++) gpu_data_free(&l.data[i]);
  RANK_DO(gpu_kept_free(&l.kept));
  RANK_DO(gpu_experts_free(world, &self));
  RANK_CUDA(cudaEventDestroy(l.fork));
  RANK_CUDA(cudaEventDestroy(l.join));
  RANK_CUDA(cudaStreamDestroy(l.beside));
  return NULL;
}

static void check_lanes(int nRanks, bool isPortable, int dispatchMode, int combineMode) {
  gpuWorld_t world;
  gpuExperts_t x = {.shape = gpu_shape_small(nRanks), .nWeights = 2, .nGrads = 2, .nLayers = 2};
  const char *flaw = gpu_world_make(&world, nRanks);
  if (flaw) fail_msg("%s", flaw);
  ultraepConfig_t *c = &x.shape.config;
  x.isPortable = isPortable;
  x.sharesGrads = !isPortable;
  x.shape.seed = (uint64_t)nRanks * 10 + isPortable;
  c->dispatchMode = dispatchMode;
  c->combineMode = combineMode;
  c->nSlots = 2;
  c->maxRoutes = 2;
  /* Blocks of both lanes on all ranks are resident at once. */
  c->maxCtas = 2;
  c->expertCtas = 2;
  x.bytes[0] = 3 * 16384 + 16 * 5;
  x.bytes[1] = 16 * 33;
  x.bytes[2] = 16384 + 16 * 9;
  x.bytes[3] = 16 * 65;
  x.types[2] = ULTRAEP_BFLOAT16;
  x.types[3] = ULTRAEP_FLOAT32;
  run(&world, lanes_rank, &x, "lanes");
  gpu_world_free(&world);
  print_message("%d passes on %d ranks\n", nLaneRounds * LANES_DEPTH, nRanks);
}

static void test_lanes(void **state) {
  (void)state;
  check_lanes(4, false, ULTRAEP_DISPATCH_DIRECT, ULTRAEP_COMBINE_EXACT);
  check_lanes(3, true, ULTRAEP_DISPATCH_ONCE, ULTRAEP_COMBINE_PARTIAL);
}

/* ---- what waits for a group's work waits for both streams ---- */

static void waits_sleep(void *unused) {
  (void)unused;
  gpu_world_sleep_ms(100);
}

/* The sync is late, and enqueued before the exchange: counters have both. */
static const char *waits_rank(gpuWorld_t *world, int rank, void *argument) {
  const gpuExperts_t *x = argument;
  cudaStream_t stream = world->streams[rank], beside;
  gpuExpertRank_t self;
  ultraepCounters_t counters;
  RANK_CUDA(cudaStreamCreateWithFlags(&beside, cudaStreamNonBlocking));
  RANK_DO(gpu_experts_make(world, x, rank, &self));
  gpu_data_fill(&x->shape, GPU_LOADS_ONE_EXPERT, &self.data, &self.random);
  RANK_DO(gpu_host_run(&self.host.side, &self.data));
  RANK_OK(ultraepWeightsSync(self.host.side.route, 0, NULL));
  RANK_DO(gpu_device_inputs(&self.device.side, &self.data, stream));
  RANK_DO(gpu_device_update(&self.device.side, self.device.side.route, stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  RANK_CUDA(cudaLaunchHostFunc(beside, waits_sleep, NULL));
  RANK_OK(ultraepWeightsSync(self.device.side.route, 0, beside));
  RANK_DO(gpu_device_exchange(&self.device.side, self.device.side.route, stream));
  RANK_DO(gpu_experts_compare_counters(&self));
  RANK_OK(ultraepGroupCounters(self.device.side.group, &counters));
  RANK_CHECK(rank == world->nRanks - 1 || counters.weightBytes > 0, "no replicas");
  RANK_MEET(world);
  RANK_DO(gpu_experts_free(world, &self));
  RANK_CUDA(cudaStreamDestroy(beside));
  return NULL;
}

static void test_waits(void **state) {
  (void)state;
  gpuWorld_t world;
  gpuExperts_t x = {.shape = gpu_shape_small(2), .nWeights = 1, .nLayers = 1};
  const char *flaw = gpu_world_make(&world, 2);
  if (flaw) fail_msg("%s", flaw);
  x.shape.nTokens[1] = x.shape.config.maxTokens;
  x.shape.config.nSlots = 1;
  x.bytes[0] = 40016;
  run(&world, waits_rank, &x, "waits");
  gpu_world_free(&world);
}

/* Optional arguments: random cases for each number of ranks (fewer under a checker), and which tests. */
int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_two),    cmocka_unit_test(test_four),     cmocka_unit_test(test_eight),
      cmocka_unit_test(test_graphs), cmocka_unit_test(test_repeated), cmocka_unit_test(test_layers),
      cmocka_unit_test(test_gate),   cmocka_unit_test(test_memory),   cmocka_unit_test(test_lanes),
      cmocka_unit_test(test_waits),
  };
  if (!gpu_world_usable(true)) return GPU_SKIP_CODE;
  if (argc > 1) nCases = nLaneRounds = atoi(argv[1]);
  if (argc > 2) cmocka_set_test_filter(argv[2]);
  return cmocka_run_group_tests_name("gpu_experts", tests, NULL, NULL);
}
