/* Dispatch and combine: argument checks, and resolving buffers to places in symmetric memory. */
#include "config.h"
#include "error.h"
#include "group.h"

static ultraepResult_t alltoall_find(ultraepGroup_t group, const char *name, const void *buffer,
                                     size_t rowBytes, groupPlace_t *place) {
  *place = (groupPlace_t){.region = -1};
  if (!buffer) return ultraepSuccess;
  uint64_t bytes = (uint64_t)group->maxRecvRows * rowBytes;
  if (group_find_place(group, buffer, bytes, place)) return ultraepSuccess;
  if (group_find_place(group, buffer, 1, place))
    return error_set(
        ultraepInvalidArgument,
        "%s = %p leaves no room for %lld rows of %zu bytes (maxRecvRows) in its symmetric region", name,
        buffer, (long long)group->maxRecvRows, rowBytes);
  return error_set(ultraepInvalidArgument,
                   "%s = %p is not in symmetric memory (ultraepMemAlloc or ultraepMemRegister)", name,
                   buffer);
}

static ultraepResult_t alltoall_resolve(const ultraepTensors_t *tensors, ultraepDirection_t direction,
                                        ultraepRoute_t route, backendExchange_t *exchange) {
  ultraepGroup_t group = route->group;
  bool dispatch = direction == ULTRAEP_DISPATCH;
  *exchange = (backendExchange_t){
      .route = route,
      .weighted = direction == ULTRAEP_COMBINE,
      .direction = (int32_t)direction,
      .dataType = tensors->dataType == ULTRAEP_DATATYPE_DEFAULT ? group->config.dataType : tensors->dataType,
      .sendbuff = tensors->sendbuff,
      .sendScales = tensors->sendScales,
      .recvbuff = tensors->recvbuff,
  };
  exchange->rowBytes = (size_t)group->config.hidden * config_type_bytes(exchange->dataType);
  ultraepResult_t result =
      alltoall_find(group, dispatch ? "recvbuff" : "sendbuff",
                    dispatch ? tensors->recvbuff : tensors->sendbuff, exchange->rowBytes, &exchange->rows);
  if (result == ultraepSuccess)
    result = alltoall_find(group, "recvScales", tensors->recvScales, (size_t)group->config.scaleBytes,
                           &exchange->scales);
  if (result == ultraepSuccess)
    result = alltoall_find(group, "recvWeights", tensors->recvWeights, sizeof(float), &exchange->weights);
  return result;
}

static ultraepResult_t alltoall_run(const ultraepTensors_t *tensors, ultraepDirection_t direction,
                                    ultraepRoute_t route, cudaStream_t stream) {
  ultraepGroup_t group = route->group;
  ultraepResult_t result =
      config_check_tensors(&group->config, tensors, direction, route->nTokens, group->maxRecvRows);
  if (result != ultraepSuccess) return result;
  if (!route->planned)
    return error_set(ultraepInvalidUsage,
                     "route %d holds no plan: it was never updated, or its update failed", route->index);
  backendExchange_t exchange;
  result = alltoall_resolve(tensors, direction, route, &exchange);
  if (result != ultraepSuccess) return result;
  return direction == ULTRAEP_DISPATCH ? group->backend->dispatch(&exchange, stream)
                                       : group->backend->combine(&exchange, stream);
}

static const char *alltoall_phase(ultraepDirection_t direction) {
  return direction == ULTRAEP_DISPATCH ? "dispatch" : "combine";
}

ultraepResult_t ultraepAllToAll(const void *sendbuff, void *recvbuff, ultraepDirection_t direction,
                                ultraepRoute_t route, cudaStream_t stream) {
  ultraepResult_t result = route_enter(route, alltoall_phase(direction));
  if (result != ultraepSuccess) return result;
  if (route->group->config.scaleBytes != 0)
    return error_set(ultraepInvalidUsage, "the group's rows have scales: call ultraepAllToAllTensors");
  ultraepTensors_t tensors = ULTRAEP_TENSORS_INITIALIZER;
  tensors.sendbuff = sendbuff;
  tensors.recvbuff = recvbuff;
  return alltoall_run(&tensors, direction, route, stream);
}

ultraepResult_t ultraepAllToAllTensors(const ultraepTensors_t *tensors, ultraepDirection_t direction,
                                       ultraepRoute_t route, cudaStream_t stream) {
  ultraepResult_t result = route_enter(route, alltoall_phase(direction));
  return result == ultraepSuccess ? alltoall_run(tensors, direction, route, stream) : result;
}

ultraepResult_t ultraepRouteDispatch(ultraepRoute_t route, const int32_t *topkIdx, const float *topkWeights,
                                     int nTokens, const ultraepTensors_t *tensors, cudaStream_t stream) {
  ultraepResult_t result = route_enter(route, "route");
  if (result == ultraepSuccess) result = route_check_tokens(route, topkIdx, nTokens);
  if (result != ultraepSuccess) return result;
  ultraepGroup_t group = route->group;
  result = config_check_tensors(&group->config, tensors, ULTRAEP_DISPATCH, nTokens, group->maxRecvRows);
  backendExchange_t exchange;
  if (result == ultraepSuccess) result = alltoall_resolve(tensors, ULTRAEP_DISPATCH, route, &exchange);
  if (result != ultraepSuccess) return result;
  if (group->backend->routeDispatch)
    return group->backend->routeDispatch(topkIdx, topkWeights, nTokens, &exchange, stream);
  result = group->backend->routeUpdate(route, topkIdx, topkWeights, nTokens, stream);
  return result == ultraepSuccess ? group->backend->dispatch(&exchange, stream) : result;
}
