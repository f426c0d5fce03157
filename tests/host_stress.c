/* 8 ranks, 1000 steps of small random training: route, weights, dispatch, combine, gradients, several routes
 * in flight, failed updates in between. Made for ThreadSanitizer; each rank checks its own tokens. */
#include "host_common.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define RANKS 8
#define STEPS 1000
#define ROUTES 3
#define TOKENS 6
#define TOPK 3
#define EXPERTS 16
#define LOCAL (EXPERTS / RANKS) /* experts of a rank */
#define HIDDEN 8

typedef struct {
  uint64_t seed;
  ultraepConfig_t config;
} stress_t;

typedef struct {
  ultraepGroup_t group;
  ultraepRoute_t routes[ROUTES];
  float *rows, *masters; /* symmetric */
  _Alignas(16) float tokens[TOKENS * HIDDEN];
  _Alignas(16) float back[TOKENS * HIDDEN];
  _Alignas(16) float grads[LOCAL * HIDDEN];
  int32_t topk[ROUTES][TOKENS * TOPK];
  int nTokens[ROUTES];
  hostRandom_t shared, own; /* the same on all ranks; this rank's */
} trainer_t;

static bool trainer_setup(hostRankArg_t *self, trainer_t *x, const ultraepConfig_t *config) {
  void *rows, *masters;
  ultraepGroupProperties_t properties;
  if (ultraepGroupCreateHost(&x->group, self->world, self->rank, config) != ultraepSuccess ||
      ultraepGroupProperties(x->group, &properties) != ultraepSuccess ||
      ultraepMemAlloc(x->group, &rows, (size_t)properties.maxRecvRows * HIDDEN * sizeof(float)) !=
          ultraepSuccess ||
      ultraepMemAlloc(x->group, &masters, sizeof(x->grads)) != ultraepSuccess)
    return false;
  x->rows = rows;
  x->masters = masters;
  for (size_t i = 0; i < sizeof(x->grads) / sizeof(float); i++) {
    int expert = self->rank * LOCAL + (int)i / HIDDEN;
    x->masters[i] = (float)expert;
  }
  for (int i = 0; i < ROUTES; i++)
    if (ultraepRouteCreate(x->group, &x->routes[i]) != ultraepSuccess) return false;
  ultraepExperts_t experts = ULTRAEP_EXPERTS_INITIALIZER;
  experts.nWeights = experts.nGrads = 1;
  experts.weights[0] = (ultraepExpertTensor_t){.master = masters, .bytes = HIDDEN * sizeof(float)};
  experts.grads[0] = (ultraepExpertTensor_t){
      .master = x->grads, .bytes = HIDDEN * sizeof(float), .dataType = ULTRAEP_FLOAT32};
  return ultraepExpertsRegister(x->group, 0, &experts) == ultraepSuccess;
}

static ultraepResult_t trainer_update(trainer_t *x, int route) {
  int skew = host_random_in(&x->shared, 1, EXPERTS);
  x->nTokens[route] = host_random_in(&x->own, 0, TOKENS);
  for (int i = 0; i < x->nTokens[route] * TOPK; i++)
    x->topk[route][i] = host_random_in(&x->own, 0, 9) ? host_random_in(&x->own, 0, skew - 1) : -1;
  return ultraepRouteUpdate(x->routes[route], x->topk[route], NULL, x->nTokens[route], NULL);
}

/* An expert multiplies by its weight, which is its number; so a token comes back times the sum of its
 * experts. */
static void trainer_step(hostRankArg_t *self, trainer_t *x, int route) {
  ultraepSegments_t s;
  int n = x->nTokens[route] * HIDDEN;
  for (int i = 0; i < n; i++) x->tokens[i] = (float)host_random_in(&x->own, -50, 50);
  CHECK_OK(self, ultraepWeightsSync(x->routes[route], 0, NULL));
  CHECK_OK(self, ultraepAllToAll(x->tokens, x->rows, ULTRAEP_DISPATCH, x->routes[route], NULL));
  CHECK_OK(self, ultraepRouteSegments(x->routes[route], &s));
  for (int i = 0; i < s.nSegments; i++) {
    const float *weight = s.weights[0][i];
    float *grad = s.grads[0][i];
    for (int64_t r = s.firstRow[i]; r < s.firstRow[i] + s.rows[i]; r++)
      for (int h = 0; h < HIDDEN; h++) x->rows[r * HIDDEN + h] *= weight[h];
    if (s.expert[i] >= 0) grad[0] += (float)s.rows[i];
  }
  CHECK_OK(self, ultraepAllToAll(x->rows, x->back, ULTRAEP_COMBINE, x->routes[route], NULL));
  for (int i = 0; i < n; i++) {
    float sum = 0;
    for (int k = 0; k < TOPK; k++) {
      int32_t expert = x->topk[route][i / HIDDEN * TOPK + k];
      if (expert >= 0) sum += (float)expert;
    }
    CHECK(self, x->back[i] == x->tokens[i] * sum);
  }
  ultraepPlan_t plan;
  float before[LOCAL];
  for (int e = 0; e < LOCAL; e++) before[e] = x->grads[e * HIDDEN] - (float)s.rows[e];
  CHECK_OK(self, ultraepGradsReduce(x->routes[route], 0, NULL));
  CHECK_OK(self, ultraepRoutePlan(x->routes[route], &plan));
  for (int e = 0; e < LOCAL; e++) {
    int expert = self->rank * LOCAL + e;
    CHECK(self, x->grads[e * HIDDEN] == before[e] + (float)plan.expertLoad[expert]);
    x->grads[e * HIDDEN] = 0;
  }
}

static void stress_rank(hostRankArg_t *self) {
  stress_t *stress = self->arg;
  trainer_t x = {.shared = {stress->seed}, .own = {stress->seed + 1000 * (uint64_t)(self->rank + 1)}};
  CHECK(self, trainer_setup(self, &x, &stress->config));
  bool good[ROUTES] = {false};
  for (int step = 0; step < STEPS; step++) {
    int update = host_random_in(&x.shared, 0, ROUTES - 1), use = host_random_in(&x.shared, 0, ROUTES - 1);
    ultraepResult_t result = trainer_update(&x, update);
    CHECK(self, result == ultraepSuccess || result == ultraepCapacityExceeded);
    good[update] = result == ultraepSuccess;
    if (good[use]) trainer_step(self, &x, use);
    if (self->team->failed) return;
  }
  CHECK_OK(self, ultraepGroupDestroy(x.group));
}

static void run(int dispatchMode, int combineMode, uint64_t seed) {
  stress_t stress = {.seed = seed, .config = host_config()};
  stress.config.nExperts = EXPERTS;
  stress.config.topK = TOPK;
  stress.config.maxTokens = TOKENS;
  stress.config.hidden = HIDDEN;
  stress.config.dataType = ULTRAEP_FLOAT32;
  stress.config.maxRoutes = ROUTES;
  stress.config.maxRecvRows = 24; /* some updates do not fit */
  stress.config.dispatchMode = dispatchMode;
  stress.config.combineMode = combineMode;
  host_run(RANKS, stress_rank, &stress);
}

static void test_direct(void **state) {
  (void)state;
  run(ULTRAEP_DISPATCH_DIRECT, ULTRAEP_COMBINE_EXACT, 31);
}

static void test_once(void **state) {
  (void)state;
  run(ULTRAEP_DISPATCH_ONCE, ULTRAEP_COMBINE_PARTIAL, 32);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_direct),
      cmocka_unit_test(test_once),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
