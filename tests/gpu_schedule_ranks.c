#include "gpu_schedule_ranks.h"

#include <dlfcn.h>
#include <string.h>
#include <time.h>

world_t world = {.nRounds = 12};
static struct p2p_nccl nccl;

void sees_all(bool all) {
  nccl.seesAll = all;
  p2p_nccl_set(&nccl, true);
}

void meet(void) {
  pthread_barrier_wait(&world.barrier);
}

bool stream_ends(cudaStream_t stream, int seconds) {
  for (int i = 0; i < 10000 * seconds * GPU_PATIENCE; i++) {
    if (cudaStreamQuery(stream) != cudaErrorNotReady) return true;
    nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
  }
  return false;
}

void ready(rank_t *self, void *comm) {
  int state = P2P_NCCL_IN_PROGRESS;
  for (int i = 0; i < 600000 && state == P2P_NCCL_IN_PROGRESS && !self->flaw[0]; i++) {
    CALL(self, p2p_comm_async_error(comm, &state));
    if (state == P2P_NCCL_IN_PROGRESS) nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
  }
  CHECK(self, state == 0, "the communicator's state is %d", state);
}

/* ---- exchanges ---- */

/* What a pair of ranks exchanges in a round. */
typedef struct {
  int n; /* transfers of the pair */
  size_t bytes[3], from[3], to[3];
} pair_t;

/* Every rank draws alike; offsets are the pairs' own parts of the arenas. */
static pair_t pair_draw(int nRanks, int round, int from, int to) {
  planner_random_t random = {(uint64_t)(round * 97 + from * 11 + to * 3 + nRanks)};
  size_t part = ARENA / (size_t)nRanks / 3;
  pair_t pair = {.n = planner_random_below(&random, 4)};
  if (from == to) pair.n = pair.n > 1;
  for (int i = 0; i < pair.n; i++) {
    size_t odd = planner_random_below(&random, 3) ? 0 : (size_t)planner_random_below(&random, 40);
    switch (planner_random_below(&random, 4)) {
    case 0:
      pair.bytes[i] = (size_t)planner_random_below(&random, 3) * 7;
      break;
    case 1:
      pair.bytes[i] = (size_t)planner_random_below(&random, 30000);
      break;
    default:
      pair.bytes[i] = 16 * (size_t)planner_random_below(&random, (int)(part / 16) - 8);
    }
    pair.from[i] = ((size_t)to * 3 + (size_t)i) * part + odd;
    pair.to[i] = ((size_t)from * 3 + (size_t)i) * part + (planner_random_below(&random, 4) ? odd : 0);
  }
  return pair;
}

unsigned char value(int round, int from, size_t at) {
  uint64_t x = (uint64_t)at * 0x9e3779b97f4a7c15u + (uint64_t)(round * 131 + from);
  return (unsigned char)(x >> 29);
}

void fill(rank_t *self) {
  for (size_t i = 0; i < ARENA; i++) self->host[i] = value(self->round, self->rank, i);
  CALL(self, cudaMemcpyAsync(self->send, self->host, ARENA, cudaMemcpyHostToDevice, self->streams[0]));
  CALL(self, cudaMemsetAsync(self->recv, 0x5a, ARENA, self->streams[0]));
  CALL(self, cudaStreamSynchronize(self->streams[0]));
}

void exchange(rank_t *self, void *comm, bool twoStreams) {
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

void verify(rank_t *self) {
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

void exchange_checked(rank_t *self, void *comm, bool twoStreams) {
  fill(self);
  meet();
  if (!self->flaw[0]) exchange(self, comm, twoStreams);
  if (comm) ready(self, comm); /* where NCCL has it and does not block, the group may not be enqueued yet */
  verify(self);
  meet();
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

void run(int nRanks, bool fromNccl, rankWork_t work) {
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

/* ---- the program ---- */

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

int ranks_begin(int argc, char **argv) {
  const char *blocking = getenv("NCCL_COMM_BLOCKING");
  setenv("ULTRAEP_P2P", "schedule", 0);
  gpu_share(1);
  GPU_REQUIRE();
  if (!nccl_find()) {
    printf("no NCCL 2.30 or later: skipped\n");
    return GPU_SKIP_CODE;
  }
  world.isLater = blocking && strcmp(blocking, "0") == 0;
  if (argc > 1) world.nRounds = atoi(argv[1]);
  if (argc > 2) cmocka_set_test_filter(argv[2]);
  return 0;
}
