/* A rank does not come to a collective call of the host. The others must learn so within twice the timeout,
 * and the device must stay usable. */
#include "gpu_case.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "gpu_common.h"

#define RANKS 4
#define VICTIM 2
#define TIMEOUT_MS (300 * GPU_PATIENCE)

typedef enum {
  AWAY_CREATE,
  AWAY_MEMORY,
  AWAY_MEMORY_EARLY, /* and another gives up while others still wait, and ends its communicator */
} away_t;
#define EARLY 0

typedef struct {
  away_t away;
  int nReturned; /* ranks whose call has ended */
  int nOver;     /* ranks that are done with group and communicator */
} awayPlan_t;

static void away_count(int *n) {
  __atomic_fetch_add(n, 1, __ATOMIC_ACQ_REL);
}

/* Until all ranks that come have counted, but not for ever: the ranks' clocks tell it then. */
static void away_wait(gpuWorld_t *world, const int *n) {
  double end = gpu_world_seconds() + 10e-3 * TIMEOUT_MS;
  while (__atomic_load_n(n, __ATOMIC_ACQUIRE) < world->nRanks - 1 && gpu_world_seconds() < end)
    gpu_world_sleep_ms(1);
}

static const char *away_victim(gpuWorld_t *world, awayPlan_t *plan, ultraepGroup_t group) {
  away_wait(world, &plan->nOver); /* then ends calls that would never return */
  for (int r = 0; r < world->nRanks; r++)
    if (r != VICTIM) gpu_world_abort(world, r);
  RANK_OK(ultraepGroupDestroy(group));
  gpu_world_abort(world, VICTIM);
  return NULL;
}

/* Says in *code how the group's memory failed. */
static const char *away_memory(awayPlan_t *plan, int rank, ultraepGroup_t group, ultraepResult_t *code) {
  void *memory = NULL;
  *code = ultraepMemAlloc(group, &memory, 4096);
  away_count(&plan->nReturned);
  /* Where a rank has aborted the communicator, the others' kernels of NCCL may end with anything in place of
   * what did not come. */
  RANK_CHECK(*code == ultraepTimeout ||
                 (*code == ultraepRemoteError && plan->away == AWAY_MEMORY_EARLY && rank != EARLY),
             "memory: %s: %s", ultraepGetErrorString(*code), ultraepGetLastError());
  RANK_CHECK(!memory, "a failed call set its output");
  return NULL;
}

/* NCCL's own kernel is pending on the communicator afterwards, so each case has a world of its own, and the
 * victim ends it there. */
static const char *away_rank(gpuWorld_t *world, int rank, void *argument) {
  awayPlan_t *plan = argument;
  gpuShape_t shape = gpu_shape_small(RANKS);
  shape.config.timeoutMs = TIMEOUT_MS;
  ultraepGroup_t group = NULL;
  ultraepStatus_t status;
  ultraepResult_t code = ultraepTimeout;
  void *memory = NULL;
  bool isCreated = plan->away != AWAY_CREATE;
  if (isCreated) RANK_OK(ultraepGroupCreate(&group, world->comms[rank], &shape.config));
  RANK_MEET(world);
  if (rank == VICTIM) return away_victim(world, plan, group);
  if (plan->away == AWAY_MEMORY_EARLY && rank != EARLY) gpu_world_sleep_ms(TIMEOUT_MS / 2);
  double start = gpu_world_seconds();
  if (isCreated) {
    RANK_DO(away_memory(plan, rank, group, &code));
  } else {
    ultraepResult_t result = ultraepGroupCreate(&group, world->comms[rank], &shape.config);
    away_count(&plan->nReturned);
    RANK_IS(result, ultraepTimeout);
    RANK_CHECK(!group, "a failed call set its output");
  }
  double seconds = gpu_world_seconds() - start;
  RANK_CHECK(seconds <= 2e-3 * TIMEOUT_MS, "the timeout took %.3f s", seconds);
  if (isCreated) {
    RANK_IS(ultraepGroupStatus(group, &status), code);
    RANK_CHECK(strcmp(status.phase, "memory") == 0, "status: phase \"%s\"", status.phase);
    RANK_IS(ultraepMemAlloc(group, &memory, 4096), code);
    start = gpu_world_seconds();
    RANK_OK(ultraepGroupAbort(group));
    RANK_OK(ultraepGroupDestroy(group));
    seconds = gpu_world_seconds() - start;
    RANK_CHECK(seconds <= 2e-3 * TIMEOUT_MS, "abort and destroy took %.3f s", seconds);
  }
  if (plan->away != AWAY_MEMORY_EARLY) away_wait(world, &plan->nReturned);
  gpu_world_abort(world, rank);
  away_count(&plan->nOver);
  return NULL;
}

static const char *usable_rank(gpuWorld_t *world, int rank, void *argument) {
  (void)argument;
  return gpu_check_usable(world, rank);
}

static void check_away(away_t away) {
  gpuWorld_t world;
  awayPlan_t plan = {.away = away};
  const char *flaw = gpu_world_make(&world, RANKS);
  if (!flaw) flaw = gpu_world_run(&world, away_rank, &plan);
  if (flaw) fail_msg("%s", flaw);
  gpu_world_free(&world);
  flaw = gpu_world_make(&world, RANKS);
  if (!flaw) flaw = gpu_world_run(&world, usable_rank, NULL);
  if (flaw) fail_msg("afterwards: %s", flaw);
  gpu_world_free(&world);
}

static void test_away_create(void **state) {
  (void)state;
  check_away(AWAY_CREATE);
}
static void test_away_memory(void **state) {
  (void)state;
  check_away(AWAY_MEMORY);
}
static void test_away_memory_early(void **state) {
  (void)state;
  check_away(AWAY_MEMORY_EARLY);
}

/* Optional argument: a test's name or a pattern of names, as cmocka takes them. */
int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_away_create), cmocka_unit_test(test_away_memory),
                                     cmocka_unit_test(test_away_memory_early)};
  if (!gpu_world_usable(true)) return GPU_SKIP_CODE;
  if (argc > 1) cmocka_set_test_filter(argv[1]);
  return cmocka_run_group_tests_name("gpu_away", tests, NULL, NULL);
}
