/* What no plan can beat. At a target T, in one domain, ranks above T must give their excess. A light rank
 * takes no more than T allows, nor more than the S largest experts hold; and all light ranks together no more
 * than the (light ranks * S) largest experts hold, since every slot has one expert and pieces of one expert
 * share its load. Both limits grow with T and the excess shrinks, so the smallest T that passes is found by
 * bisection.
 *
 * That is of assignments alone. Where replicas cost their ranks time, loads with replicas' worth have a bound
 * of their own, planner_least_target. */
#include "planner_internal.h"

static void bound_sift_down(int64_t *heap, int32_t at, int32_t n) {
  int64_t value = heap[at];
  for (int32_t child; (child = 2 * at + 1) < n; at = child) {
    if (child + 1 < n && heap[child + 1] < heap[child]) child++;
    if (heap[child] >= value) break;
    heap[at] = heap[child];
  }
  heap[at] = value;
}

/* Heapsort, descending: no recursion, no allocation, the same steps everywhere. */
static void bound_sort_descending(int64_t *values, int32_t n) {
  for (int32_t i = n / 2 - 1; i >= 0; i--) bound_sift_down(values, i, n);
  for (int32_t i = n - 1; i > 0; i--) {
    int64_t smallest = values[0];
    values[0] = values[i];
    values[i] = smallest;
    bound_sift_down(values, 0, i);
  }
}

/* prefix[i]: the i+1 largest experts of the domain together. */
static bool bound_feasible(const planner_problem_t *problem, int32_t firstRank, const int64_t *prefix,
                           int64_t target) {
  const int64_t *load = problem->ws->rankLoadBefore + firstRank;
  int32_t d = problem->config.nDomainRanks, nSlots = problem->config.nSlots, nExperts = d * problem->perRank;
  int64_t perLight = nSlots == 0 ? 0 : prefix[planner_min(nSlots, nExperts) - 1];
  int64_t give = 0, take = 0, nLight = 0;
  for (int32_t r = 0; r < d; r++) {
    if (load[r] >= target) {
      give += load[r] - target;
    } else {
      take += planner_min(target - load[r], perLight);
      nLight++;
    }
  }
  int64_t pieces = planner_min(nLight * nSlots, nExperts);
  return give <= take && give <= (pieces == 0 ? 0 : prefix[pieces - 1]);
}

static int64_t bound_domain(const planner_problem_t *problem, int32_t firstRank) {
  planner_workspace_t *ws = problem->ws;
  int32_t d = problem->config.nDomainRanks, nExperts = d * problem->perRank;
  int64_t sum = 0, low = 0, high = 0;
  for (int32_t r = firstRank; r < firstRank + d; r++) {
    sum += ws->rankLoadBefore[r];
    high = planner_max(high, ws->rankLoadBefore[r]);
  }
  low = planner_ceil_div(sum, d);
  for (int32_t i = 0; i < nExperts; i++)
    ws->scratch[i] = ws->expertLoad[(int64_t)firstRank * problem->perRank + i];
  bound_sort_descending(ws->scratch, nExperts);
  for (int32_t i = 1; i < nExperts; i++) ws->scratch[i] += ws->scratch[i - 1];
  while (low < high) {
    int64_t middle = low + (high - low) / 2;
    if (bound_feasible(problem, firstRank, ws->scratch, middle)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

int64_t planner_bound(const planner_problem_t *problem) {
  int64_t bound = 0;
  for (int32_t r = 0; r < problem->config.nRanks; r += problem->config.nDomainRanks)
    bound = planner_max(bound, bound_domain(problem, r));
  return bound;
}

int64_t planner_mean_bound(const planner_problem_t *problem) {
  int32_t d = problem->config.nDomainRanks;
  int64_t bound = 0;
  for (int32_t first = 0; first < problem->config.nRanks; first += d) {
    int64_t sum = 0;
    for (int32_t r = first; r < first + d; r++) sum += problem->ws->rankLoadBefore[r];
    bound = planner_max(bound, planner_ceil_div(sum, d));
  }
  return bound;
}

/* A rank that hosts nothing gains no rows; one that hosts pays for one replica at least. So a rank takes no
 * more than the target allows less replicaRows, and the heavy ranks' excess must fit. */
static bool bound_has_room(const planner_problem_t *problem, int32_t firstRank, int64_t target) {
  const int64_t *load = problem->ws->rankLoadBefore + firstRank;
  int64_t room = 0;
  for (int32_t r = 0; r < problem->config.nDomainRanks; r++) {
    int64_t below = target - load[r];
    room += below > 0 ? planner_max(below - problem->config.replicaRows, 0) : below;
  }
  return room >= 0;
}

int64_t planner_least_target(const planner_problem_t *problem) {
  int32_t d = problem->config.nDomainRanks;
  int64_t least = planner_mean_bound(problem);
  if (problem->config.replicaRows == 0) return least;
  for (int32_t first = 0; first < problem->config.nRanks; first += d) {
    int64_t high = 0;
    for (int32_t r = first; r < first + d; r++) high = planner_max(high, problem->ws->rankLoadBefore[r]);
    while (least < high) {
      int64_t middle = least + (high - least) / 2;
      if (bound_has_room(problem, first, middle)) {
        high = middle;
      } else {
        least = middle + 1;
      }
    }
  }
  return least;
}
