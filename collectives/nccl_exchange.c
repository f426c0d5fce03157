/* Routes, dispatch and combine on GPUs: device memory of routes, and parameters for the kernels. */
#include "nccl_backend.h"

#include "arena.h"
#include "config.h"

#include <stdlib.h>
#include <string.h>

/* ---- routes ---- */

static void route_carve(ncclRoute_t *route, const struct ultraepGroup *group, arena_t *arena) {
  size_t nEntries = (size_t)group->config.maxTokens * (size_t)group->config.topK,
         nSegments = (size_t)group->nSegments;
  kernelRoute_t *kernel = &route->kernel;
  kernel->places = arena_take(arena, nEntries, sizeof(*kernel->places));
  kernel->weights = arena_take(arena, nEntries, sizeof(*kernel->weights));
  kernel->loads =
      arena_take(arena, (size_t)group->nRanks * (size_t)group->config.nExperts, sizeof(*kernel->loads));
  kernel->expert = arena_take(arena, nSegments, sizeof(*kernel->expert));
  kernel->firstRow = arena_take(arena, nSegments, sizeof(*kernel->firstRow));
  kernel->rows = arena_take(arena, nSegments, sizeof(*kernel->rows));
  kernel->totalRows = arena_take(arena, 1, sizeof(*kernel->totalRows));
  kernel->slotExpert =
      arena_take(arena, (size_t)group->nRanks * (size_t)group->config.nSlots, sizeof(*kernel->slotExpert));
  kernel->pointers = arena_take(arena, 2 * KERNEL_MAX_TENSORS * nSegments, sizeof(*kernel->pointers));
  kernel->status = arena_take(arena, KERNEL_LANES, sizeof(*kernel->status));
}

/* A route that was never updated refuses by its status. */
static cudaError_t route_clear(ncclRank_t *self, const ncclRoute_t *route) {
  kernelRouteStatus_t none[KERNEL_LANES];
  for (int lane = 0; lane < KERNEL_LANES; lane++)
    none[lane] = (kernelRouteStatus_t){.code = ultraepInvalidUsage, .rank = -1};
  memset(route->status, 0, sizeof(none));
  cudaError_t error =
      cudaMemcpyAsync(route->kernel.status, none, sizeof(none), cudaMemcpyHostToDevice, self->stream);
  return error == cudaSuccess ? cudaStreamSynchronize(self->stream) : error;
}

ultraepResult_t nccl_route_create(ultraepRoute_t route) {
  ultraepGroup_t group = route->group;
  ncclRank_t *self = nccl_rank(group);
  arena_t arena = {0};
  ncclRoute_t *made = calloc(1, sizeof(*made));
  if (!made) return error_set(ultraepSystemError, "no memory for a route");
  route_carve(made, group, &arena);
  size_t bytes = arena.used;
  made->status = &self->statuses[route->index * KERNEL_LANES];
  made->deviceBlock = nccl_device_alloc(self, bytes, "a route's memory");
  if (!made->deviceBlock) {
    free(made);
    return ultraepUnhandledCudaError;
  }
  arena = (arena_t){.base = made->deviceBlock};
  route_carve(made, group, &arena);
  made->kernel.hostStatus = &self->deviceStatuses[route->index * KERNEL_LANES];
  cudaError_t error = route_clear(self, made);
  if (error != cudaSuccess) {
    nccl_device_free(self, made->deviceBlock);
    free(made);
    return nccl_cuda_error(error, "a route's memory");
  }
  size_t metaBytes = ((size_t)group->maxRecvRows * sizeof(kernelMeta_t) + 255) / 256 * 256;
  made->kernel.metaOffset = self->metaOffset + (size_t)route->index * metaBytes;
  group->privateBytes += (int64_t)bytes;
  route->impl = made;
  route->segments = (ultraepSegments_t){.nSegments = group->nSegments,
                                        .expert = made->kernel.expert,
                                        .firstRow = made->kernel.firstRow,
                                        .rows = made->kernel.rows,
                                        .totalRows = made->kernel.totalRows};
  for (int t = 0; t < KERNEL_MAX_TENSORS; t++) {
    void **pointers = made->kernel.pointers + t * group->nSegments;
    route->segments.weights[t] = pointers;
    route->segments.grads[t] = pointers + KERNEL_MAX_TENSORS * group->nSegments;
  }
  return ultraepSuccess;
}

void nccl_route_destroy(ultraepRoute_t route) {
  ncclRoute_t *impl = route->impl;
  arena_t arena = {0};
  ncclRoute_t measured;
  route_carve(&measured, route->group, &arena);
  route->group->privateBytes -= (int64_t)arena.used;
  (void)nccl_work_wait(nccl_rank(route->group));
  nccl_device_free(nccl_rank(route->group), impl->deviceBlock);
  free(impl->hostLoads);
  free(impl->planWorkspace);
  free(impl);
}

uint32_t nccl_check_word(const uint64_t *words, size_t n) {
  uint64_t hash = UINT64_C(0xcbf29ce484222325);
  for (size_t i = 0; i < n; i++) {
    hash = (hash ^ words[i]) * UINT64_C(0x9e3779b97f4a7c15);
    hash ^= hash >> 29;
  }
  return ((uint32_t)hash | 1) & ~KERNEL_CHECK_BAD_ENTRY;
}

enum { CALL_UPDATE = 100, CALL_UPDATE_DISPATCH }; /* beside ultraepDirection_t */

static kernelUpdate_t update_kernel(ultraepRoute_t route, const int32_t *topkIdx, const float *topkWeights,
                                    int nTokens, bool captured) {
  const ncclRoute_t *impl = route->impl;
  const uint64_t words[] = {CALL_UPDATE, (uint64_t)route->index};
  return (kernelUpdate_t){.topkIdx = topkIdx,
                          .topkWeights = topkWeights,
                          .nTokens = nTokens,
                          .number = captured ? 0 : impl->nUpdates + 1,
                          .check = nccl_check_word(words, sizeof(words) / sizeof(words[0]))};
}

/* What the host remembers of an update that was enqueued. */
static void update_enqueued(ultraepRoute_t route, const kernelUpdate_t *update, bool captured,
                            cudaStream_t stream) {
  ncclRoute_t *impl = route->impl;
  if (captured)
    impl->isCaptured = true;
  else
    impl->nUpdates = update->number;
  nccl_work_enqueued(nccl_rank(route->group), KERNEL_LANE_EXCHANGE, stream, captured);
  impl->planner = route->group->planner;
  route->nTokens = update->nTokens;
  route->planned = true;
}

ultraepResult_t nccl_route_update(ultraepRoute_t route, const int32_t *topkIdx, const float *topkWeights,
                                  int nTokens, cudaStream_t stream) {
  const ncclRoute_t *impl = route->impl;
  bool captured = nccl_is_captured(stream);
  kernelUpdate_t update = update_kernel(route, topkIdx, topkWeights, nTokens, captured);
  cudaError_t error =
      (cudaError_t)kernelRouteLaunch(&nccl_rank(route->group)->kernel, &impl->kernel, &update, stream);
  if (error != cudaSuccess) return nccl_cuda_error(error, "route");
  update_enqueued(route, &update, captured, stream);
  return ultraepSuccess;
}

/* As calls of one lane see it. */
static ultraepResult_t route_status(ultraepRoute_t route, int lane) {
  const ncclRoute_t *impl = route->impl;
  const volatile kernelRouteStatus_t *status = &impl->status[lane];
  if (!route->planned || status->nUpdates != impl->nUpdates) return ultraepSuccess;
  __sync_synchronize();
  const struct ultraepGroup *group = route->group;
  switch (status->code) {
  case ultraepSuccess:
    return ultraepSuccess;
  case ultraepCapacityExceeded:
    return error_set(ultraepCapacityExceeded,
                     "route %d: rank %d would receive %lld rows with padding, maxRecvRows is %lld",
                     route->index, status->rank, (long long)status->rows, (long long)group->maxRecvRows);
  case ultraepInvalidArgument:
    return error_set(ultraepInvalidArgument,
                     "route %d: topkIdx holds an entry that is neither -1 nor in 0..%d", route->index,
                     group->config.nExperts - 1);
  case ultraepRemoteError:
    return error_set(ultraepRemoteError, "route %d: rank %d passed an expert that does not exist",
                     route->index, status->rank);
  case ultraepInvalidUsage:
    if (status->rank >= 0)
      return error_set(ultraepInvalidUsage,
                       "route %d: rank %d was in another call, or its symmetric buffer lies elsewhere",
                       route->index, status->rank);
    return ultraepSuccess; /* no replay has updated the route yet */
  default:
    return error_set((ultraepResult_t)status->code, "route %d: its update failed", route->index);
  }
}

ultraepResult_t nccl_route_status(ultraepRoute_t route) {
  ultraepResult_t result = ultraepSuccess;
  for (int lane = 0; lane < KERNEL_LANES && result == ultraepSuccess; lane++)
    result = route_status(route, lane);
  return result;
}

/* What a lane's call on the route is refused for. Nothing once replays of a graph update the route too: ranks
 * would learn of a failure at different times, and some would refuse a call that others wait in. The kernels
 * refuse alike. */
ultraepResult_t nccl_route_check(ultraepRoute_t route, int lane) {
  const ncclRoute_t *impl = route->impl;
  return impl->isCaptured ? ultraepSuccess : route_status(route, lane);
}

ultraepResult_t nccl_route_plan(ultraepRoute_t route, ultraepPlan_t *plan) {
  ncclRoute_t *impl = route->impl;
  const struct ultraepGroup *group = route->group;
  size_t loadBytes = (size_t)group->nRanks * (size_t)group->config.nExperts * sizeof(int32_t);
  ultraepResult_t result = ultraepPlannerWorkspaceSize(&impl->planner, &impl->planBytes);
  if (result != ultraepSuccess) return result;
  if (!impl->hostLoads) impl->hostLoads = malloc(loadBytes);
  if (!impl->planWorkspace) impl->planWorkspace = arena_alloc(impl->planBytes);
  if (!impl->hostLoads || !impl->planWorkspace)
    return error_set(ultraepSystemError, "no memory for a plan of %zu bytes", impl->planBytes);
  ncclRank_t *self = nccl_rank(route->group);
  cudaError_t error = nccl_work_wait(self);
  if (error == cudaSuccess)
    error =
        cudaMemcpyAsync(impl->hostLoads, impl->kernel.loads, loadBytes, cudaMemcpyDeviceToHost, self->stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(self->stream);
  if (error != cudaSuccess) return nccl_cuda_error(error, "ultraepRoutePlan");
  result = nccl_route_status(route);
  if (result != ultraepSuccess) return result;
  /* The device planner's plan is the host planner's, to the bit. */
  return ultraepPlannerRun(&impl->planner, impl->hostLoads, impl->planWorkspace, impl->planBytes, plan);
}

/* ---- dispatch, combine ---- */

static char *const *exchange_peers(const ncclRank_t *self, groupPlace_t place) {
  return place.region < 0 ? NULL : self->regions[place.region].devicePeers;
}

static uint32_t exchange_check(const backendExchange_t *x, int call) {
  const uint64_t words[] = {(uint64_t)call,
                            (uint64_t)x->dataType,
                            (uint64_t)x->route->index,
                            (uint64_t)x->rows.region,
                            x->rows.offset,
                            (uint64_t)x->scales.region,
                            x->scales.region < 0 ? 0 : x->scales.offset,
                            (uint64_t)x->weights.region,
                            x->weights.region < 0 ? 0 : x->weights.offset};
  return nccl_check_word(words, sizeof(words) / sizeof(words[0]));
}

static kernelExchange_t exchange_kernel(const backendExchange_t *x) {
  const struct ultraepGroup *group = x->route->group;
  const ncclRank_t *self = nccl_rank(x->route->group);
  bool dispatch = x->direction == ULTRAEP_DISPATCH;
  return (kernelExchange_t){
      .sendRows = dispatch ? (const char *)x->sendbuff : NULL,
      .recvRows = dispatch ? NULL : (char *)x->recvbuff,
      .peerRows = exchange_peers(self, x->rows),
      .peerRowsOffset = x->rows.offset,
      .sendScales = (const char *)x->sendScales,
      .peerScales = exchange_peers(self, x->scales),
      .peerScalesOffset = x->scales.offset,
      .peerWeights = exchange_peers(self, x->weights),
      .peerWeightsOffset = x->weights.offset,
      .rowBytes = (int32_t)x->rowBytes,
      .scaleBytes = x->scales.region < 0 ? 0 : group->config.scaleBytes,
      .nTokens = x->route->nTokens,
      .dataType = x->dataType,
      .weighted = x->weighted, /* a route without weights holds ones: the same sums */
      .once = dispatch ? group->config.dispatchMode == ULTRAEP_DISPATCH_ONCE
                       : group->config.combineMode == ULTRAEP_COMBINE_PARTIAL,
      .check = exchange_check(x, x->direction),
      .partialsOffset = self->partialsOffset,
  };
}

/* kernelDispatchLaunch or kernelCombineLaunch. */
typedef int (*exchangeLaunch_t)(const kernelGroup_t *group, const kernelRoute_t *route,
                                const kernelExchange_t *exchange, cudaStream_t stream);

static ultraepResult_t exchange_enqueue(const backendExchange_t *exchange, exchangeLaunch_t launch,
                                        const char *what, cudaStream_t stream) {
  ultraepResult_t result = nccl_route_check(exchange->route, KERNEL_LANE_EXCHANGE);
  if (result != ultraepSuccess) return result;
  const ncclRoute_t *route = exchange->route->impl;
  ncclRank_t *self = nccl_rank(exchange->route->group);
  kernelExchange_t kernel = exchange_kernel(exchange);
  cudaError_t error = (cudaError_t)launch(&self->kernel, &route->kernel, &kernel, stream);
  if (error != cudaSuccess) return nccl_cuda_error(error, what);
  nccl_work_enqueued(self, KERNEL_LANE_EXCHANGE, stream, nccl_is_captured(stream));
  return ultraepSuccess;
}

ultraepResult_t nccl_dispatch(const backendExchange_t *exchange, cudaStream_t stream) {
  return exchange_enqueue(exchange, kernelDispatchLaunch, "dispatch", stream);
}

ultraepResult_t nccl_route_dispatch(const int32_t *topkIdx, const float *topkWeights, int nTokens,
                                    const backendExchange_t *exchange, cudaStream_t stream) {
  ultraepRoute_t route = exchange->route;
  const ncclRoute_t *impl = route->impl;
  bool captured = nccl_is_captured(stream);
  kernelUpdate_t update = update_kernel(route, topkIdx, topkWeights, nTokens, captured);
  kernelExchange_t kernel = exchange_kernel(exchange);
  kernel.nTokens = nTokens;
  kernel.check = update.check = exchange_check(exchange, CALL_UPDATE_DISPATCH);
  cudaError_t error = (cudaError_t)kernelRouteDispatchLaunch(&nccl_rank(route->group)->kernel, &impl->kernel,
                                                             &update, &kernel, stream);
  if (error != cudaSuccess) return nccl_cuda_error(error, "route and dispatch");
  update_enqueued(route, &update, captured, stream);
  return ultraepSuccess;
}

ultraepResult_t nccl_combine(const backendExchange_t *exchange, cudaStream_t stream) {
  return exchange_enqueue(exchange, kernelCombineLaunch, "combine", stream);
}
