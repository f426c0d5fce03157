/* The device planner gives the host planner's plans, bit for bit. */
#include "kernels.h"
#include "planner_common.h"
#include "zipf.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "gpu_common.h"

static kernelPlanner_t device_planner(const ultraepPlannerConfig_t *config) {
  return (kernelPlanner_t){.nRanks = config->nRanks,
                           .nExperts = config->nExperts,
                           .nSlots = config->nSlots,
                           .nDomainRanks = config->nDomainRanks ? config->nDomainRanks : config->nRanks,
                           .relayCopies = config->relayCopies,
                           .perRank = config->nExperts / config->nRanks,
                           .tolerancePpm = config->tolerancePpm,
                           .rowPs = config->rowPs,
                           .copyPs = config->copyPs,
                           .replicaRows = config->replicaRows};
}

/* A problem and its plan in device memory. */
typedef struct {
  kernelPlanner_t planner;
  int32_t *loads;
  kernelPlan_t plan;
} device_t;

static device_t device_make(const ultraepPlannerConfig_t *config, const int32_t *loads) {
  size_t matrix = (size_t)config->nRanks * (size_t)config->nExperts * sizeof(int32_t);
  size_t slots = (size_t)config->nRanks * (size_t)config->nSlots;
  device_t made = {.planner = device_planner(config)};
  GPU_OK(cudaMalloc((void **)&made.loads, matrix));
  GPU_OK(cudaMalloc((void **)&made.plan.slotExpert, slots * sizeof(int32_t) + 16));
  GPU_OK(cudaMalloc((void **)&made.plan.slotQuota, slots * sizeof(int64_t) + 16));
  GPU_OK(cudaMalloc((void **)&made.plan.masterQuota, (size_t)config->nExperts * sizeof(int64_t)));
  GPU_OK(cudaMalloc((void **)&made.plan.summary, KERNEL_SUMMARY_WORDS * sizeof(int64_t)));
  GPU_OK(cudaMemcpy(made.loads, loads, matrix, cudaMemcpyHostToDevice));
  return made;
}

static void device_free(device_t *device) {
  GPU_OK(cudaFree(device->loads));
  GPU_OK(cudaFree(device->plan.slotExpert));
  GPU_OK(cudaFree(device->plan.slotQuota));
  GPU_OK(cudaFree(device->plan.masterQuota));
  GPU_OK(cudaFree(device->plan.summary));
}

/* Whether the device's plan is the host's. */
static void check_plan(const device_t *device, const ultraepPlan_t *plan, const char *what, int number) {
  size_t nExperts = (size_t)plan->nExperts, slots = (size_t)plan->nRanks * (size_t)plan->nSlots;
  int32_t *slotExpert = malloc(slots * sizeof(int32_t) + 1);
  int64_t *slotQuota = malloc(slots * sizeof(int64_t) + 1), *masterQuota = malloc(nExperts * sizeof(int64_t));
  int64_t summary[KERNEL_SUMMARY_WORDS];
  const enum cudaMemcpyKind kind = cudaMemcpyDeviceToHost;
  assert_true(slotExpert && slotQuota && masterQuota);
  GPU_OK(cudaMemcpy(slotExpert, device->plan.slotExpert, slots * sizeof(int32_t), kind));
  GPU_OK(cudaMemcpy(slotQuota, device->plan.slotQuota, slots * sizeof(int64_t), kind));
  GPU_OK(cudaMemcpy(masterQuota, device->plan.masterQuota, nExperts * sizeof(int64_t), kind));
  GPU_OK(cudaMemcpy(summary, device->plan.summary, sizeof(summary), kind));
  bool same = summary[KERNEL_SUMMARY_MAX_PLANNED] == plan->maxPlanned &&
              summary[KERNEL_SUMMARY_REPLICAS] == plan->nReplicas &&
              summary[KERNEL_SUMMARY_TARGET] == plan->target;
  for (size_t i = 0; i < slots; i++) {
    int32_t at = plan->slotInstance[i];
    same = same && slotExpert[i] == (at < 0 ? -1 : plan->instances[at].expert) &&
           slotQuota[i] == (at < 0 ? 0 : plan->instances[at].quota);
  }
  for (size_t e = 0; e < nExperts; e++) same = same && masterQuota[e] == plan->instances[e].quota;
  if (!same)
    fail_msg("%s %d (R %d E %d S %d D %d): device plan differs: max %lld, host %lld", what, number,
             plan->nRanks, plan->nExperts, plan->nSlots, device->planner.nDomainRanks,
             (long long)summary[KERNEL_SUMMARY_MAX_PLANNED], (long long)plan->maxPlanned);
  free(slotExpert);
  free(slotQuota);
  free(masterQuota);
}

static void check_equal(const planner_case_t *made, const ultraepPlan_t *plan, int32_t number) {
  device_t device = device_make(&made->config, made->loads);
  GPU_OK((cudaError_t)kernelPlanLaunch(&device.planner, device.loads, device.plan, NULL));
  check_plan(&device, plan, "case", number);
  device_free(&device);
}

static void check_cases(uint64_t seed, int32_t n, planner_case_limits_t limits) {
  planner_random_t random = {seed};
  for (int32_t i = 0; i < n; i++) {
    planner_case_t made;
    ultraepPlan_t plan;
    assert_true(planner_case_make(&made, &random, limits));
    for (int32_t round = 0; round < 2; round++) {
      assert_int_equal(
          ultraepPlannerRun(&made.config, made.loads, made.workspace, made.workspaceBytes, &plan),
          ultraepSuccess);
      check_equal(&made, &plan, i);
      /* Once more where replicas cost something, but mostly not too much. */
      int64_t most = plan.total / plan.nRanks / 4;
      if (most > ULTRAEP_MAX_REPLICA_ROWS - 1) most = ULTRAEP_MAX_REPLICA_ROWS - 1;
      made.config.replicaRows = 1 + planner_random_below(&random, (int32_t)most + 1);
    }
    planner_case_free(&made);
  }
}

static int nCases = 1500; /* small ones; a fifteenth as many large ones */

static void test_small(void **state) {
  (void)state;
  check_cases(31, nCases, (planner_case_limits_t){12, 6, 4});
}

static void test_large(void **state) {
  (void)state;
  check_cases(32, (nCases + 14) / 15, (planner_case_limits_t){128, 32, 8});
}

/* ---- made-up loads of 64 ranks, and how long the planner takes for them (reported, not judged) ---- */

enum { PLANS = 20, ROUNDS = 21, WARM_ROUNDS = 200, ENOUGH_CASES = 1000 /* fewer: no time is taken */ };

static int compare_floats(const void *a, const void *b) {
  float x = *(const float *)a, y = *(const float *)b;
  return (x > y) - (x < y);
}

/* Microseconds of one plan: median over rounds of a graph of PLANS of them. */
static double time_plans(const device_t *device) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  cudaEvent_t begin, end;
  float ms[ROUNDS];
  GPU_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  GPU_OK(cudaEventCreate(&begin));
  GPU_OK(cudaEventCreate(&end));
  GPU_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < PLANS; i++)
    GPU_OK((cudaError_t)kernelPlanLaunch(&device->planner, device->loads, device->plan, stream));
  GPU_OK(cudaStreamEndCapture(stream, &graph));
  GPU_OK(cudaGraphInstantiate(&exec, graph, 0));
  for (int i = 0; i < WARM_ROUNDS; i++) GPU_OK(cudaGraphLaunch(exec, stream));
  for (int i = 0; i < ROUNDS; i++) {
    GPU_OK(cudaEventRecord(begin, stream));
    GPU_OK(cudaGraphLaunch(exec, stream));
    GPU_OK(cudaEventRecord(end, stream));
    GPU_OK(cudaEventSynchronize(end));
    GPU_OK(cudaEventElapsedTime(&ms[i], begin, end));
  }
  qsort(ms, ROUNDS, sizeof(ms[0]), compare_floats);
  GPU_OK(cudaGraphExecDestroy(exec));
  GPU_OK(cudaGraphDestroy(graph));
  GPU_OK(cudaEventDestroy(begin));
  GPU_OK(cudaEventDestroy(end));
  GPU_OK(cudaStreamDestroy(stream));
  return 1e3 * (double)ms[ROUNDS / 2] / PLANS;
}

/* Plans the loads, and says under what name. */
static void check_timed(const ultraepPlannerConfig_t *config, const int32_t *loads, const char *what) {
  size_t bytes = 0;
  ultraepPlan_t plan;
  assert_int_equal(ultraepPlannerWorkspaceSize(config, &bytes), ultraepSuccess);
  void *workspace = aligned_alloc(64, (bytes + 63) / 64 * 64);
  assert_non_null(workspace);
  assert_int_equal(ultraepPlannerRun(config, loads, workspace, bytes, &plan), ultraepSuccess);
  device_t device = device_make(config, loads);
  bool isTimed = nCases >= ENOUGH_CASES;
  double us = isTimed ? time_plans(&device) : 0;
  if (!isTimed) GPU_OK((cudaError_t)kernelPlanLaunch(&device.planner, device.loads, device.plan, NULL));
  check_plan(&device, &plan, what, 0);
  if (isTimed)
    print_message("%d ranks, %d experts, %d slots, %s, tolerance %g, replica rows %d%s: %.2f us a plan, %d "
                  "replicas, imbalance %.4f\n",
                  config->nRanks, config->nExperts, config->nSlots, what, config->tolerancePpm * 1e-6,
                  config->replicaRows, config->copyPs ? ", gate" : "", us, plan.nReplicas,
                  (double)plan.maxPlanned * plan.nRanks / (double)plan.total);
  device_free(&device);
  free(workspace);
}

static void check_zipf(double ratio, double tolerance, int32_t replicaRows) {
  enum { RANKS = 64, EXPERTS = 256, TOPK = 8, TOKENS = 8192 };
  const ultraepPlannerConfig_t config = {.nRanks = RANKS,
                                         .nExperts = EXPERTS,
                                         .nSlots = 2,
                                         .tolerancePpm = (uint32_t)(tolerance * 1e6 + 0.5),
                                         .replicaRows = replicaRows};
  static int32_t loads[RANKS * EXPERTS];
  zipf_t *zipf = NULL;
  perfError_t error;
  char what[32];
  assert_int_equal(zipfCreate(&zipf, RANKS, EXPERTS, TOPK, ratio, &error), 0);
  zipfLoads(zipf, 1, 0, TOKENS, loads);
  zipfDestroy(zipf);
  snprintf(what, sizeof(what), "zipf %.1f", ratio);
  check_timed(&config, loads, what);
}

/* Loads of trained models have many experts with somewhat more than their share and none with nearly all:
 * slots run out, and the target is searched for. */
static void check_uneven(int32_t nRanks, int32_t nSlots, int32_t replicaRows, bool gate) {
  enum { MOST_RANKS = 64, EXPERTS = 256 };
  const ultraepPlannerConfig_t config = {.nRanks = nRanks,
                                         .nExperts = EXPERTS,
                                         .nSlots = nSlots,
                                         .replicaRows = replicaRows,
                                         .rowPs = gate ? 30000 : 0,
                                         .copyPs = gate ? 10000000 : 0};
  static int32_t loads[MOST_RANKS * EXPERTS];
  planner_random_t random = {7};
  int weights[EXPERTS];
  for (int e = 0; e < EXPERTS; e++) {
    double u = planner_random_below(&random, 1000) / 1000.0;
    weights[e] = 8 + (int)(1000 * u * u * u * u);
  }
  /* As on ranks whose experts have come to like the same tokens. */
  for (int e = 0; e < EXPERTS / 8; e++) weights[e] *= 3;
  for (int i = 0; i < nRanks * EXPERTS; i++)
    loads[i] = planner_random_below(&random, weights[i % EXPERTS] * 8 / nRanks + 2);
  check_timed(&config, loads, "uneven");
}

static void test_zipf(void **state) {
  (void)state;
  static const double ratios[] = {1.5, 2, 4, 8}, tolerances[] = {0, 0.0005, 0.01};
  for (size_t t = 0; t < sizeof(tolerances) / sizeof(tolerances[0]); t++)
    for (size_t i = 0; i < sizeof(ratios) / sizeof(ratios[0]); i++) check_zipf(ratios[i], tolerances[t], 0);
  for (size_t i = 0; i < sizeof(ratios) / sizeof(ratios[0]); i++) check_zipf(ratios[i], 0, 600);
}

static void test_uneven(void **state) {
  (void)state;
  for (int nRanks = 8; nRanks <= 64; nRanks *= 8)
    for (int nSlots = 1; nSlots <= 4; nSlots *= 2) {
      check_uneven(nRanks, nSlots, 0, false);
      check_uneven(nRanks, nSlots, 20, false);
      check_uneven(nRanks, nSlots, 0, true);
    }
}

/* Optional argument: small random problems (fewer under a checker, and then nothing is timed). */
int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_small), cmocka_unit_test(test_large),
                                     cmocka_unit_test(test_zipf), cmocka_unit_test(test_uneven)};
  GPU_REQUIRE();
  if (argc > 1) nCases = atoi(argv[1]);
  return cmocka_run_group_tests_name("gpu_planner", tests, NULL, NULL);
}
