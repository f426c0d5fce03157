/* The chains along which GPUs pass weights on are those of ultraepPlanRelay, place by place; those of
 * gradients go by rank. */
#include "gpu_chains.h"
#include "planner_common.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "gpu_common.h"

/* ---- what is expected ---- */

/* source[i] as of ultraepPlanRelay, but by rank. */
static void sources_by_rank(const ultraepPlan_t *plan, int32_t *source) {
  for (int32_t e = 0; e < plan->nExperts; e++)
    for (int32_t first = plan->replicaFirst[e], i = first; i < plan->replicaFirst[e + 1]; i++)
      source[plan->replicaIndex[i] - plan->nExperts] = i == first ? e : plan->replicaIndex[i - 1];
}

/* place[i] of every instance in its expert's chain, and next[i], the instance behind it, -1 at the end. */
static void places_find(const ultraepPlan_t *plan, const int32_t *source, int32_t *place, int32_t *next) {
  for (int32_t i = 0; i < plan->nInstances; i++) next[i] = -1;
  for (int32_t i = plan->nExperts; i < plan->nInstances; i++) next[source[i - plan->nExperts]] = i;
  for (int32_t e = 0; e < plan->nExperts; e++)
    for (int32_t at = 0, i = e; i >= 0; i = next[i]) place[i] = at++;
}

static gpuPlace_t place_of(const ultraepPlan_t *plan, int32_t instance) {
  if (instance < 0) return (gpuPlace_t){-1, -1};
  return (gpuPlace_t){plan->instances[instance].rank, plan->instances[instance].slot};
}

/* How many chains a rank is part of: its replicas, and its masters that have some. */
static int32_t chains_count(const ultraepPlan_t *plan, int32_t rank) {
  int32_t n = 0;
  for (int32_t i = 0; i < plan->nInstances; i++)
    n += plan->instances[i].rank == rank &&
         (i >= plan->nExperts || plan->replicaFirst[i] < plan->replicaFirst[i + 1]);
  return n;
}

/* Of a chain with one replica: the work goes by the other rank's chains, in numbers up to 16. */
static void turns_set(const ultraepPlan_t *plan, gpuChain_t *chain) {
  int32_t replica = plan->replicaIndex[plan->replicaFirst[chain->expert]];
  int32_t master = chains_count(plan, plan->instances[replica].rank);
  int32_t slot = chains_count(plan, plan->instances[chain->expert].rank);
  while (master > 16 || slot > 16) {
    master = (master + 1) / 2;
    slot = (slot + 1) / 2;
  }
  chain->turns[0] = master;
  chain->turns[1] = slot;
}

static gpuChain_t chain_of(const ultraepPlan_t *plan, const int32_t *source, const int32_t *place,
                           const int32_t *next, int32_t instance) {
  const ultraepInstance_t *x = &plan->instances[instance];
  gpuChain_t chain = {.expert = x->expert,
                      .n = plan->replicaFirst[x->expert + 1] - plan->replicaFirst[x->expert],
                      .at = place[instance],
                      .slot = x->slot,
                      .turns = {1, 1}};
  int32_t back = instance, on = instance;
  for (int i = 0; i < 2; i++) {
    back = back < plan->nExperts ? -1 : source[back - plan->nExperts];
    on = on < 0 ? -1 : next[on];
    chain.before[i] = place_of(plan, back);
    chain.after[i] = place_of(plan, on);
  }
  if (chain.n == 1) turns_set(plan, &chain);
  return chain;
}

/* The rank's instance of an expert that has replicas, -1 if it has none. */
static int32_t instance_on(const ultraepPlan_t *plan, int32_t expert, int32_t rank) {
  int32_t first = plan->replicaFirst[expert], end = plan->replicaFirst[expert + 1];
  if (first < end && plan->instances[expert].rank == rank) return expert;
  for (int32_t i = first; i < end; i++)
    if (plan->instances[plan->replicaIndex[i]].rank == rank) return plan->replicaIndex[i];
  return -1;
}

/* ---- what the device finds ---- */

typedef struct {
  kernelPlanner_t planner;
  int32_t most, stride, nFound; /* chains of a rank; of the ranks, as in gpu_chains */
  int32_t *slotExpert, *nChains, *hostNumbers;
  gpuChain_t *chains, *hostChains;
} device_t;

static device_t device_make(const ultraepPlan_t *plan, int32_t mostRanks) {
  int32_t slots = plan->nRanks * plan->nSlots, perRank = plan->nExperts / plan->nRanks;
  int32_t stride = (plan->nRanks + mostRanks - 1) / mostRanks;
  device_t made = {.planner = {.nRanks = plan->nRanks,
                               .nExperts = plan->nExperts,
                               .nSlots = plan->nSlots,
                               .perRank = perRank},
                   .most = plan->nSlots + perRank,
                   .stride = stride,
                   .nFound = (plan->nRanks + stride - 1) / stride};
  size_t chains = (size_t)made.nFound * (size_t)made.most * sizeof(gpuChain_t);
  int32_t *slotExpert = malloc(((size_t)slots + 1) * sizeof(*slotExpert));
  made.hostNumbers = malloc((size_t)made.nFound * sizeof(int32_t));
  made.hostChains = malloc(chains);
  assert_true(slotExpert && made.hostNumbers && made.hostChains);
  for (int32_t i = 0; i < slots; i++) {
    int32_t instance = plan->slotInstance[i];
    slotExpert[i] = instance < 0 ? -1 : plan->instances[instance].expert;
  }
  GPU_OK(cudaMalloc((void **)&made.slotExpert, ((size_t)slots + 1) * sizeof(int32_t)));
  GPU_OK(cudaMalloc((void **)&made.nChains, (size_t)made.nFound * sizeof(int32_t)));
  GPU_OK(cudaMalloc((void **)&made.chains, chains));
  GPU_OK(
      cudaMemcpy(made.slotExpert, slotExpert, (size_t)slots * sizeof(*slotExpert), cudaMemcpyHostToDevice));
  free(slotExpert);
  return made;
}

static void device_find(device_t *device, bool isRelay) {
  size_t numbers = (size_t)device->nFound * sizeof(int32_t);
  size_t chains = (size_t)device->nFound * (size_t)device->most * sizeof(gpuChain_t);
  GPU_OK((cudaError_t)gpu_chains(&device->planner, device->slotExpert, device->stride, device->nFound,
                                 isRelay, device->most, device->chains, device->nChains));
  GPU_OK(cudaMemcpy(device->hostNumbers, device->nChains, numbers, cudaMemcpyDeviceToHost));
  GPU_OK(cudaMemcpy(device->hostChains, device->chains, chains, cudaMemcpyDeviceToHost));
}

static void device_free(device_t *device) {
  GPU_OK(cudaFree(device->slotExpert));
  GPU_OK(cudaFree(device->nChains));
  GPU_OK(cudaFree(device->chains));
  free(device->hostNumbers);
  free(device->hostChains);
}

/* ---- both ---- */

typedef struct {
  int32_t nChains, longest, nMoved; /* chains compared, and places that are not where ranks alone put them */
  int32_t nUneven;                  /* chains whose ranks share unevenly */
} tally_t;

static void check_rank(const ultraepPlan_t *plan, const device_t *device, const int32_t *source,
                       const int32_t *place, const int32_t *next, int32_t nth, tally_t *tally) {
  int32_t rank = nth * device->stride, n = 0;
  for (int32_t e = 0; e < plan->nExperts; e++) {
    int32_t instance = instance_on(plan, e, rank);
    if (instance < 0) continue;
    gpuChain_t want = chain_of(plan, source, place, next, instance);
    const gpuChain_t *found = &device->hostChains[(size_t)nth * (size_t)device->most + (size_t)n++];
    if (n > device->hostNumbers[nth] || memcmp(found, &want, sizeof(want)) != 0)
      fail_msg("R %d E %d S %d rank %d expert %d: of %d chains the %d. is of expert %d, place %d of %d after "
               "rank %d, turns %d to %d; host: place %d of %d after rank %d, turns %d to %d",
               plan->nRanks, plan->nExperts, plan->nSlots, rank, e, device->hostNumbers[nth], n,
               found->expert, found->at, found->n, found->before[0].rank, found->turns[0], found->turns[1],
               want.at, want.n, want.before[0].rank, want.turns[0], want.turns[1]);
    tally->nChains++;
    tally->nUneven += want.turns[0] != want.turns[1];
    if (want.n > tally->longest) tally->longest = want.n;
  }
  assert_int_equal(n, device->hostNumbers[nth]);
}

static void check_plan(const ultraepPlan_t *plan, int32_t mostRanks, tally_t *tally) {
  enum { MOST_REPLICAS = ULTRAEP_MAX_RANKS * ULTRAEP_MAX_SLOTS };
  static int32_t sources[2][MOST_REPLICAS]; /* by rank; of the relay */
  static int32_t place[ULTRAEP_MAX_EXPERTS + MOST_REPLICAS], next[ULTRAEP_MAX_EXPERTS + MOST_REPLICAS];
  device_t device = device_make(plan, mostRanks);
  sources_by_rank(plan, sources[0]);
  assert_int_equal(ultraepPlanRelay(plan, sources[1]), ultraepSuccess);
  for (int32_t i = 0; i < plan->nReplicas; i++) tally->nMoved += sources[0][i] != sources[1][i];
  for (int isRelay = 0; isRelay < 2; isRelay++) {
    places_find(plan, sources[isRelay], place, next);
    device_find(&device, isRelay);
    for (int32_t r = 0; r < device.nFound; r++)
      check_rank(plan, &device, sources[isRelay], place, next, r, tally);
  }
  device_free(&device);
}

enum { ENOUGH_CASES = 400 }; /* fewer may not show what they are for */
static int nCases = 2000;    /* small ones; a tenth as many placements */

/* Balanced as far as it goes, for many replicas. */
static tally_t check_cases(uint64_t seed, int32_t n, planner_case_limits_t limits) {
  planner_random_t random = {seed};
  tally_t tally = {0};
  for (int32_t i = 0; i < n; i++) {
    planner_case_t made;
    ultraepPlan_t plan;
    assert_true(planner_case_make(&made, &random, limits));
    made.config.copyPs = 0;
    made.config.tolerancePpm = 0;
    assert_int_equal(ultraepPlannerRun(&made.config, made.loads, made.workspace, made.workspaceBytes, &plan),
                     ultraepSuccess);
    check_plan(&plan, limits.maxRanks, &tally);
    planner_case_free(&made);
  }
  print_message("%d plans: %d chains of ranks, the longest %d replicas, %d places moved\n", n, tally.nChains,
                tally.longest, tally.nMoved);
  return tally;
}

static void test_small(void **state) {
  (void)state;
  tally_t tally = check_cases(51, nCases, (planner_case_limits_t){24, 6, 4});
  if (nCases >= ENOUGH_CASES)
    assert_true(tally.longest > 8 && tally.nMoved > nCases / 10 && tally.nUneven > nCases / 10);
}

/* Plans that no loads lead to: replicas anywhere, of some experts of every rank. */

enum { PLACED_RANKS = 8, PLACED_EXPERTS = ULTRAEP_MAX_EXPERTS, PLACED_SLOTS = 24 };

typedef struct {
  ultraepPlan_t plan;
  ultraepInstance_t instances[PLACED_EXPERTS + PLACED_RANKS * PLACED_SLOTS];
  int32_t replicaFirst[PLACED_EXPERTS + 1], replicaIndex[PLACED_RANKS * PLACED_SLOTS];
  int32_t slotInstance[PLACED_RANKS * PLACED_SLOTS];
} placed_t;

/* Fills a rank's slots, ascending by expert, each maybe with one of the `some` experts of its own stretch. */
static void placed_fill_rank(placed_t *placed, planner_random_t *random, int32_t rank, int32_t some) {
  ultraepPlan_t *plan = &placed->plan;
  int32_t n = 0;
  for (int32_t s = 0; s < plan->nSlots; s++) {
    int32_t first = s * plan->nExperts / plan->nSlots, end = (s + 1) * plan->nExperts / plan->nSlots;
    int32_t expert = first + planner_random_below(random, end - first < some ? end - first : some);
    if (planner_random_below(random, 3) == 0 || placed->instances[expert].rank == rank) continue;
    placed->slotInstance[rank * plan->nSlots + n] = plan->nInstances;
    placed->instances[plan->nInstances++] =
        (ultraepInstance_t){.expert = expert, .rank = rank, .slot = n++, .quota = 1};
    plan->nReplicas++;
  }
}

static void placed_make(placed_t *placed, planner_random_t *random) {
  int32_t nRanks = 2 + planner_random_below(random, PLACED_RANKS - 1), n = 0;
  int32_t perRank = 4 + planner_random_below(random, PLACED_EXPERTS / nRanks - 3);
  int32_t some = 1 + planner_random_below(random, 3);
  *placed = (placed_t){.plan = {.nRanks = nRanks,
                                .nExperts = nRanks * perRank,
                                .nSlots = 1 + planner_random_below(random, PLACED_SLOTS),
                                .nInstances = nRanks * perRank,
                                .instances = placed->instances,
                                .replicaFirst = placed->replicaFirst,
                                .replicaIndex = placed->replicaIndex,
                                .slotInstance = placed->slotInstance}};
  ultraepPlan_t *plan = &placed->plan;
  if (plan->nSlots > plan->nExperts) plan->nSlots = plan->nExperts;
  for (int32_t i = 0; i < nRanks * plan->nSlots; i++) placed->slotInstance[i] = -1;
  for (int32_t e = 0; e < plan->nExperts; e++)
    placed->instances[e] = (ultraepInstance_t){.expert = e, .rank = e / perRank, .slot = -1};
  for (int32_t r = 0; r < nRanks; r++) placed_fill_rank(placed, random, r, some);
  for (int32_t e = 0; e < plan->nExperts; e++) {
    placed->replicaFirst[e] = n;
    for (int32_t i = plan->nExperts; i < plan->nInstances; i++)
      if (placed->instances[i].expert == e) placed->replicaIndex[n++] = i;
  }
  placed->replicaFirst[plan->nExperts] = n;
}

static void test_placed(void **state) {
  (void)state;
  static placed_t placed;
  planner_random_t random = {52};
  tally_t tally = {0};
  int32_t n = (nCases + 9) / 10;
  for (int32_t i = 0; i < n; i++) {
    placed_make(&placed, &random);
    check_plan(&placed.plan, PLACED_RANKS, &tally);
  }
  print_message("%d placements: %d chains of ranks, the longest %d replicas, %d places moved\n", n,
                tally.nChains, tally.longest, tally.nMoved);
  if (nCases >= ENOUGH_CASES) assert_true(tally.longest > 3 && tally.nMoved > 10 * n);
}

/* The most ranks, experts and slots that there can be: a few ranks' chains. */
static void test_most(void **state) {
  (void)state;
  planner_case_t made = {
      .config = {.nRanks = ULTRAEP_MAX_RANKS, .nExperts = ULTRAEP_MAX_EXPERTS, .nSlots = ULTRAEP_MAX_SLOTS}};
  size_t n = (size_t)ULTRAEP_MAX_RANKS * ULTRAEP_MAX_EXPERTS;
  planner_random_t random = {53};
  ultraepPlan_t plan;
  tally_t tally = {0};
  assert_int_equal(ultraepPlannerWorkspaceSize(&made.config, &made.workspaceBytes), ultraepSuccess);
  made.loads = calloc(n, sizeof(*made.loads));
  made.workspace = malloc(made.workspaceBytes + 1);
  assert_true(made.loads && made.workspace);
  /* Every source has few experts, mostly hot ones of all ranks. */
  for (int32_t src = 0; src < ULTRAEP_MAX_RANKS; src++)
    for (int i = 0; i < 16; i++) {
      int32_t skew = 1 << planner_random_below(&random, 12);
      made.loads[(size_t)src * ULTRAEP_MAX_EXPERTS + (size_t)planner_random_below(&random, skew)] += 100;
    }
  assert_int_equal(ultraepPlannerRun(&made.config, made.loads, made.workspace, made.workspaceBytes, &plan),
                   ultraepSuccess);
  check_plan(&plan, 4, &tally);
  print_message("%d replicas, the longest chain that was looked at has %d, %d places moved\n", plan.nReplicas,
                tally.longest, tally.nMoved);
  assert_true(tally.nChains > 0 && tally.nMoved > 0);
  planner_case_free(&made);
}

/* Optional argument: small random plans (fewer under a checker). */
int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_small), cmocka_unit_test(test_placed),
                                     cmocka_unit_test(test_most)};
  GPU_REQUIRE();
  if (argc > 1) nCases = atoi(argv[1]);
  return cmocka_run_group_tests_name("gpu_chains", tests, NULL, NULL);
}
