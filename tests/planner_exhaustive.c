/* The planner against the optimum, found by trying every placement of replicas on small instances.
 *
 * For one placement the best maximum is known without search: a set W of ranks must hold all assignments of
 * the experts whose instances all lie in W, so no quotas go below ceil(that load / |W|), and the largest of
 * these over all W can be reached (max-flow min-cut; quotas are whole numbers). Where replicas count rows,
 * those of the ranks in W are added to the load that they must hold. */
#include "planner_common.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { MAX_R = 4, MAX_E = 16 };

typedef struct {
  int32_t nRanks, nExperts, nSlots;
  int64_t replicaRows, load[MAX_E];
  uint32_t hosts[MAX_E]; /* bit r: an instance on rank r */
  int32_t hosted[MAX_R]; /* replicas on a rank */
  int64_t best;
} exhaustive_t;

static int64_t placement_optimum(const exhaustive_t *x) {
  int64_t held[1 << MAX_R] = {0}, most = 0;
  for (int32_t e = 0; e < x->nExperts; e++) held[x->hosts[e]] += x->load[e];
  for (int32_t r = 0; r < x->nRanks; r++)
    for (uint32_t w = 0; w < 1u << x->nRanks; w++)
      if (w >> r & 1) held[w] += held[w & ~(1u << r)];
  for (uint32_t w = 1; w < 1u << x->nRanks; w++) {
    int64_t n = __builtin_popcount(w), worth = 0;
    for (int32_t r = 0; r < x->nRanks; r++)
      if (w >> r & 1) worth += x->hosted[r] * x->replicaRows;
    int64_t least = (held[w] + worth + n - 1) / n;
    if (least > most) most = least;
  }
  return most;
}

/* Gives rank `rank` its slots from expert `from` on, then the later ranks theirs. Full slots are never
 * worse, unless replicas count rows. */
static void place(exhaustive_t *x, int32_t rank, int32_t from, int32_t slots) {
  if (rank == x->nRanks) {
    int64_t optimum = placement_optimum(x);
    if (optimum < x->best) x->best = optimum;
    return;
  }
  bool any = false;
  for (int32_t e = from; e < x->nExperts && slots > 0; e++) {
    if (e / (x->nExperts / x->nRanks) == rank) continue;
    any = true;
    x->hosts[e] |= 1u << rank;
    x->hosted[rank]++;
    place(x, rank, e + 1, slots - 1);
    x->hosted[rank]--;
    x->hosts[e] &= ~(1u << rank);
  }
  if (!any || slots == 0 || x->replicaRows > 0) place(x, rank + 1, 0, x->nSlots);
}

/* Five families of loads: even, uniform, powers of two, harmonic, and one rank with most of the load, where
 * slots bind. */
static void fill_loads(planner_random_t *random, int32_t family, int32_t *loads, int32_t n, int32_t perRank) {
  for (int32_t i = 0; i < n; i++) {
    int32_t u = planner_random_below(random, 1000);
    switch (family) {
    case 0:
      loads[i] = 500 + u;
      break;
    case 1:
      loads[i] = u;
      break;
    case 2:
      loads[i] = (1 << planner_random_below(random, 12)) + u % 8;
      break;
    case 3:
      loads[i] = 10000 / (1 + planner_random_below(random, 12));
      break;
    default:
      loads[i] = i < perRank ? 1000 + u : u / 4;
    }
  }
}

/* Compares n random instances; returns the mean gap of the maximum over the optimum. */
static double compare(uint64_t seed, int32_t n, int32_t maxPerRank, int32_t maxExperts, int32_t maxSlots,
                      int32_t maxReplicaRows) {
  planner_random_t random = {seed};
  double gaps = 0, worst = 0;
  int32_t binding = 0;
  for (int32_t i = 0; i < n; i++) {
    ultraepPlannerConfig_t config = {.nRanks = 2 + planner_random_below(&random, MAX_R - 1),
                                     .nSlots = 1 + planner_random_below(&random, maxSlots)};
    do config.nExperts = config.nRanks * (1 + planner_random_below(&random, maxPerRank));
    while (config.nExperts > maxExperts);
    if (maxReplicaRows > 0) config.replicaRows = 1 + planner_random_below(&random, maxReplicaRows);
    int32_t loads[MAX_R * MAX_E] = {0}; /* all from source 0 */
    fill_loads(&random, i % 5, loads, config.nExperts, config.nExperts / config.nRanks);
    exhaustive_t x = {.nRanks = config.nRanks,
                      .nExperts = config.nExperts,
                      .nSlots = config.nSlots,
                      .replicaRows = config.replicaRows,
                      .best = INT64_MAX};
    for (int32_t e = 0; e < config.nExperts; e++) {
      x.load[e] = loads[e];
      x.hosts[e] = 1u << (e / (config.nExperts / config.nRanks));
    }
    place(&x, 0, 0, config.nSlots);

    size_t bytes;
    ultraepPlan_t plan;
    assert_int_equal(ultraepPlannerWorkspaceSize(&config, &bytes), ultraepSuccess);
    void *workspace = malloc(bytes);
    assert_non_null(workspace);
    assert_int_equal(ultraepPlannerRun(&config, loads, workspace, bytes, &plan), ultraepSuccess);
    const char *flaw = planner_plan_flaw(&config, loads, &plan);
    if (flaw) fail_msg("instance %d: %s", i, flaw);
    int64_t most = planner_largest_load(&plan, config.replicaRows);
    assert_true(most >= x.best); /* else one of the two is wrong */
    assert_true(plan.bound <= x.best && plan.target <= x.best);
    double gap = (double)most / (double)x.best - 1;
    gaps += gap;
    if (gap > worst) worst = gap;
    binding += x.best > (plan.total + config.nRanks - 1) / config.nRanks;
    free(workspace);
  }
  print_message("%d instances, E <= %d, S <= %d: mean gap %.4f %%, worst %.2f %%; slots bind in %d\n", n,
                maxExperts, maxSlots, 100 * gaps / n, 100 * worst, binding);
  return gaps / n;
}

static void test_issue_sizes(void **state) {
  (void)state;
  assert_true(compare(21, 400, 4, 8, 2, 0) <= 0.01);
}

/* More experts than slots on every rank: the hard case. */
static void test_binding_slots(void **state) {
  (void)state;
  assert_true(compare(22, 400, 8, 16, 1, 0) <= 0.02);
}

/* Loads are hundreds to thousands. */
static void test_replica_rows(void **state) {
  (void)state;
  assert_true(compare(23, 100, 4, 8, 2, 400) <= 0.002);
  assert_true(compare(24, 200, 8, 16, 1, 400) <= 0.002);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_issue_sizes), cmocka_unit_test(test_binding_slots),
                                     cmocka_unit_test(test_replica_rows)};
  return cmocka_run_group_tests_name("planner_exhaustive", tests, NULL, NULL);
}
