/* Exact decomposition of quotas by source rank. For one expert, the instances' quotas and the sources' counts
 * are laid end to end on the same line; the overlaps are what each source sends to each instance. First a
 * source's own instance takes what it can of the source's own count. No rounding anywhere. */
#include "planner_internal.h"

typedef struct {
  const planner_problem_t *problem;
  const int32_t *column;   /* loads of this expert: column[src * E] */
  const int32_t *replicas; /* its replicas' instance indices, ascending by rank */
  int32_t expert, nReplicas;
} decompose_expert_t;

static int32_t decompose_instance(const decompose_expert_t *x, int32_t j) {
  return j == 0 ? x->expert : x->replicas[j - 1];
}

/* What instance j takes from the source on its own rank. */
static int64_t decompose_own(const decompose_expert_t *x, int32_t j) {
  const ultraepInstance_t *instance = &x->problem->ws->instances[decompose_instance(x, j)];
  return planner_min(instance->quota, x->column[(int64_t)instance->rank * x->problem->config.nExperts]);
}

/* The rank of replica j's instance, or one past the last rank where there is no such replica. */
static int32_t decompose_replica_rank(const decompose_expert_t *x, int32_t j) {
  return j < x->nReplicas ? x->problem->ws->instances[x->replicas[j]].rank : x->problem->config.nRanks;
}

/* Writes one expert's pieces from `out` on; returns how many. Adds to *local what stays on its source's rank.
 */
static int32_t decompose_expert(const decompose_expert_t *x, ultraepPiece_t *out, int64_t *local) {
  int64_t *quotaLeft = x->problem->ws->quotaLeft, stride = x->problem->config.nExperts;
  int32_t nRanks = x->problem->config.nRanks, masterRank = x->problem->ws->instances[x->expert].rank;
  int32_t replicaRank = decompose_replica_rank(x, 0), nextReplica = 0, at = 0, instance = x->expert;
  ultraepPiece_t *piece = out;
  for (int32_t j = 0; j <= x->nReplicas; j++)
    quotaLeft[j] = x->problem->ws->instances[decompose_instance(x, j)].quota - decompose_own(x, j);
  int64_t left = quotaLeft[0];
  for (int32_t src = 0; src < nRanks; src++) {
    int64_t count = x->column[src * stride];
    if (src == masterRank || src == replicaRank) {
      int32_t own = src == masterRank ? 0 : ++nextReplica;
      if (own > 0) replicaRank = decompose_replica_rank(x, nextReplica);
      int64_t kept = decompose_own(x, own);
      if (kept > 0) *piece++ = (ultraepPiece_t){src, decompose_instance(x, own), (int32_t)kept};
      *local += kept;
      count -= kept;
    }
    while (count > 0) {
      while (left == 0) {
        left = quotaLeft[++at];
        instance = decompose_instance(x, at);
      }
      int64_t overlap = planner_min(count, left);
      *piece++ = (ultraepPiece_t){src, instance, (int32_t)overlap};
      left -= overlap;
      count -= overlap;
    }
  }
  return (int32_t)(piece - out);
}

int64_t planner_decompose(const planner_problem_t *problem, const int32_t *loads) {
  const planner_workspace_t *ws = problem->ws;
  int32_t nExperts = problem->config.nExperts, nPieces = 0;
  int64_t local = 0;
  for (int32_t e = 0; e < nExperts; e++) {
    int32_t first = ws->replicaFirst[e], nReplicas = ws->replicaFirst[e + 1] - first;
    ws->pieceFirst[e] = nPieces;
    if (nReplicas == 0) {
      local += loads[(int64_t)ws->instances[e].rank * nExperts + e];
    } else {
      decompose_expert_t x = {problem, loads + e, ws->replicaIndex + first, e, nReplicas};
      nPieces += decompose_expert(&x, ws->pieces + nPieces, &local);
    }
  }
  ws->pieceFirst[nExperts] = nPieces;
  return local;
}
