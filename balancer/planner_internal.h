/* Inside the balancer: the workspace as typed arrays, and the steps of a plan, one file each. */
#ifndef ULTRAEP_PLANNER_INTERNAL_H_
#define ULTRAEP_PLANNER_INTERNAL_H_

#include "ultraep_balancer.h"

#include <stdbool.h>

/* How a fill of one domain, or of all, came out. */
typedef struct {
  int64_t most;      /* maximum rank load, with replicaRows for every replica */
  int64_t target;    /* that the fill was asked for */
  int32_t nReplicas; /* slots used */
} planner_outcome_t;

/* The workspace of one ultraepPlannerRun. */
typedef struct {
  int64_t *expertLoad;          /* [E] */
  int64_t *rankLoadBefore;      /* [R] */
  int64_t *rankLoad;            /* [R] during a search with replicaRows for every replica */
  int64_t *scratch;             /* [E] bound: sorted loads; cost: which experts have replicas */
  int64_t *rem;                 /* [E] what a master still keeps, during a fill */
  int64_t *quotaLeft;           /* [R] of one expert's instances, during the decomposition */
  int64_t *largest;             /* [R] largest rem of a rank's experts, during a fill */
  int32_t *heavy;               /* [R] ranks above the target, during a fill */
  int32_t *light;               /* [R] ranks below the target not yet filled, during a fill */
  int32_t *slotCount;           /* [R] slots in use */
  int32_t *slotExpert;          /* [R*S] */
  int64_t *slotQuota;           /* [R*S] */
  ultraepInstance_t *instances; /* [E + R*S] */
  int32_t *replicaFirst;        /* [E+1] */
  int32_t *replicaIndex;        /* [R*S] */
  int32_t *slotInstance;        /* [R*S] */
  int32_t *pieceFirst;          /* [E+1] */
  ultraepPiece_t *pieces;       /* [planner_pieces_max] */
} planner_workspace_t;

/* One problem: the config with its defaults resolved, and the sums of the load matrix. */
typedef struct {
  ultraepPlannerConfig_t config;
  int32_t perRank; /* E / R */
  int64_t total;
  planner_workspace_t *ws;
} planner_problem_t;

/* Fills the light ranks of one domain from its heavy ranks until no rank is above target, or slots run out.
 * Sets slotCount, slotExpert, slotQuota and rankLoad of the domain's ranks; what an earlier fill left there
 * is forgotten. */
planner_outcome_t planner_fill_domain(const planner_problem_t *problem, int32_t firstRank, int64_t target);

/* Chooses and leaves in the workspace the fill of all domains: the lowest target that can be reached, or with
 * the cost gate the one that costs least. */
planner_outcome_t planner_search(const planner_problem_t *problem);

/* A maximum rank load that no plan can go below. */
int64_t planner_bound(const planner_problem_t *problem);

/* The smallest whole load that a maximum can have by the mean alone: over domains, ceil(domain's total / D).
 */
int64_t planner_mean_bound(const planner_problem_t *problem);

/* A load that no plan's maximum goes below where replicas count replicaRows: what a search begins with. The
 * mean bound if they count nothing. */
int64_t planner_least_target(const planner_problem_t *problem);

/* Builds the pieces of every replicated expert; returns the assignments that stay on their source's rank. */
int64_t planner_decompose(const planner_problem_t *problem, const int32_t *loads);

static inline int64_t planner_min(int64_t a, int64_t b) {
  return a < b ? a : b;
}
static inline int64_t planner_max(int64_t a, int64_t b) {
  return a > b ? a : b;
}
static inline int64_t planner_ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

#endif
