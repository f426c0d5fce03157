/* Routes: handles, argument checks, views. */
#include "error.h"
#include "group.h"

#include <stdlib.h>

#define PHASE "route"

static ultraepResult_t route_check_handle(ultraepRoute_t route) {
  if (!route) return error_set(ultraepInvalidArgument, "route is null");
  if (route->magic != ROUTE_MAGIC)
    return error_set(ultraepInvalidArgument, "%p is not a route", (void *)route);
  return ultraepSuccess;
}

ultraepResult_t route_enter(ultraepRoute_t route, const char *phase) {
  ultraepResult_t result = route_check_handle(route);
  return result == ultraepSuccess ? group_enter(route->group, phase) : result;
}

ultraepResult_t ultraepRouteCreate(ultraepGroup_t group, ultraepRoute_t *route) {
  ultraepResult_t result = group_enter(group, PHASE);
  if (result != ultraepSuccess) return result;
  if (!route) return error_set(ultraepInvalidArgument, "route is null");
  int index = 0; /* the lowest free one: ranks that make and destroy routes in the same order agree on it */
  while (index < group->config.maxRoutes && group->routes[index]) index++;
  if (index == group->config.maxRoutes)
    return error_set(ultraepInvalidUsage, "config.maxRoutes = %d routes are alive already", index);
  ultraepRoute_t made = calloc(1, sizeof(*made));
  if (!made) return error_set(ultraepSystemError, "no memory for a route");
  *made = (struct ultraepRoute){.magic = ROUTE_MAGIC, .index = index, .group = group};
  result = group->backend->routeCreate(made);
  if (result != ultraepSuccess) {
    free(made);
    return result;
  }
  group->routes[index] = made;
  *route = made;
  return ultraepSuccess;
}

ultraepResult_t ultraepRouteDestroy(ultraepRoute_t route) {
  ultraepResult_t result = route_check_handle(route);
  if (result != ultraepSuccess) return result;
  route->group->backend->routeDestroy(route);
  route->group->routes[route->index] = NULL;
  route->magic = 0;
  free(route);
  return ultraepSuccess;
}

ultraepResult_t route_check_tokens(ultraepRoute_t route, const int32_t *topkIdx, int nTokens) {
  const ultraepConfig_t *config = &route->group->config;
  if (nTokens < 0 || nTokens > config->maxTokens)
    return error_set(ultraepInvalidArgument, "nTokens is %d: must be in 0..%d (config.maxTokens)", nTokens,
                     config->maxTokens);
  if (!topkIdx && nTokens > 0) return error_set(ultraepInvalidArgument, "topkIdx is null");
  return ultraepSuccess;
}

ultraepResult_t ultraepRouteUpdate(ultraepRoute_t route, const int32_t *topkIdx, const float *topkWeights,
                                   int nTokens, cudaStream_t stream) {
  ultraepResult_t result = route_enter(route, PHASE);
  if (result != ultraepSuccess) return result;
  result = route_check_tokens(route, topkIdx, nTokens);
  if (result != ultraepSuccess) return result;
  return route->group->backend->routeUpdate(route, topkIdx, topkWeights, nTokens, stream);
}

ultraepResult_t ultraepRouteSegments(ultraepRoute_t route, ultraepSegments_t *segments) {
  ultraepResult_t result = route_enter(route, PHASE);
  if (result != ultraepSuccess) return result;
  if (!segments) return error_set(ultraepInvalidArgument, "segments is null");
  *segments = route->segments;
  return ultraepSuccess;
}

ultraepResult_t ultraepRoutePlan(ultraepRoute_t route, ultraepPlan_t *plan) {
  ultraepResult_t result = route_enter(route, PHASE);
  if (result != ultraepSuccess) return result;
  if (!plan) return error_set(ultraepInvalidArgument, "plan is null");
  if (!route->planned)
    return error_set(ultraepInvalidUsage,
                     "route %d holds no plan: it was never updated, or its update failed", route->index);
  if (route->group->backend->routePlan) return route->group->backend->routePlan(route, plan);
  *plan = route->plan;
  return ultraepSuccess;
}
