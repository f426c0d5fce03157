/* ULTRAEP_P2P=schedule under a real NCCL: random uneven groups on one and two streams, chains of groups,
 * calls that are groups by themselves, graphs, groups that hold collectives, too, and very many operations.
 */
#include "gpu_schedule_ranks.h"

static void random_work(rank_t *self) {
  for (self->round = 0; self->round < world.nRounds; self->round++)
    exchange_checked(self, self->comm, self->round % 3 == 2);
}

static void test_random(void **state) {
  (void)state;
  for (int nRanks = 2; nRanks <= MAX_RANKS; nRanks *= 2) {
    run(nRanks, true, random_work);
    run(nRanks, false, random_work);
  }
}

/* Groups one after another without a pause, each of which sends on what the one before has received: nothing
 * may be read before it is there, or written while it is read. All ranks send the first bytes of a buffer to
 * their next, so what a part of a buffer holds in the end has begun on a rank some steps back. */
enum { CHAIN_PARTS = 5 };
static const size_t chainEnds[CHAIN_PARTS] = {64, 4000, 30000, 200000, 3000000};
typedef struct {
  int buffer, nSteps;
} chainOrigin_t;

static void chain_verify(rank_t *self, int buffer, const chainOrigin_t origins[CHAIN_PARTS]) {
  size_t at = 0;
  CALL(self, cudaMemcpyAsync(self->host, buffer ? self->recv : self->send, chainEnds[CHAIN_PARTS - 1],
                             cudaMemcpyDeviceToHost, self->streams[0]));
  CALL(self, cudaStreamSynchronize(self->streams[0]));
  for (int part = 0; part < CHAIN_PARTS; part++) {
    int from = (self->rank + self->nRanks - origins[part].nSteps % self->nRanks) % self->nRanks;
    for (; at < chainEnds[part]; at++)
      CHECK(self, self->host[at] == value(origins[part].buffer, from, at),
            "buffer %d, byte %zu is not rank %d's", buffer, at, from);
  }
}

static void chain_work(rank_t *self) {
  const int next = (self->rank + 1) % self->nRanks, previous = (self->rank + self->nRanks - 1) % self->nRanks;
  unsigned char *buffers[2] = {self->send, self->recv};
  chainOrigin_t origins[2][CHAIN_PARTS];
  planner_random_t random = {(uint64_t)self->nRanks};
  for (int buffer = 0; buffer < 2; buffer++) {
    for (size_t i = 0; i < chainEnds[CHAIN_PARTS - 1]; i++) self->host[i] = value(buffer, self->rank, i);
    CALL(self, cudaMemcpyAsync(buffers[buffer], self->host, chainEnds[CHAIN_PARTS - 1],
                               cudaMemcpyHostToDevice, self->streams[0]));
    CALL(self, cudaStreamSynchronize(self->streams[0]));
    for (int part = 0; part < CHAIN_PARTS; part++) origins[buffer][part] = (chainOrigin_t){buffer, 0};
  }
  meet();
  for (int step = 0; step < 10 * world.nRounds; step++) {
    int from = step % 2, to = 1 - from, most = planner_random_below(&random, CHAIN_PARTS);
    CALL(self, p2p_group_start());
    CALL(self, p2p_send(buffers[from], chainEnds[most], TYPE_INT8, next, self->comm, self->streams[0]));
    CALL(self, p2p_recv(buffers[to], chainEnds[most], TYPE_INT8, previous, self->comm, self->streams[0]));
    CALL(self, p2p_group_end());
    for (int part = 0; part <= most; part++) {
      origins[to][part] = origins[from][part];
      origins[to][part].nSteps++;
    }
  }
  CHECK(self, stream_ends(self->streams[0], 20), "it does not end");
  for (int buffer = 0; buffer < 2; buffer++) chain_verify(self, buffer, origins[buffer]);
}

static void test_chain(void **state) {
  (void)state;
  run(2, true, chain_work);
  run(4, false, chain_work);
}

/* All-to-all, gather, scatter and calls outside a group. */
static void whole_work(rank_t *self) {
  const size_t most = 100000;
  for (self->round = 0; self->round < 5; self->round++) {
    const size_t count = self->round == 4 ? 0 : most;
    fill(self);
    meet();
    switch (self->round) {
    case 0:
    case 4:
      CALL(self, p2p_alltoall(self->send, self->recv, count, TYPE_INT8, self->comm, self->streams[0]));
      break;
    case 1:
      CALL(self, p2p_gather(self->send, self->recv, count, TYPE_INT8, 1, self->comm, self->streams[0]));
      break;
    case 2:
      CALL(self, p2p_scatter(self->send, self->recv, count, TYPE_INT8, 1, self->comm, self->streams[0]));
      break;
    default:
      if (self->rank == 0)
        CALL(self, p2p_send(self->send, count, TYPE_INT8, 1, self->comm, self->streams[0]));
      if (self->rank == 1)
        CALL(self, p2p_recv(self->recv, count, TYPE_INT8, 0, self->comm, self->streams[0]));
    }
    CHECK(self, stream_ends(self->streams[0], 20), "round %d does not end", self->round);
    CALL(self, cudaMemcpyAsync(self->host, self->recv, ARENA, cudaMemcpyDeviceToHost, self->streams[0]));
    CALL(self, cudaStreamSynchronize(self->streams[0]));
    for (int from = 0; from < self->nRanks; from++) {
      size_t at = self->round < 2 ? (size_t)from * count : 0, source = 0;
      if (self->round == 0 || self->round == 2) source = (size_t)self->rank * count;
      if (self->round == 1 && self->rank != 1) continue;
      if (self->round == 2 && from != 1) continue;
      if (self->round == 3 && (self->rank != 1 || from != 0)) continue;
      for (size_t b = 0; b < count; b++)
        CHECK(self, self->host[at + b] == value(self->round, from, source + b), "call %d: byte %zu from %d",
              self->round, b, from);
    }
    meet();
  }
}

static void test_whole(void **state) {
  (void)state;
  run(4, true, whole_work);
}

static void graph_work(rank_t *self) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  self->round = 5;
  fill(self);
  CALL(self, cudaStreamBeginCapture(self->streams[0], cudaStreamCaptureModeThreadLocal));
  exchange(self, self->comm, false);
  exchange(self, self->comm, false);
  CALL(self, cudaStreamEndCapture(self->streams[0], &graph));
  CALL(self, cudaGraphInstantiate(&exec, graph, 0));
  CALL(self, cudaGraphUpload(exec, self->streams[0]));
  CALL(self, cudaStreamSynchronize(self->streams[0]));
  meet();
  for (int i = 0; i < (world.nRounds < 3 ? 10 : 30); i++) { /* either way, rings have gone round */
    CALL(self, cudaGraphLaunch(exec, self->streams[0]));
    if (i % 10 == 9) exchange(self, self->comm, false); /* between replays */
  }
  verify(self);
  meet();
  CALL(self, cudaGraphExecDestroy(exec));
  CALL(self, cudaGraphDestroy(graph));
}

static void test_graph(void **state) {
  (void)state;
  run(4, true, graph_work);
}

/* Groups that hold a collective of NCCL's, too, on the same communicator and stream. */
static void mixed_work(rank_t *self) {
  float *sums = NULL, mine = (float)self->rank, sum = 0;
  int expected = self->nRanks * (self->nRanks - 1) / 2;
  CALL(self, cudaMalloc((void **)&sums, 2 * sizeof(*sums)));
  /* NCCL connects at its first collective; ranks that share a process and a GPU can wait for each other then.
   */
  CALL(self, world.allReduce(sums, sums + 1, 1, 7, 0, self->comm, self->streams[0]));
  ready(self, self->comm);
  CHECK(self, stream_ends(self->streams[0], 20), "the first collective does not end");
  for (self->round = 0; self->round < 4; self->round++) {
    fill(self);
    CALL(self, cudaMemcpy(sums, &mine, sizeof(mine), cudaMemcpyHostToDevice));
    meet();
    CALL(self, p2p_group_start());
    CALL(self, world.allReduce(sums, sums + 1, 1, 7, 0, self->comm, self->streams[0]));
    exchange(self, self->comm, false);
    CALL(self, p2p_group_end());
    ready(self, self->comm);
    verify(self);
    CALL(self, cudaMemcpy(&sum, sums + 1, sizeof(sum), cudaMemcpyDeviceToHost));
    CHECK(self, sum == (float)expected, "the sum is %f", (double)sum);
    meet();
  }
  CALL(self, cudaFree(sums));
}

static void test_mixed(void **state) {
  (void)state;
  run(4, true, mixed_work);
}

/* More operations than fit the kernel's argument, captured more often than there once were places, in the
 * mode that forbids allocations. */
enum { LARGE_OPS = 5000, LARGE_BYTES = 64, LARGE_GRAPHS = 12 };

static void large_exchange(rank_t *self) {
  int next = (self->rank + 1) % self->nRanks, previous = (self->rank + self->nRanks - 1) % self->nRanks;
  CALL(self, p2p_group_start());
  for (size_t i = 0; i < LARGE_OPS; i++) {
    CALL(self,
         p2p_send(self->send + i * LARGE_BYTES, LARGE_BYTES, TYPE_INT8, next, self->comm, self->streams[0]));
    CALL(self, p2p_recv(self->recv + i * LARGE_BYTES, LARGE_BYTES, TYPE_INT8, previous, self->comm,
                        self->streams[0]));
  }
  CALL(self, p2p_group_end());
}

static void large_verify(rank_t *self) {
  int previous = (self->rank + self->nRanks - 1) % self->nRanks;
  CHECK(self, stream_ends(self->streams[0], 20), "it does not end");
  if (self->flaw[0]) return;
  CALL(self, cudaMemcpyAsync(self->host, self->recv, ARENA, cudaMemcpyDeviceToHost, self->streams[0]));
  CALL(self, cudaStreamSynchronize(self->streams[0]));
  for (size_t i = 0; i < LARGE_OPS * LARGE_BYTES; i++)
    CHECK(self, self->host[i] == value(self->round, previous, i), "byte %zu", i);
}

static void large_work(rank_t *self) {
  cudaGraphExec_t execs[LARGE_GRAPHS] = {0};
  self->round = 3;
  fill(self);
  meet();
  large_exchange(self);
  large_verify(self);
  for (int i = 0; i < 2 * LARGE_GRAPHS; i++) {
    cudaGraphExec_t *exec = &execs[i % LARGE_GRAPHS];
    cudaGraph_t graph;
    if (*exec) CALL(self, cudaGraphExecDestroy(*exec)); /* its place is free again */
    CALL(self, cudaStreamBeginCapture(self->streams[0], cudaStreamCaptureModeThreadLocal));
    large_exchange(self);
    CALL(self, cudaStreamEndCapture(self->streams[0], &graph));
    CALL(self, cudaGraphInstantiate(exec, graph, 0));
    CALL(self, cudaGraphDestroy(graph));
  }
  meet();
  for (int i = 0; i < LARGE_GRAPHS && !self->flaw[0]; i++) {
    CALL(self, cudaGraphLaunch(execs[i], self->streams[0]));
    large_exchange(self);
  }
  large_verify(self);
  meet();
  for (int i = 0; i < LARGE_GRAPHS; i++)
    if (execs[i]) CALL(self, cudaGraphExecDestroy(execs[i]));
}

static void test_large(void **state) {
  (void)state;
  run(2, true, large_work);
}

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_random), cmocka_unit_test(test_chain),
                                     cmocka_unit_test(test_whole),  cmocka_unit_test(test_graph),
                                     cmocka_unit_test(test_mixed),  cmocka_unit_test(test_large)};
  int status = ranks_begin(argc, argv);
  return status != 0 ? status : cmocka_run_group_tests_name("gpu_schedule", tests, NULL, NULL);
}
