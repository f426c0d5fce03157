/* Operations, their replays in graphs, windows and memory of the NCCL that is not there. */
#include "nccl_test.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

/* ---- operations ---- */

static void check_collective(rank_t *self, int round, size_t bytes) {
  for (int r = 0; r < self->nRanks; r++) {
    size_t at = (size_t)r * bytes, mine = (size_t)self->rank * bytes;
    if (round == 0) expect(self, round, at, r, 0, bytes);
    if (round == 1) expect(self, round, at, r, mine, bytes);
    if (round == 2) expect(self, round, 0, 1, 0, bytes);
    if (round == 3 && self->rank == 1) expect(self, round, at, r, 0, bytes);
    if (round == 4) expect(self, round, 0, 1, mine, bytes);
  }
  size_t used = round == 2 || round == 4 ? bytes : (size_t)self->nRanks * bytes;
  if (round == 3 && self->rank != 1) used = 0;
  expect_untouched(self, used, ARENA - used);
}

static void collective_work(rank_t *self) {
  cudaStream_t stream = self->streams[0];
  const size_t bytes = 10007;
  unsigned char *send = self->send, *recv = self->recv;
  bool isRoot = self->rank == 1;
  for (int round = 0; round < 5; round++) {
    fill(self, round);
    meet();
    if (round == 0) CALL(self, pncclAllGather(send, recv, bytes, INT8, self->comm, stream));
    if (round == 1) CALL(self, ncclAlltoAll(send, recv, bytes, INT8, self->comm, stream));
    if (round == 2) CALL(self, ncclBroadcast(isRoot ? send : NULL, recv, bytes, INT8, 1, self->comm, stream));
    if (round == 3) CALL(self, ncclGather(send, isRoot ? recv : NULL, bytes, INT8, 1, self->comm, stream));
    if (round == 4) CALL(self, ncclScatter(isRoot ? send : NULL, recv, bytes, INT8, 1, self->comm, stream));
    CALL(self, cudaStreamSynchronize(stream));
    check_collective(self, round, bytes);
    meet();
  }
}

static void in_place_work(rank_t *self) {
  cudaStream_t stream = self->streams[0];
  int32_t all[MAX_RANKS] = {0};
  float sums[2] = {(float)self->rank, 0.5f};
  all[self->rank] = self->rank + 40;
  CALL(self, ncclAllGather(&all[self->rank], all, 1, INT32, self->comm, stream));
  CALL(self, ncclAllReduce(sums, sums, 2, FLOAT, SUM, self->comm, stream));
  CALL(self, ncclBroadcast(&all[0], &all[0], 1, INT32, 2, self->comm, stream));
  /* Empty ones are no operations, on one rank alone neither. */
  if (self->rank == 0) CALL(self, ncclAllGather(NULL, NULL, 0, INT8, self->comm, stream));
  CALL(self, cudaStreamSynchronize(stream));
  int n = self->nRanks;
  for (int r = 1; r < n; r++) CHECK(self, all[r] == r + 40, "part %d is %d", r, all[r]);
  CHECK(self, all[0] == 40, "the broadcast in place is %d", all[0]);
  CHECK(self, (int)sums[0] == n * (n - 1) / 2 && sums[1] == 0.5f * (float)n, "sums %f %f", (double)sums[0],
        (double)sums[1]);
}

static void test_collectives(void **state) {
  (void)state;
  run(4, collective_work);
  run(3, in_place_work);
}

static void exchange_work(rank_t *self) {
  for (int round = 0; round < 12; round++) {
    fill(self, round);
    meet();
    exchange(self, round, round % 2);
    sync_all(self);
    check_exchange(self, round);
    meet();
  }
}

static void test_exchange(void **state) {
  (void)state;
  for (int nRanks = 1; nRanks <= MAX_RANKS; nRanks *= 2) run(nRanks, exchange_work);
}

/* Ranks use two streams for one communicator, in orders in which the streams run differently: operations
 * match as they were called. Without a group, too. */
static void order_work(rank_t *self) {
  enum { CALLS = 60 };
  int32_t mine[CALLS], all[CALLS][2], from[CALLS];
  int peer = 1 - self->rank;
  for (int i = 0; i < CALLS; i++) {
    cudaStream_t stream = self->streams[(i / (self->rank + 1)) % STREAMS];
    mine[i] = 1000 * self->rank + i;
    CALL(self, ncclAllGather(&mine[i], all[i], 1, INT32, self->comm, stream));
    if (i % 2 == self->rank) CALL(self, ncclSend(&mine[i], 1, INT32, peer, self->comm, stream));
    if (i % 2 != self->rank) CALL(self, ncclRecv(&from[i], 1, INT32, peer, self->comm, stream));
    if (i % 7 == self->rank) sleep_ms(1);
  }
  sync_all(self);
  for (int i = 0; i < CALLS; i++) {
    CHECK(self, all[i][0] == i && all[i][1] == 1000 + i, "call %d: %d, %d", i, all[i][0], all[i][1]);
    if (i % 2 != self->rank) CHECK(self, from[i] == 1000 * peer + i, "receive %d: %d", i, from[i]);
  }
}

static void test_order(void **state) {
  (void)state;
  run(2, order_work);
}

/* ---- graphs ---- */

static void graph_replay(rank_t *self, cudaGraphExec_t exec, int32_t *mine, const int32_t *all) {
  for (int round = 0; round < 10; round++) {
    *mine = 10 * round + self->rank;
    fill(self, 3);
    meet();
    CALL(self, cudaGraphLaunch(exec, self->streams[0]));
    CALL(self, cudaStreamSynchronize(self->streams[0]));
    for (int r = 0; r < self->nRanks; r++) CHECK(self, all[r] == 10 * round + r, "replay %d", round);
    check_exchange(self, 3);
    use(self, self->comm, self->streams[round % STREAMS]); /* between replays */
  }
  for (int i = 0; i < 20; i++) CALL(self, cudaGraphLaunch(exec, self->streams[0]));
  CALL(self, cudaStreamSynchronize(self->streams[0]));
}

static void graph_work(rank_t *self) {
  cudaGraph_t graph = NULL;
  cudaGraphExec_t exec = NULL;
  cudaEvent_t fork;
  int32_t mine = -1, all[MAX_RANKS];
  CALL(self, cudaEventCreateWithFlags(&fork, cudaEventDisableTiming));
  /* A capture that only rank 0 makes, and nobody runs, counts for nothing. */
  for (int i = self->rank == 0 ? 0 : 1; i < 2; i++) {
    if (graph) CALL(self, cudaGraphDestroy(graph));
    CALL(self, cudaStreamBeginCapture(self->streams[0], cudaStreamCaptureModeThreadLocal));
    CALL(self, cudaEventRecord(fork, self->streams[0]));
    CALL(self, cudaStreamWaitEvent(self->streams[1], fork, 0));
    CALL(self, ncclAllGather(&mine, all, 1, INT32, self->comm, self->streams[0]));
    exchange(self, 3, true);
    CALL(self, cudaStreamEndCapture(self->streams[0], &graph));
  }
  CALL(self, cudaGraphInstantiate(&exec, graph, 0));
  use(self, self->comm, self->streams[1]);
  graph_replay(self, exec, &mine, all);
  CALL(self, cudaEventDestroy(fork));
  CALL(self, cudaGraphExecDestroy(exec));
  CALL(self, cudaGraphDestroy(graph));
}

static void test_graph(void **state) {
  (void)state;
  run(4, graph_work);
}

/* ---- windows ---- */

/* A peer's memory is there as long as the window, though its owner has freed it. */
static void window_life_work(rank_t *self) {
  unsigned char *mine = NULL, *theirs = NULL;
  int peer = 1 - self->rank;
  CALL(self, ncclMemAlloc((void **)&mine, 4096));
  memset(mine, self->rank + 1, 4096);
  ncclWindow_t window = window_open(self, mine, 4096);
  CALL(self, ncclGetPeerDevicePointer(window, 0, peer, (void **)&theirs));
  CALL(self, ncclMemFree(mine));
  meet();
  CHECK(self, theirs && theirs[0] == peer + 1 && theirs[4095] == peer + 1, "the peer's memory is gone");
  meet();
  CALL(self, ncclCommWindowDeregister(self->comm, window));
}

static void no_window_work(rank_t *self) {
  char *plain = NULL;
  CALL(self, cudaMalloc((void **)&plain, 16384));
  char *aligned = (char *)(((uintptr_t)plain + 4095) / 4096 * 4096);
  ncclWindow_t window = window_open(self, aligned, 4096);
  CHECK(self, !window, "cudaMalloc memory has a window");
  window = window_open(self, self->rank == 1 ? (void *)aligned : self->send, 4096);
  CHECK(self, !window, "there is a window though one rank's memory has none");
  window = window_open(self, self->send, (size_t)1 << 40);
  CHECK(self, !window, "there is a window of more than the memory");
  CALL(self, cudaFree(plain));
}

static void off_work(rank_t *self) {
  ncclWindow_t window = window_open(self, self->send, 4096);
  CHECK(self, !window, "there is a window though they are off");
}

static void test_windows(void **state) {
  (void)state;
  run(4, window_work);
  run(2, window_life_work);
  run(3, no_window_work);
  setenv("EMULATED_NCCL_WINDOWS", "0", 1);
  run(2, off_work);
}

static void test_memory(void **state) {
  unsigned char *ptr = NULL;
  emulatedRange_t range;
  size_t before, between, after, total;
  (void)state;
  assert_int_equal(cudaMemGetInfo(&before, &total), SUCCESS);
  assert_int_equal(ncclMemAlloc((void **)&ptr, 100000), SUCCESS);
  assert_int_equal(cudaMemGetInfo(&between, &total), SUCCESS);
  assert_int_equal((uintptr_t)ptr % 4096, 0);
  assert_true(ptr[0] != 0 && ptr[99999] == ptr[0]);
  assert_true(emulated_range_find(ptr + 99999, &range));
  assert_int_equal(range.kind, EMULATED_CUMEM);
  assert_int_equal(ncclMemFree(ptr), SUCCESS);
  assert_int_equal(cudaMemGetInfo(&after, &total), SUCCESS);
  assert_true(between < before);
  assert_true(after == before);
  ptr = NULL;
  assert_int_equal(ncclMemAlloc((void **)&ptr, (size_t)1 << 44), CUDA_ERROR);
  assert_null(ptr);
  assert_int_equal(ncclMemFree(NULL), SUCCESS);
}

/* Optional argument: a test's name or a pattern of names, as cmocka takes them. */
int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_collectives),
      cmocka_unit_test(test_exchange),
      cmocka_unit_test(test_order),
      cmocka_unit_test(test_graph),
      cmocka_unit_test_teardown(test_windows, unset),
      cmocka_unit_test(test_memory),
  };
  if (argc > 1) cmocka_set_test_filter(argv[1]);
  return cmocka_run_group_tests_name("emulated_nccl_ops", tests, NULL, NULL);
}
