/* The table of the NCCL backend's operations. Each is made with the communicator's device as the thread's
 * current one, and leaves the caller's as it was: kernels go to no stream of another device, a null stream is
 * the current device's, and memory, streams and events are made on it. What only looks at the host's memory
 * needs none of that. */
#include "nccl_backend.h"

enum { DEVICE_NONE = -1 };

int nccl_device_enter(int device) {
  int current = DEVICE_NONE;
  if (cudaGetDevice(&current) == cudaSuccess && current == device) return DEVICE_NONE;
  return peer_context_enter(device) ? device : DEVICE_NONE;
}

void nccl_device_leave(int entered) {
  if (entered != DEVICE_NONE) peer_context_leave(entered);
}

/* The number is kept here: the group may be gone after the call. */
static int group_enter_device(ultraepGroup_t group) {
  return nccl_device_enter(nccl_rank(group)->device);
}

/* The body of an operation: a call that returns a result, on the group's device. */
#define ON_DEVICE(group, call)                                                                               \
  do {                                                                                                       \
    int entered = group_enter_device(group);                                                                 \
    ultraepResult_t result = (call);                                                                         \
    nccl_device_leave(entered);                                                                              \
    return result;                                                                                           \
  } while (0)

static ultraepResult_t backend_counters(ultraepGroup_t group, ultraepCounters_t *counters) {
  ON_DEVICE(group, nccl_group_counters(group, counters));
}

static void backend_abort(ultraepGroup_t group) {
  int entered = group_enter_device(group);
  nccl_group_abort(group);
  nccl_device_leave(entered);
}

static void backend_destroy(ultraepGroup_t group) {
  int entered = group_enter_device(group);
  nccl_group_destroy(group);
  nccl_device_leave(entered);
}

static ultraepResult_t backend_mem_create(ultraepGroup_t group, int region, void *ptr, size_t bytes) {
  ON_DEVICE(group, nccl_mem_create(group, region, ptr, bytes));
}

static ultraepResult_t backend_mem_destroy(ultraepGroup_t group, int region) {
  ON_DEVICE(group, nccl_mem_destroy(group, region));
}

static ultraepResult_t backend_route_create(ultraepRoute_t route) {
  ON_DEVICE(route->group, nccl_route_create(route));
}

static void backend_route_destroy(ultraepRoute_t route) {
  int entered = group_enter_device(route->group);
  nccl_route_destroy(route);
  nccl_device_leave(entered);
}

static ultraepResult_t backend_route_update(ultraepRoute_t route, const int32_t *topkIdx,
                                            const float *topkWeights, int nTokens, cudaStream_t stream) {
  ON_DEVICE(route->group, nccl_route_update(route, topkIdx, topkWeights, nTokens, stream));
}

static ultraepResult_t backend_route_dispatch(const int32_t *topkIdx, const float *topkWeights, int nTokens,
                                              const backendExchange_t *exchange, cudaStream_t stream) {
  ON_DEVICE(exchange->route->group, nccl_route_dispatch(topkIdx, topkWeights, nTokens, exchange, stream));
}

static ultraepResult_t backend_route_plan(ultraepRoute_t route, ultraepPlan_t *plan) {
  ON_DEVICE(route->group, nccl_route_plan(route, plan));
}

static ultraepResult_t backend_dispatch(const backendExchange_t *exchange, cudaStream_t stream) {
  ON_DEVICE(exchange->route->group, nccl_dispatch(exchange, stream));
}

static ultraepResult_t backend_combine(const backendExchange_t *exchange, cudaStream_t stream) {
  ON_DEVICE(exchange->route->group, nccl_combine(exchange, stream));
}

static ultraepResult_t backend_experts_register(ultraepGroup_t group, groupLayer_t *layer) {
  ON_DEVICE(group, nccl_experts_register(group, layer));
}

static ultraepResult_t backend_weights_sync(ultraepRoute_t route, const groupLayer_t *layer,
                                            cudaStream_t stream) {
  ON_DEVICE(route->group, nccl_weights_sync(route, layer, stream));
}

static ultraepResult_t backend_grads_reduce(ultraepRoute_t route, const groupLayer_t *layer,
                                            cudaStream_t stream) {
  ON_DEVICE(route->group, nccl_grads_reduce(route, layer, stream));
}

const backend_t ncclBackend = {
    .name = "nccl",
    .check = nccl_group_check,
    .status = nccl_group_status,
    .counters = backend_counters,
    .abort = backend_abort,
    .destroy = backend_destroy,
    .memCreate = backend_mem_create,
    .memDestroy = backend_mem_destroy,
    .routeCreate = backend_route_create,
    .routeDestroy = backend_route_destroy,
    .routeUpdate = backend_route_update,
    .routeDispatch = backend_route_dispatch,
    .routePlan = backend_route_plan,
    .dispatch = backend_dispatch,
    .combine = backend_combine,
    .expertsRegister = backend_experts_register,
    .gateChanged = nccl_gate_changed,
    .weightsSync = backend_weights_sync,
    .gradsReduce = backend_grads_reduce,
};
