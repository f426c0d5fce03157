#include "planner_common.h"

#include <stdlib.h>
#include <string.h>

uint64_t planner_random_next(planner_random_t *random) {
  uint64_t z = random->state += UINT64_C(0x9e3779b97f4a7c15);
  z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
  z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
  return z ^ (z >> 31);
}

int32_t planner_random_below(planner_random_t *random, int32_t n) {
  return (int32_t)(planner_random_next(random) % (uint64_t)n);
}

static int32_t case_divisor(planner_random_t *random, int32_t n) {
  int32_t d;
  do d = 1 + planner_random_below(random, n);
  while (n % d != 0);
  return d;
}

static void case_fill(planner_case_t *made, planner_random_t *random) {
  int32_t nRanks = made->config.nRanks, nExperts = made->config.nExperts;
  int32_t family = planner_random_below(random, 7), hot = planner_random_below(random, nExperts);
  int32_t scale = 1 << planner_random_below(random, 14);
  int32_t weight[ULTRAEP_MAX_EXPERTS];
  for (int32_t e = 0; e < nExperts; e++) {
    int32_t skew = 1 << planner_random_below(random, 10);
    weight[e] = family == 1 ? scale / skew : family == 2 ? (e == hot ? scale : 0) : scale;
  }
  for (int32_t src = 0; src < nRanks; src++) {
    bool empty = family == 3 && planner_random_below(random, 2);
    for (int32_t e = 0; e < nExperts; e++) {
      int32_t load = planner_random_below(random, weight[e] + 1);
      if (family == 4) load = planner_random_below(random, 8) == 0;
      if (family == 5) load = 0;
      if (family == 6) load = planner_random_below(random, INT32_MAX / nExperts);
      made->loads[(int64_t)src * nExperts + e] = empty ? 0 : load;
    }
  }
}

bool planner_case_make(planner_case_t *made, planner_random_t *random, planner_case_limits_t limits) {
  static const uint32_t tolerances[] = {0, 0, 500, 10000, 300000, 1000000000};
  int32_t nRanks = 1 + planner_random_below(random, limits.maxRanks);
  *made = (planner_case_t){
      .config = {.nRanks = nRanks,
                 .nExperts = nRanks * (1 + planner_random_below(random, limits.maxExpertsPerRank)),
                 .nSlots = planner_random_below(random, limits.maxSlots + 1),
                 .nDomainRanks = planner_random_below(random, 2) ? 0 : case_divisor(random, nRanks),
                 .tolerancePpm = tolerances[planner_random_below(random, 6)],
                 .rowPs = (uint32_t)planner_random_below(random, 1000000),
                 .copyPs =
                     planner_random_below(random, 3) ? 0 : (uint64_t)planner_random_below(random, 1000000000),
                 .relayCopies = planner_random_below(random, 2)}};
  /* From next to nothing to far more than most ranks have. */
  int32_t most = 1 << planner_random_below(random, 21);
  made->config.replicaRows = planner_random_below(random, 4) ? 0 : 1 + planner_random_below(random, most);
  if (ultraepPlannerWorkspaceSize(&made->config, &made->workspaceBytes) != ultraepSuccess) return false;
  made->loads = malloc(sizeof(*made->loads) * (size_t)nRanks * (size_t)made->config.nExperts);
  made->workspace = malloc(made->workspaceBytes);
  if (!made->loads || !made->workspace) {
    planner_case_free(made);
    return false;
  }
  case_fill(made, random);
  return true;
}

void planner_case_free(planner_case_t *made) {
  free(made->loads);
  free(made->workspace);
  *made = (planner_case_t){0};
}

static const char *flaw_instances(const ultraepPlannerConfig_t *config, const ultraepPlan_t *plan) {
  int32_t perRank = config->nExperts / config->nRanks, nSlots = config->nSlots;
  int32_t domain = config->nDomainRanks ? config->nDomainRanks : config->nRanks;
  static int64_t quota[ULTRAEP_MAX_EXPERTS], load[ULTRAEP_MAX_RANKS];
  memset(quota, 0, sizeof(quota));
  memset(load, 0, sizeof(load));
  if (plan->nInstances != config->nExperts + plan->nReplicas) return "nInstances is not experts + replicas";
  for (int32_t i = 0; i < plan->nInstances; i++) {
    const ultraepInstance_t *x = &plan->instances[i];
    if (x->expert < 0 || x->expert >= config->nExperts || x->rank < 0 || x->rank >= config->nRanks)
      return "an instance names no expert or rank";
    int32_t master = x->expert / perRank;
    if (i < config->nExperts && (x->expert != i || x->rank != master || x->slot != -1))
      return "a master moved";
    if (x->quota < 0) return "a quota is negative";
    if (i >= config->nExperts) {
      const ultraepInstance_t *before = x - 1;
      if (x->quota == 0) return "a replica without assignments";
      if (x->rank == master) return "a replica on its master's rank";
      if (x->rank / domain != master / domain) return "a replica left its domain";
      if (x->slot < 0 || x->slot >= nSlots) return "a replica in no slot";
      if (plan->slotInstance[(int64_t)x->rank * nSlots + x->slot] != i) return "slotInstance disagrees";
      if (i > config->nExperts &&
          (before->rank > x->rank || (before->rank == x->rank && before->expert >= x->expert)))
        return "replicas are not sorted, or one is there twice";
    }
    quota[x->expert] += x->quota;
    load[x->rank] += x->quota;
  }
  int64_t most = 0;
  for (int32_t e = 0; e < config->nExperts; e++)
    if (quota[e] != plan->expertLoad[e]) return "quotas do not sum to the expert's load";
  for (int32_t r = 0; r < config->nRanks; r++) {
    if (load[r] != plan->rankLoad[r]) return "rankLoad is not the sum of quotas";
    if (load[r] > most) most = load[r];
  }
  return most == plan->maxPlanned ? NULL : "maxPlanned is not the maximum";
}

static const char *flaw_counts(const ultraepPlannerConfig_t *config, const ultraepPlan_t *plan) {
  int32_t perRank = config->nExperts / config->nRanks, fanout = 0, rankIn = 0, rankOut = 0, used = 0;
  for (int32_t r = 0; r < config->nRanks; r++) {
    int32_t in = 0, out = 0;
    for (int32_t s = 0; s < config->nSlots; s++)
      in += plan->slotInstance[(int64_t)r * config->nSlots + s] >= 0;
    for (int32_t e = r * perRank; e < (r + 1) * perRank; e++) {
      int32_t n = plan->replicaFirst[e + 1] - plan->replicaFirst[e];
      out += n;
      if (n > fanout) fanout = n;
      for (int32_t i = plan->replicaFirst[e]; i < plan->replicaFirst[e + 1]; i++) {
        if (plan->instances[plan->replicaIndex[i]].expert != e)
          return "replicaIndex names another expert's replica";
        if (i > plan->replicaFirst[e] && plan->replicaIndex[i - 1] >= plan->replicaIndex[i])
          return "replicaIndex is not ascending";
      }
    }
    used += in;
    if (in > rankIn) rankIn = in;
    if (out > rankOut) rankOut = out;
  }
  if (used != plan->nReplicas || plan->replicaFirst[config->nExperts] != plan->nReplicas)
    return "replicas miscounted";
  if (fanout != plan->maxFanout || rankIn != plan->maxRankIn || rankOut != plan->maxRankOut)
    return "a maximum is wrong";
  return NULL;
}

/* The decomposition of one expert: sums by source and by instance, order, own instance first. */
static const char *flaw_pieces(const int32_t *loads, const ultraepPlan_t *plan, int32_t e, int64_t *local) {
  static int64_t bySource[ULTRAEP_MAX_RANKS], byRank[ULTRAEP_MAX_RANKS];
  int32_t n = plan->pieceFirst[e + 1] - plan->pieceFirst[e];
  int32_t nReplicas = plan->replicaFirst[e + 1] - plan->replicaFirst[e], master = plan->instances[e].rank;
  if (nReplicas == 0) {
    *local += loads[(int64_t)master * plan->nExperts + e];
    return n == 0 ? NULL : "pieces of an expert without replicas";
  }
  memset(bySource, 0, sizeof(bySource));
  memset(byRank, 0, sizeof(byRank));
  for (int32_t i = 0; i < n; i++) {
    const ultraepPiece_t *x = &plan->pieces[plan->pieceFirst[e] + i], *before = x - 1;
    if (x->src < 0 || x->src >= plan->nRanks || x->count <= 0) return "a piece names no source, or is empty";
    if (x->instance < 0 || x->instance >= plan->nInstances || plan->instances[x->instance].expert != e)
      return "a piece names no instance of its expert";
    bool own = plan->instances[x->instance].rank == x->src;
    if (i > 0 && before->src > x->src) return "pieces are not sorted by source";
    if (i > 0 && before->src == x->src) {
      bool afterOwn = plan->instances[before->instance].rank == x->src;
      if (own || (!afterOwn && before->instance >= x->instance)) return "a source's pieces are out of order";
    }
    bySource[x->src] += x->count;
    byRank[plan->instances[x->instance].rank] += x->count;
    if (own) *local += x->count;
  }
  for (int32_t r = 0; r < plan->nRanks; r++)
    if (bySource[r] != loads[(int64_t)r * plan->nExperts + e]) return "pieces do not sum to a source's load";
  for (int32_t i = -1; i < nReplicas; i++) {
    const ultraepInstance_t *x = &plan->instances[i < 0 ? e : plan->replicaIndex[plan->replicaFirst[e] + i]];
    if (byRank[x->rank] != x->quota) return "pieces do not sum to a quota";
  }
  return n <= plan->nRanks + 2 * nReplicas + 1 ? NULL : "too many pieces";
}

static int64_t load_with_worth(const ultraepPlan_t *plan, int32_t rank, int32_t replicaRows) {
  int64_t load = plan->rankLoad[rank];
  for (int32_t s = 0; s < plan->nSlots; s++)
    if (plan->slotInstance[(int64_t)rank * plan->nSlots + s] >= 0) load += replicaRows;
  return load;
}

int64_t planner_largest_load(const ultraepPlan_t *plan, int32_t replicaRows) {
  int64_t most = 0;
  for (int32_t r = 0; r < plan->nRanks; r++) {
    int64_t load = load_with_worth(plan, r, replicaRows);
    if (load > most) most = load;
  }
  return most;
}

/* Loads with replicas' worth: in every domain the largest is no larger than without replicas, and who hosts
 * some is below what its domain's busiest rank had. */
static const char *flaw_worth(const ultraepPlannerConfig_t *config, const ultraepPlan_t *plan) {
  int32_t domain = config->nDomainRanks ? config->nDomainRanks : config->nRanks;
  for (int32_t first = 0; first < config->nRanks; first += domain) {
    int64_t before = 0;
    for (int32_t r = first; r < first + domain; r++)
      if (plan->rankLoadBefore[r] > before) before = plan->rankLoadBefore[r];
    for (int32_t r = first; r < first + domain; r++) {
      int64_t load = load_with_worth(plan, r, config->replicaRows);
      bool hosts = config->nSlots > 0 && plan->slotInstance[(int64_t)r * config->nSlots] >= 0;
      if (load > before) return "with replicas' worth the plan made it worse";
      if (hosts && load >= before) return "a replica that does not pay";
    }
  }
  return NULL;
}

const char *planner_plan_flaw(const ultraepPlannerConfig_t *config, const int32_t *loads,
                              const ultraepPlan_t *plan) {
  static int64_t realised[ULTRAEP_MAX_RANKS];
  const char *flaw = flaw_instances(config, plan);
  int64_t local = 0, sum = 0, before = 0;
  if (!flaw) flaw = flaw_counts(config, plan);
  if (!flaw) flaw = flaw_worth(config, plan);
  for (int32_t e = 0; e < config->nExperts && !flaw; e++) {
    flaw = flaw_pieces(loads, plan, e, &local);
    sum += plan->expertLoad[e];
  }
  if (flaw) return flaw;
  for (int32_t r = 0; r < config->nRanks; r++)
    if (plan->rankLoadBefore[r] > before) before = plan->rankLoadBefore[r];
  if (local != plan->localAssignments) return "localAssignments is wrong";
  if (sum != plan->total || before != plan->maxBefore) return "total or maxBefore is wrong";
  if (plan->maxPlanned < plan->bound) return "the plan beats its bound";
  if (plan->bound * config->nRanks < plan->total) return "the bound is below the mean";
  if (plan->maxPlanned > plan->maxBefore) return "the plan made it worse";
  if (ultraepPlanRealised(plan, loads, realised) != ultraepSuccess) return "ultraepPlanRealised failed";
  return memcmp(realised, plan->rankLoad, sizeof(int64_t) * (size_t)config->nRanks)
             ? "realised differs from planned"
             : NULL;
}
