/* Communicators of the NCCL that is not there: how they begin and end, and what goes wrong. */
#include "nccl_test.h"

#include <semaphore.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- communicators ---- */

static void init_work(rank_t *self) {
  int nRanks = 0, rank = -1, device = -1, error = -1;
  CALL(self, ncclCommCount(self->comm, &nRanks));
  CALL(self, ncclCommUserRank(self->comm, &rank));
  CALL(self, ncclCommCuDevice(self->comm, &device));
  CALL(self, ncclCommGetAsyncError(self->comm, &error));
  CHECK(self, nRanks == self->nRanks && rank == self->rank && device == 0 && error == SUCCESS,
        "rank %d of %d, device %d, error %d", rank, nRanks, device, error);
  use(self, self->comm, self->streams[0]);
}

static void test_init(void **state) {
  (void)state;
  for (int nRanks = 1; nRanks <= MAX_RANKS; nRanks = nRanks < 4 ? nRanks + 1 : 2 * nRanks)
    run(nRanks, init_work);
}

static void test_arguments(void **state) {
  ncclUniqueId_t id;
  ncclComm_t comm = NULL, other;
  ncclConfig_t config = {.magic = 1, .blocking = INT_MIN};
  int value = 0;
  float one = 0;
  (void)state;
  assert_int_equal(ncclGetVersion(&value), SUCCESS);
  assert_int_equal(value, 23007);
  for (int i = 0; i < 9; i++) assert_non_null(ncclGetErrorString(i));
  assert_int_equal(ncclGetUniqueId(&id), SUCCESS);
  assert_int_equal(ncclCommInitRank(&comm, 0, id, 0), INVALID_ARGUMENT);
  assert_int_equal(ncclCommInitRank(&comm, 1, id, 1), INVALID_ARGUMENT);
  assert_int_equal(ncclCommInitRankConfig(&comm, 1, id, 0, &config), INVALID_ARGUMENT);
  assert_null(comm);
  config.magic = 0xcafebeef;
  assert_int_equal(ncclCommInitRankConfig(&comm, 1, id, 0, &config), SUCCESS);
  assert_int_equal(ncclSend(&one, 1, FLOAT, 1, comm, NULL), INVALID_ARGUMENT);
  assert_int_equal(ncclRecv(NULL, 1, FLOAT, 0, comm, NULL), INVALID_ARGUMENT);
  assert_int_equal(ncclAllGather(&one, &one, 1, 99, comm, NULL), INVALID_ARGUMENT);
  assert_int_equal(ncclAllReduce(&one, &one, 1, INT8, SUM, comm, NULL), INVALID_ARGUMENT);
  assert_true(strlen(ncclGetLastError(comm)) > 0);
  assert_int_equal(ncclCommSplit(comm, -2, 0, &other, NULL), INVALID_ARGUMENT);
  /* An error ends the group, and nothing of it is done. */
  assert_int_equal(ncclGroupEnd(), INVALID_USAGE);
  assert_int_equal(ncclGroupStart(), SUCCESS);
  assert_int_equal(ncclRecv(&one, 1, FLOAT, 0, comm, NULL), SUCCESS);
  assert_int_equal(ncclCommSplit(comm, 0, 0, &other, NULL), SUCCESS);
  assert_int_equal(ncclSend(&one, 1, FLOAT, -1, comm, NULL), INVALID_ARGUMENT);
  assert_int_equal(ncclGroupEnd(), INVALID_ARGUMENT);
  assert_null(other);
  assert_int_equal(ncclCommFinalize(comm), SUCCESS);
  assert_int_equal(ncclCommCount(comm, &value), INVALID_ARGUMENT);
  assert_int_equal(ncclCommDestroy(comm), SUCCESS);
  assert_int_equal(ncclCommDestroy(comm), INVALID_ARGUMENT);
  assert_int_equal(ncclCommAbort(comm), INVALID_ARGUMENT);
  assert_int_equal(ncclCommGetAsyncError(comm, &value), INVALID_ARGUMENT);
}

/* All ranks in one thread: their calls wait for each other, and are made at the end of the group. */
static void one_thread(ncclComm_t *comms, int n) {
  cudaStream_t streams[4];
  int32_t mine[4], all[4][4] = {{0}};
  for (int r = 0; r < n; r++) {
    mine[r] = 100 + r;
    assert_int_equal(cudaStreamCreateWithFlags(&streams[r], cudaStreamNonBlocking), SUCCESS);
  }
  assert_int_equal(ncclGroupStart(), SUCCESS);
  for (int r = 0; r < n; r++)
    assert_int_equal(ncclAllGather(&mine[r], all[r], 1, INT32, comms[r], streams[r]), SUCCESS);
  assert_int_equal(ncclGroupEnd(), SUCCESS);
  for (int r = 0; r < n; r++) {
    assert_int_equal(cudaStreamSynchronize(streams[r]), SUCCESS);
    for (int i = 0; i < n; i++) assert_int_equal(all[r][i], 100 + i);
    assert_int_equal(cudaStreamDestroy(streams[r]), SUCCESS);
  }
}

static void test_one_thread(void **state) {
  ncclUniqueId_t id;
  ncclComm_t comms[4], halves[4];
  const int devices[4] = {0, 0, 0, 0};
  (void)state;
  assert_int_equal(ncclGetUniqueId(&id), SUCCESS);
  assert_int_equal(ncclGroupStart(), SUCCESS);
  assert_int_equal(ncclGroupStart(), SUCCESS);
  for (int r = 0; r < 4; r++) assert_int_equal(ncclCommInitRank(&comms[r], 4, id, r), SUCCESS);
  assert_int_equal(ncclGroupEnd(), SUCCESS);
  assert_int_equal(ncclGroupEnd(), SUCCESS);
  one_thread(comms, 4);
  assert_int_equal(ncclGroupStart(), SUCCESS);
  for (int r = 0; r < 4; r++) assert_int_equal(ncclCommSplit(comms[r], r / 2, -r, &halves[r], NULL), SUCCESS);
  assert_int_equal(ncclGroupEnd(), SUCCESS);
  one_thread((ncclComm_t[]){halves[1], halves[0]}, 2);
  one_thread((ncclComm_t[]){halves[3], halves[2]}, 2);
  for (int r = 0; r < 4; r++) {
    assert_int_equal(ncclCommDestroy(halves[r]), SUCCESS);
    assert_int_equal(ncclCommDestroy(comms[r]), SUCCESS);
  }
  assert_int_equal(ncclCommInitAll(comms, 3, devices), SUCCESS);
  one_thread(comms, 3);
  for (int r = 0; r < 3; r++) assert_int_equal(ncclCommDestroy(comms[r]), SUCCESS);
}

static void split_work(rank_t *self) {
  ncclComm_t child = NULL, none = self->comm;
  int rank = -1, nRanks = 0;
  /* Ranks 0, 2, 4 in reverse; 1, 3 alike; 5 in none. */
  int colour = self->rank == 5 ? -1 : self->rank % 2;
  CALL(self, ncclCommSplit(self->comm, colour, colour == 0 ? -self->rank : 7, &child, NULL));
  if (colour < 0) {
    CHECK(self, !child, "a rank without a colour has a communicator");
  } else {
    CALL(self, ncclCommUserRank(child, &rank));
    CALL(self, ncclCommCount(child, &nRanks));
    CHECK(self, nRanks == (colour == 0 ? 3 : 2), "%d ranks", nRanks);
    CHECK(self, rank == (colour == 0 ? 2 - self->rank / 2 : self->rank / 2), "rank %d", rank);
    use(self, child, self->streams[0]);
  }
  use(self, self->comm, self->streams[1]);
  if (child) CALL(self, ncclCommDestroy(child));
  CALL(self, ncclCommSplit(self->comm, -1, 0, &none, NULL));
  CHECK(self, !none, "a split without colours made a communicator");
}

static void test_split(void **state) {
  (void)state;
  run(6, split_work);
}

/* Each rank has its own order of several communicators, each on a stream of its own. */
static void many_work(rank_t *self) {
  enum { COMMS = 4 };
  ncclComm_t comms[COMMS];
  cudaStream_t streams[COMMS];
  int32_t mine[COMMS], all[COMMS][MAX_RANKS];
  for (int i = 0; i < COMMS; i++) {
    CALL(self, ncclCommSplit(self->comm, 0, self->rank, &comms[i], NULL));
    CALL(self, cudaStreamCreateWithFlags(&streams[i], cudaStreamNonBlocking));
  }
  for (int round = 0; round < 20; round++) {
    for (int i = 0; i < COMMS; i++) {
      int at = (i + self->rank + round) % COMMS;
      mine[at] = self->rank * 100 + at * 10 + round;
      CALL(self, ncclAllGather(&mine[at], all[at], 1, INT32, comms[at], streams[at]));
    }
    for (int i = 0; i < COMMS; i++) {
      CALL(self, cudaStreamSynchronize(streams[i]));
      for (int r = 0; r < self->nRanks; r++)
        CHECK(self, all[i][r] == r * 100 + i * 10 + round, "round %d, communicator %d", round, i);
    }
  }
  for (int i = 0; i < COMMS; i++) {
    CALL(self, ncclCommDestroy(comms[i]));
    CALL(self, cudaStreamDestroy(streams[i]));
  }
}

static void test_many(void **state) {
  (void)state;
  run(4, many_work);
}

/* ---- abort ---- */

typedef enum { WAIT_RECV, WAIT_GATHER, WAIT_GROUP, WAIT_WINDOW, WAIT_SPLIT, WAIT_DESTROY, WAITS } wait_t;
static wait_t waitsIn;

typedef struct {
  rank_t *self;
  sem_t called; /* what is in a stream is there; a call of the host comes */
} waiter_t;

/* Calls what the last rank never does. */
static void *wait_call(void *argument) {
  waiter_t *waiter = argument;
  rank_t *self = waiter->self;
  int last = self->nRanks - 1;
  ncclWindow_t window;
  ncclComm_t child;
  switch (waitsIn) {
  case WAIT_RECV:
    CALL(self, ncclRecv(self->recv, 100, INT8, last, self->comm, self->streams[0]));
    break;
  case WAIT_GROUP:
    exchange(self, 0, true);
    break;
  case WAIT_WINDOW:
    sem_post(&waiter->called);
    if (ncclCommWindowRegister(self->comm, self->recv, 4096, &window, 1) == SUCCESS)
      CHECK(self, false, "the window is there without the last rank");
    return NULL;
  case WAIT_SPLIT:
    sem_post(&waiter->called);
    if (ncclCommSplit(self->comm, 0, 0, &child, NULL) == SUCCESS)
      CHECK(self, false, "the communicator is there without the last rank");
    return NULL;
  default:
    CALL(self, ncclAllGather(self->send, self->recv, 100, INT8, self->comm, self->streams[0]));
  }
  sem_post(&waiter->called);
  if (waitsIn == WAIT_DESTROY && ncclCommDestroy(self->comm) == SUCCESS)
    CHECK(self, false, "the communicator was destroyed while it waits");
  for (int i = 0; i < STREAMS; i++) (void)cudaStreamSynchronize(self->streams[i]);
  return NULL;
}

static void abort_work(rank_t *self) {
  pthread_t thread;
  waiter_t waiter = {.self = self};
  bool isAway = self->rank == self->nRanks - 1;
  CALL(self, sem_init(&waiter.called, 0, 0));
  if (!isAway) {
    int error = -1;
    CALL(self, pthread_create(&thread, NULL, wait_call, &waiter));
    sem_wait(&waiter.called);
    sleep_ms(20);
    if (self->rank == 0 && waitsIn <= WAIT_GATHER)
      CHECK(self, cudaStreamQuery(self->streams[0]) == cudaErrorNotReady, "it does not wait");
    CALL(self, ncclCommGetAsyncError(self->comm, &error));
    CHECK(self, error == SUCCESS, "the error is %d", error);
    if (self->rank == 0) CALL(self, ncclCommAbort(self->comm));
    if (self->rank == 0) pthread_join(thread, NULL);
  }
  meet();
  if (self->rank == 1 && waitsIn <= WAIT_GATHER) /* one rank's abort is not the others' */
    CHECK(self, cudaStreamQuery(self->streams[0]) == cudaErrorNotReady, "the peer's wait has ended");
  if (self->rank != 0) CALL(self, ncclCommAbort(self->comm));
  if (self->rank != 0 && !isAway) pthread_join(thread, NULL);
  sem_destroy(&waiter.called);
  self->comm = NULL;
}

static void test_abort(void **state) {
  (void)state;
  for (int i = 0; i < WAITS; i++) {
    waitsIn = (wait_t)i;
    run(3, abort_work);
  }
}

/* Another thread of the process ends a rank's wait; what is queued behind does nothing; others work on. */
static void foreign_abort_work(rank_t *self) {
  ncclComm_t twin = NULL;
  CALL(self, ncclCommSplit(self->comm, 0, self->rank, &twin, NULL));
  if (self->rank == 0)
    for (int i = 0; i < 5; i++)
      CALL(self, ncclAllGather(self->send, self->recv, 100, INT8, self->comm, self->streams[0]));
  meet();
  if (self->rank == 1) CALL(self, ncclCommAbort(world.ranks[0].comm));
  if (self->rank == 1) world.ranks[0].comm = NULL;
  meet();
  CALL(self, cudaStreamSynchronize(self->streams[0]));
  use(self, twin, self->streams[0]);
  meet();
  CALL(self, ncclCommDestroy(twin));
}

static void test_foreign_abort(void **state) {
  (void)state;
  run(2, foreign_abort_work);
}

/* ---- communicators that do not block ---- */

static void non_blocking_work(rank_t *self) {
  ncclComm_t child = NULL;
  int result = -1;
  /* Rank 1 comes only when rank 0 has looked. */
  if (self->rank == 1) meet();
  CALL_IS(self, ncclCommSplit(self->comm, 0, -self->rank, &child, NULL), IN_PROGRESS);
  if (self->rank == 0) {
    CALL(self, ncclCommGetAsyncError(child, &result));
    CHECK(self, result == IN_PROGRESS, "the child is at %d", result);
    CALL_IS(self, ncclCommCount(child, &result), INVALID_ARGUMENT);
    CALL(self, ncclCommGetAsyncError(self->comm, &result));
    CHECK(self, result == IN_PROGRESS, "the parent is at %d", result);
  }
  if (self->rank != 1) meet();
  CALL(self, settle(&child, IN_PROGRESS));
  CALL(self, settle(&self->comm, IN_PROGRESS));
  use(self, child, self->streams[0]);
  /* The first operation is in progress, the next is not. */
  CALL_IS(self, ncclAllGather(self->send, self->recv, 1, INT8, self->comm, self->streams[1]), IN_PROGRESS);
  CALL(self, settle(&self->comm, IN_PROGRESS));
  CALL(self, ncclAllGather(self->send, self->recv, 1, INT8, self->comm, self->streams[1]));
  window_work(self);
  CALL_IS(self, ncclCommFinalize(child), IN_PROGRESS);
  CALL(self, settle(&child, IN_PROGRESS));
  CALL(self, ncclCommDestroy(child));
}

/* A rank does not come; those that wait abort what they have got. */
static void non_blocking_abort_work(rank_t *self) {
  ncclUniqueId_t id = world.id;
  ncclComm_t made = NULL, child = NULL;
  ncclWindow_t window = NULL;
  int result = -1;
  if (self->rank == 0) {
    id.bytes[0] ^= 0x40;
    CALL_IS(self, ncclCommInitRank(&made, 2, id, 0), IN_PROGRESS);
    CALL_IS(self, ncclCommSplit(self->comm, 0, 0, &child, NULL), IN_PROGRESS);
    sleep_ms(20);
    CALL(self, ncclCommGetAsyncError(made, &result));
    CHECK(self, result == IN_PROGRESS, "it is at %d", result);
    CALL(self, ncclCommAbort(made));
    CALL(self, ncclCommAbort(child));
    CHECK(self, settle(&self->comm, SUCCESS) != SUCCESS, "the parent knows nothing");
  } else {
    CALL(self, ncclCommWindowRegister(self->comm, self->send, 4096, &window, 1));
    sleep_ms(20);
    CALL(self, ncclCommGetAsyncError(self->comm, &result));
    CHECK(self, result == IN_PROGRESS || result == INVALID_USAGE, "it is at %d", result);
  }
  meet();
  CALL(self, ncclCommAbort(self->comm));
  self->comm = NULL;
}

static void test_non_blocking(void **state) {
  (void)state;
  setenv("NCCL_COMM_BLOCKING", "0", 1);
  run(4, non_blocking_work);
  run(2, non_blocking_abort_work);
}

static void config_work(rank_t *self) {
  ncclConfig_t config = {.size = sizeof(config), .magic = 0xcafebeef, .version = 23007, .blocking = 0};
  ncclUniqueId_t id = world.id;
  ncclComm_t made = NULL;
  id.bytes[0] ^= 0x20;
  CALL_IS(self, ncclCommInitRankConfig(&made, self->nRanks, id, self->rank, &config), IN_PROGRESS);
  CALL(self, settle(&made, IN_PROGRESS));
  use(self, made, self->streams[0]);
  CALL(self, ncclCommDestroy(made));
}

static void test_config(void **state) {
  (void)state;
  run(3, config_work);
}

/* ---- mistakes ---- */

static void mismatch_work(rank_t *self) {
  int error = 0;
  ncclComm_t again = NULL;
  size_t count = self->rank == 1 ? 200 : 100;
  CALL_IS(self, ncclCommInitRank(&again, self->nRanks + 1, world.id, self->nRanks + 1), INVALID_ARGUMENT);
  fill(self, 0);
  meet();
  CALL(self, ncclAllGather(self->send, self->recv, count, INT8, self->comm, self->streams[0]));
  CALL(self, cudaStreamSynchronize(self->streams[0]));
  CALL(self, ncclCommGetAsyncError(self->comm, &error));
  CHECK(self, error == INVALID_USAGE, "the error is %d", error);
  expect_untouched(self, 0, ARENA);
  CALL_IS(self, ncclAllGather(self->send, self->recv, 1, INT8, self->comm, self->streams[0]), INVALID_USAGE);
}

static void test_mismatch(void **state) {
  (void)state;
  run(3, mismatch_work);
}

/* Destroying waits for what was issued; what a graph does afterwards is nothing. */
static void destroy_work(rank_t *self) {
  cudaGraph_t graph = NULL;
  cudaGraphExec_t exec = NULL;
  fill(self, 1);
  meet();
  CALL(self, cudaStreamBeginCapture(self->streams[1], cudaStreamCaptureModeThreadLocal));
  CALL(self, ncclAllGather(self->send, self->recv, 10, INT8, self->comm, self->streams[1]));
  CALL(self, cudaStreamEndCapture(self->streams[1], &graph));
  CALL(self, cudaGraphInstantiate(&exec, graph, 0));
  if (self->rank == 1) sleep_ms(20);
  for (int i = 0; i < 50; i++)
    CALL(self, ncclAllGather(self->send, self->recv, 1000, INT8, self->comm, self->streams[0]));
  CALL(self, ncclCommDestroy(self->comm));
  self->comm = NULL;
  for (int r = 0; r < self->nRanks; r++) expect(self, 1, (size_t)r * 1000, r, 0, 1000);
  CALL(self, cudaGraphLaunch(exec, self->streams[1]));
  CALL(self, cudaStreamSynchronize(self->streams[1]));
  CALL(self, cudaGraphExecDestroy(exec));
  CALL(self, cudaGraphDestroy(graph));
}

static void test_destroy(void **state) {
  (void)state;
  run(3, destroy_work);
}

/* Optional argument: a test's name or a pattern of names, as cmocka takes them. */
int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_init),          cmocka_unit_test(test_arguments),
      cmocka_unit_test(test_one_thread),    cmocka_unit_test(test_split),
      cmocka_unit_test(test_many),          cmocka_unit_test(test_abort),
      cmocka_unit_test(test_foreign_abort), cmocka_unit_test_teardown(test_non_blocking, unset),
      cmocka_unit_test(test_config),        cmocka_unit_test(test_mismatch),
      cmocka_unit_test(test_destroy),
  };
  if (argc > 1) cmocka_set_test_filter(argv[1]);
  return cmocka_run_group_tests_name("emulated_nccl", tests, NULL, NULL);
}
