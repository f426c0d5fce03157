/* Every allocation of the host backend fails once, on one rank: a system error there, an error or nothing on
 * the others, nothing lost (AddressSanitizer looks), and what the header says works on does. Linked with the
 * allocators and the makers of locks wrapped. */
#include "host_common.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#define RANKS 2

static _Thread_local int countdown; /* the allocation to fail, counted from 1; 0: none */

static bool fails(void) {
  return countdown > 0 && --countdown == 0;
}

/* NOLINTBEGIN(bugprone-reserved-identifier): the linker's names */
void *__real_calloc(size_t n, size_t bytes);
void *__real_realloc(void *old, size_t bytes);
void *__real_aligned_alloc(size_t alignment, size_t bytes);
int __real_pthread_mutex_init(pthread_mutex_t *lock, const pthread_mutexattr_t *attributes);
int __real_pthread_cond_init(pthread_cond_t *cond, const pthread_condattr_t *attributes);
int __real_pthread_condattr_init(pthread_condattr_t *attributes);
void *__wrap_calloc(size_t n, size_t bytes);
void *__wrap_realloc(void *old, size_t bytes);
void *__wrap_aligned_alloc(size_t alignment, size_t bytes);
int __wrap_pthread_mutex_init(pthread_mutex_t *lock, const pthread_mutexattr_t *attributes);
int __wrap_pthread_cond_init(pthread_cond_t *cond, const pthread_condattr_t *attributes);
int __wrap_pthread_condattr_init(pthread_condattr_t *attributes);
/* NOLINTEND(bugprone-reserved-identifier) */

void *__wrap_calloc(size_t n, size_t bytes) {
  return fails() ? NULL : __real_calloc(n, bytes);
}
void *__wrap_realloc(void *old, size_t bytes) {
  return fails() ? NULL : __real_realloc(old, bytes);
}
void *__wrap_aligned_alloc(size_t alignment, size_t bytes) {
  return fails() ? NULL : __real_aligned_alloc(alignment, bytes);
}
int __wrap_pthread_mutex_init(pthread_mutex_t *lock, const pthread_mutexattr_t *attributes) {
  return fails() ? EAGAIN : __real_pthread_mutex_init(lock, attributes);
}
int __wrap_pthread_cond_init(pthread_cond_t *cond, const pthread_condattr_t *attributes) {
  return fails() ? EAGAIN : __real_pthread_cond_init(cond, attributes);
}
int __wrap_pthread_condattr_init(pthread_condattr_t *attributes) {
  return fails() ? ENOMEM : __real_pthread_condattr_init(attributes);
}

typedef struct {
  int failing; /* which allocation of rank 0 */
  int left;    /* of the countdown afterwards: 0 when it happened */
} memory_t;

/* A collective call that ends alike on all ranks when one is short of memory: again, and it works. */
#define TWICE(self, call)                                                                                    \
  do {                                                                                                       \
    ultraepResult_t once_ = (call);                                                                          \
    if (once_ == ultraepSuccess) break;                                                                      \
    CHECK_IS(self, once_, self->rank == 0 ? ultraepSystemError : ultraepRemoteError);                        \
    CHECK(self, strstr(ultraepGetLastError(), self->rank == 0 ? "no memory" : "rank 0 is short of memory")); \
    CHECK_OK(self, call);                                                                                    \
  } while (0)

static void memory_steps(hostRankArg_t *self, ultraepGroup_t group) {
  ultraepRoute_t route;
  void *region;
  static const int32_t topk[4] = {0, 1, 2, 3};
  _Alignas(16) unsigned char grads[4 * 64] = {0};
  ultraepResult_t result = ultraepMemAlloc(group, &region, 65536);
  if (result == ultraepSystemError &&
      strstr(ultraepGetLastError(), "table")) { /* found before the exchange */
    CHECK(self, self->rank == 0);
    CHECK_OK(self, ultraepMemAlloc(group, &region, 65536));
  } else if (result != ultraepSuccess) {
    CHECK_IS(self, result, self->rank == 0 ? ultraepSystemError : ultraepRemoteError);
    CHECK_OK(self, ultraepMemAlloc(group, &region, 65536));
  }
  memset(region, 0, 65536);
  result = ultraepRouteCreate(group, &route);
  if (result != ultraepSuccess) {
    CHECK(self, result == ultraepSystemError && self->rank == 0);
    CHECK_OK(self, ultraepRouteCreate(group, &route));
  }
  ultraepExperts_t experts = ULTRAEP_EXPERTS_INITIALIZER;
  experts.nWeights = experts.nGrads = 1;
  experts.weights[0] = (ultraepExpertTensor_t){.master = region, .bytes = 64};
  experts.grads[0] = (ultraepExpertTensor_t){.master = grads, .bytes = 64, .dataType = ULTRAEP_FLOAT32};
  result = ultraepExpertsRegister(group, 0, &experts);
  if (result == ultraepSystemError && strstr(ultraepGetLastError(), "layers"))
    CHECK_OK(self, ultraepExpertsRegister(group, 0, &experts));
  else if (result != ultraepSuccess)
    TWICE(self, ultraepExpertsRegister(group, 0, &experts));
  /* No allocation from here on. */
  int before = countdown;
  countdown = self->rank == 0 ? 1 : 0;
  CHECK_OK(self, ultraepRouteUpdate(route, topk, NULL, 2, NULL));
  CHECK_OK(self, ultraepWeightsSync(route, 0, NULL));
  CHECK_OK(self, ultraepAllToAll((unsigned char *)region + 32768, region, ULTRAEP_DISPATCH, route, NULL));
  CHECK_OK(self, ultraepAllToAll(region, (unsigned char *)region + 32768, ULTRAEP_COMBINE, route, NULL));
  CHECK_OK(self, ultraepGradsReduce(route, 0, NULL));
  CHECK(self, countdown == (self->rank == 0 ? 1 : 0));
  countdown = before;
}

static void memory_rank(hostRankArg_t *self) {
  memory_t *memory = self->arg;
  ultraepConfig_t config = host_config();
  config.timeoutMs = 300;
  config.maxRecvRows = 128;
  ultraepGroup_t group = NULL;
  if (self->rank == 0) countdown = memory->failing;
  if (self->rank != 0)
    nanosleep(&(struct timespec){0, 10000000}, NULL); /* so that rank 0 makes the windows */
  ultraepResult_t result = ultraepGroupCreateHost(&group, self->world, self->rank, &config);
  if (result == ultraepSuccess) {
    memory_steps(self, group);
  } else if (self->rank == 0) {
    CHECK_IS(self, result, ultraepSystemError);
    CHECK(self, strstr(ultraepGetLastError(), "no memory"));
  } else {
    CHECK(self, result == ultraepTimeout || result == ultraepRemoteError);
  }
  if (self->rank == 0) memory->left = countdown;
  countdown = 0;
  CHECK_OK(self, ultraepGroupDestroy(group));
}

static void test_ranks(void **state) {
  (void)state;
  memory_t memory = {0};
  int n = 0;
  do {
    memory.failing = ++n;
    host_run(RANKS, memory_rank, &memory);
  } while (memory.left == 0);
  assert_true(n > 15);
  print_message("%d allocations failed in turn\n", n - 1);
}

static void test_world(void **state) {
  (void)state;
  int n = 0;
  for (ultraepResult_t result = ultraepSystemError; result != ultraepSuccess; n++) {
    ultraepHostWorld_t world = NULL;
    countdown = n + 1;
    result = ultraepHostWorldCreate(&world, 4);
    countdown = 0;
    assert_true(result == ultraepSuccess || (result == ultraepSystemError && !world));
    if (world) assert_int_equal(ultraepHostWorldDestroy(world), ultraepSuccess);
  }
  assert_int_equal(n, 4); /* the world, its counts, its lock, then nothing is left to fail */
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_ranks),
      cmocka_unit_test(test_world),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
