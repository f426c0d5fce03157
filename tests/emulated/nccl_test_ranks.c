#include "nccl_test.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

struct ncclTestWorld world;

void meet(void) {
  pthread_barrier_wait(&world.barrier);
}

void sleep_ms(int ms) {
  nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L}, NULL);
}

int settle(const ncclComm_t *comm, int result) {
  for (int i = 0; i < 20000 && (result == SUCCESS || result == IN_PROGRESS); i++) {
    int asked = ncclCommGetAsyncError(*comm, &result);
    if (asked != SUCCESS) return asked;
    if (result != IN_PROGRESS) return result;
    sleep_ms(1);
  }
  return result;
}

void sync_all(rank_t *self) {
  for (int i = 0; i < STREAMS; i++) CALL(self, cudaStreamSynchronize(self->streams[i]));
}

static void *rank_run(void *argument) {
  rank_t *self = argument;
  CALL(self, cudaSetDevice(0));
  for (int i = 0; i < STREAMS; i++)
    CALL(self, cudaStreamCreateWithFlags(&self->streams[i], cudaStreamNonBlocking));
  CALL(self, ncclMemAlloc((void **)&self->send, ARENA));
  CALL(self, ncclMemAlloc((void **)&self->recv, ARENA));
  meet();
  CALL(self, settle(&self->comm, ncclCommInitRank(&self->comm, self->nRanks, world.id, self->rank)));
  meet();
  world.work(self);
  sync_all(self);
  meet();
  if (self->comm) CALL(self, ncclCommDestroy(self->comm));
  for (int i = 0; i < STREAMS; i++) CALL(self, cudaStreamDestroy(self->streams[i]));
  CALL(self, ncclMemFree(self->send));
  CALL(self, ncclMemFree(self->recv));
  return NULL;
}

void run(int nRanks, rankWork_t work) {
  pthread_t threads[MAX_RANKS];
  memset(world.ranks, 0, sizeof(world.ranks));
  world.work = work;
  assert_int_equal(ncclGetUniqueId(&world.id), SUCCESS);
  assert_int_equal(pthread_barrier_init(&world.barrier, NULL, (unsigned)nRanks), 0);
  for (int r = 0; r < nRanks; r++) {
    world.ranks[r].nRanks = nRanks;
    world.ranks[r].rank = r;
    assert_int_equal(pthread_create(&threads[r], NULL, rank_run, &world.ranks[r]), 0);
  }
  for (int r = 0; r < nRanks; r++) pthread_join(threads[r], NULL);
  pthread_barrier_destroy(&world.barrier);
  for (int r = 0; r < nRanks; r++)
    if (world.ranks[r].flaw[0]) fail_msg("%d ranks, rank %d: %s", nRanks, r, world.ranks[r].flaw);
}

int unset(void **state) {
  (void)state;
  unsetenv("NCCL_COMM_BLOCKING");
  unsetenv("EMULATED_NCCL_WINDOWS");
  return 0;
}

unsigned char value(int from, int round, size_t at) {
  uint64_t x = (uint64_t)(at + 1) * 0x9e3779b97f4a7c15u + (uint64_t)(from * 131 + round * 7);
  return (unsigned char)(x >> 13);
}

void fill(rank_t *self, int round) {
  for (size_t i = 0; i < ARENA; i++) self->send[i] = value(self->rank, round, i);
  memset(self->recv, 0x5a, ARENA);
}

void expect(rank_t *self, int round, size_t at, int from, size_t fromAt, size_t bytes) {
  for (size_t i = 0; i < bytes; i++)
    CHECK(self, self->recv[at + i] == value(from, round, fromAt + i), "round %d: byte %zu of %zu from %d",
          round, i, bytes, from);
}

void expect_untouched(rank_t *self, size_t at, size_t bytes) {
  for (size_t i = at; i < at + bytes; i++) CHECK(self, self->recv[i] == 0x5a, "byte %zu was written", i);
}

void use(rank_t *self, ncclComm_t comm, cudaStream_t stream) {
  int nRanks = 0, rank = -1;
  int32_t sum = 0, all[MAX_RANKS] = {0};
  CALL(self, ncclCommCount(comm, &nRanks));
  CALL(self, ncclCommUserRank(comm, &rank));
  CALL(self, settle(&comm, ncclAllGather(&rank, all, 1, INT32, comm, stream)));
  CALL(self, settle(&comm, ncclAllReduce(&rank, &sum, 1, INT32, SUM, comm, stream)));
  CALL(self, cudaStreamSynchronize(stream));
  for (int r = 0; r < nRanks; r++) CHECK(self, all[r] == r, "rank %d's part is %d", r, all[r]);
  CHECK(self, sum == nRanks * (nRanks - 1) / 2, "the sum is %d", sum);
}

/* Any rank can tell how much goes from one to another: some nothing, up to three times. */
static size_t pair_bytes(int round, int from, int to, int i) {
  unsigned x = (unsigned)(round * 977 + from * 131 + to * 17 + i * 7) * 2654435761u >> 16;
  if (x % 3 == 0 && i > 0) return SIZE_MAX; /* no transfer */
  return x % 5 == 0 ? 0 : x % 9000;
}

static size_t pair_place(const rank_t *self, int peer, int i) {
  return ((size_t)peer * 3 + (size_t)i) * (ARENA / (size_t)self->nRanks / 3);
}

void exchange(rank_t *self, int round, bool twoStreams) {
  CALL(self, ncclGroupStart());
  for (int k = 0; k < self->nRanks; k++)
    for (int i = 0; i < 3; i++) {
      int peer = (k * (self->rank % 2 ? 1 : self->nRanks - 1) + self->rank) % self->nRanks;
      size_t out = pair_bytes(round, self->rank, peer, i), in = pair_bytes(round, peer, self->rank, i);
      cudaStream_t stream = self->streams[twoStreams && i == 1];
      if (out != SIZE_MAX)
        CALL(self, ncclSend(self->send + pair_place(self, peer, i), out, INT8, peer, self->comm, stream));
      if (in != SIZE_MAX)
        CALL(self, ncclRecv(self->recv + pair_place(self, peer, i), in, INT8, peer, self->comm, stream));
    }
  CALL(self, ncclGroupEnd());
}

void check_exchange(rank_t *self, int round) {
  for (int peer = 0; peer < self->nRanks; peer++)
    for (int i = 0; i < 3; i++) {
      size_t in = pair_bytes(round, peer, self->rank, i), at = pair_place(self, peer, i);
      size_t room = ARENA / (size_t)self->nRanks / 3;
      if (in == SIZE_MAX) in = 0;
      expect(self, round, at, peer, pair_place(self, self->rank, i), in);
      expect_untouched(self, at + in, room - in);
    }
}

ncclWindow_t window_open(rank_t *self, void *buffer, size_t bytes) {
  ncclWindow_t window = NULL;
  CALL(self, settle(&self->comm, ncclCommWindowRegister(self->comm, buffer, bytes, &window, 1)));
  return window;
}

void window_work(rank_t *self) {
  void *ptr = NULL;
  size_t bytes = ARENA / 2 + 4096 * (size_t)self->rank;
  ncclWindow_t window, unused;
  self->recv[4096 + 12] = (unsigned char)(self->rank + 1);
  window = window_open(self, self->recv + 4096, bytes);
  CHECK(self, window, "there is no window");
  for (int peer = 0; peer < self->nRanks && window; peer++) {
    CALL(self, ncclGetPeerDevicePointer(window, 12, peer, &ptr));
    CHECK(self, *(const unsigned char *)ptr == peer + 1, "it is not rank %d's memory", peer);
    size_t end = ARENA / 2 + 4096 * (size_t)peer;
    CALL_IS(self, ncclGetPeerDevicePointer(window, end - 1, peer, &ptr), SUCCESS);
    CALL_IS(self, ncclGetPeerDevicePointer(window, end, peer, &ptr), INVALID_ARGUMENT);
  }
  CALL_IS(self, ncclGetPeerDevicePointer(window, 0, self->nRanks, &ptr), INVALID_ARGUMENT);
  CALL_IS(self, ncclGetPeerDevicePointer(NULL, 0, 0, &ptr), INVALID_ARGUMENT);
  CALL_IS(self, ncclCommWindowRegister(self->comm, self->recv + 16, 16, &unused, 1), INVALID_ARGUMENT);
  CALL_IS(self, ncclCommWindowRegister(self->comm, NULL, 16, &unused, 1), INVALID_ARGUMENT);
  CALL(self, ncclCommWindowDeregister(self->comm, window));
  CALL_IS(self, ncclCommWindowDeregister(self->comm, window), INVALID_ARGUMENT);
  CALL_IS(self, ncclGetPeerDevicePointer(window, 0, 0, &ptr), INVALID_ARGUMENT);
  /* One that the communicator's end takes along. */
  (void)window_open(self, self->send, 4096);
}
