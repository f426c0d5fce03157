/* Taking calls over from libraries that know nothing of it: a fake NCCL, clients bound in several ways, and
 * the plugin's code with a record in place of the traffic record. With a word as argument it is run as one of
 * the other processes: see main. */
#include "sanitized.h"
#include "takeover_common.h"

#include <dlfcn.h>
#include <limits.h>
#include <link.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* A sanitizer's own dlopen stands between a caller and the loader, which then does not find the caller's
 * RUNPATH. */
enum { LATE_CASES = SANITIZED ? 2 : 4 };

enum { THREADS = 4, CALLS_PER_THREAD = 2000 };

static const char *const eagerClients[] = {"now", "noplt"};

/* The call arrives as it was made, and its result as NCCL gave it. */
static void check_passes(const struct client *from, void *comm, int result) {
  int buffer[2], stream;
  long before = nccl->calls;

  nccl->result = result;
  assert_int_equal(from->send(&buffer[0], 1234567890123, FLOAT32, 3, comm, &stream), result);
  assert_string_equal(nccl->last.name, "ncclSend");
  assert_ptr_equal(nccl->last.send, &buffer[0]);
  assert_true(nccl->last.count == 1234567890123 && nccl->last.type == FLOAT32 && nccl->last.peer == 3);
  assert_true(nccl->last.comm == comm && nccl->last.stream == &stream);
  assert_int_equal(from->recv(&buffer[1], 7, 1, 2, comm, &stream), result);
  assert_string_equal(nccl->last.name, "ncclRecv");
  assert_ptr_equal(nccl->last.recv, &buffer[1]);
  assert_true(nccl->last.count == 7 && nccl->last.type == 1 && nccl->last.peer == 2);
  assert_true(nccl->last.comm == comm && nccl->last.stream == &stream);
  assert_int_equal(from->allToAll(&buffer[0], &buffer[1], 5, 8, comm, &stream), result);
  assert_string_equal(nccl->last.name, "ncclAlltoAll");
  assert_true(nccl->last.send == &buffer[0] && nccl->last.recv == &buffer[1] && nccl->last.count == 5);
  assert_true(nccl->last.type == 8 && nccl->last.comm == comm && nccl->last.stream == &stream);
  assert_int_equal(from->groupStart(), result);
  assert_string_equal(nccl->last.name, "ncclGroupStart");
  assert_int_equal(from->groupEnd(), result);
  assert_string_equal(nccl->last.name, "ncclGroupEnd");
  assert_int_equal(from->finalize(comm), result);
  assert_string_equal(nccl->last.name, "ncclCommFinalize");
  /* The all-to-all makes a send of its own inside. */
  assert_int_equal(nccl->calls - before, 7);
  nccl->result = 0;
}

/* nRanks 4: an all-to-all of 5 float64 is 40 bytes to and from each. */
static void check_counted(int counted) {
  struct record_sums sums = record->sums();

  for (int peer = 0; peer < RECORD_PEERS; peer++) {
    const long all = peer < 4 ? counted : 0;

    assert_int_equal(sums.calls[SEND][peer], all + (peer == 3 ? counted : 0));
    assert_int_equal(sums.calls[RECV][peer], all + (peer == 2 ? counted : 0));
    assert_true(sums.bytes[SEND][peer] ==
                (uint64_t)all * 40 + (peer == 3 ? (uint64_t)counted * 4938271560492 : 0));
    assert_true(sums.bytes[RECV][peer] == (uint64_t)all * 40 + (peer == 2 ? (uint64_t)counted * 7 : 0));
  }
}

/* ---- tests ---- */
static void check_client(const struct client *from) {
  void *comm;

  assert_int_equal(from->init(&comm, 4, commId, 1), 0);
  test_setup(NULL);
  check_passes(from, comm, 0);
  check_counted(0);
  start();
  assert_true(record->slots() >= 8); /* those of the table in this client alone */
  check_passes(from, comm, 0);
  check_counted(1);
  check_passes(from, comm, 7); /* in progress: issued */
  check_counted(2);
  check_passes(from, comm, 3); /* an error: not issued */
  check_counted(2);
  assert_int_equal(record->sums().nRanks, 4);
  assert_int_equal(record->sums().rank, 1);
  start(); /* again: nothing changes */
  check_passes(from, comm, 0);
  check_counted(3);
  record->undo();
  check_passes(from, comm, 0);
  check_counted(3);
  assert_int_equal(from->destroy(comm), 0);
}

static void test_eager(void **state) {
  (void)state;
  for (int i = 0; i < 2; i++) check_client(client_open(eagerClients[i]));
}

/* First before any of its slots is bound, then after. */
static void test_lazy(void **state) {
  const struct client *from = client_open("lazy");
  void *comm;

  (void)state;
  assert_int_equal(from->init(&comm, 4, commId, 1), 0);
  start();
  check_passes(from, comm, 0);
  check_counted(1);
  start();
  check_passes(from, comm, 0);
  check_counted(2);
  assert_int_equal(from->destroy(comm), 0);
  check_client(from);
}

static void test_groups(void **state) {
  const struct client *from = client_open("now");
  void *comm;

  (void)state;
  start();
  assert_int_equal(from->init(&comm, 4, commId, 0), 0);
  for (int i = 0; i < 3; i++) assert_int_equal(from->groupStart(), 0);
  assert_int_equal(nccl->depth, 3);
  assert_int_equal(from->send(NULL, 0, FLOAT32, 0, comm, NULL), 0); /* empty, to itself */
  for (int i = 0; i < 3; i++) assert_int_equal(from->groupEnd(), 0);
  assert_int_equal(nccl->depth, 0);
  assert_int_equal(record->sums().calls[SEND][0], 1);
  assert_true(record->sums().bytes[SEND][0] == 0);
  assert_int_equal(from->destroy(comm), 0);
}

static void test_comms(void **state) {
  const struct client *from = client_open("now");
  void *comms[3];

  (void)state;
  start();
  for (int i = 0; i < 3; i++) {
    assert_int_equal(from->init(&comms[i], i + 2, commId, i), 0);
    assert_int_equal(from->send(NULL, 1, 0, 1, comms[i], NULL), 0);
    assert_int_equal(record->sums().rank, i);
    assert_int_equal(record->sums().nRanks, i + 2);
  }
  assert_int_equal(from->finalize(comms[0]), 0);
  assert_int_equal(record->sums().closed, 1);
  assert_int_equal(from->destroy(comms[0]), 0);
  assert_int_equal(record->sums().closed, 1);
  assert_int_equal(from->abort(comms[1]), 0);
  assert_string_equal(nccl->last.name, "ncclCommAbort");
  assert_int_equal(from->destroy(comms[2]), 0);
  assert_string_equal(nccl->last.name, "ncclCommDestroy");
  assert_int_equal(record->sums().opened, 3);
  assert_int_equal(record->sums().closed, 3);
  assert_int_equal(from->destroy(NULL), 4);
  assert_int_equal(from->send(NULL, 1, 0, 1, NULL, NULL), 0); /* NCCL's to judge; nothing to count */
  assert_int_equal(record->sums().calls[SEND][1], 3);
}

static void test_types(void **state) {
  static const size_t bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};

  (void)state;
  for (int type = 0; type < 12; type++) assert_int_equal(record->type_bytes(type), bytes[type]);
  assert_int_equal(record->type_bytes(-1), 0);
  assert_int_equal(record->type_bytes(12), 0);
}

/* A library that comes later, by its path and by a bare name that only the caller's RUNPATH resolves. */
static void check_late(void *(*open)(const char *, int), const char *file, int flags) {
  const struct client *from = client_open("now"), *late;
  struct record_sums sums;
  void *comm, *library;

  start();
  assert_int_equal(from->init(&comm, 4, commId, 1), 0);
  library = open(file, flags);
  if (!library) {
    fail_msg("%s", dlerror());
    return;
  }
  late = client_of(library);
  assert_int_equal(late->send(NULL, 3, FLOAT32, 2, comm, NULL), 0);
  assert_string_equal(nccl->last.name, "ncclSend");
  sums = record->sums();
  assert_int_equal(sums.calls[SEND][2], 1);
  assert_true(sums.bytes[SEND][2] == 12);
  assert_int_equal(dlclose(library), 0);
  assert_int_equal(from->destroy(comm), 0);
  record->undo();
}

static void test_late(void **state) {
  char path[PATH_MAX];

  (void)state;
  snprintf(path, sizeof(path), "%s/sub/libtakeover_late.so", getenv("TAKEOVER_FOLDER"));
  for (int i = 0; i < LATE_CASES; i++) {
    const int flags = i % 2 ? RTLD_NOW : RTLD_LAZY;

    test_setup(NULL);
    if (i < 2) {
      check_late(client_open("now")->open, path, flags);
    } else {
      check_late(client_open("runpath")->open, "libtakeover_late.so", flags);
    }
    assert_null(dlopen(path, RTLD_NOW | RTLD_NOLOAD)); /* nobody keeps it */
    (void)dlerror();
  }
  start();
  assert_null(client_open("now")->open("libtakeover_late.so", RTLD_NOW)); /* no RUNPATH leads there */
  assert_non_null(strstr(dlerror(), "libtakeover_late.so"));
  assert_non_null(client_open("now")->open(NULL, RTLD_NOW));
  assert_null(dlerror());
}

/* Pages that the loader made read-only are so again. */
static int protections(char *text, size_t size) {
  FILE *maps = fopen("/proc/self/maps", "r");
  char line[PATH_MAX + 128], permissions[8];
  int lines = 0;

  assert_non_null(maps);
  text[0] = '\0';
  while (fgets(line, sizeof(line), maps)) {
    unsigned long low, high;

    if (!strstr(line, "client_now")) continue;
    assert_int_equal(sscanf(line, "%lx-%lx %7s", &low, &high, permissions), 3);
    snprintf(text + strlen(text), size - strlen(text), "%lx-%lx %s\n", low, high, permissions);
    lines++;
  }
  fclose(maps);
  return lines;
}

static void test_protection(void **state) {
  const struct client *from = client_open("now");
  char before[2048], after[2048], undone[2048];
  void *comm;

  (void)state;
  assert_int_equal(from->init(&comm, 4, commId, 1), 0);
  assert_true(protections(before, sizeof(before)) >= 4);
  start();
  check_passes(from, comm, 0);
  check_counted(1);
  protections(after, sizeof(after));
  assert_string_equal(before, after);
  record->undo();
  protections(undone, sizeof(undone));
  assert_string_equal(before, undone);
  assert_int_equal(from->destroy(comm), 0);
}

struct worker {
  pthread_t thread;
  const struct client *from;
  void *comm;
  int index;
};
static atomic_bool workersGo, workersEnd;

static void *worker_send(void *argument) {
  struct worker *worker = argument;

  while (!atomic_load(&workersGo)) sched_yield();
  for (int i = 0; i < CALLS_PER_THREAD; i++) {
    (void)worker->from->groupStart();
    (void)worker->from->send(NULL, 1, 0, worker->index, worker->comm, NULL);
    (void)worker->from->groupEnd();
  }
  return NULL;
}

/* Loads and unloads another client, and starts again, all the while. */
static void *worker_disturb(void *argument) {
  struct worker *worker = argument;
  char path[PATH_MAX];

  snprintf(path, sizeof(path), "%s/sub/libtakeover_late.so", getenv("TAKEOVER_FOLDER"));
  while (!atomic_load(&workersGo)) sched_yield();
  while (!atomic_load(&workersEnd)) {
    void *library = dlopen(path, worker->index % 2 ? RTLD_NOW : RTLD_LAZY);

    start();
    if (library) dlclose(library);
  }
  return NULL;
}

static void test_threads(void **state) {
  const struct client *from = client_open("lazy");
  struct worker workers[THREADS + 2];
  void *comm;

  (void)state;
  start();
  assert_int_equal(from->init(&comm, THREADS, commId, 1), 0);
  atomic_store(&workersGo, false);
  atomic_store(&workersEnd, false);
  for (int i = 0; i < THREADS + 2; i++) {
    workers[i] = (struct worker){.from = from, .comm = comm, .index = i};
    assert_int_equal(
        pthread_create(&workers[i].thread, NULL, i < THREADS ? worker_send : worker_disturb, &workers[i]), 0);
  }
  atomic_store(&workersGo, true);
  for (int i = 0; i < THREADS + 2; i++) {
    if (i == THREADS) atomic_store(&workersEnd, true);
    assert_int_equal(pthread_join(workers[i].thread, NULL), 0);
  }
  for (int i = 0; i < THREADS; i++) assert_int_equal(record->sums().calls[SEND][i], CALLS_PER_THREAD);
  assert_int_equal(nccl->depth, 0);
  assert_int_equal(from->destroy(comm), 0);
}

/* Slots that another library has put itself into, before us or after us, stay its own. */
static void test_foreign(void **state) {
  const struct client *from = client_open("traced");
  long *traced = dlsym(library_open("libtakeover_tracer.so", RTLD_NOW | RTLD_NOLOAD), "tracerSends");
  void *comm;

  (void)state;
  assert_non_null(traced);
  assert_int_equal(from->init(&comm, 4, commId, 1), 0);
  start();
  assert_int_equal(from->send(NULL, 3, FLOAT32, 2, comm, NULL), 0);
  assert_int_equal(*traced, 1);
  assert_int_equal(record->sums().calls[SEND][2], 0);
  assert_int_equal(from->recv(NULL, 3, FLOAT32, 2, comm, NULL), 0); /* which nobody traces */
  assert_int_equal(record->sums().calls[RECV][2], 1);
  assert_int_equal(from->destroy(comm), 0);
}

/* ---- other processes: what is only said or set once in one ---- */
/* NCCL loads the real library, and closes it in ncclCommDestroy, twice. */
static int process_plugin(const char *expected) {
  const struct client *from = client_open("now");
  struct fake_state *(*get)(void);
  const int on = strcmp(expected, "on") == 0;
  void *comm;

  get = (struct fake_state * (*)(void))
      dlsym(library_open("libtakeover_nccl.so", RTLD_NOW | RTLD_NOLOAD), "fake_nccl_state");
  nccl = get();
  for (int i = 0; i < 2; i++) {
    if (from->init(&comm, 4, commId, 1) != 0) return 1;
    if (nccl->lines < 1) return 2;
    check_passes(from, comm, 0);
    if (from->destroy(comm) != 0) return 3;
    if ((dlopen("libnccl-tuner-ultraep.so", RTLD_NOW | RTLD_NOLOAD) != NULL) != on) return 4;
    (void)dlerror();
  }
  return strcmp(nccl->last.name, "ncclCommDestroy") == 0 ? 0 : 5;
}

/* The preload library is in this process from the start. */
static int process_preload(const char *expected) {
  const struct record_table *preloaded = dlsym(RTLD_DEFAULT, "recordTable");
  const struct client *from = client_open("now");
  struct fake_state *(*get)(void);
  void *comm;

  get = (struct fake_state * (*)(void)) dlsym(RTLD_DEFAULT, "fake_nccl_state");
  if (!preloaded || !get) return 1;
  nccl = get();
  record = preloaded;
  if (from->init(&comm, 4, commId, 1) != 0) return 2;
  check_passes(from, comm, 0);
  check_counted(strcmp(expected, "on") == 0);
  return from->destroy(comm);
}

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup(test_types, test_setup),      cmocka_unit_test_setup(test_lazy, test_setup),
      cmocka_unit_test_setup(test_eager, test_setup),      cmocka_unit_test_setup(test_groups, test_setup),
      cmocka_unit_test_setup(test_comms, test_setup),      cmocka_unit_test_setup(test_late, test_setup),
      cmocka_unit_test_setup(test_protection, test_setup), cmocka_unit_test_setup(test_threads, test_setup),
      cmocka_unit_test_setup(test_foreign, test_setup),
  };

  if (argc == 3 && strcmp(argv[1], "plugin") == 0) return process_plugin(argv[2]);
  if (argc == 3 && strcmp(argv[1], "preload") == 0) return process_preload(argv[2]);
  return cmocka_run_group_tests(tests, group_setup, NULL);
}
