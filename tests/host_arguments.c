/* Arguments of the exchange and of the expert calls, calls that do not go together over the ranks, and
 * counters. */
#include "host_common.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define BAD(self, call) CHECK_IS(self, call, ultraepInvalidArgument)
#define MISUSE(self, call) CHECK_IS(self, call, ultraepInvalidUsage)

/* ---- the exchange ---- */

typedef struct {
  ultraepGroup_t group;
  ultraepRoute_t route;
  unsigned char *symmetric, *plain; /* 1 MiB each */
} sender_t;

static void exchange_errors(hostRankArg_t *self, sender_t *x, const ultraepConfig_t *config) {
  size_t rowBytes = 64, rows = (size_t)config->maxRecvRows;
  unsigned char *s = x->symmetric, *p = x->plain;
  BAD(self, ultraepAllToAll(p, s, ULTRAEP_DISPATCH, NULL, NULL));
  BAD(self, ultraepAllToAll(NULL, s, ULTRAEP_DISPATCH, x->route, NULL));
  BAD(self, ultraepAllToAll(p, NULL, ULTRAEP_DISPATCH, x->route, NULL));
  BAD(self, ultraepAllToAll(p, p + 65536, ULTRAEP_DISPATCH, x->route, NULL));
  BAD(self, ultraepAllToAll(p + 8, s, ULTRAEP_DISPATCH, x->route, NULL));
  BAD(self, ultraepAllToAll(p, s + 8, ULTRAEP_DISPATCH, x->route, NULL));
  BAD(self, ultraepAllToAll(p, s + (1 << 20) - rows * rowBytes + 16, ULTRAEP_DISPATCH, x->route, NULL));
  BAD(self, ultraepAllToAll(s + 16, s, ULTRAEP_DISPATCH, x->route, NULL));
  BAD(self, ultraepAllToAll((void *)(UINTPTR_MAX - 15), s, ULTRAEP_DISPATCH, x->route, NULL));
  BAD(self, ultraepAllToAll(p, s, (ultraepDirection_t)3, x->route, NULL));
  BAD(self, ultraepAllToAll(NULL, p, ULTRAEP_COMBINE, x->route, NULL));
  BAD(self, ultraepAllToAll(s, NULL, ULTRAEP_COMBINE, x->route, NULL));
  BAD(self, ultraepAllToAll(p, p + 65536, ULTRAEP_COMBINE_SUM, x->route, NULL));
  BAD(self, ultraepAllToAll(s, s + 64, ULTRAEP_COMBINE, x->route, NULL));
}

static void tensors_errors(hostRankArg_t *self, sender_t *x) {
  unsigned char *s = x->symmetric, *p = x->plain;
  ultraepTensors_t good = ULTRAEP_TENSORS_INITIALIZER, t;
  good.sendbuff = p;
  good.recvbuff = s;
  BAD(self, ultraepAllToAllTensors(NULL, ULTRAEP_DISPATCH, x->route, NULL));
  BAD(self, ultraepAllToAllTensors(&good, ULTRAEP_DISPATCH, NULL, NULL));
#define TENSORS(field, value, direction, code)                                                               \
  t = good;                                                                                                  \
  t.field = value;                                                                                           \
  CHECK_IS(self, ultraepAllToAllTensors(&t, direction, x->route, NULL), code)
  TENSORS(magic, 0, ULTRAEP_DISPATCH, ultraepInvalidArgument);
  TENSORS(size, 8, ULTRAEP_DISPATCH, ultraepInvalidArgument);
  TENSORS(version, 99999, ULTRAEP_DISPATCH, ultraepInvalidArgument);
  TENSORS(reserved, 1, ULTRAEP_DISPATCH, ultraepInvalidArgument);
  TENSORS(dataType, 9, ULTRAEP_DISPATCH, ultraepInvalidArgument);
  TENSORS(sendScales, p, ULTRAEP_DISPATCH, ultraepInvalidUsage);
  TENSORS(recvScales, s + 65536, ULTRAEP_DISPATCH, ultraepInvalidUsage);
  TENSORS(recvWeights, (float *)(void *)(s + 64), ULTRAEP_DISPATCH, ultraepInvalidArgument);
  TENSORS(recvWeights, (float *)(void *)p, ULTRAEP_DISPATCH, ultraepInvalidArgument);
  good.sendbuff = s;
  good.recvbuff = p;
  TENSORS(recvWeights, (float *)(void *)(s + 65536), ULTRAEP_COMBINE, ultraepInvalidArgument);
  TENSORS(dataType, ULTRAEP_FLOAT8, ULTRAEP_COMBINE, ultraepInvalidUsage);
  TENSORS(dataType, ULTRAEP_BYTES, ULTRAEP_COMBINE_SUM, ultraepInvalidUsage);
  TENSORS(dataType, ULTRAEP_FLOAT32, ULTRAEP_COMBINE, ultraepInvalidUsage); /* partial sums of bfloat16 */
#undef TENSORS
}

/* Calls that do not go together over the ranks: the same code on all, no effect, and the next call works. */
static void mismatches(hostRankArg_t *self, sender_t *x, ultraepRoute_t other) {
  unsigned char *s = x->symmetric, *p = x->plain;
  bool odd = self->rank == 1;
  MISUSE(self, ultraepAllToAll(p, s + (odd ? 256 : 0), ULTRAEP_DISPATCH, x->route, NULL));
  CHECK(self, strstr(ultraepGetLastError(), "recvbuff"));
  MISUSE(self, ultraepAllToAll(p, s, ULTRAEP_DISPATCH, odd ? other : x->route, NULL));
  if (odd)
    MISUSE(self, ultraepAllToAll(p, s, ULTRAEP_DISPATCH, x->route, NULL));
  else
    MISUSE(self, ultraepAllToAll(s, p, ULTRAEP_COMBINE, x->route, NULL));
  MISUSE(self, ultraepAllToAll(s, p, odd ? ULTRAEP_COMBINE_SUM : ULTRAEP_COMBINE, x->route, NULL));
  MISUSE(self, ultraepAllToAll(s + (odd ? 64 : 0), p, ULTRAEP_COMBINE, x->route, NULL));
  ultraepTensors_t t = ULTRAEP_TENSORS_INITIALIZER;
  t.sendbuff = p;
  t.recvbuff = s;
  t.dataType = odd ? ULTRAEP_BFLOAT16 : ULTRAEP_FLOAT16;
  MISUSE(self, ultraepAllToAllTensors(&t, ULTRAEP_DISPATCH, x->route, NULL));
  t.dataType = ULTRAEP_DATATYPE_DEFAULT;
  t.recvWeights = odd ? NULL : (float *)(void *)(s + 65536);
  MISUSE(self, ultraepAllToAllTensors(&t, ULTRAEP_DISPATCH, x->route, NULL));
  if (odd)
    MISUSE(self, ultraepRouteUpdate(other, NULL, NULL, 0, NULL));
  else
    MISUSE(self, ultraepAllToAll(p, s, ULTRAEP_DISPATCH, x->route, NULL));
  CHECK_OK(self, ultraepAllToAll(p, s, ULTRAEP_DISPATCH, x->route, NULL));
  CHECK_OK(self, ultraepAllToAll(s, p, ULTRAEP_COMBINE, x->route, NULL));
}

static void exchange_rank(hostRankArg_t *self) {
  ultraepConfig_t config = host_config();
  config.maxRoutes = 2;
  config.maxRecvRows = 64;
  config.combineMode = ULTRAEP_COMBINE_PARTIAL;
  sender_t x = {.plain = aligned_alloc(256, 1 << 20)};
  ultraepRoute_t other;
  void *symmetric;
  int32_t topk[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  memset(x.plain, 0, 1 << 20);
  CHECK_OK(self, ultraepGroupCreateHost(&x.group, self->world, self->rank, &config));
  CHECK_OK(self, ultraepMemAlloc(x.group, &symmetric, 1 << 20));
  x.symmetric = memset(symmetric, 0, 1 << 20);
  CHECK_OK(self, ultraepRouteCreate(x.group, &x.route));
  CHECK_OK(self, ultraepRouteCreate(x.group, &other));
  MISUSE(self, ultraepAllToAll(x.plain, x.symmetric, ULTRAEP_DISPATCH, x.route, NULL)); /* no plan yet */
  CHECK_OK(self, ultraepRouteUpdate(x.route, topk, NULL, 4, NULL));
  CHECK_OK(self, ultraepRouteUpdate(other, topk, NULL, 4, NULL));
  exchange_errors(self, &x, &config);
  tensors_errors(self, &x);
  SYNC(self);
  mismatches(self, &x, other);
  CHECK_OK(self, ultraepGroupDestroy(x.group));
  free(x.plain);
}

static void test_exchange(void **state) {
  (void)state;
  host_run(4, exchange_rank, NULL);
}

static void scales_rank(hostRankArg_t *self) {
  ultraepConfig_t config = host_config();
  config.scaleBytes = 8;
  config.maxRecvRows = 64;
  ultraepGroup_t group;
  ultraepRoute_t route;
  void *s;
  unsigned char *p = aligned_alloc(256, 1 << 20);
  int32_t topk[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  memset(p, 1, 1 << 20);
  CHECK_OK(self, ultraepGroupCreateHost(&group, self->world, self->rank, &config));
  CHECK_OK(self, ultraepMemAlloc(group, &s, 1 << 20));
  CHECK_OK(self, ultraepRouteCreate(group, &route));
  CHECK_OK(self, ultraepRouteUpdate(route, topk, NULL, 4, NULL));
  MISUSE(self, ultraepAllToAll(p, s, ULTRAEP_DISPATCH, route, NULL));
  ultraepTensors_t t = ULTRAEP_TENSORS_INITIALIZER;
  t.sendbuff = p;
  t.recvbuff = s;
  t.sendScales = p + 65536;
  BAD(self, ultraepAllToAllTensors(&t, ULTRAEP_DISPATCH, route, NULL));
  t.recvScales = p + 65536 * 2; /* not symmetric */
  BAD(self, ultraepAllToAllTensors(&t, ULTRAEP_DISPATCH, route, NULL));
  t.recvScales = (unsigned char *)s + 65536;
  t.sendScales = NULL;
  BAD(self, ultraepAllToAllTensors(&t, ULTRAEP_DISPATCH, route, NULL));
  t.recvScales = NULL; /* no scales in this call */
  CHECK_OK(self, ultraepAllToAllTensors(&t, ULTRAEP_DISPATCH, route, NULL));
  /* The bytes that cross: 8 assignments a rank, half of them to the other one; now with scales. */
  ultraepCounters_t before, after;
  ultraepPlan_t plan;
  CHECK_OK(self, ultraepRoutePlan(route, &plan));
  CHECK(self, plan.localAssignments == 8);
  CHECK_OK(self, ultraepGroupCounters(group, &before));
  CHECK(self, before.dispatchBytes == 4 * 64);
  t.sendScales = p + 65536;
  t.recvScales = (unsigned char *)s + 65536;
  CHECK_OK(self, ultraepAllToAllTensors(&t, ULTRAEP_DISPATCH, route, NULL));
  CHECK_OK(self, ultraepGroupCounters(group, &after));
  CHECK(self, after.dispatchBytes - before.dispatchBytes == 4 * (64 + 8) && after.combineBytes == 0);
  CHECK_OK(self, ultraepGroupDestroy(group));
  free(p);
}

static void test_scales(void **state) {
  (void)state;
  host_run(2, scales_rank, NULL);
}

/* Counters of the modes that carry a token once: token 0 has both experts on rank 1, token 1 one on each
 * rank. */
static void once_rank(hostRankArg_t *self) {
  ultraepConfig_t config = host_config();
  config.nSlots = 0;
  config.dispatchMode = ULTRAEP_DISPATCH_ONCE;
  config.combineMode = ULTRAEP_COMBINE_PARTIAL;
  ultraepGroup_t group;
  ultraepRoute_t route;
  void *s;
  unsigned char *p = aligned_alloc(256, 4096);
  int32_t topk[4] = {4, 7, 0, 5};
  memset(p, 0, 4096);
  CHECK_OK(self, ultraepGroupCreateHost(&group, self->world, self->rank, &config));
  CHECK_OK(self, ultraepMemAlloc(group, &s, 1 << 20));
  CHECK_OK(self, ultraepRouteCreate(group, &route));
  CHECK_OK(self, ultraepRouteUpdate(route, topk, NULL, 2, NULL));
  CHECK_OK(self, ultraepAllToAll(p, s, ULTRAEP_DISPATCH, route, NULL));
  CHECK_OK(self, ultraepAllToAll(s, p, ULTRAEP_COMBINE, route, NULL));
  ultraepCounters_t counters;
  CHECK_OK(self, ultraepGroupCounters(group, &counters));
  int64_t rows = self->rank == 0 ? 2 : 1;
  CHECK(self, counters.dispatchBytes == rows * 64 && counters.combineBytes == rows * 64);
  CHECK_OK(self, ultraepGroupDestroy(group));
  free(p);
}

static void test_once(void **state) {
  (void)state;
  host_run(2, once_rank, NULL);
}

/* ---- experts ---- */

static void bad_experts(hostRankArg_t *self, ultraepGroup_t group, const ultraepExperts_t *good) {
  ultraepExperts_t x;
  unsigned char plain[64];
  BAD(self, ultraepExpertsRegister(NULL, 0, good));
  BAD(self, ultraepExpertsRegister(group, -1, good));
  BAD(self, ultraepExpertsRegister(group, 0, NULL));
#define EXPERTS(field, value)                                                                                \
  x = *good;                                                                                                 \
  x.field = value;                                                                                           \
  BAD(self, ultraepExpertsRegister(group, 0, &x))
  EXPERTS(magic, 0);
  EXPERTS(size, 0);
  EXPERTS(version, 0);
  EXPERTS(nWeights, 0);
  EXPERTS(nWeights, ULTRAEP_MAX_TENSORS + 1);
  EXPERTS(nGrads, -1);
  EXPERTS(nGrads, ULTRAEP_MAX_TENSORS + 1);
  EXPERTS(weights[0].master, NULL);
  EXPERTS(weights[0].master, (unsigned char *)good->weights[0].master + 8);
  EXPERTS(weights[0].master, plain + (16 - (uintptr_t)plain % 16) % 16);
  EXPERTS(weights[0].bytes, 0);
  EXPERTS(weights[0].bytes, 24);
  EXPERTS(weights[0].bytes, 1 << 20);
  EXPERTS(weights[0].bytes, (size_t)1 << 41);
  EXPERTS(weights[0].reserved, 1);
  EXPERTS(grads[0].master, NULL);
  EXPERTS(grads[0].dataType, ULTRAEP_FLOAT16);
#undef EXPERTS
}

static void experts_rank(hostRankArg_t *self) {
  ultraepConfig_t config = host_config();
  config.maxRoutes = 2;
  ultraepGroup_t group;
  ultraepRoute_t route, other;
  void *s;
  unsigned char *grads = aligned_alloc(16, 4 * 64);
  CHECK_OK(self, ultraepGroupCreateHost(&group, self->world, self->rank, &config));
  CHECK_OK(self, ultraepMemAlloc(group, &s, 4096));
  CHECK_OK(self, ultraepRouteCreate(group, &route));
  CHECK_OK(self, ultraepRouteCreate(group, &other));
  memset(s, 0, 4096);
  memset(grads, 0, 4 * 64);
  ultraepExperts_t good = ULTRAEP_EXPERTS_INITIALIZER, x;
  good.nWeights = good.nGrads = 1;
  good.weights[0] = (ultraepExpertTensor_t){.master = s, .bytes = 64};
  good.grads[0] = (ultraepExpertTensor_t){.master = grads, .bytes = 64, .dataType = ULTRAEP_FLOAT32};
  bad_experts(self, group, &good);
  SYNC(self);
  bool odd = self->rank == 1;
  x = good;
  x.weights[0].bytes = odd ? 32 : 64;
  MISUSE(self, ultraepExpertsRegister(group, 0, &x)); /* ranks differ */
  x = good;
  x.weights[0].master = (unsigned char *)s + (odd ? 1024 : 0);
  MISUSE(self, ultraepExpertsRegister(group, 0, &x));
  MISUSE(self, ultraepExpertsRegister(group, odd, &good));
  CHECK_OK(self, ultraepExpertsRegister(group, 0, &good));
  CHECK_OK(self, ultraepExpertsRegister(group, 5, &good));
  CHECK_OK(self, ultraepExpertsRegister(group, 5, &good)); /* replaces */
  x = good;
  x.nGrads = 0;
  MISUSE(self, ultraepExpertsRegister(group, 1, &x)); /* other shapes than the first */

  BAD(self, ultraepWeightsSync(NULL, 0, NULL));
  BAD(self, ultraepWeightsSync(route, -1, NULL));
  MISUSE(self, ultraepWeightsSync(route, 1, NULL));
  MISUSE(self, ultraepWeightsSync(route, 0, NULL)); /* no plan */
  MISUSE(self, ultraepGradsReduce(route, 0, NULL));
  CHECK_OK(self, ultraepRouteUpdate(route, NULL, NULL, 0, NULL));
  CHECK_OK(self, ultraepRouteUpdate(other, NULL, NULL, 0, NULL));
  BAD(self, ultraepGradsReduce(NULL, 0, NULL));
  MISUSE(self, ultraepGradsReduce(route, 1, NULL));
  MISUSE(self, ultraepWeightsSync(odd ? other : route, 0, NULL));
  MISUSE(self, ultraepWeightsSync(route, odd ? 5 : 0, NULL));
  if (odd)
    MISUSE(self, ultraepGradsReduce(route, 0, NULL));
  else
    MISUSE(self, ultraepWeightsSync(route, 0, NULL));
  CHECK_OK(self, ultraepWeightsSync(route, 0, NULL));
  CHECK_OK(self, ultraepGradsReduce(route, 5, NULL));
  CHECK_OK(self, ultraepMemFree(group, s)); /* takes the layers with it */
  MISUSE(self, ultraepWeightsSync(route, 0, NULL));
  MISUSE(self, ultraepWeightsSync(route, 5, NULL));
  CHECK_OK(self, ultraepGroupDestroy(group));
  free(grads);
}

static void test_experts(void **state) {
  (void)state;
  host_run(2, experts_rank, NULL);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_exchange),
      cmocka_unit_test(test_scales),
      cmocka_unit_test(test_once),
      cmocka_unit_test(test_experts),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
