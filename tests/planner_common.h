/* Shared by the planner's tests: random load matrices and the checks every plan must pass. */
#ifndef ULTRAEP_TESTS_PLANNER_COMMON_H_
#define ULTRAEP_TESTS_PLANNER_COMMON_H_

#include "ultraep_balancer.h"

#include <stdbool.h>

typedef struct {
  uint64_t state; /* splitmix64 */
} planner_random_t;

uint64_t planner_random_next(planner_random_t *random);
/* 0..n-1 */
int32_t planner_random_below(planner_random_t *random, int32_t n);

/* One random problem: sizes, options and loads. */
typedef struct {
  ultraepPlannerConfig_t config;
  int32_t *loads; /* [R][E] */
  void *workspace;
  size_t workspaceBytes;
} planner_case_t;

/* Limits for planner_case_make. */
typedef struct {
  int32_t maxRanks, maxExpertsPerRank, maxSlots;
} planner_case_limits_t;

/* Makes a case from a mixture of families: uniform, skewed, one hot expert, few tokens, empty sources, huge
 * loads. */
bool planner_case_make(planner_case_t *made, planner_random_t *random, planner_case_limits_t limits);
void planner_case_free(planner_case_t *made);

/* The largest of the ranks' loads with replicaRows for every replica. */
int64_t planner_largest_load(const ultraepPlan_t *plan, int32_t replicaRows);

/* Null if the plan keeps every promise of ultraep_balancer.h for these loads, else what it breaks. */
const char *planner_plan_flaw(const ultraepPlannerConfig_t *config, const int32_t *loads,
                              const ultraepPlan_t *plan);

#endif
