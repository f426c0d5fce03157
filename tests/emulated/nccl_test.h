/* What the tests of the NCCL that is not there share: ranks are threads, each with streams of its own. */
#ifndef ULTRAEP_TESTS_EMULATED_NCCL_TEST_H_
#define ULTRAEP_TESTS_EMULATED_NCCL_TEST_H_

#include "emulated.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>

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

extern struct ncclTestWorld {
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

void meet(void);
void sleep_ms(int ms);
/* What a communicator that does not block comes to; a call's own result first. */
int settle(const ncclComm_t *comm, int result);
void sync_all(rank_t *self);
void run(int nRanks, rankWork_t work);
int unset(void **state);
unsigned char value(int from, int round, size_t at);
void fill(rank_t *self, int round);
/* Whether what was received at a place is what a rank had at another. */
void expect(rank_t *self, int round, size_t at, int from, size_t fromAt, size_t bytes);
void expect_untouched(rank_t *self, size_t at, size_t bytes);
/* A call on the communicator works. */
void use(rank_t *self, ncclComm_t comm, cudaStream_t stream);
/* Sends and receives of a group, on one stream or two; order: of the peers. */
void exchange(rank_t *self, int round, bool twoStreams);
void check_exchange(rank_t *self, int round);
ncclWindow_t window_open(rank_t *self, void *buffer, size_t bytes);
void window_work(rank_t *self);

#endif
