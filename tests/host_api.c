/* The public calls one by one: messages, worlds, groups, regions and routes, with good and bad arguments. */
#include "error.h"
#include "host_common.h"
#include "sanitized.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define BAD(self, call) CHECK_IS(self, call, ultraepInvalidArgument)
#define MISUSE(self, call) CHECK_IS(self, call, ultraepInvalidUsage)
#define assert_code(call, code) assert_int_equal((call), (code))

/* ---- messages ---- */

static void test_messages(void **state) {
  (void)state;
  int version = 0;
  assert_string_equal(ultraepGetLastError(), "");
  assert_code(ultraepGetVersion(&version), ultraepSuccess);
  assert_int_equal(version, ULTRAEP_VERSION_CODE);
  assert_code(ultraepGetVersion(NULL), ultraepInvalidArgument);
  assert_string_not_equal(ultraepGetLastError(), "");
  for (int code = -1; code <= ultraepCapacityExceeded + 1; code++) {
    const char *text = ultraepGetErrorString((ultraepResult_t)code);
    bool known = (code >= 0 && code <= 8) || code == ultraepCapacityExceeded;
    assert_non_null(text);
    assert_int_equal(strcmp(text, ultraepGetErrorString((ultraepResult_t)-1)) != 0, known);
  }
  /* A message may be made from the last one. */
  (void)error_set(ultraepInternalError, "inner");
  (void)error_set(ultraepInternalError, "outer: %s", ultraepGetLastError());
  assert_string_equal(ultraepGetLastError(), "outer: inner");
  assert_string_equal(error_text(), "outer: inner");
}

static void test_world(void **state) {
  (void)state;
  ultraepHostWorld_t world = NULL;
  char other[256] = {0};
  assert_code(ultraepHostWorldCreate(NULL, 1), ultraepInvalidArgument);
  assert_code(ultraepHostWorldCreate(&world, 0), ultraepInvalidArgument);
  assert_code(ultraepHostWorldCreate(&world, ULTRAEP_MAX_RANKS + 1), ultraepInvalidArgument);
  assert_null(world);
  assert_code(ultraepHostWorldDestroy(NULL), ultraepInvalidArgument);
  assert_code(ultraepHostWorldDestroy((ultraepHostWorld_t)(void *)other), ultraepInvalidArgument);
  assert_code(ultraepHostWorldCreate(&world, ULTRAEP_MAX_RANKS), ultraepSuccess);
  assert_code(ultraepHostWorldDestroy(world), ultraepSuccess);
}

/* ---- groups ---- */

static void create_rank(hostRankArg_t *self) {
  ultraepConfig_t config = host_config();
  ultraepGroup_t group = NULL;
  ultraepGroupProperties_t properties;
  ultraepCounters_t counters;
  ultraepStatus_t status;
  char other[256] = {0};
  ultraepGroup_t fake = (ultraepGroup_t)(void *)other;
  BAD(self, ultraepGroupCreateHost(NULL, self->world, self->rank, &config));
  BAD(self, ultraepGroupCreateHost(&group, NULL, self->rank, &config));
  BAD(self, ultraepGroupCreateHost(&group, (ultraepHostWorld_t)(void *)other, self->rank, &config));
  BAD(self, ultraepGroupCreateHost(&group, self->world, -1, &config));
  BAD(self, ultraepGroupCreateHost(&group, self->world, self->nRanks, &config));
  BAD(self, ultraepGroupCreateHost(&group, self->world, self->rank, NULL));
  CHECK(self, !group);
  CHECK_OK(self, ultraepGroupCreateHost(&group, self->world, self->rank, &config));
  BAD(self, ultraepGroupProperties(NULL, &properties));
  BAD(self, ultraepGroupProperties(fake, &properties));
  BAD(self, ultraepGroupProperties(group, NULL));
  BAD(self, ultraepGroupCounters(NULL, &counters));
  BAD(self, ultraepGroupCounters(group, NULL));
  BAD(self, ultraepGroupStatus(NULL, &status));
  BAD(self, ultraepGroupAbort(NULL));
  BAD(self, ultraepGroupAbort(fake));
  BAD(self, ultraepGroupDestroy(fake));
  CHECK_OK(self, ultraepGroupStatus(group, NULL));
  CHECK_OK(self, ultraepGroupStatus(group, &status));
  CHECK(self, status.code == ultraepSuccess && status.missingRank == -1 && status.phase[0] == 0);
  CHECK_OK(self, ultraepGroupProperties(group, &properties));
  CHECK(self, properties.rank == self->rank && properties.nRanks == 2 && properties.nDomainRanks == 2);
  CHECK(self, properties.nLocalInstances == 4 + 2 && properties.maxRecvRows == 2 * 64);
  CHECK(self, properties.windowBytes > 0 && properties.privateBytes > 0 && properties.slotBytes == 0);
  MISUSE(self, ultraepHostWorldDestroy(self->world));
  SYNC(self);
  CHECK_OK(self, ultraepGroupDestroy(group));
  CHECK_OK(self, ultraepGroupDestroy(NULL));
}

static void test_group(void **state) {
  (void)state;
  host_run(2, create_rank, NULL);
  ultraepGroup_t group = NULL;
  ultraepConfig_t config = host_config();
  ncclComm_t comm = (ncclComm_t)(void *)&config;
  assert_code(ultraepGroupCreate(NULL, comm, &config), ultraepInvalidArgument);
  assert_code(ultraepGroupCreate(&group, NULL, &config), ultraepInvalidArgument);
  assert_code(ultraepGroupCreate(&group, comm, NULL), ultraepInvalidArgument);
  assert_code(ultraepGroupCreate(&group, comm, &config), ultraepInvalidUsage);
  assert_non_null(strstr(ultraepGetLastError(), "NCCL"));
}

static void differing_rank(hostRankArg_t *self) {
  ultraepConfig_t config = host_config();
  ultraepGroup_t group = NULL, again = NULL;
  if (self->rank == 2) config.nSlots++;
  BAD(self, ultraepGroupCreateHost(&group, self->world, self->rank, &config));
  CHECK(self, !group && strstr(ultraepGetLastError(), "nSlots") && strstr(ultraepGetLastError(), "2"));
  config = host_config(); /* the world works on, and holds several groups */
  CHECK_OK(self, ultraepGroupCreateHost(&group, self->world, self->rank, &config));
  config.dispatchMode = ULTRAEP_DISPATCH_ONCE;
  CHECK_OK(self, ultraepGroupCreateHost(&again, self->world, self->rank, &config));
  void *a, *b;
  CHECK_OK(self, ultraepMemAlloc(again, &b, 64));
  CHECK_OK(self, ultraepMemAlloc(group, &a, 64));
  CHECK_OK(self, ultraepGroupDestroy(group));
  CHECK_OK(self, ultraepMemFree(again, b));
  CHECK_OK(self, ultraepGroupDestroy(again));
}

static void test_groups(void **state) {
  (void)state;
  host_run(4, differing_rank, NULL);
}

/* Memory that nobody has: the rank without it says so, the others name it. */
static void huge_rank(hostRankArg_t *self) {
  ultraepConfig_t config = host_config();
  config.combineMode = ULTRAEP_COMBINE_PARTIAL;
  config.hidden = 1 << 19;
  config.maxRecvRows = INT32_MAX;
  config.timeoutMs = 200;
  ultraepGroup_t group = NULL;
  ultraepResult_t result = ultraepGroupCreateHost(&group, self->world, self->rank, &config);
  CHECK(self, result == ultraepSystemError || result == ultraepRemoteError);
  CHECK(self, !group);
}

static void test_huge(void **state) {
  (void)state;
  if (SANITIZED) skip();
  host_run(2, huge_rank, NULL);
}

/* ---- symmetric memory ---- */

static void memory_rank(hostRankArg_t *self) {
  ultraepConfig_t config = host_config();
  ultraepGroup_t group;
  void *ptr = NULL, *second, *none = NULL;
  unsigned char *mine = aligned_alloc(256, 4096);
  CHECK_OK(self, ultraepGroupCreateHost(&group, self->world, self->rank, &config));
  BAD(self, ultraepMemAlloc(NULL, &ptr, 64));
  BAD(self, ultraepMemAlloc(group, NULL, 64));
  BAD(self, ultraepMemAlloc(group, &ptr, 0));
  BAD(self, ultraepMemAlloc(group, &ptr, SIZE_MAX));
  BAD(self, ultraepMemRegister(NULL, mine, 64));
  BAD(self, ultraepMemRegister(group, NULL, 64));
  BAD(self, ultraepMemRegister(group, mine + 8, 64));
  BAD(self, ultraepMemRegister(group, mine, 0));
  BAD(self, ultraepMemRegister(group, mine, SIZE_MAX));
  BAD(self, ultraepMemFree(NULL, mine));
  BAD(self, ultraepMemFree(group, NULL));
  BAD(self, ultraepMemFree(group, mine));
  CHECK_OK(self, ultraepMemAlloc(group, &ptr, 1000));
  CHECK(self, (uintptr_t)ptr % 256 == 0);
  memset(ptr, self->rank, 1000);
  BAD(self, ultraepMemRegister(group, (unsigned char *)ptr + 16, 16));
  BAD(self, ultraepMemFree(group, (unsigned char *)ptr + 16));
  CHECK_OK(self, ultraepMemRegister(group, mine, 4096));
  BAD(self, ultraepMemRegister(group, mine, 4096));
  /* Sizes that differ: no effect on any rank, and the group works on. */
  MISUSE(self, ultraepMemAlloc(group, &none, self->rank == 1 ? 128 : 64));
  CHECK(self, !none);
  CHECK_OK(self, ultraepMemFree(group, ptr));
  CHECK_OK(self, ultraepMemAlloc(group, &ptr, 64));
  CHECK_OK(self, ultraepMemAlloc(group, &second, 64));
  MISUSE(self, ultraepMemFree(group, self->rank == 1 ? second : ptr));
  CHECK_OK(self, ultraepMemFree(group, second));
  CHECK_OK(self, ultraepMemFree(group, mine));
  CHECK_OK(self, ultraepMemRegister(group, mine, 2048)); /* stays registered until the group goes */
  /* Ranks in different calls: found before anything happens. */
  if (self->rank == 0)
    MISUSE(self, ultraepMemAlloc(group, &none, 64));
  else
    MISUSE(self, ultraepMemFree(group, mine));
  CHECK(self,
        strstr(ultraepGetLastError(), "ultraepMemAlloc") && strstr(ultraepGetLastError(), "ultraepMemFree"));
  CHECK_OK(self, ultraepGroupDestroy(group));
  free(mine);
}

static void test_memory(void **state) {
  (void)state;
  host_run(4, memory_rank, NULL);
}

/* ---- routes ---- */

static void routes_rank(hostRankArg_t *self) {
  ultraepConfig_t config = host_config();
  config.maxRoutes = 3;
  ultraepGroup_t group;
  ultraepRoute_t routes[4] = {NULL};
  ultraepSegments_t segments;
  ultraepPlan_t plan;
  int32_t topk[4] = {0, 1, 2, 3};
  char other[256] = {0};
  CHECK_OK(self, ultraepGroupCreateHost(&group, self->world, self->rank, &config));
  BAD(self, ultraepRouteCreate(NULL, &routes[0]));
  BAD(self, ultraepRouteCreate(group, NULL));
  BAD(self, ultraepRouteDestroy(NULL));
  BAD(self, ultraepRouteDestroy((ultraepRoute_t)(void *)other));
  ultraepGroupProperties_t before, after;
  CHECK_OK(self, ultraepGroupProperties(group, &before));
  for (int i = 0; i < 3; i++) CHECK_OK(self, ultraepRouteCreate(group, &routes[i]));
  MISUSE(self, ultraepRouteCreate(group, &routes[3]));
  CHECK(self, !routes[3]);
  CHECK_OK(self, ultraepGroupProperties(group, &after));
  CHECK(self, after.privateBytes > before.privateBytes && after.windowBytes == before.windowBytes);
  CHECK_OK(self, ultraepRouteDestroy(routes[1]));
  CHECK_OK(self, ultraepRouteCreate(group, &routes[1]));

  BAD(self, ultraepRouteSegments(NULL, &segments));
  BAD(self, ultraepRouteSegments(routes[0], NULL));
  BAD(self, ultraepRoutePlan(NULL, &plan));
  BAD(self, ultraepRoutePlan(routes[0], NULL));
  MISUSE(self, ultraepRoutePlan(routes[0], &plan));
  CHECK_OK(self, ultraepRouteSegments(routes[0], &segments));
  CHECK(self, segments.nSegments == 4 + 2 && *segments.totalRows == 0);
  for (int i = 0; i < 6; i++) {
    CHECK(self, segments.rows[i] == 0 && segments.firstRow[i] == 0);
    CHECK(self, segments.expert[i] == (i < 4 ? self->rank * 4 + i : -1));
  }

  BAD(self, ultraepRouteUpdate(NULL, topk, NULL, 1, NULL));
  BAD(self, ultraepRouteUpdate(routes[0], topk, NULL, -1, NULL));
  BAD(self, ultraepRouteUpdate(routes[0], topk, NULL, config.maxTokens + 1, NULL));
  BAD(self, ultraepRouteUpdate(routes[0], NULL, NULL, 1, NULL));
  CHECK_OK(self, ultraepRouteUpdate(routes[0], topk, NULL, 2, NULL));
  CHECK_OK(self, ultraepRoutePlan(routes[0], &plan));
  CHECK(self, plan.total == 8 && plan.nRanks == 2 && plan.maxPlanned <= plan.maxBefore);
  ultraepSegments_t again;
  CHECK_OK(self, ultraepRouteSegments(routes[0], &again));
  CHECK(self, memcmp(&again, &segments, sizeof(again)) == 0);
  MISUSE(self, ultraepRouteUpdate(self->rank ? routes[0] : routes[2], topk, NULL, 2, NULL));
  CHECK_OK(self, ultraepRoutePlan(routes[0], &plan)); /* as before the call that had no effect */
  CHECK_OK(self, ultraepRouteDestroy(routes[2]));
  CHECK_OK(self, ultraepGroupDestroy(group)); /* with two routes */
}

static void test_routes(void **state) {
  (void)state;
  host_run(2, routes_rank, NULL);
}

/* Bad entries, weights on some ranks only, too many rows: alike on all ranks, and the route is good again
 * after. */
static void route_errors_rank(hostRankArg_t *self) {
  ultraepConfig_t config = host_config();
  config.maxRecvRows = 20;
  config.nSlots = 0;
  ultraepGroup_t group;
  ultraepRoute_t route;
  ultraepSegments_t s;
  int32_t good[16], bad[16], heavy[16];
  float weights[16] = {0};
  for (int i = 0; i < 16; i++) {
    good[i] = bad[i] = i % 8;
    heavy[i] = 7;
  }
  CHECK_OK(self, ultraepGroupCreateHost(&group, self->world, self->rank, &config));
  CHECK_OK(self, ultraepRouteCreate(group, &route));
  CHECK_OK(self, ultraepRouteSegments(route, &s));
  for (int round = 0; round < 4; round++) {
    CHECK_OK(self, ultraepRouteUpdate(route, good, weights, 8, NULL));
    CHECK(self, *s.totalRows == 16);
    bad[5] = round % 2 ? 8 : -2;
    ultraepResult_t result = ultraepRouteUpdate(route, self->rank == 3 ? bad : good, weights, 8, NULL);
    CHECK(self, result == (self->rank == 3 ? ultraepInvalidArgument : ultraepRemoteError));
    CHECK(self, strstr(ultraepGetLastError(), self->rank == 3 ? "topkIdx[2][1]" : "rank 3"));
    CHECK(self, *s.totalRows == 0 && s.rows[0] == 0);
    ultraepPlan_t plan;
    MISUSE(self, ultraepRoutePlan(route, &plan));

    CHECK_OK(self, ultraepRouteUpdate(route, good, NULL, 8, NULL));
    MISUSE(self, ultraepRouteUpdate(route, good, self->rank == 2 ? NULL : weights, 8, NULL));
    CHECK_OK(self, ultraepRoutePlan(route, &plan)); /* no effect */
    /* A rank without tokens takes no side. */
    CHECK_OK(self, ultraepRouteUpdate(route, good, self->rank == 2 ? NULL : weights, self->rank == 2 ? 0 : 8,
                                      NULL));

    CHECK_IS(self, ultraepRouteUpdate(route, heavy, weights, 8, NULL), ultraepCapacityExceeded);
    CHECK(self, strstr(ultraepGetLastError(), "rank 3") && strstr(ultraepGetLastError(), "64") &&
                    strstr(ultraepGetLastError(), "20"));
    CHECK(self, *s.totalRows == 0);
    MISUSE(self, ultraepRoutePlan(route, &plan));
    CHECK_OK(self, ultraepGroupStatus(group, NULL));
  }
  CHECK_OK(self, ultraepGroupDestroy(group));
}

static void test_route_errors(void **state) {
  (void)state;
  host_run(4, route_errors_rank, NULL);
}

/* An update and its dispatch in one call give what two calls give, and fail alike without moving a row. */
static void route_dispatch_rank(hostRankArg_t *self) {
  enum { TOKENS = 24, ROWS = 200 };
  ultraepConfig_t config = host_config();
  config.dataType = ULTRAEP_FLOAT32;
  config.maxRecvRows = ROWS;
  ultraepGroup_t group;
  ultraepRoute_t route;
  ultraepTensors_t tensors = ULTRAEP_TENSORS_INITIALIZER;
  int32_t topk[2 * TOKENS];
  float weights[2 * TOKENS], *rows[2], *rowWeights[2], tokens[TOKENS][32];
  size_t rowBytes = sizeof(tokens[0]);
  CHECK_OK(self, ultraepGroupCreateHost(&group, self->world, self->rank, &config));
  CHECK_OK(self, ultraepRouteCreate(group, &route));
  for (int i = 0; i < 2; i++) {
    CHECK_OK(self, ultraepMemAlloc(group, (void **)&rows[i], ROWS * rowBytes));
    CHECK_OK(self, ultraepMemAlloc(group, (void **)&rowWeights[i], ROWS * sizeof(float)));
    memset(rows[i], 0xa5, ROWS * rowBytes);
    memset(rowWeights[i], 0xa5, ROWS * sizeof(float));
  }
  for (int i = 0; i < 2 * TOKENS; i++) {
    topk[i] = (i * i + self->rank) % 5 - 1;
    weights[i] = (float)(i + 1 + self->rank);
  }
  for (int i = 0; i < TOKENS * 32; i++) tokens[i / 32][i % 32] = (float)(i + 1000 * self->rank);
  tensors.sendbuff = tokens;
  tensors.recvbuff = rows[0];
  tensors.recvWeights = rowWeights[0];
  BAD(self, ultraepRouteDispatch(NULL, topk, weights, TOKENS, &tensors, NULL));
  BAD(self, ultraepRouteDispatch(route, NULL, weights, TOKENS, &tensors, NULL));
  BAD(self, ultraepRouteDispatch(route, topk, weights, -1, &tensors, NULL));
  BAD(self, ultraepRouteDispatch(route, topk, weights, TOKENS, NULL, NULL));
  tensors.recvbuff = tokens;
  BAD(self, ultraepRouteDispatch(route, topk, weights, TOKENS, &tensors, NULL));
  tensors.recvbuff = rows[0];
  MISUSE(self, ultraepAllToAllTensors(&tensors, ULTRAEP_DISPATCH, route, NULL)); /* never updated */
  CHECK_OK(self, ultraepRouteDispatch(route, topk, weights, TOKENS, &tensors, NULL));
  CHECK_OK(self, ultraepRouteUpdate(route, topk, weights, TOKENS, NULL));
  tensors.recvbuff = rows[1];
  tensors.recvWeights = rowWeights[1];
  CHECK_OK(self, ultraepAllToAllTensors(&tensors, ULTRAEP_DISPATCH, route, NULL));
  CHECK(self, memcmp(rows[0], rows[1], ROWS * rowBytes) == 0);
  CHECK(self, memcmp(rowWeights[0], rowWeights[1], ROWS * sizeof(float)) == 0);
  memset(rows[1], 0xa5, ROWS * rowBytes);
  int32_t entry = topk[3];
  if (self->rank == 1) topk[3] = 8;
  CHECK_IS(self, ultraepRouteDispatch(route, topk, weights, TOKENS, &tensors, NULL),
           self->rank == 1 ? ultraepInvalidArgument : ultraepRemoteError);
  const unsigned char *bytes = (const unsigned char *)rows[1];
  for (size_t i = 0; i < ROWS * rowBytes; i++) CHECK(self, bytes[i] == 0xa5);
  topk[3] = entry;
  CHECK_OK(self, ultraepRouteDispatch(route, topk, weights, TOKENS, &tensors, NULL));
  CHECK(self, memcmp(rows[0], rows[1], ROWS * rowBytes) == 0);
  CHECK_OK(self, ultraepGroupDestroy(group));
}

static void test_route_dispatch(void **state) {
  (void)state;
  host_run(4, route_dispatch_rank, NULL);
}

/* Padding counts: 8 segments of one row each fit or not by their alignment alone. */
static void padding_rank(hostRankArg_t *self) {
  ultraepConfig_t config = host_config();
  config.topK = 1;
  config.nSlots = 0;
  config.alignment = 16;
  config.maxRecvRows = *(int64_t *)self->arg;
  ultraepGroup_t group;
  ultraepRoute_t route;
  int32_t topk[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  CHECK_OK(self, ultraepGroupCreateHost(&group, self->world, self->rank, &config));
  CHECK_OK(self, ultraepRouteCreate(group, &route));
  CHECK_IS(self, ultraepRouteUpdate(route, topk, NULL, 8, NULL),
           config.maxRecvRows < 128 ? ultraepCapacityExceeded : ultraepSuccess);
  CHECK_OK(self, ultraepGroupDestroy(group));
}

static void test_padding(void **state) {
  (void)state;
  for (int64_t rows = 127; rows <= 128; rows++) host_run(1, padding_rank, &rows);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_messages), cmocka_unit_test(test_world),
      cmocka_unit_test(test_group),    cmocka_unit_test(test_groups),
      cmocka_unit_test(test_huge),     cmocka_unit_test(test_memory),
      cmocka_unit_test(test_routes),   cmocka_unit_test(test_route_errors),
      cmocka_unit_test(test_padding),  cmocka_unit_test(test_route_dispatch),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
