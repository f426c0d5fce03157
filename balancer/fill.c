/* Alias fill: tops light ranks up, the lightest first, each from one donor if it can.
 *
 * A donor may give more than its excess; it then becomes light itself and is filled later. So every fill
 * finishes one rank, and R-1 fills reach the mean wherever one expert of a donor covers a deficit. Where none
 * does, slots are scarce: the largest expert of any heavy rank goes first, because nothing smaller makes as
 * much of the slot.
 *
 * A replica counts replicaRows on the rank that hosts it. So a rank is light only if a replica leaves room
 * for rows below the target: all others could only lose. No rank that hosts replicas is ever above the
 * target.
 *
 * Every choice has a tie-break by index, so that a parallel form can make the same ones. */
#include "planner_internal.h"

static int64_t fill_largest(const planner_problem_t *problem, int32_t rank) {
  const int64_t *rem = problem->ws->rem + (int64_t)rank * problem->perRank;
  int64_t largest = 0;
  for (int32_t i = 0; i < problem->perRank; i++) largest = planner_max(largest, rem[i]);
  return largest;
}

/* The light rank with the largest deficit, the lowest of equals; removes it from light[]. */
static int32_t fill_take_receiver(const planner_workspace_t *ws, int32_t *nLight) {
  int32_t at = 0;
  for (int32_t i = 1; i < *nLight; i++) {
    int64_t a = ws->rankLoad[ws->light[i]], b = ws->rankLoad[ws->light[at]];
    if (a < b || (a == b && ws->light[i] < ws->light[at])) at = i;
  }
  int32_t rank = ws->light[at];
  ws->light[at] = ws->light[--*nLight];
  return rank;
}

/* Index into heavy[] of the donor: the heaviest rank with an expert that covers `want`; if there is none, the
 * rank with the largest expert, the heavier of equals. The lowest rank of equals. */
static int32_t fill_pick_donor(const planner_workspace_t *ws, int32_t nHeavy, int64_t want) {
  int32_t covering = -1, biggest = 0;
  for (int32_t i = 0; i < nHeavy; i++) {
    int32_t r = ws->heavy[i];
    int64_t load = ws->rankLoad[r], largest = ws->largest[r];
    if (largest >= want) {
      int64_t other = covering < 0 ? -1 : ws->rankLoad[ws->heavy[covering]];
      if (load > other || (load == other && r < ws->heavy[covering])) covering = i;
    } else if (covering < 0 && i > 0) {
      int32_t b = ws->heavy[biggest];
      int64_t l = ws->largest[b];
      if (largest > l || (largest == l && (load > ws->rankLoad[b] || (load == ws->rankLoad[b] && r < b))))
        biggest = i;
    }
  }
  return covering >= 0 ? covering : biggest;
}

/* The donor's expert: the smallest that covers `want`, or the largest. The lowest of equals. */
static int32_t fill_pick_expert(const planner_problem_t *problem, int32_t donor, int64_t want) {
  int32_t first = donor * problem->perRank, best = first;
  const int64_t *rem = problem->ws->rem;
  for (int32_t e = first + 1; e < first + problem->perRank; e++) {
    bool covers = rem[e] >= want, bestCovers = rem[best] >= want;
    if (covers ? (!bestCovers || rem[e] < rem[best]) : (!bestCovers && rem[e] > rem[best])) best = e;
  }
  return best;
}

/* Fills one receiver until another replica would bring it to the target by itself, or its slots are used.
 * Donors that fall as far below the target as to take a replica become light. */
static void fill_receiver(const planner_problem_t *problem, int32_t receiver, int64_t target, int32_t *nHeavy,
                          int32_t *nLight) {
  planner_workspace_t *ws = problem->ws;
  int32_t nSlots = problem->config.nSlots;
  int64_t replicaRows = problem->config.replicaRows, most = target - replicaRows;
  while (*nHeavy > 0 && ws->rankLoad[receiver] < most && ws->slotCount[receiver] < nSlots) {
    int64_t want = most - ws->rankLoad[receiver];
    int32_t at = fill_pick_donor(ws, *nHeavy, want), donor = ws->heavy[at];
    int32_t expert = fill_pick_expert(problem, donor, want);
    int64_t amount = planner_min(want, ws->rem[expert]);
    int64_t slot = (int64_t)receiver * nSlots + ws->slotCount[receiver]++;
    ws->slotExpert[slot] = expert;
    ws->slotQuota[slot] = amount;
    ws->rem[expert] -= amount;
    ws->rankLoad[donor] -= amount;
    ws->rankLoad[receiver] += amount + replicaRows;
    ws->largest[donor] = fill_largest(problem, donor);
    if (ws->rankLoad[donor] <= target) {
      ws->heavy[at] = ws->heavy[--*nHeavy];
      if (ws->rankLoad[donor] < most) ws->light[(*nLight)++] = donor;
    }
  }
}

planner_outcome_t planner_fill_domain(const planner_problem_t *problem, int32_t firstRank, int64_t target) {
  planner_workspace_t *ws = problem->ws;
  int32_t end = firstRank + problem->config.nDomainRanks, nHeavy = 0, nLight = 0;
  for (int32_t r = firstRank; r < end; r++) {
    int64_t load = ws->rankLoadBefore[r];
    ws->rankLoad[r] = load;
    ws->slotCount[r] = 0;
    if (load > target) {
      ws->heavy[nHeavy++] = r;
    } else if (load < target - problem->config.replicaRows) {
      ws->light[nLight++] = r;
    }
  }
  if (nHeavy > 0 && problem->config.nSlots > 0) {
    for (int32_t e = firstRank * problem->perRank; e < end * problem->perRank; e++)
      ws->rem[e] = ws->expertLoad[e];
    for (int32_t i = 0; i < nHeavy; i++) ws->largest[ws->heavy[i]] = fill_largest(problem, ws->heavy[i]);
    while (nHeavy > 0 && nLight > 0) {
      int32_t receiver = fill_take_receiver(ws, &nLight);
      fill_receiver(problem, receiver, target, &nHeavy, &nLight);
    }
  }
  planner_outcome_t outcome = {.target = target};
  for (int32_t r = firstRank; r < end; r++) {
    outcome.most = planner_max(outcome.most, ws->rankLoad[r]);
    outcome.nReplicas += ws->slotCount[r];
  }
  return outcome;
}
