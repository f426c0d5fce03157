/* The traffic record: counting from many threads, opening and closing, windows, what the public call says. */
#include "traffic_internal.h"

#include <malloc.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { THREADS = 8, COUNTS = 100000, RANKS = 8, MANY = 3000, CHURN = 10000 };

static char keys[MANY];
static void *const key = keys;

static ultraepTraffic_t get(const void *comm) {
  ultraepTraffic_t traffic = ULTRAEP_TRAFFIC_INITIALIZER;

  if (ultraepTrafficGet((ncclComm_t)(uintptr_t)comm, &traffic) != ultraepSuccess)
    fail_msg("%s", ultraepGetLastError());
  return traffic;
}

/* ---- 8 threads ---- */
static void *count_many(void *argument) {
  const int *thread = argument;

  for (int i = 0; i < COUNTS; i++) {
    traffic_count(traffic_comm_find(key), TRAFFIC_SEND, i % RANKS, (uint64_t)i);
    traffic_count(traffic_comm_find(key), TRAFFIC_RECV, *thread, 3);
  }
  return NULL;
}

static void test_threads(void **state) {
  pthread_t threads[THREADS];
  int numbers[THREADS];
  int64_t bytes[2][RANKS], calls[2][RANKS];
  trafficComm_t *comm = traffic_comm_open(key, 0xabc, 2, RANKS);
  ultraepTraffic_t traffic = ULTRAEP_TRAFFIC_INITIALIZER;

  (void)state;
  assert_non_null(comm);
  for (int t = 0; t < THREADS; t++) {
    numbers[t] = t;
    assert_int_equal(pthread_create(&threads[t], NULL, count_many, &numbers[t]), 0);
  }
  for (int t = 0; t < THREADS; t++) pthread_join(threads[t], NULL);
  traffic.sendBytes = bytes[0];
  traffic.sendCalls = calls[0];
  traffic.recvBytes = bytes[1];
  traffic.recvCalls = calls[1];
  traffic.capacity = RANKS;
  assert_int_equal(ultraepTrafficGet(key, &traffic), ultraepSuccess);
  for (int r = 0; r < RANKS; r++) {
    /* Each thread sent r, r + 8, r + 16 ... bytes to rank r. */
    int64_t n = COUNTS / RANKS;

    assert_int_equal(calls[0][r], THREADS * n);
    assert_int_equal(bytes[0][r], THREADS * (n * r + RANKS * (n * (n - 1) / 2)));
    assert_int_equal(calls[1][r], COUNTS);
    assert_int_equal(bytes[1][r], 3 * COUNTS);
  }
  assert_int_equal(traffic.totalSendCalls, (int64_t)THREADS * COUNTS);
  assert_int_equal(traffic.totalRecvBytes, (int64_t)THREADS * COUNTS * 3);
  assert_int_equal(traffic.rank, 2);
  assert_int_equal(traffic.hash, 0xabc);
  traffic_comm_close(comm);
  assert_null(traffic_comm_find(key));
}

/* ---- operations with every peer ---- */
static void *count_all_many(void *argument) {
  (void)argument;
  for (int i = 0; i < COUNTS; i++) {
    traffic_count_all_to_all(traffic_comm_find(key), (uint64_t)i);
    traffic_count_all(traffic_comm_find(key), i % 2 ? TRAFFIC_RECV : TRAFFIC_SEND, 5);
    if (i % RANKS == 0) traffic_count(traffic_comm_find(key), TRAFFIC_SEND, 3, 1);
  }
  return NULL;
}

static void test_all(void **state) {
  enum { HALF = COUNTS / 2 };
  pthread_t threads[THREADS];
  int64_t bytes[2][2 * RANKS], calls[2][2 * RANKS], sum = (int64_t)COUNTS * (COUNTS - 1) / 2;
  trafficComm_t *comm = traffic_comm_open(key, 0xab1, 1, RANKS);
  ultraepTraffic_t traffic = ULTRAEP_TRAFFIC_INITIALIZER;

  (void)state;
  assert_non_null(comm);
  for (int t = 0; t < THREADS; t++)
    assert_int_equal(pthread_create(&threads[t], NULL, count_all_many, NULL), 0);
  for (int t = 0; t < THREADS; t++) pthread_join(threads[t], NULL);
  /* The events of the same operations, and more of one of them. */
  for (int i = 0; i < 2 * THREADS * COUNTS; i++) traffic_count_event(comm, TRAFFIC_RECV, 6, 0);
  traffic.sendBytes = bytes[0];
  traffic.sendCalls = calls[0];
  traffic.recvBytes = bytes[1];
  traffic.recvCalls = calls[1];
  traffic.capacity = 2 * RANKS;
  for (int round = 0; round < 2; round++) {
    assert_int_equal(ultraepTrafficGet(key, &traffic), ultraepSuccess);
    for (int r = 0; r < RANKS; r++) {
      int64_t more = r == 3 ? COUNTS / RANKS : 0;

      assert_int_equal(bytes[0][r], THREADS * (sum + 5 * HALF + more));
      assert_int_equal(calls[0][r], THREADS * (COUNTS + HALF + more));
      assert_int_equal(bytes[1][r], THREADS * (sum + 5 * HALF));
      assert_int_equal(calls[1][r], THREADS * (r == 6 ? 2 * COUNTS : COUNTS + HALF));
    }
    /* Ranks that the record has learned of afterwards had no part in them. */
    for (int r = RANKS; r < traffic.nRanks; r++)
      assert_true(bytes[0][r] == 0 && calls[0][r] == 0 && bytes[1][r] == 0 && calls[1][r] == 0);
    assert_int_equal(traffic.nRanks, (round + 1) * RANKS);
    if (round == 0) comm = traffic_comm_grow(comm, 2 * RANKS);
  }
  traffic_count_all_to_all(comm, 7);
  assert_int_equal(ultraepTrafficGet(key, &traffic), ultraepSuccess);
  assert_int_equal(bytes[1][2 * RANKS - 1], 7);
  assert_int_equal(bytes[0][0], THREADS * (sum + 5 * HALF) + 7);
  traffic_comm_close(comm);
  traffic_count_all_to_all(comm, 7); /* counts nothing, in nobody */
  /* The next record in the same memory begins with nothing. */
  for (int i = 0; i < 200; i++) {
    comm = traffic_comm_open(key, 0, 0, RANKS);
    assert_int_equal(get(key).totalSendCalls, 0);
    traffic_count_all(comm, TRAFFIC_SEND, 1);
    assert_int_equal(get(key).totalSendCalls, RANKS);
    traffic_comm_close(comm);
  }
  traffic_count_all(NULL, TRAFFIC_SEND, 1);
  traffic_count_all_to_all(NULL, 1);
}

/* ---- a worker counts while others open and close, its own record too ---- */
static _Atomic bool stop;

static void *count_until_stopped(void *argument) {
  (void)argument;
  while (!atomic_load(&stop)) {
    for (int i = 0; i < 64; i++) traffic_count(traffic_comm_find(&keys[i]), TRAFFIC_SEND, i % 4, 1);
  }
  return NULL;
}

static void test_close_beside_count(void **state) {
  pthread_t workers[2];

  (void)state;
  atomic_store(&stop, false);
  for (int w = 0; w < 2; w++)
    assert_int_equal(pthread_create(&workers[w], NULL, count_until_stopped, NULL), 0);
  for (int round = 0; round < 2000; round++) {
    trafficComm_t *comm = traffic_comm_open(&keys[round % 64], 0, 0, 1 + round % 300);

    assert_non_null(comm);
    traffic_count(comm, TRAFFIC_RECV, 0, 1);
    assert_int_equal(get(&keys[round % 64]).totalRecvCalls, 1);
    traffic_comm_close(comm);
  }
  atomic_store(&stop, true);
  for (int w = 0; w < 2; w++) pthread_join(workers[w], NULL);
}

/* ---- opening and closing ---- */
static void test_arguments(void **state) {
  trafficComm_t *comm;

  (void)state;
  assert_null(traffic_comm_open(NULL, 1, 0, 2));
  assert_null(traffic_comm_open(key, 1, 2, 2));
  assert_null(traffic_comm_open(key, 1, -1, 2));
  assert_null(traffic_comm_open(key, 1, 0, 0));
  assert_null(traffic_comm_open(key, 1, 0, TRAFFIC_RANKS_MAX + 1));
  assert_null(traffic_comm_find(NULL));
  assert_null(traffic_comm_find(key));
  traffic_comm_close(NULL);
  traffic_count(NULL, TRAFFIC_SEND, 0, 1);
  comm = traffic_comm_open(key, 1, 0, 2);
  traffic_count(comm, TRAFFIC_SEND, -1, 1);
  traffic_count(comm, TRAFFIC_SEND, 2, 1);
  traffic_count(comm, TRAFFIC_SEND, 0x7fffffff, 1);
  assert_int_equal(get(key).totalSendCalls, 0);
  traffic_comm_close(comm);
  traffic_comm_close(comm);
  traffic_count(comm, TRAFFIC_SEND, 0, 1);
}

static void test_open_twice(void **state) {
  trafficComm_t *comm = traffic_comm_open(key, 0, 1, 4), *other;

  (void)state;
  traffic_count(comm, TRAFFIC_SEND, 0, 5);
  assert_ptr_equal(traffic_comm_open(key, 0, 1, 4), comm);
  assert_int_equal(get(key).totalSendBytes, 5);
  /* Another communicator at the same address. */
  other = traffic_comm_open(key, 0, 1, 8);
  assert_ptr_not_equal(other, comm);
  assert_ptr_equal(traffic_comm_find(key), other);
  assert_int_equal(get(key).totalSendBytes, 0);
  traffic_comm_close(comm);
  assert_ptr_equal(traffic_comm_find(key), other);
  traffic_comm_close(other);
}

static void test_many_open(void **state) {
  static trafficComm_t *comms[MANY];

  (void)state;
  for (int i = 0; i < MANY; i++) {
    comms[i] = traffic_comm_open(&keys[i], 0, i % 3, 3);
    assert_non_null(comms[i]);
    traffic_count(comms[i], TRAFFIC_SEND, 0, (uint64_t)i);
  }
  for (int i = 0; i < MANY; i += 2) traffic_comm_close(comms[i]);
  for (int i = 0; i < MANY; i++) assert_ptr_equal(traffic_comm_find(&keys[i]), i % 2 == 0 ? NULL : comms[i]);
  for (int i = 1; i < MANY; i += 2) {
    assert_int_equal(get(&keys[i]).totalSendBytes, i);
    traffic_comm_close(comms[i]);
  }
}

static void churn(int first, int count) {
  for (int i = first; i < first + count; i++) {
    trafficComm_t *comm = traffic_comm_open(&keys[i % MANY], (uint64_t)i % 7 == 0 ? 0 : (uint64_t)i, 0, 64);

    traffic_count(comm, TRAFFIC_SEND, 1, 1000);
    traffic_comm_close(comm);
  }
}

static void test_no_growth(void **state) {
  trafficTotals_t before, after;
  struct mallinfo2 memory;

  (void)state;
  churn(1, 300);
  traffic_totals(&before);
  memory = mallinfo2();
  churn(301, CHURN);
  /* One byte a communicator would be 160 kB; heaps round pieces up differently. */
  assert_in_range(mallinfo2().uordblks, 0, memory.uordblks + 4096);
  assert_int_equal(trafficState.nOpen, 0);
  assert_int_equal(trafficState.nEnded, TRAFFIC_ENDED_KEPT);
  /* What is forgotten still counts. */
  traffic_totals(&after);
  assert_int_equal(after.calls[TRAFFIC_SEND] - before.calls[TRAFFIC_SEND], CHURN);
  assert_int_equal(after.bytes[TRAFFIC_SEND] - before.bytes[TRAFFIC_SEND], 1000 * CHURN);
}

/* ---- what the records say ---- */
static void test_imbalance_and_pairs(void **state) {
  trafficComm_t *comms[2] = {traffic_comm_open(&keys[0], 77, 0, 4), traffic_comm_open(&keys[1], 77, 1, 4)};
  ultraepTraffic_t traffic;

  (void)state;
  assert_true(get(&keys[0]).imbalance == 0);
  traffic_count(comms[0], TRAFFIC_SEND, 1, 600);
  traffic_count(comms[1], TRAFFIC_RECV, 0, 600); /* the same message: one pair */
  traffic_count(comms[1], TRAFFIC_SEND, 0, 100);
  traffic_count(comms[1], TRAFFIC_SEND, 3, 100);
  traffic_count(comms[0], TRAFFIC_RECV, 2, 5000); /* a sender of another process */
  traffic = get(&keys[1]);
  assert_int_equal(traffic.nKnownRanks, 2);
  /* By receiver 100, 600, 0, 100: the mean is 200. */
  assert_true(traffic.imbalance == 3.0);
  assert_int_equal(traffic.nPairs, 4);
  assert_int_equal(traffic.pairs[0].from, 2);
  assert_int_equal(traffic.pairs[0].to, 0);
  assert_int_equal(traffic.pairs[0].bytes, 5000);
  assert_int_equal(traffic.pairs[1].from, 0);
  assert_int_equal(traffic.pairs[1].to, 1);
  assert_int_equal(traffic.pairs[1].bytes, 600);
  assert_int_equal(traffic.pairs[1].calls, 1);
  assert_int_equal(traffic.totalRecvBytes, 600);
  for (int i = 0; i < 2; i++) traffic_comm_close(comms[i]);
}

static void test_most_pairs_only(void **state) {
  trafficComm_t *comm = traffic_comm_open(key, 0, 0, 64);
  ultraepTraffic_t traffic;

  (void)state;
  for (int r = 0; r < 64; r++) traffic_count(comm, TRAFFIC_SEND, r, (uint64_t)((r * 37) % 64));
  traffic = get(key);
  assert_int_equal(traffic.nPairs, ULTRAEP_TRAFFIC_PAIRS);
  for (int i = 0; i < ULTRAEP_TRAFFIC_PAIRS; i++) assert_int_equal(traffic.pairs[i].bytes, 63 - i);
  traffic_comm_close(comm);
}

/* Makes the window as old as that many seconds. */
static void age(double seconds) {
  traffic_lock();
  trafficState.windowClock = traffic_clock() - seconds;
  traffic_unlock();
}

static void test_windows(void **state) {
  trafficComm_t *comm, *late;
  ultraepTraffic_t traffic;

  (void)state;
  age(0);
  comm = traffic_comm_open(&keys[0], 5, 0, 4);
  traffic_count(comm, TRAFFIC_SEND, 1, 10);
  assert_int_equal(get(&keys[0]).nWindows, 0);
  age(12);
  traffic = get(&keys[0]);
  assert_int_equal(traffic.nWindows, 1);
  assert_true(traffic.windows[0].seconds >= 12);
  assert_int_equal(traffic.windows[0].sendBytes, 10);
  assert_true(traffic.windows[0].imbalance == 4.0);
  traffic_count(comm, TRAFFIC_SEND, 1, 1);
  traffic_count(comm, TRAFFIC_SEND, 2, 1);
  traffic_count(comm, TRAFFIC_RECV, 2, 7);
  late = traffic_comm_open(&keys[1], 5, 1, 4);
  traffic_count(late, TRAFFIC_SEND, 0, 2);
  assert_int_equal(get(&keys[0]).nWindows, 1); /* 10 s are not over */
  age(10);
  traffic = get(&keys[0]);
  assert_int_equal(traffic.nWindows, 2);
  assert_int_equal(traffic.windows[0].sendBytes, 2);
  assert_int_equal(traffic.windows[0].recvBytes, 7);
  assert_true(traffic.windows[0].imbalance == 2.0); /* both ranks: 2, 1, 1, 0 */
  assert_int_equal(traffic.windows[1].sendBytes, 10);
  assert_int_equal(get(&keys[1]).nWindows, 1);
  for (int w = 0; w < 2 * ULTRAEP_TRAFFIC_WINDOWS; w++) {
    traffic_count(comm, TRAFFIC_SEND, 3, 100 + (uint64_t)w);
    age(10);
    traffic = get(&keys[0]);
    assert_int_equal(traffic.windows[0].sendBytes, 100 + w);
  }
  assert_int_equal(traffic.nWindows, ULTRAEP_TRAFFIC_WINDOWS);
  for (int w = 0; w < ULTRAEP_TRAFFIC_WINDOWS; w++)
    assert_int_equal(traffic.windows[w].sendBytes, 100 + 2 * ULTRAEP_TRAFFIC_WINDOWS - 1 - w);
  traffic_comm_close(comm);
  traffic_comm_close(late);
}

static void test_get_errors(void **state) {
  ultraepTraffic_t traffic = ULTRAEP_TRAFFIC_INITIALIZER;
  int64_t bytes[4] = {-1, -1, -1, -1};
  trafficComm_t *comm;

  (void)state;
  assert_int_equal(ultraepTrafficGet(NULL, &traffic), ultraepInvalidArgument);
  assert_int_equal(ultraepTrafficGet(key, NULL), ultraepInvalidArgument);
  assert_int_equal(ultraepTrafficGet(key, &traffic), ultraepInvalidArgument);
  assert_non_null(strstr(ultraepGetLastError(), "nothing is recorded"));
  comm = traffic_comm_open(key, 0, 3, 4);
  traffic_count(comm, TRAFFIC_SEND, 2, 9);
  traffic.sendBytes = bytes;
  traffic.capacity = 3;
  assert_int_equal(ultraepTrafficGet(key, &traffic), ultraepInvalidArgument);
  assert_int_equal(bytes[2], -1);
  assert_int_equal(traffic.nRanks, 0);
  traffic.capacity = 4;
  traffic.size--;
  assert_int_equal(ultraepTrafficGet(key, &traffic), ultraepInvalidArgument);
  traffic.size++;
  assert_int_equal(ultraepTrafficGet(key, &traffic), ultraepSuccess);
  assert_int_equal(bytes[2], 9);
  assert_int_equal(bytes[3], 0);
  traffic_comm_close(comm);
}

/* ---- NCCL's log ---- */
static char line[1024];
static int lines;

__attribute__((format(printf, 5, 6))) static void record(int level, unsigned long subsystems,
                                                         const char *where, int at, const char *format, ...) {
  va_list arguments;

  (void)level, (void)subsystems, (void)where, (void)at;
  va_start(arguments, format);
  vsnprintf(line, sizeof(line), format, arguments);
  va_end(arguments);
  lines++;
}

static void test_log(void **state) {
  trafficComm_t *comm = traffic_comm_open(key, 0x1234, 1, 2);

  (void)state;
  traffic_logger_set(record);
  traffic_count(comm, TRAFFIC_SEND, 0, 40);
  traffic_count(comm, TRAFFIC_RECV, 0, 30);
  traffic_comm_close(comm);
  traffic_comm_close(comm);
  traffic_logger_set(NULL);
  assert_int_equal(lines, 1);
  assert_string_equal(
      line, "UltraEP traffic: communicator 0x1234, rank 1 of 2: sent 40 bytes in 1 calls, received 30 "
            "bytes in 1 calls; 1 known ranks' sends: imbalance 2.000 (max/mean by receiver), hottest "
            "pair: 1 to 0 (40 bytes, 1 calls)");
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_threads),
      cmocka_unit_test(test_all),
      cmocka_unit_test(test_close_beside_count),
      cmocka_unit_test(test_arguments),
      cmocka_unit_test(test_open_twice),
      cmocka_unit_test(test_many_open),
      cmocka_unit_test(test_no_growth),
      cmocka_unit_test(test_windows),
      cmocka_unit_test(test_imbalance_and_pairs),
      cmocka_unit_test(test_get_errors),
      cmocka_unit_test(test_most_pairs_only),
      cmocka_unit_test(test_log),
  };

  unsetenv("ULTRAEP_TRAFFIC_WINDOW_S");
  return cmocka_run_group_tests(tests, NULL, NULL);
}
