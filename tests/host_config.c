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
  TRY(gradsMode, 4, "gradsMode");
  TRY(peers, -1, "peers");
  TRY(peers, 3, "peers");
  FINE(peers, ULTRAEP_PEERS_IPC);
  TRY(maxRoutes, 0, "maxRoutes");
  TRY(maxRoutes, 4097, "maxRoutes");
  TRY(maxCtas, -1, "maxCtas");
  TRY(expertCtas, -1, "expertCtas");
  TRY(timeoutMs, 0, "timeoutMs");
  TRY(timeoutMs, 3600001, "timeoutMs");
  TRY(replicaRows, -1, "replicaRows");
  TRY(replicaRows, ULTRAEP_MAX_REPLICA_ROWS + 1, "replicaRows");
  FINE(replicaRows, ULTRAEP_MAX_REPLICA_ROWS);
  TRY(reserved[0], 1, "reserved");
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
  TRY(expertSeconds, -1.0, "expertSeconds");
  TRY(expertSeconds, 1.1, "expertSeconds");
  TRY(expertBytes, -2, "expertBytes");
  FINE(expertBytes, ULTRAEP_EXPERT_BYTES_REGISTERED);
  TRY(expertBytes, (INT64_C(1) << 40) + 1, "expertBytes");
  TRY(expertBytes, INT64_C(1) << 40, "row"); /* more than 4.19 us a row at the default rate */
  ultraepConfig_t config = host_config();
  config.expertBytes = 600000000; /* 1 us a row and 0.1 us to move its 20000 bytes; 1.5 ms a copy */
  config.hidden = 10000;
  config.dataType = ULTRAEP_BFLOAT16;
  config.tolerance = 0.0105;
  config.replicaRows = 77;
  assert_code(config_check(&config, 4), ultraepSuccess);
  ultraepPlannerConfig_t planner = config_planner(&config, 4, 2);
  assert_int_equal(planner.nRanks, 4);
  assert_int_equal(planner.nDomainRanks, 2);
  assert_int_equal(planner.nSlots, 2);
  assert_int_equal(planner.tolerancePpm, 10500);
  assert_int_equal(planner.replicaRows, 77);
  assert_int_equal(planner.rowPs, 1100000);
  assert_int_equal(planner.copyPs, 1500000000);
  assert_int_equal(planner.relayCopies, 1);
  config.rowSeconds = 2e-9;
  config.linkBytesPerSecond = 600e9;
  config.balance = 0;
  planner = config_planner(&config, 4, 4);
  assert_int_equal(planner.rowPs, 2000);
  assert_int_equal(planner.copyPs, 1000000000);
  assert_int_equal(planner.nSlots, 0);
  config.expertSeconds = 0.002;
  assert_int_equal(config_planner(&config, 4, 4).copyPs, 3000000000);
  config.linkBytesPerSecond = 1; /* 19 years a copy */
  assert_code(config_check(&config, 4), ultraepInvalidArgument);
  assert_non_null(strstr(ultraepGetLastError(), "copy"));
  config.expertBytes = 0; /* the gate is off, whatever the rates */
  assert_code(config_check(&config, 4), ultraepSuccess);
  planner = config_planner(&config, 4, 4);
  assert_int_equal(planner.rowPs, 0);
  assert_int_equal(planner.copyPs, 0);
  assert_int_equal(planner.relayCopies, 0);
}

/* What registered experts and measured rates make of the gate. */
static void test_config_gate(void **state) {
  (void)state;
  ultraepConfig_t config = host_config();
  ultraepPlannerConfig_t planner = config_planner(&config, 4, 4);
  ultraepExperts_t experts = ULTRAEP_EXPERTS_INITIALIZER;
  experts.nWeights = 2; /* 60 MB of weights, 40 MB of which are the first tensor */
  experts.weights[0].bytes = 40000000;
  experts.weights[1].bytes = 20000000;
  config.hidden = 1000; /* 4000 bytes a row */
  config.dataType = ULTRAEP_FLOAT32;
  config_gate(&config, NULL, &experts, &planner); /* expertBytes = 0: no gate, whatever is registered */
  assert_true(planner.rowPs == 0 && planner.copyPs == 0 && planner.relayCopies == 0);
  config.expertBytes = ULTRAEP_EXPERT_BYTES_REGISTERED;
  assert_code(config_check(&config, 4), ultraepSuccess);
  config_gate(&config, NULL, NULL, &planner); /* nothing registered yet */
  assert_true(planner.rowPs == 0 && planner.copyPs == 0 && planner.relayCopies == 0);
  config_gate(&config, NULL, &experts, &planner); /* inference, by the defaults: 600e12 and 400e9 */
  assert_true(planner.rowPs == 100000 + 20000 && planner.copyPs == 150000000 && planner.relayCopies == 1);
  experts.nGrads = 1; /* training: three passes, four crossings; weights twice and gradients */
  experts.grads[0].bytes = 120000000;
  config_gate(&config, NULL, &experts, &planner);
  assert_true(planner.rowPs == 300000 + 40000 && planner.copyPs == 600000000);
  configRates_t measured = {.linkBytesPerSecond = 200e9, .weightBytesPerSecond = 300e12};
  config_gate(&config, &measured, &experts, &planner); /* measured before defaults */
  assert_true(planner.rowPs == 600000 + 80000 && planner.copyPs == 1200000000);
  config.linkBytesPerSecond = 100e9; /* given before measured */
  config.rowSeconds = 5e-9;
  config_gate(&config, &measured, &experts, &planner);
  assert_true(planner.rowPs == 5000 && planner.copyPs == 2400000000);
  config.expertBytes = 10000000; /* given before registered */
  config_gate(&config, &measured, &experts, &planner);
  assert_true(planner.rowPs == 5000 && planner.copyPs == 100000000);
  /* Out of the planner's range, and less than a picosecond: still a gate that the planner takes. */
  config.expertBytes = ULTRAEP_EXPERT_BYTES_REGISTERED;
  config.linkBytesPerSecond = config.rowSeconds = 0;
  measured = (configRates_t){.linkBytesPerSecond = 1e-3, .weightBytesPerSecond = 1e-3};
  config_gate(&config, &measured, &experts, &planner);
  assert_true(planner.rowPs == ULTRAEP_MAX_ROW_PS && planner.copyPs == ULTRAEP_MAX_COPY_PS);
  assert_string_equal(ultraepPlannerConfigError(&planner), "");
  measured = (configRates_t){.linkBytesPerSecond = 1e30, .weightBytesPerSecond = 1e30};
  config_gate(&config, &measured, &experts, &planner);
  assert_true(planner.rowPs == 1 && planner.copyPs == 1);
}

/* What is measured never leaves a rank more rows than there is room for. */
static void test_gate_limit(void **state) {
  (void)state;
  ultraepConfig_t config = host_config(); /* 32 tokens, top-2, 8 experts, 2 slots */
  ultraepPlannerConfig_t planner = {.rowPs = 1000, .copyPs = 1000000};
  config_gate_limit(&config, 4, 2 * 64, &planner); /* 64 rows for two copies */
  assert_int_equal(planner.copyPs, 32000);
  config_gate_limit(&config, 4, 4 * 64, &planner); /* dear enough */
  assert_int_equal(planner.copyPs, 32000);
  config.alignment = 16;
  planner.copyPs = 1000000;
  config_gate_limit(&config, 4, 2 * 64 + 4 * 15, &planner);
  assert_int_equal(planner.copyPs, 32000);
  config_gate_limit(&config, 4, 60, &planner); /* no room at all: still a gate */
  assert_int_equal(planner.copyPs, 1);
  config.alignment = 1;
  config.replicaRows = 16; /* two slots' worth of the 64 rows is theirs */
  planner.copyPs = 1000000;
  config_gate_limit(&config, 4, 2 * 64, &planner);
  assert_int_equal(planner.copyPs, 16000);
  planner.copyPs = 0;
  config_gate_limit(&config, 4, 2 * 64, &planner);
  assert_int_equal(planner.copyPs, 0);
}

/* A group whose gate waits for the experts: all assignments to expert 0, before and after they register. */
typedef struct {
  double rowSeconds, expertSeconds;
  int nBefore, nAfter; /* replicas */
  ultraepPlannerConfig_t before, after;
} gate_t;

static void gate_rank(hostRankArg_t *self) {
  gate_t *x = self->arg;
  ultraepConfig_t config = host_config();
  ultraepGroup_t group;
  ultraepRoute_t route;
  ultraepPlan_t before, after;
  ultraepPlannerConfig_t planner;
  void *master;
  int32_t topk[32][2];
  memset(topk, 0, sizeof(topk));
  config.expertBytes = ULTRAEP_EXPERT_BYTES_REGISTERED;
  config.rowSeconds = x->rowSeconds;
  config.expertSeconds = x->expertSeconds;
  config.linkBytesPerSecond = 64e6; /* 1 us for 64 bytes */
  CHECK_OK(self, ultraepGroupCreateHost(&group, self->world, self->rank, &config));
  CHECK_OK(self, ultraepRouteCreate(group, &route));
  CHECK_OK(self, ultraepRouteUpdate(route, topk[0], NULL, 32, NULL));
  CHECK_OK(self, ultraepRoutePlan(route, &before));
  int nBefore = before.nReplicas;
  CHECK_IS(self, ultraepGroupPlanner(group, NULL), ultraepInvalidArgument);
  CHECK_IS(self, ultraepGroupPlanner(NULL, &planner), ultraepInvalidArgument);
  CHECK_OK(self, ultraepGroupPlanner(group, &planner));
  if (self->rank == 0) x->before = planner;
  CHECK_OK(self, ultraepMemAlloc(group, &master, (size_t)(config.nExperts / self->nRanks) * 64));
  ultraepExperts_t experts = ULTRAEP_EXPERTS_INITIALIZER;
  experts.nWeights = 1;
  experts.weights[0] = (ultraepExpertTensor_t){.master = master, .bytes = 64};
  for (int layer = 0; layer < 2; layer++) CHECK_OK(self, ultraepExpertsRegister(group, layer, &experts));
  CHECK_OK(self, ultraepRouteUpdate(route, topk[0], NULL, 32, NULL));
  CHECK_OK(self, ultraepRoutePlan(route, &after));
  CHECK_OK(self, ultraepGroupPlanner(group, &planner));
  if (self->rank == 0) x->after = planner, x->nBefore = nBefore, x->nAfter = after.nReplicas;
  SYNC(self);
  CHECK_OK(self, ultraepGroupDestroy(group));
}

static void test_group_gate(void **state) {
  (void)state;
  gate_t x = {.rowSeconds = 1e-9}; /* 256 rows: 0.256 us, less than one copy */
  host_run(4, gate_rank, &x);
  assert_true(x.nBefore > 0 && x.nAfter == 0);
  assert_true(x.before.copyPs == 0 && x.before.rowPs == 0 && x.before.relayCopies == 0);
  assert_true(x.after.copyPs == 1000000 && x.after.rowPs == 1000 && x.after.relayCopies == 1);
  x = (gate_t){.rowSeconds = 1e-7}; /* 256 rows: 25.6 us, and 192 of them can go for one relayed copy */
  host_run(4, gate_rank, &x);
  assert_true(x.nAfter == 3 && x.nBefore == 3 && x.after.copyPs == 1000000);
  x = (gate_t){.rowSeconds = 1e-7, .expertSeconds = 30e-6}; /* cheap to copy, dear to have */
  host_run(4, gate_rank, &x);
  assert_true(x.nAfter == 0 && x.nBefore == 3 && x.after.copyPs == 31000000);
}

static void test_config_rows(void **state) {
  (void)state;
  ultraepConfig_t config = host_config(); /* 32 tokens, top-2, 8 experts, 2 slots */
  assert_int_equal(config_recv_rows(&config, 4), 2 * 64);
  assert_int_equal(config_recv_rows(&config, 1), 64);
  config.alignment = 16;
  assert_int_equal(config_recv_rows(&config, 4), 2 * 64 + (2 + 2) * 15);
  config.alignment = 1;
  config.expertBytes = 600000000; /* a copy costs 1500 rows: the gate may leave all on one rank */
  assert_int_equal(config_recv_rows(&config, 4), 4 * 64);
  config.linkBytesPerSecond = 300e12; /* 2 rows; two copies, of two slots or two masters */
  assert_int_equal(config_recv_rows(&config, 4), 2 * 64);
  config.linkBytesPerSecond = 15e12; /* 40 rows less what it costs to move them */
  assert_int_equal(config_recv_rows(&config, 4), 64 + 80);
  config.replicaRows = 20;
  assert_int_equal(config_recv_rows(&config, 4), 64 + 80 + 40);
  config.balance = 0;
  assert_int_equal(config_recv_rows(&config, 4), 2 * 64);
  config.balance = 1;
  config.replicaRows = 0;
  config.linkBytesPerSecond = 20e12;
  config.expertBytes = ULTRAEP_EXPERT_BYTES_REGISTERED; /* 30 rows * 4/3 */
  assert_int_equal(config_recv_rows(&config, 4), 64 + 80);
  config.maxTokens = 1 << 24;
  config.topK = 32;
  config.linkBytesPerSecond = 1; /* rows are numbered in 32 bits */
  assert_int_equal(config_recv_rows(&config, 1024), CONFIG_MAX_RECV_ROWS);
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
/* Over a slow link a row goes once, where it counts; a mode that is given stands. */
static void test_config_dispatch_mode(void **state) {
  (void)state;
  ultraepConfig_t config = host_config();
  config.topK = 8;
  config.maxTokens = 4096;
  config.hidden = 7168;
  assert_int_equal(config_dispatch_mode(&config, 8, false), ULTRAEP_DISPATCH_DIRECT); /* no rate is given */
  assert_int_equal(config_dispatch_mode(&config, 8, true), ULTRAEP_DISPATCH_ONCE);
  assert_int_equal(config_dispatch_mode(&config, 2, true), ULTRAEP_DISPATCH_ONCE);
  config.linkBytesPerSecond = 450e9;
  assert_int_equal(config_dispatch_mode(&config, 8, false), ULTRAEP_DISPATCH_ONCE);
  config.dispatchMode = ULTRAEP_DISPATCH_DIRECT;
  assert_int_equal(config_dispatch_mode(&config, 8, false), ULTRAEP_DISPATCH_DIRECT);
  config.dispatchMode = ULTRAEP_DISPATCH_AUTO;
  assert_int_equal(config_dispatch_mode(&config, 1, false), ULTRAEP_DISPATCH_DIRECT);
  config.maxTokens = 8; /* too few for another meeting */
  assert_int_equal(config_dispatch_mode(&config, 8, false), ULTRAEP_DISPATCH_DIRECT);
  config.maxTokens = 4096;
  config.topK = 1; /* nothing to save */
  assert_int_equal(config_dispatch_mode(&config, 8, false), ULTRAEP_DISPATCH_DIRECT);
  config.topK = 8;
  config.linkBytesPerSecond = 3e12; /* memory is the link */
  assert_int_equal(config_dispatch_mode(&config, 8, false), ULTRAEP_DISPATCH_DIRECT);
  config.linkBytesPerSecond = 450e9;
  config.dispatchMode = ULTRAEP_DISPATCH_ONCE;
  assert_int_equal(config_dispatch_mode(&config, 1, false), ULTRAEP_DISPATCH_ONCE);
}

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
  DIFFERENT(expertSeconds);
  DIFFERENT(dispatchMode);
  DIFFERENT(combineMode);
  DIFFERENT(gradsMode);
  DIFFERENT(peers);
  DIFFERENT(maxRoutes);
  DIFFERENT(maxCtas);
  DIFFERENT(expertCtas);
  DIFFERENT(timeoutMs);
  DIFFERENT(replicaRows);
#undef DIFFERENT
}

static void test_config_peers(void **state) {
  (void)state;
  int32_t peers = 77;
  assert_true(config_peers_read("auto", &peers) && peers == ULTRAEP_PEERS_AUTO);
  assert_true(config_peers_read("window", &peers) && peers == ULTRAEP_PEERS_WINDOW);
  assert_true(config_peers_read("ipc", &peers) && peers == ULTRAEP_PEERS_IPC);
  assert_true(!config_peers_read("Ipc", &peers) && !config_peers_read("", &peers) &&
              peers == ULTRAEP_PEERS_IPC);
  /* [wish, has windows] of two ranks, and what comes out; -1 an error found at the rank. */
  const struct {
    configPeers_t ranks[2];
    int32_t peers;
    int rank;
  } cases[] = {
      {{{ULTRAEP_PEERS_AUTO, 1}, {ULTRAEP_PEERS_AUTO, 1}}, ULTRAEP_PEERS_WINDOW, 0},
      {{{ULTRAEP_PEERS_AUTO, 0}, {ULTRAEP_PEERS_AUTO, 0}}, ULTRAEP_PEERS_IPC, 0},
      {{{ULTRAEP_PEERS_AUTO, 1}, {ULTRAEP_PEERS_AUTO, 0}}, ULTRAEP_PEERS_IPC, 0},
      {{{ULTRAEP_PEERS_AUTO, 1}, {ULTRAEP_PEERS_IPC, 1}}, ULTRAEP_PEERS_IPC, 0},
      {{{ULTRAEP_PEERS_IPC, 0}, {ULTRAEP_PEERS_IPC, 1}}, ULTRAEP_PEERS_IPC, 0},
      {{{ULTRAEP_PEERS_WINDOW, 1}, {ULTRAEP_PEERS_AUTO, 1}}, ULTRAEP_PEERS_WINDOW, 0},
      {{{ULTRAEP_PEERS_WINDOW, 1}, {ULTRAEP_PEERS_IPC, 1}}, -1, 1},
      {{{ULTRAEP_PEERS_WINDOW, 1}, {ULTRAEP_PEERS_AUTO, 0}}, -1, 1},
      {{{ULTRAEP_PEERS_WINDOW, 0}, {ULTRAEP_PEERS_WINDOW, 0}}, -1, 0},
  };
  for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
    int rank = 77;
    peers = 77;
    const char *flaw = config_peers_choose(cases[i].ranks, 2, &peers, &rank);
    if (cases[i].peers < 0)
      assert_true(flaw && peers == 77 && rank == cases[i].rank);
    else
      assert_true(!flaw && peers == cases[i].peers);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_config_header),     cmocka_unit_test(test_config_ranges),
      cmocka_unit_test(test_config_cost),       cmocka_unit_test(test_config_gate),
      cmocka_unit_test(test_group_gate),        cmocka_unit_test(test_config_rows),
      cmocka_unit_test(test_gate_limit),        cmocka_unit_test(test_config_dispatch_mode),
      cmocka_unit_test(test_config_difference), cmocka_unit_test(test_config_peers),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
