/* Collecting sends and receives for our own kernel: what is launched when, in which order, with which codes;
 * and how a group becomes lanes. The communicators and the launch are stand-ins. */
#include "p2p.h"
#include "planner_common.h"
#include "schedule.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#define RANKS 5
#define MOST 600

struct scheduleComm {
  scheduleUse_t use;
  int number, error, refuses;
};

typedef struct {
  int comm, n;
  scheduleOp_t ops[MOST];
} launch_t;

static struct scheduleComm comms[3];
static _Thread_local launch_t launches[8];
static _Thread_local int nLaunches;

int schedule_comm_error(const scheduleComm_t *comm) {
  return comm->error;
}
int schedule_comm_ranks(const scheduleComm_t *comm) {
  (void)comm;
  return RANKS;
}
int schedule_launch(scheduleComm_t *comm, const scheduleOp_t *ops, int n) {
  launch_t *launch = &launches[nLaunches++ % 8];

  if (n > MOST) return P2P_NCCL_SYSTEM_ERROR;
  launch->comm = comm->number;
  launch->n = n;
  memcpy(launch->ops, ops, (size_t)n * sizeof(*ops));
  return comm->refuses;
}

static scheduleOp_t op_make(int number, int peer, bool isRecv) {
  return (scheduleOp_t){.buffer = (void *)(uintptr_t)(4096 + number),
                        .bytes = (uint64_t)number,
                        .stream = (void *)(uintptr_t)(number % 3),
                        .peer = peer,
                        .isRecv = isRecv};
}

static int add(int comm, int number, int peer, bool isRecv, int depth) {
  scheduleOp_t op = op_make(number, peer, isRecv);

  return schedule_add(&comms[comm], &op, depth);
}

static int setup(void **state) {
  (void)state;
  nLaunches = 0;
  for (int i = 0; i < 3; i++) {
    comms[i] = (struct scheduleComm){.number = i};
    schedule_add_comm(&comms[i], &comms[i]);
  }
  return 0;
}

static int teardown(void **state) {
  (void)state;
  for (int i = 0; i < 3; i++) {
    (void)schedule_remove_comm(&comms[i]);
    assert_int_equal(atomic_load(&comms[i].use.users), 0);
  }
  return 0;
}

static void find_test(void **state) {
  int handles[3] = {0, 0, 0};

  (void)state;
  assert_null(schedule_hold(&handles[0]));
  assert_null(schedule_hold(NULL));
  schedule_release(NULL);
  for (int i = 0; i < 3; i++) schedule_add_comm(&handles[i], &comms[i]);
  for (int i = 0; i < 3; i++) {
    assert_ptr_equal(schedule_hold(&handles[i]), &comms[i]);
    assert_int_equal(atomic_load(&comms[i].use.users), 1);
    schedule_release(&comms[i]);
    assert_true(schedule_is_scheduled(&handles[i]));
    assert_int_equal(atomic_load(&comms[i].use.users), 0);
  }
  assert_false(schedule_is_scheduled(&comms[0]));
  assert_ptr_equal(schedule_remove_comm(&handles[1]), &comms[1]);
  assert_null(schedule_remove_comm(&handles[1]));
  assert_false(schedule_is_scheduled(&handles[1]));
  assert_true(schedule_is_scheduled(&handles[2]));
  assert_ptr_equal(schedule_remove_comm(&handles[0]), &comms[0]);
  assert_ptr_equal(schedule_remove_comm(&handles[2]), &comms[2]);
  assert_false(schedule_is_scheduled(&handles[2]));
}

static void *release_run(void *argument) {
  nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
  ((struct scheduleComm *)argument)->error = 1;
  schedule_release(argument);
  return NULL;
}

/* One that ends is not to be had any more, and is there until the last call has left it. */
static void ending_test(void **state) {
  pthread_t thread;

  (void)state;
  assert_ptr_equal(schedule_hold(&comms[1]), &comms[1]);
  assert_ptr_equal(schedule_remove_comm(&comms[1]), &comms[1]);
  assert_null(schedule_hold(&comms[1]));
  assert_int_equal(pthread_create(&thread, NULL, release_run, &comms[1]), 0);
  schedule_wait_unused(&comms[1]);
  assert_int_equal(comms[1].error, 1);
  pthread_join(thread, NULL);
}

/* It ends before the group does: that part of the group is refused, and not given to one at its address. */
static void ended_in_group_test(void **state) {
  (void)state;
  assert_int_equal(add(1, 1, 1, false, 1), 0);
  assert_int_equal(add(2, 2, 1, false, 1), 0);
  assert_ptr_equal(schedule_remove_comm(&comms[1]), &comms[1]);
  schedule_add_comm(&comms[1], &comms[1]);
  assert_int_equal(schedule_group_ended(true), P2P_NCCL_INVALID_USAGE);
  assert_int_equal(nLaunches, 1);
  assert_int_equal(launches[0].comm, 2);
}

/* A set-up is told to end, before or while it looks. */
static void setup_test(void **state) {
  scheduleSetup_t one;
  int32_t first = 0, second = 0;

  (void)state;
  assert_false(schedule_setup_is_aborted(NULL));
  schedule_setup_watch(NULL, &first);
  schedule_setup_init(&one);
  schedule_setup_watch(&one, &first);
  assert_false(schedule_setup_is_aborted(&one));
  schedule_setup_abort(&one);
  assert_true(schedule_setup_is_aborted(&one));
  assert_int_equal(first, 1);
  schedule_setup_watch(&one, NULL);
  schedule_setup_abort(&one);
  schedule_setup_watch(&one, &second);
  assert_int_equal(second, 1);
  pthread_mutex_destroy(&one.lock);
}

static void alone_test(void **state) {
  (void)state;
  assert_int_equal(add(1, 7, 3, true, 0), P2P_NCCL_SUCCESS);
  assert_int_equal(nLaunches, 1);
  assert_true(launches[0].comm == 1 && launches[0].n == 1 && launches[0].ops[0].bytes == 7);
  assert_int_equal(schedule_group_ended(true), P2P_NCCL_SUCCESS);
  assert_int_equal(nLaunches, 1);
}

/* One launch for each communicator, in order of first call, its calls in order. */
static void group_test(void **state) {
  (void)state;
  for (int i = 0; i < 300; i++) assert_int_equal(add(i % 7 == 0 ? 2 : 0, i, i % RANKS, i % 2, 1 + i % 3), 0);
  assert_int_equal(nLaunches, 0);
  assert_int_equal(schedule_group_ended(true), 0);
  assert_int_equal(nLaunches, 2);
  assert_true(launches[0].comm == 2 && launches[1].comm == 0);
  assert_int_equal(launches[0].n + launches[1].n, 300);
  for (int l = 0; l < 2; l++)
    for (int i = 0; i < launches[l].n; i++) {
      const scheduleOp_t *op = &launches[l].ops[i];
      scheduleOp_t expected = op_make((int)op->bytes, (int)op->bytes % RANKS, op->bytes % 2);

      assert_true(op->buffer == expected.buffer && op->stream == expected.stream &&
                  op->peer == expected.peer && op->isRecv == expected.isRecv);
      assert_int_equal(op->bytes % 7 == 0, l == 0);
      if (i > 0) assert_true(op->bytes > launches[l].ops[i - 1].bytes);
    }
  assert_int_equal(schedule_group_ended(true), 0);
  assert_int_equal(nLaunches, 2);
}

/* NCCL's part of the group has failed: nothing is launched, then or later. */
static void failed_group_test(void **state) {
  (void)state;
  assert_int_equal(add(0, 1, 1, false, 1), 0);
  assert_int_equal(schedule_group_ended(false), 0);
  assert_int_equal(schedule_group_ended(true), 0);
  assert_int_equal(nLaunches, 0);
}

static void errors_test(void **state) {
  scheduleOp_t null = {.bytes = 1, .peer = 0}, empty = {.bytes = 0, .peer = 0};

  (void)state;
  assert_int_equal(add(0, 1, -1, false, 0), P2P_NCCL_INVALID_ARGUMENT);
  assert_int_equal(add(0, 1, RANKS, true, 1), P2P_NCCL_INVALID_ARGUMENT);
  assert_int_equal(schedule_add(&comms[0], &null, 1), P2P_NCCL_INVALID_ARGUMENT);
  assert_int_equal(schedule_add(&comms[0], &empty, 1), P2P_NCCL_SUCCESS);
  comms[1].error = P2P_NCCL_REMOTE_ERROR;
  assert_int_equal(add(1, 1, 1, false, 1), P2P_NCCL_REMOTE_ERROR);
  /* One communicator's failure does not keep the others from going. */
  comms[0].refuses = P2P_NCCL_CUDA_ERROR;
  assert_int_equal(add(2, 1, 1, false, 1), 0);
  assert_int_equal(schedule_group_ended(true), P2P_NCCL_CUDA_ERROR);
  assert_int_equal(nLaunches, 2);
}

static void *thread_run(void *argument) {
  bool *good = argument;

  for (int round = 0; round < 50 && *good; round++) {
    nLaunches = 0;
    for (int i = 0; i < 40; i++) *good = *good && add(1, 100 * round + i, i % RANKS, false, 1) == 0;
    *good = *good && schedule_group_ended(true) == 0 && nLaunches == 1 && launches[0].n == 40;
    for (int i = 0; i < 40; i++) *good = *good && launches[0].ops[i].bytes == (uint64_t)(100 * round + i);
  }
  return NULL;
}

static void threads_test(void **state) {
  pthread_t threads[4];
  bool good[4] = {true, true, true, true};

  (void)state;
  for (int i = 0; i < 4; i++) assert_int_equal(pthread_create(&threads[i], NULL, thread_run, &good[i]), 0);
  for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
  for (int i = 0; i < 4; i++) assert_true(good[i]);
}

static void lanes_test(void **state) {
  planner_random_t random = {9};

  (void)state;
  for (int round = 0; round < 200; round++) {
    scheduleOp_t ops[100];
    kernelP2pLane_t lanes[2 * RANKS];
    kernelP2pOp_t sorted[100];
    int32_t from[100], counts[2 * RANKS];
    int n = 1 + planner_random_below(&random, 100), seen = 0, last[100];

    for (int i = 0; i < n; i++)
      ops[i] = op_make(planner_random_below(&random, 1000), planner_random_below(&random, RANKS),
                       planner_random_below(&random, 2));
    memset(last, 0, sizeof(last));
    int nLanes = schedule_lanes(ops, n, RANKS, lanes, sorted, from, counts);
    for (int l = 0; l < nLanes; l++) {
      assert_true(lanes[l].n > 0 && lanes[l].first == seen);
      seen += lanes[l].n;
      for (int i = lanes[l].first; i < seen; i++) {
        const scheduleOp_t *op = &ops[from[i]];

        assert_true(last[from[i]]++ == 0); /* every one once */
        assert_true(op->peer == lanes[l].peer && op->isRecv == lanes[l].isRecv);
        assert_true(sorted[i].address == (uintptr_t)op->buffer && sorted[i].bytes == op->bytes);
        assert_int_equal(sorted[i].slot, KERNEL_P2P_NO_SLOT);
        if (i > lanes[l].first) assert_true(from[i] > from[i - 1]);
      }
      for (int other = 0; other < l; other++)
        assert_true(lanes[other].peer != lanes[l].peer || lanes[other].isRecv != lanes[l].isRecv);
    }
    assert_int_equal(seen, n);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(find_test),
      cmocka_unit_test(setup_test),
      cmocka_unit_test_setup_teardown(alone_test, setup, teardown),
      cmocka_unit_test_setup_teardown(group_test, setup, teardown),
      cmocka_unit_test_setup_teardown(failed_group_test, setup, teardown),
      cmocka_unit_test_setup_teardown(errors_test, setup, teardown),
      cmocka_unit_test_setup_teardown(ending_test, setup, teardown),
      cmocka_unit_test_setup_teardown(ended_in_group_test, setup, teardown),
      cmocka_unit_test_setup_teardown(threads_test, setup, teardown),
      cmocka_unit_test(lanes_test),
  };

  return cmocka_run_group_tests_name("plugin_schedule", tests, NULL, NULL);
}
