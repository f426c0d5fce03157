/* The NCCL that is not there: ranks are threads, each with streams of its own. */
#include "emulated.h"

#include <limits.h>
#include <pthread.h>
#include <semaphore.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

enum { SUCCESS, CUDA_ERROR, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, IN_PROGRESS = 7 };
enum { INT8 = 0, INT32 = 2, FLOAT = 7 };
enum { MAX_RANKS = 8, STREAMS = 2, SUM = 0 };
enum { ARENA = 1 << 18 }; /* of a rank */

typedef struct ncclComm *ncclComm_t;
typedef struct ncclWindow_vidmem *ncclWindow_t;

typedef struct {
  char bytes[128];
} ncclUniqueId_t;

typedef struct {
  size_t size;
  unsigned magic, version;
  int blocking;
  char rest[128];
} ncclConfig_t;

int ncclGetVersion(int *version);
int ncclGetUniqueId(ncclUniqueId_t *id);
int ncclCommInitRank(ncclComm_t *comm, int nRanks, ncclUniqueId_t id, int rank);
int ncclCommInitRankConfig(ncclComm_t *comm, int nRanks, ncclUniqueId_t id, int rank,
                           const ncclConfig_t *config);
int ncclCommInitAll(ncclComm_t *comms, int nDevices, const int *devices);
int ncclCommSplit(ncclComm_t comm, int colour, int key, ncclComm_t *child, const ncclConfig_t *config);
int ncclCommFinalize(ncclComm_t comm);
int ncclCommDestroy(ncclComm_t comm);
int ncclCommAbort(ncclComm_t comm);
int ncclCommCount(ncclComm_t comm, int *count);
int ncclCommUserRank(ncclComm_t comm, int *rank);
int ncclCommCuDevice(ncclComm_t comm, int *device);
int ncclCommGetAsyncError(ncclComm_t comm, int *error);
const char *ncclGetErrorString(int result);
const char *ncclGetLastError(ncclComm_t comm);
int ncclGroupStart(void);
int ncclGroupEnd(void);
int ncclSend(const void *buffer, size_t count, int type, int peer, ncclComm_t comm, cudaStream_t stream);
int ncclRecv(void *buffer, size_t count, int type, int peer, ncclComm_t comm, cudaStream_t stream);
int ncclAllGather(const void *send, void *recv, size_t count, int type, ncclComm_t comm, cudaStream_t stream);
int pncclAllGather(const void *send, void *recv, size_t count, int type, ncclComm_t comm,
                   cudaStream_t stream);
int ncclAllReduce(const void *send, void *recv, size_t count, int type, int operator, ncclComm_t comm,
                  cudaStream_t stream);
int ncclBroadcast(const void *send, void *recv, size_t count, int type, int root, ncclComm_t comm,
                  cudaStream_t stream);
int ncclAlltoAll(const void *send, void *recv, size_t count, int type, ncclComm_t comm, cudaStream_t stream);
int ncclGather(const void *send, void *recv, size_t count, int type, int root, ncclComm_t comm,
               cudaStream_t stream);
int ncclScatter(const void *send, void *recv, size_t count, int type, int root, ncclComm_t comm,
                cudaStream_t stream);
int ncclMemAlloc(void **ptr, size_t bytes);
int ncclMemFree(void *ptr);
int ncclCommWindowRegister(ncclComm_t comm, void *buffer, size_t bytes, ncclWindow_t *window, int flags);
int ncclCommWindowDeregister(ncclComm_t comm, ncclWindow_t window);
int ncclGetPeerDevicePointer(ncclWindow_t window, size_t offset, int peer, void **ptr);

/* ---- ranks ---- */

typedef struct {
  int nRanks, rank;
  ncclComm_t comm;
  cudaStream_t streams[STREAMS];
  unsigned char *send, *recv; /* [ARENA] */
  char flaw[256];
} rank_t;

typedef void (*rankWork_t)(rank_t *self);

static struct {
  ncclUniqueId_t id;
  pthread_barrier_t barrier;
  rankWork_t work;
  rank_t ranks[MAX_RANKS];
} world;

#define CHECK(self, condition, ...)                                                                          \
  do {                                                                                                       \
    if (!(self)->flaw[0] && !(condition)) snprintf((self)->flaw, sizeof((self)->flaw), __VA_ARGS__);         \
  } while (0)
#define CALL_IS(self, call, expected)                                                                        \
  do {                                                                                                       \
    int callResult = (int)(call);                                                                            \
    CHECK(self, callResult == (expected), "line %d: %s is %d: %s", __LINE__, #call, callResult,              \
          ncclGetLastError(NULL));                                                                           \
  } while (0)
#define CALL(self, call) CALL_IS(self, call, SUCCESS)

static void meet(void) {
  pthread_barrier_wait(&world.barrier);
}

static void sleep_ms(int ms) {
  nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L}, NULL);
}

/* What a communicator that does not block comes to; a call's own result first. */
static int settle(const ncclComm_t *comm, int result) {
  for (int i = 0; i < 20000 && (result == SUCCESS || result == IN_PROGRESS); i++) {
    int asked = ncclCommGetAsyncError(*comm, &result);
    if (asked != SUCCESS) return asked;
    if (result != IN_PROGRESS) return result;
    sleep_ms(1);
  }
  return result;
}

static void sync_all(rank_t *self) {
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

static void run(int nRanks, rankWork_t work) {
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

static int unset(void **state) {
  (void)state;
  unsetenv("NCCL_COMM_BLOCKING");
  unsetenv("EMULATED_NCCL_WINDOWS");
  return 0;
}

static unsigned char value(int from, int round, size_t at) {
  uint64_t x = (uint64_t)(at + 1) * 0x9e3779b97f4a7c15u + (uint64_t)(from * 131 + round * 7);
  return (unsigned char)(x >> 13);
}

static void fill(rank_t *self, int round) {
  for (size_t i = 0; i < ARENA; i++) self->send[i] = value(self->rank, round, i);
  memset(self->recv, 0x5a, ARENA);
}

/* Whether what was received at a place is what a rank had at another. */
static void expect(rank_t *self, int round, size_t at, int from, size_t fromAt, size_t bytes) {
  for (size_t i = 0; i < bytes; i++)
    CHECK(self, self->recv[at + i] == value(from, round, fromAt + i), "round %d: byte %zu of %zu from %d",
          round, i, bytes, from);
}

static void expect_untouched(rank_t *self, size_t at, size_t bytes) {
  for (size_t i = at; i < at + bytes; i++) CHECK(self, self->recv[i] == 0x5a, "byte %zu was written", i);
}

/* A call on the communicator works. */
static void use(rank_t *self, ncclComm_t comm, cudaStream_t stream) {
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

/* ---- communicators ---- */

static void init_work(rank_t *self) {
  int nRanks = 0, rank = -1, device = -1, error = -1;
  CALL(self, ncclCommCount(self->comm, &nRanks));
  CALL(self, ncclCommUserRank(self->comm, &rank));
  CALL(self, ncclCommCuDevice(self->comm, &device));
  CALL(self, ncclCommGetAsyncError(self->comm, &error));
  CHECK(self, nRanks == self->nRanks && rank == self->rank && device == 0 && error == SUCCESS,
        "rank %d of %d, device %d, error %d", rank, nRanks, device, error);
  use(self, self->comm, self->streams[0]);
}

static void test_init(void **state) {
  (void)state;
  for (int nRanks = 1; nRanks <= MAX_RANKS; nRanks = nRanks < 4 ? nRanks + 1 : 2 * nRanks)
    run(nRanks, init_work);
}

static void test_arguments(void **state) {
  ncclUniqueId_t id;
  ncclComm_t comm = NULL, other;
  ncclConfig_t config = {.magic = 1, .blocking = INT_MIN};
  int value = 0;
  float one = 0;
  (void)state;
  assert_int_equal(ncclGetVersion(&value), SUCCESS);
  assert_int_equal(value, 23007);
  for (int i = 0; i < 9; i++) assert_non_null(ncclGetErrorString(i));
  assert_int_equal(ncclGetUniqueId(&id), SUCCESS);
  assert_int_equal(ncclCommInitRank(&comm, 0, id, 0), INVALID_ARGUMENT);
  assert_int_equal(ncclCommInitRank(&comm, 1, id, 1), INVALID_ARGUMENT);
  assert_int_equal(ncclCommInitRankConfig(&comm, 1, id, 0, &config), INVALID_ARGUMENT);
  assert_null(comm);
  config.magic = 0xcafebeef;
  assert_int_equal(ncclCommInitRankConfig(&comm, 1, id, 0, &config), SUCCESS);
  assert_int_equal(ncclSend(&one, 1, FLOAT, 1, comm, NULL), INVALID_ARGUMENT);
  assert_int_equal(ncclRecv(NULL, 1, FLOAT, 0, comm, NULL), INVALID_ARGUMENT);
  assert_int_equal(ncclAllGather(&one, &one, 1, 99, comm, NULL), INVALID_ARGUMENT);
  assert_int_equal(ncclAllReduce(&one, &one, 1, INT8, SUM, comm, NULL), INVALID_ARGUMENT);
  assert_true(strlen(ncclGetLastError(comm)) > 0);
  assert_int_equal(ncclCommSplit(comm, -2, 0, &other, NULL), INVALID_ARGUMENT);
  /* An error ends the group, and nothing of it is done. */
  assert_int_equal(ncclGroupEnd(), INVALID_USAGE);
  assert_int_equal(ncclGroupStart(), SUCCESS);
  assert_int_equal(ncclRecv(&one, 1, FLOAT, 0, comm, NULL), SUCCESS);
  assert_int_equal(ncclCommSplit(comm, 0, 0, &other, NULL), SUCCESS);
  assert_int_equal(ncclSend(&one, 1, FLOAT, -1, comm, NULL), INVALID_ARGUMENT);
  assert_int_equal(ncclGroupEnd(), INVALID_ARGUMENT);
  assert_null(other);
  assert_int_equal(ncclCommFinalize(comm), SUCCESS);
  assert_int_equal(ncclCommCount(comm, &value), INVALID_ARGUMENT);
  assert_int_equal(ncclCommDestroy(comm), SUCCESS);
  assert_int_equal(ncclCommDestroy(comm), INVALID_ARGUMENT);
  assert_int_equal(ncclCommAbort(comm), INVALID_ARGUMENT);
  assert_int_equal(ncclCommGetAsyncError(comm, &value), INVALID_ARGUMENT);
}

/* All ranks in one thread: their calls wait for each other, and are made at the end of the group. */
static void one_thread(ncclComm_t *comms, int n) {
  cudaStream_t streams[4];
  int32_t mine[4], all[4][4] = {{0}};
  for (int r = 0; r < n; r++) {
    mine[r] = 100 + r;
    assert_int_equal(cudaStreamCreateWithFlags(&streams[r], cudaStreamNonBlocking), SUCCESS);
  }
  assert_int_equal(ncclGroupStart(), SUCCESS);
  for (int r = 0; r < n; r++)
    assert_int_equal(ncclAllGather(&mine[r], all[r], 1, INT32, comms[r], streams[r]), SUCCESS);
  assert_int_equal(ncclGroupEnd(), SUCCESS);
  for (int r = 0; r < n; r++) {
    assert_int_equal(cudaStreamSynchronize(streams[r]), SUCCESS);
    for (int i = 0; i < n; i++) assert_int_equal(all[r][i], 100 + i);
    assert_int_equal(cudaStreamDestroy(streams[r]), SUCCESS);
  }
}

static void test_one_thread(void **state) {
  ncclUniqueId_t id;
  ncclComm_t comms[4], halves[4];
  const int devices[4] = {0, 0, 0, 0};
  (void)state;
  assert_int_equal(ncclGetUniqueId(&id), SUCCESS);
  assert_int_equal(ncclGroupStart(), SUCCESS);
  assert_int_equal(ncclGroupStart(), SUCCESS);
  for (int r = 0; r < 4; r++) assert_int_equal(ncclCommInitRank(&comms[r], 4, id, r), SUCCESS);
  assert_int_equal(ncclGroupEnd(), SUCCESS);
  assert_int_equal(ncclGroupEnd(), SUCCESS);
  one_thread(comms, 4);
  assert_int_equal(ncclGroupStart(), SUCCESS);
  for (int r = 0; r < 4; r++) assert_int_equal(ncclCommSplit(comms[r], r / 2, -r, &halves[r], NULL), SUCCESS);
  assert_int_equal(ncclGroupEnd(), SUCCESS);
  one_thread((ncclComm_t[]){halves[1], halves[0]}, 2);
  one_thread((ncclComm_t[]){halves[3], halves[2]}, 2);
  for (int r = 0; r < 4; r++) {
    assert_int_equal(ncclCommDestroy(halves[r]), SUCCESS);
    assert_int_equal(ncclCommDestroy(comms[r]), SUCCESS);
  }
  assert_int_equal(ncclCommInitAll(comms, 3, devices), SUCCESS);
  one_thread(comms, 3);
  for (int r = 0; r < 3; r++) assert_int_equal(ncclCommDestroy(comms[r]), SUCCESS);
}

static void split_work(rank_t *self) {
  ncclComm_t child = NULL, none = self->comm;
  int rank = -1, nRanks = 0;
  /* Ranks 0, 2, 4 in reverse; 1, 3 alike; 5 in none. */
  int colour = self->rank == 5 ? -1 : self->rank % 2;
  CALL(self, ncclCommSplit(self->comm, colour, colour == 0 ? -self->rank : 7, &child, NULL));
  if (colour < 0) {
    CHECK(self, !child, "a rank without a colour has a communicator");
  } else {
    CALL(self, ncclCommUserRank(child, &rank));
    CALL(self, ncclCommCount(child, &nRanks));
    CHECK(self, nRanks == (colour == 0 ? 3 : 2), "%d ranks", nRanks);
    CHECK(self, rank == (colour == 0 ? 2 - self->rank / 2 : self->rank / 2), "rank %d", rank);
    use(self, child, self->streams[0]);
  }
  use(self, self->comm, self->streams[1]);
  if (child) CALL(self, ncclCommDestroy(child));
  CALL(self, ncclCommSplit(self->comm, -1, 0, &none, NULL));
  CHECK(self, !none, "a split without colours made a communicator");
}

static void test_split(void **state) {
  (void)state;
  run(6, split_work);
}

/* Each rank has its own order of several communicators, each on a stream of its own. */
static void many_work(rank_t *self) {
  enum { COMMS = 4 };
  ncclComm_t comms[COMMS];
  cudaStream_t streams[COMMS];
  int32_t mine[COMMS], all[COMMS][MAX_RANKS];
  for (int i = 0; i < COMMS; i++) {
    CALL(self, ncclCommSplit(self->comm, 0, self->rank, &comms[i], NULL));
    CALL(self, cudaStreamCreateWithFlags(&streams[i], cudaStreamNonBlocking));
  }
  for (int round = 0; round < 20; round++) {
    for (int i = 0; i < COMMS; i++) {
      int at = (i + self->rank + round) % COMMS;
      mine[at] = self->rank * 100 + at * 10 + round;
      CALL(self, ncclAllGather(&mine[at], all[at], 1, INT32, comms[at], streams[at]));
    }
    for (int i = 0; i < COMMS; i++) {
      CALL(self, cudaStreamSynchronize(streams[i]));
      for (int r = 0; r < self->nRanks; r++)
        CHECK(self, all[i][r] == r * 100 + i * 10 + round, "round %d, communicator %d", round, i);
    }
  }
  for (int i = 0; i < COMMS; i++) {
    CALL(self, ncclCommDestroy(comms[i]));
    CALL(self, cudaStreamDestroy(streams[i]));
  }
}

static void test_many(void **state) {
  (void)state;
  run(4, many_work);
}

/* ---- operations ---- */

static void check_collective(rank_t *self, int round, size_t bytes) {
  for (int r = 0; r < self->nRanks; r++) {
    size_t at = (size_t)r * bytes, mine = (size_t)self->rank * bytes;
    if (round == 0) expect(self, round, at, r, 0, bytes);
    if (round == 1) expect(self, round, at, r, mine, bytes);
    if (round == 2) expect(self, round, 0, 1, 0, bytes);
    if (round == 3 && self->rank == 1) expect(self, round, at, r, 0, bytes);
    if (round == 4) expect(self, round, 0, 1, mine, bytes);
  }
  size_t used = round == 2 || round == 4 ? bytes : (size_t)self->nRanks * bytes;
  if (round == 3 && self->rank != 1) used = 0;
  expect_untouched(self, used, ARENA - used);
}

static void collective_work(rank_t *self) {
  cudaStream_t stream = self->streams[0];
  const size_t bytes = 10007;
  unsigned char *send = self->send, *recv = self->recv;
  bool isRoot = self->rank == 1;
  for (int round = 0; round < 5; round++) {
    fill(self, round);
    meet();
    if (round == 0) CALL(self, pncclAllGather(send, recv, bytes, INT8, self->comm, stream));
    if (round == 1) CALL(self, ncclAlltoAll(send, recv, bytes, INT8, self->comm, stream));
    if (round == 2) CALL(self, ncclBroadcast(isRoot ? send : NULL, recv, bytes, INT8, 1, self->comm, stream));
    if (round == 3) CALL(self, ncclGather(send, isRoot ? recv : NULL, bytes, INT8, 1, self->comm, stream));
    if (round == 4) CALL(self, ncclScatter(isRoot ? send : NULL, recv, bytes, INT8, 1, self->comm, stream));
    CALL(self, cudaStreamSynchronize(stream));
    check_collective(self, round, bytes);
    meet();
  }
}

static void in_place_work(rank_t *self) {
  cudaStream_t stream = self->streams[0];
  int32_t all[MAX_RANKS] = {0};
  float sums[2] = {(float)self->rank, 0.5f};
  all[self->rank] = self->rank + 40;
  CALL(self, ncclAllGather(&all[self->rank], all, 1, INT32, self->comm, stream));
  CALL(self, ncclAllReduce(sums, sums, 2, FLOAT, SUM, self->comm, stream));
  CALL(self, ncclBroadcast(&all[0], &all[0], 1, INT32, 2, self->comm, stream));
  /* Empty ones are no operations, on one rank alone neither. */
  if (self->rank == 0) CALL(self, ncclAllGather(NULL, NULL, 0, INT8, self->comm, stream));
  CALL(self, cudaStreamSynchronize(stream));
  int n = self->nRanks;
  for (int r = 1; r < n; r++) CHECK(self, all[r] == r + 40, "part %d is %d", r, all[r]);
  CHECK(self, all[0] == 40, "the broadcast in place is %d", all[0]);
  CHECK(self, (int)sums[0] == n * (n - 1) / 2 && sums[1] == 0.5f * (float)n, "sums %f %f", (double)sums[0],
        (double)sums[1]);
}

static void test_collectives(void **state) {
  (void)state;
  run(4, collective_work);
  run(3, in_place_work);
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

/* Sends and receives of a group, on one stream or two; order: of the peers. */
static void exchange(rank_t *self, int round, bool twoStreams) {
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

static void check_exchange(rank_t *self, int round) {
  for (int peer = 0; peer < self->nRanks; peer++)
    for (int i = 0; i < 3; i++) {
      size_t in = pair_bytes(round, peer, self->rank, i), at = pair_place(self, peer, i);
      size_t room = ARENA / (size_t)self->nRanks / 3;
      if (in == SIZE_MAX) in = 0;
      expect(self, round, at, peer, pair_place(self, self->rank, i), in);
      expect_untouched(self, at + in, room - in);
    }
}

static void exchange_work(rank_t *self) {
  for (int round = 0; round < 12; round++) {
    fill(self, round);
    meet();
    exchange(self, round, round % 2);
    sync_all(self);
    check_exchange(self, round);
    meet();
  }
}

static void test_exchange(void **state) {
  (void)state;
  for (int nRanks = 1; nRanks <= MAX_RANKS; nRanks *= 2) run(nRanks, exchange_work);
}

/* Ranks use two streams for one communicator, in orders in which the streams run differently: operations
 * match as they were called. Without a group, too. */
static void order_work(rank_t *self) {
  enum { CALLS = 60 };
  int32_t mine[CALLS], all[CALLS][2], from[CALLS];
  int peer = 1 - self->rank;
  for (int i = 0; i < CALLS; i++) {
    cudaStream_t stream = self->streams[(i / (self->rank + 1)) % STREAMS];
    mine[i] = 1000 * self->rank + i;
    CALL(self, ncclAllGather(&mine[i], all[i], 1, INT32, self->comm, stream));
    if (i % 2 == self->rank) CALL(self, ncclSend(&mine[i], 1, INT32, peer, self->comm, stream));
    if (i % 2 != self->rank) CALL(self, ncclRecv(&from[i], 1, INT32, peer, self->comm, stream));
    if (i % 7 == self->rank) sleep_ms(1);
  }
  sync_all(self);
  for (int i = 0; i < CALLS; i++) {
    CHECK(self, all[i][0] == i && all[i][1] == 1000 + i, "call %d: %d, %d", i, all[i][0], all[i][1]);
    if (i % 2 != self->rank) CHECK(self, from[i] == 1000 * peer + i, "receive %d: %d", i, from[i]);
  }
}

static void test_order(void **state) {
  (void)state;
  run(2, order_work);
}

/* ---- graphs ---- */

static void graph_replay(rank_t *self, cudaGraphExec_t exec, int32_t *mine, const int32_t *all) {
  for (int round = 0; round < 10; round++) {
    *mine = 10 * round + self->rank;
    fill(self, 3);
    meet();
    CALL(self, cudaGraphLaunch(exec, self->streams[0]));
    CALL(self, cudaStreamSynchronize(self->streams[0]));
    for (int r = 0; r < self->nRanks; r++) CHECK(self, all[r] == 10 * round + r, "replay %d", round);
    check_exchange(self, 3);
    use(self, self->comm, self->streams[round % STREAMS]); /* between replays */
  }
  for (int i = 0; i < 20; i++) CALL(self, cudaGraphLaunch(exec, self->streams[0]));
  CALL(self, cudaStreamSynchronize(self->streams[0]));
}

static void graph_work(rank_t *self) {
  cudaGraph_t graph = NULL;
  cudaGraphExec_t exec = NULL;
  cudaEvent_t fork;
  int32_t mine = -1, all[MAX_RANKS];
  CALL(self, cudaEventCreateWithFlags(&fork, cudaEventDisableTiming));
  /* A capture that only rank 0 makes, and nobody runs, counts for nothing. */
  for (int i = self->rank == 0 ? 0 : 1; i < 2; i++) {
    if (graph) CALL(self, cudaGraphDestroy(graph));
    CALL(self, cudaStreamBeginCapture(self->streams[0], cudaStreamCaptureModeThreadLocal));
    CALL(self, cudaEventRecord(fork, self->streams[0]));
    CALL(self, cudaStreamWaitEvent(self->streams[1], fork, 0));
    CALL(self, ncclAllGather(&mine, all, 1, INT32, self->comm, self->streams[0]));
    exchange(self, 3, true);
    CALL(self, cudaStreamEndCapture(self->streams[0], &graph));
  }
  CALL(self, cudaGraphInstantiate(&exec, graph, 0));
  use(self, self->comm, self->streams[1]);
  graph_replay(self, exec, &mine, all);
  CALL(self, cudaEventDestroy(fork));
  CALL(self, cudaGraphExecDestroy(exec));
  CALL(self, cudaGraphDestroy(graph));
}

static void test_graph(void **state) {
  (void)state;
  run(4, graph_work);
}

/* ---- windows ---- */

static ncclWindow_t window_open(rank_t *self, void *buffer, size_t bytes) {
  ncclWindow_t window = NULL;
  CALL(self, settle(&self->comm, ncclCommWindowRegister(self->comm, buffer, bytes, &window, 1)));
  return window;
}

static void window_work(rank_t *self) {
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

/* A peer's memory is there as long as the window, though its owner has freed it. */
static void window_life_work(rank_t *self) {
  unsigned char *mine = NULL, *theirs = NULL;
  int peer = 1 - self->rank;
  CALL(self, ncclMemAlloc((void **)&mine, 4096));
  memset(mine, self->rank + 1, 4096);
  ncclWindow_t window = window_open(self, mine, 4096);
  CALL(self, ncclGetPeerDevicePointer(window, 0, peer, (void **)&theirs));
  CALL(self, ncclMemFree(mine));
  meet();
  CHECK(self, theirs && theirs[0] == peer + 1 && theirs[4095] == peer + 1, "the peer's memory is gone");
  meet();
  CALL(self, ncclCommWindowDeregister(self->comm, window));
}

static void no_window_work(rank_t *self) {
  char *plain = NULL;
  CALL(self, cudaMalloc((void **)&plain, 16384));
  char *aligned = (char *)(((uintptr_t)plain + 4095) / 4096 * 4096);
  ncclWindow_t window = window_open(self, aligned, 4096);
  CHECK(self, !window, "cudaMalloc memory has a window");
  window = window_open(self, self->rank == 1 ? (void *)aligned : self->send, 4096);
  CHECK(self, !window, "there is a window though one rank's memory has none");
  window = window_open(self, self->send, (size_t)1 << 40);
  CHECK(self, !window, "there is a window of more than the memory");
  CALL(self, cudaFree(plain));
}

static void off_work(rank_t *self) {
  ncclWindow_t window = window_open(self, self->send, 4096);
  CHECK(self, !window, "there is a window though they are off");
}

static void test_windows(void **state) {
  (void)state;
  run(4, window_work);
  run(2, window_life_work);
  run(3, no_window_work);
  setenv("EMULATED_NCCL_WINDOWS", "0", 1);
  run(2, off_work);
}

static void test_memory(void **state) {
  unsigned char *ptr = NULL;
  emulatedRange_t range;
  size_t before, between, after, total;
  (void)state;
  assert_int_equal(cudaMemGetInfo(&before, &total), SUCCESS);
  assert_int_equal(ncclMemAlloc((void **)&ptr, 100000), SUCCESS);
  assert_int_equal(cudaMemGetInfo(&between, &total), SUCCESS);
  assert_int_equal((uintptr_t)ptr % 4096, 0);
  assert_true(ptr[0] != 0 && ptr[99999] == ptr[0]);
  assert_true(emulated_range_find(ptr + 99999, &range));
  assert_int_equal(range.kind, EMULATED_CUMEM);
  assert_int_equal(ncclMemFree(ptr), SUCCESS);
  assert_int_equal(cudaMemGetInfo(&after, &total), SUCCESS);
  assert_true(between < before);
  assert_true(after == before);
  ptr = NULL;
  assert_int_equal(ncclMemAlloc((void **)&ptr, (size_t)1 << 44), CUDA_ERROR);
  assert_null(ptr);
  assert_int_equal(ncclMemFree(NULL), SUCCESS);
}

/* ---- abort ---- */

typedef enum { WAIT_RECV, WAIT_GATHER, WAIT_GROUP, WAIT_WINDOW, WAIT_SPLIT, WAIT_DESTROY, WAITS } wait_t;
static wait_t waitsIn;

typedef struct {
  rank_t *self;
  sem_t called; /* what is in a stream is there; a call of the host comes */
} waiter_t;

/* Calls what the last rank never does. */
static void *wait_call(void *argument) {
  waiter_t *waiter = argument;
  rank_t *self = waiter->self;
  int last = self->nRanks - 1;
  ncclWindow_t window;
  ncclComm_t child;
  switch (waitsIn) {
  case WAIT_RECV:
    CALL(self, ncclRecv(self->recv, 100, INT8, last, self->comm, self->streams[0]));
    break;
  case WAIT_GROUP:
    exchange(self, 0, true);
    break;
  case WAIT_WINDOW:
    sem_post(&waiter->called);
    if (ncclCommWindowRegister(self->comm, self->recv, 4096, &window, 1) == SUCCESS)
      CHECK(self, false, "the window is there without the last rank");
    return NULL;
  case WAIT_SPLIT:
    sem_post(&waiter->called);
    if (ncclCommSplit(self->comm, 0, 0, &child, NULL) == SUCCESS)
      CHECK(self, false, "the communicator is there without the last rank");
    return NULL;
  default:
    CALL(self, ncclAllGather(self->send, self->recv, 100, INT8, self->comm, self->streams[0]));
  }
  sem_post(&waiter->called);
  if (waitsIn == WAIT_DESTROY && ncclCommDestroy(self->comm) == SUCCESS)
    CHECK(self, false, "the communicator was destroyed while it waits");
  for (int i = 0; i < STREAMS; i++) (void)cudaStreamSynchronize(self->streams[i]);
  return NULL;
}

static void abort_work(rank_t *self) {
  pthread_t thread;
  waiter_t waiter = {.self = self};
  bool isAway = self->rank == self->nRanks - 1;
  CALL(self, sem_init(&waiter.called, 0, 0));
  if (!isAway) {
    int error = -1;
    CALL(self, pthread_create(&thread, NULL, wait_call, &waiter));
    sem_wait(&waiter.called);
    sleep_ms(20);
    if (self->rank == 0 && waitsIn <= WAIT_GATHER)
      CHECK(self, cudaStreamQuery(self->streams[0]) == cudaErrorNotReady, "it does not wait");
    CALL(self, ncclCommGetAsyncError(self->comm, &error));
    CHECK(self, error == SUCCESS, "the error is %d", error);
    if (self->rank == 0) CALL(self, ncclCommAbort(self->comm));
    if (self->rank == 0) pthread_join(thread, NULL);
  }
  meet();
  if (self->rank == 1 && waitsIn <= WAIT_GATHER) /* one rank's abort is not the others' */
    CHECK(self, cudaStreamQuery(self->streams[0]) == cudaErrorNotReady, "the peer's wait has ended");
  if (self->rank != 0) CALL(self, ncclCommAbort(self->comm));
  if (self->rank != 0 && !isAway) pthread_join(thread, NULL);
  sem_destroy(&waiter.called);
  self->comm = NULL;
}

static void test_abort(void **state) {
  (void)state;
  for (int i = 0; i < WAITS; i++) {
    waitsIn = (wait_t)i;
    run(3, abort_work);
  }
}

/* Another thread of the process ends a rank's wait; what is queued behind does nothing; others work on. */
static void foreign_abort_work(rank_t *self) {
  ncclComm_t twin = NULL;
  CALL(self, ncclCommSplit(self->comm, 0, self->rank, &twin, NULL));
  if (self->rank == 0)
    for (int i = 0; i < 5; i++)
      CALL(self, ncclAllGather(self->send, self->recv, 100, INT8, self->comm, self->streams[0]));
  meet();
  if (self->rank == 1) CALL(self, ncclCommAbort(world.ranks[0].comm));
  if (self->rank == 1) world.ranks[0].comm = NULL;
  meet();
  CALL(self, cudaStreamSynchronize(self->streams[0]));
  use(self, twin, self->streams[0]);
  meet();
  CALL(self, ncclCommDestroy(twin));
}

static void test_foreign_abort(void **state) {
  (void)state;
  run(2, foreign_abort_work);
}

/* ---- communicators that do not block ---- */

static void non_blocking_work(rank_t *self) {
  ncclComm_t child = NULL;
  int result = -1;
  /* Rank 1 comes only when rank 0 has looked. */
  if (self->rank == 1) meet();
  CALL_IS(self, ncclCommSplit(self->comm, 0, -self->rank, &child, NULL), IN_PROGRESS);
  if (self->rank == 0) {
    CALL(self, ncclCommGetAsyncError(child, &result));
    CHECK(self, result == IN_PROGRESS, "the child is at %d", result);
    CALL_IS(self, ncclCommCount(child, &result), INVALID_ARGUMENT);
    CALL(self, ncclCommGetAsyncError(self->comm, &result));
    CHECK(self, result == IN_PROGRESS, "the parent is at %d", result);
  }
  if (self->rank != 1) meet();
  CALL(self, settle(&child, IN_PROGRESS));
  CALL(self, settle(&self->comm, IN_PROGRESS));
  use(self, child, self->streams[0]);
  /* The first operation is in progress, the next is not. */
  CALL_IS(self, ncclAllGather(self->send, self->recv, 1, INT8, self->comm, self->streams[1]), IN_PROGRESS);
  CALL(self, settle(&self->comm, IN_PROGRESS));
  CALL(self, ncclAllGather(self->send, self->recv, 1, INT8, self->comm, self->streams[1]));
  window_work(self);
  CALL_IS(self, ncclCommFinalize(child), IN_PROGRESS);
  CALL(self, settle(&child, IN_PROGRESS));
  CALL(self, ncclCommDestroy(child));
}

/* A rank does not come; those that wait abort what they have got. */
static void non_blocking_abort_work(rank_t *self) {
  ncclUniqueId_t id = world.id;
  ncclComm_t made = NULL, child = NULL;
  ncclWindow_t window = NULL;
  int result = -1;
  if (self->rank == 0) {
    id.bytes[0] ^= 0x40;
    CALL_IS(self, ncclCommInitRank(&made, 2, id, 0), IN_PROGRESS);
    CALL_IS(self, ncclCommSplit(self->comm, 0, 0, &child, NULL), IN_PROGRESS);
    sleep_ms(20);
    CALL(self, ncclCommGetAsyncError(made, &result));
    CHECK(self, result == IN_PROGRESS, "it is at %d", result);
    CALL(self, ncclCommAbort(made));
    CALL(self, ncclCommAbort(child));
    CHECK(self, settle(&self->comm, SUCCESS) != SUCCESS, "the parent knows nothing");
  } else {
    CALL(self, ncclCommWindowRegister(self->comm, self->send, 4096, &window, 1));
    sleep_ms(20);
    CALL(self, ncclCommGetAsyncError(self->comm, &result));
    CHECK(self, result == IN_PROGRESS || result == INVALID_USAGE, "it is at %d", result);
  }
  meet();
  CALL(self, ncclCommAbort(self->comm));
  self->comm = NULL;
}

static void test_non_blocking(void **state) {
  (void)state;
  setenv("NCCL_COMM_BLOCKING", "0", 1);
  run(4, non_blocking_work);
  run(2, non_blocking_abort_work);
}

static void config_work(rank_t *self) {
  ncclConfig_t config = {.size = sizeof(config), .magic = 0xcafebeef, .version = 23007, .blocking = 0};
  ncclUniqueId_t id = world.id;
  ncclComm_t made = NULL;
  id.bytes[0] ^= 0x20;
  CALL_IS(self, ncclCommInitRankConfig(&made, self->nRanks, id, self->rank, &config), IN_PROGRESS);
  CALL(self, settle(&made, IN_PROGRESS));
  use(self, made, self->streams[0]);
  CALL(self, ncclCommDestroy(made));
}

static void test_config(void **state) {
  (void)state;
  run(3, config_work);
}

/* ---- mistakes ---- */

static void mismatch_work(rank_t *self) {
  int error = 0;
  ncclComm_t again = NULL;
  size_t count = self->rank == 1 ? 200 : 100;
  CALL_IS(self, ncclCommInitRank(&again, self->nRanks + 1, world.id, self->nRanks + 1), INVALID_ARGUMENT);
  fill(self, 0);
  meet();
  CALL(self, ncclAllGather(self->send, self->recv, count, INT8, self->comm, self->streams[0]));
  CALL(self, cudaStreamSynchronize(self->streams[0]));
  CALL(self, ncclCommGetAsyncError(self->comm, &error));
  CHECK(self, error == INVALID_USAGE, "the error is %d", error);
  expect_untouched(self, 0, ARENA);
  CALL_IS(self, ncclAllGather(self->send, self->recv, 1, INT8, self->comm, self->streams[0]), INVALID_USAGE);
}

static void test_mismatch(void **state) {
  (void)state;
  run(3, mismatch_work);
}

/* Destroying waits for what was issued; what a graph does afterwards is nothing. */
static void destroy_work(rank_t *self) {
  cudaGraph_t graph = NULL;
  cudaGraphExec_t exec = NULL;
  fill(self, 1);
  meet();
  CALL(self, cudaStreamBeginCapture(self->streams[1], cudaStreamCaptureModeThreadLocal));
  CALL(self, ncclAllGather(self->send, self->recv, 10, INT8, self->comm, self->streams[1]));
  CALL(self, cudaStreamEndCapture(self->streams[1], &graph));
  CALL(self, cudaGraphInstantiate(&exec, graph, 0));
  if (self->rank == 1) sleep_ms(20);
  for (int i = 0; i < 50; i++)
    CALL(self, ncclAllGather(self->send, self->recv, 1000, INT8, self->comm, self->streams[0]));
  CALL(self, ncclCommDestroy(self->comm));
  self->comm = NULL;
  for (int r = 0; r < self->nRanks; r++) expect(self, 1, (size_t)r * 1000, r, 0, 1000);
  CALL(self, cudaGraphLaunch(exec, self->streams[1]));
  CALL(self, cudaStreamSynchronize(self->streams[1]));
  CALL(self, cudaGraphExecDestroy(exec));
  CALL(self, cudaGraphDestroy(graph));
}

static void test_destroy(void **state) {
  (void)state;
  run(3, destroy_work);
}

/* Optional argument: a test's name or a pattern of names, as cmocka takes them. */
int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_init),          cmocka_unit_test(test_arguments),
      cmocka_unit_test(test_one_thread),    cmocka_unit_test(test_split),
      cmocka_unit_test(test_many),          cmocka_unit_test(test_collectives),
      cmocka_unit_test(test_exchange),      cmocka_unit_test(test_order),
      cmocka_unit_test(test_graph),         cmocka_unit_test_teardown(test_windows, unset),
      cmocka_unit_test(test_memory),        cmocka_unit_test(test_abort),
      cmocka_unit_test(test_foreign_abort), cmocka_unit_test_teardown(test_non_blocking, unset),
      cmocka_unit_test(test_config),        cmocka_unit_test(test_mismatch),
      cmocka_unit_test(test_destroy),
  };
  if (argc > 1) cmocka_set_test_filter(argv[1]);
  return cmocka_run_group_tests_name("emulated_nccl", tests, NULL, NULL);
}
