#include "pending_common.h"

#include <dlfcn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

bool isPreload;
const struct client *from;
struct schedule_double *doubles;
struct fake_config later = FAKE_CONFIG(0);

fake_id next_id(void) {
  static atomic_int number;
  fake_id id = {{0}};

  snprintf(id.bytes, sizeof(id.bytes), "id %d of %ld", atomic_fetch_add(&number, 1), (long)getpid());
  return id;
}

void turn(void) {
  nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
}

int state_of(void *comm) {
  int error = -1;

  assert_int_equal(from->asyncError(comm, &error), 0);
  return error;
}

/* What becomes of it. */
int outcome(void *comm) {
  int state = state_of(comm);

  for (int turns = 0; state == FAKE_IN_PROGRESS && turns < TURNS; turns++) {
    turn();
    state = state_of(comm);
  }
  return state;
}

static void reset(void) {
  doubles->isHeld = false;
  doubles->failingRank = -1;
  doubles->launchResult = 0;
  doubles->made = doubles->failed = doubles->aborted = doubles->ended = doubles->endedByAbort = 0;
  doubles->launched = doubles->callsBefore = 0;
  nccl->polls = 1;
  nccl->initError = nccl->lateSuccess = nccl->result = 0;
  nccl->awaitsRanks = 1;
  nccl->childRanks = RANKS;
  unsetenv("NCCL_COMM_BLOCKING");
}

int pending_setup(void **state) {
  (void)state;
  if (!isPreload) {
    record->undo();
    start();
  }
  reset();
  return 0;
}

/* Nothing is left of any set-up. */
int pending_teardown(void **state) {
  (void)state;
  reset();
  WAIT_UNTIL(doubles->running == 0);
  return 0;
}

int pending_group_setup(void **state) {
  if (!isPreload)
    (void)group_setup_with("libtakeover_scheduler.so");
  else
    nccl_open();
  (void)state;
  doubles = isPreload
                ? dlsym(RTLD_DEFAULT, "scheduleDouble")
                : dlsym(library_open("libtakeover_scheduler.so", RTLD_NOW | RTLD_NOLOAD), "scheduleDouble");
  assert_non_null(doubles);
  from = client_open("now");
  return 0;
}

void make_later(void **comms) {
  const fake_id id = next_id();

  for (int rank = 0; rank < RANKS; rank++)
    assert_int_equal(from->initConfig(&comms[rank], RANKS, id, rank, &later), FAKE_IN_PROGRESS);
}

void all_ready(void **comms, int n) {
  for (int i = n - 1; i >= 0; i--) assert_int_equal(outcome(comms[i]), 0);
}

void destroy_all(void **comms, int n) {
  for (int i = 0; i < n; i++) assert_int_equal(from->destroy(comms[i]), 0);
}

int scheduled(void **comms, int n) {
  int count = 0;

  for (int i = 0; i < n; i++) count += doubles->isScheduled(comms[i]);
  return count;
}
