#include "group.h"

#include "error.h"

#include <stdlib.h>
#include <string.h>

ultraepResult_t group_make(ultraepGroup_t *group, const backend_t *backend, const ultraepConfig_t *config,
                           int rank, int nRanks, int nDomainRanks) {
  ultraepGroup_t made = calloc(1, sizeof(*made));
  if (!made) return error_set(ultraepSystemError, "no memory for a group");
  made->routes = calloc((size_t)config->maxRoutes, sizeof(*made->routes));
  if (!made->routes) {
    free(made);
    return error_set(ultraepSystemError, "no memory for %d routes", config->maxRoutes);
  }
  made->magic = GROUP_MAGIC;
  made->backend = backend;
  made->config = *config;
  made->rank = rank;
  made->nRanks = nRanks;
  made->nDomainRanks = nDomainRanks;
  made->planner = config_planner(config, nRanks, nDomainRanks);
  made->nLocalExperts = config->nExperts / nRanks;
  made->nSegments = made->nLocalExperts + config->nSlots;
  made->maxRecvRows = config_recv_rows(config, nRanks);
  *group = made;
  return ultraepSuccess;
}

void group_set_gate(ultraepGroup_t group) {
  const ultraepConfig_t *config = &group->config;
  config_gate(config, &group->measured, group->hasSlots ? &group->shape.experts : NULL, &group->planner);
  if (group->measured.linkBytesPerSecond > 0)
    config_gate_limit(config, group->nRanks, group->maxRecvRows, &group->planner);
}

void group_free(ultraepGroup_t group) {
  for (int i = 0; i < group->nRegions; i++) free(group->regions[i].peers);
  free(group->regions);
  free(group->layers);
  free(group->routes);
  group->magic = 0;
  free(group);
}

static ultraepResult_t group_check_handle(ultraepGroup_t group) {
  if (!group) return error_set(ultraepInvalidArgument, "group is null");
  if (group->magic != GROUP_MAGIC)
    return error_set(ultraepInvalidArgument, "%p is not a group", (void *)group);
  return ultraepSuccess;
}

ultraepResult_t group_enter(ultraepGroup_t group, const char *phase) {
  ultraepResult_t result = group_check_handle(group);
  return result == ultraepSuccess ? group->backend->check(group, phase) : result;
}

ultraepResult_t ultraepGroupCreate(ultraepGroup_t *group, ncclComm_t comm, const ultraepConfig_t *config) {
  if (!group) return error_set(ultraepInvalidArgument, "group is null");
  if (!comm) return error_set(ultraepInvalidArgument, "comm is null");
  if (!config) return error_set(ultraepInvalidArgument, "config is null");
#ifdef ULTRAEP_HAVE_NCCL_BACKEND
  return nccl_group_create(group, comm, config);
#else
  return error_set(ultraepInvalidUsage, "this build of libultraep has no NCCL backend: "
                                        "only groups of a host world (ultraepGroupCreateHost) can be made");
#endif
}

ultraepResult_t ultraepGroupProperties(ultraepGroup_t group, ultraepGroupProperties_t *properties) {
  ultraepResult_t result = group_check_handle(group);
  if (result != ultraepSuccess) return result;
  if (!properties) return error_set(ultraepInvalidArgument, "properties is null");
  *properties = (ultraepGroupProperties_t){
      .rank = group->rank,
      .nRanks = group->nRanks,
      .nDomainRanks = group->nDomainRanks,
      .nLocalInstances = group->nSegments,
      .maxRecvRows = group->maxRecvRows,
      .windowBytes = group->windowBytes,
      .privateBytes = group->privateBytes,
      .slotBytes = group->slotBytes,
  };
  return ultraepSuccess;
}

ultraepResult_t ultraepGroupCounters(ultraepGroup_t group, ultraepCounters_t *counters) {
  ultraepResult_t result = group_check_handle(group);
  if (result != ultraepSuccess) return result;
  if (!counters) return error_set(ultraepInvalidArgument, "counters is null");
  if (group->backend->counters) return group->backend->counters(group, counters);
  *counters = group->counters;
  return ultraepSuccess;
}

ultraepResult_t ultraepGroupPlanner(ultraepGroup_t group, ultraepPlannerConfig_t *planner) {
  ultraepResult_t result = group_check_handle(group);
  if (result != ultraepSuccess) return result;
  if (!planner) return error_set(ultraepInvalidArgument, "planner is null");
  *planner = group->planner;
  return ultraepSuccess;
}

ultraepResult_t ultraepGroupStatus(ultraepGroup_t group, ultraepStatus_t *status) {
  ultraepResult_t result = group_check_handle(group);
  if (result != ultraepSuccess) return result;
  ultraepStatus_t found;
  group->backend->status(group, &found);
  if (status) *status = found;
  if (found.code == ultraepSuccess) return ultraepSuccess;
  result = group->backend->check(group, found.phase);
  return result != ultraepSuccess ? result
                                  : found.code; /* a route's failure, which leaves the group working */
}

ultraepResult_t ultraepGroupAbort(ultraepGroup_t group) {
  ultraepResult_t result = group_check_handle(group);
  if (result != ultraepSuccess) return result;
  group->backend->abort(group);
  return ultraepSuccess;
}

ultraepResult_t ultraepGroupDestroy(ultraepGroup_t group) {
  if (!group) return ultraepSuccess;
  ultraepResult_t result = group_check_handle(group);
  if (result != ultraepSuccess) return result;
  const backend_t *backend = group->backend;
  for (int i = 0; i < group->config.maxRoutes; i++)
    if (group->routes[i]) {
      backend->routeDestroy(group->routes[i]);
      group->routes[i]->magic = 0;
      free(group->routes[i]);
    }
  backend->destroy(group);
  group_free(group);
  return ultraepSuccess;
}
