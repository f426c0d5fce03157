/* The host backend: ranks are threads of one process, windows are memory that the others write.
 *
 *   host_world.c     worlds, and how the ranks of a group find each other
 *   host_window.c    signals, waits, failures, and who may touch whose memory
 *   host_group.c     the group's memory and the table of operations
 *   host_route.c     loads, plan, places
 *   host_dispatch.c  tokens -> rows            host_combine.c  rows -> tokens
 *   host_experts.c   weights and gradients     host_kernels.c  sums of rows
 *
 * Life of memory. Windows belong to the hostShared_t and live until the last rank has left, so a late signal
 * never meets freed memory. Callers' memory (symmetric regions, slots) may go as soon as a call has failed or
 * the group is destroyed; therefore a rank touches its peers' regions only between host_touch_begin and
 * host_touch_end, a block at a time, and a rank that fails or leaves says so in every peer's window and waits
 * until that peer is between two blocks (host_rank_close). A peer that has been told begins no further block.
 */
#ifndef ULTRAEP_HOST_H_
#define ULTRAEP_HOST_H_

#include "error.h"
#include "group.h"
#include "layout.h"

#include <pthread.h>
#include <stdbool.h>

#define HOST_SIGNAL_ARGS 5
#define HOST_BLOCK_BYTES ((size_t)1 << 20) /* moved between two looks at the peers' state */

/* What a rank is doing; the first signal of a collective call carries it, so that mismatched calls are found
 * before anything is touched. */
typedef enum {
  HOST_OP_CREATE,
  HOST_OP_ALLOC,
  HOST_OP_REGISTER,
  HOST_OP_FREE,
  HOST_OP_ROUTE,
  HOST_OP_DISPATCH,
  HOST_OP_COMBINE,
  HOST_OP_COMBINE_SUM,
  HOST_OP_EXPERTS,
  HOST_OP_WEIGHTS,
  HOST_OP_GRADS,
  HOST_OP_DONE
} hostOp_t;

/* One rank's word to another. Every rank sends one to every rank, itself too, at each step of a collective
 * call. */
typedef struct {
  uint64_t seq; /* counts the steps of the group */
  hostOp_t op;
  int32_t status;                  /* of the call: see the op */
  uint64_t args[HOST_SIGNAL_ARGS]; /* those that must agree come first */
} hostSignal_t;

typedef struct {
  ultraepResult_t code; /* ultraepSuccess: none */
  int rank;             /* the rank that did not come, left or aborted; -1 if none */
  int finder;           /* the rank that found it first */
  char phase[32];
  char text[ERROR_TEXT_BYTES];
} hostFailure_t;

typedef enum { HOST_PEER_ALIVE, HOST_PEER_FAILED, HOST_PEER_LEFT } hostPeerState_t;

/* One row's part in its token, written by the token's rank into the window of the row's rank. Used by
 * ULTRAEP_DISPATCH_ONCE and ULTRAEP_COMBINE_PARTIAL. */
typedef struct {
  int32_t next;    /* the token's next row on this rank, in order of k; -1: none */
  int32_t isFirst; /* 1: the first of the token's rows on this rank */
  float weight;    /* top-k weight, 1 where the route has none */
  int32_t reserved;
} hostMeta_t;

/* A rank's window: its peers raise signals and write loads and metadata here. */
typedef struct {
  pthread_mutex_t lock;
  pthread_cond_t changed;   /* a step is complete, or a peer has failed or left */
  pthread_cond_t idle;      /* the owner is between two blocks */
  bool touching;            /* the owner is in a block that touches peers' memory */
  int nArrived[2];          /* signals of the steps with even and odd numbers, not waited for yet */
  int nFailed, nLeft;       /* of the peers */
  hostFailure_t own;        /* why this rank has failed */
  hostFailure_t peers;      /* the first failure that a peer told */
  uint8_t *peerState;       /* [R] hostPeerState_t */
  hostSignal_t *signals[2]; /* [R] by step parity: a rank is never two steps ahead of another */
  ultraepConfig_t config;   /* as this rank passed it */
  /* The memory that peers write. loads and signals are used by step parity. */
  void *block;
  int32_t *loads[2];       /* [R][E] */
  hostMeta_t **meta;       /* [maxRoutes][maxRecvRows], null where no mode needs it */
  unsigned char *partials; /* [maxRecvRows][row], null unless ULTRAEP_COMBINE_PARTIAL */
} hostWindow_t;

/* What the ranks of one group share; lives until every rank has joined and left. */
typedef struct hostShared {
  struct hostShared *next;
  int64_t index; /* counts the groups of the world */
  int nRanks, nJoined, nPresent;
  hostWindow_t *windows; /* [R] */
} hostShared_t;

/* The host part of a group. */
typedef struct {
  ultraepHostWorld_t world;
  hostShared_t *shared;
  hostWindow_t *window; /* this rank's */
  int rank, nRanks, timeoutMs;
  uint64_t seq; /* of the last step */
  /* Scratch of route updates, in one block. */
  void *block;
  int32_t *topk;               /* [maxTokens][topK] */
  int64_t *firstRow, *nextRow; /* [E + R*S] */
  int64_t *rankRows;           /* [R] */
  layoutCursor_t cursor;
  size_t planBytes;
  /* Rows of one sum: a token's, or an expert's gradients. */
  const void **rows; /* [max(topK, R)] */
  float *weights;
  /* Slots. */
  unsigned char *slots;
  unsigned char **peerSlots; /* [R] */
} hostRank_t;

/* The host part of a route. */
typedef struct {
  size_t bytes;
  layoutPlace_t *places; /* [maxTokens][topK] */
  float *weights;        /* [maxTokens][topK] */
  bool hasWeights;
  void *planWorkspace;
  int32_t *expert; /* [nSegments] */
  int64_t *firstRow, *rows, *totalRows;
  void **pointers[2 * ULTRAEP_MAX_TENSORS]; /* [nSegments] weights, then gradients */
} hostRoute_t;

static inline hostRank_t *host_rank(ultraepGroup_t group) {
  return group->impl;
}

/* ---- host_world.c ---- */
ultraepResult_t host_world_check(ultraepHostWorld_t world, int rank, int *nRanks);
ultraepResult_t host_world_join(ultraepHostWorld_t world, int rank, hostShared_t **shared);
void host_world_leave(ultraepHostWorld_t world, hostShared_t *shared);

/* ---- host_window.c ---- */
ultraepResult_t host_window_make(hostWindow_t *window, int nRanks);
void host_window_free(hostWindow_t *window);

/* Sends the signal to every rank and waits for theirs, at most timeoutMs. Fails the group when a rank does
 * not come. When ranks are in different calls, or their first nEqual args differ: ultraepInvalidUsage on
 * every rank, and the group works on. names[nEqual] are the args' names for the message. */
ultraepResult_t host_signal_exchange(hostRank_t *self, hostSignal_t signal, const char *phase, int nEqual,
                                     const char *const *names);
/* The closing step of a call: every rank has done its part. */
ultraepResult_t host_signal_done(hostRank_t *self, const char *phase);
/* Rank src's signal of the last step. Valid until this rank's next step. */
const hostSignal_t *host_signal_from(const hostRank_t *self, int src);
/* The number that the next step will have. */
static inline uint64_t host_signal_next(const hostRank_t *self) {
  return self->seq + 1;
}

/* Brackets around touching the peers' regions; begin fails the group when a peer has failed or left. */
ultraepResult_t host_touch_begin(hostRank_t *self, const char *phase);
void host_touch_end(hostRank_t *self);

/* Fails the group on this rank: records why (the first reason stands), tells the peers, and returns the
 * reason's code once no peer touches this rank's memory. */
ultraepResult_t host_rank_fail(hostRank_t *self, const char *phase, ultraepResult_t code, int rank,
                               const char *text);
/* Tells the peers that this rank has failed or left, and waits until none is in a block that it began before.
 */
void host_rank_close(hostRank_t *self, hostPeerState_t state);
ultraepResult_t host_rank_check(ultraepGroup_t group, const char *phase);
void host_rank_status(ultraepGroup_t group, ultraepStatus_t *status);
void host_rank_abort(ultraepGroup_t group);

/* A place and whether there is one, in one word. */
static inline uint64_t host_place_word(groupPlace_t place) {
  return place.region < 0 ? 0 : ((uint64_t)(place.region + 1) << 48) | place.offset;
}

/* ---- the operations ---- */
ultraepResult_t host_route_create(ultraepRoute_t route);
void host_route_destroy(ultraepRoute_t route);
ultraepResult_t host_route_update(ultraepRoute_t route, const int32_t *topkIdx, const float *topkWeights,
                                  int nTokens, cudaStream_t stream);
ultraepResult_t host_dispatch(const backendExchange_t *exchange, cudaStream_t stream);
ultraepResult_t host_combine(const backendExchange_t *exchange, cudaStream_t stream);
ultraepResult_t host_experts_register(ultraepGroup_t group, groupLayer_t *layer);
void host_gate_changed(ultraepGroup_t group);
void host_experts_free(hostRank_t *self);
ultraepResult_t host_weights_sync(ultraepRoute_t route, const groupLayer_t *layer, cudaStream_t stream);
ultraepResult_t host_grads_reduce(ultraepRoute_t route, const groupLayer_t *layer, cudaStream_t stream);

/* True where the sources tell the row's part in its token. */
static inline bool host_uses_meta(const ultraepConfig_t *config) {
  return config->dispatchMode == ULTRAEP_DISPATCH_ONCE || config->combineMode == ULTRAEP_COMBINE_PARTIAL;
}

/* ---- host_kernels.c ---- */
/* dst[i] = round(0 + weights[0] * rows[0][i] + weights[1] * rows[1][i] + ...): products and sums in fp32, in
 * this order, one rounding to the data type (bfloat16, float16 or float32) at the end. dst may be one of the
 * rows. The same bits on every machine: no fused multiply-add. */
void host_sum_rows(void *dst, const void *const *rows, const float *weights, int nRows, size_t nElements,
                   int32_t dataType);
/* The same without the machine's vector extensions: what the other must equal. */
void host_sum_rows_baseline(void *dst, const void *const *rows, const float *weights, int nRows,
                            size_t nElements, int32_t dataType);

#endif
