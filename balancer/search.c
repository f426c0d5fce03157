/* Which target to fill for. A fill either reaches its target or is left with a heavier rank because slots ran
 * out; a slightly higher target can then end lower, since early fills take less. So targets are tried upward
 * in fixed steps until one is reached, then between the last two. With the cost gate, several targets compete
 * on cost.
 *
 * All loads here count replicaRows for every replica. The first target is the least that could be reached
 * then; the last, the unbalanced maximum, makes no replica, so no plan's maximum is above it. */
#include "planner_internal.h"

#include <string.h>

/* Steps above the target, in millionths of it. After the last comes the unbalanced maximum, which is always
 * reached. */
static const int64_t searchStepsPpm[] = {
    0,     250,   500,   1000,  1500,   2000,   3000,   4000,   6000,   8000,   12000,   16000,   24000,
    32000, 48000, 64000, 96000, 128000, 192000, 256000, 384000, 512000, 768000, 1000000, 2000000, 4000000};
enum {
  SEARCH_STEPS = sizeof(searchStepsPpm) / sizeof(searchStepsPpm[0]),
  SEARCH_BETWEEN = 8,
  SEARCH_GATE_STEPS = 16
};

/* Keeps the better of two fills of a domain: lower maximum, then fewer replicas, then the earlier. */
static void search_keep(planner_outcome_t *best, planner_outcome_t run) {
  if (run.most < best->most || (run.most == best->most && run.nReplicas < best->nReplicas)) *best = run;
}

/* Tries targets above low, up to high, in SEARCH_BETWEEN steps, until one is reached. */
static void search_between(const planner_problem_t *problem, int32_t firstRank, int64_t low, int64_t high,
                           planner_outcome_t *best, planner_outcome_t *last) {
  for (int32_t j = 1; j < SEARCH_BETWEEN; j++) {
    int64_t target = low + (high - low) * j / SEARCH_BETWEEN;
    if (target == low) continue;
    *last = planner_fill_domain(problem, firstRank, target);
    search_keep(best, *last);
    if (last->most <= target) return;
  }
}

/* The best fill of one domain for a target, left in the workspace. */
static planner_outcome_t search_domain(const planner_problem_t *problem, int32_t firstRank, int64_t target) {
  const int64_t *before = problem->ws->rankLoadBefore;
  planner_outcome_t last = planner_fill_domain(problem, firstRank, target), best = last;
  if (last.most > target && problem->config.nSlots > 0 && problem->config.nDomainRanks > 1) {
    int64_t high = 0, missed = target;
    for (int32_t r = firstRank; r < firstRank + problem->config.nDomainRanks; r++)
      high = planner_max(high, before[r]);
    for (int32_t k = 1; k <= SEARCH_STEPS && last.most > last.target; k++) {
      int64_t next = k == SEARCH_STEPS
                         ? high
                         : planner_min(high, target + target / 1000000 * searchStepsPpm[k] +
                                                 target % 1000000 * searchStepsPpm[k] / 1000000);
      if (next == last.target) continue;
      missed = last.target;
      last = planner_fill_domain(problem, firstRank, next);
      search_keep(&best, last);
    }
    search_between(problem, firstRank, missed, last.target, &best, &last);
    if (last.target != best.target) planner_fill_domain(problem, firstRank, best.target);
  }
  return best;
}

static planner_outcome_t search_target(const planner_problem_t *problem, int64_t target) {
  planner_outcome_t all = {.target = target};
  for (int32_t r = 0; r < problem->config.nRanks; r += problem->config.nDomainRanks) {
    planner_outcome_t domain = search_domain(problem, r, target);
    all.most = planner_max(all.most, domain.most);
    all.nReplicas += domain.nReplicas;
  }
  return all;
}

/* Expert copies over the busiest link: the most a rank receives or, as a master, sends. Where replicas relay,
 * a rank sends each of its experts once. */
static int64_t search_busiest_link(const planner_problem_t *problem) {
  const planner_workspace_t *ws = problem->ws;
  int32_t nRanks = problem->config.nRanks, nSlots = problem->config.nSlots, *sends = ws->light;
  int64_t busiest = 0, *sent = ws->scratch;
  memset(sends, 0, sizeof(*sends) * (size_t)nRanks);
  memset(sent, 0, sizeof(*sent) * (size_t)problem->config.nExperts);
  for (int32_t r = 0; r < nRanks; r++) {
    busiest = planner_max(busiest, ws->slotCount[r]);
    for (int32_t s = 0; s < ws->slotCount[r]; s++) {
      int32_t expert = ws->slotExpert[(int64_t)r * nSlots + s];
      if (problem->config.relayCopies && sent[expert]) continue;
      sent[expert] = 1;
      busiest = planner_max(busiest, ++sends[expert / problem->perRank]);
    }
  }
  return busiest;
}

/* In picoseconds; unsigned, since rows alone can cost just under 2^63. Replicas' worth in rows counts as
 * rows: their rank is busy that long. */
static uint64_t search_cost(const planner_problem_t *problem, planner_outcome_t run) {
  uint64_t cost = (uint64_t)run.most * problem->config.rowPs;
  if (run.nReplicas > 0) cost += (uint64_t)search_busiest_link(problem) * problem->config.copyPs;
  return cost;
}

/* Target for the tolerance: at least what whole assignments allow, at most mean * (1 + tolerance). */
static int64_t search_tolerated(const planner_problem_t *problem) {
  int64_t ppm = problem->config.tolerancePpm, n = problem->config.nRanks;
  int64_t mean = problem->total / n, rest = problem->total % n;
  /* total * (1e6 + ppm) / (n * 1e6) without leaving 64 bits: total <= 2^41, ppm <= 1e9, rest < 1024 */
  int64_t part = mean % 1000000 * ppm + (rest * (1000000 + ppm)) / n;
  return planner_max(planner_ceil_div(problem->total, n), mean + mean / 1000000 * ppm + part / 1000000);
}

planner_outcome_t planner_search(const planner_problem_t *problem) {
  int64_t before = 0, lowest = planner_max(search_tolerated(problem), planner_least_target(problem));
  for (int32_t r = 0; r < problem->config.nRanks; r++)
    before = planner_max(before, problem->ws->rankLoadBefore[r]);
  if (problem->config.copyPs == 0) return search_target(problem, lowest);

  int64_t bestTarget = planner_max(before, lowest);
  uint64_t bestCost = (uint64_t)before * problem->config.rowPs;
  if ((uint64_t)lowest * problem->config.rowPs + problem->config.copyPs < bestCost) {
    for (int32_t k = 0; k < SEARCH_GATE_STEPS; k++) {
      int64_t target = lowest + (before - lowest) * k / SEARCH_GATE_STEPS;
      uint64_t cost = search_cost(problem, search_target(problem, target));
      if (cost < bestCost) {
        bestCost = cost;
        bestTarget = target;
      }
    }
  }
  return search_target(problem, bestTarget);
}
