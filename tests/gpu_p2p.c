/* The kernel of sends and receives: random groups on 2, 4 and 8 ranks against what must arrive, byte for
 * byte, with everything around it untouched; replayed graphs; sizes that differ; ranks that do not come. */
#include "gpu_p2p_case.h"
#include "planner_common.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "gpu_common.h"

/* Of a rank, to send from and to receive into; where emulated, it is slow. */
#define ARENA ((size_t)(GPU_PATIENCE > 1 ? 6 : 24) << 20)
#define MOST 2048 /* transfers of a group */

typedef struct {
  p2pWorld_t world;
  unsigned char *send[P2P_MAX_RANKS], *recv[P2P_MAX_RANKS]; /* device */
  unsigned char *source, *expected, *actual;                /* host [ARENA] */
  size_t used[2][P2P_MAX_RANKS];
  p2pTransfer_t transfers[MOST];
  int n;
} p2pTest_t;

static p2pTest_t test;
static int nGroups = 70; /* for each number of ranks */

static void test_begin(int nRanks, int nBlocks, uint64_t stageBytes, int nStages, uint64_t eager,
                       bool portable) {
  const char *flaw = p2p_world_make(&test.world, nRanks, nBlocks, stageBytes, nStages, eager, portable);
  if (flaw) fail_msg("%s", flaw);
  for (int r = 0; r < nRanks; r++) {
    GPU_OK(p2p_use(r));
    GPU_OK(cudaMalloc((void **)&test.send[r], ARENA));
    GPU_OK(cudaMalloc((void **)&test.recv[r], ARENA));
  }
  test.source = malloc(ARENA);
  test.expected = malloc(ARENA * (size_t)nRanks);
  test.actual = malloc(ARENA);
  assert_true(test.source && test.expected && test.actual);
}

static void test_end(void) {
  for (int r = 0; r < test.world.nRanks; r++) {
    GPU_OK(p2p_use(r));
    GPU_OK(cudaFree(test.send[r]));
    GPU_OK(cudaFree(test.recv[r]));
  }
  p2p_world_free(&test.world);
  free(test.source);
  free(test.expected);
  free(test.actual);
}

/* Room in an arena, at an odd place, with some bytes around it. */
static void *test_room(planner_random_t *random, int isRecv, int rank, uint64_t bytes) {
  size_t at = test.used[isRecv][rank] + 64 + (size_t)planner_random_below(random, 3);
  at = planner_random_below(random, 2) ? (at + 15) / 16 * 16 : at + (size_t)planner_random_below(random, 16);
  if (at + bytes + 64 > ARENA) return NULL;
  test.used[isRecv][rank] = at + bytes;
  return (isRecv ? test.recv : test.send)[rank] + at;
}

static uint64_t test_bytes(planner_random_t *random) {
  switch (planner_random_below(random, 7)) {
  case 0:
    return 0;
  case 6: /* about what still goes as packets */
    return KERNEL_P2P_MOST_PACKETED - 9 + (uint64_t)planner_random_below(random, 18);
  case 1:
    return (uint64_t)planner_random_below(random, 64);
  case 2:
    return (uint64_t)planner_random_below(random, 5000);
  case 3:
    return (uint64_t)planner_random_below(random, 200000);
  case 4:
    return 16 * (uint64_t)planner_random_below(random, 20000);
  default:
    return planner_random_below(random, 8) ? 65536 : (uint64_t)planner_random_below(random, 3000000);
  }
}

static void test_add(planner_random_t *random, int from, int to, uint64_t bytes, bool isMapped) {
  if (test.n == MOST) return;
  size_t used = test.used[0][from];
  void *send = test_room(random, 0, from, bytes), *recv = send ? test_room(random, 1, to, bytes) : NULL;
  if (!recv) {
    test.used[0][from] = used;
    return;
  }
  test.transfers[test.n++] = (p2pTransfer_t){from, to, send, recv, bytes, bytes, isMapped};
}

static void test_draw(planner_random_t *random) {
  int nRanks = test.world.nRanks, kind = planner_random_below(random, 8);
  test.n = 0;
  memset(test.used, 0, sizeof(test.used));
  if (kind == 7) { /* very many of one rank's */
    for (int i = 0; i < 300; i++)
      test_add(random, 0, planner_random_below(random, nRanks), (uint64_t)planner_random_below(random, 30000),
               planner_random_below(random, 2));
    return;
  }
  for (int from = 0; from < nRanks; from++)
    for (int to = 0; to < nRanks; to++) {
      int n = kind == 0 ? 1 : planner_random_below(random, kind == 1 ? 4 : 2);
      if (kind == 2 && to != 0) n = 0;
      for (int i = 0; i < n; i++)
        test_add(random, from, to, kind == 3 ? (uint64_t)planner_random_below(random, 9) : test_bytes(random),
                 planner_random_below(random, 3) > 0);
    }
}

static void test_fill(planner_random_t *random) {
  int nRanks = test.world.nRanks;
  for (size_t i = 0; i < ARENA * (size_t)nRanks; i++) test.expected[i] = 0xa5;
  for (int r = 0; r < nRanks; r++) {
    for (size_t i = 0; i < ARENA; i += 8) {
      uint64_t word = planner_random_next(random);
      memcpy(test.source + i, &word, 8);
    }
    GPU_OK(p2p_use(r));
    GPU_OK(cudaMemcpy(test.send[r], test.source, ARENA, cudaMemcpyHostToDevice));
    GPU_OK(cudaMemset(test.recv[r], 0xa5, ARENA));
    for (int i = 0; i < test.n; i++) {
      const p2pTransfer_t *t = &test.transfers[i];
      if (t->from != r) continue;
      memcpy(test.expected + (size_t)t->to * ARENA + ((unsigned char *)t->recv - test.recv[t->to]),
             test.source + ((unsigned char *)t->send - test.send[r]),
             t->sendBytes < t->recvBytes ? t->sendBytes : t->recvBytes);
    }
  }
  GPU_OK(p2p_synchronize(&test.world));
}

static void test_check(const char *what) {
  for (int r = 0; r < test.world.nRanks; r++) {
    const kernelP2pFailure_t *failure = test.world.ranks[r].failure;
    if (failure->code != 0)
      fail_msg("%s: rank %d failed: %d, peer %d", what, r, failure->code, failure->peer);
    GPU_OK(p2p_use(r));
    GPU_OK(cudaMemcpy(test.actual, test.recv[r], ARENA, cudaMemcpyDeviceToHost));
    const unsigned char *expected = test.expected + (size_t)r * ARENA;
    if (memcmp(test.actual, expected, ARENA) == 0) continue;
    size_t i = 0;
    while (test.actual[i] == expected[i]) i++;
    for (int j = 0; j < test.n; j++) {
      const p2pTransfer_t *t = &test.transfers[j];
      size_t at = t->to == r ? (size_t)((unsigned char *)t->recv - test.recv[r]) : ARENA;
      if (i + 64 >= at && i < at + t->recvBytes + 64)
        print_message("near: %d -> %d, %llu bytes at %zu, mapped %d\n", t->from, t->to,
                      (unsigned long long)t->recvBytes, at, t->isMapped);
    }
    fail_msg("%s: rank %d, byte %zu: 0x%02x instead of 0x%02x", what, r, i, test.actual[i], expected[i]);
  }
}

static void test_stuck(const char *what) {
  for (int r = 0; r < test.world.nRanks; r++) test.world.ranks[r].failure->abort = 1;
  bool ended = p2p_wait(&test.world, 10);
  fail_msg("%s: the kernels did not end%s", what, ended ? ", but for an abort" : "");
}

static void check_random(int nRanks) {
  static const int blocks[] = {1, 2, 4, 16};
  planner_random_t random = {(uint64_t)nRanks * 31 + 5};
  for (int world = 0; world < 5; world++) {
    bool portable = world == 4;
    uint64_t stageBytes = (uint64_t)1024 << planner_random_below(&random, 7);
    int nBlocks = blocks[portable ? 2 : world], nStages = 1 << planner_random_below(&random, 4);
    uint64_t eager = planner_random_below(&random, 3) ? stageBytes / 2 : 0;
    test_begin(nRanks, nBlocks, stageBytes, nStages, eager, portable);
    for (int i = 0; i < (nGroups + 4) / 5; i++) {
      char what[160];
      test_draw(&random);
      snprintf(what, sizeof(what), "%d ranks, %d blocks, %d stages of %llu, eager %llu, %s, group %d of %d",
               nRanks, nBlocks, nStages, (unsigned long long)stageBytes, (unsigned long long)eager,
               portable ? "portable" : "bulk", i, test.n);
      test_fill(&random);
      if (!p2p_groups_make(&test.world, test.transfers, test.n)) continue;
      GPU_OK(p2p_launch(&test.world, ~0u));
      if (!p2p_wait(&test.world, 15)) test_stuck(what);
      test_check(what);
    }
    test_end();
  }
  print_message("%d groups on %d ranks\n", 5 * ((nGroups + 4) / 5), nRanks);
}

static void test_two(void **state) {
  (void)state;
  check_random(2);
}
static void test_four(void **state) {
  (void)state;
  check_random(4);
}
static void test_eight(void **state) {
  (void)state;
  check_random(8);
}

/* The same graph of two groups again and again; what is sent changes now and then. */
static void test_graphs(void **state) {
  (void)state;
  planner_random_t random = {17};
  cudaGraphExec_t graphs[4];
  test_begin(4, 4, 65536, 4, 32768, false);
  do test_draw(&random);
  while (test.n < 6 || test.n > 90);
  assert_true(p2p_groups_make(&test.world, test.transfers, test.n));
  for (int r = 0; r < 4; r++) {
    p2pRank_t *rank = &test.world.ranks[r];
    cudaGraph_t graph;
    GPU_OK(p2p_use(r));
    GPU_OK(cudaStreamBeginCapture(rank->stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < 2; i++) GPU_OK((cudaError_t)kernelP2pLaunch(&rank->p2p, &rank->group, rank->stream));
    GPU_OK(cudaStreamEndCapture(rank->stream, &graph));
    GPU_OK(cudaGraphInstantiate(&graphs[r], graph, 0));
    GPU_OK(cudaGraphDestroy(graph));
    GPU_OK(cudaGraphUpload(graphs[r], rank->stream));
  }
  for (int round = 0; round < 5; round++) {
    test_fill(&random);
    for (int i = 0; i < 40; i++)
      for (int r = 0; r < 4; r++) {
        GPU_OK(p2p_use(r));
        GPU_OK(cudaGraphLaunch(graphs[r], test.world.ranks[r].stream));
      }
    if (!p2p_wait(&test.world, 30)) test_stuck("graphs");
    test_check("graphs");
  }
  for (int r = 0; r < 4; r++) GPU_OK(cudaGraphExecDestroy(graphs[r]));
  test_end();
}

/* ---- what goes wrong ---- */

/* The smaller size is copied, all else goes on, and the receiver says so. */
static void test_sizes(void **state) {
  (void)state;
  static const uint64_t sizes[][2] = {{100, 7},     {7, 100},         {300000, 90},
                                      {90, 300000}, {300000, 200000}, {0, 5}};
  for (size_t i = 0; i < 2 * sizeof(sizes) / sizeof(sizes[0]); i++) {
    planner_random_t random = {i};
    const uint64_t *size = sizes[i / 2];
    test_begin(2, 2, 16384, 4, 8192, false);
    test.n = 0;
    memset(test.used, 0, sizeof(test.used));
    test_add(&random, 0, 1, 400000, i % 2);
    test_add(&random, 0, 1, 5000, true);
    test_add(&random, 1, 0, 100000, false);
    test.transfers[0].sendBytes = size[0];
    test.transfers[0].recvBytes = size[1];
    for (int round = 0; round < (GPU_PATIENCE > 1 ? 1 : 2); round++) { /* where emulated, it is slow */
      test_fill(&random);
      assert_true(p2p_groups_make(&test.world, test.transfers, test.n));
      GPU_OK(p2p_launch(&test.world, ~0u));
      if (!p2p_wait(&test.world, 10)) test_stuck("sizes");
      kernelP2pFailure_t *failure = test.world.ranks[1].failure;
      assert_int_equal(failure->code, 5); /* ultraepInvalidUsage */
      assert_true(failure->peer == 0 && failure->sent == size[0] && failure->expected == size[1]);
      memset(failure, 0, sizeof(*failure));
      test_check("sizes");
    }
    test_end();
  }
}

typedef enum { MISSING_TIMEOUT, MISSING_ABORT, MISSING_GONE } missing_t;

/* Rank 2 of 3 never comes; afterwards every kernel ends at once. */
static void check_missing(missing_t how, uint64_t bytes, bool isMapped) {
  planner_random_t random = {3};
  test_begin(3, 4, 16384, 2, 8192, false);
  for (int r = 0; r < 3; r++)
    test.world.ranks[r].p2p.timeoutNs = how == MISSING_TIMEOUT ? 300000000u * GPU_PATIENCE : 0;
  test.n = 0;
  memset(test.used, 0, sizeof(test.used));
  for (int from = 0; from < 3; from++)
    for (int to = 0; to < 3; to++) test_add(&random, from, to, bytes, isMapped);
  test_fill(&random);
  assert_true(p2p_groups_make(&test.world, test.transfers, test.n));
  GPU_OK(p2p_launch(&test.world, 3));
  if (how != MISSING_TIMEOUT) assert_false(p2p_wait(&test.world, 0.1));
  for (int r = 0; r < 2 && how == MISSING_ABORT; r++) test.world.ranks[r].failure->abort = 1;
  p2pRank_t *missing = &test.world.ranks[2];
  GPU_OK(p2p_use(2));
  if (how == MISSING_GONE) GPU_OK((cudaError_t)kernelP2pLeave(&missing->p2p, missing->stream));
  if (!p2p_wait(&test.world, 10)) test_stuck("missing");
  for (int r = 0; r < 2; r++) {
    const kernelP2pFailure_t *failure = test.world.ranks[r].failure;
    assert_int_equal(failure->code, how == MISSING_TIMEOUT ? 8 : 6);
    assert_int_equal(failure->peer, how == MISSING_ABORT ? r : 2);
  }
  GPU_OK(p2p_launch(&test.world, 3));
  if (!p2p_wait(&test.world, 5)) test_stuck("after a failure");
  test_end();
}

static void test_missing(void **state) {
  (void)state;
  for (int how = MISSING_TIMEOUT; how <= MISSING_GONE; how++) {
    check_missing((missing_t)how, 1000, false);
    check_missing((missing_t)how, 500000, false);
    check_missing((missing_t)how, 500000, true);
  }
}

/* Optional arguments: random groups for each number of ranks (fewer under a checker), and which tests. */
int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_two),   cmocka_unit_test(test_four),
                                     cmocka_unit_test(test_eight), cmocka_unit_test(test_graphs),
                                     cmocka_unit_test(test_sizes), cmocka_unit_test(test_missing)};
  (void)setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0); /* every stream runs by itself */
  GPU_REQUIRE();
  if (argc > 1) nGroups = atoi(argv[1]);
  if (argc > 2) cmocka_set_test_filter(argv[2]);
  return cmocka_run_group_tests_name("gpu_p2p", tests, NULL, NULL);
}
