/* Faults on GPUs: a rank is missing, late, aborts or leaves, at each phase. The others must learn which rank
 * it was within twice the timeout, the group must stay failed, nothing may be written afterwards, and the
 * device and the communicator must stay usable. Then mistakes that a group survives. */
#include "gpu_case.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "gpu_common.h"

#define RANKS 4
#define VICTIM 2
/* A GPU that others use, too, may stand still for some hundred milliseconds; where emulated, all take their
 * time. */
#define TIMEOUT_MS (GPU_PATIENCE > 1 ? 300 * GPU_PATIENCE : 1000)
#define LONG_MS 5000 /* where an error must come long before the timeout */

typedef enum { PHASE_ROUTE, PHASE_DISPATCH, PHASE_COMBINE, PHASE_BOTH, PHASES } phase_t;
/* Ranks that wait in the call of an update and a dispatch wait in its route. */
static const char *const phaseNames[] = {"route", "dispatch", "combine", "route"};

typedef enum { FAULT_MISSING, FAULT_LATE, FAULT_ABORT, FAULT_ABORT_WAITING, FAULT_LEAVE, FAULTS } fault_t;
static const char *const faultNames[] = {"missing", "late", "aborting", "aborted while waiting", "leaving"};

typedef struct {
  phase_t phase;
  fault_t fault;
  bool once;
} plan_t;

static gpuShape_t fault_shape(bool once, int timeoutMs) {
  gpuShape_t shape = gpu_shape_small(RANKS);
  shape.config.timeoutMs = timeoutMs;
  shape.config.dispatchMode = once ? ULTRAEP_DISPATCH_ONCE : ULTRAEP_DISPATCH_DIRECT;
  shape.config.combineMode = once ? ULTRAEP_COMBINE_PARTIAL : ULTRAEP_COMBINE_EXACT;
  return shape;
}

static bool times_out(fault_t fault) {
  return fault == FAULT_MISSING || fault == FAULT_LATE;
}

/* ---- calls ---- */

static ultraepResult_t call(const gpuSide_t *side, phase_t phase, cudaStream_t stream) {
  int nTokens = side->shape->nTokens[side->rank];
  switch (phase) {
  case PHASE_ROUTE:
    return ultraepRouteUpdate(side->route, side->topk, side->topkWeights, nTokens, stream);
  case PHASE_DISPATCH:
    return ultraepAllToAll(side->tokens, side->rows, ULTRAEP_DISPATCH, side->route, stream);
  case PHASE_BOTH: {
    ultraepTensors_t tensors = ULTRAEP_TENSORS_INITIALIZER;
    tensors.sendbuff = side->tokens;
    tensors.recvbuff = side->rows;
    return ultraepRouteDispatch(side->route, side->topk, side->topkWeights, nTokens, &tensors, stream);
  }
  default:
    return ultraepAllToAll(side->rows, side->out, ULTRAEP_COMBINE, side->route, stream);
  }
}

/* Every call of a failed group says the same at once, and inspection still works. */
static const char *check_failed(const gpuSide_t *side, ultraepResult_t code, int missing, const char *phase,
                                cudaStream_t stream) {
  ultraepStatus_t status;
  ultraepCounters_t counters;
  ultraepGroupProperties_t properties;
  ultraepRoute_t route = NULL;
  void *memory = NULL;
  RANK_IS(ultraepGroupStatus(side->group, &status), code);
  RANK_CHECK(status.code == code && status.missingRank == missing,
             "status: code %d rank %d, expected %d and %d", status.code, status.missingRank, code, missing);
  RANK_CHECK(!phase || strcmp(status.phase, phase) == 0, "status: phase \"%s\", expected \"%s\"",
             status.phase, phase);
  for (int i = 0; i < PHASES; i++) RANK_IS(call(side, (phase_t)i, stream), code);
  RANK_IS(ultraepMemAlloc(side->group, &memory, 4096), code);
  RANK_IS(ultraepRouteCreate(side->group, &route), code);
  RANK_CHECK(!memory && !route, "a failed call set its output");
  RANK_OK(ultraepGroupCounters(side->group, &counters));
  RANK_OK(ultraepGroupProperties(side->group, &properties));
  RANK_CUDA(cudaStreamSynchronize(stream));
  return NULL;
}

static void *abort_soon(void *group) {
  gpu_world_sleep_ms(100);
  (void)ultraepGroupAbort(group);
  return NULL;
}

/* A rank that does all right, but for FAULT_ABORT_WAITING: there rank 0 stays away, and the victim, which
 * waits for it like the others, is aborted by a thread of its own. */
static const char *survivor(gpuSide_t *side, const plan_t *plan, cudaStream_t stream) {
  pthread_t thread;
  bool aborts = plan->fault == FAULT_ABORT_WAITING && side->rank == VICTIM;
  double start = gpu_world_seconds();
  if (aborts)
    RANK_CHECK(pthread_create(&thread, NULL, abort_soon, side->group) == 0, "cannot start a thread");
  ultraepResult_t result = call(side, plan->phase, stream);
  cudaError_t error = cudaStreamSynchronize(stream);
  double seconds = gpu_world_seconds() - start;
  if (aborts) (void)pthread_join(thread, NULL);
  RANK_CUDA(error);
  ultraepResult_t code = times_out(plan->fault) ? ultraepTimeout : ultraepRemoteError;
  RANK_CHECK(result == ultraepSuccess || result == code, "the call is %s after %.3f s: %s",
             ultraepGetErrorString(result), seconds, ultraepGetLastError());
  RANK_CHECK(seconds <= 2e-3 * TIMEOUT_MS + 0.1 * GPU_PATIENCE * aborts, "the error took %.3f s", seconds);
  return check_failed(side, code, VICTIM, result == ultraepSuccess ? phaseNames[plan->phase] : NULL, stream);
}

static const char *victim(gpuWorld_t *world, gpuSide_t *side, const plan_t *plan, cudaStream_t stream) {
  switch (plan->fault) {
  case FAULT_LATE: {
    RANK_MEET(world); /* the others have been told, and use their memory again */
    ultraepResult_t result = call(side, plan->phase, stream);
    RANK_CUDA(cudaStreamSynchronize(stream));
    RANK_CHECK(result == ultraepSuccess || result == ultraepRemoteError, "the late call is %s",
               ultraepGetErrorString(result));
    RANK_IS(ultraepGroupStatus(side->group, NULL), ultraepRemoteError);
    return NULL;
  }
  case FAULT_ABORT:
    gpu_world_sleep_ms(50);
    RANK_OK(ultraepGroupAbort(side->group));
    return check_failed(side, ultraepRemoteError, VICTIM, NULL, stream);
  case FAULT_LEAVE:
    gpu_world_sleep_ms(50);
    RANK_OK(ultraepGroupDestroy(side->group));
    side->group = NULL;
    return NULL;
  default:
    return NULL;
  }
}

/* Whether the rows still hold what they were filled with. */
static const char *check_untouched(const gpuSide_t *side, gpuData_t *data, unsigned char fill,
                                   cudaStream_t stream) {
  size_t bytes = data->nRows * data->rowBytes;
  RANK_CUDA(cudaMemcpyAsync(data->rows[1], side->rows, bytes, cudaMemcpyDeviceToHost, stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  for (size_t i = 0; i < bytes; i++)
    RANK_CHECK(data->rows[1][i] == fill, "row %zu was written after its call had failed", i / data->rowBytes);
  return NULL;
}

/* ---- a rank fails ---- */

static const char *fault_rank(gpuWorld_t *world, int rank, void *argument) {
  const plan_t *plan = argument;
  gpuShape_t shape = fault_shape(plan->once, times_out(plan->fault) ? TIMEOUT_MS : LONG_MS);
  cudaStream_t stream = world->streams[rank];
  gpuSide_t side;
  gpuData_t data;
  planner_random_t random = {(uint64_t)rank};
  RANK_DO(gpu_side_make(world, &shape, rank, true, &side));
  RANK_DO(gpu_data_make(&shape, rank, side.nRows, true, &data));
  gpu_data_fill(&shape, GPU_LOADS_SKEW, &data, &random);
  RANK_MEET(world);
  /* A round that works, so that a route stands and kernels have run. */
  RANK_DO(gpu_device_enqueue(&side, &data, false, stream));
  RANK_DO(gpu_side_sync(world, &side, stream));
  RANK_OK(ultraepGroupStatus(side.group, NULL));
  RANK_MEET(world);

  bool isAway = rank == (plan->fault == FAULT_ABORT_WAITING ? 0 : VICTIM);
  RANK_DO(isAway ? victim(world, &side, plan, stream) : survivor(&side, plan, stream));
  /* What a late rank does must not reach memory whose owner was told of the failure. */
  if (!isAway) RANK_CUDA(cudaMemsetAsync(side.rows, 0x11, data.nRows * data.rowBytes, stream));
  if (!isAway) RANK_CUDA(cudaStreamSynchronize(stream));
  if (!isAway && plan->fault == FAULT_LATE) RANK_MEET(world);
  RANK_MEET(world);
  if (!isAway) RANK_DO(check_untouched(&side, &data, 0x11, stream));
  if (side.group) RANK_OK(ultraepGroupAbort(side.group));
  RANK_MEET(world);
  gpu_data_free(&data);
  RANK_DO(gpu_side_free(&side));
  RANK_MEET(world);
  return gpu_check_usable(world, rank);
}

static int nRepeats = 1; /* of what the device let stand, in this program */

static void check_fault(fault_t fault) {
  gpuWorld_t world;
  const char *flaw = gpu_world_make(&world, RANKS);
  if (flaw) fail_msg("%s", flaw);
  for (int i = 0; i < 2 * PHASES; i++) {
    plan_t plan = {.phase = (phase_t)(i / 2), .fault = fault, .once = i % 2};
    flaw = gpu_world_run(&world, fault_rank, &plan);
    if (!flaw) continue;
    bool isRepeated = world.isStalled && nRepeats-- > 0;
    gpu_world_free(&world);
    const char *how = plan.once ? "once and partial" : "direct and exact";
    if (!isRepeated)
      fail_msg("a rank %s at %s, %s: %s", faultNames[fault], phaseNames[plan.phase], how, flaw);
    printf("a rank %s at %s, %s: again, the device had not begun a kernel: %s\n", faultNames[fault],
           phaseNames[plan.phase], how, flaw);
    i--;
    flaw = gpu_world_make(&world, RANKS);
    if (flaw) fail_msg("%s", flaw);
  }
  gpu_world_free(&world);
}

static void test_missing(void **state) {
  (void)state;
  check_fault(FAULT_MISSING);
}
static void test_late(void **state) {
  (void)state;
  check_fault(FAULT_LATE);
}
static void test_abort(void **state) {
  (void)state;
  check_fault(FAULT_ABORT);
}
static void test_abort_waiting(void **state) {
  (void)state;
  check_fault(FAULT_ABORT_WAITING);
}
static void test_leave(void **state) {
  (void)state;
  check_fault(FAULT_LEAVE);
}

/* ---- mistakes ---- */

typedef struct {
  gpuSide_t host, device;
  gpuData_t data;
  planner_random_t random;
} pair_t;

static const char *pair_make(gpuWorld_t *world, const gpuShape_t *shape, int rank, pair_t *pair) {
  *pair = (pair_t){.random = {(uint64_t)rank + 3}};
  RANK_DO(gpu_side_make(world, shape, rank, false, &pair->host));
  RANK_DO(gpu_side_make(world, shape, rank, true, &pair->device));
  RANK_DO(gpu_data_make(shape, rank, pair->device.nRows, true, &pair->data));
  RANK_MEET(world);
  return NULL;
}

static const char *pair_free(gpuWorld_t *world, pair_t *pair) {
  RANK_MEET(world);
  gpu_data_free(&pair->data);
  RANK_DO(gpu_side_free(&pair->device));
  RANK_DO(gpu_side_free(&pair->host));
  RANK_MEET(world);
  return NULL;
}

static const char *pair_check(gpuWorld_t *world, int rank, pair_t *pair) {
  cudaStream_t stream = world->streams[rank];
  gpu_data_fill(pair->device.shape, GPU_LOADS_UNIFORM, &pair->data, &pair->random);
  RANK_DO(gpu_host_run(&pair->host, &pair->data));
  RANK_DO(gpu_device_enqueue(&pair->device, &pair->data, false, stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  RANK_DO(gpu_compare_data(pair->device.shape, &pair->data));
  RANK_MEET(world);
  return NULL;
}

/* A route that fails: without a wait between update and dispatch, then after one; no row moves; the next
 * update is right. */
static const char *route_fails(gpuWorld_t *world, int rank, pair_t *pair, ultraepResult_t code) {
  gpuSide_t *side = &pair->device;
  cudaStream_t stream = world->streams[rank];
  ultraepStatus_t status;
  ultraepPlan_t plan;
  RANK_DO(gpu_device_inputs(side, &pair->data, stream));
  RANK_DO(gpu_device_update(side, side->route, stream));
  ultraepResult_t result = call(side, PHASE_DISPATCH, stream);
  RANK_CHECK(result == ultraepSuccess || result == code, "dispatch is %s", ultraepGetErrorString(result));
  RANK_CUDA(cudaStreamSynchronize(stream));
  RANK_IS(ultraepGroupStatus(side->group, &status), code);
  RANK_CHECK(status.code == code && strcmp(status.phase, "route") == 0, "status: code %d phase \"%s\"",
             status.code, status.phase);
  RANK_IS(call(side, PHASE_DISPATCH, stream), code);
  RANK_IS(call(side, PHASE_COMBINE, stream), code);
  RANK_IS(ultraepRoutePlan(side->route, &plan), code);
  RANK_DO(check_untouched(side, &pair->data, GPU_POISON, stream));
  RANK_MEET(world);
  RANK_DO(pair_check(world, rank, pair));
  RANK_OK(ultraepGroupStatus(side->group, &status));
  return NULL;
}

static const char *overflow_rank(gpuWorld_t *world, int rank, void *argument) {
  pair_t pair;
  RANK_DO(pair_make(world, argument, rank, &pair));
  for (int i = 0; i < 5; i++) {
    gpu_data_fill(argument, GPU_LOADS_ONE_EXPERT, &pair.data, &pair.random);
    RANK_DO(route_fails(world, rank, &pair, ultraepCapacityExceeded));
    gpu_data_fill(argument, GPU_LOADS_UNIFORM, &pair.data, &pair.random);
    if (rank == 3) pair.data.topk[i] = i % 2 ? -2 : INT32_MAX;
    RANK_DO(route_fails(world, rank, &pair, rank == 3 ? ultraepInvalidArgument : ultraepRemoteError));
    if (rank == 0 || rank == 3) pair.data.topk[i] = ((const gpuShape_t *)argument)->config.nExperts;
    RANK_DO(route_fails(world, rank, &pair, rank % 3 == 0 ? ultraepInvalidArgument : ultraepRemoteError));
  }
  return pair_free(world, &pair);
}

/* Where the symmetric buffer lies elsewhere on one rank, all are told, and no row moves. */
static const char *offsets_rank(gpuWorld_t *world, int rank, void *argument) {
  cudaStream_t stream = world->streams[rank];
  const gpuShape_t *shape = argument;
  size_t rowBytes = 2 * (size_t)shape->config.hidden, bytes;
  unsigned char *region;
  gpuSide_t side;
  gpuData_t data;
  planner_random_t random = {(uint64_t)rank};
  RANK_DO(gpu_side_make(world, shape, rank, true, &side));
  RANK_DO(gpu_data_make(shape, rank, side.nRows, true, &data));
  bytes = side.nRows * rowBytes + 4096;
  RANK_OK(ultraepMemAlloc(side.group, (void **)&region, bytes));
  RANK_MEET(world);
  gpu_data_fill(shape, GPU_LOADS_UNIFORM, &data, &random);
  RANK_DO(gpu_device_inputs(&side, &data, stream));
  RANK_CUDA(cudaMemsetAsync(region, GPU_POISON, bytes, stream));
  RANK_DO(gpu_device_update(&side, side.route, stream));
  side.rows = rank == 1 ? region + 16 : region;
  ultraepResult_t result = call(&side, PHASE_DISPATCH, stream);
  RANK_CHECK(result == ultraepSuccess || result == ultraepInvalidUsage, "dispatch is %s",
             ultraepGetErrorString(result));
  RANK_CUDA(cudaStreamSynchronize(stream));
  RANK_IS(ultraepGroupStatus(side.group, NULL), ultraepInvalidUsage);
  side.rows = region;
  RANK_DO(check_untouched(&side, &data, GPU_POISON, stream));
  RANK_MEET(world);
  gpu_data_free(&data);
  RANK_DO(gpu_side_free(&side));
  RANK_MEET(world);
  return gpu_check_usable(world, rank);
}

/* Ranks in different calls are all told, at once, and no row moves; the group works on. */
static const char *mismatch_rank(gpuWorld_t *world, int rank, void *argument) {
  cudaStream_t stream = world->streams[rank];
  pair_t pair;
  RANK_DO(pair_make(world, argument, rank, &pair));
  RANK_DO(pair_check(world, rank, &pair));
  for (int i = 0; i < PHASES * PHASES; i++) {
    phase_t most = (phase_t)(i / PHASES), one = (phase_t)(i % PHASES);
    if (most == one) continue;
    RANK_DO(gpu_device_inputs(&pair.device, &pair.data, stream));
    RANK_CUDA(cudaStreamSynchronize(stream));
    RANK_MEET(world);
    double start = gpu_world_seconds();
    ultraepResult_t result = call(&pair.device, rank == VICTIM ? one : most, stream);
    RANK_CHECK(result == ultraepSuccess, "the call is %s", ultraepGetErrorString(result));
    RANK_CUDA(cudaStreamSynchronize(stream));
    double seconds = gpu_world_seconds() - start;
    RANK_CHECK(seconds < 1e-3 * LONG_MS, "%s with %s: found after %.3f s", phaseNames[most], phaseNames[one],
               seconds);
    RANK_IS(ultraepGroupStatus(pair.device.group, NULL), ultraepInvalidUsage);
    RANK_DO(check_untouched(&pair.device, &pair.data, GPU_POISON, stream));
    RANK_MEET(world);
    RANK_DO(pair_check(world, rank, &pair));
  }
  return pair_free(world, &pair);
}

/* Arguments that are refused at once; the group works on. */
static const char *arguments_rank(gpuWorld_t *world, int rank, void *argument) {
  const gpuShape_t *shape = argument;
  cudaStream_t stream = world->streams[rank];
  pair_t pair;
  ultraepRoute_t other;
  void *none = NULL;
  RANK_DO(pair_make(world, shape, rank, &pair));
  gpuSide_t *side = &pair.device;
  RANK_IS(call(side, PHASE_DISPATCH, stream), ultraepInvalidUsage); /* never updated */
  RANK_IS(ultraepRouteCreate(side->group, &other), ultraepInvalidUsage);
  RANK_DO(pair_check(world, rank, &pair));
  void *const hostMemory = pair.data.rows[1];
  const struct {
    const void *send;
    void *recv;
    ultraepDirection_t direction;
  } wrong[] = {
      {side->tokens, hostMemory, ULTRAEP_DISPATCH},
      {side->tokens, side->out, ULTRAEP_DISPATCH},
      {side->tokens, NULL, ULTRAEP_DISPATCH},
      {side->tokens, side->rows + 8, ULTRAEP_DISPATCH},
      {side->tokens, side->rows + 16, ULTRAEP_DISPATCH},
      {side->tokens, side->scales, ULTRAEP_DISPATCH},
      {hostMemory, side->out, ULTRAEP_COMBINE},
      {side->tokens, side->out, ULTRAEP_COMBINE},
      {side->rows + 16, side->out, ULTRAEP_COMBINE_SUM},
      {side->rows, side->rows, ULTRAEP_COMBINE},
      {side->tokens, side->rows, (ultraepDirection_t)17},
  };
  for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
    if (shape->nTokens[rank] == 0 && wrong[i].recv == side->rows && wrong[i].send == side->rows) continue;
    ultraepResult_t result =
        ultraepAllToAll(wrong[i].send, wrong[i].recv, wrong[i].direction, side->route, stream);
    RANK_CHECK(result == ultraepInvalidArgument, "wrong buffers %zu: %s", i, ultraepGetErrorString(result));
  }
  RANK_IS(ultraepRouteUpdate(side->route, side->topk, NULL, -1, stream), ultraepInvalidArgument);
  RANK_IS(ultraepRouteUpdate(side->route, side->topk, NULL, shape->config.maxTokens + 1, stream),
          ultraepInvalidArgument);
  RANK_IS(ultraepRouteUpdate(side->route, NULL, NULL, 1, stream), ultraepInvalidArgument);
  RANK_IS(ultraepMemAlloc(side->group, &none, 0), ultraepInvalidArgument);
  RANK_IS(ultraepMemFree(side->group, side->rows + 16), ultraepInvalidArgument);
  RANK_IS(ultraepMemRegister(side->group, side->rows, 16), ultraepInvalidArgument);
  RANK_MEET(world);
  /* These two are found out together. */
  RANK_IS(ultraepMemAlloc(side->group, &none, (size_t)1 << 44), ultraepSystemError);
  RANK_MEET(world);
  RANK_IS(ultraepMemAlloc(side->group, &none, 4096 * (size_t)(rank + 1)), ultraepInvalidUsage);
  RANK_CHECK(!none, "a failed call set its output");
  RANK_MEET(world);
  RANK_DO(pair_check(world, rank, &pair));
  return pair_free(world, &pair);
}

/* Memory that NCCL cannot share is refused on every rank. */
static const char *register_rank(gpuWorld_t *world, int rank, void *argument) {
  const gpuShape_t *shape = argument;
  ultraepGroup_t group;
  void *plain = NULL;
  RANK_CUDA(cudaMalloc(&plain, 1 << 21));
  RANK_OK(ultraepGroupCreate(&group, world->comms[rank], &shape->config));
  RANK_MEET(world);
  ultraepResult_t result = ultraepMemRegister(group, plain, 1 << 21);
  RANK_CHECK(result != ultraepSuccess && ultraepGetLastError()[0], "cudaMalloc memory was registered");
  RANK_MEET(world);
  RANK_OK(ultraepGroupDestroy(group));
  RANK_CUDA(cudaFree(plain));
  return NULL;
}

static const char *config_rank(gpuWorld_t *world, int rank, void *argument) {
  gpuShape_t shape = *(const gpuShape_t *)argument;
  ultraepGroup_t group = NULL;
  if (rank == VICTIM) shape.config.topK++;
  RANK_IS(ultraepGroupCreate(&group, world->comms[rank], &shape.config), ultraepInvalidArgument);
  RANK_CHECK(strstr(ultraepGetLastError(), "topK"), "the message is: %s", ultraepGetLastError());
  RANK_CHECK(!group, "a failed call set its output");
  RANK_MEET(world);
  shape.config.topK = 0;
  RANK_IS(ultraepGroupCreate(&group, world->comms[rank], &shape.config), ultraepInvalidArgument);
  RANK_MEET(world);
  /* Where one rank's config is no good, the others are told. */
  shape.config.topK = rank == VICTIM ? 0 : 4;
  RANK_IS(ultraepGroupCreate(&group, world->comms[rank], &shape.config),
          rank == VICTIM ? ultraepInvalidArgument : ultraepRemoteError);
  RANK_MEET(world);
  return gpu_check_usable(world, rank);
}

static void check_mistake(gpuWorldRank_t rank, const gpuShape_t *shape) {
  gpuWorld_t world;
  gpuShape_t copy = *shape;
  const char *flaw = gpu_world_make(&world, RANKS);
  if (!flaw) flaw = gpu_world_run(&world, rank, &copy);
  if (flaw) fail_msg("%s", flaw);
  gpu_world_free(&world);
}

static void test_overflow_and_bad_entries(void **state) {
  (void)state;
  gpuShape_t shape = fault_shape(false, 20000);
  shape.config.balance = 0;
  shape.config.maxRecvRows = 3 * 64 * 4; /* everything to one expert needs 4 * 64 * 4 */
  for (int r = 0; r < RANKS; r++) shape.nTokens[r] = 64;
  check_mistake(overflow_rank, &shape);
}

static void test_offsets(void **state) {
  (void)state;
  gpuShape_t shape = fault_shape(false, 2000);
  check_mistake(offsets_rank, &shape);
}

static void test_mismatch(void **state) {
  (void)state;
  gpuShape_t shape = fault_shape(false, 20000);
  check_mistake(mismatch_rank, &shape);
}

static void test_arguments(void **state) {
  (void)state;
  gpuShape_t shape = fault_shape(false, 20000);
  check_mistake(arguments_rank, &shape);
}

static void test_register(void **state) {
  (void)state;
  gpuShape_t shape = fault_shape(false, 2000);
  check_mistake(register_rank, &shape);
}

static void test_config(void **state) {
  (void)state;
  gpuShape_t shape = fault_shape(false, 20000);
  check_mistake(config_rank, &shape);
}

/* Optional argument: a test's name or a pattern of names, as cmocka takes them. */
int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_missing),   cmocka_unit_test(test_late),
      cmocka_unit_test(test_abort),     cmocka_unit_test(test_abort_waiting),
      cmocka_unit_test(test_leave),     cmocka_unit_test(test_overflow_and_bad_entries),
      cmocka_unit_test(test_offsets),   cmocka_unit_test(test_mismatch),
      cmocka_unit_test(test_arguments), cmocka_unit_test(test_config),
      cmocka_unit_test(test_register),
  };
  if (!gpu_world_usable(true)) return GPU_SKIP_CODE;
  if (argc > 1) cmocka_set_test_filter(argv[1]);
  return cmocka_run_group_tests_name("gpu_faults", tests, NULL, NULL);
}
