/* Whether all ranks of a communicator have called: in one process, and in several that end. */
#include "attendance.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

enum { RANKS = 5 };

/* That no other run has. */
static uint64_t next_id(void) {
  static uint64_t count;
  struct timespec now;

  clock_gettime(CLOCK_MONOTONIC, &now);
  return ((uint64_t)now.tv_sec << 30 | (uint64_t)now.tv_nsec) * 1000003u + (uint64_t)getpid() * 64 + count++;
}

static void test_full(void **state) {
  const uint64_t id = next_id(), other = next_id();
  attendance_t *ranks[RANKS], *elsewhere[RANKS];

  (void)state;
  for (int r = 0; r < RANKS; r++) {
    ranks[r] = attendance_open(id, RANKS, r);
    elsewhere[r] = attendance_open(other, RANKS, r);
    for (int i = 0; i <= r; i++) assert_int_equal(attendance_is_full(ranks[i]), r == RANKS - 1);
  }
  for (int r = 0; r < RANKS; r++) {
    attendance_close(ranks[r]);
    for (int i = r + 1; i < RANKS; i++) assert_false(attendance_is_full(ranks[i]));
    assert_true(attendance_is_full(elsewhere[r]));
  }
  for (int r = 0; r < RANKS; r++) attendance_close(elsewhere[r]);
}

/* A rank that has not called, for each of them. */
static void test_missing(void **state) {
  (void)state;
  for (int missing = 0; missing < RANKS; missing++) {
    const uint64_t id = next_id();
    attendance_t *ranks[RANKS];

    for (int r = 0; r < RANKS; r++) ranks[r] = r == missing ? NULL : attendance_open(id, RANKS, r);
    for (int r = 0; r < RANKS; r++)
      if (r != missing) assert_false(attendance_is_full(ranks[r]));
    for (int r = 0; r < RANKS; r++) attendance_close(ranks[r]);
  }
}

static void test_none(void **state) {
  const uint64_t id = next_id();
  attendance_t *first = attendance_open(id, 1, 0), *again = attendance_open(id, 1, 0);
  attendance_t *nobody = attendance_open(0, 0, 0);

  (void)state;
  assert_true(attendance_is_full(NULL)); /* nobody has to ask */
  assert_true(attendance_is_full(first));
  assert_false(attendance_is_full(again)); /* that name is taken */
  assert_false(attendance_is_full(nobody));
  attendance_close(NULL);
  attendance_close(nobody);
  attendance_close(again);
  assert_true(attendance_is_full(first));
  attendance_close(first);
}

/* A rank that others find can ask, too, though it could not open another file by now. */
static void test_no_files_left(void **state) {
  const uint64_t id = next_id();
  attendance_t *ranks[2] = {attendance_open(id, 2, 0), attendance_open(id, 2, 1)}, *late;
  struct rlimit before, none;
  bool areFull;

  (void)state;
  assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
  none = before;
  none.rlim_cur = 0;
  assert_int_equal(setrlimit(RLIMIT_NOFILE, &none), 0);
  areFull = attendance_is_full(ranks[0]) && attendance_is_full(ranks[1]);
  late = attendance_open(next_id(), 1, 0);
  assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
  assert_true(areFull);
  assert_false(attendance_is_full(late));
  attendance_close(late);
  for (int r = 0; r < 2; r++) attendance_close(ranks[r]);
}

/* Ranks are processes; what one held is gone with it, however it ended. */
static void test_processes(void **state) {
  const uint64_t id = next_id();
  attendance_t *mine = attendance_open(id, 2, 0);
  int ready[2], go[2], status;
  char byte = 0;
  pid_t child;

  (void)state;
  assert_int_equal(pipe(ready), 0);
  assert_int_equal(pipe(go), 0);
  assert_false(attendance_is_full(mine));
  child = fork();
  if (child == 0) {
    attendance_t *own = attendance_open(id, 2, 1);

    byte = attendance_is_full(own);
    if (write(ready[1], &byte, 1) != 1 || read(go[0], &byte, 1) != 1) _exit(2);
    _exit(0);
  }
  assert_true(child > 0);
  assert_int_equal(read(ready[0], &byte, 1), 1);
  assert_int_equal(byte, 1);
  assert_true(attendance_is_full(mine));
  assert_int_equal(write(go[1], &byte, 1), 1);
  assert_int_equal(waitpid(child, &status, 0), child);
  assert_int_equal(status, 0);
  assert_false(attendance_is_full(mine));
  attendance_close(mine);
  for (int i = 0; i < 2; i++) {
    close(ready[i]);
    close(go[i]);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_full), cmocka_unit_test(test_missing),
                                     cmocka_unit_test(test_none), cmocka_unit_test(test_no_files_left),
                                     cmocka_unit_test(test_processes)};
  return cmocka_run_group_tests_name("plugin_attendance", tests, NULL, NULL);
}
