/* What plans cost: the gate's estimate against its definition, the relay's chains against theirs, and the
 * model of the copies against a simulation that moves every tile over every link, event by event. */
#include "planner_common.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static ultraepPlan_t plan_of(planner_case_t *made) {
  ultraepPlan_t plan;
  assert_int_equal(
      ultraepPlannerRun(&made->config, made->loads, made->workspace, made->workspaceBytes, &plan),
      ultraepSuccess);
  return plan;
}

/* ---- the gate ---- */

static uint64_t cost_sum(const ultraepPlannerConfig_t *config, const ultraepPlan_t *plan) {
  ultraepPlanCost_t cost;
  assert_int_equal(ultraepPlanCost(config, plan, &cost), ultraepSuccess);
  /* Every replica is sent by its master, or with a relay by nobody unless it is the expert's first. */
  int32_t sends[ULTRAEP_MAX_RANKS] = {0}, receives[ULTRAEP_MAX_RANKS] = {0}, copies = 0;
  bool sent[ULTRAEP_MAX_EXPERTS] = {false};
  for (int32_t i = plan->nExperts; i < plan->nInstances; i++) {
    const ultraepInstance_t *x = &plan->instances[i];
    int32_t in = ++receives[x->rank], *out = &sends[plan->instances[x->expert].rank];
    if (!config->relayCopies || !sent[x->expert]) ++*out;
    sent[x->expert] = true;
    if (in > copies) copies = in;
    if (*out > copies) copies = *out;
  }
  assert_int_equal(cost.copies, copies);
  assert_true(cost.rowsPs == (uint64_t)planner_largest_load(plan, config->replicaRows) * config->rowPs);
  assert_true(cost.copiesPs == (uint64_t)copies * config->copyPs);
  return cost.rowsPs + cost.copiesPs;
}

/* The gate's plan costs no more than full balance, and no more than none. With a tolerance the former could
 * end below its target, which the gate does not look for. */
static void test_gate(void **state) {
  (void)state;
  planner_random_t random = {21};
  int32_t fewer = 0, some = 0;
  for (int32_t i = 0; i < 4000; i++) {
    planner_case_t made;
    assert_true(planner_case_make(&made, &random, (planner_case_limits_t){16, 6, 3}));
    made.config.tolerancePpm = 0;
    made.config.rowPs = 1 + (uint32_t)planner_random_below(&random, 1000000);
    uint64_t copyPs = 1 + (uint64_t)planner_random_below(&random, 1000000000);
    ultraepPlannerConfig_t rates = made.config;
    rates.copyPs = copyPs;
    made.config.copyPs = 0;
    ultraepPlan_t plan = plan_of(&made);
    int32_t fullReplicas = plan.nReplicas;
    uint64_t full = cost_sum(&rates, &plan), none = (uint64_t)plan.maxBefore * rates.rowPs;
    made.config = rates;
    plan = plan_of(&made);
    uint64_t gated = cost_sum(&rates, &plan);
    assert_true(gated <= full);
    assert_true(gated <= none);
    fewer += plan.nReplicas < fullReplicas;
    some += plan.nReplicas > 0 && plan.nReplicas < fullReplicas;
    planner_case_free(&made);
  }
  print_message("4000 problems, the gate held back in %d and thinned in %d\n", fewer, some);
  assert_true(fewer > 400 && some > 40);
}

/* ---- the relay ---- */

/* own(r) of the header, from the instances alone. */
static void own_count(const ultraepPlan_t *plan, int32_t *own) {
  bool seen[ULTRAEP_MAX_EXPERTS] = {false};
  memset(own, 0, sizeof(*own) * ULTRAEP_MAX_RANKS);
  for (int32_t i = plan->nExperts; i < plan->nInstances; i++) {
    int32_t e = plan->instances[i].expert;
    if (!seen[e]) own[plan->instances[e].rank]++;
    seen[e] = true;
  }
}

/* The instance before a replica: of those of its expert that come earlier, the last; else the master. */
static int32_t relay_source(const ultraepPlan_t *plan, const int32_t *own, int32_t replica) {
  int32_t rank = plan->instances[replica].rank, best = plan->instances[replica].expert, bestRank = -1;
  for (int32_t i = plan->nExperts; i < plan->nInstances; i++) {
    int32_t r = plan->instances[i].rank;
    if (i == replica || plan->instances[i].expert != plan->instances[replica].expert) continue;
    bool before = own[r] < own[rank] || (own[r] == own[rank] && r < rank);
    bool later = bestRank < 0 || own[r] > own[bestRank] || (own[r] == own[bestRank] && r > bestRank);
    if (before && later) best = i, bestRank = r;
  }
  return best;
}

static void test_relay(void **state) {
  (void)state;
  static int32_t source[ULTRAEP_MAX_RANKS * ULTRAEP_MAX_SLOTS], own[ULTRAEP_MAX_RANKS];
  planner_random_t random = {22};
  int32_t longest = 0;
  for (int32_t i = 0; i < 2000; i++) {
    planner_case_t made;
    assert_true(planner_case_make(&made, &random, (planner_case_limits_t){40, 6, 4}));
    ultraepPlan_t plan = plan_of(&made);
    assert_int_equal(ultraepPlanRelay(&plan, source), ultraepSuccess);
    own_count(&plan, own);
    for (int32_t j = 0; j < plan.nReplicas; j++)
      assert_int_equal(source[j], relay_source(&plan, own, plan.nExperts + j));
    ultraepCopies_t copies;
    ultraepLink_t link = {0};
    assert_int_equal(ultraepPlanCopies(&plan, source, &link, &copies), ultraepSuccess);
    assert_int_equal(copies.depth, plan.maxFanout); /* a chain as long as its expert has replicas */
    if (copies.depth > longest) longest = copies.depth;
    planner_case_free(&made);
  }
  assert_true(longest > 8);
}

/* ---- the simulation ---- */

enum { SIM_EDGES = 256 };

/* A transfer of one expert's weights to one replica. */
typedef struct {
  int32_t from, to;     /* ranks */
  int32_t feeds;        /* the transfer that brings the weights to `from`, -1: a master has them */
  int32_t done, nTiles; /* tiles that have arrived */
  double left;          /* of the tile under way, in ps of a whole link */
  double rate;          /* share of a link */
  double *arrival;      /* [nTiles] */
} simEdge_t;

typedef struct {
  int32_t nRanks, nEdges;
  double now, copy, tile, hop;
  simEdge_t edges[SIM_EDGES];
} sim_t;

/* When the edge's next tile can set out; infinity where that is not known yet. */
static double sim_ready(const sim_t *sim, const simEdge_t *edge) {
  if (edge->done == edge->nTiles) return INFINITY;
  if (edge->feeds < 0) return 0;
  const simEdge_t *before = &sim->edges[edge->feeds];
  return before->done > edge->done ? before->arrival[edge->done] + sim->hop : INFINITY;
}

/* Max-min fair shares: the tightest link divides what it has left among its edges, and so on. */
static void sim_share(sim_t *sim) {
  double left[2 * ULTRAEP_MAX_RANKS];
  int32_t users[2 * ULTRAEP_MAX_RANKS];
  bool open[SIM_EDGES];
  int32_t nOpen = 0, nLinks = 2 * sim->nRanks; /* sending, then receiving */
  for (int32_t i = 0; i < nLinks; i++) left[i] = 1, users[i] = 0;
  for (int32_t i = 0; i < sim->nEdges; i++) {
    simEdge_t *edge = &sim->edges[i];
    edge->rate = 0;
    open[i] = sim_ready(sim, edge) <= sim->now;
    if (!open[i]) continue;
    nOpen++, users[edge->from]++, users[sim->nRanks + edge->to]++;
  }
  while (nOpen > 0) {
    int32_t tightest = -1;
    for (int32_t i = 0; i < nLinks; i++)
      if (users[i] > 0 && (tightest < 0 || left[i] * users[tightest] < left[tightest] * users[i]))
        tightest = i;
    if (tightest < 0) return; /* never: an open edge uses two links */
    double share = left[tightest] / users[tightest];
    for (int32_t i = 0; i < sim->nEdges; i++) {
      simEdge_t *edge = &sim->edges[i];
      int32_t links[2] = {edge->from, sim->nRanks + edge->to};
      if (!open[i] || (links[0] != tightest && links[1] != tightest)) continue;
      edge->rate = share;
      open[i] = false;
      nOpen--;
      for (int32_t j = 0; j < 2; j++) left[links[j]] -= share, users[links[j]]--;
    }
  }
}

static void sim_tile_start(const sim_t *sim, simEdge_t *edge) {
  double rest = sim->copy - (double)edge->done * sim->tile;
  edge->left = rest < sim->tile ? rest : sim->tile;
}

/* To the next arrival of a tile, or the next moment at which one can set out. */
static void sim_step(sim_t *sim) {
  double next = INFINITY;
  sim_share(sim);
  for (int32_t i = 0; i < sim->nEdges; i++) {
    const simEdge_t *edge = &sim->edges[i];
    double at = edge->rate > 0 ? sim->now + edge->left / edge->rate : sim_ready(sim, edge);
    if (at < next) next = at;
  }
  assert_true(isfinite(next));
  for (int32_t i = 0; i < sim->nEdges; i++) {
    simEdge_t *edge = &sim->edges[i];
    if (edge->rate == 0) continue;
    edge->left -= (next - sim->now) * edge->rate;
    if (edge->left > 1e-6) continue; /* a millionth of a picosecond: rounding */
    edge->arrival[edge->done++] = next;
    if (edge->done < edge->nTiles) sim_tile_start(sim, edge);
  }
  sim->now = next;
}

/* When the last replica can use its weights. source null: straight from the masters. */
static double sim_run(const ultraepPlan_t *plan, const int32_t *source, const ultraepLink_t *link) {
  static sim_t sim;
  int32_t left = plan->nReplicas, nTiles = (int32_t)((link->copyPs + link->tilePs - 1) / link->tilePs);
  assert_true(left <= SIM_EDGES);
  sim = (sim_t){.nRanks = plan->nRanks,
                .nEdges = left,
                .copy = (double)link->copyPs,
                .tile = (double)link->tilePs,
                .hop = (double)link->hopPs};
  double *arrivals = calloc((size_t)left * (size_t)nTiles + 1, sizeof(*arrivals));
  assert_non_null(arrivals);
  for (int32_t i = 0; i < left; i++) {
    const ultraepInstance_t *x = &plan->instances[plan->nExperts + i];
    int32_t from = source ? source[i] : x->expert;
    sim.edges[i] = (simEdge_t){.from = plan->instances[from].rank,
                               .to = x->rank,
                               .feeds = from < plan->nExperts ? -1 : from - plan->nExperts,
                               .nTiles = nTiles,
                               .arrival = arrivals + (int64_t)i * nTiles};
    sim_tile_start(&sim, &sim.edges[i]);
  }
  for (int32_t done = left > 0 ? 0 : 1; !done;) {
    sim_step(&sim);
    done = 1;
    for (int32_t i = 0; i < left; i++) done &= sim.edges[i].done == nTiles;
  }
  free(arrivals);
  return left > 0 ? sim.now + sim.hop : 0;
}

/* Any tree over an expert's instances: each replica from the master or from an earlier replica. */
static void random_sources(const ultraepPlan_t *plan, planner_random_t *random, int32_t *source) {
  for (int32_t e = 0; e < plan->nExperts; e++)
    for (int32_t first = plan->replicaFirst[e], i = first; i < plan->replicaFirst[e + 1]; i++) {
      int32_t pick = planner_random_below(random, i - first + 1);
      source[plan->replicaIndex[i] - plan->nExperts] = pick == 0 ? e : plan->replicaIndex[first + pick - 1];
    }
}

static bool nearly(double a, double b) {
  return fabs(a - b) <= 1e-9 * fabs(a) + 1e-3;
}

static double check_model(const ultraepPlan_t *plan, const int32_t *source, const ultraepLink_t *link) {
  ultraepCopies_t copies;
  assert_int_equal(ultraepPlanCopies(plan, source, link, &copies), ultraepSuccess);
  double simulated = sim_run(plan, source, link), model = (double)copies.ps;
  bool exact = source == NULL || (copies.maxSends <= 1 && copies.maxReceives <= 1);
  assert_true(simulated <= model * (1 + 1e-9) + 1e-3);
  assert_true(simulated >= (double)copies.floorPs * (1 - 1e-9));
  if (exact) assert_true(nearly(simulated, model));
  return model > 0 ? simulated / model : 1;
}

static void test_simulation(void **state) {
  (void)state;
  int32_t source[SIM_EDGES], nSingle = 0, n = 0;
  double sum = 0, least = 1;
  planner_random_t random = {23};
  for (int32_t i = 0; i < 400; i++) {
    planner_case_t made;
    assert_true(planner_case_make(&made, &random, (planner_case_limits_t){12, 4, 3}));
    made.config.copyPs = 0;
    ultraepPlan_t plan = plan_of(&made);
    uint64_t tile = 1 + (uint64_t)planner_random_below(&random, 1000000);
    ultraepLink_t link = {.copyPs = tile * (1 + (uint64_t)planner_random_below(&random, 24)),
                          .tilePs = tile,
                          .hopPs = (uint64_t)planner_random_below(&random, 3000000)};
    check_model(&plan, NULL, &link);
    assert_int_equal(ultraepPlanRelay(&plan, source), ultraepSuccess);
    ultraepCopies_t copies;
    assert_int_equal(ultraepPlanCopies(&plan, source, &link, &copies), ultraepSuccess);
    nSingle += plan.maxFanout > 1 && copies.maxSends == 1 && copies.maxReceives == 1;
    double ratio = check_model(&plan, source, &link);
    if (plan.nReplicas > 0) sum += ratio, n++;
    if (ratio < least) least = ratio;
    random_sources(&plan, &random, source);
    check_model(&plan, source, &link);
    if (link.copyPs > tile) link.copyPs -= tile / 2; /* the last tile is not whole: still a bound */
    ultraepPlanCopies(&plan, source, &link, &copies);
    assert_true(sim_run(&plan, source, &link) <= (double)copies.ps * (1 + 1e-9) + 1e-3);
    planner_case_free(&made);
  }
  print_message("relays: simulated / model %.3f on average, %.3f at least; %d with single copies\n", sum / n,
                least, nSingle);
  assert_true(n > 100 && nSingle > 10);
}

/* ---- a plan by hand, and errors ---- */

static void test_corners(void **state) {
  (void)state;
  planner_case_t made = {.config = {.nRanks = 8, .nExperts = 8, .nSlots = 1, .rowPs = 10, .relayCopies = 1}};
  assert_int_equal(ultraepPlannerWorkspaceSize(&made.config, &made.workspaceBytes), ultraepSuccess);
  made.loads = calloc(64, sizeof(*made.loads));
  made.workspace = malloc(made.workspaceBytes + 1);
  assert_true(made.loads && made.workspace);
  int32_t source[8];
  ultraepLink_t link = {.copyPs = 1000, .tilePs = 10, .hopPs = 3};
  ultraepCopies_t copies;
  ultraepPlan_t plan = plan_of(&made); /* nothing to do */
  assert_int_equal(ultraepPlanRelay(&plan, source), ultraepSuccess);
  assert_int_equal(ultraepPlanCopies(&plan, source, &link, &copies), ultraepSuccess);
  assert_true(copies.ps == 0 && copies.floorPs == 0 && copies.depth == 0 && copies.maxSends == 0);

  made.loads[0] = 8000; /* one expert, a replica on each other rank */
  plan = plan_of(&made);
  assert_int_equal(plan.nReplicas, 7);
  assert_int_equal(ultraepPlanCopies(&plan, NULL, &link, &copies), ultraepSuccess);
  assert_true(copies.maxSends == 7 && copies.sender == 0 && copies.maxReceives == 1 && copies.receiver == 1);
  assert_true(copies.depth == 1 && copies.floorPs == 7000 && copies.ps == 7003);
  assert_int_equal(ultraepPlanRelay(&plan, source), ultraepSuccess);
  for (int32_t i = 0; i < 7; i++) assert_int_equal(source[i], i == 0 ? 0 : 8 + i - 1);
  assert_int_equal(ultraepPlanCopies(&plan, source, &link, &copies), ultraepSuccess);
  assert_true(copies.maxSends == 1 && copies.depth == 7 && copies.floorPs == 1000);
  assert_true(copies.ps == 1000 + 6 * 10 + 7 * 3);
  ultraepPlanCost_t cost;
  made.config.copyPs = 50; /* rates may differ from those that the plan was made with */
  assert_int_equal(ultraepPlanCost(&made.config, &plan, &cost), ultraepSuccess);
  assert_true(cost.copies == 1 && cost.rowsPs == 10 * 1000 && cost.copiesPs == 50);
  made.config.relayCopies = 0;
  assert_int_equal(ultraepPlanCost(&made.config, &plan, &cost), ultraepSuccess);
  assert_true(cost.copies == 7 && cost.copiesPs == 350);

  ultraepCopies_t before = copies;
  assert_int_equal(ultraepPlanCost(&made.config, NULL, &cost), ultraepInvalidArgument);
  assert_int_equal(ultraepPlanCost(NULL, &plan, &cost), ultraepInvalidArgument);
  assert_int_equal(ultraepPlanCost(&made.config, &plan, NULL), ultraepInvalidArgument);
  assert_int_equal(ultraepPlanRelay(NULL, source), ultraepInvalidArgument);
  assert_int_equal(ultraepPlanRelay(&plan, NULL), ultraepInvalidArgument);
  assert_int_equal(ultraepPlanCopies(NULL, source, &link, &copies), ultraepInvalidArgument);
  assert_int_equal(ultraepPlanCopies(&plan, source, NULL, &copies), ultraepInvalidArgument);
  assert_int_equal(ultraepPlanCopies(&plan, source, &link, NULL), ultraepInvalidArgument);
  ultraepLink_t bad[] = {{ULTRAEP_MAX_COPY_PS + 1, 1, 0}, {10, 11, 0}, {10, 1, ULTRAEP_MAX_COPY_PS + 1}};
  for (size_t i = 0; i < 3; i++)
    assert_int_equal(ultraepPlanCopies(&plan, source, &bad[i], &copies), ultraepInvalidArgument);
  source[3] = 1; /* another expert's master */
  assert_int_equal(ultraepPlanCopies(&plan, source, &link, &copies), ultraepInvalidArgument);
  source[3] = 15;
  assert_int_equal(ultraepPlanCopies(&plan, source, &link, &copies), ultraepInvalidArgument);
  source[3] = -1;
  assert_int_equal(ultraepPlanCopies(&plan, source, &link, &copies), ultraepInvalidArgument);
  source[3] = 11; /* itself */
  assert_int_equal(ultraepPlanCopies(&plan, source, &link, &copies), ultraepInvalidArgument);
  source[3] = 14; /* a ring */
  assert_int_equal(ultraepPlanCopies(&plan, source, &link, &copies), ultraepInvalidArgument);
  assert_memory_equal(&copies, &before, sizeof(copies));
  planner_case_free(&made);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_gate), cmocka_unit_test(test_relay),
                                     cmocka_unit_test(test_simulation), cmocka_unit_test(test_corners)};
  return cmocka_run_group_tests_name("planner_cost", tests, NULL, NULL);
}
