/* The profiler role of libultraep.so, loaded and called as each NCCL release does it, with nothing taken
 * over: what the traffic record has of it, and what another profiler library gets. The library is found
 * through LD_LIBRARY_PATH and that other library in RECORDER_FOLDER, which ctest sets. With words as
 * arguments it is run as one of the other processes, for settings are read once a process: see main. */
#include "profiler_recorder.h"
#include "ultraep.h"

#include <dlfcn.h>
#include <limits.h>
#include <malloc.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { FLOAT32 = 7, UINT8 = 1, BFLOAT16 = 9, THREADS = 8, ROUNDS = 50, COMMS = 10000 };

static const char *self;
static void *library;
static ultraepResult_t (*trafficGet)(ncclComm_t comm, ultraepTraffic_t *traffic);

static const struct nccl_operation operations[] = {
    {OPERATION_SEND, 100, FLOAT32, 2, &self}, {OPERATION_RECV, 50, BFLOAT16, 0, &self},
    {OPERATION_COLL, 64, FLOAT32, 0, NULL},   {OPERATION_SEND, 7, UINT8, 3, &self},
    {OPERATION_RECV, 0, FLOAT32, 1, NULL},
};
enum { OPERATIONS = sizeof(operations) / sizeof(operations[0]) };

static int setup(void **state) {
  (void)state;
  library = dlopen("libnccl-profiler-ultraep.so", RTLD_NOW | RTLD_LOCAL);
  if (!library) fail_msg("%s", dlerror());
  trafficGet = (ultraepResult_t(*)(ncclComm_t, ultraepTraffic_t *))dlsym(library, "ultraepTrafficGet");
  assert_non_null(trafficGet);
  return 0;
}

static void check(const char *error, int version) {
  if (error) fail_msg("v%d: %s", version, error);
}

static void log_nothing(int level, unsigned long subsystems, const char *where, int line, const char *format,
                        ...) {
  (void)level, (void)subsystems, (void)where, (void)line, (void)format;
}

static void profiler_find(struct nccl_profiler *profiler, int version) {
  *profiler = (struct nccl_profiler){0};
  if (!nccl_profiler_find(library, version, version, profiler)) fail_msg("no table v%d", version);
}

static struct nccl_profiled comm_of(struct nccl_profiler *profiler, int rank) {
  return (struct nccl_profiled){
      .profiler = profiler, .name = "some", .hash = 0xabcdef, .nNodes = 1, .nRanks = 4, .rank = rank};
}

/* With nothing taken over, the record's key is what NCCL knows the role's context by. */
static void check_counted(const struct nccl_profiled *comm, int64_t times) {
  const int64_t sends[4] = {0, 0, 400, 7}, receives[4] = {100, 0, 0, 0};
  int64_t sendBytes[4], recvBytes[4], sendCalls[4], recvCalls[4];
  ultraepTraffic_t traffic = ULTRAEP_TRAFFIC_INITIALIZER;

  traffic.sendBytes = sendBytes;
  traffic.recvBytes = recvBytes;
  traffic.sendCalls = sendCalls;
  traffic.recvCalls = recvCalls;
  traffic.capacity = 4;
  assert_int_equal(trafficGet((ncclComm_t)comm->context, &traffic), ultraepSuccess);
  assert_int_equal(traffic.nRanks, 4);
  assert_int_equal(traffic.rank, comm->rank);
  assert_int_equal(traffic.hash, comm->hash);
  for (int peer = 0; peer < 4; peer++) {
    assert_int_equal(sendBytes[peer], times * sends[peer]);
    assert_int_equal(recvBytes[peer], times * receives[peer]);
    assert_int_equal(sendCalls[peer], times * (peer >= 2));
    assert_int_equal(recvCalls[peer], times * (peer < 2));
  }
}

/* ---- tests ---- */
static void test_versions(void **state) {
  (void)state;
  for (int version = 1; version <= NCCL_NEWEST_PROFILER; version++) {
    ultraepTraffic_t traffic = ULTRAEP_TRAFFIC_INITIALIZER;
    struct nccl_profiler profiler;
    struct nccl_profiled comms[2];
    void *contexts[2];

    profiler_find(&profiler, version);
    for (int i = 0; i < 2; i++) {
      comms[i] = comm_of(&profiler, i);
      check(nccl_profiled_init(&comms[i], i == 0 ? log_nothing : NULL), version);
      assert_non_null(comms[i].context);
      contexts[i] = comms[i].context;
      assert_int_equal(profiler.mask, EVENT_P2P | EVENT_COLL);
    }
    for (int times = 1; times <= 3; times++) {
      for (int i = 0; i < 2; i++) {
        check(nccl_profiled_group(&comms[i], operations, OPERATIONS, true, NULL), version);
        check_counted(&comms[i], times);
      }
    }
    for (int i = 0; i < 2; i++) {
      check(nccl_profiled_finalize(&comms[i]), version);
      assert_int_equal(trafficGet((ncclComm_t)contexts[i], &traffic), ultraepInvalidArgument);
    }
  }
}

/* Up to v3 nobody says how many ranks there are; an order that grows the record step by step. */
static void test_growth(void **state) {
  struct nccl_profiler profiler;
  ultraepTraffic_t traffic = ULTRAEP_TRAFFIC_INITIALIZER;
  int64_t bytes[300] = {0};

  (void)state;
  for (int version = 1; version <= 3; version++) {
    struct nccl_profiled comm;

    profiler_find(&profiler, version);
    comm = comm_of(&profiler, 0);
    check(nccl_profiled_init(&comm, NULL), version);
    for (int peer = 0; peer < 300; peer++) {
      const struct nccl_operation operation = {OPERATION_SEND, (size_t)peer, UINT8, peer, NULL};

      check(nccl_profiled_group(&comm, &operation, 1, false, NULL), version);
    }
    traffic.sendBytes = bytes;
    traffic.capacity = 300;
    assert_int_equal(trafficGet((ncclComm_t)comm.context, &traffic), ultraepSuccess);
    assert_int_equal(traffic.nRanks, 300);
    for (int peer = 0; peer < 300; peer++) assert_int_equal(bytes[peer], peer);
    check(nccl_profiled_finalize(&comm), version);
  }
}

static void test_types(void **state) {
  static const int64_t bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};

  (void)state;
  for (int version = 1; version <= NCCL_NEWEST_PROFILER; version++) {
    struct nccl_profiler profiler;
    struct nccl_profiled comm;
    int64_t sum = 0;

    profiler_find(&profiler, version);
    comm = comm_of(&profiler, 3);
    check(nccl_profiled_init(&comm, NULL), version);
    for (int type = 0; type < 12; type++) {
      const struct nccl_operation operation = {OPERATION_SEND, 10, type, 0, NULL};
      ultraepTraffic_t traffic = ULTRAEP_TRAFFIC_INITIALIZER;

      check(nccl_profiled_group(&comm, &operation, 1, false, NULL), version);
      sum += 10 * bytes[type];
      assert_int_equal(trafficGet((ncclComm_t)comm.context, &traffic), ultraepSuccess);
      assert_int_equal(traffic.totalSendBytes, sum);
    }
    check(nccl_profiled_finalize(&comm), version);
  }
}

/* Null pointers where NCCL has none to give, contexts and handles that are none of ours. */
static void test_strange_pointers(void **state) {
  (void)state;
  for (int version = 1; version <= NCCL_NEWEST_PROFILER; version++) {
    struct nccl_profiler profiler;
    struct nccl_profiled comm;

    profiler_find(&profiler, version);
    profiler.mask = EVENT_P2P | EVENT_COLL;
    comm = comm_of(&profiler, 0);
    check(nccl_profiled_group(&comm, operations, OPERATIONS, false, NULL), version);
    comm.context = &comm;
    check(nccl_profiled_group(&comm, operations, OPERATIONS, false, NULL), version);
    check(nccl_profiled_finalize(&comm), version);
    check(nccl_profiled_init(&comm, NULL), version);
    comm.context = (char *)comm.context + 1;
    check(nccl_profiled_group(&comm, operations, OPERATIONS, false, NULL), version);
    comm.context = (char *)comm.context - 1;
    profiler.mask = nccl_profiler_types(version);
    check(nccl_profiled_group(&comm, operations, OPERATIONS, true, (void *)(uintptr_t)4096), version);
    check_counted(&comm, 1);
    check(nccl_profiled_finalize(&comm), version);
  }
}

static void test_many(void **state) {
  struct nccl_profiler profiler;
  size_t before = 0;

  (void)state;
  for (int i = 0; i < COMMS; i++) {
    struct nccl_profiled comm;

    profiler_find(&profiler, 1 + i % NCCL_NEWEST_PROFILER);
    comm = comm_of(&profiler, 0);
    check(nccl_profiled_init(&comm, NULL), profiler.version);
    check(nccl_profiled_group(&comm, operations, OPERATIONS, false, NULL), profiler.version);
    check(nccl_profiled_finalize(&comm), profiler.version);
    if (i == COMMS / 10) before = mallinfo2().uordblks;
  }
  /* One byte a communicator would be 144 kB. */
  assert_in_range(mallinfo2().uordblks, 0, before + 8192);
}

struct worker {
  pthread_t thread;
  int index;
  const char *error;
};

static void *worker_run(void *argument) {
  struct worker *worker = argument;
  struct nccl_profiler profiler = {0};

  for (int round = 0; round < ROUNDS && !worker->error; round++) {
    struct nccl_profiled comm;

    if (!nccl_profiler_find(library, 4 + (worker->index + round) % 4, 4, &profiler))
      worker->error = "no table";
    if (worker->error) break;
    comm = comm_of(&profiler, worker->index % 4);
    worker->error = nccl_profiled_init(&comm, log_nothing);
    for (int i = 0; i < 4 && !worker->error; i++)
      worker->error = nccl_profiled_group(&comm, operations, OPERATIONS, true, NULL);
    if (!worker->error) worker->error = nccl_profiled_finalize(&comm);
  }
  return NULL;
}

static void test_threads(void **state) {
  struct worker workers[THREADS];

  (void)state;
  for (int i = 0; i < THREADS; i++) {
    workers[i] = (struct worker){.index = i};
    assert_int_equal(pthread_create(&workers[i].thread, NULL, worker_run, &workers[i]), 0);
  }
  for (int i = 0; i < THREADS; i++) {
    assert_int_equal(pthread_join(workers[i].thread, NULL), 0);
    check(workers[i].error, 0);
  }
}

/* ---- another library: a process for each ---- */
static struct recorder_log *recorder;

static const char *recorder_path(char *path, size_t size, int table) {
  const char *folder = getenv("RECORDER_FOLDER");

  snprintf(path, size, "%s/libprofiler_recorder_v%d.so", folder ? folder : ".", table);
  return path;
}

#define MUST(condition)                                                                                      \
  do {                                                                                                       \
    if (!(condition)) {                                                                                      \
      printf("line %d: %s (%s)\n", __LINE__, #condition, recorder ? recorder->error : "");                   \
      return 1;                                                                                              \
    }                                                                                                        \
  } while (0)

/* What the other library must have of what NCCL started. */
static int forward_expected(int bit, int table, int mask) {
  const int type = 1 << bit;

  if (!(nccl_profiler_types(table) & type) || mask == 0) return 0;
  if (mask == EVENT_P2P)
    return type == EVENT_P2P || type == EVENT_P2P_API || type == EVENT_GROUP || type == EVENT_GROUP_API;
  if (mask == EVENT_PROXY_STEP)
    return type == EVENT_PROXY_STEP || type == EVENT_PROXY_OP || type == EVENT_COLL || type == EVENT_P2P ||
           type == EVENT_GROUP || type == EVENT_GROUP_API || type == EVENT_COLL_API || type == EVENT_P2P_API;
  if (mask == EVENT_KERNEL_PHASE)
    return type == EVENT_KERNEL_PHASE || type == EVENT_KERNEL_CHANNEL || type == EVENT_COLL ||
           type == EVENT_P2P || type == EVENT_GROUP || type == EVENT_GROUP_API || type == EVENT_COLL_API ||
           type == EVENT_P2P_API;
  return 1;
}

/* NCCL gives phases with their kernels alone, and so must we ask for both. */
static int forward_mask(int mask) {
  return mask & EVENT_KERNEL_PHASE ? mask | EVENT_KERNEL_CHANNEL : mask;
}

static int forward_check(int version, int table, int mask) {
  for (int bit = 0; bit < EVENT_TYPES; bit++) {
    const long wanted = forward_expected(bit, table, mask) ? ncclEventsStarted[bit] : 0;

    if (recorder->starts[bit] == wanted) continue;
    printf("v%d to v%d, mask %#x: %ld events of type %#x, not %ld\n", version, table, mask,
           recorder->starts[bit], 1 << bit, wanted);
    return 1;
  }
  MUST(!recorder->error[0]);
  MUST(recorder->open == 0);
  return 0;
}

/* The last send or receive of `operations`, in the other library's terms. */
static int forward_check_last(int table, const struct nccl_profiled *comm) {
  MUST(strcmp(recorder->function, table == 1 ? "7" : "Recv") == 0);
  MUST(strcmp(recorder->type, table == 1 ? "7" : "ncclFloat32") == 0);
  MUST(recorder->count == 0 && recorder->peer == 1 && recorder->rank == comm->rank);
  MUST(recorder->hash == (table <= 3 ? comm->hash : 0));
  MUST(recorder->context != NULL && recorder->context != comm->context);
  return 0;
}

static int process_forward(int version, int table, int mask) {
  struct nccl_profiler profiler = {0};
  struct nccl_profiled comms[2];
  char path[PATH_MAX];
  void *other;

  library = dlopen("libnccl-profiler-ultraep.so", RTLD_NOW | RTLD_LOCAL);
  MUST(library && nccl_profiler_find(library, version, version, &profiler));
  for (int i = 0; i < 2; i++) {
    comms[i] = comm_of(&profiler, i);
    MUST(!nccl_profiled_init(&comms[i], log_nothing));
  }
  other = dlopen(recorder_path(path, sizeof(path), table), RTLD_NOW | RTLD_NOLOAD);
  MUST(other != NULL);
  recorder = dlsym(other, "recorderLog");
  MUST(recorder && recorder->version == table && recorder->inits == 2);
  MUST(table <= 3 || (recorder->initHash == 0xabcdef && recorder->initRank == 1));
  MUST(profiler.mask == (EVENT_P2P | EVENT_COLL | forward_mask(mask)));
  for (int i = 0; i < 6; i++) {
    void *foreign = i % 2 ? (void *)(uintptr_t)4096 : NULL;

    MUST(!nccl_profiled_group(&comms[i % 2], operations, OPERATIONS, true, foreign));
  }
  if (mask && forward_check_last(table, &comms[1]) != 0) return 1;
  if (forward_check(version, table, mask) != 0) return 1;
  /* It changes its mind. */
  *recorder->mask = EVENT_PROXY_CONTROL;
  MUST(!nccl_profiled_group(&comms[0], operations, OPERATIONS, false, NULL));
  MUST(profiler.mask == (EVENT_P2P | EVENT_COLL | EVENT_PROXY_CONTROL));
  for (int i = 0; i < 2; i++) MUST(!nccl_profiled_finalize(&comms[i]));
  MUST(recorder->finalizes == 2 && recorder->contexts == 0 && !recorder->error[0]);
  return 0;
}

/* A library that cannot be used: a message on stderr, and counting goes on. */
static int process_alone(void) {
  struct nccl_profiler profiler = {0};
  struct nccl_profiled comms[2];
  ultraepTraffic_t traffic = ULTRAEP_TRAFFIC_INITIALIZER;

  library = dlopen("libnccl-profiler-ultraep.so", RTLD_NOW | RTLD_LOCAL);
  MUST(library && nccl_profiler_find(library, 2, 2, &profiler));
  trafficGet = (ultraepResult_t(*)(ncclComm_t, ultraepTraffic_t *))dlsym(library, "ultraepTrafficGet");
  for (int i = 0; i < 2; i++) {
    comms[i] = comm_of(&profiler, i);
    MUST(!nccl_profiled_init(&comms[i], log_nothing));
    MUST(!nccl_profiled_group(&comms[i], operations, OPERATIONS, true, NULL));
    MUST(trafficGet((ncclComm_t)comms[i].context, &traffic) == ultraepSuccess);
    MUST(traffic.totalSendBytes == 407 && profiler.mask == (EVENT_P2P | EVENT_COLL));
    MUST(!nccl_profiled_finalize(&comms[i]));
  }
  return 0;
}

/* Runs this program with words in front, as a shell has them; what it writes goes to text. */
static int run(char *text, size_t size, const char *environment, const char *arguments) {
  char command[2 * PATH_MAX];
  size_t length = 0;
  FILE *out;

  snprintf(command, sizeof(command), "%s '%s' %s 2>&1", environment, self, arguments);
  out = popen(command, "r"); /* NOLINT(cert-env33-c): words of this file alone */
  assert_non_null(out);
  length = fread(text, 1, size - 1, out);
  text[length] = '\0';
  return pclose(out);
}

static void check_forward(int version, int table, int mask) {
  char path[PATH_MAX], environment[PATH_MAX + 100], arguments[100], text[4096];

  snprintf(environment, sizeof(environment), "ULTRAEP_PROFILER_FORWARD='%s' RECORDER_MASK=%d",
           recorder_path(path, sizeof(path), table), mask);
  snprintf(arguments, sizeof(arguments), "forward %d %d %d", version, table, mask);
  if (run(text, sizeof(text), environment, arguments) != 0 || text[0]) fail_msg("%s: %s", arguments, text);
}

static void test_forward(void **state) {
  (void)state;
  for (int version = 1; version <= NCCL_NEWEST_PROFILER; version++) {
    for (int table = 1; table <= version; table++) {
      check_forward(version, table, nccl_profiler_types(table));
      check_forward(version, table, EVENT_P2P);
      check_forward(version, table, 0);
    }
    check_forward(version, version, EVENT_PROXY_STEP);
  }
  check_forward(NCCL_NEWEST_PROFILER, NCCL_NEWEST_PROFILER, EVENT_KERNEL_PHASE);
}

static void check_alone(const char *environment, const char *said) {
  char text[4096];

  if (run(text, sizeof(text), environment, "alone") != 0) fail_msg("%s: %s", environment, text);
  /* One line. */
  if (!strstr(text, said) || strchr(text, '\n') != text + strlen(text) - 1)
    fail_msg("%s: '%s' has no '%s', or more than one line", environment, text, said);
}

static void test_forward_errors(void **state) {
  char path[PATH_MAX], environment[PATH_MAX + 100];

  (void)state;
  check_alone("ULTRAEP_PROFILER_FORWARD=/no/such/library.so", "/no/such/library.so cannot be loaded (");
  check_alone("ULTRAEP_PROFILER_FORWARD=nosuch", "nosuch cannot be loaded (libnccl-profiler-nosuch.so");
  check_alone("ULTRAEP_PROFILER_FORWARD=ultraep", "is this library itself");
  check_alone("ULTRAEP_PROFILER_FORWARD=libm.so.6", "libm.so.6 has no table ncclProfiler_v2 or older");
  snprintf(environment, sizeof(environment), "ULTRAEP_PROFILER_FORWARD='%s'",
           recorder_path(path, sizeof(path), 4)); /* too new for that NCCL */
  check_alone(environment, "has no table ncclProfiler_v2 or older");
  snprintf(environment, sizeof(environment), "RECORDER_FAIL=1 ULTRAEP_PROFILER_FORWARD='%s'",
           recorder_path(path, sizeof(path), 2));
  check_alone(environment, "init failed");
}

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_versions), cmocka_unit_test(test_growth),
      cmocka_unit_test(test_types),    cmocka_unit_test(test_strange_pointers),
      cmocka_unit_test(test_many),     cmocka_unit_test(test_threads),
      cmocka_unit_test(test_forward),  cmocka_unit_test(test_forward_errors),
  };

  self = argv[0];
  if (argc == 5 && strcmp(argv[1], "forward") == 0)
    return process_forward(atoi(argv[2]), atoi(argv[3]), atoi(argv[4]));
  if (argc == 2 && strcmp(argv[1], "alone") == 0) return process_alone();
  return cmocka_run_group_tests(tests, setup, NULL);
}
