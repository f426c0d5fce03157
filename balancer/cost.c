/* What a plan costs: the rows of its busiest rank, and the copies of its replicas' weights. */
#include "planner_internal.h"

#include <string.h>

/* ---- the gate's estimate ---- */

ultraepResult_t ultraepPlanCost(const ultraepPlannerConfig_t *config, const ultraepPlan_t *plan,
                                ultraepPlanCost_t *cost) {
  if (!plan || !cost || ultraepPlannerConfigError(config)[0] != '\0') return ultraepInvalidArgument;
  int32_t perRank = plan->nExperts / plan->nRanks, copies = plan->maxRankIn;
  int64_t most = 0;
  for (int32_t r = 0; r < plan->nRanks; r++) {
    int32_t sends = 0;
    for (int32_t e = r * perRank; e < (r + 1) * perRank; e++) {
      int32_t replicas = plan->replicaFirst[e + 1] - plan->replicaFirst[e];
      sends += config->relayCopies && replicas > 0 ? 1 : replicas;
    }
    if (sends > copies) copies = sends;
    int64_t load = plan->rankLoad[r];
    for (int32_t s = 0; s < plan->nSlots && plan->slotInstance[(int64_t)r * plan->nSlots + s] >= 0; s++)
      load += config->replicaRows;
    most = planner_max(most, load);
  }
  *cost = (ultraepPlanCost_t){.copies = copies,
                              .rowsPs = (uint64_t)most * config->rowPs,
                              .copiesPs = (uint64_t)copies * config->copyPs};
  return ultraepSuccess;
}

/* ---- the relay ---- */

/* own[r]: experts whose masters are on rank r and which have replicas, so that r must send them. */
static void cost_count_own(const ultraepPlan_t *plan, int32_t *own) {
  int32_t perRank = plan->nExperts / plan->nRanks;
  memset(own, 0, sizeof(*own) * (size_t)plan->nRanks);
  for (int32_t e = 0; e < plan->nExperts; e++)
    own[e / perRank] += plan->replicaFirst[e + 1] > plan->replicaFirst[e];
}

/* chain[0..n): the expert's replicas in the order in which the weights reach them; returns n. They come by
 * rank, so that a stable insertion by own[] leaves equals in that order. */
static int32_t cost_order_chain(const ultraepPlan_t *plan, int32_t expert, const int32_t *own,
                                int32_t *chain) {
  int32_t first = plan->replicaFirst[expert], n = plan->replicaFirst[expert + 1] - first;
  for (int32_t i = 0; i < n; i++) {
    int32_t replica = plan->replicaIndex[first + i], busy = own[plan->instances[replica].rank], at = i;
    for (; at > 0 && own[plan->instances[chain[at - 1]].rank] > busy; at--) chain[at] = chain[at - 1];
    chain[at] = replica;
  }
  return n;
}

ultraepResult_t ultraepPlanRelay(const ultraepPlan_t *plan, int32_t *source) {
  int32_t own[ULTRAEP_MAX_RANKS], chain[ULTRAEP_MAX_RANKS];
  if (!plan || !source) return ultraepInvalidArgument;
  cost_count_own(plan, own);
  for (int32_t e = 0; e < plan->nExperts; e++) {
    int32_t n = cost_order_chain(plan, e, own, chain);
    for (int32_t i = 0; i < n; i++) source[chain[i] - plan->nExperts] = i == 0 ? e : chain[i - 1];
  }
  return ultraepSuccess;
}

/* ---- the model of the copies ---- */

/* The copies that each rank sends and receives. */
typedef struct {
  int32_t sends[ULTRAEP_MAX_RANKS], receives[ULTRAEP_MAX_RANKS];
} cost_links_t;

static int32_t cost_source(const ultraepPlan_t *plan, const int32_t *source, int32_t replica) {
  return source ? source[replica - plan->nExperts] : plan->instances[replica].expert;
}

/* False where a source is no other instance of the same expert. */
static bool cost_count_links(const ultraepPlan_t *plan, const int32_t *source, cost_links_t *links) {
  memset(links, 0, sizeof(*links));
  for (int32_t i = plan->nExperts; i < plan->nInstances; i++) {
    int32_t from = cost_source(plan, source, i);
    if (from < 0 || from >= plan->nInstances || plan->instances[from].expert != plan->instances[i].expert)
      return false;
    links->sends[plan->instances[from].rank]++;
    links->receives[plan->instances[i].rank]++;
  }
  return true;
}

/* Index of the largest of n counts, the lowest of equals. */
static int32_t cost_busiest(const int32_t *count, int32_t n) {
  int32_t busiest = 0;
  for (int32_t r = 1; r < n; r++)
    if (count[r] > count[busiest]) busiest = r;
  return busiest;
}

/* The way of one replica's weights, walked back to the master. A transfer shares its sender's link with the
 * sender's other transfers and its receiver's link with the receiver's, so with fair sharing it has at least
 * 1/k of a link, k the larger of the two numbers. A line of such stages passes tiles on like a pipeline: the
 * slowest stage takes all tiles, each other stage one tile. False where the way never ends. */
static bool cost_walk_chain(const ultraepPlan_t *plan, const int32_t *source, const cost_links_t *links,
                            const ultraepLink_t *link, int32_t replica, ultraepCopies_t *copies) {
  int32_t slowest = 0, depth = 0;
  int64_t shares = 0;
  for (int32_t at = replica; at >= plan->nExperts; depth++) {
    int32_t from = cost_source(plan, source, at);
    int32_t sends = links->sends[plan->instances[from].rank];
    int32_t receives = links->receives[plan->instances[at].rank], share = sends > receives ? sends : receives;
    if (depth == plan->nReplicas) return false;
    if (share > slowest) slowest = share;
    shares += share;
    at = from;
  }
  uint64_t ps = (uint64_t)slowest * link->copyPs + (uint64_t)(shares - slowest) * link->tilePs +
                (uint64_t)depth * link->hopPs;
  if (ps > copies->ps) copies->ps = ps;
  if (depth > copies->depth) copies->depth = depth;
  return true;
}

ultraepResult_t ultraepPlanCopies(const ultraepPlan_t *plan, const int32_t *source, const ultraepLink_t *link,
                                  ultraepCopies_t *copies) {
  cost_links_t links;
  if (!plan || !link || !copies || link->copyPs > ULTRAEP_MAX_COPY_PS || link->tilePs > link->copyPs ||
      link->hopPs > ULTRAEP_MAX_COPY_PS || !cost_count_links(plan, source, &links))
    return ultraepInvalidArgument;
  ultraepCopies_t result = {.sender = cost_busiest(links.sends, plan->nRanks),
                            .receiver = cost_busiest(links.receives, plan->nRanks)};
  result.maxSends = links.sends[result.sender];
  result.maxReceives = links.receives[result.receiver];
  result.floorPs = (uint64_t)planner_max(result.maxSends, result.maxReceives) * link->copyPs;
  for (int32_t i = plan->nExperts; i < plan->nInstances; i++)
    if (!cost_walk_chain(plan, source, &links, link, i, &result)) return ultraepInvalidArgument;
  *copies = result;
  return ultraepSuccess;
}
