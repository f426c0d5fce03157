/* The checks of configs, and what follows from one. */
#include "config.h"
#include "host_common.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define assert_code(call, code) assert_int_equal((call), (code))

static void expect_bad_config(const ultraepConfig_t *config, const char *word) {
  assert_code(config_check(config, 4), ultraepInvalidArgument);
  if (!strstr(ultraepGetLastError(), word)) fail_msg("'%s' does not name %s", ultraepGetLastError(), word);
}

#define TRY(field, value, word)                                                                              \
  do {                                                                                                       \
    ultraepConfig_t config_ = host_config();                                                                 \
    config_.field = value;                                                                                   \
    expect_bad_config(&config_, word);                                                                       \
  } while (0)
#define FINE(field, value)                                                                                   \
  do {                                                                                                       \
    ultraepConfig_t config_ = host_config();                                                                 \
    config_.field = value;                                                                                   \
    assert_code(config_check(&config_, 4), ultraepSuccess);                                                  \
  } while (0)

static void test_config_header(void **state) {
  (void)state;
  assert_code(config_check(NULL, 1), ultraepInvalidArgument);
  TRY(magic, 1, "magic");
  TRY(size, sizeof(ultraepConfig_t) - 8, "size");
  TRY(version, 10000 * (ULTRAEP_VERSION_MAJOR + 1), "version");
  TRY(version, ULTRAEP_VERSION_CODE + 1, "version");
  TRY(version, 0, "version");
  ultraepConfig_t config = host_config();
  assert_code(config_check(&config, 0), ultraepInvalidArgument);
  assert_code(config_check(&config, ULTRAEP_MAX_RANKS + 1), ultraepInvalidArgument);
}

static void test_config_ranges(void **state) {
  (void)state;
  TRY(nExperts, 0, "nExperts");
  TRY(nExperts, 4100, "nExperts");
  TRY(nExperts, 6, "nExperts");
  FINE(nExperts, 4096);
  TRY(topK, 0, "topK");
  TRY(topK, 33, "topK");
  FINE(topK, 32);
  TRY(maxTokens, 0, "maxTokens");
  TRY(maxTokens, (1 << 24) + 1, "maxTokens");
  FINE(maxTokens, 1 << 24);
  TRY(hidden, 0, "hidden");
  TRY(hidden, -8, "hidden");
  TRY(hidden, 7, "hidden");
  TRY(hidden, 9, "hidden");
  TRY(hidden, (1 << 19) + 8, "hidden");
  FINE(hidden, 8);
  FINE(hidden, 1 << 19);
  TRY(dataType, -1, "dataType");
  TRY(dataType, 5, "dataType");
  TRY(scaleBytes, -4, "scaleBytes");
  TRY(scaleBytes, 6, "scaleBytes");
  TRY(scaleBytes, 65540, "scaleBytes");
  FINE(scaleBytes, 65536);
  TRY(nSlots, -1, "nSlots");
  TRY(nSlots, 65, "nSlots");
  FINE(nSlots, 64);
  TRY(balance, 2, "balance");
  FINE(balance, 0);
  TRY(domainRanks, 3, "domainRanks");
  TRY(domainRanks, 8, "domainRanks");
  FINE(domainRanks, 2);
  TRY(alignment, 0, "alignment");
  TRY(alignment, 4097, "alignment");
  TRY(maxRecvRows, -1, "maxRecvRows");
  TRY(maxRecvRows, (int64_t)INT32_MAX + 1, "maxRecvRows");
  FINE(maxRecvRows, INT32_MAX);
  TRY(dispatchMode, 3, "dispatchMode");
  TRY(combineMode, 2, "combineMode");
  TRY(maxRoutes, 0, "maxRoutes");
  TRY(maxRoutes, 4097, "maxRoutes");
  TRY(maxCtas, -1, "maxCtas");
  TRY(timeoutMs, 0, "timeoutMs");
  TRY(timeoutMs, 3600001, "timeoutMs");
  TRY(reserved[6], 1, "reserved");
}

static void test_config_cost(void **state) {
  (void)state;
  TRY(tolerance, -0.01, "tolerance");
  TRY(tolerance, 1001.0, "tolerance");
  TRY(tolerance, NAN, "tolerance");
  TRY(linkBytesPerSecond, -1.0, "linkBytesPerSecond");
  TRY(linkBytesPerSecond, INFINITY, "linkBytesPerSecond");
  TRY(rowSeconds, -1.0, "rowSeconds");
  TRY(rowSeconds, NAN, "rowSeconds");
  TRY(expertBytes, -1, "expertBytes");
  TRY(expertBytes, (INT64_C(1) << 40) + 1, "expertBytes");
  TRY(expertBytes, INT64_C(1) << 40, "row"); /* more than 4.19 us a row at the default rate */
  ultraepConfig_t config = host_config();
  config.expertBytes = 600000000; /* 1 us a row, 1.5 ms a copy */
  config.tolerance = 0.0105;
  assert_code(config_check(&config, 4), ultraepSuccess);
  ultraepPlannerConfig_t planner = config_planner(&config, 4, 2);
  assert_int_equal(planner.nRanks, 4);
  assert_int_equal(planner.nDomainRanks, 2);
  assert_int_equal(planner.nSlots, 2);
  assert_int_equal(planner.tolerancePpm, 10500);
  assert_int_equal(planner.rowPs, 1000000);
  assert_int_equal(planner.copyPs, 1500000000);
  config.rowSeconds = 2e-9;
  config.linkBytesPerSecond = 600e9;
  config.balance = 0;
  planner = config_planner(&config, 4, 4);
  assert_int_equal(planner.rowPs, 2000);
  assert_int_equal(planner.copyPs, 1000000000);
  assert_int_equal(planner.nSlots, 0);
  config.linkBytesPerSecond = 1; /* 19 years a copy */
  assert_code(config_check(&config, 4), ultraepInvalidArgument);
  assert_non_null(strstr(ultraepGetLastError(), "copy"));
  config.expertBytes = 0; /* the gate is off, whatever the rates */
  assert_code(config_check(&config, 4), ultraepSuccess);
  planner = config_planner(&config, 4, 4);
  assert_int_equal(planner.rowPs, 0);
  assert_int_equal(planner.copyPs, 0);
}

static void test_config_rows(void **state) {
  (void)state;
  ultraepConfig_t config = host_config(); /* 32 tokens, top-2, 8 experts, 2 slots */
  assert_int_equal(config_recv_rows(&config, 4), 2 * 64);
  assert_int_equal(config_recv_rows(&config, 1), 64);
  config.alignment = 16;
  assert_int_equal(config_recv_rows(&config, 4), 2 * 64 + (2 + 2) * 15);
  config.maxRecvRows = 99;
  assert_int_equal(config_recv_rows(&config, 4), 99);
  for (int32_t type = -2; type < 7; type++) {
    size_t bytes = config_type_bytes(type), rowBytes;
    assert_int_equal(bytes > 0, type >= 0 && type < 5);
    assert_int_equal(strcmp(config_type_name(type), "unknown") != 0, type >= 0 && type < 5);
    assert_int_equal(config_row_bytes(&config, type, &rowBytes) == ultraepSuccess, bytes > 0);
    if (bytes) assert_int_equal(rowBytes, 32 * bytes);
  }
}

/* Every field counts when ranks compare their configs. */
static void test_config_difference(void **state) {
  (void)state;
  ultraepConfig_t a = host_config();
  assert_null(config_difference(&a, &a));
#define DIFFERENT(field)                                                                                     \
  do {                                                                                                       \
    ultraepConfig_t b = a;                                                                                   \
    b.field += 1;                                                                                            \
    assert_string_equal(config_difference(&a, &b), #field);                                                  \
  } while (0)
  DIFFERENT(version);
  DIFFERENT(nExperts);
  DIFFERENT(topK);
  DIFFERENT(maxTokens);
  DIFFERENT(hidden);
  DIFFERENT(dataType);
  DIFFERENT(scaleBytes);
  DIFFERENT(nSlots);
  DIFFERENT(balance);
  DIFFERENT(domainRanks);
  DIFFERENT(alignment);
  DIFFERENT(maxRecvRows);
  DIFFERENT(tolerance);
  DIFFERENT(expertBytes);
  DIFFERENT(linkBytesPerSecond);
  DIFFERENT(rowSeconds);
  DIFFERENT(dispatchMode);
  DIFFERENT(combineMode);
  DIFFERENT(maxRoutes);
  DIFFERENT(maxCtas);
  DIFFERENT(timeoutMs);
#undef DIFFERENT
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_config_header),     cmocka_unit_test(test_config_ranges),
      cmocka_unit_test(test_config_cost),       cmocka_unit_test(test_config_rows),
      cmocka_unit_test(test_config_difference),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
