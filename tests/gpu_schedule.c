/* ULTRAEP_P2P=schedule under a real NCCL: ranks are threads on the machine's GPUs in turn, and call NCCL's
 * functions as the takeover would lead them: through p2p.h, with the loaded NCCL's as originals. Random
 * uneven groups on one and two streams, several communicators, split and grown ones, groups that hold
 * collectives, too, graphs, ends with and without abort. With NCCL_COMM_BLOCKING=0 the communicators are
 * ready later. */
#include "gpu_schedule_pairs.h"
#include "p2p.h"
#include "schedule.h"
#include "ultraep.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "gpu_common.h"

#define MAX_RANKS 8
#define TYPE_INT8 0

typedef struct {
  int nRanks, rank, round;
  void *comm;
  cudaStream_t streams[2];
  unsigned char *send, *recv; /* device [ARENA] */
  unsigned char *host;        /* [ARENA] */
  char flaw[256];
} rank_t;

typedef void (*rankWork_t)(rank_t *self);

static struct {
  p2p_unique_id_t id;
  pthread_barrier_t barrier;
  rankWork_t work;
  int (*getUniqueId)(p2p_unique_id_t *id);
  int (*memAlloc)(void **ptr, size_t bytes);
  int (*memFree)(void *ptr);
  int (*commGetUniqueId)(void *comm, p2p_unique_id_t *id); /* null: communicators do not grow */
  int (*allReduce)(const void *send, void *recv, size_t count, int type, int op, void *comm,
                   cudaStream_t stream);
  bool isLater;  /* NCCL_COMM_BLOCKING=0 */
  bool fromNccl; /* buffers are ncclMemAlloc's, which peers map */
} world;

#define CHECK(self, condition, ...)                                                                          \
  do {                                                                                                       \
    if (!(self)->flaw[0] && !(condition)) snprintf((self)->flaw, sizeof((self)->flaw), __VA_ARGS__);         \
  } while (0)
#define CALL(self, call)                                                                                     \
  do {                                                                                                       \
    int callResult = (call);                                                                                 \
    CHECK(self, callResult == 0 || (world.isLater && callResult == P2P_NCCL_IN_PROGRESS),                    \
          "line %d: %s is %d (%s)", __LINE__, #call, callResult, ultraepGetLastError());                     \
  } while (0)

static struct p2p_nccl nccl;

static void sees_all(bool all) {
  nccl.seesAll = all;
  p2p_nccl_set(&nccl, true);
}

static void meet(void) {
  pthread_barrier_wait(&world.barrier);
}

/* A test may wait for a rank that is gone: seconds, not for ever. */
static bool stream_ends(cudaStream_t stream, int seconds) {
  for (int i = 0; i < 10000 * seconds * GPU_PATIENCE; i++) {
    if (cudaStreamQuery(stream) != cudaErrorNotReady) return true;
    nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
  }
  return false;
}

/* The communicator, or what was asked of it, is there. */
static void ready(rank_t *self, void *comm) {
  int state = P2P_NCCL_IN_PROGRESS;
  for (int i = 0; i < 600000 && state == P2P_NCCL_IN_PROGRESS && !self->flaw[0]; i++) {
    CALL(self, p2p_comm_async_error(comm, &state));
    if (state == P2P_NCCL_IN_PROGRESS) nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
  }
  CHECK(self, state == 0, "the communicator's state is %d", state);
}

/* ---- exchanges ---- */

static void fill(rank_t *self) {
  for (size_t i = 0; i < ARENA; i++) self->host[i] = value(self->round, self->rank, i);
  CALL(self, cudaMemcpyAsync(self->send, self->host, ARENA, cudaMemcpyHostToDevice, self->streams[0]));
  CALL(self, cudaMemsetAsync(self->recv, 0x5a, ARENA, self->streams[0]));
  CALL(self, cudaStreamSynchronize(self->streams[0]));
}

static void exchange(rank_t *self, void *comm, bool twoStreams) {
  CALL(self, p2p_group_start());
  for (int peer = 0; peer < self->nRanks; peer++) {
    pair_t out = pair_draw(self->nRanks, self->round, self->rank, peer);
    pair_t in = pair_draw(self->nRanks, self->round, peer, self->rank);
    for (int i = 0; i < 3; i++) {
      cudaStream_t stream = self->streams[twoStreams && i == 1];
      if (i < out.n)
        CALL(self, p2p_send(self->send + out.from[i], out.bytes[i], TYPE_INT8, peer, comm, stream));
      if (i < in.n) CALL(self, p2p_recv(self->recv + in.to[i], in.bytes[i], TYPE_INT8, peer, comm, stream));
    }
  }
  CALL(self, p2p_group_end());
}

static void verify(rank_t *self) {
  CHECK(self, stream_ends(self->streams[0], 20) && stream_ends(self->streams[1], 20), "round %d does not end",
        self->round);
  if (self->flaw[0]) return;
  int error = 0;
  CALL(self, p2p_comm_async_error(self->comm, &error));
  CHECK(self, error == 0, "asynchronous error %d", error);
  CALL(self, cudaMemcpyAsync(self->host, self->recv, ARENA, cudaMemcpyDeviceToHost, self->streams[0]));
  CALL(self, cudaStreamSynchronize(self->streams[0]));
  size_t next = 0;
  for (int peer = 0; peer < self->nRanks; peer++) {
    pair_t in = pair_draw(self->nRanks, self->round, peer, self->rank);
    for (int i = 0; i < in.n; i++) {
      for (; next < in.to[i]; next++)
        CHECK(self, self->host[next] == 0x5a, "round %d: byte %zu was written", self->round, next);
      for (size_t b = 0; b < in.bytes[i]; b++, next++)
        CHECK(self, self->host[next] == value(self->round, peer, in.from[i] + b),
              "round %d: byte %zu of %zu, transfer %d from %d: 0x%02x", self->round, b, in.bytes[i], i, peer,
              self->host[next]);
    }
  }
}

/* ---- ranks ---- */

static void rank_open(rank_t *self) {
  int nDevices = 1;
  CALL(self, cudaGetDeviceCount(&nDevices));
  CALL(self, cudaSetDevice(self->rank % nDevices));
  for (int i = 0; i < 2; i++) CALL(self, cudaStreamCreateWithFlags(&self->streams[i], cudaStreamNonBlocking));
  self->host = malloc(ARENA);
  CHECK(self, self->host, "no memory");
  if (world.fromNccl) {
    CALL(self, world.memAlloc((void **)&self->send, ARENA));
    CALL(self, world.memAlloc((void **)&self->recv, ARENA));
  } else {
    CALL(self, cudaMalloc((void **)&self->send, ARENA));
    CALL(self, cudaMalloc((void **)&self->recv, ARENA));
  }
  meet();
  if (world.isLater)
    CALL(self, p2p_comm_init_rank_config(&self->comm, self->nRanks, world.id, self->rank, NULL));
  else
    CALL(self, p2p_comm_init_rank(&self->comm, self->nRanks, world.id, self->rank));
  ready(self, self->comm);
  CHECK(self, schedule_is_scheduled(self->comm), "the communicator is not scheduled: %s",
        ultraepGetLastError());
}

static void rank_close(rank_t *self) {
  if (self->comm) CALL(self, p2p_comm_destroy(self->comm));
  meet();
  for (int i = 0; i < 2; i++) CALL(self, cudaStreamDestroy(self->streams[i]));
  free(self->host);
  if (world.fromNccl) {
    CALL(self, world.memFree(self->send));
    CALL(self, world.memFree(self->recv));
  } else {
    CALL(self, cudaFree(self->send));
    CALL(self, cudaFree(self->recv));
  }
}

static void *rank_run(void *argument) {
  rank_t *self = argument;
  rank_open(self);
  meet();
  world.work(self);
  meet();
  rank_close(self);
  return NULL;
}

static void run(int nRanks, bool fromNccl, rankWork_t work) {
  pthread_t threads[MAX_RANKS];
  rank_t ranks[MAX_RANKS];
  memset(ranks, 0, sizeof(ranks));
  world.work = work;
  world.fromNccl = fromNccl;
  assert_int_equal(world.getUniqueId(&world.id), 0);
  pthread_barrier_init(&world.barrier, NULL, (unsigned)nRanks);
  for (int r = 0; r < nRanks; r++) {
    ranks[r].nRanks = nRanks;
    ranks[r].rank = r;
    assert_int_equal(pthread_create(&threads[r], NULL, rank_run, &ranks[r]), 0);
  }
  for (int r = 0; r < nRanks; r++) pthread_join(threads[r], NULL);
  pthread_barrier_destroy(&world.barrier);
  for (int r = 0; r < nRanks; r++)
    if (ranks[r].flaw[0]) fail_msg("%d ranks, rank %d: %s", nRanks, r, ranks[r].flaw);
}

static int nRounds = 12;

static void random_work(rank_t *self) {
  for (self->round = 0; self->round < nRounds; self->round++) {
    fill(self);
    meet();
    exchange(self, self->comm, self->round % 3 == 2);
    verify(self);
    meet();
  }
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
  for (int step = 0; step < 10 * nRounds; step++) {
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
  for (int i = 0; i < (nRounds < 3 ? 10 : 30); i++) { /* either way, rings have gone round */
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

/* A communicator split off, two used in one group; a part of the ranks in another. */
static void split_work(rank_t *self) {
  void *twin = NULL, *half = NULL;
  CALL(self, p2p_comm_split(self->comm, 0, self->rank, &twin, NULL));
  ready(self, self->comm);
  CHECK(self, schedule_is_scheduled(twin), "the twin is not scheduled");
  meet();
  CALL(self, p2p_group_start());
  CALL(self, p2p_comm_split(self->comm, self->rank % 2, self->rank, &half, NULL));
  CALL(self, p2p_group_end());
  ready(self, self->comm);
  CHECK(self, schedule_is_scheduled(half), "the half is not scheduled");
  meet();
  self->round = 7;
  fill(self);
  meet();
  CALL(self, p2p_group_start());
  exchange(self, twin, false);
  CALL(self, p2p_send(self->send, 0, TYPE_INT8, self->rank / 2, half, self->streams[1]));
  CALL(self, p2p_recv(self->recv, 0, TYPE_INT8, self->rank / 2, half, self->streams[1]));
  CALL(self, p2p_group_end());
  verify(self);
  meet();
  CALL(self, p2p_comm_destroy(half));
  meet();
  CALL(self, p2p_comm_destroy(twin));
}

static void test_split(void **state) {
  (void)state;
  run(4, true, split_work);
}

/* The first half of the ranks has a communicator, which grows by the others. */
static void grow_work(rank_t *self) {
  const bool isOld = self->rank < self->nRanks / 2;
  void *old = NULL, *grown = NULL;
  CALL(self, p2p_comm_split(self->comm, isOld ? 0 : -1, self->rank, &old, NULL));
  ready(self, self->comm);
  if (self->rank == 0) CALL(self, world.commGetUniqueId(old, &world.id));
  meet();
  CALL(self,
       p2p_comm_grow(old, self->nRanks, isOld ? NULL : &world.id, isOld ? -1 : self->rank, &grown, NULL));
  if (grown) ready(self, grown);
  CHECK(self, schedule_is_scheduled(grown), "the grown communicator is not scheduled: %s",
        ultraepGetLastError());
  meet();
  self->round = 9;
  fill(self);
  meet();
  if (!self->flaw[0]) exchange(self, grown, true);
  verify(self);
  meet();
  if (grown) CALL(self, p2p_comm_destroy(grown));
  meet();
  if (old) CALL(self, p2p_comm_destroy(old));
}

static void test_grow(void **state) {
  (void)state;
  if (!world.commGetUniqueId) skip();
  sees_all(true);
  run(4, true, grow_work);
  sees_all(false);
}

/* By the call that makes the communicator a rank's NCCL may load the plugin, so that it does not pass here:
 * then no rank waits for that one, and NCCL has the communicator. */
static void unseen_work(rank_t *self) {
  static p2p_unique_id_t id;
  p2p_init_rank_fn original = (p2p_init_rank_fn)p2p_original(P2P_COMM_INIT_RANK);
  void *comm = NULL;
  if (self->rank == 0) CALL(self, world.getUniqueId(&id));
  meet();
  if (self->rank == 1) CALL(self, p2p_group_start());
  if (self->rank == 2)
    CALL(self, original(&comm, self->nRanks, id, self->rank));
  else
    CALL(self, p2p_comm_init_rank(&comm, self->nRanks, id, self->rank));
  if (self->rank == 1) CALL(self, p2p_group_end());
  ready(self, comm);
  CHECK(self, !schedule_is_scheduled(comm), "it is scheduled, though not on rank 2");
  self->round = 6;
  fill(self);
  meet();
  if (!self->flaw[0]) exchange(self, comm, false);
  verify(self);
  meet();
  if (comm) CALL(self, p2p_comm_destroy(comm));
}

static void test_unseen(void **state) {
  (void)state;
  run(4, true, unseen_work);
}

/* Rank 1 waits for the others, who leave. */
static void left_behind(rank_t *self, void *comm) {
  int error = 0;
  if (self->rank == 1) CALL(self, p2p_recv(self->recv, 1000, TYPE_INT8, 0, comm, self->streams[0]));
  meet();
  if (self->rank == 1) {
    CHECK(self, stream_ends(self->streams[0], 20), "it still waits for a rank that has left");
    CALL(self, p2p_comm_async_error(comm, &error));
    CHECK(self, error != 0 && error != P2P_NCCL_IN_PROGRESS, "nothing is said of a rank that has left");
    CALL(self, p2p_comm_abort(comm));
  } else {
    CALL(self, p2p_comm_destroy(comm));
  }
  meet();
}

/* Calls from a thread on another device, which it stays on. */
static void away_work(rank_t *self) {
  void *twin = NULL;
  int home = -1, away = -1, nDevices = 1;
  CALL(self, cudaGetDeviceCount(&nDevices));
  CALL(self, cudaGetDevice(&home));
  CALL(self, cudaSetDevice((home + 1) % nDevices));
  CALL(self, p2p_comm_split(self->comm, 0, self->rank, &twin, NULL));
  ready(self, self->comm);
  CHECK(self, schedule_is_scheduled(twin), "the twin is not scheduled: %s", ultraepGetLastError());
  for (self->round = 10; self->round < 14; self->round++) {
    fill(self);
    meet();
    exchange(self, self->round % 2 ? twin : self->comm, self->round > 11);
    verify(self);
    meet();
  }
  left_behind(self, twin);
  CALL(self, cudaGetDevice(&away));
  CHECK(self, away == (home + 1) % nDevices, "the current device is %d now", away);
  CALL(self, cudaSetDevice(home));
}

static void test_away(void **state) {
  int nDevices = 1;
  (void)state;
  GPU_OK(cudaGetDeviceCount(&nDevices));
  if (nDevices < 2) skip();
  run(4, true, away_work);
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

/* Rank 0 waits for one that does not come, and aborts. */
static void abort_work(rank_t *self) {
  if (self->rank == 0) CALL(self, p2p_recv(self->recv, 1000, TYPE_INT8, 1, self->comm, self->streams[0]));
  meet();
  if (self->rank == 0) {
    CHECK(self, !stream_ends(self->streams[0], 1), "it did not wait");
    CALL(self, p2p_comm_abort(self->comm));
    CHECK(self, stream_ends(self->streams[0], 20), "the kernel does not leave");
  }
  meet();
  if (self->rank != 0) CALL(self, p2p_comm_abort(self->comm));
  self->comm = NULL;
}

static void test_abort(void **state) {
  (void)state;
  run(2, true, abort_work);
}

/* One that no other rank joins is given up while NCCL makes it; the others are as before. */
static void early_work(rank_t *self) {
  p2p_unique_id_t id;
  void *lonely = NULL;
  int state = 0;
  self->round = 2;
  CALL(self, world.getUniqueId(&id));
  CALL(self, p2p_comm_init_rank_config(&lonely, self->nRanks, id, self->rank, NULL));
  CALL(self, p2p_comm_async_error(lonely, &state));
  CHECK(self, state == P2P_NCCL_IN_PROGRESS, "the state is %d", state);
  CHECK(self, p2p_send(self->send, 1, TYPE_INT8, 0, lonely, self->streams[0]) == P2P_NCCL_INVALID_ARGUMENT,
        "it was not refused");
  CALL(self, p2p_comm_abort(lonely));
  fill(self);
  meet();
  exchange(self, self->comm, false);
  verify(self);
}

static void test_early(void **state) {
  (void)state;
  if (!world.isLater) skip();
  run(2, true, early_work);
}

static void nothing_work(rank_t *self) {
  self->round = 1;
  fill(self);
  meet();
  exchange(self, self->comm, false);
  verify(self);
}

static void test_again(void **state) {
  size_t before = 0, after = 0, all;
  (void)state;
  for (int i = 0; i < 12; i++) {
    run(2, i % 2, nothing_work);
    if (i == 3) GPU_OK(cudaMemGetInfo(&before, &all));
  }
  GPU_OK(cudaMemGetInfo(&after, &all));
  print_message("8 communicators more: %lld bytes\n", (long long)before - (long long)after);
  assert_true(before < after + ((size_t)16 << 20));
}

static bool nccl_find(void) {
  int version = 0;
  void *library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_GLOBAL);
  int (*getVersion)(int *) = library ? (int (*)(int *))dlsym(library, "ncclGetVersion") : NULL;
  if (!getVersion || getVersion(&version) != 0 || version < 23000) return false;
  for (int call = 0; call < P2P_CALLS; call++) nccl.calls[call] = dlsym(library, p2pNames[call]);
  nccl.commCount = (p2p_ask_fn)dlsym(library, "ncclCommCount");
  nccl.commUserRank = (p2p_ask_fn)dlsym(library, "ncclCommUserRank");
  sees_all(false);
  world.getUniqueId = (int (*)(p2p_unique_id_t *))dlsym(library, "ncclGetUniqueId");
  world.memAlloc = (int (*)(void **, size_t))dlsym(library, "ncclMemAlloc");
  world.memFree = (int (*)(void *))dlsym(library, "ncclMemFree");
  world.commGetUniqueId = (int (*)(void *, p2p_unique_id_t *))dlsym(library, "ncclCommGetUniqueId");
  world.allReduce =
      (int (*)(const void *, void *, size_t, int, int, void *, cudaStream_t))dlsym(library, "ncclAllReduce");
  return world.getUniqueId && world.memAlloc && world.memFree && world.allReduce;
}

/* Optional arguments: rounds of random groups, and which tests. */
int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_random), cmocka_unit_test(test_chain), cmocka_unit_test(test_whole),
      cmocka_unit_test(test_graph),  cmocka_unit_test(test_split), cmocka_unit_test(test_grow),
      cmocka_unit_test(test_unseen), cmocka_unit_test(test_mixed), cmocka_unit_test(test_large),
      cmocka_unit_test(test_early),  cmocka_unit_test(test_abort), cmocka_unit_test(test_again),
      cmocka_unit_test(test_away)};
  const char *blocking = getenv("NCCL_COMM_BLOCKING");
  setenv("ULTRAEP_P2P", "schedule", 0);
  gpu_share(1);
  GPU_REQUIRE();
  if (!nccl_find()) {
    printf("no NCCL 2.30 or later: skipped\n");
    return GPU_SKIP_CODE;
  }
  world.isLater = blocking && strcmp(blocking, "0") == 0;
  if (argc > 1) nRounds = atoi(argv[1]);
  if (argc > 2) cmocka_set_test_filter(argv[2]);
  return cmocka_run_group_tests_name("gpu_schedule", tests, NULL, NULL);
}
