/* Communicators that are ready later, with ULTRAEP_P2P=schedule: set up in a thread while the program is told
 * that they are in progress. The double of the set-up can be held, fail and be aborted. Runs as a plugin, or
 * with the argument "preload" under the preload library. */
#include "pending_common.h"
#include "planner_common.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* Refused, and nothing issued. */
static void check_refused(void *comm) {
  const long calls = nccl->calls, launched = doubles->launched;
  void *child = comm;

  assert_int_equal(from->send(&later, 1, 0, 1, comm, NULL), FAKE_INVALID);
  assert_int_equal(from->recv(&later, 1, 0, 1, comm, NULL), FAKE_INVALID);
  assert_int_equal(from->allToAll(&later, &later, 1, 0, comm, NULL), FAKE_INVALID);
  assert_int_equal(from->gather(&later, &later, 1, 0, 0, comm, NULL), FAKE_INVALID);
  assert_int_equal(from->scatter(&later, &later, 1, 0, 0, comm, NULL), FAKE_INVALID);
  assert_int_equal(from->putSignal(&later, 1, 0, 1, NULL, 0, 0, 0, 0, comm, NULL), FAKE_INVALID);
  assert_int_equal(from->split(comm, 1, 0, &child, NULL), FAKE_INVALID);
  assert_int_equal(from->shrink(comm, NULL, 0, &child, NULL, 0), FAKE_INVALID);
  assert_int_equal(from->grow(comm, RANKS + 1, NULL, -1, &child, NULL), FAKE_INVALID);
  assert_true(nccl->calls == calls && doubles->launched == launched);
  /* With the preload library NCCL itself asks us before what is not ours. */
  if (isPreload) assert_int_equal(from->allReduce(NULL, NULL, 1, 0, 0, comm, NULL), FAKE_INVALID);
}

/* One thread has all ranks, and asks them in any order: no question waits for another rank. */
static void test_init(void **state) {
  void *comms[RANKS];
  long calls;

  (void)state;
  doubles->isHeld = true;
  make_later(comms);
  WAIT_UNTIL(doubles->held == RANKS);
  for (int i = 0; i < 20; i++) assert_int_equal(state_of(comms[i * 3 % RANKS]), FAKE_IN_PROGRESS);
  check_refused(comms[2]);
  assert_int_equal(scheduled(comms, RANKS), 0);
  doubles->isHeld = false;
  all_ready(comms, RANKS);
  assert_int_equal(scheduled(comms, RANKS), RANKS);
  assert_int_equal(doubles->made, RANKS);
  calls = nccl->calls;
  assert_int_equal(from->send(&later, 8, 0, 1, comms[0], NULL), 0);
  assert_int_equal(from->allToAll(&later, &later, 8, 0, comms[3], NULL), 0);
  assert_true(doubles->launched == 1 + 2 * RANKS && nccl->calls == calls);
  destroy_all(comms, RANKS);
  assert_int_equal(doubles->ended, RANKS);
}

/* No question is needed for the set-up to go on: a rank that asks late keeps no other waiting. */
static void test_unasked(void **state) {
  void *comms[RANKS];

  (void)state;
  nccl->polls = 30;
  make_later(comms);
  assert_int_equal(outcome(comms[1]), 0);
  assert_true(doubles->isScheduled(comms[1]));
  WAIT_UNTIL(doubles->made == RANKS);
  for (int rank = 0; rank < RANKS; rank++) {
    assert_int_equal(outcome(comms[rank]), 0);
    assert_int_equal(state_of(comms[rank]), 0);
  }
  destroy_all(comms, RANKS);
}

/* The call itself may already find it ready; the program still learns it from the set-up. */
static void test_ready_at_once(void **state) {
  void *comms[RANKS];

  (void)state;
  nccl->polls = 0;
  make_later(comms);
  all_ready(comms, RANKS);
  assert_int_equal(scheduled(comms, RANKS), RANKS);
  destroy_all(comms, RANKS);
}

static void test_group(void **state) {
  const fake_id ids[2] = {next_id(), next_id()};
  void *comms[2 * RANKS];

  (void)state;
  assert_int_equal(from->groupStart(), 0);
  assert_int_equal(from->groupStart(), 0);
  for (int i = 0; i < 2 * RANKS; i++)
    assert_int_equal(from->initConfig(&comms[i], RANKS, ids[i % 2], i / 2, &later), FAKE_IN_PROGRESS);
  assert_int_equal(from->groupEnd(), 0);
  assert_int_equal(from->groupEnd(), FAKE_IN_PROGRESS);
  all_ready(comms, 2 * RANKS);
  assert_int_equal(scheduled(comms, 2 * RANKS), 2 * RANKS);
  destroy_all(comms, 2 * RANKS);
  /* Those that block are set up when the group ends, all at once. */
  assert_int_equal(from->groupStart(), 0);
  for (int i = 0; i < RANKS; i++) assert_int_equal(from->init(&comms[i], RANKS, ids[0], i), 0);
  assert_int_equal(from->groupEnd(), 0);
  assert_int_equal(scheduled(comms, RANKS), RANKS);
  destroy_all(comms, RANKS);
  /* A group that failed has made none. */
  assert_int_equal(from->groupStart(), 0);
  assert_int_equal(from->initConfig(&comms[0], RANKS, ids[0], 0, &later), FAKE_IN_PROGRESS);
  nccl->result = 5;
  assert_int_equal(from->groupEnd(), 5);
  nccl->result = 0;
  assert_int_equal(from->abort(comms[0]), 0);
}

/* Children are there when their parents say so; one that is seen before is in progress, too. */
static void check_children(void **parents, bool inGroup, bool isShrink) {
  const int expected = nccl->lateSuccess ? 0 : FAKE_IN_PROGRESS;
  void *children[RANKS] = {0};

  doubles->isHeld = true;
  if (inGroup) assert_int_equal(from->groupStart(), 0);
  for (int rank = 0; rank < RANKS; rank++) {
    nccl->childRank = rank;
    assert_int_equal(isShrink ? from->shrink(parents[rank], NULL, 0, &children[rank], NULL, 0)
                              : from->split(parents[rank], 3, 0, &children[rank], NULL),
                     expected);
  }
  if (inGroup) assert_int_equal(from->groupEnd(), FAKE_IN_PROGRESS);
  for (int rank = 0; rank < RANKS; rank++) {
    assert_int_equal(state_of(parents[rank]), FAKE_IN_PROGRESS);
    WAIT_UNTIL(__atomic_load_n(&children[rank], __ATOMIC_ACQUIRE) != NULL);
  }
  WAIT_UNTIL(doubles->held == RANKS);
  assert_int_equal(state_of(children[0]), FAKE_IN_PROGRESS);
  check_refused(children[0]);
  check_refused(parents[0]);
  doubles->isHeld = false;
  all_ready(parents, RANKS);
  assert_int_equal(scheduled(children, RANKS), RANKS);
  all_ready(children, RANKS);
  destroy_all(children, RANKS);
}

static void test_children(void **state) {
  void *parents[RANKS], *none;

  (void)state;
  make_later(parents);
  all_ready(parents, RANKS);
  for (int i = 0; i < 8; i++) {
    nccl->lateSuccess = i & 1;
    check_children(parents, (i & 2) != 0, (i & 4) != 0);
  }
  nccl->lateSuccess = 0;
  /* A rank that gets no child goes on. */
  assert_int_equal(from->split(parents[0], FAKE_NO_COLOUR, 0, &none, NULL), 0);
  assert_null(none);
  assert_int_equal(state_of(parents[0]), 0);
  destroy_all(parents, RANKS);
}

typedef struct {
  void *parent, *child;
  struct fake_config *config;
  int rank, result;
  char kind;
} rank_t;

static void *rank_run(void *argument) {
  rank_t *self = argument;

  switch (self->kind) {
  case 'g':
    self->result =
        from->grow(self->parent, RANKS, NULL, self->parent ? -1 : self->rank, &self->child, self->config);
    break;
  case 'd':
    self->result = from->destroy(self->child);
    break;
  default:
    self->result = from->finalize(self->child);
  }
  return NULL;
}

/* Two old ranks and two new ones; all are in the call. */
static void check_grow(bool isLater) {
  const fake_id id = next_id();
  pthread_t threads[RANKS];
  rank_t ranks[RANKS];

  for (int rank = 0; rank < RANKS; rank++) {
    ranks[rank] = (rank_t){.rank = rank, .kind = 'g', .config = isLater ? &later : NULL};
    if (rank >= 2) continue;
    assert_int_equal(from->groupStart(), 0);
    assert_int_equal(from->initConfig(&ranks[rank].parent, 1, id, 0, &later), FAKE_IN_PROGRESS);
    assert_int_equal(from->groupEnd(), FAKE_IN_PROGRESS);
    assert_int_equal(outcome(ranks[rank].parent), 0);
    if (isLater) ranks[rank].config = NULL; /* as its parent is */
  }
  /* The fake gives a grown rank its old number. */
  if (!isLater)
    for (int rank = 0; rank < 2; rank++) {
      assert_int_equal(from->destroy(ranks[rank].parent), 0);
      ranks[rank].parent = NULL;
    }
  for (int rank = 0; rank < RANKS; rank++)
    assert_int_equal(pthread_create(&threads[rank], NULL, rank_run, &ranks[rank]), 0);
  for (int rank = 0; rank < RANKS; rank++) pthread_join(threads[rank], NULL);
  for (int rank = 0; rank < RANKS; rank++) {
    assert_int_equal(ranks[rank].result, isLater && !nccl->lateSuccess ? FAKE_IN_PROGRESS : 0);
    if (isLater) assert_int_equal(outcome(ranks[rank].child), 0);
    /* As a plugin we may have missed a new rank's call. */
    assert_int_equal(doubles->isScheduled(ranks[rank].child), isPreload);
  }
  for (int rank = 0; rank < RANKS; rank++) {
    assert_int_equal(from->destroy(ranks[rank].child), 0);
    if (ranks[rank].parent) assert_int_equal(from->destroy(ranks[rank].parent), 0);
  }
}

static void test_grow(void **state) {
  (void)state;
  check_grow(false);
  check_grow(true);
  nccl->lateSuccess = 1;
  check_grow(true);
}

/* NCCL_COMM_BLOCKING goes before what a config says. */
static void test_environment(void **state) {
  const fake_id id = next_id();
  struct fake_config blocking = FAKE_CONFIG(1);
  void *comms[RANKS];

  (void)state;
  setenv("NCCL_COMM_BLOCKING", "0", 1);
  for (int rank = 0; rank < RANKS; rank++)
    assert_int_equal(from->initConfig(&comms[rank], RANKS, id, rank, rank % 2 ? &blocking : NULL),
                     FAKE_IN_PROGRESS);
  all_ready(comms, RANKS);
  assert_int_equal(scheduled(comms, RANKS), RANKS);
  destroy_all(comms, RANKS);
  assert_int_equal(from->initAll(comms, RANKS, NULL), FAKE_IN_PROGRESS);
  all_ready(comms, RANKS);
  assert_int_equal(scheduled(comms, RANKS), RANKS);
  destroy_all(comms, RANKS);
  /* This one waits in the call, and its children do not. */
  assert_int_equal(from->init(&comms[0], 1, next_id(), 0), 0);
  assert_true(doubles->isScheduled(comms[0]));
  nccl->childRanks = 1;
  nccl->childRank = 0;
  assert_int_equal(from->split(comms[0], 1, 0, &comms[1], NULL), FAKE_IN_PROGRESS);
  assert_int_equal(outcome(comms[0]), 0);
  assert_true(doubles->isScheduled(comms[1]));
  destroy_all(comms, 2);
  setenv("NCCL_COMM_BLOCKING", "1", 1);
  assert_int_equal(from->initConfig(&comms[0], 1, next_id(), 0, &later), 0);
  assert_true(doubles->isScheduled(comms[0]));
  destroy_all(comms, 1);
}

/* One rank cannot: none is scheduled, and the program goes on with NCCL. */
static void test_failure(void **state) {
  void *comms[RANKS];
  const long calls = nccl->calls;

  (void)state;
  doubles->failingRank = 2;
  make_later(comms);
  all_ready(comms, RANKS);
  assert_int_equal(scheduled(comms, RANKS), 0);
  assert_int_equal(doubles->failed, RANKS);
  assert_int_equal(from->send(&later, 1, 0, 1, comms[0], NULL), FAKE_IN_PROGRESS);
  assert_true(nccl->calls > calls && doubles->launched == 0);
  destroy_all(comms, RANKS);
  assert_int_equal(doubles->ended, 0);
}

/* NCCL itself fails: the program learns it, and there is no set-up. */
static void test_nccl_failure(void **state) {
  void *comms[RANKS];

  (void)state;
  nccl->initError = 6;
  make_later(comms);
  for (int rank = 0; rank < RANKS; rank++) {
    assert_int_equal(outcome(comms[rank]), 6);
    assert_int_equal(from->abort(comms[rank]), 0);
  }
  assert_int_equal(doubles->made + doubles->failed + doubles->aborted, 0);
}

/* While NCCL makes it, and while it is set up. */
static void test_abort(void **state) {
  void *comms[RANKS], *child;

  (void)state;
  nccl->polls = NCCL_FOREVER;
  make_later(comms);
  for (int rank = 0; rank < RANKS; rank++) {
    assert_int_equal(state_of(comms[rank]), FAKE_IN_PROGRESS);
    assert_int_equal(from->abort(comms[rank]), 0);
  }
  assert_int_equal(doubles->made + doubles->failed + doubles->aborted, 0);
  nccl->polls = 1;
  doubles->isHeld = true;
  make_later(comms);
  WAIT_UNTIL(doubles->held == RANKS);
  assert_int_equal(from->abort(comms[1]), 0);
  assert_int_equal(doubles->aborted, 1);
  doubles->isHeld = false;
  for (int rank = 0; rank < RANKS; rank++) {
    if (rank == 1) continue;
    assert_int_equal(outcome(comms[rank]), 0);
    assert_false(doubles->isScheduled(comms[rank]));
    assert_int_equal(from->abort(comms[rank]), 0);
  }
  assert_int_equal(doubles->ended, 0);
  /* A parent, whose child is then given up. */
  assert_int_equal(from->initConfig(&comms[0], 1, next_id(), 0, &later), FAKE_IN_PROGRESS);
  assert_int_equal(outcome(comms[0]), 0);
  nccl->polls = NCCL_FOREVER;
  child = NULL;
  assert_int_equal(from->split(comms[0], 1, 0, &child, NULL), FAKE_IN_PROGRESS);
  assert_int_equal(from->abort(comms[0]), 0);
  assert_null(child);
}

/* A child that is being set up, by the abort of its parent, then of itself. */
static void test_abort_parent(void **state) {
  void *parent, *child = NULL;

  (void)state;
  nccl->childRanks = 1;
  nccl->childRank = 0;
  assert_int_equal(from->initConfig(&parent, 1, next_id(), 0, &later), FAKE_IN_PROGRESS);
  assert_int_equal(outcome(parent), 0);
  doubles->isHeld = true;
  assert_int_equal(from->split(parent, 1, 0, &child, NULL), FAKE_IN_PROGRESS);
  WAIT_UNTIL(doubles->held == 1);
  assert_int_equal(from->abort(parent), 0);
  assert_int_equal(doubles->aborted, 1);
  assert_non_null(child);
  assert_int_equal(state_of(child), 0);
  assert_int_equal(from->abort(child), 0);
}

/* Others than an abort wait for the set-up; and where NCCL is not ready they are refused, as by NCCL. */
static void test_end(void **state) {
  pthread_t threads[RANKS];
  rank_t ranks[RANKS];
  void *comms[RANKS];

  (void)state;
  nccl->polls = NCCL_FOREVER;
  make_later(comms);
  for (int rank = 0; rank < RANKS; rank++) {
    assert_int_equal(from->destroy(comms[rank]), FAKE_INVALID);
    assert_int_equal(from->finalize(comms[rank]), FAKE_INVALID);
    assert_int_equal(state_of(comms[rank]), FAKE_IN_PROGRESS);
    assert_int_equal(from->abort(comms[rank]), 0);
  }
  nccl->polls = 1;
  doubles->isHeld = true;
  make_later(comms);
  WAIT_UNTIL(doubles->held == RANKS);
  for (int rank = 0; rank < RANKS; rank++) {
    ranks[rank] = (rank_t){.child = comms[rank], .kind = rank % 2 ? 'd' : 'f', .result = -1};
    assert_int_equal(pthread_create(&threads[rank], NULL, rank_run, &ranks[rank]), 0);
  }
  for (int i = 0; i < 20; i++) turn();
  assert_true(doubles->ended == 0 && doubles->held == RANKS);
  doubles->isHeld = false;
  for (int rank = 0; rank < RANKS; rank++) {
    pthread_join(threads[rank], NULL);
    assert_int_equal(ranks[rank].result, 0);
    if (rank % 2 == 0) assert_int_equal(from->destroy(comms[rank]), 0);
  }
  assert_true(doubles->made == RANKS && doubles->ended == RANKS && doubles->endedByAbort == 0);
}

/* A call that is refused ends its group, and what there is of ours in it is not launched. Else ours is
 * launched before NCCL does its part. */
static void test_order(void **state) {
  void *ready, *early;
  long calls;

  (void)state;
  assert_int_equal(from->init(&ready, 1, next_id(), 0), 0);
  doubles->isHeld = true;
  assert_int_equal(from->initConfig(&early, 1, next_id(), 0, &later), FAKE_IN_PROGRESS);
  assert_int_equal(from->groupStart(), 0);
  assert_int_equal(from->send(&later, 1, 0, 0, ready, NULL), 0);
  assert_int_equal(from->recv(&later, 1, 0, 0, early, NULL), FAKE_INVALID);
  assert_int_equal(from->groupEnd(), FAKE_INVALID);
  assert_int_equal(doubles->launched, 0);
  doubles->isHeld = false;
  assert_int_equal(outcome(early), 0);
  for (int failure = 0; failure < 6; failure += 5) { /* NCCL's part: no matter */
    assert_int_equal(from->groupStart(), 0);
    assert_int_equal(from->send(&later, 1, 0, 0, ready, NULL), 0);
    assert_int_equal(from->recv(&later, 1, 0, 0, early, NULL), 0);
    assert_int_equal(from->allReduce(NULL, NULL, 1, 0, 0, ready, NULL), 0);
    calls = nccl->calls;
    nccl->result = failure;
    assert_int_equal(from->groupEnd(), failure);
    nccl->result = 0;
    assert_true(doubles->callsBefore == calls);
  }
  assert_int_equal(doubles->launched, 4);
  doubles->launchResult = 1;
  assert_int_equal(from->groupStart(), 0);
  assert_int_equal(from->send(&later, 1, 0, 0, ready, NULL), 0);
  assert_int_equal(from->groupEnd(), 1);
  assert_int_equal(from->send(&later, 1, 0, 0, ready, NULL), 1);
  assert_int_equal(from->destroy(ready), 0);
  assert_int_equal(from->destroy(early), 0);
}

/* A group that is only simulated launches nothing, and the next one is whole. */
static void test_simulated(void **state) {
  void *comm;
  int info;

  (void)state;
  assert_int_equal(from->init(&comm, 1, next_id(), 0), 0);
  assert_int_equal(from->groupStart(), 0);
  assert_int_equal(from->groupStart(), 0);
  assert_int_equal(from->send(&later, 1, 0, 0, comm, NULL), 0);
  assert_int_equal(from->groupEnd(), 0);
  assert_int_equal(from->recv(&later, 1, 0, 0, comm, NULL), 0);
  assert_int_equal(from->groupSimulateEnd(&info), 0);
  assert_true(nccl->depth == 0 && nccl->last.recv == &info);
  assert_int_equal(doubles->launched, 0);
  assert_int_equal(from->groupStart(), 0);
  assert_int_equal(from->send(&later, 1, 0, 0, comm, NULL), 0);
  assert_int_equal(from->groupEnd(), 0);
  assert_int_equal(doubles->launched, 1);
  assert_int_equal(from->destroy(comm), 0);
}

/* What ends the operations of a communicator ends ours, too; those that may follow are NCCL's on all ranks.
 */
static void test_revoke(void **state) {
  void *comms[2], *child;
  int excluded = 7;

  (void)state;
  nccl->childRanks = 1;
  nccl->childRank = 0;
  for (int i = 0; i < 2; i++) assert_int_equal(from->init(&comms[i], 1, next_id(), 0), 0);
  assert_int_equal(from->revoke(comms[0], 1), FAKE_INVALID);
  assert_true(doubles->isScheduled(comms[0]));
  assert_int_equal(from->revoke(comms[0], 0), 0);
  assert_false(doubles->isScheduled(comms[0]));
  assert_int_equal(from->shrink(comms[1], &excluded, 1, &child, NULL, 0), 0);
  assert_true(doubles->isScheduled(child) && doubles->isScheduled(comms[1]));
  assert_int_equal(from->destroy(child), 0);
  assert_int_equal(from->shrink(comms[1], &excluded, 1, &child, NULL, 1), 0);
  assert_true(doubles->isScheduled(child) && !doubles->isScheduled(comms[1]));
  assert_int_equal(doubles->endedByAbort, 2);
  assert_int_equal(from->destroy(child), 0);
  destroy_all(comms, 2);
  /* One that is being made. */
  nccl->polls = NCCL_FOREVER;
  assert_int_equal(from->initConfig(&comms[0], 1, next_id(), 0, &later), FAKE_IN_PROGRESS);
  assert_int_equal(from->revoke(comms[0], 0), 0);
  assert_int_equal(from->abort(comms[0]), 0);
}

/* ---- several threads, each with communicators of its own ---- */
static void check_world(planner_random_t *random) {
  const fake_id id = next_id();
  const bool inGroup = planner_random_below(random, 2), aborts = planner_random_below(random, 3) == 0;
  void *comms[RANKS];

  if (inGroup) (void)from->groupStart();
  for (int rank = 0; rank < RANKS; rank++) (void)from->initConfig(&comms[rank], RANKS, id, rank, &later);
  if (inGroup) (void)from->groupEnd();
  for (int i = planner_random_below(random, 30); i > 0; i--) {
    int error;

    (void)from->asyncError(comms[planner_random_below(random, RANKS)], &error);
    if (planner_random_below(random, 4) == 0) turn();
  }
  for (int rank = 0; rank < RANKS; rank++) {
    int error = FAKE_IN_PROGRESS;

    while (!aborts && error == FAKE_IN_PROGRESS) (void)from->asyncError(comms[rank], &error);
    if (!aborts) (void)from->send(&later, 1, 0, 1, comms[rank], NULL);
    (void)(aborts ? from->abort(comms[rank]) : from->destroy(comms[rank]));
  }
}

static void *worlds_run(void *argument) {
  planner_random_t random = {(uint64_t)(uintptr_t)argument};

  for (int i = 0; i < 25; i++) check_world(&random);
  return NULL;
}

static void test_threads(void **state) {
  pthread_t threads[3];

  (void)state;
  nccl->polls = 3;
  for (uintptr_t i = 0; i < 3; i++)
    assert_int_equal(pthread_create(&threads[i], NULL, worlds_run, (void *)(i + 7)), 0);
  for (int i = 0; i < 3; i++) pthread_join(threads[i], NULL);
  WAIT_UNTIL(doubles->running == 0);
  assert_true(doubles->made > 0 && doubles->made == doubles->ended);
  assert_int_equal(doubles->launched % RANKS, 0);
  assert_true(doubles->launched > 0);
}

#define PENDING_TEST(name) cmocka_unit_test_setup_teardown(name, pending_setup, pending_teardown)

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {
      PENDING_TEST(test_init),        PENDING_TEST(test_unasked),      PENDING_TEST(test_ready_at_once),
      PENDING_TEST(test_group),       PENDING_TEST(test_children),     PENDING_TEST(test_grow),
      PENDING_TEST(test_environment), PENDING_TEST(test_failure),      PENDING_TEST(test_nccl_failure),
      PENDING_TEST(test_abort),       PENDING_TEST(test_abort_parent), PENDING_TEST(test_end),
      PENDING_TEST(test_order),       PENDING_TEST(test_threads),      PENDING_TEST(test_simulated),
      PENDING_TEST(test_revoke),
  };

  isPreload = argc > 1 && strcmp(argv[1], "preload") == 0;
  return cmocka_run_group_tests_name("plugin_pending", tests, pending_group_setup, NULL);
}
