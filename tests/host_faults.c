/* Faults: one rank is missing, late, aborts (itself, or by another thread while it waits) or leaves, at each
 * phase. Every survivor must get an error that names the rank within twice the timeout, the group must stay
 * failed, and memory may be freed as soon as a call has failed. */
#include "host_common.h"
#include "sanitized.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#define RANKS 4
#define VICTIM 2
#define TIMEOUT_MS 200
#define REGION_BYTES 65536

typedef enum {
  PHASE_CREATE,
  PHASE_ALLOC,
  PHASE_REGISTER,
  PHASE_FREE,
  PHASE_ROUTE,
  PHASE_DISPATCH,
  PHASE_COMBINE,
  PHASE_EXPERTS,
  PHASE_WEIGHTS,
  PHASE_GRADS,
  PHASES
} phase_t;
static const char *const phaseNames[] = {"create",   "memory",  "memory",  "memory",  "route",
                                         "dispatch", "combine", "experts", "weights", "grads"};

typedef enum { FAULT_MISSING, FAULT_LATE, FAULT_ABORT, FAULT_ABORT_WAITING, FAULT_LEAVE, FAULTS } fault_t;
static const char *const faultNames[] = {"missing", "late", "aborting", "aborted while waiting", "leaving"};

typedef struct {
  phase_t phase;
  fault_t fault;
  bool once; /* the other modes */
} plan_t;

/* A rank's things, made before the fault. */
typedef struct {
  ultraepConfig_t config;
  ultraepGroup_t group;
  ultraepRoute_t route;
  unsigned char *region, *mine, *tokens;
  ultraepExperts_t experts;
  void *made;
} rank_t;

static void sleep_ms(int ms) {
  struct timespec time = {ms / 1000, (long)(ms % 1000) * 1000000};
  nanosleep(&time, NULL);
}

static bool setup(hostRankArg_t *self, rank_t *x) {
  static const int32_t topk[16] = {0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7, 0, 1};
  void *region;
  memset(x->mine, 0, REGION_BYTES);
  memset(x->tokens, 0, REGION_BYTES);
  if (ultraepGroupCreateHost(&x->group, self->world, self->rank, &x->config) != ultraepSuccess ||
      ultraepMemAlloc(x->group, &region, REGION_BYTES) != ultraepSuccess ||
      ultraepRouteCreate(x->group, &x->route) != ultraepSuccess ||
      ultraepRouteUpdate(x->route, topk, NULL, 8, NULL) != ultraepSuccess)
    return false;
  x->region = memset(region, 0, REGION_BYTES);
  x->experts = (ultraepExperts_t)ULTRAEP_EXPERTS_INITIALIZER;
  x->experts.nWeights = x->experts.nGrads = 1;
  x->experts.weights[0] = (ultraepExpertTensor_t){.master = x->region + 32768, .bytes = 64};
  x->experts.grads[0] =
      (ultraepExpertTensor_t){.master = x->tokens + 32768, .bytes = 64, .dataType = ULTRAEP_FLOAT32};
  return ultraepExpertsRegister(x->group, 0, &x->experts) == ultraepSuccess;
}

static ultraepResult_t call(hostRankArg_t *self, rank_t *x, phase_t phase) {
  static const int32_t topk[4] = {1, 2, 3, 4};
  switch (phase) {
  case PHASE_CREATE:
    return ultraepGroupCreateHost(&x->group, self->world, self->rank, &x->config);
  case PHASE_ALLOC:
    return ultraepMemAlloc(x->group, &x->made, 64);
  case PHASE_REGISTER:
    return ultraepMemRegister(x->group, x->mine, REGION_BYTES);
  case PHASE_FREE:
    return ultraepMemFree(x->group, x->region);
  case PHASE_ROUTE:
    return ultraepRouteUpdate(x->route, topk, NULL, 2, NULL);
  case PHASE_DISPATCH:
    return ultraepAllToAll(x->tokens, x->region, ULTRAEP_DISPATCH, x->route, NULL);
  case PHASE_COMBINE:
    return ultraepAllToAll(x->region, x->tokens, ULTRAEP_COMBINE, x->route, NULL);
  case PHASE_EXPERTS:
    return ultraepExpertsRegister(x->group, 1, &x->experts);
  case PHASE_WEIGHTS:
    return ultraepWeightsSync(x->route, 0, NULL);
  case PHASE_GRADS:
    return ultraepGradsReduce(x->route, 0, NULL);
  default:
    return ultraepInternalError;
  }
}

/* After a failure every call says the same, at once, and inspection still works. */
static void check_sticky(hostRankArg_t *self, rank_t *x, ultraepResult_t code, int rank, const char *phase) {
  if (!x->group) return;
  ultraepStatus_t status;
  ultraepGroupProperties_t properties;
  CHECK_IS(self, ultraepGroupStatus(x->group, &status), code);
  CHECK(self, status.code == code && status.missingRank == rank);
  CHECK(self, strcmp(status.phase, phase) == 0);
  for (int phase2 = PHASE_ALLOC; phase2 < PHASES; phase2++)
    CHECK_IS(self, call(self, x, (phase_t)phase2), code);
  ultraepRoute_t route = NULL;
  CHECK_IS(self, ultraepRouteCreate(x->group, &route), code);
  CHECK(self, !route && !x->made);
  CHECK_OK(self, ultraepGroupProperties(x->group, &properties));
  CHECK_OK(self, ultraepRouteDestroy(x->route));
}

static void survivor(hostRankArg_t *self, rank_t *x) {
  const plan_t *plan = self->arg;
  if (plan->fault == FAULT_ABORT_WAITING) sleep_ms(40); /* lets the victim wait */
  double start = host_seconds();
  ultraepResult_t result = call(self, x, plan->phase);
  double seconds = host_seconds() - start;
  bool timeout = plan->fault == FAULT_MISSING || plan->fault == FAULT_LATE;
  char name[16];
  snprintf(name, sizeof(name), "rank %d", VICTIM);
  CHECK_IS(self, result, timeout ? ultraepTimeout : ultraepRemoteError);
  CHECK(self, strstr(ultraepGetLastError(), name));
  CHECK(self, seconds <= 2 * TIMEOUT_MS * 1e-3);
  /* Nobody touches it any more: under AddressSanitizer a late touch is found. */
  free(x->mine);
  x->mine = aligned_alloc(256, REGION_BYTES);
  check_sticky(self, x, result, VICTIM, phaseNames[plan->phase]);
}

static void *abort_soon(void *group) {
  sleep_ms(15);
  (void)ultraepGroupAbort(group);
  return NULL;
}

static void victim(hostRankArg_t *self, rank_t *x) {
  const plan_t *plan = self->arg;
  ultraepResult_t result;
  pthread_t thread;
  double start;
  switch (plan->fault) {
  case FAULT_LATE:
    sleep_ms(TIMEOUT_MS * 3 / 2);
    start = host_seconds();
    CHECK_IS(self, call(self, x, plan->phase), ultraepRemoteError);
    CHECK(self, host_seconds() - start <= 2 * TIMEOUT_MS * 1e-3);
    CHECK(self, strstr(ultraepGetLastError(), "gave up waiting for this rank"));
    break;
  case FAULT_ABORT:
    CHECK_OK(self, ultraepGroupAbort(x->group));
    CHECK_IS(self, call(self, x, plan->phase), ultraepRemoteError);
    check_sticky(self, x, ultraepRemoteError, VICTIM, "abort");
    break;
  case FAULT_ABORT_WAITING:
    CHECK(self, pthread_create(&thread, NULL, abort_soon, x->group) == 0);
    start = host_seconds();
    result = call(self, x, plan->phase);
    pthread_join(thread, NULL);
    CHECK_IS(self, result, ultraepRemoteError);
    CHECK(self, host_seconds() - start <= 2 * TIMEOUT_MS * 1e-3);
    check_sticky(self, x, ultraepRemoteError, VICTIM, "abort");
    break;
  case FAULT_LEAVE:
    CHECK_OK(self, ultraepGroupDestroy(x->group));
    x->group = NULL;
    break;
  default:
    break;
  }
}

static void fault_rank(hostRankArg_t *self) {
  const plan_t *plan = self->arg;
  rank_t x = {.config = host_config(),
              .mine = aligned_alloc(256, REGION_BYTES),
              .tokens = aligned_alloc(256, REGION_BYTES)};
  x.config.timeoutMs = TIMEOUT_MS;
  x.config.maxRecvRows = 128;
  if (plan->once) {
    x.config.dispatchMode = ULTRAEP_DISPATCH_ONCE;
    x.config.combineMode = ULTRAEP_COMBINE_PARTIAL;
  }
  if (plan->phase != PHASE_CREATE) CHECK(self, setup(self, &x));
  SYNC(self);
  if (self->rank == VICTIM)
    victim(self, &x);
  else
    survivor(self, &x);
  SYNC(self); /* a missing rank is not one that leaves */
  CHECK_OK(self, ultraepGroupDestroy(x.group));
  free(x.mine);
  free(x.tokens);
}

static int run_faults(bool once) {
  int n = 0;
  for (int phase = 0; phase < PHASES; phase++)
    for (int fault = 0; fault < FAULTS; fault++) {
      if (phase == PHASE_CREATE && fault >= FAULT_ABORT) continue; /* there is no group yet */
      if (once && phase != PHASE_ROUTE && phase != PHASE_DISPATCH && phase != PHASE_COMBINE) continue;
      plan_t plan = {.phase = (phase_t)phase, .fault = (fault_t)fault, .once = once};
      print_message("%s rank at %s%s\n", faultNames[fault], phaseNames[phase], once ? ", once" : "");
      host_run(RANKS, fault_rank, &plan);
      n++;
    }
  return n;
}

static void test_faults(void **state) {
  (void)state;
  int n = run_faults(false) + run_faults(true);
  assert_true(n >= 20);
  print_message("%d of %d faults\n", n, n); /* a fault that is not handled fails the test above */
}

/* ---- aborts and leaves at any moment, with memory freed at once ---- */

typedef struct {
  int delayUs; /* until the abort */
  bool leave;  /* the rank leaves between two calls instead */
} moment_t;

static void *abort_at(void *opaque) {
  hostRankArg_t *self = ((void **)opaque)[0];
  ultraepGroup_t group = ((void **)opaque)[1];
  const moment_t *moment = self->arg;
  struct timespec time = {0, (long)moment->delayUs * 1000};
  nanosleep(&time, NULL);
  (void)ultraepGroupAbort(group);
  return NULL;
}

/* Steps until an error; each call's memory is the caller's, and is gone right after. */
static ultraepResult_t step_on(hostRankArg_t *self, ultraepRoute_t route, unsigned char *rows,
                               unsigned char *tokens) {
  const moment_t *moment = self->arg;
  ultraepResult_t result = ultraepSuccess;
  int32_t topk[64];
  for (int step = 0; step < 1000000 && result == ultraepSuccess; step++) {
    for (int i = 0; i < 64; i++) topk[i] = (i * 7 + step + self->rank) % 8;
    if (moment->leave && self->rank == VICTIM && step == moment->delayUs % 7) return ultraepSuccess;
    result = ultraepRouteUpdate(route, topk, NULL, 32, NULL);
    if (result == ultraepSuccess) result = ultraepAllToAll(tokens, rows, ULTRAEP_DISPATCH, route, NULL);
    if (result == ultraepSuccess) result = ultraepWeightsSync(route, 0, NULL);
    if (result == ultraepSuccess) result = ultraepAllToAll(rows, tokens, ULTRAEP_COMBINE, route, NULL);
    if (result == ultraepSuccess) result = ultraepGradsReduce(route, 0, NULL);
  }
  return result;
}

static void moment_rank(hostRankArg_t *self) {
  const moment_t *moment = self->arg;
  ultraepConfig_t config = host_config();
  config.hidden = 16384; /* 32 KiB a row, so that a call has several blocks */
  config.maxRecvRows = 256;
  config.timeoutMs = 10000;
  size_t rowBytes = 2 * (size_t)config.hidden, bytes = (size_t)config.maxRecvRows * rowBytes;
  unsigned char *rows = aligned_alloc(256, bytes), *tokens = aligned_alloc(256, 32 * rowBytes);
  unsigned char *masters = aligned_alloc(256, 2 << 20), *grads = aligned_alloc(256, 2 << 20);
  memset(rows, 0, bytes);
  memset(tokens, 0, 32 * rowBytes);
  memset(masters, 0, 2 << 20);
  memset(grads, 0, 2 << 20);
  ultraepGroup_t group;
  ultraepRoute_t route;
  CHECK_OK(self, ultraepGroupCreateHost(&group, self->world, self->rank, &config));
  CHECK_OK(self, ultraepMemRegister(group, rows, bytes));
  CHECK_OK(self, ultraepMemRegister(group, masters, 2 << 20));
  CHECK_OK(self, ultraepRouteCreate(group, &route));
  ultraepExperts_t experts = ULTRAEP_EXPERTS_INITIALIZER;
  experts.nWeights = experts.nGrads = 1;
  experts.weights[0] = (ultraepExpertTensor_t){.master = masters, .bytes = 1 << 20};
  experts.grads[0] = (ultraepExpertTensor_t){.master = grads, .bytes = 1 << 20, .dataType = ULTRAEP_BFLOAT16};
  CHECK_OK(self, ultraepExpertsRegister(group, 0, &experts));
  SYNC(self);
  pthread_t thread;
  bool aborts = !moment->leave && self->rank == VICTIM;
  void *arg[] = {self, group};
  if (aborts) CHECK(self, pthread_create(&thread, NULL, abort_at, arg) == 0);
  ultraepResult_t result = step_on(self, route, rows, tokens);
  bool leaves = moment->leave && self->rank == VICTIM;
  if (leaves) CHECK_OK(self, ultraepGroupDestroy(group));
  free(rows); /* a peer in the middle of a copy would be seen here */
  free(masters);
  CHECK_IS(self, result, leaves ? ultraepSuccess : ultraepRemoteError);
  if (aborts) pthread_join(thread, NULL);
  if (!leaves) {
    ultraepStatus_t status;
    CHECK_IS(self, ultraepGroupStatus(group, &status), ultraepRemoteError);
    CHECK(self, status.missingRank == VICTIM);
    CHECK_OK(self, ultraepGroupDestroy(group));
  }
  free(tokens);
  free(grads);
}

static void test_any_moment(void **state) {
  (void)state;
  hostRandom_t random = {21};
  for (int i = 0; i < (SLOWED ? 20 : 60); i++) {
    moment_t moment = {.delayUs = host_random_in(&random, 0, 20000), .leave = i % 4 == 3};
    host_run(RANKS, moment_rank, &moment);
  }
}

/* ---- what a rank learns without waiting ---- */

static void told_rank(hostRankArg_t *self) {
  ultraepConfig_t config = host_config();
  config.timeoutMs = TIMEOUT_MS;
  ultraepGroup_t group;
  ultraepStatus_t status;
  CHECK_OK(self, ultraepGroupCreateHost(&group, self->world, self->rank, &config));
  SYNC(self);
  if (self->rank == VICTIM) CHECK_OK(self, ultraepGroupAbort(group));
  SYNC(self);
  CHECK_IS(self, ultraepGroupStatus(group, &status), ultraepRemoteError);
  CHECK(self, status.missingRank == VICTIM && strcmp(status.phase, "abort") == 0);
  CHECK_IS(self, ultraepGroupStatus(group, NULL), ultraepRemoteError);
  CHECK_OK(self, ultraepGroupAbort(group)); /* once more, by everybody: the first reason stands */
  CHECK_IS(self, ultraepGroupStatus(group, &status), ultraepRemoteError);
  CHECK(self, status.missingRank == VICTIM);
  CHECK_OK(self, ultraepGroupDestroy(group));
}

static void test_told(void **state) {
  (void)state;
  host_run(RANKS, told_rank, NULL);
}

/* Ranks that leave one by one after the work is done disturb nobody: a call that was complete stays so. */
static void leaving_rank(hostRankArg_t *self) {
  ultraepConfig_t config = host_config();
  config.timeoutMs = 10000;
  for (int i = 0; i < 50; i++) {
    ultraepGroup_t group;
    void *ptr;
    CHECK_OK(self, ultraepGroupCreateHost(&group, self->world, self->rank, &config));
    CHECK_OK(self, ultraepMemAlloc(group, &ptr, 64));
    CHECK_OK(self, ultraepMemFree(group, ptr));
    CHECK_OK(self, ultraepGroupDestroy(group));
  }
}

static void test_leaving(void **state) {
  (void)state;
  host_run(RANKS, leaving_rank, NULL);
}

/* Two ranks never come: the error counts them. A world can go although a group was never complete. */
static void alone_rank(hostRankArg_t *self) {
  if (self->rank != 0) return;
  ultraepConfig_t config = host_config();
  config.timeoutMs = 20;
  ultraepGroup_t group = NULL;
  CHECK_IS(self, ultraepGroupCreateHost(&group, self->world, 0, &config), ultraepTimeout);
  CHECK(self, strstr(ultraepGetLastError(), "rank 1") && strstr(ultraepGetLastError(), "2 more"));
}

static void test_alone(void **state) {
  (void)state;
  host_run(RANKS, alone_rank, NULL);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_faults),  cmocka_unit_test(test_any_moment), cmocka_unit_test(test_told),
      cmocka_unit_test(test_leaving), cmocka_unit_test(test_alone),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
