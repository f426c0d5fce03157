/* Launchers of the CUDA kernels. Plain pointers in, no NCCL types; every launcher returns a cudaError_t as
 * int and enqueues on the stream without waiting. Sizes and meanings follow ultraep.h and ultraep_balancer.h.
 *
 * Ranks meet in their windows: symmetric memory of which each rank maps every other's. A window begins with
 * flags, one 64-bit word per (kind, rank): the low half counts calls, the high half carries a check word or
 * status bits. */
#ifndef ULTRAEP_KERNELS_H_
#define ULTRAEP_KERNELS_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct CUstream_st *cudaStream_t;

#define KERNEL_MAX_TENSORS 8 /* ULTRAEP_MAX_TENSORS */

/* The planner's config with its defaults resolved, see ultraepPlannerConfig_t. */
typedef struct {
  int32_t nRanks, nExperts, nSlots, nDomainRanks, relayCopies;
  int32_t perRank; /* E / R */
  uint32_t tolerancePpm, rowPs;
  uint64_t copyPs;
  int32_t replicaRows;
} kernelPlanner_t;

/* ---- the planner alone ---- */

/* A plan in device memory: what host and device planner must agree on to the bit. */
typedef struct {
  int32_t *slotExpert;  /* [R*S] expert in each slot, ascending on a rank, -1 where empty */
  int64_t *slotQuota;   /* [R*S] */
  int64_t *masterQuota; /* [E] */
  int64_t *summary;     /* [KERNEL_SUMMARY_WORDS] */
} kernelPlan_t;

enum {
  KERNEL_SUMMARY_MAX_PLANNED = 0,
  KERNEL_SUMMARY_REPLICAS = 1,
  KERNEL_SUMMARY_TARGET = 2,
  KERNEL_SUMMARY_WORDS = 4
};

/* Plans one load matrix [R][E] in device memory with one thread block. */
int kernelPlanLaunch(const kernelPlanner_t *planner, const int32_t *loads, kernelPlan_t plan,
                     cudaStream_t stream);

/* Loads every kernel for the current device: a first launch would load it then, and may wait for the whole
 * device. */
int kernelsLoad(void);

/* ---- a rank's part of a group ---- */

/* A group's kernels are in two lanes, which may run at the same time. Each has its own count of calls and its
 * own flags for them; within a lane one kernel runs at a time. */
enum {
  KERNEL_LANE_EXCHANGE = 0, /* routes, dispatch, combine */
  KERNEL_LANE_EXPERTS = 1,  /* weights, gradients */
  KERNEL_LANES = 2
};

/* OPEN: a rank is in its lane's n-th collective call, whose check word tells which call that is. A lane has
 * two kinds, by parity of the call, since a fast rank may be one call ahead. DONE: the rank has finished its
 * part; one kind a lane. META: metadata of a route has arrived. GONE: set by a rank that leaves the group;
 * ends waits for that rank. After the flags comes one word, the failure mark: phase << 48 | code << 32 |
 * rank + 1 of the rank to blame; ends every wait, in both lanes. */
enum {
  KERNEL_FLAG_OPEN = 0,                                   /* + 2 * lane + parity */
  KERNEL_FLAG_DONE = KERNEL_FLAG_OPEN + 2 * KERNEL_LANES, /* + lane */
  KERNEL_FLAG_META = KERNEL_FLAG_DONE + KERNEL_LANES,
  KERNEL_FLAG_GONE,
  KERNEL_FLAG_KINDS
};
/* Beside a route's check word: the rank met an expert out of range. */
#define KERNEL_CHECK_BAD_ENTRY 0x80000000u
enum {
  KERNEL_PHASE_NONE = 0,
  KERNEL_PHASE_ROUTE = 1,
  KERNEL_PHASE_DISPATCH = 2,
  KERNEL_PHASE_COMBINE = 3,
  KERNEL_PHASE_MEMORY = 4,
  KERNEL_PHASE_WEIGHTS = 5,
  KERNEL_PHASE_GRADS = 6
};

/* Why a group stopped, in host memory mapped to the device: the kernels write, the host reads without
 * waiting. */
typedef struct {
  int32_t code;  /* ultraepResult_t; written last */
  int32_t phase; /* KERNEL_PHASE_... */
  int32_t rank;  /* that did not come or failed */
  int32_t abort; /* set by the host: every wait ends */
} kernelFailure_t;

/* One row's part in its token, written by the token's rank into the window of the row's rank. */
typedef struct {
  int32_t next;    /* the token's next row on this rank, in order of k; -1: none */
  int32_t isFirst; /* 1: the first of the token's rows on this rank */
  float weight;    /* top-k weight, 1 where the route has none */
  int32_t source;  /* the token's rank */
} kernelMeta_t;

/* One lane's part of that which follows. */
typedef struct {
  uint32_t calls;      /* collective calls that have finished */
  uint32_t arrived[2]; /* blocks at each barrier of the kernel that runs */
  uint32_t left;       /* blocks that have finished */
} kernelLane_t;

/* Device memory of one rank that only its own kernels touch. All zero at first. */
typedef struct {
  kernelLane_t lanes[KERNEL_LANES];
  uint32_t badEntry;                              /* the route under way met an expert out of range */
  int32_t failed;                                 /* ultraepResult_t once the group has failed */
  uint32_t isRecorded;                            /* and once the host's record of that is whole */
  unsigned long long dispatchBytes, combineBytes; /* rows that crossed ranks */
  unsigned long long weightBytes, gradBytes;      /* copied into slots, read from slots */
} kernelState_t;

/* A rank's view of its group; passed to kernels by value. */
typedef struct {
  kernelPlanner_t planner;
  int32_t rank, topK, alignment;
  int32_t usesMeta;    /* 1: rows' parts in their tokens travel; 2: and are needed before the next exchange */
  int32_t nSegments;   /* E/R + the config's S */
  int32_t lane;        /* KERNEL_LANE_..., of the kernel */
  int32_t nBlocks;     /* at most, of one kernel */
  int32_t sharedBytes; /* of a block at most, on this device */
  int32_t hasBulk;     /* the device has bulk copies (sm_90 and later) */
  int64_t maxRecvRows;
  uint64_t timeoutNs;
  size_t loadsOffset;   /* in a window: int32 [2][R][E], by parity of the lane's call */
  char *const *windows; /* [R] device array: every rank's window as seen from here */
  kernelState_t *state;
  kernelLane_t *laneState;  /* state->lanes + lane: the fused kernel has no register to spare */
  kernelFailure_t *failure; /* as mapped to the device */
  int32_t *chunkCounts;     /* [nBlocks][E] */
} kernelGroup_t;

/* Bits beside the rank in kernelPlace_t.rank. */
#define KERNEL_PLACE_RANK_MASK 0xffff
#define KERNEL_PLACE_LATER 0x10000  /* not the first of its token's rows on that rank */
#define KERNEL_PLACE_SHARED 0x20000 /* its token has two or more rows on that rank */
typedef struct {
  int32_t rank; /* with the bits above; -1: unused entry */
  int32_t row;
} kernelPlace_t;

/* How an update of a route came out, or a later call in which ranks found that they differ. Each lane has its
 * own: an update sets both, and a difference only that of the lane where it was found, for calls of the other
 * lane run meanwhile and must be refused on all ranks or on none. code and nUpdates are one 64-bit word,
 * written last. */
typedef struct {
  int32_t code;     /* ultraepResult_t */
  int32_t nUpdates; /* the number of the update that was enqueued last; replays of a graph do not count */
  int32_t rank;     /* whose capacity or entry it was, -1 if none */
  int32_t reserved;
  int64_t rows; /* that this rank would need */
} kernelRouteStatus_t;

/* A route's device memory. */
typedef struct {
  kernelPlace_t *places; /* [maxTokens][topK] */
  float *weights;        /* [maxTokens][topK] */
  int32_t *loads;        /* [R][E] of the last update */
  int32_t *expert;       /* [nSegments], as in ultraepSegments_t */
  int64_t *firstRow, *rows, *totalRows;
  int32_t *slotExpert; /* [R*S] expert in each slot of every rank, ascending on a rank, -1 where empty */
  /* [2 * KERNEL_MAX_TENSORS][nSegments] where each local instance's weights, then gradients, are: in the
   * layer of the last weights sync. Null pointers before that. */
  void **pointers;
  kernelRouteStatus_t *status;     /* [KERNEL_LANES] */
  kernelRouteStatus_t *hostStatus; /* the same in mapped host memory */
  size_t metaOffset;               /* in a window: kernelMeta_t [maxRecvRows], where usesMeta */
} kernelRoute_t;

/* Bytes of shared memory that a route needs at least; more than the device's limit per block cannot be
 * launched. */
size_t kernelRouteSharedBytes(const kernelPlanner_t *planner);

/* One update of a route. */
typedef struct {
  const int32_t *topkIdx;   /* [nTokens][topK] */
  const float *topkWeights; /* [nTokens][topK] or null */
  int32_t nTokens;
  int32_t number; /* of this update, 0 when captured into a graph */
  uint32_t check; /* as in kernelExchange_t, below KERNEL_CHECK_BAD_ENTRY */
} kernelUpdate_t;

/* Count, publish, plan, offsets. */
int kernelRouteLaunch(const kernelGroup_t *group, const kernelRoute_t *route, const kernelUpdate_t *update,
                      cudaStream_t stream);

/* ---- the exchange ---- */

typedef struct {
  const char *sendRows;  /* dispatch: [nTokens][rowBytes] of this rank; combine: unused */
  char *recvRows;        /* combine: [nTokens][rowBytes] of this rank; dispatch: unused */
  char *const *peerRows; /* [R] device array: the region that holds the symmetric rows, in every rank */
  size_t peerRowsOffset;
  const char *sendScales;  /* [nTokens][scaleBytes] or null */
  char *const *peerScales; /* [R], where sendScales is set */
  size_t peerScalesOffset;
  char *const *peerWeights; /* [R] or null: float [maxRecvRows] */
  size_t peerWeightsOffset;
  int32_t rowBytes, scaleBytes;
  int32_t nTokens;
  int32_t dataType;      /* ultraepDataType_t */
  int32_t weighted;      /* combine */
  int32_t once;          /* dispatch: ULTRAEP_DISPATCH_ONCE; combine: ULTRAEP_COMBINE_PARTIAL */
  uint32_t check;        /* equal on all ranks when they are in the same call with the same places, not 0 */
  size_t partialsOffset; /* in a window: [maxRecvRows][row], for partial sums */
} kernelExchange_t;

int kernelDispatchLaunch(const kernelGroup_t *group, const kernelRoute_t *route,
                         const kernelExchange_t *exchange, cudaStream_t stream);
/* An update and the dispatch on it in one launch, with the update's check. */
int kernelRouteDispatchLaunch(const kernelGroup_t *group, const kernelRoute_t *route,
                              const kernelUpdate_t *update, const kernelExchange_t *exchange,
                              cudaStream_t stream);
int kernelCombineLaunch(const kernelGroup_t *group, const kernelRoute_t *route,
                        const kernelExchange_t *exchange, cudaStream_t stream);

/* ---- experts: replicas' weights and gradients ---- */

/* Experts are cut into tiles, of which flags tell; a tensor's last one is shorter. */
#define KERNEL_TILE_BYTES 16384

/* One tensor of every expert of a layer. */
typedef struct {
  size_t bytes;       /* of one expert, a multiple of 16 */
  char *master;       /* [E/R][bytes], this rank's */
  char *const *peers; /* [R] device array: the region that holds the masters, in every rank; null: gradients
                         that other ranks do not see, all of a layer's or none */
  size_t peersOffset; /* of the masters in it */
  size_t slotOffset;  /* in every rank's slot memory: [S][bytes] */
  int32_t firstTile;  /* in the numbers of the tiles of all weights, or of all gradients, of one expert */
  int32_t dataType;   /* gradients: ultraepDataType_t */
} kernelTensor_t;

typedef struct {
  int32_t nWeights, nGrads;
  int32_t nWeightTiles, nGradTiles; /* of one expert */
  kernelTensor_t weights[KERNEL_MAX_TENSORS], grads[KERNEL_MAX_TENSORS];
  char *const *slots; /* [R] device array: slot memory of every rank */
  char *ownSlots;     /* this rank's, as its owner knows it */
  size_t flagsOffset; /* in slot memory: uint32 [S][nFlags], the call in which the slot's tile was ready */
  int32_t nFlags;
  uint32_t check; /* as in kernelExchange_t */
  /* Of gradients. */
  int32_t isUnordered; /* replicas may be added in any order; only where other ranks see the masters */
  int32_t leavesSlots; /* they are not cleared */
  int32_t masterTurns; /* how many times as many tiles a master's rank adds as a slot's; 1 or more, only where
                          other ranks see the masters */
} kernelExperts_t;

/* Tiles of a tensor. */
static inline int64_t kernelTiles(size_t bytes) {
  return (int64_t)((bytes + KERNEL_TILE_BYTES - 1) / KERNEL_TILE_BYTES);
}

int kernelWeightsLaunch(const kernelGroup_t *group, const kernelRoute_t *route,
                        const kernelExperts_t *experts, cudaStream_t stream);
int kernelGradsLaunch(const kernelGroup_t *group, const kernelRoute_t *route, const kernelExperts_t *experts,
                      cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
