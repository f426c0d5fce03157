/* Calls from threads whose current device is not the communicator's, which they must neither need nor change:
 * every call of a group from a thread on another device, with the results of the host backend; calls from a
 * thread that has never used CUDA, which must not make a context on the default device either. Needs two
 * devices. */
#include "gpu_case.h"
#include "group.h"

#include <cuda.h>
#include <dlfcn.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "gpu_common.h"

#define RANKS 4
#define EXPERT_BYTES 4096
#define MOST_SEGMENTS 64

static int nDevices;

/* Passes on a call's failure, and says where the current device was changed. */
#define AWAY(x, call)                                                                                        \
  do {                                                                                                       \
    RANK_DO(call);                                                                                           \
    RANK_CHECK(device_now() == (x)->away, "line %d: the current device is %d now", __LINE__, device_now());  \
  } while (0)
#define AWAY_IS(x, call, expected)                                                                           \
  do {                                                                                                       \
    RANK_IS(call, expected);                                                                                 \
    RANK_CHECK(device_now() == (x)->away, "line %d: the current device is %d now", __LINE__, device_now());  \
  } while (0)
#define AWAY_OK(x, call) AWAY_IS(x, call, ultraepSuccess)

/* What the test itself asks of CUDA it asks on the communicator's device: CUDA wants that of copies of
 * cudaMallocAsync's memory, such as routes' arrays, and other devices may have no access to the rest. */
#define HOME(x, call)                                                                                        \
  do {                                                                                                       \
    RANK_CUDA(cudaSetDevice((x)->home));                                                                     \
    RANK_DO(call);                                                                                           \
    RANK_CUDA(cudaSetDevice((x)->away));                                                                     \
  } while (0)

/* A rank: both backends' parts, and the thread's current device, another than the communicator's. */
typedef struct {
  gpuShape_t shape;
  gpuSide_t host, device;
  gpuData_t data;
  planner_random_t random;
  cudaStream_t stream;
  int home, away;
  unsigned char *masters; /* [local experts][EXPERT_BYTES] */
  unsigned char *grads;   /* the same */
} away_t;

static int device_now(void) {
  int device = -1;
  return cudaGetDevice(&device) == cudaSuccess ? device : -1;
}

static const char *check_home(const away_t *x, const void *ptr, const char *what) {
  struct cudaPointerAttributes attributes;
  RANK_CUDA(cudaPointerGetAttributes(&attributes, ptr));
  RANK_CHECK(attributes.type == cudaMemoryTypeDevice && attributes.device == x->home,
             "%s: memory of device %d, the communicator's is %d", what, attributes.device, x->home);
  return NULL;
}

/* ---- a group, from another device ---- */

/* What the test itself needs on the communicator's device. */
static const char *inputs_make(away_t *x) {
  size_t n = (size_t)x->shape.nTokens[x->device.rank] + 1, entries = n * (size_t)x->shape.config.topK;
  size_t row = (size_t)x->shape.config.hidden * 2;
  gpuSide_t *side = &x->device;
  RANK_CUDA(cudaMalloc((void **)&side->topk, entries * sizeof(int32_t)));
  RANK_CUDA(cudaMalloc((void **)&side->topkWeights, entries * sizeof(float)));
  RANK_CUDA(cudaMalloc((void **)&side->tokens, n * row));
  RANK_CUDA(cudaMalloc((void **)&side->tokenScales, 16));
  RANK_CUDA(cudaMalloc((void **)&side->out, n * row));
  RANK_CUDA(cudaMalloc((void **)&side->sum, n * row));
  RANK_CUDA(cudaMalloc((void **)&x->grads, (size_t)x->shape.config.nExperts / RANKS * EXPERT_BYTES));
  return NULL;
}

static const char *side_make(gpuWorld_t *world, int rank, away_t *x) {
  gpuSide_t *side = &x->device;
  *side = (gpuSide_t){.shape = &x->shape, .rank = rank, .onDevice = true};
  side->nRows = (size_t)x->shape.config.maxRecvRows;
  RANK_CUDA(cudaSetDevice(x->away));
  AWAY_IS(x, ultraepGroupCreate(&side->group, world->comms[rank], &x->shape.config), ultraepInvalidUsage);
  RANK_CUDA(cudaSetDevice(x->home));
  RANK_OK(ultraepGroupCreate(&side->group, world->comms[rank], &x->shape.config));
  RANK_CHECK(device_now() == x->home, "the current device is %d after the group's creation", device_now());
  RANK_CUDA(cudaSetDevice(x->away));
  AWAY_OK(x, ultraepRouteCreate(side->group, &side->route));
  size_t row = (size_t)x->shape.config.hidden * 2;
  AWAY_OK(x, ultraepMemAlloc(side->group, (void **)&side->rows, side->nRows * row));
  AWAY_OK(x, ultraepMemAlloc(side->group, (void **)&side->scales, 16));
  AWAY_OK(x, ultraepMemAlloc(side->group, (void **)&side->weights, side->nRows * sizeof(float)));
  RANK_DO(check_home(x, side->rows, "rows"));
  RANK_DO(check_home(x, side->weights, "weights"));
  ultraepSegments_t segments;
  AWAY_OK(x, ultraepRouteSegments(side->route, &segments));
  RANK_DO(check_home(x, segments.firstRow, "segments"));
  HOME(x, inputs_make(x));
  return NULL;
}

static const char *side_free(away_t *x) {
  gpuSide_t *side = &x->device;
  AWAY_OK(x, ultraepRouteDestroy(side->route));
  AWAY_OK(x, ultraepGroupDestroy(side->group));
  void *inputs[] = {side->topk, side->topkWeights, side->tokens, side->tokenScales,
                    side->out,  side->sum,         x->grads};
  RANK_CUDA(cudaSetDevice(x->home));
  for (size_t i = 0; i < sizeof(inputs) / sizeof(inputs[0]); i++) RANK_CUDA(cudaFree(inputs[i]));
  return NULL;
}

static const char *launch(cudaGraph_t graph, cudaGraphExec_t *exec, cudaStream_t stream) {
  RANK_CUDA(cudaGraphInstantiate(exec, graph, 0));
  RANK_CUDA(cudaGraphDestroy(graph));
  RANK_CUDA(cudaGraphLaunch(*exec, stream));
  return NULL;
}

/* Updates, dispatches and combines: apart, in one call, and replayed. */
static const char *exchange(away_t *x, bool fused, bool captured) {
  cudaGraph_t graph;
  cudaGraphExec_t exec = NULL;
  gpu_data_fill(&x->shape, GPU_LOADS_SKEW, &x->data, &x->random);
  RANK_DO(gpu_host_run(&x->host, &x->data));
  HOME(x, gpu_device_inputs(&x->device, &x->data, x->stream));
  if (captured) RANK_CUDA(cudaStreamBeginCapture(x->stream, cudaStreamCaptureModeThreadLocal));
  AWAY(x, gpu_device_run(&x->device, fused, x->stream));
  if (captured) {
    RANK_CUDA(cudaStreamEndCapture(x->stream, &graph));
    HOME(x, launch(graph, &exec, x->stream));
  }
  HOME(x, gpu_device_outputs(&x->device, &x->data, x->stream));
  RANK_CUDA(cudaStreamSynchronize(x->stream));
  if (exec) RANK_CUDA(cudaGraphExecDestroy(exec));
  return gpu_compare_data(&x->shape, &x->data);
}

static const char *exchanges(away_t *x) {
  for (int i = 0; i < 2; i++) {
    RANK_DO(exchange(x, i == 1, false));
    HOME(x, gpu_compare_segments(x->host.route, x->device.route, x->stream));
    AWAY(x, gpu_compare_plans(x->host.route, x->device.route));
  }
  AWAY(x, gpu_compare_counters(x->host.group, x->device.group));
  AWAY_OK(x, ultraepGroupStatus(x->device.group, NULL));
  return NULL;
}

/* ---- experts ---- */

static const char *experts_fill(const away_t *x, int nLocal) {
  for (int e = 0; e < nLocal; e++)
    RANK_CUDA(cudaMemsetAsync(x->masters + (size_t)e * EXPERT_BYTES, x->device.rank * nLocal + e + 1,
                              EXPERT_BYTES, x->stream));
  RANK_CUDA(cudaMemsetAsync(x->grads, 0, (size_t)nLocal * EXPERT_BYTES, x->stream));
  RANK_CUDA(cudaStreamSynchronize(x->stream));
  return NULL;
}

static const char *experts_register(away_t *x, int nLocal) {
  ultraepExperts_t experts = ULTRAEP_EXPERTS_INITIALIZER;
  AWAY_OK(x, ultraepMemAlloc(x->device.group, (void **)&x->masters, (size_t)nLocal * EXPERT_BYTES));
  HOME(x, experts_fill(x, nLocal));
  experts.nWeights = experts.nGrads = 1;
  experts.weights[0] = (ultraepExpertTensor_t){.master = x->masters, .bytes = EXPERT_BYTES};
  experts.grads[0] =
      (ultraepExpertTensor_t){.master = x->grads, .bytes = EXPERT_BYTES, .dataType = ULTRAEP_FLOAT32};
  AWAY_OK(x, ultraepExpertsRegister(x->device.group, 0, &experts));
  return NULL;
}

/* Every instance has its expert's weights, on the communicator's device. */
static const char *experts_check(const away_t *x, const ultraepSegments_t *segments, int *nReplicas,
                                 int nLocal) {
  int32_t experts[MOST_SEGMENTS];
  unsigned char *places[MOST_SEGMENTS], seen = 0;
  RANK_CHECK(segments->nSegments <= MOST_SEGMENTS, "%d segments", segments->nSegments);
  size_t n = (size_t)segments->nSegments;
  const enum cudaMemcpyKind kind = cudaMemcpyDeviceToHost;
  RANK_CUDA(cudaMemcpyAsync(experts, segments->expert, n * sizeof(*experts), kind, x->stream));
  RANK_CUDA(cudaMemcpyAsync(places, segments->weights[0], n * sizeof(*places), kind, x->stream));
  RANK_CUDA(cudaStreamSynchronize(x->stream));
  for (size_t i = 0; i < n; i++) {
    if (experts[i] < 0) continue;
    RANK_DO(check_home(x, places[i], "an instance's weights"));
    RANK_CUDA(cudaMemcpyAsync(&seen, places[i] + EXPERT_BYTES - 1, 1, kind, x->stream));
    RANK_CUDA(cudaStreamSynchronize(x->stream));
    RANK_CHECK(seen == experts[i] + 1, "expert %d's weights are those of %d", experts[i], seen - 1);
    *nReplicas += i >= (size_t)nLocal;
  }
  return NULL;
}

static const char *experts(away_t *x) {
  int nLocal = x->shape.config.nExperts / RANKS, nReplicas = 0;
  ultraepSegments_t segments;
  ultraepPlan_t plan;
  RANK_DO(experts_register(x, nLocal));
  AWAY_OK(x, ultraepWeightsSync(x->device.route, 0, x->stream));
  AWAY_OK(x, ultraepRouteSegments(x->device.route, &segments));
  HOME(x, experts_check(x, &segments, &nReplicas, nLocal));
  AWAY_OK(x, ultraepGradsReduce(x->device.route, 0, x->stream));
  RANK_CUDA(cudaStreamSynchronize(x->stream));
  AWAY_OK(x, ultraepGroupStatus(x->device.group, NULL));
  AWAY_OK(x, ultraepRoutePlan(x->device.route, &plan));
  RANK_CHECK(plan.nReplicas > 0, "a plan without replicas tells nothing");
  return NULL;
}

/* ---- memory of another device ---- */

/* One rank registers such memory: all refuse, and work on. */
static const char *foreign(gpuWorld_t *world, away_t *x) {
  enum { BYTES = 1 << 16 };
  bool isForeign = x->device.rank == 1;
  RANK_CUDA(cudaSetDevice(isForeign ? x->away : x->home));
  void *mine = gpu_world_alloc(BYTES);
  RANK_CHECK(mine, "ncclMemAlloc failed");
  RANK_CUDA(cudaSetDevice(x->away));
  RANK_MEET(world);
  AWAY_IS(x, ultraepMemRegister(x->device.group, mine, BYTES),
          isForeign ? ultraepInvalidUsage : ultraepRemoteError);
  RANK_MEET(world);
  gpu_world_release(mine);
  return NULL;
}

/* ---- an abort ---- */

typedef struct {
  ultraepGroup_t group;
  ultraepResult_t result;
  int device; /* the thread's, afterwards */
} aborter_t;

/* A thread that has set no device. */
static void *abort_soon(void *argument) {
  aborter_t *self = argument;
  gpu_world_sleep_ms(100);
  self->result = ultraepGroupAbort(self->group);
  self->device = device_now();
  return NULL;
}

/* Rank 0 stays away, so that the others wait for it, until one of them is aborted. */
static const char *abort_while_waiting(gpuWorld_t *world, away_t *x) {
  pthread_t thread;
  aborter_t aborter = {.group = x->device.group};
  ultraepStatus_t status;
  bool aborts = x->device.rank == 1;
  RANK_MEET(world);
  if (aborts) RANK_CHECK(pthread_create(&thread, NULL, abort_soon, &aborter) == 0, "no thread");
  double start = gpu_world_seconds();
  if (x->device.rank > 0) {
    ultraepResult_t result = ultraepRouteUpdate(x->device.route, x->device.topk, x->device.topkWeights,
                                                x->shape.nTokens[x->device.rank], x->stream);
    RANK_CHECK(result == ultraepSuccess || result == ultraepRemoteError, "the update is %s",
               ultraepGetErrorString(result));
    RANK_CUDA(cudaStreamSynchronize(x->stream));
  }
  double seconds = gpu_world_seconds() - start;
  if (aborts) (void)pthread_join(thread, NULL);
  RANK_CHECK(!aborts || (aborter.result == ultraepSuccess && aborter.device == 0),
             "the abort is %s, from device %d", ultraepGetErrorString(aborter.result), aborter.device);
  RANK_CHECK(seconds < 5 * GPU_PATIENCE, "the abort took %.3f s", seconds);
  RANK_MEET(world);
  if (x->device.rank > 0) AWAY_IS(x, ultraepGroupStatus(x->device.group, &status), ultraepRemoteError);
  return NULL;
}

/* ---- the whole of it ---- */

static const char *away_rank(gpuWorld_t *world, int rank, void *argument) {
  (void)argument;
  away_t *x = calloc(1, sizeof(*x));
  RANK_CHECK(x, "no memory");
  x->home = device_now();
  x->away = (x->home + 1) % nDevices;
  x->stream = world->streams[rank];
  x->shape = gpu_shape_small(RANKS);
  x->random = (planner_random_t){(uint64_t)rank + 1};
  RANK_DO(gpu_side_make(world, &x->shape, rank, false, &x->host));
  RANK_DO(side_make(world, rank, x));
  RANK_DO(gpu_data_make(&x->shape, rank, x->device.nRows, false, &x->data));
  RANK_DO(exchanges(x));
  RANK_DO(experts(x));
  RANK_DO(foreign(world, x));
  RANK_MEET(world);
  RANK_DO(exchange(x, false, true));
  AWAY_OK(x, ultraepMemFree(x->device.group, x->device.scales));
  RANK_DO(abort_while_waiting(world, x));
  RANK_MEET(world);
  gpu_data_free(&x->data);
  RANK_DO(side_free(x));
  RANK_DO(gpu_side_free(&x->host));
  RANK_MEET(world);
  free(x);
  return NULL;
}

static void test_away(void **state) {
  gpuWorld_t world;
  (void)state;
  if (nDevices < 2) skip();
  const char *flaw = gpu_world_make(&world, RANKS);
  if (!flaw) flaw = gpu_world_run(&world, away_rank, NULL);
  if (flaw) fail_msg("%s", flaw);
  gpu_world_free(&world);
}

/* ---- a thread that has never used CUDA ---- */

typedef struct {
  ultraepGroup_t group;
  cudaStream_t stream;
  int32_t *topk; /* device: [nTokens][topK] of zeros */
  int nTokens;
  char flaw[512];
} fresh_t;

/* Whether the default device has a context; -1: not known. */
static int has_default_context(void) {
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  __typeof__(&cuDevicePrimaryCtxGetState) getState = NULL;
  unsigned flags;
  int isActive = 0;
  if (library) *(void **)&getState = dlsym(library, "cuDevicePrimaryCtxGetState");
  return getState && getState(0, &flags, &isActive) == CUDA_SUCCESS ? isActive : -1;
}

static const char *fresh_calls(const fresh_t *x) {
  ultraepRoute_t route;
  ultraepCounters_t counters;
  ultraepPlan_t plan;
  void *memory = NULL;
  RANK_OK(ultraepRouteCreate(x->group, &route));
  RANK_OK(ultraepMemAlloc(x->group, &memory, 4096));
  RANK_OK(ultraepRouteUpdate(route, x->topk, NULL, x->nTokens, x->stream));
  RANK_OK(ultraepGroupCounters(x->group, &counters)); /* it waits for the update */
  RANK_OK(ultraepRoutePlan(route, &plan));
  RANK_OK(ultraepGroupStatus(x->group, NULL));
  RANK_OK(ultraepMemFree(x->group, memory));
  RANK_OK(ultraepRouteDestroy(route));
  RANK_OK(ultraepGroupAbort(x->group));
  RANK_OK(ultraepGroupDestroy(x->group));
  return NULL;
}

static void *fresh_thread(void *argument) {
  fresh_t *x = argument;
  const char *flaw = fresh_calls(x);
  if (flaw) snprintf(x->flaw, sizeof(x->flaw), "%s", flaw);
  return NULL;
}

static const char *fresh_rank(gpuWorld_t *world, int rank, void *argument) {
  fresh_t x = {.stream = world->streams[rank]};
  gpuShape_t shape = gpu_shape_small(RANKS);
  size_t bytes = (size_t)shape.config.maxTokens * (size_t)shape.config.topK * sizeof(int32_t);
  pthread_t thread;
  (void)argument;
  x.nTokens = shape.nTokens[rank];
  RANK_CUDA(cudaMalloc((void **)&x.topk, bytes));
  RANK_CUDA(cudaMemsetAsync(x.topk, 0, bytes, x.stream));
  RANK_CUDA(cudaStreamSynchronize(x.stream));
  RANK_OK(ultraepGroupCreate(&x.group, world->comms[rank], &shape.config));
  RANK_MEET(world);
  int before = has_default_context();
  RANK_MEET(world);
  RANK_CHECK(pthread_create(&thread, NULL, fresh_thread, &x) == 0, "no thread");
  (void)pthread_join(thread, NULL);
  RANK_CHECK(!x.flaw[0], "in a thread that has set no device: %s", x.flaw);
  RANK_CHECK(has_default_context() == before, "the calls made a context on the default device");
  RANK_MEET(world);
  RANK_CUDA(cudaFree(x.topk));
  return NULL;
}

/* No rank uses the default device. */
static void test_fresh(void **state) {
  gpuWorld_t world;
  (void)state;
  if (nDevices < 2) skip();
  const char *flaw = gpu_world_make_on(&world, RANKS, nDevices - 1);
  if (!flaw) flaw = gpu_world_run(&world, fresh_rank, NULL);
  if (flaw) fail_msg("%s", flaw);
  gpu_world_free(&world);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_fresh), cmocka_unit_test(test_away)};
  if (!gpu_world_usable(true)) return GPU_SKIP_CODE;
  (void)cudaGetDeviceCount(&nDevices);
  return cmocka_run_group_tests_name("gpu_devices", tests, NULL, NULL);
}
