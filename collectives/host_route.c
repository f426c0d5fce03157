/* Routes on the host: loads to every window, a plan on every rank, places of this rank's assignments. */
#include "arena.h"
#include "host.h"

#include <stdlib.h>
#include <string.h>

#define PHASE "route"

/* status of a route's signal */
#define ROUTE_GOOD 0
#define ROUTE_BAD_ENTRY 1

/* args of a route's signal; what must agree comes first */
#define ARG_ROUTE 0
#define ARG_WEIGHTS 1 /* 1 with, 2 without weights, 0: no tokens, so either */

/* ---- create, destroy ---- */

static void route_carve(hostRoute_t *route, const struct ultraepGroup *group, size_t planBytes,
                        arena_t *arena) {
  size_t nEntries = (size_t)group->config.maxTokens * (size_t)group->config.topK;
  size_t nSegments = (size_t)group->nSegments;
  route->places = arena_take(arena, nEntries, sizeof(*route->places));
  route->weights = arena_take(arena, nEntries, sizeof(*route->weights));
  route->planWorkspace = arena_take(arena, planBytes, 1);
  route->expert = arena_take(arena, nSegments, sizeof(*route->expert));
  route->firstRow = arena_take(arena, nSegments, sizeof(*route->firstRow));
  route->rows = arena_take(arena, nSegments, sizeof(*route->rows));
  route->totalRows = arena_take(arena, 1, sizeof(*route->totalRows));
  for (int t = 0; t < 2 * ULTRAEP_MAX_TENSORS; t++) {
    route->pointers[t] = arena_take(arena, nSegments, sizeof(*route->pointers[t]));
    if (arena->base) memset(route->pointers[t], 0, nSegments * sizeof(*route->pointers[t]));
  }
}

/* No rows; masters in their places, slots empty. */
static void route_clear(ultraepRoute_t route) {
  hostRoute_t *host = route->impl;
  const struct ultraepGroup *group = route->group;
  for (int i = 0; i < group->nSegments; i++) {
    host->expert[i] = i < group->nLocalExperts ? group->rank * group->nLocalExperts + i : -1;
    host->firstRow[i] = host->rows[i] = 0;
  }
  *host->totalRows = 0;
  route->planned = false;
  route->nTokens = 0;
}

ultraepResult_t host_route_create(ultraepRoute_t route) {
  ultraepGroup_t group = route->group;
  size_t planBytes = host_rank(group)->planBytes;
  arena_t arena = {0};
  hostRoute_t measured;
  route_carve(&measured, group, planBytes, &arena);
  size_t bytes = arena.used;
  hostRoute_t *host = calloc(1, sizeof(*host));
  arena = (arena_t){.base = host ? arena_alloc(bytes) : NULL};
  if (!arena.base) {
    free(host);
    return error_set(ultraepSystemError, "no memory for a route: %zu bytes", bytes);
  }
  route_carve(host, group, planBytes, &arena);
  host->bytes = bytes;
  group->privateBytes += (int64_t)bytes;
  route->impl = host;
  route->segments = (ultraepSegments_t){.nSegments = group->nSegments,
                                        .expert = host->expert,
                                        .firstRow = host->firstRow,
                                        .rows = host->rows,
                                        .totalRows = host->totalRows};
  for (int t = 0; t < ULTRAEP_MAX_TENSORS; t++) {
    route->segments.weights[t] = host->pointers[t];
    route->segments.grads[t] = host->pointers[ULTRAEP_MAX_TENSORS + t];
  }
  route_clear(route);
  return ultraepSuccess;
}

void host_route_destroy(ultraepRoute_t route) {
  hostRoute_t *host = route->impl;
  route->group->privateBytes -= (int64_t)host->bytes;
  free(host->places); /* the start of the route's one block */
  free(host);
}

/* ---- update ---- */

/* Copies the entries, so that what is counted is what is placed, and counts them into this rank's row of
 * every window. Returns the index of the first bad entry, -1 if none. */
static int64_t route_send_loads(hostRank_t *self, const struct ultraepGroup *group, const int32_t *topkIdx,
                                int64_t n) {
  int nExperts = group->config.nExperts;
  size_t parity = host_signal_next(self) & 1, start = (size_t)self->rank * (size_t)nExperts;
  int32_t *own = self->window->loads[parity] + start;
  if (n > 0) memcpy(self->topk, topkIdx, (size_t)n * sizeof(*topkIdx));
  memset(own, 0, (size_t)nExperts * sizeof(*own));
  for (int64_t i = 0; i < n; i++) {
    int32_t e = self->topk[i];
    if (e == -1) continue;
    if (e < 0 || e >= nExperts) return i;
    own[e]++;
  }
  for (int r = 0; r < self->nRanks; r++)
    if (r != self->rank)
      memcpy(self->shared->windows[r].loads[parity] + start, own, (size_t)nExperts * sizeof(*own));
  return -1;
}

/* Verdicts that every rank reaches alike from the signals. */
static ultraepResult_t route_check_signals(const hostRank_t *self, ultraepRoute_t route, int64_t bad) {
  int with = -1, without = -1;
  for (int r = 0; r < self->nRanks; r++) {
    uint64_t weights = host_signal_from(self, r)->args[ARG_WEIGHTS];
    if (weights == 1 && with < 0) with = r;
    if (weights == 2 && without < 0) without = r;
  }
  if (with >= 0 && without >= 0)
    return error_set(ultraepInvalidUsage, "ultraepRouteUpdate: rank %d passes topkWeights, rank %d does not",
                     with, without);
  for (int r = 0; r < self->nRanks; r++) {
    if (host_signal_from(self, r)->status != ROUTE_BAD_ENTRY) continue;
    route_clear(route);
    if (bad < 0)
      return error_set(ultraepRemoteError, "route %d: rank %d passed an expert that does not exist",
                       route->index, r);
    int topK = route->group->config.topK;
    return error_set(ultraepInvalidArgument, "topkIdx[%lld][%lld] is %d: must be -1 or in 0..%d",
                     (long long)(bad / topK), (long long)(bad % topK), self->topk[bad],
                     route->group->config.nExperts - 1);
  }
  return ultraepSuccess;
}

/* Plans and lays out; every rank does it on the same loads, so all fail alike. */
static ultraepResult_t route_plan(hostRank_t *self, ultraepRoute_t route, const int32_t *loads) {
  ultraepGroup_t group = route->group;
  hostRoute_t *host = route->impl;
  ultraepResult_t result =
      ultraepPlannerRun(&group->planner, loads, host->planWorkspace, self->planBytes, &route->plan);
  if (result != ultraepSuccess)
    return error_set(ultraepInternalError, "the planner refused the loads: %s",
                     ultraepPlannerConfigError(&group->planner));
  layout_segments(&route->plan, group->config.alignment, self->firstRow, self->rankRows);
  for (int r = 0; r < self->nRanks; r++)
    if (self->rankRows[r] > group->maxRecvRows)
      return error_set(ultraepCapacityExceeded,
                       "route %d: rank %d would receive %lld rows with padding, maxRecvRows is %lld",
                       route->index, r, (long long)self->rankRows[r], (long long)group->maxRecvRows);
  return ultraepSuccess;
}

static void route_fill_segments(const hostRank_t *self, ultraepRoute_t route) {
  hostRoute_t *host = route->impl;
  const struct ultraepGroup *group = route->group;
  const ultraepPlan_t *plan = &route->plan;
  int64_t end = 0;
  for (int i = 0; i < group->nSegments; i++) {
    int32_t instance = -1;
    int slot = i - group->nLocalExperts;
    if (slot < 0)
      instance = group->rank * group->nLocalExperts + i;
    else if (slot < plan->nSlots)
      instance = plan->slotInstance[group->rank * plan->nSlots + slot];
    host->expert[i] = instance < 0 ? -1 : plan->instances[instance].expert;
    host->rows[i] = instance < 0 ? 0 : plan->instances[instance].quota;
    host->firstRow[i] = instance < 0 ? end : self->firstRow[instance];
    int64_t alignment = group->config.alignment;
    end = host->firstRow[i] + (host->rows[i] + alignment - 1) / alignment * alignment;
  }
  *host->totalRows = self->rankRows[group->rank];
}

/* Tells every row's rank the row's part in its token. Row numbers of different sources are different, so no
 * two ranks write one entry. */
static void route_send_meta(const hostRank_t *self, ultraepRoute_t route) {
  const hostRoute_t *host = route->impl;
  int topK = route->group->config.topK;
  for (int t = 0; t < route->nTokens; t++) {
    const layoutPlace_t *places = host->places + (int64_t)t * topK;
    const float *weights = host->weights + (int64_t)t * topK;
    for (int k = 0; k < topK; k++) {
      if (places[k].rank < 0) continue;
      hostMeta_t meta = {.next = -1, .isFirst = 1, .weight = host->hasWeights ? weights[k] : 1.0f};
      for (int j = 0; j < k; j++)
        if (places[j].rank == places[k].rank) meta.isFirst = 0;
      for (int j = topK - 1; j > k; j--)
        if (places[j].rank == places[k].rank) meta.next = places[j].row;
      self->shared->windows[places[k].rank].meta[route->index][places[k].row] = meta;
    }
  }
}

ultraepResult_t host_route_update(ultraepRoute_t route, const int32_t *topkIdx, const float *topkWeights,
                                  int nTokens, cudaStream_t stream) {
  (void)stream;
  static const char *const names[] = {"the route"};
  ultraepGroup_t group = route->group;
  hostRank_t *self = host_rank(group);
  hostRoute_t *host = route->impl;
  int64_t n = (int64_t)nTokens * group->config.topK;
  int64_t bad = route_send_loads(self, group, topkIdx, n);
  hostSignal_t signal = {.op = HOST_OP_ROUTE, .status = bad < 0 ? ROUTE_GOOD : ROUTE_BAD_ENTRY};
  signal.args[ARG_ROUTE] = (uint64_t)route->index;
  signal.args[ARG_WEIGHTS] = nTokens == 0 ? 0 : topkWeights ? 1 : 2;
  ultraepResult_t result = host_signal_exchange(self, signal, PHASE, 1, names);
  if (result == ultraepSuccess) result = route_check_signals(self, route, bad);
  if (result != ultraepSuccess) return result;

  route_clear(route);
  const int32_t *loads = self->window->loads[self->seq & 1];
  result = route_plan(self, route, loads);
  if (result != ultraepSuccess) return result;
  layout_source(&route->plan, loads, self->rank, self->firstRow, self->nextRow);
  layout_places(&route->plan, self->rank, self->topk, n, self->nextRow, &self->cursor, host->places);
  host->hasWeights = topkWeights && nTokens > 0;
  if (host->hasWeights) memcpy(host->weights, topkWeights, (size_t)n * sizeof(*topkWeights));
  route->nTokens = nTokens;
  if (host_uses_meta(&group->config)) {
    route_send_meta(self, route);
    result = host_signal_done(self, PHASE);
    if (result != ultraepSuccess) {
      route_clear(route);
      return result;
    }
  }
  route_fill_segments(self, route);
  route->planned = true;
  return ultraepSuccess;
}
