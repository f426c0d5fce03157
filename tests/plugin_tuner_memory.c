/* The tuner where memory is short. Linked with --wrap=calloc, so that the test decides what calloc gives; and
 * null pointers where NCCL has none to give. */
#include "nccl_tuner_abi.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

/* NOLINTBEGIN(bugprone-reserved-identifier): the linker's names */
void *__real_calloc(size_t count, size_t size);
void *__wrap_calloc(size_t count, size_t size);
/* NOLINTEND(bugprone-reserved-identifier) */

static bool memoryIsShort;
static int refusals;

void *__wrap_calloc(size_t count, size_t size) {
  if (!memoryIsShort) return __real_calloc(count, size);
  refusals++;
  return NULL;
}

static int lines;

__attribute__((format(printf, 5, 6))) static void
count_line(int level, unsigned long subsystems, const char *where, int line, const char *format, ...) {
  (void)level, (void)subsystems, (void)where, (void)line, (void)format;
  lines++;
}

static void *const untouched = &lines;

static void test_short(void **state) {
  void *contexts[5] = {untouched, untouched, untouched, untouched, untouched};
  ultraepResult_t results[5];

  (void)state;
  lines = refusals = 0;
  memoryIsShort = true;
  results[0] = ncclTunerPlugin_v2.init(8, 1, count_line, &contexts[0]);
  results[1] = ncclTunerPlugin_v3.init(8, 1, count_line, &contexts[1]);
  results[2] = ncclTunerPlugin_v4.init(8, 1, count_line, &contexts[2]);
  results[3] = ncclTunerPlugin_v5.init(&contexts[3], 1, 8, 1, count_line, NULL, NULL);
  results[4] = ncclTunerPlugin_v6.init(&contexts[4], 1, 8, 1, count_line, NULL, NULL);
  memoryIsShort = false;

  assert_int_equal(refusals, 5);
  assert_int_equal(lines, 5);
  for (int i = 0; i < 5; i++) {
    assert_int_equal(results[i], ultraepSuccess);
    assert_null(contexts[i]);
  }
  assert_int_equal(ncclTunerPlugin_v4.getCollInfo(contexts[2], 4, 1024, 1, NULL, 0, 0, 0, NULL),
                   ultraepSuccess);
  assert_int_equal(ncclTunerPlugin_v2.destroy(contexts[0]), ultraepSuccess);
  assert_int_equal(ncclTunerPlugin_v3.destroy(contexts[1]), ultraepSuccess);
  assert_int_equal(ncclTunerPlugin_v4.destroy(contexts[2]), ultraepSuccess);
  assert_int_equal(ncclTunerPlugin_v5.finalize(contexts[3]), ultraepSuccess);
  assert_int_equal(ncclTunerPlugin_v6.finalize(contexts[4]), ultraepSuccess);
}

static void test_null_pointers(void **state) {
  (void)state;
  lines = 0;
  assert_int_equal(ncclTunerPlugin_v1.init(0, 0, NULL), ultraepSuccess);
  assert_int_equal(ncclTunerPlugin_v2.init(0, 0, NULL, NULL), ultraepSuccess);
  assert_int_equal(ncclTunerPlugin_v3.init(0, 0, count_line, NULL), ultraepSuccess);
  assert_int_equal(ncclTunerPlugin_v4.init(0, 0, count_line, NULL), ultraepSuccess);
  assert_int_equal(ncclTunerPlugin_v5.init(NULL, 0, 0, 0, count_line, NULL, NULL), ultraepSuccess);
  assert_int_equal(ncclTunerPlugin_v6.init(NULL, 0, 0, 0, NULL, NULL, NULL), ultraepSuccess);
  assert_int_equal(lines, 3);
  assert_int_equal(ncclTunerPlugin_v1.getCollInfo(0, 0, 0, 0, 0, NULL, NULL, NULL), ultraepSuccess);
  assert_int_equal(ncclTunerPlugin_v2.getCollInfo(NULL, 0, 0, 0, 0, 0, NULL, NULL, NULL), ultraepSuccess);
  assert_int_equal(ncclTunerPlugin_v3.getCollInfo(NULL, 0, 0, 0, NULL, 0, 0, NULL), ultraepSuccess);
  assert_int_equal(ncclTunerPlugin_v6.getCollInfo(NULL, 0, 0, 0, NULL, 0, 0, 0, NULL), ultraepSuccess);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_short),
      cmocka_unit_test(test_null_pointers),
  };

  return cmocka_run_group_tests(tests, NULL, NULL);
}
