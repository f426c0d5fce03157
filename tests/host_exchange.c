/* Dispatch and combine on random shapes, against the oracle: every type, mode, skew, with zero-token ranks,
 * unused entries, repeated experts and poisoned outputs; direct and once bitwise equal; two runs bitwise
 * equal. */
#include "host_common.h"
#include "sanitized.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define UPDATES 2 /* of each route: the second must not see anything of the first */
#define ROUTES 2

typedef struct {
  ultraepConfig_t config;
  int nRanks;
  bool weights;
  int combineType; /* of the rows that come back; the tokens' type where that adds */
  oracleCase_t cases[ROUTES][UPDATES];
  oracleView_t views[ORACLE_MAX_RANKS];
  unsigned char *tokens[ORACLE_MAX_RANKS];
  uint64_t hashes[ORACLE_MAX_RANKS]; /* of everything that a rank received */
} exchange_t;

/* A rank's buffers. */
typedef struct {
  unsigned char *rows, *scales, *rowsOut; /* symmetric */
  float *weights;                         /* symmetric */
  unsigned char *send, *sendScales, *recv;
  int64_t maxRecvRows;
  size_t rowBytes, scaleBytes;
} buffers_t;

static bool buffers_make(buffers_t *b, ultraepGroup_t group, const exchange_t *x) {
  const oracleCase_t *c = &x->cases[0][0];
  ultraepGroupProperties_t properties;
  if (ultraepGroupProperties(group, &properties) != ultraepSuccess) return false;
  *b = (buffers_t){
      .maxRecvRows = properties.maxRecvRows, .rowBytes = c->rowBytes, .scaleBytes = c->scaleBytes};
  size_t nRows = (size_t)b->maxRecvRows, nTokens = (size_t)x->config.maxTokens;
  void *rows, *rowsOut, *scales = NULL, *weights;
  if (ultraepMemAlloc(group, &rows, nRows * b->rowBytes) != ultraepSuccess ||
      ultraepMemAlloc(group, &rowsOut, nRows * b->rowBytes) != ultraepSuccess ||
      ultraepMemAlloc(group, &weights, nRows * sizeof(float)) != ultraepSuccess ||
      (b->scaleBytes && ultraepMemAlloc(group, &scales, nRows * b->scaleBytes) != ultraepSuccess))
    return false;
  b->rows = rows;
  b->rowsOut = rowsOut;
  b->scales = scales;
  b->weights = weights;
  b->send = aligned_alloc(16, nTokens * b->rowBytes + 16);
  b->sendScales = aligned_alloc(16, (nTokens * b->scaleBytes + 31) / 16 * 16);
  b->recv = aligned_alloc(16, nTokens * b->rowBytes + 16);
  return b->send && b->sendScales && b->recv;
}

static void buffers_free(buffers_t *b) {
  free(b->send);
  free(b->sendScales);
  free(b->recv);
}

static void exchange_hash(hostRankArg_t *self, const void *bytes, size_t n) {
  exchange_t *x = self->arg;
  x->hashes[self->rank] = host_hash(x->hashes[self->rank], bytes, n);
}

static void exchange_dispatch(hostRankArg_t *self, oracleCase_t *c, buffers_t *b, ultraepRoute_t route) {
  exchange_t *x = self->arg;
  size_t nRows = (size_t)b->maxRecvRows;
  memset(b->rows, ORACLE_POISON, nRows * b->rowBytes);
  memset(b->weights, ORACLE_POISON, nRows * sizeof(float));
  if (b->scales) memset(b->scales, ORACLE_POISON, nRows * b->scaleBytes);
  for (int t = 0; t < c->nTokens[self->rank]; t++) {
    oracle_fill_token(c, self->rank, t, b->send + (size_t)t * b->rowBytes);
    oracle_fill_scales(c, self->rank, t, b->sendScales + (size_t)t * b->scaleBytes);
  }
  SYNC(self);
  bool none = c->nTokens[self->rank] == 0;
  ultraepTensors_t tensors = ULTRAEP_TENSORS_INITIALIZER;
  tensors.sendbuff = none ? NULL : b->send;
  tensors.recvbuff = b->rows;
  tensors.sendScales = b->scales && !none ? b->sendScales : NULL;
  tensors.recvScales = b->scales;
  tensors.recvWeights = b->weights;
  CHECK_OK(self, ultraepAllToAllTensors(&tensors, ULTRAEP_DISPATCH, route, NULL));

  oracleView_t *view = &x->views[self->rank];
  *view = (oracleView_t){
      .maxRecvRows = b->maxRecvRows, .rows = b->rows, .scales = b->scales, .weights = b->weights};
  CHECK_OK(self, ultraepRouteSegments(route, &view->segments));
  exchange_hash(self, b->rows, nRows * b->rowBytes);
  exchange_hash(self, b->weights, nRows * sizeof(float));
  if (b->scales) exchange_hash(self, b->scales, nRows * b->scaleBytes);
  SYNC(self);
  if (self->rank == 0) {
    char why[256] = "";
    bool good = oracle_check_dispatch(c, x->views, why);
    if (!good) host_fail(self, __FILE__, __LINE__, "%s", why);
  }
  SYNC(self);
}

static void exchange_run_experts(const oracleCase_t *c, const oracleView_t *view, buffers_t *b) {
  memset(b->rowsOut, ORACLE_POISON, (size_t)b->maxRecvRows * b->rowBytes);
  for (int i = 0; i < view->segments.nSegments; i++)
    for (int64_t r = 0; r < view->segments.rows[i]; r++) {
      size_t at = (size_t)(view->segments.firstRow[i] + r) * b->rowBytes;
      oracle_expert(c, view->segments.expert[i], b->rows + at, b->rowsOut + at);
    }
}

static void exchange_combine(hostRankArg_t *self, const oracleCase_t *c, buffers_t *b, ultraepRoute_t route,
                             ultraepDirection_t direction) {
  exchange_t *x = self->arg;
  size_t n = (size_t)c->nTokens[self->rank] * b->rowBytes;
  memset(b->recv, ORACLE_POISON, (size_t)x->config.maxTokens * b->rowBytes + 16);
  ultraepTensors_t tensors = ULTRAEP_TENSORS_INITIALIZER;
  tensors.sendbuff = b->rowsOut;
  tensors.recvbuff = n ? b->recv : NULL;
  CHECK_OK(self, ultraepAllToAllTensors(&tensors, direction, route, NULL));
  exchange_hash(self, b->recv, n);
  char why[256] = "";
  bool partial = x->config.combineMode == ULTRAEP_COMBINE_PARTIAL;
  bool good = oracle_check_combine(c, self->rank, b->recv, direction == ULTRAEP_COMBINE, partial, why);
  if (!good) host_fail(self, __FILE__, __LINE__, "direction %d: %s", (int)direction, why);
  for (size_t i = n; i < (size_t)x->config.maxTokens * b->rowBytes + 16; i++)
    CHECK(self, b->recv[i] == ORACLE_POISON);
}

static void exchange_step(hostRankArg_t *self, oracleCase_t *c, buffers_t *b, ultraepRoute_t route) {
  exchange_t *x = self->arg;
  exchange_dispatch(self, c, b, route);
  if (self->team->failed) return;
  if (c->dataType != ULTRAEP_FLOAT8 && c->dataType != ULTRAEP_BYTES) {
    exchange_run_experts(c, &x->views[self->rank], b);
    exchange_combine(self, c, b, route, ULTRAEP_COMBINE);
    exchange_combine(self, c, b, route, ULTRAEP_COMBINE_SUM);
  }
  SYNC(self);
}

static void exchange_rank(hostRankArg_t *self) {
  exchange_t *x = self->arg;
  ultraepGroup_t group;
  ultraepRoute_t routes[ROUTES];
  buffers_t b;
  CHECK_OK(self, ultraepGroupCreateHost(&group, self->world, self->rank, &x->config));
  CHECK(self, buffers_make(&b, group, x));
  for (int i = 0; i < ROUTES; i++) CHECK_OK(self, ultraepRouteCreate(group, &routes[i]));
  for (int u = 0; u < UPDATES; u++) {
    for (int i = 0; i < ROUTES; i++) { /* all routes in flight before the first is used */
      const oracleCase_t *c = &x->cases[i][u];
      int nTokens = c->nTokens[self->rank];
      CHECK_OK(self, ultraepRouteUpdate(routes[i], nTokens ? c->topk[self->rank] : NULL,
                                        c->weights[self->rank], nTokens, NULL));
    }
    for (int i = 0; i < ROUTES; i++) {
      exchange_step(self, &x->cases[i][u], &b, routes[i]);
      SYNC(self);
    }
  }
  buffers_free(&b);
  CHECK_OK(self, ultraepGroupDestroy(group));
}

static void exchange_run(exchange_t *x, uint64_t *hashes) {
  memset(x->hashes, 0, sizeof(x->hashes));
  host_run(x->nRanks, exchange_rank, x);
  memcpy(hashes, x->hashes, sizeof(x->hashes));
}

static int random_rank_multiple(hostRandom_t *random, int nRanks) {
  int most = 256 / nRanks;
  return nRanks * host_random_in(random, 1, host_random_in(random, 0, 1) ? most : most < 4 ? most : 4);
}

static void exchange_make(exchange_t *x, hostRandom_t *random, int maxTokens) {
  static const size_t typeBytes[] = {2, 2, 4, 1, 1};
  *x = (exchange_t){.nRanks = host_random_in(random, 1, 8), .weights = host_random_in(random, 0, 3) != 0};
  ultraepConfig_t *config = &x->config;
  *config = host_config();
  config->nExperts = random_rank_multiple(random, x->nRanks);
  config->topK = host_random_in(random, 1, host_random_in(random, 0, 3) ? 8 : 16);
  config->maxTokens = maxTokens;
  config->dataType = host_random_in(random, 0, 4);
  int units = host_random_in(random, 0, 3) ? host_random_in(random, 1, 9) : host_random_in(random, 60, 80);
  config->hidden = (int)(16 / typeBytes[config->dataType]) * units;
  config->scaleBytes = host_random_in(random, 0, 1) ? 4 * host_random_in(random, 1, 8) : 0;
  config->nSlots = host_random_in(random, 0, 4);
  config->balance = host_random_in(random, 0, 7) != 0;
  config->alignment = host_random_in(random, 0, 1) ? 1 : host_random_in(random, 1, 128);
  config->combineMode = host_random_in(random, 0, 1);
  config->maxRoutes = ROUTES;
  config->maxRecvRows = (int64_t)x->nRanks * config->maxTokens * config->topK +
                        (int64_t)(config->nExperts / x->nRanks + config->nSlots) * (config->alignment - 1);
  for (int i = 0; i < ROUTES; i++)
    for (int u = 0; u < UPDATES; u++) {
      oracleCase_t *c = &x->cases[i][u];
      *c = (oracleCase_t){.nRanks = x->nRanks,
                          .nExperts = config->nExperts,
                          .topK = config->topK,
                          .nSlots = config->nSlots,
                          .alignment = config->alignment,
                          .hidden = config->hidden,
                          .dataType = config->dataType,
                          .rowBytes = (size_t)config->hidden * typeBytes[config->dataType],
                          .scaleBytes = (size_t)config->scaleBytes,
                          .seed = host_random(random)};
      host_make_routing(c, random, host_random_in(random, 0, HOST_KINDS - 1), maxTokens, x->weights);
    }
}

static void exchange_free(exchange_t *x) {
  for (int i = 0; i < ROUTES; i++)
    for (int u = 0; u < UPDATES; u++) host_free_routing(&x->cases[i][u]);
}

static void exchange_random(uint64_t seed, int nCases, int maxTokens) {
  hostRandom_t random = {seed};
  for (int i = 0; i < nCases; i++) {
    exchange_t x;
    uint64_t direct[ORACLE_MAX_RANKS], once[ORACLE_MAX_RANKS], again[ORACLE_MAX_RANKS];
    exchange_make(&x, &random, maxTokens);
    x.config.dispatchMode = host_random_in(&random, 0, 1) ? ULTRAEP_DISPATCH_AUTO : ULTRAEP_DISPATCH_DIRECT;
    exchange_run(&x, direct);
    x.config.dispatchMode = ULTRAEP_DISPATCH_ONCE;
    exchange_run(&x, once);
    assert_memory_equal(direct, once, sizeof(direct));
    if (i % 4 == 0) {
      exchange_run(&x, again);
      assert_memory_equal(once, again, sizeof(once));
    }
    exchange_free(&x);
  }
}

static void test_tiny(void **state) {
  (void)state;
  exchange_random(1, SLOWED ? 20 : 60, 3);
}

static void test_small(void **state) {
  (void)state;
  exchange_random(2, SLOWED ? 10 : 30, 24);
}

static void test_large(void **state) {
  (void)state;
  exchange_random(3, SLOWED ? 2 : 5, 200);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_tiny),
      cmocka_unit_test(test_small),
      cmocka_unit_test(test_large),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
