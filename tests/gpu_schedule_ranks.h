/* Ranks for the tests of scheduling under a real NCCL: threads on the machine's GPUs in turn, which call
 * NCCL's functions as the takeover would lead them: through p2p.h, with the loaded NCCL's as originals. With
 * NCCL_COMM_BLOCKING=0 the communicators are ready later. */
#ifndef ULTRAEP_TESTS_GPU_SCHEDULE_RANKS_H_
#define ULTRAEP_TESTS_GPU_SCHEDULE_RANKS_H_

#include "p2p.h"
#include "planner_common.h"
#include "schedule.h"
#include "ultraep.h"

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#include "gpu_common.h"

#define MAX_RANKS 8
#define ARENA ((size_t)24 << 20) /* of a rank, to send from and to receive into */
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

typedef struct {
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
  int nRounds;   /* of random groups */
} world_t;

extern world_t world;

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

/* What a program's main begins with; its optional arguments are rounds of random groups and which tests. 0,
 * or how it is to end: skipped, without a GPU or NCCL 2.30. */
int ranks_begin(int argc, char **argv);

/* Runs `work` on every rank, each with a communicator of all, which is scheduled; fails the test where a rank
 * has a flaw. */
void run(int nRanks, bool fromNccl, rankWork_t work);

/* Whether the library sees all calls that make communicators. */
void sees_all(bool all);

/* ---- of a rank ---- */

void meet(void);

/* Whether what is in the stream ends: a test may wait for a rank that is gone, seconds, not for ever. */
bool stream_ends(cudaStream_t stream, int seconds);

/* The communicator, or what was asked of it, is there. */
void ready(rank_t *self, void *comm);

/* Byte `at` of what rank `from` sends in a round. */
unsigned char value(int round, int from, size_t at);

/* The round's bytes into `send`, others into `recv`. */
void fill(rank_t *self);

/* The round's random transfers between all pairs, in one group. */
void exchange(rank_t *self, void *comm, bool twoStreams);

/* Waits for them, and looks at all of `recv`. */
void verify(rank_t *self);

/* fill, exchange and verify, with all ranks. */
void exchange_checked(rank_t *self, void *comm, bool twoStreams);

#endif
