/* Property tests of the planner: 100,000 random problems, then larger ones, limits, errors and invariances.
 */
#include "planner_common.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void check_cases(uint64_t seed, int32_t n, planner_case_limits_t limits) {
  planner_random_t random = {seed};
  int32_t replicated = 0, atBound = 0;
  for (int32_t i = 0; i < n; i++) {
    planner_case_t made;
    ultraepPlan_t plan;
    assert_true(planner_case_make(&made, &random, limits));
    memset(made.workspace, 0xa5, made.workspaceBytes);
    assert_int_equal(ultraepPlannerRun(&made.config, made.loads, made.workspace, made.workspaceBytes, &plan),
                     ultraepSuccess);
    const char *flaw = planner_plan_flaw(&made.config, made.loads, &plan);
    if (flaw)
      fail_msg("seed %llu case %d (R %d E %d S %d D %d): %s", (unsigned long long)seed, i, made.config.nRanks,
               made.config.nExperts, made.config.nSlots, made.config.nDomainRanks, flaw);
    replicated += plan.nReplicas > 0;
    atBound += plan.maxPlanned == plan.bound;
    planner_case_free(&made);
  }
  print_message("%d problems, %d with replicas, %d at their bound\n", n, replicated, atBound);
  assert_true(replicated > n / 4);
}

static void test_small(void **state) {
  (void)state;
  check_cases(1, 100000, (planner_case_limits_t){12, 6, 4});
}

static void test_large(void **state) {
  (void)state;
  check_cases(2, 300, (planner_case_limits_t){128, 32, 8});
}

/* A case that needs no randomness in its options. */
static planner_case_t case_of(ultraepPlannerConfig_t config) {
  planner_case_t made = {.config = config};
  assert_int_equal(ultraepPlannerWorkspaceSize(&config, &made.workspaceBytes), ultraepSuccess);
  made.loads = calloc((size_t)config.nRanks * (size_t)config.nExperts, sizeof(*made.loads));
  made.workspace = malloc(made.workspaceBytes);
  assert_non_null(made.loads);
  assert_non_null(made.workspace);
  return made;
}

static ultraepPlan_t plan_of(planner_case_t *made) {
  ultraepPlan_t plan;
  assert_int_equal(
      ultraepPlannerRun(&made->config, made->loads, made->workspace, made->workspaceBytes, &plan),
      ultraepSuccess);
  const char *flaw = planner_plan_flaw(&made->config, made->loads, &plan);
  if (flaw) fail_msg("%s", flaw);
  return plan;
}

static void test_corners(void **state) {
  (void)state;
  planner_case_t made = case_of((ultraepPlannerConfig_t){.nRanks = 8, .nExperts = 8, .nSlots = 1});
  ultraepPlan_t plan = plan_of(&made); /* no load at all */
  assert_int_equal(plan.maxPlanned, 0);
  assert_int_equal(plan.nReplicas, 0);
  made.loads[3] = 8000; /* all load on one expert, from one source */
  plan = plan_of(&made);
  assert_int_equal(plan.maxBefore, 8000);
  assert_int_equal(plan.maxPlanned, 1000);
  assert_int_equal(plan.maxFanout, 7);
  assert_int_equal(plan.maxRankIn, 1);
  made.config.nSlots = 0;
  plan = plan_of(&made);
  assert_int_equal(plan.maxPlanned, 8000);
  assert_int_equal(plan.bound, 8000);
  made.config.nSlots = 1;
  made.config.nDomainRanks = 2; /* only the neighbour can help */
  plan = plan_of(&made);
  assert_int_equal(plan.maxPlanned, 4000);
  assert_int_equal(plan.bound, 4000);
  planner_case_free(&made);

  made = case_of((ultraepPlannerConfig_t){.nRanks = 1, .nExperts = 5, .nSlots = 3});
  made.loads[4] = INT32_MAX;
  plan = plan_of(&made);
  assert_int_equal(plan.maxPlanned, INT32_MAX);
  assert_int_equal(plan.nReplicas, 0);
  planner_case_free(&made);
}

static void test_limits(void **state) {
  (void)state;
  planner_case_t made = case_of((ultraepPlannerConfig_t){
      .nRanks = ULTRAEP_MAX_RANKS, .nExperts = ULTRAEP_MAX_EXPERTS, .nSlots = ULTRAEP_MAX_SLOTS});
  for (int32_t r = 0; r < ULTRAEP_MAX_RANKS; r++)
    made.loads[(int64_t)r * ULTRAEP_MAX_EXPERTS + 17] = INT32_MAX;
  ultraepPlan_t plan = plan_of(&made);
  assert_true(plan.total == (int64_t)ULTRAEP_MAX_RANKS * INT32_MAX);
  assert_true(plan.maxPlanned == INT32_MAX);
  planner_case_free(&made);
}

static void test_permutations(void **state) {
  (void)state;
  enum { R = 16, E = 64 };
  planner_random_t random = {7};
  planner_case_t a = case_of((ultraepPlannerConfig_t){.nRanks = R, .nExperts = E, .nSlots = 2}),
                 b = case_of(a.config);
  for (int32_t round = 0; round < 200; round++) {
    for (int32_t i = 0; i < R * E; i++)
      a.loads[i] = planner_random_below(&random, 1 << planner_random_below(&random, 16));
    for (int32_t src = 0; src < R; src++) /* sources in another order: the same instances and quotas */
      memcpy(b.loads + (int64_t)((src + round) % R) * E, a.loads + (int64_t)src * E, sizeof(int32_t) * E);
    ultraepPlan_t planA = plan_of(&a), planB = plan_of(&b);
    assert_int_equal(planA.nInstances, planB.nInstances);
    assert_memory_equal(planA.instances, planB.instances,
                        sizeof(ultraepInstance_t) * (size_t)planA.nInstances);
    for (int32_t src = 0; src < R;
         src++) /* ranks' experts in another order: the same maximum (loads are distinct) */
      for (int32_t e = 0; e < E; e++) b.loads[src * E + (e + 4 * round) % E] = a.loads[src * E + e];
    planB = plan_of(&b);
    assert_int_equal(planA.maxPlanned, planB.maxPlanned);
    assert_int_equal(planA.bound, planB.bound);
    assert_int_equal(planA.nReplicas, planB.nReplicas);
  }
  planner_case_free(&a);
  planner_case_free(&b);
}

/* The same problem plans to the same bytes in a used workspace as in a fresh one. */
static void test_deterministic(void **state) {
  (void)state;
  planner_random_t random = {11};
  for (int32_t i = 0; i < 500; i++) {
    planner_case_t made;
    assert_true(planner_case_make(&made, &random, (planner_case_limits_t){16, 8, 4}));
    ultraepPlan_t plan = plan_of(&made);
    size_t instances = sizeof(ultraepInstance_t) * (size_t)plan.nInstances;
    size_t pieces = sizeof(ultraepPiece_t) * (size_t)plan.pieceFirst[plan.nExperts];
    char *copy = malloc(instances + pieces + 1);
    assert_non_null(copy);
    memcpy(copy, plan.instances, instances);
    memcpy(copy + instances, plan.pieces, pieces);
    memset(made.workspace, i, made.workspaceBytes);
    plan = plan_of(&made);
    assert_memory_equal(copy, plan.instances, instances);
    if (pieces) assert_memory_equal(copy + instances, plan.pieces, pieces);
    free(copy);
    planner_case_free(&made);
  }
}

static void test_tolerance(void **state) {
  (void)state;
  planner_random_t random = {13};
  planner_case_t made = case_of((ultraepPlannerConfig_t){.nRanks = 32, .nExperts = 64, .nSlots = 2});
  int32_t fewer = 0;
  for (int32_t i = 0; i < 200; i++) {
    for (int32_t j = 0; j < 32 * 64; j++)
      made.loads[j] = planner_random_below(&random, 1 + (j % 64) * (j % 64));
    made.config.tolerancePpm = 0;
    ultraepPlan_t exact = plan_of(&made);
    int32_t replicas = exact.nReplicas;
    assert_true(exact.maxPlanned == (exact.total + 31) / 32);
    made.config.tolerancePpm = 20000;
    ultraepPlan_t loose = plan_of(&made);
    assert_true((double)loose.maxPlanned <= (double)loose.total / 32 * 1.02);
    assert_true(loose.nReplicas <= replicas);
    fewer += loose.nReplicas < replicas;
  }
  assert_true(fewer > 150);
  planner_case_free(&made);
}

static void test_cost_gate(void **state) {
  (void)state;
  planner_case_t made =
      case_of((ultraepPlannerConfig_t){.nRanks = 8, .nExperts = 8, .nSlots = 1, .rowPs = 1000});
  made.loads[0] = 8000;
  made.config.copyPs = 1000 * 7001; /* even one copy costs more than all that it could save */
  ultraepPlan_t plan = plan_of(&made);
  assert_int_equal(plan.nReplicas, 0);
  assert_int_equal(plan.maxPlanned, 8000);
  made.config.copyPs = 1; /* copies for nothing: balance fully */
  plan = plan_of(&made);
  assert_int_equal(plan.maxPlanned, 1000);
  assert_int_equal(plan.nReplicas, 7);
  /* k copies leave 8000/(k+1): with a copy at 1500 rows, 1 copy costs 5500, 2 cost 5667, 7 cost 11500 */
  made.config.copyPs = 1000 * 1500;
  plan = plan_of(&made);
  assert_true(plan.nReplicas >= 1 && plan.nReplicas <= 2);
  assert_true(plan.maxPlanned + 1500 * plan.maxFanout <= 6000);
  made.config.relayCopies = 1; /* replicas relay: seven copies cost as much as one */
  plan = plan_of(&made);
  assert_int_equal(plan.nReplicas, 7);
  planner_case_free(&made);
}

static void test_replica_rows(void **state) {
  (void)state;
  planner_case_t made =
      case_of((ultraepPlannerConfig_t){.nRanks = 2, .nExperts = 2, .nSlots = 1, .replicaRows = 1000});
  made.loads[0] = 8000;
  ultraepPlan_t plan = plan_of(&made); /* 4500 beside 3500 and a replica */
  assert_int_equal(plan.nReplicas, 1);
  assert_int_equal(plan.target, 4500);
  assert_int_equal(plan.maxPlanned, 4500);
  assert_int_equal(plan.rankLoad[1], 3500);
  assert_int_equal(plan.bound, 4000);
  made.config.replicaRows = 7998; /* it takes one row, and that pays */
  plan = plan_of(&made);
  assert_int_equal(plan.maxPlanned, 7999);
  assert_int_equal(plan.nReplicas, 1);
  made.config.replicaRows = 7999; /* one row less, and one row more */
  plan = plan_of(&made);
  assert_int_equal(plan.maxPlanned, 8000);
  assert_int_equal(plan.nReplicas, 0);
  made.config.replicaRows = ULTRAEP_MAX_REPLICA_ROWS;
  assert_int_equal(plan_of(&made).nReplicas, 0);
  planner_case_free(&made);

  made = case_of((ultraepPlannerConfig_t){.nRanks = 8, .nExperts = 8, .nSlots = 1, .replicaRows = 100});
  made.loads[3] = 8000;
  plan = plan_of(&made); /* 7 * 988 go, 100 less than the target */
  assert_int_equal(plan.nReplicas, 7);
  assert_int_equal(plan.target, 1088);
  assert_int_equal(plan.maxPlanned, 8000 - 7 * 988);
  made.config.copyPs = made.config.rowPs = 1000; /* with the gate: 1100 rows, and 7 copies' */
  plan = plan_of(&made);
  ultraepPlanCost_t cost;
  assert_int_equal(ultraepPlanCost(&made.config, &plan, &cost), ultraepSuccess);
  assert_true(plan.nReplicas == 7 && cost.rowsPs == 1088 * 1000);
  planner_case_free(&made);
}

/* Replicas that cost something: if the busiest rank is busier at all than by the plan that does not know it,
 * then by less than a step of the search, 250 millionths. */
static void test_replica_rows_pay(void **state) {
  (void)state;
  planner_random_t random = {17};
  int32_t better = 0, worse = 0, fewer = 0, more = 0, n = 3000;
  for (int32_t i = 0; i < n; i++) {
    planner_case_t made;
    assert_true(planner_case_make(&made, &random, (planner_case_limits_t){24, 8, 4}));
    made.config.tolerancePpm = 0;
    made.config.copyPs = 0;
    made.config.replicaRows = 0;
    ultraepPlan_t plan = plan_of(&made);
    int64_t mean = plan.total / plan.nRanks;
    int32_t replicas = plan.nReplicas, most = mean / 10 > 100000 ? 100000 : (int32_t)(mean / 10);
    int32_t replicaRows = 1 + planner_random_below(&random, most + 1);
    int64_t unaware = planner_largest_load(&plan, replicaRows);
    made.config.replicaRows = replicaRows;
    plan = plan_of(&made);
    int64_t aware = planner_largest_load(&plan, replicaRows);
    better += aware < unaware;
    worse += aware > unaware + unaware / 4000;
    fewer += plan.nReplicas < replicas;
    more += plan.nReplicas > replicas;
    planner_case_free(&made);
  }
  print_message(
      "%d problems: the busiest rank less busy in %d, busier in %d; fewer replicas in %d, more in %d\n", n,
      better, worse, fewer, more);
  assert_true(better > n / 4 && worse == 0);
}

/* Without replicas' worth plans are what they were before there was any: a checksum of what that planner
 * made. */
static void test_plans_unchanged(void **state) {
  (void)state;
  planner_random_t random = {19};
  uint64_t sum = UINT64_C(14695981039346656037); /* FNV-1a, by words */
  for (int32_t i = 0; i < 3000; i++) {
    planner_case_t made;
    assert_true(planner_case_make(&made, &random, (planner_case_limits_t){20, 8, 4}));
    made.config.replicaRows = 0;
    ultraepPlan_t plan = plan_of(&made);
    int64_t words[] = {plan.nReplicas, plan.maxPlanned, plan.target, plan.bound, plan.localAssignments};
    for (size_t w = 0; w < sizeof(words) / sizeof(words[0]); w++)
      sum = (sum ^ (uint64_t)words[w]) * UINT64_C(1099511628211);
    for (int32_t j = plan.nExperts; j < plan.nInstances; j++) {
      const ultraepInstance_t *x = &plan.instances[j];
      sum = (sum ^ (uint64_t)((int64_t)x->expert << 16 | x->rank)) * UINT64_C(1099511628211);
      sum = (sum ^ (uint64_t)x->quota) * UINT64_C(1099511628211);
    }
    planner_case_free(&made);
  }
  assert_true(sum == UINT64_C(0x5cba4463e75d5cc9));
}

static void test_errors(void **state) {
  (void)state;
  const ultraepPlannerConfig_t good = {.nRanks = 4, .nExperts = 8, .nSlots = 2};
  const ultraepPlannerConfig_t bad[] = {
      {.nRanks = 0, .nExperts = 8},
      {.nRanks = ULTRAEP_MAX_RANKS + 1, .nExperts = ULTRAEP_MAX_RANKS + 1},
      {.nRanks = 4, .nExperts = 3},
      {.nRanks = 4, .nExperts = 10},
      {.nRanks = 4, .nExperts = 4 * ULTRAEP_MAX_EXPERTS},
      {.nRanks = 4, .nExperts = 8, .nSlots = -1},
      {.nRanks = 4, .nExperts = 8, .nSlots = ULTRAEP_MAX_SLOTS + 1},
      {.nRanks = 4, .nExperts = 8, .nDomainRanks = 3},
      {.nRanks = 4, .nExperts = 8, .nDomainRanks = -1},
      {.nRanks = 4, .nExperts = 8, .tolerancePpm = ULTRAEP_MAX_TOLERANCE_PPM + 1},
      {.nRanks = 4, .nExperts = 8, .rowPs = ULTRAEP_MAX_ROW_PS + 1},
      {.nRanks = 4, .nExperts = 8, .copyPs = ULTRAEP_MAX_COPY_PS + 1},
      {.nRanks = 4, .nExperts = 8, .relayCopies = 2},
      {.nRanks = 4, .nExperts = 8, .replicaRows = -1},
      {.nRanks = 4, .nExperts = 8, .replicaRows = ULTRAEP_MAX_REPLICA_ROWS + 1},
  };
  size_t bytes = 12345;
  for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
    assert_int_equal(ultraepPlannerWorkspaceSize(&bad[i], &bytes), ultraepInvalidArgument);
    assert_true(strlen(ultraepPlannerConfigError(&bad[i])) > 0);
  }
  assert_int_equal(bytes, 12345);
  assert_int_equal(ultraepPlannerWorkspaceSize(NULL, &bytes), ultraepInvalidArgument);
  assert_int_equal(ultraepPlannerWorkspaceSize(&good, NULL), ultraepInvalidArgument);
  assert_string_equal(ultraepPlannerConfigError(&good), "");

  planner_case_t made = case_of(good);
  ultraepPlan_t plan, untouched;
  memset(&plan, 0x5a, sizeof(plan));
  memcpy(&untouched, &plan, sizeof(plan));
  int32_t *loads = made.loads;
  char *ws = made.workspace;
  size_t n = made.workspaceBytes;
  assert_int_equal(ultraepPlannerRun(NULL, loads, ws, n, &plan), ultraepInvalidArgument);
  assert_int_equal(ultraepPlannerRun(&good, NULL, ws, n, &plan), ultraepInvalidArgument);
  assert_int_equal(ultraepPlannerRun(&good, loads, NULL, n, &plan), ultraepInvalidArgument);
  assert_int_equal(ultraepPlannerRun(&good, loads, ws, n, NULL), ultraepInvalidArgument);
  assert_int_equal(ultraepPlannerRun(&good, loads, ws, n - 1, &plan), ultraepInvalidArgument);
  assert_int_equal(ultraepPlannerRun(&good, loads, ws + 1, n, &plan), ultraepInvalidArgument);
  loads[9] = -1;
  assert_int_equal(ultraepPlannerRun(&good, loads, ws, n, &plan), ultraepInvalidArgument);
  loads[9] = INT32_MAX;
  loads[10] = 1; /* this row's sum is 2^31 */
  assert_int_equal(ultraepPlannerRun(&good, loads, ws, n, &plan), ultraepInvalidArgument);
  assert_memory_equal(&plan, &untouched, sizeof(plan));
  int64_t realised[4];
  assert_int_equal(ultraepPlanRealised(NULL, loads, realised), ultraepInvalidArgument);
  planner_case_free(&made);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_small),           cmocka_unit_test(test_large),
      cmocka_unit_test(test_corners),         cmocka_unit_test(test_limits),
      cmocka_unit_test(test_permutations),    cmocka_unit_test(test_deterministic),
      cmocka_unit_test(test_tolerance),       cmocka_unit_test(test_cost_gate),
      cmocka_unit_test(test_replica_rows),    cmocka_unit_test(test_replica_rows_pay),
      cmocka_unit_test(test_plans_unchanged), cmocka_unit_test(test_errors),
  };
  return cmocka_run_group_tests_name("planner_properties", tests, NULL, NULL);
}
