/* Faults in weights syncs and gradient reductions on GPUs: a rank that does not come, or stops or aborts amid
 * the relay. The others must learn which rank it was within twice the timeout, also while exchanges go on in
 * another stream. Then mistakes that a group survives. */
#include "gpu_expert_case.h"

#include "nccl_backend.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "gpu_common.h"

/* ---- faults ---- */

#define FAULT_RANKS 4
#define TIMEOUT_MS (400 * GPU_PATIENCE)

typedef enum { FAULT_ABSENT, FAULT_STUCK, FAULT_ABORT, FAULTS } fault_t;
static const char *const faultNames[] = {"absent", "stuck amid the call", "aborting amid the call"};

typedef struct {
  gpuExperts_t x;
  fault_t fault;
  bool grads; /* in the reduction, else in the sync */
  int victim;
} faultPlan_t;

static const char *fault_call(const faultPlan_t *plan, const gpuExpertSide_t *side, cudaStream_t stream,
                              ultraepResult_t *result) {
  *result = plan->grads ? ultraepGradsReduce(side->side.route, 0, stream)
                        : ultraepWeightsSync(side->side.route, 0, stream);
  RANK_CUDA(cudaStreamSynchronize(stream));
  return NULL;
}

/* Tells the others that this rank is in their call, and does nothing of it: what it looks like to them when a
 * rank stops amid the call. */
static const char *fault_pretend(const gpuWorld_t *world, const gpuExpertSide_t *side, cudaStream_t stream) {
  const ncclRank_t *self = nccl_rank(side->side.group);
  int nRanks = world->nRanks, rank = side->side.rank, other = (rank + 1) % nRanks;
  double start = gpu_world_seconds();
  kernelState_t state;
  uint64_t word = 0;
  RANK_CUDA(cudaMemcpyAsync(&state, self->kernel.state, sizeof(state), cudaMemcpyDeviceToHost, stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  uint32_t call = state.lanes[KERNEL_LANE_EXPERTS].calls + 1;
  size_t flags = (KERNEL_FLAG_OPEN + 2 * KERNEL_LANE_EXPERTS + (call & 1)) * (size_t)nRanks;
  while ((uint32_t)word != call) {
    RANK_CHECK(gpu_world_seconds() - start < 10, "the others did not come");
    RANK_CUDA(cudaMemcpyAsync(&word, self->window.peers[rank] + (flags + (size_t)other) * sizeof(word),
                              sizeof(word), cudaMemcpyDeviceToHost, stream));
    RANK_CUDA(cudaStreamSynchronize(stream));
  }
  for (int r = 0; r < nRanks; r++)
    RANK_CUDA(cudaMemcpyAsync(self->window.peers[r] + (flags + (size_t)rank) * sizeof(word), &word,
                              sizeof(word), cudaMemcpyHostToDevice, stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  return NULL;
}

static const char *fault_survivor(const faultPlan_t *plan, const gpuExpertSide_t *side, cudaStream_t stream) {
  ultraepResult_t code = plan->fault == FAULT_ABORT ? ultraepRemoteError : ultraepTimeout, result;
  ultraepStatus_t status;
  double start = gpu_world_seconds();
  RANK_DO(fault_call(plan, side, stream, &result));
  double seconds = gpu_world_seconds() - start;
  RANK_CHECK(result == ultraepSuccess, "the call is %s", ultraepGetErrorString(result));
  RANK_CHECK(seconds <= 2e-3 * TIMEOUT_MS, "the error took %.3f s", seconds);
  RANK_IS(ultraepGroupStatus(side->side.group, &status), code);
  RANK_CHECK(status.missingRank == plan->victim &&
                 strcmp(status.phase, plan->grads ? "grads" : "weights") == 0,
             "status: rank %d in \"%s\"", status.missingRank, status.phase);
  RANK_IS(ultraepWeightsSync(side->side.route, 0, stream), code);
  RANK_IS(ultraepGradsReduce(side->side.route, 0, stream), code);
  return NULL;
}

static const char *fault_rank(gpuWorld_t *world, int rank, void *argument) {
  const faultPlan_t *plan = argument;
  cudaStream_t stream = world->streams[rank];
  gpuExpertRank_t self;
  RANK_DO(gpu_experts_make(world, &plan->x, rank, &self));
  const gpuExpertSide_t *side = &self.device;
  gpu_data_fill(&plan->x.shape, GPU_LOADS_ONE_EXPERT, &self.data, &self.random);
  RANK_DO(gpu_device_inputs(&side->side, &self.data, stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  RANK_MEET(world);
  RANK_DO(gpu_experts_forward(&plan->x, side, 0, stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  RANK_OK(ultraepGroupStatus(side->side.group, NULL));
  RANK_MEET(world);
  if (rank != plan->victim) {
    RANK_DO(fault_survivor(plan, side, stream));
  } else if (plan->fault != FAULT_ABSENT) {
    RANK_DO(fault_pretend(world, side, stream));
    if (plan->fault == FAULT_ABORT) RANK_OK(ultraepGroupAbort(side->side.group));
  }
  RANK_MEET(world);
  RANK_OK(ultraepGroupAbort(side->side.group));
  return gpu_experts_free(world, &self);
}

static void test_faults(void **state) {
  (void)state;
  gpuWorld_t world;
  const char *flaw = gpu_world_make(&world, FAULT_RANKS);
  if (flaw) fail_msg("%s", flaw);
  for (int i = 0; i < FAULTS * 4; i++) {
    faultPlan_t plan = {.x = gpu_experts_hot(), .fault = (fault_t)(i / 4), .grads = i % 2};
    plan.x.shape = gpu_shape_small(FAULT_RANKS);
    plan.x.shape.config.nSlots = 1;
    plan.x.shape.config.timeoutMs = TIMEOUT_MS;
    plan.x.isPortable = i % 4 >= 2;
    /* The hot expert's chain is rank 3, 0, 1, 2: a rank that relays, and the one that reduces. */
    plan.victim = plan.grads ? FAULT_RANKS - 1 : 0;
    flaw = gpu_world_run(&world, fault_rank, &plan);
    if (flaw)
      fail_msg("a rank %s, %s, %s: %s", faultNames[plan.fault], plan.grads ? "gradients" : "weights",
               plan.x.isPortable ? "portable" : "bulk", flaw);
  }
  gpu_world_free(&world);
}

/* ---- a fault in one lane, while the other goes on ---- */

#define LANE_ROUNDS_BEFORE_ABORT 3

typedef enum { LANE_NO_SYNC, LANE_NO_EXCHANGE, LANE_ABORT, LANE_FAULTS } laneFault_t;
static const char *const laneFaultNames[] = {"never syncs", "never dispatches", "aborts"};

typedef struct {
  gpuExperts_t x;
  laneFault_t fault;
  int victim;
} lanePlan_t;

/* Calls in the lane that goes on, until one tells that the group has failed. Sets *nRounds to those that did
 * not. */
static const char *lane_go_on(const lanePlan_t *plan, const gpuExpertSide_t *side, cudaStream_t stream,
                              int *nRounds) {
  double start = gpu_world_seconds();
  for (*nRounds = 0; ultraepGroupStatus(side->side.group, NULL) == ultraepSuccess; ++*nRounds) {
    RANK_CHECK(gpu_world_seconds() - start < 60, "the group does not fail");
    if (plan->fault == LANE_ABORT && side->side.rank == plan->victim && *nRounds == LANE_ROUNDS_BEFORE_ABORT)
      RANK_OK(ultraepGroupAbort(side->side.group));
    if (plan->fault == LANE_NO_EXCHANGE)
      (void)ultraepWeightsSync(side->side.route, 0, stream);
    else
      (void)ultraepAllToAll(side->side.tokens, side->side.rows, ULTRAEP_DISPATCH, side->side.route, stream);
    RANK_CUDA(cudaStreamSynchronize(stream));
  }
  return NULL;
}

static const char *lane_calls(const lanePlan_t *plan, const gpuExpertSide_t *side, cudaStream_t stream,
                              cudaStream_t beside) {
  bool isVictim = side->side.rank == plan->victim;
  ultraepResult_t code = plan->fault == LANE_ABORT || isVictim ? ultraepRemoteError : ultraepTimeout;
  const char *phase = plan->fault == LANE_NO_EXCHANGE ? "dispatch" : "weights";
  int nRounds;
  ultraepStatus_t status;
  double start = gpu_world_seconds();
  if (!isVictim && plan->fault == LANE_NO_EXCHANGE)
    RANK_OK(ultraepAllToAll(side->side.tokens, side->side.rows, ULTRAEP_DISPATCH, side->side.route, beside));
  else if (!isVictim)
    RANK_OK(ultraepWeightsSync(side->side.route, 0, beside));
  RANK_DO(lane_go_on(plan, side, stream, &nRounds));
  RANK_CUDA(cudaStreamSynchronize(beside));
  double seconds = gpu_world_seconds() - start;
  RANK_CHECK(nRounds > 0, "the other lane did not go on");
  RANK_CHECK(plan->fault == LANE_ABORT || seconds <= 2e-3 * TIMEOUT_MS, "the error took %.3f s", seconds);
  RANK_IS(ultraepGroupStatus(side->side.group, &status), code);
  RANK_CHECK(status.missingRank == plan->victim, "status: rank %d", status.missingRank);
  RANK_CHECK(plan->fault == LANE_ABORT || strcmp(status.phase, phase) == 0, "status: phase \"%s\"",
             status.phase);
  RANK_IS(ultraepWeightsSync(side->side.route, 0, beside), code);
  RANK_IS(ultraepAllToAll(side->side.tokens, side->side.rows, ULTRAEP_DISPATCH, side->side.route, stream),
          code);
  return NULL;
}

static const char *lane_rank(gpuWorld_t *world, int rank, void *argument) {
  const lanePlan_t *plan = argument;
  cudaStream_t stream = world->streams[rank], beside;
  gpuExpertRank_t self;
  RANK_CUDA(cudaStreamCreateWithFlags(&beside, cudaStreamNonBlocking));
  RANK_DO(gpu_experts_make(world, &plan->x, rank, &self));
  gpu_data_fill(&plan->x.shape, GPU_LOADS_ONE_EXPERT, &self.data, &self.random);
  RANK_DO(gpu_device_inputs(&self.device.side, &self.data, stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  RANK_MEET(world);
  RANK_DO(gpu_experts_forward(&plan->x, &self.device, 0, stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  RANK_MEET(world);
  RANK_DO(lane_calls(plan, &self.device, stream, beside));
  RANK_MEET(world);
  RANK_OK(ultraepGroupAbort(self.device.side.group));
  RANK_DO(gpu_experts_free(world, &self));
  RANK_CUDA(cudaStreamDestroy(beside));
  return NULL;
}

static void test_lanes(void **state) {
  (void)state;
  gpuWorld_t world;
  const char *flaw = gpu_world_make(&world, FAULT_RANKS);
  if (flaw) fail_msg("%s", flaw);
  for (int i = 0; i < LANE_FAULTS; i++) {
    lanePlan_t plan = {.x = gpu_experts_hot(), .fault = (laneFault_t)i, .victim = i};
    plan.x.shape = gpu_shape_small(FAULT_RANKS);
    plan.x.shape.config.nSlots = 1;
    plan.x.shape.config.maxCtas = plan.x.shape.config.expertCtas = 2;
    plan.x.shape.config.timeoutMs = plan.fault == LANE_ABORT ? 60000 : TIMEOUT_MS;
    flaw = gpu_world_run(&world, lane_rank, &plan);
    if (flaw) fail_msg("a rank %s: %s", laneFaultNames[i], flaw);
  }
  gpu_world_free(&world);
}

/* ---- mistakes that a group survives ---- */

static const char *mistakes_rank(gpuWorld_t *world, int rank, void *argument) {
  const gpuExperts_t *x = argument;
  cudaStream_t stream = world->streams[rank];
  int nLocal = gpu_experts_local(x, world);
  bool isLast = rank == world->nRanks - 1;
  gpuExpertRank_t self;
  RANK_DO(gpu_experts_make(world, x, rank, &self));
  ultraepGroup_t group = self.device.side.group;
  ultraepRoute_t route = self.device.side.route;
  ultraepExperts_t experts = gpu_experts_of(x, &self.device, nLocal, 1);
  RANK_IS(ultraepWeightsSync(route, 0, stream), ultraepInvalidUsage); /* no plan yet */
  RANK_IS(ultraepExpertsRegister(group, isLast ? 50 : 51, &experts), ultraepInvalidUsage);
  if (isLast) experts.weights[0].master = self.device.masters;
  RANK_IS(ultraepExpertsRegister(group, 50, &experts), ultraepInvalidUsage);
  experts = gpu_experts_of(x, &self.device, nLocal, 1);
  experts.weights[0].bytes += 16;
  RANK_IS(ultraepExpertsRegister(group, 50, &experts), ultraepInvalidUsage);
  RANK_IS(ultraepWeightsSync(route, 50, stream), ultraepInvalidUsage); /* not registered */
  RANK_MEET(world);
  /* Ranks in different layers: alike on all, nothing moves, though tiles may have been loaded, and the group
   * works on. */
  for (int i = 0; i < 8; i++) {
    gpu_data_fill(&x->shape, GPU_LOADS_ONE_EXPERT, &self.data, &self.random);
    RANK_DO(gpu_device_inputs(&self.device.side, &self.data, stream));
    RANK_CUDA(cudaStreamSynchronize(stream));
    RANK_MEET(world);
    RANK_DO(gpu_host_run(&self.host.side, &self.data));
    RANK_MEET(world);
    RANK_DO(gpu_device_update(&self.device.side, route, stream));
    RANK_OK(ultraepWeightsSync(route, isLast ? 3 : 0, stream));
    RANK_DO(gpu_device_exchange(&self.device.side, route, stream)); /* which is none of its business */
    RANK_DO(gpu_device_outputs(&self.device.side, &self.data, stream));
    RANK_CUDA(cudaStreamSynchronize(stream));
    RANK_IS(ultraepGroupStatus(group, NULL), ultraepInvalidUsage);
    RANK_IS(ultraepWeightsSync(route, 0, stream), ultraepInvalidUsage);
    RANK_DO(gpu_compare_data(&x->shape, &self.data));
    RANK_MEET(world);
  }
  for (int i = 0; i < 2; i++) {
    const char *flaw = gpu_experts_step(world, x, i, &self);
    RANK_CHECK(!flaw, "step %d after the mistakes: %s", i, flaw);
  }
  return gpu_experts_free(world, &self);
}

static void test_mistakes(void **state) {
  (void)state;
  gpuWorld_t world;
  gpuExperts_t x = gpu_experts_hot();
  const char *flaw = gpu_world_make(&world, FAULT_RANKS);
  if (flaw) fail_msg("%s", flaw);
  x.shape = gpu_shape_small(FAULT_RANKS);
  x.nLayers = 2;
  flaw = gpu_world_run(&world, mistakes_rank, &x);
  if (flaw) fail_msg("%s", flaw);
  gpu_world_free(&world);
}

/* Optional argument: which tests. */
int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_faults), cmocka_unit_test(test_lanes),
                                     cmocka_unit_test(test_mistakes)};
  if (!gpu_world_usable(true)) return GPU_SKIP_CODE;
  if (argc > 1) cmocka_set_test_filter(argv[1]);
  return cmocka_run_group_tests_name("gpu_expert_faults", tests, NULL, NULL);
}
