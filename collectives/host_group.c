/* The host backend's groups: their memory, symmetric regions, and the table of operations. */
#include "arena.h"
#include "config.h"
#include "host.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SHORT_OF_MEMORY 1 /* status of a signal: this rank could not do its part */

/* ---- memory of a group ---- */

static void group_carve_window(hostWindow_t *window, const struct ultraepGroup *group, arena_t *arena) {
  const ultraepConfig_t *config = &group->config;
  size_t nLoads = (size_t)group->nRanks * (size_t)config->nExperts;
  size_t nRows = (size_t)group->maxRecvRows;
  for (int parity = 0; parity < 2; parity++)
    window->loads[parity] = arena_take(arena, nLoads, sizeof(*window->loads[0]));
  window->meta = arena_take(arena, (size_t)config->maxRoutes, sizeof(*window->meta));
  for (int i = 0; i < config->maxRoutes; i++) {
    hostMeta_t *meta = host_uses_meta(config) ? arena_take(arena, nRows, sizeof(*meta)) : NULL;
    if (arena->base) window->meta[i] = meta;
  }
  size_t typeBytes = config->dataType == ULTRAEP_FLOAT32 ? 4 : 2;
  window->partials = config->combineMode == ULTRAEP_COMBINE_PARTIAL
                         ? arena_take(arena, nRows * (size_t)config->hidden, typeBytes)
                         : NULL;
}

static void group_carve_scratch(hostRank_t *self, const struct ultraepGroup *group, arena_t *arena) {
  const ultraepConfig_t *config = &group->config;
  size_t nExperts = (size_t)config->nExperts, nRanks = (size_t)group->nRanks;
  size_t nInstances = nExperts + nRanks * (size_t)config->nSlots;
  size_t nRows = nRanks > (size_t)config->topK ? nRanks : (size_t)config->topK;
  self->topk = arena_take(arena, (size_t)config->maxTokens * (size_t)config->topK, sizeof(*self->topk));
  self->firstRow = arena_take(arena, nInstances, sizeof(*self->firstRow));
  self->nextRow = arena_take(arena, nInstances, sizeof(*self->nextRow));
  self->rankRows = arena_take(arena, nRanks, sizeof(*self->rankRows));
  self->cursor.piece = arena_take(arena, nExperts, sizeof(*self->cursor.piece));
  self->cursor.left = arena_take(arena, nExperts, sizeof(*self->cursor.left));
  self->rows = arena_take(arena, nRows, sizeof(*self->rows));
  self->weights = arena_take(arena, nRows, sizeof(*self->weights));
  self->peerSlots = arena_take(arena, nRanks, sizeof(*self->peerSlots));
}

static ultraepResult_t group_allocate(hostRank_t *self, ultraepGroup_t group) {
  arena_t window = {0}, scratch = {0};
  group_carve_window(self->window, group, &window);
  group_carve_scratch(self, group, &scratch);
  self->window->block = window.base = arena_alloc(window.used);
  self->block = scratch.base = arena_alloc(scratch.used);
  if (!window.base || !scratch.base)
    return error_set(ultraepSystemError, "no memory for a group: %zu bytes of window, %zu of scratch",
                     window.used, scratch.used);
  group->windowBytes = (int64_t)(window.used + 2 * (size_t)group->nRanks * sizeof(hostSignal_t));
  group->privateBytes = (int64_t)scratch.used;
  window.used = scratch.used = 0;
  group_carve_window(self->window, group, &window);
  group_carve_scratch(self, group, &scratch);
  return ultraepPlannerWorkspaceSize(&group->planner, &self->planBytes);
}

/* ---- create ---- */

static ultraepResult_t group_agree(hostRank_t *self) {
  ultraepResult_t result =
      host_signal_exchange(self, (hostSignal_t){.op = HOST_OP_CREATE}, "create", 0, NULL);
  if (result != ultraepSuccess) return result;
  const hostWindow_t *windows = self->shared->windows;
  for (int r = 1; r < self->nRanks; r++) {
    const char *field = config_difference(&windows[0].config, &windows[r].config);
    if (field) return error_set(ultraepInvalidArgument, "config.%s differs between ranks 0 and %d", field, r);
  }
  return ultraepSuccess;
}

static const backend_t hostBackend;

static ultraepResult_t group_join(ultraepHostWorld_t world, int rank, ultraepGroup_t group) {
  hostRank_t *self = calloc(1, sizeof(*self));
  if (!self) return error_set(ultraepSystemError, "no memory for a group");
  *self = (hostRank_t){
      .world = world, .rank = rank, .nRanks = group->nRanks, .timeoutMs = group->config.timeoutMs};
  ultraepResult_t result = host_world_join(world, rank, &self->shared);
  if (result != ultraepSuccess) goto free_self;
  self->window = &self->shared->windows[rank];
  self->window->config = group->config;
  group->impl = self;
  result = group_allocate(self, group);
  if (result != ultraepSuccess) {
    char text[ERROR_TEXT_BYTES];
    snprintf(text, sizeof(text), "%s", error_text());
    (void)host_rank_fail(self, "create", ultraepRemoteError, rank, "create: a rank is short of memory");
    (void)error_set(result, "%s", text);
    goto leave_world;
  }
  result = group_agree(self);
  if (result != ultraepSuccess) goto leave_world;
  return ultraepSuccess;

leave_world:
  free(self->block);
  host_rank_close(self, HOST_PEER_LEFT);
  host_world_leave(world, self->shared);
free_self:
  free(self);
  return result;
}

ultraepResult_t ultraepGroupCreateHost(ultraepGroup_t *group, ultraepHostWorld_t world, int rank,
                                       const ultraepConfig_t *config) {
  if (!group) return error_set(ultraepInvalidArgument, "group is null");
  int nRanks;
  ultraepResult_t result = host_world_check(world, rank, &nRanks);
  if (result == ultraepSuccess) result = config_check(config, nRanks);
  if (result != ultraepSuccess) return result;
  ultraepGroup_t made;
  result = group_make(&made, &hostBackend, config, rank, nRanks,
                      config->domainRanks ? config->domainRanks : nRanks);
  if (result != ultraepSuccess) return result;
  result = group_join(world, rank, made);
  if (result != ultraepSuccess) {
    group_free(made);
    return result;
  }
  *group = made;
  return ultraepSuccess;
}

static void host_group_destroy(ultraepGroup_t group) {
  hostRank_t *self = host_rank(group);
  host_rank_close(self, HOST_PEER_LEFT);
  for (int i = 0; i < group->nRegions; i++)
    if (group->regions[i].owned) free(group->regions[i].base);
  host_experts_free(self);
  host_world_leave(self->world, self->shared);
  free(self->block);
  free(self);
}

/* ---- symmetric memory ---- */

/* The ranks that could not do their part: this one has recorded its own message, the others name the first.
 */
static ultraepResult_t group_check_parts(const hostRank_t *self, const char *what, ultraepResult_t own) {
  for (int r = 0; r < self->nRanks && own == ultraepSuccess; r++)
    if (host_signal_from(self, r)->status != 0)
      own = error_set(ultraepRemoteError, "%s: rank %d is short of memory", what, r);
  return own;
}

static ultraepResult_t host_mem_create(ultraepGroup_t group, int number, void *ptr, size_t bytes) {
  static const char *const names[] = {"the number of the region", "the bytes"};
  hostRank_t *self = host_rank(group);
  groupRegion_t *region = &group->regions[number];
  unsigned char *base = ptr ? ptr : arena_alloc(bytes);
  ultraepResult_t own = ultraepSuccess;
  if (!base) own = error_set(ultraepSystemError, "no memory: %zu bytes asked for", bytes);
  hostSignal_t signal = {.op = ptr ? HOST_OP_REGISTER : HOST_OP_ALLOC,
                         .status = base ? 0 : SHORT_OF_MEMORY,
                         .args = {(uint64_t)number, bytes, (uintptr_t)base}};
  ultraepResult_t result = host_signal_exchange(self, signal, "memory", 2, names);
  if (result == ultraepSuccess) result = group_check_parts(self, "ultraepMemAlloc", own);
  if (result != ultraepSuccess) {
    if (!ptr) free(base);
    return result;
  }
  *region = (groupRegion_t){.base = base, .bytes = bytes, .owned = !ptr, .peers = region->peers};
  for (int r = 0; r < self->nRanks; r++) {
    uintptr_t peer = (uintptr_t)host_signal_from(self, r)->args[2];
    region->peers[r] = (unsigned char *)peer;
  }
  return ultraepSuccess;
}

static ultraepResult_t host_mem_destroy(ultraepGroup_t group, int number) {
  static const char *const names[] = {"the number of the region"};
  hostSignal_t signal = {.op = HOST_OP_FREE, .args = {(uint64_t)number}};
  ultraepResult_t result = host_signal_exchange(host_rank(group), signal, "memory", 1, names);
  if (result != ultraepSuccess) return result;
  groupRegion_t *region = &group->regions[number];
  if (region->owned) free(region->base);
  *region = (groupRegion_t){.peers = region->peers};
  return ultraepSuccess;
}

static const backend_t hostBackend = {
    .name = "host",
    .check = host_rank_check,
    .status = host_rank_status,
    .abort = host_rank_abort,
    .destroy = host_group_destroy,
    .memCreate = host_mem_create,
    .memDestroy = host_mem_destroy,
    .routeCreate = host_route_create,
    .routeDestroy = host_route_destroy,
    .routeUpdate = host_route_update,
    .dispatch = host_dispatch,
    .combine = host_combine,
    .expertsRegister = host_experts_register,
    .gateChanged = host_gate_changed,
    .weightsSync = host_weights_sync,
    .gradsReduce = host_grads_reduce,
};
