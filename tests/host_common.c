#include "host_common.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

typedef struct {
  hostRankArg_t arg;
  hostRankFn_t fn;
} hostStart_t;

static void *host_thread(void *opaque) {
  hostStart_t *start = opaque;
  start->fn(&start->arg);
  return NULL;
}

void host_run(int nRanks, hostRankFn_t fn, void *arg) {
  hostTeam_t team = {.nRanks = nRanks, .arg = arg};
  pthread_mutex_init(&team.lock, NULL);
  pthread_cond_init(&team.changed, NULL);
  assert_int_equal(ultraepHostWorldCreate(&team.world, nRanks), ultraepSuccess);
  pthread_t *threads = calloc((size_t)nRanks, sizeof(*threads));
  hostStart_t *starts = calloc((size_t)nRanks, sizeof(*starts));
  assert_true(threads && starts);
  for (int r = 0; r < nRanks; r++) {
    starts[r] =
        (hostStart_t){{.team = &team, .rank = r, .nRanks = nRanks, .world = team.world, .arg = arg}, fn};
    assert_int_equal(pthread_create(&threads[r], NULL, host_thread, &starts[r]), 0);
  }
  for (int r = 0; r < nRanks; r++) pthread_join(threads[r], NULL);
  free(starts);
  free(threads);
  if (team.failed) fail_msg("%s", team.why);
  assert_int_equal(ultraepHostWorldDestroy(team.world), ultraepSuccess);
  pthread_cond_destroy(&team.changed);
  pthread_mutex_destroy(&team.lock);
}

bool host_sync(hostRankArg_t *self) {
  hostTeam_t *team = self->team;
  pthread_mutex_lock(&team->lock);
  int generation = team->generation;
  if (++team->nWaiting == team->nRanks) {
    team->nWaiting = 0;
    team->generation++;
    pthread_cond_broadcast(&team->changed);
  }
  while (generation == team->generation && !team->failed) pthread_cond_wait(&team->changed, &team->lock);
  bool good = !team->failed;
  pthread_mutex_unlock(&team->lock);
  return good;
}

void host_fail(hostRankArg_t *self, const char *file, int line, const char *format, ...) {
  hostTeam_t *team = self->team;
  pthread_mutex_lock(&team->lock);
  if (!team->failed) {
    int n = snprintf(team->why, sizeof(team->why), "%s:%d: rank %d: ", file, line, self->rank);
    va_list args;
    va_start(args, format);
    vsnprintf(team->why + n, sizeof(team->why) - (size_t)n, format, args);
    va_end(args);
    team->failed = true;
  }
  pthread_cond_broadcast(&team->changed);
  pthread_mutex_unlock(&team->lock);
}

uint64_t host_random(hostRandom_t *random) {
  uint64_t z = (random->state += UINT64_C(0x9e3779b97f4a7c15));
  z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
  z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
  return z ^ (z >> 31);
}

int host_random_in(hostRandom_t *random, int low, int high) {
  return low + (int)(host_random(random) % (uint64_t)(high - low + 1));
}

uint64_t host_hash(uint64_t hash, const void *bytes, size_t n) {
  const unsigned char *byte = bytes;
  for (size_t i = 0; i < n; i++) hash = (hash ^ byte[i]) * UINT64_C(0x100000001b3);
  return hash;
}

double host_seconds(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

ultraepConfig_t host_config(void) {
  ultraepConfig_t config = ULTRAEP_CONFIG_INITIALIZER;
  config.nExperts = 8;
  config.topK = 2;
  config.maxTokens = 32;
  config.hidden = 32;
  return config;
}

static int32_t host_pick_expert(const oracleCase_t *c, hostRandom_t *random, int kind) {
  switch (kind) {
  case HOST_SKEWED: { /* the minimum of three draws */
    int a = host_random_in(random, 0, c->nExperts - 1), b = host_random_in(random, 0, c->nExperts - 1);
    int d = host_random_in(random, 0, c->nExperts - 1);
    a = a < b ? a : b;
    return a < d ? a : d;
  }
  case HOST_ONE_EXPERT:
    return c->nExperts / 2;
  case HOST_SPARSE:
    if (host_random_in(random, 0, 2) != 0) return -1;
    break;
  default:
    break;
  }
  return host_random_in(random, 0, c->nExperts - 1);
}

void host_make_routing(oracleCase_t *c, hostRandom_t *random, int kind, int maxTokens, bool weights) {
  bool allEmpty = host_random_in(random, 0, 15) == 0;
  for (int r = 0; r < c->nRanks; r++) {
    bool empty = allEmpty || host_random_in(random, 0, 5) == 0;
    c->nTokens[r] = empty ? 0 : host_random_in(random, 0, maxTokens);
    size_t n = (size_t)c->nTokens[r] * (size_t)c->topK;
    c->topk[r] = malloc(n * sizeof(int32_t) + 1);
    c->rankOf[r] = malloc(n * sizeof(int32_t) + 1);
    c->weights[r] = weights ? malloc(n * sizeof(float) + 1) : NULL;
    for (size_t i = 0; i < n; i++) {
      c->topk[r][i] = host_pick_expert(c, random, kind);
      if (weights) c->weights[r][i] = (float)host_random_in(random, -1000, 1000) / 811.0f;
    }
  }
}

void host_free_routing(oracleCase_t *c) {
  for (int r = 0; r < c->nRanks; r++) {
    free(c->topk[r]);
    free(c->rankOf[r]);
    free(c->weights[r]);
  }
}
