/* The planner's entry points: checks, the workspace, and the plan put together from its steps. */
#include "planner_internal.h"

#include <limits.h>
#include <string.h>

static int32_t planner_domain(const ultraepPlannerConfig_t *config) {
  return config->nDomainRanks == 0 ? config->nRanks : config->nDomainRanks;
}

const char *ultraepPlannerConfigError(const ultraepPlannerConfig_t *config) {
  if (!config) return "config is null";
  if (config->nRanks < 1 || config->nRanks > ULTRAEP_MAX_RANKS) return "nRanks must be 1..1024";
  if (config->nExperts < config->nRanks || config->nExperts > ULTRAEP_MAX_EXPERTS)
    return "nExperts must be nRanks..4096";
  if (config->nExperts % config->nRanks != 0) return "nExperts must be a multiple of nRanks";
  if (config->nSlots < 0 || config->nSlots > ULTRAEP_MAX_SLOTS) return "nSlots must be 0..64";
  if (config->nDomainRanks < 0 || config->nRanks % planner_domain(config) != 0)
    return "nDomainRanks must be 0 or a divisor of nRanks";
  if (config->tolerancePpm > ULTRAEP_MAX_TOLERANCE_PPM) return "tolerancePpm must be 0..1000000000";
  if (config->rowPs > ULTRAEP_MAX_ROW_PS) return "rowPs must be 0..4194303";
  if (config->copyPs > ULTRAEP_MAX_COPY_PS) return "copyPs must be 0..1000000000000";
  if (config->relayCopies < 0 || config->relayCopies > 1) return "relayCopies must be 0 or 1";
  if (config->replicaRows < 0 || config->replicaRows > ULTRAEP_MAX_REPLICA_ROWS)
    return "replicaRows must be 0..1048576";
  return "";
}

/* Every replicated expert has at most one piece per source, one per instance's own source, and one per
 * instance where the overlap changes. */
static size_t planner_pieces_max(size_t nRanks, size_t nExperts, size_t nReplicas) {
  size_t replicated = nReplicas < nExperts ? nReplicas : nExperts;
  return replicated * nRanks + 2 * (replicated + nReplicas);
}

/* Hands out an array from the workspace; with a null base only counts. */
static void *planner_carve(char *base, size_t *used, size_t count, size_t size) {
  void *array = base ? base + *used : NULL;
  *used += (count * size + 15) / 16 * 16;
  return array;
}

static size_t planner_workspace_lay_out(const ultraepPlannerConfig_t *config, char *base,
                                        planner_workspace_t *ws) {
  size_t r = (size_t)config->nRanks, e = (size_t)config->nExperts, slots = r * (size_t)config->nSlots,
         used = 0;
  ws->expertLoad = planner_carve(base, &used, e, sizeof(*ws->expertLoad));
  ws->rankLoadBefore = planner_carve(base, &used, r, sizeof(*ws->rankLoadBefore));
  ws->rankLoad = planner_carve(base, &used, r, sizeof(*ws->rankLoad));
  ws->scratch = planner_carve(base, &used, e, sizeof(*ws->scratch));
  ws->rem = planner_carve(base, &used, e, sizeof(*ws->rem));
  ws->quotaLeft = planner_carve(base, &used, r, sizeof(*ws->quotaLeft));
  ws->largest = planner_carve(base, &used, r, sizeof(*ws->largest));
  ws->heavy = planner_carve(base, &used, r, sizeof(*ws->heavy));
  ws->light = planner_carve(base, &used, r, sizeof(*ws->light));
  ws->slotCount = planner_carve(base, &used, r, sizeof(*ws->slotCount));
  ws->slotExpert = planner_carve(base, &used, slots, sizeof(*ws->slotExpert));
  ws->slotQuota = planner_carve(base, &used, slots, sizeof(*ws->slotQuota));
  ws->instances = planner_carve(base, &used, e + slots, sizeof(*ws->instances));
  ws->replicaFirst = planner_carve(base, &used, e + 1, sizeof(*ws->replicaFirst));
  ws->replicaIndex = planner_carve(base, &used, slots, sizeof(*ws->replicaIndex));
  ws->slotInstance = planner_carve(base, &used, slots, sizeof(*ws->slotInstance));
  ws->pieceFirst = planner_carve(base, &used, e + 1, sizeof(*ws->pieceFirst));
  ws->pieces = planner_carve(base, &used, planner_pieces_max(r, e, slots), sizeof(*ws->pieces));
  return used;
}

ultraepResult_t ultraepPlannerWorkspaceSize(const ultraepPlannerConfig_t *config, size_t *bytes) {
  planner_workspace_t ws;
  if (!bytes || ultraepPlannerConfigError(config)[0] != '\0') return ultraepInvalidArgument;
  *bytes = planner_workspace_lay_out(config, NULL, &ws);
  return ultraepSuccess;
}

/* Sums the matrix by expert and by rank; false where a load is negative or a row too large. */
static bool planner_sum_loads(planner_problem_t *problem, const int32_t *restrict loads) {
  int32_t nRanks = problem->config.nRanks, nExperts = problem->config.nExperts, perRank = problem->perRank;
  int64_t *restrict expertLoad = problem->ws->expertLoad;
  memset(expertLoad, 0, sizeof(*expertLoad) * (size_t)nExperts);
  for (int32_t src = 0; src < nRanks; src++) {
    const int32_t *row = loads + (int64_t)src * nExperts;
    int64_t sum = 0;
    int32_t sign = 0;
    for (int32_t e = 0; e < nExperts; e++) {
      sum += (uint32_t)row[e];
      sign |= row[e];
      expertLoad[e] += (uint32_t)row[e];
    }
    if (sign < 0 || sum > INT32_MAX) return false;
  }
  problem->total = 0;
  for (int32_t r = 0; r < nRanks; r++) {
    int64_t sum = 0;
    for (int32_t e = r * perRank; e < (r + 1) * perRank; e++) sum += expertLoad[e];
    problem->ws->rankLoadBefore[r] = sum;
    problem->total += sum;
  }
  return true;
}

/* Takes the replicas' worth out of the loads that the search has left; returns the largest. */
static int64_t planner_count_rows(const planner_problem_t *problem) {
  const planner_workspace_t *ws = problem->ws;
  int64_t most = 0;
  for (int32_t r = 0; r < problem->config.nRanks; r++) {
    ws->rankLoad[r] -= (int64_t)ws->slotCount[r] * problem->config.replicaRows;
    most = planner_max(most, ws->rankLoad[r]);
  }
  return most;
}

/* Puts each rank's slots in order of expert. */
static void planner_sort_slots(const planner_problem_t *problem) {
  const planner_workspace_t *ws = problem->ws;
  for (int32_t r = 0; r < problem->config.nRanks; r++) {
    int32_t *expert = ws->slotExpert + (int64_t)r * problem->config.nSlots;
    int64_t *quota = ws->slotQuota + (int64_t)r * problem->config.nSlots;
    for (int32_t i = 1; i < ws->slotCount[r]; i++) {
      int32_t e = expert[i], j = i;
      int64_t q = quota[i];
      for (; j > 0 && expert[j - 1] > e; j--) {
        expert[j] = expert[j - 1];
        quota[j] = quota[j - 1];
      }
      expert[j] = e;
      quota[j] = q;
    }
  }
}

/* Masters, then replicas by (rank, slot); and the index of replicas by expert. Returns the number of
 * instances. */
static int32_t planner_list_instances(const planner_problem_t *problem) {
  const planner_workspace_t *ws = problem->ws;
  int32_t nExperts = problem->config.nExperts, nSlots = problem->config.nSlots, n = nExperts;
  memset(ws->replicaFirst, 0, sizeof(*ws->replicaFirst) * ((size_t)nExperts + 1));
  for (int32_t e = 0; e < nExperts; e++)
    ws->instances[e] = (ultraepInstance_t){e, e / problem->perRank, -1, 0, ws->expertLoad[e]};
  for (int32_t r = 0; r < problem->config.nRanks; r++) {
    for (int32_t s = 0; s < nSlots; s++) {
      int64_t at = (int64_t)r * nSlots + s;
      ws->slotInstance[at] = s < ws->slotCount[r] ? n : -1;
      if (s >= ws->slotCount[r]) continue;
      int32_t e = ws->slotExpert[at];
      ws->instances[n++] = (ultraepInstance_t){e, r, s, 0, ws->slotQuota[at]};
      ws->instances[e].quota -= ws->slotQuota[at];
      ws->replicaFirst[e + 1]++;
    }
  }
  for (int32_t e = 0; e < nExperts; e++) ws->replicaFirst[e + 1] += ws->replicaFirst[e];
  /* A stable counting sort: replicaFirst[e] walks to the end of e's range, then the ends move down by one
   * place. */
  for (int32_t i = nExperts; i < n; i++) ws->replicaIndex[ws->replicaFirst[ws->instances[i].expert]++] = i;
  for (int32_t e = nExperts; e > 0; e--) ws->replicaFirst[e] = ws->replicaFirst[e - 1];
  ws->replicaFirst[0] = 0;
  return n;
}

static void planner_count_copies(const planner_problem_t *problem, ultraepPlan_t *plan) {
  const planner_workspace_t *ws = problem->ws;
  int32_t perRank = problem->perRank;
  for (int32_t r = 0; r < problem->config.nRanks; r++) {
    int32_t out = ws->replicaFirst[(r + 1) * perRank] - ws->replicaFirst[r * perRank];
    if (out > plan->maxRankOut) plan->maxRankOut = out;
    if (ws->slotCount[r] > plan->maxRankIn) plan->maxRankIn = ws->slotCount[r];
    for (int32_t e = r * perRank; e < (r + 1) * perRank; e++) {
      int32_t fanout = ws->replicaFirst[e + 1] - ws->replicaFirst[e];
      if (fanout > plan->maxFanout) plan->maxFanout = fanout;
    }
  }
}

ultraepResult_t ultraepPlannerRun(const ultraepPlannerConfig_t *config, const int32_t *loads, void *workspace,
                                  size_t workspaceBytes, ultraepPlan_t *plan) {
  planner_workspace_t ws;
  size_t needed;
  if (!loads || !workspace || !plan || ultraepPlannerWorkspaceSize(config, &needed) != ultraepSuccess ||
      workspaceBytes < needed || (uintptr_t)workspace % 16 != 0)
    return ultraepInvalidArgument;

  planner_problem_t problem = {.config = *config, .perRank = config->nExperts / config->nRanks, .ws = &ws};
  problem.config.nDomainRanks = planner_domain(config);
  planner_workspace_lay_out(config, workspace, &ws);
  if (!planner_sum_loads(&problem, loads)) return ultraepInvalidArgument;

  planner_outcome_t outcome = planner_search(&problem);
  planner_sort_slots(&problem);
  ultraepPlan_t result = {.nRanks = config->nRanks,
                          .nExperts = config->nExperts,
                          .nSlots = config->nSlots,
                          .nInstances = planner_list_instances(&problem),
                          .nReplicas = outcome.nReplicas,
                          .instances = ws.instances,
                          .replicaFirst = ws.replicaFirst,
                          .replicaIndex = ws.replicaIndex,
                          .slotInstance = ws.slotInstance,
                          .pieceFirst = ws.pieceFirst,
                          .pieces = ws.pieces,
                          .expertLoad = ws.expertLoad,
                          .rankLoadBefore = ws.rankLoadBefore,
                          .rankLoad = ws.rankLoad,
                          .total = problem.total,
                          .maxPlanned = planner_count_rows(&problem),
                          .target = outcome.target,
                          .bound = planner_mean_bound(&problem)};
  for (int32_t r = 0; r < config->nRanks; r++)
    result.maxBefore = planner_max(result.maxBefore, ws.rankLoadBefore[r]);
  planner_count_copies(&problem, &result);
  /* The mean is the bound wherever it was reached; only elsewhere does the slots' bound need working out. */
  if (result.maxPlanned > result.bound) result.bound = planner_bound(&problem);
  result.localAssignments = planner_decompose(&problem, loads);
  *plan = result;
  return ultraepSuccess;
}

ultraepResult_t ultraepPlanRealised(const ultraepPlan_t *plan, const int32_t *loads, int64_t *load) {
  if (!plan || !loads || !load) return ultraepInvalidArgument;
  memset(load, 0, sizeof(*load) * (size_t)plan->nRanks);
  for (int32_t e = 0; e < plan->nExperts; e++) {
    if (plan->replicaFirst[e] == plan->replicaFirst[e + 1]) {
      for (int32_t src = 0; src < plan->nRanks; src++)
        load[plan->instances[e].rank] += loads[(int64_t)src * plan->nExperts + e];
    } else {
      for (int32_t i = plan->pieceFirst[e]; i < plan->pieceFirst[e + 1]; i++)
        load[plan->instances[plan->pieces[i].instance].rank] += plan->pieces[i].count;
    }
  }
  return ultraepSuccess;
}
