/* The device planner gives the host planner's plans, bit for bit. */
#include "kernels.h"
#include "planner_common.h"

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
                           .copyPs = config->copyPs};
}

/* Plans on the device and compares with the host's plan. */
static void check_equal(const planner_case_t *made, const ultraepPlan_t *plan, int32_t number) {
  size_t nRanks = (size_t)plan->nRanks, nExperts = (size_t)plan->nExperts,
         slots = nRanks * (size_t)plan->nSlots;
  int32_t *loads = NULL, *slotExpert = malloc(slots * sizeof(int32_t) + 1);
  int64_t *slotQuota = malloc(slots * sizeof(int64_t) + 1), *masterQuota = malloc(nExperts * sizeof(int64_t));
  int64_t summary[KERNEL_SUMMARY_WORDS];
  kernelPlan_t device = {0};
  kernelPlanner_t planner = device_planner(&made->config);
  GPU_OK(cudaMalloc((void **)&loads, nRanks * nExperts * sizeof(int32_t)));
  GPU_OK(cudaMalloc((void **)&device.slotExpert, slots * sizeof(int32_t) + 16));
  GPU_OK(cudaMalloc((void **)&device.slotQuota, slots * sizeof(int64_t) + 16));
  GPU_OK(cudaMalloc((void **)&device.masterQuota, nExperts * sizeof(int64_t)));
  GPU_OK(cudaMalloc((void **)&device.summary, sizeof(summary)));
  GPU_OK(cudaMemcpy(loads, made->loads, nRanks * nExperts * sizeof(int32_t), cudaMemcpyHostToDevice));
  GPU_OK((cudaError_t)kernelPlanLaunch(&planner, loads, device, NULL));
  GPU_OK(cudaMemcpy(slotExpert, device.slotExpert, slots * sizeof(int32_t), cudaMemcpyDeviceToHost));
  GPU_OK(cudaMemcpy(slotQuota, device.slotQuota, slots * sizeof(int64_t), cudaMemcpyDeviceToHost));
  GPU_OK(cudaMemcpy(masterQuota, device.masterQuota, nExperts * sizeof(int64_t), cudaMemcpyDeviceToHost));
  GPU_OK(cudaMemcpy(summary, device.summary, sizeof(summary), cudaMemcpyDeviceToHost));
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
    fail_msg("case %d (R %d E %d S %d D %d): device plan differs: max %lld, host %lld", number, plan->nRanks,
             plan->nExperts, plan->nSlots, made->config.nDomainRanks,
             (long long)summary[KERNEL_SUMMARY_MAX_PLANNED], (long long)plan->maxPlanned);
  GPU_OK(cudaFree(loads));
  GPU_OK(cudaFree(device.slotExpert));
  GPU_OK(cudaFree(device.slotQuota));
  GPU_OK(cudaFree(device.masterQuota));
  GPU_OK(cudaFree(device.summary));
  free(slotExpert);
  free(slotQuota);
  free(masterQuota);
}

static void check_cases(uint64_t seed, int32_t n, planner_case_limits_t limits) {
  planner_random_t random = {seed};
  for (int32_t i = 0; i < n; i++) {
    planner_case_t made;
    ultraepPlan_t plan;
    assert_true(planner_case_make(&made, &random, limits));
    assert_int_equal(ultraepPlannerRun(&made.config, made.loads, made.workspace, made.workspaceBytes, &plan),
                     ultraepSuccess);
    check_equal(&made, &plan, i);
    planner_case_free(&made);
  }
}

static void test_small(void **state) {
  (void)state;
  check_cases(31, 1500, (planner_case_limits_t){12, 6, 4});
}

static void test_large(void **state) {
  (void)state;
  check_cases(32, 100, (planner_case_limits_t){128, 32, 8});
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_small), cmocka_unit_test(test_large)};
  GPU_REQUIRE();
  return cmocka_run_group_tests_name("gpu_planner", tests, NULL, NULL);
}
