/* Replicas' weights and gradients for random plans: every slot bit for bit its master's weights; every
 * master's gradient the sum in the stated order, computed here from the segments alone; slots zero
 * afterwards. */
#include "host_common.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define LAYERS 2
#define STEPS 3

typedef struct {
  int nWeights, nGrads;
  size_t bytes[2 * ULTRAEP_MAX_TENSORS]; /* weights, then gradients */
  int32_t types[2 * ULTRAEP_MAX_TENSORS];
} shape_t;

typedef struct {
  ultraepConfig_t config;
  shape_t shape;
  oracleCase_t cases[STEPS];
  int layers[STEPS];
  int64_t replicas[ORACLE_MAX_RANKS]; /* that each rank got in all steps */
  /* What each rank shows the others, between two syncs. */
  ultraepSegments_t segments[ORACLE_MAX_RANKS];
  unsigned char *grads[ORACLE_MAX_RANKS][ULTRAEP_MAX_TENSORS]; /* masters before the reduction */
} experts_t;

static unsigned char weight_byte(int layer, int tensor, int expert, size_t i) {
  hostRandom_t random = {(uint64_t)layer << 48 ^ (uint64_t)tensor << 40 ^ (uint64_t)expert << 24 ^ i};
  return (unsigned char)host_random(&random);
}

static float grad_value(int step, int tensor, int expert, int rank, int i) {
  hostRandom_t random = {(uint64_t)step << 52 ^ (uint64_t)tensor << 44 ^ (uint64_t)expert << 28 ^
                         (uint64_t)rank << 20 ^ (uint64_t)i};
  return (float)host_random_in(&random, -100000, 100000) / 3571.0f;
}

static int elements(const shape_t *shape, int grad) {
  int t = shape->nWeights + grad;
  return (int)(shape->bytes[t] / (shape->types[t] == ULTRAEP_FLOAT32 ? 4 : 2));
}

static void register_layer(hostRankArg_t *self, ultraepGroup_t group, int layer) {
  experts_t *x = self->arg;
  const shape_t *shape = &x->shape;
  int nLocal = x->config.nExperts / self->nRanks;
  ultraepExperts_t experts = ULTRAEP_EXPERTS_INITIALIZER;
  experts.nWeights = shape->nWeights;
  experts.nGrads = shape->nGrads;
  for (int t = 0; t < shape->nWeights; t++) {
    void *master;
    CHECK_OK(self, ultraepMemAlloc(group, &master, (size_t)nLocal * shape->bytes[t]));
    experts.weights[t] = (ultraepExpertTensor_t){.master = master, .bytes = shape->bytes[t]};
    for (int e = 0; e < nLocal; e++)
      for (size_t i = 0; i < shape->bytes[t]; i++)
        ((unsigned char *)master)[(size_t)e * shape->bytes[t] + i] =
            weight_byte(layer, t, self->rank * nLocal + e, i);
  }
  for (int t = 0; t < shape->nGrads;
       t++) { /* one set for all layers: they are filled before each reduction */
    experts.grads[t] = (ultraepExpertTensor_t){.master = x->grads[self->rank][t],
                                               .bytes = shape->bytes[shape->nWeights + t],
                                               .dataType = shape->types[shape->nWeights + t]};
  }
  CHECK_OK(self, ultraepExpertsRegister(group, layer, &experts));
}

static void check_weights(hostRankArg_t *self, const ultraepSegments_t *s, int layer) {
  experts_t *x = self->arg;
  for (int t = 0; t < x->shape.nWeights; t++)
    for (int i = 0; i < s->nSegments; i++) {
      if (s->expert[i] < 0) continue;
      const unsigned char *bytes = s->weights[t][i];
      CHECK(self, bytes);
      for (size_t b = 0; b < x->shape.bytes[t]; b++)
        CHECK(self, bytes[b] == weight_byte(layer, t, s->expert[i], b));
    }
}

/* Every instance's gradient gets its own values, then the sums are compared. */
static void fill_grads(hostRankArg_t *self, const ultraepSegments_t *s, int step) {
  experts_t *x = self->arg;
  for (int t = 0; t < x->shape.nGrads; t++)
    for (int i = 0; i < s->nSegments; i++) {
      if (s->expert[i] < 0) continue;
      for (int n = 0; n < elements(&x->shape, t); n++)
        oracle_store(x->shape.types[x->shape.nWeights + t], s->grads[t][i], n,
                     grad_value(step, t, s->expert[i], self->rank, n));
    }
}

static bool has_expert(const ultraepSegments_t *s, int expert) {
  for (int i = 0; i < s->nSegments; i++)
    if (s->expert[i] == expert) return true;
  return false;
}

static void check_grads(hostRankArg_t *self, const ultraepSegments_t *s, int step) {
  experts_t *x = self->arg;
  int nLocal = x->config.nExperts / self->nRanks;
  for (int t = 0; t < x->shape.nGrads; t++) {
    int32_t type = x->shape.types[x->shape.nWeights + t];
    for (int i = 0; i < s->nSegments; i++) {
      if (s->expert[i] < 0) continue;
      for (int n = 0; n < elements(&x->shape, t); n++) {
        unsigned char got[4] = {0}, want[4] = {0}, part[4] = {0};
        oracle_store(type, got, 0, oracle_load(type, s->grads[t][i], n));
        float sum = 0.0f; /* a slot's gradient is zero afterwards, or as it was */
        int end = i < nLocal ? self->nRanks : x->config.gradsMode & ULTRAEP_GRADS_LEAVE ? 0 : -1;
        for (int r = -1; r < end; r++) {
          int rank = r < 0 ? self->rank : r;
          if (r == self->rank || !has_expert(&x->segments[rank], s->expert[i])) continue;
          oracle_store(type, part, 0, grad_value(step, t, s->expert[i], rank, n));
          sum += oracle_load(type, part, 0);
        }
        oracle_store(type, want, 0, sum);
        CHECK(self, memcmp(got, want, sizeof(got)) == 0);
      }
    }
  }
}

static void experts_step(hostRankArg_t *self, ultraepRoute_t route, int step) {
  experts_t *x = self->arg;
  const oracleCase_t *c = &x->cases[step];
  ultraepSegments_t *s = &x->segments[self->rank];
  CHECK_OK(self, ultraepRouteUpdate(route, c->topk[self->rank], NULL, c->nTokens[self->rank], NULL));
  CHECK_OK(self, ultraepRouteSegments(route, s));
  CHECK_OK(self, ultraepWeightsSync(route, x->layers[step], NULL));
  check_weights(self, s, x->layers[step]);
  if (x->shape.nGrads == 0) {
    CHECK_IS(self, ultraepGradsReduce(route, x->layers[step], NULL), ultraepInvalidUsage);
    return;
  }
  fill_grads(self, s, step);
  SYNC(self);
  CHECK_OK(self, ultraepGradsReduce(route, x->layers[step], NULL));
  check_grads(self, s, step);
}

/* The bytes that crossed, from the segments: each replica away from its master was copied and read back once.
 */
static void check_counters(hostRankArg_t *self, ultraepGroup_t group, int64_t replicasHere,
                           int64_t replicasOfMine) {
  experts_t *x = self->arg;
  ultraepCounters_t counters;
  int64_t weightBytes = 0, gradBytes = 0;
  for (int t = 0; t < x->shape.nWeights; t++) weightBytes += (int64_t)x->shape.bytes[t];
  for (int t = 0; t < x->shape.nGrads; t++) gradBytes += (int64_t)x->shape.bytes[x->shape.nWeights + t];
  CHECK_OK(self, ultraepGroupCounters(group, &counters));
  CHECK(self, counters.weightBytes == replicasHere * weightBytes);
  CHECK(self, counters.gradBytes == replicasOfMine * gradBytes);
  ultraepGroupProperties_t properties;
  CHECK_OK(self, ultraepGroupProperties(group, &properties));
  CHECK(self, properties.slotBytes >= x->config.nSlots * (weightBytes + gradBytes));
  CHECK(self, properties.slotBytes <= x->config.nSlots * (weightBytes + gradBytes) + 16 * 256);
}

static void experts_rank(hostRankArg_t *self) {
  experts_t *x = self->arg;
  int nLocal = x->config.nExperts / self->nRanks;
  ultraepGroup_t group;
  ultraepRoute_t route;
  ultraepGroupProperties_t before, after;
  int64_t here = 0, mine = 0;
  for (int t = 0; t < x->shape.nGrads; t++)
    x->grads[self->rank][t] = aligned_alloc(16, (size_t)nLocal * x->shape.bytes[x->shape.nWeights + t]);
  CHECK_OK(self, ultraepGroupCreateHost(&group, self->world, self->rank, &x->config));
  CHECK_OK(self, ultraepRouteCreate(group, &route));
  CHECK_OK(self, ultraepGroupProperties(group, &before));
  ultraepSegments_t *s = &x->segments[self->rank];
  CHECK_OK(self, ultraepRouteSegments(route, s));
  CHECK(self, !s->weights[0][0] && !s->grads[ULTRAEP_MAX_TENSORS - 1][s->nSegments - 1]);
  for (int layer = 0; layer < LAYERS; layer++) register_layer(self, group, 7 * layer);
  CHECK_OK(self, ultraepGroupProperties(group, &after)); /* slots are all that it takes */
  CHECK(self, after.windowBytes == before.windowBytes && after.privateBytes == before.privateBytes);
  for (int step = 0; step < STEPS; step++) {
    experts_step(self, route, step);
    SYNC(self);
    for (int i = nLocal; i < s->nSegments; i++) here += s->expert[i] >= 0;
    for (int r = 0; r < self->nRanks; r++)
      for (int e = self->rank * nLocal; e < (self->rank + 1) * nLocal; e++)
        mine += r != self->rank && has_expert(&x->segments[r], e);
    SYNC(self);
  }
  check_counters(self, group, here, mine);
  x->replicas[self->rank] = here;
  CHECK_OK(self, ultraepGroupDestroy(group));
  for (int t = 0; t < x->shape.nGrads; t++) free(x->grads[self->rank][t]);
}

static void test_random(void **state) {
  (void)state;
  hostRandom_t random = {11};
  int64_t replicas = 0;
  for (int i = 0; i < 40; i++) {
    experts_t x = {.config = host_config()};
    int nRanks = host_random_in(&random, 1, 8);
    x.config.nExperts = nRanks * host_random_in(&random, 1, 5);
    x.config.nSlots = host_random_in(&random, 0, 3);
    x.config.topK = host_random_in(&random, 1, 4);
    x.config.maxRecvRows = (int64_t)nRanks * x.config.maxTokens * x.config.topK;
    x.shape.nWeights = host_random_in(&random, 1, 3);
    x.shape.nGrads = host_random_in(&random, 0, 3);
    x.config.gradsMode = host_random_in(&random, 0, 3);
    for (int t = 0; t < x.shape.nWeights + x.shape.nGrads; t++) {
      x.shape.bytes[t] = 16 * (size_t)host_random_in(&random, 1, 20);
      x.shape.types[t] = host_random_in(&random, 0, 1) ? ULTRAEP_FLOAT32 : ULTRAEP_BFLOAT16;
    }
    for (int step = 0; step < STEPS; step++) {
      oracleCase_t *c = &x.cases[step];
      *c = (oracleCase_t){.nRanks = nRanks, .nExperts = x.config.nExperts, .topK = x.config.topK};
      host_make_routing(c, &random, step % HOST_KINDS, x.config.maxTokens, false);
      x.layers[step] = 7 * host_random_in(&random, 0, LAYERS - 1);
    }
    host_run(nRanks, experts_rank, &x);
    for (int r = 0; r < nRanks; r++) replicas += x.replicas[r];
    for (int step = 0; step < STEPS; step++) host_free_routing(&x.cases[step]);
  }
  assert_true(replicas > 100);
}

/* Tensors of several blocks, so that blocks meet at the right places. */
static void test_large_tensor(void **state) {
  (void)state;
  hostRandom_t random = {12};
  experts_t x = {.config = host_config()};
  x.config.nExperts = 2;
  x.config.topK = 1;
  x.config.nSlots = 1;
  x.config.maxRecvRows = 2 * x.config.maxTokens;
  x.shape = (shape_t){1, 1, {(3u << 19) + 48, (5u << 19) + 16}, {0, ULTRAEP_FLOAT32}};
  for (int step = 0; step < STEPS; step++) {
    x.cases[step] = (oracleCase_t){.nRanks = 2, .nExperts = 2, .topK = 1};
    host_make_routing(&x.cases[step], &random, HOST_ONE_EXPERT, x.config.maxTokens, false);
  }
  host_run(2, experts_rank, &x);
  for (int step = 0; step < STEPS; step++) host_free_routing(&x.cases[step]);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_random),
      cmocka_unit_test(test_large_tensor),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
