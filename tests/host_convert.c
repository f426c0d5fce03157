/* Conversions, exhaustively against the oracle's arithmetic, and the sums of rows: both ways of computing
 * them. */
#include "convert.h"
#include "host.h"
#include "host_common.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static uint16_t store16(int32_t dataType, float value) {
  unsigned char bytes[2];
  uint16_t bits;
  oracle_store(dataType, bytes, 0, value);
  memcpy(&bits, bytes, sizeof(bits));
  return bits;
}

static void check_load(int32_t dataType, uint16_t bits, float value) {
  unsigned char bytes[2];
  memcpy(bytes, &bits, sizeof(bits));
  float expected = oracle_load(dataType, bytes, 0);
  if (isnan(expected))
    assert_true(isnan(value));
  else
    assert_int_equal(convert_float_bits(value), convert_float_bits(expected));
}

static void test_load_all(void **state) {
  (void)state;
  for (uint32_t bits = 0; bits < 65536; bits++) {
    check_load(ULTRAEP_BFLOAT16, (uint16_t)bits, convert_bf16_float((uint16_t)bits));
    check_load(ULTRAEP_FLOAT16, (uint16_t)bits, convert_f16_float((uint16_t)bits));
  }
}

static void check_store(float value) {
  uint16_t bf16 = convert_float_bf16(value), f16 = convert_float_f16(value);
  if (isnan(value)) {
    assert_true(isnan(convert_bf16_float(bf16)) && isnan(convert_f16_float(f16)));
    assert_int_equal(bf16 >> 15, signbit(value) != 0);
    assert_int_equal(f16 >> 15, signbit(value) != 0);
  } else {
    assert_int_equal(bf16, store16(ULTRAEP_BFLOAT16, value));
    assert_int_equal(f16, store16(ULTRAEP_FLOAT16, value));
  }
}

/* Every value of either type, its neighbours, and the ties between two values with theirs. */
static void test_store_edges(void **state) {
  (void)state;
  for (uint32_t bits = 0; bits < 65536; bits++) {
    const float values[] = {convert_bf16_float((uint16_t)bits), convert_f16_float((uint16_t)bits)};
    const uint32_t halves[] = {0x8000u, 0x1000u};
    for (int i = 0; i < 2; i++) {
      uint32_t exact = convert_float_bits(values[i]);
      for (uint32_t near = exact - 1; near != exact + 2; near++) check_store(convert_bits_float(near));
      uint32_t tie = exact + halves[i];
      for (uint32_t near = tie - 1; near != tie + 2; near++) check_store(convert_bits_float(near));
    }
  }
}

static void test_store_random(void **state) {
  (void)state;
  hostRandom_t random = {5};
  for (int i = 0; i < 1000000; i++) check_store(convert_bits_float((uint32_t)host_random(&random)));
}

/* Lengths around the blocks of the loops; the first row is also the destination, as in a reduction. */
static void test_sums_agree(void **state) {
  (void)state;
  hostRandom_t random = {6};
  static const int lengths[] = {1, 7, 8, 31, 255, 256, 257, 512, 1000};
  enum { ROWS = 5, MOST = 1000 };
  unsigned char *rows[ROWS], *out = malloc(4 * MOST), *expected = malloc(4 * MOST);
  float weights[ROWS];
  for (int k = 0; k < ROWS; k++) rows[k] = malloc(4 * MOST);
  for (int32_t type = ULTRAEP_BFLOAT16; type <= ULTRAEP_FLOAT32; type++)
    for (size_t l = 0; l < sizeof(lengths) / sizeof(lengths[0]); l++)
      for (int n = 0; n <= ROWS; n++) {
        int length = lengths[l];
        size_t bytes = (size_t)length * (type == ULTRAEP_FLOAT32 ? 4 : 2);
        for (int k = 0; k < n; k++) {
          weights[k] = (float)host_random_in(&random, -500, 500) / 77.0f;
          for (int i = 0; i < length; i++)
            oracle_store(type, rows[k], i, (float)host_random_in(&random, -99999, 99999) / 1234.0f);
        }
        for (int i = 0; i < length; i++) {
          volatile float sum = 0; /* so that no compiler fuses what is to be compared */
          for (int k = 0; k < n; k++) {
            volatile float product = weights[k] * oracle_load(type, rows[k], i);
            sum = sum + product;
          }
          oracle_store(type, expected, i, sum);
        }
        host_sum_rows_baseline(out, (const void *const *)rows, weights, n, (size_t)length, type);
        assert_memory_equal(out, expected, bytes);
        void *dst = n ? rows[0] : out;
        host_sum_rows(dst, (const void *const *)rows, weights, n, (size_t)length, type);
        assert_memory_equal(dst, expected, bytes);
      }
  for (int k = 0; k < ROWS; k++) free(rows[k]);
  free(expected);
  free(out);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_load_all),
      cmocka_unit_test(test_store_edges),
      cmocka_unit_test(test_store_random),
      cmocka_unit_test(test_sums_agree),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
