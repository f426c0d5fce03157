/* The tuner role of libultraep.so, loaded and called as each NCCL release does it. The library is found
 * through LD_LIBRARY_PATH, which ctest sets. */
#include "plugin_nccl.h"
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

enum { LEVEL_INFO = 3, SUBSYS_INIT = 0x1, SUBSYS_TUNING = 0x40 };
enum { THREADS = 8, COMMS_PER_THREAD = 200, REPEATS = 1000, COMMS_AT_ONCE = 32 };

static const struct nccl_shape plainShape = {64, 8, 8, 8, 8};

static void check(const char *error, const char *what) {
  if (error) fail_msg("%s: %s", what, error);
}

/* ---- a logger that keeps what it is told; NCCL's takes calls from any thread too ---- */
struct record {
  int level;
  unsigned long subsystems;
  char format[512], text[512];
};
static struct {
  pthread_mutex_t lock;
  struct record records[64];
  size_t count; /* may exceed the records kept */
  size_t bad;   /* lines that NCCL could not print as they are meant */
} journal = {.lock = PTHREAD_MUTEX_INITIALIZER};

__attribute__((format(printf, 5, 6))) static void
record(int level, unsigned long subsystems, const char *where, int line, const char *format, ...) {
  struct record entry = {.level = level, .subsystems = subsystems};
  va_list arguments;
  int length;

  va_start(arguments, format);
  length = vsnprintf(entry.text, sizeof(entry.text), format, arguments);
  va_end(arguments);
  snprintf(entry.format, sizeof(entry.format), "%s", format);

  pthread_mutex_lock(&journal.lock);
  if (journal.count < sizeof(journal.records) / sizeof(journal.records[0]))
    journal.records[journal.count] = entry;
  journal.count++;
  if (length <= 0 || (size_t)length >= sizeof(entry.text) || strchr(entry.text, '\n') || !where ||
      line <= 0) {
    journal.bad++;
  }
  pthread_mutex_unlock(&journal.lock);
}

static int journal_clear(void **state) {
  (void)state;
  journal.count = journal.bad = 0;
  return 0;
}

/* ---- helpers ---- */
static void *library_open(const struct nccl_release *release, const char *tunerValue, const char *netValue) {
  void *library = nccl_library_open(release, tunerValue, netValue);

  if (!library) {
    fail_msg("NCCL %s finds no plugin (is LD_LIBRARY_PATH set to the library's folder?): %s", release->name,
             dlerror());
  }
  return library;
}

static void *library_open_default(void) {
  return library_open(&ncclReleases[ncclReleaseCount - 1], "ultraep", NULL);
}

static void tuner_find(void *library, int version, struct nccl_tuner *tuner) {
  if (!nccl_tuner_find(library, version, version, tuner)) fail_msg("no table v%d in the library", version);
}

static const char *live(const struct nccl_tuner *tuner, const struct nccl_shape *shape, int nAlgorithms,
                        nccl_logger logger) {
  struct nccl_comm comm;
  const char *error = nccl_comm_init(&comm, tuner, shape, 0xfeedull, logger);

  if (!error) error = nccl_comm_collectives(&comm, nAlgorithms);
  if (!error) error = nccl_comm_destroy(&comm);
  return error;
}

/* ---- tests ---- */
/* Each release finds the newest table it knows and lives with it, with and without a logger. */
static void test_releases(void **state) {
  (void)state;
  for (int i = 0; i < ncclReleaseCount; i++) {
    const struct nccl_release *release = &ncclReleases[i];
    /* 2.19 and 2.20 know no prefix: the operator names the file. */
    void *library = library_open(release, release->usesPrefix ? "ultraep" : "libnccl-tuner-ultraep.so", NULL);
    struct nccl_tuner tuner;

    if (!nccl_tuner_find(library, release->newest, release->oldest, &tuner)) {
      fail_msg("NCCL %s finds no table", release->name);
    }
    assert_int_equal(tuner.version, release->newest);
    check(live(&tuner, &plainShape, release->nAlgorithms, record), release->name);
    check(live(&tuner, &plainShape, release->nAlgorithms, NULL), release->name);
    assert_int_equal(dlclose(library), 0);
  }
  assert_int_equal(journal.bad, 0);
}

/* Every table that a release would take, were the newer ones not there. */
static void test_older_tables(void **state) {
  void *library = library_open_default();
  struct nccl_tuner tuner;

  (void)state;
  for (int i = 0; i < ncclReleaseCount; i++) {
    for (int version = ncclReleases[i].newest; version >= ncclReleases[i].oldest; version--) {
      tuner_find(library, version, &tuner);
      check(live(&tuner, &plainShape, ncclReleases[i].nAlgorithms, record), ncclReleases[i].name);
    }
  }
  assert_int_equal(journal.bad, 0);
  assert_int_equal(dlclose(library), 0);
}

/* The operator may also give a path or a file's name. */
static void test_names(void **state) {
  char path[PATH_MAX];
  const char *const values[] = {path, "libnccl-tuner-ultraep.so", "libultraep.so"};
  struct nccl_tuner tuner;
  void *library = library_open_default();
  Dl_info info;

  (void)state;
  tuner_find(library, 1, &tuner);
  assert_int_not_equal(dladdr((const void *)tuner.slots, &info), 0);
  assert_non_null(realpath(info.dli_fname, path));
  assert_int_equal(dlclose(library), 0);
  for (int i = 0; i < ncclReleaseCount; i++) {
    for (size_t v = 0; v < sizeof(values) / sizeof(values[0]); v++) {
      library = library_open(&ncclReleases[i], values[v], NULL);
      assert_true(nccl_tuner_find(library, ncclReleases[i].newest, ncclReleases[i].oldest, &tuner));
      assert_int_equal(dlclose(library), 0);
    }
    assert_null(nccl_library_open(&ncclReleases[i], "ultraep-that-is-not-there", "nor-this"));
  }
}

/* NCCL 2.21 to 2.25 look in the net plugin's library when they find no tuner. */
static void test_net_name(void **state) {
  struct nccl_tuner tuner;
  int found = 0;

  (void)state;
  for (int i = 0; i < ncclReleaseCount; i++) {
    void *library;

    if (!ncclReleases[i].opensNet) continue;
    library = library_open(&ncclReleases[i], NULL, "ultraep");
    assert_true(nccl_tuner_find(library, ncclReleases[i].newest, ncclReleases[i].oldest, &tuner));
    check(live(&tuner, &plainShape, ncclReleases[i].nAlgorithms, record), ncclReleases[i].name);
    assert_int_equal(dlclose(library), 0);
    found++;
  }
  assert_int_equal(found, 5);
}

/* The library opened by one role stays usable when another closes it: NCCL counts on one copy of it. */
static void test_roles_share(void **state) {
  static const char *const names[] = {"libnccl-tuner-ultraep.so", "libnccl-net-ultraep.so",
                                      "libnccl-profiler-ultraep.so"};
  void *handles[3];
  struct nccl_tuner tuners[3];

  (void)state;
  for (int i = 0; i < 3; i++) {
    handles[i] = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
    if (!handles[i]) {
      fail_msg("%s: %s", names[i], dlerror());
      return;
    }
    tuner_find(handles[i], NCCL_NEWEST_TABLE, &tuners[i]);
    assert_ptr_equal(tuners[i].slots, tuners[0].slots);
  }
  for (int i = 0; i < 3; i++) {
    check(live(&tuners[i], &plainShape, 7, record), names[i]);
    assert_int_equal(dlclose(handles[i]), 0);
  }
}

struct log_case {
  struct nccl_shape shape;
  const char *nodes;   /* in every table's line */
  const char *domains; /* in the line of v5 and v6 */
};

static void check_log(const struct nccl_tuner *tuner, const struct log_case *expected) {
  const struct record *opened = &journal.records[0], *closed = &journal.records[1];
  char heading[64], version[32];

  snprintf(version, sizeof(version), "%d.%d.%d", ULTRAEP_VERSION_MAJOR, ULTRAEP_VERSION_MINOR,
           ULTRAEP_VERSION_PATCH);
  snprintf(heading, sizeof(heading), "UltraEP %s tuner v%d: ", version, tuner->version);
  assert_int_equal(journal.bad, 0);
  assert_int_equal(journal.count, tuner->version == 1 ? 1 : 2);
  assert_int_equal(opened->level, LEVEL_INFO);
  assert_int_equal(opened->subsystems, SUBSYS_INIT | SUBSYS_TUNING);
  assert_ptr_equal(strstr(opened->text, heading), opened->text);
  assert_non_null(strstr(opened->text, expected->nodes));
  if (tuner->version >= 5) {
    assert_non_null(strstr(opened->text, expected->domains));
    assert_non_null(strstr(opened->text, "commId 0xfeed,"));
  } else {
    assert_non_null(strstr(opened->text, "NVLink domains: not told;"));
    assert_null(strstr(opened->text, "commId"));
  }
  if (tuner->version == 1) return;
  assert_int_equal(closed->level, LEVEL_INFO);
  assert_int_equal(closed->subsystems, SUBSYS_TUNING);
  assert_non_null(strstr(closed->text, "closed"));
}

static void test_log(void **state) {
  static const struct log_case cases[] = {
      {{64, 8, 8, 8, 8},
       "ranks: 64, nodes: 8 (ranks per node: 8),",
       "NVLink domains: 8 (ranks per domain: 8);"},
      {{1, 1, 1, 1, 1},
       "ranks: 1, nodes: 1 (ranks per node: 1),",
       "NVLink domains: 1 (ranks per domain: 1);"},
      {{15, 2, 2, 7, 8},
       "ranks: 15, nodes: 2 (ranks per node: 7.5 on average),",
       "NVLink domains: 2 (ranks per domain: 7 to 8);"},
      {{144, 2, 2, 72, 72},
       "ranks: 144, nodes: 2 (ranks per node: 72),",
       "NVLink domains: 2 (ranks per domain: 72);"},
      {{8, 0, 0, 0, 0}, "ranks: 8, nodes: 0,", "NVLink domains: not told;"},
      {{SIZE_MAX, SIZE_MAX - 1, INT32_MAX, INT32_MIN, INT32_MAX},
       "ranks: 18446744073709551615, nodes: 18446744073709551614 (ranks per node: 1.0 on average),",
       "NVLink domains: 2147483647 (ranks per domain: -2147483648 to 2147483647);"},
  };
  void *library = library_open_default();
  struct nccl_tuner tuner;

  (void)state;
  for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
    for (int version = 1; version <= NCCL_NEWEST_TABLE; version++) {
      tuner_find(library, version, &tuner);
      journal_clear(NULL);
      check(live(&tuner, &cases[i].shape, 7, record), "log");
      check_log(&tuner, &cases[i]);
    }
  }
  assert_int_equal(dlclose(library), 0);
}

/* A thousand lives leave no memory behind: by the allocator's count, where the least leak would be 32 bytes a
 * life (some blocks stay in its caches), and by the leak sanitizer where it is built in. */
static void test_repeats(void **state) {
  void *library = library_open_default();
  struct nccl_tuner tuner;
  size_t before;

  (void)state;
  for (int version = 1; version <= NCCL_NEWEST_TABLE; version++) {
    tuner_find(library, version, &tuner);
    before = mallinfo2().uordblks;
    for (int i = 0; i < REPEATS; i++) check(live(&tuner, &plainShape, 7, i % 2 ? record : NULL), "repeat");
    assert_true(mallinfo2().uordblks < before + REPEATS * 8);
  }
  assert_int_equal(journal.bad, 0);
  assert_int_equal(dlclose(library), 0);
}

/* NCCL closes the library with its last communicator and opens it again with the next. */
static void test_reopen(void **state) {
  struct nccl_tuner tuner;

  (void)state;
  for (int i = 0; i < 60; i++) {
    void *library = library_open_default();

    tuner_find(library, 1 + i % NCCL_NEWEST_TABLE, &tuner);
    check(live(&tuner, &plainShape, 7, record), "reopen");
    assert_int_equal(dlclose(library), 0);
  }
}

static void test_communicators(void **state) {
  void *library = library_open_default();
  struct nccl_tuner tuners[COMMS_AT_ONCE];
  struct nccl_comm comms[COMMS_AT_ONCE];

  (void)state;
  for (int i = 0; i < COMMS_AT_ONCE; i++) {
    struct nccl_shape shape = {(size_t)i + 1, 1, 1, i + 1, i + 1};

    tuner_find(library, 2 + i % (NCCL_NEWEST_TABLE - 1), &tuners[i]);
    check(nccl_comm_init(&comms[i], &tuners[i], &shape, (uint64_t)i, record), "init");
    assert_non_null(comms[i].context);
    for (int j = 0; j < i; j++) assert_ptr_not_equal(comms[i].context, comms[j].context);
  }
  for (int i = 0; i < COMMS_AT_ONCE; i++) check(nccl_comm_collectives(&comms[i], 7), "collectives");
  for (int i = 0; i < COMMS_AT_ONCE; i++) { /* in another order: 7 and 32 have no common divisor */
    int next = i * 7 % COMMS_AT_ONCE;
    char ranks[32];

    journal_clear(NULL);
    check(nccl_comm_destroy(&comms[next]), "destroy");
    snprintf(ranks, sizeof(ranks), "ranks: %d,", next + 1);
    assert_int_equal(journal.count, 1);
    assert_non_null(strstr(journal.records[0].text, ranks)); /* the context is its own communicator's */
  }
  assert_int_equal(dlclose(library), 0);
}

struct worker {
  pthread_t thread;
  pthread_barrier_t *start;
  const struct nccl_tuner *tuners; /* [NCCL_NEWEST_TABLE] */
  int index;
  const char *error;
};

static void *worker_run(void *argument) {
  struct worker *worker = argument;

  pthread_barrier_wait(worker->start);
  for (int i = 0; i < COMMS_PER_THREAD && !worker->error; i++) {
    const struct nccl_tuner *tuner = &worker->tuners[(i + worker->index) % NCCL_NEWEST_TABLE];
    struct nccl_shape shape = {(size_t)worker->index + 1, 1, 1, 1, worker->index + 1};

    worker->error = live(tuner, &shape, 7, record);
  }
  return NULL;
}

static void test_threads(void **state) {
  void *library = library_open_default();
  struct nccl_tuner tuners[NCCL_NEWEST_TABLE];
  struct worker workers[THREADS];
  pthread_barrier_t start;
  size_t lines = 0;

  (void)state;
  for (int version = 1; version <= NCCL_NEWEST_TABLE; version++)
    tuner_find(library, version, &tuners[version - 1]);
  assert_int_equal(pthread_barrier_init(&start, NULL, THREADS), 0);
  for (int i = 0; i < THREADS; i++) {
    workers[i] = (struct worker){.start = &start, .tuners = tuners, .index = i};
    assert_int_equal(pthread_create(&workers[i].thread, NULL, worker_run, &workers[i]), 0);
  }
  for (int i = 0; i < THREADS; i++) {
    assert_int_equal(pthread_join(workers[i].thread, NULL), 0);
    check(workers[i].error, "thread");
    for (int j = 0; j < COMMS_PER_THREAD; j++)
      lines += (i + j) % NCCL_NEWEST_TABLE == 0 ? 1 : 2; /* v1: one line */
  }
  assert_int_equal(journal.count, lines);
  assert_int_equal(journal.bad, 0);
  assert_int_equal(pthread_barrier_destroy(&start), 0);
  assert_int_equal(dlclose(library), 0);
}

/* NCCL finalizes, and could ask, a communicator whose init never ran. */
static void test_null_context(void **state) {
  void *library = library_open_default();
  struct nccl_tuner tuner;

  (void)state;
  for (int version = 2; version <= NCCL_NEWEST_TABLE; version++) {
    struct nccl_comm comm = {.tuner = &tuner};

    tuner_find(library, version, &tuner);
    check(nccl_comm_collectives(&comm, 7), "null context");
    check(nccl_comm_destroy(&comm), "null context");
  }
  assert_int_equal(journal.count, 0);
  assert_int_equal(dlclose(library), 0);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup(test_releases, journal_clear),
      cmocka_unit_test_setup(test_older_tables, journal_clear),
      cmocka_unit_test_setup(test_names, journal_clear),
      cmocka_unit_test_setup(test_net_name, journal_clear),
      cmocka_unit_test_setup(test_roles_share, journal_clear),
      cmocka_unit_test_setup(test_log, journal_clear),
      cmocka_unit_test_setup(test_repeats, journal_clear),
      cmocka_unit_test_setup(test_reopen, journal_clear),
      cmocka_unit_test_setup(test_communicators, journal_clear),
      cmocka_unit_test_setup(test_threads, journal_clear),
      cmocka_unit_test_setup(test_null_context, journal_clear),
  };

  return cmocka_run_group_tests(tests, NULL, NULL);
}
