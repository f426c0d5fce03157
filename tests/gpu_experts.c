/* Replicas' weights and gradients on GPUs: after a sync every slot holds its master's bytes, after a
 * reduction every master and every slot holds what the host backend gives, bit for bit; eagerly, in replayed
 * graphs, and queued over many layers with two routes alive. And what registering takes of memory. */
#include "gpu_expert_case.h"

#include "gpu_copy.h"
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
  x.isWhole = gradsMode == ULTRAEP_GRADS_UNORDERED;
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
}
static void test_graphs(void **state) {
  (void)state;
  check_hot(true, false, false, false, ULTRAEP_GRADS_ORDERED, 60);
  check_hot(true, false, false, true, ULTRAEP_GRADS_ORDERED, 60);
  check_hot(true, false, false, true, ULTRAEP_GRADS_UNORDERED, 60);
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
  ultraepRoute_t routes[2];
  int32_t *topk;        /* [LAYERS][2][nTokens][topK] */
  unsigned char *stage; /* [SYNCS][slots' weights] */
  int32_t *experts;     /* [SYNCS][S] */
  size_t slotBytes, nEntries;
  unsigned char *slots;
  int layer[SYNCS];
} layers_t;

/* What lies in the slots now, kept by a kernel in the stream's order. */
static const char *layers_keep(layers_t *l, ultraepRoute_t route, int nLocal, int nSlots, int sync,
                               cudaStream_t stream) {
  ultraepSegments_t s;
  RANK_OK(ultraepRouteSegments(route, &s));
  RANK_CUDA((cudaError_t)gpu_copy(l->stage + (size_t)sync * l->slotBytes, l->slots, l->slotBytes, stream));
  RANK_CUDA((cudaError_t)gpu_copy(l->experts + sync * nSlots, s.expert + nLocal,
                                  (size_t)nSlots * sizeof(int32_t), stream));
  return NULL;
}

static const char *layers_enqueue(gpuWorld_t *world, const gpuExperts_t *x, gpuExpertRank_t *rank,
                                  layers_t *l, cudaStream_t stream) {
  int nSlots = x->shape.config.nSlots, nTokens = x->shape.nTokens[rank->device.side.rank], sync = 0;
  for (int layer = 0; layer < LAYERS; layer++)
    for (int i = 0; i < 4; i++, sync++) { /* routes 0 1 1 0 */
      int which = i == 1 || i == 2;
      if (i < 2)
        RANK_OK(ultraepRouteUpdate(l->routes[which], l->topk + (size_t)(2 * layer + which) * l->nEntries,
                                   NULL, nTokens, stream));
      l->layer[sync] = i < 2 ? layer : LAYERS - 1 - layer;
      RANK_OK(ultraepWeightsSync(l->routes[which], 3 * l->layer[sync], stream));
      RANK_DO(layers_keep(l, l->routes[which], gpu_experts_local(x, world), nSlots, sync, stream));
    }
  RANK_CUDA(cudaStreamSynchronize(stream));
  return NULL;
}

static const char *layers_check(const gpuExperts_t *x, const gpuExpertRank_t *rank, const layers_t *l,
                                int64_t *nReplicas) {
  static _Thread_local unsigned char want[65536];
  ultraepGroup_t group = rank->device.side.group;
  int nSlots = x->shape.config.nSlots;
  unsigned char *stage = malloc(l->slotBytes);
  int32_t *experts = malloc(SYNCS * (size_t)nSlots * sizeof(*experts));
  RANK_CHECK(stage && experts, "no memory");
  RANK_CUDA(
      cudaMemcpy(experts, l->experts, SYNCS * (size_t)nSlots * sizeof(*experts), cudaMemcpyDeviceToHost));
  for (int i = 0; i < SYNCS; i++) {
    RANK_CUDA(cudaMemcpy(stage, l->stage + (size_t)i * l->slotBytes, l->slotBytes, cudaMemcpyDeviceToHost));
    for (int s = 0; s < nSlots; s++) {
      int expert = experts[i * nSlots + s];
      *nReplicas += expert >= 0;
      for (int t = 0; t < x->nWeights && expert >= 0; t++) {
        gpu_experts_fill(want, x->bytes[t], l->layer[i], t, expert);
        RANK_CHECK(memcmp(want, stage + group_slot_offset(group, t, s), x->bytes[t]) == 0,
                   "sync %d, layer %d, slot %d: not the weights %d of expert %d", i, l->layer[i], s, t,
                   expert);
      }
    }
  }
  free(stage);
  free(experts);
  return NULL;
}

static const char *layers_rank(gpuWorld_t *world, int rank, void *argument) {
  const gpuExperts_t *x = argument;
  cudaStream_t stream = world->streams[rank];
  static _Thread_local gpuPlaces_t places;
  gpuExpertRank_t self;
  layers_t l = {.nEntries = (size_t)x->shape.nTokens[rank] * (size_t)x->shape.config.topK};
  int64_t nReplicas = 0;
  RANK_DO(gpu_experts_make(world, x, rank, &self));
  ultraepGroup_t group = self.device.side.group;
  l.routes[0] = self.device.side.route;
  RANK_OK(ultraepRouteCreate(group, &l.routes[1]));
  l.slotBytes = group_slot_offset(group, x->nWeights, 0);
  RANK_CUDA(cudaMalloc((void **)&l.topk, (2 * LAYERS * l.nEntries + 1) * sizeof(int32_t)));
  RANK_CUDA(cudaMalloc((void **)&l.stage, SYNCS * l.slotBytes));
  RANK_CUDA(cudaMalloc((void **)&l.experts, SYNCS * (size_t)x->shape.config.nSlots * sizeof(int32_t)));
  for (int i = 0; i < 2 * LAYERS; i++) {
    gpu_data_fill(&x->shape, i % 3 ? GPU_LOADS_SKEW : GPU_LOADS_ONE_EXPERT, &self.data, &self.random);
    RANK_CUDA(cudaMemcpyAsync(l.topk + (size_t)i * l.nEntries, self.data.topk, l.nEntries * sizeof(int32_t),
                              cudaMemcpyHostToDevice, stream));
    RANK_CUDA(cudaStreamSynchronize(stream));
  }
  RANK_MEET(world);
  /* A first sync tells where the slots are. */
  RANK_OK(ultraepRouteUpdate(l.routes[0], l.topk, NULL, x->shape.nTokens[rank], stream));
  RANK_OK(ultraepWeightsSync(l.routes[0], 0, stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  RANK_DO(gpu_experts_places(x, l.routes[0], true, stream, &places));
  l.slots = places.tensors[0][gpu_experts_local(x, world)];
  RANK_MEET(world);
  RANK_DO(layers_enqueue(world, x, &self, &l, stream));
  RANK_OK(ultraepGroupStatus(group, NULL));
  RANK_MEET(world);
  RANK_DO(layers_check(x, &self, &l, &nReplicas));
  RANK_CHECK(rank == world->nRanks - 1 || nReplicas > LAYERS / 2, "only %lld replicas", (long long)nReplicas);
  RANK_MEET(world);
  RANK_CUDA(cudaFree(l.topk));
  RANK_CUDA(cudaFree(l.stage));
  RANK_CUDA(cudaFree(l.experts));
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

/* Optional arguments: random cases for each number of ranks (fewer under a checker), and which tests. */
int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_two),    cmocka_unit_test(test_four),     cmocka_unit_test(test_eight),
      cmocka_unit_test(test_graphs), cmocka_unit_test(test_repeated), cmocka_unit_test(test_layers),
      cmocka_unit_test(test_gate),   cmocka_unit_test(test_memory),
  };
  GPU_REQUIRE();
  if (!gpu_world_usable(true)) return GPU_SKIP_CODE;
  if (argc > 1) nCases = atoi(argv[1]);
  if (argc > 2) cmocka_set_test_filter(argv[2]);
  return cmocka_run_group_tests_name("gpu_experts", tests, NULL, NULL);
}
